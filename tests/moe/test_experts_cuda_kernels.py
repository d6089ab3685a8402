"""The text of the sm_90 kernels of moe_experts, run on the CPU by tests/cuda_emulator: tiles, swizzles, barriers, sums.

It proves nothing about a GPU, where the same operator is tested through the dispatcher; it finds on any machine what
would otherwise be found on a GPU. `lazy`: what happens when it is waited for, not when it is issued: 1 the tensor
cores' products, 2 the copies of tiles as well.
"""

from __future__ import annotations

import ctypes

import moe_problems
import pytest
import torch
from conftest import assert_same_bits, fenced
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_text import load, needs_emulator

from n3kernels.moe import reference

pytestmark = needs_emulator
POINTERS = ("ids", "order", "offsets", "valid_tokens", "valid_ids", "weights", "rows", "y")


class Call(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("tokens", "top_k", "experts", "width", "inner", "first_expert", "sms")),
        *((name, ctypes.c_void_p) for name in ("x", "w_up", "w_down")),
        *((name, ctypes.c_int64 * 2) for name in ("up_strides", "down_strides")),
        *((name, ctypes.c_void_p) for name in POINTERS),
        *((name, ctypes.c_int64) for name in ("lazy", "reversed", "merged", "activation")),
    ]


@pytest.fixture(scope="session")
def kernel():
    return load("moe_experts.cpp")


def run(kernel, problem, *, first_expert=0, valid_tokens=None, sms=3, lazy=2, reverse=False, merged=False,
        activation="relu2"):  # fmt: skip
    """y, written between fences."""
    x, w_up, w_down, ids, weights = problem
    (tokens, k), (experts, width, inner) = ids.shape, w_down.shape
    call = Call(
        tokens=tokens, top_k=k, experts=experts, width=width, inner=inner, first_expert=first_expert, sms=sms,
        x=x.data_ptr(), w_up=w_up.data_ptr(), w_down=w_down.data_ptr(),
        up_strides=(ctypes.c_int64 * 2)(*w_up.stride()[:2]), down_strides=(ctypes.c_int64 * 2)(*w_down.stride()[:2]),
        ids=ids.data_ptr(), weights=weights.data_ptr(), lazy=lazy, reversed=reverse, merged=merged,
        activation=moe_problems.ACTIVATIONS.index(activation),
    )  # fmt: skip
    used = ids
    if valid_tokens is not None:
        limit, used = torch.tensor([valid_tokens], dtype=torch.int32), torch.empty_like(ids)
        call.valid_tokens, call.valid_ids = limit.data_ptr(), used.data_ptr()
        kernel.emulate_valid_ids(ctypes.byref(call))
    order, offsets, _, _ = reference.moe_sort(used, experts, first_expert)
    # Rows of slots that nobody computes stay NaN.
    rows = torch.full((tokens * k * 10 * width + 1,), float("nan"))
    y = fenced(torch.full(x.shape, float("nan"), dtype=x.dtype))
    call.order, call.offsets, call.rows, call.y = (t.data_ptr() for t in (order, offsets, rows, y))
    kernel.emulate_moe_experts.restype = ctypes.c_int64
    written = kernel.emulate_moe_experts(ctypes.byref(call)) * width
    assert rows[written:].isnan().all(), "rows written out of range"
    whole = y.as_strided((y.numel() + 128,), (1,), 0)
    assert whole[:64].isnan().all() and whole[-64:].isnan().all(), "written out of range"
    return y


def problem(tokens, k, experts, width, inner, first=0, activation="relu2"):
    """Every tensor between NaN; the rows of the weights end in NaN too. ids reach past the experts on both sides."""
    x = fenced(torch.randn(tokens, width).bfloat16())
    rows = inner if activation == "relu2" else 2 * inner
    w_up = torch.full((experts, rows, width + 8), float("nan")).bfloat16()
    w_down = torch.full((experts, width, inner + 16), float("nan")).bfloat16()
    w_up[:, :, :width] = torch.randn(experts, rows, width) * width**-0.5
    w_down[:, :, :inner] = torch.randn(experts, width, inner) * inner**-0.5
    ids = torch.randint(max(first - 1, -1), first + experts + 1, (tokens, k), dtype=torch.int32)
    w_up, w_down = fenced(w_up)[:, :, :width], fenced(w_down)[:, :, :inner]
    return x, w_up, w_down, fenced(ids), fenced(torch.randn(tokens, k))


def assert_right(y, call, first_expert=0, valid_tokens=None, activation="relu2"):
    x, w_up, w_down, ids, weights = call
    used = reference.valid_ids(ids, None if valid_tokens is None else torch.tensor(valid_tokens))
    truth = moe_problems.definition(x, w_up, w_down, used, weights, activation, first_expert)
    moe_problems.assert_right(y, *truth)


# width, inner: every template; widths and inner sizes that fill no tile, chunk or step; one to ten ranges
SIZES = [(64, 64), (8, 8), (256, 464), (136, 336), (128, 16), (200, 1048)]
LARGE = [(1024, 336), (320, 72), (1032, 136), (2048, 80), (2688, 240), (2696, 144)]


@pytest.mark.parametrize("lazy", [0, 1, 2])
@pytest.mark.parametrize("width, inner", SIZES)
def test_agrees_with_the_definition(kernel, width, inner, lazy):
    call = problem(9, 3, 3, width, inner, first=2)
    y = run(kernel, call, first_expert=2, lazy=lazy, reverse=lazy == 1, sms=1 + 3 * lazy)
    assert_right(y, call, 2)


