"""Byte ranges over HTTP, checked: `read_ranges`; and small idempotent requests: `send`. What the Hub and S3 share.

Every range is checked for status, Content-Range, length and version. A body that ends early is resumed where it ended;
a refused signature is renewed once; what the server asks for (Retry-After, RateLimit) is waited. No stock client does
all of this: five kinds of wrong answers pass through them as wrong bytes.

Connections and threads belong to the process. A signed URL is a secret: none ever stands in an error.
"""

from __future__ import annotations

import contextlib
import email.utils
import os
import random
import re
import ssl
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, fields
from typing import Any, Final, Protocol, TypeVar
from urllib.parse import urljoin, urlsplit

import urllib3

from merger.errors import InfrastructureError, SourceChangedError, SourceError
from merger.storage.base import RangeRead

T = TypeVar("T")

PIECE_BYTES: Final = 8 << 20
"""Longest range of one request: enough to hide a request's latency, short enough to share a file among connections."""
STEP_BYTES: Final = 256 << 10
"""Bytes taken from a socket at once, and the progress that an attempt needs not to be charged."""
MAX_REDIRECTS: Final = 4
ASKED_WAIT_SECONDS: Final = 300.0
"""Longest wait, all waits of one request together, that a server may ask for beyond our own deadline."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long one range is tried. Each can be set in the environment as RAYMERGE_HTTP_<NAME>."""

    attempts: int = 6
    """Attempts in a row that bring less than STEP_BYTES."""
    connect_seconds: float = 10.0
    stall_seconds: float = 20.0
    """Longest time without a byte."""
    deadline_seconds: float = 120.0
    """For one range, all attempts together, but for the waits that a server asks for."""
    first_wait_seconds: float = 0.25
    longest_wait_seconds: float = 8.0

    @classmethod
    def from_environment(cls) -> Patience:
        """What the environment says, with our defaults."""
        given: dict[str, Any] = {}
        for setting in fields(cls):
            with contextlib.suppress(KeyError, ValueError):
                kind = int if setting.name == "attempts" else float
                given[setting.name] = kind(os.environ[f"RAYMERGE_HTTP_{setting.name.upper()}"])
        return cls(**given)

    def wait_seconds(self, attempt: int) -> float:
        """Before attempt number `attempt` + 1: doubling, with full jitter upwards of a half."""
        longest = min(self.longest_wait_seconds, self.first_wait_seconds * 2.0 ** max(0, attempt - 1))
        return longest * random.uniform(0.5, 1.0)


@dataclass(frozen=True, slots=True)
class Address:
    """Where to ask, and with what headers."""

    url: str = field(repr=False)
    headers: tuple[tuple[str, str], ...] = field(default=(), repr=False)


class Resource(Protocol):
    """One version of one file behind HTTP. Shared by the threads of a process."""

    @property
    def label(self) -> str:
        """What errors call it: never the URL."""
        ...

    @property
    def size(self) -> int:
        """Bytes."""
        ...

    @property
    def etag(self) -> str | None:
        """The ETag that every answer must carry where it carries any; None where answers have none of their own."""
        ...

    def address(self) -> Address:
        """The address in use."""
        ...

    def renewed(self, refused: Address) -> Address:
        """A fresh one, after `refused` was refused: another thread may have renewed it already."""
        ...


@dataclass(frozen=True, slots=True)
class Answer:
    """What a request brought."""

    status: int
    headers: Mapping[str, str]
    """Names in lower case."""
    body: bytes

    @property
    def text(self) -> str:
        return self.body.decode("utf-8", "replace")


@dataclass(slots=True)
class Counts:
    """What went over the wire in this process, for reports and benchmarks."""

    requests: int = 0
    retries: int = 0
    throttled: int = 0
    """Answers 429 and 503."""
    bytes_received: int = 0
    bytes_sent: int = 0
    asked_wait_seconds: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, **more: float) -> None:
        with self._lock:
            for name, value in more.items():
                setattr(self, name, getattr(self, name) + value)


COUNTS: Final = Counts()


class Again(Exception):  # noqa: N818 - a step in a loop, not an error
    """This attempt failed in a way that may pass, after `received` bytes."""

    def __init__(self, why: str, asked_seconds: float = 0.0, received: int = 0) -> None:
        super().__init__(why)
        self.asked_seconds = asked_seconds
        self.received = received


class _Refused(Exception):  # noqa: N818
    """The signature or the token was not accepted."""


# ---------------------------------------------------------------------------------------------- what a process owns


