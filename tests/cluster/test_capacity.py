"""What workers need against what nodes have and may have: a pure comparison."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.capacity import Growth, Need, NodeKind, Resources, assess, notice, room, split_workers
from cluster.survey import read_status

GB = 10**9
SMALL: Resources = {"CPU": 2.0, "memory": 4.0 * GB}
HEAD: Resources = {"memory": 16.0 * GB}
GPUS: Resources = {"CPU": 8.0, "memory": 64.0 * GB, "GPU": 2.0}
ELASTIC = Growth(elastic=True)
WORKER = {"CPU": 1.0, "memory": 1.0 * GB}


def test_room_is_what_the_scarcest_resource_allows() -> None:
    assert room(SMALL, WORKER) == 2
    assert room(SMALL, {"CPU": 0.5, "memory": 1.5 * GB}) == 2
    assert room(GPUS, {"CPU": 1, "GPU": 0.25}) == 8
    assert room(GPUS, {"CPU": 1, "GPU": 0.25, "scratch": 1}) == 0
    assert room({"CPU": 0.3}, {"CPU": 0.1}) == 3  # as Ray counts, not as floats divide


@pytest.mark.parametrize(
    "need,nodes,growth,kind,now",
    [
        (Need(4, WORKER), [SMALL, SMALL], Growth(), "fits", 4),
        (Need(5, WORKER), [SMALL, SMALL], Growth(), "partly", 4),
        (Need(5, WORKER), [SMALL, SMALL], ELASTIC, "partly", 4),
        (Need(1, WORKER), [HEAD], Growth(), "never", 0),
        (Need(1, WORKER), [], Growth(), "never", 0),
        (Need(1, WORKER), [HEAD], ELASTIC, "later", 0),
        (Need(1, WORKER), [HEAD], Growth(elastic=None), "later", 0),
        (Need(1, {**WORKER, "GPU": 1}), [SMALL], Growth(), "never", 0),
        (Need(1, {**WORKER, "GPU": 1}), [SMALL], Growth(True, (NodeKind(GPUS, 4),)), "later", 0),
        (Need(1, {**WORKER, "GPU": 1}), [SMALL], Growth(True, (NodeKind(GPUS, None),)), "later", 0),
        (Need(1, {**WORKER, "GPU": 1}), [SMALL], Growth(True, (NodeKind(GPUS, 0),)), "never", 0),
        (Need(1, {**WORKER, "GPU": 1}), [HEAD], Growth(True, (NodeKind(SMALL, 9),)), "never", 0),
        (Need(1, {**WORKER, "GPU": 1}), [HEAD], Growth(True, hopeless=({**WORKER, "GPU": 1.0},)), "never", 0),
        (Need(1, {**WORKER, "GPU": 1}), [HEAD], Growth(True, hopeless=({"CPU": 64.0},)), "later", 0),
        (Need(2, {"CPU": 1, "scratch": 1}), [{"CPU": 4, "scratch": 1}], Growth(), "partly", 1),
    ],
)  # fmt: skip
def test_verdicts(need: Need, nodes: list[Resources], growth: Growth, kind: str, now: int) -> None:
    verdict = assess(need, nodes, growth)
    assert (verdict.kind, verdict.now) == (kind, now)
    assert bool(verdict.lacks) == (kind in ("later", "never"))
    assert bool(verdict.fix) == (kind in ("later", "never"))
    assert bool(notice(need, verdict, 120)) == (kind in ("partly", "later"))


@given(
    st.lists(st.fixed_dictionaries({"CPU": st.integers(0, 8), "memory": st.integers(0, 8)}), max_size=5),
    st.integers(1, 9), st.integers(1, 3), st.integers(1, 3),
)  # fmt: skip
def test_workers_that_fit_can_be_placed_and_one_more_cannot(
    nodes: list[Any], workers: int, cpus: int, memory: int
) -> None:
    """Against a placement that puts workers one by one."""
    each = {"CPU": cpus, "memory": memory}
    left = [dict(node) for node in nodes]
    placed = 0
    for node in left:
        while all(node[name] >= amount for name, amount in each.items()):
            for name, amount in each.items():
                node[name] -= amount
            placed += 1
    verdict = assess(Need(workers, each), nodes, Growth())
    assert verdict.now == placed
    assert (verdict.kind == "fits") == (placed >= workers)
    assert (verdict.kind == "never") == (placed == 0)


def test_sentences_name_the_need_the_largest_node_and_what_to_do() -> None:
    big = Need(3, {"CPU": 1, "memory": 32.0 * GB})
    verdict = assess(big, [SMALL, HEAD], ELASTIC)
    assert verdict.lacks == "no node has 32.0 GB of memory; the most is 16.0 GB of memory"
    assert "--memory" in verdict.fix
    assert notice(big, verdict, 120).endswith("waiting up to 120 s for one that has")
    assert str(big) == "3 workers of 1 CPU, 32.0 GB of memory"
    gpu = assess(Need(1, {"CPU": 1, "GPU": 1}), [{"CPU": 8, "GPU": 0.5}], Growth())
    assert gpu.lacks == "no node has 1 GPU; the most is 0.5 GPU"
    assert "--gpus-per-worker" in gpu.fix
    assert "--device cpu" in assess(Need(1, {"CPU": 1, "GPU": 1}), [SMALL], Growth()).fix
    some = assess(Need(5, WORKER), [SMALL], Growth(elastic=True, coming=2))
    assert notice(Need(5, WORKER), some, 9) == (
        "the cluster has room for 2 of 5 workers of 1 CPU, 1.0 GB of memory: the run goes on with these; 2 more nodes "
        "are on their way"
    )


def test_an_autoscaler_that_only_reports_is_none() -> None:
    """The status that Ray keeps of a cluster that nothing scales, and of one that something does."""
    static = {"autoscaler_report": {"node_type_mapping": {"f6c4": "node_f6c4"}, "pending_launches": {}}}
    assert read_status(static) == Growth(elastic=False)
    scaled = {
        "autoscaler_report": {
            "node_type_mapping": {"ffff": "ray.head.default"}, "pending_launches": {"small": 1},
            "pending_nodes": [["10.0.0.2", "small", "setting up"]],
        }
    }  # fmt: skip
    assert read_status(scaled) == Growth(elastic=True, coming=2)
    assert read_status({"load_metrics_report": {}}) == Growth(elastic=None)


@pytest.mark.parametrize(
    "workers,gpu_units,cpu_units,gpu_places,expected",
    [
        (8, 0, 100, 4, {"cpu": 8}),  # elementwise work asks for no GPU
        (8, 100, 0, 4, {"cuda": 8}),
        (1, 100, 100, 4, {"cuda": 1}),
        (8, 100, 100, 2, {"cuda": 2, "cpu": 6}),
        (8, 100, 100, 64, {"cuda": 7, "cpu": 1}),
        (8, 3, 100, 64, {"cuda": 3, "cpu": 5}),
        (8, 100, 100, 0, {"cuda": 4, "cpu": 4}),  # an autoscaled cluster that has no node yet
        (2, 1, 1, 0, {"cuda": 1, "cpu": 1}),
    ],
)
def test_workers_with_and_without_gpus(
    workers: int, gpu_units: int, cpu_units: int, gpu_places: int, expected: dict[str, int]
) -> None:
    found = split_workers(workers, gpu_units=gpu_units, cpu_units=cpu_units, gpu_places=gpu_places)
    assert found == expected
    assert sum(found.values()) == workers
