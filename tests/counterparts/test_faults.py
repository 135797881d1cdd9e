"""Every fault as a plain client sees it: a fault that does not happen as described would prove nothing of our readers
and writers."""

from __future__ import annotations

import contextlib
import functools
import gzip
import http.client
import json
import os
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import urllib3
from botocore.exceptions import ClientError, ConnectionClosedError

from tests.counterparts.faults import Exchange, Fault, FaultProxy
from tests.counterparts.s3 import S3Server
from tests.counterparts.tcp import Plan, TcpProxy

BUCKET = "raymerge"
DATA = os.urandom(1 << 20)


@dataclass(frozen=True)
class Seen:
    """What came over the wire until the server ended the connection."""

    status: int | None
    headers: dict[str, str]
    body: bytes
    was_reset: bool


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    (folder / "a").write_bytes(DATA)
    (folder / "b c").write_bytes(DATA[:10])
    (folder / "empty").write_bytes(b"")
    return folder


@pytest.fixture(scope="module")
def started(folder: Path) -> Iterator[FaultProxy]:
    with FaultProxy.start(folder=folder) as proxy:
        yield proxy


@pytest.fixture
def proxy(started: FaultProxy) -> FaultProxy:
    started.clear()
    started.forget()
    return started


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    with S3Server.start() as server:
        yield server


@pytest.fixture(scope="module")
def before_s3(s3: S3Server) -> Iterator[FaultProxy]:
    with FaultProxy.start(s3.endpoint, objects=s3.objects) as proxy:
        yield proxy


@pytest.fixture
def clients(before_s3: FaultProxy, s3: S3Server) -> Iterator[tuple[Any, Any]]:
    """A client that goes through the proxy, and one that does not. The bucket holds `a`, which is DATA."""
    before_s3.clear()
    s3.empty(BUCKET)
    through, direct = s3.client(endpoint=before_s3.endpoint), s3.client()
    direct.put_object(Bucket=BUCKET, Key="a", Body=DATA)
    before_s3.forget()
    yield through, direct
    through.close()
    direct.close()


def read_until_silence(connection: socket.socket) -> bytes:
    received = b""
    with contextlib.suppress(TimeoutError):
        while piece := connection.recv(1 << 16):
            received += piece
        raise AssertionError("the connection ended")
    return received


def address(endpoint: str) -> tuple[str, int]:
    host, _, port = endpoint.partition("://")[2].partition(":")
    return host, int(port)


def talk(endpoint: str, request: bytes, *, seconds: float = 20) -> Seen:
    """Send these bytes and read until the other side ends the connection."""
    received, was_reset = b"", False
    with socket.create_connection(address(endpoint), seconds) as connection:
        connection.sendall(request)
        try:
            while piece := connection.recv(1 << 16):
                received += piece
        except ConnectionResetError:
            was_reset = True
    head, _, body = received.partition(b"\r\n\r\n")
    first, *fields = head.decode().split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in fields)}
    return Seen(int(first.split()[1]) if first else None, headers, body, was_reset)


def get(proxy: FaultProxy, path: str = "/a", *, range_: str | None = "1000-1999", method: str = "GET") -> Seen:
    asked = f"Range: bytes={range_}\r\n" if range_ else ""
    return talk(proxy.endpoint, f"{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{asked}\r\n".encode())


def told(proxy: FaultProxy) -> list[tuple[int | None, int, str | None]]:
    return [(entry.status, entry.sent_bytes, entry.fault) for entry in proxy.log()]


PLAIN = (206, 1000, None)
"""What the log says of `get` where nothing was done to it."""


# ---- a plain server --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "asked, start, end",
    [("0-0", 0, 1), ("5-1000004", 5, 1000005), ("1048575-", 1048575, 1048576), ("-10", 1048566, 1048576)],
)
def test_a_folder_is_served_in_ranges(proxy: FaultProxy, asked: str, start: int, end: int) -> None:
    seen = get(proxy, range_=asked)
    assert (seen.status, seen.body, seen.was_reset) == (206, DATA[start:end], False)
    assert seen.headers["content-range"] == f"bytes {start}-{end - 1}/{len(DATA)}"
    assert seen.headers["content-length"] == str(end - start)


