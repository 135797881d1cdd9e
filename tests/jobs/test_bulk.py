"""`raymerge bulk` and `raymerge plan` of a bulk: one table, one document, one exit code."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cluster.runs import wait_for
from tests.conformance.bulks import broken, bulk_sources, each, sweep
from tests.conformance.folders import Outcome, command, ended, manifest, model, model_tensors, snapshot, start

Raymerge = Callable[..., Outcome]


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    return bulk_sources(tmp_path)


def test_a_bulk_in_a_table_and_as_a_document(sources: Path, raymerge: Raymerge) -> None:
    path = manifest(sources / "bulk.yaml", each(sources))
    first = raymerge("bulk", path, "--on", "here")
    assert first.code == 0
    assert [line.split()[:2] for line in first.out.splitlines()[:4]] == [[f"a{i}", "done"] for i in range(4)]
    assert first.out.splitlines()[4].startswith("4 done; read ")
    before = snapshot(sources / "out")
    second = raymerge("bulk", path, "--on", "here", "--json")
    assert second.code == 0
    assert second.document["states"] == {"already done": 4}
    assert second.document["bytes_read"] == 0
    assert snapshot(sources / "out") == before


def test_one_failed_merge_is_exit_1_and_named(sources: Path, raymerge: Raymerge) -> None:
    broken(sources)
    ended = raymerge("bulk", manifest(sources / "bulk.yaml", each(sources)), "--on", "here", "--json")
    assert ended.code == 1
    assert ended.document["exit_code"] == 1
    assert ended.document["states"] == {"done": 3, "failed": 1}
    assert "a1: " in ended.err


def test_what_is_wrong_with_the_manifest_is_exit_2_and_nothing_is_written(sources: Path, raymerge: Raymerge) -> None:
    document = sweep(sources)
    document["matrix"]["parameters.density"] = [0.2, 2.0]
    ended = raymerge("bulk", manifest(sources / "bulk.yaml", document))
    assert ended.code == 2
    assert ended.err.count("out-of-bounds") == 1
    assert "ties-2.0-0.5, ties-2.0-1.0" in ended.err
    assert not (sources / "out").exists()


def test_where_no_merge_can_start_it_is_exit_2(sources: Path, raymerge: Raymerge) -> None:
    document = {**each(sources), "on_failure": "stop"}
    (sources / "adapters" / "a3" / "adapter_model.safetensors").write_bytes(b"nonsense")
    ended = raymerge("bulk", manifest(sources / "bulk.yaml", document), "--on", "here", "--json")
    assert ended.code == 2
    assert ended.document["states"] == {"not run": 3, "refused": 1}
    assert not (sources / "out").exists()


def test_a_plan_of_a_bulk_says_what_is_read_together(sources: Path, raymerge: Raymerge) -> None:
    path = manifest(sources / "bulk.yaml", sweep(sources))
    planned = raymerge("plan", path, "--json")
    assert planned.code == 0
    (together,) = planned.document["sweeps"]
    assert len(together) == 6
    assert planned.document["read_bytes_apart"] == 6 * planned.document["read_bytes"]
    assert [m["plan"]["outputs"][0]["path"] for m in planned.document["merges"]] == [
        str(sources / "out" / name) for name in together
    ]
    assert "6 of them in 1 sweep(s)" in raymerge("plan", path).out
    (sources / "m1" / "model.safetensors").unlink()
    assert raymerge("plan", path).code == 2


def test_a_bulk_is_not_merged_nor_a_merge_run_as_a_bulk(sources: Path, raymerge: Raymerge) -> None:
    path = manifest(sources / "bulk.yaml", sweep(sources))
    ended = raymerge("merge", path)
    assert ended.code == 2
    assert "raymerge bulk" in ended.err
    single = manifest(sources / "one.yaml", {"adapters": [{"adapter": str(sources / "adapters" / "a0")}]})
    ended = raymerge("bulk", single, "--json")
    assert ended.code == 2
    assert json.loads(ended.out)["problems"][0]["code"] == "conflict"


def test_a_bulk_that_is_stopped_says_so_and_goes_on(sources: Path) -> None:
    for seed, name in enumerate(("base", "m1", "m2")):
        model(sources / name, seed, tensors=model_tensors(seed, rows=2000, cols=1024, layers=24))
    path = manifest(sources / "bulk.yaml", sweep(sources))
    process = start("bulk", path, "--on", "here", "--json")
    wait_for(lambda: any((sources / "out").glob("*/.raymerge/journal/*.jsonl")))
    process.send_signal(signal.SIGTERM)
    stopped = ended(process)
    assert stopped.code == 143, stopped.err
    assert stopped.document["exit_code"] == 143
    assert stopped.document["states"] == {"stopped": 6}
    again = command("bulk", path, "--on", "here", "--json")
    assert again.code == 0, again.err
    assert all(merge["report"]["units_resumed"] for merge in again.document["merges"])
