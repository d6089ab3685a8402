from __future__ import annotations

import torch
from torch import Tensor

from .. import _dispatch
from .._checks import FLOATING, Check, dtype_name
from . import reference
from .tensor import NVFP4Tensor

__all__ = ["embedding"]


def embedding(ids: Tensor, w: NVFP4Tensor, dtype: torch.dtype) -> Tensor:
    r"""Returns ``dequantize(W)[ids]``, decoding the rows that are looked up and no others.

    Args:
        ids: any shape, int32 or int64, in ``[0, N)``.
        w: ``[N, K]``; linear scales (others are unswizzled first).
        dtype: float32, float16 or bfloat16.
    Returns:
        ``[*ids.shape, K]`` in ``dtype``, contiguous: the bits of `dequantize`.
    Raises:
        RuntimeError: a shape or dtype outside the above, or on the CPU an id out of range; the message names argument
            and value. On a GPU, where the host does not wait for values, such a row is NaN.
    Source: the NVFP4 embedding of Nemotron-3-Nano-4B.

    >>> from n3kernels import nvfp4
    >>> embedding(torch.tensor([[2, 0]]), nvfp4.quantize(torch.randn(3, 16)), torch.bfloat16).shape
    torch.Size([1, 2, 16])
    """
    w = w.to_layout("linear")
    return torch.ops.n3.nvfp4_embedding.default(ids, w.q, w.block_scale, w.global_scale, dtype=dtype)


def _check(ids, q, block_scale, global_scale, *, dtype):
    check = Check("nvfp4_embedding")
    check.dtype("ids", ids, torch.int32, torch.int64)
    check.dtype("q", q, torch.uint8)
    check.dtype("block_scale", block_scale, torch.float8_e4m3fn)
    check.dtype("global_scale", global_scale, torch.float32)
    check.that(dtype in FLOATING, "dtype must be float32, float16 or bfloat16", dtype_name(dtype))
    check.dim("q", q, 2)
    n, width = q.shape
    check.that(width % 8 == 0, "q must have a last dimension that is a multiple of 8", width)
    check.shape("block_scale", block_scale, (n, width // 8))
    check.that(global_scale.numel() == 1, "global_scale must have 1 element", global_scale.numel())
    check.same_device("ids", ids, q=q, block_scale=block_scale, global_scale=global_scale)


def _fake(ids, q, block_scale, global_scale, *, dtype):
    return q.new_empty((*ids.shape, q.shape[1] * 2), dtype=dtype)


_dispatch.register(
    "nvfp4_embedding",
    check=_check,
    fake=_fake,
    reference=reference.nvfp4_embedding,
    triton="n3kernels.triton_ops.nvfp4.embedding:nvfp4_embedding",
)
