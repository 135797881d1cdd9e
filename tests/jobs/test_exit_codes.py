"""The contract of design.md: what a failure exits with, says, prints and leaves behind."""

from __future__ import annotations

import json
import math
import os
import pickle
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from merger.journal import Lease
from merger.storage import LocalStore
from tests.conformance.folders import (
    LAYERS,
    Outcome,
    adapter,
    command,
    content_digest,
    lora_config,
    lora_tensors,
    manifest,
    model,
    model_tensors,
    names,
    raw_file,
    snapshot,
)

Raymerge = Callable[..., Outcome]
Document = dict[str, Any]


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """Two adapters, a base, two models."""
    adapter(tmp_path / "a", 1)
    adapter(tmp_path / "b", 2)
    model(tmp_path / "base", 0)
    model(tmp_path / "m1", 1)
    model(tmp_path / "m2", 2)
    return tmp_path


def of_adapters(here: Path, **more: object) -> Document:
    entries = [{"adapter": str(here / name), "parameters": {"weight": 1.0}} for name in ("a", "b")]
    return {"merge_method": "ties", "adapters": entries, "parameters": {"density": 0.5}, **more}


def of_models(here: Path, **more: object) -> Document:
    entries = [{"model": str(here / name), "parameters": {"weight": 1.0}} for name in ("m1", "m2")]
    return {"merge_method": "ties", "base_model": str(here / "base"), "models": entries, **more}


def fold(here: Path, **more: object) -> Document:
    return {"base_model": str(here / "base"), "adapters": [{"adapter": str(here / "a")}],
            "output": {"kind": "model"}, **more}  # fmt: skip


# ---- what every failure keeps ----------------------------------------------------------------------------------------

HEAD = re.compile(r"^error ([a-z0-9-]+): (.+)$")


def check_error(outcome: Outcome, code: int, *problems: str, said: str = "") -> None:
    """The exit code; the problems' codes; four parts each on stderr; nothing on stdout; no traceback; no controls."""
    assert outcome.code == code, outcome.err
    assert outcome.out == ""
    assert "Traceback" not in outcome.err
    assert "error internal" not in outcome.err
    assert not [c for c in outcome.err if not c.isprintable() and c != "\n"]
    heads = [(n, m) for n, line in enumerate(outcome.err.splitlines()) if (m := HEAD.match(line))]
    assert heads, outcome.err
    for n, head in heads:
        labels = [line[2:7].strip() for line in outcome.err.splitlines()[n + 1 : n + 4]]
        assert labels == ["where", "why", "fix"], (head[1], outcome.err)
    found = [head[1] for _, head in heads]
    assert set(problems) <= set(found), outcome.err
    assert said in outcome.err


def check_json(outcome: Outcome, code: int, *problems: str) -> None:
    assert outcome.code == code, outcome.err
    document = outcome.document
    assert document["exit_code"] == code
    assert set(problems) <= {p["code"] for p in document["problems"]}
    assert all(p.keys() == {"code", "what", "where", "why", "fix"} for p in document["problems"])


def check_refused(
    raymerge: Raymerge, here: Path, document: Document | Path, problem: str, *, code: int = 2, said: str = "",
    arguments: tuple[str, ...] = (),
) -> None:  # fmt: skip
    """A merge that cannot start: the contract, twice (for people, as JSON), and the output as it was found."""
    path = document if isinstance(document, Path) else manifest(here / "merge.yaml", document)
    out = here / "out"
    before = snapshot(out)
    check_error(raymerge("merge", path, out, *arguments), code, problem, said=said)
    check_json(raymerge("merge", path, out, "--json", *arguments), code, problem)
    assert snapshot(out) == before


# ---- 2: the manifest -------------------------------------------------------------------------------------------------


def test_an_unknown_key(raymerge: Raymerge, here: Path) -> None:
    check_refused(raymerge, here, of_adapters(here, colour="red"), "unknown-key", said="colour")


