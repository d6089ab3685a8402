"""causal_conv1d_update where tokens may be rejected: its three uses of a state against lists of what was said."""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICE, assert_close_to, assert_invariant, assert_same_bits, fenced
from hypothesis import strategies as st
from properties import checking, examples, path_to, random_tree

from n3kernels import use_backend
from n3kernels.mamba import causal_conv1d_update_slots

OPS = ("causal_conv1d_update",)
INT = {"dtype": torch.int32, "device": DEVICE}

# channels; width; dtype; bias; activation
taps = st.tuples(
    st.sampled_from([1, 3, 17, 40]), st.integers(1, 5), st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    st.booleans(), st.sampled_from([None, "silu"]),
)  # fmt: skip
SMALL = (17, 4, torch.float32, True, "silu")


def weights(problem):
    channels, width, dtype, biased, activation = problem
    weight = fenced(torch.randn(channels, width, device=DEVICE).to(dtype))
    return weight, fenced(torch.randn(channels, device=DEVICE).to(dtype)) if biased else None, activation


def tokens(batch, count, problem):
    """A column slice of a wider matrix, as of a projection."""
    channels, dtype = problem[0], problem[2]
    return fenced(torch.randn(batch, count, channels + 5, device=DEVICE).to(dtype))[..., 3 : 3 + channels]


def states(slots, length, problem):
    return fenced(torch.randn(slots, problem[0], length, device=DEVICE).to(problem[2]))


def assert_is_the_output(y, said, weight, bias, activation):
    """``y`` [C] from ``said`` [n, C], all raw inputs up to its own, in float64."""
    width = weight.shape[1]
    terms = said[len(said) - width :].double().T * weight.double()
    truth, size = terms.sum(1), terms.abs().sum(1) + 1e-3
    if bias is not None:
        truth, size = truth + bias.double(), size + bias.double().abs()
    assert_close_to(y, torch.nn.functional.silu(truth) if activation else truth, 1e-6, size)


# ---------------------------------------------------------------- shift: the last K inputs, oldest first


@examples(taps, st.integers(0, 5), st.integers(0, 4), st.sampled_from(["same", "one", "each"]), st.randoms())
def test_ragged_tokens_and_longer_states(backend, problem, count, more, where, rnd):
    """Tokens behind num_tokens, here NaN, give zeros and are in no state; a state may hold more than the taps need."""
    weight, bias, activation = weights(problem)
    x, length = tokens(3, count, problem), problem[1] - 1 + more
    counts = [rnd.randint(0, count) for _ in range(3)]
    for b, n in enumerate(counts):
        x[b, n:] = float("nan")
    state = states(4 + 3 * count, length, problem)
    before, source = state.clone(), torch.tensor([2, -1, 0], device=DEVICE)
    each = 4 + torch.arange(3 * count, device=DEVICE, dtype=torch.int32).view(3, count)
    destination = {"same": None, "one": torch.tensor([3, 1, -1], **INT), "each": each}[where]
    y = causal_conv1d_update_slots(
        x, state, weight, bias, source, destination, num_tokens=torch.tensor(counts, **INT), activation=activation
    )
    expected = before.clone()
    for b, n in enumerate(counts):
        if source[b] < 0:
            assert y[b].count_nonzero() == 0
            continue
        said = torch.cat([before[source[b]].T, x[b, :n]])
        assert y[b, n:].count_nonzero() == 0
        for t in range(n):
            assert_is_the_output(y[b, t], said[: length + t + 1], weight, bias, activation)
            if where == "each":
                expected[each[b, t]] = said[t + 1 : t + 1 + length].T
        slot = {"same": int(source[b]), "one": [3, 1, -1][b], "each": -1}[where]
        if slot >= 0:
            expected[slot] = said[n : n + length].T
    assert_same_bits(state, expected)


@examples(taps, st.integers(1, 6), st.integers(0, 2), st.randoms())
def test_a_token_of_a_tree_is_the_end_of_its_path(backend, problem, count, more, rnd):
    """Output and state after each token have the bits of a chain along its path."""
    weight, bias, activation = weights(problem)
    x, parents = tokens(2, count, problem), random_tree(rnd, 2, count)
    state = states(2 + 2 * count, problem[1] - 1 + more, problem)
    before = state.clone()
    each = 2 + torch.arange(2 * count, **INT).view(2, count)
    y = causal_conv1d_update_slots(x, state, weight, bias, None, each, parents=parents, activation=activation)
    for b in range(2):
        for t in range(count):
            path = path_to(parents[b].tolist(), t)
            alone = before[b : b + 1].clone()
            y_path = causal_conv1d_update_slots(x[b : b + 1, path], alone, weight, bias, activation=activation)
            assert_invariant(backend, y[b, t], y_path[0, -1])
            assert_same_bits(state[each[b, t]], alone[0])
            said = torch.cat([before[b].T, x[b, path]])
            assert_is_the_output(y[b, t], said, weight, bias, activation)
    assert_same_bits(state[:2], before[:2])


