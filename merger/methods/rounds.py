"""Rounds of statistics: what a method must know of a whole tensor (or model) before it can map one block. No torch.

A round is mergeable over fixed spans: counts are integers, so any order gives the same; floats are float64 partials,
added in the order of the spans. What the rounds found is a `Findings`, small enough to travel with every unit.

    trim    trim_high → trim_low → exact magnitude of the k-th largest element, and how many equal to it survive
    l1      sums → Σ|x| before and after the trim or drop
    norms   norms → ‖ΔW‖ of each source, by which its weight is divided
    blocks  block.0 → block.1 → … whatever a method's own block counts (merger/methods/tiles.py)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

from merger.methods.declare import Scalar

RoundName = str
"""`norms` belongs to the weights; `trim_high`, `trim_low` and `sums` to prepare; `block.0`, `block.1`, … to a method's
own block, which sees what prepare left."""

_PREPARING: Final = ("norms", "trim_high", "trim_low", "sums")
_BLOCK: Final = "block."
HIGH_BINS: Final = 1 << 16
LOW_BINS: Final = 1 << 15
LOW_BITS: Final = 15
NOTHING: Final = 0x7FFFFFFF
"""A threshold above every magnitude: nothing survives."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """A method resolved for one tensor: every parameter is a number. One weight, density and key a source."""

    method: str
    prepare: Literal["none", "trim", "drop", "band", "magprune"] = "none"
    combine: Literal["sum", "mean", "elect", "pass", "equal", "block"]
    """`block`: the method's own tile block or whole block does it."""
    weights: tuple[float, ...]
    densities: tuple[float, ...] = ()
    keys: tuple[int, ...] = ()
    """64-bit keys of the random drop; for factors, those of A then those of B."""
    scale: float = 1.0
    """lambda, or passthrough's scale."""
    normalize: bool = False
    rescale: Literal["none", "l1", "inverse"] = "none"
    scope: Literal["tensor", "model"] = "tensor"
    elect: Literal["weighted", "unweighted", "frequency"] = "weighted"
    divisor: Literal["weights", "count"] = "weights"
    keep_one: bool = True
    """Whether a positive density keeps at least one element (mergekit) or truncates to none (PEFT)."""
    balance: bool = False
    """Whether each weight is divided by its source's norm (`balanced`)."""
    calibrate: float | None = None
    """The α of a singular value calibration after the merge; None: no calibration."""
    options: tuple[tuple[str, Scalar], ...] = ()
    """Parameters of the method's own, one value a merge."""
    each: tuple[tuple[str, tuple[float, ...]], ...] = ()
    """Parameters of the method's own, one value a source."""
    num_rounds: int = 0
    """Rounds of statistics that the method's block asks for."""
    absent: tuple[float, ...] = ()
    """Weights of the sources that lack a module, where a block sees only those that have it: deltas of zero."""

    def option(self, name: str) -> Scalar:
        """One of the method's own parameters. Raises KeyError."""
        return dict(self.options)[name]

    def number(self, name: str) -> float:
        return float(self.option(name))

    def per_source(self, name: str) -> tuple[float, ...]:
        """One of the method's own parameters, by source. Raises KeyError."""
        return dict(self.each)[name]

    @property
    def accumulates(self) -> bool:
        """Whether weighted deltas are added to the base one after another, as PEFT folds several adapters."""
        return self.combine == "sum" and self.prepare == "none" and not self.normalize

    def keeps_all(self, source: int) -> bool:
        return self.prepare == "none" or self.densities[source] >= 1.0


def kept(density: float, numel: int, *, keep_one: bool) -> int:
    """How many of `numel` elements a density keeps: the product, truncated."""
    if density >= 1.0:
        return numel
    if density <= 0.0 or numel == 0:
        return 0
    count = int(density * numel)
    return max(1, count) if keep_one else count


def rounds_of(call: Call) -> tuple[RoundName, ...]:
    """The rounds a call needs, in order: those of prepare, then those of the method's block."""
    own = tuple(f"{_BLOCK}{i}" for i in range(call.num_rounds))
    norms: tuple[RoundName, ...] = ("norms",) if call.balance else ()
    if call.prepare == "none" or all(call.keeps_all(i) for i in range(len(call.weights))):
        return (*norms, *own)
    found: tuple[RoundName, ...] = ("trim_high", "trim_low") if call.prepare in {"trim", "band"} else ()
    return (*norms, *found, *(("sums",) if call.rescale == "l1" else ()), *own)


def round_order(name: RoundName) -> tuple[int, int]:
    """Where a round comes among those of several calls on the same sources."""
    if name in _PREPARING:
        return 0, _PREPARING.index(name)
    return 1, block_round(name)


def is_block_round(name: RoundName) -> bool:
    return name.startswith(_BLOCK)


def block_round(name: RoundName) -> int:
    """The number of a block's round."""
    return int(name.removeprefix(_BLOCK))


