"""What the manifest can say and raymerge cannot do yet, refused by name. Building one means deleting its line."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from merger.errors import Problem


@dataclass(frozen=True, slots=True)
class Later:
    """One row: values at `path` for which `refuses` holds."""

    path: str
    """Dotted; `[]` stands for every entry of a list."""
    refuses: Callable[[Any], bool]
    what: str
    """`{}` stands for the value."""
    why: str
    fix: str


def _always(_: Any) -> bool:
    return True


_OVERRIDE_WHY: Final = "raymerge reads the tensors that a checkpoint has and needs no architecture name"

LATER: Final = (
    Later("base_model.override_architecture", _always, "`override_architecture` is not supported", _OVERRIDE_WHY,
          "drop it"),
    Later("models[].model.override_architecture", _always, "`override_architecture` is not supported", _OVERRIDE_WHY,
          "drop it"),
    Later("slices[].sources[].model.override_architecture", _always, "`override_architecture` is not supported",
          _OVERRIDE_WHY, "drop it"),
)  # fmt: skip


def find_later(data: Mapping[str, Any], where: Callable[[str], str]) -> list[Problem]:
    """Everything in a manifest that a later version does. An absent or empty key asks for nothing."""
    return [
        Problem("not-yet", row.what.replace("{}", _spell(value)), where(path), row.why, row.fix)
        for row in LATER
        for path, value in _find(data, row.path.split("."), "")
        if value is not None and row.refuses(value)
    ]


def _spell(value: object) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _find(value: Any, steps: list[str], path: str) -> Iterator[tuple[str, Any]]:
    if not steps:
        yield path, value
        return
    key = steps[0].removesuffix("[]")
    if not isinstance(value, Mapping) or key not in value:
        return
    found, path = value[key], f"{path}.{key}" if path else key
    if not steps[0].endswith("[]"):
        yield from _find(found, steps[1:], path)
    elif isinstance(found, list):
        for index, item in enumerate(found):
            yield from _find(item, steps[1:], f"{path}[{index}]")
