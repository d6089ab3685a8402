"""The definition of nvfp4_linear_fp8, the product of 8-bit activations with NVFP4 weights folded into 8 bits."""

from __future__ import annotations

import torch
from torch import Tensor

from .reference import decode

__all__ = ["fold_weight", "nvfp4_linear_fp8", "quantize_rows", "row_exponent"]

E4M3_MAX = 448.0


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 ``[..., K]`` and a float32 scale for each row, ``amax / 448``; 1 where that is 0."""
    x = x.float()
    scale = x.abs().amax(-1, keepdim=True) / E4M3_MAX
    scale = torch.where(scale == 0, 1.0, scale)
    return (x / scale).to(torch.float8_e4m3fn), scale


def row_exponent(block_scale: Tensor) -> Tensor:
    """The least p for each row so that six times its largest block scale is at most ``448 * 2^p``; 0 for a row of
    zeros. NaN scales do not count."""
    largest = block_scale.float().abs().nan_to_num(0.0).amax(-1, keepdim=True)
    mantissa, exponent = torch.frexp(largest)  # largest = mantissa * 2^exponent, mantissa in [0.5, 1)
    # 6 * mantissa * 2^exponent <= 448 * 2^p = 7 * 2^(p + 6)
    p = exponent - torch.where(mantissa > 7 / 12, 6, 7)
    return torch.where(largest == 0, 0, p)


def fold_weight(q: Tensor, block_scale: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 ``[N, K]`` and the exponent p ``[N, 1]`` of each row: codes times block scales times ``2^-p``."""
    p = row_exponent(block_scale)
    exact = torch.ldexp(decode(q, block_scale), -p)
    return exact.to(torch.float8_e4m3fn), p


def nvfp4_linear_fp8(
    x: Tensor,
    q: Tensor,
    block_scale: Tensor,
    global_scale: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    x8, x_scale = quantize_rows(x)
    w8, p = fold_weight(q, block_scale)
    w_scale = (global_scale.reshape(()) * torch.ldexp(torch.ones_like(p, dtype=torch.float32), p)).view(-1)
    y = x8.to(wide) @ w8.to(wide).t() * x_scale.to(wide) * w_scale.to(wide)
    if bias is not None:
        y = y + bias.to(wide)
    if activation == "relu2":
        y = y.relu().square()
    return y.to(x.dtype)
