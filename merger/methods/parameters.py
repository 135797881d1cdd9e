"""Parameters that several methods share. No torch here."""

from __future__ import annotations

from merger.methods.declare import ParameterSpec

WEIGHT = ParameterSpec(
    name="weight", kind="float", scope="source", adapter_default=1.0,
    doc="coefficient of this source; any sign",
)  # fmt: skip
SHARE = ParameterSpec(
    name="weight", kind="float", scope="source", default=1.0, low=0.0,
    doc="how much this source counts beside the others",
)  # fmt: skip
MISSING = ParameterSpec(
    name="missing", kind="choice", scope="global", choices=("refuse", "mean"),
    doc="what becomes of a tensor that no source has statistics of: refused, or the weighted mean",
)  # fmt: skip
DENSITY = ParameterSpec(
    name="density", kind="float", scope="source", default=1.0, low=0.0, high=1.0,
    doc="share of the delta's elements that are kept",
)  # fmt: skip
LAMBDA = ParameterSpec(
    name="lambda", kind="float", scope="global", default=1.0, doc="scale of the merged delta",
)  # fmt: skip
INT8_MASK = ParameterSpec(
    name="int8_mask", kind="bool", scope="global", default=False,
    doc="accepted for mergekit's sake; changes no number",
)  # fmt: skip
SCOPE = ParameterSpec(
    name="scope", kind="choice", scope="global", default="tensor", choices=("tensor", "model"),
    doc="what the density counts over: each tensor (mergekit, PEFT) or the whole model (the TIES paper)",
)  # fmt: skip
ELECT = ParameterSpec(
    name="elect", kind="choice", scope="global", default="weighted", choices=("weighted", "unweighted"),
    doc="whether signs are elected on weighted deltas (mergekit) or unweighted ones (PEFT, the paper)",
)  # fmt: skip
DIVISOR = ParameterSpec(
    name="divisor", kind="choice", scope="global", default="weights", choices=("weights", "count"),
    doc="what a normalised sum is divided by: the weights that agree (mergekit) or their number (PEFT, the paper)",
)  # fmt: skip


def normalize(default: bool) -> ParameterSpec:
    return ParameterSpec(
        name="normalize", kind="bool", scope="global", default=default,
        doc="divide by the sum of the weights (for elected signs: of those that agree)",
    )  # fmt: skip


def rescale(default: str) -> ParameterSpec:
    return ParameterSpec(
        name="rescale", kind="choice", scope="global", default=default, choices=("none", "l1", "inverse"),
        synonyms={True: "l1", False: "none"},
        doc="after dropping: restore the delta's L1 norm (mergekit), divide by the density (DARE, PEFT), or leave",
    )  # fmt: skip
