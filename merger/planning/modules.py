"""The modules of a model that has several (mergekit's `modules`), found from tensor names. Pure.

text_decoder            the language model, its head included: all that no other module holds
vision_tower, vision_model          the image encoder
multi_modal_projector               what joins the two
encoder, decoder, shared            of an encoder-decoder; its head is the decoder's
default                 all that no other module holds
any other name          the tensors whose names begin with it
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

_PROJECTOR: Final = frozenset({"multi_modal_projector", "mm_projector", "projector", "connector", "merger"})
_VISION: Final = frozenset({"vision_tower", "vision_model", "vision_encoder", "image_encoder", "visual"})
_LAYER_KEYS: Final[Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]]] = {
    "text_decoder": (("text_config", ""), ("num_hidden_layers", "n_layer", "num_layers")),
    "vision_tower": (("vision_config",), ("num_hidden_layers", "depth")),
    "vision_model": (("vision_config",), ("num_hidden_layers", "depth")),
    "encoder": (("", "encoder"), ("encoder_layers", "num_layers", "num_hidden_layers")),
    "decoder": (("", "decoder"), ("decoder_layers", "num_decoder_layers", "num_hidden_layers")),
}
_OF_A_WHOLE: Final = (("",), ("num_hidden_layers", "n_layer", "num_layers"))


@dataclass(frozen=True, slots=True)
class Module:
    """One module, or the whole model where the name is empty."""

    name: str = ""
    sliced: bool = False
    """Whether its layers are put together from slices."""
    others: tuple[str, ...] = ()
    """Names of the other modules, which decide what is left for this one."""

    def holds(self, tensor: str) -> bool:
        return not self.name or module_of(tensor, (self.name, *self.others)) == self.name

    @property
    def layer_keys(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """(parts of a config where its number of layers may stand, "" for the top; what the number may be called)."""
        return _LAYER_KEYS.get(self.name, _OF_A_WHOLE)


WHOLE: Final = Module()
"""A model that is not divided."""


def module_of(tensor: str, names: Sequence[str]) -> str | None:
    """The one of these modules that holds a tensor; None where none does."""
    pieces = tensor.split(".")
    for name in names:
        if name == "multi_modal_projector" and _PROJECTOR & set(pieces):
            return name
    for name in names:
        if name in ("vision_tower", "vision_model") and _VISION & set(pieces) and not _PROJECTOR & set(pieces):
            return name
        if name in ("encoder", "decoder", "shared") and name in pieces[:2]:
            return name
    for name in names:
        if name not in _LAYER_KEYS and name not in ("multi_modal_projector", "default", "shared"):
            prefix = name.rstrip(".")
            if tensor == prefix or tensor.startswith(f"{prefix}."):
                return name
    if "decoder" in names and pieces[0] in ("lm_head", "proj_out"):
        return "decoder"
    return next((name for name in names if name in ("text_decoder", "default")), None)


def modules_of(sliced: Mapping[str, bool]) -> dict[str, Module]:
    """The modules of a manifest, by name; `sliced` says which are made of slices."""
    return {name: Module(name, is_sliced, tuple(n for n in sliced if n != name)) for name, is_sliced in sliced.items()}


def left_out(tensors: Iterable[str], modules: Sequence[Module]) -> list[str]:
    """Tensors that no module holds."""
    return [tensor for tensor in tensors if not any(module.holds(tensor) for module in modules)]
