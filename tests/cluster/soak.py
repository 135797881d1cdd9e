"""Bulks one after another in one process while requests fail and workers die: what is done, how often, and in how much
memory.

    python -m tests.cluster.soak --seconds 120 [--seed 1]

A bucket behind a proxy that misbehaves, a private Ray of two workers, and night after night the same bulk: adapters
folded into a base, and a sweep of four variants of one ties merge. Before each night some adapters are replaced. During
it, at random: answers of 503, bodies that end early, connections that are reset, slow answers, a worker killed, the
bulk stopped and run again. One JSON line a night, and one at the end.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from unittest import mock

import psutil

from cluster.connect import connection
from merger.bulk import load_bulk, plan_bulk
from merger.bulk_report import BulkReport
from merger.bulk_run import run_bulk
from merger.errors import InfrastructureError
from merger.receipts import Receipt
from merger.run import Stop
from merger.session import Session
from tests.conformance.folders import adapter, lora_tensors, model, model_tensors
from tests.counterparts.faults import Fault, FaultProxy
from tests.counterparts.s3 import S3Server

BUCKET: Final = "raymerge"
ADAPTERS: Final = 12
LAYERS: Final = 4
ROWS, COLS = 512, 512
MODULES: Final = tuple(f"model.layers.{i}.self_attn.q_proj" for i in range(LAYERS))
SETTINGS: Final = {
    "RAYMERGE_HTTP_STALL_SECONDS": "10", "RAYMERGE_HTTP_FIRST_WAIT_SECONDS": "0.05",
    "RAYMERGE_HTTP_LONGEST_WAIT_SECONDS": "1", "RAYMERGE_START_SECONDS": "600",
}  # fmt: skip


@dataclass(slots=True)
class Accepted:
    """Every receipt that was entered into a journal, by output and unit."""

    units: dict[str, Counter[int]] = field(default_factory=dict)
    begun: list[str] = field(default_factory=list)
    """Outputs that were taken, each time."""

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        record, start = Session.record, Session.start

        def recorded(session: Session, receipts: Iterable[Receipt]) -> None:
            found = list(receipts)
            record(session, found)
            self.units.setdefault(session.planned.outputs[0].path, Counter()).update(r.unit for r in found)

        def started(session: Session) -> None:
            self.begun.append(session.planned.outputs[0].path)
            start(session)

        with mock.patch.object(Session, "record", recorded), mock.patch.object(Session, "start", started):
            yield


class Nights:
    """The bucket, its contents, and one bulk again and again."""

    def __init__(self, folder: Path, s3: S3Server, proxy: FaultProxy, seed: int) -> None:
        self.s3, self.proxy, self.folder = s3, proxy, folder
        self.client = s3.client()  # one: each reads megabytes of descriptions, which would be counted as growth
        self.chance = random.Random(seed)
        self.accepted = Accepted()
        self.finished: dict[str, str] = {}
        """Output → content digest."""
        self.versions = dict.fromkeys(range(ADAPTERS), 0)
        self.kills = self.stops = self.faults = self.retries = 0
        for number, name in enumerate(("base", "m1", "m2")):
            self._upload(
                model(folder / name, number, tensors=model_tensors(number, rows=ROWS, cols=COLS, layers=LAYERS))
            )
        for number in range(ADAPTERS):
            self._replace(number)

    def _upload(self, folder: Path, key: str = "") -> None:
        for file in folder.iterdir():
            key_ = f"in/{key or folder.name}/{file.name}"
            self.client.put_object(Bucket=BUCKET, Key=key_, Body=file.read_bytes())

    def _replace(self, number: int) -> None:
        seed = 1000 * self.versions[number] + number
        tensors = lora_tensors(seed, modules=MODULES, rank=8, rows=ROWS, cols=COLS)
        self._upload(adapter(self.folder / "adapter", seed, rank=8, tensors=tensors), f"adapters/a{number:02}")
        self.versions[number] += 1

    def document(self) -> dict[str, Any]:
        source = f"s3://{BUCKET}/in"
        ties = {
            "merge_method": "ties", "base_model": f"{source}/base", "name": "ties", "parameters": {"density": 0.5},
            "models": [{"model": f"{source}/m{n}", "parameters": {"weight": 1.0}} for n in (1, 2)],
        }  # fmt: skip
        sweep = [{**ties, "name": f"ties-{d}", "parameters": {"density": d}} for d in (0.2, 0.4, 0.6, 0.8)]
        folds = [
            {"name": f"a{n:02}", "base_model": f"{source}/base",
             "adapters": [{"adapter": f"{source}/adapters/a{n:02}"}]}
            for n in range(ADAPTERS)
        ]  # fmt: skip
        output = {"kind": "model", "path": f"s3://{BUCKET}/out/" + "{name}", "exists": "version"}
        return {"merges": [*folds, *sweep], "defaults": {"output": output}}

    def night(self) -> dict[str, Any]:
        """Replace some inputs, run the bulk to its end, and see that exactly what they change was made."""
        moved = self.chance.sample(range(ADAPTERS), self.chance.randrange(1, 5)) if self.finished else []
        for number in moved:
            self._replace(number)
        expected = len(moved) if self.finished else ADAPTERS + 4
        before, attempts = len(self.finished), 0
        while True:
            attempts += 1
            assert attempts < 10, "the bulk does not come to its end"
            try:
                report = self._attempt(disturbed=attempts <= 3)
            except InfrastructureError:  # the command would end with 75: it is given again
                self.retries += 1
                continue
            for merge in report.merges:
                if merge.report is None:
                    continue
                assert merge.state == "already done" or merge.path not in self.finished, f"{merge.path} was made twice"
                # What an attempt made that did not come to its end is found done by the next.
                self.finished.setdefault(merge.path, merge.report.content_digest)
            if report.stopped is None and not report.failures:
                break
            for failed in report.failures:  # of infrastructure alone: what a retry mends
                assert "Infrastructure" in type(failed.error).__name__, failed.problems
        assert len(self.finished) == before + expected, (before, expected, report.lines())
        assert report.count("done") + report.count("already done") == ADAPTERS + 4
        return {"moved": len(moved), "made": len(self.finished) - before, "attempts": attempts}

    def _attempt(self, *, disturbed: bool) -> BulkReport:
        from cluster.run import run_bulk_on_ray

        planned = plan_bulk(load_bulk(self.document()))
        stop = Stop()
        if disturbed:
            self._misbehave()
        kill_at = 0.0 if disturbed else None
        stop_at = self.chance.uniform(3, 20) if disturbed and self.chance.random() < 0.3 else None
        started = time.monotonic()

        def listen(progress: Any) -> None:
            nonlocal kill_at
            now = time.monotonic() - started
            if kill_at is None or not progress.bytes_written:
                kill_at = None if kill_at is None else now + self.chance.uniform(0, 6)
            elif now > kill_at and (found := merge_workers()):
                self.chance.choice(found).kill()
                self.kills += 1
                kill_at = now + self.chance.uniform(4, 12)
            if stop_at is not None and now > stop_at and not stop.requested:
                self.stops += 1
                stop.set(15)

        try:
            with self.accepted.watching():
                return run_bulk(
                    planned, workers=2, memory=256 << 20, executor=run_bulk_on_ray, listener=listen, stop=stop
                )
        finally:
            log = self.proxy.log()
            self.faults += sum(exchange.fault is not None for exchange in log)
            self.proxy.clear()
            self.proxy.forget()

    def _misbehave(self) -> None:
        """Faults that the budgets of a request and of a job can bear."""
        chance = self.chance
        for _ in range(4):
            after, times = chance.randrange(120), chance.randrange(1, 4)
            kind = chance.choice(("slow down", "cut", "reset", "delay"))
            if kind == "slow down":
                self.proxy.add(Fault("status", code=503, error="SlowDown", after=after, times=times))
            elif kind == "cut":
                self.proxy.add(Fault("cut", at=1000, range_only=True, after=after, times=times))
            elif kind == "reset":
                self.proxy.add(Fault("reset", method="PUT", after=after, times=times))
            else:
                self.proxy.add(Fault("delay", seconds=0.2, after=after, times=10 * times))

    def check(self) -> None:
        """Nothing lost, nothing done twice: each unit of each output was accepted once, and all of it stands there."""
        taken = Counter(self.accepted.begun)
        for path, digest in self.finished.items():
            name = path.removeprefix(f"s3://{BUCKET}/")
            stored = json.loads(self.client.get_object(Bucket=BUCKET, Key=f"{name}/raymerge.json")["Body"].read())
            assert stored["content_digest"] == digest, path
            units = self.accepted.units[path]
            report = self.client.get_object(Bucket=BUCKET, Key=f"{name}/raymerge-report.json")
            assert sorted(units) == list(range(json.loads(report["Body"].read())["units"])), path
            assert set(units.values()) == {1}, (path, units)
            assert taken[path] >= 1
        keys = self.s3.keys(BUCKET, "out/")
        assert not [key for key in keys if "/.raymerge/" in key]
        assert not self.s3.uploads(BUCKET, "out/")
        assert {key.rsplit("/", 1)[0] for key in keys if key.endswith("/raymerge.json")} == {
            path.removeprefix(f"s3://{BUCKET}/") for path in self.finished
        }


def merge_workers() -> list[psutil.Process]:
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if any("MergeWorker" in part for part in process.cmdline()[:1]):
                found.append(process)
    return found


def footprint() -> dict[str, float]:
    """Of this process, the driver: resident MiB, threads, open files."""
    gc.collect()
    process = psutil.Process()
    return {
        "resident": round(process.memory_info().rss / (1 << 20), 1), "threads": process.num_threads(),
        "files": process.num_fds(),
    }  # fmt: skip


def say(line: Mapping[str, Any]) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--seed", type=int, default=1)
    told = parser.parse_args()
    ended = time.monotonic() + told.seconds
    with (
        tempfile.TemporaryDirectory() as folder, S3Server.start() as s3,
        FaultProxy.start(s3.endpoint, objects=s3.objects) as proxy,
    ):  # fmt: skip
        os.environ.update({**s3.environment(endpoint=proxy.endpoint), **SETTINGS})
        with connection("private", workers=2):
            nights = Nights(Path(folder), s3, proxy, told.seed)
            number = 0
            while number < 2 or time.monotonic() < ended:
                started = time.monotonic()
                line = nights.night()
                number += 1
                seconds = round(time.monotonic() - started, 1)
                say({"night": number, **line, "seconds": seconds, **footprint()})
            nights.check()
            units = sum(counted.total() for counted in nights.accepted.units.values())
            say(
                {"nights": number, "merges": len(nights.finished), "kills": nights.kills, "stops": nights.stops,
                 "retries": nights.retries, "faults": nights.faults, "units": units}
            )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
