"""HQQ: unsigned codes of 1 to 8 bits in slots of the same words, with float scales and zeros by groups.

A weight (out, in) is reshaped before it is grouped: to (groups, group_size) for axis 1, whose groups are runs of the
flat weight, or to (group_size, groups) for axis 0, whose groups are strides. `X.W_q` holds the rows of that matrix: the
first half (of two slots) in the upper bits, the second below them; 3 bits in ten slots of an I32, with rows of zeros
behind. The weight is (code − zero) × scale. What the numbers mean is said in small tensors beside them: `X.shape`,
`X.group_size`, `X.axis`, `X.packing` (a text, a byte a letter), `X.view_as_float`. Layout: hqq 0.2.8 (`BitPack`,
`HQQLinear.state_dict`). Its .pt files, whose scales may be quantised once more, are pickles and not read.
"""

from __future__ import annotations

from typing import Final

from merger.quantization.declare import Found, QuantisedSource, Quantization
from merger.tensors import WHOLE, Coded, Part, StoredTensor, TensorSpec

_PACKED: Final = {
    "8bit_u8": (8, 1, 1), "4bit_u8": (4, 2, 1), "3bit_32": (3, 10, 4), "2bit_u8": (2, 4, 1), "1bit_u8": (1, 8, 1),
}  # fmt: skip
"""Packing → bits, slots, bytes of a word."""
_SAID: Final = ("shape", "group_size", "axis", "packing")
_BESIDE: Final = (
    "nbits", "shape", "group_size", "axis", "packing", "view_as_float", "unpack_view_dtype", "quant_scale",
    "quant_zero", "compute_dtype", "offload_meta", "encoded_state_dict", "stores_quant_config", "channel_wise",
    "optimize", "round_zero",
)  # fmt: skip
_SMALL: Final = 1 << 10


def read_hqq(source: QuantisedSource) -> Found:
    """Every HQQ layer of a checkpoint."""
    found = source.named(".W_q")
    small = [
        (f"{base}.{key}", stored)
        for base, _ in found
        for key in _SAID
        if (stored := source.get(f"{base}.{key}")) is not None and stored.spec.nbytes <= _SMALL
    ]
    said = dict(zip((name for name, _ in small), source.read_small([stored for _, stored in small]), strict=True))
    labels: dict[str, None] = {}
    for base, codes in found:
        made = _layer(source, base, codes, {key: said.get(f"{base}.{key}") for key in _SAID})
        if isinstance(made, str):
            source.refuse(f"{base}.W_q cannot be read", made, "fetch the checkpoint again")
            continue
        bits = made.number("bits")
        axis = 0 if made.number("across") else 1
        labels[f"{bits} bits, groups of {made.value('grouped')}, axis {axis}"] = None
    return source.found(Quantization("hqq", "hqq, " + ("; ".join(labels) or "no quantised tensor"), "none"))


def _numbers(source: QuantisedSource, name: str, data: bytes | None) -> list[int]:
    stored = source.get(name)
    if data is None or stored is None:
        return []
    size = stored.spec.dtype.itemsize
    return [int.from_bytes(data[i : i + size], "little", signed=True) for i in range(0, len(data), size)]


def _layer(source: QuantisedSource, base: str, codes: StoredTensor, said: dict[str, bytes | None]) -> Coded | str:
    """Adds a layer's weight: how it lies, or what does not fit."""
    packing = (said["packing"] or b"").decode("latin-1")
    if packing not in _PACKED:
        return f"its packing is {packing!r}" if packing else "nothing says how its codes are packed"
    bits, slots, word = _PACKED[packing]
    shape = _numbers(source, f"{base}.shape", said["shape"])
    axes = _numbers(source, f"{base}.axis", said["axis"])
    sizes = _numbers(source, f"{base}.group_size", said["group_size"])
    scale, zero = source.get(f"{base}.scale"), source.get(f"{base}.zero")
    if scale is None or zero is None or not (scale.spec.dtype.is_float and zero.spec.dtype.is_float):
        return "scales and zeros are missing, or quantised once more"
    if len(shape) != 2 or min(shape) < 1 or axes not in ([0], [1]) or len(sizes) > 1 or (sizes and sizes[0] < 1):
        return f"shape {shape}, axis {axes} and group size {sizes} do not say how it lies"
    count = shape[0] * shape[1]
    axis = axes[0]
    group = sizes[0] if sizes else (shape[1] if axis else shape[0])
    groups = count // group
    if scale.spec.numel == zero.spec.numel == 1:  # one scale for the whole matrix
        group, groups, axis = count, 1, 1
    length, width = (groups, group) if axis else (group, groups)
    if not sizes and not axis:
        length, width = shape
    slot = -(-length // slots) * width
    if scale.spec.numel != groups or zero.spec.numel != groups or groups * group != count:
        return f"{scale.spec.numel} scales and {zero.spec.numel} zeros for {count} codes in groups of {group}"
    if codes.spec.nbytes != slot * word or (slots in (2, 4, 8) and length % slots):
        return f"{codes.spec.nbytes} bytes for {count} codes of {bits} bits"
    spread = (1, WHOLE) if not axis or groups == 1 else (groups, group)
    parts = (Part("codes", codes), Part("scale", scale, *spread), Part("zero", zero, *spread))
    coded = Coded("slots", (*parts, *source.unread(*(f"{base}.{key}" for key in _BESIDE))), (
        ("bits", bits), ("slots", slots), ("slot", slot), ("word", word), ("group", group),
        ("across", 0 if axis else groups), ("grouped", sizes[0] if sizes else "a row" if axis else "a column"),
    ))  # fmt: skip
    source.add(TensorSpec(f"{base}.weight", scale.spec.dtype, (shape[0], shape[1])), coded)
    return coded
