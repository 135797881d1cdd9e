"""Files on this machine (or on a mounted file system that all workers see at the same path)."""

from __future__ import annotations

import contextlib
import errno
import os
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from merger.errors import MergeFailedError, SourceChangedError, SourceError
from merger.storage.base import FileStat, RangeRead


def _pin(status: os.stat_result) -> str:
    return f"local:{status.st_size}:{status.st_mtime_ns}:{status.st_ino}"


@dataclass(frozen=True, slots=True)
class LocalStore:
    """A folder. `root` is absolute."""

    root: str

    @property
    def uri(self) -> str:
        return self.root

    def path(self, name: str) -> Path:
        """Where `name` lies. Raises SourceError when it would climb out of the root."""
        parts = PurePosixPath(name)
        if not name or parts.is_absolute() or ".." in parts.parts or "\\" in name or "\0" in name:
            raise SourceError.of(
                "path-escapes",
                f"the file name {name!r} leaves its folder",
                where=self.root,
                why="names inside a source or an output are relative and never climb",
                fix="do not use this source: its index was made by hand or with intent",
            )
        return Path(self.root, *parts.parts)

    def list_files(self) -> tuple[str, ...]:
        found = []
        for folder, _, names in os.walk(self.root):
            inside = os.path.relpath(folder, self.root)
            found += [name if inside == "." else f"{inside}/{name}" for name in names]
        return tuple(sorted(name.replace(os.sep, "/") for name in found))

    def stat(self, name: str) -> FileStat:
        try:
            status = os.stat(self.path(name))
        except OSError as error:
            raise self._unreadable(name, error) from error
        return FileStat(status.st_size, _pin(status))

    def read_into(self, name: str, reads: Sequence[RangeRead], *, pin: str | None = None) -> None:
        try:
            descriptor = os.open(self.path(name), os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise self._unreadable(name, error) from error
        try:
            if pin is not None and _pin(os.fstat(descriptor)) != pin:
                raise SourceChangedError.of(
                    "source-changed",
                    f"{name} is no longer the file that was planned",
                    where=f"{self.root}/{name}",
                    why="its size, modification time or inode changed after the plan was made",
                    fix="run the same command again with --restart: it plans from the new file",
                )
            for read in reads:
                self._read_fully(descriptor, name, read)
        except OSError as error:
            raise self._unreadable(name, error) from error
        finally:
            os.close(descriptor)

    def _read_fully(self, descriptor: int, name: str, read: RangeRead) -> None:
        done, total = 0, read.into.nbytes
        while done < total:
            count = os.preadv(descriptor, [read.into[done:]], read.start + done)
            if count == 0:
                raise SourceError.of(
                    "truncated",
                    f"{name} ends before byte {read.start + total}",
                    where=f"{self.root}/{name}",
                    why="the header promises more bytes than the file has",
                    fix="fetch the file again",
                )
            done += count

    def _unreadable(self, name: str, error: OSError) -> SourceError:
        missing = isinstance(error, FileNotFoundError | NotADirectoryError)
        return SourceError.of(
            "no-such-file" if missing else "unreadable",
            f"there is no file {name}" if missing else f"{name} cannot be read: {error.strerror}",
            where=f"{self.root}/{name}",
            fix="check the reference" if missing else "check the permissions and the disk",
        )

    def free_bytes(self) -> int | None:
        folder = Path(self.root)
        while not folder.exists():
            folder = folder.parent
        status = os.statvfs(folder)
        return status.f_bavail * status.f_frsize

    def allocate(self, name: str, size: int) -> None:
        path = self.path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and path.stat().st_size == size:
            return
        # statvfs first: on ext4 a fallocate that is too large can eat the whole disk before it fails.
        free = self.free_bytes()
        if free is not None and size > free:
            raise self._disk_full(name, size, free)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            os.ftruncate(descriptor, 0)
            if size:
                self._reserve(descriptor, size)
        except OSError as error:
            with contextlib.suppress(OSError):
                path.unlink()
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise self._disk_full(name, size, self.free_bytes()) from error
            raise
        finally:
            os.close(descriptor)

    @staticmethod
    def _reserve(descriptor: int, size: int) -> None:
        try:
            os.posix_fallocate(descriptor, 0, size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
            os.ftruncate(descriptor, size)

    def write_at(self, name: str, offset: int, data: memoryview) -> None:
        try:
            descriptor = os.open(self.path(name), os.O_WRONLY | os.O_CLOEXEC)
            try:
                done = 0
                while done < data.nbytes:
                    done += os.pwrite(descriptor, data[done:], offset + done)
            finally:
                os.close(descriptor)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise self._disk_full(name, data.nbytes, self.free_bytes()) from error
            raise MergeFailedError.of(
                "write-failed",
                f"{name} cannot be written: {error.strerror}",
                where=f"{self.root}/{name}",
                fix="mend the file system and run the same command again: it resumes",
            ) from error

    def commit(self, scratch: str, name: str) -> None:
        source, target = self.path(scratch), self.path(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(source, target)
        self._prune(source.parent)
        self._sync_folder(target.parent)

    def put(self, name: str, data: bytes, *, exclusive: bool = False) -> None:
        path = self.path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")
        try:
            with open(scratch, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            if exclusive:
                os.link(scratch, path)
            else:
                os.replace(scratch, path)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise self._disk_full(name, len(data), self.free_bytes()) from error
            raise
        finally:
            with contextlib.suppress(FileNotFoundError):
                scratch.unlink()
        self._sync_folder(path.parent)

    def remove(self, name: str) -> None:
        path = self.path(name)
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
        self._prune(path.parent)

    def _prune(self, folder: Path) -> None:
        """Remove a folder inside the root, and those above it, where that leaves them empty."""
        while folder != Path(self.root) and folder.is_dir():
            try:
                folder.rmdir()
            except OSError:  # not empty
                return
            folder = folder.parent

    @staticmethod
    def _sync_folder(folder: Path) -> None:
        descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _disk_full(self, name: str, needed: int, free: int | None) -> MergeFailedError:
        return MergeFailedError.of(
            "disk-full",
            f"no room for {needed} bytes of {name}" + (f": {free} are free" if free is not None else ""),
            where=self.root,
            why="the disk filled up",
            fix="free space, or choose another output, and run the same command again: it resumes",
        )
