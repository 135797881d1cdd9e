"""What every sink promises: files grow unseen, in any order and by anybody, and appear whole or not at all."""

from __future__ import annotations

import hashlib
import itertools
import pickle
import random
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from merger.destination import Destination, open_destination
from merger.storage.base import FileLayout, RangeRead, Sink
from tests.conformance.remote import enter_hub, enter_s3

MIB = 1 << 20
KINDS = ("local", "memory", "s3", "hub", "hub over s3")


@pytest.fixture(params=KINDS)
def opened(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], Destination]:
    """Opens the destination of this test, as often as asked: as another process would."""
    kind, name = request.param, uuid.uuid4().hex[:12]
    path = {"local": str(tmp_path / "out"), "memory": f"memory://{name}", "s3": f"s3://raymerge/sinks/{name}"}.get(
        kind, f"hf://suite/{name}"
    )
    run_dir = str(tmp_path / "run")
    if "s3" in kind:
        enter_s3(monkeypatch, request.getfixturevalue("s3_server"))
        run_dir = f"s3://raymerge/runs/{name}"
    if "hub" in kind:
        enter_hub(monkeypatch, request.getfixturevalue("hub_server"), tmp_path / "cache")
    return lambda: open_destination(path, run_dir=run_dir)


def layout(name: str = "model.safetensors", size: int = 13 * MIB + 7, prefix: bytes = b"header!!") -> FileLayout:
    return FileLayout(name, size, prefix, (0, 5 * MIB, 10 * MIB + 100))


def content(file: FileLayout, seed: int = 1) -> bytes:
    return file.prefix + random.Random(seed).randbytes(file.size - len(file.prefix))


def cuts(file: FileLayout, count: int, seed: int = 0) -> list[tuple[int, int]]:
    """The file's bytes after its prefix, in `count` spans."""
    inner = random.Random(seed).sample(range(len(file.prefix) + 1, file.size), count - 1)
    bounds = [len(file.prefix), *sorted(inner), file.size]
    return list(itertools.pairwise(bounds))


def write(sink: Sink, file: FileLayout, data: bytes, spans: list[tuple[int, int]]) -> None:
    writer = sink.writer()
    for start, end in spans:
        buffer = bytearray(data[start:end])
        writer.write(file.name, start, memoryview(buffer))
        buffer[:] = bytes(len(buffer))  # the caller's buffer is its own again
    writer.flush()


def seal(sink: Sink, file: FileLayout) -> None:
    if sink.seals:
        sink.sealed(file.name, pickle.loads(pickle.dumps(sink.seal(file.name))))


def read(destination: Destination, name: str) -> bytes:
    size = destination.content.stat(name).size
    buffer = bytearray(size)
    destination.content.read_into(name, [RangeRead(0, memoryview(buffer))])
    return bytes(buffer)


def visible(destination: Destination) -> set[str]:
    return {name for name in destination.content.list_files() if not name.startswith(".raymerge/")}


def test_a_file_written_in_any_order_appears_when_it_is_published(opened: Callable[[], Destination]) -> None:
    file = layout()
    data = content(file)
    destination = opened()
    destination.sink.probe()
    destination.sink.begin([file])
    spans = cuts(file, 9)
    random.Random(3).shuffle(spans)
    write(destination.sink, file, data, spans)
    seal(destination.sink, file)
    destination.sink.stage("config.json", b"{}")
    assert visible(destination) == set()
    destination.sink.publish("config.json")
    destination.sink.publish(file.name)
    destination.sink.conclude("a merge")
    after = opened()
    assert visible(after) == {"config.json", file.name}
    assert read(after, file.name) == data
    assert read(after, "config.json") == b"{}"


def test_several_workers_write_one_file(opened: Callable[[], Destination]) -> None:
    file = layout()
    data = content(file, 2)
    destination = opened()
    destination.sink.begin([file])
    spans = cuts(file, 24, 5)
    sinks: list[Any] = [pickle.loads(pickle.dumps(destination.sink)) for _ in range(4)]
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda i: write(sinks[i], file, data, spans[i::4]), range(4)))
    seal(pickle.loads(pickle.dumps(destination.sink)) if destination.sink.seals else destination.sink, file)
    if destination.sink.seals:
        seal(destination.sink, file)
    destination.sink.publish(file.name)
    destination.sink.conclude("a merge")
    assert read(opened(), file.name) == data


def test_what_was_flushed_is_there_for_the_next_run(opened: Callable[[], Destination]) -> None:
    file = layout()
    data = content(file, 3)
    spans = cuts(file, 6, 6)
    first = opened()
    first.sink.begin([file])
    write(first.sink, file, data, spans[:3])
    second = opened()
    second.sink.begin([file])
    assert second.sink.published() == frozenset()
    held = [second.sink.holds(file.name, s, e, hashlib.sha256(data[s:e]).hexdigest()) for s, e in spans]
    assert held == [True] * 3 + [False] * 3
    write(second.sink, file, data, spans[3:])
    seal(second.sink, file)
    second.sink.publish(file.name)
    second.sink.conclude("a merge")
    assert read(opened(), file.name) == data


def test_published_files_are_known_to_a_run_that_was_cut_short_there(opened: Callable[[], Destination]) -> None:
    file, other = layout(), layout("other.safetensors")
    data = content(file, 4)
    first = opened()
    if type(first.sink).__name__ == "HubSink":
        pytest.skip("all files of a repository appear at once")
    first.sink.begin([file, other])
    write(first.sink, file, data, cuts(file, 2))
    seal(first.sink, file)
    first.sink.publish(file.name)
    second = opened()
    second.sink.begin([file, other])
    assert second.sink.published() == {file.name}
    assert second.sink.holds(file.name, 100, 200, hashlib.sha256(data[100:200]).hexdigest())
    write(second.sink, other, data, cuts(other, 3))
    seal(second.sink, other)
    for name in (file.name, other.name):
        second.sink.publish(name)
    second.sink.conclude("a merge")
    assert read(opened(), file.name) == read(opened(), other.name) == data


def test_a_file_may_be_written_twice(opened: Callable[[], Destination]) -> None:
    """A unit that was done and whose receipt was lost is done again."""
    file = layout()
    data = content(file, 5)
    destination = opened()
    destination.sink.begin([file])
    spans = cuts(file, 5)
    write(destination.sink, file, data, spans)
    write(destination.sink, file, data, spans[1:3])
    seal(destination.sink, file)
    seal(destination.sink, file)
    destination.sink.publish(file.name)
    destination.sink.conclude("a merge")
    assert read(opened(), file.name) == data


def test_an_empty_file_and_one_that_is_all_prefix(opened: Callable[[], Destination]) -> None:
    empty, header = FileLayout("empty.bin", 0, b"", (0,)), FileLayout("a.safetensors", 8, b"12345678", (0,))
    destination = opened()
    destination.sink.begin([empty, header])
    destination.sink.writer().flush()
    for file in (empty, header):
        seal(destination.sink, file)
        destination.sink.publish(file.name)
    destination.sink.conclude("a merge")
    assert (read(opened(), "empty.bin"), read(opened(), "a.safetensors")) == (b"", b"12345678")


def test_what_is_abandoned_is_gone(opened: Callable[[], Destination]) -> None:
    file = layout()
    data = content(file, 6)
    first = opened()
    first.sink.begin([file])
    write(first.sink, file, data, cuts(file, 3))
    opened().sink.abandon([file.name])
    again = opened()
    again.sink.begin([file])
    start, end = cuts(file, 3)[1]
    assert not again.sink.holds(file.name, start, end, hashlib.sha256(data[start:end]).hexdigest())
