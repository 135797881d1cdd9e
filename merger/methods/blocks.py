"""The blocks of a merge on one tile: prepare, combine, finish. Pure on tensors of one device; no names, no IO.

Shapes: K sources, n elements of a tile (its rows, flattened). Everything is float32 and rounded op by op, so that the
same tile gives the same bits wherever it is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from merger.kernels.dispatch import Array, Kernels
from merger.kernels.hashing import keep_limit
from merger.methods import METHODS
from merger.methods.core import ElementwiseCore
from merger.methods.rounds import (
    Call,
    Findings,
    RoundName,
    Statistic,
    balanced,
    block_round,
    conclude,
    empty_statistic,
    is_block_round,
    num_cuts,
)
from merger.methods.sparse import cut_band, magprune
from merger.methods.tiles import TensorExtent, TileBlock
from merger.methods.whole import CoreBlock, WholeBlock


@dataclass(slots=True)
class Prepared:
    """Running state of a span: how much of each source's allowance for equal magnitudes is left."""

    left: list[int]

    @classmethod
    def start(cls, findings: Findings) -> Prepared:
        return cls([quota for _, quota in findings.thresholds])


def prepare(
    kernels: Kernels, call: Call, findings: Findings, state: Prepared, source: int, x_n: Array, first: int,
    *, rescale: bool = True, length: int = 0,
) -> None:  # fmt: skip
    """Trim or drop one source's tile in place. `first` is the flat index of its first element in the tensor, `length`
    the elements of a row, which magprune needs whole.

    Tiles of a span come in order: the lowest flat indices keep what equals the threshold.
    """
    if call.keeps_all(source):
        return
    if call.prepare == "trim":
        bits, _ = findings.thresholds[source]
        state.left[source] -= kernels.trim(x_n, bits, state.left[source])
    elif call.prepare == "band":
        above = source + len(findings.thresholds) // 2
        used = cut_band(
            kernels, x_n, (findings.thresholds[source][0], state.left[source]),
            (findings.thresholds[above][0], state.left[above]),
        )  # fmt: skip
        state.left[source] -= used[0]
        state.left[above] -= used[1]
    elif call.prepare == "magprune":
        _magprune(kernels, call, source, x_n, first, length, inverse=rescale and call.rescale == "inverse")
        rescale = rescale and call.rescale == "l1"
    else:
        kernels.drop(x_n, first, call.keys[source], keep_limit(call.densities[source]))
    if not rescale:
        return
    if call.rescale == "inverse" and call.densities[source] > 0:
        kernels.divide(x_n, call.densities[source])
    elif call.rescale == "l1":
        kernels.scale(x_n, findings.factors[source])


def _magprune(kernels: Kernels, call: Call, source: int, x_n: Array, first: int, length: int, *, inverse: bool) -> None:
    density = call.densities[source]
    if density <= 0.0:
        kernels.scale(x_n, 0.0)
        return
    found = magprune(
        kernels.unload(x_n), length, first, call.keys[source], density, call.per_source("epsilon")[source],
        inverse=inverse,
    )  # fmt: skip
    kernels.copy(x_n, kernels.load(found))


def drops_in_one_pass(call: Call, source: int) -> bool:
    """Whether `drop` does all that `prepare` would: a random drop whose rescaling multiplies, if it rescales."""
    return call.prepare == "drop" and call.rescale != "inverse" and not call.keeps_all(source)


def drop(
    kernels: Kernels, call: Call, findings: Findings, source: int, x_n: Array, first: int, out_n: Array,
    *, rescale: bool = True,
) -> None:  # fmt: skip
    """`prepare` for a random drop, from `x_n` into `out_n`, with the rescaling in the same pass."""
    factor = findings.factors[source] if rescale and call.rescale == "l1" else 1.0
    kernels.drop(x_n, first, call.keys[source], keep_limit(call.densities[source]), factor, out_n)


def combine(kernels: Kernels, call: Call, x_Kn: Array, out_n: Array, scratch_2n: Array) -> None:
    """Sum, average or elect prepared tiles into `out_n`; lambda and the base are `finish`'s."""
    if call.combine == "pass":
        kernels.copy(out_n, x_Kn[0])
        return
    weights = kernels.vector(call.weights)
    if call.combine == "elect":
        kernels.elect(
            x_Kn, weights, weighted=call.elect == "weighted", frequency=call.elect == "frequency",
            divide=0 if not call.normalize else (1 if call.divisor == "weights" else 2), scratch=scratch_2n, out=out_n,
        )  # fmt: skip
        return
    kernels.weighted_sum(x_Kn, weights, out_n)
    if call.normalize and (divisor := divisor_of(call)) is not None:
        kernels.divide(out_n, divisor)


def divisor_of(call: Call) -> float | None:
    """What a weighted sum is divided by to be a mean, where it is."""
    total = sum(float(np.float32(weight)) for weight in call.weights)
    # mergekit's mean has no guard (a zero sum is refused by the planner); its task arithmetic takes 1 below 1e-8.
    return total if abs(total) >= 1e-8 else None


def tile_block(call: Call) -> TileBlock:
    """The block of a call whose combine is `block`."""
    block = METHODS[call.method].tile
    assert block is not None
    return block


def whole_block(call: Call) -> WholeBlock | None:
    """The block of a call that needs tensors whole; None where tiles do."""
    spec = METHODS.get(call.method)
    return None if spec is None or call.combine != "block" else spec.whole


def core_block(call: Call) -> CoreBlock:
    """The block of a call in the core: the method's own, or prepare and combine on the core's elements."""
    spec = METHODS.get(call.method)
    return ElementwiseCore() if spec is None or spec.core is None else spec.core


def start_round(name: RoundName, call: Call, extent: TensorExtent) -> Statistic:
    """The neutral element of a round."""
    if is_block_round(name):
        return tile_block(call).empty(block_round(name), call, extent)
    return empty_statistic(name, extent.count * (num_cuts(call) if name == "trim_low" else 1))


def end_round(name: RoundName, call: Call, merged: Statistic, extent: TensorExtent, so_far: Findings) -> Findings:
    """What a finished round found, beside what was known."""
    if is_block_round(name):
        with np.errstate(all="ignore"):  # what is no number shows in the result, and is refused there
            call = balanced(call, so_far.norms)
            found = tile_block(call).conclude(block_round(name), call, so_far.known, merged, extent)
        return replace(so_far, known=(*so_far.known, found))
    return conclude(name, merged, call, extent.numel, so_far)


def notes_of(calls: Sequence[Call], findings: Sequence[Findings]) -> dict[str, float]:
    """What methods of their own say of one tensor, for the report."""
    found: dict[str, float] = {}
    for call, known in zip(calls, findings, strict=True):
        if call.combine == "block" and call.num_rounds:
            found |= tile_block(call).notes(call, known.known)
    return found


def finish(kernels: Kernels, call: Call, base_n: Array | None, out_n: Array) -> None:
    """out = base + lambda·out, or lambda·out where there is no base."""
    if base_n is not None:
        kernels.scale_and_add(base_n, call.scale, out_n)
    elif call.scale != 1.0:
        kernels.scale(out_n, call.scale)


def accumulate(kernels: Kernels, call: Call, base_n: Array, x_Kn: Array, out_n: Array) -> None:
    """out = ((base + c₀x₀) + c₁x₁) …, c = lambda·weight: the order in which PEFT folds several adapters."""
    kernels.copy(out_n, base_n)
    for k, weight in enumerate(call.weights):
        kernels.accumulate(x_Kn[k], weight * call.scale, out_n)
