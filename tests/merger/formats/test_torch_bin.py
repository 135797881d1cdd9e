"""torch's .bin files by descriptor, and everything a hostile one might try."""

from __future__ import annotations

import collections
import io
import os
import pickle
import pickletools
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from merger.errors import SourceError
from merger.formats.torch_bin import BinEntry, read_bin
from merger.storage.memory import MemoryStore


def store_of(data: bytes) -> MemoryStore:
    store = MemoryStore("torch-bin")
    store.put("model.bin", data)
    return store


def saved(value: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def archive(
    pickled: bytes, storages: dict[str, bytes] | None = None, method: int = zipfile.ZIP_STORED, **more: bytes
) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as file:
        file.writestr("archive/data.pkl", pickled)
        for key, data in (storages or {}).items():
            file.writestr(f"archive/data/{key}", data)
        for name, data in more.items():
            file.writestr(f"archive/{name}", data)
    return buffer.getvalue()


def materialise(data: bytes, entry: BinEntry) -> torch.Tensor:
    """The tensor of a descriptor, the slow and obvious way."""
    dtype = getattr(torch, entry.spec.dtype.torch_name or "")
    if entry.spec.numel == 0:
        return torch.empty(entry.spec.shape, dtype=dtype)
    flat = torch.frombuffer(bytearray(data[entry.start : entry.stop]), dtype=dtype)
    return flat.as_strided(entry.spec.shape, entry.strides)


def refused(data: bytes) -> str:
    with pytest.raises(SourceError) as caught:
        read_bin(store_of(data), "model.bin")
    (problem,) = caught.value.problems
    assert problem.where == "memory://torch-bin/model.bin"
    return problem.code


def real_states() -> dict[str, Any]:
    torch.manual_seed(0)
    grid = torch.randn(6, 8)
    module = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.BatchNorm1d(5))
    shared = torch.arange(24, dtype=torch.float16)
    return {
        "floats": {"a": grid, "b": grid.bfloat16(), "c": grid.half(), "d": grid.double(), "e": torch.tensor(2.5)},
        "whole": {f"i{n}": torch.arange(7).to(getattr(torch, n)) for n in ("int8", "uint8", "int16", "int32", "int64")},
        "new": {
            "f8": grid.to(torch.float8_e4m3fn),
            "u16": torch.arange(5).to(torch.uint16),
            "bool": grid > 0,
            "c64": torch.complex(grid, grid),
        },
        "views": {
            "t": grid.T, "rows": grid[2:4], "cols": grid[:, 3:5], "step": grid[::2, ::3], "wide": grid[:1].expand(4, 8),
        },
        "shared": {"one": shared, "two": shared[4:10], "three": shared.view(4, 6).T},
        "empty": {"a": torch.empty(0, 5), "b": torch.empty(3, 0), "c": grid[:0]},
        "module": module.state_dict(),
        "parameters": {"p": torch.nn.Parameter(grid), "q": torch.nn.Parameter(grid, requires_grad=False)},
        "ordered": collections.OrderedDict(ü=grid, z=grid),
        "nothing": {},
    }  # fmt: skip


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("name", list(real_states()))
def test_real_state_dicts_read_back_equal(name: str, protocol: int) -> None:
    state = real_states()[name]
    data = saved(state, pickle_protocol=protocol)
    entries = read_bin(store_of(data), "model.bin")
    assert [entry.spec.name for entry in entries] == list(state)
    for entry in entries:
        expected = state[entry.spec.name].detach()
        got = materialise(data, entry)
        assert got.dtype == expected.dtype
        assert torch.equal(got.view(torch.uint8) if "f8" in entry.spec.name else got,
                           expected.view(torch.uint8) if "f8" in entry.spec.name else expected)  # fmt: skip
        assert entry.is_contiguous == expected.is_contiguous()


def test_a_file_on_disk_is_read_like_one_in_memory(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(3)}, tmp_path / "pytorch_model.bin")
    data = (tmp_path / "pytorch_model.bin").read_bytes()
    (entry,) = read_bin(store_of(data), "model.bin")
    assert torch.equal(materialise(data, entry), torch.ones(3))


def test_tensors_of_one_storage_name_it() -> None:
    one, two, three = read_bin(store_of(saved(real_states()["shared"])), "model.bin")
    assert one.storage == two.storage == three.storage
    assert two.start == one.start + 8


