"""Anything merged into a model: adapters folded into a base, models merged with each other, layers stacked.

One task a tensor. What no source changes is copied byte for byte. Every tensor of the base is in the output.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from merger.adapters.bind import CONV1D_MODELS, HEAD, Binding, Bound
from merger.adapters.declare import Saved
from merger.catalog import Catalog
from merger.errors import PlanError, Problem, RefusedError, grouped
from merger.formats.token_tensors import EMBEDDINGS
from merger.formats.tokenizer import is_tokenizer_file
from merger.manifest import Slice, layer_position
from merger.methods import MethodSpec
from merger.methods.rounds import Call
from merger.planning.binding import bind, modules_of, replication_of, tied_embedding
from merger.planning.calls import NULL_SPACE, CallBuilder, Scopes, fitted, layer_of, natural_key
from merger.planning.changes import added, terms_of_change
from merger.planning.drafts import Draft, Segment, copied, places_of
from merger.planning.inputs import MergeInput, SourceTable, model_input
from merger.planning.layout import Layout, index_file, lay_out, literal, shard
from merger.planning.linear import LABELS, is_embedding, is_linear
from merger.planning.model_files import model_config, placed_as
from merger.planning.modules import Module, left_out
from merger.planning.nouns import (
    DenseTerm,
    Entry,
    LowRankTerm,
    Operand,
    Output,
    OutputFile,
    Place,
    Result,
    Task,
    Term,
)
from merger.planning.quantise import CODED, Quantised, quantise
from merger.planning.requantise import Requantised, requantise
from merger.planning.settings import is_table, settings_problems
from merger.planning.statistics import Statistics
from merger.planning.token_rows import dense_first, highest, moved, num_rows
from merger.planning.tokens import moved_config
from merger.planning.wholes import Owner, WholeModules, is_whole, saved_tensor
from merger.quantization import BESIDE
from merger.quantization.declare import Grid
from merger.tensors import DType, TensorSpec
from merger.vocabulary import is_by_token

_SHOWN: Final = 8


@dataclass(slots=True)
class ModelPlanner(WholeModules):
    """Plans `kind: model`. Problems are collected, not raised."""

    segments: tuple[Segment, ...]
    donor: int
    """Source whose config, tokenizer and file placement the output takes."""
    keep_files: bool
    """A fold: the base's files and placement stay."""
    replicated: bool = False
    """Slices that adapters name (layer_replication): their modules have the output's layer numbers."""
    problems: list[Problem] = field(default_factory=list)
    checks: list[Draft] = field(default_factory=list)
    """What is looked at before anything is merged, and written nowhere."""
    is_untied: bool = False
    """Whether the output's config no longer ties its head; known once it is laid out."""
    _untied: bool = False
    _bindings: dict[tuple[int, int, int | None, tuple[str, ...], tuple[str, ...]], Binding] = field(
        default_factory=dict
    )
    _tied_heads: list[tuple[MergeInput, Segment]] = field(default_factory=list)
    """Sources that hold a tied head beside their embeddings."""
    _stacks: dict[tuple[int, Module], dict[str, int]] = field(default_factory=dict)
    _tied: dict[int, str | None] = field(default_factory=dict)

    def plan(self, output: int, path: str) -> tuple[Output, list[Task]]:
        calls = CallBuilder(self.manifest)
        self._check_sources(calls.spec)
        self._check_grid()
        if self.problems:
            return Output(path, "model", ()), []
        self._plan_tokens()
        tensors: list[Draft] = []
        measured = Statistics(calls.spec, self.table)
        wrong: list[tuple[str, Problem]] = []
        for name, segment in self._names():
            try:
                tensors.append(self._tensor(calls, measured, name, segment))
            except RefusedError as error:
                wrong += [(name, problem) for problem in error.problems]
        self.problems += [p for p in grouped(wrong) if p not in self.problems]
        self._check_landed()
        self.checks = [*self._copy_checks(), *self._tie_checks()]
        if not self.problems:
            self.problems += measured.problems(self._names_of_sources())
        self.warnings += measured.warnings()
        tensors, requantised = self._requantised(tensors)
        if self.problems:
            return Output(path, "model", ()), []
        return self._lay_out(output, path, tensors, requantised)

    def _requantised(self, drafts: Sequence[Draft]) -> tuple[list[Draft], Requantised | Quantised]:
        """The tensors as output.quantization has them, and what the config says of it."""
        asked = self.manifest.output.quantization
        found: list[Draft]
        made: Requantised | Quantised
        if asked is not None and asked.kind in CODED:
            found, made, problems, told = quantise(asked, self.table.catalog(self.donor), drafts)
            self.warnings += told
        else:
            found, made, problems = requantise(None if asked is None else asked.kind, self.table, self.donor, drafts)
        self.problems += [p for p in problems if p not in self.problems]
        return found, made

    def _plan_tokens(self) -> None:
        members = [member for segment in self.segments for member in self._members(segment)]
        self.tokens.unite(self.manifest, members, self.donor)
        self.warnings += self.tokens.plan.warnings
        self.deviations += self.tokens.plan.deviations

    # ------------------------------------------------------------ names and segments

    def _check_sources(self, spec: MethodSpec) -> None:
        for segment in self.segments:
            others = len(segment.inputs) + (_with_base(spec) and segment.base is not None)
            if spec.max_sources is not None and others != spec.max_sources:
                self._problem(
                    "number-of-sources", f"{spec.name} merges {spec.max_sources} model(s), not {others}",
                    "models", "", "base_model and one other" if _with_base(spec) else "",
                )  # fmt: skip
            lacking = spec.base == "required" and segment.base is None
            if lacking and segment.module.sliced and self.manifest.base_model is not None:
                self._problem(
                    "no-base", "a slice does not list the base_model among its sources", "slices",
                    "which of the base's layers belong to the slice is not said",
                    "add - {model: BASE, layer_range: [FIRST, LAST]} to the sources of every slice",
                )  # fmt: skip
            elif lacking:
                self._problem(
                    "no-base", f"{spec.name} needs a base_model", "base_model",
                    "it works on what each model changed", "name the model that the others were trained from",
                )  # fmt: skip
            for member in self._members(segment) if segment.module.sliced else ():
                if member.model is None:
                    continue
                held = self._stacks_of(member.model, segment.module)[self._layer_prefix(member.model, segment.module)]
                if member.first_layer + segment.num_layers > held:
                    self._problem(
                        "layer-range",
                        f"layer_range [{member.first_layer}, {member.first_layer + segment.num_layers}] of "
                        f"{member.label} ends after its {held} layers",
                        "slices", "a layer that is not there would be random when the output is loaded",
                        f"end the range at {held} or before",
                    )  # fmt: skip
        for source in () if self.replicated else self.table.sources:
            if source.catalog.kind == "adapter" and replication_of(source.catalog):
                self._problem(
                    "layer-replication", f"{source.label} was trained on copied layers (layer_replication)",
                    source.catalog.reference, "its layers are copies of the base's, written out in a fold only",
                    "fold it by itself, or with adapters of the same layer_replication",
                )  # fmt: skip
        kinds = {
            str(s.catalog.config["model_type"]): s.label
            for s in self.table.sources if s.catalog.kind == "model" and "model_type" in s.catalog.config
        }  # fmt: skip
        if len(kinds) > 1:
            self._problem(
                "architectures-differ", "the models are of different architectures",
                "; ".join(f"{label}: {kind}" for kind, label in kinds.items()),
                "equal names and shapes do not make equal meanings", "use models of one architecture",
            )  # fmt: skip
        else:
            refused, remarked = settings_problems(
                [(s.label, s.catalog.config) for s in self.table.sources if s.catalog.kind == "model"]
            )
            self.problems += refused
            self.warnings += remarked
        for source in self.table.sources:
            if source.catalog.kind == "model":
                self.problems += [p for p in source.catalog.problems if p not in self.problems]

    def _names(self) -> list[tuple[str, Segment]]:
        """Every output tensor with the segment that makes it, sorted naturally."""
        found: dict[str, Segment] = {}
        for part in dict.fromkeys(segment.module for segment in self.segments):
            segments = [segment for segment in self.segments if segment.module == part]
            for segment in segments:
                self._names_of(segment, segments[0], segments[-1], found)
        self._check_modules()
        self._tied_heads.clear()
        first, last = self.segments[0], self.segments[-1]
        for source in self._members(first):
            for adapter in source.adapters if source.model is not None else ():
                for target, changes in self._binding(source, adapter).by_target.items():
                    if target == HEAD or any(isinstance(b.change.steps[0], Saved) for b in changes):
                        if target == HEAD and self._follows(source, adapter):
                            self._tied_heads.append((source, last))
                            continue
                        found.setdefault(target, last)
                    if target == self._tied_embedding(source.model) and not all(b.change.keeps_tie for b in changes):
                        found.setdefault(HEAD, last)
        if HEAD in found:
            self._tied_heads.clear()  # it is merged by itself
        return sorted(found.items(), key=lambda item: natural_key(item[0]))

    def _tie_checks(self) -> list[Draft]:
        """Looks at whether heads that sources hold beside the embeddings they are tied to are the same."""
        found = []
        for source, segment in self._tied_heads:
            tied = self._tied_embedding(source.model)
            assert tied is not None
            embeddings, head = (self._own_operand(source, name, segment) for name in (tied, HEAD))
            found.append(self._same(embeddings, [head], tied))
        self._untied = False if found else self._untied
        return found

    def _check_tasks(self, output: int, file: str) -> list[Task]:
        """The tasks that only look; `file` takes no byte of theirs."""
        nowhere = (Place(output, file, 0, 0, "left"),)
        return [replace(t.task, results=(Result(t.call, t.store, nowhere),)) for t in self.checks]

    def _follows(self, source: MergeInput, adapter: int) -> bool:
        """Whether an adapter saved the head of a tied base with its embeddings, of which it then is a copy."""
        tied = self._tied_embedding(source.model)
        if tied is None or not self.tokens.united:
            return False
        kinds = [[bound.module.tuner for bound in self._binding(source, adapter).of(name)] for name in (tied, HEAD)]
        return kinds[0] == kinds[1] and set(kinds[0]) <= {"embeddings", "trainable tokens"}

    def _names_of(self, segment: Segment, first: Segment, last: Segment, found: dict[str, Segment]) -> None:
        """Add a segment's tensors; `first` and `last` are those of its module, which hold what lies outside layers."""
        module = segment.module
        for source in self._members(segment):
            if source.model is None:
                continue
            prefix = self._layer_prefix(source.model, module) if module.sliced else None
            for name in self.table.catalog(source.model).tensors:
                if not module.holds(name):
                    continue
                layer = layer_of(name)
                if prefix is None:
                    found.setdefault(name, segment)
                elif layer is None or layer[0] != prefix:
                    found.setdefault(name, first if is_embedding(name) else last)
                else:
                    at = layer[1] - source.first_layer
                    if 0 <= at < segment.num_layers:
                        found.setdefault(_with_layer(name, prefix, segment.first_layer + at), segment)

    def _check_modules(self) -> None:
        modules = list(dict.fromkeys(segment.module for segment in self.segments))
        names = [
            name for source in self.table.sources if source.catalog.kind == "model" for name in source.catalog.tensors
        ]
        lost = left_out(dict.fromkeys(names), modules)
        if lost:
            self._problem(
                "no-module", f"no module holds {len(lost)} tensors: {', '.join(lost[:_SHOWN])}", "modules",
                "every tensor of the models must be in the output",
                "add the module that they belong to, such as multi_modal_projector or vision_tower, or `default`",
            )  # fmt: skip
        for module in modules:
            if module.name and not any(module.holds(name) for name in names):
                self._problem(
                    "no-module", f"no tensor belongs to the module {module.name}", f"modules.{module.name}",
                    f"the models have, for example, {', '.join(sorted(set(names))[:3])}",
                    "name a module of these models, or the beginning of its tensors' names",
                )  # fmt: skip

    def _members(self, segment: Segment) -> list[MergeInput]:
        return [*([segment.base] if segment.base is not None else []), *segment.inputs]

    def _binding(self, source: MergeInput, adapter: int) -> Binding:
        """What one of a source's adapters does to its model, in the model's own names and orientation."""
        assert source.model is not None
        key = (adapter, source.model, source.initial, source.include, source.exclude)
        if key not in self._bindings:
            held, label = self.table.catalog(source.model), self.table.sources[source.model].label
            initial = source.initial if adapter == source.adapters[-1] else None
            modules, problems = modules_of(self.table, adapter, initial)
            self._bindings[key] = bind(
                modules, self.table.catalog(adapter), self.table.sources[adapter].label, held, label, source.takes,
                self.manifest.options.moe_lora_layout, self._replicated_specs(held) if self.replicated else None,
            )  # fmt: skip
            self._bindings[key].problems += problems
            self.deviations += self._bindings[key].notes
        return self._bindings[key]

    def _replicated_specs(self, base: Catalog) -> dict[str, TensorSpec]:
        """The base's tensors with its layers written out as the output has them."""
        prefix = self._layer_prefix(self.donor, self.segments[0].module)
        found = {}
        for name, stored in base.tensors.items():
            layer = layer_of(name)
            if layer is None or layer[0] != prefix:
                found[name] = stored.spec
                continue
            for segment in self.segments:
                at = layer[1] - segment.inputs[0].first_layer
                if 0 <= at < segment.num_layers:
                    found[_with_layer(name, prefix, segment.first_layer + at)] = stored.spec
        return found

    def _stacks_of(self, model: int, module: Module) -> dict[str, int]:
        """Prefix of each stack of numbered layers of a module → how many it has."""
        if (model, module) not in self._stacks:
            stacks = self._stacks[model, module] = {}
            for name in self.table.catalog(model).tensors:
                layer = layer_of(name)
                if layer is not None and module.holds(name):
                    stacks[layer[0]] = max(stacks.get(layer[0], 0), layer[1] + 1)
        return self._stacks[model, module]

    def _layer_prefix(self, model: int, module: Module) -> str:
        prefixes = self._stacks_of(model, module)
        if len(prefixes) != 1:
            of = f"the {module.name} of " if module.name else ""
            raise PlanError.of(
                "no-layers",
                f"slices need one stack of layers; {of}{self.table.sources[model].label} has {len(prefixes)}",
                where=", ".join(sorted(prefixes)) or "no numbered tensors",
                why="only then is a layer range unambiguous",
                fix="use models instead of slices, or slices within `modules:`",
            )
        return next(iter(prefixes))

    # ------------------------------------------------------------ one tensor

    def _tensor(self, calls: CallBuilder, measured: Statistics, name: str, segment: Segment) -> Draft:
        spec = calls.spec
        layer = layer_of(name)
        t = 0.0
        if layer is not None and (not segment.module.sliced or self._in_stack(name, segment.module)):
            count = segment.num_layers if segment.module.sliced else self._layers_of(layer[0], segment.module)
            t = layer_position(layer[1] - segment.first_layer, count)
        on_deltas = spec.spaces[0] in {"delta", "core"} and (segment.base is not None or spec.base != "optional")
        delta = on_deltas or (spec.name == "linear" and self._adapters_only(segment))
        if spec.name == "linear" and delta and not self._linear_normalised(calls, name, segment, t):
            delta = False
        owners = self._owners(name, segment)
        if owners:
            labels = [source.label for source in segment.inputs]
            return self._whole(calls, name, segment.shared, t, owners, labels, self.donor)
        operands = [(source, self._operand(source, name, segment)) for source in segment.inputs]
        base = None if segment.base is None else self._operand(segment.base, name, segment)
        with_base = _with_base(spec)
        every = list(operands)
        if segment.base is not None and base is not None and (delta or with_base):
            every.insert(0, (segment.base, base))
        shape, floats = self._check_shapes(name, every)
        scopes = [
            Scopes(
                s.parameters, (*segment.shared, self.manifest.parameters), self._input_name(s, name, segment),
                s.position, s.is_adapter,
            )
            for s, _ in operands
        ]  # fmt: skip
        if not floats or is_table(name):
            return copied(self.table, name, shape, [o for _, o in every])
        call = fitted(spec, self._call(calls, scopes, name, t), shape)
        dtype = self._dtype([base] if base is not None and _is_fold(segment) else [o for _, o in every])
        entries: tuple[Entry, ...]
        named = [(s, self._input_name(s, name, segment)) for s, _ in operands]
        transposed = name != HEAD and self._conv1d(self.donor)
        if delta:
            assert base is not None
            entries = tuple(self._delta(operand, base) for _, operand in operands)
            if not any(entry.terms for entry in entries):
                return self._passed(name, shape, base, dtype)
            call, entries = measured.attach(call, shape, named, entries, transposed=transposed)
            rounded = self.manifest.output.rounding == "peft_safe"
            if rounded and any(not _is_product(term) for entry in entries for term in entry.terms[:1]):
                raise PlanError.of(
                    "bad-rounding", f"{name} cannot be rounded as PEFT's safe merge does", where="output.rounding",
                    why="it rounds products of two factors, and a source changes this tensor in another way",
                    fix="write rounding: once",
                )  # fmt: skip
            in_core = self._in_core(spec, call, name, entries, rounded=rounded)
            if rounded:
                entries = tuple(_round_products(e, self._stored_dtype(base)) for e in entries)
            base_operand: Operand | None = base
            if in_core:
                return self._core(name, shape, base, entries, call, dtype)
        else:
            entries = tuple(Entry(operand) for _, operand in ([(None, base)] if with_base and base else []) + operands)
            base_operand = None
            call, entries = measured.attach(call, shape, named, entries, transposed=transposed)
            equal = all(entry == entries[0] for entry in entries[1:])
            if equal and call.combine == "block" and spec.tile is not None and spec.tile.keeps_equal:
                return self._passed(name, shape, entries[0].terms, dtype)
            if call.balance or call.calibrate is not None:
                raise PlanError.of(
                    "no-base", "balance and calibrate need a base_model", where="base_model",
                    why="they measure what each source changed", fix="name a base_model, or leave them out",
                )  # fmt: skip
            if spec.combine == "pass" and call.scale == 1.0:
                return self._passed(name, shape, entries[0].terms, dtype)
        return self._rows(name, shape, base_operand, entries, call, dtype)

    def _call(self, calls: CallBuilder, scopes: Sequence[Scopes], name: str, t: float) -> Call:
        return calls.call(scopes, name, t)

    def _in_core(self, spec: MethodSpec, call: Call, name: str, entries: Sequence[Entry], *, rounded: bool) -> bool:
        """Whether a tensor is merged in the exact core of its adapters. Raises PlanError where sources are none."""
        linear = call.prepare == "none" and call.combine in {"sum", "mean"}
        told = self.manifest.space == "core"
        own = told or (spec.core is not None and not linear)
        if not own and not (linear and call.calibrate is not None):
            return False
        terms = [term for entry in entries for term in entry.terms]
        low_rank = [isinstance(term, LowRankTerm) for term in terms]
        if told and call.scope == "model":
            raise PlanError.of(
                "bad-space", f"{spec.name} cannot work in the core over the whole model", where="space",
                why="each tensor's core has coordinates of its own", fix="leave out space, or use scope: tensor",
            )  # fmt: skip
        if all(low_rank):
            if rounded:
                raise PlanError.of(
                    "bad-rounding", f"{spec.name} cannot round each adapter's product", where="output.rounding",
                    why="it merges adapters in their exact core, where no such product is made",
                    fix="write rounding: once",
                )  # fmt: skip
            return True
        if not own:
            return False
        if told or spec.whole is None:
            raise PlanError.of(
                "bad-space", f"{spec.name} merges adapters, and a source of {name} is a whole model", where="models",
                why="the core is that of adapters' factors, which a model does not have",
                fix="use tsv_m, iso_c or ties for models",
            )  # fmt: skip
        if any(low_rank):
            raise PlanError.of(
                "null-space", f"{spec.name} cannot merge adapters and whole models in one tensor", where=name,
                why=NULL_SPACE, fix="merge the adapters in one merge and the models in another, or use ties",
            )  # fmt: skip
        return False

    def _core(
        self, name: str, shape: tuple[int, ...], base: Operand, entries: tuple[Entry, ...], call: Call, dtype: DType
    ) -> Draft:
        """Adapters merged in their exact core; the base's rows plus those of the merged product."""
        made = self._rows(name, shape, base, entries, call, dtype)
        return replace(made, task=replace(made.task, cut="whole", fused=True), space="core")

    def _in_stack(self, name: str, module: Module) -> bool:
        layer = layer_of(name)
        return layer is not None and layer[0] == self._layer_prefix(self.donor, module)

    def _layers_of(self, prefix: str, module: Module) -> int:
        return self._stacks_of(self.donor, module).get(prefix, 1)

    def _adapters_only(self, segment: Segment) -> bool:
        base = segment.base
        return base is not None and all(
            s.model == base.model and s.adapters[: len(base.adapters)] == base.adapters for s in segment.inputs
        )

    def _linear_normalised(self, calls: CallBuilder, name: str, segment: Segment, t: float) -> bool:
        scopes = [
            Scopes(s.parameters, (*segment.shared, self.manifest.parameters), name, s.position, s.is_adapter)
            for s in segment.inputs
        ]
        return calls.call(scopes, name, t).normalize

    def _input_name(self, source: MergeInput, name: str, segment: Segment) -> str:
        if not segment.module.sliced or source.model is None:
            return name
        layer = layer_of(name)
        prefix = self._layer_prefix(source.model, segment.module)
        if layer is None or not self._in_stack(name, segment.module):
            return name
        return _with_layer(name, prefix, layer[1] - segment.first_layer + source.first_layer)

    def _operand(self, source: MergeInput, name: str, segment: Segment) -> Operand:
        """A source's tensor and what its adapters add, in the rows of the merge's vocabulary where rows are tokens.

        Raises PlanError: `missing-tensor`, `not-movable`, `rows-differ`."""
        own = self._own_operand(source, name, segment)
        parts = self.tokens.map_of(source) if self._is_by_token(source, name, segment) else None
        if parts is None:
            return own
        assert self.tokens.plan.rows is not None
        terms: list[Term] = []
        key = self.tokens.member(source).key
        for part in parts:
            other = source if part.source == key else self.tokens.members[part.source]
            held = self._own_operand(other, name, segment)
            if num_rows(self.table, held) < highest(part.runs):
                raise PlanError.of(
                    "rows-differ", f"{name} of {other.label} has fewer rows than its embeddings or head",
                    where=f"{num_rows(self.table, held)} rows, and its tokens go up to {highest(part.runs)}",
                    why="tokens that it added have no row there",
                    fix="save embeddings and head as they were trained (save_embedding_layers)",
                )  # fmt: skip
            terms += moved(held, part.runs, part.share, self.tokens.plan.rows, other.label, name)
        return dense_first(terms)

    def _is_by_token(self, source: MergeInput, name: str, segment: Segment) -> bool:
        """Whether vocabularies are united and the rows of this tensor are tokens."""
        if source.model is None or not self.tokens.united:
            return False
        catalog, own = self.table.catalog(source.model), self._input_name(source, name, segment)
        if own == HEAD and own not in catalog.tensors:
            own = self._tied_embedding(source.model) or own
        return own in catalog.tensors and is_by_token(catalog, own)

    def _own_operand(self, source: MergeInput, name: str, segment: Segment) -> Operand:
        """A source's tensor and what its adapters add, in its own rows. Raises PlanError(code `missing-tensor`)."""
        assert source.model is not None
        catalog = self.table.catalog(source.model)
        own = self._input_name(source, name, segment)
        stored = own
        changes = self._changes(source, name if self.replicated else own)
        if own not in catalog.tensors:
            tied = self._tied_embedding(source.model) if own == HEAD else None
            if tied is None and any(isinstance(bound.change.steps[0], Saved) for _, bound in changes):
                tied = own  # replaced before it is read
            elif tied is None:
                raise PlanError.of(
                    "missing-tensor",
                    f"{source.label} has no tensor {own}",
                    where=catalog.reference,
                    why="every source must hold every tensor of the output; nothing is filled in from elsewhere",
                    fix="use models of one architecture",
                )
            stored = tied
            self._untied = self._untied or own == HEAD
        base = DenseTerm(source.model, stored, grid=self._grid(source.model, stored, segment))
        if len(segment.inputs) > 1 and stored in catalog.tensors:
            changes = self._without_copy(changes, replace(base, grid=None))
        terms: Operand = (base,)
        for adapter, bound in changes:
            terms = terms_of_change(terms, adapter, bound.change, source.initial)
        return terms

    def _changes(self, source: MergeInput, own: str) -> list[tuple[int, Bound]]:
        """What a source's adapters do to a tensor of its model. A tied head follows its embeddings; these are what the
        head was resized to where an adapter holds that alone."""
        found: list[tuple[int, Bound]] = []
        tied = self._tied_embedding(source.model)
        for adapter in source.adapters:
            binding = self._binding(source, adapter)
            direct, followed = binding.of(own), list[Bound]()
            if tied is not None and not any(isinstance(bound.change.steps[0], Saved) for bound in direct):
                if own == HEAD:
                    followed = [bound for bound in binding.of(tied) if bound.change.keeps_tie]
                elif own == tied:
                    held = [bound for bound in binding.of(HEAD) if is_whole(bound) and bound.change.keeps_tie]
                    followed = [bound for bound in held if self._is_resized(source, adapter, bound, tied)]
            found += [(adapter, bound) for bound in (*followed, *direct)]
        return found

    def _is_resized(self, source: MergeInput, adapter: int, bound: Bound, name: str) -> bool:
        """Whether an adapter holds a tensor in another size than its base has one."""
        assert source.model is not None
        held = self.table.catalog(adapter).tensors[saved_tensor(bound)].spec
        return held.shape != self.table.catalog(source.model).tensors[name].spec.shape

    def _conv1d(self, model: int) -> bool:
        return str(self.table.catalog(model).config.get("model_type")) in CONV1D_MODELS

    def _names_of_sources(self) -> list[tuple[MergeInput, frozenset[str] | None]]:
        """What every merged source may have statistics of."""
        found: list[tuple[MergeInput, frozenset[str] | None]] = []
        for source in (source for segment in self.segments for source in segment.inputs):
            assert source.model is not None
            head = {HEAD} if self._tied_embedding(source.model) is not None else set()
            found.append((source, frozenset({*self.table.catalog(source.model).tensors, *head})))
        return found

    def _grid(self, model: int, stored: str, segment: Segment) -> Grid | None:
        """The grid that a tensor of the base is rounded through: that of linear layers, as bitsandbytes has them."""
        asked = self.manifest.base_quantization
        if asked is None or asked.kind == "none" or segment.base is None or model != segment.base.model:
            return None
        if stored not in self.table.catalog(model).tensors:
            return None
        spec = self.table.catalog(model).tensors[stored].spec
        return Grid(asked.kind, asked.blocksize, asked.double_quant) if is_linear(spec) else None

    def _check_grid(self) -> None:
        """A base_quantization needs a dense base."""
        asked = self.manifest.base_quantization
        if asked is None or asked.kind == "none":
            return
        base = self.segments[0].base
        if base is None or base.model is None:
            self._problem("no-base", "base_quantization needs a base_model", "base_quantization",
                          "it is the base that is rounded", "name the base")  # fmt: skip
        elif self.table.catalog(base.model).quantization is not None:
            self._problem("conflict", "the base is quantised already", "base_quantization",
                          "a quantised base is read as it lies", "drop base_quantization")  # fmt: skip

    def _tied_embedding(self, model: int | None) -> str | None:
        """The tensor that serves as a tied model's head, which its files leave out."""
        if model is None:
            return None
        if model not in self._tied:  # asked for every tensor, and found by looking at all of them
            self._tied[model] = tied_embedding(self.table.catalog(model))
        return self._tied[model]

    def _delta(self, operand: Operand, base: Operand) -> Entry:
        """operand − base; where both begin with the same terms, exactly what is added to them."""
        if operand[: len(base)] == base and added(operand[len(base) :]):
            return Entry(operand[len(base) :])
        return Entry(operand, subtract_base=True)

    def _owners(self, name: str, segment: Segment) -> list[Owner]:
        """The sources whose own adapters hold a tensor whole, each with the last adapter that does."""
        if segment.inputs and self._is_by_token(segment.inputs[0], name, segment):
            return []  # rows of tokens are weights of the model base+adapter, like any other
        own_base = segment.base.adapters if segment.base is not None else ()
        found = []
        for source in segment.inputs:
            if source.model is None:
                continue
            own = name if self.replicated else self._input_name(source, name, segment)
            held = []
            for adapter in source.adapters:
                changes = self._binding(source, adapter).of(own) if adapter not in own_base else []
                # A copy of the base beside a change of it (a targeted embedding) is no module of its own.
                if len(changes) == 1 and is_whole(changes[0]) and not self._left_alone(source, adapter, own, segment):
                    held.append((source, adapter, changes[0]))
            found += held[-1:]
        return found

    def _left_alone(self, source: MergeInput, adapter: int, own: str, segment: Segment) -> bool:
        """Whether what an adapter holds of a tensor whole is taken for a copy of the base's."""
        assert source.model is not None
        catalog = self.table.catalog(source.model)
        stored = own if own in catalog.tensors else self._tied_embedding(source.model)
        if len(segment.inputs) < 2 or stored is None:
            return False
        changes = [(adapter, bound) for bound in self._binding(source, adapter).of(own)]
        return not self._without_copy(changes, DenseTerm(source.model, stored))

    # ------------------------------------------------------------ coverage, files

    def _check_landed(self) -> None:
        """Every tensor of every adapter must change a tensor of its base."""
        for segment in self.segments:
            for source in self._members(segment):
                for adapter in source.adapters if source.model is not None else ():
                    self.problems += [p for p in self._binding(source, adapter).problems if p not in self.problems]

    def _lay_out(
        self, output: int, path: str, tensors: Sequence[Draft], requantised: Requantised | Quantised
    ) -> tuple[Output, list[Task]]:
        donor = self.table.catalog(self.donor)
        shards: Mapping[str, Sequence[TensorSpec]]
        if self.keep_files:
            shards = placed_as(donor, [(t.spec.name, spec) for t in tensors for spec in t.specs])
        else:
            shards = shard([spec for t in tensors for spec in t.specs], self.manifest.output.shard_size)
        specs = [t.spec for t in tensors]
        layout: Layout = lay_out(output, shards, requantised.metadata(specs))
        index = index_file(shards)
        files: list[OutputFile] = [
            *layout.files, literal("config.json", self._config(donor, specs, requantised.config(donor))),
        ]  # fmt: skip
        if index is not None:
            files.append(index)
        beside = requantised.beside(donor)
        if beside is not None:
            files.append(literal(BESIDE, (json.dumps(beside, indent=4) + "\n").encode()))
        files += self._companions(donor)
        tasks = [
            replace(t.task, results=(Result(t.call, t.store, places_of(layout, t), t.space),)) for t in tensors
        ]  # fmt: skip
        return Output(path, "model", tuple(files)), [*self._check_tasks(output, layout.files[0].name), *tasks]

    def _companions(self, donor: Catalog) -> list[OutputFile]:
        """The donor's files beside its weights; the tokenizer's are those of the merge's vocabulary."""
        files = self.tokens.plan.files
        ours = [n for n in sorted((*donor.companions, *donor.code)) if not is_tokenizer_file(n) and n not in files]
        copied = [OutputFile(name, donor.sizes[name], "copied", b"", self.donor, name) for name in ours]
        more = [literal(name, data) for name, data in sorted(files.items()) if not is_tokenizer_file(name)]
        return sorted((*copied, *more, *self._tokenizer_files()), key=lambda file: (file.kind, file.name))

    def _tokenizer_files(self) -> list[OutputFile]:
        """The tokenizer of the merge's vocabulary."""
        tokens = self.tokens.plan
        origin = self.donor if tokens.origin is None else self.table.index(tokens.origin)
        if tokens.origin is None and self.tokenizer is not None:
            origin = self.tokenizer
        theirs = [(n, origin) for n in self.table.catalog(origin).companions if is_tokenizer_file(n)]
        if self.tokenizer is not None:  # of an adapter whose embeddings are taken; it may hold only what it changed
            own = self.table.catalog(self.tokenizer).companions
            theirs = [(n, s) for n, s in theirs if n not in own] + [(n, self.tokenizer) for n in own]
        copied = [
            OutputFile(name, self.table.catalog(source).sizes[name], "copied", b"", source, name)
            for name, source in sorted(theirs)
            if name not in tokens.files
        ]
        changed = (name for name in sorted(tokens.files) if is_tokenizer_file(name))
        return [*copied, *(literal(name, tokens.files[name]) for name in changed)]

    def _config(self, donor: Catalog, specs: Sequence[TensorSpec], quantization: Mapping[str, Any] | None) -> bytes:
        untied = any(spec.name == HEAD for spec in specs) and donor.tied and (self._untied or self._head_differs())
        self.is_untied = untied
        taken: dict[Module, list[tuple[int, int]]] = {}
        for segment in self.segments:
            if segment.module.sliced:
                taken.setdefault(segment.module, []).append((segment.inputs[0].first_layer, segment.num_layers))
        saved = [spec for spec in specs if spec.name in self.replaced]
        brought = next((s.shape[0] for s in saved if s.name.endswith(EMBEDDINGS)), None)
        config = moved_config(donor.config, self.tokens.plan.moved) if self.tokens.plan.moved else donor.config
        return model_config(
            config, specs, layers=taken, untied=untied, vocabulary=self.tokens.plan.rows or brought,
            labels=next((s.shape[0] for s in saved if s.name.endswith(LABELS)), None), quantization=quantization,
        )  # fmt: skip

    def _head_differs(self) -> bool:
        """Whether the head that is written may differ from the embeddings."""
        catalogs = [source.catalog for source in self.table.sources]
        return any(c.kind == "model" and not c.tied for c in catalogs) or any(
            binding.of(HEAD) for binding in self._bindings.values()
        )

    def _problem(self, code: str, what: str, where: str = "", why: str = "", fix: str = "") -> None:
        problem = Problem(code, what, where, why, fix)
        if problem not in self.problems:
            self.problems.append(problem)


