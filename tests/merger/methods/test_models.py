"""Every method on models, through real plans and runs: equal to its slow twin, whatever shape, weight or density."""

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
from merger.errors import MergeFailedError, PlanError

Array = npt.NDArray[Any]

# `place` is emptied after the test, not after each example; every example makes names of its own.
with_place = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)


def close(found: Array, expected: Array, size: float = 1.0) -> None:
    """Equal to 1e-6 of the values or, where they cancel, of what was added."""
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6 * max(size, 1.0))


class Drawn:
    """A base and K sources of one tensor, with what the manifest says of them."""

    def __init__(self, data: st.DataObject, tools: ModuleType, place: Any, *, most: int = 3) -> None:
        shape = data.draw(tools.shapes, label="shape")
        count = data.draw(st.integers(1, most), label="sources")
        self.base: Array = data.draw(tools.grid(shape))
        self.sources: list[Array] = [data.draw(tools.grid(shape)) for _ in range(count)]
        self.weights: list[float] = [data.draw(tools.weights, label="weight") for _ in range(count)]
        self.densities: list[float] = [data.draw(tools.densities, label="density") for _ in range(count)]
        self.scale: float = data.draw(tools.scales, label="lambda")
        self.base_uri = place.model({"w": self.base})
        self.uris = [place.model({"w": s}) for s in self.sources]

    def each(self, *names: str) -> list[dict[str, float]]:
        values = {"weight": self.weights, "density": self.densities}
        return [{name: values[name][i] for name in names} for i in range(len(self.sources))]


@with_place
@given(data=st.data())
def test_linear(twins: Any, tools: ModuleType, place: Any, data: st.DataObject) -> None:
    d = Drawn(data, tools, place)
    normalize = data.draw(st.booleans(), label="normalize")
    manifest = tools.models("linear", None, d.uris, d.each("weight"), {"normalize": normalize})
    if normalize and abs(sum(d.weights)) < 1e-8:
        plan = api.plan(manifest, place.out())
        assert [p.code for p in plan.problems] == ["weights-cancel"]
        with pytest.raises(PlanError, match="sum to zero"):
            tools.run(plan)
        return
    close(tools.merge_one(place, manifest), twins.linear(d.sources, d.weights, normalize=normalize), 4)


@with_place
@given(data=st.data())
def test_linear_counts_a_listed_base_as_a_source(
    twins: Any, tools: ModuleType, place: Any, data: st.DataObject
) -> None:
    d = Drawn(data, tools, place)
    manifest = tools.models("linear", d.base_uri, [d.base_uri, *d.uris], [{"weight": 4.5}, *d.each("weight")])
    if abs(4.5 + sum(d.weights)) < 1e-8:
        return
    close(tools.merge_one(place, manifest), twins.linear([d.base, *d.sources], [4.5, *d.weights]), 8)


@with_place
@given(data=st.data())
def test_task_arithmetic(twins: Any, tools: ModuleType, place: Any, data: st.DataObject) -> None:
    d = Drawn(data, tools, place)
    normalize = data.draw(st.booleans(), label="normalize")
    shared = {"lambda": d.scale, "normalize": normalize}
    found = tools.merge_one(place, tools.models("task_arithmetic", d.base_uri, d.uris, d.each("weight"), shared))
    deltas = [twins.delta(s, d.base) for s in d.sources]
    close(found, twins.task_arithmetic(d.base, deltas, d.weights, scale=d.scale, normalize=normalize), 8)


@with_place
@given(data=st.data())
def test_ties(twins: Any, tools: ModuleType, place: Any, data: st.DataObject) -> None:
    d = Drawn(data, tools, place)
    options: dict[str, Any] = {
        "elect": data.draw(st.sampled_from(["weighted", "unweighted"])),
        "divisor": data.draw(st.sampled_from(["weights", "count"])),
        "normalize": data.draw(st.booleans()),
        "rescale": data.draw(st.sampled_from(["none", "l1"])),
    }
    shared = {"lambda": d.scale, **options}
    found = tools.merge_one(place, tools.models("ties", d.base_uri, d.uris, d.each("weight", "density"), shared))
    deltas = [twins.delta(s, d.base) for s in d.sources]
    if options["rescale"] == "l1":  # a factor that is rounded can break the tie of an election
        found_ready = [twins.rescaled(x, twins.trim(x, p), p, "l1") for x, p in zip(deltas, d.densities, strict=True)]
        votes = [w * x if options["elect"] == "weighted" else x for w, x in zip(d.weights, found_ready, strict=True)]
        total = np.abs(np.sum(votes, axis=0))
        safe = (total > 1e-5) | (np.sum(np.abs(votes), axis=0) == 0)
    else:
        safe = np.ones(d.base.shape, bool)
    expected = twins.ties(d.base, deltas, d.weights, d.densities, scale=d.scale, **options)
    close(np.where(safe, found, 0), np.where(safe, expected, 0), 50)


