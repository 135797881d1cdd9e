"""Every fault of a network, through whole merges: right bytes or the right exit code, after so many attempts.

A case is a site (which request of a merge) and a fault. The fault first stays: the merge ends as the contract says,
with nothing that could be taken for a result, after the attempts of the budget. Then the same command meets the fault
once, and then, if once is too often, no more: it ends with the bytes of the merge from disk to disk.

What no client can see on a plain connection is below, under its own name: no range has a digest of its own.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import time
import types
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Literal

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.utils import _http
from torch import Tensor

from jobs.cli import main
from merger.journal import Lease
from merger.storage.s3 import S3Store
from tests.conformance.folders import Outcome, model, signals_kept
from tests.conformance.remote import enter_hub, enter_s3
from tests.counterparts.faults import Exchange, Fault, FaultProxy
from tests.counterparts.hub import HubServer
from tests.counterparts.s3 import S3Server
from tests.counterparts.tcp import Plan, TcpProxy
from tests.remote.places import BUCKET, Places

ATTEMPTS: Final = 3
CLIENT_ATTEMPTS: Final = 6
"""Of the Hub's client itself, within each of ours, where it repeats what it asks."""
PATIENCE: Final = {"ATTEMPTS": f"{ATTEMPTS}", "FIRST_WAIT_SECONDS": "0.01", "LONGEST_WAIT_SECONDS": "0.02"}
HASTE: Final = {"STALL_SECONDS": "0.5", "CONNECT_SECONDS": "0.5"}
"""For silence alone: a busy machine may be that slow without it."""
CONTENT: Final = ("config.json", "model.safetensors", "tokenizer.json")
RESULT: Final = "raymerge.json"
ROWS: Final = {"small": 384, "large": 2700}
"""Of a tensor of 1024 columns. `small`: enough to be asked for by itself, beyond what comes with the header; `large`:
enough to be a part by itself."""
LARGE_BYTES: Final = ROWS["large"] * 1024 * 2


# ---- the ground ------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Ground:
    """A bucket and a Hub behind proxies, and this process as one that knows no other way to them."""

    places: Places
    s3: FaultProxy
    hub: FaultProxy
    """The Hub's first origin."""
    cdn: FaultProxy
    """Its second."""
    content: dict[str, dict[str, str]] = field(default_factory=dict)
    """Sources → file → SHA-256, of the merge from disk to disk."""

    def proxy(self, name: str) -> FaultProxy:
        found: FaultProxy = getattr(self, name)
        return found

    def quiet(self) -> None:
        for proxy in (self.s3, self.hub, self.cdn):
            proxy.clear()
            proxy.forget()

    def written(self, place: str, kind: str, *, weight: float = 1.0) -> Path:
        """A manifest: the mean of two models, which are `small` or `large`."""
        entries = [
            {"model": self.places.source(place, f"{kind}{i}"), "parameters": {"weight": w}}
            for i, w in ((1, weight), (2, 1.0))
        ]
        path = self.places.folder / f"{uuid.uuid4().hex}.yaml"
        path.write_text(json.dumps({"merge_method": "linear", "models": entries}))
        return path

    def files(self, out: str) -> dict[str, bytes]:
        """What lies at an output for everyone to see; read past the proxies."""
        if out.startswith("s3://"):
            prefix = out.removeprefix(f"s3://{BUCKET}/") + "/"
            client = self.places.s3.client()
            found = {
                key.removeprefix(prefix): client.get_object(Bucket=BUCKET, Key=key)["Body"].read()
                for key in self.places.s3.keys(BUCKET, prefix)
            }
        elif out.startswith("hf://"):
            repo = out.removeprefix("hf://")
            try:
                names = set(self.places.hub.files(repo)) - {".gitattributes"}
            except RuntimeError:  # there is no such repository yet
                names = set()
            found = {name: self.places.hub.read(repo, name) for name in names}
        else:
            found = {str(p.relative_to(out)): p.read_bytes() for p in Path(out).rglob("*") if p.is_file()}
        return {name: data for name, data in found.items() if not name.startswith(".raymerge/")}

    def apart(self, *arguments: object) -> Outcome:
        """The command in a process of its own, in the environment of this one."""
        ours = {name: value for name, value in os.environ.items() if name.startswith(("AWS_", "RAYMERGE_"))}
        return self.places.run(*arguments, "--json", "--on", "here", settings=ours)

    def digests(self, out: str) -> dict[str, str]:
        found = self.files(out)
        return {name: hashlib.sha256(found[name]).hexdigest() for name in CONTENT}


