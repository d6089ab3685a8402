from __future__ import annotations

import math

import pytest
import torch
from conftest import DEVICE, assert_close_to, assert_invariant, assert_same_bits
from hypothesis import strategies as st
from properties import checking, examples
from ssd_problems import PLAIN, PUBLISHED, dtypes, layouts, magnitude, operands, recurrence, states, variants, widened

from n3kernels import use_backend
from n3kernels.mamba import reference_decode, ssm_update

OPS = ("ssm_update",)
SMALL = (4, 2, 8, 16)  # heads, groups, head_dim, d_state
PER_TOKEN = ("x", "dt", "B", "C", "z")

# batch and tokens, 0 included; layout; dtypes of x and of the state; options
problems = st.tuples(st.integers(0, 4), st.integers(0, 6), layouts, dtypes, dtypes, variants)


def tokens_of(call, where):
    return {name: t if t is None or name not in PER_TOKEN else t[where] for name, t in call.items()}


# ---------------------------------------------------------------- the definition


@examples(problems, st.booleans())
def test_agrees_with_the_definition(backend, problem, strided):
    batch, tokens, layout, dtype, state_dtype, variant = problem
    call, options = operands((batch, tokens), layout, dtype, variant)
    cache = states(2 * batch + 1, layout, state_dtype)
    state = cache[1::2] if strided else cache[:batch]
    before = state.double()
    y = ssm_update(state, **call, **options)
    (true_y, true_final), (y_size, final_size) = (f(call, options, before) for f in (recurrence, magnitude))
    assert y.dtype == dtype and y.is_contiguous()
    assert_close_to(y, true_y, 1e-5, y_size)
    assert_close_to(state, true_final, 1e-5, final_size)


@pytest.mark.parametrize("dt_max, step", [(None, 2.0), (1.0, 1.0)])
def test_the_definition_by_hand(dt_max, step):
    """One of everything, dt = softplus(log(e^2 - 1)) = 2: the two references share code, this shares none of it."""
    one = {name: torch.tensor([[[v]]]).double() for name, v in (("x", 5.0), ("B", 7.0), ("C", 11.0), ("z", 0.5))}
    A, D, dt_bias = (torch.tensor([v], dtype=torch.double) for v in (-0.3, 13.0, 0.75))
    dt = torch.tensor([[math.log(math.e**2 - 1) - 0.75]], dtype=torch.double)
    state = torch.full((1, 1, 1, 1), 3.0, dtype=torch.double)
    y = reference_decode.ssm_update(state, **one, dt=dt, A=A, D=D, dt_bias=dt_bias, dt_max=dt_max)
    S = math.exp(-0.3 * step) * 3 + step * 5 * 7
    assert state.item() == pytest.approx(S, rel=1e-14)
    assert y.item() == pytest.approx((11 * S + 13 * 5) * 0.5 / (1 + math.exp(-0.5)), rel=1e-14)


@pytest.mark.parametrize("layout", PUBLISHED.values(), ids=PUBLISHED)
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_published_shapes(backend, layout, state_dtype):
    call, options = operands((2, 1), layout, torch.bfloat16)
    state = states(2, layout, state_dtype)
    before = state.clone()
    y = ssm_update(state, **tokens_of(call, (slice(None), 0)), **options)
    (true_y, true_final), (y_size, final_size) = (f(call, options, before) for f in (recurrence, magnitude))
    assert_close_to(y, true_y[:, 0], 1e-5, y_size[:, 0])
    assert_close_to(state, true_final, 1e-5, final_size)


# ---------------------------------------------------------------- invariants


@examples(layouts, dtypes, variants, st.integers(1, 6))
def test_many_tokens_are_many_calls(backend, layout, dtype, variant, tokens):
    """The state is carried in float32, so that with a float32 state nothing tells T tokens from T calls."""
    call, options = operands((3, tokens), layout, dtype, variant)
    at_once = states(3, layout)
    one_by_one = at_once.clone()
    y = ssm_update(at_once, **call, **options)
    for t in range(tokens):
        y_t = ssm_update(one_by_one, **tokens_of(call, (slice(None), t)), **options)
        assert_invariant(backend, y[:, t], y_t)
    assert_invariant(backend, at_once, one_by_one)


