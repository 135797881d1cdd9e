"""EETQ's int8, from files permuted step by step below: its kernels need a GPU, so the order is the published one
(FasterTransformer's `cutlass_preprocessors.cc`), one small step after the other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from merger.errors import MergeFailedError, RefusedError
from merger.quantization.layouts import mixed_codes, mixed_order
from merger.quantization.recode import Seen, recode_rows
from merger.tensors import DTYPES
from tests.quantised import QuantBench, decoded, delta, stored

SCHEME = {"quant_method": "eetq", "weights": "int8", "modules_to_not_convert": ["lm_head"]}


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(codes (out, in), scales (out)): the largest magnitude of a row is 128 steps, and the codes end at 127."""
    scale = weight.double().abs().amax(1) / 128
    codes = torch.round(weight.double() / scale[:, None]).clamp(-128, 127)
    return codes.to(torch.int8), scale.half()


def permute_rows(matrix: Tensor) -> Tensor:
    """Inputs of every sixteen: those that one thread of a warp needs come together."""
    out = matrix.clone()
    for base in range(0, len(matrix), 16):
        for row in range(16):
            read = 8 * ((row % 4) // 2) + row % 2 + 2 * (row // 4)
            out[base + row] = matrix[base + read]
    return out


def interleave(columns: Tensor) -> Tensor:
    """(out, in) → flat: tiles of 64 inputs of two outputs in turn."""
    outputs, inputs = columns.shape
    flat = torch.zeros(outputs * inputs, dtype=columns.dtype)
    for output in range(outputs):
        for first in range(0, inputs, 64):
            start = (output // 2) * 2 * inputs + 2 * first + 64 * (output % 2)
            flat[start : start + 64] = columns[output, first : first + 64]
    return flat


def swap_bytes(flat: Tensor) -> Tensor:
    """+ 128, and of every four bytes the second and third change places."""
    shifted = (flat.long() + 128).to(torch.uint8).reshape(-1, 4)
    return shifted[:, [0, 2, 1, 3]].reshape(-1)


def preprocess(codes: Tensor) -> Tensor:
    """Codes (out, in) as the kernel's operand (in, out)."""
    permuted = permute_rows(codes.T.contiguous())
    flat = swap_bytes(interleave(permuted.T.contiguous()))
    return flat.view(torch.int8).reshape(codes.shape[1], codes.shape[0])


def checkpoint(bench: QuantBench) -> Path:
    def edit(name: str, weight: Tensor) -> dict[str, Tensor] | None:
        if not name.endswith(("q_proj.weight", "v_proj.weight", "down_proj.weight")):
            return None
        codes, scale = quantise(weight)
        return {name: preprocess(codes), f"{name}_scales": scale}

    return bench.edited("eetq", SCHEME, edit, torch.float16)


def exact(weight: Tensor) -> Tensor:
    codes, scale = quantise(weight)
    return codes.double() * scale.double()[:, None]


@pytest.mark.parametrize("step", [0, 1, 7])
def test_weights_are_those_of_the_layout(quant_bench: QuantBench, step: int) -> None:
    original, ours = stored(quant_bench.base(torch.float16)), decoded(checkpoint(quant_bench), step=step)
    assert len(ours) == 6
    for name, value in ours.items():
        assert value.shape == original[name].shape
        assert torch.equal(value, exact(original[name]).float())


def test_a_fold_is_dense(quant_bench: QuantBench, tmp_path: Path) -> None:
    path, deltas = checkpoint(quant_bench), delta(quant_bench.adapter())
    made = quant_bench.fold(path, tmp_path / "out")
    assert set(made) == set(stored(quant_bench.base()))
    assert len(deltas) == 6
    for name, value in decoded(path).items():
        torch.testing.assert_close(made[name].double(), value.double() + deltas[name], rtol=2**-10, atol=1e-6)
    assert bool(quant_bench.logits(tmp_path / "out").isfinite().all())


def test_the_way_back_is_the_way_there() -> None:
    codes = torch.randint(-128, 128, (6, 192), generator=torch.Generator().manual_seed(1)).to(torch.int8)
    assert torch.equal(torch.from_numpy(mixed_codes(codes.numpy())).view(torch.int8), preprocess(codes).reshape(-1))
    assert sorted(mixed_order()) == list(range(64))


@pytest.mark.parametrize("size", [1.0, 1e-3, 3e-5])
def test_written_rows_reach_127_and_are_as_near_as_their_scales_allow(size: float) -> None:
    """Also where a scale is a subnormal F16."""
    rows = size * torch.randn(8, 128, generator=torch.Generator().manual_seed(2))
    rows[3] = 0
    made = recode_rows(
        {"scheme": "tiles"}, rows.numpy(), Seen(np.zeros(1, np.float32)), {"scale": DTYPES["F16"]}, first_row=0
    )
    scale = torch.from_numpy(made["scale"]).view(torch.float16).float()
    stored_ = made["codes"].reshape(4, 2, 2, 64) ^ np.uint8(0x80)
    codes = torch.from_numpy(stored_[..., mixed_order()].transpose(0, 2, 1, 3).copy()).view(torch.int8).reshape(8, 128)
    assert [int(row.abs().max()) for row in codes.int()] == [127] * 3 + [0] + [127] * 4
    error = (codes.float() * scale[:, None] - rows).abs()
    steps = torch.maximum(0.5 * scale, rows.abs().amax(1) - 127 * scale)[:, None]
    assert bool((error <= steps * 1.001).all())


def test_codes_in_another_order_are_found_out_while_they_are_read(quant_bench: QuantBench, tmp_path: Path) -> None:
    """As on Volta, whose files look the same from outside."""

    def edit(name: str, weight: Tensor) -> dict[str, Tensor] | None:
        if not name.endswith("q_proj.weight"):
            return None
        codes, scale = quantise(weight)
        plain = (codes.T.long() + 128).to(torch.uint8).view(torch.int8)
        return {name: plain.contiguous(), f"{name}_scales": scale}

    path = quant_bench.edited("eetq-volta", SCHEME, edit, torch.float16)
    with pytest.raises(MergeFailedError, match="order of GPUs since Turing"):
        quant_bench.fold(path, tmp_path / "out")
    assert not (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize(
    "shape, said", [((96, 128), "tiles of its kernel"), ((128, 64), "does not fit its scales"), (None, "no scales")]
)
def test_parts_that_do_not_fit_are_refused(
    quant_bench: QuantBench, shape: tuple[int, int] | None, said: str, tmp_path: Path
) -> None:
    def edit(name: str, weight: Tensor) -> dict[str, Tensor] | None:
        if not name.endswith("q_proj.weight"):
            return None
        codes = torch.zeros(shape or (128, 128), dtype=torch.int8)
        return {name: codes} if shape is None else {name: codes, f"{name}_scales": torch.ones(128).half()}

    path = quant_bench.edited(f"eetq-broken-{said}", SCHEME, edit)
    with pytest.raises(RefusedError, match=said):
        quant_bench.fold(path, tmp_path / "out")
