"""Merges that read the same tensors in the same way, as one plan that reads them once. Pure.

A sweep's members differ in their parameters alone: their plans have the same sources, tensors, rounds and cuts, so a
unit of the joint plan is the unit of the same number of every member, with one result for each. Every member keeps its
own plan, digest, journal and output, and no byte of it depends on the others; only the work is shared.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

from merger.planning.build import join_plans
from merger.planning.nouns import MergePlan, plain
from merger.receipts import Receipt


@dataclass(frozen=True, slots=True)
class Sweep:
    """One or several merges that are run as one."""

    plan: MergePlan
    """The joint plan: output m, and result m of each task, belong to member m."""
    members: tuple[MergePlan, ...]

    def split(self, receipt: Receipt) -> tuple[Receipt, ...]:
        """A receipt of the joint plan as one of each member. What was read is shared out."""
        count = len(self.members)
        if count == 1:
            return (receipt,)
        return tuple(
            replace(
                receipt,
                extents=tuple(replace(e, output=0) for e in receipt.extents if e.output == index),
                statistics=receipt.statistics[index : index + 1],
                notes=receipt.by_result[index] if receipt.by_result else receipt.notes,
                by_result=(),
                read_bytes=receipt.read_bytes // count + (index < receipt.read_bytes % count),
            )
            for index in range(count)
        )

    def join(self, receipts: Sequence[Receipt]) -> Receipt:
        """The members' receipts of one unit as one of the joint plan."""
        first = receipts[0]
        if len(receipts) == 1:
            return first
        return replace(
            first,
            extents=tuple(replace(e, output=index) for index, r in enumerate(receipts) for e in r.extents),
            statistics=tuple(statistic for r in receipts for statistic in r.statistics),
            by_result=tuple(r.notes for r in receipts),
            read_bytes=sum(r.read_bytes for r in receipts),
        )


def likeness(plan: MergePlan) -> str:
    """Equal for plans that may be one sweep."""
    document = [
        plan.device,
        [[s.catalog.reference, s.catalog.pins] for s in plan.sources],
        [
            [t.name, t.rows, t.cols, plain(t.base), plain(t.entries), t.cut, t.tile_rows, t.extent_rows, t.fused,
             t.vector, t.rounds, [r.store.kind == "copy" for r in t.results]]
            for t in plan.tasks
        ],
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def join_sweep(plans: Sequence[MergePlan]) -> Sweep | None:
    """The sweep of plans that are alike; None where their tasks cannot be told apart, so that each goes by itself."""
    if len(plans) == 1:
        return Sweep(plans[0], tuple(plans))
    joint = join_plans(plans)
    whole = len(joint.tasks) == len(plans[0].tasks) and len(joint.units) == len(plans[0].units)
    fits = whole and all(len(task.results) == len(plans) for task in joint.tasks)
    return Sweep(joint, tuple(plans)) if fits else None
