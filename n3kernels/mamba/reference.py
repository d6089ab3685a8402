"""The definition of every mamba operator in plain PyTorch: slow, and obvious on purpose.

Everything is computed in float32, or in float64 where the inputs are float64, and rounded once at the end.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .._checks import Check

__all__ = [
    "causal_conv1d",
    "causal_conv1d_slots",
    "causal_conv1d_update",
    "gated_rms_norm",
    "ssd_scan",
    "ssd_scan_slots",
    "ssm_update",
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
    wide = _wide(x)
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
    *,
    activation: str | None = None,
) -> Tensor:
    before = _load("causal_conv1d", conv_state, state_indices, has_initial)
    y, after = causal_conv1d(x, weight, bias, before, cu_seqlens, activation=activation)
    _store(conv_state, state_indices, after)
    return _zero_padding(y, state_indices, cu_seqlens)


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
    op = "causal_conv1d_update"
    tokens = x[:, None] if x.dim() == 2 else x
    source = _own_slots(x) if state_indices is None else state_indices
    before = _load(op, conv_state, source)
    y, after = causal_conv1d(tokens, weight, bias, before, activation=activation)
    _check_below(op, "dst_state_indices", dst_state_indices, conv_state)
    if dst_state_indices is not None and dst_state_indices.dim() == 2:
        raw = torch.cat([before, tokens.transpose(1, 2)], dim=-1)
        width, steps = weight.shape[1], range(tokens.shape[1])
        _store_each(conv_state, source, dst_state_indices, [raw[..., t + 1 : t + width] for t in steps])
    else:
        _store_last(conv_state, source, dst_state_indices, after)
    return _zero_padding(y, source).view(x.shape)


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
    wide = _wide(x)
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
    step = _time_step(dt.to(wide), dt_bias, dt_softplus, dt_min, dt_max)
    with torch.autocast(x.device.type, enabled=False):  # it would multiply in 16 bits
        y, state = _chunked_scan(x.to(wide), step, A.to(wide), B.to(wide), C.to(wide), state, chunk_size)
    return _skip_and_gate(y, x, D, z).to(x.dtype).contiguous(), state.contiguous()


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
    *,
    chunk_size: int = 128,
    dt_softplus: bool = True,
    dt_min: float = 0.0,
    dt_max: float | None = None,
) -> Tensor:
    options = {"chunk_size": chunk_size, "dt_softplus": dt_softplus, "dt_min": dt_min, "dt_max": dt_max}
    before = _load("ssd_scan", state, state_indices, has_initial)
    y, after = ssd_scan(x, dt, A, B, C, D, z, dt_bias, before, cu_seqlens, **options)
    _store(state, state_indices, after)
    return _zero_padding(y, state_indices, cu_seqlens)


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
    op, wide, heads = "ssm_update", _wide(x), x.shape[-2]
    source = _own_slots(x) if state_indices is None else state_indices
    h = _load(op, state, source).to(wide)
    _check_below(op, "dst_state_indices", dst_state_indices, state)
    # In float64, rounded once: PyTorch's vectorised float32 functions round the last elements of a tensor differently,
    # and T tokens at once must give the bits of T single ones.
    step = _time_step(dt.double(), dt_bias, dt_softplus, dt_min, dt_max).to(wide)
    decay, u = torch.exp((step * A.to(wide)).double()).to(wide), x.to(wide) * step[..., None]
    B, C = (t.to(wide).repeat_interleave(heads // t.shape[-2], dim=-2) for t in (B, C))
    if x.dim() == 3:
        decay, u, B, C = (t[:, None] for t in (decay, u, B, C))
    after, y = [], torch.empty_like(u)
    for t in range(u.shape[1]):
        h = decay[:, t, :, None, None] * h + u[:, t, :, :, None] * B[:, t, :, None, :]
        y[:, t] = (h * C[:, t, :, None, :]).sum(-1)
        after.append(h)
    if dst_state_indices is not None and dst_state_indices.dim() == 2:
        _store_each(state, source, dst_state_indices, after)
    else:
        _store_last(state, source, dst_state_indices, h)
    y = _skip_and_gate(y.view(x.shape), x, D, z).to(x.dtype)
    return _zero_padding(y.contiguous(), source)


def _time_step(dt: Tensor, bias: Tensor | None, softplus: bool, dt_min: float, dt_max: float | None) -> Tensor:
    if bias is not None:
        dt = dt + bias.to(dt.dtype)
    if softplus:
        dt = F.softplus(dt, threshold=20.0)  # log1p(exp(dt)), and dt itself above 20
    return dt.clamp(dt_min, dt_max)


def _skip_and_gate(y: Tensor, x: Tensor, D: Tensor | None, z: Tensor | None) -> Tensor:
    if D is not None:
        y = y + x.to(y.dtype) * (D[:, None] if D.dim() == 1 else D).to(y.dtype)
    return y if z is None else y * F.silu(z.to(y.dtype))


# ---------------------------------------------------------------- gated norm


def gated_rms_norm(
    x: Tensor, z: Tensor | None, weight: Tensor, group_size: int, eps: float = 1e-5, norm_before_gate: bool = False
) -> Tensor:
    wide = _wide(x)
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


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _each_sequence(
    op: str, one: Callable[[int, slice], tuple[Tensor, Tensor]], x: Tensor, cu_seqlens: Tensor, no_states: Tensor
) -> tuple[Tensor, Tensor]:
    """Runs ``one(sequence, its tokens)`` on each packed sequence. Tokens behind the last one are padding: zeros."""
    ends = cu_seqlens.tolist()
    if ends[0] != 0 or ends[-1] > len(x) or any(a > b for a, b in zip(ends, ends[1:], strict=False)):
        Check(op).fail(f"cu_seqlens must rise from 0 to at most the {len(x)} tokens of x, got {ends}")
    parts = [one(s, slice(*ends[s : s + 2])) for s in range(len(ends) - 1)]
    y = torch.cat([*(y[0] for y, _ in parts), torch.zeros_like(x[ends[-1] :])])
    return y.contiguous(), torch.cat([no_states, *(state for _, state in parts)])


def _own_slots(x: Tensor) -> Tensor:
    return torch.arange(len(x), device=x.device)


def _check_below(op: str, name: str, indices: Tensor | None, state: Tensor) -> None:
    if indices is not None and indices.numel() and (largest := int(indices.max())) >= len(state):
        Check(op).fail(f"{name} must be below the number of slots {len(state)}, got {largest}")


def _load(op: str, state: Tensor, indices: Tensor, has_initial: Tensor | None = None) -> Tensor:
    """Copies of the slots; zeros for a padding sequence (negative index) and where there is no initial state."""
    _check_below(op, "state_indices", indices, state)
    read = indices >= 0 if has_initial is None else (indices >= 0) & has_initial
    rows = state.new_zeros(len(indices), *state.shape[1:])
    rows[read] = state[indices[read].long()]
    return rows


def _store(state: Tensor, indices: Tensor, rows: Tensor) -> None:
    written = indices >= 0
    state[indices[written].long()] = rows[written].to(state.dtype)


def _store_last(state: Tensor, source: Tensor, destination: Tensor | None, rows: Tensor) -> None:
    _store(state, source if destination is None else destination.masked_fill(source < 0, -1), rows)


def _store_each(state: Tensor, source: Tensor, destination: Tensor, after: list[Tensor]) -> None:
    for t, rows in enumerate(after):
        _store_last(state, source, destination[:, t], rows)


def _zero_padding(y: Tensor, indices: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    padding = indices < 0
    if cu_seqlens is not None:
        padding = padding.repeat_interleave(cu_seqlens.diff())
    y[: len(padding)][padding] = 0
    return y
