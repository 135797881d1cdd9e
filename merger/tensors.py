"""What a tensor is before any of its bytes are read: a name, a dtype, a shape. No torch here.

The dtype codes are those of the safetensors format; sub-byte types count bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, Literal


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


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor as it lies in a file: a layout, and the decoder that turns it into rows of float32."""

    spec: TensorSpec
    file: str
    start: int
    """Byte of the first element, from the start of the file; of a coded tensor, of its codes."""
    decoder: Literal["dense", "strided", "coded"] = "dense"
    """`dense`: row-major and contiguous; `strided`: a view, described by `strides`; `coded`: codes and scales that
    several stored tensors hold, described by `coded`."""
    strides: tuple[int, ...] = ()
    """In elements; only for `strided`."""
    coded: Coded | None = None

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of a dense tensor of whole-byte elements; of a coded one, what a row takes on average."""
        if self.coded is not None:
            return -(-self.stored_bytes // max(1, self.spec.rows))
        return self.spec.cols * self.spec.dtype.itemsize

    @property
    def stored_bytes(self) -> int:
        """What reading it takes: the bytes on disk, all parts of a coded tensor that are read together."""
        if self.coded is not None:
            return sum(part.stored.spec.nbytes for part in self.coded.parts if part.covers != UNREAD)
        return self.spec.nbytes


WHOLE: Final = 0
"""A part that every row needs whole."""
UNREAD: Final = -1
"""A part that goes with the codes and decides no value, such as the scale of activations."""


def part_key(name: str) -> str:
    """What a plan calls a stored tensor that is part of a coded one: codes mostly have the name of what they code."""
    return f"stored:{name}"


@dataclass(frozen=True, slots=True)
class Part:
    """One stored tensor of a coded one: cut into `rows` equal rows, each of which covers `covers` elements."""

    role: str
    """What it is to the scheme: `codes`, `scale`, `zero`, …"""
    stored: StoredTensor
    rows: int = 1
    covers: int = WHOLE
    """Elements of the decoded tensor, counted flat; WHOLE and UNREAD see there."""

    @property
    def row_bytes(self) -> int:
        return self.stored.spec.nbytes // max(1, self.rows)

    def span(self, cols: int, first: int, last: int) -> tuple[int, int]:
        """Its rows that rows [first, last) of the decoded tensor need."""
        if self.covers == UNREAD or first == last:
            return 0, 0
        if self.covers == WHOLE:
            return 0, self.rows
        return first * cols // self.covers, min(self.rows, -(-last * cols // self.covers))


@dataclass(frozen=True, slots=True)
class Coded:
    """A tensor that is stored as codes: how merger/quantization reads it."""

    scheme: str
    """Which decoder: a name of `merger.quantization.decode`."""
    parts: tuple[Part, ...]
    """The codes first."""
    parameters: tuple[tuple[str, int | float | str], ...] = ()

    def part(self, role: str) -> Part | None:
        return next((part for part in self.parts if part.role == role), None)

    def value(self, parameter: str) -> int | float | str | None:
        """A parameter of the scheme; None where it has none of that name."""
        return dict(self.parameters).get(parameter)

    def number(self, parameter: str, default: int = 0) -> int:
        return int(dict(self.parameters).get(parameter, default))

    def with_parts(self, parts: tuple[Part, ...], **parameters: int | float | str) -> Coded:
        """The same with further parts and parameters."""
        return Coded(self.scheme, (*self.parts, *parts), (*self.parameters, *parameters.items()))


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
