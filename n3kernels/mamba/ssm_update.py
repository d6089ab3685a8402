from __future__ import annotations

import torch
from torch import Tensor

from .. import _dispatch
from .._checks import Check
from . import reference
from ._sequences import check_indices
from .ssd_scan import check_operands

__all__ = ["ssm_update"]


def ssm_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    state_indices: Tensor | None = None,
    dst_state_indices: Tensor | None = None,
    *,
    dt_softplus: bool = True,
    dt_min: float = 0.0,
    dt_max: float | None = None,
) -> Tensor:
    r"""Returns ``y_t = S_t C_t + D x_t`` with ``S_t = exp(A dt_t) S_{t-1} + dt_t x_t B_t^T`` for B running sequences.

    The recurrence of `ssd_scan` for decoding and for scoring drafts: one token, or T, from the states in slots.

    Args:
        state: ``[slots, H, P, N]``, float32, float16 or bfloat16, any strides; written in place.
        x: ``[B, H, P]``, one token each, or ``[B, T, H, P]``; float32, float16 or bfloat16. Any strides, as below.
        dt: ``[B, H]`` or ``[B, T, H]``, floating point.
        A: ``[H]``, floating point, negative.
        B, C: ``[B, G, N]`` or ``[B, T, G, N]``, dtype of ``x``; G divides H.
        D: ``[H]`` or ``[H, P]``, floating point, or None.
        z: gate, shape and dtype of ``x``, or None: y is multiplied by ``silu(z)``.
        dt_bias: ``[H]``, floating point, or None.
        state_indices: ``[B]``, int32 or int64: the slot each sequence reads. Negative: a padding sequence, whose output
            is zero and which touches no slot. None: sequence b has slot b.
        dst_state_indices: where states are written, int32 or int64. None: the state after the last token replaces the
            one that was read. ``[B]``: it goes to this slot. ``[B, T]``: the state after token t goes to slot
            ``[b, t]``, for drafts that may be rejected. Negative: not written.
        dt_softplus, dt_min, dt_max: ``dt = clamp(softplus(dt + dt_bias), dt_min, dt_max)``, as for `ssd_scan`.
    Returns:
        ``y``, shape and dtype of ``x``, contiguous. Computed in float32: within half a unit in the last place of the
        fp64 recurrence plus 1e-5 of the sum of the terms' magnitudes. A state is carried in float32 from token to token
        and rounded, to nearest even, only when written; a float32 state after T tokens has the bits of T calls. Every
        state is read before any is written; slots written must be distinct. A sequence's bits do not depend on the
        others. Nothing is written when the call raises.
    Raises:
        RuntimeError: a shape, dtype or value outside the above; the message names argument and values. The values of
            indices are checked on the CPU only.
    Source: Mamba-2 (arXiv:2405.21060) sec. 6; per-token states as in the speculative decoding of serving engines.

    >>> state = torch.zeros(2, 4, 8, 16)
    >>> x, dt, A = torch.randn(2, 4, 8), torch.randn(2, 4), -torch.rand(4)
    >>> B, C = torch.randn(2, 2, 2, 16)
    >>> ssm_update(state, x, dt, A, B, C).shape
    torch.Size([2, 4, 8])
    """
    return torch.ops.n3.ssm_update.default(
        state, x, dt, A, B, C, D, z, dt_bias, state_indices, dst_state_indices,
        dt_softplus=dt_softplus, dt_min=dt_min, dt_max=dt_max,
    )  # fmt: skip


def _check(
    state, x, dt, A, B, C, D=None, z=None, dt_bias=None, state_indices=None, dst_state_indices=None,
    *, dt_softplus=True, dt_min=0.0, dt_max=None,
):  # fmt: skip
    check = Check("ssm_update")
    check.dim("x", x, 3, 4)
    check_operands(check, x, dt, A, B, C, D, z, dt_bias, dt_min, dt_max)
    check.dim("state", state, 4)
    slots, tokens = state.shape[0], 1 if x.dim() == 3 else x.shape[1]
    check.shape("state", state, (slots, *x.shape[-2:], B.shape[-1]))
    check.floating("state", state)
    check_indices(check, x, tokens, "state", slots, state_indices, dst_state_indices)
    check.same_device("x", x, state=state, state_indices=state_indices, dst_state_indices=dst_state_indices)


def _fake(state, x, *args, **kwargs):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


_LATER = "arrives with the mamba family"
_dispatch.register(
    "ssm_update",
    check=_check,
    fake=_fake,
    reference=reference.ssm_update,
    missing={"cpu": _LATER, "triton": _LATER, "cuda": _LATER},
)
