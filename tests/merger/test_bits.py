"""Merges that go from bits to bits give the plain way's bytes, and are the ones that should."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from merger import api
from merger.bits import BitsMerger, goes_by_bits
from merger.errors import MergeFailedError
from merger.planning.memory import peak_bytes
from merger.planning.nouns import MergePlan

SHAPES = {"model.layers.0.w": (500, 300), "model.layers.1.w": (700, 130), "model.norm": (257,), "model.one": (1,)}
CASES: dict[str, tuple[str, dict[str, Any], list[dict[str, Any]]]] = {
    "dare_ties": ("dare_ties", {"density": 0.2}, [{"weight": 0.5}, {"weight": 0.3}, {"weight": -0.4}]),
    "dare_ties-not-rescaled": ("dare_ties", {"density": 0.6, "rescale": "none"}, [{"weight": 1}, {"weight": 2}]),
    "dare_ties-mixed": (
        "dare_ties",
        {"lambda": 0.7, "normalize": True},
        [{"weight": 0.5, "density": 0.0}, {"weight": 0.3, "density": 1.0}, {"weight": 0.0, "density": 0.01}],
    ),
    "dare_ties-counted": (
        "dare_ties", {"density": 0.5, "normalize": True, "divisor": "count", "elect": "unweighted"},
        [{"weight": 0.5}, {"weight": -0.3}],
    ),
    "dare_linear": ("dare_linear", {"density": 0.4, "lambda": 1.3}, [{"weight": 0.5}, {"weight": 0.3}]),
    "ties": ("ties", {"density": 0.3}, [{"weight": 0.5}, {"weight": 0.3}, {"weight": 0.4}]),
    "ties-mixed": ("ties", {"lambda": -0.5}, [{"weight": 0.5, "density": 0.0}, {"weight": 0.3, "density": 1.0}]),
    "task_arithmetic": ("task_arithmetic", {"lambda": 0.7}, [{"weight": 0.5}, {"weight": -0.3}]),
    "task_arithmetic-normalised": ("task_arithmetic", {"normalize": True}, [{"weight": 0.5}, {"weight": 0.3}]),
    "linear": ("linear", {}, [{"weight": 0.5}, {"weight": 0.3}]),
    "linear-sum": ("linear", {"normalize": False}, [{"weight": 0.5}, {"weight": 0.3}]),
}  # fmt: skip


def planned(tools: ModuleType, place: Any, case: str, *, broken: float | None = None) -> MergePlan:
    """Fine-tunes in bfloat16 with many equal magnitudes, unchanged elements and zeros of both signs."""
    g = torch.Generator().manual_seed(7)
    base = {name: torch.randn(shape, generator=g).bfloat16() for name, shape in SHAPES.items()}
    base["model.norm"][::3] = -0.0

    def fine_tune(k: int) -> dict[str, torch.Tensor]:
        steps = {n: torch.randint(-2, 3, t.shape, generator=g) / 64 for n, t in base.items()}
        made = {n: (t.float() * (1 + steps[n])).bfloat16() for n, t in base.items()}
        if broken is not None and k == 1:
            made["model.layers.1.w"][333, 7] = broken
        return made

    method, shared, each = CASES[case]
    uris = [place.model(fine_tune(k)) for k in range(len(each))]
    document = tools.models(method, None if method == "linear" else place.model(base), uris, each, shared)
    plan = api.plan({**document, "out_dtype": "bfloat16"}, place.out())
    assert plan.problems == ()
    recut = tools.recut(plan, tile_rows=16, extent_rows=160)
    assert isinstance(recut, MergePlan)
    return recut


@contextmanager
def the_plain_way() -> Iterator[None]:
    with mock.patch("merger.unit.goes_by_bits", return_value=False):
        yield


def outcome(tools: ModuleType, place: Any, plan: MergePlan, **options: Any) -> dict[str, bytes]:
    out = place.out()
    tools.run(tools.at(plan, out), **options)
    found = tools.read_bytes(out)
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("case", CASES)
def test_they_are_the_plain_way(tools: ModuleType, place: Any, case: str) -> None:
    plan = planned(tools, place, case)
    with the_plain_way():
        plain = outcome(tools, place, plan)
    with mock.patch.object(BitsMerger, "run", autospec=True, side_effect=BitsMerger.run) as taken:
        assert outcome(tools, place, plan) == plain
    assert taken.call_count == len(plan.units)
    for memory, workers in ((0, 1), (0, 2), (3 << 20, 1)):
        least = peak_bytes(plan) * workers
        assert outcome(tools, place, plan, memory=max(memory, least), workers=workers) == plain, (memory, workers)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("broken", [np.nan, np.inf], ids=["nan", "inf"])
def test_a_broken_source_is_met_whatever_the_mask(tools: ModuleType, place: Any, case: str, broken: float) -> None:
    plan = planned(tools, place, case, broken=broken)
    said = []
    for way in (False, True):
        with mock.patch("merger.unit.goes_by_bits", goes_by_bits if way else lambda *_: False):
            try:
                outcome(tools, place, plan)
                said.append("done")
            except MergeFailedError as error:
                said.append(error.problems[0].what)
    assert said[0] == said[1]
    if "mixed" not in case and not case.startswith("ties"):  # there a density of 0 may leave it out
        assert "NaN or Inf" in said[0]


@pytest.mark.parametrize(
    "change",
    [
        {"out_dtype": "float32"},
        {"merge_method": "ties", "parameters": {"density": 0.3, "rescale": "l1"}},
        {"merge_method": "ties", "parameters": {"density": 0.3, "scope": "model"}},
        {"merge_method": "breadcrumbs", "parameters": {"density": 0.3, "gamma": 0.1}},
        {"merge_method": "dare_ties", "parameters": {"density": 0.3, "rescale": "inverse"}},
    ],
    ids=["float32", "rescaled-trim", "model-wide", "band", "inverse"],
)
def test_others_go_the_plain_way(tools: ModuleType, place: Any, change: dict[str, Any]) -> None:
    g = torch.Generator().manual_seed(3)
    base, a, b = (place.model({"w": torch.randn((40, 30), generator=g).bfloat16()}) for _ in range(3))
    document = tools.models("ties", base, [a, b], [{"weight": 0.5}, {"weight": 0.3}], {"density": 0.3})
    plan = api.plan({**document, "out_dtype": "bfloat16", **change}, place.out())
    assert plan.problems == ()
    assert not any(goes_by_bits(plan, task) for task in plan.tasks)
    tools.run(plan)