@examples(layouts, dtypes, dtypes, st.integers(0, 5))
def test_a_state_per_token(backend, layout, dtype, state_dtype, tokens):
    """Each draft token's state in its own slot, rounded when stored and not before; a negative slot is not written."""
    call, options = operands((2, tokens), layout, dtype)
    state = states(3 + 2 * tokens, layout, state_dtype)
    before = state.clone()
    source = torch.tensor([2, 0], device=DEVICE)
    slots = torch.arange(3, 3 + 2 * tokens, device=DEVICE, dtype=torch.int32).view(2, tokens)
    slots[1, 1::2] = -1
    y = ssm_update(state, **call, state_indices=source, dst_state_indices=slots, **options)
    untouched = torch.ones(len(state), dtype=torch.bool)
    for t in range(tokens):
        prefix = tokens_of(call, (slice(None), slice(0, t + 1)))
        (true_y, true_state), (y_size, size) = (f(prefix, options, before[[2, 0]]) for f in (recurrence, magnitude))
        assert_close_to(y[:, t], true_y[:, t], 1e-5, y_size[:, t])
        for b in range(2):
            if (slot := int(slots[b, t])) >= 0:
                untouched[slot] = False
                assert_close_to(state[slot], true_state[b], 1e-5, size[b])
    assert_same_bits(state[untouched], before[untouched])


def test_states_are_read_before_they_are_written(backend):
    """Two sequences swap slots, and two continue from one."""
    call, options = operands((4, 2), SMALL)
    state = states(4, SMALL)
    before = state.clone()
    source, destination = (torch.tensor(i, device=DEVICE) for i in ([0, 1, 2, 2], [1, 0, 3, 2]))
    ssm_update(state, **call, state_indices=source, dst_state_indices=destination, **options)
    _, truth = recurrence(call, options, before[source])
    assert_close_to(state[destination], truth)


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_padding_touches_nothing(backend, index):
    """A padding sequence, NaN all over, gives zeros and neither reads nor writes, even with a destination given."""
    call, options = operands((3, 2), SMALL)
    for name in PER_TOKEN:
        call[name][1] = float("nan")
    state = states(5, SMALL)
    state[0] = float("nan")
    before = state.clone()
    source, destination = (torch.tensor(i, dtype=index, device=DEVICE) for i in ([4, -1, 2], [1, 3, -1]))
    y = ssm_update(state, **call, state_indices=source, dst_state_indices=destination, **options)
    true_y, true_state = recurrence(tokens_of(call, [0, 2]), options, before[[4, 2]])
    assert y[1].count_nonzero() == 0
    assert_close_to(y[[0, 2]], true_y)
    assert_close_to(state[1], true_state[0])
    assert_same_bits(state[[0, 2, 3, 4]], before[[0, 2, 3, 4]])


def test_a_state_of_no_elements_is_no_padding(backend):
    call, options = operands((3,), (4, 2, 8, 0))
    state = states(3, (4, 2, 8, 0))
    truth = call["x"] * call["D"][:, None] * torch.nn.functional.silu(call["z"])
    assert_close_to(ssm_update(state, **call, **options), truth.double(), 1e-5, truth.double().abs())


def test_a_sequence_does_not_see_the_others(backend):
    """Alone or beside a NaN state and NaN inputs: the same bits."""
    call, options = operands((4, 3), SMALL)
    call["x"][1] = float("nan")
    state = states(4, SMALL)
    state[2] = float("nan")
    before = state.clone()
    y = ssm_update(state, **call, **options)
    assert y[1].isnan().all() and y[2].isnan().all()
    for b in (0, 3):
        alone = before[b : b + 1].clone()
        assert_invariant(backend, y[b], ssm_update(alone, **tokens_of(call, slice(b, b + 1)), **options)[0])
        assert_invariant(backend, state[b], alone[0])


@pytest.mark.parametrize("softplus, dt", [(False, 0.0), (True, -300.0)])
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_time_leaves_the_state_alone(backend, softplus, dt, state_dtype):
    call, options = operands((2, 3), SMALL, variant=("none", False, False, softplus, (0.0, None)))
    call["dt"].fill_(dt)
    state = states(2, SMALL, state_dtype)
    before = state.clone()
    ssm_update(state, **call, **options)
    assert_same_bits(state, before)


def test_a_long_time_step_forgets(backend):
    call, options = operands((2, 1), SMALL, variant=("none", False, False, True, (0.0, None)))
    call["dt"].fill_(1e3)
    call["A"].fill_(-16.0)
    state = states(2, SMALL)
    y = ssm_update(state, **call, **options)
    B = call["B"][:, 0].repeat_interleave(2, dim=1)
    torch.testing.assert_close(state, 1e3 * call["x"][:, 0, :, :, None] * B[:, :, None], rtol=1e-6, atol=0)
    assert y.isfinite().all()


@pytest.mark.parametrize("dt", [-10.0, -20.0, -80.0, 19.999, 20.001])
def test_softplus_keeps_its_digits(backend, dt):
    call, options = operands((1, 1), SMALL, variant=("none", False, False, True, (0.0, None)))
    call["dt"].fill_(dt)
    state = torch.zeros_like(states(1, SMALL))
    ssm_update(state, **call, **options)
    torch.testing.assert_close(state.double(), recurrence(call, options)[1], rtol=1e-5, atol=1e-43)
    assert state.count_nonzero() == state.numel()


