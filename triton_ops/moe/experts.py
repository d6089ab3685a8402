"""moe_experts: y[t] = sum_j weights[t, j] W_down[e] act(W_up[e] x[t]), e = ids[t, j] - first_expert.

Five launches and the sort, whatever the routing, and nothing waits on the host: tiles of the sorted slots; up, which
gathers the tokens and stores act(...) in the order of the experts; down, which stores every slot's row at its place;
the sum over j, ascending, in which a skipped slot adds exactly nothing and is not read.

Workspace, in bytes: T k (2 I + 4 l) for bfloat16, act(...) and a float32 row per slot; T k (4 I + 4 l) for float32, and
for float16, whose act(...) has its precision but float32's range. Beyond `WORKSPACE` the tokens go block by block, all
blocks with one configuration. A token's bits depend on the configuration, which the
mean number of slots per expert chooses: up to 16, 32, 64, more; ``batch_invariant()`` pins that of 64.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ..common import guard
from .grouped_linear import GATED, product, product_config
from .grouped_plan import mixed, tiles_of, weight_of
from .ordered_sums import sum_slots
from .sort import moe_sort

__all__ = ["WORKSPACE", "local_ids", "moe_experts"]

WORKSPACE = 2 << 30  # bytes; 10 000 tokens of Nemotron 3 Super, 440 slots per expert


def local_ids(ids: Tensor, valid_tokens: Tensor | None) -> Tensor:
    """``ids`` with -1 in the rows from ``valid_tokens`` on: their slots are skipped."""
    if valid_tokens is None:
        return ids.contiguous()
    return torch.where(torch.arange(ids.shape[0], device=ids.device)[:, None] < valid_tokens, ids, -1)


def moe_experts(
    x: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    ids: Tensor,
    weights: Tensor,
    up_scale: Tensor | None = None,
    up_global: Tensor | None = None,
    down_scale: Tensor | None = None,
    down_global: Tensor | None = None,
    valid_tokens: Tensor | None = None,
    *,
    activation: str = "relu2",
    first_expert: int = 0,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    x, weights = x.contiguous(), weights.contiguous()
    y = torch.empty_like(x, dtype=out_dtype)
    (tokens, k), num_experts = ids.shape, w_up.shape[0]
    if y.numel() == 0:
        return y
    up, down = weight_of(w_up, up_scale, up_global), weight_of(w_down, down_scale, down_global)
    tf32 = x.dtype == torch.float16
    inner = up.n // (2 if activation in GATED else 1)
    wide = torch.float32 if tf32 else x.dtype

    per_token = k * (inner * wide.itemsize + x.shape[1] * 4)
    blocks = min(triton.cdiv(tokens * per_token, WORKSPACE), tokens)
    block = triton.cdiv(tokens, blocks)
    config = product_config(x, up_scale is not None, block * k, num_experts)
    down_config = mixed(config) if tf32 else config
    act = x.new_empty((block * k, inner), dtype=wide)
    rows = x.new_empty((block * k, x.shape[1]), dtype=torch.float32)
    with guard(x):
        ids = local_ids(ids, valid_tokens)
        for start in range(0, tokens, block):
            part = slice(start, min(start + block, tokens))
            order, offsets, _, _ = moe_sort(ids[part], num_experts, first_expert)
            tiles = tiles_of(offsets, order.numel(), config.block_m, outside=False)
            product(
                x[part], up, tiles, config, act, gather=order, divisor=k, activation=activation, tf32_out=tf32
            )  # fmt: skip
            product(act, down, tiles, down_config, rows, scatter=order, tf32_in=tf32)
            sum_slots(rows, ids[part], weights[part], y[part], first_expert, num_experts)
    return y
