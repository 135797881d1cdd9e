"""What is killed, contended, overwritten or revoked in the middle: the same command ends it, or a clear error does."""

from __future__ import annotations

import json
import random
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.conformance.folders import ended, model
from tests.counterparts.faults import Fault, FaultProxy
from tests.counterparts.hub import Token
from tests.remote.places import BUCKET, Places, ties

HASTE = {
    "RAYMERGE_HTTP_ATTEMPTS": "3", "RAYMERGE_HTTP_FIRST_WAIT_SECONDS": "0.02", "RAYMERGE_HTTP_STALL_SECONDS": "3",
    "RAYMERGE_HTTP_LONGEST_WAIT_SECONDS": "0.1",
}  # fmt: skip
LONG = 300
"""Seconds that a run of a moment may take where the machine is busy with others."""


@pytest.fixture
def s3_proxy(places: Places) -> Iterator[FaultProxy]:
    with FaultProxy.start(places.s3.endpoint) as proxy:
        yield proxy


def keys(places: Places, out: str) -> list[str]:
    """What of an output in the bucket anyone may take for a result."""
    prefix = out.removeprefix(f"s3://{BUCKET}/")
    return [key for key in places.s3.keys(BUCKET, prefix) if "/.raymerge/" not in key]


def state(places: Places, out: str) -> list[str]:
    prefix = out.removeprefix(f"s3://{BUCKET}/")
    return [key for key in places.s3.keys(BUCKET, prefix) if "/.raymerge/" in key]


@pytest.fixture(scope="module")
def digest(places: Places) -> str:
    done = places.merge(ties(places, "disk"), places.fresh("disk"))
    return str(done.document["content_digest"])


def written(places: Places, manifest: dict[str, Any]) -> Path:
    path = places.folder / f"{random.randrange(1 << 48):x}.yaml"
    path.write_text(json.dumps(manifest))
    return path


def kill_and_finish(
    places: Places, digest: str, moment: Callable[[], object], settings: Mapping[str, str] | None = None
) -> Any:
    """Kill the command at a moment, look, and give it again. Returns the document of its end."""
    out = places.fresh("s3")
    path = written(places, ties(places, "s3"))
    process = places.start("merge", path, out, "--json", settings=settings)
    moment()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    published = [key.rpartition("/")[2] for key in keys(places, out)]
    if "raymerge.json" in published:  # it had come to its end, but perhaps not to its last step
        assert "model.safetensors" in published
    done = places.run("merge", path, out, "--json", timeout=LONG)
    assert done.code == 0, done.err
    assert done.document["content_digest"] == digest
    assert state(places, out) == []
    assert not [u for u in places.s3.uploads(BUCKET) if u.key.startswith(out.removeprefix(f"s3://{BUCKET}/"))]
    return done.document


@pytest.mark.timeout(2 * LONG)
@pytest.mark.parametrize("reads", [1, 5, 8])
def test_a_driver_that_is_killed_is_resumed_in_the_bucket(
    places: Places, s3_proxy: FaultProxy, digest: str, reads: int
) -> None:
    """It hangs in a read of tensors when it is killed: whatever the load, it is at the same place."""
    s3_proxy.add(Fault("stall", path="model.safetensors", range_only=True, after=3 + reads, times=None, seconds=LONG))
    settings = {"AWS_ENDPOINT_URL": s3_proxy.endpoint, "RAYMERGE_HTTP_STALL_SECONDS": str(LONG)}
    kill_and_finish(places, digest, lambda: s3_proxy.wait_for(1, fault="stall", seconds=LONG), settings)


def test_a_driver_that_is_killed_while_it_tries_the_bucket_leaves_nothing(
    places: Places, s3_proxy: FaultProxy, digest: str
) -> None:
    """Neither the object that it tried conditions on, nor the upload under that object's key."""
    s3_proxy.add(Fault("stall", method="POST", path="probe", query="uploadId", seconds=LONG))
    settings = {"AWS_ENDPOINT_URL": s3_proxy.endpoint, "RAYMERGE_HTTP_STALL_SECONDS": str(LONG)}
    kill_and_finish(places, digest, lambda: s3_proxy.wait_for(1, fault="stall", seconds=LONG), settings)


