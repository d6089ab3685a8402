"""Quantisers that see a whole row: one global scale per row, and rms_norm, which needs a row's mean square.

A program has a row, or 32 rows of a transposed x, and passes over it up to three times, the later times from cache: the
mean square (in float64), the amax, the codes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common import device_function, narrow
from ..philox import element_words
from .codes import encode_scale, quantize_blocks, scale_of_given
from .numerics import scale_128x4
from .sources import finite_magnitudes, first_elements, load_hidden, produce
from .tiles import by_row, store_tile, tile_places, tiles_across

__all__ = ["norm_amax_kernel", "row_kernel"]


@device_function
def _rstd(
    x_ptr, x_strides, residual_ptr, total_ptr, tile_row, rows, matrix_rows, ks, eps,
    HAS_MATRICES: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """1 / sqrt(mean square + eps) of a row of x + residual, which is left in total_ptr."""
    squares = tl.zeros((N, 16), tl.float64)
    for i in range(tiles_across(rows, ks, False, N)):
        matrix, row, col, valid, _ = tile_places(tile_row, i, rows, matrix_rows, ks, False, 1, N)
        at = first_elements(matrix, row, col, x_strides, matrix_rows, HAS_MATRICES)
        packed = (row * ks + col) * 16
        h = load_hidden(x_ptr, at, x_strides[2], residual_ptr, packed, valid)
        if residual_ptr is not None:
            to = packed[:, None] + tl.arange(0, 16)[None, :]
            tl.store(total_ptr + to, narrow(h, total_ptr.dtype.element_ty), mask=valid[:, None])
        wide = h.to(tl.float64)
        squares += wide * wide
    mean = tl.sum(tl.sum(squares, axis=1), axis=0) / (ks.to(tl.float64) * 16.0)
    return (1.0 / tl.sqrt(mean + eps)).to(tl.float32)  # in float64 both are rounded to nearest


@triton.jit(do_not_specialize=["rows", "matrix_rows", "ks"])
def norm_amax_kernel(
    x_ptr, x_strides, residual_ptr, weight_ptr,
    total_ptr, rstd_ptr, partial_ptr,
    rows, matrix_rows, ks, eps: tl.float64,
    DTYPE: tl.constexpr, HAS_MATRICES: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """rstd of every row, and partial[p] = the amax of every num_programs-th row of rms_norm, from row p on."""
    top = tl.zeros((N, 16), tl.int32)
    for r in range(tl.program_id(0), rows, tl.num_programs(0)):
        at_row = tl.cast(r, tl.int64)
        rstd = _rstd(x_ptr, x_strides, residual_ptr, total_ptr, at_row, rows, matrix_rows, ks, eps, HAS_MATRICES, N)
        tl.store(rstd_ptr + at_row, rstd)
        for i in range(tiles_across(rows, ks, False, N)):
            matrix, row, col, valid, _ = tile_places(at_row, i, rows, matrix_rows, ks, False, 1, N)
            at = first_elements(matrix, row, col, x_strides, matrix_rows, HAS_MATRICES)
            y = produce(
                x_ptr, at, x_strides[2], valid, 0, residual_ptr, (row * ks + col) * 16, weight_ptr, col,
                tl.broadcast_to(rstd, (N,)), None, "rms_norm", DTYPE,
            )  # fmt: skip
            top = tl.maximum(top, finite_magnitudes(y))
    tl.store(partial_ptr + tl.program_id(0), tl.max(tl.max(top, axis=1), axis=0))


@device_function
def _amax_of_rows(top, ROWS: tl.constexpr):
    """For each block of a tile ``[N, 16]`` the largest of its row."""
    COLS: tl.constexpr = top.shape[0] // ROWS
    rows = tl.max(tl.reshape(tl.max(top, axis=1), (COLS, ROWS)), axis=0)
    return tl.reshape(tl.broadcast_to(rows[None, :], (COLS, ROWS)), (top.shape[0],)).to(tl.float32, bitcast=True)


@device_function
def _store_padding(scale_ptr, tile_row, rows, matrix_rows, ks, N: tl.constexpr):
    for i in range(tiles_across(rows, ks, True, N)):
        _, row, col, _, inside = tile_places(tile_row, i, rows, matrix_rows, ks, True, 1, N)
        tl.store(scale_ptr + scale_128x4(row, col, ks), tl.zeros((N,), tl.uint8), mask=inside)


@triton.jit(do_not_specialize=["rows", "matrix_rows", "ks"])
def row_kernel(
    x_ptr, x_strides, residual_ptr, weight_ptr, signs_ptr, seed_ptr,
    given_ptr,  # decode scale of the tensor or of each row; None: each row's own
    q_ptr, scale_ptr, global_ptr, y_ptr, total_ptr,
    rows, matrix_rows, ks, eps: tl.float64,
    PRODUCER: tl.constexpr, DTYPE: tl.constexpr, METRIC: tl.constexpr, PER_ROW: tl.constexpr, SWIZZLED: tl.constexpr,
    HAS_MATRICES: tl.constexpr, ROWS: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """One program per ROWS rows of the scale matrix, padding included; rms_norm: one row."""
    tile_row = tl.program_id(0).to(tl.int64)  # int64: the elements of x pass 2^31
    if SWIZZLED and ROWS == 1:
        if tile_row >= rows:
            _store_padding(scale_ptr, tile_row, rows, matrix_rows, ks, N)
            return
    half = ks.to(tl.int64) * 16 * x_strides[2]
    NORMAL: tl.constexpr = 2688.0 if METRIC is None else 1536.0
    rstd = None
    if PRODUCER == "rms_norm":
        rstd = tl.broadcast_to(
            _rstd(x_ptr, x_strides, residual_ptr, total_ptr, tile_row, rows, matrix_rows, ks, eps, HAS_MATRICES, N),
            (N,),
        )
    if given_ptr is None:
        top = tl.zeros((N, 16), tl.int32)
        for i in range(tiles_across(rows, ks, False, N // ROWS)):
            matrix, row, col, valid, _ = tile_places(tile_row, i, rows, matrix_rows, ks, False, ROWS, N)
            at = first_elements(matrix, row, col, x_strides, matrix_rows, HAS_MATRICES)
            x = produce(
                x_ptr, at, x_strides[2], valid, half, residual_ptr, (row * ks + col) * 16, weight_ptr, col, rstd,
                signs_ptr, PRODUCER, DTYPE,
            )  # fmt: skip
            top = tl.maximum(top, tl.where(valid[:, None], finite_magnitudes(x), 0))
        amax = _amax_of_rows(top, ROWS)
        s_enc = encode_scale(amax, NORMAL)
        decode = tl.div_rn(1.0, s_enc)
    elif not PER_ROW:
        decode = tl.broadcast_to(tl.load(given_ptr), (N,))
        s_enc, amax = scale_of_given(decode, NORMAL)

    for i in range(tiles_across(rows, ks, SWIZZLED, N // ROWS)):
        matrix, row, col, valid, inside = tile_places(tile_row, i, rows, matrix_rows, ks, SWIZZLED, ROWS, N)
        if given_ptr is not None and PER_ROW:
            decode = tl.load(given_ptr + row, mask=valid, other=1.0)
            s_enc, amax = scale_of_given(decode, NORMAL)
        if PER_ROW:
            tl.store(global_ptr + row, decode, mask=valid & (col == 0))
        at = first_elements(matrix, row, col, x_strides, matrix_rows, HAS_MATRICES)
        first = (row * ks + col) * 16
        x = produce(
            x_ptr, at, x_strides[2], valid, half, residual_ptr, first, weight_ptr, col, rstd, signs_ptr, PRODUCER,
            DTYPE,
        )  # fmt: skip
        if y_ptr is not None:
            tl.store(y_ptr + first[:, None] + tl.arange(0, 16)[None, :], narrow(x, DTYPE), mask=valid[:, None])
        words = None
        if seed_ptr is not None:
            words = element_words(seed_ptr, 0, first, True, 16)
        codes, byte = quantize_blocks(x, s_enc, tl.div_rn(1.0, s_enc), amax, words, METRIC, False)
        if ROWS > 1:
            _, row, col, valid, inside = tile_places(tile_row, i, rows, matrix_rows, ks, SWIZZLED, ROWS, N, BY_ROW=True)
        store_tile(q_ptr, scale_ptr, by_row(codes, ROWS), by_row(byte, ROWS), row, col, valid, inside, ks, SWIZZLED)
    if not PER_ROW and tl.program_id(0) == 0:
        tl.store(global_ptr, tl.load(given_ptr))
