"""LoRA and AdaLoRA: ΔW = scaling · B·A, in all the forms that PEFT 0.21.2 saves. Declarations only; no torch.

    <module>.lora_A.weight (r, in)          <module>.lora_B.weight (out, r)               Linear, Conv1D
    <module>.lora_A.weight (r, in, k…)      <module>.lora_B.weight (out, r, 1…)           Conv1d, Conv2d, Conv3d
    <module>.lora_embedding_A (r, words)    <module>.lora_embedding_B (dim, r)            Embedding: ΔW = (B·A)ᵀ
    <module>.lora_B.bias (out)              added to the layer's bias, times scaling      lora_bias
    <module>.lora_magnitude_vector          W' = m / ‖W + ΔW‖ · (W + ΔW), norms by row    DoRA
    <module>.lora_E (r, 1)                  ΔW = alpha / r · B·diag(E)·A                  AdaLoRA

Which modules an adapter touches is read from its tensor names, never from target_modules. Where the base stores a layer
transposed (Conv1D) is not written in the adapter: merger/adapters/bind.py decides it from the base.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from merger.adapters.declare import AdapterModule, AdapterReading, Change, Formula, Layer, LowRank, Step
from merger.adapters.experts import read_experts
from merger.errors import Problem
from merger.formats import peft
from merger.tensors import TensorSpec

PLAIN_INITS: Final = (True, False, None, "gaussian", "eva", "orthogonal", "mica", "lora_fa")
"""Values of init_lora_weights that leave the base as it was (B·A = 0 at the start, or untouched by design)."""
RECOMPUTED_INITS: Final = ("pissa", "olora")
"""Those whose first factors follow from the base alone."""
_ADALORA_EPS: Final = 1e-5
_ADALORA_RANK: Final = 12
"""AdaLoraConfig's init_r where a config says nothing."""

_REFUSED: Final[tuple[tuple[str, str, str], ...]] = (
    ("alora_invocation_tokens", "aLoRA", "it is active after its invocation tokens only, so no fold has its effect"),
    ("use_qalora", "QALoRA", "it acts on pooled inputs, which no change of the weights does"),
    ("use_bdlora", "BD-LoRA", "its factors are block-diagonal and stored block by block"),
    ("arrow_config", "Arrow", "it chooses between experts at run time, token by token"),
    ("kasa_config", "KaSA", "it truncates the base's singular values before it adds to them"),
    ("megatron_config", "Megatron layers", "its factors are split over ranks"),
)


def read_lora(
    config: Mapping[str, Any], keys: peft.ParsedKeys, specs: Mapping[str, TensorSpec], where: str, found: AdapterReading
) -> None:
    """Add every LoRA module of an adapter to `found`, and say what of it cannot be merged right."""
    for key, name, why in _REFUSED:
        if config.get(key):
            found.refuse(f"an adapter with {name} cannot be merged", where, why)
    packed = read_experts(config, keys, specs, where, found) if config.get("target_parameters") else frozenset()
    initial = initial_step(config, where, found)
    if initial is not None and packed:
        found.refuse(
            f"an adapter with target_parameters whose init_lora_weights is {config.get('init_lora_weights')!r} cannot "
            "be merged", where, "that initialisation is one of linear layers",
        )  # fmt: skip
    for module, roles in keys.modules.items():
        if module in packed:
            continue
        if "lora_E" in roles and not specs[roles["lora_E"]].numel:  # AdaLoRA left it no rank
            found.landed |= set(roles.values())
            continue
        layer = _layer_of(module, roles, specs, where, found)
        if layer is None:
            continue
        a, b, kind = layer
        made = _module(config, module, roles, specs, (a, b, kind), where, found)
        if made is not None:
            found.add(_with_initial(made, initial))


def initial_step(config: Mapping[str, Any], where: str, found: AdapterReading) -> Formula | None:
    """The step that takes the first factors from the base, where the initialisation put them there; None of others."""
    init = config.get("init_lora_weights", True)
    if isinstance(init, str):
        init = init.lower() if init.lower() in {"mica", "gaussian", "eva"} else init
    if init in PLAIN_INITS:
        return None
    if init in RECOMPUTED_INITS:
        return Formula(str(init), whole=True)
    known = isinstance(init, str) and (init.startswith(("pissa_niter_", "corda")) or init in {"loftq", "lora_ga"})
    if not known:
        found.refuse(
            f"an adapter whose init_lora_weights is {init!r} cannot be merged", where,
            "what that initialisation does to the base is not known to this version",
            "convert it with PEFT's path_initial_model_for_weight_conversion",
        )  # fmt: skip
        return None
    return Formula("initial", numbers=(("init", str(init)),), whole=True)


def _with_initial(module: AdapterModule, initial: Formula | None) -> AdapterModule:
    from dataclasses import replace

    if initial is None or module.layer == "embedding":  # an embedding's start is zero whatever the word
        return module
    first, *others = module.changes
    pair = next(step for step in first.steps if isinstance(step, LowRank))
    numbers = (*initial.numbers, ("rank", pair.rank), ("scaling", pair.scaling))
    steps: tuple[Step, ...] = (replace(initial, numbers=numbers), *first.steps)
    return replace(module, tuner=f"lora ({dict(numbers).get('init', initial.kind)})",
                   changes=(replace(first, steps=steps), *others))  # fmt: skip


