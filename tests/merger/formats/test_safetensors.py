"""Headers: hostile inputs, truncation, and both directions against the safetensors library."""

from __future__ import annotations

import ctypes
import json
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from merger.errors import SourceError
from merger.formats.safetensors import (
    FIRST_READ_BYTES,
    StoredHeader,
    build_header,
    header_length,
    parse_header,
    read_header,
)
from merger.storage.base import RangeRead
from merger.storage.memory import MemoryStore
from merger.tensors import DTYPES, F32, TensorSpec


def file_of(header: str | bytes, data: bytes = b"") -> bytes:
    text = header.encode() if isinstance(header, str) else header
    return len(text).to_bytes(8, "little") + text + data


def parse(file: bytes) -> StoredHeader:
    length = header_length(file[:8], len(file), "test")
    return parse_header(file[: 8 + length], file_size=len(file), where="test")


def tensor(dtype: Any = "U8", shape: Any = (4,), offsets: Any = (0, 4), **extra: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **extra}


def deserialized(file: bytes) -> dict[str, dict[str, Any]]:
    """The library's reading."""
    return dict(safetensors.deserialize(file))  # type: ignore[no-untyped-call]


def document(**tensors: Any) -> str:
    return json.dumps(tensors)


ENTRY = '{"dtype":"U8","shape":[4],"data_offsets":[0,4]}'

