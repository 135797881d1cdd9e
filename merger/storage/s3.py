"""Objects of one S3 bucket below one prefix: `S3Store`.

Sessions, credentials, endpoint, region and profile are s3fs's, from the environment that every AWS client reads. Small
requests (list, head, delete, uploads' bookkeeping) go through its configured client; bytes go over signed URLs and
merger/storage/http.py, which checks what no client checks. Retries are ours alone, by one `Patience`.

Whether an object is still the one that was planned, and who wins a race, is decided by S3 itself (If-Match,
If-None-Match). A write whose answer was lost may be refused when it is repeated: it carries a random mark, by which it
knows its own object.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import os
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import quote, unquote, urlencode, urlsplit

from merger.errors import InfrastructureError, MergeFailedError, RaymergeError, SourceChangedError, SourceError
from merger.storage.base import FileStat, RangeRead, check_name
from merger.storage.http import (
    COUNTS,
    Address,
    Again,
    Answer,
    Attempts,
    Patience,
    asked_seconds,
    bare_etag,
    count_throttling,
    gather,
    is_passing,
    read_files,
    send,
    submit,
)

HEAD_BYTES: Final = 256 << 10
"""Fetched where a few bytes at the start of a file are asked for: the header that follows them is nearly always in."""
_HEAD_READ_BYTES: Final = 4096
_HEAD_SECONDS: Final = 60.0
_HEADS: Final = 8
"""Heads that a store keeps at once."""

URL_SECONDS: Final = 900
"""How long a signed URL is good for."""
_URL_REUSE_SECONDS: Final = 240.0

MARK: Final = "raymerge-mark"
"""Key of the object metadata that tells our own object from another's."""
_TRIES: Final = 4
"""How often a file that changes between a look and a read is looked at again, where no pin was given."""


