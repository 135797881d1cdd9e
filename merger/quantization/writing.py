"""What can be written as codes without calibration, and how: parameters of recode.py. Declarations, no numpy.

A `Recode` names its `scheme` (which encoder), the rows that share scales (`block_rows`), and what the encoder needs.
"""

from __future__ import annotations

import json
from typing import Final

from merger.tensors import UNREAD, WHOLE, Coded

Recode = tuple[tuple[str, int | float | str], ...]

RECODED_SCALES: Final = ("F32", "F16", "BF16", "U8", "F8_E8M0", "F8_E4M3")
FP8_BLOCK: Final = 128
FP8_BLOCKS: Final[Recode] = (
    ("scheme", "scaled"), ("table", "e4m3"), ("block_rows", FP8_BLOCK), ("block_cols", FP8_BLOCK), ("scale", "float"),
    ("grid", 1),
)  # fmt: skip
"""DeepSeek's: E4M3 with a float32 scale for 128 × 128 elements."""
INT8_ROWS: Final[Recode] = (("scheme", "int8_rows"), ("block_rows", 1))
"""bitsandbytes' int8: the largest magnitude of a row is its scale."""
NESTED_BLOCK: Final = 256
"""bitsandbytes' blocks of absmaxes that are quantised once more."""
STATE: Final = "state"
"""Role of the JSON text beside bitsandbytes' 4-bit codes: it decides no value when read, and is written with them."""


def recode_parameters(coded: Coded, cols: int) -> Recode | str:
    """How to write a tensor of `cols` columns as another is stored, or why it cannot be."""
    if coded.scheme == "experts":
        return (("scheme", "experts"), ("block_rows", coded.number("blocks") * 32))
    if coded.scheme == "blocks":
        return blocks_parameters(str(coded.value("kind")), coded.number("block"), coded.number("nested_block"), cols)
    if coded.scheme == "tiles":
        return (("scheme", "tiles"), ("block_rows", 2))
    roles = {part.role for part in coded.parts if part.covers != UNREAD}
    if coded.number("symmetric"):
        roles.discard("zero")  # they are there, and 0
    table = str(coded.value("table"))
    if coded.scheme != "scaled":
        return f"its codes ({coded.scheme}) come from a calibration or a table that a merge does not have"
    if coded.value("factor") is not None:
        return INT8_ROWS
    if roles - {"codes", "scale", "divisor", "multiplier"} or table == "int4" or coded.number("bits") == 8:
        return "its integers with groups or zero points come from a calibration that a merge does not have"
    scale = coded.part("scale")
    assert scale is not None
    if scale.covers != WHOLE and scale.stored.spec.dtype.code not in RECODED_SCALES:
        return f"its scales are stored as {scale.stored.spec.dtype}"
    if coded.number("swizzled"):
        return "its scales lie in the order of one kernel"
    if scale.stored.spec.dtype.code == "F8_E4M3" and not roles & {"divisor", "multiplier"}:
        return "its scales are of 8 bits, with no factor for the tensor to bring them into range"
    grid = 0 if scale.covers == WHOLE else 1
    high = coded.number("block_rows") if grid else 1
    kept = (p for p in coded.parameters if p[0] not in ("block_rows", "metadata", "swizzled", "symmetric"))
    whole = int(bool(roles & {"divisor", "multiplier"}))
    return (("scheme", "scaled"), *kept, ("block_rows", high), ("grid", grid), ("whole", whole))


def blocks_parameters(kind: str, block: int, nested_block: int, cols: int) -> Recode | str:
    """The same for bitsandbytes' 4 bits, in flat blocks of a tensor whose rows are whole blocks."""
    if kind not in ("nf4", "fp4") or nested_block not in (0, NESTED_BLOCK):
        return f"its codes ({kind}, {nested_block} absmaxes quantised together) are of a kind that is only read"
    if cols % block or block % 2:
        return f"its blocks of {block} run over the ends of rows of {cols}"
    return (("scheme", "blocks"), ("kind", kind), ("block", block), ("nested_block", nested_block), ("block_rows", 1))


OFFSET_KEY: Final = ', "nested_offset": '
_OFFSET_LENGTH: Final = 28
"""Of the text of a float, padded, so that a tensor's size does not depend on its data."""


def state_text(kind: str, block: int, dtype: str, shape: tuple[int, ...], *, double: bool) -> str:
    """quant_state as bitsandbytes writes it, but for the mean of the absmaxes, which only the data say."""
    state = {"quant_type": kind, "blocksize": block, "dtype": dtype, "shape": list(shape)}
    nested = {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32"} if double else {}
    return json.dumps(state | nested)


def state_length(text: str, *, double: bool) -> int:
    """Bytes of the stored state."""
    return len(text) + (len(OFFSET_KEY) + _OFFSET_LENGTH if double else 0)