def test_a_tree_with_padding(backend):
    """Parents of padding tokens and of padding sequences may be anything."""
    weight, bias, activation = weights(SMALL)
    x, state = tokens(2, 3, SMALL), states(8, 3, SMALL)
    before = state.clone()
    parents = torch.tensor([[-1, 0, 77], [5, -9, 3]], **INT)
    source, each = torch.tensor([1, -1], **INT), torch.tensor([[2, 3, 4], [5, 6, 7]], **INT)
    counts = torch.tensor([2, 3], **INT)
    y = causal_conv1d_update_slots(
        x, state, weight, bias, source, each, num_tokens=counts, parents=parents, activation=activation
    )
    assert y[0, 2].count_nonzero() == 0 and y[1].count_nonzero() == 0
    assert_same_bits(state[2], torch.cat([before[1], x[0, :1].T], 1)[:, 1:])
    assert_same_bits(state[3], torch.cat([before[1], x[0, :2].T], 1)[:, 2:])
    assert_same_bits(state[[0, 1, 4, 5, 6, 7]], before[[0, 1, 4, 5, 6, 7]])


@examples(taps, st.integers(1, 4), st.integers(1, 3), st.randoms())
def test_the_state_of_the_last_accepted_token(backend, problem, columns, count, rnd):
    """With indices [B, n] sequence b goes on from slot [b, num_accepted - 1], and by default writes there."""
    weight, bias, activation = weights(problem)
    x, state = tokens(3, count, problem), states(3 * columns, problem[1], problem)
    indices = torch.tensor(rnd.sample(range(3 * columns), 3 * columns), device=DEVICE).view(3, columns)
    accepted = torch.tensor([rnd.randint(1, columns) for _ in range(3)], **INT)
    indices[1, accepted[1] - 1] = -1
    read = indices[torch.arange(3), accepted.long() - 1]
    expected = state.clone()
    want = causal_conv1d_update_slots(x, expected, weight, bias, read, activation=activation)
    y = causal_conv1d_update_slots(x, state, weight, bias, indices, num_accepted=accepted, activation=activation)
    assert_invariant(backend, y, want)
    assert_same_bits(state, expected)


# ---------------------------------------------------------------- window: the previous call's tokens


@examples(taps, st.integers(1, 5), st.booleans(), st.randoms())
def test_rejected_tokens_leave_a_window(backend, problem, count, moves, rnd):
    """Ten calls of T tokens with any number accepted, as if the rejected ones had never been said."""
    weight, bias, activation = weights(problem)
    channels, width = problem[:2]
    length = width - 2 + count
    if length < width - 1:
        return  # one tap and one token: no window holds a negative number of inputs
    prompt = tokens(2, 9, problem)
    state = states(5, length, problem)
    slots = [3, 1]
    state[slots] = prompt[:, 9 - length :].transpose(1, 2)
    said, accepted = [prompt[b] for b in range(2)], [count, count]
    for _ in range(10):
        x, counts = tokens(2, count, problem), [rnd.randint(0, count) for _ in range(2)]
        for b, n in enumerate(counts):
            x[b, n:] = float("nan")
        to = [2, 0] if moves and slots == [3, 1] else [3, 1]
        before = state.clone()
        y = causal_conv1d_update_slots(
            x, state, weight, bias, torch.tensor(slots, **INT), torch.tensor(to, **INT) if moves else None,
            num_accepted=torch.tensor(accepted, **INT), num_tokens=torch.tensor(counts, **INT), activation=activation,
        )  # fmt: skip
        slots = to if moves else slots
        for b, n in enumerate(counts):
            whole = torch.cat([said[b], x[b, :n]])
            for t in range(n):
                assert_is_the_output(y[b, t], whole[: len(said[b]) + t + 1], weight, bias, activation)
            assert y[b, n:].count_nonzero() == 0
            if n:  # otherwise the same tokens of the call before are kept again
                accepted[b] = rnd.randint(1, n)
                said[b] = whole[: len(said[b]) + accepted[b]]
        others = [s for s in range(5) if s not in slots]
        assert_same_bits(state[others], before[others])


