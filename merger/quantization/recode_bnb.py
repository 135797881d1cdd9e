"""From rows of float32 back to what bitsandbytes stores: 4-bit codes in flat blocks, and int8 with row scales. numpy.

A block's absmax is its largest magnitude, a code the nearest of 16 levels of x / absmax: no calibration, so any weight
can be written so. With double quantisation the absmaxes of the whole tensor are needed first: less their mean they are
rounded to 8 bits in blocks of 256. The arithmetic is that of grid.py, which rounds a weight through the same levels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np
import numpy.typing as npt

from merger.quantization.grid import LEVELS, dynamic_levels, nested_absmax
from merger.quantization.writing import OFFSET_KEY, state_length

Rows = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
Parameters = Mapping[str, int | float | str]

TABLES_4BIT: Final = {
    "nf4": LEVELS["nf4"],
    "fp4": np.array([0, 0.0625, 8, 12, 4, 6, 2, 3, 0, -0.0625, -8, -12, -4, -6, -2, -3], np.float32) / np.float32(12),
}
"""What the 16 codes stand for: the quant_map. fp4's are a sign, then the magnitudes in no order."""


def recode_blocks(parameters: Parameters, rows_mn: Rows, absmaxes: Rows, *, first_row: int) -> dict[str, Bytes]:
    """Parts of rows that are whole blocks: `codes`, `absmax`, and with the first row what there is once a tensor.

    `absmaxes` are those of all blocks of the tensor where they are quantised once more; else it is empty.
    """
    from merger.kernels.native import CODES

    kind, block = str(parameters["kind"]), int(parameters["block"])
    flat = np.ascontiguousarray(rows_mn).reshape(-1)
    exact = absmax_of(flat, block)
    levels, order = _ascending(kind)
    codes = np.empty(flat.size // 2, np.uint8)
    CODES.code_levels(flat, exact, block, (levels[1:] + levels[:-1]) / np.float32(2), order, codes)
    made = {"codes": codes}
    once = {"table": _bytes(TABLES_4BIT[kind])}
    if parameters["nested_block"]:
        nested = nested_absmax(absmaxes)
        low = first_row * rows_mn.shape[1] // block
        made["absmax"] = nested.codes[low : low + exact.size]
        once |= {"nested": _bytes(nested.largest), "nested_table": _bytes(dynamic_levels())}
        once["state"] = state_bytes(str(parameters["state"]), float(nested.offset))
    else:
        made["absmax"] = _bytes(exact)
        once["state"] = state_bytes(str(parameters["state"]), None)
    return made | (once if first_row == 0 else dict.fromkeys(once, _NONE))


def recode_blocks_plainly(kind: str, block: int, flat: Rows) -> Bytes:
    """The codes in numpy: what the compiled loop is held to."""
    levels, order = _ascending(kind)
    exact = absmax_of(flat, block)
    spread = np.repeat(np.where(exact > 0, exact, np.float32(1)), block)[: flat.size]
    codes = order[np.searchsorted((levels[1:] + levels[:-1]) / np.float32(2), flat / spread)]
    found: Bytes = codes[0::2] << np.uint8(4) | codes[1::2]
    return found


def recode_rows_int8(rows_mn: Rows, *, first_row: int) -> dict[str, Bytes]:
    """LLM.int8: `codes` of each row by its largest magnitude, which is its `scale` (SCB); `format` 0 is row by row."""
    largest = np.abs(rows_mn).max(axis=1, initial=np.float32(0))
    spread = np.float32(127) / np.where(largest > 0, largest, np.float32(1))
    codes = np.rint(rows_mn * spread[:, None]).astype(np.int8)
    layout = np.zeros(1, np.uint8) if first_row == 0 else _NONE
    return {"codes": _bytes(codes), "scale": _bytes(largest), "format": layout}


def absmax_of(flat: Rows, block: int) -> Rows:
    """The largest magnitude of each flat block; none of nothing."""
    from merger.kernels.native import CODES

    found = np.zeros((flat.size // block, 1), np.float32)
    CODES.block_largest(flat.reshape(-1, block), 1, block, found)
    return found.reshape(-1)


def state_bytes(text: str, offset: float | None) -> Bytes:
    """The stored state: JSON, with blanks at its end where it holds a number."""
    if offset is not None:
        text = f"{text[:-1]}{OFFSET_KEY}{offset!r}}}".ljust(state_length(text, double=True))
    return np.frombuffer(text.encode(), np.uint8)


def _ascending(kind: str) -> tuple[Rows, Bytes]:
    """The levels in order, and the code of each."""
    levels = LEVELS[kind]
    codes = [int(np.flatnonzero(TABLES_4BIT[kind] == level)[0]) for level in levels]
    return levels, np.array(codes, np.uint8)


_NONE: Final = np.empty(0, np.uint8)


def _bytes(x: npt.NDArray[np.generic]) -> Bytes:
    found: Bytes = np.ascontiguousarray(x).reshape(-1).view(np.uint8)
    return found
