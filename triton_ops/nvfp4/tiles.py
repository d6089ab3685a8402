"""Which blocks a program of the quantisers has, and storing their codes and scales.

A tile is N blocks of 16 elements in one of two forms. *Flat* (ROWS = 1): N consecutive places of the scale matrix,
padding included, row by row. Else ROWS rows by N / ROWS blocks, block i in row ``i % ROWS`` of the tile: so the 16 rows
of a square block are neighbours, and so are the elements of a transposed x.
"""

from __future__ import annotations

import triton.language as tl

from ..common import device_function
from .numerics import scale_128x4

__all__ = ["by_row", "flat_places", "places", "store_tile", "tile_places", "tiles_across"]


@device_function
def _padded(rows, ks, SWIZZLED: tl.constexpr):
    """Rows and columns of the scale matrix."""
    if SWIZZLED:
        return (rows + 127) // 128 * 128, (ks + 3) // 4 * 4
    else:
        return rows, ks


# A place: the number of a matrix of the batch, a row of the whole (int64), a column, whether that is a block of x,
# and whether it is in the scale matrix at all.


@device_function
def flat_places(tile, rows, matrix_rows, ks, SWIZZLED: tl.constexpr, N: tl.constexpr):
    down, across = _padded(rows, ks, SWIZZLED)
    first = tile * N
    i = (first % across).to(tl.int32) + tl.arange(0, N)  # 32 bits: a vector of 64-bit divisions is slow
    row = first // across + i // across
    col = i % across
    return row // matrix_rows, row, col, (row < rows) & (col < ks), row < down


@device_function
def tile_places(
    tile_row, tile_col, rows, matrix_rows, ks,
    SWIZZLED: tl.constexpr, ROWS: tl.constexpr, N: tl.constexpr,
    BY_ROW: tl.constexpr = False,  # block i in column i % (N / ROWS) instead, as outputs lie in memory
):  # fmt: skip
    """A tile lies within one matrix of a batch; the last matrix's tiles go on over the rows of padding."""
    down, across = _padded(rows, ks, SWIZZLED)
    tiles_each = (matrix_rows + ROWS - 1) // ROWS
    matrix = tl.minimum(tile_row // tiles_each, rows // matrix_rows - 1)
    i = tl.arange(0, N)
    COLS: tl.constexpr = N // ROWS
    within = (tile_row - matrix * tiles_each) * ROWS + (i // COLS if BY_ROW else i % ROWS)
    row = matrix * matrix_rows + within
    col = tile_col * COLS + (i % COLS if BY_ROW else i // ROWS)
    own = within < matrix_rows
    inside = (own | (row >= rows)) & (row < down) & (col < across)
    return matrix, row, col, own & (row < rows) & (col < ks), inside


@device_function
def tiles_across(rows, ks, SWIZZLED: tl.constexpr, COLS: tl.constexpr):
    _, across = _padded(rows, ks, SWIZZLED)
    return (across + COLS - 1) // COLS


@device_function
def places(
    tile, rows, matrix_rows, ks, SWIZZLED: tl.constexpr, ROWS: tl.constexpr, N: tl.constexpr,
    BY_ROW: tl.constexpr = False,
):  # fmt: skip
    """Of tile number ``tile`` (int64) in either form."""
    if ROWS == 1:
        return flat_places(tile, rows, matrix_rows, ks, SWIZZLED, N)
    else:
        across = tiles_across(rows, ks, SWIZZLED, N // ROWS)
        return tile_places(
            tile // across, (tile % across).to(tl.int32), rows, matrix_rows, ks, SWIZZLED, ROWS, N, BY_ROW
        )


@device_function
def by_row(v, ROWS: tl.constexpr):
    """The blocks of a tile, ``[N, ...]``, from column by column to row by row."""
    COLS: tl.constexpr = v.shape[0] // ROWS
    if ROWS == 1:
        return v
    elif len(v.shape) == 1:
        return tl.reshape(tl.permute(tl.reshape(v, (COLS, ROWS)), (1, 0)), (v.shape[0],))
    else:
        t = tl.permute(tl.reshape(v, (COLS, ROWS, v.shape[1])), (1, 0, 2))
        return tl.reshape(t, (v.shape[0], v.shape[1]))


@device_function
def store_tile(q_ptr, scale_ptr, codes, byte, row, col, valid, inside, ks, SWIZZLED: tl.constexpr):
    """Codes ``[N, 16]`` and scale bytes ``[N]``; padding gets zeros."""
    p = row * ks + col
    low, high = tl.split(tl.reshape(codes, (codes.shape[0], 8, 2)))
    pairs = (low | (high << 4)).to(tl.uint8)
    tl.store(q_ptr + p[:, None] * 8 + tl.arange(0, 8)[None, :], pairs, mask=valid[:, None])
    to = scale_128x4(row, col, ks) if SWIZZLED else p
    tl.store(scale_ptr + to, tl.where(valid, byte, 0).to(tl.uint8), mask=inside)
