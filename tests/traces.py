"""What holds of every timeline: it is what Perfetto reads, and each of its rows is a partition of time."""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SLACK_US = 0.002
"""Times are written as microseconds with a fraction; a span's end is its start and its length added up."""


def check_trace(path: Path) -> list[dict[str, Any]]:
    """Check a file by the rules of Chrome's trace events. Returns its spans."""
    document = json.loads(path.read_text())
    assert set(document) == {"displayTimeUnit", "traceEvents", "otherData"}
    named: set[tuple[int, int]] = set()
    spans: list[dict[str, Any]] = []
    for event in document["traceEvents"]:
        assert event["ph"] in ("M", "X", "i"), event
        assert isinstance(event["pid"], int)
        assert isinstance(event["tid"], int)
        if event["ph"] == "M":
            assert event["name"] in ("process_name", "thread_name")
            assert event["args"]["name"]
            named.add((event["pid"], event["tid"]))
            continue
        assert event["ts"] >= 0
        if event["ph"] == "X":
            assert event["dur"] >= 0
            assert (event["pid"], event["tid"]) in named  # a row has its name before its first span
            spans.append(event)
        else:
            assert event["s"] == "g"
    rows: dict[tuple[int, int], list[dict[str, Any]]] = defaultdict(list)
    for span in spans:
        rows[span["pid"], span["tid"]].append(span)
    for row in rows.values():
        _check_row(row)
    return spans


def _check_row(row: Sequence[dict[str, Any]]) -> None:
    jobs = [span for span in row if span["cat"] == "job"]
    parts = [span for span in row if span["cat"] != "job"]
    assert {span["cat"] for span in parts} <= {"wait", "read", "compute", "write"}
    for kind in (jobs, parts):
        # Spans come in the order in which they ended, and none begins before the one before it has ended.
        for before, after in itertools.pairwise(kind):
            assert after["ts"] >= before["ts"] + before["dur"] - SLACK_US
    for before, after in itertools.pairwise(parts):  # and nothing is missing in between
        assert abs(after["ts"] - before["ts"] - before["dur"]) < SLACK_US
    last = max((job["ts"] + job["dur"] for job in jobs), default=0.0)
    for part in parts:
        inside = [
            job for job in jobs
            if job["ts"] - SLACK_US <= part["ts"] and part["ts"] + part["dur"] <= job["ts"] + job["dur"] + SLACK_US
        ]  # fmt: skip
        if part["cat"] == "wait":
            assert not any(job["ts"] + SLACK_US < part["ts"] < job["ts"] + job["dur"] - SLACK_US for job in jobs)
        elif part["ts"] < last:  # what comes later belongs to a job that never ended: its worker died
            assert len(inside) == 1, part
