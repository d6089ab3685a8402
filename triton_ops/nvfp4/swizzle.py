"""nvfp4_swizzle_scale and its inverse: block scales between row-major and the 128x4 tiles of tensor cores."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import Case, guard
from .numerics import scale_128x4

__all__ = ["compile_cases", "nvfp4_swizzle_scale", "nvfp4_unswizzle_scale"]

ROWS, COLS = 32, 32  # of scales per program


@triton.jit(do_not_specialize=["rows", "cols"])
def _swizzle_kernel(
    in_ptr, out_ptr,
    rows, cols,  # of a matrix before padding
    INVERSE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Grid (row pieces, column pieces, matrices): out[tile place of (r, c)] = in[r, c], zero where only padding is.
    INVERSE: out[r, c] = in[tile place of (r, c)]."""
    r = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    c = (tl.program_id(1).to(tl.int64) * COLS + tl.arange(0, COLS))[None, :]
    batch = tl.program_id(2).to(tl.int64)
    rows_padded, cols_padded = (rows + 127) // 128 * 128, (cols + 3) // 4 * 4
    plain = batch * rows * cols + r * cols + c
    tiled = batch * rows_padded * cols_padded + scale_128x4(r, c, cols)
    valid = (r < rows) & (c < cols)
    if INVERSE:
        tl.store(out_ptr + plain, tl.load(in_ptr + tiled, mask=valid, other=0), mask=valid)
    else:
        inside = (r < rows_padded) & (c < cols_padded)
        tl.store(out_ptr + tiled, tl.load(in_ptr + plain, mask=valid, other=0), mask=inside)


def _launch(source: Tensor, out: Tensor, rows: int, cols: int, inverse: bool) -> Tensor:
    if out.numel() == 0:
        return out
    over_rows, over_cols = (rows, cols) if inverse else out.shape[-2:]
    batch = out.shape[0] if out.dim() == 3 else 1
    grid = (triton.cdiv(over_rows, ROWS), triton.cdiv(over_cols, COLS), batch)
    with guard(source):
        _swizzle_kernel[grid](
            source.contiguous().view(torch.uint8), out.view(torch.uint8), rows, cols,
            INVERSE=inverse, ROWS=ROWS, COLS=COLS,
        )  # fmt: skip
    return out


def nvfp4_swizzle_scale(block_scale: Tensor) -> Tensor:
    *lead, rows, cols = block_scale.shape
    out = block_scale.new_empty((*lead, triton.cdiv(rows, 128) * 128, triton.cdiv(cols, 4) * 4))
    return _launch(block_scale, out, rows, cols, inverse=False)


def nvfp4_unswizzle_scale(block_scale: Tensor, rows: int, cols: int) -> Tensor:
    out = block_scale.new_empty((*block_scale.shape[:-2], rows, cols))
    return _launch(block_scale, out, rows, cols, inverse=True)


def compile_cases(arch: int):
    for inverse in (False, True):
        yield Case("unswizzle" if inverse else "swizzle", _swizzle_kernel,
                   {"in_ptr": "*u8", "out_ptr": "*u8", "rows": "i32", "cols": "i32"},
                   {"INVERSE": inverse, "ROWS": ROWS, "COLS": COLS})  # fmt: skip
