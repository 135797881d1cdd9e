"""The Hub of the tests, driven by the real huggingface_hub: what merger/storage relies on when it meets the real one.

The session is offline (tests/conftest.py), which huggingface_hub notes at its import; `online` lifts that for the one
test, in this process. What a process of its own needs is in `HubServer.environment`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import random
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import urllib3
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    HfFileSystem,
    constants,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    snapshot_download,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile, RepoFolder
from huggingface_hub.utils._http import parse_ratelimit_headers

from tests.counterparts.hub import ROOT, HubServer, LoggedRequest, Settings, Token, requested_span
from tests.counterparts.hub_store import LARGE_BYTES, HubFile, Refusal, tracked_by_lfs

# huggingface_hub 2.4 hands httpx2 the body of an LFS upload under a name that httpx2 warns of.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

SMALL = b'{"model_type": "llama"}'
LARGE = random.Random(0).randbytes(300_000)
FILES = {"config.json": SMALL, "model.safetensors": LARGE, "sub/ü b%.json": b"[]", "sub/deep/x.safetensors": b"x" * 9}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    with HubServer.start(tmp_path_factory.mktemp("hub")) as started:
        yield started


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def hub(server: HubServer, online: None) -> Iterator[HubServer]:
    """The module's Hub, behaving as a new one."""
    server.clear_log()
    yield server
    server.set(**dataclasses.asdict(Settings()))


@pytest.fixture
def repo(hub: HubServer, request: pytest.FixtureRequest) -> str:
    """A repository with FILES on main."""
    repo_id = f"org/{hashlib.sha1(request.node.name.encode()).hexdigest()}"
    hub.create(repo_id, FILES)
    hub.clear_log()
    return repo_id


@pytest.fixture
def api(hub: HubServer) -> HfApi:
    return HfApi(endpoint=hub.endpoint, token=hub.write_token)


def location(hub: HubServer, repo_id: str, name: str, revision: str = "main") -> str:
    """Where the file's bytes are to be had, as the client finds out."""
    url = hf_hub_url(repo_id, name, revision=revision, endpoint=hub.endpoint)
    return get_hf_file_metadata(url, token=hub.read_token).location


def get(url: str, method: str = "GET", **headers: str) -> urllib3.BaseHTTPResponse:
    return urllib3.request(method, url, headers=headers, redirect=False, retries=False)


def at_cdn(hub: HubServer) -> list[LoggedRequest]:
    return [entry for entry in hub.log() if entry.origin == "cdn"]


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


# ---- reading ---------------------------------------------------------------------------------------------------------


def test_branch_tag_and_commit_name_what_they_name_while_the_branch_moves(
    hub: HubServer, api: HfApi, repo: str
) -> None:
    first = hub.head(repo)
    hub.point_tag(repo, "v1", first)
    hub.point_branch(repo, "a/branch", first)
    second = hub.commit(repo, {"config.json": b"{}", "model.safetensors": None})
    assert api.model_info(repo).sha == api.model_info(repo, revision="main").sha == second
    assert {api.model_info(repo, revision=name).sha for name in ("v1", "a/branch", first)} == {first}
    siblings = api.model_info(repo, revision=first, files_metadata=True).siblings
    assert {s.rfilename: s.size for s in siblings or () if s.rfilename in FILES} == {
        n: len(d) for n, d in FILES.items()
    }
    assert hub.history(repo)[0][0] == second
    refs = api.list_repo_refs(repo)
    assert [(tag.name, tag.target_commit) for tag in refs.tags] == [("v1", first)]
    assert [c.commit_id for c in api.list_repo_commits(repo)] == [sha for sha, _ in hub.history(repo)]


@pytest.mark.parametrize("revision", ["main", "v1", "sha"])
def test_downloads_are_the_bytes_of_their_revision(hub: HubServer, repo: str, tmp_path: Path, revision: str) -> None:
    first = hub.head(repo)
    hub.point_tag(repo, "v1", first)
    if revision != "main":
        hub.commit(repo, {"config.json": b"{}", "model.safetensors": LARGE[::-1]})
    asked: dict[str, Any] = {"endpoint": hub.endpoint, "token": hub.read_token, "cache_dir": tmp_path}
    asked["revision"] = first if revision == "sha" else revision
    folder = Path(snapshot_download(repo, **asked))
    assert folder.name == first
    assert {name: (folder / name).read_bytes() for name in FILES} == FILES
    for name, data in FILES.items():
        assert Path(hf_hub_download(repo, name, force_download=True, **asked)).read_bytes() == data


