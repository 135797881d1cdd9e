"""PEFT's merges of LoRA factors: A with A, B with B (`space: factors`).

They are not merges of the deltas: products of one source's B with another's A remain (PEFT issue 3004). They exist
because people ask for PEFT's numbers. Values follow PEFT 0.21.2 on a CPU: weights Σ√|w·s| with the sign on A, whole
factors, torch.topk deciding among equal magnitudes, all in float32 (PEFT loads adapters so), one cast.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from merger.methods.rounds import Call, kept

Mask = Callable[[int, Tensor], Tensor]
"""(source, factor) → mask of what a random drop keeps, of the factor's shape."""


def split_coefficient(coefficient: float) -> tuple[float, float]:
    """weight · scaling as (coefficient on A, coefficient on B): σ√|c| and √|c|, with σ the sign (0 counts as +)."""
    root = math.sqrt(abs(coefficient))
    return (-root if coefficient < 0 else root), root


def merge_factor(call: Call, factors: Sequence[Tensor], coefficients: Sequence[float], mask: Mask) -> Tensor:
    """Merge one factor of several adapters. `factors` share a shape; the result is float32, not yet cast."""
    pruned = [_prune(call, i, factor, mask) for i, factor in enumerate(factors)]
    weights = torch.tensor(coefficients, dtype=torch.float32)
    stack = torch.stack(pruned)
    shaped = weights.reshape(-1, *[1] * (stack.dim() - 1))
    if call.combine != "elect":
        return (stack * shaped).sum(dim=0)
    signs = stack.sign() if call.elect == "frequency" else stack
    total = signs.sum(dim=0)
    majority = torch.where(total >= 0, 1, -1)
    agrees = stack.sign() == majority
    merged = (stack * shaped * agrees).sum(dim=0)
    if call.normalize:
        merged = merged / torch.clamp(agrees.sum(dim=0), min=1.0)
    return merged


def _prune(call: Call, source: int, factor: Tensor, mask: Mask) -> Tensor:
    if call.keeps_all(source):
        return factor
    density = call.densities[source]
    if call.prepare == "trim":
        keep = kept(density, factor.numel(), keep_one=call.keep_one)
        flat = torch.zeros(factor.numel(), dtype=factor.dtype)
        chosen = torch.topk(factor.abs().reshape(-1), k=keep, largest=True).indices
        flat[chosen] = 1
        return factor * flat.reshape(factor.shape)
    dropped = factor * mask(source, factor)
    return dropped / density if call.rescale == "inverse" and density > 0 else dropped


def concatenate(
    pairs: Sequence[tuple[Tensor, Tensor] | None], weights: Sequence[float], scalings: Sequence[float], rank: int,
    rows: int, cols: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """[(A·w)·s stacked], [B side by side]: Σ w·s·B·A exactly, but for two float32 roundings of A.

    Rows beyond the sources' ranks are zero, as PEFT leaves them. Returns A (rank, cols) and B (rows, rank).
    """
    a_Rn = torch.zeros(rank, cols, dtype=torch.float32)
    b_mR = torch.zeros(rows, rank, dtype=torch.float32)
    at = 0
    for pair, weight, scaling in zip(pairs, weights, scalings, strict=True):
        if pair is None:
            continue
        a, b = pair
        a_Rn[at : at + a.shape[0]] = (a * weight) * scaling
        b_mR[:, at : at + a.shape[0]] = b
        at += a.shape[0]
    return a_Rn, b_mR
