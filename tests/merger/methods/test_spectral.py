"""Spectral methods: the core equals the dense definition, and nothing but the deltas decides the result."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from merger import api
from merger.errors import MergeFailedError
from merger.methods import METHODS, lowrank
from merger.methods.rounds import Call
from merger.planning.memory import peak_bytes
from merger.storage import MemoryStore
from merger.verify import verify_output

F64 = npt.NDArray[np.float64]
Pair = tuple[npt.NDArray[Any], npt.NDArray[Any]]

dense = importlib.import_module("tests.reference_spectral")

MODULE = "model.layers.0.q_proj"
WEIGHT = f"{MODULE}.weight"
SHAPES = [(24, 17), (17, 24), (40, 5), (5, 40), (8, 8), (1, 9), (9, 1), (1, 1)]
RANKS = (2, 4, 1)
WEIGHTS = (0.7, -1.5, 1.0)

METHOD_OPTIONS: dict[str, dict[str, float]] = {
    "tsv_m": {}, "iso_c": {}, "iso_cts": {"common_space_fraction": 0.6}, "boost": {"beta": 0.4}, "wudi": {},
    "core_tsv": {}, "core_iso": {},
}  # fmt: skip
ON_MODELS = [name for name in METHOD_OPTIONS if not name.startswith("core")]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As in a worker: bits hang on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def twin(name: str, deltas: Sequence[F64], weights: Sequence[float], options: dict[str, float] | None = None) -> F64:
    given = METHOD_OPTIONS[name] if options is None else options
    if name == "core_tsv":
        core = min(sum(RANKS[: len(deltas)]), *deltas[0].shape)
        found = dense.tsv_m(deltas, weights, side=core)
    elif name == "iso_cts":
        found = dense.iso_cts(deltas, weights, given["common_space_fraction"])
    elif name == "boost":
        found = dense.boost(deltas, weights, given["beta"])
    else:
        found = getattr(dense, {"core_iso": "iso_c"}.get(name, name))(deltas, weights)
    assert isinstance(found, np.ndarray)
    return found


def draw(seed: int, rows: int, cols: int, ranks: Sequence[int] = RANKS) -> list[Pair]:
    g = np.random.default_rng(seed)
    return [(g.standard_normal((r, cols)), g.standard_normal((rows, r))) for r in ranks]


def in_core(name: str, pairs: Sequence[Pair], weights: Sequence[float], options: dict[str, float] | None = None) -> F64:
    """The method's own block on the exact core, in float64 throughout."""
    given = METHOD_OPTIONS[name] if options is None else options
    block = METHODS[name].core
    assert block is not None
    core = lowrank.build_core([(torch.from_numpy(a), torch.from_numpy(b)) for a, b in pairs])
    call = Call(method=name, combine="block", weights=tuple(weights), options=tuple(given.items()))
    p, q = block.merge(call, core)
    found: F64 = (p @ q.T).numpy()
    return found


def relative(found: F64, expected: F64) -> float:
    return float(np.linalg.norm(found - expected) / max(float(np.linalg.norm(expected)), 1e-300))


def product(factors: dict[str, torch.Tensor], module: str = MODULE) -> F64:
    a, b = (factors[f"base_model.model.{module}.lora_{which}.weight"].double().numpy() for which in "AB")
    found: F64 = b @ a
    return found


# ---- the core is the dense definition --------------------------------------------------------------------------------


@pytest.mark.parametrize("rows, cols", SHAPES)
@pytest.mark.parametrize("name", METHOD_OPTIONS)
def test_the_core_gives_what_the_dense_definition_gives(name: str, rows: int, cols: int) -> None:
    for seed in range(4):
        pairs = draw(seed, rows, cols)
        found = in_core(name, pairs, WEIGHTS)
        assert relative(found, twin(name, [b @ a for a, b in pairs], WEIGHTS)) < 1e-10


@pytest.mark.parametrize("name", METHOD_OPTIONS)
def test_any_gauge_gives_the_same(name: str) -> None:
    g = np.random.default_rng(1)
    pairs = draw(1, 30, 20)
    turned = []
    for a, b in pairs:
        gauge = g.standard_normal((len(a), len(a))) + 2 * np.eye(len(a))
        turned.append((np.linalg.solve(gauge, a), b @ gauge))
    assert relative(in_core(name, turned, WEIGHTS), in_core(name, pairs, WEIGHTS)) < 1e-10


