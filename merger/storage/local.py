"""Files on this machine (or on a mounted file system that all workers see at the same path)."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import os
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from merger.errors import MergeFailedError, SourceChangedError, SourceError
from merger.storage.base import FileStat, RangeRead, check_name

_TRIES: Final = 20
"""How often a folder is made again that another run's clean-up removed before a file was in it."""


def _pin(status: os.stat_result) -> str:
    return f"local:{status.st_size}:{status.st_mtime_ns}:{status.st_ino}"


@functools.lru_cache(maxsize=1024)
def _path(root: str, name: str) -> Path:
    """A merge asks for the same few files thousands of times."""
    return Path(root, *check_name(name, root).parts)


@dataclass(frozen=True, slots=True)
class LocalStore:
    """A folder. `root` is absolute."""

    root: str

    @property
    def uri(self) -> str:
        return self.root

    @property
    def remote(self) -> bool:
        return False

    def path(self, name: str) -> Path:
        """Where `name` lies. Raises SourceError when it would climb out of the root."""
        return _path(self.root, name)

    def list_files(self) -> tuple[str, ...]:
        found = []
        for folder, _, names in os.walk(self.root):
            inside = os.path.relpath(folder, self.root)
            found += [name if inside == "." else f"{inside}/{name}" for name in names]
        return tuple(sorted(name.replace(os.sep, "/") for name in found))

    def resolve(self, names: Sequence[str]) -> None:
        """Nothing to find out beforehand."""

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
            if pin is not None and isinstance(error, FileNotFoundError | NotADirectoryError):
                raise self._changed(name, "it was removed after the plan was made") from error
            raise self._unreadable(name, error) from error
        try:
            if pin is not None and _pin(os.fstat(descriptor)) != pin:
                raise self._changed(name, "its size, modification time or inode changed after the plan was made")
            for read in reads:
                self._read_fully(descriptor, name, read)
        except OSError as error:
            raise self._unreadable(name, error) from error
        finally:
            os.close(descriptor)

    def _read_fully(self, descriptor: int, name: str, read: RangeRead) -> None:
        into = read.into.cast("B")
        done, total = 0, into.nbytes
        while done < total:
            count = os.preadv(descriptor, [into[done:]], read.start + done)
            if count == 0:
                raise SourceError.of(
                    "truncated",
                    f"{name} ends before byte {read.start + total}",
                    where=f"{self.root}/{name}",
                    why="the header promises more bytes than the file has",
                    fix="fetch the file again",
                )
            done += count

    def _changed(self, name: str, why: str) -> SourceChangedError:
        return SourceChangedError.of(
            "source-changed",
            f"{name} is no longer the file that was planned",
            where=f"{self.root}/{name}",
            why=why,
            fix="run the same command again with --restart: it plans from the new file",
        )

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
        with self._writing(name, size):
            if path.exists() and path.stat().st_size == size:
                return
            # statvfs first: on ext4 a fallocate that is too large can eat the whole disk before it fails.
            free = self.free_bytes()
            if free is not None and size > free:
                raise self._disk_full(name, size, free)
            descriptor = self._open_in_folder(path, os.O_RDWR | os.O_CREAT)
            try:
                os.ftruncate(descriptor, 0)
                if size:
                    self._reserve(descriptor, size)
            except OSError:
                with contextlib.suppress(OSError):
                    path.unlink()
                self._prune(path.parent)
                raise
            finally:
                os.close(descriptor)

    @contextlib.contextmanager
    def _writing(self, name: str, size: int) -> Iterator[None]:
        """The operating system's errors while `name` is written, as ours."""
        try:
            yield
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise self._disk_full(name, size, self.free_bytes()) from error
            raise MergeFailedError.of(
                "write-failed",
                f"{name} cannot be written: {error.strerror}",
                where=f"{self.root}/{name}",
                why="the file system refused it",
                fix="check the path and its permissions, and run the same command again: it resumes",
            ) from error

    @staticmethod
    def _open_in_folder(path: Path, flags: int) -> int:
        """Open a file for writing in a folder that is made where it is missing.

        Another run that ends removes the folders it leaves empty, perhaps between these two steps: they are repeated.
        """
        for left in reversed(range(_TRIES)):
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
            except FileExistsError:  # there a moment ago, and removed before mkdir looked again
                if not left:
                    raise
                continue
            try:
                return os.open(path, flags | os.O_CLOEXEC, 0o666)
            except FileNotFoundError:
                if not left:
                    raise
        raise AssertionError

    @staticmethod
    def _reserve(descriptor: int, size: int) -> None:
        try:
            os.posix_fallocate(descriptor, 0, size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
            os.ftruncate(descriptor, size)

    def write_at(self, name: str, offset: int, data: memoryview) -> None:
        content = data.cast("B")
        with self._writing(name, data.nbytes):
            descriptor = os.open(self.path(name), os.O_WRONLY | os.O_CLOEXEC)
            try:
                if offset + content.nbytes > os.fstat(descriptor).st_size:
                    raise OSError(errno.EFBIG, f"it has no room for {content.nbytes} bytes at byte {offset}")
                done = 0
                while done < content.nbytes:
                    done += os.pwrite(descriptor, content[done:], offset + done)
            finally:
                os.close(descriptor)

    def commit(self, scratch: str, name: str) -> None:
        source, target = self.path(scratch), self.path(name)
        with self._writing(name, 0):
            descriptor = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(source, target)
            self._prune(source.parent)
            self._sync_folder(target.parent)

    def put(self, name: str, data: bytes, *, exclusive: bool = False, replacing: str | None = None) -> None:
        path = self.path(name)
        scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")
        taken = False
        with self._writing(name, len(data)):
            try:
                with open(self._open_in_folder(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL), "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                if exclusive:
                    try:
                        os.link(scratch, path)
                    except FileExistsError:
                        taken = True
                    scratch.unlink()
                elif replacing is not None:
                    taken = not self._replace_if(scratch, path, replacing)
                else:
                    os.replace(scratch, path)
            except OSError:
                with contextlib.suppress(OSError):
                    scratch.unlink()
                self._prune(path.parent)
                raise
            self._sync_folder(path.parent)
        if taken:
            raise FileExistsError(name)

    @staticmethod
    def _replace_if(scratch: Path, path: Path, pin: str) -> bool:
        """Rename unless `path` is another file than `pin` says. Those who replace under a pin go one after another, by
        a lock on the folder."""
        folder = os.open(path.parent, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            try:
                same = _pin(os.stat(path)) == pin
            except FileNotFoundError:
                same = False
            if same:
                os.replace(scratch, path)
            else:
                scratch.unlink()
            return same
        finally:
            os.close(folder)

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
