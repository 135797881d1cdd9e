"""What a method's own block may do: see a tensor tile by tile, once a round, and map it. The seam of streamed methods.

A `TileBlock` declares how many rounds of statistics it needs. In each round it adds to an array what one tile says;
the arrays of all tiles, whoever measured them, are added in the order of the rows, and `conclude` makes of their sum
what the next round and the map may know. So a block sees tensors of any size in bounded memory and gives the same
bits for any cut. It works on numpy arrays, on the CPU, also where the rest of a plan runs on a GPU.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from merger.methods.rounds import Call, Statistic

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]
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
    number: int = 0
    """Which tile of the tensor it is."""
    s_Kn: F32 | None = None
    """What each source's statistics say of these elements, for methods that declare `diagonal` ones."""

    @property
    def x_Krl(self) -> F32:
        """The sources by rows: (K, rows, length)."""
        count, elements = self.x_Kn.shape
        return self.x_Kn.reshape(count, elements // self.length if self.length else 0, self.length)


@dataclass(frozen=True, slots=True)
class TensorExtent:
    """The tensor (or, for `scope: model`, all tensors) that a statistic is over."""

    count: int
    """K."""
    numel: int
    length: int
    """Elements of a row."""
    num_tiles: int = 1
    """Tiles of the tensor (of its first one, for `scope: model`)."""
    name: str = ""
    """The tensor's name, for errors."""


class TileBlock(ABC):
    """The combine step of a streamed method. Override what the method needs; blocks hold no state."""

    whole_rows: bool = False
    """Whether a tile must hold rows whole and a vector is one row."""
    keeps_equal: bool = False
    """Whether sources that are all the same give themselves, whatever the parameters: such tensors are copied."""

    def fitted(self, call: Call, shape: tuple[int, ...]) -> Call:
        """The call for a tensor of this shape, while planning. Raises PlanError where it cannot be merged so."""
        del shape
        return call

    def rounds(self, call: Call) -> int:
        """Rounds of statistics before the map."""
        del call
        return 0

    def empty(self, number: int, call: Call, extent: TensorExtent) -> Statistic:
        """The neutral element of a round: integers for counts, float64 for sums. Needed where there are rounds."""
        raise NotImplementedError(f"{type(self).__name__} has rounds and says of none what it starts from")

    def measure(self, number: int, call: Call, known: Known, tile: Tile, into: Statistic) -> None:
        """Add to `into` what one tile says. Needed where there are rounds."""
        raise NotImplementedError(f"{type(self).__name__} has rounds and measures nothing in them")

    def conclude(self, number: int, call: Call, known: Known, merged: Statistic, extent: TensorExtent) -> F64:
        """What the round found: small, since it travels with every unit."""
        del number, call, known, extent
        return np.asarray(merged, np.float64)

    def combines(self, call: Call) -> bool:
        """Whether the result is a linear combination of whole sources, with factors that their inner products decide.
        Then adapters need no dense delta: `factors_of` is asked instead of the rounds and the map."""
        del call
        return False

    def factors_of(self, call: Call, gram_KK: F64, extent: TensorExtent) -> F64:
        """(K,) factors of the sources, from ⟨xᵢ, xⱼ⟩. Needed where it combines."""
        raise NotImplementedError(f"{type(self).__name__} is no linear combination of whole sources")

    def notes(self, call: Call, known: Known) -> dict[str, float]:
        """Figures for the report, once all rounds are done."""
        del call, known
        return {}

    @abstractmethod
    def apply(self, call: Call, known: Known, tile: Tile) -> F32:
        """The merged tile (n,), float32: a delta, or a weight. lambda and the base are added by `finish`."""


def dot(a: npt.NDArray[np.floating], b: npt.NDArray[np.floating]) -> float:
    """⟨a, b⟩ in float64, summed pairwise over the tile (numpy's order, fixed by the tile's length)."""
    return float(np.sum(a.astype(np.float64) * b.astype(np.float64)))


def combined(x_Kn: F32, coefficients: Sequence[float]) -> F32:
    """((c₀x₀ + c₁x₁) + c₂x₂) …, float32, each operation rounded."""
    out: F32 = x_Kn[0] * np.float32(coefficients[0])
    for x_n, coefficient in zip(x_Kn[1:], coefficients[1:], strict=True):
        out += x_n * np.float32(coefficient)
    return out


def show_broken(out_n: F32, x_Kn: F32) -> F32:
    """`out_n` with NaN wherever a source is no finite number, in place: a mask must not hide a broken source."""
    broken = ~np.isfinite(x_Kn).all(axis=0)
    if broken.any():
        out_n[broken] = np.nan
    return out_n
