"""Ray's job server over HTTP: the few calls that a submission needs, without importing ray.

What the stock client would do behind one's back is left out: RAY_ADDRESS does not override the address that was given,
a token never travels in the clear, and an answer that does not come is asked for again.
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal
from urllib.parse import quote, urlsplit

import urllib3

from merger.errors import InfrastructureError, ManifestError, PlanError, RaymergeError

SERVER: Final = "RAY_API_SERVER_ADDRESS"
UNREACHED_SECONDS: Final = 300.0
"""How long a server may be silent before a follower gives up: a head that restarts takes minutes."""
AGENT_SECONDS: Final = 60.0
"""How long a server may have no agent that takes a job."""
AGENT_PAUSE: Final = 1.0
NO_AGENT: Final = b"No available agent"
"""Ray's words for that, before anything of the job exists."""
PACKAGE_BYTES: Final = 100 << 20
"""What the job server takes as one upload."""

JobState = Literal["PENDING", "RUNNING", "STOPPED", "SUCCEEDED", "FAILED"]
LIVE: Final = ("PENDING", "RUNNING")


@dataclass(frozen=True, slots=True)
class Job:
    """What the job server says of one job."""

    submission_id: str
    state: JobState
    message: str = ""
    exit_code: int | None = None
    """Of its driver; None where it was stopped or never ran."""
    metadata: dict[str, str] | None = None

    @property
    def live(self) -> bool:
        return self.state in LIVE


class JobExistsError(Exception):
    """Somebody else took this submission id first."""


