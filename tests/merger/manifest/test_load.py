"""Loading: every refusal names its place, several come at once, and what is loaded survives `resolved()`."""

import contextlib
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from merger.errors import ManifestError
from merger.manifest import AdapterEntry, BulkManifest, Manifest, Store, load_documents, load_manifest, parse_reference
from merger.manifest.checks import is_pure_mergekit
from merger.manifest.later import LATER, Later
from merger.methods import COMBINATION_TYPES, METHODS

EXAMPLES = sorted((Path(__file__).parents[3] / "manifests" / "merges").glob("*.yaml"))


def problems(source: Any, **options: Any) -> list[tuple[str, str]]:
    """(code, path) of everything that is wrong."""
    with pytest.raises(ManifestError) as caught:
        load_manifest(source, **options)
    return [(p.code, p.where.partition(" (")[0]) for p in caught.value.problems]


def message(source: Any, **options: Any) -> str:
    with pytest.raises(ManifestError) as caught:
        load_manifest(source, **options)
    return str(caught.value)


def adapters_of(manifest: Manifest) -> tuple[AdapterEntry, ...]:
    assert manifest.adapters is not None
    return manifest.adapters


def ours(**keys: Any) -> dict[str, Any]:
    return {
        "merge_method": "ties",
        "base_model": "o/base",
        "adapters": [{"adapter": "o/a"}, {"adapter": "o/b"}],
        **keys,
    }


def mergekit(method: str = "linear", **keys: Any) -> dict[str, Any]:
    models = [{"model": "o/a", "parameters": {"weight": 1}}, {"model": "o/b", "parameters": {"weight": 2}}]
    return {"merge_method": method, "models": models, **keys}


def peft(name: str = "ties", **keys: Any) -> dict[str, Any]:
    return {"combination_type": name, "adapters": [{"adapter": "o/a"}, {"adapter": "o/b"}], **keys}


# ---- what loads ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_examples_load(path: Path) -> None:
    manifest = load_manifest(path)
    assert manifest.warnings == ()
    assert load_manifest(manifest.resolved()) == manifest


def test_there_are_examples() -> None:
    assert {"tinyllama-ties", "tinyllama-dare-ties", "slerp-gradient", "passthrough-frankenmerge", "linear-models"} <= {
        p.stem for p in EXAMPLES
    }


def test_the_design_example() -> None:
    manifest = load_manifest("""
merge_method: ties
base_model: TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T
adapters:
  - adapter: smangrul/tinyllama_lora_norobots
    parameters: {weight: 2.0}
  - adapter: s3://models/adapters/adcopy
  - adapter: smangrul/tinyllama_lora_sql@main
parameters: {density: 0.2}
seed: 0
output:
  path: s3://models/merged/tinyllama-ties
  kind: adapter
  store: {svd: {rank: 16}}
  exists: refuse
  rounding: once
  shard_size: 5GB
  quantization: none
""")
    assert manifest.method is METHODS["ties"]
    assert manifest.sources_key == "adapters"
    assert adapters_of(manifest)[2].adapter.revision == "main"
    assert manifest.output.store == Store("svd", rank=16)
    assert manifest.output.shard_size == 5_000_000_000
    own, shared = manifest.adapter_scopes(0)
    assert own["weight"].at("x", 0) == 2.0
    assert shared["density"].at("x", 0) == 0.2
    assert pickle.loads(pickle.dumps(manifest)) == manifest
    assert json.loads(json.dumps(manifest.resolved())) == manifest.resolved()


def test_task_arithmetic_unless_told_otherwise() -> None:
    assert load_manifest({"adapters": [{"adapter": "o/a"}]}).merge_method == "task_arithmetic"