HOSTILE = [
    ("empty file", b"", "truncated"),
    ("seven bytes", b"\0" * 7, "truncated"),
    ("a claim of 2**60 bytes", (2**60).to_bytes(8, "little") + b"{}", "header-too-large"),
    ("one byte over the cap", (100_000_001).to_bytes(8, "little") + b"{}", "header-too-large"),
    ("more header than file", (100).to_bytes(8, "little") + b"{}", "truncated"),
    ("no header", file_of(""), "header-not-json"),
    ("leading space", file_of(" {}"), "header-not-json"),
    ("a list", file_of("[]"), "header-not-json"),
    ("cut JSON", file_of('{"a":'), "header-padding"),
    ("broken JSON", file_of('{"a":}'), "header-not-json"),
    ("byte order mark", file_of("\ufeff{}"), "header-not-json"),
    ("UTF-16", file_of("{}".encode("utf-16-le")), "header-padding"),
    ("no UTF-8", file_of(b'{"\xff":' + ENTRY.encode() + b"}", b"abcd"), "header-not-json"),
    ("half a surrogate", file_of('{"\\ud800":' + ENTRY + "}", b"abcd"), "header-not-json"),
    ("raw control character", file_of('{"a\n":' + ENTRY + "}", b"abcd"), "header-not-json"),
    ("trailing newline", file_of("{}\n"), "header-padding"),
    ("trailing NUL", file_of("{}\0"), "header-padding"),
    ("two documents", file_of("{} {}"), "header-not-json"),
    ("nested too deeply", file_of('{"a":' * 100_000 + "1" + "}" * 100_000), "header-not-json"),
    ("NaN", file_of('{"a":NaN}'), "json-constant"),
    ("same tensor twice", file_of("{" + f'"a":{ENTRY},"a":{ENTRY}' + "}", b"abcd"), "duplicate-name"),
    ("same tensor twice, escaped", file_of("{" + f'"a":{ENTRY},"\\u0061":{ENTRY}' + "}", b"abcd"), "duplicate-name"),
    ("metadata twice", file_of('{"__metadata__":{},"__metadata__":{}}'), "duplicate-name"),
    ("metadata key twice", file_of('{"__metadata__":{"a":"b","a":"c"}}'), "duplicate-name"),
    ("shape twice", file_of('{"a":{"dtype":"U8","shape":[4],"shape":[4],"data_offsets":[0,4]}}', b"abcd"),
     "duplicate-name"),
    ("metadata null", file_of('{"__metadata__":null}'), "bad-metadata"),
    ("metadata number", file_of('{"__metadata__":{"a":1}}'), "bad-metadata"),
    ("unknown key", file_of(document(a=tensor(strides=[1])), b"abcd"), "bad-entry"),
    ("missing key", file_of('{"a":{"dtype":"U8","shape":[4]}}', b"abcd"), "bad-entry"),
    ("entry is a list", file_of('{"a":[]}'), "bad-entry"),
    ("unknown dtype", file_of(document(a=tensor("Q8")), b"abcd"), "unknown-dtype"),
    ("lower-case dtype", file_of(document(a=tensor("u8")), b"abcd"), "unknown-dtype"),
    ("dtype is a list", file_of(document(a=tensor(["U8"])), b"abcd"), "unknown-dtype"),
    ("float dimension", file_of(document(a=tensor(shape=[4.0])), b"abcd"), "bad-shape"),
    ("bool dimension", file_of(document(a=tensor("U8", [True], [0, 1])), b"a"), "bad-shape"),
    ("shape is a number", file_of(document(a=tensor(shape=4)), b"abcd"), "bad-shape"),
    ("negative dimension", file_of(document(a=tensor(shape=[-4])), b"abcd"), "header-not-json"),
    ("two negative dimensions", file_of(document(a=tensor(shape=[-2, -2])), b"abcd"), "header-not-json"),
    ("minus zero", file_of('{"a":{"dtype":"U8","shape":[4],"data_offsets":[-0,4]}}', b"abcd"), "header-not-json"),
    ("overflowing shape", file_of(document(a=tensor(shape=[2**40, 2**40]))), "bad-shape"),
    ("overflowing shape beside a zero", file_of(document(a=tensor("U8", [2**40, 2**40, 0], [0, 0]))), "bad-shape"),
    ("a number of 5000 digits", file_of('{"a":{"dtype":"U8","shape":[' + "9" * 5000 + "]}}"), "header-not-json"),
    ("one offset", file_of(document(a=tensor(offsets=[4])), b"abcd"), "bad-entry"),
    ("float offset", file_of(document(a=tensor(offsets=[0, 4.0])), b"abcd"), "bad-entry"),
    ("bool offset", file_of(document(a=tensor("U8", [1], [False, True])), b"a"), "bad-entry"),
    ("offsets backwards", file_of(document(a=tensor(offsets=[4, 0])), b"abcd"), "overlapping-offsets"),
    ("span too long", file_of(document(a=tensor(offsets=[0, 5])), b"abcde"), "shape-mismatch"),
    ("half a byte", file_of(document(a=tensor("F4", [3], [0, 1])), b"a"), "shape-mismatch"),
    ("hole at the start", file_of(document(a=tensor(offsets=[1, 5])), b"abcde"), "hole"),
    ("hole between", file_of(document(a=tensor(), b=tensor(offsets=[5, 9])), b"abcdefghi"), "hole"),
    ("overlap", file_of(document(a=tensor(), b=tensor(offsets=[2, 6])), b"abcdef"), "overlapping-offsets"),
    ("same bytes twice", file_of(document(a=tensor(), b=tensor()), b"abcd"), "overlapping-offsets"),
    ("cut data", file_of(document(a=tensor()), b"abc"), "truncated"),
    ("trailing bytes", file_of(document(a=tensor()), b"abcde"), "trailing-bytes"),
]  # fmt: skip


@pytest.mark.parametrize("file,code", [case[1:] for case in HOSTILE], ids=[case[0] for case in HOSTILE])
def test_a_hostile_header_is_refused_by_name(file: bytes, code: str) -> None:
    with pytest.raises(SourceError) as caught:
        parse(file)
    assert [problem.code for problem in caught.value.problems] == [code]


def accepted() -> list[bytes]:
    return [
        file_of("{}"),
        file_of("{}      "),
        file_of('{"__metadata__":{}}'),
        file_of('{"__metadata__":{"a":"ü"}}'),
        file_of(document(a=tensor()), b"abcd"),
        file_of(document(b=tensor(offsets=[4, 8]), a=tensor()), b"abcdefgh"),
        file_of(document(a=tensor("F32", [], [0, 4])), b"abcd"),
        file_of(document(a=tensor("F32", [0, 5], [0, 0]), b=tensor("U8", [1], [0, 1])), b"a"),
        file_of(document(a=tensor("U8", [1], [0, 1]), b=tensor("F32", [1], [1, 5])), b"abcde"),
        file_of(document(a=tensor("F4", [4], [0, 2]), b=tensor("F6_E2M3", [4], [2, 5])), b"abcde"),
    ]