def test_a_tree_is_listed_page_after_page(hub: HubServer, api: HfApi, repo: str) -> None:
    hub.set(tree_page_entries=2)
    entries = list(api.list_repo_tree(repo, recursive=True))
    files = {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}
    assert {entry.path for entry in entries if isinstance(entry, RepoFolder)} == {"sub", "sub/deep"}
    assert set(files) == {*FILES, ".gitattributes"}
    assert {name: file.lfs is not None for name, file in files.items() if name in FILES} == {
        name: name.endswith(".safetensors") for name in FILES
    }
    assert all(files[name].size == len(data) for name, data in FILES.items())
    found = files["model.safetensors"].lfs
    assert found is not None
    assert (found.sha256, found.size) == (hashlib.sha256(LARGE).hexdigest(), len(LARGE))
    assert files["config.json"].blob_id == git_oid(SMALL)
    assert len(hub.log()) == 4


def test_a_folder_is_listed_by_itself(hub: HubServer, api: HfApi, repo: str) -> None:
    assert [entry.path for entry in api.list_repo_tree(repo, "sub")] == ["sub/deep", "sub/ü b%.json"]
    assert [entry.path for entry in api.list_repo_tree(repo, "sub/deep", expand=True)] == ["sub/deep/x.safetensors"]
    with pytest.raises(EntryNotFoundError):
        list(api.list_repo_tree(repo, "nowhere"))
    found = api.get_paths_info(repo, ["config.json", "nowhere", "sub", "sub/ü b%.json"])
    assert [entry.path for entry in found] == ["config.json", "sub", "sub/ü b%.json"]


@pytest.mark.parametrize("redirected", [False, True])
def test_metadata_names_commit_size_and_content(hub: HubServer, repo: str, redirected: bool) -> None:
    hub.set(redirect_small_files=redirected)
    for name, data in FILES.items():
        url = hf_hub_url(repo, name, endpoint=hub.endpoint)
        found = get_hf_file_metadata(url, token=hub.read_token)
        large = name.endswith(".safetensors")
        assert (found.commit_hash, found.size) == (hub.head(repo), len(data))
        assert found.etag == (hashlib.sha256(data).hexdigest() if large else git_oid(data))
        assert found.location.startswith(hub.cdn_endpoint if large else hub.endpoint)
        assert found.xet_file_data is None
        assert hub.read(repo, name) == data
    assert all(entry.bytes_sent == 0 for entry in hub.log() if entry.method == "HEAD")
    assert any(entry.path.startswith("/api/resolve-cache/") for entry in hub.log()) is redirected


def test_a_file_system_reads_a_range(hub: HubServer, repo: str) -> None:
    files = HfFileSystem(endpoint=hub.endpoint, token=hub.read_token, skip_instance_cache=True)
    with files.open(f"{repo}/model.safetensors", "rb", cache_type="none") as file:
        file.seek(1000)
        assert file.read(500) == LARGE[1000:1500]
    [fetched] = at_cdn(hub)
    assert (fetched.status, fetched.range, fetched.bytes_sent) == (206, "bytes=1000-1499", 500)
    assert fetched.path.endswith("/model.safetensors")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize(
    "asked, start, end",
    [("0-0", 0, 1), ("5-9", 5, 10), ("7-", 7, None), ("-3", -3, None), ("2-99999999", 2, None), ("0-", 0, None)],
)
def test_both_origins_serve_ranges(
    hub: HubServer, repo: str, name: str, asked: str, start: int, end: int | None
) -> None:
    answer = get(location(hub, repo, name), Range=f"bytes={asked}", Authorization=f"Bearer {hub.read_token}")
    data = FILES[name]
    first = start % len(data)
    assert (answer.status, answer.data) == (206, data[start:end])
    assert answer.headers["Content-Range"] == f"bytes {first}-{first + len(answer.data) - 1}/{len(data)}"
    assert hub.log()[-1].bytes_sent == len(answer.data)


