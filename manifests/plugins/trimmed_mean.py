"""A plugin on whole tensors: the mean of what is left without the largest and the smallest, element by element.

raymerge methods trimmed_mean --plugin manifests/plugins/trimmed_mean.py --check
raymerge merge manifests/plugins/trimmed-mean.yaml --plugin manifests/plugins/trimmed_mean.py
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from merger.methods.plugin import ParameterSpec, method

if TYPE_CHECKING:
    from torch import Tensor

METHOD_API = 1
"""The version of the interface that this file was written for."""

CUT = ParameterSpec(
    name="cut", kind="int", scope="global", default=1, low=0,
    doc="how many values of each element are left out at either end, as far as that leaves one",
)  # fmt: skip


@method(
    name="trimmed_mean",
    summary="sum of the weighted deltas, outliers of each element replaced by the mean of the others",
    parameters=(CUT,),
    bytes=4,  # the stack, its sorted copy, and 64-bit indices: four times the sources
    any_order=True,
    one_is_itself=True,
    paper="arXiv:1803.01498",
)
def trimmed_mean(deltas: Sequence[Tensor], weights: Sequence[float], *, cut: int) -> Tensor:
    """K · the mean of what is left of w₁x₁ … w_K x_K: one source at weight 1 is itself, and equal sources add up."""
    import torch

    count = len(deltas)
    left_out = min(cut, (count - 1) // 2)
    ordered = torch.stack([delta * weight for delta, weight in zip(deltas, weights, strict=True)]).sort(dim=0).values
    return ordered[left_out : count - left_out].mean(dim=0) * count
