"""MXFP4 as gpt-oss stores its experts: E2M1 codes, two a byte, in blocks of 32 that share a power of two.

`…experts.gate_up_proj_blocks` (experts, out, in/32, 16) and `…_scales` (experts, out, in/32), bytes that are exponents
+ 127. They stand for `…experts.gate_up_proj` (experts, in, out): transformers keeps these matrices transposed.
"""

from __future__ import annotations

from merger.quantization.declare import Found, QuantisedSource, Quantization
from merger.tensors import Coded, Part, TensorSpec


def read_mxfp4(source: QuantisedSource) -> Found:
    """Every packed expert tensor of a checkpoint."""
    for base, codes in source.named("_blocks"):
        scales = source.get(f"{base}_scales")
        shape = codes.spec.shape
        fits = len(shape) == 4 and shape[3] == 16 and codes.spec.dtype.code == "U8"
        if (
            not fits
            or scales is None
            or scales.spec.shape != shape[:3]
            or scales.spec.dtype.code not in ("U8", "F8_E8M0")
        ):
            source.refuse(f"{base}_blocks has no scales that fit it", "a block of 32 codes has one scale",
                          "fetch the checkpoint again")  # fmt: skip
            continue
        experts, out, blocks, _ = shape
        covers = blocks * 32 * out
        parts = (Part("codes", codes, experts, covers), Part("scale", scales, experts, covers))
        spec = TensorSpec(base, source.dtype(), (experts, blocks * 32, out))
        source.add(spec, Coded("experts", parts, (("out", out), ("blocks", blocks))))
    return source.found(Quantization("mxfp4", "mxfp4, blocks of 32", "keep", "modules_to_not_convert"))
