"""Statistics and ranks that follow from the data, over the network: the bytes of a run from disk to disk."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.remote.places import COLS, MODULES, Places


@pytest.fixture(scope="module")
def measured(places: Places) -> Places:
    """A file of Gram matrices for each model, everywhere."""
    for seed, name in ((11, "grams1"), (12, "grams2")):
        generator = torch.Generator().manual_seed(seed)
        (places.folder / name).mkdir()
        grams = {}
        for module in MODULES:
            x = torch.randn(2 * COLS, COLS, generator=generator)
            grams[f"{module}.weight"] = x.T @ x
        save_file(grams, places.folder / name / "grams.safetensors")
        places.upload(name)
    return places


def regmean(places: Places, place: str) -> dict[str, Any]:
    def file(name: str) -> str:
        reference = f"{places.source(place, name)}/grams.safetensors"
        return f"hf://{reference}" if place == "hub" else reference

    return {
        "merge_method": "regmean", "base_model": places.source(place, "base"),
        "models": [
            {"model": places.source(place, model), "statistics": file(grams)}
            for model, grams in (("m1", "grams1"), ("m2", "grams2"))
        ],
    }  # fmt: skip


def at_an_energy(places: Places, place: str) -> dict[str, Any]:
    entries = [{"adapter": places.source(place, name)} for name in ("a1", "a2")]
    return {"adapters": entries, "output": {"store": {"svd": {"energy": 0.7}}}}


@pytest.mark.slow
@pytest.mark.parametrize("source, to", [("hub", "s3"), ("s3", "hub")])
@pytest.mark.parametrize("make", [regmean, at_an_energy])
def test_the_same_merge_from_and_to_everywhere(measured: Places, make: Any, source: str, to: str) -> None:
    here = measured.merge(make(measured, "disk"), measured.fresh("disk"))
    assert here.code == 0, here.err
    out = measured.fresh(to)
    done = measured.merge(make(measured, source), out)
    assert done.code == 0, done.err
    assert done.document["content_digest"] == here.document["content_digest"]
    assert done.document["bytes_read"] <= here.document["bytes_read"]  # what a unit reads twice is fetched once
    verified = measured.run("verify", out, "--replay", "2", "--json")
    assert verified.code == 0, verified.err
    assert measured.merge(make(measured, source), out).document["already_done"]
