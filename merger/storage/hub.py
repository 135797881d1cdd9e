"""Repositories of the Hub, read at one commit: `pin_hub` makes a `HubStore`.

A branch moves while a merge reads; a commit does not. So a reference becomes a commit once, in the driver, and all
that is read afterwards is read at that commit. What the Hub says of it travels with the store to the workers: the list
of its files, and for each file the address that the Hub redirects to (one request a file, not two a range). An address
is signed and ages: whoever is refused asks for a new one, once for all threads of the process. The token never travels:
each process finds its own, and sends it to the endpoint alone.

What lies in the local cache is read there. Everything private of huggingface_hub and hf_xet stands in one small
function each. Publishing is in `merger.storage.hub_sink`.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar
from urllib.parse import urlsplit

from merger.errors import InfrastructureError, Problem, RaymergeError, SourceChangedError, SourceError
from merger.storage.base import FileStat, RangeRead, check_name
from merger.storage.http import COUNTS, Address, Again, Attempts, Patience, asked_seconds, is_passing, read_ranges
from merger.storage.local import LocalStore

if TYPE_CHECKING:
    import httpx2
    from huggingface_hub import HfApi

_T = TypeVar("_T")

_COMMIT: Final = re.compile(r"[0-9a-f]{40}")
_ANSWER_SECONDS: Final = 300.0
"""How long the Hub may think about a commit or the end of an upload."""
_RESOLVED_AT_ONCE: Final = 8


# ---------------------------------------------------------------------------------------------- the client


def default_endpoint() -> str:
    """The Hub that the environment names (HF_ENDPOINT), without a slash at its end."""
    from huggingface_hub import constants

    return constants.ENDPOINT


def is_offline() -> bool:
    """Whether the environment forbids requests (HF_HUB_OFFLINE)."""
    from huggingface_hub import constants

    return constants.is_offline_mode()


def hub_api(endpoint: str) -> HfApi:
    """The client. It sets no time limits of its own: without ours, a silent server would stop a merge for ever."""
    from huggingface_hub import HfApi, get_session

    session = get_session()
    hooks = session.event_hooks
    if _limit_waits not in hooks["request"]:
        session.event_hooks = {**hooks, "request": [*hooks["request"], _limit_waits]}
    return HfApi(endpoint=endpoint, library_name="raymerge")


def _limit_waits(request: httpx2.Request) -> None:
    """Set the limits that a request lacks."""
    patience = Patience.from_environment()
    answer = patience.stall_seconds if request.method in ("GET", "HEAD") else _ANSWER_SECONDS
    limits = {"connect": patience.connect_seconds, "read": answer, "write": _ANSWER_SECONDS, "pool": _ANSWER_SECONDS}
    given = {name: value for name, value in request.extensions.get("timeout", {}).items() if value is not None}
    request.extensions = {**request.extensions, "timeout": {**limits, **given}}


def _authorization(endpoint: str, url: str) -> dict[str, str]:
    """The header with this process's token, for an address of the endpoint's own; nothing for any other."""
    from huggingface_hub import constants, get_token

    if _origin(url) != _origin(endpoint) or constants.HF_HUB_DISABLE_IMPLICIT_TOKEN:
        return {}
    token = get_token()
    return {} if token is None else {"Authorization": f"Bearer {token}"}


def _origin(url: str) -> tuple[str, str, int]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname or "", parts.port or {"http": 80, "https": 443}.get(parts.scheme, 0)


# ---------------------------------------------------------------------------------------------- its errors


@dataclass(frozen=True, slots=True)
class HubFailure:
    """What an exception of the client comes down to."""

    problem: Problem
    status: int | None = None
    passing: bool = False
    """It may be gone at the next attempt."""
    asked_seconds: float = 0.0

    def again(self) -> Again:
        return Again(self.problem.why, self.asked_seconds)


def client_errors() -> tuple[type[Exception], ...]:
    """Whatever the client raises, of its own and of those below it: also for an answer that makes no sense to it."""
    import httpx2
    from huggingface_hub.errors import DeviceCodeError, OIDCError

    return (
        OSError, ValueError, KeyError, TypeError, RuntimeError,
        httpx2.HTTPError, httpx2.InvalidURL, OIDCError, DeviceCodeError,
    )  # fmt: skip


def failure_of(error: BaseException, label: str) -> HubFailure:
    """Name what went wrong. Neither an address nor a text that is not the Hub's own gets into it."""
    import httpx2
    from huggingface_hub import errors as hub

    error = _unwrapped(error)

    def failure(code: str, what: str, why: str, fix: str, *, status: int | None = None) -> HubFailure:
        return HubFailure(Problem(code, what, label, why, fix), status)

    unreachable = "look at the network and the Hub, and run the same command again: it resumes"
    if isinstance(error, hub.OfflineModeIsEnabled):
        return failure("offline", f"{label} is not in the cache", "HF_HUB_OFFLINE is set", "unset HF_HUB_OFFLINE")
    if isinstance(error, hub.LocalTokenNotFoundError):
        return failure("forbidden", f"{label} needs a token", "none was found", "set HF_TOKEN, or run hf auth login")
    if isinstance(error, hub.HFValidationError):
        return failure(
            "no-such-source", f"{label} cannot be on the Hub", str(error), "a repository is written org/name"
        )
    if isinstance(error, hub.HfHubHTTPError):
        return _failure_of_answer(error, label)
    if isinstance(error, PermissionError):
        said = error.strerror or type(error).__name__
        return failure("forbidden", f"{label} is closed to us", said, "check the token (HF_TOKEN) and its rights")
    if isinstance(error, httpx2.TransportError | OSError | RuntimeError):  # the last is what hf_xet raises
        said = error.strerror if isinstance(error, OSError) and error.strerror else type(error).__name__
        problem = Problem("source-unreachable", f"the Hub cannot be reached for {label}", label, said, unreachable)
        return HubFailure(problem, passing=True)
    why = f"what it says makes no sense to the client ({type(error).__name__})"
    return failure("bad-answer", f"the Hub answers for {label} in a way that cannot be used", why, "check HF_ENDPOINT")


