"""Gradients of moe_experts by recomputing the pre-activations: only x, weights and ids are kept.

Per slot, h = W_up x, g = W_down^T dy and what the activation makes of them, in one kernel; rows of dx per slot and
their sum over j, ascending; gradients of the weights with an expert's slots as terms, ascending in fixed blocks.

Workspace, in bytes: T k (4 I + 4 l) for bfloat16 (gated 6 I), T k (8 I + 4 l) otherwise (gated 12 I). Configurations
follow the mean number of slots per expert, as forward's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..common import guard
from .grouped_grads import grads_config, row_grads, weight_grads
from .grouped_linear import GATED, product, product_config
from .grouped_plan import mixed, tiles_of, weight_of
from .ordered_sums import sum_pieces, sum_slots
from .sort import moe_sort

__all__ = ["moe_experts_bwd"]


def moe_experts_bwd(
    grad_y: Tensor,
    x: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    ids: Tensor,
    weights: Tensor,
    activation: str,
    first_expert: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_y, x, ids, weights = (t.contiguous() for t in (grad_y, x, ids, weights))
    dx, dw_up, dw_down, dweights = (
        torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, w_up, w_down, weights)
    )
    if x.numel() == 0:
        return dx, dw_up.zero_(), dw_down.zero_(), dweights.zero_()
    k, num_experts = ids.shape[1], w_up.shape[0]
    rows, inner = ids.numel(), w_up.shape[1] // (2 if activation in GATED else 1)
    tf32 = x.dtype == torch.float16
    wide = torch.float32 if tf32 else x.dtype

    with guard(x):
        order, offsets, _, _ = moe_sort(ids, num_experts, first_expert)
        config = grads_config(x, rows, num_experts)
        tiles = tiles_of(offsets, rows, config.block_m, outside=False)
        act, dh = x.new_empty((rows, inner), dtype=wide), x.new_empty((rows, w_up.shape[1]), dtype=wide)
        dots = row_grads(
            x, weight_of(w_up), grad_y, tiles, config, dh, back=weight_of(w_down.mT), gather=order, divisor=k,
            scale=weights, slots=True, act=act, want_dots=True, activation=activation,
        )  # fmt: skip
        sum_pieces(dots, dweights.view(-1), ids.view(-1), first_expert, num_experts)
        weight_grads(grad_y, act, offsets, rows, order, "a", k, dw_down)
        del act
        weight_grads(dh, x, offsets, rows, order, "b", k, dw_up)

        config = product_config(x, False, rows, num_experts)
        if tiles.block_m != config.block_m:
            tiles = tiles_of(offsets, rows, config.block_m, outside=False)
        slots = x.new_empty((rows, x.shape[1]), dtype=torch.float32)
        back = mixed(config) if tf32 else config
        product(dh, weight_of(w_up.mT), tiles, back, slots, scatter=order, tf32_in=tf32)
        sum_slots(slots, ids, None, dx, first_expert, num_experts)
    return dx, dw_up, dw_down, dweights
