"""Slow, obvious float64 twins of merger/adapters/formulas.py: one element or one small matrix at a time."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float64]


def dora(weight: Matrix, delta: Matrix, magnitude: Matrix) -> Matrix:
    """Each row of W + ΔW at the length m."""
    out = weight + delta
    for row in range(out.shape[0]):
        out[row] *= magnitude[row] / np.sqrt((out[row] ** 2).sum())
    return out


def ia3(weight: Matrix, factors: Matrix, *, inputs: bool) -> Matrix:
    """Every input or every output times its factor; a convolution's weight has several columns an input."""
    out = weight.copy()
    kernel = weight.shape[1] // len(factors) if inputs else 1
    for row in range(out.shape[0]):
        for col in range(out.shape[1]):
            out[row, col] *= factors[col // kernel] if inputs else factors[row]
    return out


def loha(w1_a: Matrix, w1_b: Matrix, w2_a: Matrix, w2_b: Matrix, scaling: float) -> Matrix:
    out = np.zeros((w1_a.shape[0], w1_b.shape[1]))
    for row in range(out.shape[0]):
        for col in range(out.shape[1]):
            out[row, col] = scaling * (w1_a[row] * w1_b[:, col]).sum() * (w2_a[row] * w2_b[:, col]).sum()
    return out


def lokr(w1: Matrix, w2: Matrix, scaling: float) -> Matrix:
    """Blocks of w2, one an element of w1."""
    return scaling * np.block([[w1[i, j] * w2 for j in range(w1.shape[1])] for i in range(w1.shape[0])])


def locon(up: Matrix, mid: Matrix, down: Matrix, scaling: float) -> Matrix:
    """(out, in·kernel), element by element: up is (out, p), mid (p, q, kernel), down (q, in)."""
    out = np.zeros((up.shape[0], down.shape[1], mid.shape[2]))
    for p in range(mid.shape[0]):
        for q in range(mid.shape[1]):
            for k in range(mid.shape[2]):
                out[:, :, k] += scaling * mid[p, q, k] * np.outer(up[:, p], down[q])
    return out.reshape(up.shape[0], -1)


def cayley(triangle: Matrix, size: int) -> Matrix:
    """(I + Q)⁻¹(I − Q) from the right, of the skew matrix with this upper triangle."""
    q = np.zeros((size, size))
    at = 0
    for i in range(size):
        for j in range(i + 1, size):
            q[i, j], q[j, i] = triangle[at], -triangle[at]
            at += 1
    return np.asarray((np.eye(size) - q) @ np.linalg.inv(np.eye(size) + q), np.float64)


def oft(weight: Matrix, triangles: Matrix, size: int) -> Matrix:
    """W·Rᵀ, R block-diagonal; one triangle serves all blocks."""
    out = weight.copy()
    for block in range(weight.shape[1] // size):
        turn = cayley(triangles[block % len(triangles)], size)
        columns = slice(block * size, (block + 1) * size)
        out[:, columns] = weight[:, columns] @ turn.T
    return out


def expert_deltas(a: Matrix, b: Matrix, experts: int, rank: int, scaling: float) -> list[Matrix]:
    """PEFT's packing: A expert by expert, B rank by rank."""
    deltas = []
    for e in range(experts):
        delta = np.zeros((b.shape[0], a.shape[1]))
        for k in range(rank):
            delta += np.outer(b[:, k * experts + e], a[e * rank + k])
        deltas.append(scaling * delta)
    return deltas


def without_best(weight: Matrix, rank: int) -> Matrix:
    """W less its best approximation of a rank."""
    u, s, vt = np.linalg.svd(weight, full_matrices=False)
    s[:rank] = 0
    return np.asarray((u * s) @ vt, np.float64)
