"""bitsandbytes: 4-bit codes in flat blocks (nf4, fp4, scales quantised once more or not) and int8 with row scales.

4 bits: `X.weight` holds two codes a byte, the first in the high half, of the tensor laid out flat; each block of 64 (or
so) shares an absmax, and `X.weight.quant_map` says what the 16 codes stand for. Shape and block are in
`X.weight.quant_state.bitsandbytes__nf4`, a JSON text stored as a tensor: it is read with the headers.
8 bits: `X.weight` (out, in) with `X.SCB` (out), the largest magnitude of each row; 127 is that magnitude.
"""

from __future__ import annotations

import json
from typing import Any, Final

from merger.quantization.declare import Found, QuantisedSource, Quantization
from merger.tensors import UNREAD, Coded, Part, StoredTensor, TensorSpec, dtype_from_torch_name

STATE: Final = ".quant_state.bitsandbytes__"
_MAX_STATE: Final = 1 << 16


def read_bitsandbytes(source: QuantisedSource) -> Found:
    """Every 4-bit and 8-bit tensor of a checkpoint."""
    states = [(name, t) for name, t in source.stored.items() if STATE in name and t.spec.nbytes <= _MAX_STATE]
    labels: dict[str, None] = {}
    for (name, stored), data in zip(states, source.read_small([t for _, t in states]), strict=True):
        try:
            state = json.loads(data)
            labels[_four_bits(source, name.partition(STATE)[0], stored, state)] = None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            source.refuse(f"{name} cannot be read ({type(error).__name__})", "it says how the codes lie",
                          "fetch the checkpoint again")  # fmt: skip
    for base, scale in source.named(".SCB"):
        _eight_bits(source, base, scale)
        labels["int8, a scale a row"] = None
    for name, tensor in source.stored.items():
        if name.endswith(".weight") and tensor.spec.dtype.code in ("U8", "I8") and name not in source.made:
            source.refuse(f"{name} has codes and no scales", "neither quant_state nor SCB is there",
                          "fetch the checkpoint again")  # fmt: skip
    label = ", ".join(labels) or "no quantised tensor"
    return source.found(Quantization("bitsandbytes", label, "none", "llm_int8_skip_modules"))


def _four_bits(source: QuantisedSource, name: str, state_tensor: StoredTensor, state: dict[str, Any]) -> str:
    codes, absmax, table = (source.stored[n] for n in (name, f"{name}.absmax", f"{name}.quant_map"))
    shape = tuple(int(n) for n in state["shape"])
    dtype = dtype_from_torch_name(state["dtype"])
    block = int(state["blocksize"])
    if dtype is None or not dtype.is_float or block < 1:
        raise ValueError(state)
    spec = TensorSpec(name, dtype, shape)
    parts = [
        Part("codes", codes, codes.spec.nbytes, 2),
        Part("absmax", absmax, absmax.spec.numel, block),
        Part("table", table),
    ]
    parameters: list[tuple[str, int | float | str]] = [("block", block), ("kind", str(state["quant_type"]))]
    label = f"{state['quant_type']}, blocks of {block}"
    if "nested_blocksize" in state:
        nested, nested_table = source.stored[f"{name}.nested_absmax"], source.stored[f"{name}.nested_quant_map"]
        size = int(state["nested_blocksize"])
        parts += [Part("nested", nested, nested.spec.numel, block * size), Part("nested_table", nested_table)]
        parameters += [("nested_block", size), ("offset", float(state["nested_offset"]))]
        label += ", double-quantised"
    blocks = -(-spec.numel // block)
    if codes.spec.nbytes != -(-spec.numel // 2) or absmax.spec.numel != blocks or table.spec.numel != 16:
        source.refuse(f"the codes of {name} do not make {' × '.join(map(str, shape))}",
                      "its quant_state says another shape", "fetch the checkpoint again")  # fmt: skip
        return label
    parts.append(Part("state", state_tensor, covers=UNREAD))
    source.add(spec, Coded("blocks", tuple(parts), tuple(parameters)))
    return label


def _eight_bits(source: QuantisedSource, base: str, scale: StoredTensor) -> None:
    name = f"{base}.weight"
    codes = source.get(name)
    if codes is None or len(codes.spec.shape) != 2 or scale.spec.numel != codes.spec.shape[0]:
        source.refuse(f"{base}.SCB has no codes that fit it", "a row of codes has one scale",
                      "fetch the checkpoint again")  # fmt: skip
        return
    rows, cols = codes.spec.shape
    parts = (Part("codes", codes, rows, cols), Part("scale", scale, rows, cols))
    parameters = (("table", "int8"), ("block_rows", 1), ("block_cols", cols), ("factor", 7.874015718698502e-3))
    extra = source.unread(f"{base}.weight_format", f"{base}.CB")
    source.add(TensorSpec(name, source.dtype(), (rows, cols)), Coded("scaled", (*parts, *extra), parameters))
