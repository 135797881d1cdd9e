"""MultipartSink against an S3: one object however its bytes come, whatever is lost on the way, and nothing left."""

from __future__ import annotations

import itertools
import json
import pickle
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from merger.errors import InfrastructureError, MergeFailedError, OutputExistsError, PlanError, RaymergeError
from merger.storage.base import PART_MIN_BYTES, FileLayout, Sink, read_whole
from merger.storage.multipart import RECORD_FILE, MultipartSink, covers, joined, piece_name, writer_bytes
from merger.storage.s3 import S3Settings, S3Store
from tests.conformance.remote import enter_s3
from tests.counterparts.faults import Fault, FaultProxy
from tests.counterparts.s3 import READ, WRITE, S3Server

BUCKET = "raymerge"
_fresh = itertools.count()

SMALL = 1000
DATA = random.Random(5).randbytes(2 * PART_MIN_BYTES + 300_000)
"""Two parts that are as short as may be, one that is short."""
PARTS = (0, PART_MIN_BYTES, 2 * PART_MIN_BYTES)
PREFIX = 5000


@pytest.fixture(scope="module", autouse=True)
def environment(s3: S3Server, gate: FaultProxy) -> Iterator[None]:
    quick = {"ATTEMPTS": "3", "FIRST_WAIT_SECONDS": "0.001", "LONGEST_WAIT_SECONDS": "0.01"}
    with pytest.MonkeyPatch.context() as patch:
        enter_s3(patch, s3, gate.endpoint)
        for name, value in quick.items():
            patch.setenv(f"RAYMERGE_HTTP_{name}", value)
        yield


@pytest.fixture
def store(s3: S3Server, proxy: FaultProxy) -> Iterator[S3Store]:
    """A prefix of one test alone, of which nothing is left but objects."""
    made = S3Store(BUCKET, f"multipart/{next(_fresh)}")
    yield made
    s3.empty(BUCKET, made.prefix)


@pytest.fixture
def sink(store: S3Store) -> MultipartSink:
    return MultipartSink(store, store)


LAYOUT = FileLayout("model.safetensors", len(DATA), DATA[:PREFIX], PARTS)
NAME = LAYOUT.name


def code(error: pytest.ExceptionInfo[RaymergeError]) -> str:
    return error.value.problems[0].code


def fill(sink: Sink, spans: Sequence[tuple[int, int]] = ((PREFIX, len(DATA)),), name: str = NAME) -> None:
    writer = sink.writer()
    for start, end in spans:
        writer.write(name, start, memoryview(DATA)[start:end])
    writer.flush()


def finish(sink: Sink, name: str = NAME) -> None:
    sink.sealed(name, json.loads(json.dumps(sink.seal(name))))
    sink.publish(name)
    sink.conclude("done")


def whole(store: S3Store, name: str = NAME) -> bytes:
    return read_whole(store, name, limit=1 << 30)


def check_nothing_is_left(store: S3Store, s3: S3Server, *, but: Sequence[str] = (NAME,)) -> None:
    assert s3.uploads(BUCKET, store.prefix) == ()
    assert store.list_files() == tuple(sorted(but))


# ---- the plain way ---------------------------------------------------------------------------------------------------


def test_a_file_appears_whole_when_it_is_published(sink: MultipartSink, store: S3Store, s3: S3Server) -> None:
    sink.begin([LAYOUT])
    assert sink.seals
    assert sink.published() == frozenset()
    assert not sink.holds(NAME, PREFIX, PREFIX + 1, "")
    fill(sink)
    assert store.list_files() == (RECORD_FILE,)
    finish(sink)
    assert sink.published() == {NAME}
    assert whole(store) == DATA
    check_nothing_is_left(store, s3)
    found = s3.client().get_object_attributes(
        Bucket=BUCKET, Key=store.key(NAME), ObjectAttributes=["ObjectParts", "ObjectSize"]
    )
    assert found["ObjectParts"]["TotalPartsCount"] == len(PARTS)


def test_parts_that_one_writer_filled_leave_no_pieces(sink: MultipartSink, store: S3Store, proxy: FaultProxy) -> None:
    sink.begin([LAYOUT])
    fill(sink, [(start, min(start + 700_000, len(DATA))) for start in range(PREFIX, len(DATA), 700_000)])
    assert sink.seal(NAME) == {"joined": 0}
    sent = [exchange for exchange in proxy.log() if exchange.method == "PUT" and "partNumber" in exchange.query]
    assert sorted(exchange.received_bytes for exchange in sent) == [300_000, PART_MIN_BYTES, PART_MIN_BYTES]


