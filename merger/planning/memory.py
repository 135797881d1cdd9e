"""How much memory a task needs: pure functions of the plan.

Three quantities, used by these names everywhere:

    allowed    --memory, shared by the workers of a process
    fixed      what one worker holds whatever the block: tiles, products, factors
    per row    what each further row of a block adds

The block adapts to what is allowed; a plan whose smallest block does not fit is refused. No torch here.
"""

from __future__ import annotations

from typing import Final

from merger.adapters.declare import WHOLE as AS_STORED
from merger.methods import METHODS
from merger.methods.combination import combines
from merger.methods.whole import WholeBlock, core_bytes
from merger.planning.nouns import (
    SHORT_TAIL,
    DenseTerm,
    ExpertStore,
    FormulaTerm,
    LowRankTerm,
    MergePlan,
    MovedProduct,
    Result,
    Task,
    Term,
)
from merger.quantization.declare import DECODE_ELEMENTS, SCRATCH_BYTES, Grid
from merger.tensors import UNREAD, WHOLE, StoredTensor

TILE_ELEMENTS: Final = 1 << 16
"""Elements worked on at once: a few such tiles stay in a core's cache."""
PRODUCT_ROWS: Final = 64
"""Rows of one matrix product, counted from row 0 of the tensor: BLAS orders sums by shape."""
EXTENT_BYTES: Final = 16 << 20
FUSED_ELEMENTS: Final = 64 << 20
"""Largest tensor that one unit does whole, its statistics included."""


IDLE_BYTES: Final = 500 << 20
"""What a worker's process takes before it holds a buffer."""


