"""From a manifest's parameters to a `Call` for one tensor: every gradient, filter and default resolved."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from merger.errors import PlanError
from merger.kernels.hashing import element_key
from merger.manifest import Manifest, ParameterValue, resolve_parameter
from merger.methods import METHODS, MethodSpec, ParameterSpec, Scalar
from merger.methods.rounds import Call
from merger.methods.wrappers import wrappers_for

_COMMON: Final = frozenset({
    "lambda", "normalize", "rescale", "scope", "elect", "divisor", "int8_mask", "balance", "calibrate",
    "calibrate_alpha",
})  # fmt: skip
"""Parameters that fields of a call hold; others are its `options`."""
NULL_SPACE: Final = (
    "a dense product of low rank has null directions, whose singular vectors are arbitrary: whitening or equalising "
    "them gives results that float32 and float64 do not agree on"
)
_NUMBER: Final = re.compile(r"(?:^|\.)(\d+)(?=\.|$)")


@dataclass(frozen=True, slots=True)
class Scopes:
    """Where one source's parameters are looked up for one tensor: source, slice, module, manifest."""

    own: Mapping[str, ParameterValue]
    shared: tuple[Mapping[str, ParameterValue], ...]
    input_name: str
    """The tensor's name in this source: what filters of the source's own scope see."""
    position: int
    """Index in the manifest's list of sources."""
    is_adapter: bool


def layer_of(name: str) -> tuple[str, int] | None:
    """(`model.layers`, 3) of `model.layers.3.mlp.up_proj.weight`; None of a tensor that is in no layer."""
    found = _NUMBER.search(name)
    if found is None:
        return None
    return name[: found.start()], int(found.group(1))


def natural_key(name: str) -> tuple[Any, ...]:
    """Sorts `layers.2` before `layers.10`."""
    return tuple((1, int(p), "") if p.isdigit() else (0, 0, p) for p in re.split(r"(\d+)", name))