@pytest.mark.parametrize("file", accepted())
def test_what_is_accepted_the_library_accepts_with_the_same_offsets(file: bytes) -> None:
    header = parse(file)
    theirs = deserialized(file)
    assert theirs.keys() == header.by_name().keys()
    for entry in header.tensors:
        assert bytes(theirs[entry.spec.name]["data"]) == file[entry.start : entry.stop]
        assert theirs[entry.spec.name]["dtype"] == entry.spec.dtype.code
        assert tuple(theirs[entry.spec.name]["shape"]) == entry.spec.shape


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_damaged_header_is_refused_or_read_as_the_library_reads_it(data: st.DataObject) -> None:
    file = bytearray(data.draw(st.sampled_from(accepted()[3:])))
    for _ in range(data.draw(st.integers(1, 3))):
        file[data.draw(st.integers(0, len(file) - 1))] = data.draw(st.sampled_from(b'0123456789{}[]",: -eFUI\\\0'))
    try:
        header = parse(bytes(file))
    except SourceError:
        return
    theirs = deserialized(bytes(file))
    assert {n: bytes(t["data"]) for n, t in theirs.items()} == {
        e.spec.name: bytes(file[e.start : e.stop]) for e in header.tensors
    }


def test_every_truncation_is_refused() -> None:
    file = safetensors.torch.save({"a": torch.arange(6.0), "ü": torch.ones(2, dtype=torch.bfloat16)}, {"format": "pt"})
    for cut in range(len(file)):
        with pytest.raises(SourceError):
            parse_header(file[:cut], file_size=cut, where="test")
        with pytest.raises(SourceError):
            parse_header(file, file_size=cut, where="test")
    assert len(parse(file).tensors) == 2


def test_errors_say_where_and_how_to_mend() -> None:
    with pytest.raises(SourceError) as caught:
        parse(file_of(document(a=tensor()), b"abc"))
    (problem,) = caught.value.problems
    assert problem.where == "test"
    assert "'a'" in problem.what
    assert problem.fix


names = st.text(st.characters(exclude_categories=["Cs"]), max_size=8).filter(lambda name: name != "__metadata__")
shapes = st.lists(st.integers(0, 3), max_size=3).map(tuple)


@st.composite
def tensor_lists(draw: st.DrawFn) -> list[TensorSpec]:
    found = []
    for name in draw(st.lists(names, unique=True, max_size=6)):
        dtype = DTYPES[draw(st.sampled_from(sorted(DTYPES)))]
        shape = draw(shapes)
        found.append(TensorSpec(name, dtype, shape if dtype.bits % 8 == 0 else (*shape, 8)))
    return found


@settings(max_examples=300, deadline=None)
@given(tensor_lists(), st.one_of(st.none(), st.dictionaries(names, names, max_size=1)))
def test_built_files_are_those_of_the_library(specs: list[TensorSpec], metadata: dict[str, str] | None) -> None:
    content = {spec.name: bytes(number % 256 for number in range(spec.nbytes)) for spec in specs}
    prefix, header = build_header(specs, metadata)
    mine = prefix + b"".join(content[entry.spec.name] for entry in header.tensors)
    # The library cannot write types of six bits, and of no tensors with an empty map of metadata it makes broken JSON.
    if all(spec.dtype.torch_name for spec in specs) and (specs or metadata != {}):
        assert mine == serialized(specs, content, metadata)
    assert parse(mine) == header
    assert header.file_size == len(mine)