def test_a_slip_of_a_key_is_told_the_right_one(raymerge: Raymerge, here: Path) -> None:
    document = of_adapters(here)
    document["merge_methd"] = document.pop("merge_method")
    check_refused(raymerge, here, document, "unknown-key", said="merge_method")


def test_a_slip_of_a_parameter(raymerge: Raymerge, here: Path) -> None:
    document = of_adapters(here, parameters={"densty": 0.5})
    check_refused(raymerge, here, document, "unknown-key", said="density")


@pytest.mark.parametrize("value", [1.5, -0.1, math.nan, math.inf, "much", True, [[0.1]]])
def test_a_parameter_out_of_bounds(raymerge: Raymerge, here: Path, value: object) -> None:
    path = here / "merge.yaml"
    text = json.dumps(of_adapters(here, parameters={"density": value}))
    path.write_text(text.replace("NaN", ".nan").replace("Infinity", ".inf"))
    outcome = raymerge("merge", path, here / "out")
    check_error(outcome, 2, said="density")
    assert not (here / "out").exists()


@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf"])
def test_a_weight_that_is_no_number(raymerge: Raymerge, here: Path, value: str) -> None:
    path = manifest(here / "merge.yaml", of_adapters(here))
    outcome = raymerge("merge", path, here / "out", "--set", f"adapters[0].parameters.weight={value}")
    check_error(outcome, 2, said="weight")
    assert not (here / "out").exists()


def test_an_unknown_method(raymerge: Raymerge, here: Path) -> None:
    check_refused(raymerge, here, of_adapters(here, merge_method="tise"), "bad-value", said="ties")


@pytest.mark.parametrize("text", ["", "a: [", "- 1", "merge_method: &a [*a]", "\x00", "a: 1\na: 2"])
def test_no_manifest(raymerge: Raymerge, here: Path, text: str) -> None:
    (here / "merge.yaml").write_text(text)
    outcome = raymerge("merge", here / "merge.yaml", here / "out")
    check_error(outcome, 2)
    assert not (here / "out").exists()


def test_a_manifest_that_is_not_there(raymerge: Raymerge, here: Path) -> None:
    check_refused(raymerge, here, here / "missing.yaml", "bad-yaml")


def test_every_problem_is_told_at_once(raymerge: Raymerge, here: Path) -> None:
    document = of_adapters(here, colour="red", parameters={"density": 7})
    outcome = raymerge("merge", manifest(here / "merge.yaml", document), here / "out")
    check_error(outcome, 2, "unknown-key", said="density")


def test_no_output_is_named(raymerge: Raymerge, here: Path) -> None:
    check_error(raymerge("merge", manifest(here / "merge.yaml", of_adapters(here))), 2, "no-output")


# ---- 2: arguments ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ("merge",),
        ("merge", "--no-such-option"),
        ("merge", "x.yaml", "--workers", "0"),
        ("merge", "x.yaml", "--workers", "two"),
        ("frobnicate",),
        ("inspect",),
        ("merge", "{here}/merge.yaml", "a", "b"),
        ("merge", "{here}/merge.yaml", "{here}/out", "--base", "x"),
        ("merge", "{here}/merge.yaml", "{here}/out", "--memory", "many"),
        ("merge", "{here}/merge.yaml", "{here}/out", "--device", "tpu"),
        ("merge", "{here}/merge.yaml", "{here}/out", "--set", "nonsense"),
        ("merge", "{here}/merge.yaml", "{here}/out", "--on", "ray://head:10001"),
        ("merge", "{here}/a", "{here}/b", "-o", "{here}/out", "--weights", "1,2,3"),
        ("merge", "{here}/a", "{here}/b", "-o", "{here}/out", "--weights", "one,two"),
        ("merge", "{here}/a", "{here}/m1", "-o", "{here}/out"),
        ("inspect", "{here}/a", "--for", "tgi"),
        ("verify", "{here}/a", "--replay", "some"),
        ("methods", "tise"),
    ],
)
def test_arguments(raymerge: Raymerge, here: Path, arguments: tuple[str, ...]) -> None:
    manifest(here / "merge.yaml", of_adapters(here))
    given = [a.format(here=here) for a in arguments]
    check_error(raymerge(*given), 2)
    if len(given) > 1:
        check_json(raymerge(*given, "--json"), 2)
    assert not (here / "out").exists()


