"""Adapters whose modules have other names than their base's tensors: `renamed_targets`.

A module's name and its tensor's name on disk part ways when a model is loaded under another head (`h.0` and
`transformer.h.0`), when a release moves modules (vision–language models), and when a checkpoint keeps its old names.
Tried only where names do not fit as they are, and only for all of an adapter's lost modules at once:

    one change of prefix    the same for all of them, and the only one of its length that fits names and shapes
    transformers' tables    the renamings of the base's architecture, applied to both sides

Which tables hold for which part of a model (a vision tower has its own) is known to its class. So the class is built
from the config without a tensor, on torch's meta device, and asked; where it cannot be, the architecture's own table
serves. The tables cost an import of transformers (seconds, 300 MB), so they come last; where it cannot be imported they
are not tried. What was taken for what is said in the report.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

Fits = Callable[[str, str], bool]
"""Whether a module that is lost under the first name would fit the base's tensor of the second."""


def renamed_targets(
    lost: Sequence[str], names: Iterable[str], fits: Fits, config: Mapping[str, Any]
) -> dict[str, str] | None:
    """The base's tensor of every lost one, or None where they cannot all be told. `config` is the base's."""
    held = set(names)
    return _by_prefix(lost, held, fits) or _by_tables(lost, held, fits, config)


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


def _by_tables(lost: Sequence[str], names: set[str], fits: Fits, config: Mapping[str, Any]) -> dict[str, str] | None:
    for rename in (_as_loaded(config, len(names)), _by_architecture(config)):
        if rename is None:
            continue
        by_new: dict[str, str] = {}
        for name in sorted(names):
            by_new.setdefault(rename(name), name)
        made = {target: by_new.get(target, by_new.get(rename(target), "")) for target in lost}
        if all(held and fits(target, held) for target, held in made.items()) and len(set(made.values())) == len(made):
            return made
    return None


_COUNT: Final = re.compile(r"(?!max_)(?:.*_)?(?:layers?|depth|experts)")
"""Keys of a config that say how many parts a class makes."""


def _within(config: Mapping[str, Any], most: int) -> bool:
    """Whether a config asks for no more parts than its files have tensors: what is built from it is then no larger."""
    return all(
        _within(value, most) if isinstance(value, Mapping)
        else not (isinstance(value, int) and _COUNT.fullmatch(str(key)) and value > most)
        for key, value in config.items()
    )  # fmt: skip


def _as_loaded(config: Mapping[str, Any], tensors: int) -> Callable[[str], str] | None:
    """What transformers calls a checkpoint's tensor once it is loaded, by the tables of all parts of the model."""
    if not _within(config, tensors):
        return None
    try:
        import torch
        import transformers
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key
    except ImportError:
        return None
    names = [str(name) for name in config.get("architectures") or ()]
    architecture = getattr(transformers, names[0], None) if names else None
    if architecture is None:
        return None
    try:  # whatever a config makes its class raise, it is no table
        with torch.device("meta"):
            read = transformers.AutoConfig.for_model(**{k: v for k, v in config.items() if k != "quantization_config"})
            model = architecture(read)
        table = get_model_conversion_mapping(model)
    except Exception:  # noqa: BLE001 - a class may raise anything for a config that is not its own
        return None
    renamings = [entry for entry in table if isinstance(entry, WeightRenaming)]
    held = dict.fromkeys((*dict(model.named_parameters()), *dict(model.named_buffers())), True)

    def rename(name: str) -> str:
        return str(rename_source_key(name, renamings, [], model.base_model_prefix, held)[0])

    return rename


def _by_architecture(config: Mapping[str, Any]) -> Callable[[str], str] | None:
    """The renamings of the architecture alone."""
    try:
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping
        from transformers.core_model_loading import WeightRenaming
    except ImportError:
        return None
    for known in (*map(str, config.get("architectures") or ()), str(config.get("model_type") or "")):
        table = get_checkpoint_conversion_mapping(known)  # type: ignore[no-untyped-call]
        renamings = [entry for entry in table or () if type(entry) is WeightRenaming]
        if renamings:
            return lambda name, chain=renamings: _renamed(name, chain)  # type: ignore[misc]
    return None


def _renamed(name: str, renamings: Sequence[Any]) -> str:
    for renaming in renamings:
        name = str(renaming.rename_source_key(name)[0])
    return name


def told(made: Mapping[str, str]) -> str:
    """One renaming of many, for people."""
    target, name = next(iter(sorted(made.items())))
    return f"{len(made)} module(s) are found under other names, for example {target} as {name}"
