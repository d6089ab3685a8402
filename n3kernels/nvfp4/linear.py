from __future__ import annotations

import torch
from torch import Tensor

from .. import _dispatch
from .._checks import Check
from . import reference
from .repack import PackedNVFP4
from .tensor import NVFP4Tensor

__all__ = ["linear"]


def linear(
    x: Tensor,
    w: NVFP4Tensor | PackedNVFP4,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    compute: str = "exact",
) -> Tensor:
    r"""Returns ``act(x @ W^T + bias)`` for NVFP4 weights and 16- or 32-bit activations (W4A16, or W4A8 by choice).

    Args:
        x: ``[..., K]``, float32, float16 or bfloat16, K a positive multiple of 16; any strides.
        w: ``[N, K]``, any N; linear scales (others are unswizzled first). A NaN block scale makes its row's output NaN.
            Or what `prepack` made of it, for the CUDA kernels, which take 16-bit ``x``: other backends unpack it.
        bias: ``[N]``, dtype of ``x``.
        activation: None, or ``"relu2"``: ``relu(v)^2``.
        compute: ``"exact"``, or ``"fp8"`` for the tensor cores of 8-bit floats (W4A8): rows of x become e4m3 with one
            scale ``amax / 448`` each, weights ``e4m3(e2m1 * e4m3 * 2^-p)`` with a power of two per row, for which codes
            1.5, 3 and 6 round. Products are summed in float32, on sm_90 anew every 128 terms. A row of x with a NaN or
            an infinity gives NaN. Gradients are those of the exact product.
    Returns:
        ``[..., N]``, dtype of ``x``, contiguous. Weights are decoded exactly (``e2m1 * e4m3`` has at most 6 significant
        bits); sums are float32, for every dtype; the global scale, bias and activation are applied in float32, and the
        result is rounded once. Relative L2 error against float64 at K = 2688: below 1e-6 in float32, 2.5e-3 in
        bfloat16; ``compute="fp8"`` adds 0.04 at most (0.034 on normal data). Deterministic; on the CPU a row's bits
        depend neither on the batch nor on the number of threads. CPUs with AMX sum bfloat16 in an order of their own,
        and activations below 2^-126 count as zero there.
        Differentiable in ``x`` and ``bias``; the weights are constants. Under ``use_backend("reference")`` float64 is
        taken too, for gradient checks.
    Raises:
        RuntimeError: a shape, dtype or activation outside the above; the message names argument and values.
    Source: NVIDIA ModelOpt's NVFP4 checkpoints of Nemotron 3; relu2 as in its MLPs and experts (arXiv:2109.08668).

    >>> from n3kernels import nvfp4
    >>> linear(torch.randn(2, 32), nvfp4.quantize(torch.randn(5, 32)), activation="relu2").shape
    torch.Size([2, 5])
    """
    Check("nvfp4_linear").choice("compute", compute, ("exact", "fp8"))
    exact = compute == "exact"
    if exact and isinstance(w, PackedNVFP4) and x.element_size() == 2:
        return torch.ops.n3.nvfp4_linear.packed(x, w.blob, w.global_scale, w.shape[0], bias, activation)
    w = w.unpack() if isinstance(w, PackedNVFP4) else w
    if not isinstance(w, NVFP4Tensor):
        raise TypeError(f"nvfp4.linear: w must be an NVFP4Tensor, as nvfp4.quantize makes it, got {type(w).__name__}")
    w = w.to_layout("linear")
    if not exact:
        return torch.ops.n3.nvfp4_linear_fp8.default(x, w.q, w.block_scale, w.global_scale, bias, activation)
    return torch.ops.n3.nvfp4_linear.default(x, w.q, w.block_scale, w.global_scale, bias, activation)


def check_operands(op: str, x, q, block_scale, global_scale, bias=None, activation=None):
    check = Check(op)
    check.floating("x", x)
    check.dtype("q", q, torch.uint8)
    check.dtype("block_scale", block_scale, torch.float8_e4m3fn)
    check.dtype("global_scale", global_scale, torch.float32)
    check.that(x.dim() >= 1, "x must have at least 1 dimension", x.dim())
    k = x.shape[-1]
    check.that(k > 0 and k % 16 == 0, "x must have a last dimension that is a positive multiple of 16", k)
    check.dim("q", q, 2)
    n = q.shape[0]
    check.shape("q", q, (n, k // 2))
    check.shape("block_scale", block_scale, (n, k // 16))
    check.that(global_scale.numel() == 1, "global_scale must have 1 element", global_scale.numel())
    if bias is not None:
        check.same_dtype("bias", bias, "x", x)
        check.shape("bias", bias, (n,))
    check.choice("activation", activation, (None, "relu2"))
    check.same_device("x", x, q=q, block_scale=block_scale, global_scale=global_scale, bias=bias)


def _check(*args, **kwargs):
    check_operands("nvfp4_linear", *args, **kwargs)


def _fake(x, q, block_scale, global_scale, bias=None, activation=None):
    return x.new_empty((*x.shape[:-1], q.shape[0]))


def _supports_triton(x, *args, **kwargs):
    return "float64 is served by the reference alone" if x.dtype == torch.float64 else None


def _setup_context(ctx, inputs, output):
    _, q, block_scale, global_scale, bias, ctx.activation = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(q, block_scale, global_scale, output if ctx.activation else None)


def _backward(ctx, grad_y):
    q, block_scale, global_scale, y = ctx.saved_tensors
    grad = _grad_before(ctx.activation, grad_y, y)
    dx = _dgrad(grad, q, block_scale, global_scale) if ctx.needs_input_grad[0] else None
    dbias = grad.sum_to_size(q.shape[0]) if ctx.has_bias and ctx.needs_input_grad[4] else None
    return dx, None, None, None, dbias, None


def _grad_before(activation: str | None, grad_y: Tensor, y: Tensor | None) -> Tensor:
    """The gradient in front of the activation, from the output."""
    if activation is None:
        return grad_y
    wide = torch.promote_types(y.dtype, torch.float32)  # d relu(v)^2 = 2 relu(v) dv, and relu(v) = sqrt(y)
    root = y.to(wide).sqrt() if not torch.is_grad_enabled() else torch.where(y > 0, y, 1).to(wide).sqrt() * (y > 0)
    return (2 * root * grad_y.to(wide)).to(y.dtype)  # a second derivative must not meet the root's at 0


def _dgrad(grad: Tensor, q: Tensor, block_scale: Tensor, global_scale: Tensor) -> Tensor:
    """``grad @ W``. The weights are exact in every dtype without their global scale, which float16 alone has not the
    range to leave for the end."""
    dequantize = torch.ops.n3.nvfp4_dequantize.default
    if grad.dtype == torch.float16:
        return grad @ dequantize(q, block_scale, global_scale, dtype=grad.dtype)
    exact = dequantize(q, block_scale, torch.ones_like(global_scale), dtype=torch.float32).to(grad.dtype)
    return grad @ exact * global_scale.reshape(())


_dispatch.register(
    "nvfp4_linear",
    check=_check,
    fake=_fake,
    reference=reference.nvfp4_linear,
    triton="n3kernels.triton_ops.nvfp4.linear:nvfp4_linear",
    # The C++ kernels refuse float64 by themselves: asking in Python would cost every call more than a small product.
    supports={"triton": _supports_triton},
    setup_context=_setup_context,
    backward=_backward,
)
