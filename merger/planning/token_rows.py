"""Rows that are tokens, of sources that are a model with adapters: `TokenRows`, and `moved`, which puts a source's
tensor into the rows of the merge's vocabulary. Pure.

A source's matrix is what it is in its own rows: the base's, or one that an adapter holds whole, and what adapters add
to it or replace in it. Moving it is moving each of its terms; trained rows (trainable_token_indices) become rows of a
stored tensor in the place of others. Only what adapters compute of whole matrices (DoRA, PiSSA) cannot be moved.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from merger.errors import PlanError, Problem
from merger.manifest import Manifest
from merger.planning.inputs import MergeInput, SourceTable
from merger.planning.nouns import DenseTerm, LowRankTerm, MovedProduct, Operand, Term
from merger.planning.tokens import Member, TokenPlan, plan_tokens, tokenizer_wish
from merger.tensors import RowRun
from merger.vocabulary import RowSource, Vocabulary, runs_of, tokens_changed, vocabulary_difference

_Rows = npt.NDArray[np.int64]


@dataclass(slots=True)
class TokenRows:
    """The merge's vocabulary, and the sources by the names that it knows them by."""

    table: SourceTable
    plan: TokenPlan = field(default_factory=TokenPlan)
    members: dict[str, MergeInput] = field(default_factory=dict)

    @property
    def united(self) -> bool:
        """Whether rows follow tokens; else they are merged by index."""
        return self.plan.rows is not None

    def member(self, source: MergeInput) -> Member:
        """A source as the vocabulary knows it."""
        assert source.model is not None
        model = self.table.sources[source.model].key
        changing = [
            a for a in source.adapters
            if any(tokens_changed(m) for n, m in self.table.catalog(a).modules.items() if source.takes(n))
        ]  # fmt: skip
        if not changing:
            return Member(model, model)
        adapter = self.table.sources[changing[-1]].key
        own = self.table.sources[source.adapters[-1]].key
        key = own if source.is_adapter else "+".join([model, *(self.table.sources[a].key for a in source.adapters)])
        return Member(key, model, adapter)

    def unite(self, manifest: Manifest, sources: Iterable[MergeInput], donor: int) -> None:
        """Plan the vocabulary of these sources. Raises PlanError and SourceError with what stands against it."""
        key = self.table.sources[donor].key
        plain = MergeInput(label=key, model=donor, adapters=(), parameters={}, position=-1, is_adapter=False)
        self.members[key] = plain
        found = [(self.member(source), source) for source in sources if source.model is not None]
        for member, source in found:
            self.members.setdefault(member.key, source)
            if source.position < 0 and member.adapter is not None and tokenizer_wish(manifest) is not None:
                raise PlanError.of(
                    "base-with-tokens", f"the base has an adapter that changes rows of tokens: {member.adapter}",
                    where="base_model", why="other sources' rows are told by those of a model",
                    fix="fold that adapter into its base first, and name the folded model",
                )  # fmt: skip
        self.plan = plan_tokens(manifest, self.table.inputs, list(dict.fromkeys(m for m, _ in found)), key)

    def map_of(self, source: MergeInput) -> tuple[RowSource, ...] | None:
        """What the source's rows of tokens are read as; None: as they lie."""
        return self.plan.maps.get(self.member(source).key) if self.united else None

    def vocabularies(self, sources: Iterable[int]) -> list[Vocabulary]:
        """The vocabularies of sources that have one of their own."""
        known = self.table.inputs.vocabularies
        keys = [self.table.sources[source].key for source in sources]
        return [known[key] for key in keys if key in known]

    def check_same_tokens(self, name: str, adapters: Sequence[int]) -> None:
        """Raise PlanError where rows of adapters that are to be averaged are those of different tokens."""
        found = vocabulary_difference(self.vocabularies(adapters))
        if found is not None:
            raise PlanError(
                [Problem(found.code, f"{name} cannot be averaged row by row: {found.what}", found.where, found.why,
                         "write tokenizer_source: union, which moves rows to their tokens")]
            )  # fmt: skip


def moved(operand: Operand, runs: Sequence[RowRun], share: float, height: int, label: str, name: str) -> Operand:
    """An operand in other rows, times `share`: row `run.first` of the result, of `height` rows, is its `run.stored`.

    Stored tensors come first, then products. Raises PlanError for what is a function of whole matrices.
    """
    at, own = _expanded(runs)
    pieces: list[tuple[Term, _Rows, _Rows, _Rows]] = []
    for term in operand:
        if isinstance(term, DenseTerm | LowRankTerm):
            pieces.append((term, at, own, own))
            continue
        if term.kind != "rows":
            raise PlanError.of(
                "not-movable", f"{label} changes {name} by a function of its rows ({term.kind}), and its rows move to "
                "the merge's vocabulary", where="tokenizer_source", why="only stored rows and products can be moved",
                fix="fold the adapter into its base first, or leave tokenizer_source out",
            )  # fmt: skip
        indices = dict(term.numbers)["indices"]
        assert isinstance(indices, tuple)
        place = {row: i for i, row in enumerate(indices)}
        pieces = [
            (before, a[keep], o[keep], s[keep])
            for before, a, o, s in pieces if (keep := ~np.isin(o, np.array(indices, np.int64))).any()
        ]  # fmt: skip
        hit = np.isin(own, np.array(indices, np.int64))
        if hit.any():
            trained = np.array([place[int(row)] for row in own[hit]], np.int64)
            pieces.append((DenseTerm(term.source, dict(term.roles)["rows"]), at[hit], own[hit], trained))
    dense: list[Term] = []
    products: list[Term] = []
    for term, a, _, stored in pieces:
        if isinstance(term, DenseTerm):
            dense.append(replace(term, runs=runs_of(a, stored), share=share * term.share))
        elif isinstance(term, LowRankTerm):
            products.append(_product(term, runs_of(a, stored), share, height))
    return (*dense, *products)


def dense_first(terms: Iterable[Term]) -> Operand:
    """The same terms, products last: what two sources have in common then stands first."""
    found = list(terms)
    return (*(t for t in found if isinstance(t, DenseTerm)), *(t for t in found if not isinstance(t, DenseTerm)))


def _product(term: LowRankTerm, runs: tuple[RowRun, ...], share: float, height: int) -> MovedProduct:
    return MovedProduct(
        term.source, term.a, term.b, term.scaling * share, term.rank, term.round_to, term.a_view, term.b_view,
        term.diagonal, runs, height,
    )  # fmt: skip


def _expanded(runs: Sequence[RowRun]) -> tuple[_Rows, _Rows]:
    """Runs as pairs of rows: (of the result, stored)."""
    if not runs:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    at = np.concatenate([np.arange(run.first, run.first + run.count) for run in runs])
    stored = np.concatenate([np.arange(run.stored, run.stored + run.count) for run in runs])
    return at, stored


def num_rows(table: SourceTable, operand: Operand) -> int:
    """Rows of an operand as it lies."""
    first = operand[0]
    assert isinstance(first, DenseTerm)
    return table.catalog(first.source).stored(first.tensor).spec.rows


def highest(runs: Iterable[RowRun]) -> int:
    """One more than the highest stored row that runs name."""
    return max(itertools.chain((0,), (run.stored + run.count for run in runs)))
