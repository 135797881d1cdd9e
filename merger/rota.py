"""Whose turn it is: the jobs of many plans as one agenda, in proportion to their shares. Pure: no threads, no clock.

Each plan is charged for the work it gets, divided by its share, and the one that was charged least comes next. One that
joins later begins where the others stand, so that it neither waits for them nor makes them wait.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from merger.crew import Job, UnitFindings
from merger.planning.nouns import MergePlan
from merger.run import Progression


@dataclass(slots=True, eq=False)
class _Turn:
    """One plan, and what it had."""

    progression: Progression
    share: float
    charged: float
    out: set[object] = field(default_factory=set)
    """Units and files to seal that were taken and did not come back."""
    abandoned: bool = False


class Rota:
    """Progressions by number, and whose job comes next."""

    def __init__(self) -> None:
        self._turns: dict[int, _Turn] = {}
        self._level = 0.0

    def add(self, number: int, progression: Progression, share: float = 1.0) -> None:
        self._turns[number] = _Turn(progression, share, self._level)

    def remove(self, number: int) -> None:
        """Its last job is back."""
        del self._turns[number]

    def abandon(self, number: int) -> None:
        """Hand out no more of it; what is out may come back."""
        self._turns[number].abandoned = True

    def is_idle(self, number: int) -> bool:
        """Whether nothing of it is out."""
        return not self._turns[number].out

    def __iter__(self) -> Iterator[int]:
        return iter(list(self._turns))

    @property
    def num_left(self) -> int:
        return sum(turn.progression.num_left for turn in self._turns.values() if not turn.abandoned)

    @property
    def at_tail(self) -> bool:
        return all(turn.abandoned or turn.progression.at_tail for turn in self._turns.values())

    def take(self) -> Job | None:
        """The next job, of the plan that had the least for its share; None while all wait for what is out."""
        for number, turn in sorted(self._turns.items(), key=lambda item: (item[1].charged, item[0])):
            if turn.abandoned or (job := turn.progression.take()) is None:
                continue
            self._level = turn.charged
            turn.charged += work_of(turn.progression.plan, job) / turn.share
            turn.out.update(_parts(job))
            return replace(job, run=number)
        return None

    def put_back(self, job: Job) -> None:
        self.returned(job)
        turn = self._turns[job.run]
        if not turn.abandoned:
            turn.progression.put_back(job)

    def returned(self, job: Job) -> None:
        """A job came back, done or not."""
        turn = self._turns.get(job.run)
        if turn is not None:
            turn.out.difference_update(_parts(job))

    def wants(self, job: Job) -> bool:
        turn = self._turns.get(job.run)
        return turn is not None and not turn.abandoned

    def findings(self, job: Job) -> list[UnitFindings]:
        return self._turns[job.run].progression.findings(job)


def _parts(job: Job) -> list[object]:
    return [unit.index for unit in job.units] if job.seal is None else [job.seal]


def work_of(plan: MergePlan, job: Job) -> float:
    """How much a job is, about: elements that are read or written."""
    return 1.0 + sum(
        float(unit.last - unit.first) * plan.tasks[unit.task].cols
        * (len(plan.tasks[unit.task].entries) + len(plan.tasks[unit.task].results))
        for unit in job.units
    )  # fmt: skip
