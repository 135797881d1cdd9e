"""Workers that share a process: threads, each with buffers and sink writers of its own. Jobs in, outcomes out.

While one thread waits for bytes or writes them, another computes. Used by the loop in this process and by each actor on
Ray alike; nothing here decides a byte, and which thread does which job changes none.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from merger.clock import Clock, Span, SpanLog, scheme_of_sink
from merger.errors import PlanError, RaymergeError, RefusedError, SourceChangedError
from merger.methods.plugin import adopt
from merger.methods.rounds import Findings
from merger.planning.devices import check_device
from merger.planning.nouns import MergePlan, Unit
from merger.planning.parts import file_layouts
from merger.receipts import Receipt
from merger.storage.base import Sink, SinkWriter
from merger.unit import UnitRunner, Writer, prepare_process


@dataclass(frozen=True, slots=True)
class Job:
    """What a worker does in one go: units whose bytes are flushed together, or the sealing of one file."""

    units: tuple[Unit, ...] = ()
    seal: tuple[int, str] | None = None
    """(output, file)."""
    run: int = 0
    """Which plan it belongs to, where several are under way."""

    def describe(self, plan: MergePlan) -> str:
        """What it is, for errors."""
        if self.seal is not None:
            return f"sealing {self.seal[1]}"
        unit = self.units[0]
        more = f" and {len(self.units) - 1} more" if len(self.units) > 1 else ""
        return f"{plan.tasks[unit.task].name}, rows {unit.first} to {unit.last}{more}"


UnitFindings = tuple[Findings, ...]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a job: its receipts, what a seal yielded, or the error it ended with."""

    job: Job
    receipts: tuple[Receipt, ...] = ()
    sealed: object = None
    error: BaseException | None = None


def lanes(plan: MergePlan, sinks: Sequence[Sink]) -> int:
    """How many jobs a worker has under way at once: two where bytes come or go over a network, which one alone would
    only wait for."""
    remote = any(source.catalog.store.remote for source in plan.sources) or any(sink.seals for sink in sinks)
    return 2 if remote else 1


def thread_bytes(plan: MergePlan, sinks: Sequence[Sink], *, memory: int, threads: int) -> int:
    """What each of `threads` threads that share `memory` has for its blocks, beside what its writers hold."""
    held = sum(sink.writer_bytes(file_layouts(plan, index)) for index, sink in enumerate(sinks))
    return memory // threads - held


