"""LoRA files without a config: kohya's scripts, LyCORIS, diffusers. Declarations only; no torch.

    lora_down (r, in…) · lora_up (out, r, 1…)             ΔW = alpha / r · up·down          LoRA, LoCon
    lora_down (r, in, 1, 1) · lora_mid (r, r, k, l)       ΔW[o,i,k,l] = alpha / r · Σ up[o,p]·mid[p,q,k,l]·down[q,i]
    hada_…, lokr_…                                        as in lycoris.py; alpha / r, and 1 for LoKr without factors

Without an alpha the scaling is 1. diffusers writes none, and since 0.34 the LoraConfig of each component beside the
tensors, whose alphas and ranks count then.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from merger.adapters.declare import AdapterModule, AdapterReading, Change, Formula, LowRank, Step
from merger.adapters.lora import shape_problems
from merger.adapters.lycoris import loha_shape, lokr_shape
from merger.errors import Problem
from merger.formats import bare_lora, peft
from merger.tensors import TensorSpec

_FLOATS: Final = ("F16", "BF16", "F32")
_MENDED: Final = "the file is damaged or was edited: fetch it again"


def read_bare(
    keys: bare_lora.BareKeys, specs: Mapping[str, TensorSpec], alphas: Mapping[str, float], metadata: Mapping[str, str],
    where: str,
) -> AdapterReading:  # fmt: skip
    """What such a file does, module by module. `alphas` are the values of its alpha tensors, by name on disk."""
    found = AdapterReading()
    configs = _configs(metadata, where, found)
    if keys.unknown:
        found.problems.append(
            Problem("unknown-tensor", f"the file has {len(keys.unknown)} tensor(s) that belong to no module: "
                    f"{', '.join(sorted(keys.unknown)[:3])}", where, f"its other names are {keys.spelling}'s",
                    "every tensor of an adapter must land somewhere: check how the file was made")
        )  # fmt: skip
    for one, other in keys.doubled:
        found.problems.append(
            Problem("duplicate-role", f"the tensors {one} and {other} are the same part of one module", where,
                    "which of them counts is not said", "remove one of them")
        )  # fmt: skip
    for module, roles in keys.modules.items():
        alpha = alphas[roles["alpha"]] if "alpha" in roles else None
        own = {role: name for role, name in roles.items() if role != "alpha"}
        made = _module(module, own, specs, where, found, alpha, configs)
        if made is not None:
            found.add(made)
    for name in sorted(found.landed):
        if specs[name].dtype.code not in _FLOATS:
            found.problems.append(
                Problem("unsupported-dtype", f"{name} is stored as {specs[name].dtype}", where,
                        "adapters are read in F32, F16 and BF16", "save the adapter in one of these")
            )  # fmt: skip
            break
    if not found.modules and not found.problems:
        found.problems.append(Problem("no-modules", "the adapter changes nothing", where, "", "check the reference"))
    return found


def _configs(metadata: Mapping[str, str], where: str, found: AdapterReading) -> dict[str, dict[str, Any]]:
    """Component → its LoraConfig, as diffusers writes them."""
    text = metadata.get(bare_lora.METADATA)
    if text is None:
        return {}
    try:
        document = json.loads(text)
    except ValueError:
        document = None
    if not isinstance(document, dict):
        found.problems.append(
            Problem("bad-adapter-config", f"the metadata's {bare_lora.METADATA} is no JSON object", where,
                    "it holds the ranks and alphas of the file's modules", _MENDED)
        )  # fmt: skip
        return {}
    made: dict[str, dict[str, Any]] = {}
    for key, value in document.items():
        component, _, name = str(key).partition(".")
        made.setdefault(component, {})[name] = value
    for component, config in made.items():
        for name in ("use_dora", "alora_invocation_tokens", "lora_bias"):
            if config.get(name):
                found.refuse(f"{component} was trained with {name}", where, "its weights are not those of plain LoRA")
    return made


def _module(
    module: str, roles: Mapping[str, str], specs: Mapping[str, TensorSpec], where: str, found: AdapterReading,
    alpha: float | None, configs: Mapping[str, Mapping[str, Any]],
) -> AdapterModule | None:  # fmt: skip
    if "dora_scale" in roles:
        found.refuse(
            f"{module} has a dora_scale", where,
            "LyCORIS takes its norms over inputs or over outputs, and the file does not say which",
        )  # fmt: skip
        return None
    if set(roles) == {"lora_A", "lora_B"}:
        return _lora(module, roles, specs, where, found, alpha, configs)
    if set(roles) == {"lora_A", "lora_B", "lora_mid"}:
        return _locon(module, roles, specs, where, found, alpha)
    if roles and all(role.startswith(("hada_", "lokr_")) for role in roles):
        return _lycoris(module, roles, specs, where, found, alpha)
    if set(roles) in ({"lora_A"}, {"lora_B"}):
        found.problems.append(
            Problem("missing-tensor", f"{module} has {next(iter(roles))} alone", where, "both factors make the delta",
                    "the file is damaged: fetch it again")
        )  # fmt: skip
        return None
    found.refuse(
        f"the module {module} has {', '.join(sorted(roles)) or 'an alpha alone'}, which this version does not know",
        where, "LoRA, LoCon, LoHa and LoKr are read: lora_down, lora_mid, lora_up, hada_… and lokr_…",
    )  # fmt: skip
    return None


def _lora(
    module: str, roles: Mapping[str, str], specs: Mapping[str, TensorSpec], where: str, found: AdapterReading,
    alpha: float | None, configs: Mapping[str, Mapping[str, Any]],
) -> AdapterModule | None:  # fmt: skip
    a, b = specs[roles["lora_A"]], specs[roles["lora_B"]]
    conv = len(a.shape) > 2
    wrong = shape_problems(module, a, b, where, "conv" if conv else "linear")
    if wrong:
        found.problems += wrong
        return None
    rank = a.shape[0]
    component, _, path = module.partition(".")
    scaling = 1.0 if alpha is None or not rank else alpha / rank
    if alpha is None and component in configs:
        declared, _, scaling = peft.lora_scaling(configs[component], path)
        if declared != rank:
            found.problems.append(
                Problem("rank-mismatch", f"{module} has rank {rank} on disk and {declared} in the metadata", where,
                        "the scaling follows from the rank", _MENDED)
            )  # fmt: skip
            return None
    pair = LowRank(a.name, b.name, scaling, rank)
    return AdapterModule(
        module=module, tuner="lora", layer="conv" if conv else "linear", rank=rank, scaling=scaling,
        changes=(Change(target=f"{module}.weight", steps=(pair,), shape=(b.shape[0], a.numel // max(1, rank))),),
        kernel=a.shape[2:],
    )  # fmt: skip


def _locon(
    module: str, roles: Mapping[str, str], specs: Mapping[str, TensorSpec], where: str, found: AdapterReading,
    alpha: float | None,
) -> AdapterModule | None:  # fmt: skip
    down, mid, up = (specs[roles[role]].shape for role in ("lora_A", "lora_mid", "lora_B"))
    kernel = mid[2:]
    sound = len(mid) >= 3 and mid[:2] == (up[1:2] + down[:1]) and all(n == 1 for n in (*down[2:], *up[2:]))
    if not sound or len(down) < 2:
        found.problems.append(
            Problem("bad-factors", f"the factors of {module} do not belong together", where,
                    f"lora_down is {down}, lora_mid {mid}, lora_up {up}", _MENDED)
        )  # fmt: skip
        return None
    rank, size = down[0], down[1]
    for n in kernel:
        size *= n
    scaling = 1.0 if alpha is None else alpha / rank
    step = Formula("locon", tuple(sorted(roles.items())), (("scaling", scaling),), adds=True, whole=True)
    return _added(module, "locon", step, (up[0], size), rank, scaling, kernel)


def _lycoris(
    module: str, roles: Mapping[str, str], specs: Mapping[str, TensorSpec], where: str, found: AdapterReading,
    alpha: float | None,
) -> AdapterModule | None:  # fmt: skip
    loha = any(role.startswith("hada_") for role in roles)
    shape = loha_shape(roles, specs) if loha else lokr_shape(roles, specs)
    if shape is None:
        found.refuse(
            f"the module {module} has {', '.join(sorted(roles))}, which is no {'LoHa' if loha else 'LoKr'}", where,
            "its parts do not make a whole", "fetch the file again",
        )  # fmt: skip
        return None
    factor = next((role for role in ("hada_w1_b", "lokr_w2_b", "lokr_w1_b") if role in roles), None)
    rank = 0 if factor is None else specs[roles[factor]].shape[0]
    scaling = alpha / rank if alpha is not None and rank else 1.0
    cores = [role for role in roles if "_t" in role]
    whole = [role for role in ("lokr_w2",) if role in roles]
    kernel = specs[roles[(cores or whole)[0]]].shape[2:] if cores or whole else ()
    step = Formula(
        "loha" if loha else "lokr", tuple(sorted(roles.items())), (("scaling", scaling),), adds=True, whole=bool(cores)
    )
    return _added(module, step.kind, step, shape, rank, scaling, kernel)


def _added(
    module: str, tuner: str, step: Step, shape: tuple[int, int], rank: int, scaling: float, kernel: tuple[int, ...]
) -> AdapterModule:
    return AdapterModule(
        module=module, tuner=tuner, layer="conv" if kernel else "linear", rank=rank, scaling=scaling, kernel=kernel,
        changes=(Change(target=f"{module}.weight", steps=(step,), shape=shape),),
    )  # fmt: skip
