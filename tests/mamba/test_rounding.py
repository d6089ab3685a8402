"""How ssm_update stores a state in fewer bits: 16 and 8 of them, to nearest and stochastically, bit for bit.

With dt = 1 and A so negative that nothing remains, the state after a token is x B^T, one rounding in float32.
"""

from __future__ import annotations

import math

import pytest
import torch
from conftest import DEVICE, assert_close_to, assert_same_bits
from hypothesis import given
from hypothesis import strategies as st
from properties import checking, examples
from ssd_problems import magnitude, operands, recurrence, states

from n3kernels import _philox, use_backend
from n3kernels.mamba import rounding, ssm_update

OPS = ("ssm_update",)
INT = {"dtype": torch.int32, "device": DEVICE}
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
NARROW = [torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn]
SHAPE = (2, 3, 5)  # heads, head_dim, d_state: rows that begin anywhere in a group of four random words


# ---------------------------------------------------------------- the contract, written a second time


def grid(dtype):
    """All finite magnitudes of the dtype in order, as float64."""
    if dtype == torch.int8:
        return torch.arange(128, dtype=torch.double, device=DEVICE)
    codes = torch.arange(2**15 if dtype.itemsize == 2 else 2**7, device=DEVICE)
    values = codes.to(torch.int16).view(dtype) if dtype.itemsize == 2 else codes.to(torch.uint8).view(dtype)
    return values.double()[values.double().isfinite()]


def stochastic(v, words, dtype):
    """A neighbour on the grid; float64 holds all quotients exactly."""
    values, a = grid(dtype), v.double().abs()
    lower = torch.bucketize(a.nan_to_num(0.0, 0.0), values, right=True) - 1
    upper = (lower + 1).clamp(max=len(values) - 1)
    width = torch.where(upper > lower, values[upper] - values[lower], 1.0)
    up = (words >> 8).double() / 2**24 < (a - values[lower]) / width
    rounded = torch.where(up, values[upper], values[lower]).copysign(v.double()).to(dtype)
    beyond = ~(a <= values[-1])
    if dtype in LARGEST:
        return torch.where(beyond, v.double().clamp(-values[-1], values[-1]), rounded.double()).to(dtype)
    return torch.where(beyond, v.to(dtype), rounded)