def test_workers_that_each_hold_some_of_a_part(sink: MultipartSink, store: S3Store, s3: S3Server) -> None:
    sink.begin([LAYOUT])
    sent = pickle.loads(pickle.dumps(sink))
    bounds = [PREFIX, 3_000_000, 5_000_000, 6_000_000, 10_600_000, len(DATA)]
    spans = list(itertools.pairwise(bounds))
    for span in (spans[3], spans[0], spans[4], spans[2], spans[1]):
        fill(sent, [span])
    pieces = {name for name in store.list_files() if "pieces" in name}
    assert piece_name(NAME, PREFIX, 3_000_000) in pieces
    assert sent.seal(NAME) == {"joined": 3}
    assert sent.seal(NAME) == {"joined": 0}
    finish(sink)
    assert whole(store) == DATA
    check_nothing_is_left(store, s3)


def test_pieces_may_overlap_and_repeat(sink: MultipartSink, store: S3Store, s3: S3Server) -> None:
    sink.begin([LAYOUT])
    for span in ((PREFIX, 2_000_000), (1_000_000, 5_500_000), (1_000_000, 5_500_000), (5_000_000, len(DATA))):
        fill(sink, [span])
    finish(sink)
    assert whole(store) == DATA


def test_several_files_and_one_of_no_bytes(sink: MultipartSink, store: S3Store, s3: S3Server) -> None:
    names = ["a/x.safetensors", "b.safetensors", "empty.bin", "known.bin"]
    layouts = [
        FileLayout(names[0], SMALL, DATA[:10], (0,)),
        FileLayout(names[1], SMALL, b"", (0,)),
        FileLayout(names[2], 0, b"", (0,)),
        FileLayout(names[3], SMALL, DATA[:SMALL], (0,)),
    ]
    sink.begin(layouts)
    writer = sink.writer()
    writer.write(names[0], 10, memoryview(DATA)[10:SMALL])
    writer.write(names[1], 0, memoryview(DATA)[:SMALL])
    writer.write(names[2], 0, memoryview(b""))
    writer.flush()
    for name in names:
        sink.seal(name)
        sink.publish(name)
    sink.conclude("done")
    assert [whole(store, name) for name in names] == [DATA[:SMALL], DATA[:SMALL], b"", DATA[:SMALL]]
    check_nothing_is_left(store, s3, but=names)
    sink.publish(names[0])


