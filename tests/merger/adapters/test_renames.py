"""Adapters whose names are not the checkpoint's: found where all fit one way, refused with both sides where not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from merger.adapters.renames import _as_loaded
from merger.errors import RefusedError

if TYPE_CHECKING:
    from tests.merger.adapters.conftest import Workshop

pytestmark = pytest.mark.filterwarnings("ignore")


def lora(*targets: str, **options: Any) -> peft.LoraConfig:
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": list(targets), **options})


def respelled(adapter: Path, old: str, new: str, out: Path) -> Path:
    out.mkdir()
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({k.replace(old, new): v for k, v in tensors.items()}, out / "adapter_model.safetensors")
    (out / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    return out


def model_respelled(base: Path, old: str, new: str, out: Path) -> Path:
    out.mkdir()
    tensors = load_file(base / "model.safetensors")
    renamed = {k.replace(old, new) if k.startswith(old) else k: v for k, v in tensors.items()}
    save_file(renamed, out / "model.safetensors", {"format": "pt"})
    (out / "config.json").write_bytes((base / "config.json").read_bytes())
    return out


@pytest.mark.parametrize("layers", [None, [1]])
def test_a_checkpoint_without_the_prefix_of_its_head(workshop: Workshop, layers: Any, tmp_path: Path) -> None:
    """GPT-2's own files say h.0 where its model says transformer.h.0."""
    base = workshop.base("gpt2")
    old = model_respelled(base, "transformer.", "", tmp_path / "old")
    adapter = workshop.adapter(base, lora("c_attn", "c_proj", fan_in_fan_out=True, layers_to_transform=layers))
    out = workshop.fold(old, [adapter], tmp_path / "out")
    assert sorted(load_file(out / "model.safetensors")) == sorted(load_file(old / "model.safetensors"))
    theirs = workshop.logits(workshop.loaded(base, adapter))
    assert float((workshop.logits(workshop.model(out)) - theirs).abs().max()) < 3e-6 * float(theirs.abs().max())
    said = json.loads((out / "raymerge.json").read_text())["deviations"]
    assert any("found under other names" in line for line in said)


@pytest.fixture(scope="module")
def vision(workshop: Workshop) -> Path:
    """A vision–language model, in the old layout that transformers writes."""
    path = workshop.root / "qwen2-vl"
    torch.manual_seed(0)
    text = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 160, "initializer_range": 0.1,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4},
    }  # fmt: skip
    config = Qwen2VLConfig(
        text_config=text,
        vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2},
        image_token_id=150, video_token_id=151, vision_start_token_id=152, vision_end_token_id=153,
    )  # fmt: skip
    made: Any = Qwen2VLForConditionalGeneration(config)
    made.save_pretrained(str(path))
    return path


def vision_model(path: Path) -> Any:
    loaded: Any = Qwen2VLForConditionalGeneration.from_pretrained(str(path), dtype="auto")
    return loaded.eval()


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "proj", "qkv"]], ids=["text", "text and vision"])
def test_a_moved_language_model(workshop: Workshop, vision: Path, targets: list[str], tmp_path: Path) -> None:
    """The checkpoint says model.layers and visual.blocks, the model model.language_model.layers and model.visual."""
    names = sorted(load_file(vision / "model.safetensors"))
    assert any(name.startswith("model.layers.") for name in names)
    model = peft.get_peft_model(vision_model(vision), lora(*targets))
    workshop.move(model, 3)
    adapter = tmp_path / "adapter"
    model.save_pretrained(str(adapter))
    assert any("language_model" in name for name in load_file(adapter / "adapter_model.safetensors"))
    out = workshop.fold(vision, [adapter], tmp_path / "out")
    assert sorted(load_file(out / "model.safetensors")) == names
    merged = model.merge_and_unload().state_dict()
    for name, value in vision_model(out).state_dict().items():
        assert torch.allclose(value, merged[name], atol=1e-6), name


def test_an_old_adapter_of_a_moved_language_model(workshop: Workshop, vision: Path, tmp_path: Path) -> None:
    """What PEFT loads as B = 0, with a warning."""
    model = peft.get_peft_model(vision_model(vision), lora("q_proj"))
    workshop.move(model, 3)
    model.save_pretrained(str(tmp_path / "new"))
    old = respelled(tmp_path / "new", "model.language_model.layers", "model.layers", tmp_path / "old")
    folds = [workshop.fold(vision, [a], tmp_path / f"out-{a.name}") for a in (tmp_path / "new", old)]
    first, second = (load_file(out / "model.safetensors") for out in folds)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_two_spellings_of_one_layer_are_merged_as_one(workshop: Workshop, vision: Path, tmp_path: Path) -> None:
    model = peft.get_peft_model(vision_model(vision), lora("q_proj"))
    workshop.move(model, 3)
    model.save_pretrained(str(tmp_path / "new"))
    old = respelled(tmp_path / "new", "model.language_model.layers", "model.layers", tmp_path / "old")
    out = workshop.merge(
        {"merge_method": "cat", "base_model": str(vision), "output": {"kind": "adapter"},
         "adapters": [{"adapter": str(a)} for a in (tmp_path / "new", old)]},
        tmp_path / "out",
    )  # fmt: skip
    names = sorted(load_file(out / "adapter_model.safetensors"))
    assert names[0] == "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    assert len(names) == 4
    assert load_file(out / "adapter_model.safetensors")[names[0]].shape[0] == 8


def test_some_that_fit_nothing_are_refused_with_both_sides(workshop: Workshop, tmp_path: Path) -> None:
    base = workshop.base("llama")
    adapter = workshop.adapter(base, lora("q_proj", "up_proj"))
    strange = respelled(adapter, "self_attn", "attention", tmp_path / "strange")
    with pytest.raises(RefusedError, match=r"2 of 4 modules") as caught:
        workshop.fold(base, [strange], tmp_path / "out")
    problem = caught.value.problems[0]
    assert "attention.q_proj" in problem.where
    assert "the base has, for example" in problem.why


def test_two_ways_to_fit_are_no_way(workshop: Workshop, tmp_path: Path) -> None:
    """A text tower and a second one of the same shapes."""
    base = workshop.base("llama")
    tensors = load_file(base / "model.safetensors")
    twins = tmp_path / "twins"
    twins.mkdir()
    save_file(
        {f"{tower}.{k.removeprefix('model.')}": v.clone() for k, v in tensors.items() for tower in ("left", "right")},
        twins / "model.safetensors",
    )
    (twins / "config.json").write_bytes((base / "config.json").read_bytes())
    with pytest.raises(RefusedError, match="does not have"):
        workshop.fold(twins, [workshop.adapter(base, lora("q_proj"))], tmp_path / "out")


def test_a_config_that_asks_for_more_than_its_files_hold_is_not_built(vision: Path) -> None:
    """A class made from it would have as many layers as it says."""
    config = json.loads((vision / "config.json").read_text())
    names = len(load_file(vision / "model.safetensors"))
    assert _as_loaded(config, names) is not None
    config["text_config"]["num_hidden_layers"] = 10**9
    assert _as_loaded(config, names) is None
