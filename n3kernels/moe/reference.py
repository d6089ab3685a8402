"""The definition of routing, sorting and grouped products in plain PyTorch: obvious first, and quick enough to train
small models on.

Everything is computed in float32, or in float64 where the inputs are float64, and rounded once at the end.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._checks import Check
from ..nvfp4.reference import decode

__all__ = ["ACTIVATIONS", "activate", "grouped_linear", "moe_experts", "moe_route", "moe_route_bwd", "moe_sort"]

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
        total = weights[:, :1]
        for j in range(1, ids.shape[1]):  # the order of the sum is part of the definition
            total = total + weights[:, j : j + 1]
        weights = weights / (total + 1e-20)
    return weights * scale


def moe_route_bwd(
    grad_weights: Tensor, logits: Tensor, ids: Tensor, *, score: str = "sigmoid", normalize: bool = True,
    scale: float = 1.0,
) -> Tensor:  # fmt: skip
    experts = logits.shape[1]
    bad = (ids < 0) | (ids >= experts)
    if ids.device.type == "cpu" and bad.any():  # elsewhere the host must not wait for the values
        Check("moe_route_bwd").fail(f"ids must be between 0 and {experts - 1}, got {ids[bad][0].item()}")
    ids, scores = ids.long(), route_scores(logits, score)
    scores = torch.where(scores.isnan(), 0, scores)
    grad, chosen = grad_weights * scale, scores.gather(1, ids)
    if normalize:
        total = chosen.sum(1, keepdim=True) + 1e-20
        grad = (grad - (grad * chosen).sum(1, keepdim=True) / total) / total
    grad = torch.zeros_like(scores).scatter(1, ids, grad)
    if score == "sigmoid":
        grad = grad * scores * (1 - scores)
    else:
        grad = scores * (grad - (grad * scores).sum(1, keepdim=True))
    return grad.to(logits.dtype)


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
    out_dtype: torch.dtype | None = None,
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
            outputs.append(linear(activate(linear(rows, up), activation), down))
    slots = torch.cat(outputs)[order.argsort()].unflatten(0, (tokens, k))

    local = ids.long() - first_expert  # 64 bits: first_expert + num_experts may be 2^31
    local = (local >= 0) & (local < num_experts)
    gains = weights.to(wide).masked_fill(~local, 0)
    y = torch.zeros(x.shape, dtype=wide, device=x.device)
    for j in range(k):  # the order of the sum is part of the definition
        y = y + gains[:, j, None] * slots[:, j]
    return y.to(out_dtype or x.dtype)


def valid_ids(ids: Tensor, valid_tokens: Tensor | None) -> Tensor:
    """``ids`` with -1 in the rows from ``valid_tokens`` on: their slots are skipped."""
    if valid_tokens is None:
        return ids
    return torch.where(torch.arange(ids.shape[0], device=ids.device)[:, None] < valid_tokens, ids, -1)


def _dense(w: Tensor, block_scale: Tensor | None, global_scale: Tensor | None, e: int, dtype: torch.dtype) -> Tensor:
    return w.to(dtype) if block_scale is None else decode(w, block_scale[e], dtype) * global_scale[e].to(dtype)


# ---------------------------------------------------------------- one grouped product


def grouped_linear(
    x: Tensor,
    w: Tensor,
    offsets: Tensor,
    gather: Tensor | None = None,
    row_scale: Tensor | None = None,
    block_scale: Tensor | None = None,
    global_scale: Tensor | None = None,
    *,
    activation: str | None = None,
) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    check_groups("grouped_linear", x, offsets, gather)
    rows = len(x) if gather is None else len(gather)
    if gather is None:
        inputs, skipped = x.to(wide), torch.zeros(rows, 1, dtype=torch.bool, device=x.device)
    else:
        skipped = gather[:, None] < 0
        inputs = x.to(wide)[gather.clamp(min=0)] if len(x) else x.new_zeros(rows, x.shape[1], dtype=wide)
        inputs = inputs.masked_fill(skipped, 0)
    halves = 1 if activation in (None, "relu2") else 2

    edges = [0, *offsets.tolist(), rows]  # the first and the last piece are the rows in no group
    outputs = []
    for g, piece in enumerate(inputs.split([b - a for a, b in zip(edges, edges[1:], strict=False)]), -1):
        if 0 <= g < len(w) and len(piece):
            h = linear(piece, _dense(w[g], block_scale, global_scale, g, wide))
            outputs.append(h if activation is None else activate(h, activation))
        else:
            outputs.append(piece.new_zeros(len(piece), w.shape[1] // halves))
    y = torch.cat(outputs)
    if row_scale is not None:
        row = torch.arange(rows, device=x.device)[:, None]
        idle = skipped | (row < offsets[0]) | (row >= offsets[-1])
        y = y * row_scale.to(wide)[:, None].masked_fill(idle, 0)
    return y.masked_fill(skipped, 0).to(x.dtype)


def check_groups(op: str, x: Tensor, offsets: Tensor, gather: Tensor | None) -> None:
    """What only the values tell. Elsewhere than on the CPU the host must not wait for them."""
    if offsets.device.type != "cpu":
        return
    check = Check(op)
    check.offsets(offsets, len(x) if gather is None else len(gather))
    if gather is not None and (far := gather >= len(x)).any():
        check.fail(f"gather must be below the {len(x)} rows of x, got {gather[far][0].item()}")


def linear(x: Tensor, w: Tensor) -> Tensor:
    """``x w^T`` in the dtype they have."""
    with torch.autocast(x.device.type, enabled=False):  # it would multiply in 16 bits
        return F.linear(x, w)