def test_a_folder_is_served_whole(proxy: FaultProxy) -> None:
    seen = get(proxy, range_=None)
    assert (seen.status, seen.body, "content-range" in seen.headers) == (200, DATA, False)
    head = get(proxy, range_=None, method="HEAD")
    assert (head.status, head.body, head.headers["content-length"]) == (200, b"", str(len(DATA)))
    assert head.headers["etag"] == seen.headers["etag"]
    assert get(proxy, "/b%20c", range_=None).body == DATA[:10]
    assert get(proxy, "/empty", range_=None).body == b""


@pytest.mark.parametrize(
    "path", ["/missing", "/../../../../etc/passwd", "/%2e%2e/%2e%2e/%2e%2e/%2e%2e/etc/passwd", "/"]
)
def test_a_folder_gives_its_files_and_no_others(proxy: FaultProxy, path: str) -> None:
    assert get(proxy, path).status == 404


def test_a_range_past_the_end_is_416(proxy: FaultProxy) -> None:
    seen = get(proxy, range_="1048576-1048577")
    assert (seen.status, seen.headers["content-range"]) == (416, "bytes */1048576")


def test_an_etag_holds_until_the_file_changes(proxy: FaultProxy, folder: Path) -> None:
    (folder / "pinned").write_bytes(b"before")
    with urllib3.PoolManager(retries=False) as pool:
        ask = functools.partial(pool.request, "GET", f"{proxy.endpoint}/pinned")
        etag = ask().headers["ETag"]
        assert ask(headers={"If-Match": etag}).data == b"before"
        assert ask(headers={"If-None-Match": etag}).status == 304
        (folder / "pinned").write_bytes(b"after")
        assert ask(headers={"If-Match": etag}).status == 412
        assert ask(headers={"If-None-Match": etag}).data == b"after"


def test_a_connection_is_used_again(proxy: FaultProxy) -> None:
    connection = http.client.HTTPConnection(*address(proxy.endpoint), timeout=20)
    for _ in range(3):
        connection.request("GET", "/a", headers={"Range": "bytes=0-9"})
        assert connection.getresponse().read() == DATA[:10]
    connection.close()
    assert len({entry.connection for entry in proxy.log()}) == 1


# ---- which requests, and how many ------------------------------------------------------------------------------------


def test_a_fault_bites_after_so_many_and_so_often(proxy: FaultProxy) -> None:
    proxy.add(Fault("status", after=1, times=2))
    assert [get(proxy).status for _ in range(5)] == [206, 503, 503, 206, 206]
    assert told(proxy) == [PLAIN, (503, 0, "status"), (503, 0, "status"), PLAIN, PLAIN]


def test_a_fault_may_bite_always_until_it_is_cleared(proxy: FaultProxy) -> None:
    proxy.add(Fault("status", times=None))
    assert [get(proxy).status for _ in range(4)] == [503] * 4
    proxy.clear()
    assert get(proxy).status == 206


@pytest.mark.parametrize(
    "fault, bites",
    [
        (Fault("status", method="HEAD|PUT"), [False, False, True, False]),
        (Fault("status", path=r"b%20c$"), [False, False, False, True]),
        (Fault("status", query="(^|&)part=2(&|$)"), [False, True, False, False]),
        (Fault("status", range_only=True), [True, False, False, False]),
    ],
)
def test_a_fault_is_for_the_requests_it_names(proxy: FaultProxy, fault: Fault, bites: list[bool]) -> None:
    proxy.add(fault)
    seen = [
        get(proxy),
        get(proxy, "/a?part=2", range_=None),
        get(proxy, range_=None, method="HEAD"),
        get(proxy, "/b%20c", range_=None),
    ]
    assert [each.status == 503 for each in seen] == bites