def test_peft_keywords_become_scopes() -> None:
    manifest = load_manifest(peft("ties", weights=[2, -1], density=0.2, svd_full_matrices=True, svd_driver="gesvd"))
    own, shared = manifest.adapter_scopes(1)
    assert (own["weight"].at("", 0), shared["density"].at("", 0)) == (-1.0, 0.2)
    assert {s.name for s in manifest.parameter_specs} == {"weight", "density"}
    assert load_manifest(manifest.resolved()) == manifest


def test_strings_that_are_numbers() -> None:
    manifest = load_manifest(ours(parameters={"density": "1e-1", "lambda": ["1e-4", 2]}))
    assert manifest.parameters["density"].at("", 0) == 0.1
    assert manifest.parameters["lambda"].at("", 0) == 1e-4


def test_dtype_prefix_is_dropped() -> None:
    assert load_manifest(ours(dtype="torch.bfloat16", out_dtype="float64")).dtype == "bfloat16"


def test_an_empty_key_is_an_absent_key() -> None:
    assert load_manifest(ours(parameters=None, dtype=None, output=None)) == load_manifest(ours())


def test_output_paths_are_local_and_absolute(tmp_path: Path) -> None:
    manifest = load_manifest(ours(output={"path": "org/name"}), cwd=tmp_path)
    assert manifest.output.path == parse_reference(str(tmp_path / "org" / "name"))


def test_manifest_and_mapping_are_not_changed() -> None:
    source = mergekit(embed_slerp=True)
    before = json.dumps(source)
    load_manifest(source)
    assert json.dumps(source) == before


def test_anchors_and_merge_keys() -> None:
    manifest = load_manifest("""
merge_method: ties
base_model: o/base
adapters:
  - adapter: o/a
    parameters: &p {weight: 2.0, density: 0.5}
  - adapter: o/b
    parameters: {<<: *p, weight: 1.0}
""")
    assert adapters_of(manifest)[1].parameters["weight"].at("", 0) == 1.0
    assert adapters_of(manifest)[1].parameters["density"].at("", 0) == 0.5


