"""The sink of places that can be filled at any offset: a file system, or memory.

Files grow under `.raymerge/parts/` beside the output and are renamed, one by one, when they are published.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from merger.errors import SourceError
from merger.storage.base import FileLayout, FillableStore, RangeRead

SCRATCH_FOLDER: Final = ".raymerge/parts"


def scratch_name(file: str) -> str:
    """Where an output file grows until it is whole."""
    return f"{SCRATCH_FOLDER}/{file}"


BATCH_BYTES: Final = 1 << 20
"""Written in a millisecond or so."""


@dataclass(frozen=True, slots=True)
class FilledWriter:
    """Writes straight through: whatever `write` took outlives this process."""

    store: FillableStore

    def write(self, file: str, offset: int, data: memoryview) -> None:
        self.store.write_at(scratch_name(file), offset, data)

    def flush(self) -> None:
        """Nothing is held back."""


@dataclass(slots=True)
class FilledSink:
    """The files of one output on a file system. See `merger.storage.base.Sink`."""

    store: FillableStore
    _files: dict[str, FileLayout] = field(default_factory=dict)
    _published: set[str] = field(default_factory=set)

    @property
    def seals(self) -> bool:
        return False

    @property
    def batch_bytes(self) -> int:
        """Flushing is nothing here, but handing a job to another process costs a millisecond."""
        return BATCH_BYTES

    def writer_bytes(self, files: Sequence[FileLayout]) -> int:
        del files
        return 0

    def probe(self) -> None:
        """A file system has nothing to prove."""

    def begin(self, files: Sequence[FileLayout]) -> None:
        names = set(self.store.list_files())
        self._files = {file.name: file for file in files}
        self._published = {
            file.name
            for file in files
            if scratch_name(file.name) not in names and file.name in names and self._starts_right(file)
        }
        for file in files:
            if file.name not in self._published:
                self._grow(file)

    def _grow(self, file: FileLayout) -> None:
        self.store.allocate(scratch_name(file.name), file.size)
        if file.prefix:
            self.store.write_at(scratch_name(file.name), 0, memoryview(file.prefix))

    def published(self) -> frozenset[str]:
        return frozenset(self._published)

    def _starts_right(self, file: FileLayout) -> bool:
        """Whether what lies under the final name may be that file: its size and its first bytes are right."""
        if self.store.stat(file.name).size != file.size:
            return False
        start = bytearray(len(file.prefix))
        if start:
            self.store.read_into(file.name, [RangeRead(0, memoryview(start))])
        return start == file.prefix

    def holds(self, file: str, start: int, end: int, sha256: str) -> bool:
        place = file if file in self._published else scratch_name(file)
        buffer = bytearray(end - start)
        try:
            if buffer:
                self.store.read_into(place, [RangeRead(start, memoryview(buffer))])
        except SourceError:
            return False
        return hashlib.sha256(buffer).hexdigest() == sha256

    def reopen(self, file: str) -> None:
        self._published.discard(file)
        self._grow(self._files[file])

    def writer(self) -> FilledWriter:
        return FilledWriter(self.store)

    def seal(self, file: str) -> object:
        """A file of the right size at the right offsets needs no more."""
        del file
        return None

    def sealed(self, file: str, outcome: object) -> None:
        """See `seal`."""

    def stage(self, name: str, data: bytes) -> None:
        self.store.put(scratch_name(name), data)

    def publish(self, name: str, *, exclusive: bool = True) -> None:
        """Rename. A run that owns the output's lease is alone here: `exclusive` has nothing to add."""
        del exclusive
        with contextlib.suppress(SourceError):  # an earlier run, cut short here, published it
            self.store.stat(scratch_name(name))
            self.store.commit(scratch_name(name), name)

    def remove(self, name: str) -> None:
        self.store.remove(name)

    def conclude(self, message: str) -> None:
        """Each file appeared when it was published."""

    def abandon(self, files: Sequence[str]) -> None:
        for name in files:
            self.store.remove(scratch_name(name))
