"""The plain loop: which unit may start, what is done, what stops it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from merger import api
from merger.crew import timed
from merger.errors import SourceChangedError, SourceError, StoppedError
from merger.planning.nouns import MergePlan, Unit
from merger.receipts import Receipt
from merger.run import Progression, Recorder, Stop
from merger.unit import UnitRunner
from tests.conformance.folders import model, names


@pytest.fixture
def planned(tmp_path: Path) -> MergePlan:
    """Two rounds of statistics and a map, over three tensors."""
    for seed, name in enumerate(("base", "m1", "m2")):
        model(tmp_path / name, seed)
    entries = [{"model": str(tmp_path / n), "parameters": {"weight": 1.0}} for n in ("m1", "m2")]
    parameters = {"density": 0.5, "scope": "model"}
    return api.plan(
        {"merge_method": "ties", "base_model": str(tmp_path / "base"), "models": entries, "parameters": parameters},
        tmp_path / "out",
    )


def run_units(planned: MergePlan, progression: Progression, count: int) -> list[Receipt]:
    """Do so many units, one after another, into nowhere."""
    runner = UnitRunner(planned, memory=1 << 30)
    made: list[Receipt] = []
    while len(made) < count and (job := progression.take()) is not None:
        (unit,) = job.units
        made.append(runner.run(unit, progression.ledger.findings(unit), lambda *_: None))
        progression.complete(made[-1])
    return made


def test_a_stage_waits_for_the_one_before(planned: MergePlan) -> None:
    assert planned.num_stages == 3
    progression = Progression(planned)
    first: list[Unit] = []
    while (job := progression.take()) is not None:
        first += job.units
    assert {unit.stage for unit in first} == {0}
    assert progression.take() is None
    assert not progression.finished


def test_all_units_are_done_once(planned: MergePlan) -> None:
    progression = Progression(planned)
    made = run_units(planned, progression, 10**6)
    assert progression.finished
    assert sorted(r.unit for r in made) == [u.index for u in progression.units]
    assert progression.take() is None


def test_the_largest_come_first(planned: MergePlan) -> None:
    job = Progression(planned).take()
    assert job is not None
    assert "q_proj" in planned.tasks[job.units[0].task].name


def test_a_unit_that_was_put_back_is_taken_next(planned: MergePlan) -> None:
    progression = Progression(planned)
    job = progression.take()
    assert job is not None
    progression.put_back(job)
    assert progression.take() == job


@pytest.mark.parametrize("done", range(10))
def test_it_goes_on_where_receipts_end(planned: MergePlan, done: int) -> None:
    kept = run_units(planned, Progression(planned), done)
    again = Progression(planned, reversed(kept))
    assert set(again.receipts) == {r.unit for r in kept}
    rest = run_units(planned, again, 10**6)
    assert again.finished
    assert len(kept) + len(rest) == len(again.units)
    whole = Progression(planned)
    run_units(planned, whole, 10**6)
    assert {r.unit: r.extents for r in again.receipts.values()} == {r.unit: r.extents for r in whole.receipts.values()}


def test_receipts_of_no_unit_and_second_receipts_change_nothing(planned: MergePlan) -> None:
    (receipt,) = run_units(planned, Progression(planned), 1)
    progression = Progression(planned, [receipt, Receipt(10**6), Receipt(-1)])
    assert set(progression.receipts) == {receipt.unit}
    progression.complete(receipt)
    progression.complete(receipt)
    assert set(progression.receipts) == {receipt.unit}


def test_what_a_source_refuses_midway_is_a_change(planned: MergePlan, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit 2 would say that nothing was written."""

    def refuse(self: UnitRunner, *arguments: Any) -> Receipt:
        raise SourceError.of("unreadable", "a bad sector", where="m1")

    monkeypatch.setattr(UnitRunner, "run", refuse)
    progression = Progression(planned)
    job = progression.take()
    assert job is not None
    with pytest.raises(SourceChangedError) as caught:
        timed(UnitRunner(planned, memory=1 << 30), job.units[0], (), lambda *_: None)
    assert caught.value.problems[0].code == "unreadable"
    assert "while merging" in caught.value.__notes__[0]


def test_a_stop_keeps_what_is_done(planned: MergePlan, tmp_path: Path) -> None:
    stop = Stop()
    stop.check()

    def listen(progress: Any) -> None:
        if progress.units_done >= 2:
            stop.set(15)

    with pytest.raises(StoppedError) as caught:
        api.run_planned(planned, workers=1, listener=listen, stop=stop)
    assert caught.value.signal_number == 15
    assert names(tmp_path / "out") == set()
    assert api.run_planned(planned).units_resumed >= 2


def test_progress_counts_what_was_kept(planned: MergePlan) -> None:
    kept = run_units(planned, Progression(planned), 2)
    seen: list[Any] = []
    flushed: list[Receipt] = []
    progression = Progression(planned, kept)
    recorder = Recorder(progression, flushed.extend, seen.append)
    for receipt in run_units(planned, Progression(planned, kept), 1):
        recorder.record(receipt)
    assert (seen[-1].units_done, seen[-1].units, seen[-1].stages) == (3, len(progression.units), 3)
    recorder.flush()
    recorder.flush()
    assert len(flushed) == 1
