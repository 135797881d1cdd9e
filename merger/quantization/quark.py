"""AMD's Quark: FP8 and symmetric int8, one scale a tensor or a row, as its export to safetensors lays them out.

`X.weight` in F8 or I8 with `X.weight_scale`; `X.input_scale` and `X.output_scale` are of activations. What is packed
(int4, MXFP4) or has zero points is refused. Layout: amd-quark 0.13 (`quark.torch.utils.pack`, `QParamsLinear`).
"""

from __future__ import annotations

from typing import Final

from merger.quantization.declare import Found, QuantisedSource, Quantization
from merger.quantization.fp8 import CODES
from merger.quantization.scaled import scaled_parts
from merger.tensors import TensorSpec

_BESIDE: Final = ("input_scale", "input_zero_point", "output_scale", "output_zero_point", "bias_scale")


def read_quark(source: QuantisedSource) -> Found:
    """Every FP8 and int8 tensor of a checkpoint."""
    kinds: dict[str, None] = {}
    for name, codes in source.stored.items():
        code = codes.spec.dtype.code
        scale = source.get(f"{name}_scale")
        if not name.endswith("weight") or (codes.spec.dtype.is_float and scale is None):
            continue
        if code not in (*CODES, "I8") or scale is None or not scale.spec.dtype.is_float:
            held = f"with scales in {scale.spec.dtype}" if scale is not None else "and has no scale"
            source.refuse(f"{name} is stored as {code} {held}", "this version reads Quark's FP8 and int8 weights")
            continue
        if source.get(f"{name}_zero_point") is not None:
            source.refuse(f"{name} has zero points", "this version reads Quark's symmetric weights")
            continue
        coded = scaled_parts(codes, scale, codes.spec.shape, table=CODES.get(code, "int8"))
        if isinstance(coded, str):
            source.refuse(f"the scales of {name} do not cover it", coded)
            continue
        beside = source.unread(*(f"{name.removesuffix('weight')}{key}" for key in _BESIDE))
        source.add(TensorSpec(name, source.dtype(), codes.spec.shape), coded.with_parts(beside))
        kinds["int8" if code == "I8" else "fp8"] = None
    label = "quark, " + (", ".join(kinds) or "no quantised tensor")
    return source.found(Quantization("quark", label, "keep", "exclude"))
