"""LoRA files of image trainers in buckets and repositories, named by folder and by file."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file

if TYPE_CHECKING:
    from pathlib import Path

    from tests.remote.places import Places

MODULE = "lora_unet_mid_block_attentions_0_proj_in"


@pytest.mark.parametrize("place", ["hub", "s3"])
def test_a_lora_file_is_read_where_it_lies(places: Places, tmp_path: Path, place: str) -> None:
    down, up = torch.randn(4, 12), torch.randn(20, 4)
    state = {f"{MODULE}.lora_down.weight": down, f"{MODULE}.lora_up.weight": up, f"{MODULE}.alpha": torch.tensor(2.0)}
    save_file(state, tmp_path / "one.safetensors")
    there = places.fresh(place)
    done = places.merge({"adapters": [{"adapter": str(tmp_path / "one.safetensors")}]}, there, "--on", "here")
    assert done.code == 0, done.err
    assert done.document["kind"] == "adapter"
    named = [there, f"{there}/pytorch_lora_weights.safetensors"]
    out = places.fresh("disk")
    done = places.merge({"adapters": [{"adapter": source} for source in named]}, out, "--on", "here")
    assert done.code == 0, done.err
    made = load_file(f"{out}/pytorch_lora_weights.safetensors")
    product = made[f"{MODULE}.lora_up.weight"] @ made[f"{MODULE}.lora_down.weight"]
    assert float(made[f"{MODULE}.alpha"]) == 8
    torch.testing.assert_close(product, 2 * 0.5 * up @ down, rtol=1e-5, atol=1e-5)
