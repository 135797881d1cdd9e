"""Merges that other merges read: each is made before what names it, in memory where it fits, else beside the output.

What is made, and rounded to its own dtype, is what the same documents merged one after another by hand would be. An
intermediate lies under `.raymerge/intermediates/` of the output that needs it, is an output of its own (with journal
and lease, so it resumes) and goes away with that output's state. One with an `output.path` is written there and stays.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from merger.destination import Destination, open_destination
from merger.documents import bytes_beside, documents_read, needed, plans_of
from merger.made import with_made
from merger.planning.memory import peak_bytes
from merger.planning.nouns import MergePlan, Source
from merger.storage import LocalStore, Store
from merger.storage.memory import forget

MEMORY_SHARE = 2
"""Intermediates may take this part of what is allowed: a half."""


def bytes_in_memory(plan: MergePlan, allowed: int) -> int | None:
    """Bytes that all intermediates which are not kept take, or None where they are more than memory has room for."""
    total = bytes_beside(plan)
    work = max(peak_bytes(one) for one in plans_of(plan).values())
    return total if total <= min(allowed // MEMORY_SHARE, allowed - work) else None


class Intermediates:
    """What a plan reads of other documents, while it is made."""

    def __init__(self, plan: MergePlan, root: str) -> None:
        self._plan = plan
        self._root = root
        self._places: dict[str, Store] = {}

    def plans(self, *, result: bool) -> Iterator[tuple[str, MergePlan]]:
        """What has to be made, one after another: each reads what was `add`ed before it is asked for. `result`: also
        what only the result reads."""
        for name, made in needed(self._plan, result=result):
            path = made.outputs[0].path or f"{self._root}/{name}"
            yield name, with_made(_placed(made, path), self._places)

    def add(self, name: str, path: str) -> None:
        """One of them was made there."""
        self._places[name] = open_destination(path).content

    def ready(self) -> MergePlan:
        """The plan, reading what was made. One that reads nothing of the kind stays itself, digest and all."""
        if not self._plan.before:
            return self._plan
        return replace(with_made(self._plan, self._places), before=_recorded(self._plan))

    def forget(self) -> None:
        """Free what lies in memory."""
        forget(self._root.removeprefix("memory://"))


@contextlib.contextmanager
def between(plan: MergePlan, destination: Destination | None) -> Iterator[Intermediates]:
    """The intermediates of a plan. With a `destination` they lie in its state; without, in this process's memory, until
    the block ends."""
    from merger.journal import INTERMEDIATES, STATE_FOLDER

    root = (
        f"memory://raymerge-{uuid.uuid4().hex}" if destination is None else f"{destination.state.uri}/{INTERMEDIATES}"
    )
    folder = destination.state.root if destination is not None and isinstance(destination.state, LocalStore) else None
    fresh = folder is not None and not os.path.exists(folder)
    made = Intermediates(plan, root)
    try:
        yield made
    except BaseException:  # whatever ended it, a stop too, empty folders go
        if folder is not None:  # what was refused leaves no empty folders; what is unfinished keeps its own
            for empty in (f"{folder}/{INTERMEDIATES}", f"{folder}/{STATE_FOLDER}", *([folder] if fresh else ())):
                with contextlib.suppress(OSError):
                    os.rmdir(empty)
        raise
    finally:
        if destination is None:
            made.forget()


@contextlib.contextmanager
def made_first(
    plan: MergePlan, destination: Destination | None, run: Callable[[MergePlan], Any], *, result: bool = True
) -> Iterator[MergePlan]:
    """Make what a plan reads, and give the plan that reads it. `run` runs one plan to its end."""
    with between(plan, destination) as made:
        for name, one in made.plans(result=result):
            made.add(name, run(one).path)
        yield made.ready()


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
