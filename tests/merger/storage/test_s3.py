"""S3Store against an S3: pins, races, lost answers, and errors that say what is wrong and no secret."""

from __future__ import annotations

import itertools
import pickle
import random
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Mapping

import pytest

from merger.errors import InfrastructureError, MergeFailedError, RaymergeError, SourceChangedError, SourceError
from merger.storage.base import RangeRead, WritableStore, read_whole
from merger.storage.s3 import HEAD_BYTES, S3Settings, S3Store
from tests.counterparts.faults import Exchange, Fault, FaultProxy
from tests.counterparts.s3 import READ, S3Server

BUCKET = "raymerge"
_fresh = itertools.count()


def enter(patch: pytest.MonkeyPatch, environment: Mapping[str, str]) -> None:
    """Let this process be one that has only these AWS settings."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION"):
        patch.delenv(name, raising=False)
    for name, value in environment.items():
        patch.setenv(name, value)


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, s3: S3Server, proxy: FaultProxy) -> None:
    enter(monkeypatch, s3.environment(endpoint=proxy.endpoint))
    monkeypatch.setenv("RAYMERGE_HTTP_ATTEMPTS", "3")
    monkeypatch.setenv("RAYMERGE_HTTP_FIRST_WAIT_SECONDS", "0.001")
    monkeypatch.setenv("RAYMERGE_HTTP_LONGEST_WAIT_SECONDS", "0.01")


@pytest.fixture
def store(proxy: FaultProxy) -> S3Store:
    """A prefix of one test alone."""
    return S3Store(BUCKET, f"s3/{next(_fresh)}")


def code(error: pytest.ExceptionInfo[RaymergeError]) -> str:
    return error.value.problems[0].code


def get(store: S3Store, name: str, start: int, count: int, *, pin: str | None = None) -> bytes:
    buffer = bytearray(count)
    store.read_into(name, [RangeRead(start, memoryview(buffer))], pin=pin)
    return bytes(buffer)


def requests(proxy: FaultProxy, method: str) -> list[Exchange]:
    return [exchange for exchange in proxy.log() if exchange.method == method]


# ---- a store ---------------------------------------------------------------------------------------------------------


def test_it_is_a_store(store: S3Store) -> None:
    assert isinstance(store, WritableStore)
    assert store.uri == f"s3://{BUCKET}/{store.prefix}"
    assert S3Store(BUCKET).uri == f"s3://{BUCKET}"
    assert S3Store(BUCKET, "/a/b/") == S3Store(BUCKET, "a/b")
    assert hash(S3Store(BUCKET, "a")) == hash(S3Store(BUCKET, "a/"))
    assert store.free_bytes() is None
    assert store.remote


def test_a_pickled_store_is_small_and_holds_no_secret(store: S3Store, s3: S3Server) -> None:
    store.put("a", b"abc")
    assert read_whole(store, "a", limit=3) == b"abc"
    data = pickle.dumps(store)
    assert s3.key.secret.encode() not in data
    assert s3.key.access.encode() not in data
    assert len(data) < 400
    assert pickle.loads(data) == store
    assert read_whole(pickle.loads(data), "a", limit=3) == b"abc"


def test_names_are_those_below_the_prefix(store: S3Store, s3: S3Server) -> None:
    for name in ("b/c", "a", "b/a/x", "z.json", "ü 1+2%20&?", "b/.raymerge/x"):
        store.put(name, b"1")
    s3.client().put_object(Bucket=BUCKET, Key=f"{store.prefix}-beside/a", Body=b"")
    s3.client().put_object(Bucket=BUCKET, Key=f"{store.prefix}/folder/", Body=b"")
    assert store.list_files() == ("a", "b/.raymerge/x", "b/a/x", "b/c", "z.json", "ü 1+2%20&?")
    assert set(store.list_stats("b/a")) == {"b/a/x"}
    assert store.list_stats("b")["b/c"].size == 1
    assert get(store, "ü 1+2%20&?", 0, 1) == b"1"
    assert f"{store.prefix}/a" in S3Store(BUCKET).list_files()


def test_a_listing_of_many_pages(store: S3Store, s3: S3Server) -> None:
    names = [f"{n:04}" for n in range(1005)]
    client = s3.client()
    for name in names:
        client.put_object(Bucket=BUCKET, Key=f"{store.prefix}/{name}", Body=b"")
    assert store.list_files() == tuple(names)


def test_put_replaces_and_remove_may_be_repeated(store: S3Store) -> None:
    store.put("d/a", b"1")
    store.put("d/a", b"22")
    assert read_whole(store, "d/a", limit=9) == b"22"
    store.remove("d/a")
    store.remove("d/a")
    assert store.list_files() == ()


def test_an_empty_file(store: S3Store) -> None:
    store.put("a", b"")
    assert store.stat("a").size == 0
    assert read_whole(store, "a", limit=0) == b""
    assert get(store, "a", 0, 0) == b""


def test_no_name_leaves_the_prefix(store: S3Store) -> None:
    for name in ("../a", "/a", "", "a/../../b", "a\\b"):
        uses: list[Callable[[], object]] = [
            lambda name=name: store.stat(name),  # type: ignore[misc]
            lambda name=name: store.put(name, b""),  # type: ignore[misc]
            lambda name=name: store.remove(name),  # type: ignore[misc]
            lambda name=name: get(store, name, 0, 0),  # type: ignore[misc]
        ]
        for use in uses:
            with pytest.raises(SourceError) as caught:
                use()
            assert code(caught) == "path-escapes"


# ---- pins ------------------------------------------------------------------------------------------------------------


def test_a_pin_holds_while_the_object_does(store: S3Store, s3: S3Server) -> None:
    data = random.Random(0).randbytes(1 << 20)
    store.put("a", data)
    pin = store.stat("a").pin
    assert pin.startswith("s3:")
    assert get(store, "a", 1000, 500_000, pin=pin) == data[1000:501_000]
    s3.client().put_object(Bucket=BUCKET, Key=f"{store.prefix}/a", Body=data[::-1])
    for count in (1, 500_000, 0):
        with pytest.raises(SourceChangedError) as caught:
            get(store, "a", 0, count, pin=pin)
        assert code(caught) == "source-changed"
    assert get(store, "a", 0, 9) == data[::-1][:9]
    s3.client().delete_object(Bucket=BUCKET, Key=f"{store.prefix}/a")
    for count in (1, 0):
        with pytest.raises(SourceChangedError):
            get(store, "a", 0, count, pin=pin)


def test_a_fresh_store_knows_a_pin_and_asks_for_the_size_once(store: S3Store, proxy: FaultProxy) -> None:
    store.put("a", bytes(1000))
    pin = store.stat("a").pin
    other = S3Store(store.bucket, store.prefix)
    proxy.forget()
    for start in (100, 200, 300):
        get(other, "a", start, 10, pin=pin)
    assert len(requests(proxy, "HEAD")) == 1
    store.put("a", bytes(1001))
    with pytest.raises(SourceChangedError):
        get(S3Store(store.bucket, store.prefix), "a", 100, 10, pin=pin)
    store.remove("a")
    with pytest.raises(SourceChangedError):
        get(S3Store(store.bucket, store.prefix), "a", 100, 10, pin=pin)


def test_what_was_resolved_is_not_asked_for_again(store: S3Store, proxy: FaultProxy) -> None:
    for name in ("a", "b"):
        store.put(name, bytes(1000))
    store.resolve(["a", "b", "a"])
    other = pickle.loads(pickle.dumps(store))
    pins = {name: store.stat(name).pin for name in ("a", "b")}
    proxy.forget()
    for name, pin in pins.items():
        get(other, name, 100, 10, pin=pin)
    assert requests(proxy, "HEAD") == []
    with pytest.raises(SourceError):
        store.resolve(["a", "missing"])


def test_an_object_that_changes_between_the_look_and_the_read_is_looked_at_again(
    store: S3Store, proxy: FaultProxy
) -> None:
    store.put("a", bytes(1000))
    proxy.add(Fault("status", method="GET", code=412))
    assert get(store, "a", 100, 10) == bytes(10)
    assert len(requests(proxy, "HEAD")) == 2


def test_a_versioned_object_is_read_in_the_version_that_was_pinned(s3: S3Server) -> None:
    client = s3.client()
    client.create_bucket(Bucket="versions")
    client.put_bucket_versioning(Bucket="versions", VersioningConfiguration={"Status": "Enabled"})
    store = S3Store("versions", "p")
    store.put("a", b"first")
    pin = store.stat("a").pin
    store.put("a", b"second!")
    assert pin.count(":") == 2
    assert get(store, "a", 0, 5, pin=pin) == b"first"
    assert get(S3Store("versions", "p"), "a", 1, 3, pin=pin) == b"irs"
    assert get(store, "a", 0, 7) == b"second!"
    store.remove("a")
    assert get(S3Store("versions", "p"), "a", 1, 3, pin=pin) == b"irs"
    client.delete_object(Bucket="versions", Key="p/a", VersionId=pin.split(":")[2])
    with pytest.raises(SourceChangedError):
        get(S3Store("versions", "p"), "a", 0, 5, pin=pin)


@pytest.mark.parametrize("kind", ["cut", "short", "shifted", "whole", "total", "etag"])
def test_a_wrong_answer_is_never_taken(store: S3Store, proxy: FaultProxy, kind: str) -> None:
    data = random.Random(1).randbytes(100_000)
    store.put("a", data)
    pin = store.stat("a").pin
    proxy.add(Fault(kind, method="GET", range_only=True, at=5))  # type: ignore[arg-type]
    if kind in {"total", "etag"}:
        with pytest.raises(SourceChangedError):
            get(store, "a", 10_000, 50_000, pin=pin)
    else:
        assert get(store, "a", 10_000, 50_000, pin=pin) == data[10_000:60_000]


def test_a_read_past_the_end(store: S3Store) -> None:
    store.put("a", b"0123456789")
    for start, count in ((0, 11), (10, 1), (1 << 40, 1)):
        with pytest.raises(SourceError) as caught:
            get(store, "a", start, count)
        assert code(caught) == "truncated"
    assert get(store, "a", 10, 0) == b""


# ---- the start of a file ---------------------------------------------------------------------------------------------


def test_a_header_is_read_in_one_request(store: S3Store, proxy: FaultProxy) -> None:
    data = random.Random(2).randbytes(HEAD_BYTES + 20_000)
    store.put("a", data)
    pin = store.stat("a").pin
    proxy.forget()
    assert get(store, "a", 0, 8, pin=pin) == data[:8]
    assert get(store, "a", 8, 200_000, pin=pin) == data[8:200_008]
    assert [exchange.range for exchange in requests(proxy, "GET")] == [f"bytes=0-{HEAD_BYTES - 1}"]
    assert get(store, "a", 200_008, 70_000, pin=pin) == data[200_008:270_008]  # not all of it in what was fetched
    assert len(requests(proxy, "GET")) == 2


def test_bytes_of_one_version_are_not_given_for_another(store: S3Store) -> None:
    store.put("a", b"A" * 100)
    pin = store.stat("a").pin
    assert get(store, "a", 0, 8, pin=pin) == b"A" * 8
    store.put("a", b"B" * 100)
    assert get(store, "a", 8, 8) == b"B" * 8
    with pytest.raises(SourceChangedError):
        get(store, "a", 0, 8, pin=pin)


# ---- races and lost answers ------------------------------------------------------------------------------------------


def race(count: int, put: Callable[[int], None]) -> list[int]:
    """Who is not refused, of so many that begin at once."""
    start = threading.Barrier(count)
    won: list[int] = []

    def take(number: int) -> None:
        start.wait()
        try:
            put(number)
        except FileExistsError:
            return
        won.append(number)

    threads = [threading.Thread(target=take, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return won


def test_of_many_exclusive_puts_one_wins(store: S3Store) -> None:
    won = race(8, lambda number: store.put("lease", str(number).encode(), exclusive=True))
    assert len(won) == 1
    assert read_whole(store, "lease", limit=9) == str(won[0]).encode()


def test_of_many_that_replace_one_version_one_wins(store: S3Store) -> None:
    store.put("lease", b"old")
    pin = store.stat("lease").pin
    won = race(8, lambda number: store.put("lease", str(number).encode(), replacing=pin))
    assert len(won) == 1
    assert read_whole(store, "lease", limit=9) == str(won[0]).encode()


def test_replacing_what_is_gone_is_refused(store: S3Store) -> None:
    store.put("lease", b"old")
    pin = store.stat("lease").pin
    store.remove("lease")
    with pytest.raises(FileExistsError):
        store.put("lease", b"new", replacing=pin)
    assert store.list_files() == ()


@pytest.mark.parametrize("kind", ["exclusive", "replacing"])
def test_a_put_whose_answer_is_lost_knows_its_own_object(store: S3Store, proxy: FaultProxy, kind: str) -> None:
    pin = None
    if kind == "replacing":
        store.put("lease", b"old")
        pin = store.stat("lease").pin
    proxy.add(Fault("lost", method="PUT"))
    store.put("lease", b"mine", exclusive=pin is None, replacing=pin)
    assert read_whole(store, "lease", limit=9) == b"mine"
    assert [exchange.status for exchange in requests(proxy, "PUT")][-2:] == [None, 412]
    with pytest.raises(FileExistsError):
        store.put("lease", b"mine", exclusive=pin is None, replacing=pin)


def test_a_put_whose_first_attempt_never_arrived_may_lose(store: S3Store, proxy: FaultProxy) -> None:
    store.put("lease", b"another's", exclusive=True)
    proxy.add(Fault("reset", method="PUT"))
    with pytest.raises(FileExistsError):
        store.put("lease", b"mine", exclusive=True)
    assert read_whole(store, "lease", limit=9) == b"another's"


@pytest.mark.parametrize(
    "fault",
    [
        Fault("status", method="PUT", code=500), Fault("status", method="PUT", code=503, error="SlowDown"),
        Fault("status", method="PUT", code=409, error="ConditionalRequestConflict"), Fault("error200", method="PUT"),
        Fault("status", method="PUT", code=400, error="BadDigest"), Fault("etag", method="PUT"),
        Fault("status", method="PUT", code=403),
    ],
    ids=lambda fault: f"{fault.kind} {fault.code or ''}",
)  # fmt: skip
def test_a_put_is_repeated(store: S3Store, proxy: FaultProxy, fault: Fault) -> None:
    proxy.add(fault)
    store.put("a", b"abc", exclusive=True)
    assert read_whole(store, "a", limit=3) == b"abc"


@pytest.mark.parametrize(
    "method, use",
    [
        ("GET", lambda store: store.list_files()),
        ("HEAD", lambda store: store.stat("a")),
        ("DELETE", lambda store: store.remove("a")),
    ],
    ids=["list", "stat", "remove"],
)
@pytest.mark.parametrize("fault", ["reset", "status", "lost"])
def test_a_small_request_is_repeated(
    store: S3Store, proxy: FaultProxy, method: str, use: Callable[[S3Store], object], fault: str
) -> None:
    store.put("a", b"abc")
    proxy.forget()
    proxy.add(Fault(fault, method=method, code=503))  # type: ignore[arg-type]
    use(store)
    assert [exchange.fault for exchange in requests(proxy, method)] == [fault, None]
    proxy.forget()
    proxy.add(Fault(fault, method=method, code=500, times=None))  # type: ignore[arg-type]
    with pytest.raises(InfrastructureError):
        use(store)
    assert 3 <= len(requests(proxy, method)) <= 6  # the client repeats some by itself, on used connections


# ---- errors ----------------------------------------------------------------------------------------------------------


def told(error: pytest.ExceptionInfo[RaymergeError], *secrets: str) -> str:
    text = "".join(traceback.format_exception(error.value))
    assert "Signature" not in text
    assert "http://" not in text
    assert "botocore" not in text
    for secret in secrets:
        assert secret not in text
    return str(error.value)


def test_a_missing_file_is_named(store: S3Store) -> None:
    store.put("a", b"x")
    for look in (lambda: store.stat("b"), lambda: get(store, "b", 0, 1), lambda: get(store, "b", 0, 0)):
        with pytest.raises(SourceError) as caught:
            look()
        assert code(caught) == "no-such-file"
        assert f"{store.uri}/b" in told(caught)


def test_a_missing_bucket_is_named(store: S3Store) -> None:
    other = S3Store("no-bucket-of-ours", "p")
    reads: list[Callable[[], object]] = [other.list_files, lambda: other.stat("a"), lambda: get(other, "a", 0, 1)]
    for read in reads:
        with pytest.raises(SourceError) as caught:
            read()
        assert code(caught) == "no-such-bucket"
        assert "no-bucket-of-ours" in told(caught)
    with pytest.raises(MergeFailedError) as failed:
        other.put("a", b"")
    assert code(failed) == "no-such-bucket"


def test_a_key_without_rights_is_forbidden(
    store: S3Store, s3: S3Server, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put("a", b"abc")
    key = s3.add_key(f"reader-{next(_fresh)}", READ)
    enter(monkeypatch, s3.environment(key, proxy.endpoint))
    pin = store.stat("a").pin
    assert get(store, "a", 1, 2, pin=pin) == b"bc"
    uses: list[Callable[[], object]] = [
        lambda: store.put("a", b"new"),
        lambda: store.put("b", b"new", exclusive=True),
        lambda: store.remove("a"),
    ]
    for use in uses:
        with pytest.raises(MergeFailedError) as failed:
            use()
        assert code(failed) == "forbidden"
        told(failed, key.access, key.secret)
    s3.revoke(key)
    looks: list[Callable[[], object]] = [
        store.list_files,
        lambda: store.stat("a"),
        lambda: get(store, "a", 1, 2, pin=pin),
        lambda: get(store, "a", 1, 2),
    ]
    for look in looks:
        with pytest.raises(SourceError) as caught:
            look()
        assert code(caught) == "forbidden"
        told(caught, key.access, key.secret)


def test_a_wrong_secret_is_forbidden(store: S3Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wr0ngSecret")
    with pytest.raises(SourceError) as caught:
        store.stat("a")
    assert code(caught) == "forbidden"
    told(caught, "wr0ngSecret")


def test_without_credentials_what_is_public_can_be_read(
    store: S3Store, s3: S3Server, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put("a", b"abc")
    s3.client().create_bucket(Bucket="public")
    policy = (
        '{"Version":"2012-10-17","Statement":[{"Effect":"Allow","Principal":"*",'
        '"Action":["s3:GetObject","s3:ListBucket"],"Resource":["arn:aws:s3:::public","arn:aws:s3:::public/*"]}]}'
    )
    s3.client().put_bucket_policy(Bucket="public", Policy=policy)
    s3.client().put_object(Bucket="public", Key="p/a", Body=b"abc")
    without = {k: v for k, v in s3.environment(endpoint=proxy.endpoint).items() if "KEY" not in k}
    enter(monkeypatch, without)
    open_to_all = S3Store("public", "p")
    assert open_to_all.list_files() == ("a",)
    assert get(open_to_all, "a", 0, 3, pin=open_to_all.stat("a").pin) == b"abc"
    with pytest.raises(SourceError) as caught:
        store.stat("a")
    assert code(caught) == "forbidden"
    assert "no credentials in the environment" in told(caught)


@pytest.mark.parametrize(
    "settings, word",
    [
        ({"AWS_PROFILE": "nobody"}, "no-credentials"),
        ({"AWS_ACCESS_KEY_ID": "half"}, "no-credentials"),
        ({"AWS_ENDPOINT_URL": "127.0.0.1"}, "bad-reference"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_used_are_named(
    store: S3Store, s3: S3Server, monkeypatch: pytest.MonkeyPatch, settings: dict[str, str], word: str
) -> None:
    without = {k: v for k, v in s3.environment().items() if "KEY" not in k}
    enter(monkeypatch, without | settings)
    for look in (store.list_files, lambda: store.stat("a")):
        with pytest.raises(SourceError) as caught:
            look()
        assert code(caught) == word
        told(caught)


def test_an_endpoint_where_nobody_listens_is_worth_a_retry(store: S3Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    uses: list[Callable[[], object]] = [store.list_files, lambda: store.stat("a"), lambda: store.put("a", b"")]
    for use in uses:
        with pytest.raises(InfrastructureError) as caught:
            use()
        told(caught)


def test_a_signed_address_is_used_again_and_renewed_when_it_is_refused(store: S3Store, proxy: FaultProxy) -> None:
    store.put("a", bytes(10_000))
    pin = store.stat("a").pin
    proxy.forget()
    get(store, "a", 5000, 10, pin=pin)
    get(store, "a", 6000, 10, pin=pin)
    first, second = requests(proxy, "GET")
    assert first.query == second.query
    proxy.add(Fault("status", method="GET", code=403, error="AccessDenied"))
    assert get(store, "a", 7000, 10, pin=pin) == bytes(10)


# ---- settings --------------------------------------------------------------------------------------------------------


def test_settings_travel_with_what_is_put(store: S3Store, proxy: FaultProxy) -> None:
    settings = S3Settings("key-1", "STANDARD_IA", (("team", "a b"), ("x", "1&2")))
    other = pickle.loads(pickle.dumps(S3Store(store.bucket, store.prefix, settings)))
    proxy.add(Fault("status", method="PUT", code=200))  # the server of this test knows no KMS
    other.put("a", b"abc")
    (asked,) = requests(proxy, "PUT")
    sent = {name: value for name, value in asked.headers.items() if name.startswith("x-amz-")}
    assert sent == {
        "x-amz-server-side-encryption": "aws:kms",
        "x-amz-server-side-encryption-aws-kms-key-id": "key-1",
        "x-amz-storage-class": "STANDARD_IA",
        "x-amz-tagging": "team=a+b&x=1%262",
    }
    assert settings.for_state() == S3Settings("key-1")


def test_tags_and_storage_class_reach_the_object(store: S3Store, s3: S3Server) -> None:
    S3Store(store.bucket, store.prefix, S3Settings(tags=(("team", "a b"),))).put("a", b"abc", exclusive=True)
    found = s3.client().get_object_tagging(Bucket=BUCKET, Key=f"{store.prefix}/a")
    assert found["TagSet"] == [{"Key": "team", "Value": "a b"}]


def test_an_etag_under_kms_is_no_md5(store: S3Store, proxy: FaultProxy) -> None:
    proxy.add(Fault("etag", method="PUT", times=None, headers={"x-amz-server-side-encryption": "aws:kms"}))
    store.put("a", b"abc")
    proxy.clear()
    proxy.add(Fault("etag", method="PUT", times=None))
    with pytest.raises(InfrastructureError):
        store.put("a", b"abc")


# ---- the process -----------------------------------------------------------------------------------------------------


def test_a_process_that_used_s3_ends_without_a_word(store: S3Store) -> None:
    script = (
        "from merger.storage.s3 import S3Store; from merger.storage.base import read_whole\n"
        f"store = S3Store({store.bucket!r}, {store.prefix!r}); store.put('a', b'abc')\n"
        "assert read_whole(store, 'a', limit=3) == b'abc'"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")


def test_many_threads_share_one_session(store: S3Store) -> None:
    data = random.Random(3).randbytes(50_000)
    store.put("a", data)
    wrong: list[int] = []

    def read(number: int) -> None:
        if get(store, "a", number * 100, 1000) != data[number * 100 : number * 100 + 1000]:
            wrong.append(number)

    threads = [threading.Thread(target=read, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
