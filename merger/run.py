"""The plain loop: a plan, in this process, on a few threads. Also what every other loop shares: `Progression`.

Nothing here decides a byte. Threads only change which unit comes when.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Protocol

from merger.errors import RaymergeError, RefusedError, SourceChangedError, StoppedError
from merger.ledger import Ledger
from merger.planning.nouns import MergePlan, Unit
from merger.receipts import Receipt
from merger.unit import UnitRunner, Writer, one_torch_thread, prepare_process

FLUSH_SECONDS = 1.0


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


class Progression:
    """Which unit may start now. Pure: no threads, no clock, no IO."""

    def __init__(self, plan: MergePlan, done: Iterable[Receipt] = ()) -> None:
        self.plan = plan
        self.units = plan.units
        self.ledger = Ledger(plan, self.units)
        self.receipts: dict[int, Receipt] = {}
        self.stage = 0
        self._open: set[int] = set()
        self._ready: deque[Unit] = deque()
        for receipt in done:
            if 0 <= receipt.unit < len(self.units):
                self._keep(receipt)
        self._enter_stage()

    def _keep(self, receipt: Receipt) -> None:
        if receipt.statistics:
            self.ledger.add(receipt)
            receipt = replace(receipt, statistics=())
        self.receipts[receipt.unit] = receipt

    def _enter_stage(self) -> None:
        while self.stage < self.plan.num_stages:
            waiting = [u for u in self.units if u.stage == self.stage and u.index not in self.receipts]
            if waiting:
                # Largest first, so that the last worker is not left alone with the largest unit.
                waiting.sort(key=lambda u: (-(u.last - u.first) * self.plan.tasks[u.task].cols, u.index))
                self._ready = deque(waiting)
                self._open = {u.index for u in waiting}
                return
            self.ledger.close_stage(self.stage)
            self.stage += 1

    @property
    def finished(self) -> bool:
        return self.stage >= self.plan.num_stages

    def take(self) -> Unit | None:
        """A unit to start, or None while the stage's last ones are under way."""
        return self._ready.popleft() if self._ready else None

    def put_back(self, unit: Unit) -> None:
        """Its worker is gone: it will be taken again."""
        self._ready.appendleft(unit)

    def complete(self, receipt: Receipt) -> None:
        """A unit is done. A second receipt for it changes nothing."""
        if receipt.unit not in self._open:
            return
        self._keep(receipt)
        self._open.discard(receipt.unit)
        if not self._open:
            self.ledger.close_stage(self.stage)
            self.stage += 1
            self._enter_stage()


class Recorder:
    """Collects receipts, flushes them to the journal every second, and tells how far the run is."""

    def __init__(
        self, progression: Progression, flush: Callable[[list[Receipt]], None], listener: ProgressListener | None
    ) -> None:
        self._progression = progression
        self._flush = flush
        self._listener = listener
        self._pending: list[Receipt] = []
        self._started = self._flushed = time.monotonic()
        self._read = self._written = 0

    def record(self, receipt: Receipt) -> None:
        self._progression.complete(receipt)
        self._pending.append(receipt)
        self._read += receipt.read_bytes
        self._written += sum(e.end - e.start for e in receipt.extents)
        self.tick()

    def tick(self) -> None:
        now = time.monotonic()
        if now - self._flushed >= FLUSH_SECONDS:
            self.flush()
            self._flushed = now
        if self._listener is not None:
            p = self._progression
            self._listener(
                Progress(
                    len(p.receipts), len(p.units), min(p.stage + 1, p.plan.num_stages), p.plan.num_stages,
                    self._read, self._written, now - self._started,
                )
            )  # fmt: skip

    def flush(self) -> None:
        pending, self._pending = self._pending, []
        self._flush(pending)


def run_here(
    plan: MergePlan,
    progression: Progression,
    write: Writer,
    recorder: Recorder,
    *,
    memory: int,
    workers: int,
    device: str = "cpu",
    stop: Stop | None = None,
) -> None:
    """Run what is left of a plan on `workers` threads that share `memory` bytes. Raises the first unit's error.

    Whatever was finished before an error or a stop is flushed to the journal.
    """
    with one_torch_thread(plan):
        _run_threads(plan, progression, write, recorder, memory, workers, device, stop)


def _run_threads(
    plan: MergePlan,
    progression: Progression,
    write: Writer,
    recorder: Recorder,
    memory: int,
    workers: int,
    device: str,
    stop: Stop | None,
) -> None:
    tasks: queue.SimpleQueue[tuple[Unit, object] | None] = queue.SimpleQueue()
    results: queue.SimpleQueue[Receipt | BaseException] = queue.SimpleQueue()

    def work() -> None:
        prepare_process(plan)
        runner: UnitRunner | None = None
        while (item := tasks.get()) is not None:
            unit, findings = item
            try:
                runner = runner or UnitRunner(plan, memory=max(1, memory // workers), device=device)
                results.put(timed(runner, unit, findings, write))
            except BaseException as error:  # noqa: BLE001 - crosses to the loop, which raises it
                results.put(error)

    threads = [threading.Thread(target=work, name=f"raymerge-worker-{i}", daemon=True) for i in range(workers)]
    for thread in threads:
        thread.start()
    running = 0
    failure: BaseException | None = None
    try:
        while not progression.finished or running:
            while failure is None and running < workers and (unit := progression.take()) is not None:
                tasks.put((unit, progression.ledger.findings(unit)))
                running += 1
            if running == 0:
                break
            try:
                outcome = results.get(timeout=0.2)
            except queue.Empty:
                recorder.tick()
            else:
                running -= 1
                if isinstance(outcome, Receipt):
                    recorder.record(outcome)
                else:
                    failure = failure or outcome
            if stop is not None and failure is None:
                try:
                    stop.check()
                except StoppedError as error:
                    failure = error
    finally:
        for _ in threads:
            tasks.put(None)
        for thread in threads:
            thread.join()
        recorder.flush()
    if failure is not None:
        raise failure


def timed(runner: UnitRunner, unit: Unit, findings: object, write: Writer) -> Receipt:
    """Run a unit; on an error say which one it was. What a source refuses now it gave when the merge was planned."""
    started = time.perf_counter()
    assert isinstance(findings, tuple)
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
