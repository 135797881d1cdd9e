"""Machines of one network, made of namespaces of this one: each has an address, a host name, processes and a scratch
folder of its own, and can be crashed, frozen, or cut off.

    with Network.start() as network:
        a, b = network.machine("a"), network.machine("b")
        a.run([sys.executable, "-c", "..."])        # there; reaches b at b.address
        network.part(a, b)                          # their packets to each other are lost, and nobody else's
        a.freeze(), a.thaw(), a.crash()

The network is a namespace too: no packet leaves it, and all of it is gone with the process that made it. That process's
main thread moves into it for as long as it stands, and so do the processes and threads that it starts meanwhile.
Needs root and iproute2; `missing()` says what is not there.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Self

import psutil

NEW_NETWORK: Final = 0x40000000
"""CLONE_NEWNET of <sched.h>."""
SUBNET: Final = "10.77.0"
TOOLS: Final = ("ip", "bridge", "nsenter", "unshare", "mount", "hostname")
_WAIT: Final = "echo ready; cat; exit"
"""What a machine's first process does: wait until its standard input ends, which it does with who made the machine,
however that ends. A shell, since it also takes leave of processes that nobody waits for."""


def missing() -> str:
    """Why there can be no such network on this machine; empty where there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    lacking = [tool for tool in TOOLS if shutil.which(tool) is None]
    if lacking:
        return f"no {', '.join(lacking)}: install iproute2 and util-linux"
    tried = subprocess.run(
        ["unshare", "--net", "ip", "link", "add", "rm0", "type", "bridge"],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return f"no namespaces here: {tried.stderr.strip()}" if tried.returncode else ""


def _call(name: str, *arguments: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments):
        raise OSError(ctypes.get_errno(), f"{name} failed")


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, stdin=subprocess.DEVNULL)


class Machine:
    """One of a network's machines."""

    def __init__(self, name: str, address: str, port: str, folder: Path, scratch: Path) -> None:
        """`scratch`: where processes there find `folder`."""
        self.name = name
        self.address = address
        self.port = port
        """The other end of its cable."""
        self.folder = folder
        self._started: list[subprocess.Popen[str]] = []
        self._holder = subprocess.Popen(
            [
                "unshare", "--net", "--uts", "--pid", "--mount", "--mount-proc", "--fork", "--kill-child",
                "sh", "-c", _WAIT,
            ],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        assert self._holder.stdout is not None
        self._holder.stdout.readline()
        (first,) = psutil.Process(self._holder.pid).children()
        self._first = first.pid
        self._space = os.readlink(f"/proc/{self._first}/ns/pid")
        _ip("link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", str(self._first))
        self.run(["hostname", name])
        self.run(["mount", "--bind", folder, scratch])
        for line in (f"addr add {address}/24 dev eth0", "link set eth0 up", "link set lo up"):
            self.run(["ip", *line.split()])

    def start(self, command: Sequence[str | Path], env: Mapping[str, str], **more: Any) -> subprocess.Popen[str]:
        """Start a process there. Its standard input is empty."""
        started = subprocess.Popen(
            [*self.entering, *map(str, command)], env=dict(env), text=True, stdin=subprocess.DEVNULL, **more
        )  # fmt: skip
        self._started.append(started)
        return started

    def run(self, command: Sequence[str | Path], **more: Any) -> str:
        """Run a process there to its end. Returns what it printed; raises CalledProcessError."""
        done = subprocess.run(
            [*self.entering, *map(str, command)], text=True, stdin=subprocess.DEVNULL, check=True,
            stdout=subprocess.PIPE, **more,
        )  # fmt: skip
        return str(done.stdout)

    @property
    def entering(self) -> list[str]:
        """The beginning of a command line that is carried out there."""
        return ["nsenter", "-t", str(self._first), "-n", "-u", "-m", "-p", "--"]

    def processes(self, matches: Callable[[list[str]], bool] = lambda line: True) -> list[psutil.Process]:
        """What runs there, by its command line. The machine's first process does not count, nor what has ended."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                line = process.cmdline()
                there = os.readlink(f"/proc/{process.pid}/ns/pid") == self._space
                idle = process.pid == self._first or line == ["cat"]  # the first process, and what it waits for
                if there and line and not idle and matches(line):
                    found.append(process)
        return found

    def signal(self, number: signal.Signals, matches: Callable[[list[str]], bool] = lambda line: True) -> int:
        """Send a signal to all that match. Returns how many there were."""
        found = self.processes(matches)
        for process in found:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)
        return len(found)

    def crash(self) -> None:
        """All that runs there is gone, at once. The machine itself stays, and can be used again."""
        while self.signal(signal.SIGKILL):
            psutil.wait_procs(self.processes(), timeout=1)

    def freeze(self) -> None:
        """As a virtual machine that is paused: no process goes on, none ends."""
        self.signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """The inverse of `freeze`. nsenter stops when the process stops that it waits for, and goes on for itself."""
        self.signal(signal.SIGCONT)
        for process in self._started:
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)

    def remove(self) -> None:
        """End it, and all that runs there, frozen or not."""
        self._holder.kill()
        self.thaw()
        for process in (self._holder, *self._started):
            process.communicate()


class Network:
    """A bridge, and the machines on it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.scratch: Final = folder / "scratch"
        """A folder that is another one on each machine."""
        self.scratch.mkdir()
        self.address: Final = f"{SUBNET}.1"
        """Of who made the network."""
        self.machines: list[Machine] = []
        _ip("link", "set", "lo", "up")
        _ip("link", "add", "bridge0", "type", "bridge")
        _ip("addr", "add", f"{self.address}/24", "dev", "bridge0")
        _ip("link", "set", "bridge0", "up")

    @classmethod
    @contextlib.contextmanager
    def start(cls) -> Iterator[Self]:
        with tempfile.TemporaryDirectory(prefix="rm", ignore_cleanup_errors=True) as folder, _own_network():
            network = cls(Path(folder))
            try:
                yield network
            finally:
                for machine in network.machines:
                    machine.remove()

    def machine(self, name: str) -> Machine:
        """One more machine."""
        number = 2 + len(self.machines)
        folder = self._folder / name
        folder.mkdir()
        made = Machine(name, f"{SUBNET}.{number}", f"port{number}", folder, self.scratch)
        _ip("link", "set", made.port, "master", "bridge0")
        _ip("link", "set", made.port, "up")
        self.machines.append(made)
        return made

    @staticmethod
    def part(*machines: Machine) -> None:
        """Let these machines not hear of each other: packets are lost, and no error says so."""
        for machine in machines:
            subprocess.run(["bridge", "link", "set", "dev", machine.port, "isolated", "on"], check=True)

    @staticmethod
    def join(*machines: Machine) -> None:
        """The inverse of `part`."""
        for machine in machines:
            subprocess.run(["bridge", "link", "set", "dev", machine.port, "isolated", "off"], check=True)

    @staticmethod
    def unplug(machine: Machine) -> None:
        """Cut a machine off from all others."""
        _ip("link", "set", machine.port, "down")

    @staticmethod
    def plug(machine: Machine) -> None:
        _ip("link", "set", machine.port, "up")


@contextlib.contextmanager
def _own_network() -> Iterator[None]:
    """Put this thread into a network of its own, and back."""
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    try:
        _call("unshare", NEW_NETWORK)
        try:
            yield
        finally:
            _call("setns", before, NEW_NETWORK)
    finally:
        os.close(before)