def tensors(seed: int, rows: int) -> dict[str, Tensor]:
    """Two tensors of `rows` rows, and small ones before and after them, which share a part with their neighbours."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "model.embed_tokens.weight": (64, 1024),
        **{f"model.layers.{i}.self_attn.q_proj.weight": (rows, 1024) for i in range(2)},
        "model.norm.weight": (1024,),
    }
    return {name: torch.randn(shape, generator=generator).to(torch.bfloat16) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def servers(s3_server: S3Server, hub_server: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    folder = tmp_path_factory.mktemp("faults")
    with (
        FaultProxy.start(s3_server.endpoint) as s3,
        FaultProxy.start(hub_server.endpoint) as hub,
        FaultProxy.start(hub_server.cdn_endpoint) as cdn,
        pytest.MonkeyPatch.context() as patch,
    ):
        enter_s3(patch, s3_server, s3.endpoint)
        enter_hub(patch, hub_server, folder / "cache")
        patch.setattr(constants, "ENDPOINT", hub.endpoint)
        address = f"{hub.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address)
        patch.setattr(_http, "time", types.SimpleNamespace(sleep=lambda _: None))  # the client's own waits: 23 s
        patch.setenv("XDG_STATE_HOME", str(folder / "state"))
        for name, value in PATIENCE.items():
            patch.setenv(f"RAYMERGE_HTTP_{name}", value)
        hub_server.set(cdn_endpoint=cdn.endpoint, multipart_from_bytes=1 << 20, part_bytes=1 << 20)
        made = Ground(Places(folder, s3_server, hub_server), s3, hub, cdn)
        for kind, rows in ROWS.items():
            for seed in (1, 2):
                model(folder / f"{kind}{seed}", seed, tensors=tensors(seed, rows))
                made.places.upload(f"{kind}{seed}")
        yield made
        hub_server.set(cdn_endpoint=None, multipart_from_bytes=64 << 20, part_bytes=16 << 20)


@pytest.fixture
def ground(servers: Ground) -> Iterator[Ground]:
    servers.quiet()
    yield servers
    servers.quiet()


Merge = Callable[..., Outcome]


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str]) -> Merge:
    """The command, in this process: a Python takes longer to start than most of these merges."""

    def run(*arguments: object) -> Outcome:
        capfd.readouterr()
        given = [str(a) for a in arguments]
        if given[0] == "merge":
            given += ["--json", "--on", "here", "--workers", "1"]
        with signals_kept():
            code = main(given)
        return Outcome(code, *capfd.readouterr())

    return run


@pytest.fixture
def right(ground: Ground, command: Merge) -> Callable[[str, str], bool]:
    """Whether an output holds the bytes of the merge from disk to disk."""

    def holds(out: str, kind: str) -> bool:
        if kind not in ground.content:
            plain = ground.places.fresh("disk")
            done = command("merge", ground.written("disk", kind), plain)
            assert done.code == 0, done.err
            ground.content[kind] = ground.digests(plain)
        return ground.digests(out) == ground.content[kind]

    return holds


# ---- faults, and what becomes of a merge that meets them -------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """How a merge ends, and how often the request that meets the fault is made."""

    always: int
    """The exit code when the fault stays."""
    once: int = 0
    asked: int = ATTEMPTS
    """Requests that meet it when it stays; 0 where they are not counted."""
    repeated: bool = True
    """Whether who met it once asks again."""
    resumed: bool = False
    """Whether the second request asks only for what had not come."""
    said: str = ""
    """The error's code when it stays."""


