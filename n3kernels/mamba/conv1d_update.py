from __future__ import annotations

import torch
from torch import Tensor

from .. import _dispatch
from .._checks import Check
from . import reference
from ._sequences import check_indices
from .conv1d import check_taps

__all__ = ["causal_conv1d_update"]


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    state_indices: Tensor | None = None,
    dst_state_indices: Tensor | None = None,
    *,
    activation: str | None = None,
) -> Tensor:
    r"""Returns ``y_t = act(bias + sum_k weight[:, k] * x_{t-W+1+k})`` for the next tokens of B running sequences.

    The convolution of `causal_conv1d` for decoding: the inputs before the first token come from ``conv_state``.

    Args:
        x: ``[B, C]``, one token each, or ``[B, T, C]``; float32, float16 or bfloat16, any strides.
        conv_state: ``[slots, C, W - 1]``, dtype of ``x``, any strides: raw inputs, oldest first; written in place.
        weight: ``[C, W]``, floating point.
        bias: ``[C]``, floating point, or None.
        state_indices: ``[B]``, int32 or int64: the slot each sequence reads. Negative: a padding sequence, whose output
            is zero and which touches no slot. None: sequence b has slot b.
        dst_state_indices: where states are written, int32 or int64. None: the state after the last token replaces the
            one that was read. ``[B]``: it goes to this slot. ``[B, T]``: the state after token t goes to slot
            ``[b, t]``, for drafts that may be rejected. Negative: not written.
        activation: None or ``"silu"``.
    Returns:
        ``y``, shape and dtype of ``x``, contiguous. Accuracy as for `causal_conv1d`; states are the raw inputs bit for
        bit. Every state is read before any is written; slots written must be distinct. T tokens at once give the bits
        of T calls, and a sequence's bits do not depend on the others. Nothing is written when the call raises.
    Raises:
        RuntimeError: a shape, dtype or value outside the above; the message names argument and values. The values of
            indices are checked on the CPU only.
    Source: as for `causal_conv1d`.

    >>> conv_state = torch.zeros(2, 8, 3)
    >>> x = torch.randn(2, 8)
    >>> causal_conv1d_update(x, conv_state, torch.randn(8, 4)).shape, bool((conv_state[:, :, 2] == x).all())
    (torch.Size([2, 8]), True)
    """
    return torch.ops.n3.causal_conv1d_update.default(
        x, conv_state, weight, bias, state_indices, dst_state_indices, activation=activation
    )


def _check(x, conv_state, weight, bias=None, state_indices=None, dst_state_indices=None, *, activation=None):
    check = Check("causal_conv1d_update")
    check.dim("x", x, 2, 3)
    channels, past = check_taps(check, x, weight, bias, activation)
    check.dim("conv_state", conv_state, 3)
    slots, tokens = conv_state.shape[0], 1 if x.dim() == 2 else x.shape[1]
    check.shape("conv_state", conv_state, (slots, channels, past))
    check.same_dtype("conv_state", conv_state, "x", x)
    check_indices(check, x, tokens, "conv_state", slots, state_indices, dst_state_indices)
    check.same_device("x", x, conv_state=conv_state, weight=weight, bias=bias)
    check.same_device("x", x, state_indices=state_indices, dst_state_indices=dst_state_indices)


def _fake(x, *args, **kwargs):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


_LATER = "arrives with the mamba family"
_dispatch.register(
    "causal_conv1d_update",
    check=_check,
    fake=_fake,
    reference=reference.causal_conv1d_update,
    missing={"cpu": _LATER, "triton": _LATER, "cuda": _LATER},
)
