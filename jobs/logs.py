"""Python's logging on standard error: plain lines for people, or one JSON document a line for machines.

`raymerge` is the logger; a record's facts (run, unit, tensor, worker, …) are in its `raymerge` attribute. Strings are
escaped, and scrubbed of signatures, tokens and passwords (merger.events.shown) whatever they came from.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import traceback
from typing import Final, Literal, TextIO, get_args

from merger.errors import ManifestError
from merger.events import shown, stamp

LogFormat = Literal["plain", "json"]
VARIABLE: Final = "RAYMERGE_LOG_FORMAT"
LOGGER: Final = "raymerge"


class JsonFormatter(logging.Formatter):
    """One JSON document: time, level, logger, text, and the facts of the record."""

    def format(self, record: logging.LogRecord) -> str:
        facts = getattr(record, "raymerge", {})
        document = {
            "time": stamp(record.created), "level": record.levelname.lower(), "logger": record.name,
            "text": shown(record.getMessage()), **{str(name): shown(value) for name, value in facts.items()},
        }  # fmt: skip
        if record.exc_info:
            document["exception"] = shown("".join(traceback.format_exception(*record.exc_info)))
        return json.dumps(document, ensure_ascii=False)


class PlainFormatter(logging.Formatter):
    """The level and the text."""

    def format(self, record: logging.LogRecord) -> str:
        return f"{record.levelname.lower()} {shown(record.getMessage())}"


class _StandardError(logging.StreamHandler[TextIO]):
    """Writes to what standard error is now, not to what it was when this was made."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def configure(asked: str | None = None) -> LogFormat:
    """Send the log to standard error in the format that is asked for, by default the environment's.

    Raises ManifestError(code `bad-arguments`).
    """
    word = asked or os.environ.get(VARIABLE) or "plain"
    if word not in get_args(LogFormat):
        raise ManifestError.of(
            "bad-arguments", f"{word!r} is no format of logs", where="--log-format" if asked else VARIABLE,
            why="there are plain lines and JSON", fix="use plain or json",
        )  # fmt: skip
    handler = _StandardError()
    handler.setFormatter(JsonFormatter() if word == "json" else PlainFormatter())
    logger = logging.getLogger(LOGGER)
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO if word == "json" else logging.WARNING)
    logger.propagate = False
    return "json" if word == "json" else "plain"


def structured() -> bool:
    """Whether standard error holds JSON documents now, and nothing else."""
    return any(isinstance(handler.formatter, JsonFormatter) for handler in logging.getLogger(LOGGER).handlers)
