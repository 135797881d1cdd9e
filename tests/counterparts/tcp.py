"""A TCP proxy that knows nothing of what passes through it: for everything that goes wrong below HTTP.

    with TcpProxy.start(s3.endpoint) as proxy:
        proxy.plan(Plan(end="reset", after=1000), Plan(delay_seconds=0.05))
        ...  # the first connection is reset after 1000 bytes came back, the second begins late, the third is plain

It runs on a thread of this process; where its speed matters, use FaultProxy, which has a process of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import socket
import struct
import termios
import threading
import time
from collections import deque
from collections.abc import Coroutine
from dataclasses import KW_ONLY, dataclass
from types import TracebackType
from typing import Any, Final, Literal, Self, TypeVar
from urllib.parse import urlsplit

PIECE: Final = 64 << 10
CALL_SECONDS: Final = 10.0
BACKLOG: Final = 512

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Plan:
    """What becomes of one connection."""

    _: KW_ONLY
    end: Literal["fin", "reset", "silence"] | None = None
    """How it ends once `after` bytes have passed; `silence` keeps it open and lets nothing more through."""
    after: int = 0
    direction: Literal["down", "up"] = "down"
    """Which bytes `after` counts: those to the client, or those from it. With 0 bytes it ends before it began."""
    delay_seconds: float = 0.0
    """Before the first byte goes either way."""
    bytes_per_second: float | None = None
    """Each way."""


PLAIN: Final = Plan()


class TcpProxy:
    """Stands at `endpoint` before an upstream. Its methods may be called from any thread but its own."""

    def __init__(self, upstream: str) -> None:
        url = urlsplit(upstream if "://" in upstream else f"tcp://{upstream}")
        if url.hostname is None or url.port is None:
            raise ValueError(f"name the upstream as URL or HOST:PORT with its port: {upstream!r}")
        self._upstream = (url.hostname, url.port)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="tcp-proxy", daemon=True)
        self._plans: deque[Plan] = deque()
        self._default = PLAIN
        self._arrived = threading.Condition()
        self._live: set[_Connection] = set()
        self._plug: socket.socket | None = None
        self._plug_port: int | None = None
        self._listener = _listen(0)
        self.port: Final[int] = self._listener.getsockname()[1]
        self.endpoint: Final = f"{url.scheme}://127.0.0.1:{self.port}"
        self.flows = asyncio.Event()
        """Set while bytes pass."""
        self.connections = 0
        """Accepted so far."""
        self.bytes_down = 0
        """To clients, in all."""
        self.bytes_up = 0
        """From clients, in all."""

    @classmethod
    def start(cls, upstream: str) -> Self:
        """`upstream`: a URL or HOST:PORT."""
        proxy = cls(upstream)
        proxy._thread.start()
        proxy.accept()
        return proxy

    def stop(self) -> None:
        """Reset what is open and end."""
        if self._loop.is_closed():
            return
        self._call(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(CALL_SECONDS)
        self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    # ---- what is to happen

    def plan(self, *plans: Plan) -> None:
        """For the next connections, one each."""
        self._plans.extend(plans)

    def always(self, plan: Plan) -> None:
        """For every connection that no other plan was made for."""
        self._default = plan

    def accept(self) -> None:
        """As at the start: connections are taken and bytes pass. What waited in silence goes on."""
        self._call(self._accept())

    def stop_accepting(self) -> None:
        """New connections hang in connect(). Those that are open go on."""
        self._call(self._stop_accepting())

    def refuse(self) -> None:
        """New connections meet ECONNREFUSED. Those that are open go on."""
        self._call(self._refuse())

    def black_hole(self) -> None:
        """Connections are taken and kept, and no byte passes on any of them until `accept`."""
        self._call(self._hush())

    def drop(self) -> int:
        """Reset every open connection. How many there were."""
        return self._call(self._drop())

    def wait_for_connections(self, count: int, seconds: float = 30.0) -> None:
        """Wait until `count` connections have been accepted in all. Raises TimeoutError."""
        with self._arrived:
            if not self._arrived.wait_for(lambda: self.connections >= count, seconds):
                raise TimeoutError(f"{self.connections} connections after {seconds} s, not {count}")

    # ---- on its own thread

    def _call(self, wanted: Coroutine[Any, Any, Result]) -> Result:
        return asyncio.run_coroutine_threadsafe(wanted, self._loop).result(CALL_SECONDS)

    async def _accept(self) -> None:
        self.flows.set()
        if self._listener.fileno() < 0:
            self._listener = _listen(self.port)
        self._listener.listen(BACKLOG)
        self._unplug()
        self._loop.remove_reader(self._listener)
        self._loop.add_reader(self._listener, self._take)

    async def _stop_accepting(self) -> None:
        if self._listener.fileno() < 0:
            self._listener = _listen(self.port)
        self._loop.remove_reader(self._listener)
        self._listener.listen(0)  # leaves room for one, which is ours
        if self._plug is None:
            self._plug = socket.socket()
            self._plug.setblocking(False)
            self._plug.connect_ex(("127.0.0.1", self.port))
            self._plug_port = self._plug.getsockname()[1]

    async def _refuse(self) -> None:
        self._close_listener()

    async def _hush(self) -> None:
        await self._accept()
        self.flows.clear()

    async def _drop(self) -> int:
        dropped = list(self._live)
        for connection in dropped:
            connection.reset()
        return len(dropped)

    async def _end(self) -> None:
        self._close_listener()
        await self._drop()
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _close_listener(self) -> None:
        self._unplug()
        if self._listener.fileno() >= 0:
            self._loop.remove_reader(self._listener)
            self._listener.close()

    def _unplug(self) -> None:
        if self._plug is not None:
            self._plug.close()
            self._plug = None

    def _take(self) -> None:
        """Accept one connection."""
        try:
            client, (_, port) = self._listener.accept()
        except BlockingIOError:
            return
        if port == self._plug_port:
            client.close()
            return
        client.setblocking(False)
        plan = self._plans.popleft() if self._plans else self._default
        connection = _Connection(self, client, plan)
        self._live.add(connection)
        connection.task = self._loop.create_task(connection.run(self._upstream))
        connection.task.add_done_callback(lambda _: self._forget(connection))
        with self._arrived:
            self.connections += 1
            self._arrived.notify_all()

    def _forget(self, connection: _Connection) -> None:
        self._live.discard(connection)
        connection.close()


class _Connection:
    """A client's socket, the upstream's, and a pump each way."""

    def __init__(self, proxy: TcpProxy, client: socket.socket, plan: Plan) -> None:
        self._proxy = proxy
        self._client = client
        self._plan = plan
        self._speaks = asyncio.Event()
        self._speaks.set()
        self.task: asyncio.Task[None] | None = None

    async def run(self, upstream: tuple[str, int]) -> None:
        loop = asyncio.get_running_loop()
        server = socket.socket()
        server.setblocking(False)
        try:
            if self._plan.end is not None and not self._plan.after:
                await self._strike()
            await asyncio.sleep(self._plan.delay_seconds)
            await loop.sock_connect(server, upstream)
            for end in (self._client, server):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            up = loop.create_task(self._pump(self._client, server, "up"))
            down = loop.create_task(self._pump(server, self._client, "down"))
            try:
                done, _ = await asyncio.wait({up, down}, return_when=asyncio.FIRST_EXCEPTION)
                for task in done:
                    task.result()
            finally:
                up.cancel()
                down.cancel()
                await asyncio.gather(up, down, return_exceptions=True)
        except _EndedError:
            pass
        except OSError:  # either side broke off: so does the other
            self._linger_not()
        finally:
            server.close()
            self._client.close()

    def close(self) -> None:
        """The client's end: a task that was cancelled before it began has not closed it."""
        self._client.close()

    def reset(self) -> None:
        if self._client.fileno() >= 0:
            self._linger_not()
        if self.task is not None:
            self.task.cancel()

    def _linger_not(self) -> None:
        reset_when_closed(self._client)

    async def _pump(self, source: socket.socket, target: socket.socket, direction: Literal["down", "up"]) -> None:
        loop = asyncio.get_running_loop()
        proxy, plan = self._proxy, self._plan
        left = plan.after if plan.end is not None and plan.direction == direction else None
        pace = Pace()
        size = PIECE if plan.bytes_per_second is None else min(PIECE, max(1, int(plan.bytes_per_second / 50)))
        while piece := await loop.sock_recv(source, size):
            await self._may_pass()
            await pace.cross(len(piece), plan.bytes_per_second)
            sent = piece if left is None else piece[:left]
            if direction == "down":
                proxy.bytes_down += len(sent)
            else:
                proxy.bytes_up += len(sent)
            await loop.sock_sendall(target, sent)
            if left is not None:
                left -= len(sent)
                if not left:
                    await self._strike()
        await self._may_pass()
        target.shutdown(socket.SHUT_WR)

    async def _may_pass(self) -> None:
        await self._proxy.flows.wait()
        await self._speaks.wait()

    async def _strike(self) -> None:
        if self._plan.end == "silence":
            self._speaks.clear()
            await self._speaks.wait()  # until the connection is dropped
        if self._plan.end == "reset":
            await until_delivered(self._client)
            self._linger_not()
        else:
            self._client.shutdown(socket.SHUT_WR)
            with contextlib.suppress(BlockingIOError):
                while self._client.recv(PIECE):  # what is unread when a socket is closed turns its FIN into RST
                    pass
        raise _EndedError


