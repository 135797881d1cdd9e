"""AQLM: each tile of a weight (1 × 8, say) is a sum of vectors, one from each of a layer's codebooks, times a scale.

`X.codes` (out/out_group, in/in_group, codebooks) holds indices as signed integers that stand for unsigned ones;
`X.codebooks` (codebooks, 2^bits, out_group, in_group); `X.scales` (out/out_group, 1, 1, 1). Source: arXiv:2401.06118;
layout of aqlm 1.1 (`QuantizedLinear`). Of 1×16, 2×8 and any other number of books and bits alike.
"""

from __future__ import annotations

from merger.quantization.declare import Found, QuantisedSource, Quantization
from merger.tensors import WHOLE, Coded, Part, StoredTensor, TensorSpec


def read_aqlm(source: QuantisedSource) -> Found:
    """Every AQLM layer of a checkpoint."""
    scheme = source.scheme
    label = f"aqlm, {scheme.get('num_codebooks')} × {scheme.get('nbits_per_codebook')} bits"
    label += f", tiles of {scheme.get('out_group_size')} × {scheme.get('in_group_size')}"
    for base, codes in source.named(".codes"):
        books, scales = source.get(f"{base}.codebooks"), source.get(f"{base}.scales")
        why = _misfit(codes, books, scales)
        if why:
            source.refuse(f"the parts of {base} do not fit each other", why, "fetch the checkpoint again")
            continue
        assert books is not None
        assert scales is not None
        count, _, high, wide = books.spec.shape
        rows, cols = codes.spec.shape[0] * high, codes.spec.shape[1] * wide
        covers = high * cols
        parts = (
            Part("codes", codes, codes.spec.shape[0], covers), Part("table", books, 1, WHOLE),
            Part("scale", scales, codes.spec.shape[0], covers),
        )  # fmt: skip
        coded = Coded("books", parts, (("high", high), ("wide", wide), ("books", count)))
        source.add(TensorSpec(f"{base}.weight", books.spec.dtype, (rows, cols)), coded)
    return source.found(Quantization("aqlm", label, "none", "linear_weights_not_to_quantize", ".weight"))


def _misfit(codes: StoredTensor, books: StoredTensor | None, scales: StoredTensor | None) -> str:
    """What does not fit; empty where all does."""
    if books is None or scales is None:
        return "codes have codebooks and scales"
    if len(codes.spec.shape) != 3 or len(books.spec.shape) != 4 or not books.spec.dtype.is_float:
        return f"codes of {codes.spec.shape} and codebooks of {books.spec.shape}"
    if codes.spec.dtype.code not in ("I8", "U8", "I16", "U16") or not scales.spec.dtype.is_float:
        return f"codes in {codes.spec.dtype} and scales in {scales.spec.dtype}"
    count, size = books.spec.shape[:2]
    if count != codes.spec.shape[2] or size < 1 or size & (size - 1) or size > 1 << codes.spec.dtype.bits:
        return f"{codes.spec.shape[2]} codes in {codes.spec.dtype} and {count} codebooks of {size}"
    if scales.spec.numel != codes.spec.shape[0]:
        # aqlm turns the codes of 8 bits around (in, out, books) when a model first runs on a CPU.
        return f"{scales.spec.numel} scales for {codes.spec.shape[0]} rows of codes"
    return ""
