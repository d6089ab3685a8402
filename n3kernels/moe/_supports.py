"""What the kernels of this family leave to the reference."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _dispatch

__all__ = ["decode_experts", "latent_front", "latent_tail", "not_float64", "tensor_core_groups"]


def not_float64(*args: object, **kwargs: object) -> str | None:
    """The kernels compute in float32; gradient checks, which need float64, have the reference."""
    for t in (*args, *kwargs.values()):
        if isinstance(t, Tensor) and t.dtype == torch.float64:
            return "float64 is served by the reference"
    return None


def decode_experts(x, w_up, w_down, ids, weights, up_scale=None, up_global=None, down_scale=None, down_global=None,
                   valid_tokens=None, *, activation="relu2", first_expert=0, out_dtype=None) -> str | None:  # fmt: skip
    """What the sm_90 kernels of moe_experts cover, for few tokens per expert and for many; experts_sm90.cu in csrc/moe
    says the same."""
    if reason := not_float64(x):
        return reason
    if x.is_cuda and torch.cuda.get_device_capability(x.device) != (9, 0):
        return "takes GPUs of compute capability 9.0"
    if x.dtype == torch.float32:
        return "takes bfloat16 x, got float32: tensor cores would round it"
    if x.dtype == torch.float16:
        return "takes bfloat16 x, got float16: relu2 may pass 65504"
    experts, width, slots = len(w_up), x.shape[1], ids.numel()
    inner = w_up.shape[1] // (1 if activation == "relu2" else 2)
    wide = slots > 64 * experts and not _dispatch._batch_invariant  # two grouped products: products bound the time
    if width < 8 or width % 8 or (width > 3584 and not wide):
        few = "takes x of 8 to 3584 columns, a multiple of 8"
        return "takes positive multiples of 8 columns of x" if wide else few
    if inner < 8 or inner % 8:
        return "takes an inner size that is a positive multiple of 8"
    if experts > 1024:
        return "takes up to 1024 experts"
    if ids.shape[1] > 65536:
        return "takes up to 65536 slots per token"
    if up_scale is not None:
        return _nvfp4_rows(w_up, up_scale) or _nvfp4_rows(w_down, down_scale)
    if not _in_rows(w_up) or not _in_rows(w_down):
        return "takes weights whose rows are contiguous and begin at multiples of 16 bytes"
    return None


def tensor_core_groups(x, w, offsets, gather=None, row_scale=None, block_scale=None, global_scale=None, *,
                       activation=None) -> str | None:  # fmt: skip
    """What the sm_90 kernels of grouped_linear cover; csrc/moe/grouped_linear_sm90.cu says the same."""
    if reason := not_float64(x):
        return reason
    if x.is_cuda and torch.cuda.get_device_capability(x.device) != (9, 0):
        return "takes GPUs of compute capability 9.0"
    if x.dtype == torch.float32:
        return "takes float16 and bfloat16 x, got float32: tensor cores would round it"
    groups, n = w.shape[:2]
    outputs = n // 2 if activation in ("silu", "gelu") else n
    if x.shape[1] < 8 or x.shape[1] % 8 or outputs < 8 or outputs % 8:
        return "takes positive multiples of 8 columns of x and of the result"
    if groups > 1024:
        return "takes up to 1024 groups"
    if max(len(x), 0 if gather is None else len(gather)) >= 2**31:
        return "takes fewer than 2^31 rows"
    if block_scale is not None:
        return _nvfp4_rows(w, block_scale)
    if not _in_rows(w):
        return "takes weights whose rows are contiguous and begin at multiples of 16 bytes"
    return None


def latent_front(x, router_weight, fc1, shared_up, *, activation="relu2") -> str | None:
    """What the sm_90 kernel of latent_moe_front covers; csrc/moe/latent_sm90.cu says the same."""
    if reason := not_float64(x, router_weight) or _few_tokens(x):
        return reason
    if activation != "relu2":
        return "takes relu2, not the gated activations"
    if router_weight.dtype == torch.float16:
        return "takes float32 and bfloat16 router weights, got float16"
    if x.shape[1] < 8 or x.shape[1] % 8:
        return "takes a width that is a positive multiple of 8"
    if not all(w is None or _in_rows(w) for w in (router_weight, fc1, shared_up)):
        return "takes weights whose rows are contiguous and begin at multiples of 16 bytes"
    return None


def latent_tail(y, fc2, shared, shared_down, residual=None) -> str | None:
    """What the sm_90 kernel of latent_moe_tail covers; csrc/moe/latent_sm90.cu says the same."""
    if reason := not_float64(y) or _few_tokens(y):
        return reason
    depths = [w.shape[1] for w in (fc2, shared_down) if w is not None]
    if any(k < 8 or k % 8 for k in depths):
        return "takes latent and inner sizes that are positive multiples of 8"
    if not all(w is None or _in_rows(w) for w in (fc2, shared_down)):
        return "takes weights whose rows are contiguous and begin at multiples of 16 bytes"
    return None


def _few_tokens(x: Tensor) -> str | None:
    if x.is_cuda and torch.cuda.get_device_capability(x.device) != (9, 0):
        return "takes GPUs of compute capability 9.0"
    if x.dtype == torch.float32:
        return "takes bfloat16, got float32: tensor cores would round it"
    if x.dtype == torch.float16:
        return "takes bfloat16, got float16, in whose range float32 router weights have no exact terms"
    if len(x) > 512 and not _dispatch._batch_invariant:
        return "takes up to 512 tokens: beyond, products and not memory bound the time"
    return None


def _in_rows(w: Tensor) -> bool:
    """What the copy engine reads. Of a dimension of size 1 the stride does not matter; that of an expanded one does."""
    outer, unit = zip(w.shape[:-1], w.stride()[:-1], strict=True), 16 // w.element_size()
    return w.stride(-1) == 1 and w.data_ptr() % 16 == 0 and all(n <= 1 or (s > 0 and s % unit == 0) for n, s in outer)


def _nvfp4_rows(q: Tensor, scale: Tensor) -> str | None:
    """The same of codes, two of whose rows the copy engine takes for one; scales are read by threads, from anywhere."""
    fits = [n <= 1 or (s > 0 and s % by == 0) for n, s, by in zip(q.shape[:2], q.stride()[:2], (16, 8), strict=True)]
    if q.stride(2) != 1 or q.data_ptr() % 16 or not all(fits):
        return "takes codes whose rows are contiguous, each two beginning at a multiple of 16 bytes"
    if scale.shape[2] > 1 and scale.stride(2) != 1:
        return "takes scales whose rows are contiguous"
    return None
