"""Every method of the table, over every case and every common property: none can be added and miss one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from merger import api
from merger.methods import METHODS, lowrank
from merger.methods.facts import sample_call
from merger.planning.memory import peak_bytes
from merger.planning.nouns import MergePlan
from tests.method_table import MODULE, PROPERTIES, ROWS, WEIGHT, Case, Row, cases

F64 = npt.NDArray[np.float64]

CASES = [case.name for case in cases()]
ON_CORES = [name for name, spec in METHODS.items() if spec.core is not None]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As in a worker: bits hang on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def case_of(row: Row, name: str) -> Case:
    (found,) = [case for case in cases(row.measure) if case.name == name]
    return found if row.count is None else found.first(row.count)


def document(place: Any, name: str, case: Case) -> dict[str, Any]:
    """Adapters folded into their base: what every method can do."""
    row = ROWS[name]
    entries = []
    for at, (a, b) in enumerate(case.pairs):
        own = {**({"weight": case.weights[at]} if row.weighted else {}), **row.each}
        entry: dict[str, Any] = {"adapter": place.adapter({MODULE: (a, b)}), "parameters": own}
        if METHODS[name].statistics != "none":
            entry["statistics"] = place.statistics({WEIGHT: case.statistics[at]})
        entries.append(entry)
    return {
        "merge_method": name, "base_model": place.model({WEIGHT: case.base}), "adapters": entries,
        "parameters": dict(row.shared), "output": {"kind": "model"},
    }  # fmt: skip


def merged(tools: ModuleType, place: Any, name: str, case: Case) -> F64:
    found: F64 = tools.merge(place, document(place, name, case))[WEIGHT].double().numpy()
    return found


def assert_near(found: F64, expected: F64, case: Case, tolerance: float) -> None:
    size = max(float(np.abs(x).max(initial=0.0)) for x in (expected, case.base, *case.deltas))
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * size)


def test_every_method_has_a_row_and_every_exception_a_reason() -> None:
    assert set(METHODS) <= set(ROWS)
    for name, row in ROWS.items():
        for what in row.lacks:
            assert what in (*PROPERTIES, *CASES), (name, what)
            assert row.lacks[what], (name, what)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", METHODS)
def test_it_equals_its_slow_twin(tools: ModuleType, place: Any, name: str, case: str) -> None:
    row = ROWS[name]
    if case in row.lacks:
        return
    drawn = case_of(row, case)
    if row.count is not None and len(drawn.pairs) != row.count:
        return
    assert_near(merged(tools, place, name, drawn), row.twin(drawn), drawn, row.tolerance)


def having(what: str) -> list[str]:
    return [name for name in METHODS if what not in ROWS[name].lacks]


@pytest.mark.parametrize("name", having("scale"))
def test_scaled_sources_give_a_scaled_merge(tools: ModuleType, place: Any, name: str) -> None:
    row, case = ROWS[name], case_of(ROWS[name], "random")
    found = merged(tools, place, name, case.scaled(2.0**20)) / 2.0**20
    assert_near(found, merged(tools, place, name, case), case, row.tolerance)


@pytest.mark.parametrize("name", having("order"))
def test_the_order_of_sources_changes_nothing(tools: ModuleType, place: Any, name: str) -> None:
    row, case = ROWS[name], case_of(ROWS[name], "random")
    expected = merged(tools, place, name, case)
    count = len(case.pairs)
    for order in ([*range(count)][::-1], [*range(1, count), 0]):
        assert_near(merged(tools, place, name, case.ordered(order)), expected, case, row.tolerance)


@pytest.mark.parametrize("name", having("itself"))
def test_one_source_at_weight_one_is_itself(tools: ModuleType, place: Any, name: str) -> None:
    row, case = ROWS[name], replace(case_of(ROWS[name], "one source"), weights=(1.0,))
    assert_near(merged(tools, place, name, case), case.models[0], case, row.tolerance)


@pytest.mark.parametrize("name", having("gauge"))
def test_other_factors_of_the_same_deltas_change_nothing(tools: ModuleType, place: Any, name: str) -> None:
    row, case = ROWS[name], case_of(ROWS[name], "random")
    turned = case.turned()
    for ours, theirs in zip(turned.deltas, case.deltas, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert_near(merged(tools, place, name, turned), merged(tools, place, name, case), case, row.tolerance)


@pytest.mark.parametrize("name", having("cut"))
def test_any_cut_is_the_whole(tools: ModuleType, place: Any, name: str) -> None:
    """Deltas here are exact sums and products: tiles may change the order of float sums in statistics, and no more."""
    row, case = ROWS[name], case_of(ROWS[name], "random")
    plan: MergePlan = api.plan(document(place, name, case), place.out())
    assert plan.problems == ()
    whole = outcome(tools, place, plan)
    assert outcome(tools, place, plan, memory=peak_bytes(plan)).tobytes() == whole.tobytes()
    for cut in ({"tile_rows": 1, "extent_rows": 1}, {"tile_rows": 5, "extent_rows": 2}, {"tile_rows": 100}):
        assert_near(outcome(tools, place, tools.recut(plan, **cut), workers=2), whole, case, row.tolerance)


def outcome(tools: ModuleType, place: Any, plan: MergePlan, **options: Any) -> F64:
    out = place.out()
    tools.run(tools.at(plan, out), **options)
    found: F64 = tools.read_tensors(out)[WEIGHT].double().numpy()
    return found


ON_MODELS = [name for name, spec in METHODS.items() if spec.core is None or spec.whole is not None]


@pytest.mark.parametrize("name", ON_MODELS)
def test_empty_tensors_and_scalars_keep_their_shapes(tools: ModuleType, place: Any, name: str) -> None:
    row, spec = ROWS[name], METHODS[name]
    shapes = {"no_rows": (0, 4), "no_columns": (4, 0), "nothing": (0,), "scalar": (), "one": (1, 1)}
    base, *others = [place.model({n: np.full(s, 1.0 + i) for n, s in shapes.items()}) for i in range(4)]
    entries = []
    for uri in others[: row.count or 3]:
        entry: dict[str, Any] = {"model": uri, "parameters": {**({"weight": 0.5} if row.weighted else {}), **row.each}}
        if spec.statistics != "none":
            square = spec.statistics == "gram"
            names = [n for n in shapes if not square or len(shapes[n]) == 2]
            entry["statistics"] = place.statistics({
                n: np.eye(shapes[n][1]) if square else np.ones(shapes[n]) for n in names
            })  # fmt: skip
        entries.append(entry)
    wanted = {"merge_method": name, "models": entries, "parameters": dict(row.shared)}
    if spec.base != "member" or name == "slerp":
        wanted["base_model"] = base
    found = tools.merge(place, wanted)
    assert {n: tuple(x.shape) for n, x in found.items()} == shapes
    assert np.isfinite(found["one"].numpy()).all()


# ---- in the core: exact in float64, and the same from float32 factors ------------------------------------------------


def in_core(name: str, case: Case, dtype: type[np.floating[Any]]) -> F64:
    """The block itself, on factors of this dtype."""
    row, spec = ROWS[name], METHODS[name]
    block = spec.core
    assert block is not None
    shared = {key: value for key, value in row.shared.items() if spec.parameter(key) is not None}
    call = sample_call(spec, case.weights, shared)
    keys = tuple(_key(i) for i in range(len(case.pairs))) if spec.prepare == "drop" else call.keys
    core = lowrank.build_core([(torch.from_numpy(a.astype(dtype)), torch.from_numpy(b.astype(dtype)))
                               for a, b in case.pairs])  # fmt: skip
    ready = replace(call, keys=keys)
    if spec.statistics == "gram":
        grams = [torch.from_numpy(s.astype(dtype)) for s in case.statistics]
        p, q = block.merge_measured(ready, core, lambda k: grams[k])
    else:
        p, q = block.merge(ready, core)
    found: F64 = (p @ q.T).numpy()
    return found


def _key(i: int) -> int:
    from tests.reference import key_of

    return key_of(0, i, WEIGHT, "delta")


def generic(name: str, seed: int) -> Case:
    """Full-precision factors, 48 × 40."""
    g = np.random.default_rng(seed)
    pairs = tuple((g.standard_normal((r, 40)), g.standard_normal((48, r))) for r in (4, 3, 5))
    row = ROWS[name]
    drawn = tuple(np.zeros(0) if row.measure is None else row.measure(g, 48, 40) for _ in pairs)
    return Case("generic", np.zeros((48, 40)), pairs, (1.0, 0.5, 2.0), drawn)


@pytest.mark.parametrize("name", ON_CORES)
def test_the_core_equals_the_dense_definition_in_float64(name: str) -> None:
    for seed in range(3):
        case = generic(name, seed)
        expected = ROWS[name].twin(case)
        assert np.linalg.norm(in_core(name, case, np.float64) - expected) <= 1e-10 * np.linalg.norm(expected)


@pytest.mark.parametrize("name", ON_CORES)
def test_float32_factors_give_what_float64_factors_give(name: str) -> None:
    case = generic(name, 11)
    narrow, wide = in_core(name, case, np.float32), in_core(name, case, np.float64)
    assert np.linalg.norm(narrow - wide) <= 1e-5 * np.linalg.norm(wide)
