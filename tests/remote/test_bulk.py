"""Bulks from a bucket into a bucket: a sweep fetched once, two nights, a stop through the output."""

from __future__ import annotations

import json
import signal
import time
import uuid
from pathlib import Path
from typing import Any

import pytest

from tests.conformance.folders import Outcome, adapter, ended
from tests.remote.places import BUCKET, Places, ties


def bulk(places: Places, document: dict[str, Any], *options: object, command: str = "bulk") -> Outcome:
    return places.run(command, written(places, document), "--json", *options, timeout=240)


def written(places: Places, document: dict[str, Any]) -> Path:
    path = places.folder / f"{uuid.uuid4().hex[:12]}.yaml"
    path.write_text(json.dumps(document))
    return path


def sweep(places: Places, out: str) -> dict[str, Any]:
    return {
        "merges": [{"name": "ties", **ties(places, "s3")}],
        "defaults": {"output": {"path": out + "/{parameters.density}-{parameters.lambda}", "exists": "version"}},
        "matrix": {"parameters.density": [0.2, 0.5], "parameters.lambda": [0.5, 1.0]},
    }


@pytest.mark.slow
def test_a_sweep_of_a_bucket_is_fetched_once_and_each_variant_is_what_it_is_alone(places: Places) -> None:
    out = places.fresh("s3")
    alone = places.merge(ties(places, "s3", density=0.5), places.fresh("s3"))
    made = bulk(places, sweep(places, out), "--on", "here")
    assert made.code == 0, made.err
    assert made.document["states"] == {"done": 4}
    assert made.document["bytes_read"] == alone.document["bytes_read"]
    digests = {m["name"]: m["report"]["content_digest"] for m in made.document["merges"]}
    assert digests["ties-0.5-1.0"] == alone.document["content_digest"]
    prefix = out.removeprefix(f"s3://{BUCKET}/")
    assert places.s3.uploads(BUCKET, prefix) == ()
    keys = places.s3.keys(BUCKET, prefix)
    assert not [key for key in keys if "/.raymerge/" in key]
    assert sum(key.endswith("/latest.json") for key in keys) == 4
    version = made.document["merges"][0]["path"]
    assert places.run("verify", version, "--replay", "2", "--json").code == 0
    assert bulk(places, sweep(places, out), "--on", "here").document["states"] == {"already done": 4}


def test_two_nights_with_one_input_moved_in_between(places: Places) -> None:
    client = places.s3.client()
    prefix = f"nightly-{uuid.uuid4().hex[:8]}"

    def put(name: str, seed: int) -> None:
        folder = adapter(places.folder / f"{prefix}-{name}-{seed}", seed)
        for file in folder.iterdir():
            client.put_object(Bucket=BUCKET, Key=f"{prefix}/in/{name}/{file.name}", Body=file.read_bytes())

    for seed, name in enumerate(("chat", "sql", "json")):
        put(name, seed)
    common = adapter(places.folder / f"{prefix}-common", 9)
    document = {
        "each": f"s3://{BUCKET}/{prefix}/in",
        "defaults": {
            "adapters": [{"adapter": "{each}"}, {"adapter": str(common), "parameters": {"weight": 0.5}}],
            "output": {"path": f"s3://{BUCKET}/{prefix}/out/" + "{name}", "exists": "version"},
        },
        "schedule": {"cron": "0 3 * * *", "timezone": "Europe/Berlin"},
    }
    client.put_object(Bucket=BUCKET, Key=f"{prefix}/bulk.yaml", Body=json.dumps(document).encode())
    manifest = f"s3://{BUCKET}/{prefix}/bulk.yaml"

    def night() -> dict[str, str]:
        made = places.run("bulk", manifest, "--json", "--on", "here")
        assert made.code == 0, made.err
        return {merge["name"]: merge["state"] for merge in made.document["merges"]}

    assert night() == {"chat": "done", "json": "done", "sql": "done"}
    assert night() == {"chat": "already done", "json": "already done", "sql": "already done"}
    put("sql", 77)
    put("new", 5)
    assert night() == {"chat": "already done", "json": "already done", "new": "done", "sql": "done"}
    versions = {key.split("/")[3] for key in places.s3.keys(BUCKET, f"{prefix}/out/sql") if key.count("/") > 3}
    latest = json.loads(client.get_object(Bucket=BUCKET, Key=f"{prefix}/out/sql/latest.json")["Body"].read())
    assert len(versions) == 2
    assert latest["fingerprint"] in versions


@pytest.mark.slow
def test_a_bulk_that_is_killed_goes_on_where_it_was(places: Places) -> None:
    out = places.fresh("s3")
    path = written(places, sweep(places, out))
    process = places.start("bulk", path, "--on", "here", "--json")
    prefix = out.removeprefix(f"s3://{BUCKET}/")
    deadline = time.monotonic() + 120
    while not any("/.raymerge/journal/" in key for key in places.s3.keys(BUCKET, prefix)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    ended(process)
    again = places.run("bulk", path, "--on", "here", "--json", timeout=240)
    assert again.code == 0, again.err
    alone = places.merge(ties(places, "s3", density=0.2), places.fresh("s3"))
    assert again.document["merges"][1]["report"]["content_digest"] == alone.document["content_digest"]
    assert places.s3.uploads(BUCKET, prefix) == ()
