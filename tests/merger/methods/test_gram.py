"""Methods whose coefficients follow from inner products: equal to twins that work on the vectors themselves."""

from __future__ import annotations

import importlib
import math
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from merger import api
from merger.errors import MergeFailedError

Array = npt.NDArray[Any]

with_place = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
generators = st.integers(0, 2**32 - 1).map(np.random.default_rng)


@pytest.fixture(scope="module")
def own() -> ModuleType:
    return importlib.import_module("tests.reference_gram")


def close(found: Array, expected: Array, size: float = 1.0) -> None:
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6 * max(size, 1.0))


def drawn(data: st.DataObject, tools: ModuleType, count: int) -> list[Array]:
    """Tensors that differ enough for their angles to mean something: normal, and of sizes far apart."""
    shape = data.draw(tools.shapes, label="shape")
    generator = data.draw(generators, label="values")
    scales = [2.0 ** data.draw(st.integers(-3, 3)) for _ in range(count)]
    return [(generator.standard_normal(shape) * s).astype(np.float32) for s in scales]


def two(base: str | None, uris: list[str], weights: list[float], **shared: object) -> dict[str, object]:
    document: dict[str, object] = {
        "merge_method": "nuslerp", "parameters": shared,
        "models": [{"model": u, "parameters": {"weight": w}} for u, w in zip(uris, weights, strict=True)],
    }  # fmt: skip
    return document if base is None else {**document, "base_model": base}


@with_place
@given(data=st.data())
def test_nuslerp(twins: Any, own: ModuleType, tools: ModuleType, place: Any, data: st.DataObject) -> None:
    base, a, b = drawn(data, tools, 3)
    with_base = data.draw(st.booleans(), label="base")
    flatten = data.draw(st.booleans(), label="flatten")
    columns = data.draw(st.booleans(), label="columns") and (flatten or a.ndim <= 2)
    weights = [data.draw(tools.weights), data.draw(tools.weights)]
    uris = [place.model({"w": x}) for x in (a, b)]
    manifest = two(
        place.model({"w": base}) if with_base else None, uris, weights, nuslerp_flatten=flatten,
        nuslerp_row_wise=columns,
    )  # fmt: skip
    x, y = (twins.delta(s, base) for s in (a, b)) if with_base else (a, b)
    expected = own.nuslerp(x, y, weights, flatten=flatten, columns=columns)
    # Along a row or a column of one element two vectors are on one line, up to the rounding of their cosine.
    found = tools.merge_one(place, manifest)
    close(found, expected + base.astype(np.float64) if with_base else expected, 8 * float(np.abs(expected).max()))


def test_nuslerp_along_the_first_of_three_dimensions_is_refused(tools: ModuleType, place: Any) -> None:
    uris = [place.model({"w": np.full((2, 3, 4), x)}) for x in (1.0, 2.0)]
    plan = api.plan(two(None, uris, [1, 1], nuslerp_flatten=False, nuslerp_row_wise=True), place.out())
    assert [p.code for p in plan.problems] == ["bad-shape"]


def test_nuslerp_of_a_row_of_zeros_and_of_opposites(tools: ModuleType, place: Any) -> None:
    x = np.array([[3.0, 4.0], [0.0, 0.0], [1.0, 2.0]], np.float32)
    y = np.array([[-3.0, -4.0], [1.0, 1.0], [2.0, 4.0]], np.float32)
    uris = [place.model({"w": v}) for v in (x, y)]
    found = tools.merge_one(place, two(None, uris, [3.0, 1.0], nuslerp_flatten=False))
    right_angle = math.sin(math.pi / 8)
    np.testing.assert_allclose(found, [[1.5, 2.0], [right_angle] * 2, [1.25, 2.5]], rtol=1e-6)


@with_place
@given(data=st.data())
def test_multislerp(twins: Any, own: ModuleType, tools: ModuleType, place: Any, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 4), label="sources")
    base, *sources = drawn(data, tools, count + 1)
    with_base, normalize = data.draw(st.booleans()), data.draw(st.booleans())
    weights = [data.draw(tools.weights) for _ in sources]
    assume(abs(sum(weights)) > 0.1 or not normalize)
    x = [twins.delta(s, base) if with_base else s.astype(np.float64) for s in sources]
    units = [w * v / np.sqrt((v * v).sum()) for w, v in zip(weights, x, strict=True)]
    assume(count == 1 or np.sqrt((sum(units) ** 2).sum()) > 0.05)
    manifest = tools.models(
        "multislerp", place.model({"w": base}) if with_base else None, [place.model({"w": s}) for s in sources],
        [{"weight": w} for w in weights], {"normalize_weights": normalize},
    )  # fmt: skip
    expected = own.multislerp(x, weights, normalize=normalize)
    found = tools.merge_one(place, manifest)
    close(found, expected + base.astype(np.float64) if with_base else expected, 20 * float(np.abs(expected).max()))


