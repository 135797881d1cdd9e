"""Compiled loops of quantised weights equal their plain numpy twins bit for bit."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from hypothesis import given
from hypothesis import strategies as st

from merger.kernels.native import CODES
from merger.quantization.declare import Grid
from merger.quantization.decode import decode_blocks_plainly
from merger.quantization.grid import NF4, block_absmax, round_blocks, round_blocks_plainly
from merger.quantization.recode import (
    block_largest,
    block_largest_plainly,
    divided_codes,
    divided_codes_plainly,
)


def values(seed: int, *shape: int) -> npt.NDArray[np.float32]:
    generator = np.random.default_rng(seed)
    spread = 10.0 ** generator.integers(-6, 6, shape)
    x = generator.standard_normal(shape) * spread
    x[generator.random(shape) < 0.1] = 0.0
    return x.astype(np.float32)


SEEDS = st.integers(0, 2**32 - 1)


@given(SEEDS, st.integers(1, 5), st.integers(1, 70), st.sampled_from([32, 64]), st.booleans())
def test_decoded_blocks(seed: int, start: int, count: int, block: int, odd: bool) -> None:
    generator = np.random.default_rng(seed)
    skipped, offset = int(odd), start
    codes = generator.integers(0, 256, (count + skipped + 1) // 2, dtype=np.uint8)
    absmax = values(seed, (count + offset) // block + 1)
    out = np.empty(count, np.float32)
    CODES.decode_blocks(codes, skipped, absmax, offset, block, NF4, out)
    plain = decode_blocks_plainly(codes, skipped, absmax, offset, block, NF4, count)
    assert out.tobytes() == plain.tobytes()


@given(SEEDS, st.integers(1, 300), st.sampled_from(["nf4", "fp4"]), st.booleans())
def test_rounded_blocks(seed: int, count: int, kind: str, double: bool) -> None:
    grid = Grid("nf4" if kind == "nf4" else "fp4", 64)
    flat = values(seed, count)
    exact = block_absmax(flat, 64)
    stored = exact * np.float32(1.01) if double else exact
    assert (
        round_blocks(grid, flat, exact, stored).tobytes() == round_blocks_plainly(grid, flat, exact, stored).tobytes()
    )


@given(SEEDS, st.integers(1, 9), st.integers(1, 9), st.sampled_from(["e4m3", "e5m2", "e2m1"]), st.booleans())
def test_codes_and_largest(seed: int, rows: int, half: int, table: str, one: bool) -> None:
    x = values(seed, rows, 2 * half)
    high, wide = 3, 4
    largest = block_largest(x, high, wide)
    assert largest.tobytes() == block_largest_plainly(x, high, wide).tobytes()
    divisor = np.where(largest > 0, largest / np.float32(3), 1).astype(np.float32)[
        : 1 if one else None, : 1 if one else None
    ]
    divisor = np.ascontiguousarray(divisor)
    made = divided_codes(x, divisor, high, wide, table)
    assert made.tobytes() == divided_codes_plainly(x, divisor, high, wide, table).tobytes()