def tile_rows(cols: int, *, products: bool) -> int:
    """Rows of a tile: about TILE_ELEMENTS, and whole products where there are any."""
    rows = max(1, TILE_ELEMENTS // max(1, cols))
    if not products:
        return rows
    return max(PRODUCT_ROWS, rows // PRODUCT_ROWS * PRODUCT_ROWS)


def extent_rows(tile: int, row_bytes: int) -> int:
    """Rows of an extent: as many whole tiles as 16 MiB hold, at least one."""
    return max(1, EXTENT_BYTES // max(1, tile * row_bytes)) * tile


def _terms(task: Task) -> list[Term]:
    """The terms that are held at a time: of packed experts those of one, whose factors are the others' too."""
    if any(isinstance(result.store, ExpertStore) for result in task.results):
        return [entry.terms[0] for entry in task.entries if entry.terms]
    return [*(task.base or ()), *(term for entry in task.entries for term in entry.terms)]


def _whole_bytes(stored: StoredTensor) -> bool:
    """Whether a row is a number of bytes: sub-byte types that are copied are read whole."""
    return stored.coded is not None or stored.spec.dtype.bits % 8 == 0


def _decoding_bytes(stored: StoredTensor) -> int:
    """Bytes held to decode any rows of a coded tensor: scratch, and the parts that are needed whole."""
    if stored.coded is None:
        return 0
    scratch = SCRATCH_BYTES * max(stored.spec.cols, min(stored.spec.numel, DECODE_ELEMENTS))
    read = [part for part in stored.coded.parts if part.covers != UNREAD]
    return scratch + sum(part.stored.spec.nbytes if part.covers == WHOLE else 2 * part.row_bytes for part in read)


def _grid_bytes(stored: StoredTensor, grid: Grid) -> int:
    """Bytes held to round rows through a grid: scratch, and with double quantisation the whole tensor's absmaxes."""
    scratch = SCRATCH_BYTES * (grid.block + 2 * stored.spec.cols + min(stored.spec.numel, DECODE_ELEMENTS))
    return scratch + (5 * 8 * -(-stored.spec.numel // grid.block) if grid.double else 0)


def buffers_per_row(plan: MergePlan, task: Task) -> int:
    """Bytes that one row of a block takes: raw bytes, float32 of base and sources, the result and its encoding."""
    raw = max(
        (
            _row_bytes(plan.sources[t.source].stored(t.tensor), task.cols)
            for t in (*_terms(task), *task.statistics)
            if isinstance(t, DenseTerm) and _whole_bytes(plan.sources[t.source].stored(t.tensor))
        ),
        default=0,
    )
    wide = 4 * task.cols
    extra = int(any(len(entry.terms) > 1 for entry in task.entries))
    if any(isinstance(term, DenseTerm) and term.grid is not None for term in task.base or ()):
        extra += 3  # the base as it was, as it is, and the delta, for the report
    return raw + wide * ((task.base is not None) + len(task.entries) + len(task.statistics) + 2 + extra)


def _row_bytes(stored: StoredTensor, cols: int) -> int:
    """Stored bytes of one row of a task, which may hold several of the stored matrix."""
    if stored.coded is not None:
        return stored.row_bytes * max(1, cols // max(1, stored.spec.cols))
    return cols * stored.spec.dtype.itemsize


def _largest_tile(task: Task) -> int:
    """Rows of the largest tile: a short tail joins the one before it."""
    return min(task.rows, task.tile_rows + (SHORT_TAIL if task.tile_rows > 1 else 0))


def fixed_bytes(plan: MergePlan, task: Task) -> int:
    """Bytes held whatever the block: tile scratch, histograms, products and the factors of the adapters."""
    scratch = 4 * max(TILE_ELEMENTS, task.cols) * (len(task.entries) + 3)
    histograms = 8 * (1 << 16) * len(task.entries) * (2 * len(task.results)) if task.rounds else 0
    products, factors = 0, 0
    for term in _terms(task):
        if isinstance(term, LowRankTerm | FormulaTerm):
            products = 4 * 2 * (PRODUCT_ROWS + 16) * task.cols
            specs = [plan.sources[term.source].stored(name).spec for name in term.tensors]
            factors += sum(spec.nbytes for spec in specs)
        if isinstance(term, MovedProduct):
            factors += 4 * term.height * term.rank
        if isinstance(term, LowRankTerm):
            if (term.a_view, term.b_view, term.diagonal) != (AS_STORED, AS_STORED, ""):
                factors += sum(2 * 4 * spec.numel for spec in specs)
        elif isinstance(term, FormulaTerm):
            products = max(products, 4 * 3 * _largest_tile(task) * task.cols)
            factors += formula_bytes(term, task.rows, task.cols) if term.whole else 0
        elif plan.sources[term.source].stored(term.tensor).decoder == "strided":
            factors += 2 * plan.sources[term.source].stored(term.tensor).spec.nbytes
        else:
            stored = plan.sources[term.source].stored(term.tensor)
            factors += _decoding_bytes(stored) + (0 if term.grid is None else _grid_bytes(stored, term.grid))
    own = 0
    if any(r.call.combine == "block" or r.call.prepare == "magprune" for r in task.results):
        # Methods of their own work on a tile in float64, and on a vector whole where they need its one row.
        own = (
            8 * min(task.rows, task.tile_rows + SHORT_TAIL) * task.cols * (len(task.entries) + len(task.statistics) + 8)
        )
    if any(result.store.kind == "coded" for result in task.results):
        own += 40 * min(task.rows, task.tile_rows + SHORT_TAIL) * task.cols  # codes are made a tile at a time
    if any(dict(result.store.recode).get("nested_block") for result in task.results):
        own += task.rows * task.cols  # the scales of all blocks of 32 or more, in float32 and as they are quantised
    return scratch + histograms + products + factors + own


def whole_task_bytes(plan: MergePlan, task: Task) -> int:
    """Bytes of a task that holds its tensor whole: factors in float64 and the core, or the dense delta and its SVD."""
    factors = total_rank = 0
    for term in _terms(task):
        if isinstance(term, LowRankTerm):
            source = plan.sources[term.source]
            a, b = source.stored(term.a).spec, source.stored(term.b).spec
            factors += a.nbytes + b.nbytes + 4 * 8 * (a.numel + b.numel)
            total_rank += term.rank
            if isinstance(term, MovedProduct):
                factors += (4 + 8 * 4) * term.height * term.rank
    low_rank = factors + 8 * 6 * total_rank * total_rank
    needed = 0
    for result in task.results:
        if result.store.in_rows and result.space == "delta":
            needed = max(needed, _whole_rows_bytes(plan, task, result))
        elif result.space == "core":
            block = METHODS[result.call.method].core if result.call.method in METHODS else None
            work = (core_bytes if block is None else block.bytes)(task.rows, task.cols, total_rank, len(task.entries))
            rows = _reading_bytes(plan, task) if result.store.in_rows else 0
            needed = max(needed, low_rank + work + rows)
        elif is_dense_svd(task, result):
            small = min(task.rows, task.cols)
            dense = (4 + 8 + 8) * task.rows * task.cols + 8 * 4 * small * small
            if not task.low_rank:
                dense += _reading_bytes(plan, task)
            if result.call.calibrate is not None or _whole_block(result) is not None:
                dense += _whole_rows_bytes(plan, task, result)
            needed = max(needed, dense + factors)
        else:
            needed = max(needed, low_rank)
    return needed


def formula_bytes(term: FormulaTerm, rows: int, cols: int) -> int:
    """Bytes of a formula that needs all rows: the rows, and what it makes of them."""
    small = min(rows, cols)
    spectral = 8 * 3 * small * max(rows, cols) if term.kind in {"pissa", "olora"} else 0
    copies = 8 if term.kind == "peft" else 4
    return copies * 4 * rows * cols + spectral


def _whole_block(result: Result) -> WholeBlock | None:
    spec = METHODS.get(result.call.method)
    return None if spec is None or result.call.combine != "block" else spec.whole


def _reading_bytes(plan: MergePlan, task: Task) -> int:
    """Bytes held while an extent is read or written."""
    rows = min(task.rows, task.extent_rows + SHORT_TAIL)
    return fixed_bytes(plan, task) + rows * buffers_per_row(plan, task)


def _whole_rows_bytes(plan: MergePlan, task: Task, result: Result) -> int:
    """Bytes of base, sources and result as whole float32 matrices, and of what the method makes of them."""
    size, small = task.rows * task.cols, min(task.rows, task.cols)
    held = 4 * size * (len(task.entries) + 2)
    block = _whole_block(result)
    if block is not None:
        held += block.bytes(task.rows, task.cols, len(task.entries))
    if result.call.calibrate is not None:
        held += 8 * (4 * size + 4 * small * small)
    return held + _reading_bytes(plan, task)


def is_dense_spectral(task: Task, result: Result) -> bool:
    """Whether a result decomposes a dense matrix: an svd of what is no linear combination, or a method on whole
    deltas."""
    whole = result.store.in_rows and result.space == "delta" and task.cut == "whole"
    return whole or is_dense_svd(task, result)


def is_dense_svd(task: Task, result: Result) -> bool:
    """Whether a result needs the merged delta whole and dense: an svd of what is no linear combination."""
    linear = result.call.prepare == "none" and result.call.combine in ("sum", "mean")
    by_dense = not (linear or combines(result.call)) or result.store.exact or not task.low_rank
    return task.cut == "whole" and result.store.kind == "svd" and result.space == "delta" and by_dense


def smallest_bytes(plan: MergePlan, task: Task) -> int:
    """The least memory one worker can do the task with: one tile a block, or the whole of it."""
    if task.cut == "whole":
        return whole_task_bytes(plan, task)
    if task.results[0].store.kind == "copy" or (not task.results[0].store.writes and task.base is None):
        return 2 * 1024
    tile = _largest_tile(task)
    return int((fixed_bytes(plan, task) + tile * buffers_per_row(plan, task)) / 0.85) + 1


def peak_bytes(plan: MergePlan) -> int:
    """The least memory one worker can do the plan with. Kept beside the plan's digest and units: it is often asked."""
    kept = vars(plan)
    if _PEAK not in kept:
        kept[_PEAK] = max((smallest_bytes(plan, task) for task in plan.tasks), default=0)
    found: int = kept[_PEAK]
    return found


_PEAK: Final = "_peak_bytes"


def forward_bytes(plan: MergePlan) -> int:
    """Bytes that the forward pass for gates takes: every parameter of the base in float32, and its largest tensor once
    more. 0 where there is none."""
    if plan.gates is None or plan.gates.mode == "cheap_embed":
        return 0
    sizes = [4 * stored.spec.numel for stored in plan.sources[plan.gates.base].catalog.tensors.values()]
    return sum(sizes) + max(sizes, default=0)