@pytest.mark.parametrize("name", METHOD_OPTIONS)
def test_the_order_of_adapters_matters_not(name: str) -> None:
    pairs = draw(2, 30, 20, (3, 3, 2))
    expected = in_core(name, pairs, WEIGHTS)
    for order in ((2, 0, 1), (1, 0, 2)):
        found = in_core(name, [pairs[i] for i in order], [WEIGHTS[i] for i in order])
        assert relative(found, expected) < 1e-10


@pytest.mark.parametrize("name", ["tsv_m", "wudi", "core_tsv"])
def test_one_adapter_at_weight_one_is_itself(name: str) -> None:
    ((a, b),) = draw(3, 30, 20, (4,))
    assert relative(in_core(name, [(a, b)], [1.0]), b @ a) < 1e-12


def test_one_adapter_under_boost_is_itself_where_nothing_is_lifted() -> None:
    ((a, b),) = draw(3, 30, 20, (4,))
    assert relative(in_core("boost", [(a, b)], [1.0], {"beta": 1.0}), b @ a) < 1e-12


@pytest.mark.parametrize("name", ["iso_c", "core_iso", "iso_cts"])
def test_one_adapter_under_iso_keeps_its_directions_at_their_mean_size(name: str) -> None:
    ((a, b),) = draw(3, 30, 20, (4,))
    u, s, v = dense.thin_svd(b @ a)
    assert relative(in_core(name, [(a, b)], [1.0]), s.mean() * u @ v.T) < 1e-12


@pytest.mark.parametrize("name", ["tsv_m", "core_tsv", "wudi"])
def test_the_same_adapter_twice_is_that_adapter(name: str) -> None:
    pairs = draw(4, 30, 20, (3,))
    (a, b) = pairs[0]
    gauge = np.random.default_rng(5).standard_normal((3, 3))
    twice = [(a, b), (np.linalg.solve(gauge, a), b @ gauge)]
    assert relative(in_core(name, twice, [1.0, 1.0]), b @ a) < 1e-10


@pytest.mark.parametrize("name", METHOD_OPTIONS)
def test_a_weight_scales_its_delta_and_zero_leaves_it_out(name: str) -> None:
    pairs = draw(6, 30, 20, (2, 2, 2))
    scaled = [(a, b * w) for (a, b), w in zip(pairs, WEIGHTS, strict=True)]
    assert relative(in_core(name, scaled, [1.0] * 3), in_core(name, pairs, WEIGHTS)) < 1e-10
    if not name.startswith("core"):  # the size of a core counts every source
        without = in_core(name, pairs[:2], [1.0, 1.0])
        assert relative(in_core(name, pairs, [1.0, 1.0, 0.0]), without) < 1e-10


@pytest.mark.parametrize("name", METHOD_OPTIONS)
def test_nothing_merged_is_nothing(name: str) -> None:
    pairs = [(a * 0.0, b) for a, b in draw(7, 9, 6)]
    assert not in_core(name, pairs, WEIGHTS).any()
    assert not in_core(name, draw(7, 9, 6), [0.0, 0.0, 0.0]).any()


@pytest.mark.parametrize("name", ["iso_c", "core_iso", "boost", "iso_cts"])
def test_deltas_that_cancel_leave_no_noise(name: str) -> None:
    ((a, b),) = draw(8, 30, 20, (3,))
    gauge = np.random.default_rng(9).standard_normal((3, 3))
    other = np.linalg.solve(gauge, a), b @ gauge
    assert np.abs(in_core(name, [(a, b), other], [1.0, -1.0])).max() < 1e-10


def test_many_adapters_in_few_directions_do_not_take_more_than_there_are() -> None:
    g = np.random.default_rng(30)
    left, right = g.standard_normal((30, 4)), g.standard_normal((4, 20))
    pairs = [(g.standard_normal((1, 4)) @ right, left @ g.standard_normal((4, 1))) for _ in range(5)]
    options = {"common_space_fraction": 0.25}
    found = in_core("iso_cts", pairs, [1.0] * 5, options)
    expected = twin("iso_cts", [b @ a for a, b in pairs], [1.0] * 5, options)
    assert relative(found, expected) < 1e-9
    assert np.linalg.matrix_rank(found, tol=1e-6) == 4


