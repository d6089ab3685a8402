from __future__ import annotations

import pytest
import torch
from conftest import DEVICE, assert_close_to, assert_invariant, assert_same_bits, fenced
from hypothesis import strategies as st
from properties import checking, examples

from n3kernels import use_backend
from n3kernels.mamba import causal_conv1d, causal_conv1d_slots, reference

OPS = ("causal_conv1d", "causal_conv1d.slots", "causal_conv1d_bwd")

dtypes = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])
# channels; width; bias; activation
taps = st.tuples(st.sampled_from([1, 3, 17, 64]), st.integers(1, 5), st.booleans(), st.sampled_from([None, "silu"]))
sequences = st.lists(st.sampled_from([0, 1, 2, 3, 7, 20]), min_size=0, max_size=4)


def inputs(tokens, problem, dtype=torch.float32):
    """x is a column slice of a wider matrix, as of a projection."""
    channels, width, biased, activation = problem
    x = fenced(torch.randn(*tokens, channels + 5, device=DEVICE).to(dtype))[..., 3 : 3 + channels]
    weight = fenced(torch.randn(channels, width, device=DEVICE).to(dtype))
    bias = fenced(torch.randn(channels, device=DEVICE).to(dtype)) if biased else None
    return x, weight, bias, activation


def states(count, problem, dtype=torch.float32):
    return fenced(torch.randn(count, problem[0], problem[1] - 1, device=DEVICE).to(dtype))


def definition(x, weight, bias, activation, initial=None):
    """One sequence [length, channels] in float64, output by output, and its last width - 1 raw inputs."""
    (length, channels), width = x.shape, weight.shape[1]
    before = x.new_zeros(width - 1, channels) if initial is None else initial.T
    raw = torch.cat([before, x])
    y = torch.empty(length, channels, dtype=torch.double, device=DEVICE)
    for t in range(length):
        y[t] = (raw[t : t + width].double().T * weight.double()).sum(1)
    y = y if bias is None else y + bias.double()
    return torch.nn.functional.silu(y) if activation else y, raw[length:].T


def magnitude(x, weight, bias, initial=None):
    """Sum of the magnitudes of an output's terms, to which its rounding error is relative."""
    sizes = [None if t is None else t.abs() for t in (weight, bias, initial)]
    return definition(x.abs(), sizes[0], sizes[1], None, sizes[2])[0]


def ends(lengths):
    return torch.tensor([0, *lengths], device=DEVICE).cumsum(0).to(torch.int32)


def assert_is_the_convolution(y, final, x, weight, bias, activation, initial=None):
    true_y, true_final = definition(x, weight, bias, activation, initial)
    assert_close_to(y, true_y, 1e-6, magnitude(x, weight, bias, initial) + 1e-3)
    assert_same_bits(final, true_final)


# ---------------------------------------------------------------- the definition


@examples(st.integers(0, 3), st.integers(0, 12), taps, dtypes, st.booleans())
@pytest.mark.op("causal_conv1d")
def test_agrees_with_the_definition(backend, batch, length, problem, dtype, has_initial):
    x, weight, bias, activation = inputs((batch, length), problem, dtype)
    initial = states(batch, problem, dtype) if has_initial else None
    y, final = causal_conv1d(x, weight, bias, initial, activation=activation)
    assert y.dtype == final.dtype == dtype and y.is_contiguous() and final.is_contiguous()
    for b in range(batch):
        before = initial[b] if has_initial else None
        assert_is_the_convolution(y[b], final[b], x[b], weight, bias, activation, before)


@examples(sequences, taps, dtypes, st.booleans(), st.integers(0, 3))
@pytest.mark.op("causal_conv1d")
def test_packed_sequences(backend, lengths, problem, dtype, has_initial, behind):
    """Empty sequences and ones shorter than the taps; tokens behind the last sequence are padding, here NaN."""
    total = sum(lengths)
    x, weight, bias, activation = inputs((total + behind,), problem, dtype)
    x[total:] = float("nan")
    initial = states(len(lengths), problem, dtype) if has_initial else None
    y, final = causal_conv1d(x, weight, bias, initial, ends(lengths), activation=activation)
    assert y[total:].count_nonzero() == 0
    for s, (a, n) in enumerate(zip(ends(lengths).tolist(), lengths, strict=False)):
        before = initial[s] if has_initial else None
        assert_is_the_convolution(y[a : a + n], final[s], x[a : a + n], weight, bias, activation, before)


