"""How many workers a merge gets, and pods of what size: rules of thumb on top of what the plan knows.

What the manifest says wins; what it leaves out is reckoned:

    a worker    twice the memory of the plan's smallest blocks, at least 1 GiB, and its process beside it
    workers     one for each 16 GiB read and written or 10^14 operations of dense SVDs, 32 at the most, none without
                a unit to do
    a pod       two workers where a merge streams (networks bound it), four where it computes, one a share of a GPU

None of it changes a byte of the output.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from merger.errors import ManifestError, PlanError, Problem
from merger.manifest.placement import Cluster, GpuWorkers, Kubernetes, Workers
from merger.planning.build import write_bytes
from merger.planning.memory import IDLE_BYTES, peak_bytes
from merger.planning.nouns import MergePlan
from merger.planning.summary import passes, read_bytes, spectral_flops

GIB: Final = 1 << 30
BYTES_PER_WORKER: Final = 16 * GIB
FLOPS_PER_WORKER: Final = 1e14
MOST_WORKERS: Final = 32
LEAST_SHARE: Final = GIB
STREAMING_WORKERS_PER_POD: Final = 2
COMPUTING_WORKERS_PER_POD: Final = 4
OBJECT_STORE_BYTES: Final = 200 << 20
"""Nothing of a merge goes through it; Ray wants 75 MiB at least."""
RAY_OWN_BYTES: Final = 5 * GIB // 4
"""Of a pod's memory, for the raylet, its agents and the object store; the rest Ray may promise to workers."""


@dataclass(frozen=True, slots=True)
class Demand:
    """What one or more plans ask for."""

    moved_bytes: int
    """Read in all passes, and written."""
    peak_bytes: int
    """What a worker needs for the smallest blocks."""
    flops: float
    """Of dense SVDs."""
    units: int
    device: Literal["cpu", "cuda"]


@dataclass(frozen=True, slots=True)
class Sizing:
    """Workers, and the pods that hold them."""

    device: Literal["cpu", "cuda"]
    workers: int
    memory: int
    """Bytes of buffers of all workers together: `--memory`."""
    gpus_per_worker: float
    workers_per_pod: int
    pods: int
    pod_cpu: float
    pod_memory: int
    pod_gpus: int

    @property
    def ray_memory(self) -> int:
        """Bytes that each pod declares to Ray."""
        return max(0, self.pod_memory - RAY_OWN_BYTES)


def demand_of(plans: Sequence[MergePlan]) -> Demand:
    """The demand of plans without problems, at least one."""
    return Demand(
        moved_bytes=sum(read_bytes(plan) * passes(plan) + write_bytes(plan) for plan in plans),
        peak_bytes=max(peak_bytes(plan) for plan in plans),
        flops=sum(spectral_flops(plan) for plan in plans),
        units=sum(len(plan.units) for plan in plans),
        device=plans[0].device,
    )


def read_demand(document: Any, *, where: str, device: Literal["cpu", "cuda"]) -> Demand:
    """The same from what `raymerge plan --json` printed. Raises ManifestError."""
    try:
        documents = document if isinstance(document, list) else [document]
        problems = [Problem(**problem) for one in documents for problem in one["problems"]]
        plans = [plan for one in documents for plan in _plans_of(one) if plan is not None]
        found = Demand(
            moved_bytes=sum(plan["read_bytes"] * plan["passes"] + plan["write_bytes"] for plan in plans),
            peak_bytes=max(plan["peak_memory_bytes"] for plan in plans),
            flops=sum(plan["spectral_flops"] for plan in plans), units=sum(plan["units"] for plan in plans),
            device=device,
        )  # fmt: skip
    except (KeyError, TypeError, ValueError) as error:
        raise ManifestError.of("bad-value", f"this is no plan: {type(error).__name__} {error}", where=where,
                               fix="make it with `raymerge plan MANIFEST --json`") from None  # fmt: skip
    if problems:
        raise PlanError(problems)
    return found


def _plans_of(document: Any) -> Sequence[Any]:
    """The plans in a document: its merges', where it is a bulk's."""
    return [merge["plan"] for merge in document["merges"]] if "merges" in document else [document]


def size_cluster(demand: Demand, cluster: Cluster, site: Kubernetes) -> Sizing:
    """Workers and pods for a demand on a site. The result may not fit the site's bounds: see sites.py."""
    workers = cluster.workers or _workers(demand)
    if cluster.memory is not None:
        share = cluster.memory // workers
    else:
        share = max(_round_up(2 * demand.peak_bytes, 256 << 20), LEAST_SHARE)
    gpus_per_worker = 1.0 if cluster.gpus_per_worker is None else cluster.gpus_per_worker
    group = worker_group(site, demand.device)
    pod_gpus = 0
    if demand.device == "cuda":
        pod_gpus = group.gpus if isinstance(group, GpuWorkers) else 1
        per_pod = int(pod_gpus / gpus_per_worker)
    else:
        per_pod = _usual_per_pod(demand) if group.cpu is None else int(group.cpu)
    if group.memory is not None:
        per_pod = min(per_pod, (group.memory - RAY_OWN_BYTES) // (share + IDLE_BYTES))
    per_pod = max(1, min(per_pod, workers))
    memory = group.memory or _round_up(per_pod * (share + IDLE_BYTES) + RAY_OWN_BYTES, GIB)
    return Sizing(
        device=demand.device, workers=workers, memory=share * workers, gpus_per_worker=gpus_per_worker,
        workers_per_pod=per_pod, pods=math.ceil(workers / per_pod),
        pod_cpu=group.cpu or _pod_cpu(demand, per_pod), pod_memory=memory, pod_gpus=pod_gpus,
    )  # fmt: skip


def worker_group(site: Kubernetes, device: Literal["cpu", "cuda"]) -> Workers:
    """The pods of the site that work on this kind of device."""
    if device == "cuda":
        return site.gpu_workers or GpuWorkers()
    return site.cpu_workers


def _workers(demand: Demand) -> int:
    by_bytes = math.ceil(demand.moved_bytes / BYTES_PER_WORKER)
    by_flops = math.ceil(demand.flops / FLOPS_PER_WORKER)
    return max(1, min(max(by_bytes, by_flops), demand.units, MOST_WORKERS))


def _usual_per_pod(demand: Demand) -> int:
    computes = demand.flops / FLOPS_PER_WORKER > demand.moved_bytes / BYTES_PER_WORKER
    return COMPUTING_WORKERS_PER_POD if computes else STREAMING_WORKERS_PER_POD


def _pod_cpu(demand: Demand, per_pod: int) -> int:
    """Two cores a worker where it streams: it reads one job while it computes another."""
    return per_pod * (1 if _usual_per_pod(demand) == COMPUTING_WORKERS_PER_POD else 2)


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step
