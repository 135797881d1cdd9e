"""Router gates of a mixture of experts, made from prompts before the run: `fill_gates`.

`cheap_embed` sums the embedding rows of each gate's prompt tokens: a few rows of one file, in float32, no model. The
`hidden` modes need a forward pass, which the caller brings (merger/evaluation/hidden.py): nothing here makes a model.
A gate is positive minus negative, at length 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from merger.errors import MergeFailedError, PlanError
from merger.generated import GivenStore
from merger.operands import Arena, OperandReader
from merger.planning.memory import forward_bytes
from merger.planning.nouns import DenseTerm, GateRecipe, MergePlan, Prompts, Source
from merger.tensors import RowRun, format_size

Floats = npt.NDArray[np.float64]
HiddenStates = Callable[[MergePlan, Sequence[Sequence[tuple[int, ...]]]], npt.NDArray[np.float32]]
"""(plan, groups of prompts) → what enters each layer, by group: (groups, layers, width), averaged over its prompts."""
SMALLEST_NORM = 1e-8


def needs_forward(plan: MergePlan) -> bool:
    """Whether gates are wanted that only a forward pass gives."""
    return plan.gates is not None and plan.gates.mode != "cheap_embed"


def check_forward(plan: MergePlan, hidden: HiddenStates | None, memory: int | None = None) -> None:
    """Raise PlanError where a forward pass is needed and nobody can do it, or `memory` (bytes) has no room for it."""
    if plan.gates is None or not needs_forward(plan):
        return
    if memory is not None and forward_bytes(plan) > memory:
        raise PlanError.of(
            "memory", f"gate_mode: {plan.gates.mode} takes {format_size(forward_bytes(plan))}, and "
            f"{format_size(memory)} are allowed", where="gate_mode",
            why="it instantiates the base, four bytes a parameter",
            fix=f"give --memory {format_size(forward_bytes(plan)).replace(' ', '')}, or gate_mode: cheap_embed",
        )  # fmt: skip
    if hidden is None:
        raise PlanError.of(
            "needs-forward-pass", f"gate_mode: {plan.gates.mode} runs the base over the prompts", where="gate_mode",
            why="a merge itself instantiates no model",
            fix="use `raymerge moe`, merger.moe(…), or gate_mode: cheap_embed",
        )  # fmt: skip


def fill_gates(plan: MergePlan, hidden: HiddenStates | None) -> MergePlan:
    """The same plan with its gates computed. Its digest is the same: it was of what they are computed from.

    Raises PlanError(code `needs-forward-pass`), MergeFailedError(code `not-finite`).
    """
    recipe = plan.gates
    if recipe is None:
        return plan
    check_forward(plan, hidden)
    groups = [*recipe.experts, *recipe.shared]
    made = _cheap(plan, recipe, groups) if hidden is None or not needs_forward(plan) else _hidden(plan, groups, hidden)
    if not np.isfinite(made).all():
        raise MergeFailedError.of(
            "not-finite", "a gate has NaN or Inf", where=plan.sources[recipe.base].label,
            why="the base's weights or hidden states are not finite", fix="check the base",
        )  # fmt: skip
    count = len(recipe.experts)
    data: dict[str, bytes] = {}
    for layer, (experts, shared) in enumerate(recipe.gates):
        data[experts] = made[:count, layer].astype("<f4").tobytes()
        if shared:
            data[shared] = made[count:, layer].astype("<f4").tobytes()
    source = plan.sources[recipe.source]
    store = source.catalog.store
    assert isinstance(store, GivenStore)
    filled = Source(source.label, replace(source.catalog, store=replace(store, data=data)))
    return replace(plan, sources=tuple(filled if i == recipe.source else s for i, s in enumerate(plan.sources)))


def _directions(positive: Floats, negative: Floats | None) -> Floats:
    """Positive minus negative along the last axis, at length 1."""
    found = positive if negative is None else positive - negative
    norms: Floats = np.sqrt(np.sum(found * found, axis=-1, keepdims=True))
    return found / np.maximum(norms, SMALLEST_NORM)


def _cheap(plan: MergePlan, recipe: GateRecipe, groups: Sequence[Prompts]) -> Floats:
    """(gates, layers, width): the same in every layer."""
    spec = plan.sources[recipe.base].stored(recipe.embedding).spec
    tokens = sorted({token for group in groups for ids in (*group.positive, *group.negative) for token in ids})
    runs = tuple(RowRun(at, token, 1) for at, token in enumerate(tokens))
    rows = np.empty((len(tokens), spec.cols), np.float32)  # all at once: of a remote base each read is a journey
    reader = OperandReader(plan, Arena(), factor_bytes=1 << 20)
    reader.operand((DenseTerm(recipe.base, recipe.embedding, runs),), 0, len(tokens), rows)
    where = {token: at for at, token in enumerate(tokens)}

    def total(prompts: Sequence[tuple[int, ...]]) -> Floats:
        found = np.zeros(spec.cols, np.float64)
        for token in (token for ids in prompts for token in ids):
            found += rows[where[token]]
        return _directions(found, None)

    gates = np.stack(
        [_directions(total(group.positive), total(group.negative) if group.negative else None) for group in groups]
    )
    return np.repeat(gates[:, None, :], len(recipe.gates), axis=1)


def _hidden(plan: MergePlan, groups: Sequence[Prompts], hidden: HiddenStates) -> Floats:
    """(gates, layers, width) from the hidden states that enter each layer."""
    wanted = [group.positive for group in groups] + [group.negative for group in groups if group.negative]
    states = hidden(plan, wanted).astype(np.float64)
    negatives = iter(states[len(groups) :])
    return np.stack(
        [
            _directions(states[number], next(negatives) if group.negative else None)
            for number, group in enumerate(groups)
        ]
    )
