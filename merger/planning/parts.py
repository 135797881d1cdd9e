"""Where the parts of a large file start: `file_layouts`. Pure; a function of the plan alone, whoever uploads them.

A part is what a store takes at once (S3: 5 MiB to 5 GiB, 10 000 of them). Parts start where units start wherever a unit
is large enough, so that a worker mostly has whole parts of its own; units that are small share a part, which is kept
short so that little has to be joined from pieces.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Final

from merger.planning.memory import EXTENT_BYTES
from merger.planning.nouns import MergePlan, OutputFile
from merger.storage.base import PART_MAX_COUNT, PART_MIN_BYTES, FileLayout

PART_BYTES: Final = 16 << 20
"""What a part aims at."""


def file_layouts(plan: MergePlan, output: int) -> tuple[FileLayout, ...]:
    """The large files of one output, with their parts: all tensor files, and companions of more than an extent."""
    spans: dict[str, list[tuple[int, int]]] = {}
    for task in plan.tasks:
        whole = task.cut == "whole" or task.fused
        for result in task.results:
            for place in result.places:
                if place.output != output:
                    continue
                last = place.rows if task.cut == "whole" else task.rows
                rows: Iterable[tuple[int, int]] = [(0, last)] if whole else task.row_spans()
                spans.setdefault(place.file, []).extend(place.span(*span) for span in rows)
    s3 = (plan.manifest.get("output") or {}).get("s3") or {}
    layouts = []
    for file in plan.outputs[output].files:
        if not is_large(file):
            continue
        prefix = file.prefix if file.kind == "tensors" else b""
        if s3.get("equal_parts"):
            starts = equal_starts(file.size)
        else:
            starts = part_starts(file.size, len(prefix), spans.get(file.name, ()))
        layouts.append(FileLayout(file.name, file.size, prefix, starts))
    return tuple(layouts)


def equal_starts(size: int, aim: int = PART_BYTES) -> tuple[int, ...]:
    """Starts of parts of one size, but the last."""
    step = max(aim, -(-size // (PART_MAX_COUNT * 3 // 4)))
    return tuple(range(0, max(1, size), step))


def is_large(file: OutputFile) -> bool:
    """Whether a file is written at offsets and grows, rather than put whole."""
    return file.kind == "tensors" or file.size > EXTENT_BYTES


def part_starts(size: int, prefix: int, spans: Iterable[tuple[int, int]], aim: int = PART_BYTES) -> tuple[int, ...]:
    """Starts of the parts of a file of `size` bytes whose first `prefix` bytes are known and whose rest is written by
    units over `spans`, each [start, end)."""
    aim = max(aim, -(-size // (PART_MAX_COUNT * 3 // 4)))
    bounds = sorted({prefix, size, *(bound for span in spans for bound in span)})
    starts = [0]
    for start, end in itertools.pairwise(bounds):
        # A part that holds the ends of several units is closed as soon as it may be; one unit's own parts are long.
        if starts[-1] < start:
            if start - starts[-1] >= PART_MIN_BYTES:
                starts.append(start)
            elif end - starts[-1] >= 2 * PART_MIN_BYTES:
                starts.append(starts[-1] + PART_MIN_BYTES)
        while end - starts[-1] >= aim + PART_MIN_BYTES and starts[-1] >= start:
            starts.append(starts[-1] + aim)
    return _last_not_short(starts, size)


def _last_not_short(starts: Sequence[int], size: int) -> tuple[int, ...]:
    """Without a start at the very end."""
    return tuple(start for start in starts if start < size or start == 0)
