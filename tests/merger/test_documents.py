"""Several documents in one file: the same bytes as merging them one after another by hand, with nothing left lying."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

import merger
from jobs.cli import main
from merger import api, run_files
from merger.documents import bytes_beside
from merger.errors import ManifestError, OutputExistsError, RaymergeError, StoppedError
from merger.intermediates import bytes_in_memory
from merger.manifest import load_manifest
from merger.run import Stop
from merger.run_files import ask_to_stop, read_log, read_status
from merger.storage.memory import _PLACES
from merger.verify import verify_output
from tests.conformance.folders import adapter, model
from tests.conformance.llamas import llama

NAMES = ("base", "a", "b", "c")


LITTLE = 20 << 20
"""Memory that a merge of large models can do with, and that has no room for what two of them make."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for seed, name in enumerate(NAMES):
        model(tmp_path / name, seed)
    return tmp_path


@pytest.fixture
def large(tmp_path: Path) -> Path:
    for seed, name in enumerate(NAMES):
        model(tmp_path / name, seed, rows=2048, cols=768)
    return tmp_path


def documents(folder: Path, **last: Any) -> list[dict[str, Any]]:
    """ties → `mixed`; slerp of it with c → `turned`; the result adds both to the base."""

    def entry(name: str, weight: float | None = None) -> dict[str, Any]:
        model = name if name in ("mixed", "turned") else str(folder / name)
        return {"model": model, **({"parameters": {"weight": weight}} if weight is not None else {})}

    base = str(folder / "base")
    return [
        {"name": "turned", "merge_method": "slerp", "base_model": "mixed", "models": [entry("mixed"), entry("c")],
         "parameters": {"t": 0.3}, "dtype": "bfloat16"},
        {"name": "mixed", "merge_method": "ties", "base_model": base, "parameters": {"density": 0.5},
         "models": [entry("a", 1.0), entry("b", 0.5)], "dtype": "bfloat16"},
        {"merge_method": "task_arithmetic", "base_model": base,
         "models": [entry("turned", 0.6), entry("mixed", 0.4)], "dtype": "float32", **last},
    ]  # fmt: skip


def text(found: list[dict[str, Any]]) -> str:
    return yaml.safe_dump_all(found, sort_keys=False)


def by_hand(folder: Path, found: list[dict[str, Any]], out: Path) -> None:
    """Each document by itself, its output where the others expect it."""
    places = {"mixed": str(folder / "hand-mixed"), "turned": str(folder / "hand-turned")}
    turned, mixed, last = json.loads(json.dumps(found))
    for document in (mixed, turned, last):
        document["base_model"] = places.get(document["base_model"], document["base_model"])
        for entry in document["models"]:
            entry["model"] = places.get(entry["model"], entry["model"])
        name = document.pop("name", None)
        merger.merge(document, out if name is None else places[name])


def weights(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.glob("*.safetensors*")} | {
        "config.json": (folder / "config.json").read_bytes()
    }


