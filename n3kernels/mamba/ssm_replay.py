from __future__ import annotations

import torch
from torch import Tensor

from .. import _dispatch
from .._checks import Check
from . import reference_decode
from ._sequences import check_slots
from ._supports import not_float64
from .ssd_scan import check_operands

__all__ = ["ssm_replay_commit", "ssm_replay_flush", "ssm_replay_update"]


def ssm_replay_update(
    state: Tensor,
    ring_x: Tensor,
    ring_B: Tensor,
    ring_dt: Tensor,
    ring_pos: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    state_indices: Tensor | None = None,
    *,
    parents: Tensor | None = None,
    dt_softplus: bool = True,
    dt_min: float = 0.0,
    dt_max: float | None = None,
) -> Tensor:
    r"""Returns ``y_t = S_t C_t + D x_t`` of `ssm_update`, from an older state and a ring of the tokens since.

    No state is written per token. A slot holds a state and R entries ``(x, B, dt)``; the entries ``(start + i) mod R``,
    i < count, are the committed tokens that the state has not seen. The T tokens of this call are written behind them
    and count as drafts until `ssm_replay_commit` keeps some: rolling back moves a pointer. When the ring would be too
    full for another T, count + 2 T > R, this call also folds the committed entries into the state.

    Args:
        state: ``[slots, H, P, N]``, float32, float16 or bfloat16, any strides; written in place.
        ring_x: ``[slots, R, H, P]``, dtype of ``x``, R >= 2 T; written in place, as ring_B and ring_dt. Any strides.
        ring_B: ``[slots, R, G, N]``, dtype of ``x``.
        ring_dt: ``[slots, R, H]``, float32: dt after bias, softplus and clamp.
        ring_pos: ``[slots, 2]``, int32: (start, count) of each slot; zero it when a prefill has written the state. Not
            written here. count + T must not pass R, which a constant T guarantees.
        x, dt, A, B, C, D, z, dt_bias: as for `ssm_update`; ``x`` is ``[B, H, P]`` or ``[B, T, H, P]``.
        state_indices: ``[B]``, int32 or int64: the slot of each sequence, each at most once. Negative: a padding
            sequence, whose output is zero and which touches no slot. None: sequence b has slot b.
        parents: ``[B, T]``, int32: a tree of drafts. Token t continues from token ``parents[b, t]`` < t, or from the
            last committed token where that is -1. None: a chain.
        dt_softplus, dt_min, dt_max: ``dt = clamp(softplus(dt + dt_bias), dt_min, dt_max)``, as for `ssd_scan`.
    Returns:
        ``y``, shape and dtype of ``x``, contiguous. Computed in float32 and rounded once; relative in RMS to the step
        by step computation 1e-5 for float32, 1e-3 plus the rounding of ``y`` for 16-bit rings. A state is rounded, to
        nearest even, when folded. A sequence's bits do not depend on the others. Nothing is written when the call
        raises.
    Raises:
        RuntimeError: a shape, dtype or value outside the above; the message names argument and values. The values of
            indices and parents are checked on the CPU only, those of ``ring_pos`` nowhere.
    Source: ReplaySSM (dao-lab.ai, 2026) and the replay of TensorRT-LLM; Mamba-2 (arXiv:2405.21060) sec. 6.

    >>> state, ring_x, ring_B = torch.zeros(2, 4, 8, 16), torch.zeros(2, 6, 4, 8), torch.zeros(2, 6, 2, 16)
    >>> ring_dt, ring_pos = torch.zeros(2, 6, 4), torch.zeros(2, 2, dtype=torch.int32)
    >>> x, dt, A = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 4), -torch.rand(4)
    >>> B, C = torch.randn(2, 2, 3, 2, 16)
    >>> ssm_replay_update(state, ring_x, ring_B, ring_dt, ring_pos, x, dt, A, B, C).shape
    torch.Size([2, 3, 4, 8])
    """
    return torch.ops.n3.ssm_replay_update.default(
        state, ring_x, ring_B, ring_dt, ring_pos, x, dt, A, B, C, D, z, dt_bias, state_indices,
        parents=parents, dt_softplus=dt_softplus, dt_min=dt_min, dt_max=dt_max,
    )  # fmt: skip


