"""A reverse proxy that knows HTTP and does wrong on demand: it stands before a server, or serves a folder by itself.

    with FaultProxy.start(s3.endpoint) as proxy:
        proxy.add(Fault("cut", range_only=True, at=1000, times=2))
        ...  # a client at proxy.endpoint: two ranges end after 1000 bytes, the third is whole
        assert [exchange.fault for exchange in proxy.log()] == ["cut", "cut", None]

Requests go on as they came, Host header included, so that signatures hold. Bodies stream both ways. The answer is
written to the socket by hand, since most faults are answers that no HTTP library would write.

It runs as a process of its own, and `python -m tests.counterparts.faults --upstream URL` runs one in the foreground.
Rules are set over a second port: POST /faults (a Fault as JSON), DELETE /faults, GET /log, DELETE /log, POST /wait.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gzip
import http.client
import itertools
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import KW_ONLY, asdict, dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, NamedTuple, Self, get_args
from urllib.parse import unquote

from tests.counterparts.tcp import Pace, reset_when_closed, until_delivered

Kind = Literal[
    "status", "error200", "redirect", "reset", "lost", "cut", "unsized", "stall", "delay", "slow",
    "whole", "shifted", "short", "total", "etag", "flip", "gzip",
]  # fmt: skip

LATENCY: Final = frozenset({"delay", "slow"})
"""Kinds that stack, with each other and with one other fault."""
NEEDS_BODY: Final = frozenset({"cut", "unsized", "flip", "gzip"})
NEEDS_RANGE: Final = frozenset({"whole", "shifted", "short"})
PIECE: Final = 256 << 10
CONTROL_SECONDS: Final = 60.0


@dataclass(frozen=True, slots=True)
class Fault:
    """A rule: which requests it is for, how many of them, and what happens to them.

    Rules are asked in the order they were added. A request meets every `delay` and `slow` that is for it, and the first
    other rule that is; the rules after that one do not count it. A fault that cannot bite (a cut where there is no
    body, a short range where the answer is 404) is not used up.
    """

    kind: Kind
    """status    `code` with `headers`, and `body` or the S3 XML of `error`
    error200     200 with the S3 XML of `error`, as CompleteMultipartUpload may answer
    redirect     `code` (307) to `location` (the same path at the upstream)
    reset        RST: before the answer, or after `at` bytes of its body
    lost         the upstream gets the request and answers; the client gets RST
    cut          Content-Length promises the body; it ends (FIN) after `at` bytes
    unsized      no Content-Length, not chunked; the connection closes after `at` bytes or the whole body
    stall        silence for `seconds` or until `clear`: before the answer, or after `at` bytes of its body
    delay        `seconds` (or between `seconds` and `up_to`, evenly), then as if nothing were
    slow         at most `bytes_per_second` each way, per connection
    whole        200 with the whole object where a range was asked
    shifted      206 with the bytes of a range `shift` further (or less far); `claim` says what Content-Range tells
    short        206 with the first `length` bytes (half) of the range, Content-Range to match
    total        Content-Range (of HEAD: Content-Length) tells `total` (one more than there is)
    etag         `etag` in place of the ETag
    flip         one bit of the body byte `at` (the first) is flipped
    gzip         the body gzipped, Content-Encoding: gzip, though nobody accepted that
    """
    _: KW_ONLY
    method: str | None = None
    """A regex for the whole method: "PUT|POST"."""
    path: str | None = None
    """A regex for a part of the path, as it came (%-encoded)."""
    query: str | None = None
    range_only: bool = False
    """Only requests with a Range header."""
    after: int = 0
    """Let so many through first."""
    times: int | None = 1
    """Bite so many; None: always."""

    at: int | None = None
    """Bytes of the answer's body; negative: from its end. A fault that ends the body never lets all of it out."""
    seconds: float | None = None
    up_to: float | None = None
    bytes_per_second: float | None = None
    code: int | None = None
    error: str = ""
    """An S3 error code: SlowDown, InternalError, AccessDenied."""
    body: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    """Put into the answer, of whatever kind, last."""
    location: str = ""
    shift: int = 1
    claim: Literal["sent", "asked", "start"] = "sent"
    """`sent`: the range that the bytes are of. `asked`: the range asked, a lie that no header shows. `start`: the start
    of what was sent with the end that was asked, which fits neither."""
    length: int | None = None
    total: int | None = None
    etag: str = '"00000000000000000000000000000000"'
    forward: bool = False
    """status, error200: the upstream gets the request first, so that it took effect."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"no fault is called {self.kind!r}; the kinds are {', '.join(get_args(Kind))}")
        needed = {"cut": "at", "delay": "seconds", "slow": "bytes_per_second"}.get(self.kind)
        if needed and getattr(self, needed) is None:
            raise ValueError(f"{self.kind} needs {needed}")
        for pattern in (self.method, self.path, self.query):
            re.compile(pattern or "")


@dataclass(slots=True)
class Exchange:
    """A request and what came of it so far. In the log from when its head was read, in that order."""

    connection: int
    """Connections count from 0."""
    method: str
    path: str
    query: str
    range: str | None
    headers: Mapping[str, str]
    """The request's, names in lower case."""
    status: int | None = None
    """What the client was sent; None: nothing (yet)."""
    upstream_status: int | None = None
    sent_bytes: int = 0
    """Of the answer's body."""
    received_bytes: int = 0
    """Of the request's body."""
    fault: Kind | None = None
    """Set when it bites; `delay` and `slow` only where no other did."""


