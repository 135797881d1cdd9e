"""What a plan says of its tasks that is no error and that users would not expect: `notices`. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from merger.errors import Problem
from merger.methods import METHODS
from merger.planning.nouns import Task

_SHOWN: Final = 5


def notices(tasks: Sequence[Task]) -> list[Problem]:
    """Stacks of matrices that a method on singular vectors does not see as matrices."""
    stacked = [task.name for task in tasks if _is_stack(task)]
    if not stacked:
        return []
    return [
        Problem(
            "no-matrix", f"{len(stacked)} tensors of three or more dimensions have no singular vectors",
            ", ".join(stacked[:_SHOWN]) + (", …" if len(stacked) > _SHOWN else ""),
            "packed experts are stacks of matrices; like vectors they are merged by the weighted mean of their deltas, "
            "or by the sum where the method begins with one",
            "nothing, if that is what you want; ties and its like treat them as they treat matrices",
        )
    ]  # fmt: skip


def _is_stack(task: Task) -> bool:
    """A vector is a column, and an empty or flat stack has nothing to tell."""
    several = task.vector and task.rows > 1 and task.cols > 1
    return several and any(
        r.call.combine == "block" and (spec := METHODS.get(r.call.method)) is not None and spec.whole is not None
        for r in task.results
    )
