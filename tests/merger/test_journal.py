"""What an unfinished run remembers: receipts, the lease, and which output may be touched."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from merger import journal as journal_module
from merger.errors import InfrastructureError, OutputExistsError
from merger.journal import (
    LEASE_SECONDS,
    Journal,
    Lease,
    output_state,
    receipt_from_json,
    receipt_to_json,
    sweep_litter,
)
from merger.receipts import Extent, Receipt
from merger.run_files import Diary, RunFiles
from merger.storage import LocalStore, MemoryStore, WritableStore

PLAN = {"digest": "d" * 64, "files": ["model.safetensors", "config.json"]}
OTHER = {"digest": "e" * 64, "files": ["adapter_model.safetensors"]}
RESULT = {
    "plan_digest": PLAN["digest"], "content_digest": "c", "reports": ["README.md"],
    "files": [{"name": "model.safetensors", "size": 4}, {"name": "config.json", "size": 2}],
}  # fmt: skip
_fresh = itertools.count()


@pytest.fixture(params=["local", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[WritableStore]:
    made: WritableStore
    made = LocalStore(str(tmp_path / "out")) if request.param == "local" else MemoryStore(f"journal-{next(_fresh)}")
    yield made
    for name in made.list_files():
        made.remove(name)


def receipt(unit: int, **more: Any) -> Receipt:
    return Receipt(unit, (Extent(0, "model.safetensors", unit * 10, unit * 10 + 10, "ab" * 32),), **more)


# ---- receipts --------------------------------------------------------------------------------------------------------

arrays = st.one_of(
    st.lists(st.integers(-(2**63), 2**63 - 1), max_size=9).map(lambda v: np.array(v, dtype=np.int64)),
    st.lists(st.floats(), max_size=9).map(lambda v: np.array(v, dtype=np.float64)),
    st.just(np.zeros((2, 65536), dtype=np.int64)),
    st.just(np.zeros((0, 3), dtype=np.float64)),
)


@given(
    unit=st.integers(0, 10**9),
    statistics=st.lists(arrays, max_size=3),
    notes=st.dictionaries(st.text(), st.floats(allow_nan=False), max_size=3),
    file=st.text(min_size=1),
    read_bytes=st.integers(0, 2**60),
)
def test_a_receipt_survives_its_line(
    unit: int, statistics: list[Any], notes: dict[str, float], file: str, read_bytes: int
) -> None:
    made = Receipt(unit, (Extent(0, file, 1, 2, "ff"),), tuple(statistics), notes, read_bytes, 0.25)
    line = receipt_to_json(made)
    assert "\n" not in line
    assert line.splitlines() == [line]
    found = receipt_from_json(line)
    assert (found.unit, found.extents, found.notes, found.read_bytes, found.seconds) == (
        made.unit, made.extents, made.notes, made.read_bytes, made.seconds,
    )  # fmt: skip
    assert len(found.statistics) == len(statistics)
    for a, b in zip(found.statistics, statistics, strict=True):
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())


def test_a_resumed_run_knows_what_was_done(store: WritableStore) -> None:
    first = Journal.open(store, PLAN)
    first.append([receipt(0), receipt(3, statistics=(np.arange(5.0),), notes={"energy": 2.5})])
    first.append([])
    first.append([receipt(1)])
    first.close()
    second = Journal.open(store, PLAN)
    found = second.receipts()
    assert sorted(found) == [0, 1, 3]
    assert found[0] == receipt(0)
    assert found[3].statistics[0].tolist() == [0, 1, 2, 3, 4]
    second.append([receipt(7)])
    second.close()
    third = Journal.open(store, PLAN)
    assert sorted(third.receipts()) == [0, 1, 3, 7]
    third.remove()
    assert store.list_files() == ()


TORN = [
    lambda data: data[: len(data) // 2],
    lambda data: data[:-1],
    lambda data: b"",
    lambda data: b"\x00" * len(data),
    lambda data: data.replace(b'"extents"', b'"extent"', 1),
    lambda data: data.replace(b'"unit":0', b'"unit":"0"', 1),
    lambda data: b"[1]\n" + data,
    lambda data: b"null\n\xff\xfe{\n" + data,
]


@pytest.mark.parametrize("tear", TORN)
def test_torn_lines_are_passed_over(store: WritableStore, tear: Any) -> None:
    first = Journal.open(store, PLAN)
    first.append([receipt(0), receipt(1)])
    first.append([receipt(2)])
    first.close()
    name = next(n for n in store.list_files() if "/journal/" in n)
    assert isinstance(store, LocalStore | MemoryStore)
    data = Path(store.root, name).read_bytes() if isinstance(store, LocalStore) else bytes(store.files[name])
    store.put(name, tear(data))
    second = Journal.open(store, PLAN)
    found = second.receipts()
    second.close()
    assert set(found) <= {0, 1, 2}
    assert found[2] == receipt(2)
    assert all(found[unit] == receipt(unit) for unit in found)


def test_a_damaged_statistic_is_no_receipt(store: WritableStore) -> None:
    line = receipt_to_json(receipt(0, statistics=(np.arange(100),)))
    packed = json.loads(line)["statistics"][0][2]
    first = Journal.open(store, PLAN)
    broken = line.replace(packed, packed[:20] + ("A" if packed[20] != "A" else "B") + packed[21:])
    head = json.dumps({"plan": PLAN["digest"]})
    name = ".raymerge/journal/000001-000001.jsonl"
    store.put(name, f"{head}\n{line}\n".encode())
    assert first.receipts().keys() == {0}
    store.put(name, f"{head}\n{broken}\n".encode())
    assert first.receipts() == {}
    store.put(name, f"{json.dumps({'plan': 'another'})}\n{line}\n".encode())
    assert first.receipts() == {}
    first.close()


# ---- the lease -------------------------------------------------------------------------------------------------------


def code(caught: pytest.ExceptionInfo[Any]) -> str:
    return str(caught.value.problems[0].code)


def hold(store: WritableStore, epoch: int, **changes: object) -> str:
    """A lease of someone else, who is like us but for the changes."""
    document = json.loads(Lease(store, epoch).document())
    name = Lease(store, epoch).name
    store.put(name, json.dumps({**document, **changes}).encode())
    return name


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_one_holds_it(store: WritableStore) -> None:
    lease = Lease.acquire(store)
    for _ in range(2):
        with pytest.raises(InfrastructureError) as caught:
            Lease.acquire(store)
        assert code(caught) == "lease-held"
        assert str(os.getpid()) in str(caught.value)
    lease.check()
    lease.release()
    again = Lease.acquire(store)
    again.release()
    assert store.list_files() == ()


def test_a_dead_process_of_this_host_holds_nothing(store: WritableStore) -> None:
    old = hold(store, 4, pid=dead_pid(), renewed=time.time())
    lease = Lease.acquire(store)
    assert lease.epoch == 5
    assert old not in store.list_files()
    lease.release()


def test_a_process_id_that_was_given_again_holds_nothing(store: WritableStore) -> None:
    hold(store, 1, started="1", renewed=time.time())
    Lease.acquire(store).release()


def test_a_zombie_holds_nothing(store: WritableStore) -> None:
    """A killed run whose parent has not looked yet (what an init that reaps nothing makes of it for ever)."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        started = journal_module._process_start(process.pid)
        assert started
        hold(store, 1, pid=process.pid, started=started)
        with pytest.raises(InfrastructureError):
            Lease.acquire(store)
        process.kill()
        deadline = time.monotonic() + 10
        while Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
            assert time.monotonic() < deadline
            time.sleep(0.01)
        Lease.acquire(store).release()
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("changes", [{"host": "elsewhere"}, {"boot": "before"}], ids=["host", "boot"])
def test_another_machines_lease_is_stale_after_a_minute(store: WritableStore, changes: dict[str, str]) -> None:
    """Its process cannot be seen: only the time counts."""
    hold(store, 2, pid=dead_pid(), renewed=time.time() - LEASE_SECONDS + 5, **changes)
    with pytest.raises(InfrastructureError) as caught:
        Lease.acquire(store)
    assert code(caught) == "lease-held"
    hold(store, 2, renewed=time.time() - LEASE_SECONDS - 1, **changes)
    lease = Lease.acquire(store)
    assert lease.epoch == 3
    lease.release()


