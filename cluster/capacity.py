"""What workers need against what nodes have: (need, nodes, growth) in, a verdict out. Pure: no Ray, no clock, no IO.

needs     what each worker asks of a node, from the plan
assess    whether it fits: now, in part, when more nodes have come, or never
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from merger.errors import ManifestError
from merger.planning.devices import Device
from merger.planning.memory import IDLE_BYTES, peak_bytes
from merger.planning.nouns import MergePlan
from merger.tensors import format_size

LARGEST_REQUEST: Final = 1 << 49
"""Ray drops a request for more memory than about 9e14 bytes without a word."""

Resources = Mapping[str, float]
"""Ray's names (CPU, GPU, memory in bytes, custom ones) and amounts."""


@dataclass(frozen=True, slots=True)
class Need:
    """So many workers, each of which asks this of one node."""

    workers: int
    each: Resources

    def __str__(self) -> str:
        return f"{self.workers} workers of {', '.join(amount_text(*pair) for pair in self.each.items())}"


@dataclass(frozen=True, slots=True)
class NodeKind:
    """A kind of node that an autoscaler may add."""

    resources: Resources
    room: int | None
    """How many of them the cluster may have in all; None where nothing limits it."""


@dataclass(frozen=True, slots=True)
class Growth:
    """What is known of an autoscaler."""

    elastic: bool | None = False
    """Whether one is at work; None where it has not said yet."""
    kinds: tuple[NodeKind, ...] = ()
    """What it may add, where it says."""
    hopeless: tuple[Resources, ...] = ()
    """Requests of which it says that no node it may add has them."""
    coming: int = 0
    """Nodes that it has asked for and that are not there yet."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a need can be met."""

    kind: Literal["fits", "partly", "later", "never"]
    """`partly`: some workers fit now; `later`: none does, but nodes may come."""
    now: int
    """Workers that the nodes have room for, whatever is free on them."""
    lacks: str = ""
    """What no node has; empty where some node has all."""
    fix: str = ""
    coming: int = 0


# ---- what a worker asks of a node ------------------------------------------------------------------------------------


def needs(
    plan: MergePlan, nodes: Sequence[Resources], *, share: int, workers: int, device: str, gpus_per_worker: float
) -> dict[str, float]:  # fmt: skip
    """CPU, GPU and memory that each worker asks Ray for. Memory is what Ray packs workers by: never more than lets them
    all fit, unless the plan's smallest blocks need it, and never more than the largest node has. Where there is a head
    alone, which takes no work, nodes are still to come: then it is the share.

    Raises ManifestError(code `bad-arguments`).
    """
    found: dict[str, float] = {"CPU": 1}
    able = [node for node in nodes if node.get("CPU", 0) >= 1]
    if device == "cuda":
        if gpus_per_worker not in {1.0, *(2.0**-n for n in range(1, 7))}:
            raise ManifestError.of(
                "bad-arguments", f"{gpus_per_worker} GPUs a worker", where="gpus_per_worker",
                why="a GPU is shared by 2, 4, 8 … workers", fix="use 1, 0.5, 0.25 …",
            )  # fmt: skip
        found["GPU"] = gpus_per_worker
    largest = int(max((node.get("memory", 0) for node in able), default=0))
    if largest:
        even = largest // math.ceil(workers / len(able))
        wanted = max(min(share + IDLE_BYTES, even), peak_bytes(plan) + IDLE_BYTES)
        found["memory"] = max(1, min(wanted, largest, LARGEST_REQUEST))
    elif nodes and not able:
        found["memory"] = min(max(share, peak_bytes(plan)) + IDLE_BYTES, LARGEST_REQUEST)
    return found


def split_workers(workers: int, *, gpu_units: int, cpu_units: int, gpu_places: int) -> dict[Device, int]:
    """How many of all workers have a GPU and how many have none: a worker with a GPU does nothing but what needs one,
    unless there is only one worker. `gpu_places` is how many the nodes have room for; 0 where they have none yet."""
    if not gpu_units:
        return {"cpu": workers}
    if not cpu_units or workers == 1:
        return {"cuda": workers}
    with_gpus = min(gpu_places or max(1, workers // 2), workers - 1, gpu_units)
    return {"cuda": with_gpus, "cpu": workers - with_gpus}


# ---- the comparison --------------------------------------------------------------------------------------------------


def room(node: Resources, each: Resources) -> int:
    """How many workers one node has room for, with nothing else on it."""
    return min((int(node.get(name, 0) / amount + 1e-9) for name, amount in each.items() if amount), default=0)


def assess(need: Need, nodes: Sequence[Resources], growth: Growth) -> Verdict:
    """Compare a need with the nodes that are there and with those that may come."""
    now = sum(room(node, need.each) for node in nodes)
    if now >= need.workers:
        return Verdict("fits", now)
    if now:
        return Verdict("partly", now, coming=growth.coming)
    possible = [*nodes, *(kind.resources for kind in growth.kinds if kind.room is None or kind.room > 0)]
    lacks, fix = lacking(possible, need.each), _remedy(possible, need.each)
    may_come = growth.elastic is not False and not any(_same(need.each, asked) for asked in growth.hopeless)
    if growth.kinds and lacks:
        may_come = False
    return Verdict("later" if may_come else "never", 0, lacks or "no node has room for it", fix, growth.coming)


def _same(each: Resources, asked: Resources) -> bool:
    """Whether a request that an autoscaler names is for one of these workers; Ray rounds amounts to 0.0001."""
    named = {name: amount for name, amount in each.items() if amount}
    return named.keys() == asked.keys() and all(
        math.isclose(amount, asked[name], rel_tol=1e-6, abs_tol=1e-4) for name, amount in named.items()
    )


def lacking(nodes: Sequence[Resources], wanted: Resources) -> str:
    """What no node has, whatever is free on it; empty when some node has all."""
    if any(all(node.get(name, 0) >= amount for name, amount in wanted.items()) for node in nodes):
        return ""
    for name, amount in wanted.items():
        most = max((node.get(name, 0) for node in nodes), default=0)
        if most < amount:
            return f"no node has {amount_text(name, amount)}; the most is {amount_text(name, most)}"
    return f"no node has all of {', '.join(amount_text(*pair) for pair in wanted.items())}"


def _remedy(nodes: Sequence[Resources], wanted: Resources) -> str:
    """What to change where no node has enough."""
    short = [name for name, amount in wanted.items() if max((n.get(name, 0) for n in nodes), default=0) < amount]
    if "GPU" in short:
        most = max((node.get("GPU", 0) for node in nodes), default=0)
        return "share a GPU with --gpus-per-worker 0.5, or add nodes" if most else "use --device cpu, or add GPU nodes"
    if "memory" in short:
        return "use a smaller --memory or more --workers, or add nodes with more memory"
    return "add nodes that have it, or use fewer --workers, a smaller --memory, or --device cpu"


def amount_text(name: str, amount: float) -> str:
    return f"{format_size(int(amount))} of memory" if name == "memory" else f"{amount:g} {name}"


# ---- what is said of it ----------------------------------------------------------------------------------------------


def notice(need: Need, verdict: Verdict, seconds: float) -> str:
    """A sentence for people about what a run goes on with, or waits for; empty where all fits."""
    if verdict.kind == "partly":
        more = f"; {verdict.coming} more nodes are on their way" if verdict.coming else ""
        return f"the cluster has room for {verdict.now} of {need}: the run goes on with these{more}"
    if verdict.kind == "later":
        more = f", {verdict.coming} nodes are on their way" if verdict.coming else ""
        return f"{verdict.lacks}; waiting up to {seconds:.0f} s for one that has{more}"
    return ""
