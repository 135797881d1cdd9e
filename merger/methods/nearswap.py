"""nearswap: take the other model where it is near the base (mergekit 0.1.5)."""

from __future__ import annotations

import numpy as np

from merger.methods.declare import MethodSpec, ParameterSpec
from merger.methods.rounds import Call
from merger.methods.tiles import F32, Known, Tile, TileBlock


class Nearswap(TileBlock):
    """d·clamp(t / max(|d|, 1e-6), 0, 1): whole where |d| ≤ t, shortened to t elsewhere."""

    def apply(self, call: Call, known: Known, tile: Tile) -> F32:
        d = tile.x_Kn[0]
        share = np.float32(call.number("t")) / np.maximum(np.abs(d), np.float32(1e-6))
        out: F32 = d * np.clip(share, np.float32(0), np.float32(1))
        return out


METHODS = (
    MethodSpec(
        name="nearswap", summary="moves each weight of the base towards the other model by t at the most",
        spaces=("delta",), combine="block", tile=Nearswap(),
        parameters=(ParameterSpec(name="t", kind="float", scope="global", doc="how far a weight may move"),),
        base="required", max_sources=1, closed_on_deltas=True, cut="elements", paper="mergekit",
    ),
)  # fmt: skip
