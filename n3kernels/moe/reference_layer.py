"""The definition of the LatentMoE layer, and of the products before and behind its experts, in plain PyTorch."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _dispatch
from .reference import activate, linear

__all__ = ["latent_moe", "latent_moe_front", "latent_moe_tail"]


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
    latent_norm: Tensor | None = None,
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
    norm_eps: float = 1e-5,
) -> Tensor:
    tokens = x.flatten(0, -2)
    wide = torch.promote_types(x.dtype, torch.float32)
    meta = x.device.type == "meta"  # has no autocast
    with nullcontext() if meta else torch.autocast(x.device.type, enabled=False):  # it would route in 16 bits
        logits, z, shared = _front(
            tokens, router_weight, fc1, shared_up, shared_up_scale, shared_up_global, activation
        )
        bias = None if router_bias is None else router_bias.to(wide)
        options = {"n_group": n_group, "topk_group": topk_group, "normalize": normalize, "scale": scale}
        ids, weights, _, _ = torch.ops.n3.moe_route(logits, bias, top_k=top_k, **options)
        scales = up_scale, up_global, down_scale, down_global
        y = torch.ops.n3.moe_experts(z, w_up, w_down, ids, weights, *scales, activation=activation)
        if latent_norm is not None:
            y = torch.ops.n3.gated_rms_norm(y, None, latent_norm, y.shape[1], norm_eps)
        return _tail(y, fc2, shared, shared_down, shared_down_scale, shared_down_global).view(x.shape)


def _front(tokens, router_weight, fc1, shared_up, block_scale, global_scale, activation):
    """Logits, the experts' inputs and the shared expert's inner values: by one kernel where there is one."""
    args = tokens, router_weight, fc1, shared_up
    if block_scale is None and _one_kernel("latent_moe_front", *args, activation=activation):
        logits, z, shared = torch.ops.n3.latent_moe_front(*args, activation=activation)
        return logits, tokens if fc1 is None else z, shared
    wide = torch.promote_types(tokens.dtype, torch.float32)
    logits = F.linear(tokens.to(wide), router_weight.to(wide))
    z = tokens if fc1 is None else F.linear(tokens, fc1)
    if block_scale is not None and activation == "relu2":  # one operator: product and activation
        h = torch.ops.n3.nvfp4_linear(tokens, shared_up, block_scale, global_scale, activation="relu2")
    else:
        h = activate(_linear(tokens, shared_up, block_scale, global_scale), activation)
    return logits, z, h


def _tail(y, fc2, shared, shared_down, block_scale, global_scale):
    if block_scale is None and _one_kernel("latent_moe_tail", y, fc2, shared, shared_down):
        return torch.ops.n3.latent_moe_tail(y, fc2, shared, shared_down)
    routed = y if fc2 is None else F.linear(y, fc2)
    return routed + _linear(shared, shared_down, block_scale, global_scale)


def _one_kernel(op: str, *args: Tensor | None, **options: str) -> bool:
    """Whether a kernel computes these products together; none has gradients."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in args):
        return False
    known = args[0].device.type in _dispatch._arch  # not "meta", and not a fake GPU where there is none
    return known and _dispatch.serving(op, *args, **options) not in (None, "reference")


def _linear(x: Tensor, w: Tensor, block_scale: Tensor | None, global_scale: Tensor | None) -> Tensor:
    if block_scale is None:
        return F.linear(x, w)
    return torch.ops.n3.nvfp4_linear(x, w, block_scale, global_scale)


def latent_moe_front(
    x: Tensor, router_weight: Tensor, fc1: Tensor | None, shared_up: Tensor, *, activation: str = "relu2"
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    rows = x.to(wide)
    z = x.new_empty(len(x), 0) if fc1 is None else linear(rows, fc1.to(wide)).to(x.dtype)
    shared = activate(linear(rows, shared_up.to(wide)), activation).to(x.dtype)
    return linear(rows, router_weight.to(wide)), z, shared


def latent_moe_tail(
    y: Tensor, fc2: Tensor | None, shared: Tensor, shared_down: Tensor, residual: Tensor | None = None
) -> Tensor:
    wide = torch.promote_types(y.dtype, torch.float32)
    out = y.to(wide) if fc2 is None else linear(y.to(wide), fc2.to(wide))
    out = out + linear(shared.to(wide), shared_down.to(wide))
    if residual is not None:
        out = out + residual.to(wide)
    return out.to(y.dtype)