def test_huge_and_tiny_deltas_scale_through() -> None:
    pairs = draw(10, 30, 20)
    for name in METHOD_OPTIONS:
        expected = in_core(name, pairs, WEIGHTS)
        for factor in (1e-20, 1e20):
            scaled = [(a, b * factor) for a, b in pairs]
            assert relative(in_core(name, scaled, WEIGHTS) / factor, expected) < 1e-10


# ---- the null-space trap ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHOD_OPTIONS)
def test_float32_factors_and_float64_factors_agree(name: str) -> None:
    pairs = draw(11, 48, 40, (4, 4, 4))
    rounded = [(a.astype(np.float32), b.astype(np.float32)) for a, b in pairs]
    assert relative(in_core(name, rounded, WEIGHTS), in_core(name, pairs, WEIGHTS)) < 1e-5


def test_the_published_forms_on_low_rank_do_not() -> None:
    """Why null directions are cut off: float32 and float64 give unrelated results, and far more than rounding."""
    deltas = [b @ a for a, b in draw(11, 48, 40, (4, 4, 4))]
    for published in (dense.published_tsv_m, dense.published_iso_c):
        narrow, wide = (published(deltas, dtype).astype(np.float64) for dtype in (np.float32, np.float64))
        assert relative(narrow, wide) > 0.1
    spread = dense.published_iso_c(deltas, np.float64)
    u, _, _ = dense.thin_svd(np.concatenate(deltas, axis=1))
    inside = float(np.linalg.norm(u.T @ spread) ** 2 / np.linalg.norm(spread) ** 2)
    assert inside < 0.4  # 12 of 40 directions: the rest of the energy lies where no adapter ever was


@pytest.mark.parametrize("published, ours", [("published_tsv_m", "tsv_m"), ("published_iso_c", "iso_c")])
def test_on_deltas_of_full_rank_the_published_forms_are_ours(published: str, ours: str) -> None:
    g = np.random.default_rng(12)
    deltas = [g.standard_normal((24, 18)) for _ in range(3)]
    found = twin(ours, deltas, [1.0] * 3)
    assert relative(found, getattr(dense, published)(deltas, np.float64)) < 1e-10


# ---- adapters into an adapter ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHOD_OPTIONS)
def test_adapters_are_stored_exactly_or_cut_to_a_rank(tools: ModuleType, place: Any, name: str) -> None:
    pairs = [(a.astype(np.float32), b.astype(np.float32)) for a, b in draw(13, 24, 17)]
    scalings = (2.0, 0.5, 1.25)
    uris = [place.adapter({MODULE: p}, scaling=s) for p, s in zip(pairs, scalings, strict=True)]
    deltas = [s * (b.astype(np.float64) @ a.astype(np.float64)) for (a, b), s in zip(pairs, scalings, strict=True)]
    expected = -0.5 * twin(name, deltas, WEIGHTS)
    each, shared = [{"weight": w} for w in WEIGHTS], {"lambda": -0.5, **METHOD_OPTIONS[name]}
    for store, rank in (("concat", 7), ({"svd": {"rank": 7}}, 7), ({"svd": {"rank": 3}}, 3), (None, 4)):
        output = {} if store is None else {"output": {"store": store}}
        found = tools.merge(place, tools.adapters(name, uris, each, shared, **output))
        assert found[f"base_model.model.{MODULE}.lora_A.weight"].shape == (rank, 17)
        u, s, v = dense.thin_svd(expected)
        if METHODS[name].flat:  # of equal directions those with most of the plain sum stay
            total = np.sum(dense.weighted(deltas, WEIGHTS), axis=0)
            best = kept_of_equals(expected, -total, rank)
        else:
            best = (u[:, :rank] * s[:rank]) @ v[:, :rank].T
        np.testing.assert_allclose(product(found), best, rtol=1e-4, atol=1e-5 * s[0])


