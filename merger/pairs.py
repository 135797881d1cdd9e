"""Results that are LoRA pairs: factors joined, merged as PEFT merges them, or cut from the core or a dense delta.

Needs the whole of a module and torch; everything here happens once, in one unit.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from merger.errors import MergeFailedError
from merger.kernels.dispatch import CompiledKernels, Host
from merger.kernels.hashing import keep_limit
from merger.methods import factors, lowrank
from merger.methods.blocks import core_block, tile_block
from merger.methods.combination import combines
from merger.methods.rounds import Call, balanced
from merger.methods.tiles import TensorExtent
from merger.methods.whole import Grams
from merger.operands import OperandReader, bytes_of, torch_dtype
from merger.outliers import NOTE
from merger.planning.memory import EXTENT_BYTES
from merger.planning.nouns import LowRankTerm, Result, Task
from merger.quantization.encode import check_finite
from merger.receipts import Extent

_Factors = tuple[Tensor, Tensor, float]
"""A (rank, cols), B (rows, rank), both float32, and the scaling."""


@dataclass(frozen=True, slots=True)
class MergedPair:
    """A (rank, cols) and B (rows, rank), not yet cast, and what the report says of them."""

    a: Tensor
    b: Tensor
    notes: dict[str, float] = field(default_factory=dict)


def rank_of(task: Task, result: Result, reader: OperandReader, dense: Callable[[], Host]) -> int:
    """The least rank, 1 or more, that keeps the energy that the store asks for."""
    assert result.store.energy is not None
    pairs = _pairs(task, reader) if task.low_rank else []
    return max(1, _truncated(task, result, pairs, reader, dense).rank_for(result.store.energy))


def make_pair(task: Task, result: Result, reader: OperandReader, dense: Callable[[], Host]) -> MergedPair:
    """Merge one module into a pair. `dense` gives the merged delta (rows, cols) where the store needs it whole."""
    pairs = _pairs(task, reader) if task.low_rank else []
    made = _merged_pair(task, result, pairs, reader, dense)
    sizes = {f"{NOTE}{i}": _norm(*pair) ** 2 for i, pair in _present(pairs)}
    return replace(made, notes=made.notes | sizes)


def _merged_pair(
    task: Task, result: Result, pairs: Sequence[_Factors | None], reader: OperandReader, dense: Callable[[], Host]
) -> MergedPair:
    store, call = result.store, result.call
    if store.kind == "factors":
        return _peft_factors(call, pairs)
    if store.kind == "concat" and result.space == "delta":
        weighed = _weighed(call, pairs)
        return replace(_concat(task, weighed, store.rank, pairs), notes=_notes_of_factors(call, weighed))
    pair = _truncated(task, result, pairs, reader, dense)
    notes = (_notes_of_factors(call, _weighed(call, pairs)) if task.low_rank else {}) | {
        "energy": pair.energy, "lost": pair.lost, "rank": float(pair.a_rn.shape[0]),
        "rank_95": float(pair.rank_for(0.95)),
    }  # fmt: skip
    if store.energy is not None and max(1, pair.rank_for(store.energy)) != store.rank:
        raise MergeFailedError.of(
            "rank-moved", f"{task.name} was laid out at rank {store.rank}, and {pair.rank_for(store.energy)} keeps "
            f"{store.energy:g} of its energy", where=result.places[0].file,
            why="the singular values are not those that were found in the first stage",
            fix="use one kind of machine and one version for all of a run, and run it again with --restart",
        )  # fmt: skip
    if store.clamp is not None:
        return MergedPair(*_clamp(pair.a_rn, pair.b_mr, store.clamp), notes)
    return MergedPair(pair.a_rn, pair.b_mr, notes)


def _weighed(call: Call, pairs: Sequence[_Factors | None]) -> Call:
    """The call with weights that are numbers now: balanced by norms, or factors that the inner products decide."""
    if call.balance:
        call = balanced(call, [0.0 if pair is None else _norm(*pair) for pair in pairs])
    if not combines(call):
        return call
    gram_KK = np.array([[_inner(one, other) for other in pairs] for one in pairs], np.float64)
    found = tile_block(call).factors_of(call, gram_KK, TensorExtent(len(pairs), 0, 0))
    return replace(call, combine="sum", normalize=False, weights=tuple(float(factor) for factor in found))


def _notes_of_factors(call: Call, weighed: Call) -> dict[str, float]:
    return tile_block(call).notes(call, (np.array(weighed.weights),)) if combines(call) else {}


def _inner(one: _Factors | None, other: _Factors | None) -> float:
    """⟨s·B·A, t·D·C⟩ without the products: s·t·⟨A·Cᵀ, Bᵀ·D⟩, float64."""
    if one is None or other is None:
        return 0.0
    (a, b, s), (c, d, t) = one, other
    return s * t * float(((a.double() @ c.double().T) * (b.double().T @ d.double())).sum())


def _truncated(
    task: Task, result: Result, pairs: Sequence[_Factors | None], reader: OperandReader, dense: Callable[[], Host]
) -> lowrank.Pair:
    """The merged delta cut to the store's rank, with all its singular values."""
    store, split = result.store, result.store.spectrum == "split"
    if not task.low_rank:
        return _truncated_dense(dense(), store.rank, reader.spectral_device, split=split)
    call = _weighed(result.call, pairs)
    linear = result.space == "delta" and _is_linear(call) and not store.exact
    if result.space == "core" or call.calibrate is not None:
        found = _spectrum(task, result, call, pairs, reader.grams(task), dense)
        return lowrank.cut_spectrum(found, store.rank, split=split)
    if linear:
        indices, core = _core(task, result, pairs)
        return lowrank.truncate_core(core, _linear_core(call, indices, core), store.rank, split=split)
    return _truncated_dense(dense(), store.rank, reader.spectral_device, split=split)