# ---- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source, expected",
    [
        ({}, ("missing-key", "")),
        (ours(merge_method="tise"), ("bad-value", "merge_method")),
        (ours(merge_method="ties_svd"), ("bad-value", "merge_method")),
        (peft("slerp"), ("bad-value", "combination_type")),
        (ours(combination_type="ties"), ("conflict", "combination_type")),
        (ours(models=[{"model": "o/a"}]), ("conflict", "models")),
        (ours(sede=1), ("unknown-key", "sede")),
        (ours(warnings=[]), ("unknown-key", "warnings")),
        (ours(seed=-1), ("out-of-bounds", "seed")),
        (ours(seed=True), ("bad-value", "seed")),
        (ours(seed="1"), ("bad-value", "seed")),
        (ours(version=2), ("bad-value", "version")),
        (ours(version=True), ("bad-value", "version")),
        (ours(dtype="bf16"), ("bad-value", "dtype")),
        (ours(out_dtype="float8_e4m3fn"), ("bad-value", "out_dtype")),
        (ours(base_model="base"), ("bad-reference", "base_model")),
        (ours(adapters=[]), ("bad-value", "adapters")),
        (ours(adapters={"adapter": "o/a"}), ("bad-value", "adapters")),
        (ours(adapters=["o/a"]), ("bad-value", "adapters[0]")),
        (ours(adapters=[{"name": "x"}]), ("missing-key", "adapters[0].adapter")),
        (ours(adapters=[{"adapter": "a"}]), ("bad-reference", "adapters[0].adapter")),
        (ours(adapters=[{"adapter": "o/a", "weight": 1}]), ("unknown-key", "adapters[0].weight")),
        (ours(adapters=[{"adapter": "o/a", "inculde": "x"}]), ("unknown-key", "adapters[0].inculde")),
        (ours(adapters=[{"adapter": "o/a", "name": "x"}, {"adapter": "o/b", "name": "x"}]),
         ("conflict", "adapters[1].name")),
        (ours(adapters=[{"adapter": "o/a", "parameters": {"density": 2}}]),
         ("out-of-bounds", "adapters[0].parameters.density")),
        (ours(adapters=[{"adapter": "o/a", "parameters": {"lambda": 1}}]),
         ("unknown-key", "adapters[0].parameters.lambda")),
        (ours(parameters={"density": [0.5, {"value": 1}]}), ("bad-value", "parameters.density[0]")),
        (ours(parameters={"density": float("nan")}), ("bad-value", "parameters.density")),
        (ours(parameters={"denisty": 1}), ("unknown-key", "parameters.denisty")),
        (ours(parameters=[1]), ("bad-value", "parameters")),
        (ours(density=0.5), ("conflict", "density")),
        (ours(weights=[1, 1]), ("conflict", "weights")),
        (ours(output={"kind": "adaptor"}), ("bad-value", "output.kind")),
        (ours(output={"shard_size": "5 GBs"}), ("bad-value", "output.shard_size")),
        (ours(output={"store": "svdd"}), ("bad-value", "output.store")),
        (ours(output={"store": {"svd": {"rank": 0}}}), ("out-of-bounds", "output.store.svd.rank")),
        (ours(output={"store": {"svd": {"rank": 4, "energy": 0.9}}}), ("conflict", "output.store")),
        (ours(output={"store": {"svd": {"energy": float("nan")}}}), ("bad-value", "output.store.svd.energy")),
        (ours(output={"kind": "model", "store": "concat"}), ("conflict", "output")),
        (ours(output={"pth": "x"}), ("unknown-key", "output.pth")),
        (ours(output={"path": "s3://u:p@bucket/x"}), ("bad-reference", "output.path")),
        (ours(output={"s3": {"tag": {}}}), ("unknown-key", "output.s3.tag")),
        (ours(path="x"), ("unknown-key", "path")),
        (peft("ties"), ("missing-key", "density")),
        (peft("ties", density=1.5), ("out-of-bounds", "density")),
        (peft("dare_ties", density=0), ("out-of-bounds", "density")),
        (peft("dare_ties", parameters={"density": 0}), ("out-of-bounds", "parameters.density")),
        (peft("ties", density=0.5, parameters={"density": 0.5}), ("conflict", "parameters.density")),
        (peft("linear", density=0.5), ("conflict", "density")),
        (peft("linear", svd_rank=4), ("conflict", "svd_rank")),
        (peft("linear", majority_sign_method="total"), ("conflict", "majority_sign_method")),
        (peft("ties", density=0.5, majority_sign_method="totl"), ("bad-value", "majority_sign_method")),
        (peft("svd", svd_rank=0), ("out-of-bounds", "svd_rank")),
        (peft("linear", weights=[1]), ("conflict", "weights")),
        (peft("linear", weights=[1, float("inf")]), ("bad-value", "weights[1]")),
        (peft("linear", weights=[1, True]), ("bad-value", "weights[1]")),
        (peft("linear", weights=[1, 2], adapters=[{"adapter": "o/a", "parameters": {"weight": 1}}, {"adapter": "o/b"}]),
         ("conflict", "adapters[0].parameters.weight")),
        ({"combination_type": "linear", "models": [{"model": "o/a"}]}, ("conflict", "models")),
        (mergekit(models=[{"model": "o/a"}]), ("missing-key", "models[0].parameters.weight")),
        (mergekit(models=[{"model": "o/a", "weight": 1}]), ("unknown-key", "models[0].weight")),
        (mergekit(models=[{"model": "o/a", "parameters": {"wieght": 1}}]),
         ("unknown-key", "models[0].parameters.wieght")),
        (mergekit(models=[{"model": "o/a", "parameter": {"weight": 1}}]), ("unknown-key", "models[0].parameter")),
        (mergekit(models=[{"model": "o/a"}, {"model": "hf://o/a"}], parameters={"weight": 1}),
         ("conflict", "models[1].model")),
        (mergekit(base_model="o/base"), ("missing-key", "models")),
        (mergekit("ties"), ("missing-key", "base_model")),
        (mergekit(density=1), ("conflict", "density")),
        (mergekit(tokenizer={"source": "base"}, tokenizer_source="base"), ("conflict", "tokenizer_source")),
        (mergekit("slerp", base_model="o/a"), ("missing-key", "parameters.t")),
        (mergekit("slerp", base_model="o/a", models=[{"model": "o/a"}, {"model": "o/b", "parameters": {"t": 1}}]),
         ("unknown-key", "models[1].parameters.t")),
        ({"merge_method": "linear", "modules": {"text": {"models": [{"model": "o/a"}]}}},
         ("missing-key", "modules.text.models[0].parameters.weight")),
        ({"merge_method": "linear", "modules": {"text": {}}}, ("conflict", "modules.text")),
    ],
)  # fmt: skip
def test_refused_at_its_path(source: Any, expected: Any) -> None:
    assert expected in problems(source)


