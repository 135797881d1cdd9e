"""A bulk on Ray: the same outputs as here, from one pool."""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster.connect import connection
from cluster.run import run_bulk_on_ray
from merger import api
from merger.bulk import load_bulk
from tests.conformance.bulks import broken, bulk_sources, each, everything, run, states, sweep, ties
from tests.conformance.folders import content_digest

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module", autouse=True)
def _private_ray() -> Iterator[None]:
    with connection("private", workers=2):
        yield


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    return bulk_sources(tmp_path)


run_there = functools.partial(run, executor=run_bulk_on_ray)


def workers() -> list[int]:
    return [
        process.pid
        for process in psutil.Process().children(recursive=True)
        if any("MergeWorker" in part for part in process.cmdline()[:1])
    ]


def test_a_bulk_on_ray_is_each_merge_alone(sources: Path) -> None:
    """Also when a worker is killed in the middle."""
    document = sweep(sources)
    document["matrix"] = {"parameters.density": [0.2, 0.5], "parameters.lambda": [0.5, 1.0]}
    killed: list[int] = []

    def listen(progress: Any) -> None:
        if not killed and progress.bytes_written and (found := workers()):
            killed.append(found[0])
            os.kill(found[0], signal.SIGKILL)

    report = run_there(document, listener=listen)
    assert [merge.state for merge in report.merges] == ["done"] * 4
    assert killed
    whole = api.merge({**ties(sources), "parameters": {"density": 0.5, "lambda": 0.5}}, sources / "alone")
    assert content_digest(sources / "out" / "ties-0.5-0.5") == whole.content_digest
    assert report.bytes_read == whole.bytes_read
    assert not list((sources / "out").glob("*/.raymerge"))
    again = run_there(document)
    assert again.count("already done") == 4


def test_one_failure_on_ray_does_not_end_the_others(sources: Path) -> None:
    broken(sources)
    report = run_there(each(sources))
    assert states(report) == {"a0": "done", "a1": "failed", "a2": "done", "a3": "done"}
    assert report.merges[1].problems[0].code == "not-finite"
    for i in (0, 2, 3):
        made = api.fold(sources / "adapters" / f"a{i}", sources / "alone" / f"{i}", base=sources / "base")
        assert content_digest(sources / "out" / f"a{i}") == made.content_digest


def test_a_bad_variant_is_found_on_ray(sources: Path) -> None:
    document = sweep(sources)
    document["matrix"] = {"parameters.lambda": [0.5, 1e38, 2.0]}
    document["defaults"]["output"]["path"] = str(sources / "out" / "{parameters.lambda}")
    report = run_there(document)
    assert [merge.state for merge in report.merges] == ["done", "failed", "done"]
    assert not (sources / "out" / "1e+38" / "raymerge.json").exists()


def test_merges_of_several_steps_on_ray(sources: Path) -> None:
    """Documents and ranks, beside merges of one step, from one pool."""
    report = run_there(everything(sources))
    assert set(states(report).values()) == {"done"}, report.lines()
    for merge in load_bulk(everything(sources)).merges:
        alone = api.merge(merge.manifest, sources / "alone" / merge.label)
        assert content_digest(sources / "out" / merge.label) == alone.content_digest, merge.label
    assert not list((sources / "out").glob("*/.raymerge"))
