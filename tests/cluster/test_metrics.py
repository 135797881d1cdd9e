"""Metrics: what is declared, what is counted, and the dashboard that draws them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from ray.util import metrics as ray_metrics

from cluster import metrics
from cluster.metrics import METRICS, RunMetrics, WorkerMetrics
from merger.clock import Meter
from merger.events import Event
from merger.receipts import Receipt
from merger.storage.http import Counts

DASHBOARD = Path(__file__).parents[2] / "manifests" / "grafana" / "raymerge.json"
EXPORTED = re.compile(r"ray_raymerge_\w+")


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """What was recorded: (metric, labels) → its value. Nothing reaches Ray."""
    found: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}

    class Recorded:
        def __init__(self, name: str, text: str, *more: Any) -> None:
            self.name, self.labels = name, more[-1]
            assert text

        def _key(self, labels: dict[str, str]) -> tuple[str, tuple[tuple[str, str], ...]]:
            assert set(labels) == set(self.labels)  # Ray refuses a label that was not declared
            return self.name, tuple(sorted(labels.items()))

        def inc(self, amount: float, labels: dict[str, str]) -> None:
            assert amount > 0
            found[self._key(labels)] = found.get(self._key(labels), 0) + amount

        def set(self, value: float, labels: dict[str, str]) -> None:
            found[self._key(labels)] = value

        def observe(self, value: float, labels: dict[str, str]) -> None:
            found[self._key(labels)] = found.get(self._key(labels), 0) + value

    for kind in ("Counter", "Gauge", "Histogram"):
        monkeypatch.setattr(metrics, kind, Recorded)
    return found


def test_names_are_ones_that_prometheus_takes() -> None:
    for spec in METRICS.values():
        assert re.fullmatch(r"raymerge_[a-z_]+", spec.name)
        assert not ray_metrics._is_invalid_metric_name(spec.name)
        assert not spec.name.endswith(("_total", "_bucket"))  # Ray adds them
        assert spec.labels[0] == "run"
        assert set(spec.labels) <= {"run", "scheme", "activity", "reason", "outcome", "kind", "state"}


def test_a_worker_passes_on_what_it_has_gained(
    recorded: dict[Any, float], monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    meter, counts = Meter(), Counts()
    monkeypatch.setattr(metrics, "METER", meter)
    monkeypatch.setattr(metrics, "COUNTS", counts)
    worker = WorkerMetrics("r")
    meter.read_bytes["s3"] = 100
    counts.add(requests=3, retries=1, throttled=1, asked_wait_seconds=2.5)
    worker.publish(at_once=True)
    meter.read_bytes["s3"] = 150
    meter.spent("compute", 1.5)
    worker.publish()  # too soon
    assert recorded["raymerge_read_bytes", (("run", "r"), ("scheme", "s3"))] == 100
    worker.publish(at_once=True)
    assert recorded == {
        ("raymerge_read_bytes", (("run", "r"), ("scheme", "s3"))): 150,
        ("raymerge_activity_seconds", (("activity", "compute"), ("run", "r"))): 1.5,
        ("raymerge_wait_seconds", (("reason", "server"), ("run", "r"))): 2.5,
        ("raymerge_http_requests", (("run", "r"),)): 3,
        ("raymerge_http_retries", (("run", "r"),)): 1,
        ("raymerge_http_throttled", (("run", "r"),)): 1,
    }


def test_the_driver_counts_what_becomes_of_units_and_workers(recorded: dict[Any, float]) -> None:
    driver = RunMetrics("r")
    driver.resumed(4)
    driver.done([Receipt(0, seconds=0.5), Receipt(1, seconds=1.5)])
    driver.event(Event("unit-again", "x", {"reason": "out-of-memory", "tensor": "a.b"}))
    driver.event(Event("unit-failed", "x", {"tensor": "a.b"}))
    driver.event(Event("worker-lost", "x", {"kind": "died", "node": "n"}))
    driver.event(Event("merge-ended", "x", {"state": "done", "merge": "m"}))
    driver.event(Event("stage-done", "x", {"stage": 1}))
    driver.levels(workers={"busy": 2, "idle": 1}, units_left=7)
    run = ("run", "r")
    assert recorded == {
        ("raymerge_units", (("outcome", "resumed"), run)): 4,
        ("raymerge_units", (("outcome", "done"), run)): 2,
        ("raymerge_units", (("outcome", "again"), run)): 1,
        ("raymerge_units", (("outcome", "failed"), run)): 1,
        ("raymerge_unit_seconds", (run,)): 2.0,
        ("raymerge_retries", (("reason", "out-of-memory"), run)): 1,
        ("raymerge_workers_lost", (("kind", "died"), run)): 1,
        ("raymerge_merges", (run, ("state", "done"))): 1,
        ("raymerge_workers", (run, ("state", "busy"))): 2,
        ("raymerge_workers", (run, ("state", "idle"))): 1,
        ("raymerge_units_left", (run,)): 7,
    }


def expressions(value: Any) -> list[str]:
    """Every query of a dashboard."""
    if isinstance(value, dict):
        own = [value[key] for key in ("expr", "query") if isinstance(value.get(key), str)]
        return own + [found for inner in value.values() for found in expressions(inner)]
    return [found for inner in value for found in expressions(inner)] if isinstance(value, list) else []


def test_the_dashboard_draws_every_metric_and_no_other() -> None:
    drawn = {name for text in expressions(json.loads(DASHBOARD.read_text())) for name in EXPORTED.findall(text)}
    assert drawn == {spec.exported for spec in METRICS.values()}


def test_the_dashboard_groups_by_labels_that_there_are() -> None:
    by_name = {spec.exported: spec for spec in METRICS.values()}
    for text in expressions(json.loads(DASHBOARD.read_text())):
        names = EXPORTED.findall(text)
        if not names:
            continue
        [spec] = {by_name[name] for name in names}
        labels = {*re.findall(r"by \((\w+)\)", text), *re.findall(r"(\w+)=~", text)}
        assert labels <= {*spec.labels, *(("le",) if spec.kind == "histogram" else ())}, text
        assert text.count("(") == text.count(")")
        assert text.count("{") == text.count("}")
        if spec.kind != "gauge":
            assert re.search(r"\b(rate|increase)\(", text), text


def test_the_dashboard_is_one_that_grafana_reads() -> None:
    """The parts of its schema that an import fails over, or shows nothing over."""
    board = json.loads(DASHBOARD.read_text())
    assert board["title"] == "raymerge"
    assert re.fullmatch(r"[A-Za-z0-9_-]{1,40}", board["uid"])
    assert isinstance(board["schemaVersion"], int)
    variables = {variable["name"] for variable in board["templating"]["list"]}
    assert variables == {"datasource", "run"}
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        assert panel["type"] in ("timeseries", "stat")
        assert panel["title"]
        assert panel["description"]
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        place = panel["gridPos"]
        x, y, w, h = (place[side] for side in "xywh")
        cells = {(x + right, y + down) for right in range(w) for down in range(h)}
        assert x + w <= 24
        assert not cells & taken, panel["title"]
        taken |= cells
        references = [target["refId"] for target in panel["targets"]]
        assert references
        assert len(references) == len(set(references))
        for target in panel["targets"]:
            used = {*re.findall(r"\$(\w+)", target["expr"])} - {"__rate_interval", "__range"}
            assert used <= variables
    numbers = [panel["id"] for panel in board["panels"]]
    assert len(numbers) == len(set(numbers))
