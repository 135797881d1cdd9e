"""Slow, obvious twins of every method, in numpy and float64. They share no code with merger/.

A source is an array; a delta is source − base, taken in float32 (the order of two nearly equal magnitudes is decided
there). All else is float64, and the caller rounds once.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
F64 = npt.NDArray[np.float64]


def delta(source: Array, base: Array) -> F64:
    """source − base, rounded to float32 once."""
    return (source.astype(np.float32) - base.astype(np.float32)).astype(np.float64)


# ---- prepare ---------------------------------------------------------------------------------------------------------


def kept(density: float, numel: int, *, keep_one: bool = True) -> int:
    """How many elements a density keeps."""
    if density >= 1:
        return numel
    if density <= 0 or numel == 0:
        return 0
    count = math.floor(density * numel)
    return max(1, count) if keep_one else count


def trim(x: F64, density: float, *, keep_one: bool = True) -> F64:
    """The k largest magnitudes; of equal ones those with the lowest flat index."""
    flat = x.reshape(-1)
    chosen = sorted(range(flat.size), key=lambda i: (-abs(flat[i]), i))[: kept(density, flat.size, keep_one=keep_one)]
    out = np.zeros_like(flat)
    out[chosen] = flat[chosen]
    return out.reshape(x.shape)


def trim_model(deltas: Mapping[str, F64], density: float, *, keep_one: bool = True) -> dict[str, F64]:
    """`trim` over all tensors end to end, in the mapping's order."""
    whole = trim(np.concatenate([d.reshape(-1) for d in deltas.values()]), density, keep_one=keep_one)
    found, at = {}, 0
    for name, d in deltas.items():
        found[name] = whole[at : at + d.size].reshape(d.shape)
        at += d.size
    return found


def _mix(h: int) -> int:
    h ^= h >> 16
    h = h * 0x7FEB352D % 2**32
    h ^= h >> 15
    h = h * 0x846CA68B % 2**32
    return h ^ h >> 16


