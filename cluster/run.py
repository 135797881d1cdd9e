"""A plan on Ray: the loop that turns what Ray says into events of the schedule, and its decisions into calls.

The driver owns retries (`max_restarts=0`), the journal and the lease. Units and findings go out, receipts come back.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import re
import secrets
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import ray
import ray.exceptions as gone

from cluster.actors import (
    Answer,
    Briefing,
    Handed,
    MergeWorker,
    Mission,
    Orders,
    Piece,
    Probe,
    Reply,
    pack,
    surroundings,
    unpack,
)
from cluster.capacity import Need, Resources, needs, split_workers
from cluster.metrics import RunMetrics
from cluster.schedule import (
    START_SECONDS,
    Draining,
    Event,
    Fail,
    Finished,
    Hand,
    LossKind,
    Lost,
    Ready,
    Retire,
    Schedule,
    Start,
    Unfit,
)
from cluster.survey import Lookout, alive_nodes, draining_nodes
from merger.bulk_run import BulkRun
from merger.crew import Outcome, lanes, thread_bytes
from merger.errors import InfrastructureError, ManifestError, RaymergeError, SourceChangedError
from merger.journal import receipt_from_json
from merger.planning.devices import Device, uses_gpu
from merger.planning.memory import peak_bytes
from merger.planning.nouns import MergePlan
from merger.report import numeric_fingerprint
from merger.run import Agenda, Part, Progression, Recorder, Stop, settle
from merger.storage.base import Sink
from merger.storage.filled import FilledSink
from merger.watch import Watch

TICK_SECONDS: Final = 0.2
STEP_SECONDS: Final = 2.0
"""How long a busy worker keeps a call before it answers that nothing has ended."""
PULSE_SECONDS: Final = 2.0
"""How often an idle worker is asked whether it lives."""
LOOK_SECONDS: Final = 5.0
"""How often the cluster is asked which nodes are about to go."""
CLOSE_SECONDS: Final = 5.0
SHORT_TICK_SECONDS: Final = 0.02
TORCH_DEVICES: Final[dict[Device, str]] = {"cpu": "cpu", "cuda": "cuda"}
"""What each kind of device is called in torch on a worker."""
_NOBODY: Final = {"starting": 0, "busy": 0, "idle": 0}


def default_workers(address: str) -> int:
    """Cores of a private Ray; two actors a node of an attached one."""
    if address == "private":
        return os.cpu_count() or 1
    return 2 * max(1, len([node for node in alive_nodes() if node.get("CPU", 0) >= 1]))


def default_memory() -> int:
    """Half of what the nodes that workers run on declare, all together."""
    declared = [node.get("memory", 0) for node in alive_nodes() if node.get("CPU", 0) >= 1]
    return max(1 << 30, int(sum(declared) / 2))


def start_seconds() -> float:
    """How long a run waits for its first worker. Raises ManifestError(code `bad-arguments`)."""
    given = os.environ.get("RAYMERGE_START_SECONDS")
    try:
        return START_SECONDS if given is None else float(given)
    except ValueError:
        raise ManifestError.of(
            "bad-arguments", f"{given!r} is no number of seconds", where="RAYMERGE_START_SECONDS"
        ) from None


def pool_name(plan: MergePlan) -> str:
    """What the workers of a run are called, and its metrics labelled: no two runs have the same."""
    return f"{plan.digest[:8]}-{secrets.token_hex(3)}"


# ---- one worker ------------------------------------------------------------------------------------------------------

Exchange = Generator[Any, Any, Any]
"""Yields references of Ray, takes their values, returns a message."""


def exchange(actor: Any, method: str, pieces: Sequence[bytes], *arguments: object, worker: str = "") -> Exchange:
    """A message to a method of an actor and its answer, both in pieces, one call at a time. While the method runs, its
    process is called by the worker's name in `ps`."""
    for index, piece in enumerate(pieces[:-1]):
        yield actor.take.remote(index, len(pieces), piece)
    called = getattr(actor, method).options(name=f"{worker}:MergeWorker.{method}")
    answer: Piece = yield called.remote(pieces[-1], *arguments)
    left, piece = answer
    found = [piece]
    while left:
        left, piece = yield actor.give.remote()
        found.append(piece)
    return unpack(found)


