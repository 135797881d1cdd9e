"""A bench for quantised bases: one small Llama, an adapter as PEFT saves it, and what libraries make of both."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import merger
from merger.catalog import Catalog, inspect_source
from merger.operands import Arena, OperandReader
from merger.planning.nouns import DenseTerm, MergePlan, Source

Edit = Callable[[str, Tensor], Mapping[str, Tensor] | None]
"""(name, weight) → the tensors that take its place, or None to leave it."""


@dataclass
class QuantBench:
    """Checkpoints on disk, made once."""

    root: Path

    def base(self, dtype: torch.dtype = torch.bfloat16) -> Path:
        path = self.root / f"base-{str(dtype).removeprefix('torch.')}"
        if not path.exists():
            torch.manual_seed(0)
            config = LlamaConfig(
                vocab_size=160, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.1, bos_token_id=1,
                eos_token_id=2,
            )  # fmt: skip
            model: Any = LlamaForCausalLM(config)
            model.to(dtype).save_pretrained(str(path))
        return path

    def adapter(self, targets: tuple[str, ...] = ("q_proj", "v_proj", "down_proj")) -> Path:
        path = self.root / f"adapter-{'-'.join(targets)}"
        if path.exists():
            return path
        base: Any = AutoModelForCausalLM.from_pretrained(str(self.base(torch.float32)), dtype=torch.float32)
        config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=list(targets), task_type="CAUSAL_LM")
        model = peft.get_peft_model(base, config)
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if ".lora_" in key:
                    parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
        model.save_pretrained(str(path))
        return path

    def edited(
        self, name: str, scheme: Mapping[str, Any], edit: Edit, dtype: torch.dtype = torch.bfloat16,
        metadata: Mapping[str, str] | None = None,
    ) -> Path:  # fmt: skip
        """A copy of the base with tensors in the place of others and a quantization_config, where `scheme` says one.

        `metadata` is read when every tensor has been edited.
        """
        path = self.root / name
        if path.exists():
            return path
        base = self.base(dtype)
        shutil.copytree(base, path)
        tensors: dict[str, Tensor] = {}
        for key, value in load_file(base / "model.safetensors").items():
            made = edit(key, value)
            tensors.update({key: value} if made is None else made)
        header = {"format": "pt", **(metadata or {})}
        save_file({k: v.contiguous() for k, v in tensors.items()}, path / "model.safetensors", header)
        config = json.loads((base / "config.json").read_text())
        if scheme:
            config["quantization_config"] = dict(scheme)
        (path / "config.json").write_text(json.dumps(config))
        return path

    # ------------------------------------------------------------ ours

    def fold(self, base: Path, out: Path, adapter: Path | None = None, **output: Any) -> dict[str, Tensor]:
        """Every tensor of the adapter folded into a base."""
        manifest = {
            "base_model": str(base), "adapters": [{"adapter": str(adapter or self.adapter())}],
            "merge_method": "task_arithmetic", "output": {"path": str(out), "kind": "model", **output},
        }  # fmt: skip
        merger.merge(manifest, workers=2)
        return stored(out)

    def logits(self, path: Path, dtype: Any = torch.float32, adapter: Path | None = None) -> Tensor:
        """What transformers makes of a checkpoint, with an unmerged adapter on it or without."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model: Any = AutoModelForCausalLM.from_pretrained(str(path), dtype=dtype)
            if adapter is not None:
                model = peft.PeftModel.from_pretrained(model, str(adapter))
            with torch.no_grad():
                found: Tensor = model.eval()(torch.arange(3, 43)[None]).logits.float()
        return found


def stored(path: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        found |= load_file(file)
    return found


def decoded(path: Path, *, step: int = 0) -> dict[str, Tensor]:
    """Every coded tensor of a checkpoint as float32, read `step` rows at a time."""
    catalog: Catalog = inspect_source(str(path))
    assert not catalog.problems, catalog.problems
    plan = MergePlan(sources=(Source("base", catalog),), outputs=(), tasks=())
    reader = OperandReader(plan, Arena(), factor_bytes=1 << 20)
    found = {}
    for name, tensor in catalog.tensors.items():
        if tensor.coded is None:
            continue
        spec = tensor.spec
        out = torch.empty(spec.rows, spec.cols).numpy()
        for first in range(0, spec.rows, step or spec.rows):
            last = min(spec.rows, first + (step or spec.rows))
            reader.operand((DenseTerm(0, name),), first, last, out[first:last])
        found[name] = torch.from_numpy(out.copy()).reshape(spec.shape)
    return found


def delta(adapter: Path) -> dict[str, Tensor]:
    """scaling·B·A of every module in float64, by the name of its weight."""
    config = peft.PeftConfig.from_pretrained(str(adapter))
    tensors = load_file(adapter / "adapter_model.safetensors")
    return {
        key.removeprefix("base_model.model.").replace("lora_A.", ""): config.lora_alpha
        / config.r
        * (tensors[key.replace("lora_A", "lora_B")].double() @ a.double())
        for key, a in tensors.items()
        if "lora_A" in key
    }