def num_connections() -> int:
    """Requests of this process under way at once."""
    try:
        return max(1, min(64, int(os.environ.get("RAYMERGE_HTTP_CONNECTIONS", "16"))))
    except ValueError:
        return 16


class _Process:
    """Connections and threads, made anew after a fork."""

    def __init__(self) -> None:
        self.pid = -1
        self._lock = threading.Lock()
        self._managers: dict[str, urllib3.PoolManager] = {}
        self._threads: ThreadPoolExecutor | None = None

    def _mine(self) -> None:
        if self.pid != os.getpid():
            self.pid, self._managers, self._threads = os.getpid(), {}, None

    def manager(self, url: str) -> urllib3.PoolManager:
        """The connections for a URL, through a proxy where the environment names one."""
        parts = urlsplit(url)
        proxies = urllib.request.getproxies()
        proxy = proxies.get(parts.scheme, "")
        if proxy and parts.hostname and urllib.request.proxy_bypass(parts.hostname):
            proxy = ""
        with self._lock:
            self._mine()
            found = self._managers.get(proxy)
            if found is None:
                options: dict[str, Any] = {
                    "num_pools": 64, "maxsize": 2 * num_connections(), "block": False, "retries": False,
                    "ssl_context": _tls_context(),
                }  # fmt: skip
                found = urllib3.ProxyManager(proxy, **options) if proxy else urllib3.PoolManager(**options)
                self._managers[proxy] = found
            return found

    def threads(self) -> ThreadPoolExecutor:
        with self._lock:
            self._mine()
            if self._threads is None:
                self._threads = ThreadPoolExecutor(num_connections(), thread_name_prefix="raymerge-http")
            return self._threads


def submit(task: Callable[..., T], *arguments: Any) -> Future[T]:
    """Run a task on this process's transfer threads. It must not wait for another one there: not call `read_ranges`."""
    return _PROCESS.threads().submit(task, *arguments)


def _tls_context() -> ssl.SSLContext:
    context = ssl.create_default_context()
    for variable in ("AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE"):
        if path := os.environ.get(variable):
            context.load_verify_locations(path)
            return context
    if not context.get_ca_certs():
        with contextlib.suppress(ImportError):
            import certifi

            context.load_verify_locations(certifi.where())
    return context


_PROCESS: Final = _Process()


# ---------------------------------------------------------------------------------------------- ranges


@dataclass(slots=True)
class _Piece:
    """Bytes [start, end) that one request fetches, and where they go in order."""

    start: int
    end: int
    into: list[memoryview]

    def views_from(self, offset: int) -> Iterator[memoryview]:
        """What is left to fill after the first `offset` bytes."""
        for view in self.into:
            if offset >= view.nbytes:
                offset -= view.nbytes
                continue
            yield view[offset:]
            offset = 0


def read_ranges(resource: Resource, reads: Sequence[RangeRead], *, patience: Patience | None = None) -> None:
    """`read_files` of one file."""
    read_files([(resource, reads)], patience=patience)


def read_files(wanted: Sequence[tuple[Resource, Sequence[RangeRead]]], *, patience: Patience | None = None) -> None:
    """Fill every buffer, wholly, with the bytes of these versions of these files; many requests at once.

    Raises SourceChangedError when the file is another one now, SourceError when it is not there (`no-such-file`) or
    closed to us (`forbidden`), InfrastructureError (`source-unreachable`) when the server or the network does not
    answer properly within the budget. What a buffer holds after an error is undefined.
    """
    patience = patience or Patience.from_environment()
    for resource, reads in wanted:
        for read in reads:
            if read.start + read.into.nbytes > resource.size:
                raise SourceError.of(
                    "truncated", f"{resource.label} ends before byte {read.start + read.into.nbytes}",
                    where=resource.label, why="the header promises more bytes than the file has",
                    fix="fetch the file again",
                )  # fmt: skip
    pieces = [(resource, piece) for resource, reads in wanted for piece in _pieces(reads)]
    if len(pieces) == 1:
        _fetch(*pieces[0], patience)
        return
    gather([submit(_fetch, resource, piece, patience) for resource, piece in pieces])


def gather(futures: Sequence[Future[Any]]) -> None:
    """Wait for all; raise the first error, but only once no thread writes into a buffer any more."""
    done, waiting = wait(futures, return_when=FIRST_EXCEPTION)
    if any(future.exception() for future in done):
        for future in waiting:
            future.cancel()
        wait(futures)
    for future in futures:
        if not future.cancelled() and (error := future.exception()) is not None:
            raise error