@pytest.mark.parametrize(
    "header, span",
    [
        (None, None), ("bytes=", None), ("bytes=-", None), ("bytes=5-2", None), ("bytes=0-1,4-5", None),
        ("lines=0-1", None), ("bytes=9-9", (9, 10)), ("bytes=-99", (0, 10)), ("bytes=10-", 416), ("bytes=-0", 416),
    ],
)  # fmt: skip
def test_a_range_is_understood_or_ignored_or_refused(header: str | None, span: object) -> None:
    if span == 416:
        with pytest.raises(Refusal) as caught:
            requested_span(header, 10)
        assert (caught.value.status, caught.value.headers["Content-Range"]) == (416, "bytes */10")
    else:
        assert requested_span(header, 10) == span


def test_a_range_that_does_not_exist_is_416_on_the_wire(hub: HubServer, repo: str) -> None:
    answer = get(location(hub, repo, "model.safetensors"), Range=f"bytes={len(LARGE)}-")
    assert (answer.status, answer.headers["Content-Range"]) == (416, f"bytes */{len(LARGE)}")


def test_conditions_are_kept(hub: HubServer, repo: str) -> None:
    url = location(hub, repo, "model.safetensors")
    etag = f'"{hashlib.sha256(LARGE).hexdigest()}"'
    assert get(url, **{"If-Match": etag, "Range": "bytes=0-4"}).data == LARGE[:5]
    assert get(url, **{"If-Match": '"other"', "Range": "bytes=0-4"}).status == 412
    assert get(url, **{"If-None-Match": etag}).status == 304
    assert get(url, **{"If-Range": '"other"', "Range": "bytes=0-4"}).data == LARGE


def test_what_is_read_while_its_reader_leaves_is_counted(server: HubServer) -> None:
    size = 64 << 20
    server.create("org/left", {"model.safetensors": bytes(size)})
    answer = get(f"{server.endpoint}/org/left/resolve/main/model.safetensors")
    server.clear_log()
    with urllib3.PoolManager() as pool:
        reply = pool.request("GET", answer.headers["Location"], preload_content=False)
        assert len(reply.read(1000)) == 1000
        reply.close()
    [entry] = server.log()
    assert entry.status == 200
    assert entry.bytes_sent < size


# ---- the second origin -----------------------------------------------------------------------------------------------


def test_no_token_reaches_the_second_origin(hub: HubServer, api: HfApi, repo: str, tmp_path: Path) -> None:
    snapshot_download(repo, endpoint=hub.endpoint, token=hub.read_token, cache_dir=tmp_path)
    files = HfFileSystem(endpoint=hub.endpoint, token=hub.read_token, skip_instance_cache=True)
    assert files.cat_file(f"{repo}/model.safetensors", start=1, end=3) == LARGE[1:3]
    api.upload_file(path_or_fileobj=LARGE[:-1], path_in_repo="new.safetensors", repo_id=repo)
    assert {entry.method for entry in at_cdn(hub)} == {"GET", "PUT"}
    assert not [entry for entry in at_cdn(hub) if entry.authorization]
    assert [entry for entry in hub.log() if entry.origin == "api" and entry.authorization]


def test_a_token_that_reaches_it_is_seen_and_does_no_harm(hub: HubServer, repo: str) -> None:
    answer = get(location(hub, repo, "model.safetensors"), Authorization=f"Bearer {hub.read_token}")
    assert answer.data == LARGE
    assert [entry.authorization for entry in at_cdn(hub)] == [True]


def test_signed_urls_expire_and_new_ones_are_good(hub: HubServer, repo: str) -> None:
    old = location(hub, repo, "model.safetensors")
    assert get(old).status == 200
    hub.expire_signed_urls()
    assert get(old, Range="bytes=0-4").status == 403
    new = location(hub, repo, "model.safetensors")
    assert get(new).data == LARGE
    assert get(new.replace("model.safetensors", "config.json")).status == 403
    assert get(new.split("?")[0]).status == 403
    hub.set(cdn_ttl_seconds=0)
    assert get(location(hub, repo, "model.safetensors")).status == 403
    assert [entry.status for entry in at_cdn(hub)] == [200, 403, 200, 403, 403, 403]


def test_something_may_stand_before_the_second_origin(hub: HubServer, repo: str) -> None:
    hub.set(cdn_endpoint="http://127.0.0.1:9")
    assert location(hub, repo, "model.safetensors").startswith("http://127.0.0.1:9/org/")