class FaultProxy:
    """A proxy that runs until `stop`, or until the process that started it is gone."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, control_port: int) -> None:
        self._process = process
        self._control_port = control_port
        self.endpoint: Final = f"http://127.0.0.1:{port}"
        self.control: Final = f"http://127.0.0.1:{control_port}"

    @classmethod
    def start(
        cls,
        upstream: str | None = None,
        *,
        folder: Path | None = None,
        objects: str | None = None,
        rewrite: Mapping[str, str] | None = None,
    ) -> Self:
        """Before `upstream`, or serving the files of `folder` (ranges, ETag, If-Match, If-None-Match).

        `objects`: where a path is read without a signature, for faults of ranges whose signature covers the range
        (S3Server.objects). `rewrite`: beginnings of URLs to replace in the Location and Link headers of answers, so
        that what the upstream redirects to is met through a proxy too.
        """
        if (upstream is None) == (folder is None):
            raise ValueError("name an upstream or a folder")
        task = {
            "upstream": upstream,
            "folder": None if folder is None else str(folder.absolute()),
            "objects": objects,
            "rewrite": dict(rewrite or {}),
        }
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.counterparts.faults", "--task", json.dumps(task)],
            cwd=Path(__file__).parents[2],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            process.communicate()
            raise RuntimeError("the fault proxy did not start; its error is on stderr")
        ready = json.loads(line)
        return cls(process, ready["port"], ready["control_port"])

    def stop(self) -> None:
        if self._process.returncode is None:
            self._process.communicate(timeout=30)  # closes its stdin, which ends it

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def add(self, *faults: Fault) -> None:
        for fault in faults:
            self._ask("POST", "/faults", asdict(fault))

    def clear(self) -> None:
        """Forget all faults, and end every stall. The log stays."""
        self._ask("DELETE", "/faults")

    def log(self) -> list[Exchange]:
        """All exchanges so far, in the order in which they arrived."""
        return [Exchange(**entry) for entry in self._ask("GET", "/log")]

    def forget(self) -> None:
        """Empty the log."""
        self._ask("DELETE", "/log")

    def wait_for(
        self,
        count: int,
        *,
        method: str | None = None,
        path: str | None = None,
        fault: Kind | None = None,
        seconds: float = 30.0,
    ) -> list[Exchange]:
        """Wait until the log has `count` exchanges of this method and path (regexes, as in Fault) that met `fault`.

        Raises TimeoutError.
        """
        wanted = {"count": count, "method": method, "path": path, "fault": fault, "seconds": seconds}
        found = self._ask("POST", "/wait", wanted)
        if found is None:
            raise TimeoutError(f"not {count} such exchanges within {seconds} s: {self.log()}")
        return [Exchange(**entry) for entry in found]

    def _ask(self, method: str, path: str, value: object = None) -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", self._control_port, timeout=CONTROL_SECONDS)
        try:
            connection.request(method, path, json.dumps(value))
            answer = connection.getresponse()
            text = answer.read()
        finally:
            connection.close()
        if answer.status != 200:
            raise ValueError(text.decode())
        return json.loads(text)


# ---- one connection --------------------------------------------------------------------------------------------------


class _DropError(Exception):
    """End the connection now: with RST, or with FIN after what was sent."""

    def __init__(self, *, reset: bool) -> None:
        super().__init__()
        self.reset = reset


class _UnfitError(Exception):
    """The fault cannot bite on this answer."""


class _MisuseError(Exception):
    """The rule asks for what cannot be done here. The client gets it as a 500, so that the test fails loudly."""


class _Line(NamedTuple):
    """A client's connection."""

    number: int
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    pace: Pace

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()  # the write buffer's limit is 0: returns when the kernel has it all

    async def reset(self) -> None:
        if not self.writer.transport.is_closing():
            connection = self.writer.get_extra_info("socket")
            await until_delivered(connection)
            reset_when_closed(connection)
            self.writer.transport.abort()


