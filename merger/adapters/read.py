"""One way in for every kind of adapter: `read_adapter`, from its config and the names and shapes of its tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Final

from merger.adapters.bridge import BRIDGED, read_bridged
from merger.adapters.declare import AdapterReading
from merger.adapters.ia3 import read_ia3
from merger.adapters.lora import read_lora
from merger.adapters.lycoris import read_lycoris
from merger.adapters.oft import read_oft
from merger.adapters.saved import read_biases, read_norms, read_saved
from merger.errors import Problem, SourceError
from merger.formats import peft
from merger.tensors import TensorSpec

Family = Callable[
    [Mapping[str, Any], peft.ParsedKeys, Mapping[str, TensorSpec], str, AdapterReading],
    None,
]


def _read_nothing(
    config: Mapping[str, Any], keys: peft.ParsedKeys, specs: Mapping[str, TensorSpec], where: str, found: AdapterReading
) -> None:
    """A type whose tensors are all read as what stands beside a tuner."""


FAMILIES: Final[dict[str, Family]] = {
    "LORA": read_lora,
    "ADALORA": read_lora,
    "IA3": read_ia3,
    "LOHA": read_lycoris,
    "LOKR": read_lycoris,
    "OFT": read_oft,
    "TRAINABLE_TOKENS": _read_nothing,
    "LN_TUNING": read_norms,
    "BEFT": read_biases,
    **dict.fromkeys(sorted(set(BRIDGED) - {"OFT"}), read_bridged),
}
"""PEFT's types, and who reads them. What stands beside the tuner's tensors is read for all of them (saved.py)."""

_PROMPT: Final = (
    "PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT", "CPT", "CARTRIDGE",
)  # fmt: skip
_NEVER: Final[dict[str, str]] = {
    **dict.fromkeys(_PROMPT, "it adds inputs to the model and changes no weight, so there is nothing to merge"),
    "POLY": "it mixes several LoRAs by the task of each input",
    "XLORA": "it mixes several LoRAs by what each input is",
    "MIXED": "it is several adapters in one: merge them one by one",
    "LILY": "its layers share factors by routing that depends on the input",
    "FROD": "its rotations are taken from all layers together, and a layer by itself gives others",
    "UNILORA": "its numbers are spread over all layers by a hash of where each lies",
    "TINYLORA": "its layers share numbers by the order in which a model counts them",
    "ADAMSS": "it clusters the base's singular vectors at random when it begins",
    "SHADOW": "it computes beside the model, not in its weights",
}
_FLOATS: Final = ("F16", "BF16", "F32")


def read_adapter(config: Mapping[str, Any], specs: Mapping[str, TensorSpec], where: str) -> AdapterReading:
    """What an adapter does, module by module. Everything that cannot be merged right is a Problem, never skipped.

    Raises SourceError for a config that says nothing that could be meant.
    """
    try:
        return _read(config, specs, where)
    except SourceError as error:
        raise SourceError(
            [replace(p, where=f"{where}/{p.where}") if p.where == peft.ADAPTER_CONFIG else p for p in error.problems]
        ) from None


def _read(config: Mapping[str, Any], specs: Mapping[str, TensorSpec], where: str) -> AdapterReading:
    found = AdapterReading()
    kind = str(config.get("peft_type"))
    if kind in _NEVER:
        found.refuse(f"adapters of type {kind} cannot be merged", where, _NEVER[kind])
        return found
    family = FAMILIES.get(kind)
    if family is None:
        found.refuse(
            f"adapters of type {kind} cannot be merged", where,
            f"this version reads {', '.join(FAMILIES)}", "convert it to LoRA with PEFT's convert_to_lora, or fold it",
        )  # fmt: skip
        return found
    if family is read_bridged:  # what its parameters are called is PEFT's business
        family(config, peft.parse_adapter_keys([]), specs, where, found)
        keys = peft.parse_adapter_keys([spec for name, spec in specs.items() if name not in found.landed])
    else:
        keys = peft.parse_adapter_keys(specs.values())
        family(config, keys, specs, where, found)
    read_saved(config, keys, specs, where, found)
    _check_all_landed(config, specs, where, found)
    return found


def _check_all_landed(
    config: Mapping[str, Any], specs: Mapping[str, TensorSpec], where: str, found: AdapterReading
) -> None:
    """Every tensor of the file must be part of a module, and be of a type that can be read."""
    lost = sorted(name for name in specs if name not in found.landed)
    if lost and not found.problems:
        found.problems.append(
            Problem("unknown-tensor", f"the adapter has {len(lost)} tensor(s) that belong to no module: {lost[0]}",
                    where, "every tensor of an adapter must land somewhere", "check how the adapter was saved")
        )  # fmt: skip
    bridged = config.get("peft_type") in BRIDGED  # indices are integers there
    odd = sorted(
        name for name in found.landed
        if specs[name].dtype.code not in (*_FLOATS, *(("I32", "I64") if bridged else ()))
    )  # fmt: skip
    if odd:
        found.problems.append(
            Problem("unsupported-dtype", f"{odd[0]} is stored as {specs[odd[0]].dtype}", where,
                    "adapters are read in F32, F16 and BF16", "save the adapter in one of these")
        )  # fmt: skip
    if not found.modules and not found.problems:
        found.problems.append(Problem("no-modules", "the adapter changes nothing", where, "", "check the reference"))
