"""A method written out in its blocks: equal to the preset that has them, and refused with a path where it is wrong."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from merger import api
from merger.errors import ManifestError
from merger.manifest import load_manifest
from merger.methods import METHODS
from merger.methods.compose import Blocks, CompositionError, combine_blocks, compose, prepare_blocks

Blocked = Mapping[str, Any]

PRESETS: dict[str, tuple[dict[str, Any], Blocked]] = {
    "task_arithmetic": ({"lambda": 0.7}, {"combine": "sum", "finish": {"lambda": 0.7}}),
    "task_arithmetic-mean": ({"normalize": True}, {"combine": {"sum": {"normalize": True}}}),
    "ties": (
        {"density": 0.2, "lambda": 0.7},
        {"space": "delta", "prepare": {"trim": {"density": 0.2}}, "combine": {"elect": {}}, "finish": {"lambda": 0.7}},
    ),
    "svc": ({"lambda": 0.5}, {"combine": "sum", "finish": {"lambda": 0.5, "calibrate": "svc"}}),
    "nan": ({}, {"combine": "sum", "parameters": {"balance": "nan"}}),
    "ties-model": (
        {"density": 0.3, "scope": "model", "divisor": "count"},
        {"prepare": {"trim": {"density": 0.3, "scope": "model"}}, "combine": {"elect": {"divisor": "count"}}},
    ),
    "dare_linear": ({"density": 0.4}, {"prepare": {"drop": {"density": 0.4}}, "combine": {"sum": None}}),
    "dare_ties": (
        {"density": 0.4, "elect": "unweighted"},
        {"prepare": {"drop": {"density": 0.4}}, "combine": {"elect": {"normalize": False, "elect": "unweighted"}}},
    ),
    "magnitude_prune": ({"density": [0.1, 0.9]}, {"prepare": {"trim": {"density": [0.1, 0.9]}}, "combine": "sum"}),
    "breadcrumbs_ties": (
        {"density": 0.6, "gamma": 0.1, "lambda": 0.7},
        {"prepare": {"band": {"density": 0.6, "gamma": 0.1}}, "combine": {"elect": {"normalize": False}},
         "finish": {"lambda": 0.7}},
    ),
    "della": (
        {"density": 0.5, "epsilon": 0.2},
        {"prepare": {"magprune": {"density": 0.5, "epsilon": 0.2}}, "combine": "elect"},
    ),
    "nearswap": ({"t": 0.05}, {"space": "delta", "combine": {"nearswap": {"t": 0.05}}}),
    "slerp": ({"t": 0.3}, {"combine": {"slerp": {"t": 0.3}}}),
    "linear": ({}, {"space": "weight", "combine": "mean"}),
}  # fmt: skip


@pytest.mark.parametrize("name", PRESETS)
def test_blocks_are_the_preset_that_has_them(tools: ModuleType, place: Any, name: str) -> None:
    g = np.random.default_rng(3)
    method = name.partition("-")[0]
    named, blocks = PRESETS[name]
    shapes = {"model.layers.0.w": (90, 40), "model.layers.1.w": (70, 30), "norm": (33,)}
    uris = [place.model({n: g.integers(-9, 10, s) / 8 for n, s in shapes.items()}) for _ in range(3)]
    base, *others = uris
    others = others[: METHODS[method].max_sources or 2] if method != "slerp" else others[:1]
    each: list[dict[str, Any]] = [{"weight": w} for w in (0.75, -0.5)] if method not in ("nearswap", "slerp") else [{}]
    with_name = tools.models(method, None if method == "linear" else base, others, each, named, seed=5)
    written = {k: v for k, v in with_name.items() if k not in ("merge_method", "parameters")} | dict(blocks)
    expected, found = (api.plan(document, place.out()) for document in (with_name, written))
    assert expected.problems == found.problems == ()
    assert [t.rounds for t in expected.tasks] == [t.rounds for t in found.tasks]
    files = [tools.read_bytes(tools.run(plan).path) for plan in (expected, found)]
    assert files[0] == files[1]


def test_blocks_on_adapters_are_the_preset_and_may_work_in_the_core(tools: ModuleType, place: Any) -> None:
    g = np.random.default_rng(4)
    uris = [place.adapter({"l.0.q": (g.standard_normal((4, 20)), g.standard_normal((30, 4)))}) for _ in range(2)]
    written = {
        "adapters": [{"adapter": uris[0], "parameters": {"weight": 2.0, "density": 0.5}}, {"adapter": uris[1]}],
        "prepare": {"trim": {"density": 0.3}}, "combine": "elect",
    }  # fmt: skip
    named = {
        "merge_method": "ties", "parameters": {"density": 0.3},
        **{k: v for k, v in written.items() if k not in ("prepare", "combine")},
    }  # fmt: skip
    for space in ({}, {"space": "core"}):
        found = [tools.read_bytes(tools.run(api.plan({**d, **space}, place.out())).path) for d in (written, named)]
        assert found[0] == found[1], space


def test_blocks_no_preset_has_are_a_merge(tools: ModuleType, place: Any) -> None:
    base, source = np.zeros((2, 4)), np.array([[4.0, -3.0, 2.0, 1.0], [0.5, 0.25, -0.125, 8.0]])
    manifest = {
        "base_model": place.model({"w": base}), "models": [{"model": place.model({"w": source})}],
        "prepare": {"trim": {"density": 0.5}}, "combine": {"nearswap": {"t": 2.5}},
    }  # fmt: skip
    np.testing.assert_array_equal(tools.merge_one(place, manifest), [[2.5, -2.5, 2, 0], [0, 0, 0, 2.5]])


def test_the_manifest_of_an_output_gives_the_same_manifest_again(place: Any) -> None:
    document = {"adapters": [{"adapter": "/a"}, {"adapter": "/b"}], **PRESETS["ties"][1]}
    loaded = load_manifest(document)
    assert loaded.resolved() == {
        "version": 1, "adapters": [{"adapter": "/a"}, {"adapter": "/b"}], "space": "delta", "prepare": "trim",
        "combine": "elect", "parameters": {"density": 0.2, "lambda": 0.7}, **_rest(loaded.resolved()),
    }  # fmt: skip
    assert load_manifest(loaded.resolved()) == loaded
    assert loaded.method is not None
    assert loaded.method.name == "trim+elect"


def _rest(document: Mapping[str, Any]) -> dict[str, Any]:
    return {key: document[key] for key in ("seed", "output")}


@pytest.mark.parametrize(
    "blocks, code, path, said",
    [
        ({"prepare": {"trimm": {}}, "combine": "sum"}, "bad-value", "prepare.trimm", "did you mean trim"),
        ({"prepare": {"trim": {"densty": 0.2}}, "combine": "sum"}, "unknown-key", "prepare.trim.densty", "density"),
        ({"prepare": {"trim": {"density": 1.2}}, "combine": "sum"}, "out-of-bounds", "prepare.trim.density", "[0, 1]"),
        ({"prepare": {"trim": {"density": [0.1, 7]}}, "combine": "sum"}, "out-of-bounds", "prepare.trim.density[1]",
         "7"),
        ({"prepare": {"trim": {}}}, "missing-key", "combine", "add combine"),
        ({"prepare": {"trim": {}, "drop": {}}, "combine": "sum"}, "bad-value", "prepare", "one step"),
        ({"combine": {"elect": {"divisor": "mean"}}}, "bad-value", "combine.elect.divisor", "weights, count"),
        ({"combine": {"elect": 3}}, "bad-value", "combine.elect", "mapping"),
        ({"combine": "sum", "finish": {"lamda": 1}}, "unknown-key", "finish.lamda", "did you mean lambda"),
        ({"combine": "sum", "finish": 3}, "bad-value", "finish", "mapping"),
        ({"combine": "sum", "finish": {"lambda": 1}, "parameters": {"lambda": 2}}, "conflict", "finish.lambda",
         "given twice"),
        ({"combine": "sum", "parameters": {"density": 0.2}}, "unknown-key", "parameters.density", "density"),
        ({"combine": "elect", "space": "weight"}, "conflict", "space", "space: delta"),
        ({"combine": "sum", "space": "knots"}, "bad-value", "space", "weight"),
        ({"combine": {"slerp": {"t": 0.5}}, "space": "delta"}, "conflict", "space", "space: weight"),
        ({"combine": "sum", "prepare": "magprune", "space": "core"}, "conflict", "prepare", "drop or trim"),
        ({"combine": "slerp"}, "missing-key", "parameters.t", "t"),
        ({"combine": "sum", "merge_method": "ties"}, "conflict", "combine", "keep one"),
        ({"combine": "sum", "combination_type": "cat"}, "conflict", "combine", "keep one"),
        ({"merge_method": "ties", "space": "weight"}, "bad-value", "space", "delta or core"),
        ({"merge_method": "linear", "space": "weight"}, "conflict", "space", "drop it"),
        ({"combination_type": "linear", "space": "delta"}, "conflict", "space", "PEFT"),
    ],
)  # fmt: skip
def test_wrong_blocks_are_refused_where_they_stand(blocks: Blocked, code: str, path: str, said: str) -> None:
    with pytest.raises(ManifestError) as refused:
        load_manifest({"adapters": [{"adapter": "/a"}, {"adapter": "/b"}], **blocks})
    assert [(p.code, p.where) for p in refused.value.problems] == [(code, path)]
    assert said in str(refused.value)


def test_every_wrong_block_is_reported_with_its_line() -> None:
    text = "adapters:\n- {adapter: /a}\nprepare:\n  trim: {density: 3}\ncombine:\n  elct: {}\nfinish: {lambda: x}\n"
    with pytest.raises(ManifestError) as refused:
        load_manifest(text, name="m.yaml")
    assert [p.where for p in refused.value.problems] == [
        "prepare.trim.density (m.yaml:4)", "combine.elct (m.yaml:6)", "finish.lambda (m.yaml:7)",
    ]  # fmt: skip


def test_a_delta_method_made_of_blocks_asks_for_its_base() -> None:
    with pytest.raises(ManifestError, match="no base_model"):
        load_manifest({"models": [{"model": "/a"}, {"model": "/b"}], "combine": "sum", "parameters": {"weight": 1}})


def test_every_pair_of_streamed_steps_composes() -> None:
    for prepare in (None, *prepare_blocks()):
        for combine in combine_blocks():
            own = METHODS.get(combine)
            if prepare is not None and own is not None:
                shared = {p.name for p in prepare_blocks()[prepare]} & {p.name for p in own.parameters}
                if own.tile is None or shared:
                    said = "both have a parameter" if own.tile is not None else "as they are"
                    with pytest.raises(CompositionError, match=said):
                        compose(Blocks(None, prepare, combine))
                    continue
            made = compose(Blocks(None, prepare, combine))
            assert made.prepare == (prepare or "none")
            assert len({p.name for p in made.parameters}) == len(made.parameters)
