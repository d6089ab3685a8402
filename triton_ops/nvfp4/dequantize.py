"""nvfp4_dequantize: y = (e2m1 * e4m3) * global_scale, the product in brackets exact."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import Case, guard
from .numerics import decode_blocks, e4m3_value, scale_128x4
from .tiles import flat_places

__all__ = ["compile_cases", "nvfp4_dequantize"]

BLOCKS = 128  # scale blocks per program


@triton.jit(do_not_specialize=["rows", "ks", "rows_each"])
def _dequantize_kernel(
    q_ptr, scale_ptr, global_ptr, y_ptr,
    rows, ks,  # scales per row
    rows_each,  # rows per global scale; None: there is one
    SWIZZLED: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """One program per BLOCKS scale blocks."""
    tile = tl.program_id(0).to(tl.int64)  # int64: the elements of y pass 2^31
    _, row, col, mask, _ = flat_places(tile, rows, rows, ks, False, BLOCKS)
    p = row * ks + col
    at = scale_128x4(row, col, ks) if SWIZZLED else p
    scale = e4m3_value(tl.load(scale_ptr + at, mask=mask, other=0))
    if rows_each is None:
        global_scale = tl.load(global_ptr)
    else:
        global_scale = tl.load(global_ptr + row // rows_each, mask=mask, other=0.0)[:, None]
    y = decode_blocks(q_ptr, scale, global_scale, p, mask, y_ptr.dtype.element_ty)
    tl.store(y_ptr + p[:, None] * 16 + tl.arange(0, 16)[None, :], y, mask=mask[:, None])


def nvfp4_dequantize(
    q: Tensor, block_scale: Tensor, global_scale: Tensor, *, dtype: torch.dtype, scale_layout: str = "linear"
) -> Tensor:
    q, block_scale = q.contiguous(), block_scale.contiguous()
    *lead, half_k = q.shape
    y = q.new_empty((*lead, 2 * half_k), dtype=dtype)
    if y.numel() == 0:
        return y
    ks = half_k // 8
    rows = q.numel() // half_k
    rows_each = None if global_scale.numel() == 1 else rows // global_scale.numel()
    with guard(q):
        _dequantize_kernel[(triton.cdiv(rows * ks, BLOCKS),)](
            q, block_scale.view(torch.uint8), global_scale.contiguous(), y, rows, ks, rows_each,
            SWIZZLED=scale_layout == "128x4", BLOCKS=BLOCKS, enable_fp_fusion=False,
        )  # fmt: skip
    return y


def compile_cases(arch: int):
    for dtype in ("fp32", "fp16", "bf16"):
        for swizzled, rows_each in ((False, None), (True, "i32")):
            types = {"q_ptr": "*u8", "scale_ptr": "*u8", "global_ptr": "*fp32", "y_ptr": f"*{dtype}", "rows": "i32",
                     "ks": "i32", **({"rows_each": rows_each} if rows_each else {})}  # fmt: skip
            flags = {"SWIZZLED": swizzled, "BLOCKS": BLOCKS, **({} if rows_each else {"rows_each": None})}
            yield Case(f"dequantize-{dtype}-{'128x4-rows' if swizzled else 'linear'}", _dequantize_kernel, types, flags,
                       {"enable_fp_fusion": False}, exact=True)  # fmt: skip
