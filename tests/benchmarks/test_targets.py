"""The benchmarks' targets, as slow tests. Each script says by its exit status whether its targets were met."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


def run(script: str, *arguments: str) -> None:
    """A script by its name, or `-m` and its module's."""
    line = [script] if script == "-m" else [str(HERE / script)]
    done = subprocess.run(
        [sys.executable, *line, *arguments], cwd=HERE.parents[1],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]


@pytest.mark.mergekit
@pytest.mark.parametrize(
    "method, dtype, times",
    [
        ("ties", "bfloat16", 10),
        ("dare_ties", "float32", 10),
        ("dare_ties", "bfloat16", 8),  # 1/10.7 on one machine and 1/8.5 on another: see README.md
        ("linear", "bfloat16", 2),
        ("slerp", "bfloat16", 2),
    ],
)
def test_cpu_time_beside_mergekit(method: str, dtype: str, times: int, mergekit_python: Path) -> None:
    runs = "3" if method == "dare_ties" else "1"  # the others are far from their targets
    run(
        "bench_mergekit.py", "--mergekit", str(mergekit_python), "--methods", method, "--dtype", dtype,
        "--runs", runs, "--times", str(times),
    )  # fmt: skip


def test_cpu_time_of_svd_beside_peft() -> None:
    run("bench_svd.py", "--layers", "2", "--runs", "1")


@pytest.mark.parametrize("memory", ["64MB", "256MB"])
@pytest.mark.parametrize("method", ["linear", "ties"])
def test_memory_stays_within_its_bound(method: str, memory: str) -> None:
    run("bench_memory.py", "--method", method, "--memory", memory)


def test_what_a_unit_costs_the_driver() -> None:
    """100,000 units that do nothing: at most a millisecond each, in bounded memory."""
    run("-m", "tests.benchmarks.bench_driver")


def test_what_a_unit_costs_the_driver_on_ray() -> None:
    run("-m", "tests.benchmarks.bench_driver", "--on", "ray", "--units", "10000")
