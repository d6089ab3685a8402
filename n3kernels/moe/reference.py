"""The definition of every moe operator in plain PyTorch: obvious first, and quick enough to train small models on.

Everything is computed in float32, or in float64 where the inputs are float64, and rounded once at the end.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..nvfp4.reference import decode

__all__ = ["ACTIVATIONS", "activate", "latent_moe", "moe_experts", "moe_route", "moe_sort"]

ACTIVATIONS = ("relu2", "silu", "gelu")  # relu2 stands alone; silu and gelu gate: act(first half) * second half


# ---------------------------------------------------------------- routing


def moe_route(
    logits: Tensor,
    bias: Tensor | None = None,
    expert_map: Tensor | None = None,
    *,
    top_k: int,
    n_group: int = 1,
    topk_group: int = 1,
    score: str = "sigmoid",
    normalize: bool = True,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    scores = route_scores(logits, score)
    choice = scores if bias is None else scores + bias.to(scores.dtype)
    order = _best_first(choice)
    if n_group > 1:
        # A stable partition of the ranking: experts of the groups that are kept first, in their order.
        allowed = _kept_groups(choice, n_group, topk_group).repeat_interleave(logits.shape[1] // n_group, 1)
        order = order.gather(1, allowed.gather(1, order).sort(dim=1, descending=True, stable=True).indices)
    ids = order[:, :top_k]
    weights = route_weights(scores, ids, normalize, scale)
    counts = _bounds(ids, logits.shape[1]).diff().int()
    flags = (~logits.isfinite()).any(1).int()
    returned = ids if expert_map is None else expert_map[ids]
    return returned.int().contiguous(), weights.contiguous(), counts, flags


def route_scores(logits: Tensor, score: str) -> Tensor:
    # Float64, rounded once: PyTorch's vectorised float32 functions round the same value differently at the end of a
    # tensor, and equal logits must tie wherever they stand.
    wide = logits.double()
    scores = wide.sigmoid() if score == "sigmoid" else wide.softmax(1)
    return scores.to(torch.promote_types(logits.dtype, torch.float32))


def route_weights(scores: Tensor, ids: Tensor, normalize: bool, scale: float) -> Tensor:
    weights = scores.gather(1, ids.long())
    weights = torch.where(weights.isnan(), 0, weights)
    if normalize:
        weights = weights / (weights.sum(1, keepdim=True) + 1e-20)
    return weights * scale


def _best_first(values: Tensor) -> Tensor:
    """Indices along the last dimension in descending order of value; NaN counts as -inf, ties go to the lower index."""
    return torch.where(values.isnan(), -torch.inf, values).sort(dim=-1, descending=True, stable=True).indices


def _kept_groups(choice: Tensor, n_group: int, topk_group: int) -> Tensor:
    """Bool ``[T, n_group]``: the groups with the largest sum of their two best choices."""
    groups = torch.where(choice.isnan(), -torch.inf, choice).unflatten(1, (n_group, -1))
    group_score = groups.topk(min(2, groups.shape[2]), dim=2).values.sum(2)
    best = _best_first(group_score)[:, :topk_group]
    return torch.zeros_like(group_score, dtype=torch.bool).scatter(1, best, True)


def _bounds(keys: Tensor, size: int) -> Tensor:
    """Where each of the keys 0 .. size begins once they are sorted: ``[size + 1]``."""
    edges = torch.arange(size + 1, dtype=keys.dtype, device=keys.device)
    return torch.searchsorted(keys.flatten().sort().values, edges)


# ---------------------------------------------------------------- sorting


def moe_sort(ids: Tensor, num_experts: int, first_expert: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    local = ids.flatten().long() - first_expert
    keys = torch.where((local >= 0) & (local < num_experts), local, num_experts)  # skipped slots come last
    order = keys.sort(stable=True).indices
    offsets = _bounds(keys, num_experts)
    busy = offsets.diff() > 0
    experts = torch.arange(num_experts, device=ids.device)
    num_active = busy.sum(dim=0, keepdim=True)
    active = torch.where(experts < num_active, busy.sort(descending=True, stable=True).indices, -1)
    return order.int(), offsets.int(), active.int(), num_active.int()


# ---------------------------------------------------------------- experts


def activate(h: Tensor, activation: str) -> Tensor:
    if activation == "relu2":
        return F.relu(h).square()
    gate, up = h.chunk(2, dim=-1)
    return (F.silu(gate) if activation == "silu" else F.gelu(gate)) * up


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
) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    (tokens, k), num_experts = ids.shape, w_up.shape[0]
    ids = valid_ids(ids, valid_tokens)
    order, offsets, _, _ = moe_sort(ids, num_experts, first_expert)
    counts = offsets.diff().tolist()
    counts.append(tokens * k - sum(counts))  # the skipped slots
    ups, downs = w_up.unbind(0), w_down.unbind(0)

    outputs = []
    for e, rows in enumerate(x.to(wide)[order // k].split(counts)):
        if e == num_experts:
            outputs.append(torch.zeros_like(rows))
        elif len(rows):
            up = _dense(ups[e], up_scale, up_global, e, wide)
            down = _dense(downs[e], down_scale, down_global, e, wide)
            outputs.append(F.linear(activate(F.linear(rows, up), activation), down))
    slots = torch.cat(outputs)[order.argsort()].unflatten(0, (tokens, k))

    local = (ids >= first_expert) & (ids < first_expert + num_experts)
    gains = weights.to(wide).masked_fill(~local, 0)
    y = torch.zeros(x.shape, dtype=wide, device=x.device)
    for j in range(k):  # the order of the sum is part of the definition
        y = y + gains[:, j, None] * slots[:, j]
    return y.to(x.dtype)


def valid_ids(ids: Tensor, valid_tokens: Tensor | None) -> Tensor:
    """``ids`` with -1 in the rows from ``valid_tokens`` on: their slots are skipped."""
    if valid_tokens is None:
        return ids
    return torch.where(torch.arange(ids.shape[0], device=ids.device)[:, None] < valid_tokens, ids, -1)


def _dense(w: Tensor, block_scale: Tensor | None, global_scale: Tensor | None, e: int, dtype: torch.dtype) -> Tensor:
    return w.to(dtype) if block_scale is None else decode(w, block_scale[e], dtype) * global_scale[e].to(dtype)


# ---------------------------------------------------------------- the layer


def latent_moe(
    x: Tensor,
    router_weight: Tensor,
    router_bias: Tensor | None,
    w_up: Tensor,
    w_down: Tensor,
    shared_up: Tensor,
    shared_down: Tensor,
    fc1: Tensor | None = None,
    fc2: Tensor | None = None,
    up_scale: Tensor | None = None,
    up_global: Tensor | None = None,
    down_scale: Tensor | None = None,
    down_global: Tensor | None = None,
    shared_up_scale: Tensor | None = None,
    shared_up_global: Tensor | None = None,
    shared_down_scale: Tensor | None = None,
    shared_down_global: Tensor | None = None,
    *,
    top_k: int,
    n_group: int = 1,
    topk_group: int = 1,
    normalize: bool = True,
    scale: float = 1.0,
    activation: str = "relu2",
) -> Tensor:
    tokens = x.flatten(0, -2)
    wide = torch.promote_types(x.dtype, torch.float32)
    ids, weights, _, _ = torch.ops.n3.moe_route(
        F.linear(tokens.to(wide), router_weight.to(wide)),
        None if router_bias is None else router_bias.to(wide),
        top_k=top_k, n_group=n_group, topk_group=topk_group, normalize=normalize, scale=scale,
    )  # fmt: skip
    y = torch.ops.n3.moe_experts(
        tokens if fc1 is None else F.linear(tokens, fc1), w_up, w_down, ids, weights,
        up_scale, up_global, down_scale, down_global, activation=activation,
    )  # fmt: skip
    if fc2 is not None:
        y = F.linear(y, fc2)
    if shared_up_scale is not None and activation == "relu2":  # one operator: product and activation
        h = torch.ops.n3.nvfp4_linear(tokens, shared_up, shared_up_scale, shared_up_global, activation="relu2")
    else:
        h = activate(_linear(tokens, shared_up, shared_up_scale, shared_up_global), activation)
    return (y + _linear(h, shared_down, shared_down_scale, shared_down_global)).view(x.shape)


def _linear(x: Tensor, w: Tensor, block_scale: Tensor | None, global_scale: Tensor | None) -> Tensor:
    if block_scale is None:
        return F.linear(x, w)
    return torch.ops.n3.nvfp4_linear(x, w, block_scale, global_scale)