def _truncated_dense(delta: Host, rank: int, place: str, *, split: bool) -> lowrank.Pair:
    """A dense delta cut on a device of its own, and the pair brought back."""
    device = torch.device(place)
    with device:
        pair = lowrank.truncate_dense(torch.from_numpy(delta).to(device), rank, split=split)
    return replace(
        pair, a_rn=pair.a_rn.cpu(), b_mr=pair.b_mr.cpu(), singular_values=pair.singular_values.cpu()
    )  # fmt: skip


def make_product(task: Task, result: Result, reader: OperandReader) -> tuple[Tensor, Tensor]:
    """The merged delta of adapters that are folded into a model, as P (rows, k) and Qᵀ (k, cols), float32: lambda is in
    it, and P·Qᵀ is to be added to the base."""
    pairs = _pairs(task, reader)
    call = _weighed(result.call, pairs)

    def dense() -> Host:
        raise AssertionError("a merge in the core needs no dense delta")

    found = _spectrum(task, result, call, pairs, reader.grams(task), dense)
    root = torch.sqrt(found.s_k)
    return (found.u_mk * root).float().contiguous(), (found.v_nk * root).T.float().contiguous()


def _spectrum(
    task: Task, result: Result, call: Call, pairs: Sequence[_Factors | None], grams: Grams, dense: Callable[[], Host]
) -> lowrank.Spectrum:
    """The merged delta by its singular values, signs fixed: a method's own block, an elementwise method in the core, or
    what a linear or elementwise method on deltas gives before it is calibrated."""
    indices, core = _core(task, result, pairs)
    narrowed = _only(call, indices)
    if result.space == "core":
        block = core_block(call)
        p, q = block.merge_measured(call, core, grams) if task.statistics else block.merge(narrowed, core)
        found = lowrank.spectrum_of_product(p * call.scale, q)
        total = _linear_core(replace(narrowed, normalize=False), range(len(core.cores)), core)
        found = lowrank.settled(found, (found.u_mk.T @ core.left_mR) @ total @ (core.right_nR.T @ found.v_nk))
    elif _is_linear(call):
        found = lowrank.spectrum_of_product(core.left_mR @ _linear_core(call, indices, core), core.right_nR)
    else:
        found = lowrank.spectrum_of(torch.from_numpy(dense()))
    if call.calibrate is not None:
        counted = [m for w, m in zip(narrowed.weights, core.cores, strict=True) if w]
        seen = found.u_mk.T @ core.left_mR
        found = lowrank.calibrated(
            found, (seen @ m for m in counted), core.right_nR.T @ found.v_nk, call.calibrate, call.scale
        )
    return found.signed()


