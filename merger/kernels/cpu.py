"""Hot loops for the CPU: what numba compiles, one thread, the GIL released. merger/kernels/native.py calls them.

No `prange` (it aborts when called from several threads on the workqueue layer) and no fastmath (it would fuse
multiplications with additions and change the bits). Unsigned arithmetic says its width at every step: numba widens it
to 64 bits, and LLVM then fills half as many lanes, or none.

Each function equals its twin in merger/kernels/plain.py bit for bit; tests/merger/kernels proves it. Arrays are
contiguous float32 unless said otherwise. No kernel raises, and none makes an array.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeVar, cast

import numba
import numpy as np
import numpy.typing as npt

from merger.kernels import LANES
from merger.kernels.hashing import MIX_A, MIX_B, WEYL

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]
U16 = npt.NDArray[np.uint16]

_Function = TypeVar("_Function", bound=Callable[..., Any])

_MAGNITUDE: Final = np.uint32(0x7FFFFFFF)
_A: Final = np.uint32(MIX_A)
_B: Final = np.uint32(MIX_B)
_WEYL: Final = np.uint32(WEYL)
_OPTIONS: Final[dict[str, Any]] = {"nogil": True, "fastmath": False, "error_model": "numpy"}

SIGNATURES: Final[dict[str, str]] = {}
"""The kernels of this module."""


def compiled(signature: str, into: dict[str, str] = SIGNATURES) -> Callable[[_Function], _Function]:
    """A kernel with these types (`native.Signature`), entered in its module's table."""

    def enter(function: _Function) -> _Function:
        into[function.__name__] = signature
        return cast("_Function", numba.njit(**_OPTIONS)(function))

    return enter


def inlined(function: _Function) -> _Function:
    """A part of kernels, put into each that calls it."""
    return cast("_Function", numba.njit(forceinline=True, **_OPTIONS)(function))


@compiled("u2[:], f4[:] ->")
def widen_bf16(source: npt.NDArray[np.uint16], out: F32) -> None:
    """bfloat16 bits as float32, exactly."""
    bits = out.view(np.uint32)
    for i in range(source.size):
        bits[i] = np.uint32(source[i]) << np.uint32(16)


@compiled("f4[:], u2[:] ->")
def narrow_bf16(x: F32, out: npt.NDArray[np.uint16]) -> None:
    """float32 rounded to bfloat16 bits, half to even. NaN may become Inf: it is refused before."""
    bits = x.view(np.uint32)
    for i in range(bits.size):
        even = (bits[i] >> np.uint32(16)) & np.uint32(1)
        out[i] = np.uint16((bits[i] + np.uint32(0x7FFF) + even) >> np.uint32(16))


@compiled("f4[:], i8[:] ->")
def count_high(x: F32, counts: I64) -> None:
    """Add to `counts` (65536 bins) the upper 16 bits of each magnitude: bits(|x|) >> 15."""
    bits = x.view(np.uint32)
    for i in range(bits.size):
        counts[(bits[i] & _MAGNITUDE) >> np.uint32(15)] += 1


@compiled("f4[:], i8, i8[:] ->")
def count_low(x: F32, prefix: int, counts: I64) -> None:
    """Add to `counts` (32768 bins) the lower 15 bits of the magnitudes whose upper 16 bits are `prefix`."""
    bits = x.view(np.uint32)
    for i in range(bits.size):
        magnitude = bits[i] & _MAGNITUDE
        if magnitude >> np.uint32(15) == prefix:
            counts[magnitude & np.uint32(0x7FFF)] += 1


@compiled("f4[:], i8, i8 -> i8")
def trim(x: F32, threshold: int, allowance: int) -> int:
    """Zero, in place, what is smaller than the magnitude with these bits, and what equals it once `allowance` such
    elements were kept. Returns how many of the allowance were used."""
    bits = x.view(np.uint32)
    limit = np.uint32(threshold)
    equal = 0
    for i in range(bits.size):
        magnitude = bits[i] & _MAGNITUDE
        equal += 1 if magnitude == limit else 0
        bits[i] = bits[i] if magnitude >= limit else np.uint32(0)
    if equal <= allowance:
        return equal
    seen = 0
    for i in range(bits.size):
        if bits[i] & _MAGNITUDE == limit:
            seen += 1
            if seen > allowance:
                bits[i] = np.uint32(0)
    return allowance


@inlined
def mixed(h: np.uint32) -> np.uint32:
    """The finaliser of merger/kernels/hashing.py."""
    h = np.uint32(h ^ np.uint32(h >> np.uint32(16)))
    h = np.uint32(h * _A)
    h = np.uint32(h ^ np.uint32(h >> np.uint32(15)))
    h = np.uint32(h * _B)
    return np.uint32(h ^ np.uint32(h >> np.uint32(16)))


