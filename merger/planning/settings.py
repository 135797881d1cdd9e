"""Whether the configs of merged models say that equal weights mean equal things. Pure.

Rotary positions and the split into heads are not in the weights: rows of q_proj and k_proj that are turned by other
angles, or belong to other heads, have nothing in common though their shapes agree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from merger.errors import Problem

_HEADS: Final = (
    "num_attention_heads", "num_key_value_heads", "head_dim", "n_head", "num_heads", "d_kv", "qk_rope_head_dim",
    "qk_nope_head_dim", "v_head_dim", "num_experts_per_tok",
)  # fmt: skip
_ROTARY: Final = ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "rotary_pct", "rotary_dim")
_REMARKED: Final = (
    "hidden_act", "hidden_activation", "activation_function", "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon",
    "norm_epsilon", "sliding_window", "logit_scale", "final_logit_softcapping", "attn_logit_softcapping",
    "embedding_multiplier", "residual_multiplier", "attention_multiplier",
)  # fmt: skip
"""What a merge goes on with, as one of the sources has it."""


def settings_problems(configs: Sequence[tuple[str, Mapping[str, Any]]]) -> tuple[list[Problem], list[Problem]]:
    """(what stands against a merge of models with these configs, what is only remarked). `configs` is (label, config).

    A setting that one of two configs leaves out is not compared: its default is in code that is not read.
    """
    refused, remarked = [], []
    for place in ("", "text_config", "vision_config"):
        parts = [(label, config if not place else config.get(place)) for label, config in configs]
        held = [(label, _normal(part)) for label, part in parts if isinstance(part, Mapping)]
        for key in dict.fromkeys(key for _, part in held for key in part):
            said = [(label, part[key]) for label, part in held if key in part]
            if all(value == said[0][1] for _, value in said[1:]):
                continue
            name = f"{place}.{key}" if place else key
            where = "; ".join(f"{label}: {_short(value)}" for label, value in said)
            if key in _REMARKED:
                remarked.append(
                    Problem("settings-differ", f"the models differ in {name}", where,
                            "the output takes its base's, or its first model's", "check that this is what you want")
                )  # fmt: skip
                continue
            rotary = key == "rotary"
            refused.append(
                Problem(
                    "settings-differ", f"the models differ in {'their rotary positions' if rotary else name}", where,
                    f"the same row {'is turned by another angle' if rotary else 'belongs to another head'} in each",
                    "use models of one architecture and one rope setting",
                )
            )  # fmt: skip
    return refused, remarked


def _normal(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that count, rotary ones in one form: older configs say rope_theta and rope_scaling, newer
    rope_parameters."""
    found = {key: config[key] for key in (*_HEADS, *_REMARKED) if config.get(key) is not None}
    parameters = config.get("rope_parameters")
    if not isinstance(parameters, Mapping):
        scaling = config.get("rope_scaling")
        parameters = dict(scaling) if isinstance(scaling, Mapping) else {}
        theta = config.get("rope_theta")
        if theta is not None:
            parameters["rope_theta"] = theta
    rotary = _rotary(parameters)
    for key in ("partial_rotary_factor", "rotary_pct", "rotary_dim"):
        if config.get(key) is not None:
            rotary.setdefault("share" if key != "rotary_dim" else key, config[key])
    if "rope_theta" in rotary or any(isinstance(value, Mapping) for value in rotary.values()):
        found["rotary"] = rotary
    return found


def _rotary(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary settings without those that say the default."""
    if any(isinstance(value, Mapping) for value in parameters.values()):  # one for each kind of layer
        return {kind: _rotary(value) if isinstance(value, Mapping) else value for kind, value in parameters.items()}
    names = {"type": "rope_type", "partial_rotary_factor": "share"}
    found = {names.get(key, key): value for key, value in parameters.items() if value is not None}
    if found.get("rope_type") == "default":
        del found["rope_type"]
    if found.get("share") == 1.0:
        del found["share"]
    return {key: float(value) if isinstance(value, int) and not isinstance(value, bool) else value
            for key, value in found.items()}  # fmt: skip


_TABLES: Final = ("inv_freq", "cos_cached", "sin_cached")


def is_table(name: str) -> bool:
    """Whether a float tensor is a table of rotary positions, which is made from the config and never merged."""
    return name.endswith(_TABLES)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
