from __future__ import annotations

import torch
from torch import Tensor

from .. import _dispatch
from .._checks import FLOATING, Check, dtype_name
from . import reference_decode
from ._sequences import check_accepted_slots, check_indices
from ._supports import not_float64
from .rounding import SCALED
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
    num_accepted: Tensor | None = None,
    num_tokens: Tensor | None = None,
    parents: Tensor | None = None,
    state_scale: Tensor | None = None,
    seed: Tensor | None = None,
    rounding: str = "nearest",
    dt_softplus: bool = True,
    dt_min: float = 0.0,
    dt_max: float | None = None,
) -> Tensor:
    r"""Returns ``y_t = S_t C_t + D x_t`` with ``S_t = exp(A dt_t) S_{t-1} + dt_t x_t B_t^T`` for B running sequences.

    The recurrence of `ssd_scan` for decoding and for scoring drafts: one token, or T, from the states in slots.

    Args:
        state: ``[slots, H, P, N]``, float32, float16 or bfloat16, or int8 or float8_e4m3fn with ``state_scale``; any
            strides; written in place.
        x: ``[B, H, P]``, one token each, or ``[B, T, H, P]``; float32, float16 or bfloat16. Any strides, as below.
        dt: ``[B, H]`` or ``[B, T, H]``, floating point.
        A: ``[H]``, floating point, negative.
        B, C: ``[B, G, N]`` or ``[B, T, G, N]``, dtype of ``x``; G divides H.
        D: ``[H]`` or ``[H, P]``, floating point, or None.
        z: gate, shape and dtype of ``x``, or None: y is multiplied by ``silu(z)``.
        dt_bias: ``[H]``, floating point, or None.
        state_indices: ``[B]``, int32 or int64: the slot each sequence reads. Negative: a padding sequence, whose output
            is zero and which touches no slot. None: sequence b has slot b. ``[B, n]``, with ``num_accepted``: sequence
            b reads slot ``[b, num_accepted[b] - 1]``.
        dst_state_indices: where states are written, int32 or int64. None: the state after the last token replaces the
            one that was read. ``[B]``: it goes to this slot. ``[B, T]``: the state after token t goes to slot
            ``[b, t]``, for drafts that may be rejected. Negative: not written.
        num_accepted: ``[B]``, int32, 1 to n: how many of the previous call's tokens, whose states are in the slots
            ``state_indices`` ``[B, n]``, are kept.
        num_tokens: ``[B]``, int32, 0 to T: tokens behind these are padding, their output is zero and no state has them.
            A sequence without tokens ends in the state that was read. None: T.
        parents: ``[B, T]``, int32: a tree of drafts. Token t continues from token ``parents[b, t]`` < t, or from the
            state that was read where that is -1. Needs ``dst_state_indices`` ``[B, T]``. None: a chain.
        state_scale: ``[slots, H, P]``, float32, for 8-bit states: the value of a code is ``code * scale``; written in
            place, as amax / 127 or amax / 448 of the row.
        seed: ``[2]``, int64 (key, offset), for stochastic rounding. Calls with the same seed draw the same numbers:
            move the offset on by T.
        rounding: ``"nearest"``, ties to even, or ``"stochastic"``: of the two neighbours of a value, the farther from
            zero with the probability of its distance from the nearer. A float32 state is not rounded.
        dt_softplus, dt_min, dt_max: ``dt = clamp(softplus(dt + dt_bias), dt_min, dt_max)``, as for `ssd_scan`.
    Returns:
        ``y``, shape and dtype of ``x``, contiguous. Computed in float32: within half a unit in the last place of the
        fp64 recurrence plus 1e-5 of the sum of the terms' magnitudes. A state is carried in float32 from token to token
        and rounded only when written (rounding.py says how, bit for bit); a float32 state after T tokens has the bits
        of T calls. Every state is read before any is written; slots written must be distinct. A sequence's bits do not
        depend on the others. Nothing is written when the call raises.
    Raises:
        RuntimeError: a shape, dtype or value outside the above; the message names argument and values. The values of
            indices and counts are checked on the CPU only.
    Source: Mamba-2 (arXiv:2405.21060) sec. 6; per-token states, 8-bit states and stochastic rounding as in the
        speculative decoding of serving engines and the released recipes of Nemotron 3.

    >>> state = torch.zeros(2, 4, 8, 16)
    >>> x, dt, A = torch.randn(2, 4, 8), torch.randn(2, 4), -torch.rand(4)
    >>> B, C = torch.randn(2, 2, 2, 16)
    >>> ssm_update(state, x, dt, A, B, C).shape
    torch.Size([2, 4, 8])
    """
    return torch.ops.n3.ssm_update.default(
        state, x, dt, A, B, C, D, z, dt_bias, state_indices, dst_state_indices, num_accepted=num_accepted,
        num_tokens=num_tokens, parents=parents, state_scale=state_scale, seed=seed, rounding=rounding,
        dt_softplus=dt_softplus, dt_min=dt_min, dt_max=dt_max,
    )  # fmt: skip


