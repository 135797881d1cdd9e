"""From ranges of files to rows of float32: dense tensors, views, permuted rows, low-rank products.

One reader belongs to one thread; its buffers are reused. Products are of PRODUCT_ROWS rows counted from row 0 of the
tensor, so that no cut changes a bit.
"""

from __future__ import annotations

import bisect
import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace as replace_field
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from merger.adapters.declare import WHOLE as AS_STORED
from merger.adapters.declare import View
from merger.clock import METER, Clock
from merger.errors import MergeFailedError
from merger.kernels.dispatch import CompiledKernels
from merger.planning.memory import PRODUCT_ROWS
from merger.planning.nouns import (
    SHORT_TAIL,
    DenseTerm,
    FormulaTerm,
    LowRankTerm,
    MergePlan,
    MovedProduct,
    Operand,
    Task,
    Term,
)
from merger.quantization.declare import DECODE_ELEMENTS, Grid
from merger.quantization.decode import decode_rows
from merger.quantization.pieces import Piece
from merger.storage.base import RangeRead
from merger.tensors import WHOLE, DType, Part, RowRun, StoredTensor

if TYPE_CHECKING:
    import torch

Bytes = npt.NDArray[np.uint8]
Rows = npt.NDArray[np.float32]
"""(rows, cols)."""


def torch_dtype(dtype: DType) -> torch.dtype:
    """The torch dtype of a safetensors code. Raises MergeFailedError(code `unsupported-dtype`)."""
    import torch

    if dtype.torch_name is None:
        raise MergeFailedError.of("unsupported-dtype", f"torch has no dtype for {dtype.code}")
    found = getattr(torch, dtype.torch_name)
    assert isinstance(found, torch.dtype)
    return found


def bytes_of(x: npt.NDArray[Any]) -> memoryview:
    """The bytes of a contiguous array, without a copy."""
    return memoryview(x.reshape(-1).view(np.uint8))  # type: ignore[arg-type] # numpy arrays are buffers


_INTEGERS: Final = {"I32": np.int32, "I64": np.int64}
Range = tuple[int, str, int, int]
"""(source, file, start, end)."""


def terms_of(task: Task) -> tuple[Term, ...]:
    """Every term of a task, but for its statistics."""
    return (*(task.base or ()), *(term for entry in task.entries for term in entry.terms))


LARGE_ROW: Final = 1 << 20
"""Bytes of one row of a part above which it is kept like a part that is needed whole: the next rows need it again."""


class Arena:
    """Named byte buffers that only grow: memory is taken once and used again."""

    def __init__(self) -> None:
        self._buffers: dict[str, Bytes] = {}

    def bytes(self, name: str, nbytes: int) -> Bytes:
        buffer = self._buffers.get(name)
        if buffer is None or buffer.size < nbytes:
            self._buffers.pop(name, None)
            buffer = np.empty(nbytes, np.uint8)
            self._buffers[name] = buffer
        return buffer[:nbytes]

    def floats(self, name: str, *shape: int) -> Rows:
        count = 1
        for size in shape:
            count *= size
        return self.bytes(name, count * 4).view(np.float32).reshape(shape)

    def clear(self) -> None:
        self._buffers.clear()


