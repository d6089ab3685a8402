"""The text of the sm_90 kernel of moe_experts, run on the CPU by tests/cuda_emulator: slots, tiles, barriers, sums.

It proves nothing about a GPU, where the same operator is tested through the dispatcher; it finds on any machine what
would otherwise be found on a GPU. `lazy`: what happens when it is waited for, not when it is issued: 1 the tensor
cores' products, 2 the copies of tiles as well. Every launch must leave its counters zero.
"""

from __future__ import annotations

import ctypes

import moe_problems
import pytest
import torch
from conftest import assert_same_bits, fenced
from emulated_experts import FORMS, SOURCE, assert_right, call_of, problem, run
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_text import load, needs_emulator

from n3kernels.moe import reference

pytestmark = needs_emulator
each_form = pytest.mark.parametrize("form", FORMS)


@pytest.fixture(scope="session")
def kernel():
    return load(SOURCE)


# width, inner: every template; sizes that fill no tile, unit, chunk or step; one to ten ranges
SIZES = [(64, 64), (8, 8), (256, 464), (136, 336), (128, 16), (200, 1048)]
LARGE = [(1024, 336), (320, 72), (1032, 136), (2048, 80), (2688, 240), (2696, 144)]


@each_form
@pytest.mark.parametrize("lazy", [0, 1, 2])
@pytest.mark.parametrize("width, inner", SIZES)
def test_agrees_with_the_definition(kernel, form, width, inner, lazy):
    call = problem(form, 9, 3, 3, width, inner, first=2, pad=2 * (lazy > 0), shift=lazy)
    y = run(kernel, call, first_expert=2, lazy=lazy, reverse=lazy == 1, sms=1 + 3 * lazy)
    assert_right(y, call, 2)


@each_form
@pytest.mark.parametrize("width, inner", LARGE)
def test_large_templates(kernel, form, width, inner):
    call = problem(form, 3, 2, 2, width, inner)
    call[3].copy_(torch.tensor([[0, 1], [1, -1], [1, 0]]))
    y = run(kernel, call)
    assert_right(y, call)
    assert_same_bits(run(kernel, call, lazy=0, sms=50, reverse=True, order=1), y)


@each_form
@pytest.mark.parametrize("activation", ["silu", "gelu"])
@pytest.mark.parametrize("width, inner, lazy", [(8, 8, 0), (136, 336, 1), (200, 456, 2), (1024, 80, 0), (2688, 80, 2)])
def test_gated_activations(kernel, form, width, inner, lazy, activation):
    call = problem(form, 5, 2, 2, width, inner, activation=activation, shift=lazy)
    y = run(kernel, call, lazy=lazy, reverse=lazy == 1, sms=1 + 3 * lazy, activation=activation)
    assert_right(y, call, activation=activation)


@each_form
@pytest.mark.parametrize("activation", moe_problems.ACTIVATIONS)
def test_what_lies_behind_infinity_is_zero(kernel, form, activation):
    """An inner size that ends in a chunk: rows of W_up that are not there give 0 for an infinite x, not 0 * inf."""
    call = problem(form, 2, 1, 1, 8, 8, activation=activation)
    x, w_up, w_down, ids, weights = call
    x[0], ids[:], weights[:] = float("inf"), 0, 1
    for w in (w_up, w_down):  # all positive
        if form == "dense":
            w[:] = 1
        else:
            w.q.fill_(0x22)
            w.block_scale.view(torch.uint8).fill_(0x38)
            w.global_scale.fill_(1)
    y = run(kernel, call, activation=activation)
    assert (y[0] == float("inf")).all() and y[1].isfinite().all()


@given(st.sampled_from(FORMS),
       st.tuples(st.integers(0, 40), st.integers(1, 4), st.integers(1, 6), st.integers(1, 20).map(lambda n: 8 * n),
                 st.integers(1, 30).map(lambda n: 8 * n)),
       st.sampled_from(moe_problems.ACTIVATIONS), st.integers(0, 2), st.integers(0, 2), st.booleans(), st.booleans(),
       st.integers(1, 9), st.integers(1, 4), st.integers(0, 9))  # fmt: skip
