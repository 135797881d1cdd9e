"""A torch .bin file (a zip of stored entries) read by ranges, and its pickle read without unpickling.

    <archive>/data.pkl     a pickle: names, and for each tensor its storage key, offset, shape and strides
    <archive>/data/<key>   one storage's raw bytes
    <archive>/byteorder    `little` (absent from older files)

`data.pkl` is interpreted by the small machine below: it knows the opcodes a state dict needs, its globals are names in
an allow-list, and its only values are plain data and descriptors. Nothing is imported, called or constructed, so a
hostile pickle can at worst be refused. No torch here.
"""

from __future__ import annotations

import io
import pickletools
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from merger.errors import SourceError
from merger.storage.base import RangeRead, Store
from merger.tensors import DTYPES, DType, TensorSpec, dtype_from_torch_name

MAX_PICKLE_BYTES: Final = 64 * 2**20
MAX_PICKLE_OPCODES: Final = 10_000_000
"""A state dict needs about 45 opcodes a tensor."""
MAX_DIRECTORY_BYTES: Final = 64 * 2**20
_MAX_ARGUMENTS: Final = 10
_MAX_DIMENSIONS: Final = 64

_STORAGE_DTYPES: Final = {
    "BFloat16Storage": "BF16", "BoolStorage": "BOOL", "ByteStorage": "U8", "CharStorage": "I8",
    "ComplexFloatStorage": "C64", "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16",
    "IntStorage": "I32", "LongStorage": "I64", "ShortStorage": "I16", "UntypedStorage": "U8",
}  # fmt: skip

RESAVE: Final = "load it with torch.load(weights_only=True) where you trust it, and save it as safetensors"


@dataclass(frozen=True, slots=True)
class BinEntry:
    """A tensor of a .bin file: a strided view of a storage, in place."""

    spec: TensorSpec
    start: int
    """Absolute file offset of the first element, in bytes."""
    stop: int
    """Absolute end of the last byte any element occupies; `start` for an empty tensor."""
    strides: tuple[int, ...]
    """In elements, one a dimension."""
    storage: str
    """Key of the storage; entries that share it share bytes."""

    @property
    def is_contiguous(self) -> bool:
        """True where [start, stop) are the tensor's bytes in row-major order."""
        expected = 1
        for size, stride in zip(reversed(self.spec.shape), reversed(self.strides), strict=True):
            if size > 1 and stride != expected:
                return self.spec.numel == 0
            expected *= size
        return True


def read_bin(store: Store, name: str) -> tuple[BinEntry, ...]:
    """The tensors of a stored .bin file, in the order of its state dict. Reads no tensor data.

    Raises SourceError: `legacy-bin`, `not-a-zip`, `truncated`, `compressed-entry`, `big-endian`, `pickle-refused`,
    `pickle-malformed`, `pickle-too-large`, `not-a-state-dict`, `missing-storage`, `outside-storage`, `unknown-dtype`.
    """
    archive = _Archive.open(store, name)
    tensors = _parse_state_dict(archive.read("data.pkl", MAX_PICKLE_BYTES), archive.where)
    keys = sorted({tensor.storage.key for tensor in tensors.values()})
    starts = archive.data_starts([f"data/{key}" for key in keys])
    return tuple(_place(label, tensor, archive, starts) for label, tensor in tensors.items())


def _refuse(code: str, what: str, where: str, why: str = "", fix: str = "fetch the file again") -> SourceError:
    return SourceError.of(code, what, where=where, why=why, fix=fix)


# ---------------------------------------------------------------------------------------------------------------- zip


@dataclass(frozen=True, slots=True)
class _Record:
    full_name: str
    method: int
    flags: int
    nbytes: int
    header: int
    """Absolute offset of the local header."""


_TAIL_BYTES: Final = 22 + 65_535 + 20
_EOCD: Final = struct.Struct("<4s4H2IH")
_LOCATOR: Final = struct.Struct("<4sIQI")
_EOCD64: Final = struct.Struct("<4sQ2H2I4Q")
_CENTRAL: Final = struct.Struct("<4s6H3I5H2I")
_LOCAL: Final = struct.Struct("<4s5H3I2H")


