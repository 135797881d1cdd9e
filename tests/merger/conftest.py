"""The slow twins, and small sources with runs over them, as fixtures: tests have no packages to import from."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture(scope="session")
def twins() -> ModuleType:
    return importlib.import_module("tests.reference")


@pytest.fixture(scope="session")
def tools() -> ModuleType:
    return importlib.import_module("tests.strategies")


@pytest.fixture
def place(tools: ModuleType) -> Iterator[Any]:
    with tools.places() as places:
        yield places
