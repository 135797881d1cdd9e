"""Adapters merged into an adapter: one task a module, its result a LoRA pair."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from merger.adapters.bind import CONV1D_LAYERS, CONV1D_MODELS, Binding, Bound
from merger.adapters.declare import WHOLE_MODULES, AdapterModule, Formula, Saved, stored_tensors
from merger.adapters.experts import PACKED_SINCE, expert_shape, wrapper_of
from merger.errors import PlanError, Problem, RefusedError, grouped
from merger.formats import bare_lora, peft
from merger.formats.token_tensors import is_token_name
from merger.manifest import Manifest, layer_position
from merger.methods import MethodSpec
from merger.methods.combination import combines
from merger.methods.rounds import Call, rounds_of
from merger.planning.adapter_tokens import TokenTensors
from merger.planning.binding import bind, modules_of, replication_of
from merger.planning.calls import NULL_SPACE, CallBuilder, Scopes, fitted, layer_of, natural_key
from merger.planning.changes import added, chosen_owners, terms_of_change
from merger.planning.drafts import Draft
from merger.planning.inputs import MergeInput, SourceTable
from merger.planning.layout import lay_out, literal, promote
from merger.planning.memory import extent_rows, tile_rows
from merger.planning.nouns import (
    DenseTerm,
    Entry,
    ExpertStore,
    FormulaTerm,
    LowRankTerm,
    Operand,
    Output,
    OutputFile,
    Place,
    Result,
    StoreSpec,
    Task,
    is_low_rank,
)
from merger.planning.packed import check_packed, packed_specs, products_of
from merger.planning.spelling import common_spelling, flat_names, spelling_problems, with_kernels
from merger.planning.statistics import Statistics
from merger.planning.token_rows import TokenRows
from merger.planning.tokens import tokenizer_wish
from merger.tensors import F32, DType, TensorSpec, dtype_from_torch_name
from merger.vocabulary import changes_tokens, holds_copies

WEIGHTS_FILE = "adapter_model.safetensors"


@dataclass(slots=True)
class _Module:
    """One module's share of the plan before places are known."""

    name: str
    shape: tuple[int, int]
    entries: tuple[Entry, ...]
    call: Call
    store: StoreSpec
    space: Literal["delta", "factors", "core"]
    layer: AdapterModule
    """One of the modules that it is made of: all are of one kind."""
    base: Operand | None = None
    flipped: bool = False
    """Whether the task has the base's orientation and PEFT's is the other one."""


@dataclass(slots=True)
class _Whole:
    """A tensor that is written as it is: a module saved whole, or the factors of IA3."""

    spec: TensorSpec
    task: Task
    call: Call
    store: StoreSpec
    also: tuple[TensorSpec, ...] = ()
    """The same under other names: a head that is tied to embeddings."""
    space: Literal["delta", "core"] = "delta"


