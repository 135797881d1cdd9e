"""One plan, run in any way that there is, gives one output: threads, actors, any memory, any order."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from merger import api
from merger.crew import Job
from merger.planning.nouns import MergePlan
from merger.run import Progression
from merger.verify import verify_output
from tests.conformance.folders import adapter, content_digest, model, model_tensors

MB = 10**6
CASES = ("adapters", "fold", "ties", "ties-model", "slerp", "dare")
RUNS = [(1, 64 * MB), (2, 64 * MB), (5, 64 * MB), (1, 4000 * MB), (5, 4000 * MB)]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    for seed, rank in ((1, 4), (2, 8), (3, 4)):
        adapter(folder / f"a{seed}", seed, rank=rank, rows=300, cols=200)
        adapter(folder / f"f{seed}", seed, rank=rank, rows=1500, cols=512)
        model(folder / f"m{seed}", seed, rows=1500, cols=512)
    model(folder / "base", 0, rows=1500, cols=512)
    return folder


def document(case: str, sources: Path) -> dict[str, object]:
    if case in ("adapters", "fold"):
        stem = "a" if case == "adapters" else "f"
        entries = [
            {"adapter": str(sources / f"{stem}{n}"), "parameters": {"weight": w}} for n, w in ((1, 2.0), (2, 1.0))
        ]
        if case == "adapters":
            return {
                "merge_method": "ties", "adapters": entries, "parameters": {"density": 0.2},
                "output": {"store": {"svd": {"rank": 8}}},
            }  # fmt: skip
        return {"adapters": entries, "base_model": str(sources / "base"), "output": {"kind": "model"}}
    if case == "slerp":
        return {
            "merge_method": "slerp", "base_model": str(sources / "base"), "parameters": {"t": 0.3},
            "models": [{"model": str(sources / "m1")}],
        }  # fmt: skip
    parameters: dict[str, object] = {"density": 0.3, **({"scope": "model"} if case == "ties-model" else {})}
    return {
        "merge_method": "dare_ties" if case == "dare" else "ties", "base_model": str(sources / "base"),
        "models": [{"model": str(sources / f"m{n}"), "parameters": {"weight": 1.0 / n}} for n in (1, 2, 3)],
        "parameters": parameters,
    }  # fmt: skip


@pytest.fixture(scope="module")
def digests(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """The digest of a case, run once on one thread."""
    known: dict[str, str] = {}

    def of(case: str) -> str:
        if case not in known:
            out = tmp_path_factory.mktemp(case) / "out"
            report = api.merge(document(case, sources), out, workers=1, memory=1000 * MB)
            assert report.content_digest == content_digest(out)
            known[case] = report.content_digest
        return known[case]

    return of


@pytest.mark.parametrize("case", CASES)
def test_workers_and_memory_change_no_byte(
    case: str, sources: Path, digests: Callable[[str], str], tmp_path: Path
) -> None:
    for workers, memory in RUNS:
        out = tmp_path / f"{workers}-{memory}"
        report = api.merge(document(case, sources), out, workers=workers, memory=memory)
        assert report.content_digest == digests(case), (workers, memory)
        assert not (out / ".raymerge").exists()


@pytest.mark.parametrize("case", CASES)
def test_the_order_of_units_changes_no_byte(
    case: str, sources: Path, digests: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shuffle = random.Random(7)
    take = Progression.take

    def any_of(self: Progression) -> Job | None:
        ready = list(self._ready)
        shuffle.shuffle(ready)
        self._ready.clear()
        self._ready.extend(ready)
        return take(self)

    monkeypatch.setattr(Progression, "take", any_of)
    report = api.merge(document(case, sources), tmp_path / "out", workers=3, memory=200 * MB)
    assert report.content_digest == digests(case)


@pytest.mark.parametrize("case", CASES)
def test_every_extent_can_be_merged_again_by_itself(case: str, sources: Path, tmp_path: Path) -> None:
    api.merge(document(case, sources), tmp_path / "out", workers=2)
    found = verify_output(str(tmp_path / "out"), replay=None)
    assert found.replayed
    assert found.content_digest == content_digest(tmp_path / "out")


def test_the_plan_knows_no_workers_and_no_place(sources: Path, tmp_path: Path) -> None:
    plans = [api.plan(document("ties", sources), tmp_path / name) for name in ("x", "y")]
    assert plans[0].digest == plans[1].digest


# ---- Ray -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def private_ray() -> Iterator[None]:
    from cluster.connect import connection

    with connection("private", workers=5):
        yield


def on_ray(planned: MergePlan, workers: int, memory: int) -> Any:
    from cluster.run import run_on_ray

    return api.run_planned(planned, workers=workers, memory=memory, runner=run_on_ray)


@pytest.mark.ray
@pytest.mark.usefixtures("private_ray")
@pytest.mark.parametrize(
    "case, workers",
    [
        ("ties-model", 1),
        ("ties-model", 5),
        ("adapters", 2),
        ("fold", 2),
        *(
            pytest.param(case, workers, marks=pytest.mark.slow)
            for case in CASES
            for workers in (1, 2, 5)
            if (case, workers) not in {("ties-model", 1), ("ties-model", 5), ("adapters", 2), ("fold", 2)}
        ),
    ],
)
def test_actors_give_the_same_bytes(
    case: str, workers: int, sources: Path, digests: Callable[[str], str], tmp_path: Path
) -> None:
    memory = 64 * MB if workers > 1 else 4000 * MB
    report = on_ray(api.plan(document(case, sources), tmp_path / "out"), workers, memory)
    assert report.content_digest == digests(case)
    assert not (tmp_path / "out" / ".raymerge").exists()


@pytest.mark.ray
@pytest.mark.usefixtures("private_ray")
def test_actors_share_the_memory_that_is_allowed(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--memory is for all workers together, on Ray as here."""
    from cluster.actors import Mission

    shares: list[int] = []

    def look(*arguments: Any, **more: Any) -> Mission:
        mission = Mission(*arguments, **more)
        shares.append(mission.memory * mission.lanes)
        return mission

    monkeypatch.setattr("cluster.run.Mission", look)
    on_ray(api.plan(document("slerp", sources), tmp_path / "out"), 2, 400 * MB)
    assert shares == [200 * MB]