class Pace:
    """A line of a certain rate."""

    SLACK_SECONDS: Final = 0.05
    """How far the line may lag behind before that counts as idle: asyncio sleeps a little longer than told."""

    def __init__(self) -> None:
        self._free_at = 0.0

    async def cross(self, num_bytes: int, bytes_per_second: float | None) -> None:
        """Wait until a piece that starts now, or behind those before it, has arrived."""
        if bytes_per_second is not None:
            now = time.monotonic()
            if self._free_at < now - self.SLACK_SECONDS:
                self._free_at = now
            self._free_at += num_bytes / bytes_per_second
            await asyncio.sleep(self._free_at - now)


class _EndedError(Exception):
    """The plan's end was reached."""


def reset_when_closed(connection: socket.socket) -> None:
    """Let closing it send RST in place of FIN, and drop what is still to be sent."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


async def until_delivered(connection: socket.socket, seconds: float = 5.0) -> None:
    """Wait until the other side's kernel has all that was sent. A RST takes none of that back."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        [num_bytes] = struct.unpack("i", fcntl.ioctl(connection, termios.TIOCOUTQ, bytes(4)))
        if not num_bytes:
            return
        await asyncio.sleep(0.001)


def _listen(port: int) -> socket.socket:
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", port))
    listener.listen(BACKLOG)
    listener.setblocking(False)
    return listener