def test_a_ray_client_address(raymerge: Raymerge, here: Path) -> None:
    check_refused(raymerge, here, of_adapters(here), "ray-client", arguments=("--on", "ray://head:10001"))


# ---- 2: sources ------------------------------------------------------------------------------------------------------


def test_no_such_source(raymerge: Raymerge, here: Path) -> None:
    document = of_adapters(here)
    document["adapters"][1]["adapter"] = str(here / "nowhere")
    check_refused(raymerge, here, document, "no-such-source", said="nowhere")


def test_a_missing_tensor(raymerge: Raymerge, here: Path) -> None:
    tensors = model_tensors(1)
    del tensors["model.norm.weight"]
    model(here / "m1", 1, tensors=tensors)
    check_refused(raymerge, here, of_models(here), "missing-tensor", said="model.norm.weight")


def test_half_a_pair_of_factors(raymerge: Raymerge, here: Path) -> None:
    tensors = lora_tensors(1)
    del tensors[f"base_model.model.{LAYERS[0]}.lora_B.weight"]
    adapter(here / "a", 1, tensors=tensors)
    check_refused(raymerge, here, of_adapters(here), "missing-tensor", said="lora_B")


def test_a_rank_that_differs_from_its_config(raymerge: Raymerge, here: Path) -> None:
    adapter(here / "a", 1, rank=4, config={"r": 16})
    check_refused(raymerge, here, of_adapters(here), "rank-mismatch")


def test_a_config_that_means_nothing_is_named_with_its_adapter(raymerge: Raymerge, here: Path) -> None:
    adapter(here / "b", 1, rank=4, config={"r": -3})
    check_refused(raymerge, here, of_adapters(here), "bad-adapter-config", said=str(here / "b" / "adapter_config.json"))


def test_no_command_is_told_so(raymerge: Raymerge) -> None:
    done = raymerge()
    assert done.code == 2
    assert "error bad-arguments: no command is named" in done.err


def test_factors_of_two_ranks(raymerge: Raymerge, here: Path) -> None:
    tensors = lora_tensors(1)
    tensors[f"base_model.model.{LAYERS[0]}.lora_B.weight"] = torch.zeros(96, 5)
    adapter(here / "a", 1, tensors=tensors)
    check_refused(raymerge, here, of_adapters(here), "rank-mismatch")


def test_adapters_of_two_shapes(raymerge: Raymerge, here: Path) -> None:
    adapter(here / "b", 2, rows=80)
    check_refused(raymerge, here, of_adapters(here), "shape-mismatch", said="80")


def test_an_adapter_that_does_not_fit_its_base(raymerge: Raymerge, here: Path) -> None:
    adapter(here / "a", 1, rows=80)
    check_refused(raymerge, here, fold(here), "shape-mismatch", said="80")


def test_an_adapter_of_another_model(raymerge: Raymerge, here: Path) -> None:
    adapter(here / "a", 1, modules=["transformer.h.0.attn"])
    path = manifest(here / "merge.yaml", fold(here))
    check_error(raymerge("merge", path, here / "out"), 2, said="transformer.h.0.attn")
    assert not (here / "out").exists()


def test_models_of_two_shapes(raymerge: Raymerge, here: Path) -> None:
    model(here / "m2", 2, cols=32)
    check_refused(raymerge, here, of_models(here), "shape-mismatch")


def damaged(header: object, data: bytes = b"", **more: Any) -> bytes:
    return raw_file(header if isinstance(header, bytes) else json.dumps(header).encode(), data, **more)


NAME = f"base_model.model.{LAYERS[0]}.lora_A.weight"
ENTRY = {"dtype": "F32", "shape": [1, 4], "data_offsets": [0, 16]}
TEXT = json.dumps(ENTRY)


