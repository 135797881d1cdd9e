"""Methods that decide element by element, through real plans: equal to their slow twins."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
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
    return importlib.import_module("tests.reference_consensus")


class Drawn:
    """A base and sources of one tensor, in eighths: many equal magnitudes, zeros of both signs, cancelling sums."""

    def __init__(self, data: st.DataObject, twins: Any, tools: ModuleType, place: Any, *, most: int = 4) -> None:
        shape = data.draw(tools.shapes, label="shape")
        self.base: Array = data.draw(tools.grid(shape))
        self.sources: list[Array] = [data.draw(tools.grid(shape)) for _ in range(data.draw(st.integers(1, most)))]
        self.deltas = [twins.delta(s, self.base) for s in self.sources]
        self.weights = [float(data.draw(tools.weights)) for _ in self.sources]
        self.place, self.tools = place, tools

    def merged(self, method: str, each: Sequence[dict[str, Any]] | None = None, **shared: Any) -> Array:
        """The merged delta."""
        manifest = self.tools.models(
            method, self.place.model({"w": self.base}), [self.place.model({"w": s}) for s in self.sources],
            each or [{}] * len(self.sources), shared,
        )  # fmt: skip
        found: Array = self.tools.merge_one(self.place, manifest)
        return found - self.base


def close(found: Array, expected: Array) -> None:
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=1e-5)


@with_place
@given(data=st.data())
def test_sce(twins: Any, own: ModuleType, tools: ModuleType, place: Any, data: st.DataObject) -> None:
    d = Drawn(data, twins, tools, place)
    share = data.draw(st.sampled_from([0.0, 0.1, 0.34, 0.5, 0.9, 1.0]), label="select_topk")
    close(d.merged("sce", select_topk=share), own.sce(d.deltas, select_topk=share))


def test_sce_selects_exactly_and_of_equal_variances_the_first(tools: ModuleType, place: Any) -> None:
    # 500 rows of 300 are many tiles; all variances are equal but three.
    x = np.ones((500, 300), np.float32)
    x[3, 3] = x[250, 7] = x[499, 299] = 5.0
    base, other = (place.model({"w": 0 * x}) for _ in range(2))
    source = place.model({"w": x})
    for share, count in ((0.5, 75_000), (0.001, 150), (1e-5, 1), (2e-5, 3), (0.99999, 149_998)):
        found = tools.merge_one(place, tools.models("sce", base, [source, other], [{}] * 2, {"select_topk": share}))
        kept = np.flatnonzero(found)
        assert len(kept) == count
        large = [i for i in np.flatnonzero(x.reshape(-1) == 5) if count > 3 or i in kept]
        assert set(kept) == set(large) | set(np.flatnonzero(x.reshape(-1) == 1)[: count - len(large)])


def test_sce_says_where_it_could_not_weigh_the_sources(tools: ModuleType, place: Any) -> None:
    base = np.zeros((4, 3), np.float32)
    tiny = [base + np.float32(1e-4), base + np.float32(3e-4)]
    uris = [place.model({"light": x, "heavy": 100 * x, "same": base}) for x in tiny]
    plan = api.plan(
        tools.models("sce", place.model({"light": base, "heavy": base, "same": base}), uris, [{}] * 2), place.out()
    )
    report = tools.run(plan)
    (warning,) = [w for w in report.warnings if w.code == "weighed-equally"]
    assert "1 tensor" in warning.what
    assert warning.where == "light"


@with_place
@given(data=st.data())
def test_ram(twins: Any, own: ModuleType, tools: ModuleType, place: Any, data: st.DataObject) -> None:
    d = Drawn(data, twins, tools, place)
    epsilon = data.draw(st.sampled_from([0.0, 1e-5, 0.2, 0.9]), label="epsilon")
    close(d.merged("ram", epsilon=epsilon), own.ram(d.deltas, epsilon=epsilon))


@with_place
@given(data=st.data())
def test_ramplus_tl(twins: Any, own: ModuleType, tools: ModuleType, place: Any, data: st.DataObject) -> None:
    d = Drawn(data, twins, tools, place)
    options: dict[str, Any] = {"epsilon": data.draw(st.sampled_from([0.0, 1e-5, 0.2])),
                               "r": data.draw(st.sampled_from([0.1, -1.0])),
                               "alpha": data.draw(st.sampled_from([0.0, 0.2, 3.0]))}  # fmt: skip
    if options["epsilon"] == 0.0:
        options["epsilon"] = 1e-6  # a divisor of zero is the next test's
    close(d.merged("ramplus_tl", **options), own.ramplus(d.deltas, **options))


def test_ramplus_tl_with_epsilon_zero_divides_by_no_zero(tools: ModuleType, place: Any) -> None:
    x = np.array([[1.0, 2.0]])
    uris = [place.model({"w": x}) for _ in range(2)]
    manifest = tools.models("ramplus_tl", place.model({"w": 0 * x}), uris, [{}] * 2, {"epsilon": 0.0})
    np.testing.assert_array_equal(tools.merge_one(place, manifest), x)


@with_place
@given(data=st.data())
def test_magmax(twins: Any, own: ModuleType, tools: ModuleType, place: Any, data: st.DataObject) -> None:
    d = Drawn(data, twins, tools, place)
    scale = data.draw(tools.scales)
    found = d.merged("magmax", [{"weight": w} for w in d.weights], **{"lambda": scale})
    close(found, scale * own.magmax(d.deltas, d.weights))


@with_place
@given(data=st.data())
def test_consensus_ta(twins: Any, own: ModuleType, tools: ModuleType, place: Any, data: st.DataObject) -> None:
    d = Drawn(data, twins, tools, place)
    bounds = [data.draw(st.sampled_from([0.0, 0.25, 0.5, 1.0])) for _ in d.sources]
    k, scale = data.draw(st.integers(1, len(d.sources))), data.draw(tools.scales)
    each = [{"weight": w, "tall_lambda": b} for w, b in zip(d.weights, bounds, strict=True)]
    expected = own.consensus_ta(d.deltas, d.weights, bounds, k)
    close(d.merged("consensus_ta", each, k=k, **{"lambda": scale}), scale * expected)


def test_consensus_ta_refuses_more_votes_than_sources(tools: ModuleType, place: Any) -> None:
    uris = [place.model({"w": np.ones((2, 2))}) for _ in range(2)]
    plan = api.plan(tools.models("consensus_ta", uris[0], uris[1:], [{}]), place.out())
    assert [p.code for p in plan.problems] == ["out-of-bounds"]


@with_place
@given(data=st.data())
def test_pcb_of_a_tensor(twins: Any, own: ModuleType, tools: ModuleType, place: Any, data: st.DataObject) -> None:
    d = Drawn(data, twins, tools, place)
    ratio = data.draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]), label="ratio")
    np.testing.assert_allclose(
        d.merged("pcb", ratio=ratio, scope="tensor"), own.pcb(d.deltas, ratio=ratio), rtol=1e-4, atol=1e-5
    )


def test_pcb_of_the_whole_model_has_one_scale(twins: Any, own: ModuleType, tools: ModuleType, place: Any) -> None:
    g = np.random.default_rng(2)
    shapes = {"model.layers.0.w": (120, 70), "model.layers.1.w": (40, 90), "norm": (70,)}
    base, *sources = [
        {n: (g.standard_normal(s) * (1 + i)).astype(np.float32) for i, (n, s) in enumerate(shapes.items())}
        for _ in range(4)
    ]
    manifest = tools.models("pcb", place.model(base), [place.model(s) for s in sources], [{}] * 3, {"lambda": 0.5})
    found = tools.merge(place, manifest)
    flat = [np.concatenate([twins.delta(s[n], base[n]).reshape(-1) for n in shapes]) for s in sources]
    whole, at = own.pcb(flat), 0
    for name, shape in shapes.items():
        size = int(np.prod(shape))
        expected = base[name] + 0.5 * whole[at : at + size].reshape(shape)
        np.testing.assert_allclose(found[name].double().numpy(), expected, rtol=1e-5, atol=1e-5)
        at += size


def test_pcb_of_adapters_has_one_scale_too(own: ModuleType, tools: ModuleType, place: Any) -> None:
    g = np.random.default_rng(3)
    shapes = {"model.layers.0.q": (7, 9), "model.layers.1.q": (12, 5)}
    pairs = [
        {n: (g.standard_normal((2, c)), s * g.standard_normal((r, 2)))
         for s, (n, (r, c)) in zip((1, 5), shapes.items(), strict=True)}
        for _ in range(2)
    ]  # fmt: skip
    found = tools.merge(
        place,
        tools.adapters("pcb", [place.adapter(p) for p in pairs], [{}] * 2, output={"store": {"svd": {"rank": 7}}}),
    )
    flat = [np.concatenate([(p[n][1] @ p[n][0]).reshape(-1) for n in shapes]) for p in pairs]
    whole, at = own.pcb(flat), 0
    for name, shape in shapes.items():
        a, b = (found[f"base_model.model.{name}.lora_{w}.weight"].double().numpy() for w in "AB")
        size = int(np.prod(shape))
        np.testing.assert_allclose(b @ a, whole[at : at + size].reshape(shape), rtol=1e-3, atol=1e-4)
        at += size


def test_pcb_over_a_model_takes_one_ratio(tools: ModuleType, place: Any) -> None:
    x = {"model.layers.0.w": np.ones((2, 2)), "model.layers.1.w": np.ones((2, 2))}
    uris = [place.model(x) for _ in range(3)]
    plan = api.plan(tools.models("pcb", uris[0], uris[1:], [{}] * 2, {"ratio": [0.1, 0.5]}), place.out())
    assert [p.code for p in plan.problems] == ["varying-density"]


def test_one_source_competes_with_itself_alone(tools: ModuleType, place: Any) -> None:
    # The highest tenth survives whole: a weighted mean of one.
    x = np.arange(1, 101, dtype=np.float32).reshape(10, 10)
    manifest = tools.models("pcb", place.model({"w": 0 * x}), [place.model({"w": x})], [{}], {"scope": "tensor"})
    found = tools.merge_one(place, manifest).reshape(-1)
    assert np.flatnonzero(found).tolist() == list(range(91, 100))