def multislerp(tools: ModuleType, place: Any, sources: list[Any], weights: list[float], **shared: object) -> Any:
    uris = [place.model({"w": np.asarray(s)}) for s in sources]
    return tools.models("multislerp", None, uris, [{"weight": w} for w in weights], shared)


def test_multislerp_of_two_opposites_is_their_mix(tools: ModuleType, place: Any) -> None:
    x = np.array([[1.0, -2.0, 0.5]])
    found = tools.merge_one(place, multislerp(tools, place, [x, -3 * x], [0.5, 0.5]))
    np.testing.assert_allclose(found, -x)


def test_multislerp_of_three_that_cancel_fails_and_names_the_tensor(tools: ModuleType, place: Any) -> None:
    x, y = np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]])
    with pytest.raises(MergeFailedError, match="add up to nothing") as caught:
        tools.merge_one(place, multislerp(tools, place, [x, -2 * x, 3 * x, -y, y, -x], [1.0] * 6))
    assert caught.value.problems[0].code == "directions-cancel"
    assert caught.value.problems[0].where == "w"


def test_multislerp_of_zeros_is_zero(tools: ModuleType, place: Any) -> None:
    x = np.ones((2, 2), np.float32)
    manifest = tools.models("multislerp", place.model({"w": x}), [place.model({"w": x}) for _ in range(3)],
                            [{"weight": 1.0}] * 3)  # fmt: skip
    np.testing.assert_array_equal(tools.merge_one(place, manifest), x)


def test_multislerp_refuses_weights_that_cancel(tools: ModuleType, place: Any) -> None:
    plan = api.plan(multislerp(tools, place, [[[1.0]], [[2.0]]], [1.0, -1.0]), place.out())
    assert [p.code for p in plan.problems] == ["weights-cancel"]


def test_eps_is_added_to_the_norms(own: ModuleType, tools: ModuleType, place: Any) -> None:
    x, y = np.array([[0.003, 0.0]]), np.array([[0.0, 4.0]])
    found = tools.merge_one(place, multislerp(tools, place, [x, y], [1.0, 1.0], eps=0.01))
    close(found, own.multislerp([x.astype(np.float32), y], [1, 1], eps=0.01), 4)
    assert found[0, 0] < 0.5 * found[0, 1]


@with_place
@given(data=st.data())
def test_karcher(own: ModuleType, tools: ModuleType, place: Any, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 4), label="sources")
    sources = drawn(data, tools, count)
    assume(sources[0].size > 1)  # numbers have no angles: what is not equal is opposite
    iterations = data.draw(st.integers(0, 12), label="max_iter")
    expected = own.karcher(sources, max_iter=iterations)
    units = [s / np.sqrt((s * s).sum()) for s in sources]
    assume(np.sqrt((sum(units) ** 2).sum()) > 0.1)
    manifest = tools.models("karcher", None, [place.model({"w": s}) for s in sources], [{}] * count,
                            {"max_iter": iterations})  # fmt: skip
    close(tools.merge_one(place, manifest), expected, 20 * float(np.abs(expected).max()))


def test_karcher_counts_its_base_as_one_more_source(own: ModuleType, tools: ModuleType, place: Any) -> None:
    g = np.random.default_rng(1)
    base, a, b = (g.standard_normal((7, 3)).astype(np.float32) for _ in range(3))
    uris = [place.model({"w": x}) for x in (base, a, b)]
    listed = tools.models("karcher", None, uris, [{}] * 3)
    close(tools.merge_one(place, listed), own.karcher([base, a, b]))
    for others in (uris, uris[1:]):
        named = tools.models("karcher", uris[0], others, [{}] * len(others))
        np.testing.assert_allclose(tools.merge_one(place, named), own.karcher([base, a, b]), rtol=1e-5, atol=1e-6)