def test_a_buffer_of_wider_elements_and_one_that_is_used_again(sink: MultipartSink, store: S3Store) -> None:
    sink.begin([LAYOUT])
    writer = sink.writer()
    buffer = bytearray(1 << 20)
    view = memoryview(buffer).cast("i")
    for start in range(PREFIX, len(DATA), len(buffer)):
        count = min(len(buffer), len(DATA) - start) // 4 * 4
        buffer[:count] = DATA[start : start + count]
        writer.write(NAME, start, view[: count // 4])
        buffer[:] = bytes(len(buffer))
    rest = (len(DATA) - PREFIX) % 4
    writer.write(NAME, len(DATA) - rest, memoryview(DATA)[len(DATA) - rest :])
    writer.flush()
    finish(sink)
    assert whole(store) == DATA


def test_nothing_is_written_outside_a_file(sink: MultipartSink) -> None:
    sink.begin([LAYOUT])
    for offset in (len(DATA), -1):
        with pytest.raises(MergeFailedError) as caught:
            sink.writer().write(NAME, offset, memoryview(b"x"))
        assert code(caught) == "write-failed"


# ---- any order, any cutting ------------------------------------------------------------------------------------------


@st.composite
def writings(draw: st.DrawFn) -> list[list[tuple[int, int]]]:
    """Who writes what, in what order, flushing when: all bytes after the prefix, some of them twice."""
    cuts = draw(st.lists(st.integers(PREFIX + 1, len(DATA) - 1), max_size=8, unique=True))
    near = draw(st.lists(st.sampled_from([*PARTS[1:], PARTS[1] + 1, PARTS[2] - 1]), max_size=3))
    bounds = sorted({PREFIX, *cuts, *near, len(DATA)})
    spans = draw(st.permutations([(s, e) for s, e in itertools.pairwise(bounds)]))
    again = draw(st.lists(st.sampled_from(spans), max_size=2))
    writers: list[list[tuple[int, int]]] = [[] for _ in range(draw(st.integers(1, 4)))]
    for span in [*spans, *again]:
        writers[draw(st.integers(0, len(writers) - 1))].append(span)
    return writers


@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(writings())
def test_any_order_and_any_cutting_gives_the_same_object(
    s3: S3Server, proxy: FaultProxy, writers: list[list[tuple[int, int]]]
) -> None:
    store = S3Store(BUCKET, f"multipart/any-{next(_fresh)}")
    sink = MultipartSink(store, store)
    sink.begin([LAYOUT])
    for spans in writers:
        fill(sink, spans)
    assert replace_begun(sink).holds(NAME, 0, len(DATA), "")
    finish(sink)
    assert whole(store) == DATA
    check_nothing_is_left(store, s3)
    s3.empty(BUCKET, store.prefix)


def replace_begun(sink: MultipartSink) -> MultipartSink:
    """What a new driver finds of the same run."""
    other = MultipartSink(sink.store, sink.state)
    other.begin(list(sink._files.values()))
    return other


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), max_size=8), st.integers(0, 50), st.integers(0, 50))
def test_joined_spans_are_the_same_bytes(spans: list[tuple[int, int]], start: int, end: int) -> None:
    found = joined(spans)
    assert {b for s, e in found for b in range(s, e)} == {b for s, e in spans for b in range(s, e)}
    assert all(before[1] < after[0] for before, after in itertools.pairwise(found))
    assert covers(found, start, end) == all(any(s <= b < e for s, e in found) for b in range(start, end))


# ---- what a writer holds ---------------------------------------------------------------------------------------------


def test_a_writer_holds_no_more_than_it_says(sink: MultipartSink, store: S3Store, s3: S3Server) -> None:
    """Units that write into many files at once would hold a part of each."""
    layouts = [replace(LAYOUT, name=f"{n}.safetensors") for n in range(5)]
    assert writer_bytes(layouts) == 3 * PART_MIN_BYTES
    assert writer_bytes([]) == 0
    sink.begin(layouts)
    writer = sink.writer()
    for start in range(PREFIX, len(DATA), 2_000_000):
        for layout in layouts:
            writer.write(layout.name, start, memoryview(DATA)[start : start + 2_000_000])
            assert writer._held_bytes() <= writer_bytes(layouts)
    writer.flush()
    assert writer._held_bytes() == 0
    for layout in layouts:
        sink.seal(layout.name)
        sink.publish(layout.name)
    assert all(whole(store, layout.name) == DATA for layout in layouts)


def test_a_part_is_uploaded_while_the_caller_goes_on(sink: MultipartSink, proxy: FaultProxy) -> None:
    sink.begin([LAYOUT])
    proxy.add(Fault("stall", method="PUT", query="partNumber", times=None))
    writer = sink.writer()
    writer.write(NAME, PREFIX, memoryview(DATA)[PREFIX:PART_MIN_BYTES])
    proxy.wait_for(1, fault="stall")
    writer.write(NAME, PART_MIN_BYTES, memoryview(DATA)[PART_MIN_BYTES : PART_MIN_BYTES + 1000])
    proxy.clear()
    writer.flush()


def test_a_failed_upload_is_raised_and_its_writer_may_be_used_again(
    sink: MultipartSink, store: S3Store, proxy: FaultProxy
) -> None:
    sink.begin([LAYOUT])
    proxy.add(Fault("status", method="PUT", query="partNumber=1", code=500, times=3))
    writer = sink.writer()
    writer.write(NAME, PREFIX, memoryview(DATA)[PREFIX : PART_MIN_BYTES + 9])
    with pytest.raises(InfrastructureError):
        writer.flush()
    writer.write(NAME, PREFIX, memoryview(DATA)[PREFIX:])
    writer.flush()
    finish(sink)
    assert whole(store) == DATA


# ---- resumed runs ----------------------------------------------------------------------------------------------------