class _Body:
    """A request's body, read piece by piece. Says 100 Continue when it is first wanted, and not before."""

    def __init__(self, line: _Line, headers: Mapping[str, str]) -> None:
        self._line = line
        self._chunked = headers.get("transfer-encoding", "").lower() == "chunked"
        self._left = 0 if self._chunked else int(headers.get("content-length", 0))
        self.expects = headers.get("expect", "").lower() == "100-continue"
        self.done = not self._chunked and not self._left
        self.is_there = not self.done
        self.read_bytes = 0
        self.rate: float | None = None

    async def read(self) -> bytes:
        """The next piece, empty at the end."""
        if self.done:
            return b""
        if self.expects:
            self.expects = False
            await self._line.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        reader = self._line.reader
        if self._chunked and not self._left:
            self._left = int((await reader.readuntil(b"\r\n")).partition(b";")[0], 16)
            if not self._left:
                while await reader.readuntil(b"\r\n") != b"\r\n":
                    pass  # trailers
                self.done = True
                return b""
        piece = await reader.read(min(self._left, PIECE))
        if not piece:
            raise asyncio.IncompleteReadError(b"", self._left)
        await self._line.pace.cross(len(piece), self.rate)
        self._left -= len(piece)
        self.read_bytes += len(piece)
        if not self._left:
            if self._chunked:
                await reader.readexactly(2)
            else:
                self.done = True
        return piece

    async def pieces(self) -> AsyncIterator[bytes]:
        while piece := await self.read():
            yield piece

    async def drain(self) -> None:
        while await self.read():
            pass


@dataclass(frozen=True, slots=True)
class _Request:
    method: str
    target: str
    version: str
    fields: tuple[tuple[str, str], ...]
    headers: Mapping[str, str]
    body: _Body

    @property
    def path(self) -> str:
        return self.target.partition("?")[0]

    @property
    def query(self) -> str:
        return self.target.partition("?")[2]

    @property
    def range(self) -> str | None:
        return self.headers.get("range")


async def _read_request(line: _Line) -> _Request | None:
    """The next request of a connection, or None when the client is done with it."""
    try:
        head = await line.reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        return None
    first, *rest = head.decode("latin-1").split("\r\n")[:-2]
    method, target, version = first.split(" ")
    fields = tuple((name.strip(), value.strip()) for name, _, value in (each.partition(":") for each in rest))
    headers = {name.lower(): value for name, value in fields}
    return _Request(method, target, version, fields, headers, _Body(line, headers))


@dataclass(frozen=True, slots=True)
class _Answer:
    status: int
    fields: tuple[tuple[str, str], ...]
    """Without those that belong to the connection."""
    length: int | None
    """Of the body; None: not known."""
    pieces: AsyncIterator[bytes]

    def header(self, name: str) -> str | None:
        return next((value for key, value in self.fields if key.lower() == name.lower()), None)

    def with_headers(self, headers: Mapping[str, str | None]) -> _Answer:
        """Set these headers; None removes one."""
        named = {name.lower() for name in headers}
        kept = tuple((name, value) for name, value in self.fields if name.lower() not in named)
        return replace(self, fields=kept + tuple((name, value) for name, value in headers.items() if value is not None))

    def with_body(self, length: int, pieces: AsyncIterator[bytes]) -> _Answer:
        return replace(self.with_headers({"Content-Length": str(length)}), length=length, pieces=pieces)

    def content_range(self) -> tuple[int, int, int]:
        """Start, end (exclusive) and total. Raises _UnfitError when this is no answer to one range."""
        found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", self.header("Content-Range") or "")
        if self.status != 206 or not found:
            raise _UnfitError
        start, last, total = (int(each) for each in found.groups())
        return start, last + 1, total


async def _once(data: bytes) -> AsyncIterator[bytes]:
    if data:
        yield data


