"""The plain loop: a plan, in this process, on a few threads. Also what every other loop shares: `Progression`.

Nothing here decides a byte. Threads only change which unit comes when.
"""

from __future__ import annotations

import bisect
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Protocol

from merger.clock import SpanLog
from merger.crew import Assignment, Crew, Job, Outcome, UnitFindings, lanes, limit_gpu, ran_out_of_memory, thread_bytes
from merger.errors import InfrastructureError, RaymergeError, StoppedError
from merger.events import Event, Fact
from merger.ledger import Ledger
from merger.planning.devices import Device, device_of, uses_gpu
from merger.planning.memory import peak_bytes
from merger.planning.nouns import MergePlan, Unit
from merger.planning.parts import file_layouts
from merger.planning.settle import measured_results
from merger.receipts import Receipt
from merger.storage.base import Sink
from merger.tensors import format_size
from merger.unit import one_torch_thread
from merger.watch import Watch

FLUSH_SECONDS = 1.0
WAIT_SECONDS = 0.2
"""How long the loop waits for a job to end before it looks around."""
IDLE_SECONDS = 0.02
"""The same while none is under way."""
BATCHES = 64
"""Jobs that a stage's small units make at least: enough for many workers to share."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is."""

    units_done: int
    units: int
    stage: int
    stages: int
    bytes_read: int
    bytes_written: int
    seconds: float


class ProgressListener(Protocol):
    def __call__(self, progress: Progress, /) -> None: ...


