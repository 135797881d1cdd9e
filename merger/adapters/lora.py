"""LoRA (and rsLoRA): what an adapter's tensors mean as ΔW = scaling · B·A. Declarations only; no torch.

Which modules an adapter touches is read from its tensor keys, never from target_modules. What would change the numbers
and is not handled here is refused by name (the list follows PEFT 0.21.2's LoraConfig).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from merger.errors import Problem
from merger.formats import peft
from merger.tensors import TensorSpec

PLAIN_INITS: Final = (True, False, None, "gaussian", "eva", "orthogonal", "mica", "lora_fa")
"""Values of init_lora_weights that leave the base as it was (B·A = 0 at the start, or untouched by design)."""

_REFUSED: Final[tuple[tuple[str, str, str], ...]] = (
    ("use_dora", "DoRA", "its magnitudes act on base + delta, so the delta alone is not the adapter"),
    ("lora_bias", "a bias on B", "it adds to the layer's bias, which a plain delta cannot hold"),
    ("layer_replication", "layer_replication", "its layers are copies of the base's, to be written out"),
    ("target_parameters", "target_parameters", "expert parameters are packed in layouts of their own"),
    ("trainable_token_indices", "trainable_token_indices", "they replace rows of the embeddings"),
    ("alora_invocation_tokens", "aLoRA", "it is active for some tokens only, so no fold has its effect"),
    ("use_qalora", "QALoRA", "it acts on pooled inputs"),
    ("use_bdlora", "BD-LoRA", "its factors are block-diagonal"),
    ("arrow_config", "Arrow", "it routes between experts at run time"),
    ("kasa_config", "KaSA", "it truncates the base first"),
    ("megatron_config", "Megatron layers", "its factors are split over ranks"),
)


def lora_problems(config: Mapping[str, Any], keys: peft.ParsedKeys, where: str) -> list[Problem]:
    """What in this adapter this version cannot merge right, one Problem a cause."""
    found: list[Problem] = []

    def refuse(what: str, why: str, fix: str = "") -> None:
        found.append(Problem("not-yet", what, where, why, fix or "leave this adapter out for now"))

    if config.get("peft_type") != "LORA":
        refuse(
            f"adapters of type {config.get('peft_type')} cannot be merged yet", "this version merges LoRA and rsLoRA"
        )
        return found
    for key, name, why in _REFUSED:
        if config.get(key):
            refuse(f"an adapter with {name} cannot be merged yet", why)
    init = config.get("init_lora_weights", True)
    if init not in PLAIN_INITS:
        refuse(
            f"an adapter whose init_lora_weights is {init!r} cannot be merged yet",
            "that initialisation changed the base, so its factors are relative to another base than the one on disk",
            "convert it with PEFT's path_initial_model_for_weight_conversion first",
        )
    if config.get("bias", "none") != "none":
        refuse(f"an adapter that trained biases (bias: {config['bias']}) cannot be merged yet", "they are no deltas")
    if config.get("fan_in_fan_out"):
        refuse("an adapter on transposed layers (fan_in_fan_out, GPT-2's Conv1D) cannot be merged yet",
               "its deltas lie transposed in the base")  # fmt: skip
    saved = [key.path for key in keys.other if key.kind == "saved_module"]
    embeddings = [name for name in saved if "embed" in name or "lm_head" in name or "wte" in name]
    if embeddings:
        refuse(
            f"an adapter that carries whole or resized embeddings ({embeddings[0]}) cannot be merged yet",
            "tokens that were added have to be united by their text: the work of a later version (vocabularies)",
            "if no token was added, save it again with save_pretrained(…, save_embedding_layers=False)",
        )
    elif saved:
        refuse(f"an adapter that saves whole modules ({saved[0]}) cannot be merged yet", "they are no deltas")
    other = [key.name for key in keys.other if key.kind != "saved_module"]
    if other:
        refuse(f"the adapter has tensors that are not LoRA factors ({other[0]})", "every tensor must land somewhere")
    for module, roles in keys.modules.items():
        extra = sorted(set(roles) - {"lora_A", "lora_B"})
        if extra and extra != ["lora_magnitude_vector"]:
            refuse(f"the module {module} has {', '.join(extra)}, which cannot be merged yet", "only linear layers can")
            break
    return found


def shape_problems(module: str, a: TensorSpec, b: TensorSpec, where: str) -> list[Problem]:
    """Whether A (r, in) and B (out, r) fit each other."""
    if len(a.shape) != 2 or len(b.shape) != 2:
        return [
            Problem("not-yet", f"the factors of {module} are not matrices", where,
                    f"lora_A is {a.shape}, lora_B is {b.shape}: a convolution or packed experts",
                    "leave this adapter out for now")
        ]  # fmt: skip
    if a.shape[0] != b.shape[1]:
        return [
            Problem("rank-mismatch", f"the factors of {module} have ranks {a.shape[0]} and {b.shape[1]}", where,
                    f"lora_A is {a.shape[0]} × {a.shape[1]}, lora_B is {b.shape[0]} × {b.shape[1]}",
                    "the file is damaged or was edited: fetch it again")
        ]  # fmt: skip
    return []
