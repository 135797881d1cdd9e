"""arcee_fusion, through real plans: what it takes is what lies above the exact threshold."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from merger import api

Array = npt.NDArray[Any]

with_place = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)


@pytest.fixture(scope="module")
def own() -> ModuleType:
    return importlib.import_module("tests.reference_sparse")


def fuse(tools: ModuleType, place: Any, base: Array, other: Array) -> Array:
    found: Array = tools.merge_one(
        place, tools.models("arcee_fusion", place.model({"w": base}), [place.model({"w": other})], [{}])
    )
    return found


@with_place
@given(data=st.data())
def test_arcee_fusion(own: ModuleType, tools: ModuleType, place: Any, data: st.DataObject) -> None:
    shape = data.draw(tools.shapes, label="shape")
    g = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    base = g.standard_normal(shape).astype(np.float32)
    other = (base + g.standard_normal(shape) * (g.random(shape) < 0.5)).astype(np.float32)
    expected, scores, threshold = own.arcee_fusion(base, other)
    sure = np.abs(scores - threshold) > 1e-6 * max(abs(threshold), 1e-12)
    # Where the threshold is a score itself that element is taken, and it is the same element here.
    np.testing.assert_array_equal(fuse(tools, place, base, other)[sure], expected[sure])


def test_quartiles_are_exact_over_many_tiles(own: ModuleType, tools: ModuleType, place: Any) -> None:
    g = np.random.default_rng(1)
    base = g.standard_normal((900, 300)).astype(np.float32)
    other = (base + 0.1 * g.standard_normal(base.shape) ** 3).astype(np.float32)
    expected, scores, threshold = own.arcee_fusion(base, other)
    found = fuse(tools, place, base, other)
    apart = found != expected
    assert (np.abs(scores[apart] - threshold) <= 1e-6 * threshold).all()
    assert 0.05 < (found == other).mean() < 0.2


def test_equal_models_give_themselves(tools: ModuleType, place: Any) -> None:
    x = np.random.default_rng(2).standard_normal((6, 5)).astype(np.float32)
    np.testing.assert_array_equal(fuse(tools, place, x, x), x)


def test_it_cannot_make_an_adapter(tools: ModuleType, place: Any) -> None:
    pair = (np.ones((1, 3), np.float32), np.ones((2, 1), np.float32))
    plan = api.plan(tools.adapters("arcee_fusion", [place.adapter({"l": pair})], [{}]), place.out())
    assert [p.code for p in plan.problems] == ["not-closed"]
