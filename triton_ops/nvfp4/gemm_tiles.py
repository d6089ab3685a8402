"""Tiles of the NVFP4 products of gemm.py: operands read and multiplied, results quantised."""

from __future__ import annotations

import triton.language as tl

from ..common import device_function, dot, narrow
from .codes import quantize_blocks, scale_of_given
from .numerics import e2m1_pair, e4m3_value, scale_128x4
from .tiles import store_tile

__all__ = ["load_codes", "load_scales", "multiply", "scale_rows", "store_codes"]


# ---------------------------------------------------------------- operands


@device_function
def scale_rows(row, ks, TILED: tl.constexpr):
    """Where the scales of a row begin; `scale_128x4` is a sum of a row's and of a column's part."""
    return scale_128x4(row, 0, ks) if TILED else row * ks


@device_function
def load_codes(q_ptr, row, mask, start, ks, BLOCK_KS: tl.constexpr):
    """Packed codes ``[rows, 8 * BLOCK_KS]`` of the blocks from ``start`` on."""
    byte = tl.arange(0, 8 * BLOCK_KS)
    at = (row * ks)[:, None] * 8 + (start * 8 + byte)[None, :]
    return tl.load(q_ptr + at, mask=mask[:, None] & (byte < (ks - start) * 8)[None, :], other=0)


@device_function
def load_scales(scale_ptr, scale_row, mask, start, ks, TILED: tl.constexpr, BLOCK_KS: tl.constexpr):
    """Bytes ``[rows, BLOCK_KS]``; 0, a scale of 0, beyond the last block. What pads the tiles is not read."""
    block = start + tl.arange(0, BLOCK_KS)
    column = scale_128x4(0, block, ks) if TILED else block
    at = scale_row[:, None] + column[None, :]
    return tl.load(scale_ptr + at, mask=mask[:, None] & (block < ks)[None, :], other=0)


@device_function
def _decoded(codes, scales, ROWS: tl.constexpr, BLOCK_KS: tl.constexpr):
    """bfloat16 ``[rows, 16 * BLOCK_KS]``, exactly."""
    low, high = e2m1_pair(tl.reshape(codes, (ROWS, BLOCK_KS, 8)))
    factor = (e4m3_value(scales) * 16384.0)[:, :, None]  # 2^14, which e2m1_pair has left out
    values = tl.join(low * factor, high * factor)  # [row, block, byte, nibble]: k in order
    return narrow(tl.reshape(values, (ROWS, 16 * BLOCK_KS)), tl.bfloat16)


@device_function
def multiply(
    x_codes, x_scales, w_codes, w_scales, acc,
    NATIVE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_KS: tl.constexpr,
):  # fmt: skip
    """acc + x w^T."""
    if NATIVE:
        return tl.dot_scaled(
            x_codes, x_scales.to(tl.float8e4nv, bitcast=True), "e2m1",
            tl.trans(w_codes), w_scales.to(tl.float8e4nv, bitcast=True), "e2m1", acc,
        )  # fmt: skip
    else:
        x = _decoded(x_codes, x_scales, ROWS, BLOCK_KS)
        w = _decoded(w_codes, w_scales, COLUMNS, BLOCK_KS)
        return dot(x, tl.trans(w), acc)


# ---------------------------------------------------------------- result


@device_function
def store_codes(
    q_ptr, scale_ptr, decode, y, row, live, first, n,  # first block of 16 columns
    RELU2: tl.constexpr, SWIZZLED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A tile of results as codes and scales; what pads the scales is the host's."""
    BLOCKS: tl.constexpr = ROWS * COLUMNS // 16
    x = tl.reshape(y, (BLOCKS, 16))
    if RELU2:
        x = tl.where(x < 0.0, 0.0, x)  # keeps NaN
        x = x * x
    s_enc, _ = scale_of_given(decode, 2688.0)
    s_enc = tl.broadcast_to(s_enc, (BLOCKS,))
    codes, byte = quantize_blocks(x, s_enc, tl.div_rn(1.0, s_enc), None, None, None, False)
    col = first + tl.arange(0, COLUMNS // 16)
    there = tl.reshape(live[:, None] & (col < n // 16)[None, :], (BLOCKS,))
    rows = tl.reshape(tl.broadcast_to(row[:, None], (ROWS, COLUMNS // 16)), (BLOCKS,))
    cols = tl.reshape(tl.broadcast_to(col[None, :], (ROWS, COLUMNS // 16)), (BLOCKS,))
    store_tile(q_ptr, scale_ptr, codes, byte, rows, cols, there, there, n // 16, SWIZZLED)
