"""arcee_fusion: take from the other model what changed most, where the row's meaning changed too (mergekit 0.1.5).

    s = |X − B| · KL(softmax(X row) ‖ softmax(B row)), each softmax plus 1e-8
    the other model's value where s ≥ median + 1.5·(q₃ − q₁), the base's elsewhere

Quartiles are the elements ⌊q·(n − 1)⌋ of the sorted scores, exact for any n; mergekit takes them from a random sample
above a million elements.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from merger.methods.declare import MethodSpec
from merger.methods.order import HALF, count_lower, count_upper, locate, ordered_keys, value_of
from merger.methods.rounds import Call, Statistic
from merger.methods.tiles import F32, F64, Known, TensorExtent, Tile, TileBlock, show_broken

_QUARTILES: Final = (0.25, 0.5, 0.75)


class ArceeFusion(TileBlock):
    """The base and one other model. Rounds: the upper, then the lower halves of the scores' order."""

    whole_rows = True
    keeps_equal = True

    def rounds(self, call: Call) -> int:
        return 2

    def empty(self, number: int, call: Call, extent: TensorExtent) -> Statistic:
        return np.zeros(HALF if number == 0 else (len(_QUARTILES), HALF), np.int64)

    def measure(self, number: int, call: Call, known: Known, tile: Tile, into: Statistic) -> None:
        keys = ordered_keys(scores(tile))
        if number == 0:
            count_upper(keys, into)
            return
        for row, prefix in enumerate(known[0][:, 0]):
            count_lower(keys, int(prefix), into[row])

    def conclude(self, number: int, call: Call, known: Known, merged: Statistic, extent: TensorExtent) -> F64:
        if number == 0:
            ranks = [int(q * (extent.numel - 1)) for q in _QUARTILES]
            return np.array([locate(merged, rank) for rank in ranks], np.float64)
        first, median, third = (
            np.float32(value_of(int(prefix) << 16 | locate(counts, int(rank))[0]))
            for (prefix, rank), counts in zip(known[0], merged, strict=True)
        )
        return np.array([median + np.float32(1.5) * (third - first)], np.float64)

    def apply(self, call: Call, known: Known, tile: Tile) -> F32:
        base_n, other_n = tile.x_Kn
        out: F32 = np.where(scores(tile) >= np.float32(known[1][0]), other_n, base_n)
        return show_broken(out, tile.x_Kn)


def scores(tile: Tile) -> F32:
    """Importance of each element, (n,)."""
    base_rl, other_rl = tile.x_Krl.astype(np.float64)
    p, q = _softmax(other_rl), _softmax(base_rl)
    # Never negative but for rounding.
    divergence = np.maximum(np.sum(p * np.log(p / q), axis=1), 0.0)
    found: F32 = (np.abs(other_rl - base_rl) * divergence[:, None]).astype(np.float32)
    return found.reshape(-1)


def _softmax(x_rl: F64) -> F64:
    powers = np.exp(x_rl - np.max(x_rl, axis=1, keepdims=True, initial=-np.inf))
    found: F64 = powers / np.sum(powers, axis=1, keepdims=True) + 1e-8
    return found


METHODS = (
    MethodSpec(
        name="arcee_fusion", summary="takes from the other model what changed most in rows that changed in meaning",
        spaces=("weight",), combine="block", tile=ArceeFusion(), parameters=(), base="required", max_sources=2,
        closed_on_deltas=False, cut="rows", paper="mergekit",
    ),
)  # fmt: skip