def test_a_new_driver_goes_on_where_the_last_one_ended(sink: MultipartSink, store: S3Store, s3: S3Server) -> None:
    sink.begin([LAYOUT])
    fill(sink, [(PREFIX, PART_MIN_BYTES + 1000)])
    (upload,) = s3.uploads(BUCKET, store.prefix)
    other = replace_begun(sink)
    assert s3.uploads(BUCKET, store.prefix) == (upload,)
    assert other.holds(NAME, 0, PART_MIN_BYTES + 1000, "")
    assert other.holds(NAME, PART_MIN_BYTES - 1, PART_MIN_BYTES + 1, "")
    assert not other.holds(NAME, PART_MIN_BYTES, PART_MIN_BYTES + 1001, "")
    fill(other, [(PART_MIN_BYTES + 1000, len(DATA))])
    finish(other)
    assert whole(store) == DATA
    check_nothing_is_left(store, s3)


def test_a_driver_that_ended_after_publishing_finds_its_own_object(
    sink: MultipartSink, store: S3Store, s3: S3Server
) -> None:
    empty = FileLayout("empty.bin", 0, b"", (0,))
    sink.begin([LAYOUT, empty])
    fill(sink)
    for name in (NAME, "empty.bin"):
        sink.seal(name)
        sink.publish(name)
    other = replace_begun(sink)
    assert other.published() == {NAME, "empty.bin"}
    assert other.holds(NAME, 0, len(DATA), "")
    assert other.seal(NAME) == {"joined": 0}
    other.publish(NAME)
    other.conclude("done")
    assert whole(store) == DATA
    check_nothing_is_left(store, s3, but=[NAME, "empty.bin"])


def test_another_plan_starts_anew(sink: MultipartSink, store: S3Store, s3: S3Server) -> None:
    sink.begin([LAYOUT])
    fill(sink, [(PREFIX, PART_MIN_BYTES + 1000)])
    other = MultipartSink(store, store)
    other.begin([replace(LAYOUT, prefix=DATA[: PREFIX + 1])])
    assert len(s3.uploads(BUCKET, store.prefix)) == 1
    assert store.list_files() == (RECORD_FILE,)
    assert not other.holds(NAME, PREFIX, PREFIX + 2, "")
    with pytest.raises(MergeFailedError) as caught:
        sink.seal(NAME)
    assert code(caught) == "upload-lost"
    with pytest.raises(MergeFailedError) as caught:
        fill(sink)
    assert code(caught) == "upload-lost"


def test_files_that_the_new_plan_has_not_are_forgotten(sink: MultipartSink, store: S3Store, s3: S3Server) -> None:
    sink.begin([LAYOUT, replace(LAYOUT, name="b.safetensors")])
    fill(sink, [(PREFIX, 6_000_000)], "b.safetensors")
    other = MultipartSink(store, store)
    other.begin([LAYOUT])
    assert [upload.key for upload in s3.uploads(BUCKET, store.prefix)] == [store.key(NAME)]
    assert store.list_files() == (RECORD_FILE,)


def test_strays_under_our_keys_are_aborted_and_others_are_not(
    sink: MultipartSink, store: S3Store, s3: S3Server
) -> None:
    client = s3.client()
    for key in (store.key(NAME), store.key(NAME), store.key(f"{NAME}.more"), store.key("other")):
        client.create_multipart_upload(Bucket=BUCKET, Key=key)
    sink.begin([LAYOUT])
    keys = [upload.key for upload in s3.uploads(BUCKET, store.prefix)]
    assert keys == [store.key(NAME), store.key(f"{NAME}.more"), store.key("other")]


def test_an_upload_that_a_lifecycle_rule_ended_is_begun_again(
    sink: MultipartSink, store: S3Store, s3: S3Server
) -> None:
    sink.begin([LAYOUT])
    fill(sink, [(PREFIX, 6_000_000)])
    (upload,) = s3.uploads(BUCKET, store.prefix)
    s3.client().abort_multipart_upload(Bucket=BUCKET, Key=upload.key, UploadId=upload.upload_id)
    other = replace_begun(sink)
    assert not other.holds(NAME, 5_500_000, 6_000_000, "")
    fill(other)
    finish(other)
    assert whole(store) == DATA


