"""`kind: tensors`: bare .safetensors files, merged by name, as diffusion and vision checkpoints are shared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import merger
from jobs.cli import main
from merger import api
from merger.errors import RaymergeError
from merger.verify import verify_output
from tests import reference

UNET = {
    "conv_in.weight": (8, 4, 3, 3),
    "conv_in.bias": (8,),
    "down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q.weight": (16, 8),
    "down_blocks.10.resnets.0.norm1.weight": (8,),
    "time_embedding.linear_1.weight": (16, 8),
}
VIT = {
    "cls_token": (1, 1, 12),
    "pos_embed": (1, 5, 12),
    "patch_embed.proj.weight": (12, 3, 4, 4),
    "blocks.0.attn.qkv.weight": (36, 12),
    "blocks.1.attn.qkv.weight": (36, 12),
    "head.weight": (7, 12),
}
NAMES = {"unet": UNET, "vit": VIT}


def save(path: Path, shapes: dict[str, tuple[int, ...]], seed: int, dtype: torch.dtype = torch.float16) -> Path:
    generator = torch.Generator().manual_seed(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({n: torch.randn(s, generator=generator).to(dtype) for n, s in shapes.items()}, path)
    return path


@pytest.fixture(params=sorted(NAMES))
def files(request: pytest.FixtureRequest, tmp_path: Path) -> list[Path]:
    return [
        save(tmp_path / f"{name}.safetensors", NAMES[request.param], i) for i, name in enumerate(("base", "a", "b"))
    ]


def manifest(files: list[Path], method: str = "linear", **keys: Any) -> dict[str, Any]:
    models = [{"model": str(f), "parameters": {"weight": w}} for f, w in zip(files[1:], (0.75, 0.25), strict=True)]
    return {"merge_method": method, "models": models, **keys}


def merged(out: Path) -> dict[str, Tensor]:
    (file,) = out.glob("*.safetensors")
    return load_file(file)


def test_files_are_merged_by_name_and_keep_their_dtype(files: list[Path], tmp_path: Path) -> None:
    merger.merge(manifest(files), tmp_path / "out")
    a, b = (load_file(f) for f in files[1:])
    found = merged(tmp_path / "out")
    assert found.keys() == a.keys()
    for name, value in found.items():
        wanted = reference.linear([a[name].numpy(), b[name].numpy()], [0.75, 0.25])
        assert value.dtype == torch.float16
        np.testing.assert_allclose(value.float().numpy(), wanted, atol=2e-3, rtol=1e-3)


def test_a_method_on_deltas_and_its_base(files: list[Path], tmp_path: Path) -> None:
    keys = {"base_model": str(files[0]), "parameters": {"density": 0.3}, "dtype": "float32"}
    merger.merge(manifest(files, "ties", **keys), tmp_path / "out")
    base, a, b = (load_file(f) for f in files)
    for name, value in merged(tmp_path / "out").items():
        changes = [reference.delta(x[name].numpy(), base[name].numpy()) for x in (a, b)]
        wanted = reference.ties(base[name].numpy(), changes, [0.75, 0.25], [0.3, 0.3])
        np.testing.assert_allclose(value.numpy(), wanted, atol=1e-5)


def test_the_output_is_a_folder_with_one_file_named_as_the_base_is(files: list[Path], tmp_path: Path) -> None:
    report = merger.merge(manifest(files, "task_arithmetic", base_model=str(files[0])), tmp_path / "out")
    assert report.kind == "tensors"
    names = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert names == ["README.md", "base.safetensors", "raymerge-report.json", "raymerge.json"]
    assert verify_output(str(tmp_path / "out"), replay=None).replayed == len(load_file(files[0]))
    assert merger.merge(manifest(files, "task_arithmetic", base_model=str(files[0])), tmp_path / "out").already_done


def test_a_folder_with_one_file_keeps_its_config(tmp_path: Path) -> None:
    for i, name in enumerate(("a", "b")):
        save(tmp_path / name / "diffusion_pytorch_model.safetensors", UNET, i)
        (tmp_path / name / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    document = manifest([tmp_path, tmp_path / "a", tmp_path / "b"], output={"kind": "tensors"})
    merger.merge(document, tmp_path / "out")
    assert (tmp_path / "out" / "diffusion_pytorch_model.safetensors").is_file()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["_class_name"] == "UNet2DConditionModel"


def test_gradients_see_numbered_blocks_only(tmp_path: Path) -> None:
    files = [save(tmp_path / f"{n}.safetensors", VIT, i, torch.float32) for i, n in enumerate(("base", "a", "b"))]
    document = manifest(files)
    document["models"][0]["parameters"]["weight"] = [0.0, 1.0]
    document["models"][1]["parameters"]["weight"] = [1.0, 0.0]
    merger.merge(document, tmp_path / "out")
    a, b = (load_file(f) for f in files[1:])
    found = merged(tmp_path / "out")
    assert torch.equal(found["blocks.1.attn.qkv.weight"], a["blocks.1.attn.qkv.weight"])
    for name in ("blocks.0.attn.qkv.weight", "cls_token", "head.weight"):
        assert torch.equal(found[name], b[name]), name


def test_tensors_that_one_side_lacks_are_all_named_at_once(tmp_path: Path) -> None:
    few = {n: s for n, s in VIT.items() if n != "cls_token"}
    a, b = (
        save(tmp_path / "a.safetensors", VIT, 1),
        save(tmp_path / "b.safetensors", {**few, "dist_token": (1, 1, 12)}, 2),
    )
    (problem,) = api.plan(manifest([a, a, b])).problems
    assert problem.code == "missing-tensor"
    assert "only in " + str(a) + ": cls_token" in problem.where
    assert "only in " + str(b) + ": dist_token" in problem.where


@pytest.mark.parametrize(
    "change, code",
    [
        ({"output": {"kind": "model"}}, "no-such-source"),
        ({"models": None, "slices": "stacked", "output": {"kind": "tensors"}}, "bad-kind"),
        ({"output": {"path": "out.safetensors"}}, "bad-output"),
        ({"output": {"kind": "tensors", "store": "concat"}}, "conflict"),
    ],
)
def test_what_bare_files_cannot_be_is_refused(tmp_path: Path, change: dict[str, Any], code: str) -> None:
    files = [save(tmp_path / f"{n}.safetensors", VIT, i) for i, n in enumerate(("base", "a", "b"))]
    document = manifest(files) | change
    if document.get("slices"):
        document["slices"] = [{"sources": [{"model": str(files[1]), "layer_range": [0, 1]}]}]
        document["merge_method"] = "passthrough"
    try:
        codes = {p.code for p in api.plan(document).problems}
    except RaymergeError as error:
        codes = {p.code for p in error.problems}
    assert code in codes


def test_a_folder_of_several_files_names_them(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save(tmp_path / "many" / f"{name}.safetensors", VIT, 1)
    document = manifest([tmp_path] * 3, output={"kind": "tensors"})
    document["models"] = [{"model": str(tmp_path / "many"), "parameters": {"weight": 1.0}}]
    (problem,) = api.plan(document).problems
    assert (problem.code, problem.why) == ("no-weights", "a.safetensors, b.safetensors")


def test_the_short_form_and_inspect_take_files(
    files: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["merge", str(files[1]), str(files[2]), "-o", str(tmp_path / "out"), "--on", "here"]) == 0
    assert merged(tmp_path / "out").keys() == load_file(files[1]).keys()
    capsys.readouterr()
    assert main(["inspect", str(files[1]), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "tensors"
