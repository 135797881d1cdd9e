"""Adapters merged into an adapter: one task a module, its result a LoRA pair."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Final, Literal

from merger.catalog import LoraModule
from merger.errors import Problem, RefusedError
from merger.formats import peft
from merger.manifest import Manifest, layer_position
from merger.methods import MethodSpec
from merger.methods.combination import combines
from merger.methods.rounds import Call, rounds_of
from merger.planning.calls import CallBuilder, Scopes, fitted, layer_of, natural_key
from merger.planning.inputs import MergeInput, SourceTable
from merger.planning.layout import lay_out, literal, promote
from merger.planning.memory import extent_rows, tile_rows
from merger.planning.nouns import Entry, LowRankTerm, Output, OutputFile, Place, Result, StoreSpec, Task
from merger.planning.statistics import Statistics
from merger.tensors import F32, DType, TensorSpec, dtype_from_torch_name

WEIGHTS_FILE = "adapter_model.safetensors"
NULL_SPACE: Final = (
    "a dense product of low rank has null directions, whose singular vectors are arbitrary: whitening or equalising "
    "them gives results that float32 and float64 do not agree on"
)


@dataclass(slots=True)
class _Module:
    """One module's share of the plan before places are known."""

    name: str
    shape: tuple[int, int]
    entries: tuple[Entry, ...]
    call: Call
    store: StoreSpec
    space: Literal["delta", "factors", "core"]


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

    def plan(self, output: int, path: str) -> tuple[Output, list[Task]]:
        calls = CallBuilder(self.manifest)
        names = sorted({m for i in self.inputs for m in self._modules(i)}, key=natural_key)
        if not names:
            self._problem("no-modules", "the adapters hold no module to merge", fix="check include and exclude")
        most = calls.spec.max_sources if self.manifest.combination_type is None else None
        if most is not None and len(self.inputs) != most:
            self._problem(
                "number-of-sources", f"{calls.spec.name} merges {most} adapter(s), not {len(self.inputs)}", "adapters",
            )  # fmt: skip
        layers = 1 + max((found[1] for name in names if (found := layer_of(name))), default=0)
        modules = []
        measured = Statistics(calls.spec, self.table)
        for name in names:
            try:
                modules.append(self._module(calls, measured, name, layers))
            except RefusedError as error:
                self.problems += error.problems
        if not self.problems and self.manifest.combination_type is None:
            base = self.table.inputs.base
            known = None if base is None else frozenset(self.table.inputs.catalogs[base].tensors)
            self.problems += measured.problems([(source, known) for source in self.inputs])
            self.warnings += measured.warnings()
        if self.problems:
            return Output(path, "adapter", ()), []
        return self._lay_out(output, path, modules)

    def _modules(self, source: MergeInput) -> dict[str, LoraModule]:
        (adapter,) = source.adapters
        return {n: m for n, m in self.table.catalog(adapter).modules.items() if source.takes(n)}

    def _problem(self, code: str, what: str, where: str = "", why: str = "", fix: str = "") -> None:
        self.problems.append(Problem(code, what, where, why, fix))

    # ------------------------------------------------------------ one module

    def _module(self, calls: CallBuilder, measured: Statistics, name: str, layers: int) -> _Module:
        found = [(source, self._modules(source).get(name)) for source in self.inputs]
        present = [(source, module) for source, module in found if module is not None]
        shapes = {(m.rows, m.cols) for _, m in present}
        if len(shapes) > 1:
            table = ", ".join(f"{s.label}: {m.rows} × {m.cols}" for s, m in present)
            self._problem(
                "shape-mismatch", f"the adapters disagree on the shape of {name}", table,
                "they were trained on bases of different sizes", "merge adapters of one base",
            )  # fmt: skip
        self._check_base(present[0][1])
        space: Literal["delta", "factors", "core"]
        entries = tuple(
            Entry(() if m is None else (LowRankTerm(s.adapters[0], m.a, m.b, m.scaling),)) for s, m in found
        )  # fmt: skip
        kind = self.manifest.combination_type
        if kind is not None:
            call, store, space = self._peft(calls, kind, name, found, layers)
            if space == "factors":
                entries = tuple(e for e in entries if e.terms)
        else:
            call, store, space, entries = self._method(calls, measured, name, found, layers, entries)
        return _Module(name, (present[0][1].rows, present[0][1].cols), entries, call, store, space)

    def _check_base(self, module: LoraModule) -> None:
        base = self.table.inputs.base
        if base is None:
            return
        stored = self.table.inputs.catalogs[base].tensors.get(module.target)
        if stored is None:
            self._problem(
                "no-such-tensor", f"the base has no tensor {module.target}, which an adapter changes", base,
                "the adapter was trained on another model, or with other names", "name the base it was trained on",
            )  # fmt: skip
        elif stored.spec.shape != (module.rows, module.cols):
            self._problem(
                "shape-mismatch",
                f"the adapters change {module.target} as {module.rows} × {module.cols}, "
                f"the base has {' × '.join(map(str, stored.spec.shape))}",
                base, "the adapter was trained on another model", "name the base it was trained on",
            )  # fmt: skip

    def _method(
        self, calls: CallBuilder, measured: Statistics, name: str,
        found: Sequence[tuple[MergeInput, LoraModule | None]], layers: int, entries: tuple[Entry, ...],
    ) -> tuple[Call, StoreSpec, Literal["delta", "core"], tuple[Entry, ...]]:  # fmt: skip
        tensor, t = f"{name}.weight", _depth(name, layers)
        scopes = [Scopes(s.parameters, (self.manifest.parameters,), tensor, s.position, s.is_adapter) for s, _ in found]
        call = calls.call(scopes, tensor, t)
        ranks = [m.rank for _, m in found if m is not None]
        rows, cols = next((m.rows, m.cols) for _, m in found if m is not None)
        call = fitted(calls.spec, call, (rows, cols))
        target = next(m.target for _, m in found if m is not None)
        call, entries = measured.attach(call, (rows, cols), [(s, target) for s, _ in found], entries)
        wanted = self.manifest.output.store
        spec = calls.spec
        plain = spec.statistics != "none" and call.combine == "mean"
        linear = spec.linear or plain
        if combines(call) and not (wanted is not None and wanted.exact):  # from the factors alone
            call, linear = replace(call, num_rounds=0), True
        kind = wanted.kind if wanted is not None else self._default_store(spec, call, linear=linear)
        own = spec.core is not None and not plain
        if kind == "concat" and not own and (not linear or call.calibrate is not None):
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
        if kind == "concat":
            return call, StoreSpec("concat", rank=min(sum(ranks), rows, cols) if own else sum(ranks)), space, entries
        energy = None if wanted is None else wanted.energy
        exact = wanted is not None and wanted.exact
        if exact and (space == "core" or call.calibrate is not None):
            self._problem("null-space", f"{spec.name} takes no dense way to an svd", "output.store.svd.exact",
                          NULL_SPACE, "leave it out: the core gives the same product")  # fmt: skip
        rank = wanted.rank if wanted is not None and wanted.rank is not None else self._largest_rank()
        rank = min(rank if energy is None else rows, rows, cols)
        if linear or space == "core":
            rank = min(rank, sum(ranks))
        return call, StoreSpec("svd", rank=rank, energy=energy, exact=exact), space, entries

    def _default_store(self, spec: MethodSpec, call: Call, *, linear: bool) -> str:
        if spec.store != "any":
            return spec.store
        return "concat" if linear and call.calibrate is None else "svd"

    def _largest_rank(self) -> int:
        return max((m.rank for source in self.inputs for m in self._modules(source).values()), default=1)

    # ------------------------------------------------------------ PEFT's combination types

    def _peft(
        self, calls: CallBuilder, kind: str, name: str, found: Sequence[tuple[MergeInput, LoraModule | None]],
        layers: int,
    ) -> tuple[Call, StoreSpec, Literal["delta", "factors"]]:  # fmt: skip
        manifest = self.manifest
        tensor, t = f"{name}.weight", _depth(name, layers)
        if len(self.inputs) == 1:
            kind = "linear"  # PEFT does the same, whatever the type asked for
        if kind == "cat" or kind.endswith("svd"):
            positions = [s.position for s, _ in found]
            factor_names = [("", "") if m is None else (m.a, m.b) for _, m in found]
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
        call = calls.peft_call(kind, [s.position for s, _ in present], [(m.a, m.b) for _, m in present], tensor, t)
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

    def _lay_out(self, output: int, path: str, modules: Sequence[_Module]) -> tuple[Output, list[Task]]:
        dtype = self._dtype()
        specs = []
        for m in modules:
            specs.append(TensorSpec(peft.output_key(m.name, "lora_A"), dtype, (m.store.rank, m.shape[1])))
            specs.append(TensorSpec(peft.output_key(m.name, "lora_B"), dtype, (m.shape[0], m.store.rank)))
        layout = lay_out(output, {WEIGHTS_FILE: specs})
        tasks = []
        for m in modules:
            rows, cols = m.shape
            places: tuple[Place, ...] = (
                layout.place(peft.output_key(m.name, "lora_A"), "A"),
                layout.place(peft.output_key(m.name, "lora_B"), "B"),
            )
            tile = tile_rows(cols, products=True)
            model_wide = m.call.scope == "model" and bool(rounds_of(m.call))
            tasks.append(
                Task(
                    name=m.name, rows=rows, cols=cols, base=None, entries=m.entries,
                    results=(Result(m.call, m.store, places, m.space),), cut="whole", tile_rows=tile,
                    extent_rows=extent_rows(tile, 4 * cols), fused=not model_wide,
                )
            )  # fmt: skip
        return Output(path, "adapter", (*layout.files, self._config(modules))), tasks

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
            for name in (m.a, m.b)
        )
        return promote(stored) or F32

    def _base_modules(self) -> list[str]:
        """Module paths of the base where it was read, else of the adapters."""
        base = self.table.inputs.base
        if base is not None:
            names = self.table.inputs.catalogs[base].tensors
            return sorted({name.rpartition(".")[0] for name in names})
        return sorted({name for source in self.inputs for name in self._modules(source)})

    def _config(self, modules: Sequence[_Module]) -> OutputFile:
        configs = [self.table.catalog(s.adapters[0]).config for s in self.inputs]
        tasks = {c.get("task_type") for c in configs}
        data = peft.build_adapter_config(
            {m.name: m.store.rank for m in modules},
            base_model_name_or_path=self.base_name,
            task_type=tasks.pop() if len(tasks) == 1 else None,
            base_modules=self._base_modules(),
        )
        return literal("adapter_config.json", data)


def _depth(name: str, layers: int) -> float:
    """The t of gradients for a module."""
    layer = layer_of(name)
    return 0.0 if layer is None else layer_position(layer[1], layers)