@with_place
@given(data=st.data())
def test_ties_over_the_whole_model(twins: Any, tools: ModuleType, place: Any, data: st.DataObject) -> None:
    names = ["model.layers.0.w", "model.layers.2.w", "model.layers.10.w", "norm"]
    shapes = [data.draw(tools.shapes) for _ in names]
    count = data.draw(st.integers(1, 3))
    base, *sources = [
        {n: data.draw(tools.grid(s, bound=2)) for n, s in zip(names, shapes, strict=True)} for _ in range(count + 1)
    ]
    weights = [data.draw(tools.weights) for _ in sources]
    density = data.draw(tools.densities)
    found = tools.merge(
        place,
        tools.models(
            "ties", place.model(base), [place.model(s) for s in sources], [{"weight": w} for w in weights],
            {"density": density, "scope": "model"},
        ),
    )  # fmt: skip
    deltas = [{n: twins.delta(s[n], base[n]) for n in names} for s in sources]
    expected = twins.ties_model(base, deltas, weights, [density] * count)
    for name in names:
        close(found[name].double().numpy(), expected[name], 8)


@with_place
@given(data=st.data())
def test_magnitude_prune(twins: Any, tools: ModuleType, place: Any, data: st.DataObject) -> None:
    d = Drawn(data, tools, place)
    shared = {"lambda": d.scale, "rescale": data.draw(st.sampled_from(["none", "l1", "inverse"]))}
    manifest = tools.models("magnitude_prune", d.base_uri, d.uris, d.each("weight", "density"), shared)
    deltas = [twins.delta(s, d.base) for s in d.sources]
    expected = twins.magnitude_prune(
        d.base, deltas, d.weights, d.densities, scale=d.scale, rescale=shared["rescale"]
    )  # fmt: skip
    close(tools.merge_one(place, manifest), expected, 100)


@with_place
@given(data=st.data())
def test_dare(twins: Any, tools: ModuleType, place: Any, data: st.DataObject) -> None:
    d = Drawn(data, tools, place)
    elects = data.draw(st.booleans(), label="elects")
    seed = data.draw(st.integers(0, 3), label="seed")
    # Rescaled by other than powers of two, sums that cancel do so no longer: only sums are compared then.
    rescale = "none" if elects else data.draw(st.sampled_from(["none", "l1", "inverse"]))
    shared = {"lambda": d.scale, "rescale": rescale}
    manifest = tools.models(
        "dare_ties" if elects else "dare_linear", d.base_uri, d.uris, d.each("weight", "density"), shared, seed=seed
    )
    deltas = [twins.delta(s, d.base) for s in d.sources]
    keys = [twins.key_of(seed, i, "w", "delta") for i in range(len(deltas))]
    expected = twins.dare(d.base, deltas, d.weights, d.densities, keys, elects=elects, scale=d.scale, rescale=rescale)
    close(tools.merge_one(place, manifest), expected, 200)


@with_place
@given(data=st.data())
def test_slerp(twins: Any, tools: ModuleType, place: Any, data: st.DataObject) -> None:
    d = Drawn(data, tools, place, most=1)
    t = data.draw(st.sampled_from([0.0, 0.1, 0.5, 0.75, 1.0]))
    manifest = {"merge_method": "slerp", "base_model": d.base_uri, "models": [{"model": d.uris[0]}],
                "parameters": {"t": t}}  # fmt: skip
    x, y = d.base.astype(np.float64), d.sources[0].astype(np.float64)
    cosine = float((x * y).sum()) / max(1e-30, float(np.sqrt((x * x).sum() * (y * y).sum())))
    if cosine < -0.9995:
        return  # opposite inputs are interpolated linearly, as in mergekit; the test below
    # sin θ divides: near the switch to linear interpolation a float32 factor has lost a digit or two.
    close(tools.merge_one(place, manifest), twins.slerp(d.base, d.sources[0], t), 40)


