"""From the parts of a coded tensor to rows of float32: `decode_rows`. numpy; each product is rounded once.

Each decoder sees the rows of each part that `Part.span` names, as bytes. It works on elements and rows alone, so that
no cut changes a bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from merger.quantization.declare import DECODE_ELEMENTS
from merger.quantization.layouts import decode_books, decode_offset, decode_slots, decode_tiles
from merger.quantization.pieces import (
    E2M1_PAIRS,
    INT4_PAIRS,
    TABLES,
    Bytes,
    Piece,
    Pieces,
    Rows,
    numbers,
)
from merger.tensors import Coded


def decode_rows(coded: Coded, cols: int, pieces: Pieces, first: int, last: int, out: Rows) -> None:
    """Rows [first, last) of a coded tensor into `out` (rows, cols)."""
    decode = _DECODERS[coded.scheme]
    step = max(1, DECODE_ELEMENTS // max(1, cols))
    for start in range(first, last, step):
        stop = min(last, start + step)
        decode(coded, cols, pieces, start, stop, out[start - first : stop - first])


# ---------------------------------------------------------------- bitsandbytes, 4 bits


def _blocks(coded: Coded, cols: int, pieces: Pieces, first: int, last: int, out: Rows) -> None:
    """table[code] × absmax of its flat block."""
    start, stop = first * cols, last * cols
    codes, scales = pieces["codes"], pieces["absmax"]
    block = coded.number("block")
    data = codes.rows.reshape(-1)[start // 2 - codes.first : -(-stop // 2) - codes.first]
    low, high = start // block, -(-stop // block)
    stored = scales.rows[low - scales.first : high - scales.first].reshape(-1)
    absmax = numbers(stored, scales.part.stored.spec.dtype.code)
    if "nested" in pieces:
        nested = pieces["nested"]
        above = np.arange(low, high) // coded.number("nested_block") - nested.first
        absmax = pieces["nested_table"].numbers()[absmax] * nested.numbers()[above]
        absmax += np.float32(coded.value("offset") or 0.0)
    from merger.kernels.native import CODES

    table = pieces["table"].numbers()
    flat = out.reshape(-1)
    CODES.decode_blocks(data, start % 2, np.ascontiguousarray(absmax), start - low * block, block, table, flat)
    if not np.shares_memory(flat, out):
        out[...] = flat.reshape(out.shape)


def decode_blocks_plainly(
    codes: Bytes, skipped: int, absmax: Rows, offset: int, block: int, table: Rows, count: int
) -> Rows:  # fmt: skip
    """The same in numpy: what the compiled loop is held to."""
    values = np.stack([table[codes >> 4], table[codes & 15]], axis=1).reshape(-1)[skipped : skipped + count]
    found: Rows = values * np.repeat(absmax, block)[offset : offset + count]
    return found


# ---------------------------------------------------------------- codes and a grid of scales


def _scaled(coded: Coded, cols: int, pieces: Pieces, first: int, last: int, out: Rows) -> None:
    """(table[code] − zero) × scale of its block, × a factor."""
    codes, scales = pieces["codes"], pieces["scale"]
    high, wide = coded.number("block_rows"), coded.number("block_cols")
    data = codes.rows[first - codes.first : last - codes.first]
    table = str(coded.value("table"))
    if table in ("int4", "e2m1"):
        pairs = INT4_PAIRS if table == "int4" else E2M1_PAIRS
        out[...] = pairs[data].reshape(last - first, -1)[:, :cols]
    else:
        # A packed int8 is stored with its sign bit turned.
        turned = data[:, :cols] ^ np.uint8(0x80) if coded.number("bits") == 8 else data
        np.take(TABLES[table], turned, out=out)
    if scales.part.covers == 0 and scales.part.rows == 1:
        grid = _scale_numbers(coded, scales.rows).reshape(1, 1)
        rows = np.zeros(last - first, np.intp)
    else:
        begin, end = first // high, -(-last // high)
        if coded.number("swizzled"):
            grid = _unswizzled(_scale_numbers(coded, scales.rows), scales.first, begin, end, -(-cols // wide))
        else:
            grid = _scale_numbers(coded, scales.rows[begin - scales.first : end - scales.first])
        grid = grid.reshape(end - begin, -1)
        rows = np.arange(first, last) // high - begin
    columns = pieces["groups"].numbers() if "groups" in pieces else None
    zero = _zeros(coded, pieces, first, last, high)
    if zero is not None:
        out -= _spread(zero, rows, columns, wide, cols)
    if "divisor" in pieces:
        grid = grid / pieces["divisor"].numbers()
    if "multiplier" in pieces:
        grid = grid * pieces["multiplier"].numbers()
    out *= _spread(grid, rows, columns, wide, cols)
    factor = coded.value("factor")
    if factor is not None:
        out *= np.float32(factor)


def _unswizzled(scales: Rows, skipped: int, first: int, last: int, cols: int) -> Rows:
    """Rows [first, last) of scales that lie as CUDA's block-scaled products read them.

    Blocks of 128 rows and 4 columns, padded, each (32, 4, 4): row within a quarter, quarter, column. `skipped` blocks
    of rows come before those of `scales`. Source: cuBLAS, "1D block scaling factors layout".
    """
    row, col = np.arange(first, last)[:, None] - 128 * skipped, np.arange(cols)[None, :]
    block = row // 128 * -(-cols // 4) + col // 4
    found: Rows = scales[block * 512 + row % 32 * 16 + row % 128 // 32 * 4 + col % 4]
    return found


def _scale_numbers(coded: Coded, rows: Bytes) -> Rows:
    data = np.ascontiguousarray(rows).reshape(-1)
    if coded.value("scale") == "e8m0":
        return TABLES["e8m0"][data]
    part = coded.part("scale")
    assert part is not None
    return numbers(data, part.stored.spec.dtype.code)


def _zeros(coded: Coded, pieces: Pieces, first: int, last: int, high: int) -> Rows | None:
    begin, end = first // high, -(-last // high)
    if "zero" in pieces:
        zero = pieces["zero"]
        stored = zero.rows if zero.part.covers == 0 else zero.rows[begin - zero.first : end - zero.first]
        values = numbers(np.ascontiguousarray(stored).reshape(-1), zero.part.stored.spec.dtype.code)
        return values.astype(np.float32).reshape(len(stored), -1)
    if "packed_zero" in pieces:
        piece = pieces["packed_zero"]
        bits = coded.number("bits")
        words = np.ascontiguousarray(piece.rows).view(np.uint32).reshape(piece.part.rows, -1)
        each = 32 // bits
        row = np.arange(begin, end)
        codes = (words[row // each] >> (bits * (row % each))[:, None].astype(np.uint32)) & np.uint32((1 << bits) - 1)
        return codes.astype(np.float32) - np.float32(coded.number("biased"))
    return None


def _spread(grid: Rows, rows: npt.NDArray[np.intp], columns: Any, wide: int, cols: int) -> Rows:
    """A grid of (row blocks, column blocks) at every element, as far as broadcasting does not do it."""
    if columns is not None:
        return grid[rows][:, columns]
    if grid.shape[1] == 1:
        return grid[rows]
    return np.repeat(grid, wide, axis=1)[:, :cols][rows]


# ---------------------------------------------------------------- GPTQ, AWQ: columns of words


def unpack_words(words: npt.NDArray[np.uint32], bits: int, count: int) -> npt.NDArray[np.int32]:
    """(words, n) → (count, n): codes in one stream of bits down each column, the lowest bits first."""
    at = np.arange(count) * bits
    word, shift = at // 32, (at % 32).astype(np.uint32)
    codes = words[word] >> shift[:, None]
    over = np.flatnonzero(shift + bits > 32)
    if over.size:
        codes[over] |= words[word[over] + 1] << (32 - shift[over])[:, None]
    found: npt.NDArray[np.int32] = (codes & np.uint32((1 << bits) - 1)).astype(np.int32)
    return found


def _words(piece: Piece) -> npt.NDArray[np.uint32]:
    found: npt.NDArray[np.uint32] = piece.rows.reshape(-1).view(np.uint32).reshape(piece.part.stored.spec.shape)
    return found


def _gptq(coded: Coded, cols: int, pieces: Pieces, first: int, last: int, out: Rows) -> None:
    """(code − zero) × scale; a row of the weight is a column of the words."""
    bits = coded.number("bits")
    codes = unpack_words(_words(pieces["codes"])[:, first:last], bits, cols)
    low, high = first * bits // 32, -(-last * bits // 32)
    skipped = first - low * 32 // bits if 32 % bits == 0 else first
    if 32 % bits:
        low = 0
    packed = _words(pieces["zero"])[:, low:high]
    zeros = unpack_words(np.ascontiguousarray(packed.T), bits, skipped + last - first)[skipped:].T
    zeros = (zeros + coded.number("zero_plus")) & ((1 << bits) - 1)
    piece = pieces["scale"]
    shape = piece.part.stored.spec.shape
    scales = piece.numbers().reshape(shape)[:, first:last]
    _columns(coded, cols, pieces, codes, zeros, scales, out)


AWQ_SHIFTS: Final = np.array([0, 16, 4, 20, 8, 24, 12, 28], np.uint32)
"""Where in its word each of eight consecutive outputs lies."""


def _awq(coded: Coded, cols: int, pieces: Pieces, first: int, last: int, out: Rows) -> None:
    def unpack(words: npt.NDArray[np.uint32]) -> npt.NDArray[np.int32]:
        columns = np.arange(first, last)
        found: npt.NDArray[np.int32] = ((words[:, columns // 8] >> AWQ_SHIFTS[columns % 8]) & np.uint32(15)).astype(
            np.int32
        )
        return found

    piece = pieces["scale"]
    scales = piece.numbers().reshape(piece.part.stored.spec.shape)[:, first:last]
    _columns(coded, cols, pieces, unpack(_words(pieces["codes"])), unpack(_words(pieces["zero"])), scales, out)


def _awq_rows(coded: Coded, cols: int, pieces: Pieces, first: int, last: int, out: Rows) -> None:
    """(code − zero) × scale of AWQ's gemv layout: rows are rows, and eight inputs lie in a word in their order."""
    group = np.arange(cols) // coded.number("group")

    def unpack(role: str, count: int) -> npt.NDArray[np.uint32]:
        piece = pieces[role]
        rows = np.ascontiguousarray(piece.rows[first - piece.first : last - piece.first])
        words = rows.view(np.uint32).reshape(last - first, -1)
        codes = (words[:, :, None] >> (4 * np.arange(8, dtype=np.uint32))) & np.uint32(15)
        return codes.reshape(last - first, -1)[:, :count]

    zeros = unpack("zero", int(group[-1]) + 1).astype(np.float32)
    scale = pieces["scale"]
    stored = np.ascontiguousarray(scale.rows[first - scale.first : last - scale.first]).reshape(-1)
    scales = numbers(stored, scale.part.stored.spec.dtype.code).reshape(last - first, -1)
    out[...] = unpack("codes", cols)
    out -= zeros[:, group]
    out *= scales[:, group]


