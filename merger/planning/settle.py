"""Ranks that follow from the data: a plan whose files are laid out at bounds, and how it becomes one that can be run.

`output.store: {svd: {energy: 0.95}}` gives each module the least rank that keeps the share, and only its singular
values tell which. So such a merge is two runs of plain plans. `measuring` is the same tasks up to their singular
values: each unit's statistic is one rank, and nothing is written. `settle`, a pure function, puts the ranks into the
layout; what comes out is the plan that a manifest with these very ranks would have had. The digest of the first plan
names the merge: it follows from manifest and inputs alone, and so, since the ranks do, does the second.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

from merger.formats import peft, safetensors
from merger.planning.layout import Layout, lay_out, literal
from merger.planning.nouns import MergePlan, Output, OutputFile, Place, Result
from merger.tensors import TensorSpec

Ranks = Mapping[tuple[int, int], int]
"""(task, result) → rank."""


def measured_results(plan: MergePlan) -> tuple[tuple[int, int], ...]:
    """The (task, result)s whose ranks follow from the data, in order."""
    return tuple(
        (index, number)
        for index, task in enumerate(plan.tasks)
        for number, result in enumerate(task.results)
        if result.store.energy is not None
    )


def measuring(plan: MergePlan) -> MergePlan:
    """The plan that finds the ranks: its tasks are those of `plan` that need one, its results what needs one."""
    tasks = []
    for task in plan.tasks:
        results = tuple(
            replace(result, store=replace(result.store, measure=True))
            for result in task.results
            if result.store.energy is not None
        )
        if all(not result.store.writes for result in task.results):
            tasks.append(task)  # what may end the merge is looked at before singular values are
        elif results:
            tasks.append(replace(task, results=results))
    return replace(plan, tasks=tuple(tasks))


def rank_bound(plan: MergePlan) -> int:
    """The largest rank that any module may get."""
    return max((plan.tasks[task].results[number].store.rank for task, number in measured_results(plan)), default=0)


def ranks_by_name(plan: MergePlan, output: int) -> dict[str, int]:
    """Task → rank of its result in an output, where it was settled."""
    return {
        task.name: result.store.rank
        for task in plan.tasks
        for result in task.results
        if result.store.energy is not None and result.places[0].output == output
    }


def settle_by_name(plan: MergePlan, ranks: Mapping[str, int]) -> MergePlan:
    """The same from what `ranks_by_name` said of a plan of one output. A name that is missing keeps its bound."""
    bounds = {key: plan.tasks[key[0]].results[key[1]].store.rank for key in measured_results(plan)}
    return settle(plan, {key: int(ranks.get(plan.tasks[key[0]].name, bound)) for key, bound in bounds.items()})


def settle(plan: MergePlan, ranks: Ranks) -> MergePlan:
    """The plan with these ranks, and files laid out for them."""
    stores = {key: replace(plan.tasks[key[0]].results[key[1]].store, rank=rank) for key, rank in ranks.items()}
    shapes = _shapes(plan, ranks)
    settled = {output for output, _ in shapes}
    layouts = {index: _layout(index, plan.outputs[index], shapes) for index in sorted(settled)}
    tasks = tuple(
        replace(task, results=tuple(
            replace(result, store=stores.get((index, number), result.store), places=_moved(result, layouts))
            for number, result in enumerate(task.results)
        ))
        for index, task in enumerate(plan.tasks)
    )  # fmt: skip
    made = replace(plan, tasks=tasks, settled_from=plan.digest)
    outputs = tuple(
        _output(output, layouts[index], ranks_by_name(made, index)) if index in layouts else output
        for index, output in enumerate(plan.outputs)
    )
    return replace(made, outputs=outputs)


_RANK_AXES: Final = {"A": 0, "B.T": 0, "B": 1, "A.T": 1}
"""Part of a pair → the dimension of its tensor that is the rank; an alpha has none."""


def _shapes(plan: MergePlan, ranks: Ranks) -> dict[tuple[int, str], tuple[int, int]]:
    """(output, tensor) → (dimension, rank), of the factors whose rank is known now."""
    return {
        (place.output, place.tensor): (_RANK_AXES[place.part], rank)
        for (index, number), rank in ranks.items()
        for place in plan.tasks[index].results[number].places
        if place.part in _RANK_AXES
    }


def _with_rank(spec: TensorSpec, found: tuple[int, int] | None) -> TensorSpec:
    if found is None:
        return spec
    axis, rank = found
    return replace(spec, shape=(*spec.shape[:axis], rank, *spec.shape[axis + 1 :]))


def _layout(index: int, output: Output, shapes: Mapping[tuple[int, str], tuple[int, int]]) -> Layout:
    """Every tensor file of an output again, in the order that its header has."""
    files: dict[str, Sequence[TensorSpec]] = {}
    for file in output.files:
        if file.kind == "tensors":
            header = safetensors.parse_header(file.prefix, file_size=file.size, where=file.name)
            files[file.name] = [
                _with_rank(entry.spec, shapes.get((index, entry.spec.name))) for entry in header.tensors
            ]
    return lay_out(index, files)


def _moved(result: Result, layouts: Mapping[int, Layout]) -> tuple[Place, ...]:
    return tuple(
        layouts[place.output].place(place.tensor, place.part)
        if place.output in layouts and result.store.writes
        else place
        for place in result.places
    )


def _output(output: Output, layout: Layout, ranks: Mapping[str, int]) -> Output:
    made = {file.name: file for file in layout.files}

    def file_of(file: OutputFile) -> OutputFile:
        if file.name == peft.ADAPTER_CONFIG:
            return literal(file.name, peft.with_ranks(file.prefix, ranks))
        return made.get(file.name, file)

    return replace(output, files=tuple(file_of(file) for file in output.files))
