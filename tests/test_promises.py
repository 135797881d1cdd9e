"""Every known silent failure has a test, and the table of them names tests that exist."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

import pytest

from tests.promises import EVERY, Promise

HERE = Path(__file__).parent
CASES = [pytest.param(promise, id=f"{tool}: {promise.case}") for tool, found in EVERY.items() for promise in found]


@functools.cache
def names_in(file: str) -> frozenset[str]:
    """The test functions of a file that pytest would collect."""
    tree = ast.parse((HERE / file).read_text(encoding="utf-8"))
    return frozenset(node.name for node in tree.body if isinstance(node, ast.FunctionDef))


@pytest.mark.parametrize("promise", CASES)
def test_a_case_is_held_by_tests_that_exist(promise: Promise) -> None:
    assert promise.tests
    for name in promise.tests:
        file, _, test = name.partition("::")
        assert test.startswith("test_"), name
        assert (HERE / file).is_file(), name
        assert test in names_in(file), name


def test_no_case_is_told_twice() -> None:
    for found in EVERY.values():
        assert len({promise.case for promise in found}) == len(found)


def test_all_that_was_measured_is_here() -> None:
    """PEFT's silent failures are eighteen; a case that goes leaves a hole."""
    assert {tool: len(found) for tool, found in EVERY.items()} == {"PEFT": 18, "mergekit": 32, "the field": 42}