def test_slerp_of_opposites_and_of_equals(tools: ModuleType, place: Any) -> None:
    x = np.array([[1.0, -2.0], [3.0, 0.5]], np.float32)
    right_angle = np.sin(0.75 * np.pi / 2) * x  # mergekit takes a norm of zero as one
    for other, expected in ((-x, 0.5 * x), (x, x), (2 * x, 1.25 * x), (0 * x, right_angle)):
        manifest = {"merge_method": "slerp", "base_model": place.model({"w": x}), "parameters": {"t": 0.25},
                    "models": [{"model": place.model({"w": other})}]}  # fmt: skip
        found = tools.merge_one(place, manifest)
        close(found, expected, 4)


@with_place
@given(data=st.data())
def test_passthrough(twins: Any, tools: ModuleType, place: Any, data: st.DataObject) -> None:
    d = Drawn(data, tools, place, most=1)
    manifest = {
        "merge_method": "passthrough", "models": [{"model": d.uris[0], "parameters": {"scale": d.scale}}],
    }  # fmt: skip
    np.testing.assert_array_equal(tools.merge_one(place, manifest), twins.passthrough(d.sources[0], d.scale))


# ---- what must hold of several methods -------------------------------------------------------------------------------

WITH_BASE = ["task_arithmetic", "ties", "dare_linear", "dare_ties", "magnitude_prune"]


@pytest.mark.parametrize("method", [*WITH_BASE, "linear", "passthrough", "slerp"])
def test_one_source_at_weight_one_is_itself(tools: ModuleType, place: Any, method: str) -> None:
    g = np.random.default_rng(1)
    base = (g.integers(-100, 100, (37, 5)) / 8).astype(np.float32)
    source = (g.integers(-100, 100, (37, 5)) / 8).astype(np.float32)
    uri = place.model({"w": source})
    if method in WITH_BASE:
        manifest = tools.models(method, place.model({"w": base}), [uri], [{"weight": 1.0}])
    elif method == "slerp":
        manifest = {"merge_method": "slerp", "base_model": place.model({"w": base}), "parameters": {"t": 1.0},
                    "models": [{"model": uri}]}  # fmt: skip
    else:
        manifest = tools.models(method, None, [uri], [{"weight": 1.0} if method == "linear" else {}])
    np.testing.assert_array_equal(tools.merge_one(place, manifest), source)


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties", "magnitude_prune"])
def test_the_order_of_sources_matters_not(tools: ModuleType, place: Any, method: str) -> None:
    g = np.random.default_rng(2)
    base, *sources = [(g.integers(-9, 10, (11, 6)) / 8).astype(np.float32) for _ in range(4)]
    base_uri, uris = place.model({"w": base}), [place.model({"w": s}) for s in sources]
    parameters = [{"weight": w} | ({} if method in ("linear", "task_arithmetic") else {"density": p})
                  for w, p in ((0.5, 0.5), (-0.25, 0.3), (2.0, 0.8))]  # fmt: skip
    found = [
        tools.merge_one(
            place,
            tools.models(
                method, None if method == "linear" else base_uri, [uris[i] for i in order],
                [parameters[i] for i in order],
            ),
        )
        for order in ((0, 1, 2), (2, 0, 1), (1, 0, 2))
    ]  # fmt: skip
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])


def test_the_seed_and_the_position_decide_what_is_dropped(tools: ModuleType, place: Any) -> None:
    base, ones = place.model({"w": np.zeros((40, 8))}), place.model({"w": np.ones((40, 8))})
    twice = place.model({"w": np.ones((40, 8))})

    def masks(seed: int) -> list[Array]:
        found = []
        for uris, weights in (([ones, twice], (1, 0)), ([ones, twice], (0, 1))):
            each = [{"weight": w, "density": 0.5} for w in weights]
            shared = {"rescale": "none"}
            found.append(tools.merge_one(place, tools.models("dare_linear", base, uris, each, shared, seed=seed)))
        return found

    (a, b), (c, _) = masks(0), masks(1)
    assert set(np.unique(a)) == {0.0, 1.0}
    assert (a != b).any()
    assert (a != c).any()
    np.testing.assert_array_equal(a, masks(0)[0])


