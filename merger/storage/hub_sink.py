"""Publishing into a repository of the Hub: `HubSink`; and what an output there holds now: `open_hub_output`.

A repository keeps every version of all it ever held, so nothing unfinished enters it. Files grow in a sink of their
own (`--run-dir`: a folder or an S3 prefix). A file that is whole is uploaded by whichever worker sealed it, as content
that no commit names yet: harmless if the run dies, and found there again when it resumes. One commit at the end makes
all files appear and the old ones disappear. It is made on the head that the run saw at its start, or not at all: the
Hub itself refuses it (412) when anybody else was there in between.
"""

from __future__ import annotations

import hashlib
import io
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from merger.errors import MergeFailedError, OutputExistsError, PlanError, RaymergeError, SourceError
from merger.storage.base import FileLayout, FileStat, RangeRead, Sink, SinkWriter, Store, read_whole
from merger.storage.http import Attempts, Patience
from merger.storage.hub import (
    HubStore,
    ask,
    client_errors,
    default_endpoint,
    failure_of,
    hub_api,
    is_offline,
    pin_hub,
)
from merger.storage.local import LocalStore

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

_BRANCH: Final = "main"
_RESULT_FILE: Final = "raymerge.json"
"""The same bytes in it: the same merge."""
_ATTRIBUTES_FILE: Final = ".gitattributes"
"""Every repository has one from its first commit on: alone, it is nothing."""
_SMALL_BYTES: Final = 256 << 20
"""A file that is committed from memory has no more."""
_READ_BYTES: Final = 8 << 20


@dataclass(slots=True)
class HubOutput:
    """What a branch holds, at its newest commit whenever it is listed. See `merger.storage.base.Store`."""

    repo: str
    revision: str | None
    subfolder: str = ""
    endpoint: str = field(default_factory=default_endpoint)
    _seen: HubStore | None = None

    @property
    def uri(self) -> str:
        return _uri(self.repo, self.revision, self.subfolder)

    @property
    def remote(self) -> bool:
        return True

    def list_files(self) -> tuple[str, ...]:
        """None where there is no such repository or branch, or nothing but what every repository has."""
        found = _find_head(self.repo, self.revision, self.subfolder, self.endpoint)
        if found != self._seen:  # else its list of files is still good
            self._seen = found
        return () if self._seen is None else _output_files(self._seen)

    def stat(self, name: str) -> FileStat:
        self.list_files()
        return self._there(name).stat(name)

    def read_into(self, name: str, reads: Sequence[RangeRead], *, pin: str | None = None) -> None:
        if self._seen is None:
            self.list_files()
        self._there(name).read_into(name, reads, pin=pin)

    def resolve(self, names: Sequence[str]) -> None:
        """Nothing that would hold longer than the head does."""

    def _there(self, name: str) -> HubStore:
        if self._seen is None:
            raise SourceError.of(
                "no-such-file", f"there is no file {name}", where=f"{self.uri}/{name}",
                why="there is no such branch yet", fix="check the reference",
            )  # fmt: skip
        return self._seen


def open_hub_output(repo: str, revision: str | None, subfolder: str = "", *, endpoint: str | None = None) -> HubOutput:
    """A place in a repository as an output: it need not be there yet. Nothing is asked or written here."""
    return HubOutput(repo, revision, subfolder, endpoint or default_endpoint())


def _uri(repo: str, revision: str | None, subfolder: str) -> str:
    return f"hf://{repo}" + ("" if revision is None else f"@{revision}") + (f"/{subfolder}" if subfolder else "")


def _find_head(repo: str, revision: str | None, subfolder: str, endpoint: str) -> HubStore | None:
    """A branch at its newest commit; None where there is no such repository or branch."""
    try:
        return pin_hub(repo, revision or _BRANCH, subfolder, endpoint=endpoint)
    except SourceError as error:
        if error.problems[0].code in ("no-such-source", "no-such-revision"):
            return None
        raise


