"""Which tensors are weights of linear layers, told from their names and shapes: `is_linear`. Pure."""

from __future__ import annotations

from typing import Final

from merger.adapters.bind import HEAD
from merger.planning.calls import layer_of
from merger.tensors import TensorSpec

ROUTERS: Final = (".gate.weight", ".router.weight", ".shared_expert_gate.weight")
"""Matrices that choose experts: modules of their own."""
LABELS: Final = ("score.weight", "classifier.weight", "classifier.out_proj.weight")
"""Heads that have one row a label."""
_LOOKED_UP: Final = "relative_attention_bias.weight"
"""Rows that are looked up, among numbered layers."""


def is_embedding(name: str) -> bool:
    return "embed" in name or "wte" in name or "wpe" in name


def is_linear(spec: TensorSpec) -> bool:
    """Whether a tensor is the matrix of a linear layer among numbered layers."""
    name = spec.name
    if len(spec.shape) != 2 or not name.endswith(".weight") or layer_of(name) is None:
        return False
    return not is_embedding(name) and not name.endswith((*ROUTERS, *LABELS, HEAD, _LOOKED_UP))
