"""GPTQ and AWQ: integers packed in int32, stored transposed, with scales and zero points by groups of inputs.

GPTQ: `qweight` (in·bits/32, out), packed along the inputs; `qzeros` (groups, out·bits/32); `scales` (groups, out);
`g_idx` (in) names each input's group, in any order (act-order). Format v1 stores zero − 1, v2 stores zero.
AWQ (`gemm`): `qweight` (in, out/8), packed along the outputs, the eight of a word in the order 0 2 4 6 1 3 5 7.
AWQ (`gemv`): `qweight` (out, in/8), in order; `qzeros` and `scales` (out, …), padded behind the last group.
GPTQModel's `dynamic` gives layers other bits and groups by rules on their names: the shapes of a layer's parts say
them. The weight (out, in) is (code − zero) × scale. But for gemv a row of it is a column of the file: parts are read
whole.
"""

from __future__ import annotations

from typing import Final

from merger.quantization.declare import Found, QuantisedSource, Quantization
from merger.tensors import Coded, Part, StoredTensor, TensorSpec

_BITS: Final = (2, 3, 4, 8)


def read_gptq(source: QuantisedSource) -> Found:
    """Every GPTQ layer of a checkpoint."""
    bits = source.scheme.get("bits")
    form = source.scheme.get("checkpoint_format", "gptq")
    label = f"gptq, {bits} bits, groups of {source.scheme.get('group_size')}"
    label += ", other bits by layer" if source.scheme.get("dynamic") else ""
    quantization = Quantization("gptq", label, "none")
    if form not in ("gptq", "gptq_v2"):
        source.refuse(f"GPTQ in the format {form!r} cannot be read", "its words lie in an order made for one kernel",
                      "save it in the format gptq or gptq_v2, or use the unquantised checkpoint")  # fmt: skip
        return source.found(quantization)
    dynamic = bool(source.scheme.get("dynamic"))
    if bits not in _BITS:
        source.refuse(f"GPTQ with {bits} bits cannot be read", "this version reads 2, 3, 4 and 8 bits")
        return source.found(quantization)
    for base, codes in source.named(".qweight"):
        scales, zeros = source.get(f"{base}.scales"), source.get(f"{base}.qzeros")
        if not _layer(source, base, codes, scales, zeros):
            continue
        assert scales is not None
        assert zeros is not None
        groups, out = scales.spec.shape
        index = source.get(f"{base}.g_idx")
        if dynamic:  # rules by name: what a layer has is in the shapes of its parts
            found = [b for b in _BITS if zeros.spec.shape == (groups, -(-out * b // 32))]
            if len(found) != 1:
                source.refuse(f"{base} does not say how many bits its codes have",
                              f"zeros of {zeros.spec.shape} for {out} outputs fit {found or 'none'}")  # fmt: skip
                continue
            bits = found[0]
        size = codes.spec.shape[0] * 32 // bits
        fits = codes.spec.shape == (size * bits // 32, out) and zeros.spec.shape == (groups, -(-out * bits // 32))
        group = -(-size // groups) if dynamic else int(source.scheme.get("group_size", -1))
        group = size if group < 1 else group
        if not fits or (index is None and -(-size // group) != groups) or (index and index.spec.numel != size):
            source.refuse(f"the parts of {base} do not fit each other", "qweight, qzeros, scales and g_idx must",
                          "fetch the checkpoint again")  # fmt: skip
            continue
        parts = [Part("codes", codes), Part("scale", scales), Part("zero", zeros)]
        parts += [Part("groups", index)] if index is not None else []
        added = 1 if form == "gptq" else 0
        parameters = (("bits", int(bits)), ("group", group), ("zero_plus", added))
        _add(source, base, (out, size), Coded("gptq", tuple(parts), parameters), scales)
    return source.found(quantization)


def read_awq(source: QuantisedSource) -> Found:
    """Every AWQ layer of a checkpoint."""
    scheme = source.scheme
    bits, form = scheme.get("bits", scheme.get("w_bit")), str(scheme.get("version", scheme.get("format", "gemm")))
    group = int(scheme.get("group_size", scheme.get("q_group_size", -1)))
    label = f"awq, {bits} bits, groups of {group}"
    quantization = Quantization("awq", label, "none", "modules_to_not_convert")
    if bits != 4 or form.lower() not in ("gemm", "gemv") or scheme.get("zero_point", True) is False:
        source.refuse(f"AWQ with {bits} bits in the format {form} cannot be read",
                      "this version reads 4 bits with zero points in the formats gemm and gemv")  # fmt: skip
        return source.found(quantization)
    for base, codes in source.named(".qweight"):
        scales, zeros = source.get(f"{base}.scales"), source.get(f"{base}.qzeros")
        if not _layer(source, base, codes, scales, zeros):
            continue
        assert scales is not None
        assert zeros is not None
        if form.lower() == "gemv":
            _awq_rows(source, base, codes, scales, zeros, group)
            continue
        size, out = codes.spec.shape[0], 8 * codes.spec.shape[1]
        own = size if group < 1 else group
        groups = -(-size // own)
        if scales.spec.shape != (groups, out) or zeros.spec.shape != (groups, out // 8):
            source.refuse(f"the parts of {base} do not fit each other", "qweight, qzeros and scales must",
                          "fetch the checkpoint again")  # fmt: skip
            continue
        parts = (Part("codes", codes), Part("scale", scales), Part("zero", zeros))
        _add(source, base, (out, size), Coded("awq", parts, (("bits", 4), ("group", own))), scales)
    return source.found(quantization)


def _awq_rows(
    source: QuantisedSource, base: str, codes: StoredTensor, scales: StoredTensor, zeros: StoredTensor, group: int
) -> None:
    """A layer of the format gemv."""
    out, size = codes.spec.shape[0], 8 * codes.spec.shape[1]
    own = size if group < 1 else group
    wide = zeros.spec.shape[1]
    if zeros.spec.shape[0] != out or scales.spec.shape != (out, 8 * wide) or 8 * wide < -(-size // own):
        source.refuse(f"the parts of {base} do not fit each other", "qweight, qzeros and scales must",
                      "fetch the checkpoint again")  # fmt: skip
        return
    parts = (Part("codes", codes, out, size), Part("scale", scales, out, size), Part("zero", zeros, out, size))
    _add(source, base, (out, size), Coded("awq-rows", parts, (("bits", 4), ("group", own))), scales)


def _layer(
    source: QuantisedSource, base: str, codes: StoredTensor, scales: StoredTensor | None, zeros: StoredTensor | None
) -> bool:
    """Whether a layer has what its codes need."""
    if scales is not None and zeros is not None:
        matrices = all(len(t.spec.shape) == 2 for t in (codes, scales, zeros))
        if matrices and codes.spec.dtype.code == zeros.spec.dtype.code == "I32" and scales.spec.dtype.is_float:
            return True
    source.refuse(f"{base} has codes without scales and zero points", "none of them is a weight alone",
                  "fetch the checkpoint again")  # fmt: skip
    return False


def _add(source: QuantisedSource, base: str, shape: tuple[int, int], coded: Coded, scales: StoredTensor) -> None:
    source.add(TensorSpec(f"{base}.weight", scales.spec.dtype, shape), coded)