def test_faults_take_turns_in_the_order_they_were_added(proxy: FaultProxy) -> None:
    proxy.add(Fault("status"), Fault("cut", at=10), Fault("reset"))
    assert [get(proxy).status for _ in range(4)] == [503, 206, None, 206]
    assert [entry.fault for entry in proxy.log()] == ["status", "cut", "reset", None]


def test_a_fault_that_cannot_bite_is_not_used_up(proxy: FaultProxy) -> None:
    proxy.add(Fault("short"), Fault("cut", at=0, path="empty"))
    assert get(proxy, range_=None).status == 200
    assert get(proxy, "/missing").status == 404
    assert get(proxy, "/empty", range_=None).status == 200
    assert len(get(proxy).body) == 500
    assert [entry.fault for entry in proxy.log()] == [None, None, None, "short"]


@pytest.mark.parametrize("wrong", [{"kind": "nonsense"}, {"kind": "cut"}, {"kind": "slow"}, {"kind": "delay"}])
def test_a_fault_without_its_details_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"needs|no fault is called"):
        Fault(**wrong)


def test_the_log_tells_what_was_asked(proxy: FaultProxy) -> None:
    talk(proxy.endpoint, b"PUT /x%20y?n=1&m HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 5\r\n\r\n01234")
    [entry] = proxy.log()
    headers = {"host": "x", "connection": "close", "content-length": "5"}
    assert entry == Exchange(
        connection=entry.connection,
        method="PUT",
        path="/x%20y",
        query="n=1&m",
        range=None,
        headers=headers,
        status=405,
        upstream_status=405,
        sent_bytes=len("only GET and HEAD"),
        received_bytes=5,
        fault=None,
    )


def test_one_can_wait_for_exchanges(proxy: FaultProxy) -> None:
    proxy.add(Fault("status", path="/b"))
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(proxy.wait_for, 1, method="GET", path="/b", fault="status")
        get(proxy)
        get(proxy, "/b", method="HEAD")
        assert not waiting.done()
        proxy.add(Fault("status", path="/b"))
        get(proxy, "/b")
        assert [entry.path for entry in waiting.result(20)] == ["/b"]
    with pytest.raises(TimeoutError):
        proxy.wait_for(4, seconds=0.05)


# ---- the kinds -------------------------------------------------------------------------------------------------------


def test_status_gives_code_headers_and_an_s3_or_a_plain_body(proxy: FaultProxy) -> None:
    proxy.add(Fault("status", code=429, headers={"Retry-After": "7", "RateLimit": '"resolvers";r=0;t=7'}, body="no"))
    proxy.add(Fault("status", code=403, error="AccessDenied"))
    limited, denied = get(proxy), get(proxy)
    assert (limited.status, limited.body) == (429, b"no")
    assert (limited.headers["retry-after"], limited.headers["ratelimit"]) == ("7", '"resolvers";r=0;t=7')
    assert (denied.status, denied.headers["content-type"]) == (403, "application/xml")
    assert b"<Code>AccessDenied</Code>" in denied.body
    assert proxy.log()[0].upstream_status is None


@pytest.mark.parametrize("at, sent", [(0, 0), (10, 10), (-1, 999), (5000, 999)])
def test_cut_ends_the_body_before_its_promised_length(proxy: FaultProxy, at: int, sent: int) -> None:
    proxy.add(Fault("cut", at=at))
    seen = get(proxy)
    assert (seen.status, seen.headers["content-length"]) == (206, "1000")
    assert (seen.body, seen.was_reset) == (DATA[1000 : 1000 + sent], False)
    assert told(proxy) == [(206, sent, "cut")]


def test_cut_far_into_a_body_lets_all_before_it_through(proxy: FaultProxy) -> None:
    proxy.add(Fault("cut", at=700_001))
    assert get(proxy, range_=None).body == DATA[:700_001]


def test_reset_before_the_answer(proxy: FaultProxy) -> None:
    proxy.add(Fault("reset"))
    assert get(proxy) == Seen(None, {}, b"", was_reset=True)
    assert told(proxy) == [(None, 0, "reset")]


