"""What the CUDA kernels of this family leave to Triton and the reference."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["block_scaled_codes", "block_scaled_cores", "block_scaled_groups"]


def block_scaled_cores(a, a_scale, a_global, b, b_scale, b_global, bias=None, *, out_dtype, a_layout="linear",
                       b_layout="linear") -> str | None:  # fmt: skip
    """What the kernels of nvfp4_gemm for sm_100 and sm_120 cover; csrc/nvfp4/gemm_plan.h says the same."""
    return _not_blackwell(a) or _problem(a, b, 8 * out_dtype.itemsize, "128x4" in (a_layout, b_layout))


def block_scaled_codes(a, a_scale, a_global, b, b_scale, b_global, global_scale, bias=None, activation=None, *,
                       a_layout="linear", b_layout="linear", scale_layout="linear") -> str | None:  # fmt: skip
    """The same of nvfp4_gemm.quantized, whose result has 4 bits."""
    return _not_blackwell(a) or _problem(a, b, 4, "128x4" in (a_layout, b_layout))


def block_scaled_groups(a, a_scale, a_global, b, b_scale, b_global, offsets, *, out_dtype,
                        b_layout="linear") -> str | None:  # fmt: skip
    """What the kernels of nvfp4_grouped_gemm for sm_100 and sm_120 cover; csrc/nvfp4/grouped_gemm_plan.h as well."""
    if reason := _not_blackwell(a) or _problem(a, b, 8 * out_dtype.itemsize, b_layout == "128x4"):
        return reason
    return "takes at least 1 expert" if b.shape[0] == 0 else None


def _not_blackwell(a: Tensor) -> str | None:
    if a.is_cuda and torch.cuda.get_device_capability(a.device) not in ((10, 0), (12, 0)):
        return "takes GPUs of compute capability 10.0 and 12.0"
    return None


def _problem(a: Tensor, b: Tensor, out_bits: int, swizzled: bool) -> str | None:
    (m, half), n = a.shape, b.shape[-2]
    k = half * 2
    if k % 32:
        return "takes K that is a multiple of 32: its rows are copied in units of 16 bytes"
    if n * out_bits % 128:
        if out_bits == 4:
            return "takes N that is a multiple of 32: rows of codes are copied in units of 16 bytes"
        return "takes N of whole 16 bytes of the result: multiples of 8, in float32 of 4"
    if swizzled and k % 64:
        return "takes K that is a multiple of 64 with 128x4 scales: the padding of their last tile would be multiplied"
    scales = -(-k // 64) * 4
    if max(m, n, k, (m + 127) * scales, (n + 127) * scales) >= 2**31:
        return "takes fewer than 2^31 rows, columns and block scales of a matrix"
    return None
