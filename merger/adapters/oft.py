"""OFT: the inputs of a layer are turned, block by block. Declarations only; no torch.

    <module>.oft_R.weight (blocks, n(n−1)/2)    upper triangles of skew matrices Q

R is (I−Q)(I+Q)⁻¹, or by default the first terms of I + 2Q + 2Q² + …, which is that of −Q (PEFT 0.21.2's two ways turn
opposite ways); W' = W·Rᵀ, block of columns by block of columns. Constrained OFT (coft) goes through PEFT's own code.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from merger.adapters.bridge import read_bridged
from merger.adapters.declare import AdapterModule, AdapterReading, Change, Formula
from merger.formats import peft
from merger.tensors import TensorSpec


def read_oft(
    config: Mapping[str, Any], keys: peft.ParsedKeys, specs: Mapping[str, TensorSpec], where: str, found: AdapterReading
) -> None:
    """Add every OFT module of an adapter to `found`."""
    if config.get("coft"):
        read_bridged(config, keys, specs, where, found)
        return
    for module, roles in keys.modules.items():
        if set(roles) != {"oft_R"}:
            found.refuse(
                f"the module {module} has {', '.join(sorted(roles))}, which is no OFT of a linear layer", where,
                "embeddings are turned in other ways than the inputs of a layer",
            )  # fmt: skip
            continue
        triangle = specs[roles["oft_R"]]
        block = (1 + math.isqrt(1 + 8 * triangle.shape[1])) // 2
        numbers = (
            ("block", block), ("neumann", bool(config.get("use_cayley_neumann", True))),
            ("terms", int(config.get("num_cayley_neumann_terms", 5))), ("shared", bool(config.get("block_share"))),
        )  # fmt: skip
        step = Formula("turn", (("q", triangle.name),), numbers)
        found.add(
            AdapterModule(module=module, tuner="oft", layer="linear",
                          changes=(Change(target=f"{module}.weight", steps=(step,)),))
        )  # fmt: skip
