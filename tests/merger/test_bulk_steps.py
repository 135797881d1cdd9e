"""Merges of several steps in a bulk: documents, ranks that follow from the data, gates of experts; beside others."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from merger import api
from merger.bulk import load_bulk, plan_bulk
from merger.bulk_report import BulkReport
from merger.errors import MergeFailedError
from merger.journal import INTERMEDIATES
from merger.planning.nouns import MergePlan
from merger.run import Stop
from merger.run_files import read_log, read_status
from merger.session import Session
from tests.conformance.bulks import broken, bulk_sources, everything, run, several, states, ties
from tests.conformance.folders import content_digest, names
from tests.conformance.llamas import llama


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    return bulk_sources(tmp_path)


def check(folder: Path, report: BulkReport) -> None:
    """Each output is what its merge alone makes, and nothing else is there."""
    for merge in load_bulk(everything(folder)).merges:
        alone = api.merge(merge.manifest, folder / "alone" / merge.label)
        assert content_digest(folder / "out" / merge.label) == alone.content_digest, merge.label
        assert names(folder / "out" / merge.label) == names(folder / "alone" / merge.label)
        assert not (folder / "out" / merge.label / ".raymerge").exists()
    for made in report.merges:
        assert made.report is not None


@pytest.mark.parametrize("workers", [1, 3])
def test_each_is_what_it_is_alone(sources: Path, workers: int) -> None:
    report = run(everything(sources), workers=workers)
    assert set(states(report).values()) == {"done"}, report.lines()
    check(sources, report)
    again = run(everything(sources))
    assert set(states(again).values()) == {"already done"}


def test_the_others_go_on_meanwhile(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two at once: the fold and the ties end while steps of the others are still to come."""
    begun: list[str] = []
    start = Session.take

    def taken(session: Session) -> None:
        begun.append(session.planned.outputs[0].path)
        start(session)

    monkeypatch.setattr(Session, "take", taken)
    report = run(everything(sources, max_active_merges=2))
    assert report.count("done") == 4
    order = [Path(path).name for path in begun]
    assert order.index("mixed") < order.index("documents")
    assert INTERMEDIATES in begun[order.index("mixed")]
    check(sources, report)


def stopped_after(sources: Path, units: int) -> BulkReport:
    """Run with one thread until so many bytes-writing steps were seen, then stop."""
    stop = Stop()
    seen = 0
    record = Session.record

    def recorded(session: Session, receipts: Any) -> None:
        nonlocal seen
        found = list(receipts)
        record(session, found)
        seen += len(found)
        if seen >= units:
            stop.set(15)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("merger.run.FLUSH_SECONDS", 0.0)
        patch.setattr(Session, "record", recorded)
        return run(everything(sources), workers=1, stop=stop)


@pytest.mark.parametrize("units", [1, 3, 6, 10])
def test_it_is_stopped_anywhere_and_resumed(sources: Path, units: int) -> None:
    first = stopped_after(sources, units)
    assert first.stopped is not None
    assert first.count("stopped") > 0
    for merge in first.merges:
        lease = Path(merge.path) / ".raymerge" / "lease"
        assert not lease.exists() or not list(lease.iterdir())
    report = run(everything(sources))
    assert report.count("done") + report.count("already done") == 4, report.lines()
    check(sources, report)


def test_one_that_fails_ends_alone(sources: Path) -> None:
    """A number that is none in what a document reads: its merge fails, at that step, and can be seen to have."""
    broken(sources)  # the adapter a1
    report = run(everything(sources))
    assert states(report) == {"ranks": "failed", "fold": "done", "documents": "done", "ties": "done"}
    assert report.merges[0].problems[0].code == "not-finite"
    assert not (sources / "out" / "ranks" / "raymerge.json").exists()


def test_a_place_that_is_taken_is_refused_before_any_step(sources: Path) -> None:
    for name in ("documents", "ranks"):
        (sources / "out" / name).mkdir(parents=True)
        (sources / "out" / name / "notes.txt").write_text("mine")
    report = run(everything(sources))
    assert states(report) == {"ranks": "failed", "fold": "done", "documents": "failed", "ties": "done"}
    for merge in (report.merges[0], report.merges[2]):
        assert merge.problems[0].code == "output-exists"
    for name in ("documents", "ranks"):
        assert [path.name for path in (sources / "out" / name).iterdir()] == ["notes.txt"]