def _output_files(store: HubStore) -> tuple[str, ...]:
    return tuple(name for name in store.list_files() if store.subfolder or name != _ATTRIBUTES_FILE)


@dataclass(frozen=True, slots=True)
class UploadedFile:
    """What a seal tells the driver."""

    staged: object
    """What the staging sink's own seal told."""
    addition: CommitOperationAdd | None
    """The commit's line for content that is on the Hub; None where the Hub wants the content in the commit itself."""


@dataclass(slots=True)
class HubSink:
    """The files of one output in a repository. See `merger.storage.base.Sink`."""

    staging: Sink
    """Where files grow until they are whole."""
    staged: Store
    """Where `staging` publishes them."""
    repo: str
    revision: str | None = None
    """The branch; None is main. Made where it is missing and the repository holds nothing else."""
    subfolder: str = ""
    private: bool | None = None
    """Of a repository that has to be made: private unless False."""
    commit_message: str | None = None
    """None: what `conclude` is given."""
    endpoint: str = field(default_factory=default_endpoint)
    commit: str | None = None
    """The commit that published everything."""
    _head: str | None = None
    """The commit that ours will follow, or be refused."""
    _large: frozenset[str] = frozenset()
    _uploaded: dict[str, UploadedFile] = field(default_factory=dict)
    _queue: dict[str, None] = field(default_factory=dict)
    """Names to publish, in order."""
    _doomed: set[str] = field(default_factory=set)

    @property
    def uri(self) -> str:
        return _uri(self.repo, self.revision, self.subfolder)

    @property
    def seals(self) -> bool:
        return True

    @property
    def batch_bytes(self) -> int:
        return self.staging.batch_bytes

    # ---- before the run

    def writer_bytes(self, files: Sequence[FileLayout]) -> int:
        return self.staging.writer_bytes(files)

    def probe(self) -> None:
        """Raises PlanError: `forbidden` where the token may not write, `offline`, `no-such-branch`, `not-a-branch`."""
        self.staging.probe()
        if is_offline():
            raise PlanError.of(
                "offline", f"nothing can be published to {self.uri}", where=self.uri, why="HF_HUB_OFFLINE is set",
                fix="unset HF_HUB_OFFLINE, or name another output",
            )  # fmt: skip
        told = ask(self.uri, lambda: hub_api(self.endpoint).whoami(), refused=PlanError)
        if _role(told) == "read":
            raise self._closed("the token (HF_TOKEN) may read, but not write")
        head = _find_head(self.repo, self.revision, self.subfolder, self.endpoint)
        if head is not None:
            self._check_may_write()
            self._check_is_branch()
            self._head = head.revision
        elif _find_head(self.repo, None, "", self.endpoint) is not None:
            self._check_may_write()
            self._check_nothing_inherited()

    def _check_may_write(self) -> None:
        """Ask, if this Hub tells."""
        from huggingface_hub.errors import HfHubHTTPError

        def told() -> None:
            try:
                hub_api(self.endpoint).auth_check(self.repo, write=True)
            except HfHubHTTPError as error:
                if error.response.status_code != 404:  # an older Hub does not know the question
                    raise

        ask(self.uri, told, refused=PlanError)

    def _check_is_branch(self) -> None:
        """A tag and a commit stay what they are; refs/pr/N is a branch of its own kind, and in no list."""
        branch = self.revision or _BRANCH
        told = ask(self.uri, lambda: hub_api(self.endpoint).list_repo_refs(self.repo), refused=PlanError)
        if not branch.startswith("refs/") and branch not in {reference.name for reference in told.branches}:
            raise PlanError.of(
                "not-a-branch", f"{self.revision} is a tag or a commit", where=self.uri, why="neither can be added to",
                fix="name a branch: org/name@BRANCH",
            )  # fmt: skip

    def _check_nothing_inherited(self) -> None:
        """A branch that we make begins with what the default branch holds. Raises PlanError where that is something."""
        origin = _find_head(self.repo, None, self.subfolder, self.endpoint)
        if origin is not None and _output_files(origin):
            raise PlanError.of(
                "no-such-branch", f"the repository has no branch {self.revision}", where=self.uri,
                why="a new one would begin with the files of the default branch",
                fix="make an empty branch first, or name a subfolder or another repository",
            )  # fmt: skip

    def _closed(self, why: str) -> PlanError:
        return PlanError.of(
            "forbidden", f"nothing can be published to {self.uri}", where=self.uri, why=why,
            fix="give a token (HF_TOKEN) that may write to this repository",
        )  # fmt: skip

    def begin(self, files: Sequence[FileLayout]) -> None:
        """Make the repository and the branch where they are missing: nothing was merged yet, and PlanError says why."""
        if self._head is None:
            self._head = self._make_place()
        self.staging.begin(files)
        self._large = frozenset(file.name for file in files)

    def _make_place(self) -> str:
        api = hub_api(self.endpoint)
        head = _find_head(self.repo, self.revision, self.subfolder, self.endpoint)
        if head is None and _find_head(self.repo, None, "", self.endpoint) is None:
            private = self.private is not False
            ask(self.uri, lambda: api.create_repo(self.repo, private=private, exist_ok=True), refused=PlanError)
            head = _find_head(self.repo, self.revision, self.subfolder, self.endpoint)
        if head is None:
            self._check_nothing_inherited()
            branch = self.revision or _BRANCH
            ask(self.uri, lambda: api.create_branch(self.repo, branch=branch, exist_ok=True), refused=PlanError)
            head = _find_head(self.repo, self.revision, self.subfolder, self.endpoint)
        if head is None:
            raise self._closed("there is a repository of this name, and the token may not see it")
        return head.revision

    def published(self) -> frozenset[str]:
        """Those that are whole in staging; on the Hub all appear at once."""
        return self.staging.published()

    def holds(self, file: str, start: int, end: int, sha256: str) -> bool:
        return self.staging.holds(file, start, end, sha256)

    def reopen(self, file: str) -> None:
        self.staging.reopen(file)

    def writer(self) -> SinkWriter:
        return self.staging.writer()

    # ---- upload

    def seal(self, file: str) -> UploadedFile:
        """Make the file whole in staging and upload its content. What the Hub has already is not uploaded again."""
        told = self.staging.seal(file) if self.staging.seals else None
        if self.staging.seals:
            self.staging.sealed(file, told)
        self.staging.publish(file, exclusive=False)
        try:
            return UploadedFile(told, self._upload(file))
        except SourceError as error:  # of the staging place: a worker that does not reach it
            raise MergeFailedError(error.problems) from error

    def _upload(self, file: str) -> CommitOperationAdd | None:
        api = hub_api(self.endpoint)
        _hush_client()

        def upload() -> CommitOperationAdd | None:
            with _opened(self.staged, file) as content:
                addition = _addition(self._path(file), content)
                api.preupload_lfs_files(self.repo, [addition], revision=self.revision, gitignore_content="")
            return addition if addition.path_or_fileobj == b"" else None  # emptied: the Hub has it

        return ask(f"{self.uri}/{file}", upload, refused=MergeFailedError)

    def _path(self, name: str) -> str:
        return f"{self.subfolder}/{name}" if self.subfolder else name

    def sealed(self, file: str, outcome: object) -> None:
        assert isinstance(outcome, UploadedFile)
        if self.staging.seals:
            self.staging.sealed(file, outcome.staged)
        self._uploaded[file] = outcome

    def stage(self, name: str, data: bytes) -> None:
        self.staging.stage(name, data)

    # ---- publication

    def publish(self, name: str, *, exclusive: bool = True) -> None:
        """Put it on the list of the commit. `exclusive` adds nothing: the commit follows the head that we saw."""
        del exclusive
        if name not in self._uploaded:
            self.staging.publish(name, exclusive=False)
        self._queue[name] = None

    def remove(self, name: str) -> None:
        self._doomed.add(name)

    def conclude(self, message: str) -> None:
        """One commit. Raises OutputExistsError when the branch has moved, but to a commit of this very merge.

        MergeFailedError `publish-incomplete` when the commit does not hold what it should.
        """
        try:
            self.commit = self._publish(self.commit_message or message)
        except SourceError as error:  # it could be reached when the run began
            raise MergeFailedError(error.problems) from error
        self.staging.conclude(message)
        for name in self._queue:
            self.staging.remove(name)

    def _publish(self, message: str) -> str:
        api = hub_api(self.endpoint)
        _hush_client()
        small: list[CommitOperationAdd] = []
        uploaded: list[CommitOperationAdd] = []
        wanted: dict[str, _Content] = {}
        for name in self._queue:
            addition = self._uploaded_addition(name)
            if addition is None:
                addition = _addition(self._path(name), read_whole(self.staged, name, limit=_SMALL_BYTES))
                small.append(addition)
            else:
                uploaded.append(addition)
            wanted[name] = _Content.of(addition)

        def upload() -> None:
            api.preupload_lfs_files(self.repo, small, revision=self.revision, free_memory=False, gitignore_content="")

        ask(self.uri, upload, refused=MergeFailedError)
        return self._commit([*self._deletions(), *uploaded, *small], message, wanted)

    def _uploaded_addition(self, name: str) -> CommitOperationAdd | None:
        """The commit's line for content that is on the Hub; None for what the commit itself carries."""
        if name in self._large and name not in self._uploaded:  # an earlier run made it whole
            self._uploaded[name] = UploadedFile(None, self._upload(name))
        return self._uploaded[name].addition if name in self._uploaded else None

    def _deletions(self) -> list[CommitOperationDelete]:
        from huggingface_hub import CommitOperationDelete

        assert self._head is not None
        doomed = self._doomed - set(self._queue)
        if not doomed:
            return []
        there = HubStore(self.repo, self._head, self.subfolder, self.endpoint).list_files()
        return [CommitOperationDelete(self._path(name), is_folder=False) for name in sorted(doomed & set(there))]

    def _commit(
        self, operations: list[CommitOperationAdd | CommitOperationDelete], message: str, wanted: dict[str, _Content]
    ) -> str:
        """Commit, and find out what became of it where no answer came: with a parent named, it lands once or never."""
        api, errors = hub_api(self.endpoint), client_errors()
        attempts = Attempts(f"the commit to {self.uri}", self.uri, Patience.from_environment())
        while True:
            try:
                made = api.create_commit(
                    self.repo, operations, commit_message=message, revision=self.revision, parent_commit=self._head
                )
            except RaymergeError:
                raise
            except errors as error:
                failure = failure_of(error, self.uri)
            else:
                self._check_published(made.oid, wanted)
                return made.oid
            if failure.status not in (409, 412) and not failure.passing:
                raise MergeFailedError(failure.problem) from None
            head = _find_head(self.repo, self.revision, self.subfolder, self.endpoint)
            if head is None or head.revision != self._head:
                if head is not None and _is_same_merge(head, wanted):
                    return head.revision
                raise OutputExistsError.of(
                    "output-exists", f"{self.uri} was changed while this merge ran", where=self.uri,
                    why="its branch has a newer commit than the one this run began with",
                    fix="look at the newer commit; with --restart the merge is published on top of it",
                )  # fmt: skip
            attempts.failed(failure.again())

    def _check_published(self, commit: str, wanted: dict[str, _Content]) -> None:
        """That the commit holds what we wanted: content, and nothing left out by a rule of the repository."""
        found = HubStore(self.repo, commit, self.subfolder, self.endpoint)
        names = set(found.list_files())
        wrong = sorted(
            name for name, content in wanted.items() if name not in names or not content.matches(found, name)
        )
        wrong += sorted(name for name in self._doomed - set(self._queue) if name in names)
        if wrong:
            raise MergeFailedError.of(
                "publish-incomplete", f"the commit does not hold what it should: {', '.join(wrong)}",
                where=f"{self.uri} (commit {commit})",
                why="the Hub took the commit, and left these out or changed them",
                fix="look at the repository's .gitignore, remove the commit, and run the same command again",
            )  # fmt: skip

    def abandon(self, files: Sequence[str]) -> None:
        """What is staged whole is unfinished too, as long as no commit names it."""
        self.staging.abandon(files)
        for name in files:
            self.staging.remove(name)


