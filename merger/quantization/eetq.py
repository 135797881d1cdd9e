"""EETQ: int8 with a scale for each output, in the order that a GPU kernel of FasterTransformer reads.

`X.weight` I8 (in, out) is that kernel's operand, not the matrix; `X.weight_scales` F16 (out). Its order, for GPUs since
Turing (compute capability 7.5): the matrix transposed; two outputs side by side, 64 inputs of the one, then 64 of the
other; of sixteen inputs 0 1 8 9 2 3 10 11 4 5 12 13 6 7 14 15; of four bytes 0 2 1 3; each code + 128. Source:
FasterTransformer, `cutlass_preprocessors.cc`. On Volta it is another: such a file is found out while it is read, since
each row's largest code must be at an end of its range.
"""

from __future__ import annotations

from typing import Final

from merger.quantization.declare import Found, QuantisedSource, Quantization
from merger.tensors import Coded, Part, TensorSpec

TILE: Final = 64


def read_eetq(source: QuantisedSource) -> Found:
    """Every EETQ layer of a checkpoint."""
    for name, scale in source.named("_scales"):
        codes = source.get(name)
        if codes is None or codes.spec.dtype.code != "I8" or not name.endswith("weight"):
            continue
        shape = codes.spec.shape
        fits = len(shape) == 2 and scale.spec.numel == shape[-1] and scale.spec.dtype.is_float
        if not fits or shape[0] % TILE or shape[1] % 2:
            source.refuse(f"{name} does not fit its scales, or the tiles of its kernel",
                          f"{' × '.join(map(str, shape))} codes, {scale.spec.numel} scales, tiles of {TILE} × 2",
                          "fetch the checkpoint again")  # fmt: skip
            continue
        inputs, outputs = shape
        parts = (Part("codes", codes, outputs // 2, 2 * inputs), Part("scale", scale, outputs, inputs))
        source.add(TensorSpec(name, source.dtype(), (outputs, inputs)), Coded("tiles", parts, ()))
    for name, tensor in source.stored.items():
        if name.endswith("weight") and tensor.spec.dtype.code == "I8" and name not in source.made:
            source.refuse(f"{name} is int8 and has no scales", "a code without its scale is no weight",
                          "fetch the checkpoint again")  # fmt: skip
    return source.found(Quantization("eetq", "eetq, int8, a scale an output", "none", "modules_to_not_convert"))
