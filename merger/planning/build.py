"""From a manifest and its catalogs to a plan: `plan_merge`. Pure; all that can be refused is refused here, together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from merger.catalog import is_bare
from merger.errors import PlanError, Problem, RefusedError
from merger.manifest import Manifest, ModelEntry, ParameterValue, Slice
from merger.methods.plugin import Plugin, plugins_of
from merger.methods.rounds import rounds_of
from merger.planning.adapter import AdapterPlanner
from merger.planning.bare import BarePlanner
from merger.planning.binding import replication_of
from merger.planning.deviations import Facts, deviations
from merger.planning.drafts import Segment
from merger.planning.extract import ExtractPlanner
from merger.planning.inputs import (
    Inputs,
    MergeInput,
    SourceTable,
    adapter_input,
    model_input,
    model_references,
    stays_adapter,
)
from merger.planning.memory import peak_bytes, smallest_bytes
from merger.planning.model import ModelPlanner, replicated_segments, slice_segments
from merger.planning.modules import Module, modules_of
from merger.planning.moe import MoePlanner
from merger.planning.notices import notices
from merger.planning.nouns import MergePlan, Output, Task
from merger.planning.quantise import CODED
from merger.tensors import format_size


def output_kind(manifest: Manifest) -> Literal["adapter", "model", "tensors"]:
    """What a manifest makes: what it says, else the kind of its sources."""
    if manifest.output.kind is not None:
        return manifest.output.kind
    models = model_references(manifest)
    if models and all(is_bare(model.model) for model in models):
        return "tensors"
    return "adapter" if manifest.adapters is not None else "model"


def plan_merge(
    manifest: Manifest, inputs: Inputs, *, path: str = "", device: Literal["cpu", "cuda"] = "cpu"
) -> MergePlan:
    """Decide everything about a merge. Never raises for what is wrong with it: see `MergePlan.problems`."""
    problems: list[Problem] = [*_stores_without_effect(manifest), *inputs.problems]
    if problems:
        return MergePlan(sources=(), outputs=(), tasks=(), seed=manifest.seed, device=device, problems=tuple(problems))
    table = SourceTable(inputs)
    planner: AdapterPlanner | ModelPlanner
    try:
        planner = _planner(manifest, inputs, table)
        output, tasks = planner.plan(0, path)
        problems += [*planner.problems, *_varying_density(tasks)]
    except RefusedError as error:
        problems += error.problems
        return MergePlan(sources=(), outputs=(), tasks=(), seed=manifest.seed, device=device, problems=tuple(problems))
    return MergePlan(
        sources=tuple(table.sources), outputs=(output,), tasks=tuple(tasks), seed=manifest.seed, device=device,
        manifest=_resolved(manifest, inputs), problems=tuple(_unique(problems)),
        warnings=tuple(
            _unique([*manifest.warnings, *_without_effect(manifest, path), *_dense_base(manifest, table),
                     *inputs.warnings, *planner.warnings, *notices(tasks)])
        ),
        deviations=tuple(dict.fromkeys([*deviations(_facts(manifest, table, planner, tasks)), *planner.deviations])),
        plugins=_plugins(tasks),
        gates=planner.gates if isinstance(planner, MoePlanner) else None,
    )  # fmt: skip


def _facts(
    manifest: Manifest, table: SourceTable, planner: AdapterPlanner | ModelPlanner, tasks: Sequence[Task]
) -> Facts:
    """What decides where this merge is not what other tools would write."""
    model = planner if isinstance(planner, ModelPlanner) else None
    return Facts(
        manifest, table, output_kind(manifest), tasks, untied=model is not None and model.is_untied,
        replicated=model is not None and model.replicated,
    )  # fmt: skip


def _dense_base(manifest: Manifest, table: SourceTable) -> list[Problem]:
    """Adapters that say they were trained over a quantised base, folded into a dense one."""
    dense = [s for s in table.sources if s.catalog.kind == "model" and s.catalog.quantization is None]
    if manifest.base_quantization is not None or not dense or output_kind(manifest) != "model":
        return []
    return [
        Problem(
            "trained-over-codes", f"{source.label} seems to be trained over a quantised base, and this base is dense",
            source.catalog.reference,
            f"{source.catalog.trained_over}; it corrects errors of 4-bit weights that {dense[0].label} does not have",
            "write base_quantization: {nf4: {blocksize: 64, double_quant: true}}, or none if the dense base is meant",
        )
        for source in table.sources if source.catalog.trained_over
    ]  # fmt: skip


def _plugins(tasks: Sequence[Task]) -> tuple[Plugin, ...]:
    """What the methods of these tasks come from."""
    return plugins_of({result.call.method for task in tasks for result in task.results})


def _stores_without_effect(manifest: Manifest) -> list[Problem]:
    """Stores that the kind of the output or the combination has no use for."""
    store, quantization = manifest.output.store, manifest.output.quantization
    if quantization is not None and quantization.kind in CODED and output_kind(manifest) != "model":
        return [
            Problem("conflict", f"a merge of kind {output_kind(manifest)} cannot be quantised", "output.quantization",
                    "a scheme needs a config.json that names it", "leave it out, or write output.kind: model")
        ]  # fmt: skip
    if store is None:
        return []
    if output_kind(manifest) == "model" and store.kind != "dense":
        return [
            Problem("bad-store", f"a merged model cannot be stored as {store.kind}", "output.store",
                    "its tensors are dense", "leave it out, or write kind: adapter")
        ]  # fmt: skip
    if manifest.combination_type is not None and (store.energy is not None or store.exact):
        return [
            Problem("conflict", "PEFT's combination types are cut at a rank", "output.store.svd",
                    "they keep PEFT's keywords and numbers", "write svd_rank, or use a merge_method")
        ]  # fmt: skip
    return []


def _without_effect(manifest: Manifest, path: str) -> list[Problem]:
    """Keys that say something of another kind of place than the output's."""
    output = manifest.output
    found = []
    grid = manifest.base_quantization
    if grid is not None and grid.kind != "none" and output_kind(manifest) == "adapter":
        why = "an adapter is merged without its base"
        found.append(
            Problem("no-effect", "`base_quantization` has no effect here", "base_quantization", why, "drop it")
        )
    elsewhere = {
        "output.s3": (output.s3, "s3://", "an object store"), "output.private": (output.private, "hf://", "the Hub"),
        "output.commit_message": (output.commit_message, "hf://", "the Hub"),
    }  # fmt: skip
    return [
        Problem("no-effect", f"`{key}` has no effect here", key, f"it is for outputs on {place}", "drop it")
        for key, (value, scheme, place) in elsewhere.items()
        if value is not None and path and not path.startswith(scheme)
    ]


