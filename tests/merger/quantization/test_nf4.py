"""NF4 as bitsandbytes writes it, byte for byte, and no worse than half a step a value."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from merger.quantization.nf4 import BLOCK, LEVELS, dequantize_nf4, quantize_nf4
from merger.tensors import DTYPES


def values(kind: str) -> torch.Tensor:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(32, 128, generator=g)
    if kind == "mixed":
        x = x * torch.logspace(-30, 30, 64).reshape(32, 2).repeat_interleave(64, dim=1)
    if kind == "zeros":
        x[::2] = 0.0
        x[1::4] = -0.0
    if kind == "denormal":
        x = x * 1e-41
    return x


@pytest.mark.parametrize("kind", ["normal", "mixed", "zeros"])
def test_bytes_are_those_of_bitsandbytes(kind: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        functional = pytest.importorskip("bitsandbytes.functional")
        x = values(kind)
        theirs, state = functional.quantize_4bit(x, blocksize=BLOCK, compress_statistics=False, quant_type="nf4")
    codes, absmax = quantize_nf4(x)
    assert torch.equal(absmax, state.absmax)
    assert torch.equal(codes, theirs.reshape(-1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        back = functional.dequantize_4bit(theirs, state)
    torch.testing.assert_close(dequantize_nf4(codes, absmax).view_as(x), back, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ["normal", "mixed", "zeros", "denormal"])
def test_the_error_is_at_most_half_the_widest_step(kind: str) -> None:
    x = values(kind)
    codes, absmax = quantize_nf4(x)
    back = dequantize_nf4(codes, absmax).view(-1, BLOCK)
    widest = float(np.diff(LEVELS).max())
    error = (back - x.view(-1, BLOCK)).abs().amax(dim=1)
    assert bool((error <= absmax * widest / 2 * (1 + 1e-6) + 1e-44).all())


def test_levels_come_back_as_they_are() -> None:
    x = torch.tensor(LEVELS).repeat(4)[None, :] * 0.25
    codes, absmax = quantize_nf4(x)
    assert absmax.tolist() == [0.25]
    assert torch.equal(dequantize_nf4(codes, absmax), x[0])
    assert codes[:8].tolist() == [2 * i << 4 | 2 * i + 1 for i in range(8)]


def test_codes_are_bytes() -> None:
    codes, absmax = quantize_nf4(torch.zeros(2, 64))
    assert codes.dtype == torch.uint8
    assert codes.numel() == 64 == 2 * 64 * DTYPES["F4"].bits // 8
    assert absmax.tolist() == [0.0, 0.0]
    assert not dequantize_nf4(codes, absmax).any()


def test_nothing_is_nothing() -> None:
    codes, absmax = quantize_nf4(torch.zeros(0, 64))
    assert codes.numel() == absmax.numel() == 0
