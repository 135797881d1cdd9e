"""regmean: the matrix whose outputs are nearest to what each source's matrix gives on that source's own inputs.

W = (Σ wᵢ·Wᵢ·Gᵢ')·(Σ wᵢ·Gᵢ')⁻¹ with Gᵢ = XᵢᵀXᵢ of the layer's inputs Xᵢ (samples, columns), its off-diagonal elements
multiplied by `reduce_non_diagonal_ratio` (Jin and others, arXiv:2212.09849; 0.9 as in the authors' demonstration).
On deltas of one base it is the same merge, ridge and all: the base cancels. On adapters it is exact at the sum of their
ranks: the left side of the core stays, and the right side is what the solve gives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from merger.errors import MergeFailedError
from merger.methods.declare import MethodSpec, ParameterSpec
from merger.methods.parameters import LAMBDA, MISSING, SHARE
from merger.methods.rounds import Call
from merger.methods.whole import CoreBlock, Grams, WholeBlock, core_bytes

if TYPE_CHECKING:
    from torch import Tensor

    from merger.methods.lowrank import Core

_TRUSTED: Final = 2.0**-23
"""Gram matrices come as float32 or less: what is smaller beside 1 is a rounding."""
_ASYMMETRY: Final = 1e-3


def regression(call: Call, grams: Grams, rows_of: Callable[[int, Tensor], Tensor]) -> Tensor:
    """(Σ w·R)·(Σ w·G')⁻¹, float64, with R = `rows_of(k, G')` the rows of source k times its Gram matrix.

    Raises MergeFailedError: `singular-gram`, `bad-statistics`.
    """
    import torch

    total: Tensor | None = None
    right: Tensor | None = None
    for k, weight in enumerate(call.weights):
        if not weight:
            continue
        gram = _shrunk(call, grams(k).double())
        product = rows_of(k, gram) * weight
        right = product if right is None else right + product
        total = gram * weight if total is None else total + gram * weight
    assert total is not None
    assert right is not None
    if not total.numel():
        return right
    diagonal = total.diagonal()
    unseen = int((diagonal <= 0).sum())
    if unseen:
        raise _singular(f"{unseen} of {len(diagonal)} inputs are zero in every sample")
    # Inputs differ in size by orders of magnitude: scaled to a diagonal of ones, a pivot says what is really lacking.
    scale = diagonal.rsqrt()
    lower, failed = torch.linalg.cholesky_ex(total * scale * scale[:, None])
    if int(failed) or float(lower.diagonal().min()) ** 2 <= len(diagonal) * _TRUSTED:
        raise _singular("some inputs are, in every sample, a combination of the others")
    return torch.cholesky_solve((right * scale).T, lower).T * scale


def _shrunk(call: Call, gram_nn: Tensor) -> Tensor:
    """G' = ratio·G off the diagonal, plus the ridge on it."""
    import torch

    if not gram_nn.numel():
        return gram_nn
    diagonal = gram_nn.diagonal().clone()
    size = float(diagonal.abs().max())
    if bool((diagonal < 0).any()) or float((gram_nn - gram_nn.T).abs().max()) > _ASYMMETRY * size:
        raise MergeFailedError.of(
            "bad-statistics", "a Gram matrix is not symmetric, or its diagonal is negative", where="statistics",
            why="XᵀX is neither", fix="check what was written into the statistics",
        )  # fmt: skip
    if not bool(torch.isfinite(gram_nn).all()):
        raise MergeFailedError.of(
            "not-finite", "a Gram matrix has NaN or Inf", where="statistics", fix="collect the statistics again",
        )  # fmt: skip
    found = (gram_nn + gram_nn.T) * (call.number("reduce_non_diagonal_ratio") / 2)
    found.diagonal().copy_(diagonal + call.number("ridge") * diagonal.mean())
    return found


def _singular(why: str) -> MergeFailedError:
    return MergeFailedError.of(
        "singular-gram", "the Gram matrices of a tensor cannot be inverted", where="statistics", why=why,
        fix="collect more samples, lower reduce_non_diagonal_ratio, or give a ridge such as 1e-4",
    )  # fmt: skip


class RegressionWhole(WholeBlock):
    """On whole deltas, or weights where there is no base."""

    def bytes(self, rows: int, cols: int, count: int) -> int:
        return 8 * (6 * rows * cols + 7 * cols * cols)

    def merge(self, call: Call, deltas_Kmn: Sequence[Tensor], base_mn: Tensor | None, *, vector: bool) -> Tensor:
        raise NotImplementedError("the planner merges a tensor without statistics as a mean")

    def merge_measured(self, call: Call, deltas_Kmn: Sequence[Tensor], grams: Grams) -> Tensor:
        return regression(call, grams, lambda k, gram: deltas_Kmn[k].double() @ gram).float()


class RegressionCore(CoreBlock):
    """On the exact core of adapters."""

    def bytes(self, rows: int, cols: int, total_rank: int, count: int) -> int:
        return core_bytes(rows, cols, total_rank, count) + 8 * (4 * total_rank * cols + 7 * cols * cols)

    def merge(self, call: Call, core: Core) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("the planner merges a tensor without statistics as a mean")

    def merge_measured(self, call: Call, core: Core, grams: Grams) -> tuple[Tensor, Tensor]:
        found = regression(call, grams, lambda k, gram: core.cores[k] @ (core.right_nR.T @ gram))
        return core.left_mR, found.T


METHODS = (
    MethodSpec(
        name="regmean", summary="the matrix that best does what each source does on its own inputs",
        spaces=("delta", "weight", "core"), combine="block", whole=RegressionWhole(), core=RegressionCore(),
        statistics="gram",
        parameters=(
            SHARE, LAMBDA,
            ParameterSpec(name="reduce_non_diagonal_ratio", kind="float", scope="global", default=0.9, low=0.0,
                          high=1.0, doc="multiplies the off-diagonal elements of every Gram matrix"),
            ParameterSpec(name="ridge", kind="float", scope="global", default=0.0, low=0.0,
                          doc="share of its mean that is added to every Gram matrix's diagonal: a pull towards the "
                              "plain mean"),
            replace(MISSING, default="mean"),
        ),
        base="optional", closed_on_deltas=True, cut="whole", any_order=True, one_is_itself=True,
        paper="arXiv:2212.09849",
        bibtex="@inproceedings{jin2023regmean, title={Dataless Knowledge Fusion by Merging Weights of Language "
               "Models}, author={Jin, Xisen and Ren, Xiang and Preotiuc-Pietro, Daniel and Cheng, Pengxiang}, "
               "booktitle={ICLR}, year={2023}}",
    ),
)  # fmt: skip