def _varying_density(tasks: Sequence[Task]) -> list[Problem]:
    """One threshold for the whole model needs one density for the whole model."""
    calls = [
        r.call for task in tasks for r in task.results
        if r.call.scope == "model" and (r.call.prepare == "trim" or rounds_of(r.call))
    ]  # fmt: skip
    if len({(call.densities, call.options if call.combine == "block" else ()) for call in calls}) <= 1:
        return []
    return [
        Problem(
            "varying-density", "scope: model counts over all tensors, and the density varies between them",
            "parameters.density", "one threshold a source holds for the whole model",
            "give each source one density, or use scope: tensor",
        )
    ]  # fmt: skip


def _planner(manifest: Manifest, inputs: Inputs, table: SourceTable) -> AdapterPlanner | ModelPlanner:
    kind = output_kind(manifest)
    if manifest.experts is not None and kind != "model":
        raise PlanError.of(
            "bad-kind", f"experts make a model, not kind: {kind}", where="output.kind",
            why="their tensors are laid out for one architecture", fix="write kind: model, or leave it out",
        )  # fmt: skip
    if kind == "adapter":
        return _adapter_planner(manifest, inputs, table)
    if kind == "tensors" and manifest.models is None and manifest.adapters is None:
        raise PlanError.of(
            "bad-kind", f"kind: tensors merges files under `models`, not `{manifest.sources_key}`", where="output.kind",
            why="a bare file has no layers to slice", fix="list the .safetensors files under models:",
        )  # fmt: skip
    if manifest.combination_type is not None:
        raise PlanError.of(
            "bad-kind",
            f"combination_type {manifest.combination_type} makes an adapter, not a model",
            where="output.kind",
            why="PEFT's types make new factors; they are no model before they are folded",
            fix="merge to an adapter and fold that with `raymerge fold`, or use merge_method",
        )
    base: MergeInput | None = None
    if inputs.base is not None:
        base = MergeInput(
            label=inputs.base, model=table.index(inputs.base),
            adapters=tuple(table.index(a) for a in inputs.base_adapters), parameters={}, position=-1, is_adapter=False,
        )  # fmt: skip
    if manifest.experts is not None:
        if base is None:
            raise _no_base()
        return MoePlanner(manifest, table, base)
    if manifest.adapters is not None:
        if base is None:
            raise _no_base()
        found = tuple(adapter_input(table, entry, i, base.model) for i, entry in enumerate(manifest.adapters))
        found = tuple(replace(f, adapters=(*base.adapters, *f.adapters)) for f in found)
        runs = _replication(table, found)
        if runs and not base.adapters:
            assert base.model is not None
            copied = replicated_segments(found, base, runs)
            return ModelPlanner(manifest, table, copied, base.model, keep_files=False, replicated=True)
        segments: tuple[Segment, ...] = (Segment(found, base, (), 0, 1 << 30),)
        assert base.model is not None
        if kind == "tensors":
            return BarePlanner(manifest, table, segments, base.model, keep_files=False)
        return ModelPlanner(manifest, table, segments, base.model, keep_files=True)
    segments = _module_segments(manifest, table, base)
    first = segments[0]
    donor = base.model if base is not None else first.inputs[0].model
    assert donor is not None
    if kind == "tensors":
        return BarePlanner(manifest, table, segments, donor, keep_files=False)
    only_adapters = base is not None and all(
        not segment.module.sliced and all(i.model == donor for i in segment.inputs) for segment in segments
    )
    return ModelPlanner(manifest, table, segments, donor, keep_files=only_adapters)


