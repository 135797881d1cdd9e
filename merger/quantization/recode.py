"""From rows of float32 back to codes and scales, where no calibration is needed: `recode_rows`. numpy only.

A scale follows from the largest magnitude of its block; a code is the nearest value of its table, ties to even. Rows
come in whole blocks, so that no cut changes a bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from merger.quantization.pieces import TABLES
from merger.quantization.recode_bnb import absmax_of, recode_blocks, recode_rows_int8
from merger.tensors import DType

Rows = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
Parameters = Mapping[str, int | float | str]

LARGEST: Final = {"e4m3": 448.0, "e5m2": 57344.0, "e2m1": 6.0, "int8": 127.0}
"""Of each table; int8 leaves −128 out."""


_REACH: Final = LARGEST["e4m3"] * LARGEST["e2m1"]
"""How many times its factor a weight of NVFP4 is at most: the largest scale of a block times the largest code."""
_ROUNDED: Final = 7 / 6
"""What is so far above the largest code, 6, rounds to it as well: the next one would be 8."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What is known of all rows of a tensor before any of it is written."""

    found: Rows
    """What `look` found, one after another."""
    factor: np.float32 | None = None
    """The factor of the whole tensor; None: that of its largest magnitude."""

    def with_factor(self, factor: float, role: str) -> tuple[Seen, float]:
        """The same under a given `divisor` or `multiplier`, if codes reach the largest magnitude with it; and that
        magnitude over what they reach. One that is no positive number is no factor."""
        if not 0 < factor < float("inf"):
            return self, float("inf")
        step = 1 / factor if role == "divisor" else factor
        share = float(self.found.max(initial=np.float32(0))) / (step * _REACH * _ROUNDED)
        return (replace(self, factor=np.float32(factor)) if share <= 1 else self), share


def look(parameters: Parameters, rows_mn: Rows) -> Rows:
    """What has to be known of all rows of a tensor before any is written: the absmaxes of its blocks in order, or its
    largest magnitude. Of consecutive rows, from whole blocks on."""
    if parameters["scheme"] == "blocks":
        return absmax_of(np.ascontiguousarray(rows_mn).reshape(-1), int(parameters["block"]))
    return np.array([np.abs(rows_mn).max(initial=np.float32(0))], np.float32)


