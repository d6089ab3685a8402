from __future__ import annotations

import pytest
import torch
from conftest import DEVICE, assert_close_to, assert_invariant, assert_same_bits, fenced
from hypothesis import strategies as st
from properties import checking, examples

from n3kernels import use_backend
from n3kernels.mamba import causal_conv1d_update_slots, reference

OPS = ("causal_conv1d_update",)

# batch and tokens, 0 included; channels; width; dtype; bias; activation
problems = st.tuples(
    st.integers(0, 4), st.integers(0, 6), st.sampled_from([1, 3, 17, 64]), st.integers(1, 5),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]), st.booleans(), st.sampled_from([None, "silu"]),
)  # fmt: skip
SMALL = (3, 2, 17, 4, torch.float32, True, "silu")


def inputs(problem, slots):
    """x is a column slice of a wider matrix, as of a projection."""
    batch, tokens, channels, width, dtype, biased, activation = problem
    x = fenced(torch.randn(batch, tokens, channels + 5, device=DEVICE).to(dtype))[..., 3 : 3 + channels]
    state = fenced(torch.randn(slots, channels, width - 1, device=DEVICE).to(dtype))
    weight = fenced(torch.randn(channels, width, device=DEVICE).to(dtype))
    bias = fenced(torch.randn(channels, device=DEVICE).to(dtype)) if biased else None
    return x, state, weight, bias, activation


def window(state, x):
    """All raw inputs of each sequence, oldest first: [batch, channels, width - 1 + tokens]."""
    return torch.cat([state, x.transpose(1, 2)], -1)


def assert_is_the_convolution(y, x, before, weight, bias, activation):
    def convolve(x, before, weight, bias, activation):
        args = (None if t is None else t.double() for t in (x, weight, bias, before))
        return reference.causal_conv1d(*args, activation=activation)[0]

    truth = convolve(x, before, weight, bias, activation)
    size = convolve(x.abs(), before.abs(), weight.abs(), None if bias is None else bias.abs(), None)
    assert_close_to(y, truth, 1e-6, size + 1e-3)


# ---------------------------------------------------------------- the definition


@examples(problems, st.booleans())
def test_agrees_with_the_definition(backend, problem, turned):
    """The prefill's convolution from the same state; the state moves on by the raw inputs, bit for bit."""
    batch, width = problem[0], problem[3]
    x, state, weight, bias, activation = inputs(problem, batch + 1)
    if turned:
        state = state.transpose(1, 2).contiguous().transpose(1, 2)
    before = state.clone()
    y = causal_conv1d_update_slots(x, state, weight, bias, activation=activation)
    assert y.dtype == x.dtype and y.is_contiguous()
    assert_is_the_convolution(y, x, before[:batch], weight, bias, activation)
    whole = window(before[:batch], x)
    assert_same_bits(state[:batch], whole[..., whole.shape[-1] - (width - 1) :])
    assert_same_bits(state[batch:], before[batch:])


@pytest.mark.parametrize("channels", [6144, 9728, 10240, 768])
def test_published_shapes(backend, channels):
    x, state, weight, bias, activation = inputs((2, 1, channels, 4, torch.bfloat16, True, "silu"), 2)
    before = state.clone()
    y = causal_conv1d_update_slots(x[:, 0], state, weight, bias, activation=activation)
    assert_is_the_convolution(y[:, None], x, before, weight, bias, activation)
    assert_same_bits(state, window(before, x)[..., 1:])


# ---------------------------------------------------------------- invariants


@examples(problems)
def test_many_tokens_are_many_calls(backend, problem):
    x, at_once, weight, bias, activation = inputs(problem, problem[0])
    one_by_one = at_once.clone()
    y = causal_conv1d_update_slots(x, at_once, weight, bias, activation=activation)
    for t in range(x.shape[1]):
        y_t = causal_conv1d_update_slots(x[:, t], one_by_one, weight, bias, activation=activation)
        assert_invariant(backend, y[:, t], y_t)
    assert_same_bits(at_once, one_by_one)


