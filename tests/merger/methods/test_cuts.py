"""Law 2: no cut, memory or number of workers changes a bit; only tiles are part of the arithmetic."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from merger import api
from merger.planning.nouns import MergePlan

METHODS: dict[str, dict[str, Any]] = {
    "linear": {},
    "task_arithmetic": {"lambda": 0.7},
    "ties": {"density": 0.3},
    "ties-l1": {"density": 0.3, "rescale": "l1"},
    "ties-model": {"density": 0.3, "scope": "model"},
    "dare_linear": {"density": 0.4},
    "dare_ties": {"density": 0.4, "rescale": "inverse"},
    "magnitude_prune": {"density": 0.2},
    "slerp": {"t": 0.3},
}
SUMMING = ("ties-l1", "dare_linear", "slerp")
"""Methods with float sums, whose partials belong to units: another cut is another plan, right to float64's rounding."""


@pytest.fixture
def manifest(tools: ModuleType, place: Any, request: pytest.FixtureRequest) -> Mapping[str, Any]:
    """Three models of dense tensors, with many equal magnitudes in one of them."""
    g = np.random.default_rng(4)

    def make(seed: int) -> str:
        return str(
            place.model(
                {
                    "model.layers.0.w": g.standard_normal((500, 300)),
                    "model.layers.1.w": g.integers(-3, 4, (700, 130)) / 4,
                    "model.norm": g.standard_normal(257),
                }
            )
        )

    name: str = request.param
    base, a, b = make(0), make(1), make(2)
    if name == "slerp":
        return {"merge_method": "slerp", "base_model": base, "models": [{"model": a}], "parameters": METHODS[name]}
    method = name.partition("-")[0]
    document = tools.models(
        method, None if method == "linear" else base, [a, b], [{"weight": 0.8}, {"weight": -0.3}], METHODS[name]
    )
    assert isinstance(document, dict)
    return document


def outcome(tools: ModuleType, place: Any, plan: MergePlan, **options: Any) -> dict[str, bytes]:
    out = place.out()
    tools.run(tools.at(plan, out), **options)
    found = tools.read_bytes(out)
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("manifest", METHODS, indirect=True)
def test_memory_and_workers_change_nothing(tools: ModuleType, place: Any, manifest: Mapping[str, Any]) -> None:
    plan = tools.recut(api.plan(manifest, place.out()), tile_rows=16, extent_rows=4)
    whole = outcome(tools, place, plan)
    for memory, workers in ((0, 1), (0, 3), (3 << 20, 1), (5 << 20, 2), (1 << 30, 5)):
        found = outcome(tools, place, plan, memory=max(memory, 0 if memory == 0 else _least(plan, workers)),
                        workers=workers)  # fmt: skip
        assert found == whole, (memory, workers)


def _least(plan: MergePlan, workers: int) -> int:
    from merger.planning.memory import peak_bytes

    return peak_bytes(plan) * workers


@pytest.mark.parametrize("manifest", METHODS, indirect=True)
def test_any_cut_is_the_whole(
    tools: ModuleType, place: Any, manifest: Mapping[str, Any], request: pytest.FixtureRequest
) -> None:
    name = request.node.callspec.params["manifest"]
    planned = tools.recut(api.plan(manifest, place.out()), tile_rows=16)
    # Above 16 rows a tile has no short tail to join; at model scope only, the plan is not fused to begin with.
    whole = outcome(tools, place, planned)
    cuts = [{"extent_rows": 1}, {"extent_rows": 3}, {"extent_rows": 1000}]
    if name != "ties-model":
        cuts += [{"fused": False, "extent_rows": 2}, {"fused": False, "extent_rows": 7}]
    for cut in cuts:
        found = outcome(tools, place, tools.recut(planned, **cut), workers=2, memory=0)
        if name in SUMMING:
            for file, data in whole.items():
                ours, theirs = (np.frombuffer(d[-4 * 200_000 :], np.float32) for d in (found[file], data))
                np.testing.assert_allclose(ours, theirs, rtol=1e-6)
        else:
            assert found == whole, cut


@pytest.mark.parametrize("manifest", [m for m in METHODS if m not in SUMMING], indirect=True)
def test_elementwise_work_does_not_see_tiles(tools: ModuleType, place: Any, manifest: Mapping[str, Any]) -> None:
    planned = api.plan(manifest, place.out())
    whole = outcome(tools, place, planned)
    for tile in (1, 17, 64, 5000):
        changed = tools.recut(planned, tile_rows=tile)
        assert changed.digest != planned.digest
        assert outcome(tools, place, changed) == whole, tile


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "dare_ties", "ties-model"])
def test_products_of_factors_do_not_see_memory(tools: ModuleType, place: Any, method: str) -> None:
    g = np.random.default_rng(5)
    shapes = {"model.layers.0.w": (333, 190), "model.layers.1.w": (1100, 96), "lm_head": (70, 1024)}
    base = place.model({f"{n}.weight": torch.from_numpy(g.standard_normal(s)).bfloat16() for n, s in shapes.items()})

    def adapter(rank: int) -> str:
        return str(place.adapter({n: (g.standard_normal((rank, c)), g.standard_normal((r, rank)))
                                  for n, (r, c) in shapes.items()}, scaling=0.5))  # fmt: skip

    document = tools.adapters(
        method.partition("-")[0], [adapter(8), adapter(5)], [{"weight": 0.9}, {"weight": 0.4}], METHODS[method],
        base_model=base, output={"kind": "model"},
    )  # fmt: skip
    planned = api.plan(document, place.out())
    assert planned.problems == ()
    plan = tools.recut(planned, extent_rows=2)
    whole = outcome(tools, place, plan, memory=1 << 30)
    for memory, workers in ((0, 1), (0, 2), (_least(plan, 1) + (1 << 19), 1)):
        assert outcome(tools, place, plan, memory=memory, workers=workers) == whole, memory
    assert outcome(tools, place, tools.recut(planned, extent_rows=5), memory=0) == whole


@pytest.mark.parametrize(
    "method, rows, cols",
    [("task_arithmetic", 401, 205), ("linear", 401, 205), ("slerp", 401, 205), ("ties", 401, 205),
     ("task_arithmetic", 81, 66000)],
)  # fmt: skip
def test_adapters_on_the_base_itself_do_not_see_memory(
    tools: ModuleType, place: Any, method: str, rows: int, cols: int
) -> None:
    # Rows wider than a tile: a product of one to three rows differs from one of 64 in its last bits.
    g = np.random.default_rng(6)
    base, other = (place.model({"l.w.weight": g.standard_normal((rows, cols))}) for _ in range(2))
    adapter = place.adapter({"l.w": (g.standard_normal((32, cols)), g.standard_normal((rows, 32)))})
    shared = {"ties": {"density": 0.5}, "slerp": {"t": 0.4}}.get(method, {})
    each: dict[str, object] = {} if method == "slerp" else {"weight": 0.5}
    entries = [{"model": f"{base}+{adapter}", "parameters": each}] if method == "linear" else []
    document: dict[str, Any] = {
        "merge_method": method, "models": [*entries, {"model": other, "parameters": each}], "parameters": shared,
    }  # fmt: skip
    if method != "linear":
        document["base_model"] = f"{base}+{adapter}"
    plan = api.plan(document, place.out())
    assert plan.problems == ()
    whole = outcome(tools, place, plan, memory=1 << 30)
    for memory in (0, _least(plan, 1) + (1 << 20), _least(plan, 1) + (3 << 20)):
        assert outcome(tools, place, plan, memory=memory) == whole, memory
