"""base_quantization: a dense base on the grid that bitsandbytes would have made of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bitsandbytes import functional
from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
from bitsandbytes.backends.utils import _get_4bit_code
from safetensors.torch import save_file
from torch import Tensor

import merger
from merger.catalog import inspect_source
from merger.errors import RefusedError
from merger.operands import Arena, OperandReader
from merger.planning.nouns import DenseTerm, MergePlan, Source
from merger.quantization.declare import Grid
from merger.quantization.grid import FP4, NF4, dynamic_levels
from tests.merger.quantization.test_bnb import checkpoint
from tests.quantised import QuantBench, delta, stored


def test_levels_are_those_of_bitsandbytes() -> None:
    library: Any = functional
    assert np.array_equal(dynamic_levels(), library.create_dynamic_map().numpy())
    for kind, levels in (("nf4", NF4), ("fp4", FP4)):
        theirs = library.get_4bit_type(kind, device="cpu").unique()
        torch.testing.assert_close(torch.from_numpy(levels), theirs, rtol=1e-6, atol=1e-8)


def theirs(grid: Grid, weight: Tensor) -> Tensor:
    if grid.kind == "int8":
        codes, scale, _ = functional.int8_vectorwise_quant(weight.half())
        found: Tensor = functional.int8_vectorwise_dequant(codes, scale)
        return found
    codes, state = functional.quantize_4bit(
        weight, blocksize=grid.block, compress_statistics=grid.double, quant_type=grid.kind
    )
    absmax: Tensor = state.absmax
    if grid.double:
        absmax = functional.dequantize_blockwise(absmax, state.state2) + state.offset
    # The library's plain arithmetic: its CPU kernel is wrong where a block runs over the end of a row (bitsandbytes
    # 0.50.2: shape (64, 96) comes back 27 % off, and 9 % is what 4 bits cost).
    code = _get_4bit_code(grid.kind, torch.device("cpu"))
    made: Tensor = _dequantize_4bit_compute(codes.reshape(-1), absmax, code, grid.block, weight.shape, torch.float32)
    return made


GRIDS = [
    Grid("nf4"), Grid("nf4", 64, double=True), Grid("nf4", 128), Grid("fp4"), Grid("fp4", 256, double=True),
    Grid("int8"),
]  # fmt: skip


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("shape", [(40, 128), (64, 96), (33, 50), (7, 4096)], ids=str)
@pytest.mark.parametrize("step", [0, 1, 5])
def test_rows_on_the_grid_are_bitsandbytes_round_trip(
    grid: Grid, shape: tuple[int, int], step: int, tmp_path: Path
) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)).half()
    if grid.kind != "int8":
        weight = weight.float()
    save_file({"model.layers.0.x.weight": weight}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    plan = MergePlan(sources=(Source("base", inspect_source(str(tmp_path))),), outputs=(), tasks=())
    reader = OperandReader(plan, Arena(), factor_bytes=1 << 20)
    out = torch.empty(shape, dtype=torch.float32)
    for first in range(0, shape[0], step or shape[0]):
        last = min(shape[0], first + (step or shape[0]))
        reader.operand(
            (DenseTerm(0, "model.layers.0.x.weight", grid=grid),), first, last, out.numpy()[first:last]
        )  # fmt: skip
    expected = theirs(grid, weight)
    # The library's 8-bit rounding of absmaxes is not always to the nearest level, and its fp4 levels have four digits.
    equal = torch.isclose(out, expected, rtol=1e-3 if grid.double or grid.kind == "fp4" else 1e-6, atol=1e-4)
    assert float(equal.float().mean()) > 0.999


def fold(bench: QuantBench, base: Path, out: Path, grid: Any, adapter: Path | None = None) -> dict[str, Tensor]:
    merger.merge({
        "base_model": str(base), "adapters": [{"adapter": str(adapter or bench.adapter())}],
        "base_quantization": grid, "output": {"path": str(out), "kind": "model"},
    }, workers=2)  # fmt: skip
    return stored(out)


@pytest.mark.parametrize(
    "kind, grid", [("nf4", "nf4"), ("nf4-double", {"nf4": {"double_quant": True}}), ("fp4", {"fp4": None})]
)
def test_a_fold_on_the_grid_is_the_fold_into_the_quantised_base(
    quant_bench: QuantBench, kind: str, grid: Any, tmp_path: Path
) -> None:
    ours = fold(quant_bench, quant_bench.base(), tmp_path / "grid", grid)
    expected = quant_bench.fold(checkpoint(quant_bench, kind), tmp_path / "codes")
    assert set(ours) == set(expected)
    for name, value in expected.items():
        equal = torch.isclose(ours[name].float(), value.float(), rtol=2**-7, atol=1e-3 * float(value.abs().max()))
        assert float(equal.float().mean()) > 0.998, name
    plain = quant_bench.fold(quant_bench.base(), tmp_path / "plain")
    assert not torch.equal(plain["model.layers.0.mlp.up_proj.weight"], ours["model.layers.0.mlp.up_proj.weight"])


def test_the_report_says_how_far_the_base_moved_beside_the_delta(quant_bench: QuantBench, tmp_path: Path) -> None:
    fold(quant_bench, quant_bench.base(torch.float32), tmp_path / "out", "nf4")
    report = json.loads((tmp_path / "out" / "raymerge-report.json").read_text())
    base, deltas = stored(quant_bench.base(torch.float32)), delta(quant_bench.adapter())
    for name, change in deltas.items():
        moved = (theirs(Grid("nf4"), base[name]) - base[name]).double().norm()
        said = report["tensors"][name]
        assert said["grid_error"] == pytest.approx(float(moved), rel=1e-3)
        assert said["delta"] == pytest.approx(float(change.norm()), rel=1e-5)
        assert said["grid_error_over_delta"] == pytest.approx(float(moved / change.norm()), rel=1e-3)


def test_bytes_do_not_depend_on_memory_or_workers(quant_bench: QuantBench, tmp_path: Path) -> None:
    from merger.planning.memory import peak_bytes

    manifest = {
        "base_model": str(quant_bench.base()), "adapters": [{"adapter": str(quant_bench.adapter())}],
        "base_quantization": {"nf4": {"double_quant": True}}, "output": {"kind": "model"},
    }  # fmt: skip
    wide = merger.merge(manifest, tmp_path / "wide", workers=1)
    needed = peak_bytes(merger.plan(manifest, tmp_path / "narrow"))
    narrow = merger.merge(manifest, tmp_path / "narrow", workers=2, memory=2 * needed + 1000)
    assert wide.content_digest == narrow.content_digest


def test_an_adapter_that_names_4_bits_over_a_dense_base_is_a_warning(quant_bench: QuantBench, tmp_path: Path) -> None:
    plain = quant_bench.adapter()
    for sign, config, card in (
        ("base", {"base_model_name_or_path": "unsloth/llama-3-8b-bnb-4bit"}, ""),
        ("card", {}, "Trained with:\n- load_in_4bit: True\n"),
        ("none", {}, "An adapter."),
    ):
        path = tmp_path / sign
        path.mkdir()
        (path / "adapter_model.safetensors").write_bytes((plain / "adapter_model.safetensors").read_bytes())
        written = json.loads((plain / "adapter_config.json").read_text()) | config
        (path / "adapter_config.json").write_text(json.dumps(written))
        (path / "README.md").write_text(card)
        for grid in (None, "none", "nf4"):
            manifest: dict[str, Any] = {
                "base_model": str(quant_bench.base()), "adapters": [{"adapter": str(path)}],
                "output": {"kind": "model"},
            } | ({} if grid is None else {"base_quantization": grid})  # fmt: skip
            codes = {w.code for w in merger.plan(manifest, tmp_path / "out").warnings}
            assert ("trained-over-codes" in codes) == (sign != "none" and grid is None)


@pytest.mark.parametrize("value", ["gptq", {"nf4": {"blocksize": 65}}, {"nf4": {"block": 64}}, {"int8": {}}, 4])
def test_no_other_grid_is_taken(quant_bench: QuantBench, value: Any, tmp_path: Path) -> None:
    with pytest.raises(RefusedError) as refused:
        fold(quant_bench, quant_bench.base(), tmp_path / "out", value)
    assert all(p.where.startswith("base_quantization") for p in refused.value.problems)


def test_a_quantised_base_takes_no_grid(quant_bench: QuantBench, tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="quantised already"):
        fold(quant_bench, checkpoint(quant_bench, "nf4"), tmp_path / "out", "nf4")
