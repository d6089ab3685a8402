"""ssm_update where tokens may be rejected: ragged tokens, trees, and the state of the last accepted token."""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICE, assert_close_to, assert_invariant, assert_same_bits
from hypothesis import strategies as st
from properties import checking, examples, path_to, random_tree
from ssd_problems import dtypes, layouts, magnitude, operands, recurrence, states

from n3kernels import use_backend
from n3kernels.mamba import ssm_update

OPS = ("ssm_update",)
INT = {"dtype": torch.int32, "device": DEVICE}
SMALL = (4, 2, 8, 16)  # heads, groups, head_dim, d_state
PER_TOKEN = ("x", "dt", "B", "C", "z")


def tokens_of(call, where):
    return {name: t if t is None or name not in PER_TOKEN else t[where] for name, t in call.items()}


def poison(call, b, start):
    for name in PER_TOKEN:
        call[name][b, start:] = float("nan")


# ---------------------------------------------------------------- ragged tokens


@examples(st.integers(0, 5), layouts, dtypes, dtypes, st.randoms())
@pytest.mark.parametrize("where", ["same", "one", "each"])
def test_ragged_tokens(backend, where, count, layout, dtype, state_dtype, rnd):
    """Tokens behind num_tokens, here NaN, give zeros and are in no state; without tokens the state read is the last."""
    call, options = operands((4, count), layout, dtype)
    counts = [rnd.randint(0, count) for _ in range(4)]
    state = states(6 + 4 * count, layout, state_dtype)
    source, one = [2, -1, 0, 5], [3, 1, -1, 4]
    each = 6 + torch.arange(4 * count, **INT).view(4, count)
    destination = {"same": None, "one": torch.tensor(one, **INT), "each": each}[where]
    for b, n in enumerate(counts):
        poison(call, b, n)
    before, written = state.clone(), set()
    y = ssm_update(
        state, **call, state_indices=torch.tensor(source, device=DEVICE), dst_state_indices=destination,
        num_tokens=torch.tensor(counts, **INT), **options,
    )  # fmt: skip
    for b, n in enumerate(counts):
        assert y[b, n if source[b] >= 0 else 0 :].count_nonzero() == 0
        if source[b] < 0:
            continue
        slots = {"same": [source[b]], "one": [one[b]], "each": each[b, :n].tolist()}[where]
        for t, slot in enumerate(slots, start=1) if where == "each" else [(n, slots[0])]:
            prefix, initial = tokens_of(call, (slice(b, b + 1), slice(0, t))), before[source[b]][None]
            (true_y, truth), (y_size, size) = (f(prefix, options, initial) for f in (recurrence, magnitude))
            assert_close_to(y[b, :t], true_y[0], 1e-5, y_size[0])
            if slot >= 0:
                assert_close_to(state[slot], truth[0], 1e-5, size[0])
                written.add(slot)
                if t == 0:
                    assert_same_bits(state[slot], before[source[b]])
    others = [s for s in range(len(state)) if s not in written]
    assert_same_bits(state[others], before[others])


def test_ragged_tokens_have_the_bits_of_fewer(backend):
    call, options = operands((3, 4), SMALL)
    state = states(3, SMALL)
    before = state.clone()
    y = ssm_update(state, **call, num_tokens=torch.tensor([4, 1, 2], **INT), **options)
    for b, n in enumerate((4, 1, 2)):
        alone = before[b : b + 1].clone()
        fewer = tokens_of(call, (slice(b, b + 1), slice(n)))
        assert_invariant(backend, y[b : b + 1, :n], ssm_update(alone, **fewer, **options))
        assert_invariant(backend, state[b], alone[0])


# ---------------------------------------------------------------- trees


@examples(st.integers(1, 6), layouts, dtypes, dtypes, st.randoms())
def test_a_token_of_a_tree_is_the_end_of_its_path(backend, count, layout, dtype, state_dtype, rnd):
    """Output and state after each token have the bits of a chain along its path."""
    call, options = operands((2, count), layout, dtype)
    parents = random_tree(rnd, 2, count)
    state = states(2 + 2 * count, layout, state_dtype)
    before, each = state.clone(), 2 + torch.arange(2 * count, **INT).view(2, count)
    y = ssm_update(state, **call, dst_state_indices=each, parents=parents, **options)
    for b in range(2):
        t = rnd.randrange(count)
        path = path_to(parents[b].tolist(), t)
        alone, chain = before[b : b + 1].clone(), tokens_of(call, (slice(b, b + 1), path))
        y_path = ssm_update(alone, **chain, **options)
        assert_invariant(backend, y[b, t], y_path[0, -1])
        assert_invariant(backend, state[each[b, t]], alone[0])
        (true_y, truth), (y_size, size) = (f(chain, options, before[b : b + 1]) for f in (recurrence, magnitude))
        assert_close_to(y[b, t], true_y[0, -1], 1e-5, y_size[0, -1])
        assert_close_to(state[each[b, t]], truth[0], 1e-5, size[0])
    assert_same_bits(state[:2], before[:2])