async def _first(pieces: AsyncIterator[bytes], length: int) -> AsyncIterator[bytes]:
    async for piece in pieces:
        yield piece[:length]
        length -= min(length, len(piece))
        if not length:
            return


async def _flipped(pieces: AsyncIterator[bytes], at: int) -> AsyncIterator[bytes]:
    start = 0
    async for piece in pieces:
        changed = bytearray(piece)
        if start <= at < start + len(piece):
            changed[at - start] ^= 1
        yield bytes(changed)
        start += len(piece)


def _made(status: int, text: str = "", *, kind: str = "text/plain") -> _Answer:
    data = text.encode()
    fields = (("Content-Type", kind), ("Content-Length", str(len(data))))
    return _Answer(status, fields, len(data), _once(data))


def _error_xml(code: str) -> str:
    return (
        '<?xml version="1.0" encoding="UTF-8"?>\n'
        f"<Error><Code>{code}</Code><Message>asked for by a test</Message><RequestId>0</RequestId></Error>"
    )


# ---- where answers come from -----------------------------------------------------------------------------------------

OF_THE_CONNECTION: Final = frozenset(
    {"connection", "keep-alive", "transfer-encoding", "te", "upgrade", "expect", "proxy-connection"}
)


class _Upstream:
    """Another server."""

    def __init__(self, url: str, objects: str | None, rewrite: Mapping[str, str]) -> None:
        import aiohttp

        self.url = url.rstrip("/")
        self._objects = objects
        self._rewrite = rewrite
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=5),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=10),
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            read_bufsize=2 * PIECE,
            skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
        )

    async def ask(self, request: _Request, stack: contextlib.AsyncExitStack) -> _Answer:
        fields = [(name, value) for name, value in request.fields if name.lower() not in OF_THE_CONNECTION]
        body = request.body
        return await self._get(
            request.method,
            self.url + request.target,
            fields,
            stack,
            data=body.pieces() if body.is_there else None,
            expect100=body.expects,
        )

    async def ask_bytes(
        self, request: _Request, start: int, end: int, stack: contextlib.AsyncExitStack
    ) -> AsyncIterator[bytes]:
        """Other bytes of the object that the request asks a range of."""
        signed = re.search(r"SignedHeaders=([^,&\s]*)", request.headers.get("authorization", "") + "&" + request.query)
        if signed is None or "range" not in unquote(signed[1]).split(";"):
            url = self.url + request.target
            kept = [f for f in request.fields if f[0].lower() not in OF_THE_CONNECTION | {"range"}]
        elif self._objects is not None:
            url, kept = self._objects + request.path, []
        else:
            raise _MisuseError("the signature covers the range: start the proxy with objects=")
        answer = await self._get("GET", url, [*kept, ("Range", f"bytes={start}-{end - 1}")], stack)
        if answer.status != 206 or answer.length != end - start:
            raise _MisuseError(f"the upstream answered {answer.status} to bytes {start}-{end - 1}")
        return answer.pieces

    async def _get(
        self, method: str, url: str, fields: list[tuple[str, str]], stack: contextlib.AsyncExitStack, **more: Any
    ) -> _Answer:
        from multidict import CIMultiDict
        from yarl import URL

        response = await self._session.request(
            method, URL(url, encoded=True), headers=CIMultiDict(fields), allow_redirects=False, **more
        )
        stack.callback(response.close)
        found = tuple(
            (name, self._rewritten(name, value))
            for name, value in response.headers.items()
            if name.lower() not in OF_THE_CONNECTION
        )
        length = None if "Content-Length" not in response.headers else int(response.headers["Content-Length"])
        return _Answer(response.status, found, length, response.content.iter_any())

    def _rewritten(self, name: str, value: str) -> str:
        if name.lower() in {"location", "link"}:
            for before, after in self._rewrite.items():
                value = value.replace(before, after)
        return value


