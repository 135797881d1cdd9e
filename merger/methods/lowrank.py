"""Low-rank algebra: the exact core of stacked LoRA factors, and how a matrix becomes a LoRA pair.

With B = [B₁ … B_T] (m, R), A = [A₁; … ; A_T] (R, n), B = Q_B R_B and Aᵀ = Q_A R_A, each delta is Q_B M_i Q_Aᵀ with
M_i = R_B[:, i] R_A[:, i]ᵀ of size (R, R): no dense matrix is ever made. float64 throughout; one thread; each QR and SVD
happens once, in one unit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Core:
    """The deltas in their own coordinates: ΔW_i = left · cores[i] · rightᵀ."""

    left_mR: Tensor
    right_nR: Tensor
    cores: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class Pair:
    """A LoRA pair in float64, B (m, r) and A (r, n), with what the cut to rank r lost."""

    a_rn: Tensor
    b_mr: Tensor
    singular_values: Tensor
    """All of them, not only those kept."""
    energy: float
    """‖ΔW‖²."""

    @property
    def lost(self) -> float:
        """Share of the energy that rank r does not hold, in [0, 1]."""
        if self.energy <= 0:
            return 0.0
        kept = float((self.singular_values[: self.a_rn.shape[0]] ** 2).sum())
        return max(0.0, 1.0 - kept / self.energy)

    def rank_for(self, share: float) -> int:
        """The smallest rank that keeps `share` of the energy."""
        if self.energy <= 0:
            return 0
        running = torch.cumsum(self.singular_values**2, 0)
        return min(len(running), int(torch.searchsorted(running, share * self.energy)) + 1)


def build_core(pairs: Sequence[tuple[Tensor, Tensor]]) -> Core:
    """The core of factors A_i (r_i, n), B_i (m, r_i), any float dtype, scalings already in B."""
    b_mR = torch.cat([b.double() for _, b in pairs], dim=1)
    a_nR = torch.cat([a.double() for a, _ in pairs], dim=0).T.contiguous()
    left, r_left = _thin_qr(b_mR)
    right, r_right = _thin_qr(a_nR)
    cores, at = [], 0
    for a, _ in pairs:
        stop = at + a.shape[0]
        cores.append(r_left[:, at:stop] @ r_right[:, at:stop].T)
        at = stop
    return Core(left, right, tuple(cores))


def _thin_qr(x: Tensor) -> tuple[Tensor, Tensor]:
    if x.shape[1] >= x.shape[0]:
        return torch.eye(x.shape[0], dtype=x.dtype), x
    q, r = torch.linalg.qr(x, mode="reduced")
    return q, r


def truncate_core(core: Core, merged_RR: Tensor, rank: int, *, split: bool) -> Pair:
    """The best rank-`rank` pair of left · merged · rightᵀ (Eckart–Young holds: both sides are orthonormal)."""
    u, s, vt = torch.linalg.svd(merged_RR, full_matrices=False)
    keep = min(rank, len(s))
    return _pair(core.left_mR @ u[:, :keep], s, vt[:keep] @ core.right_nR.T, keep, split=split)


def truncate_dense(delta_mn: Tensor, rank: int, *, split: bool) -> Pair:
    """The best rank-`rank` pair of a dense matrix (float32 in, float64 out).

    Eigenvectors of the smaller Gram matrix in float64: exact to float32 for all that a float32 matrix can tell apart,
    and several times faster than a dense SVD.
    """
    m, n = delta_mn.shape
    wide = m <= n
    x = delta_mn.double() if wide else delta_mn.T.double()  # (small, large)
    values, vectors = torch.linalg.eigh(x @ x.T)
    s = torch.sqrt(torch.clamp(values.flip(0), min=0.0))
    keep = min(rank, len(s))
    u = vectors.flip(1)[:, :keep]
    projected = u.T @ x  # rows are σᵢ·vᵢᵀ
    vt = projected / torch.where(s[:keep] > 0, s[:keep], torch.ones_like(s[:keep]))[:, None]
    if wide:
        return _pair(u, s, vt, keep, split=split)
    return _pair(vt.T, s, u.T, keep, split=split)


def _pair(u_mr: Tensor, s_all: Tensor, vt_rn: Tensor, keep: int, *, split: bool) -> Pair:
    # An SVD is unique up to a sign a component: make each column of U sum its largest element positive.
    s = s_all[:keep]
    if keep:
        at = u_mr.abs().argmax(dim=0)
        signs = torch.sign(u_mr[at, torch.arange(keep)])
        signs = torch.where(signs == 0, torch.ones_like(signs), signs)
        u_mr, vt_rn = u_mr * signs, vt_rn * signs[:, None]
    energy = float((s_all**2).sum())
    if split:
        root = torch.sqrt(s)
        return Pair(root[:, None] * vt_rn, u_mr * root, s_all, energy)
    return Pair(vt_rn, u_mr * s, s_all, energy)
