"""The seam between raymerge and wherever bytes live. One file a transport implements it; one conformance suite
(tests/conformance/test_storage.py) runs against every one of them.

A `Store` is rooted at one reference (a folder, a repository at a revision, a prefix). Names in it are relative,
`/`-separated, and never climb out of the root.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Final, Protocol, runtime_checkable

from merger.errors import SourceChangedError, SourceError


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

    @property
    def remote(self) -> bool:
        """Whether each read costs a round trip: then all that a unit reads is fetched at once, before it starts."""
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

    def resolve(self, names: Sequence[str]) -> None:
        """Do now, once for all workers, what finding these files costs; the result travels with the store."""
        ...


@runtime_checkable
class WritableStore(Store, Protocol):
    """A place that small files can be put into, each whole or not at all: states, receipts, leases, pointers."""

    def free_bytes(self) -> int | None:
        """Free space, or None where there is no such limit."""
        ...

    def put(self, name: str, data: bytes, *, exclusive: bool = False, replacing: str | None = None) -> None:
        """Write a small file atomically.

        With `exclusive`, raises FileExistsError when there is one already; with `replacing`, when the one that is there
        is not (or no longer) the one of that pin. Both are decided by the place itself, whoever races.
        """
        ...

    def remove(self, name: str) -> None:
        """Remove a file if it is there, and folders that this leaves empty (never the root's parent)."""
        ...


@runtime_checkable
class FillableStore(WritableStore, Protocol):
    """A place whose files can be filled at any offset: a file system, or memory. `FilledSink` stands on it.

    A file is created under a scratch name at its full size, filled by any number of workers, then committed: it appears
    under its final name whole, or not at all."""

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


@dataclass(frozen=True, slots=True)
class FileLayout:
    """A large file of an output before its bytes are there. A function of the plan alone."""

    name: str
    size: int
    """Bytes."""
    prefix: bytes
    """The first bytes, which the plan knows: a header, or nothing."""
    parts: tuple[int, ...]
    """Where the file's parts start, ascending, the first at 0. All but the last have PART_MIN_BYTES or more."""

    def part_span(self, part: int) -> tuple[int, int]:
        """Bytes [start, end) of a part (counted from 0)."""
        return self.parts[part], self.parts[part + 1] if part + 1 < len(self.parts) else self.size


PART_MIN_BYTES: Final = 5 << 20
"""What S3 asks of every part of a multipart upload but the last."""
PART_MAX_COUNT: Final = 10_000


class SinkWriter(Protocol):
    """One thread's way into a sink. Not shared between threads."""

    def write(self, file: str, offset: int, data: memoryview) -> None:
        """Take bytes of a large file, in any order. `data` may be reused as soon as this returns."""
        ...

    def flush(self) -> None:
        """Return once everything written so far outlives this process. Receipts are sent after it, never before."""
        ...


class Sink(Protocol):
    """The files of one output while they grow, invisible until they are published.

    Driver: `begin`, then `published` and `holds` to resume, at the end `stage`, `publish` in order, and `conclude`.
    Workers (a sink is pickled to them after `begin`): `writer`, one a thread, and `seal`.
    """

    @property
    def seals(self) -> bool:
        """Whether a file that is wholly written has to be sealed by some worker before it can be published."""
        ...

    @property
    def batch_bytes(self) -> int:
        """How much a worker does well to write before it flushes; 0 where each unit may be flushed at once."""
        ...

    def writer_bytes(self, files: Sequence[FileLayout]) -> int:
        """What one writer into these files holds in memory at most, beside the caller's buffers."""
        ...

    def probe(self) -> None:
        """See that this place can be written, and can refuse what this project relies on its refusing; leave no trace.

        Raises PlanError or SourceError where it cannot (nothing was written).
        """
        ...

    def begin(self, files: Sequence[FileLayout]) -> None:
        """Make ready for these files and keep what an earlier run of the same plan left of them.

        Raises MergeFailedError(code `disk-full`) and its like.
        """
        ...

    def published(self) -> frozenset[str]:
        """Names of those files that are under their final names already (an earlier run was cut short there)."""
        ...

    def holds(self, file: str, start: int, end: int, sha256: str) -> bool:
        """Whether bytes [start, end) of a file of `begin` are there and are those of `sha256`."""
        ...

    def reopen(self, file: str) -> None:
        """A published file turned out not to be whole: grow it again from the start."""
        ...

    def writer(self) -> SinkWriter:
        """A writer for one thread."""
        ...

    def seal(self, file: str) -> object:
        """Do what is left to do for a file that is wholly written: join its pieces, upload it. Any worker; may be
        repeated. Returns what `sealed` wants to know (small, picklable)."""
        ...

    def sealed(self, file: str, outcome: object) -> None:
        """The driver learns of a seal."""
        ...

    def stage(self, name: str, data: bytes) -> None:
        """Keep a small file until it is published."""
        ...

    def publish(self, name: str, *, exclusive: bool = True) -> None:
        """Let a staged or sealed file appear under its final name (or, where all appears at once, with `conclude`).

        A file of ours that is there already is no error. With `exclusive`, raises OutputExistsError where another's is.
        """
        ...

    def remove(self, name: str) -> None:
        """Remove a file of an earlier merge from the output (or, where all appears at once, with `conclude`)."""
        ...

    def conclude(self, message: str) -> None:
        """Everything is published. Raises OutputExistsError where another run won."""
        ...

    def abandon(self, files: Sequence[str]) -> None:
        """Drop what an unfinished run keeps of these files: scratch, pieces, uploads."""
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
    """A small file, whole: one version of it, also while others replace it.

    Raises SourceError when it is larger than `limit` bytes.
    """
    for left in reversed(range(_TRIES)):
        found = store.stat(name)
        if found.size > limit:
            raise SourceError.of(
                "file-too-large",
                f"{name} has {found.size} bytes, more than the {limit} that such a file may have",
                where=f"{store.uri}/{name}",
                fix="check that this is the file you meant",
            )
        buffer = bytearray(found.size)
        try:
            if found.size:
                store.read_into(name, [RangeRead(0, memoryview(buffer))], pin=found.pin)
        except SourceChangedError:
            if not left:
                raise
            continue
        return bytes(buffer)
    raise AssertionError


_TRIES: Final = 8
