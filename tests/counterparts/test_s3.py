"""The behaviours of S3 that raymerge builds on, shown on the S3 that its tests run against."""

from __future__ import annotations

import base64
import hashlib
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import urllib3
from botocore.exceptions import ClientError

from tests.counterparts.s3 import READ, WRITE, S3Server

BUCKET = "raymerge"
MIB = 1 << 20
DATA = bytes(range(256)) * 16
PART = os.urandom(5 * MIB)
"""The smallest part that may be followed by another."""


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    with S3Server.start() as server:
        yield server


@pytest.fixture
def client(s3: S3Server) -> Iterator[Any]:
    """A client of an empty bucket."""
    s3.empty(BUCKET)
    client = s3.client()
    yield client
    client.close()


@pytest.fixture
def http() -> Iterator[urllib3.PoolManager]:
    with urllib3.PoolManager(retries=False, timeout=20) as pool:
        yield pool


def refused(caught: pytest.ExceptionInfo[ClientError]) -> tuple[int, str]:
    answer = caught.value.response
    return answer["ResponseMetadata"]["HTTPStatusCode"], answer["Error"]["Code"]


def start_upload(client: Any, key: str = "a", parts: tuple[bytes, ...] = (PART, b"tail")) -> dict[str, Any]:
    """An upload with all its parts there. What complete_multipart_upload is to be called with."""
    upload = {
        "Bucket": BUCKET,
        "Key": key,
        "UploadId": client.create_multipart_upload(Bucket=BUCKET, Key=key)["UploadId"],
    }
    done = [
        {"PartNumber": n, "ETag": client.upload_part(**upload, PartNumber=n, Body=part)["ETag"]}
        for n, part in enumerate(parts, 1)
    ]
    return {**upload, "MultipartUpload": {"Parts": done}}


# ---- reads -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "asked, start, end",
    [("0-0", 0, 1), ("100-1099", 100, 1100), ("4000-", 4000, 4096), ("-96", 4000, 4096), ("4000-9999", 4000, 4096)],
)
def test_a_range_is_206_with_its_place_and_the_total(client: Any, asked: str, start: int, end: int) -> None:
    client.put_object(Bucket=BUCKET, Key="a", Body=DATA)
    answer = client.get_object(Bucket=BUCKET, Key="a", Range=f"bytes={asked}")
    assert answer["ResponseMetadata"]["HTTPStatusCode"] == 206
    assert answer["ContentRange"] == f"bytes {start}-{end - 1}/{len(DATA)}"
    assert answer["Body"].read() == DATA[start:end]


def test_a_range_past_the_end_is_416(client: Any) -> None:
    client.put_object(Bucket=BUCKET, Key="a", Body=DATA)
    with pytest.raises(ClientError) as caught:
        client.get_object(Bucket=BUCKET, Key="a", Range="bytes=4096-")
    assert refused(caught) == (416, "InvalidRange")


def test_if_match_holds_while_the_object_does(client: Any) -> None:
    before = client.put_object(Bucket=BUCKET, Key="a", Body=DATA)["ETag"]
    assert before == f'"{hashlib.md5(DATA).hexdigest()}"'
    assert client.get_object(Bucket=BUCKET, Key="a", IfMatch=before, Range="bytes=0-9")["Body"].read() == DATA[:10]
    client.put_object(Bucket=BUCKET, Key="a", Body=DATA[::-1])
    with pytest.raises(ClientError) as caught:
        client.get_object(Bucket=BUCKET, Key="a", IfMatch=before, Range="bytes=0-9")
    assert refused(caught) == (412, "PreconditionFailed")


def test_what_is_missing_is_named(client: Any) -> None:
    with pytest.raises(ClientError) as caught:
        client.get_object(Bucket=BUCKET, Key="missing")
    assert refused(caught) == (404, "NoSuchKey")
    with pytest.raises(ClientError) as caught:
        client.get_object(Bucket="missing", Key="a")
    assert refused(caught) == (404, "NoSuchBucket")
    with pytest.raises(ClientError) as caught:
        client.put_object(Bucket="missing", Key="a", Body=b"")
    assert refused(caught) == (404, "NoSuchBucket")


