"""Preflight against a real autoscaler, Ray's own, whose machines are processes of this one."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml

from cluster import survey
from cluster.connect import quiet
from cluster.run import run_on_ray
from merger import api
from merger.errors import InfrastructureError
from merger.events import Event
from merger.watch import Watch
from tests.cluster.runs import check_finished, wait_for

pytestmark = [pytest.mark.ray, pytest.mark.slow]

HEAD_ID = "fffffffffffffffffffffffffffffffffffffffffffffffffff00000"
CONFIG: dict[str, Any] = {
    "cluster_name": "fake", "max_workers": 1, "idle_timeout_minutes": 5, "upscaling_speed": 1.0,
    "provider": {"type": "fake_multinode", "launch_multiple": True, "head_node_id": HEAD_ID,
                 "disable_node_updaters": True, "disable_launch_config_check": True},
    "auth": {"ssh_user": "nobody"}, "docker": {},
    "available_node_types": {
        "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
        "small": {
            "resources": {"CPU": 2, "object_store_memory": 100 * 10**6}, "node_config": {}, "min_workers": 0,
            "max_workers": 1,
        },
    },
    "head_node_type": "ray.head.default", "file_mounts": {}, "cluster_synced_files": [],
    "file_mounts_sync_continuously": False, "initialization_commands": [], "setup_commands": [],
    "head_setup_commands": [], "worker_setup_commands": [], "head_start_ray_commands": [],
    "worker_start_ray_commands": [],
}  # fmt: skip


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture
def elastic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A head that takes no work, and an autoscaler that may add one small node."""
    port = free_port()
    address = f"{ray.util.get_node_ip_address()}:{port}"  # type: ignore[no-untyped-call] # ray leaves it untyped
    provider = {**CONFIG["provider"], "gcs_address": address}  # else it takes port 6379
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump({**CONFIG, "provider": provider}))
    environment = {
        **os.environ, "RAY_AUTH_MODE": "disabled", "AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_FAKE_CLUSTER": "1",
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }  # fmt: skip
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with tempfile.TemporaryDirectory(prefix="rm-", dir="/tmp") as short:
        head = subprocess.Popen(
            [Path(sys.executable).with_name("ray"), "start", "--head", "--block", "--num-cpus=0", f"--port={port}",
             "--include-dashboard=false", f"--temp-dir={short}", "--object-store-memory=100000000",
             f"--autoscaling-config={tmp_path / 'cluster.yaml'}"],
            env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        try:
            wait_for(lambda: _listens(port), 120)
            ray.init(
                address=address, log_to_driver=False, configure_logging=False, namespace="raymerge"
            )  # fmt: skip
            with quiet():
                yield address
        finally:
            ray.shutdown()
            head.terminate()
            try:
                head.wait(30)
            finally:
                with_its_children(head.pid)


def with_its_children(group: int) -> None:
    """End what the head started, its fake machines too: they are of its session."""
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return


def _listens(port: int) -> bool:
    with socket.socket() as one:
        one.settimeout(1)
        return one.connect_ex(("127.0.0.1", port)) == 0


def test_a_run_waits_for_the_node_that_its_workers_bring(
    elastic: str, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.run.needs", lambda *_, **__: {"CPU": 1})  # this autoscaler's nodes declare no memory
    wait_for(lambda: survey.growth().elastic, 60)  # the autoscaler has said that it is there
    events: list[Event] = []
    planned = api.plan(small / "merge.yaml", tmp_path / "out")
    api.run_planned(planned, workers=2, memory=10**8, runner=run_on_ray, watch=Watch().also(events.append))
    check_finished(tmp_path / "out", small / "whole")
    [waiting] = [event for event in events if event.kind == "capacity-later"][:1]
    assert waiting.text.startswith("no node has 1 CPU; the most is 0 CPU; waiting up to 120 s for one that has")
    kinds = [event.kind for event in events]
    assert kinds.index("capacity-later") < kinds.index("worker-ready")


def test_what_no_node_may_have_ends_at_the_deadline(
    elastic: str, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first autoscaler does not say what it may add: it is given its time, and no more."""
    wait_for(lambda: survey.growth().elastic, 60)
    monkeypatch.setattr("cluster.run.START_SECONDS", 6.0)
    monkeypatch.setattr("cluster.run.needs", lambda *_, **__: {"CPU": 4})
    started = time.monotonic()
    with pytest.raises(InfrastructureError) as caught:
        api.run_planned(api.plan(small / "merge.yaml", tmp_path / "out"), workers=1, runner=run_on_ray)
    assert time.monotonic() - started >= 6
    (problem,) = caught.value.problems
    assert problem.code == "no-resources"
    assert problem.what == "no worker started within 6 s"
    assert problem.where == "1 workers of 4 CPU"
    assert problem.why.startswith("no node has 4 CPU; the most is ")
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").glob("*.safetensors"))
