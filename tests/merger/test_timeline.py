"""Timelines of runs in this process, the clocks behind them, and what they cost."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from merger import api
from merger.clock import METER, Clock, Meter, Span, SpanLog, now_ns, scheme_of, scheme_of_sink
from merger.errors import ManifestError
from merger.events import Event
from merger.storage import LocalStore, MemoryStore
from merger.storage.filled import FilledSink
from merger.timeline import TimelineFile
from merger.watch import Watch
from tests.conformance.folders import manifest, model
from tests.traces import check_trace


@pytest.fixture(scope="module")
def merge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("timeline")
    for seed, name in enumerate(("base", "m1", "m2")):
        model(folder / name, seed, layers=4)
    manifest(
        folder / "merge.yaml",
        {
            "merge_method": "ties", "base_model": str(folder / "base"),
            "parameters": {"density": 0.4, "scope": "model"},
            "models": [{"model": str(folder / f"m{n}"), "parameters": {"weight": 1.0}} for n in (1, 2)],
        },
    )  # fmt: skip
    return folder / "merge.yaml"


def test_a_run_here_draws_each_thread(merge: Path, tmp_path: Path) -> None:
    file = tmp_path / "timeline.json"
    with TimelineFile(file, now_ns()) as timeline:
        report = api.merge(merge, tmp_path / "drawn", workers=2, watch=Watch(timeline))
    spans = check_trace(file)
    assert {span["pid"] for span in spans} == {1}
    assert {span["tid"] for span in spans} == {0, 1}
    jobs = [span for span in spans if span["cat"] == "job"]
    assert len(jobs) == report.units
    assert any(job["name"].startswith("model.layers.0.self_attn.q_proj.weight, rows 0 to ") for job in jobs)
    assert sum(span["args"]["bytes"] for span in spans if span["cat"] == "read") == report.bytes_read
    written = sum(span["args"]["bytes"] for span in spans if span["cat"] == "write")
    assert 0 < written <= report.bytes_written  # headers and small files are the driver's
    marks = [event["name"] for event in json.loads(file.read_text())["traceEvents"] if event["ph"] == "i"]
    assert marks[0] == "run-begun"
    assert marks[-2:] == ["units-done", "published"]
    assert api.merge(merge, tmp_path / "plain", workers=2).content_digest == report.content_digest


def test_a_run_that_fails_leaves_a_whole_file(merge: Path, tmp_path: Path) -> None:
    file = tmp_path / "timeline.json"

    def fail(progress: object) -> None:
        raise RuntimeError("the listener is broken")

    with pytest.raises(RuntimeError), TimelineFile(file, now_ns()) as timeline:
        api.merge(merge, tmp_path / "out", workers=1, watch=Watch(timeline), listener=fail)
    check_trace(file)


def test_a_place_where_none_can_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ManifestError) as caught:
        TimelineFile(tmp_path / "missing" / "file.json", now_ns())
    assert caught.value.problems[0].code == "bad-arguments"


def test_names_are_escaped_and_secrets_hidden(tmp_path: Path) -> None:
    file = tmp_path / "timeline.json"
    with TimelineFile(file, 0) as timeline:
        facts = (("file", "https://host/key?X-Amz-Signature=deadbeef"),)
        timeline.add(1, [Span(0, 1000, 2000, "job", "a\x1b[31mb"), Span(0, 1000, 2000, "read", "read", facts)])
        timeline.mark(Event("worker-lost", "token=sesame\n", at=1.0))
    text = file.read_text()
    assert "\\\\x1b[31m" in text
    assert "deadbeef" not in text
    assert "sesame" not in text
    check_trace(file)


def test_what_is_too_much_is_counted_and_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = SpanLog(limit=3)
    for at in range(5):
        log.add(Span(0, at, at + 1, "read", "read"))
    spans, dropped = log.take()
    assert (len(spans), dropped) == (3, 2)
    assert log.take() == ((), 0)
    monkeypatch.setattr("merger.timeline.TRACE_LIMIT", 2)
    with TimelineFile(tmp_path / "t.json", 0) as timeline:
        timeline.add(1, spans, dropped=dropped)
    assert json.loads((tmp_path / "t.json").read_text())["otherData"] == {"spans": 2, "left_out": 3}


def test_a_clock_is_a_partition_of_time() -> None:
    log, store = SpanLog(), MemoryStore("clock")
    clock = Clock(7, log)
    with clock.job("first"), clock.reading(store, "file", 10):
        pass
    with pytest.raises(KeyError), clock.job("second"), clock.writing("local", "out", 5):
        raise KeyError("x")
    spans, _ = log.take()
    parts = [span for span in spans if span.kind != "job"]
    assert all(before.end_ns == after.start_ns for before, after in itertools.pairwise(parts))
    jobs = [span for span in spans if span.kind == "job"]
    assert [job.name for job in jobs] == ["first", "second"]  # also where it failed
    assert all(job.start_ns < job.end_ns for job in jobs)


def test_a_meter_counts_by_scheme(monkeypatch: pytest.MonkeyPatch) -> None:
    meter = Meter()
    monkeypatch.setattr("merger.clock.METER", meter)
    clock = Clock()
    with clock.job("one"):
        with clock.reading(MemoryStore("a"), "file", 10):
            pass
        with pytest.raises(OSError), clock.reading(LocalStore("/a"), "file", 99):
            raise OSError
        with clock.writing("s3", "file", 7):
            pass
    assert meter.read_bytes == {"local": 0, "s3": 0, "hub": 0, "memory": 10}  # what did not come is not counted
    assert meter.written_bytes["s3"] == 7
    assert all(seconds > 0 for seconds in meter.seconds.values())
    assert meter.network_seconds == 0
    assert METER is not meter


def test_schemes() -> None:
    assert scheme_of(LocalStore("/data/s3/hf")) == "local"
    assert scheme_of(MemoryStore("x")) == "memory"
    assert scheme_of_sink(FilledSink(LocalStore("/out"))) == "local"
