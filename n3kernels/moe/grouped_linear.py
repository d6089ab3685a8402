from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import _dispatch
from .._autograd import grads_through
from .._checks import Check
from . import reference
from ._supports import not_float64, tensor_core_groups
from .experts import unpack

if TYPE_CHECKING:
    from ..nvfp4 import NVFP4Tensor

__all__ = ["grouped_linear"]


def grouped_linear(
    x: Tensor,
    w: Tensor | NVFP4Tensor,
    offsets: Tensor,
    *,
    gather: Tensor | None = None,
    row_scale: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    r"""Returns ``y[r] = row_scale[r] * act(w[g] @ x[gather[r]])`` for the rows ``offsets[g] <= r < offsets[g + 1]``.

    Rows are sorted by group, as `sort` leaves them. A row in no group, before ``offsets[0]`` or from ``offsets[-1]``
    on, is zero and reads nothing.

    Args:
        x: ``[M, K]``, float32, float16, bfloat16 (or float64, by the reference alone).
        w: ``[G, N, K]``, dtype of ``x``; or an `NVFP4Tensor` of that shape, one global scale per group.
        offsets: ``[G + 1]``, int32, ascending, between 0 and the number of rows R. On the CPU the values are checked.
        gather: ``[R]``, int32: the row of ``x`` that each row of the result is made of, as often as it is named;
            where it is negative the result is zero and nothing is read. Without it R = M and row r takes ``x[r]``.
        row_scale: ``[R]``, float32 (float64 for float64 ``x``): a factor behind the activation, such as a routing
            weight.
        activation: None; ``"relu2"``: ``relu(h)^2``; gated, on ``h = [g, u]``: ``"silu"``: ``silu(g) * u``,
            ``"gelu"``: ``gelu(g) * u`` with the exact (erf) GELU.
    Returns:
        ``[R, N]``, gated ``[R, N / 2]``, dtype of ``x``, contiguous. Products, activation and scale are float32,
        rounded once; NVFP4 weights are decoded exactly. The relative L2 error against the float64 definition is at
        most 3e-3 for a 16-bit ``x`` and 1e-5 in float32. Deterministic; a row does not depend on the others.
        Differentiable in ``x``, dense ``w`` and ``row_scale``.
    Raises:
        RuntimeError: a shape, dtype or option outside the above, or gradients through NVFP4 weights; the message
            names argument and values.
    Source: grouped products of MegaBlocks (arXiv:2211.15841) and ScatterMoE (arXiv:2403.08245); a superset of
        ``torch.nn.functional.grouped_mm``, whose ``offs`` are ``offsets[1:]``.

    >>> x, w = torch.randn(3, 8), torch.randn(2, 16, 8)
    >>> offsets, gather = torch.tensor([0, 1, 4], dtype=torch.int32), torch.tensor([2, 0, 1, 2], dtype=torch.int32)
    >>> y = grouped_linear(x, w, offsets, gather=gather, activation="relu2")
    >>> torch.allclose(y[3], (w[1] @ x[2]).relu() ** 2, atol=1e-5)
    True
    """
    w, block_scale, global_scale = unpack(w)
    return torch.ops.n3.grouped_linear.default(
        x, w, offsets, gather, row_scale, block_scale, global_scale, activation=activation
    )


def _check(
    x, w, offsets, gather=None, row_scale=None, block_scale=None, global_scale=None, *, activation=None,
    op="grouped_linear",
):  # fmt: skip
    check = Check(op)
    check.floating("x", x)
    check.dim("x", x, 2)
    check.choice("activation", activation, (None, *reference.ACTIVATIONS))
    check.dim("w", w, 3)
    groups, n, width = w.shape[0], w.shape[1], x.shape[1]
    check.that(groups >= 1, "w must have at least 1 group", groups)
    if activation not in (None, "relu2"):
        check.that(n % 2 == 0, f"w must have an even number of rows per group for {activation}", n)
    _check_weights(check, x, w, block_scale, global_scale, (groups, n, width))
    check.dtype("offsets", offsets, torch.int32)
    check.shape("offsets", offsets, (groups + 1,))
    rows = x.shape[0]
    if gather is not None:
        check.dtype("gather", gather, torch.int32)
        check.dim("gather", gather, 1)
        rows = gather.shape[0]
    if row_scale is not None:
        check.dtype("row_scale", row_scale, torch.promote_types(x.dtype, torch.float32))
        check.shape("row_scale", row_scale, (rows,))
    check.same_device(
        "x", x, w=w, offsets=offsets, gather=gather, row_scale=row_scale, block_scale=block_scale,
        global_scale=global_scale,
    )  # fmt: skip


def _check_weights(check, x, w, block_scale, global_scale, shape):
    given = (block_scale is not None) + (global_scale is not None)
    check.that(given in (0, 2), "block_scale and global_scale must be given together or not at all", f"{given} of 2")
    groups, n, k = shape
    if not given:
        check.same_dtype("w", w, "x", x)
        check.shape("w", w, shape)
        return
    check.that(k > 0 and k % 16 == 0, "the last dimension of x must be a positive multiple of 16", k)
    check.dtype("w", w, torch.uint8)
    check.shape("w", w, (groups, n, k // 2))
    check.dtype("block_scale", block_scale, torch.float8_e4m3fn)
    check.shape("block_scale", block_scale, (groups, n, k // 16))
    check.dtype("global_scale", global_scale, torch.float32)
    check.shape("global_scale", global_scale, (groups,))


def _outputs(x, w, gather, activation):
    halves = 1 if activation in (None, "relu2") else 2
    return (x if gather is None else gather).shape[0], w.shape[1] // halves


def _fake(x, w, offsets, gather=None, row_scale=None, block_scale=None, global_scale=None, *, activation=None):
    return x.new_empty(_outputs(x, w, gather, activation))


def _check_bwd(grad_y, x, w, offsets, gather, row_scale, activation):
    check = Check("grouped_linear_bwd")
    check.that(w.dtype != torch.uint8, "w must be dense, got NVFP4: decode it first to train through it")
    _check(x, w, offsets, gather, row_scale, activation=activation, op="grouped_linear_bwd")
    check.same_dtype("grad_y", grad_y, "x", x)
    check.shape("grad_y", grad_y, _outputs(x, w, gather, activation))
    check.same_device("x", x, grad_y=grad_y)


def _reference_bwd(grad_y, x, w, offsets, gather, row_scale, activation):
    reference.check_groups("grouped_linear_bwd", x, offsets, gather)

    def forward(x, w, row_scale):
        return reference.grouped_linear(x, w, offsets, gather, row_scale, activation=activation)

    with torch.autocast(x.device.type, enabled=False):
        dx, dw, dscale = grads_through(forward, (x, w, row_scale), (grad_y,))
    return dx.contiguous(), dw.contiguous(), dscale.to(torch.promote_types(x.dtype, torch.float32))


def _fake_bwd(grad_y, x, w, offsets, gather, row_scale, activation):
    dx, dw = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, w))
    wide = torch.promote_types(x.dtype, torch.float32)
    return dx, dw, x.new_empty(0 if row_scale is None else row_scale.shape, dtype=wide)


def _setup_context(ctx, inputs, keyword_only_inputs, output):
    x, w, offsets, gather, row_scale, *_ = inputs
    ctx.activation = keyword_only_inputs["activation"]
    ctx.save_for_backward(x, w, offsets, gather, row_scale)


def _backward(ctx, grad_y):
    row_scale = ctx.saved_tensors[-1]
    dx, dw, dscale = torch.ops.n3.grouped_linear_bwd.default(grad_y, *ctx.saved_tensors, ctx.activation)
    return dx, dw, None, None, None if row_scale is None else dscale, None, None


_LATER = "not written yet"
_dispatch.register(
    "grouped_linear",
    check=_check,
    fake=_fake,
    reference=reference.grouped_linear,
    setup_context=_setup_context,
    backward=_backward,
    triton="n3kernels.triton_ops.moe.grouped_linear:grouped_linear",
    supports={"cpu": not_float64, "triton": not_float64, "cuda": tensor_core_groups},
)
_dispatch.register(
    "grouped_linear_bwd",
    check=_check_bwd,
    fake=_fake_bwd,
    reference=_reference_bwd,
    triton="n3kernels.triton_ops.moe.grouped_linear_bwd:grouped_linear_bwd",
    supports={"cpu": not_float64, "triton": not_float64, "cuda": not_float64},
    missing={"cuda": _LATER},
)