class Stop:
    """A request to stop, set by a signal handler and looked at between units."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self.signal_number = 2

    def set(self, signal_number: int) -> None:
        self.signal_number = signal_number
        self._event.set()

    @property
    def requested(self) -> bool:
        return self._event.is_set()

    def check(self) -> None:
        """Raise StoppedError when a stop was asked for."""
        if self._event.is_set():
            error = StoppedError.of(
                "stopped", "the run was stopped; what is done is kept", fix="run the same command again: it resumes"
            )
            error.signal_number = self.signal_number
            raise error


class Agenda(Protocol):
    """What a loop works off: the jobs of one plan (`Progression`), or of many (merger/bulk.py)."""

    @property
    def finished(self) -> bool:
        """Whether nothing is left, not even what waits for jobs under way."""
        ...

    @property
    def num_left(self) -> int:
        """Units that are not done, about."""
        ...

    @property
    def at_tail(self) -> bool:
        """Whether nothing comes after the jobs that can be taken now."""
        ...

    def take(self) -> Job | None: ...
    def put_back(self, job: Job) -> None: ...
    def findings(self, job: Job) -> list[UnitFindings]: ...

    def assignment(self, run: int) -> Assignment:
        """What a crew must know before it can do jobs of a run."""
        ...

    def ended(self) -> Iterable[int]:
        """Runs of which no more jobs come, since this was last asked."""
        ...

    def plan_of(self, job: Job) -> MergePlan: ...

    def wants(self, job: Job) -> bool:
        """Whether a job that was taken still has to be done."""
        ...

    def give_up(self, job: Job, error: BaseException) -> bool:
        """A job cannot be done. Returns whether the rest goes on without it; where not, the error ends the run."""
        ...


class Progression:
    """Which job may start now. Pure: no threads, no clock, no IO.

    `sealing` names the files (output, file) that some worker has to seal once all their bytes are written.
    `batch_bytes`: units that write less are done several at once, neighbours in their file together.
    """

    def __init__(
        self,
        plan: MergePlan,
        done: Iterable[Receipt] = (),
        sealing: Iterable[tuple[int, str]] = (),
        *,
        batch_bytes: int = 0,
    ) -> None:
        self.plan = plan
        self._batch_bytes = batch_bytes
        self._parts = {
            (output, file.name): file.parts
            for output in range(len(plan.outputs) if batch_bytes else 0)
            for file in file_layouts(plan, output)
        }
        self.units = plan.units
        self.ledger = Ledger(plan, self.units)
        self.receipts: dict[int, Receipt] = {}
        self.stage = 0
        self._open: set[int] = set()
        self._ready: deque[Job] = deque()
        self._ready_for_gpus: deque[Job] = deque()
        self._unsealed = set(sealing)
        self._seals: deque[tuple[int, str]] = deque()
        self._unwritten = self._count_writers()
        for receipt in done:
            if 0 <= receipt.unit < len(self.units) and receipt.unit not in self.receipts:
                self._keep(receipt)
        for file in sorted(self._unsealed):
            if not self._unwritten.get(file):
                self._seals.append(file)
        self._enter_stage()

    def _count_writers(self) -> dict[tuple[int, str], int]:
        """How many units write into each file that is to be sealed."""
        counts: dict[tuple[int, str], int] = {}
        if self._unsealed:
            for unit in self.units:
                for file in self._files_of(unit):
                    counts[file] = counts.get(file, 0) + 1
        return counts

    def _files_of(self, unit: Unit) -> set[tuple[int, str]]:
        if unit.round is not None:
            return set()
        return {(p.output, p.file) for result in self.plan.tasks[unit.task].results for p in result.places}

    def _keep(self, receipt: Receipt) -> None:
        if receipt.statistics:
            self.ledger.add(receipt)
            receipt = replace(receipt, statistics=())
        self.receipts[receipt.unit] = receipt
        for file in self._files_of(self.units[receipt.unit]) & self._unwritten.keys():
            self._unwritten[file] -= 1

    def _enter_stage(self) -> None:
        while self.stage < self.plan.num_stages:
            waiting = [u for u in self.units if u.stage == self.stage and u.index not in self.receipts]
            if waiting:
                self._ready = deque(self._jobs([u for u in waiting if self.device_of(u) == "cpu"]))
                self._ready_for_gpus = deque(self._jobs([u for u in waiting if self.device_of(u) == "cuda"]))
                self._open = {u.index for u in waiting}
                return
            self.ledger.close_stage(self.stage)
            self.stage += 1

    def _jobs(self, units: list[Unit]) -> Iterator[Job]:
        """What may end the merge, then the largest, so that the last worker is not left alone with the largest unit;
        then small ones in batches, a stage in BATCHES or more."""
        sizes = {u.index: self._written_bytes(u) for u in units if u.round is None}
        limit = min(self._batch_bytes, sum(sizes.values()) // BATCHES)
        checks = [u for u in units if not self.plan.tasks[u.task].results[0].store.writes]
        units = [u for u in units if self.plan.tasks[u.task].results[0].store.writes]
        large = [u for u in units if sizes.get(u.index, limit) >= limit]
        for unit in (*checks, *sorted(large, key=lambda u: (-self._elements(u), u.index))):
            yield Job((unit,))
        batch: list[Unit] = []
        size, last = 0, None
        for unit in sorted((u for u in units if sizes.get(u.index, limit) < limit), key=self._first_place):
            # A part that one job writes whole goes up at once; one that several share has to be joined from pieces.
            part = self._part_of(unit)
            if batch and part != last and size + sizes[unit.index] > limit:
                yield Job(tuple(batch))
                batch, size = [], 0
            last = part
            batch.append(unit)
            size += sizes[unit.index]
        if batch:
            yield Job(tuple(batch))

    def _part_of(self, unit: Unit) -> tuple[int, str, int]:
        """The part of its file in which a unit begins to write."""
        output, file, start = self._first_place(unit)
        return output, file, bisect.bisect_right(self._parts.get((output, file), (0,)), start)

    def _elements(self, unit: Unit) -> int:
        return (unit.last - unit.first) * self.plan.tasks[unit.task].cols

    @property
    def finished(self) -> bool:
        return self.stage >= self.plan.num_stages and not self._unsealed

    @property
    def num_left(self) -> int:
        return len(self.units) - len(self.receipts)

    @property
    def at_tail(self) -> bool:
        return self.stage >= self.plan.num_stages - 1

    def assignment(self, run: int) -> Assignment:
        """A crew for one plan knows it from the start."""
        raise KeyError(run)

    def ended(self) -> Iterable[int]:
        return ()

    def plan_of(self, job: Job) -> MergePlan:
        del job
        return self.plan

    def wants(self, job: Job) -> bool:
        del job
        return True

    def give_up(self, job: Job, error: BaseException) -> bool:
        """One plan has one end."""
        del job, error
        return False

    def take(self, device: Device | None = None) -> Job | None:
        """A file to seal or units to start, or None while the stage's last ones are under way. With `device`, only of
        that kind; files are sealed by CPUs."""
        if self._seals and device != "cuda":
            return Job(seal=self._seals.popleft())
        if self._ready_for_gpus and device != "cpu":
            return self._ready_for_gpus.popleft()
        return self._ready.popleft() if self._ready and device != "cuda" else None

    def device_of(self, unit: Unit) -> Device:
        """The kind of device that does a unit."""
        return "cpu" if self.plan.device == "cpu" else device_of(self.plan, self.plan.tasks[unit.task])

    def put_back(self, job: Job) -> None:
        """Its worker is gone: what is not done of it will be taken again, next."""
        if job.seal is not None:
            self._seals.appendleft(job.seal)
        if units := tuple(unit for unit in job.units if unit.index in self._open):
            (self._ready if self.device_of(units[0]) == "cpu" else self._ready_for_gpus).appendleft(Job(units))

    def _written_bytes(self, unit: Unit) -> int:
        return sum(
            end - start
            for result in self.plan.tasks[unit.task].results
            for place in result.places
            for start, end in [place.span(unit.first, unit.last)]
        )

    def _first_place(self, unit: Unit) -> tuple[int, str, int]:
        place = self.plan.tasks[unit.task].results[0].places[0]
        return place.output, place.file, place.span(unit.first, unit.last)[0]

    def findings(self, job: Job) -> list[UnitFindings]:
        """What earlier stages found, for each unit of a job."""
        return [self.ledger.findings(unit) for unit in job.units]

    def complete(self, receipt: Receipt) -> None:
        """A unit is done. A second receipt for it changes nothing."""
        if receipt.unit not in self._open:
            return
        self._keep(receipt)
        for file in self._files_of(self.units[receipt.unit]) & self._unsealed:
            if self._unwritten[file] == 0:
                self._seals.append(file)
        self._open.discard(receipt.unit)
        if not self._open:
            self.ledger.close_stage(self.stage)
            self.stage += 1
            self._enter_stage()

    def complete_seal(self, file: tuple[int, str]) -> None:
        """A file is sealed."""
        self._unsealed.discard(file)


class Part:
    """The jobs of one kind of device, as the agenda of the workers that do these. It ends with the whole."""

    def __init__(self, whole: Progression, device: Device) -> None:
        self._whole = whole
        self._device = device
        self._units = [unit.index for unit in whole.units if whole.device_of(unit) == device]

    @property
    def finished(self) -> bool:
        return self._whole.finished

    @property
    def num_left(self) -> int:
        return sum(index not in self._whole.receipts for index in self._units)

    @property
    def at_tail(self) -> bool:
        return self._whole.at_tail

    def take(self) -> Job | None:
        return self._whole.take(self._device)

    def put_back(self, job: Job) -> None:
        self._whole.put_back(job)

    def findings(self, job: Job) -> list[UnitFindings]:
        return self._whole.findings(job)

    def assignment(self, run: int) -> Assignment:
        return self._whole.assignment(run)

    def ended(self) -> Iterable[int]:
        return self._whole.ended()

    def plan_of(self, job: Job) -> MergePlan:
        return self._whole.plan_of(job)

    def wants(self, job: Job) -> bool:
        return self._whole.wants(job)

    def give_up(self, job: Job, error: BaseException) -> bool:
        return self._whole.give_up(job, error)


def ranks_found(plan: MergePlan, progression: Progression) -> dict[tuple[int, int], int]:
    """The ranks of a plan, by what the run of its `measuring` plan found."""
    found = [
        int(rank[0]) for unit in progression.units if unit.round is None for rank in progression.ledger.kept(unit.index)
    ]
    return dict(zip(measured_results(plan), found, strict=True))


class Recorder:
    """Collects receipts, flushes them to the journal every second, and tells how far the run is.

    With `aside`, where a flush is a journey to an object store, it goes on beside the work, one at a time and in order.
    """

    def __init__(
        self,
        progression: Progression,
        flush: Callable[[list[Receipt]], None],
        listener: ProgressListener | None,
        *,
        aside: bool = False,
        watch: Watch | None = None,
    ) -> None:
        self.watch = watch or Watch()
        self.fingerprint: Mapping[str, str] | None = None
        """What decided bits on workers with GPUs: this process may have none."""
        self._progression = progression
        self._flush = flush
        self._listener = listener
        self._pending: list[Receipt] = []
        self._started = self._flushed = time.monotonic()
        self._read = self._written = 0
        self._thread = ThreadPoolExecutor(1, "raymerge-journal") if aside else None
        self._under_way: Future[None] | None = None

    def record(self, receipt: Receipt) -> None:
        before = self._progression.stage
        self._progression.complete(receipt)
        if self._progression.stage != before:
            stages = self._progression.plan.num_stages
            self.watch.event(
                Event("stage-done", f"stage {before + 1} of {stages} is done", {"stage": before + 1, "stages": stages})
            )
        self._pending.append(receipt)
        self._read += receipt.read_bytes
        self._written += sum(e.end - e.start for e in receipt.extents)
        self.tick()

    def tick(self) -> None:
        """Raises what the last flush raised."""
        now = time.monotonic()
        if self._under_way is not None and self._under_way.done():
            self._settle()
        if now - self._flushed >= FLUSH_SECONDS and self._under_way is None and self._pending:
            pending, self._pending = self._pending, []
            if self._thread is None:
                self._flush(pending)
            else:
                self._under_way = self._thread.submit(self._flush, pending)
            self._flushed = now
        if self._listener is not None:
            p = self._progression
            self._listener(
                Progress(
                    len(p.receipts), len(p.units), min(p.stage + 1, p.plan.num_stages), p.plan.num_stages,
                    self._read, self._written, now - self._started,
                )
            )  # fmt: skip

    def _settle(self) -> None:
        under_way, self._under_way = self._under_way, None
        if under_way is not None:
            under_way.result()

    def flush(self) -> None:
        """Everything that was recorded is durable when this returns."""
        try:
            self._settle()
        finally:
            pending, self._pending = self._pending, []
            self._flush(pending)


def run_here(
    plan: MergePlan,
    progression: Progression,
    sinks: Sequence[Sink],
    recorder: Recorder,
    *,
    memory: int,
    workers: int,
    device: str = "cpu",
    stop: Stop | None = None,
    device_memory: int | None = None,
) -> None:
    """Run what is left of a plan on `workers` threads (twice as many where bytes go over a network) that share `memory`
    bytes, and `device_memory` bytes of a GPU where the plan needs one. Raises the first job's error, and
    PlanError(code `device-memory`) before any.

    Whatever was finished before an error or a stop is flushed to the journal.
    """
    threads = workers * lanes(plan, sinks)
    share = max(1, thread_bytes(plan, sinks, memory=memory, threads=threads))
    if device == "cuda" and uses_gpu(plan):
        limit_gpu(plan, device_memory=device_memory, threads=threads)
    with one_torch_thread(plan):
        crew = Crew(threads=threads, device=device, spans=SpanLog() if recorder.watch.draws else None)
        try:
            crew.learn(0, Assignment(plan, sinks, share))
            drive_here(
                progression, crew, threads=threads, memory=share, stop=stop, tick=recorder.tick,
                enter=lambda outcome: settle(outcome, progression, sinks, recorder), watch=recorder.watch,
            )  # fmt: skip
        finally:
            crew.close()
            recorder.flush()


def drive_here(
    agenda: Agenda,
    crew: Crew,
    *,
    threads: int,
    memory: int,
    enter: Callable[[Outcome], None],
    tick: Callable[[], None],
    stop: Stop | None,
    watch: Watch | None = None,
) -> None:
    """Hand out jobs until an agenda is worked off, as many at once as there are threads, with `memory` bytes for each.
    `enter` takes what went well. Raises what ends the run, when the jobs under way have ended.
    """
    running = 0
    failure: BaseException | None = None
    budgets: dict[Job, int] = {}
    while running or (failure is None and not agenda.finished):
        while failure is None and running < threads and (job := agenda.take()) is not None:
            try:
                if not crew.knows(job.run):
                    crew.learn(job.run, agenda.assignment(job.run))
            except RaymergeError as error:
                failure = None if agenda.give_up(job, error) else error
                continue
            crew.submit(job, agenda.findings(job), budgets.get(job))
            running += 1
        outcome = crew.wait(WAIT_SECONDS if running else IDLE_SECONDS)
        if outcome is not None:
            running -= 1
            failure = failure or _enter(outcome, agenda, budgets, memory, enter, watch)
        tick()
        if watch is not None and watch.draws:
            spans, dropped = crew.take_spans()
            watch.spans(1, spans, dropped=dropped)
        for run in agenda.ended():
            crew.forget(run)
        if stop is not None and failure is None:
            try:
                stop.check()
            except StoppedError as error:
                failure = error
    if failure is not None:
        raise failure


def _enter(
    outcome: Outcome, agenda: Agenda, budgets: dict[Job, int], memory: int, enter: Callable[[Outcome], None],
    watch: Watch | None,
) -> BaseException | None:  # fmt: skip
    """Take note of what became of a job. Returns the error that it ends the run with."""
    if outcome.error is None:
        enter(outcome)
        return None
    plan = agenda.plan_of(outcome.job)
    before = budgets.get(outcome.job, memory)
    if ran_out_of_memory(outcome.error) and before > peak_bytes(plan):
        budgets[outcome.job] = less_memory(before, plan)
        agenda.put_back(outcome.job)
        if watch is not None:
            why = f"memory ran out: tried again with {format_size(budgets[outcome.job])}"
            watch.event(unit_again(outcome.job, plan, why, reason="out-of-memory"))
        return None
    error = _named(outcome, plan)
    if watch is not None:
        watch.event(unit_failed(outcome.job, plan, error))
    return None if agenda.give_up(outcome.job, error) else error


def settle(outcome: Outcome, progression: Progression, sinks: Sequence[Sink], recorder: Recorder) -> None:
    """Enter what a job that went well brought."""
    if outcome.job.seal is not None:
        output, file = outcome.job.seal
        sinks[output].sealed(file, outcome.sealed)
        progression.complete_seal(outcome.job.seal)
        recorder.tick()
    for receipt in outcome.receipts:
        recorder.record(receipt)


def unit_again(job: Job, plan: MergePlan, why: str, *, reason: str, worker: int | None = None) -> Event:
    """A job did not go well and will be done again."""
    facts = {"reason": reason, **_facts(job, plan), **({} if worker is None else {"worker": worker})}
    return Event("unit-again", f"{job.describe(plan)}: {why}", facts)


def unit_failed(job: Job, plan: MergePlan, error: BaseException) -> Event:
    """A job cannot be done."""
    why = error.problems[0].what if isinstance(error, RaymergeError) else f"{type(error).__name__}: {error}"
    return Event("unit-failed", f"{job.describe(plan)}: {why}", _facts(job, plan), warning=True)


def _facts(job: Job, plan: MergePlan) -> dict[str, Fact]:
    found: dict[str, Fact] = {"run": plan.identity[:12]}
    if job.units:
        found |= {"unit": job.units[0].index, "tensor": plan.tasks[job.units[0].task].name}
    return found


def less_memory(memory: int, plan: MergePlan) -> int:
    """What to try with after memory ran out: a half, but never less than the smallest blocks need."""
    return max(memory // 2, peak_bytes(plan))


def _named(outcome: Outcome, plan: MergePlan) -> BaseException:
    assert outcome.error is not None
    return out_of_memory(outcome.job, plan) if ran_out_of_memory(outcome.error) else outcome.error


def out_of_memory(job: Job, plan: MergePlan, why: str = "") -> InfrastructureError:
    """Memory ran out with the smallest blocks too."""
    return InfrastructureError.of(
        "out-of-memory", "memory ran out although the blocks were made as small as they get", where=job.describe(plan),
        why=why or "other programs, or other workers, hold what this one was promised",
        fix="use fewer --workers, a smaller --memory, or a machine with more",
    )  # fmt: skip
