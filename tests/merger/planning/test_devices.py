"""Which kind of device does what: decided by the plan alone."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from merger import api
from merger.crew import limit_gpu
from merger.errors import PlanError
from merger.planning.devices import check_device, device_bytes, device_of, uses_gpu
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


def test_a_gpu_that_is_too_small_is_named(folder: Path) -> None:
    plan = planned(folder, "spectral", "cuda")
    assert check_device(plan, memory=device_bytes(plan)) == ()
    (problem,) = check_device(plan, memory=device_bytes(plan) - 1)
    assert problem.code == "device-memory"
    assert problem.where.endswith("q_proj.weight")
    assert "--device-memory" in problem.fix
    assert check_device(planned(folder, "elementwise", "cuda"), memory=0) == ()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A GPU of a gigabyte, as far as its size is asked for. Holds the fractions that a process was kept within."""
    kept: list[float] = []
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: SimpleNamespace(total_memory=10**9))
    monkeypatch.setattr("torch.cuda.set_per_process_memory_fraction", kept.append)
    return kept


def test_a_worker_keeps_within_its_part_of_a_gpu(folder: Path, gpu: list[float]) -> None:
    plan = planned(folder, "spectral", "cuda")
    assert limit_gpu(plan, device_memory=None) == 10**9
    assert gpu == []  # all of it
    assert limit_gpu(plan, device_memory=None, share=0.25, threads=2) == 125 * 10**6
    assert limit_gpu(plan, device_memory=10**8, share=0.25) == 10**8
    assert limit_gpu(plan, device_memory=10**12) == 10**9
    assert gpu == [0.25, 0.1]
    with pytest.raises(PlanError):
        limit_gpu(plan, device_memory=device_bytes(plan) - 1)


def test_what_does_not_fit_is_refused_before_anything_is_written(folder: Path, tmp_path: Path) -> None:
    models = [{"model": str(folder / name), "parameters": {"weight": 1.0}} for name in ("m1", "m2")]
    document = {"merge_method": "tsv_m", "base_model": str(folder / "base"), "models": models}
    with pytest.raises(PlanError) as caught:
        api.merge(document, tmp_path / "out", workers=2, device="cuda", device_memory=100_000)
    assert caught.value.problems[0].code == "device-memory"
    assert "50.0 KB" in caught.value.problems[0].what  # two threads share it
    assert not (tmp_path / "out").exists()