def _layer_of(
    module: str, roles: Mapping[str, str], specs: Mapping[str, TensorSpec], where: str, found: AdapterReading
) -> tuple[str, str, Layer] | None:
    """The roles of A and B and the kind of layer."""
    names = ("lora_embedding_A", "lora_embedding_B") if any("embedding" in r for r in roles) else ("lora_A", "lora_B")
    lacking = [name for name in names if name not in roles]
    if len(lacking) == 2:
        found.refuse(
            f"the module {module} has {', '.join(sorted(roles))}, which is no LoRA", where,
            "every tensor of an adapter must land somewhere",
        )  # fmt: skip
        return None
    if lacking:
        found.problems.append(
            Problem("missing-tensor", f"{module} has no {lacking[0]}", where, "both factors make the delta",
                    "the file is damaged: fetch it again")
        )  # fmt: skip
        return None
    if names[0] == "lora_embedding_A":
        return (*names, "embedding")
    return (*names, "conv" if len(specs[roles["lora_A"]].shape) > 2 else "linear")


def _module(
    config: Mapping[str, Any], module: str, roles: Mapping[str, str], specs: Mapping[str, TensorSpec],
    layer: tuple[str, str, Layer], where: str, found: AdapterReading,
) -> AdapterModule | None:  # fmt: skip
    a, b = specs[roles[layer[0]]], specs[roles[layer[1]]]
    known = {layer[0], layer[1], "lora_bias", "lora_magnitude_vector", "lora_E"}
    extra = sorted(set(roles) - known)
    if extra:
        found.refuse(f"the module {module} has {', '.join(extra)}, which this version does not know", where,
                     "it would change what the factors mean")  # fmt: skip
        return None
    wrong = shape_problems(module, a, b, where, layer[2])
    if wrong:
        found.problems += wrong
        return None
    rank, in_size, out_size = a.shape[0], a.numel // max(1, a.shape[0]), b.shape[0]
    adalora = config.get("peft_type") == "ADALORA"
    if adalora:
        alpha = config.get("lora_alpha", peft.DEFAULT_ALPHA)
        scaling = (float(alpha) if alpha > 0 else float(rank)) / (_adalora_rank(config, rank) + _ADALORA_EPS)
    else:
        declared, _, scaling = peft.lora_scaling(config, module.removesuffix(".base_layer"))
        if declared != rank:
            found.problems.append(
                Problem("rank-mismatch", f"{module} has rank {rank} on disk and {declared} in its config",
                        f"{where}/adapter_config.json", "the scaling follows from the config's rank",
                        "mend r or rank_pattern in adapter_config.json")
            )  # fmt: skip
            return None
    pair = LowRank(a.name, b.name, scaling, rank, diagonal=roles.get("lora_E", ""))
    steps: tuple[Step, ...] = (pair,)
    tuner = "adalora" if adalora else "lora"
    if "lora_magnitude_vector" in roles:
        magnitude = roles["lora_magnitude_vector"]
        if specs[magnitude].numel != out_size:
            found.problems.append(
                Problem("shape-mismatch", f"the magnitudes of {module} are {specs[magnitude].numel}, not {out_size}",
                        where, "DoRA has one an output", "the file is damaged: fetch it again")
            )  # fmt: skip
            return None
        steps = (pair, Formula("magnitude", (("m", magnitude),)))
        tuner = "dora"
    elif config.get("use_dora"):
        found.problems.append(
            Problem("missing-tensor", f"{module} has no lora_magnitude_vector", where,
                    "use_dora says that there is one", "the file is damaged: fetch it again")
        )  # fmt: skip
        return None
    changes = [Change(target=f"{module}.weight", steps=steps, shape=(out_size, in_size))]
    if "lora_bias" in roles:
        bias = Formula("add", (("value", roles["lora_bias"]),), (("scaling", scaling),), adds=True)
        changes.append(Change(target=f"{module}.bias", steps=(bias,), shape=(out_size, 1)))
    return AdapterModule(
        module=module, tuner=tuner, layer=layer[2], changes=tuple(changes), rank=rank, scaling=scaling,
        kernel=a.shape[2:],
    )  # fmt: skip


def _adalora_rank(config: Mapping[str, Any], rank: int) -> int:
    """What PEFT divides by: the rank at the start, also of modules that were left with fewer."""
    first = config.get("init_r", _ADALORA_RANK)
    return first if isinstance(first, int) and not isinstance(first, bool) and first > 0 else rank


def shape_problems(module: str, a: TensorSpec, b: TensorSpec, where: str, layer: Layer) -> list[Problem]:
    """Whether A (r, in…) and B (out, r…) fit each other."""
    sound = len(a.shape) == len(b.shape) and (len(a.shape) == 2 if layer != "conv" else 3 <= len(a.shape) <= 5)
    if not sound or (layer == "conv" and any(size != 1 for size in b.shape[2:])):
        return [
            Problem("bad-factors", f"the factors of {module} do not belong together", where,
                    f"lora_A is {a.shape}, lora_B is {b.shape}", "the file is damaged or was edited: fetch it again")
        ]  # fmt: skip
    if layer == "conv" and b.shape[1] != a.shape[0] and b.shape[1] and a.shape[0] % b.shape[1] == 0:
        return [
            Problem("unsupported-adapter", f"{module} is a convolution in groups, into which LoRA cannot be folded",
                    where, "A sees the channels of all groups, and each output of the layer sees one group only",
                    "leave this module out with exclude")
        ]  # fmt: skip
    if a.shape[0] != b.shape[1]:
        return [
            Problem("rank-mismatch", f"the factors of {module} have ranks {a.shape[0]} and {b.shape[1]}", where,
                    f"lora_A is {a.shape}, lora_B is {b.shape}",
                    "the file is damaged or was edited: fetch it again")
        ]  # fmt: skip
    return []
