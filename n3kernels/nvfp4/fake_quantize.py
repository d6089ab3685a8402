from __future__ import annotations

import torch
from torch import Tensor

from .. import _dispatch
from .quantize import _check as check_quantize

__all__ = ["fake_quantize"]


def fake_quantize(
    x: Tensor,
    global_scale: Tensor | None = None,
    *,
    rounding: str = "nearest",
    four_over_six: bool = False,
    metric: str = "mae",
    block: str = "1x16",
    per_row: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Returns ``dequantize(quantize(x))`` in the dtype of x, for training with quantisation in the forward pass.

    Args:
        x, global_scale, rounding, four_over_six, metric, block, per_row, generator: as of `quantize`.
    Returns:
        ``[..., K]``, dtype of x. Differentiable in x by the straight-through estimator: the gradient passes unchanged,
        also where a given global scale makes values saturate.
    Raises:
        RuntimeError: as `quantize`.
    Source: straight-through estimator (arXiv:1308.3432).

    >>> x = torch.randn(2, 32, requires_grad=True)
    >>> fake_quantize(x).sum().backward()
    >>> bool((x.grad == 1).all())
    True
    """
    seed = None
    if rounding == "stochastic":
        seed = torch.randint(2**63 - 1, (2,), generator=generator, device=x.device)
    return torch.ops.n3.nvfp4_fake_quantize.default(
        x, global_scale, seed, rounding, four_over_six, metric, block, per_row
    )


def _check(x, global_scale=None, seed=None, rounding="nearest", four_over_six=False, metric="mae", block="1x16",
           per_row=False):  # fmt: skip
    check_quantize(
        x, global_scale, None, seed, rounding=rounding, metric=metric, block=block, per_row=per_row,
        op="nvfp4_fake_quantize",
    )  # fmt: skip


def _fake(x, *args):
    return x.new_empty(x.shape)


def _reference(x, global_scale=None, seed=None, rounding="nearest", four_over_six=False, metric="mae", block="1x16",
               per_row=False):  # fmt: skip
    q, block_scale, used = torch.ops.n3.nvfp4_quantize.default(
        x, global_scale, None, seed, rounding=rounding, four_over_six=four_over_six, metric=metric, block=block,
        per_row=per_row,
    )  # fmt: skip
    return torch.ops.n3.nvfp4_dequantize.default(q, block_scale, used, dtype=x.dtype)


def _setup_context(ctx, inputs, output):
    pass


def _backward(ctx, grad_y):
    return grad_y, *[None] * 7


_OF_PARTS = "made of nvfp4_quantize and nvfp4_dequantize"

_dispatch.register(
    "nvfp4_fake_quantize",
    check=_check,
    fake=_fake,
    reference=_reference,
    missing={"cpu": _OF_PARTS, "triton": _OF_PARTS, "cuda": _OF_PARTS},
    setup_context=_setup_context,
    backward=_backward,
)
