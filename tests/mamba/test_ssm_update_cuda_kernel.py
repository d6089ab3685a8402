"""The text of the CUDA kernel of ssm_update, run on the CPU."""

from __future__ import annotations

import pytest
import torch
from conftest import assert_close_to, assert_same_bits, fenced
from hypothesis import given
from hypothesis import strategies as st
from kernel_arguments import TYPES, SsmArgs, Staged, TimeStep, View, load_kernels, room, run, slots, stage, view
from kernel_problems import FLOATS, KINDS, SEEDS, SWAP, assert_same_but_nan, draw_slots, ssm_operands
from kernel_text import needs_emulator

from n3kernels.mamba import reference_decode

pytestmark = needs_emulator


@pytest.fixture(scope="session")
def kernels():
    return load_kernels()


def ssm_update(kernels, state, x, dt, A, B, C, D=None, z=None, dt_bias=None, state_scale=None, seed=None,
               rounding="nearest", dt_softplus=True, dt_min=0.0, dt_max=None, reverse=False, **where):  # fmt: skip
    batch, tokens, heads, head_dim = x.shape
    y, d_state = room(x.shape, x.dtype), B.shape[-1]
    names = ("state_indices", "dst_state_indices", "num_accepted", "num_tokens", "parents")
    at = slots(state, batch, tokens, *(where.get(name) for name in names))
    scales = [] if state_scale is None else [state_scale]
    staged = stage(kernels, at, [state, *scales]) + [Staged()]
    time = TimeStep(view(dt), view(A), view(dt_bias), dt_softplus, dt_min, float("inf") if dt_max is None else dt_max)
    vectors = state.stride(3) == 1 and not any(n % 4 for n in (*state.stride()[:3], d_state))
    skip = View() if D is None else view(D if D.dim() == 2 else D[:, None].expand(-1, head_dim))
    args = SsmArgs(
        view(state), view(state_scale), view(x), view(z), view(B), view(C), skip, view(y), time, at, *staged[:2],
        seed.data_ptr() if rounding == "stochastic" and state.dtype != torch.float32 else None,
        1 if seed is None else seed.stride(0), heads, heads // B.shape[-2], head_dim, d_state, 0, vectors,
    )  # fmt: skip
    run(kernels.emulate_ssm_update, args, reverse)
    return y



# heads, groups, head_dim, d_state: rows of 8 lanes and of 16, and rows that cannot be read in vectors
LAYOUTS = [(4, 2, 5, 16), (2, 1, 17, 128), (3, 1, 2, 7), (2, 2, 3, 256), (1, 1, 2, 300), (2, 2, 1, 96)]


@given(
    st.integers(1, 3), st.integers(0, 5), st.sampled_from(LAYOUTS), FLOATS, FLOATS, KINDS, st.booleans(),
    st.booleans(), st.booleans(), st.booleans(), st.booleans(), st.booleans(), SEEDS,
)  # fmt: skip
def test_ssm_update(
    kernels, batch, tokens, layout, dtype, state_dtype, kind, accepted, counted, tree, full, strided, reverse, rng
):
    count, where = draw_slots(rng, batch, tokens, kind, accepted, counted, tree)
    call = ssm_operands(batch, tokens, layout, dtype, full)
    heads, _, head_dim, d_state = layout
    state = fenced(torch.randn(count, heads, head_dim, d_state * (2 if strided else 1)).to(state_dtype))
    state = state[..., ::2] if strided else state
    want, before = state.double(), state.clone()
    wide = {name: t if t is None else t.double() for name, t in call.items()}
    true_y = reference_decode.ssm_update(want, **wide, **where, dt_max=0.7)
    y = ssm_update(kernels, state, **call, **where, dt_max=0.7, reverse=reverse)
    size = 10 + d_state  # of the sums, generously: the errors looked for are those of indices
    assert_close_to(y, true_y, 1e-6 * size, true_y.abs() + size)
    assert_close_to(state, want, 1e-5)
    same = (want == before.double()).flatten(1).all(1)
    assert_same_bits(state[same].contiguous(), before[same].contiguous())


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_ssm_update_reads_before_it_writes(kernels, dtype):
    call, where = ssm_operands(5, 1, (2, 1, 3, 16), torch.float32, True), {k: torch.tensor(v) for k, v in SWAP.items()}
    state, scale = torch.randint(-127, 128, (6, 2, 3, 16)).to(dtype), torch.rand(6, 2, 3) + 0.5
    scale = scale if dtype == torch.int8 else None
    want, want_scale = state.clone(), None if scale is None else scale.clone()
    true_y = reference_decode.ssm_update(want, **call, **where, state_scale=want_scale)
    y = ssm_update(kernels, state, **call, **where, state_scale=scale)
    assert_close_to(y, true_y, 1e-5, true_y.abs() + 500)
    assert (state.float() - want.float()).abs().max() <= (1 if dtype == torch.int8 else 1e-3)
    if scale is not None:
        assert_close_to(scale, want_scale, 1e-5)