def test_a_published_file_may_be_grown_again(sink: MultipartSink, store: S3Store, s3: S3Server) -> None:
    sink.begin([LAYOUT])
    fill(sink)
    sink.seal(NAME)
    sink.publish(NAME)
    sink.reopen(NAME)
    assert sink.published() == frozenset()
    assert not sink.holds(NAME, PREFIX, PREFIX + 1, "")
    other = replace_begun(sink)
    assert other.published() == frozenset()
    fill(other)
    finish(other)
    assert whole(store) == DATA
    check_nothing_is_left(store, s3)


# ---- what is missing -------------------------------------------------------------------------------------------------


def test_a_file_that_is_not_whole_is_neither_sealed_nor_published(
    sink: MultipartSink, store: S3Store, s3: S3Server
) -> None:
    sink.begin([LAYOUT])
    fill(sink, [(PREFIX, 8_000_000), (8_000_001, len(DATA))])
    for use in (sink.seal, sink.publish):
        with pytest.raises(MergeFailedError) as caught:
            use(NAME)
        assert code(caught) == "incomplete"
    assert "8000000" in str(caught.value) or str(PART_MIN_BYTES) in str(caught.value)
    sink.abandon([NAME])
    check_nothing_is_left(store, s3, but=())


def test_a_part_of_another_size_does_not_count(sink: MultipartSink, store: S3Store, s3: S3Server) -> None:
    sink.begin([LAYOUT])
    (upload,) = s3.uploads(BUCKET, store.prefix)
    s3.client().upload_part(
        Bucket=BUCKET, Key=upload.key, UploadId=upload.upload_id, PartNumber=3, Body=DATA[PARTS[2] : -1]
    )
    fill(sink, [(PREFIX, PARTS[2])])
    other = replace_begun(sink)
    assert not other.holds(NAME, PARTS[2], PARTS[2] + 1, "")
    for use in (other.seal, other.publish):
        with pytest.raises(MergeFailedError) as caught:
            use(NAME)
        assert code(caught) == "incomplete"
    fill(other, [(PARTS[2], len(DATA))])
    finish(other)
    assert whole(store) == DATA


def test_abandoning_leaves_nothing_and_may_be_repeated(sink: MultipartSink, store: S3Store, s3: S3Server) -> None:
    other = replace(LAYOUT, name="b.safetensors")
    sink.begin([LAYOUT, other])
    fill(sink, [(PREFIX, 6_000_000)])
    fill(sink, [(PREFIX, 6_000_000)], "b.safetensors")
    MultipartSink(store, store).abandon([NAME, "never.json"])
    assert [upload.key for upload in s3.uploads(BUCKET, store.prefix)] == [store.key("b.safetensors")]
    assert replace_begun(sink).holds("b.safetensors", PREFIX, 6_000_000, "")
    for _ in range(2):
        MultipartSink(store, store).abandon([NAME, "b.safetensors"])
        check_nothing_is_left(store, s3, but=())


# ---- lost answers ----------------------------------------------------------------------------------------------------

LOSSES = {
    "a part's answer is lost": Fault("lost", method="PUT", query="partNumber"),
    "a part's connection breaks": Fault("reset", method="PUT", query="partNumber"),
    "a part fails inside": Fault("error200", method="PUT", query="partNumber"),
    "a part arrives as something else": Fault("etag", method="PUT", query="partNumber"),
    "a piece's answer is lost": Fault("lost", method="PUT", path="pieces"),
    "the completion's answer is lost": Fault("lost", method="POST", query="uploadId"),
    "the completion fails inside": Fault("error200", method="POST", query="uploadId"),
    "the completion succeeds and says that it failed": Fault("error200", method="POST", query="uploadId", forward=True),
    "the completion meets another": Fault(
        "status", method="POST", query="uploadId", code=409, error="ConditionalRequestConflict"
    ),
    "the completion is slowed down": Fault("status", method="POST", query="uploadId", code=503, error="SlowDown"),
    "the abort's answer is lost": Fault("lost", method="DELETE", query="uploadId"),
    "the record's answer is lost": Fault("lost", method="PUT", path="uploads.json"),
    "a listing of parts breaks": Fault("reset", method="GET", query="uploadId"),
    "a piece that is read ends early": Fault("cut", method="GET", path="pieces", at=1000),
}