def _slices(*ranges: Any, **keys: Any) -> dict[str, Any]:
    sources = [{"model": f"o/m{i}", "layer_range": r, "parameters": {"weight": 1}} for i, r in enumerate(ranges)]
    return {"merge_method": "linear", "slices": [{"sources": sources, **keys}]}


@pytest.mark.parametrize(
    "source, expected",
    [
        (_slices([4, 4]), ("bad-value", "slices[0].sources[0].layer_range")),
        (_slices([-1, 4]), ("bad-value", "slices[0].sources[0].layer_range")),
        (_slices([0, 1, 2]), ("bad-value", "slices[0].sources[0].layer_range")),
        (_slices([0, 2.5]), ("bad-value", "slices[0].sources[0].layer_range[1]")),
        (_slices([0, 4], [0, 5]), ("conflict", "slices[0]")),
        (_slices([0, 4], sorces=[]), ("unknown-key", "slices[0].sorces")),
        (_slices(), ("bad-value", "slices[0].sources")),
        ({"merge_method": "slerp", "base_model": "o/a",
          "slices": [{"sources": [{"model": "o/a", "layer_range": [0, 1]}]}]},
         ("missing-key", "slices[0].parameters.t")),
    ],
)  # fmt: skip
def test_slices_refused(source: Any, expected: Any) -> None:
    assert expected in problems(source)


def test_everything_at_once() -> None:
    """A wrong type, a wrong bound, a slip, a later feature and a bad reference come in one report."""
    source = ours(
        seed="x",
        parameters={"density": 2},
        sead=1,
        output={"quantization": "nf5"},
        adapters=[{"adapter": "nope"}, {"adapter": "o/b", "weight": 1}],
    )
    assert set(problems(source)) == {
        ("bad-value", "seed"),
        ("out-of-bounds", "parameters.density"),
        ("unknown-key", "sead"),
        ("bad-value", "output.quantization"),
        ("bad-reference", "adapters[0].adapter"),
        ("unknown-key", "adapters[1].weight"),
    }


@pytest.mark.parametrize(
    "source, hint",
    [
        (ours(sede=1), "did you mean seed?"),
        (ours(merge_method="tie"), "did you mean ties?"),
        (ours(merge_method="karchr"), "did you mean karcher?"),
        (ours(merge_method="ties_svd"), "did you mean combination_type: ties_svd?"),
        (peft("slerp"), "did you mean merge_method: slerp?"),
        (ours(parameters={"denisty": 1}), "did you mean density?"),
        (ours(dtype="fp16"), "did you mean float16?"),
        (ours(adapters=[{"adapter": "o/a", "weight": 1}]), "parameters: {weight: …}"),
        (ours(adapters=["o/a"]), "- adapter: org/name"),
        (ours(adapters=[]), "nothing is listed"),
        (ours(output={"kind": "adaptor"}), "did you mean adapter?"),
        (ours(kms_key_id="x"), "it is a key of output.s3"),
        (ours(adapters=[{"adapter": "o/a", "layer_range": [0, 1]}]), "slices"),
    ],
)
def test_hints(source: Any, hint: str) -> None:
    assert hint in message(source)


