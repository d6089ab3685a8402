from __future__ import annotations

import torch
from torch import Tensor

from .. import _dispatch
from .._checks import Check
from . import reference_decode
from ._sequences import check_indices
from ._supports import not_float64
from .conv1d import check_conv_state, check_taps

__all__ = ["causal_conv1d_update_slots"]


def causal_conv1d_update_slots(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    state_indices: Tensor | None = None,
    dst_state_indices: Tensor | None = None,
    *,
    num_accepted: Tensor | None = None,
    num_tokens: Tensor | None = None,
    parents: Tensor | None = None,
    cache_seqlens: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    r"""Returns ``y_t = act(bias + sum_k weight[:, k] * x_{t-W+1+k})`` for the next tokens of B running sequences.

    The convolution of `causal_conv1d` for decoding: the inputs before the first token come from ``conv_state``, which
    is used in one of three ways.

    * *Shift*: a slot holds the last K inputs, oldest first, and is replaced by those after the last token. The default,
      also with ``num_accepted`` and ``state_indices`` ``[B, n]``.
    * *Draft window*: with ``num_accepted`` and one slot per sequence. A slot holds the W - 2 inputs before the previous
      call's first token, then that call's T tokens; ``num_accepted`` of these are kept, which rolls back without
      copying. K = W - 2 + T. A prefill leaves the last K inputs: the first call passes ``num_accepted`` = T.
    * *Ring*: with ``cache_seqlens``. Input number p of a sequence is in column p mod K, and rolling back is passing a
      smaller ``cache_seqlens``.

    Args:
        x: ``[B, C]``, one token each, or ``[B, T, C]``; float32, float16 or bfloat16, any strides.
        conv_state: ``[slots, C, K]``, K >= W - 1, dtype of ``x``, any strides: raw inputs; written in place.
        weight: ``[C, W]``, floating point.
        bias: ``[C]``, floating point, or None.
        state_indices: ``[B]``, int32 or int64: the slot each sequence reads. Negative: a padding sequence, whose output
            is zero and which touches no slot. None: sequence b has slot b. ``[B, n]``, with ``num_accepted`` alone:
            sequence b reads slot ``[b, num_accepted[b] - 1]``.
        dst_state_indices: where states are written, int32 or int64. None: the state after the last token replaces the
            one that was read. ``[B]``: it goes to this slot. ``[B, T]``: the state after token t goes to slot
            ``[b, t]``, for drafts that may be rejected. Negative: not written. A ring takes none, a window ``[B]``.
        num_accepted: ``[B]``, int32: how many of the previous call's tokens are kept, 1 to n or, in a window, 1 to T.
        num_tokens: ``[B]``, int32, 0 to T: tokens behind these are padding, their output is zero and no state has them;
            in a window their columns stay as they are. None: T.
        parents: ``[B, T]``, int32: a tree of drafts. Token t continues from token ``parents[b, t]`` < t, or from the
            state that was read where that is -1. Needs ``dst_state_indices`` ``[B, T]``. None: a chain.
        cache_seqlens: ``[B]``, int32: the inputs that each sequence has seen; makes ``conv_state`` a ring.
        activation: None or ``"silu"``.
    Returns:
        ``y``, shape and dtype of ``x``, contiguous. Accuracy as for `causal_conv1d`; states are the raw inputs bit for
        bit. Every state is read before any is written; slots written must be distinct. T tokens at once give the bits
        of T calls, and a sequence's bits do not depend on the others. Nothing is written when the call raises.
    Raises:
        RuntimeError: a shape, dtype or value outside the above; the message names argument and values. The values of
            indices and counts are checked on the CPU only.
    Source: as for `causal_conv1d`; the window as in vLLM, the ring as ``cache_seqlens`` of causal-conv1d.

    >>> conv_state = torch.zeros(2, 8, 3)
    >>> x = torch.randn(2, 8)
    >>> causal_conv1d_update_slots(x, conv_state, torch.randn(8, 4)).shape, bool((conv_state[:, :, 2] == x).all())
    (torch.Size([2, 8]), True)
    """
    return torch.ops.n3.causal_conv1d_update.default(
        x, conv_state, weight, bias, state_indices, dst_state_indices, num_accepted=num_accepted,
        num_tokens=num_tokens, parents=parents, cache_seqlens=cache_seqlens, activation=activation,
    )  # fmt: skip


def _check(
    x, conv_state, weight, bias=None, state_indices=None, dst_state_indices=None,
    *, num_accepted=None, num_tokens=None, parents=None, cache_seqlens=None, activation=None,
):  # fmt: skip
    check = Check("causal_conv1d_update")
    check.dim("x", x, 2, 3)
    channels, past = check_taps(check, x, weight, bias, activation)
    check_conv_state(check, conv_state, channels, past, x)
    slots, batch, tokens = conv_state.shape[0], x.shape[0], 1 if x.dim() == 2 else x.shape[1]
    where = (state_indices, dst_state_indices, num_accepted, num_tokens, parents)
    check_indices(check, batch, tokens, "conv_state", slots, *where)
    if cache_seqlens is not None:
        check.shape("cache_seqlens", cache_seqlens, (batch,))
        check.dtype("cache_seqlens", cache_seqlens, torch.int32)
        check.that(dst_state_indices is None, "dst_state_indices must be None with cache_seqlens")
        check.that(num_accepted is None, "num_accepted must be None with cache_seqlens")
        check.that(parents is None, "parents must be None with cache_seqlens")
    if num_accepted is not None and (state_indices is None or state_indices.dim() == 1):
        _check_window(check, conv_state.shape[2], past - 1 + tokens, dst_state_indices)
    check.same_device("x", x, conv_state=conv_state, weight=weight, bias=bias)
    check.same_device("x", x, state_indices=state_indices, dst_state_indices=dst_state_indices)
    check.same_device("x", x, num_accepted=num_accepted, num_tokens=num_tokens, parents=parents)
    check.same_device("x", x, cache_seqlens=cache_seqlens)


def _check_window(check: Check, length: int, want: int, destination: Tensor | None) -> None:
    check.that(length == want, f"conv_state must hold W - 2 + T = {want} inputs with num_accepted", length)
    if destination is not None:
        dims = destination.dim()
        check.that(dims == 1, "dst_state_indices must have 1 dimensions with num_accepted", dims)


def _fake(x, *args, **kwargs):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


_dispatch.register(
    "causal_conv1d_update",
    check=_check,
    fake=_fake,
    reference=reference_decode.causal_conv1d_update,
    supports={"cpu": not_float64, "triton": not_float64, "cuda": not_float64},
    triton="n3kernels.triton_ops.mamba.conv1d_update:causal_conv1d_update",
)