# ---- who may what ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("who", ["nobody", "stranger"])
@pytest.mark.parametrize(
    "case, error, statuses",
    [
        ("missing", RepositoryNotFoundError, (401, 404)),
        ("private", RepositoryNotFoundError, (401, 404)),
        ("gated", GatedRepoError, (401, 403)),
        ("revision", RevisionNotFoundError, (404, 404)),
        ("entry", EntryNotFoundError, (404, 404)),
    ],
)
def test_what_may_not_be_read_is_the_clients_typed_error(
    hub: HubServer, repo: str, who: str, case: str, error: type[HfHubHTTPError], statuses: tuple[int, int]
) -> None:
    hub.guard(repo, private=case == "private", gated=case == "gated")
    url = hf_hub_url(
        "org/missing" if case == "missing" else repo,
        "nowhere.json" if case == "entry" else "config.json",
        revision="nowhen" if case == "revision" else "main",
        endpoint=hub.endpoint,
    )
    with pytest.raises(error) as caught:
        get_hf_file_metadata(url, token=False if who == "nobody" else hub.stranger_token)
    assert type(caught.value).__name__.removeprefix("Remote") == error.__name__
    assert caught.value.response.status_code == statuses[who == "stranger"]


def test_private_and_gated_repositories_open_to_their_members(hub: HubServer, repo: str) -> None:
    assert hub.guard(repo, private=True, gated=True) == (True, True)
    info = HfApi(endpoint=hub.endpoint, token=hub.read_token).model_info(repo)
    assert (info.private, info.gated) == (True, "manual")
    assert get(location(hub, repo, "model.safetensors")).data == LARGE
    hub.guard(repo, private=False)
    stranger = HfApi(endpoint=hub.endpoint, token=hub.stranger_token)
    assert stranger.model_info(repo).gated == "manual"  # a gate is before the files, not before their names
    assert len(list(stranger.list_repo_tree(repo))) == 4


def test_a_token_is_good_until_it_is_revoked(hub: HubServer, repo: str) -> None:
    hub.add_token("hf_new", Token(user="someone", writes=False, member=False))
    mine = HfApi(endpoint=hub.endpoint, token="hf_new")
    told = mine.whoami()
    assert (told["name"], told["auth"]["accessToken"]["role"]) == ("someone", "read")
    assert mine.model_info(repo).id == repo
    hub.set(revoke_token="hf_new")
    for call in (mine.whoami, lambda: mine.model_info(repo)):
        with pytest.raises(HfHubHTTPError) as caught:
            call()
        assert caught.value.response.status_code == 401
        assert not isinstance(caught.value, RepositoryNotFoundError)


@pytest.mark.parametrize("who, status", [("nobody", 401), ("reader", 403)])
def test_writing_needs_a_token_that_writes(hub: HubServer, repo: str, who: str, status: int) -> None:
    mine = HfApi(endpoint=hub.endpoint, token=False if who == "nobody" else hub.read_token)
    add = CommitOperationAdd("new.json", b"{}")
    calls: list[Callable[[], object]] = [
        lambda: mine.create_repo("org/refused"),
        lambda: mine.create_branch(repo, branch="refused"),
        lambda: mine.create_commit(repo, [add], commit_message="refused"),
    ]
    before = hub.history(repo)
    for call in calls:
        with pytest.raises(HfHubHTTPError) as caught:
            call()
        assert caught.value.response.status_code == status
    assert hub.history(repo) == before


def test_too_many_resolves_are_told_to_wait(hub: HubServer, repo: str) -> None:
    hub.set(rate_limit_next=2, retry_after=0)
    url = hf_hub_url(repo, "config.json", endpoint=hub.endpoint)
    answer = get(url)
    assert answer.status == 429
    assert answer.headers["Retry-After"] == "0"
    limit = parse_ratelimit_headers(answer.headers)
    assert limit is not None
    assert (limit.resource_type, limit.remaining, limit.reset_in_seconds) == ("resolvers", 0, 0)
    assert get_hf_file_metadata(url, retry_on_errors=True).size == len(SMALL)
    assert [entry.status for entry in hub.log()] == [429, 429, 200]


