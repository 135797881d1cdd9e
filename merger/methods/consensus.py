"""Methods that decide element by element which sources take part in the merged delta.

    sce           the elements whose variance over the sources is largest; signs elected; weights by energy
    ram           what one source changed is kept whole, what several changed is averaged
    ramplus_tl    ram, with what only one changed made stronger where it shares much
    magmax        the largest change wins
    consensus_ta  the sum, where enough sources matter to it
    pcb           each source's elements compete: within it by size, between sources by agreement

Where a mask leaves a source out, NaN and Inf in it still show in the result.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from merger.errors import PlanError
from merger.methods.declare import MethodSpec, ParameterSpec
from merger.methods.order import HALF, Keys, count_lower, count_upper, locate, ordered_keys, value_of
from merger.methods.parameters import INT8_MASK, LAMBDA
from merger.methods.rounds import Call, Statistic
from merger.methods.tiles import F32, F64, Known, Mask, TensorExtent, Tile, TileBlock, combined, show_broken

_WEIGHT_OF_ONE: Final = ParameterSpec(
    name="weight", kind="float", scope="source", default=1.0, doc="multiplies the source's delta before it competes",
)  # fmt: skip
_EPSILON: Final = ParameterSpec(
    name="epsilon", kind="float", scope="global", default=1e-5, low=0.0,
    doc="an element that changed by no more counts as unchanged",
)  # fmt: skip


# -------------------------------------------------------------------- sce


class Sce(TileBlock):
    """Select by variance, weigh by energy, elect signs.

    Rounds: with select_topk below 1 the upper and the lower halves of the variances and the equal ones by tile, so that
    of equal variances the lowest flat indices are taken; always, last, the energies of what is selected.
    """

    def rounds(self, call: Call) -> int:
        return 4 if call.number("select_topk") < 1.0 else 1

    def empty(self, number: int, call: Call, extent: TensorExtent) -> Statistic:
        if number == self.rounds(call) - 1:
            return np.zeros(extent.count, np.float64)
        return np.zeros((HALF + 1, HALF, extent.num_tiles)[number], np.int64)

    def measure(self, number: int, call: Call, known: Known, tile: Tile, into: Statistic) -> None:
        if number == self.rounds(call) - 1:
            selected = self._selected(call, known, tile)
            for k, x_n in enumerate(tile.x_Kn):
                into[k] += np.sum(np.square(x_n, dtype=np.float64) * selected)
            return
        keys = _variance_keys(tile.x_Kn)
        if number == 0:
            count_upper(keys, into[:HALF])
            into[HALF] += np.count_nonzero(keys != _ZERO)
        elif number == 1:
            if known[0][0] >= 0:
                count_lower(keys, int(known[0][0]), into)
        else:
            into[tile.number] += np.count_nonzero(keys == np.uint32(known[1][0]))

    def conclude(self, number: int, call: Call, known: Known, merged: Statistic, extent: TensorExtent) -> F64:
        if number == self.rounds(call) - 1:
            return _energy_weights(np.asarray(merged, np.float64), extent.numel)
        if number == 0:
            wanted = int(call.number("select_topk") * int(merged[HALF]))
            if wanted == 0:
                return np.array((-1.0, 0.0))
            return np.array(locate(merged[:HALF], extent.numel - wanted), np.float64)
        if number == 1:
            if known[0][0] < 0:
                return np.array((0xFFFFFFFF, 0), np.float64)  # no key is as large: nothing is selected
            low, rank = locate(merged, int(known[0][1]))
            return np.array((int(known[0][0]) << 16 | low, int(merged[low]) - rank), np.float64)
        before = np.cumsum(merged) - merged
        found: F64 = np.maximum(known[1][1] - before, 0.0)
        return found

    def _selected(self, call: Call, known: Known, tile: Tile) -> Mask:
        if call.number("select_topk") >= 1.0:
            return np.ones(tile.x_Kn.shape[1], np.bool_)
        keys, threshold = _variance_keys(tile.x_Kn), np.uint32(known[1][0])
        equal = keys == threshold
        found: Mask = (keys > threshold) | (equal & (np.cumsum(equal) <= known[2][tile.number]))
        return found

    def notes(self, call: Call, known: Known) -> dict[str, float]:
        return {"weighed_equally": 1.0} if known[-1][-1] else {}

    def apply(self, call: Call, known: Known, tile: Tile) -> F32:
        x_Kn = tile.x_Kn * self._selected(call, known, tile)
        weights = known[-1][:-1].astype(np.float32)
        positive = combined(x_Kn, [1.0] * len(x_Kn)) >= 0
        out, divisor = np.zeros_like(x_Kn[0]), np.zeros_like(x_Kn[0])
        for x_n, weight in zip(x_Kn, weights, strict=True):
            shares = np.where(positive, x_n > 0, x_n < 0) * weight
            out += x_n * shares
            divisor += shares
        out /= np.maximum(divisor, np.float32(1e-6))
        return show_broken(out, tile.x_Kn)


_ZERO: Final = np.uint32(0x80000000)
"""The key of 0."""


def _variance_keys(x_Kn: F32) -> Keys:
    """The order of the population variance over the sources, rounded to float32."""
    wide_Kn = x_Kn.astype(np.float64)
    mean = wide_Kn[0].copy()
    for x_n in wide_Kn[1:]:
        mean += x_n
    mean /= len(wide_Kn)
    total = np.zeros_like(mean)
    for x_n in wide_Kn:
        total += np.square(x_n - mean)
    return ordered_keys((total / len(wide_Kn)).astype(np.float32))


def _energy_weights(energies_K: F64, numel: int) -> F64:
    """(K + 1,): shares of the mean squares, and 1 where they are too small to tell and all weigh the same.

    mergekit's bound is absolute: mean squares that sum to less than 1e-6.
    """
    squares = energies_K / max(1, numel)
    total = float(np.sum(squares))
    if abs(total) < 1e-6:
        return np.append(np.full(len(squares), 1.0 / len(squares)), float(total > 0))
    return np.append(squares / total, 0.0)


# -------------------------------------------------------------------- ram


def _changed(call: Call, tile: Tile) -> tuple[Mask, F32]:
    """Which elements each source changed, and how many sources changed each."""
    changed_Kn = np.abs(tile.x_Kn) > np.float32(call.number("epsilon"))
    return changed_Kn, changed_Kn.sum(axis=0).astype(np.float32)


class Ram(TileBlock):
    """Σ over those that changed an element, divided by their number."""

    def apply(self, call: Call, known: Known, tile: Tile) -> F32:
        changed_Kn, count_n = _changed(call, tile)
        out = np.zeros_like(tile.x_Kn[0])
        for k, (x_n, changed) in enumerate(zip(tile.x_Kn, changed_Kn, strict=True)):
            alone = self.boost(call, known, k)
            out += np.where(changed, np.where(count_n == 1, x_n * alone, x_n / np.maximum(count_n, 1)), np.float32(0))
        return show_broken(out, tile.x_Kn)

    def boost(self, call: Call, known: Known, source: int) -> np.float32:
        """Factor of what only this source changed."""
        return np.float32(1)


class RamPlus(Ram):
    """One round counts, for each source, what it shares with others and what it alone changed."""

    def rounds(self, call: Call) -> int:
        return 1

    def empty(self, number: int, call: Call, extent: TensorExtent) -> Statistic:
        return np.zeros((extent.count, 2), np.int64)

    def measure(self, number: int, call: Call, known: Known, tile: Tile, into: Statistic) -> None:
        changed_Kn, count_n = _changed(call, tile)
        into[:, 0] += np.count_nonzero(changed_Kn & (count_n > 1), axis=1)
        into[:, 1] += np.count_nonzero(changed_Kn & (count_n == 1), axis=1)

    def boost(self, call: Call, known: Known, source: int) -> np.float32:
        shared, alone = known[0][source].tolist()
        below = max(alone, call.number("epsilon"))
        ratio = shared / below if below else 0.0
        return np.float32(1.0 + call.number("r") * min(max(ratio, 0.0), call.number("alpha")))


# -------------------------------------------------------------------- magmax


class Magmax(TileBlock):
    """Of wᵢτᵢ the one of largest magnitude; of equal ones the first source's."""

    def apply(self, call: Call, known: Known, tile: Tile) -> F32:
        out = tile.x_Kn[0] * np.float32(call.weights[0])
        for x_n, weight in zip(tile.x_Kn[1:], call.weights[1:], strict=True):
            candidate = x_n * np.float32(weight)
            out = np.where(np.abs(candidate) > np.abs(out), candidate, out)
        return show_broken(out, tile.x_Kn)


