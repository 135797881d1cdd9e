"""Adapters into an adapter: every store and every one of PEFT's types equals its slow twin."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from merger import api

Array = npt.NDArray[Any]
Pairs = dict[str, tuple[Array, Array]]

with_place = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)
MODULE = "model.layers.0.q_proj"
FACTORS = {which: f"base_model.model.{MODULE}.lora_{which}.weight" for which in "AB"}


def pair(g: np.random.Generator, rows: int, cols: int, rank: int) -> tuple[Array, Array]:
    a, b = g.standard_normal((rank, cols)), g.standard_normal((rows, rank))
    return a.astype(np.float32), b.astype(np.float32)


def product(factors: dict[str, torch.Tensor], module: str = MODULE) -> Array:
    a, b = (factors[f"base_model.model.{module}.lora_{which}.weight"].double().numpy() for which in "AB")
    found: Array = b @ a
    return found


def dense(p: tuple[Array, Array], scaling: float) -> Array:
    """B·A as the fold makes it: float32, then read as float64."""
    found: Array = (np.float32(scaling) * (p[1] @ p[0])).astype(np.float64)
    return found


class Two:
    """Three adapters of one module with different ranks and scalings."""

    def __init__(
        self, place: Any, seed: int, rows: int = 24, cols: int = 17, ranks: tuple[int, ...] = (2, 3, 1)
    ) -> None:
        g = np.random.default_rng(seed)
        self.rows, self.cols = rows, cols
        self.scalings = [2.0, 0.5, 1.25][: len(ranks)]
        self.pairs = [pair(g, rows, cols, r) for r in ranks]
        self.uris = [place.adapter({MODULE: p}, scaling=s) for p, s in zip(self.pairs, self.scalings, strict=True)]
        self.deltas = [dense(p, s) for p, s in zip(self.pairs, self.scalings, strict=True)]


SHAPES = [(24, 17), (5, 40), (40, 5), (1, 9), (9, 1), (1, 1), (3, 3)]


@pytest.mark.parametrize("rows, cols", SHAPES)
def test_concat_is_exact(twins: Any, tools: ModuleType, place: Any, rows: int, cols: int) -> None:
    d = Two(place, 1, rows, cols)
    weights = [0.7, -1.5, 0.0]
    each = [{"weight": w} for w in weights]
    for method, shared, factor in (("task_arithmetic", {"lambda": 0.5}, 0.5), ("linear", {}, 1 / sum(weights))):
        found = tools.merge(place, tools.adapters(method, d.uris, each, shared, output={"store": "concat"}))
        a, b = twins.concat(d.pairs, [w * factor for w in weights], d.scalings)
        np.testing.assert_allclose(found[FACTORS["A"]].numpy(), a, rtol=1e-6)
        np.testing.assert_array_equal(found[FACTORS["B"]].numpy(), b)


@pytest.mark.parametrize("rows, cols", SHAPES)
@pytest.mark.parametrize("rank", [1, 2, 6, 50])
def test_svd_is_the_best_of_its_rank(
    twins: Any, tools: ModuleType, place: Any, rows: int, cols: int, rank: int
) -> None:
    d = Two(place, 2, rows, cols)
    weights = [0.7, -1.5, 1.0]
    manifest = tools.adapters(
        "svd", d.uris, [{"weight": w} for w in weights], output={"store": {"svd": {"rank": rank}}}
    )
    out = place.out()
    report = tools.run(api.plan(manifest, out))
    found = tools.read_tensors(out)
    total = twins.summed(d.deltas, weights)
    keep = min(rank, rows, cols, 6)
    a, b, s = twins.svd(total, keep)
    assert found[FACTORS["A"]].shape == (keep, cols)
    np.testing.assert_allclose(product(found), b @ a, rtol=1e-5, atol=1e-5 * s[0])
    lost = 1 - float((s[:keep] ** 2).sum() / (s**2).sum())
    assert report.energy_lost == pytest.approx(max(0.0, lost), abs=1e-6)
    if keep <= 2:  # distinct singular values: the factors themselves, signs too
        np.testing.assert_allclose(found[FACTORS["A"]].numpy(), a, rtol=1e-4, atol=1e-5 * s[0])
        np.testing.assert_allclose(found[FACTORS["B"]].numpy(), b, rtol=1e-4, atol=1e-5 * s[0])


@with_place
@given(data=st.data())
def test_elementwise_methods_work_on_whole_deltas(
    twins: Any, tools: ModuleType, place: Any, data: st.DataObject
) -> None:
    """Small whole factors, so that products, trims and votes are exact; at full rank the store loses nothing."""
    rows, cols = data.draw(st.sampled_from([(4, 4), (3, 7), (6, 2), (1, 5), (5, 1)]))
    method = data.draw(st.sampled_from(["ties", "magnitude_prune", "dare_linear", "dare_ties"]))
    ranks = [data.draw(st.integers(1, 3)) for _ in range(2)]
    pairs = [(data.draw(tools.grid((r, cols), bound=2)), data.draw(tools.grid((rows, r), bound=2))) for r in ranks]
    weights = [data.draw(tools.weights) for _ in range(2)]
    density = data.draw(tools.densities)
    uris = [place.adapter({MODULE: p}, scaling=s) for p, s in zip(pairs, (2.0, 1.0), strict=True)]
    shared = {"density": density, **({"rescale": "none"} if method.startswith("dare") else {})}
    manifest = tools.adapters(
        method, uris, [{"weight": w} for w in weights], shared, output={"store": {"svd": {"rank": min(rows, cols)}}}
    )
    deltas = [dense(p, s) for p, s in zip(pairs, (2.0, 1.0), strict=True)]
    zero, densities = np.zeros((rows, cols)), [density] * 2
    if method == "ties":
        expected = twins.ties(zero, deltas, weights, densities)
    elif method == "magnitude_prune":
        expected = twins.magnitude_prune(zero, deltas, weights, densities)
    else:
        keys = [twins.key_of(0, i, f"{MODULE}.weight", "delta") for i in range(2)]
        expected = twins.dare(zero, deltas, weights, densities, keys, elects=method == "dare_ties", rescale="none")
    np.testing.assert_allclose(product(tools.merge(place, manifest)), expected, rtol=1e-5, atol=2e-6 * 8)


def test_a_module_that_an_adapter_lacks_is_zero_and_counts(twins: Any, tools: ModuleType, place: Any) -> None:
    g = np.random.default_rng(3)
    shared, alone = pair(g, 6, 5, 2), pair(g, 4, 3, 2)
    both = place.adapter({"a": shared, "b": alone})
    one = place.adapter({"a": shared})
    each = [{"weight": 1.0}, {"weight": 3.0}]
    found = tools.merge(place, tools.adapters("linear", [both, one], each))
    np.testing.assert_allclose(product(found, "a"), dense(shared, 1.0), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(product(found, "b"), dense(alone, 1.0) / 4, rtol=1e-5, atol=1e-5)
    found = tools.merge(place, tools.adapters("ties", [both, one], each, {"elect": "unweighted"}))
    np.testing.assert_allclose(product(found, "b"), dense(alone, 1.0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("store", ["concat", "svd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_adapter_at_weight_one_is_itself(tools: ModuleType, place: Any, store: str, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(5)
    a, b = torch.randn(4, 30, generator=g).to(dtype), torch.randn(20, 4, generator=g).to(dtype)
    uri = place.adapter({MODULE: (a, b)})
    wanted: Any = "concat" if store == "concat" else {"svd": {"rank": 4}}
    found = tools.merge(place, tools.adapters("task_arithmetic", [uri], [{"weight": 1.0}], output={"store": wanted}))
    assert found[FACTORS["A"]].dtype == dtype
    if store == "concat":
        assert torch.equal(found[FACTORS["A"]], a)
        assert torch.equal(found[FACTORS["B"]], b)
    else:
        step = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
        np.testing.assert_allclose(product(found), b.double().numpy() @ a.double().numpy(), atol=20 * step)


def test_factors_are_rounded_once(tools: ModuleType, place: Any) -> None:
    d = Two(place, 6)
    manifest = tools.adapters("svd", d.uris, [{}] * 3, output={"store": {"svd": {"rank": 3}}})
    exact = tools.merge(place, {**manifest, "dtype": "float32"})
    for name in ("float16", "bfloat16"):
        rounded = tools.merge(place, {**manifest, "out_dtype": name})
        for key, value in exact.items():
            # float64 factors are rounded to the output's dtype directly; through float32 they may differ by one step.
            np.testing.assert_allclose(
                rounded[key].double().numpy(), value.to(rounded[key].dtype).double().numpy(), rtol=1e-2
            )
            assert (rounded[key] == value.to(rounded[key].dtype)).float().mean() > 0.99


# ---- other factors of the same deltas --------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["svd", "cat", "ties", "dare_ties", "magnitude_prune"])
def test_other_factors_of_the_same_delta_change_nothing(tools: ModuleType, place: Any, method: str) -> None:
    g = np.random.default_rng(7)
    pairs = [pair(g, 20, 15, 3) for _ in range(2)]
    # Powers of two: A and B change, and not one bit of their product.
    scales = [2.0 ** g.integers(-3, 4, 3) * g.choice([-1, 1], 3) for _ in range(2)]
    changed = [
        ((a / s[:, None]).astype(np.float32), (b * s).astype(np.float32))
        for (a, b), s in zip(pairs, scales, strict=True)
    ]
    shared = {} if method in ("svd", "cat") else {"density": 0.5}
    found = [
        tools.merge(
            place,
            tools.adapters(
                method, [place.adapter({MODULE: p}) for p in some], [{"weight": 0.5}, {"weight": 2.0}], shared
            ),
        )
        for some in (pairs, changed)
    ]
    if method in ("svd", "cat"):
        np.testing.assert_allclose(product(found[0]), product(found[1]), rtol=1e-5, atol=1e-5)
    else:  # the dense delta is the same, and so is all that follows
        for name, value in found[0].items():
            assert torch.equal(value, found[1][name])


@pytest.mark.parametrize("method", ["svd", "cat", "linear"])
def test_any_gauge_changes_nothing(tools: ModuleType, place: Any, method: str) -> None:
    g = np.random.default_rng(8)
    pairs = [pair(g, 20, 15, 3) for _ in range(2)]
    changed = []
    for a, b in pairs:
        gauge = g.standard_normal((3, 3)) + 2 * np.eye(3)
        changed.append((np.linalg.solve(gauge, a).astype(np.float32), (b @ gauge).astype(np.float32)))
    found = [
        product(
            tools.merge(
                place, tools.adapters(method, [place.adapter({MODULE: p}) for p in some], [{"weight": 1.5}] * 2)
            )
        )
        for some in (pairs, changed)
    ]
    np.testing.assert_allclose(found[0], found[1], rtol=1e-4, atol=1e-4)


def test_signs_and_order_of_an_svd_are_fixed(tools: ModuleType, place: Any) -> None:
    g = np.random.default_rng(9)
    a, b = pair(g, 12, 9, 3)
    found = [
        tools.merge(place, tools.adapters("svd", [place.adapter({MODULE: p})], [{}]))
        for p in ((a, b), (-a, -b), (a[::-1].copy(), b[:, ::-1].copy()))
    ]
    for other in found[1:]:
        for name, value in found[0].items():
            np.testing.assert_allclose(value.numpy(), other[name].numpy(), rtol=1e-4, atol=1e-5)


# ---- PEFT's types ----------------------------------------------------------------------------------------------------


def peft(kind: str, uris: list[str], weights: list[float], **keys: Any) -> dict[str, Any]:
    return {"combination_type": kind, "adapters": [{"adapter": u} for u in uris], "weights": weights, **keys}


@pytest.mark.parametrize("kind", ["linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"])
@pytest.mark.parametrize("majority", ["total", "frequency"])
@pytest.mark.parametrize("density", [0.3, 0.7, 1.0])
def test_peft_merges_of_factors(
    twins: Any, tools: ModuleType, place: Any, kind: str, majority: str, density: float
) -> None:
    d = Two(place, 10, ranks=(3, 3, 3))
    weights = [0.7, -1.5, 0.4]
    keys: dict[str, Any] = {} if kind == "linear" else {"density": density}
    if kind.endswith("ties"):
        keys["majority_sign_method"] = majority
    found = tools.merge(place, peft(kind, d.uris, weights, **keys))
    for at, which in enumerate("AB"):
        expected = twins.peft_factor(
            kind, which, [p[at] for p in d.pairs], [w * s for w, s in zip(weights, d.scalings, strict=True)],
            density=density, majority=majority, keys=[twins.key_of(0, i, FACTORS[which], which) for i in range(3)],
        )  # fmt: skip
        np.testing.assert_allclose(found[FACTORS[which]].numpy(), expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("kind", ["svd", "cat", "ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd"])
def test_peft_merges_of_deltas(twins: Any, tools: ModuleType, place: Any, kind: str) -> None:
    d = Two(place, 11, 8, 7)
    weights, density = [0.7, -1.5, 0.4], 0.5
    keys: dict[str, Any] = {} if kind in ("svd", "cat") else {"density": density}
    if kind != "cat":
        keys["svd_rank"] = 7
    found = tools.merge(place, peft(kind, d.uris, weights, **keys))
    hashes = [twins.key_of(0, i, FACTORS["A"], "A") for i in range(3)]
    ready = d.deltas
    if kind.startswith(("ties", "magnitude")):
        ready = [twins.trim(x, density, keep_one=False) for x in ready]
    elif kind.startswith("dare"):
        ready = [twins.drop(x, density, k) / density for x, k in zip(ready, hashes, strict=True)]
    if "ties" in kind:
        expected = twins.elected(ready, weights, by="unweighted", divisor="count", normalize=True)
    else:
        expected = twins.summed(ready, weights)
    np.testing.assert_allclose(product(found), expected, rtol=1e-4, atol=1e-4)


def test_a_clamped_svd_limits_both_factors_together(twins: Any, tools: ModuleType, place: Any) -> None:
    d = Two(place, 12, 8, 7, ranks=(2, 2))
    found = tools.merge(place, peft("svd", d.uris, [1.0, 1.0], svd_rank=3, svd_clamp=0.8))
    a, b, s = twins.svd(twins.summed(d.deltas, [1.0, 1.0]), 3)
    root = np.sqrt(s[:3])
    a, b = a / root[:, None], b * root  # PEFT's B = U·S, A = Vᵀ
    # The quantile is of signed values, so it hangs on the signs of the singular vectors: ours are fixed.
    high = np.quantile(np.concatenate([b.reshape(-1), a.reshape(-1)]), 0.8)
    for which, value in (("B", b), ("A", a)):
        np.testing.assert_allclose(found[FACTORS[which]].numpy(), np.clip(value, -high, high), rtol=1e-4, atol=1e-5)
