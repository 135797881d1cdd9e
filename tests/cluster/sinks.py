"""Outputs that harm the worker that writes them, or are not where they seem. Workers import them from here."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from merger.storage import LocalStore
from merger.storage.base import Sink
from merger.storage.filled import FilledSink, FilledWriter, scratch_name


def filled(sinks: Sequence[Sink]) -> FilledSink:
    (sink,) = sinks
    assert isinstance(sink, FilledSink)
    return sink


@dataclass(slots=True)
class PoisonSink(FilledSink):
    """Whoever writes at this byte of this file is killed on the spot."""

    file: str = ""
    byte: int = 0
    log: str = ""
    """A file in which each death is noted."""

    def writer(self) -> FilledWriter:
        return _PoisonWriter(self.store, self.file, self.byte, self.log)


@dataclass(frozen=True, slots=True)
class _PoisonWriter(FilledWriter):
    file: str
    byte: int
    log: str

    def write(self, file: str, offset: int, data: memoryview) -> None:
        if file == self.file and offset <= self.byte < offset + data.nbytes:
            with Path(self.log).open("a") as log:
                log.write(f"{os.getpid()}\n")
            os.kill(os.getpid(), signal.SIGKILL)
        self.store.write_at(scratch_name(file), offset, data)


@dataclass(slots=True)
class NarrowSink(FilledSink):
    """Takes a few bytes at a time: a worker that brings more finds no memory for them."""

    limit: int = 0
    hog: int = 0
    """Bytes to take, and hold, before it says so: until the memory monitor kills the worker."""

    def writer(self) -> FilledWriter:
        return _NarrowWriter(self.store, self.limit, self.hog)


@dataclass(frozen=True, slots=True)
class _NarrowWriter(FilledWriter):
    limit: int
    hog: int

    def write(self, file: str, offset: int, data: memoryview) -> None:
        if data.nbytes > self.limit:
            held = [bytearray(os.urandom(1 << 20)) * 16 for _ in range(self.hog >> 24)]
            while held:
                time.sleep(1)
            raise MemoryError(f"{data.nbytes} bytes")
        self.store.write_at(scratch_name(file), offset, data)


@dataclass(frozen=True, slots=True)
class ElsewhereStore(LocalStore):
    """As if workers had a folder of their own under this name: what is sent to them is another one."""

    def __reduce__(self) -> tuple[Any, ...]:
        return LocalStore, (f"{self.root}-elsewhere",)


def elsewhere(sinks: Sequence[Sink]) -> FilledSink:
    sink = filled(sinks)
    assert isinstance(sink.store, LocalStore)
    return replace(sink, store=ElsewhereStore(sink.store.root))
