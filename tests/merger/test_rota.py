"""Whose turn it is, played as plain calls."""

from __future__ import annotations

import random
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from merger.crew import Job
from merger.methods.rounds import Call
from merger.planning.nouns import Entry, MergePlan, Output, Place, Result, StoreSpec, Task
from merger.receipts import Receipt
from merger.rota import Rota
from merger.run import Progression
from merger.tensors import DTYPES


def plan(units: int) -> MergePlan:
    call = Call(method="sum", combine="sum", weights=(1.0,))
    tasks = tuple(
        Task(
            name=f"t{n}", rows=1, cols=20, base=None, entries=(Entry(()),), tile_rows=1, extent_rows=1,
            results=(Result(call, StoreSpec("dense"), (Place(0, "f", 80 * n, 80, dtype=DTYPES["F32"], rows=1),)),),
        )
        for n in range(units)
    )  # fmt: skip
    return MergePlan(sources=(), outputs=(Output("out", "model", ()),), tasks=tasks)


def rota(**shares: float) -> tuple[Rota, dict[int, Progression]]:
    made, known = Rota(), {}
    for number, (units, share) in enumerate((int(name[1:]), share) for name, share in shares.items()):
        known[number] = Progression(plan(units))
        made.add(number, known[number], share)
    return made, known


def test_shares_are_kept_at_any_moment() -> None:
    made, _ = rota(a300=1.0, b300=2.0, c300=3.0)
    taken: Counter[int] = Counter()
    for count in range(1, 121):
        job = made.take()
        assert job is not None
        taken[job.run] += 1
        for run, share in enumerate((1, 2, 3)):
            assert abs(taken[run] - count * share / 6) <= 1.5


def test_one_that_joins_late_neither_waits_nor_makes_wait() -> None:
    made, _ = rota(a300=1.0)
    for _ in range(100):
        made.take()
    made.add(7, Progression(plan(300)))
    following = [job.run for job in (made.take() for _ in range(20)) if job is not None]
    assert following.count(7) in (9, 10, 11)


def test_an_abandoned_one_gives_no_more_and_is_idle_when_all_is_back() -> None:
    made, _ = rota(a3=1.0, b3=1.0)
    jobs = [made.take() for _ in range(4)]
    mine = [job for job in jobs if job is not None and job.run == 0]
    made.abandon(0)
    assert not made.is_idle(0)
    assert all(not made.wants(job) for job in mine)
    made.put_back(mine[0])
    made.returned(mine[1])
    assert made.is_idle(0)
    rest = [job.run for job in iter(made.take, None)]
    assert rest == [1]
    made.remove(0)
    assert list(made) == [1]


@given(st.lists(st.tuples(st.integers(1, 6), st.sampled_from([0.5, 1.0, 3.0])), min_size=1, max_size=4), st.integers(0))
def test_every_unit_of_every_plan_is_done_once(plans: list[tuple[int, float]], seed: int) -> None:
    chance = random.Random(seed)
    made, known = Rota(), {}
    for number, (units, share) in enumerate(plans):
        known[number] = Progression(plan(units))
        made.add(number, known[number], share)
    out: list[Job] = []
    done: Counter[tuple[int, int]] = Counter()
    while any(not progression.finished for progression in known.values()):
        while (job := made.take()) is not None:
            out.append(job)
        chance.shuffle(out)
        job = out.pop()
        if chance.random() < 0.3:
            made.put_back(job)
            continue
        made.returned(job)
        for unit in job.units:
            known[job.run].complete(Receipt(unit.index))
            done[job.run, unit.index] += 1
    assert set(done.values()) == {1}
    assert all(made.is_idle(number) for number in known)
    assert made.num_left == 0
