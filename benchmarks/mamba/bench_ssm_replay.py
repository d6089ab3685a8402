"""Decoding by replay: the state is read at every step and written when the ring is full. One round of the ring, so that
folds are counted as often as they come; beside it as many updates of the state in place."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch

from n3kernels.mamba import reference_decode

from ..conftest import DEVICE, providers, sizes
from ..shapes import MIXERS

OP = "ssm_replay_update"
RING = 16
BATCHES = (1, 8, 64)


@lru_cache(1)
def problem(size: str, batch: int, tokens: int):
    heads, head_dim, groups, d_state = MIXERS[size]
    x = torch.randn(batch, tokens, heads, head_dim, device=DEVICE).to(torch.bfloat16)
    B, C = (torch.randn(batch, tokens, groups, d_state, device=DEVICE).to(torch.bfloat16) for _ in range(2))
    dt = torch.randn(batch, tokens, heads, device=DEVICE).to(torch.bfloat16)
    A, D, dt_bias = -torch.rand(heads) - 0.1, torch.randn(heads), torch.randn(heads) - 3
    state = torch.randn(batch, heads, head_dim, d_state, device=DEVICE)
    rings = [
        torch.zeros(batch, RING, heads, head_dim, device=DEVICE, dtype=torch.bfloat16),
        torch.zeros(batch, RING, groups, d_state, device=DEVICE, dtype=torch.bfloat16),
        torch.zeros(batch, RING, heads, device=DEVICE),
        torch.zeros(batch, 2, device=DEVICE, dtype=torch.int32),
    ]
    call = [x, dt, A.to(DEVICE), B, C, D.to(DEVICE), dt_bias.to(DEVICE)]
    wide, wide_state = [t.double() for t in call], state.double()
    for _ in range(steps_of(tokens)):
        truth = reference_decode.ssm_update(wide_state, *wide[:6], None, wide[6])
    return [state, *rings, *call], truth


def steps_of(tokens: int) -> int:
    """Steps from one fold to the next, if every token is accepted."""
    return (RING - 2 * tokens) // tokens + 1


def replay(state, ring_x, ring_B, ring_dt, ring_pos, x, dt, A, B, C, D, dt_bias):
    """Up to the step before a fold is due, and with it."""
    op, tokens = torch.ops.n3, x.shape[1]
    accepted = torch.full((len(x),), tokens, device=x.device, dtype=torch.int32)
    for _ in range(steps_of(tokens)):
        y = op.ssm_replay_update.default(state, ring_x, ring_B, ring_dt, ring_pos, x, dt, A, B, C, D, None, dt_bias)
        op.ssm_replay_commit.default(ring_pos, ring_x, ring_B, ring_dt, accepted, tokens)
    return y


def in_place(state, ring_x, ring_B, ring_dt, ring_pos, x, dt, A, B, C, D, dt_bias):
    for _ in range(steps_of(x.shape[1])):
        y = torch.ops.n3.ssm_update.default(state, x, dt, A, B, C, D, None, dt_bias)
    return y


@pytest.mark.parametrize("provider", providers(OP, "ssm_update"))
@pytest.mark.parametrize("tokens", sizes((1, 4), quick=[1]))
@pytest.mark.parametrize("batch", sizes(BATCHES, quick=[1], full=[64]))
@pytest.mark.parametrize("size", sizes(MIXERS, quick=["nano"], full=["super", "ultra"]))
def test_ssm_replay_update(measure, size, batch, tokens, provider):
    args, truth = problem(size, batch, tokens)
    args = [t.clone() for t in args]  # which are written
    state, steps = args[0].numel(), steps_of(tokens)
    measure(
        OP, provider, in_place if provider == "ssm_update" else replay, args, truth,
        group=f"{OP} {size} batch {batch} T{tokens}, {steps} steps",
        bytes=4 * state * (steps + 1), flops=2 * tokens * state * steps, dtype=torch.float32,
    )  # fmt: skip


def flush(state, ring_x, ring_B, ring_dt, ring_pos, A):
    """On a copy of the positions, so that every call has the same tokens to fold."""
    torch.ops.n3.ssm_replay_flush.default(state, ring_pos.clone(), ring_x, ring_B, ring_dt, A)
    return state


@pytest.mark.parametrize("provider", providers("ssm_replay_flush"))
@pytest.mark.parametrize("batch", sizes(BATCHES, quick=[1], full=[64]))
def test_ssm_replay_flush(measure, batch, provider):
    (state, ring_x, ring_B, ring_dt, ring_pos, _, _, A, *_), _ = problem("nano", batch, 1)
    filled = [torch.randn_like(ring_x), torch.randn_like(ring_B), torch.rand_like(ring_dt)]
    args = [state.clone(), *filled, ring_pos.clone(), A]
    args[4][:, 1] = 12
    wide = [t.double() if t.is_floating_point() else t.clone() for t in args]
    truth = flush_truth(*wide)
    measure(
        "ssm_replay_flush", provider, flush, args, truth, group=f"ssm_replay_flush nano batch {batch}, 12 tokens",
        bytes=8 * state.numel(), flops=2 * 12 * state.numel(), dtype=torch.float32, tolerance=1e-5,
    )  # fmt: skip


def flush_truth(state, ring_x, ring_B, ring_dt, ring_pos, A):
    reference_decode.ssm_replay_flush(state, ring_pos, ring_x, ring_B, ring_dt, A)
    return state
