"""A merge as a job of a cluster: `submit`, and `follow` to its true end.

The submission id is `raymerge-<digest12>-a<n>`, where the digest is that of the plans and their outputs: who submits
the same work again meets the job that does it. What travels is the manifest, every place in it written out, and, where
asked for, raymerge's own code; never a secret: credentials belong to the cluster's nodes.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shlex
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from cluster.jobs_api import Job, JobExistsError, JobServer
from merger.destination import default_run_dir
from merger.errors import InfrastructureError, PlanError, Problem
from merger.report import versions

ENTRY: Final = "jobs.merge"
MANIFEST_FILE: Final = "manifest.json"
STOP_SECONDS: Final = 60
"""How long Ray waits for a driver that was asked to stop before it kills it; Ray's own default is 3."""
FOLLOW_SECONDS: Final = 1.0
STOPPED, RETRY = 143, 75
_EPOCH: Final = (2020, 1, 1, 0, 0, 0)

Found = Literal["submitted", "under way", "succeeded"]


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSpec:
    """What is submitted."""

    digest: str
    """Of the work, SHA-256."""
    manifest: Mapping[str, Any] | str
    """The manifest, every place in it written out; or the reference of one that the cluster reads itself."""
    options: Sequence[str] = ()
    """Of `raymerge merge` or `raymerge bulk`, as the command line has them."""
    outputs: Sequence[str] = ()
    code: Literal["image", "working_dir"] = "image"
    """Whether raymerge is in the cluster's image, or comes along."""
    plugins: Sequence[str] = ()
    """Files of methods of one's own, which come along."""
    conclusive: bool = False
    """Whether an earlier job that succeeded answers for this one."""
    python: str = "python"
    env: Mapping[str, str] = field(default_factory=dict)
    """For the driver and its workers. Never a secret: all who reach the cluster can read it."""


def submission_id(digest: str, attempt: int) -> str:
    return f"raymerge-{digest[:12]}-a{attempt}"


def find_attempts(jobs: Sequence[Job], digest: str) -> dict[int, Job]:
    """The jobs that were submitted for some work, by attempt."""
    pattern = re.compile(re.escape(f"raymerge-{digest[:12]}-a") + r"(\d+)")
    return {int(m[1]): job for job in jobs if (m := pattern.fullmatch(job.submission_id))}


def submit(server: JobServer, spec: JobSpec) -> tuple[str, Found]:
    """Submit a job, or find the one that does this work already. Returns its id.

    Raises PlanError (codes `insecure`, `not-authenticated`, `too-large`), InfrastructureError(code `no-cluster`).
    """
    server.check_token()
    while True:
        attempts = find_attempts(server.jobs(), spec.digest)
        last = max(attempts, default=0)
        if last and attempts[last].live:
            return attempts[last].submission_id, "under way"
        if last and attempts[last].state == "SUCCEEDED" and spec.conclusive:
            return attempts[last].submission_id, "succeeded"
        name = submission_id(spec.digest, last + 1)
        try:
            server.submit(_request(server, spec, name))
        except JobExistsError:
            continue  # somebody was faster: theirs is the job
        _remember(name, server.address, spec.outputs)
        return name, "submitted"


def _request(server: JobServer, spec: JobSpec, name: str) -> dict[str, Any]:
    plugins = {f"plugins/{Path(file).name}": Path(file).read_bytes() for file in spec.plugins}
    manifest = spec.manifest if isinstance(spec.manifest, str) else MANIFEST_FILE
    command = [spec.python, "-m", ENTRY, manifest, *spec.options]
    for file in plugins:
        command += ["--plugin", file]
    files: dict[str, bytes] = dict(plugins)
    if not isinstance(spec.manifest, str):
        files[MANIFEST_FILE] = json.dumps(spec.manifest, indent=1).encode()
    if spec.code == "working_dir":
        files |= own_code()
    environment: dict[str, Any] = {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS), **spec.env}}
    if files:
        environment["working_dir"] = server.upload(zipped(files))
    return {
        "entrypoint": shlex.join(command),
        "submission_id": name,
        "runtime_env": environment,
        "metadata": {
            "raymerge": versions()["raymerge"], "raymerge_code": spec.code,
            "raymerge_digest": spec.digest,
        },
    }  # fmt: skip


