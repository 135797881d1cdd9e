"""Intermediates of several documents beside remote outputs, and bare files in buckets and repositories."""

from __future__ import annotations

from typing import Any

import pytest
from safetensors.torch import load_file

from tests.remote.places import BUCKET, PLACES, Places, ties

LITTLE = "190MB"
"""Enough for one worker at work on a bucket, and no room for both intermediates."""


def several(places: Places, source: str) -> dict[str, Any]:
    """Two trims of both models in float32 (50 MB each), and their mean."""
    trims = {f"mixed-{n}": {**ties(places, source, density=n / 10), "dtype": "float32"} for n in (3, 6)}
    models = [{"model": name, "parameters": {"weight": 0.5}} for name in trims]
    return {"documents": trims, "merge_method": "linear", "dtype": "bfloat16", "models": models}


@pytest.fixture(scope="module")
def digest(places: Places) -> str:
    done = places.merge(several(places, "disk"), places.fresh("disk"), "--on", "here")
    assert done.code == 0, done.err
    return str(done.document["content_digest"])


@pytest.mark.parametrize("to", PLACES)
def test_intermediates_lie_beside_the_output_and_go(places: Places, digest: str, to: str) -> None:
    out = places.fresh(to)
    done = places.merge(several(places, "s3"), out, "--on", "here", "--memory", LITTLE, "--workers", 1)
    assert done.code == 0, done.err
    assert done.document["content_digest"] == digest
    if to == "s3":
        prefix = out.removeprefix(f"s3://{BUCKET}/")
        assert not [key for key in places.s3.keys(BUCKET, prefix) if "/.raymerge/" in key]
        assert not [upload for upload in places.s3.uploads(BUCKET) if upload.key.startswith(prefix)]
    again = places.merge(several(places, "s3"), out, "--on", "here", "--memory", LITTLE, "--workers", 1)
    assert again.document["already_done"]


@pytest.mark.parametrize("place", ["hub", "s3"])
def test_a_bare_file_is_named_by_itself(places: Places, place: str) -> None:
    models = []
    for name in ("m1", "m2"):
        file = places.source(place, name) + "/model.safetensors"
        models.append({"model": f"hf://{file}" if place == "hub" else file, "parameters": {"weight": 0.5}})
    out = places.fresh("disk")
    done = places.merge({"merge_method": "linear", "models": models}, out, "--on", "here")
    assert done.code == 0, done.err
    assert done.document["kind"] == "tensors"
    assert load_file(f"{out}/model.safetensors").keys() == load_file(places.folder / "m1" / "model.safetensors").keys()
