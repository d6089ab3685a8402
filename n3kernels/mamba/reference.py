"""The definition of the mamba operators on prompts in plain PyTorch: slow, and obvious on purpose.

Those on running sequences are in reference_decode.py, the whole mixer in reference_mixer.py.

Everything is computed in float32, or in float64 where the inputs are float64, and rounded once at the end.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ._slots import check_ends, check_prefill, load

__all__ = [
    "causal_conv1d",
    "causal_conv1d_slots",
    "gated_rms_norm",
    "skip_and_gate",
    "ssd_scan",
    "ssd_scan_slots",
    "time_step",
    "token_count",
    "wide_dtype",
    "zero_padding",
]


# ---------------------------------------------------------------- causal convolution


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    activation: str | None = None,
) -> tuple[Tensor, Tensor]:
    channels, width = weight.shape
    if cu_seqlens is not None:

        def one(s: int, tokens: slice) -> tuple[Tensor, Tensor]:
            before = None if initial_state is None else initial_state[s : s + 1]
            return causal_conv1d(x[None, tokens], weight, bias, before, activation=activation)

        return _each_sequence("causal_conv1d", one, x, cu_seqlens, x.new_zeros(0, channels, width - 1))

    batch, length, _ = x.shape
    before = x.new_zeros(batch, channels, width - 1) if initial_state is None else initial_state
    raw = torch.cat([before.transpose(1, 2), x], dim=1)  # [batch, width - 1 + length, channels]
    wide = wide_dtype(x)
    taps, inputs = weight.to(wide), raw.to(wide)
    y = sum(inputs[:, k : k + length] * taps[:, k] for k in range(width))
    if bias is not None:
        y = y + bias.to(wide)
    if activation == "silu":
        y = F.silu(y)
    final_state = raw[:, length:].transpose(1, 2)
    return y.to(x.dtype).contiguous(), final_state.clone(memory_format=torch.contiguous_format)


def causal_conv1d_slots(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    conv_state: Tensor,
    state_indices: Tensor,
    has_initial: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    checkpoint_tokens: Tensor | None = None,
    checkpoint_indices: Tensor | None = None,
    *,
    activation: str | None = None,
) -> Tensor:
    past, length = weight.shape[1] - 1, conv_state.shape[2]
    where = (state_indices, cu_seqlens, checkpoint_tokens, checkpoint_indices)
    check_prefill("causal_conv1d", "x", token_count(x, 3), conv_state, *where)
    before = load(conv_state, state_indices, has_initial)  # [S, C, length]: the last inputs are the past
    y, _ = causal_conv1d(x, weight, bias, before[..., length - past :], cu_seqlens, activation=activation)
    after = []
    for s, span, slot in _finals(state_indices, cu_seqlens) + _checkpoints(x, *where):
        raw = torch.cat([before[s], x[span].transpose(0, 1)], 1)
        after.append((slot, raw[:, raw.shape[1] - length :]))
    _write(conv_state, after)
    return zero_padding(y, state_indices, cu_seqlens)


# ---------------------------------------------------------------- state space duality


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    chunk_size: int = 128,
    dt_softplus: bool = True,
    dt_min: float = 0.0,
    dt_max: float | None = None,
) -> tuple[Tensor, Tensor]:
    wide = wide_dtype(x)
    state_shape = (*x.shape[-2:], B.shape[-1])  # heads, head_dim, d_state
    if cu_seqlens is not None:
        options = {"chunk_size": chunk_size, "dt_softplus": dt_softplus, "dt_min": dt_min, "dt_max": dt_max}

        def one(s: int, tokens: slice) -> tuple[Tensor, Tensor]:
            gate = None if z is None else z[None, tokens]
            before = None if initial_states is None else initial_states[s : s + 1]
            args = (x[None, tokens], dt[None, tokens], A, B[None, tokens], C[None, tokens], D, gate, dt_bias, before)
            return ssd_scan(*args, **options)

        return _each_sequence("ssd_scan", one, x, cu_seqlens, x.new_zeros(0, *state_shape, dtype=wide))

    if initial_states is None:
        state = x.new_zeros(len(x), *state_shape, dtype=wide)
    else:
        state = initial_states.to(wide, copy=True)
    step = time_step(dt.to(wide), dt_bias, dt_softplus, dt_min, dt_max)
    with torch.autocast(x.device.type, enabled=False):  # it would multiply in 16 bits
        y, state = _chunked_scan(x.to(wide), step, A.to(wide), B.to(wide), C.to(wide), state, chunk_size)
    return skip_and_gate(y, x, D, z).to(x.dtype).contiguous(), state.contiguous()


def _chunked_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """y_t = S_t C_t with S_t = exp(A dt_t) S_{t-1} + dt_t x_t B_t^T, chunk by chunk, and the last S.

    Inside a chunk the recurrence is a product with a lower triangular matrix; between chunks only S passes. Dimensions:
    b batch, c chunk, i and j token of the chunk, g group, r head of the group, p head_dim, n d_state.
    """
    batch, length, heads, _ = x.shape
    if length == 0:
        return x.clone(), state
    per_group = (B.shape[2], heads // B.shape[2])
    size = min(chunk_size, length)

    def chunks(t: Tensor) -> Tensor:  # [b, length, ...] -> [b, c, i, ...]; a missing token has dt = 0: it does nothing
        t = F.pad(t, [0, 0] * (t.dim() - 2) + [0, -length % size])
        return t.unflatten(1, (-1, size))

    u = chunks(x * dt[..., None]).unflatten(3, per_group)
    B, C = chunks(B), chunks(C)
    # The log decays are summed in float64: their differences keep their digits behind a large dt.
    cum = chunks(dt * A).double().cumsum(2).movedim(2, 3).unflatten(2, per_group)  # [b, c, g, r, i]
    from_start, to_end, whole = cum.exp(), (cum[..., -1:] - cum).exp(), cum[..., -1].exp()
    # Masked before the exponential, whose argument above the diagonal may overflow.
    future = torch.ones(size, size, dtype=torch.bool, device=x.device).triu(1)
    decay = (cum[..., :, None] - cum[..., None, :]).to(x.dtype).masked_fill(future, float("-inf")).exp()
    from_start, to_end, whole = (t.to(x.dtype) for t in (from_start, to_end, whole))

    scores = torch.einsum("bcign,bcjgn->bcgij", C, B)[:, :, :, None] * decay
    inside = torch.einsum("bcgrij,bcjgrp->bcigrp", scores, u)
    added = torch.einsum("bcjgrp,bcjgn->bcgrpn", u * to_end.movedim(-1, 2)[..., None], B)
    entering = []
    state = state.unflatten(1, per_group)
    for c in range(added.shape[1]):
        entering.append(state)
        state = whole[:, c, ..., None, None] * state + added[:, c]
    carried = torch.einsum("bcign,bcgrpn->bcigrp", C, torch.stack(entering, 1))
    y = inside + carried * from_start.movedim(-1, 2)[..., None]
    return y.flatten(3, 4).flatten(1, 2)[:, :length], state.flatten(1, 2)


def ssd_scan_slots(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    state: Tensor,
    state_indices: Tensor,
    has_initial: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    checkpoint_tokens: Tensor | None = None,
    checkpoint_indices: Tensor | None = None,
    *,
    chunk_size: int = 128,
    dt_softplus: bool = True,
    dt_min: float = 0.0,
    dt_max: float | None = None,
) -> Tensor:
    options = {"chunk_size": chunk_size, "dt_softplus": dt_softplus, "dt_min": dt_min, "dt_max": dt_max}
    where = (state_indices, cu_seqlens, checkpoint_tokens, checkpoint_indices)
    check_prefill("ssd_scan", "x", token_count(x, 4), state, *where)
    before = load(state, state_indices, has_initial)
    y, final = ssd_scan(x, dt, A, B, C, D, z, dt_bias, before, cu_seqlens, **options)
    after = list(zip(state_indices.tolist(), final, strict=True))
    for s, span, slot in _checkpoints(x, *where):  # what the sequence would leave behind if it ended here
        prefix = [t[span][None] for t in (x, dt, B, C)]
        _, row = ssd_scan(prefix[0], prefix[1], A, *prefix[2:], None, None, dt_bias, before[s : s + 1], **options)
        after.append((slot, row[0]))
    _write(state, after)
    return zero_padding(y, state_indices, cu_seqlens)


def time_step(dt: Tensor, bias: Tensor | None, softplus: bool, dt_min: float, dt_max: float | None) -> Tensor:
    if bias is not None:
        dt = dt + bias.to(dt.dtype)
    if softplus:
        dt = F.softplus(dt, threshold=20.0)  # log1p(exp(dt)), and dt itself above 20
    return dt.clamp(dt_min, dt_max)


def skip_and_gate(y: Tensor, x: Tensor, D: Tensor | None, z: Tensor | None) -> Tensor:
    if D is not None:
        y = y + x.to(y.dtype) * (D[:, None] if D.dim() == 1 else D).to(y.dtype)
    return y if z is None else y * F.silu(z.to(y.dtype))


# ---------------------------------------------------------------- gated norm


def gated_rms_norm(
    x: Tensor, z: Tensor | None, weight: Tensor, group_size: int, eps: float = 1e-5, norm_before_gate: bool = False
) -> Tensor:
    wide = wide_dtype(x)
    h = x.to(wide)
    gate = None if z is None else F.silu(z.to(wide))
    if gate is not None and not norm_before_gate:
        h = h * gate
    groups = h.unflatten(-1, (-1, group_size))
    h = (groups * torch.rsqrt(groups.square().mean(-1, keepdim=True) + eps)).flatten(-2) * weight.to(wide)
    if gate is not None and norm_before_gate:
        h = h * gate
    return h.to(x.dtype)


# ---------------------------------------------------------------- packed sequences and slots


def wide_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _each_sequence(
    op: str, one: Callable[[int, slice], tuple[Tensor, Tensor]], x: Tensor, cu_seqlens: Tensor, no_states: Tensor
) -> tuple[Tensor, Tensor]:
    """Runs ``one(sequence, its tokens)`` on each packed sequence. Tokens behind the last one are padding: zeros."""
    check_ends(op, "x", len(x), cu_seqlens)
    ends = cu_seqlens.tolist()
    parts = [one(s, slice(*ends[s : s + 2])) for s in range(len(ends) - 1)]
    y = torch.cat([*(y[0] for y, _ in parts), torch.zeros_like(x[ends[-1] :])])
    return y.contiguous(), torch.cat([no_states, *(state for _, state in parts)])


# A sequence, how to index its tokens, and the slot that the state after the last of them goes to.
_Writes = list[tuple[int, tuple, int]]


def _finals(indices: Tensor, cu_seqlens: Tensor | None) -> _Writes:
    slots = indices.tolist()
    if cu_seqlens is None:
        return [(s, (s,), slot) for s, slot in enumerate(slots)]
    ends = cu_seqlens.tolist()
    return [(s, (slice(*ends[s : s + 2]),), slot) for s, slot in enumerate(slots)]


def _checkpoints(
    x: Tensor, indices: Tensor, cu_seqlens: Tensor | None, tokens: Tensor | None, slots: Tensor | None
) -> _Writes:
    """The checkpoints that are written: none in a padding sequence, and none behind the last sequence."""
    found = []
    for token, slot in [] if tokens is None else zip(tokens.tolist(), slots.tolist(), strict=True):
        if cu_seqlens is None:
            s, t = divmod(token, x.shape[1])
            span = (s, slice(0, t + 1))
        else:
            s = int((cu_seqlens <= token).sum()) - 1
            span = (slice(int(cu_seqlens[s]), token + 1),)
        if s < len(indices) and indices[s] >= 0:
            found.append((s, span, slot))
    return found


def token_count(x: Tensor, dim: int) -> int:
    """Tokens of all sequences; ``dim`` dimensions are batched."""
    return x.shape[0] * x.shape[1] if x.dim() == dim else x.shape[0]


def _write(state: Tensor, rows: list[tuple[int, Tensor]]) -> None:
    for slot, row in rows:
        if slot >= 0:
            state[slot] = row


def zero_padding(y: Tensor, indices: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """Zeros in padding sequences and, in packed tokens, behind the last sequence."""
    padding = indices < 0
    if cu_seqlens is not None:
        padding = padding.repeat_interleave(cu_seqlens.diff())
        y[len(padding) :] = 0
    y[: len(padding)][padding] = 0
    return y