@inlined
def until_carry(first: int, count: int) -> int:
    """How many of `count` elements from flat index `first` share the upper half of their index."""
    return min(count, 0x100000000 - (first & 0xFFFFFFFF))


@inlined
def upper_key(first: int, key_high: int) -> np.uint32:
    """What the hash adds between its two halves: a key, and the upper half of the flat index."""
    return np.uint32(np.uint32(key_high) + np.uint32(np.uint32(first >> 32) * _WEYL))


@inlined
def _drop(
    x: F32, low: np.uint32, key: np.uint32, upper: np.uint32, most: np.uint32, factor: np.float32, out: F32
) -> None:  # fmt: skip
    zero = np.float32(0)
    for i in range(x.size):
        h = mixed(np.uint32(np.uint32(low + np.uint32(i)) ^ key))
        h = mixed(np.uint32(h + upper))
        # Times zero, not zero: what is no number stays none. Plus zero: never −0.
        out[i] = factor * (x[i] if h <= most else x[i] * zero + zero)


@compiled("f4[:], i8, i8, i8, i8, f4, f4[:] ->")
def drop(x: F32, first: int, key_low: int, key_high: int, limit: int, factor: np.float32, out: F32) -> None:
    """out = factor·x where the element's counter-based hash is below `limit` (density · 2³²), else zero.

    `first` is the flat index of x[0] in its tensor; `out` may be `x`. See merger/kernels/hashing.py for the hash. NaN
    and Inf are not dropped but become NaN, so that a broken source is met whatever the mask.
    """
    if limit <= 0:
        for i in range(x.size):
            out[i] = factor * (x[i] * np.float32(0) + np.float32(0))
        return
    key, most = np.uint32(key_low), np.uint32(limit - 1)
    start = 0
    while start < x.size:
        stop = start + until_carry(first + start, x.size - start)
        upper = upper_key(first + start, key_high)
        _drop(x[start:stop], np.uint32(first + start), key, upper, most, factor, out[start:stop])
        start = stop


@compiled("f4[:], f4 ->")
def scale(x: F32, factor: np.float32) -> None:
    """x *= factor, in place."""
    for i in range(x.size):
        x[i] *= factor


@compiled("f4[:], f4 ->")
def divide(x: F32, divisor: np.float32) -> None:
    """x /= divisor, in place."""
    for i in range(x.size):
        x[i] /= divisor


@compiled("f4[:], f4[:] ->")
def subtract(x: F32, base: F32) -> None:
    """x -= base, in place."""
    for i in range(x.size):
        x[i] -= base[i]


@compiled("f4[:], f4[:] ->")
def add(x: F32, other: F32) -> None:
    """x += other, in place."""
    for i in range(x.size):
        x[i] += other[i]


@compiled("f4[:,:], f4[:], f4[:] ->")
def weighted_sum(deltas: npt.NDArray[np.float32], weights: F32, out: F32) -> None:
    """out = ((w₀·d₀ + w₁·d₁) + w₂·d₂) …, in the order of the sources. `deltas` is (sources, elements)."""
    for i in range(out.size):
        out[i] = weights[0] * deltas[0, i]
    for k in range(1, deltas.shape[0]):
        w = weights[k]
        for i in range(out.size):
            out[i] += w * deltas[k, i]


@inlined
def vote(row: F32, weight: np.float32, frequency: bool, total: F32) -> None:
    """What one source adds to the election of signs."""
    one, zero = np.float32(1), np.float32(0)
    if frequency:
        for i in range(row.size):
            total[i] += (one if row[i] > 0 else zero) - (one if row[i] < 0 else zero)
    else:
        for i in range(row.size):
            total[i] += weight * row[i]


@inlined
def gather(
    row: F32, weight: np.float32, weighted: bool, by_weight: bool, total: F32, divisor: F32, out: F32
) -> None:  # fmt: skip
    """What one source adds to the sum where it agrees with the elected sign."""
    one, zero = np.float32(1), np.float32(0)
    judge = weight if weighted else one
    share = weight if by_weight else one
    for i in range(row.size):
        judged = judge * row[i]
        agrees = (judged > 0) & (total[i] >= 0) | (judged < 0) & (total[i] < 0)
        product = weight * row[i]
        out[i] += product if agrees else product * zero
        divisor[i] += share if agrees else zero


@inlined
def share_out(divisor: F32, out: F32) -> None:
    """out /= divisor, a divisor of zero taken as one."""
    for i in range(out.size):
        out[i] = out[i] / (divisor[i] if divisor[i] != 0 else np.float32(1))


