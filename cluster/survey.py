"""What a Ray cluster has: its nodes, those that are about to go, and what its autoscaler may add. Asks Ray, decides
nothing (cluster/capacity.py does).

Ray has no public call for draining nodes and none for what an autoscaler may add. Where what is asked here is gone, the
answer is that nothing is known.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

import ray

from cluster.capacity import Growth, Need, NodeKind, assess, notice
from cluster.schedule import Lacking
from merger.events import Announce, Event

STATUS_KEY: Final = b"__autoscaling_status"
"""Where the first autoscaler keeps its own status in Ray's key-value store."""
RPC_SECONDS: Final = 5


def alive_nodes() -> list[dict[str, float]]:
    """What each node that lives declares."""
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call] # ray leaves it untyped
    return [node["Resources"] for node in nodes if node["Alive"]]


def draining_nodes() -> frozenset[str]:
    """Ids of nodes that are about to go."""
    try:
        from ray._private.state import state

        return frozenset(state.get_draining_nodes())
    except (ImportError, AttributeError, TypeError):
        return frozenset()


def growth() -> Growth:
    """What is known of the cluster's autoscaler."""
    kinds = _announced_kinds()
    second, said = _second_autoscaler()
    first = None if said else _first_autoscaler()
    elastic = second.elastic if said else (False if first is None else first.elastic)
    return Growth(
        elastic=True if kinds else elastic, kinds=kinds, hopeless=second.hopeless,
        coming=second.coming + (0 if first is None else first.coming),
    )  # fmt: skip


def _announced_kinds() -> tuple[NodeKind, ...]:
    """Kinds of nodes with their limits, on a cluster whose autoscaler announces them."""
    try:
        from ray._private.state import state

        config = state.get_cluster_config()
    except (ImportError, AttributeError, TypeError):
        return ()
    if config is None:
        return ()
    return tuple(
        NodeKind(
            {name: float(amount) for name, amount in group.resources.items()},
            None if group.max_count < 0 else int(group.max_count),
        )
        for group in config.node_group_configs
    )


def _second_autoscaler() -> tuple[Growth, bool]:
    """What autoscaler v2 says, and whether it says anything."""
    try:
        from ray._raylet import GcsClient  # type: ignore[attr-defined] # private, and the only way to ask
        from ray.core.generated.autoscaler_pb2 import (  # type: ignore[attr-defined] # generated code
            GetClusterStatusReply,
        )

        reply = GetClusterStatusReply()
        client = GcsClient(address=ray.get_runtime_context().gcs_address)
        reply.ParseFromString(client.get_cluster_status(timeout_s=RPC_SECONDS))
    except (ImportError, AttributeError, TypeError, ray.exceptions.RayError):
        return Growth(), False
    state = reply.autoscaling_state
    if not reply.HasField("autoscaling_state") or not state.autoscaler_state_version:
        return Growth(), False
    hopeless = tuple(
        {name: float(amount) for name, amount in request.resources_bundle.items()}
        for request in state.infeasible_resource_requests
    )
    coming = sum(int(asked.count) for asked in state.pending_instance_requests) + len(state.pending_instances)
    return Growth(elastic=True, hopeless=hopeless, coming=coming), True


def _first_autoscaler() -> Growth | None:
    """What the first autoscaler says. On a cluster that nothing scales it only reports, and gives each node a type of
    its own."""
    try:
        from ray.experimental.internal_kv import _internal_kv_get

        text = _internal_kv_get(STATUS_KEY)
    except (ImportError, AttributeError, ray.exceptions.RayError):
        return None
    return read_status(json.loads(text)) if text else None


def read_status(status: Mapping[str, Any]) -> Growth:
    """The first autoscaler's status as what is known of it."""
    report = status.get("autoscaler_report")
    if not report:
        return Growth(elastic=None)  # it is about to look
    types = dict(report.get("node_type_mapping") or {})
    only_reports = all(str(kind) == f"node_{node}" for node, kind in types.items())
    coming = len(report.get("pending_nodes") or ()) + sum((report.get("pending_launches") or {}).values())
    return Growth(elastic=not only_reports or bool(coming), coming=coming)


class Lookout:
    """Compares a need with the cluster, now and then, until a worker is there; says what it found when that changes."""

    def __init__(self, need: Need, announce: Announce, *, seconds: float, patient: bool) -> None:
        """`seconds` is how long a run waits for its first worker. Where it is `patient`, nodes may also come that no
        autoscaler knows of."""
        self.need = need
        self._announce = announce
        self._seconds = seconds
        self._patient = patient
        self._said = ""

    def look(self) -> Lacking:
        """What stands against the start of a worker; nothing where some node has room for one."""
        verdict = assess(self.need, alive_nodes(), growth())
        if verdict.kind == "never" and self._patient:
            verdict = replace(verdict, kind="later")
        said = notice(self.need, verdict, self._seconds)
        if said and said != self._said:
            facts = {"workers": self.need.workers, "fit": verdict.now, "coming": verdict.coming}
            self._announce(Event(f"capacity-{verdict.kind}", said, facts, warning=True))
        self._said = said
        return Lacking(verdict.lacks, verdict.fix, for_good=verdict.kind == "never")
