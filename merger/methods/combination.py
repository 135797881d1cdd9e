"""Which calls form nothing but a linear combination of whole sources: `combines`. No torch.

Their factors follow from the sources' inner products, which adapters have without a dense delta:
⟨B·A, D·C⟩ = ⟨A·Cᵀ, Bᵀ·D⟩.
"""

from __future__ import annotations

from merger.methods import METHODS
from merger.methods.rounds import Call


def combines(call: Call) -> bool:
    """Whether a call's own block makes a linear combination of whole sources."""
    spec = METHODS.get(call.method)
    own = spec is not None and call.combine == "block" and call.prepare == "none"
    return own and spec is not None and spec.tile is not None and spec.tile.combines(call)