@settings(max_examples=16)
def test_small_problems(kernel, form, sizes, activation, first, lazy, reverse, merged, sms, side_by_side, order):
    call = problem(form, *sizes, first=first, activation=activation, shift=order % 4)
    y = run(kernel, call, first_expert=first, activation=activation, lazy=lazy, reverse=reverse, merged=merged,
            sms=sms, side_by_side=side_by_side, order=order)  # fmt: skip
    assert_right(y, call, first, activation=activation)


@each_form
@pytest.mark.parametrize("merged", [False, True])
def test_whoever_comes_last(kernel, form, merged):
    """Items of a token in blocks that run in any order, and some at once: the same bits, and zeros for the next one, as
    a graph is replayed. Token 4 has no expert here, token 5 one twice."""
    call = problem(form, 8, 5, 3, 72, 456)
    call[3][4], call[3][5] = -1, torch.tensor([1, 1, -1, 2, 0])
    counters = torch.zeros(8 + 40, dtype=torch.int32)
    y = run(kernel, call, merged=merged, sms=1, counters=counters, out_dtype=torch.float32)  # where every order shows
    assert_right(y, call)
    for order, side_by_side, sms in ((1, 1, 40), (3, 1, 7), (4, 5, 40), (5, 3, 11), (6, 8, 40), (7, 8, 8), (0, 8, 8)):
        again = run(kernel, call, merged=merged, lazy=0, sms=sms, order=order, side_by_side=side_by_side,
                    reverse=order % 2 == 1, counters=counters, out_dtype=torch.float32)  # fmt: skip
        assert_same_bits(again, y)


@each_form
@pytest.mark.parametrize("merged", [False, True])
def test_a_row_does_not_depend_on_the_batch(kernel, form, merged):
    """Alone, and with 79 others, most of them of the same expert: three tiles, one of them with two tokens."""
    call = problem(form, 80, 2, 3, 72, 456)
    ids = call[3]
    ids[:, 0], ids[:, 1] = 1, -1
    ids[::9, 1], ids[5] = 2, torch.tensor([2, 0])
    whole = run(kernel, call, merged=merged, out_dtype=torch.float32)
    assert_right(whole, call)
    for part in (slice(0, 1), slice(5, 6), slice(79, 80), slice(30, 67)):
        x, w_up, w_down, ids, weights = call
        alone = fenced(x[part]), w_up, w_down, fenced(ids[part]), fenced(weights[part])
        y = run(kernel, alone, sms=40, lazy=0, reverse=not merged, order=part.stop, out_dtype=torch.float32)
        assert_same_bits(y, whole[part].contiguous())


@each_form
def test_a_batch_in_two_launches(kernel, form):
    """As it is cut beyond 64 slots per expert: valid_tokens is of the whole."""
    call = problem(form, 7, 2, 2, 40, 72)
    call[3][4:] = 1
    whole = run(kernel, call, valid_tokens=5)
    assert whole[4].any() and not whole[5:].any()
    x, w_up, w_down, ids, weights = call
    for part in (slice(0, 3), slice(3, 6), slice(6, 7)):
        piece = fenced(x[part]), w_up, w_down, fenced(ids[part]), fenced(weights[part])
        assert_same_bits(run(kernel, piece, valid_tokens=5, first_token=part.start), whole[part].contiguous())


@each_form
def test_float32_output(kernel, form):
    """What the sum is before it is rounded; rows without slots too."""
    call = problem(form, 6, 3, 3, 200, 136)
    call[3][2] = -1
    wide = run(kernel, call, out_dtype=torch.float32)
    assert_right(wide, call)
    assert not wide[2].any()
    assert_same_bits(wide.bfloat16(), run(kernel, call))


@each_form
def test_nan_and_infinity_stay_in_their_rows(kernel, form):
    call = problem(form, 20, 2, 2, 128, 208)
    call[3].fill_(1)
    clean = run(kernel, call)
    call[0][7, 3], call[0][9] = float("nan"), float("inf")
    y = run(kernel, call)
    others = [t for t in range(20) if t not in (7, 9)]
    assert y[7].isnan().all() and not y[9].isfinite().all()
    assert_same_bits(y[others], clean[others])


