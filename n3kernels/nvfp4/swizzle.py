from __future__ import annotations

import torch
from torch import Tensor

from .. import _dispatch
from .._checks import Check
from . import reference

__all__ = ["swizzle_scale", "unswizzle_scale"]


def swizzle_scale(block_scale: Tensor) -> Tensor:
    r"""Returns row-major block scales as 128x4 tiles, scale (r, c) in byte
    ``(r//128 * ceil(C/4) + c//4) * 512 + r%32 * 16 + r%128//32 * 4 + c%4``.

    Args:
        block_scale: ``[R, C]`` or a batch ``[E, R, C]``, float8_e4m3fn; any strides.
    Returns:
        ``[..., ceil(R/128)*128, ceil(C/4)*4]``, float8_e4m3fn, contiguous, padding bytes zero. Bytes are moved, so it
        is exact.
    Raises:
        RuntimeError: another dtype or number of dimensions.
    Source: PTX ISA (``scale_vec::4X``) and cuBLASLt (``VEC16_UE4M3``).

    >>> swizzle_scale(torch.ones(5, 6).to(torch.float8_e4m3fn)).shape
    torch.Size([128, 8])
    """
    return torch.ops.n3.nvfp4_swizzle_scale.default(block_scale)


def unswizzle_scale(block_scale: Tensor, rows: int, cols: int) -> Tensor:
    r"""Returns the row-major block scales of 128x4 tiles: ``unswizzle_scale(swizzle_scale(s), *s.shape) == s``.

    Args:
        block_scale: ``[ceil(rows/128)*128, ceil(cols/4)*4]`` or a batch of these, float8_e4m3fn.
        rows, cols: sizes before padding.
    Returns:
        ``[..., rows, cols]``, float8_e4m3fn, contiguous. Bytes are moved, so it is exact; padding is never read.
    Raises:
        RuntimeError: another dtype or shape; the message names argument and values.
    Source: as `swizzle_scale`.

    >>> unswizzle_scale(swizzle_scale(torch.ones(5, 6).to(torch.float8_e4m3fn)), 5, 6).shape
    torch.Size([5, 6])
    """
    return torch.ops.n3.nvfp4_unswizzle_scale.default(block_scale, rows, cols)


def _check_scale(check: Check, block_scale: Tensor) -> None:
    check.dtype("block_scale", block_scale, torch.float8_e4m3fn)
    check.dim("block_scale", block_scale, 2, 3)


def _check_swizzle(block_scale):
    _check_scale(Check("nvfp4_swizzle_scale"), block_scale)


def _check_unswizzle(block_scale, rows, cols):
    check = Check("nvfp4_unswizzle_scale")
    _check_scale(check, block_scale)
    check.that(rows >= 0, "rows must be at least 0", rows)
    check.that(cols >= 0, "cols must be at least 0", cols)
    check.shape("block_scale", block_scale, (*block_scale.shape[:-2], reference.pad(rows, 128), reference.pad(cols, 4)))


def _fake_swizzle(block_scale):
    *batch, rows, cols = block_scale.shape
    return block_scale.new_empty((*batch, reference.pad(rows, 128), reference.pad(cols, 4)))


def _fake_unswizzle(block_scale, rows, cols):
    return block_scale.new_empty((*block_scale.shape[:-2], rows, cols))


_dispatch.register(
    "nvfp4_swizzle_scale",
    check=_check_swizzle,
    fake=_fake_swizzle,
    reference=reference.nvfp4_swizzle_scale,
    triton="n3kernels.triton_ops.nvfp4.swizzle:nvfp4_swizzle_scale",
)
_dispatch.register(
    "nvfp4_unswizzle_scale",
    check=_check_unswizzle,
    fake=_fake_unswizzle,
    reference=reference.nvfp4_unswizzle_scale,
    triton="n3kernels.triton_ops.nvfp4.swizzle:nvfp4_unswizzle_scale",
)