def test_values_that_nobody_checked_touch_nothing(kernels):
    """On a GPU reading an index would wait for the device: slots out of range are padding, counts are clamped."""
    call, state = ssm_operands(3, 2, (2, 1, 3, 16), torch.float32, True), fenced(torch.randn(3, 2, 3, 16))
    want = state.clone()
    odd = {"state_indices": [[0, 3], [2, 2**40], [1, 9]], "num_accepted": [-4, 7, 1], "num_tokens": [99, 2, -1]}
    even = {"state_indices": [[0], [-1], [1]], "num_accepted": [1, 1, 1], "num_tokens": [2, 2, 0]}
    odd, even = ({k: torch.tensor(v, dtype=torch.int64 if k[0] == "s" else torch.int32) for k, v in where.items()}
                 for where in (odd, even))  # fmt: skip
    assert_same_bits(ssm_update(kernels, state, **call, **odd), ssm_update(kernels, want, **call, **even))
    assert_same_bits(state, want)


def test_ssm_update_of_an_infinite_decay(kernels):
    """Lanes behind a short row do not make NaN of infinity times nothing."""
    call, state = ssm_operands(1, 1, (1, 1, 1, 4), torch.float32, False), torch.ones(1, 1, 1, 4)
    call |= {"A": torch.ones(1), "dt": torch.full((1, 1, 1), 1e3), "D": None}
    call |= {name: torch.ones(1, 1, 1, n) for name, n in (("x", 1), ("B", 4), ("C", 4))}
    y = ssm_update(kernels, state, **call, dt_softplus=False)
    assert y.item() == float("inf") and state.eq(float("inf")).all()