def _columns(
    coded: Coded, cols: int, pieces: Pieces, codes: npt.NDArray[np.int32], zeros: npt.NDArray[np.int32], scales: Rows,
    out: Rows,
) -> None:  # fmt: skip
    if "groups" in pieces:
        group = pieces["groups"].numbers().astype(np.intp)
    else:
        group = np.arange(cols) // coded.number("group")
    value = (codes - zeros[group]).astype(np.float32)
    value *= scales[group]
    out[...] = value.T


# ---------------------------------------------------------------- gpt-oss experts


def _experts(coded: Coded, cols: int, pieces: Pieces, first: int, last: int, out: Rows) -> None:
    """Rows of (experts, in, out), whose codes lie as (experts, out, in/32, 16)."""
    blocks, inputs = coded.number("blocks"), coded.number("blocks") * 32
    codes, scales = pieces["codes"], pieces["scale"]
    row = first
    while row < last:
        expert, low = divmod(row, inputs)
        high = min(inputs, low + last - row)
        begin, end = low // 32, -(-high // 32)
        data = codes.rows[expert - codes.first].reshape(cols, blocks, 16)[:, begin:end]
        power = TABLES["e8m0"][scales.rows[expert - scales.first].reshape(cols, blocks)[:, begin:end]]
        values = E2M1_PAIRS[data].reshape(cols, end - begin, 32) * power[:, :, None]
        values = values.reshape(cols, -1)[:, low - begin * 32 : high - begin * 32]
        out[row - first : row - first + high - low] = values.T
        row += high - low


_DECODERS: Final[dict[str, Callable[[Coded, int, Pieces, int, int, Rows], None]]] = {
    "blocks": _blocks,
    "scaled": _scaled,
    "gptq": _gptq,
    "awq": _awq,
    "awq-rows": _awq_rows,
    "experts": _experts,
    "offset": decode_offset,
    "slots": decode_slots,
    "books": decode_books,
    "tiles": decode_tiles,
}
