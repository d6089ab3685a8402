from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import _dispatch
from .._checks import Check
from . import reference, reference_layer
from .experts import check_expert_weights, unpack

if TYPE_CHECKING:
    from ..nvfp4 import NVFP4Tensor

__all__ = ["latent_moe"]


def latent_moe(
    x: Tensor,
    router_weight: Tensor,
    router_bias: Tensor | None,
    w_up: Tensor | NVFP4Tensor,
    w_down: Tensor | NVFP4Tensor,
    shared_up: Tensor | NVFP4Tensor,
    shared_down: Tensor | NVFP4Tensor,
    fc1: Tensor | None = None,
    fc2: Tensor | None = None,
    latent_norm: Tensor | None = None,
    *,
    top_k: int,
    n_group: int = 1,
    topk_group: int = 1,
    normalize: bool = True,
    scale: float = 1.0,
    activation: str = "relu2",
    norm_eps: float = 1e-5,
) -> Tensor:
    r"""Returns ``fc2(norm(experts(fc1(x), route(x)))) + shared_down(act(shared_up(x)))``: one LatentMoE layer.

    Router and shared expert work on the full width d, the routed experts in the latent width l. Without ``fc1`` and
    ``fc2`` it is a mixture of experts on d (Nemotron 3 Nano), l = d.

    Args:
        x: ``[..., d]``, float32, float16, bfloat16 (or float64, by the reference alone).
        router_weight: ``[E, d]``, floating point; the logits are computed in float32.
        router_bias: ``[E]``, floating point, for the choice of experts only; or None.
        w_up, w_down: the routed experts, ``[E, I, l]`` and ``[E, l, I]``; see `experts`.
        shared_up, shared_down: the shared expert, ``[I_s, d]`` (gated: ``[2 I_s, d]``) and ``[d, I_s]``, dtype of
            ``x`` or `NVFP4Tensor`, each by itself.
        fc1, fc2: the latent projections ``[l, d]`` and ``[d, l]``, dtype of ``x``; both or neither.
        latent_norm: ``[l]``, dtype of ``x``: weight of an RMSNorm of the experts' sum before ``fc2`` (Kimi K3); None:
            no norm. With it ``fc2`` of a sum over ranks is not the sum of ``fc2`` over the ranks.
        top_k, n_group, topk_group, normalize, scale: see `route`; the score is sigmoid.
        activation: ``"relu2"``, ``"silu"`` or ``"gelu"``, of routed and shared experts alike; see `experts`.
        norm_eps: added to the mean square by ``latent_norm``.
    Returns:
        ``[..., d]``, dtype of ``x``, contiguous. A composite: it is `route`, `experts`, ``n3::gated_rms_norm``,
        ``n3::nvfp4_linear``, and `latent_moe_front` and `latent_moe_tail` where a kernel serves them and no gradients
        are asked for, else ``torch.nn.functional.linear``; with their tolerances. The values between them are rounded
        to the dtype of ``x``; autocast is not looked at. Differentiable through all dense weights.
    Raises:
        RuntimeError: a shape, dtype or option outside the above; the message names argument and values.
    Source: LatentMoE (arXiv:2601.18089); Nemotron 3 ``NemotronHMoE``.

    >>> x, gate = torch.randn(2, 3, 16), torch.randn(8, 16)
    >>> w_up, w_down, fc1, fc2 = (torch.randn(s) for s in ((8, 32, 4), (8, 4, 32), (4, 16), (16, 4)))
    >>> shared_up, shared_down = torch.randn(24, 16), torch.randn(16, 24)
    >>> latent_moe(x, gate, None, w_up, w_down, shared_up, shared_down, fc1, fc2, top_k=2).shape
    torch.Size([2, 3, 16])
    """
    w_up, up_scale, up_global = unpack(w_up)
    w_down, down_scale, down_global = unpack(w_down)
    shared_up, shared_up_scale, shared_up_global = unpack(shared_up)
    shared_down, shared_down_scale, shared_down_global = unpack(shared_down)
    return torch.ops.n3.latent_moe.default(
        x, router_weight, router_bias, w_up, w_down, shared_up, shared_down, fc1, fc2, latent_norm,
        up_scale, up_global, down_scale, down_global,
        shared_up_scale, shared_up_global, shared_down_scale, shared_down_global,
        top_k=top_k, n_group=n_group, topk_group=topk_group, normalize=normalize, scale=scale, activation=activation,
        norm_eps=norm_eps,
    )  # fmt: skip


