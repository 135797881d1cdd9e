"""The command, in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from jobs.cli import main
from tests.conformance.folders import Outcome, signals_kept


@pytest.fixture
def raymerge(capfd: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Run `raymerge arguments…`; merges in this process, unless it says where: a Ray takes ten seconds to start."""

    def run(*arguments: str | Path) -> Outcome:
        capfd.readouterr()
        given = [str(a) for a in arguments]
        if given[:1] in (["merge"], ["fold"]) and "--on" not in given and len(given) > 2:
            given += ["--on", "here"]
        with signals_kept():
            code = main(given)
        out, err = capfd.readouterr()
        return Outcome(code, out, err)

    return run