@pytest.mark.parametrize("at", [0, 1, 999, 900_000])
def test_reset_within_the_body(proxy: FaultProxy, at: int) -> None:
    proxy.add(Fault("reset", at=at))
    seen = get(proxy, range_="1000-")
    assert seen.was_reset
    assert seen.body == DATA[1000 : 1000 + at]
    assert told(proxy) == [(206, at, "reset")]


def test_unsized_promises_nothing_and_ends(proxy: FaultProxy) -> None:
    proxy.add(Fault("unsized", at=400), Fault("unsized"))
    for wanted in (400, 1000):
        seen = get(proxy)
        assert seen.status == 206
        assert not {"content-length", "transfer-encoding"} & set(seen.headers)
        assert (seen.headers["connection"], seen.was_reset) == ("close", False)
        assert seen.body == DATA[1000 : 1000 + wanted]


@pytest.mark.parametrize("at", [None, 0, 600])
def test_stall_is_silence_until_it_is_cleared(proxy: FaultProxy, at: int | None) -> None:
    proxy.add(Fault("stall", at=at))
    with socket.create_connection(address(proxy.endpoint), 20) as connection:
        connection.sendall(b"GET /a HTTP/1.1\r\nHost: x\r\nConnection: close\r\nRange: bytes=0-999\r\n\r\n")
        proxy.wait_for(1, fault="stall")
        connection.settimeout(0.1)
        received = read_until_silence(connection)
        body = received.partition(b"\r\n\r\n")[2]
        assert (body, received == b"") == (DATA[: at or 0], at is None)
        proxy.clear()
        connection.settimeout(20)
        while piece := connection.recv(1 << 16):
            received += piece
        assert received.partition(b"\r\n\r\n")[2] == DATA[:1000]


def test_stall_ends_after_its_seconds(proxy: FaultProxy) -> None:
    proxy.add(Fault("stall", at=600, seconds=0.2))
    began = time.monotonic()
    assert get(proxy).body == DATA[1000:2000]
    assert time.monotonic() - began >= 0.2


def test_delay_comes_before_the_answer_and_changes_nothing(proxy: FaultProxy) -> None:
    proxy.add(Fault("delay", seconds=0.1, up_to=0.15))
    began = time.monotonic()
    assert get(proxy).body == DATA[1000:2000]
    assert time.monotonic() - began >= 0.1
    assert told(proxy) == [(206, 1000, "delay")]


def test_slow_limits_each_connection_by_itself(proxy: FaultProxy) -> None:
    proxy.add(Fault("slow", bytes_per_second=2e6, times=None))
    began = time.monotonic()
    with ThreadPoolExecutor(4) as pool:
        seen = list(pool.map(lambda _: get(proxy, range_=None).body, range(4)))
    elapsed = time.monotonic() - began
    assert seen == [DATA] * 4
    assert len(DATA) / 2e6 <= elapsed < 3 * len(DATA) / 2e6


def test_latency_stacks_with_another_fault(proxy: FaultProxy) -> None:
    proxy.add(Fault("delay", seconds=0.05, times=None), Fault("slow", bytes_per_second=1e6, times=None))
    proxy.add(Fault("cut", at=100_000))
    began = time.monotonic()
    assert get(proxy, range_=None).body == DATA[:100_000]
    assert time.monotonic() - began >= 0.15
    assert told(proxy) == [(200, 100_000, "cut")]


def test_whole_is_200_with_everything(proxy: FaultProxy) -> None:
    proxy.add(Fault("whole"))
    seen = get(proxy)
    assert (seen.status, seen.body, seen.headers["content-length"]) == (200, DATA, str(len(DATA)))
    assert "content-range" not in seen.headers


@pytest.mark.parametrize(
    "claim, content_range",
    [("sent", "bytes 1007-2006/1048576"), ("asked", "bytes 1000-1999/1048576"), ("start", "bytes 1007-1999/1048576")],
)
def test_shifted_gives_other_bytes(proxy: FaultProxy, claim: Any, content_range: str) -> None:
    proxy.add(Fault("shifted", shift=7, claim=claim))
    seen = get(proxy)
    assert (seen.status, seen.body, seen.headers["content-length"]) == (206, DATA[1007:2007], "1000")
    assert seen.headers["content-range"] == content_range


