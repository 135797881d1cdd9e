"""One interface, `Kernels`, over the compiled kernels (numpy arrays) and plain torch (tensors of any device).

The executor holds numpy arrays. `load` takes one to where the kernels work and `unload` brings it back; on the CPU both
are free. Merges that need no product and no spectral step never import torch: that is a second of start-up and 200 MB.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from merger.kernels import LANES

Array = Any
"""A contiguous float32 vector (or (sources, elements) matrix) of the kernels' own kind: ndarray or Tensor."""
Host = npt.NDArray[np.float32]


class Kernels(Protocol):
    """What the executor asks of a device. Functions ending in no noun act in place."""

    on_host: bool
    """Whether arrays are the executor's own, so that small pieces fit a core's cache."""

    def load(self, x: Host) -> Array: ...
    def unload(self, x: Array) -> Host: ...
    def empty(self, *shape: int) -> Array: ...
    def copy(self, out: Array, x: Array) -> None: ...
    def vector(self, values: Sequence[float]) -> Array: ...
    def count_high(self, x: Array, counts: Array) -> None: ...
    def count_low(self, x: Array, prefix: int, counts: Array) -> None: ...
    def trim(self, x: Array, threshold: int, allowance: int) -> int: ...
    def drop(self, x: Array, first: int, key: int, limit: int, factor: float = 1.0, out: Array = None) -> None: ...
    def scale(self, x: Array, factor: float) -> None: ...
    def divide(self, x: Array, divisor: float) -> None: ...
    def subtract(self, x: Array, base: Array) -> None: ...
    def add(self, x: Array, other: Array) -> None: ...
    def weighted_sum(self, deltas: Array, weights: Array, out: Array) -> None: ...
    def elect(
        self, deltas: Array, weights: Array, *, weighted: bool, frequency: bool, divide: int, scratch: Array,
        out: Array,
    ) -> None: ...  # fmt: skip
    def accumulate(self, x: Array, factor: float, out: Array) -> None: ...
    def scale_and_add(self, base: Array, factor: float, out: Array) -> None: ...
    def combine_two(self, a: Array, b: Array, factor_a: float, factor_b: float, out: Array) -> None: ...
    def dot(self, x: Array, y: Array) -> float: ...
    def sum_abs(self, x: Array) -> float: ...
    def largest(self, x: Array) -> int: ...


def _host(x: Array) -> Any:
    """The ndarray of an ndarray or of a CPU tensor (shared, not copied)."""
    return x if isinstance(x, np.ndarray) else x.numpy()


class CompiledKernels:
    """The numba kernels. Arrays are ndarrays; CPU tensors are taken too, and share their memory."""

    on_host = True

    def __init__(self) -> None:
        from merger.kernels.native import CPU

        self._cpu = CPU

    def load(self, x: Host) -> Array:
        return x

    def unload(self, x: Array) -> Host:
        found: Host = x
        return found

    def empty(self, *shape: int) -> Array:
        return np.empty(shape, np.float32)

    def copy(self, out: Array, x: Array) -> None:
        out[...] = x

    def vector(self, values: Sequence[float]) -> Array:
        return np.array(values, np.float32)

    def widen_bf16(self, bits: npt.NDArray[np.uint16], out: Host) -> None:
        self._cpu.widen_bf16(bits, out)

    def narrow_bf16(self, x: Host, bits: npt.NDArray[np.uint16]) -> None:
        self._cpu.narrow_bf16(x, bits)

    def count_high(self, x: Array, counts: Array) -> None:
        self._cpu.count_high(_host(x), _host(counts))

    def count_low(self, x: Array, prefix: int, counts: Array) -> None:
        self._cpu.count_low(_host(x), prefix, _host(counts))

    def trim(self, x: Array, threshold: int, allowance: int) -> int:
        return int(self._cpu.trim(_host(x), threshold, allowance))

    def drop(self, x: Array, first: int, key: int, limit: int, factor: float = 1.0, out: Array = None) -> None:
        target = _host(x if out is None else out)
        self._cpu.drop(_host(x), first, key & 0xFFFFFFFF, key >> 32, limit, np.float32(factor), target)

    def scale(self, x: Array, factor: float) -> None:
        self._cpu.scale(_host(x), np.float32(factor))

    def divide(self, x: Array, divisor: float) -> None:
        self._cpu.divide(_host(x), np.float32(divisor))

    def subtract(self, x: Array, base: Array) -> None:
        self._cpu.subtract(_host(x), _host(base))

    def add(self, x: Array, other: Array) -> None:
        self._cpu.add(_host(x), _host(other))

    def weighted_sum(self, deltas: Array, weights: Array, out: Array) -> None:
        self._cpu.weighted_sum(_host(deltas), _host(weights), _host(out))

    def elect(
        self, deltas: Array, weights: Array, *, weighted: bool, frequency: bool, divide: int, scratch: Array,
        out: Array,
    ) -> None:  # fmt: skip
        self._cpu.elect(
            _host(deltas), _host(weights), weighted, frequency, divide, _host(scratch), _host(out)
        )  # fmt: skip

    def accumulate(self, x: Array, factor: float, out: Array) -> None:
        self._cpu.accumulate(_host(x), np.float32(factor), _host(out))

    def scale_and_add(self, base: Array, factor: float, out: Array) -> None:
        self._cpu.scale_and_add(_host(base), np.float32(factor), _host(out))

    def combine_two(self, a: Array, b: Array, factor_a: float, factor_b: float, out: Array) -> None:
        self._cpu.combine_two(_host(a), _host(b), np.float32(factor_a), np.float32(factor_b), _host(out))

    def dot(self, x: Array, y: Array) -> float:
        return float(self._cpu.dot(_host(x), _host(y)))

    def sum_abs(self, x: Array) -> float:
        return float(self._cpu.sum_abs(_host(x), np.empty(LANES)))

    def largest(self, x: Array) -> int:
        return int(self._cpu.largest(_host(x)))


