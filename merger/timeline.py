"""A timeline of a run as a file: Chrome's trace events, which Perfetto (ui.perfetto.dev) and chrome://tracing open.

One process in it is one worker, one row is one of its threads. A row's jobs lie on it end to end, and inside each of
them what its thread did: read, compute, write. Between two jobs it waits. Spans go to the file as they come, so that
memory stays bounded; the file is whole once it is closed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, TextIO

from merger.clock import Span
from merger.errors import ManifestError
from merger.events import Event, shown

TRACE_LIMIT: Final = 1_000_000
"""Spans in one file (about 150 bytes each); later ones are counted and left out."""
DRIVER: Final = 0
"""The number of the driver among the workers."""


def trace_event(worker: int, span: Span, began_ns: int) -> dict[str, Any]:
    """A complete event ("X"): microseconds since the timeline began."""
    return {
        "name": shown(span.name), "cat": span.kind, "ph": "X", "pid": worker, "tid": span.thread,
        "ts": (span.start_ns - began_ns) / 1000, "dur": (span.end_ns - span.start_ns) / 1000,
        "args": {key: shown(value) for key, value in span.facts},
    }  # fmt: skip


class TimelineFile:
    """Takes spans and events until it is closed. Used by one thread."""

    def __init__(self, path: str | Path, began_ns: int) -> None:
        """Raises ManifestError(code `bad-arguments`) where no such file can be written."""
        self.path = str(path)
        self._began_ns = began_ns
        self._count = self._left_out = 0
        self._known: set[tuple[int, int]] = set()
        try:
            self._file: TextIO = open(path, "w", encoding="utf-8")  # noqa: SIM115 - closed by `close`
        except OSError as error:
            raise ManifestError.of(
                "bad-arguments", f"no timeline can be written there: {error.strerror}", where=f"--timeline {path}",
                why="it is a file of this machine", fix="name a file in a folder that is there",
            ) from None  # fmt: skip
        self._file.write('{"displayTimeUnit":"ms","traceEvents":[\n')
        self._first = True
        self._name(DRIVER, "driver")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def add(self, worker: int, spans: Iterable[Span], *, dropped: int = 0) -> None:
        """What a worker did. Workers are numbered from 1. `dropped` spans it could not keep."""
        self._left_out += dropped
        for span in spans:
            if self._count >= TRACE_LIMIT:
                self._left_out += 1
                continue
            self._count += 1
            if (worker, span.thread) not in self._known:
                self._known.add((worker, span.thread))
                self._name(worker, f"worker {worker}", span.thread)
            self._put(trace_event(worker, span, self._began_ns))

    def mark(self, event: Event) -> None:
        """Something that happened, as a mark over all rows."""
        if self._count < TRACE_LIMIT:
            self._count += 1
            at = max(0.0, event.at * 1e6 - self._began_ns / 1000)
            document = event.as_json()
            self._put(
                {"name": document.pop("event"), "cat": "event", "ph": "i", "s": "g", "pid": DRIVER, "tid": 0, "ts": at,
                 "args": document}
            )  # fmt: skip

    def close(self) -> None:
        """Make the file whole. May be called again."""
        if self._file.closed:
            return
        self._file.write('\n],"otherData":' + json.dumps({"spans": self._count, "left_out": self._left_out}) + "}\n")
        self._file.close()

    def _name(self, worker: int, name: str, thread: int | None = None) -> None:
        self._put({"name": "process_name", "ph": "M", "pid": worker, "tid": 0, "args": {"name": name}})
        if thread is not None:
            label = {"name": f"thread {thread}"}
            self._put({"name": "thread_name", "ph": "M", "pid": worker, "tid": thread, "args": label})

    def _put(self, document: Mapping[str, Any]) -> None:
        self._file.write(("" if self._first else ",\n") + json.dumps(document, separators=(",", ":")))
        self._first = False
