"""LoRA files without a config, as image trainers write them: how their tensors are called. What they mean is elsewhere.

    kohya       lora_unet_down_blocks_0_…_to_q.lora_down.weight    dots of the path are underscores; .lora_up.weight,
                                                                   .lora_mid.weight, .hada_…, .lokr_…, .alpha
    diffusers   unet.down_blocks.0.….to_q.lora_A.weight            unet, transformer, text_encoder, text_encoder_2 …
    native      diffusion_model.double_blocks.0.….lora_A.weight    paths as the model's own authors name them

Older files of diffusers call the same `….processor.to_q_lora.down.weight`, `….to_q.lora.down.weight` and
`….q_proj.lora_linear_layer.down.weight`. The layouts are those of the published files of kohya's scripts, LyCORIS 3 and
diffusers 0.35.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final, Literal

WEIGHTS: Final = "pytorch_lora_weights.safetensors"
"""What diffusers calls the file, and looks for in a folder."""
METADATA: Final = "lora_adapter_metadata"
"""Key of a header's metadata under which diffusers keeps LoraConfigs as JSON, `unet.lora_alpha` and so on."""

Spelling = Literal["peft", "kohya", "diffusers", "native"]

_KOHYA: Final = re.compile(r"(?P<module>(?:lora|lycoris)_[^.]+)\.(?P<leaf>.+)")
_DOTTED: Final = re.compile(
    r"(?P<component>unet|transformer|text_encoder(?:_[23])?|diffusion_model)\."
    r"(?P<path>.+?)\.(?P<leaf>(?:lora_[AB]|lora_down|lora_up|lora|lora_linear_layer)(?:\.\w+)+|alpha|lora_\w+)"
)
_OLD_PROCESSOR: Final = re.compile(
    r"(?:(?P<component>unet|transformer|text_encoder(?:_[23])?)\.)?(?P<path>.+)\.(?P<name>to_(?:q|k|v|out))_lora\."
    r"(?P<leaf>down|up)\.weight"
)
_ROLES: Final = {
    "lora_down.weight": "lora_A", "lora_A.weight": "lora_A", "lora.down.weight": "lora_A",
    "lora_linear_layer.down.weight": "lora_A", "lora_up.weight": "lora_B", "lora_B.weight": "lora_B",
    "lora.up.weight": "lora_B", "lora_linear_layer.up.weight": "lora_B", "lora_mid.weight": "lora_mid",
    "lora_A.default.weight": "lora_A", "lora_B.default.weight": "lora_B", "down": "lora_A", "up": "lora_B",
}  # fmt: skip
_TEXT_NAMES: Final = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
_FLAT: Final = {
    "unet": "lora_unet", "diffusion_model": "lora_unet", "transformer": "lora_transformer",
    "text_encoder": "lora_te", "text_encoder_2": "lora_te2", "text_encoder_3": "lora_te3",
}  # fmt: skip
_COMPONENT: Final = re.compile(r"lora_(unet|transformer|te\d?)_(.*)")
_SCHEMES: Final = {
    "diffusers": ("down_blocks_", "mid_block_", "up_blocks_", "transformer_blocks_", "single_transformer_blocks_"),
    "the model's own authors": ("input_blocks_", "middle_block_", "output_blocks_", "double_blocks_", "single_blocks_",
                                "joint_blocks_"),
}  # fmt: skip
_BASE_PREFIXES: Final = {
    "image": ("model.diffusion_model.", "diffusion_model.", "unet.", "transformer.", ""),
    "te": ("cond_stage_model.transformer.", "conditioner.embedders.0.transformer.", "text_encoder.", ""),
    "te1": ("conditioner.embedders.0.transformer.", "text_encoder.", ""),
    "te2": ("conditioner.embedders.1.transformer.", "text_encoder_2.", ""),
    "te3": ("text_encoder_3.", ""),
}
"""Where a component's tensors lie in one file that holds a whole pipeline, or the component alone."""


@dataclass(slots=True)
class BareKeys:
    """The tensor names of such a file, by module."""

    spelling: Spelling
    modules: dict[str, dict[str, str]] = field(default_factory=dict)
    """Module → role (`lora_A`, `lora_B`, `lora_mid`, `alpha`, or a name of LyCORIS) → name on disk."""
    doubled: list[tuple[str, str]] = field(default_factory=list)
    """Tensors that are the same part of the same module."""
    unknown: list[str] = field(default_factory=list)


