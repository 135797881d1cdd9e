"""compare and tune: sources, bases and items from everywhere, with the figures of a disk."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.merger.evaluation.asked import base, loaded, lora, taught, write
from tests.remote.places import BUCKET, Places


@pytest.fixture(scope="module")
def asked(places: Places) -> Places:
    """A small language model, an adapter of it, and items, everywhere."""
    base(places.folder / "tiny")
    lora(places.folder / "tiny-lora", places.folder / "tiny", 1)
    for name in ("tiny", "tiny-lora"):
        places.upload(name)
    rows = [{"text": row["text"]} for row in taught(loaded(places.folder / "tiny"), 6)]
    items = write(places.folder / "items.jsonl", rows)
    places.s3.client().put_object(Bucket=BUCKET, Key="data/items.jsonl", Body=items.read_bytes())
    return places


def document(places: Places, *arguments: object) -> dict[str, Any]:
    done = places.run(*arguments, "--json")
    assert done.code == 0, done.err
    found: dict[str, Any] = json.loads(done.out)
    return found


@pytest.mark.parametrize("place", [pytest.param("hub", marks=pytest.mark.slow), "s3"])
def test_changes_are_those_of_a_disk(places: Places, place: str) -> None:
    found, local = (
        document(places, "compare", places.source(p, "a1"), places.source(p, "a2")) for p in (place, "disk")
    )
    assert found["gram_by_tensor"] == local["gram_by_tensor"]
    models = [
        document(places, "compare", *(places.source(p, n) for n in ("m1", "m2")), "--base", places.source(p, "base"))
        for p in (place, "disk")
    ]
    assert models[0]["gram_by_tensor"] == models[1]["gram_by_tensor"]
    assert models[0]["cosine"] == models[1]["cosine"]


@pytest.mark.parametrize("place", [pytest.param("hub", marks=pytest.mark.slow), "s3"])
def test_answers_are_those_of_a_disk(asked: Places, place: str) -> None:
    scores = []
    for p, data in ((place, f"s3://{BUCKET}/data/items.jsonl"), ("disk", asked.folder / "items.jsonl")):
        names = [asked.source(p, "tiny"), asked.source(p, "tiny-lora")]
        scores.append(document(asked, "compare", *names, "--base", names[0], "--data", data)["outputs"])
    for here, there in zip(*scores, strict=True):
        assert {**here, "output": ""} == {**there, "output": ""}
    manifest = asked.folder / "tune.yaml"
    manifest.write_text(json.dumps({
        "merge_method": "task_arithmetic", "base_model": asked.source(place, "tiny"),
        "adapters": [{"adapter": asked.source(place, "tiny-lora")}],
        "output": {"kind": "adapter", "path": asked.fresh(place)},
    }))  # fmt: skip
    over = ("--over", "parameters.lambda=[0.0, 1.0]")
    found = document(asked, "tune", manifest, "--data", asked.folder / "items.jsonl", *over)
    assert [trial["nll"] for trial in found["trials"]] == [
        pytest.approx(scores[0][i]["nll"], abs=1e-6) for i in (1, 0, 1)
    ]