# ---- publishing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("private", [False, True])
def test_a_new_repository_holds_gitattributes_alone(hub: HubServer, api: HfApi, private: bool) -> None:
    repo_id = f"org/new-{private}"
    assert api.create_repo(repo_id, private=private).repo_id == repo_id
    assert api.model_info(repo_id).private is private
    assert list(hub.files(repo_id)) == [".gitattributes"]
    assert [title for _, title in hub.history(repo_id)] == ["initial commit"]
    with pytest.raises(HfHubHTTPError) as caught:
        api.create_repo(repo_id, private=private)
    assert caught.value.response.status_code == 409
    assert api.create_repo(repo_id, private=not private, exist_ok=True).repo_id == repo_id
    assert hub.guard(repo_id)[0] is private
    api.delete_repo(repo_id)
    with pytest.raises(RepositoryNotFoundError):
        api.model_info(repo_id)


def test_one_commit_brings_small_and_large_files(hub: HubServer, api: HfApi, repo: str, tmp_path: Path) -> None:
    before = hub.head(repo)
    large = tmp_path / "large.bin"
    large.write_bytes(LARGE[::-1])
    adds: list[CommitOperationAdd | CommitOperationDelete] = [
        CommitOperationAdd("config.json", b'{"a": 1}'),
        CommitOperationAdd("sub/new.safetensors", LARGE[:1000]),
        CommitOperationAdd("large.bin", large),
        CommitOperationAdd("empty.safetensors", b""),
        CommitOperationDelete("model.safetensors"),
        CommitOperationDelete("sub/deep/"),
    ]
    done = api.create_commit(repo, adds, commit_message="Merged", parent_commit=before)
    assert [(sha, title) for sha, title in hub.history(repo)][:2] == [
        (done.oid, "Merged"),
        hub.history(repo, before)[0],
    ]
    found = hub.files(repo)
    wanted = {
        "config.json": b'{"a": 1}', "sub/new.safetensors": LARGE[:1000], "large.bin": LARGE[::-1],
        "empty.safetensors": b"", "sub/ü b%.json": b"[]",
    }  # fmt: skip
    assert {name: hub.read(repo, name) for name in found if name != ".gitattributes"} == wanted
    assert {name for name, file in found.items() if file.is_lfs} == {"sub/new.safetensors", "large.bin"}
    assert hub.read(repo, "config.json", before) == SMALL
    assert get(location(hub, repo, "large.bin")).data == LARGE[::-1]


def test_a_stale_parent_is_412_and_changes_nothing(hub: HubServer, api: HfApi, repo: str) -> None:
    stale = hub.head(repo)
    head = hub.commit(repo, {"config.json": b"other"})
    with pytest.raises(HfHubHTTPError) as caught:
        api.create_commit(repo, [CommitOperationAdd("a", b"a")], commit_message="m", parent_commit=stale)
    assert caught.value.response.status_code == 412
    assert hub.head(repo) == head


def test_content_uploaded_beforehand_is_committed_later_and_sent_once(hub: HubServer, api: HfApi, repo: str) -> None:
    data = LARGE[7:]
    first = CommitOperationAdd("shard.safetensors", data)
    api.preupload_lfs_files(repo, [first])
    assert [entry.bytes_received for entry in at_cdn(hub)] == [len(data)]
    assert "shard.safetensors" not in hub.files(repo)
    again = CommitOperationAdd("shard.safetensors", data)
    api.preupload_lfs_files(repo, [again])  # as after a crash
    api.create_commit(repo, [again], commit_message="m")
    assert len(at_cdn(hub)) == 1
    assert hub.read(repo, "shard.safetensors") == data
    head = hub.head(repo)
    assert api.create_commit(repo, [CommitOperationAdd("shard.safetensors", data)], commit_message="m").oid == head


def test_a_large_object_comes_in_parts(hub: HubServer, api: HfApi, repo: str) -> None:
    hub.set(multipart_from_bytes=100_000, part_bytes=80_000)
    api.upload_file(path_or_fileobj=LARGE[1:], path_in_repo="parts.safetensors", repo_id=repo)
    assert [entry.bytes_received for entry in at_cdn(hub)] == [80_000, 80_000, 80_000, 59_999]
    assert hub.read(repo, "parts.safetensors") == LARGE[1:]


