"""From float32 rows to the bytes of an output: one encoder a store. What one computation yields (weight and scales)
is encoded together, from the same rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from merger.tensors import DType

Take = Callable[[str, int], Tensor]
"""(name, bytes) → a reused uint8 buffer."""


def encode_rows(kind: str, parts: Sequence[tuple[str, DType | None]], rows_mn: Tensor, take: Take) -> list[memoryview]:
    """The bytes of each part (name, dtype) of a block of rows (float32, on the CPU), as the store `kind` has it."""
    if kind == "nf4":
        from merger.quantization.nf4 import quantize_nf4

        codes, absmax = quantize_nf4(rows_mn)
        made = {"dense": codes, "absmax": absmax}
        return [_bytes(made[name]) for name, _ in parts]
    encoded = []
    for _, code in parts:
        assert code is not None
        assert code.torch_name is not None
        dtype = getattr(torch, code.torch_name)
        if dtype == torch.float32:
            encoded.append(_bytes(rows_mn))
            continue
        buffer = take(f"encoded-{len(encoded)}", rows_mn.numel() * code.itemsize)
        buffer.view(dtype).view(rows_mn.shape).copy_(rows_mn)
        encoded.append(_bytes(buffer))
    return encoded


def _bytes(x: Tensor) -> memoryview:
    flat = x.contiguous().view(-1).view(torch.uint8).numpy()
    return memoryview(flat)  # type: ignore[arg-type] # numpy arrays are buffers
