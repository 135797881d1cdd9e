"""Every error raymerge raises, and the one shape they share.

    RaymergeError            what · where · why · how to fix
    ├── RefusedError         it cannot start; nothing was written
    │   ├── ManifestError    the manifest or the arguments are wrong
    │   ├── SourceError      an input cannot be read or is not what it claims to be
    │   └── PlanError        the inputs do not fit each other, the method or the machine
    ├── OutputExistsError    the output is there already, and it is something else
    ├── MergeFailedError     the merge itself went wrong (NaN, disk full, a changed source, a digest mismatch)
    │   └── SourceChangedError   an input is no longer the one that was planned
    ├── InfrastructureError  worth a retry: no cluster, a lease that is held, a lost worker
    └── StoppedError         stopped by a signal; the same command resumes

Errors cross process boundaries, so each of them survives pickling (tests/merger/test_errors.py).
Exit codes belong to the command line: see jobs/cli.py.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final, Self

_EXAMPLES: Final = 3


def escape(text: str) -> str:
    """Make a string that came from an input safe to print: control characters become escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name most like `name`, or None when nothing is near."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return found[0] if found else None


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong: a stable code and the four parts a person needs."""

    code: str
    what: str
    where: str = ""
    why: str = ""
    fix: str = ""

    def as_json(self) -> dict[str, str]:
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"{self.code}: {escape(self.what)}"]
        lines += [
            f"  {label:<6} {escape(text)}"
            for label, text in (("where", self.where), ("why", self.why), ("fix", self.fix))
            if text
        ]
        return "\n".join(lines)


def grouped(found: Sequence[tuple[str, Problem]]) -> list[Problem]:
    """Problems of tensors by their names, where many tensors have the same one: said once, of the first, with the
    number of others and some of their names."""
    same: dict[Problem, list[tuple[str, Problem]]] = {}
    for name, problem in found:
        plain = Problem(*(text.replace(name, "…") if name else text for text in asdict(problem).values()))
        held = same.setdefault(plain, [])
        if all(problem != other for _, other in held):
            held.append((name, problem))
    told = []
    for held in same.values():
        (_, first), *others = held
        named = ", ".join(name for name, _ in others[:_EXAMPLES])
        more = f"; and so with {len(others)} more, such as {named}" if others else ""
        told.append(replace(first, what=first.what + more))
    return told


class RaymergeError(Exception):
    """Base of the tree. `problems` holds one Problem or, where several were found at once, all of them."""

    def __init__(self, problems: Problem | Sequence[Problem]) -> None:
        self.problems: tuple[Problem, ...] = (problems,) if isinstance(problems, Problem) else tuple(problems)
        super().__init__("\n".join(str(p) for p in self.problems))

    @classmethod
    def of(cls, code: str, what: str, *, where: str = "", why: str = "", fix: str = "") -> Self:
        return cls(Problem(code, what, where, why, fix))

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.problems, self.__dict__)


def _rebuild(kind: type[RaymergeError], problems: tuple[Problem, ...], state: dict[str, Any]) -> RaymergeError:
    error = kind(problems)
    error.__dict__.update(state)
    return error


class RefusedError(RaymergeError):
    """It cannot start. Nothing was written."""


class ManifestError(RefusedError):
    """The manifest or the arguments are wrong."""


class SourceError(RefusedError):
    """An input cannot be read, or is not what it claims to be."""


class PlanError(RefusedError):
    """The inputs do not fit each other, the method or the machine."""


class OutputExistsError(RaymergeError):
    """The output exists and is something else."""


class MergeFailedError(RaymergeError):
    """The merge itself went wrong after it had started."""


class SourceChangedError(MergeFailedError):
    """An input is no longer the one that was planned."""


class InfrastructureError(RaymergeError):
    """Worth a retry: the machine or the network, not the merge."""


class StoppedError(RaymergeError):
    """Stopped by a signal; the same command resumes the run."""

    signal_number: int = 2
