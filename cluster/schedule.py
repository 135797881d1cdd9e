"""Which worker does what, and what a loss means: events in, decisions out. No Ray, no clock, no IO.

    receive(event, now)   what happened; returns the outcomes to enter
    decide(now)           what to do now
    happened()            what people may want to know of it, since this was last asked

Who is to blame when a worker dies with several jobs in hand? Nobody knows, so all of them become suspects: each is
handed out again alone, to a worker that has nothing else. A job that takes a worker down while alone is charged; one of
several units is halved first, until the guilty one is by itself. MAX_LOSSES charges end the merge and name it.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, Literal

from merger.crew import Job, Outcome, UnitFindings, ran_out_of_memory
from merger.errors import InfrastructureError, MergeFailedError, RaymergeError
from merger.events import Event as Happening
from merger.planning.memory import peak_bytes
from merger.run import Agenda, less_memory, out_of_memory, unit_again, unit_failed
from merger.tensors import format_size

MAX_LOSSES: Final = 3
"""Workers that one job may take down, and workers in a row that may die before they can start."""
PAUSES: Final = (5.0, 20.0, 60.0)
"""Seconds before a job is tried again whose sources could not be reached."""
START_SECONDS: Final = 120.0
RETIRE_SECONDS: Final = 10.0
"""How long a worker has nothing to do, at the tail of a run, before it is let go."""

LossKind = Literal["died", "preempted", "out-of-memory"]


# ---- events ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Ready:
    """A worker has taken the plan."""

    worker: int
    node: str


@dataclass(frozen=True, slots=True)
class Finished:
    """Jobs of a worker ended, well or not: (ticket, outcome)."""

    worker: int
    outcomes: tuple[tuple[int, Outcome], ...]


@dataclass(frozen=True, slots=True)
class Lost:
    """A worker is gone, ready or not."""

    worker: int
    kind: LossKind
    why: str = ""
    unsent: frozenset[int] = frozenset()
    """Tickets of its jobs that never left the driver."""


@dataclass(frozen=True, slots=True)
class Unfit:
    """A worker can never do this plan: another version, a folder that is not shared."""

    worker: int
    error: RaymergeError


@dataclass(frozen=True, slots=True)
class Draining:
    """The nodes that are about to go: all of them, by id."""

    nodes: frozenset[str]


@dataclass(frozen=True, slots=True)
class Lacking:
    """What no node of the cluster has, for the error that may come of it; empty when all is there."""

    what: str
    fix: str = ""
    for_good: bool = False
    """Whether no waiting brings it."""


Event = Ready | Finished | Lost | Unfit | Draining | Lacking


# ---- decisions -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Start:
    """Start a worker of this number."""

    worker: int


@dataclass(frozen=True, slots=True)
class Hand:
    """Give a worker a job, with what earlier stages found, to be done within so many bytes."""

    worker: int
    ticket: int
    job: Job
    memory: int
    findings: Sequence[UnitFindings]


@dataclass(frozen=True, slots=True)
class Retire:
    """End a worker that has nothing in hand."""

    worker: int


@dataclass(frozen=True, slots=True)
class Fail:
    """End the run with this error."""

    error: BaseException


Decision = Start | Hand | Retire | Fail


class JobError(Exception):
    """What a job raised that is none of ours, as it crosses from a worker."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(kind, text)
        self.kind = kind
        self.text = text

    def __str__(self) -> str:
        return f"{self.kind}: {self.text}" if self.text else self.kind


# ---- the schedule ----------------------------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class _Errand:
    """A job, and what has befallen it."""

    ticket: int
    job: Job
    memory: int
    due: float = 0.0
    """Not before."""
    alone: bool = False
    """Whether it is a suspect."""
    losses: int = 0
    retries: int = 0
    surprises: int = 0
    shunned: set[int] = field(default_factory=set)
    """Workers on which it failed."""


@dataclass(slots=True, eq=False)
class _Worker:
    number: int
    node: str = ""
    ready: bool = False
    hand: dict[int, _Errand] = field(default_factory=dict)
    done: int = 0
    idle_since: float = 0.0

    @property
    def holds_suspect(self) -> bool:
        return any(errand.alone for errand in self.hand.values())


