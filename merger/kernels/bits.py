"""Compiled loops on a checkpoint's bfloat16 bits: a base and its fine-tunes in, the merged bits out.

The plain way widens every source to float32, takes the base away, prepares a copy, combines, finishes and rounds, each
a pass over memory. Here a chunk of LANES elements goes through all of that while it is in the first cache. What is done
to an element, and in which order, is the plain way's; tests/merger/test_bits.py holds one to the other.

**An element that a trim or a drop leaves out gets the base's own bits** in the source's buffer: its delta is then zero,
and the mask needs no memory. A drop leaves nothing out that is no finite number, so a broken source is met whatever the
mask.

`base` may be empty: then sources are taken as they are. `scratch` is (rows, LANES) of float32.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from merger.kernels import LANES
from merger.kernels.cpu import (
    F32,
    F64,
    I64,
    U16,
    add_magnitudes,
    compiled,
    folded,
    gather,
    inlined,
    mixed,
    share_out,
    until_carry,
    upper_key,
    vote,
)

Matrix = npt.NDArray[np.uint16]
"""(sources, elements)."""

SIGNATURES: Final[dict[str, str]] = {}
"""The kernels of this module."""

_MAGNITUDE: Final = np.uint32(0x7FFFFFFF)
_INFINITY: Final = np.uint32(0x7F800000)
ACCUMULATE, ADD, ELECT = 0, 1, 2
"""How `merge` combines: PEFT's order of folding, a weighted sum, a sum of what agrees with an elected sign."""


@inlined
def _widened(bits: np.uint16) -> np.float32:
    wide: np.float32 = np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)
    return wide


@inlined
def _take(source: U16, base: U16, out: F32) -> None:
    """out = the source less the base."""
    if base.size:
        for i in range(out.size):
            out[i] = _widened(source[i]) - _widened(base[i])
    else:
        for i in range(out.size):
            out[i] = _widened(source[i])


@inlined
def _take_scaled(source: U16, base: U16, factor: np.float32, out: F32) -> None:
    """out = factor·(the source less the base)."""
    if base.size:
        for i in range(out.size):
            out[i] = factor * (_widened(source[i]) - _widened(base[i]))
    else:
        for i in range(out.size):
            out[i] = factor * _widened(source[i])


@inlined
def _part(x: U16, start: int, stop: int) -> U16:
    """A chunk of a vector, or nothing of an empty one."""
    return x[start:stop] if x.size else x


# -------------------------------------------------------------------- statistics


@compiled("u2[:], u2[:], f4[:,:], i8[:] ->", SIGNATURES)
def count_high(source: U16, base: U16, scratch: F32, counts: I64) -> None:
    """Add to `counts` (65536 bins) the upper 16 bits of each delta's magnitude."""
    for start in range(0, source.size, LANES):
        stop = min(start + LANES, source.size)
        delta = scratch[0][: stop - start]
        _take(source[start:stop], _part(base, start, stop), delta)
        bits = delta.view(np.uint32)
        for i in range(bits.size):
            counts[(bits[i] & _MAGNITUDE) >> np.uint32(15)] += 1


@compiled("u2[:], u2[:], i8, f4[:,:], i8[:] ->", SIGNATURES)
def count_low(source: U16, base: U16, prefix: int, scratch: F32, counts: I64) -> None:
    """Add to `counts` (32768 bins) the lower 15 bits of the magnitudes whose upper 16 bits are `prefix`."""
    for start in range(0, source.size, LANES):
        stop = min(start + LANES, source.size)
        delta = scratch[0][: stop - start]
        _take(source[start:stop], _part(base, start, stop), delta)
        bits = delta.view(np.uint32)
        for i in range(bits.size):
            magnitude = bits[i] & _MAGNITUDE
            if magnitude >> np.uint32(15) == prefix:
                counts[magnitude & np.uint32(0x7FFF)] += 1


# -------------------------------------------------------------------- prepare


@compiled("u2[:], u2[:], i8, i8, f4[:,:] -> i8", SIGNATURES)
def trim(source: U16, base: U16, threshold: int, allowance: int, scratch: F32) -> int:
    """Leave out, in place, whose delta is smaller than the magnitude with these bits, and what equals it once
    `allowance` such elements were kept. Returns how many of the allowance were used."""
    limit = np.uint32(threshold)
    equal = 0
    for start in range(0, source.size, LANES):
        stop = min(start + LANES, source.size)
        part, below, delta = source[start:stop], base[start:stop], scratch[0][: stop - start]
        _take(part, below, delta)
        bits = delta.view(np.uint32)
        for i in range(bits.size):
            magnitude = np.uint32(bits[i] & _MAGNITUDE)
            equal += 1 if magnitude == limit else 0
            part[i] = part[i] if magnitude >= limit else below[i]
    if equal <= allowance:
        return equal
    seen = 0
    for i in range(source.size):
        bits_of = np.float32(_widened(source[i]) - _widened(base[i])).view(np.uint32)
        if np.uint32(bits_of & _MAGNITUDE) == limit:
            seen += 1
            if seen > allowance:
                source[i] = base[i]
    return allowance