def test_shifted_turns_back_at_the_end_and_says_when_it_cannot(proxy: FaultProxy) -> None:
    proxy.add(Fault("shifted", times=2))
    assert get(proxy, range_="1047576-").headers["content-range"] == "bytes 1047575-1048574/1048576"
    impossible = get(proxy, range_="0-")
    assert (impossible.status, b"cannot move" in impossible.body) == (500, True)


def test_short_gives_less_and_says_so(proxy: FaultProxy) -> None:
    proxy.add(Fault("short"), Fault("short", length=1))
    for length in (500, 1):
        seen = get(proxy)
        assert (seen.status, seen.body, seen.was_reset) == (206, DATA[1000 : 1000 + length], False)
        assert seen.headers["content-range"] == f"bytes 1000-{999 + length}/1048576"
        assert seen.headers["content-length"] == str(length)


def test_etag_is_another(proxy: FaultProxy) -> None:
    plain = get(proxy)
    proxy.add(Fault("etag", etag='"other"', headers={"X-Linked-Etag": '"other"'}))
    seen = get(proxy)
    assert seen.headers == plain.headers | {"etag": '"other"', "x-linked-etag": '"other"'}
    assert seen.body == plain.body


def test_total_is_another(proxy: FaultProxy) -> None:
    proxy.add(Fault("total", method="GET"), Fault("total", method="HEAD", total=5))
    assert get(proxy, range_=None).status == 200  # no total to change
    seen = get(proxy)
    assert (seen.headers["content-range"], seen.body) == ("bytes 1000-1999/1048577", DATA[1000:2000])
    assert get(proxy, range_=None, method="HEAD").headers["content-length"] == "5"


@pytest.mark.parametrize("at, where", [(None, 0), (500, 500), (-1, 999), (5000, 999)])
def test_flip_changes_one_bit(proxy: FaultProxy, at: int | None, where: int) -> None:
    proxy.add(Fault("flip", at=at))
    seen = get(proxy)
    changed = [(i, a ^ b) for i, (a, b) in enumerate(zip(seen.body, DATA[1000:2000], strict=True)) if a != b]
    assert changed == [(where, 1)]


def test_gzip_is_what_nobody_asked_for(proxy: FaultProxy) -> None:
    proxy.add(Fault("gzip"))
    seen = get(proxy)
    assert (seen.status, seen.headers["content-encoding"]) == (206, "gzip")
    assert (gzip.decompress(seen.body), seen.headers["content-length"]) == (DATA[1000:2000], str(len(seen.body)))


def test_redirect_leads_elsewhere(proxy: FaultProxy) -> None:
    proxy.add(Fault("redirect", location="http://127.0.0.1:1/elsewhere"))
    seen = get(proxy)
    assert (seen.status, seen.headers["location"], seen.body) == (307, "http://127.0.0.1:1/elsewhere", b"")


# ---- before a real server --------------------------------------------------------------------------------------------


def put(client: Any, key: str, data: bytes = b"x", **more: Any) -> str:
    """The code of the answer, or the name of the failure."""
    try:
        client.put_object(Bucket=BUCKET, Key=key, Body=data, **more)
    except ClientError as error:
        return str(error.response["Error"]["Code"])
    except ConnectionClosedError:
        return "closed"
    return "ok"


def test_signed_requests_pass_with_their_bodies(clients: tuple[Any, Any], before_s3: FaultProxy) -> None:
    through, direct = clients
    data = os.urandom(9 << 20)
    through.put_object(Bucket=BUCKET, Key="b c/ü", Body=data)
    assert direct.get_object(Bucket=BUCKET, Key="b c/ü")["Body"].read() == data
    assert through.get_object(Bucket=BUCKET, Key="b c/ü", Range="bytes=5-5000004")["Body"].read() == data[5:5000005]
    assert through.list_objects_v2(Bucket=BUCKET)["KeyCount"] == 2
    assert through.head_object(Bucket=BUCKET, Key="a")["ContentLength"] == len(DATA)
    [upload] = [entry for entry in before_s3.log() if entry.method == "PUT"]
    assert (upload.received_bytes, upload.upstream_status, upload.status) == (len(data), 200, 200)