@dataclass(slots=True, eq=False)
class _Line:
    """One actor, what is being said to it, and what is to be said next."""

    number: int
    actor: Any
    said: Exchange | None = None
    reference: Any = None
    """The answer that is awaited."""
    ready: bool = False
    outbox: list[Hand] = field(default_factory=list)
    sent: dict[int, Hand] = field(default_factory=dict)
    """Jobs in its hands, by ticket."""
    told: set[int] = field(default_factory=lambda: {0})
    """Runs that it knows."""
    over: list[int] = field(default_factory=list)
    """Runs that it may forget, and was not told of."""
    silent_since: float = 0.0


class _Pool:
    """The actors of one run. They start in the background: work begins with the first that is ready."""

    def __init__(
        self, mission: Mission, wanted: Resources, brief: Callable[[int], Briefing] | None = None,
        *, lookout: Lookout | None = None, watch: Watch | None = None,
    ) -> None:  # fmt: skip
        """`brief` says what a worker must know of a run that its mission does not name; `lookout` compares what is
        wanted with the cluster while no worker is there."""
        self._mission = mission
        self._brief = brief
        self._lookout = lookout
        self._watch = watch or Watch()
        self._pieces = pack(mission)
        self._wanted = wanted
        self._remote = ray.remote(MergeWorker)
        self._name = f"raymerge-{mission.run or pool_name(mission.plan)}"
        self._here = surroundings()
        self.fingerprint: dict[str, str] | None = None
        """What decides bits on these workers."""
        self._lines: dict[int, _Line] = {}
        self._looked = -math.inf

    @property
    def on_gpus(self) -> bool:
        return self._mission.device == "cuda"

    def name(self, number: int) -> str:
        """What a worker is called in Ray's lists and in `ps`."""
        return f"{self._name}-{number}"

    def options(self, number: int) -> dict[str, Any]:
        """How Ray is asked for an actor."""
        return {
            "name": self.name(number), "num_cpus": self._wanted["CPU"], "num_gpus": self._wanted.get("GPU", 0),
            "memory": self._wanted.get("memory"), "max_restarts": 0, "max_task_retries": 0,
            "resources": {name: n for name, n in self._wanted.items() if name not in ("CPU", "GPU", "memory")},
            "scheduling_strategy": "SPREAD",
        }  # fmt: skip

    # ---------------------------------------------------------------- decisions

    def start(self, number: int) -> None:
        line = _Line(number, self._remote.options(**self.options(number)).remote())
        self._lines[number] = line
        self._begin(line, self._introduce(line.actor, number))

    def hand(self, hand: Hand) -> None:
        """Goes out with the next call to its worker."""
        self._lines[hand.worker].outbox.append(hand)

    def forget(self, runs: Iterable[int]) -> None:
        """No more jobs of these runs come: let the workers know, with the next call."""
        for run in runs:
            for line in self._lines.values():
                if run in line.told:
                    line.told.discard(run)
                    line.over.append(run)

    def drop(self, number: int) -> None:
        """End a worker, or make sure that a lost one is gone."""
        line = self._lines.pop(number)
        with contextlib.suppress(gone.RayError):
            ray.kill(line.actor)

    def close(self) -> None:
        """End all workers; those that may be writing are gone when this returns, or cannot be reached."""
        busy = [line.reference for line in self._lines.values() if line.sent and line.said is not None]
        for number in list(self._lines):
            self.drop(number)
        with contextlib.suppress(gone.RayError):
            if busy:
                ray.wait(busy, num_returns=len(busy), timeout=CLOSE_SECONDS, fetch_local=False)

    # ---------------------------------------------------------------- events

    def events(self, seconds: float = TICK_SECONDS) -> Iterator[Event]:
        """What has happened, after a short wait where nothing has."""
        now = time.monotonic()
        yield from self._look(now)
        for line in self._lines.values():
            if line.said is None and (line.outbox or line.sent or now - line.silent_since > PULSE_SECONDS):
                self._step(line)
        waiting = {line.reference: line for line in self._lines.values() if line.said is not None}
        if not waiting:
            time.sleep(seconds)
            return
        found, _ = ray.wait(list(waiting), num_returns=1, timeout=seconds, fetch_local=False)
        if found:
            found, _ = ray.wait(list(waiting), num_returns=len(waiting), timeout=0, fetch_local=False)
        for reference in found:
            yield from self._hear(waiting[reference])

    def _look(self, now: float) -> Iterator[Event]:
        """Ask the cluster about its nodes, now and then."""
        if now - self._looked < LOOK_SECONDS:
            return
        self._looked = now
        yield Draining(draining_nodes())
        if self._lookout is not None and not any(line.ready for line in self._lines.values()):
            yield self._lookout.look()

    def _step(self, line: _Line) -> None:
        hands, line.outbox = line.outbox, []
        over, line.over = line.over, []
        line.sent.update({hand.ticket: hand for hand in hands})
        handed = []
        for hand in hands:
            run = hand.job.run
            briefing = self._brief(run) if self._brief is not None and run not in line.told else None
            line.told.add(run)
            handed.append(Handed(hand.ticket, hand.job, hand.findings, hand.memory, briefing))
        self._begin(
            line, exchange(line.actor, "step", pack(Orders(handed, over)), STEP_SECONDS, worker=self.name(line.number))
        )

    @staticmethod
    def _begin(line: _Line, said: Exchange) -> None:
        line.said, line.reference = said, next(said)

    def _hear(self, line: _Line) -> Iterator[Event]:
        """An answer of Ray's: a value to go on with, the end of an exchange, or an error."""
        assert line.said is not None
        try:
            line.reference = line.said.send(ray.get(line.reference))
        except StopIteration as ended:
            line.said, line.reference, line.silent_since = None, None, time.monotonic()
            yield self._ended(line, ended.value)
        except gone.RayTaskError as error:  # before RaymergeError: it may be both
            if isinstance(error.cause, RaymergeError) and not line.ready:
                yield Unfit(line.number, self._unshared(error.cause))
            else:
                yield self._lost(line, "died", f"{type(error.cause).__name__}: {error.cause}")
        except RaymergeError as error:
            yield Unfit(line.number, error)
        except gone.OutOfMemoryError as error:
            yield self._lost(line, "out-of-memory", cause_of_death(error))
        except gone.RayActorError as error:
            yield self._lost(line, "preempted" if error.preempted else "died", cause_of_death(error))
        except (gone.WorkerCrashedError, gone.NodeDiedError, gone.ActorUnschedulableError,
                gone.RuntimeEnvSetupError, gone.ObjectLostError) as error:  # fmt: skip
            yield self._lost(line, "died", cause_of_death(error))

    def _ended(self, line: _Line, message: Any) -> Event:
        if not line.ready:
            line.ready = True
            return Ready(line.number, message)
        reply: Reply = message
        self._watch.spans(line.number, reply.spans, dropped=reply.dropped)
        return Finished(line.number, tuple(_outcome(answer, line.sent.pop(answer.ticket)) for answer in reply.answers))

    def states(self) -> dict[str, int]:
        """How many workers are starting, at work, and idle."""
        busy = sum(bool(line.sent) for line in self._lines.values())
        ready = sum(line.ready for line in self._lines.values())
        return {"starting": len(self._lines) - ready, "busy": busy, "idle": ready - busy}

    def _lost(self, line: _Line, kind: LossKind, why: str) -> Lost:
        unsent = frozenset(hand.ticket for hand in line.outbox)
        self.drop(line.number)
        return Lost(line.number, kind, why, unsent)

    # ---------------------------------------------------------------- the start of a worker

    def _introduce(self, actor: Any, number: int) -> Exchange:
        """Versions first: another one might misread the plan. Returns the worker's node."""
        about = yield actor.hello.remote()
        self._check("version-skew", "versions", self._here, about["versions"], about["address"])
        fingerprint = yield from exchange(actor, "start", self._pieces, worker=self.name(number))
        if self.fingerprint is None:
            # The result records what computed it: workers on CPUs must be as this process is, on GPUs all alike.
            self.fingerprint = fingerprint if self.on_gpus else numeric_fingerprint(self._mission.plan, "cpu")
        self._check("fingerprint-skew", "arithmetic", self.fingerprint, fingerprint, about["address"])
        return about["node"]

    @staticmethod
    def _check(code: str, what: str, here: Mapping[str, str], there: Mapping[str, str], address: str) -> None:
        """Raise InfrastructureError where a worker may write other bytes."""
        differ = [key for key in sorted({*here, *there}) if here.get(key) != there.get(key)]
        if differ:
            table = ", ".join(f"{key} {there.get(key, 'absent')} (here {here.get(key, 'absent')})" for key in differ)
            raise InfrastructureError.of(
                code, f"a worker has other {what}: {table}", where=f"node {address}",
                why="it may write other bytes", fix="use one image, and one kind of machine, for driver and workers",
            )  # fmt: skip

    def _unshared(self, error: RaymergeError) -> RaymergeError:
        """A source that a worker sees otherwise may have changed for everybody: that is another error."""
        if error.problems[0].code != "not-shared":
            return error
        for source in self._mission.plan.sources:
            if not source.catalog.store.remote:
                for name, pin in source.catalog.pins.items():
                    try:
                        source.catalog.store.read_into(name, [], pin=pin)
                    except SourceChangedError as changed:
                        return changed
        return error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def cause_of_death(error: gone.RayError) -> str:
    """Which process died where, and of what, from the page that Ray writes about it."""
    text = str(error).strip()
    known = dict(re.findall(r"^\s+(pid|ip): (\S+)$", text, re.MULTILINE))
    who = f"process {known['pid']} on {known['ip']}: " if len(known) == 2 else ""
    detail = text.rpartition("Worker exit detail: ")[2] if "Worker exit detail: " in text else ""
    if not detail:
        lines = text.splitlines() or [type(error).__name__]
        detail = lines[-1 if getattr(error, "actor_init_failed", False) else 0]
    return who + detail.partition(" Some common causes")[0].strip()