def test_a_run_on_this_host_that_is_slow_keeps_it(store: WritableStore) -> None:
    """It lives, so it holds, however long it was silent."""
    name = Lease.acquire(store).name
    hold(store, 1, renewed=time.time() - 10 * LEASE_SECONDS)
    with pytest.raises(InfrastructureError):
        Lease.acquire(store)
    assert name in store.list_files()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"renewed": "soon"}', b"\xff"])
def test_a_lease_nobody_can_read_holds_nothing(store: WritableStore, content: bytes) -> None:
    store.put(".raymerge/lease/000001.json", content)
    Lease.acquire(store).release()


def test_of_many_who_take_over_one_wins(store: WritableStore) -> None:
    for _ in range(5):
        hold(store, 1, pid=dead_pid())
        barrier = threading.Barrier(6)
        won: list[Lease] = []
        lost: list[str] = []

        def take(barrier: threading.Barrier = barrier, won: list[Lease] = won, lost: list[str] = lost) -> None:
            barrier.wait()
            try:
                won.append(Lease.acquire(store))
            except InfrastructureError as error:
                lost.append(error.problems[0].code)

        threads = [threading.Thread(target=take) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (len(won), set(lost)) == (1, {"lease-held"})
        won[0].release()


def test_it_says_who_holds_it(store: WritableStore) -> None:
    lease = Lease.acquire(store)
    document = json.loads(lease.document())
    assert (document["host"], document["pid"]) == (socket.gethostname(), os.getpid())
    lease.release()


# ---- fencing ---------------------------------------------------------------------------------------------------------


def test_who_lost_the_lease_writes_no_more(store: WritableStore) -> None:
    slow = Journal.open(store, PLAN)
    slow.append([receipt(0)])
    hold(store, slow.lease.epoch + 1, host="elsewhere")
    before = store.list_files()
    steps: list[Callable[[], object]] = [lambda: slow.append([receipt(1)]), slow.lease.check, slow.lease.renew]
    for step in steps:
        with pytest.raises(InfrastructureError) as caught:
            step()
        assert code(caught) == "lease-lost"
    assert store.list_files() == before
    slow.close()


def test_a_later_lease_of_the_same_number_is_another(store: WritableStore) -> None:
    slow = Lease.acquire(store)
    store.remove(slow.name)  # taken over, and given back
    fresh = Lease.acquire(store)
    assert fresh.epoch == slow.epoch
    with pytest.raises(InfrastructureError):
        slow.check()
    fresh.check()
    fresh.release()


def test_a_swept_run_loses_its_lease(store: WritableStore) -> None:
    slow = Journal.open(store, PLAN)
    store.remove(slow.lease.name)
    with pytest.raises(InfrastructureError):
        slow.append([receipt(1)])
    slow.close()


def test_it_is_renewed_whatever_the_run_is_busy_with(store: WritableStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_module, "RENEW_SECONDS", 0.02)
    journal = Journal.open(store, PLAN)
    stale = {**json.loads(journal.lease.document()), "renewed": 0}
    store.put(journal.lease.name, json.dumps(stale).encode())
    deadline = time.monotonic() + 10
    while True:
        found = journal_module._holder(store, journal.lease.epoch)
        if found is not None and found["renewed"] > 0:
            break
        assert time.monotonic() < deadline
        time.sleep(0.01)
    journal.close()
    time.sleep(0.1)
    assert journal.lease.name not in store.list_files()


# ---- states of an output ---------------------------------------------------------------------------------------------


def finished(store: WritableStore) -> None:
    store.put("model.safetensors", b"1234")
    store.put("config.json", b"{}")
    store.put("README.md", b"card")
    store.put("raymerge.json", json.dumps(RESULT).encode())


def test_states(store: WritableStore) -> None:
    assert output_state(store) == "absent"
    store.put("thesis.txt", b"")
    assert output_state(store) == "foreign"
    store.remove("thesis.txt")
    finished(store)
    assert output_state(store) == "finished"
    store.put(".raymerge/plan.json", b"{}")
    assert output_state(store) == "unfinished"


def test_what_a_run_left_that_lost_its_lease_makes_an_output_no_less_finished(store: WritableStore) -> None:
    """A worker that was frozen wakes up, or a last word was on its way: the next who looks takes it away."""
    finished(store)
    for name in ("status.json", "pieces/model.safetensors/000-004", "journal/000001-000007.jsonl"):
        store.put(f".raymerge/{name}", b"{}")
    assert output_state(store) == "finished"
    sweep_litter(store, store)
    assert not [name for name in store.list_files() if name.startswith(".raymerge/")]
    for name in ("plan.json", "lease/000002.json", "intermediates/mixed/config.json"):
        store.put(f".raymerge/{name}", b"{}")
        store.put(".raymerge/status.json", b"{}")
        assert output_state(store) == "unfinished"
        sweep_litter(store, store)  # a run is at work, or was interrupted
        assert f".raymerge/{name}" in store.list_files()
        assert ".raymerge/status.json" in store.list_files()
        store.remove(f".raymerge/{name}")


def test_a_lease_that_was_taken_over_is_not_given_back_by_who_lost_it(store: WritableStore) -> None:
    """Numbers come again once an output is finished: another run's lease may have this one's."""
    lost = Lease.acquire(store)
    store.remove(lost.name)
    other = Lease.acquire(store)
    assert other.name == lost.name
    assert not lost.is_held()
    lost.release()
    assert other.is_held()
    other.release()
    assert store.list_files() == ()


def test_a_run_that_lost_its_lease_says_nothing_more_at_its_output(store: WritableStore) -> None:
    journal = Journal.open(store, PLAN)
    for name in store.list_files():
        store.remove(name)
    finished(store)  # by the run that took it over
    files = RunFiles(Diary(store, {}, is_held=journal.lease.is_held), store, journal.lease.epoch, None)
    with pytest.raises(InfrastructureError), files:
        journal.append([Receipt(0)])
    journal.close()
    assert not [name for name in store.list_files() if name.startswith(".raymerge/")]


@pytest.mark.parametrize("restart", [False, True])
def test_a_foreign_output_is_left(store: WritableStore, restart: bool) -> None:
    store.put("thesis.txt", b"years")
    with pytest.raises(OutputExistsError):
        Journal.open(store, PLAN, restart=restart)
    assert store.list_files() == ("thesis.txt",)


def test_a_foreign_folder_with_a_stray_lease_is_still_foreign(store: WritableStore) -> None:
    store.put("thesis.txt", b"years")
    hold(store, 1, pid=dead_pid())
    with pytest.raises(OutputExistsError):
        Journal.open(store, PLAN)


def test_another_finished_merge_is_left_unless_restarted(store: WritableStore) -> None:
    finished(store)
    store.put("notes.txt", b"mine")
    before = store.list_files()
    with pytest.raises(OutputExistsError):
        Journal.open(store, OTHER)
    assert store.list_files() == before
    journal = Journal.open(store, OTHER, restart=True)
    assert {n for n in store.list_files() if not n.startswith(".raymerge/")} == {"notes.txt"}
    assert journal.receipts() == {}
    journal.remove()


def test_another_unfinished_merge_is_left_unless_restarted(store: WritableStore) -> None:
    first = Journal.open(store, PLAN)
    first.append([receipt(0)])
    store.put("config.json", b"{}")  # published before the run was killed
    store.put("notes.txt", b"mine")
    first.close()
    with pytest.raises(OutputExistsError):
        Journal.open(store, OTHER)
    second = Journal.open(store, OTHER, restart=True)
    assert second.receipts() == {}
    assert {n for n in store.list_files() if not n.startswith(".raymerge/")} == {"notes.txt"}
    second.close()


class Killed(BaseException):
    """The process ends here."""


@pytest.mark.parametrize("steps", range(1, 7))
def test_a_sweep_that_is_cut_short_is_ended_by_the_next_run(
    store: WritableStore, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every moment of a --restart: nothing is called finished that is not, and nothing old stays behind."""
    finished(store)
    store.put("notes.txt", b"mine")
    count = itertools.count(1)
    remove = type(store).remove

    def dying(self: Any, name: str) -> None:
        if next(count) == steps:
            raise Killed
        remove(self, name)

    with monkeypatch.context() as patch:
        patch.setattr(type(store), "remove", dying)
        patch.setattr(Lease, "release", lambda self: None)
        with contextlib.suppress(Killed):
            Journal.open(store, OTHER, restart=True)
    for name in [n for n in store.list_files() if "/lease/" in n]:
        store.put(name, b"{}")  # its process is dead
    assert output_state(store) == "unfinished"
    with pytest.raises(OutputExistsError):
        Journal.open(store, PLAN)
    journal = Journal.open(store, OTHER)
    assert {n for n in store.list_files() if not n.startswith(".raymerge/")} == {"notes.txt"}
    journal.remove()
    assert store.list_files() == ("notes.txt",)


def test_an_output_that_changes_hands_while_it_is_looked_at(
    store: WritableStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another run finishes between our look and our lease: nothing of it is touched."""
    acquire = Lease.acquire.__func__  # type: ignore[attr-defined] # a classmethod has one

    def late(cls: type[Lease], there: WritableStore) -> Lease:
        finished(there)
        lease = acquire(cls, there)
        assert isinstance(lease, Lease)
        return lease

    monkeypatch.setattr(Lease, "acquire", classmethod(late))
    with pytest.raises(InfrastructureError) as caught:
        Journal.open(store, PLAN)
    assert code(caught) == "lease-held"
    assert output_state(store) == "finished"
