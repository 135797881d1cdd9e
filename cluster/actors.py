"""The actor: one call into merger per method. It holds nothing but a runner; every tensor it reads, it also writes.

Nothing fallible happens in `__init__`: an exception there kills a Ray actor for good. This file and run.py are the only
ones that import ray.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import ray

from jobs.guard import check_names

if TYPE_CHECKING:
    from merger.methods.rounds import Findings
    from merger.planning.nouns import MergePlan, Unit
    from merger.storage.base import WritableStore


def surroundings() -> dict[str, str]:
    """What driver and workers must share: the versions of Python, Ray and raymerge."""
    from merger.report import versions

    found = versions()
    return {"python": platform.python_version(), "ray": ray.__version__, "raymerge": found["raymerge"]}


class MergeWorker:
    """A process that runs units of one plan. Made remote by cluster/run.py."""

    def __init__(self) -> None:
        self._runner: Any = None
        self._stores: Sequence[WritableStore] = ()

    def prepare(self, plan: MergePlan, stores: Sequence[WritableStore], memory: int, device: str) -> dict[str, str]:
        """Take the plan. Returns the worker's versions and its process id."""
        from merger.unit import UnitRunner, prepare_process

        check_names()
        prepare_process(plan)
        self._stores = stores
        self._runner = UnitRunner(plan, memory=memory, device=device)
        return {**surroundings(), "pid": str(os.getpid())}

    def run(self, unit: Unit, findings: tuple[Findings, ...]) -> str:
        """Do one unit and return its receipt as a line of the journal (small: counts are packed); tensors stay here."""
        from merger.journal import receipt_to_json
        from merger.run import timed
        from merger.unit import writer_to

        return receipt_to_json(timed(self._runner, unit, findings, writer_to(self._stores)))
