"""Files in this process's memory: for tests, and for merges of merges that never touch a disk.

Stores of the same `name` share their files, so a store may be pickled within the process.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

from merger.errors import MergeFailedError, SourceChangedError, SourceError
from merger.storage.base import FileStat, RangeRead

_PLACES: dict[str, dict[str, bytearray]] = {}
_LOCK = threading.Lock()


@dataclass(frozen=True, slots=True)
class MemoryStore:
    """A named place in memory, reached as `memory://name`."""

    name: str
    limit_bytes: int | None = field(default=None, compare=False)
    """Pretended capacity, to play a full disk; None for no limit."""

    @property
    def uri(self) -> str:
        return f"memory://{self.name}"

    @property
    def files(self) -> dict[str, bytearray]:
        with _LOCK:
            return _PLACES.setdefault(self.name, {})

    def list_files(self) -> tuple[str, ...]:
        return tuple(sorted(self.files))

    def stat(self, name: str) -> FileStat:
        data = self._data(name)
        return FileStat(len(data), "memory:" + hashlib.sha256(data).hexdigest()[:16])

    def read_into(self, name: str, reads: Sequence[RangeRead], *, pin: str | None = None) -> None:
        data = self._data(name)
        if pin is not None and self.stat(name).pin != pin:
            raise SourceChangedError.of("source-changed", f"{name} is no longer the file that was planned",
                                        where=self.uri, fix="run again with --restart")  # fmt: skip
        for read in reads:
            stop = read.start + read.into.nbytes
            if stop > len(data):
                raise SourceError.of("truncated", f"{name} ends before byte {stop}", where=self.uri)
            read.into.cast("B")[:] = memoryview(data)[read.start : stop]

    def _data(self, name: str) -> bytearray:
        try:
            return self.files[name]
        except KeyError:
            raise SourceError.of("no-such-file", f"there is no file {name}", where=self.uri) from None

    def free_bytes(self) -> int | None:
        return None if self.limit_bytes is None else self.limit_bytes - sum(map(len, self.files.values()))

    def _reserve(self, name: str, size: int) -> None:
        free = self.free_bytes()
        if free is not None and size - len(self.files.get(name, b"")) > free:
            raise MergeFailedError.of("disk-full", f"no room for {size} bytes of {name}", where=self.uri)

    def allocate(self, name: str, size: int) -> None:
        if len(self.files.get(name, b"")) != size or name not in self.files:
            self._reserve(name, size)
            self.files[name] = bytearray(size)

    def write_at(self, name: str, offset: int, data: memoryview) -> None:
        self.files[name][offset : offset + data.nbytes] = data.cast("B")

    def commit(self, scratch: str, name: str) -> None:
        self.files[name] = self.files.pop(scratch)

    def put(self, name: str, data: bytes, *, exclusive: bool = False) -> None:
        if exclusive and name in self.files:
            raise FileExistsError(name)
        self._reserve(name, len(data))
        self.files[name] = bytearray(data)

    def remove(self, name: str) -> None:
        self.files.pop(name, None)
