from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._checks import Check

__all__ = ["Upcycled", "upcycle"]


class Upcycled(NamedTuple):
    """What `upcycle` returns: the parameters of a mixture of experts, and the scale of its routing weights."""

    w_up: Tensor  # [E, I / shards, K]
    w_down: Tensor  # [E, K, I / shards]
    router_weight: Tensor  # [E, K], float32
    scale: float


def upcycle(
    w_up: Tensor,
    w_down: Tensor,
    num_experts: int = 8,
    *,
    shards: int = 1,
    std: float = 0.02,
    generator: torch.Generator | None = None,
) -> Upcycled:
    r"""Makes a mixture of experts of a dense MLP ``y = w_down act(w_up x)`` that at first computes the very same.

    Every expert is a copy of the MLP, or one of ``shards`` slices of a copy's inner dimension; the shards of a copy
    have one router row, so that they are chosen together. With ``top_k`` a multiple of ``shards``, weights normalised
    to a sum of 1 and multiplied by ``scale``, the outputs of the chosen experts add up to y whatever the router says.

    Args:
        w_up: ``[I, K]``, and w_down: ``[K, I]``: any floating dtype. A gated MLP keeps its gate above its up-projection
            in ``w_up`` ``[2 I, K]``; the shards take slices of both.
        num_experts: E, a multiple of ``shards``.
        shards: slices of each copy, a divisor of I: finer experts at the same cost.
        std: of the router's normal weights, on the device of ``w_up``.
        generator: of those weights.
    Returns:
        `Upcycled`, for `route` (``top_k = shards * copies``, ``scale``, logits of ``x @ router_weight.T``) and
        `experts`. Copies, not views: they are meant to be trained apart.
    Raises:
        RuntimeError: shapes that do not fit; the message names argument and values.
    Source: sparse upcycling (arXiv:2212.05055); fine-grained upcycling with virtual groups (arXiv:2410.07524).

    >>> w_up, w_down = torch.randn(32, 16), torch.randn(16, 32)
    >>> parts = upcycle(w_up, w_down, 8, shards=2)
    >>> parts.w_up.shape, parts.w_down.shape, parts.scale
    (torch.Size([8, 16, 16]), torch.Size([8, 16, 16]), 2.0)
    """
    check = Check("upcycle")
    check.dim("w_up", w_up, 2)
    check.dim("w_down", w_down, 2)
    k, inner = w_down.shape
    check.that(
        w_up.shape[1] == k and w_up.shape[0] in (inner, 2 * inner),
        f"w_up must have shape [{inner}, {k}] or, gated, [{2 * inner}, {k}]", list(w_up.shape),
    )  # fmt: skip
    check.that(shards >= 1 and inner % shards == 0, f"shards must divide the inner dimension {inner}", shards)
    check.that(
        num_experts >= shards and num_experts % shards == 0,
        f"num_experts must be a positive multiple of shards ({shards})", num_experts,
    )  # fmt: skip
    copies, width = num_experts // shards, inner // shards
    halves = w_up.shape[0] // inner
    ups = w_up.view(halves, shards, width, k).transpose(0, 1).reshape(shards, halves * width, k)
    downs = w_down.view(k, shards, width).transpose(0, 1)
    rows = torch.randn(copies, k, generator=generator, device=w_up.device) * std
    return Upcycled(
        ups.repeat(copies, 1, 1), downs.repeat(copies, 1, 1), rows.repeat_interleave(shards, 0), float(shards)
    )
