"""The same merge, wherever its sources lie and wherever it goes: the same bytes, and none fetched twice."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.counterparts.faults import FaultProxy
from tests.remote.places import BUCKET, PLACES, Places, adapters, ties

WRITTEN: dict[str, Callable[[Places, str], dict[str, Any]]] = {
    "ties": ties,
    "fold": lambda p, place: adapters(p, place, "model"),
    "concat": adapters,
}


@pytest.fixture(scope="session")
def digests(places: Places) -> dict[str, str]:
    """What each merge is, from disk to disk."""
    return {
        case: places.merge(make(places, "disk"), places.fresh("disk")).document["content_digest"]
        for case, make in WRITTEN.items()
    }


@pytest.mark.parametrize("to", PLACES)
@pytest.mark.parametrize("source", PLACES)
def test_the_same_merge_from_and_to_everywhere(places: Places, digests: dict[str, str], source: str, to: str) -> None:
    out = places.fresh(to)
    done = places.merge(ties(places, source), out)
    assert done.code == 0, done.err
    assert done.document["content_digest"] == digests["ties"]
    verified = places.run("verify", out, "--json")
    assert verified.code == 0, verified.err
    assert places.merge(ties(places, source), out).document["already_done"]
    if to == "s3":
        prefix = out.removeprefix(f"s3://{BUCKET}/")
        assert places.s3.uploads(BUCKET, prefix) == ()
        assert not [key for key in places.s3.keys(BUCKET, prefix) if "/.raymerge/" in key]


@pytest.mark.parametrize(
    "source, case",
    [
        ("hub", "concat"),
        ("s3", "fold"),
        pytest.param("hub", "fold", marks=pytest.mark.slow),
        pytest.param("s3", "concat", marks=pytest.mark.slow),
    ],
)
def test_adapters_from_everywhere(places: Places, digests: dict[str, str], source: str, case: str) -> None:
    done = places.merge(WRITTEN[case](places, source), places.fresh("s3" if source == "hub" else "hub"))
    assert done.code == 0, done.err
    assert done.document["content_digest"] == digests[case]


def tensor_bytes(places: Places, log: list[Any], names: tuple[str, ...]) -> int:
    """Bytes of the weight files that went out after their headers."""
    return sum(r.bytes_sent for r in log if r.method == "GET" and any(n in r.path for n in names))


def test_each_byte_of_a_repository_is_fetched_once(places: Places) -> None:
    out = places.fresh("disk")
    manifest = ties(places, "hub")
    places.hub.clear_log()
    done = places.merge(manifest, out, "--workers", 2)
    assert done.code == 0, done.err
    log = places.hub.log()
    fetched = sum(r.bytes_sent for r in log if r.origin == "cdn" and r.method == "GET")
    report = json.loads(places.run("report", out, "--json").out)
    planned = report["report"]["bytes_read"]
    assert planned <= fetched <= 1.05 * planned
    # one plan's worth although ties reads its input three times: what a unit reads is held in memory between rounds
    sizes = sum((places.folder / n / "model.safetensors").stat().st_size for n in ("base", "m1", "m2"))
    assert fetched <= 1.05 * sizes
    heads = [r.path for r in log if r.method == "HEAD" and r.path.endswith("model.safetensors")]
    assert len(heads) == len(set(heads)) == 3
    assert not [r for r in log if r.origin == "cdn" and r.authorization]


def test_each_byte_of_the_bucket_is_fetched_once(places: Places) -> None:
    with FaultProxy.start(places.s3.endpoint) as proxy:
        out = places.fresh("disk")
        done = places.merge(ties(places, "s3"), out, "--workers", 2, settings={"AWS_ENDPOINT_URL": proxy.endpoint})
        assert done.code == 0, done.err
        asked = [e for e in proxy.log() if e.method == "GET" and e.path.endswith("model.safetensors")]
    headers = [e for e in asked if (e.range or "").startswith("bytes=0-")]
    fetched = sum(e.sent_bytes for e in asked) - sum(e.sent_bytes for e in headers)
    planned = json.loads(places.run("report", out, "--json").out)["report"]["bytes_read"]
    # The first bytes of a file come with its header; what of them is tensors is not fetched again.
    assert len(headers) == 3
    assert planned - sum(e.sent_bytes for e in headers) <= fetched <= 1.05 * planned
    repeated = [e.range for e in asked]
    assert len(repeated) == len({(e.path, e.range) for e in asked})