@pytest.mark.parametrize("name", LOSSES)
def test_what_is_lost_on_the_way_changes_nothing(
    sink: MultipartSink, store: S3Store, s3: S3Server, proxy: FaultProxy, name: str
) -> None:
    s3.client().create_multipart_upload(Bucket=BUCKET, Key=store.key(NAME))  # a stray, to be aborted
    proxy.add(LOSSES[name])
    sink.begin([LAYOUT])
    fill(sink, [(6_000_000, len(DATA))])
    fill(sink, [(PREFIX, 6_000_000)])
    finish(sink)
    assert whole(store) == DATA
    check_nothing_is_left(store, s3)
    assert LOSSES[name].kind in {exchange.fault for exchange in proxy.log()}


def test_a_creation_whose_answer_is_lost_leaves_no_second_upload(
    sink: MultipartSink, store: S3Store, s3: S3Server, proxy: FaultProxy
) -> None:
    proxy.add(Fault("lost", method="POST", query="uploads"))
    sink.begin([LAYOUT])
    fill(sink)
    finish(sink)
    assert whole(store) == DATA
    check_nothing_is_left(store, s3)


def test_an_outage_at_the_end_is_worth_a_retry(
    sink: MultipartSink, store: S3Store, s3: S3Server, proxy: FaultProxy
) -> None:
    sink.begin([LAYOUT])
    fill(sink)
    sink.seal(NAME)
    proxy.add(Fault("status", method="POST", query="uploadId", code=500, times=None))
    with pytest.raises(InfrastructureError):
        sink.publish(NAME)
    proxy.clear()
    other = replace_begun(sink)
    finish(other)
    assert whole(store) == DATA
    check_nothing_is_left(store, s3)


# ---- two for one place -----------------------------------------------------------------------------------------------


def outcomes(uses: Sequence[Callable[[], object]]) -> list[str]:
    """What became of those who begin at once: `done`, or the error's code."""
    start = threading.Barrier(len(uses))
    found = [""] * len(uses)

    def run(number: int) -> None:
        start.wait()
        try:
            uses[number]()
        except RaymergeError as error:
            found[number] = error.problems[0].code
        else:
            found[number] = "done"

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(uses))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_of_two_completions_at_once_the_one_that_stands_is_told_so(store: S3Store, s3: S3Server) -> None:
    data = {number: bytes([number]) * SMALL for number in range(2)}
    layout = FileLayout(NAME, SMALL, b"", (0,))
    sinks = [MultipartSink(store, S3Store(BUCKET, f"{store.prefix}/state-{number}")) for number in range(2)]
    for sink in sinks:
        sink.begin([layout])
    sinks[0]._start(layout)  # the second took the first's upload for a stray
    for number, sink in enumerate(sinks):
        writer = sink.writer()
        writer.write(NAME, 0, memoryview(data[number]))
        writer.flush()
    assert len(s3.uploads(BUCKET, store.prefix)) == 2
    found = outcomes([lambda sink=sink: sink.publish(NAME) for sink in sinks])  # type: ignore[misc]
    winner = next(number for number, content in data.items() if content == whole(store))
    assert found[winner] == "done"
    # The server of this test tests the condition and completes in two steps; AWS does not.
    assert found[1 - winner] in {"output-exists", "done"}
    for sink in sinks[1 - winner :] + sinks[: 1 - winner]:
        sink.abandon([NAME])
    assert whole(store) == data[winner]
    check_nothing_is_left(store, s3)


def test_of_two_completions_for_one_name_one_wins(store: S3Store, s3: S3Server) -> None:
    layout = FileLayout(NAME, SMALL, b"", (0,))
    sinks = [MultipartSink(store, S3Store(BUCKET, f"{store.prefix}/state-{number}")) for number in range(2)]
    for sink in sinks:
        sink.begin([layout])
    sinks[0]._start(layout)
    for number, sink in enumerate(sinks):
        writer = sink.writer()
        writer.write(NAME, 0, memoryview(bytes([number]) * SMALL))
        writer.flush()
    sinks[1].publish(NAME)
    with pytest.raises(OutputExistsError):
        sinks[0].publish(NAME)
    sinks[1].conclude("done")
    sinks[0].abandon([NAME])
    assert whole(store) == bytes([1]) * SMALL
    check_nothing_is_left(store, s3)


