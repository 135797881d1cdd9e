"""What is decided when workers come, work, fail and go: played as plain calls, without Ray and without time."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.schedule import (
    MAX_LOSSES,
    PAUSES,
    RETIRE_SECONDS,
    START_SECONDS,
    Decision,
    Draining,
    Fail,
    Finished,
    Hand,
    JobError,
    Lacking,
    LossKind,
    Lost,
    Ready,
    Retire,
    Schedule,
    Start,
    Unfit,
)
from merger.crew import Assignment, Job, Outcome
from merger.errors import (
    InfrastructureError,
    MergeFailedError,
    OutputExistsError,
    PlanError,
    RaymergeError,
    SourceChangedError,
)
from merger.methods.rounds import Call, empty_statistic
from merger.planning.memory import peak_bytes
from merger.planning.nouns import Entry, MergePlan, Output, Place, Result, StoreSpec, Task
from merger.receipts import Receipt
from merger.rota import Rota
from merger.run import Progression
from merger.tensors import DTYPES

MEMORY = 1 << 30
SUM = Call(method="sum", combine="sum", weights=(1.0,))
TIES = Call(method="ties", prepare="trim", combine="elect", weights=(1.0,), densities=(0.5,))


def task(number: int, *, stages: int = 1) -> Task:
    place = Place(0, "model.safetensors", 80 * number, 80, dtype=DTYPES["F32"], rows=1, tensor=f"t{number}")
    call = SUM if stages == 1 else TIES
    return Task(
        name=f"t{number}", rows=1, cols=20, base=None, entries=(Entry(()),),
        results=(Result(call, StoreSpec("dense"), (place,)),), tile_rows=1, extent_rows=1, fused=stages == 1,
    )  # fmt: skip


def plan(units: int, *, stages: int = 1) -> MergePlan:
    """One tensor a unit (three units where there are three stages)."""
    tasks = tuple(task(number, stages=stages) for number in range(units))
    return MergePlan(sources=(), outputs=(Output("out", "model", ()),), tasks=tasks)


def receipt(progression: Progression, index: int) -> Receipt:
    unit = progression.units[index]
    return Receipt(index, statistics=() if unit.round is None else (empty_statistic(unit.round, 1),))


class Game:
    """A schedule and its progression, with what was handed out and is not back."""

    def __init__(
        self, units: int = 4, *, workers: int = 2, lanes: int = 1, stages: int = 1, window: int | None = None,
        sealing: Iterable[tuple[int, str]] = (), batch_bytes: int = 0, start_seconds: float = START_SECONDS,
    ) -> None:  # fmt: skip
        self.plan = plan(units, stages=stages)
        self.progression = Progression(self.plan, sealing=sealing, batch_bytes=batch_bytes)
        self.schedule = Schedule(
            self.progression, workers=workers, memory=MEMORY, lanes=lanes, window=window,
            start_seconds=start_seconds, needs="1 CPU",
        )  # fmt: skip
        self.now = 1000.0
        self.held: dict[int, dict[int, Hand]] = {}
        self.starting: set[int] = set()
        self.retired: set[int] = set()
        self.error: BaseException | None = None

    def decide(self) -> list[Decision]:
        decisions = self.schedule.decide(self.now)
        for decision in decisions:
            match decision:
                case Start(number):
                    self.starting.add(number)
                case Hand(number, ticket):
                    self.held[number][ticket] = decision
                case Retire(number):
                    assert not self.held.get(number)
                    self.held.pop(number, None)
                    self.starting.discard(number)
                    self.retired.add(number)
                case Fail(error):
                    self.error = error
        return decisions

    def ready(self, *numbers: int, node: str = "") -> list[Decision]:
        for number in numbers:
            self.starting.discard(number)
            self.held[number] = {}
            self.schedule.receive(Ready(number, node or f"node{number}"), self.now)
        return self.decide()

    def begin(self) -> Game:
        """All workers are there."""
        self.decide()
        self.ready(*sorted(self.starting))
        return self

    def finish(self, number: int, *tickets: int, error: BaseException | None = None) -> list[Decision]:
        outcomes = []
        for ticket in tickets:
            job = self.held[number].pop(ticket).job
            receipts = () if error else tuple(receipt(self.progression, unit.index) for unit in job.units)
            outcomes.append((ticket, Outcome(job, receipts, error=error)))
        for outcome in self.schedule.receive(Finished(number, tuple(outcomes)), self.now):
            for one in outcome.receipts:
                self.progression.complete(one)
            if outcome.job.seal is not None:
                self.progression.complete_seal(outcome.job.seal)
        return self.decide()

    def finish_all(self, number: int) -> list[Decision]:
        return self.finish(number, *self.held[number])

    def lose(
        self, number: int, kind: LossKind = "died", *, why: str = "SIGSEGV", unsent: Iterable[int] = ()
    ) -> list[Decision]:  # fmt: skip
        self.held.pop(number, None)
        self.starting.discard(number)
        self.schedule.receive(Lost(number, kind, why, frozenset(unsent)), self.now)
        return self.decide()

    def drain(self, *nodes: str) -> list[Decision]:
        self.schedule.receive(Draining(frozenset(nodes)), self.now)
        return self.decide()

    def run_out(self) -> None:
        """Everything goes well from here on."""
        for _ in range(1000):
            if self.progression.finished or self.error is not None:
                return
            self.ready(*sorted(self.starting))
            for number in list(self.held):
                if self.held.get(number):
                    self.finish_all(number)
            self.now += 1
        raise AssertionError("it does not end")

    def jobs_of(self, number: int) -> list[str]:
        return [hand.job.describe(self.plan) for hand in self.held[number].values()]

    def code(self) -> str:
        assert isinstance(self.error, RaymergeError), self.error
        return self.error.problems[0].code


# ---- handing out -----------------------------------------------------------------------------------------------------


def test_all_workers_are_started_at_once() -> None:
    assert Game(9, workers=3).decide() == [Start(1), Start(2), Start(3)]


def test_no_more_workers_are_started_than_there_are_units() -> None:
    assert Game(2, workers=5).decide() == [Start(1), Start(2)]


def test_work_begins_with_the_first_that_is_ready() -> None:
    game = Game(9, workers=3)
    game.decide()
    assert len(game.ready(2)) == 2


@pytest.mark.parametrize("lanes", [1, 2])
def test_a_worker_holds_one_more_than_it_can_do_at_once(lanes: int) -> None:
    game = Game(20, workers=2, lanes=lanes).begin()
    assert [len(held) for held in game.held.values()] == [lanes + 1, lanes + 1]
    game.finish(1, min(game.held[1]))
    assert len(game.held[1]) == lanes + 1


def test_the_last_jobs_are_left_for_workers_that_are_starting() -> None:
    game = Game(3, workers=3)
    game.decide()
    game.ready(1)
    assert len(game.held[1]) == 1
    game.ready(2, 3)
    assert [len(game.held[n]) for n in (1, 2, 3)] == [1, 1, 1]


def test_workers_that_never_start_do_not_hold_up_the_others() -> None:
    game = Game(3, workers=3)
    game.decide()
    game.ready(1)
    for _ in range(3):
        game.finish_all(1)
    assert game.progression.finished


def test_jobs_are_spread_before_they_are_piled_up() -> None:
    game = Game(4, workers=4).begin()
    assert all(len(held) == 1 for held in game.held.values())


def test_a_later_stage_waits_and_then_everybody_works() -> None:
    game = Game(4, workers=2, stages=3).begin()
    for number in (1, 2):
        assert {hand.job.units[0].stage for hand in game.held[number].values()} == {0}
    game.finish_all(1)
    assert not game.held[1]
    game.finish_all(2)
    assert {hand.job.units[0].stage for n in (1, 2) for hand in game.held[n].values()} == {1}
    game.run_out()
    assert game.progression.finished


def test_findings_go_out_with_the_job() -> None:
    game = Game(1, workers=1, stages=3).begin()
    assert [hand.findings[0][0].prefixes for hand in game.held[1].values()] == [()]
    game.finish_all(1)
    assert [hand.findings[0][0].prefixes for hand in game.held[1].values()] != [()]


def test_files_are_sealed_by_workers() -> None:
    game = Game(2, workers=1, sealing=[(0, "model.safetensors")]).begin()
    game.finish_all(1)
    assert [hand.job.seal for hand in game.held[1].values()] == [(0, "model.safetensors")]
    game.finish_all(1)
    assert game.progression.finished


# ---- losses and blame ------------------------------------------------------------------------------------------------


def test_a_lost_worker_is_replaced() -> None:
    game = Game(20, workers=2).begin()
    assert Start(3) in game.lose(1)


def test_what_two_jobs_did_is_charged_to_neither_and_each_is_tried_alone() -> None:
    game = Game(6, workers=1).begin()
    before = game.jobs_of(1)
    assert len(before) == 2
    game.lose(1)
    game.ready(2)
    assert game.jobs_of(2) == before[:1]
    game.finish_all(2)
    assert game.jobs_of(2) == before[1:]
    game.finish_all(2)
    assert len(game.held[2]) == 2  # trust is back
    game.run_out()
    assert game.progression.finished


def test_a_poison_unit_is_named_and_its_neighbours_are_done() -> None:
    game = Game(6, workers=1).begin()
    poison = game.jobs_of(1)[0]
    lost = done = 0
    for number in itertools.count(1):
        while game.error is None and poison not in game.jobs_of(number):
            done += len(game.held[number])
            game.finish_all(number)
        if game.error is None:
            lost += 1
            game.lose(number)
        if game.error is not None:
            break
        game.ready(number + 1)
    assert game.code() == "poison-unit"
    assert isinstance(game.error, MergeFailedError)
    assert game.error.problems[0].where == poison
    assert "SIGSEGV" in game.error.problems[0].why
    assert lost == MAX_LOSSES + 1  # once in company


def test_a_poison_unit_in_a_batch_is_found_by_halving() -> None:
    game = Game(128, workers=1, batch_bytes=1 << 20).begin()
    game_sizes = {len(hand.job.units) for hand in game.held[1].values()}
    assert max(game_sizes) > 1
    poison = next(hand.job.units[0].index for hand in game.held[1].values() if len(hand.job.units) > 1)
    for number in itertools.count(1):
        while game.error is None and not any(
            poison in {u.index for u in h.job.units} for h in game.held[number].values()
        ):
            game.finish_all(number)
        if game.error is None:
            game.lose(number)
        if game.error is not None:
            break
        game.ready(number + 1)
    assert game.code() == "poison-unit"
    assert isinstance(game.error, MergeFailedError)
    assert game.error.problems[0].where == f"t{game.progression.units[poison].task}, rows 0 to 1"


def test_an_innocent_batch_is_done_whole_though_its_worker_died() -> None:
    game = Game(128, workers=1, batch_bytes=1 << 20).begin()
    game.finish(1, min(game.held[1]))
    game.finish(1, *list(game.held[1])[1:])
    game.lose(1, unsent=list(game.held[1])[1:])
    game.run_out()
    assert len(game.progression.receipts) == 128


def test_a_suspect_is_given_a_worker_of_its_own_among_busy_ones() -> None:
    """No worker is ever idle by itself while there is work: one is let run dry."""
    game = Game(40, workers=2).begin()
    suspects = game.jobs_of(1)
    game.lose(1)  # and no replacement comes
    for _ in range(3):
        game.finish(2, min(game.held[2]))
        if game.jobs_of(2) == suspects[:1]:
            break
    assert game.jobs_of(2) == suspects[:1]


def test_a_job_that_never_left_the_driver_is_no_suspect() -> None:
    game = Game(6, workers=1).begin()
    _, second = game.held[1]
    accused, innocent = game.jobs_of(1)
    game.lose(1, unsent=[second])
    game.ready(2)
    assert game.jobs_of(2) == [accused]
    game.finish_all(2)
    assert innocent in game.jobs_of(2)
    assert len(game.held[2]) == 2  # in company: nobody suspects it


@pytest.mark.parametrize("excuse", ["preempted", "draining"])
def test_nobody_is_charged_for_a_node_that_goes(excuse: str) -> None:
    game = Game(1, workers=1)
    game.decide()
    for number in range(1, 9):
        game.ready(number)
        assert len(game.held[number]) == 1
        if excuse == "draining":
            game.drain(f"node{number}")
            game.lose(number)
        else:
            game.lose(number, "preempted")
    assert game.error is None
    game.run_out()
    assert game.progression.finished


def test_a_draining_node_gets_nothing_new_and_may_finish() -> None:
    game = Game(20, workers=2).begin()
    assert Start(3) in game.drain("node1")
    held = set(game.held[1])
    decisions = game.finish(1, min(held))
    assert not [d for d in decisions if isinstance(d, Hand) and d.worker == 1]
    assert Retire(1) in game.finish_all(1)
    game.run_out()
    assert game.progression.finished


def test_a_worker_that_starts_on_a_draining_node_is_let_go() -> None:
    game = Game(20, workers=1)
    game.decide()
    game.drain("node1")
    decisions = game.ready(1)
    assert Retire(1) in decisions
    assert not [d for d in decisions if isinstance(d, Hand)]


# ---- memory ----------------------------------------------------------------------------------------------------------


def halvings(game: Game) -> int:
    count, memory = 0, MEMORY
    while memory > peak_bytes(game.plan):
        memory = max(memory // 2, peak_bytes(game.plan))
        count += 1
    return count


@pytest.mark.parametrize("error", [MemoryError("no"), type("OutOfMemoryError", (RuntimeError,), {})("CUDA")])
def test_a_job_without_memory_comes_back_with_half(error: Exception) -> None:
    game = Game(1, workers=1).begin()
    for turn in range(halvings(game)):
        (hand,) = game.held[1].values()
        assert hand.memory == max(MEMORY >> turn, peak_bytes(game.plan))
        game.finish(1, hand.ticket, error=error)
    assert [hand.memory for hand in game.held[1].values()] == [peak_bytes(game.plan)]
    game.finish(1, *game.held[1], error=error)
    assert game.code() == "out-of-memory"
    assert isinstance(game.error, InfrastructureError)
    assert game.error.problems[0].where == "t0, rows 0 to 1"


def test_a_worker_that_is_killed_for_memory_is_replaced_and_its_jobs_get_half() -> None:
    game = Game(6, workers=1).begin()
    game.lose(1, "out-of-memory")
    game.ready(2)
    assert {hand.memory for hand in game.held[2].values()} == {MEMORY // 2}
    game.run_out()
    assert game.progression.finished


def test_a_worker_that_is_killed_for_memory_over_the_smallest_blocks_ends_it() -> None:
    game = Game(2, workers=1).begin()
    for number in range(1, 100):
        game.lose(number, "out-of-memory")
        if game.error is not None:
            break
        game.ready(number + 1)
    assert game.code() == "out-of-memory"


# ---- errors of jobs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [MergeFailedError, SourceChangedError, OutputExistsError, PlanError])
def test_an_error_of_the_merge_ends_it_at_once_as_it_is(kind: type[RaymergeError]) -> None:
    game = Game(9).begin()
    error = kind.of("some-code", "what")
    game.finish(1, min(game.held[1]), error=error)
    assert game.error is error


def test_what_went_well_beside_an_error_counts() -> None:
    game = Game(9, workers=1).begin()
    first, second = game.held[1]
    hands = [game.held[1].pop(ticket) for ticket in (first, second)]
    error = MergeFailedError.of("not-finite", "NaN")
    good = game.schedule.receive(
        Finished(1, ((first, Outcome(hands[0].job, error=error)), (second, Outcome(hands[1].job)))), 0.0
    )
    assert [outcome.job for outcome in good] == [hands[1].job]
    game.decide()
    assert game.error is error


def test_an_unreachable_source_is_tried_again_later_and_elsewhere() -> None:
    game = Game(2, workers=2).begin()
    error = InfrastructureError.of("unreachable", "503")
    (ticket,) = game.held[1]
    game.finish(1, ticket, error=error)
    game.finish_all(2)
    for pause, worker in zip(PAUSES, (2, 1, 2), strict=True):
        assert not any(game.held.values())
        game.now += pause - 0.5
        game.decide()
        assert not any(game.held.values())
        game.now += 1
        game.decide()
        if worker == 2 and pause == PAUSES[0]:
            assert game.held[2]
            assert not game.held[1]
        [(number, ticket)] = [(n, t) for n, held in game.held.items() for t in held]
        game.finish(number, ticket, error=error)
    assert game.error is error


def test_an_unreachable_source_is_tried_again_on_the_only_worker() -> None:
    game = Game(1, workers=1).begin()
    (ticket,) = game.held[1]
    game.finish(1, ticket, error=InfrastructureError.of("unreachable", "503"))
    game.now += PAUSES[0]
    game.decide()
    assert len(game.held[1]) == 1


def test_an_unknown_error_is_tried_once_more_on_another_worker() -> None:
    game = Game(2, workers=2).begin()
    (ticket,) = game.held[1]
    game.finish(1, ticket, error=JobError("KeyError", "'x\x1b[31m'"))
    assert not game.held[1]
    assert len(game.held[2]) == 2
    game.finish(2, ticket, error=JobError("KeyError", "'x\x1b[31m'"))
    assert game.code() == "unit-failed"
    assert "KeyError: 'x\\x1b[31m'" in str(game.error)


# ---- workers that do not come ----------------------------------------------------------------------------------------


def test_workers_that_die_before_they_start_end_it() -> None:
    game = Game(9, workers=2)
    game.decide()
    for number in (1, 2):
        game.lose(number, why="no such library")
        assert game.error is None
    game.lose(3, why="no such library")
    assert game.code() == "workers-die"
    assert "no such library" in str(game.error)


def test_one_that_starts_lets_the_others_off() -> None:
    game = Game(9, workers=2)
    game.decide()
    game.lose(1)
    game.lose(2)
    game.ready(3)
    game.lose(4)
    game.lose(5)
    assert game.error is None


def test_no_worker_in_time_names_what_is_lacking() -> None:
    game = Game(9, workers=2)
    game.decide()
    game.now += START_SECONDS - 1
    game.decide()
    assert game.error is None
    game.schedule.receive(Lacking("no node has 1 GPU"), game.now)
    game.now += 2
    game.decide()
    assert game.code() == "no-resources"
    assert "no node has 1 GPU" in str(game.error)
    assert "1 CPU" in str(game.error)


def test_the_deadline_starts_anew_when_all_workers_are_lost() -> None:
    game = Game(9, workers=1).begin()
    game.now += 10 * START_SECONDS
    game.lose(1)
    assert game.error is None
    game.now += START_SECONDS + 1
    game.decide()
    assert game.code() == "no-resources"


def test_a_worker_that_is_unfit_ends_it() -> None:
    game = Game(9).begin()
    error = PlanError.of("not-shared", "no")
    game.schedule.receive(Unfit(1, error), game.now)
    game.decide()
    assert game.error is error


# ---- the tail --------------------------------------------------------------------------------------------------------


def test_idle_workers_are_let_go_at_the_tail() -> None:
    game = Game(4, workers=4).begin()
    for number in (1, 2):
        game.finish_all(number)
    game.now += RETIRE_SECONDS
    assert game.decide() == [Retire(1), Retire(2)]
    assert Start(5) in game.lose(3)  # what comes back still finds workers
    game.run_out()
    assert game.progression.finished


def test_workers_are_kept_between_stages() -> None:
    game = Game(4, workers=4, stages=3).begin()
    game.finish_all(1)
    game.now += 10 * RETIRE_SECONDS
    assert game.decide() == []


# ---- any order -------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class World:
    """Workers whose jobs have natures: what a unit does, whichever worker does it."""

    game: Game
    chance: random.Random
    natures: dict[int, str]
    lanes: int
    window: int
    faults: int
    """Workers that may still go for no reason of ours."""
    nodes: dict[int, str] = field(default_factory=dict)
    draining: set[str] = field(default_factory=set)
    tried: dict[int, int] = field(default_factory=dict)
    charged: bool = False
    """Whether a worker was lost for no reason while a single job was in its hands."""

    def check(self, decisions: Sequence[Decision]) -> None:
        game = self.game
        for decision in decisions:
            if isinstance(decision, Hand):
                assert decision.worker in game.held, "handed to a lost worker"
                assert self.nodes[decision.worker] not in self.draining
                assert len(game.held[decision.worker]) <= self.window
                assert not {u.index for u in decision.job.units} & game.progression.receipts.keys()
                assert len(decision.findings) == len(decision.job.units)
        held = [u.index for hands in game.held.values() for hand in hands.values() for u in hand.job.units]
        assert len(held) == len(set(held)), "two workers hold one unit"

    def nature(self, job: Job, memory: int) -> str:
        """What becomes of a job of several units; one that was hungry and has too little memory for that goes on."""
        found = {self.natures.get(unit.index, "good") for unit in job.units}
        if memory <= peak_bytes(self.game.plan):
            found.discard("hungry")
        return next((n for n in ("poison", "fatal", "odd", "hungry", "offline", "flaky") if n in found), "good")

    def turn(self) -> None:
        game, chance = self.game, self.chance
        game.now += chance.choice([0.1, 1.0, 30.0])
        moves: list[str] = ["wait"]
        moves += ["ready"] * 3 * bool(game.starting)
        busy = [n for n, held in game.held.items() if held]
        moves += ["work"] * 6 * bool(busy)
        moves += ["fault"] * (self.faults > 0 and bool(game.held))
        moves += ["drain"] * (self.faults > 0 and bool(game.held))
        move = chance.choice(moves)
        if move == "ready":
            number = chance.choice(sorted(game.starting))
            self.nodes[number] = f"n{number}"
            self.check(game.ready(number, node=self.nodes[number]))
        elif move == "work":
            self.work(chance.choice(busy))
        elif move == "fault":
            self.faults -= 1
            number = chance.choice(sorted(game.held))
            kind: LossKind = chance.choice(["died", "preempted"])
            if kind == "died" and len(game.held[number]) == 1:
                kind = "preempted"
            self.check(game.lose(number, kind))
        elif move == "drain":
            self.faults -= 1
            self.draining.add(self.nodes[chance.choice(sorted(game.held))])
            self.check(game.drain(*self.draining))
        else:
            self.check(game.decide())

    def work(self, number: int) -> None:
        """The first jobs in a worker's hands are under way: one of them ends, somehow."""
        game = self.game
        under_way = list(game.held[number])[: self.lanes]
        natures = {ticket: self.nature((hand := game.held[number][ticket]).job, hand.memory) for ticket in under_way}
        if "poison" in natures.values() and self.chance.random() < 0.7:
            self.check(game.lose(number))
            return
        ticket = self.chance.choice(under_way)
        hand = game.held[number][ticket]
        error: BaseException | None = None
        first = hand.job.units[0].index if hand.job.units else -1
        match natures[ticket]:
            case "poison":
                self.check(game.lose(number))
                return
            case "fatal":
                error = MergeFailedError.of("not-finite", "NaN")
            case "odd":
                error = JobError("KeyError", "x")
            case "hungry":
                error = MemoryError()
            case "offline":
                error = InfrastructureError.of("unreachable", "503")
            case "flaky":
                self.tried[first] = self.tried.get(first, 0) + 1
                error = InfrastructureError.of("unreachable", "503") if self.tried[first] <= len(PAUSES) else None
            case _:
                pass
        self.check(game.finish(number, ticket, error=error))