def _outcome(answer: Answer, hand: Hand) -> tuple[int, Outcome]:
    receipts = tuple(receipt_from_json(line) for line in answer.receipts)
    return answer.ticket, Outcome(hand.job, receipts, answer.sealed, answer.error)


# ---- the loop --------------------------------------------------------------------------------------------------------


class _Probes:
    """Files by which workers can tell that they see the same output folders."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._stores = [sink.store for sink in sinks if isinstance(sink, FilledSink)]
        self._name = f".raymerge/probe-{secrets.token_hex(6)}"
        self._text = secrets.token_hex(16)

    def write(self) -> list[Probe]:
        for store in self._stores:
            store.put(self._name, self._text.encode())
        return [Probe(store, self._name, self._text) for store in self._stores]

    def remove(self) -> None:
        for store in self._stores:
            store.remove(self._name)


def run_on_ray(
    plan: MergePlan,
    progression: Progression,
    sinks: Sequence[Sink],
    recorder: Recorder,
    *,
    memory: int,
    workers: int,
    device: str = "cpu",
    stop: Stop | None = None,
    gpus_per_worker: float = 1.0,
    device_memory: int | None = None,
) -> None:
    """Run what is left of a plan on `workers` actors that share `memory` bytes. Ray must be connected.

    Raises the first job's own error; PlanError(code `not-shared`); MergeFailedError (codes `poison-unit`,
    `unit-failed`); InfrastructureError when the cluster fails. Whatever was finished before is flushed to the journal.
    """
    if progression.finished:
        return
    share = max(1, memory // workers)
    threads = lanes(plan, sinks)
    each = max(1, thread_bytes(plan, sinks, memory=memory, threads=workers * threads))
    with _named_failures():
        name = pool_name(plan)
        metrics = RunMetrics(name)
        metrics.resumed(len(progression.receipts))
        watch = recorder.watch = recorder.watch.also(metrics.event)
        nodes = alive_nodes()
        numbers = itertools.count(1)
        probes = _Probes(sinks)
        crews: list[_Crew] = []
        try:
            said = probes.write()
            for kind, count in _kinds(progression, nodes, workers, device, gpus_per_worker).items():
                need = Need(count, needs(
                    plan, nodes, share=share, workers=count, device=kind, gpus_per_worker=gpus_per_worker
                ))  # fmt: skip
                schedule = Schedule(
                    progression if count == workers else Part(progression, kind), workers=count, memory=each,
                    lanes=threads, start_seconds=start_seconds(), needs=f"{need}", numbers=numbers,
                )  # fmt: skip
                mission = Mission(
                    plan, sinks, said, threads, each, TORCH_DEVICES[kind], gpus_per_worker, device_memory,
                    run=name, draws=watch.draws
                )  # fmt: skip
                pool = _Pool(mission, need.each, lookout=_lookout(need, schedule, watch), watch=watch)
                crews.append((schedule, pool))
            try:
                _drive(
                    crews, progression, tick=recorder.tick, stop=stop, metrics=metrics, watch=watch,
                    enter=lambda outcome: settle(outcome, progression, sinks, recorder),
                )  # fmt: skip
            finally:
                for _, pool in crews:
                    pool.close()
                recorder.fingerprint = next((p.fingerprint for _, p in crews if p.on_gpus and p.fingerprint), None)
                recorder.flush()
        finally:
            probes.remove()


def _kinds(
    progression: Progression, nodes: Sequence[Resources], workers: int, device: str, gpus_per_worker: float
) -> dict[Device, int]:  # fmt: skip
    """How many workers of each kind: only what a plan sends to GPUs asks for one."""
    if device == "cpu":
        return {"cpu": workers}
    left = [unit for unit in progression.units if unit.index not in progression.receipts]
    on_gpus = sum(progression.device_of(unit) == "cuda" for unit in left)
    places = sum(int(node.get("GPU", 0) / gpus_per_worker + 1e-9) for node in nodes)
    return split_workers(workers, gpu_units=on_gpus, cpu_units=len(left) - on_gpus, gpu_places=places)


def run_bulk_on_ray(
    bulk: BulkRun, *, memory: int, workers: int, device: str = "cpu", stop: Stop | None = None,
    gpus_per_worker: float = 1.0,
    device_memory: int | None = None,
) -> None:  # fmt: skip
    """Work a bulk off on `workers` actors that share `memory` bytes. Ray must be connected.

    What becomes of a merge is the bulk's business. Raises InfrastructureError when the cluster fails.
    """
    plans = list(bulk.plans())
    largest = max(plans, key=peak_bytes)
    threads = bulk.threads // workers
    each = max(1, memory // bulk.threads)
    with _named_failures():
        kind: Device = "cuda" if device == "cuda" and any(uses_gpu(plan) for plan in plans) else "cpu"
        wanted = needs(
            largest, alive_nodes(), share=memory // workers, workers=workers, device=kind,
            gpus_per_worker=gpus_per_worker,
        )  # fmt: skip
        representative = bulk.representative()
        name = pool_name(representative)
        metrics = RunMetrics(name)
        watch = bulk.watch = bulk.watch.also(metrics.event)
        need = Need(workers, wanted)
        schedule = Schedule(
            bulk, workers=workers, memory=each, lanes=threads, start_seconds=start_seconds(), needs=f"{need}"
        )
        lookout = _lookout(need, schedule, watch)
        probes: dict[int, _Probes] = {}
        briefings: dict[int, Briefing] = {}

        def brief(run: int) -> Briefing:
            if run not in briefings:
                assignment = bulk.assignment(run)
                probes[run] = _Probes(assignment.sinks)
                briefings[run] = Briefing(assignment, probes[run].write())
            return briefings[run]

        def over(runs: Iterable[int]) -> None:
            for run in runs:
                briefings.pop(run, None)
                if (left := probes.pop(run, None)) is not None:
                    left.remove()

        # What a worker is told first decides which arithmetic it must have; every merge it learns of later.
        mission = Mission(
            representative, (), (), threads, each, TORCH_DEVICES[kind], gpus_per_worker, device_memory,
                    run=name, draws=watch.draws
        )  # fmt: skip
        pool = _Pool(mission, wanted, brief, lookout=lookout, watch=watch)

        def tick() -> None:
            bulk.fingerprint = pool.fingerprint if pool.on_gpus else None
            bulk.tick()

        try:
            _drive(
                [(schedule, pool)], bulk, enter=bulk.enter, tick=tick, stop=stop, over=over, metrics=metrics,
                watch=watch,
            )  # fmt: skip
        finally:
            pool.close()
            over(list(probes))


@contextlib.contextmanager
def _named_failures() -> Iterator[None]:
    """What Ray itself raises, as errors of ours."""
    try:
        yield
    except gone.AuthenticationError as error:
        raise InfrastructureError.of(
            "not-authenticated", "the cluster does not accept our token any more",
            fix="set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH, and run the same command again: it resumes",
        ) from error  # fmt: skip
    except gone.RayError as error:
        raise InfrastructureError.of(
            "ray-failed", f"Ray failed: {_first_line(error)}", fix="run the same command again: it resumes"
        ) from error


def _decide(schedule: Schedule, pool: _Pool, watch: Watch) -> None:
    """Do what a schedule decides. Raises the error that it ends the run with."""
    decisions = schedule.decide(time.monotonic())
    for happening in schedule.happened():
        watch.event(happening)
    for decision in decisions:
        match decision:
            case Start(number):
                pool.start(number)
            case Hand():
                pool.hand(decision)
            case Retire(number):
                pool.drop(number)
            case Fail(error):
                raise error


def _lookout(need: Need, schedule: Schedule, watch: Watch) -> Lookout:
    """Compare a need with the cluster before any actor is asked for. Where it can never be met, the schedule knows.

    Who sets RAYMERGE_START_SECONDS wants to wait: for nodes of which no autoscaler knows, too.
    """
    patient = "RAYMERGE_START_SECONDS" in os.environ
    lookout = Lookout(need, watch.event, seconds=start_seconds(), patient=patient)
    schedule.receive(lookout.look(), time.monotonic())
    return lookout


_Crew = tuple[Schedule, _Pool]
"""Workers of one kind, and what is decided for them."""


def _drive(
    crews: Sequence[_Crew], agenda: Agenda, *, enter: Callable[[Outcome], None], tick: Callable[[], None],
    stop: Stop | None, metrics: RunMetrics, watch: Watch, over: Callable[[Iterable[int]], None] | None = None,
) -> None:  # fmt: skip
    looked = -math.inf
    while not agenda.finished:
        for schedule, pool in crews:
            _decide(schedule, pool, watch)
            # Where there are two kinds of workers, neither is kept waiting for long by the silence of the other.
            for event in list(pool.events(TICK_SECONDS if len(crews) == 1 else SHORT_TICK_SECONDS)):
                for outcome in schedule.receive(event, time.monotonic()):
                    metrics.done(outcome.receipts)
                    enter(outcome)
        if time.monotonic() - looked >= PULSE_SECONDS:
            looked = time.monotonic()
            states = sum((Counter(pool.states()) for _, pool in crews), Counter())
            metrics.levels(workers={**_NOBODY, **states}, units_left=agenda.num_left)
        tick()
        ended = list(agenda.ended())
        for _, pool in crews:
            pool.forget(ended)
        if over is not None:
            over(ended)
        if stop is not None:
            stop.check()
