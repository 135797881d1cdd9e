"""Reading repositories: the real huggingface_hub and the range reader against a Hub of our own.

The session is offline (tests/conftest.py), which the client notes at its import; `hub` lifts that for one test.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from huggingface_hub import constants, snapshot_download

from merger.errors import InfrastructureError, RaymergeError, SourceChangedError, SourceError
from merger.formats.safetensors import read_header
from merger.storage.base import RangeRead, Store, read_whole
from merger.storage.http import COUNTS
from merger.storage.hub import HubFile, HubStore, pin_hub
from tests.conformance.remote import enter_hub
from tests.counterparts.faults import Fault, FaultProxy
from tests.counterparts.hub import ROOT, HubServer, LoggedRequest, Settings, Token

SMALL = b'{"model_type": "llama"}'
LARGE = random.Random(0).randbytes(3_000_000)
FILES = {"config.json": SMALL, "model.safetensors": LARGE, "sub/adapter.safetensors": LARGE[:9], "sub/ü b%.json": b"[]"}


@pytest.fixture
def hub(hub_server: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """The module's Hub, behaving as a new one, and this process as one that uses it with a token that reads."""
    enter_hub(monkeypatch, hub_server, tmp_path / "cache", hub_server.read_token)
    monkeypatch.setenv("RAYMERGE_HTTP_FIRST_WAIT_SECONDS", "0.01")
    hub_server.clear_log()
    yield hub_server
    hub_server.set(**{slot: getattr(Settings(), slot) for slot in Settings.__slots__})


@pytest.fixture
def repo(hub: HubServer, request: pytest.FixtureRequest) -> str:
    """A repository with FILES on main."""
    repo_id = f"org/{hashlib.sha1(request.node.name.encode()).hexdigest()[:12]}"
    hub.create(repo_id, FILES)
    hub.clear_log()
    return repo_id


def get(store: Store, name: str, start: int = 0, count: int | None = None, pin: str | None = None) -> bytes:
    buffer = bytearray(store.stat(name).size - start if count is None else count)
    store.read_into(name, [RangeRead(start, memoryview(buffer))], pin=pin)
    return bytes(buffer)


def code(caught: pytest.ExceptionInfo[RaymergeError]) -> str:
    return caught.value.problems[0].code


def resolves(hub: HubServer, name: str = "") -> list[LoggedRequest]:
    return [entry for entry in hub.log() if entry.method == "HEAD" and entry.path.endswith(name)]


def at_cdn(hub: HubServer) -> list[LoggedRequest]:
    return [entry for entry in hub.log() if entry.origin == "cdn"]


def at_once(count: int, work: Callable[[int], None]) -> None:
    """`work` by so many threads that start together. Raises the first error."""
    gate = threading.Barrier(count)

    def begin(index: int) -> None:
        gate.wait()
        work(index)

    with ThreadPoolExecutor(count) as threads:
        list(threads.map(begin, range(count)))


# ---- the commit ------------------------------------------------------------------------------------------------------


def test_a_pinned_store_stays_at_its_commit_while_the_branch_moves(hub: HubServer, repo: str) -> None:
    first = hub.head(repo)
    store = pin_hub(repo, "main")
    second = hub.commit(repo, {"model.safetensors": LARGE[::-1], "config.json": None})
    assert store.revision == first
    assert store.uri == f"hf://{repo}@{first}"
    assert (get(store, "model.safetensors"), get(store, "config.json")) == (LARGE, SMALL)
    assert pin_hub(repo, None).revision == second
    assert get(pin_hub(repo, second), "model.safetensors") == LARGE[::-1]


@pytest.mark.parametrize("revision", ["v1", "a/branch", "commit"])
def test_a_tag_a_branch_and_a_commit_are_pinned(hub: HubServer, repo: str, revision: str) -> None:
    first = hub.head(repo)
    hub.point_tag(repo, "v1", first)
    hub.point_branch(repo, "a/branch", first)
    hub.commit(repo, {"config.json": b"{}"})
    assert pin_hub(repo, first if revision == "commit" else revision).revision == first


def test_all_files_come_from_one_listing_however_many_pages_it_has(hub: HubServer, repo: str) -> None:
    hub.set(tree_page_entries=2)
    store = pin_hub(repo, "main")
    assert set(store.list_files()) == {*FILES, ".gitattributes"}
    assert {name: store.stat(name).size for name in FILES} == {name: len(data) for name, data in FILES.items()}
    asked = [entry.path for entry in hub.log() if "/tree/" in entry.path]
    assert len(asked) == 3  # 5 files and a folder
    assert pickle.loads(pickle.dumps(store)).list_files() == store.list_files()
    assert [entry.path for entry in hub.log() if "/tree/" in entry.path] == asked


