"""A cluster on machines of its own, each with its own address: jobs from outside, nodes that are cut off, frozen,
drained and crashed, and nothing lost. Slow, and for root alone: see tests/counterparts/machines.py."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import random
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import torch

from merger import api
from tests.cluster.raylets import (
    BUCKET,
    BUSY_SECONDS,
    GCS_PORT,
    Raylets,
    is_driver,
    is_raylet,
    is_worker,
    kill_one,
    until,
)
from tests.cluster.runs import ties
from tests.conformance.folders import Outcome, adapter, ended, lora_tensors, model, model_tensors
from tests.counterparts import machines

pytestmark = [
    pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(3600),
    pytest.mark.skipif(bool(machines.missing()), reason=machines.missing()),
]  # fmt: skip

_log = logging.getLogger(__name__)

KILLS: Final = int(os.environ.get("RAYMERGE_KILLS", "50"))
SEED: Final = int(os.environ.get("RAYMERGE_SEED", "1"))
VICTIMS: Final = ("worker",) * 18 + ("driver",) * 14 + ("raylet",) * 12 + ("head",) * 6
"""Of fifty: a head takes everything with it, and long to come back."""
RESUMABLE: Final = 75
LAYERS: Final = 10


@pytest.fixture(scope="module")
def cluster() -> Iterator[Raylets]:
    with Raylets.start() as found:
        yield found


@pytest.fixture(scope="module")
def manifest(cluster: Raylets) -> dict[str, Any]:
    """A merge from the bucket, long enough to be interrupted."""
    for seed, name in enumerate(("base", "m1", "m2")):
        tensors = model_tensors(seed, rows=2500, cols=2048, layers=LAYERS, dtype=torch.bfloat16)
        cluster.upload(model(cluster.folder / name, seed, tensors=tensors), name)
    return ties(cluster.folder) | {
        "base_model": f"s3://{BUCKET}/in/base",
        "models": [{"model": f"s3://{BUCKET}/in/m{n}", "parameters": {"weight": 1.0 / n}} for n in (1, 2)],
    }


@pytest.fixture(scope="module")
def digest(cluster: Raylets, manifest: dict[str, Any]) -> str:
    """Of the same merge in one process, from this machine's disk."""
    return str(api.merge(ties(cluster.folder), cluster.folder / "alone").content_digest)


def test_submitted_followed_stopped_and_resumed(cluster: Raylets, manifest: dict[str, Any], digest: str) -> None:
    out = cluster.fresh()
    refused = cluster.run("submit", cluster.written(manifest), "-o", out, "--address", cluster.address)
    assert refused.code == 2, refused.err
    assert "insecure" in refused.err
    job = cluster.submit(manifest, out)
    until(lambda: cluster.journaled(out) or job.poll() is not None)
    asked = cluster.run("stop", out, "--json")
    assert asked.document["asked"], asked.err
    stopped = ended(job, timeout=BUSY_SECONDS)
    assert stopped.code == 143, stopped.err
    assert cluster.run("status", out, "--json").document["outputs"][0]["state"] == "stopped"
    assert cluster.keys(out, "raymerge.json") == []
    resumed = ended(cluster.submit(manifest, out), timeout=BUSY_SECONDS)
    assert resumed.code == 0, resumed.err
    assert resumed.document["submission_id"] == stopped.document["submission_id"].replace("-a1", "-a2")
    cluster.check_finished(out, digest)
    assert cluster.document(out, "raymerge-report.json")["units_resumed"] > 0


def test_a_node_that_is_cut_off_from_the_bucket(cluster: Raylets, manifest: dict[str, Any], digest: str) -> None:
    """Its workers answer the driver and reach no object: what they were given is done elsewhere."""
    out = cluster.fresh()
    lost = cluster.nodes[0]
    job = cluster.submit(manifest, out, "--workers", "2")
    try:
        until(lambda: all(node.processes(is_worker) for node in cluster.nodes) or job.poll() is not None)
        cluster.network.part(cluster.store, lost)
        outcome = ended(job, timeout=BUSY_SECONDS)
    finally:
        cluster.network.join(cluster.store, lost)
    assert outcome.code == 0, outcome.err
    cluster.check_finished(out, digest)


def test_a_driver_that_is_cut_off_ends_as_an_infrastructure_error(
    cluster: Raylets, manifest: dict[str, Any], digest: str
) -> None:
    """It cannot renew its lease nor write its journal: it says so, and the next job goes on."""
    out = cluster.fresh()
    job = cluster.submit(manifest, out)
    try:
        until(lambda: cluster.journaled(out) or job.poll() is not None)
        cluster.network.part(cluster.store, cluster.head)
        outcome = ended(job, timeout=BUSY_SECONDS)
    finally:
        cluster.network.join(cluster.store, cluster.head)
    if outcome.code:  # it may have been over already
        assert outcome.code == RESUMABLE, outcome.err
        assert cluster.keys(out, "/raymerge.json") == []
        again = ended(cluster.submit(manifest, out), timeout=BUSY_SECONDS)
        assert again.code == 0, again.err
    cluster.check_finished(out, digest)


