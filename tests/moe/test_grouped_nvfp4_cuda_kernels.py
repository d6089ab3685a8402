"""The text of the sm_90 kernels of grouped_linear with NVFP4 weights, run on the CPU by tests/cuda_emulator; see
test_experts_nvfp4_cuda_kernels.py for what that shows. Both products of moe_experts beyond 64 slots per expert are
calls of these kernels."""

from __future__ import annotations

import ctypes

import moe_problems
import pytest
import torch
from conftest import assert_close_to, assert_same_bits, fenced
from emulated_experts import nvfp4
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_text import load, needs_emulator
from test_grouped_cuda_kernel import ACTIVATIONS, GATED, ORDERED, ROWS, SLOTS

from n3kernels.moe import reference
from n3kernels.nvfp4 import NVFP4Tensor

pytestmark = needs_emulator


class Call(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("m", "rows", "groups", "n", "k", "sms")),
        *((name, ctypes.c_void_p) for name in ("x", "codes", "scales", "global_scale")),
        *((name, ctypes.c_int64 * 2) for name in ("code_strides", "scale_strides")),
        *((name, ctypes.c_void_p) for name in ("offsets", "gather", "targets", "row_scale", "y")),
        *((name, ctypes.c_int64) for name in ("sharing", "half", "activation", "to", "tile", "lazy", "reversed")),
    ]


@pytest.fixture(scope="session")
def kernels():
    return load("moe_grouped_nvfp4.cpp")