def _pieces(reads: Sequence[RangeRead]) -> Iterator[_Piece]:
    """Requests of at most PIECE_BYTES; reads that touch share one."""
    piece: _Piece | None = None
    for read in sorted(reads, key=lambda r: r.start):
        view = read.into.cast("B")
        at = 0
        while at < view.nbytes:
            start = read.start + at
            if piece is not None and (piece.end != start or piece.end - piece.start >= PIECE_BYTES):
                yield piece
                piece = None
            if piece is None:
                piece = _Piece(start, start, [])
            count = min(view.nbytes - at, PIECE_BYTES - (piece.end - piece.start))
            piece.into.append(view[at : at + count])
            piece.end += count
            at += count
    if piece is not None:
        yield piece


def _fetch(resource: Resource, piece: _Piece, patience: Patience) -> None:
    """One range, however many attempts it takes within the budget."""
    loop = Attempts(f"bytes {piece.start} to {piece.end} of {resource.label}", resource.label, patience)
    address = resource.address()
    got, renewed = 0, False
    while got < piece.end - piece.start:
        try:
            got += _attempt(resource, address, piece, got, patience, loop)
        except _Refused as error:
            if renewed:
                raise _forbidden(resource.label, str(error)) from None
            address, renewed = resource.renewed(address), True
            COUNTS.add(retries=1)
        except Again as error:
            got += error.received
            if error.received:
                renewed = False
            loop.failed(error)


class Attempts:
    """The budget of one request."""

    def __init__(self, what: str, label: str, patience: Patience) -> None:
        self._what, self._label, self._patience = what, label, patience
        self._charged = 0
        self._asked = 0.0
        self.deadline = time.monotonic() + patience.deadline_seconds

    def failed(self, error: Again) -> None:
        """Charge a failed attempt and wait. Raises InfrastructureError when the budget is spent."""
        self._charged = self._charged + 1 if error.received < STEP_BYTES else 1
        pause = self._patience.wait_seconds(self._charged)
        asked = min(error.asked_seconds, ASKED_WAIT_SECONDS)
        spent = self._charged >= self._patience.attempts or time.monotonic() + pause > self.deadline
        if spent or self._asked + asked > ASKED_WAIT_SECONDS:
            raise InfrastructureError.of(
                "source-unreachable",
                f"{self._what} could not be transferred in {self._charged} attempts",
                where=self._label, why=str(error),
                fix="look at the network and the server, and run the same command again: it resumes",
            )  # fmt: skip
        if asked > pause:
            self._asked += asked
            self.deadline += asked
            COUNTS.add(asked_wait_seconds=asked)
            pause = asked
        COUNTS.add(retries=1)
        time.sleep(pause)


def _attempt(resource: Resource, address: Address, piece: _Piece, got: int, patience: Patience, loop: Attempts) -> int:
    """Ask for what is left of a piece and take it. Returns how much came: all of it, else raises Again with it."""
    start, stop = piece.start + got, piece.end
    headers = {
        "Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity", "User-Agent": "raymerge",
        **dict(address.headers),
    }  # fmt: skip
    with _opened("GET", address.url, headers, None, patience) as response:
        _check_range(resource, response, start, stop)
        received = 0
        try:
            for view in piece.views_from(got):
                filled = 0
                while filled < view.nbytes:
                    if time.monotonic() > loop.deadline:
                        raise Again("the deadline passed while bytes were still coming", received=received)
                    data = response.read1(min(STEP_BYTES, view.nbytes - filled))
                    if not data:
                        raise Again(f"the body ended after {received} of {stop - start} bytes", received=received)
                    view[filled : filled + len(data)] = data
                    filled += len(data)
                    received += len(data)
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise Again(_reason(error), received=received) from None
        finally:
            COUNTS.add(bytes_received=received)
        return received


@contextlib.contextmanager
def _opened(
    method: str, url: str, headers: Mapping[str, str], body: bytes | memoryview | None, patience: Patience
) -> Iterator[Any]:
    """A response, redirects followed; its connection is used again only if the body was taken to its end."""
    sent = dict(headers)
    if body is not None:
        sent["Content-Length"] = str(memoryview(body).nbytes)
    for _ in range(MAX_REDIRECTS):
        COUNTS.add(requests=1)
        try:
            response = _PROCESS.manager(url).request(
                method, url, body=None if body is None else _steps(body), headers=sent,
                preload_content=False, redirect=False, retries=False,
                decode_content=False,
                timeout=urllib3.Timeout(connect=patience.connect_seconds, read=patience.stall_seconds),
            )  # fmt: skip
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise Again(_reason(error)) from None
        location = response.headers.get("Location")
        if response.status not in (301, 302, 303, 307, 308) or not location or method != "GET":
            break
        response.close()
        target = urljoin(url, location)
        if urlsplit(target)[:2] != urlsplit(url)[:2]:
            sent = {name: value for name, value in sent.items() if name.lower() != "authorization"}
        url = target
    else:
        raise Again("too many redirects")
    try:
        yield response
    finally:
        if response.length_remaining == 0:
            response.release_conn()
        else:
            response.close()


