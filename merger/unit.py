"""One unit of a plan, from ranges to bytes: `UnitRunner.run`. Here reading, arithmetic and writing meet.

Rows come in blocks (as many tiles as the memory budget holds); inside a block the arithmetic goes tile by tile, so
that the size of a block changes no bit. Buffers are reused; one runner belongs to one thread. Torch, where a plan needs
it, must be on one thread (`prepare_process`).
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from merger.bits import BitsMerger, goes_by_bits
from merger.errors import MergeFailedError
from merger.kernels.dispatch import Array, CompiledKernels, Host, Kernels, kernels_for
from merger.methods import METHODS, blocks
from merger.methods.rounds import Call, Findings, RoundName, Statistic, balanced, block_round, is_block_round, wants
from merger.methods.tiles import TensorExtent, Tile, dot
from merger.methods.whole import WholeBlock
from merger.operands import Arena, OperandReader, bytes_of, multiply_rows
from merger.planning.devices import device_of
from merger.planning.memory import TILE_ELEMENTS, buffers_per_row, fixed_bytes, smallest_bytes, whole_task_bytes
from merger.planning.nouns import (
    DenseTerm,
    ExpertStore,
    MergePlan,
    Place,
    Result,
    Task,
    Term,
    Unit,
    expert_of,
)
from merger.quantization.encode import check_finite, encode_rows
from merger.quantization.recode import Seen, look, recode_rows
from merger.receipts import Extent, Receipt
from merger.storage.base import RangeRead

BLOCK_BYTES: Final = 48 << 20
"""Buffers of one block, when memory would allow more: enough for long reads, small enough to stay near the caches."""
BITS_BLOCK_BYTES: Final = 8 << 20
"""The same where bits are merged as they are: enough for a call to be worth while, and little to fault in."""
KEPT_BYTES: Final = 64 << 20
"""Buffers of a unit that is kept whole between its rounds. Above that, reading a local file again costs less than the
page faults of holding it."""


def needs_torch(plan: MergePlan) -> bool:
    """Whether a plan has products or spectral steps. Elementwise merges on the CPU run without torch."""
    return plan.device != "cpu" or any(
        task.cut == "whole"
        or any(not isinstance(t, DenseTerm) for t in (*(task.base or ()), *(t for e in task.entries for t in e.terms)))
        for task in plan.tasks
    )


def prepare_process(plan: MergePlan) -> None:
    """Fix what decides bits in this process: torch computes on one thread. Parallelism is over units.

    Each thread that runs units calls it: OpenMP keeps the number by thread.
    """
    if needs_torch(plan):
        import torch

        torch.set_num_threads(1)


@contextlib.contextmanager
def one_torch_thread(plan: MergePlan) -> Iterator[None]:
    """The same for a while: a program that merges gets its threads back."""
    if not needs_torch(plan):
        yield
        return
    import torch

    before = torch.get_num_threads()
    prepare_process(plan)
    try:
        yield
    finally:
        torch.set_num_threads(before)


Writer = Callable[[int, str, int, memoryview], None]
"""(output, file, offset, bytes)."""


class UnitRunner:
    """Runs units of one plan on one thread with a bounded amount of memory."""

    def __init__(self, plan: MergePlan, *, memory: int, device: str = "cpu") -> None:
        self.plan = plan
        self.memory = memory
        """Bytes of buffers. May be set lower between units: less memory makes smaller blocks, never other bytes."""
        self._device = device
        self.kernels: Kernels = kernels_for("cpu")  # elementwise work stays where the bytes are
        self.arena = Arena()
        self.reader = OperandReader(plan, self.arena, factor_bytes=memory // 8)
        self._host = CompiledKernels()
        self._bits = BitsMerger(self.arena, self.reader, self._blocks)
        self._block_cache: dict[tuple[int, int], tuple[Array | None, Array]] = {}
        self._fetched = 0
        self._held = 0

    # ---------------------------------------------------------------- entry

    def spectral_device(self, task: Task) -> str:
        """Where a task's dense matrices are decomposed, in torch's words."""
        return self._device if device_of(self.plan, task) == "cuda" else "cpu"

    def run(self, unit: Unit, findings: Sequence[Findings], write: Writer) -> Receipt:
        """Do one unit. `findings` holds one item a result of its task. Returns its receipt.

        Raises MergeFailedError(code `not-finite`) when the result has NaN or Inf, and what reading and writing raise.
        """
        task = self.plan.tasks[unit.task]
        before = self.reader.read_bytes
        self.reader.spectral_device = self.spectral_device(task)
        self._block_cache.clear()
        try:
            return self._receipt(task, unit, findings, write, before)
        except MergeFailedError as error:
            blamed = self._blamed(error, task, unit)
            if blamed is error:
                raise
            raise blamed from error
        finally:
            self._block_cache.clear()
            self.reader.forget_wholes()
            if not self._held:
                self.reader.release()

    def _receipt(self, task: Task, unit: Unit, findings: Sequence[Findings], write: Writer, before: int) -> Receipt:
        """What `run` does, by the kind of unit. `before` is what had been read before it."""
        self._fetched = self._held or self._fetch([unit])
        if unit.round is not None:
            statistics = self._statistics(task, unit.round, findings, unit.first, unit.last)
            return Receipt(unit.index, statistics=statistics, read_bytes=self.reader.read_bytes - before)
        if task.results[0].store.kind == "copy":
            extents = self._copy(task, unit.first, unit.last, write)
            return Receipt(unit.index, extents=extents, read_bytes=self.reader.read_bytes - before)
        if not task.results[0].store.writes:
            notes_of_left = self._left_out(task, unit.first, unit.last)
            return Receipt(unit.index, notes=notes_of_left, read_bytes=self.reader.read_bytes - before)
        if task.results[0].store.measure:
            ranks = self._ranks(task, findings)
            return Receipt(unit.index, statistics=ranks, read_bytes=self.reader.read_bytes - before)
        if task.cut == "whole":
            extents, notes = self._whole(task, findings, write)
            return _mapped(unit, extents, notes, self.reader.read_bytes - before)
        if self.kernels.on_host and goes_by_bits(self.plan, task):
            extents = self._bits.run(task, unit.first, unit.last, write)
            return _mapped(unit, extents, [{}], self.reader.read_bytes - before)
        if task.fused:
            findings = self._own_findings(task, unit)
        notes = [blocks.notes_of([r.call], [known]) for r, known in zip(task.results, findings, strict=True)]
        extents = self._rows(task, findings, unit.first, unit.last, write, notes)
        notes[0] |= self._grid_notes(task, findings, unit)
        return _mapped(unit, extents, notes, self.reader.read_bytes - before)

    def _blamed(self, error: MergeFailedError, task: Task, unit: Unit) -> MergeFailedError:
        """The error of a result that is no number, with the sources that hold such a value: looked for once more."""
        first = error.problems[0]
        if first.code != "not-finite":
            return error
        rows = (0, task.rows) if task.cut == "whole" or unit.round is not None else (unit.first, unit.last)
        terms = [*(task.base or ()), *(term for entry in task.entries for term in entry.terms)]
        held = [text for term in dict.fromkeys(terms) if (text := self._broken(term, task.cols, *rows))]
        why = "; ".join(dict.fromkeys(held)) or "no source does: it is too large for the dtype, or weights cancel"
        fix = "mend or leave out that source" if held else "check the weights, and the output's dtype"
        return MergeFailedError(replace(first, why=why, fix=fix))

    def _broken(self, term: Term, cols: int, first: int, last: int) -> str:
        """What of a term is NaN or Inf in these rows, in words; empty where nothing is."""
        source = self.plan.sources[term.source]
        if not isinstance(term, DenseTerm):
            stored = {name: self.reader.stored_factor(term.source, name, keep=False) for name in term.tensors}
            names = [name for name, values in stored.items() if not np.isfinite(values).all()]
            return f"{source.label} holds NaN or Inf in {', '.join(names)}" if names else ""
        step = max(1, BLOCK_BYTES // (8 * max(1, cols)))
        for start, stop in _pieces((first, last), step):
            values = self.arena.floats("broken", stop - start, cols)
            self.reader.operand((term,), start, stop, values)
            bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
            if bad.size:
                return f"{source.label} holds NaN or Inf in {term.tensor}, first in row {start + int(bad[0])}"
        return ""

    def hold(self, units: Sequence[Unit]) -> None:
        """Fetch all that these units read from remote sources at once, and keep it until `let_go`."""
        self._held = self._fetch(units)

    def let_go(self) -> None:
        self._held = 0
        self.reader.release()

    def _fetch(self, units: Sequence[Unit]) -> int:
        """Fetch what units read from remote sources at once, where memory has room for it beside the blocks: one pass
        over the network whatever the number of rounds. Returns the bytes that this takes; 0 where there is no room."""
        tasks = [self.plan.tasks[unit.task] for unit in units]
        ranges = self.reader.missing([(t, u.first, u.last) for t, u in zip(tasks, units, strict=True)])
        size = sum(end - start for _, _, start, end in ranges)
        if not ranges or max(smallest_bytes(self.plan, task) for task in tasks) + size > self.memory:
            return 0
        self.reader.fetch(ranges)
        return size

    def _own_findings(self, task: Task, unit: Unit) -> tuple[Findings, ...]:
        findings = tuple(Findings() for _ in task.results)
        extent = _extent(task)
        for name in task.rounds:
            statistics = self._statistics(task, name, findings, unit.first, unit.last)
            findings = tuple(
                blocks.end_round(name, result.call, statistic, extent, known) if wants(result.call, name) else known
                for statistic, result, known in zip(statistics, task.results, findings, strict=True)
            )  # fmt: skip
        return findings

    # ---------------------------------------------------------------- blocks

    def _blocks(self, task: Task, first: int, last: int, row_bytes: int = 0) -> Iterator[tuple[int, int]]:
        """Rows [first, last) in as many whole tiles as the budget holds. `row_bytes`: what a row takes, where that is
        less than what the plan counts with."""
        per_row = max(1, row_bytes or buffers_per_row(self.plan, task))
        budget = max(1, int((self.memory - self._fetched) * 0.85) - fixed_bytes(self.plan, task)) // per_row
        if not task.rounds or (last - first) * per_row > KEPT_BYTES:
            budget = min(budget, (BITS_BLOCK_BYTES if row_bytes else BLOCK_BYTES) // per_row)
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

    def _load(self, task: Task, first: int, last: int) -> tuple[Array | None, Array]:
        """The base and the K sources of a block as float32: (rows·cols) and (K, rows·cols), where the kernels work."""
        rows, cols = last - first, task.cols
        for (start, stop), (known_base, known) in self._block_cache.items():
            if start <= first and last <= stop:
                begin, end = (first - start) * cols, (last - start) * cols
                return None if known_base is None else known_base[begin:end], known[:, begin:end]
        base: Host | None = None
        if task.base is not None:
            base = self.arena.floats("base", rows, cols)
            self._operand(task, task.base, first, last, base)
        values = self.arena.floats("values", len(task.entries), rows, cols)
        for k, entry in enumerate(task.entries):
            self._operand(task, entry.terms, first, last, values[k])
            if entry.subtract_base:
                assert base is not None
                self._host.subtract(values[k].reshape(-1), base.reshape(-1))
        loaded = (
            None if base is None else self.kernels.load(base.reshape(-1)),
            self.kernels.load(values.reshape(len(task.entries), rows * cols)),
        )
        if len(task.results) > 1 or task.rounds:
            self._block_cache.clear()
            self._block_cache[first, last] = loaded
        return loaded

    def _measured(self, task: Task, first: int, last: int) -> Host | None:
        """What the statistics say of a block, where the method's tiles need it: (K, rows·cols)."""
        if not task.statistics or METHODS[task.results[0].call.method].statistics != "diagonal":
            return None
        found = self.arena.floats("statistics", len(task.entries), last - first, task.cols)
        for term, rows in zip(task.statistics, found, strict=True):
            self.reader.operand((term,), first, last, rows)
        return found.reshape(len(task.entries), -1)

    def _operand(self, task: Task, terms: tuple[Term, ...], first: int, last: int, out: Host) -> None:
        """Rows of an operand; products tile by tile, so that no block changes their order of sums."""
        if all(isinstance(term, DenseTerm) for term in terms):
            self.reader.operand(terms, first, last, out)
            return
        for start, stop in task.tiles(first, last):
            self.reader.operand(terms, start, stop, out[start - first : stop - first])

    def _prepared(
        self, task: Task, call: Call, findings: Findings, state: blocks.Prepared, values: Array, first: int,
        tile: tuple[int, int], *, rescale: bool = True,
    ) -> Array:  # fmt: skip
        """A tile's sources after prepare, in scratch of their own: (K, n)."""
        start, stop = tile
        begin, end = (start - first) * task.cols, (stop - first) * task.cols
        work = self._scratch("tile", values.shape[0], end - begin)
        first_index = start * task.cols
        for k in range(values.shape[0]):
            x = values[k, begin:end]
            if blocks.drops_in_one_pass(call, k):
                blocks.drop(self.kernels, call, findings, k, x, first_index, work[k], rescale=rescale)
                continue
            self.kernels.copy(work[k], x)
            blocks.prepare(
                self.kernels, call, findings, state, k, work[k], first_index, rescale=rescale, length=task.length
            )
        return work

    def _scratch(self, name: str, *shape: int) -> Array:
        return self.arena.floats(name, *shape) if self.kernels.on_host else self.kernels.empty(*shape)

    # ---------------------------------------------------------------- statistics

    def _statistics(
        self, task: Task, name: RoundName, findings: Sequence[Findings], first: int, last: int
    ) -> tuple[Statistic, ...]:
        extent = _extent(task)
        found = [
            blocks.start_round(name, result.call, extent) if wants(result.call, name) else _NOTHING
            for result in task.results
        ]
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

    def _count_high(self, values: Array, counts: Statistic) -> None:
        for k in range(values.shape[0]):
            self.kernels.count_high(values[k], counts[k])

    def _count_low(self, values: Array, findings: Findings, counts: Statistic) -> None:
        for row, (prefix, _) in enumerate(findings.prefixes):
            self.kernels.count_low(values[row % values.shape[0]], prefix, counts[row])

    def _sum(
        self, task: Task, name: RoundName, call: Call, findings: Findings, state: blocks.Prepared, values: Array,
        block: tuple[int, int], found: Statistic,
    ) -> None:  # fmt: skip
        call = balanced(call, findings.norms)
        measured = self._measured(task, *block) if is_block_round(name) else None
        for tile in task.tiles(*block):
            begin, end = ((row - block[0]) * task.cols for row in tile)
            if name == "norms":
                for k in range(values.shape[0]):
                    x = self.kernels.unload(values[k, begin:end])
                    found[k] += dot(x, x)
                continue
            if is_block_round(name):
                seen = self._tile(task, call, findings, state, None, values, measured, block[0], tile)
                with np.errstate(all="ignore"):
                    blocks.tile_block(call).measure(block_round(name), call, findings.known, seen, found)
                continue
            work = self._prepared(task, call, findings, state, values, block[0], tile, rescale=False)
            for k in range(values.shape[0]):
                if call.keeps_all(k):
                    continue
                found[k, 0] += self.kernels.sum_abs(values[k, begin:end])
                found[k, 1] += self.kernels.sum_abs(work[k])

    def _tile(
        self, task: Task, call: Call, findings: Findings, state: blocks.Prepared, base: Array | None, values: Array,
        measured: Host | None, first: int, tile: tuple[int, int],
    ) -> Tile:  # fmt: skip
        """A tile as a method's block sees it: prepared, on the host."""
        begin, end = ((row - first) * task.cols for row in tile)
        ready = values[:, begin:end]
        if call.prepare != "none":
            ready = self._prepared(task, call, findings, state, values, first, tile)
        below = None if base is None else self.kernels.unload(base[begin:end])
        number = tile[0] // max(1, task.tile_rows)
        known = None if measured is None else measured[:, begin:end]
        return Tile(self.kernels.unload(ready), below, task.length, tile[0] * task.cols, number, known)

    # ---------------------------------------------------------------- maps

    def _rows(
        self, task: Task, findings: Sequence[Findings], first: int, last: int, write: Writer,
        notes: Sequence[dict[str, float]],
    ) -> tuple[Extent, ...]:  # fmt: skip
        """Merge rows [first, last), write them, and digest each extent on the way. `notes`, one a result, are added
        to."""
        extents: list[Extent] = []
        states = [blocks.Prepared.start(known) for known in findings]
        seen = [
            self._looked(task, result, findings[i], first, last, notes[i]) if result.store.looks_first else _UNSEEN
            for i, result in enumerate(task.results)
        ]
        for span_first, span_last in _cut(task, first, last):
            digests = [[hashlib.sha256() for _ in result.places] for result in task.results]
            for block in self._blocks(task, span_first, span_last):
                base, values = self._load(task, *block)
                for index, result in enumerate(task.results):
                    out = self._map(task, result.call, findings[index], states[index], base, values, block)
                    self._store_block(task, result, out, block, write, digests[index], seen[index])
            for result, hashes in zip(task.results, digests, strict=True):
                extents += _written(result.places, hashes, span_first, span_last)
        return tuple(extents)

    def _grid_notes(self, task: Task, findings: Sequence[Findings], unit: Unit) -> dict[str, float]:
        """How far a base that is rounded through a grid moves, beside the delta that is added to it."""
        term = task.base[0] if task.base else None
        if not isinstance(term, DenseTerm) or term.grid is None or (unit.first, unit.last) != (0, task.rows):
            return {}
        state, result = blocks.Prepared.start(findings[0]), task.results[0]
        moved = added = 0.0
        for first, last in self._blocks(task, 0, task.rows):
            base, values = self._load(task, first, last)
            delta = self.kernels.unload(
                self._map(task, result.call, findings[0], state, base, values, (first, last), add_base=False)
            ).copy()
            grid, plain = (self.arena.floats(name, last - first, task.cols) for name in ("gridded", "plain"))
            self.reader.operand((term,), first, last, grid)
            self.reader.operand((replace(term, grid=None),), first, last, plain)
            self._host.subtract(grid.reshape(-1), plain.reshape(-1))
            for start, stop in task.tiles(first, last):
                begin, end = (start - first) * task.cols, (stop - first) * task.cols
                moved += dot(grid.reshape(-1)[begin:end], grid.reshape(-1)[begin:end])
                added += dot(delta[begin:end], delta[begin:end])
        ratio = {"grid_error_over_delta": (moved / added) ** 0.5} if added > 0 else {}
        return {"grid_error": moved**0.5, "delta": added**0.5, **ratio}

    def _looked(
        self, task: Task, result: Result, findings: Findings, first: int, last: int, notes: dict[str, float]
    ) -> Seen:
        """What codes need to know of a whole result, which is merged once more for it."""
        state, parameters = blocks.Prepared.start(findings), dict(result.store.recode)
        found = []
        for block in self._blocks(task, first, last):
            base, values = self._load(task, *block)
            out = self.kernels.unload(self._map(task, result.call, findings, state, base, values, block))
            check_finite(self._host, task.name, result.places[0].file, None, out)
            found.append(look(parameters, out.reshape(-1, task.cols)))
        return self._seen(result, found, notes)

    def _seen(self, result: Result, found: Sequence[Host], notes: dict[str, float]) -> Seen:
        """What was found of a whole result, under the stored factor that it is to have, if it can."""
        seen, term = Seen(np.concatenate(found)), result.store.factor
        if term is None:
            return seen
        role = next(place.part for place in result.places if place.part in {"divisor", "multiplier"})
        factor = float(self.reader.stored_factor(term.source, term.tensor, keep=False).reshape(-1)[0])
        under, share = seen.with_factor(factor, role)
        if under is seen:
            notes["beyond_factor"] = min(share, 1e9)
        return under

    def _map(
        self, task: Task, call: Call, findings: Findings, state: blocks.Prepared, base: Array | None, values: Array,
        block: tuple[int, int], *, add_base: bool = True,
    ) -> Array:  # fmt: skip
        """prepare → combine → finish over a block's tiles: float32 (rows·cols)."""
        first, last = block
        out = self._scratch("out", (last - first) * task.cols)
        call = balanced(call, findings.norms)
        if call.combine == "block":
            self._apply_block(task, call, findings, state, base, values, block, out, add_base=add_base)
            return out
        base = base if add_base else None
        for start, stop in self._steps(task, call, block):
            begin, end = (start - first) * task.cols, (stop - first) * task.cols
            piece = None if base is None else base[begin:end]
            if call.accumulates and piece is not None:
                blocks.accumulate(self.kernels, call, piece, values[:, begin:end], out[begin:end])
                continue
            if call.prepare == "none":
                work = self._scratch("tile", values.shape[0], end - begin)
                self.kernels.copy(work, values[:, begin:end])
            else:
                work = self._prepared(task, call, findings, state, values, first, (start, stop))
            scratch = self._scratch("scratch", 2, end - begin)
            blocks.combine(self.kernels, call, work, out[begin:end], scratch)
            blocks.finish(self.kernels, call, piece, out[begin:end])
        return out

    def _apply_block(
        self, task: Task, call: Call, findings: Findings, state: blocks.Prepared, base: Array | None, values: Array,
        block: tuple[int, int], out: Array, *, add_base: bool,
    ) -> None:  # fmt: skip
        """The map of a method's own block, tile by tile: what it sees of a tile never depends on the block."""
        own = blocks.tile_block(call)
        measured = self._measured(task, *block)
        for tile in task.tiles(*block):
            begin, end = ((row - block[0]) * task.cols for row in tile)
            seen = self._tile(task, call, findings, state, base, values, measured, block[0], tile)
            with np.errstate(all="ignore"):  # what is no number is refused when the result is stored
                merged = np.ascontiguousarray(own.apply(call, findings.known, seen), np.float32)
            self.kernels.copy(out[begin:end], self.kernels.load(merged))
            piece = None if base is None or not add_base else base[begin:end]
            blocks.finish(self.kernels, call, piece, out[begin:end])

    def _steps(self, task: Task, call: Call, block: tuple[int, int]) -> Iterator[tuple[int, int]]:
        """A map is elementwise and may be cut anywhere: to fit a core's cache, and on a GPU not at all. Ranks in a row
        need it whole, as a tile has it."""
        if not self.kernels.on_host:
            yield block
            return
        if call.prepare == "magprune":
            yield from task.tiles(*block)
            return
        yield from _pieces(block, max(1, TILE_ELEMENTS // max(1, task.cols)))

    def _store_block(
        self, task: Task, result: Result, out: Array, block: tuple[int, int], write: Writer, digests: list[Any],
        seen: Seen,
    ) -> None:  # fmt: skip
        host = self.kernels.unload(out)
        check_finite(self._host, task.name, result.places[0].file, result.places[0].dtype, host)
        if result.store.kind == "coded":
            self._store_codes(task, result, host.reshape(-1, task.cols), block, write, digests, seen)
            return
        parts = encode_rows(
            [place.dtype for place in result.places], host.reshape(block[1] - block[0], task.cols), self.arena.bytes,
            self._host,
        )  # fmt: skip
        for place, digest, data in zip(result.places, digests, parts, strict=True):
            start, _ = place.span(*block)
            digest.update(data)
            write(place.output, place.file, start, data)

    def _store_codes(
        self, task: Task, result: Result, rows: Host, block: tuple[int, int], write: Writer, digests: list[Any],
        seen: Seen,
    ) -> None:  # fmt: skip
        """Codes and scales of a block, tile by tile: a tile is whole blocks of scales."""
        dtypes = {place.part: place.dtype for place in result.places if place.dtype is not None}
        parameters = dict(result.store.recode)
        made: list[dict[str, npt.NDArray[np.uint8]]] = []
        for first, last in task.tiles(*block):
            tile = rows[first - block[0] : last - block[0]]
            made.append(recode_rows(parameters, tile, seen, dtypes, first_row=first))
        for place, digest in zip(result.places, digests, strict=True):
            data = bytes_of(np.concatenate([part[place.part] for part in made]))
            start, end = place.span(*block)
            assert end - start == data.nbytes
            if data.nbytes:
                digest.update(data)
                write(place.output, place.file, start, data)

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
                    if not np.array_equal(data, self._raw(other.terms[0], start, stop, "other")):
                        raise _buffers_differ(task.name)
                view = bytes_of(data)
                digest.update(view)
                for place in places:
                    write(place.output, place.file, place.start + start * row_bytes, view)
            extents += [
                Extent(place.output, place.file, *place.span(span_first, span_last), digest.hexdigest())
                for place in places
            ]
        return tuple(extents)

    def _left_out(self, task: Task, first: int, last: int) -> dict[str, float]:
        """What the sources changed in rows that the output does not hold: ‖Δ‖², of all together.

        Raises MergeFailedError(code `left-out`) where one may not differ from the base and does.
        """
        if task.base is None:
            self._check_buffers(task, first, last)
            return {}
        total = 0.0
        for block in self._blocks(task, first, last):
            _, values = self._load(task, *block)
            for k in range(len(task.entries)):
                found = self.kernels.unload(values[k])
                check_finite(self._host, task.name, task.results[0].places[0].file, None, found)
                squares = 0.0
                for start, stop in task.tiles(*block):
                    tile = found[(start - block[0]) * task.cols : (stop - block[0]) * task.cols]
                    squares += dot(tile, tile)
                total += squares
                if task.results[0].store.kind != "left" and found.any():
                    raise self._differs(task, k, squares**0.5)
        return {"left_out": total}

    def _differs(self, task: Task, source: int, norm: float) -> MergeFailedError:
        term = task.entries[source].terms[0]
        label = self.plan.sources[term.source].label
        if task.results[0].store.kind == "same":
            assert isinstance(term, DenseTerm)
            return MergeFailedError.of(
                "no-copy", f"{term.tensor} of {label} is no copy of {task.name}: they differ by ‖Δ‖ = {norm:.3g}",
                where="output.modules_to_save",
                why="PEFT saves embeddings beside LoRA on them, and a tied head beside its embeddings, as copies; what "
                "was trained whole is merged otherwise",
                fix="write tokenizer_source: base to merge rows of tokens as the base's others, or name what is meant "
                "under output.modules_to_save; of a tied head: untie the base first",
            )  # fmt: skip
        return MergeFailedError.of(
            "left-out",
            f"{task.name} of {label} differs from the base, by ‖Δ‖ = {norm:.3g} in the rows looked at",
            where="output.modules_to_save",
            why="an adapter has pairs for the matrices of layers; norms, biases, embeddings and heads it can only hold "
            "whole",
            fix="write modules_to_save: all to write such tensors whole, drop to leave them out (the report says how "
            "much), or kind: model",
        )

    def _check_buffers(self, task: Task, first: int, last: int) -> None:
        """Raise MergeFailedError(code `buffers-differ`) where tensors that are no numbers to merge are not the same."""
        one, *others = (entry.terms[0] for entry in task.entries)
        data = self._raw(one, first, last, "copy")
        for other in others:
            if not np.array_equal(data, self._raw(other, first, last, "other")):
                raise _buffers_differ(task.name)

    def _raw(self, term: Term, first: int, last: int, buffer: str) -> npt.NDArray[np.uint8]:
        assert isinstance(term, DenseTerm)
        stored = self.plan.sources[term.source].stored(term.tensor)
        if stored.decoder == "strided":
            rows = self.reader.raw_strided(term.source, term.tensor)[first:last]
            return np.ascontiguousarray(rows).reshape(-1).view(np.uint8)
        if stored.spec.dtype.bits % 8:
            raw = self.arena.bytes(buffer, stored.spec.nbytes)
            self.reader.read(term.source, stored.file, [RangeRead(stored.start, bytes_of(raw))])
            return raw
        raw = self.arena.bytes(buffer, (last - first) * stored.row_bytes)
        self.reader.read(term.source, stored.file, [RangeRead(stored.start + first * stored.row_bytes, bytes_of(raw))])
        return raw

    # ---------------------------------------------------------------- whole tensors

    def _check_memory(self, task: Task) -> None:
        needed = whole_task_bytes(self.plan, task)
        if needed > self.memory:
            raise MergeFailedError.of(
                "memory", f"{task.name} needs {needed} bytes at once, more than --memory allows ({self.memory})",
                fix="raise --memory",
            )  # fmt: skip

    def _ranks(self, task: Task, findings: Sequence[Findings]) -> tuple[Statistic, ...]:
        """The rank that each result asks for: what the first stage of a plan finds whose ranks follow from the data."""
        self._check_memory(task)
        from merger.pairs import rank_of

        found = []
        for index, result in enumerate(task.results):

            def dense(index: int = index) -> Host:
                return self._dense_delta(task, index, findings)

            found.append(np.array([rank_of(task, result, self.reader, dense)], np.int64))
        return tuple(found)

    def _whole(
        self, task: Task, findings: Sequence[Findings], write: Writer
    ) -> tuple[tuple[Extent, ...], list[dict[str, float]]]:
        """Results that need the whole tensor: pairs of factors, and what a method makes of whole deltas."""
        self._check_memory(task)
        from merger.pairs import make_pair, pack_pairs, store_pair

        extents: list[Extent] = []
        notes: list[dict[str, float]] = [{} for _ in task.results]
        for index, result in enumerate(task.results):
            if result.store.in_rows:
                extents += self._whole_rows(task, index, findings, write, notes[index])
                continue

            def dense(index: int = index, task: Task = task) -> Host:
                return self._dense_delta(task, index, findings)

            if isinstance(result.store, ExpertStore):
                experts = [expert_of(task, number) for number in range(result.store.experts)]
                made = [make_pair(e, e.results[index], self.reader, partial(dense, task=e)) for e in experts]
                pair = pack_pairs(made, result.store.rank)
            else:
                pair = make_pair(task, result, self.reader, dense)
            notes[index] = pair.notes
            extents += store_pair(task, result, pair, self._host, write)
        return tuple(extents), notes

    def _whole_rows(
        self, task: Task, index: int, findings: Sequence[Findings], write: Writer, notes: dict[str, float]
    ) -> list[Extent]:
        """A dense result of a method that needs tensors whole: the delta first, then base + delta in extents."""
        result = task.results[index]
        if result.space == "core":
            from merger.pairs import make_product

            delta: Host | tuple[Any, Any] = make_product(task, result, self.reader)
        else:
            delta = self._dense_delta(task, index, findings)
            if result.call.calibrate is not None:
                delta = self._calibrated(task, result.call, delta)

        def rows(first: int, last: int) -> Host:
            out: Host = self.arena.floats("out", last - first, task.cols)
            if isinstance(delta, tuple):
                multiply_rows(*delta, first, last, out)
            else:
                out[...] = delta[first:last]
            if task.base is not None:
                base = self.arena.floats("base", last - first, task.cols)
                self._operand(task, task.base, first, last, base)
                self._host.add(out.reshape(-1), base.reshape(-1))
            return out

        seen = _UNSEEN
        if result.store.looks_first:
            known = dict(result.store.recode)
            seen = self._seen(result, [look(known, rows(*span)) for span in task.extents()], notes)
        extents: list[Extent] = []
        for first, last in task.extents():
            out = self.kernels.load(rows(first, last).reshape(-1))
            digests = [hashlib.sha256() for _ in result.places]
            self._store_block(task, result, out, (first, last), write, digests, seen)
            extents += _written(result.places, digests, first, last)
        return extents

    def _dense_delta(self, task: Task, index: int, findings: Sequence[Findings]) -> Host:
        """The merged delta of one result, whole: (rows, cols). lambda is in it, the base is not."""
        if task.fused:
            findings = self._own_findings(task, Unit(0, 0, 0, 0, task.rows, None))
        call = task.results[index].call
        whole = blocks.whole_block(call)
        if whole is not None:
            return self._merge_whole(task, whole, balanced(call, findings[index].norms))
        state = blocks.Prepared.start(findings[index])
        delta = np.empty((task.rows, task.cols), np.float32)
        for block in self._blocks(task, 0, task.rows):
            base, values = self._load(task, *block)
            out = self._map(task, call, findings[index], state, base, values, block, add_base=False)
            delta[block[0] : block[1]] = self.kernels.unload(out).reshape(block[1] - block[0], task.cols)
        self._block_cache.clear()
        self.arena.clear()
        return delta

    def _merge_whole(self, task: Task, block: WholeBlock, call: Call) -> Host:
        """What a method's own block makes of all sources whole."""
        import torch

        base, values = self._load_whole(task)
        for x in values:
            check_finite(self._host, task.name, task.results[0].places[0].file, None, x)
        device, grams = torch.device(self.reader.spectral_device), self.reader.grams(task)
        deltas = [torch.from_numpy(x).to(device) for x in values]
        with device:  # what a block makes lies there too
            if task.statistics:
                merged = block.merge_measured(call, deltas, lambda k: grams(k).to(device))
            else:
                below = None if base is None else torch.from_numpy(base).to(device)
                merged = block.merge(call, deltas, below, vector=task.vector)
        delta: Host = np.ascontiguousarray(merged.cpu().numpy(), np.float32)
        if call.scale != 1.0:
            self._host.scale(delta.reshape(-1), call.scale)
        return delta

    def _calibrated(self, task: Task, call: Call, delta: Host) -> Host:
        """The merged delta with its singular values calibrated against the sources' deltas."""
        import torch

        from merger.methods import lowrank

        check_finite(self._host, task.name, task.results[0].places[0].file, None, delta)
        device = torch.device(self.reader.spectral_device)
        _, values = self._load_whole(task)
        counted = [k for k, entry in enumerate(task.entries) if entry.terms and call.weights[k]]
        with device:
            found = lowrank.spectrum_of(torch.from_numpy(delta).to(device))
            shares = (found.u_mk.T @ torch.from_numpy(values[k]).to(device).double() for k in counted)
            found = lowrank.calibrated(found, shares, found.v_nk, call.calibrate or 1.0, call.scale)
            return found.product().float().cpu().numpy()

    def _load_whole(self, task: Task) -> tuple[Host | None, Host]:
        """The base (rows, cols) and the K sources (K, rows, cols), float32."""
        base = None if task.base is None else np.empty((task.rows, task.cols), np.float32)
        values = np.empty((len(task.entries), task.rows, task.cols), np.float32)
        for first, last in task.extents():
            if base is not None and task.base is not None:
                self._operand(task, task.base, first, last, base[first:last])
            for k, entry in enumerate(task.entries):
                self._operand(task, entry.terms, first, last, values[k, first:last])
                if entry.subtract_base and base is not None:
                    self._host.subtract(values[k, first:last].reshape(-1), base[first:last].reshape(-1))
        return base, values


# -------------------------------------------------------------------- small parts


_NOTHING: Final = np.zeros(0, np.int64)
_UNSEEN: Final = Seen(np.zeros(0, np.float32))


def _written(places: Sequence[Place], digests: Sequence[Any], first: int, last: int) -> Iterator[Extent]:
    """What rows [first, last) put into each place: nothing of what goes with other rows."""
    for place, digest in zip(places, digests, strict=True):
        start, end = place.span(first, last)
        if end > start or place.covers == 1:
            yield Extent(place.output, place.file, start, end, digest.hexdigest())


def _mapped(unit: Unit, extents: tuple[Extent, ...], notes: Sequence[dict[str, float]], read_bytes: int) -> Receipt:
    """The receipt of a map, with what is to be said of each result."""
    merged = {name: value for one in notes for name, value in one.items()}
    several = tuple(notes) if len(notes) > 1 else ()
    return Receipt(unit.index, extents=extents, notes=merged, by_result=several, read_bytes=read_bytes)


def _buffers_differ(name: str) -> MergeFailedError:
    return MergeFailedError.of(
        "buffers-differ",
        f"{name} is not a float tensor and differs between the sources",
        why="integers and codes cannot be averaged",
        fix="use sources that share this buffer",
    )


def _extent(task: Task) -> TensorExtent:
    tiles = -(-task.rows // max(1, task.tile_rows))
    return TensorExtent(len(task.entries), task.rows * task.cols, task.length, tiles, task.name)


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
