"""Embeddings and heads of a merged adapter, token by token: what a merge into a model would make of them, kept whole.

A pair cannot hold rows that the base lacks. So where adapters are merged by token, and rows move or were trained as
rows, embeddings and head are written whole, as PEFT writes those of a resized model: in the base's names, or as
modules_to_save where a source had them so or a head no longer is the embeddings it is tied to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from merger.adapters.bind import HEAD, Binding
from merger.adapters.declare import LowRank, Saved
from merger.manifest import Manifest
from merger.methods.rounds import Call
from merger.planning.calls import CallBuilder, Scopes
from merger.planning.drafts import Draft, Segment
from merger.planning.inputs import MergeInput, SourceTable
from merger.planning.layout import promote
from merger.planning.model import ModelPlanner
from merger.planning.nouns import DenseTerm, Operand, OutputFile
from merger.planning.statistics import Statistics
from merger.tensors import DType, dtype_from_torch_name
from merger.vocabulary import is_by_token


class TokenTensors(ModelPlanner):
    """Plans the embeddings and heads of `kind: adapter`. Problems are raised."""

    def __init__(
        self, manifest: Manifest, table: SourceTable, inputs: Sequence[MergeInput], base: str,
        bindings: Mapping[int, Binding],
    ) -> None:  # fmt: skip
        model = table.index(base)
        below = MergeInput(label=base, model=model, adapters=(), parameters={}, position=-1, is_adapter=False)
        placed = tuple(replace(source, model=model) for source in inputs)
        super().__init__(manifest, table, (Segment(placed, below, (), 0, 1 << 30),), model, keep_files=True)
        self._known = {source.position: bindings[source.position] for source in inputs}

    def _binding(self, source: MergeInput, adapter: int) -> Binding:
        del adapter  # each source is one
        return self._known[source.position]

    def targets(self) -> set[str]:
        """The base's tensors by token, and a head that it ties to one of them."""
        base = self.table.catalog(self.donor)
        found = {name for name in base.tensors if is_by_token(base, name)}
        return found | ({HEAD} if self._tied_embedding(self.donor) in found else set())

    def copies(self) -> dict[int, set[str]]:
        """Modules that only hold what the base has, by positions of sources. The run looks whether they do."""
        base = self.table.catalog(self.donor)
        found: dict[int, set[str]] = {}
        for source in self.segments[0].inputs if len(self.segments[0].inputs) > 1 else ():
            for target in sorted(self.targets()):
                stored = target if target in base.tensors else self._tied_embedding(self.donor)
                assert stored is not None
                changes = [(source.adapters[-1], bound) for bound in self._known[source.position].of(target)]
                kept = self._without_copy(changes, DenseTerm(self.donor, stored))
                lost = [bound for change in changes if change not in kept for bound in change[1:]]
                found.setdefault(source.position, set()).update(bound.module.module for bound in lost)
        self.checks = self._copy_checks()
        return found

    def drafts(self, calls: CallBuilder, measured: Statistics) -> list[Draft]:
        """The tensors that are written whole: none where rows stay where they are and were changed by pairs alone.

        Raises PlanError and SourceError."""
        self._plan_tokens()
        if not self._are_whole():
            return []
        targets = self.targets()
        found = []
        for name, segment in self._names():
            if name in targets:
                draft = self._tensor(calls, measured, name, segment)
                held = self.table.catalog(self.donor).tensors[self._stored_as(name)]
                if draft.spec.shape != held.spec.shape or draft.task.base is not None:
                    found.append(draft)
        self.checks = self._tie_checks()
        return found

    def _stored_as(self, name: str) -> str:
        """The tensor of the base that a tensor by token is, tied or not."""
        if name in self.table.catalog(self.donor).tensors:
            return name
        tied = self._tied_embedding(self.donor)
        assert tied is not None
        return tied

    def _are_whole(self) -> bool:
        """Whether pairs cannot hold what becomes of the rows."""
        plan = self.tokens.plan
        if any(found is not None for found in plan.maps.values()):
            return True
        steps = [
            step for binding in self._known.values() for name in self.targets() for bound in binding.of(name)
            for step in bound.change.steps
        ]  # fmt: skip
        return any(not isinstance(step, LowRank) for step in steps)

    def names_of(self, draft: Draft) -> tuple[str, ...]:
        """What a tensor is written as: tied embeddings as the head, too."""
        both = draft.spec.name == self._tied_embedding(self.donor) and not self.unties
        return (draft.spec.name, HEAD) if both else (draft.spec.name,)

    @property
    def unties(self) -> bool:
        """Whether the head of a tied base is written as a tensor of its own."""
        return self._tied_embedding(self.donor) is not None and any(name == HEAD for name, _ in self._names())

    def saved_modules(self) -> set[str]:
        """Modules that PEFT is to keep beside the base's."""
        targets = self.targets()
        listed = any(
            bound.module.tuner == "modules_to_save"
            for binding in self._known.values() for name in targets for bound in binding.of(name)
        )  # fmt: skip
        return {name.rpartition(".")[0] for name in targets} if listed or self.unties else set()

    def tokenizer_files(self) -> list[OutputFile]:
        """The tokenizer of the merge's vocabulary."""
        return self._tokenizer_files()

    def _call(self, calls: CallBuilder, scopes: Sequence[Scopes], name: str, t: float) -> Call:
        kind = self.manifest.combination_type
        if kind is None:
            return super()._call(calls, scopes, name, t)
        # As PEFT's types with _svd: the same on deltas.
        kind = "linear" if len(scopes) == 1 else kind.removesuffix("_svd")
        return calls.peft_call(kind, [s.position for s in scopes], [(s.input_name, "") for s in scopes], name, t)

    def _dtype(self, operands: Sequence[Operand]) -> DType:
        """What is asked for, else the widest of what adapters hold of such rows, else the base's."""
        named = self.manifest.out_dtype or self.manifest.dtype
        if named is not None and (asked := dtype_from_torch_name(named)) is not None:
            return asked
        held = promote(
            self.table.catalog(source.adapters[-1]).tensors[step.tensor].spec.dtype
            for source in self.segments[0].inputs for name in self.targets()
            for bound in self._known[source.position].of(name) for step in bound.change.steps
            if isinstance(step, Saved)
        )  # fmt: skip
        return held or super()._dtype(operands)