def ssm_replay_commit(
    ring_pos: Tensor,
    ring_x: Tensor,
    ring_B: Tensor,
    ring_dt: Tensor,
    num_accepted: Tensor,
    tokens: int,
    path: Tensor | None = None,
    state_indices: Tensor | None = None,
) -> None:
    r"""Keeps ``num_accepted`` of the last `ssm_replay_update`'s tokens: ``count += num_accepted``, with its folding.

    Where that update folded what was committed into the state, ``start = (start + count) mod R`` and ``count =
    num_accepted`` instead. Call it once after each update, with the same slots.

    Args:
        ring_pos: ``[slots, 2]``, int32: (start, count) of each slot; written in place, as the rings.
        ring_x: ``[slots, R, H, P]``, float32, float16 or bfloat16. The rings change with a ``path`` alone.
        ring_B: ``[slots, R, G, N]``, dtype of ``ring_x``.
        ring_dt: ``[slots, R, H]``, float32.
        num_accepted: ``[B]``, int32, 0 to ``tokens``.
        tokens: T of the update, 1 to R / 2.
        path: ``[B, T]``, int32, after a tree: its first ``num_accepted[b]`` entries are the accepted tokens, rising;
            they are moved to the front. The rest is not read. None: the first tokens are the accepted ones.
        state_indices: ``[B]``, int32 or int64: as in the update; a padding sequence touches no slot.
    Returns:
        None. Entries are moved bit for bit; nothing is written when the call raises.
    Raises:
        RuntimeError: a shape, dtype or value outside the above; the message names argument and values. The values of
            indices and ``num_accepted`` are checked on the CPU only, those of ``path`` nowhere.
    Source: as for `ssm_replay_update`.

    >>> ring_pos, accepted = torch.tensor([[4, 1], [0, 5]], dtype=torch.int32), torch.tensor([2, 1], dtype=torch.int32)
    >>> ring_x, ring_B, ring_dt = torch.zeros(2, 6, 4, 8), torch.zeros(2, 6, 2, 16), torch.zeros(2, 6, 4)
    >>> ssm_replay_commit(ring_pos, ring_x, ring_B, ring_dt, accepted, tokens=2)
    >>> ring_pos.tolist()
    [[4, 3], [5, 1]]
    """
    torch.ops.n3.ssm_replay_commit.default(
        ring_pos, ring_x, ring_B, ring_dt, num_accepted, tokens, path, state_indices
    )  # fmt: skip


def ssm_replay_flush(
    state: Tensor,
    ring_pos: Tensor,
    ring_x: Tensor,
    ring_B: Tensor,
    ring_dt: Tensor,
    A: Tensor,
    state_indices: Tensor | None = None,
) -> None:
    r"""Folds the committed tokens into the state, ``S = exp(A dt_i) S + dt_i x_i B_i^T`` for each, and forgets them.

    For prefix caching, hand-over to another engine, and before T changes to what would not fit the ring.

    Args:
        state: ``[slots, H, P, N]``, float32, float16 or bfloat16, any strides; written in place.
        ring_pos: ``[slots, 2]``, int32; start moves behind the committed tokens and count becomes 0, in place.
        ring_x: ``[slots, R, H, P]``, float32, float16 or bfloat16.
        ring_B: ``[slots, R, G, N]``, dtype of ``ring_x``.
        ring_dt: ``[slots, R, H]``, float32.
        A: ``[H]``, floating point, negative.
        state_indices: ``[B]``, int32 or int64: the slots to flush, each at most once; negative: nothing is touched.
            None: all slots.
    Returns:
        None. Computed in float32; a state is rounded once, to nearest even. An empty ring leaves the state as it is.
    Raises:
        RuntimeError: a shape, dtype or value outside the above; the message names argument and values. The values of
            indices are checked on the CPU only.
    Source: as for `ssm_replay_update`.

    >>> state, ring_pos = torch.zeros(2, 4, 8, 16), torch.tensor([[4, 1], [0, 5]], dtype=torch.int32)
    >>> ring_x, ring_B, ring_dt = torch.randn(2, 6, 4, 8), torch.randn(2, 6, 2, 16), torch.rand(2, 6, 4)
    >>> ssm_replay_flush(state, ring_pos, ring_x, ring_B, ring_dt, -torch.rand(4))
    >>> ring_pos.tolist()
    [[5, 0], [5, 0]]
    """
    torch.ops.n3.ssm_replay_flush.default(state, ring_pos, ring_x, ring_B, ring_dt, A, state_indices)


def _check_rings(check, slots, ring_x, ring_B, ring_dt, ring_pos, heads, head_dim, groups, d_state, like, x) -> None:
    """All rings and their positions; ``like`` names the tensor ``x`` whose dtype and device they have."""
    check.dim("ring_x", ring_x, 4)
    length = ring_x.shape[1]
    check.shape("ring_x", ring_x, (slots, length, heads, head_dim))
    if x is not ring_x:
        check.same_dtype("ring_x", ring_x, like, x)
    check.shape("ring_B", ring_B, (slots, length, groups, d_state))
    check.same_dtype("ring_B", ring_B, like, x)
    check.shape("ring_dt", ring_dt, (slots, length, heads))
    check.dtype("ring_dt", ring_dt, torch.float32, *([torch.float64] if x.dtype == torch.float64 else []))
    check.shape("ring_pos", ring_pos, (slots, 2))
    check.dtype("ring_pos", ring_pos, torch.int32)


