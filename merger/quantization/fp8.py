"""FP8 weights with float scales: `fp8` (blocks, as DeepSeek-V3; or one scale a tensor) and `fbgemm_fp8` (one a row).

`X.weight` is E4M3 (or E5M2); the weight is code × scale. `X.weight_scale_inv` holds, whatever its name, the scale:
one for each block of `weight_block_size`, the last block of a side perhaps shorter. A scale in E8M0 is a power of two.
"""

from __future__ import annotations

from typing import Final

from merger.quantization.declare import Found, QuantisedSource, Quantization
from merger.quantization.scaled import scaled_parts
from merger.tensors import StoredTensor, TensorSpec

CODES: Final = {"F8_E4M3": "e4m3", "F8_E5M2": "e5m2"}
_SCALES: Final = ("_scale_inv", "_scale")


def read_fp8(source: QuantisedSource) -> Found:
    """Every FP8 tensor with its scales."""
    block = source.scheme.get("weight_block_size")
    size = (int(block[0]), int(block[1])) if isinstance(block, list | tuple) and len(block) == 2 else None
    method = str(source.scheme.get("quant_method"))
    for name, codes in source.stored.items():
        if codes.spec.dtype.code not in CODES or name.endswith(_SCALES):
            continue
        scale = next((s for suffix in _SCALES if (s := source.get(f"{name}{suffix}")) is not None), None)
        if scale is None:
            source.refuse(f"{name} is FP8 and has no scale", "a code without its scale is no weight",
                          "fetch the checkpoint again")  # fmt: skip
            continue
        add_scaled(source, name, codes, scale, CODES[codes.spec.dtype.code], size)
    kind = f"blocks of {size[0]} × {size[1]}" if size else "a scale a tensor or row"
    return source.found(Quantization(method, f"fp8, {kind}", "keep", "modules_to_not_convert"))


def add_scaled(
    source: QuantisedSource, name: str, codes: StoredTensor, scale: StoredTensor, table: str,
    block: tuple[int, int] | None,
) -> None:  # fmt: skip
    """One tensor of one-byte codes and a grid of scales, if the grid covers it."""
    coded = scaled_parts(codes, scale, codes.spec.shape, table=table, block=block)
    if isinstance(coded, str):
        source.refuse(f"the scales of {name} do not cover it", coded, "use the unquantised checkpoint")
        return
    prefix = name.removesuffix("weight")
    extra = source.unread(
        f"{prefix}activation_scale", f"{prefix}activation_scale_inv", f"{prefix}input_scale",
        f"{prefix}input_scale_ub", f"{prefix}k_scale", f"{prefix}v_scale", f"{prefix}output_scale",
    )  # fmt: skip
    spec = TensorSpec(name, source.dtype(), codes.spec.shape)
    source.add(spec, coded.with_parts(extra))
