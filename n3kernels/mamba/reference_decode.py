"""The definition of the mamba operators on running sequences: T tokens are T steps, from and to states in slots.

Every state is read before any is written. What is computed for a padding token (t >= num_tokens[b]) is thrown away.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import rounding as rounded
from ._slots import (
    check_below,
    check_distinct,
    check_update,
    check_values,
    last_states,
    load,
    masked,
    source_slots,
    store,
)
from .reference import causal_conv1d, skip_and_gate, time_step, wide_dtype

__all__ = [
    "causal_conv1d_update",
    "count_tokens",
    "ssm_replay_commit",
    "ssm_replay_flush",
    "ssm_replay_update",
    "ssm_update",
    "zero_padding",
]


# ---------------------------------------------------------------- causal convolution


def causal_conv1d_update(
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
    op, past, length = "causal_conv1d_update", weight.shape[1] - 1, conv_state.shape[2]
    tokens = x[:, None] if x.dim() == 2 else x
    steps = tokens.shape[1]
    check_update(op, steps, conv_state, state_indices, dst_state_indices, num_accepted, num_tokens, parents)
    check_values(op, "cache_seqlens must be at least 0", cache_seqlens, 0)
    source = source_slots(x, state_indices, num_accepted)
    count = count_tokens(steps, num_tokens, source)
    parents = _parents(parents, count)
    window = num_accepted is not None and (state_indices is None or state_indices.dim() == 1)

    before = load(conv_state, source).to(x.dtype)  # [B, C, length]
    if window:
        before = _columns(before, num_accepted.long() - 1, past)
    elif cache_seqlens is not None:
        before = _columns(before, cache_seqlens.long() - past, past)
    states, y = [before], torch.empty_like(tokens, memory_format=torch.contiguous_format)
    for t in range(steps):
        h = _previous(states, parents, t)
        y[:, t : t + 1], _ = causal_conv1d(
            tokens[:, t : t + 1], weight, bias, h[..., h.shape[2] - past :], activation=activation
        )
        states.append(torch.cat([h, tokens[:, t, :, None]], -1)[..., 1:])

    destination = masked(source, dst_state_indices)
    raw = torch.cat([before, tokens.transpose(1, 2)], -1)
    if window:
        _store_window(conv_state, source, destination, raw[..., 1:], count, length - steps)
    elif cache_seqlens is not None:
        _store_ring(conv_state, source, tokens, cache_seqlens.long(), count)
    elif destination.dim() == 2:
        for t in range(steps):
            store(conv_state, destination[:, t].masked_fill(count <= t, -1), states[t + 1])
    else:
        store(conv_state, destination, last_states(states, count))
    return zero_padding(y, count).view(x.shape)


def _columns(state: Tensor, first: Tensor, count: int) -> Tensor:
    """``count`` columns of ``[B, C, S]`` from ``first[b]`` on, around the end."""
    if count == 0:
        return state[..., :0]
    columns = (first[:, None] + torch.arange(count, device=state.device)) % state.shape[2]
    return state.gather(2, columns[:, None].expand(-1, state.shape[1], -1))


def _store_window(
    state: Tensor, source: Tensor, destination: Tensor, rows: Tensor, count: Tensor, behind: int
) -> None:
    """The ``behind`` inputs before the tokens, then the tokens; columns of padding stay. No tokens: no change."""
    written = torch.arange(rows.shape[2], device=rows.device) < (behind + count)[:, None]
    rows = torch.where(written[:, None], rows.to(state.dtype), load(state, destination))
    store(state, destination, torch.where((count == 0)[:, None, None], load(state, source), rows))


def _store_ring(state: Tensor, source: Tensor, tokens: Tensor, seen: Tensor, count: Tensor) -> None:
    for t in range(tokens.shape[1] if state.shape[2] else 0):
        b = (source >= 0) & (t < count)
        state[source[b].long(), :, (seen[b] + t) % state.shape[2]] = tokens[b, t].to(state.dtype)


# ---------------------------------------------------------------- state space duality


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
    tokens = [t[:, None] if x.dim() == 3 else t for t in (x, dt, B, C)]
    steps = tokens[0].shape[1]
    check_update("ssm_update", steps, state, state_indices, dst_state_indices, num_accepted, num_tokens, parents)
    source = source_slots(x, state_indices, num_accepted)
    count = count_tokens(steps, num_tokens, source)
    parents = _parents(parents, count)
    h = rounded.load(state, state_scale, source, wide_dtype(x))
    step = _step(tokens[1], dt_bias, dt_softplus, dt_min, dt_max, h.dtype)
    y, states = _recur(h, tokens[0], step, A, *tokens[2:], parents)
    destination = masked(source, dst_state_indices)
    if destination.dim() == 2:
        for t in range(steps):
            slots = destination[:, t].masked_fill(count <= t, -1)
            rounded.store(state, state_scale, slots, states[t + 1], rounding, seed, torch.full_like(count, t))
    else:
        last = (count - 1).clamp(min=0)
        rounded.store(state, state_scale, destination, last_states(states, count), rounding, seed, last)
    y = skip_and_gate(y.view(x.shape), x, D, z).to(x.dtype)
    return zero_padding(y.contiguous().view(tokens[0].shape), count).view(x.shape)


def _step(
    dt: Tensor, bias: Tensor | None, softplus: bool, dt_min: float, dt_max: float | None, wide: torch.dtype
) -> Tensor:
    # In float64, rounded once: PyTorch's vectorised float32 functions round the last elements of a tensor differently,
    # and T tokens at once must give the bits of T single ones.
    return time_step(dt.double(), bias, softplus, dt_min, dt_max).to(wide)


def _recur(
    h: Tensor, x: Tensor, step: Tensor, A: Tensor, B: Tensor, C: Tensor | None, parents: Tensor | None
) -> tuple[Tensor, list[Tensor]]:
    """y without D and gate, and the states before the first token ``h`` and after each of T, ``[B, H, P, N]``."""
    wide, heads = h.dtype, x.shape[2]
    decay, u = torch.exp((step * A.to(wide)).double()).to(wide), x.to(wide) * step[..., None]
    B, C = (None if t is None else t.to(wide).repeat_interleave(heads // t.shape[2], dim=2) for t in (B, C))
    y, states = torch.empty_like(u), [h]
    for t in range(u.shape[1]):
        h = decay[:, t, :, None, None] * _previous(states, parents, t) + u[:, t, :, :, None] * B[:, t, :, None, :]
        if C is not None:
            y[:, t] = (h * C[:, t, :, None, :]).sum(-1)
        states.append(h)
    return y, states


# ---------------------------------------------------------------- ring of tokens that the state has not seen


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
    tokens = [t[:, None] if x.dim() == 3 else t for t in (x, dt, B, C)]
    steps, size = tokens[0].shape[1], ring_x.shape[1]
    check_update("ssm_replay_update", steps, state, state_indices, None, None, None, parents)
    source = source_slots(x, state_indices)
    count = count_tokens(steps, None, source)
    parents = _parents(parents, count)
    first, committed = load(ring_pos, source).long().unbind(1)
    h = _replay(load(state, source).to(wide_dtype(x)), source, ring_x, ring_B, ring_dt, first, committed, A)
    step = _step(tokens[1], dt_bias, dt_softplus, dt_min, dt_max, h.dtype)
    y, _ = _recur(h, tokens[0], step, A, *tokens[2:], parents)
    store(state, source.masked_fill(~_folds(committed, steps, size), -1), h)
    for ring, values in ((ring_x, tokens[0]), (ring_B, tokens[2]), (ring_dt, step)):
        for t in range(steps):
            _move_in(ring, source, first + committed + t, values[:, t])
    y = skip_and_gate(y.view(x.shape), x, D, z).to(x.dtype)
    return zero_padding(y.contiguous().view(tokens[0].shape), count).view(x.shape)


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
    op, source = "ssm_replay_commit", source_slots(num_accepted, state_indices)
    check_below(op, "state_indices", state_indices, ring_pos)
    check_values(op, f"num_accepted must be between 0 and {tokens}", num_accepted, 0, tokens)
    check_distinct(op, "state_indices", source)
    first, committed = load(ring_pos, source).long().unbind(1)
    behind = first + committed
    if path is not None:  # it rises, so an entry is read before another is moved onto it
        for j in range(tokens):
            slots = source.masked_fill(num_accepted <= j, -1)
            for ring in (ring_x, ring_B, ring_dt):
                _move_in(ring, slots, behind + j, _entries(ring, slots, behind + path[:, j]))
    folds = _folds(committed, tokens, ring_x.shape[1])
    first = torch.where(folds, behind % ring_x.shape[1], first)
    committed = torch.where(folds, 0, committed) + num_accepted
    store(ring_pos, source, torch.stack([first, committed], 1))


def ssm_replay_flush(
    state: Tensor,
    ring_pos: Tensor,
    ring_x: Tensor,
    ring_B: Tensor,
    ring_dt: Tensor,
    A: Tensor,
    state_indices: Tensor | None = None,
) -> None:
    check_below("ssm_replay_flush", "state_indices", state_indices, state)
    source = source_slots(state, state_indices)
    check_distinct("ssm_replay_flush", "state_indices", source)
    first, committed = load(ring_pos, source).long().unbind(1)
    wide = wide_dtype(ring_x)
    store(state, source, _replay(load(state, source).to(wide), source, ring_x, ring_B, ring_dt, first, committed, A))
    after = (first + committed) % ring_x.shape[1]
    store(ring_pos, source, torch.stack([after, torch.zeros_like(after)], 1))


def _folds(committed: Tensor, tokens: int, size: int) -> Tensor:
    """Whether an update of ``tokens`` tokens folds what is committed into the state: else the next might not fit."""
    return committed + 2 * tokens > size


def _replay(
    h: Tensor, source: Tensor, ring_x: Tensor, ring_B: Tensor, ring_dt: Tensor, first: Tensor, committed: Tensor,
    A: Tensor,
) -> Tensor:  # fmt: skip
    """The states ``h`` carried through the committed entries of their rings."""
    for i in range(int(committed.max()) if len(committed) else 0):
        x, B, step = (_entries(ring, source, first + i)[:, None] for ring in (ring_x, ring_B, ring_dt))
        _, states = _recur(h, x, step.to(h.dtype), A, B, None, None)
        h = torch.where((i < committed)[:, None, None, None], states[1], h)
    return h


def _entries(ring: Tensor, source: Tensor, position: Tensor) -> Tensor:
    return ring[source.clamp(min=0).long(), position % ring.shape[1]]


def _move_in(ring: Tensor, source: Tensor, position: Tensor, rows: Tensor) -> None:
    b = source >= 0
    ring[source[b].long(), position[b] % ring.shape[1]] = rows[b].to(ring.dtype)


# ---------------------------------------------------------------- tokens of a call


def count_tokens(steps: int, num_tokens: Tensor | None, source: Tensor) -> Tensor:
    """Tokens of each sequence that are not padding; none of a padding sequence."""
    count = torch.full_like(source, steps) if num_tokens is None else num_tokens
    return count.long().masked_fill(source < 0, 0)


def _parents(parents: Tensor | None, count: Tensor) -> Tensor | None:
    """The parent of each token; -1, the state, for padding, whose parent may be anything."""
    if parents is None:
        return None
    padding = torch.arange(parents.shape[1], device=parents.device) >= count[:, None]
    return parents.long().masked_fill(padding, -1)


def _previous(states: list[Tensor], parents: Tensor | None, t: int) -> Tensor:
    """The state that token t goes on from: after its parent, or after the token before it."""
    return states[t] if parents is None else last_states(states, parents[:, t] + 1)


def zero_padding(y: Tensor, count: Tensor) -> Tensor:
    """``y [B, T, ...]``: zeros behind the last token."""
    y[torch.arange(y.shape[1], device=y.device) >= count[:, None]] = 0
    return y
