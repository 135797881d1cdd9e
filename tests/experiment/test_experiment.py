"""The experiment's data are frozen, its page says what its results say, and its arithmetic can be trusted.

`make experiment` itself takes most of an hour and is run by hand.
"""

from __future__ import annotations

import hashlib
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from merger.manifest import load_manifest
from merger.methods import COMBINATION_TYPES, METHODS
from tests.experiment.measure import all_jobs, climb, digest, manifest_of, merged_deltas, norm
from tests.experiment.rows import FLIPPED, ROTATED, ROWS, SAME, SCALES, Row
from tests.experiment.tables import RESULTS, Resamples, Results, interval, read_results, with_tables, write_results
from tests.experiment.tasks import ARMS, SEEDS, TASKS, TEST, TRAIN, TRAININGS, VALIDATION

TRAINED = Path(__file__).parent / "trained"
PAGE = Path(__file__).parents[2] / "merger" / "methods" / "README.md"
NOT_FOR_FIVE = {"slerp", "nearswap", "nuslerp", "arcee_fusion", "passthrough"}
WITH_DATA = {"fisher", "regmean"}
"""Statistics of the tasks' data go in: a comparison of another kind."""


@pytest.fixture(scope="module")
def results() -> Results:
    return Results(read_results())


def test_the_page_says_what_the_results_say(results: Results) -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page == with_tables(page, results), "python -m tests.experiment --tables"


def test_every_measurement_is_one_that_the_experiment_makes() -> None:
    found = {(x["arm"], x["seed"], x["row"]) for x in read_results() if x["what"] in {"merge", "same"}}
    assert found <= {job.key for job in all_jobs()}


def test_every_method_that_merges_five_adapters_takes_part() -> None:
    rows = [*ROWS, *(row for row, _ in SAME)]
    assert {row.manifest["merge_method"] for row in rows if "merge_method" in row.manifest} == (
        set(METHODS) - NOT_FOR_FIVE - WITH_DATA - {"svd"}
    )
    types = {row.manifest["combination_type"] for row in rows if "combination_type" in row.manifest}
    assert types == set(COMBINATION_TYPES) - {"cat"}  # task_arithmetic, stored


@pytest.mark.parametrize("row", [*ROWS, FLIPPED, *ROTATED, *(row for row, _ in SAME)], ids=lambda row: row.name)
def test_every_row_is_a_manifest_that_is_understood(row: Row) -> None:
    load_manifest(manifest_of(row, [Path(f"/adapter{i}") for i in range(5)], Path("/base")))


@pytest.mark.parametrize(
    "name",
    [
        "tsv_m",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("task_arithmetic", "ties density 0.2", "knots_ties")),
    ],
)
def test_the_committed_adapters_merge_to_what_was_measured(name: str, results: Results, tmp_path: Path) -> None:
    sources = [TRAINED / "seed0" / source for source in ARMS["distinct"].sources]
    factors = load_file(sources[0] / "adapter_model.safetensors")
    zeros = {
        a.removeprefix("base_model.model.").replace(".lora_A.", "."): torch.zeros(len(factors[b]), factors[a].shape[1])
        for a, b in ((name, name.replace(".lora_A.", ".lora_B.")) for name in factors if ".lora_A." in name)
    }
    save_file(zeros, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 30}', encoding="utf-8")
    (row,) = (row for row in ROWS if row.name == name)
    merged = norm(merged_deltas(row, sources, tmp_path, zeros))
    assert merged == pytest.approx(results.merges["distinct", name, 0]["norm"], rel=1e-4)


def test_the_committed_adapters_are_the_ones_that_were_measured() -> None:
    digests = {(x["seed"], x["name"]): x["sha256"] for x in read_results() if x["what"] == "adapter"}
    assert set(digests) == {(seed, name) for seed in SEEDS for name in TRAININGS}
    for source in ARMS["distinct"].sources:
        assert digest(TRAINED / "seed0" / source) == digests[0, source]


