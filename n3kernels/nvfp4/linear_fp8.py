"""nvfp4_linear_fp8: W4A8, what ``nvfp4.linear(..., compute="fp8")`` runs.

::

    sx = amax(|x|) / 448 for each row of x, 1 if that is 0      x8 = e4m3(x / sx)
    p  = least integer with 6 max(|s|) <= 448 * 2^p, for each row of W with block scales s
    w8 = e4m3(e2m1 * s * 2^-p)
    y  = act((sum x8 w8) * sx * (2^p * global_scale) + bias)

All roundings are to nearest even. 2^p is exact, so while half a scaled block scale is a normal e4m3 number
(``s * 2^-p >= 2^-5``, a thousandth of the largest of the row) a weight rounds only where its code is 1.5, 3 or 6: 3 and
6 are exponent steps of the rounded 1.5, the others of the scale itself.
"""

from __future__ import annotations

import torch

from .. import _dispatch
from .linear import _backward, _fake, _setup_context, check_operands
from .reference_fp8 import nvfp4_linear_fp8

__all__: list[str] = []

FP8_TENSOR_CORES = (8, 9)


def _check(*args, **kwargs):
    check_operands("nvfp4_linear_fp8", *args, **kwargs)


def _supports_triton(x, *args, **kwargs):
    if x.dtype == torch.float64:
        return "float64 is served by the reference alone"
    if x.is_cuda and torch.cuda.get_device_capability(x.device) < FP8_TENSOR_CORES:
        return "needs tensor cores for 8-bit floats, sm_89 and later"
    return None


_dispatch.register(
    "nvfp4_linear_fp8",
    check=_check,
    fake=_fake,
    reference=nvfp4_linear_fp8,
    triton="n3kernels.triton_ops.nvfp4.linear_fp8:nvfp4_linear_fp8",
    supports={"triton": _supports_triton},
    missing={"cuda": "not written yet: the Triton kernel serves"},
    setup_context=_setup_context,  # gradients are those of the exact product
    backward=_backward,
)
