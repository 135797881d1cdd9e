"""Slow, obvious twins of the methods that take statistics: float64, one formula a function. No code of merger/."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
F64 = npt.NDArray[np.float64]


def fisher(sources: Sequence[Array], diagonals: Sequence[Array], weights: Sequence[float], floor: float = 1e-6) -> F64:
    """arXiv:2111.09832, equation 6: Σ wᵢFᵢWᵢ / Σ wᵢFᵢ."""
    shares = [w * np.maximum(f.astype(np.float64), floor) for w, f in zip(weights, diagonals, strict=True)]
    total = np.sum([s * x.astype(np.float64) for s, x in zip(shares, sources, strict=True)], axis=0)
    found: F64 = np.asarray(total / np.sum(shares, axis=0))
    return found


def reduced(gram: Array, ratio: float, ridge: float = 0.0) -> F64:
    """Off-diagonal elements times `ratio`; `ridge` times the mean diagonal on the diagonal."""
    g = gram.astype(np.float64)
    found: F64 = ratio * g + (1 - ratio) * np.diag(np.diag(g)) + ridge * float(np.mean(np.diag(g))) * np.eye(len(g))
    return found


def regmean(
    sources: Sequence[Array], grams: Sequence[Array], weights: Sequence[float], ratio: float = 0.9, ridge: float = 0.0
) -> F64:
    """arXiv:2212.09849, equation 2, for weights (outputs, inputs): (Σ wᵢWᵢGᵢ)(Σ wᵢGᵢ)⁻¹."""
    ready = [w * reduced(g, ratio, ridge) for w, g in zip(weights, grams, strict=True)]
    left = np.sum([x.astype(np.float64) @ g for x, g in zip(sources, ready, strict=True)], axis=0)
    found: F64 = left @ np.linalg.inv(np.sum(ready, axis=0))
    return found


def loss(w: F64, sources: Sequence[Array], inputs: Sequence[Array], weights: Sequence[float]) -> float:
    """What regmean minimises: Σ wᵢ·‖Xᵢ·Wᵀ - Xᵢ·Wᵢᵀ‖²."""
    return sum(
        weight * float(np.sum((x @ (w - own).T) ** 2)) for weight, own, x in zip(weights, sources, inputs, strict=True)
    )
