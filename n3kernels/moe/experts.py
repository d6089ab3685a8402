from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import _dispatch
from .._autograd import grads_through
from .._checks import Check, dtype_name
from . import reference
from ._supports import decode_experts, not_float64

if TYPE_CHECKING:
    from ..nvfp4 import NVFP4Tensor

__all__ = ["experts", "unpack"]


def experts(
    x: Tensor,
    w_up: Tensor | NVFP4Tensor,
    w_down: Tensor | NVFP4Tensor,
    ids: Tensor,
    weights: Tensor,
    *,
    activation: str = "relu2",
    first_expert: int = 0,
    valid_tokens: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    r"""Returns ``y[t] = sum_j weights[t, j] * W_down[e] act(W_up[e] x[t])`` with ``e = ids[t, j] - first_expert``.

    Args:
        x: ``[T, l]``, float32, float16, bfloat16 (or float64, by the reference alone).
        w_up: ``[E, I, l]``, or ``[E, 2 I, l]`` for a gated activation (gate first), dtype of ``x``; or an
            `NVFP4Tensor` of that shape, one global scale per expert.
        w_down: ``[E, l, I]``, dtype of ``x``; `NVFP4Tensor` where ``w_up`` is one.
        ids: ``[T, k]``, int32. A slot with an expert outside ``first_expert .. first_expert + E - 1``, such as -1, is
            skipped: it is not read and adds exactly 0, whatever its weight. An id may repeat within a row.
        weights: ``[T, k]``, float32 (float64 for float64 ``x``).
        activation: ``"relu2"``: ``relu(h)^2``; gated, on ``h = [g, u]``: ``"silu"``: ``silu(g) * u``, ``"gelu"``:
            ``gelu(g) * u`` with the exact (erf) GELU.
        first_expert: the expert that ``w_up[0]`` holds, for expert parallelism.
        valid_tokens: ``[1]``, int32: rows from this one on are padding, not read, and come out as zeros.
        out_dtype: that of ``x`` (None) or float32, the sum before it is rounded: for sums over ranks.
    Returns:
        ``[T, l]``, ``out_dtype``, contiguous. Products and sums are float32, ``j`` ascending, rounded once; NVFP4
        weights are decoded exactly. A kernel may round ``act(...)`` to the digits, though not to the range, of a
        16-bit ``x``: the relative L2 error against the float64 definition is at most 3e-3 there and 1e-5 in float32. A
        row does not depend on the batch. Differentiable in ``x``, ``weights`` and dense ``w_up``, ``w_down``;
        the gradient of ``y`` is taken in the dtype of ``x``.
    Raises:
        RuntimeError: a shape, dtype or option outside the above, or gradients through NVFP4 weights; the message
            names argument and values.
    Source: Nemotron 3 ``mixer.experts`` (arXiv:2512.20848), LatentMoE (arXiv:2601.18089), where l is the latent width.

    >>> x, w_up, w_down = torch.randn(3, 8), torch.randn(4, 16, 8), torch.randn(4, 8, 16)
    >>> ids = torch.tensor([[0, 3], [1, -1], [2, 0]], dtype=torch.int32)
    >>> experts(x, w_up, w_down, ids, torch.ones(3, 2)).shape
    torch.Size([3, 8])
    """
    w_up, up_scale, up_global = unpack(w_up)
    w_down, down_scale, down_global = unpack(w_down)
    return torch.ops.n3.moe_experts.default(
        x, w_up, w_down, ids, weights, up_scale, up_global, down_scale, down_global, valid_tokens,
        activation=activation, first_expert=first_expert, out_dtype=out_dtype,
    )  # fmt: skip


def unpack(w: Tensor | NVFP4Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``weight, block scale, global scale`` as the operators take them; the scales are None for a dense weight."""
    if isinstance(w, Tensor):
        return w, None, None
    q, block_scale, global_scale, *_ = w.to_layout("linear")
    return q, block_scale, global_scale.expand(q.shape[0]) if q.dim() == 3 else global_scale


def _check(
    x, w_up, w_down, ids, weights, up_scale=None, up_global=None, down_scale=None, down_global=None,
    valid_tokens=None, *, activation="relu2", first_expert=0, out_dtype=None,
):  # fmt: skip
    check = Check("moe_experts")
    check.floating("x", x)
    check.dim("x", x, 2)
    check.choice("activation", activation, reference.ACTIVATIONS)
    scales = (up_scale, up_global, down_scale, down_global)
    check_expert_weights(check, x.shape[1], "the last dimension of x", x, w_up, w_down, activation, scales)
    tokens = x.shape[0]
    check.dtype("ids", ids, torch.int32)
    check.dim("ids", ids, 2)
    check.that(ids.shape[1] >= 1, "ids must have at least 1 column", ids.shape[1])
    check.shape("ids", ids, (tokens, ids.shape[1]))
    check.that(ids.numel() < 2**31, "ids must have fewer than 2147483648 elements", ids.numel())
    check.dtype("weights", weights, torch.promote_types(x.dtype, torch.float32))
    check.shape("weights", weights, ids.shape)
    check.that(first_expert >= 0, "first_expert must be at least 0", first_expert)
    if out_dtype not in (None, x.dtype, torch.float32):
        rule = f"out_dtype must be float32 or the dtype of x ({dtype_name(x.dtype)})"
        check.that(False, rule, dtype_name(out_dtype))
    if valid_tokens is not None:
        check.dtype("valid_tokens", valid_tokens, torch.int32)
        check.shape("valid_tokens", valid_tokens, (1,))
    check.same_device(
        "x", x, w_up=w_up, w_down=w_down, ids=ids, weights=weights, up_scale=up_scale, up_global=up_global,
        down_scale=down_scale, down_global=down_global, valid_tokens=valid_tokens,
    )  # fmt: skip


def check_expert_weights(check, width, source, x, w_up, w_down, activation, scales):
    """Checks the routed experts' weights, dense or NVFP4, on inputs of ``width``, which is ``source``."""
    given = sum(s is not None for s in scales)
    names = "up_scale, up_global, down_scale and down_global"
    check.that(given in (0, 4), f"{names} must be given together or not at all", f"{given} of 4")
    check.dim("w_up", w_up, 3)
    check.dim("w_down", w_down, 3)
    num_experts, halves = w_up.shape[0], 1 if activation == "relu2" else 2
    check.that(num_experts >= 1, "w_up must have at least 1 expert", num_experts)
    if not given:
        inner = w_down.shape[2]
        for name, w, n, k in (("w_up", w_up, halves * inner, width), ("w_down", w_down, width, inner)):
            check.same_dtype(name, w, "x", x)
            check.shape(name, w, (num_experts, n, k))
        return
    inner = 2 * w_down.shape[2]
    check.that(width > 0 and width % 16 == 0, f"{source} must be a positive multiple of 16", width)
    rule = "w_down must have a last dimension that is a positive multiple of 8"
    check.that(inner > 0 and inner % 16 == 0, rule, w_down.shape[2])
    up_scale, up_global, down_scale, down_global = scales
    for name, q, block_scale, global_scale, n, k in (
        ("up", w_up, up_scale, up_global, halves * inner, width),
        ("down", w_down, down_scale, down_global, width, inner),
    ):
        check.dtype(f"w_{name}", q, torch.uint8)
        check.shape(f"w_{name}", q, (num_experts, n, k // 2))
        check.dtype(f"{name}_scale", block_scale, torch.float8_e4m3fn)
        check.shape(f"{name}_scale", block_scale, (num_experts, n, k // 16))
        check.dtype(f"{name}_global", global_scale, torch.float32)
        check.shape(f"{name}_global", global_scale, (num_experts,))


def _check_bwd(grad_y, x, w_up, w_down, ids, weights, activation, first_expert):
    check = Check("moe_experts_bwd")
    check.that(w_up.dtype != torch.uint8, "w_up must be dense, got NVFP4: decode it first to train through it")
    _check(x, w_up, w_down, ids, weights, activation=activation, first_expert=first_expert)
    check.same_dtype("grad_y", grad_y, "x", x)
    check.shape("grad_y", grad_y, x.shape)
    check.same_device("x", x, grad_y=grad_y)


def _fake(x, *args, out_dtype=None, **kwargs):
    return torch.empty_like(x, dtype=out_dtype, memory_format=torch.contiguous_format)


def _reference_bwd(grad_y, x, w_up, w_down, ids, weights, activation, first_expert):
    def forward(x, w_up, w_down, weights):
        options = {"activation": activation, "first_expert": first_expert}
        return reference.moe_experts(x, w_up, w_down, ids, weights, **options)

    with torch.autocast(x.device.type, enabled=False):
        return tuple(g.contiguous() for g in grads_through(forward, (x, w_up, w_down, weights), (grad_y,)))


def _fake_bwd(grad_y, x, w_up, w_down, ids, weights, activation, first_expert):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, w_up, w_down, weights))


def _setup_context(ctx, inputs, keyword_only_inputs, output):
    x, w_up, w_down, ids, weights, *_, valid_tokens = inputs
    ctx.options = keyword_only_inputs["activation"], keyword_only_inputs["first_expert"]
    ctx.save_for_backward(x, w_up, w_down, ids, weights, valid_tokens)


def _backward(ctx, grad_y):
    x, w_up, w_down, ids, weights, valid_tokens = ctx.saved_tensors
    ids = reference.valid_ids(ids, valid_tokens)
    dx, dw_up, dw_down, dweights = torch.ops.n3.moe_experts_bwd.default(
        grad_y.to(x.dtype), x, w_up, w_down, ids, weights, *ctx.options
    )
    return dx, dw_up, dw_down, None, dweights, None, None, None, None, None


_LATER = "not written yet"
_dispatch.register(
    "moe_experts",
    check=_check,
    fake=_fake,
    reference=reference.moe_experts,
    setup_context=_setup_context,
    backward=_backward,
    triton="n3kernels.triton_ops.moe.experts:moe_experts",
    supports={"cpu": not_float64, "triton": not_float64, "cuda": decode_experts},
)
_dispatch.register(
    "moe_experts_bwd",
    check=_check_bwd,
    fake=_fake_bwd,
    reference=_reference_bwd,
    triton="n3kernels.triton_ops.moe.experts_bwd:moe_experts_bwd",
    supports={"cpu": not_float64, "triton": not_float64},
    missing={"cuda": _LATER},
)
