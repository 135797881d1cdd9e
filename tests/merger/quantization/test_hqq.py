"""HQQ layers from files written slot by slot below, and by hqq where it is installed."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from merger.catalog import inspect_source
from merger.errors import RefusedError
from tests.quantised import QuantBench, decoded, delta, stored

KINDS: dict[str, tuple[int, int | None, int]] = {
    "8-runs": (8, 64, 1), "4-runs": (4, 64, 1), "3-runs": (3, 64, 1), "2-runs": (2, 32, 1), "1-runs": (1, 64, 1),
    "4-strides": (4, 64, 0), "3-strides": (3, 64, 0), "2-strides": (2, 32, 0), "4-rows": (4, None, 1),
    "4-columns": (4, None, 0),
}  # fmt: skip
"""Bits, group size, axis."""
PACKING = {8: ("8bit_u8", 1), 4: ("4bit_u8", 2), 3: ("3bit_32", 10), 2: ("2bit_u8", 4), 1: ("1bit_u8", 8)}
SCHEME = {"quant_method": "hqq", "quant_config": {"weight_quant_params": {}}, "skip_modules": ["lm_head"]}


def letters(text: str) -> Tensor:
    return torch.tensor([ord(letter) for letter in text], dtype=torch.uint8)


def quantise(weight: Tensor, bits: int, group: int | None, axis: int) -> tuple[Tensor, Tensor, Tensor]:
    """(codes of the grouped matrix, scales, zeros), both in bfloat16."""
    matrix = weight.double()
    if group is not None:
        matrix = matrix.reshape(-1, group) if axis == 1 else matrix.reshape(group, -1)
    low, high = matrix.amin(axis, keepdim=True), matrix.amax(axis, keepdim=True)
    scale = ((high - low) / (2**bits - 1)).bfloat16()
    zero = (-low / scale.double()).bfloat16()
    codes = torch.round(matrix / scale.double() + zero.double()).clamp(0, 2**bits - 1)
    return codes, scale, zero


def layer(weight: Tensor, kind: str) -> dict[str, Tensor]:
    """What `HQQLinear.state_dict` holds, encoded for safetensors."""
    bits, group, axis = KINDS[kind]
    codes, scale, zero = quantise(weight, bits, group, axis)
    name, slots = PACKING[bits]
    height = -(-len(codes) // slots)
    words = torch.zeros(height, codes.shape[1], dtype=torch.int64)
    for row, values in enumerate(codes.long()):
        slot = row // height
        words[row % height] |= values << (bits * (slots - 1 - slot))
    packed = words.to(torch.int32 if bits == 3 else torch.uint8)
    made = {
        "W_q": packed, "scale": scale, "zero": zero, "packing": letters(name), "axis": torch.tensor(axis).int(),
        "shape": torch.tensor(list(weight.shape)), "nbits": torch.tensor(bits).int(),
        "view_as_float": torch.tensor(0, dtype=torch.uint8), "compute_dtype": letters("torch.bfloat16"),
    }  # fmt: skip
    return made if group is None else made | {"group_size": torch.tensor(group).int()}


def exact(weight: Tensor, kind: str) -> Tensor:
    codes, scale, zero = quantise(weight, *KINDS[kind])
    return ((codes - zero.double()) * scale.double()).reshape(weight.shape)


def checkpoint(bench: QuantBench, kind: str) -> Path:
    def edit(name: str, weight: Tensor) -> dict[str, Tensor] | None:
        if not name.endswith(("q_proj.weight", "v_proj.weight")):
            return None
        return {f"{name.removesuffix('weight')}{key}": value for key, value in layer(weight, kind).items()}

    return bench.edited(f"hqq-{kind}", SCHEME, edit)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", [0, 7])
def test_weights_are_those_of_the_layout(quant_bench: QuantBench, kind: str, step: int) -> None:
    original = stored(quant_bench.base())
    ours = decoded(checkpoint(quant_bench, kind), step=step)
    assert len(ours) == 4
    for name, value in ours.items():
        assert value.shape == original[name].shape
        torch.testing.assert_close(value.double(), exact(original[name], kind), rtol=3e-7, atol=1e-9)


def test_inspect_says_how_it_is_grouped(quant_bench: QuantBench) -> None:
    catalog = inspect_source(str(checkpoint(quant_bench, "4-strides")))
    assert catalog.quantization is not None
    assert catalog.quantization.label == "hqq, 4 bits, groups of 64, axis 0"
    assert catalog.quantization.default == "none"


def test_a_fold_is_dense_and_no_part_is_left(quant_bench: QuantBench, tmp_path: Path) -> None:
    path, deltas = checkpoint(quant_bench, "3-runs"), delta(quant_bench.adapter())
    made = quant_bench.fold(path, tmp_path / "out")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert set(made) == set(stored(quant_bench.base()))
    for name, value in decoded(path).items():
        sum_ = value.double() + deltas.get(name, torch.zeros(()))
        torch.testing.assert_close(made[name].double(), sum_, rtol=2**-8, atol=1e-6)
    assert bool(quant_bench.logits(tmp_path / "out").isfinite().all())


@pytest.mark.parametrize("mode, said", [("keep", "cannot be written back"), ("mixed", "no list of single modules")])
def test_what_has_no_way_back_is_refused(quant_bench: QuantBench, mode: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match=said):
        quant_bench.fold(checkpoint(quant_bench, "4-runs"), tmp_path / "out", quantization=mode)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "broken, said",
    [
        ({"scale": None}, "quantised once more"),
        ({"packing": letters("6bit_u8")}, "its packing is '6bit_u8'"),
        ({"packing": None}, "nothing says how"),
        ({"packing": letters("2bit_u8")}, "bytes for"),
        ({"axis": torch.tensor(2).int()}, "axis"),
        ({"group_size": torch.tensor(32).int()}, "in groups of 32"),
    ],
)
def test_layers_that_say_too_little_are_refused(
    quant_bench: QuantBench, broken: dict[str, Tensor | None], said: str, tmp_path: Path
) -> None:
    def edit(name: str, weight: Tensor) -> dict[str, Tensor] | None:
        if not name.endswith("q_proj.weight"):
            return None
        parts = layer(weight, "4-runs") | broken
        return {f"{name.removesuffix('weight')}{key}": t.clone() for key, t in parts.items() if t is not None}

    path = quant_bench.edited(f"hqq-broken-{said}", SCHEME, edit)
    with pytest.raises(RefusedError, match=said):
        quant_bench.fold(path, tmp_path / "out")


# ---------------------------------------------------------------- with hqq itself


def hqq_layers(bench: QuantBench, bits: int, group: int | None, axis: int, *, floats: bool) -> dict[str, Any]:
    """Every projection of the base as hqq has it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantize = pytest.importorskip("hqq.core.quantize", reason="hqq is not installed: see the extra oracles")
        made = {}
        for name, weight in stored(bench.base()).items():
            if "_proj" in name:
                linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
                linear.weight.data = weight.clone()
                config = quantize.BaseQuantizeConfig(nbits=bits, group_size=group, axis=axis, view_as_float=floats)
                made[name] = quantize.HQQLinear(linear, config, compute_dtype=torch.bfloat16, device="cpu")
    return made