@examples(problems)
def test_a_state_per_token(backend, problem):
    """Each draft token's state in its own slot; a negative slot is not written, and the source stays."""
    batch, tokens, _, width, *_ = problem
    x, state, weight, bias, activation = inputs(problem, batch + batch * tokens + 1)
    before = state.clone()
    slots = batch + torch.arange(batch * tokens, device=DEVICE, dtype=torch.int32).view(batch, tokens)
    slots[:, 1::2] = -1
    y = causal_conv1d_update_slots(x, state, weight, bias, None, slots, activation=activation)
    assert_is_the_convolution(y, x, before[:batch], weight, bias, activation)
    whole, untouched = window(before[:batch], x), torch.ones(len(state), dtype=torch.bool)
    for b in range(batch):
        for t in range(0, tokens, 2):
            assert_same_bits(state[slots[b, t]], whole[b, :, t + 1 : t + width])
            untouched[slots[b, t]] = False
    assert_same_bits(state[untouched], before[untouched])


def test_states_are_read_before_they_are_written(backend):
    """Two sequences swap slots, and two continue from one."""
    x, state, weight, bias, activation = inputs((4, *SMALL[1:]), 4)
    before = state.clone()
    source, destination = (torch.tensor(i, device=DEVICE) for i in ([0, 1, 2, 2], [1, 0, 3, 2]))
    causal_conv1d_update_slots(x, state, weight, bias, source, destination, activation=activation)
    assert_same_bits(state[destination], window(before[source], x)[..., 2:])


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_padding_touches_nothing(backend, index):
    """A padding sequence, NaN all over, gives zeros and neither reads nor writes, even with a destination given."""
    x, state, weight, bias, activation = inputs(SMALL, 5)
    x[1], state[0] = float("nan"), float("nan")
    before = state.clone()
    source, destination = (torch.tensor(i, dtype=index, device=DEVICE) for i in ([4, -1, 2], [1, 3, -1]))
    y = causal_conv1d_update_slots(x, state, weight, bias, source, destination, activation=activation)
    assert y[1].count_nonzero() == 0
    assert_is_the_convolution(y[[0, 2]], x[[0, 2]], before[[4, 2]], weight, bias, activation)
    assert_same_bits(state[1], window(before[[4]], x[[0]])[0, :, 2:])
    assert_same_bits(state[[0, 2, 3, 4]], before[[0, 2, 3, 4]])


def test_a_sequence_does_not_see_the_others(backend):
    """Alone or beside a NaN state and NaN inputs: the same bits."""
    x, state, weight, bias, activation = inputs((4, *SMALL[1:]), 4)
    x[1], state[2] = float("nan"), float("nan")
    before = state.clone()
    y = causal_conv1d_update_slots(x, state, weight, bias, activation=activation)
    assert y[1].isnan().all() and y[2].isnan().all()
    for b in (0, 3):
        alone = before[b : b + 1].clone()
        y_one = causal_conv1d_update_slots(x[b : b + 1], alone, weight, bias, activation=activation)
        assert_invariant(backend, y[b], y_one[0])
        assert_same_bits(state[b], alone[0])


# ---------------------------------------------------------------- the framework


@pytest.mark.parametrize("tokens", [None, 0, 2])
@pytest.mark.parametrize("full", [False, True])
def test_opcheck(tokens, full):
    x, state, weight, bias, activation = inputs((2, 1 if tokens is None else tokens, *SMALL[2:]), 4)
    x, args = (x[:, 0] if tokens is None else x), ()
    if full:
        per_token = torch.arange(2 * (tokens or 1), device=DEVICE).view(2, -1)
        args = (torch.tensor([3, -1], device=DEVICE), per_token if tokens else torch.tensor([1, 0], device=DEVICE))
    args = (x, state, weight, bias if full else None, *args)
    torch.library.opcheck(torch.ops.n3.causal_conv1d_update.default, args, {"activation": activation})