def test_a_refusal_reaches_a_client_with_a_large_body(clients: tuple[Any, Any], before_s3: FaultProxy) -> None:
    through, _ = clients
    assert put(through, "a", bytes(20 << 20), IfNoneMatch="*") == "PreconditionFailed"
    assert put(through, "b") == "ok"


def test_a_chunked_body_passes(clients: tuple[Any, Any], before_s3: FaultProxy) -> None:
    """Signed URLs may be used by clients that do not know the length beforehand."""
    through, direct = clients
    url = through.generate_presigned_url("put_object", {"Bucket": BUCKET, "Key": "b"})
    pieces = [b"one", b"", b"two" * 100_000]
    answer = urllib3.request("PUT", url, body=(piece for piece in pieces), retries=False)
    assert answer.status == 200, answer.data
    assert direct.get_object(Bucket=BUCKET, Key="b")["Body"].read() == b"".join(pieces)
    assert before_s3.log()[-1].received_bytes == 300_003


@pytest.mark.parametrize("is_signed_in_headers", [False, True])
def test_faults_of_ranges_hold_whatever_the_signature_covers(
    clients: tuple[Any, Any], before_s3: FaultProxy, is_signed_in_headers: bool
) -> None:
    through, _ = clients
    before_s3.add(Fault("whole"), Fault("shifted", shift=7), Fault("short", length=3))
    seen: list[tuple[int, bytes]] = []
    for _ in range(4):
        if is_signed_in_headers:
            answer = through.get_object(Bucket=BUCKET, Key="a", Range="bytes=1000-1999")
            seen.append((answer["ResponseMetadata"]["HTTPStatusCode"], answer["Body"].read()))
        else:
            url = through.generate_presigned_url("get_object", {"Bucket": BUCKET, "Key": "a"})
            plain = urllib3.request("GET", url, headers={"Range": "bytes=1000-1999"}, retries=False)
            seen.append((plain.status, plain.data))
    assert seen == [(200, DATA), (206, DATA[1007:2007]), (206, DATA[1000:1003]), (206, DATA[1000:2000])]


def test_lost_takes_effect_and_tells_nobody(clients: tuple[Any, Any], before_s3: FaultProxy) -> None:
    through, direct = clients
    before_s3.add(Fault("lost", method="PUT"))
    assert put(through, "b", b"first", IfNoneMatch="*") == "closed"
    assert direct.get_object(Bucket=BUCKET, Key="b")["Body"].read() == b"first"
    assert put(through, "b", b"second", IfNoneMatch="*") == "PreconditionFailed"
    lost, _ = before_s3.log()
    assert (lost.status, lost.upstream_status, lost.fault) == (None, 200, "lost")


def test_a_status_may_hide_that_the_request_took_effect(clients: tuple[Any, Any], before_s3: FaultProxy) -> None:
    through, direct = clients
    before_s3.add(Fault("status", code=500, error="InternalError", method="PUT"))
    before_s3.add(Fault("status", code=503, error="SlowDown", method="PUT", forward=True))
    assert put(through, "b") == "InternalError"
    assert direct.list_objects_v2(Bucket=BUCKET)["KeyCount"] == 1
    assert put(through, "b") == "SlowDown"
    assert direct.list_objects_v2(Bucket=BUCKET)["KeyCount"] == 2


