"""What the tests of the mamba kernels' text share: operands, slots, comparisons."""

from __future__ import annotations

import random

import torch
from conftest import assert_close_to, assert_same_bits, fenced
from hypothesis import strategies as st
from kernel_arguments import TYPES

FLOATS = st.sampled_from(TYPES[:3])
SEEDS = st.integers(0, 2**32).map(random.Random)
KINDS = st.sampled_from(["source", "last", "each"])
SWAP = {"state_indices": [0, 1, 2, 2, 5], "dst_state_indices": [1, 0, 3, 2, 4]}  # and two that go on from one slot


def conv_operands(tokens, channels, width, dtype, biased, layout):
    """x in rows, as a slice of a wider matrix, or turned."""
    if layout == "turned":
        x = fenced(torch.randn(*tokens[:-1], channels, tokens[-1]).to(dtype)).transpose(-1, -2)
    else:
        x = fenced(torch.randn(*tokens, channels + 8 * (layout == "slice")).to(dtype))[..., :channels]
    bias = fenced(torch.randn(channels)) if biased else None
    return x, fenced(torch.randn(channels, width)), bias


def assert_is_conv(y, truth, x, weight, bias):
    largest = x.double().abs().max() if x.numel() else 0.0
    assert_close_to(y, truth, 1e-6, largest * weight.double().abs().sum(1) + 1)


def draw_slots(rng, batch, tokens, kind, accepted, counted, tree):
    """Indices of an update: sources with padding, destinations that are others' sources, counts, parents."""
    slots_ = 2 * batch + batch * tokens + 1
    order = rng.sample(range(slots_), slots_)
    call = {}
    if accepted:
        call["state_indices"] = torch.tensor(order[: 2 * batch]).view(batch, 2)
        call["num_accepted"] = torch.tensor([rng.randint(1, 2) for _ in range(batch)], dtype=torch.int32)
    elif rng.random() < 0.8:
        call["state_indices"] = torch.tensor(order[:batch], dtype=rng.choice([torch.int32, torch.int64]))
    if "state_indices" in call and batch > 1:
        call["state_indices"][rng.randrange(batch)] = -1
    rng.shuffle(order)  # any slot may be written, whoever reads it
    if kind == "last":
        call["dst_state_indices"] = torch.tensor(order[:batch])
    elif kind == "each":
        call["dst_state_indices"] = torch.tensor(order[: batch * tokens], dtype=torch.int32).view(batch, tokens)
        if tokens:
            call["dst_state_indices"][rng.randrange(batch), rng.randrange(tokens)] = -1
        if tree:
            parents = [[rng.randint(-1, t - 1) for t in range(tokens)] for _ in range(batch)]
            call["parents"] = torch.tensor(parents, dtype=torch.int32).view(batch, tokens)
    if counted:
        call["num_tokens"] = torch.tensor([rng.randint(0, tokens) for _ in range(batch)], dtype=torch.int32)
    return slots_, call


def ssm_operands(batch, tokens, layout, dtype, full):
    heads, groups, head_dim, d_state = layout
    widths = [heads * head_dim, heads * head_dim, groups * d_state, groups * d_state, heads]
    z, x, B, C, dt = fenced(torch.randn(batch, tokens, sum(widths)).to(dtype)).split(widths, -1)
    return {
        "x": x.unflatten(-1, (heads, head_dim)), "dt": dt, "A": fenced(-torch.rand(heads)),
        "B": B.unflatten(-1, (groups, d_state)), "C": C.unflatten(-1, (groups, d_state)),
        "D": fenced(torch.randn(heads, head_dim) if full else torch.randn(heads)),
        "z": z.unflatten(-1, (heads, head_dim)) if full else None,
        "dt_bias": fenced(torch.randn(heads).to(dtype)) if full else None,
    }  # fmt: skip


def assert_same_but_nan(a, b):
    """Byte for byte, whatever the bits of NaN."""
    assert torch.equal(a.isnan(), b.isnan())
    assert_same_bits(a.masked_fill(a.isnan(), 7), b.masked_fill(b.isnan(), 7))
