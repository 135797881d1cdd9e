"""The range reader against a server that does every wrong thing that has been seen: right bytes, or the right error."""

from __future__ import annotations

import random
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest

from merger.errors import InfrastructureError, RaymergeError, SourceChangedError, SourceError
from merger.storage.base import RangeRead
from merger.storage.http import (
    COUNTS,
    PIECE_BYTES,
    STEP_BYTES,
    Address,
    Answer,
    Patience,
    asked_seconds,
    is_passing,
    read_files,
    read_ranges,
    send,
)
from tests.counterparts.faults import Fault, FaultProxy

DATA = random.Random(1).randbytes(2 << 20)
LARGE = random.Random(2).randbytes(3 * PIECE_BYTES)
SECRET = "Sig-5eCrEt"
QUICK = Patience(
    attempts=4, connect_seconds=10, stall_seconds=10, deadline_seconds=30, first_wait_seconds=0.001,
    longest_wait_seconds=0.01,
)  # fmt: skip
NERVOUS = replace(QUICK, attempts=2, stall_seconds=0.5)
"""For faults that only a time limit ends."""
START, STOP = 100_000, 1_100_000
"""The range that most tests ask for."""


@dataclass
class Served:
    """A file at the proxy."""

    endpoint: str
    name: str = "data"
    size: int = len(DATA)
    etag: str | None = None
    renewals: list[str] = field(default_factory=list)

    @property
    def label(self) -> str:
        return f"a test's {self.name}"

    def address(self) -> Address:
        return Address(f"{self.endpoint}/{self.name}?Signature={SECRET}-{len(self.renewals)}")

    def renewed(self, refused: Address) -> Address:
        self.renewals.append(refused.url)
        return self.address()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultProxy]:
    folder = tmp_path_factory.mktemp("served")
    (folder / "data").write_bytes(DATA)
    (folder / "large").write_bytes(LARGE)
    with FaultProxy.start(folder=folder) as proxy:
        yield proxy


@pytest.fixture
def proxy(server: FaultProxy) -> FaultProxy:
    server.clear()
    server.forget()
    return server


@pytest.fixture
def served(proxy: FaultProxy) -> Served:
    return Served(proxy.endpoint)


def get(served: Served, start: int = START, stop: int = STOP, patience: Patience = QUICK) -> bytes:
    buffer = bytearray(stop - start)
    read_ranges(served, [RangeRead(start, memoryview(buffer))], patience=patience)
    return bytes(buffer)


def code(error: RaymergeError) -> str:
    return error.problems[0].code


def refused(served: Served, kind: type[RaymergeError], patience: Patience = QUICK) -> RaymergeError:
    """The error that the usual range ends with, which tells no secret."""
    with pytest.raises(kind) as caught:
        get(served, patience=patience)
    assert type(caught.value) is kind
    said = "".join(traceback.format_exception(caught.value)) + repr(caught.value)
    assert SECRET not in said
    assert "http://" not in said
    return caught.value


# ---- what may pass ---------------------------------------------------------------------------------------------------

PASSING = {
    "the body is cut": Fault("cut", at=1000),
    "reset before the answer": Fault("reset"),
    "reset in the body": Fault("reset", at=1000),
    "408": Fault("status", code=408),
    "429": Fault("status", code=429),
    "500": Fault("status", code=500),
    "502": Fault("status", code=502),
    "503": Fault("status", code=503, error="SlowDown"),
    "400 that is a slow down": Fault("status", code=400, error="SlowDown"),
    "400 that is a timeout": Fault("status", code=400, error="RequestTimeout"),
    "the whole object": Fault("whole"),
    "another range": Fault("shifted"),
    "a range that starts elsewhere": Fault("shifted", claim="start"),
    "a shorter range": Fault("short"),
    "no length, and cut": Fault("unsized", at=1000),
    "gzip": Fault("gzip"),
    "a stall before the answer": Fault("stall"),
    "a stall in the body": Fault("stall", at=1000),
}
RESUMED = {"the body is cut", "reset in the body", "no length, and cut", "a stall in the body"}


def patience_for(name: str) -> Patience:
    return NERVOUS if PASSING[name].kind == "stall" else QUICK


@pytest.mark.parametrize("name", PASSING)
def test_a_fault_that_passes_costs_one_more_request(served: Served, proxy: FaultProxy, name: str) -> None:
    proxy.add(PASSING[name])
    assert get(served, patience=patience_for(name)) == DATA[START:STOP]
    log = proxy.log()
    assert [exchange.fault for exchange in log] == [PASSING[name].kind, None]
    assert log[1].range == f"bytes={START + (1000 if name in RESUMED else 0)}-{STOP - 1}"


