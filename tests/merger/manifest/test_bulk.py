"""A bulk written out: order, names, placeholders, and everything that is wrong said once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from merger.errors import ManifestError
from merger.manifest import BulkMerge, Found, expand_bulk, parse_reference
from merger.manifest.documents import Document, read_documents
from merger.manifest.load import load_bulk_grammar


def expand(source: Any, **options: Any) -> tuple[BulkMerge, ...]:
    (document,) = read_documents(source, name="bulk.yaml")
    return expand_bulk(document, load_bulk_grammar(document), **{"date": "2026-11-21", "cwd": "/home", **options})


def refused(source: Any, **options: Any) -> list[tuple[str, str]]:
    with pytest.raises(ManifestError) as caught:
        expand(source, **options)
    return [(p.code, p.where) for p in caught.value.problems]


def paths(merges: tuple[BulkMerge, ...]) -> list[str]:
    return [str(merge.manifest.output.path) for merge in merges]


GRID = """
merges:
  - {name: chat, adapters: [{adapter: o/chat}, {adapter: o/b}], share: 2}
  - {name: sql, merge_method: task_arithmetic, adapters: [{adapter: o/sql}], parameters: {lambda: 0.1}}
defaults:
  merge_method: ties
  base_model: o/base
  parameters: {lambda: 1.0}
  output: {path: "s3://bucket/{date}/{name}/s{seed}-{parameters.lambda}", exists: replace}
matrix:
  seed: [1, 2]
  parameters.lambda: [0.5, 0.25]
"""


def test_a_matrix_is_the_product_in_written_order() -> None:
    merges = expand(GRID)
    assert [m.label for m in merges] == [
        "chat-1-0.5", "chat-1-0.25", "chat-2-0.5", "chat-2-0.25",
        "sql-1-0.5", "sql-1-0.25", "sql-2-0.5", "sql-2-0.25",
    ]  # fmt: skip
    assert paths(merges)[:2] == ["s3://bucket/2026-11-21/chat/s1-0.5", "s3://bucket/2026-11-21/chat/s1-0.25"]
    assert [m.share for m in merges] == [2.0] * 4 + [1.0] * 4
    assert [m.manifest.seed for m in merges] == [1, 1, 2, 2] * 2
    assert {m.manifest.merge_method for m in merges[4:]} == {"task_arithmetic"}
    assert all(m.manifest.output.exists == "replace" for m in merges)
    assert dict(merges[1].chosen) == {"seed": 1, "parameters.lambda": 0.25}


def test_references_of_statistics_are_filled_as_others_are(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (merge,) = expand({"merges": [{
        "name": "one", "merge_method": "fisher", "output": {"path": "/x/{name}"},
        "models": [
            {"model": "o/{name}", "statistics": str(tmp_path / "{name}")}, {"model": "o/b", "statistics": "o/{name}"},
        ],
    }]})  # fmt: skip
    assert merge.manifest.models is not None
    assert [str(m.statistics) for m in merge.manifest.models] == [str(tmp_path / "one"), "hf://o/one"]


def test_an_entry_goes_over_the_defaults_key_by_key_and_has_one_kind_of_sources_and_of_method() -> None:
    (merge,) = expand(
        """
merges: [{combination_type: linear, adapters: [{adapter: o/a}], output: {kind: adapter}}]
defaults:
  merge_method: ties
  models: [{model: o/m, parameters: {weight: 1}}]
  output: {path: "/x/{name}", shard_size: 1GB}