def test_two_sinks_of_one_run_publish_one_object(sink: MultipartSink, store: S3Store, s3: S3Server) -> None:
    """A driver that was thought dead, and its successor: the bytes are the same, and neither fails."""
    sink.begin([LAYOUT])
    other = replace_begun(sink)
    fill(sink)
    fill(other)
    assert outcomes([lambda: sink.publish(NAME), lambda: other.publish(NAME)]) == ["done", "done"]
    other.conclude("done")
    assert whole(store) == DATA
    check_nothing_is_left(store, s3)


def test_who_lost_its_upload_to_a_winner_is_told_that_the_output_exists(store: S3Store, s3: S3Server) -> None:
    first = MultipartSink(store, S3Store(BUCKET, f"{store.prefix}/state-1"))
    second = MultipartSink(store, S3Store(BUCKET, f"{store.prefix}/state-2"))
    first.begin([LAYOUT])
    fill(first)
    second.begin([LAYOUT])
    fill(second)
    finish(second)
    with pytest.raises(OutputExistsError):
        first.publish(NAME)
    with pytest.raises(OutputExistsError):
        first.seal(NAME)
    first.abandon([NAME])
    assert whole(store) == DATA
    check_nothing_is_left(store, s3)


def test_another_object_is_replaced_only_where_that_is_asked_for(
    sink: MultipartSink, store: S3Store, s3: S3Server
) -> None:
    s3.client().put_object(Bucket=BUCKET, Key=store.key(NAME), Body=b"another's")
    sink.begin([LAYOUT])
    assert sink.published() == frozenset()
    fill(sink)
    sink.seal(NAME)
    with pytest.raises(OutputExistsError) as caught:
        sink.publish(NAME)
    assert code(caught) == "output-exists"
    assert whole(store) == b"another's"
    sink.publish(NAME, exclusive=False)
    sink.conclude("done")
    assert whole(store) == DATA
    check_nothing_is_left(store, s3)


def test_an_empty_file_is_not_put_over_another(sink: MultipartSink, store: S3Store, s3: S3Server) -> None:
    s3.client().put_object(Bucket=BUCKET, Key=store.key("empty.bin"), Body=b"another's")
    sink.begin([FileLayout("empty.bin", 0, b"", (0,))])
    with pytest.raises(OutputExistsError):
        sink.publish("empty.bin")
    assert whole(store, "empty.bin") == b"another's"


# ---- small files -----------------------------------------------------------------------------------------------------


def test_a_staged_file_appears_when_it_is_published(sink: MultipartSink, store: S3Store) -> None:
    sink.begin([])
    sink.stage("config.json", b"{}")
    assert "config.json" not in store.list_files()
    sink.publish("config.json")
    sink.publish("config.json")
    assert whole(store, "config.json") == b"{}"
    sink.stage("config.json", b'{"a": 1}')
    with pytest.raises(OutputExistsError):
        sink.publish("config.json")
    assert whole(store, "config.json") == b"{}"
    sink.publish("config.json", exclusive=False)
    assert whole(store, "config.json") == b'{"a": 1}'
    sink.remove("config.json")
    sink.conclude("done")
    assert store.list_files() == ()


# ---- workers ---------------------------------------------------------------------------------------------------------


def test_a_sink_that_is_sent_to_a_worker_holds_no_secret(sink: MultipartSink, s3: S3Server) -> None:
    sink.begin([LAYOUT])
    sink.stage("card.md", b"stays with the driver")
    data = pickle.dumps(sink)
    for secret in (s3.key.access, s3.key.secret, "stays with the driver"):
        assert secret.encode() not in data
    sent = pickle.loads(data)
    assert sent._uploads == sink._uploads
    fill(sent)
    assert replace_begun(sink).holds(NAME, 0, len(DATA), "")