@pytest.mark.parametrize("name", PASSING)
def test_a_fault_that_stays_is_an_error_after_the_attempts(served: Served, proxy: FaultProxy, name: str) -> None:
    proxy.add(replace(PASSING[name], times=None))
    error = refused(served, InfrastructureError, patience_for(name))
    assert code(error) == "source-unreachable"
    assert served.label in str(error)
    assert len(proxy.log()) == patience_for(name).attempts
    assert not served.renewals


def test_attempts_that_bring_bytes_are_not_charged(served: Served, proxy: FaultProxy) -> None:
    proxy.add(Fault("cut", at=STEP_BYTES, times=7))
    assert get(served, 0, len(DATA)) == DATA
    asked = [exchange.range for exchange in proxy.log()]
    assert asked == [f"bytes={start}-{len(DATA) - 1}" for start in range(0, len(DATA), STEP_BYTES)]
    assert len(asked) > QUICK.attempts


def test_a_body_without_a_length_is_taken_if_it_is_whole(served: Served, proxy: FaultProxy) -> None:
    proxy.add(Fault("unsized"))
    assert get(served) == DATA[START:STOP]
    assert len(proxy.log()) == 1


def test_a_slow_body_is_given_up_at_the_deadline(served: Served, proxy: FaultProxy) -> None:
    proxy.add(Fault("slow", bytes_per_second=100_000, times=None))
    started = time.monotonic()
    refused(served, InfrastructureError, Patience(attempts=3, deadline_seconds=0.5, first_wait_seconds=0.01))
    assert 0.4 < time.monotonic() - started < 8
    assert len(proxy.log()) == 1


def test_a_redirect_is_followed_and_a_circle_is_not(served: Served, proxy: FaultProxy) -> None:
    proxy.add(Fault("redirect", location="/data"))
    assert get(served) == DATA[START:STOP]
    assert [exchange.fault for exchange in proxy.log()] == ["redirect", None]
    proxy.add(Fault("redirect", location="/data", times=None))
    refused(served, InfrastructureError)


def test_a_port_where_nobody_listens(served: Served) -> None:
    served.endpoint = "http://127.0.0.1:1"
    assert code(refused(served, InfrastructureError)) == "source-unreachable"


# ---- what the server asks for ----------------------------------------------------------------------------------------


def in_a_second() -> str:
    return format_datetime(datetime.now(UTC) + timedelta(seconds=2), usegmt=True)


@pytest.mark.parametrize(
    "headers",
    [
        lambda: {"Retry-After": "1"},
        lambda: {"Retry-After": in_a_second()},
        lambda: {"RateLimit": '"resolvers";r=0;t=1', "RateLimit-Policy": '"fixed window";"resolvers";q=3000;w=300'},
    ],
    ids=["seconds", "date", "RateLimit"],
)
def test_a_wait_that_the_server_asks_for_is_waited(
    served: Served, proxy: FaultProxy, headers: Callable[[], dict[str, str]]
) -> None:
    proxy.add(Fault("status", code=429, headers=headers()))
    asked, throttled, started = COUNTS.asked_wait_seconds, COUNTS.throttled, time.monotonic()
    patience = Patience(attempts=3, deadline_seconds=0.8, first_wait_seconds=0.001)
    assert get(served, patience=patience) == DATA[START:STOP]  # the wait is not counted against our deadline
    assert time.monotonic() - started >= 0.9
    assert COUNTS.asked_wait_seconds - asked > 0.5
    assert COUNTS.throttled - throttled == 1


def test_a_wait_beyond_all_patience_is_an_error(served: Served, proxy: FaultProxy) -> None:
    proxy.add(Fault("status", code=429, headers={"Retry-After": "301"}, times=None))
    patience = Patience(attempts=3, first_wait_seconds=0.001, longest_wait_seconds=0.001)
    waits: list[float] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "sleep", waits.append)
        refused(served, InfrastructureError, patience)
    assert waits == [300.0]
    assert len(proxy.log()) == 2


@pytest.mark.parametrize(
    "headers, seconds",
    [
        ({}, 0),
        ({"retry-after": "7"}, 7),
        ({"retry-after": "soon"}, 0),
        ({"retry-after": "-7"}, 0),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0),
        ({"ratelimit": '"resolvers";r=0;t=55'}, 55),
        ({"ratelimit": '"resolvers";r=3;t=55'}, 0),
        ({"ratelimit": '"resolvers";r=0;t=5', "retry-after": "9"}, 9),
    ],
)
def test_what_a_server_may_ask(headers: dict[str, str], seconds: float) -> None:
    assert asked_seconds(headers) == seconds


