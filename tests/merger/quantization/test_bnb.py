"""4-bit and int8 checkpoints that bitsandbytes wrote, against bitsandbytes."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes import functional
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import merger
from merger.errors import RefusedError
from tests.quantised import QuantBench, decoded, delta, stored

KINDS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4-double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "nf4-in-bf16": {
        "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": torch.bfloat16,
    },
    "int8": {"load_in_8bit": True},
}  # fmt: skip


def checkpoint(bench: QuantBench, kind: str) -> Path:
    path = bench.root / f"bnb-{kind}"
    if not path.exists():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config: Any = BitsAndBytesConfig
            model: Any = AutoModelForCausalLM.from_pretrained(
                str(bench.base()), dtype=torch.bfloat16, quantization_config=config(**KINDS[kind])
            )
            model.save_pretrained(str(path))
    return path


def theirs(path: Path) -> dict[str, Tensor]:
    """bitsandbytes' own float32 weights."""
    tensors = stored(path)
    found = {}
    for name, value in tensors.items():
        if f"{name}.quant_map" in tensors:
            parts = {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}
            state = functional.QuantState.from_dict(parts, device=torch.device("cpu"))
            state.dtype = torch.float32
            found[name] = functional.dequantize_4bit(value, state)
        elif name.endswith(".SCB"):
            weight = name.replace(".SCB", ".weight")
            found[weight] = functional.int8_vectorwise_dequant(tensors[weight], value)
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", [0, 1, 7])
def test_weights_are_those_of_bitsandbytes(quant_bench: QuantBench, kind: str, step: int) -> None:
    path = checkpoint(quant_bench, kind)
    ours, expected = decoded(path, step=step), theirs(path)
    assert set(ours) == set(expected)
    assert len(ours) == 14
    for name, value in expected.items():
        assert ours[name].shape == value.shape
        torch.testing.assert_close(ours[name], value, rtol=2e-7, atol=1e-9)


@pytest.mark.parametrize("kind", ["nf4-double", "fp4", "int8"])
def test_a_fold_is_the_decoded_base_plus_the_delta_rounded_once(
    quant_bench: QuantBench, kind: str, tmp_path: Path
) -> None:
    path, adapter = checkpoint(quant_bench, kind), quant_bench.adapter()
    made = quant_bench.fold(path, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    before, deltas = stored(path), delta(adapter)
    assert len(deltas) == 6
    assert set(made) == {n for n in before if n.endswith(".weight")}
    for name, value in theirs(path).items():
        exact = value.double() + deltas.get(name, torch.zeros(()))
        assert made[name].dtype == torch.bfloat16
        torch.testing.assert_close(made[name].double(), exact, rtol=2**-8, atol=1e-6)
    for name in set(made) - set(theirs(path)):
        assert torch.equal(made[name], before[name])


@pytest.mark.parametrize("kind", ["nf4", "nf4-double", "fp4"])
def test_logits_are_those_of_the_quantised_model_with_the_adapter_on_it(
    quant_bench: QuantBench, kind: str, tmp_path: Path
) -> None:
    path = checkpoint(quant_bench, kind)
    quant_bench.fold(path, tmp_path / "out")
    expected = quant_bench.logits(path, torch.float32, quant_bench.adapter())
    found = quant_bench.logits(tmp_path / "out")
    # bitsandbytes computes in bf16 there; the folded weights are rounded to bf16 once.
    assert float((found - expected).abs().max()) < 0.05 * float(expected.abs().max())


def test_a_quantised_and_a_dense_model_merge(quant_bench: QuantBench, tmp_path: Path) -> None:
    path, dense = checkpoint(quant_bench, "nf4"), quant_bench.base()
    merger.merge({
        "merge_method": "linear", "models": [
            {"model": str(path), "parameters": {"weight": 1.0}}, {"model": str(dense), "parameters": {"weight": 3.0}},
        ], "output": {"path": str(tmp_path / "out")},
    })  # fmt: skip
    made, original = stored(tmp_path / "out"), stored(dense)
    for name, value in theirs(path).items():
        exact = (value.double() + 3 * original[name].double()) / 4
        torch.testing.assert_close(made[name].double(), exact, rtol=2**-8, atol=1e-6)


def test_bytes_do_not_depend_on_memory_or_workers(quant_bench: QuantBench, tmp_path: Path) -> None:
    path = checkpoint(quant_bench, "nf4-double")
    manifest = {
        "base_model": str(path), "adapters": [{"adapter": str(quant_bench.adapter())}],
        "output": {"kind": "model"},
    }  # fmt: skip
    wide = merger.merge(manifest, tmp_path / "wide", workers=1)
    plan = merger.plan(manifest, tmp_path / "narrow")
    from merger.planning.memory import peak_bytes

    narrow = merger.merge(manifest, tmp_path / "narrow", workers=2, memory=2 * peak_bytes(plan) + 1000)
    assert wide.content_digest == narrow.content_digest


def test_codes_without_scales_are_refused(quant_bench: QuantBench, tmp_path: Path) -> None:
    path = quant_bench.edited(
        "bnb-lacking", {"quant_method": "bitsandbytes", "load_in_8bit": True},
        lambda name, value: {name: value.to(torch.int8)} if "q_proj" in name else None,
    )  # fmt: skip
    with pytest.raises(RefusedError, match="has codes and no scales"):
        quant_bench.fold(path, tmp_path / "out")