@pytest.mark.parametrize(
    "data, problem",
    [
        (damaged({NAME: ENTRY}, bytes(15)), "truncated"),
        (b"\x08\0\0", "truncated"),
        (b"", "truncated"),
        (damaged({NAME: ENTRY, NAME + "2": {**ENTRY, "data_offsets": [8, 24]}}, bytes(24)), "overlapping-offsets"),
        (damaged(f'{{"{NAME}":{TEXT},"{NAME}":{TEXT}}}'.encode(), bytes(16)), "duplicate-name"),
        (damaged(b"{}", length=2**60), "header-too-large"),
        (damaged({NAME: {**ENTRY, "shape": [2**40, 2**40]}}, bytes(16)), "bad-shape"),
        (damaged({NAME: {**ENTRY, "dtype": "F7"}}, bytes(16)), "unknown-dtype"),
        (damaged({NAME: ENTRY}, bytes(17)), "trailing-bytes"),
    ],
    ids=["truncated", "eight-bytes", "empty", "overlap", "duplicate", "huge-header", "huge-shape", "dtype", "trailing"],
)
@pytest.mark.parametrize("kind", ["adapter", "model"])
def test_a_damaged_file(raymerge: Raymerge, here: Path, kind: str, data: bytes, problem: str) -> None:
    name = "a/adapter_model.safetensors" if kind == "adapter" else "m1/model.safetensors"
    (here / name).write_bytes(data)
    check_refused(raymerge, here, of_adapters(here) if kind == "adapter" else of_models(here), problem)