def kept_of_equals(x: F64, total: F64, rank: int) -> F64:
    """The first `rank` singular directions of x; equal ones ordered by ⟨u·vᵀ, total⟩."""
    u, s, v = dense.thin_svd(x)
    groups: list[list[int]] = []
    for k in range(len(s)):
        if groups and abs(s[k] - s[groups[-1][0]]) < 1e-9 * s[0]:
            groups[-1].append(k)
        else:
            groups.append([k])
    out, left = np.zeros_like(x), rank
    for group in groups:
        inner = u[:, group].T @ total @ v[:, group]
        _, turn = np.linalg.eigh((inner + inner.T) / 2)
        turn = turn[:, ::-1][:, :left]
        out += s[group[0]] * (u[:, group] @ turn) @ (v[:, group] @ turn).T
        left -= turn.shape[1]
    return out


def test_iso_cut_to_a_rank_keeps_the_directions_of_the_sum() -> None:
    """On the core: no SVD of equal singular values decides which directions an adapter keeps."""
    pairs = draw(27, 24, 17)
    total = np.sum([b @ a for a, b in pairs], axis=0)
    u, s, v = dense.thin_svd(total)
    expected = s.mean() * u[:, :3] @ v[:, :3].T
    np.testing.assert_allclose(kept_of_equals(s.mean() * u @ v.T, total, 3), expected, atol=1e-9)


