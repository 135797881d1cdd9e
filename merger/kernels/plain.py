"""The kernels of merger/kernels/cpu.py in plain torch: their specification on the CPU, and what runs on a GPU.

Every operation rounds once (no fused multiply-add), so the bits equal the compiled kernels'. All tensors are
contiguous float32 on one device; functions act in place where their twins do.
"""

from __future__ import annotations

import torch
from torch import Tensor

from merger.kernels import LANES
from merger.kernels.hashing import MIX_A, MIX_B, WEYL

_MASK = 0xFFFFFFFF


def _magnitudes(x: Tensor) -> Tensor:
    return x.view(torch.int32) & 0x7FFFFFFF


def count_high(x: Tensor, counts: Tensor) -> None:
    """Add to `counts` (65536 bins, int64) the upper 16 bits of each magnitude."""
    counts += torch.bincount((_magnitudes(x) >> 15).long(), minlength=counts.numel()).to(counts.device)


def count_low(x: Tensor, prefix: int, counts: Tensor) -> None:
    """Add to `counts` (32768 bins) the lower 15 bits of the magnitudes whose upper 16 bits are `prefix`."""
    magnitudes = _magnitudes(x)
    inside = magnitudes[(magnitudes >> 15) == prefix] & 0x7FFF
    counts += torch.bincount(inside.long(), minlength=counts.numel()).to(counts.device)


def trim(x: Tensor, threshold: int, allowance: int) -> int:
    """Zero what is below the threshold, and what equals it once `allowance` such elements were kept."""
    magnitudes = _magnitudes(x)
    equal = magnitudes == threshold
    order = torch.cumsum(equal.long(), 0)
    x[(magnitudes < threshold) | (equal & (order > allowance))] = 0.0
    return min(int(equal.sum()), allowance)


def _mix(h: Tensor) -> Tensor:
    h = h ^ (h >> 16)
    h = (h * MIX_A) & _MASK
    h = h ^ (h >> 15)
    h = (h * MIX_B) & _MASK
    return h ^ (h >> 16)


def drop(x: Tensor, first: int, key_low: int, key_high: int, limit: int, factor: float, out: Tensor) -> None:
    """out = factor·x where the hash is below `limit`, else zero (see merger/kernels/hashing.py)."""
    index = torch.arange(first, first + x.numel(), dtype=torch.int64, device=x.device)
    h = _mix((index & _MASK) ^ key_low)
    h = _mix((h + key_high + (((index >> 32) * WEYL) & _MASK)) & _MASK)
    out.copy_(torch.where(h < limit, x, x * 0.0 + 0.0) * factor)


def scale(x: Tensor, factor: float) -> None:
    x.mul_(factor)


def divide(x: Tensor, divisor: float) -> None:
    x.div_(torch.tensor(divisor, dtype=torch.float32, device=x.device))


def subtract(x: Tensor, base: Tensor) -> None:
    x.sub_(base)


def add(x: Tensor, other: Tensor) -> None:
    x.add_(other)


def weighted_sum(deltas: Tensor, weights: Tensor, out: Tensor) -> None:
    """out = ((w₀·d₀ + w₁·d₁) + w₂·d₂) …; `deltas` is (sources, elements)."""
    torch.mul(deltas[0], weights[0], out=out)
    for k in range(1, deltas.shape[0]):
        out.add_(deltas[k] * weights[k])


def elect(
    deltas: Tensor, weights: Tensor, weighted: bool, frequency: bool, divide: int, scratch: Tensor, out: Tensor
) -> None:
    """Elect a sign at each element and sum what agrees with it; see the compiled twin for the rules."""
    del scratch
    total, divisor = torch.zeros_like(out), torch.zeros_like(out)
    out.zero_()
    for k in range(deltas.shape[0]):
        if frequency:
            total += torch.sign(deltas[k])
        else:
            total += deltas[k] * weights[k] if weighted else deltas[k]
    for k in range(deltas.shape[0]):
        product = deltas[k] * weights[k]
        judged = product if weighted else deltas[k]
        agrees = torch.where(total >= 0, judged > 0, judged < 0)
        out += torch.where(agrees, product, product * 0.0)
        divisor += agrees * (weights[k] if divide == 1 else 1.0)
    if divide:
        out /= torch.where(divisor == 0, 1.0, divisor)


def accumulate(x: Tensor, factor: float, out: Tensor) -> None:
    """out += factor·x, two roundings."""
    out.add_(x * factor)


def scale_and_add(base: Tensor, factor: float, out: Tensor) -> None:
    """out = base + factor·out, two roundings."""
    out.mul_(factor).add_(base)


def combine_two(a: Tensor, b: Tensor, factor_a: float, factor_b: float, out: Tensor) -> None:
    """out = factor_a·a + factor_b·b."""
    torch.mul(a, factor_a, out=out)
    out.add_(b * factor_b)


def _eighths(products: Tensor) -> float:
    # Row i of the (n/8, 8) view adds to partial sum i: the order of the compiled loop.
    whole = products.numel() - products.numel() % 8
    partial = [0.0] * 8
    for row in products[:whole].reshape(-1, 8).tolist():
        for lane in range(8):
            partial[lane] += row[lane]
    total = ((partial[0] + partial[1]) + (partial[2] + partial[3])) + (
        (partial[4] + partial[5]) + (partial[6] + partial[7])
    )
    for value in products[whole:].tolist():
        total += value
    return float(total)


def dot(x: Tensor, y: Tensor) -> float:
    """Σ x·y in float64. On the CPU summed in the compiled loop's order; on a GPU to float64 rounding."""
    products = x.double() * y.double()
    return _eighths(products) if x.device.type == "cpu" else float(products.sum())


def sum_abs(x: Tensor) -> float:
    """Σ|x| in float64. On the CPU in the compiled loop's partial sums; on a GPU to float64 rounding."""
    values = x.double().abs()
    if x.device.type != "cpu":
        return float(values.sum())
    lanes = torch.zeros(LANES, dtype=torch.float64)
    for chunk in torch.split(values, LANES):
        lanes[: chunk.numel()] += chunk
    while lanes.numel() > 1:
        half = lanes.numel() // 2
        lanes = lanes[:half] + lanes[half:]
    return float(lanes[0])


def largest(x: Tensor) -> int:
    """Bits of the largest magnitude; NaN and Inf are the largest of all."""
    return int(_magnitudes(x).max()) if x.numel() else 0