def limit_gpu(plan: MergePlan, *, device_memory: int | None, share: float = 1.0, threads: int = 1) -> int:
    """Keep this process within its part of its GPU: `device_memory` bytes, and at most a `share` of all there is.
    Returns what each of its threads may take, in bytes.

    Raises PlanError(code `device-memory`) where that is too little for the plan.
    """
    import torch

    total = int(torch.cuda.get_device_properties(0).total_memory)
    allowed = min(int(total * share), device_memory or total)
    check_gpu(plan, allowed // threads)
    if allowed < total:
        torch.cuda.set_per_process_memory_fraction(allowed / total)
    return allowed // threads


def check_gpu(plan: MergePlan, memory: int) -> None:
    """Raise PlanError(code `device-memory`) where a thread's `memory` bytes of a GPU are too little for a plan."""
    if plan.sources and (problems := check_device(plan, memory=memory)):
        raise PlanError(problems)


class JobRunner:
    """Does jobs one after another, on one thread."""

    def __init__(
        self, plan: MergePlan, sinks: Sequence[Sink], *, memory: int, device: str, clock: Clock | None = None
    ) -> None:  # fmt: skip
        self._plan = plan
        self._clock = clock or Clock()
        self._schemes = [scheme_of_sink(sink) for sink in sinks]
        self._sinks = sinks
        self._memory = memory
        self._device = device
        self._runner: UnitRunner | None = None
        self._writers: list[SinkWriter] = []

    def run(self, job: Job, findings: Sequence[UnitFindings], memory: int | None = None) -> Outcome:
        """Do a job, with less memory than usual where `memory` says so. What it wrote outlives this process before it
        returns. Raises what reading, merging and writing raise, with a note that says what was being done."""
        with self._clock.job(job.describe(self._plan)):
            return self._run(job, findings, memory)

    def _run(self, job: Job, findings: Sequence[UnitFindings], memory: int | None) -> Outcome:
        if job.seal is not None:
            output, file = job.seal
            with self._clock.writing(self._schemes[output], file, 0):
                return Outcome(job, sealed=self._sinks[output].seal(file))
        try:
            if self._runner is None:
                self._runner = UnitRunner(self._plan, memory=self._memory, device=self._device)
                self._runner.reader.clock = self._clock
            self._runner.memory = min(self._memory, memory or self._memory)
            if not self._writers:
                self._writers = [sink.writer() for sink in self._sinks]
            if len(job.units) > 1:
                self._runner.hold(job.units)
            receipts = tuple(
                timed(self._runner, unit, known, self._write) for unit, known in zip(job.units, findings, strict=True)
            )
            self._runner.let_go()
            for scheme, writer in zip(self._schemes, self._writers, strict=True):
                with self._clock.writing(scheme, "flush", 0):
                    writer.flush()
        except BaseException:  # whatever it was, nothing half-written is flushed later
            self._runner = None  # its buffers too: memory may be what was lacking
            self._writers = []
            raise
        return Outcome(job, receipts)

    def _write(self, output: int, file: str, offset: int, data: memoryview) -> None:
        with self._clock.writing(self._schemes[output], file, data.nbytes):
            self._writers[output].write(file, offset, data)


def timed(runner: UnitRunner, unit: Unit, findings: UnitFindings, write: Writer) -> Receipt:
    """Run a unit; on an error say which one it was. What a source refuses now it gave when the merge was planned."""
    started = time.perf_counter()
    note = f"while merging {runner.plan.tasks[unit.task].name}, rows {unit.first} to {unit.last}"
    try:
        receipt = runner.run(unit, findings, write)
    except RefusedError as error:
        changed = SourceChangedError(error.problems)
        changed.add_note(note)
        raise changed from error
    except RaymergeError as error:
        error.add_note(note)
        raise
    return replace(receipt, seconds=time.perf_counter() - started)


@dataclass(frozen=True, slots=True)
class Assignment:
    """A plan that a crew works on, and where its results go."""

    plan: MergePlan
    sinks: Sequence[Sink]
    memory: int
    """Bytes of buffers for each thread."""


class Crew:
    """A few threads that do the jobs of the plans that they were told of (`learn`)."""

    def __init__(self, *, threads: int, device: str = "cpu", spans: SpanLog | None = None) -> None:
        """`spans` is told what each thread does, for a timeline."""
        self._assignments: dict[int, Assignment] = {}
        self._spans = spans
        self._device = device
        self._jobs: queue.SimpleQueue[tuple[Job, Sequence[UnitFindings], int | None] | None] = queue.SimpleQueue()
        self._outcomes: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._work, args=(i,), name=f"raymerge-worker-{i}", daemon=True)
            for i in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def learn(self, run: int, assignment: Assignment) -> None:
        """Take jobs of this plan from now on.

        Raises PlanError(code `plugin-differs`) where this process has another plugin than the plan was made with.
        """
        adopt(assignment.plan.plugins)
        self._assignments[run] = assignment

    def knows(self, run: int) -> bool:
        return run in self._assignments

    def forget(self, run: int) -> None:
        """No more jobs of this plan come."""
        self._assignments.pop(run, None)

    def submit(self, job: Job, findings: Sequence[UnitFindings], memory: int | None = None) -> None:
        """Hand over a job, with the findings of each of its units."""
        self._jobs.put((job, findings, memory))

    def wait(self, timeout: float | None = None) -> Outcome | None:
        """The next outcome, or None when there was none in time."""
        try:
            return self._outcomes.get(timeout=timeout) if timeout != 0 else self._outcomes.get_nowait()
        except queue.Empty:
            return None

    def close(self) -> None:
        """Let the threads end after what they are doing; what is queued is still done."""
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()

    def take_spans(self) -> tuple[tuple[Span, ...], int]:
        """What the threads did since this was last asked, and how many spans could not be kept."""
        if self._spans is None:
            return (), 0
        return self._spans.take()

    def _work(self, number: int) -> None:
        clock = Clock(number, self._spans)
        runner: JobRunner | None = None
        run: int | None = None
        while (item := self._jobs.get()) is not None:
            job, findings, memory = item
            try:
                if runner is None or job.run != run:
                    runner = None  # its buffers go before others come
                    told = self._assignments[job.run]
                    prepare_process(told.plan)
                    runner = JobRunner(
                        told.plan, told.sinks, memory=told.memory, device=self._device, clock=clock
                    )  # fmt: skip
                    run = job.run
                self._outcomes.put(runner.run(job, findings, memory))
            except BaseException as error:  # noqa: BLE001 - crosses to the loop, which decides
                self._outcomes.put(Outcome(job, error=error))


def ran_out_of_memory(error: BaseException | None) -> bool:
    """Whether a job failed because this process or its GPU had no memory left."""
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"


__all__ = [
    "Assignment",
    "Crew",
    "Job",
    "JobRunner",
    "Outcome",
    "UnitFindings",
    "check_gpu",
    "lanes",
    "limit_gpu",
    "ran_out_of_memory",
    "thread_bytes",
    "timed",
]
