"""`space`, `prepare`, `combine`, `finish`: a method written out in its blocks, checked and brought to its normal form.

    prepare: {trim: {density: 0.2}}        →  prepare: trim     parameters: {density: 0.2, lambda: 0.7}
    combine: {elect: {}}                      combine: elect
    finish: {lambda: 0.7}

So a source may have a value of its own for a block's parameter, in its `parameters`, as under a named method.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

from merger.errors import nearest
from merger.manifest.documents import join_path
from merger.manifest.parameters import ParameterValueError, parse_parameter_value
from merger.methods import METHODS, MethodSpec, ParameterSpec
from merger.methods.compose import (
    SPACES,
    Blocks,
    CompositionError,
    combine_blocks,
    compose,
    finish_blocks,
    prepare_blocks,
)

BLOCK_KEYS: Final = ("prepare", "combine", "finish")
Refuse = Callable[..., None]
"""refuse(code, what, path, why, fix)."""


def has_blocks(data: Mapping[str, Any]) -> bool:
    """Whether a manifest writes its method out."""
    return any(data.get(key) is not None for key in BLOCK_KEYS)


def check_space(data: Mapping[str, Any], refuse: Refuse) -> None:
    """`space` beside a name: it must be one that the named method can be told to work in."""
    space, name = data.get("space"), data.get("merge_method")
    if not isinstance(space, str):
        return
    if data.get("combination_type") is not None:
        refuse("conflict", "space and combination_type are both given", "space",
               "each of PEFT's types has its own space", "drop space, or use a merge_method")  # fmt: skip
        return
    spec = METHODS.get(name) if isinstance(name, str) else None
    if spec is None:
        return
    if space not in spec.spaces:
        known = " or ".join(spec.spaces)
        refuse("bad-value", f"{spec.name} does not work in {space}", "space",
               "a method works where it was made for", f"write {known}, or leave it out")  # fmt: skip
    elif {"weight", "delta"} <= set(spec.spaces):
        refuse("conflict", f"{spec.name} needs no space", "space",
               "it averages weights for models and deltas for adapters, which is the same", "drop it")  # fmt: skip


def read_blocks(data: dict[str, Any], refuse: Refuse) -> MethodSpec | None:
    """The method that the blocks make, or None where `refuse` was told why not. `data` is normalised in place."""
    for key in ("merge_method", "combination_type"):
        if data.get(key) is not None:
            first = next(k for k in BLOCK_KEYS if data.get(k) is not None)
            refuse("conflict", f"{key} and {first} are both given", first,
                   f"{key} names a method, and {first} writes one out", "keep one of them")  # fmt: skip
            for block in BLOCK_KEYS:
                data.pop(block, None)
            return None
    prepare = _one(data, "prepare", prepare_blocks(), refuse, needed=False)
    combine = _one(data, "combine", combine_blocks(), refuse, needed=True)
    finished = _finish(data, refuse)
    if prepare is False or combine is False or not finished:
        return None
    space = data.get("space")
    if space is not None and space not in SPACES:
        return None  # a wrong word is the grammar's business
    try:
        return compose(Blocks(space, prepare if isinstance(prepare, str) else None, str(combine)))
    except CompositionError as error:
        refuse("conflict", error.what, error.key, error.why, error.fix)
        return None


def _one(
    data: dict[str, Any], key: str, known: Mapping[str, tuple[ParameterSpec, ...]], refuse: Refuse, *, needed: bool
) -> str | bool | None:
    """The one step under a key, its values taken to `parameters`; None where there is none, False where it is wrong."""
    value = data.get(key)
    if value is None:
        if needed:
            refuse("missing-key", "there is no combine", key, "it says how the prepared sources become one",
                   f"add combine: {{sum: {{}}}}, or another of {', '.join(known)}")  # fmt: skip
            return False
        return None
    written = {value: None} if isinstance(value, str) else value
    data.pop(key)
    if not isinstance(written, Mapping) or len(written) != 1:
        refuse("bad-value", f"{key} is one step", key, f"it is one name with its parameters, as in {key}: "
               f"{{{next(iter(known))}: {{}}}}", f"write one of {', '.join(known)}")  # fmt: skip
        return False
    [(name, values)] = written.items()
    if name not in known:
        near = nearest(str(name), known)
        refuse("bad-value", f"{name!r} is no step of {key}", join_path(key, name), "",
               f"did you mean {near}?" if near else f"write one of {', '.join(known)}")  # fmt: skip
        return False
    data[key] = name
    if values is None:
        return str(name)
    if not isinstance(values, Mapping):
        refuse("bad-value", f"the parameters of {name} are a mapping", join_path(key, name), "",
               f"write {key}: {{{name}: {{…}}}}")  # fmt: skip
        return False
    return str(name) if _take(data, values, join_path(key, name), known[name], refuse, f"{name} has") else False


def _finish(data: dict[str, Any], refuse: Refuse) -> bool:
    value = data.pop("finish", None)
    if value is None:
        return True
    if not isinstance(value, Mapping):
        refuse("bad-value", "finish is a mapping of steps to values", "finish", "", "write finish: {lambda: 0.7}")
        return False
    return _take(data, value, "finish", finish_blocks(), refuse, "finish has")


def _take(
    data: dict[str, Any], values: Mapping[str, Any], path: str, specs: Iterable[ParameterSpec], refuse: Refuse,
    owner: str,
) -> bool:  # fmt: skip
    """Values of a block's parameters, checked, into the outer `parameters`."""
    by_name = {spec.name: spec for spec in specs}
    outer = data.get("parameters")
    good = True
    for name, value in values.items():
        at = join_path(path, name)
        spec = by_name.get(name)
        if spec is None:
            near = nearest(str(name), by_name)
            known = f"its parameters are {', '.join(by_name)}" if by_name else "it has none"
            refuse("unknown-key", f"{owner} no parameter {name!r}", at, "", f"did you mean {near}?" if near else known)
            good = False
            continue
        if value is None:
            continue
        if isinstance(outer, Mapping) and outer.get(name) is not None:
            refuse("conflict", f"{name} is given twice", at, f"parameters.{name} is given too", "keep one of them")
            good = False
            continue
        try:
            parsed = parse_parameter_value(value, spec)
        except ParameterValueError as error:
            good = False
            for below, message, is_bounds in error.places:
                fix = f"give a value in {spec.bounds()}" if is_bounds else ""
                refuse("out-of-bounds" if is_bounds else "bad-value", message, at + below, spec.doc, fix)
            continue
        if outer is None:
            outer = data["parameters"] = {}
        if isinstance(outer, dict):
            outer[name] = parsed
    return good
