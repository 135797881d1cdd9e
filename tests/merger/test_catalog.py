"""What a source holds, from configs and headers alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from merger.catalog import describe, inspect_source, read_catalog
from merger.errors import SourceError
from merger.manifest import parse_reference
from tests.conformance.folders import LAYERS, adapter, lora_tensors, model, model_tensors


def code(caught: pytest.ExceptionInfo[SourceError]) -> str:
    return caught.value.problems[0].code


def test_an_adapter(tmp_path: Path) -> None:
    found = read_catalog(parse_reference(str(adapter(tmp_path / "a", 1, rank=4))), "adapter")
    assert found.kind == "adapter"
    assert found.base_name == "org/base"
    assert set(found.modules) == set(LAYERS)
    module = found.modules[LAYERS[0]]
    assert (module.rank, module.scaling, module.shape) == (4, 2.0, (96, 64))
    assert module.target == f"{LAYERS[0]}.weight"
    assert set(found.pins) == {"adapter_model.safetensors", "adapter_config.json"}
    assert found.problems == ()


def test_scaling_follows_patterns_and_rslora(tmp_path: Path) -> None:
    config = {"use_rslora": True, "alpha_pattern": {LAYERS[1].removeprefix("model."): 2}}
    found = inspect_source(str(adapter(tmp_path / "a", 1, rank=4, config=config)))
    assert found.modules[LAYERS[0]].scaling == 4.0
    assert found.modules[LAYERS[1]].scaling == 1.0


def test_a_model_and_what_goes_with_it(tmp_path: Path) -> None:
    folder = model(tmp_path / "m", 1, config={"tie_word_embeddings": True, "auto_map": {"AutoModel": "mine.Model"}})
    (folder / "mine.py").write_text("from .other import x\n")
    (folder / "other.py").write_text("x = 1\n")
    (folder / "unused.py").write_text("raise SystemExit\n")
    (folder / "README.md").write_text("---\nlicense: apache-2.0 # fine\n---\n")
    found = inspect_source(str(folder))
    assert (found.kind, found.tied, found.licence) == ("model", True, "apache-2.0")
    assert found.code == ("mine.py", "other.py")
    assert "tokenizer.json" in found.companions
    assert found.shards == ("model.safetensors",)
    assert set(found.tensors) == set(model_tensors(1))
    assert {"model.safetensors", "config.json", "mine.py", "tokenizer.json"} <= set(found.pins)


def test_tied_embeddings_of_a_text_config(tmp_path: Path) -> None:
    folder = model(tmp_path / "m", 1, config={"text_config": {"tie_word_embeddings": True}})
    assert inspect_source(str(folder)).tied


def test_a_model_of_shards(tmp_path: Path) -> None:
    tensors = model_tensors(1)
    folder = model(tmp_path / "m", 1)
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for n, (name, tensor) in enumerate(tensors.items(), 1):
        weight_map[name] = f"model-{n:05}-of-00003.safetensors"
        save_file({name: tensor}, folder / weight_map[name])
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    found = inspect_source(str(folder))
    assert {name: t.file for name, t in found.tensors.items()} == weight_map
    assert found.shards == tuple(sorted(weight_map.values()))


def test_a_bin_reads_as_its_safetensors(tmp_path: Path) -> None:
    tensors = lora_tensors(1)
    sound = inspect_source(str(adapter(tmp_path / "s", 1)))
    folder = adapter(tmp_path / "b", 1)
    (folder / "adapter_model.safetensors").unlink()
    torch.save(tensors, folder / "adapter_model.bin")
    found = inspect_source(str(folder))
    assert found.modules == sound.modules
    assert {n: t.spec for n, t in found.tensors.items()} == {n: t.spec for n, t in sound.tensors.items()}


@pytest.mark.parametrize("kind, problem", [("adapter", "no-such-source"), ("model", "no-such-source")])
def test_nothing_is_there(tmp_path: Path, kind: str, problem: str) -> None:
    with pytest.raises(SourceError) as caught:
        read_catalog(parse_reference(f"{tmp_path}/none"), "adapter" if kind == "adapter" else "model")
    assert code(caught) == problem


def test_the_wrong_kind(tmp_path: Path) -> None:
    adapter(tmp_path / "a", 1)
    model(tmp_path / "m", 1)
    with pytest.raises(SourceError) as caught:
        read_catalog(parse_reference(str(tmp_path / "a")), "model")
    assert code(caught) == "wrong-kind"
    with pytest.raises(SourceError) as caught:
        read_catalog(parse_reference(str(tmp_path / "m")), "adapter")
    assert code(caught) == "wrong-kind"


@pytest.mark.parametrize(
    "config, said",
    [
        ({"use_dora": True}, "lora_magnitude_vector"),
        ({"init_lora_weights": "tomorrows"}, "tomorrows"),
        ({"peft_type": "IA3"}, "which is no IA3"),
        ({"peft_type": "PREFIX_TUNING"}, "PREFIX_TUNING"),
        ({"peft_type": "TOMORROWS"}, "TOMORROWS"),
        ({"alora_invocation_tokens": [1]}, "aLoRA"),
        ({"arrow_config": {"top_k": 1}}, "Arrow"),
        ({"use_qalora": True}, "QALoRA"),
        ({"kasa_config": {"beta": 1}}, "KaSA"),
        ({"ensure_weight_tying": True}, "ensure_weight_tying"),
    ],
)
def test_what_cannot_be_merged_right_is_named(tmp_path: Path, config: dict[str, object], said: str) -> None:
    found = inspect_source(str(adapter(tmp_path / "a", 1, config=config)))
    assert found.problems
    assert said in found.problems[0].what


def test_every_tensor_must_land(tmp_path: Path) -> None:
    tensors = {**lora_tensors(1), "base_model.model.stray": torch.ones(3)}
    found = inspect_source(str(adapter(tmp_path / "a", 1, tensors=tensors)))
    assert ["stray" in p.what for p in found.problems] == [True]


def test_describe_counts(tmp_path: Path) -> None:
    found = describe(inspect_source(str(adapter(tmp_path / "a", 1, rank=4))))
    assert found["parameters"] == 2 * 4 * (96 + 64)
    assert found["bytes"] == 4 * found["parameters"]
    assert found["dtypes"] == {"F32": 4}