@dataclass(frozen=True, slots=True)
class _Archive:
    """The zip's directory, by record name without the archive's own folder."""

    store: Store
    name: str
    pin: str
    file_size: int
    records: dict[str, _Record]

    @property
    def where(self) -> str:
        return f"{self.store.uri}/{self.name}"

    @classmethod
    def open(cls, store: Store, name: str) -> _Archive:
        where, stat = f"{store.uri}/{name}", store.stat(name)

        def read(start: int, nbytes: int) -> bytes:
            if start < 0 or start + nbytes > stat.size:
                raise _refuse("truncated", f"its directory points at byte {start + nbytes} of {stat.size}", where)
            buffer = bytearray(nbytes)
            if nbytes:
                store.read_into(name, [RangeRead(start, memoryview(buffer))], pin=stat.pin)
            return bytes(buffer)

        directory, count = _read_directory(read, stat.size, where)
        records = _parse_directory(directory, count, where)
        archive = cls(store, name, stat.pin, stat.size, _below_root(records, where))
        if "byteorder" in archive.records and archive.read("byteorder", 16) != b"little":
            raise _refuse("big-endian", "its tensors are not little-endian", where, fix=RESAVE)
        return archive

    def record(self, label: str) -> _Record:
        """Raises SourceError: `missing-storage`, `compressed-entry`."""
        record = self.records.get(label)
        if record is None:
            raise _refuse("missing-storage", f"the archive has no entry {label!r}", self.where)
        if record.method != 0 or record.flags & 0x2041:  # encrypted, strongly encrypted, masked directory
            raise _refuse(
                "compressed-entry",
                f"the entry {record.full_name!r} is compressed or encrypted",
                self.where,
                "torch stores its entries as they are, so that ranges of them can be read",
                RESAVE,
            )
        return record

    def data_starts(self, labels: list[str]) -> dict[str, int]:
        """Absolute offset of each entry's first byte. Checks the local headers and that the file holds them."""
        records = [self.record(label) for label in labels]
        headers = [bytearray(_LOCAL.size + len(record.full_name.encode())) for record in records]
        for record, header in zip(records, headers, strict=True):
            if record.header + len(header) > self.file_size:
                raise _refuse("truncated", f"the entry {record.full_name!r} lies behind the end", self.where)
        reads = [RangeRead(r.header, memoryview(h)) for r, h in zip(records, headers, strict=True)]
        if reads:
            self.store.read_into(self.name, reads, pin=self.pin)
        starts = {}
        for label, record, header in zip(labels, records, headers, strict=True):
            fields = _LOCAL.unpack_from(header)
            name_bytes = record.full_name.encode()
            if fields[0] != b"PK\3\4" or fields[9] != len(name_bytes) or header[_LOCAL.size :] != name_bytes:
                raise _refuse("truncated", f"there is no entry {record.full_name!r} where one should be", self.where)
            start = record.header + len(header) + fields[10]
            if start + record.nbytes > self.file_size:
                raise _refuse("truncated", f"the entry {record.full_name!r} ends behind the file's end", self.where)
            starts[label] = start
        return starts

    def read(self, label: str, limit: int) -> bytes:
        """A small entry, whole. Raises SourceError `pickle-too-large` above `limit` bytes."""
        record = self.record(label)
        if record.nbytes > limit:
            raise _refuse("pickle-too-large", f"the entry {label!r} has {record.nbytes} bytes", self.where, fix=RESAVE)
        buffer = bytearray(record.nbytes)
        start = self.data_starts([label])[label]
        if buffer:
            self.store.read_into(self.name, [RangeRead(start, memoryview(buffer))], pin=self.pin)
        return bytes(buffer)


def _read_directory(read: Callable[[int, int], bytes], size: int, where: str) -> tuple[bytes, int]:
    """The bytes of the central directory and its number of entries."""
    tail_start = max(0, size - _TAIL_BYTES)
    tail = read(tail_start, size - tail_start)
    at = tail.rfind(b"PK\5\6")
    while at >= 0:
        if at + _EOCD.size <= len(tail) and at + _EOCD.size + _EOCD.unpack_from(tail, at)[7] == len(tail):
            break
        at = tail.rfind(b"PK\5\6", 0, at)
    if at < 0:
        raise _no_directory(read(0, min(size, 4)), where)
    _, disk, _, _, count, nbytes, start, _ = _EOCD.unpack_from(tail, at)
    if at >= _LOCATOR.size and tail[at - _LOCATOR.size :][:4] == b"PK\6\7":
        _, _, end64, _ = _LOCATOR.unpack_from(tail, at - _LOCATOR.size)
        fields = _EOCD64.unpack(read(end64, _EOCD64.size))
        if fields[0] != b"PK\6\6":
            raise _refuse("truncated", "its zip64 directory is not where it should be", where)
        disk, count, nbytes, start = fields[4], fields[7], fields[8], fields[9]
    if disk:
        raise _refuse("not-a-zip", "it is one part of a zip in several parts", where)
    if nbytes > MAX_DIRECTORY_BYTES:
        raise _refuse("pickle-too-large", f"its directory has {nbytes} bytes", where)
    return read(start, nbytes), count