def hash32(index: int, key: int) -> int:
    """The hash of merger/kernels/hashing.py in Python's own integers."""
    low, high = index % 2**32, index // 2**32
    h = _mix(low ^ key % 2**32)
    return _mix((h + key // 2**32 + high * 0x9E3779B9) % 2**32)


def key_of(seed: int, position: int, tensor: str, factor: str) -> int:
    """The 64-bit key of one source's tensor."""
    text = "\0".join([str(seed), str(position), tensor, factor])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def keep_mask(size: int, density: float, key: int, first: int = 0) -> npt.NDArray[np.bool_]:
    """Which of `size` elements from flat index `first` a random drop keeps."""
    limit = round(density * 2**32)
    return np.array([hash32(first + i, key) < limit for i in range(size)], dtype=bool)


def drop(x: F64, density: float, key: int) -> F64:
    if density >= 1:
        return x
    return x * keep_mask(x.size, density, key).reshape(x.shape)


def rescaled(before: F64, after: F64, density: float, how: str) -> F64:
    """What is left after a trim or a drop, scaled up: `none`, `l1`, `inverse`."""
    if density >= 1 or how == "none":
        return after
    if how == "inverse":
        return after / density if density > 0 else after
    total, left = float(np.abs(before).sum()), float(np.abs(after).sum())
    return after if total < 1e-7 or left < 1e-7 else after * (total / left)


# ---- combine ---------------------------------------------------------------------------------------------------------


def summed(deltas: Sequence[F64], weights: Sequence[float], *, normalize: bool = False) -> F64:
    total = sum((w * d for w, d in zip(weights, deltas, strict=True)), np.zeros_like(deltas[0]))
    divisor = sum(weights)
    return total / divisor if normalize and abs(divisor) >= 1e-8 else total


def elected(
    deltas: Sequence[F64], weights: Sequence[float], *, by: str = "weighted", divisor: str = "weights",
    normalize: bool = True,
) -> F64:  # fmt: skip
    """Element by element: elect a sign, add what agrees, divide."""
    out = np.zeros(deltas[0].size)
    for e in range(out.size):
        values = [float(d.reshape(-1)[e]) for d in deltas]
        judged = [w * v if by == "weighted" else v for w, v in zip(weights, values, strict=True)]
        ballot = [float(np.sign(j)) for j in judged] if by == "frequency" else judged
        positive = sum(ballot) >= 0
        agree = [j > 0 if positive else j < 0 for j in judged]
        total = sum(w * v for w, v, a in zip(weights, values, agree, strict=True) if a)
        shares = [w if divisor == "weights" else 1.0 for w, a in zip(weights, agree, strict=True) if a]
        out[e] = total / (sum(shares) or 1.0) if normalize else total
    return out.reshape(deltas[0].shape)


# ---- named methods ---------------------------------------------------------------------------------------------------


def linear(sources: Sequence[Array], weights: Sequence[float], *, normalize: bool = True) -> F64:
    wide = [s.astype(np.float64) for s in sources]
    total = sum((w * s for w, s in zip(weights, wide, strict=True)), np.zeros_like(wide[0]))
    return total / sum(weights) if normalize else total


def task_arithmetic(
    base: Array, deltas: Sequence[F64], weights: Sequence[float], *, scale: float = 1.0, normalize: bool = False
) -> F64:
    return base.astype(np.float64) + scale * summed(deltas, weights, normalize=normalize)


def ties(
    base: Array, deltas: Sequence[F64], weights: Sequence[float], densities: Sequence[float], *, scale: float = 1.0,
    elect: str = "weighted", divisor: str = "weights", normalize: bool = True, rescale: str = "none",
) -> F64:  # fmt: skip
    ready = [rescaled(d, trim(d, p), p, rescale) for d, p in zip(deltas, densities, strict=True)]
    found = elected(ready, weights, by=elect, divisor=divisor, normalize=normalize)
    return base.astype(np.float64) + scale * found


def ties_model(
    bases: Mapping[str, Array], deltas: Sequence[Mapping[str, F64]], weights: Sequence[float],
    densities: Sequence[float], *, scale: float = 1.0, elect: str = "weighted", divisor: str = "weights",
    normalize: bool = True,
) -> dict[str, F64]:  # fmt: skip
    """TIES with one threshold a source for the whole model."""
    ready = [trim_model(d, p) for d, p in zip(deltas, densities, strict=True)]
    return {
        name: base.astype(np.float64)
        + scale * elected([r[name] for r in ready], weights, by=elect, divisor=divisor, normalize=normalize)
        for name, base in bases.items()
    }


def magnitude_prune(
    base: Array, deltas: Sequence[F64], weights: Sequence[float], densities: Sequence[float], *, scale: float = 1.0,
    normalize: bool = False, rescale: str = "none",
) -> F64:  # fmt: skip
    ready = [rescaled(d, trim(d, p), p, rescale) for d, p in zip(deltas, densities, strict=True)]
    return base.astype(np.float64) + scale * summed(ready, weights, normalize=normalize)


def dare(
    base: Array, deltas: Sequence[F64], weights: Sequence[float], densities: Sequence[float], keys: Sequence[int], *,
    elects: bool, scale: float = 1.0, rescale: str = "l1", elect: str = "weighted", divisor: str = "weights",
    normalize: bool = False,
) -> F64:  # fmt: skip
    """dare_linear, and with `elects` dare_ties."""
    ready = [rescaled(d, drop(d, p, k), p, rescale) for d, p, k in zip(deltas, densities, keys, strict=True)]
    if elects:
        found = elected(ready, weights, by=elect, divisor=divisor, normalize=normalize)
    else:
        found = summed(ready, weights, normalize=normalize)
    return base.astype(np.float64) + scale * found


def slerp(a: Array, b: Array, t: float) -> F64:
    x, y = a.astype(np.float64), b.astype(np.float64)
    norms = [float(np.sqrt((v * v).sum())) for v in (x, y)]
    cosine = float((x * y).sum()) / (norms[0] if norms[0] > 1e-8 else 1.0) / (norms[1] if norms[1] > 1e-8 else 1.0)
    cosine = min(1.0, max(-1.0, cosine))
    if abs(cosine) > 0.9995:
        return (1 - t) * x + t * y
    angle = math.acos(cosine)
    return (math.sin((1 - t) * angle) * x + math.sin(t * angle) * y) / math.sin(angle)


def passthrough(source: Array, scale: float = 1.0) -> F64:
    return source.astype(np.float64) * scale


# ---- stores ----------------------------------------------------------------------------------------------------------


def svd(x: F64, rank: int) -> tuple[F64, F64, F64]:
    """A = √S·Vᵀ, B = U√S and all singular values; the largest element of each column of U is positive."""
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    for c in range(len(s)):
        if u[np.abs(u[:, c]).argmax(), c] < 0:
            u[:, c], vt[c] = -u[:, c], -vt[c]
    root = np.sqrt(s[:rank])
    return root[:, None] * vt[:rank], u[:, :rank] * root, s


def concat(
    pairs: Sequence[tuple[Array, Array] | None], weights: Sequence[float], scalings: Sequence[float]
) -> tuple[F64, F64]:
    """[A·(w·s)] one under the other, [B] side by side."""
    there = [(p, w, s) for p, w, s in zip(pairs, weights, scalings, strict=True) if p is not None]
    a = np.concatenate([p[0].astype(np.float64) * (w * s) for p, w, s in there], axis=0)
    b = np.concatenate([p[1].astype(np.float64) for p, _, _ in there], axis=1)
    return a, b


def cores(pairs: Sequence[tuple[Array, Array]]) -> tuple[F64, F64, list[F64]]:
    """U_ref, V_ref and the cores U_refᵀ·ΔW_i·V_ref of deltas B_i·A_i (scalings already in B).

    U_ref: left singular vectors of [U_1√S_1 … U_T√S_T], V_ref: of [V_1√S_1 … V_T√S_T], with ΔW_i = U_i·S_i·V_iᵀ.
    """
    deltas = [p[1].astype(np.float64) @ p[0].astype(np.float64) for p in pairs]
    lefts, rights = [], []
    for x, (a, b) in zip(deltas, pairs, strict=True):
        u, s, vt = np.linalg.svd(x, full_matrices=False)
        rank = min(np.linalg.matrix_rank(a), np.linalg.matrix_rank(b))
        lefts.append(u[:, :rank] * np.sqrt(s[:rank]))
        rights.append(vt[:rank].T * np.sqrt(s[:rank]))
    sides = []
    for stack in (np.concatenate(lefts, axis=1), np.concatenate(rights, axis=1)):
        u, s, _ = np.linalg.svd(stack, full_matrices=False)
        u = u[:, : int((s > 1e-6 * max(s, default=0.0)).sum())]
        sides.append(u * np.where(u[np.abs(u).argmax(axis=0), np.arange(u.shape[1])] < 0, -1.0, 1.0))
    left, right = sides
    return left, right, [left.T @ x @ right for x in deltas]


# ---- PEFT's merges of factors ----------------------------------------------------------------------------------------


def peft_factor(
    kind: str, which: str, factors: Sequence[Array], coefficients: Sequence[float], *, density: float = 1.0,
    majority: str = "total", keys: Sequence[int] = (),
) -> F64:  # fmt: skip
    """One factor of `linear`, `ties`, `dare_linear`, `dare_ties` or `magnitude_prune`.

    A coefficient is weight · scaling; √|c| goes on both factors, its sign on A.
    """
    ready: list[F64] = []
    for i, factor in enumerate(factors):
        x = factor.astype(np.float64)
        if density < 1 and kind in ("ties", "magnitude_prune"):
            x = trim(x, density, keep_one=False)
        elif density < 1 and kind.startswith("dare"):
            x = drop(x, density, keys[i]) / density
        ready.append(x)
    roots = [math.sqrt(abs(c)) * (-1.0 if which == "A" and c < 0 else 1.0) for c in coefficients]
    if not kind.endswith("ties"):
        return sum((r * x for r, x in zip(roots, ready, strict=True)), np.zeros_like(ready[0]))
    ballots = [np.sign(x) for x in ready] if majority == "frequency" else ready
    sign = np.where(sum(ballots, np.zeros_like(ready[0])) >= 0, 1.0, -1.0)
    agrees = [np.sign(x) == sign for x in ready]
    total = sum((r * x * a for r, x, a in zip(roots, ready, agrees, strict=True)), np.zeros_like(ready[0]))
    return total / np.maximum(sum((a.astype(np.float64) for a in agrees), np.zeros_like(ready[0])), 1.0)


# ---- rounding --------------------------------------------------------------------------------------------------------


def bfloat16_bits(x: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """float32 to the nearest bfloat16, ties to even, as bits. Finite values only."""
    bits = x.view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
