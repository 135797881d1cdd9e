"""star: each delta cut to its largest singular values, which are then stretched to its whole nuclear norm; averaged.

Of ΔWᵢ = Σ σₖ·uₖ·vₖᵀ the first σ that together reach a share `eta` of Σ σ stay, each multiplied by what all of them sum
to over what the kept ones do (STAR, arXiv:2502.10339). Small directions are where deltas of different tasks collide. A
module that an adapter lacks is a delta of zero and counts in the mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from merger.methods.declare import MethodSpec, ParameterSpec
from merger.methods.parameters import LAMBDA, SHARE
from merger.methods.rounds import Call
from merger.methods.whole import CoreBlock, WholeBlock

if TYPE_CHECKING:
    from torch import Tensor

    from merger.methods.lowrank import Core


def cut_and_stretched(call: Call, x_Kpq: Sequence[Tensor]) -> Tensor:
    """Σ wᵢ·star(xᵢ) / Σ wᵢ, float64."""
    import torch

    from merger.methods.lowrank import spectrum_of

    total = _total(call)
    merged = torch.zeros_like(x_Kpq[0], dtype=torch.float64)
    for weight, x in zip(call.weights, x_Kpq, strict=True):
        found = spectrum_of(x)
        if not weight or not len(found.s_k):
            continue
        running = torch.cumsum(found.s_k, 0)
        count = min(int(torch.searchsorted(running, call.number("eta") * running[-1])) + 1, len(running))
        stretched = found.s_k * (running[-1] / running[count - 1])
        merged += weight / total * ((found.u_mk * stretched)[:, :count] @ found.v_nk[:, :count].T)
    return merged


def _total(call: Call) -> float:
    return sum((*call.weights, *call.absent)) or 1.0


class StarWhole(WholeBlock):
    """On whole deltas of models. What is no matrix is averaged."""

    def bytes(self, rows: int, cols: int, count: int) -> int:
        small = min(rows, cols)
        return 8 * (5 * rows * cols + 6 * small * small)

    def merge(self, call: Call, deltas_Kmn: Sequence[Tensor], base_mn: Tensor | None, *, vector: bool) -> Tensor:
        if vector:
            merged = deltas_Kmn[0].double() * 0
            for weight, x in zip(call.weights, deltas_Kmn, strict=True):
                merged += x.double() * (weight / _total(call))
            return merged.float()
        return cut_and_stretched(call, deltas_Kmn).float()


class StarCore(CoreBlock):
    """On the exact core of adapters: it has the singular values of the deltas."""

    def merge(self, call: Call, core: Core) -> tuple[Tensor, Tensor]:
        return core.left_mR @ cut_and_stretched(call, core.cores), core.right_nR


METHODS = (
    MethodSpec(
        name="star", summary="the mean of each delta's largest singular directions, stretched to its nuclear norm",
        spaces=("delta", "core"), combine="block", whole=StarWhole(), core=StarCore(),
        parameters=(
            SHARE, LAMBDA,
            ParameterSpec(name="eta", kind="float", scope="global", low=0.0, high=1.0, low_open=True,
                          doc="share of the sum of each delta's singular values that the kept ones reach"),
        ),
        base="required", closed_on_deltas=True, cut="whole", any_order=True, paper="arXiv:2502.10339",
        bibtex="@inproceedings{lee2025star, title={STAR: Spectral Truncation and Rescale for Model Merging}, "
               "author={Lee, Yu-Ang and Ko, Ching-Yun and Pedapati, Tejaswini and Chung, I-Hsin and Yeh, Mi-Yen and "
               "Chen, Pin-Yu}, booktitle={NAACL}, year={2025}}",
    ),
)  # fmt: skip
