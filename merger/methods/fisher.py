"""fisher: each element is the mean of the sources', weighted by how much each source's loss depends on it.

W = Σ wᵢ·Fᵢ·Wᵢ / Σ wᵢ·Fᵢ, elementwise, with Fᵢ the diagonal of source i's Fisher information (Matena and Raffel,
arXiv:2111.09832), at least `floor`. On deltas of one base it is the same merge: the base cancels.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from merger.errors import MergeFailedError
from merger.methods.declare import MethodSpec, ParameterSpec
from merger.methods.parameters import LAMBDA, MISSING, SHARE
from merger.methods.rounds import Call
from merger.methods.tiles import F32, Known, Tile, TileBlock


class Fisher(TileBlock):
    """Each source's share of an element is w·max(F, floor), float64; the sum is rounded once."""

    def apply(self, call: Call, known: Known, tile: Tile) -> F32:
        assert tile.s_Kn is not None
        if (tile.s_Kn < 0).any():
            raise MergeFailedError.of(
                "bad-statistics", "a diagonal of the Fisher information is negative", where="statistics",
                why="it is a mean of squared gradients", fix="check what was written into the statistics",
            )  # fmt: skip
        shares_Kn = np.maximum(tile.s_Kn.astype(np.float64), call.number("floor"))
        shares_Kn *= np.asarray(call.weights, np.float64)[:, None]
        total, merged = np.zeros_like(shares_Kn[0]), np.zeros_like(shares_Kn[0])
        for share_n, x_n in zip(shares_Kn, tile.x_Kn, strict=True):
            total += share_n
            merged += share_n * x_n
        merged /= total
        found: F32 = merged.astype(np.float32)
        return found


METHODS = (
    MethodSpec(
        name="fisher", summary="the mean of the sources, each element weighted by its Fisher information",
        spaces=("delta", "weight"), combine="block", tile=Fisher(), statistics="diagonal",
        parameters=(
            SHARE, LAMBDA,
            ParameterSpec(name="floor", kind="float", scope="global", default=1e-6, low=0.0, low_open=True,
                          doc="an element's Fisher information counts as this at least; where all lie below it, "
                              "the result is the plain mean"),
            replace(MISSING, default="refuse"),
        ),
        base="optional", closed_on_deltas=True, cut="elements", any_order=True, one_is_itself=True,
        paper="arXiv:2111.09832",
        bibtex="@inproceedings{matena2022merging, title={Merging Models with Fisher-Weighted Averaging}, "
               "author={Matena, Michael and Raffel, Colin}, booktitle={NeurIPS}, year={2022}}",
    ),
)  # fmt: skip