def _no_directory(first: bytes, where: str) -> SourceError:
    if first[:2] == b"PK":
        return _refuse("truncated", "it has a zip's beginning and no zip's end", where, "the file was cut off")
    if first[:1] == b"\x80":
        return _refuse(
            "legacy-bin",
            "it is in the format of torch before 1.6",
            where,
            "that format cannot be read in ranges",
            "re-save it as safetensors: " + RESAVE,
        )
    return _refuse("not-a-zip", "it is no torch .bin file", where, "torch writes zip archives")


def _parse_directory(data: bytes, count: int, where: str) -> list[_Record]:
    records: list[_Record] = []
    at = 0
    for _ in range(count):
        if at + _CENTRAL.size > len(data) or data[at : at + 4] != b"PK\1\2":
            raise _refuse("truncated", f"its directory ends after {len(records)} of {count} entries", where)
        fields = _CENTRAL.unpack_from(data, at)
        flags, method = fields[3], fields[4]
        packed, nbytes, header = fields[8], fields[9], fields[16]
        name_end = at + _CENTRAL.size + fields[10]
        extra_end = name_end + fields[11]
        nbytes, packed, header = _with_zip64(data[name_end:extra_end], nbytes, packed, header)
        try:
            full_name = data[at + _CENTRAL.size : name_end].decode("utf-8")
        except UnicodeDecodeError:
            raise _refuse("not-a-zip", "the name of an entry is not UTF-8", where) from None
        if method == 0 and packed != nbytes:
            raise _refuse("not-a-zip", f"the entry {full_name!r} has two sizes, {packed} and {nbytes}", where)
        records.append(_Record(full_name, method, flags, nbytes, header))
        at = extra_end + fields[12]
    return records


def _with_zip64(extra: bytes, nbytes: int, packed: int, header: int) -> tuple[int, int, int]:
    """Replace sizes and offset of all ones by those of the zip64 extra field."""
    while len(extra) >= 4:
        kind, length = struct.unpack_from("<2H", extra)
        body, extra = extra[4 : 4 + length], extra[4 + length :]
        if kind != 1:
            continue
        wide = [int.from_bytes(body[i : i + 8], "little") for i in range(0, len(body) - 7, 8)]
        if nbytes == 0xFFFFFFFF and wide:
            nbytes = wide.pop(0)
        if packed == 0xFFFFFFFF and wide:
            packed = wide.pop(0)
        if header == 0xFFFFFFFF and wide:
            header = wide.pop(0)
    return nbytes, packed, header


def _below_root(records: list[_Record], where: str) -> dict[str, _Record]:
    roots = [r.full_name.removesuffix("data.pkl") for r in records if r.full_name.split("/")[1:] == ["data.pkl"]]
    if len(roots) != 1:
        raise _refuse("not-a-state-dict", f"it holds {len(roots)} entries <archive>/data.pkl, not one", where)
    found: dict[str, _Record] = {}
    for record in records:
        if record.full_name.startswith(roots[0]):
            label = record.full_name.removeprefix(roots[0])
            if label in found:
                raise _refuse("duplicate-name", f"the entry {record.full_name!r} occurs twice", where)
            found[label] = record
    if "constants.pkl" in found:
        raise _refuse("not-a-state-dict", "it is a TorchScript program", where, fix="save the state dict instead")
    return found


# ------------------------------------------------------------------------------------------------------------- pickle


@dataclass(frozen=True, slots=True)
class _Global:
    name: str


@dataclass(frozen=True, slots=True)
class _Storage:
    key: str
    dtype: DType
    numel: int


@dataclass(frozen=True, slots=True)
class _Tensor:
    storage: _Storage
    dtype: DType
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Mark:
    """Marks a place on the stack."""