def _steps(body: bytes | memoryview) -> Iterator[Any]:
    """A body in steps: a socket's time limit holds for one of them, not for the whole of a large part."""
    view = memoryview(body).cast("B")
    for start in range(0, view.nbytes, STEP_BYTES):
        yield view[start : start + STEP_BYTES]


_RANGE: Final = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")


def _check_range(resource: Resource, response: Any, start: int, stop: int) -> None:
    """Whether an answer is the range that was asked for, of the version that was pinned. Raises otherwise."""
    headers = response.headers
    if response.status not in (200, 206):
        _raise_for(resource.label, response)
    etag = headers.get("ETag")
    if resource.etag is not None and etag is not None and bare_etag(etag) != resource.etag:
        raise _changed(resource.label, f"its ETag is {bare_etag(etag)}, and {resource.etag} was planned")
    if headers.get("Content-Encoding", "identity") not in ("identity", ""):
        raise Again(f"the answer is encoded ({headers['Content-Encoding']}), which nobody asked for")
    length = headers.get("Content-Length")
    if response.status == 200:
        if start or stop != resource.size:
            raise Again("the whole file was sent where a range was asked for")
        if length is not None and length != str(resource.size):
            raise _changed(resource.label, f"it has {length} bytes now, and {resource.size} were planned")
        return
    found = _RANGE.fullmatch(headers.get("Content-Range", ""))
    if found is None:
        raise Again("the answer does not say which range it is")
    if found[3] not in ("*", str(resource.size)):
        raise _changed(resource.label, f"it has {found[3]} bytes now, and {resource.size} were planned")
    if (int(found[1]), int(found[2])) != (start, stop - 1):
        raise Again(f"bytes {found[1]} to {int(found[2]) + 1} were sent where {start} to {stop} were asked for")
    if length is not None and length != str(stop - start):
        raise Again(f"{length} bytes are announced where {stop - start} were asked for")


_EXPIRED: Final = re.compile(r"expired|ExpiredToken|TokenRefreshRequired", re.IGNORECASE)
_RETRYABLE: Final = frozenset({408, 425, 429})
_PERMANENT: Final = frozenset({501, 505})
_RETRYABLE_WORDS: Final = re.compile(
    r"SlowDown|RequestTimeout\b|IncompleteBody|BadDigest|ConditionalRequestConflict|OperationAborted"
)
"""S3's codes for what may pass though its status says otherwise (400, 409): a body hurt on its way, two at once."""


def _raise_for(label: str, response: Any) -> None:
    """The error of a status that is no success."""
    status = int(response.status)
    try:
        text = response.read(4096).decode("utf-8", "replace")
    except (urllib3.exceptions.HTTPError, OSError):
        text = ""
    headers = {name.lower(): value for name, value in response.headers.items()}
    if is_passing(status, text):
        count_throttling(status)
        raise Again(f"the server answered {status}", asked_seconds(headers))
    if status in (401, 403) or (status == 400 and _EXPIRED.search(text)):
        raise _Refused(f"the server answered {status}")
    if status in (404, 410):
        raise SourceError.of("no-such-file", f"there is no file {label}", where=label, fix="check the reference")
    if status in (412, 416):
        raise _changed(label, f"the server answered {status}: it holds another version now")
    raise SourceError.of(
        "bad-answer", f"the server answered {status} when asked for a range of {label}", where=label,
        why="the request was understood and turned down", fix="check the endpoint and the reference",
    )  # fmt: skip


def count_throttling(status: int) -> None:
    """Take note of an answer by which a server asks for less."""
    if status in (429, 503):
        COUNTS.add(throttled=1)


def is_passing(status: int, text: str = "") -> bool:
    """Whether a status may be gone at the next attempt."""
    if status in _RETRYABLE or (status >= 500 and status not in _PERMANENT):
        return True
    return status in (400, 409) and _RETRYABLE_WORDS.search(text) is not None