def test_lines(tmp_path: Path) -> None:
    path = tmp_path / "m.yaml"
    path.write_text("merge_method: ties\nadapters:\n  - adapter: o/a\n    parameters:\n      density: 2\n")
    assert f"adapters[0].parameters.density ({path}:5)" in message(path)


# ---- mergekit's own files ------------------------------------------------------------------------------------------


def test_which_files_are_mergekits() -> None:
    assert is_pure_mergekit(mergekit())
    assert not is_pure_mergekit(mergekit(output={}))
    assert not is_pure_mergekit({"models": []})


@pytest.mark.parametrize(
    "source, path",
    [
        (mergekit(embed_slerp=True), "embed_slerp"),
        (mergekit(int8_mask=True), "int8_mask"),
        (mergekit(parameters={"density": 0.5}), "parameters.density"),
        (mergekit(parameters={"embed_slerp": True}), "parameters.embed_slerp"),
        (mergekit(models=[{"model": "o/a", "layer_range": [0, 4], "parameters": {"weight": 1}}]),
         "models[0].layer_range"),
        (mergekit(models=[{"model": "o/a", "parameters": {"weight": 1, "normalize": False}}]),
         "models[0].parameters.normalize"),
        (_slices([0, 4], residual_weight=0.5), "slices[0].residual_weight"),
    ],
)  # fmt: skip
def test_keys_that_mergekit_ignores_are_warnings(source: Any, path: str) -> None:
    manifest = load_manifest(source)
    assert [w.where for w in manifest.warnings] == [path]
    assert load_manifest(manifest.resolved()) == manifest
    assert load_manifest(manifest.resolved()).warnings == ()
    assert problems(source, strict=True) == [("unknown-key", path)]


def test_the_same_keys_are_errors_beside_ours() -> None:
    assert problems(mergekit(embed_slerp=True, seed=1)) == [("unknown-key", "embed_slerp")]
    assert problems(mergekit(parameters={"density": 0.5}, seed=1)) == [("unknown-key", "parameters.density")]


def test_slips_are_errors_also_in_mergekits_files() -> None:
    assert problems(mergekit(parametrs={"normalize": False})) == [("unknown-key", "parametrs")]
    assert problems(mergekit(normalize=False)) == [("unknown-key", "normalize")]


def test_the_base_needs_no_weight() -> None:
    source = mergekit(
        "ties", base_model="o/a", models=[{"model": "o/a"}, {"model": "o/b", "parameters": {"weight": 1}}]
    )
    models = load_manifest(source).models
    assert models is not None
    assert models[0].parameters == {}


# ---- not yet -------------------------------------------------------------------------------------------------------

_LATER_VALUES = {
    "adapters[].initial": "o/i",
    "output.modules_to_save": {"from": "x"},
}  # fmt: skip


@pytest.mark.parametrize("row", [r for r in LATER if "override" not in r.path], ids=lambda r: r.path)
def test_later_features_are_refused_by_name(row: Later) -> None:
    value, source = _LATER_VALUES[row.path], ours()
    if row.path == "adapters[].initial":
        source["adapters"][1]["initial"] = value
    else:
        head, _, tail = row.path.partition(".")
        source[head] = {tail: value} if tail else value
    assert problems(source) == [("not-yet", row.path.replace("[]", "[1]"))]


def test_override_architecture() -> None:
    reference = {"model": {"path": "o/a"}, "override_architecture": "X"}
    found = problems(mergekit(models=[{"model": reference, "parameters": {"weight": 1}}]))
    assert found == [("not-yet", "models[0].model.override_architecture")]


