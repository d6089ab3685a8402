"""The text of the CUDA kernel of causal_conv1d_update, run on the CPU."""

from __future__ import annotations

import pytest
import torch
from conftest import assert_same_bits, fenced
from hypothesis import given
from hypothesis import strategies as st
from kernel_arguments import ConvUpdateArgs, Taps, doubles, indices, load_kernels, room, run, slots, stage, view
from kernel_problems import FLOATS, KINDS, SEEDS, SWAP, assert_is_conv, conv_operands, draw_slots
from kernel_text import needs_emulator

from n3kernels.mamba import reference_decode

SHIFT, WINDOW, RING = range(3)  # causal_conv1d::History

pytestmark = needs_emulator


@pytest.fixture(scope="session")
def kernels():
    return load_kernels()


def conv_update(kernels, x, state, weight, bias, activation, cache_seqlens=None, reverse=False, **where):
    batch, tokens, channels = x.shape
    y = room(x.shape, x.dtype)
    plain = where.get("state_indices") is None or where["state_indices"].dim() == 1
    use = RING if cache_seqlens is not None else WINDOW if plain and "num_accepted" in where else SHIFT
    names = ("state_indices", "dst_state_indices", "num_accepted", "num_tokens", "parents")
    at = slots(state, batch, tokens, *(where.get(name) for name in names))
    (staged,) = stage(kernels, at, [state])
    taps = Taps(view(weight), view(bias), channels, weight.shape[1], activation == "silu")
    args = ConvUpdateArgs(view(x), taps, view(state), use, at, indices(cache_seqlens), staged, view(y), state.shape[2])
    run(kernels.emulate_conv_update, args, reverse)
    return y


def assert_is_conv_update(kernels, x, state, weight, bias, reverse, **where):
    want = state.clone()
    true_y = reference_decode.causal_conv1d_update(*doubles(x, state, weight, bias), activation="silu", **where)
    reference_decode.causal_conv1d_update(x, want, weight, bias, **where)
    y = conv_update(kernels, x, state, weight, bias, "silu", reverse=reverse, **where)
    assert_is_conv(y, true_y, x, weight, bias)
    assert_same_bits(state, want)


@given(
    st.integers(1, 4), st.integers(0, 6), st.sampled_from([1, 130]), st.integers(1, 6), st.integers(0, 3), FLOATS,
    KINDS, st.booleans(), st.booleans(), st.booleans(), st.booleans(), st.booleans(), SEEDS,
)  # fmt: skip
def test_conv1d_update_shift(
    kernels, batch, tokens, channels, width, more, dtype, kind, accepted, counted, tree, turned, reverse, rng
):
    x, weight, bias = conv_operands((batch, tokens), channels, width, dtype, True, "turned" if turned else "slice")
    count, where = draw_slots(rng, batch, tokens, kind, accepted, counted, tree)
    state = fenced(torch.randn(count, channels, width - 1 + more).to(dtype))
    if turned:
        state = state.transpose(1, 2).contiguous().transpose(1, 2)
    assert_is_conv_update(kernels, x, state, weight, bias, reverse, **where)


def test_conv1d_update_reads_before_it_writes(kernels):
    x, weight, bias = conv_operands((5, 2), 8, 4, torch.bfloat16, True, "rows")
    state = fenced(torch.randn(6, 8, 3).to(torch.bfloat16))
    assert_is_conv_update(kernels, x, state, weight, bias, False, **{k: torch.tensor(v) for k, v in SWAP.items()})


@pytest.mark.parametrize("own", [0, 1, 2])
def test_conv1d_update_keeps_what_later_states_need(kernels, own):
    """The state of one token goes to the slot that is read; the others still hold inputs from there."""
    x, weight, bias = conv_operands((1, 3), 8, 4, torch.bfloat16, True, "rows")
    state, to = fenced(torch.randn(4, 8, 6).to(torch.bfloat16)), torch.tensor([[1, 2, 3]])
    to[0, own] = 0
    assert_is_conv_update(kernels, x, state, weight, bias, False, dst_state_indices=to)


def test_conv1d_update_window_of_no_tokens(kernels):
    """Is copied where it goes to another slot, and left alone where not."""
    x, weight, bias = conv_operands((2, 3), 8, 4, torch.bfloat16, True, "rows")
    counts = {"num_accepted": torch.tensor([3, 1]).int(), "num_tokens": torch.tensor([0, 0]).int()}
    for where in ({}, {"dst_state_indices": torch.tensor([2, 1])}):
        state = fenced(torch.randn(3, 8, 5).to(torch.bfloat16))
        assert_is_conv_update(kernels, x, state, weight, bias, False, **counts, **where)


@given(
    st.integers(1, 4), st.integers(1, 6), st.integers(1, 5), st.booleans(), st.booleans(), st.booleans(), SEEDS
)
def test_conv1d_update_window(kernels, batch, tokens, width, moved, counted, reverse, rng):
    x, weight, bias = conv_operands((batch, tokens), 8, width, torch.bfloat16, True, "rows")
    count, where = draw_slots(rng, batch, tokens, "last" if moved else "source", False, counted, False)
    where["num_accepted"] = torch.tensor([rng.randint(1, tokens) for _ in range(batch)], dtype=torch.int32)
    state = fenced(torch.randn(count, 8, width - 2 + tokens).to(torch.bfloat16))
    assert_is_conv_update(kernels, x, state, weight, bias, reverse, **where)


@given(st.integers(1, 4), st.integers(0, 9), st.integers(1, 5), st.integers(0, 4), st.booleans(), SEEDS)
def test_conv1d_update_ring(kernels, batch, tokens, width, more, counted, rng):
    x, weight, bias = conv_operands((batch, tokens), 8, width, torch.float16, True, "rows")
    count, where = draw_slots(rng, batch, tokens, "source", False, counted, False)
    where["cache_seqlens"] = torch.tensor([rng.randint(0, 20) for _ in range(batch)], dtype=torch.int32)
    state = fenced(torch.randn(count, 8, width - 1 + more).to(torch.float16))
    assert_is_conv_update(kernels, x, state, weight, bias, False, **where)


def test_slots_out_of_range_are_not_written(kernels):
    """On a GPU reading an index would wait for the device: nobody checked these."""
    x, weight, bias = conv_operands((3, 2), 8, 4, torch.float32, True, "rows")
    state = fenced(torch.randn(3, 8, 4))
    before = state.clone()
    conv_update(kernels, x, state, weight, bias, None, dst_state_indices=torch.tensor([3, -7, 2**33]))
    assert_same_bits(state, before)