class Schedule:
    """The state of a run on workers that come and go."""

    def __init__(
        self,
        agenda: Agenda,
        *,
        workers: int,
        memory: int,
        lanes: int = 1,
        window: int | None = None,
        start_seconds: float = START_SECONDS,
        needs: str = "",
        numbers: Iterator[int] | None = None,
    ) -> None:
        """`workers` are wanted; each does `lanes` jobs at once with `memory` bytes for each, and holds `window` (one
        more, so that none waits for the driver). `needs` says what a worker asks of a node, for errors;
        `numbers` are those of the workers, where another schedule has some of the same run."""
        self._agenda = agenda
        self._wanted = min(workers, agenda.num_left) or workers
        self._memory = memory
        self._lanes = lanes
        self._window = max(lanes, window or lanes + 1)
        self._start_seconds = start_seconds
        self._needs = needs
        self._lacking = Lacking("")
        self._happened: list[Happening] = []
        self._workers: dict[int, _Worker] = {}
        self._ahead: deque[Job] = deque()
        """Jobs that may start now: a look ahead, as many as there are workers."""
        self._waiting: list[_Errand] = []
        """Jobs that came back."""
        self._draining: frozenset[str] = frozenset()
        self._tickets = 0
        self._numbers = numbers or itertools.count(1)
        self._false_starts = 0
        self._spared: int | None = None
        """The worker that gets nothing new until a suspect can have it to itself."""
        self._manned: float | None = None
        """When some worker was last seen at work, or able to."""
        self._error: BaseException | None = None

    # ---------------------------------------------------------------- events

    def receive(self, event: Event, now: float) -> tuple[Outcome, ...]:
        """Take note of an event. Returns outcomes to be entered into the agenda before the next `decide`."""
        match event:
            case Ready(number, node):
                if (worker := self._workers.get(number)) is not None:
                    worker.ready, worker.node, worker.idle_since = True, node, now
                    self._false_starts = 0
                    text = f"worker {number} is ready on node {node}"
                    self._happened.append(Happening("worker-ready", text, {"worker": number, "node": node}))
            case Finished(number, outcomes):
                if (worker := self._workers.get(number)) is not None:
                    return self._finish(worker, outcomes, now)
            case Lost():
                if (worker := self._workers.pop(event.worker, None)) is not None:
                    self._lose(worker, event)
            case Unfit(_, error):
                self._fail(error)
            case Draining(nodes):
                for node in sorted(nodes - self._draining):
                    self._happened.append(Happening("node-draining", f"node {node} is about to go", {"node": node}))
                self._draining = nodes
            case Lacking():
                self._lacking = event
                if event.for_good:
                    self._fail(self._no_resources())
        return ()

    def happened(self) -> list[Happening]:
        """What people may want to know, since this was last asked."""
        happened, self._happened = self._happened, []
        return happened

    def _again(self, errand: _Errand, why: str, reason: str, worker: int | None = None) -> None:
        """A job goes back among those that wait."""
        self._waiting.append(errand)
        plan = self._agenda.plan_of(errand.job)
        self._happened.append(unit_again(errand.job, plan, why, reason=reason, worker=worker))

    def _fail(self, error: BaseException) -> None:
        self._error = self._error or error

    def _give_up(self, errand: _Errand, error: BaseException) -> None:
        """A job cannot be done: the end of the run, or of one merge of a bulk."""
        plan = self._agenda.plan_of(errand.job)
        self._happened.append(unit_failed(errand.job, plan, error))
        if not self._agenda.give_up(errand.job, error):
            self._fail(error)

    def _finish(
        self, worker: _Worker, outcomes: Iterable[tuple[int, Outcome]], now: float
    ) -> tuple[Outcome, ...]:  # fmt: skip
        good: list[Outcome] = []
        alone = len(worker.hand) == 1
        for ticket, outcome in outcomes:
            errand = worker.hand.pop(ticket, None)
            if errand is None:
                continue
            worker.done += 1
            if outcome.error is None:
                good.append(replace(outcome, job=errand.job))
            else:
                self._judge(errand, outcome.error, worker, now, alone=alone)
        if not worker.hand:
            worker.idle_since = now
        return tuple(good)

    def _judge(self, errand: _Errand, error: BaseException, worker: _Worker, now: float, *, alone: bool) -> None:
        """What a job's own error means for it. Its worker lives."""
        if ran_out_of_memory(error):
            self._starve(errand, str(error), alone=alone, worker=worker.number)
        elif isinstance(error, InfrastructureError):
            if errand.retries == len(PAUSES):
                self._give_up(errand, error)
                return
            errand.due = now + PAUSES[errand.retries]
            errand.retries += 1
            errand.shunned.add(worker.number)
            pause = PAUSES[errand.retries - 1]
            why = f"{error.problems[0].what}; tried again after {pause:.0f} s"
            self._again(errand, why, "unreachable", worker.number)
        elif isinstance(error, RaymergeError):
            self._give_up(errand, error)
        elif not errand.surprises:
            errand.surprises = 1
            errand.shunned.add(worker.number)
            self._again(errand, f"{type(error).__name__}: {error}", "unexpected", worker.number)
        else:
            self._give_up(errand, self._unit_failed(errand, error))

    def _lose(self, worker: _Worker, loss: Lost) -> None:
        excused = loss.kind == "preempted" or (worker.ready and worker.node in self._draining)
        self._happened.append(
            Happening(
                "worker-lost", f"worker {worker.number} is lost with {len(worker.hand)} jobs in hand: {loss.why}",
                {"worker": worker.number, "node": worker.node, "kind": loss.kind, "jobs": len(worker.hand)},
                warning=True,
            )
        )  # fmt: skip
        if not worker.ready:
            self._false_starts += not excused
            if self._false_starts >= MAX_LOSSES:
                self._fail(_workers_die(loss.why))
            return
        held = list(worker.hand.values())
        suspects = [errand for errand in held if errand.ticket not in loss.unsent]
        self._waiting += [errand for errand in held if errand.ticket in loss.unsent]
        for errand in suspects:
            if loss.kind == "out-of-memory":
                self._starve(errand, loss.why, alone=len(suspects) == 1, worker=worker.number)
            elif excused:
                self._again(errand, "its node went", "excused", worker.number)
            elif len(suspects) > 1:
                errand.alone = True
                self._again(errand, f"one of {len(suspects)} suspects, tried again alone", "suspected", worker.number)
            else:
                self._charge(errand, loss.why, worker.number)

    def _starve(self, errand: _Errand, why: str, *, alone: bool, worker: int) -> None:
        """Memory ran out: try with half of it; with the smallest blocks, by itself; then give up."""
        plan = self._agenda.plan_of(errand.job)
        if errand.memory > peak_bytes(plan):
            errand.memory = less_memory(errand.memory, plan)
        elif not alone:
            errand.alone = True
        else:
            self._give_up(errand, out_of_memory(errand.job, plan, why))
            return
        again = f"memory ran out: tried again {'alone with' if errand.alone else 'with'} {format_size(errand.memory)}"
        self._again(errand, again, "out-of-memory", worker)

    def _charge(self, errand: _Errand, why: str, worker: int) -> None:
        """A job took its worker down, and was alone with it."""
        units = errand.job.units
        if len(units) > 1:
            for half in (units[: len(units) // 2], units[len(units) // 2 :]):
                halved = self._errand(replace(errand.job, units=half), memory=errand.memory, alone=True)
                self._again(halved, "one half of a job that took a worker down", "charged", worker)
            return
        errand.losses += 1
        errand.alone = True
        if errand.losses < MAX_LOSSES:
            self._again(errand, f"charged with the loss of {errand.losses} workers", "charged", worker)
        else:
            self._give_up(errand, self._poison(errand, why))

    def _errand(self, job: Job, *, memory: int, alone: bool = False) -> _Errand:
        self._tickets += 1
        return _Errand(self._tickets, job, memory, alone=alone)

    # ---------------------------------------------------------------- decisions

    def decide(self, now: float) -> list[Decision]:
        """What to do now. Whatever `receive` returned must have been entered."""
        self._drop_unwanted()
        self._look_ahead()
        self._watch_the_start(now)
        if self._error is not None:
            return [Fail(self._error)]
        if self._agenda.finished:
            return []
        return [*self._hand_out(now), *self._start(), *self._retire(now)]

    def _drop_unwanted(self) -> None:
        """Let go of the jobs of merges that have failed since these were taken."""
        for job in [job for job in self._ahead if not self._agenda.wants(job)]:
            self._ahead.remove(job)
            self._agenda.put_back(job)
        for errand in [errand for errand in self._waiting if not self._agenda.wants(errand.job)]:
            self._waiting.remove(errand)
            self._agenda.put_back(errand.job)

    def _look_ahead(self) -> None:
        while len(self._ahead) <= len(self._workers) and (job := self._agenda.take()) is not None:
            self._ahead.append(job)

    def _watch_the_start(self, now: float) -> None:
        """Give up when no worker at all has been there for too long."""
        able = any(w.ready and (w.hand or w.node not in self._draining) for w in self._workers.values())
        if able or not self._workers or self._manned is None:
            self._manned = now
        elif now - self._manned > self._start_seconds:
            self._fail(self._no_resources())

    def _usable(self) -> list[_Worker]:
        return [w for w in self._workers.values() if w.ready and w.node not in self._draining]

    def _hand_out(self, now: float) -> list[Decision]:
        usable = self._usable()
        handed: list[Decision] = []
        for errand in [e for e in self._waiting if e.alone and e.due <= now]:
            idle = [w for w in usable if not w.hand]
            if not idle:
                break
            self._waiting.remove(errand)
            handed.append(self._hand(min(idle, key=lambda w: (w.number in errand.shunned, w.done)), errand))
        self._spare(usable, now)
        takers = [w for w in usable if w.number != self._spared and not w.holds_suspect]
        for errand in [e for e in self._waiting if not e.alone and e.due <= now]:
            known = {w.number for w in usable}
            others = [w for w in takers if w.number not in errand.shunned] if known - errand.shunned else takers
            if (worker := self._roomiest(others, self._window)) is not None:
                self._waiting.remove(errand)
                handed.append(self._hand(worker, errand))
        while self._ahead:
            # The last jobs are not piled up before a worker while others are about to start.
            starting = sum(not w.ready for w in self._workers.values())
            room = self._window if len(self._ahead) > starting else self._lanes
            worker = self._roomiest(takers, room)
            if worker is None:
                break
            handed.append(self._hand(worker, self._errand(self._ahead.popleft(), memory=self._memory)))
            self._look_ahead()
        return handed

    @staticmethod
    def _roomiest(workers: Iterable[_Worker], room: int) -> _Worker | None:
        """The worker with the least in hand, if it may hold one more."""
        worker = min(workers, key=lambda w: len(w.hand), default=None)
        return worker if worker is not None and len(worker.hand) < room else None

    def _hand(self, worker: _Worker, errand: _Errand) -> Hand:
        worker.hand[errand.ticket] = errand
        findings = self._agenda.findings(errand.job)
        return Hand(worker.number, errand.ticket, errand.job, errand.memory, findings)

    def _spare(self, usable: Sequence[_Worker], now: float) -> None:
        """While suspects wait, let one worker, the same until it is idle, finish what it has."""
        if not any(e.alone and e.due <= now for e in self._waiting):
            self._spared = None
            return
        busy = [w for w in usable if w.hand and not w.holds_suspect]
        if self._spared not in {w.number for w in busy}:
            fewest = min(busy, key=lambda w: len(w.hand), default=None)
            self._spared = None if fewest is None else fewest.number

    def _start(self) -> list[Decision]:
        """Replace who is missing, while there is more to do than those who are there can take."""
        if not self._ahead and not self._waiting:
            return []
        there = sum(not w.ready or w.node not in self._draining for w in self._workers.values())
        idle = sum(not w.hand for w in self._usable())
        decisions: list[Decision] = []
        if idle < len(self._ahead) + len(self._waiting):
            for _ in range(self._wanted - there):
                number = next(self._numbers)
                self._workers[number] = _Worker(number)
                decisions.append(Start(number))
        return decisions

    def _retire(self, now: float) -> list[Decision]:
        """Let go who is on a draining node, and at the tail who has nothing to do."""
        tail = self._agenda.at_tail and not self._ahead and not self._waiting
        gone = [
            worker.number
            for worker in self._workers.values()
            if not worker.hand
            and (
                (worker.ready and worker.node in self._draining)
                or (tail and (not worker.ready or now - worker.idle_since >= RETIRE_SECONDS))
            )
        ]
        for number in gone:
            del self._workers[number]
            self._happened.append(Happening("worker-retired", f"worker {number} is let go", {"worker": number}))
        return [Retire(number) for number in gone]

    # ---------------------------------------------------------------- errors

    def _poison(self, errand: _Errand, why: str) -> MergeFailedError:
        return MergeFailedError.of(
            "poison-unit", f"{MAX_LOSSES} workers died over one unit, each with nothing else to do",
            where=errand.job.describe(self._agenda.plan_of(errand.job)), why=why,
            fix="look at the workers' logs; if the kernel ended them for memory, use a smaller --memory",
        )  # fmt: skip

    def _unit_failed(self, errand: _Errand, error: BaseException) -> MergeFailedError:
        text = str(error) if isinstance(error, JobError) else f"{type(error).__name__}: {error}"
        return MergeFailedError.of(
            "unit-failed", f"a unit failed twice: {text}", where=errand.job.describe(self._agenda.plan_of(errand.job)),
            why="this is no error that raymerge knows of", fix="report this with the workers' logs",
        )  # fmt: skip

    def _no_resources(self) -> InfrastructureError:
        what = f"no worker started within {self._start_seconds:.0f} s"
        fix = self._lacking.fix or "use fewer --workers, add nodes, or wait"
        if self._lacking.for_good:
            what = "the cluster can never start a worker of this run"
            fix += "; to wait for nodes that you add by hand, set RAYMERGE_START_SECONDS"
        return InfrastructureError.of(
            "no-resources", what, where=self._needs, why=self._lacking.what or "the cluster has it, but not free",
            fix=fix,
        )  # fmt: skip


def _workers_die(why: str) -> InfrastructureError:
    return InfrastructureError.of(
        "workers-die", f"{MAX_LOSSES} workers in a row died before they could start", why=why,
        fix="look at the workers' logs",
    )  # fmt: skip
