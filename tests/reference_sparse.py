"""Slow, obvious twins of merger/methods/sparse.py and fusion.py: sorted lists, one element at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
F64 = npt.NDArray[np.float64]


def band(x: F64, density: float, gamma: float) -> F64:
    """Falling by magnitude (of equal ones the lowest index first): skip the outliers, keep the next."""
    if density >= 1:
        return x
    flat = x.reshape(-1)
    wanted = math.floor(density * flat.size)
    skipped = min(math.floor(gamma * flat.size), flat.size - wanted)
    falling = sorted(range(flat.size), key=lambda i: (-abs(flat[i]), i))
    chosen = falling[skipped : skipped + wanted]
    out = np.zeros_like(flat)
    out[chosen] = flat[chosen]
    return out.reshape(x.shape)


def shares(x: F64, density: float, epsilon: float) -> F64:
    """Each element's probability to be kept, by its rank in its row."""
    rows = x.reshape(1, -1) if x.ndim <= 1 else x.reshape(-1, x.shape[-1])
    out = np.empty(rows.shape)
    for r, row in enumerate(rows):
        rising = sorted(range(len(row)), key=lambda i: (abs(row[i]), -i))
        for rank, i in enumerate(rising):
            out[r, i] = (density - epsilon) + 2 * epsilon * rank / (len(row) - 1) if len(row) > 1 else density
    return out.reshape(x.shape)


def magprune(
    x: F64, density: float, epsilon: float, key: int, hash32: Callable[[int, int], int], *, inverse: bool = False
) -> F64:
    if density >= 1:
        return x
    if density <= 0:
        return np.zeros_like(x)
    p = shares(x, density, epsilon).reshape(-1)
    kept = np.array([hash32(i, key) < round(float(p[i]) * 2**32) for i in range(p.size)], dtype=bool)
    out = np.where(kept, x.reshape(-1), 0.0)
    return (out / p if inverse else out).reshape(x.shape)


def arcee_scores(base: Array, other: Array) -> F64:
    rows = [x.astype(np.float64).reshape(1, -1) if x.ndim <= 1 else x.astype(np.float64).reshape(-1, x.shape[-1])
            for x in (base, other)]  # fmt: skip
    out = np.empty(rows[0].shape)
    for r, (b, o) in enumerate(zip(*rows, strict=True)):
        q, p = [np.exp(v - v.max()) / np.exp(v - v.max()).sum() + 1e-8 for v in (b, o)]
        out[r] = np.abs(o - b) * max(0.0, float((p * np.log(p / q)).sum()))
    return out.reshape(base.shape)


def arcee_fusion(base: Array, other: Array) -> tuple[F64, F64, float]:
    """The merged tensor, the scores and the threshold they are held against."""
    scores = arcee_scores(base, other)
    ranked = sorted(float(np.float32(s)) for s in scores.reshape(-1))
    first, median, third = (ranked[math.floor(q * (len(ranked) - 1))] for q in (0.25, 0.5, 0.75))
    threshold = median + 1.5 * (third - first)
    return np.where(scores >= threshold, other, base).astype(np.float64), scores, threshold
