"""Low-rank algebra: the exact core of stacked LoRA factors, and how a matrix becomes a LoRA pair.

With B = [B₁ … B_T] (m, R), A = [A₁; … ; A_T] (R, n), B = Q_B R_B and Aᵀ = Q_A R_A, each delta is Q_B M_i Q_Aᵀ with
M_i = R_B[:, i] R_A[:, i]ᵀ of size (R, R): no dense matrix is ever made. float64 throughout; one thread; each QR and SVD
happens once, in one unit.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

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
        return min(len(running), int(torch.searchsorted(running, share * running[-1])) + 1)


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


# ---- the numerical rank: what singular values can be trusted to be there -------------------------------------------

_TRUSTED: Final = 2.0**-23
"""Sources come as float32 or less: below max(rows, cols)·2⁻²³·σ₁ a direction is a rounding, not a change."""
_EQUAL: Final = 1e-10
"""Relative gap of singular values that were made equal."""
_GRAM_SIDE: Final = 512
"""Above this, singular vectors come from the smaller Gram matrix in float64: its own floor, √2⁻⁵²·σ₁, is far below what
is cut off, and it costs a fraction of an SVD."""


@dataclass(frozen=True, slots=True)
class Spectrum:
    """u · diag(s) · vᵀ without null directions: U (m, k), s (k,), V (n, k), float64. k may be 0."""

    u_mk: Tensor
    s_k: Tensor
    v_nk: Tensor

    def product(self, s_k: Tensor | None = None) -> Tensor:
        """The matrix (m, n), with other singular values where given."""
        return (self.u_mk * (self.s_k if s_k is None else s_k)) @ self.v_nk.T

    def signed(self) -> Spectrum:
        """The same with signs fixed: the largest element of each column of U is positive."""
        signs = _signs(self.u_mk)
        return Spectrum(self.u_mk * signs, self.s_k, self.v_nk * signs)


def spectrum_of(x_mn: Tensor, *, against: float = 0.0) -> Spectrum:
    """The singular value decomposition at the numerical rank, judged by σ₁ or, for what is left of a difference, by
    the norm `against` of what it was made from.

    Whoever whitens, equalises or lifts singular values must not see what lies below it: an SVD returns arbitrary
    vectors for null directions, and float32 and float64 then give results that have nothing in common.
    """
    m, n = x_mn.shape
    x = x_mn.double()
    if min(m, n) <= _GRAM_SIDE:
        u, s, vt = torch.linalg.svd(x, full_matrices=False)
        k = _numerical_rank(s, m, n, against)
        return Spectrum(u[:, :k], s[:k], vt[:k].T)
    y = x if m <= n else x.T  # (small, large)
    values, vectors = torch.linalg.eigh(y @ y.T)
    s = torch.sqrt(torch.clamp(values.flip(0), min=0.0))
    k = _numerical_rank(s, m, n, against)
    near = vectors.flip(1)[:, :k]
    far = y.T @ near / s[:k]
    return Spectrum(near, s[:k], far) if m <= n else Spectrum(far, s[:k], near)


def _numerical_rank(s: Tensor, m: int, n: int, against: float) -> int:
    scale = max(against, float(s[0])) if len(s) else 0.0
    return int((s > max(m, n) * _TRUSTED * scale).sum()) if scale > 0.0 else 0


def spectrum_of_product(p_mk: Tensor, q_nk: Tensor) -> Spectrum:
    """The same of P · Qᵀ, never made: a QR of each side, then an SVD of their small product."""
    left, r_left = _thin_qr(p_mk)
    right, r_right = _thin_qr(q_nk)
    small = spectrum_of(r_left @ r_right.T)
    return Spectrum(left @ small.u_mk, small.s_k, right @ small.v_nk)


def whiten(x_mk: Tensor) -> Tensor:
    """The partial isometry nearest to x: P·Qᵀ of x = P·D·Qᵀ at the numerical rank. (m, k), as x."""
    found = spectrum_of(x_mk)
    return found.u_mk @ found.v_nk.T


def reference_core(core: Core) -> Core:
    """The same deltas in coordinates that depend on the deltas alone.

    The left singular vectors of [B₁ … B_T] and the right ones of [A₁; … ; A_T] (Core Space, arXiv:2509.17786), in
    falling order, signs fixed, null directions left out. The factors are balanced first, B_i = U_i√S_i and
    A_i = √S_i·V_iᵀ of ΔW_i = U_i·S_i·V_iᵀ, so that other factors of the same deltas give the same coordinates, and so
    does another order of the sources.
    """
    spectra = [spectrum_of(m) for m in core.cores]
    left = spectrum_of(torch.cat([p.u_mk * torch.sqrt(p.s_k) for p in spectra], dim=1)).u_mk
    right = spectrum_of(torch.cat([p.v_nk * torch.sqrt(p.s_k) for p in spectra], dim=1)).u_mk
    left_mp, right_np = core.left_mR @ left, core.right_nR @ right
    left, left_mp = left * _signs(left_mp), left_mp * _signs(left_mp)
    right, right_np = right * _signs(right_np), right_np * _signs(right_np)
    return Core(left_mp, right_np, tuple(without_dust(left.T @ m @ right) for m in core.cores))


def without_dust(x: Tensor) -> Tensor:
    """Zero for what is a rounding of the matrix as a whole: where a source has nothing, it must cast no vote."""
    return torch.where(x.abs() <= _TRUSTED * torch.linalg.norm(x), 0.0, x)


def _signs(x_mk: Tensor) -> Tensor:
    """±1 a column, by its largest element."""
    if not x_mk.numel():
        return torch.ones(x_mk.shape[1], dtype=x_mk.dtype)
    signs = torch.sign(x_mk[x_mk.abs().argmax(dim=0), torch.arange(x_mk.shape[1])])
    return torch.where(signs == 0, 1.0, signs).to(x_mk.dtype)


def settled(found: Spectrum, total_kk: Tensor) -> Spectrum:
    """The same matrix, with directions of equal singular values in an order that the data decide.

    `total` is Uᵀ·(Σ w_i·ΔW_i)·V. Of directions that a method made equal, those that hold most of the plain sum come
    first and stay when the rank is cut; an SVD alone would return any.
    """
    u, v, s = found.u_mk.clone(), found.v_nk.clone(), found.s_k
    first, count = 0, len(s)
    while first < count:
        last = first + 1
        while last < count and float(s[last - 1] - s[last]) <= _EQUAL * float(s[first]):
            last += 1
        if last - first > 1:
            within = total_kk[first:last, first:last]
            rotation = torch.linalg.eigh((within + within.T) / 2).eigenvectors.flip(1)
            u[:, first:last] = found.u_mk[:, first:last] @ rotation
            v[:, first:last] = found.v_nk[:, first:last] @ rotation
        first = last
    return Spectrum(u, s, v)


def cut_spectrum(found: Spectrum, rank: int, *, split: bool) -> Pair:
    """The best rank-`rank` pair of a matrix whose spectrum is known."""
    keep = min(rank, len(found.s_k))
    return _pair(found.u_mk[:, :keep], found.s_k, found.v_nk[:, :keep].T, keep, split=split)


# ---- calibration: directions that several sources share are counted once --------------------------------------------


def calibrated(
    merged: Spectrum, shares: Iterable[Tensor], directions_nk: Tensor, alpha: float, scale: float
) -> Spectrum:
    """Singular value calibration (arXiv:2602.05536): σ_k ← γ_k·σ_k. `merged` is scale · the merge.

    `shares` holds u_kᵀ·ΔW_i for each source, (k, n), and `directions` the v_k in the same coordinates. With
    s_k^i = ⟨σ_k·v_k, u_kᵀΔW_i⟩ / ‖u_kᵀΔW_i‖², how many times over source i finds its own share in the merged direction,
    γ_k = T / Σ_i max(α, s_k^i). A source without a share has s = 0.
    """
    total, count = torch.zeros_like(merged.s_k), 0
    floor = (_TRUSTED * merged.s_k / scale) ** 2 if scale else torch.zeros_like(merged.s_k)
    for share_kn in shares:
        squares = (share_kn**2).sum(dim=1)
        dots = merged.s_k / scale * (share_kn * directions_nk.T).sum(dim=1)
        own = torch.where(squares > floor, dots / torch.where(squares > floor, squares, 1.0), 0.0)
        total += torch.clamp(own, min=alpha)
        count += 1
    gains = count / total if count else torch.ones_like(total)
    order = torch.argsort(merged.s_k * gains, descending=True, stable=True)
    return Spectrum(merged.u_mk[:, order], (merged.s_k * gains)[order], merged.v_nk[:, order])