def hqq_checkpoint(bench: QuantBench, name: str, layers: dict[str, Any]) -> Path:
    def edit(key: str, weight: Tensor) -> dict[str, Tensor] | None:
        if key not in layers:
            return None
        state = {part: value for part, value in layers[key].state_dict().items() if value is not None}
        return {f"{key.removesuffix('weight')}{part}": getattr(t, "data", t) for part, t in state.items()}

    return bench.edited(name, SCHEME, edit)


@pytest.mark.parametrize("bits", [8, 4, 3, 2, 1])
@pytest.mark.parametrize("group, axis, floats", [(64, 1, False), (64, 0, False), (None, 1, False), (64, 1, True)])
def test_weights_are_those_of_hqq(
    quant_bench: QuantBench, bits: int, group: int | None, axis: int, *, floats: bool
) -> None:
    layers = hqq_layers(quant_bench, bits, group, axis, floats=floats)
    from hqq.core.quantize import Quantizer

    ours = decoded(hqq_checkpoint(quant_bench, f"hqq-written-{bits}-{group}-{axis}-{floats}", layers), step=7)
    assert set(ours) == set(layers)
    for name, held in layers.items():
        meta = {**held.meta, "compute_dtype": torch.float32}
        meta |= {key: held.meta[key].float() for key in ("scale", "zero")}
        assert torch.equal(ours[name], Quantizer.dequantize(held.W_q.data, meta))


def test_logits_are_those_of_the_hqq_model_with_the_adapter_on_it(
    quant_bench: QuantBench, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    layers = hqq_layers(quant_bench, 4, 64, 1, floats=False)
    path = hqq_checkpoint(quant_bench, "hqq-written-logits", layers)
    quant_bench.fold(path, tmp_path / "out")
    # transformers 5.23 no longer loads HQQ files: hqq's own modules take the place of the base's.
    model: Any = AutoModelForCausalLM.from_pretrained(str(quant_bench.base()), dtype=torch.bfloat16)
    for name, held in layers.items():
        model.set_submodule(name.removesuffix(".weight"), held)
    tuned: Any = peft.PeftModel.from_pretrained(model, str(quant_bench.adapter()))
    with torch.no_grad():
        expected = tuned.eval()(torch.arange(3, 43)[None]).logits.float()
    found = quant_bench.logits(tmp_path / "out", torch.bfloat16)
    error = float((found - expected).norm() / expected.norm())
    record_property("logits", error)
    assert error < 0.03
