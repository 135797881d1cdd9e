"""Checkpoints of the popular families, folded and merged: names, shapes and dtypes stay as on disk, and they load in
transformers with nothing missing and nothing left over, and computing what they should."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import merger
from tests.merger.parity.families import FAMILIES, Family

EVERY = [pytest.param(name, marks=pytest.mark.slow if family.slow else ()) for name, family in FAMILIES.items()]


def checkpoint(family: Family, path: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    model: Any = family.model(family.config())
    with torch.no_grad():
        for parameter in model.parameters():  # norms at one and biases at zero would hide what is lost
            parameter.add_(0.05 * torch.randn(parameter.shape))
    model.save_pretrained(str(path))
    return path


def stored(path: Path) -> dict[str, Tensor]:
    return {name: value for file in sorted(path.glob("*.safetensors")) for name, value in load_file(file).items()}


def loaded(family: Family, path: Path) -> Any:
    """The model, and nothing but what the files hold."""
    model, info = family.model.from_pretrained(str(path), dtype="auto", output_loading_info=True)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        assert not info[kind], f"{kind}: {info[kind]}"
    return model.eval()


def answer(family: Family, model: Any) -> Tensor:
    with torch.no_grad():
        made: Tensor = model(**family.inputs()).to_tuple()[0]
    return made


def assert_same_layout(before: dict[str, Tensor], after: dict[str, Tensor], family: Family) -> None:
    assert {n: (v.dtype, v.shape) for n, v in after.items()} == {n: (v.dtype, v.shape) for n, v in before.items()}
    for part in family.names:
        assert any(part in name for name in after), part


@pytest.mark.parametrize("name", EVERY)
def test_an_adapter_is_folded(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    base = checkpoint(family, tmp_path / "base", 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned: Any = peft.get_peft_model(
            loaded(family, base), peft.LoraConfig(r=4, lora_alpha=8, target_modules=family.adapts)
        ).eval()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for key, parameter in tuned.named_parameters():
                if ".lora_B" in key:
                    parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        tuned.save_pretrained(str(tmp_path / "adapter"))
    merger.fold([str(tmp_path / "adapter")], tmp_path / "out", base=str(base), workers=1)
    before, after = stored(base), stored(tmp_path / "out")
    assert_same_layout(before, after, family)
    touched = {key.rpartition(".lora_")[0] for key in load_file(tmp_path / "adapter" / "adapter_model.safetensors")}
    assert sum(not torch.equal(before[n], after[n]) for n in before) >= len(touched)  # packed experts are many on disk
    expected, found = answer(family, tuned), answer(family, loaded(family, tmp_path / "out"))
    scale = float(expected.abs().max())
    assert float((found - expected).abs().max()) < 2e-5 * scale
    assert float((answer(family, loaded(family, base)) - expected).abs().max()) > 1e-3 * scale


@pytest.mark.parametrize("name", EVERY)
def test_two_models_are_merged(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    paths = [checkpoint(family, tmp_path / f"m{seed}", seed) for seed in (0, 1)]
    merger.merge(
        {
            "merge_method": "linear",
            "models": [
                {"model": str(p), "parameters": {"weight": w}} for p, w in zip(paths, (0.75, 0.25), strict=True)
            ],
        },
        tmp_path / "out",
        workers=1,
    )
    first, second, made = (stored(p) for p in (*paths, tmp_path / "out"))
    assert_same_layout(first, made, family)
    for key, value in made.items():
        if value.is_floating_point():
            torch.testing.assert_close(value, 0.75 * first[key] + 0.25 * second[key], rtol=1e-6, atol=1e-7)
        else:
            assert torch.equal(value, first[key])
    assert bool(answer(family, loaded(family, tmp_path / "out")).isfinite().all())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == [family.model.__name__]