def _module_segments(manifest: Manifest, table: SourceTable, base: MergeInput | None) -> tuple[Segment, ...]:
    """`models`, `slices` or `modules` as segments, module after module."""
    if manifest.modules is None:
        return _segments(
            manifest, table, base, manifest.models, manifest.slices, (), Module("", manifest.slices is not None)
        )
    named = modules_of({name: module.slices is not None for name, module in manifest.modules.items()})
    found: list[Segment] = []
    for name, module in manifest.modules.items():
        position = sum(len(segment.inputs) for segment in found)
        found += _segments(
            manifest, table, base, module.models, module.slices, (module.parameters,), named[name], position
        )
    return tuple(found)


def _segments(
    manifest: Manifest, table: SourceTable, base: MergeInput | None, models: Sequence[ModelEntry] | None,
    slices: Sequence[Slice] | None, parameters: tuple[Mapping[str, ParameterValue], ...], module: Module,
    position: int = 0,
) -> tuple[Segment, ...]:  # fmt: skip
    """One module's segments. Sources are numbered from `position`."""
    if slices is not None:
        found = slice_segments(table, slices, base, module, position)
        return tuple(replace(segment, shared=(*segment.shared, *parameters)) for segment in found)
    listed = [
        model_input(table, entry.model, entry.parameters, position + i, statistics=entry.statistics)
        for i, entry in enumerate(models or ())
    ]
    if base is not None and not _member(manifest):
        same = [i for i in listed if (i.model, i.adapters) == (base.model, base.adapters)]
        base = same[0] if same else base
        listed = [i for i in listed if i not in same]
    elif base is not None and not any((i.model, i.adapters) == (base.model, base.adapters) for i in listed):
        listed.append(replace(base, position=position + len(listed)))  # one more source, as mergekit has it
    return (Segment(tuple(listed), base, parameters, 0, 1 << 30, module),)


def _replication(table: SourceTable, inputs: Sequence[MergeInput]) -> tuple[tuple[int, int], ...]:
    """The copied layers that all of these adapters were trained on; none where they differ."""
    found = {replication_of(table.catalog(f.adapters[-1])) for f in inputs}
    return found.pop() if len(found) == 1 else ()


def extracts_models(manifest: Manifest) -> bool:
    """Whether an adapter is to be made of whole models."""
    return any(not stays_adapter(manifest, entry.model) for entry in _whole_models(manifest))