def names(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("memory", [None, LITTLE], ids=["in memory", "beside the output"])
def test_the_bytes_are_those_of_separate_merges(large: Path, memory: int | None) -> None:
    folder, seen = large, set[str]()
    by_hand(folder, documents(folder), folder / "by-hand")
    before = set(_PLACES)

    def listen(progress: Any) -> None:
        seen.update(names(folder / "out") if (folder / "out").exists() else ())

    merger.merge(text(documents(folder)), folder / "out", memory=memory, workers=1, listener=listen)
    assert any("/intermediates/mixed/" in name for name in seen) == (memory is not None)
    assert weights(folder / "out") == weights(folder / "by-hand")
    assert not any(name.startswith((".raymerge", "mixed")) for name in names(folder / "out"))
    assert not any(_PLACES[name] for name in set(_PLACES) - before)


def test_the_plan_is_whole_before_anything_is_made(folder: Path) -> None:
    plan = api.plan(text(documents(folder)), folder / "out")
    assert [name for name, _ in plan.before] == ["mixed", "turned"]
    assert plan.problems == ()
    assert not (folder / "out").exists()
    digest = plan.digest
    report = merger.merge(text(documents(folder)), folder / "out")
    assert report.plan_digest == digest
    assert merger.merge(text(documents(folder)), folder / "out").already_done


def test_another_first_document_is_another_plan(folder: Path) -> None:
    found = documents(folder)
    digest = api.plan(text(found)).digest
    found[1]["parameters"]["density"] = 0.4
    assert api.plan(text(found)).digest != digest


def test_problems_of_all_documents_come_together(folder: Path) -> None:
    found = documents(folder)
    found[1]["models"][0]["model"] = str(folder / "nowhere-1")
    found[2]["models"].append({"model": str(folder / "nowhere-2"), "parameters": {"weight": 1.0}})
    found[2]["models"] = [e for e in found[2]["models"] if e["model"] not in ("mixed", "turned")]
    found[2]["base_model"] = str(folder / "base")
    found[0]["output"] = {"path": str(folder / "kept")}
    problems = api.plan(text(found)).problems
    assert {"nowhere-1", "nowhere-2"} <= {p.what.rpartition("/")[2] for p in problems}
    assert any(p.where.startswith("documents.mixed: ") for p in problems)


@pytest.mark.parametrize("at", [1, 2, 3])
def test_what_was_stopped_goes_on_where_it_was(large: Path, at: int) -> None:
    folder = large
    manifest = text(documents(folder))
    stop, merges, last = Stop(), 1, 0

    def listen(progress: Any) -> None:
        nonlocal merges, last
        merges += last > progress.units_done
        last = progress.units_done
        if merges == at and progress.units_done >= 1:
            stop.set(15)

    with pytest.raises(StoppedError):
        merger.merge(manifest, folder / "out", memory=LITTLE, workers=1, listener=listen, stop=stop)
    assert {n.split("/")[0] for n in names(folder / "out")} == {".raymerge"}
    merger.merge(manifest, folder / "out", memory=LITTLE, workers=1)
    by_hand(folder, documents(folder), folder / "by-hand")
    assert weights(folder / "out") == weights(folder / "by-hand")
    assert not any(name.startswith(".raymerge") for name in names(folder / "out"))


def test_it_is_seen_and_asked_to_stop_at_its_output_while_an_intermediate_is_made(
    large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for pause in ("FIRST_SECONDS", "LOOK_SECONDS"):
        monkeypatch.setattr(run_files, pause, 0.01)
    out, stop, asked = str(large / "out"), Stop(), list[dict[str, Any]]()

    def listen(progress: Any) -> None:
        if progress.units_done and not asked:
            asked.append(read_status(out))
            assert ask_to_stop(out)
            until = time.monotonic() + 20
            while not stop.requested and time.monotonic() < until:
                time.sleep(0.01)

    with pytest.raises(StoppedError):
        merger.merge(text(documents(large)), out, memory=LITTLE, workers=1, listener=listen, stop=stop)
    assert (asked[0]["state"], asked[0]["making"]) == ("running", "mixed")
    assert "asked to stop" in read_log(out)
    assert asked[0]["driver"]["pid"] == os.getpid()
    assert read_status(out)["state"] == "stopped"
    assert not ask_to_stop(out)
    merger.merge(text(documents(large)), out, memory=LITTLE, workers=1)
    assert read_status(out)["state"] == "finished"


def test_another_output_is_left_alone_before_anything_is_made(large: Path) -> None:
    folder = large
    (folder / "out").mkdir()
    (folder / "out" / "mine.txt").write_text("mine")
    with pytest.raises(OutputExistsError):
        merger.merge(text(documents(folder)), folder / "out", memory=LITTLE, workers=1)
    assert names(folder / "out") == {"mine.txt"}


def test_restart_makes_the_intermediates_again(large: Path) -> None:
    folder, manifest = large, text(documents(large))
    merger.merge(manifest, folder / "out", memory=LITTLE, workers=1)
    known = weights(folder / "out")
    merger.merge(manifest, folder / "out", memory=LITTLE, workers=1, restart=True)
    assert weights(folder / "out") == known


def test_a_document_with_a_place_of_its_own_is_kept(folder: Path) -> None:
    found = documents(folder)
    found[1]["output"] = {"path": str(folder / "kept")}
    merger.merge(text(found), folder / "out")
    by_hand(folder, documents(folder), folder / "by-hand")
    assert weights(folder / "kept") == weights(folder / "hand-mixed")
    assert weights(folder / "out") == weights(folder / "by-hand")


def test_a_kept_document_that_nobody_names_is_made_too(folder: Path) -> None:
    found = documents(folder)
    aside = {"name": "aside", **{k: v for k, v in found[1].items() if k != "name"},
             "output": {"path": str(folder / "aside")}}  # fmt: skip
    merger.merge(text([*found, aside]), folder / "out")
    assert (folder / "aside" / "raymerge.json").is_file()
    assert "aside" not in json.loads((folder / "out" / "raymerge.json").read_text())["manifest"]["documents"]


def test_the_result_replays_from_its_own_record(folder: Path) -> None:
    merger.merge(text(documents(folder)), folder / "out")
    found = verify_output(str(folder / "out"), replay=None)
    assert found.replayed > 0
    (folder / "mine").mkdir()
    damaged = json.loads((folder / "out" / "raymerge.json").read_text())
    assert set(damaged["manifest"]["documents"]) == {"mixed", "turned"}


def test_where_all_have_names_the_last_that_nobody_names_is_the_result(folder: Path) -> None:
    found = documents(folder)
    found[2]["name"] = "final"
    assert api.plan(text([found[2], found[0], found[1]])).digest == api.plan(text(documents(folder))).digest


def test_an_adapter_may_be_an_intermediate(folder: Path, tools: Any) -> None:
    manifest = load_manifest(
        "name: both\nadapters: [{adapter: org/a}, {adapter: org/b}]\noutput: {kind: adapter}\n"
        "---\nbase_model: org/base\nadapters: [{adapter: both}]\noutput: {kind: model}\n"
    )
    assert str(manifest.adapters and manifest.adapters[0].adapter) == "merge://both"
    assert list(manifest.documents) == ["both"]


def test_overrides_reach_every_document(folder: Path) -> None:
    manifest = load_manifest(
        text(documents(folder)), overrides=["documents.mixed.parameters.density=0.1", "dtype=bfloat16"]
    )
    assert manifest.documents["mixed"].parameters["density"].at("x", 0.0) == 0.1
    assert manifest.dtype == "bfloat16"
    assert load_manifest(manifest.resolved()) == manifest


def test_an_override_makes_no_document(folder: Path) -> None:
    with pytest.raises(ManifestError, match="no document 'mixd'") as caught:
        load_manifest(text(documents(folder)), overrides=["documents.mixd.parameters.density=0.1"])
    (problem,) = caught.value.problems
    assert (problem.where, problem.fix) == ("documents.mixd (--set)", "did you mean mixed?")


@pytest.mark.parametrize(
    "bad, message",
    [
        ("name: a\nmodels: [{model: b}]\n---\nname: b\nmodels: [{model: a}]\n---\nmodels: [{model: a}]", "circle"),
        ("name: a\nmodels: [{model: b}]\n---\nname: b\nmodels: [{model: a}]", "circle"),
        ("name: a\nmodels: [{model: o/x}]\n---\nname: a\nmodels: [{model: o/y}]\n---\nmodels: [{model: a}]", "two"),
        ("models: [{model: o/x}]\n---\nmodels: [{model: o/y}]", "without a name"),
        ("name: a\nmodels: [{model: o/x}]\n---\nmodels: [{model: o/y}]", "nothing keeps"),
        ("name: a/b\nmodels: [{model: o/x}]\n---\nmodels: [{model: a/b}]", "no name of a document"),
        ("models: [{model: merge://a}]\n", "no document is named 'a'"),
    ],
)
def test_names_that_lead_nowhere_are_refused(bad: str, message: str) -> None:
    bad = bad.replace("models:", "merge_method: linear\nparameters: {weight: 1}\nmodels:")
    with pytest.raises(ManifestError, match=message):
        load_manifest(bad + "\n")


def test_a_wrong_key_of_an_inner_document_is_named_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "m.yaml"
    file.write_text(
        "name: a\nmerge_method: linear\nmodels: [{model: o/x, parameters: {weight: 1}}]\noutput: {knd: model}\n"
        "---\nmerge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}]\n"
    )
    with pytest.raises(ManifestError) as caught:
        load_manifest(file)
    assert [p.where for p in caught.value.problems] == [f"documents.a.output.knd ({file}:4)"]


def test_the_command_shows_every_document(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = folder / "several.yaml"
    file.write_text(text(documents(folder)))
    assert main(["plan", str(file), "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)["documents"]) == ["mixed", "turned"]
    assert main(["plan", str(file)]) == 0
    assert "document mixed" in capsys.readouterr().out
    assert main(["merge", str(file), str(folder / "out"), "--on", "here"]) == 0


@pytest.mark.parametrize("exists", ["version", "replace"])
def test_versions_and_replacements_of_a_result(folder: Path, exists: str) -> None:
    for density in (0.5, 0.4):
        found = documents(folder, output={"exists": exists})
        found[1]["parameters"]["density"] = density
        merger.merge(text(found), folder / "out")
    made = sorted(p.parent.name for p in (folder / "out").rglob("raymerge.json"))
    assert len(made) == (2 if exists == "version" else 1)
    assert not any(".raymerge/" in name for name in names(folder / "out"))


def test_an_intermediate_may_keep_versions(folder: Path) -> None:
    found = documents(folder)
    found[1]["output"] = {"path": str(folder / "kept"), "exists": "version"}
    merger.merge(text(found), folder / "out")
    by_hand(folder, documents(folder), folder / "by-hand")
    assert (folder / "kept" / "latest.json").is_file()
    assert weights(folder / "out") == weights(folder / "by-hand")


def test_two_documents_at_one_place_are_refused(folder: Path) -> None:
    found = documents(folder)
    found[1]["output"] = {"path": str(folder / "out")}
    assert [p.code for p in api.plan(text(found), folder / "out").problems] == ["conflict"]


def test_an_adapter_is_merged_and_then_folded(folder: Path) -> None:
    for seed, name in enumerate(("one", "two")):
        adapter(folder / name, seed, config={"base_model_name_or_path": str(folder / "base")})
    both: dict[str, Any] = {"adapters": [{"adapter": str(folder / n)} for n in ("one", "two")]}
    fold = {"base_model": str(folder / "base"), "output": {"kind": "model"}}
    merger.merge(both, folder / "both")
    merger.merge({**fold, "adapters": [{"adapter": str(folder / "both")}]}, folder / "by-hand")
    merger.merge(text([{"name": "both", **both}, {**fold, "adapters": [{"adapter": "both"}]}]), folder / "out")
    assert weights(folder / "out") == weights(folder / "by-hand")


def test_a_document_of_another_kind_says_so(folder: Path) -> None:
    for seed, name in enumerate(("one", "two")):
        adapter(folder / name, seed, config={"base_model_name_or_path": str(folder / "base")})
    both = {"name": "both", "adapters": [{"adapter": str(folder / n)} for n in ("one", "two")]}
    last = {"merge_method": "linear", "models": [{"model": "both", "parameters": {"weight": 1.0}}]}
    assert "wrong-kind" in {p.code for p in api.plan(text([both, last])).problems}


def test_what_is_refused_midway_leaves_nothing(large: Path) -> None:
    """The first document's source becomes unreadable between plan and run."""
    plan = api.plan(text(documents(large)), large / "out")
    (large / "a" / "model.safetensors").unlink()
    with pytest.raises(RaymergeError):
        api.run_planned(plan, memory=LITTLE, workers=1)
    assert not any(p.is_file() and ".raymerge" not in p.parts for p in (large / "out").rglob("*"))


def test_room_for_intermediates_is_looked_for_first(large: Path) -> None:
    plan = api.plan(text(documents(large)), "memory://narrow")
    assert plan.problems == ()
    mixed, turned = (sum(f.size for f in made.outputs[0].files) for _, made in plan.before)
    assert bytes_beside(plan) == mixed + turned
    assert bytes_in_memory(plan, 1 << 40) == mixed + turned
    assert bytes_in_memory(plan, 2 * (mixed + turned) - 1) is None


def test_the_record_names_the_sources_of_every_document(folder: Path) -> None:
    for name in NAMES:
        (folder / name / "README.md").write_text(f"---\nlicense: {name}-licence\n---\n")
    merger.merge(text(documents(folder)), folder / "out")
    recorded = json.loads((folder / "out" / "raymerge.json").read_text())["sources"]
    assert {s["reference"] for s in recorded} == {"merge://mixed", "merge://turned", *(str(folder / n) for n in NAMES)}
    assert len(recorded) == 6
    card = (folder / "out" / "README.md").read_text()
    assert all(f"{name}-licence" in card for name in NAMES)


def test_a_tokenizer_may_be_another_document_s(tmp_path: Path) -> None:
    for seed, name in enumerate(NAMES):
        llama(tmp_path / name, seed)
    models = [{"model": str(tmp_path / n), "parameters": {"weight": 0.5}} for n in ("a", "b")]
    first = {"name": "mixed", "merge_method": "linear", "models": models}
    last = {"merge_method": "linear", "tokenizer_source": "mixed", "models": [
        {"model": "mixed", "parameters": {"weight": 0.5}}, {"model": str(tmp_path / "c"), "parameters": {"weight": 0.5}}
    ]}  # fmt: skip
    merger.merge(text([first, last]), tmp_path / "out")
    made = json.loads((tmp_path / "out" / "tokenizer.json").read_text())
    assert made["model"]["vocab"] == json.loads((tmp_path / "a" / "tokenizer.json").read_text())["model"]["vocab"]
