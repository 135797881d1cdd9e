"""Adapters whose modules have other names than their base's tensors: `renamed_targets`.

A module's name and its tensor's name on disk part ways when a model is loaded under another head (`h.0` and
`transformer.h.0`), when a release moves modules (vision–language models), and when a checkpoint keeps its old names.
Tried only where names do not fit as they are, and only for all of an adapter's lost modules at once:

    one change of prefix    the same for all of them, and the only one of its length that fits names and shapes
    transformers' tables    the renamings of the base's architecture, applied to both sides

The tables cost an import of transformers (seconds, 300 MB), so they come last; where it cannot be imported they are not
tried. What was taken for what is said in the report.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

Fits = Callable[[str, str], bool]
"""Whether a module that is lost under the first name would fit the base's tensor of the second."""


def renamed_targets(
    lost: Sequence[str], names: Iterable[str], fits: Fits, architectures: Sequence[str], model_type: str
) -> dict[str, str] | None:
    """The base's tensor of every lost one, or None where they cannot all be told."""
    held = set(names)
    return _by_prefix(lost, held, fits) or _by_tables(lost, held, fits, architectures, model_type)


def _by_prefix(lost: Sequence[str], names: set[str], fits: Fits) -> dict[str, str] | None:
    by_length: dict[int, set[tuple[str, str]]] = {}
    first = lost[0]
    leaf = "." + ".".join(first.split(".")[-2:])
    for name in names:
        if f".{name}".endswith(leaf):
            length = _common_suffix(first, name)
            by_length.setdefault(length, set()).add((first[: len(first) - length], name[: len(name) - length]))
    for length in sorted(by_length, reverse=True):
        found = []
        for old, new in by_length[length]:
            made = {target: new + target.removeprefix(old) for target in lost if target.startswith(old)}
            if len(made) == len(lost) and all(name in names and fits(t, name) for t, name in made.items()):
                found.append(made)
        if found:
            return found[0] if len(found) == 1 else None
    return None


def _common_suffix(a: str, b: str) -> int:
    """Characters of the longest common ending that begins after a dot, or is one of them whole."""
    length, parts = 0, list(zip(reversed(a.split(".")), reversed(b.split(".")), strict=False))
    for x, y in parts:
        if x != y:
            break
        length += len(x) + 1
    return min(length, len(a), len(b))


def _by_tables(
    lost: Sequence[str], names: set[str], fits: Fits, architectures: Sequence[str], model_type: str
) -> dict[str, str] | None:
    renamings = _renamings(architectures, model_type)
    if not renamings:
        return None
    by_new: dict[str, str] = {}
    for name in sorted(names):
        by_new.setdefault(_renamed(name, renamings), name)
    made = {}
    for target in lost:
        held = by_new.get(target, by_new.get(_renamed(target, renamings)))
        if held is None or not fits(target, held):
            return None
        made[target] = held
    return made if len(set(made.values())) == len(made) else None


def _renamings(architectures: Sequence[str], model_type: str) -> list[Any]:
    """The renamings of a checkpoint's tensors that transformers does on loading it."""
    try:
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping
        from transformers.core_model_loading import WeightRenaming
    except ImportError:
        return []
    for known in (*architectures, model_type):
        table = get_checkpoint_conversion_mapping(known)  # type: ignore[no-untyped-call]
        if table:
            return [entry for entry in table if type(entry) is WeightRenaming]
    return []


def _renamed(name: str, renamings: Sequence[Any]) -> str:
    for renaming in renamings:
        name = str(renaming.rename_source_key(name)[0])
    return name


def told(made: Mapping[str, str]) -> str:
    """One renaming of many, for people."""
    target, name = next(iter(sorted(made.items())))
    return f"{len(made)} module(s) are found under other names, for example {target} as {name}"
