"""What a run tells Prometheus, through Ray's own metrics: each node's agent exports what the processes on it record.

    METRICS         every metric there is: kind, what it counts, its labels (manifests/grafana/raymerge.json draws them)
    WorkerMetrics   in an actor: what merger.clock.METER and the wire's COUNTS have gained since the last look
    RunMetrics      in the driver: units, retries, losses, and how many workers there are

Labels are few and of few values: `run` is the pool's name, `scheme` one of four kinds of places, the others words of a
small set. No name of a tensor, a source or a file is ever one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from ray.util.metrics import Counter, Gauge, Histogram

from merger.clock import METER
from merger.events import Event
from merger.receipts import Receipt
from merger.storage.http import COUNTS

PUBLISH_SECONDS: Final = 1.0
"""Between two looks of a worker at what it has gained."""
PREFIX: Final = "ray_"
"""What Ray puts before every name of an application."""


@dataclass(frozen=True, slots=True)
class MetricSpec:
    """One metric: what Ray is told of it."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    text: str
    labels: tuple[str, ...] = ("run",)

    @property
    def exported(self) -> str:
        """Its name where Prometheus scrapes it (of a histogram: its buckets')."""
        return PREFIX + self.name + {"counter": "_total", "gauge": "", "histogram": "_bucket"}[self.kind]


METRICS: Final[Mapping[str, MetricSpec]] = {
    spec.name: spec
    for spec in (
        MetricSpec("raymerge_read_bytes", "counter", "Bytes read from sources.", ("run", "scheme")),
        MetricSpec("raymerge_written_bytes", "counter", "Bytes written to outputs.", ("run", "scheme")),
        MetricSpec("raymerge_activity_seconds", "counter", "Seconds of all threads.", ("run", "activity")),
        MetricSpec("raymerge_wait_seconds", "counter", "Seconds of waiting: for a job, for the network, because a "
                   "server asked for it.", ("run", "reason")),
        MetricSpec("raymerge_http_requests", "counter", "Requests to the Hub and to object stores."),
        MetricSpec("raymerge_http_retries", "counter", "Requests that were made again."),
        MetricSpec("raymerge_http_throttled", "counter", "Answers 429 and 503."),
        MetricSpec("raymerge_units", "counter", "Units, by what became of them.", ("run", "outcome")),
        MetricSpec("raymerge_retries", "counter", "Jobs that were handed out again.", ("run", "reason")),
        MetricSpec("raymerge_workers_lost", "counter", "Workers that died.", ("run", "kind")),
        MetricSpec("raymerge_merges", "counter", "Merges of a bulk, by how they ended.", ("run", "state")),
        MetricSpec("raymerge_workers", "gauge", "Workers now.", ("run", "state")),
        MetricSpec("raymerge_units_left", "gauge", "Units that are not done."),
        MetricSpec("raymerge_unit_seconds", "histogram", "Seconds of one unit on its worker."),
    )
}  # fmt: skip
UNIT_SECONDS: Final = [0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0]

_MAKE: Final[Mapping[str, Callable[[MetricSpec], Any]]] = {
    "counter": lambda s: Counter(s.name, s.text, s.labels),
    "gauge": lambda s: Gauge(s.name, s.text, s.labels),
    "histogram": lambda s: Histogram(s.name, s.text, UNIT_SECONDS, s.labels),
}


class _Recorded:
    """The metrics of one process for one run, each made when it is first recorded."""

    def __init__(self, run: str) -> None:
        self._run = {"run": run}
        self._made: dict[str, Any] = {}

    def _metric(self, name: str) -> Any:
        if name not in self._made:
            spec = METRICS[name]
            self._made[name] = _MAKE[spec.kind](spec)
        return self._made[name]

    def count(self, name: str, amount: float, **labels: str) -> None:
        if amount > 0:
            self._metric(name).inc(amount, {**self._run, **labels})

    def level(self, name: str, value: float, **labels: str) -> None:
        self._metric(name).set(value, {**self._run, **labels})

    def observe(self, name: str, value: float) -> None:
        self._metric(name).observe(value, self._run)


class WorkerMetrics:
    """What this process has read, written, waited for and asked of servers, as it grows."""

    def __init__(self, run: str) -> None:
        self._recorded = _Recorded(run)
        self._seen: dict[tuple[str, str, str], float] = {}
        self._published = 0.0

    def publish(self, *, at_once: bool = False) -> None:
        """Pass on what was gained since the last time; not more often than every second."""
        now = time.monotonic()
        if not at_once and now - self._published < PUBLISH_SECONDS:
            return
        self._published = now
        for (name, label, value), total in _totals().items():
            gained = total - self._seen.get((name, label, value), 0)
            self._seen[name, label, value] = total
            self._recorded.count(name, gained, **({label: value} if label else {}))


def _totals() -> dict[tuple[str, str, str], float]:
    """(metric, label, its value) → what this process has come to."""
    waits = {
        "job": METER.seconds["wait"], "network": METER.network_seconds, "server": COUNTS.asked_wait_seconds,
    }  # fmt: skip
    return {
        **{("raymerge_read_bytes", "scheme", scheme): n for scheme, n in METER.read_bytes.items()},
        **{("raymerge_written_bytes", "scheme", scheme): n for scheme, n in METER.written_bytes.items()},
        **{("raymerge_activity_seconds", "activity", what): s for what, s in METER.seconds.items()},
        **{("raymerge_wait_seconds", "reason", reason): s for reason, s in waits.items()},
        ("raymerge_http_requests", "", ""): COUNTS.requests,
        ("raymerge_http_retries", "", ""): COUNTS.retries,
        ("raymerge_http_throttled", "", ""): COUNTS.throttled,
    }


class RunMetrics:
    """What the driver knows of a run. Told of events like anybody else who looks on."""

    def __init__(self, run: str) -> None:
        self._recorded = _Recorded(run)

    def event(self, event: Event) -> None:
        word = {name: str(event.facts.get(name, "")) for name in ("reason", "kind", "state")}
        match event.kind:
            case "unit-again":
                self._recorded.count("raymerge_units", 1, outcome="again")
                self._recorded.count("raymerge_retries", 1, reason=word["reason"])
            case "worker-lost":
                self._recorded.count("raymerge_workers_lost", 1, kind=word["kind"])
            case "merge-ended":
                self._recorded.count("raymerge_merges", 1, state=word["state"])
            case "unit-failed":
                self._recorded.count("raymerge_units", 1, outcome="failed")

    def resumed(self, units: int) -> None:
        """Units that an earlier run has done."""
        self._recorded.count("raymerge_units", units, outcome="resumed")

    def done(self, receipts: Iterable[Receipt]) -> None:
        """Units that went well."""
        seconds = [receipt.seconds for receipt in receipts]
        self._recorded.count("raymerge_units", len(seconds), outcome="done")
        for each in seconds:
            self._recorded.observe("raymerge_unit_seconds", each)

    def levels(self, *, workers: Mapping[str, int], units_left: int) -> None:
        for state, number in workers.items():
            self._recorded.level("raymerge_workers", number, state=state)
        self._recorded.level("raymerge_units_left", units_left)
