"""Quark's FP8 and int8 from files written below: its library is a large one, so the layout is the published one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from merger.errors import RefusedError
from tests.merger.quantization.test_modelopt import layer
from tests.quantised import QuantBench, decoded, delta, stored

SCHEME: dict[str, Any] = {
    "quant_method": "quark", "exclude": ["lm_head"], "export": {"pack_method": "reorder"},
    "global_quant_config": {"weight": {"dtype": "fp8_e4m3", "qscheme": "per_tensor"}},
}  # fmt: skip


def checkpoint(bench: QuantBench, kind: str) -> Path:
    def edit(name: str, weight: Tensor) -> dict[str, Tensor] | None:
        if "_proj" not in name:
            return None
        return {f"{name.removesuffix('weight')}{key}": value for key, value in layer(weight, kind)[0].items()}

    return bench.edited(f"quark-{kind}", SCHEME, edit)


@pytest.mark.parametrize("kind", ["fp8", "fp8-rows", "int8"])
def test_weights_are_those_of_the_layout(quant_bench: QuantBench, kind: str) -> None:
    original, ours = stored(quant_bench.base()), decoded(checkpoint(quant_bench, kind), step=7)
    assert len(ours) == 14
    for name, value in ours.items():
        torch.testing.assert_close(value.double(), layer(original[name], kind)[1], rtol=3e-7, atol=1e-9)


def test_mixed_lists_modules_under_exclude(quant_bench: QuantBench, tmp_path: Path) -> None:
    path, adapter = checkpoint(quant_bench, "int8"), quant_bench.adapter(("q_proj",))
    made = quant_bench.fold(path, tmp_path / "out", adapter, quantization="mixed")
    scheme = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    modules = {f"model.layers.{i}.self_attn.{p}" for i in (0, 1) for p in ("q_proj", "k_proj", "v_proj")}
    assert set(scheme["exclude"]) == modules | {"lm_head"}
    old = decoded(path)
    for name, change in delta(adapter).items():
        torch.testing.assert_close(made[name].double(), old[name].double() + change, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize(
    "parts, said",
    [
        ({"weight": torch.zeros(128, 64, dtype=torch.uint8), "weight_scale": torch.zeros(128, 4).byte()}, "U8"),
        ({"weight": torch.zeros(128, 128, dtype=torch.int8)}, "has no scale"),
        (
            {"weight": torch.zeros(128, 128, dtype=torch.int8), "weight_scale": torch.ones(128),
             "weight_zero_point": torch.zeros(128).int()}, "zero points",
        ),
        ({"weight": torch.zeros(128, 128, dtype=torch.int8), "weight_scale": torch.ones(77)}, "do not cover"),
    ],
)  # fmt: skip
def test_what_is_packed_or_asymmetric_is_refused(
    quant_bench: QuantBench, parts: dict[str, Tensor], said: str, tmp_path: Path
) -> None:
    path = quant_bench.edited(
        f"quark-refused-{said}", SCHEME,
        lambda name, weight: {f"{name.removesuffix('weight')}{k}": v.clone() for k, v in parts.items()}
        if "q_proj" in name else None,
    )  # fmt: skip
    with pytest.raises(RefusedError, match=said):
        quant_bench.fold(path, tmp_path / "out")
