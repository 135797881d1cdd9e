"""A cluster of Rays, each started by `ray start` on a machine of its own, beside an S3 on another."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Self

import urllib3

from tests.conformance.folders import ROOT, Outcome, ended
from tests.counterparts.machines import Machine, Network
from tests.counterparts.s3 import S3Server

BUCKET: Final = "raymerge"
HEALTH: Final = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 2000,
    "health_check_failure_threshold": 5,
}
"""How soon a cluster sees that a node is gone: not so soon that a busy one is taken for one."""
GCS_PORT, JOBS_PORT = 6379, 8265
TOLD: Final = "ray-start.txt"
STARTED: Final = "Ray runtime started"
"""What `ray start` says last. A head answers before, and may still give up."""
BUSY_SECONDS: Final = 600
"""What anything may take where the machine is busy with others."""


def is_worker(line: list[str]) -> bool:
    """An actor that merges. Ray shows it by this name in place of its command line."""
    return line[0].startswith("ray::") and "MergeWorker" in line[0]


def is_driver(line: list[str]) -> bool:
    return "jobs.merge" in line


def is_raylet(line: list[str]) -> bool:
    return line[0].endswith("/raylet/raylet")


def until(found: Callable[[], object]) -> None:
    """Look every now and then, at a pace that leaves the machine to those who work."""
    deadline = time.monotonic() + BUSY_SECONDS
    while not found():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.2)


class Raylets:
    """A head without CPUs and nodes of two each, each with an address of its own."""

    def __init__(self, network: Network, store: Machine, s3: S3Server, *, nodes: int = 2) -> None:
        self.network = network
        self.store = store
        self.s3 = s3
        self.head = network.machine("head")
        self.nodes = [network.machine(f"node{number}") for number in range(nodes)]
        self.folder = network.scratch.parent
        """For what is submitted from here."""
        self.address = f"http://{self.head.address}:{JOBS_PORT}"
        self.token = secrets.token_hex(32)
        self.python, self.ray = Path(sys.executable), Path(sys.executable).with_name("ray")
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY", "PYTEST", "HF_", "AWS_"))}
        self.environment = {
            **kept, **s3.environment(), "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token, "RAY_USAGE_STATS_ENABLED": "0",
            "HF_TOKEN": f"hf_{secrets.token_hex(17)}", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(ROOT),
            "XDG_STATE_HOME": str(self.folder / "state"), "RAYMERGE_HTTP_STALL_SECONDS": "5",
            "RAYMERGE_HTTP_CONNECT_SECONDS": "3", "RAYMERGE_HTTP_ATTEMPTS": "3",
        }  # fmt: skip
        """Of all machines, as a cluster's is: drivers and workers find their secrets there."""

    @classmethod
    @contextmanager
    def start(cls, *, nodes: int = 2) -> Iterator[Self]:
        """A cluster that takes jobs."""
        with Network.start() as network:
            store = network.machine("store")
            with S3Server.start(buckets=(BUCKET,), address=store.address, entering=store.entering) as s3:
                made = cls(network, store, s3, nodes=nodes)
                made.start_all()
                yield made

    # ---- Ray

    def _ray(self, machine: Machine, *arguments: str) -> subprocess.Popen[str]:
        line: list[str | Path] = [
            self.ray, "start", "--block", f"--node-ip-address={machine.address}", "--object-store-memory=100000000",
            "--disable-usage-stats", *arguments,
        ]  # fmt: skip
        with (machine.folder / TOLD).open("w") as told:
            return machine.start(line, self.environment, stdout=told, stderr=told, cwd=machine.folder)

    def start_head(self) -> None:
        """Start the head, for the first time or after a crash, and wait until it takes jobs."""
        self._up(
            lambda: self._ray(
                self.head, "--head", "--num-cpus=0", f"--port={GCS_PORT}", f"--dashboard-port={JOBS_PORT}",
                f"--dashboard-host={self.head.address}", "--include-dashboard=true",
                f"--temp-dir={self.network.scratch}", f"--system-config={json.dumps(HEALTH)}",
            ),
            self.head, lambda: self.ask("/api/jobs/") is not None,
        )  # fmt: skip

    def start_nodes(self, *machines: Machine) -> None:
        """Start nodes, and wait until the cluster knows them."""
        for machine in machines:
            self._start_node(machine)

    def _start_node(self, machine: Machine) -> None:
        self._up(
            lambda: self._ray(machine, f"--address={self.head.address}:{GCS_PORT}", "--num-cpus=2"),
            machine, lambda: self.node_id(machine) != "",
        )  # fmt: skip

    @staticmethod
    def _up(start: Callable[[], subprocess.Popen[str]], machine: Machine, there: Callable[[], bool]) -> None:
        """Start Ray on a machine, again where it gives up: on a busy one its processes time out for each other."""
        started = start()

        def up() -> bool:
            nonlocal started
            if started.poll() is not None:
                machine.crash()
                started = start()
            return STARTED in (machine.folder / TOLD).read_text() and there()

        until(up)

    def start_all(self) -> None:
        self.start_head()
        self.start_nodes(*self.nodes)

    def node_id(self, machine: Machine) -> str:
        """Of the node that lives there; empty where none does."""
        told = self.ask("/nodes?view=summary") or {}
        for node in told.get("data", {}).get("summary", ()):
            raylet = node.get("raylet", {})
            if node.get("ip") == machine.address and raylet.get("state") == "ALIVE":
                return str(raylet["nodeId"])
        return ""

    def ask(self, path: str) -> Any:
        """What the head's dashboard says; None where it does not answer."""
        try:
            answer = urllib3.request(
                "GET", self.address + path, headers={"Authorization": f"Bearer {self.token}"}, timeout=5, retries=False
            )
            return json.loads(answer.data) if answer.status == 200 else None
        except (urllib3.exceptions.HTTPError, ValueError):
            return None

    def crash_head(self) -> None:
        """The head and all that ran there is gone, the driver too; the nodes are lost with it. All start again."""
        self.head.crash()
        for node in self.nodes:
            node.crash()
        self.start_all()

    # ---- raymerge, from outside the cluster

    def begin(self, *arguments: object) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "jobs.cli", *map(str, arguments)], cwd=self.folder, text=True, env=self.environment,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def run(self, *arguments: object, timeout: float = 300) -> Outcome:
        return ended(self.begin(*arguments), timeout=timeout)

    def submit(self, manifest: Mapping[str, Any], out: str | None = None, *options: object) -> subprocess.Popen[str]:
        """Submit and follow. The address is none of this machine's, and there is no TLS: `--insecure` says so."""
        return self.begin(
            "submit", self.written(manifest), *(["-o", out] if out else []), "--address", self.address, "--insecure",
            "--follow", "--json", *options,
        )  # fmt: skip

    def written(self, manifest: Mapping[str, Any]) -> Path:
        path = self.folder / f"{uuid.uuid4().hex[:12]}.yaml"
        path.write_text(json.dumps(manifest))
        return path

    # ---- the bucket

    def fresh(self) -> str:
        return f"s3://{BUCKET}/out/{uuid.uuid4().hex[:12]}"

    def upload(self, folder: Path, name: str) -> str:
        """Put a folder into the bucket. Returns its reference."""
        client = self.s3.client()
        for file in folder.iterdir():
            client.put_object(Bucket=BUCKET, Key=f"in/{name}/{file.name}", Body=file.read_bytes())
        return f"s3://{BUCKET}/in/{name}"

    def keys(self, out: str, part: str = "") -> list[str]:
        """Of an output's objects, those with `part` in their name."""
        return [key for key in self.s3.keys(BUCKET, out.removeprefix(f"s3://{BUCKET}/")) if part in key]

    def document(self, out: str, name: str) -> dict[str, Any]:
        """A JSON document of an output."""
        key = f"{out.removeprefix(f's3://{BUCKET}/')}/{name}"
        found = self.s3.client().get_object(Bucket=BUCKET, Key=key)
        return dict(json.loads(found["Body"].read()))

    def check_finished(self, out: str, digest: str) -> None:
        """A result of this digest, and nothing of the run that made it."""
        assert self.document(out, "raymerge.json")["content_digest"] == digest
        assert self.keys(out, "/.raymerge/") == []
        assert self.s3.uploads(BUCKET, out.removeprefix(f"s3://{BUCKET}/")) == ()

    def epochs(self, out: str) -> list[int]:
        """Numbers of the leases on an output."""
        return [int(Path(key).stem) for key in self.keys(out, "/.raymerge/lease/")]

    def journaled(self, out: str) -> bool:
        return bool(self.keys(out, "/.raymerge/journal/"))


def kill_one(machines: Sequence[Machine], matches: Callable[[list[str]], bool]) -> bool:
    """SIGKILL to one process that matches, if any of these machines has one."""
    for machine in machines:
        for process in machine.processes(matches)[:1]:
            process.kill()
            return True
    return False
