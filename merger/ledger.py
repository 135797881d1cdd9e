"""What finished rounds of statistics found, for the units that need it: receipts in, findings out. Pure."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from merger.methods.blocks import end_round, start_round
from merger.methods.rounds import Findings, RoundName, Statistic, low_bin, wants
from merger.methods.tiles import TensorExtent
from merger.planning.nouns import MergePlan, Unit
from merger.receipts import Receipt


@dataclass(frozen=True, slots=True)
class _Packed:
    """A statistic by its elements that are not zero: histograms of a unit fill few of their bins."""

    shape: tuple[int, ...]
    index: npt.NDArray[np.int64]
    values: Statistic

    @classmethod
    def of(cls, statistic: Statistic) -> _Packed:
        flat = statistic.reshape(-1)
        index = np.flatnonzero(flat)
        return cls(statistic.shape, index, flat[index])

    def add_to(self, merged: Statistic) -> None:
        merged.reshape(-1)[self.index] += self.values

    def whole(self) -> Statistic:
        found = np.zeros(self.shape, np.int64) if self.values.dtype == np.int64 else np.zeros(self.shape, np.float64)
        self.add_to(found)
        return found

    def at(self, row: int, column: int | None) -> int:
        """One count; 0 for no column."""
        if column is None:
            return 0
        wanted = row * self.shape[-1] + column
        position = int(np.searchsorted(self.index, wanted))
        return int(self.values[position]) if position < len(self.index) and self.index[position] == wanted else 0


class Ledger:
    """What the finished rounds of a plan found: receipts of statistics in, findings for units out.

    Kept by whoever drives a plan. Receipts may come in any order; sums are added in the order of the units.
    """

    def __init__(self, plan: MergePlan, units: Sequence[Unit]) -> None:
        self.plan = plan
        self._units = units
        self._statistics: dict[int, tuple[_Packed, ...]] = {}
        self._findings: dict[tuple[int, int], Findings] = {}
        self._equals: dict[tuple[int, int], dict[int, tuple[int, ...]]] = {}

    def add(self, receipt: Receipt) -> None:
        """Keep what a receipt of statistics found."""
        self._statistics[receipt.unit] = tuple(_Packed.of(statistic) for statistic in receipt.statistics)

    def kept(self, unit: int) -> tuple[Statistic, ...]:
        """What a unit found that no round concludes, such as ranks."""
        return tuple(packed.whole() for packed in self._statistics.get(unit, ()))

    def close_stage(self, stage: int, *, only: Collection[int] | None = None) -> None:
        """Conclude the rounds of a stage, once all its receipts are in (of the tasks in `only`, where given)."""
        groups: dict[tuple[RoundName, Any], list[tuple[Unit, int]]] = {}
        closed: list[int] = []
        for unit in self._units:
            if unit.stage != stage or unit.round is None or (only is not None and unit.task not in only):
                continue
            closed.append(unit.index)
            for index, result in enumerate(self.plan.tasks[unit.task].results):
                if wants(result.call, unit.round):
                    # In a sweep an output's result need not be the same one in every task.
                    output = result.places[0].output
                    scope = ("model", output) if result.call.scope == "model" else (unit.task, index)
                    groups.setdefault((unit.round, scope), []).append((unit, index))
        for (name, _), members in groups.items():
            self._conclude(name, members)
        for number in closed:
            self._statistics.pop(number, None)

    def _conclude(self, name: RoundName, members: Sequence[tuple[Unit, int]]) -> None:
        first = (members[0][0].task, members[0][1])
        task = self.plan.tasks[first[0]]
        call = task.results[first[1]].call
        results = sorted({(unit.task, index) for unit, index in members})
        numel = sum(self.plan.tasks[t].rows * self.plan.tasks[t].cols for t, _ in results)
        tiles = -(-task.rows // max(1, task.tile_rows))
        extent = TensorExtent(len(task.entries), numel, task.length, tiles, task.name)
        merged = start_round(name, call, extent)
        for unit, index in members:
            self._statistics[unit.index][index].add_to(merged)
        found = end_round(name, call, merged, extent, self._findings.get(first, Findings()))
        for result in results:
            self._findings[result] = found
        if name == "trim_low":
            before = [0] * len(found.thresholds)
            for unit, index in members:
                self._equals.setdefault((unit.task, index), {})[unit.first] = tuple(before)
                packed = self._statistics[unit.index][index]
                for k, (bits, _) in enumerate(found.thresholds):
                    before[k] += packed.at(k, low_bin(bits))

    def findings(self, unit: Unit) -> tuple[Findings, ...]:
        """What a unit needs to know, one item a result."""
        task = self.plan.tasks[unit.task]
        found = []
        for index in range(len(task.results)):
            known = self._findings.get((unit.task, index), Findings())
            equals = self._equals.get((unit.task, index))
            if equals is not None and known.thresholds:
                known = known.after(equals.get(unit.first, (0,) * len(known.thresholds)))
            found.append(known)
        return tuple(found)