def test_a_listing_has_keys_sizes_and_etags_in_pages(client: Any) -> None:
    for n in range(7):
        client.put_object(Bucket=BUCKET, Key=f"p/{n}", Body=b"x" * n)
    client.put_object(Bucket=BUCKET, Key="q", Body=b"")
    pages = list(
        client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix="p/", PaginationConfig={"PageSize": 3})
    )
    assert [len(page["Contents"]) for page in pages] == [3, 3, 1]
    found = {entry["Key"]: (entry["Size"], entry["ETag"]) for page in pages for entry in page["Contents"]}
    assert found == {f"p/{n}": (n, f'"{hashlib.md5(b"x" * n).hexdigest()}"') for n in range(7)}


# ---- writes ----------------------------------------------------------------------------------------------------------


def test_of_racing_creations_one_wins(client: Any) -> None:
    start = threading.Barrier(8)

    def create(n: int) -> int:
        start.wait(20)
        try:
            client.put_object(Bucket=BUCKET, Key="lock", Body=b"%d" % n, IfNoneMatch="*")
        except ClientError as error:
            return int(error.response["ResponseMetadata"]["HTTPStatusCode"])
        return 200

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(create, range(8)))
    assert sorted(answers) == [200] + [412] * 7
    assert client.get_object(Bucket=BUCKET, Key="lock")["Body"].read() == b"%d" % answers.index(200)


def test_if_match_on_a_put_lets_one_holder_renew(client: Any) -> None:
    first = client.put_object(Bucket=BUCKET, Key="lease", Body=b"1")["ETag"]
    client.put_object(Bucket=BUCKET, Key="lease", Body=b"2", IfMatch=first)
    with pytest.raises(ClientError) as caught:
        client.put_object(Bucket=BUCKET, Key="lease", Body=b"3", IfMatch=first)
    assert refused(caught) == (412, "PreconditionFailed")
    assert client.get_object(Bucket=BUCKET, Key="lease")["Body"].read() == b"2"


def test_a_wrong_content_md5_is_refused(client: Any) -> None:
    right, wrong = (base64.b64encode(hashlib.md5(data).digest()).decode() for data in (DATA, b""))
    client.put_object(Bucket=BUCKET, Key="a", Body=DATA, ContentMD5=right)
    with pytest.raises(ClientError) as caught:
        client.put_object(Bucket=BUCKET, Key="b", Body=DATA, ContentMD5=wrong)
    assert refused(caught) == (400, "BadDigest")
    upload = client.create_multipart_upload(Bucket=BUCKET, Key="b")["UploadId"]
    with pytest.raises(ClientError) as caught:
        client.upload_part(Bucket=BUCKET, Key="b", UploadId=upload, PartNumber=1, Body=DATA, ContentMD5=wrong)
    assert refused(caught) == (400, "BadDigest")


def test_parts_in_any_order_make_the_object_and_its_etag(client: Any) -> None:
    upload = {
        "Bucket": BUCKET,
        "Key": "a",
        "UploadId": client.create_multipart_upload(Bucket=BUCKET, Key="a")["UploadId"],
    }
    parts = {1: PART, 2: PART[::-1], 3: b"tail"}
    tags = {n: client.upload_part(**upload, PartNumber=n, Body=parts[n])["ETag"] for n in (3, 1, 2)}
    assert tags == {n: f'"{hashlib.md5(part).hexdigest()}"' for n, part in parts.items()}
    listed = client.list_parts(**upload)["Parts"]
    assert [(part["PartNumber"], part["Size"], part["ETag"]) for part in listed] == [
        (n, len(part), tags[n]) for n, part in parts.items()
    ]
    client.complete_multipart_upload(
        **upload, MultipartUpload={"Parts": [{"PartNumber": n, "ETag": tags[n]} for n in parts]}
    )
    of_parts = hashlib.md5(b"".join(hashlib.md5(part).digest() for part in parts.values())).hexdigest()
    answer = client.get_object(Bucket=BUCKET, Key="a")
    assert answer["ETag"] == f'"{of_parts}-3"'
    assert answer["Body"].read() == b"".join(parts.values())


