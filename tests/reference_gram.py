"""Slow, obvious twins of the methods in merger/methods/gram.py: vectors, never their inner products alone. float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
F64 = npt.NDArray[np.float64]


def _nuslerp_vectors(a: F64, b: F64, t: float) -> F64:
    """Two vectors of any shape."""
    norms = [max(1e-7, float(np.sqrt((x * x).sum()))) for x in (a, b)]
    cosine = min(1.0, max(-1.0, float((a * b).sum()) / norms[0] / norms[1]))
    if 1 - cosine**2 <= 1e-16:
        return (1 - t) * a + t * b
    angle = math.acos(cosine)
    return (math.sin((1 - t) * angle) * a + math.sin(t * angle) * b) / math.sin(angle)


def nuslerp(a: Array, b: Array, weights: Sequence[float], *, flatten: bool = True, columns: bool = False) -> F64:
    """Of two deltas or two tensors. Without `flatten`, row by row, or column by column."""
    x, y = a.astype(np.float64), b.astype(np.float64)
    total = weights[0] + weights[1]
    t = 0.5 if abs(total) < 1e-6 else weights[1] / total
    if flatten or x.ndim <= 1:
        return _nuslerp_vectors(x, y, t)
    out = np.empty_like(x)
    if columns:
        for index in np.ndindex(x.shape[1:]):
            at = (slice(None), *index)
            out[at] = _nuslerp_vectors(x[at], y[at], t)
    else:
        for index in np.ndindex(x.shape[:-1]):
            out[index] = _nuslerp_vectors(x[index], y[index], t)
    return out


def multislerp(sources: Sequence[Array], weights: Sequence[float], *, normalize: bool = True, eps: float = 1e-8) -> F64:
    """With the tangent step that the closed form leaves out."""
    x = [s.astype(np.float64) for s in sources]
    if len(x) == 1:
        return x[0]
    w = [v / sum(weights) for v in weights] if normalize else list(weights)
    norms = [float(np.sqrt((v * v).sum())) for v in x]
    units = [v / (n + eps) for v, n in zip(x, norms, strict=True)]
    mean = sum((a * u for a, u in zip(w, units, strict=True)), np.zeros_like(x[0]))
    size = float(np.sqrt((mean * mean).sum()))
    if size < 1e-7 * max(1.0, sum(abs(v) for v in w)):
        assert len(x) == 2 or not any(norms)
        return sum((a * v for a, v in zip(w, x, strict=True)), np.zeros_like(x[0]))
    mean = mean / size
    tangent = sum(
        (a * (u - float((u * mean).sum()) * mean) for a, u in zip(w, units, strict=True)), np.zeros_like(x[0])
    )
    length = float(np.sqrt((tangent * tangent).sum()))
    if length > 1e-9:
        mean = math.cos(length) * mean + math.sin(length) * tangent / length
    return mean * sum(a * n for a, n in zip(w, norms, strict=True))


def karcher(sources: Sequence[Array], *, max_iter: int = 10, tol: float = 1e-5) -> F64:
    x = [s.astype(np.float64) for s in sources]
    norms = [float(np.sqrt((v * v).sum())) for v in x]
    units = [v / n for v, n in zip(x, norms, strict=True) if n > tol]
    if not units:
        return np.zeros_like(x[0])
    mean = sum(units, np.zeros_like(x[0])) / len(units)
    size = float(np.sqrt((mean * mean).sum()))
    mean = units[0] if size < tol else mean / size
    for _ in range(max_iter):
        step = np.zeros_like(mean)
        for u in units:
            cosine = min(1.0, max(-1.0, float((u * mean).sum())))
            angle = math.acos(cosine)
            if tol <= angle <= math.pi - tol:
                step += angle / math.sin(angle) * (u - cosine * mean) / len(units)
        length = float(np.sqrt((step * step).sum()))
        if length < tol:
            break
        mean = math.cos(length) * mean + math.sin(length) * step / length
        mean /= float(np.sqrt((mean * mean).sum()))
    return mean * (sum(norms) / len(norms))


def _stock(deltas: Sequence[F64]) -> F64:
    count = len(deltas)
    cosines = []
    for i in range(count):
        for j in range(i):
            norms = float(np.sqrt((deltas[i] ** 2).sum()) * np.sqrt((deltas[j] ** 2).sum()))
            cosines.append(min(1.0, max(-1.0, float((deltas[i] * deltas[j]).sum()) / max(norms, 1e-6))))
    c = sum(cosines) / len(cosines)
    below = 1 + (count - 1) * c
    t = 0.0 if abs(below) < 1e-6 else count * c / below
    return t * sum(deltas, np.zeros_like(deltas[0])) / count


def model_stock(base: Array, deltas: Sequence[F64], *, filter_wise: bool = False) -> F64:
    out = base.astype(np.float64).copy()
    if not filter_wise or out.ndim <= 1:
        return out + _stock(deltas)
    for index in np.ndindex(out.shape[:-1]):
        out[index] += _stock([d[index] for d in deltas])
    return out
