"""The checks of what one rank gives to expert parallelism."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import Check
from ..moe import reference
from ..moe.experts import check_expert_weights, unpack
from ..moe.latent_moe import _check as check_whole_layer

__all__ = ["check_call", "check_layer", "checked_map"]


def check_call(check: Check, z, ids, weights, w_up, w_down, scales, activation, valid_tokens, *, local: int) -> None:
    """Of a call, on a rank that holds so many experts."""
    check.floating("z", z)
    check.dim("z", z, 2)
    check.choice("activation", activation, reference.ACTIVATIONS)
    _check_local(check, local, w_up, w_down)
    stand_ins = [None if t is None else _as_if(max(len(t), 1), t) for t in (w_up, w_down, *scales)]
    source = "the last dimension of z"
    check_expert_weights(check, z.shape[1], source, z, *stand_ins[:2], activation, tuple(stand_ins[2:]))
    check.dtype("ids", ids, torch.int32)
    check.dim("ids", ids, 2)
    check.that(ids.shape[1] >= 1, "ids must have at least 1 column", ids.shape[1])
    check.shape("ids", ids, (z.shape[0], ids.shape[1]))
    check.that(ids.numel() < 2**31, "ids must have fewer than 2147483648 elements", ids.numel())
    check.dtype("weights", weights, torch.promote_types(z.dtype, torch.float32))
    check.shape("weights", weights, ids.shape)
    if valid_tokens is not None:
        check.dtype("valid_tokens", valid_tokens, torch.int32)
        check.shape("valid_tokens", valid_tokens, (1,))
    names = ("up_scale", "up_global", "down_scale", "down_global")
    check.same_device(
        "z", z, w_up=w_up, w_down=w_down, ids=ids, weights=weights, valid_tokens=valid_tokens,
        **dict(zip(names, scales, strict=True)),
    )  # fmt: skip


def check_layer(check: Check, inputs, w_up, w_down, shared, latent, *, experts: int, local: int, **options) -> None:
    """Those of `latent_moe`, to which this rank's experts pose as all of them."""
    w_up, *up = unpack(w_up)
    w_down, *down = unpack(w_down)
    _check_local(check, local, w_up, w_down)
    routed = inputs[1].shape[0]
    check.that(routed == experts, f"router_weight must have the {experts} experts of the plan", routed)
    posing = [None if t is None else _as_if(routed, t) for t in (w_up, w_down, *up, *down)]
    (shared_up, *of_up), (shared_down, *of_down) = shared
    check_whole_layer(*inputs, *posing[:2], shared_up, shared_down, *latent, *posing[2:], *of_up, *of_down, **options)


def checked_map(check: Check, expert_map: Tensor, num_experts: int) -> Tensor:
    """``[E, R]`` on the CPU: the physical experts of each expert, -1 behind the last."""
    check.dtype("expert_map", expert_map, torch.int32)
    check.dim("expert_map", expert_map, 1, 2)
    check.shape("expert_map", expert_map, (num_experts, *expert_map.shape[1:]))
    table = expert_map.detach().cpu().reshape(num_experts, -1)
    used = table >= 0
    check.that(bool(used[:, :1].all()), "expert_map must give every expert a physical one in the first column")
    holes = used[:, 1:] & ~used[:, :-1]
    check.that(not bool(holes.any()), "expert_map must have its -1 behind the physical experts of a row")
    taken = table[used].tolist()
    check.that(len(set(taken)) == len(taken), "expert_map must name a physical expert once at most")
    return table


def _check_local(check: Check, local: int, w_up: Tensor, w_down: Tensor) -> None:
    for name, w in (("w_up", w_up), ("w_down", w_down)):
        check.dim(name, w, 3)
        check.that(w.shape[0] == local, f"{name} must have the {local} experts of this rank", w.shape[0])


def _as_if(experts: int, t: Tensor) -> Tensor:
    """A stack of so many experts in the shape of ``t``, for checks; it takes no memory."""
    one = t.detach()[:1] if len(t) else t.new_empty(1, *t.shape[1:])
    return one.expand(experts, *t.shape[1:])
