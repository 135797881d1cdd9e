"""The command, in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from jobs.cli import main
from tests.conformance.folders import Outcome, signals_kept


@pytest.fixture
def raymerge(capfd: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Run `raymerge arguments…`."""

    def run(*arguments: str | Path) -> Outcome:
        capfd.readouterr()
        with signals_kept():
            code = main([str(a) for a in arguments])
        out, err = capfd.readouterr()
        return Outcome(code, out, err)

    return run
