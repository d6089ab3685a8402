"""What the kernels of this family leave to the reference."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["not_float64", "tensor_core_mixer", "tensor_core_scan"]


def not_float64(*args: object, **kwargs: object) -> str | None:
    """The kernels compute in float32; gradient checks, which need float64, have the reference."""
    for t in (*args, *kwargs.values()):
        if isinstance(t, Tensor) and t.dtype == torch.float64:
            return "float64 is served by the reference"
    return None


def tensor_core_scan(x, dt, A, B, C, D=None, z=None, *args: object, **kwargs: object) -> str | None:
    """What the sm_90 kernel of ssd_scan covers; csrc/mamba/ssd_scan_sm90.cu says the same."""
    if reason := not_float64(x, dt, A, B, C, D, z, *args, **kwargs):
        return reason
    if reason := _tensor_cores("x", x, x.shape[-1], B.shape[-1], x.shape[:-2].numel()):
        return reason
    if not all(_in_rows(t) for t in (x, B, C, z) if t is not None):
        return "takes x, B, C and z whose rows are contiguous and begin at multiples of 16 bytes"
    return None


def tensor_core_mixer(zxbcdt, conv_weight, conv_bias, conv_state, ssm_state, *args: object, **kwargs: object):
    """What mamba2_prefill covers on sm_90, as csrc/mamba/mamba2_prefill_cuda.cu; rows of zxbcdt may begin anywhere."""
    if reason := not_float64(zxbcdt, conv_weight, conv_bias, conv_state, ssm_state, *args, **kwargs):
        return reason
    return _tensor_cores("zxbcdt", zxbcdt, *ssm_state.shape[-2:], zxbcdt.shape[:-1].numel())


def _tensor_cores(name: str, x: Tensor, head_dim: int, d_state: int, tokens: int) -> str | None:
    if x.is_cuda and torch.cuda.get_device_capability(x.device) != (9, 0):
        return "takes GPUs of compute capability 9.0"
    if x.dtype == torch.float32:
        return f"takes float16 and bfloat16 {name}, got float32: tensor cores would round it"
    if head_dim < 8 or head_dim % 8:
        return "takes a head_dim that is a positive multiple of 8"
    if d_state < 16 or d_state > 256 or d_state % 16:
        return "takes a d_state of 16 to 256, a multiple of 16"
    if tokens >= 2**31:
        return "takes fewer than 2^31 tokens"
    return None


def _in_rows(t: Tensor) -> bool:
    """What the copy engine reads. Of a dimension of size 1 the stride does not matter; that of an expanded one does."""
    if t.numel() == 0:
        return True
    outer = zip(t.shape[:-1], t.stride()[:-1], strict=True)
    return t.stride(-1) == 1 and t.data_ptr() % 16 == 0 and all(n <= 1 or (s > 0 and s % 8 == 0) for n, s in outer)
