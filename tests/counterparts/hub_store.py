"""What the tests' Hub keeps: repositories, their commits, and content under its SHA-256. No HTTP here.

On disk, so that a Hub started again on the same folder has the same repositories, and so that a file is sent by the
kernel and never copied from one commit to the next:

    blobs/ab/abcd…               one file a content, named by its SHA-256
    repositories/org/name.json   branches, tags and every commit with all its files
    incoming/                    uploads that are not whole yet; the next start drops them
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import fnmatch
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Self

ATTRIBUTES: Final = ".gitattributes"
LARGE_BYTES: Final = 10 * 1024 * 1024
"""A file above this is stored in LFS whatever its name."""

_LFS_PATTERNS: Final = (
    "*.7z", "*.arrow", "*.bin", "*.bz2", "*.ckpt", "*.ftz", "*.gguf", "*.gz", "*.h5", "*.joblib", "*.lfs.*", "*.model",
    "*.msgpack", "*.npy", "*.npz", "*.onnx", "*.ot", "*.parquet", "*.pb", "*.pickle", "*.pkl", "*.pt", "*.pth", "*.rar",
    "*.safetensors", "*.tar", "*.tflite", "*.tgz", "*.wasm", "*.xz", "*.zip", "*.zst", "*tfevents*",
)  # fmt: skip
_FIRST_ATTRIBUTES: Final = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in _LFS_PATTERNS)


class Refusal(Exception):  # noqa: N818  (what a server does)
    """A request that the Hub declines: the HTTP status, X-Error-Code (or none) and the words that go with it."""

    def __init__(self, status: int, code: str | None, message: str, **headers: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.headers = headers


@dataclass(frozen=True, slots=True)
class Blob:
    sha256: str
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class HubFile:
    """One file of one commit."""

    sha256: str
    size: int
    oid: str
    """The git object: of the content, or of the pointer to it when the file is in LFS."""
    pointer_bytes: int | None = None
    """Size of the pointer; None for a file that git itself holds."""

    @property
    def is_lfs(self) -> bool:
        return self.pointer_bytes is not None

    @property
    def etag(self) -> str:
        return self.sha256 if self.is_lfs else self.oid


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    sha: str
    parent: str | None
    title: str
    message: str
    time_ns: int
    files: Mapping[str, HubFile]

    @property
    def date(self) -> str:
        return datetime.fromtimestamp(self.time_ns / 1e9, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


@dataclass(slots=True, kw_only=True)
class Repository:
    repo_id: str
    private: bool = False
    gated: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)
    uploaded: set[str] = field(default_factory=set)
    """SHA-256 of the LFS objects that this repository was given, committed or not."""

    def commit(self, revision: str) -> Commit:
        """The commit that a branch, a tag or 40 hex digits name."""
        sha = self.branches.get(revision) or self.tags.get(revision) or revision
        found = self.commits.get(sha)
        if found is None:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return found

    def file(self, commit: Commit, name: str) -> HubFile:
        found = commit.files.get(name)
        if found is None:
            raise Refusal(404, "EntryNotFound", "Entry not found", **{"X-Repo-Commit": commit.sha})
        return found

    def history(self, revision: str) -> list[Commit]:
        """The commit that `revision` names and those before it, newest first."""
        found = [self.commit(revision)]
        while (parent := found[-1].parent) is not None:
            found.append(self.commits[parent])
        return found

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "uploaded": sorted(self.uploaded)}

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Self:
        commits = {
            sha: Commit(**{**commit, "files": {name: HubFile(**file) for name, file in commit["files"].items()}})
            for sha, commit in document["commits"].items()
        }
        return cls(**{**document, "commits": commits, "uploaded": set(document["uploaded"])})


def tracked_by_lfs(name: str, size: int, attributes: str) -> bool:
    """Whether a file of `size` bytes belongs in LFS. An empty one never does."""
    if size == 0:
        return False
    patterns = [line.split()[0] for line in attributes.splitlines() if "filter=lfs" in line.split()]
    return size > LARGE_BYTES or any(
        fnmatch.fnmatchcase(name if "/" in pattern else name.rsplit("/", 1)[-1], pattern) for pattern in patterns
    )


def check_path(name: str) -> str:
    """Raise Refusal for a path that no git tree holds."""
    if any(part in {"", ".", "..", ".git"} for part in name.split("/")):
        raise Refusal(400, None, f"invalid path in a commit: {name!r}")
    return name


class HubStore:
    """A folder of repositories. One process opens it at a time; `adopt` may run in any thread, the rest in one."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.incoming = root / "incoming"
        shutil.rmtree(self.incoming, ignore_errors=True)
        self.incoming.mkdir(parents=True)
        self.repositories: dict[str, Repository] = {}
        for path in (root / "repositories").rglob("*.json"):
            repository = Repository.from_json(json.loads(path.read_text()))
            self.repositories[repository.repo_id] = repository

    # ---- content

    def blob_path(self, sha256: str) -> Path:
        return self.root / "blobs" / sha256[:2] / sha256

    def new_incoming(self) -> Path:
        """A name for content on its way in: nothing stands there yet."""
        return self.incoming / uuid.uuid4().hex

    def adopt(self, path: Path, *, move: bool, sha256: str | None = None) -> Blob:
        """Keep the content of `path`, which is moved when it is ours to move and copied when not.

        `sha256` is what a caller who wrote the file already knows it to be.
        """
        if not move:
            copied = self.new_incoming()
            shutil.copyfile(path, copied)
            path = copied
        if sha256 is None:
            with path.open("rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        size = path.stat().st_size
        kept = self.blob_path(sha256)
        kept.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, kept)
        return Blob(sha256, size)

    def adopt_bytes(self, data: bytes) -> Blob:
        path = self.new_incoming()
        path.write_bytes(data)
        return self.adopt(path, move=True, sha256=hashlib.sha256(data).hexdigest())

    def read(self, file: HubFile) -> bytes:
        return self.blob_path(file.sha256).read_bytes()

    def regular_file(self, blob: Blob) -> HubFile:
        data = self.blob_path(blob.sha256).read_bytes()
        oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        return HubFile(sha256=blob.sha256, size=blob.size, oid=oid)

    def lfs_file(self, blob: Blob) -> HubFile:
        """The content itself need not be here: it may lie in a xet store."""
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{blob.sha256}\nsize {blob.size}\n".encode()
        oid = hashlib.sha1(b"blob %d\0" % len(pointer) + pointer).hexdigest()
        return HubFile(sha256=blob.sha256, size=blob.size, oid=oid, pointer_bytes=len(pointer))

    def attributes(self, files: Mapping[str, HubFile]) -> str:
        found = files.get(ATTRIBUTES)
        return "" if found is None else self.read(found).decode()

    # ---- repositories

    def find(self, repo_id: str) -> Repository | None:
        return self.repositories.get(repo_id)

    def create(self, repo_id: str, *, private: bool = False, gated: bool = False) -> Repository:
        """A repository whose first commit holds .gitattributes alone."""
        check_path(repo_id)
        if repo_id in self.repositories:
            raise Refusal(409, None, f"{repo_id} exists already")
        repository = Repository(repo_id=repo_id, private=private, gated=gated)
        self.repositories[repo_id] = repository
        first = self.regular_file(self.adopt_bytes(_FIRST_ATTRIBUTES.encode()))
        self._add(repository, "main", {ATTRIBUTES: first}, parent=None, title="initial commit", message="")
        return repository

    def delete(self, repo_id: str) -> None:
        del self.repositories[repo_id]
        with contextlib.suppress(FileNotFoundError):
            self._record(repo_id).unlink()

    def commit_changes(
        self,
        repository: Repository,
        branch: str,
        changes: Mapping[str, HubFile | None],
        *,
        title: str,
        message: str = "",
    ) -> Commit:
        """Move `branch` by one commit; None removes a file."""
        if branch not in repository.branches:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {branch}")
        parent = repository.commit(branch)
        files = dict(parent.files)
        for name, file in changes.items():
            if file is None:
                repository.file(parent, name)
                del files[name]
            else:
                files[check_path(name)] = file
        _refuse_file_as_folder(files)
        return self._add(repository, branch, files, parent=parent.sha, title=title, message=message)

    def _add(
        self,
        repository: Repository,
        branch: str,
        files: Mapping[str, HubFile],
        *,
        parent: str | None,
        title: str,
        message: str,
    ) -> Commit:
        now = time.time_ns()
        told = [repository.repo_id, parent, title, message, now, [(name, files[name].oid) for name in sorted(files)]]
        sha = hashlib.sha1(json.dumps(told).encode()).hexdigest()
        commit = Commit(sha=sha, parent=parent, title=title, message=message, time_ns=now, files=files)
        repository.commits[sha] = commit
        repository.branches[branch] = sha
        repository.uploaded.update(file.sha256 for file in files.values() if file.is_lfs)
        self.save(repository)
        return commit

    def save(self, repository: Repository) -> None:
        path = self._record(repository.repo_id)
        path.parent.mkdir(parents=True, exist_ok=True)
        new = self.new_incoming()
        new.write_text(json.dumps(repository.to_json()))
        os.replace(new, path)

    def _record(self, repo_id: str) -> Path:
        return self.root / "repositories" / f"{repo_id}.json"


