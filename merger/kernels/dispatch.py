"""One interface, `Kernels`, over the compiled kernels and plain torch."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from merger.kernels import plain


class Kernels(Protocol):
    """What the executor asks of a device. Tensors are contiguous float32 vectors on that device."""

    def count_high(self, x: Tensor, counts: Tensor) -> None: ...
    def count_low(self, x: Tensor, prefix: int, counts: Tensor) -> None: ...
    def trim(self, x: Tensor, threshold: int, allowance: int) -> int: ...
    def drop(self, x: Tensor, first: int, key: int, limit: int) -> None: ...
    def scale(self, x: Tensor, factor: float) -> None: ...
    def divide(self, x: Tensor, divisor: float) -> None: ...
    def subtract(self, x: Tensor, base: Tensor) -> None: ...
    def add(self, x: Tensor, other: Tensor) -> None: ...
    def weighted_sum(self, deltas: Tensor, weights: Tensor, out: Tensor) -> None: ...
    def elect(
        self, deltas: Tensor, weights: Tensor, *, weighted: bool, frequency: bool, divide: int, scratch: Tensor,
        out: Tensor,
    ) -> None: ...  # fmt: skip
    def accumulate(self, x: Tensor, factor: float, out: Tensor) -> None: ...
    def scale_and_add(self, base: Tensor, factor: float, out: Tensor) -> None: ...
    def combine_two(self, a: Tensor, b: Tensor, factor_a: float, factor_b: float, out: Tensor) -> None: ...
    def dot(self, x: Tensor, y: Tensor) -> float: ...
    def sum_abs(self, x: Tensor) -> float: ...
    def largest(self, x: Tensor) -> int: ...


class CompiledKernels:
    """The numba kernels, on CPU tensors."""

    def __init__(self) -> None:
        from merger.kernels import cpu

        self._cpu = cpu

    def count_high(self, x: Tensor, counts: Tensor) -> None:
        self._cpu.count_high(x.numpy(), counts.numpy())

    def count_low(self, x: Tensor, prefix: int, counts: Tensor) -> None:
        self._cpu.count_low(x.numpy(), prefix, counts.numpy())

    def trim(self, x: Tensor, threshold: int, allowance: int) -> int:
        return int(self._cpu.trim(x.numpy(), threshold, allowance))

    def drop(self, x: Tensor, first: int, key: int, limit: int) -> None:
        self._cpu.drop(x.numpy(), first, key & 0xFFFFFFFF, key >> 32, limit)

    def scale(self, x: Tensor, factor: float) -> None:
        self._cpu.scale(x.numpy(), np.float32(factor))

    def divide(self, x: Tensor, divisor: float) -> None:
        self._cpu.divide(x.numpy(), np.float32(divisor))

    def subtract(self, x: Tensor, base: Tensor) -> None:
        self._cpu.subtract(x.numpy(), base.numpy())

    def add(self, x: Tensor, other: Tensor) -> None:
        self._cpu.add(x.numpy(), other.numpy())

    def weighted_sum(self, deltas: Tensor, weights: Tensor, out: Tensor) -> None:
        self._cpu.weighted_sum(deltas.numpy(), weights.numpy(), out.numpy())

    def elect(
        self, deltas: Tensor, weights: Tensor, *, weighted: bool, frequency: bool, divide: int, scratch: Tensor,
        out: Tensor,
    ) -> None:  # fmt: skip
        self._cpu.elect(
            deltas.numpy(), weights.numpy(), weighted, frequency, divide, scratch.numpy(), out.numpy()
        )  # fmt: skip

    def accumulate(self, x: Tensor, factor: float, out: Tensor) -> None:
        self._cpu.accumulate(x.numpy(), np.float32(factor), out.numpy())

    def scale_and_add(self, base: Tensor, factor: float, out: Tensor) -> None:
        self._cpu.scale_and_add(base.numpy(), np.float32(factor), out.numpy())

    def combine_two(self, a: Tensor, b: Tensor, factor_a: float, factor_b: float, out: Tensor) -> None:
        self._cpu.combine_two(a.numpy(), b.numpy(), np.float32(factor_a), np.float32(factor_b), out.numpy())

    def dot(self, x: Tensor, y: Tensor) -> float:
        return float(self._cpu.dot(x.numpy(), y.numpy()))

    def sum_abs(self, x: Tensor) -> float:
        return float(self._cpu.sum_abs(x.numpy()))

    def largest(self, x: Tensor) -> int:
        return int(self._cpu.largest(x.numpy()))


class PlainKernels:
    """The same in plain torch, on any device."""

    def count_high(self, x: Tensor, counts: Tensor) -> None:
        plain.count_high(x, counts)

    def count_low(self, x: Tensor, prefix: int, counts: Tensor) -> None:
        plain.count_low(x, prefix, counts)

    def trim(self, x: Tensor, threshold: int, allowance: int) -> int:
        return plain.trim(x, threshold, allowance)

    def drop(self, x: Tensor, first: int, key: int, limit: int) -> None:
        plain.drop(x, first, key & 0xFFFFFFFF, key >> 32, limit)

    def scale(self, x: Tensor, factor: float) -> None:
        plain.scale(x, float(np.float32(factor)))

    def divide(self, x: Tensor, divisor: float) -> None:
        plain.divide(x, float(np.float32(divisor)))

    def subtract(self, x: Tensor, base: Tensor) -> None:
        plain.subtract(x, base)

    def add(self, x: Tensor, other: Tensor) -> None:
        plain.add(x, other)

    def weighted_sum(self, deltas: Tensor, weights: Tensor, out: Tensor) -> None:
        plain.weighted_sum(deltas, weights, out)

    def elect(
        self, deltas: Tensor, weights: Tensor, *, weighted: bool, frequency: bool, divide: int, scratch: Tensor,
        out: Tensor,
    ) -> None:  # fmt: skip
        plain.elect(deltas, weights, weighted, frequency, divide, scratch, out)

    def accumulate(self, x: Tensor, factor: float, out: Tensor) -> None:
        plain.accumulate(x, float(np.float32(factor)), out)

    def scale_and_add(self, base: Tensor, factor: float, out: Tensor) -> None:
        plain.scale_and_add(base, float(np.float32(factor)), out)

    def combine_two(self, a: Tensor, b: Tensor, factor_a: float, factor_b: float, out: Tensor) -> None:
        plain.combine_two(a, b, float(np.float32(factor_a)), float(np.float32(factor_b)), out)

    def dot(self, x: Tensor, y: Tensor) -> float:
        return plain.dot(x, y)

    def sum_abs(self, x: Tensor) -> float:
        return plain.sum_abs(x)

    def largest(self, x: Tensor) -> int:
        return plain.largest(x)


def kernels_for(device: torch.device) -> Kernels:
    """The compiled kernels on the CPU, plain torch elsewhere."""
    return CompiledKernels() if device.type == "cpu" else PlainKernels()
