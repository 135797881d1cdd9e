"""breadcrumbs and della, through real plans: exactly k survive, and the draws follow the ranks."""

from __future__ import annotations

import importlib
import math
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


class Drawn:
    def __init__(self, data: st.DataObject, twins: Any, tools: ModuleType, place: Any) -> None:
        shape = data.draw(tools.shapes, label="shape")
        self.base: Array = data.draw(tools.grid(shape))
        self.sources: list[Array] = [data.draw(tools.grid(shape)) for _ in range(data.draw(st.integers(1, 3)))]
        self.deltas = [twins.delta(s, self.base) for s in self.sources]
        self.weights = [float(data.draw(tools.weights)) for _ in self.sources]
        self.densities = [float(data.draw(tools.densities)) for _ in self.sources]
        self.scale = float(data.draw(tools.scales))
        self.place, self.tools = place, tools

    def merged(self, method: str, each: list[dict[str, float]], shared: dict[str, Any], **keys: Any) -> Array:
        every = [{"weight": w, "density": d, **e}
                 for w, d, e in zip(self.weights, self.densities, each, strict=True)]  # fmt: skip
        manifest = self.tools.models(
            method, self.place.model({"w": self.base}), [self.place.model({"w": s}) for s in self.sources], every,
            {"lambda": self.scale, **shared}, **keys,
        )  # fmt: skip
        found: Array = self.tools.merge_one(self.place, manifest)
        return found


def close(found: Array, expected: Array, size: float) -> None:
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6 * size)


# ---- breadcrumbs -----------------------------------------------------------------------------------------------------


@with_place
@given(data=st.data())
def test_breadcrumbs(twins: Any, own: ModuleType, tools: ModuleType, place: Any, data: st.DataObject) -> None:
    d = Drawn(data, twins, tools, place)
    elects = data.draw(st.booleans(), label="elects")
    # An election may hang on the rounding of a factor.
    rescale = "none" if elects else data.draw(st.sampled_from(["none", "l1", "inverse"]))
    gammas = [data.draw(st.sampled_from([0.0, 0.01, 0.1, 0.34, 0.5, 1.0])) for _ in d.sources]
    found = d.merged(
        "breadcrumbs_ties" if elects else "breadcrumbs", [{"gamma": g} for g in gammas], {"rescale": rescale}
    )
    ready = [
        twins.rescaled(x, own.band(x, p, g), p, rescale) for x, p, g in zip(d.deltas, d.densities, gammas, strict=True)
    ]
    merged = twins.elected(ready, d.weights, normalize=False) if elects else twins.summed(ready, d.weights)
    close(found, d.base + d.scale * merged, 200)


@pytest.mark.parametrize("shape", [(6, 5), (30,), (1, 30), (30, 1), (2, 3, 5)])
def test_exactly_k_survive_the_band(tools: ModuleType, place: Any, shape: Any) -> None:
    base = place.model({"w": np.zeros(shape)})
    equal = np.full(30, 0.5, np.float32).reshape(shape) * np.where(np.arange(30) % 2, 1, -1).reshape(shape)
    for density, gamma, first, count in (
        (0.1, 0.0, 0, 3), (0.1, 0.1, 3, 3), (0.5, 0.34, 10, 15), (0.9, 0.5, 3, 27), (0.01, 0.5, 0, 0),
        (0.0, 0.5, 0, 0), (1.0, 0.5, 0, 30),
    ):  # fmt: skip
        manifest = tools.models(
            "breadcrumbs", base, [place.model({"w": equal})], [{"weight": 1.0, "density": density, "gamma": gamma}]
        )  # fmt: skip
        found = tools.merge_one(place, manifest).reshape(-1)
        assert np.flatnonzero(found).tolist() == list(range(first, first + count)), (density, gamma)


def test_the_largest_and_the_smallest_are_cut(tools: ModuleType, place: Any) -> None:
    x = np.array([3, -9, 1, 10, 5, -2, 7, 8, -4, 6], np.float32)
    manifest = tools.models("breadcrumbs", place.model({"w": 0 * x}), [place.model({"w": x})],
                            [{"weight": 1.0, "density": 0.5, "gamma": 0.2}])  # fmt: skip
    assert tools.merge_one(place, manifest).tolist() == [0, 0, 0, 0, 5, 0, 7, 8, -4, 6]


# ---- della -----------------------------------------------------------------------------------------------------------


