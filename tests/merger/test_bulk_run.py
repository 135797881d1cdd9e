"""Many merges on one pool: each as if it were alone, a sweep read once, and nobody's failure another's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from merger import api, bulk_run
from merger.bulk import load_bulk, plan_bulk
from merger.bulk_run import run_bulk
from merger.errors import StoppedError
from merger.run import Stop
from merger.run_files import ask_to_stop, read_events, read_log, read_status
from merger.verify import verify_output
from tests.conformance.bulks import broken, bulk_sources, each, run, states, sweep, ties
from tests.conformance.folders import adapter, content_digest, model, model_tensors, names


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    return bulk_sources(tmp_path)


def test_a_sweep_is_read_once_and_each_variant_is_what_it_is_alone(sources: Path) -> None:
    report = run(sweep(sources))
    assert set(states(report).values()) == {"done"}
    assert len(report.merges) == 6
    alone = []
    for density in (0.2, 0.5, 0.8):
        for lam in (0.5, 1.0):
            manifest = {**ties(sources), "parameters": {"density": density, "lambda": lam}}
            made = api.merge(manifest, sources / "alone" / f"{density}-{lam}")
            alone.append(made)
            out = sources / "out" / f"ties-{density}-{lam}"
            assert content_digest(out) == made.content_digest
            assert names(out) == names(Path(made.path))
            assert not (out / ".raymerge").exists()
            assert (out / "raymerge.json").read_bytes() == (Path(made.path) / "raymerge.json").read_bytes()
    assert report.bytes_read == alone[0].bytes_read
    # One by itself still says what it is, and can be made again from what it says.
    assert verify_output(str(sources / "out" / "ties-0.2-1.0"), replay=None).replayed > 0


def test_what_each_finds_is_folded(sources: Path) -> None:
    report = run(each(sources))
    assert states(report) == {f"a{i}": "done" for i in range(4)}
    for i in range(4):
        made = api.fold(sources / "adapters" / f"a{i}", sources / "alone" / f"{i}", base=sources / "base")
        assert content_digest(sources / "out" / f"a{i}") == made.content_digest


def test_the_second_run_does_nothing_and_a_moved_input_runs_its_own_merges_alone(sources: Path) -> None:
    document = each(sources)
    document["defaults"]["output"]["exists"] = "version"
    first = run(document)
    assert first.count("done") == 4
    again = run(document)
    assert again.count("already done") == 4
    assert again.bytes_read == 0
    adapter(sources / "adapters" / "a2", 77)
    third = run(document)
    assert states(third) == {"a0": "already done", "a1": "already done", "a2": "done", "a3": "already done"}
    versions = [p.name for p in (sources / "out" / "a2").iterdir() if p.is_dir()]
    assert len(versions) == 2
    latest = json.loads((sources / "out" / "a2" / "latest.json").read_text())
    assert latest["fingerprint"] in versions
    assert latest["path"] == third.merges[2].path


def test_an_output_that_holds_another_merge_fails_by_itself(sources: Path) -> None:
    run(each(sources))
    adapter(sources / "adapters" / "a1", 55)
    report = run(each(sources))
    assert states(report) == {"a0": "already done", "a1": "failed", "a2": "already done", "a3": "already done"}
    assert report.merges[1].problems[0].code == "output-exists"


def test_one_failure_does_not_end_the_others(sources: Path) -> None:
    broken(sources)
    report = run(each(sources))
    assert states(report) == {"a0": "done", "a1": "failed", "a2": "done", "a3": "done"}
    assert report.merges[1].problems[0].code == "not-finite"
    assert report.merges[1].error is not None


def test_a_merge_that_is_refused_is_not_run_and_the_others_are(sources: Path) -> None:
    (sources / "adapters" / "a1" / "adapter_model.safetensors").write_bytes(b"nonsense")
    report = run(each(sources))
    assert states(report) == {"a0": "done", "a1": "refused", "a2": "done", "a3": "done"}
    assert not (sources / "out" / "a1").exists()


def test_a_bulk_that_stops_at_a_failure(sources: Path) -> None:
    broken(sources)
    report = run(each(sources, on_failure="stop", max_active_merges=1))
    assert states(report) == {"a0": "done", "a1": "failed", "a2": "not run", "a3": "not run"}
    assert not (sources / "out" / "a2").exists()
    more = run(each(sources, max_active_merges=1), max_failures=1)
    assert states(more) == {"a0": "already done", "a1": "failed", "a2": "not run", "a3": "not run"}


def test_a_variant_that_overflows_is_found_and_the_others_of_its_sweep_are_made(sources: Path) -> None:
    document = sweep(sources)
    document["matrix"] = {"parameters.lambda": [0.5, 1.0, 1e38, 1.5, 2.0]}
    document["defaults"]["output"]["path"] = str(sources / "out" / "{parameters.lambda}")
    report = run(document)
    assert [merge.state for merge in report.merges] == ["done", "done", "failed", "done", "done"]
    assert report.merges[2].problems[0].code == "not-finite"
    made = api.merge({**ties(sources), "parameters": {"density": 0.5, "lambda": 2.0}}, sources / "alone")
    assert content_digest(sources / "out" / "2.0") == made.content_digest
    assert not (sources / "out" / "1e+38" / "raymerge.json").exists()


def test_a_stop_keeps_what_is_done_and_the_next_run_goes_on(sources: Path) -> None:
    for seed, name in enumerate(("base", "m1", "m2")):
        model(sources / name, seed, tensors=model_tensors(seed, rows=600, cols=512, layers=40, dtype=torch.bfloat16))
    stop = Stop()
    document = sweep(sources)

    def listen(progress: Any) -> None:
        if progress.bytes_written > 4 << 20:
            stop.set(15)

    report = run(document, listener=listen, stop=stop)
    assert isinstance(report.stopped, StoppedError)
    assert set(states(report).values()) == {"stopped"}
    journals = list((sources / "out").glob("*/.raymerge/journal/*.jsonl"))
    assert len(journals) >= 6
    again = run(document)
    assert set(states(again).values()) == {"done"}
    resumed = [merge.report.units_resumed for merge in again.merges if merge.report is not None]
    assert min(resumed) > 0
    whole = api.merge({**ties(sources), "parameters": {"density": 0.8, "lambda": 1.0}}, sources / "alone")
    assert content_digest(sources / "out" / "ties-0.8-1.0") == whole.content_digest
    assert again.bytes_read == whole.bytes_read  # both runs together


def test_a_sweep_that_memory_does_not_hold_is_cut_in_parts(sources: Path) -> None:
    document = sweep(sources)
    document["matrix"]["parameters.density"] = [0.1 * n for n in range(1, 10)]
    planned = plan_bulk(load_bulk(document))
    assert len(planned.sweeps) == 1
    assert len(planned.sweeps[0]) == 18
    report = run_bulk(planned, workers=1, memory=10 << 20)
    assert set(states(report).values()) == {"done"}
    made = api.merge({**ties(sources), "parameters": {"density": 0.1, "lambda": 0.5}}, sources / "alone")
    assert content_digest(sources / "out" / "ties-0.1-0.5") == made.content_digest
    assert made.bytes_read < report.bytes_read < 18 * made.bytes_read


def test_merges_that_are_not_alike_are_no_sweep(sources: Path) -> None:
    other = {**ties(sources), "merge_method": "task_arithmetic", "parameters": {}}
    document = {
        "merges": [{"name": "a", **ties(sources)}, {"name": "b", **ties(sources, "m2", "m1")}, {"name": "c", **other}],
        "defaults": {"output": {"path": str(sources / "out" / "{name}")}},
    }
    planned = plan_bulk(load_bulk(document))
    assert planned.sweeps == ((0,), (1,), (2,))
    assert set(states(run_bulk(planned, workers=2, memory=64 << 20)).values()) == {"done"}


def test_a_merge_of_a_bulk_is_asked_to_stop_through_its_output_and_the_others_go_on(
    sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed, name in enumerate(("base", "m1", "m2")):
        model(sources / name, seed, tensors=model_tensors(seed, rows=600, cols=512, layers=40, dtype=torch.bfloat16))
    monkeypatch.setattr(bulk_run, "VISIT_SECONDS", 0.0)
    one = sources / "out" / "ties-0.5-1.0"
    asked: list[bool] = []

    def listen(progress: Any) -> None:
        if not asked and progress.bytes_written:
            assert read_status(str(one))["state"] == "running"
            asked.append(ask_to_stop(str(one)))

    report = run(sweep(sources), listener=listen)
    assert asked == [True]
    assert states(report)["ties-0.5-1.0"] == "stopped"
    assert report.count("done") == 5
    assert report.stopped is None
    status = read_status(str(one))
    assert status["state"] == "stopped"
    assert status["problems"][0]["code"] == "stopped"
    assert 0 < status["units_done"] < status["units"]
    assert "this merge was asked to stop" in read_log(str(one))
    assert {event["event"] for event in read_events(str(one))} >= {"run-begun"}
    assert set(states(run(sweep(sources))).values()) == {"already done", "done"}
    assert read_status(str(one))["state"] == "finished"
    assert not ask_to_stop(str(one))
    kept = json.loads((one / "raymerge-report.json").read_text())
    assert kept["events"]["resumed"] == 1
    assert any("units are kept of an earlier run" in line for line in kept["log"])


def test_a_merge_that_lost_its_lease_says_nothing_more_at_its_output(
    sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed, name in enumerate(("base", "m1", "m2")):
        model(sources / name, seed, tensors=model_tensors(seed, rows=600, cols=512, layers=40, dtype=torch.bfloat16))
    monkeypatch.setattr(bulk_run, "VISIT_SECONDS", 0.0)
    monkeypatch.setattr("merger.run.FLUSH_SECONDS", 0.0)
    one = sources / "out" / "ties-0.5-1.0"
    taken: list[set[str]] = []

    def listen(progress: Any) -> None:
        if not taken and progress.bytes_written:
            for path in (one / ".raymerge").rglob("*"):
                if path.is_file():
                    path.unlink()
            (one / "raymerge.json").write_text("{}")  # of the run that took it over, and is done
            taken.append(set())

    report = run(sweep(sources), listener=listen)
    assert states(report)["ties-0.5-1.0"] == "failed"
    assert report.merges[3].problems[0].code == "lease-lost"
    assert report.count("done") == 5
    assert not [
        name for name in names(one) if name.startswith(".raymerge/") and name.endswith((".txt", ".json", "jsonl"))
    ]


def test_what_failed_says_so_at_its_output(sources: Path) -> None:
    broken(sources)
    run(each(sources))
    told = read_status(str(sources / "out" / "a1"))
    assert told["state"] == "failed"
    assert told["problems"][0]["code"] == "not-finite"
    assert read_status(str(sources / "out" / "nothing"))["state"] == "absent"
