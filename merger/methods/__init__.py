"""The table of named methods. One more is a file of its own and a line in _FILES; validation, help, the README's table
and the property tests (tests/method_table.py) follow by themselves."""

from __future__ import annotations

import importlib
from typing import Final

from merger.methods.declare import REQUIRED, MethodSpec, ParameterSpec, Scalar
from merger.methods.parameters import (
    DENSITY,
    DIVISOR,
    ELECT,
    INT8_MASK,
    LAMBDA,
    SCOPE,
    WEIGHT,
    normalize,
    rescale,
)

__all__ = [
    "COMBINATION_TYPES",
    "METHODS",
    "REQUIRED",
    "MethodSpec",
    "ParameterSpec",
    "Scalar",
]

_TASK_PAPER = "arXiv:2212.04089"
_TIES_PAPER = "arXiv:2306.01708"
_DARE_PAPER = "arXiv:2311.03099"

_TABLE: Final = (
    MethodSpec(
        name="linear", summary="weighted mean of the weights", spaces=("weight", "delta"), combine="mean",
        parameters=(WEIGHT, normalize(True)), base="member", closed_on_deltas=True, linear=True, cut="elements",
        paper="arXiv:2203.05482",
        bibtex="@inproceedings{wortsman2022soups, title={Model soups}, author={Wortsman, Mitchell and others}, "
               "booktitle={ICML}, year={2022}}",
    ),
    MethodSpec(
        name="task_arithmetic", summary="base plus a weighted sum of deltas", spaces=("delta",), combine="sum",
        parameters=(WEIGHT, LAMBDA, normalize(False), INT8_MASK), base="required", closed_on_deltas=True,
        linear=True, cut="elements", paper=_TASK_PAPER,
        bibtex="@inproceedings{ilharco2023editing, title={Editing models with task arithmetic}, "
               "author={Ilharco, Gabriel and others}, booktitle={ICLR}, year={2023}}",
    ),
    MethodSpec(
        name="ties", summary="trim each delta to its largest elements, elect a sign, average what agrees",
        spaces=("delta", "core"), prepare="trim", combine="elect",
        parameters=(WEIGHT, DENSITY, LAMBDA, normalize(True), rescale("none"), SCOPE, ELECT, DIVISOR,
                    INT8_MASK),
        base="required", closed_on_deltas=True, cut="elements", paper=_TIES_PAPER,
        bibtex="@inproceedings{yadav2023ties, title={TIES-Merging}, author={Yadav, Prateek and others}, "
               "booktitle={NeurIPS}, year={2023}}",
    ),
    MethodSpec(
        name="dare_linear", summary="drop elements of each delta at random, rescale, sum", spaces=("delta",),
        prepare="drop", combine="sum",
        parameters=(WEIGHT, DENSITY, LAMBDA, normalize(False), rescale("l1"), INT8_MASK),
        base="required", closed_on_deltas=True, cut="elements", paper=_DARE_PAPER,
        bibtex="@inproceedings{yu2024dare, title={Language models are super Mario}, author={Yu, Le and others}, "
               "booktitle={ICML}, year={2024}}",
    ),
    MethodSpec(
        name="dare_ties", summary="drop elements of each delta at random, rescale, elect a sign, sum what agrees",
        spaces=("delta",), prepare="drop", combine="elect",
        parameters=(WEIGHT, DENSITY, LAMBDA, normalize(False), rescale("l1"), ELECT, DIVISOR, INT8_MASK),
        base="required", closed_on_deltas=True, cut="elements", paper=_DARE_PAPER,
    ),
    MethodSpec(
        name="magnitude_prune", summary="trim each delta to its largest elements, then task arithmetic",
        spaces=("delta",), prepare="trim", combine="sum",
        parameters=(WEIGHT, DENSITY, LAMBDA, normalize(False), rescale("none"), SCOPE, INT8_MASK),
        base="required", closed_on_deltas=True, cut="elements", paper="PEFT add_weighted_adapter",
    ),
    MethodSpec(
        name="cat", summary="task arithmetic of adapters, stored exactly by concatenating the factors",
        spaces=("delta",), combine="sum", parameters=(WEIGHT, LAMBDA), base="required", closed_on_deltas=True,
        linear=True, cut="whole", store="concat", paper="arXiv:2410.13025",
    ),
    MethodSpec(
        name="svd", summary="task arithmetic of adapters, stored as the best approximation of a given rank",
        spaces=("delta",), combine="sum", parameters=(WEIGHT, LAMBDA), base="required", closed_on_deltas=True,
        linear=True, cut="whole", store="svd", paper="PEFT add_weighted_adapter",
    ),
    MethodSpec(
        name="passthrough", summary="copies one source, for stacking layers", spaces=("weight",), combine="pass",
        parameters=(ParameterSpec(name="scale", kind="float", scope="source", default=1.0,
                                  doc="multiplies the tensor"),),
        base="member", max_sources=1, closed_on_deltas=False, cut="elements", paper="mergekit",
    ),
)  # fmt: skip

_FILES: Final = (
    "slerp",
    "nearswap",
    "gram",
    "consensus",
    "fusion",
    "sparse",
    "spectral",
    "core",
    "knots",
    "wrappers",
    "fisher",
    "regmean",
    "star",
)
"""Files of this package that declare methods, each in a tuple METHODS, in the order in which they are listed."""


def _declared(file: str) -> tuple[MethodSpec, ...]:
    found: tuple[MethodSpec, ...] = importlib.import_module(f"merger.methods.{file}").METHODS
    return found


METHODS: Final[dict[str, MethodSpec]] = {
    spec.name: spec for spec in (*_TABLE, *(spec for file in _FILES for spec in _declared(file)))
}
"""Every `merge_method` by name. A file of methods is one line above."""

COMBINATION_TYPES: Final = (
    "linear", "cat", "svd", "ties", "ties_svd", "dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd",
    "magnitude_prune", "magnitude_prune_svd",
)  # fmt: skip
"""PEFT's names, which act as PEFT does (on factors, unless they end in svd)."""
