"""torchao: tensor subclasses taken apart into plain tensors, with what they were in the header of each file.

`X._weight_qdata`, `X._weight_scale` and so on are the parts of `X.weight`; the header's metadata says under `X.weight`
its class and attributes as JSON, and under `tensor_names` all names. Read by class:

Int8Tensor, IntxUnpackedToInt8Tensor   I8 codes, a grid of scales, zero points: (code − zero) × scale
Float8Tensor                           F8 codes, a grid of scales
Int4Tensor                             pairs of codes, scales and zeros (groups, out): code × scale + zero
MXTensor, NVFP4Tensor                  F8 or pairs of E2M1 codes, scales of 32 or 16 columns, plain or in cuBLAS' order
Layout as in torchao 0.18 (torchao.prototype.safetensors); files of older versions are pickles, which nobody reads here.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, Final

from merger.quantization.declare import Found, QuantisedSource, Quantization
from merger.quantization.fp8 import CODES
from merger.quantization.scaled import scaled_parts
from merger.tensors import WHOLE, Coded, Part, StoredTensor, TensorSpec, dtype_from_torch_name

PLAIN: Final = "Tensor"
NAMES: Final = "tensor_names"
_LISTED: Final = 4


def read_torchao(source: QuantisedSource) -> Found:
    """Every tensor subclass of a checkpoint."""
    kinds: dict[str, None] = {}
    for name, text in source.metadata.items():
        described = _described(text)
        kind = str(described.get("_type", PLAIN))
        if kind in (PLAIN, "torch.Tensor") or "." not in name:
            continue
        kinds[_read(source, name, kind, described, text)] = None
    if NAMES not in source.metadata:
        source.refuse("the files do not say which tensors they hold", "torchao keeps the class of each in the header",
                      "save the checkpoint with torchao 0.14 or later, as safetensors")  # fmt: skip
    label = ", ".join(kind for kind in kinds if kind) or "no quantised tensor"
    return source.found(Quantization("torchao", label, "none", "modules_to_not_convert"))


def header_metadata(kept: Mapping[str, str], plain: Iterable[str]) -> dict[str, str]:
    """What a file's header says of tensors kept in their classes (name → JSON), and of plain ones."""
    described = {**dict.fromkeys(plain, json.dumps({"_type": PLAIN})), **kept}
    return {**described, NAMES: json.dumps(sorted(described))}


def _described(text: str) -> Mapping[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) and isinstance(found.get("_data", {}), dict) else {}


def _read(source: QuantisedSource, name: str, kind: str, described: Mapping[str, Any], text: str) -> str:
    """Adds one tensor, or refuses it. What it is, for people."""
    module, _, own = name.rpartition(".")
    attributes = described.get("_data", {})
    parts = {str(p): source.get(f"{module}._{own}_{p}") for p in described.get("_tensor_data_names", ())}
    missing = [p for p, stored in parts.items() if stored is None]
    held = {p: stored for p, stored in parts.items() if stored is not None}
    if missing or "qdata" not in held:
        source.refuse(f"{name} lacks {', '.join(missing) or 'qdata'}", "its header says that it is there",
                      "fetch the checkpoint again")  # fmt: skip
        return ""
    if "act_pre_scale" in held:
        source.refuse("weights are stored for inputs that are scaled first (act_pre_scale)",
                      "the factor of each input is folded into its column, and a delta is not")  # fmt: skip
        return ""
    dtype = dtype_from_torch_name(str(_value(attributes.get("dtype", attributes.get("orig_dtype")))))
    made: Coded | str
    if kind in ("Int8Tensor", "IntxUnpackedToInt8Tensor"):
        made, label = _integers(kind, held, attributes), "int8" if kind == "Int8Tensor" else "intx in int8"
    elif kind == "Float8Tensor":
        made, label = _floats(held, attributes), "float8"
    elif kind == "Int4Tensor":
        made, label = _int4(held, attributes), "int4"
        dtype = held["scale"].spec.dtype if "scale" in held else dtype
    elif kind in ("MXTensor", "NVFP4Tensor"):
        made, label = _blocks(held, attributes), "nvfp4" if kind == "NVFP4Tensor" else "mx"
    else:
        why = "its codes lie in tiles of one kernel" if "Tile" in kind or "PlainInt32" in kind else "no reader knows it"
        source.refuse(f"tensors of torchao's class {kind} cannot be read", why,
                      "save the checkpoint in a plain packing format, or use the unquantised checkpoint")  # fmt: skip
        return ""
    if isinstance(made, str):
        source.refuse(f"the parts of {name} do not fit each other", made, "fetch the checkpoint again")
        return ""
    roles = {part.stored.spec.name for part in made.parts}
    beside = source.unread(*(t.spec.name for t in held.values() if t.spec.name not in roles))
    shape = _shape(held["qdata"], pairs=made.scheme == "offset" or made.value("table") == "e2m1")
    spec = TensorSpec(name, dtype if dtype is not None and dtype.is_float else source.dtype(), shape)
    source.add(spec, made.with_parts(beside, metadata=text))
    return label


def _value(attribute: object) -> object:
    """An attribute that JSON holds as {"_type", "_data"}."""
    return attribute.get("_data") if isinstance(attribute, Mapping) else attribute


def _shape(codes: StoredTensor, *, pairs: bool) -> tuple[int, ...]:
    shape = codes.spec.shape
    return (*shape[:-1], 2 * shape[-1]) if pairs and shape else shape