# -------------------------------------------------------------------- consensus


class ConsensusTa(TileBlock):
    """Σwᵢτᵢ where at least k sources have |wᵢτᵢ| ≥ λᵢ·|Σ − wᵢτᵢ|."""

    def fitted(self, call: Call, shape: tuple[int, ...]) -> Call:
        if call.number("k") > len(call.weights):
            raise PlanError.of(
                "out-of-bounds", f"k is {call.number('k'):g}, and there are {len(call.weights)} source(s)",
                where="parameters.k", why="no element would be kept", fix="lower k, or merge more sources",
            )  # fmt: skip
        return call

    def apply(self, call: Call, known: Known, tile: Tile) -> F32:
        total = combined(tile.x_Kn, call.weights)
        votes = np.zeros(total.shape, np.int64)
        for x_n, weight, bound in zip(tile.x_Kn, call.weights, call.per_source("tall_lambda"), strict=True):
            own = x_n * np.float32(weight)
            votes += np.abs(own) >= np.abs(total - own) * np.float32(bound)
        out = np.where(votes >= call.number("k"), total, np.float32(0))
        return show_broken(out, tile.x_Kn)


# -------------------------------------------------------------------- pcb


class Pcb(TileBlock):
    """Parameter competition balancing, as the authors' code has it.

        aᵢ = |τᵢ| limited to its quantiles; Nᵢ = aᵢ brought to [0, 1]
        βᵢ = exp(K·Nᵢ²) · tanh(τᵢ·Στ); its lowest 1 − ratio are cut; β̂ᵢ = what is left, brought to [0, 1]
        τ  = Σ β̂ᵢ·sign(τᵢ)·aᵢ / Σ β̂ᵢ

    Rounds: the two halves of aᵢ's order, then those of βᵢ's. Where all β of a source are equal, their shares are one
    when they are positive and zero otherwise (0/0 in the formula).
    """

    clamped: Final = 1e-4
    """Share of |τ| that is limited on either side."""
    most_sources: Final = 80
    """exp(K) must be a float32."""

    def fitted(self, call: Call, shape: tuple[int, ...]) -> Call:
        if len(call.weights) > self.most_sources:
            raise PlanError.of(
                "number-of-sources", f"pcb merges {self.most_sources} sources at the most, not {len(call.weights)}",
                where="models", why="its scores grow with e to their number and overflow", fix="merge in two steps",
            )  # fmt: skip
        return call

    def rounds(self, call: Call) -> int:
        return 4

    def empty(self, number: int, call: Call, extent: TensorExtent) -> Statistic:
        return np.zeros((extent.count, HALF) if number % 2 == 0 else (extent.count, 2, HALF), np.int64)

    def measure(self, number: int, call: Call, known: Known, tile: Tile, into: Statistic) -> None:
        total_n = _sum(tile.x_Kn)
        for k, x_n in enumerate(tile.x_Kn):
            keys = ordered_keys(np.abs(x_n) if number < 2 else self._score(known, k, x_n, total_n, len(tile.x_Kn)))
            if number % 2 == 0:
                count_upper(keys, into[k])
                continue
            for side in range(2):
                count_lower(keys, int(known[number - 1][k, 2 * side]), into[k, side])

    def conclude(self, number: int, call: Call, known: Known, merged: Statistic, extent: TensorExtent) -> F64:
        if number % 2 == 0:
            if number == 0:
                ranks = int(extent.numel * self.clamped), int(extent.numel * (1 - self.clamped) - 1)
            else:
                ranks = int(extent.numel * (1 - call.number("ratio"))), extent.numel - 1
            return np.array([[*locate(c, ranks[0]), *locate(c, ranks[1])] for c in merged], np.float64)
        prefixes = known[number - 1]
        return np.array([
            [value_of(int(prefixes[k, 2 * side]) << 16 | locate(counts[side], int(prefixes[k, 2 * side + 1]))[0])
             for side in range(2)]
            for k, counts in enumerate(merged)
        ])  # fmt: skip

    def _score(self, known: Known, source: int, x_n: F32, total_n: F64, count: int) -> F32:
        low, high = known[1][source].tolist()
        wide = x_n.astype(np.float64)
        size = (np.clip(np.abs(wide), low, high) - low) / (high - low) if high > low else np.zeros_like(wide)
        found: F32 = (np.exp(count * size * size) * np.tanh(wide * total_n)).astype(np.float32)
        return found

    def apply(self, call: Call, known: Known, tile: Tile) -> F32:
        total_n = _sum(tile.x_Kn)
        above, below = np.zeros_like(total_n), np.zeros_like(total_n)
        for k, x_n in enumerate(tile.x_Kn):
            low, high = known[1][k].tolist()
            least, most = known[3][k].tolist()
            score = self._score(known, k, x_n, total_n, len(tile.x_Kn)).astype(np.float64)
            if most > least:
                share = (np.clip(score, least, most) - least) / (most - least)
            else:
                share = np.full_like(score, float(most > 0))
            above += np.sign(x_n) * np.clip(np.abs(x_n.astype(np.float64)), low, high) * share
            below += share
        return show_broken((above / np.maximum(below, 1e-12)).astype(np.float32), tile.x_Kn)


