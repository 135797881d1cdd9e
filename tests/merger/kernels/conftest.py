"""The slow twins, as a fixture: tests have no packages to import from."""

from __future__ import annotations

import importlib
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def twins() -> ModuleType:
    return importlib.import_module("tests.reference")