def test_a_subfolder_is_a_root_of_its_own(hub: HubServer, repo: str) -> None:
    store = pin_hub(repo, "main", "sub")
    assert store.uri == f"hf://{repo}@{hub.head(repo)}/sub"
    assert store.list_files() == ("adapter.safetensors", "ü b%.json")
    assert get(store, "ü b%.json") == b"[]"
    with pytest.raises(SourceError) as caught:
        store.stat("../config.json")
    assert code(caught) == "path-escapes"


def test_the_same_bytes_have_the_same_pin_at_another_commit(hub: HubServer, repo: str) -> None:
    before = pin_hub(repo, "main")
    hub.commit(repo, {"config.json": b"{}"})
    after = pin_hub(repo, "main")
    assert before.stat("model.safetensors").pin == f"hub:{hashlib.sha256(LARGE).hexdigest()}"
    assert after.stat("model.safetensors") == before.stat("model.safetensors")
    assert after.stat("config.json").pin != before.stat("config.json").pin
    with pytest.raises(SourceChangedError):
        get(after, "config.json", count=2, pin=before.stat("config.json").pin)
    with pytest.raises(SourceChangedError):
        get(after, "gone.json", count=2, pin="hub:0")


# ---- addresses -------------------------------------------------------------------------------------------------------


def test_many_threads_find_each_file_once(hub: HubServer, repo: str) -> None:
    store = pin_hub(repo, "main")

    def read(index: int) -> None:
        start = index * 100_000
        assert get(store, "model.safetensors", start, 50_000) == LARGE[start : start + 50_000]
        assert get(store, "config.json") == SMALL

    at_once(16, read)
    assert [len(resolves(hub, name)) for name in ("model.safetensors", "config.json")] == [1, 1]
    assert len([entry for entry in hub.log() if "/tree/" in entry.path]) == 1


IN_A_WORKER = """
import hashlib, pickle, sys
from merger.storage.base import read_whole
store = pickle.load(sys.stdin.buffer)
print(hashlib.sha256(read_whole(store, "model.safetensors", limit=1 << 30)).hexdigest())
"""


def test_workers_read_what_the_driver_resolved_without_asking_the_hub(
    hub: HubServer, repo: str, tmp_path: Path
) -> None:
    hub.guard(repo, private=True)
    store = pin_hub(repo, "main")
    store.resolve(["model.safetensors", "sub/adapter.safetensors", "config.json"])
    assert len(resolves(hub)) == 3
    hub.clear_log()
    sent = pickle.dumps(store)
    assert hub.read_token.encode() not in sent
    environment = {**os.environ, **hub.environment(hub.read_token, home=tmp_path / "home")}
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", IN_A_WORKER], input=sent, env=environment, cwd=ROOT, capture_output=True, check=False
        )
        assert done.returncode == 0, done.stderr.decode()
        assert done.stdout.decode().strip() == hashlib.sha256(LARGE).hexdigest()
    assert {entry.origin for entry in hub.log()} == {"cdn"}


def test_no_token_reaches_another_origin_and_no_address_is_shown(hub: HubServer, repo: str) -> None:
    hub.guard(repo, private=True)
    store = pin_hub(repo, "main")
    assert get(store, "model.safetensors") == LARGE
    assert get(store, "config.json") == SMALL
    assert {entry.authorization for entry in at_cdn(hub)} == {False}
    assert [entry for entry in hub.log() if entry.origin == "api" and not entry.authorization] == []
    assert "Signature" not in repr(store) + repr(store._known.locations)


def test_an_expired_address_is_renewed_once_for_all_threads(hub: HubServer, repo: str) -> None:
    store = pin_hub(repo, "main")
    assert get(store, "model.safetensors", 0, 8) == LARGE[:8]
    hub.expire_signed_urls()

    def read(index: int) -> None:
        start = index * 300_000
        assert get(store, "model.safetensors", start, 300_000) == LARGE[start : start + 300_000]

    at_once(8, read)
    assert len(resolves(hub, "model.safetensors")) == 2
    assert {entry.status for entry in at_cdn(hub)} == {206, 403}


