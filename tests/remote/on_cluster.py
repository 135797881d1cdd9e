"""A Ray of several nodes on this machine, and merges on it during which a node or a worker is killed.

python -m tests.remote.on_cluster MANIFEST OUT --kill node --rounds 3 --seed 1

prints one JSON line a round: {"out", "content_digest", "killed", "after"}. The outputs are OUT-0, OUT-1, ….
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import threading
import time
from typing import Any

FAST = {
    "health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 3,
}  # fmt: skip


def merge_workers() -> list[int]:
    """Process ids of the actors that merge: they descend from this process, which started the nodes."""
    import psutil

    return [
        process.pid
        for process in psutil.Process().children(recursive=True)
        if any("MergeWorker" in part for part in process.cmdline())
    ]


class Killer:
    """Kills a node or a worker once, a while after the merge's first progress."""

    def __init__(self, cluster: Any, what: str, delay: float) -> None:
        self._cluster = cluster
        self._what = what
        self._delay = delay
        self._begun = threading.Event()
        self._ended = threading.Event()
        self.killed = ""
        self.started = 0.0
        self._thread = threading.Thread(target=self._work)
        self._thread.start()

    def __call__(self, progress: Any) -> None:
        self._begun.set()

    def _work(self) -> None:
        self._begun.wait()
        self.started = time.monotonic()
        if self._ended.wait(self._delay):
            return
        if self._what == "node":
            self._cluster.remove_node(next(iter(self._cluster.worker_nodes)), allow_graceful=False)
            self.killed = "node"
        elif self._what == "worker" and (pids := merge_workers()):
            os.kill(pids[0], signal.SIGKILL)
            self.killed = "worker"

    def end(self) -> None:
        self._ended.set()
        self._begun.set()
        self._thread.join()
        if self.killed == "node":  # Ray starts nodes in the main thread only
            self._cluster.add_node(num_cpus=2, object_store_memory=100 << 20)
            self._cluster.wait_for_nodes()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("manifest")
    parser.add_argument("out")
    parser.add_argument("--kill", choices=("node", "worker", "nothing"), default="nothing")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=3)
    told = parser.parse_args()

    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True, connect=False,
        head_node_args={
            "num_cpus": 0, "include_dashboard": False, "object_store_memory": 100 << 20, "_system_config": FAST,
        },
    )  # fmt: skip
    for _ in range(2):
        cluster.add_node(num_cpus=2, object_store_memory=100 << 20)
    cluster.wait_for_nodes()

    from cluster.connect import connection
    from merger import api

    random_ = random.Random(told.seed)
    with connection(cluster.address, workers=told.workers):
        from cluster.run import run_on_ray

        seconds = 0.0
        for number in range(-2, told.rounds):
            # Two rounds are left alone: the second, which is warm, says for how long there is something to kill.
            delay = random_.uniform(0.0, 0.8 * seconds) if number >= 0 else 0.0
            killer = Killer(cluster, told.kill if number >= 0 else "nothing", delay)
            out = f"{told.out}-{number + 2}"
            try:
                report = api.merge(told.manifest, out, workers=told.workers, runner=run_on_ray, listener=killer)
            finally:
                killer.end()
            if not killer.killed:  # the first round is slower than the others
                seconds = min(seconds or 1e9, time.monotonic() - killer.started)
            line = {
                "out": out, "content_digest": report.content_digest, "killed": killer.killed, "after": delay,
                "of": seconds,
            }  # fmt: skip
            sys.stdout.write(json.dumps(line) + "\n")
            sys.stdout.flush()
    cluster.shutdown()  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main()