ENDS = {"poison": "poison-unit", "fatal": "not-finite", "odd": "unit-failed", "offline": "unreachable"}


@given(
    seed=st.integers(0, 1 << 32), units=st.integers(1, 24), workers=st.integers(1, 6),
    lanes=st.integers(1, 3), stages=st.sampled_from([1, 3]), faults=st.integers(0, 8), batches=st.booleans(),
    bad=st.lists(st.sampled_from(["poison", "fatal", "odd", "offline", "hungry", "flaky"]), max_size=3),
)  # fmt: skip
def test_whatever_happens_every_job_is_done_once_or_the_right_error_comes(
    seed: int, units: int, workers: int, lanes: int, stages: int, faults: int, *, batches: bool,
    bad: list[str],
) -> None:  # fmt: skip
    chance = random.Random(seed)
    units *= 8 if batches else 1  # few units make no batches
    game = Game(
        units, workers=workers, lanes=lanes, stages=stages, batch_bytes=1 << 20 if batches else 0,
        sealing=[(0, "model.safetensors")], start_seconds=float("inf"),
    )  # fmt: skip
    natures = dict(zip(chance.sample(range(len(game.progression.units)), min(len(bad), units)), bad, strict=False))
    world = World(game, chance, natures, lanes, lanes + 1, faults)
    world.check(game.decide())
    for _ in range(5000):
        if game.error is not None or game.progression.finished:
            break
        world.turn()
    ends = {ENDS[nature] for nature in natures.values() if nature in ENDS}
    if ends:
        assert game.code() in ends
    else:
        assert game.error is None
        assert game.progression.finished
        assert len(game.progression.receipts) == len(game.progression.units)
    if game.error is not None and game.code() == "poison-unit":
        assert isinstance(game.error, MergeFailedError)
        guilty = {
            f"t{game.progression.units[index].task}, rows 0 to 1"
            for index, nature in natures.items()
            if nature == "poison"
        }
        assert game.error.problems[0].where in guilty