def _check(
    x, router_weight, router_bias, w_up, w_down, shared_up, shared_down, fc1=None, fc2=None, latent_norm=None,
    up_scale=None, up_global=None, down_scale=None, down_global=None, shared_up_scale=None, shared_up_global=None,
    shared_down_scale=None, shared_down_global=None, *, top_k, n_group=1, topk_group=1, normalize=True, scale=1.0,
    activation="relu2", norm_eps=1e-5,
):  # fmt: skip
    check = Check("latent_moe")
    check.floating("x", x)
    check.that(x.dim() >= 2, "x must have at least 2 dimensions", x.dim())
    width = x.shape[-1]
    check.choice("activation", activation, reference.ACTIVATIONS)
    check.floating("router_weight", router_weight)
    check.dim("router_weight", router_weight, 2)
    check.shape("router_weight", router_weight, (router_weight.shape[0], width))
    if router_bias is not None:
        check.floating("router_bias", router_bias)
        check.shape("router_bias", router_bias, router_weight.shape[:1])
    latent = _check_latent(check, x, fc1, fc2, latent_norm)
    scales = (up_scale, up_global, down_scale, down_global)
    source = "the last dimension of x" if fc1 is None else "the number of rows of fc1"
    check_expert_weights(check, latent, source, x, w_up, w_down, activation, scales)
    experts = router_weight.shape[0]
    check.that(w_up.shape[0] == experts, f"w_up must have the {experts} experts of router_weight", w_up.shape[0])
    check.dim("shared_up", shared_up, 2)
    check.dim("shared_down", shared_down, 2)
    inner = shared_down.shape[1] * (1 if shared_down_scale is None else 2)
    rows = inner * (1 if activation == "relu2" else 2)
    _check_shared(check, "shared_up", x, shared_up, shared_up_scale, shared_up_global, rows, width)
    _check_shared(check, "shared_down", x, shared_down, shared_down_scale, shared_down_global, width, inner)
    check.same_device(
        "x", x, router_weight=router_weight, router_bias=router_bias, w_up=w_up, w_down=w_down, shared_up=shared_up,
        shared_down=shared_down, fc1=fc1, fc2=fc2, latent_norm=latent_norm, up_scale=up_scale, up_global=up_global,
        down_scale=down_scale, down_global=down_global, shared_up_scale=shared_up_scale,
        shared_up_global=shared_up_global, shared_down_scale=shared_down_scale, shared_down_global=shared_down_global,
    )  # fmt: skip


def _check_latent(check, x, fc1, fc2, latent_norm):
    """Checks the latent projections and norm; returns the width in which the routed experts work."""
    given = (fc1 is not None) + (fc2 is not None)
    check.that(given in (0, 2), "fc1 and fc2 must be given together or not at all", f"{given} of 2")
    width = x.shape[-1]
    if not given:
        check.that(latent_norm is None, "latent_norm must be None without fc1 and fc2")
        return width
    check.dim("fc1", fc1, 2)
    latent = fc1.shape[0]
    for name, w, shape in (("fc1", fc1, (latent, width)), ("fc2", fc2, (width, latent))):
        check.same_dtype(name, w, "x", x)
        check.shape(name, w, shape)
    if latent_norm is not None:
        check.same_dtype("latent_norm", latent_norm, "x", x)
        check.shape("latent_norm", latent_norm, (latent,))
    return latent


def _check_shared(check, name, x, w, block_scale, global_scale, n, k):
    given = (block_scale is not None) + (global_scale is not None)
    check.that(given in (0, 2), f"{name}_scale and {name}_global must be given together or not at all", f"{given} of 2")
    if not given:
        check.same_dtype(name, w, "x", x)
        check.shape(name, w, (n, k))
        return
    check.that(k > 0 and k % 16 == 0, f"{name} must have a last dimension that is a positive multiple of 8", w.shape[1])
    check.dtype(name, w, torch.uint8)
    check.shape(name, w, (n, k // 2))
    check.dtype(f"{name}_scale", block_scale, torch.float8_e4m3fn)
    check.shape(f"{name}_scale", block_scale, (n, k // 16))
    check.dtype(f"{name}_global", global_scale, torch.float32)
    check.that(global_scale.numel() == 1, f"{name}_global must have 1 element", global_scale.numel())


_dispatch.register("latent_moe", check=_check, reference=reference_layer.latent_moe)
