"""The files of a merged model beside its tensors' values: config.json, and which tensor lies in which file. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

from merger.catalog import Catalog
from merger.formats import checkpoint
from merger.planning.modules import Module
from merger.tensors import TensorSpec, part_key

QUANTIZATION_KEYS: Final = ("quantization_config", "compression_config")


def model_config(
    donor: Mapping[str, Any], specs: Sequence[TensorSpec], *, layers: Mapping[Module, Sequence[tuple[int, int]]],
    untied: bool, vocabulary: int | None = None, labels: int | None = None,
    quantization: Mapping[str, Any] | None = None,
) -> bytes:  # fmt: skip
    """config.json of a merge: the donor's, made true.

    `layers` are the (first, number) taken from the donor's stack, slice by slice, of modules made of slices.
    `vocabulary` and `labels` are the rows of embeddings and of a classifier, or None where they are the donor's.
    `untied` says that the head is written and is no longer the embeddings. The dtype is that of most bytes.
    `quantization` takes the place of the donor's; None: the output is dense.
    """
    config = json.loads(json.dumps(donor))
    text = config.get("text_config") if isinstance(config.get("text_config"), dict) else None
    for module, taken in layers.items():
        parts, keys = module.layer_keys
        places = [config if not part else config.get(part) for part in parts]
        place = next((p for p in places if isinstance(p, dict) and any(k in p for k in keys)), config)
        key = next((k for k in keys if k in place), keys[0])
        place[key] = sum(number for _, number in taken)
        types = place.get("layer_types")
        if isinstance(types, list):
            place["layer_types"] = [kind for first, number in taken for kind in types[first : first + number]]
    if untied:
        (text if text is not None and "tie_word_embeddings" in text else config)["tie_word_embeddings"] = False
    if vocabulary is not None:
        (text if text is not None and "vocab_size" in text else config)["vocab_size"] = vocabulary
    for place in (config, text):
        for key in QUANTIZATION_KEYS:
            if place is not None and place.get(key) is not None:
                place[key] = quantization
                if quantization is None:
                    del place[key]
    if quantization is not None and not any(
        place is not None and place.get(k) for place in (config, text) for k in QUANTIZATION_KEYS
    ):
        config[QUANTIZATION_KEYS[0]] = quantization
    if labels is not None and len(config.get("id2label") or (0, 1)) != labels:
        config["id2label"] = {str(i): f"LABEL_{i}" for i in range(labels)}
        config["label2id"] = {f"LABEL_{i}": i for i in range(labels)}
    main = _main_dtype(specs)
    for place in (config, text):
        for key in ("dtype", "torch_dtype"):
            if main is not None and place is not None and key in place:
                place[key] = main
    return (json.dumps(config, indent=2, ensure_ascii=False, sort_keys=True) + "\n").encode()


def _main_dtype(specs: Sequence[TensorSpec]) -> str | None:
    counted: dict[str, int] = {}
    for spec in specs:
        if spec.dtype.is_float and spec.dtype.torch_name is not None:
            counted[spec.dtype.torch_name] = counted.get(spec.dtype.torch_name, 0) + spec.nbytes
    return max(counted, key=lambda name: counted[name]) if counted else None


def placed_as(donor: Catalog, owned: Sequence[tuple[str, TensorSpec]]) -> dict[str, list[TensorSpec]]:
    """The donor's own files, under safetensors names; (tensor it belongs to, what is stored) of each. What the donor
    lacks goes where its tensor is, or into the last file."""
    files = list(donor.shards)
    safe = all(name.endswith(".safetensors") for name in files)
    names = dict(zip(files, files if safe else checkpoint.shard_names(len(files)), strict=True))
    shards: dict[str, list[TensorSpec]] = {new: [] for new in names.values()}
    for owner, spec in owned:
        stored = donor.tensors.get(spec.name) or donor.parts.get(part_key(spec.name)) or donor.tensors.get(owner)
        shards[names[stored.file] if stored is not None else names[files[-1]]].append(spec)
    return {name: held for name, held in shards.items() if held}