def test_a_window_keeps_the_columns_of_padding(backend):
    weight, bias, activation = weights(SMALL)
    x, state = tokens(3, 3, SMALL), states(3, 5, SMALL)
    before = state.clone()
    accepted, counts = torch.tensor([2, 3, 1], **INT), torch.tensor([1, 3, 0], **INT)
    causal_conv1d_update_slots(x, state, weight, bias, num_accepted=accepted, num_tokens=counts, activation=activation)
    assert_same_bits(state[0], torch.cat([before[0, :, 2:4], x[0, :1].T, before[0, :, 3:]], 1))
    assert_same_bits(state[1], torch.cat([before[1, :, 3:], x[1].T], 1))
    assert_same_bits(state[2], before[2])


# ---------------------------------------------------------------- ring: input p in column p mod K


@examples(taps, st.integers(0, 5), st.integers(0, 6), st.randoms())
def test_a_ring_goes_back_by_a_number(backend, problem, count, more, rnd):
    """Ten calls, after each of which a sequence forgets some of its tokens."""
    weight, bias, activation = weights(problem)
    channels, width = problem[:2]
    length = width - 1 + more
    state = states(4, length, problem)
    state[[2, 0]] = 0
    silence = torch.zeros(width - 1, channels, dtype=problem[2], device=DEVICE)
    said = [silence, silence]
    for _ in range(10):
        x, counts = tokens(3, count, problem), [rnd.randint(0, count) for _ in range(2)] + [count]
        for b, n in enumerate(counts):
            x[b, n:] = float("nan")
        seen = torch.tensor([len(s) - (width - 1) for s in said] + [3], **INT)
        before = state.clone()
        y = causal_conv1d_update_slots(
            x, state, weight, bias, torch.tensor([2, 0, -1], device=DEVICE), cache_seqlens=seen,
            num_tokens=torch.tensor(counts, **INT), activation=activation,
        )  # fmt: skip
        assert y[2].count_nonzero() == 0
        assert_same_bits(state[[1, 3]], before[[1, 3]])
        for b in range(2):
            start, said[b] = len(said[b]), torch.cat([said[b], x[b, : counts[b]]])
            for t in range(counts[b]):
                assert_is_the_output(y[b, t], said[b][: start + t + 1], weight, bias, activation)
            assert y[b, counts[b] :].count_nonzero() == 0
            # What was overwritten cannot come back: a rejected token must have had a column of its own.
            back = rnd.randint(0, counts[b]) if counts[b] <= more else 0
            said[b] = said[b][: len(said[b]) - back]


def test_a_ring_shorter_than_the_tokens(backend):
    """The last K inputs stay."""
    weight, bias, activation = weights(SMALL)
    x, state = tokens(1, 7, SMALL), states(1, 3, SMALL)
    before = state.clone()
    seen = torch.tensor([4], **INT)
    y = causal_conv1d_update_slots(x, state, weight, bias, cache_seqlens=seen, activation=activation)
    said = torch.cat([before[0, :, [1, 2, 0]].T, x[0]])  # inputs 1, 2, 3
    for t in range(7):
        assert_is_the_output(y[0, t], said[: 3 + t + 1], weight, bias, activation)
    assert_same_bits(state[0], x[0, [5, 6, 4]].T)  # inputs 9, 10, 8


# ---------------------------------------------------------------- what holds for all


USES = {
    "shift": {"num_tokens": torch.tensor([3, 1], dtype=torch.int32)},
    "slots": {"state_indices": torch.tensor([[0, 1], [2, 3]]), "num_accepted": torch.tensor([2, 1], dtype=torch.int32)},
    "tree": {
        "dst_state_indices": torch.tensor([[4, 5, 6], [7, 8, -1]]),
        "parents": torch.tensor([[-1, 0, 0], [-1, -1, 1]], dtype=torch.int32),
    },
    "window": {"num_accepted": torch.tensor([3, 1], dtype=torch.int32)},
    "ring": {"cache_seqlens": torch.tensor([6, 0], dtype=torch.int32)},
}


def call_of(use):
    weight, bias, activation = weights(SMALL)
    args = (tokens(2, 3, SMALL), states(9, 5, SMALL), weight, bias)
    return args, {**{k: v.to(DEVICE) for k, v in USES[use].items()}, "activation": activation}


@pytest.mark.parametrize("use", USES)
def test_a_sequence_does_not_see_the_others(backend, use):
    """The second sequence is NaN; the first has the bits it has in other company."""
    (x, state, *rest), options = call_of(use)
    other = state.clone()
    y = causal_conv1d_update_slots(x, state, *rest, **options)
    x[1] = float("nan")
    other[1 if use not in ("slots",) else 2] = float("nan")
    again = causal_conv1d_update_slots(x, other, *rest, **options)
    assert_invariant(backend, again[0], y[0])
    first = {"shift": [0], "slots": [1], "tree": [4, 5, 6], "window": [0], "ring": [0]}[use]
    assert_same_bits(other[first], state[first])


