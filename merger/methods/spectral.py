"""Methods on the singular vectors of whole matrices: tsv_m, iso_c, iso_cts, boost, wudi.

Each is one rule, from matrices to a matrix. On adapters it runs on the exact core, which has the same singular values
and, turned back, the same singular vectors as the deltas; on models on whole deltas. A weight scales its source's delta
before anything else, and a source of weight 0 takes no part. Null directions are cut off first (`lowrank.spectrum_of`):
the published codes keep them, and on deltas of low rank their float32 and float64 results have nothing in common.

Tensors that are no matrices have no singular vectors: their weighted deltas are averaged or, where the method begins
with a sum, summed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, Literal

from merger.methods.declare import MethodSpec, ParameterSpec
from merger.methods.parameters import LAMBDA, WEIGHT
from merger.methods.rounds import Call
from merger.methods.whole import CoreBlock, WholeBlock

if TYPE_CHECKING:
    from torch import Tensor

    from merger.methods.lowrank import Core


class Rule(ABC):
    """From the sources' matrices to the merged one."""

    @abstractmethod
    def merge(self, call: Call, x_Kpq: Sequence[Tensor], side: int) -> Tensor:
        """`x_Kpq` are weighted deltas, float64, at least one; `side` is the smaller side that a count is a share of."""