@pytest.mark.parametrize("width, inner", LARGE)
def test_large_templates(kernel, width, inner):
    call = problem(3, 2, 2, width, inner)
    call[3].copy_(torch.tensor([[0, 1], [1, -1], [1, 0]]))
    y = run(kernel, call)
    assert_right(y, call)
    assert_same_bits(run(kernel, call, lazy=0, sms=50, reverse=True), y)


@pytest.mark.parametrize("activation", ["silu", "gelu"])
@pytest.mark.parametrize("width, inner, lazy", [(8, 8, 0), (136, 336, 1), (200, 456, 2), (2688, 80, 2)])
def test_gated_activations(kernel, width, inner, lazy, activation):
    call = problem(5, 2, 2, width, inner, activation=activation)
    y = run(kernel, call, lazy=lazy, reverse=lazy == 1, sms=1 + 3 * lazy, activation=activation)
    assert_right(y, call, activation=activation)


@pytest.mark.parametrize("activation", moe_problems.ACTIVATIONS)
def test_what_lies_behind_infinity_is_zero(kernel, activation):
    """An inner size that ends in a chunk: rows of W_up that are not there give 0 for an infinite x, not 0 * inf."""
    x, w_up, w_down, ids, weights = problem(2, 1, 1, 8, 8, activation=activation)
    x[0], ids[:], weights[:], w_up[:], w_down[:] = float("inf"), 0, 1, 1, 1
    y = run(kernel, (x, w_up, w_down, ids, weights), activation=activation)
    assert (y[0] == float("inf")).all() and y[1].isfinite().all()


@given(st.tuples(st.integers(0, 40), st.integers(1, 4), st.integers(1, 6), st.integers(1, 20).map(lambda n: 8 * n),
                 st.integers(1, 30).map(lambda n: 8 * n), st.integers(0, 2)),
       st.integers(0, 2), st.booleans(), st.booleans())  # fmt: skip
@settings(max_examples=12)
def test_small_problems(kernel, sizes, lazy, reverse, merged):
    call = problem(*sizes)
    y = run(kernel, call, first_expert=sizes[-1], lazy=lazy, reverse=reverse, merged=merged)
    assert_right(y, call, sizes[-1])


@pytest.mark.parametrize("merged", [False, True])
def test_a_row_does_not_depend_on_the_batch(kernel, merged):
    """Alone, and with 79 others, most of them of the same expert: three tiles, one of them with two tokens."""
    call = problem(80, 2, 3, 72, 456)
    ids = call[3]
    ids[:, 0], ids[:, 1] = 1, -1
    ids[::9, 1], ids[5] = 2, torch.tensor([2, 0])
    whole = run(kernel, call, merged=merged)
    assert_right(whole, call)
    for part in (slice(0, 1), slice(5, 6), slice(79, 80), slice(30, 67)):
        x, w_up, w_down, ids, weights = call
        alone = fenced(x[part]), w_up, w_down, fenced(ids[part]), fenced(weights[part])
        assert_same_bits(run(kernel, alone, sms=40, lazy=0, reverse=not merged), whole[part].contiguous())


def test_a_nan_stays_in_its_row(kernel):
    call = problem(20, 2, 2, 128, 208)
    call[3].fill_(1)
    clean = run(kernel, call)
    call[0][7, 3] = float("nan")
    call[0][9] = float("inf")
    y = run(kernel, call)
    others = [t for t in range(20) if t not in (7, 9)]
    assert y[7].isnan().all() and not y[9].isfinite().all()
    assert_same_bits(y[others], clean[others])


def test_skipped_slots_are_not_read(kernel):
    """Ids outside the experts and rows of padding: NaN weights, NaN tokens and NaN experts do not show."""
    call = problem(12, 3, 4, 64, 80, first=5)
    x, w_up, w_down, ids, weights = call
    ids[ids == 6] = 7
    ids[3], ids[4, 1] = torch.tensor([-1, 4, 9]), 2**31 - 1
    w_up[1], w_down[1], x[3], x[9:] = (float("nan"),) * 4
    outside = (ids < 5) | (ids > 8)
    weights[outside], weights[9:] = float("nan"), float("nan")
    ids[9:] = 6  # the expert that nobody else has
    y = run(kernel, call, first_expert=5, valid_tokens=9)
    assert (y[9:] == 0).all() and (y[3] == 0).all() and not y.isnan().any()
    weights[outside] = 0
    assert_right(y, call, 5, 9)
    assert (run(kernel, call, first_expert=5, valid_tokens=0) == 0).all()


def test_many_slots_per_token(kernel):
    """More than combine_kernel keeps at a time, and ids that repeat."""
    call = problem(2, 70, 5, 40, 24)
    assert_right(run(kernel, call), call)


def test_no_tokens(kernel):
    assert run(kernel, problem(0, 2, 2, 16, 16)).shape == (0, 16)


def test_a_share_of_super(kernel):
    """l = 1024 and I = 336, the tensor-parallel share of one of eight ranks: 22 slots of a token, each of an expert."""
    x, w_up, w_down, _, weights = problem(1, 22, 4, 1024, 336)
    call = x, w_up, w_down, torch.arange(22, dtype=torch.int32)[None] % 4, weights
    y = run(kernel, call, lazy=0, sms=132)
    assert_right(y, call)
    moe_problems.assert_within_the_gate(y, x, w_up, w_down, call[3], weights)