def _core(task: Task, result: Result, pairs: Sequence[_Factors | None]) -> tuple[list[int], lowrank.Core]:
    """The exact core of the sources that have the module, with their positions."""
    present = _present(pairs)
    host = CompiledKernels()
    for _, (a, b, _) in present:
        for factor in (a, b):
            check_finite(host, task.name, result.places[0].file, None, factor.numpy())
    core = lowrank.build_core([(a, b.double() * scaling) for _, (a, b, scaling) in present])
    return [i for i, _ in present], core


def _is_linear(call: Call) -> bool:
    return call.prepare == "none" and call.combine in ("sum", "mean")


def _norm(a: Tensor, b: Tensor, scaling: float) -> float:
    """‖scaling·B·A‖ without the product: ‖BA‖² = ⟨A·Aᵀ, Bᵀ·B⟩."""
    a, b = a.double(), b.double()
    return abs(scaling) * math.sqrt(max(0.0, float(((a @ a.T) * (b.T @ b)).sum())))


def store_pair(
    task: Task,
    result: Result,
    pair: MergedPair,
    kernels: CompiledKernels,
    write: Callable[[int, str, int, memoryview], None],
) -> list[Extent]:
    """Cast the pair once, pad it to the planned rank with zeros, write it, and digest its extents."""
    extents = []
    for place in result.places:
        if place.part == "alpha":
            factor = torch.tensor([float(result.store.rank)])
        else:
            factor = pair.a if place.part[0] == "A" else pair.b
        factor = factor.T if place.part.endswith(".T") else factor
        rank_axis = 0 if place.part in {"A", "B.T"} else 1
        missing = 0 if place.part == "alpha" else result.store.rank - factor.shape[rank_axis]
        if missing > 0:
            pad = [0, 0, 0, missing] if rank_axis == 0 else [0, missing, 0, 0]
            factor = torch.nn.functional.pad(factor, pad)
        check_finite(kernels, task.name, place.file, place.dtype, factor.float().contiguous().numpy())
        assert place.dtype is not None
        data = factor.to(torch_dtype(place.dtype)).contiguous().view(-1).view(torch.uint8).numpy()
        view = bytes_of(data)
        step = max(1, EXTENT_BYTES // max(1, place.row_bytes))
        for first in range(0, max(1, place.rows), step):
            start, end = place.span(first, min(first + step, place.rows))
            piece = view[start - place.start : end - place.start]
            write(place.output, place.file, start, piece)
            extents.append(Extent(place.output, place.file, start, end, hashlib.sha256(piece).hexdigest()))
    return extents


def pack_pairs(pairs: Sequence[MergedPair], rank: int) -> MergedPair:
    """The pairs of experts as PEFT packs them: A (experts · rank, in) expert by expert, B (out, rank · experts) rank by
    rank. What a pair lacks of the rank is zero."""
    padded = [
        (torch.nn.functional.pad(p.a, [0, 0, 0, rank - p.a.shape[0]]),
         torch.nn.functional.pad(p.b, [0, rank - p.b.shape[1]]))
        for p in pairs
    ]  # fmt: skip
    b_mRE = torch.stack([b for _, b in padded], dim=2)
    energy = sum(p.notes.get("energy", 0.0) for p in pairs)
    notes = {}
    if any("energy" in p.notes for p in pairs):
        lost = sum(p.notes["lost"] * p.notes["energy"] for p in pairs)
        notes = {
            "energy": energy, "lost": lost / energy if energy > 0 else 0.0, "rank": float(rank),
            "rank_95": max(p.notes["rank_95"] for p in pairs),
        }  # fmt: skip
    for name in {name for p in pairs for name in p.notes if name.startswith(NOTE)}:
        notes[name] = sum(p.notes.get(name, 0.0) for p in pairs)
    return MergedPair(torch.cat([a for a, _ in padded]), b_mRE.reshape(b_mRE.shape[0], -1), notes)


def _pairs(task: Task, reader: OperandReader) -> list[_Factors | None]:
    pairs: list[_Factors | None] = []
    for entry in task.entries:
        if not entry.terms:
            # Where every source counts by its statistics, one that lacks the module has factors of rank zero.
            zero = torch.zeros(0, task.cols), torch.zeros(task.rows, 0), 1.0
            pairs.append(zero if task.statistics else None)
            continue
        read = []
        for term in entry.terms:
            assert isinstance(term, LowRankTerm)
            packed = term.a_view.rows is not None or term.b_view.rows is not None  # the next expert needs it, too
            a, b = reader.pair(term, keep=packed)
            read.append((torch.from_numpy(a), torch.from_numpy(b), term.scaling))
        if len(read) > 1:  # several adapters of one source: their sum is a product of stacked factors
            read = [(torch.cat([a for a, _, _ in read]), torch.cat([b * s for _, b, s in read], dim=1), 1.0)]
        pairs.append(read[0])
    return pairs


def _present(pairs: Sequence[_Factors | None]) -> list[tuple[int, _Factors]]:
    """The sources that have the module, with their positions."""
    return [(i, pair) for i, pair in enumerate(pairs) if pair is not None]


def _peft_factors(call: Call, pairs: Sequence[_Factors | None]) -> MergedPair:
    # Factors are float32 here: PEFT loads adapters so (autocast_adapter_dtype) and prunes there.
    present = _present(pairs)
    narrowed = _only(call, [i for i, _ in present])
    roots = [factors.split_coefficient(call.weights[i] * pair[2]) for i, pair in present]
    half = len(call.keys) // 2
    host = CompiledKernels()
    merged = []
    for which, offset in ((0, 0), (1, half)):

        def mask(source: int, factor: Tensor, offset: int = offset) -> Tensor:
            kept = np.ones(factor.numel(), np.float32)
            key = call.keys[offset + present[source][0]]
            host.drop(kept, 0, key, keep_limit(narrowed.densities[source]))
            return torch.from_numpy(kept).view(factor.shape)

        merged.append(
            factors.merge_factor(
                narrowed, [pair[:2][which] for _, pair in present], [root[which] for root in roots], mask
            )
        )
    return MergedPair(merged[0], merged[1])


def _concat(task: Task, call: Call, rank: int, pairs: Sequence[_Factors | None]) -> MergedPair:
    total = sum(call.weights) if call.normalize else 1.0
    a, b = factors.concatenate(
        [None if p is None else (p[0], p[1]) for p in pairs],
        [w * call.scale / total for w in call.weights],
        [1.0 if p is None else p[2] for p in pairs],
        rank,
        task.rows,
        task.cols,
    )
    return MergedPair(a, b)


def _linear_core(call: Call, indices: Sequence[int], core: lowrank.Core) -> Tensor:
    total = sum(call.weights) if call.normalize else 1.0
    merged = torch.zeros_like(core.cores[0])
    for i, matrix in zip(indices, core.cores, strict=True):
        merged += matrix * (call.weights[i] * call.scale / total)
    return merged


def _only(call: Call, indices: Sequence[int]) -> Call:
    """The same call for some of its sources."""
    return replace(
        call,
        absent=tuple(weight for i, weight in enumerate(call.weights) if i not in indices),
        weights=tuple(call.weights[i] for i in indices),
        densities=tuple(call.densities[i] for i in indices) if call.densities else (),
        keys=tuple(call.keys[i] for i in indices) if call.keys else (),
        each=tuple((name, tuple(values[i] for i in indices)) for name, values in call.each),
    )


def _clamp(a: Tensor, b: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """PEFT's svd_clamp: limit both factors to the given quantile of all their elements."""
    values = torch.cat([b.reshape(-1), a.reshape(-1)])
    high = float(np.quantile(values.numpy(), share))
    return a.clamp(-high, high), b.clamp(-high, high)
