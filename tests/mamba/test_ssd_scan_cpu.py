"""What the CPU kernels of the scan promise beyond every backend: the division of the work does not show, no token sees
a later one, not even its NaN, and log decays may have any size and sign. (The instruction set: test_mamba_isa.py.)"""

from __future__ import annotations

import pytest
import torch
from conftest import assert_close_to, assert_same_bits, backends_here
from hypothesis import given
from hypothesis import strategies as st
from ssd_problems import magnitude, operands, recurrence, states

from n3kernels import use_backend
from n3kernels.mamba import ssd_scan, ssd_scan_slots

OPS = ("ssd_scan", "ssd_scan.slots")
PER_TOKEN = ("x", "dt", "B", "C", "z")
BARE = ("none", False, False, False, (-10.0, None))  # no D, gate, bias or softplus; steps may be negative

pytestmark = pytest.mark.skipif("cpu" not in backends_here(OPS), reason="tensors are on the GPU")


@pytest.fixture(autouse=True)
def _cpu():
    threads = torch.get_num_threads()
    with use_backend("cpu"):
        yield
    torch.set_num_threads(threads)


def agree(out, call, options, initial=None):
    turned = {**call, "dt": call["dt"].abs(), "A": call["A"] * call["dt"].sign().flatten()[0]}  # the same A dt
    truths, sizes = recurrence(call, options, initial), magnitude(turned, options, initial)
    for part, truth, size in zip(out, truths, sizes, strict=True):
        assert_close_to(part, truth, 1e-5, size + 1e-30)


@pytest.mark.parametrize("layout", [(4, 2, 80, 16), (6, 1, 24, 40), (1, 1, 130, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_do_not_show(layout, dtype):
    """Groups, heads and at last the channels of a head are divided; 70 tokens: two chunks, a checkpoint in each."""
    call, options = operands((143,), layout, dtype)
    cu_seqlens, tokens = (torch.tensor(t, dtype=torch.int32) for t in ([0, 70, 70, 73, 143], [20, 66, 142]))
    results = []
    for threads in (1, 2, 3, 7, 40):
        torch.set_num_threads(threads)
        torch.manual_seed(1)
        state = states(8, layout)
        index = torch.tensor([4, 1, -1, 2])
        y = ssd_scan_slots(
            **call, **options, state=state, state_indices=index, cu_seqlens=cu_seqlens, checkpoint_tokens=tokens,
            checkpoint_indices=torch.tensor([0, 5, 7]),
        )  # fmt: skip
        results.append((y, state))
    for y, state in results[1:]:
        assert_same_bits(y, results[0][0])
        assert_same_bits(state, results[0][1])


@given(st.integers(1, 150), st.integers(0, 150))
def test_no_token_sees_a_later_one(length, cut):
    """Neither the NaN behind it nor whether there is anything behind it."""
    cut = min(cut, length - 1)
    call, options = operands((1, length), (2, 1, 24, 16))
    y, _ = ssd_scan(**call, **options)
    short, _ = ssd_scan(**{n: t[:, :cut] if n in PER_TOKEN else t for n, t in call.items()}, **options)
    for name in PER_TOKEN:
        call[name][:, cut:] = float("nan")
    poisoned, final = ssd_scan(**call, **options)
    assert_same_bits(y[:, :cut], short)
    assert_same_bits(poisoned[:, :cut], short)
    assert poisoned[:, cut:].isnan().all() and final.isnan().all()


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_states_may_grow(sign):
    """A positive, or time steps negative: exp of positive sums, which nothing clamps."""
    call, options = operands((2, 100), (4, 2, 8, 16), variant=BARE)
    call["dt"].copy_(sign * call["dt"].abs() / 4)
    call["A"].copy_(-sign * call["A"].abs() / 8)
    call["A"][::2] *= -1
    initial = states(2, (4, 2, 8, 16))
    agree(ssd_scan(**call, initial_states=initial, **options), call, options, initial)


@given(st.floats(1e-3, 3.0))
def test_slow_and_fast_decays(step):
    """Sums of a chunk from -1 to -3000, among them those whose exponentials are subnormal."""
    call, options = operands((1, 100), (4, 2, 8, 16), variant=BARE)
    call["dt"].fill_(step)
    call["A"].copy_(-torch.tensor([1.0, 1.4, 3.0, 16.0]))
    initial = states(1, (4, 2, 8, 16))
    agree(ssd_scan(**call, initial_states=initial, **options), call, options, initial)


@pytest.mark.parametrize("step", [1e10, 1e30])
@pytest.mark.parametrize("where", [0, 30, 63, 64, 99])
def test_a_time_step_may_be_huge(step, where):
    """What was before is forgotten, and what follows keeps its digits."""
    call, options = operands((1, 100), (4, 2, 8, 16), variant=BARE)
    call["dt"].abs_()
    call["A"].fill_(-16.0)
    call["dt"][:, where], call["x"][:, where] = step, 0.0
    agree(ssd_scan(**call, **options), call, options)


@pytest.mark.parametrize("layout", [(0, 1, 4, 3), (4, 2, 0, 3), (4, 2, 8, 0)])
def test_gradients_of_nothing(layout):
    """No heads, channels or states: what is left has gradients of zero, but for D x."""
    call, options = operands((2, 5), layout)
    leaves = {name: t.detach().requires_grad_() for name, t in call.items() if t is not None}
    y, final = ssd_scan(**leaves, **options)
    (y.sum() + final.sum()).backward()
    for name in ("dt", "A", "B", "C", "dt_bias"):
        assert leaves[name].grad.shape == leaves[name].shape and not leaves[name].grad.any()