def balanced(call: Call, norms: Sequence[float]) -> Call:
    """The call with weights w_i·b_i, b_i = (1/‖ΔW_i‖) / Σ_j (1/‖ΔW_j‖): no source drowns the others (NAN,
    arXiv:2505.16148). A source that changes nothing takes no part."""
    if not call.balance or not norms:
        return call
    inverse = [1.0 / norm if norm > 0.0 else 0.0 for norm in norms]
    total = math.fsum(inverse) or 1.0
    return replace(call, weights=tuple(w * i / total for w, i in zip(call.weights, inverse, strict=True)))


def wants(call: Call, name: RoundName) -> bool:
    """Whether a call needs this round."""
    return name in rounds_of(call)


@dataclass(frozen=True, slots=True)
class Findings:
    """What the rounds so far found for one result. One item a source."""

    prefixes: tuple[tuple[int, int], ...] = ()
    """(upper 16 bits of the k-th largest magnitude, how many are still to be taken from that bin); for a band, those of
    the lower cut of each source, then those of the upper cut."""
    thresholds: tuple[tuple[int, int], ...] = ()
    """(bits of the k-th largest magnitude, how many equal to it survive, lowest flat index first)."""
    factors: tuple[float, ...] = ()
    """Σ|x| before over Σ|x| after."""
    norms: tuple[float, ...] = ()
    """‖ΔW‖, where the call is balanced."""
    known: tuple[npt.NDArray[np.float64], ...] = ()
    """What each finished round of the method's block found."""

    def after(self, used: Sequence[int]) -> Findings:
        """The same for a later span, when `used[i]` elements equal to the threshold lie before it."""
        left = tuple((bits, max(0, quota - n)) for (bits, quota), n in zip(self.thresholds, used, strict=True))
        return replace(self, thresholds=left)


Statistic = npt.NDArray[np.int64] | npt.NDArray[np.float64]


def empty_statistic(name: RoundName, num_sources: int) -> Statistic:
    """The neutral element of a round of prepare: (sources, bins) counts, (sources, 2) or (sources,) sums."""
    if name == "trim_high":
        return np.zeros((num_sources, HIGH_BINS), np.int64)
    if name == "trim_low":
        return np.zeros((num_sources, LOW_BINS), np.int64)
    return np.zeros((num_sources,) if name == "norms" else (num_sources, 2), np.float64)


def conclude(name: RoundName, merged: Statistic, call: Call, numel: int, so_far: Findings) -> Findings:
    """What a finished round of prepare found. `numel` is the number of elements the statistic was taken over."""
    if name == "norms":
        return replace(so_far, norms=tuple(math.sqrt(float(square)) for square in merged.tolist()))
    if name == "trim_high":
        cuts = [kept(density, numel, keep_one=call.keep_one) for density in call.densities]
        if call.prepare == "band":
            cuts = _band_cuts(call, numel)
        prefixes = [_descend(merged[i % len(merged)], count, HIGH_BINS) for i, count in enumerate(cuts)]
        return replace(so_far, prefixes=tuple(prefixes))
    if name == "trim_low":
        thresholds = []
        for (prefix, wanted), counts in zip(so_far.prefixes, merged, strict=True):
            if prefix >= HIGH_BINS:
                thresholds.append((NOTHING, 0))
                continue
            low, quota = _descend(counts, wanted, LOW_BINS)
            thresholds.append((prefix << LOW_BITS | low, quota))
        return replace(so_far, thresholds=tuple(thresholds))
    # mergekit leaves the delta alone when either sum is below 1e-7.
    factors = tuple(
        float(before / after) if before >= 1e-7 and after >= 1e-7 else 1.0 for before, after in merged.tolist()
    )
    return replace(so_far, factors=factors)


def _band_cuts(call: Call, numel: int) -> list[int]:
    """How many of the largest elements each source keeps, then how many of them it cuts as outliers."""
    inside = [kept(density, numel, keep_one=False) for density in call.densities]
    above = [min(int(gamma * numel), numel - n) for gamma, n in zip(call.per_source("gamma"), inside, strict=True)]
    return [n + m for n, m in zip(inside, above, strict=True)] + above


def num_cuts(call: Call) -> int:
    """Thresholds of each source: a band has a lower one and an upper one, all lower ones first."""
    return 2 if call.prepare == "band" else 1


def _descend(counts: npt.NDArray[np.generic], wanted: int, bins: int) -> tuple[int, int]:
    """The highest bin at which `wanted` elements are reached from above, and how many it must give."""
    if wanted <= 0:
        return bins, 0
    from_above = np.cumsum(counts[::-1].astype(np.int64))
    position = int(np.searchsorted(from_above, wanted))
    if position >= bins:
        return 0, int(counts[0])
    above = int(from_above[position - 1]) if position else 0
    return bins - 1 - position, wanted - above


def low_bin(threshold: int) -> int | None:
    """The `trim_low` bin of a threshold's own magnitude; None where nothing survives."""
    return None if threshold == NOTHING else threshold & (LOW_BINS - 1)
