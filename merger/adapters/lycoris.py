"""LoHa and LoKr: deltas that are products of small matrices, though of no low rank. Declarations only; no torch.

    LoHa   ΔW = scaling · (w1_a·w1_b) ∘ (w2_a·w2_b)
    LoKr   ΔW = scaling · w1 ⊗ w2, each whole or a product of its own _a and _b

Convolutions may hold w1 and w2 with a core (t1, t2): w[p, r, k, l] = Σ t[i, j, k, l]·a[i, p]·b[j, r].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from merger.adapters.declare import AdapterModule, AdapterReading, Change, Formula
from merger.formats import peft
from merger.tensors import TensorSpec

_LOHA: Final = ({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}, {"hada_t1", "hada_t2"})
_W1: Final = ({"lokr_w1"}, {"lokr_w1_a", "lokr_w1_b"})
_W2: Final = ({"lokr_w2"}, {"lokr_w2_a", "lokr_w2_b"}, {"lokr_w2_a", "lokr_w2_b", "lokr_t2"})


def read_lycoris(
    config: Mapping[str, Any], keys: peft.ParsedKeys, specs: Mapping[str, TensorSpec], where: str, found: AdapterReading
) -> None:
    """Add every LoHa or LoKr module of an adapter to `found`."""
    loha = config.get("peft_type") == "LOHA"
    for module, roles in keys.modules.items():
        shape = loha_shape(roles, specs) if loha else lokr_shape(roles, specs)
        if shape is None:
            found.refuse(
                f"the module {module} has {', '.join(sorted(roles))}, which is no {'LoHa' if loha else 'LoKr'}", where,
                "its parts do not make a whole", "fetch the file again",
            )  # fmt: skip
            continue
        rank, _, scaling = peft.lora_scaling(config, module, "alpha")
        core = any("_t" in role for role in roles)
        step = Formula(
            "loha" if loha else "lokr", tuple(sorted(roles.items())), (("scaling", scaling),), adds=True, whole=core
        )
        found.add(
            AdapterModule(
                module=module, tuner="loha" if loha else "lokr", layer="conv" if core else "linear", rank=rank,
                scaling=scaling, changes=(Change(target=f"{module}.weight", steps=(step,), shape=shape),),
            )
        )  # fmt: skip


def loha_shape(roles: Mapping[str, str], specs: Mapping[str, TensorSpec]) -> tuple[int, int] | None:
    """(rows, columns) of a LoHa module; None where its parts make none."""
    needed, cores = _LOHA
    if set(roles) not in (needed, needed | cores):
        return None
    a, b = specs[roles["hada_w1_a"]].shape, specs[roles["hada_w1_b"]].shape
    if "hada_t1" in roles:
        core = specs[roles["hada_t1"]]
        return a[1], b[1] * (core.numel // (core.shape[0] * core.shape[1]))
    return a[0], b[1]


def lokr_shape(roles: Mapping[str, str], specs: Mapping[str, TensorSpec]) -> tuple[int, int] | None:
    """(rows, columns) of a LoKr module; None where its parts make none."""
    first = {role for role in roles if role.startswith("lokr_w1")}
    second = set(roles) - first
    if first not in _W1 or second not in _W2:
        return None

    def shape(name: str) -> tuple[int, ...]:
        return specs[roles[name]].shape

    p, q = shape("lokr_w1") if "lokr_w1" in roles else (shape("lokr_w1_a")[0], shape("lokr_w1_b")[1])
    if "lokr_w2" in roles:
        c, d = shape("lokr_w2")[0], specs[roles["lokr_w2"]].numel // shape("lokr_w2")[0]
    elif "lokr_t2" in roles:
        core = specs[roles["lokr_t2"]]
        c, d = shape("lokr_w2_a")[1], shape("lokr_w2_b")[1] * (core.numel // (core.shape[0] * core.shape[1]))
    else:
        c, d = shape("lokr_w2_a")[0], shape("lokr_w2_b")[1]
    return p * c, q * d
