"""What a plan says of its tasks that is no error and that users would not expect: `notices`. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from merger.errors import Problem
from merger.methods import METHODS
from merger.planning.nouns import Task

_SHOWN: Final = 5
_ROUTER: Final = re.compile(r".*\.(?:mlp|block_sparse_moe|feed_forward|moe|ffn)\.(?:gate|router)(?:\.\w+)*\.weight")
"""What decides which experts a token is sent to, in the names of checkpoints."""
_OF_TWO: Final = frozenset({"arcee_fusion", "nearswap", "slerp"})
"""Methods that mix one source with the base itself."""


def notices(tasks: Sequence[Task]) -> list[Problem]:
    """Everything of the kind, each once."""
    return [*_stacks(tasks), *_routers(tasks)]


def _routers(tasks: Sequence[Task]) -> list[Problem]:
    """Routers that are mixed: the mean of two experts is near both, and the mean of two routers may choose neither."""
    if not any(".experts." in task.name for task in tasks):
        return []
    mixed = [task.name for task in tasks if _ROUTER.fullmatch(task.name) and _mixes(task)]
    if not mixed:
        return []
    return [
        Problem(
            "merged-routers", f"{len(mixed)} routers are merged as any tensor is",
            ", ".join(mixed[:_SHOWN]) + (", …" if len(mixed) > _SHOWN else ""),
            "a mean of routers may send tokens to experts that none of the sources would have sent them to",
            f"keep one source's: give the others weight: [{{filter: {_part(mixed[0])}, value: 0}}, {{value: 1}}]; "
            "or compare the result with its sources",
        )
    ]  # fmt: skip


def _part(name: str) -> str:
    """What a filter matches of all routers, and of no gate_proj: `mlp.gate.`."""
    return ".".join(name.split(".")[-3:-1]) + "."


def _mixes(task: Task) -> bool:
    for result in task.results:
        call = result.call
        taken = sum(bool(e.terms) and w != 0 for e, w in zip(task.entries, call.weights, strict=False))
        if result.store.kind != "copy" and taken + (task.base is not None and call.method in _OF_TWO) > 1:
            return True
    return False


def _stacks(tasks: Sequence[Task]) -> list[Problem]:
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
