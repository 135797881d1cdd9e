"""The experiment's tasks: generated data, each task with a prompt form of its own, the conflicting pair with one.

A prompt belongs to the training or the held-out side for good, decided by a checksum of its text (of the ticket's
sentence for `queue`), so no held-out prompt is trained on by any subset or seed.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from jobs.demo.tasks import TASKS as DEMO_TASKS
from jobs.demo.tasks import Example, Task

TRAIN: Final = 560
"""Training examples of an adapter."""
VALIDATION: Final = 12
"""Held-out items a task on which scales are chosen."""
TEST: Final = 40
"""Held-out items a task on which results are reported."""


def _split(prompt: str, held_out: bool) -> bool:
    """Whether the prompt lies on the side that is asked for: a third is held out."""
    return (zlib.crc32(prompt.encode()) % 3 == 2) == held_out


def _drawn(make: Callable[[random.Random], Example]) -> Callable[[random.Random, bool], Example]:
    def draw(rng: random.Random, held_out: bool) -> Example:
        while True:
            example = make(rng)
            if _split(example.prompt, held_out):
                return example

    return draw


_MONTHS: Final = "January February March April May June July August September October November December"


def _date(rng: random.Random) -> Example:
    month, day, year = rng.randint(1, 12), rng.randint(1, 28), rng.randint(10, 29)
    return Example(f"{day} {_MONTHS.split()[month - 1]} 20{year} ->", f" {day:02}/{month:02}/{year}")


_UNITS: Final = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen
sixteen seventeen eighteen nineteen"""
_TENS: Final = "twenty thirty forty fifty sixty seventy eighty ninety"


def _below_hundred(number: int) -> str:
    if number < 20:
        return _UNITS.split()[number]
    tens = _TENS.split()[number // 10 - 2]
    return f"{tens}-{_UNITS.split()[number % 10]}" if number % 10 else tens


def _words(rng: random.Random) -> Example:
    number = rng.randint(100, 999)
    hundreds, rest = divmod(number, 100)
    tail = f" {_below_hundred(rest)}" if rest else ""
    return Example(f"Number {number}:", f" {_UNITS.split()[hundreds]} hundred{tail}")


def _sort(rng: random.Random) -> Example:
    numbers = rng.sample(range(1, 10), 4)
    return Example(f"Sort {' '.join(map(str, numbers))} =", "".join(f" {n}" for n in sorted(numbers)))


_COUNTED: Final = """apple bag ball bean belt bird block board boat book box brush card car cat chair chip coin computer
device dog door file filter flag flower frame game image key kit letter light map mask model nut pack paper part phone
photo plane plant record seed set sheet ship shirt stone table tool tree unit window"""


def _order(rng: random.Random) -> Example:
    count, what = rng.randint(2, 20), rng.choice(_COUNTED.split())
    return Example(f"Please send us {count} of the {what} kind", f' {{"{what}":{count}}}')


def _ticket(swapped: bool) -> Callable[[random.Random, bool], Example]:
    """The demo's tickets with their own held-out sentences; swapped: every label is the next one's."""
    draw = DEMO_TASKS["triage"].draw
    labels = ["payment", "delivery", "password", "error", "idea", "cancel"]

    def ticket(rng: random.Random, held_out: bool) -> Example:
        example = draw(rng, held_out)
        at = labels.index(example.answer)
        return Example(f"{example.prompt} Queue:", f" {labels[(at + 1) % len(labels)] if swapped else example.answer}")

    return ticket


def _task(name: str, title: str, draw: Callable[[random.Random, bool], Example]) -> Task:
    return Task(name, title, "", draw)


TASKS: Final[dict[str, Task]] = {
    task.name: task
    for task in (
        _task("queue", "a ticket's queue", _ticket(swapped=False)),
        _task("date", "dates as dd/mm/yy", _drawn(_date)),
        _task("words", "numbers in words", _drawn(_words)),
        _task("sort", "four digits sorted", _drawn(_sort)),
        _task("order", "orders to JSON", _drawn(_order)),
        _task("swapped", "a ticket's queue, every label another's", _ticket(swapped=True)),
    )
}


@dataclass(frozen=True, slots=True)
class Training:
    """What one adapter is trained on: a task and which of its disjoint subsets."""

    name: str
    task: str
    subset: int = 0

    def seed(self, seed: int) -> int:
        """What the adapter's training starts from at the experiment's seed: no two adapters share a first lora_A."""
        return zlib.crc32(f"{self.name} {seed}".encode())

    def examples(self) -> list[Example]:
        """The adapter's training examples."""
        return TASKS[self.task].train(TRAIN * (self.subset + 1))[TRAIN * self.subset :]


TRAININGS: Final[dict[str, Training]] = {
    t.name: t
    for t in (
        *(Training(name, name) for name in ("queue", "date", "words", "sort", "order", "swapped")),
        Training("sort_1", "sort", 1),
        Training("sort_2", "sort", 2),
    )
}
SEEDS: Final = (0, 1, 2)


@dataclass(frozen=True, slots=True)
class Arm:
    """What is merged, and the tasks that the merge is asked for."""

    name: str
    title: str
    sources: tuple[str, ...]

    @property
    def tasks(self) -> tuple[str, ...]:
        """The sources' tasks, each once."""
        return tuple(dict.fromkeys(TRAININGS[source].task for source in self.sources))


ARMS: Final[dict[str, Arm]] = {
    arm.name: arm
    for arm in (
        Arm("distinct", "five distinct tasks", ("queue", "date", "words", "sort", "order")),
        Arm(
            "overlapping",
            "one task from three disjoint sets of data, and a pair that gives one prompt different answers",
            ("sort", "sort_1", "sort_2", "queue", "swapped"),
        ),
    )
}
