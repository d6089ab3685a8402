"""Operands of the W4A4 products, and the float64 truth about them."""

from __future__ import annotations

import zlib

import nvfp4_oracle as oracle
import torch
from conftest import DEVICE, fenced
from nvfp4_oracle import weights

from n3kernels.nvfp4 import NVFP4Tensor, reference


def seed(*what):
    torch.manual_seed(zlib.crc32(repr(what).encode()))


def operand(rows, blocks, per_row=False, tiled=False, scale=0.1):
    """Random codes; block scales between 1/4 and 8, so that sums of K = 16 are of the order of 1."""
    q, block_scale, global_scale = weights(rows, 16 * blocks, scale, 0x28, 0x50)
    if per_row:
        global_scale = fenced((torch.rand(rows) + 0.5).to(DEVICE) * scale)
    t = NVFP4Tensor.from_parts(q, block_scale, global_scale)
    return swizzled(t) if tiled else t


def swizzled(t):
    """The same tensor with its scales in 128x4 tiles, of which every byte of padding is NaN."""
    tiles = reference.nvfp4_swizzle_scale(t.block_scale)
    real = reference.nvfp4_swizzle_scale(torch.ones_like(t.block_scale, dtype=torch.float32).to(torch.float8_e4m3fn))
    bytes = torch.where(real.view(torch.uint8) != 0, tiles.view(torch.uint8), 0x7F)
    return t._replace(block_scale=fenced(bytes.view(torch.float8_e4m3fn)), scale_layout="128x4")


def inputs(m, n, blocks, dtype=torch.float32, bias=False, a_rows=False, b_rows=False, a_tiled=False, b_tiled=False):
    """The same for the same arguments."""
    seed(m, n, blocks)
    a, b = operand(m, blocks, a_rows, a_tiled), operand(n, blocks, b_rows, b_tiled)
    return a, b, dtype, fenced(torch.randn(n).to(dtype).to(DEVICE)) if bias else None


def exact(t):
    """Values in float64, with the scales as they were before they were swizzled."""
    scale = t.block_scale
    if t.scale_layout == "128x4":
        scale = reference.nvfp4_unswizzle_scale(scale, t.q.shape[-2], t.q.shape[-1] // 8)
    scales = t.global_scale.double()
    return oracle.decode(t.q, scale) * scales.reshape(*scales.shape, *[1] * (t.q.dim() - scales.dim()))


def truth(a, b, bias=None):
    """y in float64, and what its rounding errors are relative to: the sum of the terms' magnitudes."""
    x, w = exact(a), exact(b)
    y, size = x @ w.t(), x.abs() @ w.abs().t()
    return (y, size) if bias is None else (y + bias.double(), size + bias.double().abs())


def rows_of(t, rows):
    global_scale = t.global_scale[rows] if t.global_scale.dim() else t.global_scale
    return NVFP4Tensor.from_parts(t.q[rows], t.block_scale[rows], global_scale)
