"""Schedules on one machine, against systemd itself where it is installed."""

from __future__ import annotations

import datetime as dt
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from cluster.render.timers import Timer, calendar_of, crontab, systemd_service, systemd_timer
from merger.manifest import Schedule
from merger.manifest.schedule import Cron, parse_cron

needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")


def timer(cron: str = "30 2 * * 1-5", path: str = "/data/night's 100%.yaml") -> Timer:
    return Timer(
        "nightly", Schedule(cron=cron, timezone="Europe/Berlin"), ("/opt/r/bin/raymerge", "bulk", path), "/data/of 1%"
    )


def fires(cron: Cron, at: dt.datetime) -> bool:
    """Whether cron runs at a minute, by the rule of its manual."""
    day, week = at.day in cron.days, at.isoweekday() % 7 in cron.weekdays
    either = (day or week) if not cron.open_days and not cron.open_weekdays else (day and week)
    return at.minute in cron.minutes and at.hour in cron.hours and at.month in cron.months and either


def next_ticks(cron: Cron, after: dt.datetime, count: int) -> list[dt.datetime]:
    found: list[dt.datetime] = []
    day = after.replace(hour=0, minute=0)
    while len(found) < count:
        for hour in cron.hours:
            for minute in cron.minutes:
                at = day.replace(hour=hour, minute=minute)
                if at > after and fires(cron, at):
                    found.append(at)
        day += dt.timedelta(days=1)
    return found[:count]


@needs_systemd
@pytest.mark.parametrize(
    "text",
    [
        "0 3 * * *",
        "*/20 * * * *",
        "30 2 * * 1-5",
        "0 0 1,15 * *",
        "15 4 * * 0",
        "5-59/25 0-6/3 * feb-apr *",
        "0 0 29 2 *",
    ],
)
def test_systemd_runs_when_cron_would(text: str) -> None:
    start = dt.datetime(2027, 1, 1, 0, 0, tzinfo=dt.UTC)
    line = ["systemd-analyze", "calendar", "--iterations=5", "--base-time=2027-01-01 00:00:00 UTC"]
    done = subprocess.run(
        [*line, f"{calendar_of(parse_cron(text))} UTC"], capture_output=True, text=True, check=True,
        env={"TZ": "UTC", "LC_ALL": "C"},
    )  # fmt: skip
    shown = re.findall(
        r"(?:Next elapse|Iter\. #\d+|Iteration #\d+): \w+ (\d{4}-\d\d-\d\d \d\d:\d\d):00 UTC", done.stdout
    )
    assert shown == [f"{at:%Y-%m-%d %H:%M}" for at in next_ticks(parse_cron(text), start, 5)]


@needs_systemd
def test_systemd_takes_the_units(tmp_path: Path) -> None:
    script = tmp_path / "raymerge with spaces"
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)
    made = Timer("nightly", timer().schedule, (str(script), "bulk", "/data/night's 100%.yaml", "$HOME"), str(tmp_path))
    (tmp_path / "nightly.service").write_text(systemd_service(made))
    (tmp_path / "nightly.timer").write_text(systemd_timer(made))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(tmp_path / "nightly.timer"), str(tmp_path / "nightly.service")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    ours = [line for line in done.stderr.splitlines() if "nightly" in line]
    assert not ours, done.stderr


def test_what_systemd_cannot_say_is_refused() -> None:
    with pytest.raises(ValueError, match="either"):
        calendar_of(parse_cron("0 0 1 * 1"))


def test_a_crontab_keeps_what_cron_would_take_apart() -> None:
    text = crontab(timer())
    assert "CRON_TZ=Europe/Berlin" in text
    (line,) = [line for line in text.splitlines() if line.startswith("30 2 * * 1-5 ")]
    assert not re.search(r"(?<!\\)%", line)
    command = shlex.split(line.removeprefix("30 2 * * 1-5 ").replace(r"\%", "%"))
    assert command[command.index("cd") + 1] == "/data/of 1%"
    assert command[command.index("flock") : command.index("flock") + 6] == [
        "flock", "-n", "$HOME/.local/state/raymerge/nightly.lock", "/opt/r/bin/raymerge", "bulk",
        "/data/night's 100%.yaml",
    ]  # fmt: skip


def test_a_crontab_line_runs_and_leaves_out_what_overlaps(tmp_path: Path) -> None:
    if shutil.which("flock") is None:
        pytest.skip("flock is not installed")
    made = Timer("n", timer().schedule, ("/bin/sh", "-c", "echo 100% >> ran; sleep 1"), str(tmp_path))
    (line,) = [line for line in crontab(made).splitlines() if line.startswith("30 2")]
    shell = ["/bin/sh", "-c", line.removeprefix("30 2 * * 1-5 ").replace(r"\%", "%")]
    first = subprocess.Popen(shell, env={"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"})
    while not (tmp_path / "ran").exists():
        assert first.poll() is None
    second = subprocess.run(shell, env={"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}, check=False)
    assert second.returncode == 1
    assert first.wait() == 0
    assert (tmp_path / "ran").read_text() == "100%\n"
