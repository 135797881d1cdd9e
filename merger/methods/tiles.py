"""What a method's own block may do: see a tensor tile by tile, once a round, and map it. The seam of streamed methods.

A `TileBlock` declares how many rounds of statistics it needs. In each round it adds to an array what one tile says;
the arrays of all tiles, whoever measured them, are added in the order of the rows, and `conclude` makes of their sum
what the next round and the map may know. So a block sees tensors of any size in bounded memory and gives the same
bits for any cut. It works on numpy arrays, on the CPU, also where the rest of a plan runs on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from merger.methods.rounds import Call, Statistic

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
Known = Sequence[F64]
"""What the rounds so far found, one array a round."""


@dataclass(frozen=True, slots=True)
class Tile:
    """Some rows of one tensor. K sources, n = rows · length elements."""

    x_Kn: F32
    """The prepared sources: deltas, or weights where the method's space is `weight` (the base then comes first)."""
    base_n: F32 | None
    """The base, for methods on deltas of models."""
    length: int
    """Elements of a row: the last dimension; a vector is one row."""
    first: int
    """Flat index of the first element in the tensor."""

    @property
    def x_Krl(self) -> F32:
        """The sources by rows: (K, rows, length)."""
        return self.x_Kn.reshape(len(self.x_Kn), -1, self.length)


@dataclass(frozen=True, slots=True)
class TensorExtent:
    """The tensor (or, for `scope: model`, all tensors) that a statistic is over."""

    count: int
    """K."""
    numel: int
    length: int
    """Elements of a row."""


class TileBlock:
    """The combine step of a streamed method. Override what the method needs; blocks hold no state."""

    whole_rows: bool = False
    """Whether a tile must hold rows whole and a vector is one row."""

    def rounds(self, call: Call) -> int:
        """Rounds of statistics before the map."""
        del call
        return 0

    def empty(self, number: int, call: Call, extent: TensorExtent) -> Statistic:
        """The neutral element of a round: integers for counts, float64 for sums."""
        raise NotImplementedError

    def measure(self, number: int, call: Call, known: Known, tile: Tile, into: Statistic) -> None:
        """Add to `into` what one tile says."""
        raise NotImplementedError

    def conclude(self, number: int, call: Call, known: Known, merged: Statistic, extent: TensorExtent) -> F64:
        """What the round found: small, since it travels with every unit."""
        del number, call, known, extent
        return np.asarray(merged, np.float64)

    def apply(self, call: Call, known: Known, tile: Tile) -> F32:
        """The merged tile (n,), float32: a delta, or a weight. lambda and the base are added by `finish`."""
        raise NotImplementedError


def dot(a: npt.NDArray[np.floating], b: npt.NDArray[np.floating]) -> float:
    """⟨a, b⟩ in float64, summed pairwise over the tile (numpy's order, fixed by the tile's length)."""
    return float(np.sum(a.astype(np.float64) * b.astype(np.float64)))