@pytest.mark.parametrize("use", USES)
def test_any_strides(backend, use):
    (x, state, weight, bias), options = call_of(use)
    turned = state.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    y = causal_conv1d_update_slots(x.contiguous(), state, weight, bias, **options)
    assert_invariant(backend, causal_conv1d_update_slots(x, turned, weight.T.contiguous().T, bias, **options), y)
    assert_same_bits(turned, state)


@pytest.mark.parametrize("use", USES)
def test_opcheck(use):
    args, options = call_of(use)
    torch.library.opcheck(torch.ops.n3.causal_conv1d_update.default, args, options)


# ---------------------------------------------------------------- bad calls

GOOD = {"x": torch.zeros(2, 3, 6), "conv_state": torch.ones(3, 6, 5), "weight": torch.zeros(6, 4)}
I32 = torch.int32
ONES, TREE, EACH = torch.ones(2, dtype=I32), torch.full((2, 3), -1, dtype=I32), torch.tensor([[0, 1, 2], [-1, -1, -1]])
BAD = [
    ({"state_indices": torch.zeros(2, 3).int()}, "state_indices must have shape [2], got [2, 3]"),
    ({"state_indices": torch.zeros(3, 2).int(), "num_accepted": ONES},
     "state_indices must have shape [2, 2], got [3, 2]"),
    ({"state_indices": torch.zeros(2, 2), "num_accepted": ONES}, "state_indices must be int32 or int64, got float32"),
    ({"num_accepted": torch.ones(3).int()}, "num_accepted must have shape [2], got [3]"),
    ({"num_accepted": torch.ones(2)}, "num_accepted must be int32, got float32"),
    ({"num_tokens": torch.ones(2, 1).int()}, "num_tokens must have shape [2], got [2, 1]"),
    ({"num_tokens": torch.ones(2).long()}, "num_tokens must be int32, got int64"),
    ({"parents": torch.zeros(2, 2).int()}, "parents must have shape [2, 3], got [2, 2]"),
    ({"parents": torch.zeros(2, 3)}, "parents must be int32, got float32"),
    ({"parents": TREE}, "dst_state_indices must be given with parents, got None"),
    ({"parents": TREE, "dst_state_indices": ONES}, "dst_state_indices must have 2 dimensions with parents, got 1"),
    ({"cache_seqlens": torch.ones(3).int()}, "cache_seqlens must have shape [2], got [3]"),
    ({"cache_seqlens": torch.ones(2).long()}, "cache_seqlens must be int32, got int64"),
    ({"cache_seqlens": ONES, "dst_state_indices": ONES}, "dst_state_indices must be None with cache_seqlens"),
    ({"cache_seqlens": ONES, "num_accepted": ONES}, "num_accepted must be None with cache_seqlens"),
    ({"num_accepted": ONES, "x": torch.zeros(2, 4, 6)},
     "conv_state must hold W - 2 + T = 6 inputs with num_accepted, got 5"),
    ({"num_accepted": ONES, "dst_state_indices": EACH},
     "dst_state_indices must have 1 dimensions with num_accepted, got 2"),
]  # fmt: skip
BAD_VALUES = [
    ({"num_tokens": torch.tensor([0, 4])}, "num_tokens must be between 0 and T=3, got 4"),
    ({"num_tokens": torch.tensor([-1, 0])}, "num_tokens must be between 0 and T=3, got -1"),
    ({"num_accepted": torch.tensor([1, 0])}, "num_accepted must be between 1 and 3, got 0"),
    ({"num_accepted": torch.tensor([4, 1])}, "num_accepted must be between 1 and 3, got 4"),
    ({"num_accepted": torch.tensor([1, 3]), "state_indices": torch.zeros(2, 2)},
     "num_accepted must be between 1 and 2, got 3"),
    ({"num_accepted": torch.ones(2), "state_indices": torch.zeros(2, 0)},
     "num_accepted must be between 1 and 0, got 1"),
    ({"state_indices": torch.tensor([[0, 3], [1, 2]]), "num_accepted": torch.ones(2)},
     "state_indices must be below the number of slots 3, got 3"),
    ({"cache_seqlens": torch.tensor([0, -1])}, "cache_seqlens must be at least 0, got -1"),
    ({"parents": torch.tensor([[-1, 0, 2], [-1, 0, 1]]), "dst_state_indices": EACH},
     "parents must be between -1 and t - 1 for token t, got 2 for token 2"),
    ({"parents": torch.tensor([[-1, 0, 1], [-1, -2, 1]]), "dst_state_indices": EACH},
     "parents must be between -1 and t - 1 for token t, got -2 for token 1"),
]  # fmt: skip


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
    change = {name: t.int() for name, t in change.items()}
    with use_backend(which):
        assert message_of(change) == f"n3::causal_conv1d_update: {message}"
