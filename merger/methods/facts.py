"""What a declaration says of a method's cost: rounds of statistics, memory, and a call with every parameter at a value.

For pages about methods, and for `check_method`; a plan reckons with its own calls. No torch here.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from merger.methods.declare import REQUIRED, MethodSpec, ParameterSpec, Scalar
from merger.methods.rounds import Call, rounds_of

IN_FIELDS: Final = frozenset({
    "weight", "density", "lambda", "normalize", "rescale", "scope", "elect", "divisor", "scale", "int8_mask", "balance",
    "calibrate", "calibrate_alpha",
})  # fmt: skip
"""Parameters that fields of a call hold; a method's own are its `options` and `each`."""


def sample_value(spec: ParameterSpec) -> Scalar:
    """The default, or a value in bounds where there is none."""
    if spec.default is not REQUIRED and isinstance(spec.default, float | int | bool | str):
        return spec.default
    if spec.kind == "choice":
        return spec.choices[0]
    if spec.kind == "bool":
        return False
    if spec.kind == "int":
        return int(max(spec.low, min(spec.high, 1.0)))
    if spec.low > 0.5 or spec.high < 0.5:
        low, high = max(spec.low, spec.high - 1.0), min(spec.high, spec.low + 1.0)
        return (low + high) / 2
    return 0.5


def sample_call(spec: MethodSpec, weights: Sequence[float], values: Mapping[str, Scalar] | None = None) -> Call:
    """A call of this method on so many sources; `values` holds what is not at its default. Raises ValueError."""
    given = dict(values or {})
    unknown = sorted(set(given) - {p.name for p in spec.parameters})
    if unknown:
        raise ValueError(f"{spec.name} has no parameter {unknown[0]}")
    found = {p.name: p.check(given.get(p.name, sample_value(p))) for p in spec.parameters}
    of: Any = found.get
    own = [p for p in spec.parameters if p.name not in IN_FIELDS]
    call = Call(
        method=spec.name, prepare=spec.prepare, combine=spec.combine, weights=tuple(weights),
        densities=(float(of("density", 1.0)),) * len(weights) if spec.prepare != "none" else (),
        keys=tuple(range(1, len(weights) + 1)) if spec.prepare in {"drop", "magprune"} else (),
        scale=float(of("lambda", of("scale", 1.0))), normalize=bool(of("normalize", False)),
        rescale=of("rescale", "none"), scope=of("scope", "tensor"), elect=of("elect", "weighted"),
        divisor=of("divisor", "weights"), balance=of("balance", "none") == "nan",
        calibrate=float(of("calibrate_alpha", 1.0)) if of("calibrate", "none") == "svc" else None,
        options=tuple((p.name, found[p.name]) for p in own if p.scope == "global"),
        each=tuple((p.name, (float(found[p.name]),) * len(weights)) for p in own if p.scope == "source"),
    )  # fmt: skip
    return call if spec.tile is None else replace(call, num_rounds=spec.tile.rounds(call))


def num_rounds(spec: MethodSpec) -> tuple[int, int]:
    """Fewest and most rounds of statistics, over what parameters may say that decides it, where something is cut."""
    if spec.tile is None and spec.core is not None:
        return 0, 0  # counted inside the core, which is read once
    axes = [[(p.name, value) for value in _extremes(p)] for p in spec.parameters]
    counts = {
        len(rounds_of(sample_call(spec, (1.0,) * (spec.max_sources or 2), dict(chosen))))
        for chosen in itertools.product(*axes)
    }
    return min(counts), max(counts)


def _extremes(p: ParameterSpec) -> tuple[Scalar, ...]:
    """Each word and truth; of a number its default and, where that is a bound and may mean "all", one between."""
    if p.kind == "choice":
        return p.choices
    if p.kind == "bool":
        return False, True
    usual = sample_value(p)
    if p.kind == "float" and usual in {p.low, p.high}:
        between = (p.low + p.high) / 2 if p.high - p.low < math.inf else float(usual)
        return (between,) if p.name == "density" else (usual, between)
    return (usual,)


def rounds_text(spec: MethodSpec) -> str:
    """`2`, or `2 to 3` where a parameter decides."""
    low, high = num_rounds(spec)
    return str(low) if low == high else f"{low} to {high}"


def cost_text(spec: MethodSpec) -> str:
    """What a worker holds, in a few words."""
    if spec.whole is not None:
        side, count = 1024, spec.max_sources or 3
        beside = spec.whole.bytes(side, side, count) / (4 * side * side * count)
        text = f"a tensor whole: {1 + beside:.2g}× its sources in float32"
        return text if spec.core is None else f"{text}; of adapters the exact core"
    if spec.core is not None:
        return "the exact core of a module"
    if spec.store != "any":
        return "the factors of a module"
    if spec.cut == "whole":
        return "a tensor whole"
    if spec.tile is not None and spec.tile.whole_rows:
        return "streamed, blocks of whole rows"
    return "streamed, blocks of any size"