# ---- many plans ------------------------------------------------------------------------------------------------------


class Many(Rota):
    """An agenda of several plans, each of which may end alone."""

    def __init__(self, *units: int) -> None:
        super().__init__()
        self.known = {number: Progression(plan(count)) for number, count in enumerate(units)}
        self.errors: dict[int, BaseException] = {}
        for number, progression in self.known.items():
            self.add(number, progression)

    @property
    def finished(self) -> bool:
        return all(number in self.errors or p.finished for number, p in self.known.items())

    def assignment(self, run: int) -> Assignment:
        raise KeyError(run)

    def ended(self) -> Iterable[int]:
        return ()

    def plan_of(self, job: Job) -> MergePlan:
        return self.known[job.run].plan

    def give_up(self, job: Job, error: BaseException) -> bool:
        self.returned(job)
        self.errors.setdefault(job.run, error)
        self.abandon(job.run)
        return True


@pytest.mark.parametrize("fault", ["died", "refused", "surprise"])
def test_a_job_that_cannot_be_done_ends_its_own_plan_and_none_beside(fault: str) -> None:
    many = Many(6, 6, 6)
    schedule = Schedule(many, workers=2, memory=MEMORY)
    done: list[tuple[int, int]] = []
    held: dict[int, dict[int, Job]] = {}
    started = 0
    for now in range(400):
        for decision in schedule.decide(float(now)):
            match decision:
                case Start(number):
                    started += 1
                    held[number] = {}
                    schedule.receive(Ready(number, "node"), float(now))
                case Hand(number, ticket, job):
                    held[number][ticket] = job
                case Retire(number):
                    assert not held.pop(number)
                case Fail(reason):
                    raise reason
        if many.finished:
            break
        for number, jobs in list(held.items()):
            if not jobs:
                continue
            ticket, job = next(iter(jobs.items()))
            bad = job.run == 1 and job.units[0].index == 2
            if bad and fault == "died":
                del held[number]
                schedule.receive(Lost(number, "died", "killed"), float(now))
                continue
            del jobs[ticket]
            error: BaseException | None = None
            if bad:
                error = PlanError.of("x", "refused") if fault == "refused" else JobError("KeyError", "'k'")
            outcomes = schedule.receive(Finished(number, ((ticket, Outcome(job, error=error)),)), float(now))
            for outcome in outcomes:
                many.returned(outcome.job)
                if outcome.job.run not in many.errors:
                    done += [(outcome.job.run, unit.index) for unit in outcome.job.units]
                    for unit in outcome.job.units:
                        many.known[outcome.job.run].complete(Receipt(unit.index))
    assert many.finished
    assert set(many.errors) == {1}
    assert sorted(unit for run, unit in done if run == 0) == list(range(6))
    assert sorted(unit for run, unit in done if run == 2) == list(range(6))
    schedule.decide(1e6)
    assert many.is_idle(1)
    if fault == "died":
        assert started >= MAX_LOSSES
