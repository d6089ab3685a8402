"""The products before and behind a LatentMoE layer's experts, for engines that run the layer in three launches."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _dispatch
from .._checks import Check
from . import reference, reference_layer
from ._supports import latent_front, latent_tail, not_float64

__all__ = ["latent_moe_front", "latent_moe_tail"]


def latent_moe_front(
    x: Tensor, router_weight: Tensor, fc1: Tensor | None, shared_up: Tensor, *, activation: str = "relu2"
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Returns ``logits = x @ router_weight^T``, ``z = x @ fc1^T`` and ``shared = act(x @ shared_up^T)``.

    Args:
        x: ``[T, d]``, float32, float16, bfloat16 (or float64, by the reference alone).
        router_weight: ``[E, d]``, floating point, of any dtype.
        fc1: ``[l, d]``, dtype of ``x``: the projection to the latent width; None without one.
        shared_up: ``[I_s, d]``, or ``[2 I_s, d]`` for a gated activation (gate first), dtype of ``x``.
        activation: ``"relu2"``, ``"silu"`` or ``"gelu"``; see `experts`.
    Returns:
        ``logits`` ``[T, E]`` float32 (float64 for float64 ``x``); ``z`` ``[T, l]``, dtype of ``x``, ``[T, 0]`` without
        ``fc1``; ``shared`` ``[T, I_s]``, dtype of ``x``. All contiguous, of float32 products and sums, rounded once;
        the router's factors are float32, not narrowed. The relative L2 error against the float64 definition is at most
        3e-3 in 16 bits and 1e-5 in float32, that of the logits always. Deterministic. It has no gradients:
        `latent_moe` takes other ways where they are needed.
    Raises:
        RuntimeError: a shape, dtype or option outside the above; the message names argument and values.
    Source: LatentMoE (arXiv:2601.18089); the three products in one launch after TokenSpeed's Kimi K3 layer.

    >>> logits, z, shared = latent_moe_front(*(torch.randn(n, 16) for n in (3, 8, 4, 24)))
    >>> logits.shape, z.shape, shared.shape
    (torch.Size([3, 8]), torch.Size([3, 4]), torch.Size([3, 24]))
    """
    return torch.ops.n3.latent_moe_front.default(x, router_weight, fc1, shared_up, activation=activation)


def latent_moe_tail(
    y: Tensor, fc2: Tensor | None, shared: Tensor, shared_down: Tensor, residual: Tensor | None = None
) -> Tensor:
    r"""Returns ``y @ fc2^T + shared @ shared_down^T + residual``, one sum, rounded once.

    Args:
        y: ``[T, l]``, float32, float16, bfloat16 (or float64, by the reference alone): the experts' sum; ``[T, d]``
            without ``fc2``.
        fc2: ``[d, l]``, dtype of ``y``: the projection from the latent width; None: ``y`` itself is added.
        shared: ``[T, I_s]``, dtype of ``y``: the shared expert's inner values.
        shared_down: ``[d, I_s]``, dtype of ``y``.
        residual: ``[T, d]``, dtype of ``y``; or None.
    Returns:
        ``[T, d]``, dtype of ``y``, contiguous. Products and sums are float32, the three terms in that order. The
        relative L2 error against the float64 definition is at most 3e-3 in 16 bits and 1e-5 in float32.
        Deterministic. It has no gradients: `latent_moe` takes other ways where they are needed.
    Raises:
        RuntimeError: a shape or dtype outside the above; the message names argument and values.
    Source: LatentMoE (arXiv:2601.18089).

    >>> latent_moe_tail(torch.ones(3, 4), torch.ones(16, 4), torch.ones(3, 24), torch.ones(16, 24))[0, 0].item()
    28.0
    """
    return torch.ops.n3.latent_moe_tail.default(y, fc2, shared, shared_down, residual)


def _check_front(x, router_weight, fc1, shared_up, *, activation="relu2"):
    check = Check("latent_moe_front")
    check.floating("x", x)
    check.dim("x", x, 2)
    check.choice("activation", activation, reference.ACTIVATIONS)
    width = x.shape[1]
    check.floating("router_weight", router_weight)
    check.dim("router_weight", router_weight, 2)
    check.shape("router_weight", router_weight, (router_weight.shape[0], width))
    for name, w in (("fc1", fc1), ("shared_up", shared_up)):
        if w is not None:
            check.same_dtype(name, w, "x", x)
            check.dim(name, w, 2)
            check.shape(name, w, (w.shape[0], width))
    if activation != "relu2":
        rows = shared_up.shape[0]
        check.that(rows % 2 == 0, f"shared_up must have an even number of rows for {activation}", rows)
    check.same_device("x", x, router_weight=router_weight, fc1=fc1, shared_up=shared_up)


def _fake_front(x, router_weight, fc1, shared_up, *, activation="relu2"):
    tokens, inner = x.shape[0], shared_up.shape[0] // (1 if activation == "relu2" else 2)
    logits = x.new_empty((tokens, router_weight.shape[0]), dtype=torch.promote_types(x.dtype, torch.float32))
    return logits, x.new_empty((tokens, 0 if fc1 is None else fc1.shape[0])), x.new_empty((tokens, inner))


def _check_tail(y, fc2, shared, shared_down, residual=None):
    check = Check("latent_moe_tail")
    check.floating("y", y)
    check.dim("y", y, 2)
    tokens, latent = y.shape
    check.same_dtype("shared_down", shared_down, "y", y)
    check.dim("shared_down", shared_down, 2)
    width, inner = shared_down.shape
    if fc2 is None:
        check.shape("y", y, (tokens, width))
    else:
        check.same_dtype("fc2", fc2, "y", y)
        check.shape("fc2", fc2, (width, latent))
    check.same_dtype("shared", shared, "y", y)
    check.shape("shared", shared, (tokens, inner))
    if residual is not None:
        check.same_dtype("residual", residual, "y", y)
        check.shape("residual", residual, (tokens, width))
    check.same_device("y", y, fc2=fc2, shared=shared, shared_down=shared_down, residual=residual)


def _fake_tail(y, fc2, shared, shared_down, residual=None):
    return y.new_empty((y.shape[0], shared_down.shape[0]))


_ON_CPU = "torch's products serve the layer on the CPU; this operator is there to save a GPU launches"
_dispatch.register(
    "latent_moe_front",
    check=_check_front,
    fake=_fake_front,
    reference=reference_layer.latent_moe_front,
    triton="n3kernels.triton_ops.moe.layer:latent_moe_front",
    supports={"triton": not_float64, "cuda": latent_front},
    missing={"cpu": _ON_CPU},
)
_dispatch.register(
    "latent_moe_tail",
    check=_check_tail,
    fake=_fake_tail,
    reference=reference_layer.latent_moe_tail,
    triton="n3kernels.triton_ops.moe.layer:latent_moe_tail",
    supports={"triton": not_float64, "cuda": latent_tail},
    missing={"cpu": _ON_CPU},
)
