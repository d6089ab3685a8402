from __future__ import annotations

import torch
from torch import Tensor

from .. import _dispatch
from .._checks import FLOATING, Check, dtype_name, shape_str
from . import reference
from .tensor import NVFP4Tensor

__all__ = ["dequantize"]


def dequantize(t: NVFP4Tensor, dtype: torch.dtype) -> Tensor:
    r"""Returns ``(e2m1 * block_scale) * global_scale``, the value of an NVFP4 tensor.

    Args:
        t: of shape ``[..., K]``, either scale layout; one global scale, or one per matrix or row. A NaN block scale
            (0x7f, 0xff) gives NaN, a negative one negates, a scale of 0 gives 0, code 8 is -0.
        dtype: float32, float16 or bfloat16.
    Returns:
        ``[..., K]`` in ``dtype``, contiguous. The first product is exact, the second one float32 rounding, then one
        rounding to ``dtype``; the same bits on every backend.
    Raises:
        RuntimeError: parts whose shapes or dtypes do not fit; the message names argument and values.
    Source: OCP Microscaling Formats v1.0 (e2m1); NVIDIA ModelOpt's NVFP4 (e4m3 block scale, float32 global scale).

    >>> t = NVFP4Tensor.from_parts(torch.full((1, 8), 0x72, dtype=torch.uint8),
    ...                            torch.full((1, 1), 2.0).to(torch.float8_e4m3fn), torch.tensor(0.5))
    >>> dequantize(t, torch.float32)[0, :4].tolist()
    [1.0, 6.0, 1.0, 6.0]
    """
    return t.dequantize(dtype)


def _check(q, block_scale, global_scale, *, dtype, scale_layout="linear"):
    check = Check("nvfp4_dequantize")
    check.dtype("q", q, torch.uint8)
    check.dtype("block_scale", block_scale, torch.float8_e4m3fn)
    check.dtype("global_scale", global_scale, torch.float32)
    check.that(dtype in FLOATING, "dtype must be float32, float16 or bfloat16", dtype_name(dtype))
    check.choice("scale_layout", scale_layout, ("linear", "128x4"))
    check.that(q.dim() >= 1, "q must have at least 1 dimension", q.dim())
    width = q.shape[-1]
    check.that(width % 8 == 0, "q must have a last dimension that is a multiple of 8", width)
    if scale_layout == "128x4":
        rows = q.numel() // width if width else 0
        check.shape("block_scale", block_scale, (reference.pad(rows, 128), reference.pad(width // 8, 4)))
    elif block_scale.dim() != q.dim() or block_scale.shape != (*q.shape[:-1], width // 8):
        check.fail(
            f"block_scale must have the shape of q with a last dimension of {width // 8}, got {shape_str(block_scale)}"
        )
    lead = q.shape[: global_scale.dim()]
    check.that(
        global_scale.numel() == 1 or (global_scale.dim() < q.dim() and global_scale.shape == lead),
        "global_scale must have 1 element or the leading dimensions of q", lambda: shape_str(global_scale),
    )  # fmt: skip
    check.same_device("q", q, block_scale=block_scale, global_scale=global_scale)


def _fake(q, block_scale, global_scale, *, dtype, scale_layout="linear"):
    return q.new_empty((*q.shape[:-1], q.shape[-1] * 2), dtype=dtype)


_dispatch.register(
    "nvfp4_dequantize",
    check=_check,
    fake=_fake,
    reference=reference.nvfp4_dequantize,
    triton="n3kernels.triton_ops.nvfp4.dequantize:nvfp4_dequantize",
)