def test_error200_is_a_completion_that_did_not_complete(
    clients: tuple[Any, Any], before_s3: FaultProxy, s3: S3Server
) -> None:
    through, _ = clients
    upload = {
        "Bucket": BUCKET,
        "Key": "b",
        "UploadId": through.create_multipart_upload(Bucket=BUCKET, Key="b")["UploadId"],
    }
    part = {"PartNumber": 1, "ETag": through.upload_part(**upload, PartNumber=1, Body=b"x")["ETag"]}
    before_s3.add(Fault("error200", method="POST", query="uploadId="))
    with pytest.raises(ClientError, match="InternalError"):
        through.complete_multipart_upload(**upload, MultipartUpload={"Parts": [part]})
    assert (before_s3.log()[-1].status, before_s3.log()[-1].fault) == (200, "error200")
    assert len(s3.uploads(BUCKET)) == 1
    through.complete_multipart_upload(**upload, MultipartUpload={"Parts": [part]})
    assert s3.keys(BUCKET) == ("a", "b")


def test_reset_before_the_answer_keeps_the_request_from_the_server(
    clients: tuple[Any, Any], before_s3: FaultProxy, s3: S3Server
) -> None:
    through, _ = clients
    before_s3.add(Fault("reset", method="PUT"))
    assert put(through, "b", bytes(1 << 20)) == "closed"
    assert s3.keys(BUCKET) == ("a",)


def test_what_an_upstream_redirects_to_is_met_through_a_proxy_too(folder: Path) -> None:
    with (
        FaultProxy.start(folder=folder) as origin,
        FaultProxy.start(folder=folder) as cdn,
        FaultProxy.start(origin.endpoint, rewrite={"http://cdn.invalid": cdn.endpoint}) as proxy,
    ):
        origin.add(Fault("redirect", location="http://cdn.invalid/a?n=1"))
        assert get(proxy).headers["location"] == f"{cdn.endpoint}/a?n=1"


def test_an_upstream_that_is_gone_is_502() -> None:
    with FaultProxy.start("http://127.0.0.1:1") as proxy:
        assert (get(proxy).status, proxy.log()[0].upstream_status) == (502, None)


def test_it_runs_in_the_foreground_and_is_told_over_its_control_port(folder: Path) -> None:
    command = [sys.executable, "-m", "tests.counterparts.faults", "--folder", str(folder)]
    process = subprocess.Popen(
        [*command, "--fault", '{"kind": "status", "code": 418}'],
        cwd=Path(__file__).parents[2],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        words = process.stdout.readline().replace(",", "").replace(";", "").split()
        endpoint, control = (word for word in words if word.startswith("http://"))
        with urllib3.PoolManager(retries=False, timeout=20) as pool:
            assert pool.request("GET", f"{endpoint}/b%20c").status == 418
            assert pool.request("POST", f"{control}/faults", body=json.dumps({"kind": "cut"})).status == 400
            assert pool.request("POST", f"{control}/faults", body=json.dumps({"kind": "flip"})).status == 200
            assert pool.request("GET", f"{endpoint}/b%20c").data[1:] == DATA[1:10]
            assert [entry["fault"] for entry in pool.request("GET", f"{control}/log").json()] == ["status", "flip"]
    finally:
        process.terminate()
        process.communicate()


def test_it_ends_with_the_process_that_started_it() -> None:
    program = """
import sys
from tests.counterparts.faults import FaultProxy
proxy = FaultProxy.start("http://127.0.0.1:1")
print(proxy.endpoint, proxy._process.pid, flush=True)
sys.stdin.read()
"""
    parent = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[2],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    endpoint, pid = parent.stdout.readline().split()
    ended = os.pidfd_open(int(pid))
    parent.kill()
    parent.communicate()
    assert select.select([ended], [], [], 20)[0]
    os.close(ended)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address(endpoint), 20)


# ---- TCP -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def tcp(proxy: FaultProxy) -> Iterator[TcpProxy]:
    """Before a plain server of DATA."""
    with TcpProxy.start(proxy.endpoint) as tcp:
        yield tcp


ASK = b"GET /a HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


def received(tcp: TcpProxy, *, seconds: float = 20) -> tuple[int, str]:
    """How many bytes came over a connection of its own, and how it ended."""
    count = 0
    try:
        with socket.create_connection(address(tcp.endpoint), seconds) as connection:
            connection.sendall(ASK)
            while piece := connection.recv(1 << 16):
                count += len(piece)
    except TimeoutError:
        return count, "silence"
    except (ConnectionResetError, BrokenPipeError):  # as early as in connect()
        return count, "reset"
    return count, "fin"


