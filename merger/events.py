"""What happens in a run that people may want to know later: events, each said once, to a log and beside the output.

Event       what happened, as a sentence and as facts
EventLog    the first and the last of them, and how many there were of each kind
say         pass an event on to Python's logging
scrubbed    a text without what only its reader should know: signatures, tokens, passwords
"""

from __future__ import annotations

import json
import logging
import os
import re
import time
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from merger.errors import escape

FIRST: Final = 100
LAST: Final = 400
"""Events that are kept: so many of the first, and so many of the last."""
TEXT_LIMIT: Final = 2000
"""Characters of one text."""

Fact = str | int | float | None

_log = logging.getLogger("raymerge.run")


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened."""

    kind: str
    """One word of a small set: worker-ready, unit-again, …"""
    text: str
    facts: Mapping[str, Fact] = field(default_factory=dict)
    """What is known of it, by name: worker, node, unit, tensor, …"""
    warning: bool = False
    """Whether people should see it at once."""
    at: float = field(default_factory=time.time)
    """Seconds since the epoch."""

    def as_json(self) -> dict[str, Fact]:
        """One flat document, safe to show."""
        facts = {name: shown(value) for name, value in self.facts.items()}
        return {"time": stamp(self.at), "event": self.kind, "text": shown(self.text), **facts}


class Announce(Protocol):
    """Somebody who is told of events. Called from the thread of the loop."""

    def __call__(self, event: Event, /) -> None: ...


def stamp(at: float) -> str:
    """A time in UTC, to the millisecond: 2026-11-29T10:20:30.123Z."""
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(at)) + f".{int(at * 1000) % 1000:03d}Z"


def say(event: Event) -> None:
    """Pass an event on to Python's logging, its facts as fields of their own."""
    level = logging.WARNING if event.warning else logging.INFO
    if _log.isEnabledFor(level):
        _log.log(level, "%s", event.text, extra={"raymerge": {"event": event.kind, **event.facts}})


class EventLog:
    """The first and the last events of a run. Bounded, however long the run is."""

    def __init__(self) -> None:
        self._first: list[str] = []
        self._last: deque[str] = deque(maxlen=LAST)
        self.counts: Counter[str] = Counter()

    def add(self, event: Event) -> None:
        self.counts[event.kind] += 1
        line = json.dumps(event.as_json(), ensure_ascii=False)
        (self._first if len(self._first) < FIRST else self._last).append(line)

    def lines(self) -> list[str]:
        """JSON lines, oldest first; one of them says how many are missing in between."""
        missing = self.counts.total() - len(self._first) - len(self._last)
        between = [json.dumps({"event": "left-out", "count": missing})] if missing else []
        return [*self._first, *between, *self._last]


# ---- what is safe to show --------------------------------------------------------------------------------------------

_HIDDEN: Final = "[hidden]"
_QUERY: Final = re.compile(r"(?<=[A-Za-z0-9/])\?[^\s\"'<>]*=[^\s\"'<>]*")
_USER: Final = re.compile(r"(?<=://)[^/\s@]+@")
_NAMED: Final = re.compile(
    r"(?i)\b((?:authorization|x-amz-[a-z-]*|[a-z_-]*(?:token|secret|password|api_?key|access_?key(?:_?id)?|signature))"
    r"['\"]?\s*[:=]\s*['\"]?)(?:(?:bearer|basic)\s+)?[^\s'\"&,;]+"
)
_BEARER: Final = re.compile(r"(?i)\b(bearer|basic)\s+[A-Za-z0-9._~+/=-]{8,}")
_TOKEN: Final = re.compile(r"\b(?:hf_[A-Za-z0-9]{8,}|(?:AKIA|ASIA)[A-Z0-9]{16})\b")
_VARIABLES: Final = (
    "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN",
    "RAY_AUTH_TOKEN",
)  # fmt: skip
"""Variables whose values never stand in a text of ours."""


def scrubbed(text: str) -> str:
    """A text without the queries of URLs (they may be signed), what stands before an @ in them, what is named a token,
    a secret or a password, and the values of the variables that hold credentials here."""
    for name in _VARIABLES:
        value = os.environ.get(name, "")
        if len(value) >= 8:
            text = text.replace(value, _HIDDEN)
    text = _QUERY.sub(f"?{_HIDDEN}", text)
    text = _USER.sub(f"{_HIDDEN}@", text)
    text = _BEARER.sub(rf"\1 {_HIDDEN}", text)
    text = _TOKEN.sub(_HIDDEN, text)
    return _NAMED.sub(rf"\1{_HIDDEN}", text)


def shown(value: Any) -> Fact:
    """A fact as it may stand in a file or on a terminal: scrubbed, escaped, of bounded length."""
    if value is None or isinstance(value, int | float):
        return value
    text = scrubbed(str(value))
    text = escape(" ".join(text.split())) if "\n" in text else escape(text)
    return text if len(text) <= TEXT_LIMIT else f"{text[:TEXT_LIMIT]}…"