@pytest.mark.slow
@pytest.mark.timeout(2 * LONG)
@pytest.mark.parametrize("seed", range(30))
def test_a_driver_that_is_killed_at_any_moment(places: Places, digest: str, seed: int) -> None:
    moment = random.Random(seed).uniform(0.5, 3.0)
    kill_and_finish(places, digest, lambda: time.sleep(moment))


@pytest.mark.parametrize("to", ["s3", "disk", "hub"])
def test_two_runs_race_for_one_output(places: Places, to: str) -> None:
    """Different merges: one wins, the other says so."""
    out = places.fresh(to)
    paths = [written(places, ties(places, "disk", density=density)) for density in (0.3, 0.6)]
    processes = [places.start("merge", path, out, "--json") for path in paths]
    outcomes = [ended(process) for process in processes]
    codes = sorted(outcome.code for outcome in outcomes)
    assert codes[0] == 0, [o.err for o in outcomes]
    assert codes[1] in (3, 75), [o.err for o in outcomes]
    assert places.run("verify", out).code == 0
    winner = next(o for o in outcomes if o.code == 0)
    assert json.loads(places.run("report", out, "--json").out)["content_digest"] == winner.document["content_digest"]
    if to == "s3":
        assert state(places, out) == []


def own_model(places: Places, name: str) -> None:
    """A source of this test's own, to be changed."""
    model(places.folder / name, 5, rows=6000, cols=1024)
    places.upload(name)


def test_an_object_that_is_overwritten_midway(places: Places, s3_proxy: FaultProxy) -> None:
    own_model(places, "fickle")
    manifest = ties(places, "s3")
    manifest["models"][1]["model"] = places.source("s3", "fickle")
    out = places.fresh("s3")
    s3_proxy.add(Fault("stall", path="fickle/model.safetensors", range_only=True, after=2, times=1, seconds=20))
    process = places.start(
        "merge",
        written(places, manifest),
        out,
        settings={"AWS_ENDPOINT_URL": s3_proxy.endpoint, "RAYMERGE_HTTP_STALL_SECONDS": "15"},
    )
    s3_proxy.wait_for(1, fault="stall")
    other = (places.folder / "m1" / "model.safetensors").read_bytes()
    places.s3.client().put_object(Bucket=BUCKET, Key="sources/fickle/model.safetensors", Body=other)
    s3_proxy.clear()
    outcome = ended(process)
    assert outcome.code == 1, outcome.err
    assert "source-changed" in outcome.err
    assert keys(places, out) == []


@pytest.mark.parametrize("what", ["token", "signature"])
def test_access_to_a_repository_that_ends_midway(places: Places, s3_proxy: FaultProxy, what: str) -> None:
    """A signed address that runs out is made anew; a token that is revoked ends the merge."""
    places.hub.create(
        f"acme/private-{what}",
        {p.name: p.read_bytes() for p in (places.folder / "m2").iterdir()},
        private=True,
    )
    manifest = ties(places, "hub")
    manifest["models"][1]["model"] = f"acme/private-{what}"
    out = places.fresh("disk")
    with FaultProxy.start(places.hub.cdn_endpoint) as cdn:
        places.hub.set(cdn_endpoint=cdn.endpoint)
        try:
            token = f"hf_{random.Random(what).randbytes(17).hex()}"

            places.hub.add_token(token, Token(user="leaver", writes=False, member=True))
            cdn.add(Fault("stall", path=f"private-{what}", range_only=True, after=1, times=1, seconds=20))
            process = places.start("merge", written(places, manifest), out, settings={"HF_TOKEN": token, **HASTE})
            cdn.wait_for(1, fault="stall")
            if what == "token":
                places.hub.set(revoke_token=token)
            places.hub.expire_signed_urls()
            cdn.clear()
            outcome = ended(process)
        finally:
            places.hub.set(cdn_endpoint=None)
    if what == "signature":
        assert outcome.code == 0, outcome.err
        return
    assert outcome.code == 1, outcome.err
    assert "forbidden" in outcome.err or "no-such-source" in outcome.err
    assert token not in outcome.err
    assert not (Path(out) / "raymerge.json").exists()
    assert {p.name for p in Path(out).iterdir()} == {".raymerge"}


