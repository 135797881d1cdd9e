"""JSON that came from an input, read strictly: one object, UTF-8, every key once, no NaN. No IO here."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from merger.errors import SourceError


class _RefusedError(ValueError):
    """A code and a sentence, on their way out of the JSON decoder."""

    def __init__(self, code: str, what: str) -> None:
        super().__init__(what)
        self.code = code
        self.what = what


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _RefusedError("duplicate-name", f"the key {key!r} occurs twice in one object")
            seen.add(key)
    return found


def _no_constant(text: str) -> float:
    raise _RefusedError("json-constant", f"{text} is not JSON")


def parse_json_object(
    data: bytes, where: str, *, code: str = "bad-json", parse_int: Callable[[str], int] | None = None
) -> dict[str, Any]:
    """A JSON object from its bytes.

    Raises SourceError: `code` for what is not one UTF-8 JSON object, `duplicate-name`, `json-constant` for NaN and
    infinities. `parse_int` replaces the reading of integers; it may raise ValueError.
    """

    def refuse(which: str, what: str, why: str = "") -> SourceError:
        return SourceError.of(which, what, where=where, why=why, fix="fetch the file again, or mend it at its source")

    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise refuse(code, f"byte {error.start} is not UTF-8", "JSON files are UTF-8") from None
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant, parse_int=parse_int)
        if b"\\u" in data:  # an escaped lone surrogate is a string that can never be written again
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except _RefusedError as error:
        raise refuse(error.code, error.what, "readers differ in which of them they take") from None
    except UnicodeEncodeError:
        raise refuse(code, "a string holds half a surrogate pair") from None
    except RecursionError:
        raise refuse(code, "the JSON is nested too deeply") from None
    except ValueError as error:
        raise refuse(code, f"it is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise refuse(code, f"it holds a JSON {type(value).__name__} where an object belongs")
    return value
