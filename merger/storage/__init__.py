"""Where bytes live: one file a transport, behind the protocols of merger/storage/base.py."""

from __future__ import annotations

from merger.errors import SourceError
from merger.storage.base import FileStat, RangeRead, Store, WritableStore, read_whole
from merger.storage.local import LocalStore
from merger.storage.memory import MemoryStore

__all__ = ["FileStat", "LocalStore", "MemoryStore", "RangeRead", "Store", "WritableStore", "open_store", "read_whole"]


def open_store(kind: str, root: str, *, where: str) -> WritableStore:
    """The store of one place. Raises SourceError(code `not-yet`) for transports that are not built."""
    if kind == "local":
        return LocalStore(root)
    if kind == "memory":
        return MemoryStore(root)
    raise SourceError.of(
        "not-yet",
        f"{'the Hugging Face Hub' if kind == 'hub' else 'S3'} cannot be read or written yet",
        where=where,
        why="this version merges files on local disks",
        fix="download it first, for example with `hf download`, and name the folder",
    )
