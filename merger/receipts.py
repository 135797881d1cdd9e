"""What a worker brings back: proof of what it wrote and the small statistics it found. Never a tensor."""

from __future__ import annotations

from dataclasses import dataclass, field

from merger.methods.rounds import Statistic


@dataclass(frozen=True, slots=True)
class Extent:
    """Bytes [start, end) of an output file, and their SHA-256."""

    output: int
    file: str
    start: int
    end: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Receipt:
    """Proof that a unit is done: the extents it wrote and the small statistics it found."""

    unit: int
    extents: tuple[Extent, ...] = ()
    statistics: tuple[Statistic, ...] = ()
    """One a result of the task, for a unit of statistics."""
    notes: dict[str, float] = field(default_factory=dict)
    """Figures for the report: energy, share lost, rank that keeps 95 %."""
    read_bytes: int = 0
    seconds: float = 0.0
    by_result: tuple[dict[str, float], ...] = ()
    """Of `notes`, what belongs to each result of a task that has several; else empty."""