def check_state_dtype(check: Check, name: str, state: Tensor) -> None:
    if state.dtype != torch.float64:  # which the reference alone serves
        check.dtype(name, state, *FLOATING, *SCALED)


def check_rounding(check: Check, state: Tensor, scale: Tensor | None, seed: Tensor | None, rounding: str) -> None:
    """Checks how a state ``[slots, H, P, N]`` is stored: the scale of 8-bit ones, rounding and its seed."""
    dtype = dtype_name(state.dtype)
    if state.dtype in SCALED:
        check.that(scale is not None, f"state_scale must be given with a state of {dtype}", "None")
        check.shape("state_scale", scale, state.shape[:3])
        check.dtype("state_scale", scale, torch.float32)
    else:
        check.that(scale is None, f"state_scale must be None with a state of {dtype}")
    check.choice("rounding", rounding, ("nearest", "stochastic"))
    if rounding == "stochastic":
        check.that(seed is not None, "seed must be given for rounding=stochastic", "None")
    if seed is not None:
        check.dtype("seed", seed, torch.int64)
        check.shape("seed", seed, (2,))


def _check(
    state, x, dt, A, B, C, D=None, z=None, dt_bias=None, state_indices=None, dst_state_indices=None,
    *, num_accepted=None, num_tokens=None, parents=None, state_scale=None, seed=None, rounding="nearest",
    dt_softplus=True, dt_min=0.0, dt_max=None,
):  # fmt: skip
    check = Check("ssm_update")
    check.dim("x", x, 3, 4)
    check_operands(check, x, dt, A, B, C, D, z, dt_bias, dt_min, dt_max)
    check.dim("state", state, 4)
    slots, batch, tokens = state.shape[0], x.shape[0], 1 if x.dim() == 3 else x.shape[1]
    check.shape("state", state, (slots, *x.shape[-2:], B.shape[-1]))
    check_state_dtype(check, "state", state)
    where = (state_indices, dst_state_indices, num_accepted, num_tokens, parents)
    check_indices(check, batch, tokens, "state", slots, *where)
    check_accepted_slots(check, state_indices, num_accepted)
    check_rounding(check, state, state_scale, seed, rounding)
    check.same_device("x", x, state=state, state_indices=state_indices, dst_state_indices=dst_state_indices)
    check.same_device("x", x, num_accepted=num_accepted, num_tokens=num_tokens, parents=parents)
    check.same_device("x", x, state_scale=state_scale, seed=seed)


def _fake(state, x, *args, **kwargs):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _cuda_takes(state, *args, **kwargs):
    if state.dim() == 4 and state.shape[3] > 1024:
        return f"takes at most 1024 values per row of state, got {state.shape[3]}"
    return not_float64(state, *args, **kwargs)


_dispatch.register(
    "ssm_update",
    check=_check,
    fake=_fake,
    reference=reference_decode.ssm_update,
    supports={"cpu": not_float64, "triton": not_float64, "cuda": _cuda_takes},
    triton="n3kernels.triton_ops.mamba.ssm_update:ssm_update",
)
