"""IA3: a learned factor for every input or every output of a layer. Declarations only; no torch.

    <module>.ia3_l (out, 1)    W' = diag(l)·W, bias' = l·bias
    <module>.ia3_l (1, in)     W' = W·diag(l)                     feedforward_modules

Convolutions keep the same with trailing ones: (1, channels, 1, 1).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from merger.adapters.declare import AdapterModule, AdapterReading, Change, Formula
from merger.formats import peft
from merger.tensors import TensorSpec


def read_ia3(
    config: Mapping[str, Any], keys: peft.ParsedKeys, specs: Mapping[str, TensorSpec], where: str, found: AdapterReading
) -> None:
    """Add every IA3 module of an adapter to `found`."""
    for module, roles in keys.modules.items():
        if set(roles) != {"ia3_l"}:
            found.refuse(f"the module {module} has {', '.join(sorted(roles))}, which is no IA3", where,
                         "every tensor of an adapter must land somewhere")  # fmt: skip
            continue
        factors = specs[roles["ia3_l"]]
        conv = len(factors.shape) > 2
        inputs = _is_feedforward(config, module) if conv else factors.shape[0] == 1
        tensors = (("l", factors.name),)
        numbers = (("axis", "in" if inputs else "out"), ("size", factors.numel))
        changes = [Change(target=f"{module}.weight", steps=(Formula("scale", tensors, numbers),))]
        if not inputs:
            bias = Formula("scale", tensors, (("axis", "out"), ("size", factors.numel)))
            changes.append(Change(target=f"{module}.bias", steps=(bias,), optional=True))
        found.add(
            AdapterModule(module=module, tuner="ia3", layer="conv" if conv else "linear", changes=tuple(changes))
        )  # fmt: skip


def _is_feedforward(config: Mapping[str, Any], module: str) -> bool:
    named = config.get("feedforward_modules") or ()
    if isinstance(named, str):
        return re.fullmatch(named, module) is not None
    return any(module.endswith(name) for name in named)
