"""A bench for parity: small random Llamas, adapters saved by PEFT, and PEFT's own merges of them."""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import merger

PREFIX = "base_model.model."
EVERY = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
HIDDEN, INTERMEDIATE, LAYERS, VOCABULARY = 96, 256, 2, 160


@dataclass(frozen=True)
class Recipe:
    """An adapter to be made."""

    seed: int
    rank: int = 8
    alpha: int = 16
    targets: tuple[str, ...] = EVERY
    dtype: torch.dtype = torch.float32
    options: dict[str, Any] = field(default_factory=dict)
    """Further fields of LoraConfig."""


_PATTERNS: dict[str, Any] = {
    "rank_pattern": {"q_proj": 4, r"layers\.1\.mlp\.down_proj": 3},
    "alpha_pattern": {"v_proj": 5, r"layers\.0\.mlp\.up_proj": 24},
}

RECIPES: dict[str, Recipe] = {
    "a": Recipe(1),
    "b": Recipe(2, alpha=8),
    "c": Recipe(3, alpha=24),
    "a-bf16": Recipe(1, dtype=torch.bfloat16),
    "b-bf16": Recipe(2, alpha=8, dtype=torch.bfloat16),
    "c-f16": Recipe(3, alpha=24, dtype=torch.float16),
    "small": Recipe(4, rank=4, alpha=6),
    "large": Recipe(5, rank=16, alpha=8),
    "few": Recipe(6, targets=("q_proj", "down_proj")),
    "other": Recipe(7, targets=("k_proj", "down_proj", "gate_proj")),
    "upper": Recipe(8, options={"layers_to_transform": [1]}),
    "patterns": Recipe(9, options=_PATTERNS),
    "patterns-too": Recipe(10, alpha=4, options=_PATTERNS),
    "rslora": Recipe(11, options={"use_rslora": True}),
    "rslora-16": Recipe(12, rank=16, alpha=8, options={"use_rslora": True, "alpha_pattern": {"q_proj": 3}}),
    "head": Recipe(13, targets=("q_proj", "lm_head")),
    "head-saved": Recipe(13, targets=("q_proj", "lm_head")),
    "narrowed": Recipe(14, targets=("q_proj",), options={"rank_pattern": {"q_proj": 4}}),
    "dora": Recipe(20, options={"use_dora": True}),
    "lora-bias": Recipe(21, options={"lora_bias": True}),
    "saved-head": Recipe(22, targets=("q_proj",), options={"modules_to_save": ["lm_head"]}),
    "saved-norm": Recipe(23, targets=("q_proj",), options={"modules_to_save": ["model.norm"]}),
    "pissa": Recipe(24, targets=("q_proj",), options={"init_lora_weights": "pissa"}),
    "olora": Recipe(25, targets=("q_proj",), options={"init_lora_weights": "olora"}),
    "replicated": Recipe(26, options={"layer_replication": [(0, 2), (0, 2)]}),
    "tokens": Recipe(27, targets=("q_proj",), options={"trainable_token_indices": [1, 5]}),
    "embedding": Recipe(28, targets=("q_proj", "embed_tokens")),
}


