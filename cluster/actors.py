"""The actor: a synchronous process with a crew of threads. Jobs go in, receipts come out; tensors stay inside.

Nothing fallible happens in `__init__`: an exception there kills a Ray actor for good. What goes in and out is cut into
pieces small enough for Ray to send inside its own messages, so that nothing ever lies in the object store.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import platform
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import ray

from jobs.guard import check_names

if TYPE_CHECKING:
    from cluster.metrics import WorkerMetrics
    from merger.clock import Span
    from merger.crew import Assignment, Crew, Job, Outcome, UnitFindings
    from merger.errors import RaymergeError
    from merger.planning.nouns import MergePlan
    from merger.storage.base import Sink, Store

PIECE_BYTES: Final = 90 << 10
"""Ray keeps arguments and answers of up to 100 KiB out of the object store."""
PROBE_SECONDS: Final = 5.0
"""How long a network file system may take to show a worker what the driver has written."""


@dataclass(frozen=True, slots=True)
class Probe:
    """A small file that every worker has to find: then its folder is the same place on each node."""

    store: Store
    name: str
    text: str
    """What the file says, among other things."""


@dataclass(frozen=True, slots=True)
class Mission:
    """What a worker is told once."""

    plan: MergePlan
    sinks: Sequence[Sink]
    probes: Sequence[Probe]
    lanes: int
    memory: int
    """Bytes for each lane."""
    device: str
    gpu_share: float = 1.0
    """How much of a GPU's memory this process may take."""
    device_memory: int | None = None
    """And at most so many bytes of it."""
    run: str = ""
    """What the metrics of this run are labelled with; empty where there are none."""
    draws: bool = False
    """Whether spans for a timeline are wanted."""


@dataclass(frozen=True, slots=True)
class Briefing:
    """What a worker has to know of one merge of a bulk before it can do jobs of it."""

    assignment: Assignment
    probes: Sequence[Probe]


@dataclass(frozen=True, slots=True)
class Handed:
    """A job as it goes out."""

    ticket: int
    job: Job
    findings: Sequence[UnitFindings]
    memory: int
    briefing: Briefing | None = None
    """With the first job of a run that the worker does not know yet."""


@dataclass(frozen=True, slots=True)
class Orders:
    """What a worker is told with a call."""

    handed: Sequence[Handed]
    over: Sequence[int] = ()
    """Runs of which no more jobs come."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of it, as it comes back."""

    ticket: int
    receipts: tuple[str, ...]
    """Lines of the journal."""
    sealed: object
    error: BaseException | None


@dataclass(frozen=True, slots=True)
class Reply:
    """What comes back from a step."""

    answers: Sequence[Answer]
    spans: Sequence[Span] = ()
    """What the threads did since the last one, where a timeline is drawn."""
    dropped: int = 0
    """Spans that could not be kept."""


Piece = tuple[int, bytes]
"""A piece of an answer, and how many are still to be fetched."""


def pack(message: object) -> list[bytes]:
    """A message as pieces."""
    data = zlib.compress(pickle.dumps(message), 1)
    return [data[start : start + PIECE_BYTES] for start in range(0, len(data), PIECE_BYTES)]


def unpack(pieces: Sequence[bytes]) -> Any:
    """The inverse of `pack`."""
    return pickle.loads(zlib.decompress(b"".join(pieces)))  # noqa: S301 - from the other end of this run


def surroundings() -> dict[str, str]:
    """What driver and workers must share: the versions of Python, Ray, raymerge, and of what does the arithmetic."""
    from merger.report import versions

    return {**versions(), "python": platform.python_version(), "ray": ray.__version__}