def _failure_of_answer(error: Any, label: str) -> HubFailure:
    from huggingface_hub import errors as hub

    headers = {name.lower(): value for name, value in error.response.headers.items()}
    status = int(error.response.status_code)
    why = f"the Hub answered {status}" + (f": {headers['x-error-message']}" if "x-error-message" in headers else "")
    if is_passing(status):
        fix = "look at the network and the Hub, and run the same command again: it resumes"
        problem = Problem("source-unreachable", f"the Hub does not answer for {label}", label, why, fix)
        return HubFailure(problem, status, passing=True, asked_seconds=asked_seconds(headers))
    kinds: list[tuple[type[Exception] | tuple[type[Exception], ...], str, str, str]] = [
        (hub.GatedRepoError, "gated", f"{label} is gated",
         "accept its conditions on its page, and give a token (HF_TOKEN) of an account that has"),
        (hub.RepositoryNotFoundError, "no-such-source", f"there is no repository {label}",
         "check the name; a private repository needs a token (HF_TOKEN) that may read it"),
        (hub.RevisionNotFoundError, "no-such-revision", f"there is no revision {label}",
         "check the branch, tag or commit"),
        (hub.EntryNotFoundError, "no-such-file", f"there is no file {label}", "check the reference"),
        (hub.DisabledRepoError, "forbidden", f"{label} was disabled by the Hub", "use another source"),
    ]  # fmt: skip
    for kind, code, what, fix in kinds:
        if isinstance(error, kind):
            return HubFailure(Problem(code, what, label, why, fix), status)
    if status in (401, 403):
        fix = "check the token (HF_TOKEN) and its rights"
        return HubFailure(Problem("forbidden", f"{label} is closed to us", label, why, fix), status)
    what = f"the Hub turned down a request for {label}"
    return HubFailure(Problem("bad-answer", what, label, why, "check the reference and HF_ENDPOINT"), status)