@dataclass
class Bench:
    """Bases and adapters on disk, made once, and PEFT's answers."""

    root: Path
    _loaded: dict[tuple[object, ...], Any] = field(default_factory=dict)

    # ------------------------------------------------------------ files

    def base(self, dtype: torch.dtype = torch.float32, *, tied: bool = False, sharded: bool = False) -> Path:
        """A Llama with random weights, the same but for rounding at every dtype."""
        name = f"base-{str(dtype).removeprefix('torch.')}{'-tied' if tied else ''}{'-sharded' if sharded else ''}"
        path = self.root / name
        if not path.exists():
            torch.manual_seed(0)
            config = LlamaConfig(
                vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_hidden_layers=LAYERS,
                num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=tied,
                initializer_range=0.1, bos_token_id=1, eos_token_id=2,
            )  # fmt: skip
            model: Any = LlamaForCausalLM(config)
            model.to(dtype)
            model.save_pretrained(str(path), max_shard_size="150KB" if sharded else "5GB")
        return path

    def adapter(self, name: str, base: Path | None = None) -> Path:
        """An adapter of RECIPES, as PEFT saves it, with nothing left at zero."""
        base = base or self.base()
        path = self.root / f"adapter-{name}-{base.name}"
        if path.exists():
            return path
        recipe = RECIPES[name]
        config = peft.LoraConfig(
            r=recipe.rank, lora_alpha=recipe.alpha, target_modules=list(recipe.targets), task_type="CAUSAL_LM",
            **recipe.options,
        )  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = peft.get_peft_model(self.model(base, torch.float32), config)
            generator = torch.Generator().manual_seed(recipe.seed)
            with torch.no_grad():
                for key, parameter in model.named_parameters():
                    if ".lora_" in key or "modules_to_save" in key or "trainable_tokens" in key:
                        parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
            # Else PEFT copies the base's embeddings beside a LoRA on lm_head.
            model.save_pretrained(str(path), save_embedding_layers="auto" if name != "head" else False)
        weights = path / "adapter_model.safetensors"
        if recipe.dtype != torch.float32:
            save_file({k: v.to(recipe.dtype) for k, v in load_file(weights).items()}, weights, {"format": "pt"})
        return path

    def edited(self, name: str, new: str, **fields: object) -> Path:
        """A copy of an adapter with other fields in its config."""
        path = self.root / f"edited-{new}"
        if not path.exists():
            source = self.adapter(name)
            path.mkdir()
            (path / "adapter_model.safetensors").write_bytes((source / "adapter_model.safetensors").read_bytes())
            config = json.loads((source / "adapter_config.json").read_text())
            (path / "adapter_config.json").write_text(json.dumps(config | fields))
        return path

    # ------------------------------------------------------------ PEFT

    def model(self, path: Path, dtype: torch.dtype | str = "auto") -> Any:
        model: Any = AutoModelForCausalLM.from_pretrained(str(path), dtype=dtype)
        return model.eval()

    def peft_model(self, adapters: Sequence[Path], base: Path | None = None) -> Any:
        """The base with the adapters loaded, as s0, s1 and so on."""
        model = peft.PeftModel.from_pretrained(self.model(base or self.base()), str(adapters[0]), adapter_name="s0")
        for i, adapter in enumerate(adapters[1:], start=1):
            model.load_adapter(str(adapter), adapter_name=f"s{i}")
        return model.eval()

    def peft_weighted(
        self, adapters: Sequence[Path], weights: Sequence[float], combination_type: str, *,
        masks: Callable[[Any], list[Tensor]] | None = None, base: Path | None = None, **options: Any,
    ) -> dict[str, Tensor]:  # fmt: skip
        """The tensors of PEFT's merged adapter, under the names that it saves.

        `masks(model)` lists what torch.bernoulli is to answer, call after call.
        """
        key = (*adapters, base)
        if key not in self._loaded:
            self._loaded[key] = self.peft_model(adapters, base)
        model = self._loaded[key]
        names = [f"s{i}" for i in range(len(adapters))]
        with warnings.catch_warnings(), self._bernoulli(None if masks is None else masks(model)):
            warnings.filterwarnings("ignore", message="The density .* no pruning will be performed")
            model.add_weighted_adapter(names, list(weights), "merged", combination_type=combination_type, **options)
        state = peft.get_peft_model_state_dict(model, adapter_name="merged")
        found = {name: value.detach().clone() for name, value in state.items()}
        model.delete_adapter("merged")
        return found

    @contextmanager
    def _bernoulli(self, masks: list[Tensor] | None) -> Iterator[None]:
        if masks is None:
            yield
            return
        left = list(masks)

        def answer(probabilities: Tensor) -> Tensor:
            mask = left.pop(0)
            assert mask.shape == probabilities.shape
            return mask.to(probabilities.dtype)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "bernoulli", answer)
            yield
        assert not left, f"PEFT asked for {len(left)} masks fewer than were made"

    def folded(self, adapters: Sequence[Path], base: Path, *, safe: bool = False) -> Any:
        """PEFT's merge_and_unload of the adapters, one after another."""
        model = self.peft_model(adapters, base)
        return model.merge_and_unload(safe_merge=safe, adapter_names=[f"s{i}" for i in range(len(adapters))])

    # ------------------------------------------------------------ first principles

    def deltas(self, adapter: Path) -> dict[str, Tensor]:
        """scaling·B·A of every module in float64, the scaling read from the config by PEFT's rules."""
        config = peft.PeftConfig.from_pretrained(str(adapter))
        tensors = load_file(adapter / "adapter_model.safetensors")
        found = {}
        for key, a in tensors.items():
            if not key.endswith(".lora_A.weight"):
                continue
            module = key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
            b = tensors[key.replace("lora_A", "lora_B")]
            alpha = next(
                (v for pattern, v in config.alpha_pattern.items() if re.match(rf"(.*\.)?({pattern})$", module)),
                config.lora_alpha,
            )
            scaling = alpha / (a.shape[0] ** 0.5 if config.use_rslora else a.shape[0])
            found[module] = scaling * (b.double() @ a.double())
        return found

    def weighted_sum(self, adapters: Sequence[Path], weights: Sequence[float]) -> dict[str, Tensor]:
        """Σ w·ΔW of every module in float64."""
        total: dict[str, Tensor] = {}
        for adapter, weight in zip(adapters, weights, strict=True):
            for module, delta in self.deltas(adapter).items():
                total[module] = total.get(module, torch.zeros_like(delta)) + weight * delta
        return total

    def logits(self, model: Any) -> Tensor:
        """What a model says of a fixed text, float32."""
        tokens = torch.arange(3, 35).reshape(2, 16)
        with torch.no_grad():
            found = model(input_ids=tokens).logits
        assert isinstance(found, Tensor)
        return found.float()

    def expected_logits(self, deltas: Mapping[str, Tensor], base: Path | None = None) -> Tensor:
        """The logits of the base plus deltas."""
        model = self.model(base or self.base())
        with torch.no_grad():
            for module, delta in deltas.items():
                weight = model.get_submodule(module).weight
                weight.copy_((weight.double() + delta).to(weight.dtype))
        return self.logits(model)

    def cut(self, deltas: Mapping[str, Tensor], rank: int) -> tuple[dict[str, Tensor], dict[str, float]]:
        """The best approximation of each delta at a rank, in float64, and how far apart (relatively) the last singular
        value that is kept and the first that is not are: an SVD in float32 errs by about 1e-7 over that."""
        best, gaps = {}, {}
        for module, delta in deltas.items():
            u, s, vt = torch.linalg.svd(delta.double(), full_matrices=False)
            best[module] = (u[:, :rank] * s[:rank]) @ vt[:rank]
            is_whole = rank >= len(s) or float(s[rank]) < 1e-9 * float(s[0])
            gaps[module] = 1.0 if is_whole else float((s[rank - 1] - s[rank]) / s[rank - 1])
        return best, gaps

    # ------------------------------------------------------------ raymerge

    def weighted(
        self, adapters: Sequence[Path], weights: Sequence[float], out: Path, combination_type: str, **options: Any
    ) -> dict[str, Tensor]:  # fmt: skip
        """raymerge's merged adapter, read back from its file."""
        merger.add_weighted_adapter(
            [str(a) for a in adapters], weights, out, combination_type=combination_type, workers=2, **options
        )
        return load_file(out / "adapter_model.safetensors")

    def products(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """B·A of every module in float64; the scaling of merged adapters is 1."""
        return {
            key.removeprefix(PREFIX).removesuffix(".lora_A.weight"): tensors[key.replace("lora_A", "lora_B")].double()
            @ a.double()
            for key, a in tensors.items()
            if key.endswith(".lora_A.weight")
        }

    # ------------------------------------------------------------ comparisons

    def assert_equal(self, ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
        """The same names, shapes, dtypes and bits (but for the sign of zero)."""
        assert sorted(ours) == sorted(theirs)
        for key, theirs_value in theirs.items():
            value = ours[key]
            assert (value.dtype, value.shape) == (theirs_value.dtype, theirs_value.shape), key
            unequal = int((value != theirs_value).sum())
            assert unequal == 0, f"{key}: {unequal} of {value.numel()} elements differ"

    def assert_close(self, ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], tolerance: float) -> None:
        """‖ours − theirs‖ ≤ tolerance · ‖theirs‖ for every name, and the same names."""
        assert sorted(ours) == sorted(theirs)
        for key, value in theirs.items():
            error = float((ours[key].double() - value.double()).norm())
            norm = float(value.double().norm())
            assert error <= tolerance * norm, f"{key}: {error:.3g} of {norm:.3g}"


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("parity"))


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """One thread, as raymerge computes, and no waiting for disks; what a merge changes in this process is put back."""
    threads, grad = torch.get_num_threads(), torch.is_grad_enabled()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield
    torch.set_num_threads(threads)
    torch.set_grad_enabled(grad)
