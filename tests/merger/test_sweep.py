"""Merges that are run as one: what belongs to whom, there and back."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from merger import api
from merger.journal import receipt_from_json, receipt_to_json
from merger.receipts import Extent, Receipt
from merger.sweep import Sweep, join_sweep, likeness

notes = st.dictionaries(st.sampled_from(["energy", "lost", "rank"]), st.floats(0, 1e6), max_size=3)


@given(st.lists(st.tuples(notes, st.integers(0, 1000), st.booleans()), min_size=2, max_size=5), st.integers(0, 99))
def test_receipts_are_joined_and_split_again(members: list[tuple[dict[str, float], int, bool]], unit: int) -> None:
    statistics = members[0][2]
    apart = [
        Receipt(
            unit, () if statistics else (Extent(0, "model.safetensors", n, n + 7, f"{n:x}"),),
            (np.array([n], np.int64),) if statistics else (), {} if statistics else said, n, 0.5,
        )
        for said, n, _ in members
    ]  # fmt: skip
    sweep = Sweep(plan=None, members=(None,) * len(members))  # type: ignore[arg-type] # only their number counts
    joined = receipt_from_json(receipt_to_json(sweep.join(apart)))
    assert joined.read_bytes == sum(n for _, n, _ in members)
    split = sweep.split(joined)
    assert sum(r.read_bytes for r in split) == joined.read_bytes
    for before, after in zip(apart, split, strict=True):
        assert (after.unit, after.extents, after.notes, after.by_result) == (unit, before.extents, before.notes, ())
        assert [s.tolist() for s in after.statistics] == [s.tolist() for s in before.statistics]


@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_a_unit_of_a_sweep_is_the_unit_of_each_member(tools: ModuleType, place: Any, scope: str) -> None:
    g = np.random.default_rng(0)
    base, a, b = (place.model({"w": g.standard_normal((90, 33)), "n": g.standard_normal(33)}) for _ in range(3))

    def planned(density: float, method: str = "ties", **more: object) -> Any:
        parameters = {"density": density, "scope": scope}
        return api.plan(tools.models(method, base, [a, b], [{"weight": 1.0}] * 2, parameters, **more), place.out())

    plans = [planned(d) for d in (0.2, 0.5, 0.9)]
    assert len({likeness(plan) for plan in plans}) == 1
    assert len({plan.digest for plan in plans}) == 3
    sweep = join_sweep(plans)
    assert sweep is not None
    assert all(sweep.plan.units == plan.units for plan in plans)
    assert likeness(planned(0.2, method="magnitude_prune")) == likeness(plans[0])  # a grid of methods is a sweep, too


def test_plans_that_are_cut_otherwise_are_not_alike(tools: ModuleType, place: Any) -> None:
    g = np.random.default_rng(1)
    base, a, b = (place.model({"w": g.standard_normal((9, 8))}) for _ in range(3))
    weights: list[dict[str, object]] = [{"weight": 1.0}] * 2
    ties = api.plan(tools.models("ties", base, [a, b], weights, {"density": 0.5}), place.out())
    turned = api.plan(tools.models("ties", base, [b, a], weights, {"density": 0.5}), place.out())
    whole = api.plan(tools.models("ties", base, [a, b], weights, {"density": 0.5, "scope": "model"}), place.out())
    assert len({likeness(plan) for plan in (ties, turned, whole)}) == 3
