"""Plain values with comments, as YAML that reads back as the same values."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import yaml

WIDTH: Final = 100


@dataclass(frozen=True, slots=True)
class Noted:
    """A value, and what is said above it."""

    value: Any
    note: str


def plain(value: Any) -> Any:
    """The value without its comments."""
    if isinstance(value, Noted):
        return plain(value.value)
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(item) for item in value]
    return value


def as_yaml(value: Mapping[str, Any], *, note: str = "") -> str:
    """One document: `note` first, then the mapping with its comments."""
    return "".join(f"{line}\n" for line in (*_comment(note, ""), *_mapping(value, "")))


def _comment(note: str, indent: str) -> Iterator[str]:
    for line in note.splitlines():
        for part in textwrap.wrap(line, WIDTH - len(indent), break_long_words=False, break_on_hyphens=False) or [""]:
            yield f"{indent}# {part}".rstrip()


def _mapping(value: Mapping[str, Any], indent: str) -> Iterator[str]:
    for key, item in value.items():
        if isinstance(item, Noted):
            yield from _comment(item.note, indent)
            item = item.value  # noqa: PLW2901 - the rest is about the value
        yield from _entry(f"{indent}{_scalar(key)}:", item, indent)


def _entry(lead: str, item: Any, indent: str) -> Iterator[str]:
    """`lead` is the key and its colon, or the dash of a list."""
    if isinstance(item, Mapping) and item:
        yield lead
        yield from _mapping(item, f"{indent}  ")
    elif isinstance(item, Sequence) and not isinstance(item, str) and item:
        yield lead
        for element in item:
            yield from _element(element, f"{indent}  ")
    elif isinstance(item, str) and "\n" in item and _may_be_block(item):
        yield f"{lead} |{'' if item.endswith(chr(10)) else '-'}"
        for line in item.removesuffix("\n").split("\n"):
            yield f"{indent}  {line}".rstrip() if not line else f"{indent}  {line}"
    else:
        yield f"{lead} {_scalar(item)}"


def _element(item: Any, indent: str) -> Iterator[str]:
    if isinstance(item, Noted):
        yield from _comment(item.note, indent)
        item = item.value
    if isinstance(item, Mapping) and item:
        rows = list(_mapping(item, f"{indent}  "))
        first = next(i for i, row in enumerate(rows) if not row.lstrip().startswith("#"))
        yield from rows[:first]
        yield f"{indent}- {rows[first].lstrip()}"
        yield from rows[first + 1 :]
    else:
        yield from _entry(f"{indent}-", item, indent)


def _may_be_block(text: str) -> bool:
    """Whether a literal block gives the text back: one line break at its end at the most, none of YAML's own signs."""
    return not text.startswith((" ", "\n")) and not text.endswith("\n\n") and all(
        c.isprintable() or c == "\n" for c in text
    )  # fmt: skip


def _scalar(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "[]"
    style = '"' if isinstance(value, str) and not value.isprintable() else None  # on one line, whatever is in it
    written: str = yaml.safe_dump(
        value, default_flow_style=True, default_style=style, width=1 << 20, allow_unicode=True
    )
    return written.removesuffix("\n").removesuffix("\n...")