"""
    )
    assert merge.manifest.combination_type == "linear"
    assert merge.manifest.merge_method is None
    assert merge.manifest.sources_key == "adapters"
    assert (merge.manifest.output.kind, merge.manifest.output.shard_size) == ("adapter", 10**9)
    assert paths((merge,)) == ["/x/merge-1"]


def test_each_makes_one_merge_of_every_adapter_found() -> None:
    found = [Found(name, parse_reference(f"s3://bkt/in/{name}")) for name in ("a", "b")]
    merges = expand({"each": "s3://bkt/in", "defaults": {"output": {"path": "s3://bkt/out/{name}"}}}, found=found)
    assert [str((m.manifest.adapters or ())[0].adapter) for m in merges] == ["s3://bkt/in/a", "s3://bkt/in/b"]
    assert paths(merges) == ["s3://bkt/out/a", "s3://bkt/out/b"]
    merges = expand(
        {"each": "s3://bkt/in", "defaults": {"adapters": [{"adapter": "o/common"}, {"adapter": "{each}"}],
                                           "output": {"path": "s3://bkt/out/{name}"}}},
        found=found,
    )  # fmt: skip
    assert [str(a.adapter) for a in merges[1].manifest.adapters or ()] == ["hf://o/common", "s3://bkt/in/b"]
    assert refused(
        {"each": "s3://bkt/in", "defaults": {"adapters": [{"adapter": "o/common"}], "output": {"path": "/o/{name}"}}},
        found=found,
    ) == [("missing-key", "defaults")]  # fmt: skip


def test_a_manifest_elsewhere_stands_over_the_defaults() -> None:
    elsewhere = {"s3://bkt/two.yaml": Document({"adapters": [{"adapter": "o/z"}], "seed": 7})}
    merges = expand(
        {"merges": [{"manifest": "s3://bkt/two.yaml"}], "defaults": {"seed": 1, "output": {"path": "/x/{name}"}}},
        manifests=elsewhere,
    )
    assert (merges[0].label, merges[0].manifest.seed, paths(merges)) == ("two", 7, ["/x/two"])


def test_the_fingerprint_is_left_for_the_planner() -> None:
    merges = expand(
        {"merges": [{"adapters": [{"adapter": "o/a"}]}], "defaults": {"output": {"path": "/x/{fingerprint}"}}}
    )
    assert paths(merges) == ["/x/{fingerprint}"]


def one(**keys: Any) -> dict[str, Any]:
    return {"merges": [{"name": "m", "adapters": [{"adapter": "o/a"}], **keys}]}


@pytest.mark.parametrize(
    "source, expected",
    [
        (one(), [("no-output", "m: output.path")]),
        ({**one(output={"path": "/x"}), "matrix": {"seed": [1, 2]}}, [("conflict", "m-2: output.path")]),
        ({"merges": [*one(output={"path": "/x"})["merges"], *one(output={"path": "/y"})["merges"]]},
         [("conflict", "m: merges")]),
        ({"merges": [*one(output={"path": "/x"})["merges"], {**one(output={"path": "/x/y"})["merges"][0],
                                                             "name": "n"}]},
         [("conflict", "n: output.path")]),
        (one(output={"path": "/x/{nme}"}), [("bad-value", "m: output.path")]),
        (one(output={"path": "/x/{adapters}"}), [("bad-value", "m: output.path")]),
        (one(base_model="o/{fingerprint}", output={"path": "/x"}), [("bad-value", "m: base_model")]),
        ({**one(output={"path": "/x/{seed}"}), "matrix": {"seed.x": [1]}},
         [("bad-value", "m-1: output.path")]),
        ({**one(output={"path": "/x/{name}"}), "matrix": {"parameters.density": [0.2, 2.0]},
          "defaults": {"merge_method": "ties"}},
         [("out-of-bounds", "m-2.0: parameters.density (matrix.parameters.density)")]),
        ({**one(output={"path": "/x/{name}"}), "matrix": {"adapters[3].adapter": ["o/b"]}},
         [("bad-value", "m-o-b: matrix.adapters[3].adapter")]),
        ({**one(output={"path": "/x/{name}"}), "matrix": {"a..b": [1]}}, [("bad-value", "m-1: matrix.a..b")]),
    ],
)  # fmt: skip
def test_refused(source: Any, expected: list[tuple[str, str]]) -> None:
    found = refused(source)
    assert found[: len(expected)] == expected


def test_what_all_merges_have_in_common_is_said_once_and_where_it_was_written() -> None:
    text = """
merges:
  - {name: a, adapters: [{adapter: o/a}]}
  - {name: b, adapters: [{adapter: o/b}], sed: 1}
  - {name: c, adapters: [{adapter: o/c}]}
defaults:
  output: {path: "/x/{name}"}
  parameters: {densty: 0.2}
"""
    with pytest.raises(ManifestError) as caught:
        expand(text)
    assert [(p.code, p.where) for p in caught.value.problems] == [("unknown-key", "merges[1] (bulk.yaml:4)")]
    with pytest.raises(ManifestError) as caught:
        expand(text.replace(", sed: 1", ""))
    (problem,) = caught.value.problems
    assert problem.code == "unknown-key"
    assert problem.where == "a, b, c: parameters.densty (bulk.yaml:8)"


_values = st.lists(st.integers(0, 99) | st.floats(0.001, 10, allow_nan=False), min_size=1, max_size=4, unique=True)


@given(_values, _values, st.integers(1, 3))
def test_every_combination_comes_once_with_a_path_of_its_own(seeds: list[Any], lambdas: list[Any], names: int) -> None:
    seeds = [int(s) for s in dict.fromkeys(int(s) for s in seeds)]
    lambdas = list(dict.fromkeys(float(x) for x in lambdas))
    merges = expand({
        "merges": [{"name": f"n{i}", "adapters": [{"adapter": "o/a"}]} for i in range(names)],
        "defaults": {"output": {"path": "/x/{name}-{seed}-{parameters.lambda}"}},
        "matrix": {"seed": seeds, "parameters.lambda": lambdas},
    })  # fmt: skip
    assert len(set(paths(merges))) == len(merges) == names * len(seeds) * len(lambdas)
    assert [(m.name, m.chosen["seed"], m.chosen["parameters.lambda"]) for m in merges] == [
        (f"n{i}", s, x) for i in range(names) for s in seeds for x in lambdas
    ]