class Bomb:
    """Runs a command where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_pickle_bomb_is_refused_by_name_and_does_not_run(tmp_path: Path, protocol: int) -> None:
    data = saved({"a": torch.ones(2), "b": Bomb(tmp_path / "ran")}, pickle_protocol=protocol)
    with pytest.raises(SourceError, match="pickle-refused") as caught:
        read_bin(store_of(data), "model.bin")
    assert "posix.mkdir" in caught.value.problems[0].what
    assert not (tmp_path / "ran").exists()


P2, STOP = b"\x80\x02", b"."
ORDERED = b"ccollections\nOrderedDict\n"
STORAGE = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x04tQ"


def v2(
    offset: int = 0, shape: tuple[int, ...] = (4,), strides: tuple[int, ...] = (1,), storage: bytes = STORAGE
) -> bytes:
    """A pickle of {"a": a view of a storage of four floats}."""

    def number(value: int) -> bytes:
        return b"\x8a\x09" + value.to_bytes(9, "little", signed=True)

    numbers = b"".join((number(offset), b"(", *map(number, shape), b"t(", *map(number, strides), b"t"))
    call = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + numbers + b"\x89}tR"
    return P2 + b"}X\x01\0\0\0a" + call + b"s."


def test_the_pickle_written_by_hand_is_sound() -> None:
    (entry,) = read_bin(store_of(archive(v2(), {"0": bytes(16)})), "model.bin")
    assert entry.spec.shape == (4,)


HOSTILE_PICKLES = {
    "os.system": (P2 + b"cos\nsystem\nX\x02\0\0\0ls\x85R.", "pickle-refused"),
    "eval": (P2 + b"c__builtin__\neval\nX\x011\0\0\x001\x85R.", "pickle-refused"),
    "stack global": (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "pickle-refused"),
    "global that is a list": (b"\x80\x04]\x8c\x06system\x93.", "pickle-refused"),
    "torch.load": (P2 + b"ctorch\nload\n.", "pickle-refused"),
    "dotted name": (P2 + b"ctorch\n_utils.os.system\n.", "pickle-refused"),
    "INST": (P2 + b"(X\x02\0\0\0lsios\nsystem\n.", "pickle-refused"),
    "OBJ": (P2 + b"(" + ORDERED + b"o.", "pickle-refused"),
    "NEWOBJ": (P2 + ORDERED + b")\x81.", "pickle-refused"),
    "EXT1": (P2 + b"\x82\x01.", "pickle-refused"),
    "PERSID": (P2 + b"P0\n.", "pickle-refused"),
    "BUILD of a global": (P2 + ORDERED + b"}b.", "pickle-refused"),
    "calling a dtype": (P2 + b"ctorch\nfloat32\n)R.", "pickle-refused"),
    "calling text": (P2 + b"X\x01\0\0\0a)R.", "pickle-refused"),
    "arguments that are a list": (P2 + ORDERED + b"]R.", "pickle-malformed"),
    "empty": (b"", "pickle-malformed"),
    "no STOP": (P2 + b"}", "pickle-malformed"),
    "empty stack": (P2 + STOP, "pickle-malformed"),
    "two values": (P2 + b"}}.", "pickle-malformed"),
    "a bare mark": (P2 + b"(.", "not-a-state-dict"),
    "tuple of a mark": (P2 + b"(\x85.", "pickle-malformed"),
    "tuple without mark": (P2 + b"t.", "pickle-malformed"),
    "unknown opcode": (P2 + b"\xff.", "pickle-malformed"),
    "memo miss": (P2 + b"h\x05.", "pickle-malformed"),
    "huge memo": (P2 + b"}r\xff\xff\xff\x7f.", None),
    "giant frame": (b"\x80\x04\x95" + b"\xff" * 7 + b"\x7f}.", None),
    "giant string": (b"\x80\x04\x8d" + b"\xff" * 7 + b"\x7fa.", "pickle-malformed"),
    "giant number": (P2 + b"\x8b\xff\xff\xff\x7f1.", "pickle-malformed"),
    "number of 10000 digits": (P2 + b"L" + b"9" * 10_000 + b"L\n.", "pickle-malformed"),
    "tuple nested 500000 deep": (P2 + b")" + b"\x85" * 500_000 + b".", "not-a-state-dict"),
    "deep tuple as key": (P2 + b"})" + b"\x85" * 500_000 + b"Ns.", "pickle-malformed"),
    "list that holds itself": (P2 + b"]q\0h\0a.", "not-a-state-dict"),
    "dict that holds itself": (P2 + b"}q\0X\x01\0\0\0ah\0s.", "not-a-state-dict"),
    "huge key": (P2 + b"}\x8b\0\0\x01\0" + b"\x7f" * 65536 + b"Ns.", "pickle-malformed"),
    "odd items": (P2 + b"}(Nu.", "pickle-malformed"),
    "items of a tuple": (P2 + b")(NNu.", "pickle-malformed"),
    "name twice": (P2 + b"}(X\x01\0\0\0aNX\x01\0\0\0aNu.", "duplicate-name"),
    "no tensors but numbers": (P2 + b"}X\x01\0\0\0aK\x01s.", "not-a-state-dict"),
    "a list": (P2 + b"].", "not-a-state-dict"),
    "number as key": (P2 + b"}K\x01Ns.", "not-a-state-dict"),
    "offset outside": (v2(offset=1), "outside-storage"),
    "shape outside": (v2(shape=(5,)), "outside-storage"),
    "stride outside": (v2(shape=(2,), strides=(4,)), "outside-storage"),
    "2**60 elements by stride 0": (v2(shape=(2**60,), strides=(0,)), "outside-storage"),
    "empty far outside": (v2(offset=2**40, shape=(0,)), "outside-storage"),
    "negative offset": (v2(offset=-1), "pickle-malformed"),
    "negative stride": (v2(strides=(-1,), offset=3), "pickle-malformed"),
    "negative size": (v2(shape=(-1,)), "pickle-malformed"),
    "more strides than sizes": (v2(strides=(1, 1)), "pickle-malformed"),
    "100 dimensions": (v2(shape=(1,) * 100, strides=(1,) * 100), "pickle-malformed"),
    "storage missing": (v2(storage=STORAGE.replace(b"\x000X", b"\x007X")), "missing-storage"),
    "storage climbs": (v2(storage=STORAGE.replace(b"X\x01\0\0\x000", b"X\x04\0\0\0../x")), "missing-storage"),
    "storage too short": (v2(storage=STORAGE.replace(b"K\x04t", b"K\x05t")), "outside-storage"),
    "storage of no such type": (v2(storage=STORAGE.replace(b"FloatStorage", b"float32")), "pickle-malformed"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(HOSTILE_PICKLES))
def test_a_hostile_pickle_is_refused(name: str) -> None:
    pickled, code = HOSTILE_PICKLES[name]
    data = archive(pickled, {"0": bytes(16)})
    if code is None:
        assert read_bin(store_of(data), "model.bin") == ()
    else:
        assert refused(data) == code


def test_a_pickle_over_the_cap_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("merger.formats.torch_bin.MAX_PICKLE_BYTES", 1000)
    assert refused(archive(v2() + bytes(1000), {"0": bytes(16)})) == "pickle-too-large"


def test_a_pickle_of_too_many_operations_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("merger.formats.torch_bin.MAX_PICKLE_OPCODES", 100)
    assert refused(archive(P2 + b"N" * 1000 + b"}.")) == "pickle-too-large"


def test_conjugate_views_are_refused() -> None:
    assert refused(saved({"a": torch.ones(2, dtype=torch.complex64).conj()})) == "pickle-refused"


@pytest.mark.parametrize(
    "value",
    [
        torch.nn.Linear(2, 2),
        {"a": torch.ones(2).to_sparse()},
    ],
    ids=["module", "sparse"],
)
@pytest.mark.filterwarnings("ignore")
def test_what_is_no_plain_tensor_is_refused(value: Any) -> None:
    assert refused(saved(value)) == "pickle-refused"


def test_a_nested_checkpoint_is_refused_with_the_key_named() -> None:
    with pytest.raises(SourceError, match="not-a-state-dict") as caught:
        read_bin(store_of(saved({"state_dict": {"a": torch.ones(1)}})), "model.bin")
    assert "state_dict" in caught.value.problems[0].what


def test_a_legacy_file_is_refused_with_a_way_out() -> None:
    data = saved({"a": torch.ones(1)}, _use_new_zipfile_serialization=False)
    with pytest.raises(SourceError, match="legacy-bin") as caught:
        read_bin(store_of(data), "model.bin")
    assert "safetensors" in caught.value.problems[0].fix


def test_other_files_are_refused() -> None:
    assert refused(b"") == "not-a-zip"
    assert refused(b"version https://git-lfs.github.com/spec/v1\n") == "not-a-zip"
    empty = io.BytesIO()
    zipfile.ZipFile(empty, "w").close()
    assert refused(empty.getvalue()) == "not-a-state-dict"


def test_every_truncation_is_refused() -> None:
    data = saved({"a": torch.ones(8)})
    for cut in range(1, len(data)):
        assert refused(data[:cut]) in ("truncated", "not-a-zip")


def test_compressed_entries_are_refused() -> None:
    assert refused(archive(v2(), {"0": bytes(16)}, zipfile.ZIP_DEFLATED)) == "compressed-entry"


def test_big_endian_files_are_refused() -> None:
    assert refused(archive(v2(), {"0": bytes(16)}, byteorder=b"big")) == "big-endian"


def test_damage_in_the_directory_is_refused_or_harmless() -> None:
    data = saved({"a": torch.ones(8)})
    for at in range(data.index(b"PK\1\2"), len(data)):
        damaged = bytearray(data)
        damaged[at] ^= 0xFF
        try:
            entries = read_bin(store_of(bytes(damaged)), "model.bin")
        except SourceError:
            continue
        assert torch.equal(materialise(bytes(damaged), entries[0]), torch.ones(8))


def test_a_damaged_pickle_is_refused_or_stays_inside_its_storages() -> None:
    pickled = zipfile.ZipFile(io.BytesIO(saved(real_states()["new"]))).read("archive/data.pkl")
    storages = {str(number): bytes(384) for number in range(4)}
    for at in range(len(pickled)):
        for value in (0x00, 0x28, 0x52, 0x62, pickled[at] ^ 0x01, pickled[at] ^ 0x80):
            data = archive(pickled[:at] + bytes([value]) + pickled[at + 1 :], storages)
            try:
                entries = read_bin(store_of(data), "model.bin")
            except SourceError:
                continue
            assert all(0 < entry.start <= entry.stop <= len(data) for entry in entries)


def test_zip64_directories_are_read() -> None:
    """Rewrite a directory's sizes and offsets as zip64, as torch does for files over 4 GiB."""
    data = archive(v2(), {"0": struct.pack("<4f", 1, 2, 3, 4)})
    start = data.index(b"PK\1\2")
    body, records = data[:start], zipfile.ZipFile(io.BytesIO(data)).infolist()
    directory = b""
    for record in records:
        name = record.filename.encode()
        extra = struct.pack("<2H3Q", 1, 24, record.file_size, record.file_size, record.header_offset)
        directory += struct.pack(
            "<4s6H3I5H2I", b"PK\1\2", 45, 45, 0, 0, 0, 0, record.CRC, 2**32 - 1, 2**32 - 1, len(name), len(extra),
            0, 0, 0, 0, 2**32 - 1,
        ) + name + extra  # fmt: skip
    count = len(records)
    end64 = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, len(directory), start)
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, start + len(directory), 1)
    end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 2**32 - 1, 2**32 - 1, 0)
    (entry,) = read_bin(store_of(body + directory + end64 + locator + end), "model.bin")
    assert materialise(data, entry).tolist() == [1, 2, 3, 4]


def test_only_headers_and_the_pickle_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    data = saved({"a": torch.ones(100_000)})
    (entry,) = read_bin(store_of(data), "model.bin")
    seen: list[tuple[int, int]] = []
    original = MemoryStore.read_into

    def spy(self: MemoryStore, name: str, reads: Any, *, pin: str | None = None) -> None:
        seen.extend((read.start, read.start + read.into.nbytes) for read in reads)
        original(self, name, reads, pin=pin)

    monkeypatch.setattr(MemoryStore, "read_into", spy)
    read_bin(store_of(data), "model.bin")
    tail = len(data) - 70_000
    assert all(stop <= entry.start or start >= tail for start, stop in seen)


def test_pickles_of_this_machine_agree_with_python_on_plain_data() -> None:
    """The machine builds what pickle builds, for the values a state dict is made of."""
    from merger.formats.torch_bin import _Machine

    value = {"a": (1, 2, (3, "é" * 300, None)), "b": [True, False, [1.5, -7, 2**40]], "c": {"d": ()}}
    for protocol in (0, 1, 2, 3, 4, 5):
        for data in (pickle.dumps(value, protocol), pickletools.optimize(pickle.dumps(value, protocol))):
            assert _Machine("test").run(data) == value
