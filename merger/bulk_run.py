"""Many merges on one pool of workers: `run_bulk`. Each is a merge like any other, with its own lease, journal and
output; what they share is the workers, and, in a sweep, the reading.

    BulkRun    an agenda (merger.run.Agenda): which job comes next, and what its outcome means for which merge
    course     a sweep under way: from its outputs being taken to their being published
    walk       a merge of several steps (merger/steps.py): one course after another, the others going on meanwhile

Members of a sweep that have the same done go on together. When a job of it fails for a reason that may be one
member's own (no number, a unit that takes workers down), the sweep is halved, until the guilty one is by itself; what
all have in common (a source that changed or cannot be reached) ends them all. Outputs are taken and published beside
the work, on threads.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from typing import Final, Protocol

from merger.api import default_memory, default_workers
from merger.bulk import BulkPlan, PlannedMerge
from merger.bulk_report import BulkListener, BulkProgress, BulkReport, MergeOutcome, State
from merger.clock import SpanLog
from merger.crew import Assignment, Crew, Job, Outcome, UnitFindings, check_gpu, limit_gpu, thread_bytes
from merger.documents import needed, plans_of
from merger.errors import (
    InfrastructureError,
    MergeFailedError,
    RaymergeError,
    RefusedError,
    SourceChangedError,
    StoppedError,
)
from merger.events import Event, Fact
from merger.gates import HiddenStates
from merger.manifest import parse_reference
from merger.output import to_seal
from merger.planning.devices import uses_gpu
from merger.planning.memory import peak_bytes
from merger.planning.nouns import MergePlan
from merger.receipts import Receipt
from merger.report import MergeReport
from merger.rota import Rota
from merger.run import Progress, Progression, Recorder, Stop, drive_here, settle
from merger.run_files import STOP_SIGNAL, is_asked_to_stop
from merger.session import Session
from merger.steps import Stretch, steps
from merger.storage.base import Sink
from merger.sweep import Sweep, join_sweep
from merger.unit import needs_torch, one_torch_thread
from merger.watch import Watch

VISIT_SECONDS: Final = 5.0
"""How often each output under way is told how far it is, and looked at for a request to stop."""
REMOTE_VISITS: Final = 6
"""Of the visits to a bucket, one in so many tells: a sweep has many outputs."""
OFFICE_THREADS: Final = 8
"""How many outputs are looked at, taken or published at once."""


class BulkExecutor(Protocol):
    """Something that works a bulk off: `run_bulk_here`, or cluster.run's on Ray."""

    def __call__(self, bulk: BulkRun, *, memory: int, workers: int, device: str, stop: Stop | None) -> None: ...


# ---- the agenda of a bulk --------------------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class _Walk:
    """A merge of several steps under way."""

    index: int
    steps: Generator[Stretch, None, MergeReport]
    going: Future[Stretch | MergeReport] | None = None
    """Its way to the next stretch, or to its end; None while a course is run."""

    def go_on(self, error: BaseException | None = None) -> Stretch | MergeReport:
        """To the next stretch, or to the end. Raises what the merge ends with; what befell a stretch is `error`."""
        try:
            return next(self.steps) if error is None else self.steps.throw(error)
        except StopIteration as ended:
            report: MergeReport = ended.value
            return report


@dataclass(slots=True, eq=False)
class _Course:
    """A sweep under way."""

    number: int
    run: str
    """What events know it by: the beginning of its plan's digest."""
    members: tuple[int, ...]
    sessions: tuple[Session, ...]
    sweep: Sweep
    progression: Progression
    sinks: Sequence[Sink]
    assignment: Assignment
    recorder: Recorder
    error: BaseException | None = None
    """What ends it; its jobs under way are waited for."""
    failed: dict[int, BaseException] = field(default_factory=dict)
    """Positions of members whose own journal failed."""
    publishing: list[Future[MergeReport]] = field(default_factory=list)
    progress: Progress | None = None
    walk: _Walk | None = None
    """The merge of several steps that this is one of."""

    @property
    def is_over(self) -> bool:
        """Whether it has no job any more to give."""
        return bool(self.publishing or self.failed) or self.error is not None or self.progression.finished

    def make_durable(self) -> None:
        """Enter what was recorded so far; what stands against it ends the course, unless something did before."""
        try:
            self.recorder.flush()
        except RaymergeError as error:
            self.error = self.error or error

    def flush(self, receipts: list[Receipt]) -> None:
        """Enter joint receipts into each member's journal; what one journal refuses is its merge's own failure."""
        split = [self.sweep.split(receipt) for receipt in receipts]
        for position, session in enumerate(self.sessions):
            if not isinstance(self.failed.get(position), StoppedError | None):
                continue  # one that was asked to stop keeps what is done
            try:
                session.record([each[position] for each in split])
            except RaymergeError as error:
                self.failed[position] = error