def test_harmless_forms_of_later_keys_pass() -> None:
    output = {"quantization": "keep", "modules_to_save": "refuse", "exists": "refuse"}
    load_manifest(ours(tokenizer_source="base", base_quantization="none", output=output))
    load_manifest(ours(tokenizer={"source": "base"}))


# ---- YAML ----------------------------------------------------------------------------------------------------------


def test_duplicate_keys_are_all_named() -> None:
    text = "merge_method: ties\nadapters:\n  - adapter: o/a\n    adapter: o/b\nmerge_method: slerp\n"
    assert problems(text) == [("bad-yaml", "adapters[0].adapter"), ("bad-yaml", "merge_method")]
    assert "line 4" in message(text)


@pytest.mark.parametrize(
    "text",
    [
        "a: [1\n", "- a\n- b\n", "just text\n", "a: !!python/object:os.system {}\n", "1: 2\nb: 3\n", "a: &x [*x]\n",
        "on: 1\na: 2\n", "a: !!binary aGk=\n", "? [a]\n: b\n", "a: " + "[" * 100 + "]" * 100 + "\n",
        "a: " + "[" * 100_000 + "\n", b"\xff\xfe", b"a: '\x00'\n", b" " * (2**20 + 1),
        "a: &a [1,1,1,1,1,1,1,1,1,1]\n" + "".join(
            f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 10)}]\n" for i in range(8)),
    ],
    ids=lambda t: repr(t[:24]),
)  # fmt: skip
def test_hostile_yaml(text: Any) -> None:
    assert {code for code, _ in problems(text)} == {"bad-yaml"}


def test_missing_file() -> None:
    assert problems("/no/such/file.yaml") == [("bad-yaml", "/no/such/file.yaml")]


def test_dates_stay_text() -> None:
    assert adapters_of(load_manifest("adapters: [{adapter: o/a, name: 2024-01-01}]\nseed: 1\n"))[0].name == "2024-01-01"


# ---- overrides -----------------------------------------------------------------------------------------------------


def test_overrides() -> None:
    manifest = load_manifest(
        ours(),
        overrides=[
            "seed=7",
            "adapters[1].parameters.weight=[0, 1]",
            "output.store={svd: {energy: 0.9}}",
            "output.path=s3://bucket/x=y",
            "parameters.density=1e-1",
        ],
    )
    assert manifest.seed == 7
    assert adapters_of(manifest)[1].parameters["weight"].at("", 1.0) == 1.0
    assert manifest.output.store == Store("svd", energy=0.9)
    assert str(manifest.output.path) == "s3://bucket/x=y"
    assert manifest.parameters["density"].at("", 0) == 0.1


@pytest.mark.parametrize(
    "override",
    ["seed", "=1", "a..b=1", "[0]=1", "adapters[7].name=x", "adapters.name=x", "seed.x=1", "adapters[0].adapter[0]=1",
     "a b[=1", "seed=[1", "missing[0]=1"],
)  # fmt: skip
def test_overrides_that_do_not_fit(override: str) -> None:
    with pytest.raises(ManifestError) as caught:
        load_manifest(ours(seed=1), overrides=[override])
    assert caught.value.problems[0].where.startswith("--set")


def test_a_bad_value_names_the_override() -> None:
    assert "parameters.density (--set)" in message(ours(), overrides=["parameters.density=2"])


def test_overriding_an_alias_leaves_the_others() -> None:
    text = "merge_method: ties\nadapters:\n  - {adapter: o/a, parameters: &p {weight: 1}}\n"
    text += "  - {adapter: o/b, parameters: *p}\n"
    manifest = load_manifest(text, overrides=["adapters[0].parameters.weight=3"])
    assert [a.parameters["weight"].at("", 0) for a in adapters_of(manifest)] == [3.0, 1.0]


# ---- several documents and bulks -----------------------------------------------------------------------------------