def test_only_the_bytes_that_were_asked_for_are_sent(hub: HubServer, repo: str) -> None:
    store = pin_hub(repo, "main")
    buffers = [bytearray(1000), bytearray(5), bytearray(70_000)]
    reads = [RangeRead(start, memoryview(b)) for start, b in zip((8, 2_000_000, 2_500_000), buffers, strict=True)]
    store.read_into("model.safetensors", reads)
    assert [bytes(b) for b in buffers] == [
        LARGE[r.start : r.start + len(b)] for r, b in zip(reads, buffers, strict=True)
    ]
    assert sum(entry.bytes_sent for entry in at_cdn(hub)) == sum(map(len, buffers))


def test_a_header_costs_one_request(hub: HubServer, repo: str) -> None:
    text = b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}'
    hub.commit(repo, {"a.safetensors": len(text).to_bytes(8, "little") + text + b"data"})
    store = pin_hub(repo, "main")
    assert read_header(store, "a.safetensors").data_start == 8 + len(text)
    assert len(at_cdn(hub)) == 1


def test_a_small_file_is_read_where_a_relative_redirect_leads(hub: HubServer, repo: str) -> None:
    hub.guard(repo, private=True)
    hub.set(redirect_small_files=True)
    assert get(pin_hub(repo, "main"), "config.json", 1, 5) == SMALL[1:6]


def test_a_file_that_is_not_the_listed_one_any_more_is_never_read(hub: HubServer, repo: str) -> None:
    store = pin_hub(repo, "main")
    store.list_files()
    store._known.files = {"model.safetensors": HubFile(len(LARGE), "0" * 64), "config.json": HubFile(1, "0" * 40)}
    for name in ("model.safetensors", "config.json"):
        with pytest.raises(SourceChangedError) as caught:
            get(store, name)
        assert code(caught) == "source-changed"
    assert at_cdn(hub) == []