def test_a_part_sent_again_replaces_itself(client: Any) -> None:
    completion = start_upload(client, parts=(b"first",))
    again = client.upload_part(Bucket=BUCKET, Key="a", UploadId=completion["UploadId"], PartNumber=1, Body=b"second")[
        "ETag"
    ]
    completion["MultipartUpload"]["Parts"][0]["ETag"] = again
    client.complete_multipart_upload(**completion)
    assert client.get_object(Bucket=BUCKET, Key="a")["Body"].read() == b"second"


def test_a_small_part_before_another_is_refused(client: Any) -> None:
    with pytest.raises(ClientError) as caught:
        client.complete_multipart_upload(**start_upload(client, parts=(b"small", b"tail")))
    assert refused(caught) == (400, "EntityTooSmall")


def test_a_wrong_part_etag_is_refused(client: Any) -> None:
    completion = start_upload(client)
    completion["MultipartUpload"]["Parts"][0]["ETag"] = '"00000000000000000000000000000000"'
    with pytest.raises(ClientError) as caught:
        client.complete_multipart_upload(**completion)
    assert refused(caught) == (400, "InvalidPart")


def test_a_completion_that_must_create_is_412_where_an_object_stands(client: Any, s3: S3Server) -> None:
    client.complete_multipart_upload(**start_upload(client), IfNoneMatch="*")
    assert client.head_object(Bucket=BUCKET, Key="a")["ContentLength"] == len(PART) + 4
    second = start_upload(client, parts=(b"other",))
    with pytest.raises(ClientError) as caught:
        client.complete_multipart_upload(**second, IfNoneMatch="*")
    assert refused(caught) == (412, "PreconditionFailed")
    assert client.head_object(Bucket=BUCKET, Key="a")["ContentLength"] == len(PART) + 4
    assert [upload.upload_id for upload in s3.uploads(BUCKET)] == [second["UploadId"]]


def test_an_upload_is_listed_until_it_is_aborted_and_no_object_until_it_is_complete(client: Any, s3: S3Server) -> None:
    first, second = start_upload(client, "p/a"), start_upload(client, "q/b")
    assert [upload.key for upload in s3.uploads(BUCKET)] == ["p/a", "q/b"]
    assert [upload.upload_id for upload in s3.uploads(BUCKET, "p/")] == [first["UploadId"]]
    assert s3.keys(BUCKET) == ()
    client.abort_multipart_upload(Bucket=BUCKET, Key="p/a", UploadId=first["UploadId"])
    client.complete_multipart_upload(**second)
    assert s3.uploads(BUCKET) == ()
    assert s3.keys(BUCKET) == ("q/b",)
    with pytest.raises(ClientError) as caught:
        client.complete_multipart_upload(**first)
    assert refused(caught) == (404, "NoSuchUpload")


# ---- signed URLs over plain HTTP -------------------------------------------------------------------------------------


def test_a_presigned_get_gives_ranges_under_a_pin(client: Any, http: urllib3.PoolManager) -> None:
    etag = client.put_object(Bucket=BUCKET, Key="a b/ü", Body=DATA)["ETag"]
    url = client.generate_presigned_url("get_object", {"Bucket": BUCKET, "Key": "a b/ü"}, ExpiresIn=60)
    answer = http.request("GET", url, headers={"Range": "bytes=5-14", "If-Match": etag, "Accept-Encoding": "identity"})
    assert (answer.status, answer.data, answer.headers["ETag"]) == (206, DATA[5:15], etag)
    assert answer.headers["Content-Range"] == "bytes 5-14/4096"
    assert http.request("GET", url, headers={"Range": "bytes=5-14", "If-Match": '"0"'}).status == 412