class _Folder:
    """The files of a folder, as a plain static server would give them."""

    url = ""

    def __init__(self, folder: str) -> None:
        self._folder = os.path.realpath(folder)

    async def ask(self, request: _Request, stack: contextlib.AsyncExitStack) -> _Answer:
        await request.body.drain()
        if request.method not in {"GET", "HEAD"}:
            return _made(405, "only GET and HEAD")
        try:
            fd = self._open(request, stack)
        except OSError:
            return _made(404, "no such file")
        stat = os.fstat(fd)
        etag = f'"{stat.st_mtime_ns:x}-{stat.st_size:x}"'
        said = (("ETag", etag), ("Accept-Ranges", "bytes"), ("Content-Type", "application/octet-stream"))
        if request.headers.get("if-match", etag) not in {etag, "*"}:
            return _made(412)
        if request.headers.get("if-none-match") in {etag, "*"}:
            return _Answer(304, said, 0, _once(b""))
        found = re.fullmatch(r"bytes=(\d*)-(\d*)", request.range or "")
        if found is None or not any(found.groups()):
            whole = _Answer(200, said, stat.st_size, _once(b""))
            return whole.with_body(stat.st_size, _read(fd, 0, stat.st_size))
        first, last = found.groups()
        start = int(first) if first else max(0, stat.st_size - int(last))
        end = min(stat.st_size, int(last) + 1) if first and last else stat.st_size
        if start >= end:
            return _made(416).with_headers({"Content-Range": f"bytes */{stat.st_size}", "ETag": etag})
        told = (*said, ("Content-Range", f"bytes {start}-{end - 1}/{stat.st_size}"))
        return _Answer(206, told, None, _once(b"")).with_body(end - start, _read(fd, start, end))

    async def ask_bytes(
        self, request: _Request, start: int, end: int, stack: contextlib.AsyncExitStack
    ) -> AsyncIterator[bytes]:
        return _read(self._open(request, stack), start, end)

    def _open(self, request: _Request, stack: contextlib.AsyncExitStack) -> int:
        path = os.path.realpath(os.path.join(self._folder, unquote(request.path).lstrip("/")))
        if os.path.commonpath([self._folder, path]) != self._folder or not os.path.isfile(path):
            raise FileNotFoundError(path)
        fd = os.open(path, os.O_RDONLY)
        stack.callback(os.close, fd)
        return fd


async def _read(fd: int, start: int, end: int) -> AsyncIterator[bytes]:
    while start < end:
        piece = os.pread(fd, min(PIECE, end - start), start)
        if not piece:
            raise _DropError(reset=True)  # the file was cut while we sent it
        yield piece
        start += len(piece)


# ---- the proxy -------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Rule:
    fault: Fault
    seen: int = 0
    bitten: int = 0

    def takes(self, request: _Request) -> bool:
        """Whether this request meets the fault, and count it."""
        fault = self.fault
        if not _is_for(request, fault) or (fault.times is not None and self.bitten >= fault.times):
            return False
        self.seen += 1
        if self.seen <= fault.after:
            return False
        self.bitten += 1
        return True


def _is_for(request: _Request, fault: Fault) -> bool:
    has_range, is_head = request.range is not None, request.method == "HEAD"
    ends_body = fault.kind in NEEDS_BODY or (fault.kind in {"reset", "stall"} and fault.at is not None)
    return (
        _matches(fault.method, fault.path, request.method, request.path)
        and (fault.query is None or re.search(fault.query, request.query) is not None)
        and (has_range or not fault.range_only)
        and (not is_head or not ends_body)
        and (fault.kind not in NEEDS_RANGE or (has_range and not is_head))
        and (fault.kind != "total" or has_range or is_head)
    )


def _matches(method: str | None, path: str | None, its_method: str, its_path: str) -> bool:
    return (method is None or re.fullmatch(method, its_method, re.IGNORECASE) is not None) and (
        path is None or re.search(path, its_path) is not None
    )


