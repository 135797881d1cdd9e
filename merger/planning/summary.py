"""A plan for people and as JSON: what would be read, computed, written and held in memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from merger.planning.build import write_bytes
from merger.planning.memory import forward_bytes, is_dense_spectral, peak_bytes
from merger.planning.nouns import DenseTerm, MergePlan, Task
from merger.tensors import format_size

DOCUMENT_VERSION: Final = 1
"""Of the JSON document, whatever a plan's own version is."""


def read_bytes(plan: MergePlan) -> int:
    """Tensor bytes of one pass over the inputs: each stored row or factor once a task."""
    return sum(_task_bytes(plan, task) for task in plan.tasks)


def _task_bytes(plan: MergePlan, task: Task) -> int:
    total = 0
    terms = [*(task.base or ()), *(t for e in task.entries for t in e.terms)]
    for term in terms:
        source = plan.sources[term.source]
        if isinstance(term, DenseTerm):
            total += source.stored(term.tensor).spec.nbytes
        else:
            total += source.stored(term.a).spec.nbytes + source.stored(term.b).spec.nbytes
    return total


def spectral_flops(plan: MergePlan) -> float:
    """Rough operations of dense SVDs: a Gram matrix and its eigenvectors for each module that needs them."""
    return sum(
        2.0 * min(task.rows, task.cols) ** 2 * (max(task.rows, task.cols) + 5 * min(task.rows, task.cols))
        for task in plan.tasks
        for result in task.results
        if is_dense_spectral(task, result)
    )


def passes(plan: MergePlan) -> int:
    """How often the inputs are read: once, and once more for each round of statistics."""
    return 1 + max((len(task.rounds) for task in plan.tasks), default=0)


def plan_json(plan: MergePlan) -> dict[str, Any]:
    """The plan's outer contract."""
    refused = bool(plan.problems)
    return {
        "version": DOCUMENT_VERSION,
        "digest": None if refused else plan.digest,
        "outputs": [
            {
                "path": output.path,
                "kind": output.kind,
                "shards": [{"name": f.name, "bytes": f.size} for f in output.files if f.kind == "tensors"],
            }
            for output in plan.outputs
        ],
        "sources": [{"label": s.label, "reference": s.catalog.reference, "kind": s.catalog.kind} for s in plan.sources],
        "read_bytes": read_bytes(plan),
        "write_bytes": write_bytes(plan),
        "passes": passes(plan),
        "stages": plan.num_stages,
        "units": len(plan.units),
        "peak_memory_bytes": max(peak_bytes(plan), forward_bytes(plan)),
        "problems": [p.as_json() for p in plan.problems],
        "warnings": [w.as_json() for w in plan.warnings],
        "deviations": list(plan.deviations),
        "plugins": [plugin.as_json() for plugin in plan.plugins],
        **({"documents": {name: plan_json(made) for name, made in plan.before}} if plan.before else {}),
    }


def plan_lines(plan: MergePlan) -> Iterator[str]:
    """The plan for people."""
    for name, made in plan.before:
        yield f"document {name}" + ("" if made.outputs[0].path else "  (not kept: in memory, or beside the output)")
        yield from (f"  {line}" for line in plan_lines(made))
    for source in plan.sources:
        yield f"source  {source.catalog.kind:<8} {source.catalog.reference}"
    for plugin in plan.plugins:
        yield f"plugin  {plugin.name}  SHA-256 {plugin.sha256}"
    for output in plan.outputs:
        yield f"output  {output.kind:<8} {output.path or '(not named)'}"
        for file in output.files:
            yield f"          {file.name}  {format_size(file.size)}"
    if plan.outputs:
        yield (
            f"reads   {format_size(read_bytes(plan))} in {passes(plan)} pass(es); "
            f"writes {format_size(write_bytes(plan))}"
        )
        yield (
            f"work    {len(plan.tasks)} tensors, {len(plan.units)} units in {plan.num_stages} stage(s); "
            f"a worker needs at least {format_size(peak_bytes(plan))}"
        )
        if plan.gates is not None:
            count = sum(len(p.positive) + len(p.negative) for p in (*plan.gates.experts, *plan.gates.shared))
            base = plan.sources[plan.gates.base].label
            yield f"gates   {plan.gates.mode}: {count} prompts, before the rest" + (
                f"; a forward pass of {base} in {format_size(forward_bytes(plan))}" if forward_bytes(plan) else ""
            )
        yield f"digest  {plan.digest}"
    for line in plan.deviations:
        yield f"differs {line}"
    for warning in plan.warnings:
        yield f"warning {warning}"
