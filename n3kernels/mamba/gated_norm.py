from __future__ import annotations

import torch
from torch import Tensor

from .. import _dispatch
from .._autograd import grads_through
from .._checks import Check
from . import reference
from ._supports import not_float64

__all__ = ["gated_rms_norm"]


def gated_rms_norm(
    x: Tensor, z: Tensor | None, weight: Tensor, group_size: int, eps: float = 1e-5, norm_before_gate: bool = False
) -> Tensor:
    r"""Returns ``weight * RMSNorm(x * silu(z))``, normalised over groups of the last dimension.

    Args:
        x: ``[..., dim]``, float32, float16 or bfloat16.
        z: gate, shape and dtype of ``x``; None for a plain RMSNorm.
        weight: ``[dim]``, floating point.
        group_size: elements per group; divides ``dim``.
        eps: added to the mean square.
        norm_before_gate: ``weight * RMSNorm(x) * silu(z)`` instead.
    Returns:
        ``[..., dim]``, dtype of ``x``, contiguous. Computed in float32 and rounded once, the weight included. Within
        half a unit in the last place of the fp64 definition plus 1e-5 relative; a row's bits do not depend on the
        batch. Differentiable in ``x``, ``z`` and ``weight``.
    Raises:
        RuntimeError: a shape, dtype or ``group_size`` outside the above; the message names argument and values.
    Source: Mamba-2 (arXiv:2405.21060) sec. 7; Nemotron 3 ``mixer.norm``, where group_size = d_inner / n_groups.

    >>> gated_rms_norm(torch.randn(2, 3, 8), torch.randn(2, 3, 8), torch.ones(8), group_size=4).shape
    torch.Size([2, 3, 8])
    """
    return torch.ops.n3.gated_rms_norm.default(x, z, weight, group_size, eps, norm_before_gate)


def _check(x, z, weight, group_size, eps=1e-5, norm_before_gate=False):
    check = Check("gated_rms_norm")
    check.that(x.dim() >= 1, "x must have at least 1 dimension", x.dim())
    check.floating("x", x)
    if z is not None:
        check.shape("z", z, x.shape)
        check.same_dtype("z", z, "x", x)
    check.shape("weight", weight, x.shape[-1:])
    check.floating("weight", weight)
    dim = x.shape[-1]
    check.that(group_size > 0 and dim % group_size == 0, f"group_size must divide the last dimension {dim}", group_size)
    check.same_device("x", x, z=z, weight=weight)


def _check_bwd(grad_y, x, z, weight, group_size, eps, norm_before_gate):
    _check(x, z, weight, group_size, eps, norm_before_gate)
    check = Check("gated_rms_norm_bwd")
    check.shape("grad_y", grad_y, x.shape)
    check.same_dtype("grad_y", grad_y, "x", x)
    check.same_device("x", x, grad_y=grad_y)


def _fake(x, z, weight, group_size, eps=1e-5, norm_before_gate=False):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _reference_bwd(grad_y, x, z, weight, group_size, eps, norm_before_gate):
    def forward(x, z, weight):
        return reference.gated_rms_norm(x, z, weight, group_size, eps, norm_before_gate)

    return tuple(g.contiguous() for g in grads_through(forward, (x, z, weight), (grad_y,)))


def _fake_bwd(grad_y, x, z, weight, group_size, eps, norm_before_gate):
    return tuple(
        x.new_empty(0) if t is None else torch.empty_like(t, memory_format=torch.contiguous_format)
        for t in (x, z, weight)
    )


def _setup_context(ctx, inputs, output):
    x, z, weight, *ctx.options = inputs
    ctx.save_for_backward(x, z, weight)


def _backward(ctx, grad_y):
    x, z, weight = ctx.saved_tensors
    dx, dz, dweight = torch.ops.n3.gated_rms_norm_bwd.default(grad_y, x, z, weight, *ctx.options)
    return dx, None if z is None else dz, dweight, None, None, None


_dispatch.register(
    "gated_rms_norm",
    check=_check,
    fake=_fake,
    reference=reference.gated_rms_norm,
    supports={"cpu": not_float64, "triton": not_float64, "cuda": not_float64},
    setup_context=_setup_context,
    backward=_backward,
    triton="n3kernels.triton_ops.mamba.gated_norm:gated_rms_norm",
)
_dispatch.register(
    "gated_rms_norm_bwd",
    check=_check_bwd,
    fake=_fake_bwd,
    reference=_reference_bwd,
    supports={"cpu": not_float64, "triton": not_float64, "cuda": not_float64},
    triton="n3kernels.triton_ops.mamba.gated_norm:gated_rms_norm_bwd",
)
