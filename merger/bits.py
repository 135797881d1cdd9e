"""Tasks on checkpoints in bfloat16, from the sources' bits to the output's: the fast way of merger/unit.py.

Most merges of models are one dense bfloat16 tensor a source, elementwise blocks, one dense bfloat16 result. They need
no float32 copies: the kernels of merger/kernels/bits.py go from bits to bits, and a whole block is one call. All other
tasks take the plain way, which defines the bytes; where both can be taken they are the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from merger.kernels import LANES
from merger.kernels.hashing import keep_limit
from merger.kernels.native import BITS
from merger.methods import blocks
from merger.methods.rounds import Findings
from merger.methods.tiles import TensorExtent
from merger.operands import Arena, OperandReader, bytes_of
from merger.planning.nouns import DenseTerm, MergePlan, Operand, Task
from merger.quantization.encode import check_largest
from merger.receipts import Extent

_ACCUMULATE, _ADD, _ELECT = range(3)
"""Ways to combine, as merger/kernels/bits.py numbers them."""
_ROUNDS: Final = ({"trim_high", "trim_low"}, {"sums"}, set[str]())
"""What prepare may need to know: of a trim, of a drop that is rescaled to the L1 norm, nothing."""

Bits = npt.NDArray[np.uint16]
Write = Callable[[int, str, int, memoryview], None]
Blocks = Callable[[Task, int, int, int], Iterator[tuple[int, int]]]
"""(task, first, last, bytes a row) → spans of rows that memory has room for, whole tiles."""


def goes_by_bits(plan: MergePlan, task: Task) -> bool:
    """Whether a task can go from bits to bits. A function of the plan alone."""
    if len(task.results) != 1 or task.cut != "rows" or task.statistics or not task.entries:
        return False
    result = task.results[0]
    call, store = result.call, result.store
    if store.kind != "dense" or store.measure or any(p.dtype is None or p.dtype.code != "BF16" for p in result.places):
        return False
    if any(place.part != "dense" or place.covers != 1 for place in result.places):
        return False
    if call.combine not in {"sum", "mean", "elect"} or call.balance or call.calibrate is not None:
        return False
    if call.prepare not in {"none", "trim", "drop"} or call.rescale == "inverse" or call.scope != "tensor":
        return False
    if set(task.rounds) not in _ROUNDS or (task.rounds and not task.fused):
        return False
    if call.prepare != "none" and task.base is None:
        return False
    return (task.base is None or _stored_bits(plan, task.base)) and all(
        _stored_bits(plan, entry.terms) and entry.subtract_base == (task.base is not None) for entry in task.entries
    )


def _stored_bits(plan: MergePlan, terms: Operand) -> bool:
    """Whether an operand is the bits of a tensor as they lie in the file."""
    if len(terms) != 1 or not isinstance(terms[0], DenseTerm):
        return False
    term = terms[0]
    if term.runs is not None or term.grid is not None or term.share != 1.0:
        return False
    stored = plan.sources[term.source].stored(term.tensor)
    return stored.decoder == "dense" and stored.coded is None and stored.spec.dtype.code == "BF16"


class BitsMerger:
    """Merges such tasks on one thread, in its runner's buffers."""

    def __init__(self, arena: Arena, reader: OperandReader, blocks_of: Blocks) -> None:
        self._arena = arena
        self._reader = reader
        self._blocks_of = blocks_of
        self._lanes = np.empty((2, LANES))

    def run(self, task: Task, first: int, last: int, write: Write) -> tuple[Extent, ...]:
        """Merge rows [first, last), write them, and digest each extent.

        Raises MergeFailedError(code `not-finite`), and what reading and writing raise.
        """
        call = task.results[0].call
        row_bytes = 2 * task.cols * (len(task.entries) + (task.base is not None) + 1)
        spans = list(self._blocks_of(task, first, last, row_bytes))
        held: tuple[Bits, Bits] | None = None
        findings = Findings()
        if "trim_high" in task.rounds:
            held, findings = self._trim_rounds(task, spans)
        elif "sums" in task.rounds:
            held, findings = self._drop_round(task, spans)
        state = blocks.Prepared.start(findings)
        extents: list[Extent] = []
        for start, stop in task.row_spans():
            if start < first or stop > last:
                continue
            digests = [hashlib.sha256() for _ in task.results[0].places]
            for block in [(start, stop)] if held else self._blocks_of(task, start, stop, row_bytes):
                base, sources = _rows(task, *held, *block) if held else self._load(task, *block)
                if call.prepare == "trim":
                    self._trim(task, findings, state, base, sources)
                elif call.prepare == "drop" and held is None:
                    self._drop(task, base, sources, block, np.zeros((len(sources), 2)))
                self._store(task, self._merged(task, findings, base, sources), block, write, digests)
            extents += [
                Extent(place.output, place.file, *place.span(start, stop), digest.hexdigest())
                for place, digest in zip(task.results[0].places, digests, strict=True)
            ]
        return tuple(extents)

    # ---------------------------------------------------------------- reading

    def _load(self, task: Task, first: int, last: int) -> tuple[Bits, Bits]:
        """Bits of the base (empty without) and of the K sources: (n,) and (K, n)."""
        count = (last - first) * task.cols
        base = self._take("base bits", count if task.base is not None else 0)
        sources = self._take("source bits", len(task.entries) * count).reshape(len(task.entries), count)
        if task.base is not None:
            self._read(task.base, first, base)
        for entry, source in zip(task.entries, sources, strict=True):
            self._read(entry.terms, first, source)
        return base, sources

    def _read(self, terms: Operand, first: int, into: Bits) -> None:
        (term,) = terms
        assert isinstance(term, DenseTerm)
        self._reader.stored_rows(term, first, bytes_of(into))

    def _take(self, name: str, count: int) -> Bits:
        return self._arena.bytes(name, 2 * count).view(np.uint16)

    # ---------------------------------------------------------------- rounds

    def _trim_rounds(
        self, task: Task, spans: Sequence[tuple[int, int]]
    ) -> tuple[tuple[Bits, Bits] | None, Findings]:  # fmt: skip
        """Both histograms. Returns the block, where there is but one, and the thresholds."""
        call, findings = task.results[0].call, Findings()
        held: tuple[Bits, Bits] | None = None
        for name in task.rounds:
            counts = blocks.start_round(name, call, _extent(task))
            for block in spans:
                base, sources = held or self._load(task, *block)
                for k, source in enumerate(sources):
                    if name == "trim_high":
                        BITS.count_high(source, base, self._scratch(1), counts[k])
                    else:
                        BITS.count_low(source, base, findings.prefixes[k][0], self._scratch(1), counts[k])
                held = (base, sources) if len(spans) == 1 else None
            findings = blocks.end_round(name, call, counts, _extent(task), findings)
        return held, findings

    def _drop_round(
        self, task: Task, spans: Sequence[tuple[int, int]]
    ) -> tuple[tuple[Bits, Bits] | None, Findings]:  # fmt: skip
        """Σ|x| before and after the drop. Returns the block, dropped, where there is but one, and the factors."""
        call = task.results[0].call
        sums = np.zeros((len(task.entries), 2))
        for block in spans:
            base, sources = self._load(task, *block)
            self._drop(task, base, sources, block, sums)
        found = blocks.end_round("sums", call, sums, _extent(task), Findings())
        return ((base, sources) if len(spans) == 1 else None), found

    # ---------------------------------------------------------------- prepare, combine, store

    def _drop(self, task: Task, base: Bits, sources: Bits, block: tuple[int, int], sums: npt.NDArray[Any]) -> None:
        call, (first, _) = task.results[0].call, block
        bounds = np.array([(row - first) * task.cols for row in (first, *(stop for _, stop in task.tiles(*block)))])
        for k, source in enumerate(sources):
            if not call.keeps_all(k):
                key = call.keys[k]
                BITS.drop(
                    source, base, bounds, first * task.cols, key & 0xFFFFFFFF, key >> 32,
                    keep_limit(call.densities[k]), self._scratch(2), self._lanes, sums[k],
                )  # fmt: skip

    def _trim(self, task: Task, findings: Findings, state: blocks.Prepared, base: Bits, sources: Bits) -> None:
        call = task.results[0].call
        for k, source in enumerate(sources):
            if not call.keeps_all(k):
                threshold, _ = findings.thresholds[k]
                state.left[k] -= BITS.trim(source, base, threshold, state.left[k], self._scratch(1))

    def _merged(self, task: Task, findings: Findings, base: Bits, sources: Bits) -> Bits:
        result = task.results[0]
        call, count = result.call, len(sources)
        rescaled = call.rescale == "l1" and call.prepare != "none"
        factors = [
            findings.factors[k] if rescaled and not call.keeps_all(k) and findings.factors else 1.0
            for k in range(count)
        ]
        combine, weights, divide, divisor = _ADD, list(call.weights), 0, 1.0
        if call.accumulates and base.size:
            combine, weights = _ACCUMULATE, [weight * call.scale for weight in weights]
        elif call.combine == "elect":
            combine = _ELECT
            divide = 0 if not call.normalize else (1 if call.divisor == "weights" else 2)
        elif call.normalize:
            total = blocks.divisor_of(call)
            divide, divisor = int(total is not None), total or 1.0
        out = self._take("merged bits", sources.shape[1])
        largest = BITS.merge(
            sources, base, np.array(factors, np.float32), np.array(weights, np.float32), combine,
            call.elect == "weighted", call.elect == "frequency", divide, divisor, call.scale,
            self._scratch(count + 4), out,
        )  # fmt: skip
        place = result.places[0]
        check_largest(largest, task.name, place.file, place.dtype)
        return out

    def _store(self, task: Task, merged: Bits, block: tuple[int, int], write: Write, digests: Sequence[Any]) -> None:
        data = bytes_of(merged)
        for place, digest in zip(task.results[0].places, digests, strict=True):
            digest.update(data)
            write(place.output, place.file, place.span(*block)[0], data)

    def _scratch(self, rows: int) -> npt.NDArray[np.float32]:
        return self._arena.floats("chunks", rows, LANES)


def _rows(task: Task, base: Bits, sources: Bits, first: int, last: int) -> tuple[Bits, Bits]:
    """Rows [first, last) of a whole tensor."""
    span = slice(first * task.cols, last * task.cols)
    if span == slice(0, sources.shape[1]):
        return base, sources
    return base[span], np.ascontiguousarray(sources[:, span])


def _extent(task: Task) -> TensorExtent:
    return TensorExtent(len(task.entries), task.rows * task.cols, task.length, name=task.name)