def test_documents() -> None:
    text = (
        "---\nadapters: [{adapter: o/a}]\n---\nadapters: [{adapter: o/b}]\nseed: 1\n---\neach: s3://bucket/adapters\n"
    )
    first, second, bulk = load_documents(text, overrides=["version=1"])
    assert isinstance(first, Manifest)
    assert isinstance(second, Manifest)
    assert second.seed == 1
    assert isinstance(bulk, BulkManifest)
    assert problems(text)[0][0] == "conflict"


def test_documents_report_all() -> None:
    text = "adapters: [{adapter: a}]\n---\nadapters: [{adapter: o/b}]\nseed: x\n"
    with pytest.raises(ManifestError) as caught:
        load_documents(text, name="m.yaml")
    assert [p.where for p in caught.value.problems] == ["adapters[0].adapter (m.yaml:1)", "seed (m.yaml:4)"]


def test_bulk_grammar() -> None:
    (bulk,) = load_documents("""
merges:
  - {name: one, adapters: [{adapter: o/a}]}
  - {name: two, manifest: s3://bucket/two.yaml}
defaults:
  base_model: o/base
  output: {path: "s3://bucket/{name}/{date}"}
matrix:
  parameters.density: [0.1, 0.2]
max_active_merges: 3
on_failure: stop
schedule: {cron: "0 3 * * *", timezone: Europe/Berlin}
""")
    assert isinstance(bulk, BulkManifest)
    assert bulk.merges is not None
    assert bulk.schedule is not None
    assert [entry.name for entry in bulk.merges] == ["one", "two"]
    assert bulk.merges[0].inline == {"adapters": [{"adapter": "o/a"}]}
    assert bulk.matrix == {"parameters.density": (0.1, 0.2)}
    assert bulk.schedule.timezone == "Europe/Berlin"
    (again,) = load_documents(bulk.model_dump(mode="json"))
    assert again == bulk


@pytest.mark.parametrize(
    "source, expected",
    [
        ({"merges": [], "each": "s3://bucket"}, ("bad-value", "merges")),
        ({"merges": [{"name": "x"}]}, ("conflict", "merges[0]")),
        ({"merges": [{"adaptrs": []}]}, ("unknown-key", "merges[0]")),
        ({"each": "s3://bucket", "max_active_merges": 0}, ("out-of-bounds", "max_active_merges")),
        ({"each": "s3://bucket", "matrx": {}}, ("unknown-key", "matrx")),
        ({"each": "s3://bucket", "matrix": {"seed": []}}, ("bad-value", "matrix.seed")),
        ({"each": "s3://bucket", "schedule": {"cron": "daily"}}, ("bad-value", "schedule.cron")),
    ],
)
def test_bulk_refused(source: Any, expected: Any) -> None:
    with pytest.raises(ManifestError) as caught:
        load_documents(source)
    assert expected in [(p.code, p.where) for p in caught.value.problems]


def test_a_bulk_is_not_a_merge() -> None:
    assert problems({"each": "s3://bucket"}) == [("conflict", "")]


# ---- round trip ----------------------------------------------------------------------------------------------------