@pytest.mark.parametrize("channels", [6144, 9728, 10240, 768])
@pytest.mark.op("causal_conv1d")
def test_published_shapes(backend, channels):
    x, weight, bias, activation = inputs((1, 9), (channels, 4, True, "silu"), torch.bfloat16)
    y, final = causal_conv1d(x, weight, bias, activation=activation)
    assert_is_the_convolution(y[0], final[0], x[0], weight, bias, activation)


# ---------------------------------------------------------------- invariants


@examples(taps, dtypes, st.integers(0, 12), st.integers(0, 12))
@pytest.mark.op("causal_conv1d")
def test_pieces_continue_each_other(backend, problem, dtype, length, cut):
    x, weight, bias, activation = inputs((2, length), problem, dtype)
    cut = min(cut, length)
    y, final = causal_conv1d(x, weight, bias, activation=activation)
    head, between = causal_conv1d(x[:, :cut], weight, bias, activation=activation)
    tail, last = causal_conv1d(x[:, cut:], weight, bias, between, activation=activation)
    assert_invariant(backend, torch.cat([head, tail], 1), y)
    assert_same_bits(last, final)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.op("causal_conv1d")
def test_a_sequence_does_not_see_the_others(backend, packed):
    x, weight, bias, activation = inputs((3, 7), (17, 4, True, "silu"))
    x[1] = float("nan")
    if packed:
        y, final = causal_conv1d(x.flatten(0, 1), weight, bias, cu_seqlens=ends([7, 7, 7]), activation=activation)
        y = y.unflatten(0, (3, 7))
    else:
        y, final = causal_conv1d(x, weight, bias, activation=activation)
    assert y[1].isnan().all() and final[1].isnan().all()
    for s in (0, 2):
        y_one, final_one = causal_conv1d(x[s : s + 1], weight, bias, activation=activation)
        assert_invariant(backend, y[s], y_one[0])
        assert_same_bits(final[s], final_one[0])


@pytest.mark.op("causal_conv1d")
def test_the_past_does_not_see_the_future(backend):
    """Not even a NaN of it: the sum has the terms of the past alone."""
    x, weight, bias, activation = inputs((1, 12), (17, 4, True, "silu"))
    y, _ = causal_conv1d(x, weight, bias, activation=activation)
    x[:, 5] = float("nan")
    changed, _ = causal_conv1d(x, weight, bias, activation=activation)
    assert_invariant(backend, y[:, :5], changed[:, :5])
    assert changed[:, 5:9].isnan().all()
    assert_invariant(backend, y[:, 9:], changed[:, 9:])


@pytest.mark.op("causal_conv1d")
def test_any_strides(backend):
    """Rows of a wider matrix, channels outermost, and packed copies: the same bits."""
    x, weight, bias, activation = inputs((2, 7), (17, 4, True, "silu"))
    initial = states(2, (17, 4))
    y, final = causal_conv1d(x.contiguous(), weight, bias, initial, activation=activation)
    for view in (x, x.transpose(1, 2).contiguous().transpose(1, 2)):
        turned = initial.transpose(1, 2).contiguous().transpose(1, 2), weight.T.contiguous().T
        y_view, final_view = causal_conv1d(view, turned[1], bias, turned[0], activation=activation)
        assert_invariant(backend, y_view, y)
        assert_same_bits(final_view, final)


# ---------------------------------------------------------------- states in slots