class JobServer:
    """One cluster's job server.

    Raises ManifestError(code `bad-arguments`, `ray-client`) for what is no address of one, PlanError (codes
    `insecure`, `not-authenticated`), InfrastructureError(code `no-cluster`) where nothing answers.
    """

    def __init__(self, address: str | None, *, insecure: bool = False) -> None:
        self.address = server_address(address)
        self._insecure = insecure
        self._token = read_token()
        parts = urlsplit(self.address)
        if parts.scheme == "http" and not is_loopback(parts.hostname or "") and not insecure:
            raise PlanError.of(
                "insecure", "the job server is asked over plain http", where=self.address,
                why="the token, and what is submitted, could be read and changed on the way",
                fix="use https, a tunnel to localhost (kubectl port-forward, ssh -L), or --insecure",
            )  # fmt: skip
        self._http = urllib3.PoolManager(timeout=urllib3.Timeout(connect=10, read=60), retries=False)

    def check_token(self) -> None:
        """Refuse a cluster on which anybody may run code. Raises PlanError(code `insecure`)."""
        if self._insecure:
            return
        answer = self._send("GET", "/api/jobs/", authorized=False)
        if answer.status == 200:
            raise PlanError.of(
                "insecure", "this cluster asks for no token", where=self.address,
                why="whoever reaches it can run any code, with the credentials of its nodes",
                fix="start it with RAY_AUTH_MODE=token, or use --insecure where only you can reach it",
            )  # fmt: skip

    def jobs(self) -> list[Job]:
        return [_job(found) for found in self._json("GET", "/api/jobs/") if found.get("submission_id")]

    def job(self, submission_id: str) -> Job | None:
        """One job; None where the cluster knows none such."""
        answer = self._send("GET", f"/api/jobs/{quote(submission_id, '')}")
        if answer.status == 404:
            return None
        return _job(self._read(answer, f"/api/jobs/{submission_id}"))

    def logs(self, submission_id: str) -> str:
        """All that the job has printed so far."""
        found = self._json("GET", f"/api/jobs/{quote(submission_id, '')}/logs")
        return str(found.get("logs") or "")

    def stop(self, submission_id: str) -> bool:
        """Ask a job to stop. Returns whether it was running."""
        return bool(self._json("POST", f"/api/jobs/{quote(submission_id, '')}/stop").get("stopped"))

    def upload(self, package: bytes) -> str:
        """Store a zip file as a working directory. Returns its URI."""
        if len(package) > PACKAGE_BYTES:
            raise PlanError.of(
                "too-large", f"what is to be shipped has {len(package)} bytes", where=self.address,
                why=f"the job server takes {PACKAGE_BYTES}", fix="put raymerge into the image",
            )  # fmt: skip
        name = f"_ray_pkg_{hashlib.sha256(package).hexdigest()[:32]}.zip"
        path = f"/api/packages/gcs/{name}"
        if self._send("GET", path).status != 200:
            answer = self._send("PUT", path, body=package)
            if answer.status != 200:
                self._read(answer, path)
        return f"gcs://{name}"

    def submit(self, request: dict[str, Any]) -> None:
        """Submit a job. Raises JobExistsError where its id is taken.

        On a cluster that has just started, or is busy, no agent may be there yet: it is asked again for a while.
        """
        deadline = time.monotonic() + AGENT_SECONDS
        while True:
            answer = self._send("POST", "/api/jobs/", body=json.dumps(request).encode())
            if answer.status != 200 and b"already exists" in answer.data:
                raise JobExistsError
            if answer.status != 500 or NO_AGENT not in answer.data or time.monotonic() > deadline:
                break
            time.sleep(AGENT_PAUSE)
        self._read(answer, "/api/jobs/")

    def patiently(self, submission_id: str, *, seconds: float = UNREACHED_SECONDS, pause: float = 2.0) -> Job | None:
        """The same as `job`, asked again while the server does not answer."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                return self.job(submission_id)
            except InfrastructureError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(pause)

    # ---------------------------------------------------------------- transport

    def _json(self, method: str, path: str) -> Any:
        return self._read(self._send(method, path), path)

    def _send(
        self, method: str, path: str, *, body: bytes | None = None, authorized: bool = True
    ) -> urllib3.BaseHTTPResponse:
        headers = {"Content-Type": "application/json"} if body is not None else {}
        if authorized and self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        try:
            return self._http.request(method, self.address + path, body=body, headers=headers, redirect=False)
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise _no_cluster(self.address, type(error).__name__) from error

    def _read(self, answer: urllib3.BaseHTTPResponse, path: str) -> Any:
        if answer.status in (401, 403):
            raise PlanError.of(
                "not-authenticated", "the cluster does not accept us", where=self.address,
                why="its token is another" if self._token else "it asks for a token, and there is none here",
                fix="give its token in RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH",
            )  # fmt: skip
        if answer.status >= 500 or answer.status == 429:
            raise _no_cluster(self.address, f"HTTP {answer.status} for {path}: {_first_line(answer.data)}")
        if answer.status != 200:
            raise PlanError.of(
                "bad-answer", f"the job server answers {answer.status}", where=f"{self.address}{path}",
                why=_first_line(answer.data), fix="check that this is the address of Ray's dashboard (port 8265)",
            )  # fmt: skip
        try:
            return json.loads(answer.data) if answer.data else {}
        except ValueError:
            raise PlanError.of(
                "bad-answer", "this is no job server: its answer is no JSON", where=f"{self.address}{path}",
                fix="check that this is the address of Ray's dashboard (port 8265)",
            ) from None  # fmt: skip


def _job(found: dict[str, Any]) -> Job:
    return Job(
        str(found["submission_id"]), found["status"], str(found.get("message") or ""), found.get("driver_exit_code"),
        {str(k): str(v) for k, v in (found.get("metadata") or {}).items()},
    )  # fmt: skip


def _first_line(data: bytes) -> str:
    lines = data.decode("utf-8", "replace").strip().splitlines()
    return lines[-1][:200] if lines else ""


def _no_cluster(address: str, why: str) -> RaymergeError:
    return InfrastructureError.of(
        "no-cluster", "the cluster's job server does not answer", where=address, why=why,
        fix="check the address and that the cluster runs",
    )  # fmt: skip


def server_address(address: str | None) -> str:
    """`http(s)://HOST:PORT` from what was given, or from RAY_API_SERVER_ADDRESS."""
    given = address or os.environ.get(SERVER, "")
    if given.startswith("ray://"):
        raise ManifestError.of(
            "ray-client", "ray:// addresses (Ray Client) are not supported", where=given,
            why="a job runs inside the cluster, and is submitted to its job server", fix="use http://HOST:8265",
        )  # fmt: skip
    if not given:
        raise ManifestError.of(
            "bad-arguments", "no cluster is named", where="--address", why="a job has to be submitted somewhere",
            fix=f"give --address http://HOST:8265, or set {SERVER}",
        )  # fmt: skip
    text = (given if "://" in given else f"http://{given}").rstrip("/")
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query:
        raise ManifestError.of(
            "bad-arguments", "this is no address of a job server (its text is withheld)", where="--address",
            why="it is http://HOST:PORT or https://HOST:PORT, without credentials", fix="use http://HOST:8265",
        )  # fmt: skip
    return text


def is_loopback(host: str) -> bool:
    """Whether what is sent to this host never leaves this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def read_token() -> str:
    """The cluster's token, from where Ray itself would take it; empty where there is none."""
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return token.strip()
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    try:
        return Path(named or Path.home() / ".ray" / "auth_token").read_text(encoding="utf-8").strip()
    except (OSError, RuntimeError):
        return ""
