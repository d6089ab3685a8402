"""Quantisers fused with what makes their input, as stages of the kernels of quantize.py and rows.py."""

from __future__ import annotations

from torch import Tensor

from .quantize import Norm, quantize_with

__all__ = ["relu2_nvfp4_quantize", "rms_norm_nvfp4_quantize", "silu_mul_nvfp4_quantize"]


def relu2_nvfp4_quantize(x: Tensor, global_scale: Tensor | None = None, **options) -> tuple[Tensor, Tensor, Tensor]:
    return quantize_with(x, global_scale, producer="relu2", **options)


def silu_mul_nvfp4_quantize(x: Tensor, global_scale: Tensor | None = None, **options) -> tuple[Tensor, Tensor, Tensor]:
    return quantize_with(x, global_scale, producer="silu_mul", **options)


def rms_norm_nvfp4_quantize(
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None = None,
    global_scale: Tensor | None = None,
    *,
    eps: float = 1e-5,
    keep: bool = False,
    **options,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    y = x.new_empty(x.shape if keep else (0,))
    total = x.new_empty(0) if residual is None else residual.new_empty(residual.shape)
    norm = Norm(
        weight.contiguous(), residual if residual is None else residual.contiguous(), eps,
        y if keep else None, total if residual is not None else None,
    )  # fmt: skip
    return *quantize_with(x, global_scale, producer="rms_norm", norm=norm, **options), y, total