def ordered(kernels, x):
    """x as the products take it, by the kernel that lays it out."""
    to = fenced(torch.full((len(x), -(-x.shape[1] // 128) * 128), float("nan"), dtype=x.dtype))
    kernels.emulate_order(*map(ctypes.c_void_p, (x.data_ptr(), to.data_ptr())), ctypes.c_int64(len(x)),
                          ctypes.c_int64(x.shape[1]))  # fmt: skip
    return to


def product(kernels, x, w, offsets, rows, y, *, gather=None, row_scale=None, targets=None, sharing=1, activation=None,
            to=ROWS, tile=128, sms=3, lazy=2, reverse=False):  # fmt: skip
    """One launch, its results between fences; x is in order already."""
    parts = w.q, w.block_scale, w.global_scale
    strides = ((ctypes.c_int64 * 2)(*t.stride()[:2]) for t in parts[:2])
    optional = (offsets, gather, targets, row_scale)
    call = Call(
        len(x), rows, *w.shape, sms, x.data_ptr(), *(t.data_ptr() for t in parts), *strides,
        *(t if t is None else t.data_ptr() for t in optional), y.data_ptr(), sharing, x.dtype == torch.float16,
        ACTIVATIONS.index(activation), to, tile, lazy, reverse,
    )  # fmt: skip
    kernels.emulate_grouped_nvfp4(ctypes.byref(call))
    whole = y.as_strided((y.numel() + 128,), (1,), 0)
    assert whole[:64].isnan().all() and whole[-64:].isnan().all(), "written out of range"
    return y


def run(kernels, x, w, offsets, gather=None, row_scale=None, *, activation=None, **options):
    rows = len(x) if gather is None else len(gather)
    y = fenced(torch.full((rows, w.shape[1] // (2 if activation in GATED else 1)), float("nan"), dtype=x.dtype))
    options |= {"gather": gather, "row_scale": row_scale, "activation": activation}
    return product(kernels, ordered(kernels, x), w, offsets, rows, y, **options)


def problem(m, rows, counts, k, n, dtype=torch.bfloat16, first=0, pad=0, shift=0):
    """Rows of x between NaN, weights as in moe_experts; `first` rows belong to nobody, and some at the end."""
    offsets = torch.tensor([first, *counts], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    gather = torch.randint(0, m, (rows,), dtype=torch.int32) if m else None
    return fenced(torch.randn(m, k).to(dtype)), nvfp4(len(counts), n, k, pad, shift), fenced(offsets), gather


def assert_right(y, x, w, offsets, gather=None, row_scale=None, activation=None):
    wide = None if row_scale is None else row_scale.double()
    truth = reference.grouped_linear(x.double(), moe_problems.dense(w), offsets, gather, wide, activation=activation)
    assert_close_to(y, truth, acc=1e-5)


# k and n: pieces that are not full in one or both; one warpgroup without rows; scales at odd addresses
SIZES = [(128, 256), (16, 8), (336, 392), (208, 72)]


@pytest.mark.parametrize("lazy", [0, 1, 2])
@pytest.mark.parametrize("k, n", SIZES)
def test_agrees_with_the_definition(kernels, k, n, lazy):
    """Groups of no, few and many rows; rows of no group on both sides; with everything that is optional or without."""
    dtype, tile = (torch.float16, 64) if lazy == 1 else (torch.bfloat16, 128)
    x, w, offsets, gather = problem(50, 190, [0, 3, 130, 0, 20], k, n, dtype, first=2, pad=2 * (lazy > 0), shift=lazy)
    scale, activation = (fenced(torch.randn(190)), "relu2") if lazy else (None, None)
    y = run(kernels, x, w, offsets, gather, scale, activation=activation, lazy=lazy, reverse=lazy == 1, sms=1 + lazy,
            tile=tile)  # fmt: skip
    assert_right(y, x, w, offsets, gather, scale, activation)


@pytest.mark.parametrize("activation", GATED)
@pytest.mark.parametrize("k, n, tile", [(80, 288, 128), (16, 16, 64), (144, 400, 64)])
def test_gated_activations(kernels, k, n, tile, activation):
    """The second tile of 128 outputs has few: gates beside them are of what is gated, and are not stored."""
    dtype = torch.float16 if activation == "gelu" else torch.bfloat16
    x, w, offsets, gather = problem(50, 150, [3, 0, 140], k, n, dtype, first=2, shift=1)
    scale = fenced(torch.randn(150))
    y = run(kernels, x, w, offsets, gather, scale, activation=activation, tile=tile)
    assert_right(y, x, w, offsets, gather, scale, activation)


@given(st.integers(1, 30), st.lists(st.integers(0, 80), min_size=1, max_size=4), st.integers(1, 20), st.integers(1, 40),
       st.booleans(), st.booleans(), st.sampled_from([64, 128]), st.integers(0, 2), st.sampled_from(ACTIVATIONS),
       st.sampled_from([torch.float16, torch.bfloat16]), st.integers(0, 3))  # fmt: skip
@settings(max_examples=8)
def test_small_problems(kernels, m, counts, k, n, gathered, outside, tile, lazy, activation, dtype, shift):
    n *= 16 if activation in GATED else 8
    rows = sum(counts) + 3 * outside
    m = m if gathered else rows
    x, w, offsets, gather = problem(m, rows, counts, 16 * k, n, dtype, first=outside, pad=shift % 2, shift=shift)
    gather = gather if gathered and m else None
    y = run(kernels, x, w, offsets, gather, activation=activation, tile=tile, lazy=lazy, reverse=outside)
    assert_right(y, x, w, offsets, gather, activation=activation)


# Shares of Nano's and Super's up products, and of the latter's down product
@pytest.mark.parametrize("k, n", [(2688, 464), (1024, 672), (1024, 336), (336, 1024)])
def test_published_shapes(kernels, k, n):
    x, w, offsets, gather = problem(3, 5, [2, 0, 3], k, n)
    y = run(kernels, x, w, offsets, gather, activation="relu2", lazy=0, tile=64, sms=132)
    assert_right(y, x, w, offsets, gather, activation="relu2")


def test_rows_that_are_not_there(kernels):
    """A gather below zero: zeros, whatever scale and weights. Past x, or wild offsets: nothing outside is touched."""
    x, w, offsets, gather = problem(9, 40, [10, 20], 80, 24, first=1)
    x[4] = float("nan")
    gather[gather == 4] = 5
    gather[3], gather[30] = -1, -7
    scale = torch.randn(40)
    scale[3] = scale[30] = float("nan")
    y = run(kernels, x, w, offsets, gather, scale)
    assert (y[[0, 3, 30, 31, 39]] == 0).all()
    assert_right(y, x, w, offsets, gather, torch.where(scale.isnan(), 0, scale))
    gather[7] = 9
    w.block_scale.view(torch.uint8)[:, 5] = 0x7F
    y = run(kernels, x, w, offsets, gather)
    assert (y[[3, 7, 30]] == 0).all() and y[2, 5].isnan() and not y[:, :5].isnan().any()
    run(kernels, x, w, torch.tensor([-3, 2**31 - 1, -(2**31)], dtype=torch.int32), gather)


@pytest.mark.parametrize("rows", [0, 5])
def test_nothing_to_multiply(kernels, rows):
    x, w, offsets, gather = problem(2, rows, [0, 0], 16, 16)
    assert (run(kernels, x, w, offsets, gather) == 0).all()


def test_a_row_does_not_depend_on_the_others(kernels):
    """Nor on the width of the products, as the emulator has them; NaN and infinity stay in their rows."""
    x, w, offsets, gather = problem(30, 150, [140, 10], 208, 272)
    x[3], x[5] = float("nan"), float("inf")
    gather[(gather == 3) | (gather == 5)] = 4
    gather[77], gather[141] = 3, 5
    y = run(kernels, x, w, offsets, gather, activation="relu2")
    assert y[77].isnan().all() and (~y.isfinite()).any(1).nonzero().flatten().tolist() == [77, 141]
    for row, group in ((0, 0), (139, 0), (149, 1)):
        ends = torch.tensor([0, 1 - group, 1], dtype=torch.int32)
        alone = run(kernels, x, w, ends, gather[row : row + 1].clone(), activation="relu2", sms=9, lazy=0, reverse=True,
                    tile=64)  # fmt: skip
        assert_same_bits(alone[0], y[row])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_code_under_every_scale(kernels, dtype):
    """Row r of the weights has the scale of byte r, in all blocks; a row of x is one k. Exact, NaN where it belongs."""
    codes = (torch.arange(256)[:, None] + torch.arange(256)) % 16
    packed = (codes[:, ::2] + 16 * codes[:, 1::2]).to(torch.uint8)[None]
    scales = torch.arange(256, dtype=torch.uint8)[:, None].repeat(1, 16)[None].contiguous()
    w = NVFP4Tensor.from_parts(packed, scales.view(torch.float8_e4m3fn), torch.ones(1))
    x = fenced(torch.eye(256).to(dtype)[:: 5 if dtype == torch.float16 else 3])
    y = run(kernels, x, w, torch.tensor([0, len(x)], dtype=torch.int32))
    truth = x.double() @ moe_problems.dense(w)[0].nan_to_num().t()
    truth[:, [0x7F, 0xFF]] = float("nan")
    torch.testing.assert_close(y.double(), truth, rtol=0, atol=0, equal_nan=True)


# global scale, x: the unscaled sums would leave float32, the results do not
@pytest.mark.parametrize("scale, magnitude", [(1e-36, 1e37), (1e30, 1e-25), (2.0**-149, 1), (-1.5, 1), (0, 1)])
def test_global_scales(kernels, scale, magnitude):
    x, w, offsets, _ = problem(8, 8, [5, 3], 96, 80)
    w.global_scale.copy_(torch.tensor([scale, 1e-30]))
    x.mul_(magnitude)
    y = run(kernels, x, w, offsets)
    weights = moe_problems.dense(w)
    truth = reference.grouped_linear(x.double(), weights, offsets, None, None)
    size = reference.grouped_linear(x.double().abs(), weights.abs(), offsets, None, None)
    assert y.isfinite().all() and ((y.double() - truth).abs() <= 2.0**-8 * truth.abs() + 1e-5 * size + 1e-40).all()


# ---- moe_experts: two products


def experts(kernels, problem, activation="relu2", **options):
    """As csrc/moe/experts_wide_sm90.cu launches it, with the last sum here; rows and activations of nobody are NaN."""
    x, w_up, w_down, ids, weights = problem
    (tokens, k), inner, width = ids.shape, w_down.shape[2], x.shape[1]
    order, offsets, _, _ = reference.moe_sort(ids, w_up.shape[0], 0)
    hidden = fenced(torch.full((tokens * k, -(-inner // 128) * 128), float("nan"), dtype=x.dtype))
    rows = fenced(torch.full((tokens * k, width), float("nan")))
    product(kernels, ordered(kernels, x), w_up, offsets, tokens * k, hidden, gather=order, sharing=k,
            activation=activation, to=ORDERED, **options)  # fmt: skip
    product(kernels, hidden, w_down, offsets, tokens * k, rows, targets=order, to=SLOTS, **options)
    used = (ids >= 0) & (ids < w_up.shape[0])
    assert (rows.isnan().all(1) == ~used.flatten()).all() and not rows[used.flatten()].isnan().any()
    terms = torch.where(used[..., None], weights[..., None] * rows.view(tokens, k, width), 0)
    return terms.sum(1).to(x.dtype), hidden[: int(offsets[-1])]


def experts_problem(tokens, k, count, width, inner, activation="relu2", shift=1):
    x, halves = fenced(torch.randn(tokens, width).bfloat16()), 2 if activation in GATED else 1
    w_up, w_down = nvfp4(count, halves * inner, width, 2, shift), nvfp4(count, width, inner, 2, shift)
    ids = torch.randint(-1, count + 1, (tokens, k), dtype=torch.int32)
    ids[ids == 0] = 1  # without slots
    return x, w_up, w_down, ids, torch.randn(tokens, k)


@pytest.mark.parametrize("activation", ["relu2", *GATED])
@pytest.mark.parametrize("width, inner", [(64, 336), (144, 80), (272, 16)])
def test_experts(kernels, width, inner, activation):
    call = experts_problem(90, 3, 4, width, inner, activation)
    y, hidden = experts(kernels, call, activation)
    moe_problems.assert_right(y, *moe_problems.definition(*call, activation=activation))
    assert not hidden.isnan().any()


def test_one_expert_with_all_slots(kernels):
    """A share of Super, l = 1024 and I = 336, a whole tile and one with a row; nobody reads the other experts."""
    x, w_up, w_down, ids, weights = call = experts_problem(129, 1, 3, 1024, 336)
    ids.fill_(1)
    for w in (w_up, w_down):
        w.block_scale.view(torch.uint8)[[0, 2]] = 0x7F
        w.global_scale[[0, 2]] = float("nan")
    y, _ = experts(kernels, call, lazy=0, sms=132)
    for w in (w_up, w_down):
        w.block_scale.view(torch.uint8)[[0, 2]] = 0x38
        w.global_scale[[0, 2]] = 1
    moe_problems.assert_right(y, *moe_problems.definition(*call))
    moe_problems.assert_within_the_gate(y, *call)


@pytest.mark.parametrize("activation", ["relu2", "silu"])
def test_what_lies_behind_infinity_is_zero(kernels, activation):
    """An inner size that fills no piece: rows of W_up that are not there give 0 for an infinite x, not 0 * inf."""
    x, w_up, w_down, ids, weights = call = experts_problem(2, 1, 2, 16, 16, activation)
    ids.fill_(1)
    weights.fill_(1)
    x[0], x[1] = float("inf"), 1
    for w in (w_up, w_down):  # all weights positive
        w.q.copy_(torch.full_like(w.q, 0x22))
        w.block_scale.view(torch.uint8).fill_(0x38)
        w.global_scale.fill_(1)
    y, hidden = experts(kernels, call, activation)
    assert (y[0] == float("inf")).all() and y[1].isfinite().all()
    assert ((hidden != 0).sum(1) == 16).all()