def test_a_chain_is_a_tree(backend):
    call, options = operands((2, 4), SMALL)
    state = states(10, SMALL)
    each, chain = 2 + torch.arange(8, **INT).view(2, 4), (torch.arange(4, **INT) - 1).expand(2, 4)
    other = state.clone()
    y = ssm_update(state, **call, dst_state_indices=each, **options)
    assert_same_bits(ssm_update(other, **call, dst_state_indices=each, parents=chain, **options), y)
    assert_same_bits(other, state)


def test_a_tree_with_padding(backend):
    """Parents of padding tokens and of padding sequences may be anything; their inputs, here NaN, are not read."""
    call, options = operands((2, 3), SMALL)
    state = states(8, SMALL)
    state[0] = float("nan")
    poison(call, 0, 2), poison(call, 1, 0)
    before = state.clone()
    parents = torch.tensor([[-1, 0, 77], [5, -9, 3]], **INT)
    source, each = torch.tensor([1, -1], **INT), torch.tensor([[2, 3, 4], [5, 6, 7]], **INT)
    counts = torch.tensor([2, 3], **INT)
    y = ssm_update(
        state, **call, state_indices=source, dst_state_indices=each, num_tokens=counts, parents=parents, **options
    )
    assert y[0, 2].count_nonzero() == 0 and y[1].count_nonzero() == 0
    true_y, truth = recurrence(tokens_of(call, (slice(0, 1), slice(0, 2))), options, before[1][None])
    assert_close_to(y[0, :2], true_y[0])
    assert_close_to(state[3], truth[0])
    assert_same_bits(state[[0, 1, 4, 5, 6, 7]], before[[0, 1, 4, 5, 6, 7]])


# ---------------------------------------------------------------- decoding with drafts


@examples(layouts, st.integers(1, 4), st.integers(1, 3), st.randoms())
def test_the_state_of_the_last_accepted_token(backend, layout, columns, count, rnd):
    """With indices [B, n] sequence b goes on from slot [b, num_accepted - 1], and by default writes there."""
    call, options = operands((3, count), layout)
    state = states(3 * columns, layout)
    indices = torch.tensor(rnd.sample(range(3 * columns), 3 * columns), device=DEVICE).view(3, columns)
    accepted = torch.tensor([rnd.randint(1, columns) for _ in range(3)], **INT)
    indices[1, accepted[1] - 1] = -1
    read = indices[torch.arange(3), accepted.long() - 1]
    expected = state.clone()
    want = ssm_update(expected, **call, state_indices=read, **options)
    y = ssm_update(state, **call, state_indices=indices, num_accepted=accepted, **options)
    assert_invariant(backend, y, want)
    assert_invariant(backend, state, expected)


@examples(st.randoms())
def test_rejected_tokens_leave_no_trace(backend, rnd):
    """Six calls of four tokens, of which any number is accepted, have the bits of decoding the accepted ones."""
    state, plain = states(2 * 8, SMALL), states(2, SMALL)
    state[[0, 8]] = plain
    old, accepted = torch.tensor([[0, 1, 2, 3], [8, 9, 10, 11]], device=DEVICE), torch.tensor([1, 1], **INT)
    for _ in range(6):
        call, options = operands((2, 4), SMALL)
        new = torch.where(old % 8 < 4, old + 4, old - 4)  # the two halves in turn
        y = ssm_update(state, **call, state_indices=old, dst_state_indices=new, num_accepted=accepted, **options)
        accepted = torch.tensor([rnd.randint(1, 4) for _ in range(2)], **INT)
        for b, n in enumerate(accepted.tolist()):
            kept = tokens_of(call, (slice(b, b + 1), slice(n)))
            assert_invariant(backend, y[b : b + 1, :n], ssm_update(plain[b : b + 1], **kept, **options))
            assert_invariant(backend, state[new[b, n - 1]], plain[b])
        old = new