@with_place
@given(data=st.data())
def test_della(twins: Any, own: ModuleType, tools: ModuleType, place: Any, data: st.DataObject) -> None:
    d = Drawn(data, twins, tools, place)
    elects = data.draw(st.booleans(), label="elects")
    seed = data.draw(st.integers(0, 3), label="seed")
    rescale = "none" if elects else data.draw(st.sampled_from(["none", "l1", "inverse"]))
    epsilons = [0.5 * min(p, 1 - p) for p in d.densities]
    found = d.merged(
        "della" if elects else "della_linear", [{"epsilon": e} for e in epsilons], {"rescale": rescale}, seed=seed
    )
    ready = []
    for i, (x, p, e) in enumerate(zip(d.deltas, d.densities, epsilons, strict=True)):
        key = twins.key_of(seed, i, "w", "delta")
        if rescale == "inverse":
            ready.append(own.magprune(x, p, e, key, twins.hash32, inverse=True))
        else:
            ready.append(twins.rescaled(x, own.magprune(x, p, e, key, twins.hash32), p, rescale))
    merged = twins.elected(ready, d.weights, normalize=True) if elects else twins.summed(ready, d.weights)
    close(found, d.base + d.scale * merged, 500)


def della(tools: ModuleType, place: Any, x: Array, density: float, epsilon: float, seed: int, rescale: str) -> Array:
    manifest = tools.models(
        "della_linear", place.model({"w": 0 * x}), [place.model({"w": x})],
        [{"weight": 1.0, "density": density, "epsilon": epsilon}], {"rescale": rescale}, seed=seed,
    )  # fmt: skip
    found: Array = tools.merge_one(place, manifest)
    return found


def test_the_larger_an_element_the_more_often_it_is_kept(tools: ModuleType, place: Any) -> None:
    g = np.random.default_rng(5)
    x = g.permuted(np.tile(np.arange(1, 9, dtype=np.float32), (20_000, 1)), axis=1)
    kept = della(tools, place, x, 0.6, 0.3, 1, "none") != 0
    for size in range(1, 9):
        p = 0.3 + 0.6 * (size - 1) / 7
        share = kept[x == size].mean()
        assert abs(share - p) < 5 * math.sqrt(p * (1 - p) / 20_000)


def test_divided_by_their_own_probability_the_mean_is_the_delta(tools: ModuleType, place: Any) -> None:
    g = np.random.default_rng(6)
    x = g.standard_normal((40, 25)).astype(np.float32)
    runs = [della(tools, place, x, 0.5, 0.4, seed, "inverse") for seed in range(60)]
    mean = np.mean(runs, axis=0)
    p = np.empty_like(x)
    np.put_along_axis(p, np.argsort(np.abs(x), axis=1), 0.1 + 0.8 * np.arange(25)[None, :] / 24, axis=1)
    deviation = np.abs(x) * np.sqrt((1 - p) / p / len(runs))
    assert (np.abs(mean - x) < 6 * deviation).all()


def test_the_l1_norm_is_restored(tools: ModuleType, place: Any) -> None:
    g = np.random.default_rng(7)
    x = g.standard_normal((50, 30)).astype(np.float32)
    found = della(tools, place, x, 0.4, 0.2, 3, "l1")
    assert np.abs(found).sum() == pytest.approx(np.abs(x).sum(), rel=1e-5)
    ratio = found[found != 0] / x[found != 0]
    assert ratio.std() < 1e-6


@pytest.mark.parametrize("shape", [(4000, 1), (1, 1), ()])
def test_rows_of_one_element_are_kept_at_the_density(tools: ModuleType, place: Any, shape: Any) -> None:
    x = np.ones(shape, np.float32)
    share = np.mean([della(tools, place, x, 0.7, 0.2, seed, "none").mean() for seed in range(40 if x.size == 1 else 1)])
    draws = 40 if x.size == 1 else x.size
    assert abs(share - 0.7) < 5 * math.sqrt(0.7 * 0.3 / draws)


@pytest.mark.parametrize("density, epsilon", [(0.5, 0.5), (0.2, 0.2), (0.85, 0.15), (0.1, 0.15)])
def test_probabilities_outside_zero_and_one_are_refused(
    tools: ModuleType, place: Any, density: float, epsilon: float
) -> None:
    uris = [place.model({"w": np.ones((2, 2))}) for _ in range(2)]
    each = [{"weight": 1.0, "density": density, "epsilon": epsilon}]
    plan = api.plan(tools.models("della", uris[0], uris[1:], each), place.out())
    assert [p.code for p in plan.problems] == ["out-of-bounds"]


def test_nothing_is_refused_where_nothing_is_drawn(tools: ModuleType, place: Any) -> None:
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    np.testing.assert_array_equal(della(tools, place, x, 1.0, 0.15, 0, "l1"), x)
    np.testing.assert_array_equal(della(tools, place, x, 0.0, 0.15, 0, "l1"), 0 * x)
