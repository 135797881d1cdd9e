"""What formulas compute: each takes rows [first, last) of a tensor, float32, and gives them back changed.

    rows_on    (rows, columns) of the matrix [first dimension, all others]; `first` counts from the tensor's first row
    tensors    the adapter's stored tensors by role, float32

A formula that adds gives what is to be added. Sums run along rows only, so a tile's result does not depend on how rows
are cut; what needs all rows is declared `whole`. Formulas and conventions are PEFT 0.21.2's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import torch
from torch import Tensor

from merger.adapters.declare import Number
from merger.errors import MergeFailedError

Tensors = Mapping[str, Tensor]
Numbers = Mapping[str, Number]
FormulaFunction = Callable[[Tensor, int, Tensors, Numbers], Tensor]


def apply_formula(kind: str, rows_on: Tensor, first: int, tensors: Tensors, numbers: Numbers) -> Tensor:
    """The rows that a formula makes of these rows, or adds to them."""
    return FORMULAS[kind](rows_on, first, tensors, numbers)


def _float(numbers: Numbers, name: str) -> float:
    value = numbers[name]
    assert isinstance(value, int | float)
    return float(value)


def _int(numbers: Numbers, name: str) -> int:
    value = numbers[name]
    assert isinstance(value, int)
    return value


# ---------------------------------------------------------------- what is replaced or scaled


def _rows(rows_on: Tensor, first: int, tensors: Tensors, numbers: Numbers) -> Tensor:
    """Rows that were trained in place of others."""
    indices = numbers["indices"]
    assert isinstance(indices, tuple)
    made = rows_on.clone()
    for position, index in enumerate(indices):
        if first <= index < first + rows_on.shape[0]:
            made[index - first] = tensors["rows"][position]
    return made


def _add(rows_on: Tensor, first: int, tensors: Tensors, numbers: Numbers) -> Tensor:
    """A bias on B: scaling · b."""
    value = tensors["value"].reshape(-1)[first : first + rows_on.shape[0]]
    return (value * _float(numbers, "scaling")).reshape(-1, 1)


def _ones(rows_on: Tensor, first: int, tensors: Tensors, numbers: Numbers) -> Tensor:
    """What an IA3 factor is where it changes nothing."""
    return torch.ones_like(rows_on)


def _scale(rows_on: Tensor, first: int, tensors: Tensors, numbers: Numbers) -> Tensor:
    """IA3: a factor for every output or every input."""
    factors = tensors["l"].reshape(-1)
    if (numbers["axis"] == "out") != bool(numbers.get("transposed")):
        return rows_on * factors[first : first + rows_on.shape[0], None]
    kernel = rows_on.shape[1] // factors.numel()
    return rows_on * factors.repeat_interleave(kernel)[None, :]


def _magnitude(rows_on: Tensor, first: int, tensors: Tensors, numbers: Numbers) -> Tensor:
    """DoRA: every output gets the length that was trained for it."""
    m = tensors["m"].reshape(-1)
    if numbers.get("transposed"):
        norms: Tensor = torch.linalg.vector_norm(rows_on, dim=0)
        return rows_on * (m / norms)[None, :]
    norms = torch.linalg.vector_norm(rows_on, dim=1)
    return rows_on * (m[first : first + rows_on.shape[0]] / norms)[:, None]


# ---------------------------------------------------------------- LyCORIS


def _cp(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """w[p, r, …] = Σ t[i, j, …]·a[i, p]·b[j, r], as (p, r·…)."""
    return torch.einsum("ij...,ip,jr->pr...", core, a, b).reshape(a.shape[1], -1)


def _loha(rows_on: Tensor, first: int, tensors: Tensors, numbers: Numbers) -> Tensor:
    """scaling · (w1_a·w1_b) ∘ (w2_a·w2_b)."""
    made = None
    for n in "12":
        a, b = tensors[f"hada_w{n}_a"], tensors[f"hada_w{n}_b"]
        if f"hada_t{n}" in tensors:
            part = _cp(tensors[f"hada_t{n}"], a, b)[first : first + rows_on.shape[0]]
        else:
            part = a[first : first + rows_on.shape[0]] @ b
        made = part if made is None else made * part
    assert made is not None
    return made * _float(numbers, "scaling")


def _lokr(rows_on: Tensor, first: int, tensors: Tensors, numbers: Numbers) -> Tensor:
    """scaling · w1 ⊗ w2: row i is w1[i // p] ⊗ w2[i % p], with w2 of p rows."""
    w1 = tensors["lokr_w1"] if "lokr_w1" in tensors else tensors["lokr_w1_a"] @ tensors["lokr_w1_b"]
    if "lokr_w2" in tensors:
        w2 = tensors["lokr_w2"].reshape(tensors["lokr_w2"].shape[0], -1)
    elif "lokr_t2" in tensors:
        w2 = _cp(tensors["lokr_t2"], tensors["lokr_w2_a"], tensors["lokr_w2_b"])
    else:
        w2 = tensors["lokr_w2_a"] @ tensors["lokr_w2_b"]
    at = torch.arange(first, first + rows_on.shape[0])
    product = w1[at // w2.shape[0]][:, :, None] * w2[at % w2.shape[0]][:, None, :]
    return product.reshape(rows_on.shape) * _float(numbers, "scaling")


def _locon(rows_on: Tensor, first: int, tensors: Tensors, numbers: Numbers) -> Tensor:
    """scaling · Σ up[o, p]·mid[p, q, …]·down[q, i], as (o, i·…)."""
    up, mid, down = tensors["lora_B"], tensors["lora_mid"], tensors["lora_A"]
    right = torch.einsum("pq...,qi->pi...", mid, down.reshape(down.shape[0], -1)).reshape(mid.shape[0], -1)
    left = up.reshape(up.shape[0], -1)[first : first + rows_on.shape[0]]
    return (left @ right) * _float(numbers, "scaling")


# ---------------------------------------------------------------- OFT


def _turn(rows_on: Tensor, first: int, tensors: Tensors, numbers: Numbers) -> Tensor:
    """OFT: W·Rᵀ, block of columns by block of columns."""
    block = _int(numbers, "block")
    turns = _cayley(tensors["q"], block, numbers)
    parts = rows_on.reshape(rows_on.shape[0], -1, block)
    if turns.shape[0] == 1:
        turns = turns.expand(parts.shape[1], -1, -1)
    if turns.shape[0] != parts.shape[1]:
        raise MergeFailedError.of(
            "bad-factors", f"OFT has {turns.shape[0]} blocks of {block} for {rows_on.shape[1]} inputs"
        )
    return torch.einsum("kbi,bji->kbj", parts, turns).reshape(rows_on.shape)


def _cayley(triangles: Tensor, block: int, numbers: Numbers) -> Tensor:
    """(blocks, n(n−1)/2) → (blocks, n, n): the turn of each skew matrix, in float32 as PEFT forms it."""
    skew = torch.zeros(triangles.shape[0], block, block)
    upper = torch.triu_indices(block, block, 1)
    skew[:, upper[0], upper[1]] = triangles
    skew -= skew.transpose(1, 2).clone()
    eye = torch.eye(block).expand_as(skew)
    if not numbers["neumann"]:
        solved: Tensor = torch.linalg.solve(eye + skew, eye - skew, left=False)
        return solved
    terms = _int(numbers, "terms")
    # I + 2Q + 2Q² + … + Q^top: the last power once, but where there are two terms.
    top = 0 if terms < 2 else (1 if terms == 2 else max(3, terms - 1))
    turns, power = eye.clone(), skew
    for exponent in range(1, top + 1):
        turns += power if exponent == top > 1 else 2.0 * power
        power = torch.bmm(power, skew)
    return turns


# ---------------------------------------------------------------- packed experts


def _experts(rows_on: Tensor, first: int, tensors: Tensors, numbers: Numbers) -> Tensor:
    """One row an expert: scaling · B[e]·A[e], or its transpose, flattened."""
    experts, rank = _int(numbers, "experts"), _int(numbers, "rank")
    a, b = tensors["a"], tensors["b"]
    made = torch.empty_like(rows_on)
    for row in range(rows_on.shape[0]):
        expert = first + row
        own = slice(expert * rank, (expert + 1) * rank)
        product = b[:, own if numbers["expert_major"] else slice(expert, None, experts)] @ a[own]
        made[row] = ((product.T if numbers["swapped"] else product) * _float(numbers, "scaling")).reshape(-1)
    return made


def _expert(rows_on: Tensor, first: int, tensors: Tensors, numbers: Numbers) -> Tensor:
    """One expert's part of a packed parameter: scaling · B·A into some rows of (rows, cols), or its transpose into some
    columns. Nothing where the expert is not among these rows."""
    at = _int(numbers, "expert") - first
    if not 0 <= at < rows_on.shape[0]:
        return rows_on[:0]
    product = (tensors["b"] @ tensors["a"]) * _float(numbers, "scaling")
    start, rows, cols = (_int(numbers, name) for name in ("start", "rows", "cols"))
    made = torch.zeros_like(rows_on)
    whole = made[at].view(rows, cols)
    if numbers["swapped"]:
        whole[:, start : start + product.shape[0]] = product.T
    else:
        whole[start : start + product.shape[0]] = product
    return made


# ---------------------------------------------------------------- what an initialisation took from the base


def _pissa(rows_on: Tensor, first: int, tensors: Tensors, numbers: Numbers) -> Tensor:
    """W without its best approximation of a rank, rounded as PEFT rounds the base that it trains on."""
    x = rows_on.double()
    u, s, vt = torch.linalg.svd(x, full_matrices=False)
    rank = _int(numbers, "rank")
    return _as_stored(x - (u[:, :rank] * s[:rank]) @ vt[:rank], numbers)


def _olora(rows_on: Tensor, first: int, tensors: Tensors, numbers: Numbers) -> Tensor:
    """W − scaling·Q·R, with the first columns of Q and rows of R of W's QR."""
    x = rows_on.double()
    q, r = torch.linalg.qr(x)
    rank = _int(numbers, "rank")
    return _as_stored(x - _float(numbers, "scaling") * (q[:, :rank] @ r[:rank]), numbers)


def _as_stored(x: Tensor, numbers: Numbers) -> Tensor:
    dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[str(numbers["dtype"])]
    return x.float().to(dtype).float()


# ---------------------------------------------------------------- what PEFT merges itself


def _peft(rows_on: Tensor, first: int, tensors: Tensors, numbers: Numbers) -> Tensor:
    """A whole layer, through PEFT's own code."""
    from merger.adapters.peft_layers import merge_layer

    wide = numbers["wide"]
    assert isinstance(wide, tuple)
    return merge_layer(rows_on, tensors, str(numbers["config"]), str(numbers["module"]), wide)


FORMULAS: Final[dict[str, FormulaFunction]] = {
    "rows": _rows,
    "add": _add,
    "ones": _ones,
    "scale": _scale,
    "magnitude": _magnitude,
    "loha": _loha,
    "lokr": _lokr,
    "locon": _locon,
    "turn": _turn,
    "experts": _experts,
    "expert": _expert,
    "peft": _peft,
    "pissa": _pissa,
    "olora": _olora,
}