def _extract_planner(manifest: Manifest, inputs: Inputs, table: SourceTable) -> ExtractPlanner:
    """Models, and adapters among them, whose changes become an adapter."""
    if manifest.models is None:
        raise PlanError.of(
            "bad-kind", f"an adapter is made of models under models:, not {manifest.sources_key}", where="output.kind",
            why="its pairs are added to the layers of one base",
            fix="list the models under models:, or use kind: model",
        )  # fmt: skip
    if inputs.base is None:
        raise PlanError.of(
            "no-base", "an adapter of models needs a base_model", where="base_model",
            why="what it holds is what they changed", fix="name the model that the others were trained from, or --base",
        )  # fmt: skip
    if inputs.base_adapters:
        raise PlanError.of(
            "bad-kind", "the base of an adapter is a plain model here", where="base_model",
            why="PEFT would add the pairs to the model alone", fix="fold the base's adapters into it first",
        )  # fmt: skip
    base = MergeInput(
        label=inputs.base, model=table.index(inputs.base), adapters=(), parameters={}, position=-1, is_adapter=False,
    )  # fmt: skip
    listed = [
        model_input(table, entry.model, entry.parameters, i, statistics=entry.statistics)
        for i, entry in enumerate(manifest.models)
    ]
    if not _member(manifest):  # as in other merges, a listed base says nothing
        listed = [i for i in listed if (i.model, i.adapters) != (base.model, ())]
    assert base.model is not None
    planner = ExtractPlanner(
        manifest, table, (Segment(tuple(listed), base, (), 0, 1 << 30),), base.model, keep_files=False
    )
    planner.base_name = inputs.base_name
    return planner


def _adapter_planner(manifest: Manifest, inputs: Inputs, table: SourceTable) -> AdapterPlanner | ExtractPlanner:
    method = manifest.method
    if method is not None and not method.closed_on_deltas:
        raise PlanError.of(
            "not-closed",
            f"{method.name} cannot make an adapter",
            where="output.kind",
            why="its result is not the base plus a function of the deltas alone",
            fix="use kind: model, or task_arithmetic, linear, ties, dare_linear or dare_ties",
        )
    normalize = manifest.parameters.get("normalize")
    if method is not None and method.name == "linear" and normalize is not None and normalize.at("*", 0.0) is False:
        raise PlanError.of(
            "not-closed", "linear with normalize: false cannot make an adapter", where="parameters.normalize",
            why="it scales the base too", fix="use task_arithmetic for a plain sum of deltas",
        )  # fmt: skip
    if manifest.output.modules_to_save in {"all", "drop"} and not extracts_models(manifest):
        raise PlanError.of(
            "bad-value", f"modules_to_save: {manifest.output.modules_to_save} is for models",
            where="output.modules_to_save",
            why="it says what becomes of tensors that are no matrices of layers, and adapters hold what they changed",
            fix="write refuse, average or {from: NAME}",
        )  # fmt: skip
    if extracts_models(manifest):
        return _extract_planner(manifest, inputs, table)
    if manifest.adapters is not None:
        found = [adapter_input(table, entry, i, None) for i, entry in enumerate(manifest.adapters)]
    else:
        found = []
        for i, entry in enumerate(_whole_models(manifest)):
            reference = str(entry.model.adapters[0])
            found.append(
                MergeInput(label=reference, model=None, adapters=(table.index(reference),),
                           parameters=entry.parameters, position=i, is_adapter=False,
                           statistics=table.statistics(entry.statistics))
            )  # fmt: skip
    return AdapterPlanner(manifest, table, found, inputs.base_name)


def _whole_models(manifest: Manifest) -> list[ModelEntry]:
    """The models of a manifest that merges adapters."""
    entries = list(manifest.models or ())
    for module in (manifest.modules or {}).values():
        entries += module.models or ()
    return entries


def _no_base() -> PlanError:
    return PlanError.of(
        "no-base", "a fold needs a base_model", where="base_model",
        why="the adapters name none that can be read", fix="add base_model to the manifest, or --base",
    )  # fmt: skip


def _member(manifest: Manifest) -> bool:
    """Whether a listed base is one more source of this method (linear, passthrough)."""
    return manifest.method is not None and manifest.method.base == "member"


def _resolved(manifest: Manifest, inputs: Inputs) -> dict[str, Any]:
    """The manifest as it stands in raymerge.json: plain data, the base named, revisions pinned, no place."""
    document = manifest.resolved()
    document.get("output", {}).pop("path", None)
    for key in ("cluster", "kubernetes"):  # where it runs is no part of what it is
        document.pop(key, None)
    if "base_model" not in document and inputs.base is not None:
        document["base_model"] = inputs.base
    read = (*inputs.catalogs.items(), *inputs.statistics.items())
    pinned = {key: catalog.reference for key, catalog in read if catalog.reference != key}
    return {key: _with_pins(value, pinned) for key, value in document.items()} if pinned else document


