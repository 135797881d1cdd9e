"""Parts of a file: long enough for S3, few enough, and cut where units end."""

from __future__ import annotations

import itertools

from hypothesis import example, given
from hypothesis import strategies as st

from merger.planning.parts import PART_BYTES, equal_starts, part_starts
from merger.storage.base import PART_MAX_COUNT, PART_MIN_BYTES

MIB = 1 << 20


def spans(prefix: int, sizes: list[int]) -> list[tuple[int, int]]:
    found, at = [], prefix
    for size in sizes:
        found.append((at, at + size))
        at += size
    return found


@given(
    st.integers(0, 3 * MIB),
    st.lists(st.one_of(st.integers(1, 64 * 1024), st.integers(1, 80 * MIB)), max_size=40),
)
@example(0, [])
@example(100, [1])
@example(0, [PART_MIN_BYTES])
def test_parts_cover_the_file_and_all_but_the_last_are_long_enough(prefix: int, sizes: list[int]) -> None:
    size = prefix + sum(sizes)
    starts = part_starts(size, prefix, spans(prefix, sizes))
    assert starts[0] == 0
    assert list(starts) == sorted(set(starts))
    ends = [*starts[1:], size]
    lengths = [end - start for start, end in zip(starts, ends, strict=True)]
    assert all(length >= PART_MIN_BYTES for length in lengths[:-1])
    assert all(length < PART_BYTES + 3 * PART_MIN_BYTES for length in lengths)
    assert size == 0 or lengths[-1] > 0


def test_a_large_unit_has_parts_of_its_own_and_small_ones_share() -> None:
    sizes = [40 * MIB, 8192, 8192, 40 * MIB, 6 * MIB, 100]
    starts = part_starts(sum(sizes), 0, spans(0, sizes))
    bounds = [start for start, _ in spans(0, sizes)]
    assert bounds[1] in starts  # the first unit ends with a part
    shared = [s for s in starts if bounds[1] <= s < bounds[3] + PART_MIN_BYTES]
    assert shared == [bounds[1], bounds[1] + PART_MIN_BYTES]  # the norms take only as much of a neighbour as they must
    assert bounds[4] in starts


def test_a_file_of_a_terabyte_has_no_more_parts_than_may_be() -> None:
    size = 1 << 40
    starts = part_starts(size, 1000, spans(1000, [(1 << 30)] * 1023 + [(1 << 30) - 1000]))
    assert len(starts) <= PART_MAX_COUNT
    assert min(b - a for a, b in itertools.pairwise(starts)) >= PART_MIN_BYTES


@given(st.integers(0, 1 << 44))
@example(0)
@example(PART_BYTES)
@example(PART_BYTES + 1)
def test_equal_parts_are_equal_but_the_last(size: int) -> None:
    starts = equal_starts(size)
    steps = {b - a for a, b in itertools.pairwise(starts)}
    assert len(steps) <= 1
    assert len(starts) <= PART_MAX_COUNT
    assert starts[0] == 0
    assert starts[-1] < max(1, size)
    assert size - starts[-1] <= max(PART_BYTES, *steps, PART_BYTES)