# ---------------------------------------------------------------- the framework

TREE = torch.tensor([[-1, 0, 0], [-1, -1, 1]], dtype=torch.int32)
USES = {
    "ragged": {"num_tokens": torch.tensor([3, 1], dtype=torch.int32)},
    "slots": {"state_indices": torch.tensor([[0, 1], [2, 3]]), "num_accepted": torch.tensor([2, 1], dtype=torch.int32)},
    "tree": {"dst_state_indices": torch.tensor([[4, 5, 6], [7, 8, -1]]), "parents": TREE},
}


@pytest.mark.parametrize("use", USES)
def test_a_sequence_does_not_see_the_others(backend, use):
    """The second sequence is NaN; the first has the bits it has in other company."""
    call, options = operands((2, 3), SMALL)
    options |= {k: v.to(DEVICE) for k, v in USES[use].items()}
    state = states(9, SMALL)
    other = state.clone()
    y = ssm_update(state, **call, **options)
    poison(call, 1, 0)
    other[2 if use == "slots" else 1] = float("nan")
    assert_invariant(backend, ssm_update(other, **call, **options)[0], y[0])
    first = {"ragged": [0], "slots": [1], "tree": [4, 5, 6]}[use]
    assert_invariant(backend, other[first], state[first])


@pytest.mark.parametrize("use", USES)
def test_opcheck(use):
    call, options = operands((2, 3), (2, 1, 4, 3))
    options |= {k: v.to(DEVICE) for k, v in USES[use].items()}
    torch.library.opcheck(torch.ops.n3.ssm_update.default, (states(9, (2, 1, 4, 3)), *call.values()), options)


# ---------------------------------------------------------------- bad calls

GOOD = {
    "state": torch.ones(3, 6, 4, 8), "x": torch.zeros(2, 3, 6, 4), "dt": torch.zeros(2, 3, 6), "A": torch.zeros(6),
    "B": torch.zeros(2, 3, 3, 8), "C": torch.zeros(2, 3, 3, 8),
}  # fmt: skip
ONES, EACH = torch.ones(2, dtype=torch.int32), torch.tensor([[0, 1, 2], [-1, -1, -1]])
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
    ({"num_accepted": ONES}, "state_indices must be given with num_accepted, got None"),
    ({"num_accepted": ONES, "state_indices": ONES}, "state_indices must have 2 dimensions with num_accepted, got 1"),
]  # fmt: skip
BAD_VALUES = [
    ({"num_tokens": torch.tensor([0, 4])}, "num_tokens must be between 0 and T=3, got 4"),
    ({"num_tokens": torch.tensor([-1, 0])}, "num_tokens must be between 0 and T=3, got -1"),
    ({"num_accepted": torch.tensor([1, 3]), "state_indices": torch.zeros(2, 2)},
     "num_accepted must be between 1 and 2, got 3"),
    ({"num_accepted": torch.tensor([0, 1]), "state_indices": torch.zeros(2, 2)},
     "num_accepted must be between 1 and 2, got 0"),
    ({"state_indices": torch.tensor([[0, 3], [1, 2]]), "num_accepted": torch.ones(2)},
     "state_indices must be below the number of slots 3, got 3"),
    ({"parents": torch.tensor([[-1, 0, 2], [-1, 0, 1]]), "dst_state_indices": EACH},
     "parents must be between -1 and t - 1 for token t, got 2 for token 2"),
    ({"parents": torch.tensor([[-1, 0, 1], [-1, -2, 1]]), "dst_state_indices": EACH},
     "parents must be between -1 and t - 1 for token t, got -2 for token 1"),
]  # fmt: skip


def message_of(change):
    call = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in {**GOOD, **change}.items()}
    before = call["state"].clone()
    with pytest.raises(RuntimeError) as error:
        ssm_update(**call)
    assert_same_bits(call["state"], before)  # nothing is written
    return str(error.value)


@pytest.mark.parametrize("change, message", BAD)
def test_bad_calls(backend, change, message):
    assert message_of(change) == f"n3::ssm_update: {message}"


@pytest.mark.parametrize("change, message", BAD_VALUES)
@pytest.mark.parametrize("which", checking(*OPS))
def test_bad_values(which, change, message):
    """Where reading a value costs no synchronisation it is checked."""
    with use_backend(which):
        assert message_of({name: t.int() for name, t in change.items()}) == f"n3::ssm_update: {message}"
