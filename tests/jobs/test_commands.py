"""What the commands print: documents on stdout, words for people, and manifests on stderr."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conformance.folders import Outcome, adapter, content_digest, manifest, model, names

Raymerge = Callable[..., Outcome]

PLAN_KEYS = {
    "version", "digest", "outputs", "read_bytes", "write_bytes", "passes", "stages", "units", "peak_memory_bytes",
    "problems",
}  # fmt: skip


@pytest.fixture
def here(tmp_path: Path) -> Path:
    adapter(tmp_path / "a", 1)
    adapter(tmp_path / "b", 2)
    model(tmp_path / "base", 0)
    model(tmp_path / "m1", 1)
    model(tmp_path / "m2", 2)
    return tmp_path


def stands_for(outcome: Outcome) -> dict[str, Any]:
    """The manifest that a short form printed."""
    text = outcome.err.partition("stands for the manifest:\n")[2]
    lines = []
    for line in text.splitlines():
        if not line.startswith((" ", "-")) and ":" not in line:
            break
        if line.startswith(("warning", "error", "stage")):
            break
        lines.append(line)
    found = yaml.safe_load("\n".join(lines))
    assert isinstance(found, dict)
    return found


# ---- merge and fold --------------------------------------------------------------------------------------------------


def test_merge_of_sources_prints_the_manifest_it_stands_for(raymerge: Raymerge, here: Path) -> None:
    a, b = str(here / "a"), str(here / "b")
    done = raymerge(
        "merge", a, b, "-o", here / "out", "--method", "ties", "--weights", "2,1", "--density", "0.5", "--base",
        here / "base",
    )  # fmt: skip
    assert done.code == 0, done.err
    printed = stands_for(done)
    assert printed == {
        "merge_method": "ties",
        "base_model": str(here / "base"),
        "adapters": [
            {"adapter": a, "parameters": {"weight": 2.0}}, {"adapter": b, "parameters": {"weight": 1.0}},
        ],
        "parameters": {"density": 0.5},
        "output": {"path": str(here / "out")},
    }  # fmt: skip
    again = raymerge("merge", manifest(here / "merge.yaml", printed), here / "again")
    assert again.code == 0, again.err
    assert content_digest(here / "again") == content_digest(here / "out")


def test_merge_of_models(raymerge: Raymerge, here: Path) -> None:
    done = raymerge("merge", here / "m1", here / "m2", "-o", here / "out")
    assert done.code == 0, done.err
    printed = stands_for(done)
    assert printed["merge_method"] == "linear"
    assert [entry["parameters"] for entry in printed["models"]] == [{"weight": 1.0}] * 2
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= names(here / "out")


def test_fold_prints_the_manifest_it_stands_for(raymerge: Raymerge, here: Path) -> None:
    done = raymerge("fold", here / "a", "--base", here / "base", "-o", here / "out", "--peft-safe")
    assert done.code == 0, done.err
    printed = stands_for(done)
    assert printed["output"] == {"kind": "model", "rounding": "peft_safe", "path": str(here / "out")}
    assert printed["base_model"] == str(here / "base")
    again = raymerge("merge", manifest(here / "merge.yaml", printed), here / "again")
    assert again.code == 0, again.err
    assert content_digest(here / "again") == content_digest(here / "out")


def test_fold_takes_a_base_and_its_adapter_as_one_reference(raymerge: Raymerge, here: Path) -> None:
    assert raymerge("fold", here / "a", "--base", here / "base", "-o", here / "out", "--peft-safe").code == 0
    done = raymerge("fold", f"{here / 'base'}+{here / 'a'}", "-o", here / "plus", "--peft-safe")
    assert done.code == 0, done.err
    assert content_digest(here / "plus") == content_digest(here / "out")
    odd = raymerge("fold", f"{here / 'base'}+{here / 'a'}", "--base", here / "m1", "-o", here / "odd")
    assert (odd.code, "2 bases are named" in odd.err) == (2, True)


def test_extract_prints_the_manifest_it_stands_for(raymerge: Raymerge, here: Path) -> None:
    assert raymerge("fold", here / "a", "--base", here / "base", "-o", here / "tuned").code == 0
    done = raymerge("extract", here / "tuned", "--base", here / "base", "-o", here / "out", "--rank", "4")
    assert done.code == 0, done.err
    printed = stands_for(done)
    assert printed["output"] == {"kind": "adapter", "store": {"svd": {"rank": 4}}, "path": str(here / "out")}
    assert printed["models"] == [{"model": str(here / "tuned"), "parameters": {"weight": 1.0}}]
    again = raymerge("merge", manifest(here / "merge.yaml", printed), here / "again")
    assert again.code == 0, again.err
    assert content_digest(here / "again") == content_digest(here / "out")
    wrong = raymerge(
        "extract", here / "tuned", "--base", here / "base", "-o", here / "no", "--rank", 4, "--energy", 0.9
    )
    assert wrong.code == 2
    assert "not at both" in wrong.err


def test_merge_json_is_one_document(raymerge: Raymerge, here: Path) -> None:
    done = raymerge("merge", here / "a", here / "b", "-o", here / "out", "--json")
    assert done.code == 0, done.err
    assert {
        "path",
        "kind",
        "plan_digest",
        "content_digest",
        "already_done",
        "warnings",
        "units",
    } <= done.document.keys()
    assert "stands for" not in done.err


def test_out_may_stand_in_three_places(raymerge: Raymerge, here: Path) -> None:
    document = {"adapters": [{"adapter": str(here / "a")}, {"adapter": str(here / "b")}]}
    path = manifest(here / "merge.yaml", document)
    inside = manifest(here / "inside.yaml", {**document, "output": {"path": str(here / "o3")}})
    assert raymerge("merge", path, here / "o1").code == 0
    assert raymerge("merge", path, "-o", here / "o2").code == 0
    assert raymerge("merge", inside, "--on", "here").code == 0
    assert len({content_digest(here / name) for name in ("o1", "o2", "o3")}) == 1


def test_set_overrides_a_key(raymerge: Raymerge, here: Path) -> None:
    document = {"merge_method": "ties", "adapters": [{"adapter": str(here / n)} for n in ("a", "b")],
                "parameters": {"density": 0.5}}  # fmt: skip
    path = manifest(here / "merge.yaml", document)
    refused = raymerge("merge", path, here / "o1", "--density", "0.25")
    assert refused.code == 2
    assert "--density cannot change a manifest" in refused.err
    assert raymerge("merge", path, here / "o1", "--set", "parameters.density=0.25").code == 0
    changed = manifest(here / "changed.yaml", {**document, "parameters": {"density": 0.25}})
    assert raymerge("merge", changed, here / "o2").code == 0
    assert content_digest(here / "o1") == content_digest(here / "o2")


# ---- plan ------------------------------------------------------------------------------------------------------------


def test_plan_json_keeps_its_contract(raymerge: Raymerge, here: Path) -> None:
    document = {"merge_method": "ties", "base_model": str(here / "base"), "parameters": {"density": 0.5},
                "models": [{"model": str(here / n), "parameters": {"weight": 1}} for n in ("m1", "m2")]}  # fmt: skip
    path = manifest(here / "merge.yaml", document)
    done = raymerge("plan", path, "--json", "-o", here / "out")
    assert done.code == 0, done.err
    found = done.document
    assert found.keys() >= PLAN_KEYS
    assert found["version"] == 1
    assert len(found["digest"]) == 64
    assert found["problems"] == []
    (output,) = found["outputs"]
    assert output["path"] == str(here / "out")
    assert output["kind"] == "model"
    assert [set(shard) for shard in output["shards"]] == [{"name", "bytes"}]
    for key in ("read_bytes", "write_bytes", "passes", "stages", "units", "peak_memory_bytes"):
        assert isinstance(found[key], int), key
        assert found[key] > 0, key
    assert not (here / "out").exists()
    merged = raymerge("merge", path, here / "out", "--json")
    assert merged.document["plan_digest"] == found["digest"]
    assert {s["name"]: s["bytes"] for s in output["shards"]} == {
        name: (here / "out" / name).stat().st_size for name in names(here / "out") if name.endswith(".safetensors")
    }
    assert merged.document["bytes_written"] == found["write_bytes"]


def test_plan_json_of_what_cannot_be_merged(raymerge: Raymerge, here: Path) -> None:
    adapter(here / "b", 2, rows=80)
    document = {"adapters": [{"adapter": str(here / n)} for n in ("a", "b")]}
    done = raymerge("plan", manifest(here / "merge.yaml", document), "--json")
    assert done.code == 2
    assert done.document.keys() >= PLAN_KEYS
    assert done.document["digest"] is None
    assert {p["code"] for p in done.document["problems"]} == {"shape-mismatch"}
    assert all(p.keys() == {"code", "what", "where", "why", "fix"} for p in done.document["problems"])


def test_plan_of_several_manifests_is_a_list(raymerge: Raymerge, here: Path) -> None:
    paths = [
        manifest(here / f"{n}.yaml", {"adapters": [{"adapter": str(here / n)}]}) for n in ("a", "b")
    ]  # fmt: skip
    done = raymerge("plan", *paths, "--json")
    assert done.code == 0, done.err
    assert [set(found) >= PLAN_KEYS for found in done.document] == [True, True]


def test_plan_for_people(raymerge: Raymerge, here: Path) -> None:
    path = manifest(here / "merge.yaml", {"adapters": [{"adapter": str(here / "a")}]})
    done = raymerge("plan", path)
    assert done.code == 0
    for word in ("source", "output", "reads", "work", "digest", "adapter_model.safetensors"):
        assert word in done.out


# ---- inspect ---------------------------------------------------------------------------------------------------------


def test_inspect_an_adapter(raymerge: Raymerge, here: Path) -> None:
    found = raymerge("inspect", here / "a", "--json").document
    assert (found["kind"], found["modules"], found["ranks"], found["base"]) == ("adapter", 2, {"4": 2}, "org/base")
    assert found["scalings"] == {"2": 2}
    assert found["tensors"] == 4
    assert found["problems"] == []
    shown = raymerge("inspect", here / "a")
    assert shown.code == 0
    assert "org/base" in shown.out


def test_inspect_a_model(raymerge: Raymerge, here: Path) -> None:
    found = raymerge("inspect", here / "m1", "--json").document
    assert (found["kind"], found["tensors"], found["dtypes"]) == ("model", 3, {"BF16": 3})
    assert found["architectures"] == ["LlamaForCausalLM"]
    assert found["bytes"] == 2 * (2 * 96 * 64 + 64)
    assert raymerge("inspect", here / "m1").code == 0


def test_inspect_for_vllm(raymerge: Raymerge, here: Path) -> None:
    found = raymerge("inspect", here / "a", "--for", "vllm", "--json").document["vllm"]
    assert (found["verdict"], found["max_lora_rank"], found["findings"], found["base"]) == ("served", 8, [], None)
    adapter(here / "wide", 3, rank=48)
    found = raymerge("inspect", here / "wide", "--for", "vllm", "--json").document["vllm"]
    assert ["--max-lora-rank 64" in p["what"] for p in found["findings"]] == [True]
    adapter(here / "dora", 4, config={"use_dora": True, "bias": "all"})
    found = raymerge("inspect", here / "dora", "--for", "vllm", "--base", here / "m1", "--json").document["vllm"]
    assert (found["verdict"], found["base"]) == ("refused", str(here / "m1"))
    assert [p["code"] for p in found["findings"]] == ["dora", "bias"]
    shown = raymerge("inspect", here / "dora", "--for", "vllm").out
    assert "not served as an adapter" in shown
    assert f"raymerge fold {here / 'dora'} -o OUT --base BASE" in shown


def test_inspect_with_a_base_and_nothing_to_hold_against(raymerge: Raymerge, here: Path) -> None:
    assert raymerge("inspect", here / "a", "--base", here / "m1").code == 2
    assert raymerge("inspect", here / "a", "--for", "vllm", "--base", here / "b").code == 2


# ---- methods ---------------------------------------------------------------------------------------------------------


def test_methods(raymerge: Raymerge) -> None:
    listed = raymerge("methods", "--json").document
    table = raymerge("methods").out
    assert {"ties", "linear", "slerp", "task_arithmetic"} <= {m["name"] for m in listed}
    for entry in listed:
        assert entry["name"] in table
        one = raymerge("methods", entry["name"], "--json")
        assert one.code == 0
        assert one.document["name"] == entry["name"]
        assert raymerge("methods", entry["name"]).code == 0


# ---- report and verify -----------------------------------------------------------------------------------------------


@pytest.fixture
def merged(raymerge: Raymerge, here: Path) -> Path:
    document = {"merge_method": "ties", "base_model": str(here / "base"), "parameters": {"density": 0.5},
                "models": [{"model": str(here / n), "parameters": {"weight": 1}} for n in ("m1", "m2")],
                "output": {"shard_size": "15KB"}}  # fmt: skip
    assert raymerge("merge", manifest(here / "merge.yaml", document), here / "out").code == 0
    return here / "out"


def test_report(raymerge: Raymerge, merged: Path) -> None:
    found = raymerge("report", merged, "--json").document
    assert found["content_digest"] == content_digest(merged)
    assert found["manifest"]["merge_method"] == "ties"
    assert found["report"]["units"] > 0
    assert found["extents"] > 0
    shown = raymerge("report", merged)
    assert shown.code == 0
    assert content_digest(merged)[:12] in shown.out


def test_verify(raymerge: Raymerge, merged: Path) -> None:
    found = raymerge("verify", merged, "--json").document
    assert found["content_digest"] == content_digest(merged)
    assert found["replayed"] == 0
    assert found["extents"] >= len([n for n in names(merged) if n.endswith(".safetensors")])
    assert "verified" in raymerge("verify", merged).out


def test_verify_replays_some_or_all(raymerge: Raymerge, merged: Path) -> None:
    assert raymerge("verify", merged, "--replay", "1", "--json").document["replayed"] == 1
    assert raymerge("verify", merged, "--replay", "all", "--json").document["replayed"] == 3
    before = {p: p.stat().st_mtime_ns for p in merged.rglob("*")}
    assert raymerge("verify", merged, "--replay", "99").code == 0
    assert {p: p.stat().st_mtime_ns for p in merged.rglob("*")} == before


def test_a_replay_of_changed_sources_is_told_apart_from_damage(raymerge: Raymerge, merged: Path, here: Path) -> None:
    model(here / "m1", 77)
    done = raymerge("verify", merged, "--replay", "all", "--json")
    assert done.code == 2
    assert [p["code"] for p in done.document["problems"]] == ["plan-differs"]
    assert raymerge("verify", merged).code == 0


def test_a_replay_notices_what_digests_cannot(raymerge: Raymerge, merged: Path) -> None:
    """Bytes and raymerge.json forged together: only merging again tells."""
    import hashlib

    from merger.report import content_digest as digest_of

    document = json.loads((merged / "raymerge.json").read_text())
    extent = next(e for e in document["extents"] if e[0].endswith(".safetensors") and e[1] > 0)
    file, start, end, _ = extent
    data = bytearray((merged / file).read_bytes())
    data[start] ^= 1
    (merged / file).write_bytes(data)
    extent[3] = hashlib.sha256(data[start:end]).hexdigest()
    document["content_digest"] = digest_of([tuple(e) for e in document["extents"]])
    (merged / "raymerge.json").write_text(json.dumps(document))
    assert raymerge("verify", merged).code == 0
    done = raymerge("verify", merged, "--replay", "all", "--json")
    assert done.code == 1
    assert {p["code"] for p in done.document["problems"]} == {"verify-mismatch"}


@pytest.mark.parametrize("damage", ["missing", "longer", "stray"])
def test_verify_notices(raymerge: Raymerge, merged: Path, damage: str) -> None:
    shard = min(merged.glob("*.safetensors"))
    if damage == "missing":
        shard.unlink()
    elif damage == "longer":
        shard.write_bytes(shard.read_bytes() + b"x")
    else:
        (merged / "extra.safetensors").write_bytes(b"")
    done = raymerge("verify", merged, "--json")
    assert done.code == 1
    assert {p["code"] for p in done.document["problems"]} == {"verify-mismatch"}


# ---- help ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["merge", "fold", "plan", "inspect", "verify", "methods", "report"])
def test_every_command_has_help(raymerge: Raymerge, command: str) -> None:
    done = raymerge(command, "--help")
    assert done.code == 0
    assert command in done.out
    assert "--json" in done.out


def test_without_arguments_it_helps(raymerge: Raymerge) -> None:
    done = raymerge()
    assert done.code in (0, 2)
    assert "merge" in done.out + done.err
    assert "Traceback" not in done.err


# ---- where -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "on, environment, wanted",
    [
        ("here", {"RAY_ADDRESS": "h:1"}, "here"),
        ("ray", {}, "private"),
        ("h:1", {}, "h:1"),
        ("auto", {}, "here"),
        ("auto", {"RAY_ADDRESS": "h:1"}, "h:1"),
        ("auto", {"RAY_JOB_CONFIG_JSON_ENV_VAR": "{}"}, "auto"),
        ("auto", {"RAY_ADDRESS": "ray://h:1"}, None),
        ("ray://h:1", {}, None),
    ],
)
def test_where_it_runs(
    here: Path, monkeypatch: pytest.MonkeyPatch, on: str, environment: dict[str, str], wanted: str | None
) -> None:
    from jobs.commands import _where
    from merger import api
    from merger.errors import ManifestError

    for name in ("RAY_ADDRESS", "RAY_JOB_CONFIG_JSON_ENV_VAR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    planned = api.plan({"adapters": [{"adapter": str(here / "a")}]})
    if wanted is None:
        with pytest.raises(ManifestError):
            _where(on, planned)
    else:
        assert _where(on, planned) == wanted


def test_dense_spectral_work_goes_to_a_ray_of_its_own(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from jobs.commands import _where
    from merger import api

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    entries = [{"adapter": str(here / n)} for n in ("a", "b")]
    planned = api.plan({"merge_method": "ties", "adapters": entries, "parameters": {"density": 0.5}})
    assert _where("auto", planned) == "here"  # seconds of Ray for milliseconds of work
    monkeypatch.setattr("jobs.commands.AUTO_HERE_FLOPS", 1.0)
    assert _where("auto", planned) == "private"


def test_no_ray_is_started_for_an_output_that_is_done_or_foreign(
    raymerge: Raymerge, merged: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import cluster.connect

    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("a Ray was started")

    monkeypatch.setattr(cluster.connect, "connection", refuse)
    assert raymerge("merge", here / "merge.yaml", merged, "--on", "ray").code == 0
    (here / "foreign").mkdir()
    (here / "foreign" / "x").write_text("x")
    assert raymerge("merge", here / "merge.yaml", here / "foreign", "--on", "ray").code == 3
