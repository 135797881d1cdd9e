"""Codes with a grid of scales: the shape that FP8, int8, packed int4, NVFP4 and MXFP4 weights share. Declarations only.

weight[i, j] = table[code[i, j]] (− zero) × scale[i // block_rows, j // block_cols], and a factor for the whole tensor.
"""

from __future__ import annotations

from merger.quantization.declare import groups_of
from merger.tensors import WHOLE, Coded, Part, StoredTensor


def scaled_parts(
    codes: StoredTensor, scale: StoredTensor, shape: tuple[int, ...], *, table: str,
    block: tuple[int, int] | None = None, scale_kind: str = "",
) -> Coded | str:  # fmt: skip
    """How codes and scales lie, or why they do not fit.

    `block` is what the config says; without it the grid's own shape decides: one scale, one a row, or equal groups.
    """
    if len(shape) < 2 or shape[-1] == 0:
        return f"{' × '.join(map(str, shape))} is no matrix"
    *lead, rows, cols = shape
    stack = 1
    for size in lead:
        stack *= size
    kind = scale_kind or ("e8m0" if scale.spec.dtype.code in ("U8", "F8_E8M0") else "float")
    grid = scale.spec.shape
    if scale.spec.numel == 1:
        parameters = (("table", table), ("block_rows", stack * rows), ("block_cols", cols), ("scale", kind))
        return Coded("scaled", (_codes(codes, stack * rows, cols), Part("scale", scale, 1, WHOLE)), parameters)
    if grid == (rows,) and stack == 1:
        grid = (rows, 1)
    if len(grid) == 1 and grid[0] == stack:
        grid = (*lead, 1, 1)
    if len(grid) != len(shape) or list(grid[:-2]) != lead:
        return f"a grid of {' × '.join(map(str, scale.spec.shape))} for {' × '.join(map(str, shape))}"
    high = groups_of(rows, grid[-2]) if block is None else block[0]
    wide = groups_of(cols, grid[-1]) if block is None else block[1]
    if block is not None and grid[-2:] == (rows, 1):
        high, wide = 1, cols
    if not high or not wide or grid[-2:] != (-(-rows // high), -(-cols // wide)):
        return f"a grid of {grid[-2]} × {grid[-1]} for {rows} × {cols}" + (f" in blocks of {block}" if block else "")
    if stack > 1 and rows % high:
        return f"stacked matrices of {rows} rows in blocks of {high}"
    parts = (_codes(codes, stack * rows, cols), Part("scale", scale, stack * grid[-2], high * cols))
    parameters = (("table", table), ("block_rows", high), ("block_cols", wide), ("scale", kind))
    return Coded("scaled", parts, parameters)


def _codes(codes: StoredTensor, rows: int, cols: int) -> Part:
    return Part("codes", codes, rows, cols)
