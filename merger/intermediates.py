"""Merges that other merges read: each is made before what names it, in memory where it fits, else beside the output.

What is made, and rounded to its own dtype, is what the same documents merged one after another by hand would be. An
intermediate lies under `.raymerge/intermediates/` of the output that needs it, is an output of its own (with journal
and lease, so it resumes) and goes away with that output's state. One with an `output.path` is written there and stays.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from merger.destination import Destination, open_destination
from merger.errors import Problem
from merger.made import unmade, with_made
from merger.planning.build import write_bytes
from merger.planning.memory import peak_bytes
from merger.planning.nouns import MergePlan, Source
from merger.storage import LocalStore, MemoryStore, Store

MEMORY_SHARE = 2
"""Intermediates may take this part of what is allowed: a half."""


def path_problems(plan: MergePlan) -> list[Problem]:
    """Outputs of one file that would lie in one place."""
    seen: dict[str, str] = {}
    found = []
    for name, made in [*plan.before, ("the result", plan)]:
        path = made.outputs[0].path if made.outputs else ""
        if path and seen.setdefault(path, name) != name:
            found.append(
                Problem("conflict", f"{seen[path]} and {name} are written to the same place", path, "",
                        "give each an output.path of its own")
            )  # fmt: skip
    return found


def needed(plan: MergePlan, *, result: bool) -> list[tuple[str, MergePlan]]:
    """What has to be made, in order: what is kept, and what the result (where it is still to be made) reads."""
    wanted = unmade(plan) if result else set()
    chosen = []
    for name, made in reversed(plan.before):
        if name in wanted or _kept(made):
            wanted |= unmade(made)
            chosen.append((name, made))
    return chosen[::-1]


def documents_read(plan: MergePlan) -> set[str]:
    """The documents that the result reads, and those that these read."""
    found = unmade(plan)
    for name, made in reversed(plan.before):
        if name in found:
            found |= unmade(made)
    return found


def _kept(plan: MergePlan) -> bool:
    return bool(plan.outputs[0].path)


def bytes_beside(plan: MergePlan) -> int:
    """Bytes of all intermediates that are not kept."""
    return sum(write_bytes(made) for _, made in needed(plan, result=True) if not _kept(made))


def bytes_in_memory(plan: MergePlan, allowed: int) -> int | None:
    """Bytes that all intermediates which are not kept take, or None where they are more than memory has room for."""
    total = bytes_beside(plan)
    work = max(peak_bytes(one) for one in plans_of(plan).values())
    return total if total <= min(allowed // MEMORY_SHARE, allowed - work) else None


@contextlib.contextmanager
def made_first(
    plan: MergePlan, destination: Destination | None, run: Callable[[MergePlan], Any], *, result: bool = True
) -> Iterator[MergePlan]:
    """Make what a plan reads, and give the plan that reads it. `run` runs one plan to its end.

    With a `destination`, intermediates lie in its state; without, in this process's memory, until the block ends.
    """
    from merger.journal import INTERMEDIATES, STATE_FOLDER

    root = (
        f"memory://raymerge-{uuid.uuid4().hex}" if destination is None else f"{destination.state.uri}/{INTERMEDIATES}"
    )
    places: dict[str, Store] = {}
    folder = destination.state.root if destination is not None and isinstance(destination.state, LocalStore) else None
    fresh = folder is not None and not os.path.exists(folder)
    try:
        for name, made in needed(plan, result=result):
            path = made.outputs[0].path or f"{root}/{name}"
            report = run(with_made(_placed(made, path), places))
            places[name] = open_destination(report.path).content
        yield replace(with_made(plan, places), before=_recorded(plan))
    except BaseException:
        if folder is not None:  # what was refused leaves no empty folders; what is unfinished keeps its own
            for empty in (f"{folder}/{INTERMEDIATES}", f"{folder}/{STATE_FOLDER}", *([folder] if fresh else ())):
                with contextlib.suppress(OSError):
                    os.rmdir(empty)
        raise
    finally:
        for store in places.values():
            if destination is None and isinstance(store, MemoryStore) and store.uri.startswith(root):
                store.files.clear()


def _recorded(plan: MergePlan) -> tuple[tuple[str, MergePlan], ...]:
    """What the card and the record of a result say of the documents behind it: their sources, and no tensors."""
    wanted = documents_read(plan)
    return tuple(
        (name, MergePlan(sources=tuple(map(_bare, made.sources)), outputs=(), tasks=(), device=made.device))
        for name, made in plan.before
        if name in wanted
    )


def _bare(source: Source) -> Source:
    return replace(source, catalog=replace(source.catalog, tensors={}, modules={}))


def _placed(plan: MergePlan, path: str) -> MergePlan:
    first, *others = plan.outputs
    return replace(plan, outputs=(replace(first, path=path), *others))


def plans_of(plan: MergePlan) -> Mapping[str, MergePlan]:
    """Every plan of a file by the name of its document; the result's is empty."""
    return {**dict(plan.before), "": plan}
