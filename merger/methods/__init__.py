"""The table of named methods. Adding one is an entry here; validation, help and property tests follow by themselves."""

from __future__ import annotations

from typing import Final

from merger.methods import nearswap, slerp
from merger.methods.declare import REQUIRED, MethodSpec, ParameterSpec, Scalar

__all__ = [
    "COMBINATION_TYPES",
    "LATER_METHODS",
    "METHODS",
    "REQUIRED",
    "MethodSpec",
    "ParameterSpec",
    "Scalar",
]

_WEIGHT = ParameterSpec(
    name="weight", kind="float", scope="source", adapter_default=1.0,
    doc="coefficient of this source; any sign",
)  # fmt: skip
_DENSITY = ParameterSpec(
    name="density", kind="float", scope="source", default=1.0, low=0.0, high=1.0,
    doc="share of the delta's elements that are kept",
)  # fmt: skip
_LAMBDA = ParameterSpec(
    name="lambda", kind="float", scope="global", default=1.0, doc="scale of the merged delta",
)  # fmt: skip
_INT8_MASK = ParameterSpec(
    name="int8_mask", kind="bool", scope="global", default=False,
    doc="accepted for mergekit's sake; changes no number",
)  # fmt: skip
_SCOPE = ParameterSpec(
    name="scope", kind="choice", scope="global", default="tensor", choices=("tensor", "model"),
    doc="what the density counts over: each tensor (mergekit, PEFT) or the whole model (the TIES paper)",
)  # fmt: skip
_ELECT = ParameterSpec(
    name="elect", kind="choice", scope="global", default="weighted", choices=("weighted", "unweighted"),
    doc="whether signs are elected on weighted deltas (mergekit) or unweighted ones (PEFT, the paper)",
)  # fmt: skip
_DIVISOR = ParameterSpec(
    name="divisor", kind="choice", scope="global", default="weights", choices=("weights", "count"),
    doc="what a normalised sum is divided by: the weights that agree (mergekit) or their number (PEFT, the paper)",
)  # fmt: skip


def _normalize(default: bool) -> ParameterSpec:
    return ParameterSpec(
        name="normalize", kind="bool", scope="global", default=default,
        doc="divide by the sum of the weights (for elected signs: of those that agree)",
    )  # fmt: skip


def _rescale(default: str) -> ParameterSpec:
    return ParameterSpec(
        name="rescale", kind="choice", scope="global", default=default, choices=("none", "l1", "inverse"),
        synonyms={True: "l1", False: "none"},
        doc="after dropping: restore the delta's L1 norm (mergekit), divide by the density (DARE, PEFT), or leave",
    )  # fmt: skip


_TASK_PAPER = "arXiv:2212.04089"
_TIES_PAPER = "arXiv:2306.01708"
_DARE_PAPER = "arXiv:2311.03099"