def test_an_upload_that_is_not_what_it_says_is_refused(hub: HubServer, repo: str) -> None:
    url = f"{hub.endpoint}/{repo}.git/info/lfs/objects/batch"
    told = {"oid": hashlib.sha256(b"right").hexdigest(), "size": 5}
    asked = {"operation": "upload", "transfers": ["basic"], "objects": [told]}
    headers = {"Authorization": f"Bearer {hub.write_token}"}
    batch = urllib3.request("POST", url, json=asked, headers=headers).json()
    place = batch["objects"][0]["actions"]["upload"]["href"]
    assert urllib3.request("PUT", place, body=b"wrong").status == 400
    assert "upload" in urllib3.request("POST", url, json=asked, headers=headers).json()["objects"][0]["actions"]
    assert urllib3.request("PUT", place, body=b"right").status == 200
    assert "actions" not in urllib3.request("POST", url, json=asked, headers=headers).json()["objects"][0]


def test_an_upload_that_breaks_off_leaves_nothing(hub: HubServer, api: HfApi, repo: str) -> None:
    add = CommitOperationAdd("a.safetensors", LARGE[3:])
    told = {"oid": add.upload_info.sha256.hex(), "size": add.upload_info.size}
    headers = {"Authorization": f"Bearer {hub.write_token}"}
    url = f"{hub.endpoint}/{repo}.git/info/lfs/objects/batch"
    batch = urllib3.request("POST", url, json={"operation": "upload", "objects": [told]}, headers=headers).json()
    place = urllib3.util.parse_url(batch["objects"][0]["actions"]["upload"]["href"])
    with socket.create_connection((place.host, place.port)) as client:
        head = f"PUT {place.request_uri} HTTP/1.1\r\nHost: {place.netloc}\r\nContent-Length: {add.upload_info.size}\r\n"
        client.sendall(f"{head}Expect: 100-continue\r\n\r\n".encode())
        assert client.recv(100).startswith(b"HTTP/1.1 100")
        client.sendall(LARGE[3:1000])
    [entry] = at_cdn(hub)
    assert (entry.status, entry.bytes_received) == (0, 997)
    assert list((hub.root / "incoming").iterdir()) == []
    api.create_commit(repo, [add], commit_message="m")
    assert hub.read(repo, "a.safetensors") == LARGE[3:]


@pytest.mark.parametrize("name, wrong", [("../x", 400), ("a//b", 400), (".git/x", 400), ("config.json/x", 400)])
def test_a_tree_that_git_cannot_hold_is_refused(hub: HubServer, repo: str, name: str, wrong: int) -> None:
    lines = [{"key": "header", "value": {"summary": "s"}}, {"key": "file", "value": {"path": name, "content": "eA=="}}]
    answer = urllib3.request(
        "POST",
        f"{hub.endpoint}/api/models/{repo}/commit/main",
        body="\n".join(map(json.dumps, lines)),
        headers={"Authorization": f"Bearer {hub.write_token}"},
    )
    assert answer.status == wrong
    assert len(hub.history(repo)) == 2


def test_a_pointer_to_nothing_is_refused(hub: HubServer, api: HfApi, repo: str) -> None:
    never = CommitOperationAdd("a.safetensors", b"never uploaded")
    never._upload_mode, never._is_uploaded = "lfs", True
    with pytest.raises(HfHubHTTPError) as caught:
        api.create_commit(repo, [never], commit_message="m")
    assert caught.value.response.status_code == 400
    assert "a.safetensors" not in hub.files(repo)


def test_deleting_what_is_not_there_is_an_error(hub: HubServer, api: HfApi, repo: str) -> None:
    for path in ("nowhere", "nowhere/"):
        with pytest.raises(EntryNotFoundError, match="doesn't exist"):
            api.create_commit(repo, [CommitOperationDelete(path)], commit_message="m")