class MergeWorker:
    """A process that does jobs of one plan. Made remote by cluster/run.py, which keeps one call in flight."""

    def __init__(self) -> None:
        self._taken: list[bytes] = []
        self._answer: list[bytes] = []
        self._crew: Crew | None = None
        self._metrics: WorkerMetrics | None = None
        self._gpu_bytes: int | None = None
        """What each thread may take of this worker's GPU."""
        self._tickets: dict[Job, int] = {}
        self._refused: dict[int, RaymergeError] = {}

    def __repr__(self) -> str:
        """What Ray's lists and logs call this actor."""
        return f"MergeWorker({ray.get_runtime_context().get_actor_name()})"

    def hello(self) -> dict[str, Any]:
        """Who and where this worker is. Asked before it is told anything that another version might misread.

        Raises RefusedError(code `foreign-package`).
        """
        check_names()
        return {
            "node": ray.get_runtime_context().get_node_id(),
            "address": _address(),
            "pid": os.getpid(),
            "gpus": [str(number) for number in ray.get_gpu_ids()],
            "versions": surroundings(),
        }

    def take(self, index: int, count: int, piece: bytes) -> None:
        """One piece of a message; the last one comes with the call that the message is for."""
        if index == 0:
            self._taken = []
        if index != len(self._taken):
            raise RuntimeError(f"piece {index} of {count} came after {len(self._taken)} pieces")
        self._taken.append(piece)

    def give(self) -> Piece:
        """The next piece of an answer."""
        piece = self._answer.pop(0)
        return len(self._answer), piece

    def start(self, last: bytes) -> Piece:
        """Take a `Mission`; check that all it names is here, and start the threads. Answers with what decides bits.

        Raises PlanError(codes `not-shared`, `device-memory`).
        """
        mission: Mission = self._message(last)
        from merger.clock import SpanLog
        from merger.crew import Assignment, Crew
        from merger.report import numeric_fingerprint
        from merger.unit import prepare_process

        check_sources(mission.plan)
        for probe in mission.probes:
            check_probe(probe)
        prepare_process(mission.plan)
        fingerprint = numeric_fingerprint(mission.plan, mission.device)
        if mission.device == "cuda":
            from merger.crew import limit_gpu

            self._gpu_bytes = limit_gpu(
                mission.plan, device_memory=mission.device_memory, share=mission.gpu_share, threads=mission.lanes
            )  # fmt: skip
        if mission.run:
            from cluster.metrics import WorkerMetrics

            self._metrics = WorkerMetrics(mission.run)
        spans = SpanLog() if mission.draws else None
        self._crew = Crew(threads=mission.lanes, device=mission.device, spans=spans)
        self._crew.learn(0, Assignment(mission.plan, mission.sinks, mission.memory))
        return self._answered(fingerprint)

    def step(self, last: bytes, seconds: float) -> Piece:
        """Take jobs (none, perhaps); wait so long for one to end; answer with all that have ended."""
        assert self._crew is not None
        orders: Orders = self._message(last)
        for run in orders.over:
            self._crew.forget(run)
            self._refused.pop(run, None)
        answers = []
        for one in orders.handed:
            if one.briefing is not None:
                self._learn(one.job.run, one.briefing)
            if (refused := self._refused.get(one.job.run)) is not None:
                answers.append(Answer(one.ticket, (), None, refused))
                continue
            self._tickets[one.job] = one.ticket
            self._crew.submit(one.job, one.findings, one.memory)
        outcome = self._crew.wait(seconds if self._tickets and not answers else 0)
        while outcome is not None:
            answers.append(portable(self._tickets.pop(outcome.job), outcome))
            outcome = self._crew.wait(0)
        if self._metrics is not None:
            self._metrics.publish(at_once=bool(answers))
        return self._answered(Reply(answers, *self._crew.take_spans()))

    def _learn(self, run: int, briefing: Briefing) -> None:
        """Check that all that a merge names is here, and let the crew know it; what stands against it is kept."""
        assert self._crew is not None
        from merger.crew import check_gpu
        from merger.errors import RaymergeError

        try:
            check_sources(briefing.assignment.plan)
            for probe in briefing.probes:
                check_probe(probe)
            if self._gpu_bytes is not None:
                check_gpu(briefing.assignment.plan, self._gpu_bytes)
            self._crew.learn(run, briefing.assignment)
        except RaymergeError as error:
            self._refused[run] = error

    def _message(self, last: bytes) -> Any:
        pieces, self._taken = [*self._taken, last], []
        return unpack(pieces)

    def _answered(self, message: object) -> Piece:
        self._answer = pack(message)
        return self.give()


def _address() -> str:
    return str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call] # ray leaves it untyped


def portable(ticket: int, outcome: Outcome) -> Answer:
    """An outcome as it crosses: an error of another library need not be known, or survive pickling, over there."""
    from cluster.schedule import JobError
    from merger.crew import ran_out_of_memory
    from merger.errors import RaymergeError
    from merger.journal import receipt_to_json

    error = outcome.error
    if error is not None and ran_out_of_memory(error):
        error = MemoryError(str(error))
    elif error is not None and not isinstance(error, RaymergeError):
        error = JobError(type(error).__name__, "; ".join([str(error), *getattr(error, "__notes__", ())]))
    return Answer(ticket, tuple(receipt_to_json(receipt) for receipt in outcome.receipts), outcome.sealed, error)


def check_sources(plan: MergePlan) -> None:
    """Whether every file of a source on a file system is here, and the one that was planned.

    Raises PlanError(code `not-shared`).
    """
    from merger.errors import SourceError

    for source in plan.sources:
        store = source.catalog.store
        if store.remote:
            continue
        for name, pin in source.catalog.pins.items():
            found = None
            with contextlib.suppress(SourceError):
                found = store.stat(name).pin
            if found != pin:
                raise _not_shared("source", store, name, "is not there" if found is None else "is another file there")


def check_probe(probe: Probe) -> None:
    """Whether a file of the driver's is here. Raises PlanError(code `not-shared`)."""
    from merger.errors import SourceError
    from merger.storage.base import read_whole

    deadline = time.monotonic() + PROBE_SECONDS
    while True:
        with contextlib.suppress(SourceError):
            if probe.text.encode() in read_whole(probe.store, probe.name, limit=1 << 16):
                return
        if time.monotonic() > deadline:
            raise _not_shared("output", probe.store, probe.name, "is not there")
        time.sleep(0.1)


def _not_shared(what: str, store: Store, name: str, found: str) -> Exception:
    from merger.errors import PlanError

    return PlanError.of(
        "not-shared", f"{store.uri} is not the same folder on every node",
        where=f"node {_address()}, {what} {store.uri}",
        why=f"{name}, which the driver sees, {found}",
        fix="use a folder that all nodes share, s3:// or hf://; or --on here",
    )  # fmt: skip