_unit = st.floats(0, 1)
_anchors = _unit | st.lists(_unit, min_size=1, max_size=3)
_filtered = st.lists(
    st.fixed_dictionaries({"value": _anchors}, optional={"filter": st.sampled_from(["*", "mlp", "self_attn"])}),
    min_size=1,
    max_size=3,
)
_values = _anchors | _filtered
_places = st.sampled_from(["o/a", "o/b@main", "hf://o/c@v1/sub", "s3://bucket/x", "/abs/a+b", "./rel", "memory://m"])
_models = st.sampled_from(["o/a", "o/b@r+o/l", {"model": {"path": "/x/a+b"}, "lora": {"path": "o/l"}}])
_shared = {
    "seed": st.integers(0, 2**63 - 1),
    "dtype": st.sampled_from(["float32", "torch.bfloat16"]),
    "out_dtype": st.sampled_from(["float16", "int64"]),
    "base_model": _models,
    "cluster": st.fixed_dictionaries(
        {}, optional={"workers": st.integers(1, 99) | st.none(), "memory": st.just("4GB"), "device": st.just("cuda")}
    ),
    "kubernetes": st.sampled_from(
        [{}, None, {"image": "a:b", "labels": {"a/b": "c"}, "head": {"memory": "8Gi", "tolerations": [{"key": "a"}]}}]
    ),
    "output": st.fixed_dictionaries(
        {},
        optional={
            "path": _places,
            "store": st.sampled_from(["concat", "svd", {"svd": {"rank": 3}}, {"svd": {"energy": 0.5, "exact": True}}]),
            "rounding": st.sampled_from(["once", "peft_safe"]),
            "shard_size": st.sampled_from(["1MiB", "5GB", 12345]),
            "private": st.booleans(),
            "s3": st.just({"tags": {"a": "b"}}),
        },
    ),
}
_ours = st.fixed_dictionaries(
    {
        "merge_method": st.sampled_from(["ties", "dare_ties", "magnitude_prune"]),
        "adapters": st.lists(
            st.fixed_dictionaries(
                {"adapter": _places},
                optional={
                    "parameters": st.fixed_dictionaries({}, optional={"weight": _values, "density": _values}),
                    "include": st.just("q_proj") | st.just(["q_proj", "v_proj"]),
                },
            ),
            min_size=1,
            max_size=3,
        ),
    },
    optional={
        **_shared,
        "parameters": st.fixed_dictionaries(
            {}, optional={"lambda": _values, "normalize": st.booleans(), "rescale": st.sampled_from([True, "none"])}
        ),
    },
)
_peft = st.fixed_dictionaries(
    {
        "combination_type": st.sampled_from([n for n in COMBINATION_TYPES if n.endswith("_svd")]),
        "adapters": st.just([{"adapter": "o/a"}, {"adapter": "o/b"}]),
        "density": st.floats(0.1, 1),
    },
    optional={**_shared, "weights": st.lists(st.floats(-3, 3), min_size=2, max_size=2), "svd_rank": st.integers(1, 9)},
)


@settings(max_examples=60, deadline=None)
@given(_ours | _peft)
def test_resolved_round_trip(source: Any) -> None:
    manifest = load_manifest(source)
    plain = json.loads(json.dumps(manifest.resolved()))
    again = load_manifest(plain)
    assert again == manifest
    assert again.resolved() == plain
    assert (again.adapters, again.output) == (manifest.adapters, manifest.output)


# ---- anything at all -----------------------------------------------------------------------------------------------

_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
_bases = [
    ours(parameters={"density": [0.1, {"value": 1}]}, output={"path": "x", "store": {"svd": {"rank": 1}}}),
    peft("ties", density=0.5, weights=[1, 2]),
    mergekit("slerp", base_model="o/a", parameters={"t": [{"filter": "x", "value": [0, 1]}]}, tokenizer={"tokens": {}}),
    {"merge_method": "linear", "modules": {"m": _slices([0, 4], [0, 4])}},
    {"merges": [{"manifest": "o/a"}], "matrix": {"a.b": [1]}, "schedule": {"cron": "0 0 * * *"}},
]


def _paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(p for key, item in children for p in _paths(item, (*path, key)))]


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_nothing_but_a_manifest_error_comes_out(data: st.DataObject) -> None:
    source = json.loads(json.dumps(data.draw(st.sampled_from(_bases))))
    path = data.draw(st.sampled_from(_paths(source)[1:]))
    at = source
    for step in path[:-1]:
        at = at[step]
    at[path[-1]] = data.draw(_json)
    with contextlib.suppress(ManifestError):
        load_documents(source)