@pytest.mark.parametrize(
    "status, text, passes",
    [
        (500, "", True), (503, "", True), (429, "", True), (501, "", False), (505, "", False), (400, "", False),
        (400, "<Code>BadDigest</Code>", True), (409, "<Code>ConditionalRequestConflict</Code>", True), (409, "", False),
        (403, "<Code>RequestTimeTooSkewed</Code>", False), (412, "", False), (200, "", False),
    ],
)  # fmt: skip
def test_what_may_be_gone_at_the_next_attempt(status: int, text: str, passes: bool) -> None:
    assert is_passing(status, text) is passes


# ---- refusals, and other versions ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault",
    [Fault("status", code=401), Fault("status", code=403), Fault("status", code=400, error="ExpiredToken")],
    ids=lambda fault: f"{fault.code} {fault.error}",
)
def test_a_refused_signature_is_renewed_once(served: Served, proxy: FaultProxy, fault: Fault) -> None:
    proxy.add(fault)
    assert get(served) == DATA[START:STOP]
    assert len(served.renewals) == 1
    assert [exchange.query[-1] for exchange in proxy.log()] == ["0", "1"]


def test_a_fresh_signature_that_is_refused_too_is_forbidden(served: Served, proxy: FaultProxy) -> None:
    proxy.add(Fault("status", code=403, times=None))
    assert code(refused(served, SourceError)) == "forbidden"
    assert len(served.renewals) == 1
    assert len(proxy.log()) == 2


def test_a_signature_that_ends_in_the_middle_is_renewed_where_the_bytes_ended(
    served: Served, proxy: FaultProxy
) -> None:
    proxy.add(
        Fault("cut", at=1000), Fault("status", code=403), Fault("cut", at=1000), Fault("status", code=403),
        Fault("cut", at=1000),
    )  # fmt: skip
    assert get(served, patience=Patience(attempts=9, first_wait_seconds=0.001)) == DATA[START:STOP]
    starts = [START, START + 1000, START + 1000, START + 2000, START + 2000, START + 3000]
    assert [exchange.range for exchange in proxy.log()] == [f"bytes={start}-{STOP - 1}" for start in starts]
    assert len(served.renewals) == 2


@pytest.mark.parametrize(
    "fault, kind, word",
    [
        (Fault("status", code=404, times=None), SourceError, "no-such-file"),
        (Fault("status", code=400, times=None), SourceError, "bad-answer"),
        (Fault("status", code=501, times=None), SourceError, "bad-answer"),
        (Fault("status", code=412, times=None), SourceChangedError, "source-changed"),
        (Fault("status", code=416, times=None), SourceChangedError, "source-changed"),
        (Fault("total", times=None), SourceChangedError, "source-changed"),
    ],
    ids=lambda value: f"{value.kind} {value.code}" if isinstance(value, Fault) else None,
)
def test_a_final_answer_is_not_asked_again(
    served: Served, proxy: FaultProxy, fault: Fault, kind: type[RaymergeError], word: str
) -> None:
    proxy.add(fault)
    assert code(refused(served, kind)) == word
    assert len(proxy.log()) == 1


def test_another_etag_is_another_version(served: Served, proxy: FaultProxy) -> None:
    assert get(served) == DATA[START:STOP]
    served.etag = "0" * 32
    assert code(refused(served, SourceChangedError)) == "source-changed"
    proxy.add(Fault("etag", times=None))
    assert get(served) == DATA[START:STOP]


def test_a_file_that_grew_or_shrank_is_another_version(served: Served) -> None:
    for size in (len(DATA) - 1, len(DATA) + 1):
        served.size = size
        refused(served, SourceChangedError)


def test_a_whole_file_may_come_whole(served: Served, proxy: FaultProxy) -> None:
    proxy.add(Fault("whole", times=None))
    assert get(served, 0, len(DATA)) == DATA
    assert len(proxy.log()) == 1


def test_a_read_past_the_end_asks_nobody(served: Served, proxy: FaultProxy) -> None:
    with pytest.raises(SourceError) as caught:
        get(served, len(DATA) - 1, len(DATA) + 1)
    assert code(caught.value) == "truncated"
    assert proxy.log() == []


# ---- many at once ----------------------------------------------------------------------------------------------------


def large(proxy: FaultProxy) -> Served:
    return Served(proxy.endpoint, "large", len(LARGE))


