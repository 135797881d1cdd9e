"""Whatever dies, and whenever: the same command gives the same bytes, and nothing half done is ever visible."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from merger import api
from merger import run as run_module
from merger.errors import MergeFailedError
from merger.journal import Lease
from merger.storage import LocalStore
from merger.unit import UnitRunner
from tests.cluster.runs import check_finished, journaled, wait_for
from tests.conformance.folders import (
    Outcome,
    ended,
    environment,
    names,
    start,
)

SLOW = """
import os, sys, time
import jobs.cli
from merger.unit import UnitRunner
run = UnitRunner.run
def slowly(self, *arguments):
    time.sleep(float(os.environ["UNIT_SECONDS"]))
    return run(self, *arguments)
UnitRunner.run = slowly
sys.exit(jobs.cli.main(sys.argv[1:]))
"""


def slowly(small: Path, out: Path, *arguments: str, seconds: float = 0.15) -> subprocess.Popen[str]:
    """The command, whose every unit takes a while."""
    line = [sys.executable, "-c", SLOW, "merge", small / "merge.yaml", out, "--on", "here", "--workers", "2"]
    return subprocess.Popen(
        [*map(str, line), *arguments], env={**environment(), "UNIT_SECONDS": str(seconds)}, text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def begun(out: Path) -> bool:
    return (out / ".raymerge" / "plan.json").exists()


def check_unfinished(out: Path, whole: Path) -> None:
    """What a reader may find: nothing, or whole files; and never a folder that loads before all of it is there."""
    visible = names(out) if out.exists() else set()
    if "raymerge.json" not in visible:
        assert not visible or (out / ".raymerge").exists()
        assert "config.json" not in visible or {n for n in names(whole) if n.endswith(".safetensors")} <= visible
    for name in visible - {"raymerge-report.json"}:
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name


# ---- every moment, played in this process ----------------------------------------------------------------------------


class Killed(BaseException):
    """The process ends here."""


class Death:
    """At the n-th change of the file system the process is gone: that one and all later ones do not happen."""

    CHANGES = ("allocate", "write_at", "commit", "put", "remove")

    def __init__(self, patch: pytest.MonkeyPatch, at: int, changes: Sequence[str] = CHANGES) -> None:
        self.count = 0
        self._lock = threading.Lock()
        patch.setattr(run_module, "FLUSH_SECONDS", 0.0)  # a segment a unit
        for change in changes:
            patch.setattr(LocalStore, change, self._wrapped(getattr(LocalStore, change), at))

    def _wrapped(self, real: Callable[..., Any], at: int) -> Callable[..., Any]:
        def change(store: LocalStore, *arguments: Any, **options: Any) -> Any:
            with self._lock:
                self.count += 1
                if self.count >= at:
                    raise Killed
            return real(store, *arguments, **options)

        return change


def die_at(small: Path, out: Path, moment: int, changes: Sequence[str] = Death.CHANGES) -> bool:
    """Merge and die at one change; whether it came to that."""
    with pytest.MonkeyPatch.context() as patch:
        Death(patch, moment, changes)
        try:
            api.merge(small / "merge.yaml", out, workers=1)
        except Killed:
            return True
    return False


def declare_dead(out: Path) -> None:
    """The process that holds the lease is this one; let it be another that is gone."""
    for lease in (out / ".raymerge" / "lease").glob("[0-9]*.json"):
        lease.write_text("{}")


@pytest.fixture(scope="module")
def moments(small: Path, tmp_path_factory: pytest.TempPathFactory) -> int:
    """How many changes a whole run makes."""
    with pytest.MonkeyPatch.context() as patch:
        death = Death(patch, 1 << 30)
        api.merge(small / "merge.yaml", tmp_path_factory.mktemp("count") / "out", workers=1)
    return death.count


def check_death(small: Path, out: Path, moment: int) -> None:
    died = die_at(small, out, moment)
    check_unfinished(out, small / "whole")
    declare_dead(out)
    report = api.merge(small / "merge.yaml", out, workers=2)
    assert died or report.already_done
    check_finished(out, small / "whole")


@pytest.mark.parametrize("part", range(10))
def test_a_death_at_any_change(small: Path, moments: int, tmp_path: Path, part: int) -> None:
    """Every third of them."""
    chosen = range(1, moments + 1, 3)
    for moment in chosen[part::10]:
        check_death(small, tmp_path / str(moment), moment)


@pytest.mark.slow
def test_a_death_at_every_change(small: Path, moments: int, tmp_path: Path) -> None:
    for moment in range(1, moments + 1):
        check_death(small, tmp_path / str(moment), moment)


def test_death_after_death(small: Path, moments: int, tmp_path: Path) -> None:
    """Runs that each come a little further."""
    out = tmp_path / "out"
    for moment in range(moments // 6, moments, moments // 6):
        die_at(small, out, moment)
        check_unfinished(out, small / "whole")
        declare_dead(out)
    api.merge(small / "merge.yaml", out, workers=2)
    check_finished(out, small / "whole")


def test_a_restart_over_what_was_left(small: Path, moments: int, tmp_path: Path) -> None:
    for moment in (moments // 2, moments - 8, moments - 3):
        out = tmp_path / str(moment)
        assert die_at(small, out, moment)
        declare_dead(out)
        (out / "notes.txt").write_text("mine")
        api.merge(small / "merge.yaml", out, restart=True)
        (out / "notes.txt").unlink()
        check_finished(out, small / "whole")


def die_before_publishing(small: Path, out: Path) -> None:
    """Every unit is done, and nothing stands under its final name."""
    assert die_at(small, out, 1, ("commit",))
    assert names(out) == set()
    declare_dead(out)


def units_resumed(small: Path, out: Path) -> int:
    return int(api.merge(small / "merge.yaml", out).units_resumed)


@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_a_byte_that_rots_in_an_unfinished_run_is_noticed(small: Path, tmp_path: Path, place: str) -> None:
    """The journal is trusted for what was done, never for the bytes."""
    known = []
    for turn in ("sound", "rotten"):
        out = tmp_path / turn
        die_before_publishing(small, out)
        if turn == "rotten":
            part = min((out / ".raymerge" / "parts").glob("*.safetensors"))
            data = bytearray(part.read_bytes())
            at = {"first": 0, "middle": len(data) // 2, "last": len(data) - 1}[place]
            data[at] ^= 0x40
            part.write_bytes(data)
        known.append(units_resumed(small, out))
        check_finished(out, small / "whole")
    sound, rotten = known
    assert sound > 0
    assert rotten < sound or place == "first"  # the header is no unit's work: it is written again at each start


def test_a_part_that_is_gone_or_cut_is_made_again(small: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    die_before_publishing(small, out)
    parts = sorted((out / ".raymerge" / "parts").glob("*.safetensors"))
    parts[0].unlink()
    os.truncate(parts[1], parts[1].stat().st_size // 2)
    units_resumed(small, out)
    check_finished(out, small / "whole")


def test_a_published_file_that_rots_before_the_end_is_made_again(small: Path, tmp_path: Path) -> None:
    """Between the first and the last rename a file is under its final name, and the run is not over."""
    seen = 0
    for moment in range(2, 12):
        out = tmp_path / str(moment)
        if not die_at(small, out, moment, ("commit",)):
            break
        declare_dead(out)
        for file in (*sorted(out.glob("*.safetensors"))[:1], *out.glob("config.json")):
            data = bytearray(file.read_bytes())
            data[-1] ^= 1
            file.write_bytes(data)
            seen += 1
        units_resumed(small, out)
        check_finished(out, small / "whole")
    assert seen > 5


def test_a_journal_that_is_lost_costs_time_and_no_bytes(small: Path, moments: int, tmp_path: Path) -> None:
    """All is published, and the state is half removed: the worst that a kill in the last moment can leave."""
    out = tmp_path / "out"
    assert die_at(small, out, moments - 1)
    for segment in (out / ".raymerge" / "journal").glob("*"):
        segment.unlink()
    declare_dead(out)
    api.merge(small / "merge.yaml", out)
    check_finished(out, small / "whole")


# ---- real processes --------------------------------------------------------------------------------------------------


def kills(small: Path, out: Path, count: int, seed: int) -> None:
    chance = random.Random(seed)
    for _ in range(count):
        run = slowly(small, out)
        wait_for(lambda run=run: begun(out) or run.poll() is not None)  # type: ignore[misc] # bound at once
        time.sleep(chance.uniform(0, 1.2))
        run.send_signal(signal.SIGKILL)
        outcome = ended(run)
        assert outcome.code in (137, 0), outcome.err
        check_unfinished(out, small / "whole")


def test_kill_9_at_random_moments(small: Path, tmp_path: Path) -> None:
    """Six times the same run, each a little further; then the same command ends it."""
    out = tmp_path / "out"
    kills(small, out, 6, seed=1)
    assert ended(start("merge", small / "merge.yaml", out)).code == 0
    check_finished(out, small / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_kill_9_at_many_random_moments(small: Path, tmp_path: Path, seed: int) -> None:
    kills(small, tmp_path / "out", 6, seed=100 + seed)
    assert ended(start("merge", small / "merge.yaml", tmp_path / "out")).code == 0
    check_finished(tmp_path / "out", small / "whole")


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_stops_it_and_it_resumes(small: Path, tmp_path: Path, number: int, code: int) -> None:
    out = tmp_path / "out"
    run = slowly(small, out, "--json")
    wait_for(lambda: journaled(out))
    run.send_signal(number)
    outcome = ended(run)
    assert outcome.code == code, outcome.err
    assert outcome.document["exit_code"] == code
    assert outcome.document["problems"][0]["code"] == "stopped"
    assert "Traceback" not in outcome.err
    assert names(out) == set()
    assert not (out / ".raymerge" / "lease").exists()
    done = ended(start("merge", small / "merge.yaml", out, "--json"))
    assert done.code == 0, done.err
    assert done.document["units_resumed"] > 0
    check_finished(out, small / "whole")


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_asked_twice_it_leaves_at_once(small: Path, tmp_path: Path, number: int, code: int) -> None:
    out = tmp_path / "out"
    run = slowly(small, out)
    wait_for(lambda: begun(out))
    run.send_signal(number)
    time.sleep(0.02)
    run.send_signal(number)
    assert ended(run).code == code
    check_unfinished(out, small / "whole")
    assert ended(start("merge", small / "merge.yaml", out)).code == 0
    check_finished(out, small / "whole")


def test_two_runs_race_for_one_output(small: Path, tmp_path: Path) -> None:
    """One does the work; the other is told to come back, or finds it done."""
    out = tmp_path / "out"
    runs = [slowly(small, out, "--json") for _ in range(2)]
    outcomes: list[Outcome] = [ended(run) for run in runs]
    codes = sorted(outcome.code for outcome in outcomes)
    assert codes in ([0, 75], [0, 0]), [o.err for o in outcomes]
    if codes == [0, 75]:
        loser = next(o for o in outcomes if o.code == 75)
        assert [p["code"] for p in loser.document["problems"]] == ["lease-held"]
    else:
        assert sorted(o.document["already_done"] for o in outcomes) == [False, True]
    check_finished(out, small / "whole")


def test_another_run_cannot_push_in(small: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run = slowly(small, out, seconds=2)
    wait_for(lambda: begun(out))
    for arguments in ((), ("--restart",)):
        second = ended(start("merge", small / "merge.yaml", out, *arguments))
        assert second.code == 75, second.err
        assert "lease-held" in second.err
    run.kill()
    ended(run)
    assert ended(start("merge", small / "merge.yaml", out)).code == 0  # at once: its process is seen to be dead
    check_finished(out, small / "whole")


def test_threads_do_not_hang_when_a_runner_cannot_be_made(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: UnitRunner, *arguments: Any, **options: Any) -> None:
        raise RuntimeError("no kernels")

    monkeypatch.setattr(UnitRunner, "__init__", broken)
    with pytest.raises(RuntimeError, match="no kernels"):
        api.merge(small / "merge.yaml", tmp_path / "out", workers=2)
    assert names(tmp_path / "out") == set()


def test_the_lease_is_given_back_whatever_happens(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: UnitRunner, *arguments: Any) -> None:
        raise MergeFailedError.of("broken", "played")

    monkeypatch.setattr(UnitRunner, "run", broken)
    before = set(threading.enumerate())
    with pytest.raises(MergeFailedError):
        api.merge(small / "merge.yaml", tmp_path / "out", workers=2)
    lease = Lease.acquire(LocalStore(str(tmp_path / "out")))
    lease.release()
    assert not [t for t in set(threading.enumerate()) - before if t.name.startswith("raymerge-")]


def test_journal_lines_of_this_run_are_json(small: Path, tmp_path: Path) -> None:
    """What is on disk after a death is what the README of merger says."""
    out = tmp_path / "out"
    die_before_publishing(small, out)
    lines = list(
        itertools.chain.from_iterable(
            path.read_text().splitlines() for path in sorted((out / ".raymerge" / "journal").glob("*.jsonl"))
        )
    )
    assert lines
    found = [json.loads(line).keys() for line in lines]
    assert all({"unit", "extents", "statistics"} <= keys or keys == {"plan"} for keys in found)