@dataclass(frozen=True, slots=True)
class _Content:
    """What a file of the commit has to be."""

    size: int
    names: frozenset[str]
    """What the Hub may call it: SHA-256 in large storage, git's blob id otherwise."""

    @classmethod
    def of(cls, addition: CommitOperationAdd) -> _Content:
        names = {addition.upload_info.sha256.hex()}
        data = addition.path_or_fileobj
        if isinstance(data, bytes) and len(data) == addition.upload_info.size:
            names.add(hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest())
        return cls(addition.upload_info.size, frozenset(names))

    def matches(self, store: HubStore, name: str) -> bool:
        found = store.stat(name)
        return found.size == self.size and found.pin.removeprefix("hub:") in self.names


def _is_same_merge(head: HubStore, wanted: dict[str, _Content]) -> bool:
    """Whether a commit is that of this merge, ours or another run's: the cards and reports of two runs may differ."""
    names = set(head.list_files())
    witnesses = [_RESULT_FILE] if _RESULT_FILE in wanted else list(wanted)
    return all(name in names and wanted[name].matches(head, name) for name in witnesses)


def _role(told: dict[str, Any]) -> str:
    """What kind of token it is: read, write, fineGrained, or "" where the Hub does not say."""
    token = (told.get("auth") or {}).get("accessToken") or {}
    return str(token.get("role", ""))


