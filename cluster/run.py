"""A plan on Ray: a plain loop of actors. Units go out, receipts come back; no tensor crosses the driver.

The driver owns retries (`max_restarts=0`): a lost worker is replaced and its unit put back. A unit that takes a worker
down three times is named and ends the merge.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from cluster.actors import MergeWorker, surroundings
from merger.errors import InfrastructureError, MergeFailedError, RaymergeError
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
    pid: str
    unit: Unit | None = None


class _Pool:
    """The actors of one run."""

    def __init__(
        self, plan: MergePlan, stores: Sequence[WritableStore], *, memory: int, device: str, workers: int
    ) -> None:
        self._plan = ray.put(plan)
        self._stores = list(stores)
        self._memory = memory
        self._options = {
            "num_cpus": 1, "max_restarts": 0, "max_task_retries": 0, "scheduling_strategy": "SPREAD",
            **({"num_gpus": 1} if device == "cuda" else {}),
        }  # fmt: skip
        self._device = device
        self._remote = ray.remote(MergeWorker)
        self.slots = [self._start() for _ in range(workers)]
        for slot in self.slots:
            self._prepare(slot)

    def _start(self) -> _Slot:
        return _Slot(self._remote.options(**self._options).remote(), "")

    def _prepare(self, slot: _Slot) -> None:
        try:
            found = ray.get(
                slot.actor.prepare.remote(self._plan, self._stores, self._memory, self._device), timeout=START_SECONDS
            )
        except TimeoutError as error:
            raise InfrastructureError.of(
                "no-resources", f"no worker started within {START_SECONDS:.0f} s",
                where=f"{len(self.slots)} workers of one CPU each",
                why="the cluster has too few free CPUs", fix="use fewer --workers, or wait",
            ) from error  # fmt: skip
        slot.pid = found.pop("pid")
        here = surroundings()
        if found != here:
            raise InfrastructureError.of(
                "version-skew", f"a worker runs other versions: {found}, here {here}",
                why="another version may write other bytes", fix="install the same versions on every node",
            )  # fmt: skip

    def replace(self, slot: _Slot) -> None:
        """A new actor in a lost one's place."""
        fresh = self._start()
        slot.actor, slot.unit = fresh.actor, None
        self._prepare(slot)

    def close(self) -> None:
        for slot in self.slots:
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
    """Run what is left of a plan on `workers` actors of `memory` bytes each. Ray must be connected.

    Raises the first unit's own error; InfrastructureError when the cluster fails; MergeFailedError(code `poison-unit`).
    Whatever was finished before is flushed to the journal.
    """
    if progression.finished:
        return
    pool = _Pool(plan, stores, memory=memory, device=device, workers=workers)
    running: dict[Any, _Slot] = {}
    losses: dict[int, int] = {}
    try:
        while not progression.finished:
            for slot in pool.slots:
                if slot.unit is None and (unit := progression.take()) is not None:
                    slot.unit = unit
                    running[slot.actor.run.remote(unit, progression.ledger.findings(unit))] = slot
            ready, _ = ray.wait(list(running), num_returns=1, timeout=0.2, fetch_local=False)
            for reference in ready:
                slot = running.pop(reference)
                unit = slot.unit
                assert unit is not None
                try:
                    recorder.record(receipt_from_json(ray.get(reference)))
                    slot.unit = None
                except RayTaskError as error:
                    raise _cause(error) from error
                except RayActorError as error:
                    losses[unit.index] = losses.get(unit.index, 0) + 1
                    if losses[unit.index] >= MAX_LOSSES:
                        raise _poison(plan, unit, error) from error
                    progression.put_back(unit)
                    pool.replace(slot)
            recorder.tick()
            if stop is not None:
                stop.check()
    except RayError as error:
        raise InfrastructureError.of("ray-failed", f"Ray failed: {error}", fix="run the same command again") from error
    finally:
        pool.close()
        recorder.flush()


def _cause(error: RayTaskError) -> BaseException:
    cause = error.cause
    return cause if isinstance(cause, RaymergeError | BaseException) else error


def _poison(plan: MergePlan, unit: Unit, error: RayActorError) -> MergeFailedError:
    return MergeFailedError.of(
        "poison-unit",
        f"{plan.tasks[unit.task].name}, rows {unit.first} to {unit.last}, took {MAX_LOSSES} workers down",
        why=str(error).splitlines()[0],
        fix="look at the workers' logs; if they ran out of memory, use fewer --workers or a smaller --memory",
    )