@dataclass(slots=True)
class AdapterPlanner:
    """Plans `kind: adapter`. Problems are collected, not raised."""

    manifest: Manifest
    table: SourceTable
    inputs: Sequence[MergeInput]
    base_name: str | None
    problems: list[Problem] = field(default_factory=list)
    deviations: list[str] = field(default_factory=list)
    warnings: list[Problem] = field(default_factory=list)
    _held: dict[tuple[int, int | None], Mapping[str, AdapterModule]] = field(default_factory=dict)
    _bindings: dict[int, Binding] = field(default_factory=dict)
    _spelled: dict[int, dict[str, str]] = field(default_factory=dict)
    """Position → module → the base's spelling, where the adapters do not agree on one."""
    _saved_modules: set[str] = field(default_factory=set)
    _spelling: bare_lora.Spelling = "peft"
    _elsewhere: dict[int, set[str]] = field(default_factory=dict)
    """Position → modules that are no pairs: rows of tokens, and what is only a copy of the base's."""
    _checks: list[Draft] = field(default_factory=list)
    """What is looked at before anything is merged, and written nowhere."""
    _tokenizer: list[OutputFile] = field(default_factory=list)

    def plan(self, output: int, path: str) -> tuple[Output, list[Task]]:
        calls = CallBuilder(self.manifest)
        for source in self.inputs:
            if replication_of(self.table.catalog(source.adapters[0])):
                self._problem(
                    "layer-replication", f"{source.label} was trained on copied layers (layer_replication)",
                    source.label,
                    "its layers are not those of the base, and PEFT would copy them again when it is loaded",
                    "fold it into a model (kind: model), where the layers are written out",
                )  # fmt: skip
        if not self.problems:
            self._check_spelling()
        if self.problems:
            return Output(path, "adapter", ()), []
        self._check_base()
        wholes: list[_Whole] = []
        measured = Statistics(calls.spec, self.table)
        try:
            wholes += [] if self.problems else self._by_token(calls, measured)
        except RefusedError as error:
            self.problems += [p for p in error.problems if p not in self.problems]
        names = sorted({m for i in self.inputs for m in self._modules(i)}, key=natural_key)
        if not names and not self.problems:
            self._problem(
                "no-modules", "the adapters hold no module that becomes a pair",
                fix="fold them into a model (kind: model)" if wholes else "check include and exclude",
            )  # fmt: skip
        most = calls.spec.max_sources if self.manifest.combination_type is None else None
        if most is not None and len(self.inputs) != most:
            self._problem(
                "number-of-sources", f"{calls.spec.name} merges {most} adapter(s), not {len(self.inputs)}", "adapters",
            )  # fmt: skip
        layers = 1 + max((place[1] for name in names if (place := layer_of(name))), default=0)
        modules = []
        wrong: list[tuple[str, Problem]] = []
        for name in () if self.problems else names:
            try:
                found = [(source, self._modules(source).get(name)) for source in self.inputs]
                if self._is_ia3():
                    wholes.append(self._ia3(calls, name, found, layers))
                elif any(m is not None and m.layer == "saved" for _, m in found):
                    wholes.append(self._saved(calls, name, found, layers))
                elif any(m is not None and m.layer == "experts" for _, m in found):
                    modules.append(self._experts(calls, measured, name, found, layers))
                else:
                    modules.append(self._module(calls, measured, name, found, layers))
            except RefusedError as error:
                wrong += [(name, problem) for problem in error.problems]
        self.problems += [p for p in grouped(wrong) if p not in self.problems]
        if not self.problems and self.manifest.combination_type is None:
            base = self.table.inputs.base
            known = None if base is None else frozenset(self.table.inputs.catalogs[base].tensors)
            self.problems += measured.problems([(source, known) for source in self.inputs])
            self.warnings += measured.warnings()
        if self.problems:
            return Output(path, "adapter", ()), []
        return self._lay_out(output, path, modules, wholes)

    def _modules(self, source: MergeInput) -> dict[str, AdapterModule]:
        (adapter,) = source.adapters
        key = (adapter, source.initial)
        if key not in self._held:
            self._held[key], problems = modules_of(self.table, adapter, source.initial)
            self.problems += [p for p in problems if p not in self.problems]
        spelled = self._spelled.get(source.position, {})
        elsewhere = self._elsewhere.get(source.position, ())
        return {spelled.get(n, n): m for n, m in self._held[key].items() if source.takes(n) and n not in elsewhere}

    def _problem(self, code: str, what: str, where: str = "", why: str = "", fix: str = "") -> None:
        problem = Problem(code, what, where, why, fix)
        if problem not in self.problems:
            self.problems.append(problem)

    def _check_spelling(self) -> None:
        """Decide whose names the output has."""
        held = [
            (source.label, self.table.catalog(source.adapters[0]).spelling, self._modules(source))
            for source in self.inputs
        ]
        self.problems += spelling_problems(held)
        if self.problems:
            return
        self._spelling = common_spelling(held)
        if len({spelling for _, spelling, _ in held}) > 1:
            self._spelled = {s.position: names for s, names in zip(self.inputs, flat_names(held), strict=True)}
            self.deviations.append("the sources spell modules in several ways: the output has kohya's names")

    def _check_base(self) -> None:
        """Bind every adapter to the base, where that was read and names modules as they do."""
        base = self.table.inputs.base
        if base is None or self._spelling != "peft":
            return
        for source in self.inputs:
            (adapter,) = source.adapters
            binding = bind(
                self._modules(source), self.table.catalog(adapter), self.table.sources[adapter].label,
                self.table.inputs.catalogs[base], base, source.takes, self.manifest.options.moe_lora_layout,
            )  # fmt: skip
            self._bindings[source.position] = binding
            self.deviations += binding.notes
            self.problems += [p for p in binding.problems if p not in self.problems]
        named: dict[str, set[str]] = {}
        for binding in self._bindings.values():
            for target, bounds in binding.by_target.items():
                named.setdefault(target, set()).update(b.module.module for b in bounds if target.endswith(".weight"))
        for position, binding in self._bindings.items():
            self._spelled[position] = {
                bound.module.module: target.removesuffix(".weight")
                for target, bounds in binding.by_target.items() if len(named[target]) > 1
                for bound in bounds if bound.module.layer not in {"saved", "experts"}
            }  # fmt: skip

    # ------------------------------------------------------------ rows that are tokens

    def _by_token(self, calls: CallBuilder, measured: Statistics) -> list[_Whole]:
        """Embeddings and heads that are merged token by token and written whole; no other module is theirs then.

        Raises PlanError and SourceError."""
        base = self.table.inputs.base
        if base is None or not self._bindings or not self._asks_of_tokens():
            return []
        planner = TokenTensors(self.manifest, self.table, self.inputs, base, self._bindings)
        if tokenizer_wish(self.manifest) is None:
            self._elsewhere = planner.copies()
            self._checks = planner.checks
            return []
        drafts = planner.drafts(calls, measured)
        self.warnings += planner.warnings
        self.deviations += planner.deviations
        if not drafts:
            return []
        self._checks = planner.checks
        self._tokenizer = planner.tokenizer_files()
        self._saved_modules |= planner.saved_modules()
        self._elsewhere = {
            position: {b.module.module for name in planner.targets() for b in binding.of(name)}
            for position, binding in self._bindings.items()
        }
        made = []
        for draft in drafts:
            first, *also = (replace(draft.spec, name=f"{peft.PREFIX}{name}") for name in planner.names_of(draft))
            made.append(_Whole(first, draft.task, draft.call, draft.store, tuple(also), draft.space))
        return made

    def _asks_of_tokens(self) -> bool:
        """Whether rows of tokens are merged by token, or may be copies of the base's."""
        catalogs = [self.table.catalog(source.adapters[0]) for source in self.inputs]
        if tokenizer_wish(self.manifest) is not None:
            return any(changes_tokens(catalog) for catalog in catalogs)
        return self.manifest.output.modules_to_save == "refuse" and any(holds_copies(catalog) for catalog in catalogs)

    # ------------------------------------------------------------ one module

    def _module(
        self, calls: CallBuilder, measured: Statistics, name: str,
        found: Sequence[tuple[MergeInput, AdapterModule | None]], layers: int,
    ) -> _Module:  # fmt: skip
        present = [(source, module) for source, module in found if module is not None]
        for source, module in present:
            self._check_plain(source, module)
        if self._spelling != "peft":
            told = with_kernels(name, [m for _, m in present])
            present = [(s, m) for (s, _), m in zip(present, told, strict=True)]
        first = present[0][1]
        if len({(m.layer, m.kernel) for _, m in present}) > 1:
            table = ", ".join(f"{s.label}: {m.layer}" for s, m in present)
            raise PlanError.of(
                "shape-mismatch", f"the adapters disagree on what kind of layer {name} is", where=table,
                why="they were trained on different models", fix="merge adapters of one base",
            )  # fmt: skip
        base, entries, flipped = self._entries(found)
        shapes = {m.shape for _, m in present if m.shape is not None}
        if len(shapes) > 1:
            table = ", ".join(f"{s.label}: {m.shape[0]} × {m.shape[1]}" for s, m in present if m.shape is not None)
            raise PlanError.of(
                "shape-mismatch", f"the adapters disagree on the shape of {name}", where=table,
                why="they were trained on bases of different sizes", fix="merge adapters of one base",
            )  # fmt: skip
        shape = self._bound(*present[0]).change.shape if base is not None else shapes.pop()
        assert shape is not None
        space: Literal["delta", "factors", "core"]
        kind = self.manifest.combination_type
        if kind is not None:
            call, store, space = self._peft(calls, kind, name, found, layers)
            if space == "factors":
                entries = tuple(e for e in entries if e.terms)
        else:
            call, store, space, entries = self._method(calls, measured, name, found, layers, entries, shape)
        return _Module(name, shape, entries, call, store, space, first, base, flipped)

    def _experts(
        self, calls: CallBuilder, measured: Statistics, name: str,
        found: Sequence[tuple[MergeInput, AdapterModule | None]], layers: int,
    ) -> _Module:  # fmt: skip
        """A packed parameter: each expert's product merged by itself, and all packed at one rank."""
        present = [(source, module) for source, module in found if module is not None]
        held = {n: m for source in self.inputs for n, m in self._modules(source).items()}
        check_packed(self.manifest, calls.spec, name, [m for _, m in present], held)
        base = self.table.inputs.base
        kind = None if base is None else str(self.table.inputs.catalogs[base].config.get("model_type") or "")
        layout = self.manifest.options.moe_lora_layout
        pairs = [None if m is None else products_of(s.label, m, layout, kind) for s, m in found]
        sizes = {s.label: (len(p), expert_shape(m, p)) for (s, m), p in zip(found, pairs, strict=True) if m and p}
        if len(set(sizes.values())) > 1:
            raise PlanError.of(
                "shape-mismatch", f"the adapters disagree on the experts of {name}",
                where="; ".join(f"{label}: {n} of {o} × {i}" for label, (n, (o, i)) in sizes.items()),
                why="they were trained on different models", fix="merge adapters of one base",
            )  # fmt: skip
        experts, shape = next(iter(sizes.values()))
        every = [
            () if p is None else tuple(
                LowRankTerm(s.adapters[0], one.a, one.b, one.scaling, one.rank, None, one.a_view, one.b_view)
                for one in p
            )
            for (s, _), p in zip(found, pairs, strict=True)
        ]  # fmt: skip
        first = tuple(Entry(terms[:1]) for terms in every)
        call, store, space, _ = self._method(calls, measured, name, found, layers, first, shape)
        if call.scope == "model" and rounds_of(call):
            raise PlanError.of(
                "bad-space", f"{calls.spec.name} cannot merge packed experts over the whole model", where="scope",
                why="each expert is a matrix of its own", fix="use scope: tensor, or kind: model",
            )  # fmt: skip
        if call.keys:
            each = [
                calls.call(
                    [Scopes(s.parameters, (self.manifest.parameters,), f"{name}[{e}]", s.position, s.is_adapter)
                     for s, _ in found], f"{name}.weight", _depth(name, layers),
                ).keys
                for e in range(experts)
            ]  # fmt: skip
            call = replace(call, keys=tuple(key for keys in each for key in keys))
        packed = ExpertStore(
            store.kind, store.rank, spectrum=store.spectrum, exact=store.exact, experts=experts
        )  # fmt: skip
        return _Module(name, shape, tuple(Entry(terms) for terms in every), call, packed, space, present[0][1])

    def _check_plain(self, source: MergeInput, module: AdapterModule) -> None:
        """Raise PlanError for what a LoRA pair cannot hold."""
        beside = [
            change for change in module.changes[1:]
            if not change.optional or (self._bindings and self._bindings[source.position].of(change.target))
        ]  # fmt: skip
        if module.layer == "vector":
            raise PlanError.of(
                "not-plain", f"{source.label} changes {module.target} ({module.tuner}, {module.layer}), which a merged "
                "adapter does not hold", where=module.module,
                why="what engines take are pairs of linear layers", fix="fold into a model (kind: model)",
            )  # fmt: skip
        if beside:
            raise PlanError.of(
                "not-plain", f"{source.label} changes {beside[0].target}, which a merged adapter does not hold",
                where=module.module, why="a merged adapter is plain LoRA, and biases are no part of one",
                fix="fold into a model (kind: model)",
            )  # fmt: skip
        if self.manifest.combination_type is not None and (len(module.pairs) != 1 or module.tuner != "lora"):
            raise PlanError.of(
                "not-plain", f"combination_type {self.manifest.combination_type} merges LoRA, and {source.label} is "
                f"{module.tuner}", where=module.module,
                why="PEFT would merge its factors A and B and drop all else",
                fix="use a merge_method, such as task_arithmetic or ties: deltas of all kinds can be merged",
            )  # fmt: skip

    def _bound(self, source: MergeInput, module: AdapterModule) -> Bound:
        """A module as the base has it."""
        for bounds in self._bindings[source.position].by_target.values():
            for bound in bounds:
                if bound.module.module == module.module:
                    return bound
        raise AssertionError(module.module)

    def _entries(
        self, found: Sequence[tuple[MergeInput, AdapterModule | None]]
    ) -> tuple[Operand | None, tuple[Entry, ...], bool]:
        """(the base where one is needed, a delta a source, whether the base's orientation is not PEFT's)."""
        present = [(source, module) for source, module in found if module is not None]
        if not any(module.needs_base for _, module in present):
            own = [() if m is None else terms_of_change((), s.adapters[0], m.changes[0], s.initial) for s, m in found]
            return None, tuple(Entry(terms) for terms in own), False
        base_reference = self.table.inputs.base
        if base_reference is None:
            source, module = next((s, m) for s, m in present if m.needs_base)
            raise PlanError.of(
                "no-base", f"{source.label} is {module.tuner}, which only the base can tell as a delta",
                where="base_model", why=f"{module.tuner} is a function of the base's weights",
                fix="name a base_model that can be read",
            )  # fmt: skip
        bounds = [None if m is None else self._bound(s, m) for s, m in found]
        first = next(bound for bound in bounds if bound is not None)
        base: Operand = (DenseTerm(self.table.index(base_reference), first.change.target),)
        entries = []
        for (source, _), bound in zip(found, bounds, strict=True):
            terms = base if bound is None else terms_of_change(base, source.adapters[0], bound.change, source.initial)
            entries.append(Entry(terms[1:]) if added(terms[1:]) else Entry(terms, subtract_base=True))
        return base, tuple(entries), first.flipped

    def _method(
        self, calls: CallBuilder, measured: Statistics, name: str,
        found: Sequence[tuple[MergeInput, AdapterModule | None]], layers: int, entries: tuple[Entry, ...],
        shape: tuple[int, int],
    ) -> tuple[Call, StoreSpec, Literal["delta", "core"], tuple[Entry, ...]]:  # fmt: skip
        tensor, t = f"{name}.weight", _depth(name, layers)
        scopes = [Scopes(s.parameters, (self.manifest.parameters,), tensor, s.position, s.is_adapter) for s, _ in found]
        call = calls.call(scopes, tensor, t)
        low_rank = all(is_low_rank(entry.terms) and not entry.subtract_base for entry in entries)
        ranks = [term.rank for entry in entries for term in entry.terms if isinstance(term, LowRankTerm)]
        rows, cols = shape
        call = fitted(calls.spec, call, (rows, cols))
        target = next(m.target for _, m in found if m is not None)
        call, entries = measured.attach(call, (rows, cols), [(s, target) for s, _ in found], entries)
        wanted = self.manifest.output.store
        spec = calls.spec
        plain = spec.statistics != "none" and call.combine == "mean"
        linear = spec.linear or plain
        if low_rank and combines(call) and not (wanted is not None and wanted.exact):  # from the factors alone
            call, linear = replace(call, num_rounds=0), True
        linear = linear and low_rank
        kind = wanted.kind if wanted is not None else self._default_store(spec, call, linear=linear)
        own = spec.core is not None and not plain
        if kind == "concat" and not own and low_rank and (not linear or call.calibrate is not None):
            self._problem(
                "bad-store", f"{spec.name} cannot be stored as concat", "output.store",
                "its result is no linear combination of the deltas", "use {svd: {rank: …}}",
            )  # fmt: skip
        space: Literal["delta", "core"] = "core" if own or self.manifest.space == "core" else "delta"
        if own and self.manifest.space not in {None, "core"}:
            self._problem("null-space", f"{spec.name} merges adapters in their exact core only", "space", NULL_SPACE,
                          "leave out space")  # fmt: skip
        if space == "core" and ("core" not in spec.spaces or call.scope == "model"):
            self._problem(
                "bad-space", f"{spec.name} cannot work in the core"
                + (" over the whole model" if call.scope == "model" else ""), "space",
                "each module's core has coordinates of its own", "leave out space, or use ties with scope: tensor",
            )  # fmt: skip
        if not low_rank and (kind == "concat" or space == "core" or call.calibrate is not None):
            odd = next(m.tuner for _, m in found if m is not None and not m.pairs)
            self._problem(
                "not-low-rank", f"{name} is changed by {odd}, whose delta has no factors", "output.store",
                "only products of two factors can be joined, merged in their core or calibrated there",
                "use task_arithmetic or ties with store: {svd: {rank: …}}, or kind: model",
            )  # fmt: skip
        if kind == "concat":
            return call, StoreSpec("concat", rank=min(sum(ranks), rows, cols) if own else sum(ranks)), space, entries
        energy = None if wanted is None else wanted.energy
        exact = wanted is not None and wanted.exact
        if exact and (space == "core" or call.calibrate is not None):
            self._problem("null-space", f"{spec.name} takes no dense way to an svd", "output.store.svd.exact",
                          NULL_SPACE, "leave it out: the core gives the same product")  # fmt: skip
        rank = wanted.rank if wanted is not None and wanted.rank is not None else self._largest_rank()
        if not rank and energy is None:
            self._problem(
                "no-rank", "none of the adapters has a rank to store the merge at", "output.store.svd.rank",
                "their deltas are of full rank", "write store: {svd: {rank: 32}}; the report says what it loses",
            )  # fmt: skip
        rank = min(rank if energy is None else rows, rows, cols)
        if linear or (low_rank and space == "core"):
            rank = min(rank, sum(ranks))
        return call, StoreSpec("svd", rank=rank, energy=energy, exact=exact), space, entries

    def _default_store(self, spec: MethodSpec, call: Call, *, linear: bool) -> str:
        if spec.store != "any":
            return spec.store
        return "concat" if linear and call.calibrate is None else "svd"

    def _largest_rank(self) -> int:
        return max((m.rank for source in self.inputs for m in self._modules(source).values()), default=0)

    # ------------------------------------------------------------ what is saved whole

    def _saved(
        self, calls: CallBuilder, name: str, found: Sequence[tuple[MergeInput, AdapterModule | None]], layers: int
    ) -> _Whole:
        """A tensor that adapters hold whole: one of theirs, or their mean. It is no delta."""
        owners = [(s, s.adapters[0], m) for s, m in found if m is not None]
        wrong = next(
            (m for _, _, m in owners if m.layer != "saved" or not isinstance(m.changes[0].steps[0], Saved)), None
        )
        if wrong is not None or any(m.tuner not in WHOLE_MODULES for _, _, m in owners):
            source, _, module = owners[0]
            raise PlanError.of(
                "not-plain", f"{source.label} changes {module.target} ({module.tuner}), which a merged adapter does "
                "not hold", where=name, why="a merged adapter is plain LoRA and what modules_to_save names",
                fix="fold into a model (kind: model)",
            )  # fmt: skip
        held = chosen_owners(
            self.manifest.output.modules_to_save, name, owners, [s.label for s in self.inputs]
        )  # fmt: skip
        names = [_saved_tensor(module) for _, _, module in held]
        specs = [self.table.catalog(adapter).tensors[n].spec for (_, adapter, _), n in zip(held, names, strict=True)]
        if len({spec.shape for spec in specs}) > 1:
            raise PlanError.of(
                "shape-mismatch", f"the adapters disagree on the shape of {name}",
                where="; ".join(f"{s.label}: {spec.shape}" for (s, _, _), spec in zip(held, specs, strict=True)),
                why="their vocabularies or labels differ", fix="write modules_to_save: {from: NAME}",
            )  # fmt: skip
        if held[0][2].tuner == "modules_to_save":
            self._saved_modules.add(name.rpartition(".")[0])
        if is_token_name(name):
            if len(held) > 1:
                TokenRows(self.table).check_same_tokens(name, [adapter for _, adapter, _ in held])
            self._take_tokenizer(held[0][1])
        operands = [(DenseTerm(adapter, n),) for (_, adapter, _), n in zip(held, names, strict=True)]
        scopes = [Scopes(s.parameters, (self.manifest.parameters,), name, s.position, s.is_adapter) for s, _, _ in held]
        weights = calls.weights(scopes, name, _depth(name, layers)) if len(held) > 1 else (1.0,)
        if abs(sum(weights)) < 1e-8:
            raise PlanError.of(
                "weights-cancel", f"the weights of the sources that hold {name} sum to zero", where="parameters.weight",
                why="their mean divides by that sum", fix="take it {from: NAME}",
            )  # fmt: skip
        call = Call(method="linear", combine="mean", weights=weights, normalize=True)
        labels = ", ".join(s.label for s, _, _ in held)
        self.deviations.append(
            f"{name} is no delta: it is {'the weighted mean of' if len(held) > 1 else 'taken whole from'} {labels}"
        )
        path, _, leaf = name.rpartition(".")
        paired = any(path in self._modules(source) for source in self.inputs)
        named = f"{path}.base_layer.{leaf}" if paired else name  # the layer below a pair, as PEFT has it
        return self._whole(named, specs[0].shape, tuple(Entry(o) for o in operands), None, call)

    def _take_tokenizer(self, adapter: int) -> None:
        """The tokenizer that goes with embeddings or a head that are taken whole."""
        catalog = self.table.catalog(adapter)
        if not self._tokenizer:
            self._tokenizer = [
                OutputFile(name, catalog.sizes[name], "copied", b"", adapter, name) for name in catalog.companions
            ]

    def _whole(
        self, name: str, shape: tuple[int, ...], entries: tuple[Entry, ...], base: Operand | None, call: Call
    ) -> _Whole:
        spec = TensorSpec(f"{peft.PREFIX}{name}", self._dtype(), shape)
        tile = tile_rows(spec.cols, products=False)
        task = Task(
            name=name, rows=spec.rows, cols=spec.cols, base=base, entries=entries, results=(), tile_rows=tile,
            extent_rows=extent_rows(tile, max(1, spec.cols * spec.dtype.itemsize)), vector=base is not None,
            fused=bool(rounds_of(call)) and call.scope == "tensor",
        )  # fmt: skip
        return _Whole(spec, task, call, StoreSpec("dense"))

    # ------------------------------------------------------------ IA3 with IA3

    def _is_ia3(self) -> bool:
        """Whether factors are merged with factors; asked for a store of pairs, they are deltas as other tuners' are."""
        return self.manifest.output.store is None and all(
            self.table.catalog(s.adapters[0]).config.get("peft_type") == "IA3" for s in self.inputs
        )

    def _ia3(
        self, calls: CallBuilder, name: str, found: Sequence[tuple[MergeInput, AdapterModule | None]], layers: int
    ) -> _Whole:
        """Factors of IA3: merged as what they change from 1; by combination_type as PEFT does, which adds them up."""
        present = [(s, m) for s, m in found if m is not None]
        if any(m.layer == "saved" for _, m in present):
            return self._saved(calls, name, found, layers)
        steps = {s.label: _formula(m) for s, m in present}
        if len({(step.numbers) for step in steps.values()}) > 1:
            raise PlanError.of(
                "shape-mismatch", f"the adapters disagree on what {name} scales", where=", ".join(steps),
                why="one scales its inputs and another its outputs, or their sizes differ",
                fix="merge IA3 adapters with the same feedforward_modules, or fold them into a model",
            )  # fmt: skip
        kind = self.manifest.combination_type
        tensor, t = f"{name}.weight", _depth(name, layers)
        scopes = [Scopes(s.parameters, (self.manifest.parameters,), tensor, s.position, s.is_adapter) for s, _ in found]
        stored = [None if m is None else dict(_formula(m).tensors)["l"] for _, m in found]
        specs = [
            self.table.catalog(s.adapters[0]).tensors[n].spec for (s, _), n in zip(found, stored, strict=True) if n
        ]
        operands = [
            () if n is None else (DenseTerm(s.adapters[0], n),) for (s, _), n in zip(found, stored, strict=True)
        ]
        shape = specs[0].shape
        if kind is not None:
            if kind != "linear":
                raise PlanError.of(
                    "bad-combination", f"PEFT merges IA3 as linear only, not {kind}", where="combination_type",
                    fix="write combination_type: linear, or a merge_method",
                )  # fmt: skip
            call = calls.peft_call(kind, [s.position for s, _ in found], [(n or "", "") for n in stored], tensor, t)
            return self._whole(f"{name}.ia3_l", shape, tuple(Entry(o) for o in operands), None, call)
        call = fitted(calls.spec, calls.call(scopes, tensor, t), shape)
        if calls.spec.core is not None or calls.spec.whole is not None or call.calibrate is not None:
            raise PlanError.of(
                "bad-space", f"{calls.spec.name} merges matrices, and the factors of IA3 are vectors",
                where="merge_method", fix="use linear, task_arithmetic or ties",
            )  # fmt: skip
        spec = TensorSpec("", F32, shape)
        ones: Operand = (
            FormulaTerm(self.inputs[0].adapters[0], "ones", (), (), adds=True, whole=False, rows=spec.rows),
        )
        entries = tuple(Entry(o, subtract_base=True) if o else Entry(()) for o in operands)
        return self._whole(f"{name}.ia3_l", shape, entries, ones, call)

    # ------------------------------------------------------------ PEFT's combination types

    def _peft(
        self, calls: CallBuilder, kind: str, name: str, found: Sequence[tuple[MergeInput, AdapterModule | None]],
        layers: int,
    ) -> tuple[Call, StoreSpec, Literal["delta", "factors"]]:  # fmt: skip
        manifest = self.manifest
        tensor, t = f"{name}.weight", _depth(name, layers)
        if len(self.inputs) == 1:
            kind = "linear"  # PEFT does the same, whatever the type asked for
        if kind == "cat" or kind.endswith("svd"):
            positions = [s.position for s, _ in found]
            factor_names = [("", "") if m is None else _factors(m) for _, m in found]
            call = calls.peft_call(kind.removesuffix("_svd"), positions, factor_names, tensor, t)
            if kind == "cat":
                return call, StoreSpec("concat", rank=sum(self._peft_ranks())), "delta"
            rank = manifest.svd_rank or max(self._peft_ranks())
            return call, StoreSpec("svd", rank=rank, spectrum="peft", clamp=manifest.svd_clamp), "delta"
        present = [(s, m) for s, m in found if m is not None]
        ranks = {m.rank for _, m in present}
        if len(ranks) > 1:
            table = ", ".join(f"{s.label}: {m.rank}" for s, m in present)
            self._problem(
                "rank-mismatch", f"the adapters' ranks differ at {name}", table,
                f"combination_type {kind} adds A to A and B to B, so the ranks must agree",
                "use cat, svd or a type that ends in _svd, or merge_method with true deltas",
            )  # fmt: skip
        call = calls.peft_call(kind, [s.position for s, _ in present], [_factors(m) for _, m in present], tensor, t)
        return call, StoreSpec("factors", rank=present[0][1].rank), "factors"

    def _peft_ranks(self) -> list[int]:
        """Rank of each adapter as PEFT reckons it: the largest that its config names, whatever its modules have."""
        found = []
        for source in self.inputs:
            config = self.table.catalog(source.adapters[0]).config
            patterns = config.get("rank_pattern") or {}
            named = [config.get("r", peft.DEFAULT_RANK), *patterns.values()]
            found.append(max((rank for rank in named if isinstance(rank, int)), default=peft.DEFAULT_RANK))
        return found

    # ------------------------------------------------------------ the files

    def _lay_out(
        self, output: int, path: str, modules: Sequence[_Module], wholes: Sequence[_Whole]
    ) -> tuple[Output, list[Task]]:
        dtype = self._dtype()
        packed = [m.name for m in modules if isinstance(m.store, ExpertStore)]
        named = {
            m.name: packed_specs(wrapper_of(m.name, packed) or m.name, m.shape, m.store, dtype)
            if isinstance(m.store, ExpertStore)
            else factor_specs(m.name, m.layer, m.shape if not m.flipped else m.shape[::-1], m.store.rank, dtype)
            for m in modules
        }
        alphas: dict[str, TensorSpec] = {}
        if self._spelling != "peft":
            for m in modules:
                a, b = named[m.name]
                name_a, name_b, alpha = bare_lora.output_names(self._spelling, m.name)
                named[m.name] = (replace(a, name=name_a), replace(b, name=name_b))
                if alpha:
                    alphas[m.name] = TensorSpec(alpha, F32, ())
        specs = [spec for pair in named.values() for spec in pair]
        specs += [spec for w in wholes for spec in (w.spec, *w.also)] + [*alphas.values()]
        layout = lay_out(output, {WEIGHTS_FILE if self._spelling == "peft" else bare_lora.WEIGHTS: specs})
        nowhere = (Place(output, WEIGHTS_FILE, 0, 0, "left"),)
        tasks = [replace(t.task, results=(Result(t.call, t.store, nowhere),)) for t in self._checks]
        for m in modules:
            rows, cols = m.shape
            a, b = named[m.name]
            parts = ("B.T", "A.T") if m.flipped else ("A", "B")
            places: tuple[Place, ...] = (layout.place(a.name, parts[0]), layout.place(b.name, parts[1]))
            if m.name in alphas:
                places = (*places, layout.place(alphas[m.name].name, "alpha"))
            tile = tile_rows(cols, products=True)
            model_wide = m.call.scope == "model" and bool(rounds_of(m.call))
            tasks.append(
                Task(
                    name=m.name, rows=rows, cols=cols, base=m.base, entries=m.entries,
                    results=(Result(m.call, m.store, places, m.space),), cut="whole", tile_rows=tile,
                    extent_rows=extent_rows(tile, 4 * cols), fused=not model_wide,
                )
            )  # fmt: skip
        for w in wholes:
            places = tuple(layout.place(spec.name) for spec in (w.spec, *w.also))
            tasks.append(replace(w.task, results=(Result(w.call, w.store, places, w.space),)))
        config = (self._config(modules, wholes),) if self._spelling == "peft" else ()
        return Output(path, "adapter", (*layout.files, *config, *self._tokenizer)), tasks

    def _dtype(self) -> DType:
        named = self.manifest.out_dtype or self.manifest.dtype
        if named is not None and (dtype := dtype_from_torch_name(named)) is not None:
            return dtype
        if self.manifest.combination_type is not None:
            return F32  # PEFT loads adapters in float32 and merges there
        stored = (
            self.table.catalog(s.adapters[0]).tensors[name].spec.dtype
            for s in self.inputs
            for m in self._modules(s).values()
            for change in m.changes
            for step in change.steps
            for name in sorted(stored_tensors(step))
        )
        return promote(stored) or F32

    def _base_modules(self) -> list[str]:
        """Module paths of the base where it was read, else of the adapters."""
        base = self.table.inputs.base
        if base is not None:
            names = self.table.inputs.catalogs[base].tensors
            return sorted({name.rpartition(".")[0] for name in names})
        return sorted({name for source in self.inputs for name in self._modules(source)})

    def _config(self, modules: Sequence[_Module], wholes: Sequence[_Whole]) -> OutputFile:
        configs = [self.table.catalog(s.adapters[0]).config for s in self.inputs]
        tasks = {c.get("task_type") for c in configs}
        task_type = tasks.pop() if len(tasks) == 1 else None
        transposes = any(c.get("fan_in_fan_out") for c in configs) or self._base_is_conv1d(modules)
        if self._is_ia3():
            inputs = {
                w.task.name.removesuffix(".ia3_l"): w.spec.shape[:1] == (1,) for w in wholes if ".ia3_l" in w.task.name
            }
            data = peft.build_ia3_config(
                inputs, base_model_name_or_path=self.base_name, task_type=task_type,
                modules_to_save=sorted(self._saved_modules), fan_in_fan_out=transposes,
            )  # fmt: skip
            return literal("adapter_config.json", data)
        packed = [m.name for m in modules if isinstance(m.store, ExpertStore)]
        data = peft.build_adapter_config(
            {m.name: m.store.rank for m in modules},
            base_model_name_or_path=self.base_name,
            task_type=task_type,
            modules_to_save=sorted(self._saved_modules),
            base_modules=self._base_modules(),
            fan_in_fan_out=transposes,
            parameters=packed,
        )
        if packed:
            data = peft.with_settings(data, {"peft_version": PACKED_SINCE})
        return literal("adapter_config.json", data)

    def _base_is_conv1d(self, modules: Sequence[_Module]) -> bool:
        """Whether the base was read and stores these layers transposed."""
        base = self.table.inputs.base
        kind = None if base is None else self.table.inputs.catalogs[base].config.get("model_type")
        return kind in CONV1D_MODELS and any(m.name.rpartition(".")[2] in CONV1D_LAYERS for m in modules)


