"""Where bytes live: one file a transport, behind the protocols of merger/storage/base.py."""

from __future__ import annotations

from merger.errors import SourceError
from merger.storage.base import FileStat, RangeRead, Store, WritableStore, read_whole
from merger.storage.local import LocalStore
from merger.storage.memory import MemoryStore

__all__ = ["FileStat", "LocalStore", "MemoryStore", "RangeRead", "Store", "WritableStore", "open_source", "read_whole"]


def open_source(kind: str, root: str, *, revision: str | None = None, subfolder: str = "") -> Store:
    """The store of one source, its revision pinned. Raises SourceError where there is none, or none for us."""
    if kind == "local":
        return LocalStore(root)
    if kind == "memory":
        return MemoryStore(root)
    if kind == "s3":
        from merger.storage.s3 import S3Store

        return S3Store(root, subfolder)
    if kind == "merge":
        raise SourceError.of(
            "no-such-source", f"merge://{root} names a document, and it is not made here", where=f"merge://{root}",
            why="only the documents of one file name each other so", fix="name the place of what was merged",
        )  # fmt: skip
    from merger.storage.hub import pin_hub

    return pin_hub(root, revision, subfolder)