def serialized(specs: list[TensorSpec], content: dict[str, bytes], metadata: dict[str, str] | None) -> bytes:
    """The library's file of these tensors."""
    buffers = {name: ctypes.create_string_buffer(data, max(1, len(data))) for name, data in content.items()}
    theirs = {}
    for spec in specs:
        packed = (*spec.shape[:-1], spec.shape[-1] // 2) if spec.dtype.code == "F4" else spec.shape
        theirs[spec.name] = safetensors.TensorSpec(
            dtype=spec.dtype.torch_name or "",
            shape=packed,
            data_ptr=ctypes.addressof(buffers[spec.name]),
            data_len=spec.nbytes,
        )
    return safetensors.serialize(theirs, metadata)


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(names, st.tuples(st.sampled_from(["float32", "bfloat16", "int64", "bool", "uint8"]), shapes)))
def test_built_headers_are_those_of_torch_files(tensors: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    state = {name: torch.zeros(shape, dtype=getattr(torch, dtype)) for name, (dtype, shape) in tensors.items()}
    codes = {"float32": "F32", "bfloat16": "BF16", "int64": "I64", "bool": "BOOL", "uint8": "U8"}
    prefix, header = build_header(TensorSpec(n, DTYPES[codes[dtype]], shape) for n, (dtype, shape) in tensors.items())
    assert safetensors.torch.save(state, {"format": "pt"}) == prefix + bytes(header.file_size - len(prefix))


def test_metadata_keys_are_sorted_so_that_bytes_repeat() -> None:
    one, _ = build_header([], {"b": "1", "a": "2"})
    two, _ = build_header([], {"a": "2", "b": "1"})
    assert one == two
    assert b'{"__metadata__":{"a":"2","b":"1"}}' in one


@pytest.mark.parametrize(
    "specs,code",
    [
        ([TensorSpec("a", F32, (1,)), TensorSpec("a", F32, (1,))], "duplicate-name"),
        ([TensorSpec("a", F32, (1,)), TensorSpec("a", DTYPES["U8"], (1,))], "duplicate-name"),
        ([TensorSpec("__metadata__", F32, (1,))], "duplicate-name"),
        ([TensorSpec("a", DTYPES["F4"], (3,))], "shape-mismatch"),
        ([TensorSpec("a", F32, (2**40, 2**40))], "bad-shape"),
        ([TensorSpec("a", F32, (-1,))], "bad-shape"),
        ([TensorSpec("\ud800", F32, (1,))], "bad-entry"),
    ],
)
def test_what_no_reader_would_take_is_not_built(specs: list[TensorSpec], code: str) -> None:
    with pytest.raises(SourceError, match=code):
        build_header(specs)


class CountingStore(MemoryStore):
    """Counts reads."""

    __slots__ = ()
    calls: list[tuple[int, int]] = []  # noqa: RUF012 - one test uses it, and the base is frozen

    def read_into(self, name: str, reads: Any, *, pin: str | None = None) -> None:
        self.calls.extend((read.start, read.into.nbytes) for read in reads)
        MemoryStore.read_into(self, name, reads, pin=pin)


def test_a_small_header_takes_one_read_and_a_large_one_two() -> None:
    store = CountingStore("headers")
    small, _ = build_header([TensorSpec("a", F32, (1,))])
    store.put("small", small + b"abcd")
    large, header = build_header([TensorSpec(f"{number:0100d}", DTYPES["U8"], (0,)) for number in range(3000)])
    store.put("large", large)
    assert read_header(store, "small").tensors[0].spec == TensorSpec("a", F32, (1,))
    assert store.calls == [(0, len(small) + 4)]
    store.calls.clear()
    assert read_header(store, "large") == header
    assert store.calls == [(0, FIRST_READ_BYTES), (FIRST_READ_BYTES, len(large) - FIRST_READ_BYTES)]


def test_an_empty_file_is_refused_by_the_reader() -> None:
    store = MemoryStore("empty-header")
    store.put("empty", b"")
    with pytest.raises(SourceError, match="truncated"):
        read_header(store, "empty")


def test_entries_point_at_the_bytes() -> None:
    store = MemoryStore("entries")
    state = {"a": torch.arange(3, dtype=torch.int64), "b": torch.tensor(1.5)}
    store.put("f", safetensors.torch.save(state))
    for entry in read_header(store, "f").tensors:
        buffer = bytearray(entry.stop - entry.start)
        store.read_into("f", [RangeRead(entry.start, memoryview(buffer))])
        expected = state[entry.spec.name]
        assert torch.equal(torch.frombuffer(buffer, dtype=expected.dtype).reshape(expected.shape), expected)
