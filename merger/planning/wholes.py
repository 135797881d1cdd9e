"""Modules that adapters hold whole, in a merge into a model: chosen, averaged, or only a copy of the base's.

What is saved whole is no delta, so `output.modules_to_save` says what becomes of it. Two things need no word: rows of
tokens in a merge that unites vocabularies, which are weights of the model base+adapter like any other; and embeddings
that PEFT saved because LoRA targets them (save_embedding_layers="auto"), which the run compares with the base's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from merger.adapters.bind import Bound
from merger.adapters.declare import WHOLE_MODULES, Saved
from merger.catalog import TOKENIZER_FILES, Catalog
from merger.errors import PlanError, Problem
from merger.formats.token_tensors import is_token_name
from merger.manifest import ParameterValue
from merger.methods.rounds import Call
from merger.planning.calls import CallBuilder, Scopes
from merger.planning.changes import chosen_owners
from merger.planning.drafting import Drafting
from merger.planning.drafts import Draft
from merger.planning.inputs import MergeInput
from merger.planning.nouns import DenseTerm, Entry, Operand, StoreSpec
from merger.tensors import TensorSpec, dtype_from_torch_name
from merger.vocabulary import holds_copies

Owner = tuple[MergeInput, int, Bound]
"""A source, its adapter that holds a tensor whole, and how."""


@dataclass(slots=True)
class WholeModules(Drafting):
    """What adapters hold whole."""

    deviations: list[str] = field(init=False, default_factory=list)
    warnings: list[Problem] = field(init=False, default_factory=list)
    replaced: set[str] = field(init=False, default_factory=set)
    """Tensors that are taken whole from adapters."""
    tokenizer: int | None = field(init=False, default=None)
    """Adapter whose embeddings, and with them its tokenizer, the output takes."""
    _copies: dict[DenseTerm, list[DenseTerm]] = field(init=False, default_factory=dict)
    """A tensor of the base → what adapters hold as a copy of it."""

    def _whole(
        self, calls: CallBuilder, name: str, shared: tuple[Mapping[str, ParameterValue], ...], t: float,
        owners: Sequence[Owner], labels: Sequence[str], donor: int,
    ) -> Draft:  # fmt: skip
        """A tensor that adapters hold whole: one of theirs, or their mean. It is no delta."""
        held = chosen_owners(self.manifest.output.modules_to_save, name, owners, labels)
        if len(held) > 1 and is_token_name(name):
            self.tokens.check_same_tokens(name, [adapter for _, adapter, _ in held])
        self.replaced.add(name)
        operands: list[tuple[MergeInput, Operand]] = []
        for source, adapter, bound in held:
            operands.append((source, (DenseTerm(adapter, saved_tensor(bound)),)))
            if bound.module.tuner == "embeddings":
                self._take_tokenizer(adapter)
        shape, _ = self._check_shapes(name, operands)
        stored = self.table.catalog(donor).tensors.get(name)
        dtype = self._dtype([o for _, o in operands]) if stored is None else stored.spec.dtype
        named = self.manifest.out_dtype or self.manifest.dtype
        if named is not None and (asked := dtype_from_torch_name(named)) is not None and asked.is_float:
            dtype = asked
        self.deviations.append(f"{name} is no delta: {_told(held)}")
        if len(operands) == 1:
            return self._passed(name, shape, operands[0][1], dtype)
        scopes = [
            Scopes(s.parameters, (*shared, self.manifest.parameters), name, s.position, s.is_adapter)
            for s, _ in operands
        ]
        call = Call(method="linear", combine="mean", weights=calls.weights(scopes, name, t), normalize=True)
        if abs(sum(call.weights)) < 1e-8:
            raise PlanError.of(
                "weights-cancel", f"the weights of the sources that hold {name} sum to zero", where="parameters.weight",
                why="their mean divides by that sum", fix="take it {from: NAME}",
            )  # fmt: skip
        return self._rows(name, shape, None, tuple(Entry(o) for _, o in operands), call, dtype)

    def _take_tokenizer(self, adapter: int) -> None:
        catalog = self.table.catalog(adapter)
        if self.tokenizer is None and catalog.companions:
            self.tokenizer = adapter
        elif not catalog.companions:
            warning = Problem(
                "no-tokenizer", f"{self.table.sources[adapter].label} holds embeddings and no tokenizer",
                catalog.reference, "tokens that it added have rows in the output, and no text in the base's tokenizer",
                f"put its {TOKENIZER_FILES[0]} beside the output, unless it added none",
            )  # fmt: skip
            if warning not in self.warnings:
                self.warnings.append(warning)

    # ------------------------------------------------------------ copies of the base

    def _without_copy(self, changes: Sequence[tuple[int, Bound]], stored: DenseTerm) -> list[tuple[int, Bound]]:
        """The changes of a tensor of the base without those that only hold it as it was, which are noted."""
        if self.tokens.united or self.manifest.output.modules_to_save != "refuse":
            return list(changes)
        spec = self.table.catalog(stored.source).tensors[stored.tensor].spec
        found = []
        for adapter, bound in changes:
            if is_copy(bound, self.table.catalog(adapter), spec):
                known = self._copies.setdefault(stored, [])
                term = DenseTerm(adapter, saved_tensor(bound))
                if term not in known:
                    known.append(term)
            else:
                found.append((adapter, bound))
        return found

    def _copy_checks(self) -> list[Draft]:
        """Looks at whether what was taken for a copy is one: the run begins with them."""
        return [
            self._same((stored,), [(term,) for term in held], stored.tensor) for stored, held in self._copies.items()
        ]

    def _same(self, one: Operand, others: Sequence[Operand], name: str) -> Draft:
        """A look at whether operands are the same as another one."""
        call = Call(method="copy", combine="equal", weights=(1.0,) * len(others))
        entries = tuple(Entry(other, subtract_base=True) for other in others)
        spec = self._in_rows(self._stored(one[0]).spec, one)
        made = self._rows(name, spec.shape, one, entries, call, spec.dtype)
        return replace(made, task=replace(made.task, cut="rows", fused=False), store=StoreSpec("same"))


def saved_tensor(bound: Bound) -> str:
    """The stored tensor by which a module replaces one of the base."""
    step = bound.change.steps[0]
    assert isinstance(step, Saved)
    return step.tensor


def is_whole(bound: Bound) -> bool:
    """Whether a module is one that was saved whole, and no delta."""
    return isinstance(bound.change.steps[0], Saved) and bound.module.tuner in WHOLE_MODULES


def is_copy(bound: Bound, adapter: Catalog, base: TensorSpec) -> bool:
    """Whether an adapter holds embeddings or a head whole for no other reason than that LoRA targets one of them."""
    if bound.module.tuner != "embeddings" or not is_whole(bound):
        return False
    return holds_copies(adapter) and adapter.tensors[saved_tensor(bound)].spec.shape == base.shape


def _told(held: Sequence[Owner]) -> str:
    labels = ", ".join(source.label for source, _, _ in held)
    return f"it is taken whole from {labels}" if len(held) == 1 else f"it is the weighted mean of {labels}"
