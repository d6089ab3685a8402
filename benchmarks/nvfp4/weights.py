"""NVFP4 weights for benchmarks: random codes under random scales, which costs nothing even at 131072 x 2688."""

from __future__ import annotations

import torch

import n3kernels
from n3kernels.nvfp4 import NVFP4Tensor, reference

from ..conftest import DEVICE

__all__ = ["nvfp4_bytes", "nvfp4_weight", "plain_weight", "true_product"]

ROWS = 8192  # at a time through the reference, which needs some 40 bytes per weight


def nvfp4_weight(n: int, k: int) -> NVFP4Tensor:
    """Codes spread evenly, block scales between 1 and 448, a global scale that is no power of two."""
    generator = torch.Generator(DEVICE).manual_seed(n * k)
    q = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device=DEVICE, generator=generator)
    scale = torch.rand(n, k // 16, device=DEVICE, generator=generator) * 447 + 1
    return NVFP4Tensor.from_parts(q, scale.to(torch.float8_e4m3fn), torch.tensor(3.7e-5, device=DEVICE))


def _row_slices(w: NVFP4Tensor) -> list[slice]:
    return [slice(i, i + ROWS) for i in range(0, w.shape[0], ROWS)]


def plain_weight(w: NVFP4Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The same weight in ``dtype``, for the baselines."""
    with n3kernels.use_backend("reference"):
        dequantize = torch.ops.n3.nvfp4_dequantize.default
        parts = [dequantize(w.q[s], w.block_scale[s], w.global_scale, dtype=dtype) for s in _row_slices(w)]
    return torch.cat(parts)


def true_product(x: torch.Tensor, w: NVFP4Tensor) -> torch.Tensor:
    """``x @ W^T`` by the definition, in float64."""
    parts = [reference.nvfp4_linear(x.double(), w.q[s], w.block_scale[s], w.global_scale) for s in _row_slices(w)]
    return torch.cat(parts, -1)


def nvfp4_bytes(n: int, k: int) -> int:
    """Codes and block scales: 4.5 bits a weight."""
    return n * k // 2 + n * k // 16