def test_karcher_of_opposites_and_of_zeros(tools: ModuleType, place: Any) -> None:
    x = np.array([[3.0, 4.0]])
    for sources, expected in (([x, -x], x), ([x, 0 * x], x / 2), ([0 * x, 0 * x], 0 * x), ([x, x, x], x)):
        manifest = tools.models("karcher", None, [place.model({"w": s}) for s in sources], [{}] * len(sources))
        np.testing.assert_allclose(tools.merge_one(place, manifest), expected, rtol=1e-6)


@with_place
@given(data=st.data())
def test_model_stock(twins: Any, own: ModuleType, tools: ModuleType, place: Any, data: st.DataObject) -> None:
    count = data.draw(st.integers(2, 4), label="sources")
    base, *sources = drawn(data, tools, count + 1)
    deltas = [twins.delta(s, base) for s in sources]
    wise = data.draw(st.booleans(), label="filter_wise")
    expected = own.model_stock(base, deltas, filter_wise=wise)
    assume(np.abs(expected).max() < 200)  # 1 + (N − 1)·cos near zero: the ratio is as large as one likes
    manifest = tools.models("model_stock", place.model({"w": base}), [place.model({"w": s}) for s in sources],
                            [{}] * count, {"filter_wise": wise})  # fmt: skip
    found = tools.merge_one(place, manifest)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-5 * max(1.0, float(np.abs(expected).max())))


def test_model_stock_of_right_angles_is_the_base_and_of_equals_their_mean(tools: ModuleType, place: Any) -> None:
    base, x, y = np.array([[1.0, 1.0]]), np.array([[2.0, 1.0]]), np.array([[1.0, 2.0]])
    for sources, expected in (([x, y], base), ([x, x + 0], x), ([base, base], base), ([x, 2 * base - x], base)):
        manifest = tools.models("model_stock", place.model({"w": base}), [place.model({"w": s}) for s in sources],
                                [{}] * 2)  # fmt: skip
        np.testing.assert_allclose(tools.merge_one(place, manifest), expected, rtol=1e-6)


def test_model_stock_refuses_one_source(tools: ModuleType, place: Any) -> None:
    uris = [place.model({"w": np.ones((2, 2))}) for _ in range(2)]
    plan = api.plan(tools.models("model_stock", uris[0], uris[1:], [{}]), place.out())
    assert [p.code for p in plan.problems] == ["number-of-sources"]


def test_balance_and_calibrate_need_deltas(tools: ModuleType, place: Any) -> None:
    uris = [place.model({"w": np.ones((2, 2))}) for _ in range(3)]
    for keys in ({"balance": "nan"}, {"calibrate": "svc"}):
        assert [p.code for p in api.plan(two(None, uris[:2], [1, 1], **keys), place.out()).problems] == ["no-base"]
        assert api.plan(two(uris[2], uris[:2], [1, 1], **keys), place.out()).problems == ()


def test_balanced_weights_enter_the_angle(own: ModuleType, tools: ModuleType, place: Any) -> None:
    g = np.random.default_rng(8)
    base, loud, quiet = np.zeros((5, 4)), 10 * g.standard_normal((5, 4)), g.standard_normal((5, 4))
    uris = [place.model({"w": x}) for x in (base, loud, quiet)]
    inverse = [1 / np.sqrt((x * x).sum()) for x in (loud, quiet)]
    found = tools.merge_one(place, two(uris[0], uris[1:], [1.0, 1.0], balance="nan"))
    expected = own.nuslerp(loud, quiet, [i / sum(inverse) for i in inverse])
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e12, 1e30])
@pytest.mark.parametrize("method", ["multislerp", "karcher", "nuslerp"])
def test_huge_and_tiny_values_keep_their_scale(
    own: ModuleType, tools: ModuleType, place: Any, method: str, size: float
) -> None:
    g = np.random.default_rng(3)
    sources = [(g.standard_normal((5, 4)) * size).astype(np.float32) for _ in range(2)]
    each: list[dict[str, float]] = [{} if method == "karcher" else {"weight": w} for w in (1.0, 2.0)]
    found = tools.merge_one(place, tools.models(method, None, [place.model({"w": s}) for s in sources], each))
    if method == "karcher":
        expected = own.karcher(sources)
    else:
        expected = own.multislerp(sources, [1, 2]) if method == "multislerp" else own.nuslerp(*sources, [1, 2])
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6 * size)