def ask(label: str, call: Callable[[], _T], *, refused: type[RaymergeError] = SourceError) -> _T:
    """What a call of the client returns, however many attempts it takes. The call must be one that may be repeated.

    Raises InfrastructureError when the budget (`Patience`) is spent, `refused` for what no attempt would change.
    """
    attempts = Attempts(f"what the Hub says of {label}", label, Patience.from_environment())
    errors = client_errors()
    while True:
        try:
            return call()
        except RaymergeError:
            raise
        except errors as error:
            if isinstance(ours := _unwrapped(error), RaymergeError):
                raise ours from None
            failure = failure_of(error, label)
        if not failure.passing:
            raise refused(failure.problem) from None
        attempts.failed(failure.again())


def _unwrapped(error: BaseException) -> BaseException:
    """What an upload's threads wrap."""
    while isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return error


# ---------------------------------------------------------------------------------------------- the store


@dataclass(frozen=True, slots=True)
class HubFile:
    """One file of a commit."""

    size: int
    content: str
    """What its bytes are, whatever the commit: SHA-256 of a file in large storage, git's blob id of any other."""

    @property
    def pin(self) -> str:
        return f"hub:{self.content}"


@dataclass(frozen=True, slots=True)
class _Location:
    """Where the Hub sends us for a file's bytes, for a while."""

    url: str = field(repr=False)
    xet_hash: str | None = None
    xet_route: str | None = field(default=None, repr=False)