# ---------------------------------------------------------------------------------------------- content for the client


def _addition(path: str, content: str | bytes | io.BufferedReader) -> CommitOperationAdd:
    from huggingface_hub import CommitOperationAdd

    return CommitOperationAdd(path, content)


class _opened:  # noqa: N801 - a context manager
    """A staged file as the client takes it: a path where there is one, else an open file."""

    def __init__(self, store: Store, name: str) -> None:
        self._store, self._name = store, name
        self._reader: io.BufferedReader | None = None

    def __enter__(self) -> str | io.BufferedReader:
        if isinstance(self._store, LocalStore):
            self._store.stat(self._name)  # where it is not there, by our own error
            return str(self._store.path(self._name))
        self._reader = io.BufferedReader(_StoredFile(self._store, self._name), _READ_BYTES)
        return self._reader

    def __exit__(self, *_: object) -> None:
        if self._reader is not None:
            self._reader.close()


class _StoredFile(io.RawIOBase):
    """A file of a store, read as it is asked for and never held whole."""

    def __init__(self, store: Store, name: str) -> None:
        super().__init__()
        self._store, self._name = store, name
        self._stat = store.stat(name)
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._stat.size}[whence]
        self._at = max(0, start + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        count = max(0, min(view.nbytes, self._stat.size - self._at))
        if count:
            self._store.read_into(self._name, [RangeRead(self._at, view[:count])], pin=self._stat.pin)
            self._at += count
        return count


def _hush_client() -> None:
    """No bars on standard error, and no signed upload address in the client's warnings."""
    from huggingface_hub import constants
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if constants.HF_HUB_DISABLE_PROGRESS_BARS is None:
        disable_progress_bars()
    logging.getLogger("huggingface_hub.utils._http").addFilter(_without_queries)


def _without_queries(record: logging.LogRecord) -> bool:
    record.msg = re.sub(r"(https?://[^\s?]*)\?\S*", r"\1?…", str(record.msg))
    return True
