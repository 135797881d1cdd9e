"""From what adapters do to what a plan computes: steps as terms, and who gives a module that is saved whole. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeVar

from merger.adapters.declare import Change, LowRank, Saved
from merger.errors import PlanError
from merger.formats.token_tensors import is_token_name
from merger.manifest.grammar import TakeFrom
from merger.planning.inputs import MergeInput
from merger.planning.nouns import DenseTerm, FormulaTerm, LowRankTerm, Operand, Term

Owner = TypeVar("Owner", bound=tuple[MergeInput, object, object])


def terms_of_change(before: Operand, adapter: int, change: Change, initial: int | None = None) -> Operand:
    """The terms of a tensor after an adapter has changed it. `initial` is the source of its first factors."""
    terms: list[Term] = list(before)
    for step in change.steps:
        if isinstance(step, Saved):
            terms = [DenseTerm(adapter, step.tensor)]
        elif isinstance(step, LowRank):
            source = adapter
            if step.initial:
                assert initial is not None
                source = initial
            terms.append(
                LowRankTerm(
                    source, step.a, step.b, step.scaling, step.rank, None, step.a_view, step.b_view, step.diagonal
                )
            )
        else:
            assert change.shape is not None
            terms.append(
                FormulaTerm(adapter, step.kind, step.tensors, step.numbers, step.adds, step.whole, change.shape[0])
            )
    return tuple(terms)


def added(terms: Operand) -> bool:
    """Whether terms add something that does not depend on what stands before them."""
    return all(isinstance(term, LowRankTerm) or (isinstance(term, FormulaTerm) and term.adds) for term in terms)


def chosen_owners(
    wanted: Literal["refuse", "average", "all", "drop"] | TakeFrom,
    name: str,
    owners: Sequence[Owner],
    labels: Sequence[str],
) -> list[Owner]:
    """The sources that a tensor saved whole is made from. Raises PlanError(code `modules-to-save`).

    One source that is merged alone, a fold, leaves nothing to choose.
    """
    holders = ", ".join(owner[0].label for owner in owners)
    if isinstance(wanted, TakeFrom):
        if wanted.source not in labels:
            raise PlanError.of(
                "modules-to-save", f"no source is called {wanted.source}", where="output.modules_to_save.from",
                why=f"the sources are {', '.join(labels)}", fix="write one of these names",
            )  # fmt: skip
        found = [owner for owner in owners if owner[0].label == wanted.source]
        if not found:
            raise PlanError.of(
                "modules-to-save", f"{wanted.source} does not hold {name} whole", where="output.modules_to_save.from",
                why=f"it is held by {holders}", fix=f"write modules_to_save: {{from: {owners[0][0].label}}}",
            )  # fmt: skip
        return found
    if wanted == "average" or len(labels) == 1:
        return list(owners)
    raise PlanError.of(
        "modules-to-save", f"{name} is saved whole, which is no delta", where=holders,
        why="a whole module cannot be merged as the deltas are, and which one is meant is not said",
        fix=f"write output.modules_to_save: average, or {{from: {owners[0][0].label}}}"
        + ("; or tokenizer_source: union, which merges it token by token" if is_token_name(name) else ""),
    )  # fmt: skip