def test_a_node_that_drains_and_goes(cluster: Raylets, manifest: dict[str, Any], digest: str) -> None:
    """A preemption with notice: the merge ends in its first attempt, and nobody is charged."""
    out = cluster.fresh()
    leaving = cluster.nodes[1]
    job = cluster.submit(manifest, out, "--workers", "2")
    until(lambda: cluster.journaled(out) or job.poll() is not None)
    cluster.head.run(
        [
            cluster.ray, "drain-node", "--address", f"{cluster.head.address}:{GCS_PORT}", "--node-id",
            cluster.node_id(leaving), "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "to be reclaimed",
            "--deadline-remaining-seconds", "5",
        ], env=cluster.environment, stderr=subprocess.STDOUT,
    )  # fmt: skip
    time.sleep(5)  # the notice that a cloud gives
    leaving.crash()
    outcome = ended(job, timeout=BUSY_SECONDS)
    cluster.start_nodes(leaving)
    assert outcome.code == 0, outcome.err
    assert outcome.document["submission_id"].endswith("-a1")
    cluster.check_finished(out, digest)


def test_a_retry_that_overlaps_the_first_attempt(cluster: Raylets, manifest: dict[str, Any], digest: str) -> None:
    """As when a RayJob is retried while the cluster of its first attempt is paused: two drivers, each on a Ray of its
    own. Whoever is silent for a minute loses the output, and writes nothing more when it wakes up."""
    out = cluster.fresh()
    path = cluster.written(manifest)
    first, second = cluster.network.machine("first"), cluster.network.machine("second")

    def attempt(machine: machines.Machine) -> subprocess.Popen[str]:
        line: list[str | Path] = [
            cluster.python,
            "-m",
            "jobs.merge",
            str(path),
            out,
            "--on",
            "ray",
            "--workers",
            "2",
            "--json",
        ]
        return machine.start(
            line, {**cluster.environment, "RAY_TMPDIR": str(cluster.network.scratch)}, cwd=cluster.folder,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    one = attempt(first)
    until(lambda: cluster.journaled(out) or one.poll() is not None)
    assert one.poll() is None
    first.freeze()
    held = ended(attempt(second), timeout=BUSY_SECONDS)
    assert held.code == RESUMABLE, held.err
    assert "lease-held" in held.err
    codes: list[int] = []
    until_stale = time.monotonic() + BUSY_SECONDS
    while not codes or codes[-1] == RESUMABLE:  # until the first has been silent for a minute
        assert time.monotonic() < until_stale, codes
        two = attempt(second)
        until(functools.partial(has_taken_over, cluster, out, two))
        if two.poll() != RESUMABLE:
            first.thaw()  # both are at work now
        codes.append(ended(two, timeout=BUSY_SECONDS).code)
    loser = ended(one, timeout=BUSY_SECONDS)
    assert codes[-1] == 0
    assert loser.code == RESUMABLE, loser.err
    assert "lease-lost" in loser.err, loser.err
    cluster.check_finished(out, digest)
    assert cluster.run("verify", out).code == 0


def has_taken_over(cluster: Raylets, out: str, process: subprocess.Popen[str]) -> bool:
    """Whether the second lease on an output is taken, or nobody wants it any more."""
    return process.poll() is not None or any(epoch > 1 for epoch in cluster.epochs(out))


# ---- secrets ---------------------------------------------------------------------------------------------------------


def remains(cluster: Raylets) -> Iterator[tuple[str, bytes]]:
    """All that runs have left so far: files of every machine, job records and actors, objects beside the sources."""
    for path in cluster.folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # a run may be under way
            if path.is_file() and not path.is_symlink():
                yield str(path), path.read_bytes()
    for route in ("/api/jobs/", "/api/v0/actors?detail=true", "/api/v0/tasks?detail=true", "/nodes?view=summary"):
        told = cluster.ask(route)
        assert told, route
        yield route, json.dumps(told).encode()
    for job in cluster.ask("/api/jobs/"):
        told = cluster.ask(f"/api/jobs/{job['submission_id']}/logs")
        yield f"log of {job['submission_id']}", json.dumps(told).encode()
    client = cluster.s3.client()
    for key in cluster.s3.keys(BUCKET, "out/"):
        with contextlib.suppress(client.exceptions.NoSuchKey):
            yield key, client.get_object(Bucket=BUCKET, Key=key)["Body"].read()


def test_no_secret_is_left_anywhere(cluster: Raylets, manifest: dict[str, Any]) -> None:
    """A merge that is submitted, followed, stopped and resumed, one that cannot start, and a bulk of which one fails:
    what they say and leave holds no token, no key and no signature."""
    said: list[Outcome] = []
    texts: list[tuple[str, bytes]] = []
    out = cluster.fresh()
    job = cluster.submit(manifest, out)
    until(lambda: cluster.journaled(out) or job.poll() is not None)
    texts += [(f"{name} (under way)", text) for name, text in remains(cluster)]
    said += [cluster.run("stop", out), ended(job, timeout=BUSY_SECONDS)]
    texts += [(f"{name} (stopped)", text) for name, text in remains(cluster)]
    said += [
        cluster.run("status", out, "--json"),
        ended(cluster.submit(manifest, out, "--debug"), timeout=BUSY_SECONDS),
    ]
    broken = {**manifest, "base_model": f"s3://{BUCKET}/in/never-was"}
    said.append(ended(cluster.submit(broken, cluster.fresh(), "--unplanned", "--debug"), timeout=BUSY_SECONDS))
    for seed in (1, 2):
        tensors = lora_tensors(seed, modules=["model.layers.0.self_attn.q_proj"], rank=4, rows=2500, cols=2048)
        if seed == 2:
            tensors[next(iter(tensors))][0, 0] = float("nan")
        cluster.upload(adapter(cluster.folder / f"a{seed}", seed, tensors=tensors), f"adapters/a{seed}")
    bulk = {
        "each": f"s3://{BUCKET}/in/adapters",
        "defaults": {
            "base_model": f"s3://{BUCKET}/in/base",
            "output": {"path": f"{cluster.fresh()}/{{name}}", "kind": "model"},
        },
    }  # fmt: skip
    said.append(ended(cluster.submit(bulk), timeout=BUSY_SECONDS))
    assert [outcome.code for outcome in said] == [0, 143, 0, 0, 2, 1], [outcome.err for outcome in said]
    texts += remains(cluster)
    texts += [(f"output {number}", (o.out + o.err).encode()) for number, o in enumerate(said)]
    secrets = [
        cluster.token, cluster.environment["HF_TOKEN"], cluster.environment["AWS_SECRET_ACCESS_KEY"],
        "X-Amz-Signature", "X-Amz-Credential", "Bearer ",
    ]  # fmt: skip
    assert len(texts) > 100
    assert {name for name, _ in texts if "/.raymerge/" in name}
    found = [(name, secret[:8]) for name, text in texts for secret in secrets if secret.encode() in text]
    assert found == []


# ---- fifty kills -----------------------------------------------------------------------------------------------------


class Chaos:
    """Merges one after another, during which processes die. Keeps what became of each attempt."""

    def __init__(self, cluster: Raylets, manifest: dict[str, Any], digest: str, chance: random.Random) -> None:
        self.chance = chance
        self.cluster = cluster
        self.manifest = manifest
        self.digest = digest
        self.out = cluster.fresh()
        self.job = cluster.submit(manifest, self.out)
        self.finished = 0
        self.ends: list[int] = []

    def go_on(self) -> None:
        """Where an attempt has ended, look at it, and start the next: of the same output, or of a new one."""
        if self.job.poll() is None:
            return
        self._look(ended(self.job))
        self.job = self.cluster.submit(self.manifest, self.out)

    def finish(self) -> None:
        for _ in range(4):
            if self._look(ended(self.job, timeout=BUSY_SECONDS)):
                return
            self.job = self.cluster.submit(self.manifest, self.out)
        raise AssertionError("the last merge does not end")

    def _look(self, outcome: Outcome) -> bool:
        self.ends.append(outcome.code)
        if outcome.code == 0:
            self.cluster.check_finished(self.out, self.digest)
            self.finished += 1
            self.out = self.cluster.fresh()
            return True
        assert outcome.code == RESUMABLE, outcome.err[-4000:]
        return False

    def kill(self, victim: str) -> None:
        _log.info("kill %s; ends so far %s", victim, self.ends)
        """One process of this kind, as soon as there is one."""
        cluster = self.cluster
        if victim == "head":
            cluster.crash_head()
        elif victim == "raylet":
            node = self.chance.choice(cluster.nodes)
            assert kill_one([node], is_raylet)
            until(lambda: not node.processes(is_raylet))
            node.crash()
            until(lambda: not cluster.node_id(node))
            cluster.start_nodes(node)
        else:
            where, matches = (cluster.nodes, is_worker) if victim == "worker" else ([cluster.head], is_driver)
            deadline = time.monotonic() + BUSY_SECONDS
            while not kill_one(where, matches):
                assert time.monotonic() < deadline, f"no {victim} to kill"
                self.go_on()
                time.sleep(0.05)


def test_kill_9_of_workers_raylets_drivers_and_heads(cluster: Raylets, manifest: dict[str, Any], digest: str) -> None:
    """Every attempt ends with the same bytes, or with 75 and what the next one needs to go on."""
    chance = random.Random(SEED)
    victims = [VICTIMS[number % len(VICTIMS)] for number in range(max(KILLS, len(VICTIMS)))]
    chance.shuffle(victims)
    chaos = Chaos(cluster, manifest, digest, chance)
    for victim in victims[:KILLS]:
        moment = time.monotonic() + chance.uniform(0, 6)
        while time.monotonic() < moment:
            chaos.go_on()
            time.sleep(0.05)
        chaos.kill(victim)
    chaos.finish()
    assert chaos.finished >= 1
    _log.info("seed %d, %d kills, %d merges finished, attempts ended with %s", SEED, KILLS, chaos.finished, chaos.ends)
