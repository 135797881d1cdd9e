"""The example of PEFT's merging guide, from the Hub: look-alikes of its three adapters, of the same names and shapes.

These look-alikes are the LoRA factors alone, in full size; test_guide_vocabulary.py has those with tokens of their own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open

from tests.conformance.folders import ROOT, adapter
from tests.remote.places import Places

NAMES = ("norobots", "adcopy", "sql")
BASE = "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T"
HIDDEN, KEYS, INNER, LAYERS, RANK = 2048, 256, 5632, 22, 8
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (KEYS, HIDDEN), "self_attn.v_proj": (KEYS, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}  # fmt: skip


@pytest.fixture(scope="module")
def look_alikes(places: Places) -> Places:
    for seed, name in enumerate(NAMES):
        generator = torch.Generator().manual_seed(seed)
        tensors = {}
        for layer in range(LAYERS):
            for module, (rows, cols) in SHAPES.items():
                key = f"base_model.model.model.layers.{layer}.{module}"
                tensors[f"{key}.lora_A.weight"] = torch.randn(RANK, cols, generator=generator) / 50
                tensors[f"{key}.lora_B.weight"] = torch.randn(rows, RANK, generator=generator) / 50
        config = {
            "base_model_name_or_path": BASE, "lora_alpha": 16, "target_modules": sorted(m[-6:] for m in SHAPES),
        }  # fmt: skip
        folder = adapter(places.folder / f"tinyllama_lora_{name}", seed, rank=RANK, tensors=tensors, config=config)
        places.hub.create(f"smangrul/tinyllama_lora_{name}", folder)
    return places


@pytest.mark.parametrize("example", ["tinyllama-ties", pytest.param("tinyllama-dare-ties", marks=pytest.mark.slow)])
def test_the_guide_s_example_from_the_hub(look_alikes: Places, example: str) -> None:
    places = look_alikes
    manifest = ROOT / "manifests" / "merges" / f"{example}.yaml"
    out = places.fresh("disk")
    done = places.run("merge", manifest, out, "--json")
    assert done.code == 0, done.err
    # Its base is not on this Hub; adapters are merged without one, and it is said that nothing was checked against it.
    assert [w["code"] for w in done.document["warnings"]] == ["base-not-read"]
    config = json.loads((Path(out) / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == BASE
    with safe_open(Path(out) / "adapter_model.safetensors", "pt") as file:
        assert len(file.keys()) == 2 * LAYERS * len(SHAPES)
        assert file.get_slice("base_model.model.model.layers.21.mlp.down_proj.lora_A.weight").get_shape() == [
            RANK,
            INNER,
        ]
    local: dict[str, Any] = yaml.safe_load(manifest.read_text())
    for entry, name in zip(local["adapters"], NAMES, strict=True):
        entry["adapter"] = places.source("disk", f"tinyllama_lora_{name}")
    here = places.merge(local, places.fresh("disk"))
    assert here.document["content_digest"] == done.document["content_digest"]
    result = json.loads((Path(out) / "raymerge.json").read_text())
    assert all("@" in source["reference"] for source in result["sources"])
    assert places.run("verify", out, "--replay", 3).code == 0
