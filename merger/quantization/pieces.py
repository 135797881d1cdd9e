"""What decoders see of a coded tensor: rows of its parts, as bytes, and the numbers in them. numpy only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from merger.tensors import Part

Rows = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows [first, first + len(rows)) of a part."""

    part: Part
    first: int
    rows: Bytes
    """(rows, row_bytes)."""

    def numbers(self) -> npt.NDArray[Any]:
        """The stored numbers as float32 where they are floats, else as the integers they are, flat."""
        return numbers(self.rows.reshape(-1), self.part.stored.spec.dtype.code)


Pieces = Mapping[str, Piece]


def numbers(data: Bytes, code: str) -> npt.NDArray[Any]:
    """Stored bytes as float32 (floats) or as integers."""
    if code == "BF16":
        return (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    if code in ("F16", "F32", "F64"):
        return data.view({"F16": np.float16, "F32": np.float32, "F64": np.float64}[code]).astype(np.float32)
    if code in _TABLES:
        return TABLES[_TABLES[code]][data]
    return data.view({"U8": np.uint8, "I8": np.int8, "I16": np.int16, "I32": np.int32, "I64": np.int64}[code])


def _float8(exponent_bits: int, mantissa_bits: int, *, infinities: bool) -> Rows:
    """The 256 values of an 8-bit float. E4M3 has NaN at all ones and no infinity."""
    bits = np.arange(256, dtype=np.int64)
    sign = np.where(bits >> 7, -1.0, 1.0)
    exponent = (bits >> mantissa_bits) & ((1 << exponent_bits) - 1)
    mantissa = (bits & ((1 << mantissa_bits) - 1)) / (1 << mantissa_bits)
    bias = (1 << (exponent_bits - 1)) - 1
    value = np.where(exponent == 0, mantissa * 2.0 ** (1 - bias), (1 + mantissa) * 2.0 ** (exponent - bias))
    top = exponent == (1 << exponent_bits) - 1
    if infinities:
        value = np.where(top, np.where(mantissa == 0, np.inf, np.nan), value)
    else:
        value = np.where((bits & 0x7F) == 0x7F, np.nan, value)
    return (sign * value).astype(np.float32)


def _e8m0() -> Rows:
    """2 to the byte − 127; 255 is NaN."""
    value = 2.0 ** (np.arange(256) - 127.0)
    value[255] = np.nan
    return value.astype(np.float32)


E2M1: Final = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
INT4: Final = np.arange(-8, 8, dtype=np.float32)
"""compressed-tensors stores code + 8."""
INT4_TWOS: Final = np.concatenate([INT4[8:], INT4[:8]])
"""torchao stores the code itself, in two's complement."""

TABLES: Final[dict[str, Rows]] = {
    "e4m3": _float8(4, 3, infinities=False),
    "e5m2": _float8(5, 2, infinities=True),
    "e8m0": _e8m0(),
    "int8": np.arange(256, dtype=np.uint8).view(np.int8).astype(np.float32),
}
_TABLES: Final = {"F8_E4M3": "e4m3", "F8_E5M2": "e5m2", "F8_E8M0": "e8m0"}


def _pairs(table: Rows) -> Rows:
    """(256, 2): what both halves of a byte stand for, the low half first."""
    byte = np.arange(256)
    return np.stack([table[byte & 15], table[byte >> 4]], axis=1)


E2M1_PAIRS: Final = _pairs(E2M1)
INT4_PAIRS: Final = _pairs(INT4)
INT4_TWOS_PAIRS: Final = _pairs(INT4_TWOS)
