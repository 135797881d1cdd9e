"""Hot loops for the CPU: numba, one thread, the GIL released.

No `prange` (it aborts when called from several threads on the workqueue layer) and no fastmath (it would fuse
multiplications with additions and change the bits).

Each function equals its twin in merger/kernels/plain.py bit for bit; tests/merger/kernels proves it. Arrays are
contiguous float32 unless said otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeVar, cast

import numba
import numpy as np
import numpy.typing as npt

from merger.kernels.hashing import MIX_A, MIX_B, WEYL

F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]

_Function = TypeVar("_Function", bound=Callable[..., Any])

_MAGNITUDE: Final = np.uint32(0x7FFFFFFF)
_A: Final = np.uint32(MIX_A)
_B: Final = np.uint32(MIX_B)
_WEYL: Final = np.uint32(WEYL)


def compiled(function: _Function) -> _Function:
    """numba.njit with the options every kernel here shares; the cache is used where its folder is writable."""
    options: dict[str, Any] = {"nogil": True, "fastmath": False, "error_model": "numpy"}
    try:
        return cast("_Function", numba.njit(cache=True, **options)(function))
    except RuntimeError:  # no writable place for the cache: compile in every process
        return cast("_Function", numba.njit(**options)(function))


@compiled
def widen_bf16(source: npt.NDArray[np.uint16], out: F32) -> None:
    """bfloat16 bits as float32, exactly."""
    bits = out.view(np.uint32)
    for i in range(source.size):
        bits[i] = np.uint32(source[i]) << np.uint32(16)


@compiled
def narrow_bf16(x: F32, out: npt.NDArray[np.uint16]) -> None:
    """float32 rounded to bfloat16 bits, half to even. NaN may become Inf: it is refused before."""
    bits = x.view(np.uint32)
    for i in range(bits.size):
        even = (bits[i] >> np.uint32(16)) & np.uint32(1)
        out[i] = np.uint16((bits[i] + np.uint32(0x7FFF) + even) >> np.uint32(16))


@compiled
def count_high(x: F32, counts: I64) -> None:
    """Add to `counts` (65536 bins) the upper 16 bits of each magnitude: bits(|x|) >> 15."""
    bits = x.view(np.uint32)
    for i in range(bits.size):
        counts[(bits[i] & _MAGNITUDE) >> np.uint32(15)] += 1


@compiled
def count_low(x: F32, prefix: int, counts: I64) -> None:
    """Add to `counts` (32768 bins) the lower 15 bits of the magnitudes whose upper 16 bits are `prefix`."""
    bits = x.view(np.uint32)
    for i in range(bits.size):
        magnitude = bits[i] & _MAGNITUDE
        if magnitude >> np.uint32(15) == prefix:
            counts[magnitude & np.uint32(0x7FFF)] += 1


@compiled
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


@compiled
def drop(x: F32, first: int, key_low: int, key_high: int, limit: int, factor: np.float32, out: F32) -> None:
    """out = factor·x where the element's counter-based hash is below `limit` (density · 2³²), else zero.

    `first` is the flat index of x[0] in its tensor; `out` may be `x`. See merger/kernels/hashing.py for the hash. NaN
    and Inf are not dropped but become NaN, so that a broken source is met whatever the mask.
    """
    zero = np.float32(0)
    k0 = np.uint32(key_low)
    k1 = np.uint32(key_high)
    bound = np.uint64(limit)
    for i in range(x.size):
        index = np.uint64(first) + np.uint64(i)
        h = np.uint32(index & np.uint64(0xFFFFFFFF)) ^ k0
        h ^= h >> np.uint32(16)
        h = np.uint32(h * _A)
        h ^= h >> np.uint32(15)
        h = np.uint32(h * _B)
        h ^= h >> np.uint32(16)
        h = np.uint32(h + k1 + np.uint32(np.uint32(index >> np.uint64(32)) * _WEYL))
        h ^= h >> np.uint32(16)
        h = np.uint32(h * _A)
        h ^= h >> np.uint32(15)
        h = np.uint32(h * _B)
        h ^= h >> np.uint32(16)
        # Times zero, not zero: what is no number stays none. Plus zero: never −0.
        out[i] = factor * (x[i] if np.uint64(h) < bound else x[i] * zero + zero)


@compiled
def scale(x: F32, factor: np.float32) -> None:
    """x *= factor, in place."""
    for i in range(x.size):
        x[i] *= factor


@compiled
def divide(x: F32, divisor: np.float32) -> None:
    """x /= divisor, in place."""
    for i in range(x.size):
        x[i] /= divisor


@compiled
def subtract(x: F32, base: F32) -> None:
    """x -= base, in place."""
    for i in range(x.size):
        x[i] -= base[i]


@compiled
def add(x: F32, other: F32) -> None:
    """x += other, in place."""
    for i in range(x.size):
        x[i] += other[i]


@compiled
def weighted_sum(deltas: npt.NDArray[np.float32], weights: F32, out: F32) -> None:
    """out = ((w₀·d₀ + w₁·d₁) + w₂·d₂) …, in the order of the sources. `deltas` is (sources, elements)."""
    for i in range(out.size):
        out[i] = weights[0] * deltas[0, i]
    for k in range(1, deltas.shape[0]):
        w = weights[k]
        for i in range(out.size):
            out[i] += w * deltas[k, i]


@compiled
def elect(
    deltas: npt.NDArray[np.float32],
    weights: F32,
    weighted: bool,
    frequency: bool,
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
    total = scratch[0]
    divisor = scratch[1]
    zero = np.float32(0)
    one = np.float32(1)
    for i in range(out.size):
        total[i] = zero
        divisor[i] = zero
        out[i] = zero
    for k in range(deltas.shape[0]):
        row = deltas[k]
        w = weights[k] if weighted else one
        if frequency:
            for i in range(out.size):
                total[i] += (one if row[i] > 0 else zero) - (one if row[i] < 0 else zero)
        else:
            for i in range(out.size):
                total[i] += w * row[i]
    for k in range(deltas.shape[0]):
        row = deltas[k]
        w = weights[k]
        judge = w if weighted else one
        share = w if divide == 1 else one
        for i in range(out.size):
            judged = judge * row[i]
            agrees = (judged > 0) & (total[i] >= 0) | (judged < 0) & (total[i] < 0)
            product = w * row[i]
            out[i] += product if agrees else product * zero
            divisor[i] += share if agrees else zero
    if divide != 0:
        for i in range(out.size):
            out[i] = out[i] / (divisor[i] if divisor[i] != 0 else one)


@compiled
def accumulate(x: F32, factor: np.float32, out: F32) -> None:
    """out += factor·x, two roundings."""
    for i in range(out.size):
        out[i] += factor * x[i]


@compiled
def scale_and_add(base: F32, factor: np.float32, out: F32) -> None:
    """out = base + factor·out, two roundings."""
    for i in range(out.size):
        out[i] = base[i] + factor * out[i]


@compiled
def combine_two(a: F32, b: F32, factor_a: np.float32, factor_b: np.float32, out: F32) -> None:
    """out = factor_a·a + factor_b·b."""
    for i in range(out.size):
        out[i] = factor_a * a[i] + factor_b * b[i]


@compiled
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


@compiled
def sum_abs(x: F32) -> float:
    """Σ|x| in float64, summed as `dot` sums."""
    s0 = s1 = s2 = s3 = s4 = s5 = s6 = s7 = 0.0
    whole = x.size - x.size % 8
    for i in range(0, whole, 8):
        s0 += np.float64(abs(x[i]))
        s1 += np.float64(abs(x[i + 1]))
        s2 += np.float64(abs(x[i + 2]))
        s3 += np.float64(abs(x[i + 3]))
        s4 += np.float64(abs(x[i + 4]))
        s5 += np.float64(abs(x[i + 5]))
        s6 += np.float64(abs(x[i + 6]))
        s7 += np.float64(abs(x[i + 7]))
    total = ((s0 + s1) + (s2 + s3)) + ((s4 + s5) + (s6 + s7))
    for i in range(whole, x.size):
        total += np.float64(abs(x[i]))
    return total


@compiled
def largest(x: F32) -> int:
    """Bits of the largest magnitude; NaN and Inf are the largest of all."""
    bits = x.view(np.uint32)
    found = np.uint32(0)
    for i in range(bits.size):
        found = max(found, bits[i] & _MAGNITUDE)
    return int(found)