@pytest.mark.parametrize("tokens", [15, 17, 40])
@pytest.mark.parametrize("tree", [False, True])
def test_ssm_update_many_tokens(kernels, tokens, tree):
    """More steps than are kept in shared memory at a time; a tree walks its paths again."""
    layout = (1, 1, 3, 16)
    call, state = ssm_operands(1, tokens, layout, torch.float32, True), fenced(torch.randn(tokens + 1, 1, 3, 16))
    where = {}
    if tree:
        parents = torch.tensor([[t - 1 if t % 4 else t // 3 - 1 for t in range(tokens)]], dtype=torch.int32)
        where = {"parents": parents, "dst_state_indices": torch.arange(tokens, dtype=torch.int32)[None]}
    want = state.double()
    wide = {name: t.double() for name, t in call.items()}
    true_y = reference_decode.ssm_update(want, **wide, **where)
    y = ssm_update(kernels, state, **call, **where)
    assert_close_to(y, true_y, 1e-5, true_y.abs() + 10)
    assert_close_to(state, want, 1e-5)


@pytest.mark.parametrize("layout", LAYOUTS[:4])
def test_ssm_update_many_tokens_are_many_calls(kernels, layout):
    call, at_once = ssm_operands(2, 4, layout, torch.bfloat16, True), torch.randn(2, layout[0], *layout[2:])
    one_by_one = at_once.clone()
    y = ssm_update(kernels, at_once, **call)
    for t in range(4):
        token = {k: v[:, t : t + 1] if k in ("x", "dt", "B", "C", "z") else v for k, v in call.items()}
        assert_same_bits(y[:, t : t + 1].contiguous(), ssm_update(kernels, one_by_one, **token))
    assert_same_bits(at_once, one_by_one)


@pytest.mark.parametrize("dtype", TYPES[:5])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("layout", [(2, 1, 3, 64), (2, 1, 3, 7)])
def test_ssm_update_rounds_as_the_reference(kernels, dtype, rounding, layout):
    """From a state of 0 and with x = dt = 1 the new state is B, exactly: any bits, all modes, byte for byte."""
    heads, _, head_dim, d_state = layout
    call = ssm_operands(4, 1, layout, torch.float32, False)
    call["x"], call["dt"], call["D"] = torch.ones(4, 1, heads, head_dim), torch.ones(4, 1, heads), None
    B = torch.randint(-(2**31), 2**31 - 1, (4, 1, 1, d_state), dtype=torch.int32).view(torch.float32)
    B[1] = torch.randn(1, 1, d_state) * 2.0 ** torch.randint(-30, 18, (1, 1, d_state))
    B[2] = torch.randint(-254, 255, (1, 1, d_state)) / 2
    B[3] = torch.randn(1, 1, d_state) * 1e-41
    B[0, 0, 0, :6] = torch.tensor([65504.0, 65519.0, 65520.0, -3.4e38, 3.39e38, float("inf")])
    call["B"] = fenced(B)
    state = torch.zeros(5, heads, head_dim, d_state).to(dtype)
    scale = torch.ones(5, heads, head_dim) if dtype in TYPES[3:] else None
    where = {"state_indices": torch.tensor([3, 0, 4, 1])}
    seed = torch.tensor([0x123456789ABCDEF, 2**40 - 1])
    want, want_scale = state.clone(), None if scale is None else scale.clone()
    options = {"rounding": rounding, "seed": seed, "dt_softplus": False}
    reference_decode.ssm_update(want, **call, **where, **options, state_scale=want_scale)
    ssm_update(kernels, state, **call, **where, **options, state_scale=scale)
    if scale is not None:
        assert_same_but_nan(scale, want_scale)
        assert_same_bits(state, want)
    else:
        assert_same_but_nan(state, want)


@given(
    st.sampled_from([torch.int8, torch.float8_e4m3fn]), st.sampled_from(["nearest", "stochastic"]), KINDS,
    st.booleans(), SEEDS,
)  # fmt: skip
def test_ssm_update_of_8_bits(kernels, dtype, rounding, kind, counted, rng):
    """Scales are staged and written with their rows; values agree but for a code on either side of a tie."""
    layout = (2, 1, 3, 32)
    count, where = draw_slots(rng, 2, 3, kind, False, counted, False)
    call = ssm_operands(2, 3, layout, torch.float32, True)
    state = torch.randint(-127, 128, (count, 2, 3, 32)).to(torch.int8)
    state = state if dtype == torch.int8 else (state / 30).to(dtype)
    scale, seed = fenced(torch.rand(count, 2, 3)), torch.tensor([5, 7])
    options = {"rounding": rounding, "seed": seed, **where}
    want, want_scale = state.clone(), scale.clone()
    true_y = reference_decode.ssm_update(want, **call, **options, state_scale=want_scale)
    y = ssm_update(kernels, state, **call, **options, state_scale=scale)
    assert_close_to(y, true_y, 1e-5, true_y.abs() + 50)
    assert_close_to(scale, want_scale, 1e-5)
    codes, true_codes = (t.float().reshape(-1) for t in (state, want))
    away = codes != true_codes
    assert away.float().mean() < 0.01
    assert ((codes - true_codes).abs() <= true_codes.abs().clamp(min=1) / 6)[away].all()
