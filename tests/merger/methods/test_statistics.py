"""fisher and regmean: what users measured of each source decides how much of it stays."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from merger import api
from merger.catalog import split_file
from merger.errors import ManifestError, MergeFailedError
from merger.manifest import load_manifest, parse_reference
from merger.methods import METHODS, lowrank
from merger.methods.rounds import Call
from merger.planning.memory import peak_bytes
from merger.planning.summary import read_bytes
from merger.storage import MemoryStore
from merger.verify import verify_output

Array = npt.NDArray[Any]
F64 = npt.NDArray[np.float64]

exact = importlib.import_module("tests.reference_statistics")

with_place = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
MODULE = "model.layers.0.q_proj"
WEIGHT = f"{MODULE}.weight"
WEIGHTS = (1.0, 0.5, 2.0)
SHAPES = [(24, 17), (5, 40), (40, 5), (1, 9), (9, 1), (1, 1)]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As in a worker: bits hang on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def gram_of(g: np.random.Generator, cols: int, samples: int | None = None) -> Array:
    """XᵀX of inputs whose columns differ in size a hundredfold."""
    x = g.standard_normal((samples or 3 * cols + 5, cols)) * np.logspace(-1, 1, cols)
    return (x.T @ x).astype(np.float32)


def diagonal_of(g: np.random.Generator, shape: Sequence[int]) -> Array:
    """Squares of very different sizes, some of them zero."""
    found = np.exp(3 * g.standard_normal(tuple(shape))) * (g.random(tuple(shape)) > 0.1)
    return found.astype(np.float32)


class Models:
    """A base and three models of one tensor, with what was measured of each."""

    def __init__(self, place: Any, seed: int, shape: tuple[int, ...], measure: Callable[[Any], Array]) -> None:
        g = np.random.default_rng(seed)
        self.base = g.standard_normal(shape).astype(np.float32)
        self.sources = [(self.base + 0.1 * g.standard_normal(shape)).astype(np.float32) for _ in range(3)]
        self.measured = [measure(g) for _ in range(3)]
        self.base_uri = place.model({"w": self.base})
        self.uris = [place.model({"w": x}) for x in self.sources]
        self.files = [place.statistics({"w": x}) for x in self.measured]

    def manifest(self, method: str, shared: dict[str, Any] | None = None, *, base: bool = True) -> dict[str, Any]:
        return {
            "merge_method": method, **({"base_model": self.base_uri} if base else {}),
            "models": [
                {"model": m, "statistics": s, "parameters": {"weight": w}}
                for m, s, w in zip(self.uris, self.files, WEIGHTS, strict=True)
            ],
            "parameters": shared or {},
        }  # fmt: skip


class Adapters:
    """Three adapters of one module, with what was measured of each."""

    def __init__(self, place: Any, seed: int, measure: Callable[[Any], Array], rows: int = 24, cols: int = 17) -> None:
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
        self.measured = [measure(g) for _ in range(3)]
        self.files = [place.statistics({WEIGHT: x}) for x in self.measured]
        self.base = g.standard_normal((rows, cols)).astype(np.float32)
        self.base_uri = place.model({WEIGHT: self.base, "norm": np.ones(3)})

    def manifest(self, method: str, output: dict[str, Any], shared: dict[str, Any] | None = None) -> dict[str, Any]:
        return {
            "merge_method": method, "base_model": self.base_uri, "output": output, "parameters": shared or {},
            "adapters": [
                {"adapter": a, "statistics": s, "parameters": {"weight": w}}
                for a, s, w in zip(self.uris, self.files, WEIGHTS, strict=True)
            ],
        }  # fmt: skip


def product(factors: dict[str, torch.Tensor], module: str = MODULE) -> F64:
    a, b = (factors[f"base_model.model.{module}.lora_{which}.weight"].double().numpy() for which in "AB")
    found: F64 = b @ a
    return found


def codes(manifest: Any, place: Any) -> list[str]:
    return [p.code for p in api.plan(manifest, place.out()).problems]


# ---- fisher ----------------------------------------------------------------------------------------------------------


@with_place
@given(data=st.data())
def test_fisher_of_models(tools: ModuleType, place: Any, data: st.DataObject) -> None:
    shape = data.draw(tools.shapes)
    seed, floor = data.draw(st.integers(0, 99)), data.draw(st.sampled_from([1e-6, 0.5, 100.0]))
    d = Models(place, seed, shape, lambda g: diagonal_of(g, shape))
    expected = exact.fisher(d.sources, d.measured, WEIGHTS, floor)
    for base in (True, False):  # the base cancels
        found = tools.merge_one(place, d.manifest("fisher", {"floor": floor}, base=base))
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


def test_fisher_by_hand(tools: ModuleType, place: Any) -> None:
    models = [place.model({"w": np.array([x, x, x])}) for x in (1.0, 5.0)]
    files = [place.statistics({"w": np.array(f)}) for f in ([3.0, 0.0, 0.0], [1.0, 2.0, 0.0])]
    entries = [{"model": m, "statistics": f} for m, f in zip(models, files, strict=True)]
    found = tools.merge_one(place, {"merge_method": "fisher", "models": entries})
    # (3·1 + 1·5) / 4; all but a millionth part of the second; neither knows: the mean
    np.testing.assert_allclose(found, [2.0, 5.0, 3.0], rtol=3e-6)


@pytest.mark.parametrize("output", [{"kind": "model"}, {"kind": "adapter", "store": {"svd": {"rank": 17}}}])
def test_fisher_of_adapters(tools: ModuleType, place: Any, output: dict[str, Any]) -> None:
    d = Adapters(place, 1, lambda g: diagonal_of(g, (24, 17)))
    found = tools.merge(place, d.manifest("fisher", output, {"lambda": -0.5}))
    expected = -0.5 * exact.fisher(d.deltas, d.measured, WEIGHTS)
    got = product(found) if output["kind"] == "adapter" else found[WEIGHT].double().numpy() - d.base
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_fisher_does_not_change_with_the_unit_of_the_loss(tools: ModuleType, place: Any) -> None:
    d = Models(place, 2, (9, 7), lambda g: diagonal_of(g, (9, 7)) + np.float32(0.01))
    expected = tools.merge_one(place, d.manifest("fisher"))
    for factor in (2.0**-10, 2.0**30, 2.0**90):
        d.files = [place.statistics({"w": x * np.float32(factor)}) for x in d.measured]
        np.testing.assert_array_equal(tools.merge_one(place, d.manifest("fisher")), expected)


def test_no_cut_changes_a_bit_of_fisher(tools: ModuleType, place: Any) -> None:
    d = Models(place, 3, (333, 40), lambda g: diagonal_of(g, (333, 40)))
    plan = tools.recut(api.plan(d.manifest("fisher"), place.out()), tile_rows=16, extent_rows=2)
    outcomes = []
    for tile, memory, workers in ((16, None, 1), (16, 0, 3), (1, None, 1), (5000, 1 << 28, 2)):
        out = place.out()
        tools.run(tools.at(tools.recut(plan, tile_rows=tile), out), memory=memory, workers=workers)
        outcomes.append(tools.read_bytes(out))
    assert all(found == outcomes[0] for found in outcomes)


# ---- regmean ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("shared", [{}, {"reduce_non_diagonal_ratio": 0.3}, {"ridge": 0.1, "lambda": 1.0}])
def test_regmean_of_models(tools: ModuleType, place: Any, shape: tuple[int, int], shared: dict[str, float]) -> None:
    d = Models(place, 4, shape, lambda g: gram_of(g, shape[1]))
    ratio, ridge = shared.get("reduce_non_diagonal_ratio", 0.9), shared.get("ridge", 0.0)
    expected = exact.regmean(d.sources, d.measured, WEIGHTS, ratio, ridge)
    for base in (True, False):  # the base cancels
        found = tools.merge_one(place, d.manifest("regmean", shared, base=base))
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_regmean_by_hand(tools: ModuleType, place: Any) -> None:
    models = [place.model({"w": np.array([[x, y]])}) for x, y in ((1.0, 10.0), (5.0, 20.0))]
    files = [place.statistics({"w": np.diag(g)}) for g in ((3.0, 1.0), (1.0, 4.0))]
    entries = [{"model": m, "statistics": f} for m, f in zip(models, files, strict=True)]
    found = tools.merge_one(place, {"merge_method": "regmean", "models": entries})
    np.testing.assert_allclose(found, [[(3 + 5) / 4, (10 + 80) / 5]], rtol=1e-6)  # inputs that are unlike each other


def test_regmean_is_the_least_of_what_it_minimises(tools: ModuleType, place: Any) -> None:
    g = np.random.default_rng(5)
    inputs = [g.standard_normal((60, 8)) @ g.standard_normal((8, 8)) for _ in range(3)]
    d = Models(place, 5, (6, 8), lambda g: np.eye(8))
    d.files = [place.statistics({"w": x.T @ x}) for x in inputs]
    found = tools.merge_one(place, d.manifest("regmean", {"reduce_non_diagonal_ratio": 1.0}))
    sources = [x.astype(np.float64) for x in d.sources]
    least = exact.loss(found, sources, inputs, WEIGHTS)
    assert least < exact.loss(np.average(sources, axis=0, weights=WEIGHTS), sources, inputs, WEIGHTS)
    for _ in range(20):
        moved = found + 1e-3 * g.standard_normal(found.shape)
        assert least < exact.loss(moved, sources, inputs, WEIGHTS)


@pytest.mark.parametrize("output", [
    {"kind": "model"}, {"kind": "adapter", "store": "concat"}, {"kind": "adapter", "store": {"svd": {"rank": 7}}},
])  # fmt: skip
def test_regmean_of_adapters_is_exact_at_the_sum_of_their_ranks(
    tools: ModuleType, place: Any, output: dict[str, Any]
) -> None:
    d = Adapters(place, 6, lambda g: gram_of(g, 17))
    found = tools.merge(place, d.manifest("regmean", output, {"lambda": -0.5}))
    expected = -0.5 * exact.regmean(d.deltas, d.measured, WEIGHTS)
    if output["kind"] == "adapter":
        assert found[f"base_model.model.{MODULE}.lora_A.weight"].shape == (7, 17)
        got = product(found)
    else:
        got = found[WEIGHT].double().numpy() - d.base
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=2e-5)


def in_core(pairs: Sequence[tuple[Array, Array]], grams: Sequence[Array], ratio: float = 0.9) -> F64:
    block = METHODS["regmean"].core
    assert block is not None
    core = lowrank.build_core([(torch.from_numpy(a), torch.from_numpy(b)) for a, b in pairs])
    call = Call(method="regmean", combine="block", weights=WEIGHTS[: len(pairs)],
                options=(("reduce_non_diagonal_ratio", ratio), ("ridge", 0.0)))  # fmt: skip
    p, q = block.merge_measured(call, core, lambda k: torch.from_numpy(grams[k]))
    found: F64 = (p @ q.T).numpy()
    return found


@pytest.mark.parametrize("rows, cols", SHAPES)
def test_the_core_gives_what_the_dense_definition_gives(rows: int, cols: int) -> None:
    g = np.random.default_rng(7)
    pairs = [(g.standard_normal((r, cols)), g.standard_normal((rows, r))) for r in (2, 4, 1)]
    grams = [gram_of(g, cols) for _ in pairs]
    expected = exact.regmean([b @ a for a, b in pairs], grams, WEIGHTS)
    assert np.linalg.norm(in_core(pairs, grams) - expected) < 1e-10 * np.linalg.norm(expected)
    gauges = [g.standard_normal((len(a), len(a))) + 2 * np.eye(len(a)) for a, _ in pairs]
    turned = [(np.linalg.solve(m, a), b @ m) for (a, b), m in zip(pairs, gauges, strict=True)]
    assert np.linalg.norm(in_core(turned, grams) - expected) < 1e-10 * np.linalg.norm(expected)


def test_a_module_that_an_adapter_lacks_is_zero_and_counts(tools: ModuleType, place: Any) -> None:
    g = np.random.default_rng(8)
    pairs = [(g.standard_normal((2, 6)).astype(np.float32), g.standard_normal((5, 2)).astype(np.float32))
             for _ in range(2)]  # fmt: skip
    both, one = place.adapter({"l.a": pairs[0], "l.b": pairs[1]}), place.adapter({"l.a": pairs[0]})
    for method, measured in (("regmean", [gram_of(g, 6) for _ in range(4)]),
                             ("fisher", [diagonal_of(g, (5, 6)) for _ in range(4)])):  # fmt: skip
        files = [place.statistics({"l.a.weight": x, "l.b.weight": y}) for x, y in (measured[:2], measured[2:])]
        entries = [{"adapter": a, "statistics": f} for a, f in zip((both, one), files, strict=True)]
        document = {"merge_method": method, "adapters": entries, "output": {"store": {"svd": {"rank": 4}}}}
        expected = getattr(exact, method)([pairs[1][1] @ pairs[1][0], np.zeros((5, 6))], measured[1::2], (1.0, 1.0))
        u, s, vt = np.linalg.svd(expected)
        best = (u[:, :4] * s[:4]) @ vt[:4]
        np.testing.assert_allclose(product(tools.merge(place, document), "l.b"), best, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["fisher", "regmean"])
def test_bytes_do_not_depend_on_memory_or_workers(tools: ModuleType, place: Any, name: str) -> None:
    d = Adapters(place, 9, lambda g: gram_of(g, 17) if name == "regmean" else diagonal_of(g, (24, 17)))
    for output in ({"kind": "adapter"}, {"kind": "model"}):
        outs = []
        for memory, workers in ((None, 1), (0, 1), (0, 3)):
            outs.append(place.out())
            tools.run(api.plan(d.manifest(name, output), outs[-1]), memory=memory, workers=workers)
        first, *others = [tools.read_bytes(out) for out in outs]
        assert all(other == first for other in others)


# ---- what holds of both ----------------------------------------------------------------------------------------------


def measure(name: str, shape: tuple[int, int]) -> Callable[[np.random.Generator], Array]:
    return (lambda g: gram_of(g, shape[1])) if name == "regmean" else (lambda g: diagonal_of(g, shape))


@pytest.mark.parametrize("name", ["fisher", "regmean"])
def test_equal_statistics_give_the_weighted_mean(tools: ModuleType, place: Any, name: str) -> None:
    d = Models(place, 10, (9, 7), measure(name, (9, 7)))
    d.files = d.files[:1] * 3
    mean = np.average([x.astype(np.float64) for x in d.sources], axis=0, weights=WEIGHTS)
    np.testing.assert_allclose(tools.merge_one(place, d.manifest(name)), mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["fisher", "regmean"])
def test_one_source_is_itself_and_order_matters_not(tools: ModuleType, place: Any, name: str) -> None:
    d = Models(place, 11, (9, 7), measure(name, (9, 7)))
    document = d.manifest(name)
    expected = tools.merge_one(place, document)
    for order in ((2, 0, 1), (1, 0, 2)):
        moved = {**document, "models": [document["models"][i] for i in order]}
        np.testing.assert_allclose(tools.merge_one(place, moved), expected, rtol=1e-5, atol=1e-6)
    alone = {**document, "models": document["models"][:1]}
    np.testing.assert_allclose(tools.merge_one(place, alone), d.sources[0], rtol=1e-6, atol=1e-6)
    silent = [{**entry, "parameters": {"weight": w}} for entry, w in zip(document["models"], (0, 3, 0), strict=True)]
    found = tools.merge_one(place, {**document, "models": silent})
    np.testing.assert_allclose(found, d.sources[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["fisher", "regmean"])
@pytest.mark.parametrize("size", [1e-15, 1e15])
def test_huge_and_tiny_sources_scale_through(tools: ModuleType, place: Any, name: str, size: float) -> None:
    d = Models(place, 12, (9, 7), measure(name, (9, 7)))
    expected = getattr(exact, name)([x * size for x in d.sources], d.measured, WEIGHTS)
    d.uris = [place.model({"w": x * np.float32(size)}) for x in d.sources]
    found = tools.merge_one(place, d.manifest(name, base=False))
    np.testing.assert_allclose(found / size, expected / size, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["fisher", "regmean"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_ends_the_merge(tools: ModuleType, place: Any, name: str, bad: float) -> None:
    d = Models(place, 13, (9, 7), measure(name, (9, 7)))
    broken = d.measured[1].copy()
    broken[2, 2] = bad
    d.files[1] = place.statistics({"w": broken})
    with pytest.raises(MergeFailedError) as caught:
        tools.merge(place, d.manifest(name))
    assert [p.code for p in caught.value.problems] in (["not-finite"], ["bad-statistics"])


def test_what_cannot_have_been_measured_ends_the_merge(tools: ModuleType, place: Any) -> None:
    for name, wrong in (("fisher", -np.ones((3, 2))), ("regmean", -np.eye(2)), ("regmean", np.array([[1, 2], [3, 9]]))):
        d = Models(place, 14, (3, 2), measure(name, (3, 2)))
        d.files[0] = place.statistics({"w": wrong})
        with pytest.raises(MergeFailedError) as caught:
            tools.merge(place, d.manifest(name))
        assert [p.code for p in caught.value.problems] == ["bad-statistics"]


def test_grams_that_cannot_be_inverted_end_the_merge_and_a_ridge_mends_them(tools: ModuleType, place: Any) -> None:
    g = np.random.default_rng(15)
    few = [g.standard_normal((2, 7)) for _ in range(3)]
    unseen = [x * (np.arange(7) > 0) for x in [g.standard_normal((50, 7)) for _ in range(3)]]
    for inputs, ratio in ((few, 1.0), (unseen, 0.9)):
        d = Models(place, 15, (9, 7), lambda g: np.eye(7))
        d.measured = [(x.T @ x).astype(np.float32) for x in inputs]
        d.files = [place.statistics({"w": x}) for x in d.measured]
        with pytest.raises(MergeFailedError) as caught:
            tools.merge(place, d.manifest("regmean", {"reduce_non_diagonal_ratio": ratio}))
        assert [p.code for p in caught.value.problems] == ["singular-gram"]
        assert "ridge" in caught.value.problems[0].fix
        shared = {"reduce_non_diagonal_ratio": ratio, "ridge": 1e-2}
        expected = exact.regmean(d.sources, d.measured, WEIGHTS, ratio, 1e-2)
        np.testing.assert_allclose(
            tools.merge_one(place, d.manifest("regmean", shared)), expected, rtol=1e-5, atol=1e-5
        )


# ---- which statistics go with which tensor ---------------------------------------------------------------------------


class Parts:
    """Two models of several tensors, of which some were measured."""

    def __init__(self, place: Any) -> None:
        g = np.random.default_rng(16)
        self.shapes = {"embed": (8, 5), "l.0.w": (6, 5), "norm": (5,)}
        self.tensors = [{n: g.standard_normal(s).astype(np.float32) for n, s in self.shapes.items()} for _ in range(2)]
        self.uris = [place.model(t) for t in self.tensors]

    def manifest(self, method: str, files: Sequence[str], shared: dict[str, Any] | None = None) -> dict[str, Any]:
        entries = [{"model": m, "statistics": f} for m, f in zip(self.uris, files, strict=True)]
        return {"merge_method": method, "models": entries, "parameters": shared or {}}


def test_tensors_without_a_gram_matrix_are_averaged_and_matrices_among_them_named(
    tools: ModuleType, place: Any
) -> None:
    d = Parts(place)
    grams = [gram_of(np.random.default_rng(i), 5) for i in (17, 18)]
    document = d.manifest("regmean", [place.statistics({"l.0.w": x}) for x in grams])
    (warning,) = api.plan(document, place.out()).warnings
    assert (warning.code, warning.where) == ("averaged", "embed")
    found = tools.merge(place, document)
    for name in ("embed", "norm"):
        np.testing.assert_allclose(found[name].numpy(), (d.tensors[0][name] + d.tensors[1][name]) / 2, rtol=1e-6)
    expected = exact.regmean([t["l.0.w"] for t in d.tensors], grams, (1.0, 1.0))
    np.testing.assert_allclose(found["l.0.w"].double().numpy(), expected, rtol=1e-5, atol=1e-6)
    assert codes({**document, "parameters": {"missing": "refuse"}}, place) == ["missing-statistics"]  # of two tensors


def test_fisher_wants_every_tensor_unless_told_otherwise(tools: ModuleType, place: Any) -> None:
    d = Parts(place)
    files = [place.statistics({n: np.ones(s) for n, s in d.shapes.items() if n != "norm"}) for _ in range(2)]
    (problem,) = api.plan(d.manifest("fisher", files), place.out()).problems
    assert problem.code == "missing-statistics"
    assert all(name in problem.where for name in files)
    assert "missing: mean" in problem.fix
    found = tools.merge(place, d.manifest("fisher", files, {"missing": "mean"}))
    np.testing.assert_allclose(found["norm"].numpy(), (d.tensors[0]["norm"] + d.tensors[1]["norm"]) / 2, rtol=1e-6)


def test_what_does_not_fit_is_refused_from_headers(place: Any) -> None:
    d = Parts(place)
    good = {n: np.ones(s) for n, s in d.shapes.items()}

    def refused(method: str, first: Any, second: Any) -> list[str]:
        return codes(d.manifest(method, [place.statistics(first), place.statistics(second)]), place)

    assert refused("fisher", good, good) == []
    assert refused("fisher", good, {k: v for k, v in good.items() if k != "embed"}) == ["missing-statistics"]
    assert refused("fisher", good, {**good, "norm": np.ones((5, 1))}) == ["shape-mismatch"]
    assert refused("fisher", good, {**good, "norm": torch.ones(5, dtype=torch.float64)}) == ["dtype-mismatch"]
    assert refused("fisher", good, {**good, "nrm": np.ones(5)}) == ["no-such-tensor"]
    assert refused("regmean", {"l.0.w": np.eye(5)}, {"l.0.w": np.eye(6)}) == ["shape-mismatch"]
    assert refused("regmean", {"norm": np.eye(5)}, {"norm": np.eye(5)}) == ["shape-mismatch"]
    assert refused("regmean", {"x": np.eye(5)}, {"x": np.eye(5)}) == ["no-such-tensor"] * 2
    silent = {"models": [{**e, "parameters": {"weight": 0}} for e in d.manifest("fisher", ["o/f", "o/f"])["models"]]}
    files = [place.statistics(good)] * 2
    entries = [{**e, "statistics": f} for e, f in zip(silent["models"], files, strict=True)]
    assert set(codes({"merge_method": "fisher", "models": entries}, place)) == {"weights-cancel"}


def test_a_gram_matrix_of_a_transposed_layer_is_refused(place: Any) -> None:
    uris = [place.model({"l.0.w": np.ones((5, 5))}, model_type="gpt2") for _ in range(2)]
    entries = [{"model": m, "statistics": place.statistics({"l.0.w": np.eye(5)})} for m in uris]
    assert codes({"merge_method": "regmean", "models": entries}, place) == ["not-yet"]


def manifest_problems(source: dict[str, Any]) -> list[tuple[str, str]]:
    with pytest.raises(ManifestError) as caught:
        load_manifest(source)
    return [(p.code, p.where) for p in caught.value.problems]


def test_a_manifest_says_where_statistics_lack_or_have_no_effect() -> None:
    with_, without = {"model": "o/a", "statistics": "o/f"}, {"model": "o/b"}
    assert manifest_problems({"merge_method": "fisher", "models": [with_, without]}) == [
        ("missing-key", "models[1].statistics")
    ]
    weighted = {**with_, "parameters": {"weight": 1}}
    assert manifest_problems({"merge_method": "linear", "models": [weighted]}) == [("conflict", "models[0].statistics")]
    based = {"merge_method": "regmean", "base_model": "o/a", "models": [with_]}
    assert manifest_problems(based) == [("conflict", "models[0].statistics")]
    load_manifest({**based, "models": [{"model": "o/a"}, {"model": "o/c", "statistics": "o/f"}]})
    slices = [{"sources": [{"model": "o/a", "layer_range": [0, 1]}]}]
    assert ("missing-key", "slices[0].sources[0].statistics") in manifest_problems(
        {"merge_method": "fisher", "slices": slices}
    )
    adapters = {"combination_type": "linear", "adapters": [{"adapter": "o/a", "statistics": "o/f"}]}
    assert manifest_problems(adapters) == [("conflict", "adapters[0].statistics")]
    bad = {"merge_method": "fisher", "models": [{**with_, "parameters": {"weight": -1.0}}]}
    assert manifest_problems(bad) == [("out-of-bounds", "models[0].parameters.weight")]


def test_a_folder_of_statistics_and_a_file_are_both_taken(tmp_path: Path, tools: ModuleType) -> None:
    files = {"a.safetensors": {"x": torch.ones(3)}, "b.safetensors": {"y": 3 * torch.ones(2)}}
    (tmp_path / "one").mkdir()
    for name, tensors in files.items():
        save_file(tensors, tmp_path / "one" / name)
    models = []
    for value in (0.0, 4.0):
        folder = tmp_path / f"model-{value}"
        folder.mkdir()
        save_file({"x": torch.full((3,), value), "y": torch.full((2,), value)}, folder / "model.safetensors")
        (folder / "config.json").write_text("{}")
        models.append(str(folder))
    whole = tmp_path / "whole.safetensors"
    save_file({"x": torch.full((3,), 3.0), "y": torch.ones(2)}, whole)
    entries = [{"model": m, "statistics": str(s)} for m, s in zip(models, (tmp_path / "one", whole), strict=True)]
    api.merge({"merge_method": "fisher", "models": entries}, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found["x"].tolist() == pytest.approx([3.0] * 3)
    assert found["y"].tolist() == pytest.approx([1.0] * 2)
    save_file({"x": torch.ones(3)}, tmp_path / "one" / "c.safetensors")
    assert [p.code for p in api.plan({"merge_method": "fisher", "models": entries}).problems] == ["bad-statistics"]
    entries[0]["statistics"] = str(tmp_path / "nowhere")
    assert [p.code for p in api.plan({"merge_method": "fisher", "models": entries}).problems] == ["no-such-source"]


def test_statistics_go_by_the_names_of_their_own_source_where_layers_are_stacked(tools: ModuleType, place: Any) -> None:
    names = [f"model.layers.{i}.w" for i in range(2)]
    tensors = [{n: np.full((2, 2), 4.0 * i + j) for j, n in enumerate(names)} for i in range(2)]
    uris = [place.model({**t, "norm": np.ones(2)}, num_hidden_layers=2) for t in tensors]
    figures = [{n: np.full((2, 2), 1.0 + 2 * i * j) for j, n in enumerate(names)} for i in range(2)]
    files = [place.statistics({**f, "norm": np.ones(2)}) for f in figures]
    slices = [
        {"sources": [{"model": u, "statistics": f, "layer_range": [first + i, first + i + 1]}
                     for i, (u, f) in enumerate(zip(uris, files, strict=True))]}
        for first in (0,)
    ]  # fmt: skip
    found = tools.merge(place, {"merge_method": "fisher", "slices": slices})
    expected = exact.fisher([tensors[0][names[0]], tensors[1][names[1]]],
                            [figures[0][names[0]], figures[1][names[1]]], (1.0, 1.0))  # fmt: skip
    np.testing.assert_allclose(found[names[0]].numpy(), expected, rtol=1e-6)


def test_a_combine_step_may_be_one_that_needs_statistics(tools: ModuleType, place: Any) -> None:
    d = Models(place, 21, (9, 7), measure("fisher", (9, 7)))
    named = d.manifest("fisher", {"floor": 0.5})
    written: dict[str, Any] = {k: v for k, v in named.items() if k not in {"merge_method", "parameters"}}
    written["combine"] = {"fisher": {"floor": 0.5}}
    np.testing.assert_array_equal(tools.merge_one(place, written), tools.merge_one(place, named))
    lacking = [{k: v for k, v in entry.items() if k != "statistics"} for entry in named["models"]]
    assert {code for code, _ in manifest_problems({**written, "models": lacking})} == {"missing-key"}


@pytest.mark.parametrize("text, folder, name", [
    ("hf://o/n@main/sub/f.safetensors", "hf://o/n@main/sub", "f.safetensors"),
    ("hf://o/n/f.safetensors", "hf://o/n", "f.safetensors"),
    ("s3://bucket/a/b/f.safetensors", "s3://bucket/a/b", "f.safetensors"),
    ("/a/f.safetensors", "/a", "f.safetensors"), ("/f.safetensors", "/", "f.safetensors"),
    ("s3://bucket/a/b", "s3://bucket/a/b", ""), ("o/n", "hf://o/n", ""),
])  # fmt: skip
def test_a_reference_names_a_file_or_a_folder_of_statistics(text: str, folder: str, name: str) -> None:
    found, file = split_file(parse_reference(text))
    assert (str(found), file) == (folder, name)


# ---- statistics are sources ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fisher", "regmean"])
def test_statistics_are_pinned_counted_and_part_of_the_digest(tools: ModuleType, place: Any, name: str) -> None:
    d = Models(place, 19, (30, 20), measure(name, (30, 20)))
    document = d.manifest(name)
    plan = api.plan(document, place.out())
    size = 4 * 3 * (400 if name == "regmean" else 600)
    assert read_bytes(plan) == 4 * 600 * 4 + size
    report = tools.run(plan)
    again = 4 * 600 if name == "regmean" else 0  # a whole merge reads the base once more when it is written
    assert report.bytes_read == read_bytes(plan) + again
    assert [s.catalog.kind for s in plan.sources].count("statistics") == 3
    verify_output(plan.outputs[0].path, replay=None)
    d.files[0] = place.statistics({"w": d.measured[1]})
    assert api.plan(d.manifest(name), place.out()).digest != plan.digest
    store = MemoryStore(plan.sources[-1].catalog.store.uri.removeprefix("memory://"))
    (file,) = plan.sources[-1].catalog.pins
    store.put(file, bytes(store.files[file])[:-1] + b"?")
    with pytest.raises(Exception, match="changed"):
        tools.run(tools.at(plan, place.out()))


def test_memory_for_gram_matrices_is_planned(tools: ModuleType, place: Any) -> None:
    d = Models(place, 20, (4, 600), measure("regmean", (4, 600)))
    plan = api.plan(d.manifest("regmean"), place.out())
    assert peak_bytes(plan) > 7 * 8 * 600 * 600
    tools.run(plan, memory=peak_bytes(plan))


# ---- real statistics of a real model ---------------------------------------------------------------------------------


def _tiny(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=48, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    found: LlamaForCausalLM = LlamaForCausalLM(config)
    return found


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    """manifests/statistics/collect.py, which is no package."""
    path = Path(__file__).parents[3] / "manifests" / "statistics" / "collect.py"
    spec = importlib.util.spec_from_file_location("collect", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_statistics_collected_from_a_real_model(tmp_path: Path, recipe: ModuleType) -> None:
    """With regmean the merge's outputs are nearer to what each source gives on its own inputs than the mean's are."""
    base = _tiny(0)
    generator = torch.Generator().manual_seed(1)
    entries: dict[str, list[dict[str, str]]] = {"regmean": [], "fisher": []}
    models, inputs = [], []
    for i in range(2):
        model = _tiny(0)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.05 * torch.randn(p.shape, generator=generator))
        model.save_pretrained(tmp_path / f"model{i}")
        batches = [torch.randint(24 * i, 24 * (i + 1), (4, 12), generator=generator) for _ in range(6)]
        for method, collect in (("regmean", recipe.collect_grams), ("fisher", recipe.collect_fisher)):
            file = tmp_path / f"{method}{i}.safetensors"
            save_file(collect(model, batches), file)
            entries[method].append({"model": str(tmp_path / f"model{i}"), "statistics": str(file)})
        models.append(model)
        inputs.append(torch.cat(batches))
    base.save_pretrained(tmp_path / "base")
    documents: dict[str, dict[str, Any]] = {
        "regmean": {"merge_method": "regmean", "models": entries["regmean"], "base_model": str(tmp_path / "base")},
        "fisher": {"merge_method": "fisher", "models": entries["fisher"], "parameters": {"floor": 1e-12}},
        "linear": {"merge_method": "linear", "models": [
            {"model": e["model"], "parameters": {"weight": 1.0}} for e in entries["fisher"]
        ]},
    }  # fmt: skip
    errors = {}
    for name, document in documents.items():
        api.merge(document, tmp_path / name)
        merged = LlamaForCausalLM.from_pretrained(tmp_path / name)
        with torch.no_grad():
            errors[name] = sum(
                float((merged(x).logits - model(x).logits).square().mean())
                for model, x in zip(models, inputs, strict=True)
            )
    assert errors["regmean"] < errors["linear"]
    made, *both = [load_file(tmp_path / name / "model.safetensors") for name in ("fisher", "model0", "model1")]
    diagonals = [load_file(entry["statistics"]) for entry in entries["fisher"]]
    for key, value in made.items():
        sources, measured = ([found[key].numpy() for found in pair] for pair in (both, diagonals))
        np.testing.assert_allclose(value.numpy(), exact.fisher(sources, measured, (1.0, 1.0), 1e-12), rtol=1e-5)