def _sum(x_Kn: F32) -> F64:
    """Σ over the sources in their order, float64."""
    total: F64 = x_Kn[0].astype(np.float64)
    for x_n in x_Kn[1:]:
        total += x_n
    return total


_RAM_BIBTEX: Final = (
    "@article{yuan2026ram, title={Behavior Knowledge Merge in Reinforced Agentic Models}, author={Yuan, Xiangchi and "
    "Shi, Dachuan and Zhang, Chunhui and Liu, Zheyuan and Yao, Shenglong and Vosoughi, Soroush and Lee, Wenke}, "
    "journal={arXiv:2601.13572}, year={2026}}"
)

METHODS = (
    MethodSpec(
        name="sce", summary="keeps what varies most between the deltas, elects signs, weighs sources by energy",
        spaces=("delta",), combine="block", tile=Sce(),
        parameters=(
            ParameterSpec(name="select_topk", kind="float", scope="global", default=1.0, low=0.0, high=1.0,
                          doc="share of the elements that vary which is kept, the largest variances first"),
            INT8_MASK,
        ),
        base="required", closed_on_deltas=True, cut="elements", paper="arXiv:2408.07990",
        bibtex="@article{wan2024fusechat, title={FuseChat: Knowledge Fusion of Chat Models}, "
               "author={Wan, Fanqi and others}, journal={arXiv preprint arXiv:2408.07990}, year={2024}}",
    ),
    MethodSpec(
        name="ram", summary="keeps what one source changed, averages what several changed", spaces=("delta",),
        combine="block", tile=Ram(), parameters=(_EPSILON,), base="required", closed_on_deltas=True, cut="elements",
        paper="arXiv:2601.13572", bibtex=_RAM_BIBTEX,
    ),
    MethodSpec(
        name="ramplus_tl", summary="ram, with what one source alone changed made stronger", spaces=("delta",),
        combine="block", tile=RamPlus(),
        parameters=(
            _EPSILON,
            ParameterSpec(name="r", kind="float", scope="global", default=0.1,
                          doc="strength for each unit of shared over unshared changes"),
            ParameterSpec(name="alpha", kind="float", scope="global", default=0.2, low=0.0,
                          doc="that ratio counts up to here"),
        ),
        base="required", closed_on_deltas=True, cut="elements", paper="arXiv:2601.13572", bibtex=_RAM_BIBTEX,
    ),
    MethodSpec(
        name="magmax", summary="takes each element from the source that changed it most", spaces=("delta",),
        combine="block", tile=Magmax(), parameters=(_WEIGHT_OF_ONE, LAMBDA), base="required", closed_on_deltas=True,
        cut="elements", paper="arXiv:2407.06322",
        bibtex="@inproceedings{marczak2024magmax, title={MagMax: Leveraging Model Merging for Seamless Continual "
               "Learning}, author={Marczak, Daniel and others}, booktitle={ECCV}, year={2024}}",
    ),
    MethodSpec(
        name="consensus_ta", summary="task arithmetic, only where enough sources matter", spaces=("delta",),
        combine="block", tile=ConsensusTa(),
        parameters=(
            _WEIGHT_OF_ONE, LAMBDA,
            ParameterSpec(name="tall_lambda", kind="float", scope="source", default=0.4, low=0.0,
                          doc="a source matters where its delta is this large beside that of all others together "
                              "(the paper chooses from 0.2 to 0.6)"),
            ParameterSpec(name="k", kind="int", scope="global", default=2, low=1,
                          doc="how many sources must matter for an element to be kept"),
        ),
        base="required", closed_on_deltas=True, cut="elements", paper="arXiv:2405.07813",
        bibtex="@inproceedings{wang2024localizing, title={Localizing Task Information for Improved Model Merging and "
               "Compression}, author={Wang, Ke and others}, booktitle={ICML}, year={2024}}",
    ),
    MethodSpec(
        name="pcb", summary="parameters compete within a source by size and between sources by agreement",
        spaces=("delta",), combine="block", tile=Pcb(),
        parameters=(
            LAMBDA,
            ParameterSpec(name="ratio", kind="float", scope="global", default=0.1, low=0.0, high=1.0,
                          doc="share of each source's elements that takes part, the highest scores first"),
            ParameterSpec(name="scope", kind="choice", scope="global", default="model", choices=("tensor", "model"),
                          doc="what the quantiles are over: the whole model (the paper) or each tensor"),
        ),
        base="required", closed_on_deltas=True, cut="elements", paper="arXiv:2410.02396",
        bibtex="@inproceedings{du2024parameter, title={Parameter Competition Balancing for Model Merging}, "
               "author={Du, Guodong and others}, booktitle={NeurIPS}, year={2024}}",
    ),
)  # fmt: skip
