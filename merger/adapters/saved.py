"""What an adapter holds that is no tuner's: whole modules (modules_to_save), trained biases, rows of embeddings.

    base_model.model.<path>.weight                                     the tensor, whole
    base_model.model.<module>.modules_to_save.weight, .original_module.weight
                                                                       the same again, and as it was before training
    base_model.model.<path>.bias                                       a bias that bias: all or lora_only trained
    base_model.model.<module>[.token_adapter].trainable_tokens_delta   (rows, dim): rows that replace those of
                                                                       trainable_token_indices, in its order

No torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from merger.adapters.declare import AdapterModule, AdapterReading, Change, Formula, Saved
from merger.errors import Problem
from merger.formats import peft
from merger.tensors import TensorSpec


def read_norms(
    config: Mapping[str, Any], keys: peft.ParsedKeys, specs: Mapping[str, TensorSpec], where: str, found: AdapterReading
) -> None:
    """LN tuning: norms that were trained whole, `<module>.ln_tuning_layers.weight`."""
    for name in specs:
        module, infix, leaf = name.removeprefix(peft.PREFIX).partition(".ln_tuning_layers.")
        if infix:
            path = f"{module}.{leaf}"
            change = Change(target=path, steps=(Saved(name),))
            found.add(AdapterModule(module=path, tuner="ln_tuning", layer="saved", changes=(change,)))


def read_biases(
    config: Mapping[str, Any], keys: peft.ParsedKeys, specs: Mapping[str, TensorSpec], where: str, found: AdapterReading
) -> None:
    """BEFT: `<module>.beft_bias` (1, out) is added to the layer's bias."""
    for module, roles in keys.modules.items():
        if set(roles) == {"beft_bias"}:
            step = Formula("add", (("value", roles["beft_bias"]),), (("scaling", 1.0),), adds=True)
            change = Change(target=f"{module}.bias", steps=(step,), shape=(specs[roles["beft_bias"]].numel, 1))
            found.add(AdapterModule(module=module, tuner="beft", layer="vector", changes=(change,)))


def read_saved(
    config: Mapping[str, Any], keys: peft.ParsedKeys, specs: Mapping[str, TensorSpec], where: str, found: AdapterReading
) -> None:
    """Add what stands beside the tuner's own tensors."""
    for key in keys.other:
        spec = specs[key.name]
        if key.name in found.landed:
            continue
        if key.kind == "repeated":
            found.landed.add(key.name)
        if key.kind in {"saved_module", "bias"}:
            kind = _saved_as(config, key)
            made = Change(target=key.path, steps=(Saved(key.name),), keeps_tie=kind == "embeddings")
            found.add(AdapterModule(module=key.path, tuner=kind, layer="saved", changes=(made,)))
        elif key.kind == "trainable_tokens":
            indices = _indices(config, key.path)
            if len(indices) != spec.rows or len(spec.shape) != 2 or len(set(indices)) != len(indices):
                found.problems.append(
                    Problem("shape-mismatch", f"{key.name} holds {spec.rows} rows for {len(indices)} tokens", where,
                            "trainable_token_indices names each row once", "mend adapter_config.json")
                )  # fmt: skip
                continue
            step = Formula("rows", (("rows", key.name),), (("indices", indices),))
            change = Change(target=f"{key.path}.weight", steps=(step,), keeps_tie=True)
            found.add(
                AdapterModule(module=f"{key.path}.tokens", tuner="trainable tokens", layer="saved", changes=(change,))
            )
    whole_head = any(key.kind == "saved_module" and key.path == "lm_head.weight" for key in keys.other)
    if config.get("ensure_weight_tying") and not whole_head:  # what is there whole leaves nothing to tie
        found.refuse(
            "an adapter with ensure_weight_tying cannot be merged", where,
            "PEFT's unmerged model and its own merge do not agree on what a tied layer is given (2·ΔW)",
        )  # fmt: skip


def _saved_as(config: Mapping[str, Any], key: peft.OtherKey) -> str:
    module = key.path.rpartition(".")[0]
    listed = config.get("modules_to_save") or ()
    if any(module == name or module.endswith(f".{name}") or f".{name}." in f".{module}." for name in listed):
        return "modules_to_save"
    return "bias" if key.kind == "bias" else "embeddings"


def _indices(config: Mapping[str, Any], module: str) -> tuple[int, ...]:
    """The rows of one embedding that were trained. A list means the input embeddings; a map names modules."""
    named = config.get("trainable_token_indices", config.get("token_indices"))
    if isinstance(named, Mapping):
        last = [tokens for name, tokens in named.items() if module == name or module.endswith(f".{name}")]
        if not last and len(named) == 1:  # a head that is tied to the embeddings is saved beside them
            last = list(named.values())
        named = last[0] if last else ()
    return tuple(int(index) for index in named or ())
