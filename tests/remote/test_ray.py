"""The same merges on Ray: on nodes and workers that die, as a submitted job, each repository file resolved once."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.conformance.folders import ROOT
from tests.remote.places import BUCKET, Places, adapters, ties

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def digest(places: Places) -> str:
    return str(places.merge(ties(places, "disk"), places.fresh("disk")).document["content_digest"])


def on_cluster(places: Places, source: str, out: str, *options: object) -> list[dict[str, Any]]:
    path = places.folder / f"{random.randrange(1 << 48):x}.yaml"
    path.write_text(json.dumps(ties(places, source)))
    done = subprocess.run(
        [sys.executable, "-m", "tests.remote.on_cluster", str(path), out, *map(str, options)], cwd=ROOT,
        env=places.environment({"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}), text=True,
        stdin=subprocess.DEVNULL, capture_output=True, check=False, timeout=550,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def check(places: Places, rounds: list[dict[str, Any]], digest: str) -> None:
    assert [r["content_digest"] for r in rounds] == [digest] * len(rounds)
    for r in rounds:
        if not r["out"].startswith("s3://"):
            assert not (Path(r["out"]) / ".raymerge").exists()
            continue
        prefix = r["out"].removeprefix(f"s3://{BUCKET}/")
        assert not [key for key in places.s3.keys(BUCKET, prefix) if "/.raymerge/" in key]
        assert not [upload for upload in places.s3.uploads(BUCKET) if upload.key.startswith(prefix)]


@pytest.mark.slow
@pytest.mark.parametrize("what", ["node", "worker"])
def test_a_merge_survives_a_node_and_a_worker(places: Places, digest: str, what: str) -> None:
    rounds = on_cluster(places, "s3", places.fresh("s3"), "--kill", what, "--rounds", 2, "--seed", 1)
    check(places, rounds, digest)
    assert what in {r["killed"] for r in rounds}


@pytest.mark.slow
@pytest.mark.parametrize("to", ["s3", "disk"])
@pytest.mark.parametrize("what", ["node", "worker"])
def test_a_merge_survives_them_at_random_moments(places: Places, digest: str, what: str, to: str) -> None:
    rounds = on_cluster(places, "s3", places.fresh(to), "--kill", what, "--seed", 2, "--rounds", 15)
    check(places, rounds, digest)
    assert len([r for r in rounds if r["killed"]]) >= 10


@dataclass(frozen=True, slots=True)
class Head:
    """A Ray that was started on its own, as a cluster's is: jobs are submitted to it."""

    address: str
    folder: Path


@pytest.fixture(scope="module")
def head(places: Places, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    import socket

    ports = []
    for _ in range(3):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            ports.append(probe.getsockname()[1])
    folder = Path("/tmp") / f"rm-{os.getpid()}"
    environment = places.environment(
        {
            "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        }
    )  # fmt: skip
    process = subprocess.Popen(
        [
            sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=4",
            f"--port={ports[0]}", f"--dashboard-port={ports[1]}", f"--dashboard-agent-listen-port={ports[2]}",
            "--include-dashboard=true", "--object-store-memory=100000000", f"--temp-dir={folder}",
        ], cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        yield Head(f"http://127.0.0.1:{ports[1]}", folder)
    finally:
        process.terminate()
        process.communicate(timeout=60)


def submitted(head: Head, entrypoint: str) -> tuple[Mapping[str, Any], str]:
    """What became of a job, and its log."""
    from ray.job_submission import JobSubmissionClient

    deadline = time.monotonic() + 90
    while True:
        try:
            client = JobSubmissionClient(head.address)
            job = client.submit_job(entrypoint=entrypoint)
            break
        except (ConnectionError, RuntimeError):
            assert time.monotonic() < deadline
            time.sleep(0.5)
    while not client.get_job_status(job).is_terminal():
        assert time.monotonic() < deadline + 120
        time.sleep(0.5)
    return client.get_job_info(job).model_dump(mode="json"), client.get_job_logs(job)


def test_a_submitted_job_merges_from_the_hub_to_the_bucket(places: Places, digest: str, head: Head) -> None:
    """It attaches to the cluster it runs on; the Hub is asked once for each file; no secret is in any record."""
    path = places.folder / "job.yaml"
    path.write_text(json.dumps(ties(places, "hub")))
    out = places.fresh("s3")
    places.hub.clear_log()
    record, log = submitted(head, f"python -m jobs.cli merge {path} {out} --workers 3 --json")
    assert record["status"] == "SUCCEEDED", log
    document = json.loads(log[log.index("\n{") if "\n{" in log else log.index("{") :])
    assert document["content_digest"] == digest
    heads = [r.path for r in places.hub.log() if r.method == "HEAD" and r.path.endswith("model.safetensors")]
    assert len(heads) == len(set(heads)) == 3
    environment = places.environment()
    secrets = [environment["HF_TOKEN"], environment["AWS_SECRET_ACCESS_KEY"], "X-Amz-Signature", "X-Amz-Credential"]
    texts = {"record": json.dumps(record, default=str).encode(), "log": log.encode()}
    for file in head.folder.rglob("*"):
        if file.is_file() and not file.is_symlink():
            texts[str(file)] = file.read_bytes()
    assert len(texts) > 10
    assert [(name, s[:6]) for name, text in texts.items() for s in secrets if s.encode() in text] == []


def test_a_job_that_cannot_start_says_why_and_with_which_code(places: Places, head: Head) -> None:
    path = places.folder / "job-bad.yaml"
    path.write_text(json.dumps({**ties(places, "hub"), "base_model": "acme/never-was"}))
    record, log = submitted(head, f"python -m jobs.cli merge {path} {places.fresh('s3')}")
    assert record["status"] == "FAILED"
    assert record["driver_exit_code"] == 2
    assert "no-such-source" in log


def test_a_fold_from_the_hub_on_a_private_ray(places: Places) -> None:
    here = places.merge(adapters(places, "disk", "model"), places.fresh("disk"))
    there = places.merge(adapters(places, "hub", "model"), places.fresh("hub"), "--on", "ray", "--workers", 2)
    assert there.code == 0, there.err
    assert there.document["content_digest"] == here.document["content_digest"]
