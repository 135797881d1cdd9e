"""Publishing into repositories: the real huggingface_hub against a Hub of our own."""

from __future__ import annotations

import hashlib
import os
import pickle
import random
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, constants

from merger.errors import MergeFailedError, OutputExistsError, PlanError, RaymergeError, SourceError
from merger.storage import hub_sink
from merger.storage.base import FileLayout, RangeRead, Sink, Store, read_whole
from merger.storage.filled import FilledSink
from merger.storage.hub_sink import HubSink, _Content, open_hub_output
from merger.storage.local import LocalStore
from merger.storage.memory import MemoryStore
from merger.storage.multipart import MultipartSink
from merger.storage.s3 import S3Store
from tests.conformance.remote import enter_hub
from tests.counterparts.faults import Fault, FaultProxy
from tests.counterparts.hub import ROOT, HubServer, LoggedRequest, Settings
from tests.counterparts.s3 import S3Server

# The client's upload of LFS objects tells httpx2 so.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

PREFIX = b"header: "
LARGE = {
    "model-00001-of-00002.safetensors": PREFIX + random.Random(1).randbytes(400_000),
    "model-00002-of-00002.safetensors": PREFIX + random.Random(2).randbytes(300_000),
}
SMALL = {
    "README.md": b"---\ntags: [merge]\n---\n",
    "config.json": b"{}",
    "raymerge.json": b'{"a": 1}\n',
    "empty.txt": b"",
}


