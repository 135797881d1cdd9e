"""What a run on a real Ray says of itself: metrics where Prometheus scrapes, names in Ray's lists and in ps, a timeline
of each worker, events of what befell them."""

from __future__ import annotations

import json
import os
import re
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from cluster.connect import quiet
from cluster.metrics import METRICS
from cluster.run import run_on_ray
from merger import api
from merger.clock import now_ns
from merger.events import Event
from merger.timeline import TimelineFile
from merger.watch import Watch
from tests.cluster.runs import check_finished, wait_for
from tests.traces import check_trace

pytestmark = pytest.mark.ray

CANARY = "canary-of-a-token-1234567890"


@pytest.fixture(scope="module")
def reporting_ray() -> Iterator[str]:
    """A Ray that exports what its processes record every half second. Yields the address of its metrics."""
    os.environ["RAY_metrics_report_interval_ms"] = "500"  # noqa: SIM112 - so Ray spells it
    try:
        ray.init(
            address="local", num_cpus=3, include_dashboard=False, log_to_driver=False, configure_logging=False,
            object_store_memory=100 << 20, namespace="raymerge",
        )  # fmt: skip
    finally:
        del os.environ["RAY_metrics_report_interval_ms"]  # noqa: SIM112
    with quiet():
        [node] = ray.nodes()  # type: ignore[no-untyped-call] # ray leaves it untyped
        yield f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    ray.shutdown()


def scraped(address: str) -> dict[str, dict[str, float]]:
    """Our metrics there: name → labels as text → value."""
    with urllib.request.urlopen(address, timeout=20) as answer:
        text = answer.read().decode()
    found: dict[str, dict[str, float]] = {}
    for name, labels, value in re.findall(r"^(ray_raymerge_\w+)\{([^}]*)\} (\S+)$", text, re.MULTILINE):
        found.setdefault(name, {})[labels] = float(value)
    return found


def title_of(process: psutil.Process) -> str:
    """What `ps` calls a process; nothing where it is gone."""
    try:
        return " ".join(process.cmdline()[:1])
    except psutil.Error:
        return ""


def test_a_run_on_ray_is_seen_from_outside(
    large: Path, tmp_path: Path, reporting_ray: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One run, looked at from everywhere, with one of its workers killed on the way."""
    monkeypatch.setenv("HF_TOKEN", CANARY)
    events: list[Event] = []
    seen: dict[str, dict[str, float]] = {}
    titles: set[str] = set()
    named: dict[str, str] = {}
    looked: list[int] = []
    killed: list[int] = []

    def look(progress: Any) -> None:
        """While the run is under way; it waits here until what it did so far has been exported."""
        wanted = ["units", "read_bytes", *(["written_bytes"] if progress.bytes_written else [])]
        if progress.units_done == progress.units or len(looked) >= len(wanted) - 1 or progress.units_done < 3:
            return
        # A title is read once: it is another as soon as the job is done.
        children = [(process, title_of(process)) for process in psutil.Process().children(recursive=True)]
        busy = [(process, title) for process, title in children if title.endswith("MergeWorker.step")]
        if not killed and not busy:
            return  # later, when one is at work
        looked.append(progress.bytes_written)
        named.update(ray.util.list_named_actors(all_namespaces=True)[0].items())
        titles.update(title for _, title in busy)
        wait_for(lambda: {METRICS[f"raymerge_{name}"].exported for name in wanted} <= scraped(reporting_ray).keys())
        seen.update(scraped(reporting_ray))
        if not killed:  # it holds one job at least that nobody has been told of
            busy[0][0].kill()
            killed.append(busy[0][0].pid)

    file = tmp_path / "timeline.json"
    with TimelineFile(file, now_ns()) as timeline:
        watch = Watch(timeline).also(events.append)
        planned = api.plan(large / "merge.yaml", tmp_path / "out")
        api.run_planned(planned, workers=2, runner=run_on_ray, listener=look, watch=watch)
    check_finished(tmp_path / "out", large / "whole")

    # metrics
    names = {spec.exported for spec in METRICS.values()}
    assert {name for name in seen if not name.endswith(("_sum", "_count", "_created"))} <= names, sorted(seen)
    [run] = {re.search(r'run="([^"]*)"', labels)[1] for series in seen.values() for labels in series}  # type: ignore[index]
    assert re.fullmatch(r"[0-9a-f]{8}-[0-9a-f]{6}", run)
    read = {labels: n for labels, n in seen["ray_raymerge_read_bytes_total"].items() if 'scheme="local"' in labels}
    assert sum(read.values()) > 10**6
    assert not any("norm" in labels or str(large) in labels for series in seen.values() for labels in series)

    # names
    assert any(re.fullmatch(rf"ray::raymerge-{run}-\d+:MergeWorker\.step", title) for title in titles), titles
    assert named["namespace"] == "raymerge"
    assert re.fullmatch(rf"raymerge-{run}-\d+", named["name"])

    # events
    kinds = [event.kind for event in events]
    assert kinds.count("worker-lost") == 1
    assert kinds.count("worker-ready") >= 1
    lost = next(event for event in events if event.kind == "worker-lost")
    assert lost.facts["kind"] == "died"
    again = [event for event in events if event.kind == "unit-again"]
    assert again
    assert all(event.facts["reason"] in ("suspected", "charged") for event in again)
    assert all("tensor" in event.facts and "unit" in event.facts for event in again)

    # the timeline
    spans = check_trace(file)
    ready = {event.facts["worker"] for event in events if event.kind == "worker-ready"}
    assert {span["pid"] for span in spans if span["cat"] == "job"}
    assert {span["pid"] for span in spans} <= ready
    kept = json.loads((tmp_path / "out" / "raymerge-report.json").read_text())
    assert kept["events"]["worker-lost"] == 1
    for path in (file, *(tmp_path / "out").iterdir()):
        assert CANARY.encode() not in path.read_bytes()


def test_two_runs_at_once_have_other_names(small: Path) -> None:
    from cluster.run import pool_name

    plan = api.plan(small / "merge.yaml")
    first, second = pool_name(plan), pool_name(plan)
    assert first != second
    assert first.startswith(plan.digest[:8])
