"""Two more ways to thin out a delta before it is combined: a band of magnitudes, and drops that spare the large.

    band       the top share `gamma` of the magnitudes is cut as outliers, the next `density` kept (breadcrumbs)
    magprune   an element is kept with a probability that grows with its rank in its row (DELLA)

A band is two trims, so exactly as many survive as were asked for; of equal magnitudes the lowest flat indices count as
the larger, as everywhere.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from merger.kernels.hashing import element_hashes
from merger.methods.declare import MethodSpec, ParameterSpec
from merger.methods.parameters import DENSITY, DIVISOR, ELECT, INT8_MASK, LAMBDA, WEIGHT, normalize, rescale
from merger.methods.tiles import F32, F64

if TYPE_CHECKING:
    from merger.kernels.dispatch import Array, Kernels


def cut_band(kernels: Kernels, x_n: Array, lower: tuple[int, int], upper: tuple[int, int]) -> tuple[int, int]:
    """Keep what is among the largest by `lower` and not by `upper`, in place: each (bits of a threshold, how many equal
    to it count as above). Returns how many of either allowance were used."""
    outliers = kernels.empty(len(x_n))
    kernels.copy(outliers, x_n)
    used_above = kernels.trim(outliers, *upper)
    used_below = kernels.trim(x_n, *lower)
    kernels.subtract(x_n, outliers)  # x − x = 0; and what is no number stays none
    return used_below, used_above


def keep_shares(length: int, density: float, epsilon: float) -> F64:
    """The probability to be kept by rank in a row, the largest magnitude first: density + ε down to density − ε.

    A row of one element has no ranks; it is kept at the density, their mean (mergekit stops at 0/0).
    """
    if length == 1:
        return np.array([density])
    return (density + epsilon) - 2.0 * epsilon * np.arange(length) / (length - 1)


def magprune(
    x_n: F32, length: int, first: int, key: int, density: float, epsilon: float, *, inverse: bool = False
) -> F32:
    """Rows of `length` elements, thinned; with `inverse` each survivor is divided by its own probability.

    The draw is the hash of merger/kernels/hashing.py at the element's flat index.
    """
    if not len(x_n):
        return x_n
    shares = keep_shares(length, density, epsilon)
    # Magnitude, then falling index, in one number: sorted by any algorithm, equal magnitudes fall as they must.
    magnitudes = (x_n.view(np.uint32) & np.uint32(0x7FFFFFFF)).astype(np.uint64).reshape(-1, length)
    index = np.arange(length, dtype=np.uint64)
    ranked = np.sort((np.uint64(0x7FFFFFFF) - magnitudes) << np.uint64(32) | index, axis=1)
    order = (ranked & np.uint64(0xFFFFFFFF)).astype(np.int64)
    limits = np.empty(magnitudes.shape, np.uint64)
    np.put_along_axis(limits, order, np.round(shares * 2.0**32).astype(np.uint64)[None, :], axis=1)
    kept = element_hashes(first, len(x_n), key) < limits.reshape(-1)
    # Times zero, not zero: what is no number stays none. Plus zero: never −0.
    with np.errstate(invalid="ignore"):
        out: F32 = np.where(kept, x_n, x_n * np.float32(0) + np.float32(0))
    if inverse:
        divisors = np.empty(magnitudes.shape, np.float32)
        np.put_along_axis(divisors, order, shares.astype(np.float32)[None, :], axis=1)
        out /= divisors.reshape(-1)
    return out


_GAMMA = ParameterSpec(
    name="gamma", kind="float", scope="source", default=0.01, low=0.0, high=1.0,
    doc="share of the elements that is cut as outliers, the largest first (less where density leaves less)",
)  # fmt: skip
_EPSILON = ParameterSpec(
    name="epsilon", kind="float", scope="source", default=0.15, low=0.0, high=1.0,
    doc="the largest of a row is kept with probability density + epsilon, the smallest with density - epsilon",
)  # fmt: skip
_RESCALE = replace(
    rescale("l1"),
    doc="after dropping: restore the delta's L1 norm (mergekit), divide each element by its own probability to be kept "
        "(the paper), or leave",
)  # fmt: skip
_BREADCRUMBS = MethodSpec(
    name="breadcrumbs", summary="cuts the largest and the smallest elements of each delta, then task arithmetic",
    spaces=("delta",), prepare="band", combine="sum",
    parameters=(WEIGHT, DENSITY, _GAMMA, LAMBDA, normalize(False), rescale("none"), INT8_MASK),
    base="required", closed_on_deltas=True, cut="elements", paper="arXiv:2312.06795",
    bibtex="@inproceedings{davari2024breadcrumbs, title={Model Breadcrumbs: Scaling Multi-Task Model Merging with "
           "Sparse Masks}, author={Davari, MohammadReza and Belilovsky, Eugene}, booktitle={ECCV}, year={2024}}",
)  # fmt: skip
_DELLA = MethodSpec(
    name="della", summary="drops small elements more often than large ones, elects a sign, averages what agrees",
    spaces=("delta",), prepare="magprune", combine="elect",
    parameters=(WEIGHT, DENSITY, _EPSILON, LAMBDA, normalize(True), _RESCALE, ELECT, DIVISOR, INT8_MASK),
    base="required", closed_on_deltas=True, cut="rows", paper="arXiv:2406.11617",
    bibtex="@article{deep2024della, title={DELLA-Merging: Reducing Interference in Model Merging through "
           "Magnitude-Based Sampling}, author={Deep, Pala Tej and Bhardwaj, Rishabh and Poria, Soujanya}, "
           "journal={arXiv preprint arXiv:2406.11617}, year={2024}}",
)  # fmt: skip

METHODS = (
    _BREADCRUMBS,
    replace(
        _BREADCRUMBS, name="breadcrumbs_ties", combine="elect",
        summary="cuts the largest and the smallest elements of each delta, elects a sign, sums what agrees",
        parameters=(WEIGHT, DENSITY, _GAMMA, LAMBDA, normalize(False), rescale("none"), ELECT, DIVISOR, INT8_MASK),
    ),
    _DELLA,
    replace(
        _DELLA, name="della_linear", combine="sum", summary="drops small elements more often than large ones, sums",
        parameters=(WEIGHT, DENSITY, _EPSILON, LAMBDA, normalize(False), _RESCALE, INT8_MASK),
    ),
)  # fmt: skip