def test_reads_that_touch_share_a_request(served: Served, proxy: FaultProxy) -> None:
    buffers = [bytearray(100), bytearray(50), bytearray(0), bytearray(1000)]
    reads = [RangeRead(s, memoryview(b)) for s, b in zip((1050, 1000, 1050, 1150), buffers, strict=True)]
    read_ranges(served, reads, patience=QUICK)
    assert [bytes(b) for b in buffers] == [DATA[1050:1150], DATA[1000:1050], b"", DATA[1150:2150]]
    assert [exchange.range for exchange in proxy.log()] == ["bytes=1000-2149"]


def test_a_shared_request_is_resumed_in_the_middle_of_a_buffer(served: Served, proxy: FaultProxy) -> None:
    proxy.add(Fault("cut", at=70))
    buffers = [bytearray(50), bytearray(0), bytearray(50), bytearray(50)]
    reads = [RangeRead(s, memoryview(b)) for s, b in zip((0, 50, 50, 100), buffers, strict=True)]
    read_ranges(served, reads, patience=QUICK)
    assert b"".join(buffers) == DATA[:150]
    assert [exchange.range for exchange in proxy.log()] == ["bytes=0-149", "bytes=70-149"]


def test_reads_that_overlap_or_lie_apart_have_requests_of_their_own(served: Served, proxy: FaultProxy) -> None:
    starts = [10, 0, 500, 10]
    buffers = [bytearray(20) for _ in starts]
    read_ranges(served, [RangeRead(s, memoryview(b)) for s, b in zip(starts, buffers, strict=True)], patience=QUICK)
    assert [bytes(b) for b in buffers] == [DATA[s : s + 20] for s in starts]
    assert len(proxy.log()) == 4


def test_nothing_is_asked_for_no_bytes(served: Served, proxy: FaultProxy) -> None:
    read_ranges(served, [], patience=QUICK)
    read_ranges(served, [RangeRead(5, memoryview(bytearray()))], patience=QUICK)
    assert proxy.log() == []


def test_a_buffer_of_wider_elements_is_filled(served: Served) -> None:
    buffer = memoryview(bytearray(4000)).cast("i")
    read_ranges(served, [RangeRead(3, buffer)], patience=QUICK)
    assert buffer.tobytes() == DATA[3:4003]


def test_pieces_of_a_long_read_are_under_way_at_once(proxy: FaultProxy) -> None:
    proxy.add(Fault("stall", times=None))
    found: list[bytes] = []
    patience = Patience(attempts=1)
    reader = threading.Thread(target=lambda: found.append(get(large(proxy), 0, len(LARGE), patience)))
    reader.start()
    proxy.wait_for(3, fault="stall")  # none is answered before all three are asked
    proxy.clear()
    reader.join()
    assert found == [LARGE]
    assert sorted(exchange.range or "" for exchange in proxy.log()) == sorted(
        f"bytes={start}-{start + PIECE_BYTES - 1}" for start in range(0, len(LARGE), PIECE_BYTES)
    )


def test_files_are_read_at_once(proxy: FaultProxy, served: Served) -> None:
    proxy.add(Fault("stall", times=None))
    buffers = [bytearray(10), bytearray(20)]
    wanted = [(served, [RangeRead(1, memoryview(buffers[0]))]), (large(proxy), [RangeRead(2, memoryview(buffers[1]))])]
    reader = threading.Thread(target=lambda: read_files(wanted, patience=Patience(attempts=1)))
    reader.start()
    proxy.wait_for(2, fault="stall")
    proxy.clear()
    reader.join()
    assert [bytes(b) for b in buffers] == [DATA[1:11], LARGE[2:22]]


def test_an_error_waits_until_nothing_is_written_any_more(proxy: FaultProxy) -> None:
    """The caller may use its buffers again at once."""
    first = f"bytes=0-{PIECE_BYTES - 1}"
    proxy.add(Fault("stall", after=1, times=None, at=10), Fault("status", code=404))
    caught: list[BaseException] = []

    def read() -> None:
        try:
            get(large(proxy), 0, 2 * PIECE_BYTES, Patience(attempts=1))
        except SourceError as error:
            caught.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    proxy.wait_for(1, fault="status")
    proxy.wait_for(1, fault="stall")
    assert reader.is_alive()
    proxy.clear()
    reader.join()
    assert [code(error) for error in caught if isinstance(error, SourceError)] == ["no-such-file"]
    assert first in {exchange.range for exchange in proxy.log()}


def test_connections_are_used_again(served: Served, proxy: FaultProxy) -> None:
    for start in range(0, 10_000, 1000):
        assert get(served, start, start + 1000) == DATA[start : start + 1000]
    assert len({exchange.connection for exchange in proxy.log()}) == 1


