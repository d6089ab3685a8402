"""The convolution on problems that cross the tiles of the CPU kernels: channels, tokens and blocks of sums."""

from __future__ import annotations

import pytest
import torch
from conftest import assert_same_bits, fenced

from n3kernels import use_backend
from n3kernels.mamba import causal_conv1d, causal_conv1d_slots, reference

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the tiles are those of the CPU kernels")

WIDTHS = [(1040, 4), (530, 3), (513, 2), (70, 7), (37, 40), (9, 100)]  # channels and taps
ENDS = torch.tensor([0, 3, 3, 70, 199, 520, 521]).int()


def inputs(tokens, channels, width, dtype=torch.float32):
    x = fenced(torch.randn(*tokens, channels + 3).to(dtype))[..., :channels]
    return x, fenced(torch.randn(channels, width)), fenced(torch.randn(channels))


def same_with_any_threads(call):
    first, threads = call(), torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            for again, tensor in zip(call(), first, strict=True):
                assert_same_bits(again, tensor)
    finally:
        torch.set_num_threads(threads)
    return first


@pytest.mark.parametrize("channels, width", WIDTHS)
@pytest.mark.parametrize("turned", [False, True])
def test_forward(channels, width, turned):
    x, weight, bias = inputs((2, 150), channels, width)
    initial = fenced(torch.randn(2, channels, width - 1))
    if turned:  # [B, C, L], of which a tile is transposed in registers
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    y, final = same_with_any_threads(lambda: causal_conv1d(x, weight, bias, initial, activation="silu"))
    truth, state = reference.causal_conv1d(x.double(), weight, bias, initial.double(), activation="silu")
    assert (y - truth).abs().max() <= 1e-5 * max(1, width // 4)
    assert_same_bits(final, state.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels, width", WIDTHS)
def test_a_prompt_in_pieces_has_the_bits_of_the_whole(channels, width, dtype):
    """Cut anywhere, in slots, and its last tokens one by one or all at once by the update."""
    x, weight, bias = inputs((1, 140), channels, width, dtype)
    y, final = causal_conv1d(x, weight, bias, activation="silu")
    state, slot = torch.zeros(2, channels, width - 1, dtype=dtype), torch.tensor([1])
    parts = []
    for first, last in ((0, 1), (1, 66), (66, 130)):
        fresh = torch.tensor([first > 0])
        part = causal_conv1d_slots(x[:, first:last], weight, bias, state, slot, fresh, activation="silu")
        parts.append(part)
    parts.append(update(x[:, 130:137], state, weight, bias, slot))
    parts += [update(x[:, t : t + 1], state, weight, bias, slot) for t in range(137, 140)]
    assert_same_bits(torch.cat(parts, 1), y)
    assert_same_bits(state[1], final[0])


def update(x, state, weight, bias, slot):
    return torch.ops.n3.causal_conv1d_update.default(x, state, weight, bias, slot, activation="silu")


def test_states_are_copied_bit_for_bit():
    """Whatever NaN an input is, of either layout of states."""
    bits = torch.randint(-(2**15), 2**15, (1, 70, 50)).short()
    for dtype in (torch.float16, torch.bfloat16):
        x = bits.view(dtype)
        _, final = causal_conv1d(x, torch.randn(50, 4))
        assert_same_bits(final[0], x[0, -3:].T)
        for state in (final.clone(), final.transpose(1, 2).contiguous().transpose(1, 2)):
            torch.ops.n3.causal_conv1d_update.default(x[:, :1], state, torch.randn(50, 4))
            assert_same_bits(state[0], torch.cat([x[0, -2:], x[0, :1]]).T)


@pytest.mark.parametrize("channels, width", WIDTHS)
@pytest.mark.parametrize("activation", [None, "silu"])
def test_backward(channels, width, activation):
    """Sequences of less than a step, of several blocks, and none at all."""
    x, weight, bias = inputs((524,), channels, width)
    initial, grad_final = (fenced(torch.randn(6, channels, width - 1)) for _ in range(2))
    args = (torch.randn(524, channels), grad_final, x, weight, bias, initial)
    run = torch.ops.n3.causal_conv1d_bwd.default
    grads = same_with_any_threads(lambda: run(*args, ENDS, activation))
    with use_backend("reference"):
        truths = run(*(t.double() for t in args), ENDS, activation)
    for grad, want in zip(grads, truths, strict=True):
        assert (grad - want).norm() <= 1e-6 * want.norm()
    assert grads[0][521:].count_nonzero() == 0


@pytest.mark.parametrize("threads", [1, 5])
def test_an_update_of_many_channels(threads):
    """Several tiles, read before any is written: every sequence writes the slot that the next one reads."""
    x, weight, bias = inputs((4, 2), 1040, 4)
    state = fenced(torch.randn(4, 1040, 3))
    before, there = state.clone(), torch.tensor([1, 2, 3, 0])
    count = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        y = torch.ops.n3.causal_conv1d_update.default(x, state, weight, bias, None, there, activation="silu")
    finally:
        torch.set_num_threads(count)
    truth, after = reference.causal_conv1d(x.double(), weight, bias, before.double(), activation="silu")
    assert (y - truth).abs().max() <= 1e-5
    assert_same_bits(state[there], after.float())
