"""Quantised checkpoints: `read_quantization` makes of codes and scales the tensors they stand for. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from merger.errors import Problem
from merger.formats import checkpoint
from merger.formats.checkpoint import Checkpoint
from merger.quantization.aqlm import read_aqlm
from merger.quantization.bnb import read_bitsandbytes
from merger.quantization.columns import read_awq, read_gptq
from merger.quantization.compressed import read_compressed
from merger.quantization.declare import Found, QuantisedSource, Quantization
from merger.quantization.eetq import read_eetq
from merger.quantization.fp8 import read_fp8
from merger.quantization.hqq import read_hqq
from merger.quantization.modelopt import read_modelopt
from merger.quantization.mxfp4 import read_mxfp4
from merger.quantization.quark import read_quark
from merger.quantization.torchao import read_torchao
from merger.storage.base import RangeRead, Store
from merger.tensors import StoredTensor

__all__ = ["SCHEMES", "Found", "Quantization", "read_quantization"]

SCHEMES: Final[dict[str, Callable[[QuantisedSource], Found]]] = {
    "bitsandbytes": read_bitsandbytes,
    "fp8": read_fp8,
    "fbgemm_fp8": read_fp8,
    "compressed-tensors": read_compressed,
    "gptq": read_gptq,
    "awq": read_awq,
    "mxfp4": read_mxfp4,
    "torchao": read_torchao,
    "hqq": read_hqq,
    "aqlm": read_aqlm,
    "eetq": read_eetq,
    "modelopt": read_modelopt,
    "quark": read_quark,
}
"""`quant_method` → what reads it."""

_WHY: Final = {
    "vptq": "its weights are indices into learned codebooks, for which there is no reader yet",
    "quip": "its weights are rotated before they are coded",
    "spqr": "its outliers lie in a sparse layout of their own",
    "higgs": "its weights are rotated before they are coded",
    "bitnet": "ternary weights cannot hold a delta",
}


def read_quantization(found: Checkpoint, stored: Mapping[str, StoredTensor], store: Store) -> Found:
    """A checkpoint's tensors, with every coded one as what it stands for. Reads headers, and small parts that say how
    others lie."""
    beside = checkpoint.read_json(store, BESIDE) if BESIDE in found.files else None
    scheme = quantization_config(found.config) or scheme_beside(beside)
    if scheme is None:
        return Found(dict(stored))
    method = method_of(scheme)
    if method not in SCHEMES:
        why = _WHY.get(method, "codes are not weights: merging them gives noise")
        problem = Problem("quantised-source", f"a checkpoint quantised by {method} cannot be read", "", why,
                          "use the unquantised checkpoint")  # fmt: skip
        return Found(dict(stored), problems=(problem,))

    def read_small(tensors: Sequence[StoredTensor]) -> list[bytes]:
        return _read_small(store, tensors)

    source = QuantisedSource(scheme, found.config, stored, read_small, found.metadata, beside)
    seen = SCHEMES[method](source)
    if seen.problems or any(tensor.coded is not None for tensor in seen.tensors.values()):
        return seen
    problem = Problem("quantised-source", f"the config says {method}, and no tensor holds its codes", "",
                      "the config and the weights are not of one checkpoint",
                      "remove quantization_config from config.json if the weights are dense")  # fmt: skip
    return Found(dict(stored), problems=(problem,))


BESIDE: Final = "hf_quant_config.json"
"""Where NVIDIA's tools say the scheme, beside config.json or in its place."""


def scheme_beside(beside: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """The scheme that such a file names; None where it names none."""
    named = beside.get("quantization") if beside is not None else None
    if not isinstance(named, Mapping) or not named.get("quant_algo"):
        return None
    return {**named, "quant_method": "modelopt"}


def quantization_config(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The scheme that a config.json names, wherever it does; None for an unquantised checkpoint."""
    text = config.get("text_config")
    for place in (config, text if isinstance(text, Mapping) else {}):
        for key in ("quantization_config", "compression_config"):
            if place.get(key) is not None:
                found = place[key]
                return found if isinstance(found, Mapping) else {"quant_method": "unknown"}
    return None


def method_of(scheme: Mapping[str, Any]) -> str:
    """quant_method, which old bitsandbytes configs leave out."""
    named = scheme.get("quant_method")
    if named is None and (scheme.get("load_in_4bit") or scheme.get("load_in_8bit")):
        return "bitsandbytes"
    return str(named or "unknown").replace("compressed_tensors", "compressed-tensors")


def _read_small(store: Store, tensors: Sequence[StoredTensor]) -> list[bytes]:
    """Whole small tensors, a file at a time."""
    buffers = [bytearray(tensor.spec.nbytes) for tensor in tensors]
    files: dict[str, list[RangeRead]] = {}
    for tensor, buffer in zip(tensors, buffers, strict=True):
        if buffer:
            files.setdefault(tensor.file, []).append(RangeRead(tensor.start, memoryview(buffer)))
    for file, reads in files.items():
        store.read_into(file, reads, pin=store.stat(file).pin)
    return [bytes(buffer) for buffer in buffers]