_ALLOWED: Final = frozenset(
    {
        "collections.OrderedDict",
        "torch._utils._rebuild_parameter",
        "torch._utils._rebuild_tensor",
        "torch._utils._rebuild_tensor_v2",
        "torch._utils._rebuild_tensor_v3",
        "torch.storage.UntypedStorage",
        "torch.Size",
    }
    | {f"torch.{name}" for name in _STORAGE_DTYPES}
    | {f"torch.{dtype.torch_name}" for dtype in DTYPES.values() if dtype.torch_name}
)
_CONSTANTS: Final[dict[str, Any]] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_LITERALS: Final = frozenset(
    {
        "BINFLOAT", "BININT", "BININT1", "BININT2", "BINUNICODE", "BINUNICODE8", "FLOAT", "INT", "LONG", "LONG1",
        "LONG4", "SHORT_BINUNICODE", "UNICODE", "BINBYTES", "BINBYTES8", "SHORT_BINBYTES",
    }
)  # fmt: skip
_TUPLES: Final = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def _parse_state_dict(data: bytes, where: str) -> dict[str, _Tensor]:
    """Tensor name → descriptor. Raises SourceError."""
    try:
        value = _Machine(where).run(data)
    except SourceError:
        raise
    except (ValueError, TypeError, IndexError, KeyError, OverflowError, UnicodeError) as error:
        raise _refuse(
            "pickle-malformed", f"its data.pkl is damaged: {error}", where, "no torch.save wrote this", RESAVE
        ) from None
    if not isinstance(value, dict):
        raise _refuse("not-a-state-dict", "it does not hold a map of names to tensors", where, fix=RESAVE)
    for key, tensor in value.items():
        if not isinstance(key, str) or not isinstance(tensor, _Tensor):
            kind = "no tensor" if isinstance(key, str) else "a key that is no name"
            raise _refuse(
                "not-a-state-dict",
                f"under {str(key)!r:.120} it holds {kind}",
                where,
                "a weights file maps names to tensors and holds nothing else",
                "save the state dict alone, as safetensors",
            )
    return value


class _Machine:
    """Runs one pickle over plain data and descriptors."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def refused(self, what: str) -> SourceError:
        why = "a state dict of plain tensors needs nothing of the kind; a pickle may run any code"
        return _refuse("pickle-refused", what, self.where, why, RESAVE)

    def run(self, data: bytes) -> Any:
        stream = io.BytesIO(data)
        for done, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
            if done > MAX_PICKLE_OPCODES:
                raise _refuse("pickle-too-large", f"its data.pkl has over {done - 1} operations", self.where)
            if opcode.name == "STOP":
                break
            self.step(opcode.name, argument)
        (value,) = self.stack
        return value

    def step(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in _LITERALS:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
            self.memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(self.memo[argument])
        elif name == "MARK":
            stack.append(_Mark)
        elif name == "TUPLE":
            stack.append(tuple(self.pop_mark()))
        elif name in _TUPLES:
            values = [self.pop() for _ in range(_TUPLES[name])]
            stack.append(tuple(reversed(values)))
        elif name == "EMPTY_DICT":
            stack.append({})
        elif name == "EMPTY_LIST":
            stack.append([])
        elif name == "LIST":
            stack.append(self.pop_mark())
        elif name == "DICT":
            items = self.pop_mark()
            stack.append({})
            self.set_items(items)
        elif name == "SETITEM":
            value, key = self.pop(), self.pop()
            self.set_items([key, value])
        elif name == "SETITEMS":
            self.set_items(self.pop_mark())
        elif name == "APPEND":
            self.extend([self.pop()])
        elif name == "APPENDS":
            self.extend(self.pop_mark())
        elif name == "GLOBAL":
            stack.append(self.find_global(*argument.split(" ", 1)))
        elif name == "STACK_GLOBAL":
            attribute, module = self.pop(), self.pop()
            stack.append(self.find_global(module, attribute))
        elif name == "BINPERSID":
            stack.append(self.find_storage(self.pop()))
        elif name == "REDUCE":
            arguments, function = self.pop(), self.pop()
            stack.append(self.reduce(function, arguments))
        elif name == "BUILD":
            # The `_metadata` that torch hangs on a state dict: its contents say nothing about tensors.
            self.pop()
            if not isinstance(stack[-1], dict):
                raise self.refused("its data.pkl sets attributes of something that is no dict")
        elif name not in ("PROTO", "FRAME"):
            raise self.refused(f"its data.pkl uses the operation {name}")

    def pop(self) -> Any:
        value = self.stack.pop()
        if value is _Mark:
            raise ValueError("a mark lies where a value belongs")
        return value

    def pop_mark(self) -> list[Any]:
        """All values above the topmost mark; removes the mark too."""
        for at in range(len(self.stack) - 1, -1, -1):
            if self.stack[at] is _Mark:
                values = self.stack[at + 1 :]
                del self.stack[at:]
                return values
        raise ValueError("there is no mark on the stack")

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict) or len(items) % 2:
            raise ValueError("items are set on something that is no dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Hashing anything nested could recurse without bound, hashing a huge number takes long.
            if not (isinstance(key, str) or (isinstance(key, int) and abs(key) < 2**62)):
                raise ValueError("a key is neither a string nor a number of 62 bits")
            if key in target:
                raise _refuse("duplicate-name", f"the key {str(key)!r:.120} occurs twice", self.where)
            target[key] = value

    def extend(self, values: list[Any]) -> None:
        if not isinstance(self.stack[-1], list):
            raise ValueError("values are appended to something that is no list")
        self.stack[-1].extend(values)

    def find_global(self, module: object, attribute: object) -> _Global:
        name = f"{module}.{attribute}" if isinstance(module, str) and isinstance(attribute, str) else "?"
        if name not in _ALLOWED:
            raise self.refused(f"its data.pkl asks for {name:.200}")
        return _Global(name)

    def find_storage(self, value: object) -> _Storage:
        match value:
            case ("storage", _Global(name), str(key), str(), int(numel)) if _is_size(numel):
                code = _STORAGE_DTYPES.get(name.rpartition(".")[2])
                if code is not None:
                    return _Storage(key, DTYPES[code], numel)
        raise ValueError("a persistent id is no storage")

    def reduce(self, function: object, arguments: object) -> Any:
        name = function.name if isinstance(function, _Global) else "?"
        # Work that grew with the arguments would be a bomb, since values can be shared and calls repeated.
        if not isinstance(arguments, tuple) or len(arguments) > _MAX_ARGUMENTS:
            raise ValueError(f"{name} is called with no sound arguments")
        match name, arguments:
            case "collections.OrderedDict", ():
                return {}
            case "torch.Size", (tuple(sizes),):
                return sizes
            case "torch._utils._rebuild_parameter", (_Tensor() as tensor, *_):
                return tensor
            case "torch._utils._rebuild_tensor", (_Storage() as storage, offset, shape, strides):
                return _view(storage, storage.dtype, offset, shape, strides)
            case "torch._utils._rebuild_tensor_v2", (_Storage() as storage, offset, shape, strides, _, _, *rest):
                self.check_flags(rest)
                return _view(storage, storage.dtype, offset, shape, strides)
            case (
                "torch._utils._rebuild_tensor_v3",
                (_Storage() as storage, offset, shape, strides, _, _, _Global(dtype_name), *rest),
            ):
                self.check_flags(rest)
                dtype = dtype_from_torch_name(dtype_name)
                if dtype is None:
                    raise ValueError(f"{dtype_name} is no dtype")
                return _view(storage, dtype, offset, shape, strides)
        raise self.refused(f"its data.pkl calls {name} in an unknown way")

    def check_flags(self, rest: list[Any]) -> None:
        """torch's tensor metadata may say that a tensor is to be conjugated or negated when read."""
        if rest and isinstance(rest[0], dict) and (len(rest[0]) > _MAX_ARGUMENTS or any(rest[0].values())):
            raise self.refused("a tensor carries flags, such as `conj` or `neg`")


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**62


