"""Models as transformers has them, made from anything that raymerge reads: `instance`.

What is asked for is merged into memory first (a model alone: copied, its codes made dense; an adapter: folded into its
base), so a model on S3, a quantised one and any kind of adapter are all evaluated alike. One stands in memory at a
time: its files, and then its weights in float32 on a CPU, or as they are stored on a GPU.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merger import api
from merger.catalog import kind_of
from merger.errors import ManifestError, PlanError
from merger.manifest import parse_model_reference
from merger.storage import MemoryStore

_WEIGHTS = (".safetensors", ".index.json")


@dataclass(frozen=True, slots=True)
class Instance:
    """A causal language model that can be asked."""

    model: Any
    tokenizer: Any
    device: str

    @property
    def keeps_logits(self) -> bool:
        """Whether it can be asked for the logits of the last tokens alone."""
        return "logits_to_keep" in inspect.signature(self.model.forward).parameters

    @property
    def limit(self) -> int | None:
        """Tokens that it takes at once, where its config says so."""
        found = getattr(self.model.config, "max_position_embeddings", None)
        return int(found) if isinstance(found, int) and found > 0 else None


@contextlib.contextmanager
def place() -> Iterator[str]:
    """A place in memory for one output, empty again at the end."""
    name = f"raymerge-{uuid.uuid4().hex}"
    try:
        yield f"memory://{name}"
    finally:
        MemoryStore(name).files.clear()


def standing_for(reference: str, base: str | None) -> dict[str, object]:
    """The manifest whose output is the model that a reference stands for: a dense one."""
    named = parse_model_reference(reference)
    if not named.adapters and kind_of(named.model) == "adapter":
        document = api.fold_manifest(reference, base=base)
        return {**document, "output": {"kind": "model", "quantization": "none"}}
    return {"merge_method": "passthrough", "models": [{"model": reference}], "output": {"quantization": "none"}}


@contextlib.contextmanager
def instance(reference: str, *, base: str | None = None, device: str = "cpu") -> Iterator[Instance]:
    """The model at a reference, or an adapter's base with the adapter in it. `base` is for adapters.

    Raises what a merge of it raises, and PlanError(code `no-such-model`) where transformers has no such class.
    """
    with place() as made:
        api.merge(standing_for(reference, base), made)
        yield from_memory(made, device=device)


def made_by(out: str) -> dict[str, Any]:
    """The adapter_config.json of an output in memory; empty of a model."""
    held = MemoryStore(out.removeprefix("memory://")).files.get("adapter_config.json")
    return {} if held is None else dict(json.loads(held))


def from_memory(out: str, *, device: str) -> Instance:
    """The model of a merge into memory. Its files are freed as their tensors are taken."""
    import torch
    from safetensors.torch import load
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # type: ignore[no-untyped-call]
    files = MemoryStore(out.removeprefix("memory://")).files
    with tempfile.TemporaryDirectory(prefix="raymerge-") as folder:
        for name, data in files.items():
            if not name.endswith(_WEIGHTS) and "/" not in name:
                (Path(folder) / name).write_bytes(data)
        try:
            config = AutoConfig.from_pretrained(folder)
            tokenizer = AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError, KeyError) as error:
            raise _no_such_model(out, error) from error
    tensors: dict[str, Any] = {}
    for name in [name for name in files if name.endswith(".safetensors")]:
        tensors |= load(bytes(files.pop(name)))
    try:
        made: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        model, told = (made[0] if isinstance(made, tuple) else made).from_pretrained(
            None, config=config, state_dict=tensors, dtype=torch.float32 if device == "cpu" else "auto",
            output_loading_info=True,
        )  # fmt: skip
    except (ValueError, KeyError, TypeError) as error:
        raise _no_such_model(out, error) from error
    lost = [*told["missing_keys"], *told["mismatched_keys"]]
    if lost:
        raise PlanError.of(
            "no-such-model", "the checkpoint does not hold the tensors that transformers expects", where=out,
            why=", ".join(map(str, lost[:4])), fix="compare it without --data: that reads its tensors alone",
        )  # fmt: skip
    return Instance(model.to(device).eval(), tokenizer, device)


def _no_such_model(where: str, error: Exception) -> PlanError:
    return PlanError.of(
        "no-such-model", f"transformers cannot make this model: {error}", where=where,
        why="only causal language models with a tokenizer are asked", fix="compare it without --data",
    )  # fmt: skip


def check_device(device: str) -> None:
    """Raise ManifestError where there is no such device."""
    import torch

    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise ManifestError.of("bad-arguments", f"there is no device {device} here", where="--device",
                               fix="use --device cpu")  # fmt: skip
