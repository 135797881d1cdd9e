"""Which kind of device does what: decided by the plan alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from merger import api
from merger.planning.devices import device_bytes, device_of, uses_gpu
from merger.planning.memory import whole_task_bytes
from merger.planning.nouns import MergePlan, Unit
from merger.receipts import Receipt
from merger.run import Part, Progression
from tests.conformance.folders import model

MERGES: dict[str, tuple[dict[str, Any], set[str]]] = {
    "elementwise": ({"merge_method": "ties", "parameters": {"density": 0.5}}, {"cpu"}),
    "spectral": ({"merge_method": "tsv_m"}, {"cpu", "cuda"}),
    "extract": (
        {"merge_method": "task_arithmetic",
         "output": {"kind": "adapter", "modules_to_save": "all", "store": {"svd": {"rank": 4}}}},
        {"cpu", "cuda"},
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("devices")
    for seed, name in enumerate(("base", "m1", "m2")):
        model(folder / name, seed, layers=3)
    return folder


def planned(folder: Path, case: str, device: Any) -> MergePlan:
    models = [{"model": str(folder / name), "parameters": {"weight": 1.0}} for name in ("m1", "m2")]
    plan = api.plan({**MERGES[case][0], "base_model": str(folder / "base"), "models": models}, device=device)
    assert not plan.problems
    return plan


@pytest.mark.parametrize("case", MERGES)
def test_only_dense_spectral_work_goes_to_gpus(folder: Path, case: str) -> None:
    plan = planned(folder, case, "cuda")
    kinds = {task.name: device_of(plan, task) for task in plan.tasks}
    assert set(kinds.values()) == MERGES[case][1]
    assert all(("proj" in name) == (kind == "cuda") for name, kind in kinds.items() if case != "elementwise")
    assert uses_gpu(plan) == (case != "elementwise")
    spectral = [whole_task_bytes(plan, task) for task in plan.tasks if kinds[task.name] == "cuda"]
    assert device_bytes(plan) == max(spectral, default=0)


@pytest.mark.parametrize("case", MERGES)
def test_a_plan_for_cpus_asks_for_none(folder: Path, case: str) -> None:
    plan = planned(folder, case, "cpu")
    assert not uses_gpu(plan)
    assert {device_of(plan, task) for task in plan.tasks} == {"cpu"}
    assert device_bytes(plan) == 0


@pytest.mark.parametrize("case", MERGES)
def test_two_kinds_of_workers_share_the_jobs(folder: Path, case: str) -> None:
    """Each takes its own, none is left, and a job that comes back goes to the same kind."""
    plan = planned(folder, case, "cuda")
    whole = Progression(plan)
    parts = {kind: Part(whole, kind) for kind in ("cuda", "cpu")}
    assert sum(part.num_left for part in parts.values()) == len(plan.units)
    taken: dict[str, list[int]] = {"cuda": [], "cpu": []}
    while not whole.finished:
        before = sum(map(len, taken.values()))
        for kind, part in parts.items():
            job = part.take()
            if job is None:
                continue
            part.put_back(job)
            again = part.take()
            assert again == job
            for unit in job.units:
                assert whole.device_of(unit) == kind
                taken[kind].append(unit.index)
                whole.complete(Receipt(unit.index))
        assert sum(map(len, taken.values())) > before
    assert sorted(taken["cuda"] + taken["cpu"]) == [unit.index for unit in plan.units]
    assert all(part.finished and part.num_left == 0 for part in parts.values())


def test_one_kind_of_workers_takes_all(folder: Path) -> None:
    plan = planned(folder, "spectral", "cuda")
    whole = Progression(plan)
    taken: list[Unit] = []
    while (job := whole.take()) is not None:
        taken += job.units
    assert len(taken) == len(plan.units)
    assert whole.device_of(taken[0]) == "cuda"  # the long ones first