def test_tcp_passes_everything_and_counts(tcp: TcpProxy) -> None:
    seen = talk(tcp.endpoint, ASK)
    assert (seen.status, seen.body) == (200, DATA)
    assert talk(tcp.endpoint, ASK).body == DATA
    assert (tcp.connections, tcp.bytes_up) == (2, 2 * len(ASK))
    assert tcp.bytes_down > 2 * len(DATA)


@pytest.mark.parametrize("end", ["fin", "reset", "silence"])
@pytest.mark.parametrize("after", [0, 1, 300_000])
def test_tcp_ends_a_connection_after_so_many_bytes(tcp: TcpProxy, end: Any, after: int) -> None:
    tcp.plan(Plan(end=end, after=after))
    assert received(tcp, seconds=0.3 if end == "silence" else 20) == (after, end)
    assert received(tcp)[1] == "fin"


@pytest.mark.parametrize("end", ["fin", "reset"])
def test_tcp_ends_a_connection_in_the_middle_of_a_request(tcp: TcpProxy, proxy: FaultProxy, end: Any) -> None:
    tcp.plan(Plan(end=end, after=10, direction="up"))
    assert received(tcp) == (0, end)
    assert tcp.bytes_up == 10
    assert proxy.log() == []


def test_tcp_delays_and_slows(tcp: TcpProxy) -> None:
    tcp.plan(Plan(delay_seconds=0.2))
    tcp.always(Plan(bytes_per_second=5e6))
    for least in (0.2, 0.2):
        began = time.monotonic()
        assert received(tcp)[1] == "fin"
        assert time.monotonic() - began >= least


def test_tcp_refuses_and_accepts_again(tcp: TcpProxy) -> None:
    tcp.refuse()
    with pytest.raises(ConnectionRefusedError):
        received(tcp)
    tcp.accept()
    assert received(tcp)[1] == "fin"


def test_tcp_stops_accepting_and_accepts_again(tcp: TcpProxy) -> None:
    tcp.stop_accepting()
    with pytest.raises(TimeoutError):
        socket.create_connection(address(tcp.endpoint), 0.2)
    assert tcp.connections == 0
    tcp.accept()
    assert received(tcp)[1] == "fin"


def test_tcp_is_a_black_hole_until_it_accepts_again(tcp: TcpProxy, proxy: FaultProxy) -> None:
    with socket.create_connection(address(tcp.endpoint), 20) as connection:
        tcp.wait_for_connections(1)
        tcp.black_hole()
        connection.sendall(ASK)
        connection.settimeout(0.1)
        with pytest.raises(TimeoutError):
            connection.recv(1)
        assert received(tcp, seconds=0.1) == (0, "silence")
        assert proxy.log() == []
        tcp.accept()
        connection.settimeout(20)
        assert connection.recv(12) == b"HTTP/1.1 200"


def test_tcp_drops_what_is_open(tcp: TcpProxy) -> None:
    with socket.create_connection(address(tcp.endpoint), 20) as connection:
        tcp.wait_for_connections(1)
        assert tcp.drop() == 1
        with pytest.raises(ConnectionResetError):
            connection.recv(1)
    assert received(tcp)[1] == "fin"


def test_tcp_before_a_server_that_is_gone_resets() -> None:
    with TcpProxy.start("127.0.0.1:1") as tcp:
        assert received(tcp) == (0, "reset")


def test_tcp_passes_signed_requests(s3: S3Server) -> None:
    with TcpProxy.start(s3.endpoint) as tcp:
        client = s3.client(endpoint=tcp.endpoint)
        threads = [
            threading.Thread(target=client.put_object, kwargs={"Bucket": BUCKET, "Key": f"t/{n}", "Body": DATA})
            for n in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert len(s3.keys(BUCKET, "t/")) == 4
        client.close()