class BulkRun:
    """The merges of a bulk, as the agenda of one pool of workers."""

    def __init__(
        self,
        planned: BulkPlan,
        *,
        memory: int,
        threads: int,
        workers: int = 1,
        restart: bool = False,
        run_dir: str | None = None,
        max_failures: int | None = None,
        listener: BulkListener | None = None,
        hidden: HiddenStates | None = None,
        watch: Watch | None = None,
    ) -> None:
        """`memory` is shared by `threads`. The bulk ends early after `max_failures` merges that failed. `hidden` does
        the forward pass that gates of experts may need."""
        self.planned = planned
        self._memory = memory
        self._thread_memory = memory // threads
        self._hidden = hidden
        self.threads = threads
        self._workers = workers
        self._restart = restart
        self._run_dir = run_dir
        self._max_failures = 1 if planned.on_failure == "stop" else max_failures
        self._listener = listener
        self.watch = (watch or Watch()).also(self._enter_into_diaries)
        self.fingerprint: Mapping[str, str] | None = None
        """What decides bits on workers with GPUs: this process may have none."""
        self._started = time.monotonic()
        self.outcomes: dict[int, MergeOutcome] = {}
        for index, merge in enumerate(planned.merges):
            if merge.refused is not None:
                self._end(index, "refused", error=merge.refused)
        self._pending: deque[tuple[int, ...]] = deque(planned.sweeps)
        self._opening: dict[int, dict[int, Future[Session]]] = {}
        self._courses: dict[int, _Course] = {}
        self._walks: list[_Walk] = []
        self._over: list[int] = []
        self._numbers = itertools.count(1)
        self._rota = Rota()
        self._office = ThreadPoolExecutor(OFFICE_THREADS, "raymerge-outputs")
        self._resolving = threading.Lock()
        self._visited = time.monotonic()
        self._visits = 0
        self._visiting: dict[tuple[int, int], Future[bool]] = {}

    # ---------------------------------------------------------------- before and after

    def look(self) -> None:
        """Find out which merges are done already. They need no worker."""
        indexes = [index for sweep in self._pending for index in sweep]
        futures = {index: self._office.submit(self._look_at, self.planned.merges[index]) for index in indexes}
        for index, future in futures.items():
            error = future.exception()
            if error is not None:
                self._end(index, "failed", error=error)
            elif (report := future.result()) is not None:
                self._end(index, "already done", report=report)
        left = (tuple(i for i in sweep if i not in self.outcomes) for sweep in self._pending)
        self._pending = deque(sweep for sweep in left if sweep)

    def _look_at(self, merge: PlannedMerge) -> MergeReport | None:
        assert merge.plan is not None
        session = Session.open(merge.plan, restart=self._restart, run_dir=self._run_dir)
        if session.done is None or needed(session.planned, result=False):
            return None
        return session.conclude_done()

    def plans(self) -> Iterable[MergePlan]:
        """Of the merges that are still to be run, and of the documents that they read."""
        return (one for sweep in self._pending for index in sweep for one in plans_of(self._plan(index)).values())

    def representative(self) -> MergePlan:
        """A plan without places that has the arithmetic of all that are still to be run."""
        plans = list(self.plans())
        chosen = next((plan for plan in plans if needs_torch(plan)), plans[0])
        return replace(chosen, sources=(), outputs=(), manifest={}, gates=None, before=())

    def close(self, reason: BaseException | None) -> None:
        """End: what is under way is given back, and can be resumed."""
        wait(self._visiting.values())
        for futures in self._opening.values():
            for index, future in futures.items():
                if future.exception() is None:
                    with contextlib.suppress(RaymergeError):  # a lease that is not taken back goes stale
                        _let_go(future.result(), reason)
                self._end(index, "stopped", error=reason)
        for walk in list(self._walks):
            self._cut_short(walk, reason)
        for course in list(self._courses.values()):
            if course.publishing:
                for position in range(len(course.members)):
                    self._enter_published(course, position)
                continue
            course.make_durable()
            self._give_back(course, {p: course.failed.get(p, reason) for p in range(len(course.members))})
        self._courses.clear()
        for sweep in self._pending:
            for index in sweep:
                self._end(index, "not run")
        self._office.shutdown()

    def report(self, stopped: StoppedError | None = None) -> BulkReport:
        merges = tuple(self.outcomes[index] for index in range(len(self.planned.merges)))
        return BulkReport(merges=merges, seconds=time.monotonic() - self._started, stopped=stopped)

    def _end(
        self, index: int, state: State, *, report: MergeReport | None = None, error: BaseException | None = None
    ) -> None:
        merge = self.planned.merges[index]
        path = report.path if report is not None else merge.path
        if index not in self.outcomes:
            self.outcomes[index] = MergeOutcome(label=merge.label, state=state, path=path, report=report, error=error)
            text = f"{merge.label}: {state}" + (f": {error}" if error is not None else "")
            self.watch.event(Event("merge-ended", text, {"merge": merge.label, "state": state}))

    # ---------------------------------------------------------------- the agenda

    @property
    def finished(self) -> bool:
        return not (self._pending or self._opening or self._courses or self._walks)

    @property
    def num_left(self) -> int:
        return self._rota.num_left + sum(len(self._plan(sweep[0]).units) for sweep in self._pending)

    @property
    def at_tail(self) -> bool:
        return not (self._pending or self._opening or self._walks) and self._rota.at_tail

    def take(self) -> Job | None:
        return self._rota.take()

    def put_back(self, job: Job) -> None:
        self._rota.put_back(job)

    def findings(self, job: Job) -> list[UnitFindings]:
        return self._rota.findings(job)

    def wants(self, job: Job) -> bool:
        return self._rota.wants(job)

    def plan_of(self, job: Job) -> MergePlan:
        return self._courses[job.run].sweep.plan

    def assignment(self, run: int) -> Assignment:
        return self._courses[run].assignment

    def ended(self) -> Iterable[int]:
        over, self._over = self._over, []
        return over

    def give_up(self, job: Job, error: BaseException) -> bool:
        """The job's sweep ends here; the others go on."""
        self._rota.returned(job)
        course = self._courses.get(job.run)
        if course is not None and course.error is None:
            course.error = error
            self._rota.abandon(job.run)
        return True

    def enter(self, outcome: Outcome) -> None:
        """A job went well."""
        job = outcome.job
        self._rota.returned(job)
        course = self._courses.get(job.run)
        if course is None or course.error is not None:
            return
        try:
            settle(outcome, course.progression, course.sinks, course.recorder)
        except RaymergeError as error:
            self.give_up(job, error)

    def tick(self) -> None:
        """Go on with whatever waits for something else than a job."""
        self._take_over()
        self._visit_outputs()
        for course in list(self._courses.values()):
            self._look_after(course)
        self._halt_after_failures()
        while self._pending and self._num_active < self.planned.max_active_merges:
            self._open(self._pending.popleft())
        if self._listener is not None:
            self._listener(self._progress())

    @property
    def _num_active(self) -> int:
        """Sweeps under way. A walk counts from its beginning to its end, whichever step it is at."""
        return len(self._opening) + len(self._walks) + sum(course.walk is None for course in self._courses.values())

    def _enter_into_diaries(self, event: Event) -> None:
        """What happened to one run goes into the diaries of its merges, what happened to workers into all."""
        if event.kind == "merge-ended":
            return
        run = event.facts.get("run")
        for course in self._courses.values():
            if run in (None, course.run) and not course.publishing:
                for session in course.sessions:
                    session.diary.announce(event)

    def _visit_outputs(self) -> None:
        """Say now and then at each output how far it is, and see whether its merge was asked to stop: it ends alone."""
        for (number, position), future in [item for item in self._visiting.items() if item[1].done()]:
            del self._visiting[number, position]
            course = self._courses.get(number)
            if course is not None and future.exception() is None and future.result():
                error = StoppedError.of(
                    "stopped", "this merge was asked to stop; what is done is kept",
                    fix="run the bulk again: it resumes",
                )  # fmt: skip
                error.signal_number = STOP_SIGNAL
                course.failed.setdefault(position, error)
        if self._visiting or time.monotonic() - self._visited < VISIT_SECONDS:
            return
        self._visited = time.monotonic()
        for course in self._courses.values():
            for position, session in enumerate(course.sessions):
                if not course.is_over:
                    tells = not session.destinations[0].state.remote or self._visits % REMOTE_VISITS == 0
                    visit = self._office.submit(_visit, session, len(course.sessions), tells=tells)
                    self._visiting[course.number, position] = visit
        self._visits += 1

    def _halt_after_failures(self) -> None:
        failed = sum(outcome.state in ("failed", "refused") for outcome in self.outcomes.values())
        if self._max_failures is not None and failed >= self._max_failures:
            for sweep in self._pending:
                for index in sweep:
                    self._end(index, "not run")
            self._pending.clear()

    def _progress(self) -> BulkProgress:
        ended = list(self.outcomes.values())
        reports = [outcome.report for outcome in ended if outcome.report is not None]
        running = [course.progress for course in self._courses.values() if course.progress is not None]
        return BulkProgress(
            len(ended), len(self.planned.merges), sum(outcome.error is not None for outcome in ended),
            sum(len(course.members) for course in self._courses.values()),
            sum(r.bytes_read for r in reports) + sum(p.bytes_read for p in running),
            sum(r.bytes_written for r in reports) + sum(p.bytes_written for p in running),
            time.monotonic() - self._started,
        )  # fmt: skip

    def _plan(self, index: int) -> MergePlan:
        plan = self.planned.merges[index].plan
        assert plan is not None
        return plan

    # ---------------------------------------------------------------- beginnings

    def _open(self, members: tuple[int, ...]) -> None:
        if self._plan(members[0]).takes_steps:
            (index,) = members
            walk = _Walk(
                index,
                steps(
                    self._plan(index), restart=self._restart, run_dir=self._run_dir, memory=self._memory,
                    threads=self.threads, workers=f"{self._workers}", hidden=self._hidden,
                    fingerprint=lambda: self.fingerprint,
                ),
            )  # fmt: skip
            self._walks.append(walk)
            walk.going = self._office.submit(walk.go_on)
            return
        self._opening[next(self._numbers)] = {index: self._office.submit(self._start, index) for index in members}

    def _start(self, index: int) -> Session:
        """Take a merge's output. Raises what stands against it."""
        session = Session.open(self._plan(index), restart=self._restart, run_dir=self._run_dir)
        if session.done is not None:
            session.conclude_done()
            return session
        session.check(thread_bytes(session.planned, session.sinks, memory=self._thread_memory, threads=1))
        with self._resolving:  # members of a sweep read one store: the first finds out for all
            session.resolve()
        session.start()
        return session

    def _take_over(self) -> None:
        """Begin the courses of sweeps whose outputs are all taken, or refused, and the next ones of walks."""
        for walk in [walk for walk in self._walks if walk.going is not None and walk.going.done()]:
            self._walk_on(walk)
        for number, futures in list(self._opening.items()):
            if not all(future.done() for future in futures.values()):
                continue
            del self._opening[number]
            alike: dict[frozenset[int], list[tuple[int, Session]]] = {}
            for index, future in futures.items():
                error = future.exception()
                if error is not None:
                    self._end(index, "failed", error=error)
                    continue
                session = future.result()
                if session.done is not None:
                    self._end(index, "already done", report=session.done)
                    continue
                alike.setdefault(frozenset(session.receipts), []).append((index, session))
            for members in alike.values():
                self._begin(members)

    def _begin(self, members: Sequence[tuple[int, Session]]) -> None:
        """Begin one course, or several where they cannot be one or would not fit into memory."""
        sweep = join_sweep([session.planned for _, session in members])
        sinks = [sink for _, session in members for sink in session.sinks]
        share = 0 if sweep is None else thread_bytes(sweep.plan, sinks, memory=self._thread_memory, threads=1)
        if sweep is None or (len(members) > 1 and share < peak_bytes(sweep.plan)):
            half = len(members) // 2
            self._begin(members[:half])
            self._begin(members[half:])
            return
        sessions = tuple(session for _, session in members)
        units = sorted(sessions[0].receipts)
        known = [sweep.join([session.receipts[unit] for session in sessions]) for unit in units]
        batch = max(sink.batch_bytes for sink in sinks)
        progression = Progression(sweep.plan, known, to_seal(sweep.plan, sinks), batch_bytes=batch)
        self._add(tuple(index for index, _ in members), sessions, sweep, progression, sinks, max(1, share))

    def _add(
        self, members: tuple[int, ...], sessions: tuple[Session, ...], sweep: Sweep, progression: Progression,
        sinks: Sequence[Sink], share: int, walk: _Walk | None = None,
        record: Callable[[list[Receipt]], None] | None = None,
    ) -> None:  # fmt: skip
        """Begin a course. `record` makes its receipts durable; default: each in its member's journal."""
        number = next(self._numbers)

        def note(progress: Progress) -> None:
            course.progress = progress
            for told in diaries:
                told(progress)

        def flush(receipts: list[Receipt]) -> None:
            (record or course.flush)(receipts)

        diaries = [session.diary.listen() for session in sessions]
        run = sweep.plan.identity[:12]
        aside = len(members) > 1 or sessions[0].destinations[0].state.remote
        course = _Course(
            number, run, members, sessions, sweep, progression, sinks, Assignment(sweep.plan, sinks, share),
            Recorder(progression, flush, note, aside=aside, watch=replace(self.watch, run=run)), walk=walk,
        )  # fmt: skip
        self._courses[number] = course
        self._say_begun(course)
        self._rota.add(number, progression, max(self.planned.merges[index].share for index in members))

    def _say_begun(self, course: _Course) -> None:
        plan, labels = course.sweep.plan, [self.planned.merges[index].label for index in course.members]
        facts: dict[str, Fact] = {"run": course.run, "merge": labels[0], "units": len(plan.units)}
        more = f" and {len(labels) - 1} more" if len(labels) > 1 else ""
        begun = f"{labels[0]}{more}: {len(plan.units)} units in {plan.num_stages} stages"
        self.watch.event(Event("run-begun", begun, facts))
        if course.progression.receipts:
            kept = len(course.progression.receipts)
            self.watch.event(Event("resumed", f"{kept} units are kept of an earlier run", {**facts, "units": kept}))

    # ---------------------------------------------------------------- walks

    def _walk_on(self, walk: _Walk) -> None:
        """A walk has come to its next stretch, or to its end."""
        assert walk.going is not None
        done, walk.going = walk.going, None
        error = done.exception()
        if error is not None:
            self._walks.remove(walk)
            self._end_walk(walk, error)
        elif isinstance(found := done.result(), Stretch):
            sinks = list(found.sinks)
            share = thread_bytes(found.plan, sinks, memory=self._thread_memory, threads=1)
            sweep = Sweep(found.plan, (found.plan,))
            self._add(
                (walk.index,), (found.session,), sweep, found.progression, sinks, max(1, share), walk, found.record
            )  # fmt: skip
        else:
            self._walks.remove(walk)
            self._end(walk.index, "already done" if found.already_done else "done", report=found)

    def _step_ended(self, course: _Course, walk: _Walk) -> None:
        """A stretch is done, or cannot be; either way the walk itself knows what comes next."""
        error = course.error or course.failed.get(0)
        try:
            course.recorder.flush()
        except RaymergeError as failed:
            error = error or failed
        del self._courses[course.number]
        walk.going = self._office.submit(walk.go_on, error)

    def _end_walk(self, walk: _Walk, error: BaseException) -> None:
        self._end(walk.index, "stopped" if isinstance(error, StoppedError) else "failed", error=error)

    def _cut_short(self, walk: _Walk, reason: BaseException | None) -> None:
        """The bulk ends while this merge is under way: what is done is durable, and its outputs are given back."""
        for course in [course for course in self._courses.values() if course.walk is walk]:
            del self._courses[course.number]
            with contextlib.suppress(RaymergeError):  # the walk's end is what counts
                course.recorder.flush()
        try:
            found = None if walk.going is None else walk.going.result()
        except BaseException as error:  # noqa: BLE001 - it becomes what is said of the merge
            self._end_walk(walk, error)
            return
        if isinstance(found, MergeReport):  # its last step was just done
            self._end(walk.index, "done", report=found)
            return
        with contextlib.suppress(BaseException):  # the reason itself, after what was taken is given back
            walk.go_on(reason or GeneratorExit())
        self._end(walk.index, "stopped", error=reason)

    # ---------------------------------------------------------------- ends

    def _look_after(self, course: _Course) -> None:
        if course.publishing:
            if all(future.done() for future in course.publishing):
                for position in range(len(course.members)):
                    self._enter_published(course, position)
                del self._courses[course.number]
            return
        if course.error is None:
            try:
                course.recorder.tick()
            except RaymergeError as error:
                course.error = error
        if not course.is_over:
            return
        if course.error is not None or course.failed:
            self._rota.abandon(course.number)
        if not self._rota.is_idle(course.number) or any(number == course.number for number, _ in self._visiting):
            return
        self._rota.remove(course.number)
        self._over.append(course.number)
        if course.walk is not None:
            self._step_ended(course, course.walk)
        elif course.error is None and not course.failed:
            self._publish(course)
        else:
            del self._courses[course.number]
            self._fail(course)

    def _publish(self, course: _Course) -> None:
        course.make_durable()
        if course.error is not None or course.failed:
            del self._courses[course.number]
            self._fail(course)
            return
        workers = f"{self._workers}"
        course.publishing = [
            self._office.submit(
                session.finish, workers=workers,
                fingerprint=self.fingerprint if uses_gpu(session.planned) else None,
            )
            for session in course.sessions
        ]  # fmt: skip

    def _enter_published(self, course: _Course, position: int) -> None:
        index, future = course.members[position], course.publishing[position]
        error = future.exception()
        if error is None:
            self._end(index, "done", report=future.result())
        else:
            self._end(index, "failed", error=error)

    def _fail(self, course: _Course) -> None:
        """End who is to blame; who is not, or not known to be, tries again with what is done."""
        course.make_durable()
        ends: dict[int, BaseException | None] = dict(course.failed)
        positions = [p for p in range(len(course.members)) if p not in ends]
        if course.error is not None and (len(positions) == 1 or isinstance(course.error, _COMMON)):
            ends |= {position: _after_the_start(course.error) for position in positions}
        self._give_back(course, ends)
        positions = [p for p in positions if course.members[p] not in self.outcomes]
        if course.error is None:
            self._again(course, positions)
        else:
            half = len(positions) // 2
            self._again(course, positions[half:])
            self._again(course, positions[:half])

    def _again(self, course: _Course, positions: Sequence[int]) -> None:
        if positions:
            self._pending.appendleft(tuple(course.members[position] for position in positions))

    def _give_back(self, course: _Course, ends: Mapping[int, BaseException | None]) -> None:
        """The leases are free. Members that end here say why at their outputs. One of which nothing is done is left as
        it was found where its merge is refused."""
        for position, session in enumerate(course.sessions):
            error, index = ends.get(position), course.members[position]
            try:
                if isinstance(course.error, RefusedError) and not session.receipts:
                    session.refuse()
                _let_go(session, error, ends=position in ends)
            except RaymergeError as failed:
                error = failed if error is None else error
                ends = {**ends, position: error}
            if position in ends:
                self._end(index, "stopped" if isinstance(error, StoppedError) else "failed", error=error)