def factor_specs(
    name: str, layer: AdapterModule, shape: tuple[int, int], rank: int, dtype: DType
) -> tuple[TensorSpec, TensorSpec]:
    """A and B of a merged module as PEFT stores them. `shape` is (out, in), an embedding's (dim, vocabulary)."""
    rows, cols = shape
    if layer.layer == "embedding":
        names = ("lora_embedding_A", "lora_embedding_B")
        shapes: tuple[tuple[int, ...], tuple[int, ...]] = ((rank, cols), (rows, rank))
    else:
        names = ("lora_A", "lora_B")
        size = 1
        for n in layer.kernel:
            size *= n
        shapes = ((rank, cols // size, *layer.kernel), (rows, rank, *(1 for _ in layer.kernel)))
    a, b = (TensorSpec(peft.output_key(name, n), dtype, s) for n, s in zip(names, shapes, strict=True))
    return a, b


def _factors(module: AdapterModule) -> tuple[str, str]:
    pair = module.pairs[0]
    return pair.a, pair.b


def _saved_tensor(module: AdapterModule) -> str:
    step = module.changes[0].steps[0]
    assert isinstance(step, Saved)
    return step.tensor


def _formula(module: AdapterModule) -> Formula:
    step = module.changes[0].steps[0]
    assert isinstance(step, Formula)
    return step


def _depth(name: str, layers: int) -> float:
    """The t of gradients for a module."""
    layer = layer_of(name)
    return 0.0 if layer is None else layer_position(layer[1], layers)