def test_branches_are_made_and_committed_to(hub: HubServer, api: HfApi, repo: str) -> None:
    main = hub.head(repo)
    with pytest.raises(RevisionNotFoundError):
        api.create_commit(repo, [CommitOperationAdd("a", b"a")], commit_message="m", revision="dev/1")
    api.create_branch(repo, branch="dev/1")
    api.create_branch(repo, branch="dev/1", exist_ok=True)
    with pytest.raises(HfHubHTTPError) as caught:
        api.create_branch(repo, branch="dev/1")
    assert caught.value.response.status_code == 409
    done = api.create_commit(repo, [CommitOperationAdd("a", b"a")], commit_message="m", revision="dev/1")
    assert (hub.head(repo, "dev/1"), hub.head(repo)) == (done.oid, main)
    api.create_tag(repo, tag="v1", revision="dev/1")
    api.delete_branch(repo, branch="dev/1")
    assert api.model_info(repo, revision="v1").sha == done.oid


def test_a_lost_answer_leaves_the_commit_made(hub: HubServer, api: HfApi, repo: str) -> None:
    hub.set(lose_next_commit_answer=True)
    before = hub.history(repo)
    with pytest.raises(Exception, match="disconnected") as caught:
        api.create_commit(repo, [CommitOperationAdd("a", b"a")], commit_message="lost")
    assert type(caught.value).__name__ == "RemoteProtocolError"
    after = hub.history(repo)
    assert after[1:] == before
    assert (after[0][1], hub.read(repo, "a")) == ("lost", b"a")
    assert [entry.status for entry in hub.log()][-1] == 0
    api.create_commit(repo, [CommitOperationAdd("b", b"b")], commit_message="kept")


def test_a_card_is_validated(hub: HubServer, api: HfApi, repo: str) -> None:
    with pytest.warns(UserWarning, match="metadata"):
        api.upload_file(path_or_fileobj=b"# no head\n", path_in_repo="README.md", repo_id=repo)
    with pytest.raises(ValueError, match="Invalid metadata"):
        api.upload_file(path_or_fileobj=b"---\na: [\n---\n", path_in_repo="README.md", repo_id=repo)
    card = b"---\nlicense: apache-2.0\ntags: [merge]\n---\n# M\n"
    api.upload_file(path_or_fileobj=card, path_in_repo="README.md", repo_id=repo)
    info = api.model_info(repo)
    assert info.tags == ["merge"]
    assert info.card_data is not None
    assert info.card_data.license == "apache-2.0"


@pytest.mark.parametrize(
    "name, size, large",
    [
        ("a/b.safetensors", 1, True), ("b.safetensors", 0, False), ("x.json", LARGE_BYTES, False),
        ("x.json", LARGE_BYTES + 1, True), ("safetensors", 9, False), ("kept/x.json", 9, True),
    ],
)  # fmt: skip
def test_which_files_belong_in_lfs(name: str, size: int, large: bool) -> None:
    attributes = "*.safetensors filter=lfs -text\nkept/* filter=lfs\n*.json text\n"
    assert tracked_by_lfs(name, size, attributes) is large


# ---- the process -----------------------------------------------------------------------------------------------------

PROGRAM = """
import sys
from huggingface_hub import HfApi, snapshot_download
folder = snapshot_download("org/given", revision="v1")
api = HfApi()
assert api.whoami()["name"] == "writer"
api.create_repo("org/made", private=True)
print(api.upload_folder(repo_id="org/made", folder_path=folder, commit_message="Copied").oid)
"""


def test_a_process_with_its_environment_uses_it_and_nothing_else(hub: HubServer) -> None:
    hub.point_tag("org/given", "v1", hub.create("org/given", FILES))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, **hub.environment()},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [hub.head("org/made")]
    assert {name: hub.read("org/made", name) for name in FILES} == FILES
    assert hub.guard("org/made")[0] is True
    assert (hub.root / "home" / "hub" / "models--org--given").is_dir()


def test_it_starts_for_a_user_ends_on_a_signal_and_keeps_its_repositories(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "x.safetensors").write_bytes(LARGE)
    line = [sys.executable, "-m", "tests.counterparts.hub", "--root", str(tmp_path / "hub"), "--token", "hf_mine"]
    with subprocess.Popen(
        [*line, "--publish", f"org/given={folder}"],
        cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        ready = json.loads(process.stdout.readline())
        assert ready["tokens"]["write"] == "hf_mine"
        found = urllib3.request("GET", f"{ready['endpoint']}/org/given/resolve/main/sub/x.safetensors")
        assert found.data == LARGE
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=20)
    assert (process.returncode, errors) == (0, "")
    (folder / "sub" / "x.safetensors").write_bytes(b"changed after it was published")
    with HubServer.start(tmp_path / "hub") as again:
        assert again.read("org/given", "sub/x.safetensors") == LARGE
        sha = again.commit("org/given", {"config.json": b"{}"})
        assert isinstance(again.files("org/given", sha)["config.json"], HubFile)
        blobs = [path for path in (tmp_path / "hub" / "blobs").rglob("*") if path.is_file()]
        assert len(blobs) == 3  # one a content, however many commits hold it


