"""Decoders of layouts that are no grid of scales: torchao's int4, HQQ's slots, AQLM's codebooks, EETQ's tiles. numpy.

Signatures and laws are those of decode.py. In the shapes: N outputs, K inputs, G groups.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from merger.errors import MergeFailedError
from merger.quantization.pieces import INT4_TWOS_PAIRS, Bytes, Pieces, Rows
from merger.tensors import Coded

# ---------------------------------------------------------------- torchao, int4


def decode_offset(coded: Coded, cols: int, pieces: Pieces, first: int, last: int, out: Rows) -> None:
    """code × scale + zero. Codes (N, K/2), the first of a pair low; scales and zeros (G, N), or stacks of such."""
    codes = pieces["codes"]
    group = coded.number("group")
    out[...] = INT4_TWOS_PAIRS[codes.rows[first - codes.first : last - codes.first]].reshape(last - first, cols)
    for role in ("scale", "zero"):
        groups, rows = pieces[role].part.stored.spec.shape[-2:]
        stacked = pieces[role].numbers().reshape(-1, groups, rows)
        at = np.arange(first, last)
        across = np.repeat(stacked[at // rows, :, at % rows], group, axis=1)[:, :cols]
        if role == "scale":
            out *= across
        else:
            out += across


# ---------------------------------------------------------------- HQQ


def decode_slots(coded: Coded, cols: int, pieces: Pieces, first: int, last: int, out: Rows) -> None:
    """(code − zero) × scale of elements laid out flat, cut into equal slots that lie in the bits of the same words.

    Slot 0, the first part of the tensor, has the highest bits. The scale of flat element f is number f // group where
    groups are runs (`across` is 0), and number f % across where they are strides.
    """
    start, stop = first * cols, last * cols
    bits, slots, size = coded.number("bits"), coded.number("slots"), coded.number("slot")
    words: npt.NDArray[Any] = pieces["codes"].rows.reshape(-1)
    if coded.number("word") == 4:
        words = words.view(np.uint32)
    mask = words.dtype.type((1 << bits) - 1)
    flat = np.empty(stop - start, np.float32)
    for slot in range(start // size, -(-stop // size)):
        low, high = max(start, slot * size), min(stop, (slot + 1) * size)
        shift = words.dtype.type(bits * (slots - 1 - slot))
        flat[low - start : high - start] = (words[low - slot * size : high - slot * size] >> shift) & mask
    flat -= _of_groups(coded, pieces["zero"].numbers(), pieces["zero"].first, start, stop)
    flat *= _of_groups(coded, pieces["scale"].numbers(), pieces["scale"].first, start, stop)
    out[...] = flat.reshape(out.shape)


def _of_groups(coded: Coded, values: Rows, skipped: int, start: int, stop: int) -> Rows:
    """The value of its group at every flat element of [start, stop). `skipped` groups come before the first."""
    across, group = coded.number("across"), coded.number("group")
    if across:
        found: Rows = values[np.arange(start, stop) % across]
        return found
    low, high = start // group, -(-stop // group)
    if high - low == 1:
        return values[low - skipped : high - skipped]
    return np.repeat(values[low - skipped : high - skipped], group)[start - low * group : stop - low * group]


# ---------------------------------------------------------------- AQLM


def decode_books(coded: Coded, cols: int, pieces: Pieces, first: int, last: int, out: Rows) -> None:
    """Sum over codebooks of codebook[code], × scale: (out groups, in groups, books) codes of small tiles."""
    high, wide, books = coded.number("high"), coded.number("wide"), coded.number("books")
    codes, scales = pieces["codes"], pieces["scale"]
    table = pieces["table"].numbers().reshape(books, -1, high, wide)
    groups = np.arange(first, last) // high
    within = np.arange(first, last) % high
    size = pieces["codes"].part.stored.spec.dtype.itemsize
    stored = codes.rows.view(f"u{size}").reshape(len(codes.rows), cols // wide, books)[groups - codes.first]
    stored = stored & stored.dtype.type(table.shape[1] - 1)  # negative ones are those of the upper half
    tiles = out.reshape(last - first, cols // wide, wide)
    for book in range(books):
        values = table[book][stored[:, :, book], within[:, None]]
        if book == 0:
            tiles[...] = values
        else:
            tiles += values
    out *= scales.numbers()[groups - scales.first][:, None]


# ---------------------------------------------------------------- EETQ

MIXED_ROWS: Final = np.array([0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15])
"""Which input of sixteen lies at each place: what a warp of tensor cores loads as one."""
MIXED_BYTES: Final = np.array([0, 2, 1, 3])
"""Which byte of four lies at each place."""
TILE: Final = 64
"""Inputs of one output that lie together, before those of its neighbour."""


def mixed_order() -> npt.NDArray[np.intp]:
    """Place in a tile of 64 of each input."""
    rows = np.arange(TILE).reshape(-1, 4)[:, MIXED_BYTES].reshape(-1)  # place → place before bytes were swapped
    inputs = rows // 16 * 16 + MIXED_ROWS[rows % 16]  # place → input
    return np.argsort(inputs)


def decode_tiles(coded: Coded, cols: int, pieces: Pieces, first: int, last: int, out: Rows) -> None:
    """code × scale of its output, from codes in the order of mixed int8 products on tensor cores (see eetq.py)."""
    codes, scales = pieces["codes"], pieces["scale"]
    begin, end = first // 2, -(-last // 2)
    stored = codes.rows[begin - codes.first : end - codes.first].reshape(end - begin, cols // TILE, 2, TILE)
    ordered = (stored ^ np.uint8(0x80)).view(np.int8)[..., mixed_order()]  # stored + 128
    rows = ordered.transpose(0, 2, 1, 3).reshape(2 * (end - begin), cols)[first - 2 * begin : last - 2 * begin]
    _check_largest(coded, rows)
    out[...] = rows
    out *= scales.numbers()[first - scales.first : last - scales.first][:, None]


def _check_largest(coded: Coded, rows: npt.NDArray[np.int8]) -> None:
    """Every row of int8 codes was scaled to its largest magnitude: one that reaches no end is read in a wrong order."""
    highest, lowest = rows.max(axis=1), rows.min(axis=1)
    wrong = (highest < 127) & (lowest > -127) & ((highest != 0) | (lowest != 0))
    if bool(wrong.any()):
        part = coded.parts[0].stored
        raise MergeFailedError.of(
            "quantised-source", f"the codes of {part.spec.name} do not lie in the order of GPUs since Turing",
            where=part.file,
            why="each row's largest code is 127 or −128 where they do; Volta's order is another",
            fix="save the checkpoint with EETQ on a newer GPU, or use the unquantised one",
        )  # fmt: skip


def mixed_codes(codes_nk: npt.NDArray[np.int8]) -> Bytes:
    """(N, K) codes in that order, flat: the way back."""
    rows, cols = codes_nk.shape
    tiles = codes_nk.view(np.uint8).reshape(rows // 2, 2, cols // TILE, TILE).transpose(0, 2, 1, 3)
    found: Bytes = tiles[..., np.argsort(mixed_order())] ^ np.uint8(0x80)
    return found.reshape(-1)