class _Proxy:
    def __init__(self, source: _Upstream | _Folder) -> None:
        self._source = source
        self._rules: list[_Rule] = []
        self._log: list[Exchange] = []
        self._changed = asyncio.Condition()
        self._cleared = asyncio.Event()
        self._numbers = itertools.count()
        self._random = random.Random(0)

    # ---- rules and log, over the control port

    async def control(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        line = _Line(-1, reader, writer, Pace())
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            if request := await _read_request(line):
                data = b"".join([piece async for piece in request.body.pieces()])
                try:
                    status, value = 200, await self._command(request, json.loads(data or b"null"))
                except (LookupError, TypeError, ValueError, re.error) as error:
                    status, value = 400, str(error)
                text = json.dumps(value).encode()
                head = f"HTTP/1.1 {status} X\r\nContent-Length: {len(text)}\r\nConnection: close\r\n\r\n"
                await line.send(head.encode() + text)
        writer.close()

    async def _command(self, request: _Request, value: Any) -> object:
        match request.method, request.path:
            case "POST", "/faults":
                self._rules.append(_Rule(Fault(**value)))
            case "DELETE", "/faults":
                self._rules.clear()
                self._cleared.set()
                self._cleared = asyncio.Event()
            case "GET", "/log":
                return [asdict(exchange) for exchange in self._log]
            case "DELETE", "/log":
                self._log.clear()
            case "POST", "/wait":
                return await self._wait(**value)
            case _:
                raise LookupError(f"no such command: {request.method} {request.path}")
        return True

    async def _wait(
        self, count: int, method: str | None, path: str | None, fault: Kind | None, seconds: float
    ) -> object:
        def found() -> list[Exchange]:
            return [
                each
                for each in self._log
                if _matches(method, path, each.method, each.path) and (fault is None or each.fault == fault)
            ]

        async with self._changed:
            try:
                await asyncio.wait_for(self._changed.wait_for(lambda: len(found()) >= count), seconds)
            except TimeoutError:
                return None
            return [asdict(each) for each in found()]

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    # ---- exchanges

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one connection's requests until either side ends it."""
        import aiohttp

        writer.transport.set_write_buffer_limits(high=0)
        line = _Line(next(self._numbers), reader, writer, Pace())
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while request := await _read_request(line):
                try:
                    keep = await self._exchange(request, line)
                except aiohttp.ClientError:  # the upstream broke off in its answer
                    await line.reset()
                    break
                except _DropError as drop:
                    if drop.reset:
                        await line.reset()
                    break
                if not keep:
                    break
        writer.close()

    async def _exchange(self, request: _Request, line: _Line) -> bool:
        """Answer one request. Whether the connection may be used again."""
        taken: list[_Rule] = []
        for rule in self._rules:
            if (rule.fault.kind in LATENCY or all(t.fault.kind in LATENCY for t in taken)) and rule.takes(request):
                taken.append(rule)
        latency = [rule.fault for rule in taken if rule.fault.kind in LATENCY]
        main = next((rule for rule in taken if rule.fault.kind not in LATENCY), None)
        exchange = Exchange(line.number, request.method, request.path, request.query, request.range, request.headers)
        if latency and main is None:
            exchange.fault = latency[0].kind
        self._log.append(exchange)
        await self._tell()
        rate = min((f.bytes_per_second for f in latency if f.bytes_per_second is not None), default=None)
        request.body.rate = rate
        for fault in latency:
            if fault.kind == "delay" and fault.seconds is not None:
                await asyncio.sleep(self._random.uniform(fault.seconds, fault.up_to or fault.seconds))
        try:
            async with contextlib.AsyncExitStack() as stack:
                answer = await self._answer(request, main, exchange, stack)
                for fault in latency:
                    answer = answer.with_headers(fault.headers)
                keep = await self._send(request, answer, main, exchange, line, rate)
            if not request.body.done and not request.body.expects:
                await request.body.drain()  # the upstream answered early; what the client still sends would become RST
        finally:
            exchange.received_bytes = request.body.read_bytes
        return keep

    async def _strike(self, fault: Fault, exchange: Exchange) -> None:
        """Note that a fault bites, and wait out a stall."""
        exchange.fault = fault.kind
        cleared = self._cleared
        await self._tell()
        if fault.kind == "stall":
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(cleared.wait(), fault.seconds)

    async def _answer(
        self, request: _Request, rule: _Rule | None, exchange: Exchange, stack: contextlib.AsyncExitStack
    ) -> _Answer:
        """What to send: the upstream's answer, or what the fault makes of it."""
        if rule is None:
            return await self._ask(request, exchange, stack)
        fault = rule.fault
        if fault.kind in {"reset", "stall"} and fault.at is None:
            await self._strike(fault, exchange)
            if fault.kind == "reset":
                raise _DropError(reset=True)
        if fault.kind in {"status", "error200", "redirect"}:
            if fault.forward:
                answer = await self._ask(request, exchange, stack)
                async for _ in answer.pieces:
                    pass
            await request.body.drain()
            await self._strike(fault, exchange)
            return self._instead(request, fault).with_headers(fault.headers)
        answer = await self._ask(request, exchange, stack)
        if fault.kind == "lost":
            async for _ in answer.pieces:
                pass
            await self._strike(fault, exchange)
            raise _DropError(reset=True)
        try:
            answer = await self._changed_answer(request, answer, fault, stack)
        except _UnfitError:
            rule.bitten -= 1
            return answer
        except _MisuseError as error:
            await self._strike(fault, exchange)
            return _made(500, str(error))
        if fault.kind not in {"cut", "unsized", "reset", "stall"}:
            await self._strike(fault, exchange)
        return answer.with_headers(fault.headers)

    async def _ask(self, request: _Request, exchange: Exchange, stack: contextlib.AsyncExitStack) -> _Answer:
        import aiohttp

        try:
            answer = await self._source.ask(request, stack)
        except aiohttp.ClientError as error:
            return _made(502, f"the proxy got no answer from its upstream: {error!r}")
        exchange.upstream_status = answer.status
        return answer

    def _instead(self, request: _Request, fault: Fault) -> _Answer:
        if fault.kind == "redirect":
            where = fault.location or self._source.url + request.target
            return _made(fault.code or 307).with_headers({"Location": where})
        status = 200 if fault.kind == "error200" else fault.code or 503
        error = fault.error or ("InternalError" if fault.kind == "error200" else "")
        return _made(status, _error_xml(error), kind="application/xml") if error else _made(status, fault.body)

    async def _changed_answer(
        self, request: _Request, answer: _Answer, fault: Fault, stack: contextlib.AsyncExitStack
    ) -> _Answer:
        """The answer that the fault makes of the upstream's. Raises _UnfitError where it can make none."""
        match fault.kind:
            case "cut" | "unsized" | "reset" | "stall" if fault.at is not None and not answer.length:
                raise _UnfitError
            case "whole":
                _, _, total = answer.content_range()
                body = await self._source.ask_bytes(request, 0, total, stack)
                return replace(answer.with_headers({"Content-Range": None}), status=200).with_body(total, body)
            case "shifted":
                start, end, total = answer.content_range()
                moved = start + (fault.shift if 0 <= start + fault.shift <= total - (end - start) else -fault.shift)
                if not 0 <= moved <= total - (end - start):
                    raise _MisuseError(f"a range of {end - start} bytes cannot move by {fault.shift} in {total}")
                body = await self._source.ask_bytes(request, moved, moved + end - start, stack)
                told = {"sent": (moved, moved + end - start), "asked": (start, end), "start": (moved, end)}[fault.claim]
                told_range = f"bytes {told[0]}-{told[1] - 1}/{total}"
                return answer.with_headers({"Content-Range": told_range}).with_body(end - start, body)
            case "short":
                start, end, total = answer.content_range()
                length = (end - start) // 2 if fault.length is None else fault.length
                if not 0 < length < end - start:
                    raise _UnfitError
                told_range = f"bytes {start}-{start + length - 1}/{total}"
                return answer.with_headers({"Content-Range": told_range}).with_body(
                    length, _first(answer.pieces, length)
                )
            case "total" if request.method == "HEAD" and answer.status == 200:
                size = int(answer.header("Content-Length") or 0) + 1 if fault.total is None else fault.total
                return answer.with_headers({"Content-Length": str(size)})
            case "total":
                start, end, total = answer.content_range()
                size = total + 1 if fault.total is None else fault.total
                return answer.with_headers({"Content-Range": f"bytes {start}-{end - 1}/{size}"})
            case "etag":
                return answer.with_headers({"ETag": fault.etag})
            case "flip" if answer.length:
                return replace(answer, pieces=_flipped(answer.pieces, _point(fault.at or 0, answer.length)))
            case "gzip" if answer.length:
                data = gzip.compress(b"".join([piece async for piece in answer.pieces]), 1)
                return answer.with_headers({"Content-Encoding": "gzip"}).with_body(len(data), _once(data))
            case "flip" | "gzip":
                raise _UnfitError
        return answer

    async def _send(
        self,
        request: _Request,
        answer: _Answer,
        rule: _Rule | None,
        exchange: Exchange,
        line: _Line,
        rate: float | None,
    ) -> bool:
        """Write the answer. Whether the connection may be used again."""
        fault = None if rule is None or rule.fault.kind not in {"cut", "unsized", "reset", "stall"} else rule.fault
        point = None
        if fault is not None and fault.at is not None and answer.length:
            point = _point(fault.at, answer.length)
        is_unsized = fault is not None and fault.kind == "unsized"
        has_body = request.method != "HEAD" and answer.status not in {204, 304}
        is_chunked = has_body and answer.length is None and not is_unsized
        keep = request.version == "HTTP/1.1" and not is_unsized and not request.body.expects
        keep = keep and request.headers.get("connection", "").lower() != "close"
        if fault is not None and is_unsized:
            answer = answer.with_headers({"Content-Length": None})
            await self._strike(fault, exchange)
        said = [*answer.fields, ("Transfer-Encoding", "chunked")] if is_chunked else list(answer.fields)
        said += [] if keep else [("Connection", "close")]
        exchange.status = answer.status
        await line.send(_head(answer.status, said))
        async for piece in answer.pieces if has_body else _once(b""):
            for part in _parts(piece, PIECE if rate is None else min(PIECE, max(1, int(rate / 50)))):
                rest = part
                if fault is not None and point is not None and exchange.sent_bytes + len(part) > point:
                    rest = part[point - exchange.sent_bytes :]
                    await self._put(part[: len(part) - len(rest)], exchange, line, rate, is_chunked)
                    await self._strike(fault, exchange)
                    if fault.kind != "stall":
                        raise _DropError(reset=fault.kind == "reset")
                    point = None
                await self._put(rest, exchange, line, rate, is_chunked)
        if is_chunked:
            await line.send(b"0\r\n\r\n")
        return keep

    @staticmethod
    async def _put(data: bytes, exchange: Exchange, line: _Line, rate: float | None, is_chunked: bool) -> None:
        if data:
            await line.pace.cross(len(data), rate)
            exchange.sent_bytes += len(data)  # before it is sent: who has read it finds it in the log
            await line.send(b"%x\r\n%b\r\n" % (len(data), data) if is_chunked else data)


def _point(at: int, length: int) -> int:
    """Where in a body of this length a fault strikes: before its last byte, at the latest."""
    return max(0, min(at if at >= 0 else length + at, length - 1))


def _parts(data: bytes, size: int) -> list[bytes]:
    return [data] if len(data) <= size else [data[i : i + size] for i in range(0, len(data), size)]


def _head(status: int, fields: list[tuple[str, str]]) -> bytes:
    phrase = http.client.responses.get(status, "Unknown")
    lines = [f"HTTP/1.1 {status} {phrase}", *(f"{name}: {value}" for name, value in fields), "", ""]
    return "\r\n".join(lines).encode("latin-1")


# ---- the process -----------------------------------------------------------------------------------------------------


async def _run(
    task: Mapping[str, Any], port: int, control_port: int, faults: list[Fault], ready: Callable[[int, int], None]
) -> None:
    source: _Upstream | _Folder
    if task["folder"] is not None:
        source = _Folder(task["folder"])
    else:
        source = _Upstream(task["upstream"], task["objects"], task["rewrite"])
    proxy = _Proxy(source)
    proxy._rules += [_Rule(fault) for fault in faults]
    front = await asyncio.start_server(proxy.serve, "127.0.0.1", port, limit=2 * PIECE, backlog=512)
    control = await asyncio.start_server(proxy.control, "127.0.0.1", control_port)
    ready(front.sockets[0].getsockname()[1], control.sockets[0].getsockname()[1])
    await asyncio.Event().wait()


def _ends_with_stdin() -> None:
    """To be called in the loop: nothing of a proxy is worth keeping when whoever started it is gone."""

    def look() -> None:
        if not os.read(0, 1):
            os._exit(0)

    asyncio.get_running_loop().add_reader(0, look)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.counterparts.faults", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--upstream", help="the server to stand before, http://HOST:PORT")
    parser.add_argument("--folder", help="or the folder to serve")
    parser.add_argument("--objects", help="where the upstream's objects are read without a signature")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--control-port", type=int, default=0)
    parser.add_argument("--fault", action="append", default=[], help="a Fault as JSON; may be repeated")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.task is None and (arguments.upstream is None) == (arguments.folder is None):
        parser.error("name --upstream or --folder")

    def told(port: int, control_port: int) -> None:
        if arguments.task is not None:
            _ends_with_stdin()
            line = json.dumps({"port": port, "control_port": control_port})
        else:
            line = f"proxy http://127.0.0.1:{port}, control http://127.0.0.1:{control_port}; Ctrl-C stops it"
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()

    task = json.loads(arguments.task) if arguments.task else {**vars(arguments), "rewrite": {}}
    faults = [Fault(**json.loads(text)) for text in arguments.fault]
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_run(task, arguments.port, arguments.control_port, faults, told))
    return 0


if __name__ == "__main__":
    sys.exit(main())