@examples(sequences, taps, dtypes, st.booleans(), st.randoms())
@pytest.mark.op("causal_conv1d.slots")
def test_slots(backend, lengths, problem, dtype, turned, rnd):
    """Padding sequences, fresh ones and slots of others, in either order of strides."""
    count = len(lengths)
    x, weight, bias, activation = inputs((sum(lengths),), problem, dtype)
    cache = states(count + 2, problem, dtype)
    slots = [rnd.choice([i, -1]) for i in rnd.sample(range(count + 2), count)]
    fresh = [rnd.random() < 0.5 for _ in slots]
    for s, slot in enumerate(slots):
        if fresh[s] and slot >= 0:
            cache[slot] = float("nan")  # what a fresh sequence finds in its slot is not read
    if turned:
        cache = cache.transpose(1, 2).contiguous().transpose(1, 2)
    before = cache.clone()
    indices = torch.tensor(slots, dtype=rnd.choice([torch.int32, torch.int64]), device=DEVICE)
    has_initial = torch.tensor([not f for f in fresh], dtype=torch.bool, device=DEVICE)
    y = causal_conv1d_slots(x, weight, bias, cache, indices, has_initial, ends(lengths), activation=activation)
    for s, (a, slot, n) in enumerate(zip(ends(lengths).tolist(), slots, lengths, strict=False)):
        if slot < 0:
            assert y[a : a + n].count_nonzero() == 0
            continue
        initial = None if fresh[s] else before[slot]
        assert_is_the_convolution(y[a : a + n], cache[slot], x[a : a + n], weight, bias, activation, initial)
    others = [slot for slot in range(len(cache)) if slot not in slots]
    assert_same_bits(cache[others], before[others])


@pytest.mark.op("causal_conv1d.slots")
def test_slots_of_a_batch(backend):
    """Without packing, without has_initial; a NaN slot and a NaN padding sequence stay by themselves."""
    problem = (17, 4, True, "silu")
    x, weight, bias, activation = inputs((4, 2), problem)
    x[1] = float("nan")
    cache = states(5, problem)
    cache[2] = float("nan")
    before = cache.clone()
    y = causal_conv1d_slots(x, weight, bias, cache, torch.tensor([4, -1, 2, 0], device=DEVICE), activation=activation)
    assert y[1].count_nonzero() == 0 and y[2].isnan().all()
    assert_same_bits(cache[[1, 3]], before[[1, 3]])
    for s, slot in ((0, 4), (3, 0)):
        assert_is_the_convolution(y[s], cache[slot], x[s], weight, bias, activation, before[slot])


# ---------------------------------------------------------------- gradients


@examples(taps, st.booleans(), st.booleans(), st.booleans())
@pytest.mark.op("causal_conv1d_bwd")
def test_backward(backend, problem, has_initial, has_grad_final, packed):
    """Every combination of optional arguments, ragged lengths; against float64 autograd."""
    lengths = [9, 0, 1, 5]
    x, weight, bias, activation = inputs((sum(lengths),) if packed else (2, 9), problem)
    cu_seqlens, count = (ends(lengths), 4) if packed else (None, 2)
    initial = states(count, problem) if has_initial else None
    grad_y, grad_final = torch.randn_like(x), states(count, problem) if has_grad_final else None
    args = (x, weight, bias, initial)
    grads = torch.ops.n3.causal_conv1d_bwd.default(grad_y, grad_final, *args, cu_seqlens, activation)
    leaves = [None if t is None else t.double().requires_grad_() for t in args]
    y, final = reference.causal_conv1d(*leaves, cu_seqlens, activation=activation)
    loss = (y * grad_y).sum() + (0 if grad_final is None else (final * grad_final).sum())
    truth = iter(torch.autograd.grad(loss, [t for t in leaves if t is not None]))
    for leaf, grad in zip(leaves, grads, strict=True):
        if leaf is None:
            assert grad.numel() == 0
            continue
        want = next(truth)
        assert grad.shape == leaf.shape and grad.dtype == torch.float32 and grad.is_contiguous()
        assert (grad.double() - want).norm() <= 1e-5 * want.norm()


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("packed", [False, True])
def test_gradcheck(activation, packed):
    problem = (3, 4, True, activation)
    x, weight, bias, _ = inputs((7,) if packed else (2, 5), problem)
    cu_seqlens = ends([2, 5]) if packed else None
    leaves = [t.double().contiguous().requires_grad_() for t in (x, weight, bias, states(2, problem))]
    with use_backend("reference"):
        torch.autograd.gradcheck(lambda *a: causal_conv1d(*a, cu_seqlens, activation=activation), leaves)


