"""What a tensor is before any of its bytes are read: a name, a dtype, a shape. No torch here.

The dtype codes are those of the safetensors format; sub-byte types count bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class DType:
    """One element type of the safetensors format."""

    code: str
    """The format's own name, for example `BF16`."""
    bits: int
    """Size of one element in bits."""
    rank: int
    """Position in the format's declaration order; files are sorted by it, highest first."""
    torch_name: str | None
    """Attribute of `torch`, or None where torch has no such type."""

    @property
    def is_float(self) -> bool:
        """True for the types raymerge computes with directly."""
        return self.code in ("F16", "BF16", "F32", "F64")

    @property
    def itemsize(self) -> int:
        """Bytes of one element. Only for types of whole bytes."""
        if self.bits % 8:
            raise ValueError(f"{self.code} has no whole number of bytes")
        return self.bits // 8

    def __str__(self) -> str:
        return self.code


_DECLARED: Final = (
    ("BOOL", 8, "bool"),
    ("F4", 4, "float4_e2m1fn_x2"),
    ("F6_E2M3", 6, None),
    ("F6_E3M2", 6, None),
    ("U8", 8, "uint8"),
    ("I8", 8, "int8"),
    ("F8_E5M2", 8, "float8_e5m2"),
    ("F8_E4M3", 8, "float8_e4m3fn"),
    ("F8_E8M0", 8, "float8_e8m0fnu"),
    ("F8_E4M3FNUZ", 8, "float8_e4m3fnuz"),
    ("F8_E5M2FNUZ", 8, "float8_e5m2fnuz"),
    ("I16", 16, "int16"),
    ("U16", 16, "uint16"),
    ("F16", 16, "float16"),
    ("BF16", 16, "bfloat16"),
    ("I32", 32, "int32"),
    ("U32", 32, "uint32"),
    ("F32", 32, "float32"),
    ("C64", 64, "complex64"),
    ("F64", 64, "float64"),
    ("I64", 64, "int64"),
    ("U64", 64, "uint64"),
)

DTYPES: Final[dict[str, DType]] = {
    code: DType(code, bits, rank, torch_name) for rank, (code, bits, torch_name) in enumerate(_DECLARED)
}
"""Every dtype of the safetensors format by its code."""

BF16: Final = DTYPES["BF16"]
F16: Final = DTYPES["F16"]
F32: Final = DTYPES["F32"]

_BY_TORCH_NAME: Final = {d.torch_name: d for d in DTYPES.values() if d.torch_name}


def dtype_from_torch_name(name: str) -> DType | None:
    """`bfloat16` or `torch.bfloat16` → BF16; None when there is no such dtype."""
    return _BY_TORCH_NAME.get(name.removeprefix("torch."))


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name, dtype and logical shape of a tensor (row-major)."""

    name: str
    dtype: DType
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes on disk, exact for sub-byte types too."""
        bits = self.numel * self.dtype.bits
        if bits % 8:
            raise ValueError(f"{self.name}: {self.numel} elements of {self.dtype} are no whole number of bytes")
        return bits // 8

    @property
    def rows(self) -> int:
        """Rows of the matrix this tensor is read as: all dimensions but the last, folded. A vector is a column."""
        return math.prod(self.shape[:-1]) if len(self.shape) > 1 else self.numel

    @property
    def cols(self) -> int:
        """Columns of that matrix: the last dimension; 1 for a vector or a scalar."""
        return self.shape[-1] if len(self.shape) > 1 else 1


@dataclass(frozen=True, slots=True)
class RowRun:
    """Rows [first, first + count) of a result are rows [stored, stored + count) of a file."""

    first: int
    stored: int
    count: int


_UNITS: Final = {
    "": 1, "b": 1,
    "k": 10**3, "kb": 10**3, "m": 10**6, "mb": 10**6, "g": 10**9, "gb": 10**9, "t": 10**12, "tb": 10**12,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
}  # fmt: skip


def parse_size(text: str | int) -> int:
    """`5GB`, `64 MiB`, `1000000` → bytes. MB = 10⁶, MiB = 2²⁰. Raises ValueError."""
    if isinstance(text, bool):
        raise ValueError("a size is a number with a unit, such as 5GB")
    if isinstance(text, int):
        value = float(text)
    else:
        digits = text.strip().lower()
        unit = digits.lstrip("0123456789.").strip()
        if unit not in _UNITS:
            raise ValueError(f"unknown unit {unit!r} in the size {text!r}; use B, KB, MB, GB, KiB, MiB or GiB")
        value = float(digits[: len(digits) - len(digits.lstrip("0123456789."))] or "nan") * _UNITS[unit]
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"the size {text!r} is not a positive number of bytes")
    return int(value)


def format_size(nbytes: int) -> str:
    """Bytes for people: `1.5 GB` (decimal units)."""
    size = float(nbytes)
    for unit in ("B", "KB", "MB", "GB"):
        if abs(size) < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