@inlined
def _drop(
    source: U16, base: U16, low: np.uint32, key: np.uint32, upper: np.uint32, most: np.uint32, delta: F32, left: F32
) -> None:  # fmt: skip
    """Deltas before and after a drop, and the drop in place."""
    for i in range(delta.size):
        x = np.float32(_widened(source[i]) - _widened(base[i]))
        h = mixed(np.uint32(np.uint32(low + np.uint32(i)) ^ key))
        h = mixed(np.uint32(h + upper))
        stays = (h <= most) | (np.uint32(x.view(np.uint32) & _MAGNITUDE) >= _INFINITY)
        delta[i] = x
        left[i] = x if stays else np.float32(0)
        source[i] = source[i] if stays else base[i]


@inlined
def _drop_all(source: U16, base: U16, delta: F32, left: F32) -> None:
    """The same where nothing is kept."""
    for i in range(delta.size):
        x = np.float32(_widened(source[i]) - _widened(base[i]))
        stays = np.uint32(x.view(np.uint32) & _MAGNITUDE) >= _INFINITY
        delta[i] = x
        left[i] = x if stays else np.float32(0)
        source[i] = source[i] if stays else base[i]


@compiled("u2[:], u2[:], i8[:], i8, i8, i8, i8, f4[:,:], f8[:,:], f8[:] ->", SIGNATURES)
def drop(
    source: U16, base: U16, bounds: I64, first: int, key_low: int, key_high: int, limit: int, scratch: F32,
    lanes: F64, sums: F64,
) -> None:  # fmt: skip
    """Leave out, in place, the elements whose counter-based hash is not below `limit`; add Σ|delta| before and after to
    `sums`, tile by tile.

    Tiles are [bounds[t], bounds[t + 1]); `first` is the flat index of source[0] in its tensor. `lanes` is (2, LANES).
    """
    key, most = np.uint32(key_low), np.uint32(max(limit - 1, 0))
    for tile in range(bounds.size - 1):
        lanes[:] = 0.0
        for start in range(bounds[tile], bounds[tile + 1], LANES):
            stop = min(start + LANES, bounds[tile + 1])
            delta, left = scratch[0][: stop - start], scratch[1][: stop - start]
            done = 0
            while done < delta.size:
                at = first + start + done
                end = done + until_carry(at, delta.size - done)
                part, below = source[start + done : start + end], base[start + done : start + end]
                if limit > 0:
                    upper = upper_key(at, key_high)
                    _drop(part, below, np.uint32(at), key, upper, most, delta[done:end], left[done:end])
                else:
                    _drop_all(part, below, delta[done:end], left[done:end])
                done = end
            add_magnitudes(delta, lanes[0])
            add_magnitudes(left, lanes[1])
        sums[0] += folded(lanes[0])
        sums[1] += folded(lanes[1])


# -------------------------------------------------------------------- combine and finish


@compiled("u2[:,:], u2[:], f4[:], f4[:], i8, i8, i8, i8, f4, f4, f4[:,:], u2[:] -> i8", SIGNATURES)
def merge(
    sources: Matrix, base: U16, factors: F32, weights: F32, combine: int, weighted: int, frequency: int, divide: int,
    divisor: np.float32, scale: np.float32, scratch: F32, out: U16,
) -> int:  # fmt: skip
    """base + scale·combine(factorₖ·deltaₖ), rounded to bfloat16. Returns the bits of the largest magnitude before it.

    `combine` is ACCUMULATE, ADD or ELECT; `divide` is that of `elect`, and for ADD whether the sum is divided by
    `divisor`. `scratch` is (sources + 4, LANES).
    """
    found = np.uint32(0)
    count = sources.shape[0]
    for start in range(0, out.size, LANES):
        stop = min(start + LANES, out.size)
        n = stop - start
        below, total, shares, made = scratch[0][:n], scratch[1][:n], scratch[2][:n], scratch[3][:n]
        bits = _part(base, start, stop)
        if base.size:
            for i in range(n):
                below[i] = _widened(bits[i])
        for k in range(count):
            _take_scaled(sources[k][start:stop], bits, factors[k], scratch[4 + k][:n])
        if combine == ACCUMULATE:
            for i in range(n):
                made[i] = below[i]
            for k in range(count):
                delta, weight = scratch[4 + k][:n], weights[k]
                for i in range(n):
                    made[i] += weight * delta[i]
        elif combine == ADD:
            delta, weight = scratch[4][:n], weights[0]
            for i in range(n):
                made[i] = weight * delta[i]
            for k in range(1, count):
                delta, weight = scratch[4 + k][:n], weights[k]
                for i in range(n):
                    made[i] += weight * delta[i]
            if divide != 0:
                for i in range(n):
                    made[i] /= divisor
        else:
            for i in range(n):
                total[i] = shares[i] = made[i] = np.float32(0)
            for k in range(count):
                vote(scratch[4 + k][:n], weights[k] if weighted else np.float32(1), frequency != 0, total)
            for k in range(count):
                gather(scratch[4 + k][:n], weights[k], weighted != 0, divide == 1, total, shares, made)
            if divide != 0:
                share_out(shares, made)
        if combine != ACCUMULATE:
            if base.size:
                for i in range(n):
                    made[i] = below[i] + scale * made[i]
            elif scale != np.float32(1):
                for i in range(n):
                    made[i] *= scale
        rounded, target = made.view(np.uint32), out[start:stop]
        for i in range(n):
            found = max(found, np.uint32(rounded[i] & _MAGNITUDE))
        for i in range(n):
            even = np.uint32(np.uint32(rounded[i] >> np.uint32(16)) & np.uint32(1))
            target[i] = np.uint16(np.uint32(np.uint32(rounded[i] + np.uint32(0x7FFF)) + even) >> np.uint32(16))
    return int(found)