@pytest.fixture
def hub(hub_server: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """The module's Hub, behaving as a new one, and this process as one that uses it with a token that writes."""
    enter_hub(monkeypatch, hub_server, tmp_path / "cache")
    monkeypatch.setenv("RAYMERGE_HTTP_FIRST_WAIT_SECONDS", "0.01")
    hub_server.clear_log()
    yield hub_server
    hub_server.set(**{slot: getattr(Settings(), slot) for slot in Settings.__slots__})


@pytest.fixture
def repo(request: pytest.FixtureRequest) -> str:
    """The name of a repository that is not there."""
    return f"org/{hashlib.sha1(request.node.name.encode()).hexdigest()[:12]}"


@pytest.fixture(params=["local", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> LocalStore | MemoryStore:
    """Where files are staged: as paths, and where the client has to be handed open files."""
    return LocalStore(str(tmp_path / "run")) if request.param == "local" else MemoryStore(str(tmp_path))


@pytest.fixture
def run(tmp_path: Path) -> LocalStore:
    return LocalStore(str(tmp_path / "run"))


def sink_of(place: LocalStore | MemoryStore, repo: str, revision: str | None = None, subfolder: str = "") -> HubSink:
    return HubSink(FilledSink(place), place, repo, revision, subfolder)


def layouts(files: Mapping[str, bytes]) -> list[FileLayout]:
    return [FileLayout(name, len(data), data[: len(PREFIX)], (0,)) for name, data in files.items()]


def fill(sink: Sink, files: Mapping[str, bytes]) -> None:
    writer = sink.writer()
    for name, data in files.items():
        for start in range(len(PREFIX), len(data), 100_000):
            writer.write(name, start, memoryview(data)[start : start + 100_000])
    writer.flush()


def seal(sink: Sink, *names: str) -> None:
    """As a worker that has the sink by pickle."""
    worker = pickle.loads(pickle.dumps(sink))
    for name in names:
        sink.sealed(name, pickle.loads(pickle.dumps(worker.seal(name))))


def finish(sink: Sink, large: Mapping[str, bytes], small: Mapping[str, bytes]) -> None:
    for name, data in small.items():
        sink.stage(name, data)
    for name in (*large, *small):
        sink.publish(name)
    sink.conclude("a merge")


def merge(sink: Sink, large: Mapping[str, bytes] = LARGE, small: Mapping[str, bytes] = SMALL) -> None:
    """A whole run."""
    sink.probe()
    sink.begin(layouts(large))
    fill(sink, large)
    seal(sink, *large)
    finish(sink, large, small)


def content(hub: HubServer, repo: str, revision: str = "main") -> dict[str, bytes]:
    names = hub.files(repo, revision)
    return {name: hub.read(repo, name, revision) for name in names if name != ".gitattributes"}


def uploads(hub: HubServer) -> list[LoggedRequest]:
    return [entry for entry in hub.log() if entry.method == "PUT" and entry.status == 200]


def commits(hub: HubServer) -> list[LoggedRequest]:
    return [entry for entry in hub.log() if "/commit/" in entry.path]


def code(caught: pytest.ExceptionInfo[RaymergeError]) -> str:
    return caught.value.problems[0].code


# ---- a whole run -----------------------------------------------------------------------------------------------------


def test_one_commit_publishes_everything_into_a_repository_that_is_made_private(
    hub: HubServer, repo: str, place: LocalStore | MemoryStore
) -> None:
    sink = sink_of(place, repo)
    sink.probe()
    with pytest.raises(RuntimeError):
        hub.head(repo)  # the probe has made nothing
    merge(sink)
    assert content(hub, repo) == {**LARGE, **SMALL}
    assert [title for _, title in hub.history(repo)][:-1] == ["a merge"]
    assert sink.commit == hub.head(repo)
    assert hub.guard(repo) == (True, False)
    assert sorted(entry.bytes_received for entry in uploads(hub)) == sorted(map(len, LARGE.values()))
    assert place.list_files() == ()
    assert {entry.authorization for entry in hub.log() if entry.origin == "cdn"} == {False}


def test_a_repository_is_public_only_when_that_was_asked_for(hub: HubServer, repo: str, run: LocalStore) -> None:
    merge(HubSink(FilledSink(run), run, repo, private=False, commit_message="mine"))
    assert hub.guard(repo) == (False, False)
    assert hub.history(repo)[0][1] == "mine"


def test_a_large_file_is_uploaded_in_parts_without_being_held(
    hub: HubServer, repo: str, place: LocalStore | MemoryStore
) -> None:
    hub.set(multipart_from_bytes=1, part_bytes=150_000)
    merge(sink_of(place, repo))
    assert content(hub, repo) == {**LARGE, **SMALL}
    assert max(entry.bytes_received for entry in uploads(hub)) == 150_000


def test_what_the_hub_wants_inside_the_commit_is_there_too(hub: HubServer, repo: str, run: LocalStore) -> None:
    """A file that grew like a large one, under a name that large storage is not for."""
    large = {"notes.txt": PREFIX + b"text", "a.safetensors": PREFIX}
    merge(sink_of(run, repo), large)
    assert content(hub, repo) == {**large, **SMALL}
    assert [entry.bytes_received for entry in uploads(hub)] == [len(PREFIX)]


SEAL = """
import pickle, sys
sink, names = pickle.load(sys.stdin.buffer)
sys.stdout.buffer.write(pickle.dumps([sink.seal(name) for name in names]))
"""


def test_a_worker_seals_with_its_own_token(hub: HubServer, repo: str, run: LocalStore, tmp_path: Path) -> None:
    sink = sink_of(run, repo)
    sink.probe()
    sink.begin(layouts(LARGE))
    fill(sink, LARGE)
    sent = pickle.dumps((sink, list(LARGE)))
    environment = {**os.environ, **hub.environment(home=tmp_path / "home")}
    done = subprocess.run(
        [sys.executable, "-c", SEAL], input=sent, env=environment, cwd=ROOT, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    for told in (sent, done.stdout, done.stderr):
        assert hub.write_token.encode() not in told
        assert b"Signature" not in told
    assert len(done.stdout) < 10_000
    for name, outcome in zip(LARGE, pickle.loads(done.stdout), strict=True):
        sink.sealed(name, outcome)
    finish(sink, LARGE, SMALL)
    assert content(hub, repo) == {**LARGE, **SMALL}


OVER_XET = """
import sys
from merger.storage.base import FileLayout
from merger.storage.filled import FilledSink
from merger.storage.hub_sink import HubSink
from merger.storage.local import LocalStore
repo, folder = sys.argv[1:]
run, data = LocalStore(folder), bytes(range(256)) * 5000
sink = HubSink(FilledSink(run), run, repo)
sink.probe()
sink.begin([FileLayout("model.safetensors", len(data), b"", (0,))])
sink.writer().write("model.safetensors", 0, memoryview(data))
sink.sealed("model.safetensors", sink.seal("model.safetensors"))
sink.stage("raymerge.json", b"{}")
sink.publish("model.safetensors")
sink.publish("raymerge.json")
sink.conclude("a merge")
"""


def test_a_file_on_a_disk_goes_over_xet_where_the_hub_has_it(
    hub: HubServer, repo: str, run: LocalStore, tmp_path: Path
) -> None:
    hub.set(xet_cas=f"local://{tmp_path}/cas")
    environment = {**os.environ, **hub.environment(home=tmp_path / "home"), "HF_HUB_DISABLE_XET": "0"}
    line = [sys.executable, "-c", OVER_XET, repo, run.root]
    done = subprocess.run(line, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert hub.files(repo)["model.safetensors"].sha256 == hashlib.sha256(bytes(range(256)) * 5000).hexdigest()
    assert hub.read(repo, "raymerge.json") == b"{}"
    assert uploads(hub) == []


def test_files_staged_in_a_bucket_are_published_without_a_disk(
    hub: HubServer, repo: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with S3Server.start(tmp_path / "s3") as s3:
        for name, value in s3.environment().items():
            monkeypatch.setenv(name, value)
        store = S3Store("raymerge", "runs/one")
        merge(HubSink(MultipartSink(store, store), store, repo))
        assert content(hub, repo) == {**LARGE, **SMALL}
        assert store.list_files() == ()
        assert s3.uploads("raymerge") == ()


# ---- what was there before -------------------------------------------------------------------------------------------


def test_a_subfolder_leaves_the_rest_alone(hub: HubServer, repo: str, run: LocalStore) -> None:
    hub.create(repo, {"config.json": b"theirs", "sub/old.json": b"old"})
    sink = sink_of(run, repo, subfolder="sub")
    sink.remove("old.json")
    sink.remove("config.json")  # there is none in sub/
    merge(sink)
    assert content(hub, repo) == {"config.json": b"theirs"} | {f"sub/{n}": d for n, d in (LARGE | SMALL).items()}


def test_files_of_an_earlier_merge_go_with_the_same_commit(hub: HubServer, repo: str, run: LocalStore) -> None:
    hub.create(repo, {"old.safetensors": b"old", "config.json": b"old", "theirs.txt": b"t"})
    sink = sink_of(run, repo)
    for name in ("old.safetensors", "config.json", "was-never-there.txt"):
        sink.remove(name)
    merge(sink)
    assert content(hub, repo) == {"theirs.txt": b"t", **LARGE, **SMALL}
    assert len(commits(hub)) == 1


def test_the_same_files_again_are_no_error(hub: HubServer, repo: str, run: LocalStore) -> None:
    merge(sink_of(run, repo))
    merge(sink_of(run, repo))
    assert content(hub, repo) == {**LARGE, **SMALL}
    assert len(uploads(hub)) == len(LARGE)


@pytest.mark.parametrize("branch", ["v2", "a/branch"])
def test_a_branch_is_made_where_the_repository_is_empty(
    hub: HubServer, repo: str, run: LocalStore, branch: str
) -> None:
    merge(sink_of(run, repo, branch))
    assert content(hub, repo, branch) == {**LARGE, **SMALL}
    assert content(hub, repo) == {}


def test_a_branch_that_would_begin_with_other_files_is_refused(hub: HubServer, repo: str, run: LocalStore) -> None:
    hub.create(repo, {"config.json": b"{}"})
    with pytest.raises(PlanError) as caught:
        sink_of(run, repo, "v2").probe()
    assert code(caught) == "no-such-branch"
    merge(sink_of(run, repo, "v2", "sub"))
    assert set(content(hub, repo, "v2")) == {"config.json"} | {f"sub/{name}" for name in LARGE | SMALL}


def test_a_tag_and_a_commit_are_no_places_to_publish(hub: HubServer, repo: str, run: LocalStore) -> None:
    hub.create(repo, {})
    hub.point_tag(repo, "v1", hub.head(repo))
    for revision in ("v1", hub.head(repo)):
        with pytest.raises(PlanError) as caught:
            sink_of(run, repo, revision).probe()
        assert code(caught) == "not-a-branch"


# ---- others, and accidents -------------------------------------------------------------------------------------------


def begun(sink: Sink, large: Mapping[str, bytes] = LARGE) -> Sink:
    """A run up to where its files are sealed."""
    sink.probe()
    sink.begin(layouts(large))
    fill(sink, large)
    seal(sink, *large)
    return sink


def test_a_branch_that_moved_is_left_as_it_is(hub: HubServer, repo: str, run: LocalStore) -> None:
    hub.create(repo, {})
    sink = begun(sink_of(run, repo))
    theirs = hub.commit(repo, {"config.json": b"theirs", "raymerge.json": b"theirs"})
    with pytest.raises(OutputExistsError) as caught:
        finish(sink, LARGE, SMALL)
    assert code(caught) == "output-exists"
    assert hub.head(repo) == theirs


def test_of_two_runs_of_one_merge_the_second_finds_it_done(hub: HubServer, repo: str, tmp_path: Path) -> None:
    hub.create(repo, {})
    first, second = (begun(sink_of(LocalStore(str(tmp_path / name)), repo)) for name in ("1", "2"))
    finish(first, LARGE, {**SMALL, "raymerge-report.json": b"1 second"})
    finish(second, LARGE, {**SMALL, "raymerge-report.json": b"2 seconds"})
    assert content(hub, repo)["raymerge-report.json"] == b"1 second"
    assert len(hub.history(repo)) == 3  # made, filled from outside, ours
    assert LocalStore(str(tmp_path / "2")).list_files() == ()


def test_of_two_merges_that_make_the_repository_at_once_one_wins(hub: HubServer, repo: str, tmp_path: Path) -> None:
    sinks = [sink_of(LocalStore(str(tmp_path / name)), repo) for name in ("1", "2")]
    for sink in sinks:
        sink.probe()
    first, second = (begun(sink) for sink in sinks)
    finish(first, LARGE, SMALL)
    with pytest.raises(OutputExistsError):
        finish(second, LARGE, {**SMALL, "raymerge.json": b"another"})
    assert content(hub, repo) == {**LARGE, **SMALL}


def test_a_commit_whose_answer_was_lost_is_made_once(hub: HubServer, repo: str, run: LocalStore) -> None:
    sink = begun(sink_of(run, repo))
    hub.set(lose_next_commit_answer=True)
    finish(sink, LARGE, SMALL)
    assert content(hub, repo) == {**LARGE, **SMALL}
    assert len(commits(hub)) == 1
    assert len(hub.history(repo)) == 2
    assert run.list_files() == ()


def test_a_commit_that_never_arrived_is_made_again(hub: HubServer, repo: str, run: LocalStore) -> None:
    with FaultProxy.start(hub.endpoint) as proxy:
        sink = HubSink(FilledSink(run), run, repo, endpoint=proxy.endpoint)
        begun(sink)
        proxy.add(Fault("reset", path="/commit/"), Fault("status", path="/commit/", code=503))
        finish(sink, LARGE, SMALL)
    assert content(hub, repo) == {**LARGE, **SMALL}
    assert len(hub.history(repo)) == 2


def test_a_run_that_was_killed_before_the_commit_uploads_nothing_twice(
    hub: HubServer, repo: str, place: LocalStore | MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun(sink_of(place, repo))
    hub.clear_log()
    monkeypatch.setattr(hub_sink, "_SMALL_BYTES", 1000)  # nor is a large file ever held
    sink = sink_of(place, repo)
    sink.probe()
    sink.begin(layouts(LARGE))
    assert sink.published() == set(LARGE)
    for name, data in LARGE.items():
        assert sink.holds(name, 8, len(data), hashlib.sha256(data[8:]).hexdigest())
    finish(sink, LARGE, SMALL)
    assert content(hub, repo) == {**LARGE, **SMALL}
    assert uploads(hub) == []


def test_a_seal_may_be_repeated(hub: HubServer, repo: str, run: LocalStore) -> None:
    sink = begun(sink_of(run, repo))
    seal(sink, *LARGE)
    finish(sink, LARGE, SMALL)
    assert content(hub, repo) == {**LARGE, **SMALL}
    assert len(uploads(hub)) == len(LARGE)


def test_a_file_that_is_grown_again_is_uploaded_again(hub: HubServer, repo: str, run: LocalStore) -> None:
    begun(sink_of(run, repo))
    sink = sink_of(run, repo)
    sink.probe()
    sink.begin(layouts(LARGE))
    name = next(iter(LARGE))
    large = {**LARGE, name: PREFIX + bytes(400_000)}
    sink.reopen(name)
    fill(sink, {name: large[name]})
    seal(sink, name)
    finish(sink, large, SMALL)
    assert content(hub, repo) == {**large, **SMALL}


def test_an_upload_that_stumbles_is_repeated_and_tells_no_address(
    hub: HubServer, repo: str, run: LocalStore, caplog: pytest.LogCaptureFixture
) -> None:
    with FaultProxy.start(hub.cdn_endpoint) as proxy:
        hub.set(cdn_endpoint=proxy.endpoint)
        proxy.add(Fault("status", method="PUT", code=503))
        merge(sink_of(run, repo))
    assert content(hub, repo) == {**LARGE, **SMALL}
    assert "503" in caplog.text  # the client says so
    assert "Signature" not in caplog.text


def test_an_upload_that_is_refused_fails_the_merge_and_tells_no_address(
    hub: HubServer, repo: str, run: LocalStore
) -> None:
    with FaultProxy.start(hub.cdn_endpoint) as proxy:
        hub.set(cdn_endpoint=proxy.endpoint)
        proxy.add(Fault("status", method="PUT", code=403, times=None))
        with pytest.raises(MergeFailedError) as caught:
            begun(sink_of(run, repo))
    assert code(caught) == "forbidden"
    assert "Signature" not in str(caught.value)


def test_a_commit_without_all_its_files_is_no_success(hub: HubServer, repo: str, run: LocalStore) -> None:
    merge(sink_of(run, repo))
    sink = begun(sink_of(run, repo))
    assert isinstance(sink, HubSink)
    before = hub.head(repo)
    hub.commit(repo, {"config.json": b"changed on the way"})
    with pytest.raises(MergeFailedError) as caught:
        sink._check_published(hub.head(repo), _wanted())
    assert code(caught) == "publish-incomplete"
    assert "config.json" in str(caught.value)
    sink._check_published(before, _wanted())


def _wanted() -> dict[str, _Content]:
    return {name: _Content.of(CommitOperationAdd(name, data)) for name, data in (LARGE | SMALL).items()}


# ---- who may -----------------------------------------------------------------------------------------------------


def test_a_token_that_may_not_write_is_refused_before_anything_is_made(
    hub: HubServer, repo: str, run: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    for token in (hub.read_token, "", "hf_nobodys0123456789"):
        monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(PlanError) as caught:
            sink_of(run, repo).probe()
        assert code(caught) == "forbidden"
        assert "nobodys" not in str(caught.value)
    with pytest.raises(RuntimeError):
        hub.head(repo)
    assert run.list_files() == ()


def test_a_token_that_lost_its_right_midway_fails_the_merge(
    hub: HubServer, repo: str, run: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink = begun(sink_of(run, repo))
    monkeypatch.setenv("HF_TOKEN", hub.read_token)
    with pytest.raises(MergeFailedError) as caught:
        finish(sink, LARGE, SMALL)
    assert code(caught) == "forbidden"
    assert content(hub, repo) == {}


def test_offline_nothing_is_published(
    hub: HubServer, repo: str, run: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(PlanError) as caught:
        sink_of(run, repo).probe()
    assert code(caught) == "offline"


def test_a_worker_that_does_not_reach_the_staging_place_says_so(hub: HubServer, repo: str, run: LocalStore) -> None:
    sink = begun(sink_of(run, repo))
    run.remove(next(iter(LARGE)))
    with pytest.raises(MergeFailedError) as caught:
        sink.seal(next(iter(LARGE)))
    assert code(caught) == "no-such-file"


def test_what_is_abandoned_leaves_the_staging_place_empty(hub: HubServer, repo: str, run: LocalStore) -> None:
    sink = begun(sink_of(run, repo))
    sink.stage("config.json", b"{}")
    sink.abandon([*LARGE, "config.json"])
    assert run.list_files() == ()


# ---- the output as it is ---------------------------------------------------------------------------------------------


def test_an_output_is_what_its_branch_holds_now(hub: HubServer, repo: str, run: LocalStore) -> None:
    output = open_hub_output(repo, None)
    assert isinstance(output, Store)
    assert (output.uri, output.list_files()) == (f"hf://{repo}", ())
    with pytest.raises(SourceError) as caught:
        output.stat("config.json")
    assert code(caught) == "no-such-file"
    hub.create(repo, {})
    assert output.list_files() == ()  # .gitattributes alone is nothing
    merge(sink_of(run, repo))
    assert output.list_files() == tuple(sorted(LARGE | SMALL))
    assert read_whole(output, "config.json", limit=9) == b"{}"
    hub.commit(repo, {"config.json": b"[]"})
    assert read_whole(output, "config.json", limit=9) == b"[]"
    assert open_hub_output(repo, "v9", "sub").list_files() == ()
    assert open_hub_output(repo, "v9", "sub").uri == f"hf://{repo}@v9/sub"
    buffer = bytearray(2)
    open_hub_output(repo, "main").read_into("config.json", [RangeRead(0, memoryview(buffer))])
    assert buffer == b"[]"