class CallBuilder:
    """Resolves one manifest's method for one tensor after another."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.spec: MethodSpec = manifest.method or METHODS["task_arithmetic"]

    def call(self, scopes: Sequence[Scopes], output_name: str, t: float) -> Call:
        """The call for a tensor whose sources have these scopes, in the order of the task's entries."""
        spec = self.spec
        weights = self._each(spec.parameter("weight"), scopes, output_name, t, 1.0)
        options = {
            p.name: self._shared(p, scopes, output_name, t)
            for p in (*spec.parameters, *wrappers_for(spec))
            if p.scope == "global"
        }
        call = Call(
            method=spec.name,
            prepare=spec.prepare,
            combine=spec.combine,
            weights=weights,
            densities=self._each(spec.parameter("density"), scopes, output_name, t, 1.0) if spec.prepare != "none"
            else (),
            scale=float(options.get("lambda", 1.0)) * _depth_scale(spec, options, t),
            normalize=bool(options.get("normalize", False)),
            rescale=_choice(options.get("rescale", "none")),
            scope=_choice(options.get("scope", "tensor")),
            elect=_choice(options.get("elect", "weighted")),
            divisor=_choice(options.get("divisor", "weights")),
            balance=options.get("balance") == "nan",
            calibrate=float(options["calibrate_alpha"]) if options.get("calibrate") == "svc" else None,
            options=tuple((name, value) for name, value in options.items() if name not in _COMMON),
            each=tuple(
                (p.name, self._each(p, scopes, output_name, t, 1.0))
                for p in spec.parameters
                if p.scope == "source" and p.name not in ("weight", "density", "scale")
            ),
        )  # fmt: skip
        if spec.tile is not None:
            call = replace(call, num_rounds=spec.tile.rounds(call))
        if spec.prepare in {"drop", "magprune"}:
            call = replace(call, keys=tuple(self._key(s.position, s.input_name, "delta") for s in scopes))
        if spec.combine == "pass":
            (scale,) = self._each(spec.parameter("scale"), scopes, output_name, t, 1.0)
            call = replace(call, scale=scale, weights=(1.0,))
        if spec.prepare == "magprune":
            _check_shares(call)
        if spec.combine == "mean" and call.normalize and abs(sum(weights)) < 1e-8:
            raise PlanError.of(
                "weights-cancel",
                "the weights of a tensor sum to zero",
                where="parameters.weight",
                why="linear divides by their sum",
                fix="use task_arithmetic, or normalize: false",
            )
        return call

    def weights(self, scopes: Sequence[Scopes], output_name: str, t: float) -> tuple[float, ...]:
        """The sources' weights for one tensor; 1 each where the method knows none."""
        return self._each(self.spec.parameter("weight"), scopes, output_name, t, 1.0)

    def peft_call(
        self, kind: str, positions: Sequence[int], names: Sequence[tuple[str, str]], tensor: str, t: float
    ) -> Call:
        """PEFT's combination type `kind` (without `_svd`). `names` holds each source's on-disk names of A and B."""
        manifest = self.manifest
        specs = {spec.name: spec for spec in manifest.parameter_specs}

        def of(name: str, position: int, default: float) -> float:
            if name not in specs:
                return default
            scopes = manifest.adapter_scopes(position)
            value = resolve_parameter(specs[name], scopes=scopes, names=(tensor,) * 2, t=t, is_adapter=True)
            return float(specs[name].check(value))

        keys = tuple(
            self._key(p, name[which], "AB"[which])
            for which in (0, 1)
            for p, name in zip(positions, names, strict=True)
        )  # fmt: skip
        trims, drops = kind in ("ties", "magnitude_prune"), kind.startswith("dare")
        elects = kind in ("ties", "dare_ties")
        return Call(
            method=kind,
            prepare="trim" if trims else ("drop" if drops else "none"),
            combine="elect" if elects else "sum",
            weights=tuple(of("weight", p, 1.0) for p in positions),
            densities=tuple(of("density", p, 1.0) for p in positions) if trims or drops else (),
            keys=keys if drops else (),
            rescale="inverse" if drops else "none",
            normalize=elects,
            divisor="count",
            elect="frequency" if manifest.majority_sign_method == "frequency" else "unweighted",
            keep_one=False,
        )  # fmt: skip

    def _key(self, position: int, tensor: str, factor: str) -> int:
        return element_key(self.manifest.seed, position, tensor, factor)

    def _each(
        self, spec: ParameterSpec | None, scopes: Sequence[Scopes], output_name: str, t: float, default: float
    ) -> tuple[float, ...]:
        if spec is None:
            return (default,) * len(scopes)
        found = []
        for s in scopes:
            value = resolve_parameter(
                spec, scopes=(s.own, *s.shared), names=(s.input_name, *[output_name] * len(s.shared)), t=t,
                is_adapter=s.is_adapter,
            )  # fmt: skip
            found.append(float(spec.check(value)))
        return tuple(found)

    def _shared(self, spec: ParameterSpec, scopes: Sequence[Scopes], output_name: str, t: float) -> Scalar:
        shared = scopes[0].shared if scopes else (self.manifest.parameters,)
        value = resolve_parameter(
            spec, scopes=shared, names=(output_name,) * len(shared), t=t, is_adapter=False
        )  # fmt: skip
        return spec.check(value)


def _check_shares(call: Call) -> None:
    """Raise PlanError where a probability to be kept would leave (0, 1)."""
    for density, epsilon in zip(call.densities, call.per_source("epsilon"), strict=True):
        if 0.0 < density < 1.0 and not (density - epsilon > 0.0 and density + epsilon < 1.0):
            raise PlanError.of(
                "out-of-bounds",
                f"density {density:g} with epsilon {epsilon:g} leaves the probabilities between 0 and 1",
                where="parameters.epsilon",
                why="elements are kept with probabilities from density - epsilon to density + epsilon",
                fix=f"give an epsilon below {min(density, 1.0 - density):g}, or density: 1 to drop nothing",
            )


def fitted(spec: MethodSpec, call: Call, shape: tuple[int, ...]) -> Call:
    """The call for a tensor of this shape. Raises PlanError where the method's block cannot merge it."""
    if spec.tile is None or call.combine != "block":
        return call
    call = spec.tile.fitted(call, shape)
    return replace(call, num_rounds=spec.tile.rounds(call))


def _depth_scale(spec: MethodSpec, options: Mapping[str, Scalar], t: float) -> float:
    return float(options["alpha"]) + float(options["beta"]) * t if spec.depth else 1.0


def _choice(value: Scalar) -> Any:
    return value
