"""AQLM layers from files written tile by tile below, and run by aqlm on the CPU where it is installed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from merger.catalog import inspect_source
from merger.errors import RefusedError
from tests.quantised import QuantBench, decoded, delta, stored

KINDS: dict[str, tuple[int, int, int, int]] = {
    "1x16": (1, 16, 1, 8), "2x8": (2, 8, 1, 8), "4x8": (4, 8, 1, 8), "1x12": (1, 12, 1, 8), "2x8-tall": (2, 8, 4, 16),
}  # fmt: skip
"""Codebooks, bits of a code, outputs and inputs of a tile."""
ALL = ("_proj.weight",)


def layer(weight: Tensor, kind: str) -> dict[str, Tensor]:
    """A layer of random codes and codebooks about as large as the weight."""
    books, bits, high, wide = KINDS[kind]
    rows, cols = weight.shape
    generator = torch.Generator().manual_seed(rows + cols)
    codes = torch.randint(0, 2**bits, (rows // high, cols // wide, books), generator=generator)
    codes[codes >= 2 ** (bits - 1)] -= 2**bits
    return {
        "codes": codes.to(torch.int8 if bits <= 8 else torch.int16),
        "codebooks": (torch.randn(books, 2**bits, high, wide, generator=generator)).half(),
        "scales": (0.05 + 0.1 * torch.rand(rows // high, 1, 1, 1, generator=generator)).half(),
    }


def exact(parts: dict[str, Tensor], shape: tuple[int, ...]) -> Tensor:
    """Tile after tile in float64."""
    codes, books, scales = parts["codes"].long(), parts["codebooks"].double(), parts["scales"].double()
    count, size, high, wide = books.shape
    out = torch.zeros(shape, dtype=torch.float64)
    for book in range(count):
        values = books[book][codes[:, :, book] % size]  # (out groups, in groups, high, wide)
        for row in range(high):
            for column in range(wide):
                out[row::high, column::wide] += values[:, :, row, column]
    return out * scales.reshape(-1).repeat_interleave(high)[:, None]


def scheme(kind: str) -> dict[str, Any]:
    books, bits, high, wide = KINDS[kind]
    return {
        "quant_method": "aqlm", "num_codebooks": books, "nbits_per_codebook": bits, "out_group_size": high,
        "in_group_size": wide, "linear_weights_not_to_quantize": ["lm_head.weight", "lm_head"],
    }  # fmt: skip


def checkpoint(bench: QuantBench, kind: str, names: tuple[str, ...] = ("q_proj.weight", "k_proj.weight")) -> Path:
    def edit(name: str, weight: Tensor) -> dict[str, Tensor] | None:
        if not name.endswith(names):
            return None
        return {f"{name.removesuffix('weight')}{key}": value for key, value in layer(weight, kind).items()}

    return bench.edited(f"aqlm-{kind}-{len(names)}", scheme(kind), edit, torch.float16)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", [0, 7])
def test_weights_are_those_of_the_layout(quant_bench: QuantBench, kind: str, step: int) -> None:
    path = checkpoint(quant_bench, kind)
    ours, tensors = decoded(path, step=step), stored(path)
    assert len(ours) == 4
    for name, value in ours.items():
        parts = {key: tensors[f"{name.removesuffix('weight')}{key}"] for key in ("codes", "codebooks", "scales")}
        expected = exact(parts, value.shape)
        torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=2e-7 * float(expected.abs().max()))


def test_a_fold_is_dense(quant_bench: QuantBench, tmp_path: Path) -> None:
    path, deltas = checkpoint(quant_bench, "2x8"), delta(quant_bench.adapter())
    catalog = inspect_source(str(path))
    assert catalog.quantization is not None
    assert catalog.quantization.label == "aqlm, 2 × 8 bits, tiles of 1 × 8"
    made = quant_bench.fold(path, tmp_path / "out")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert set(made) == set(stored(quant_bench.base()))
    for name, value in decoded(path).items():
        sum_ = value.double() + deltas.get(name, torch.zeros(()))
        torch.testing.assert_close(made[name].double(), sum_, rtol=2**-10, atol=1e-6)


def test_mixed_lists_weights_and_keep_is_refused(quant_bench: QuantBench, tmp_path: Path) -> None:
    path = checkpoint(quant_bench, "2x8")
    made = quant_bench.fold(path, tmp_path / "out", quant_bench.adapter(("v_proj",)), quantization="mixed")
    before = stored(path)
    assert set(made) == set(before)  # v is dense already: nothing that is code was touched
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config == scheme("2x8")
    made = quant_bench.fold(checkpoint(quant_bench, "2x8", ALL), tmp_path / "all", quantization="mixed")
    listed = json.loads((tmp_path / "all" / "config.json").read_text())["quantization_config"]
    dense = {
        name for name in made if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "down_proj.weight"))
    }
    assert len(dense) == 8
    # transformers 4 looks for weights in the list, transformers 5 for modules.
    modules = {name.removesuffix(".weight") for name in dense}
    assert set(listed["linear_weights_not_to_quantize"]) == {"lm_head.weight", "lm_head", *dense, *modules}
    with pytest.raises(RefusedError, match="cannot be written back"):
        quant_bench.fold(path, tmp_path / "kept", quantization="keep")
    assert not (tmp_path / "kept").exists()


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda p: {**p, "codes": p["codes"].permute(1, 0, 2)}, "rows of codes"),
        (lambda p: {**p, "codebooks": p["codebooks"][:, :200]}, "codebooks of 200"),
        (lambda p: {k: v for k, v in p.items() if k != "scales"}, "codebooks and scales"),
    ],
)
def test_parts_that_do_not_fit_are_refused(
    quant_bench: QuantBench, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], said: str, tmp_path: Path
) -> None:
    """aqlm turns 8-bit codes around when a model first runs on a CPU, and saves them so."""

    def edit(name: str, weight: Tensor) -> dict[str, Tensor] | None:
        if not name.endswith("down_proj.weight"):
            return None
        return {f"{name.removesuffix('weight')}{key}": value for key, value in change(layer(weight, "2x8")).items()}

    path = quant_bench.edited(f"aqlm-broken-{said}", scheme("2x8"), edit)
    with pytest.raises(RefusedError, match=said):
        quant_bench.fold(path, tmp_path / "out")


@pytest.mark.parametrize("kind", ["1x16", "2x8", "2x8-tall"])
def test_weights_are_those_of_aqlm(quant_bench: QuantBench, kind: str) -> None:
    utils = pytest.importorskip("aqlm.utils", reason="aqlm is not installed: see the extra oracles")
    path = checkpoint(quant_bench, kind)
    ours, tensors = decoded(path, step=7), stored(path)
    for name, value in ours.items():
        codes, books, scales = (
            tensors[f"{name.removesuffix('weight')}{key}"] for key in ("codes", "codebooks", "scales")
        )
        bits = KINDS[kind][1]
        theirs = utils._dequantize_weight(utils.unpack_int_data(codes, bits), books.float(), scales.float())
        assert torch.equal(value, theirs)


@pytest.mark.parametrize("kind", ["1x16"])
def test_logits_are_those_of_the_aqlm_model_with_the_adapter_on_it(
    quant_bench: QuantBench, kind: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    pytest.importorskip("aqlm", reason="aqlm is not installed: see the extra oracles")
    path = checkpoint(quant_bench, kind, ALL)
    quant_bench.fold(path, tmp_path / "out")
    expected = quant_bench.logits(path, torch.float32, quant_bench.adapter())
    found = quant_bench.logits(tmp_path / "out", torch.float32)
    error = float((found - expected).norm() / expected.norm())
    record_property("logits", error)
    assert error < 0.03