# ---- other requests --------------------------------------------------------------------------------------------------


def asked(proxy: FaultProxy, method: str = "GET", body: bytes | None = None, **more: object) -> Answer:
    def sign() -> Address:
        return Address(f"{proxy.endpoint}/data?Signature={SECRET}", (("X-Signed", "yes"),))

    return send("a test's request", method, sign, body, **{"patience": QUICK, **more})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "fault",
    [
        Fault("status", code=503), Fault("reset"), Fault("lost"), Fault("error200"), Fault("cut", at=10),
        Fault("stall"),
        Fault("status", code=409, error="ConditionalRequestConflict"), Fault("status", code=403),
    ],
    ids=lambda fault: f"{fault.kind} {fault.code or ''}",
)  # fmt: skip
def test_a_request_is_repeated(proxy: FaultProxy, fault: Fault) -> None:
    proxy.add(fault)
    answer = asked(proxy, patience=NERVOUS if fault.kind == "stall" else QUICK)
    assert (answer.status, answer.body) == (200, DATA)
    assert [exchange.fault for exchange in proxy.log()] == [fault.kind, None]
    assert all(exchange.headers["x-signed"] == "yes" for exchange in proxy.log())


@pytest.mark.parametrize("status, requests", [(404, 1), (412, 1), (403, 2), (501, 1), (200, 1)])
def test_an_answer_that_no_retry_would_change_is_returned(proxy: FaultProxy, status: int, requests: int) -> None:
    proxy.add(Fault("status", code=status, body="so it is", headers={"X-Said": "1"}, times=None))
    answer = asked(proxy)
    assert (answer.status, answer.text, answer.headers["x-said"]) == (status, "so it is", "1")
    assert len(proxy.log()) == requests


def test_a_request_is_given_up_without_its_url(proxy: FaultProxy) -> None:
    proxy.add(Fault("status", code=500, times=None))
    with pytest.raises(InfrastructureError) as caught:
        asked(proxy)
    assert SECRET not in "".join(traceback.format_exception(caught.value))
    assert len(proxy.log()) == QUICK.attempts


def test_a_doubted_answer_is_asked_again(proxy: FaultProxy) -> None:
    proxy.add(Fault("status", code=200, body="wrong"))
    answer = asked(proxy, doubt=lambda found: "it is wrong" if found.body == b"wrong" else "")
    assert answer.body == DATA
    assert len(proxy.log()) == 2


@pytest.mark.parametrize("size", [0, 1, STEP_BYTES, len(DATA)])
def test_a_body_is_sent_whole_at_each_attempt(proxy: FaultProxy, size: int) -> None:
    proxy.add(Fault("status", code=500), Fault("status", code=200))
    sent = COUNTS.bytes_sent
    assert asked(proxy, "PUT", DATA[:size]).status == 200
    log = proxy.log()
    assert [exchange.received_bytes for exchange in log] == [size, size]
    assert {exchange.headers["content-length"] for exchange in log} == {str(size)}
    assert COUNTS.bytes_sent - sent == 2 * size


def test_an_upload_may_last_longer_than_a_connection_may_take(proxy: FaultProxy) -> None:
    """The limit is for silence, not for the length of a part."""
    proxy.add(Fault("slow", bytes_per_second=4 << 20), Fault("status", code=200))
    patience = Patience(attempts=1, connect_seconds=1)

    def sign() -> Address:
        return Address(f"{proxy.endpoint}/data")

    started = time.monotonic()
    body = LARGE[: 10 << 20]  # more than what the buffers of two sockets swallow
    assert send("a test's request", "PUT", sign, body, patience=patience).status == 200
    assert time.monotonic() - started > 2


# ---- settings --------------------------------------------------------------------------------------------------------


def test_patience_is_taken_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYMERGE_HTTP_ATTEMPTS", "3")
    monkeypatch.setenv("RAYMERGE_HTTP_STALL_SECONDS", "1.5")
    monkeypatch.setenv("RAYMERGE_HTTP_DEADLINE_SECONDS", "soon")
    assert Patience.from_environment() == Patience(attempts=3, stall_seconds=1.5)


def test_waits_double_and_stay_below_their_limit() -> None:
    patience = Patience(first_wait_seconds=1, longest_wait_seconds=5)
    for attempt, longest in ((1, 1), (2, 2), (3, 4), (4, 5), (50, 5)):
        assert longest / 2 <= patience.wait_seconds(attempt) <= longest


def test_an_address_prints_no_secret(tmp_path: Path) -> None:
    assert SECRET not in repr(Address(f"http://host/{SECRET}", (("Authorization", SECRET),)))
