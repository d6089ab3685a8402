"""nvfp4_dequantize: y = (e2m1 * e4m3) * global_scale, the product in brackets exact."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import Case, guard
from .numerics import decode_blocks, e4m3_value, scale_128x4

__all__ = ["compile_cases", "nvfp4_dequantize"]

BLOCKS = 128  # scale blocks per program


@triton.jit(do_not_specialize=["rows", "ks"])
def _dequantize_kernel(
    q_ptr, scale_ptr, global_ptr, y_ptr,
    rows, ks,  # scales per row
    SWIZZLED: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """One program per BLOCKS scale blocks."""
    # int64: the elements of y pass 2^31
    p = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    mask = p < rows.to(tl.int64) * ks
    at = scale_128x4(p // ks, p % ks, ks) if SWIZZLED else p
    scale = e4m3_value(tl.load(scale_ptr + at, mask=mask, other=0))
    y = decode_blocks(q_ptr, scale, tl.load(global_ptr), p, mask, y_ptr.dtype.element_ty)
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
    with guard(q):
        _dequantize_kernel[(triton.cdiv(rows * ks, BLOCKS),)](
            q, block_scale.view(torch.uint8), global_scale, y, rows, ks,
            SWIZZLED=scale_layout == "128x4", BLOCKS=BLOCKS, enable_fp_fusion=False,
        )  # fmt: skip
    return y


def compile_cases(arch: int):
    for dtype in ("fp32", "fp16", "bf16"):
        for swizzled in (False, True):
            yield Case(f"dequantize-{dtype}-{'128x4' if swizzled else 'linear'}", _dequantize_kernel,
                       {"q_ptr": "*u8", "scale_ptr": "*u8", "global_ptr": "*fp32", "y_ptr": f"*{dtype}",
                        "rows": "i32", "ks": "i32"},
                       {"SWIZZLED": swizzled, "BLOCKS": BLOCKS}, {"enable_fp_fusion": False})  # fmt: skip