def parse_keys(names: Iterable[str]) -> BareKeys | None:
    """The names of a LoRA file without a config; None where they are none of these spellings, or several."""
    found: dict[Spelling, BareKeys] = {}
    unknown = []
    for name in names:
        parsed = _parse(name)
        if parsed is None:
            unknown.append(name)
            continue
        spelling, module, role = parsed
        roles = found.setdefault(spelling, BareKeys(spelling)).modules.setdefault(module, {})
        if role in roles:
            found[spelling].doubled.append((roles[role], name))
        roles[role] = name
    if len(found) != 1:
        return None
    (keys,) = found.values()
    if all(role == "alpha" for roles in keys.modules.values() for role in roles):
        return None
    keys.unknown = unknown
    return keys


def _parse(name: str) -> tuple[Spelling, str, str] | None:
    """(spelling, module, role)."""
    if old := _OLD_PROCESSOR.fullmatch(name):
        component = old["component"] or "unet"
        path = old["path"].removesuffix(".processor")
        if component.startswith("text_encoder"):
            leaf = _TEXT_NAMES[old["name"]]
        else:
            leaf = "to_out.0" if old["name"] == "to_out" else old["name"]
        return "diffusers", f"{component}.{path}.{leaf}", _ROLES[old["leaf"]]
    if flat := _KOHYA.fullmatch(name):
        return "kohya", flat["module"], _ROLES.get(flat["leaf"], flat["leaf"].removesuffix(".weight"))
    if dotted := _DOTTED.fullmatch(name):
        leaf = dotted["leaf"]
        spelling: Spelling = "native" if dotted["component"] == "diffusion_model" else "diffusers"
        return spelling, f"{dotted['component']}.{dotted['path']}", _ROLES.get(leaf, leaf)
    return None


def flat_name(module: str) -> str:
    """A module as kohya's scripts call it. Of kohya's own names: themselves."""
    component, dot, path = module.partition(".")
    return f"{_FLAT[component]}_{path.replace('.', '_')}" if dot and component in _FLAT else module


def component_of(module: str) -> tuple[str, str]:
    """(`image` for the denoiser, `te`, `te1`, `te2` …, or `` for others; the path in it with underscores)."""
    found = _COMPONENT.fullmatch(flat_name(module))
    if found is None:
        return "", module
    return ("image" if found[1] in {"unet", "transformer"} else found[1]), found[2]


def scheme_of(path: str) -> str:
    """Whose names a denoiser's path follows; `` where that cannot be told."""
    return next((scheme for scheme, starts in _SCHEMES.items() if path.startswith(starts)), "")


def tensors_of(modules: Iterable[str], names: Iterable[str]) -> dict[str, str]:
    """Module → the base's tensor, of the modules whose component lies in the base under one prefix that has them all.

    Modules that are not in the answer are found under no prefix, or under several names at once."""
    held: dict[str, list[str]] = {}
    for name in names:
        if name.endswith(".weight"):
            held.setdefault(name.removesuffix(".weight").replace(".", "_"), []).append(name)
    by_component: dict[str, list[tuple[str, str]]] = {}
    for module in modules:
        component, path = component_of(module)
        by_component.setdefault(component, []).append((module, path))
    found: dict[str, str] = {}
    for component, members in by_component.items():
        for prefix in _BASE_PREFIXES.get(component, ("",)):
            hits = {
                module: [name for name in held.get(prefix.replace(".", "_") + path, ()) if name.startswith(prefix)]
                for module, path in members
            }
            if all(len(hit) == 1 for hit in hits.values()):
                found |= {module: hit[0] for module, hit in hits.items()}
                break
    return found


def output_names(spelling: Spelling, module: str) -> tuple[str, str, str]:
    """Names of A, of B and of alpha; the last is empty where the spelling goes without."""
    if spelling == "kohya":
        return f"{module}.lora_down.weight", f"{module}.lora_up.weight", f"{module}.alpha"
    return f"{module}.lora_A.weight", f"{module}.lora_B.weight", ""
