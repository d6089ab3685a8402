"""What the kernels of this family leave to the reference."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["decode_experts", "not_float64", "tensor_core_groups"]


def not_float64(*args: object, **kwargs: object) -> str | None:
    """The kernels compute in float32; gradient checks, which need float64, have the reference."""
    for t in (*args, *kwargs.values()):
        if isinstance(t, Tensor) and t.dtype == torch.float64:
            return "float64 is served by the reference"
    return None


def decode_experts(x, w_up, w_down, ids, weights, up_scale=None, up_global=None, down_scale=None, down_global=None,
                   valid_tokens=None, *, activation="relu2", first_expert=0) -> str | None:  # fmt: skip
    """What the sm_90 kernel of moe_experts covers; csrc/moe/experts_sm90.cu says the same."""
    if reason := not_float64(x):
        return reason
    if x.is_cuda and torch.cuda.get_device_capability(x.device) != (9, 0):
        return "takes GPUs of compute capability 9.0"
    if x.dtype == torch.float32:
        return "takes bfloat16 x, got float32: tensor cores would round it"
    if x.dtype == torch.float16:
        return "takes bfloat16 x, got float16: relu2 may pass 65504"
    if up_scale is not None:
        return "takes dense weights"
    if activation != "relu2":
        return "takes relu2, not the gated activations"
    (experts, inner, width), slots = w_up.shape, ids.numel()
    if not 8 <= width <= 3584 or width % 8:
        return "takes x of 8 to 3584 columns, a multiple of 8"
    if inner < 8 or inner % 8:
        return "takes an inner size that is a positive multiple of 8"
    if experts > 1024:
        return "takes up to 1024 experts"
    if slots > 64 * experts:
        return "takes up to 64 slots per expert on average: beyond, products and not memory bound the time"
    if not _in_rows(w_up) or not _in_rows(w_down):
        return "takes weights whose rows are contiguous and begin at multiples of 16 bytes"
    return None


def tensor_core_groups(x, w, offsets, gather=None, row_scale=None, block_scale=None, global_scale=None, *,
                       activation=None) -> str | None:  # fmt: skip
    """What the sm_90 kernel of grouped_linear covers; csrc/moe/grouped_linear_sm90.cu says the same."""
    if reason := not_float64(x):
        return reason
    if x.is_cuda and torch.cuda.get_device_capability(x.device) != (9, 0):
        return "takes GPUs of compute capability 9.0"
    if x.dtype == torch.float32:
        return "takes float16 and bfloat16 x, got float32: tensor cores would round it"
    if block_scale is not None:
        return "takes dense weights"
    if activation not in (None, "relu2"):
        return "takes relu2 or no activation, not the gated ones"
    groups, n, k = w.shape
    if k < 8 or k % 8 or n < 8 or n % 8:
        return "takes positive multiples of 8 rows and columns per group"
    if groups > 1024:
        return "takes up to 1024 groups"
    if max(len(x), 0 if gather is None else len(gather)) >= 2**31:
        return "takes fewer than 2^31 rows"
    if not _in_rows(w):
        return "takes weights whose rows are contiguous and begin at multiples of 16 bytes"
    return None


def _in_rows(w: Tensor) -> bool:
    """What the copy engine reads. Of a dimension of size 1 the stride does not matter; that of an expanded one does."""
    outer = zip(w.shape[:-1], w.stride()[:-1], strict=True)
    return w.stride(-1) == 1 and w.data_ptr() % 16 == 0 and all(n <= 1 or (s > 0 and s % 8 == 0) for n, s in outer)
