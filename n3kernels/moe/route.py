from __future__ import annotations

import torch
from torch import Tensor

from .. import _dispatch
from .._checks import Check
from . import reference
from ._supports import not_float64

__all__ = ["MAX_EXPERTS", "MAX_TOP_K", "route"]

MAX_EXPERTS = 1024
MAX_TOP_K = 32


def route(
    logits: Tensor,
    bias: Tensor | None = None,
    *,
    top_k: int,
    n_group: int = 1,
    topk_group: int = 1,
    score: str = "sigmoid",
    normalize: bool = True,
    scale: float = 1.0,
    expert_map: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r"""Chooses the ``top_k`` experts with the largest ``score(logits) + bias`` and weighs them by ``score(logits)``.

    ``weights = scale * s / (sum(s) + 1e-20)`` over the chosen scores ``s``; without ``normalize`` ``scale * s``. With
    ``n_group > 1`` only the ``topk_group`` groups of consecutive experts take part whose two best choices have the
    largest sum. Ties go to the lowest expert and the lowest group. A NaN counts as -inf in the choice and as 0 in the
    weights: in a row with a NaN (sigmoid: that expert; softmax: the whole row, as with +inf) the ids are still
    distinct and in range, and a row without any usable score takes experts 0 .. top_k - 1 with weight 0.

    Args:
        logits: ``[T, E]``, float32, float16, bfloat16 (computed in float32) or float64; E up to 1024.
        bias: ``[E]``, float32 (float64 for float64 logits): the correction bias, for the choice only.
        top_k: experts per token, up to 32 and to the experts of ``topk_group`` groups.
        n_group: number of expert groups; divides E.
        topk_group: groups that take part.
        score: ``"sigmoid"``, or ``"softmax"`` over all E experts.
        normalize: divide the chosen scores by their sum.
        scale: the routed scaling factor.
        expert_map: ``[E]``, int32: expert -> what is returned for it in ``ids``: a physical replica, or -1 for an
            expert that is not to be computed. The choice, the weights and ``counts`` do not depend on it.
    Returns:
        ``ids`` ``[T, top_k]`` int32 in descending order of choice; ``weights`` ``[T, top_k]`` float32 (float64 for
        float64 logits), within 1e-5 relative of the definition; ``counts`` ``[E]`` int32, the number of tokens that
        chose each (unmapped) expert; ``flags`` ``[T]`` int32, bit 0 set where a row has a logit that is not finite. A
        row does not depend on the batch. ``weights`` is differentiable in ``logits``.
    Raises:
        RuntimeError: a shape, dtype or option outside the above; the message names argument and values.
    Source: DeepSeek-V3 (arXiv:2412.19437) sec. 2.1.2; Nemotron 3 ``mixer.gate``: sigmoid, one group, normalised.

    >>> ids, weights, _, _ = route(torch.tensor([[0.0, 2.0, 1.0, 2.0]]), top_k=2)
    >>> ids.tolist(), weights.tolist()
    ([[1, 3]], [[0.5, 0.5]])
    """
    return torch.ops.n3.moe_route.default(
        logits, bias, expert_map, top_k=top_k, n_group=n_group, topk_group=topk_group, score=score,
        normalize=normalize, scale=scale,
    )  # fmt: skip


def _check(
    logits, bias=None, expert_map=None, *, top_k, n_group=1, topk_group=1, score="sigmoid", normalize=True, scale=1.0
):
    check = Check("moe_route")
    check.floating("logits", logits)
    check.dim("logits", logits, 2)
    experts = logits.shape[1]
    check.that(1 <= experts <= MAX_EXPERTS, f"logits must have 1 to {MAX_EXPERTS} columns", experts)
    check.choice("score", score, ("sigmoid", "softmax"))
    if bias is not None:
        check.dtype("bias", bias, torch.promote_types(logits.dtype, torch.float32))
        check.shape("bias", bias, (experts,))
    check.that(n_group >= 1 and experts % n_group == 0, f"n_group must divide the {experts} experts", n_group)
    check.that(1 <= topk_group <= n_group, f"topk_group must be between 1 and n_group {n_group}", topk_group)
    most = min(MAX_TOP_K, topk_group * (experts // n_group))
    check.that(1 <= top_k <= most, f"top_k must be between 1 and {most}", top_k)
    if expert_map is not None:
        check.dtype("expert_map", expert_map, torch.int32)
        check.shape("expert_map", expert_map, (experts,))
    check.same_device("logits", logits, bias=bias, expert_map=expert_map)


def _fake(
    logits, bias=None, expert_map=None, *, top_k, n_group=1, topk_group=1, score="sigmoid", normalize=True, scale=1.0
):
    tokens, experts = logits.shape
    wide = torch.promote_types(logits.dtype, torch.float32)
    return (
        logits.new_empty((tokens, top_k), dtype=torch.int32),
        logits.new_empty((tokens, top_k), dtype=wide),
        logits.new_empty((experts,), dtype=torch.int32),
        logits.new_empty((tokens,), dtype=torch.int32),
    )


def _check_bwd(grad_weights, logits, ids, *, score="sigmoid", normalize=True, scale=1.0):
    check = Check("moe_route_bwd")
    check.floating("logits", logits)
    check.dim("logits", logits, 2)
    tokens, experts = logits.shape
    check.that(1 <= experts <= MAX_EXPERTS, f"logits must have 1 to {MAX_EXPERTS} columns", experts)
    check.choice("score", score, ("sigmoid", "softmax"))
    check.dtype("ids", ids, torch.int32)
    check.dim("ids", ids, 2)
    most = min(MAX_TOP_K, experts)
    check.that(1 <= ids.shape[1] <= most, f"ids must have 1 to {most} columns", ids.shape[1])
    check.shape("ids", ids, (tokens, ids.shape[1]))
    check.dtype("grad_weights", grad_weights, torch.promote_types(logits.dtype, torch.float32))
    check.shape("grad_weights", grad_weights, ids.shape)
    check.same_device("logits", logits, grad_weights=grad_weights, ids=ids)


def _fake_bwd(grad_weights, logits, ids, *, score="sigmoid", normalize=True, scale=1.0):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, keyword_only_inputs, output):
    logits, bias, expert_map = inputs
    ctx.options = dict(keyword_only_inputs)
    ctx.save_for_backward(logits, bias, output[0], expert_map)


def _backward(ctx, grad_ids, grad_weights, grad_counts, grad_flags):
    logits, bias, ids, expert_map = ctx.saved_tensors
    if expert_map is not None:  # what was returned are physical experts: choose again
        ids = torch.ops.n3.moe_route.default(logits, bias, **ctx.options)[0]
    options = {name: ctx.options[name] for name in ("score", "normalize", "scale")}
    return torch.ops.n3.moe_route_bwd.default(grad_weights, logits, ids, **options), None, None


_dispatch.register(
    "moe_route",
    check=_check,
    fake=_fake,
    reference=reference.moe_route,
    triton="n3kernels.triton_ops.moe.route:moe_route",
    setup_context=_setup_context,
    backward=_backward,
    supports={"cpu": not_float64, "triton": not_float64, "cuda": not_float64},
)
_dispatch.register(
    "moe_route_bwd",
    check=_check_bwd,
    fake=_fake_bwd,
    reference=reference.moe_route_bwd,
    triton="n3kernels.triton_ops.moe.route:moe_route_bwd",
    supports={"cpu": not_float64, "triton": not_float64, "cuda": not_float64},
)