@compiled("f4[:,:], f4[:], i8, i8, i8, f4[:,:], f4[:] ->")
def elect(
    deltas: npt.NDArray[np.float32],
    weights: F32,
    weighted: int,
    frequency: int,
    divide: int,
    scratch: npt.NDArray[np.float32],
    out: F32,
) -> None:
    """Elect a sign at each element and sum what agrees with it.

    The sign is that of Σ wᵢdᵢ (`weighted`), of Σ dᵢ, or of Σ sign(dᵢ) (`frequency`); zero elects +. An element that
    is zero agrees with nothing. `divide`: 0 leaves the sum, 1 divides by the weights that agree, 2 by their number;
    a divisor of zero is taken as one. NaN, and Inf that agrees with nothing, make the sum NaN. `scratch` is
    (2, elements).
    """
    total, divisor = scratch[0], scratch[1]
    for i in range(out.size):
        total[i] = divisor[i] = out[i] = np.float32(0)
    for k in range(deltas.shape[0]):
        vote(deltas[k], weights[k] if weighted else np.float32(1), frequency != 0, total)
    for k in range(deltas.shape[0]):
        gather(deltas[k], weights[k], weighted != 0, divide == 1, total, divisor, out)
    if divide != 0:
        share_out(divisor, out)


@compiled("f4[:], f4, f4[:] ->")
def accumulate(x: F32, factor: np.float32, out: F32) -> None:
    """out += factor·x, two roundings."""
    for i in range(out.size):
        out[i] += factor * x[i]


@compiled("f4[:], f4, f4[:] ->")
def scale_and_add(base: F32, factor: np.float32, out: F32) -> None:
    """out = base + factor·out, two roundings."""
    for i in range(out.size):
        out[i] = base[i] + factor * out[i]


@compiled("f4[:], f4[:], f4, f4, f4[:] ->")
def combine_two(a: F32, b: F32, factor_a: np.float32, factor_b: np.float32, out: F32) -> None:
    """out = factor_a·a + factor_b·b."""
    for i in range(out.size):
        out[i] = factor_a * a[i] + factor_b * b[i]


@compiled("f4[:], f4[:] -> f8")
def dot(x: F32, y: F32) -> float:
    """Σ x·y in float64, in eight interleaved partial sums added in order: the bits depend on the span alone."""
    s0 = s1 = s2 = s3 = s4 = s5 = s6 = s7 = 0.0
    whole = x.size - x.size % 8
    for i in range(0, whole, 8):
        s0 += np.float64(x[i]) * np.float64(y[i])
        s1 += np.float64(x[i + 1]) * np.float64(y[i + 1])
        s2 += np.float64(x[i + 2]) * np.float64(y[i + 2])
        s3 += np.float64(x[i + 3]) * np.float64(y[i + 3])
        s4 += np.float64(x[i + 4]) * np.float64(y[i + 4])
        s5 += np.float64(x[i + 5]) * np.float64(y[i + 5])
        s6 += np.float64(x[i + 6]) * np.float64(y[i + 6])
        s7 += np.float64(x[i + 7]) * np.float64(y[i + 7])
    total = ((s0 + s1) + (s2 + s3)) + ((s4 + s5) + (s6 + s7))
    for i in range(whole, x.size):
        total += np.float64(x[i]) * np.float64(y[i])
    return total


@inlined
def add_magnitudes(x: F32, lanes: F64) -> None:
    """lanes[i] += |x[i]|, for a chunk of up to LANES elements."""
    for i in range(x.size):
        lanes[i] += np.float64(abs(x[i]))


@inlined
def folded(lanes: F64) -> float:
    """The sum of LANES partial sums, halves added until one is left."""
    width = LANES
    while width > 1:
        width //= 2
        upper = lanes[width:]
        for i in range(width):
            lanes[i] += upper[i]
    total: float = lanes[0]
    return total


@compiled("f4[:], f8[:] -> f8")
def sum_abs(x: F32, lanes: F64) -> float:
    """Σ|x| in float64, in `lanes` (LANES): the bits depend on the span alone."""
    lanes[:] = 0.0
    for start in range(0, x.size, LANES):
        add_magnitudes(x[start : min(start + LANES, x.size)], lanes)
    return folded(lanes)


@compiled("f4[:] -> i8")
def largest(x: F32) -> int:
    """Bits of the largest magnitude; NaN and Inf are the largest of all."""
    bits = x.view(np.uint32)
    found = np.uint32(0)
    for i in range(bits.size):
        found = max(found, bits[i] & _MAGNITUDE)
    return int(found)