def _view(storage: _Storage, dtype: DType, offset: object, shape: object, strides: object) -> _Tensor:
    match offset, shape, strides:
        case int(first), tuple(sizes), tuple(steps) if len(sizes) == len(steps) <= _MAX_DIMENSIONS and all(
            map(_is_size, (first, *sizes, *steps))
        ):
            return _Tensor(storage, dtype, first, sizes, steps)
    raise ValueError("a tensor has no sound offset, shape and strides")


def _place(name: str, tensor: _Tensor, archive: _Archive, starts: dict[str, int]) -> BinEntry:
    """Where the tensor's elements lie in the file; checks that all lie inside its storage."""
    where, storage, spec = archive.where, tensor.storage, TensorSpec(name, tensor.dtype, tensor.shape)
    label = f"data/{storage.key}"
    if tensor.dtype.bits % 8 or tensor.dtype.code == "F4":
        raise _refuse("unknown-dtype", f"tensor {name!r} has the dtype {tensor.dtype}", where, fix=RESAVE)
    held = archive.records[label].nbytes
    if storage.numel * storage.dtype.itemsize != held:
        raise _refuse(
            "outside-storage",
            f"storage {storage.key!r} should have {storage.numel} elements of {storage.dtype}, but has {held} bytes",
            where,
        )
    itemsize = tensor.dtype.itemsize
    last = tensor.offset + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.strides, strict=True))
    count = spec.numel
    if count >= 2**60 or (count and (last + 1) * itemsize > held) or tensor.offset * itemsize > held:
        raise _refuse(
            "outside-storage",
            f"tensor {name!r} reaches element {last}, outside the {held // itemsize} of storage {storage.key!r}",
            where,
        )
    start = starts[label] + tensor.offset * itemsize
    stop = starts[label] + (last + 1) * itemsize if count else start
    return BinEntry(spec, start, stop, tensor.strides, storage.key)