_TABLE: Final = (
    MethodSpec(
        name="linear", summary="weighted mean of the weights", spaces=("weight", "delta"), combine="mean",
        parameters=(_WEIGHT, _normalize(True)), base="member", closed_on_deltas=True, linear=True, cut="elements",
        paper="arXiv:2203.05482",
        bibtex="@inproceedings{wortsman2022soups, title={Model soups}, author={Wortsman, Mitchell and others}, "
               "booktitle={ICML}, year={2022}}",
    ),
    MethodSpec(
        name="task_arithmetic", summary="base plus a weighted sum of deltas", spaces=("delta",), combine="sum",
        parameters=(_WEIGHT, _LAMBDA, _normalize(False), _INT8_MASK), base="required", closed_on_deltas=True,
        linear=True, cut="elements", paper=_TASK_PAPER,
        bibtex="@inproceedings{ilharco2023editing, title={Editing models with task arithmetic}, "
               "author={Ilharco, Gabriel and others}, booktitle={ICLR}, year={2023}}",
    ),
    MethodSpec(
        name="ties", summary="trim each delta to its largest elements, elect a sign, average what agrees",
        spaces=("delta", "core"), prepare="trim", combine="elect",
        parameters=(_WEIGHT, _DENSITY, _LAMBDA, _normalize(True), _rescale("none"), _SCOPE, _ELECT, _DIVISOR,
                    _INT8_MASK),
        base="required", closed_on_deltas=True, cut="elements", paper=_TIES_PAPER,
        bibtex="@inproceedings{yadav2023ties, title={TIES-Merging}, author={Yadav, Prateek and others}, "
               "booktitle={NeurIPS}, year={2023}}",
    ),
    MethodSpec(
        name="dare_linear", summary="drop elements of each delta at random, rescale, sum", spaces=("delta",),
        prepare="drop", combine="sum",
        parameters=(_WEIGHT, _DENSITY, _LAMBDA, _normalize(False), _rescale("l1"), _INT8_MASK),
        base="required", closed_on_deltas=True, cut="elements", paper=_DARE_PAPER,
        bibtex="@inproceedings{yu2024dare, title={Language models are super Mario}, author={Yu, Le and others}, "
               "booktitle={ICML}, year={2024}}",
    ),
    MethodSpec(
        name="dare_ties", summary="drop elements of each delta at random, rescale, elect a sign, sum what agrees",
        spaces=("delta",), prepare="drop", combine="elect",
        parameters=(_WEIGHT, _DENSITY, _LAMBDA, _normalize(False), _rescale("l1"), _ELECT, _DIVISOR, _INT8_MASK),
        base="required", closed_on_deltas=True, cut="elements", paper=_DARE_PAPER,
    ),
    MethodSpec(
        name="magnitude_prune", summary="trim each delta to its largest elements, then task arithmetic",
        spaces=("delta",), prepare="trim", combine="sum",
        parameters=(_WEIGHT, _DENSITY, _LAMBDA, _normalize(False), _rescale("none"), _SCOPE, _INT8_MASK),
        base="required", closed_on_deltas=True, cut="elements", paper="PEFT add_weighted_adapter",
    ),
    MethodSpec(
        name="cat", summary="task arithmetic of adapters, stored exactly by concatenating the factors",
        spaces=("delta",), combine="sum", parameters=(_WEIGHT, _LAMBDA), base="required", closed_on_deltas=True,
        linear=True, cut="whole", store="concat", paper="arXiv:2410.13025",
    ),
    MethodSpec(
        name="svd", summary="task arithmetic of adapters, stored as the best approximation of a given rank",
        spaces=("delta",), combine="sum", parameters=(_WEIGHT, _LAMBDA), base="required", closed_on_deltas=True,
        linear=True, cut="whole", store="svd", paper="PEFT add_weighted_adapter",
    ),
    MethodSpec(
        name="passthrough", summary="copies one source, for stacking layers", spaces=("weight",), combine="pass",
        parameters=(ParameterSpec(name="scale", kind="float", scope="source", default=1.0,
                                  doc="multiplies the tensor"),),
        base="member", max_sources=1, closed_on_deltas=False, cut="elements", paper="mergekit",
    ),
)  # fmt: skip

METHODS: Final[dict[str, MethodSpec]] = {
    spec.name: spec
    for spec in (
        *_TABLE,
        *slerp.METHODS,
        *nearswap.METHODS,
    )
}
"""Every `merge_method` by name. A file of methods is one line here."""

COMBINATION_TYPES: Final = (
    "linear", "cat", "svd", "ties", "ties_svd", "dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd",
    "magnitude_prune", "magnitude_prune_svd",
)  # fmt: skip
"""PEFT's names, which act as PEFT does (on factors, unless they end in svd)."""

LATER_METHODS: Final = frozenset({
    "nuslerp", "multislerp", "karcher", "model_stock", "arcee_fusion", "sce", "ram", "ramplus_tl",
    "breadcrumbs", "breadcrumbs_ties", "della", "della_linear", "core_ties", "core_dare_ties", "core_tsv", "core_iso",
    "knots_ties", "knots_dare", "tsv_m", "iso_c", "iso_cts", "boost", "wudi", "pcb", "consensus_ta", "magmax", "nan",
    "lines", "svc",
})  # fmt: skip
"""Names that are known and not built yet; refused by name."""
