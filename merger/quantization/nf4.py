"""4-bit NormalFloat as bitsandbytes stores it: blocks of 64 elements share the float32 maximum of their magnitudes;
each element is the nearest of 16 levels of x / absmax; two codes a byte, the first in the high half.

Source: QLoRA, arXiv:2305.14314, appendix E (the levels). Only the arithmetic; wiring into checkpoints comes later.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

BLOCK: Final = 64
LEVELS: Final = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def quantize_nf4(rows_mn: Tensor) -> tuple[Tensor, Tensor]:
    """(codes uint8 (m·n/2), absmax float32 (m·n/64)) of float32 rows whose length is a multiple of 64."""
    blocks = rows_mn.reshape(-1, BLOCK)
    absmax = blocks.abs().amax(dim=1)
    scaled = blocks / torch.where(absmax > 0, absmax, torch.ones_like(absmax))[:, None]
    levels = torch.tensor(LEVELS)
    middles = (levels[1:] + levels[:-1]) / 2
    codes = torch.bucketize(scaled, middles).to(torch.uint8).reshape(-1)
    return codes[0::2] << 4 | codes[1::2], absmax


def dequantize_nf4(codes: Tensor, absmax: Tensor) -> Tensor:
    """The float32 values that the codes stand for, flat."""
    both = torch.stack([codes >> 4, codes & 15], dim=1).reshape(-1)
    return (torch.tensor(LEVELS)[both.long()].reshape(-1, BLOCK) * absmax[:, None]).reshape(-1)
