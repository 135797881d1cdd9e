"""What an expert would try first and lose by: refused before anything is written, or said."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import merger
from merger.errors import MergeFailedError, PlanError

TINY = {"model_type": "llama", "num_hidden_layers": 2, "tie_word_embeddings": True}


def _model(
    folder: Path, seed: int, *, head: bool = False, tokens: Mapping[str, int] | None = None, **config: object
) -> str:
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.randn(shape, generator=generator)
        for name, shape in {
            "model.embed_tokens.weight": (32, 16),
            **{f"model.layers.{i}.mlp.up_proj.weight": (24, 16) for i in range(2)},
            "model.norm.weight": (16,),
        }.items()
    }
    if head:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**TINY, **config}))
    if tokens is not None:
        document = {"model": {"type": "WordLevel", "vocab": dict(tokens)}, "added_tokens": []}
        (folder / "tokenizer.json").write_text(json.dumps(document))
    return str(folder)


def _adapter(folder: Path, module: str, rows: int, cols: int, base: str = "org/base") -> str:
    folder.mkdir(parents=True)
    name = f"base_model.model.{module}"
    tensors = {f"{name}.lora_A.weight": torch.randn(2, cols), f"{name}.lora_B.weight": torch.randn(rows, 2)}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "bias": "none", "base_model_name_or_path": base}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return str(folder)


def _codes(manifest: Mapping[str, Any]) -> set[str]:
    return {problem.code for problem in merger.plan(manifest).problems}


def _linear(*models: str, **more: object) -> dict[str, Any]:
    return {"merge_method": "linear", "models": [{"model": m, "parameters": {"weight": 1.0}} for m in models], **more}


def test_restart_never_removes_what_it_reads(tmp_path: Path) -> None:
    a = _adapter(tmp_path / "a", "model.layers.0.mlp.up_proj", 24, 16)
    out = tmp_path / "out"
    merger.merge({"adapters": [{"adapter": a}]}, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    link = tmp_path / "link"
    link.symlink_to(out)
    for source in (out, link):
        manifest = {"adapters": [{"adapter": str(source)}, {"adapter": a}]}
        with pytest.raises(PlanError, match="output-is-source"):
            merger.merge(manifest, out, restart=True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_a_slice_lists_its_base(tmp_path: Path) -> None:
    base, a = _model(tmp_path / "base", 0), _model(tmp_path / "a", 1)
    unlisted = {
        "merge_method": "task_arithmetic", "base_model": base,
        "slices": [{"sources": [{"model": a, "layer_range": [1, 2], "parameters": {"weight": 0.5}}]}],
    }  # fmt: skip
    assert _codes(unlisted) == {"no-base"}
    unlisted["slices"][0]["sources"].append({"model": base, "layer_range": [1, 2]})  # type: ignore[index]
    merger.merge(unlisted, tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    layer = "model.layers.1.mlp.up_proj.weight"
    theirs, ours = (load_file(Path(m) / "model.safetensors")[layer] for m in (a, base))
    torch.testing.assert_close(merged, (theirs + ours) / 2)


def test_layers_that_are_not_there(tmp_path: Path) -> None:
    a = _model(tmp_path / "a", 0)
    manifest = {
        "merge_method": "passthrough",
        "slices": [{"sources": [{"model": a, "layer_range": span}]} for span in ([0, 2], [1, 3])],
    }  # fmt: skip
    assert _codes(manifest) == {"layer-range"}


def test_a_stored_head_that_changes_is_untied(tmp_path: Path) -> None:
    base = _model(tmp_path / "base", 0, head=True)
    a = _adapter(tmp_path / "a", "lm_head", 32, 16)
    merger.fold(a, tmp_path / "out", base=base)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False


def test_architectures_are_not_mixed(tmp_path: Path) -> None:
    a, b = _model(tmp_path / "a", 0), _model(tmp_path / "b", 1, model_type="mistral")
    assert _codes(_linear(a, b)) == {"architectures-differ"}


def test_tokens_that_changed_places(tmp_path: Path) -> None:
    a = _model(tmp_path / "a", 0, tokens={"x": 0, "y": 1, "z": 2})
    b = _model(tmp_path / "b", 1, tokens={"y": 0, "x": 1, "z": 2})
    more = _model(tmp_path / "more", 2, tokens={"x": 0, "y": 1, "z": 2, "added": 3})
    assert [w.code for w in merger.plan(_linear(a, b)).warnings] == ["vocabularies-differ"]
    moved = merger.plan(_linear(a, b, tokenizer_source="base", base_model=a))
    assert (moved.warnings, moved.problems) == ((), ())
    assert merger.plan(_linear(a, more)).warnings == ()


def test_another_base_than_the_adapters_name_is_reported(tmp_path: Path) -> None:
    base = _model(tmp_path / "base", 0)
    a = _adapter(tmp_path / "a", "model.layers.0.mlp.up_proj", 24, 16)
    manifest = {"base_model": base, "adapters": [{"adapter": a}], "output": {"kind": "model"}}
    assert [w.code for w in merger.plan(manifest).warnings] == ["base-differs"]
    own = _adapter(tmp_path / "own", "model.layers.0.mlp.up_proj", 24, 16, base=base)
    assert merger.plan({**manifest, "adapters": [{"adapter": own}]}).warnings == ()


def test_one_adapter_may_be_given_by_itself(tmp_path: Path) -> None:
    base = _model(tmp_path / "base", 0)
    a = Path(_adapter(tmp_path / "a", "model.layers.0.mlp.up_proj", 24, 16))
    for source in (a, str(a), [a]):
        merger.fold(source, tmp_path / "out", base=Path(base))
    tensors: dict[str, Tensor] = load_file(tmp_path / "out" / "model.safetensors")
    assert set(tensors) == set(load_file(Path(base) / "model.safetensors"))


def test_keys_without_effect_are_named(tmp_path: Path) -> None:
    a = _adapter(tmp_path / "a", "model.layers.0.mlp.up_proj", 24, 16)
    manifest = {
        "adapters": [{"adapter": a}],
        "output": {"private": True, "commit_message": "x", "s3": {"tags": {"a": "b"}}},
    }  # fmt: skip
    warnings = merger.plan(manifest, tmp_path / "out").warnings
    assert {w.where for w in warnings} == {"output.s3", "output.private", "output.commit_message"}


def test_rotary_tables_are_copied_when_they_are_equal(tmp_path: Path) -> None:
    a, b, c = (_model(tmp_path / name, seed) for seed, name in enumerate("abc"))
    table = "model.layers.0.self_attn.rotary_emb.inv_freq"
    for folder, value in ((a, 0.1), (b, 0.1), (c, 0.2)):
        file = Path(folder) / "model.safetensors"
        save_file({**load_file(file), table: torch.tensor([1.0, value])}, file, metadata={"format": "pt"})
    merger.merge(_linear(a, b), tmp_path / "out")
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")[table], torch.tensor([1.0, 0.1]))
    with pytest.raises(MergeFailedError, match="differ"):
        merger.merge(_linear(a, c), tmp_path / "other")


def test_rope_settings_are_not_mixed(tmp_path: Path) -> None:
    a = _model(tmp_path / "a", 0, rope_theta=10000.0)
    b = _model(tmp_path / "b", 1, rope_theta=500000.0)
    assert _codes(_linear(a, b)) == {"settings-differ"}


def test_a_config_that_says_more_layers_than_there_are(tmp_path: Path) -> None:
    a, b = _model(tmp_path / "a", 0), _model(tmp_path / "b", 1, num_hidden_layers=5)
    assert _codes(_linear(a, b)) == {"missing-layers"}
    fewer = _model(tmp_path / "fewer", 1, num_hidden_layers=1)  # layers beyond the stack, such as those for prediction
    assert "missing-layers" not in _codes(_linear(a, fewer))
