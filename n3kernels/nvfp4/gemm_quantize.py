from __future__ import annotations

import torch
from torch import Tensor

from .. import _dispatch
from .._checks import Check
from . import _supports, reference_quantize
from .gemm import check_operands
from .quantize import empty_parts
from .tensor import NVFP4Tensor

__all__ = ["gemm_quantize"]


def gemm_quantize(
    a: NVFP4Tensor,
    b: NVFP4Tensor,
    global_scale: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    scale_layout: str = "linear",
) -> NVFP4Tensor:
    r"""Returns ``quantize(act(a @ b^T + bias), global_scale)`` of two NVFP4 matrices: a W4A4 product for the next one.

    Args:
        a, b: ``[M, K]`` and ``[N, K]`` as of `gemm`; N a multiple of 16.
        global_scale: float32, 1 element, the decode scale of the result, read on the device: its amax over 2688 from
            calibration, such as a checkpoint's ``input_scale`` of the next layer. What is larger saturates.
        bias: ``[N]``, float32, float16 or bfloat16, which become float32 without loss.
        activation: None, or ``"relu2"``: ``relu(v)^2``, between the two products of Nemotron 3's MLPs.
        scale_layout: of the result, as of `quantize`: ``"128x4"`` is what block-scaled tensor cores take.
    Returns:
        `NVFP4Tensor` of shape ``[M, N]`` with this global scale: what `quantize` makes of the float32 result of `gemm`,
        which is neither rounded to 16 bits in between nor written to memory. Codes and block scales are the very bytes
        of ``quantize(act(gemm(a, b, torch.float32, bias)), global_scale)`` on the CPU; the sums of other backends
        round elsewhere, which moves a value across the border between two codes now and then. No gradient flows.
    Raises:
        RuntimeError: a shape, dtype, layout or activation outside the above; the message names argument and values.
    Source: the epilogues with scale factors of CUTLASS's block-scaled products (its examples 72b and 79b).

    >>> from n3kernels import nvfp4
    >>> a, b = nvfp4.quantize(torch.randn(3, 32)), nvfp4.quantize(torch.randn(64, 32))
    >>> gemm_quantize(a, b, torch.tensor(0.01), activation="relu2").shape
    (3, 64)
    """
    q, block_scale = torch.ops.n3.nvfp4_gemm.quantized(
        a.q, a.block_scale, a.global_scale, b.q, b.block_scale, b.global_scale, global_scale,
        None if bias is None else bias.detach().float(), activation, a_layout=a.scale_layout, b_layout=b.scale_layout,
        scale_layout=scale_layout,
    )  # fmt: skip
    return NVFP4Tensor(q, block_scale, global_scale, scale_layout, (a.shape[0], b.shape[0]))


def _check(
    a,
    a_scale,
    a_global,
    b,
    b_scale,
    b_global,
    global_scale,
    bias=None,
    activation=None,
    *,
    a_layout="linear",
    b_layout="linear",
    scale_layout="linear",
):
    check = Check("nvfp4_gemm.quantized")
    check_operands(check, a, a_scale, a_global, b, b_scale, b_global, bias, torch.float32, a_layout, b_layout)
    n = b.shape[0]
    check.that(n % 16 == 0, "b must have rows in multiples of 16", n)
    check.dtype("global_scale", global_scale, torch.float32)
    check.that(global_scale.numel() == 1, "global_scale must have 1 element", global_scale.numel())
    check.choice("activation", activation, (None, "relu2"))
    check.choice("scale_layout", scale_layout, ("linear", "128x4"))
    check.same_device("a", a, global_scale=global_scale)


def _fake(a, a_scale, a_global, b, *rest, scale_layout="linear", **layouts):
    m, n = a.shape[0], b.shape[0]
    return empty_parts(a.new_empty((m, n)), n, False, scale_layout)[:2]


_dispatch.register(
    "nvfp4_gemm.quantized",
    check=_check,
    fake=_fake,
    reference=reference_quantize.nvfp4_gemm_quantized,
    triton="n3kernels.triton_ops.nvfp4.gemm:nvfp4_gemm_quantized",
    supports={"cuda": _supports.block_scaled_codes},
)
