"""One layer merged by PEFT's own code: the bridge to tuners that have no formula of ours.

A module with nothing but the layer, under its own path, is given to PEFT with the adapter's config and the tensors that
belong to it; PEFT merges it. Every parameter that PEFT would save for the layer must come from the file, so that
nothing random is left; the process's random state is put back.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Final

import torch
from torch import Tensor, nn

from merger.errors import MergeFailedError

_ALONE: Final = threading.Lock()
"""PEFT draws from the process's one random state, which threads would put back for each other."""
_LARGEST: Final = "largest_layer"
_NEUTRAL: Final[dict[str, object]] = {
    "exclude_modules": None, "layers_to_transform": None, "layers_pattern": None, "modules_to_save": None,
    "base_model_name_or_path": None, "task_type": None, "inference_mode": True, "auto_mapping": None,
    "revision": None, "peft_version": None,
}  # fmt: skip
"""Fields that say which layers are meant, or nothing about numbers."""


def merge_layer(
    weight: Tensor, tensors: Mapping[str, Tensor], config_text: str, module: str, wide: tuple[int, ...]
) -> Tensor:
    """The weight (out, in) of the layer `module` after PEFT has merged the adapter into it."""
    import peft

    root = nn.Module()
    _place(root, module, weight)
    targets = [module]
    if wide:  # shared factors have the size of the model's largest layer
        _place(root, _LARGEST, torch.ones(wide))
        targets.append(_LARGEST)
    with _ALONE, torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        model = peft.get_peft_model(root, _config(config_text, targets))
        wanted = {
            name for name in peft.get_peft_model_state_dict(model) if _LARGEST not in name
        }  # fmt: skip
        lacking = sorted(wanted - set(tensors))
        if lacking:
            raise MergeFailedError.of(
                "missing-tensor", f"PEFT expects {lacking[0]}, which the adapter does not hold", where=module,
                why="the layer would be left with what PEFT draws at random", fix="fetch the adapter again",
            )  # fmt: skip
        try:
            return _merged(model, tensors, wanted, module)
        except (RuntimeError, ValueError, KeyError, NotImplementedError) as error:
            raise MergeFailedError.of(
                "peft", f"PEFT cannot merge this layer: {error}", where=module,
                why="the adapter's tensors do not fit the base's layer, or its kind of layer",
                fix="name the base that the adapter was trained on",
            ) from error  # fmt: skip


def _merged(model: Any, tensors: Mapping[str, Tensor], wanted: set[str], module: str) -> Tensor:
    import peft

    given = {name: tensor.clone() for name, tensor in tensors.items() if name in wanted}
    result: Any = peft.set_peft_model_state_dict(model, given)
    if result.unexpected_keys:
        raise MergeFailedError.of("unknown-tensor", f"PEFT does not know {result.unexpected_keys[0]}", where=module)
    merged: Any = model.merge_and_unload()
    made: Tensor = merged.get_submodule(module).weight.detach()
    return made


def _config(text: str, targets: list[str]) -> Any:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    document = json.loads(text)
    kind = PEFT_TYPE_TO_CONFIG_MAPPING[document.pop("peft_type")]
    known = {field.name for field in fields(kind)}
    unknown = sorted(name for name, value in document.items() if name not in known and value and name not in _NEUTRAL)
    if unknown:
        raise MergeFailedError.of(
            "unknown-config", f"PEFT does not know the setting {unknown[0]} of this adapter",
            why="it may change what the numbers mean", fix="use the PEFT that wrote the adapter to convert it to LoRA",
        )  # fmt: skip
    settings = {name: value for name, value in document.items() if name in known} | {
        name: value for name, value in _NEUTRAL.items() if name in known
    }
    return kind(**settings | {"target_modules": targets})


def _place(root: nn.Module, path: str, weight: Tensor) -> None:
    """Put a linear layer of this weight under a dotted path."""
    *parents, leaf = path.split(".")
    at = root
    for name in parents:
        if not hasattr(at, name):
            at.add_module(name, nn.Module())
        at = at.get_submodule(name)
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
    at.add_module(leaf, layer)
