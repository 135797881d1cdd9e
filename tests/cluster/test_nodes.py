"""Nodes that die, and nodes that say so beforehand. Slow: each cluster is several Rays on this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from ray.cluster_utils import Cluster

from cluster.connect import quiet
from cluster.run import run_on_ray
from cluster.schedule import Hand, Schedule
from merger import api
from tests.cluster.runs import check_finished
from tests.conformance.folders import content_digest

pytestmark = [pytest.mark.ray, pytest.mark.slow]

QUICK_HEALTH = {
    "health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 2,
}  # fmt: skip


@pytest.fixture
def nodes() -> Iterator[tuple[Cluster, list[Any]]]:
    """A head without CPUs, and two nodes of one CPU each."""
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "include_dashboard": False, "_system_config": QUICK_HEALTH},
    )
    added = [cluster.add_node(num_cpus=1, object_store_memory=100 << 20) for _ in range(2)]
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, log_to_driver=False, configure_logging=False, namespace="raymerge")
    with quiet():
        yield cluster, added
    ray.shutdown()
    cluster.shutdown()  # type: ignore[no-untyped-call] # ray leaves it untyped


def test_a_node_that_is_killed(large: Path, tmp_path: Path, nodes: tuple[Cluster, list[Any]]) -> None:
    """Its worker finds no other place; the one that is left does the rest."""
    cluster, (first, _) = nodes
    killed: list[str] = []

    def listen(progress: Any) -> None:
        if not killed and 2 < progress.units_done < progress.units:
            killed.append(first.node_id)
            cluster.remove_node(first, allow_graceful=False)

    planned = api.plan(large / "merge.yaml", tmp_path / "out")
    report = api.run_planned(planned, workers=2, runner=run_on_ray, listener=listen)
    assert killed
    assert report.content_digest == content_digest(large / "whole")
    check_finished(tmp_path / "out", large / "whole")


def test_nodes_that_come_when_they_are_asked_for(large: Path, tmp_path: Path) -> None:
    """An autoscaled cluster as it is rendered: a head without CPUs, and workers whose number the manifest says."""
    document = yaml.safe_load((large / "merge.yaml").read_text())
    (tmp_path / "merge.yaml").write_text(yaml.safe_dump({**document, "cluster": {"workers": 2, "memory": "512MB"}}))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    line = ["merge", str(tmp_path / "merge.yaml"), str(tmp_path / "out"), "--on", cluster.address]
    driver = subprocess.Popen(
        [sys.executable, "-c", f"import sys; from jobs.cli import main; sys.exit(main({line!r}))"],
        env={**os.environ, "RAYMERGE_START_SECONDS": "120"}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert driver.stderr is not None
        for shown in driver.stderr:
            if "units" in shown:
                break
        assert driver.poll() is None
        assert "0/" in shown
        cluster.add_node(num_cpus=2, object_store_memory=100 << 20)
        _, errors = driver.communicate(timeout=200)
        assert driver.returncode == 0, errors
    finally:
        driver.kill()
        driver.communicate()
        cluster.shutdown()  # type: ignore[no-untyped-call] # ray leaves it untyped
    check_finished(tmp_path / "out", large / "whole")


def test_a_node_that_drains_gets_nothing_new(
    large: Path, tmp_path: Path, nodes: tuple[Cluster, list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.run.LOOK_SECONDS", 0.2)
    _, (first, _) = nodes
    drained: set[int] = set()
    handed_after: list[int] = []
    receive, decide = Schedule.receive, Schedule.decide

    def look(self: Schedule, event: Any, now: float) -> Any:
        found = receive(self, event, now)
        drained.update(n for n, w in self._workers.items() if w.ready and w.node in self._draining)
        return found

    def watch(self: Schedule, now: float) -> Any:
        decisions = decide(self, now)
        handed_after.extend(d.worker for d in decisions if isinstance(d, Hand) and d.worker in drained)
        return decisions

    monkeypatch.setattr(Schedule, "receive", look)
    monkeypatch.setattr(Schedule, "decide", watch)
    asked: list[bool] = []

    def listen(progress: Any) -> None:
        if not asked and 2 < progress.units_done < progress.units:
            from ray._raylet import GcsClient  # type: ignore[attr-defined] # private

            client = GcsClient(address=ray.get_runtime_context().gcs_address)
            accepted, _ = client.drain_node(first.node_id, 2, "about to go", 10**15)
            asked.append(accepted)

    planned = api.plan(large / "merge.yaml", tmp_path / "out")
    api.run_planned(planned, workers=2, runner=run_on_ray, listener=listen)
    check_finished(tmp_path / "out", large / "whole")
    assert asked == [True]
    assert len(drained) == 1
    assert handed_after == []