def recode_rows(
    parameters: Parameters, rows_mn: Rows, seen: Seen, dtypes: Mapping[str, DType], *, first_row: int
) -> dict[str, Bytes]:
    """The bytes of each part (role → dtype) of whole blocks of rows, which begin with row `first_row` of the tensor.

    What there is once a tensor goes with its first row.
    """
    if parameters["scheme"] == "blocks":
        return recode_blocks(parameters, rows_mn, seen.found, first_row=first_row)
    if parameters["scheme"] == "int8_rows":
        return recode_rows_int8(rows_mn, first_row=first_row)
    if parameters["scheme"] == "experts":
        size = int(parameters["block_rows"])
        experts = [_expert(rows_mn[start : start + size]) for start in range(0, len(rows_mn), size)]
        return {part: np.concatenate([made[part] for made in experts]) for part in experts[0]}
    if parameters["scheme"] == "tiles":
        return _tiles(rows_mn, dtypes["scale"])
    table = str(parameters["table"])
    high, wide = min(int(parameters["block_rows"]), len(rows_mn)), int(parameters["block_cols"])
    once, first = not int(parameters["grid"]), first_row == 0
    largest = float(seen.found.max(initial=np.float32(0)))
    grid = np.full((1, 1), largest, np.float32) if once else block_largest(rows_mn, high, wide)
    made: dict[str, Bytes] = {}
    if "divisor" in dtypes:
        own = np.float32(_REACH / largest) if largest > 0 else np.float32(1)
        whole = own if seen.factor is None else seen.factor
        stored = narrow_e4m3(np.minimum(grid / np.float32(6) * whole, np.float32(448)))
        scale = TABLES["e4m3"][stored] / whole
        made["scale"] = stored.reshape(-1)
        made["divisor"] = _bytes(np.array([whole], np.float32)) if first else _NONE
    elif "multiplier" in dtypes:
        own = np.float32(largest / _REACH) if largest > 0 else np.float32(1)
        whole = own if seen.factor is None else seen.factor
        stored = narrow_e4m3(np.minimum(grid / np.float32(6) / whole, np.float32(448)))
        scale = TABLES["e4m3"][stored] * whole
        made["scale"] = stored.reshape(-1)
        made["multiplier"] = _bytes(np.array([whole], np.float32)) if first else _NONE
    elif parameters.get("scale") == "e8m0":
        exponents = powers(grid, table)
        scale = TABLES["e8m0"][exponents]
        made["scale"] = exponents.reshape(-1)
    else:
        made["scale"], scale = _stored_scale(np.where(grid > 0, grid / np.float32(LARGEST[table]), 1), dtypes["scale"])
        made["scale"] = made["scale"] if first or not once else _NONE
    if "zero" in dtypes:
        made["zero"] = np.zeros(made["scale"].size // dtypes["scale"].itemsize, np.uint8)
    divisor: Rows = np.where(scale == 0, 1, scale).astype(np.float32)
    made["codes"] = divided_codes(rows_mn, divisor, high, wide, table).reshape(-1)
    return made


SMALL_FLOATS: Final = {"e4m3": (4, 3), "e5m2": (5, 2), "e2m1": (2, 1)}
"""Bits of exponent and mantissa."""


def divided_codes(rows_mn: Rows, divisor: Rows, high: int, wide: int, table: str) -> Bytes:
    """Codes of rows divided by the scale of their block; codes of 4 bits in pairs."""
    if table == "int8":
        return divided_codes_plainly(rows_mn, divisor, high, wide, table)
    from merger.kernels.native import CODES

    codes = np.empty(rows_mn.shape, np.uint8)
    CODES.narrow_blocks(
        np.ascontiguousarray(rows_mn),
        np.ascontiguousarray(divisor),
        high,
        wide,
        *SMALL_FLOATS[table],
        LARGEST[table],
        codes,
    )
    return pair(codes) if table == "e2m1" else codes


def divided_codes_plainly(rows_mn: Rows, divisor: Rows, high: int, wide: int, table: str) -> Bytes:
    """The same in numpy: what the compiled loop is held to."""
    rows, cols = rows_mn.shape
    across = np.repeat(divisor, wide, axis=1)[:, :cols] if divisor.shape[1] > 1 else divisor
    spread = np.repeat(across, high, axis=0)[:rows] if divisor.shape[0] > 1 else across
    return narrow(np.divide(rows_mn, spread), table)


_NONE: Final = np.empty(0, np.uint8)


def block_largest(rows_mn: Rows, high: int, wide: int) -> Rows:
    """The largest magnitude of every block, the last of a side perhaps smaller: (row blocks, column blocks)."""
    from merger.kernels.native import CODES

    rows, cols = rows_mn.shape
    found = np.zeros((-(-rows // high), -(-cols // wide)), np.float32)
    CODES.block_largest(np.ascontiguousarray(rows_mn), high, wide, found)
    return found


def block_largest_plainly(rows_mn: Rows, high: int, wide: int) -> Rows:
    """The same in numpy: what the compiled loop is held to."""
    rows, cols = rows_mn.shape
    across = np.maximum.reduceat(np.abs(rows_mn), np.arange(0, cols, wide), axis=1)
    found: Rows = np.maximum.reduceat(across, np.arange(0, rows, high), axis=0)
    return found


def powers(grid: Rows, table: str) -> Bytes:
    """Exponents + 127: the least power of two at which the largest value still rounds into the table."""
    most = LARGEST[table]
    # Halfway above the largest value a magnitude would round out of the table.
    edge = {"e2m1": 7.0, "e4m3": 464.0, "e5m2": 61440.0, "int8": 127.5}[table]
    exponent = np.floor(np.log2(np.where(grid > 0, grid, most).astype(np.float64))) - np.floor(np.log2(most))
    exponent += grid.astype(np.float64) >= edge * 2.0**exponent
    found: Bytes = np.clip(exponent + 127, 0, 254).astype(np.uint8)
    return found


def narrow(x: Rows, table: str) -> Bytes:
    """The nearest code of each value, beyond the largest that one; codes of 4 bits in pairs, the first low."""
    if table == "int8":
        return np.clip(np.rint(x), -127, 127).astype(np.int8).view(np.uint8)
    if table == "e2m1":
        return pair(narrow_e2m1(x))
    return narrow_e4m3(x) if table == "e4m3" else _narrow(x, 5, 2, LARGEST["e5m2"])


def pair(codes: Bytes) -> Bytes:
    """Two codes a byte, the first in the low half."""
    found: Bytes = codes[..., 0::2] | (codes[..., 1::2] << np.uint8(4))
    return found


def narrow_e4m3(x: Rows) -> Bytes:
    return _narrow(x, 4, 3, LARGEST["e4m3"])


def narrow_e2m1(x: Rows) -> Bytes:
    return _narrow(x, 2, 1, LARGEST["e2m1"])


def _narrow(x: Rows, exponent_bits: int, mantissa_bits: int, most: float) -> Bytes:
    """Codes of a small float: its bits are the upper ones of a float32 whose exponent has another bias."""
    shift, bias = 23 - mantissa_bits, (1 << (exponent_bits - 1)) - 1
    magnitude = np.minimum(np.abs(x), np.float32(most))
    bits = magnitude.view(np.uint32)
    odd = (bits >> np.uint32(shift)) & np.uint32(1)
    normal = ((bits + np.uint32((1 << (shift - 1)) - 1) + odd) >> np.uint32(shift)).astype(np.int64)
    normal -= (127 - bias) << mantissa_bits
    small = np.rint(magnitude * np.float32(2.0 ** (bias - 1 + mantissa_bits)))
    codes = np.where(magnitude < np.float32(2.0 ** (1 - bias)), small, normal).astype(np.uint8)
    found: Bytes = codes | (np.signbit(x).astype(np.uint8) << np.uint8(exponent_bits + mantissa_bits))
    return found


def _stored_scale(scale: npt.NDArray[Any], dtype: DType) -> tuple[Bytes, Rows]:
    """A scale as it is stored, and the value that it then has."""
    scale = np.ascontiguousarray(scale, np.float32)
    if dtype.code == "F32":
        return _bytes(scale), scale
    if dtype.code == "F16":
        half = scale.astype(np.float16)
        return _bytes(half), half.astype(np.float32)
    bits = scale.view(np.uint32)
    upper = ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)
    return _bytes(upper), (upper.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _bytes(x: npt.NDArray[Any]) -> Bytes:
    found: Bytes = np.ascontiguousarray(x).reshape(-1).view(np.uint8)
    return found


def _expert(rows_mn: Rows) -> dict[str, Bytes]:
    """One expert (in, out) as blocks (out, in/32, 16) and their exponents."""
    blocks = np.ascontiguousarray(rows_mn.T).reshape(rows_mn.shape[1], -1, 32)
    exponents = powers(np.abs(blocks).max(axis=2), "e2m1")
    codes = divided_codes(blocks.reshape(len(blocks), -1), TABLES["e8m0"][exponents], 1, 32, "e2m1")
    return {"codes": codes.reshape(-1), "scale": exponents.reshape(-1)}


def _tiles(rows_mn: Rows, dtype: DType) -> dict[str, Bytes]:
    """Whole pairs of outputs as EETQ has them. Each row's largest code is 127: where rounding the scale up would make
    it less (F16 below 2⁻¹⁴), the scale is rounded down."""
    from merger.quantization.layouts import mixed_codes

    exact = np.abs(rows_mn).max(axis=1) / np.float32(LARGEST["int8"])
    _, scale = _stored_scale(exact, dtype)
    low = np.rint(exact * np.float32(LARGEST["int8"]) / np.where(scale > 0, scale, 1)) < LARGEST["int8"]
    if bool((low & (scale > 0)).any()):
        below = _stored_scale(np.where(low & (scale > 0), _below(scale, dtype), scale), dtype)[1]
        scale = np.where(low, below, scale)
    stored, scale = _stored_scale(scale, dtype)
    codes = narrow(rows_mn / np.where(scale > 0, scale, 1).astype(np.float32)[:, None], "int8")
    codes[scale == 0] = 0
    return {"codes": mixed_codes(codes.view(np.int8)), "scale": stored}


def _below(scale: Rows, dtype: DType) -> Rows:
    """The next lower number of the dtype that a scale is stored as."""
    if dtype.code == "F32":
        return np.nextafter(scale, np.float32(0))
    if dtype.code == "F16":
        return np.nextafter(scale.astype(np.float16), np.float16(0)).astype(np.float32)
    return (scale.view(np.uint32) - np.uint32(1 << 16)).view(np.float32)
