"""What a source holds, read from configs and headers alone: `read_catalog`. No torch, no tensor data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from merger.storage.base import Store
from merger.tensors import TensorSpec


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor as it lies in a file: a layout, and the decoder that turns it into rows of float32."""

    spec: TensorSpec
    file: str
    start: int
    """Byte of the first element, from the start of the file."""
    decoder: Literal["dense", "strided"] = "dense"
    """`dense`: row-major and contiguous; `strided`: a view, described by `strides`."""
    strides: tuple[int, ...] = ()
    """In elements; only for `strided`."""

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of a dense tensor of whole-byte elements."""
        return self.spec.cols * self.spec.dtype.itemsize


@dataclass(frozen=True, slots=True)
class LoraModule:
    """One adapted layer: ΔW = scaling · B·A for the tensor `target` of the base."""

    module: str
    """Path of the layer, as the base's checkpoint spells it."""
    target: str
    """Name of the base's tensor."""
    a: str
    """Stored tensor (rank, in)."""
    b: str
    """Stored tensor (out, rank)."""
    rank: int
    scaling: float
    rows: int
    cols: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Catalog:
    """One source, pinned. Comparable by value but for its store."""

    reference: str
    """As the user would write it, with the revision that was pinned."""
    kind: Literal["adapter", "model"]
    store: Store = field(compare=False)
    pins: dict[str, str]
    """Every file that is read → its pin."""
    tensors: dict[str, StoredTensor]
    config: dict[str, Any]
    """config.json or adapter_config.json."""
    modules: dict[str, LoraModule] = field(default_factory=dict)
    """Of an adapter: module path → what it holds."""
    companions: tuple[str, ...] = ()
    """Of a model: files that a loader may ask for beside the weights and the config."""
    code: tuple[str, ...] = ()
    """Python files that auto_map names: copied, never run."""
    shards: tuple[str, ...] = ()
    """Of a model: weight files in order."""
    licence: str = ""

    @property
    def base_name(self) -> str | None:
        """The base that an adapter names, or None."""
        name = self.config.get("base_model_name_or_path")
        return name if isinstance(name, str) and name else None

    @property
    def tied(self) -> bool:
        """Whether the model's config ties its head to its embeddings (also within text_config)."""
        for config in (self.config, self.config.get("text_config")):
            if isinstance(config, Mapping) and "tie_word_embeddings" in config:
                return bool(config["tie_word_embeddings"])
        return False