def test_either_output_alone_can_be_differentiated():
    x, weight, _, _ = inputs((2, 5), (3, 4, False, None))
    x = x.detach().clone().requires_grad_()
    y, final = causal_conv1d(x, weight)
    (from_y,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    (from_final,) = torch.autograd.grad(final.sum(), x, retain_graph=True)
    (from_both,) = torch.autograd.grad(y.sum() + final.sum(), x)
    torch.testing.assert_close(from_y + from_final, from_both)
    assert_same_bits(from_final[:, 2:], torch.ones(2, 3, 3, device=DEVICE))


# ---------------------------------------------------------------- the framework


@pytest.mark.parametrize("case", ["batched", "packed", "plain", "empty", "one tap"])
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(case, grad):
    packed, plain = case == "packed", case == "plain"
    problem = (3, 1 if case == "one tap" else 4, not plain, None if plain else "silu")
    x, weight, bias, activation = inputs((7,) if packed else (2, 0 if case == "empty" else 7), problem)
    initial, cu_seqlens = None if plain else states(2, problem), ends([3, 4]) if packed else None
    args = (x.requires_grad_(grad), weight, bias, initial, cu_seqlens)
    torch.library.opcheck(torch.ops.n3.causal_conv1d.default, args, {"activation": activation})


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("full", [False, True])
def test_opcheck_slots_and_backward(packed, full):
    problem = (3, 4, full, "silu" if full else None)
    x, weight, bias, activation = inputs((7,) if packed else (2, 7), problem)
    cu_seqlens = ends([3, 4]) if packed else None
    indices, fresh = torch.tensor([3, 1], device=DEVICE), torch.tensor([True, False], device=DEVICE)
    args = (x, weight, bias, states(4, problem), indices, fresh if full else None, cu_seqlens)
    torch.library.opcheck(torch.ops.n3.causal_conv1d.slots, args, {"activation": activation})
    initial, grad_final = (states(2, problem), states(2, problem)) if full else (None, None)
    args = (torch.randn_like(x), grad_final, x, weight, bias, initial, cu_seqlens, activation)
    torch.library.opcheck(torch.ops.n3.causal_conv1d_bwd.default, args)


@pytest.mark.parametrize("dynamic", [False, True])
@torch._dynamo.config.patch(error_on_recompile=True)
def test_compiles_without_a_break(dynamic):
    """Prefill, slots and backward in one graph; with dynamic shapes one graph serves every length."""

    def step(x, weight, bias, cache, indices):
        y, final = causal_conv1d(x, weight, bias, activation="silu")
        z = causal_conv1d_slots(x.detach(), weight, bias, cache, indices, activation="silu")
        return y.square().sum() + final.sum(), z

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    problem = (17, 4, True, "silu")
    for length in (5, 11) if dynamic else (5,):  # sizes that agree would be taken to be one
        x, weight, bias, _ = inputs((2, length), problem)
        x, indices, cache = x.detach().clone().requires_grad_(), torch.tensor([2, 0], device=DEVICE), states(3, problem)
        outcome = []
        for run in (step, compiled):
            state = cache.clone()
            loss, y = run(x, weight, bias, state, indices)
            outcome.append((loss, y, state, *torch.autograd.grad(loss, x)))
        torch.testing.assert_close(*outcome)


# ---------------------------------------------------------------- bad calls

GOOD = {"x": torch.zeros(2, 5, 6), "weight": torch.zeros(6, 4), "bias": torch.zeros(6)}
I32 = torch.int32
BAD = [
    ({"x": torch.zeros(5, 6)}, "x must have 3 dimensions without cu_seqlens, got 2"),
    ({"cu_seqlens": torch.zeros(3, dtype=I32)}, "x must have 2 dimensions with cu_seqlens, got 3"),
    ({"x": torch.zeros(2, 5, 6, dtype=I32)}, "x must be float32, float16 or bfloat16, got int32"),
    ({"weight": torch.zeros(6, 1, 4)}, "weight must have 2 dimensions, got 3"),
    ({"weight": torch.zeros(5, 4)}, "weight must have shape [6, 4], got [5, 4]"),
    ({"weight": torch.zeros(6, 0)}, "weight must have at least 1 tap, got 0"),
    ({"weight": torch.zeros(6, 4, dtype=I32)}, "weight must be float32, float16 or bfloat16, got int32"),
    ({"bias": torch.zeros(5)}, "bias must have shape [6], got [5]"),
    ({"bias": torch.zeros(6, dtype=I32)}, "bias must be float32, float16 or bfloat16, got int32"),
    ({"activation": "gelu"}, "activation must be one of None, silu, got gelu"),
]
BAD_DEFAULT = BAD + [
    ({"initial_state": torch.zeros(2, 6, 4)}, "initial_state must have shape [2, 6, 3], got [2, 6, 4]"),
    ({"initial_state": torch.zeros(2, 6, 3).half()}, "initial_state must have the dtype of x (float32), got float16"),
]
BAD_SLOTS = BAD + [
    ({"conv_state": torch.zeros(6, 3)}, "conv_state must have 3 dimensions, got 2"),
    ({"conv_state": torch.zeros(3, 5, 4)}, "conv_state must have shape [3, 6, 4], got [3, 5, 4]"),
    ({"conv_state": torch.zeros(3, 6, 2)}, "conv_state must hold at least 3 inputs, got 2"),
    ({"conv_state": torch.zeros(3, 6, 3).half()}, "conv_state must have the dtype of x (float32), got float16"),
    ({"state_indices": torch.zeros(3, dtype=I32)}, "state_indices must have shape [2], got [3]"),
    ({"state_indices": torch.zeros(2)}, "state_indices must be int32 or int64, got float32"),
    ({"has_initial": torch.zeros(3, dtype=torch.bool)}, "has_initial must have shape [2], got [3]"),
    ({"has_initial": torch.zeros(2)}, "has_initial must be bool, got float32"),
]
BAD_PACKED = [
    (torch.zeros(3), "cu_seqlens must be int32, got float32"),
    (torch.zeros(3, 1, dtype=I32), "cu_seqlens must have 1 dimensions, got 2"),
    (torch.zeros(0, dtype=I32), "cu_seqlens must have at least 1 element, got 0"),
]
BAD_VALUES = [[1, 10], [0, 7, 3, 10], [0, 11]]


def message_of(op, call):
    with pytest.raises(RuntimeError) as error:
        op(**{k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in call.items()})
    return str(error.value)


@pytest.mark.parametrize("change, message", BAD_DEFAULT)
@pytest.mark.op("causal_conv1d")
def test_bad_calls(backend, change, message):
    assert message_of(causal_conv1d, {**GOOD, **change}) == f"n3::causal_conv1d: {message}"


@pytest.mark.parametrize("change, message", BAD_SLOTS)
@pytest.mark.op("causal_conv1d.slots")
def test_bad_calls_on_slots(backend, change, message):
    slots = {"conv_state": torch.zeros(3, 6, 3), "state_indices": torch.zeros(2, dtype=I32)}
    assert message_of(causal_conv1d_slots, {**GOOD, **slots, **change}) == f"n3::causal_conv1d: {message}"


@pytest.mark.parametrize("cu_seqlens, message", BAD_PACKED)
@pytest.mark.op("causal_conv1d")
def test_bad_packing(backend, cu_seqlens, message):
    call = {**GOOD, "x": torch.zeros(10, 6), "cu_seqlens": cu_seqlens}
    assert message_of(causal_conv1d, call) == f"n3::causal_conv1d: {message}"


@pytest.mark.parametrize("which", checking(*OPS))
def test_bad_values(which):
    """Where reading a value costs no synchronisation it is checked, and nothing is written."""
    cache = torch.ones(3, 6, 3, device=DEVICE)
    with use_backend(which):
        for values in BAD_VALUES:
            call = {**GOOD, "x": torch.zeros(10, 6), "cu_seqlens": torch.tensor(values, dtype=I32)}
            got = message_of(causal_conv1d, call)
            assert got == f"n3::causal_conv1d: cu_seqlens must rise from 0 to at most the 10 tokens of x, got {values}"
        got = message_of(causal_conv1d_slots, {**GOOD, "conv_state": cache, "state_indices": torch.tensor([0, 3])})
        assert got == "n3::causal_conv1d: state_indices must be below the number of slots 3, got 3"
    assert (cache == 1).all()
