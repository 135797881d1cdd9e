"""Merges that the tests of this folder run, and what holds of a finished one."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.conformance.folders import content_digest, names

LAYERS = 8


def ties(folder: Path, **more: object) -> dict[str, Any]:
    return {
        "merge_method": "ties", "base_model": str(folder / "base"), "parameters": {"density": 0.3, "scope": "model"},
        "models": [{"model": str(folder / f"m{n}"), "parameters": {"weight": 1.0 / n}} for n in (1, 2)], **more,
    }  # fmt: skip


def wait_for(found: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.01)


def journaled(out: Path) -> bool:
    return any((out / ".raymerge" / "journal").glob("*.jsonl"))


def check_finished(out: Path, whole: Path) -> None:
    assert content_digest(out) == content_digest(whole)
    assert not (out / ".raymerge").exists()
    assert names(out) == names(whole)
    for name in names(out) - {"raymerge-report.json"}:
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name
