"""From float32 rows to the bytes of a dense output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from merger.errors import MergeFailedError
from merger.kernels.dispatch import CompiledKernels
from merger.tensors import DType

Take = Callable[[str, int], npt.NDArray[np.uint8]]
"""(name, bytes) → a reused buffer."""


def encode_rows(
    dtypes: Sequence[DType | None], rows_mn: npt.NDArray[np.float32], take: Take, kernels: CompiledKernels
) -> list[memoryview]:
    """A block of rows in each dtype."""
    encoded = []
    for code in dtypes:
        assert code is not None
        if code.code == "F32":
            encoded.append(_bytes(rows_mn))
            continue
        buffer = take(f"encoded-{len(encoded)}", rows_mn.size * code.itemsize)
        if code.code == "BF16":
            kernels.narrow_bf16(rows_mn.reshape(-1), buffer.view(np.uint16))
        else:
            buffer.view({"F16": np.float16, "F64": np.float64}[code.code])[...] = rows_mn.reshape(-1)
        encoded.append(_bytes(buffer))
    return encoded


_LARGEST: Final = {"F16": 0x477FF000, "BF16": 0x7F7F8000}
"""Bits of the first float32 that rounds to infinity."""
_INFINITY: Final = 0x7F800000


def check_finite(
    kernels: CompiledKernels, name: str, file: str, dtype: DType | None, values: npt.NDArray[np.float32]
) -> None:
    """Raise MergeFailedError(code `not-finite`) for NaN, Inf, or what `dtype` cannot hold."""
    if values.size:
        check_largest(kernels.largest(values.reshape(-1)), name, file, dtype)


def check_largest(bits: int, name: str, file: str, dtype: DType | None) -> None:
    """The same of the bits of the largest magnitude."""
    if bits >= _LARGEST.get(dtype.code if dtype else "", _INFINITY):
        raise MergeFailedError.of(
            "not-finite",
            f"merging {name} gave {'NaN or Inf' if bits >= _INFINITY else f'a value too large for {dtype}'}",
            where=file,
            why="a source holds such a value, or weights cancel to zero",
            fix="check the sources with `raymerge inspect`, the weights, and the output's dtype",
        )


def _bytes(x: npt.NDArray[Any]) -> memoryview:
    return memoryview(np.ascontiguousarray(x).reshape(-1).view(np.uint8))  # type: ignore[arg-type] # arrays are buffers