def zipped(files: Mapping[str, bytes]) -> bytes:
    """A zip file that depends on nothing but what is in it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(files):
            archive.writestr(zipfile.ZipInfo(name, _EPOCH), files[name], zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def own_code() -> dict[str, bytes]:
    """raymerge itself, with the metadata by which it knows its own version."""
    home = Path(__file__).resolve().parents[1]
    found: dict[str, bytes] = {}
    for package in ("jobs", "cluster", "merger"):
        for path in sorted((home / package).rglob("*")):
            name = path.relative_to(home)
            if path.is_file() and "__pycache__" not in name.parts and name.parts[:2] != ("jobs", "demo"):
                found[name.as_posix()] = path.read_bytes()
    version = versions()["raymerge"]
    found[f"raymerge-{version}.dist-info/METADATA"] = (
        f"Metadata-Version: 2.1\nName: raymerge\nVersion: {version}\n".encode()
    )  # fmt: skip
    return found


def digest_of(parts: object) -> str:
    """The digest of some work, from plain data."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


# ---- to the end ------------------------------------------------------------------------------------------------------


def follow(
    server: JobServer, name: str, emit: Callable[[str], None], *, seconds: float = FOLLOW_SECONDS
) -> tuple[Job, int]:
    """Pass on what a job prints until it ends. Returns it, and its exit code: the driver's own; 143 when it was
    stopped, 75 when it never ran or its driver was lost.

    The logs are asked for again and again, and so is the state: an answer that does not come ends nothing. Raises
    InfrastructureError (codes `no-cluster` after minutes of silence, `no-job`).
    """
    shown = 0
    while True:
        job = server.patiently(name)
        if job is None:
            raise InfrastructureError.of(
                "no-job", f"the cluster knows no job {name} any more", where=server.address,
                why="its head was started anew", fix="submit again: what is done of the merge is kept",
            )  # fmt: skip
        shown = _show_more(server, name, shown, emit)
        if not job.live:
            return job, exit_code(job)
        time.sleep(seconds)


def _show_more(server: JobServer, name: str, shown: int, emit: Callable[[str], None]) -> int:
    try:
        text = server.logs(name)
    except (InfrastructureError, PlanError):  # a head without logs, or one that is busy: the state is what counts
        return shown
    if len(text) > shown:
        emit(text[shown:])
    return len(text)


def exit_code(job: Job) -> int:
    """What a shell would have seen, had the driver run in it."""
    if job.state == "SUCCEEDED":
        return 0
    if job.state == "STOPPED":
        return STOPPED
    # 128+n is a driver that a signal ended without a word of its own: the machine, not the merge.
    return RETRY if job.exit_code is None or job.exit_code in (-9, 137) else job.exit_code


# ---- what this machine remembers of a submission ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Submission:
    """Where a job was submitted to, and where its outputs go."""

    submission_id: str
    address: str
    outputs: tuple[str, ...]


def _record(name: str) -> Path:
    return Path(default_run_dir()) / "jobs" / f"{name}.json"


def _remember(name: str, address: str, outputs: Sequence[str]) -> None:
    path = _record(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(f".{os.getpid()}")
    scratch.write_text(json.dumps({"address": address, "outputs": list(outputs)}), encoding="utf-8")
    scratch.replace(path)


def recall(name: str) -> Submission | None:
    """What was submitted from this machine under this id."""
    try:
        found = json.loads(_record(name).read_text(encoding="utf-8"))
        return Submission(name, str(found["address"]), tuple(map(str, found["outputs"])))
    except (OSError, ValueError, KeyError):
        return None


# ---- at the other end ------------------------------------------------------------------------------------------------


def check_shipment(environment: Mapping[str, str], home: Path) -> list[Problem]:
    """Whether a driver that Ray's job server started runs the raymerge that was meant. `home` is where it was imported
    from."""
    try:
        told = dict(json.loads(environment.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}").get("metadata") or {})
    except (ValueError, AttributeError):
        return []
    if "raymerge" not in told:
        return []
    problems = []
    here = versions()["raymerge"]
    if told["raymerge"] != here:
        problems.append(
            Problem(
                "version-skew", f"the job was submitted by raymerge {told['raymerge']}, and this is {here}", str(home),
                "another version may make another plan", "use one image for both, or submit with --ship-code",
            )
        )  # fmt: skip
    if told.get("raymerge_code") == "working_dir" and Path(os.getcwd()).resolve() != home.resolve():
        problems.append(
            Problem(
                "version-skew", "raymerge came along, and another copy of it is imported", str(home),
                "its code comes one way at a time", "leave out --ship-code, or use an image without raymerge",
            )
        )  # fmt: skip
    return problems
