"""KnOTS: the rule on the joint right singular vectors, exact from the core."""

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
from merger.methods.rounds import Call
from merger.planning.memory import peak_bytes
from tests.merger.methods.cores import F64, WEIGHTS, Pair, call_of, draw, in_core

MODULE = "model.layers.0.q_proj"
SHAPES = [(30, 20), (4, 40), (40, 4), (5, 5), (1, 9), (9, 1), (1, 1)]
NAMES = ["knots_ties", "knots_dare"]

twins = importlib.import_module("tests.reference")
dense = importlib.import_module("tests.reference_spectral")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As in a worker: bits hang on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def by_definition(call: Call, pairs: Sequence[Pair]) -> F64:
    u, s, parts = dense.joint_svd([b @ a for a, b in pairs])
    density, ready = call.densities[0], []
    for v, key in zip(parts, call.keys, strict=True):
        if call.prepare == "trim":
            left = twins.trim(v, density)
        else:
            left = twins.drop(v.reshape(-1), density, key).reshape(v.shape)
        ready.append(twins.rescaled(v, left, density, call.rescale))
    rows = twins.elected(ready, call.weights, by=call.elect, divisor=call.divisor, normalize=call.normalize)
    found: F64 = u @ (s[:, None] * rows)
    return found


def relative(found: F64, expected: F64) -> float:
    return float(np.linalg.norm(found - expected) / max(float(np.linalg.norm(expected)), 1e-300))


@pytest.mark.parametrize("rows, cols", SHAPES)
@pytest.mark.parametrize(
    "options", [{}, {"elect": "weighted", "divisor": "weights"}, {"rescale": "l1"}, {"density": 1.0}, {"density": 0.05}]
)
@pytest.mark.parametrize("name", NAMES)
def test_the_core_gives_what_the_joint_svd_gives(name: str, rows: int, cols: int, options: dict[str, Any]) -> None:
    pairs, call = draw(1, rows, cols), call_of(name, 3, **options)
    assert relative(in_core(call, pairs), by_definition(call, pairs)) < 1e-10


@pytest.mark.parametrize("name", NAMES)
def test_any_gauge_gives_the_same(name: str) -> None:
    g = np.random.default_rng(2)
    pairs, turned = draw(2, 30, 20), []
    for a, b in pairs:
        gauge = g.standard_normal((len(a), len(a))) + 2 * np.eye(len(a))
        turned.append((np.linalg.solve(gauge, a), b @ gauge))
    assert relative(in_core(call_of(name, 3), turned), in_core(call_of(name, 3), pairs)) < 1e-10


def test_the_order_of_adapters_matters_not() -> None:
    pairs, call = draw(3, 30, 20), call_of("knots_ties", 3)
    for order in ((2, 0, 1), (1, 0, 2)):
        moved = replace(call, weights=tuple(WEIGHTS[i] for i in order))
        assert relative(in_core(moved, [pairs[i] for i in order]), in_core(call, pairs)) < 1e-10


@pytest.mark.parametrize("name", NAMES)
def test_float32_factors_and_float64_factors_agree(name: str) -> None:
    pairs = draw(4, 48, 40, (4, 4, 4))
    rounded = [(a.astype(np.float32), b.astype(np.float32)) for a, b in pairs]
    assert relative(in_core(call_of(name, 3), rounded), in_core(call_of(name, 3), pairs)) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_one_adapter_at_weight_one_is_itself(name: str) -> None:
    ((a, b),) = draw(5, 30, 20, (4,))
    assert relative(in_core(call_of(name, 1, 1.0), [(a, b)]), b @ a) < 1e-12


@pytest.mark.parametrize("name", NAMES)
def test_without_trim_and_election_it_is_a_plain_sum(name: str) -> None:
    pairs = draw(6, 30, 20)
    call = call_of(name, 3, 1.0, combine="sum", normalize=False)
    expected = sum(w * b @ a for w, (a, b) in zip(WEIGHTS, pairs, strict=True))
    assert relative(in_core(call, pairs), np.asarray(expected)) < 1e-12


@pytest.mark.parametrize("name", NAMES)
def test_zero_adapters_merge_to_zero(name: str) -> None:
    assert not in_core(call_of(name, 3), [(a * 0, b) for a, b in draw(7, 9, 6)]).any()


@pytest.mark.parametrize("kind", ["adapter", "model"])
@pytest.mark.parametrize("name", NAMES)
def test_merges_of_adapters(tools: ModuleType, place: Any, name: str, kind: str) -> None:
    pairs = [(a.astype(np.float32), b.astype(np.float32)) for a, b in draw(8, 30, 20)]
    uris = [place.adapter({MODULE: p}, scaling=0.5) for p in pairs]
    base = place.model({f"{MODULE}.weight": np.zeros((30, 20))})
    output: dict[str, Any] = {"kind": kind, **({"store": "concat"} if kind == "adapter" else {})}
    manifest = tools.adapters(name, uris, [{"weight": w} for w in WEIGHTS], {"density": 0.4, "lambda": 2.0},
                              base_model=base, output=output)  # fmt: skip
    plan = api.plan(manifest, place.out())
    tools.run(plan, memory=peak_bytes(plan))
    found = tools.read_tensors(plan.outputs[0].path)
    keys = tuple(twins.key_of(0, i, f"{MODULE}.weight", "delta") for i in range(3))
    expected = 2.0 * by_definition(call_of(name, 3, keys=keys), [(a, b.astype(np.float64) / 2) for a, b in pairs])
    if kind == "model":
        got = found[f"{MODULE}.weight"].double().numpy()
    else:
        a, b = (found[f"base_model.model.{MODULE}.lora_{which}.weight"].double().numpy() for which in "AB")
        got = b @ a
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