class Tsv(Rule):
    """Each delta's ⌊side / T⌋ largest singular triplets; both stacks of vectors made orthonormal together."""

    def merge(self, call: Call, x_Kpq: Sequence[Tensor], side: int) -> Tensor:
        import torch

        from merger.methods.lowrank import spectrum_of, whiten

        limit = max(1, side // len(x_Kpq))
        parts = [spectrum_of(x) for x in x_Kpq]
        s = torch.cat([p.s_k[:limit] for p in parts])
        left = whiten(torch.cat([p.u_mk[:, :limit] for p in parts], dim=1))
        right = whiten(torch.cat([p.v_nk[:, :limit] for p in parts], dim=1))
        return (left * s) @ right.T


class Iso(Rule):
    """The sum, with every singular value at their mean."""

    def merge(self, call: Call, x_Kpq: Sequence[Tensor], side: int) -> Tensor:
        from merger.methods.lowrank import spectrum_of

        found = spectrum_of(_sum(x_Kpq), against=_largest(x_Kpq))
        return found.product(found.s_k.mean().expand_as(found.s_k)) if len(found.s_k) else _sum(x_Kpq)


class IsoWithTasks(Rule):
    """The sum's leading directions, then those that each delta adds to them, made orthonormal, at one singular value.

    Of N directions the last (1 - fraction)·N are given to the sources, as many to each.
    """

    def merge(self, call: Call, x_Kpq: Sequence[Tensor], side: int) -> Tensor:
        import torch

        from merger.methods.lowrank import Spectrum, spectrum_of, whiten

        total = spectrum_of(_sum(x_Kpq), against=_largest(x_Kpq))
        size, count = len(total.s_k), len(x_Kpq)
        if size == 0:
            return _sum(x_Kpq)
        each = round((size - int(size * call.number("common_space_fraction"))) / count)
        each = min(each, size // count)  # rounded up, they may be more than there are
        shared = size - each * count
        common = Spectrum(total.u_mk[:, :shared], total.s_k[:shared], total.v_nk[:, :shared])
        parts = [common]
        for x in x_Kpq if each else ():
            own = spectrum_of(x - common.u_mk @ (common.u_mk.T @ x), against=_largest([x]))
            parts.append(Spectrum(own.u_mk[:, :each], own.s_k[:each], own.v_nk[:, :each]))
        left = whiten(torch.cat([p.u_mk for p in parts], dim=1))
        right = whiten(torch.cat([p.v_nk for p in parts], dim=1))
        return torch.cat([p.s_k for p in parts]).mean() * (left @ right.T)


class Boost(Rule):
    """The sum; the singular values after the first that together reach a share β are lifted to the last of those."""

    def merge(self, call: Call, x_Kpq: Sequence[Tensor], side: int) -> Tensor:
        import torch

        from merger.methods.lowrank import spectrum_of

        found = spectrum_of(_sum(x_Kpq), against=_largest(x_Kpq))
        if not len(found.s_k):
            return _sum(x_Kpq)
        running = torch.cumsum(found.s_k, 0)
        at = min(int(torch.searchsorted(running, call.number("beta") * running[-1])), len(running) - 1)
        return found.product(torch.clamp(found.s_k, min=float(found.s_k[at])))


class LeastInterference(Rule):
    """The X that minimises Σ_i ‖(X - X_i)·X_iᵀ‖² / ‖X_i‖²: (Σ X_i·G_i)·(Σ G_i)⁺ with G_i = X_iᵀ·X_i / ‖X_i‖²."""

    def merge(self, call: Call, x_Kpq: Sequence[Tensor], side: int) -> Tensor:
        import torch

        from merger.methods.lowrank import spectrum_of

        norms = [float(torch.linalg.norm(x)) for x in x_Kpq]
        there = [(x, n) for x, n in zip(x_Kpq, norms, strict=True) if n > 0.0]
        if not there:
            return _sum(x_Kpq)
        # Of Z = [X_i / ‖X_i‖] = P·S·Vᵀ: G_i·(Σ G_i)⁺ = V·S·P_iᵀ·P_i·S⁻¹·Vᵀ, without squaring what is inverted.
        z = spectrum_of(torch.cat([x / n for x, n in there], dim=0))
        out = torch.zeros_like(there[0][0])
        for (x, _), p in zip(there, torch.split(z.u_mk, x_Kpq[0].shape[0]), strict=True):
            out += ((x @ (z.v_nk * z.s_k)) @ (p.T @ p) / z.s_k) @ z.v_nk.T
        return out


def _sum(x_Kpq: Sequence[Tensor]) -> Tensor:
    total = x_Kpq[0].clone()
    for x in x_Kpq[1:]:
        total += x
    return total


def _largest(x_Kpq: Sequence[Tensor]) -> float:
    """The largest norm: what a rounding of the sources is relative to."""
    return max(float(x.norm()) for x in x_Kpq)


class SpectralWhole(WholeBlock):
    """A rule on whole deltas of models."""

    def __init__(self, rule: Rule, *, copies: int, vectors: Literal["mean", "sum"] = "mean") -> None:
        self.rule = rule
        self.copies = copies
        """float64 matrices as large as a delta that the rule holds at once for each source, vectors included."""
        self.vectors = vectors

    def bytes(self, rows: int, cols: int, count: int) -> int:
        small = min(rows, cols)
        return 8 * ((count + 3 + self.copies * count) * rows * cols + 6 * small * small)

    def merge(self, call: Call, deltas_Kmn: Sequence[Tensor], base_mn: Tensor | None, *, vector: bool) -> Tensor:
        import torch

        weighted = [x.double() * w for w, x in zip(call.weights, deltas_Kmn, strict=True) if w]
        if not weighted:
            return torch.zeros_like(deltas_Kmn[0])
        if vector:
            divisor = len(weighted) if self.vectors == "mean" else 1
            return (_sum(weighted) / divisor).float()
        return self.rule.merge(call, weighted, min(deltas_Kmn[0].shape)).float()


class SpectralCore(CoreBlock):
    """The same rule on the exact core of adapters."""

    def __init__(self, rule: Rule, *, count_in_core: bool = False) -> None:
        self.rule = rule
        self.count_in_core = count_in_core
        """Whether the paper's count of directions is of the core's side and not of the delta's."""

    def merge(self, call: Call, core: Core) -> tuple[Tensor, Tensor]:
        weighted = [x * w for w, x in zip(call.weights, core.cores, strict=True) if w]
        if not weighted:
            return core.left_mR[:, :0], core.right_nR[:, :0]
        sides = weighted[0].shape if self.count_in_core else (len(core.left_mR), len(core.right_nR))
        return core.left_mR @ self.rule.merge(call, weighted, min(sides)), core.right_nR


TSV_PAPER: Final = "arXiv:2412.00081"
TSV_BIBTEX: Final = (
    "@inproceedings{gargiulo2025tsv, title={Task Singular Vectors: Reducing Task Interference in Model Merging}, "
    "author={Gargiulo, Antonio Andrea and Crisostomi, Donato and Bucarelli, Maria Sofia and Scardapane, Simone and "
    "Silvestri, Fabrizio and Rodol{\\`a}, Emanuele}, booktitle={CVPR}, year={2025}}"
)
ISO_PAPER: Final = "arXiv:2502.04959"
ISO_BIBTEX: Final = (
    "@inproceedings{marczak2025isotropic, title={No Task Left Behind: Isotropic Model Merging with Common and "
    "Task-Specific Subspaces}, author={Marczak, Daniel and Magistri, Simone and Cygert, Sebastian and Twardowski, "
    "Bart{\\l}omiej and Bagdanov, Andrew D. and van de Weijer, Joost}, booktitle={ICML}, year={2025}}"
)

METHODS = (
    MethodSpec(
        name="tsv_m", summary="keeps each delta's largest singular directions, made orthogonal to each other's",
        spaces=("delta", "core"), combine="block", whole=SpectralWhole(Tsv(), copies=3), core=SpectralCore(Tsv()),
        parameters=(WEIGHT, LAMBDA), base="required", closed_on_deltas=True, cut="whole", paper=TSV_PAPER,
        bibtex=TSV_BIBTEX,
    ),
    MethodSpec(
        name="iso_c", summary="sums the deltas and gives every direction of the sum the same singular value",
        spaces=("delta", "core"), combine="block", whole=SpectralWhole(Iso(), copies=0), core=SpectralCore(Iso()),
        parameters=(WEIGHT, LAMBDA), base="required", closed_on_deltas=True, flat=True, cut="whole", paper=ISO_PAPER,
        bibtex=ISO_BIBTEX,
    ),
    MethodSpec(
        name="iso_cts", summary="iso_c, with the sum's weakest directions replaced by what each delta adds to the rest",
        spaces=("delta", "core"), combine="block", whole=SpectralWhole(IsoWithTasks(), copies=3),
        core=SpectralCore(IsoWithTasks()),
        parameters=(
            WEIGHT, LAMBDA,
            ParameterSpec(name="common_space_fraction", kind="float", scope="global", default=0.8, low=0.0, high=1.0,
                          doc="share of the directions that the sum keeps"),
        ),
        base="required", closed_on_deltas=True, flat=True, cut="whole", paper=ISO_PAPER, bibtex=ISO_BIBTEX,
    ),
    MethodSpec(
        name="boost", summary="sums the deltas and lifts the sum's weak singular values",
        spaces=("delta", "core"), combine="block", whole=SpectralWhole(Boost(), copies=0, vectors="sum"),
        core=SpectralCore(Boost()),
        parameters=(
            WEIGHT, LAMBDA,
            ParameterSpec(name="beta", kind="float", scope="global", low=0.0, high=1.0,
                          doc="share of the sum of singular values that stays as it is; those after it are lifted to "
                              "the last of them"),
        ),
        base="required", closed_on_deltas=True, flat=True, cut="whole", paper="arXiv:2506.16506",
        bibtex="@article{skorobogat2025subspace, title={Subspace-Boosted Model Merging}, author={Skorobogat, Ronald "
               "and Roth, Karsten and Georgescu, Mariana-Iuliana}, journal={arXiv:2506.16506}, year={2025}}",
    ),
    MethodSpec(
        name="wudi", summary="the delta that interferes least with each source's own inputs, in closed form",
        spaces=("delta", "core"), combine="block", whole=SpectralWhole(LeastInterference(), copies=3),
        core=SpectralCore(LeastInterference()),
        parameters=(WEIGHT, LAMBDA), base="required", closed_on_deltas=True, cut="whole", paper="arXiv:2503.08099",
        bibtex="@inproceedings{cheng2025wudi, title={Whoever Started the Interference Should End It: Guiding "
               "Data-Free Model Merging via Task Vectors}, author={Cheng, Runxi and Xiong, Feng and Wei, Yongxian and "
               "Zhu, Wanyun and Yuan, Chun}, booktitle={ICML}, year={2025}}",
    ),
)  # fmt: skip