def test_an_adapter_is_the_best_at_its_own_task_and_the_base_knows_none(results: Results) -> None:
    for name, training in TRAININGS.items():
        own = results.loss["single", f"adapter {name}", "default", training.task].mean()
        assert own < results.loss["single", "base", "default", training.task].mean() / 4
        assert results.right["single", f"adapter {name}", "default", training.task].mean() > 0.4
    for task in TASKS:
        assert results.right["single", "base", "default", task].mean() < 0.1


def test_a_rotation_of_the_factors_changes_what_is_merged_factor_by_factor_and_nothing_else(results: Results) -> None:
    for row in ROTATED:
        assert results.measured("distinct", row.name)
        by_factors = row.name.startswith(("PEFT linear", "PEFT ties"))
        for seed in (0, 1, 2):
            changed = results.merges["distinct", row.name, seed]["rotation"]
            assert changed > 0.1 if by_factors else changed < 1e-3, row.name  # an election may turn at a sum of 0


def test_a_negated_adapter_loses_its_task(results: Results) -> None:
    flipped = results.loss["distinct", FLIPPED.name, "default", "date"].mean()
    assert flipped > results.loss["single", "base", "default", "date"].mean()


def test_methods_that_are_others_at_their_defaults_are(results: Results) -> None:
    for line in results.same:
        assert max(line["distance"].values()) < 1e-4


@pytest.mark.parametrize("name", TASKS)
def test_held_out_items_are_not_trained_on_by_any_subset(name: str) -> None:
    trainings = [t for t in TRAININGS.values() if t.task == name]
    trained = [e.prompt for t in trainings for e in t.examples()]
    assert len(trained) == len(set(trained)) == TRAIN * len(trainings)
    held_out = {e.prompt for e in TASKS[name].held_out(VALIDATION + TEST)}
    assert not held_out & set(trained)
    assert len(held_out) == VALIDATION + TEST


def test_the_data_are_frozen() -> None:
    text = repr([(task.train(TRAIN), task.held_out(VALIDATION + TEST)) for task in TASKS.values()])
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "4b8d8064e3da319d"


def test_the_pair_conflicts_on_every_prompt() -> None:
    for seed in range(20):
        rng = [random.Random(seed), random.Random(seed)]
        asked, swapped = (TASKS[name].draw(r, True) for name, r in zip(("queue", "swapped"), rng, strict=True))
        assert asked.prompt == swapped.prompt
        assert asked.answer != swapped.answer


def test_every_arm_has_five_sources_and_asks_for_each_task_once() -> None:
    for arm in ARMS.values():
        assert len(arm.sources) == 5
        assert len(set(arm.tasks)) == len(arm.tasks)


def test_climbing_finds_the_top_of_the_grid() -> None:
    for top in SCALES:
        peak = {scale: (-abs(math.log(scale / top)), 0.0) for scale in SCALES}
        assert climb(peak.__getitem__) == top
    assert climb(lambda _: (0.0, 0.0)) == 1.0


def test_resamples_are_means_and_cover_what_they_should() -> None:
    draws = Resamples.draw(500)
    values = np.random.default_rng(1).random((3, TEST))
    found = draws.mean(values, "date")
    assert found[0] == pytest.approx(values.mean())
    by_hand = sum(
        seed * item * value
        for seed, row in zip(draws.seeds_RS[7], values, strict=True)
        for item, value in zip(draws.items_Rn["date"][7], row, strict=True)
    )
    assert found[7] == pytest.approx(by_hand)
    drawn = interval(found)
    assert drawn.low < drawn.mean < drawn.high
    ones = interval(draws.mean(np.ones((3, TEST)), "date"))
    assert (ones.low, ones.mean, ones.high) == pytest.approx((1.0, 1.0, 1.0))


def test_results_are_small_and_written_the_same_every_time(tmp_path: Path) -> None:
    assert RESULTS.stat().st_size < 3e6
    write_results(read_results(), tmp_path / "again.gz")
    assert read_results(tmp_path / "again.gz") == read_results()
    write_results(read_results(), tmp_path / "twice.gz")
    assert (tmp_path / "again.gz").read_bytes() == (tmp_path / "twice.gz").read_bytes()
