"""The machines of a network: apart where they are parted, gone when they crash or when who made them is gone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.conformance.folders import ROOT
from tests.counterparts.machines import Machine, Network, missing

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())

LISTEN = "import socket, time; s = socket.create_server(('', 7000)); print('up', flush=True); time.sleep(600)"
REACH = "import socket; socket.create_connection(({address!r}, 7000), timeout=2)"


@pytest.fixture
def network() -> Iterator[Network]:
    with Network.start() as found:
        yield found


def listening(machine: Machine) -> subprocess.Popen[str]:
    process = machine.start([sys.executable, "-c", LISTEN], os.environ, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    return process


def reaches(machine: Machine, other: Machine) -> bool:
    line = [sys.executable, "-c", REACH.format(address=other.address)]
    return subprocess.run([*machine.entering, *line], check=False, stderr=subprocess.DEVNULL).returncode == 0


def test_machines_are_parted_and_joined_cut_and_crashed(network: Network) -> None:
    a, b, c = (network.machine(name) for name in "abc")
    process = listening(a)
    assert reaches(b, a)
    network.part(a, b)
    assert not reaches(b, a)
    assert reaches(c, a)
    network.join(a, b)
    assert reaches(b, a)
    network.unplug(c)
    assert not reaches(c, a)
    network.plug(c)
    assert reaches(c, a)
    assert a.run(["hostname"]) == "a\n"
    (network.scratch / "file").write_text("here")
    assert "file" not in a.run(["ls", network.scratch])
    a.freeze()
    (there,) = a.processes(lambda line: "-c" in line)
    assert there.status() == psutil.STATUS_STOPPED
    a.thaw()
    assert reaches(b, a)
    a.crash()
    assert process.wait(30) == -signal.SIGKILL
    assert a.processes() == []
    listening(a)  # it can be used again
    assert reaches(b, a)


def test_nothing_of_them_is_left_when_their_maker_is_killed() -> None:
    """Nor is anything of them seen outside while they stand."""
    code = (
        "from tests.counterparts.machines import Network\n"
        "import time\n"
        "with Network.start() as network:\n"
        "    machine = network.machine('a')\n"
        "    print(machine._first, flush=True)\n"
        "    time.sleep(600)\n"
    )
    maker = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert maker.stdout is not None
    first = psutil.Process(int(maker.stdout.readline()))
    assert not Path("/sys/class/net/bridge0").exists()
    maker.kill()
    maker.communicate()
    psutil.wait_procs([first], timeout=60)
    assert not first.is_running()
