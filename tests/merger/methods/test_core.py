"""Elementwise methods in the core of adapters: coordinates that the deltas alone decide."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from merger import api
from merger.manifest import load_manifest
from merger.methods import METHODS, lowrank
from merger.methods.core import largest
from merger.planning.summary import passes
from tests.merger.methods.cores import F64, WEIGHTS, Pair, call_of, draw, in_core

MODULE = "model.layers.0.q_proj"
SHAPES = [(30, 20), (4, 40), (40, 4), (5, 5), (1, 9), (9, 1), (1, 1)]

twins = importlib.import_module("tests.reference")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As in a worker: bits hang on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def relative(found: F64, expected: F64) -> float:
    return float(np.linalg.norm(found - expected) / max(float(np.linalg.norm(expected)), 1e-300))


def turned(pairs: Sequence[Pair], seed: int = 0) -> list[Pair]:
    g = np.random.default_rng(seed)
    made = []
    for a, b in pairs:
        gauge = g.standard_normal((len(a), len(a))) + 2 * np.eye(len(a))
        made.append((np.linalg.solve(gauge, a), b @ gauge))
    return made


# ---- the dense definition --------------------------------------------------------------------------------------------

OPTIONS: list[dict[str, Any]] = [
    {}, {"elect": "weighted", "divisor": "weights"}, {"normalize": False}, {"rescale": "l1"}, {"density": 1.0},
    {"density": 0.0}, {"density": 0.01},
]  # fmt: skip


@pytest.mark.parametrize("rows, cols", SHAPES)
@pytest.mark.parametrize("options", OPTIONS)
def test_core_ties_is_ties_on_the_dense_coordinates(rows: int, cols: int, options: dict[str, Any]) -> None:
    pairs = draw(1, rows, cols)
    call = call_of("core_ties", 3, **options)
    left, right, cores = twins.cores(pairs)
    density = call.densities[0]
    ready = [twins.rescaled(m, twins.trim(m, density), density, call.rescale) for m in cores]
    merged = twins.elected(ready, WEIGHTS, by=call.elect, divisor=call.divisor, normalize=call.normalize)
    assert relative(in_core(call, pairs), left @ merged @ right.T) < 1e-10


@pytest.mark.parametrize("rows, cols", SHAPES)
@pytest.mark.parametrize("rescale", ["inverse", "l1", "none"])
def test_core_dare_ties_drops_by_the_coordinates_place(rows: int, cols: int, rescale: str) -> None:
    pairs = draw(2, rows, cols)
    call = call_of("core_dare_ties", 3, rescale=rescale)
    left, right, cores = twins.cores(pairs)
    ready = [
        twins.rescaled(m, twins.drop(m.reshape(-1), 0.4, k).reshape(m.shape), 0.4, rescale)
        for m, k in zip(cores, call.keys, strict=True)
    ]
    merged = twins.elected(ready, WEIGHTS, by="unweighted", divisor="count")
    assert relative(in_core(call, pairs), left @ merged @ right.T) < 1e-10


# ---- nothing but the deltas ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["core_ties", "core_dare_ties"])
def test_any_gauge_gives_the_same(name: str) -> None:
    for seed in range(5):
        pairs = draw(seed, 30, 20)
        assert relative(in_core(call_of(name, 3), turned(pairs, seed)), in_core(call_of(name, 3), pairs)) < 1e-10


def test_the_plain_core_of_a_qr_would_not() -> None:
    pairs = draw(3, 30, 20)
    block = METHODS["core_ties"].core
    assert block is not None

    def naive(some: Sequence[Pair]) -> F64:
        core = lowrank.build_core([(torch.from_numpy(a), torch.from_numpy(b)) for a, b in some])
        merged = twins.elected([twins.trim(m.numpy(), 0.4) for m in core.cores], WEIGHTS, by="unweighted")
        found: F64 = core.left_mR.numpy() @ merged @ core.right_nR.numpy().T
        return found

    assert relative(naive(turned(pairs)), naive(pairs)) > 0.05


def test_the_order_of_adapters_matters_not() -> None:
    pairs, call = draw(4, 30, 20), call_of("core_ties", 3)
    expected = in_core(call, pairs)
    for order in ((2, 0, 1), (1, 0, 2)):
        moved = replace(call, weights=tuple(WEIGHTS[i] for i in order))
        assert relative(in_core(moved, [pairs[i] for i in order]), expected) < 1e-10


def test_float32_factors_and_float64_factors_agree() -> None:
    pairs = draw(5, 48, 40, (4, 4, 4))
    rounded = [(a.astype(np.float32), b.astype(np.float32)) for a, b in pairs]
    for name in ("core_ties", "core_dare_ties"):
        assert relative(in_core(call_of(name, 3), rounded), in_core(call_of(name, 3), pairs)) < 1e-5


@pytest.mark.parametrize("name", ["core_ties", "core_dare_ties"])
def test_one_adapter_at_weight_one_is_itself(name: str) -> None:
    ((a, b),) = draw(6, 30, 20, (4,))
    assert relative(in_core(call_of(name, 1, 1.0), [(a, b)]), b @ a) < 1e-12


def test_scale_goes_through() -> None:
    pairs, call = draw(7, 30, 20), call_of("core_ties", 3)
    for factor in (1e-18, 1e18):
        scaled = [(a, b * factor) for a, b in pairs]
        assert relative(in_core(call, scaled) / factor, in_core(call, pairs)) < 1e-10


def test_zero_adapters_merge_to_zero() -> None:
    pairs = [(a * 0, b) for a, b in draw(8, 9, 6)]
    assert not in_core(call_of("core_ties", 3), pairs).any()


def test_adapters_that_share_nothing_do_not_vote_on_each_other() -> None:
    """Their cores are zero where the other's are not: roundings there must not count as agreeing."""
    g = np.random.default_rng(9)
    rotation_m, rotation_n = (np.linalg.qr(g.standard_normal((n, n)))[0] for n in (30, 20))
    first = (rotation_n[:3] * [[3.0], [2.0], [1.0]], rotation_m[:, :3])
    second = (rotation_n[3:6] * [[2.5], [1.5], [0.5]], rotation_m[:, 3:6])
    call = call_of("core_ties", 2, 1.0, weights=(1.0, 1.0))
    expected = first[1] @ first[0] + second[1] @ second[0]
    assert relative(in_core(call, [first, second]), expected) < 1e-10


