"""Models as transformers has them, made from anything that raymerge reads: `instance`.

What is asked for is merged into memory first (a model alone: copied, its codes made dense; an adapter: folded into its
base), so a model on S3, a quantised one and any kind of adapter are all evaluated alike. One stands in memory at a
time: its files, and its weights in float32 on a CPU, or as they are stored on a GPU.
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
from merger.catalog import kind_named
from merger.errors import ManifestError, PlanError
from merger.formats.safetensors import header_length, parse_header
from merger.operands import torch_dtype
from merger.planning.nouns import MergePlan
from merger.quantization import quantization_config
from merger.storage import MemoryStore
from merger.storage.memory import forget
from merger.tensors import format_size

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
        forget(name)


def standing_for(reference: str, base: str | None) -> dict[str, object]:
    """The manifest whose output is the model that a reference stands for: a dense one."""
    if kind_named(reference) == "adapter":
        document = api.fold_manifest(reference, base=base)
        return {**document, "output": {"kind": "model", "quantization": "none"}}
    return {"merge_method": "passthrough", "models": [{"model": reference}], "output": {"quantization": "none"}}


@contextlib.contextmanager
def instance(reference: str, *, base: str | None = None, device: str = "cpu") -> Iterator[Instance]:
    """The model at a reference, or an adapter's base with the adapter in it. `base` is for adapters.

    Raises what a merge of it raises, and PlanError: `no-such-model` where transformers has no such class, `memory`
    where the machine has too little.
    """
    with place() as made:
        planned = api.plan(standing_for(reference, base), made)
        check_memory(planned, reference, device=device)
        api.run_planned(planned)
        yield from_memory(made, reference, device=device)


def check_memory(planned: MergePlan, name: str, *, device: str) -> None:
    """Raise PlanError(code `memory`) where a merge in memory, and the model made of it, do not fit."""
    files = sum(file.size for output in planned.outputs for file in output.files)
    numbers = sum(
        place.row_bytes * place.rows // place.dtype.itemsize
        for task in planned.tasks for result in task.results for place in result.places if place.dtype is not None
    )  # fmt: skip
    needed = files + (4 * numbers if device == "cpu" else 0)
    free = 2 * api.default_memory()
    if needed > free:
        raise PlanError.of(
            "memory", f"asking it takes {format_size(needed)} of memory, and {format_size(free)} are free", where=name,
            why="its files, and its weights in float32" if device == "cpu" else "its files, before they are on the GPU",
            fix="use a machine with more, or compare it without --data",
        )  # fmt: skip


def made_by(out: str) -> dict[str, Any]:
    """The adapter_config.json of an output in memory; empty of a model."""
    return _document(out, "adapter_config.json")


def is_quantised(out: str) -> bool:
    """Whether an output in memory holds codes."""
    return quantization_config(_document(out, "config.json")) is not None


def _files(out: str) -> dict[str, bytearray]:
    return MemoryStore(out.removeprefix("memory://")).files


def _document(out: str, name: str) -> dict[str, Any]:
    """A JSON file of an output in memory; empty where there is none."""
    return dict(json.loads(_files(out).get(name, b"{}")))


def from_memory(out: str, name: str, *, device: str) -> Instance:
    """The model of a merge into memory, called `name` in errors. Its files are freed as their tensors are taken."""
    import torch
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # type: ignore[no-untyped-call]
    files = _files(out)
    with tempfile.TemporaryDirectory(prefix="raymerge-") as folder:
        for file, data in files.items():
            if not file.endswith(_WEIGHTS) and "/" not in file:
                (Path(folder) / file).write_bytes(data)
        try:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise _no_such_model(name, error) from error
    tensors: dict[str, Any] = {}
    for file in [file for file in files if file.endswith(".safetensors")]:
        tensors |= _tensors(files.pop(file), f"{name}/{file}")
    try:
        made: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        model, told = (made[0] if isinstance(made, tuple) else made).from_pretrained(
            None, config=config, state_dict=tensors, dtype=torch.float32 if device == "cpu" else "auto",
            output_loading_info=True,
        )  # fmt: skip
    except (ValueError, KeyError, TypeError, ImportError, RuntimeError) as error:
        raise _no_such_model(name, error) from error
    lost = [*told["missing_keys"], *told["mismatched_keys"]]
    if lost:
        raise PlanError.of(
            "no-such-model", "the checkpoint does not hold the tensors that transformers expects", where=name,
            why=", ".join(map(str, lost[:4])), fix="compare it without --data: that reads its tensors alone",
        )  # fmt: skip
    return Instance(model.to(device).eval(), tokenizer, device)


def _tensors(file: bytearray, where: str) -> dict[str, Any]:
    """The tensors of a .safetensors file, which they share."""
    import torch

    length = header_length(bytes(file[:8]), len(file), where)
    found = {}
    for entry in parse_header(bytes(file[: 8 + length]), file_size=len(file), where=where).tensors:
        dtype = torch_dtype(entry.spec.dtype)
        held = memoryview(file)[entry.start : entry.stop]
        flat = torch.frombuffer(held, dtype=dtype) if held.nbytes else torch.empty(0, dtype=dtype)
        found[entry.spec.name] = flat.reshape(entry.spec.shape)
    return found


def _no_such_model(where: str, error: Exception) -> PlanError:
    told = f"no class for {error}" if isinstance(error, KeyError) else str(error)
    return PlanError.of(
        "no-such-model", f"transformers cannot make this model: {told}", where=where,
        why="only causal language models with a tokenizer are asked", fix="compare it without --data",
    )  # fmt: skip


def check_device(device: str) -> None:
    """Raise ManifestError where there is no such device."""
    import torch

    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise ManifestError.of("bad-arguments", f"there is no device {device} here", where="--device",
                               fix="use --device cpu")  # fmt: skip
