"""Files in this process's memory: for tests, and for merges of merges that never touch a disk.

Stores of the same `name` share their files, so a store may be pickled within the process.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

from merger.errors import MergeFailedError, SourceChangedError, SourceError
from merger.storage.base import FileStat, RangeRead, check_name

_PLACES: dict[str, dict[str, bytearray]] = {}
_LOCK = threading.RLock()


def forget(name: str) -> None:
    """Free the files of a place, and of the places under it."""
    with _LOCK:
        for place in [place for place in _PLACES if place == name or place.startswith(f"{name}/")]:
            _PLACES.pop(place).clear()


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
    def remote(self) -> bool:
        return False

    @property
    def files(self) -> dict[str, bytearray]:
        with _LOCK:
            return _PLACES.setdefault(self.name, {})

    def list_files(self) -> tuple[str, ...]:
        with _LOCK:
            return tuple(sorted(self.files))

    def resolve(self, names: Sequence[str]) -> None:
        """Nothing to find out beforehand."""

    def stat(self, name: str) -> FileStat:
        data = self._data(name)
        return FileStat(len(data), "memory:" + hashlib.sha256(data).hexdigest()[:16])

    def read_into(self, name: str, reads: Sequence[RangeRead], *, pin: str | None = None) -> None:
        try:
            data = self._data(name)
        except SourceError as error:
            if pin is None:
                raise
            raise self._changed(name) from error
        if pin is not None and self.stat(name).pin != pin:
            raise self._changed(name)
        for read in reads:
            stop = read.start + read.into.nbytes
            if stop > len(data):
                raise SourceError.of(
                    "truncated", f"{name} ends before byte {stop}", where=f"{self.uri}/{name}",
                    why="the header promises more bytes than the file has", fix="fetch the file again",
                )  # fmt: skip
            read.into.cast("B")[:] = memoryview(data)[read.start : stop]

    def _changed(self, name: str) -> SourceChangedError:
        return SourceChangedError.of(
            "source-changed", f"{name} is no longer the file that was planned", where=f"{self.uri}/{name}",
            why="its bytes changed after the plan was made",
            fix="run the same command again with --restart: it plans from the new file",
        )  # fmt: skip

    def _data(self, name: str) -> bytearray:
        check_name(name, self.uri)
        with _LOCK:
            data = self.files.get(name)
        if data is None:
            raise SourceError.of(
                "no-such-file", f"there is no file {name}", where=f"{self.uri}/{name}", fix="check the reference"
            )
        return data

    def free_bytes(self) -> int | None:
        with _LOCK:
            return None if self.limit_bytes is None else self.limit_bytes - sum(map(len, self.files.values()))

    def _reserve(self, name: str, size: int) -> None:
        free = self.free_bytes()
        if free is not None and size - len(self.files.get(name, b"")) > free:
            raise MergeFailedError.of(
                "disk-full", f"no room for {size} bytes of {name}: {free} are free", where=self.uri,
                why="the store's limit is reached", fix="free space and run the same command again: it resumes",
            )  # fmt: skip

    def allocate(self, name: str, size: int) -> None:
        check_name(name, self.uri)
        with _LOCK:
            if name not in self.files or len(self.files[name]) != size:
                self._reserve(name, size)
                self.files[name] = bytearray(size)

    def write_at(self, name: str, offset: int, data: memoryview) -> None:
        check_name(name, self.uri)
        with _LOCK:
            target = self.files.get(name)
            if target is None or offset + data.nbytes > len(target):
                raise MergeFailedError.of(
                    "write-failed", f"{name} has no room at byte {offset}", where=f"{self.uri}/{name}",
                    why="it was not allocated, or with another size", fix="run the same command again: it resumes",
                )  # fmt: skip
            target[offset : offset + data.nbytes] = data.cast("B")

    def commit(self, scratch: str, name: str) -> None:
        check_name(scratch, self.uri)
        check_name(name, self.uri)
        with _LOCK:
            if scratch not in self.files:
                raise MergeFailedError.of(
                    "write-failed", f"{scratch} is gone", where=f"{self.uri}/{scratch}",
                    why="something removed it", fix="run the same command again",
                )  # fmt: skip
            self.files[name] = self.files.pop(scratch)

    def put(self, name: str, data: bytes, *, exclusive: bool = False, replacing: str | None = None) -> None:
        check_name(name, self.uri)
        with _LOCK:
            if exclusive and name in self.files:
                raise FileExistsError(name)
            if replacing is not None and (name not in self.files or self.stat(name).pin != replacing):
                raise FileExistsError(name)
            self._reserve(name, len(data))
            self.files[name] = bytearray(data)

    def remove(self, name: str) -> None:
        check_name(name, self.uri)
        with _LOCK:
            self.files.pop(name, None)
