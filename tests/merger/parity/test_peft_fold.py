"""Folds against PEFT 0.21.2's merge_and_unload: the same bits, and what it leaves alone byte for byte."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import merger
from merger.errors import RefusedError

if TYPE_CHECKING:
    from tests.merger.parity.conftest import Bench

HALVES = [torch.bfloat16, torch.float16]
Rounding = Literal["once", "peft_safe"]


def fold(adapters: Sequence[Path], base: Path, out: Path, rounding: Rounding = "once") -> dict[str, Tensor]:
    """Every tensor of the folded model."""
    merger.fold([str(a) for a in adapters], out, base=str(base), rounding=rounding, workers=2)
    return stored(out)


def stored(model: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in sorted(model.glob("*.safetensors")):
        found |= load_file(file)
    return found


def state(model: torch.nn.Module) -> dict[str, Tensor]:
    return {key: value.detach() for key, value in model.state_dict().items()}


def bytes_of(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def float32_sum(base: Tensor, deltas: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """((W + Δ₁) + Δ₂) … in float32, rounded once."""
    total = base.float()
    for delta in deltas:
        total = total + delta
    return total.to(dtype)


def float32_deltas(adapter: Path) -> dict[str, Tensor]:
    """(B·A)·s in float32, as PEFT multiplies, for adapters without patterns."""
    config = peft.PeftConfig.from_pretrained(str(adapter))
    tensors = load_file(adapter / "adapter_model.safetensors")
    scaling = config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r)
    return {
        key.removeprefix("base_model.model.").replace("lora_A.", ""): (
            tensors[key.replace("lora_A", "lora_B")].float() @ a.float()
        ) * scaling
        for key, a in tensors.items()
        if "lora_A" in key
    }  # fmt: skip


# ---------------------------------------------------------------- the same bits


@pytest.mark.parametrize(
    "names",
    [
        ("a",), ("rslora",), ("rslora-16",), ("patterns",), ("few",), ("upper",), ("a-bf16",), ("large",),
        ("a", "b"), ("b", "a"), ("a", "few", "rslora"), ("patterns", "a-bf16", "upper", "large"),
    ],
    ids="+".join,
)  # fmt: skip
@pytest.mark.parametrize("rounding", ["once", "peft_safe"])
def test_float32(bench: Bench, names: tuple[str, ...], rounding: Rounding, tmp_path: Path) -> None:
    base, adapters = bench.base(), [bench.adapter(n) for n in names]
    ours = fold(adapters, base, tmp_path / "out", rounding)
    bench.assert_equal(ours, state(bench.folded(adapters, base, safe=rounding == "peft_safe")))
    touched = [key for key, value in stored(base).items() if bytes_of(value) != bytes_of(ours[key])]
    modules = {module for a in adapters for module in bench.deltas(a)}
    assert sorted(touched) == sorted(f"{module}.weight" for module in modules)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", ["a", "rslora", "patterns", "few", "a-bf16", "c-f16"])
@pytest.mark.parametrize("rounding", ["once", "peft_safe"])
def test_half_precision_base(bench: Bench, dtype: torch.dtype, name: str, rounding: Rounding, tmp_path: Path) -> None:
    base, adapters = bench.base(dtype), [bench.adapter(name)]
    ours = fold(adapters, base, tmp_path / "out", rounding)
    assert {value.dtype for value in ours.values()} == {dtype}
    bench.assert_equal(ours, state(bench.folded(adapters, base, safe=rounding == "peft_safe")))


@pytest.mark.parametrize("dtype", HALVES)
def test_the_two_roundings_differ(bench: Bench, dtype: torch.dtype, tmp_path: Path) -> None:
    base, adapters = bench.base(dtype), [bench.adapter("a")]
    once, twice = (fold(adapters, base, tmp_path / r, r) for r in ("once", "peft_safe"))
    key = "model.layers.0.mlp.up_proj.weight"
    assert 0.05 < float((once[key] != twice[key]).float().mean()) < 0.5


@pytest.mark.parametrize("dtype", HALVES)
def test_several_adapters_are_rounded_once(bench: Bench, dtype: torch.dtype, tmp_path: Path) -> None:
    """PEFT rounds after each; here the float32 sum is rounded."""
    base, adapters = bench.base(dtype), [bench.adapter(n) for n in ("a", "few", "rslora")]
    ours = fold(adapters, base, tmp_path / "out")
    every = [float32_deltas(a) for a in adapters]
    expected = {
        key: float32_sum(value, [deltas[key] for deltas in every if key in deltas], dtype)
        for key, value in stored(base).items()
    }
    bench.assert_equal(ours, expected)
    theirs = state(bench.folded(adapters, base))
    assert any(not torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("dtype", HALVES)
def test_several_adapters_with_rounded_deltas(bench: Bench, dtype: torch.dtype, tmp_path: Path) -> None:
    base, adapters = bench.base(dtype), [bench.adapter(n) for n in ("a", "few")]
    ours = fold(adapters, base, tmp_path / "out", "peft_safe")
    every = [float32_deltas(a) for a in adapters]
    expected = {
        key: float32_sum(value, [deltas[key].to(dtype).float() for deltas in every if key in deltas], dtype)
        for key, value in stored(base).items()
    }
    bench.assert_equal(ours, expected)


def test_the_base_that_the_adapter_names(bench: Bench, tmp_path: Path) -> None:
    adapter = bench.adapter("a")
    merger.fold([str(adapter)], tmp_path / "out", workers=2)
    bench.assert_equal(stored(tmp_path / "out"), state(bench.folded([adapter], bench.base())))


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shards_index_and_placement_stay(bench: Bench, dtype: torch.dtype, tmp_path: Path) -> None:
    base, adapters = bench.base(dtype, sharded=True), [bench.adapter("few")]
    ours = fold(adapters, base, tmp_path / "out")
    out = tmp_path / "out"
    files = sorted(f.name for f in base.glob("*.safetensors"))
    assert len(files) > 2
    assert sorted(f.name for f in out.glob("*.safetensors")) == files
    ours_index, base_index = (
        json.loads((path / "model.safetensors.index.json").read_text()) for path in (out, base)
    )  # fmt: skip
    assert ours_index["weight_map"] == base_index["weight_map"]
    assert ours_index["metadata"]["total_size"] == base_index["metadata"]["total_size"]
    for file in files:
        before, after = load_file(base / file), load_file(out / file)
        assert sorted(before) == sorted(after)
        for key, value in before.items():
            changed = key.endswith(("q_proj.weight", "down_proj.weight"))
            assert (bytes_of(value) != bytes_of(after[key])) == changed, key
    bench.assert_equal(ours, state(bench.folded(adapters, base)))


def test_config_and_generation_config_stay(bench: Bench, tmp_path: Path) -> None:
    base = bench.base()
    fold([bench.adapter("a")], base, tmp_path / "out")
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "out" / name).read_text()) == json.loads((base / name).read_text()), name


# ---------------------------------------------------------------- tied heads


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied")
def test_lm_head_of_a_tied_model_is_untied(bench: Bench, dtype: torch.dtype, sharded: bool, tmp_path: Path) -> None:
    """PEFT's unmerged model adds the delta to the head alone; its merge changes the embeddings too."""
    base = bench.base(dtype, tied=True, sharded=sharded)
    adapter = bench.adapter("head", bench.base(tied=True))
    before = stored(base)
    assert "lm_head.weight" not in before
    ours = fold([adapter], base, tmp_path / "out")
    assert sorted(ours) == sorted([*before, "lm_head.weight"])
    assert json.loads((base / "config.json").read_text())["tie_word_embeddings"] is True
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    assert bytes_of(ours["model.embed_tokens.weight"]) == bytes_of(before["model.embed_tokens.weight"])
    head = before["model.embed_tokens.weight"].float() + float32_deltas(adapter)["lm_head.weight"]
    assert torch.equal(ours["lm_head.weight"], head.to(dtype))

    unmerged = bench.logits(bench.peft_model([adapter], base))
    folded = bench.logits(bench.model(tmp_path / "out"))
    scale = float(unmerged.abs().max())
    assert float((folded - unmerged).abs().max()) < (1e-5 if dtype == torch.float32 else 3e-2) * scale
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrong = bench.logits(bench.folded([adapter], base))
    assert float((wrong - unmerged).abs().max()) > 0.1 * scale  # why this is not compared with PEFT's merge


