"""Hot loops of quantised weights: numba, one thread, the GIL released, as in merger/kernels/cpu.py.

Each equals a plain numpy function of merger/quantization bit for bit; tests/merger/kernels proves it.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from merger.kernels.cpu import F32, compiled

U8 = npt.NDArray[np.uint8]

SIGNATURES: Final[dict[str, str]] = {}
"""The kernels of this module."""


@compiled("u1[:], i8, f4[:], i8, i8, f4[:], f4[:] ->", SIGNATURES)
def decode_blocks(codes: U8, skipped: int, absmax: F32, offset: int, block: int, table: F32, out: F32) -> None:
    """table[code] × absmax of its block, two codes a byte, the first high.

    `skipped` codes of the first byte and `offset` elements of the first block come before the first element of `out`.
    """
    for i in range(out.size):
        at = i + skipped
        byte = codes[at >> 1]
        code = byte & np.uint8(15) if at & 1 else byte >> np.uint8(4)
        out[i] = table[code] * absmax[(i + offset) // block]


@compiled("f4[:], f4[:], f4[:], i8, f4[:], f4[:], f4[:] ->", SIGNATURES)
def round_to_levels(x: F32, exact: F32, stored: F32, block: int, levels: F32, middles: F32, out: F32) -> None:
    """Each value to the nearest level of x / absmax of its block, the lower at a midpoint, × the absmax as stored."""
    for b in range(exact.size):
        largest = exact[b] if exact[b] > 0 else np.float32(1)
        for i in range(b * block, min((b + 1) * block, x.size)):
            scaled = x[i] / largest
            level = 0
            for middle in middles:  # counting has no branch to mispredict: a few times a binary search
                level += int(middle < scaled)
            out[i] = levels[level] * stored[b]


@compiled("f4[:], f4[:], i8, f4[:], u1[:], u1[:] ->", SIGNATURES)
def code_levels(x: F32, absmax: F32, block: int, middles: F32, order: U8, out: U8) -> None:
    """Two codes a byte, the first high: `order` of the level that is nearest to x / absmax of its block, the lower at a
    midpoint. `block` and the size are even."""
    for b in range(absmax.size):
        largest = absmax[b] if absmax[b] > 0 else np.float32(1)
        for i in range(b * block, min((b + 1) * block, x.size), 2):
            one, two = x[i] / largest, x[i + 1] / largest
            high = low = 0
            for middle in middles:
                high += int(middle < one)
                low += int(middle < two)
            out[i >> 1] = (order[high] << np.uint8(4)) | order[low]


@compiled("f4[:,:], f4[:,:], i8, i8, i8, i8, f8, u1[:,:] ->", SIGNATURES)
def narrow_blocks(
    x: F32, divisor: F32, high: int, wide: int, exponent_bits: int, mantissa_bits: int, most: float, out: U8
) -> None:
    """Codes (rows, cols) of x / divisor of its block in a small float, the nearest, ties to even, at most `most`.

    `divisor` is (row blocks, column blocks); one row or one column stands for all.
    """
    shift = np.uint32(23 - mantissa_bits)
    bias = (1 << (exponent_bits - 1)) - 1
    half = np.uint32((1 << (22 - mantissa_bits)) - 1)
    rebias = np.uint32((127 - bias) << mantissa_bits)
    # Powers of two by their exponents: a power of numba's can raise.
    smallest = np.uint32((128 - bias) << 23).view(np.float32)
    steps = np.uint32((126 + bias + mantissa_bits) << 23).view(np.float32)
    sign = np.uint32(exponent_bits + mantissa_bits)
    largest = np.float32(most)
    for i in range(x.shape[0]):
        row = min(i // high, divisor.shape[0] - 1)
        for j in range(x.shape[1]):
            value = np.float32(x[i, j] / divisor[row, min(j // wide, divisor.shape[1] - 1)])
            negative = np.float32(value).view(np.uint32) >> np.uint32(31)
            value = np.float32(min(abs(value), largest))
            if value < smallest:
                code = np.uint32(np.rint(value * steps))
            else:
                bits = np.float32(value).view(np.uint32)
                odd = (bits >> shift) & np.uint32(1)
                code = ((bits + half + odd) >> shift) - rebias
            out[i, j] = np.uint8(code | (negative << sign))


@compiled("f4[:,:], i8, i8, f4[:,:] ->", SIGNATURES)
def block_largest(x: F32, high: int, wide: int, out: F32) -> None:
    """The largest magnitude of every block of (rows, cols) into `out`, which starts at zero."""
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            value = abs(x[i, j])
            out[i // high, j // wide] = max(out[i // high, j // wide], value)