def _check_update(
    state, ring_x, ring_B, ring_dt, ring_pos, x, dt, A, B, C, D=None, z=None, dt_bias=None, state_indices=None,
    *, parents=None, dt_softplus=True, dt_min=0.0, dt_max=None,
):  # fmt: skip
    check = Check("ssm_replay_update")
    check.dim("x", x, 3, 4)
    check_operands(check, x, dt, A, B, C, D, z, dt_bias, dt_min, dt_max)
    check.dim("state", state, 4)
    slots, batch, tokens = state.shape[0], x.shape[0], 1 if x.dim() == 3 else x.shape[1]
    check.shape("state", state, (slots, *x.shape[-2:], B.shape[-1]))
    check.floating("state", state)
    _check_rings(check, slots, ring_x, ring_B, ring_dt, ring_pos, *x.shape[-2:], *B.shape[-2:], "x", x)
    length = ring_x.shape[1]
    check.that(length >= 2 * tokens, f"ring_x must hold at least 2 T = {2 * tokens} tokens", length)
    if state_indices is None:
        check.that(slots >= batch, f"state must have at least {batch} slots without state_indices", slots)
    else:
        check_slots(check, state_indices, None, batch)
    if parents is not None:
        check.shape("parents", parents, (batch, tokens))
        check.dtype("parents", parents, torch.int32)
    check.same_device("x", x, state=state, ring_x=ring_x, ring_B=ring_B, ring_dt=ring_dt, ring_pos=ring_pos)
    check.same_device("x", x, state_indices=state_indices, parents=parents)


def _check_commit(ring_pos, ring_x, ring_B, ring_dt, num_accepted, tokens, path=None, state_indices=None):
    check = Check("ssm_replay_commit")
    check.dim("ring_pos", ring_pos, 2)
    check.floating("ring_x", ring_x)
    check.dim("ring_x", ring_x, 4)
    check.dim("ring_B", ring_B, 4)
    slots, (length, heads, head_dim) = ring_pos.shape[0], ring_x.shape[1:]
    rings = (ring_x, ring_B, ring_dt, ring_pos)
    _check_rings(check, slots, *rings, heads, head_dim, *ring_B.shape[2:], "ring_x", ring_x)
    check.dim("num_accepted", num_accepted, 1)
    check.dtype("num_accepted", num_accepted, torch.int32)
    check.that(1 <= tokens <= length // 2, f"tokens must be between 1 and {length // 2}", tokens)
    batch = num_accepted.shape[0]
    if path is not None:
        check.shape("path", path, (batch, tokens))
        check.dtype("path", path, torch.int32)
    if state_indices is None:
        check.that(slots >= batch, f"ring_pos must have at least {batch} slots without state_indices", slots)
    else:
        check_slots(check, state_indices, None, batch)
    check.same_device("ring_pos", ring_pos, ring_x=ring_x, ring_B=ring_B, ring_dt=ring_dt)
    check.same_device("ring_pos", ring_pos, num_accepted=num_accepted, path=path, state_indices=state_indices)


def _check_flush(state, ring_pos, ring_x, ring_B, ring_dt, A, state_indices=None):
    check = Check("ssm_replay_flush")
    check.dim("state", state, 4)
    check.floating("state", state)
    slots, heads, head_dim, d_state = state.shape
    check.floating("ring_x", ring_x)
    check.dim("ring_B", ring_B, 4)
    groups = ring_B.shape[2]
    rings = (ring_x, ring_B, ring_dt, ring_pos)
    _check_rings(check, slots, *rings, heads, head_dim, groups, d_state, "ring_x", ring_x)
    check.that(groups > 0 and heads % groups == 0, f"groups of ring_B must divide the {heads} heads of state", groups)
    check.shape("A", A, (heads,))
    check.floating("A", A)
    if state_indices is not None:
        check.dim("state_indices", state_indices, 1)
        check.dtype("state_indices", state_indices, torch.int32, torch.int64)
    check.same_device("state", state, ring_pos=ring_pos, ring_x=ring_x, ring_B=ring_B, ring_dt=ring_dt, A=A)
    check.same_device("state", state, state_indices=state_indices)


def _fake_update(state, ring_x, ring_B, ring_dt, ring_pos, x, *args, **kwargs):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _fake_nothing(*args, **kwargs):
    return None


def _cuda_takes(state, *args, **kwargs):
    if state.dim() == 4 and state.shape[3] > 1024:
        return f"takes at most 1024 values per row of state, got {state.shape[3]}"
    return not_float64(state, *args, **kwargs)


_dispatch.register(
    "ssm_replay_update",
    check=_check_update,
    fake=_fake_update,
    reference=reference_decode.ssm_replay_update,
    supports={"cpu": not_float64, "triton": not_float64, "cuda": _cuda_takes},
    triton="n3kernels.triton_ops.mamba.ssm_replay:ssm_replay_update",
)
_dispatch.register(
    "ssm_replay_commit",
    check=_check_commit,
    fake=_fake_nothing,
    reference=reference_decode.ssm_replay_commit,
    supports={"cpu": not_float64, "triton": not_float64, "cuda": not_float64},
    triton="n3kernels.triton_ops.mamba.ssm_replay:ssm_replay_commit",
)
_dispatch.register(
    "ssm_replay_flush",
    check=_check_flush,
    fake=_fake_nothing,
    reference=reference_decode.ssm_replay_flush,
    supports={"cpu": not_float64, "triton": not_float64, "cuda": _cuda_takes},
    triton="n3kernels.triton_ops.mamba.ssm_replay:ssm_replay_flush",
)
