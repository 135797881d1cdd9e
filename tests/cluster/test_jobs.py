"""Merges as jobs of a real cluster that asks for a token: submitted, followed, stopped, resumed."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

from cluster.jobs_api import JobServer
from merger import api
from tests.cluster.runs import journaled, wait_for
from tests.conformance.bulks import broken, bulk_sources, each, ties
from tests.conformance.folders import ROOT, Outcome, content_digest, ended, manifest, model, model_tensors

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Head:
    """A one-node cluster in processes of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.address = f"http://127.0.0.1:{free_port()}"
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "PYTEST"))}
        self.environment = {
            **kept, "PATH": path, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0", "XDG_STATE_HOME": str(folder / "state"), "HF_TOKEN": "hf_" + "z" * 32,
            "PYTHONDONTWRITEBYTECODE": "1",
        }  # fmt: skip

    def start(self) -> None:
        ray = Path(sys.executable).with_name("ray")
        # The driver and the workers must find raymerge as an image has it: this checkout stands in for one.
        self.process = subprocess.Popen(
            [ray, "start", "--head", "--block", "--num-cpus=3", "--object-store-memory=100000000",
             f"--port={free_port()}", f"--dashboard-port={self.address.rpartition(':')[2]}",
             "--dashboard-host=127.0.0.1", "--include-dashboard=true", f"--temp-dir={self.folder / 'ray'}",
             "--disable-usage-stats"],
            cwd=self.folder, env={**self.environment, "PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip

    def stop(self) -> None:
        children = psutil.Process(self.process.pid).children(recursive=True)
        for process in (*children, psutil.Process(self.process.pid)):
            with contextlib.suppress(psutil.NoSuchProcess):  # some end when others do
                process.kill()
        psutil.wait_procs(children, timeout=10)
        self.process.wait(30)

    def run(self, *arguments: str | Path) -> Outcome:
        return ended(self.begin(*arguments), timeout=240)

    def begin(self, *arguments: str | Path) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "jobs.cli", *map(str, arguments)], cwd=self.folder, text=True,
            env={**self.environment, "PYTHONPATH": str(ROOT)}, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )  # fmt: skip


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with tempfile.TemporaryDirectory(
        prefix="rm", ignore_cleanup_errors=True
    ) as folder:  # Ray's sockets have short names or none
        found = Head(Path(folder))
        found.start()
        try:
            deadline = time.monotonic() + 120
            while "UNREACHED" in found.run("status", "raymerge-000000000000-a1", "--address", found.address).out:
                assert time.monotonic() < deadline
                assert found.process.poll() is None
            yield found
        finally:
            found.stop()


def test_a_bulk_as_a_job_with_its_code_along(head: Head, tmp_path: Path) -> None:
    sources = bulk_sources(tmp_path)
    broken(sources)
    path = manifest(sources / "bulk.yaml", each(sources))
    options = ("submit", path, "--address", head.address, "--follow", "--workers", "2", "--ship-code", "--json")
    first = head.run(*options)
    assert (first.code, first.document.get("state"), first.document.get("exit_code")) == (1, "FAILED", 1), first.err
    assert "3 done, 1 failed" in first.err
    name = first.document["submission_id"]
    assert name.endswith("-a1")
    for i in (0, 2, 3):
        made = api.fold(sources / "adapters" / f"a{i}", sources / "alone" / f"{i}", base=sources / "base")
        assert content_digest(sources / "out" / f"a{i}") == made.content_digest
    # Again: the next attempt, which finds three merges done.
    again = head.run(*options)
    assert again.document["submission_id"] == name.replace("-a1", "-a2")
    assert "3 already done, 1 failed" in again.err
    status = head.run("status", name, "--json").document
    assert status["job"]["state"] == "FAILED"
    assert [o["state"] for o in status["outputs"]] == [
        "finished",
        "failed",
        "finished",
        "finished",
    ]


def test_a_job_is_stopped_through_the_output_and_resumed_by_the_next(
    head: Head, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed, name in enumerate(("base", "m1", "m2")):
        model(tmp_path / name, seed, tensors=model_tensors(seed, rows=3000, cols=2048, layers=40, dtype=torch.bfloat16))
    out = tmp_path / "out"
    path = manifest(tmp_path / "merge.yaml", {**ties(tmp_path), "output": {"path": str(out)}})
    options = ("submit", path, "--address", head.address, "--follow", "--workers", "1", "--json")
    process = head.begin(*options)
    wait_for(lambda: journaled(out), 120)
    assert head.run("stop", out).code == 0
    stopped = ended(process, timeout=120)
    assert stopped.code == 143, stopped.err
    assert stopped.document["exit_code"] == 143
    told = head.run("status", out, "--json").document["outputs"][0]
    assert told["state"] == "stopped"
    assert told["submission_id"] == stopped.document["submission_id"]
    assert "asked to stop" in head.run("logs", out).out
    # The job that a signal ended counts as failed; the next one goes on, and is stopped through the job server.
    process = head.begin(*options)
    wait_for(lambda: (out / ".raymerge" / "lease").exists() and any((out / ".raymerge" / "lease").iterdir()), 120)
    second = stopped.document["submission_id"].replace("-a1", "-a2")
    monkeypatch.setenv("RAY_AUTH_TOKEN", head.environment["RAY_AUTH_TOKEN"])
    assert JobServer(head.address).stop(second)
    again = ended(process, timeout=120)
    assert again.code == 143, again.err
    last = head.run(*options)
    assert last.code == 0, last.err
    report = json.loads((out / "raymerge-report.json").read_text())
    assert report["units_resumed"] > 0
    assert report["content_digest"] == api.merge(path, tmp_path / "alone").content_digest
    done = head.run(*options[:-1])
    assert done.code == 0
    assert "already done" in done.out


def test_no_secret_is_to_be_found_on_the_cluster(head: Head, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither in what the job server tells, nor in Ray's own files."""
    monkeypatch.setenv("RAY_AUTH_TOKEN", head.environment["RAY_AUTH_TOKEN"])
    told = json.dumps(JobServer(head.address)._json("GET", "/api/jobs/"))
    for secret in (head.environment["HF_TOKEN"], head.environment["RAY_AUTH_TOKEN"]):
        assert secret not in told
        for path in (head.folder / "ray").rglob("*.log"):
            assert secret not in path.read_text(errors="replace"), path
