"""A workshop: small bases of several architectures, adapters that PEFT makes and saves, and PEFT's answers."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import merger

TOKENS = torch.arange(3, 35).reshape(2, 16)


class Layers(nn.Module):
    """One layer of every other kind."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(40, 24)
        self.conv1 = nn.Conv1d(24, 20, 3, padding=1)
        self.conv2 = nn.Conv2d(1, 6, (3, 3), padding=1)
        self.point = nn.Conv2d(6, 5, (1, 1))
        self.conv3 = nn.Conv3d(1, 4, (1, 1, 3), padding=(0, 0, 1))
        self.attention = nn.MultiheadAttention(20, 2, batch_first=True)
        self.out = nn.Linear(20, 12)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.conv1(self.words(input_ids).transpose(1, 2)).transpose(1, 2)
        x = x + self.attention(x, x, x)[0]
        y = self.point(torch.tanh(self.conv2(x[:, None]))).mean(1)
        z = self.conv3(y[:, None, None]).mean(1)[:, 0]
        made: Tensor = self.out(torch.tanh(z))
        return made


def _llama(**fields: Any) -> Any:
    config = LlamaConfig(
        vocab_size=160, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.1, bos_token_id=1, eos_token_id=2,
        **fields,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def _gpt2() -> Any:
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=160, n_embd=48, n_layer=2, n_head=4, n_positions=64, initializer_range=0.1,
                   bos_token_id=1, eos_token_id=2)
    )  # fmt: skip


BASES: dict[str, Callable[[], Any]] = {
    "llama": lambda: _llama(tie_word_embeddings=False),
    "llama-tied": lambda: _llama(tie_word_embeddings=True),
    "llama-bias": lambda: _llama(tie_word_embeddings=False, attention_bias=True, mlp_bias=True),
    "gpt2": _gpt2,
    "layers": Layers,
}


@dataclass
class Workshop:
    """Bases and adapters on disk, made once."""

    root: Path
    _made: dict[str, Path] = field(default_factory=dict)

    def base(self, kind: str, dtype: torch.dtype = torch.float32) -> Path:
        path = self.root / f"{kind}-{str(dtype).removeprefix('torch.')}"
        if not path.exists():
            torch.manual_seed(0)
            model = BASES[kind]()
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if name.endswith("bias"):
                        parameter.normal_(std=0.1)
            model.to(dtype)
            if isinstance(model, Layers):
                path.mkdir()
                save_file({k: v.contiguous() for k, v in model.state_dict().items()}, path / "model.safetensors")
                (path / "config.json").write_text(json.dumps({"model_type": "layers"}))
            else:
                model.save_pretrained(str(path))
        return path

    def model(self, path: Path) -> Any:
        if json.loads((path / "config.json").read_text())["model_type"] == "layers":
            model: Any = Layers()
            model.load_state_dict(load_file(path / "model.safetensors"))
            return model.eval()
        loaded: Any = AutoModelForCausalLM.from_pretrained(str(path), dtype="auto")
        return loaded.eval()

    def adapter(self, base: Path, config: Any, seed: int = 1, **saving: Any) -> Path:
        """An adapter as PEFT saves it, every trained number moved away from where it starts."""
        path = self.root / f"adapter-{len(list(self.root.glob('adapter-*')))}"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(seed)
            model = peft.get_peft_model(self.model(base), config)
            self.move(model, seed)
            model.save_pretrained(str(path), **saving)
        found = json.loads((path / "adapter_config.json").read_text())
        (path / "adapter_config.json").write_text(json.dumps(found | {"base_model_name_or_path": str(base)}))
        return path

    def move(self, model: Any, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))

    def loaded(self, base: Path, adapter: Path) -> Any:
        """PEFT's unmerged model."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return peft.PeftModel.from_pretrained(self.model(base), str(adapter)).eval()

    def merged(self, base: Path, adapter: Path) -> dict[str, Tensor]:
        """The tensors of PEFT's merge_and_unload."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = self.loaded(base, adapter).merge_and_unload()
        return {name: value.detach() for name, value in model.state_dict().items()}

    def logits(self, model: Any) -> Tensor:
        with torch.no_grad():
            found = model(input_ids=TOKENS)
        made: Tensor = found if isinstance(found, Tensor) else found.logits
        return made.float()

    def fold(self, base: Path, adapters: Sequence[Path], out: Path, **options: Any) -> Path:
        merger.fold([str(a) for a in adapters], out, base=str(base), workers=1, **options)
        return out

    def merge(self, manifest: Mapping[str, Any], out: Path) -> Path:
        merger.merge(dict(manifest), out, workers=1)
        return out


def stored(path: Path) -> dict[str, Tensor]:
    """Every tensor of a folder's safetensors files."""
    found: dict[str, Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        found |= load_file(file)
    return found


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("workshop"))


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """One thread, as raymerge computes, and no waiting for disks."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield
    torch.set_num_threads(threads)
