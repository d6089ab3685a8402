"""The definition of the nvfp4 operators in plain PyTorch, slow and obvious on purpose: decoding, products, layout.

Quantisation is in reference_quantize.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import Check

__all__ = [
    "BLOCK", "code_values", "decode", "nvfp4_dequantize", "nvfp4_embedding", "nvfp4_gemm", "nvfp4_grouped_gemm",
    "nvfp4_linear", "nvfp4_swizzle_scale", "nvfp4_unswizzle_scale", "pad",
]  # fmt: skip

BLOCK = 16  # elements per block scale


def pad(size: int, multiple: int) -> int:
    return (size + multiple - 1) // multiple * multiple


# ---------------------------------------------------------------- codes


def code_values(device: torch.device) -> Tensor:
    """Values of codes 0..15: 0, 0.5, 1, 1.5, 2, 3, 4, 6, then the same negated, -0 included. Computed where it is
    used, as a CUDA graph cannot capture a copy from the host."""
    code = torch.arange(8, device=device)
    halves = torch.where(code < 2, code, (2 + code % 2) << (code // 2) >> 1)
    return torch.cat([halves * 0.5, halves * -0.5])


def _values(q: Tensor) -> Tensor:
    """e2m1 values ``[..., K]`` of ``q`` ``[..., K/2]``: the low nibble is the even element."""
    table = code_values(q.device)
    pairs = torch.stack([table.repeat(16), table.repeat_interleave(16)], -1)  # of every byte
    return pairs.index_select(0, q.reshape(-1).int()).view(*q.shape[:-1], q.shape[-1] * 2)


# ---------------------------------------------------------------- decode


def decode(q: Tensor, block_scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """``e2m1 * e4m3`` without the global scale, ``[..., K]``: exact in every floating dtype but the 8-bit ones."""
    blocks = _values(q).view(*block_scale.shape, BLOCK)
    return (blocks * block_scale.float().unsqueeze(-1)).flatten(-2).to(dtype)


def nvfp4_dequantize(
    q: Tensor, block_scale: Tensor, global_scale: Tensor, *, dtype: torch.dtype, scale_layout: str = "linear"
) -> Tensor:
    if scale_layout == "128x4":
        ks = q.shape[-1] // 8
        rows = q.numel() // q.shape[-1] if ks else 0
        block_scale = nvfp4_unswizzle_scale(block_scale, rows, ks).view(*q.shape[:-1], ks)
    exact = decode(q, block_scale)
    if global_scale.numel() == 1:
        return (exact * global_scale.reshape(())).to(dtype)
    return (exact * global_scale.reshape(*global_scale.shape, *[1] * (exact.dim() - global_scale.dim()))).to(dtype)


def _split_global(global_scale: Tensor) -> tuple[Tensor, Tensor]:
    """``global_scale`` as a power of two, to go into the weights exactly, and what remains, for the output.

    Without it the sum of huge activations overflows although the scaled result would not.
    """
    bits = global_scale.reshape(()).view(torch.int32)
    exponent = ((bits >> 23 & 0xFF) - 127).clamp(-100, 100)
    power = ((exponent + 127) << 23).view(torch.float32)
    inverse = ((127 - exponent) << 23).view(torch.float32)
    return power, global_scale.reshape(()) * inverse


def nvfp4_linear(
    x: Tensor,
    q: Tensor,
    block_scale: Tensor,
    global_scale: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    power, rest = _split_global(global_scale)
    weight = decode(q, block_scale, wide) * power
    y = x.to(wide) @ weight.t() * rest
    if bias is not None:
        y = y + bias.to(wide)
    if activation == "relu2":
        y = y.relu().square()
    return y.to(x.dtype)


def _linear_scale(q: Tensor, block_scale: Tensor, layout: str) -> Tensor:
    """Block scales of matrices ``q`` ``[..., N, K/2]`` in the linear layout."""
    if layout == "linear":
        return block_scale
    return nvfp4_unswizzle_scale(block_scale, q.shape[-2], q.shape[-1] // 8)


def nvfp4_gemm(
    a: Tensor,
    a_scale: Tensor,
    a_global: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_global: Tensor,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype,
    a_layout: str = "linear",
    b_layout: str = "linear",
) -> Tensor:
    wide_a = decode(a, _linear_scale(a, a_scale, a_layout), torch.float64)
    wide_b = decode(b, _linear_scale(b, b_scale, b_layout), torch.float64)
    y = (wide_a @ wide_b.t()) * a_global.double().view(-1, 1) * b_global.double().view(1, -1)
    if bias is not None:
        y = y + bias.double()
    return y.to(out_dtype)


def nvfp4_grouped_gemm(
    a: Tensor,
    a_scale: Tensor,
    a_global: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_global: Tensor,
    offsets: Tensor,
    *,
    out_dtype: torch.dtype,
    b_layout: str = "linear",
) -> Tensor:
    wide_a = decode(a, a_scale, torch.float64) * a_global.double().view(-1, 1)
    experts = decode(b, _linear_scale(b, b_scale, b_layout), torch.float64) * b_global.double().view(-1, 1, 1)
    Check("nvfp4_grouped_gemm").offsets(offsets, len(a))
    row = torch.arange(a.shape[0], device=a.device)
    y = wide_a.new_zeros(a.shape[0], b.shape[1])  # rows of no expert stay 0
    for e in range(b.shape[0]):
        mine = (row >= offsets[e]) & (row < offsets[e + 1])
        y = torch.where(mine[:, None], wide_a @ experts[e].t(), y)
    return y.to(out_dtype)


def nvfp4_embedding(
    ids: Tensor, q: Tensor, block_scale: Tensor, global_scale: Tensor, *, dtype: torch.dtype
) -> Tensor:
    n = q.shape[0]
    bad = (ids < 0) | (ids >= n)
    if ids.device.type == "cpu" and bad.any():  # elsewhere the host must not wait for the values
        Check("nvfp4_embedding").fail(f"ids must lie in [0, {n}), got {ids[bad][0].item()}")
    flat = torch.where(bad, 0, ids).flatten().long()
    scale = block_scale.view(torch.uint8)[flat].view(torch.float8_e4m3fn)
    rows = nvfp4_dequantize(q[flat], scale, global_scale, dtype=dtype).view(*ids.shape, q.shape[1] * 2)
    return torch.where(bad.unsqueeze(-1), float("nan"), rows)


# ---------------------------------------------------------------- scale layout


def nvfp4_swizzle_scale(block_scale: Tensor) -> Tensor:
    *batch, rows, cols = block_scale.shape
    padded = torch.zeros(*batch, pad(rows, 128), pad(cols, 4), dtype=torch.uint8, device=block_scale.device)
    padded[..., :rows, :cols] = block_scale.view(torch.uint8)
    # byte ((r / 128 * ceil(cols / 4) + c / 4) * 512 + r % 32 * 16 + r % 128 / 32 * 4 + c % 4) holds scale (r, c)
    tiles = padded.view(*batch, pad(rows, 128) // 128, 4, 32, pad(cols, 4) // 4, 4).transpose(-4, -2)
    return tiles.reshape(padded.shape).view(torch.float8_e4m3fn)


def nvfp4_unswizzle_scale(block_scale: Tensor, rows: int, cols: int) -> Tensor:
    *batch, padded_rows, padded_cols = block_scale.shape
    tiles = block_scale.view(torch.uint8).reshape(*batch, padded_rows // 128, padded_cols // 4, 32, 4, 4)
    padded = tiles.transpose(-4, -2).reshape(block_scale.shape)
    return padded[..., :rows, :cols].contiguous().view(torch.float8_e4m3fn)