def test_what_another_merge_left_there_says_what_it_said(sources: Path) -> None:
    """Its log and how far it was, of an output that a merge of several steps does not get."""
    out = sources / "out" / "documents"

    def fail(progress: Any) -> None:
        if progress.units_done:
            raise MergeFailedError.of("odd", "the disk is on fire")

    with pytest.raises(MergeFailedError):
        api.merge(ties(sources), out, listener=fail)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert any(path.name == "log.txt" for path in before)
    assert states(run(everything(sources)))["documents"] == "failed"
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_one_that_fails_says_why_where_it_failed(sources: Path) -> None:
    broken(sources)
    run(everything(sources))
    told = read_status(str(sources / "out" / "ranks"))
    assert told["state"] == "failed"
    assert told["problems"][0]["code"] == "not-finite"
    assert "begun on" in read_log(str(sources / "out" / "ranks"))


def test_an_entry_may_be_a_file_of_several_documents(sources: Path) -> None:
    documents = [
        {"name": "mixed", **ties(sources), "dtype": "bfloat16"},
        {k: v for k, v in several(sources).items() if k != "documents"},
    ]
    text = "\n---\n".join(json.dumps(document) for document in documents)
    (sources / "several.yaml").write_text(text)
    bulk = {
        "merges": [{"name": "one", "manifest": str(sources / "several.yaml")}],
        "defaults": {"output": {"path": str(sources / "out" / "{name}")}},
    }
    report = run(bulk)
    assert states(report) == {"one": "done"}, report.lines()
    alone = api.merge(sources / "several.yaml", sources / "alone")
    assert content_digest(sources / "out" / "one") == alone.content_digest


def test_a_plan_says_what_each_will_do(sources: Path) -> None:
    planned = plan_bulk(load_bulk(everything(sources)))
    assert planned.problems == ()
    assert len(planned.sweeps) == 4
    assert len(list(planned.every_plan())) == 5


def experts(folder: Path) -> dict[str, Any]:
    """Two mixtures of two experts: gates from embeddings, and from hidden states."""
    for seed, name in enumerate(("base", "a", "b")):
        llama(folder / name, seed)
    entries = [
        {"source_model": str(folder / name), "positive_prompts": [prompt]}
        for name, prompt in (("a", "w3"), ("b", "w5"))
    ]
    merges = [
        {"name": mode, "base_model": str(folder / "base"), "gate_mode": mode, "experts": entries}
        for mode in ("cheap_embed", "hidden")
    ]
    return {"merges": merges, "defaults": {"output": {"path": str(folder / "out" / "{name}")}}}


def forward(plan: MergePlan, groups: Sequence[Sequence[tuple[int, ...]]]) -> npt.NDArray[np.float32]:
    """In the place of a model's: something of its own for each prompt, layer and number."""
    assert plan.gates is not None
    width = plan.sources[plan.gates.base].stored(plan.gates.embedding).spec.cols
    shape = (len(groups), len(plan.gates.gates), width)
    return np.random.default_rng(sum(groups[0][0])).standard_normal(shape, np.float32)


def test_gates_of_experts_are_made_first(tmp_path: Path) -> None:
    report = run(experts(tmp_path), hidden=forward)
    assert set(states(report).values()) == {"done"}, report.lines()
    for merge in load_bulk(experts(tmp_path)).merges:
        alone = api.merge(merge.manifest, tmp_path / "alone" / merge.label, hidden=forward)
        assert content_digest(tmp_path / "out" / merge.label) == alone.content_digest


def test_gates_that_nobody_makes_are_refused_and_the_others_go_on(tmp_path: Path) -> None:
    report = run(experts(tmp_path))
    assert states(report) == {"cheap_embed": "done", "hidden": "failed"}
    assert report.merges[1].problems[0].code == "needs-forward-pass"
    assert not (tmp_path / "out" / "hidden").exists()