@pytest.mark.ray
@pytest.mark.usefixtures("private_ray")
def test_an_actors_error_arrives_as_itself(tmp_path: Path) -> None:
    """A source with a NaN: the same error, with its unit, as in one process."""
    from merger.errors import MergeFailedError

    for name in ("base", "m"):
        tensors = model_tensors(9)
        if name == "m":
            tensors["model.norm.weight"][3] = float("nan")
        model(tmp_path / name, 9, tensors=tensors)
    wanted = {
        "merge_method": "task_arithmetic", "base_model": str(tmp_path / "base"),
        "models": [{"model": str(tmp_path / "m"), "parameters": {"weight": 1}}],
    }  # fmt: skip
    with pytest.raises(MergeFailedError) as caught:
        on_ray(api.plan(wanted, tmp_path / "out"), 1, 1000 * MB)
    assert caught.value.problems[0].code == "not-finite"
    assert any("while merging model.norm.weight" in note for note in caught.value.__notes__)
    left = {p.name for p in (tmp_path / "out").iterdir()}
    assert left == {".raymerge"}


@pytest.mark.ray
@pytest.mark.usefixtures("private_ray")
def test_a_source_that_changes_after_it_was_planned(sources: Path, tmp_path: Path) -> None:
    from merger.errors import SourceChangedError

    model(tmp_path / "m", 9, rows=1500, cols=512)
    wanted = {**document("ties", sources), "models": [{"model": str(tmp_path / "m"), "parameters": {"weight": 1}}]}
    planned = api.plan(wanted, tmp_path / "out")
    model(tmp_path / "m", 10, rows=1500, cols=512)
    with pytest.raises(SourceChangedError) as caught:
        on_ray(planned, 1, 1000 * MB)
    assert caught.value.problems[0].code == "source-changed"
    left = {p.name for p in (tmp_path / "out").iterdir()}
    assert left == {".raymerge"}