def test_settings_reach_the_objects_of_the_output_alone(store: S3Store, s3: S3Server, proxy: FaultProxy) -> None:
    sink = MultipartSink(store, store, S3Settings(storage_class="STANDARD_IA", tags=(("team", "a"),)))
    sink.begin([LAYOUT])
    fill(pickle.loads(pickle.dumps(sink)), [(6_000_000, len(DATA)), (PREFIX, 6_000_000)])
    finish(sink)
    sink.stage("config.json", b"{}")
    sink.publish("config.json")
    for name in (NAME, "config.json"):
        found = s3.client().get_object_tagging(Bucket=BUCKET, Key=store.key(name))
        assert found["TagSet"] == [{"Key": "team", "Value": "a"}]
    asked = [exchange for exchange in proxy.log() if ".raymerge" in exchange.path]
    assert asked
    assert all("x-amz-storage-class" not in e.headers and "x-amz-tagging" not in e.headers for e in asked)
    created = [exchange for exchange in proxy.log() if exchange.query == "uploads"]
    assert [exchange.headers["x-amz-storage-class"] for exchange in created] == ["STANDARD_IA"]


# ---- the probe -------------------------------------------------------------------------------------------------------


@pytest.fixture
def unproven(s3: S3Server, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> MultipartSink:
    """A sink of a process that has probed nothing yet."""
    monkeypatch.setenv("AWS_RAYMERGE_TEST", str(next(_fresh)))
    store = S3Store(BUCKET, f"multipart/{next(_fresh)}")
    return MultipartSink(store, store)


def test_the_probe_leaves_no_trace_and_is_made_once(unproven: MultipartSink, s3: S3Server, proxy: FaultProxy) -> None:
    unproven.probe()
    check_nothing_is_left(unproven.store, s3, but=())
    proxy.forget()
    unproven.probe()
    MultipartSink(S3Store(BUCKET, "elsewhere"), S3Store(BUCKET, "elsewhere")).probe()
    assert proxy.log() == []


ANSWER = "<CompleteMultipartUploadResult><ETag>x</ETag></CompleteMultipartUploadResult>"
IGNORED = {
    "PutObject with If-None-Match": (200, 1, 4),
    "PutObject with If-Match": (200, 2, 5),
    "PutObject with an If-Match that holds": (412, 3, 7),
    "not implemented": (501, 1, 4),
}
"""What the server answers to the PUT of a probe behind so many others: in the first try, and (the one before does not
count) in the second."""


@pytest.mark.parametrize("name", [*IGNORED, "CompleteMultipartUpload with If-None-Match"])
def test_a_server_that_ignores_a_condition_is_refused(
    unproven: MultipartSink, s3: S3Server, proxy: FaultProxy, name: str
) -> None:
    if name in IGNORED:
        status, *places = IGNORED[name]
        error = "NotImplemented" if status == 501 else ""
        proxy.add(*(Fault("status", method="PUT", path="probe", code=status, error=error, after=n) for n in places))
    else:
        proxy.add(Fault("status", method="POST", query="uploadId", code=200, body=ANSWER, times=2))
    with pytest.raises(PlanError) as caught:
        unproven.probe()
    assert code(caught) == "no-conditional-writes"
    word = "PutObject with If-None-Match" if name == "not implemented" else name
    assert f"the conditions of {word}\n" in str(caught.value)
    check_nothing_is_left(unproven.store, s3, but=())


def test_a_probe_that_another_run_sweeps_is_made_again(
    unproven: MultipartSink, s3: S3Server, proxy: FaultProxy
) -> None:
    """A run that ends takes all state of its output away, this one's probe with it."""
    proxy.add(Fault("stall", method="PUT", path="probe", after=1, seconds=60))
    with ThreadPoolExecutor(1) as thread:
        probing = thread.submit(unproven.probe)
        proxy.wait_for(1, fault="stall")
        s3.empty(BUCKET, unproven.store.prefix)
        proxy.clear()
        probing.result()
    check_nothing_is_left(unproven.store, s3, but=())


def test_a_place_that_cannot_be_written_is_refused(
    unproven: MultipartSink, s3: S3Server, gate: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, rights in enumerate((READ, (*READ, "s3:PutObject"))):
        key = s3.add_key(f"prober-{number}", rights)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", key.access)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", key.secret)
        with pytest.raises(PlanError) as caught:
            unproven.probe()
        assert code(caught) == "forbidden"
        assert key.secret not in str(caught.value)
    key = s3.add_key("writer", (*READ, *WRITE))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", key.access)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", key.secret)
    unproven.probe()


def test_a_missing_bucket_is_refused(unproven: MultipartSink) -> None:
    store = S3Store("no-bucket-of-ours", "p")
    with pytest.raises(PlanError) as caught:
        MultipartSink(store, store).probe()
    assert code(caught) == "no-such-bucket"