@pytest.mark.parametrize("target", ["../secret.safetensors", "/etc/passwd", "a/../../secret.safetensors"])
def test_an_index_that_leaves_its_folder(raymerge: Raymerge, here: Path, target: str) -> None:
    save_file(model_tensors(9), here / "secret.safetensors")
    (here / "m1" / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": dict.fromkeys(model_tensors(9), target)}
    (here / "m1" / "model.safetensors.index.json").write_text(json.dumps(index))
    check_refused(raymerge, here, of_models(here), "path-escapes")


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch pickle-bomb-went-off",)


def test_a_pickle_bomb(raymerge: Raymerge, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A .bin is read by our own reader, which runs nothing."""
    monkeypatch.chdir(here)
    (here / "a" / "adapter_model.safetensors").unlink()
    with zipfile.ZipFile(here / "a" / "adapter_model.bin", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({NAME: Bomb()}))
        archive.writestr("archive/version", "3\n")
    path = manifest(here / "merge.yaml", of_adapters(here))
    check_error(raymerge("merge", path, here / "out"), 2)
    check_error(raymerge("inspect", here / "a"), 2)
    assert not (here / "pickle-bomb-went-off").exists()
    assert not (here / "out").exists()


def test_a_quantised_base(raymerge: Raymerge, here: Path) -> None:
    model(here / "base", 0, config={"quantization_config": {"quant_method": "gptq", "bits": 4}})
    check_refused(raymerge, here, fold(here), "quantised-source", said="gptq")


def test_control_characters_of_inputs_are_escaped(raymerge: Raymerge, here: Path) -> None:
    evil = "model.\x1b[31mred\u202e.weight\x07"
    model(here / "m1", 1, tensors={**model_tensors(1), evil: torch.ones(2)})
    path = manifest(here / "merge.yaml", of_models(here))
    outcome = raymerge("merge", path, here / "out")
    check_error(outcome, 2, said="\\x1b[31mred\\u202e")
    adapter(here / "a", 1, config={"peft_type": "LO\x1b]0;RA\x07"})
    path = manifest(here / "merge.yaml", of_adapters(here))
    check_error(raymerge("merge", path, here / "out"), 2, said="\\x1b]0;RA\\x07")
    shown = raymerge("inspect", here / "a")
    assert not [c for c in shown.out + shown.err if not c.isprintable() and c != "\n"]


# ---- 2: the machine --------------------------------------------------------------------------------------------------


def test_too_little_memory(raymerge: Raymerge, here: Path) -> None:
    check_refused(raymerge, here, of_adapters(here), "memory", arguments=("--memory", "1000"))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """256 KiB of real disk."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if shutil.which("mount") is None or os.geteuid() != 0:
        pytest.skip("mounting a tmpfs needs root")
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "raymerge-test", str(folder)], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {done.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_is_too_small_is_predicted(raymerge: Raymerge, here: Path, disk: Path) -> None:
    model(here / "base", 0, rows=2000)
    adapter(here / "a", 1, rows=2000)
    out = disk / "out"
    path = manifest(here / "merge.yaml", fold(here))
    check_error(raymerge("merge", path, out), 2, "disk")
    planned = raymerge("plan", path, "-o", out, "--json")
    assert (planned.code, [p["code"] for p in planned.document["problems"]]) == (2, ["disk"])
    assert not out.exists()


def test_a_disk_that_fills_up_midway(raymerge: Raymerge, here: Path, disk: Path) -> None:
    """The weights fit and what goes with them does not: 1, resumable; the same command ends it once there is room."""
    model(here / "base", 0, rows=700)
    adapter(here / "a", 1, rows=700)
    out = disk / "out"
    path = manifest(here / "merge.yaml", fold(here))
    size = (here / "base" / "model.safetensors").stat().st_size
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    (disk / "ballast").write_bytes(bytes(free - size - 2 * 4096))
    check_error(raymerge("merge", path, out), 1, "disk-full")
    assert names(out) == set()
    (disk / "ballast").unlink()
    done = raymerge("merge", path, out)
    assert done.code == 0, done.err
    assert not (out / ".raymerge").exists()


# ---- 1 ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_met_in_a_source(raymerge: Raymerge, here: Path, value: float) -> None:
    tensors = model_tensors(1)
    tensors["model.layers.1.self_attn.q_proj.weight"][50, 3] = value
    model(here / "m1", 1, tensors=tensors)
    path = manifest(here / "merge.yaml", of_models(here))
    check_error(raymerge("merge", path, here / "out"), 1, "not-finite", said="model.layers.1")
    assert names(here / "out") == set()
    outcome = raymerge("merge", path, here / "out", "--json")
    check_json(outcome, 1, "not-finite")
    assert f"{here / 'm1'} holds NaN or Inf in model.layers.1.self_attn.q_proj.weight, first in row 50" in outcome.out


@pytest.mark.parametrize("change", ["content", "gone"])
def test_a_source_that_changes_midway(
    raymerge: Raymerge, here: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    from merger.output import begin

    def after(*arguments: Any, **options: Any) -> None:
        begin(*arguments, **options)
        if change == "content":
            model(here / "m1", 99)
        else:
            (here / "m1" / "model.safetensors").unlink()

    monkeypatch.setattr("merger.session.begin", after)
    path = manifest(here / "merge.yaml", of_models(here))
    check_error(raymerge("merge", path, here / "out"), 1, "source-changed")
    assert names(here / "out") == set()


def test_a_companion_that_goes_midway(raymerge: Raymerge, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from merger.output import begin

    def after(*arguments: Any, **options: Any) -> None:
        begin(*arguments, **options)
        (here / "base" / "tokenizer.json").unlink()

    monkeypatch.setattr("merger.session.begin", after)
    check_error(raymerge("merge", manifest(here / "merge.yaml", fold(here)), here / "out"), 1, "source-changed")
    assert names(here / "out") == set()


def test_a_mismatch_found_by_verify(raymerge: Raymerge, here: Path) -> None:
    out = here / "out"
    assert raymerge("merge", manifest(here / "merge.yaml", of_adapters(here)), out).code == 0
    weights = out / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(data)
    check_error(raymerge("verify", out), 1, "verify-mismatch", said="adapter_model.safetensors")
    check_json(raymerge("verify", out, "--json"), 1, "verify-mismatch")


# ---- 3 and 0: what the output holds already --------------------------------------------------------------------------


def test_a_foreign_folder(raymerge: Raymerge, here: Path) -> None:
    (here / "out").mkdir()
    (here / "out" / "thesis.txt").write_text("years of work")
    check_refused(raymerge, here, of_adapters(here), "output-exists", code=3)
    check_refused(raymerge, here, of_adapters(here), "output-exists", code=3, arguments=("--restart",))


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"plan_digest": 1}'])
def test_a_folder_with_someone_elses_raymerge_json(raymerge: Raymerge, here: Path, content: str) -> None:
    (here / "out").mkdir()
    (here / "out" / "raymerge.json").write_text(content)
    check_refused(raymerge, here, of_adapters(here), "output-exists", code=3)


def test_a_file_in_the_outputs_place(raymerge: Raymerge, here: Path) -> None:
    (here / "out").write_text("a file")
    check_refused(raymerge, here, of_adapters(here), "output-exists", code=3)
    check_refused(raymerge, here, of_adapters(here), "output-exists", code=3, arguments=("--restart",))


def test_a_file_above_the_outputs_place(raymerge: Raymerge, here: Path) -> None:
    (here / "file").write_text("a file")
    path = manifest(here / "merge.yaml", of_adapters(here))
    check_error(raymerge("merge", path, here / "file" / "out"), 2, "write-failed")
    assert (here / "file").read_text() == "a file"


def test_another_merge_is_there(raymerge: Raymerge, here: Path) -> None:
    assert raymerge("merge", manifest(here / "merge.yaml", of_adapters(here)), here / "out").code == 0
    check_refused(raymerge, here, of_adapters(here, parameters={"density": 0.25}), "output-exists", code=3)


def test_an_empty_folder_is_no_output(raymerge: Raymerge, here: Path) -> None:
    (here / "out").mkdir()
    assert raymerge("merge", manifest(here / "merge.yaml", of_adapters(here)), here / "out").code == 0


def test_already_done(raymerge: Raymerge, here: Path) -> None:
    path = manifest(here / "merge.yaml", of_adapters(here))
    first = raymerge("merge", path, here / "out", "--json")
    assert first.code == 0, first.err
    before = snapshot(here / "out")
    again = raymerge("merge", path, here / "out", "--json")
    assert again.code == 0
    assert again.document["already_done"] is True
    assert again.document["content_digest"] == first.document["content_digest"] == content_digest(here / "out")
    told = raymerge("merge", path, here / "out")
    assert (told.code, "already done" in told.out) == (0, True)
    assert snapshot(here / "out") == before


def test_restart_makes_it_anew_and_keeps_what_is_not_its_own(raymerge: Raymerge, here: Path) -> None:
    out = here / "out"
    assert raymerge("merge", manifest(here / "merge.yaml", of_models(here)), out).code == 0
    assert "config.json" in names(out)
    (out / "notes.txt").write_text("mine")
    (out / "sub").mkdir()
    (out / "sub" / "config.json").write_text("mine too")
    other = manifest(here / "merge.yaml", of_adapters(here))
    done = raymerge("merge", other, out, "--restart")
    assert done.code == 0, done.err
    assert names(out) == {
        "notes.txt", "sub/config.json", "README.md", "adapter_config.json", "adapter_model.safetensors",
        "raymerge.json", "raymerge-report.json",
    }  # fmt: skip
    assert not (out / ".raymerge").exists()
    assert (out / "notes.txt").read_text() == "mine"
    assert raymerge("verify", out).code == 0


def test_restart_of_the_same_merge_gives_the_same(raymerge: Raymerge, here: Path) -> None:
    path = manifest(here / "merge.yaml", of_models(here))
    assert raymerge("merge", path, here / "out").code == 0
    digest = content_digest(here / "out")
    again = raymerge("merge", path, here / "out", "--restart", "--json")
    assert again.code == 0, again.err
    assert again.document["already_done"] is False
    assert content_digest(here / "out") == digest


def failing_at(monkeypatch: pytest.MonkeyPatch, tensor: str) -> None:
    """Every unit but this tensor's is done; that one fails."""
    from merger.errors import MergeFailedError
    from merger.unit import UnitRunner

    run = UnitRunner.run

    def fail(self: UnitRunner, unit: Any, *arguments: Any) -> Any:
        if tensor in self.plan.tasks[unit.task].name:
            raise MergeFailedError.of("broken", "played", where="here", why="a test", fix="nothing")
        return run(self, unit, *arguments)

    monkeypatch.setattr(UnitRunner, "run", fail)


def test_a_failed_run_is_resumed(raymerge: Raymerge, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = manifest(here / "merge.yaml", of_models(here))
    assert raymerge("merge", path, here / "whole").code == 0
    with monkeypatch.context() as patch:
        failing_at(patch, "norm")  # the smallest, which comes last
        check_error(raymerge("merge", path, here / "out", "--workers", "1"), 1, "broken", said="while merging")
    assert names(here / "out") == set()
    assert {p.name for p in (here / "out").iterdir()} == {".raymerge"}
    lease = here / "out" / ".raymerge" / "lease"
    assert not lease.exists()
    done = raymerge("merge", path, here / "out", "--json")
    assert done.code == 0, done.err
    assert done.document["units_resumed"] >= 1
    assert done.document["content_digest"] == content_digest(here / "whole")
    assert not (here / "out" / ".raymerge").exists()
    assert names(here / "out") == names(here / "whole")


def test_an_unfinished_other_merge(raymerge: Raymerge, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        failing_at(patch, "norm")
        path = manifest(here / "other.yaml", of_models(here))
        assert raymerge("merge", path, here / "out").code == 1
    check_refused(raymerge, here, of_adapters(here), "output-exists", code=3, said="beginning of another merge")
    check_error(raymerge("verify", here / "out"), 2, "no-merge", said="unfinished")
    path = manifest(here / "merge.yaml", of_adapters(here))
    done = raymerge("merge", path, here / "out", "--restart")
    assert done.code == 0, done.err
    assert "adapter_config.json" in names(here / "out")
    assert "model.safetensors" not in names(here / "out")
    assert not (here / "out" / ".raymerge").exists()


# ---- 75 --------------------------------------------------------------------------------------------------------------


def test_a_held_lease(raymerge: Raymerge, here: Path) -> None:
    lease = Lease.acquire(LocalStore(str(here / "out")))
    check_refused(raymerge, here, of_adapters(here), "lease-held", code=75, said=str(os.getpid()))
    check_refused(raymerge, here, of_adapters(here), "lease-held", code=75, arguments=("--restart",))
    lease.release()
    assert raymerge("merge", here / "merge.yaml", here / "out").code == 0


# ---- in a process of its own -----------------------------------------------------------------------------------------


def test_the_real_command(here: Path) -> None:
    path = manifest(here / "merge.yaml", of_adapters(here, colour="red"))
    check_error(command("merge", path, here / "out"), 2, "unknown-key")
    check_json(command("merge", path, here / "out", "--json"), 2, "unknown-key")
    assert not (here / "out").exists()


def test_the_real_command_shows_a_traceback_when_asked(here: Path) -> None:
    path = manifest(here / "merge.yaml", of_adapters(here, colour="red"))
    outcome = command("merge", path, here / "out", "--debug")
    assert outcome.code == 2
    assert "Traceback" in outcome.err


def test_the_real_command_prints_one_document(here: Path) -> None:
    path = manifest(here / "merge.yaml", of_adapters(here))
    outcome = command("merge", path, here / "out", "--json", "--on", "here")
    assert outcome.code == 0, outcome.err
    assert outcome.document["content_digest"] == content_digest(here / "out")


def test_a_reader_that_leaves_is_no_traceback() -> None:
    done = subprocess.run(
        f"{sys.executable} -m jobs.cli methods | head -1", shell=True, capture_output=True, text=True, check=False
    )
    assert done.stdout.count("\n") == 1
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr


@pytest.mark.slow
def test_lora_config_is_what_peft_writes() -> None:
    """The sources of this file are adapters, not something like them."""
    peft = pytest.importorskip("peft")
    assert peft.LoraConfig(**{k: v for k, v in lora_config(4).items() if k != "peft_type"}).r == 4
