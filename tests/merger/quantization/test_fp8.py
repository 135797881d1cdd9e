"""FP8 checkpoints in the layouts of DeepSeek-V3 and FBGEMM, against transformers' dequantisation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from merger.errors import RefusedError
from tests.quantised import QuantBench, decoded, delta, stored

LARGEST = 448.0


def blocked(weight: Tensor, high: int, wide: int) -> tuple[Tensor, Tensor]:
    """(codes, scales) with a scale a block, the last of a side perhaps smaller."""
    rows, cols = weight.shape
    grid = torch.zeros(-(-rows // high), -(-cols // wide))
    codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    for i in range(grid.shape[0]):
        for j in range(grid.shape[1]):
            at = slice(i * high, (i + 1) * high), slice(j * wide, (j + 1) * wide)
            grid[i, j] = weight[at].abs().max().float() / LARGEST
            codes[at] = (weight[at].float() / grid[i, j]).to(torch.float8_e4m3fn)
    return codes, grid


def checkpoint(bench: QuantBench, kind: str) -> Path:
    high, wide = {"blocks": (64, 64), "ragged": (96, 80), "tensor": (1 << 20, 1 << 20), "rows": (1, 1 << 20)}[kind]

    def edit(name: str, weight: Tensor) -> dict[str, Tensor] | None:
        if "_proj" not in name:
            return None
        codes, grid = blocked(weight, high, wide)
        if kind == "rows":
            return {name: codes, f"{name}_scale": grid}
        return {name: codes, f"{name}_scale_inv": grid[0, 0] if kind == "tensor" else grid}

    block = [high, wide] if kind in ("blocks", "ragged") else None
    method = "fbgemm_fp8" if kind == "rows" else "fp8"
    scheme = {"quant_method": method, "weight_block_size": block, "activation_scheme": "dynamic",
              "modules_to_not_convert": ["lm_head"]}  # fmt: skip
    return bench.edited(f"fp8-{kind}", scheme, edit)


def exact(path: Path, kind: str) -> dict[str, Tensor]:
    """code × scale in float64, written out."""
    tensors = stored(path)
    high, wide = {"blocks": (64, 64), "ragged": (96, 80), "tensor": (1 << 20, 1 << 20), "rows": (1, 1 << 20)}[kind]
    found = {}
    for name, codes in tensors.items():
        scale = tensors.get(f"{name}_scale_inv", tensors.get(f"{name}_scale"))
        if scale is None:
            continue
        rows, cols = torch.meshgrid(*(torch.arange(n) for n in codes.shape), indexing="ij")
        grid = scale.reshape(1, 1) if scale.ndim == 0 else scale
        found[name] = codes.double() * grid.double()[rows // high, cols // wide]
    return found


@pytest.mark.parametrize("kind", ["blocks", "ragged", "tensor", "rows"])
@pytest.mark.parametrize("step", [0, 1, 50])
def test_weights_are_codes_times_scales(quant_bench: QuantBench, kind: str, step: int) -> None:
    path = checkpoint(quant_bench, kind)
    ours, expected = decoded(path, step=step), exact(path, kind)
    assert len(ours) == 14
    for name, value in expected.items():
        assert torch.equal(ours[name], value.float())


def test_weights_are_those_of_transformers(quant_bench: QuantBench) -> None:
    path = checkpoint(quant_bench, "blocks")
    model = AutoModelForCausalLM.from_pretrained(str(path), dtype=torch.float32)
    state = model.state_dict()
    for name, value in decoded(path).items():
        torch.testing.assert_close(value, state[name].float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("code", range(256))
def test_every_code(code: int) -> None:
    from merger.quantization.pieces import TABLES

    byte = torch.tensor([code], dtype=torch.uint8)
    kinds: dict[str, torch.dtype] = {
        "e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2, "e8m0": torch.float8_e8m0fnu, "int8": torch.int8,
    }  # fmt: skip
    for table, dtype in kinds.items():
        value = byte.view(dtype).float()
        assert torch.equal(torch.from_numpy(TABLES[table][code : code + 1]).nan_to_num(7), value.nan_to_num(7)), table


@pytest.mark.parametrize("kind", ["blocks", "ragged", "tensor", "rows"])
def test_a_dense_fold(quant_bench: QuantBench, kind: str, tmp_path: Path) -> None:
    path, deltas = checkpoint(quant_bench, kind), delta(quant_bench.adapter())
    made = quant_bench.fold(path, tmp_path / "out", quantization="none")
    assert set(made) == set(stored(quant_bench.base()))
    for name, value in exact(path, kind).items():
        expected = value + deltas.get(name, torch.zeros(()))
        torch.testing.assert_close(made[name].double(), expected, rtol=2**-8, atol=1e-6)
    if kind == "blocks":
        found = quant_bench.logits(tmp_path / "out")
        unmerged = quant_bench.logits(path, torch.bfloat16, quant_bench.adapter())
        assert float((found - unmerged).abs().max()) < 0.05 * float(unmerged.abs().max())


Edit = Callable[[str, Tensor], dict[str, Tensor] | None]


def test_codes_without_scales_and_grids_that_do_not_cover_are_refused(quant_bench: QuantBench, tmp_path: Path) -> None:
    scheme = {"quant_method": "fp8", "weight_block_size": [64, 64]}

    def lacking(name: str, weight: Tensor) -> dict[str, Tensor] | None:
        return {name: weight.to(torch.float8_e4m3fn)} if "q_proj" in name else None

    def small(name: str, weight: Tensor) -> dict[str, Tensor] | None:
        return {**(lacking(name, weight) or {}), f"{name}_scale_inv": torch.ones(1, 2)} if "q_proj" in name else None

    for name, edit, said in (("lacking", lacking, "has no scale"), ("small", small, "do not cover")):
        path = quant_bench.edited(f"fp8-{name}", scheme, edit)
        with pytest.raises(RefusedError, match=said):
            quant_bench.fold(path, tmp_path / "out", quantization="none")


def test_inspect_names_the_scheme_and_counts_stored_bytes(
    quant_bench: QuantBench, capsys: pytest.CaptureFixture[str]
) -> None:
    from jobs.show import description
    from merger.catalog import describe, inspect_source

    path = checkpoint(quant_bench, "blocks")
    document = describe(inspect_source(str(path)))
    assert document["quantization"]["kind"] == "fp8, blocks of 64 × 64"
    assert document["quantization"]["tensors"] == 14
    assert document["bytes"] == sum(t.nbytes for t in stored(path).values())
    assert document["parameters"] == sum(t.numel() for t in stored(quant_bench.base()).values())
    description(document)
    assert "fp8, blocks of 64 × 64 (fp8), 14 tensors" in capsys.readouterr().out


def test_a_plan_reads_stored_bytes(quant_bench: QuantBench, tmp_path: Path) -> None:
    import merger
    from merger.planning.summary import read_bytes

    path = checkpoint(quant_bench, "blocks")
    manifest = {
        "base_model": str(path), "adapters": [{"adapter": str(quant_bench.adapter())}],
        "output": {"kind": "model", "quantization": "none"},
    }  # fmt: skip
    factors = sum(t.nbytes for t in stored(quant_bench.adapter()).values())
    planned = merger.plan(manifest, tmp_path / "out")
    assert read_bytes(planned) == sum(t.nbytes for t in stored(path).values()) + factors
