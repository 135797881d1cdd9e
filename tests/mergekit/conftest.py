"""Another place for mergekit's interpreter than .venv-mergekit: RAYMERGE_MERGEKIT_PYTHON."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT_CONFTEST = Path(__file__).parents[1] / "conftest.py"


def pytest_collection_modifyitems(config: pytest.Config) -> None:
    named = os.environ.get("RAYMERGE_MERGEKIT_PYTHON")
    root = config.pluginmanager.get_plugin(str(ROOT_CONFTEST))
    if named and root is not None:
        root.MERGEKIT_PYTHON = Path(named).absolute()