PASSES: Final = End(always=75, said="source-unreachable")
RESUMES: Final = End(always=75, resumed=True, said="source-unreachable")
RENEWED: Final = End(always=1, asked=2, said="forbidden")
"""Asked once more with a fresh signature."""
CHANGED: Final = End(always=1, once=1, asked=1, repeated=False, said="source-changed")
UNSEEN: Final = End(always=0, asked=0, repeated=False)
"""Right bytes all the same, and nobody asks again."""
FAILS: Final = End(always=1, once=1, asked=1, repeated=False)
REFUSED: Final = End(always=2, once=2, asked=1, repeated=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """A request of a merge."""

    proxy: Literal["s3", "hub", "cdn"]
    which: Mapping[str, Any]
    """Of Fault: the requests meant."""
    source: str = "disk"
    to: str = "disk"
    kind: Literal["small", "large"] = "small"
    leaves: Literal["nothing", "files", "all"] = "nothing"
    """What the output may show when the fault stays: files but no raymerge.json; or all, if the rest is tidying."""
    factor: int = 1
    """Requests that one attempt of ours makes, with a client that repeats by itself."""
    up_to_factor: int = 1
    """The same where it depends: aiohttp repeats what broke on a connection that it had used before."""
    often: bool = False
    """It is made several times in a merge, all with one name."""
    lasts: bool = False
    """It may have worked although it failed: then the next run does not make it again."""
    elsewhere: bool = False
    """Its lease may stay, and is held as long as its process lives: so that must be another than this one."""


def sources(name: str) -> dict[str, Any]:
    return {"method": "GET", "path": f"{name}1/.*model.safetensors|{name}1/model.safetensors", "range_only": True}


SIGNATURE: Final = re.compile("X-Amz-|Signature=|Expires=")
UPLOAD: Final = re.compile("/[0-9a-f]{32}(?=/|$)")
"""What the Hub calls the next try at an upload in parts."""


def key(exchange: Exchange) -> tuple[str, ...]:
    """What two attempts at one request have in common."""
    query = "&".join(word for word in exchange.query.split("&") if SIGNATURE.match(word) is None)
    path = UPLOAD.sub("", exchange.path)
    return exchange.method, path, query, (exchange.range or "").rpartition("-")[2]


def first_byte(exchange: Exchange) -> int:
    """Of the range asked for."""
    assert exchange.range is not None
    return int(exchange.range.removeprefix("bytes=").partition("-")[0])


def strike(ground: Ground, site: Site, fault: Fault, *, times: int | None) -> None:
    ground.quiet()
    ground.proxy(site.proxy).add(Fault(**{**asdict(fault), **site.which, "times": times}))


def struck(ground: Ground, site: Site) -> dict[tuple[str, ...], list[Exchange]]:
    """The requests of which some met the fault, each with all its attempts."""
    found: dict[tuple[str, ...], list[Exchange]] = {}
    for exchange in ground.proxy(site.proxy).log():
        found.setdefault(key(exchange), []).append(exchange)
    return {name: tried for name, tried in found.items() if any(e.fault for e in tried)}


def check(
    ground: Ground, command: Merge, right: Callable[[str, str], bool], site: Site, fault: Fault, end: End
) -> None:
    """Meet a fault always, then once, then not at all."""
    out = ground.places.fresh(site.to)
    merge = ("merge", ground.written(site.source, site.kind), out)
    strike(ground, site, fault, times=None)
    outcome = ground.apart(*merge) if site.elsewhere else command(*merge)
    check_end(outcome, end.always, end.said)
    met = struck(ground, site)
    assert met, "the fault struck nothing"
    if end.asked:
        least, most = (site.factor, max(site.factor, site.up_to_factor)) if end.always == 75 else (1, 1)
        bitten = {name: sum(e.fault is not None for e in tried) for name, tried in met.items()}
        assert all(end.asked * least <= count <= end.asked * most for count in bitten.values()), bitten
    if outcome.code == 0:
        assert right(out, site.kind)
        return
    shown = set(ground.files(out))
    assert site.leaves != "nothing" or not shown
    assert site.leaves == "all" or RESULT not in shown
    if site.lasts:
        ground.quiet()
        assert command(*merge).code == 0
        assert right(out, site.kind)
        out = ground.places.fresh(site.to)
        merge = (*merge[:2], out)
    strike(ground, site, fault, times=1)
    outcome = command(*merge)
    check_end(outcome, end.once, end.said)
    check_once(ground, site, fault, end)
    if outcome.code:
        ground.quiet()
        outcome = command(*merge)
        assert outcome.code == 0, outcome.err
    assert right(out, site.kind)
    if site.to == "s3":
        prefix = out.removeprefix(f"s3://{BUCKET}/")
        assert not [name for name in ground.places.s3.keys(BUCKET, prefix) if "/.raymerge/" in name]
        assert not [u for u in ground.places.s3.uploads(BUCKET) if u.key.startswith(prefix)]


def check_end(outcome: Outcome, code: int, said: str) -> None:
    assert outcome.code == code, (outcome.code, outcome.err)
    assert "Traceback" not in outcome.err
    assert "error internal" not in outcome.err
    if code and said:
        assert outcome.document["problems"][0]["code"] == said


def check_once(ground: Ground, site: Site, fault: Fault, end: End) -> None:
    """One request met the fault; the next for the same thing is the last, and asks for no byte twice."""
    met = struck(ground, site)
    assert len(met) == 1
    (tried,) = met.values()
    bitten = next(i for i, e in enumerate(tried) if e.fault)
    assert sum(e.fault is not None for e in tried) == 1
    if not end.repeated:
        return
    first, second = tried[bitten : bitten + 2]
    assert second.fault is None
    if first.range is not None:
        skipped = min(fault.at or 0, first.sent_bytes) if end.resumed else 0
        assert first_byte(second) - first_byte(first) == skipped
        assert site.often or len(tried) == bitten + 2


# ---- reads -----------------------------------------------------------------------------------------------------------

FROM_S3: Final = Site(proxy="s3", which={**sources("small"), "after": 1}, source="s3")
FROM_HUB: Final = Site(
    proxy="cdn", which={"method": "GET", "path": "model.safetensors", "range_only": True, "after": 2}, source="hub"
)
"""The first range of each file is its header; those behind them are tensors. The path names a commit, no repository."""

READS: Final[Mapping[str, tuple[Fault, End]]] = {
    "500": (Fault("status", code=500, error="InternalError"), PASSES),
    "503": (Fault("status", code=503, error="SlowDown"), PASSES),
    "429 with Retry-After": (Fault("status", code=429, headers={"Retry-After": "1"}), PASSES),
    "403": (Fault("status", code=403, error="AccessDenied"), RENEWED),
    "400 expired": (Fault("status", code=400, error="ExpiredToken"), RENEWED),
    "404": (Fault("status", code=404), CHANGED),
    "412": (Fault("status", code=412), CHANGED),
    "416": (Fault("status", code=416), CHANGED),
    "cut": (Fault("cut", at=1000), RESUMES),
    "reset before": (Fault("reset"), PASSES),
    "reset after bytes": (Fault("reset", at=1000), RESUMES),
    "lost": (Fault("lost"), PASSES),
    "stall before": (Fault("stall"), PASSES),
    "stall after bytes": (Fault("stall", at=1000), RESUMES),
    "whole": (Fault("whole"), PASSES),
    "shifted, and says so": (Fault("shifted"), PASSES),
    "shifted, and says half": (Fault("shifted", claim="start"), PASSES),
    "short": (Fault("short"), PASSES),
    "unsized and cut": (Fault("unsized", at=1000), RESUMES),
    "unsized": (Fault("unsized"), UNSEEN),
    "total": (Fault("total"), CHANGED),
    "etag": (Fault("etag"), CHANGED),
    "gzip": (Fault("gzip"), PASSES),
    "redirect": (Fault("redirect"), RENEWED),  # where it leads, the signature is another host's
    "error200": (Fault("error200"), PASSES),
}
AT_THE_HUB: Final[Mapping[str, End]] = {
    "404": End(always=1, once=1, asked=1, repeated=False, said="no-such-file"),
    "etag": UNSEEN,  # the second origin has ETags of its own making
    "redirect": UNSEEN,
}
QUICK_READS: Final = {
    "503", "429 with Retry-After", "403", "404", "cut", "reset after bytes", "stall after bytes", "whole",
    "shifted, and says half", "unsized and cut", "total", "etag", "gzip",
}  # fmt: skip
QUICK_AT_THE_HUB: Final = {"503", "403", "404", "cut", "shifted, and says so", "total", "etag"}


def some_slow(names: Iterable[Any], quick: Collection[Any]) -> list[Any]:
    """Parameters: names, or tuples; those that are not `quick` are slow tests."""
    return [
        pytest.param(*(name if isinstance(name, tuple) else (name,)), marks=() if name in quick else pytest.mark.slow)
        for name in names
    ]


def with_haste(patch: pytest.MonkeyPatch, name: str) -> None:
    if "stall" not in name:
        return
    for setting, value in HASTE.items():
        patch.setenv(f"RAYMERGE_HTTP_{setting}", value)
    S3Store(BUCKET).prove()  # other settings, another connection: and the fault is not meant for its probe


@pytest.mark.parametrize("name", some_slow(READS, QUICK_READS))
def test_tensors_from_a_bucket(
    ground: Ground, command: Merge, right: Callable[[str, str], bool], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    with_haste(monkeypatch, name)
    started = time.monotonic()
    check(ground, command, right, FROM_S3, *READS[name])
    if "Retry-After" in name:
        assert time.monotonic() - started > ATTEMPTS * 0.95  # one wait fewer than attempts, and that of the second run


@pytest.mark.parametrize("name", some_slow(READS, QUICK_AT_THE_HUB))
def test_tensors_from_the_second_origin_of_the_hub(
    ground: Ground, command: Merge, right: Callable[[str, str], bool], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    with_haste(monkeypatch, name)
    fault, end = READS[name]
    check(ground, command, right, FROM_HUB, fault, AT_THE_HUB.get(name, end))
    if end is RENEWED and name != "redirect":
        # a fresh address is asked of the first origin: one for the file, and one when it was refused
        heads = [e.path for e in ground.hub.log() if e.method == "HEAD" and e.path.endswith("model.safetensors")]
        assert sorted(heads.count(path) for path in set(heads)) == [1, 2]


@pytest.mark.parametrize("site", [FROM_S3, FROM_HUB], ids=["s3", "hub"])
def test_attempts_that_bring_enough_bytes_are_not_charged(
    ground: Ground, command: Merge, right: Callable[[str, str], bool], site: Site
) -> None:
    """Some range ends more often than there are attempts, each time after more than STEP_BYTES."""
    at, times = 300_000, 17
    assert at * (times + 1) < LARGE_BYTES
    site = replace(site, kind="large", which={**site.which, "path": site.which["path"].replace("small", "large")})
    out = ground.places.fresh("disk")
    strike(ground, site, Fault("cut", at=at), times=times)
    assert command("merge", ground.written(site.source, site.kind), out).code == 0
    assert right(out, site.kind)
    met = struck(ground, site).values()
    assert sum(e.fault is not None for tried in met for e in tried) == times
    assert max(sum(e.fault is not None for e in tried) for tried in met) > ATTEMPTS
    for tried in met:
        starts = [first_byte(e) for e in tried]
        assert starts == [starts[0] + i * at for i in range(len(tried))]


PLANNING: Final[Mapping[str, tuple[Site, Fault, End]]] = {
    "a bucket's listing, 503": (
        Site(proxy="s3", which={"query": "list-type"}, source="s3"), Fault("status", code=503, error="SlowDown"),
        PASSES,
    ),
    "a bucket's listing, 403": (
        Site(proxy="s3", which={"query": "list-type"}, source="s3"), Fault("status", code=403, error="AccessDenied"),
        REFUSED,
    ),
    "an object's HEAD, 404": (
        Site(proxy="s3", which={"method": "HEAD", "path": "small2"}, source="s3"), Fault("status", code=404), REFUSED,
    ),
    "a header in a bucket, 403": (
        Site(proxy="s3", which=sources("small"), source="s3"), Fault("status", code=403, error="AccessDenied"),
        End(always=2, asked=2),
    ),
    "a header in a bucket, cut": (
        Site(proxy="s3", which=sources("small"), source="s3"), Fault("cut", at=3), RESUMES,
    ),
    "a header at the Hub, reset": (
        Site(proxy="cdn", which={"range_only": True}, source="hub"), Fault("reset", at=3), RESUMES,
    ),
    "a header at the Hub, 403": (
        Site(proxy="cdn", which={"range_only": True}, source="hub"), Fault("status", code=403), End(always=2, asked=2),
    ),
    "a commit's name, 503": (
        Site(proxy="hub", which={"path": "/api/models/[^/]*/small1$"}, source="hub"), Fault("status", code=503), PASSES,
    ),
    "a commit's name, 401": (
        Site(proxy="hub", which={"path": "/api/models/[^/]*/small1$"}, source="hub"), Fault("status", code=401),
        REFUSED,
    ),
    "a commit's files, lost": (
        Site(proxy="hub", which={"path": "/tree/"}, source="hub", factor=CLIENT_ATTEMPTS), Fault("lost"), PASSES,
    ),
    "a file's address, cut off": (
        Site(proxy="hub", which={"method": "HEAD"}, source="hub"), Fault("reset"), PASSES,
    ),
    "a small file of the Hub, cut": (
        Site(proxy="hub", which={"path": "config.json", "range_only": True}, source="hub"), Fault("cut", at=3), RESUMES,
    ),
    "a small file of the Hub, another one": (
        Site(proxy="hub", which={"path": "config.json", "range_only": True}, source="hub"), Fault("etag"),
        replace(CHANGED, once=0, asked=0, repeated=True),  # looked at again
    ),
}  # fmt: skip


QUICK_TO_PLAN: Final = {
    "a bucket's listing, 403", "a header in a bucket, cut", "a header at the Hub, 403", "a commit's name, 503",
    "a commit's files, lost", "a small file of the Hub, another one",
}  # fmt: skip


@pytest.mark.parametrize("name", some_slow(PLANNING, QUICK_TO_PLAN))
def test_what_is_read_to_plan(ground: Ground, command: Merge, right: Callable[[str, str], bool], name: str) -> None:
    check(ground, command, right, *PLANNING[name])


# ---- writes to a bucket ----------------------------------------------------------------------------------------------


def into_s3(which: Mapping[str, Any], leaves: Literal["nothing", "files", "all"] = "nothing", **more: Any) -> Site:
    return Site(proxy="s3", which=which, to="s3", kind="large", leaves=leaves, **more)


SENT: Final[Mapping[str, Site]] = {
    "a part": into_s3({"method": "PUT", "query": "partNumber"}),
    "a piece": into_s3({"method": "PUT", "path": "/pieces/"}),
    "the record": into_s3({"method": "PUT", "path": "uploads.json"}),
    "the lease": into_s3({"method": "PUT", "path": "/lease/"}),
    "the plan": into_s3({"method": "PUT", "path": "plan.json"}),
    "the journal": into_s3({"method": "PUT", "path": "/journal/"}, lasts=True),
    "a small file": into_s3({"method": "PUT", "path": "/config.json"}, "files"),
    "the result": into_s3({"method": "PUT", "path": "/raymerge.json"}, "files", lasts=True),
}
"""Bodies that go up over signed URLs."""
CALLED: Final[Mapping[str, Site]] = {
    "the begin of an upload": into_s3({"method": "POST", "query": "^uploads"}, up_to_factor=2),
    "a completion": into_s3({"method": "POST", "query": "uploadId"}, "files", up_to_factor=2, lasts=True),
    "the listing of parts": into_s3({"method": "GET", "query": "uploadId"}, up_to_factor=2),
    "the listing of uploads": into_s3({"method": "GET", "query": "^uploads"}, up_to_factor=2),
    "the listing of objects": into_s3({"method": "GET", "query": "list-type"}, up_to_factor=2),
    "the look at what was completed": into_s3({"method": "HEAD", "path": "model.safetensors"}, "files", up_to_factor=2),
    "the removal of a piece": into_s3({"method": "DELETE", "path": "/pieces/"}, "all", up_to_factor=4, lasts=True),
}
"""Small requests of the client."""
READ_BACK: Final[Mapping[str, Site]] = {
    "a piece that is joined": into_s3({"method": "GET", "path": "/pieces/"}),
    "the lease that is looked at": into_s3(
        {"method": "GET", "path": "/lease/"}, often=True, up_to_factor=4, elsewhere=True
    ),
}
"""A run that cannot look at its lease does not remove it either: it ends with its process."""

SENDING: Final[Mapping[str, tuple[Fault, End]]] = {
    "503": (Fault("status", code=503, error="SlowDown"), PASSES),
    "500": (Fault("status", code=500, error="InternalError"), PASSES),
    "429 with Retry-After": (Fault("status", code=429, headers={"Retry-After": "1"}), PASSES),
    "400 bad digest": (Fault("status", code=400, error="BadDigest"), PASSES),
    "409 conflict": (Fault("status", code=409, error="ConditionalRequestConflict"), PASSES),
    "403": (Fault("status", code=403, error="AccessDenied"), RENEWED),
    "404": (Fault("status", code=404, error="NoSuchKey"), FAILS),
    "412": (Fault("status", code=412, error="PreconditionFailed"), FAILS),
    "redirect": (Fault("redirect"), End(always=1, once=1, asked=1, repeated=False, said="wrong-region")),
    "reset": (Fault("reset"), PASSES),
    "lost": (Fault("lost"), PASSES),
    "stall": (Fault("stall"), PASSES),
    "error200": (Fault("error200"), PASSES),
    "etag": (Fault("etag"), PASSES),  # the MD5 of what arrived, and it is not that of what was sent
}
CALLING: Final[Mapping[str, tuple[Fault, End]]] = {
    "503": (Fault("status", code=503, error="SlowDown"), PASSES),
    "500": (Fault("status", code=500, error="InternalError"), PASSES),
    "429 with Retry-After": (Fault("status", code=429, headers={"Retry-After": "1"}), PASSES),
    "403": (Fault("status", code=403, error="AccessDenied"), End(always=1, once=1, asked=1, said="forbidden",
                                                                 repeated=False)),
    "404": (Fault("status", code=404, error="NoSuchUpload"), FAILS),
    "reset": (Fault("reset"), PASSES),
    "lost": (Fault("lost"), PASSES),
    "stall": (Fault("stall"), PASSES),
    "error200": (Fault("error200"), PASSES),
    "cut": (Fault("cut", at=30), PASSES),
    "unsized and cut": (Fault("unsized", at=30), PASSES),
    "gzip": (Fault("gzip"), PASSES),
    "flip": (Fault("flip", at=5), PASSES),  # its XML is none any more
}  # fmt: skip

BEFORE: Final = End(always=2, asked=2)
HELD: Final = End(always=75, once=75, asked=1, repeated=False, said="lease-held")
LOOKED_AT_AGAIN: Final = End(always=1, asked=0, said="source-changed")
"""A few times, and more than once in a merge that fails."""
DONE_BEFORE: Final = End(always=0, asked=2)
"""The second request learns that the first one worked."""
SPECIAL: Final[Mapping[tuple[str, str], End]] = {
    ("the lease", "403"): BEFORE,
    ("the lease", "404"): REFUSED,
    ("the lease", "412"): HELD,
    ("the lease", "redirect"): REFUSED,
    ("the lease", "etag"): DONE_BEFORE,
    ("a small file", "etag"): DONE_BEFORE,
    ("the result", "etag"): DONE_BEFORE,
    ("the listing of objects", "403"): REFUSED,
    ("the listing of objects", "404"): REFUSED,
    ("a completion", "unsized and cut"): DONE_BEFORE,
    ("a completion", "gzip"): DONE_BEFORE,
    ("a completion", "flip"): DONE_BEFORE,
    ("the listing of parts", "404"): End(always=1, once=0, asked=1, repeated=False, said="upload-lost"),  # begun again
    ("the removal of a piece", "404"): UNSEEN,
    **{("the lease that is looked at", code): LOOKED_AT_AGAIN for code in ("404", "412", "416")},
    ("a piece that is joined", "404"): FAILS,
    ("a piece that is joined", "412"): CHANGED,
    ("a piece that is joined", "416"): CHANGED,
}
HEADS: Final = {"error200", "cut", "unsized and cut", "gzip", "flip", "404"}
"""An answer without a body cannot be hurt in it; and what denies an object that it has just made is no S3."""
NO_BODY: Final = {"cut", "gzip", "flip", "unsized and cut"}
LEAVES_A_LEASE: Final = {("the lease", "lost"), ("the lease", "stall")}
QUICK: Final = {
    ("a part", "503"), ("a part", "lost"), ("a piece", "lost"), ("the lease", "503"), ("a completion", "lost"),
    ("the listing of parts", "flip"), ("a piece that is joined", "cut"),
}  # fmt: skip
"""The rest is slow."""

FORBIDDEN_MIDWAY: Final = End(always=1, asked=2)
MIDWAY: Final[Mapping[tuple[str, str], End]] = {
    ("a small file", "412"): FAILS,
    ("the result", "412"): FAILS,
    ("a piece that is joined", "403"): FORBIDDEN_MIDWAY,
    ("a piece that is joined", "400 expired"): FORBIDDEN_MIDWAY,
    ("a piece that is joined", "404"): FAILS,
    ("a piece that is joined", "redirect"): FORBIDDEN_MIDWAY,
    **{("the lease that is looked at", name): End(always=1, asked=0) for name in ("403", "400 expired", "redirect")},
}  # fmt: skip


def pairs(sites: Mapping[str, Site], faults: Mapping[str, tuple[Fault, End]], *, without: set[str]) -> list[Any]:
    """(site, fault) of each case, those that are not QUICK marked slow."""
    found = []
    for site in sites:
        for fault in faults:
            if fault in without or (site == "the removal of a piece" and fault in NO_BODY):
                continue
            if site == "the look at what was completed" and fault in HEADS:
                continue
            marks = [] if (site, fault) in QUICK else [pytest.mark.slow]
            found.append(pytest.param(site, fault, marks=marks, id=f"{site}, {fault}"))
    return found


def check_write(
    ground: Ground, command: Merge, right: Callable[[str, str], bool], monkeypatch: pytest.MonkeyPatch, site: Site,
    names: tuple[str, str], case: tuple[Fault, End],
) -> None:  # fmt: skip
    with_haste(monkeypatch, names[1])
    if names in LEAVES_A_LEASE:
        site = replace(site, elsewhere=True)
    if names == ("the result", "lost"):
        site = replace(site, leaves="all")
    end = MIDWAY.get(names) or SPECIAL.get(names, case[1])
    S3Store(BUCKET).prove()
    check(ground, command, right, site, case[0], end)


@pytest.mark.parametrize("site, fault", pairs(SENT, SENDING, without=set()))
def test_what_is_sent_to_a_bucket(
    ground: Ground, command: Merge, right: Callable[[str, str], bool], monkeypatch: pytest.MonkeyPatch, site: str,
    fault: str,
) -> None:  # fmt: skip
    check_write(ground, command, right, monkeypatch, SENT[site], (site, fault), SENDING[fault])


@pytest.mark.parametrize("site, fault", pairs(CALLED, CALLING, without=set()))
def test_what_is_asked_of_a_bucket(
    ground: Ground, command: Merge, right: Callable[[str, str], bool], monkeypatch: pytest.MonkeyPatch, site: str,
    fault: str,
) -> None:  # fmt: skip
    check_write(ground, command, right, monkeypatch, CALLED[site], (site, fault), CALLING[fault])


@pytest.mark.parametrize("site, fault", pairs(READ_BACK, READS, without={"error200", "whole", "etag", "total"}))
def test_what_a_bucket_gives_back(
    ground: Ground, command: Merge, right: Callable[[str, str], bool], monkeypatch: pytest.MonkeyPatch, site: str,
    fault: str,
) -> None:  # fmt: skip
    check_write(ground, command, right, monkeypatch, READ_BACK[site], (site, fault), READS[fault])


@pytest.mark.parametrize("times", [1, None], ids=["once", "always"])
def test_a_plan_that_may_not_be_looked_at_is_not_taken_for_none(
    ground: Ground, command: Merge, right: Callable[[str, str], bool], times: int | None
) -> None:
    """Another merge lies there unfinished: its parts have the same places, and other bytes."""
    S3Store(BUCKET).prove()
    out = ground.places.fresh("s3")
    begun, other = ground.written("disk", "large", weight=3.0), ground.written("disk", "large")
    strike(ground, into_s3({"method": "PUT", "path": "/README.md"}), Fault("status", code=503), times=None)
    check_end(command("merge", begun, out), 75, "source-unreachable")
    assert not ground.files(out)
    look = into_s3({"method": "HEAD", "path": "plan.json"})
    strike(ground, look, Fault("status", code=403, error="AccessDenied"), times=times)
    check_end(command("merge", other, out), 2, "forbidden")
    ground.quiet()
    check_end(command("merge", other, out), 3, "output-exists")
    assert command("merge", other, out, "--restart").code == 0
    assert right(out, "large")


def test_a_lease_that_is_renewed_while_it_is_looked_at(ground: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run renews its lease beside its work: between a look at its size, which changes, and the read, too."""
    moments = itertools.chain([1795297237.5], itertools.repeat(1795297252.125))
    monkeypatch.setattr("merger.journal.time", types.SimpleNamespace(time=lambda: next(moments)))
    lease = Lease.acquire(S3Store(BUCKET, f"out/{uuid.uuid4().hex}"))
    ground.s3.add(Fault("stall", method="GET", path="/lease/"))

    def renew() -> None:
        ground.s3.wait_for(1, fault="stall")
        lease.renew()
        ground.s3.clear()

    with ThreadPoolExecutor(1) as thread:
        renewed = thread.submit(renew)
        lease.check()
        renewed.result()
    lease.release()


# ---- writes to the Hub -----------------------------------------------------------------------------------------------


def into_hub(which: Mapping[str, Any], proxy: Literal["hub", "cdn"] = "hub", **more: Any) -> Site:
    return Site(proxy=proxy, which=which, to="hub", **more)


PUBLISHED: Final[Mapping[str, Site]] = {
    "who we are": into_hub({"path": "whoami"}),
    "the new repository": into_hub({"path": "/repos/create"}, lasts=True),
    "the question how to upload": into_hub({"path": "/preupload/"}, factor=CLIENT_ATTEMPTS),
    "the question where to": into_hub({"path": "/objects/batch"}, factor=CLIENT_ATTEMPTS),
    "a part of a file": into_hub({"method": "PUT"}, "cdn", factor=CLIENT_ATTEMPTS, lasts=True),
    "the end of its parts": into_hub({"path": "/complete-upload/"}, factor=CLIENT_ATTEMPTS, lasts=True),
    "the check of an upload": into_hub({"path": "/objects/verify"}, lasts=True),
    "the commit": into_hub({"path": "/commit/"}),
}
PUBLISHING: Final[Mapping[str, tuple[Fault, End]]] = {
    "503": (Fault("status", code=503), PASSES),
    "500": (Fault("status", code=500), PASSES),
    "429 with Retry-After": (Fault("status", code=429, headers={"Retry-After": "1"}), PASSES),
    "reset": (Fault("reset"), PASSES),
    "lost": (Fault("lost"), PASSES),
    "403": (Fault("status", code=403), FAILS),
    "404": (Fault("status", code=404), FAILS),
    "412": (Fault("status", code=412), FAILS),
}
THERE_ALREADY: Final = End(always=0, asked=0)
"""What could not be confirmed is found to be there."""
OF_THE_HUB: Final[Mapping[tuple[str, str], End]] = {
    **{(site, code): REFUSED for site in ("who we are", "the new repository") for code in ("403", "404", "412")},
    **{("the check of an upload", name): THERE_ALREADY for name, (_, end) in PUBLISHING.items() if end is PASSES},
    ("the end of its parts", "lost"): THERE_ALREADY,
    ("the commit", "lost"): End(always=0, asked=1, repeated=False),
    ("the commit", "412"): PASSES,  # the branch has not moved: so it was no answer to ours
}
QUICK_OF_THE_HUB: Final = {
    ("the new repository", "lost"), ("the question how to upload", "500"), ("a part of a file", "503"),
    ("a part of a file", "403"), ("the end of its parts", "lost"), ("the commit", "503"), ("the commit", "lost"),
}  # fmt: skip


@pytest.mark.parametrize("site, name", some_slow(itertools.product(PUBLISHED, PUBLISHING), QUICK_OF_THE_HUB))
def test_what_is_sent_to_the_hub(
    ground: Ground, command: Merge, right: Callable[[str, str], bool], site: str, name: str
) -> None:
    """But no silence: the Hub may think for minutes about what it is sent."""
    fault, end = PUBLISHING[name]
    check(ground, command, right, PUBLISHED[site], fault, OF_THE_HUB.get((site, name), end))


# ---- below HTTP ------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Lines:
    """TCP proxies before the others."""

    ground: Ground
    patch: pytest.MonkeyPatch
    made: list[TcpProxy] = field(default_factory=list)

    def to(self, name: str) -> TcpProxy:
        """From now on this process reaches the origin over such a line."""
        line = TcpProxy.start(self.ground.proxy(name).endpoint)
        self.made.append(line)
        if name == "s3":
            self.patch.setenv("AWS_ENDPOINT_URL", line.endpoint)
            S3Store(BUCKET).prove()
        elif name == "cdn":
            self.ground.places.hub.set(cdn_endpoint=line.endpoint)
        else:
            self.patch.setattr(constants, "ENDPOINT", line.endpoint)
            address = f"{line.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
            self.patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address)
        return line


@pytest.fixture
def lines(ground: Ground, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lines]:
    made = Lines(ground, monkeypatch)
    yield made
    ground.places.hub.set(cdn_endpoint=ground.cdn.endpoint)
    for line in made.made:
        line.stop()


TROUBLES: Final[Mapping[str, Callable[[TcpProxy], None]]] = {
    "refused": lambda line: line.refuse(),
    "never accepted": lambda line: line.stop_accepting(),
    "black hole": lambda line: line.black_hole(),
    "reset": lambda line: line.always(Plan(end="reset", after=50)),
    "closed": lambda line: line.always(Plan(end="fin", after=50)),
}
ORIGINS: Final = {"s3": "s3", "hub": "hub", "cdn": "hub"}
"""Proxy → where the sources lie."""


QUICK_DEATHS: Final = {("s3", "black hole"), ("hub", "reset"), ("cdn", "closed")}


@pytest.mark.parametrize("origin, trouble", some_slow(itertools.product(ORIGINS, TROUBLES), QUICK_DEATHS))
def test_a_line_that_is_dead(
    ground: Ground, command: Merge, right: Callable[[str, str], bool], monkeypatch: pytest.MonkeyPatch, lines: Lines,
    origin: str, trouble: str,
) -> None:  # fmt: skip
    for setting, value in HASTE.items():
        monkeypatch.setenv(f"RAYMERGE_HTTP_{setting}", value)
    line = lines.to(origin)
    out = ground.places.fresh("disk")
    merge = ("merge", ground.written(ORIGINS[origin], "small"), out)
    TROUBLES[trouble](line)
    check_end(command(*merge), 75, "source-unreachable")
    if trouble in ("black hole", "reset", "closed"):
        most = 2 * (2 if origin == "s3" else 1)  # two sources are asked for at once; Site.up_to_factor
        assert ATTEMPTS <= line.connections <= ATTEMPTS * most
    assert not Path(out).exists()
    line.always(Plan())
    line.accept()
    outcome = command(*merge)
    assert outcome.code == 0, outcome.err
    assert right(out, "small")


BREAKS: Final = Plan(end="reset", after=400_000)
"""More than a header, less than a tensor."""


@pytest.mark.parametrize(
    "site, dies",
    [
        pytest.param(FROM_S3, False, id="s3, some times", marks=pytest.mark.slow),
        pytest.param(FROM_S3, True, id="s3, for good"),
        pytest.param(FROM_HUB, False, id="hub, some times"),
        pytest.param(FROM_HUB, True, id="hub, for good", marks=pytest.mark.slow),
    ],
)
def test_a_line_that_breaks_midway(
    ground: Ground, command: Merge, right: Callable[[str, str], bool], monkeypatch: pytest.MonkeyPatch, lines: Lines,
    site: Site, dies: bool,
) -> None:  # fmt: skip
    line = lines.to(site.proxy)
    line.plan(*[BREAKS] * 6)  # they carry less than the sources are long
    if dies:
        line.always(Plan(end="reset", after=50))
    else:
        monkeypatch.setenv("RAYMERGE_HTTP_ATTEMPTS", "7")  # one range may meet all six, each near its end
    out = ground.places.fresh("disk")
    merge = ("merge", ground.written(site.source, site.kind), out)
    check_end(command(*merge), 75 if dies else 0, "source-unreachable")
    tried: dict[tuple[str, ...], list[int]] = {}
    for exchange in ground.proxy(site.proxy).log():
        if exchange.range is not None:
            tried.setdefault(key(exchange), []).append(first_byte(exchange))
    assert all(starts == sorted(starts) for starts in tried.values())
    assert any(starts[0] < starts[-1] for starts in tried.values())
    if dies:
        assert not ground.files(out)
        line.always(Plan())
        outcome = command(*merge)
        assert outcome.code == 0, outcome.err
    assert right(out, site.kind)


def test_a_line_that_no_part_gets_through(
    ground: Ground, command: Merge, right: Callable[[str, str], bool], lines: Lines
) -> None:
    line = lines.to("s3")
    line.always(Plan(end="reset", after=1_000_000, direction="up"))
    out = ground.places.fresh("s3")
    merge = ("merge", ground.written("disk", "large"), out)
    ground.s3.forget()
    check_end(command(*merge), 75, "source-unreachable")
    sent: dict[tuple[str, ...], int] = {}
    for exchange in ground.s3.log():
        if exchange.method == "PUT" and int(exchange.headers.get("content-length", 0)) > 1_000_000:
            sent[key(exchange)] = sent.get(key(exchange), 0) + 1
    assert sent
    assert set(sent.values()) == {ATTEMPTS}
    assert not ground.files(out)
    line.always(Plan())
    outcome = command(*merge)
    assert outcome.code == 0, outcome.err
    assert right(out, "large")


# ---- slow ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("site", [FROM_S3, FROM_HUB], ids=["s3", "hub"])
def test_a_source_that_is_too_slow_is_given_up_at_the_deadline(
    ground: Ground, command: Merge, right: Callable[[str, str], bool], monkeypatch: pytest.MonkeyPatch, site: Site
) -> None:
    out = ground.places.fresh("disk")
    merge = ("merge", ground.written(site.source, site.kind), out)
    strike(ground, site, Fault("slow", bytes_per_second=200_000), times=None)
    with monkeypatch.context() as patch:
        patch.setenv("RAYMERGE_HTTP_DEADLINE_SECONDS", "0.5")
        check_end(command(*merge), 75, "source-unreachable")
    assert all(len(tried) == 1 for tried in struck(ground, site).values())
    strike(ground, site, Fault("slow", bytes_per_second=2e6), times=None)
    outcome = command(*merge)
    assert outcome.code == 0, outcome.err
    assert right(out, site.kind)


# ---- what nobody can see ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault", [Fault("flip", at=1001), Fault("shifted", shift=4, claim="asked")], ids=lambda fault: fault.kind
)
@pytest.mark.parametrize("site", [FROM_S3, FROM_HUB], ids=["s3", "hub"])
def test_bytes_that_were_changed_on_a_plain_connection(
    ground: Ground, command: Merge, right: Callable[[str, str], bool], site: Site, fault: Fault
) -> None:
    """No client can see this: neither S3 nor the Hub gives a digest of a range, and the headers are right.

    The merge of the bytes that came is written, whole and consistent: `verify` finds its digests right. `verify
    --replay all` reads the sources again and finds the difference. What prevents it is TLS, which authenticates each
    byte; both places speak it, but on this machine.
    """
    out = ground.places.fresh("disk")
    strike(ground, site, fault, times=1)
    outcome = command("merge", ground.written(site.source, site.kind), out)
    assert outcome.code == 0, outcome.err
    assert len(struck(ground, site)) == 1
    assert not right(out, site.kind)
    assert command("verify", out).code == 0
    ground.quiet()
    assert command("verify", out, "--replay", "all").code == 1


def test_a_piece_that_was_changed_when_it_was_read_back(
    ground: Ground, command: Merge, right: Callable[[str, str], bool]
) -> None:
    """What a run put aside and joins into a part comes back over the same line: it is compared with its MD5, and read
    once more. On the way there no byte can change: each body carries its MD5, and the ETag of what arrived is compared
    with it."""
    out = ground.places.fresh("s3")
    S3Store(BUCKET).prove()
    strike(ground, READ_BACK["a piece that is joined"], Fault("flip", at=1001), times=1)
    outcome = command("merge", ground.written("disk", "large"), out)
    assert outcome.code == 0, outcome.err
    ground.quiet()
    assert right(out, "large")
    assert command("verify", out).code == 0