def test_exactly_k_stay_and_of_equals_the_first() -> None:
    x = np.array([1.0, -2.0, 2.0, 2.0, 0.0, -2.0, 3.0])
    assert largest(x, 3).tolist() == [0.0, -2.0, 2.0, 0.0, 0.0, 0.0, 3.0]
    assert largest(x, 0).tolist() == [0.0] * 7
    assert largest(x, 7) is x
    for count in range(8):
        assert np.count_nonzero(largest(np.ones(7), count)) == count


# ---- through plans and runs ------------------------------------------------------------------------------------------


def product(factors: dict[str, torch.Tensor]) -> F64:
    a, b = (factors[f"base_model.model.{MODULE}.lora_{which}.weight"].double().numpy() for which in "AB")
    found: F64 = b @ a
    return found


@pytest.mark.parametrize("kind", ["adapter", "model"])
@pytest.mark.parametrize("name", ["core_ties", "core_dare_ties"])
def test_merges_of_adapters(tools: ModuleType, place: Any, name: str, kind: str) -> None:
    pairs = [(a.astype(np.float32), b.astype(np.float32)) for a, b in draw(10, 30, 20)]
    scalings = (2.0, 0.5, 1.0)
    uris = [place.adapter({MODULE: p}, scaling=s) for p, s in zip(pairs, scalings, strict=True)]
    base = place.model({f"{MODULE}.weight": np.zeros((30, 20))})
    output: dict[str, Any] = {"kind": kind, **({"store": "concat"} if kind == "adapter" else {})}
    manifest = tools.adapters(name, uris, [{"weight": w} for w in WEIGHTS], {"density": 0.4, "lambda": 2.0},
                              base_model=base, output=output, seed=3)  # fmt: skip
    found = tools.merge(place, manifest)
    keys = tuple(twins.key_of(3, i, f"{MODULE}.weight", "delta") for i in range(3))
    expected = 2.0 * in_core(
        call_of(name, 3, keys=keys), [(a, b.astype(np.float64) * s) for (a, b), s in zip(pairs, scalings, strict=True)]
    )
    got = product(found) if kind == "adapter" else found[f"{MODULE}.weight"].double().numpy()
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_ties_in_the_space_core_is_core_ties_with_ties_conventions(tools: ModuleType, place: Any) -> None:
    uris = [place.adapter({MODULE: p}) for p in draw(11, 30, 20)]
    options = {"density": 0.3, "elect": "weighted", "divisor": "weights"}
    named = tools.adapters("core_ties", uris, [{}] * 3, options, output={"store": {"svd": {"rank": 7}}})
    worded = load_manifest({**named, "merge_method": "ties"}).model_copy(update={"space": "core"})
    for name, value in tools.merge(place, named).items():
        assert torch.equal(value, tools.merge(place, worded)[name])


def test_other_factors_in_a_file_give_the_same_adapter(tools: ModuleType, place: Any) -> None:
    pairs = draw(12, 30, 20)
    found = [
        product(tools.merge(place, tools.adapters("core_ties", [place.adapter({MODULE: p}) for p in some], [{}] * 3,
                                                  {"density": 0.4}, output={"store": "concat"})))
        for some in (pairs, turned(pairs))
    ]  # fmt: skip
    np.testing.assert_allclose(found[0], found[1], rtol=1e-3, atol=1e-4)


def test_a_core_is_read_once(tools: ModuleType, place: Any) -> None:
    uris = [place.adapter({MODULE: p}) for p in draw(13, 30, 20)]
    options = {"density": 0.4, "rescale": "l1", "balance": "nan"}
    plan = api.plan(tools.adapters("core_ties", uris, [{}] * 3, options), place.out())
    assert (passes(plan), len(plan.units)) == (1, 1)


def test_a_core_has_no_models(tools: ModuleType, place: Any) -> None:
    uris = [place.model({"w": np.ones((3, 3)) * i}) for i in range(3)]
    for name in ("core_ties", "core_dare_ties", "core_iso", "knots_ties"):
        plan = api.plan(tools.models(name, uris[0], uris[1:], [{"weight": 1.0}] * 2), place.out())
        assert {p.code for p in plan.problems} == {"bad-space"}