@pytest.mark.parametrize("shape", [(6, 5), (30,), (1, 30), (30, 1), (2, 3, 5)])
@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_exactly_k_survive_and_of_equals_the_first(tools: ModuleType, place: Any, shape: Any, scope: str) -> None:
    base = place.model({"w": np.zeros(shape)})
    equal = np.full(30, 0.5, np.float32).reshape(shape) * np.where(np.arange(30) % 2, 1, -1).reshape(shape)
    for density, k in ((0.1, 3), (0.34, 10), (0.5, 15), (0.99, 29), (0.001, 1), (0.0, 0), (1.0, 30)):
        manifest = tools.models(
            "magnitude_prune", base, [place.model({"w": equal})], [{"weight": 1.0, "density": density}],
            {"scope": scope},
        )  # fmt: skip
        found = tools.merge_one(place, manifest).reshape(-1)
        assert np.flatnonzero(found).tolist() == list(range(k))


def test_the_steps_of_the_ties_paper(tools: ModuleType, place: Any) -> None:
    # Trim to half, elect by Σ, mean of what agrees; the three ones of τ₂ tie, and the first stays.
    base = np.zeros(6)
    tasks = [[2, -1, 0.1, 0, 3, -4], [-1, 2, -0.2, 1, 3, 1], [4, -3, 0.3, -2, -1, -0.5]]
    manifest = tools.models(
        "ties", place.model({"w": base}), [place.model({"w": np.array(t)}) for t in tasks],
        [{"weight": 1.0}] * 3, {"density": 0.5, "elect": "unweighted", "divisor": "count", "lambda": 1.0},
    )  # fmt: skip
    assert tools.merge_one(place, manifest).tolist() == [3, -3, 0, -2, 3, -4]


@pytest.mark.parametrize("method", [*WITH_BASE, "linear", "slerp", "passthrough"])
def test_empty_tensors_and_scalars(tools: ModuleType, place: Any, method: str) -> None:
    tensors = {"no_rows": np.zeros((0, 4)), "no_columns": np.zeros((4, 0)), "nothing": np.zeros(0),
               "scalar": np.array(0.5), "one": np.array([[0.5]])}  # fmt: skip
    base = place.model(tensors)
    other = place.model({n: x + 1 for n, x in tensors.items()})
    if method in WITH_BASE:
        pruning = {} if method == "task_arithmetic" else {"density": 0.5}
        manifest = tools.models(method, base, [other], [{"weight": 1.0, **pruning}])
    elif method == "slerp":
        manifest = {"merge_method": "slerp", "base_model": base, "models": [{"model": other}], "parameters": {"t": 0.5}}
    else:
        manifest = tools.models(method, None, [other], [{"weight": 1.0} if method == "linear" else {"scale": 2.0}])
    found = tools.merge(place, manifest)
    assert {n: tuple(x.shape) for n, x in found.items()} == {n: x.shape for n, x in tensors.items()}
    if not method.startswith("dare"):
        expected = {"slerp": 1.0, "passthrough": 3.0}.get(method, 1.5)
        for name in ("scalar", "one"):
            np.testing.assert_allclose(found[name].reshape(-1).numpy(), [expected], rtol=1e-6)


# ---- dtypes: one rounding, at the end --------------------------------------------------------------------------------

DTYPES = [("F32", "float32", torch.float32), ("F16", "float16", torch.float16), ("BF16", "bfloat16", torch.bfloat16)]


@pytest.mark.parametrize("stored", DTYPES, ids=lambda d: d[0])
@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties", "dare_ties", "slerp"])
def test_everything_is_rounded_once(twins: Any, tools: ModuleType, place: Any, method: str, stored: Any) -> None:
    g = torch.Generator().manual_seed(3)
    base, a, b = [place.model({"w": torch.randn(33, 9, generator=g).to(stored[2])}) for _ in range(3)]
    shared: dict[str, object] = {"density": 0.6} if method in ("ties", "dare_ties") else {}
    if method == "slerp":
        manifest: dict[str, Any] = {"merge_method": "slerp", "base_model": base, "models": [{"model": a}],
                                    "parameters": {"t": 0.3}}  # fmt: skip
    else:
        manifest = tools.models(
            method, None if method == "linear" else base, [a, b], [{"weight": 0.7}, {"weight": 0.6}], shared
        )
    exact = tools.merge(place, {**manifest, "out_dtype": "float32"})["w"]
    assert exact.dtype == torch.float32
    for _, name, dtype in DTYPES:
        rounded = tools.merge(place, {**manifest, "out_dtype": name})["w"]
        assert rounded.dtype == dtype
        assert torch.equal(rounded, exact.to(dtype))
        if name == "bfloat16":
            np.testing.assert_array_equal(
                rounded.view(torch.int16).numpy().view(np.uint16), twins.bfloat16_bits(exact.numpy())
            )
    assert tools.merge(place, manifest)["w"].dtype == stored[2]


