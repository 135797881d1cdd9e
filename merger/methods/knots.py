"""KnOTS (arXiv:2410.19735): knots_ties, knots_dare. Rules on the right vectors of the joint SVD of all deltas.

[ΔW_1 | … | ΔW_T] = U·S·[V_1ᵀ | … | V_Tᵀ]: one left basis for all, so that row k of V_iᵀ means the same in every
source. The rule masks V_i, S scales what is left, and ΔW = U·S·merge(V_i). Signs and factors change nothing: a row of
every V_iᵀ turns over together. The joint SVD is one of the exact core; only V_iᵀ, (R, n) a source, is made whole.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from merger.methods.core import DIVISOR_PAPER, ELECT_PAPER, combined, prepared
from merger.methods.declare import MethodSpec
from merger.methods.parameters import DENSITY, LAMBDA, WEIGHT, normalize, rescale
from merger.methods.rounds import Call
from merger.methods.whole import CoreBlock

if TYPE_CHECKING:
    from torch import Tensor

    from merger.methods.lowrank import Core


class Knots(CoreBlock):
    """prepare and combine on the V_i of the joint SVD."""

    def bytes(self, rows: int, cols: int, total_rank: int, count: int) -> int:
        return super().bytes(rows, cols, total_rank, count) + 8 * (4 * count + 3) * min(total_rank, rows) * cols

    def merge(self, call: Call, core: Core) -> tuple[Tensor, Tensor]:
        import torch

        from merger.methods.lowrank import spectrum_of, without_dust

        joint = spectrum_of(torch.cat(core.cores, dim=1))
        parts = torch.split(joint.v_nk, core.cores[0].shape[1])
        shape = (len(joint.s_k), len(core.right_nR))
        ready = []
        for k, v in enumerate(parts):
            # A source that changes nothing casts no vote: its share of the vectors is roundings of the others'.
            rows_kn = (core.right_nR @ v * bool(core.cores[k].any())).T.contiguous()
            ready.append(prepared(call, k, without_dust(rows_kn).reshape(-1).numpy()))
        merged = torch.from_numpy(combined(call, np.stack(ready))).view(shape)
        return core.left_mR @ joint.u_mk * joint.s_k, merged.T


PAPER = "arXiv:2410.19735"
BIBTEX = (
    "@inproceedings{stoica2025knots, title={Model merging with SVD to tie the Knots}, author={Stoica, George and "
    "Ramesh, Pratik and Ecsedi, Boglarka and Choshen, Leshem and Hoffman, Judy}, booktitle={ICLR}, year={2025}}"
)

METHODS = (
    MethodSpec(
        name="knots_ties", summary="ties on the right singular vectors of all adapters' joint SVD",
        spaces=("core",), prepare="trim", combine="elect", core=Knots(),
        parameters=(WEIGHT, DENSITY, LAMBDA, normalize(True), rescale("none"), ELECT_PAPER, DIVISOR_PAPER),
        base="required", closed_on_deltas=True, cut="whole", paper=PAPER, bibtex=BIBTEX,
    ),
    MethodSpec(
        name="knots_dare", summary="dare_ties on the right singular vectors of all adapters' joint SVD",
        spaces=("core",), prepare="drop", combine="elect", core=Knots(),
        parameters=(WEIGHT, DENSITY, LAMBDA, normalize(True), rescale("inverse"), ELECT_PAPER, DIVISOR_PAPER),
        base="required", closed_on_deltas=True, cut="whole", paper=PAPER, bibtex=BIBTEX,
    ),
)  # fmt: skip
