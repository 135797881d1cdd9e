"""An adapter against its base: which tensor each module changes, and whether the base stores it transposed. No torch.

An adapter's names are those of transformers' modules; a checkpoint's names and orientations are its own. What fits
nothing in the base is a Problem that names both sides, never a warning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

from merger.adapters.declare import AdapterModule, Change, Formula, LowRank, Saved, transposed
from merger.adapters.experts import MoeLayout, as_matrix, bind_experts, bind_one_expert
from merger.adapters.lora import RECOMPUTED_INITS
from merger.adapters.renames import renamed_targets, told
from merger.errors import Problem
from merger.tensors import TensorSpec

CONV1D_MODELS: Final = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp")
"""Models of transformers with layers that store their weights transposed."""
CONV1D_LAYERS: Final = ("c_attn", "c_proj", "c_fc", "q_attn")
"""What these layers are called."""
HEAD: Final = "lm_head.weight"
_SHOWN: Final = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """The model that an adapter is bound to."""

    label: str
    specs: Mapping[str, TensorSpec]
    model_type: str
    tied: str | None = None
    """The embeddings that serve as the head, which its files leave out."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """Its config.json."""
    moe_layout: MoeLayout | None = None
    """How adapters pack their experts, where the manifest says it."""

    def spec(self, target: str) -> TensorSpec | None:
        found = self.specs.get(target)
        return self.specs[self.tied] if found is None and target == HEAD and self.tied is not None else found


@dataclass(frozen=True, slots=True)
class Bound:
    """A change under the base's own name and in its orientation."""

    module: AdapterModule
    change: Change
    flipped: bool = False
    """Whether the base stores the transpose of what PEFT forms."""


@dataclass(slots=True)
class Binding:
    """Everything one adapter does to one base."""

    by_target: dict[str, list[Bound]] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What was found under other names."""

    def of(self, target: str) -> list[Bound]:
        return self.by_target.get(target, [])


def bind_adapter(
    modules: Mapping[str, AdapterModule], base: Base, where: str, takes: Callable[[str], bool], *,
    fan_in_fan_out: bool = False,
) -> Binding:  # fmt: skip
    """Find the tensor of every change of the modules that `takes` lets through."""
    found = Binding()
    lost: list[tuple[AdapterModule, Change]] = []
    chosen = [module for module in modules.values() if takes(module.module)]
    for module in chosen:
        if module.layer == "experts":
            bound = bind_experts(module, base.specs, base.model_type, base.moe_layout)
            if bound is None:
                lost.append((module, as_matrix(module) or module.changes[0]))
            elif isinstance(bound, str):
                found.problems.append(_misfit(bound, base, where))
            for change in bound if isinstance(bound, list) else ():
                found.by_target.setdefault(change.target, []).append(Bound(module, change))
            continue
        one = None if base.spec(module.target) is not None else bind_one_expert(
            module, module.changes[0], base.specs, base.model_type
        )  # fmt: skip
        if isinstance(one, Change):
            found.by_target.setdefault(one.target, []).append(Bound(module, one))
            continue
        if isinstance(one, str):
            found.problems.append(_misfit(one, base, where))
            continue
        for change in module.changes:
            lost += _bind(found, module, change, base, where, fan_in_fan_out=fan_in_fan_out)
    if lost:
        _bind_renamed(found, lost, len(chosen), base, where, fan_in_fan_out=fan_in_fan_out)
    for bounds in found.by_target.values():  # what replaces a tensor comes before what adds to it
        bounds.sort(key=lambda bound: not isinstance(bound.change.steps[0], Saved))
    return found


def _bind(
    found: Binding, module: AdapterModule, change: Change, base: Base, where: str, *, fan_in_fan_out: bool
) -> list[tuple[AdapterModule, Change]]:
    """Bind one change. Returns it where the base has no such tensor and should."""
    target, acting = _target(change, base)
    spec = base.spec(target)
    if spec is None:
        if isinstance(change.steps[0], Saved) and module.tuner == "modules_to_save":  # a head that the base lacks
            found.by_target.setdefault(target, []).append(Bound(module, replace(change, target=target)))
            return []
        return [] if change.optional else [(module, change)]
    made = _oriented(module, replace(acting, target=target), spec, base, fan_in_fan_out=fan_in_fan_out)
    if isinstance(made, Bound):
        found.by_target.setdefault(target, []).append(made)
    else:
        found.problems.append(_misfit(made, base, where))
    return []


def _bind_renamed(
    found: Binding, lost: list[tuple[AdapterModule, Change]], count: int, base: Base, where: str, *,
    fan_in_fan_out: bool,
) -> None:  # fmt: skip
    """Bind what has other names in the base: all of it, or nothing."""
    by_target = {change.target: (module, change) for module, change in lost}

    def fits(target: str, name: str) -> bool:
        module, change = by_target[target]
        made = _oriented(module, replace(change, target=name), base.specs[name], base, fan_in_fan_out=fan_in_fan_out)
        return isinstance(made, Bound)

    named = None
    if not any(isinstance(step, Formula) and step.kind == "experts" for _, change in lost for step in change.steps):
        named = renamed_targets(list(by_target), base.specs, fits, base.config)
    if named is None:
        found.problems.insert(0, no_such_tensors(by_target, count, base, where))
        return
    found.notes.append(f"{where}: {told(named)}")
    for module, change in lost:
        optional = [c for c in module.changes if c.optional]
        new = named[change.target]
        for each in (change, *optional):
            renamed = replace(each, target=new.rpartition(".")[0] + "." + each.target.rpartition(".")[2])
            _bind(found, module, renamed if each is not change else replace(change, target=new), base, where,
                  fan_in_fan_out=fan_in_fan_out)  # fmt: skip


def _misfit(what: str, base: Base, where: str) -> Problem:
    fix = "name the base that the adapter was trained on"
    return Problem("shape-mismatch", what, where, f"the base is {base.label}", fix)


def no_such_tensors(lost: Iterable[str], count: int, base: Base, where: str) -> Problem:
    """What an adapter changes and the base does not have."""
    named = list(lost)
    return Problem(
        "no-such-tensor",
        f"{len(named)} of {count} modules of {where} change tensors that {base.label} does not have",
        ", ".join(named[:_SHOWN]), f"the base has, for example, {', '.join(sorted(base.specs)[:3])}",
        "name the base that the adapter was trained on",
    )  # fmt: skip


def _target(change: Change, base: Base) -> tuple[str, Change]:
    """The base's name of a changed tensor, and the change as it acts there."""
    target = change.target.replace(".base_layer.", ".")
    module, _, leaf = target.rpartition(".")
    if base.spec(target) is None:
        attention = f"{module}.in_proj_{leaf}"
        return (attention if attention in base.specs else target), change
    inner = module.removesuffix(".out_proj")
    if inner != module and f"{inner}.in_proj_weight" in base.specs and f"{inner}.base_layer.out_proj." in change.target:
        # PEFT trains and merges the output projection of MultiheadAttention with its delta counted twice.
        twice = (replace(s, scaling=2.0 * s.scaling) if isinstance(s, LowRank) else s for s in change.steps)
        return target, replace(change, steps=tuple(twice))
    return target, change


