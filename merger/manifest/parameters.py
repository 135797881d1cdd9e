"""Parameter values that vary over a model, with mergekit's rules (0.1.5, `config.py`, `parameter_resolver.py`).

A value is a scalar, a gradient (a list of scalars), `{value, filter}`, or a list of those. Rules:

- a filter is a substring of the tensor's name; `*` or none matches always; the first clause that matches decides;
- no clause matches: the next scope is asked (source → slice → module → manifest), then the default;
- a gradient is piecewise linear over equally spaced anchors. With n layers in an output slice, layer i is at
  t = i / (n - 1) (`layer_position`); a slice of one layer is at t = 1; what belongs to no layer is at t = 0;
- anchors that are not numbers are not mixed: t picks `anchors[int(t * (len - 1))]`. So do whole numbers of a parameter
  that is a count, and true/false.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from merger.errors import ManifestError
from merger.methods import COMBINATION_TYPES, METHODS, REQUIRED, ParameterSpec, Scalar
from merger.methods.wrappers import wrappers_for

__all__ = [
    "Clause",
    "ParameterValue",
    "ParameterValueError",
    "layer_position",
    "parameter_specs",
    "parse_parameter_value",
    "resolve_parameter",
]


@dataclass(frozen=True, slots=True)
class Clause:
    """One value and the tensors it is for."""

    value: Scalar | tuple[Scalar, ...]
    """A scalar, or the anchors of a gradient."""
    filter: str | None = None
    """Substring of the tensor's name; None matches every tensor."""

    def matches(self, name: str) -> bool:
        return self.filter is None or self.filter in name

    def at(self, t: float) -> Scalar:
        """The value at depth t in [0, 1]."""
        if not isinstance(self.value, tuple):
            return self.value
        anchors = self.value
        position = t * (len(anchors) - 1)
        lower = int(position)
        if not all(isinstance(anchor, float) for anchor in anchors):
            return anchors[lower]
        upper, fraction = min(lower + 1, len(anchors) - 1), position - lower
        return (1 - fraction) * float(anchors[lower]) + fraction * float(anchors[upper])


@dataclass(frozen=True, slots=True)
class ParameterValue:
    """The normal form of every way to write a parameter: clauses, the first that matches decides."""

    clauses: tuple[Clause, ...]

    @classmethod
    def of(cls, value: Scalar) -> ParameterValue:
        return cls((Clause(value),))

    def at(self, name: str, t: float) -> Scalar | None:
        """The value for one tensor, or None where no filter matches its name."""
        return next((clause.at(t) for clause in self.clauses if clause.matches(name)), None)

    def as_plain(self) -> object:
        """The shortest way to write it; parses back to an equal value."""

        def plain(value: Scalar | tuple[Scalar, ...]) -> object:
            return list(value) if isinstance(value, tuple) else value

        if len(self.clauses) == 1 and self.clauses[0].filter is None:
            return plain(self.clauses[0].value)
        return [
            {"value": plain(c.value)} if c.filter is None else {"filter": c.filter, "value": plain(c.value)}
            for c in self.clauses
        ]


class ParameterValueError(ValueError):
    """Every place of one value that is wrong."""

    def __init__(self, places: Sequence[tuple[str, str, bool]]) -> None:
        self.places = tuple(places)
        """(path below the value, message, whether it is a number out of bounds)."""
        super().__init__("; ".join(f"{path}: {message}" if path else message for path, message, _ in places))


def _any_scalar(value: object) -> Scalar:
    if isinstance(value, bool | str):
        return value
    if isinstance(value, int | float):
        if not math.isfinite(value):
            raise ValueError(f"{value} is not a finite number")
        return float(value)
    raise ValueError(f"a number, true, false or a word is expected, not {_kind_of(value)}")


