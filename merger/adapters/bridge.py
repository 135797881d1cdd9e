"""The long tail of PEFT's tuners, through PEFT's own layer code, one layer at a time. Declarations only; no torch.

    base_model.model.<module>.<parameter of the tuner>…    one layer's
    base_model.<parameter of the tuner>…                   shared by all layers

What the parameters mean is PEFT's business (merger/adapters/peft_layers.py builds one layer and lets PEFT merge it);
what this file knows is which tuners can be taken layer by layer, and that every stored tensor belongs to one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Final

from merger.adapters.declare import AdapterModule, AdapterReading, Change, Formula
from merger.formats import peft
from merger.tensors import TensorSpec

BRIDGED: Final[dict[str, str]] = {
    "BOFT": "boft", "HRA": "hra", "VERA": "vera", "PVERA": "pvera", "FOURIERFT": "fourierft", "WAVEFT": "waveft",
    "VBLORA": "vblora", "RANDLORA": "randlora", "C3A": "c3a", "GRALORA": "gralora", "MISS": "miss",
    "DELORA": "delora", "PSOFT": "psoft", "HIRA": "hira", "DEFT": "deft", "GLORA": "glora", "OSF": "osf",
    "ROAD": "road", "SHIRA": "shira", "PEANUT": "peanut",
    "SUPERTUNING": "supertuning", "OFT": "oft",
}  # fmt: skip
"""Types whose layers PEFT merges one by one, and what the names of their parameters begin with."""
_WIDE: Final = {"VERA": ("vera_A", "vera_B"), "PVERA": ("pvera_A", "pvera_B"), "RANDLORA": ("randlora_A", "randlora_B")}
"""Shared factors that are as large as the largest layer: (…, in) and (out, …)."""
_CHANGES_BIAS: Final = ("ROAD", "GLORA")


def read_bridged(
    config: Mapping[str, Any], keys: peft.ParsedKeys, specs: Mapping[str, TensorSpec], where: str, found: AdapterReading
) -> None:
    """Add every layer of a bridged tuner to `found`."""
    kind = str(config["peft_type"])
    parameter = re.compile(rf"(?:{BRIDGED[kind]})_\w+")
    layers: dict[str, list[str]] = {}
    shared: list[str] = []
    for name in specs:
        parts = name.removeprefix(peft.PREFIX).split(".")
        at = next((i for i, part in enumerate(parts) if parameter.fullmatch(part)), None)
        if name.startswith(peft.PREFIX) and at:
            layers.setdefault(".".join(parts[:at]), []).append(name)
        elif parameter.fullmatch(name.removeprefix("base_model.").split(".")[0]):
            shared.append(name)
    lacking = [name for name in _WIDE.get(kind, ()) if f"base_model.{name}" not in specs]
    if lacking:
        found.refuse(
            f"a {kind} adapter without its projections cannot be merged", where,
            "they would have to be drawn again from a key, and depend on the largest layer of the model",
            "save it with save_projection=True",
        )  # fmt: skip
        return
    text = json.dumps(config, sort_keys=True)
    for module, names in layers.items():
        tensors = tuple((name, name) for name in sorted([*names, *shared]))
        numbers = (("config", text), ("module", module), ("wide", _wide(kind, specs)))
        step = Formula("peft", tensors, numbers, whole=True)
        changes = [Change(target=f"{module}.weight", steps=(step,))]
        if kind in _CHANGES_BIAS:
            changes.append(Change(target=f"{module}.bias", steps=(Formula("unbridged"),), optional=True))
        found.add(AdapterModule(module=module, tuner=kind.lower(), layer="linear", changes=tuple(changes)))


def _wide(kind: str, specs: Mapping[str, TensorSpec]) -> tuple[int, ...]:
    """(out, in) of the largest layer, where shared factors are as large as that."""
    if kind not in _WIDE:
        return ()
    a, b = (specs[f"base_model.{name}"].shape for name in _WIDE[kind])
    return b[0], a[-1]
