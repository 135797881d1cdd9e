"""slerp: spherical interpolation from the base to one other model (Shoemake, SIGGRAPH 1985; mergekit 0.1.5)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from merger.methods.declare import MethodSpec, ParameterSpec
from merger.methods.rounds import Call, Statistic
from merger.methods.tiles import F32, Known, TensorExtent, Tile, TileBlock, dot


def slerp_factors(gram: Sequence[float], t: float, *, threshold: float = 0.9995) -> tuple[float, float]:
    """Coefficients of a and b for spherical interpolation at t, from ⟨a,a⟩, ⟨a,b⟩, ⟨b,b⟩.

    Nearly parallel inputs (|cos| above the threshold) are interpolated linearly, as mergekit 0.1.5 does; norms below
    1e-8 count as one there, and so here.
    """
    aa, ab, bb = gram
    norm_a, norm_b = math.sqrt(aa), math.sqrt(bb)
    cosine = ab / (norm_a if norm_a > 1e-8 else 1.0) / (norm_b if norm_b > 1e-8 else 1.0)
    cosine = min(1.0, max(-1.0, cosine))
    if abs(cosine) > threshold:
        return 1.0 - t, t
    angle = math.acos(cosine)
    return math.sin((1.0 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


class Slerp(TileBlock):
    """Two inputs; the base is t = 0."""

    keeps_equal = True

    def rounds(self, call: Call) -> int:
        return 1

    def empty(self, number: int, call: Call, extent: TensorExtent) -> Statistic:
        return np.zeros(3, np.float64)

    def measure(self, number: int, call: Call, known: Known, tile: Tile, into: Statistic) -> None:
        a, b = tile.x_Kn
        into[:] += np.array((dot(a, a), dot(a, b), dot(b, b)))

    def apply(self, call: Call, known: Known, tile: Tile) -> F32:
        factor_a, factor_b = (np.float32(f) for f in slerp_factors(known[0].tolist(), call.number("t")))
        out: F32 = tile.x_Kn[0] * factor_a + tile.x_Kn[1] * factor_b
        return out


METHODS = (
    MethodSpec(
        name="slerp", summary="spherical interpolation from the base to one other model", spaces=("weight",),
        combine="block", tile=Slerp(),
        parameters=(ParameterSpec(name="t", kind="float", scope="global",
                                  doc="0 is the base, 1 the other model"),),
        base="required", max_sources=2, closed_on_deltas=False, cut="elements", paper="Shoemake, SIGGRAPH 1985",
    ),
)  # fmt: skip