def test_it_dies_with_its_parent(tmp_path: Path) -> None:
    program = f"""
import os
from pathlib import Path
from tests.counterparts.hub import HubServer
print(HubServer.start(Path({str(tmp_path)!r}))._process.pid, flush=True)
os.kill(os.getpid(), 9)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    with contextlib.suppress(ProcessLookupError):  # it was quicker
        hub = os.pidfd_open(int(done.stdout))
        assert select.select([hub], [], [], 20)[0] == [hub]
        os.close(hub)


def test_a_hub_that_failed_says_so_when_it_stops(tmp_path: Path) -> None:
    failing = HubServer.start(tmp_path)
    failing.create("org/m", {})
    url = f"{failing.endpoint}/api/models/org/m/commit/main"
    headers = {"Authorization": f"Bearer {failing.write_token}"}
    assert urllib3.request("POST", url, body="garbage", headers=headers).status == 500
    with pytest.raises(RuntimeError, match="JSONDecodeError"):
        failing.stop()


def test_what_it_does_not_know_is_said(hub: HubServer) -> None:
    with pytest.raises(RuntimeError, match="cdn_ttl_seconds"):
        hub.set(cdn_ttl=1)
    with pytest.raises(RuntimeError, match="no repository"):
        hub.commit("org/nowhere", {"a": b""})
    answer = get(f"{hub.endpoint}/api/datasets/org/m")
    assert answer.status == 404
    assert "/api/datasets/org/m" in answer.json()["error"]


# ---- xet -------------------------------------------------------------------------------------------------------------

XET_UPLOAD = """
import sys
import hf_xet
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.utils import build_hf_headers
api, data = HfApi(), open(sys.argv[1], "rb").read()
route = f"{api.endpoint}/api/models/org/xet/xet-write-token/main"
with hf_xet.XetSession().new_upload_commit(token_refresh_url=route, token_refresh_headers=build_hf_headers()) as commit:
    upload = commit.start_upload_bytes(data, sha256=hf_xet.COMPUTE_SHA256)
info = upload.result().xet_info
add = CommitOperationAdd("model.safetensors", data)
add._upload_mode, add._is_uploaded = "lfs", True
api.create_commit("org/xet", [add], commit_message="over xet")
print(info.sha256, info.hash)
"""
XET_DOWNLOAD = """
import hf_xet
from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.utils import build_hf_headers
found = get_hf_file_metadata(hf_hub_url("org/xet", "model.safetensors"), token=True)
assert found.xet_file_data is not None
[listed] = HfApi().get_paths_info("org/xet", ["model.safetensors"])
assert listed.xet_hash == found.xet_file_data.file_hash
print(hf_hub_download("org/xet", "model.safetensors"))
"""


def test_a_file_that_the_cdn_refuses_is_there_over_xet(hub: HubServer, tmp_path: Path) -> None:
    hub.create("org/xet", {})
    hub.set(xet_cas=f"local://{tmp_path}/cas")
    (tmp_path / "data").write_bytes(LARGE)
    environment = {**os.environ, **hub.environment(home=tmp_path / "home"), "HF_HUB_DISABLE_XET": "0"}

    def run(*arguments: str) -> list[str]:
        done = subprocess.run(
            [sys.executable, "-c", *arguments],
            env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    sha256, xet_hash = run(XET_UPLOAD, str(tmp_path / "data"))
    assert hub.files("org/xet")["model.safetensors"].sha256 == sha256 == hashlib.sha256(LARGE).hexdigest()
    hub.set(cdn_refuses=[sha256])
    hub.register_xet(sha256, xet_hash)
    assert get(location(hub, "org/xet", "model.safetensors")).status == 400
    [path] = run(XET_DOWNLOAD)
    assert Path(path).read_bytes() == LARGE
    assert [entry.status for entry in at_cdn(hub)] == [400]
