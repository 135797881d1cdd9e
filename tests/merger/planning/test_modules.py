"""Models of several modules, merged module by module."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import merger
from merger.planning.modules import left_out, module_of, modules_of

SEEING = ("text_decoder", "vision_tower", "multi_modal_projector")


@pytest.mark.parametrize(
    "tensor, names, module",
    [
        ("model.language_model.layers.0.mlp.up_proj.weight", SEEING, "text_decoder"),
        ("language_model.lm_head.weight", SEEING, "text_decoder"),
        ("lm_head.weight", SEEING, "text_decoder"),
        ("model.layers.0.mlp.up_proj.weight", SEEING, "text_decoder"),
        ("vision_tower.vision_model.encoder.layers.0.fc1.weight", SEEING, "vision_tower"),
        ("visual.blocks.3.attn.qkv.weight", SEEING, "vision_tower"),
        ("visual.merger.mlp.0.weight", SEEING, "multi_modal_projector"),
        ("model.multi_modal_projector.linear_1.weight", SEEING, "multi_modal_projector"),
        ("encoder.block.0.layer.0.SelfAttention.q.weight", ("encoder", "decoder", "shared"), "encoder"),
        ("model.decoder.layers.1.fc1.weight", ("encoder", "decoder"), "decoder"),
        ("proj_out.weight", ("encoder", "decoder"), "decoder"),
        ("shared.weight", ("encoder", "decoder", "shared"), "shared"),
        ("shared.weight", ("encoder", "decoder"), None),
        ("model.layers.2.x", ("model.layers", "default"), "model.layers"),
        ("model.layersx.2", ("model.layers", "default"), "default"),
    ],
)
def test_modules_are_found_from_names(tensor: str, names: tuple[str, ...], module: str | None) -> None:
    assert module_of(tensor, names) == module
    modules = modules_of(dict.fromkeys(names, False))
    assert [m.name for m in modules.values() if m.holds(tensor)] == ([module] if module else [])
    assert left_out([tensor], list(modules.values())) == ([] if module else [tensor])


def _model(folder: Path, seed: int) -> str:
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "language_model.model.embed_tokens.weight": (12, 8),
        **{f"language_model.model.layers.{i}.mlp.up_proj.weight": (6, 8) for i in range(3)},
        "language_model.lm_head.weight": (12, 8),
        **{f"vision_tower.encoder.layers.{i}.fc1.weight": (5, 8) for i in range(2)},
        "multi_modal_projector.linear_1.weight": (8, 8),
    }
    folder.mkdir(parents=True)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "model_type": "seeing", "vocab_size": 12, "tie_word_embeddings": False,
        "text_config": {"num_hidden_layers": 3, "layer_types": ["a", "b", "c"]},
        "vision_config": {"num_hidden_layers": 2},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def _manifest(a: str, b: str) -> dict[str, Any]:
    def both(weight: float) -> list[dict[str, Any]]:
        return [{"model": a, "parameters": {"weight": weight}}, {"model": b, "parameters": {"weight": 1 - weight}}]

    return {
        "merge_method": "linear",
        "modules": {
            "text_decoder": {
                "slices": [
                    {"sources": [{"model": a, "layer_range": [0, 2], "parameters": {"weight": 1.0}}]},
                    {"sources": [{"model": b, "layer_range": [1, 3], "parameters": {"weight": 1.0}}]},
                ]
            },
            "vision_tower": {"models": both(0.25)},
            "multi_modal_projector": {"models": both(1.0)},
        },
    }


def _tensors(folder: str | Path) -> dict[str, Tensor]:
    return load_file(Path(folder) / "model.safetensors")


def test_each_module_is_merged_in_its_own_way(tmp_path: Path) -> None:
    a, b = _model(tmp_path / "a", 0), _model(tmp_path / "b", 1)
    merger.merge(_manifest(a, b), tmp_path / "out")
    merged, ours, theirs = _tensors(tmp_path / "out"), _tensors(a), _tensors(b)
    layers = "language_model.model.layers.{}.mlp.up_proj.weight"
    for at, (source, layer) in enumerate([(ours, 0), (ours, 1), (theirs, 1), (theirs, 2)]):
        assert torch.equal(merged[layers.format(at)], source[layers.format(layer)])
    assert torch.equal(merged["language_model.lm_head.weight"], theirs["language_model.lm_head.weight"])
    seen = "vision_tower.encoder.layers.1.fc1.weight"
    torch.testing.assert_close(merged[seen], 0.25 * ours[seen] + 0.75 * theirs[seen])
    assert torch.equal(merged["multi_modal_projector.linear_1.weight"], ours["multi_modal_projector.linear_1.weight"])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["text_config"] == {"num_hidden_layers": 4, "layer_types": ["a", "b", "b", "c"]}
    assert config["vision_config"] == {"num_hidden_layers": 2}


def test_a_tensor_that_no_module_holds(tmp_path: Path) -> None:
    a, b = _model(tmp_path / "a", 0), _model(tmp_path / "b", 1)
    manifest = _manifest(a, b)
    del manifest["modules"]["text_decoder"]
    manifest["modules"]["audio"] = {"models": [{"model": a, "parameters": {"weight": 1.0}}]}
    problems = merger.plan(manifest).problems
    assert [p.code for p in problems] == ["no-module", "no-module"]
    assert "language_model" in problems[0].what
    assert problems[1].where == "modules.audio"


def test_random_drops_differ_by_module_and_source(tmp_path: Path) -> None:
    """Positions are counted over all modules, so that no two sources share a mask."""
    a, b = _model(tmp_path / "a", 0), _model(tmp_path / "b", 1)
    entry = {"parameters": {"weight": 1.0, "density": 0.5}}
    manifest = {
        "merge_method": "dare_linear", "base_model": a,
        "modules": {name: {"models": [{"model": b, **entry}]} for name in SEEING},
    }  # fmt: skip
    plan = merger.plan(manifest)
    keys = {key for task in plan.tasks for result in task.results for key in result.call.keys}
    assert len(keys) == len(plan.tasks)