def _with_pins(value: Any, pinned: Mapping[str, str]) -> Any:
    """The same with every reference at the revision that was read: the manifest then says this merge, for ever."""
    if isinstance(value, str):
        return "+".join(pinned.get(part, part) for part in value.split("+")) if "://" in value else value
    if isinstance(value, dict):
        return {key: _with_pins(item, pinned) for key, item in value.items()}
    return [_with_pins(item, pinned) for item in value] if isinstance(value, list) else value


def _unique(problems: Sequence[Problem]) -> list[Problem]:
    return list(dict.fromkeys(problems))


def check_machine(plan: MergePlan, *, memory: int, free_bytes: int | None) -> tuple[Problem, ...]:
    """What the machine lacks: memory for the smallest block, room for the output. `memory` is one worker's share."""
    problems = []
    needed = peak_bytes(plan)
    if plan.tasks and needed > memory:
        worst = max(plan.tasks, key=lambda task: smallest_bytes(plan, task))
        problems.append(
            Problem(
                "memory",
                f"a worker needs at least {format_size(needed)} and has {format_size(memory)}",
                worst.name,
                "this tensor's smallest block, or the whole of it where the method needs that, does not fit",
                f"give --memory {format_size(needed * 2).replace(' ', '')} or more, or fewer --workers",
            )
        )
    size = write_bytes(plan)
    if free_bytes is not None and size > free_bytes:
        problems.append(
            Problem(
                "disk",
                f"the output needs {format_size(size)} and {format_size(free_bytes)} are free",
                plan.outputs[0].path if plan.outputs else "",
                "",
                "free space, or choose another output",
            )
        )
    return tuple(problems)


def write_bytes(plan: MergePlan) -> int:
    """Bytes of all files of all outputs, but the card and the reports."""
    return sum(file.size for output in plan.outputs for file in output.files)


def join_plans(plans: Sequence[MergePlan]) -> MergePlan:
    """Several merges of the same sources as one plan that reads each tensor once (a sweep).

    Tasks of equal operands become one task with several results. Raises PlanError where tasks cannot share a cut.
    """
    sources = list(dict.fromkeys(source.catalog.reference for plan in plans for source in plan.sources))
    table = {s.catalog.reference: s for plan in plans for s in plan.sources}
    joined: dict[tuple[Any, ...], Task] = {}
    outputs: list[Output] = []
    for plan in plans:
        offset = len(outputs)
        outputs += plan.outputs
        renumber = {i: sources.index(s.catalog.reference) for i, s in enumerate(plan.sources)}
        for task in plan.tasks:
            moved = _moved(task, renumber, offset)
            key = (moved.name, moved.base, moved.entries, moved.cut, moved.rows, moved.cols, moved.tile_rows,
                   moved.results[0].store.kind == "copy", moved.results[0].store.writes)  # fmt: skip
            known = joined.get(key)
            if known is None:
                joined[key] = moved
            else:
                joined[key] = replace(
                    known, results=known.results + moved.results, fused=_fused(known, moved),
                    extent_rows=min(known.extent_rows, moved.extent_rows),
                )  # fmt: skip
    first = plans[0]
    return replace(
        first, sources=tuple(table[r] for r in sources), outputs=tuple(outputs), tasks=tuple(joined.values()),
        problems=tuple(p for plan in plans for p in plan.problems),
        plugins=_plugins(list(joined.values())),
    )  # fmt: skip


def _fused(a: Task, b: Task) -> bool:
    """Whether a joint task is one unit: what needs no rounds goes along with what does."""
    return all(task.fused for task in (a, b) if task.rounds) and (a.fused or b.fused)


def _moved(task: Task, sources: Mapping[int, int], outputs: int) -> Task:
    def term(t: Any) -> Any:
        return replace(t, source=sources[t.source])

    return replace(
        task,
        base=None if task.base is None else tuple(term(t) for t in task.base),
        entries=tuple(
            replace(
                e, terms=tuple(term(t) for t in e.terms), statistic=None if e.statistic is None else term(e.statistic)
            )
            for e in task.entries
        ),
        results=tuple(
            replace(
                r,
                places=tuple(replace(p, output=p.output + outputs) for p in r.places),
                store=r.store if r.store.factor is None else replace(r.store, factor=term(r.store.factor)),
            )
            for r in task.results
        ),
    )
