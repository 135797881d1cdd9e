"""A plugin that streams: one round of statistics, then a map. Tensors of any size pass through in bounded memory.

raymerge methods clipped_sum --plugin manifests/plugins/clipped_sum.py --check
raymerge merge manifests/plugins/clipped-sum.yaml --plugin manifests/plugins/clipped_sum.py
"""

from __future__ import annotations

import numpy as np

from merger.methods.plugin import (
    F32,
    F64,
    Call,
    Known,
    ParameterSpec,
    Statistic,
    TensorExtent,
    Tile,
    TileBlock,
    dot,
    method,
)

METHOD_API = 1
"""The version of the interface that this file was written for."""

LIMIT = ParameterSpec(
    name="limit", kind="float", scope="source", default=3.0, low=0.0, low_open=True,
    doc="the largest change that is kept whole, in root mean squares of this source's delta",
)  # fmt: skip


@method(
    name="clipped_sum",
    summary="sum of the weighted deltas, each clipped at a multiple of its own root mean square",
    parameters=(LIMIT,),
    any_order=True,
)
class ClippedSum(TileBlock):
    """Σ w_i · clip(x_i, ±limit_i · rms(x_i)), rms over the tensor."""

    def rounds(self, call: Call) -> int:
        return 1

    def empty(self, number: int, call: Call, extent: TensorExtent) -> Statistic:
        return np.zeros(extent.count, np.float64)

    def measure(self, number: int, call: Call, known: Known, tile: Tile, into: Statistic) -> None:
        into += np.array([dot(x_n, x_n) for x_n in tile.x_Kn])

    def conclude(self, number: int, call: Call, known: Known, merged: Statistic, extent: TensorExtent) -> F64:
        return np.sqrt(np.asarray(merged, np.float64) / max(1, extent.numel))

    def apply(self, call: Call, known: Known, tile: Tile) -> F32:
        bounds_K = (known[0] * np.array(call.per_source("limit"))).astype(np.float32)
        out = np.zeros(tile.x_Kn.shape[1], np.float32)
        for x_n, bound, weight in zip(tile.x_Kn, bounds_K, call.weights, strict=True):
            out += np.clip(x_n, -bound, bound) * np.float32(weight)
        return out