def asked_seconds(headers: Mapping[str, str]) -> float:
    """How long the server asks us to wait: Retry-After in seconds or as a date, or the Hub's `RateLimit: …;r=0;t=N`."""
    asked = 0.0
    if after := headers.get("retry-after"):
        if after.strip().isdigit():
            asked = float(after)
        else:
            with contextlib.suppress(TypeError, ValueError):
                asked = email.utils.parsedate_to_datetime(after).timestamp() - time.time()
    if (found := re.search(r"r=(\d+)\s*;\s*t=(\d+)", headers.get("ratelimit", ""))) and found[1] == "0":
        asked = max(asked, float(found[2]))
    return max(0.0, asked)


def bare_etag(etag: str) -> str:
    """An ETag without quotes and weakness."""
    return etag.strip().removeprefix("W/").strip('"')


def _reason(error: BaseException) -> str:
    """What went wrong on the wire, without the URL: signed URLs are secrets."""
    seen: BaseException = error
    while isinstance(reason := getattr(seen, "reason", None), BaseException):
        seen = reason
    kinds = {
        "ReadTimeoutError": "no byte came for too long", "ConnectTimeoutError": "no connection in time",
        "IncompleteRead": "the body ended early", "NameResolutionError": "the host's name is not known",
        "NewConnectionError": "no connection", "ProtocolError": "the connection broke",
        "SSLError": "the TLS handshake failed",
    }  # fmt: skip
    name = type(seen).__name__
    return kinds.get(name, seen.strerror if isinstance(seen, OSError) and seen.strerror else name)


def _changed(label: str, why: str) -> SourceChangedError:
    return SourceChangedError.of(
        "source-changed", f"{label} is no longer the file that was planned", where=label, why=why,
        fix="run the same command again with --restart: it plans from the new file",
    )  # fmt: skip


def _forbidden(label: str, why: str) -> SourceError:
    return SourceError.of(
        "forbidden", f"{label} is closed to us", where=label, why=f"{why}, with fresh credentials too",
        fix="check the token or the keys, their rights, and that access was granted",
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------- other requests


def send(
    label: str,
    method: str,
    sign: Callable[[], Address],
    body: bytes | memoryview | None = None,
    *,
    headers: Mapping[str, str] | None = None,
    patience: Patience | None = None,
    limit: int = 16 << 20,
    doubt: Callable[[Answer], str] | None = None,
) -> Answer:
    """An idempotent request, signed afresh for each attempt. Returns the first answer that no retry would change.

    `doubt` looks at an answer and says why it cannot be right and is worth asking again, or nothing. Of a body, at most
    `limit` bytes are taken.

    401 and 403 are asked once more with a fresh signature, then returned. Raises InfrastructureError when the budget is
    spent; RaymergeError of `sign`.
    """
    patience = patience or Patience.from_environment()
    loop = Attempts(f"{method} of {label}", label, patience)
    refused = False
    while True:
        address = sign()
        sent = {"User-Agent": "raymerge", "Accept-Encoding": "identity", **(headers or {}), **dict(address.headers)}
        try:
            with _opened(method, address.url, sent, body, patience) as response:
                try:
                    data = response.read(limit)
                except (urllib3.exceptions.HTTPError, OSError) as error:
                    raise Again(_reason(error)) from None
                if response.length_remaining and len(data) < limit and method != "HEAD":
                    raise Again(f"the body ended {response.length_remaining} bytes early")
            found = {name.lower(): value for name, value in response.headers.items()}
            answer = Answer(int(response.status), found, data)
        except Again as error:
            loop.failed(error)
            continue
        if body is not None:
            COUNTS.add(bytes_sent=memoryview(body).nbytes)
        if is_passing(answer.status, answer.text[:4096]) or _is_error_body(answer):
            count_throttling(answer.status)
            loop.failed(Again(f"the server answered {answer.status}", asked_seconds(found)))
            continue
        if doubt is not None and (why := doubt(answer)):
            loop.failed(Again(why))
            continue
        if answer.status in (401, 403) and not refused:
            refused = True
            COUNTS.add(retries=1)
            continue
        return answer


def _is_error_body(answer: Answer) -> bool:
    """S3 may answer 200 and then say in the body that it failed inside."""
    return answer.status == 200 and answer.body[:512].lstrip().startswith(b"<?xml") and b"<Error>" in answer.body[:512]


__all__ = [
    "COUNTS", "Address", "Again", "Answer", "Attempts", "Patience", "Resource", "asked_seconds", "bare_etag",
    "count_throttling", "gather",
    "is_passing", "read_files", "read_ranges", "send", "submit",
]  # fmt: skip
