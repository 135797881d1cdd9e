"""Ray's job server as the tests need it: its routes and answers, jobs that do as they are told, and faults.

What it answers was taken from Ray 2.60: an id that is taken is HTTP 500 with "already exists" in its text, an unknown
job 404, a request without the token 401.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class FakeJobs:
    """The server's state; tests set it and look at it."""

    token: str = "secret-token"
    jobs: dict[str, dict[str, Any]] = field(default_factory=dict)
    packages: dict[str, bytes] = field(default_factory=dict)
    script: list[tuple[str, str, int | None]] = field(default_factory=list)
    """(state, what it has printed by then, exit code): one step each time a job is asked for."""
    drops: int = 0
    """Connections that are closed without an answer."""
    drop_logs: int = 0
    no_agent: int = 0
    """Submissions that are answered so; negative: all."""
    requests: list[tuple[str, str]] = field(default_factory=list)
    address: str = ""
    after_list: Any = None
    """Called after the jobs were listed: what another submitter does in between."""

    def add(self, name: str, state: str, **more: Any) -> None:
        self.jobs[name] = {"submission_id": name, "status": state, "message": "", "metadata": {}, "logs": "", **more}

    def step(self, job: dict[str, Any]) -> None:
        if self.script:
            job["status"], job["logs"], job["driver_exit_code"] = self.script.pop(0)


class _Handler(BaseHTTPRequestHandler):
    state: FakeJobs

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its name there
        del format, args

    def _answer(self, status: int, data: object) -> None:
        body = data if isinstance(data, bytes) else json.dumps(data).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _handle(self) -> None:
        state = self.state
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        state.requests.append((self.command, self.path))
        if state.drops > 0 or (state.drop_logs > 0 and self.path.endswith("/logs")):
            state.drops -= state.drops > 0
            state.drop_logs -= self.path.endswith("/logs")
            self.close_connection = True
            self.connection.close()
            return
        if state.token and self.headers.get("Authorization") != f"Bearer {state.token}":
            self._answer(401, b"Unauthorized")
            return
        parts = self.path.strip("/").split("/")
        if parts[:2] == ["api", "packages"]:
            name = parts[3]
            if self.command == "PUT":
                state.packages[name] = body
            self._answer(200 if name in state.packages else 404, b"")
        elif parts == ["api", "jobs"] and self.command == "GET":
            self._answer(200, list(state.jobs.values()))
            if state.after_list is not None:
                then, state.after_list = state.after_list, None
                then()
        elif parts == ["api", "jobs"]:
            if state.no_agent:
                state.no_agent -= 1
                self._answer(500, b"RuntimeError: No available agent to submit job, please try again later.")
                return
            asked = json.loads(body)
            name = asked["submission_id"]
            if name in state.jobs:
                self._answer(500, f"ValueError: Job with submission_id {name} already exists.".encode())
                return
            state.add(name, "PENDING", asked=asked, metadata=asked["metadata"])
            self._answer(200, {"submission_id": name})
        elif (job := state.jobs.get(parts[2])) is None:
            self._answer(404, b"Job not found")
        elif parts[3:] == ["logs"]:
            self._answer(200, {"logs": job["logs"]})
        elif parts[3:] == ["stop"]:
            job["status"] = "STOPPED"
            self._answer(200, {"stopped": True})
        else:
            state.step(job)
            self._answer(200, job)

    do_GET = do_POST = do_PUT = _handle


@contextmanager
def job_server(**state: Any) -> Iterator[FakeJobs]:
    """A server on a port of its own."""
    found = FakeJobs(**state)
    handler = type("Handler", (_Handler,), {"state": found})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    found.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