def _is_fold(segment: Segment) -> bool:
    """Whether all that is merged is adapters on the base."""
    return segment.base is not None and all(
        source.model == segment.base.model and source.adapters for source in segment.inputs
    )


def _is_product(term: Term) -> bool:
    return isinstance(term, LowRankTerm)


def replicated_segments(
    inputs: Sequence[MergeInput], base: MergeInput, runs: Sequence[tuple[int, int]]
) -> tuple[Segment, ...]:
    """Runs of the base's layers, [first, last), one after another, each changed by the adapters."""
    segments, at = [], 0
    for first, last in runs:
        placed = tuple(replace(source, first_layer=first) for source in inputs)
        below = replace(base, first_layer=first)
        segments.append(Segment(placed, below, (), at, last - first, Module("", sliced=True)))
        at += last - first
    return tuple(segments)


def slice_segments(
    table: SourceTable, slices: Sequence[Slice], base: MergeInput | None, module: Module, position: int = 0
) -> tuple[Segment, ...]:
    """`slices:` as segments. A base that is one of a slice's sources is taken out of them."""
    segments, first = [], 0
    for part in slices:
        count = part.sources[0].layer_range[1] - part.sources[0].layer_range[0]
        inputs = []
        own_base, listed = base, False
        if part.base_model is not None:
            own_base = model_input(table, part.base_model, {}, -1)
        for source in part.sources:
            found = model_input(
                table, source.model, source.parameters, position, source.layer_range[0], source.statistics
            )
            position += 1
            if own_base is not None and (found.model, found.adapters) == (own_base.model, own_base.adapters):
                own_base, listed = found, True
                continue
            inputs.append(found)
        segments.append(Segment(tuple(inputs), own_base if listed else None, (part.parameters,), first, count, module))
        first += count
    return tuple(segments)


def _with_base(spec: MethodSpec) -> bool:
    """Whether a method on weights takes the base as its first source."""
    return spec.spaces[0] == "weight" and spec.base == "required"


def _with_layer(name: str, prefix: str, layer: int) -> str:
    rest = name[len(prefix) + 1 :] if prefix else name
    return f"{prefix}.{layer}{rest[len(rest.split('.', 1)[0]) :]}" if prefix else f"{layer}.{rest.split('.', 1)[1]}"


def _round_products(entry: Entry, dtype: DType) -> Entry:
    terms = tuple(replace(t, round_to=dtype) if isinstance(t, LowRankTerm) else t for t in entry.terms)
    return replace(entry, terms=terms)
