"""What a unit costs the driver: planning, scheduling, journal, and the bytes it holds, for many units that do nothing.

    python -m tests.benchmarks.bench_driver [--units N] [--on nowhere|ray] [--profile]

nowhere   workers that answer at once, in this process: messages are packed and unpacked, receipts come as lines of the
          journal, and units write nothing. What is measured is all that a driver does but waiting for Ray (default)
ray       two real actors, whose units merge eight numbers each; CPU seconds of the driver's process alone

Ends with status 1 where a unit costs more than a millisecond of CPU, or 16 KiB of memory.
"""

from __future__ import annotations

import argparse
import cProfile
import hashlib
import json
import pstats
import struct
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Final
from unittest import mock

from cluster.connect import connection, set_authentication
from cluster.schedule import Event, Finished, Hand, Ready, Schedule
from merger import api
from merger.journal import receipt_to_json
from merger.planning.nouns import MergePlan
from merger.receipts import Extent, Receipt
from merger.run import Progression, Recorder, settle
from merger.session import Session
from merger.watch import Watch
from tests.conformance.folders import model

TARGET_SECONDS: Final = 1e-3
"""CPU a unit, of the driver's process, from the first decision to the last receipt in the journal."""
TARGET_BYTES_A_UNIT: Final = 16 << 10
"""Resident memory that each unit may add, plan and all."""
ELEMENTS: Final = 8


