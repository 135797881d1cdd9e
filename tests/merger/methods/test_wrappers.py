"""balance, calibrate and scaling by depth: around any method on deltas, and by name as nan, svc and lines."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from merger import api
from merger.errors import ManifestError, MergeFailedError
from merger.manifest import load_manifest
from merger.methods import METHODS
from merger.methods.rounds import Call, balanced
from merger.methods.wrappers import wrappers_for
from merger.planning.memory import peak_bytes

F64 = npt.NDArray[np.float64]

MODULE = "model.layers.0.q_proj"
WEIGHT = f"{MODULE}.weight"
WEIGHTS = (1.0, 0.6, -0.5)

twins = importlib.import_module("tests.reference")
dense = importlib.import_module("tests.reference_spectral")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As in a worker: bits hang on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Models:
    """A base and three models whose deltas differ in size."""

    def __init__(self, place: Any, seed: int, shape: tuple[int, ...] = (24, 17)) -> None:
        g = np.random.default_rng(seed)
        self.base = g.standard_normal(shape).astype(np.float32)
        sources = [(self.base + s * g.standard_normal(shape)).astype(np.float32) for s in (1.0, 0.25, 3.0)]
        self.deltas = [twins.delta(s, self.base) for s in sources]
        self.uri, *self.uris = [place.model({"w": x}) for x in (self.base, *sources)]
        self.each = [{"weight": w} for w in WEIGHTS]


class Adapters:
    """Three adapters of one module, and their deltas."""

    def __init__(self, place: Any, seed: int, rows: int = 24, cols: int = 17) -> None:
        g = np.random.default_rng(seed)
        self.pairs = [
            (g.standard_normal((r, cols)).astype(np.float32), g.standard_normal((rows, r)).astype(np.float32))
            for r in (2, 4, 1)
        ]
        scalings = (2.0, 0.5, 1.25)
        self.uris = [place.adapter({MODULE: p}, scaling=s) for p, s in zip(self.pairs, scalings, strict=True)]
        self.deltas = [
            s * (b.astype(np.float64) @ a.astype(np.float64)) for (a, b), s in zip(self.pairs, scalings, strict=True)
        ]
        self.base = place.model({WEIGHT: np.zeros((rows, cols))})
        self.each = [{"weight": w} for w in WEIGHTS]


def product(factors: dict[str, torch.Tensor]) -> F64:
    a, b = (factors[f"base_model.model.{MODULE}.lora_{which}.weight"].double().numpy() for which in "AB")
    found: F64 = b @ a
    return found


def svd(rank: int) -> dict[str, Any]:
    return {"store": {"svd": {"rank": rank}}}


# ---- balance ---------------------------------------------------------------------------------------------------------


def test_weights_are_divided_by_norms_and_add_up_to_one() -> None:
    call = Call(method="nan", combine="sum", weights=(1.0, 1.0, 2.0), balance=True)
    assert balanced(call, (1.0, 2.0, 4.0)).weights == pytest.approx((4 / 7, 2 / 7, 2 / 7))
    assert balanced(call, (1.0, 0.0, 4.0)).weights == pytest.approx((0.8, 0.0, 0.4))
    assert balanced(call, (0.0, 0.0, 0.0)).weights == (0.0, 0.0, 0.0)
    assert balanced(Call(method="nan", combine="sum", weights=(1.0,)), (3.0,)).weights == (1.0,)


def test_nan_is_task_arithmetic_with_balanced_weights(tools: ModuleType, place: Any) -> None:
    d = Models(place, 1)
    weights = dense.nan_weights(d.deltas, WEIGHTS)
    expected = twins.task_arithmetic(d.base, d.deltas, weights, scale=0.5)
    for name, shared in (("nan", {}), ("task_arithmetic", {"balance": "nan"})):
        found = tools.merge_one(place, tools.models(name, d.uri, d.uris, d.each, {"lambda": 0.5, **shared}))
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("output", [{"store": "concat"}, svd(7), {"kind": "model"}])
def test_nan_of_adapters_in_every_store(tools: ModuleType, place: Any, output: dict[str, Any]) -> None:
    d = Adapters(place, 2)
    found = tools.merge(place, tools.adapters("nan", d.uris, d.each, base_model=d.base, output=output))
    expected = twins.summed(d.deltas, dense.nan_weights(d.deltas, WEIGHTS))
    got = found[WEIGHT].double().numpy() if "kind" in output else product(found)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["ties", "dare_ties", "magnitude_prune"])
def test_any_streamed_method_can_be_balanced(tools: ModuleType, place: Any, method: str) -> None:
    d = Models(place, 3)
    shared = {"density": 0.5, "balance": "nan", "rescale": "none"}
    found = tools.merge_one(place, tools.models(method, d.uri, d.uris, d.each, shared))
    weights, densities = dense.nan_weights(d.deltas, WEIGHTS), [0.5] * 3
    if method == "ties":
        expected = twins.ties(d.base, d.deltas, weights, densities)
    elif method == "magnitude_prune":
        expected = twins.magnitude_prune(d.base, d.deltas, weights, densities)
    else:
        keys = [twins.key_of(0, i, "w", "delta") for i in range(3)]
        expected = twins.dare(d.base, d.deltas, weights, densities, keys, elects=True, rescale="none")
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["tsv_m", "wudi", "core_ties", "ties"])
def test_any_method_on_adapters_can_be_balanced(tools: ModuleType, place: Any, method: str) -> None:
    d = Adapters(place, 4)
    found = product(tools.merge(place, tools.adapters(method, d.uris, d.each, {"balance": "nan"}, output=svd(17))))
    weights = dense.nan_weights(d.deltas, WEIGHTS)
    by_hand = product(
        tools.merge(place, tools.adapters(method, d.uris, [{"weight": w} for w in weights], output=svd(17)))
    )
    np.testing.assert_allclose(found, by_hand, rtol=1e-4, atol=1e-5)


def test_any_cut_balances_the_same(tools: ModuleType, place: Any) -> None:
    d = Models(place, 5, (333, 21))
    for method, shared in (("nan", {}), ("ties", {"density": 0.3, "balance": "nan"})):
        plan = tools.recut(api.plan(tools.models(method, d.uri, d.uris, d.each, shared), place.out()), tile_rows=16)
        found = []
        for changes, options in (({}, {}), ({"extent_rows": 2, "fused": False}, {"workers": 2}), ({}, {"memory": 0})):
            out = place.out()
            tools.run(tools.at(tools.recut(plan, **changes), out), **options)
            found.append(tools.read_tensors(out)["w"].numpy())
        np.testing.assert_allclose(found[1], found[0], rtol=1e-6, atol=1e-6)
        np.testing.assert_array_equal(found[2], found[0])


def test_over_the_whole_model_the_norms_are_those_of_models(tools: ModuleType, place: Any) -> None:
    g = np.random.default_rng(6)
    tensors = [{n: g.standard_normal((5, 4)).astype(np.float32) for n in ("a", "b")} for _ in range(3)]
    base, *sources = tensors
    uris = [place.model(t) for t in tensors]
    shared = {"scope": "model", "balance": "nan", "normalize": False}
    found = tools.merge(place, tools.models("ties", uris[0], uris[1:], [{"weight": 1.0}] * 2, shared))
    deltas = [{n: twins.delta(s[n], base[n]) for n in base} for s in sources]
    whole = [np.concatenate([d[n].reshape(-1) for n in ("a", "b")]) for d in deltas]
    weights = dense.nan_weights(whole, [1.0, 1.0])
    for n in ("a", "b"):
        expected = twins.ties(base[n], [d[n] for d in deltas], weights, [1.0, 1.0], normalize=False)
        np.testing.assert_allclose(found[n].double().numpy(), expected, rtol=1e-5, atol=1e-5)


def test_a_source_that_changes_nothing_takes_no_part(tools: ModuleType, place: Any) -> None:
    d = Models(place, 7)
    manifest = tools.models("nan", d.uri, [d.uris[0], place.model({"w": d.base})], [{"weight": 1.0}] * 2)
    np.testing.assert_allclose(tools.merge_one(place, manifest), d.base + d.deltas[0], rtol=1e-6, atol=1e-6)


# ---- depth -----------------------------------------------------------------------------------------------------------


def test_lines_scales_by_depth_and_is_a_gradient_of_lambda(tools: ModuleType, place: Any) -> None:
    names = [f"model.layers.{i}.w" for i in range(4)] + ["model.norm"]
    base = place.model({n: np.zeros((3, 2)) for n in names})
    source = place.model({n: np.ones((3, 2)) for n in names})
    by_name = tools.merge(
        place, tools.models("lines", base, [source], [{"weight": 1.0}], {"alpha": 0.25, "beta": 0.75, "lambda": 2.0})
    )
    for i, name in enumerate(names[:4]):
        np.testing.assert_allclose(by_name[name].numpy(), 2.0 * (0.25 + 0.75 * i / 3), rtol=1e-6)
    np.testing.assert_allclose(by_name["model.norm"].numpy(), 0.5, rtol=1e-6)
    gradient = {"lambda": [0.5, 2.0]}
    for method in ("task_arithmetic", "ties"):
        found = tools.merge(place, tools.models(method, base, [source], [{"weight": 1.0}], gradient))
        for name in names:
            np.testing.assert_allclose(found[name].numpy(), by_name[name].numpy(), rtol=1e-6)


def test_lines_of_adapters(tools: ModuleType, place: Any) -> None:
    g = np.random.default_rng(8)
    pairs = {f"model.layers.{i}.q": (g.standard_normal((2, 5)), g.standard_normal((4, 2))) for i in range(3)}
    uri = place.adapter(pairs)
    found = tools.merge(place, tools.adapters("lines", [uri], [{}], {"alpha": 1.0, "beta": -0.5}))
    for i, (module, (a, b)) in enumerate(pairs.items()):
        got = [found[f"base_model.model.{module}.lora_{w}.weight"].double().numpy() for w in "BA"]
        np.testing.assert_allclose(got[0] @ got[1], (1 - 0.25 * i) * (b @ a), rtol=1e-5, atol=1e-5)


# ---- calibrate -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(24, 17), (9, 30), (1, 6), (6, 1)])
@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_svc_is_task_arithmetic_calibrated(tools: ModuleType, place: Any, shape: tuple[int, int], alpha: float) -> None:
    d = Models(place, 9, shape)
    merged = twins.summed(d.deltas, WEIGHTS)
    expected = d.base + 0.5 * dense.svc(merged, d.deltas, WEIGHTS, alpha)
    shared = {"lambda": 0.5, "calibrate_alpha": alpha}
    for name, more in (("svc", {}), ("task_arithmetic", {"calibrate": "svc"})):
        found = tools.merge_one(place, tools.models(name, d.uri, d.uris, d.each, {**shared, **more}))
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("method", ["ties", "magnitude_prune", "tsv_m", "wudi", "task_arithmetic"])
def test_any_method_on_models_can_be_calibrated(tools: ModuleType, place: Any, method: str) -> None:
    d = Models(place, 10)
    shared: dict[str, Any] = {"lambda": 2.0}
    if method in ("ties", "magnitude_prune"):
        shared["density"] = 0.5
    plain = tools.merge_one(place, tools.models(method, d.uri, d.uris, d.each, {**shared, "lambda": 1.0})) - d.base
    manifest = tools.models(method, d.uri, d.uris, d.each, {**shared, "calibrate": "svc"})
    expected = d.base + 2.0 * dense.svc(plain, d.deltas, WEIGHTS)
    np.testing.assert_allclose(tools.merge_one(place, manifest), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("output", [svd(17), {"kind": "model"}])
@pytest.mark.parametrize("method", ["svc", "ties", "tsv_m", "core_ties", "knots_ties"])
def test_any_method_on_adapters_can_be_calibrated(
    tools: ModuleType, place: Any, method: str, output: dict[str, Any]
) -> None:
    d = Adapters(place, 11)
    calibrate = {} if method == "svc" else {"calibrate": "svc"}
    plain = tools.merge(
        place,
        tools.adapters("task_arithmetic" if method == "svc" else method, d.uris, d.each, output=svd(17)),
    )  # fmt: skip
    expected = -0.5 * dense.svc(product(plain), d.deltas, WEIGHTS)
    manifest = tools.adapters(method, d.uris, d.each, {"lambda": -0.5, **calibrate}, base_model=d.base, output=output)
    found = tools.merge(place, manifest)
    got = found[WEIGHT].double().numpy() if "kind" in output else product(found)
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-4)


def test_what_all_sources_share_is_counted_once(tools: ModuleType, place: Any) -> None:
    d = Adapters(place, 12)
    uris = [d.uris[0]] * 3
    found = tools.merge(place, tools.adapters("svc", [uris[0]], [{}], output=svd(2)))
    np.testing.assert_allclose(product(found), d.deltas[0], rtol=1e-5, atol=1e-5)
    copies = [place.adapter({MODULE: d.pairs[0]}, scaling=2.0) for _ in range(3)]
    found = tools.merge(place, tools.adapters("svc", copies, [{}] * 3, output=svd(2)))
    np.testing.assert_allclose(product(found), d.deltas[0], rtol=1e-5, atol=1e-5)


def test_what_is_no_matrix_is_not_calibrated(tools: ModuleType, place: Any) -> None:
    for shape in ((7,), (2, 3, 4)):
        d = Models(place, 13, shape)
        plain = tools.merge_one(place, tools.models("task_arithmetic", d.uri, d.uris, d.each))
        np.testing.assert_array_equal(tools.merge_one(place, tools.models("svc", d.uri, d.uris, d.each)), plain)


def test_a_calibrated_merge_needs_and_declares_whole_tensors(tools: ModuleType, place: Any) -> None:
    d = Models(place, 14, (200, 100))
    plan = api.plan(tools.models("ties", d.uri, d.uris, d.each, {"density": 0.5, "calibrate": "svc"}), place.out())
    assert plan.tasks[0].cut == "whole"
    assert peak_bytes(plan) > 5 * 4 * 200 * 100
    outs = [place.out() for _ in range(2)]
    tools.run(tools.at(plan, outs[0]))
    tools.run(tools.at(plan, outs[1]), memory=0, workers=2)
    assert tools.read_bytes(outs[0]) == tools.read_bytes(outs[1])


@pytest.mark.parametrize("method", ["svc", "nan"])
def test_what_is_no_number_ends_the_merge(tools: ModuleType, place: Any, method: str) -> None:
    d = Models(place, 15)
    broken = d.base.copy()
    broken[1, 1] = np.nan
    with pytest.raises(MergeFailedError) as caught:
        tools.merge(place, tools.models(method, d.uri, [d.uris[0], place.model({"w": broken})], d.each[:2]))
    assert [p.code for p in caught.value.problems] == ["not-finite"]


# ---- the manifest ----------------------------------------------------------------------------------------------------


def test_which_methods_take_the_wrappers() -> None:
    for spec in METHODS.values():
        names = {p.name for p in (*spec.parameters, *wrappers_for(spec))}
        on_deltas = spec.closed_on_deltas and spec.spaces[0] != "weight"
        assert ("calibrate" in names) == (on_deltas and not spec.flat)
        assert ("balance" in names) == (on_deltas and spec.parameter("weight") is not None)


def test_wrappers_are_parameters_like_others() -> None:
    document = {"merge_method": "ties", "base_model": "o/base", "adapters": [{"adapter": "o/a"}],
                "parameters": {"balance": "nan", "calibrate": "svc", "calibrate_alpha": 0.5}}  # fmt: skip
    manifest = load_manifest(document)
    assert load_manifest(manifest.resolved()) == manifest
    for name, value in (("balance", "norm"), ("calibrate", True), ("calibrate_alpha", 0.0)):
        with pytest.raises(ManifestError):
            load_manifest({**document, "parameters": {name: value}})
    with pytest.raises(ManifestError):
        load_manifest({**document, "merge_method": "linear"})


def test_a_calibrated_merge_is_no_concatenation(tools: ModuleType, place: Any) -> None:
    d = Adapters(place, 16)
    for method, shared in (("svc", {}), ("task_arithmetic", {"calibrate": "svc"}), ("cat", {"calibrate": "svc"})):
        plan = api.plan(tools.adapters(method, d.uris, d.each, shared, output={"store": "concat"}), place.out())
        assert [p.code for p in plan.problems] == ["bad-store"]
