"""What finished rounds of statistics found, for the units that need it: receipts in, findings out. Pure."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from merger.methods.rounds import Findings, RoundName, conclude, empty_statistic, equals_at, wants
from merger.planning.nouns import MergePlan, Unit
from merger.receipts import Receipt


class Ledger:
    """What the finished rounds of a plan found: receipts of statistics in, findings for units out.

    Kept by whoever drives a plan. Receipts may come in any order; sums are added in the order of the units.
    """

    def __init__(self, plan: MergePlan, units: Sequence[Unit]) -> None:
        self.plan = plan
        self._units = units
        self._receipts: dict[int, Receipt] = {}
        self._findings: dict[tuple[int, int], Findings] = {}
        self._equals: dict[tuple[int, int], dict[int, tuple[int, ...]]] = {}
        self._stages = plan.num_stages

    def add(self, receipt: Receipt) -> None:
        """Keep a receipt of statistics."""
        self._receipts[receipt.unit] = receipt

    def close_stage(self, stage: int, *, only: Collection[int] | None = None) -> None:
        """Conclude the rounds of a stage, once all its receipts are in (of the tasks in `only`, where given)."""
        groups: dict[tuple[RoundName, int, Any], list[Unit]] = {}
        for unit in self._units:
            if unit.stage != stage or unit.round is None or (only is not None and unit.task not in only):
                continue
            for index, result in enumerate(self.plan.tasks[unit.task].results):
                if wants(result.call, unit.round):
                    scope = ("model", result.places[0].output) if result.call.scope == "model" else unit.task
                    groups.setdefault((unit.round, index, scope), []).append(unit)
        for (name, index, _), units in groups.items():
            self._conclude(name, index, units)

    def _conclude(self, name: RoundName, index: int, units: list[Unit]) -> None:
        task = self.plan.tasks[units[0].task]
        merged = empty_statistic(name, len(task.entries))
        for unit in units:
            merged += self._receipts[unit.index].statistics[index]
        tasks = sorted({unit.task for unit in units})
        numel = sum(self.plan.tasks[t].rows * self.plan.tasks[t].cols for t in tasks)
        known = self._findings.get((units[0].task, index), Findings())
        found = conclude(name, merged, task.results[index].call, numel, known)
        for t in tasks:
            self._findings[t, index] = found
        if name == "trim_low":
            before = [0] * len(task.entries)
            for unit in units:
                self._equals.setdefault((unit.task, index), {})[unit.first] = tuple(before)
                counts = self._receipts[unit.index].statistics[index]
                for k, (bits, _) in enumerate(found.thresholds):
                    before[k] += equals_at(counts[k], bits)

    def findings(self, unit: Unit) -> tuple[Findings, ...]:
        """What a unit needs to know, one item a result."""
        task = self.plan.tasks[unit.task]
        found = []
        for index in range(len(task.results)):
            known = self._findings.get((unit.task, index), Findings())
            equals = self._equals.get((unit.task, index))
            if equals is not None and known.thresholds:
                known = known.after(equals.get(unit.first, (0,) * len(task.entries)))
            found.append(known)
        return tuple(found)
