"""Slow, obvious twins of the spectral methods: dense float64 matrices, one SVD a line. They share no code with merger/.

`deltas` are (m, n) float64. A weight scales its delta first; a source of weight 0 takes no part. Singular values below
max(m, n)·2⁻²³·σ₁ are roundings and are left out. The published forms that leave them in stand at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
F64 = npt.NDArray[np.float64]

TRUSTED = 2.0**-23


def thin_svd(x: F64, scale: float = 0.0) -> tuple[F64, F64, F64]:
    """U (m, k), s (k,), V (n, k) at the numerical rank, judged by σ₁ or by a larger `scale`."""
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    k = int((s > max(x.shape) * TRUSTED * max(scale, float(s[0]) if len(s) else 0.0)).sum())
    return u[:, :k], s[:k], vt[:k].T


def weighted(deltas: Sequence[F64], weights: Sequence[float]) -> list[F64]:
    return [w * x for w, x in zip(weights, deltas, strict=True) if w != 0]


def nearest_isometry(x: F64) -> F64:
    u, _, v = thin_svd(x)
    return u @ v.T


def tsv_m(deltas: Sequence[F64], weights: Sequence[float], side: int | None = None) -> F64:
    """arXiv:2412.00081: ⌊min(m, n) / T⌋ triplets a source, both stacks whitened by Procrustes."""
    taken = weighted(deltas, weights)
    if not taken:
        return np.zeros_like(deltas[0])
    k = max(1, (min(deltas[0].shape) if side is None else side) // len(taken))
    parts = [thin_svd(x) for x in taken]
    u = nearest_isometry(np.concatenate([p[0][:, :k] for p in parts], axis=1))
    v = nearest_isometry(np.concatenate([p[2][:, :k] for p in parts], axis=1))
    s = np.concatenate([p[1][:k] for p in parts])
    found: F64 = u @ np.diag(s) @ v.T
    return found


def iso_c(deltas: Sequence[F64], weights: Sequence[float]) -> F64:
    """arXiv:2502.04959: mean(σ)·U·Vᵀ of the sum."""
    taken = weighted(deltas, weights)
    if not taken:
        return np.zeros_like(deltas[0])
    u, s, v = thin_svd(np.sum(taken, axis=0), max(float(np.linalg.norm(x)) for x in taken))
    found: F64 = (s.mean() if len(s) else 0.0) * (u @ v.T)
    return found


def iso_cts(deltas: Sequence[F64], weights: Sequence[float], fraction: float = 0.8) -> F64:
    """arXiv:2502.04959: the sum's weakest directions give way to what each source has outside the rest."""
    taken = weighted(deltas, weights)
    if not taken:
        return np.zeros_like(deltas[0])
    scale = max(float(np.linalg.norm(x)) for x in taken)
    u, s, v = thin_svd(np.sum(taken, axis=0), scale)
    size = len(s)
    if size == 0:
        return np.zeros_like(deltas[0])
    each = min(round((size - int(fraction * size)) / len(taken)), size // len(taken))
    shared = size - each * len(taken)
    us, ss, vs = [u[:, :shared]], [s[:shared]], [v[:, :shared]]
    for x in taken:
        own = thin_svd(x - us[0] @ (us[0].T @ x), float(np.linalg.norm(x)))
        us.append(own[0][:, :each])
        ss.append(own[1][:each])
        vs.append(own[2][:, :each])
    left, right = nearest_isometry(np.concatenate(us, axis=1)), nearest_isometry(np.concatenate(vs, axis=1))
    found: F64 = np.concatenate(ss).mean() * (left @ right.T)
    return found


def boost(deltas: Sequence[F64], weights: Sequence[float], beta: float) -> F64:
    """arXiv:2506.16506: singular values after a share β of their sum are lifted to the last one of it."""
    taken = weighted(deltas, weights)
    if not taken:
        return np.zeros_like(deltas[0])
    u, s, v = thin_svd(np.sum(taken, axis=0), max(float(np.linalg.norm(x)) for x in taken))
    last = 0
    while last < len(s) - 1 and s[: last + 1].sum() < beta * s.sum():
        last += 1
    lifted = [max(float(value), float(s[last])) for value in s]
    found: F64 = (u * np.array(lifted)) @ v.T
    return found


def wudi(deltas: Sequence[F64], weights: Sequence[float]) -> F64:
    """arXiv:2503.08099 in closed form: (Σ τ_i·G_i)(Σ G_i)⁺, G_i = τ_iᵀ·τ_i / ‖τ_i‖²."""
    taken = [x for x in weighted(deltas, weights) if np.any(x)]
    if not taken:
        return np.zeros_like(deltas[0])
    grams = [x.T @ x / float((x * x).sum()) for x in taken]
    total: F64 = np.sum([x @ g for x, g in zip(taken, grams, strict=True)], axis=0)
    values, vectors = np.linalg.eigh(np.sum(grams, axis=0))
    rows = sum(x.shape[0] for x in taken)
    keep = np.sqrt(np.clip(values, 0, None)) > max(rows, total.shape[1]) * TRUSTED * np.sqrt(values[-1])
    inverse = (vectors[:, keep] / values[keep]) @ vectors[:, keep].T
    found: F64 = total @ inverse
    return found


def star(deltas: Sequence[F64], weights: Sequence[float], eta: float) -> F64:
    """arXiv:2502.10339: the largest singular values that reach a share η of their sum, rescaled to it; the mean."""
    out = np.zeros_like(deltas[0])
    for w, x in zip(weights, deltas, strict=True):
        u, s, v = thin_svd(x)
        last = 0
        while last < len(s) - 1 and s[: last + 1].sum() < eta * s.sum():
            last += 1
        kept = s[: last + 1]
        if len(s):
            out += w * (u[:, : last + 1] * (kept * s.sum() / kept.sum())) @ v[:, : last + 1].T
    found: F64 = out / sum(weights)
    return found


def svc(merged: F64, deltas: Sequence[F64], weights: Sequence[float], alpha: float = 1.0) -> F64:
    """arXiv:2602.05536: γ_k = T / Σ_i max(α, ⟨u_kᵀΔW, u_kᵀτ_i⟩ / ‖u_kᵀτ_i‖²). Sources as they are, not weighted."""
    u, s, v = thin_svd(merged)
    taken = [x for w, x in zip(weights, deltas, strict=True) if w != 0]
    out = np.zeros_like(merged)
    for k in range(len(s)):
        row = u[:, k] @ merged
        shares = []
        for x in taken:
            own = u[:, k] @ x
            square = float(own @ own)
            shares.append(float(row @ own) / square if square > (TRUSTED * s[k]) ** 2 else 0.0)
        gain = len(taken) / sum(max(alpha, share) for share in shares) if taken else 1.0
        out += gain * s[k] * np.outer(u[:, k], v[:, k])
    return out


def nan_weights(deltas: Sequence[F64], weights: Sequence[float]) -> list[float]:
    """arXiv:2505.16148: w_i·(1/‖τ_i‖) / Σ_j (1/‖τ_j‖)."""
    inverse = [1 / float(np.linalg.norm(x)) if np.any(x) else 0.0 for x in deltas]
    return [w * i / (sum(inverse) or 1.0) for w, i in zip(weights, inverse, strict=True)]


def joint_svd(deltas: Sequence[F64]) -> tuple[F64, F64, list[F64]]:
    """arXiv:2410.19735: U (m, k), s (k,) and V_iᵀ (k, n) of [ΔW_1 | … | ΔW_T]."""
    u, s, v = thin_svd(np.concatenate(deltas, axis=1))
    n = deltas[0].shape[1]
    return u, s, [v[i * n : (i + 1) * n].T for i in range(len(deltas))]


# ---- as published: every direction stays, also those that hold nothing -----------------------------------------------


def published_tsv_m(deltas: Sequence[Array], dtype: type[np.floating[Any]]) -> Array:
    """min(m, n) / T vectors of each SVD, whatever its rank."""
    k = min(deltas[0].shape) // len(deltas)
    parts = [np.linalg.svd(x.astype(dtype), full_matrices=False) for x in deltas]
    pu, _, qu = np.linalg.svd(np.concatenate([p[0][:, :k] for p in parts], axis=1), full_matrices=False)
    pv, _, qv = np.linalg.svd(np.concatenate([p[2][:k] for p in parts], axis=0), full_matrices=False)
    found: Array = pu @ qu @ np.diag(np.concatenate([p[1][:k] for p in parts])) @ pv @ qv
    return found


def published_iso_c(deltas: Sequence[Array], dtype: type[np.floating[Any]]) -> Array:
    """Every one of min(m, n) singular values at their mean."""
    u, s, vt = np.linalg.svd(np.sum([x.astype(dtype) for x in deltas], axis=0), full_matrices=False)
    found: Array = s.mean() * (u @ vt)
    return found
