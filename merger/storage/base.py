"""The seam between raymerge and wherever bytes live. One file a transport implements it; one conformance suite
(tests/conformance/test_storage.py) runs against every one of them.

A `Store` is rooted at one reference (a folder, a repository at a revision, a prefix). Names in it are relative,
`/`-separated, and never climb out of the root.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Protocol, runtime_checkable

from merger.errors import SourceError


@dataclass(frozen=True, slots=True)
class FileStat:
    """Size of a file and the pin that says whether it is still the same file."""

    size: int
    """Bytes."""
    pin: str
    """Opaque and comparable: size, mtime and inode of a local file; an ETag; a commit."""


@dataclass(frozen=True, slots=True)
class RangeRead:
    """One read: bytes [start, start + len(into)) of the file go into `into`."""

    start: int
    into: memoryview


@runtime_checkable
class Store(Protocol):
    """Reads. Thread-safe; picklable, so that a worker can be handed one."""

    @property
    def uri(self) -> str:
        """What the user would write to name this place."""
        ...

    def list_files(self) -> tuple[str, ...]:
        """Names of all files below the root, sorted."""
        ...

    def stat(self, name: str) -> FileStat:
        """Size and pin. Raises SourceError(code `no-such-file`)."""
        ...

    def read_into(self, name: str, reads: Sequence[RangeRead], *, pin: str | None = None) -> None:
        """Fill every buffer, wholly. With `pin`, first check that the file is still that one.

        Raises SourceError for a short read, SourceChangedError when the pin no longer holds or the pinned file is gone.
        """
        ...


@runtime_checkable
class WritableStore(Store, Protocol):
    """Writes. A file is created under a scratch name at its full size, filled at offsets by any number of workers,
    then committed: it appears under its final name whole, or not at all."""

    def free_bytes(self) -> int | None:
        """Free space, or None where there is no such limit."""
        ...

    def allocate(self, name: str, size: int) -> None:
        """Reserve `size` bytes under `name`. Keeps what is there if the size is right (a resumed run).

        Raises MergeFailedError(code `disk-full`) without leaving a partial reservation.
        """
        ...

    def write_at(self, name: str, offset: int, data: memoryview) -> None:
        """Write into an allocated file. Any worker, any order; the same bytes twice are harmless.

        Raises MergeFailedError: `disk-full`, or `write-failed` where the file was not allocated or the medium fails.
        """
        ...

    def commit(self, scratch: str, name: str) -> None:
        """Make `scratch` durable and let it appear as `name`, atomically."""
        ...

    def put(self, name: str, data: bytes, *, exclusive: bool = False) -> None:
        """Write a small file atomically. With `exclusive`, raises FileExistsError when it is already there."""
        ...

    def remove(self, name: str) -> None:
        """Remove a file if it is there, and folders that this leaves empty (never the root's parent)."""
        ...


def check_name(name: str, where: str) -> PurePosixPath:
    """The parts of a name. Raises SourceError(code `path-escapes`) when it would climb out of the store's root."""
    parts = PurePosixPath(name)
    if not parts.parts or parts.is_absolute() or ".." in parts.parts or "\\" in name or "\0" in name:
        raise SourceError.of(
            "path-escapes",
            f"the file name {name!r} leaves its folder",
            where=where,
            why="names inside a source or an output are relative and never climb",
            fix="do not use this source: its index was made by hand or with intent",
        )
    return parts


def read_whole(store: Store, name: str, *, limit: int) -> bytes:
    """A small file, whole. Raises SourceError when it is larger than `limit` bytes."""
    size = store.stat(name).size
    if size > limit:
        raise SourceError.of(
            "file-too-large",
            f"{name} has {size} bytes, more than the {limit} that such a file may have",
            where=f"{store.uri}/{name}",
            fix="check that this is the file you meant",
        )
    buffer = bytearray(size)
    if size:
        store.read_into(name, [RangeRead(0, memoryview(buffer))])
    return bytes(buffer)