class OperandReader:
    """Reads the operands of one plan."""

    def __init__(self, plan: MergePlan, arena: Arena, *, factor_bytes: int) -> None:
        self.plan = plan
        self._compiled = CompiledKernels()
        self.arena = arena
        self.clock = Clock()
        self.spectral_device = "cpu"
        """Where dense matrices are decomposed, in torch's words."""
        self.read_bytes = 0
        self._factor_bytes = factor_bytes
        self._factors: OrderedDict[tuple[int, str], Rows] = OrderedDict()
        self._parts: OrderedDict[tuple[int, str, int, int], Bytes] = OrderedDict()
        self._doubled: tuple[tuple[int, str], Rows] | None = None
        self._held: dict[tuple[int, str], tuple[RangeRead, ...]] = {}
        self._wholes: dict[tuple[Operand, int], Rows] = {}

    def read(self, source: int, file: str, reads: Sequence[RangeRead]) -> None:
        """Fill the buffers from what was fetched, else from the source."""
        held = self._held.get((source, file), ())
        left = [read for read in reads if not _copy_from(held, read)]
        if left:
            catalog = self.plan.sources[source].catalog
            size = sum(read.into.nbytes for read in left)
            with self.clock.reading(catalog.store, file, size):
                catalog.store.read_into(file, left, pin=catalog.pins[file])
            self.read_bytes += size

    # ---------------------------------------------------------------- remote sources

    def missing(self, spans: Sequence[tuple[Task, int, int]]) -> list[Range]:
        """What rows [first, last) of tasks read from remote sources and is not kept here: disjoint, ascending."""
        wanted: dict[tuple[int, str], list[tuple[int, int]]] = {}
        for task, first, last in spans:
            needed: list[tuple[Term, int, int, int]] = [(term, first, last, task.cols) for term in terms_of(task)]
            for statistic in task.statistics:  # a Gram matrix has rows of its own, and is needed whole
                spec = self.plan.sources[statistic.source].stored(statistic.tensor).spec
                whole = task.cut == "whole"
                needed.append((statistic, 0, spec.rows, spec.cols) if whole else (statistic, first, last, task.cols))
            for term, start_row, stop_row, cols in needed:
                if not self.plan.sources[term.source].catalog.store.remote:
                    continue
                for file, start, end in self._ranges(term, start_row, stop_row, cols):
                    if end > start:
                        wanted.setdefault((term.source, file), []).append((start, end))
        return [(source, file, *span) for (source, file), found in wanted.items() for span in _merged(found)]

    def _ranges(self, term: Term, first: int, last: int, cols: int) -> Iterator[tuple[str, int, int]]:
        source = self.plan.sources[term.source]
        if isinstance(term, LowRankTerm | FormulaTerm):
            for name in term.tensors:
                if (term.source, name) not in self._factors:
                    stored = source.stored(name)
                    yield stored.file, stored.start, stored.start + stored.spec.nbytes
            return
        stored = source.stored(term.tensor)
        if stored.decoder == "strided":
            span = 1 + sum((n - 1) * s for n, s in zip(stored.spec.shape, stored.strides, strict=True))
            yield (
                stored.file,
                stored.start,
                stored.start + (span if stored.spec.numel else 0) * stored.spec.dtype.itemsize,
            )
        elif term.grid is not None or (stored.coded is None and stored.spec.dtype.bits % 8):
            yield stored.file, stored.start, stored.start + stored.spec.nbytes
        else:
            runs = ((0, first, last - first),) if term.runs is None else _clip(term.runs, first, last)
            for _, row, count in runs:
                if stored.coded is not None:
                    fold = cols // max(1, stored.spec.cols)
                    for part in stored.coded.parts:
                        low, high = part.span(stored.spec.cols, row * fold, (row + count) * fold)
                        at, size = part.stored.start, part.row_bytes
                        yield part.stored.file, at + low * size, at + high * size
                    continue
                start = stored.start + row * cols * stored.spec.dtype.itemsize
                yield stored.file, start, start + count * cols * stored.spec.dtype.itemsize

    def fetch(self, ranges: Sequence[Range]) -> None:
        """Hold these ranges in memory until `release`: all sources and files at once."""
        buffer = bytes_of(self.arena.bytes("fetched", sum(end - start for _, _, start, end in ranges)))
        reads: dict[tuple[int, str], list[RangeRead]] = {}
        at = 0
        for source, file, start, end in ranges:
            reads.setdefault((source, file), []).append(RangeRead(start, buffer[at : at + end - start]))
            at += end - start

        def read(key: tuple[int, str]) -> None:
            catalog = self.plan.sources[key[0]].catalog
            catalog.store.read_into(key[1], reads[key], pin=catalog.pins[key[1]])
            METER.read(catalog.store, sum(one.into.nbytes for one in reads[key]))

        with self.clock.fetching(len(reads), at):
            if len(reads) == 1:
                read(next(iter(reads)))
            else:
                with ThreadPoolExecutor(min(8, len(reads)), "raymerge-fetch") as threads:
                    list(threads.map(read, reads))
        self._held = {key: tuple(held) for key, held in reads.items()}
        self.read_bytes += at

    def release(self) -> None:
        """Let go of what `fetch` holds; its memory is used again."""
        self._held = {}

    def forget_wholes(self) -> None:
        """Let go of what was computed whole for the last task."""
        self._wholes.clear()

    def stored_rows(self, term: DenseTerm, first: int, into: memoryview) -> None:
        """Rows from `first` of a tensor as they lie in its file, as many as `into` holds."""
        stored = self.plan.sources[term.source].stored(term.tensor)
        self.read(term.source, stored.file, [RangeRead(stored.start + first * stored.row_bytes, into)])

    def _read_rows(self, term: DenseTerm, first: int, last: int, out: Rows) -> None:
        """Rows [first, last) of a stored tensor as float32 into `out` (rows, cols)."""
        if term.grid is not None:
            self._read_gridded(term, first, last, out)
            return
        stored = self.plan.sources[term.source].stored(term.tensor)
        if stored.decoder == "strided":
            whole = self.strided(term.source, term.tensor).reshape(-1, out.shape[1])
            if term.runs is None:
                out[...] = whole[first:last]
            else:
                out[...] = 0
                for at, row, count in _clip(term.runs, first, last):
                    out[at : at + count] = whole[row : row + count]
            return
        if stored.coded is not None:
            fold = out.shape[1] // max(1, stored.spec.cols)  # rows of the stored matrix in one of the task's
            runs = ((0, first, last - first),) if term.runs is None else tuple(_clip(term.runs, first, last))
            if term.runs is not None:
                out[...] = 0
            for at, row, count in runs:
                rows = out[at : at + count].reshape(-1, stored.spec.cols)
                self._decode(term.source, stored, row * fold, (row + count) * fold, rows)
            return
        row_bytes = out.shape[1] * stored.spec.dtype.itemsize
        raw = self.arena.bytes("raw", (last - first) * row_bytes)
        view = bytes_of(raw)
        if term.runs is None:
            start = stored.start + first * row_bytes
            self.read(term.source, stored.file, [RangeRead(start, view)])
        else:
            raw[...] = 0
            reads = [
                RangeRead(stored.start + row * row_bytes, view[at * row_bytes : (at + count) * row_bytes])
                for at, row, count in _clip(term.runs, first, last)
            ]
            if reads:
                self.read(term.source, stored.file, reads)
        self._widen(raw, stored.spec.dtype, out)

    def _widen(self, raw: Bytes, dtype: DType, out: Rows) -> None:
        """Stored bytes as float32, exactly (float64 is refused by the planner)."""
        if dtype.code == "BF16":
            self._compiled.widen_bf16(raw.view(np.uint16), out.reshape(-1))
        else:
            out.reshape(-1)[...] = raw.view({"F16": np.float16, "F32": np.float32}[dtype.code])

    def _decode(self, source: int, stored: StoredTensor, first: int, last: int, out: Rows) -> None:
        """Rows [first, last) of a coded tensor as float32 into `out`."""
        assert stored.coded is not None
        pieces = {}
        for number, part in enumerate(stored.coded.parts):
            low, high = part.span(stored.spec.cols, first, last)
            if high > low:
                pieces[part.role] = Piece(part, low, self._piece(source, part, number, low, high))
        decode_rows(stored.coded, stored.spec.cols, pieces, first, last, out)

    def _piece(self, source: int, part: Part, number: int, low: int, high: int) -> Bytes:
        """Rows [low, high) of a part, as bytes. What the next rows need again is kept for them."""
        size = (high - low) * part.row_bytes
        kept = part.covers == WHOLE or part.row_bytes > LARGE_ROW
        key = (source, part.stored.spec.name, low, high)
        if kept and key in self._parts:
            self._parts.move_to_end(key)
            return self._parts[key]
        raw = np.empty(size, np.uint8) if kept else self.arena.bytes(f"part-{number}", size)
        self.read(source, part.stored.file, [RangeRead(part.stored.start + low * part.row_bytes, bytes_of(raw))])
        rows = raw.reshape(high - low, part.row_bytes)
        if kept:
            self._parts[key] = rows
            while len(self._parts) > 1 and sum(p.nbytes for p in self._parts.values()) > self._factor_bytes:
                self._parts.popitem(last=False)
        return rows

    def raw_strided(self, source: int, name: str) -> npt.NDArray[Any]:
        """A tensor that lies as a view of its storage, whole, as (rows, cols) of bits."""
        stored = self.plan.sources[source].stored(name)
        spec = stored.spec
        span = 1 + sum((n - 1) * s for n, s in zip(spec.shape, stored.strides, strict=True)) if spec.numel else 0
        size = spec.dtype.itemsize
        bits = np.empty(span, f"u{size}")
        self.read(source, stored.file, [RangeRead(stored.start, bytes_of(bits))])
        view = np.lib.stride_tricks.as_strided(bits, spec.shape, [s * size for s in stored.strides], writeable=False)
        return np.ascontiguousarray(view).reshape(spec.rows, spec.cols)

    def strided(self, source: int, name: str) -> Rows:
        """The same as float32."""
        bits = self.raw_strided(source, name)
        out = np.empty(bits.shape, np.float32)
        self._widen(bits.reshape(-1).view(np.uint8), self.plan.sources[source].stored(name).spec.dtype, out)
        return out

    def factor(self, source: int, name: str, view: View = AS_STORED, *, keep: bool = True) -> Rows:
        """A stored factor as a float32 matrix, the way a view takes it. The last few files' worth are kept."""
        stored = self.stored_factor(source, name, keep=keep)
        matrix = stored.reshape(stored.shape[0], -1) if stored.ndim != 2 else stored
        if view == AS_STORED:
            return matrix
        rows, cols = (slice(None) if cut is None else slice(*cut) for cut in (view.rows, view.cols))
        matrix = matrix[rows, cols]
        return np.ascontiguousarray(matrix.T if view.transposed else matrix)

    def pair(self, term: LowRankTerm, *, keep: bool = True) -> tuple[Rows, Rows]:
        """A (rank, columns) and B (rows, rank) of a product; a diagonal between them is in A."""
        a = self.factor(term.source, term.a, term.a_view, keep=keep)
        b = self.factor(term.source, term.b, term.b_view, keep=keep)
        if term.diagonal:
            a = a * self.stored_factor(term.source, term.diagonal, keep=keep).reshape(-1, 1)
        return a, (_moved_rows(b, term) if isinstance(term, MovedProduct) else b)

    def stored_factor(self, source: int, name: str, *, keep: bool = True) -> npt.NDArray[Any]:
        """A stored tensor of an adapter, whole, in its own shape: float32, or the integers of indices as they are."""
        key = (source, name)
        if key in self._factors:
            self._factors.move_to_end(key)
            return self._factors[key]
        stored = self.plan.sources[source].stored(name)
        if stored.decoder == "strided":
            factor = self.strided(source, name).reshape(stored.spec.shape)
        else:
            raw = np.empty(stored.spec.nbytes, np.uint8)
            self.read(source, stored.file, [RangeRead(stored.start, bytes_of(raw))])
            if stored.spec.dtype.code in _INTEGERS:
                return raw.view(_INTEGERS[stored.spec.dtype.code]).reshape(stored.spec.shape)
            factor = np.empty(stored.spec.shape, np.float32)
            self._widen(raw, stored.spec.dtype, factor)
        if keep:
            self._factors[key] = factor
            while len(self._factors) > 1 and sum(f.nbytes for f in self._factors.values()) > self._factor_bytes:
                self._factors.popitem(last=False)
        return factor

    def grams(self, task: Task) -> Callable[[int], torch.Tensor]:
        """Reads the statistics of source k whole, float32, when asked."""

        def read(k: int) -> torch.Tensor:
            import torch

            term = task.statistics[k]
            return torch.from_numpy(self.factor(term.source, term.tensor, keep=False))

        return read

    def _add_low_rank(self, term: LowRankTerm, first: int, last: int, out: Rows, *, replace: bool) -> None:
        """out (rows, cols) = or += scaling·B[first:last]·A, in products of PRODUCT_ROWS rows."""
        import torch

        a_rn, b_mr = (torch.from_numpy(factor) for factor in self.pair(term))
        b_mr = b_mr[first:last]
        target = torch.from_numpy(out)
        for start, stop in _product_spans(last - first):
            product = torch.mm(b_mr[start:stop], a_rn)
            product.mul_(term.scaling)
            if term.round_to is not None:
                product = product.to(torch_dtype(term.round_to)).float()
            if replace:
                target[start:stop] = product
            else:
                target[start:stop] += product

    def operand(self, terms: Operand, first: int, last: int, out: Rows) -> None:
        """What an operand's terms make of rows [first, last), into `out` (rows, cols). `first` is a tile's."""
        whole = max((i for i, t in enumerate(terms) if isinstance(t, FormulaTerm) and t.whole), default=-1)
        if whole >= 0:
            out[...] = self._whole(terms[: whole + 1], out.shape[1])[first:last]
        elif not terms:
            out[...] = 0
        for position, term in enumerate(terms[whole + 1 :], start=whole + 1):
            self._term(term, first, last, out, replace=position == 0)

    def _read_gridded(self, term: DenseTerm, first: int, last: int, out: Rows) -> None:
        """Rows [first, last) of a stored tensor on its grid: whole blocks around them are read."""
        from merger.quantization import grid as grids

        grid = term.grid
        assert grid is not None
        plain = replace_field(term, grid=None)
        if grid.kind == "int8":
            self._read_rows(plain, first, last, out)
            out[...] = grids.round_rows_int8(out)
            return
        spec = self.plan.sources[term.source].stored(term.tensor).spec
        cols, block = spec.cols, grid.block
        doubled = self._absmax(plain, grid) if grid.double else None
        step = max(1, DECODE_ELEMENTS // max(1, cols))
        for start in range(first, last, step):
            stop = min(last, start + step)
            low, high = start * cols // block, -(-stop * cols // block)
            top, bottom = low * block // cols, min(spec.rows, -(-high * block // cols))
            rows = self.arena.floats("grid", bottom - top, cols)
            self._read_rows(plain, top, bottom, rows)
            flat = rows.reshape(-1)[low * block - top * cols : min(high * block, spec.numel) - top * cols]
            exact = grids.block_absmax(flat, block)
            made = grids.round_blocks(grid, flat, exact, exact if doubled is None else doubled[low:high])
            begin = start * cols - low * block
            out[start - first : stop - first] = made[begin : begin + (stop - start) * cols].reshape(-1, cols)

    def _absmax(self, term: DenseTerm, grid: Grid) -> Rows:
        """Every block's absmax of a tensor, quantised once more: one pass over it. The last is kept."""
        from merger.quantization import grid as grids

        key = (term.source, term.tensor)
        if self._doubled is None or self._doubled[0] != key:
            spec = self.plan.sources[term.source].stored(term.tensor).spec
            absmax = np.zeros(-(-spec.numel // grid.block), np.float32)
            step = max(1, DECODE_ELEMENTS // max(1, spec.cols))
            for start in range(0, spec.rows, step):
                stop = min(spec.rows, start + step)
                rows = self.arena.floats("grid", stop - start, spec.cols)
                self._read_rows(term, start, stop, rows)
                flat = np.abs(rows.reshape(-1))
                low = start * spec.cols // grid.block
                bounds = np.arange(low, -(-stop * spec.cols // grid.block)) * grid.block - start * spec.cols
                found = np.maximum.reduceat(flat, np.maximum(bounds, 0))
                absmax[low : low + found.size] = np.maximum(absmax[low : low + found.size], found)
            self._doubled = key, grids.round_absmax(absmax)
        return self._doubled[1]

    def _whole(self, terms: Operand, cols: int) -> Rows:
        """All rows of an operand whose last term needs them at once. Kept until the task is done."""
        key = (terms, cols)
        if key not in self._wholes:
            last = terms[-1]
            assert isinstance(last, FormulaTerm)
            rows = np.empty((last.rows, cols), np.float32)
            for start, stop in _product_spans(last.rows):
                self.operand(terms[:-1], start, stop, rows[start:stop])
            self._apply(last, 0, rows)
            self._wholes[key] = rows
        return self._wholes[key]

    def _apply(self, term: FormulaTerm, first: int, out: Rows) -> None:
        """A formula on rows from `first`, in place."""
        import torch

        from merger.adapters.formulas import apply_formula

        tensors = {role: torch.from_numpy(self.stored_factor(term.source, name)) for role, name in term.roles}
        rows = torch.from_numpy(out)
        with torch.no_grad():
            made = apply_formula(term.kind, rows, first, tensors, dict(term.numbers))
            if term.adds:
                if len(made) == len(rows):  # nothing is added where it has no part
                    rows += made
            else:
                rows[...] = made

    def _term(self, term: Term, first: int, last: int, out: Rows, *, replace: bool) -> None:
        if isinstance(term, LowRankTerm):
            self._add_low_rank(term, first, last, out, replace=replace)
        elif isinstance(term, FormulaTerm):
            if replace:
                out[...] = 0
            self._apply(term, first, out)
        elif replace:
            self._read_rows(term, first, last, out)
            if term.share != 1.0:
                out *= np.float32(term.share)
        elif term.runs is None or any(True for _ in _clip(term.runs, first, last)):
            extra = self.arena.floats("term", last - first, out.shape[1])
            self._read_rows(term, first, last, extra)
            if term.share != 1.0:
                extra *= np.float32(term.share)
            # Only the rows that it names: -0 + 0 is +0, and no bit may depend on the block that a row lies in.
            runs = ((0, 0, last - first),) if term.runs is None else _clip(term.runs, first, last)
            for at, _, count in runs:
                self._compiled.add(out[at : at + count].reshape(-1), extra[at : at + count].reshape(-1))


def _moved_rows(b_mr: Rows, term: MovedProduct) -> Rows:
    """The rows of B where a product's rows stand."""
    moved = np.zeros((term.height, b_mr.shape[1]), np.float32)
    for run in term.runs:
        moved[run.first : run.first + run.count] = b_mr[run.stored : run.stored + run.count]
    return moved


def multiply_rows(p_mk: torch.Tensor, q_kn: torch.Tensor, first: int, last: int, out: Rows) -> None:
    """out (rows, cols) = P[first:last]·Q, float32, in products of PRODUCT_ROWS rows. `first` is a tile's."""
    import torch

    target = torch.from_numpy(out)
    for start, stop in _product_spans(last - first):
        torch.mm(p_mk[first + start : first + stop], q_kn, out=target[start:stop])


def _product_spans(rows: int) -> Iterator[tuple[int, int]]:
    """[0, rows) in products; a short tail joins the last."""
    bounds = list(range(0, rows, PRODUCT_ROWS))
    if len(bounds) > 1 and rows - bounds[-1] < SHORT_TAIL:
        bounds.pop()
    return itertools.pairwise([*bounds, rows])


def _clip(runs: Sequence[RowRun], first: int, last: int) -> Iterator[tuple[int, int, int]]:
    """Runs, which ascend, inside rows [first, last): (row relative to first, stored row, count)."""
    at = bisect.bisect_right(runs, first, key=lambda run: run.first + run.count)
    for run in itertools.islice(runs, at, None):
        start, stop = max(run.first, first), min(run.first + run.count, last)
        if start >= stop:
            return
        yield start - first, run.stored + start - run.first, stop - start


def _merged(spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Spans that touch or overlap as one, ascending."""
    merged: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    return merged


def _copy_from(held: Sequence[RangeRead], read: RangeRead) -> bool:
    """Fill a read from one of the ranges in memory. False where none covers it."""
    for have in held:
        offset = read.start - have.start
        if offset >= 0 and offset + read.into.nbytes <= have.into.nbytes:
            read.into.cast("B")[:] = have.into[offset : offset + read.into.nbytes]
            return True
    return False
