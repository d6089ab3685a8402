"""nvfp4_linear.packed: `n3kernels.nvfp4.linear` on the blob of `n3kernels.nvfp4.prepack`."""

from __future__ import annotations

import torch

from .. import _dispatch
from .._checks import Check, dtype_name
from . import reference_repack
from .linear import _dgrad, _grad_before


def _check_packed(x, blob, global_scale, n, bias=None, activation=None):
    check = Check("nvfp4_linear.packed")
    check.floating("x", x)
    check.dtype("blob", blob, torch.uint8)
    check.dtype("global_scale", global_scale, torch.float32)
    check.that(x.dim() >= 1, "x must have at least 1 dimension", x.dim())
    k = x.shape[-1]
    check.that(k > 0 and k % 16 == 0, "x must have a last dimension that is a positive multiple of 16", k)
    check.that(n >= 0, "n must not be negative", n)
    check.shape("blob", blob, reference_repack.blob_shape(n, k))
    check.that(global_scale.numel() == 1, "global_scale must have 1 element", global_scale.numel())
    if bias is not None:
        check.same_dtype("bias", bias, "x", x)
        check.shape("bias", bias, (n,))
    check.choice("activation", activation, (None, "relu2"))
    check.same_device("x", x, blob=blob, global_scale=global_scale, bias=bias)


def _fake_packed(x, blob, global_scale, n, bias=None, activation=None):
    return x.new_empty((*x.shape[:-1], n))


def _supports_cuda(x, *args, **kwargs):
    if x.is_cuda and torch.cuda.get_device_capability(x.device) < (8, 0):
        return "takes GPUs of compute capability 8.0 and later"
    if x.dtype in (torch.float32, torch.float64):
        return f"takes float16 and bfloat16 x, got {dtype_name(x.dtype)}: tensor cores would round it"
    return None


def _setup_context(ctx, inputs, output):
    x, blob, global_scale, ctx.n, bias, ctx.activation = inputs
    ctx.k, ctx.has_bias = x.shape[-1], bias is not None
    ctx.save_for_backward(blob, global_scale, output if ctx.activation else None)


def _backward(ctx, grad_y):
    blob, global_scale, y = ctx.saved_tensors
    grad = _grad_before(ctx.activation, grad_y, y)
    needs = ctx.needs_input_grad[0]
    dx = _dgrad(grad, *reference_repack.unpack(blob, ctx.n, ctx.k), global_scale) if needs else None
    dbias = grad.sum_to_size(ctx.n) if ctx.has_bias and ctx.needs_input_grad[4] else None
    return dx, None, None, None, dbias, None


_dispatch.register(
    "nvfp4_linear.packed",
    check=_check_packed,
    fake=_fake_packed,
    reference=reference_repack.nvfp4_linear_packed,
    supports={"cuda": _supports_cuda},
    missing={
        "cpu": "the blob is in the order of a GPU's tensor cores: CPU kernels read the canonical layout",
        "triton": "the blob is in the order of an mma instruction's operand: Triton kernels read the canonical layout",
    },
    setup_context=_setup_context,
    backward=_backward,
)
