"""compressed-tensors: int4 and int8 packed in int32, int8, FP8, NVFP4 and MXFP4, as its formats lay them out.

`X.weight_packed` I32 with `weight_scale`, `weight_shape`, perhaps `weight_zero_point` (packed along rows) and
`weight_g_idx`; `X.weight_packed` U8 with E4M3 scales of 16 columns and a global scale that divides (NVFP4), or E8M0
scales of 32 (MXFP4); `X.weight` I8 or F8 with `weight_scale`. The weight is (code − zero) × scale.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from merger.quantization.declare import Found, QuantisedSource, Quantization
from merger.quantization.fp8 import CODES, add_scaled
from merger.quantization.scaled import scaled_parts
from merger.tensors import WHOLE, Part, StoredTensor, TensorSpec

_SPARSE: Final = ("sparse-24-bitmask", "sparse-bitmask", "marlin-24")
_BESIDE: Final = ("input_scale", "input_zero_point", "input_global_scale", "output_scale", "k_scale", "v_scale")


def read_compressed(source: QuantisedSource) -> Found:
    """Every compressed tensor of a checkpoint."""
    scheme = source.scheme
    sparsity = scheme.get("sparsity_config")
    sparse = sparsity.get("format") if isinstance(sparsity, Mapping) else None
    if (sparse not in (None, "dense")) or scheme.get("format") in _SPARSE:
        source.refuse(f"the checkpoint is sparse ({sparse or scheme.get('format')})",
                      "which weights are there is coded in bit masks that this version does not read")  # fmt: skip
    transforms = scheme.get("transform_config")
    if isinstance(transforms, Mapping) and transforms.get("config_groups"):
        source.refuse("the checkpoint's weights are rotated (transform_config)",
                      "a delta of the unrotated model does not fit them")  # fmt: skip
    if source.problems:
        return source.found(Quantization("compressed-tensors", "refused", "keep", "ignore"))
    kinds: dict[str, None] = {}
    _packed(source, kinds)
    for name, codes in source.stored.items():
        scale = source.get(f"{name}_scale")
        if not name.endswith("weight") or scale is None:
            continue
        if codes.spec.dtype.code in CODES:
            add_scaled(source, name, codes, scale, CODES[codes.spec.dtype.code], _block(scheme))
            kinds["fp8"] = None
        elif codes.spec.dtype.code == "I8":
            kinds["int8"] = None
            _integers(source, name, codes, scale)
    for name, tensor in source.stored.items():
        coded = tensor.spec.dtype.code in (*CODES, "I8") or name.endswith("weight_packed")
        if coded and name not in source.taken and name.endswith(("weight", "weight_packed")):
            source.refuse(f"{name} is stored as {tensor.spec.dtype} and has no scale that fits it",
                          "a code without its scale is no weight", "fetch the checkpoint again")  # fmt: skip
    label = ", ".join(kinds) or "no compressed tensor"
    return source.found(Quantization("compressed-tensors", label, "keep", "ignore"))


def _weights(scheme: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """`weights` of each of the scheme's groups."""
    groups = scheme.get("config_groups")
    for group in groups.values() if isinstance(groups, Mapping) else ():
        if isinstance(group, Mapping) and isinstance(group.get("weights"), Mapping):
            yield group["weights"]


def _block(scheme: Mapping[str, Any]) -> tuple[int, int] | None:
    for weights in _weights(scheme):
        block = weights.get("block_structure")
        if isinstance(block, list | tuple) and len(block) == 2:
            return int(block[0]), int(block[1])
    return None


def _beside(source: QuantisedSource, base: str) -> tuple[Part, ...]:
    return source.unread(*(f"{base}.{name}" for name in _BESIDE))


def _integers(source: QuantisedSource, name: str, codes: StoredTensor, scale: StoredTensor) -> None:
    coded = scaled_parts(codes, scale, codes.spec.shape, table="int8")
    if isinstance(coded, str):
        source.refuse(f"the scales of {name} do not cover it", coded)
        return
    zero = source.get(f"{name}_zero_point")
    if zero is not None:
        if zero.spec.shape != scale.spec.shape or zero.spec.dtype.code != "I8":
            source.refuse(f"the zero points of {name} do not fit its scales", "each scale has one zero point, in I8")
            return
        like = coded.part("scale")
        assert like is not None
        coded = coded.with_parts((Part("zero", zero, like.rows, like.covers),))
    spec = TensorSpec(name, source.dtype(), codes.spec.shape)
    source.add(spec, coded.with_parts(_beside(source, name.removesuffix(".weight"))))