def test_a_module_that_some_adapters_lack_is_merged_from_the_others(tools: ModuleType, place: Any) -> None:
    (one, two) = [(a.astype(np.float32), b.astype(np.float32)) for a, b in draw(14, 12, 9, (2, 2))]
    both = place.adapter({"l.a": one, "l.b": two})
    alone = place.adapter({"l.a": two})
    found = tools.merge(place, tools.adapters("tsv_m", [both, alone], [{}, {}]))
    expected = dense.tsv_m([one[1] @ one[0].astype(np.float64), two[1] @ two[0].astype(np.float64)], [1.0, 1.0])
    u, s, v = dense.thin_svd(expected)
    np.testing.assert_allclose(product(found, "l.a"), (u[:, :2] * s[:2]) @ v[:, :2].T, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(product(found, "l.b"), two[1] @ two[0], rtol=1e-4, atol=1e-5)


def test_a_module_that_an_adapter_lacks_counts_in_a_mean(tools: ModuleType, place: Any) -> None:
    (pair,) = [(a.astype(np.float32), b.astype(np.float32)) for a, b in draw(14, 12, 9, (3,))]
    uris = [place.adapter({"l.a": pair, "l.b": pair}), place.adapter({"l.a": pair})]
    each = [{"weight": 1.0}, {"weight": 3.0}]
    found = tools.merge(place, tools.adapters("star", uris, each, {"eta": 0.5}))
    whole = product(found, "l.a")
    np.testing.assert_allclose(product(found, "l.b"), whole / 4, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(whole, dense.star([pair[1] @ pair[0].astype(np.float64)], [1.0], 0.5), rtol=1e-4,
                               atol=1e-5)  # fmt: skip


@pytest.mark.parametrize("name", ["tsv_m", "core_tsv", "iso_c"])
def test_bytes_do_not_depend_on_memory_or_workers(tools: ModuleType, place: Any, name: str) -> None:
    adapters = [
        {f"l.{i}": p for i, p in enumerate(draw(15 + k, 40, 30, (3, 3)))} for k in range(2)
    ]  # fmt: skip
    uris = [place.adapter(a) for a in adapters]
    base = place.model({f"l.{i}.weight": np.ones((40, 30)) for i in range(2)})
    for kind in ("adapter", "model"):
        manifest = {**tools.adapters(name, uris, [{}, {}], output={"kind": kind}), "base_model": base}
        outs = []
        for memory, workers in ((None, 1), (0, 1), (0, 3)):
            outs.append(place.out())
            tools.run(api.plan(manifest, outs[-1]), memory=memory, workers=workers)
        first, *others = [tools.read_bytes(out) for out in outs]
        assert all(other == first for other in others)


# ---- adapters folded into a model ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", METHOD_OPTIONS)
def test_a_fold_adds_the_merged_product_to_the_base_and_rounds_once(
    tools: ModuleType, place: Any, name: str, dtype: torch.dtype
) -> None:
    g = torch.Generator().manual_seed(16)
    rows, cols = 150, 20
    pairs = [(a.astype(np.float32), b.astype(np.float32)) for a, b in draw(16, rows, cols)]
    base_weight = torch.randn(rows, cols, generator=g).to(dtype)
    base = place.model({WEIGHT: base_weight, "model.norm.weight": torch.ones(cols).to(dtype)})
    uris = [place.adapter({MODULE: p}) for p in pairs]
    manifest = tools.adapters(name, uris, [{"weight": w} for w in WEIGHTS], {"lambda": 0.5, **METHOD_OPTIONS[name]},
                              base_model=base, output={"kind": "model"})  # fmt: skip
    found = tools.merge(place, manifest)
    deltas = [b.astype(np.float64) @ a.astype(np.float64) for a, b in pairs]
    expected = base_weight.double().numpy() + 0.5 * twin(name, deltas, WEIGHTS)
    assert found[WEIGHT].dtype == dtype
    assert torch.equal(found["model.norm.weight"], torch.ones(cols).to(dtype))
    if dtype == torch.float32:
        np.testing.assert_allclose(found[WEIGHT].double().numpy(), expected, rtol=1e-5, atol=1e-5)
    else:
        rounded = torch.from_numpy(expected).float().to(dtype)
        assert (found[WEIGHT] == rounded).float().mean() > 0.99


def test_a_fold_in_several_extents_is_the_same(tools: ModuleType, place: Any) -> None:
    pairs = [(a.astype(np.float32), b.astype(np.float32)) for a, b in draw(28, 300, 20)]
    base = place.model({WEIGHT: np.random.default_rng(28).standard_normal((300, 20))})
    manifest = tools.adapters("tsv_m", [place.adapter({MODULE: p}) for p in pairs], [{}] * 3, base_model=base,
                              output={"kind": "model"})  # fmt: skip
    plan = api.plan(manifest, place.out())
    cut = replace(plan, tasks=tuple(replace(task, tile_rows=64, extent_rows=64) for task in plan.tasks))
    found = []
    for some in (plan, cut):
        found.append(place.out())
        tools.run(tools.at(some, found[-1]))
    assert tools.read_bytes(found[0]) == tools.read_bytes(found[1])


def test_a_fold_of_stacked_adapters_takes_their_sum_as_one_source(tools: ModuleType, place: Any) -> None:
    pairs = [(a.astype(np.float32), b.astype(np.float32)) for a, b in draw(17, 12, 9, (2, 2, 2))]
    base = place.model({WEIGHT: np.zeros((12, 9))})
    a, b, c = [place.adapter({MODULE: p}, scaling=s) for p, s in zip(pairs, (1.0, 2.0, 0.5), strict=True)]
    manifest = tools.models("tsv_m", base, [f"{base}+{a}+{b}", f"{base}+{c}"], [{"weight": 1.0}] * 2)
    x, y, z = [s * (q.astype(np.float64) @ p) for (p, q), s in zip(pairs, (1.0, 2.0, 0.5), strict=True)]
    np.testing.assert_allclose(
        tools.merge_one(place, manifest, WEIGHT), dense.tsv_m([x + y, z], [1.0, 1.0]), rtol=1e-4, atol=1e-5
    )


# ---- models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(24, 17), (17, 24), (1, 9), (9, 1), (1, 1), (33, 33)])
@pytest.mark.parametrize("name", ON_MODELS)
def test_models_are_merged_whole(tools: ModuleType, place: Any, name: str, shape: tuple[int, int]) -> None:
    g = np.random.default_rng(18)
    base, *sources = [g.standard_normal(shape).astype(np.float32) for _ in range(4)]
    uris = [place.model({"w": x}) for x in (base, *sources)]
    manifest = tools.models(name, uris[0], uris[1:], [{"weight": w} for w in WEIGHTS],
                            {"lambda": 0.5, **METHOD_OPTIONS[name]})  # fmt: skip
    deltas = [(x - base).astype(np.float64) for x in sources]
    expected = base + 0.5 * twin(name, deltas, WEIGHTS)
    np.testing.assert_allclose(tools.merge_one(place, manifest), expected, rtol=1e-5, atol=1e-5)


def test_large_matrices_by_their_gram_matrix_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(19)
    for shape in ((60, 40), (40, 60), (50, 50)):
        x = torch.randn(shape, generator=g)
        exact = lowrank.spectrum_of(x)
        monkeypatch.setattr(lowrank, "_GRAM_SIDE", 8)
        found = lowrank.spectrum_of(x)
        monkeypatch.undo()
        torch.testing.assert_close(found.s_k, exact.s_k, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(found.product(), x.double(), rtol=1e-9, atol=1e-9)
        for side in (found.u_mk, found.v_nk):
            torch.testing.assert_close(side.T @ side, torch.eye(side.shape[1]).double(), rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", ON_MODELS)
@pytest.mark.parametrize("shape", [(7,), (), (2, 3, 4)])
def test_what_is_no_matrix_is_averaged_or_summed(
    tools: ModuleType, place: Any, name: str, shape: tuple[int, ...]
) -> None:
    g = np.random.default_rng(20)
    base, a, b = [g.standard_normal(shape).astype(np.float32) for _ in range(3)]
    uris = [place.model({"w": x}) for x in (base, a, b)]
    manifest = tools.models(name, uris[0], uris[1:], [{"weight": 2.0}, {"weight": 1.0}], METHOD_OPTIONS[name])
    summed = 2.0 * (a - base) + (b - base)
    expected = base + (summed if name == "boost" else summed / 2)
    np.testing.assert_allclose(tools.merge_one(place, manifest), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0,)])
def test_empty_tensors_stay_empty(tools: ModuleType, place: Any, shape: tuple[int, ...]) -> None:
    for name in ON_MODELS:
        uris = [place.model({"w": np.zeros(shape)}) for _ in range(3)]
        found = tools.merge(place, tools.models(name, uris[0], uris[1:], [{"weight": 1.0}] * 2, METHOD_OPTIONS[name]))
        assert tuple(found["w"].shape) == shape


@pytest.mark.parametrize("name", ["tsv_m", "wudi"])
def test_one_model_at_weight_one_is_itself(tools: ModuleType, place: Any, name: str) -> None:
    g = np.random.default_rng(21)
    base, source = [(g.integers(-64, 65, (37, 20)) / 8).astype(np.float32) for _ in range(2)]
    manifest = tools.models(name, place.model({"w": base}), [place.model({"w": source})], [{"weight": 1.0}])
    np.testing.assert_allclose(tools.merge_one(place, manifest), source, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("name", ON_MODELS)
@pytest.mark.parametrize("shape", [(12, 9), (7,)])
def test_a_model_of_weight_zero_takes_no_part(tools: ModuleType, place: Any, name: str, shape: tuple[int, ...]) -> None:
    g = np.random.default_rng(29)
    base, a, b, c = [place.model({"w": g.standard_normal(shape).astype(np.float32)}) for _ in range(4)]
    each = [{"weight": w} for w in (1.0, 2.0, 0.0)]
    found = tools.merge_one(place, tools.models(name, base, [a, b, c], each, METHOD_OPTIONS[name]))
    without = tools.merge_one(place, tools.models(name, base, [a, b], each[:2], METHOD_OPTIONS[name]))
    np.testing.assert_array_equal(found, without)


def test_a_model_that_is_the_base_takes_no_part_in_wudi(tools: ModuleType, place: Any) -> None:
    g = np.random.default_rng(22)
    base, source = [g.standard_normal((9, 7)).astype(np.float32) for _ in range(2)]
    uris = [place.model({"w": base}), place.model({"w": source}), place.model({"w": base.copy()})]
    manifest = tools.models("wudi", uris[0], uris[1:], [{"weight": 1.0}] * 2)
    np.testing.assert_allclose(tools.merge_one(place, manifest), source, rtol=1e-5, atol=1e-5)


def test_a_whole_tensor_is_written_in_extents_that_verify(tools: ModuleType, place: Any) -> None:
    g = np.random.default_rng(23)
    uris = [place.model({"w": torch.from_numpy(g.standard_normal((300, 40))).bfloat16()}) for _ in range(3)]
    out = place.out()
    plan = api.plan(tools.models("tsv_m", uris[0], uris[1:], [{"weight": 1.0}] * 2), out)
    (task,) = plan.tasks
    assert (task.cut, len(plan.units)) == ("whole", 1)
    tools.run(plan)
    assert verify_output(out, replay=None).replayed == 1
    cut = replace(plan, tasks=(replace(task, tile_rows=16, extent_rows=64),))
    again = place.out()
    tools.run(tools.at(cut, again))
    assert tools.read_bytes(again) == tools.read_bytes(out)
    document = json.loads(bytes(MemoryStore(again.removeprefix("memory://")).files["raymerge.json"]))
    mine = [e for e in document["extents"] if e[0].endswith(".safetensors")]
    assert [e[2] - e[1] for e in sorted(mine, key=lambda e: e[1])][1:] == [64 * 80] * 4 + [44 * 80]


def test_the_plan_declares_and_checks_the_memory_of_whole_tensors(tools: ModuleType, place: Any) -> None:
    uris = [place.model({"w": np.ones((600, 500)) * i}) for i in range(3)]
    whole = api.plan(tools.models("tsv_m", uris[0], uris[1:], [{"weight": 1.0}] * 2), place.out())
    rows = api.plan(tools.models("task_arithmetic", uris[0], uris[1:], [{"weight": 1.0}] * 2), place.out())
    assert peak_bytes(whole) > 4 * 4 * 600 * 500 + 8 * 8 * 600 * 500 > peak_bytes(rows)
    with pytest.raises(Exception, match=r"memory|needs"):
        tools.run(whole, memory=peak_bytes(whole) // 2)


# ---- what is refused -------------------------------------------------------------------------------------------------


def codes(manifest: Any, place: Any) -> set[str]:
    return {p.code for p in api.plan(manifest, place.out()).problems}


def test_adapters_and_whole_models_do_not_mix_in_one_tensor(tools: ModuleType, place: Any) -> None:
    base, other = place.model({WEIGHT: np.ones((6, 5))}), place.model({WEIGHT: np.zeros((6, 5))})
    adapter = place.adapter({MODULE: draw(24, 6, 5, (2,))[0]})
    sources, each = [f"{base}+{adapter}", other], [{"weight": 1.0}] * 2
    plan = api.plan(tools.models("tsv_m", base, sources, each), place.out())
    assert [p.code for p in plan.problems] == ["null-space"]
    assert "float32 and float64" in plan.problems[0].why
    assert codes(tools.models("core_tsv", base, sources, each), place) == {"bad-space"}
    assert not codes(tools.models("ties", base, sources, each), place)


def test_a_core_does_not_round_each_adapter(tools: ModuleType, place: Any) -> None:
    base = place.model({WEIGHT: np.ones((6, 5))})
    adapters = [place.adapter({MODULE: draw(25 + i, 6, 5, (2,))[0]}) for i in range(2)]
    manifest = tools.adapters("iso_c", adapters, [{}, {}], base_model=base,
                              output={"kind": "model", "rounding": "peft_safe"})  # fmt: skip
    assert codes(manifest, place) == {"bad-rounding"}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["tsv_m", "iso_c", "wudi"])
def test_what_is_no_number_ends_the_merge(tools: ModuleType, place: Any, name: str, bad: float) -> None:
    a, b = draw(26, 6, 5, (2,))[0]
    broken = a.copy()
    broken[0, 0] = bad
    base = place.model({WEIGHT: np.ones((6, 5))})
    uris = [place.adapter({MODULE: (x, b)}) for x in (a, broken)]
    damaged = np.ones((6, 5))
    damaged[1, 2] = bad
    for manifest in (
        tools.adapters(name, uris, [{}, {}], METHOD_OPTIONS[name]),
        tools.adapters(name, uris, [{}, {}], METHOD_OPTIONS[name], base_model=base, output={"kind": "model"}),
        tools.models(name, base, [place.model({WEIGHT: damaged}), place.model({WEIGHT: np.zeros((6, 5))})],
                     [{"weight": 1.0}] * 2, METHOD_OPTIONS[name]),
    ):  # fmt: skip
        with pytest.raises(MergeFailedError) as caught:
            tools.merge(place, manifest)
        assert [p.code for p in caught.value.problems] == ["not-finite"]
