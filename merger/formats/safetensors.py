"""The header of a safetensors file: bytes to noun, noun to bytes.

    8 bytes   N, little-endian
    N bytes   JSON: {"__metadata__": {str: str}, name: {"dtype", "shape", "data_offsets": [start, stop]}, ...}
    the rest  the tensors' bytes, little-endian, row-major; data_offsets count from 8 + N

The reader is stricter than the reference implementation, so that two readers never disagree about a file: what is
accepted here is accepted there, with the same offsets. The writer gives that implementation's bytes, with one
difference: metadata keys are sorted (there their order is random).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from merger.errors import SourceError
from merger.formats.strict_json import parse_json_object
from merger.storage.base import RangeRead, Store
from merger.tensors import DTYPES, DType, TensorSpec

MAX_HEADER_BYTES: Final = 100_000_000
"""Cap on N, the reference implementation's own."""
FIRST_READ_BYTES: Final = 256 * 1024
"""Read before N is known; holds the whole header of most files."""
METADATA_KEY: Final = "__metadata__"
PT_METADATA: Final[Mapping[str, str]] = MappingProxyType({"format": "pt"})
"""What loaders look for before they take a file."""

_MAX_BITS: Final = 2**63


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A tensor and where its bytes are: [start, stop) of the file, absolute."""

    spec: TensorSpec
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class StoredHeader:
    """What a safetensors file holds."""

    tensors: tuple[TensorEntry, ...]
    """In file order."""
    metadata: dict[str, str]
    data_start: int
    """First byte of tensor data: 8 + N."""
    file_size: int
    """Bytes of the whole file."""

    def by_name(self) -> dict[str, TensorEntry]:
        return {entry.spec.name: entry for entry in self.tensors}


def _refuse(code: str, what: str, where: str, why: str = "") -> SourceError:
    return SourceError.of(code, what, where=where, why=why, fix="fetch the file again, or mend it at its source")


def header_length(first8: bytes, file_size: int, where: str) -> int:
    """N from the first eight bytes. Raises SourceError: `truncated`, `header-too-large`."""
    if len(first8) < 8 or file_size < 8:
        raise _refuse("truncated", f"the file has {file_size} bytes, too few for a safetensors header", where)
    length = int.from_bytes(first8[:8], "little")
    if length > MAX_HEADER_BYTES:
        raise _refuse(
            "header-too-large",
            f"the header claims {length} bytes, more than the {MAX_HEADER_BYTES} of the format",
            where,
            "this is no safetensors file, or a damaged one",
        )
    if 8 + length > file_size:
        raise _refuse(
            "truncated", f"the header has {length} bytes, the file only {file_size}", where, "the file was cut off"
        )
    return length


def parse_header(data: bytes, *, file_size: int, where: str) -> StoredHeader:
    """The header from the first 8 + N bytes of a file of `file_size` bytes (more of the file is ignored).

    Raises SourceError: `header-too-large`, `header-not-json`, `header-padding`, `bad-metadata`, `bad-entry`,
    `duplicate-name`, `unknown-dtype`, `bad-shape`, `shape-mismatch`, `overlapping-offsets`, `hole`, `truncated`,
    `trailing-bytes`.
    """
    length = header_length(data[:8], file_size, where)
    if len(data) < 8 + length:
        raise _refuse("truncated", f"only {len(data)} of the header's {8 + length} bytes are there", where)
    document = _parse_document(data[8 : 8 + length], where)
    metadata = _parse_metadata(document.pop(METADATA_KEY, {}), where)
    data_start = 8 + length
    entries = [_parse_entry(name, value, data_start, where) for name, value in document.items()]
    entries.sort(key=lambda entry: (entry.start, entry.stop))
    _check_coverage(entries, data_start, file_size, where)
    return StoredHeader(tuple(entries), metadata, data_start, file_size)


def _not_negative(text: str) -> int:
    if text.startswith("-"):
        raise ValueError(f"the number {text[:20]} is negative")
    return int(text)


def _parse_document(data: bytes, where: str) -> dict[str, Any]:
    if data[:1] != b"{":
        raise _refuse("header-not-json", "the header does not start with '{'", where, "the format asks for it")
    trimmed = data.rstrip(b" ")
    if trimmed[-1:] != b"}":
        raise _refuse("header-padding", "the header does not end with '}' and spaces", where)
    return parse_json_object(trimmed, where, code="header-not-json", parse_int=_not_negative)


def _parse_metadata(value: object, where: str) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise _refuse("bad-metadata", f"{METADATA_KEY} is no map of strings to strings", where)
    return value


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _parse_entry(name: str, value: object, data_start: int, where: str) -> TensorEntry:
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise _refuse("bad-entry", f"the entry of tensor {name!r} is not exactly dtype, shape and data_offsets", where)
    code, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    dtype = DTYPES.get(code) if isinstance(code, str) else None
    if dtype is None:
        raise _refuse("unknown-dtype", f"tensor {name!r} has the dtype {code!r}, which the format does not have", where)
    if not isinstance(shape, list) or not all(map(_is_count, shape)):
        raise _refuse("bad-shape", f"the shape of tensor {name!r} is no list of whole numbers", where)
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise _refuse("bad-entry", f"the data_offsets of tensor {name!r} are no two whole numbers", where)
    start, stop = offsets
    if start > stop:
        raise _refuse("overlapping-offsets", f"tensor {name!r} ends at {stop}, before its start {start}", where)
    nbytes = _checked_nbytes(name, dtype, shape, where)
    if nbytes != stop - start:
        raise _refuse(
            "shape-mismatch",
            f"tensor {name!r} spans {stop - start} bytes, but {dtype} {shape} has {nbytes}",
            where,
        )
    return TensorEntry(TensorSpec(name, dtype, tuple(shape)), data_start + start, data_start + stop)


def _checked_nbytes(name: str, dtype: DType, shape: Iterable[int], where: str) -> int:
    """Bytes of the tensor; dimensions that would overflow are refused even beside a zero."""
    bits, is_empty = dtype.bits, False
    for size in shape:
        bits *= size or 1
        is_empty |= size == 0
        if size < 0 or bits >= _MAX_BITS:
            raise _refuse("bad-shape", f"the shape of tensor {name!r} is negative or too large for any file", where)
    if is_empty:
        return 0
    if bits % 8:
        raise _refuse("shape-mismatch", f"tensor {name!r} has {bits} bits, which is no whole number of bytes", where)
    return bits // 8


def _check_coverage(entries: Iterable[TensorEntry], data_start: int, file_size: int, where: str) -> None:
    """The tensors cover the data exactly: no hole, no overlap, nothing behind the last."""
    reached, before = data_start, "the header"
    for entry in entries:
        name = entry.spec.name
        if entry.start > reached:
            raise _refuse(
                "hole", f"{entry.start - reached} bytes between {before} and tensor {name!r} belong to none", where
            )
        if entry.start < reached:
            raise _refuse("overlapping-offsets", f"tensor {name!r} overlaps {before}", where)
        reached, before = entry.stop, f"tensor {name!r}"
    if reached > file_size:
        raise _refuse(
            "truncated", f"{before} ends at byte {reached}, the file at {file_size}", where, "the file was cut off"
        )
    if reached < file_size:
        raise _refuse("trailing-bytes", f"{file_size - reached} bytes follow the last tensor", where)


def read_header(store: Store, name: str) -> StoredHeader:
    """The header of a stored file, in one read, or two where it is large."""
    where = f"{store.uri}/{name}"
    stat = store.stat(name)
    data = bytearray(min(FIRST_READ_BYTES, stat.size))
    if data:
        store.read_into(name, [RangeRead(0, memoryview(data))], pin=stat.pin)
    wanted = 8 + header_length(bytes(data[:8]), stat.size, where)
    if wanted > len(data):
        rest = bytearray(wanted - len(data))
        store.read_into(name, [RangeRead(len(data), memoryview(rest))], pin=stat.pin)
        data += rest
    return parse_header(bytes(data[:wanted]), file_size=stat.size, where=where)


def build_header(
    specs: Iterable[TensorSpec], metadata: Mapping[str, str] | None = PT_METADATA
) -> tuple[bytes, StoredHeader]:
    """The first 8 + N bytes of a file of these tensors, and where each tensor's bytes go.

    Tensors lie by dtype (widest first), then by name; N is a multiple of 8. `metadata=None` writes no metadata.
    Raises SourceError: `duplicate-name`, `shape-mismatch`, `bad-shape`.
    """
    where = "a safetensors header to write"
    document: dict[str, Any] = {}
    if metadata is not None:
        document[METADATA_KEY] = {key: metadata[key] for key in sorted(metadata)}
    placed: list[tuple[TensorSpec, int, int]] = []
    reached = 0
    for spec in sorted(specs, key=lambda spec: (-spec.dtype.rank, spec.name.encode("utf-8", "surrogatepass"))):
        if spec.name in document or spec.name == METADATA_KEY:
            raise _refuse("duplicate-name", f"the tensor name {spec.name!r} is taken", where)
        start, reached = reached, reached + _checked_nbytes(spec.name, spec.dtype, spec.shape, where)
        document[spec.name] = {
            "dtype": spec.dtype.code,
            "shape": list(spec.shape),
            "data_offsets": [start, reached],
        }
        placed.append((spec, start, reached))
    try:
        text = json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise _refuse("bad-entry", f"a name holds half a surrogate pair: {error.object!r:.80}", where) from None
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise _refuse("header-too-large", f"the header of {len(placed)} tensors has {len(text)} bytes", where)
    data_start = 8 + len(text)
    header = StoredHeader(
        tuple(TensorEntry(spec, data_start + start, data_start + stop) for spec, start, stop in placed),
        dict(metadata or {}),
        data_start,
        data_start + reached,
    )
    return len(text).to_bytes(8, "little") + text, header
