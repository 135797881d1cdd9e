"""Everything decided before tensor data moves, as plain frozen values. No torch, no IO.

    MergePlan ─ sources (pinned inputs), outputs (files with sizes and headers), tasks
    Task      ─ one computation over one tensor: operands, and one or more results
    Unit      ─ rows of a task in one stage: what one worker does in one go

A unit is named by (stage, task, first row, last row); its bytes depend on nothing else but the plan and the findings of
earlier stages. Memory and workers are not part of a plan.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cache, cached_property
from typing import Any, Final, Literal

from merger.adapters.declare import WHOLE, Number, View
from merger.catalog import Catalog, StoredTensor
from merger.errors import Problem
from merger.methods.plugin import Plugin
from merger.methods.rounds import Call, RoundName, round_order, rounds_of
from merger.quantization.declare import Grid
from merger.tensors import DType, RowRun

PLAN_VERSION = 3


@dataclass(frozen=True, slots=True)
class DenseTerm:
    """A tensor as it is stored. Without `runs`, row i is row i; with them, rows they do not name are zero."""

    source: int
    tensor: str
    runs: tuple[RowRun, ...] | None = None
    share: float = 1.0
    """What the rows are multiplied with."""
    grid: Grid | None = None
    """Round it through this grid before it is used; without `runs`."""


@dataclass(frozen=True, slots=True)
class LowRankTerm:
    """scaling · B·diag(D)·A, with A (rank, columns) and B (rows, rank) as their views take them."""

    source: int
    a: str
    b: str
    scaling: float
    rank: int
    round_to: DType | None = None
    """Round the product to this dtype before it is used (PEFT's safe merge); None: never."""
    a_view: View = WHOLE
    b_view: View = WHOLE
    diagonal: str = ""

    @property
    def tensors(self) -> tuple[str, ...]:
        return (self.a, self.b, self.diagonal) if self.diagonal else (self.a, self.b)


@dataclass(frozen=True, slots=True)
class MovedProduct(LowRankTerm):
    """A product whose rows stand elsewhere in a matrix of `height` rows; rows that no run names are zero."""

    runs: tuple[RowRun, ...] = ()
    height: int = 0


@dataclass(frozen=True, slots=True)
class FormulaTerm:
    """A function of what the terms before it gave, or what it adds to that (merger/adapters/formulas.py)."""

    source: int
    kind: str
    roles: tuple[tuple[str, str], ...]
    """(role, stored tensor)."""
    numbers: tuple[tuple[str, Number], ...]
    adds: bool
    whole: bool
    """Whether it needs all rows at once; then one unit does them all."""
    rows: int
    """Rows of the tensor."""

    @property
    def tensors(self) -> tuple[str, ...]:
        return tuple(name for _, name in self.roles)


Term = DenseTerm | LowRankTerm | FormulaTerm
Operand = tuple[Term, ...]
"""Terms act left to right, in float32: dense and low-rank ones are added. The empty operand is zero."""


def is_low_rank(operand: Operand) -> bool:
    """Whether an operand is a sum of low-rank products, as the empty one is."""
    return all(isinstance(term, LowRankTerm) for term in operand)


@dataclass(frozen=True, slots=True)
class Entry:
    """One source of a task."""

    terms: Operand
    subtract_base: bool = False
    """Whether the task's base is taken away, to make a delta of a weight."""
    statistic: DenseTerm | None = None
    """What the source's statistics hold of this tensor, for methods that need them."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where the rows of a result go: row r is bytes [start + r·row_bytes, …) of a file of an output."""

    output: int
    file: str
    start: int
    row_bytes: int
    part: str = "dense"
    """Which array of the result: `dense`, `A`, `B`, or a name of the store's own, such as `absmax`."""
    dtype: DType | None = None
    rows: int = 0
    """Rows of this place; those of the task for parts cut like it."""
    tensor: str = ""
    """Name of the tensor in the output."""
    covers: int = 1
    """Rows of the result that one row of this place is for, such as those of a block of scales; 0: all of them, so that
    it goes with the first row."""

    def span(self, first: int, last: int) -> tuple[int, int]:
        if self.covers == 1:
            return self.start + first * self.row_bytes, self.start + last * self.row_bytes
        if self.covers == 0:
            return self.start, self.start + (self.rows * self.row_bytes if first == 0 else 0)
        begin, end = first // self.covers, min(self.rows, -(-last // self.covers))
        return self.start + begin * self.row_bytes, self.start + end * self.row_bytes


@dataclass(frozen=True, slots=True)
class StoreSpec:
    """How a result is put into the output."""

    kind: Literal["dense", "copy", "concat", "svd", "factors", "coded", "equal", "left", "same"]
    """`dense`: rounded once; `copy`: bytes untouched; `concat`, `svd`: a LoRA pair; `factors`: A with A, B with B;
    `coded`: codes and scales, as `recode` says; `equal`, `left`, `same`: nothing, of what the output does not hold:
    sources that differ from the base end the merge, or are told in the report; `same` of what was taken for a copy."""
    rank: int = 0
    """Rank of the pair, for concat, svd and factors."""
    rounding: Literal["once", "peft_safe"] = "once"
    spectrum: Literal["split", "peft"] = "split"
    """svd: `split` is B = U√S, A = √S·Vᵀ with fixed signs; `peft` is B = U·S, A = Vᵀ."""
    clamp: float | None = None
    """PEFT's svd_clamp quantile."""
    energy: float | None = None
    """svd: the share of the squared singular values that decides the rank; `rank` is a bound until the plan is
    settled."""
    measure: bool = False
    """Whether the unit only finds the rank that `energy` asks for."""
    exact: bool = False
    """svd: from the dense delta, also where the core of the factors gives the same."""
    recode: tuple[tuple[str, int | float | str], ...] = ()
    """Parameters of a quantisation scheme (merger/quantization/recode.py)."""
    factor: DenseTerm | None = None
    """The factor of the whole tensor that is written where the scales reach with it; None: its own."""

    @property
    def writes(self) -> bool:
        """Whether it puts anything into the output."""
        return self.kind not in {"equal", "left", "same"}

    @property
    def in_rows(self) -> bool:
        """Whether the rows of the result themselves are stored, dense or as codes."""
        return self.kind in {"dense", "coded"}

    @property
    def looks_first(self) -> bool:
        """Whether codes need to know of the whole tensor first: its largest magnitude, or those of all its blocks."""
        known = dict(self.recode)
        return self.kind == "coded" and (
            known.get("grid") == 0 or known.get("whole") == 1 or bool(known.get("nested_block"))
        )


@dataclass(frozen=True, slots=True)
class ExpertStore(StoreSpec):
    """A pair for each expert of a packed parameter, as PEFT packs them: A expert by expert, B rank by rank.

    Sources have one term an expert, and calls the keys of one expert after another."""

    experts: int = 1


@dataclass(frozen=True, slots=True)
class Result:
    """One outcome of a task."""

    call: Call
    store: StoreSpec
    places: tuple[Place, ...]
    space: Literal["weight", "delta", "factors", "core"] = "delta"


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One computation over one tensor (rows, cols)."""

    name: str
    rows: int
    cols: int
    base: Operand | None
    entries: tuple[Entry, ...]
    results: tuple[Result, ...]
    cut: Literal["rows", "whole"] = "rows"
    tile_rows: int = 0
    """Arithmetic order is defined inside tiles of this many rows, counted from row 0 (see `tile_bounds`)."""
    extent_rows: int = 0
    """Rows of one extent: tiles up to 16 MiB."""
    fused: bool = True
    """Whether one unit does the whole tensor, its own statistics included."""
    vector: bool = False
    """Whether the tensor has one dimension: for methods that look at rows it is one row."""

    @property
    def statistics(self) -> tuple[DenseTerm, ...]:
        """One a source, or none at all."""
        return tuple(entry.statistic for entry in self.entries if entry.statistic is not None)

    @property
    def low_rank(self) -> bool:
        """Whether every source's delta is a sum of low-rank products."""
        return all(is_low_rank(entry.terms) and not entry.subtract_base for entry in self.entries)

    @property
    def length(self) -> int:
        """Elements of a row, as methods see it."""
        return self.rows * self.cols if self.vector else self.cols

    @property
    def rounds(self) -> tuple[RoundName, ...]:
        """The rounds of statistics that this task's results need, in order. What is merged in the core counts there."""
        needed = {name for result in self.results if result.space != "core" for name in rounds_of(result.call)}
        return tuple(sorted(needed, key=round_order))

    def row_spans(self) -> Iterator[tuple[int, int]]:
        """The extents' row spans, in order."""
        if self.cut == "whole" or self.rows == 0:
            yield 0, self.rows
            return
        yield from _spans(self.rows, self.extent_rows, self.tile_rows)

    def extents(self) -> Iterator[tuple[int, int]]:
        """The same for a dense result, also where one unit makes it whole: spans of up to 16 MiB."""
        if self.rows == 0:
            yield 0, 0
            return
        yield from _spans(self.rows, self.extent_rows, self.tile_rows)

    def tiles(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """The tiles inside rows [first, last), which start and end at tile bounds."""
        for start, stop in _spans(self.rows, self.tile_rows, self.tile_rows, first):
            if start >= last:
                return
            yield start, stop


def expert_of(task: Task, number: int) -> Task:
    """The task of one expert of a packed parameter."""
    entries = tuple(replace(entry, terms=entry.terms[number : number + 1]) for entry in task.entries)
    count = len(entries)
    results = tuple(
        replace(
            result, call=replace(result.call, keys=result.call.keys[number * count : (number + 1) * count]),
            store=StoreSpec(result.store.kind, result.store.rank, spectrum=result.store.spectrum,
                            exact=result.store.exact),
        )
        for result in task.results
    )  # fmt: skip
    return replace(task, name=f"{task.name}[{number}]", entries=entries, results=results)


SHORT_TAIL = 16
"""A last tile of fewer rows joins the one before it: BLAS orders products of a few rows differently."""


def _spans(rows: int, step: int, tile: int, start: int = 0) -> Iterator[tuple[int, int]]:
    """[start, rows) in steps, with a short tail joined to the last span. `step` is a multiple of `tile`."""
    while start < rows:
        stop = start + step
        if stop >= rows or (tile > 1 and rows - stop < SHORT_TAIL):
            stop = rows
        yield start, stop
        start = stop


@dataclass(frozen=True, slots=True)
class Unit:
    """Rows [first, last) of a task in one stage: a round of statistics, or (round None) the map that writes."""

    index: int
    stage: int
    task: int
    first: int
    last: int
    round: RoundName | None


@dataclass(frozen=True, slots=True)
class OutputFile:
    """One file of an output."""

    name: str
    size: int
    """Bytes."""
    kind: Literal["tensors", "literal", "copied"]
    prefix: bytes = b""
    """The header of a tensor file; the whole of a literal one."""
    source: int = -1
    source_name: str = ""


@dataclass(frozen=True, slots=True)
class Output:
    """One merged adapter, model, or file of tensors."""

    path: str
    kind: Literal["adapter", "model", "tensors"]
    files: tuple[OutputFile, ...]


@dataclass(frozen=True, slots=True)
class Source:
    """A pinned input as the plan knows it."""

    label: str
    catalog: Catalog
    key: str = ""
    """The reference as the manifest says it."""

    def stored(self, tensor: str) -> StoredTensor:
        return self.catalog.stored(tensor)


@dataclass(frozen=True, slots=True)
class Prompts:
    """Token ids of the prompts that one gate is made from."""

    positive: tuple[tuple[int, ...], ...]
    negative: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class GateRecipe:
    """Router gates that are computed before a run: each gate one direction, of length 1, a layer."""

    mode: Literal["hidden", "hidden_avg", "hidden_last", "cheap_embed"]
    base: int
    """Source index of the model whose hidden states or embeddings are looked at."""
    base_adapters: tuple[int, ...]
    embedding: str
    """Its embedding tensor."""
    source: int
    """Source index of the gates."""
    gates: tuple[tuple[str, str], ...]
    """(tensor of the experts' gates, tensor of the shared experts' gates or empty), a layer."""
    experts: tuple[Prompts, ...]
    shared: tuple[Prompts, ...] = ()


@dataclass(frozen=True, kw_only=True)
class MergePlan:
    """What will be read, computed and written, and what stands against it."""

    # No slots: the digest and the units of a large plan are worth keeping once made.

    sources: tuple[Source, ...]
    outputs: tuple[Output, ...]
    tasks: tuple[Task, ...]
    seed: int = 0
    device: Literal["cpu", "cuda"] = "cpu"
    manifest: dict[str, Any] = field(default_factory=dict)
    problems: tuple[Problem, ...] = ()
    warnings: tuple[Problem, ...] = ()
    deviations: tuple[str, ...] = ()
    """Where this merge differs, on purpose, from what PEFT or mergekit would have done."""
    plugins: tuple[Plugin, ...] = ()
    """Those that its methods come from."""
    settled_from: str = ""
    """Digest of the plan that this one was settled from, where ranks follow from the data (planning/settle.py)."""

    @property
    def unsettled(self) -> bool:
        """Whether ranks are still to be found."""
        return not self.settled_from and any(r.store.energy is not None for task in self.tasks for r in task.results)

    @property
    def takes_steps(self) -> bool:
        """Whether something has to be found or made before its units can run: ranks, gates, other documents."""
        return self.unsettled or self.gates is not None or bool(self.before)

    @property
    def identity(self) -> str:
        """The digest by which the merge is known: that of the plan as it follows from manifest and inputs."""
        return self.settled_from or self.digest

    gates: GateRecipe | None = None
    """What has to be computed before the run. Its digest is the pin of the gates' source."""
    before: tuple[tuple[str, MergePlan], ...] = ()
    """The other documents of the file with their plans, in the order in which they are merged: what sources name as
    `merge://NAME`. Their digests are in the pins of these sources. One without a path is not kept."""

    @cached_property
    def units(self) -> tuple[Unit, ...]:
        """Every unit, ordered by stage, task and row."""
        units: list[Unit] = []
        for stage in range(self.num_stages):
            for index, task in enumerate(self.tasks):
                rounds = task.rounds
                outer = () if task.fused else rounds
                if stage < len(outer):
                    spans, round_name = task.row_spans(), outer[stage]
                elif stage == len(outer):
                    spans = iter([(0, task.rows)]) if task.fused else task.row_spans()
                    round_name = None
                else:
                    continue
                for first, last in spans:
                    units.append(Unit(len(units), stage, index, first, last, round_name))
        return tuple(units)

    @cached_property
    def num_stages(self) -> int:
        """A loop asks for it again and again: it is counted once."""
        return 1 + max((0 if t.fused else len(t.rounds) for t in self.tasks), default=0)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all that decides the bytes: tasks, layouts, pinned inputs, plugins, kind of device; never memory,
        workers or where the output goes."""
        document = {
            "version": PLAN_VERSION,
            "device": self.device,
            "sources": [
                {"pins": s.catalog.pins, "tensors": {k: plain(v) for k, v in sorted(s.catalog.tensors.items())}}
                for s in self.sources
            ],
            "outputs": [{"kind": o.kind, "files": [plain(f) for f in o.files]} for o in self.outputs],
            "tasks": [plain(t) for t in self.tasks],
            # Also where every rank is its bound: receipts of the two plans are not each other's.
            **({"settled_from": self.settled_from} if self.settled_from else {}),
            **({"plugins": [plugin.sha256 for plugin in self.plugins]} if self.plugins else {}),
        }
        return hashlib.sha256(json.dumps(document, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def plain(value: Any) -> Any:
    """Any part of a plan as data that JSON can hold; bytes as their SHA-256."""
    kind = type(value)
    if kind in _AS_THEY_ARE:  # most of a plan, which has tens of thousands of values
        return value
    if isinstance(value, tuple | list):
        return [plain(v) for v in value]
    if kind is DType:
        return value.code
    if isinstance(value, bytes):
        return hashlib.sha256(value).hexdigest()
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if is_dataclass(kind):
        return {name: plain(getattr(value, name)) for name in _field_names(kind)}
    return value


_AS_THEY_ARE: Final = frozenset({str, int, float, bool, type(None)})


@cache
def _field_names(kind: type) -> tuple[str, ...]:
    return tuple(f.name for f in fields(kind))