def test_a_presigned_part_is_taken(client: Any, http: urllib3.PoolManager) -> None:
    upload = {
        "Bucket": BUCKET,
        "Key": "a",
        "UploadId": client.create_multipart_upload(Bucket=BUCKET, Key="a")["UploadId"],
    }
    url = client.generate_presigned_url("upload_part", {**upload, "PartNumber": 1}, ExpiresIn=60)
    answer = http.request("PUT", url, body=PART)
    assert (answer.status, answer.headers["ETag"]) == (200, f'"{hashlib.md5(PART).hexdigest()}"')
    client.complete_multipart_upload(
        **upload, MultipartUpload={"Parts": [{"PartNumber": 1, "ETag": answer.headers["ETag"]}]}
    )
    assert client.get_object(Bucket=BUCKET, Key="a")["Body"].read() == PART


def test_a_presigned_part_with_a_wrong_md5_is_refused(client: Any, http: urllib3.PoolManager) -> None:
    upload = {
        "Bucket": BUCKET,
        "Key": "a",
        "UploadId": client.create_multipart_upload(Bucket=BUCKET, Key="a")["UploadId"],
    }
    url = client.generate_presigned_url("upload_part", {**upload, "PartNumber": 1}, ExpiresIn=60)
    wrong = base64.b64encode(hashlib.md5(b"").digest()).decode()
    answer = http.request("PUT", url, body=PART, headers={"Content-MD5": wrong})
    assert (answer.status, b"BadDigest" in answer.data) == (400, True)


def test_a_presigned_url_ends(client: Any, http: urllib3.PoolManager) -> None:
    client.put_object(Bucket=BUCKET, Key="a", Body=DATA)
    url = client.generate_presigned_url("get_object", {"Bucket": BUCKET, "Key": "a"}, ExpiresIn=1)
    end = time.monotonic() + 20
    while (answer := http.request("GET", url)).status == 200 and time.monotonic() < end:
        time.sleep(0.1)  # only the clock ends it
    assert answer.status == 403
    assert b"<Code>" in answer.data


# ---- who may ---------------------------------------------------------------------------------------------------------


def test_a_wrong_secret_and_an_unknown_key_are_403(client: Any, s3: S3Server) -> None:
    for key, code in [(("nobody", "x"), "InvalidAccessKeyId"), ((s3.key.access, "x"), "SignatureDoesNotMatch")]:
        with pytest.raises(ClientError) as caught:
            s3.client(type(s3.key)(*key)).get_object(Bucket=BUCKET, Key="a")
        assert refused(caught) == (403, code)


def test_a_second_key_may_read_and_no_more(client: Any, s3: S3Server) -> None:
    client.put_object(Bucket=BUCKET, Key="a", Body=DATA)
    reader = s3.client(s3.add_key("reader"))
    assert reader.get_object(Bucket=BUCKET, Key="a")["Body"].read() == DATA
    assert reader.list_objects_v2(Bucket=BUCKET)["KeyCount"] == 1
    writes: list[tuple[Any, dict[str, Any]]] = [
        (reader.put_object, {"Body": b""}),
        (reader.create_multipart_upload, {}),
        (reader.delete_object, {}),
    ]
    for write, more in writes:
        with pytest.raises(ClientError) as caught:
            write(Bucket=BUCKET, Key="a", **more)
        assert refused(caught) == (403, "AccessDenied")