def _packed(source: QuantisedSource, kinds: dict[str, None]) -> None:
    packed = source.named(".weight_packed")
    words = [(base, t) for base, t in packed if t.spec.dtype.code == "I32"]
    shapes = [source.get(f"{base}.weight_shape") for base, _ in words]
    data = source.read_small([shape for shape in shapes if shape is not None])
    at = iter(data)
    for (base, codes), shape in zip(words, shapes, strict=True):
        if shape is None:
            source.refuse(f"{base} has no weight_shape", "packed words do not say how many columns there are",
                          "fetch the checkpoint again")  # fmt: skip
            continue
        size = shape.spec.dtype.itemsize
        raw = next(at)
        dims = [int.from_bytes(raw[i : i + size], "little", signed=True) for i in range(0, len(raw), size)]
        _words(source, base, codes, shape, dims, kinds)
    for base, codes in packed:
        if codes.spec.dtype.code == "U8":
            _nibbles(source, base, codes, kinds)


def _words(
    source: QuantisedSource, base: str, codes: StoredTensor, shape: StoredTensor, dims: list[int],
    kinds: dict[str, None],
) -> None:  # fmt: skip
    name = f"{base}.weight"
    scale = source.get(f"{name}_scale")
    known = [int(w.get("num_bits", 0)) for w in _weights(source.scheme) if w.get("type", "int") == "int"]
    fits = [b for b in dict.fromkeys(known) if len(dims) == 2 and codes.spec.shape == (dims[0], -(-dims[1] * b // 32))]
    if scale is None or len(fits) != 1:
        source.refuse(f"the packed codes of {name} fit none of the config's bit widths ({known})",
                      f"{' × '.join(map(str, codes.spec.shape))} words for {' × '.join(map(str, dims))}")  # fmt: skip
        return
    bits = fits[0]
    if bits not in (4, 8):
        source.refuse(f"{bits}-bit packed weights cannot be read", "this version reads packed codes of 4 and 8 bits")
        return
    rows, cols = dims
    logical = StoredTensor(TensorSpec(name, codes.spec.dtype, (rows, cols)), codes.file, codes.start)
    coded = scaled_parts(logical, scale, (rows, cols), table="int8" if bits == 8 else "int4")
    if isinstance(coded, str):
        source.refuse(f"the scales of {name} do not cover it", coded)
        return
    like = coded.part("scale")
    assert like is not None
    parts = [Part("codes", codes, rows, cols), like]
    index = source.get(f"{name}_g_idx")
    if index is not None:
        parts = [parts[0], Part("scale", scale, like.rows, like.covers), Part("groups", index, 1, WHOLE)]
    zero = source.get(f"{name}_zero_point")
    if zero is not None:
        grid = scale.spec.shape if len(scale.spec.shape) == 2 else (scale.spec.numel, 1)
        if zero.spec.dtype.code != "I32" or zero.spec.shape != (-(-grid[0] * bits // 32), grid[1]):
            source.refuse(f"the zero points of {name} do not fit its scales", "they are packed along the rows")
            return
        parts.append(Part("packed_zero", zero, zero.spec.shape[0], WHOLE))
    made = type(coded)("scaled", (*parts, *source.unread(shape.spec.name), *_beside(source, base)), coded.parameters)
    source.add(TensorSpec(name, source.dtype(), (rows, cols)), made.with_parts((), bits=bits, biased=1 << (bits - 1)))
    kinds[f"int{bits} packed"] = None


def _nibbles(source: QuantisedSource, base: str, codes: StoredTensor, kinds: dict[str, None]) -> None:
    """Two E2M1 codes a byte, the first in the low half."""
    name = f"{base}.weight"
    scale, whole = source.get(f"{name}_scale"), source.get(f"{name}_global_scale")
    shape = (*codes.spec.shape[:-1], 2 * codes.spec.shape[-1])
    kind = "nvfp4" if whole is not None else "mxfp4"
    fits = scale is not None and scale.spec.dtype.code in (("F8_E4M3",) if whole is not None else ("U8", "F8_E8M0"))
    coded = None if scale is None or not fits else scaled_parts(codes, scale, shape, table="e2m1")
    if coded is None or isinstance(coded, str) or (whole is not None and whole.spec.numel != 1):
        source.refuse(f"{base}.weight_packed has no scales that fit it", coded if isinstance(coded, str) else "")
        return
    if whole is not None:
        coded = coded.with_parts((Part("divisor", whole, 1, WHOLE),))
    spec = TensorSpec(name, source.dtype(), shape)
    source.add(spec, coded.with_parts(_beside(source, base), bits=4))
    kinds[kind] = None
