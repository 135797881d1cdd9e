"""One suite for every transport: what merger/storage/base.py promises."""

from __future__ import annotations

import itertools
import os
import pickle
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest

from merger.errors import MergeFailedError, RaymergeError, SourceChangedError, SourceError
from merger.storage import LocalStore, MemoryStore, RangeRead, Store, WritableStore, read_whole
from merger.storage.base import FillableStore
from merger.storage.s3 import S3Store
from tests.conformance.remote import Repository, enter_hub, enter_s3

KINDS = ("local", "memory", "s3", "hub")
PUT_KINDS = KINDS[:3]
FILL_KINDS = KINDS[:2]
BUCKET = "raymerge"
_fresh = itertools.count()


def code(caught: pytest.ExceptionInfo[RaymergeError]) -> str:
    return caught.value.problems[0].code


def get(store: Store, name: str, start: int, count: int, *, pin: str | None = None) -> bytes:
    buffer = bytearray(count)
    store.read_into(name, [RangeRead(start, memoryview(buffer))], pin=pin)
    return bytes(buffer)


class Source(Store, Protocol):
    """A store that a test may fill from outside."""

    def put(self, name: str, data: bytes) -> None: ...

    def remove(self, name: str) -> None: ...


@pytest.fixture
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A place of each kind that the test is for: all can be read, most can be put into, some can be filled."""
    kind = request.param
    made: Any
    if kind == "s3":
        enter_s3(monkeypatch, request.getfixturevalue("s3_server"))
        made = S3Store(BUCKET, f"storage/{next(_fresh)}")
    elif kind == "hub":
        server = request.getfixturevalue("hub_server")
        enter_hub(monkeypatch, server, tmp_path / "cache")
        made = Repository(server, f"suite/storage-{next(_fresh)}")
    else:
        made = LocalStore(str(tmp_path / "store")) if kind == "local" else MemoryStore(f"storage-{next(_fresh)}")
    yield made
    if kind != "hub":
        for name in made.list_files():
            made.remove(name)


readable = pytest.mark.parametrize("store", KINDS, indirect=True)
writable = pytest.mark.parametrize("store", PUT_KINDS, indirect=True)
fillable = pytest.mark.parametrize("store", FILL_KINDS, indirect=True)


def change(store: Source, name: str, data: bytes) -> None:
    """Someone else writes the file, in place, past the store."""
    if isinstance(store, MemoryStore):
        store.files[name][:] = data
    elif isinstance(store, LocalStore):
        path = Path(store.uri, name)
        before = path.stat()
        path.write_bytes(data)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    else:
        store.put(name, data)


# ---- protocol --------------------------------------------------------------------------------------------------------


@writable
def test_it_is_a_store(store: WritableStore) -> None:
    assert isinstance(store, WritableStore)
    assert pickle.loads(pickle.dumps(store)) == store


@writable
def test_a_pickled_store_reaches_the_same_files(store: WritableStore) -> None:
    store.put("a", b"abc")
    assert read_whole(pickle.loads(pickle.dumps(store)), "a", limit=3) == b"abc"


@writable
def test_nothing_is_there_at_first(store: WritableStore, tmp_path: Path) -> None:
    assert store.list_files() == ()
    assert not (tmp_path / "store").exists()


# ---- reads -----------------------------------------------------------------------------------------------------------


@readable
def test_names_are_listed_sorted_and_with_their_folders(store: Source) -> None:
    for name in ("b/c", "a", "b/a/x", "z.json", "ü"):
        store.put(name, b"")
    assert store.list_files() == ("a", "b/a/x", "b/c", "z.json", "ü")


@readable
@pytest.mark.parametrize("start, count", [(0, 1), (0, 256), (255, 1), (13, 100), (256, 0), (0, 0)])
def test_a_range_is_filled(store: Source, start: int, count: int) -> None:
    data = bytes(range(256))
    store.put("a", data)
    assert get(store, "a", start, count) == data[start : start + count]


@readable
def test_several_ranges_in_one_call_in_any_order(store: Source) -> None:
    store.put("a", bytes(range(100)))
    buffers = [bytearray(3), bytearray(5), bytearray(3), bytearray(0)]
    starts = [90, 10, 90, 100]
    store.read_into("a", [RangeRead(s, memoryview(b)) for s, b in zip(starts, buffers, strict=True)])
    assert [bytes(b) for b in buffers] == [bytes(range(90, 93)), bytes(range(10, 15)), bytes(range(90, 93)), b""]


@readable
def test_a_buffer_may_hold_wider_elements_than_bytes(store: Source) -> None:
    wanted = np.arange(1000, dtype=np.float32)
    store.put("a", wanted.tobytes())
    found = np.zeros(999, dtype=np.float32)
    store.read_into("a", [RangeRead(4, found.data)])
    assert np.array_equal(found, wanted[1:])


@readable
@pytest.mark.parametrize("start, count", [(0, 11), (10, 1), (5, 6), (1 << 40, 1)])
def test_a_short_read_is_an_error(store: Source, start: int, count: int) -> None:
    store.put("a", b"0123456789")
    with pytest.raises(SourceError) as caught:
        get(store, "a", start, count)
    assert code(caught) == "truncated"


@readable
@pytest.mark.parametrize("name", ["missing", "a/below-a-file", "b"])
def test_a_missing_file_is_named(store: Source, name: str) -> None:
    store.put("a", b"x")
    for look in (lambda: store.stat(name), lambda: get(store, name, 0, 1), lambda: read_whole(store, name, limit=9)):
        with pytest.raises(SourceError) as caught:
            look()
        assert code(caught) == "no-such-file"
        assert name in str(caught.value)


@readable
def test_read_whole_has_a_limit(store: Source) -> None:
    store.put("a", b"12345")
    assert read_whole(store, "a", limit=5) == b"12345"
    with pytest.raises(SourceError) as caught:
        read_whole(store, "a", limit=4)
    assert code(caught) == "file-too-large"


# ---- pins ------------------------------------------------------------------------------------------------------------


@readable
def test_a_pin_holds_while_the_file_does(store: Source) -> None:
    store.put("a", b"12345")
    pin = store.stat("a").pin
    assert store.stat("a").pin == pin
    assert get(store, "a", 0, 5, pin=pin) == b"12345"


@readable
@pytest.mark.parametrize("after", [b"12346", b"1234", b"123456"], ids=["content", "shorter", "longer"])
def test_a_changed_file_breaks_its_pin(store: Source, after: bytes) -> None:
    store.put("a", b"12345")
    pin = store.stat("a").pin
    change(store, "a", after)
    with pytest.raises(SourceChangedError) as caught:
        get(store, "a", 0, 1, pin=pin)
    assert code(caught) == "source-changed"
    assert store.stat("a").pin != pin


@readable
def test_a_replaced_file_breaks_its_pin(store: Source) -> None:
    store.put("a", b"12345")
    pin = store.stat("a").pin
    store.put("a", b"54321")
    with pytest.raises(SourceChangedError):
        get(store, "a", 0, 1, pin=pin)


@readable
def test_a_removed_file_breaks_its_pin(store: Source) -> None:
    """It could be read when it was pinned: that is a change, not a missing source."""
    store.put("a", b"12345")
    pin = store.stat("a").pin
    store.remove("a")
    with pytest.raises(SourceChangedError):
        get(store, "a", 0, 1, pin=pin)


# ---- names -----------------------------------------------------------------------------------------------------------

ESCAPES = ["../a", "a/../../b", "/etc/passwd", "", ".", "..", "a/..", "a\\..\\b", "a\0b", "./../a"]


@writable
@pytest.mark.parametrize("name", ESCAPES)
def test_no_name_leaves_the_root(store: WritableStore, name: str, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"outside")
    store.put("inside", b"x")
    uses: list[Callable[[], object]] = [
        lambda: store.stat(name),
        lambda: get(store, name, 0, 0),
        lambda: store.put(name, b"x"),
        lambda: store.remove(name),
    ]
    if isinstance(store, FillableStore):
        filled = store
        uses += [
            lambda: filled.allocate(name, 1),
            lambda: filled.write_at(name, 0, memoryview(b"x")),
            lambda: filled.commit("inside", name),
            lambda: filled.commit(name, "inside"),
        ]
    for use in uses:
        with pytest.raises(SourceError) as caught:
            use()
        assert code(caught) == "path-escapes"
    assert (tmp_path / "a").read_bytes() == b"outside"
    assert read_whole(store, "inside", limit=1) == b"x"


# ---- allocate, write, commit -----------------------------------------------------------------------------------------


@fillable
def test_a_file_grows_under_its_scratch_name_and_appears_whole(store: FillableStore) -> None:
    store.allocate("parts/a", 10)
    assert store.stat("parts/a").size == 10
    store.write_at("parts/a", 6, memoryview(b"6789"))
    store.write_at("parts/a", 0, memoryview(b"012345"))
    store.write_at("parts/a", 2, memoryview(b"23"))
    assert store.list_files() == ("parts/a",)
    store.commit("parts/a", "sub/a")
    assert store.list_files() == ("sub/a",)
    assert read_whole(store, "sub/a", limit=10) == b"0123456789"


@fillable
def test_allocate_keeps_what_has_the_right_size(store: FillableStore) -> None:
    store.allocate("a", 4)
    store.write_at("a", 0, memoryview(b"abcd"))
    store.allocate("a", 4)
    assert read_whole(store, "a", limit=4) == b"abcd"
    for size in (6, 3, 0):
        store.allocate("a", size)
        assert store.stat("a").size == size
        assert set(read_whole(store, "a", limit=9)) <= {0}


@fillable
def test_commit_replaces(store: FillableStore) -> None:
    store.put("a", b"old")
    store.allocate("s", 5)
    store.write_at("s", 0, memoryview(b"newer"))
    store.commit("s", "a")
    assert read_whole(store, "a", limit=9) == b"newer"
    assert store.list_files() == ("a",)


@fillable
def test_an_empty_file_may_be_committed(store: FillableStore) -> None:
    store.allocate("s", 0)
    store.commit("s", "a")
    assert store.stat("a").size == 0


@fillable
@pytest.mark.parametrize("name, offset, data", [("s", 9, b"xy"), ("s", 11, b"x"), ("never", 0, b"x")])
def test_nothing_is_written_outside_what_was_allocated(
    store: FillableStore, name: str, offset: int, data: bytes
) -> None:
    store.allocate("s", 10)
    with pytest.raises(MergeFailedError) as caught:
        store.write_at(name, offset, memoryview(data))
    assert code(caught) == "write-failed"
    assert store.stat("s").size == 10
    assert store.list_files() == ("s",)


@fillable
def test_committing_what_is_gone_is_an_error_and_leaves_the_target(store: FillableStore) -> None:
    store.put("a", b"old")
    with pytest.raises(MergeFailedError) as caught:
        store.commit("gone", "a")
    assert code(caught) == "write-failed"
    assert read_whole(store, "a", limit=3) == b"old"


@fillable
def test_a_reader_sees_the_old_file_or_the_new_one(store: FillableStore) -> None:
    """While commit and put replace a file, every read gives one of the two whole."""
    size = 1 << 16
    store.put("a", b"0" * size)
    done = threading.Event()
    seen: set[bytes] = set()

    def look() -> None:
        while not done.is_set():
            seen.add(get(store, "a", 0, size))

    reader = threading.Thread(target=look)
    reader.start()
    for turn in range(40):
        content = str(turn % 10).encode() * size
        if turn % 2:
            store.put("a", content)
        else:
            store.allocate("s", size)
            store.write_at("s", 0, memoryview(content))
            store.commit("s", "a")
    done.set()
    reader.join()
    assert seen
    assert all(len(set(content)) == 1 for content in seen)


# ---- put and remove --------------------------------------------------------------------------------------------------


@writable
def test_put_replaces_unless_exclusive(store: WritableStore) -> None:
    store.put("d/a", b"1")
    store.put("d/a", b"22")
    with pytest.raises(FileExistsError):
        store.put("d/a", b"333", exclusive=True)
    assert read_whole(store, "d/a", limit=9) == b"22"
    store.put("d/b", b"4", exclusive=True)
    assert store.list_files() == ("d/a", "d/b")


@writable
def test_put_replaces_the_file_of_a_pin_and_no_other(store: WritableStore) -> None:
    store.put("a", b"0")
    gone = store.stat("a").pin
    store.remove("a")
    with pytest.raises(FileExistsError):
        store.put("a", b"1", replacing=gone)
    assert store.list_files() == ()
    store.put("a", b"1")
    pin = store.stat("a").pin
    store.put("a", b"22", replacing=pin)
    with pytest.raises(FileExistsError):
        store.put("a", b"333", replacing=pin)
    assert read_whole(store, "a", limit=9) == b"22"
    assert store.list_files() == ("a",)


@writable
def test_of_many_that_replace_one_file_at_once_one_wins(store: WritableStore) -> None:
    store.put("a", b"start")
    pin = store.stat("a").pin
    start = threading.Barrier(6)
    won: list[int] = []

    def take(number: int) -> None:
        start.wait()
        try:
            store.put("a", str(number).encode(), replacing=pin)
        except FileExistsError:
            return
        won.append(number)

    threads = [threading.Thread(target=take, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert read_whole(store, "a", limit=9) == str(won[0]).encode()


@writable
def test_of_many_exclusive_puts_one_wins(store: WritableStore) -> None:
    start = threading.Barrier(8)
    won: list[int] = []

    def take(number: int) -> None:
        start.wait()
        try:
            store.put("lease", str(number).encode(), exclusive=True)
        except FileExistsError:
            return
        won.append(number)

    threads = [threading.Thread(target=take, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert read_whole(store, "lease", limit=9) == str(won[0]).encode()
    assert store.list_files() == ("lease",)


@writable
def test_remove_takes_empty_folders_along(store: WritableStore, tmp_path: Path) -> None:
    store.put("a/b/c", b"")
    store.put("a/d", b"")
    store.remove("a/b/c")
    store.remove("a/b/c")
    store.remove("never/there")
    assert store.list_files() == ("a/d",)
    store.remove("a/d")
    assert store.list_files() == ()
    if isinstance(store, LocalStore):
        assert list((tmp_path / "store").iterdir()) == []


@writable
def test_making_and_emptying_one_folder_at_once(store: WritableStore) -> None:
    """Two runs on one output: what one cleans up, the other is about to write into."""
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for _ in range(5 if store.remote else 100):
                store.put(f"state/lease/{number}", b"x")
                store.put(f"state/parts/{number}", b"x")
                store.remove(f"state/lease/{number}")
                store.remove(f"state/parts/{number}")
        except BaseException as error:  # noqa: BLE001 - told below
            errors.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert store.list_files() == ()


@fillable
def test_many_writers_fill_one_file(store: FillableStore) -> None:
    piece, count = 10_007, 32
    wanted = np.random.default_rng(0).integers(0, 256, piece * count, dtype=np.uint8)
    store.allocate("s", wanted.nbytes)

    def fill(first: int) -> None:
        for index in (*range(first, count, 4), first):  # the same bytes twice do no harm
            store.write_at("s", index * piece, wanted[index * piece : (index + 1) * piece].data)

    threads = [threading.Thread(target=fill, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    store.commit("s", "a")
    assert read_whole(store, "a", limit=wanted.nbytes) == wanted.tobytes()


# ---- a full disk -----------------------------------------------------------------------------------------------------

DISK = 1 << 20


@pytest.fixture(params=FILL_KINDS)
def small(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[FillableStore]:
    """A store with room for 1 MiB: a real tmpfs, or memory with a limit."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if request.param == "memory":
        yield MemoryStore(f"storage-{next(_fresh)}", limit_bytes=DISK)
        return
    mount = shutil.which("mount")
    if mount is None or os.geteuid() != 0:
        pytest.skip("mounting a tmpfs needs root")
    done = subprocess.run(
        [mount, "-t", "tmpfs", "-o", f"size={DISK}", "raymerge-test", str(folder)], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {done.stderr.decode().strip()}")
    try:
        yield LocalStore(str(folder))
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_free_bytes_count_down(small: FillableStore) -> None:
    before = small.free_bytes()
    assert before is not None
    assert 0 < before <= DISK
    small.allocate("a", 1 << 18)
    after = small.free_bytes()
    assert after is not None
    assert before - after >= 1 << 18


def test_an_allocation_that_does_not_fit_leaves_nothing(small: FillableStore) -> None:
    with pytest.raises(MergeFailedError) as caught:
        small.allocate("parts/big", DISK + 1)
    assert code(caught) == "disk-full"
    assert small.list_files() == ()


def test_room_is_reserved_when_it_is_allocated(small: FillableStore) -> None:
    """What was allocated can be written however full the disk has become."""
    small.allocate("parts/a", DISK // 2)
    with pytest.raises(MergeFailedError):
        small.allocate("parts/b", DISK * 3 // 4)
    with pytest.raises(MergeFailedError):
        small.put("c", bytes(DISK))
    small.write_at("parts/a", 0, memoryview(b"x" * (DISK // 2)))
    small.commit("parts/a", "a")
    assert small.list_files() == ("a",)
    assert get(small, "a", DISK // 2 - 1, 1) == b"x"


def test_a_put_that_does_not_fit_leaves_the_old_file(small: FillableStore) -> None:
    small.put("a", b"old")
    with pytest.raises(MergeFailedError) as caught:
        small.put("a", bytes(DISK + 1))
    assert code(caught) == "disk-full"
    assert small.list_files() == ("a",)
    assert read_whole(small, "a", limit=9) == b"old"


def test_freed_space_may_be_used_again(small: FillableStore) -> None:
    small.allocate("a", DISK * 3 // 4)
    small.remove("a")
    small.allocate("b", DISK * 3 // 4)


# ---- local alone -----------------------------------------------------------------------------------------------------


def test_a_file_where_a_folder_must_be_is_a_clean_error(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("a file")
    store = LocalStore(str(tmp_path / "store"))
    assert store.list_files() == ()
    uses: list[Callable[[], object]] = [
        lambda: store.put("a", b""),
        lambda: store.allocate("a/b", 1),
        lambda: store.put("x/y", b""),
    ]
    for use in uses:
        with pytest.raises(MergeFailedError) as caught:
            use()
        assert code(caught) == "write-failed"
    assert (tmp_path / "store").read_text() == "a file"


def test_links_are_followed_where_caches_use_them(tmp_path: Path) -> None:
    """As in the Hub's cache: a snapshot's files are links to blobs."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "b1").write_bytes(b"bytes")
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "a").symlink_to("../blobs/b1")
    store = LocalStore(str(tmp_path / "snapshot"))
    assert store.list_files() == ("a",)
    assert read_whole(store, "a", limit=5) == b"bytes"


def test_stores_of_one_name_share_and_others_do_not() -> None:
    one, same, other = MemoryStore("share-1"), MemoryStore("share-1"), MemoryStore("share-2")
    one.put("a", b"x")
    assert same.list_files() == ("a",)
    assert other.list_files() == ()
    one.remove("a")
