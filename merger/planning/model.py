"""Anything merged into a model: adapters folded into a base, models merged with each other, layers stacked.

One task a tensor. What no source changes is copied byte for byte. Every tensor of the base is in the output.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from merger.adapters.bind import CONV1D_MODELS, HEAD, Binding, Bound, matrix_of
from merger.adapters.declare import WHOLE_MODULES, Saved
from merger.catalog import TOKENIZER_FILES, Catalog
from merger.errors import PlanError, Problem, RefusedError
from merger.formats.tokenizer import is_tokenizer_file
from merger.manifest import Manifest, Slice, layer_position
from merger.methods import METHODS, MethodSpec
from merger.methods.rounds import Call
from merger.planning.adapter import NULL_SPACE
from merger.planning.binding import bind, modules_of, replication_of, tied_embedding
from merger.planning.calls import CallBuilder, Scopes, fitted, layer_of, natural_key
from merger.planning.changes import added, chosen_owners, terms_of_change
from merger.planning.drafts import Draft, Segment, copied, places_of
from merger.planning.inputs import MergeInput, SourceTable, model_input
from merger.planning.layout import Layout, index_file, lay_out, literal, promote, shard
from merger.planning.linear import LABELS, is_embedding, is_linear
from merger.planning.memory import FUSED_ELEMENTS, extent_rows, tile_rows
from merger.planning.model_files import model_config, placed_as
from merger.planning.modules import Module, left_out
from merger.planning.nouns import (
    DenseTerm,
    Entry,
    FormulaTerm,
    LowRankTerm,
    Operand,
    Output,
    OutputFile,
    Result,
    StoreSpec,
    Task,
    Term,
)
from merger.planning.quantise import CODED, Quantised, quantise
from merger.planning.requantise import Requantised, requantise
from merger.planning.settings import is_table, settings_problems
from merger.planning.statistics import Statistics
from merger.planning.tokens import TokenPlan, moved_config, plan_tokens
from merger.quantization.declare import Grid
from merger.tensors import DType, StoredTensor, TensorSpec, dtype_from_torch_name
from merger.vocabulary import EMBEDDINGS, is_by_token

_SHOWN: Final = 8


@dataclass(slots=True)
class ModelPlanner:
    """Plans `kind: model`. Problems are collected, not raised."""

    manifest: Manifest
    table: SourceTable
    segments: tuple[Segment, ...]
    donor: int
    """Source whose config, tokenizer and file placement the output takes."""
    keep_files: bool
    """A fold: the base's files and placement stay."""
    replicated: bool = False
    """Slices that adapters name (layer_replication): their modules have the output's layer numbers."""
    problems: list[Problem] = field(default_factory=list)
    deviations: list[str] = field(default_factory=list)
    tokens: TokenPlan = field(default_factory=TokenPlan)
    """What becomes of rows that are tokens."""
    warnings: list[Problem] = field(default_factory=list)
    is_untied: bool = False
    """Whether the output's config no longer ties its head; known once it is laid out."""
    _untied: bool = False
    _bindings: dict[tuple[int, int, int | None, tuple[str, ...], tuple[str, ...]], Binding] = field(
        default_factory=dict
    )
    _replaced: set[str] = field(default_factory=set)
    """Tensors that are taken whole from adapters."""
    _tokenizer: int | None = None
    """Adapter whose embeddings, and with them its tokenizer, the output takes."""
    _stacks: dict[tuple[int, Module], dict[str, int]] = field(default_factory=dict)

    def plan(self, output: int, path: str) -> tuple[Output, list[Task]]:
        calls = CallBuilder(self.manifest)
        self._check_sources(calls.spec)
        self._check_grid()
        if self.problems:
            return Output(path, "model", ()), []
        self._plan_tokens()
        tensors: list[Draft] = []
        measured = Statistics(calls.spec, self.table)
        for name, segment in self._names():
            try:
                tensors.append(self._tensor(calls, measured, name, segment))
            except RefusedError as error:
                self.problems += [p for p in error.problems if p not in self.problems]
        self._check_landed()
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
        members = [m.model for segment in self.segments for m in self._members(segment) if m.model is not None]
        names = [self.table.sources[index].key for index in dict.fromkeys(members)]
        self.tokens = plan_tokens(self.manifest, self.table.inputs, names, self.table.sources[self.donor].key)
        self.warnings += self.tokens.warnings
        self.deviations += self.tokens.deviations

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
        first, last = self.segments[0], self.segments[-1]
        for source in self._members(first):
            for adapter in source.adapters if source.model is not None else ():
                for target, changes in self._binding(source, adapter).by_target.items():
                    if target == HEAD or any(isinstance(b.change.steps[0], Saved) for b in changes):
                        found.setdefault(target, last)
                    if target == self._tied_embedding(source.model) and not all(b.change.keeps_tie for b in changes):
                        found.setdefault(HEAD, last)
        return sorted(found.items(), key=lambda item: natural_key(item[0]))

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
            return self._saved(calls, name, segment, t, owners)
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
        call = fitted(spec, calls.call(scopes, name, t), shape)
        dtype = self._dtype([o for _, o in every])
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
        """A source's tensor and what its adapters add. Raises PlanError(code `missing-tensor`)."""
        assert source.model is not None
        catalog = self.table.catalog(source.model)
        own = self._input_name(source, name, segment)
        stored = own
        changes = [
            (adapter, bound)
            for adapter in source.adapters
            for bound in self._binding(source, adapter).of(name if self.replicated else own)
        ]
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
        terms: Operand = self._rows_by_token(source, name, stored, segment)
        if changes and not _as_it_lies(terms):
            raise PlanError.of(
                "not-yet", f"an adapter changes {own}, whose rows move to the merge's vocabulary",
                where=self.table.sources[changes[0][0]].label, why="its rows are the base's tokens",
                fix="fold the adapter into its base first, or leave tokenizer_source out",
            )  # fmt: skip
        for adapter, bound in changes:
            terms = terms_of_change(terms, adapter, bound.change, source.initial)
        return terms

    def _rows_by_token(self, source: MergeInput, name: str, stored: str, segment: Segment) -> Operand:
        """A source's tensor as it lies, or, where its rows are tokens, in the rows of the merge's vocabulary."""
        assert source.model is not None
        catalog = self.table.catalog(source.model)
        mapped = self.tokens.maps.get(self.table.sources[source.model].key) if stored in catalog.tensors else None
        if mapped is None or not is_by_token(catalog, stored):
            return (DenseTerm(source.model, stored, grid=self._grid(source.model, stored, segment)),)
        terms = []
        for part in mapped:
            other = self.table.index(part.source)
            terms.append(DenseTerm(other, self._stored_name(other, name, segment), part.runs, part.share))
        return tuple(terms)

    def _stored_name(self, model: int, name: str, segment: Segment) -> str:
        """What a tensor by token is called in one of the merged models."""
        member = next(m for m in self._members(segment) if m.model == model)
        own = self._input_name(member, name, segment)
        if own in self.table.catalog(model).tensors:
            return own
        tied = self._tied_embedding(model) if own == HEAD else None
        if tied is None:
            raise PlanError.of(
                "missing-tensor", f"{member.label} has no tensor {own}", where=self.table.catalog(model).reference,
                why="rows of its tokens are needed", fix="use models of one architecture",
            )  # fmt: skip
        return tied

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
        return None if model is None else tied_embedding(self.table.catalog(model))

    def _delta(self, operand: Operand, base: Operand) -> Entry:
        """operand − base; where both begin with the same terms, exactly what is added to them."""
        if operand[: len(base)] == base and added(operand[len(base) :]):
            return Entry(operand[len(base) :])
        return Entry(operand, subtract_base=True)

    def _check_shapes(self, name: str, operands: Sequence[tuple[MergeInput, Operand]]) -> tuple[tuple[int, ...], bool]:
        specs = [(s, self._stored(o[0]).spec) for s, o in operands]
        specs = [(s, self._in_rows(spec, o)) for (s, spec), (_, o) in zip(specs, operands, strict=True)]
        shapes = {spec.shape for _, spec in specs}
        if len(shapes) > 1:
            vocabulary = is_embedding(name) or name == HEAD
            raise PlanError.of(
                "shape-mismatch",
                f"the sources disagree on the shape of {name}",
                where="; ".join(f"{s.label}: {' × '.join(map(str, spec.shape))}" for s, spec in specs[:_SHOWN]),
                why="their vocabularies differ" if vocabulary else "they are models of different sizes",
                fix="write tokenizer_source: union, or resize the models first"
                if vocabulary
                else "use models of one architecture",
            )
        kinds = {spec.dtype.is_float for _, spec in specs}
        dtypes = {spec.dtype for _, spec in specs}
        if kinds == {True, False} or (kinds == {False} and len(dtypes) > 1):
            raise PlanError.of(
                "dtype-mismatch",
                f"{name} is of different kinds: {', '.join(sorted(d.code for d in dtypes))}",
                where="; ".join(f"{s.label}: {spec.dtype}" for s, spec in specs[:_SHOWN]),
                why="floats and codes cannot be merged",
                fix="use unquantised sources of one architecture",
            )
        codes = [spec for _, spec in specs if spec.dtype.code in ("U8", "I8", "F4") or spec.dtype.code.startswith("F8")]
        if codes and name.endswith("weight"):
            raise PlanError.of(
                "quantised-source",
                f"{name} is stored as {codes[0].dtype}, which this version cannot decode",
                where=specs[0][0].label,
                why="codes are not weights: merging them gives noise",
                fix="use the unquantised checkpoint",
            )
        return specs[0][1].shape, kinds == {True}

    def _in_rows(self, spec: TensorSpec, operand: Operand) -> TensorSpec:
        """A stored tensor's spec with the rows that the operand has."""
        if _as_it_lies(operand):
            return spec
        assert self.tokens.rows is not None
        return replace(spec, shape=(self.tokens.rows, *spec.shape[1:]))

    def _stored(self, term: Term) -> StoredTensor:
        assert isinstance(term, DenseTerm)
        return self.table.catalog(term.source).stored(term.tensor)

    def _is_copied(self, operand: Operand) -> bool:
        """Whether an operand is a stored tensor whose bytes are its values."""
        first = operand[0]
        dense = isinstance(first, DenseTerm) and first.grid is None and self._stored(first).coded is None
        return dense and _as_it_lies(operand)

    def _stored_dtype(self, operand: Operand) -> DType:
        return self._stored(operand[0]).spec.dtype

    def _dtype(self, operands: Sequence[Operand]) -> DType:
        named = self.manifest.out_dtype or self.manifest.dtype
        if named is not None and (dtype := dtype_from_torch_name(named)) is not None and dtype.is_float:
            return dtype
        # Two orders matter not: the widest of what is stored, so that nothing is cast down unasked.
        widest = promote(self._stored_dtype(o) for o in operands)
        assert widest is not None
        return widest

    # ------------------------------------------------------------ modules that adapters save whole

    def _owners(self, name: str, segment: Segment) -> list[tuple[MergeInput, int, Bound]]:
        """The sources whose own adapters hold a tensor whole, each with the last adapter that does."""
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
                if len(changes) == 1 and _is_whole(changes[0]):
                    held.append((source, adapter, changes[0]))
            found += held[-1:]
        return found

    def _saved(
        self, calls: CallBuilder, name: str, segment: Segment, t: float, owners: list[tuple[MergeInput, int, Bound]]
    ) -> Draft:
        """A tensor that adapters hold whole: one of theirs, or their mean. It is no delta."""
        wanted = self.manifest.output.modules_to_save
        held = chosen_owners(wanted, name, owners, [source.label for source in segment.inputs])
        self._replaced.add(name)
        operands: list[tuple[MergeInput, Operand]] = []
        for source, adapter, bound in held:
            step = bound.change.steps[0]
            assert isinstance(step, Saved)
            operands.append((source, (DenseTerm(adapter, step.tensor),)))
            if bound.module.tuner == "embeddings":
                self._take_tokenizer(adapter)
        shape, _ = self._check_shapes(name, operands)
        stored = self.table.catalog(self.donor).tensors.get(name)
        dtype = self._dtype([o for _, o in operands]) if stored is None else stored.spec.dtype
        named = self.manifest.out_dtype or self.manifest.dtype
        if named is not None and (asked := dtype_from_torch_name(named)) is not None and asked.is_float:
            dtype = asked
        self.deviations.append(f"{name} is no delta: {_told(held)}")
        if len(operands) == 1:
            return self._passed(name, shape, operands[0][1], dtype)
        scopes = [
            Scopes(s.parameters, (*segment.shared, self.manifest.parameters), name, s.position, s.is_adapter)
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
        if self.tokens.rows is not None:
            raise PlanError.of(
                "not-yet",
                f"{self.table.sources[adapter].label} holds embeddings, and tokenizer_source moves their rows",
                where="tokenizer_source", why="its rows are its own tokens",
                fix="fold the adapter into its base first, or leave tokenizer_source out",
            )  # fmt: skip
        if self._tokenizer is None and catalog.companions:
            self._tokenizer = adapter
        elif not catalog.companions:
            warning = Problem(
                "no-tokenizer", f"{self.table.sources[adapter].label} holds embeddings and no tokenizer",
                catalog.reference, "tokens that it added have rows in the output, and no text in the base's tokenizer",
                f"put its {TOKENIZER_FILES[0]} beside the output, unless it added none",
            )  # fmt: skip
            if warning not in self.warnings:
                self.warnings.append(warning)

    # ------------------------------------------------------------ tasks without places

    def _passed(self, name: str, shape: tuple[int, ...], base: Operand, dtype: DType) -> Draft:
        """A tensor that no source changes."""
        if len(base) == 1 and self._is_copied(base) and self._stored_dtype(base) == dtype:
            return copied(self.table, name, shape, [base])
        call = Call(method="copy", combine="pass", weights=(1.0,))
        return self._rows(name, shape, None, (Entry(base),), call, dtype)

    def _rows(
        self, name: str, shape: tuple[int, ...], base: Operand | None, entries: tuple[Entry, ...], call: Call,
        dtype: DType,
    ) -> Draft:  # fmt: skip
        spec = TensorSpec(name, dtype, shape)
        terms = [*(base or ()), *(term for entry in entries for term in entry.terms)]
        if any(isinstance(term, DenseTerm) and self._stored(term).spec.dtype.code == "F64" for term in terms):
            raise PlanError.of(
                "dtype-mismatch", f"{name} is float64, and arithmetic is float32", where=name,
                why="merging it would lose digits silently", fix="convert the checkpoint to float32 first",
            )  # fmt: skip
        changed = any(not isinstance(term, DenseTerm) for term in terms)
        rows, cols = matrix_of(spec) if changed else (spec.rows, spec.cols)
        products = any(isinstance(term, LowRankTerm) or (changed and len(shape) == 2) for term in terms)
        tile = tile_rows(cols, products=products)
        whole = METHODS[call.method].whole if call.combine == "block" else None
        if len(shape) != 2:
            call = replace(call, calibrate=None)  # what is no matrix has no singular values
        vector = len(shape) != 2 if whole is not None else len(shape) <= 1
        block = METHODS[call.method].tile if call.method in METHODS else None
        if vector and (call.prepare == "magprune" or (block is not None and block.whole_rows)):
            tile = max(1, rows)
        draft = Task(
            name=name, rows=rows, cols=cols, base=base, entries=entries, results=(), tile_rows=tile,
            extent_rows=extent_rows(tile, max(1, cols * dtype.itemsize)), vector=vector,
        )  # fmt: skip
        from merger.methods.rounds import rounds_of

        gridded = any(isinstance(term, DenseTerm) and term.grid is not None for term in terms)
        fused = bool(rounds_of(call)) and call.scope == "tensor" and spec.numel <= FUSED_ELEMENTS
        fused = fused or (
            gridded and not rounds_of(call)
        )  # its grid may need the tensor whole: one unit, one pass more
        if any(isinstance(term, FormulaTerm) and term.whole for term in terms):
            fused = call.scope == "tensor" or not rounds_of(call)  # what is computed whole is computed once
        if whole is not None or call.calibrate is not None:
            cut_whole = call.scope == "tensor" or not rounds_of(call)
            return Draft(spec, replace(draft, cut="whole", fused=cut_whole), StoreSpec("dense"), call)
        return Draft(spec, replace(draft, fused=fused), StoreSpec("dense"), call)

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
        layout: Layout = lay_out(output, shards)
        index = index_file(shards)
        files: list[OutputFile] = [
            *layout.files, literal("config.json", self._config(donor, specs, requantised.config(donor))),
        ]  # fmt: skip
        if index is not None:
            files.append(index)
        files += self._companions(donor)
        tasks = [
            replace(t.task, results=(Result(t.call, t.store, places_of(layout, t), t.space),)) for t in tensors
        ]  # fmt: skip
        return Output(path, "model", tuple(files)), tasks

    def _companions(self, donor: Catalog) -> list[OutputFile]:
        """The donor's files beside its weights; the tokenizer's are those of the merge's vocabulary."""
        tokens = self.tokens
        origin = self.donor if tokens.origin is None else self.table.index(tokens.origin)
        if tokens.origin is None and self._tokenizer is not None:
            origin = self._tokenizer
        ours = [(n, self.donor) for n in (*donor.companions, *donor.code) if not is_tokenizer_file(n)]
        theirs = [(n, origin) for n in self.table.catalog(origin).companions if is_tokenizer_file(n)]
        if self._tokenizer is not None:  # of an adapter whose embeddings are taken; it may hold only what it changed
            own = self.table.catalog(self._tokenizer).companions
            theirs = [(n, s) for n, s in theirs if n not in own] + [(n, self._tokenizer) for n in own]
        copied = [
            OutputFile(name, self.table.catalog(source).sizes[name], "copied", b"", source, name)
            for name, source in sorted(ours + theirs)
            if name not in tokens.files
        ]
        return [*copied, *(literal(name, data) for name, data in sorted(tokens.files.items()))]

    def _config(self, donor: Catalog, specs: Sequence[TensorSpec], quantization: Mapping[str, Any] | None) -> bytes:
        untied = any(spec.name == HEAD for spec in specs) and donor.tied and (self._untied or self._head_differs())
        self.is_untied = untied
        taken: dict[Module, list[tuple[int, int]]] = {}
        for segment in self.segments:
            if segment.module.sliced:
                taken.setdefault(segment.module, []).append((segment.inputs[0].first_layer, segment.num_layers))
        saved = [spec for spec in specs if spec.name in self._replaced]
        brought = next((s.shape[0] for s in saved if s.name.endswith(EMBEDDINGS)), None)
        config = moved_config(donor.config, self.tokens.moved) if self.tokens.moved else donor.config
        return model_config(
            config, specs, layers=taken, untied=untied, vocabulary=self.tokens.rows or brought,
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


def _told(held: Sequence[tuple[MergeInput, int, Bound]]) -> str:
    labels = ", ".join(source.label for source, _, _ in held)
    return f"it is taken whole from {labels}" if len(held) == 1 else f"it is the weighted mean of {labels}"


def _is_whole(bound: Bound) -> bool:
    return isinstance(bound.change.steps[0], Saved) and bound.module.tuner in WHOLE_MODULES


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


def _as_it_lies(operand: Operand) -> bool:
    """Whether an operand begins with a whole stored tensor, row by row."""
    first = operand[0]
    return not isinstance(first, DenseTerm) or (first.runs is None and first.share == 1.0)


def _with_base(spec: MethodSpec) -> bool:
    """Whether a method on weights takes the base as its first source."""
    return spec.spaces[0] == "weight" and spec.base == "required"


def _with_layer(name: str, prefix: str, layer: int) -> str:
    rest = name[len(prefix) + 1 :] if prefix else name
    return f"{prefix}.{layer}{rest[len(rest.split('.', 1)[0]) :]}" if prefix else f"{layer}.{rest.split('.', 1)[1]}"


def _round_products(entry: Entry, dtype: DType) -> Entry:
    terms = tuple(replace(t, round_to=dtype) if isinstance(t, LowRankTerm) else t for t in entry.terms)
    return replace(entry, terms=terms)
