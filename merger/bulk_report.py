"""What becomes of the merges of a bulk, while it runs and at its end: nouns for people and for scripts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

from merger.errors import Problem, RaymergeError, StoppedError
from merger.report import MergeReport
from merger.tensors import format_size

State = Literal["done", "already done", "failed", "refused", "stopped", "not run"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeOutcome:
    """What became of one merge of a bulk."""

    label: str
    state: State
    path: str
    report: MergeReport | None = None
    error: BaseException | None = None

    @property
    def problems(self) -> tuple[Problem, ...]:
        if self.error is None:
            return ()
        if isinstance(self.error, RaymergeError):
            return self.error.problems
        return (Problem("internal", f"{type(self.error).__name__}: {self.error}", fix="report this"),)

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.label, "state": self.state, "path": self.path,
            "report": None if self.report is None else self.report.as_json(),
            "problems": [problem.as_json() for problem in self.problems],
        }  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class BulkReport:
    """The outcome of a bulk, for people and for scripts."""

    merges: tuple[MergeOutcome, ...]
    seconds: float
    stopped: StoppedError | None = None

    @property
    def failures(self) -> tuple[MergeOutcome, ...]:
        return tuple(merge for merge in self.merges if merge.state in ("failed", "refused"))

    @property
    def bytes_read(self) -> int:
        return sum(merge.report.bytes_read for merge in self.merges if merge.report is not None)

    @property
    def bytes_written(self) -> int:
        return sum(merge.report.bytes_written for merge in self.merges if merge.report is not None)

    def count(self, state: State) -> int:
        return sum(merge.state == state for merge in self.merges)

    def as_json(self) -> dict[str, Any]:
        states = dict.fromkeys(merge.state for merge in self.merges)
        return {
            "version": 1,
            "merges": [merge.as_json() for merge in self.merges],
            "states": {state: self.count(state) for state in states},
            "seconds": self.seconds,
            "bytes_read": self.bytes_read,
            "bytes_written": self.bytes_written,
        }

    def lines(self) -> list[str]:
        """One table and its sums."""
        width = max((len(merge.label) for merge in self.merges), default=0)
        found = []
        for merge in self.merges:
            more = f"{merge.path}"
            if merge.report is not None and not merge.report.already_done:
                more = (
                    f"{format_size(merge.report.bytes_written):>10}  {merge.report.content_digest[:12]}  {merge.path}"
                )
            elif merge.problems:
                more = merge.problems[0].what
            found.append(f"{merge.label:<{width}}  {merge.state:<12}  {more}")
        states = dict.fromkeys(merge.state for merge in self.merges)
        found.append(
            ", ".join(f"{self.count(state)} {state}" for state in states)
            + f"; read {format_size(self.bytes_read)}, wrote {format_size(self.bytes_written)} in {self.seconds:.1f} s"
        )
        return found


@dataclass(frozen=True, slots=True)
class BulkProgress:
    """How far a bulk is."""

    merges_ended: int
    merges: int
    failures: int
    under_way: int
    bytes_read: int
    bytes_written: int
    seconds: float


class BulkListener(Protocol):
    def __call__(self, progress: BulkProgress, /) -> None: ...
