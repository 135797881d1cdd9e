"""One unit of a plan, from ranges to bytes: `UnitRunner.run`. Here reading, arithmetic and writing meet.

Rows come in blocks (as many tiles as the memory budget holds); inside a block the arithmetic goes tile by tile, so
that the size of a block changes no bit. Buffers are reused; one runner belongs to one thread. Torch must be on one
thread (`prepare_process`).
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from merger.errors import MergeFailedError
from merger.kernels.dispatch import Kernels, kernels_for
from merger.kernels.hashing import keep_limit
from merger.methods import blocks, factors, lowrank
from merger.methods.rounds import Call, Findings, RoundName, Statistic, conclude, empty_statistic, rounds_of, wants
from merger.operands import Arena, OperandReader, bytes_of, torch_dtype
from merger.planning.memory import TILE_ELEMENTS, buffers_per_row, fixed_bytes, whole_task_bytes
from merger.planning.nouns import DenseTerm, LowRankTerm, MergePlan, Place, Result, Task, Term, Unit
from merger.quantization.encode import encode_rows
from merger.receipts import Extent, Receipt
from merger.storage.base import RangeRead, WritableStore

BLOCK_BYTES: Final = 48 << 20
"""Buffers of one block, when memory would allow more: enough for long reads, small enough to stay near the caches."""
KEPT_BYTES: Final = 64 << 20
"""Buffers of a unit that is kept whole between its rounds. Above that, reading a local file again costs less than the
page faults of holding it."""
SCRATCH_FOLDER: Final = ".raymerge/parts"


_Factors = tuple[Tensor, Tensor, float]
"""A (rank, cols), B (rows, rank), scaling."""


def prepare_process() -> None:
    """Fix what decides bits in this process: torch computes on one thread. Parallelism is over units.

    Each thread that runs units calls it: OpenMP keeps the number by thread.
    """
    torch.set_num_threads(1)


@contextlib.contextmanager
def one_torch_thread() -> Iterator[None]:
    """The same for a while: a program that merges gets its threads back."""
    before = torch.get_num_threads()
    prepare_process()
    try:
        yield
    finally:
        torch.set_num_threads(before)


Writer = Callable[[int, str, int, memoryview], None]
"""(output, file, offset, bytes)."""


def scratch_name(file: str) -> str:
    """Where an output file grows until it is whole."""
    return f"{SCRATCH_FOLDER}/{file}"


def writer_to(stores: Sequence[WritableStore]) -> Writer:
    """A writer into the outputs' scratch files."""

    def write(output: int, file: str, offset: int, data: memoryview) -> None:
        stores[output].write_at(scratch_name(file), offset, data)

    return write


