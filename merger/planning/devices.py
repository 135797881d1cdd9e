"""Which kind of device does a task, and what it holds there. Pure functions of the plan; no torch.

A plan for GPUs (`device: cuda`) sends dense spectral work to them, where it is tens of times faster; all else is bound
by the bytes it moves, and stays on the CPU of whatever worker has them. What kind a task has follows from the plan
alone, so that no retry and no cluster changes it.
"""

from __future__ import annotations

from typing import Literal

from merger.errors import Problem
from merger.methods.plugin import plugins_of
from merger.planning.memory import is_dense_spectral, whole_task_bytes
from merger.planning.nouns import MergePlan, Task
from merger.tensors import format_size

Device = Literal["cpu", "cuda"]


def device_of(plan: MergePlan, task: Task) -> Device:
    """The kind of device that does a task. A vector has no spectrum worth the way; what a plugin computes stays on the
    CPU, since nobody promised it another."""
    wanted = plan.device == "cuda" and not task.vector
    spectral = wanted and any(is_dense_spectral(task, result) for result in task.results)
    return "cuda" if spectral and not plugins_of({result.call.method for result in task.results}) else "cpu"


def uses_gpu(plan: MergePlan) -> bool:
    """Whether any task of a plan is done on a GPU."""
    return plan.device == "cuda" and any(device_of(plan, task) == "cuda" for task in plan.tasks)


def device_bytes(plan: MergePlan) -> int:
    """The least memory of a GPU that one worker can do the plan with: its largest spectral task, which is held whole; 0
    where it needs none."""
    return max((whole_task_bytes(plan, task) for task in plan.tasks if device_of(plan, task) == "cuda"), default=0)


def check_device(plan: MergePlan, *, memory: int) -> tuple[Problem, ...]:
    """What a GPU lacks of which one thread of a worker may take `memory` bytes."""
    needed = device_bytes(plan)
    if needed <= memory:
        return ()
    spectral = [task for task in plan.tasks if device_of(plan, task) == "cuda"]
    worst = max(spectral, key=lambda task: whole_task_bytes(plan, task))
    return (
        Problem(
            "device-memory", f"a worker needs {format_size(needed)} of its GPU and may take {format_size(memory)}",
            worst.name, "this matrix is decomposed there whole",
            "give a larger --device-memory, a larger share with --gpus-per-worker, fewer --workers in one process, or "
            "--device cpu",
        ),
    )  # fmt: skip
