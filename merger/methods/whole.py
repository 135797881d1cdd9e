"""What a method's own block may do with whole tensors, and with the exact core of adapters: spectral methods live here.

Declared without torch; `merge` gets and gives torch tensors. It runs once, in one unit, on one thread, in float64 where
it decides anything, and its memory is what it declares.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from merger.methods.rounds import Call

if TYPE_CHECKING:
    from torch import Tensor

    from merger.methods.lowrank import Core


Grams = Callable[[int], "Tensor"]
"""Reads what the statistics of source k hold of the tensor: (columns, columns), float32. Read when it is asked for, so
that not all are held at once."""


class WholeBlock(ABC):
    """The combine step of a method that needs a tensor whole."""

    @abstractmethod
    def bytes(self, rows: int, cols: int, count: int) -> int:
        """What `merge` holds at its peak beside the sources' float32, for K = `count` deltas of (rows, cols)."""

    @abstractmethod
    def merge(self, call: Call, deltas_Kmn: Sequence[Tensor], base_mn: Tensor | None, *, vector: bool) -> Tensor:
        """The merged delta (m, n). Deltas are float32; a vector is a column (m, 1)."""

    def merge_measured(self, call: Call, deltas_Kmn: Sequence[Tensor], grams: Grams) -> Tensor:
        """The same for a method that declares `gram` statistics, where the sources have them; then a matrix."""
        raise NotImplementedError(f"{type(self).__name__} takes no statistics")


def core_bytes(rows: int, cols: int, total_rank: int, count: int) -> int:
    """What merging in the core holds beside the core's sides, for K = `count` sources of R = `total_rank` in all: P and
    Q, and per source a few matrices of the core's size."""
    sides = min(total_rank, rows) * rows + min(total_rank, cols) * cols
    return 8 * (2 * sides + 8 * (count + 1) * total_rank * total_rank)


class CoreBlock(ABC):
    """The combine step of a method on the exact core: ΔW_i = left · cores[i] · rightᵀ, with orthonormal sides."""

    def bytes(self, rows: int, cols: int, total_rank: int, count: int) -> int:
        """What `merge` holds at its peak, in bytes."""
        return core_bytes(rows, cols, total_rank, count)

    @abstractmethod
    def merge(self, call: Call, core: Core) -> tuple[Tensor, Tensor]:
        """(P (m, k), Q (n, k)) float64 with P·Qᵀ the merged delta. Weights and options are in `call`, one a core;
        lambda is applied by the caller."""

    def merge_measured(self, call: Call, core: Core, grams: Grams) -> tuple[Tensor, Tensor]:
        """The same for a method that declares `gram` statistics: one core for each source, of zeros where it lacks the
        module."""
        raise NotImplementedError(f"{type(self).__name__} takes no statistics")