def words_of(slots, seed, step):
    """The random word of every element of the slots, in one list of integers per slot."""
    size, (key, offset) = math.prod(SHAPE), seed.tolist()
    offset = (offset + step) % 2**64
    out = []
    for element in (slot * size + i for slot in slots for i in range(size)):
        counter = (element // 4 % 2**32, element // 2**34, offset % 2**32, offset >> 32)
        out.append(_philox.philox4x32(key % 2**32, key % 2**64 >> 32, *counter)[element % 4])
    return torch.tensor(out, device=DEVICE).view(len(slots), *SHAPE)


def scaled(v, dtype):
    """Quotients and scales of rows; where a value of the row is not finite, zeros and NaN."""
    amax = v.abs().amax(-1)
    scale = torch.where(v.isfinite().all(-1), amax / torch.tensor(LARGEST[dtype], device=DEVICE), float("nan"))
    return torch.where((scale > 0)[..., None], v / scale[..., None], torch.zeros_like(v)), scale


def nearest(v, dtype):
    """To nearest even, saturating where there are 8 bits."""
    if dtype == torch.int8:
        return v.round().clamp(-127, 127).to(dtype)
    return (v.clamp(-448, 448) if dtype in LARGEST else v).to(dtype)


def empty_states(slots, dtype):
    state = torch.zeros(slots, *SHAPE, device=DEVICE).to(dtype)
    return state, torch.zeros(slots, *SHAPE[:2], device=DEVICE) if dtype in LARGEST else None


def store(x, B, state, scale, **options):
    """Makes the state after token t the float32 product x[b, t] B[b, t]^T plus 0 times the one before; returns them."""
    batch, count = x.shape[:2]
    call = {"x": x, "dt": torch.ones(batch, count, SHAPE[0], device=DEVICE), "B": B, "C": torch.zeros_like(B)}
    A = torch.full((SHAPE[0],), -1e4, device=DEVICE)
    ssm_update(state, **call, A=A, state_scale=scale, dt_softplus=False, **options)
    after = [torch.zeros(batch, *SHAPE, device=DEVICE)]
    for t in range(count):
        after.append(0.0 * after[t] + x[:, t, :, :, None] * B[:, t, :, None])
    return torch.stack(after[1:], 1)


def values(rnd, batch, count):
    """x and B whose products reach from the subnormals of the narrow types to what they cannot hold."""
    x = torch.randn(batch, count, *SHAPE[:2]) * 2.0 ** torch.randint(-30, 18, (batch, count, *SHAPE[:2]))
    B = torch.randn(batch, count, 1, SHAPE[2])
    if rnd.random() < 0.3:
        x[rnd.randrange(batch), 0, 0, 0] = rnd.choice([0.0, float("nan"), float("inf"), 1e38, 2.0**-140])
    return x.to(DEVICE), B.to(DEVICE)


# ---------------------------------------------------------------- every backend


@examples(st.randoms())
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_to_nearest(backend, dtype, rnd):
    x, B = values(rnd, 3, 1)
    state, scale = empty_states(4, dtype)
    v = store(x, B, state, scale, state_indices=torch.tensor([2, 0, 3], **INT))[:, 0]
    if dtype in LARGEST:
        v, scales = scaled(v, dtype)
        assert_same_bits(scale[[2, 0, 3]], scales)
        assert_same_bits(scale[1], torch.zeros_like(scale[1]))
    assert_same_value_or_nan(state[[2, 0, 3]], nearest(v, dtype))
    assert not state[1].float().count_nonzero()


def assert_same_value_or_nan(out, truth):
    """The same bits; of NaN, whose sign and payload nothing promises, that it is one."""
    if out.dtype.is_floating_point:
        assert torch.equal(out.float().isnan(), truth.float().isnan())
        out, truth = (torch.where(t.float().isnan(), 0.0, t.float()).to(t.dtype) for t in (out, truth))
    assert_same_bits(out, truth)


@examples(st.integers(-(2**63), 2**63 - 1), st.integers(-(2**63), 2**63 - 3), st.randoms())
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_stochastically(backend, dtype, key, offset, rnd):
    """The very words of Philox: element, slot, token, seed and offset all count."""
    x, B = values(rnd, 2, 2)
    state, scale = empty_states(6, dtype)
    seed, each = torch.tensor([key, offset], device=DEVICE), torch.tensor([[5, 2], [3, -1]], device=DEVICE)
    v = store(x, B, state, scale, dst_state_indices=each, rounding="stochastic", seed=seed)
    for slot, b, t in ((5, 0, 0), (2, 0, 1), (3, 1, 0)):
        truth = v[b, t][None]
        if dtype in LARGEST:
            truth, scales = scaled(truth, dtype)
            assert_same_bits(scale[slot], scales[0])
        assert_same_value_or_nan(state[slot], stochastic(truth, words_of([slot], seed, t), dtype)[0])
    assert not state[[0, 1, 4]].float().count_nonzero()


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_the_token_counts_and_not_the_call(backend, dtype):
    """The last state of a call is rounded with the number of its last token that is not padding."""
    x, B = torch.randn(3, 4, *SHAPE[:2], device=DEVICE), torch.randn(3, 4, 1, SHAPE[2], device=DEVICE)
    state, scale = empty_states(3, dtype)
    seed, counts = torch.tensor([7, 90], device=DEVICE), torch.tensor([4, 2, 1], **INT)
    v = store(x, B, state, scale, rounding="stochastic", seed=seed, num_tokens=counts)
    for b, n in enumerate(counts.tolist()):
        truth = v[b, n - 1][None]
        truth = scaled(truth, dtype)[0] if dtype in LARGEST else truth
        assert_same_bits(state[b], stochastic(truth, words_of([b], seed, n - 1), dtype)[0])


def test_a_seed_of_any_stride(backend):
    (call, options), state = operands((3,), (4, 2, 8, 16)), states(3, (4, 2, 8, 16), torch.bfloat16)
    for seed in (torch.tensor([7, 0, 9], device=DEVICE)[::2], torch.tensor(5, device=DEVICE).expand(2)):
        one, other = state.clone(), state.clone()
        ssm_update(one, **call, rounding="stochastic", seed=seed, **options)
        ssm_update(other, **call, rounding="stochastic", seed=seed.clone(), **options)
        assert_same_bits(one, other)


def test_a_float32_state_is_not_rounded(backend):
    call, options = operands((2, 3), (4, 2, 8, 16))
    exact, drawn = (torch.zeros(2, 4, 8, 16, device=DEVICE) for _ in range(2))
    seed = torch.tensor([1, 2], device=DEVICE)
    y = ssm_update(exact, **call, **options)
    assert_same_bits(ssm_update(drawn, **call, rounding="stochastic", seed=seed, **options), y)
    assert_same_bits(drawn, exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("how", ["nearest", "stochastic"])
def test_what_is_on_the_grid_stays(backend, dtype, how):
    """No time passes, no token comes: a 16-bit state keeps its bits, subnormals, infinities and both zeros included."""
    call, options = operands((3, 2), (2, 1, 4, 16), variant=("none", False, False, False, (0.0, None)))
    call["dt"].zero_()
    state = torch.randn(3, 2, 4, 16, device=DEVICE).to(dtype)
    state[0, 0, :, :2], state[1] = torch.finfo(dtype).tiny / 4, torch.finfo(dtype).max
    state[2, 1, 0, :3] = torch.tensor([0.0, float("inf"), -float("inf")])
    call["x"][2, 0, 1, 0] = 0.0
    before = state.clone()
    seed, counts = torch.tensor([3, 4], device=DEVICE), torch.tensor([2, 0, 0], **INT)
    ssm_update(state, **call, rounding=how, seed=seed, num_tokens=counts, **options)
    assert_same_bits(state, before)


@pytest.mark.parametrize("dtype", LARGEST, ids=str)
def test_eight_bits_are_read_with_their_scale(backend, dtype):
    layout = (4, 2, 8, 16)
    call, options = operands((3, 2), layout)
    codes = nearest(torch.randn(4, 4, 8, 16, device=DEVICE) * LARGEST[dtype] / 3, dtype)
    scale = torch.rand(4, 4, 8, device=DEVICE) + 0.1
    scale[1, 2, 3] = 0.0
    before = (codes.float() * scale[..., None])[[3, 1, 0]]
    y = ssm_update(codes, **call, state_indices=torch.tensor([3, 1, 0], **INT), state_scale=scale, **options)
    (true_y, truth), (y_size, size) = (f(call, options, before) for f in (recurrence, magnitude))
    assert_close_to(y, true_y, 1e-5, y_size)
    step = {torch.int8: 0.5 / 127, torch.float8_e4m3fn: 2.0**-4}[dtype]  # half a step, of the row or of the value
    room = truth.abs().amax(-1, keepdim=True) if dtype == torch.int8 else truth.abs() + scale[[3, 1, 0], ..., None] / 64
    stored = codes[[3, 1, 0]].double() * scale[[3, 1, 0]].double()[..., None]
    assert ((stored - truth).abs() <= 1.001 * step * room + 1e-5 * size).all()


@pytest.mark.parametrize("dtype", LARGEST, ids=str)
def test_eight_bits_with_no_time_keep_their_codes(backend, dtype):
    """The scale of a row whose largest code is the largest of all moves by at most one unit in the last place."""
    x, B = torch.randn(2, 1, *SHAPE[:2], device=DEVICE), torch.randn(2, 1, 1, SHAPE[2], device=DEVICE)
    state, scale = empty_states(2, dtype)
    store(x, B, state, scale)
    codes, scales = state.clone(), scale.clone()
    C = torch.zeros_like(B)
    A, dt = -torch.ones(SHAPE[0], device=DEVICE), torch.zeros(2, 1, SHAPE[0], device=DEVICE)
    ssm_update(state, x, dt, A, B, C, state_scale=scale, dt_softplus=False)
    assert_same_bits(state, codes)
    torch.testing.assert_close(scale, scales, rtol=2**-23, atol=0)


def test_a_row_that_is_not_finite_stays_by_itself(backend):
    """Its scale is NaN, its codes are zeros, and from then on it is NaN; the rows beside it are as without it."""
    x, B = torch.randn(1, 1, *SHAPE[:2], device=DEVICE), torch.randn(1, 1, 1, SHAPE[2], device=DEVICE)
    (state, scale), (other, other_scale) = (empty_states(1, torch.int8) for _ in range(2))
    store(x, B, other, other_scale)
    x[0, 0, 1, 2] = float("inf")
    store(x, B, state, scale)
    assert scale[0, 1, 2].isnan() and scale.isnan().sum() == 1 and not state[0, 1, 2].count_nonzero()
    state[0, 1, 2], scale[0, 1, 2] = other[0, 1, 2], other_scale[0, 1, 2]
    assert_same_bits(state, other)
    assert_same_bits(scale, other_scale)


# ---------------------------------------------------------------- the definition of the draws


@given(st.sampled_from(NARROW), st.randoms())
def test_both_definitions_agree(dtype, rnd):
    v = torch.randn(500, device=DEVICE) * 2.0 ** torch.randint(-140, 20, (500,), device=DEVICE)
    v[:6] = torch.tensor([0.0, -0.0, 65519.0, 65520.0, 500.0, 3.4e38])
    words = torch.randint(2**32, (500,), device=DEVICE)
    assert_same_bits(rounding.round_stochastic(v, words, dtype), stochastic(v, words, dtype))


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_unbiased_and_only_to_neighbours(dtype):
    v = torch.tensor([0.3, -1.3, 2.0**-9 * 0.25, 100.6, -0.0117], device=DEVICE)
    words = _philox.element_words(torch.tensor([5, 6], device=DEVICE), torch.arange(5 * 20000, device=DEVICE))
    drawn = rounding.round_stochastic(v.expand(20000, 5), words.view(20000, 5), dtype).double()
    values = grid(dtype)
    lower = torch.bucketize(v.double().abs(), values, right=True) - 1
    low, high = values[lower], values[lower + 1]
    assert ((drawn.abs() == low) | (drawn.abs() == high)).all()
    deviation = (high - low) / 2 / 20000**0.5
    assert ((drawn.mean(0) - v.double()).abs() <= 4 * deviation).all()


def test_element_words_use_every_bit():
    """Against Philox with integers, for elements and offsets beyond 32 bits."""
    for key, offset, step in ((1, 2, 3), (-1, 2**63 - 1, 5), (2**40 + 9, -(2**35), 2)):
        for element in (0, 3, 7, 2**34 - 1, 2**34, 2**40 + 2):
            o = (offset + step) % 2**64
            counter = (element // 4 % 2**32, element // 2**34, o % 2**32, o >> 32)
            want = _philox.philox4x32(key % 2**32, key % 2**64 >> 32, *counter)[element % 4]
            got = _philox.element_words(torch.tensor([key, offset]), torch.tensor([element]), torch.tensor([step]))
            assert got.tolist() == [want]


# ---------------------------------------------------------------- the framework


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_opcheck(dtype):
    call, options = operands((2, 2), (2, 1, 4, 3))
    state = torch.ones(4, 2, 4, 3, device=DEVICE).to(dtype)
    options |= {"rounding": "stochastic", "seed": torch.tensor([1, 2], device=DEVICE)}
    if dtype in LARGEST:
        options["state_scale"] = torch.ones(4, 2, 4, device=DEVICE)
    # Its other checks compare tensors, which torch cannot do with those of float8.
    utils = "test_faketensor" if dtype == torch.float8_e4m3fn else "ALL"
    torch.library.opcheck(torch.ops.n3.ssm_update.default, (state, *call.values()), options, test_utils=utils)


# ---------------------------------------------------------------- bad calls

GOOD = {
    "state": torch.ones(3, 6, 4, 8), "x": torch.zeros(2, 6, 4), "dt": torch.zeros(2, 6), "A": torch.zeros(6),
    "B": torch.zeros(2, 3, 8), "C": torch.zeros(2, 3, 8),
}  # fmt: skip
CODES, SCALE = torch.ones(3, 6, 4, 8, dtype=torch.int8), torch.ones(3, 6, 4)
BAD = [
    ({"state": CODES}, "state_scale must be given with a state of int8, got None"),
    ({"state": CODES.to(torch.float8_e4m3fn)}, "state_scale must be given with a state of float8_e4m3fn, got None"),
    ({"state_scale": SCALE}, "state_scale must be None with a state of float32"),
    ({"state": CODES, "state_scale": SCALE[0]}, "state_scale must have shape [3, 6, 4], got [6, 4]"),
    ({"state": CODES, "state_scale": SCALE.half()}, "state_scale must be float32, got float16"),
    ({"rounding": "up"}, "rounding must be one of nearest, stochastic, got up"),
    ({"rounding": "stochastic"}, "seed must be given for rounding=stochastic, got None"),
    ({"seed": torch.zeros(2)}, "seed must be int64, got float32"),
    ({"rounding": "stochastic", "seed": torch.zeros(3).long()}, "seed must have shape [2], got [3]"),
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


@pytest.mark.parametrize("which", checking(*OPS))
def test_slots_are_checked_for_eight_bits_too(which):
    with use_backend(which):
        message = message_of({"state": CODES, "state_scale": SCALE, "state_indices": torch.tensor([0, 3])})
    assert message == "n3::ssm_update: state_indices must be below the number of slots 3, got 3"
