"""Methods that form nothing but linear combinations of the sources: adapters need no dense delta for them."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from merger import api
from merger.planning.memory import peak_bytes
from merger.planning.summary import passes

F64 = npt.NDArray[np.float64]

MODULE = "model.layers.0.q_proj"
WEIGHT = f"{MODULE}.weight"
CASES: dict[str, dict[str, Any]] = {
    "nuslerp": {}, "multislerp": {}, "model_stock": {}, "multislerp balanced": {"balance": "nan"},
}  # fmt: skip

own = importlib.import_module("tests.reference_gram")


class Adapters:
    """Two adapters that have much in common, with factors of unlike ranks."""

    def __init__(self, place: Any, seed: int, rows: int = 24, cols: int = 17) -> None:
        g = np.random.default_rng(seed)
        a, b = g.standard_normal((2, cols)), g.standard_normal((rows, 2))
        more = g.standard_normal((1, cols)), g.standard_normal((rows, 1))
        self.pairs = [
            (a.astype(np.float32), (b + 0.3 * g.standard_normal(b.shape)).astype(np.float32)),
            (np.concatenate([a, more[0]]).astype(np.float32), np.concatenate([b, more[1]], axis=1).astype(np.float32)),
        ]
        self.uris = [place.adapter({MODULE: p}, scaling=s) for p, s in zip(self.pairs, (2.0, -0.5), strict=True)]
        self.deltas = [s * (b.astype(np.float64) @ a) for (a, b), s in zip(self.pairs, (2.0, -0.5), strict=True)]


def product(factors: dict[str, torch.Tensor]) -> F64:
    a, b = (factors[f"base_model.model.{MODULE}.lora_{which}.weight"].double().numpy() for which in "AB")
    found: F64 = b @ a
    return found


def manifest(tools: ModuleType, case: str, uris: list[str], **keys: Any) -> Any:
    method = case.split(maxsplit=1)[0]
    each = {} if method == "model_stock" else {"weight": 0.8}
    return tools.adapters(method, uris, [each] * len(uris), CASES[case], **keys)


@pytest.mark.parametrize("case", CASES)
def test_the_factors_give_what_the_dense_delta_gives(tools: ModuleType, place: Any, case: str) -> None:
    d = Adapters(place, 1)
    stores: list[Any] = [
        {"svd": {"rank": 17, "exact": True}}, "concat", None, {"svd": {"rank": 5}}, {"svd": {"energy": 1.0}},
    ]  # fmt: skip
    dense, *others = [
        product(tools.merge(place, manifest(tools, case, d.uris, **({"output": {"store": s}} if s else {}))))
        for s in stores
    ]
    for found in others:
        np.testing.assert_allclose(found, dense, rtol=1e-5, atol=1e-5 * np.abs(dense).max())


def test_model_stock_of_adapters_by_its_twin(tools: ModuleType, place: Any) -> None:
    d = Adapters(place, 2)
    expected = own.model_stock(np.zeros((24, 17)), d.deltas)
    found = product(tools.merge(place, manifest(tools, "model_stock", d.uris)))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_no_dense_delta_is_planned_for(tools: ModuleType, place: Any) -> None:
    g = np.random.default_rng(3)
    uris = [place.adapter({MODULE: (g.standard_normal((2, 900)), g.standard_normal((800, 2)))}) for _ in range(2)]
    plan = api.plan(manifest(tools, "multislerp", uris), place.out())
    assert plan.tasks[0].results[0].store.kind == "concat"
    assert passes(plan) == 1
    assert peak_bytes(plan) < 4 * 800 * 900
    tools.run(plan, memory=peak_bytes(plan))


def test_rows_that_are_turned_one_by_one_are_no_such_combination(tools: ModuleType, place: Any) -> None:
    d = Adapters(place, 4)
    for method, shared in (("nuslerp", {"nuslerp_flatten": False}), ("model_stock", {"filter_wise": True})):
        each = {} if method == "model_stock" else {"weight": 1.0}
        document = tools.adapters(method, d.uris, [each] * 2, shared, output={"store": "concat"})
        assert [p.code for p in api.plan(document, place.out()).problems] == ["bad-store"]


# ---- what the end of a merge says of model_stock ---------------------------------------------------------------------


def said(tools: ModuleType, place: Any, document: Any) -> list[str]:
    return [w.code for w in tools.run(api.plan(document, place.out())).warnings]


def test_model_stock_of_unrelated_adapters_says_that_it_went_back_to_the_base(tools: ModuleType, place: Any) -> None:
    g = np.random.default_rng(5)
    uris = [place.adapter({MODULE: (g.standard_normal((4, 300)), g.standard_normal((300, 4)))}) for _ in range(3)]
    base = place.model({WEIGHT: np.zeros((300, 300))})
    assert "near-base" in said(tools, place, manifest(tools, "model_stock", uris))
    fold = manifest(tools, "model_stock", uris, base_model=base, output={"kind": "model"})
    assert "near-base" in said(tools, place, fold)
    twice = manifest(tools, "model_stock", [uris[0], uris[0]])
    assert "near-base" not in said(tools, place, twice)
    assert "near-base" not in said(tools, place, manifest(tools, "multislerp", uris))


# ---- stacks of matrices, and the core of a fold ----------------------------------------------------------------------


def test_packed_experts_under_a_method_on_singular_vectors_are_named(tools: ModuleType, place: Any) -> None:
    tensors = {"experts": (3, 4, 5), "w": (4, 5), "norm": (5,)}
    uris = [place.model({n: np.full(s, i + 1.0) for n, s in tensors.items()}) for i in range(3)]
    each = [{"weight": 1.0}] * 2
    (warning,) = api.plan(tools.models("tsv_m", uris[0], uris[1:], each), place.out()).warnings
    assert (warning.code, warning.where) == ("no-matrix", "experts")
    assert api.plan(tools.models("ties", uris[0], uris[1:], each), place.out()).warnings == ()


def test_a_fold_may_be_merged_in_the_core(tools: ModuleType, place: Any) -> None:
    g = np.random.default_rng(6)
    pairs = [(g.standard_normal((2, 9)).astype(np.float32), g.standard_normal((12, 2)).astype(np.float32))
             for _ in range(3)]  # fmt: skip
    uris = [place.adapter({MODULE: p}) for p in pairs]
    weight = g.standard_normal((12, 9)).astype(np.float32)
    base = place.model({WEIGHT: weight, "norm": np.ones(3)})
    shared = {"density": 0.4, "elect": "unweighted", "divisor": "count"}
    for space in ("core", None):
        document = tools.adapters("ties", uris, [{}] * 3, shared, **({"space": space} if space else {}))
        merged = product(tools.merge(place, {**document, "output": {"store": {"svd": {"rank": 9}}}}))
        fold = tools.merge(place, {**document, "base_model": base, "output": {"kind": "model"}})
        np.testing.assert_allclose(fold[WEIGHT].numpy() - weight, merged, rtol=1e-4, atol=1e-5)
        if space:
            in_core = merged
    named = tools.adapters("core_ties", uris, [{}] * 3, {"density": 0.4}, output={"store": {"svd": {"rank": 6}}})
    np.testing.assert_allclose(in_core, product(tools.merge(place, named)), rtol=1e-4, atol=1e-5)
    assert np.abs(in_core - merged).max() > 0.1


def test_the_core_of_whole_models_is_refused(tools: ModuleType, place: Any) -> None:
    uris = [place.model({"w": np.full((3, 3), float(i))}) for i in range(3)]
    for method in ("ties", "tsv_m"):
        document = tools.models(method, uris[0], uris[1:], [{"weight": 1.0}] * 2, space="core")
        assert {p.code for p in api.plan(document, place.out()).problems} == {"bad-space"}
    pair = (np.ones((1, 3)), np.ones((3, 1)))
    fold = {"merge_method": "ties", "space": "core", "parameters": {"scope": "model", "density": 0.5},
            "base_model": uris[0], "output": {"kind": "model"},
            "adapters": [{"adapter": place.adapter({"w": pair})}]}  # fmt: skip
    fold["base_model"] = place.model({"w.weight": np.ones((3, 3))})
    assert {p.code for p in api.plan(fold, place.out()).problems} == {"bad-space"}