@dataclass(frozen=True, slots=True)
class S3Settings:
    """What an output asks of the objects that it is made of."""

    kms_key_id: str | None = None
    storage_class: str | None = None
    tags: tuple[tuple[str, str], ...] = ()

    def for_state(self) -> S3Settings:
        """The same for what is there only while a run lasts: encrypted alike, but never in an archive."""
        return S3Settings(kms_key_id=self.kms_key_id)

    def parameters(self) -> dict[str, str]:
        """As PutObject and CreateMultipartUpload take them."""
        given: dict[str, str] = {}
        if self.kms_key_id is not None:
            given |= {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": self.kms_key_id}
        if self.storage_class is not None:
            given["StorageClass"] = self.storage_class
        if self.tags:
            given["Tagging"] = urlencode(self.tags)
        return given


NO_SETTINGS: Final = S3Settings()


class Rejected(Exception):  # noqa: N818 - an answer, not an error: its caller knows what it means
    """S3 said no, and would say so again."""

    def __init__(self, status: int, code: str) -> None:
        super().__init__(f"the server answered {status} {code}".rstrip())
        self.status = status
        self.code = code
        """S3's word for it, or the status where it gave none."""

    @classmethod
    def of(cls, answer: Answer) -> Rejected:
        found = re.search(r"<Code>([A-Za-z0-9.]{1,80})</Code>", answer.text[:65536])
        return cls(answer.status, found[1] if found else "")


# ---------------------------------------------------------------------------------------------- what a process owns


class _Connection:
    """The clients of this process: one, and one more for each region that a bucket of ours lies in."""

    def __init__(self, key: object) -> None:
        self.key = key
        self.proven: set[str] = set()
        """Buckets that have shown that they keep the conditions this project relies on."""
        self.buckets: set[str] = set()
        """Buckets that are known to be there."""
        self._clients: dict[str, Any] = {}
        self._systems: list[Any] = []
        self._lock = threading.Lock()
        self.anonymous = False

    def _system(self, **more: Any) -> Any:
        import s3fs

        patience = Patience.from_environment()
        config = {
            "retries": {"total_max_attempts": 1, "mode": "standard"},
            "connect_timeout": patience.connect_seconds,
            "read_timeout": patience.stall_seconds,
            "max_pool_connections": 32,
            "request_checksum_calculation": "when_required",
            "response_checksum_validation": "when_required",
        }
        if not self.anonymous:
            config["signature_version"] = "s3v4"  # signed URLs are of an older version by default
        system = s3fs.S3FileSystem(
            anon=self.anonymous, config_kwargs=config, skip_instance_cache=True, use_listings_cache=False, **more
        )
        self._systems.append(system)
        return system

    def client(self, bucket: str) -> tuple[Any, Any]:
        """The event loop, and the client for a bucket's region."""
        from fsspec.asyn import sync

        with self._lock:
            if not self._systems:
                system = self._system()
                sync(system.loop, system.set_session)
                if sync(system.loop, system.session.get_credentials) is None:
                    self.anonymous = True
                    self._systems.clear()
                    self._system()
            loop = self._systems[0].loop
            if bucket not in self._clients:
                client = sync(loop, self._systems[0].set_session)
                region = sync(loop, _other_region, client, bucket)
                if region is not None:
                    client = sync(loop, self._system(client_kwargs={"region_name": region}).set_session)
                self._clients[bucket] = client
            return loop, self._clients[bucket]

    def call(self, operation: str, bucket: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
        from fsspec.asyn import sync

        loop, client = self.client(bucket)
        COUNTS.add(requests=1)
        found: dict[str, Any] = sync(loop, getattr(client, operation), Bucket=bucket, **parameters)
        return found

    def sign(self, operation: str, bucket: str, parameters: Mapping[str, Any]) -> str:
        from fsspec.asyn import sync

        loop, client = self.client(bucket)
        given = {"Bucket": bucket, **parameters}
        url: str = sync(loop, client.generate_presigned_url, operation, Params=given, ExpiresIn=URL_SECONDS)
        return url


async def _other_region(client: Any, bucket: str) -> str | None:
    """The region of a bucket where it is not the client's: a signed URL is good in one region only, and AWS's buckets
    lie in many. None for any other endpoint."""
    from botocore.exceptions import ClientError

    host = urlsplit(client.meta.endpoint_url).hostname or ""
    if not host.endswith((".amazonaws.com", ".amazonaws.com.cn")):
        return None
    try:
        answer = await client.head_bucket(Bucket=bucket)
    except ClientError as error:
        answer = error.response
    region: str | None = answer.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("x-amz-bucket-region")
    return None if region == client.meta.region_name else region


_LOCK: Final = threading.Lock()
_current: list[_Connection] = []


def _connection() -> _Connection:
    """This process's, made anew after a fork and where the environment names another place or another key."""
    said = frozenset((k, v) for k, v in os.environ.items() if k.startswith(("AWS_", "RAYMERGE_HTTP_")))
    key = os.getpid(), said
    with _LOCK:
        if not _current or _current[0].key != key:
            _current[:] = [_Connection(key)]
        return _current[0]


_NO_CREDENTIALS: Final = frozenset({
    "NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "ProfileNotFound",
    "TokenRetrievalError", "ConfigParseError", "ConfigNotFound", "InvalidConfigError", "NoAuthTokenError",
    "SSOTokenLoadError", "UnauthorizedSSOTokenError", "SSOError", "RefreshWithMFAUnsupportedError",
    "InfiniteLoopConfigError", "UnknownCredentialError", "MetadataRetrievalError",
})  # fmt: skip


@contextlib.contextmanager
def _translated(label: str) -> Iterator[None]:
    """What the clients below raise, as Again, Rejected or an error of ours. Their texts hold URLs, and stay inside."""
    from botocore.exceptions import BotoCoreError, ClientError, ConnectionError, HTTPClientError  # noqa: A004

    try:
        yield
    except ClientError as error:
        said = error.response.get("ResponseMetadata", {})
        status, code = int(said.get("HTTPStatusCode", 0)), str(error.response.get("Error", {}).get("Code", ""))
        headers = {str(k).lower(): str(v) for k, v in said.get("HTTPHeaders", {}).items()}
        if is_passing(status, code) or code in _PASSING_CODES:
            count_throttling(status)
            raise Again(f"the server answered {status} {code}", asked_seconds(headers)) from None
        raise Rejected(status, "" if code == str(status) else code) from None
    except (ConnectionError, HTTPClientError) as error:
        kind = type(error).__name__
        raise Again(_WIRE_REASONS.get(kind, f"the connection failed ({kind})")) from None
    except BotoCoreError as error:
        kind = type(error).__name__
        if kind in _NO_CREDENTIALS:
            raise SourceError.of(
                "no-credentials",
                f"there are no usable credentials for {label}",
                where=label,
                why=f"the AWS settings of the environment cannot be used ({kind})",
                fix="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or attach a role; check with "
                "`aws sts get-caller-identity`",
            ) from None
        raise SourceError.of(
            "bad-reference",
            f"{label} cannot be asked for",
            where=label,
            why=f"the request was refused before it was sent ({kind})",
            fix="check the bucket's name, AWS_ENDPOINT_URL and AWS_REGION",
        ) from None
    except (OSError, TimeoutError) as error:
        raise Again(error.strerror or type(error).__name__) from None
    except ValueError:  # an endpoint that is no URL
        raise SourceError.of(
            "bad-reference",
            f"{label} cannot be asked for",
            where=label,
            why="the endpoint is not a URL",
            fix="set AWS_ENDPOINT_URL to something like https://s3.example.com, or leave it unset for AWS",
        ) from None


_PASSING_CODES: Final = frozenset({"InternalError", "ServiceUnavailable", "SlowDown", "Throttling", "RequestTimeout"})
_WIRE_REASONS: Final = {
    "EndpointConnectionError": "no connection", "ConnectTimeoutError": "no connection in time",
    "ReadTimeoutError": "no answer for too long", "ConnectionClosedError": "the connection broke before the answer",
    "SSLError": "the TLS handshake failed", "ProxyConnectionError": "no connection to the proxy",
    "ResponseStreamingError": "the body ended early",
}  # fmt: skip

_HEADERS: Final = {
    "ContentMD5": "Content-MD5", "IfMatch": "If-Match", "IfNoneMatch": "If-None-Match",
    "StorageClass": "x-amz-storage-class", "Tagging": "x-amz-tagging",
    "ServerSideEncryption": "x-amz-server-side-encryption",
    "SSEKMSKeyId": "x-amz-server-side-encryption-aws-kms-key-id",
}  # fmt: skip
"""Parameters that are signed as headers, and so must be sent as they were signed."""


def _signed_headers(parameters: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, value in parameters.items():
        if name in _HEADERS:
            yield _HEADERS[name], value
        if name == "Metadata":
            yield from ((f"x-amz-meta-{key}", text) for key, text in value.items())


# ---------------------------------------------------------------------------------------------- one object


@dataclass(slots=True, eq=False)
class _Object:
    """One version of one object: what http.py calls a Resource."""

    label: str
    size: int
    etag: str | None
    _sign: Callable[[], Address] = field(repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    _signed: tuple[float, Address] | None = field(default=None, repr=False)

    def address(self) -> Address:
        with self._lock:
            if self._signed is None or time.monotonic() - self._signed[0] > _URL_REUSE_SECONDS:
                self._signed = time.monotonic(), self._sign()
            return self._signed[1]

    def renewed(self, refused: Address) -> Address:
        with self._lock:
            if self._signed is None or self._signed[1] is refused:
                self._signed = time.monotonic(), self._sign()
            return self._signed[1]


@dataclass(slots=True)
class _Head:
    """The start of one version of a file. Each of its bytes is given out once: who reads again, asks S3 again."""

    pin: str
    data: bytes
    given: int
    """Bytes [given, end) are still to be had."""
    read_at: float

    def gives(self, pin: str, reads: Sequence[RangeRead]) -> bool:
        """Fill the buffers, if that can be done from here."""
        fresh = pin == self.pin and time.monotonic() - self.read_at < _HEAD_SECONDS
        if not fresh or any(r.start < self.given or r.start + r.into.nbytes > len(self.data) for r in reads):
            return False
        for read in reads:
            read.into.cast("B")[:] = self.data[read.start : read.start + read.into.nbytes]
        self.given = max(read.start + read.into.nbytes for read in reads)
        return True


def _pin(etag: str, version: str | None) -> str:
    pin = f"s3:{quote(bare_etag(etag), safe='-')}"
    return pin if version in (None, "", "null") else f"{pin}:{version}"


def _parts(pin: str) -> tuple[str, str | None]:
    """ETag and version id of a pin."""
    _, etag, *version = pin.split(":", 2)
    return unquote(etag), version[0] if version else None


def mark_of(found: Mapping[str, Any] | None) -> str | None:
    """The mark that an object carries, if there is one."""
    mark: str | None = None if found is None else found.get("Metadata", {}).get(MARK)
    return mark


def quoted_etag(pin: str) -> str:
    """A pin's ETag as conditions spell it."""
    return f'"{_parts(pin)[0]}"'


def content_md5(body: bytes | memoryview) -> tuple[str, str]:
    """MD5 of a body as Content-MD5 spells it, and as ETags do."""
    digest = hashlib.md5(body, usedforsecurity=False)
    return base64.b64encode(digest.digest()).decode(), digest.hexdigest()


def _is_hurt(etag: str, encryption: str, md5: str) -> bool:
    """Whether an ETag is an MD5, and another one than that of what was sent.

    Under KMS an ETag is no MD5; then Content-MD5 alone, which the server checks, speaks for the bytes.
    """
    return not encryption.startswith("aws:kms") and re.fullmatch("[0-9a-f]{32}", etag) is not None and etag != md5


def _doubt(md5: str) -> Callable[[Answer], str]:
    def doubt(answer: Answer) -> str:
        etag = bare_etag(answer.headers.get("etag", ""))
        encryption = answer.headers.get("x-amz-server-side-encryption", "")
        if answer.status == 200 and _is_hurt(etag, encryption, md5):
            return f"what arrived has the MD5 {etag}, and {md5} was sent"
        return ""

    return doubt


# ---------------------------------------------------------------------------------------------- the store


@dataclass(frozen=True, slots=True)
class S3Store:
    """The objects below `s3://bucket/prefix/`. Holds no session and no secret; sizes that it learned travel with it."""

    bucket: str
    prefix: str = ""
    settings: S3Settings = NO_SETTINGS
    """Applied to what is put."""
    _known: dict[str, FileStat] = field(default_factory=dict, repr=False, compare=False)
    """What `stat` found last: a worker that is told the pin need not ask for the size again."""
    _objects: dict[str, tuple[str, _Object]] = field(default_factory=dict, init=False, repr=False, compare=False)
    """Name → pin and object, of pinned reads."""
    _heads: dict[str, _Head] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "prefix", self.prefix.strip("/"))

    def __reduce__(self) -> tuple[Any, ...]:
        return S3Store, (self.bucket, self.prefix, self.settings, dict(self._known))

    @property
    def uri(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")

    @property
    def remote(self) -> bool:
        return True

    def label(self, name: str) -> str:
        """What errors call an object."""
        return f"{self.uri}/{name}"

    def key(self, name: str) -> str:
        """Raises SourceError(code `path-escapes`)."""
        inside = "/".join(check_name(name, self.uri).parts)
        return f"{self.prefix}/{inside}" if self.prefix else inside

    # ---- requests

    def call(self, operation: str, label: str, **parameters: Any) -> dict[str, Any]:
        """A small idempotent request. Raises Rejected, InfrastructureError, SourceError(code `no-credentials`)."""
        loop = Attempts(f"{operation} of {label}", label, Patience.from_environment())
        while True:
            try:
                with _translated(label):
                    return _connection().call(operation, self.bucket, parameters)
            except Again as error:
                loop.failed(error)

    def address(self, operation: str, label: str, parameters: Mapping[str, Any]) -> Address:
        """A signed URL and the headers that were signed with it."""
        loop = Attempts(f"signing a request for {label}", label, Patience.from_environment())
        while True:
            try:
                with _translated(label):
                    url = _connection().sign(operation, self.bucket, parameters)
                    return Address(url, tuple(_signed_headers(parameters)))
            except Again as error:  # credentials may come from a server, too
                loop.failed(error)
            except Rejected as error:
                raise self.refused(label, error) from None

    def upload(self, operation: str, label: str, body: bytes | memoryview, **parameters: Any) -> Answer:
        """PutObject or UploadPart: the answer with status 200. Raises Rejected, InfrastructureError."""
        md5_base64, md5 = content_md5(body)
        given = {**parameters, "ContentMD5": md5_base64}
        answer = send(label, "PUT", lambda: self.address(operation, label, given), body, doubt=_doubt(md5))
        if answer.status != 200:
            raise Rejected.of(answer)
        return answer

    def refused(self, label: str, answer: Rejected, *, kind: type[RaymergeError] = SourceError) -> RaymergeError:
        """The error of a final no, of `kind`: SourceError for what is read, MergeFailedError for what is written."""
        if answer.code == "NoSuchBucket" or (answer.status == 404 and not self._bucket_is_there()):
            return kind.of(
                "no-such-bucket",
                f"there is no bucket {self.bucket}",
                where=label,
                fix="check the bucket's name, AWS_ENDPOINT_URL and AWS_REGION; raymerge creates no buckets",
            )
        if answer.status in (401, 403) or answer.code in ("ExpiredToken", "InvalidToken", "TokenRefreshRequired"):
            if _connection().anonymous:
                why = "there are no credentials in the environment, and it is not public"
                fix = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or attach a role"
            else:
                why = f"{answer}, with fresh credentials too"
                fix = (
                    "check the keys and their rights (list, get, put, delete, abort multipart uploads); without the "
                    "right to list, S3 calls what is missing forbidden, too"
                )
            return kind.of("forbidden", f"{label} is closed to us", where=label, why=why, fix=fix)
        if answer.status == 404:
            return kind.of("no-such-file", f"there is no file {label}", where=label, fix="check the reference")
        if answer.status in (301, 307) or answer.code == "AuthorizationHeaderMalformed":
            return kind.of(
                "wrong-region",
                f"{label} lies in another region",
                where=label,
                why=str(answer),
                fix="set AWS_REGION to the bucket's region",
            )
        return kind.of(
            "not-implemented" if answer.status == 501 else "bad-answer",
            f"a request for {label} was turned down",
            where=label,
            why=str(answer),
            fix="check that the endpoint speaks S3, and the settings of the bucket",
        )

    def _bucket_is_there(self) -> bool:
        """A 404 to a HEAD does not say what is missing. Where the bucket cannot be looked at, it is there."""
        known = _connection().buckets
        if self.bucket not in known:
            try:
                self.call("head_bucket", self.uri)
            except Rejected as answer:
                if answer.status == 404:
                    return False
            known.add(self.bucket)
        return True

    # ---- reads

    def list_files(self) -> tuple[str, ...]:
        return tuple(sorted(self.list_stats()))

    def list_stats(self, below: str = "") -> dict[str, FileStat]:
        """Files below a folder (all, without one) with their sizes; the pins name no versions."""
        root = f"{self.prefix}/" if self.prefix else ""
        found: dict[str, FileStat] = {}
        more: dict[str, str] = {}
        while True:
            prefix = root + (f"{below.strip('/')}/" if below else "")
            try:
                page = self.call("list_objects_v2", self.uri, Prefix=prefix, **more)
            except Rejected as answer:
                raise self.refused(self.uri, answer) from None
            for entry in page.get("Contents", ()):
                name = entry["Key"][len(root) :]
                if entry["Key"].startswith(prefix) and name and not name.endswith("/"):  # a folder's marker
                    found[name] = FileStat(int(entry["Size"]), _pin(entry["ETag"], None))
            if not page.get("IsTruncated"):
                return found
            more = {"ContinuationToken": page["NextContinuationToken"]}

    def head(self, name: str, version: str | None = None) -> dict[str, Any]:
        """What S3 says of an object. Raises Rejected."""
        given = {} if version is None else {"VersionId": version}
        return self.call("head_object", self.label(name), Key=self.key(name), **given)

    def stat(self, name: str) -> FileStat:
        try:
            found = self.head(name)
        except Rejected as answer:
            raise self.refused(self.label(name), answer) from None
        self._known[name] = FileStat(int(found["ContentLength"]), _pin(found["ETag"], found.get("VersionId")))
        return self._known[name]

    def resolve(self, names: Sequence[str]) -> None:
        gather([submit(self.stat, name) for name in dict.fromkeys(names) if name not in self._known])

    def object_of(self, name: str, found: FileStat) -> _Object:
        """A version of a file, for `merger.storage.http.read_files`."""
        etag, version = _parts(found.pin)
        label = self.label(name)
        given = {"Key": self.key(name), "IfMatch": f'"{etag}"', **({} if version is None else {"VersionId": version})}
        return _Object(label, found.size, etag, lambda: self.address("get_object", label, given))

    def read_into(self, name: str, reads: Sequence[RangeRead], *, pin: str | None = None) -> None:
        if pin is not None:
            self._read(name, pin, self._pinned(name, pin, look=not any(r.into.nbytes for r in reads)), reads)
            return
        for left in reversed(range(_TRIES)):
            found = self.stat(name)
            try:
                self._read(name, found.pin, self.object_of(name, found), reads)
                return
            except SourceChangedError:
                if not left:
                    raise

    def _pinned(self, name: str, pin: str, *, look: bool) -> _Object:
        """The object of a pin. Asks S3 where its size is not known, or always with `look`."""
        made = self._objects.get(name)
        if made is not None and made[0] == pin and not look:
            return made[1]
        known = self._known.get(name)
        if known is not None and known.pin == pin and not look:
            self._objects[name] = pin, self.object_of(name, known)
            return self._objects[name][1]
        try:
            found = self.head(name, _parts(pin)[1])
        except Rejected as answer:
            if answer.status in (404, 405):
                raise self._changed(name, "it was removed after the plan was made") from None
            raise self.refused(self.label(name), answer) from None
        now = _pin(found["ETag"], found.get("VersionId"))
        if _parts(now)[0] != _parts(pin)[0]:
            raise self._changed(name, "its ETag changed after the plan was made")
        self._objects[name] = pin, self.object_of(name, FileStat(int(found["ContentLength"]), pin))
        return self._objects[name][1]

    def _read(self, name: str, pin: str, found: _Object, reads: Sequence[RangeRead]) -> None:
        wanted = [read for read in reads if read.into.nbytes]
        with _LOCK:
            head = self._heads.get(name)
            if wanted and head is not None:
                if head.gives(pin, wanted):
                    return
                del self._heads[name]
        try:
            if len(wanted) == 1 and wanted[0].start == 0 and wanted[0].into.nbytes <= min(_HEAD_READ_BYTES, found.size):
                data = bytearray(min(HEAD_BYTES, found.size))
                read_files([(found, [RangeRead(0, memoryview(data))])])
                head = _Head(pin, bytes(data), 0, time.monotonic())
                head.gives(pin, wanted)
                with _LOCK:
                    self._heads[name] = head
                    while len(self._heads) > _HEADS:
                        del self._heads[next(iter(self._heads))]
                return
            read_files([(found, reads)])
        except SourceChangedError:
            self._objects.pop(name, None)
            raise
        except SourceError as error:
            if error.problems[0].code == "no-such-file":
                self._objects.pop(name, None)
                raise self._changed(name, "it was removed after the plan was made") from None
            raise

    def _changed(self, name: str, why: str) -> SourceChangedError:
        return SourceChangedError.of(
            "source-changed",
            f"{name} is no longer the file that was planned",
            where=self.label(name),
            why=why,
            fix="run the same command again with --restart: it plans from the new file",
        )

    # ---- writes

    def free_bytes(self) -> int | None:
        return None

    def put(self, name: str, data: bytes, *, exclusive: bool = False, replacing: str | None = None) -> None:
        self.put_view(name, data, exclusive=exclusive, replacing=replacing)

    def put_view(
        self,
        name: str,
        data: bytes | memoryview,
        *,
        exclusive: bool = False,
        replacing: str | None = None,
        mark: str | None = None,
    ) -> None:
        """`put` of any buffer. `mark` is written into the object's metadata; by default a fresh one, where needed."""
        parameters: dict[str, Any] = {"Key": self.key(name), **self.settings.parameters()}
        if exclusive or replacing is not None:
            mark = mark or secrets.token_hex(16)
            parameters |= {"IfNoneMatch": "*"} if exclusive else {"IfMatch": quoted_etag(replacing or "")}
        if mark is not None:
            parameters["Metadata"] = {MARK: mark}
        try:
            self.upload("put_object", self.label(name), data, **parameters)
        except Rejected as answer:
            conditional = exclusive or replacing is not None
            missing = answer.status == 404 and answer.code != "NoSuchBucket" and replacing is not None
            if conditional and (answer.status == 412 or missing):
                found = self.found(name)
                if found is not None and mark_of(found) == mark:  # an earlier attempt arrived; its answer was lost
                    encryption = found.get("ServerSideEncryption", "")
                    if _is_hurt(bare_etag(found["ETag"]), encryption, content_md5(data)[1]):
                        raise self._hurt(name) from None
                    return
                raise FileExistsError(name) from None
            raise self.refused(self.label(name), answer, kind=MergeFailedError) from None

    def _hurt(self, name: str) -> InfrastructureError:
        return InfrastructureError.of(
            "hurt-upload",
            f"{name} arrived with other bytes than were sent",
            where=self.label(name),
            why="the MD5 that S3 tells is another one",
            fix="remove that object and run the same command again; something between here and S3 changes bytes",
        )

    def found(self, name: str) -> dict[str, Any] | None:
        """What S3 says of an object of an output, or None where there is none."""
        try:
            return self.head(name)
        except Rejected as answer:
            error = self.refused(self.label(name), answer, kind=MergeFailedError)
            if error.problems[0].code == "no-such-file":
                return None
            raise error from None

    def remove(self, name: str) -> None:
        try:
            self.call("delete_object", self.label(name), Key=self.key(name))
        except Rejected as answer:
            if answer.status == 404 and answer.code != "NoSuchBucket":
                return
            raise self.refused(self.label(name), answer, kind=MergeFailedError) from None

    @property
    def proven(self) -> bool:
        """Whether this process has seen that the bucket keeps its conditions."""
        return self.bucket in _connection().proven

    def prove(self) -> None:
        _connection().proven.add(self.bucket)
