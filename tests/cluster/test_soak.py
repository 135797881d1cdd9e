"""Bulk merges for twenty minutes while things go wrong: nothing lost, nothing done twice, memory flat."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from typing import Final

import pytest

from tests.conformance.folders import ROOT

SECONDS: Final = float(os.environ.get("RAYMERGE_SOAK_SECONDS", "1200"))
GROWTH_MIB: Final = 48
"""What the driver's resident memory may differ between the second quarter of the nights and the last."""


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(3 * SECONDS + 1800)
def test_a_soak_of_bulks_with_faults() -> None:
    """The script itself says when a merge is lost or a unit is done twice; memory is looked at here."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.cluster.soak", "--seconds", str(SECONDS)], cwd=ROOT, text=True,
        env={k: v for k, v in os.environ.items() if k not in ("RAY_AUTH_MODE", "HF_HUB_OFFLINE")},
        stdin=subprocess.DEVNULL, capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    *nights, total = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert total["kills"] > 0
    assert total["faults"] > 0
    quarter = len(nights) // 4
    if quarter:
        early, late = nights[quarter : 2 * quarter], nights[-quarter:]
        for what, more in (("resident", GROWTH_MIB), ("threads", 4), ("files", 8)):
            first, last = (statistics.median(night[what] for night in part) for part in (early, late))
            assert last <= first + more, (what, first, last, total)