@each_form
def test_skipped_slots_are_not_read(kernel, form):
    """Ids outside the experts and rows of padding: NaN weights, NaN tokens and NaN experts do not show."""
    call = problem(form, 12, 3, 4, 64, 80, first=5)
    x, w_up, w_down, ids, weights = call
    ids[ids == 6] = 7
    ids[3], ids[4, 1], ids[4, 2] = torch.tensor([-1, 4, 9]), 2**31 - 1, -(2**31)
    x[3], x[9:] = float("nan"), float("nan")
    for w in (w_up, w_down):  # the expert that nobody has
        (w if form == "dense" else w.global_scale)[1] = float("nan")
    outside = (ids < 5) | (ids > 8)
    weights[outside], weights[9:] = float("nan"), float("nan")
    ids[9:] = 6  # but rows of padding
    y = run(kernel, call, first_expert=5, valid_tokens=9, order=3)
    assert (y[9:] == 0).all() and (y[3] == 0).all() and not y.isnan().any()
    for w in (w_up, w_down):
        (w if form == "dense" else w.global_scale)[1] = 0
    weights[outside] = 0
    assert_right(y, call, 5, 9)
    assert (run(kernel, call, first_expert=5, valid_tokens=0) == 0).all()
    assert (run(kernel, call, first_expert=5, valid_tokens=-3) == 0).all()
    assert_same_bits(run(kernel, call, first_expert=5, valid_tokens=10**9), run(kernel, call, first_expert=5))
    assert (run(kernel, call, first_expert=2**31 - 1) == 0)[[t for t in range(12) if t != 4]].all()


@each_form
def test_many_slots_per_token(kernel, form):
    """More than a warp looks at at once, and ids that repeat."""
    call = problem(form, 2, 70, 5, 40, 24)
    assert_right(run(kernel, call, order=1), call)


@each_form
def test_no_tokens(kernel, form):
    assert run(kernel, problem(form, 0, 2, 2, 16, 16)).shape == (0, 16)


@each_form
def test_a_share_of_super(kernel, form):
    """l = 1024 and I = 336, the tensor-parallel share of one of eight ranks: 22 slots of a token, each of an expert."""
    x, w_up, w_down, _, weights = problem(form, 1, 22, 4, 1024, 336)
    call = x, w_up, w_down, torch.arange(22, dtype=torch.int32)[None] % 4, weights
    y = run(kernel, call, lazy=0, sms=132, order=2)
    assert_right(y, call)
    moe_problems.assert_within_the_gate(y, *call)


# ---- the sum as a launch of its own, behind kernels for many tokens


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("parts, k", [(1, 2), (6, 40)])
def test_combine(kernel, parts, k, out_dtype):
    call, y = call_of(problem("dense", 4, k, 3, 136, 16), out_dtype=out_dtype)
    rows, ids, weights = call.keep[0], call.keep[-2], call.keep[-1]
    rows = rows[: 4 * k * parts * 136].view(4, k, parts, 136)
    rows[:] = torch.randn(rows.shape)
    skipped = (ids < 0) | (ids > 2)
    rows[skipped], weights[skipped] = float("nan"), float("nan")
    kernel.emulate_combine(ctypes.byref(call), ctypes.c_int64(parts))
    sums = rows[:, :, 0]
    for r in range(1, parts):
        sums = sums + rows[:, :, r]
    terms = torch.where(skipped[..., None], 0.0, weights[..., None] * sums)
    truth = terms[:, 0]
    for j in range(1, k):
        truth = truth + terms[:, j]
    assert_same_bits(y, truth.to(out_dtype))


def test_ids_of_padding(kernel):
    call, _ = call_of(problem("dense", 9, 3, 5, 8, 8), valid_tokens=4)
    ids, to = call.keep[-2], fenced(torch.zeros(9, 3, dtype=torch.int32))
    kernel.emulate_valid_ids(ctypes.byref(call), ctypes.c_void_p(to.data_ptr()))
    assert_same_bits(to, reference.valid_ids(ids, torch.tensor([4])))