def _let_go(session: Session, error: BaseException | None, *, ends: bool = True) -> None:
    """Give an output back. One whose merge `ends` here says so first, while it is this run's."""
    if ends and not session.refused and session.done is None:
        session.diary.end(error, stopped=error is None or isinstance(error, StoppedError))
    session.close()


def _visit(session: Session, together: int, *, tells: bool) -> bool:
    """Say at an output how far its merge is, one of so many `together`. Returns whether it is asked to stop."""
    if tells:
        session.diary.go_on(**({"together": together} if together > 1 else {}))
    return is_asked_to_stop(session.destinations[0].state, session.epoch)


_COMMON: Final = (RefusedError, SourceChangedError, InfrastructureError)
"""Errors that are no single member's own."""


def _after_the_start(error: BaseException) -> BaseException:
    return MergeFailedError(error.problems) if isinstance(error, RefusedError) else error


# ---- running --------------------------------------------------------------------------------------------------------


def run_bulk_here(
    bulk: BulkRun, *, memory: int, workers: int, device: str = "cpu", stop: Stop | None = None,
    device_memory: int | None = None,
) -> None:  # fmt: skip
    """Work a bulk off on threads of this process, which share `device_memory` bytes of a GPU.

    Raises PlanError(code `device-memory`) where that is too little for one of the merges.
    """
    del workers
    threads = bulk.threads
    if device == "cuda" and any(uses_gpu(plan) for plan in bulk.plans()):
        each = limit_gpu(bulk.representative(), device_memory=device_memory, threads=threads)
        for plan in bulk.plans():
            check_gpu(plan, each)
    with one_torch_thread(bulk.representative()):
        crew = Crew(threads=threads, device=device, spans=SpanLog() if bulk.watch.draws else None)
        try:
            drive_here(
                bulk, crew, threads=threads, memory=max(1, memory // threads), enter=bulk.enter, tick=bulk.tick,
                stop=stop, watch=bulk.watch,
            )  # fmt: skip
        finally:
            crew.close()


def bulk_lanes(planned: BulkPlan) -> int:
    """Jobs that a worker has under way at once: two where any bytes cross a network."""
    outputs = any(parse_reference(m.path, bare="local").kind in ("s3", "hub") for m in planned.merges if m.path)
    sources = any(s.catalog.store.remote for plan in planned.every_plan() for s in plan.sources)
    return 2 if outputs or sources else 1


def run_bulk(
    planned: BulkPlan,
    *,
    workers: int | None = None,
    memory: int | None = None,
    restart: bool = False,
    run_dir: str | None = None,
    max_failures: int | None = None,
    executor: BulkExecutor | None = None,
    listener: BulkListener | None = None,
    stop: Stop | None = None,
    device: str = "cpu",
    hidden: HiddenStates | None = None,
    watch: Watch | None = None,
) -> BulkReport:
    """Run every merge of a bulk that is not done already, and publish each as it ends.

    What becomes of a merge is in the report, also when it fails and when a stop cuts the bulk short. Raises
    InfrastructureError, PlanError and the like only where the workers themselves fail.
    """
    memory = memory or default_memory()
    if workers is None:
        workers = min((default_workers(plan, memory) for plan in planned.every_plan()), default=1)
    bulk = BulkRun(
        planned, memory=memory, threads=workers * bulk_lanes(planned), workers=workers, restart=restart,
        run_dir=run_dir, max_failures=max_failures, listener=listener, hidden=hidden, watch=watch,
    )  # fmt: skip
    reason: BaseException | None = None
    try:
        bulk.look()
        if not bulk.finished:
            (executor or run_bulk_here)(bulk, memory=memory, workers=workers, device=device, stop=stop)
    except StoppedError as error:
        reason = error
    except BaseException as error:
        reason = error
        raise
    finally:
        bulk.close(reason)
    return bulk.report(reason if isinstance(reason, StoppedError) else None)