def test_operands_are_read_in_place(backend):
    """Column slices of one projection and packed copies, a state with its slots innermost: the same bits."""
    call, options = operands((3, 2), SMALL)
    copies = {name: None if t is None else t.contiguous() for name, t in call.items()}
    state = states(3, SMALL)
    turned = state.movedim(0, -1).contiguous().movedim(-1, 0)
    assert not call["x"].is_contiguous() and not turned.is_contiguous()
    assert_invariant(backend, ssm_update(turned, **call, **options), ssm_update(state, **copies, **options))
    assert_invariant(backend, turned, state)


# ---------------------------------------------------------------- the framework


@pytest.mark.parametrize("tokens", [None, 0, 2])
@pytest.mark.parametrize("full", [False, True])
def test_opcheck(tokens, full):
    layout = (2, 1, 4, 3)
    call, options = operands((2, 1 if tokens is None else tokens), layout, torch.float32, PLAIN)
    if tokens is None:
        call = tokens_of(call, (slice(None), 0))
    args = tuple(call.values()) if full else tuple(call.values())[:5]
    indices = ()
    if full:
        per_token = torch.arange(2 * (tokens or 1), device=DEVICE).view(2, -1)
        indices = (torch.tensor([3, -1], device=DEVICE), per_token if tokens else torch.tensor([1, 0], device=DEVICE))
    torch.library.opcheck(torch.ops.n3.ssm_update.default, (states(4, layout), *args, *indices), options)


@pytest.mark.parametrize("dynamic", [False, True])
@torch._dynamo.config.patch(error_on_recompile=True)
def test_compiles_without_a_break(dynamic):
    def step(state, call, indices):
        return ssm_update(state, **call, state_indices=indices).sin()

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    layout = (6, 3, 7, 16)
    for batch in (10, 11) if dynamic else (10,):  # sizes that agree would be taken to be one
        call, _ = operands((batch, 2), layout)
        eager_state, indices = states(12, layout), torch.arange(batch, device=DEVICE)
        state = eager_state.clone()
        torch.testing.assert_close(compiled(state, call, indices), step(eager_state, call, indices))
        assert_same_bits(state, eager_state)


def test_float64_is_kept():
    call, options = operands((2, 3), SMALL)
    state = states(2, SMALL).double()
    _, truth = recurrence(call, options, state)
    with use_backend("reference"):
        y = ssm_update(state, **widened(call), **options)
    assert y.dtype == torch.double
    assert_same_bits(state, truth)


# ---------------------------------------------------------------- bad calls

GOOD = {
    "state": torch.ones(3, 6, 4, 8), "x": torch.zeros(2, 5, 6, 4), "dt": torch.zeros(2, 5, 6), "A": torch.zeros(6),
    "B": torch.zeros(2, 5, 3, 8), "C": torch.zeros(2, 5, 3, 8),
}  # fmt: skip
STORED = "float32, float16, bfloat16, int8 or float8_e4m3fn"
BAD = [
    ({"x": torch.zeros(6, 4)}, "x must have 3 or 4 dimensions, got 2"),
    ({"x": torch.zeros(2, 5, 6, 4, dtype=torch.int32)}, "x must be float32, float16 or bfloat16, got int32"),
    ({"dt": torch.zeros(2, 6)}, "dt must have shape [2, 5, 6], got [2, 6]"),
    ({"A": torch.zeros(6, 4, 8)}, "A must have shape [6], got [6, 4, 8]"),
    ({"B": torch.zeros(2, 3, 8)}, "B must have 4 dimensions, got 3"),
    ({"B": torch.zeros(2, 5, 4, 8)}, "groups of B must divide the 6 heads of x, got 4"),
    ({"C": torch.zeros(2, 5, 3, 7)}, "C must have shape [2, 5, 3, 8], got [2, 5, 3, 7]"),
    ({"D": torch.zeros(5)}, "D must have shape [6], got [5]"),
    ({"z": torch.zeros(2, 6, 4)}, "z must have shape [2, 5, 6, 4], got [2, 6, 4]"),
    ({"dt_bias": torch.zeros(6, 4)}, "dt_bias must have shape [6], got [6, 4]"),
    ({"dt_min": 0.5, "dt_max": 0.25}, "dt_max must be at least dt_min (0.5), got 0.25"),
    ({"state": torch.zeros(6, 4, 8)}, "state must have 4 dimensions, got 3"),
    ({"state": torch.zeros(3, 6, 4, 7)}, "state must have shape [3, 6, 4, 8], got [3, 6, 4, 7]"),
    ({"state": torch.zeros(3, 6, 4, 8).int()}, f"state must be {STORED}, got int32"),
    ({"state": torch.zeros(1, 6, 4, 8)}, "state must have at least 2 slots without state_indices, got 1"),
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
        assert message_of(change) == f"n3::ssm_update: {message}"
