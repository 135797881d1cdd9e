"""Slow, obvious twins of the methods in merger/methods/consensus.py: element by element, float64, sorted lists."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
F64 = npt.NDArray[np.float64]


def sce(deltas: Sequence[F64], *, select_topk: float = 1.0) -> F64:
    shape = deltas[0].shape
    x = np.array([d.reshape(-1) for d in deltas])
    if select_topk < 1:
        # Ranked in float32, where nearly equal variances may be equal.
        variance = np.array([np.float32(np.mean((c - c.mean()) ** 2)) for c in x.T])
        wanted = int(select_topk * int((variance != 0).sum()))
        order = sorted(range(x.shape[1]), key=lambda i: (-variance[i], i))[:wanted]
        mask = np.zeros(x.shape[1])
        mask[order] = 1
        x = x * mask
    squares = (x**2).mean(axis=1) if x.size else np.zeros(len(x))
    a = squares / squares.sum() if squares.sum() >= 1e-6 else np.full(len(x), 1 / len(x))
    out = np.zeros(x.shape[1])
    for i, column in enumerate(x.T):
        sign = 1 if column.sum() >= 0 else -1
        shares = [w if np.sign(v) == sign else 0.0 for w, v in zip(a, column, strict=True)]
        out[i] = sum(w * v for w, v in zip(shares, column, strict=True)) / max(sum(shares), 1e-6)
    return out.reshape(shape)


def ram(deltas: Sequence[F64], *, epsilon: float = 1e-5, boosts: Sequence[float] | None = None) -> F64:
    out = np.zeros(deltas[0].size)
    for i in range(out.size):
        column = [float(d.reshape(-1)[i]) for d in deltas]
        changed = [k for k, v in enumerate(column) if abs(v) > np.float32(epsilon)]
        if len(changed) == 1:
            out[i] = column[changed[0]] * (1.0 if boosts is None else boosts[changed[0]])
        elif changed:
            out[i] = sum(column[k] for k in changed) / len(changed)
    return out.reshape(deltas[0].shape)


def ramplus(deltas: Sequence[F64], *, epsilon: float = 1e-5, r: float = 0.1, alpha: float = 0.2) -> F64:
    changed = np.array([np.abs(d.reshape(-1)) > np.float32(epsilon) for d in deltas])
    count = changed.sum(axis=0)
    boosts = []
    for mine in changed:
        ratio = float((mine & (count > 1)).sum()) / max(float((mine & (count == 1)).sum()), epsilon)
        boosts.append(1 + r * min(max(ratio, 0.0), alpha))
    return ram(deltas, epsilon=epsilon, boosts=boosts)


def magmax(deltas: Sequence[F64], weights: Sequence[float]) -> F64:
    out = np.zeros(deltas[0].size)
    for i in range(out.size):
        column = [w * float(d.reshape(-1)[i]) for w, d in zip(weights, deltas, strict=True)]
        out[i] = column[max(range(len(column)), key=lambda k: (abs(column[k]), -k))]
    return out.reshape(deltas[0].shape)


def consensus_ta(deltas: Sequence[F64], weights: Sequence[float], bounds: Sequence[float], k: int) -> F64:
    mine = [w * d for w, d in zip(weights, deltas, strict=True)]
    total = sum(mine, np.zeros_like(deltas[0]))
    votes = sum(
        ((np.abs(m) >= b * np.abs(total - m)).astype(int) for m, b in zip(mine, bounds, strict=True)),
        np.zeros(total.shape, int),
    )
    return np.where(votes >= k, total, 0.0)


def pcb(deltas: Sequence[F64], *, ratio: float = 0.1) -> F64:
    """Of whole models, laid end to end, or of one tensor."""
    count, numel = len(deltas), deltas[0].size
    flat = [d.reshape(-1) for d in deltas]
    total = sum(flat, np.zeros(numel))
    above, below = np.zeros(numel), np.zeros(numel)
    for x in flat:
        ranked = sorted(abs(v) for v in x)
        low, high = ranked[int(numel * 1e-4)], ranked[max(0, int(numel * (1 - 1e-4) - 1))]
        size = np.clip(np.abs(x), low, high)
        inner = (size - low) / (high - low) if high > low else np.zeros(numel)
        score = [
            float(np.float32(math.exp(count * n * n) * math.tanh(v * t)))
            for n, v, t in zip(inner, x, total, strict=True)
        ]
        rising = sorted(score)
        least, most = rising[min(numel - 1, int(numel * (1 - ratio)))], rising[-1]
        if most > least:
            share = np.array([(min(max(s, least), most) - least) / (most - least) for s in score])
        else:
            share = np.full(numel, 1.0 if most > 0 else 0.0)
        above += np.sign(x) * size * share
        below += share
    return (above / np.maximum(below, 1e-12)).reshape(deltas[0].shape)
