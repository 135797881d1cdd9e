"""Rounding a dense weight through the grid that an adapter was trained over: quantised and read back. numpy only.

QLoRA trains its adapter on a base in 4 bits. Folded into the dense base, the adapter meets weights it never saw; on
`grid(W)` it meets those it was trained on. The arithmetic is bitsandbytes': flat blocks share an absmax, a value goes
to the nearest level of x / absmax; with double quantisation the absmaxes, less their mean, are rounded to 8 bits in
blocks of 256. Sources: QLoRA, arXiv:2305.14314; the 8-bit levels are the dynamic tree of arXiv:1511.04561.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from merger.quantization.declare import Grid
from merger.quantization.writing import NESTED_BLOCK

Floats = npt.NDArray[np.float32]

NF4: Final = np.array([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
], np.float32)  # fmt: skip
_FP4: Final = np.array([0.0, 0.0625, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0], np.float32) / np.float32(12)
FP4: Final = np.concatenate([-_FP4[:0:-1], _FP4])
LEVELS: Final = {"nf4": NF4, "fp4": FP4}


@functools.cache
def dynamic_levels() -> Floats:
    """The 256 levels of the 8-bit dynamic tree, ascending: means of 2ⁱ equal steps from 0.1 to 1, times 10^(i−6).

    bitsandbytes' to the last bit: it takes float32 steps from both ends, each sum rounded once.
    """
    low, high = np.float32(0.1), np.float32(1)
    levels: list[np.float32] = [np.float32(0), high]
    for i in range(7):
        count = 2**i
        step = np.float64((high - low) / np.float32(count))
        at = np.arange(count + 1)
        bounds = np.where(at <= count // 2, low + step * at, high - step * (count - at)).astype(np.float32)
        means = np.float32(10.0 ** (i - 6)) * ((bounds[:-1] + bounds[1:]) / np.float32(2))
        levels += [*means, *-means]
    found = np.sort(np.array(levels, np.float32))
    found.setflags(write=False)
    return found


def nearest_code(x: Floats, levels: Floats) -> npt.NDArray[np.intp]:
    """The number of each value's nearest level; at a midpoint the lower."""
    return np.searchsorted((levels[1:] + levels[:-1]) / np.float32(2), x)


def nearest(x: Floats, levels: Floats) -> Floats:
    """Each value's nearest level; at a midpoint the lower."""
    found: Floats = levels[nearest_code(x, levels)]
    return found


def block_absmax(flat: Floats, block: int) -> Floats:
    """The largest magnitude of each block of a flat tensor, or of a piece of it that starts with a block."""
    found: Floats = np.maximum.reduceat(np.abs(flat), np.arange(0, flat.size, block))
    return found


@dataclass(frozen=True, slots=True)
class Nested:
    """The absmaxes of a tensor after double quantisation: dynamic_levels[code] × largest of its 256, + offset."""

    codes: npt.NDArray[np.uint8]
    largest: Floats
    offset: np.float32

    def values(self) -> Floats:
        found: Floats = dynamic_levels()[self.codes] * np.repeat(self.largest, NESTED_BLOCK)[: self.codes.size]
        return found + self.offset


def nested_absmax(absmax: Floats) -> Nested:
    """All absmaxes of a tensor, less their mean, to the nearest of 256 levels."""
    offset = np.float32(absmax.astype(np.float64).mean())
    rest = absmax - offset
    largest = block_absmax(rest, NESTED_BLOCK)
    spread = np.repeat(np.where(largest > 0, largest, np.float32(1)), NESTED_BLOCK)[: rest.size]
    return Nested(nearest_code(rest / spread, dynamic_levels()).astype(np.uint8), largest, offset)


def round_absmax(absmax: Floats) -> Floats:
    """All absmaxes of a tensor after double quantisation."""
    return nested_absmax(absmax).values()


def round_blocks(grid: Grid, flat: Floats, exact: Floats, stored: Floats) -> Floats:
    """A flat piece that starts with a block, on the grid. `exact` are its blocks' absmaxes, `stored` those that the
    quantised tensor holds."""
    from merger.kernels.native import CODES

    levels, made = LEVELS[grid.kind], np.empty(flat.size, np.float32)
    middles = (levels[1:] + levels[:-1]) / np.float32(2)
    CODES.round_to_levels(
        np.ascontiguousarray(flat), exact, np.ascontiguousarray(stored), grid.block, levels, middles, made
    )
    return made


def round_blocks_plainly(grid: Grid, flat: Floats, exact: Floats, stored: Floats) -> Floats:
    """The same in numpy: what the compiled loop is held to."""
    spread = np.repeat(np.where(exact > 0, exact, np.float32(1)), grid.block)[: flat.size]
    found: Floats = nearest(flat / spread, LEVELS[grid.kind]) * np.repeat(stored, grid.block)[: flat.size]
    return found


def round_rows_int8(rows_mn: Floats) -> Floats:
    """LLM.int8: each row by its own largest magnitude to −127 … 127."""
    largest = np.abs(rows_mn).max(axis=1, keepdims=True)
    codes = np.rint(rows_mn * (np.float32(127) / np.where(largest > 0, largest, np.float32(1))))
    found: Floats = codes * largest * np.float32(7.874015718698502e-3)
    return found
