"""nvfp4_embedding: rows of an NVFP4 matrix, decoded as nvfp4_dequantize does."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import Case, guard
from .numerics import decode_blocks, e4m3_value

__all__ = ["compile_cases", "nvfp4_embedding"]

BLOCKS = 128  # scale blocks per program: 2048 elements of a row


@triton.jit(do_not_specialize=["n", "ks"])
def _embedding_kernel(
    ids_ptr, q_ptr, scale_ptr, global_ptr, y_ptr,
    n,  # rows of the matrix
    ks,  # scales per row
    BLOCKS: tl.constexpr,
):  # fmt: skip
    """Grid (ids, pieces of a row). An id outside [0, n) gives a row of NaN: a kernel cannot raise."""
    i = tl.program_id(0).to(tl.int64)
    row = tl.load(ids_ptr + i).to(tl.int64)
    col = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    inside = col < ks
    good = col < tl.where((row >= 0) & (row < n), ks, 0)
    p = row * ks + col
    scale = e4m3_value(tl.load(scale_ptr + p, mask=good, other=0x7F))
    y = decode_blocks(q_ptr, scale, tl.load(global_ptr), p, good, y_ptr.dtype.element_ty)
    offs = (i * ks + col)[:, None] * 16 + tl.arange(0, 16)[None, :]
    tl.store(y_ptr + offs, y, mask=inside[:, None])


def nvfp4_embedding(ids: Tensor, q: Tensor, block_scale: Tensor, global_scale: Tensor, *, dtype: torch.dtype) -> Tensor:
    ids, q, block_scale = ids.contiguous(), q.contiguous(), block_scale.contiguous()
    n, half_k = q.shape
    if not ids.is_cuda:  # the interpreter; on a GPU the host must not wait for the values
        bad = ids[(ids < 0) | (ids >= n)]
        if bad.numel():
            raise RuntimeError(f"n3::nvfp4_embedding: ids must lie in [0, {n}), got {bad[0].item()}")
    y = ids.new_empty((*ids.shape, 2 * half_k), dtype=dtype)
    if y.numel() == 0:
        return y
    ks = half_k // 8
    with guard(ids):
        _embedding_kernel[(ids.numel(), triton.cdiv(ks, BLOCKS))](
            ids, q, block_scale.view(torch.uint8), global_scale, y, n, ks, BLOCKS=BLOCKS, enable_fp_fusion=False
        )
    return y


def compile_cases(arch: int):
    for dtype, ids in (("fp32", "*i64"), ("fp16", "*i32"), ("bf16", "*i64")):
        yield Case(f"embedding-{dtype}", _embedding_kernel,
                   {"ids_ptr": ids, "q_ptr": "*u8", "scale_ptr": "*u8", "global_ptr": "*fp32", "y_ptr": f"*{dtype}",
                    "n": "i32", "ks": "i32"},
                   {"BLOCKS": BLOCKS}, {"enable_fp_fusion": False})  # fmt: skip
