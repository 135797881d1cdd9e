"""When a bulk runs: the five fields of cron, read and checked.

Fields are those that cron, Kubernetes and KubeRay agree on: `*`, numbers, names of months and weekdays, ranges, lists
and steps of `*` and of ranges. What only some of them know (`@daily`, `?`, `L`, seconds, a zone inside the schedule, 7
for Sunday, `5/10`) or read in different ways is refused.
"""

from __future__ import annotations

import calendar
import zoneinfo
from dataclasses import dataclass
from typing import Final

_MONTHS: Final = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_WEEKDAYS: Final = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")


@dataclass(frozen=True, slots=True)
class Field:
    """One of the five fields."""

    name: str
    first: int
    last: int
    names: tuple[str, ...] = ()

    @property
    def span(self) -> range:
        return range(self.first, self.last + 1)


FIELDS: Final = (
    Field("minute", 0, 59),
    Field("hour", 0, 23),
    Field("day of the month", 1, 31),
    Field("month", 1, 12, _MONTHS),
    Field("weekday", 0, 6, _WEEKDAYS),
)


@dataclass(frozen=True, slots=True)
class Cron:
    """A schedule: the values of each field, sorted. A field written with `*` alone is open."""

    minutes: tuple[int, ...]
    hours: tuple[int, ...]
    days: tuple[int, ...]
    months: tuple[int, ...]
    weekdays: tuple[int, ...]
    """0 is Sunday."""
    open_days: bool
    """Whether the day of the month is `*`: where neither it nor the weekday is open, cron runs on either."""
    open_weekdays: bool


def parse_cron(text: str) -> Cron:
    """Read five fields. Raises ValueError with what is wrong."""
    written = text.split()
    if len(written) != len(FIELDS):
        raise ValueError(f'{text!r} is no schedule: write five fields, such as "0 3 * * *"')
    minutes, hours, days, months, weekdays = (
        _parse_field(field, part) for field, part in zip(FIELDS, written, strict=True)
    )
    found = Cron(minutes, hours, days, months, weekdays, written[2] == "*", written[4] == "*")
    steps = written[2].startswith("*/") or written[4].startswith("*/")
    if steps and not found.open_days and not found.open_weekdays:
        raise ValueError(f"{text!r} means one thing to cron and another to Kubernetes: write the days out, as 1-31/2")
    longest = max(calendar.monthrange(2024, month)[1] for month in months)  # 2024 has a 29 February
    if found.open_weekdays and min(days) > longest:
        raise ValueError(f"{text!r} never comes: the months it names have no day {min(days)}")
    return found


def check_timezone(name: str) -> None:
    """Raises ValueError where this machine's IANA database has no such zone. Without a database nothing is known."""
    if name != "UTC" and zoneinfo.available_timezones() and name not in zoneinfo.available_timezones():
        raise ValueError(f"{name!r} is no time zone: write one such as Europe/Berlin or UTC")


def _parse_field(field: Field, text: str) -> tuple[int, ...]:
    values: set[int] = set()
    for part in text.split(","):
        span, slash, step = part.partition("/")
        if slash and not (step.isdecimal() and int(step) > 0):
            raise ValueError(f"{part!r} is no {field.name}: after / comes a number above 0")
        first, dash, last = span.partition("-")
        if span == "*":
            low, high = field.first, field.last
        else:
            low = _parse_value(field, first, part)
            high = _parse_value(field, last, part) if dash else low
            if slash and not dash:
                raise ValueError(f"{part!r} is no {field.name}: a step is of a range, as {low}-{field.last}/{step}")
        if high < low:
            raise ValueError(f"{part!r} is no {field.name}: the range runs backwards")
        values.update(range(low, high + 1, int(step) if slash else 1))
    return tuple(sorted(values))


def _parse_value(field: Field, text: str, part: str) -> int:
    name = text.lower()
    if name in field.names:
        return field.names.index(name) + (1 if field.names is _MONTHS else 0)
    if not text.isdecimal() or int(text) not in field.span:
        raise ValueError(f"{part!r} is no {field.name}: it runs from {field.first} to {field.last}")
    return int(text)