def _block(attributes: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns that share a scale; None where the shapes say so."""
    block = attributes.get("block_size")
    if isinstance(block, list) and len(block) >= 2 and all(isinstance(n, int) and n > 0 for n in block):
        return block[-2], block[-1]
    return None


def _integers(kind: str, held: Mapping[str, StoredTensor], attributes: Mapping[str, Any]) -> Coded | str:
    codes, scale, zero = held["qdata"], held.get("scale"), held.get("zero_point")
    if codes.spec.dtype.code != "I8" or scale is None or not scale.spec.dtype.is_float:
        return f"codes in {codes.spec.dtype} and scales in {scale.spec.dtype if scale else 'nothing'}"
    made = _gridded(codes, scale, "int8", attributes)
    if isinstance(made, str) or zero is None:
        return made
    if zero.spec.shape != scale.spec.shape or not (zero.spec.dtype.code == "I8" or zero.spec.dtype.is_float):
        return f"zero points {zero.spec.shape} in {zero.spec.dtype} for scales {scale.spec.shape}"
    like = made.part("scale")
    assert like is not None
    made = made.with_parts((Part("zero", zero, like.rows, like.covers),))
    # Int8 weights are always quantised symmetrically: their zero points, which are stored all the same, are 0.
    symmetric = kind == "Int8Tensor" and not attributes.get("reduce_range") and zero.spec.dtype.code == "I8"
    return made.with_parts((), symmetric=1) if symmetric else made


def _floats(held: Mapping[str, StoredTensor], attributes: Mapping[str, Any]) -> Coded | str:
    codes, scale = held["qdata"], held.get("scale")
    if codes.spec.dtype.code not in CODES or scale is None or not scale.spec.dtype.is_float:
        return f"codes in {codes.spec.dtype} and scales in {scale.spec.dtype if scale else 'nothing'}"
    return _gridded(codes, scale, CODES[codes.spec.dtype.code], attributes)


def _gridded(codes: StoredTensor, scale: StoredTensor, table: str, attributes: Mapping[str, Any]) -> Coded | str:
    """Codes under the grid of scales that block_size says."""
    block = _block(attributes)
    made = scaled_parts(codes, scale, codes.spec.shape, table=table, block=block)
    if isinstance(made, str) or block is None or scale.spec.numel == 1:
        return made
    lies = made.number("block_rows"), made.number("block_cols")
    return made if lies == block else f"blocks of {lies}, and its header says {block}"


def _int4(held: Mapping[str, StoredTensor], attributes: Mapping[str, Any]) -> Coded | str:
    codes, scale, zero = held["qdata"], held.get("scale"), held.get("zero_point")
    block = _block(attributes)
    shape = _shape(codes, pairs=True)
    if codes.spec.dtype.code not in ("I8", "U8") or scale is None or zero is None or len(shape) < 2 or block is None:
        return "an int4 tensor has pairs of codes, scales, zeros and a block"
    *lead, rows, cols = shape
    grid = (*lead, -(-cols // block[1]), rows)
    floats = scale.spec.dtype.is_float and zero.spec.dtype.is_float
    if block[0] != 1 or list(attributes.get("shape", ())) != list(shape) or not floats:
        return f"codes of {shape} for {attributes.get('shape')} in blocks of {block}"
    if scale.spec.shape != grid or zero.spec.shape != grid:
        return f"scales of {scale.spec.shape} and zeros of {zero.spec.shape}, where {grid} is meant"
    stack = codes.spec.rows
    parts = (Part("codes", codes, stack, cols), Part("scale", scale, 1, WHOLE), Part("zero", zero, 1, WHOLE))
    return Coded("offset", parts, (("group", block[1]),))


def _blocks(held: Mapping[str, StoredTensor], attributes: Mapping[str, Any]) -> Coded | str:
    codes, scale, whole = held["qdata"], held.get("scale"), held.get("per_tensor_scale")
    wide = attributes.get("block_size")
    pairs = codes.spec.dtype.code in ("U8", "F4")
    shape = _shape(codes, pairs=codes.spec.dtype.code == "U8")
    table = "e2m1" if pairs else CODES.get(codes.spec.dtype.code, "")
    if scale is None or not table or not isinstance(wide, int) or wide < 1 or len(shape) < 2 or shape[-1] % wide:
        return f"codes {codes.spec.shape} in {codes.spec.dtype} with blocks of {wide}"
    kind = {"F8_E8M0": "e8m0", "U8": "e8m0", "F8_E4M3": "float"}.get(scale.spec.dtype.code, "")
    if not kind or (whole is not None and whole.spec.numel != 1):
        return f"scales in {scale.spec.dtype}" if not kind else "each expert has a scale of its own"
    rows, cols = codes.spec.rows, shape[-1]
    across = cols // wide
    if attributes.get("is_swizzled_scales"):
        blocks = -(-rows // 128)
        if scale.spec.numel != blocks * 128 * -(-across // 4) * 4 or len(shape) != 2:
            return f"{scale.spec.numel} scales in blocks of 128 × 4 for {rows} × {across}"
        held_scale = Part("scale", scale, blocks, 128 * cols)
    elif scale.spec.numel == rows * across:
        held_scale = Part("scale", scale, rows, cols)
    else:
        return f"{scale.spec.numel} scales for {rows} × {across}"
    swizzled = int(bool(attributes.get("is_swizzled_scales")))
    parameters: tuple[tuple[str, int | str], ...] = (
        ("table", table), ("block_rows", 1), ("block_cols", wide), ("scale", kind), ("swizzled", swizzled),
    )  # fmt: skip
    made = Coded("scaled", (Part("codes", codes, rows, cols), held_scale), parameters)
    return made if whole is None else made.with_parts((Part("multiplier", whole, 1, WHOLE),))