def many_tensors(folder: Path, count: int) -> dict[str, Any]:
    """Two models of so many tensors of eight numbers, and the manifest of their mean."""
    data = struct.pack(f"<{ELEMENTS}e", *range(ELEMENTS)) * count
    header = {
        f"model.layers.{i // 10}.part{i % 10}.weight": {
            "dtype": "F16", "shape": [1, ELEMENTS], "data_offsets": [2 * ELEMENTS * i, 2 * ELEMENTS * (i + 1)],
        }
        for i in range(count)
    }  # fmt: skip
    text = json.dumps(header).encode()
    for name in ("m1", "m2"):
        model(folder / name, 0, layers=1)
        (folder / name / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    models = [{"model": str(folder / name), "parameters": {"weight": 1.0}} for name in ("m1", "m2")]
    return {"merge_method": "linear", "models": models}


class Idlers:
    """Workers that are done with whatever they are given. Messages are what they are on Ray."""

    def __init__(self, plan: MergePlan) -> None:
        self._plan = plan
        self._begun: deque[int] = deque()
        self._handed: dict[int, list[Hand]] = {}

    def start(self, number: int) -> None:
        self._begun.append(number)

    def hand(self, hand: Hand) -> None:
        self._handed.setdefault(hand.worker, []).append(hand)

    def drop(self, number: int) -> None:
        self._handed.pop(number, None)

    def forget(self, runs: Iterable[int]) -> None:
        pass

    def states(self) -> list[str]:
        return []

    def events(self, seconds: float) -> Iterator[Event]:
        from cluster.actors import Answer, Handed, Orders, pack, unpack
        from cluster.run import _outcome

        while self._begun:
            yield Ready(self._begun.popleft(), "node")
        handed, self._handed = self._handed, {}
        for number, hands in handed.items():
            orders = Orders([Handed(h.ticket, h.job, h.findings, h.memory) for h in hands])
            told: Orders = unpack(pack(orders))
            answers = [
                Answer(one.ticket, tuple(receipt_to_json(self._receipt(u.index)) for u in one.job.units), None, None)
                for one in told.handed
            ]
            known = {hand.ticket: hand for hand in hands}
            heard: list[Answer] = unpack(pack(answers))
            yield Finished(number, tuple(_outcome(answer, known[answer.ticket]) for answer in heard))

    def _receipt(self, index: int) -> Receipt:
        unit = self._plan.units[index]
        place = self._plan.tasks[unit.task].results[0].places[0]
        start, end = place.span(unit.first, unit.last)
        digest = hashlib.sha256(str(index).encode()).hexdigest()
        return Receipt(index, (Extent(place.output, place.file, start, end, digest),), (), {}, 4 * ELEMENTS, 1e-4)


def resident(what: str = "VmRSS") -> int:
    """Bytes of this process, now or (VmHWM) at most."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{what}:"):
            return int(line.split()[1]) << 10
    raise RuntimeError(f"the kernel does not say {what}")


def nowhere(planned: MergePlan, workers: int) -> int:
    """Drive a plan to its end, receipts and all. Returns how many segments the journal has."""
    from cluster.metrics import RunMetrics
    from cluster.run import _drive

    session = Session.open(planned)
    session.start()
    progression = Progression(planned)
    recorder = Recorder(progression, session.record, None)
    schedule = Schedule(progression, workers=workers, memory=1 << 20)
    crew: Any = (schedule, Idlers(planned))
    uncounted: Any = mock.create_autospec(RunMetrics, instance=True)
    uncounted.done = lambda receipts: None
    _drive(
        [crew], progression, tick=recorder.tick, stop=None, metrics=uncounted, watch=Watch(told=[]),
        enter=lambda outcome: settle(outcome, progression, session.sinks, recorder),
    )  # fmt: skip
    recorder.flush()
    assert progression.num_left == 0
    folder = Path(planned.outputs[0].path) / ".raymerge" / "journal"
    segments = [file.read_bytes().count(b"\n") - 1 for file in folder.iterdir()]
    assert sum(segments) == len(planned.units)
    session.close()
    return len(segments)


def on_ray(planned: MergePlan, workers: int) -> int:
    from cluster.run import run_on_ray

    return int(api.run_planned(planned, workers=workers, memory=256 << 20, runner=run_on_ray).units)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--units", type=int, default=100_000)
    parser.add_argument("--workers", type=int, default=32)
    parser.add_argument("--on", choices=["nowhere", "ray"], default="nowhere")
    parser.add_argument("--profile", action="store_true")
    told = parser.parse_args()
    set_authentication(private=True)  # ray reads it when it is imported, here and below
    workers = 2 if told.on == "ray" else told.workers
    ray = connection("private", workers=workers) if told.on == "ray" else nullcontext()
    with tempfile.TemporaryDirectory() as temporary, ray:  # connecting, two seconds of CPU, is not counted
        folder = Path(temporary)
        api.plan(many_tensors(folder / "few", 10), folder / "few" / "out")  # all is imported
        document = many_tensors(folder, told.units)
        idle, cpu = resident(), time.process_time()
        planned = api.plan(document, folder / "out")
        assert not planned.problems, planned.problems
        units = len(planned.units)
        digest = planned.digest
        planning, after_plan = time.process_time() - cpu, resident()
        profile = cProfile.Profile() if told.profile else None
        cpu, clock = time.process_time(), time.monotonic()
        with profile or nullcontext():
            extra = nowhere(planned, workers) if told.on == "nowhere" else on_ray(planned, workers)
        driving, clock = time.process_time() - cpu, time.monotonic() - clock
        peak = resident("VmHWM")
    if profile is not None:
        pstats.Stats(profile).sort_stats("tottime").print_stats(25)
    print(f"{units} units ({digest[:12]}), {workers} workers, {told.on}")
    print(
        f"  planning  {planning:7.1f} s CPU, {planning / units * 1e3:6.3f} ms a unit; resident {after_plan >> 20} MiB"
    )
    print(f"  driving   {driving:7.1f} s CPU, {driving / units * 1e3:6.3f} ms a unit; {clock:.1f} s on the clock")
    print(f"  resident  {idle >> 20} MiB idle, {peak >> 20} MiB at most, {(peak - idle) / units / 1024:.1f} KiB a unit")
    print(f"  {'segments' if told.on == 'nowhere' else 'units reported'}  {extra}")
    fast = driving / units <= TARGET_SECONDS
    small = peak - idle <= TARGET_BYTES_A_UNIT * units
    return 0 if fast and small else 1


if __name__ == "__main__":
    sys.exit(main())