def _refuse_file_as_folder(files: Iterable[str]) -> None:
    names = set(files)
    for name in names:
        above = name
        while "/" in above:
            above = above.rsplit("/", 1)[0]
            if above in names:
                raise Refusal(400, None, f"{above!r} cannot be both a file and a folder")


# ---- what the API says of a tree -------------------------------------------------------------------------------------


def folders_of(files: Iterable[str]) -> set[str]:
    found = set()
    for name in files:
        while "/" in name:
            name = name.rsplit("/", 1)[0]  # noqa: PLW2901
            found.add(name)
    return found


def list_tree(commit: Commit, under: str, *, recursive: bool) -> list[str]:
    """Paths of the files and folders below `under` ("" is the root), sorted."""
    folders = folders_of(commit.files)
    if under and under not in folders:
        raise Refusal(404, "EntryNotFound", f"{under} does not exist", **{"X-Repo-Commit": commit.sha})
    prefix = f"{under}/" if under else ""
    below = [path for path in {*commit.files, *folders} if path.startswith(prefix)]
    return sorted(path for path in below if recursive or "/" not in path[len(prefix) :])


def describe_path(commit: Commit, path: str, xet_hashes: Mapping[str, str], *, expand: bool) -> dict[str, Any]:
    """One entry of a tree as the API gives it. Expanded, the last commit is this one: no history is searched."""
    last = {"id": commit.sha, "title": commit.title, "date": commit.date}
    more: dict[str, Any] = {"lastCommit": last} if expand else {}
    file = commit.files.get(path)
    if file is None:
        oid = hashlib.sha1(json.dumps([commit.sha, path]).encode()).hexdigest()
        return {"type": "directory", "oid": oid, "size": 0, "path": path, **more}
    entry = {"type": "file", "oid": file.oid, "size": file.size, "path": path, **more}
    if file.is_lfs:
        entry["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": file.pointer_bytes}
        if file.sha256 in xet_hashes:
            entry["xetHash"] = xet_hashes[file.sha256]
    return entry


def encode_cursor(path: str) -> str:
    return base64.urlsafe_b64encode(path.encode()).decode()


def decode_cursor(cursor: str) -> str:
    return base64.urlsafe_b64decode(cursor).decode()