def parse_parameter_value(value: object, spec: ParameterSpec | None = None) -> ParameterValue:
    """Read any of the four ways to write a value; with `spec`, every scalar is checked and normalised by it.

    Raises ParameterValueError.
    """
    if isinstance(value, ParameterValue):
        return value
    wrong: list[tuple[str, str, bool]] = []
    check: Callable[[object], Scalar] = _any_scalar if spec is None else spec.check

    def scalar(item: object, path: str) -> Scalar:
        try:
            if isinstance(item, dict | list | tuple) or item is None:
                raise ValueError(f"a number, true, false or a word is expected, not {_kind_of(item)}")
            return check(item)
        except ValueError as error:
            wrong.append((path, str(error), spec is not None and _only_bounds(spec, item)))
            return 0.0

    def anchors(item: object, path: str) -> Scalar | tuple[Scalar, ...]:
        if not isinstance(item, list | tuple):
            return scalar(item, path)
        if not item:
            wrong.append((path, "a gradient has at least one anchor", False))
        return tuple(scalar(anchor, f"{path}[{i}]") for i, anchor in enumerate(item))

    def clause(item: Mapping[object, object], path: str) -> Clause:
        wrong.extend(
            (f"{path}.{key}", f"{key!r} is no key of a filtered value, which is {{value, filter}}", False)
            for key in item
            if key not in ("value", "filter")
        )
        if "value" not in item:
            wrong.append((f"{path}.value", "a filtered value needs a value", False))
        text = item.get("filter")
        if text is not None and not (isinstance(text, str) and text):
            wrong.append((f"{path}.filter", "a filter is a piece of a tensor's name", False))
        named = text if isinstance(text, str) and text != "*" else None
        return Clause(anchors(item.get("value", 0.0), f"{path}.value") if "value" in item else 0.0, named)

    if isinstance(value, Mapping):
        clauses: tuple[Clause, ...] = (clause(value, ""),)
    elif isinstance(value, list | tuple) and any(isinstance(item, Mapping) for item in value):
        for i, item in enumerate(value):
            if not isinstance(item, Mapping):
                wrong.append((f"[{i}]", "a list holds numbers, or {value, filter} entries, not both", False))
        clauses = tuple(clause(item, f"[{i}]") for i, item in enumerate(value) if isinstance(item, Mapping))
    else:
        clauses = (Clause(anchors(value, "")),)
    if wrong:
        raise ParameterValueError(wrong)
    return ParameterValue(clauses)


def _only_bounds(spec: ParameterSpec, value: object) -> bool:
    """True where nothing but the bounds of `spec` refuses the value."""
    try:
        replace(spec, low=-math.inf, high=math.inf, low_open=False).check(value)
    except ValueError:
        return False
    return True


def _kind_of(value: object) -> str:
    kinds = {dict: "a mapping", list: "a list", tuple: "a list", type(None): "nothing"}
    return kinds.get(type(value), repr(value))


def layer_position(index: int, num_layers: int) -> float:
    """The t of layer `index` of an output slice of `num_layers` layers. What belongs to no layer is at 0.0."""
    return index / (num_layers - 1) if num_layers > 1 else 1.0


def resolve_parameter(
    spec: ParameterSpec,
    *,
    scopes: Sequence[Mapping[str, ParameterValue]],
    names: Sequence[str],
    t: float,
    is_adapter: bool,
) -> Scalar:
    """One parameter for one tensor: the first scope with a clause that matches, then the default.

    `names` holds, for each scope, the tensor name its filters are tested against: the source's own name for the scope
    of a source, the output's name for the others.
    Raises ManifestError(code `missing-key`) where a required parameter has no value for this tensor.
    """
    for scope, name in zip(scopes, names, strict=True):
        value = scope.get(spec.name)
        found = None if value is None else value.at(name, t)
        if found is not None:
            return found
    if is_adapter and spec.adapter_default is not None:
        return spec.adapter_default
    if spec.default is REQUIRED or not isinstance(spec.default, float | int | bool | str):
        raise ManifestError.of(
            "missing-key",
            f"the parameter {spec.name} has no value for {names[-1] if names else 'a tensor'}",
            where=f"parameters.{spec.name}",
            why="it has no default, and no filter matches this tensor",
            fix="add an entry without a filter",
        )
    return spec.default


_WEIGHT: Final = METHODS["task_arithmetic"].parameter("weight")
_PEFT_DENSITY: Final = METHODS["ties"].parameter("density")


def parameter_specs(*, merge_method: str | None, combination_type: str | None) -> tuple[ParameterSpec, ...] | None:
    """The parameters of a named method or of a PEFT combination; None for a name that is not built.

    PEFT has one density for all adapters, required where something is pruned (None is a TypeError there), and dropping
    everything with DARE divides by zero, so its density is above 0.
    """
    if combination_type is None:
        method = METHODS.get(merge_method or "")
        return None if method is None else (*method.parameters, *wrappers_for(method))
    if combination_type not in COMBINATION_TYPES or _WEIGHT is None or _PEFT_DENSITY is None:
        return None
    if not combination_type.startswith(("ties", "dare", "magnitude")):
        return (_WEIGHT,)
    drops = combination_type.startswith("dare")
    return (_WEIGHT, replace(_PEFT_DENSITY, default=REQUIRED, scope="global", low_open=drops))