class _Known:
    """What has been learnt of a commit: it travels. Locks and connections do not."""

    def __init__(self) -> None:
        self.files: Mapping[str, HubFile] | None = None
        self.locations: dict[str, _Location] = {}
        self.over_xet: set[str] = set()
        """Files whose address is refused even when it is fresh."""
        self.lock = threading.RLock()
        self.xet_groups: dict[str, Any] = {}
        self._file_locks: dict[str, threading.Lock] = {}

    def file_lock(self, path: str) -> threading.Lock:
        with self.lock:
            return self._file_locks.setdefault(path, threading.Lock())

    def __getstate__(self) -> dict[str, Any]:
        with self.lock:
            return {"files": self.files, "locations": dict(self.locations), "over_xet": set(self.over_xet)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        _Known.__init__(self)
        self.__dict__.update(state)


@dataclass(frozen=True, slots=True)
class HubStore:
    """A repository (or a folder in it) at a commit. Made by `pin_hub`."""

    repo: str
    revision: str
    """The commit, 40 hex digits."""
    subfolder: str = ""
    """No slash at either end."""
    endpoint: str = field(default_factory=default_endpoint)
    _known: _Known = field(default_factory=_Known, repr=False, compare=False)

    @property
    def uri(self) -> str:
        return f"hf://{self.repo}@{self.revision}" + (f"/{self.subfolder}" if self.subfolder else "")

    @property
    def remote(self) -> bool:
        return True

    def list_files(self) -> tuple[str, ...]:
        start = f"{self.subfolder}/" if self.subfolder else ""
        return tuple(sorted(path[len(start) :] for path in self._files() if path.startswith(start)))

    def stat(self, name: str) -> FileStat:
        file = self._file(name)
        return FileStat(file.size, file.pin)

    def read_into(self, name: str, reads: Sequence[RangeRead], *, pin: str | None = None) -> None:
        """From the cache where the file is there, else from the address that the Hub gave; over xet as a last resort.

        Raises SourceError also for `gated`, `forbidden` and `offline`, InfrastructureError when the budget is spent.
        """
        path = self._path(name)
        file = self._files().get(path)
        if pin is not None and (file is None or file.pin != pin):
            raise self._changed(path, "the commit holds another file under this name, or none")
        file = file or self._file(name)
        if (copy := _cached_copy(self.repo, self.revision, path, file.size)) is not None:
            LocalStore(str(copy.parent)).read_into(copy.name, reads)
            return
        if is_offline():
            raise self._missing(path)
        if path not in self._known.over_xet:
            try:
                read_ranges(_RemoteFile(self, path, file), reads)
            except SourceError as error:
                if error.problems[0].code not in ("forbidden", "bad-answer") or not self._has_xet(path):
                    raise
                self._resolve(path)  # raises where it is the Hub that refuses us: its tokens for xet would be too
                self._known.over_xet.add(path)
            else:
                return
        self._read_over_xet(path, file, reads)

    def resolve(self, names: Sequence[str]) -> None:
        """Learn the addresses of these files, many at once, so that no worker has to: they travel with the store."""
        wanted = []
        for name in names:
            path, file = self._path(name), self._file(name)
            if path not in self._known.locations and _cached_copy(self.repo, self.revision, path, file.size) is None:
                wanted.append(path)
        if not wanted or is_offline():
            return
        with ThreadPoolExecutor(_RESOLVED_AT_ONCE, thread_name_prefix="raymerge-hub") as threads:
            for _ in threads.map(self._locate, wanted):
                pass

    # ---- the list of files

    def _path(self, name: str) -> str:
        inside = check_name(name, self.uri).as_posix()
        return f"{self.subfolder}/{inside}" if self.subfolder else inside

    def _file(self, name: str) -> HubFile:
        path = self._path(name)
        file = self._files().get(path)
        if file is None:
            if is_offline():
                raise self._missing(path)
            raise SourceError.of(
                "no-such-file", f"there is no file {name}", where=f"{self.uri}/{name}", fix="check the reference"
            )
        return file

    def _files(self) -> Mapping[str, HubFile]:
        """All files of the commit, by their paths in the repository; offline, those that the cache has."""
        known = self._known
        if known.files is None:
            with known.lock:
                if known.files is None:
                    known.files = self._cached_files() if is_offline() else self._listed_files()
        return known.files

    def _listed_files(self) -> dict[str, HubFile]:
        from huggingface_hub.hf_api import RepoFile

        def listed() -> dict[str, HubFile]:
            entries = hub_api(self.endpoint).list_repo_tree(self.repo, revision=self.revision, recursive=True)
            return {
                entry.path: HubFile(entry.size, entry.blob_id if entry.lfs is None else entry.lfs.sha256)
                for entry in entries
                if isinstance(entry, RepoFile)
            }

        return ask(self._label(), listed)

    def _cached_files(self) -> dict[str, HubFile]:
        root = _cache_folder(self.repo) / "snapshots" / self.revision
        if not root.is_dir():
            raise _offline(self._label(), f"no file of commit {self.revision} is in the cache")
        found = {}
        for name in LocalStore(str(root)).list_files():
            with contextlib.suppress(OSError):  # a link whose blob was removed
                found[name] = HubFile((root / name).stat().st_size, _cached_content(root / name, self.revision, name))
        return found

    def _label(self, path: str = "") -> str:
        return f"hf://{self.repo}@{self.revision}" + (f"/{path}" if path else "")

    def _missing(self, path: str) -> SourceError:
        return _offline(self._label(path), "the cache holds no whole copy of it")

    def _changed(self, path: str, why: str) -> SourceChangedError:
        return SourceChangedError.of(
            "source-changed", f"{path} is no longer the file that was planned", where=self._label(path), why=why,
            fix="run the same command again with --restart: it plans anew",
        )  # fmt: skip

    # ---- addresses

    def _locate(self, path: str, refused: str | None = None) -> _Location:
        """The address in use, or a new one where there is none or `refused` is it. One thread asks for all."""
        known = self._known
        found = known.locations.get(path)
        if found is not None and found.url != refused:
            return found
        with known.file_lock(path):
            found = known.locations.get(path)
            if found is None or found.url == refused:
                found = self._resolve(path)
                known.locations[path] = found
            return found

    def _resolve(self, path: str) -> _Location:
        """Ask the Hub where a file's bytes are, and that it is still the file of the list."""
        from huggingface_hub import get_hf_file_metadata, hf_hub_url

        hub_api(self.endpoint)  # sets the time limits
        url = hf_hub_url(self.repo, path, revision=self.revision, endpoint=self.endpoint)
        timeout = Patience.from_environment().stall_seconds
        told = ask(self._label(path), lambda: get_hf_file_metadata(url, timeout=timeout, endpoint=self.endpoint))
        file = self._files()[path]
        for what, found, planned in (
            ("commit", told.commit_hash, self.revision),
            ("size", told.size, file.size),
            ("ETag", told.etag, file.content),
        ):
            if found is not None and found != planned:
                raise self._changed(path, f"the Hub gives {found} as its {what}, and {planned} was planned")
        xet = told.xet_file_data
        return _Location(told.location, *((None, None) if xet is None else (xet.file_hash, xet.refresh_route)))

    # ---- xet

    def _has_xet(self, path: str) -> bool:
        """Whether the file can be had over xet here: the Hub says how, and the client is installed and not disabled."""
        from importlib.util import find_spec

        from huggingface_hub import constants

        found = self._known.locations.get(path)
        if found is None or found.xet_hash is None or found.xet_route is None:
            return False
        return (
            not constants.HF_HUB_DISABLE_XET
            and find_spec("hf_xet") is not None
            and _origin(found.xet_route) == _origin(self.endpoint)
        )

    def _read_over_xet(self, path: str, file: HubFile, reads: Sequence[RangeRead]) -> None:
        location, label = self._locate(path), self._label(path)
        if location.xet_hash is None or location.xet_route is None:
            raise SourceError.of("forbidden", f"{label} is closed to us", where=label, fix="check the token's rights")
        try:
            with self._known.lock:
                group = self._known.xet_groups.get(location.xet_route)
                if group is None:
                    headers = _authorization(self.endpoint, location.xet_route)
                    group = self._known.xet_groups[location.xet_route] = _xet_group(location.xet_route, headers)
            for read in reads:
                view = read.into.cast("B")
                if read.start + view.nbytes > file.size:
                    raise SourceError.of(
                        "truncated", f"{path} ends before byte {read.start + view.nbytes}", where=label,
                        why="the header promises more bytes than the file has", fix="fetch the file again",
                    )  # fmt: skip
                _fill_over_xet(group, location.xet_hash, file.size, read.start, view)
        except (OSError, RuntimeError, ValueError, EOFError) as error:
            why = type(error).__name__ if not isinstance(error, EOFError) else str(error)
            if isinstance(error, PermissionError):
                raise SourceError.of(
                    "forbidden", f"{label} is closed to us", where=label, why=why, fix="check the token's rights"
                ) from None
            raise InfrastructureError.of(
                "source-unreachable", f"{label} could not be read over xet", where=label, why=why,
                fix="look at the network and the Hub, and run the same command again: it resumes",
            ) from None  # fmt: skip


@dataclass(frozen=True, slots=True)
class _RemoteFile:
    """A file of a store as the range reader sees it."""

    store: HubStore
    path: str
    file: HubFile

    @property
    def label(self) -> str:
        return self.store._label(self.path)  # noqa: SLF001 - two halves of one thing

    @property
    def size(self) -> int:
        return self.file.size

    @property
    def etag(self) -> str | None:
        """The Hub's own answers carry the file's; those of the content network have ETags of their own making."""
        own = _origin(self.store._locate(self.path).url) == _origin(self.store.endpoint)  # noqa: SLF001
        return self.file.content if own and ":" not in self.file.content else None

    def address(self) -> Address:
        return self._signed(self.store._locate(self.path))  # noqa: SLF001

    def renewed(self, refused: Address) -> Address:
        return self._signed(self.store._locate(self.path, refused.url))  # noqa: SLF001

    def _signed(self, location: _Location) -> Address:
        return Address(location.url, tuple(_authorization(self.store.endpoint, location.url).items()))


def pin_hub(repo: str, revision: str | None, subfolder: str = "", *, endpoint: str | None = None) -> HubStore:
    """The repository at the commit that a branch, a tag, a commit or nothing (the default branch) means now.

    Raises SourceError: `no-such-source`, `no-such-revision`, `forbidden`, `offline`; InfrastructureError.
    """
    endpoint = endpoint or default_endpoint()
    label = f"hf://{repo}" + (f"@{revision}" if revision is not None else "")
    if is_offline():
        commit = _cached_commit(repo, revision, label)
    else:
        timeout = Patience.from_environment().stall_seconds
        commit = ask(label, lambda: hub_api(endpoint).model_info(repo, revision=revision, timeout=timeout)).sha or ""
    if _COMMIT.fullmatch(commit) is None:
        raise SourceError.of(
            "bad-answer", f"{label} has no commit", where=label, why="none was named", fix="check HF_ENDPOINT"
        )
    return HubStore(repo, commit, subfolder, endpoint)


# ---------------------------------------------------------------------------------------------- the local cache


def _cache_folder(repo: str) -> Path:
    """Where the client keeps a repository: refs/, snapshots/ and blobs/ (its documented layout)."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / constants.REPO_ID_SEPARATOR.join(["models", *repo.split("/")])


def _cached_copy(repo: str, commit: str, path: str, size: int) -> Path | None:
    """A copy of the file in the cache, if there is one and it has the right size."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repo, path, revision=commit)
    with contextlib.suppress(OSError):
        if isinstance(found, str) and os.stat(found).st_size == size:
            return Path(found)
    return None


def _cached_content(path: Path, commit: str, name: str) -> str:
    """What the Hub calls the content: the name of the blob that a snapshot links to. A copy has lost it."""
    blob = path.resolve()
    return blob.name if blob.parent.name == "blobs" else f"{commit}:{name}"


def _cached_commit(repo: str, revision: str | None, label: str) -> str:
    if revision is not None and _COMMIT.fullmatch(revision):
        return revision
    reference = check_name(revision or "main", label)
    try:
        return (_cache_folder(repo) / "refs" / reference).read_text().strip()
    except OSError:
        raise _offline(label, "the cache does not know which commit that is") from None


def _offline(label: str, why: str) -> SourceError:
    return SourceError.of(
        "offline", f"{label} is not in the cache", where=label, why=f"HF_HUB_OFFLINE is set, and {why}",
        fix="unset HF_HUB_OFFLINE, or fill the cache first: hf download",
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------- what is private


def _xet_group(route: str, headers: Mapping[str, str]) -> Any:
    """A connection to the content store whose tokens `route` gives. The client's own session: it survives forks."""
    from huggingface_hub.utils import _xet

    session: Any = _xet.get_xet_session()  # type: ignore[no-untyped-call]
    return session.new_download_stream_group(token_refresh_url=route, token_refresh_headers=dict(headers))


def _fill_over_xet(group: Any, xet_hash: str, size: int, start: int, view: memoryview) -> None:
    """Fill `view` with the file's bytes from `start` on. Raises EOFError for more or fewer than were asked for."""
    from hf_xet import XetFileInfo

    done = 0
    if not view.nbytes:
        return
    for chunk in group.download_stream(XetFileInfo(xet_hash, size), start=start, end=start + view.nbytes):
        if done + len(chunk) > view.nbytes:
            raise EOFError(f"more than the {view.nbytes} bytes that were asked for came")
        view[done : done + len(chunk)] = chunk
        done += len(chunk)
    COUNTS.add(bytes_received=done)
    if done != view.nbytes:
        raise EOFError(f"{done} of {view.nbytes} bytes came")
