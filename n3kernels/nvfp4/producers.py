"""Quantisers fused with what makes their input: the activation before down_proj, the norm before a mixer."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import _dispatch
from .._checks import Check
from . import reference_quantize
from .quantize import check_input, empty_parts
from .tensor import NVFP4Tensor

__all__ = ["NormedNVFP4", "relu2_quantize", "rms_norm_quantize", "silu_mul_quantize"]


class NormedNVFP4(NamedTuple):
    """What `rms_norm_quantize` returns."""

    quantized: NVFP4Tensor
    y: Tensor | None  # the normalised rows, if they were asked for
    residual: Tensor | None  # x + residual, if there was a residual


def relu2_quantize(
    x: Tensor,
    global_scale: Tensor | None = None,
    *,
    four_over_six: bool = False,
    metric: str = "mae",
    per_row: bool = False,
    scale_layout: str = "linear",
) -> NVFP4Tensor:
    r"""Returns ``quantize(relu(x)^2)``, the square rounded to the dtype of x: the input of Nemotron's down_proj.

    Args:
        x: ``[..., K]``, float32, float16 or bfloat16, K a multiple of 16; any strides.
        global_scale, four_over_six, metric, per_row, scale_layout: as of `quantize`.
    Returns:
        `NVFP4Tensor` of shape ``[..., K]``, byte for byte that of ``quantize(x.relu().square())``, without the square
        being written to memory.
    Raises:
        RuntimeError: a shape, dtype or option outside the above; the message names argument and values.
    Source: relu2 as in Nemotron's MLPs and experts (arXiv:2109.08668).

    >>> t = relu2_quantize(torch.tensor([[-2.0, 1.5, 0.75, 0.0] * 4]), torch.tensor(1.0))
    >>> t.dequantize(torch.float32)[0, :4].tolist()
    [0.0, 2.25, 0.5625, 0.0]
    """
    parts = torch.ops.n3.relu2_nvfp4_quantize.default(
        x.detach(), global_scale, four_over_six=four_over_six, metric=metric, per_row=per_row,
        scale_layout=scale_layout,
    )  # fmt: skip
    return NVFP4Tensor(*parts, scale_layout, tuple(x.shape))


def silu_mul_quantize(
    x: Tensor,
    global_scale: Tensor | None = None,
    *,
    four_over_six: bool = False,
    metric: str = "mae",
    per_row: bool = False,
    scale_layout: str = "linear",
) -> NVFP4Tensor:
    r"""Returns ``quantize(silu(a) * b)`` of ``x = [a, b]``, the product rounded once to the dtype of x.

    Args:
        x: ``[..., 2 K]``, float32, float16 or bfloat16, K a multiple of 16; the gate ``a`` first. Any strides.
        global_scale, four_over_six, metric, per_row, scale_layout: as of `quantize`.
    Returns:
        `NVFP4Tensor` of shape ``[..., K]``. The definition computes ``a / (1 + exp(-a)) * b`` in float64; backends
        with a float32 exponential may give a neighbouring code where the rounding to the dtype of x is that close.
    Raises:
        RuntimeError: a shape, dtype or option outside the above; the message names argument and values.
    Source: SwiGLU (arXiv:2002.05202), gate and up in one matrix as in vLLM's ``silu_and_mul``.

    >>> silu_mul_quantize(torch.randn(2, 64)).shape
    (2, 32)
    """
    parts = torch.ops.n3.silu_mul_nvfp4_quantize.default(
        x.detach(), global_scale, four_over_six=four_over_six, metric=metric, per_row=per_row,
        scale_layout=scale_layout,
    )  # fmt: skip
    return NVFP4Tensor(*parts, scale_layout, (*x.shape[:-1], x.shape[-1] // 2))


def rms_norm_quantize(
    x: Tensor,
    weight: Tensor,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    global_scale: Tensor | None = None,
    *,
    keep: bool = False,
    four_over_six: bool = False,
    metric: str = "mae",
    per_row: bool = False,
    scale_layout: str = "linear",
) -> NormedNVFP4:
    r"""Returns ``quantize(y)``, ``y = h / sqrt(mean(h^2) + eps) * weight`` with ``h = x + residual``.

    Args:
        x: ``[..., K]``, float32, float16 or bfloat16, K a multiple of 16; any strides.
        weight: ``[K]``, float32 or the dtype of x.
        eps: added to the mean of squares.
        residual: ``[..., K]``, float32 or the dtype of x; the sum is rounded to its dtype and that is normalised.
        global_scale, four_over_six, metric, per_row, scale_layout: as of `quantize`.
        keep: also return y.
    Returns:
        `NormedNVFP4`: the `NVFP4Tensor`, y in the dtype of x or None, ``x + residual`` or None. The mean is a float64
        sum, its root is rounded to float32, ``h * rstd * weight`` is float32, and y is rounded to the dtype of x
        before it is quantised: the codes are those of ``quantize(y)``.
    Raises:
        RuntimeError: a shape, dtype or option outside the above; the message names argument and values.
    Source: RMSNorm (arXiv:1910.07467) as in transformers' ``NemotronHRMSNorm``, with the residual stream of its blocks.

    >>> t, y, h = rms_norm_quantize(torch.randn(2, 32), torch.ones(32), residual=torch.zeros(2, 32), keep=True)
    >>> t.shape, y.dtype, h.shape
    ((2, 32), torch.float32, torch.Size([2, 32]))
    """
    *parts, y, total = torch.ops.n3.rms_norm_nvfp4_quantize.default(
        x.detach(), weight.detach(), None if residual is None else residual.detach(), global_scale, eps=eps,
        four_over_six=four_over_six, metric=metric, per_row=per_row, scale_layout=scale_layout, keep=keep,
    )  # fmt: skip
    quantized = NVFP4Tensor(*parts, scale_layout, tuple(x.shape))
    return NormedNVFP4(quantized, y if keep else None, None if residual is None else total)


def _checker(op: str, factor: int):
    """The check of an activation that makes 1 element of ``factor``."""

    def check_activation(
        x, global_scale=None, *, four_over_six=False, metric="mae", per_row=False, scale_layout="linear"
    ):
        check = Check(op)
        check.floating("x", x, double=False)
        check.that(x.dim() >= 1, "x must have at least 1 dimension", x.dim())
        width = x.shape[-1]
        if factor > 1:
            multiple = 16 * factor
            check.that(width % multiple == 0, f"x must have a last dimension that is a multiple of {multiple}", width)
        check_input(check, x, width // factor, global_scale, metric, per_row, scale_layout)

    return check_activation


def _fake_of(factor: int):
    def fake(x, global_scale=None, *, per_row=False, scale_layout="linear", **options):
        return empty_parts(x, x.shape[-1] // factor, per_row, scale_layout)

    return fake


def _check_norm(
    x,
    weight,
    residual=None,
    global_scale=None,
    *,
    eps=1e-5,
    four_over_six=False,
    metric="mae",
    per_row=False,
    scale_layout="linear",
    keep=False,
):
    check = Check("rms_norm_nvfp4_quantize")
    check.floating("x", x, double=False)
    check.that(x.dim() >= 1, "x must have at least 1 dimension", x.dim())
    k = x.shape[-1]
    check.dtype("weight", weight, *dict.fromkeys((torch.float32, x.dtype)))
    check.shape("weight", weight, (k,))
    if residual is not None:
        check.dtype("residual", residual, *dict.fromkeys((torch.float32, x.dtype)))
        check.shape("residual", residual, x.shape)
    check.that(eps >= 0, "eps must be >= 0", lambda: f"{eps:g}")
    check_input(check, x, k, global_scale, metric, per_row, scale_layout)
    check.same_device("x", x, weight=weight, residual=residual)


def _fake_norm(x, weight, residual=None, *scales, per_row=False, scale_layout="linear", keep=False, **options):
    parts = empty_parts(x, x.shape[-1], per_row, scale_layout)
    y = x.new_empty(x.shape if keep else (0,))
    return *parts, y, x.new_empty(0) if residual is None else residual.new_empty(x.shape)


_TRITON = "n3kernels.triton_ops.nvfp4.producers"
_dispatch.register(
    "relu2_nvfp4_quantize",
    check=_checker("relu2_nvfp4_quantize", 1),
    fake=_fake_of(1),
    reference=reference_quantize.relu2_nvfp4_quantize,
    triton=f"{_TRITON}:relu2_nvfp4_quantize",
)
_dispatch.register(
    "silu_mul_nvfp4_quantize",
    check=_checker("silu_mul_nvfp4_quantize", 2),
    fake=_fake_of(2),
    reference=reference_quantize.silu_mul_nvfp4_quantize,
    triton=f"{_TRITON}:silu_mul_nvfp4_quantize",
)
_dispatch.register(
    "rms_norm_nvfp4_quantize",
    check=_check_norm,
    fake=_fake_norm,
    reference=reference_quantize.rms_norm_nvfp4_quantize,
    triton=f"{_TRITON}:rms_norm_nvfp4_quantize",
)