def matrix_of(spec: TensorSpec) -> tuple[int, int]:
    """A tensor as the matrix of its first dimension against all others; a vector is a column."""
    first = spec.shape[0] if spec.shape else 1
    return first, spec.numel // max(1, first)


def _oriented(
    module: AdapterModule, change: Change, spec: TensorSpec, base: Base, *, fan_in_fan_out: bool
) -> Bound | str:
    """The change as the base stores the tensor, or why it does not fit."""
    matrix = matrix_of(spec)
    conv1d = base.model_type in CONV1D_MODELS and change.target.split(".")[-2:-1] in [[n] for n in CONV1D_LAYERS]
    flip = len(spec.shape) == 2 and (module.layer == "embedding" or conv1d)
    made = transposed(change) if flip else change
    if made.shape is None:
        sized = _sized(made, matrix, spec)
        return sized if isinstance(sized, str) else Bound(module, sized, flip)
    if not flip and fan_in_fan_out and len(spec.shape) == 2 and base.model_type not in CONV1D_MODELS:
        if matrix[0] == matrix[1]:
            return (
                f"{change.target} is square, and whether {base.model_type or 'this model'} stores it transposed is not "
                "known (fan_in_fan_out is set)"
            )
        if change.shape != matrix:
            made, flip = transposed(change), True
    if made.shape == matrix and (not module.kernel or len(spec.shape) == 1 or module.kernel == spec.shape[2:]):
        return Bound(module, _with_dtype(made, spec), flip)
    if conv1d and any(isinstance(step, Formula) and step.kind in {"loha", "lokr"} for step in change.steps):
        return f"{change.target} is stored transposed, which PEFT's LoHa and LoKr do not know"
    shown = " × ".join(map(str, made.shape or ()))
    return f"an adapter changes {change.target} as {shown}, the base has {' × '.join(map(str, spec.shape))}"


def _with_dtype(change: Change, spec: TensorSpec) -> Change:
    """The change with the base's dtype where it is rounded to that midway."""
    steps = tuple(
        replace(step, numbers=(*step.numbers, ("dtype", spec.dtype.code)))
        if isinstance(step, Formula) and step.kind in RECOMPUTED_INITS
        else step
        for step in change.steps
    )
    return replace(change, steps=steps)


def _sized(change: Change, matrix: tuple[int, int], spec: TensorSpec) -> Change | str:
    """A change that takes the shape it meets, checked against it."""
    for step in change.steps:
        if isinstance(step, Saved | LowRank):
            continue
        numbers = dict(step.numbers)
        if step.kind == "scale":
            by_rows = (numbers["axis"] == "out") != bool(numbers.get("transposed"))
            size = matrix[0] if by_rows else (spec.shape[1] if len(spec.shape) > 1 else 1)
            if numbers["size"] != size:
                return f"an adapter scales {change.target} by {numbers['size']} factors, the base has {size}"
        if step.kind == "rows":
            indices = numbers["indices"]
            assert isinstance(indices, tuple)
            if max(indices, default=-1) >= matrix[0]:
                return f"an adapter replaces row {max(indices)} of {change.target}, the base has {matrix[0]} rows"
        if step.kind == "unbridged":
            return "the layer has a bias, which this tuner changes too, and PEFT's bridge does weights only"
        if step.kind == "peft" and (numbers.get("transposed") or len(spec.shape) != 2):
            return f"{change.target} is no plain linear layer, and the bridge to PEFT knows no other"
        if step.kind == "turn" and (numbers.get("transposed") or len(spec.shape) != 2):
            return f"{change.target} is no linear layer, and OFT turns the inputs of one"
    return replace(change, shape=matrix)