class UnitRunner:
    """Runs units of one plan on one thread with a bounded amount of memory."""

    def __init__(self, plan: MergePlan, *, memory: int, device: str = "cpu") -> None:
        self.plan = plan
        self.memory = memory
        self.device = torch.device(device)
        self.kernels: Kernels = kernels_for(self.device)
        self.arena = Arena()
        self.reader = OperandReader(plan, self.kernels, self.arena, factor_bytes=memory // 8)
        self._block_cache: dict[tuple[int, int], tuple[Tensor | None, Tensor]] = {}

    # ---------------------------------------------------------------- entry

    def run(self, unit: Unit, findings: Sequence[Findings], write: Writer) -> Receipt:
        """Do one unit. `findings` holds one item a result of its task. Returns its receipt.

        Raises MergeFailedError(code `not-finite`) when the result has NaN or Inf, and what reading and writing raise.
        """
        task = self.plan.tasks[unit.task]
        before = self.reader.read_bytes
        self._block_cache.clear()
        try:
            if unit.round is not None:
                statistics = self._statistics(task, unit.round, findings, unit.first, unit.last)
                return Receipt(unit.index, statistics=statistics, read_bytes=self.reader.read_bytes - before)
            if task.results[0].store.kind == "copy":
                extents = self._copy(task, unit.first, unit.last, write)
                return Receipt(unit.index, extents=extents, read_bytes=self.reader.read_bytes - before)
            if task.cut == "whole":
                extents, notes = self._whole(task, findings, write)
                return Receipt(unit.index, extents=extents, notes=notes, read_bytes=self.reader.read_bytes - before)
            if task.fused:
                findings = self._own_findings(task, unit)
            extents = self._rows(task, findings, unit.first, unit.last, write)
            return Receipt(unit.index, extents=extents, read_bytes=self.reader.read_bytes - before)
        finally:
            self._block_cache.clear()

    def _own_findings(self, task: Task, unit: Unit) -> tuple[Findings, ...]:
        findings = tuple(Findings() for _ in task.results)
        for name in task.rounds:
            statistics = self._statistics(task, name, findings, unit.first, unit.last)
            findings = tuple(
                conclude(name, statistic, result.call, task.rows * task.cols, known) if wants(result.call, name)
                else known
                for statistic, result, known in zip(statistics, task.results, findings, strict=True)
            )  # fmt: skip
        return findings

    # ---------------------------------------------------------------- blocks

    def _blocks(self, task: Task, first: int, last: int) -> Iterator[tuple[int, int]]:
        """Rows [first, last) in as many whole tiles as the budget holds."""
        per_row = max(1, buffers_per_row(self.plan, task))
        budget = max(1, int(self.memory * 0.85) - fixed_bytes(self.plan, task)) // per_row
        if not task.rounds or (last - first) * per_row > KEPT_BYTES:
            budget = min(budget, BLOCK_BYTES // per_row)
        start: int | None = None
        stop = first
        for tile_first, tile_last in task.tiles(first, last):
            if start is not None and tile_last - start > budget:
                yield start, stop
                start = None
            if start is None:
                start = tile_first
            stop = tile_last
        if start is not None:
            yield start, stop

    def _load(self, task: Task, first: int, last: int) -> tuple[Tensor | None, Tensor]:
        """The base and the K sources of a block as float32: (rows·cols) and (K, rows·cols)."""
        rows, cols = last - first, task.cols
        for (start, stop), (known_base, known) in self._block_cache.items():
            if start <= first and last <= stop:
                begin, end = (first - start) * cols, (last - start) * cols
                return None if known_base is None else known_base[begin:end], known[:, begin:end]
        base: Tensor | None = None
        if task.base is not None:
            base = self.arena.floats("base", rows, cols)
            self.reader.operand(task.base, first, last, base)
        values = self.arena.floats("values", len(task.entries), rows, cols)
        for k, entry in enumerate(task.entries):
            if any(isinstance(term, LowRankTerm) for term in entry.terms):
                for start, stop in task.tiles(first, last):
                    self.reader.operand(entry.terms, start, stop, values[k, start - first : stop - first])
            else:
                self.reader.operand(entry.terms, first, last, values[k])
            if entry.subtract_base:
                assert base is not None
                self.kernels.subtract(values[k].view(-1), base.view(-1))
        if self.device.type != "cpu":
            base = None if base is None else base.to(self.device)
            values = values.to(self.device)
        loaded = (None if base is None else base.view(-1), values.view(len(task.entries), -1))
        if len(task.results) > 1 or task.rounds:
            self._block_cache.clear()
            self._block_cache[first, last] = loaded
        return loaded

    def _prepared(
        self, task: Task, call: Call, findings: Findings, state: blocks.Prepared, values: Tensor, first: int,
        tile: tuple[int, int], *, rescale: bool = True,
    ) -> Tensor:  # fmt: skip
        """A tile's sources after prepare, in scratch of their own: (K, n)."""
        start, stop = tile
        begin, end = (start - first) * task.cols, (stop - first) * task.cols
        work = self._scratch("tile", values.shape[0], end - begin)
        work.copy_(values[:, begin:end])
        for k in range(values.shape[0]):
            blocks.prepare(self.kernels, call, findings, state, k, work[k], start * task.cols, rescale=rescale)
        return work

    def _scratch(self, name: str, *shape: int) -> Tensor:
        if self.device.type == "cpu":
            return self.arena.floats(name, *shape)
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    # ---------------------------------------------------------------- statistics

    def _statistics(
        self, task: Task, name: RoundName, findings: Sequence[Findings], first: int, last: int
    ) -> tuple[Statistic, ...]:
        count = len(task.entries)
        found = [
            empty_statistic(name, count if wants(result.call, name) else 0) for result in task.results
        ]  # fmt: skip
        states = [blocks.Prepared.start(known) for known in findings]
        shared: dict[int, Statistic] = {}
        for block in self._blocks(task, first, last):
            _, values = self._load(task, *block)
            for index, result in enumerate(task.results):
                if not wants(result.call, name):
                    continue
                if name == "trim_high":  # the same for every result: counted once
                    if shared.setdefault(0, found[index]) is found[index]:
                        self._count_high(values, found[index])
                elif name == "trim_low":
                    self._count_low(values, findings[index], found[index])
                else:
                    self._sum(task, name, result.call, findings[index], states[index], values, block, found[index])
        return tuple(
            shared.get(0, statistic) if name == "trim_high" and wants(r.call, name) else statistic
            for r, statistic in zip(task.results, found, strict=True)
        )

    def _count_high(self, values: Tensor, counts: Statistic) -> None:
        for k in range(values.shape[0]):
            self.kernels.count_high(values[k], torch.from_numpy(counts[k]))

    def _count_low(self, values: Tensor, findings: Findings, counts: Statistic) -> None:
        for k, (prefix, _) in enumerate(findings.prefixes):
            self.kernels.count_low(values[k], prefix, torch.from_numpy(counts[k]))

    def _sum(
        self, task: Task, name: RoundName, call: Call, findings: Findings, state: blocks.Prepared, values: Tensor,
        block: tuple[int, int], found: Statistic,
    ) -> None:  # fmt: skip
        for tile in task.tiles(*block):
            begin, end = ((row - block[0]) * task.cols for row in tile)
            if name == "gram":
                a, b = values[0, begin:end], values[1, begin:end]
                found[0] += self.kernels.dot(a, a)
                found[1] += self.kernels.dot(a, b)
                found[2] += self.kernels.dot(b, b)
                continue
            work = self._prepared(task, call, findings, state, values, block[0], tile, rescale=False)
            for k in range(values.shape[0]):
                if call.keeps_all(k):
                    continue
                found[k, 0] += self.kernels.sum_abs(values[k, begin:end])
                found[k, 1] += self.kernels.sum_abs(work[k])

    # ---------------------------------------------------------------- maps

    def _rows(
        self, task: Task, findings: Sequence[Findings], first: int, last: int, write: Writer
    ) -> tuple[Extent, ...]:
        """Merge rows [first, last), write them, and digest each extent on the way."""
        extents: list[Extent] = []
        states = [blocks.Prepared.start(known) for known in findings]
        for span_first, span_last in _cut(task, first, last):
            digests = [[hashlib.sha256() for _ in result.places] for result in task.results]
            for block in self._blocks(task, span_first, span_last):
                base, values = self._load(task, *block)
                for index, result in enumerate(task.results):
                    out = self._map(task, result.call, findings[index], states[index], base, values, block)
                    self._store_block(task, result, out, block, write, digests[index])
            for result, hashes in zip(task.results, digests, strict=True):
                for place, sha256 in zip(result.places, hashes, strict=True):
                    start, end = place.span(span_first, span_last)
                    extents.append(Extent(place.output, place.file, start, end, sha256.hexdigest()))
        return tuple(extents)

    def _map(
        self, task: Task, call: Call, findings: Findings, state: blocks.Prepared, base: Tensor | None, values: Tensor,
        block: tuple[int, int],
    ) -> Tensor:  # fmt: skip
        """prepare → combine → finish over a block's tiles: float32 (rows·cols)."""
        first, last = block
        out = self._scratch("out", (last - first) * task.cols)
        for start, stop in self._steps(task, block):
            begin, end = (start - first) * task.cols, (stop - first) * task.cols
            piece = None if base is None else base[begin:end]
            if call.accumulates and piece is not None:
                blocks.accumulate(self.kernels, call, piece, values[:, begin:end], out[begin:end])
                continue
            if call.prepare == "none":
                work = self._scratch("tile", values.shape[0], end - begin).copy_(values[:, begin:end])
            else:
                work = self._prepared(task, call, findings, state, values, first, (start, stop))
            scratch = self._scratch("scratch", 2, end - begin)
            blocks.combine(self.kernels, call, findings, work, out[begin:end], scratch)
            blocks.finish(self.kernels, call, piece, out[begin:end])
        return out

    def _steps(self, task: Task, block: tuple[int, int]) -> Iterator[tuple[int, int]]:
        """A map is elementwise and may be cut anywhere: to fit a core's cache, and on a GPU not at all."""
        if self.device.type != "cpu":
            yield block
            return
        yield from _pieces(block, max(1, TILE_ELEMENTS // max(1, task.cols)))

    def _store_block(
        self, task: Task, result: Result, out: Tensor, block: tuple[int, int], write: Writer, digests: list[Any]
    ) -> None:
        host = out if out.device.type == "cpu" else out.cpu()
        self._check_finite(task, result.places[0], host)
        parts = encode_rows(
            result.store.kind, [(place.part, place.dtype) for place in result.places],
            host.view(block[1] - block[0], task.cols), self.arena.bytes,
        )  # fmt: skip
        for place, digest, data in zip(result.places, digests, parts, strict=True):
            start, _ = place.span(*block)
            digest.update(data)
            write(place.output, place.file, start, data)

    def _check_finite(self, task: Task, place: Place, values: Tensor) -> None:
        limits = {"F16": 0x477FF000, "BF16": 0x7F7F8000}  # the first float32 that rounds to infinity
        limit = limits.get(place.dtype.code if place.dtype else "", 0x7F800000)
        bits = kernels_for(values.device).largest(values.reshape(-1)) if values.numel() else 0
        if bits >= limit:
            kind = "NaN or Inf" if bits >= 0x7F800000 else f"a value too large for {place.dtype}"
            raise MergeFailedError.of(
                "not-finite",
                f"merging {task.name} gave {kind}",
                where=place.file,
                why="a source holds such a value, or weights cancel to zero",
                fix="check the sources with `raymerge inspect`, the weights, and the output's dtype",
            )

    # ---------------------------------------------------------------- copies

    def _copy(self, task: Task, first: int, last: int, write: Writer) -> tuple[Extent, ...]:
        """Bytes untouched. With several sources (buffers), all must be equal."""
        places = [place for result in task.results for place in result.places]
        row_bytes = places[0].row_bytes
        extents = []
        for span_first, span_last in _cut(task, first, last):
            digest = hashlib.sha256()
            step = max(1, int(self.memory * 0.4) // max(1, row_bytes))
            for start, stop in _pieces((span_first, span_last), step):
                data = self._raw(task.entries[0].terms[0], start, stop, "copy")
                for other in task.entries[1:]:
                    if not torch.equal(data, self._raw(other.terms[0], start, stop, "other")):
                        raise MergeFailedError.of(
                            "buffers-differ",
                            f"{task.name} is not a float tensor and differs between the sources",
                            why="integers and codes cannot be averaged",
                            fix="use sources that share this buffer",
                        )
                view = bytes_of(data)
                digest.update(view)
                for place in places:
                    write(place.output, place.file, place.start + start * row_bytes, view)
            extents += [
                Extent(place.output, place.file, *place.span(span_first, span_last), digest.hexdigest())
                for place in places
            ]
        return tuple(extents)

    def _raw(self, term: Term, first: int, last: int, buffer: str) -> Tensor:
        assert isinstance(term, DenseTerm)
        stored = self.plan.sources[term.source].stored(term.tensor)
        if stored.decoder == "strided":
            rows = self.reader.strided(term.source, term.tensor)[first:last].contiguous()
            return rows.view(-1).view(torch.uint8)
        if stored.spec.dtype.bits % 8:
            raw = self.arena.bytes(buffer, stored.spec.nbytes)
            self.reader.read(term.source, stored.file, [RangeRead(stored.start, bytes_of(raw))])
            return raw
        raw = self.arena.bytes(buffer, (last - first) * stored.row_bytes)
        self.reader.read(term.source, stored.file, [RangeRead(stored.start + first * stored.row_bytes, bytes_of(raw))])
        return raw

    # ---------------------------------------------------------------- whole tensors

    def _whole(
        self, task: Task, findings: Sequence[Findings], write: Writer
    ) -> tuple[tuple[Extent, ...], dict[str, float]]:
        """Results that need the whole tensor: pairs of factors."""
        needed = whole_task_bytes(self.plan, task)
        if needed > self.memory:
            raise MergeFailedError.of(
                "memory", f"{task.name} needs {needed} bytes at once, more than --memory allows ({self.memory})",
                fix="raise --memory",
            )  # fmt: skip
        extents: list[Extent] = []
        notes: dict[str, float] = {}
        for result, known in zip(task.results, findings, strict=True):
            if result.store.kind == "factors":
                a, b = self._peft_factors(task, result)
            elif result.store.kind == "concat" and result.space == "delta":
                a, b = self._concat(task, result)
            else:
                pair = self._low_rank(task, result, known)
                notes = {
                    "energy": pair.energy, "lost": pair.lost,
                    "rank": float(pair.a_rn.shape[0]), "rank_95": float(pair.rank_for(0.95)),
                }  # fmt: skip
                a, b = pair.a_rn, pair.b_mr
                if result.store.clamp is not None:
                    a, b = _clamp(a, b, result.store.clamp)
            extents += self._store_pair(task, result, a, b, write)
        return tuple(extents), notes

    def _pairs(self, task: Task) -> list[_Factors | None]:
        pairs: list[_Factors | None] = []
        for entry in task.entries:
            if not entry.terms:
                pairs.append(None)
                continue
            (term,) = entry.terms
            assert isinstance(term, LowRankTerm)
            a = self.reader.factor(term.source, term.a, keep=False)
            b = self.reader.factor(term.source, term.b, keep=False)
            pairs.append((a, b, term.scaling))
        return pairs

    def _peft_factors(self, task: Task, result: Result) -> tuple[Tensor, Tensor]:
        call = result.call
        # PEFT loads adapters in float32 (autocast_adapter_dtype) and prunes there.
        present = [(i, (a.float(), b.float(), scaling)) for i, (a, b, scaling) in _present(self._pairs(task))]
        narrowed = _only(call, [i for i, _ in present])
        roots = [factors.split_coefficient(call.weights[i] * pair[2]) for i, pair in present]
        half = len(call.keys) // 2
        merged = []
        for which, offset in ((0, 0), (1, half)):

            def mask(source: int, factor: Tensor, offset: int = offset) -> Tensor:
                kept = torch.ones(factor.numel(), dtype=torch.float32)
                key = call.keys[offset + present[source][0]]
                density = narrowed.densities[source]
                self.kernels.drop(kept, 0, key, keep_limit(density))
                return kept.to(factor.dtype).view(factor.shape)

            merged.append(
                factors.merge_factor(
                    narrowed, [pair[:2][which] for _, pair in present], [root[which] for root in roots], mask
                )
            )
        return merged[0], merged[1]

    def _concat(self, task: Task, result: Result) -> tuple[Tensor, Tensor]:
        pairs = self._pairs(task)
        call = result.call
        total = sum(call.weights) if call.normalize else 1.0
        return factors.concatenate(
            [None if p is None else (p[0].float(), p[1].float()) for p in pairs],
            [w * call.scale / total for w in call.weights],
            [1.0 if p is None else p[2] for p in pairs],
            result.store.rank,
            task.rows,
            task.cols,
        )

    def _low_rank(self, task: Task, result: Result, findings: Findings) -> lowrank.Pair:
        call, store = result.call, result.store
        split = store.spectrum == "split"
        linear = call.prepare == "none" and call.combine in ("sum", "mean")
        if linear or result.space == "core":
            present = _present(self._pairs(task))
            core = lowrank.build_core([(a, b.double() * scaling) for _, (a, b, scaling) in present])
            indices = [i for i, _ in present]
            merged = self._merge_core(call, indices, core) if not linear else _linear_core(call, indices, core)
            rank = store.rank if store.kind == "svd" else core.left_mR.shape[1]
            return lowrank.truncate_core(core, merged, rank, split=split)
        if task.fused:
            findings = self._own_findings(task, Unit(0, 0, 0, 0, task.rows, None))[task.results.index(result)]
        state = blocks.Prepared.start(findings)
        delta = torch.empty(task.rows, task.cols, dtype=torch.float32)
        for block in self._blocks(task, 0, task.rows):
            base, values = self._load(task, *block)
            delta[block[0] : block[1]] = self._map(task, call, findings, state, base, values, block).view(
                block[1] - block[0], task.cols
            )
        self.arena.clear()
        return lowrank.truncate_dense(delta, store.rank, split=split)

    def _merge_core(self, call: Call, indices: list[int], core: lowrank.Core) -> Tensor:
        """An elementwise method in the exact core: its R×R matrices are small tensors like any other."""
        narrowed = _only(call, indices)
        x_Kn = torch.stack([m.float().reshape(-1) for m in core.cores]).contiguous()
        findings = Findings()
        for name in rounds_of(narrowed):
            found = empty_statistic(name, len(indices))
            if name == "trim_high":
                self._count_high(x_Kn, found)
            elif name == "trim_low":
                self._count_low(x_Kn, findings, found)
            else:
                ready, state = x_Kn.clone(), blocks.Prepared.start(findings)
                for k in range(len(indices)):
                    blocks.prepare(self.kernels, narrowed, findings, state, k, ready[k], 0, rescale=False)
                    found[k] = self.kernels.sum_abs(x_Kn[k]), self.kernels.sum_abs(ready[k])
            findings = conclude(name, found, narrowed, x_Kn.shape[1], findings)
        state = blocks.Prepared.start(findings)
        for k in range(len(indices)):
            blocks.prepare(self.kernels, narrowed, findings, state, k, x_Kn[k], 0)
        out = torch.empty(x_Kn.shape[1])
        blocks.combine(self.kernels, narrowed, findings, x_Kn, out, torch.empty(2, x_Kn.shape[1]))
        blocks.finish(self.kernels, narrowed, None, out)
        return out.double().view(core.cores[0].shape)

    def _store_pair(self, task: Task, result: Result, a: Tensor, b: Tensor, write: Writer) -> list[Extent]:
        extents = []
        for place in result.places:
            factor = a if place.part == "A" else b
            rank_axis = 0 if place.part == "A" else 1
            missing = result.store.rank - factor.shape[rank_axis]
            if missing > 0:
                pad = [0, 0, 0, missing] if rank_axis == 0 else [0, missing, 0, 0]
                factor = torch.nn.functional.pad(factor, pad)
            self._check_finite(task, place, factor.float())
            assert place.dtype is not None
            data = factor.to(torch_dtype(place.dtype)).contiguous().view(-1).view(torch.uint8)
            rows_per_extent = max(1, (16 << 20) // max(1, place.row_bytes))
            view = bytes_of(data)
            for first, last in _pieces((0, place.rows), rows_per_extent):
                piece = view[first * place.row_bytes : last * place.row_bytes]
                start, end = place.span(first, last)
                write(place.output, place.file, start, piece)
                extents.append(Extent(place.output, place.file, start, end, hashlib.sha256(piece).hexdigest()))
        return extents


# -------------------------------------------------------------------- small pure parts


def _present(pairs: Sequence[_Factors | None]) -> list[tuple[int, _Factors]]:
    """The sources that have the module, with their positions."""
    return [(i, pair) for i, pair in enumerate(pairs) if pair is not None]


def _pieces(span: tuple[int, int], step: int) -> Iterator[tuple[int, int]]:
    first, last = span
    for start in range(first, last, step):
        yield start, min(start + step, last)
    if first == last:
        yield first, last


def _cut(task: Task, first: int, last: int) -> Iterator[tuple[int, int]]:
    """The extents' spans inside a unit."""
    for start, stop in task.row_spans():
        if first <= start and stop <= last:
            yield start, stop


def _only(call: Call, indices: Sequence[int]) -> Call:
    """The same call for some of its sources."""
    return replace(
        call,
        weights=tuple(call.weights[i] for i in indices),
        densities=tuple(call.densities[i] for i in indices) if call.densities else (),
        keys=tuple(call.keys[i] for i in indices) if call.keys else (),
    )


def _linear_core(call: Call, indices: Sequence[int], core: lowrank.Core) -> Tensor:
    total = sum(call.weights) if call.normalize else 1.0
    merged = torch.zeros_like(core.cores[0])
    for i, matrix in zip(indices, core.cores, strict=True):
        merged += matrix * (call.weights[i] * call.scale / total)
    return merged


def _clamp(a: Tensor, b: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """PEFT's svd_clamp: limit both factors to the given quantile of all their elements."""
    values = torch.cat([b.reshape(-1), a.reshape(-1)])
    high = float(np.quantile(values.numpy(), share))
    return a.clamp(-high, high), b.clamp(-high, high)