class PlainKernels:
    """The same in plain torch. Arrays are tensors of one device."""

    on_host = False

    def __init__(self, device: str = "cpu") -> None:
        import torch

        from merger.kernels import plain

        self._plain = plain
        self._torch = torch
        self._device = torch.device(device)

    def load(self, x: Host) -> Array:
        return self._torch.from_numpy(x).to(self._device)

    def unload(self, x: Array) -> Host:
        found: Host = x.cpu().numpy()
        return found

    def empty(self, *shape: int) -> Array:
        return self._torch.empty(shape, dtype=self._torch.float32, device=self._device)

    def copy(self, out: Array, x: Array) -> None:
        out.copy_(x)

    def vector(self, values: Sequence[float]) -> Array:
        return self._torch.tensor(values, dtype=self._torch.float32, device=self._device)

    def count_high(self, x: Array, counts: Array) -> None:
        self._plain.count_high(x, self._counts(counts))

    def count_low(self, x: Array, prefix: int, counts: Array) -> None:
        self._plain.count_low(x, prefix, self._counts(counts))

    def _counts(self, counts: Array) -> Array:
        return self._torch.from_numpy(counts) if isinstance(counts, np.ndarray) else counts

    def trim(self, x: Array, threshold: int, allowance: int) -> int:
        return self._plain.trim(x, threshold, allowance)

    def drop(self, x: Array, first: int, key: int, limit: int, factor: float = 1.0, out: Array = None) -> None:
        target = x if out is None else out
        self._plain.drop(x, first, key & 0xFFFFFFFF, key >> 32, limit, float(np.float32(factor)), target)

    def scale(self, x: Array, factor: float) -> None:
        self._plain.scale(x, float(np.float32(factor)))

    def divide(self, x: Array, divisor: float) -> None:
        self._plain.divide(x, float(np.float32(divisor)))

    def subtract(self, x: Array, base: Array) -> None:
        self._plain.subtract(x, base)

    def add(self, x: Array, other: Array) -> None:
        self._plain.add(x, other)

    def weighted_sum(self, deltas: Array, weights: Array, out: Array) -> None:
        self._plain.weighted_sum(deltas, weights, out)

    def elect(
        self, deltas: Array, weights: Array, *, weighted: bool, frequency: bool, divide: int, scratch: Array,
        out: Array,
    ) -> None:  # fmt: skip
        self._plain.elect(deltas, weights, weighted, frequency, divide, scratch, out)

    def accumulate(self, x: Array, factor: float, out: Array) -> None:
        self._plain.accumulate(x, float(np.float32(factor)), out)

    def scale_and_add(self, base: Array, factor: float, out: Array) -> None:
        self._plain.scale_and_add(base, float(np.float32(factor)), out)

    def combine_two(self, a: Array, b: Array, factor_a: float, factor_b: float, out: Array) -> None:
        self._plain.combine_two(a, b, float(np.float32(factor_a)), float(np.float32(factor_b)), out)

    def dot(self, x: Array, y: Array) -> float:
        return self._plain.dot(x, y)

    def sum_abs(self, x: Array) -> float:
        return self._plain.sum_abs(x)

    def largest(self, x: Array) -> int:
        return self._plain.largest(x)


def kernels_for(device: object) -> Kernels:
    """The compiled kernels for `cpu`, plain torch elsewhere. `device` is a torch device or its name."""
    return CompiledKernels() if str(device).startswith("cpu") else PlainKernels(str(device))
