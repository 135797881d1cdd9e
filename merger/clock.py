"""What a process spends its time on, and how many bytes go where: `METER`, and one `Clock` for each thread of a crew.

A thread does one thing at a time: it waits for a job, reads, computes or writes. A clock adds the seconds up; with a
`SpanLog` it also keeps when each of them began and ended, for a timeline (merger/timeline.py). Nothing here decides a
byte, and without a log a turn costs a look at the time and an addition.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

from merger.storage.base import Sink, Store

Activity = Literal["wait", "read", "compute", "write"]
ACTIVITIES: Final[tuple[Activity, ...]] = ("wait", "read", "compute", "write")
SCHEMES: Final = ("local", "s3", "hub", "memory")
SPAN_LIMIT: Final = 20_000
"""Spans that a process keeps until they are fetched; more are counted and dropped."""


def scheme_of(store: Store) -> str:
    """The kind of place that a store is, one of SCHEMES."""
    return _KINDS.get(store.uri.partition("://")[0] if "://" in store.uri else store.uri.partition(":")[0], "local")


_KINDS: Final[Mapping[str, str]] = {"s3": "s3", "hf": "hub", "memory": "memory"}


def scheme_of_sink(sink: Sink) -> str:
    """The kind of place that an output goes to."""
    store = getattr(sink, "store", None)  # a repository's sink has none: it stages elsewhere
    return "hub" if store is None else scheme_of(store)


# ---- spans -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Span:
    """What one thread did from one moment to another."""

    thread: int
    start_ns: int
    """Since the epoch, by this process's clock: it never runs backwards."""
    end_ns: int
    kind: Literal["wait", "read", "compute", "write", "job"]
    name: str
    facts: tuple[tuple[str, str | int], ...] = ()


class SpanLog:
    """The spans of a process since they were last taken."""

    def __init__(self, limit: int = SPAN_LIMIT) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._spans: list[Span] = []
        self._dropped = 0

    def add(self, span: Span) -> None:
        with self._lock:
            if len(self._spans) < self._limit:
                self._spans.append(span)
            else:
                self._dropped += 1

    def take(self) -> tuple[tuple[Span, ...], int]:
        """The spans, and how many were dropped."""
        with self._lock:
            taken, self._spans = self._spans, []
            dropped, self._dropped = self._dropped, 0
        return tuple(taken), dropped


_STARTED_NS: Final = time.time_ns() - time.perf_counter_ns()


def now_ns() -> int:
    """Nanoseconds since the epoch, steadily."""
    return _STARTED_NS + time.perf_counter_ns()


# ---- counts ----------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Meter:
    """What this process has read, written and spent its time on since it began."""

    read_bytes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SCHEMES, 0))
    """By the scheme of the source."""
    written_bytes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SCHEMES, 0))
    """By the scheme of the output."""
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(ACTIVITIES, 0.0))
    """Of all threads together, by activity."""
    network_seconds: float = 0.0
    """Of what was spent on reading: from places that lie behind a network."""
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    _pid: int = field(default_factory=os.getpid, repr=False)

    def read(self, store: Store, nbytes: int) -> None:
        with self._lock:
            self.read_bytes[scheme_of(store)] += nbytes

    def wrote(self, scheme: str, nbytes: int) -> None:
        with self._lock:
            self.written_bytes[scheme] += nbytes

    def spent(self, activity: Activity, seconds: float, *, network: bool = False) -> None:
        with self._lock:
            self.seconds[activity] += seconds
            if network:
                self.network_seconds += seconds


METER: Final = Meter()


# ---- one thread ------------------------------------------------------------------------------------------------------


class Clock:
    """What one thread is doing. Made and used by that thread."""

    def __init__(self, thread: int = 0, spans: SpanLog | None = None) -> None:
        self._thread = thread
        self._spans = spans
        self._doing: Activity = "wait"
        self._since = now_ns()
        self._facts: tuple[tuple[str, str | int], ...] = ()
        self._network = False

    def turn(
        self, activity: Activity, facts: tuple[tuple[str, str | int], ...] = (), *, network: bool = False
    ) -> Activity:  # fmt: skip
        """From now on the thread does this. Returns what it did until now."""
        now, before = now_ns(), self._doing
        METER.spent(before, (now - self._since) / 1e9, network=self._network)
        if self._spans is not None and now > self._since:
            self._spans.add(Span(self._thread, self._since, now, before, before, self._facts))
        self._doing, self._since, self._facts, self._network = activity, now, facts, network
        return before

    @contextlib.contextmanager
    def reading(self, store: Store, name: str, nbytes: int) -> Iterator[None]:
        """While bytes of a source come."""
        before = self.turn("read", (("file", name), ("bytes", nbytes)), network=store.remote)
        try:
            yield
            METER.read(store, nbytes)
        finally:
            self.turn(before)

    @contextlib.contextmanager
    def fetching(self, files: int, nbytes: int) -> Iterator[None]:
        """While bytes of several files come over the network at once. Who fetches them counts them."""
        before = self.turn("read", (("files", files), ("bytes", nbytes)), network=True)
        try:
            yield
        finally:
            self.turn(before)

    @contextlib.contextmanager
    def writing(self, scheme: str, name: str, nbytes: int) -> Iterator[None]:
        """While bytes of an output go."""
        before = self.turn("write", (("file", name), ("bytes", nbytes)))
        try:
            yield
            METER.wrote(scheme, nbytes)
        finally:
            self.turn(before)

    @contextlib.contextmanager
    def job(self, name: str) -> Iterator[None]:
        """While a job is under way: whatever is neither read nor written then is computed."""
        self.turn("compute")
        start = self._since
        try:
            yield
        finally:
            self.turn("wait")
            if self._spans is not None and self._since > start:
                self._spans.add(Span(self._thread, start, self._since, "job", name))