def test_lm_head_of_an_untied_model(bench: Bench, tmp_path: Path) -> None:
    base, adapters = bench.base(), [bench.adapter("head")]
    bench.assert_equal(fold(adapters, base, tmp_path / "out"), state(bench.folded(adapters, base)))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False


def test_a_tied_model_stays_tied_when_its_head_is_left_alone(bench: Bench, tmp_path: Path) -> None:
    base = bench.base(tied=True)
    adapters = [bench.adapter("a", base)]
    ours = fold(adapters, base, tmp_path / "out")
    assert "lm_head.weight" not in ours
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is True
    folded = state(bench.folded(adapters, base))
    del folded["lm_head.weight"]
    bench.assert_equal(ours, folded)


# ---------------------------------------------------------------- refusals


def test_embeddings_that_peft_saves_beside_a_lora_on_the_head_do_no_harm(bench: Bench, tmp_path: Path) -> None:
    """save_embedding_layers="auto" copies the base's embeddings into such an adapter."""
    adapter = bench.adapter("head-saved")
    ours = fold([adapter], bench.base(), tmp_path / "out")
    bench.assert_equal(ours, state(bench.folded([adapter], bench.base())))


def test_an_adapter_of_another_model_is_refused(bench: Bench, tmp_path: Path) -> None:
    source = bench.adapter("few")
    stranger = tmp_path / "stranger"
    stranger.mkdir()
    tensors = load_file(source / "adapter_model.safetensors")
    tensors = {k.replace("self_attn", "attention"): v for k, v in tensors.items()}
    save_file(tensors, stranger / "adapter_model.safetensors")
    (stranger / "adapter_config.json").write_bytes((source / "adapter_config.json").read_bytes())
    with pytest.raises(RefusedError, match=r"attention\.q_proj"):
        fold([stranger], bench.base(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_replicated_layers_beside_others_are_refused(bench: Bench, tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="layer_replication"):
        fold([bench.adapter("replicated"), bench.adapter("a")], bench.base(), tmp_path / "out")
    assert not (tmp_path / "out").exists()
