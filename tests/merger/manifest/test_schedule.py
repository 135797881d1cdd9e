"""Cron's five fields."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from merger.errors import ManifestError
from merger.manifest import load_documents
from merger.manifest.schedule import FIELDS, check_timezone, parse_cron


def test_fields_are_read() -> None:
    found = parse_cron("*/20 0-6/3,22 1,15 jan-mar Mon-Fri")
    assert found.minutes == (0, 20, 40)
    assert found.hours == (0, 3, 6, 22)
    assert (found.days, found.months, found.weekdays) == ((1, 15), (1, 2, 3), (1, 2, 3, 4, 5))
    assert not found.open_days
    assert not found.open_weekdays


@pytest.mark.parametrize(
    "text, says",
    [
        ("0 3 * *", "five fields"),
        ("@daily", "five fields"),
        ("0 0 3 * * *", "five fields"),
        ("60 * * * *", "minute"),
        ("0 25 * * *", "hour"),
        ("0 0 0 * *", "day of the month"),
        ("0 0 * 13 *", "month"),
        ("0 0 * * 7", "weekday"),
        ("5/25 * * * *", "5-59/25"),
        ("0 0 */2 * 1", "another to Kubernetes"),
        ("0 0 1 * */2", "another to Kubernetes"),
        ("0 0 ? * *", "day of the month"),
        ("0 0 L * *", "day of the month"),
        ("*/0 * * * *", "above 0"),
        ("*/x * * * *", "above 0"),
        ("9-5 * * * *", "backwards"),
        ("1,,2 * * * *", "minute"),
        ("-1 * * * *", "minute"),
        ("0 0 31 2 *", "never comes"),
        ("0 0 31 4,6 *", "never comes"),
    ],
)
def test_what_is_no_schedule_is_refused(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        parse_cron(text)


def test_a_leap_day_comes() -> None:
    assert parse_cron("0 0 29 2 *").days == (29,)
    assert parse_cron("0 0 31 2 1").weekdays == (1,)  # on Mondays all the same


def test_time_zones() -> None:
    check_timezone("UTC")
    check_timezone("Europe/Berlin")
    with pytest.raises(ValueError, match="no time zone"):
        check_timezone("Mars/Olympus")


@pytest.mark.parametrize(
    "schedule, where", [({"cron": "0 25 * * *"}, "schedule.cron"), ({"cron": "0 3 * * *", "timezone": "X/Y"},
                                                                       "schedule.timezone")],
)  # fmt: skip
def test_a_bulk_with_a_wrong_schedule_is_refused_with_its_key(schedule: dict[str, str], where: str) -> None:
    with pytest.raises(ManifestError) as caught:
        load_documents({"merges": [{"adapters": [{"adapter": "o/a"}]}], "schedule": schedule})
    assert [problem.where for problem in caught.value.problems] == [where]


def _written(field: int) -> st.SearchStrategy[str]:
    numbers = st.integers(FIELDS[field].first, FIELDS[field].last)
    spans = st.tuples(numbers, numbers).map(lambda pair: f"{min(pair)}-{max(pair)}")
    steps = st.tuples(st.just("*") | spans, st.integers(1, 30))
    return st.lists(st.just("*") | numbers.map(str) | spans | steps.map(lambda p: f"{p[0]}/{p[1]}"), min_size=1,
                    max_size=3).map(",".join)  # fmt: skip


@given(st.tuples(*(_written(field) for field in range(5))).map(" ".join))
def test_values_lie_in_their_fields_in_order(text: str) -> None:
    try:
        found = parse_cron(text)
    except ValueError as error:
        assert re.search("never comes|another to Kubernetes", str(error))  # noqa: PT017 - all that may be wrong with these
        return
    parts = (found.minutes, found.hours, found.days, found.months, found.weekdays)
    for field, values in zip(FIELDS, parts, strict=True):
        assert values
        assert all(a < b for a, b in pairwise(values))
        assert set(values) <= set(field.span)