@pytest.mark.parametrize(
    "fault,code",
    [
        (Fault("status", code=503, error="SlowDown", range_only=True, times=None), 75),
        (Fault("cut", at=1000, range_only=True, times=None), 75),
        (Fault("status", code=403, error="AccessDenied", range_only=True, after=6, times=None), 1),
        (Fault("total", range_only=True, after=6, times=None), 1),
        (Fault("status", method="PUT", path="pieces|model.safetensors", code=503, error="SlowDown", times=None), 75),
    ],
    ids=lambda value: value.kind if isinstance(value, Fault) else str(value),
)
def test_what_never_works_ends_with_the_right_code_and_nothing_published(
    places: Places, s3_proxy: FaultProxy, digest: str, fault: Fault, code: int
) -> None:
    out = places.fresh("s3")
    path = written(places, ties(places, "s3"))
    s3_proxy.add(fault)
    outcome = places.run("merge", path, out, settings={"AWS_ENDPOINT_URL": s3_proxy.endpoint, **HASTE})
    assert outcome.code == code, outcome.err
    assert keys(places, out) == []
    s3_proxy.clear()
    done = places.run("merge", path, out, "--json", settings={"AWS_ENDPOINT_URL": s3_proxy.endpoint})
    assert done.code == 0, done.err
    assert done.document["content_digest"] == digest


SECRETS = ("X-Amz-Signature", "X-Amz-Credential", "Bearer ")


def test_no_secret_is_left_anywhere(places: Places, s3_proxy: FaultProxy, tmp_path: Path) -> None:
    """Three runs, one of which fails on refused requests: what they leave and say holds no token and no signature."""
    run_dir = tmp_path / "run"
    said = []
    hub_out, s3_out, disk_out = places.fresh("hub"), places.fresh("s3"), places.fresh("disk")
    said.append(places.merge(ties(places, "s3"), hub_out, "--run-dir", run_dir, "--debug"))
    said.append(places.merge(ties(places, "hub"), s3_out, "--debug"))
    s3_proxy.add(Fault("status", code=403, error="AccessDenied", range_only=True, after=6, times=None))
    path = written(places, ties(places, "s3"))
    said.append(
        places.run("merge", path, disk_out, "--debug", settings={"AWS_ENDPOINT_URL": s3_proxy.endpoint, **HASTE})
    )
    assert [o.code for o in said] == [0, 0, 1], [o.err for o in said]
    environment = places.environment()
    secrets = [environment["HF_TOKEN"], environment["AWS_SECRET_ACCESS_KEY"], *SECRETS]
    texts = {f"run {i}": (o.out + o.err).encode() for i, o in enumerate(said)}
    for root in (Path(disk_out), run_dir):
        texts |= {str(p): p.read_bytes() for p in root.rglob("*") if p.is_file()}
    client = places.s3.client()
    for key in places.s3.keys(BUCKET, "out/"):
        texts[key] = client.get_object(Bucket=BUCKET, Key=key)["Body"].read()
    repository = hub_out.removeprefix("hf://")
    texts |= {name: places.hub.read(repository, name) for name in places.hub.files(repository)}
    assert len(texts) > 10
    found = [(place, secret[:6]) for place, text in texts.items() for secret in secrets if secret.encode() in text]
    assert found == []
