"""A plan on Ray: a plain loop of actors. Units go out, receipts come back; no tensor crosses the driver.

The driver owns retries (`max_restarts=0`): a lost worker is replaced and its unit put back. A unit that takes a worker
down three times is named and ends the merge.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import ray
from ray.exceptions import OutOfMemoryError, RayActorError, RayError, RayTaskError

from cluster.actors import MergeWorker, surroundings
from merger.errors import InfrastructureError, MergeFailedError
from merger.journal import receipt_from_json
from merger.planning.nouns import MergePlan, Unit
from merger.run import Progression, Recorder, Stop
from merger.storage.base import WritableStore

MAX_LOSSES: Final = 3
"""Workers that one unit may take down."""
START_SECONDS: Final = 120.0


def default_workers(address: str) -> int:
    """Cores of a private Ray; two actors a node of an attached one."""
    if address == "private":
        return os.cpu_count() or 1
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call] # ray leaves it untyped
    return 2 * max(1, len([node for node in nodes if node["Alive"]]))


@dataclass(slots=True)
class _Slot:
    """One actor and what it is doing."""

    actor: Any
    unit: Unit | None = None
    ready: bool = False
    """Whether it has taken the plan."""


class _Pool:
    """The actors of one run. They start in the background: work begins with the first that is ready."""

    def __init__(self, plan: MergePlan, stores: Sequence[WritableStore], *, memory: int, device: str) -> None:
        self._plan = ray.put(plan)
        self._stores = list(stores)
        self._memory = memory
        self._options = {
            "num_cpus": 1, "max_restarts": 0, "max_task_retries": 0, "scheduling_strategy": "SPREAD",
            **({"num_gpus": 1} if device == "cuda" else {}),
        }  # fmt: skip
        self._device = device
        self._remote = ray.remote(MergeWorker)
        self.slots: list[_Slot] = []
        self.pending: dict[Any, _Slot] = {}
        """What is under way: reference of the answer → who gives it."""
        self._deadline = 0.0

    def start(self) -> None:
        """One more actor."""
        slot = _Slot(self._remote.options(**self._options).remote())
        self.slots.append(slot)
        self.pending[slot.actor.prepare.remote(self._plan, self._stores, self._memory, self._device)] = slot
        self._deadline = time.monotonic() + START_SECONDS

    def drop(self, slot: _Slot) -> None:
        """A lost actor: make sure that it is gone."""
        self.slots.remove(slot)
        self._kill(slot)

    def submit(self, slot: _Slot, unit: Unit, findings: object) -> None:
        slot.unit = unit
        self.pending[slot.actor.run.remote(unit, findings)] = slot

    def idle(self) -> list[_Slot]:
        return [slot for slot in self.slots if slot.ready and slot.unit is None]

    def check_started(self) -> None:
        """Raise InfrastructureError when no actor at all has started in time."""
        if not any(slot.ready for slot in self.slots) and time.monotonic() > self._deadline:
            raise InfrastructureError.of(
                "no-resources", f"no worker started within {START_SECONDS:.0f} s",
                where=f"{len(self.slots)} workers of one CPU each",
                why="the cluster has too few free CPUs", fix="use fewer --workers, or wait",
            )  # fmt: skip

    def close(self) -> None:
        for slot in self.slots:
            self._kill(slot)

    @staticmethod
    def _kill(slot: _Slot) -> None:
        with contextlib.suppress(RayError):
            ray.kill(slot.actor)


def run_on_ray(
    plan: MergePlan,
    progression: Progression,
    stores: Sequence[WritableStore],
    recorder: Recorder,
    *,
    memory: int,
    workers: int,
    device: str = "cpu",
    stop: Stop | None = None,
) -> None:
    """Run what is left of a plan on `workers` actors that share `memory` bytes. Ray must be connected.

    Raises the first unit's own error; InfrastructureError when the cluster fails; MergeFailedError(code `poison-unit`).
    Whatever was finished before is flushed to the journal.
    """
    if progression.finished:
        return
    pool = _Pool(plan, stores, memory=max(1, memory // workers), device=device)
    losses: dict[int, int] = {}
    try:
        for _ in range(workers):
            pool.start()
        while not progression.finished:
            for slot in pool.idle():
                if (unit := progression.take()) is not None:
                    pool.submit(slot, unit, progression.ledger.findings(unit))
            pool.check_started()
            ready, _ = ray.wait(list(pool.pending), num_returns=1, timeout=0.2, fetch_local=False)
            for reference in ready:
                slot = pool.pending.pop(reference)
                try:
                    _take(ray.get(reference), slot, recorder)
                except RayTaskError as error:
                    raise _cause(error) from error
                except (RayActorError, OutOfMemoryError) as error:
                    _count_loss(plan, slot.unit, losses, error)
                    if slot.unit is not None:
                        progression.put_back(slot.unit)
                    pool.drop(slot)
                    pool.start()
            recorder.tick()
            if stop is not None:
                stop.check()
    except RayError as error:
        raise InfrastructureError.of("ray-failed", f"Ray failed: {error}", fix="run the same command again") from error
    finally:
        pool.close()
        recorder.flush()


def _take(answer: Any, slot: _Slot, recorder: Recorder) -> None:
    """What an actor answered: that it is ready, or that its unit is done."""
    if slot.ready:
        recorder.record(receipt_from_json(answer))
        slot.unit = None
        return
    found = {key: value for key, value in answer.items() if key != "pid"}
    here = surroundings()
    if found != here:
        raise InfrastructureError.of(
            "version-skew", f"a worker runs other versions: {found}, here {here}",
            why="another version may write other bytes", fix="install the same versions on every node",
        )  # fmt: skip
    slot.ready = True


def _count_loss(plan: MergePlan, unit: Unit | None, losses: dict[int, int], error: RayError) -> None:
    """Charge a lost worker to its unit (-1: to the start). Raises when that has happened too often."""
    index = -1 if unit is None else unit.index
    losses[index] = losses.get(index, 0) + 1
    if losses[index] < MAX_LOSSES:
        return
    why = (str(error).splitlines() or [""])[0]
    if unit is None:
        raise InfrastructureError.of(
            "workers-die", f"{MAX_LOSSES} workers died before they could start", why=why,
            fix="look at the workers' logs",
        ) from error  # fmt: skip
    where = f"{plan.tasks[unit.task].name}, rows {unit.first} to {unit.last}"
    if isinstance(error, OutOfMemoryError):
        raise InfrastructureError.of(
            "out-of-memory", f"Ray killed {MAX_LOSSES} workers for memory", where=where, why=why,
            fix="use fewer --workers or a smaller --memory",
        ) from error  # fmt: skip
    raise MergeFailedError.of(
        "poison-unit", f"{MAX_LOSSES} workers died over one unit", where=where, why=why,
        fix="look at the workers' logs; if they ran out of memory, use fewer --workers or a smaller --memory",
    ) from error  # fmt: skip


def _cause(error: RayTaskError) -> BaseException:
    cause = error.cause
    return cause if isinstance(cause, BaseException) else error