def test_mixed_dtypes_take_the_widest(tools: ModuleType, place: Any) -> None:
    for a, b, widest in (
        (torch.float16, torch.bfloat16, torch.float32), (torch.float16, torch.float16, torch.float16),
        (torch.bfloat16, torch.float32, torch.float32),
    ):  # fmt: skip
        uris = [place.model({"w": torch.ones(2, 2, dtype=dtype)}) for dtype in (a, b)]
        manifest = tools.models("linear", None, uris, [{"weight": 1.0}] * 2)
        assert tools.merge(place, manifest)["w"].dtype == widest


# ---- what is no number -----------------------------------------------------------------------------------------------


def failure(tools: ModuleType, place: Any, manifest: Any) -> str:
    with pytest.raises(MergeFailedError) as caught:
        tools.merge(place, manifest)
    (problem,) = caught.value.problems
    return str(problem.code)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["source", "base"])
@pytest.mark.parametrize("method", [*WITH_BASE, "linear", "slerp", "passthrough"])
def test_what_is_no_number_ends_the_merge(tools: ModuleType, place: Any, method: str, where: str, bad: float) -> None:
    fine = torch.ones(9, 5)
    broken = fine.clone()
    broken[3, 2] = bad
    uris = [place.model({"w": broken if where == k else fine}) for k in ("base", "source")]
    third = place.model({"w": -fine})
    if method in WITH_BASE:
        pruning = {} if method == "task_arithmetic" else {"density": 0.3}
        manifest = tools.models(method, uris[0], [uris[1], third], [{"weight": 1.0, **pruning}] * 2)
    elif method == "slerp":
        manifest = {"merge_method": "slerp", "base_model": uris[0], "models": [{"model": uris[1]}],
                    "parameters": {"t": 0.5}}  # fmt: skip
    elif method == "linear":
        manifest = tools.models(method, None, [*uris, third], [{"weight": 1.0}] * 3)
    else:
        manifest = tools.models(method, None, [uris[0 if where == "base" else 1]], [{"scale": 2.0}])
    assert failure(tools, place, manifest) == "not-finite"


def test_a_drop_hides_no_nan_whatever_the_mask(tools: ModuleType, place: Any) -> None:
    base = place.model({"w": torch.zeros(8)})
    for at in range(8):
        broken = torch.ones(8)
        broken[at] = float("nan")
        manifest = tools.models("dare_linear", base, [place.model({"w": broken})], [{"weight": 1.0, "density": 0.1}],
                                {"rescale": "inverse"})  # fmt: skip
        assert failure(tools, place, manifest) == "not-finite"


@pytest.mark.parametrize(
    "value, out, fails",
    [(65519.0, "float16", False), (65520.0, "float16", True), (-65520.0, "float16", True),
     (65520.0, "bfloat16", False), (3.3961776e38, "bfloat16", True), (3.3961773e38, "bfloat16", False),
     (3.3961776e38, "float32", False)],
)  # fmt: skip
def test_what_would_round_to_infinity_ends_the_merge(
    tools: ModuleType, place: Any, value: float, out: str, fails: bool
) -> None:
    uri = place.model({"w": torch.tensor([[1.0, value]])})
    manifest = tools.models("linear", None, [uri], [{"weight": 1.0}], out_dtype=out)
    if fails:
        assert failure(tools, place, manifest) == "not-finite"
    else:
        assert tools.merge(place, manifest)["w"].isfinite().all()


def test_an_overflow_of_the_arithmetic_ends_the_merge(tools: ModuleType, place: Any) -> None:
    uris = [place.model({"w": torch.full((3, 3), 60000.0).half()}) for _ in range(2)]
    manifest = tools.models("linear", None, uris, [{"weight": 1.0}] * 2, {"normalize": False})
    assert failure(tools, place, manifest) == "not-finite"
    assert tools.merge(place, {**manifest, "out_dtype": "float32"})["w"].tolist() == [[120000.0] * 3] * 3
