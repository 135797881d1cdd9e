"""What the tests of methods in the exact core share: drawn factors, calls, and a block's answer as a dense matrix."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from merger.methods import METHODS, lowrank
from merger.methods.rounds import Call

F64 = npt.NDArray[np.float64]
Pair = tuple[npt.NDArray[Any], npt.NDArray[Any]]
"""A (rank, cols) and B (rows, rank)."""

WEIGHTS = (1.0, 0.6, -0.5)
RANKS = (2, 4, 1)

twins = importlib.import_module("tests.reference")


def draw(seed: int, rows: int, cols: int, ranks: Sequence[int] = RANKS) -> list[Pair]:
    g = np.random.default_rng(seed)
    return [(g.standard_normal((r, cols)), g.standard_normal((rows, r))) for r in ranks]


def call_of(name: str, count: int, density: float = 0.4, **changes: Any) -> Call:
    spec = METHODS[name]
    made = Call(
        method=name, prepare=spec.prepare, combine=spec.combine, weights=WEIGHTS[:count], densities=(density,) * count,
        keys=tuple(twins.key_of(0, i, "w", "delta") for i in range(count)), normalize=True, elect="unweighted",
        divisor="count", rescale="inverse" if spec.prepare == "drop" else "none",
    )  # fmt: skip
    return replace(made, **changes)


def in_core(call: Call, pairs: Sequence[Pair]) -> F64:
    """The merged delta (rows, cols) of the method's own block."""
    block = METHODS[call.method].core
    assert block is not None
    p, q = block.merge(call, lowrank.build_core([(torch.from_numpy(a), torch.from_numpy(b)) for a, b in pairs]))
    found: F64 = (p @ q.T).numpy()
    return found
