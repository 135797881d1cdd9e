"""The exact r-th smallest of a float32 quantity that streams by: two histograms, of the upper and the lower 16 bits.

A key orders floats as integers (−0 counts as 0). The first round counts upper halves and finds the bin of each wanted
rank; the second counts the lower halves inside that bin and finds the value. Counts are integers, so any cut of the
tensor gives the same.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from merger.methods.rounds import Statistic
from merger.methods.tiles import F32

Keys = npt.NDArray[np.uint32]
HALF: Final = 1 << 16
_SIGN: Final = np.uint32(0x80000000)


def ordered_keys(values: F32) -> Keys:
    """Integers in the order of the floats."""
    bits = (values + np.float32(0)).view(np.uint32)
    return np.where(bits & _SIGN, ~bits, bits | _SIGN)


def value_of(key: int) -> float:
    """The float of a key."""
    bits = key & 0x7FFFFFFF if key & 0x80000000 else ~key & 0xFFFFFFFF
    return float(np.array(bits, np.uint32).view(np.float32))


def count_upper(keys: Keys, into: Statistic) -> None:
    """Add to `into` (65536 bins) the upper halves."""
    into += np.bincount((keys >> np.uint32(16)).astype(np.int64), minlength=HALF)


def count_lower(keys: Keys, prefix: int, into: Statistic) -> None:
    """Add to `into` (65536 bins) the lower halves of the keys whose upper half is `prefix`."""
    inside = keys[(keys >> np.uint32(16)) == np.uint32(prefix)] & np.uint32(0xFFFF)
    into += np.bincount(inside.astype(np.int64), minlength=HALF)


def locate(counts: npt.NDArray[np.generic], rank: int) -> tuple[int, int]:
    """(bin, rank inside it) of the element of this rank, counted from 0 upwards; beyond the last is the last."""
    upto = np.cumsum(counts.astype(np.int64))
    total = int(upto[-1])
    if total == 0:
        return 0, 0
    rank = min(max(rank, 0), total - 1)
    found = int(np.searchsorted(upto, rank, side="right"))
    return found, rank - (int(upto[found - 1]) if found else 0)
