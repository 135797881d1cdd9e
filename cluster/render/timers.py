"""Schedules on one machine: a crontab, or a systemd timer and its service."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from merger.manifest import Schedule
from merger.manifest.schedule import FIELDS, Cron, parse_cron

_WEEKDAYS: Final = ("Sun", "Mon", "Tue", "Wed", "Thu", "Fri", "Sat")


@dataclass(frozen=True, slots=True)
class Timer:
    """What runs when, on this machine."""

    name: str
    schedule: Schedule
    command: tuple[str, ...]
    folder: str
    """The working directory: relative paths in the manifest start there."""


def crontab(timer: Timer) -> str:
    """Lines for `crontab -`."""
    command = shlex.join(timer.command).replace("%", r"\%")  # cron reads a bare % as a line break
    state = '"$HOME"/.local/state/raymerge'
    folder = shlex.quote(timer.folder).replace("%", r"\%")
    alone = f"flock -n {state}/{timer.name}.lock {command} >>{state}/{timer.name}.log 2>&1"
    command = f"mkdir -p {state} && cd {folder} && {alone}"
    return "\n".join(
        (
            "# CRON_TZ is known to cronie. Other crons keep the machine's own time: there, set that, or use systemd.",
            "# Secrets come from the environment of this crontab's user: a profile, a mounted file, never this line.",
            "# A tick that finds the last one at work is left out (flock); one that finds nothing new does nothing.",
            f"CRON_TZ={timer.schedule.timezone}",
            f"{timer.schedule.cron} {command}",
            "",
        )
    )


def systemd_service(timer: Timer) -> str:
    """What the timer starts. A unit that runs is not started again: ticks never overlap."""
    command = " ".join(_systemd_word(word) for word in timer.command)
    return "\n".join(
        (
            "[Unit]",
            f"Description=raymerge: {timer.name}",
            "Wants=network-online.target",
            "After=network-online.target",
            "",
            "[Service]",
            "Type=oneshot",
            f"WorkingDirectory={timer.folder.replace('%', '%%')}",
            f"ExecStart={command}",
            "# Secrets: NAME=VALUE lines in a file of root's own (mode 0600). It may be missing.",
            f"EnvironmentFile=-/etc/raymerge/{timer.name}.env",
            "# 75 is worth a retry; what failed, cannot start or finds something else in place is not.",
            "Restart=on-failure",
            "RestartPreventExitStatus=1 2 3",
            "RestartSec=300",
            "# SIGTERM lets the units under way end; the same command resumes.",
            "TimeoutStopSec=120",
            "NoNewPrivileges=true",
            "PrivateTmp=true",
            "ProtectKernelTunables=true",
            "ProtectControlGroups=true",
            "RestrictSUIDSGID=true",
            "",
        )
    )


def systemd_timer(timer: Timer) -> str:
    """When. A tick that the machine slept through is made up for, once."""
    return "\n".join(
        (
            "[Unit]",
            f"Description=raymerge: {timer.name}, {timer.schedule.cron} {timer.schedule.timezone}",
            "",
            "[Timer]",
            f"OnCalendar={calendar_of(parse_cron(timer.schedule.cron))} {timer.schedule.timezone}",
            "Persistent=true",
            "AccuracySec=1min",
            "",
            "[Install]",
            "WantedBy=timers.target",
            "",
        )
    )


def calendar_of(cron: Cron) -> str:
    """systemd's spelling of a schedule. Raises ValueError where it has none."""
    if not cron.open_days and not cron.open_weekdays:
        raise ValueError("cron runs on either of the day of the month and the weekday, systemd on both at once")
    days = "" if cron.open_weekdays else ",".join(_WEEKDAYS[day] for day in cron.weekdays)
    minute, hour, day, month, _ = FIELDS
    date = f"*-{_part(cron.months, month.span)}-{_part(cron.days, day.span)}"
    time = f"{_part(cron.hours, hour.span)}:{_part(cron.minutes, minute.span)}:00"
    return " ".join(part for part in (days, date, time) if part)


def _part(values: Sequence[int], span: range) -> str:
    return "*" if len(values) == len(span) else ",".join(f"{value:02d}" for value in values)


def _systemd_word(word: str) -> str:
    """Quoted for ExecStart, where % and $ mean something."""
    quoted = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return f'"{quoted}"' if any(c in word for c in " \t'\";") else quoted
