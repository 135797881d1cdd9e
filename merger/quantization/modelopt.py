"""NVIDIA's Model Optimizer: FP8, NVFP4 and its other float formats, as `export_hf_checkpoint` writes them.

`X.weight` in F8 with `X.weight_scale`, one a tensor, a row or a block; or U8 pairs of E2M1 codes, the first low, with
E4M3 scales of 16 columns and `X.weight_scale_2`, a factor for the tensor (NVFP4), or E8M0 scales of 32 (MXFP4); I8 with
a scale a row. `X.input_scale`, `k_scale` and `v_scale` are of activations. The scheme is said in config.json, in
hf_quant_config.json, or in both. Layout: nvidia-modelopt 0.47.
"""

from __future__ import annotations

from typing import Final

from merger.quantization.declare import Found, QuantisedSource, Quantization
from merger.quantization.fp8 import CODES
from merger.quantization.scaled import scaled_parts
from merger.tensors import WHOLE, Coded, Part, StoredTensor, TensorSpec

_BESIDE: Final = ("input_scale", "k_scale", "v_scale", "output_scale")
_FOLDED: Final = ("pre_quant_scale", "svdquant_lora_a", "svdquant_lora_b")


def read_modelopt(source: QuantisedSource) -> Found:
    """Every quantised tensor of a checkpoint."""
    algorithm = str(source.scheme.get("quant_algo"))
    folded = sorted({key for key in _FOLDED for name in source.stored if name.endswith(f".{key}")})
    if folded:
        source.refuse(f"weights are stored for changed inputs ({', '.join(folded)})",
                      "a factor of each input, or a product beside it, belongs to them")  # fmt: skip
    kinds: dict[str, None] = {}
    for name, codes in source.stored.items():
        scale = source.get(f"{name}_scale")
        if codes.spec.dtype.code not in (*CODES, "U8", "I8") or not name.endswith("weight"):
            continue
        made, kind, shape = _coded(source, name, codes, scale)
        if isinstance(made, str):
            source.refuse(f"{name} is stored as {codes.spec.dtype} and cannot be read ({algorithm})", made)
            continue
        prefix = name.removesuffix("weight")
        beside = source.unread(*(f"{prefix}{key}" for key in _BESIDE))
        source.add(TensorSpec(name, source.dtype(), shape), made.with_parts(beside))
        kinds[kind] = None
    # A list of layers that are quantised, each its own way, is no list of those that are not.
    key = next((key for key in ("ignore", "exclude_modules") if key in source.scheme), None)
    listed = None if algorithm == "MIXED_PRECISION" else key
    label = "modelopt, " + (", ".join(kinds) or "no quantised tensor")
    return source.found(Quantization("modelopt", label, "keep", listed, beside=source.beside))


def _coded(
    source: QuantisedSource, name: str, codes: StoredTensor, scale: StoredTensor | None
) -> tuple[Coded | str, str, tuple[int, ...]]:
    """How a tensor lies, or why that is not known; what it is, for people; and its shape."""
    shape = codes.spec.shape
    if scale is None:
        return "a code without its scale is no weight", "", shape
    whole = source.get(f"{name}_scale_2")
    table = CODES.get(codes.spec.dtype.code, "int8" if codes.spec.dtype.code == "I8" else "e2m1")
    if table != "e2m1":
        if whole is not None or not (scale.spec.dtype.is_float or scale.spec.dtype.code in ("U8", "F8_E8M0")):
            return f"scales in {scale.spec.dtype}", "", shape
        return scaled_parts(codes, scale, shape, table=table), "int8" if table == "int8" else "fp8", shape
    shape = (*shape[:-1], 2 * shape[-1]) if shape else shape
    if scale.spec.dtype.code not in (("U8", "F8_E8M0") if whole is None else ("F8_E4M3",)):
        return f"pairs of codes with scales in {scale.spec.dtype} are no floats of 4 bits", "", shape
    wide = 32 if whole is None else 16
    coded = scaled_parts(codes, scale, shape, table=table)
    if not isinstance(coded, str) and (coded.number("block_rows"), coded.number("block_cols")) != (1, wide):
        coded = f"scales of {' × '.join(map(str, scale.spec.shape))} for {' × '.join(map(str, shape))} by {wide}"
    if isinstance(coded, str) or whole is None:
        return coded, "mxfp4", shape
    if whole.spec.numel != 1 or not whole.spec.dtype.is_float:
        return "there is more than one weight_scale_2", "", shape
    return coded.with_parts((Part("multiplier", whole, 1, WHOLE),)), "nvfp4", shape