@pytest.mark.parametrize("dynamic", [False, True])
@torch._dynamo.config.patch(error_on_recompile=True)
def test_compiles_without_a_break(dynamic):
    def step(x, state, weight, bias, indices):
        return causal_conv1d_update_slots(x, state, weight, bias, indices, activation="silu").sin()

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for batch in (5, 6) if dynamic else (5,):  # sizes that agree would be taken to be one
        x, eager_state, weight, bias, _ = inputs((batch, *SMALL[1:]), 9)
        state, indices = eager_state.clone(), torch.arange(batch, device=DEVICE)
        out, truth = compiled(x, state, weight, bias, indices), step(x, eager_state, weight, bias, indices)
        torch.testing.assert_close(out, truth)
        assert_same_bits(state, eager_state)


# ---------------------------------------------------------------- bad calls

GOOD = {
    "x": torch.zeros(2, 5, 6), "conv_state": torch.ones(3, 6, 3), "weight": torch.zeros(6, 4), "bias": torch.zeros(6),
}  # fmt: skip
BAD = [
    ({"x": torch.zeros(6)}, "x must have 2 or 3 dimensions, got 1"),
    ({"x": torch.zeros(2, 5, 6).int()}, "x must be float32, float16 or bfloat16, got int32"),
    ({"weight": torch.zeros(6, 1, 4)}, "weight must have 2 dimensions, got 3"),
    ({"weight": torch.zeros(5, 4)}, "weight must have shape [6, 4], got [5, 4]"),
    ({"weight": torch.zeros(6, 0)}, "weight must have at least 1 tap, got 0"),
    ({"bias": torch.zeros(5)}, "bias must have shape [6], got [5]"),
    ({"activation": "gelu"}, "activation must be one of None, silu, got gelu"),
    ({"conv_state": torch.zeros(6, 3)}, "conv_state must have 3 dimensions, got 2"),
    ({"conv_state": torch.zeros(3, 5, 4)}, "conv_state must have shape [3, 6, 4], got [3, 5, 4]"),
    ({"conv_state": torch.zeros(3, 6, 2)}, "conv_state must hold at least 3 inputs, got 2"),
    ({"conv_state": torch.zeros(3, 6, 3).half()}, "conv_state must have the dtype of x (float32), got float16"),
    ({"conv_state": torch.zeros(1, 6, 3)}, "conv_state must have at least 2 slots without state_indices, got 1"),
    ({"state_indices": torch.zeros(3).int()}, "state_indices must have shape [2], got [3]"),
    ({"state_indices": torch.zeros(2)}, "state_indices must be int32 or int64, got float32"),
    ({"dst_state_indices": torch.zeros(2, 5, 1).int()}, "dst_state_indices must have 1 or 2 dimensions, got 3"),
    ({"dst_state_indices": torch.zeros(3).int()}, "dst_state_indices must have shape [2], got [3]"),
    ({"dst_state_indices": torch.zeros(2, 4).int()}, "dst_state_indices must have shape [2, 5], got [2, 4]"),
    ({"dst_state_indices": torch.zeros(2)}, "dst_state_indices must be int32 or int64, got float32"),
]
BAD_VALUES = [
    ({"state_indices": torch.tensor([0, 3])}, "state_indices must be below the number of slots 3, got 3"),
    ({"dst_state_indices": torch.tensor([0, 3])}, "dst_state_indices must be below the number of slots 3, got 3"),
]


def message_of(change):
    call = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in {**GOOD, **change}.items()}
    before = call["conv_state"].clone()
    with pytest.raises(RuntimeError) as error:
        causal_conv1d_update_slots(**call)
    assert_same_bits(call["conv_state"], before)  # nothing is written
    return str(error.value)


@pytest.mark.parametrize("change, message", BAD)
def test_bad_calls(backend, change, message):
    assert message_of(change) == f"n3::causal_conv1d_update: {message}"


@pytest.mark.parametrize("change, message", BAD_VALUES)
@pytest.mark.parametrize("which", checking(*OPS))
def test_bad_values(which, change, message):
    """Where reading a value costs no synchronisation it is checked."""
    with use_backend(which):
        assert message_of(change) == f"n3::causal_conv1d_update: {message}"