def test_a_read_past_the_end_is_refused(hub: HubServer, repo: str) -> None:
    with pytest.raises(SourceError) as caught:
        get(pin_hub(repo, "main"), "model.safetensors", len(LARGE) - 1, 2)
    assert code(caught) == "truncated"


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_a_revoked_token_is_forbidden(hub: HubServer, repo: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.guard(repo, private=True)
    hub.add_token("hf_soonrevoked0123456789", Token(user="somebody", writes=False, member=True))
    monkeypatch.setenv("HF_TOKEN", "hf_soonrevoked0123456789")
    store = pin_hub(repo, "main")
    store.resolve(["model.safetensors", "config.json"])
    hub.set(revoke_token="hf_soonrevoked0123456789")
    hub.expire_signed_urls()
    for name in ("model.safetensors", "config.json"):
        with pytest.raises(SourceError) as caught:
            get(store, name)
        assert code(caught) == "forbidden"
        assert "soonrevoked" not in str(caught.value)
    with pytest.raises(SourceError) as caught:
        pin_hub(repo, "main")
    assert code(caught) == "forbidden"


def test_a_gated_repository_is_gated_for_whoever_was_not_let_in(
    hub: HubServer, repo: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.guard(repo, gated=True)
    for token in (hub.stranger_token, ""):
        monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(SourceError) as caught:
            get(pin_hub(repo, "main"), "model.safetensors")
        assert code(caught) == "gated"
    monkeypatch.setenv("HF_TOKEN", hub.read_token)
    assert get(pin_hub(repo, "main"), "model.safetensors", 0, 9) == LARGE[:9]


def test_what_is_missing_is_named(hub: HubServer, repo: str, monkeypatch: pytest.MonkeyPatch) -> None:
    refused: list[tuple[str, Callable[[], object]]] = [
        ("no-such-source", lambda: pin_hub("org/nothing", "main")),
        ("no-such-revision", lambda: pin_hub(repo, "nothing")),
        ("no-such-file", lambda: pin_hub(repo, "main").stat("nothing")),
        ("no-such-file", lambda: get(pin_hub(repo, "main"), "sub", 0, 1)),
        ("no-such-source", lambda: pin_hub("org/two--dashes", "main")),
    ]
    for wanted, use in refused:
        with pytest.raises(SourceError) as caught:
            use()
        assert code(caught) == wanted
        assert caught.value.problems[0].fix
    hub.guard(repo, private=True)
    monkeypatch.setenv("HF_TOKEN", "")
    with pytest.raises(SourceError) as caught:
        pin_hub(repo, "main")
    assert code(caught) == "no-such-source"
    assert "HF_TOKEN" in caught.value.problems[0].fix


def test_a_hub_that_asks_to_wait_is_waited_for(hub: HubServer, repo: str) -> None:
    store = pin_hub(repo, "main")
    store.list_files()
    hub.set(rate_limit_next=1, retry_after=1)
    before = COUNTS.asked_wait_seconds
    assert get(store, "config.json") == SMALL
    assert COUNTS.asked_wait_seconds - before == pytest.approx(1.0)
    assert [entry.status for entry in hub.log() if "/resolve/" in entry.path][:2] == [429, 200]


@pytest.mark.parametrize("fault", [Fault("status", times=None, code=503), Fault("reset", times=None)])
def test_a_hub_that_stays_away_is_no_fault_of_the_merge(
    hub: HubServer, repo: str, fault: Fault, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYMERGE_HTTP_ATTEMPTS", "3")
    with FaultProxy.start(hub.endpoint) as proxy:
        proxy.add(fault)
        with pytest.raises(InfrastructureError) as caught:
            pin_hub(repo, "main", endpoint=proxy.endpoint)
        assert code(caught) == "source-unreachable"
        assert len(proxy.log()) == 3


def test_a_hub_that_falters_is_asked_again(hub: HubServer, repo: str) -> None:
    with FaultProxy.start(hub.endpoint) as proxy:
        proxy.add(Fault("status", code=502, path="/revision/"), Fault("reset", method="HEAD"))
        store = pin_hub(repo, "main", endpoint=proxy.endpoint)
        assert get(store, "model.safetensors") == LARGE


def test_a_silent_hub_does_not_stop_a_merge_for_ever(
    hub: HubServer, repo: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYMERGE_HTTP_STALL_SECONDS", "0.3")
    with FaultProxy.start(hub.endpoint) as proxy:
        store = pin_hub(repo, "main", endpoint=proxy.endpoint)
        proxy.add(Fault("stall", path="/revision/"), Fault("stall", path="/tree/"), Fault("stall", method="HEAD"))
        assert pin_hub(repo, "main", endpoint=proxy.endpoint) == store
        assert get(store, "model.safetensors", 0, 9) == LARGE[:9]


# ---- the cache -------------------------------------------------------------------------------------------------------


@pytest.fixture
def snapshot(hub: HubServer, repo: str) -> Path:
    """The repository in the cache, but for its large file in the root."""
    path = snapshot_download(repo, endpoint=hub.endpoint, ignore_patterns="model.safetensors")
    hub.clear_log()
    return Path(path)


def test_a_cached_file_costs_no_request(hub: HubServer, repo: str, snapshot: Path) -> None:
    store = pin_hub(repo, "main")
    store.list_files()
    hub.clear_log()
    store.resolve(["config.json", "sub/adapter.safetensors"])
    assert get(store, "sub/adapter.safetensors", 2, 5) == LARGE[2:7]
    assert get(store, "config.json") == SMALL
    assert hub.log() == []
    assert get(store, "model.safetensors") == LARGE
    assert len(at_cdn(hub)) == 1


def test_a_cached_file_of_another_size_is_not_used(hub: HubServer, repo: str, snapshot: Path) -> None:
    (snapshot / "config.json").resolve().write_bytes(b"{")
    assert get(pin_hub(repo, "main"), "config.json") == SMALL


def test_offline_the_cache_is_all_there_is(
    hub: HubServer, repo: str, snapshot: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    online = pin_hub(repo, "main")
    pins = {name: online.stat(name) for name in online.list_files()}
    hub.clear_log()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for revision in (None, "main", online.revision):
        store = pin_hub(repo, revision)
        assert store == online
        assert set(store.list_files()) == set(pins) - {"model.safetensors"}
        assert {name: store.stat(name) for name in store.list_files()}.items() < pins.items()
        assert read_whole(store, "sub/adapter.safetensors", limit=9) == LARGE[:9]
    refused: list[Callable[[], object]] = [
        lambda: pin_hub("org/nothing", None), lambda: pin_hub(repo, "v9"), lambda: store.stat("model.safetensors"),
        lambda: get(pin_hub(repo, "0" * 40), "config.json"), lambda: get(online, "model.safetensors"),
    ]  # fmt: skip
    for use in refused:
        with pytest.raises(SourceError) as caught:
            use()
        assert code(caught) == "offline"
        assert "HF_HUB_OFFLINE" in str(caught.value)
    assert hub.log() == []


def test_a_snapshot_without_links_is_read_too(
    hub: HubServer, repo: str, snapshot: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = (snapshot / "config.json").read_bytes()
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").write_bytes(data)
    shutil.rmtree(snapshot / "sub")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    store = pin_hub(repo, "main")
    assert get(store, "config.json", pin=store.stat("config.json").pin) == SMALL
    assert re.fullmatch(rf"hub:{store.revision}:config\.json", store.stat("config.json").pin)


# ---- xet -------------------------------------------------------------------------------------------------------------

OVER_XET = """
import hashlib, sys, hf_xet
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.utils import build_hf_headers
from merger.storage.base import RangeRead
from merger.storage.hub import pin_hub
repo, path, hub_says = sys.argv[1:]
api, data = HfApi(), open(path, "rb").read()
if not hub_says:
    route = f"{api.endpoint}/api/models/{repo}/xet-write-token/main"
    session = hf_xet.XetSession()
    with session.new_upload_commit(token_refresh_url=route, token_refresh_headers=build_hf_headers()) as commit:
        upload = commit.start_upload_bytes(data, sha256=hf_xet.COMPUTE_SHA256)
    print(upload.result().xet_info.hash)
else:
    store = pin_hub(repo, "main")
    for _ in range(2):
        buffers = bytearray(100_000), bytearray(1), bytearray(0), bytearray(7)
        starts = 1_234_567, 0, 5, len(data) - 7
        store.read_into("model.safetensors", [RangeRead(s, memoryview(b)) for s, b in zip(starts, buffers)])
        assert [bytes(b) for b in buffers] == [data[s : s + len(b)] for s, b in zip(starts, buffers)]
"""


def test_a_file_that_no_address_gives_is_read_over_xet(hub: HubServer, repo: str, tmp_path: Path) -> None:
    hub.set(xet_cas=f"local://{tmp_path}/cas")
    (tmp_path / "data").write_bytes(LARGE)
    environment = {**os.environ, **hub.environment(home=tmp_path / "home"), "HF_HUB_DISABLE_XET": "0"}

    def run(hub_says: str) -> str:
        line = [sys.executable, "-c", OVER_XET, repo, str(tmp_path / "data"), hub_says]
        done = subprocess.run(line, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    sha256 = hashlib.sha256(LARGE).hexdigest()
    hub.register_xet(sha256, run(""))
    hub.set(cdn_refuses=[sha256])
    hub.clear_log()
    run("yes")
    assert [entry.status for entry in at_cdn(hub)].count(400) <= 4  # the first read's, and never again
    assert {entry.status for entry in at_cdn(hub)} == {400}
    assert len([entry for entry in hub.log() if "xet-read-token" in entry.path]) >= 1


def test_whom_the_hub_refuses_is_not_sent_to_xet(hub: HubServer, repo: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    hub.set(xet_cas="local:///nowhere")
    hub.register_xet(hashlib.sha256(LARGE).hexdigest(), "0" * 64)
    hub.guard(repo, gated=True)
    store = pin_hub(repo, "main")
    store.resolve(["model.safetensors"])
    hub.expire_signed_urls()
    monkeypatch.setenv("HF_TOKEN", "hf_nobodys0123456789")
    with pytest.raises(SourceError) as caught:
        get(store, "model.safetensors")
    assert code(caught) == "forbidden"
    assert [entry for entry in hub.log() if "xet-read-token" in entry.path] == []


def test_without_xet_a_file_that_no_address_gives_is_refused(hub: HubServer, repo: str) -> None:
    hub.set(cdn_refuses=[hashlib.sha256(LARGE).hexdigest()])
    with pytest.raises(SourceError) as caught:
        get(pin_hub(repo, "main"), "model.safetensors")
    assert code(caught) == "bad-answer"


def test_a_store_is_what_it_was_after_a_journey(hub: HubServer, repo: str) -> None:
    store = pin_hub(repo, "main", "sub")
    store.resolve(["adapter.safetensors"])
    back = pickle.loads(pickle.dumps(store))
    assert isinstance(back, HubStore)
    assert isinstance(back, Store)
    assert (back, hash(back), back.endpoint) == (store, hash(store), hub.endpoint)
    assert get(back, "adapter.safetensors") == LARGE[:9]
    assert len(resolves(hub)) == 1
