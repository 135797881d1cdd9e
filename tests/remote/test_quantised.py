"""A quantised base from and to every place: small parts read by ranges, codes and scales written beside each other."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.remote.places import BUCKET, Places


def fp8(places: Places, name: str, block: tuple[int, int] | None) -> str:
    """The base of the remote tests in FP8, everywhere; its name."""
    folder = places.folder / name
    if folder.exists():
        return name
    folder.mkdir()
    tensors = {}
    for key, weight in load_file(places.folder / "base" / "model.safetensors").items():
        if "q_proj" not in key:
            tensors[key] = weight
            continue
        rows, cols = weight.shape
        high, wide = block or (rows, cols)
        padded = torch.zeros(-(-rows // high) * high, cols)
        padded[:rows] = weight.float()
        blocks = padded.reshape(-1, high, cols // wide, wide)
        grid = blocks.abs().amax((1, 3)) / 448
        codes = (blocks / grid[:, None, :, None]).reshape(-1, cols)[:rows]
        tensors[key] = codes.to(torch.float8_e4m3fn)
        tensors[f"{key}_scale_inv"] = grid if block else grid[0, 0]
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((places.folder / "base" / "config.json").read_text())
    scheme = {"quant_method": "fp8", "weight_block_size": block, "activation_scheme": "dynamic"}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": scheme}))
    places.upload(name)
    return name


@pytest.mark.parametrize(
    "block, source, to",
    [
        ((128, 128), "s3", "s3"),
        pytest.param(None, "s3", "s3", marks=pytest.mark.slow),
        pytest.param((128, 128), "hub", "s3", marks=pytest.mark.slow),
        pytest.param(None, "s3", "hub", marks=pytest.mark.slow),
    ],
)
def test_the_same_fold_from_and_to_everywhere(
    places: Places, block: tuple[int, int] | None, source: str, to: str
) -> None:
    name = fp8(places, f"fp8-{'blocks' if block else 'tensor'}", block)

    def manifest(place: str) -> dict[str, object]:
        adapter = {"adapter": places.source(place, "a1"), "parameters": {"weight": 0.5}}
        return {"base_model": places.source(place, name), "adapters": [adapter], "output": {"kind": "model"}}

    here = places.merge(manifest("disk"), places.fresh("disk"))
    assert here.code == 0, here.err
    out = places.fresh(to)
    done = places.merge(manifest(source), out)
    assert done.code == 0, done.err
    assert done.document["content_digest"] == here.document["content_digest"]
    assert places.run("verify", out, "--replay", "all", "--json").code == 0
    if to == "s3":
        assert places.s3.uploads(BUCKET, out.removeprefix(f"s3://{BUCKET}/")) == ()