def test_rights_may_be_taken_and_keys_revoked_while_it_runs(client: Any, s3: S3Server) -> None:
    client.put_object(Bucket=BUCKET, Key="a", Body=DATA)
    key = s3.add_key("writer", READ + WRITE)
    writer = s3.client(key)
    writer.put_object(Bucket=BUCKET, Key="b", Body=b"")
    s3.allow("writer", READ)
    with pytest.raises(ClientError) as caught:
        writer.put_object(Bucket=BUCKET, Key="b", Body=b"")
    assert refused(caught) == (403, "AccessDenied")
    assert writer.get_object(Bucket=BUCKET, Key="a")["Body"].read() == DATA
    s3.revoke(key)
    with pytest.raises(ClientError) as caught:
        writer.get_object(Bucket=BUCKET, Key="a")
    assert refused(caught) == (403, "InvalidAccessKeyId")


# ---- s3fs ------------------------------------------------------------------------------------------------------------


def test_s3fs_reads_its_environment_lists_and_reads_ranges(
    client: Any, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    import s3fs

    for name, value in s3.environment().items():
        monkeypatch.setenv(name, value)
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    client.put_object(Bucket=BUCKET, Key="p/a", Body=DATA)
    files = s3fs.S3FileSystem(skip_instance_cache=True, config_kwargs={"signature_version": "s3v4"})
    info = files.info(f"{BUCKET}/p/a")
    assert (info["size"], info["ETag"]) == (len(DATA), f'"{hashlib.md5(DATA).hexdigest()}"')
    assert files.find(f"{BUCKET}/p") == [f"{BUCKET}/p/a"]
    assert files.cat_ranges([f"{BUCKET}/p/a"] * 2, [0, 100], [10, 200]) == [DATA[:10], DATA[100:200]]
    url = files.sign(f"{BUCKET}/p/a", expiration=60)
    assert urllib3.request("GET", url, retries=False).data == DATA


# ---- the server itself -----------------------------------------------------------------------------------------------


def test_an_emptied_bucket_has_no_objects_and_no_uploads(client: Any, s3: S3Server) -> None:
    client.put_object(Bucket=BUCKET, Key="p/a", Body=DATA)
    client.put_object(Bucket=BUCKET, Key="q/a", Body=DATA)
    start_upload(client, "p/b")
    s3.empty(BUCKET, "p/")
    assert (s3.keys(BUCKET), s3.uploads(BUCKET)) == (("q/a",), ())


def test_objects_are_read_without_a_signature_behind_its_back(client: Any, s3: S3Server) -> None:
    client.complete_multipart_upload(**start_upload(client, "p/a b"))
    answer = urllib3.request(
        "GET", f"{s3.objects}/{BUCKET}/p/a%20b", headers={"Range": f"bytes={len(PART) - 2}-{len(PART) + 1}"}
    )
    assert (answer.status, answer.data) == (206, PART[-2:] + b"ta")


KILLED = """
import os, sys
from tests.counterparts.s3 import S3Server
server = S3Server.start()
print(server.endpoint, server._guard.pid, flush=True)
sys.stdin.read()
"""


def test_it_ends_with_the_process_that_started_it_and_leaves_nothing(tmp_path: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    parent = subprocess.Popen(
        [sys.executable, "-c", KILLED],
        cwd=Path(__file__).parents[2],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    endpoint, guard = parent.stdout.readline().split()
    ended = os.pidfd_open(int(guard))
    assert list(tmp_path.iterdir())
    parent.send_signal(signal.SIGKILL)
    parent.communicate()
    assert select.select([ended], [], [], 20)[0]
    os.close(ended)
    with pytest.raises(urllib3.exceptions.NewConnectionError):
        urllib3.request("GET", endpoint, retries=False)
    assert list(tmp_path.iterdir()) == []
    port = endpoint.rpartition(":")[2]
    assert not list(Path("/tmp").glob(f"seaweedfs-*-*{port}.sock"))


def test_data_stay_in_a_folder_that_was_named(tmp_path: Path) -> None:
    for before in (False, True):
        with S3Server.start(tmp_path / "data", buckets=("one", "two")) as server:
            client = server.client()
            if not before:
                client.put_object(Bucket="two", Key="a", Body=DATA)
            assert client.get_object(Bucket="two", Key="a")["Body"].read() == DATA
            client.close()
