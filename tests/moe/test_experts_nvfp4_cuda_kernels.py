"""The text of the sm_90 kernel of moe_experts with NVFP4 weights, run on the CPU by tests/cuda_emulator.

It proves nothing about a GPU, where the same operator is tested through the dispatcher; it finds on any machine what
would otherwise be found on a GPU. `lazy`: what happens when it is waited for, not when it is issued: 1 the tensor
cores' products, 2 the copies of codes as well.
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
from n3kernels.nvfp4 import NVFP4Tensor

pytestmark = needs_emulator
POINTERS = ("ids", "order", "offsets", "weights", "rows", "y")


class Weights(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("codes", "scales", "global_scale")),
        *((name, ctypes.c_int64 * 2) for name in ("code_strides", "scale_strides")),
    ]

    @staticmethod
    def of(w):
        parts = w.q, w.block_scale, w.global_scale
        strides = ((ctypes.c_int64 * 2)(*t.stride()[:2]) for t in parts[:2])
        return Weights(*(t.data_ptr() for t in parts), *strides)


class Call(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("tokens", "top_k", "experts", "width", "inner", "sms")),
        ("x", ctypes.c_void_p),
        ("up", Weights),
        ("down", Weights),
        *((name, ctypes.c_void_p) for name in POINTERS),
        *((name, ctypes.c_int64) for name in ("lazy", "reversed", "merged")),
    ]


@pytest.fixture(scope="session")
def kernel():
    return load("moe_experts_nvfp4.cpp")


def run(kernel, problem, *, sms=3, lazy=2, reverse=False, merged=False):
    """y, written between fences."""
    x, w_up, w_down, ids, weights = problem
    (tokens, k), (experts, inner, width) = ids.shape, w_up.shape
    order, offsets, _, _ = reference.moe_sort(ids, experts, 0)
    # Rows of slots that nobody computes stay NaN.
    rows = torch.full((tokens * k * 10 * width + 1,), float("nan"))
    y = fenced(torch.full(x.shape, float("nan"), dtype=x.dtype))
    call = Call(
        tokens=tokens, top_k=k, experts=experts, width=width, inner=inner, sms=sms, x=x.data_ptr(),
        up=Weights.of(w_up), down=Weights.of(w_down), lazy=lazy, reversed=reverse, merged=merged,
    )  # fmt: skip
    for name, t in zip(POINTERS, (ids, order, offsets, weights, rows, y), strict=True):
        setattr(call, name, t.data_ptr())
    kernel.emulate_moe_experts_nvfp4.restype = ctypes.c_int64
    written = kernel.emulate_moe_experts_nvfp4(ctypes.byref(call)) * width
    assert rows[written:].isnan().all(), "rows written out of range"
    whole = y.as_strided((y.numel() + 128,), (1,), 0)
    assert whole[:64].isnan().all() and whole[-64:].isnan().all(), "written out of range"
    return y


def nvfp4(experts, n, k, pad=0, shift=0):
    """Any codes under any finite scales of either sign; behind the rows codes of 6 and scales of NaN, and the scales
    begin `shift` bytes behind an aligned address."""
    w = moe_problems.nvfp4(experts, n, k)
    block_scale = w.block_scale.view(torch.uint8) | torch.randint(0, 2, w.block_scale.shape, dtype=torch.uint8) * 128
    codes = torch.full((experts, n, k // 2 + 8 * pad), 0x77, dtype=torch.uint8)
    scales = torch.full((128 + shift + experts * n * (k // 16 + pad),), 0x7F, dtype=torch.uint8)
    scales = scales[64 + shift : len(scales) - 64].view(experts, n, k // 16 + pad)
    codes[:, :, : k // 2], scales[:, :, : k // 16] = w.q, block_scale
    codes = fenced(codes)[:, :, : k // 2]
    return NVFP4Tensor.from_parts(codes, scales[:, :, : k // 16].view(torch.float8_e4m3fn), fenced(w.global_scale))


def problem(tokens, k, experts, width, inner, pad=0, shift=0):
    x = fenced(torch.randn(tokens, width).bfloat16())
    w_up, w_down = nvfp4(experts, inner, width, pad, shift), nvfp4(experts, width, inner, pad, shift)
    ids = torch.randint(-1, experts + 1, (tokens, k), dtype=torch.int32)
    return x, w_up, w_down, fenced(ids), fenced(torch.randn(tokens, k))


def assert_right(y, call):
    moe_problems.assert_right(y, *moe_problems.definition(*call))


# width, inner: every template; sizes that fill no unit, chunk or step; one to ten ranges; scales at odd addresses
SIZES = [(64, 64), (16, 16), (256, 464), (144, 336), (128, 16), (208, 1056)]
LARGE = [(1024, 336), (336, 80), (1040, 144), (2048, 80), (2688, 240), (2704, 144)]


@pytest.mark.parametrize("lazy", [0, 1, 2])
@pytest.mark.parametrize("width, inner", SIZES)
def test_agrees_with_the_definition(kernel, width, inner, lazy):
    call = problem(9, 3, 3, width, inner, pad=2 * (lazy > 0), shift=lazy)
    assert_right(run(kernel, call, lazy=lazy, reverse=lazy == 1, sms=1 + 3 * lazy), call)


@pytest.mark.parametrize("width, inner", LARGE)
def test_large_templates(kernel, width, inner):
    call = problem(3, 2, 2, width, inner)
    call[3].copy_(torch.tensor([[0, 1], [1, -1], [1, 0]]))
    y = run(kernel, call)
    assert_right(y, call)
    assert_same_bits(run(kernel, call, lazy=0, sms=50, reverse=True), y)


@given(st.tuples(st.integers(0, 40), st.integers(1, 4), st.integers(1, 6), st.integers(1, 12).map(lambda n: 16 * n),
                 st.integers(1, 20).map(lambda n: 16 * n), st.integers(0, 2), st.integers(0, 3)),
       st.integers(0, 2), st.booleans(), st.booleans())  # fmt: skip
@settings(max_examples=12)
def test_small_problems(kernel, sizes, lazy, reverse, merged):
    call = problem(*sizes)
    assert_right(run(kernel, call, lazy=lazy, reverse=reverse, merged=merged), call)


def one(n):
    """The unit matrix of n rows: codes of 1 under scales of 1."""
    codes = torch.zeros(n, n, dtype=torch.uint8)
    codes.fill_diagonal_(2)
    packed = (codes[:, ::2] + 16 * codes[:, 1::2])[None]
    return NVFP4Tensor.from_parts(packed, torch.ones(1, n, n // 16).to(torch.float8_e4m3fn), torch.ones(1))


def test_every_code_under_every_scale(kernel):
    """Row r has the scale of byte r, in all blocks; a token sees one k. The down product is exact in bfloat16."""
    codes = (torch.arange(256)[:, None] + torch.arange(256)) % 16
    packed = (codes[:, ::2] + 16 * codes[:, 1::2]).to(torch.uint8)[None]
    scales = torch.arange(256, dtype=torch.uint8)[:, None].repeat(1, 16)[None].contiguous()
    w = NVFP4Tensor.from_parts(packed, scales.view(torch.float8_e4m3fn), torch.ones(1))
    values = moe_problems.dense(w)[0]
    k = 37 * torch.arange(48) % 256
    x = fenced(torch.nn.functional.one_hot(k, 256).bfloat16())
    ids, weights = torch.zeros(48, 1, dtype=torch.int32), torch.ones(48, 1)
    down = run(kernel, (x, one(256), w, ids, weights))
    truth = values[:, k].t()
    truth[:, [0x7F, 0xFF]] = float("nan")
    torch.testing.assert_close(down.double(), truth, rtol=0, atol=0, equal_nan=True)
    scales[scales % 128 == 0x7F] = 0x38
    values = moe_problems.dense(w)[0]
    for sign in (1, -1):
        up = run(kernel, (x * sign, w, one(256), ids, weights))
        assert_same_bits(up, (sign * values[:, k].t()).relu().square().bfloat16())


# up, down, x: the unscaled sums would leave float32, the results do not
GLOBALS = [(1e-36, 1e20, 1e37), (1e30, 1e-30, 1e-25), (2.0**-140, 1, 1e37), (3, 2.0**-149, 1), (-1.5, -0.3, 1),
           (0, 1, 1)]  # fmt: skip


@pytest.mark.parametrize("up, down, magnitude", GLOBALS)
def test_global_scales(kernel, up, down, magnitude):
    x, w_up, w_down, ids, weights = problem(5, 2, 2, 96, 80)
    ids.copy_(torch.tensor([[0, 1]] * 5))
    w_up.global_scale.copy_(torch.tensor([up, 1e-30]))
    w_down.global_scale.copy_(torch.tensor([down, 1e-30]))
    call = x.mul_(magnitude), w_up, w_down, ids, weights
    y = run(kernel, call)
    truth, scale = moe_problems.definition(*call)
    error = (y.double() - truth).abs()
    assert y.isfinite().all() and (error <= 2.0**-8 * (truth.abs() + scale) + 1e-40).all()


@pytest.mark.parametrize("merged", [False, True])
def test_a_row_does_not_depend_on_the_batch(kernel, merged):
    """Alone, and with 79 others, most of them of the same expert: three tiles, one of them with two tokens."""
    call = problem(80, 2, 3, 80, 464)
    ids = call[3]
    ids[:, 0], ids[:, 1] = 1, -1
    ids[::9, 1], ids[5] = 2, torch.tensor([2, 0])
    whole = run(kernel, call, merged=merged)
    assert_right(whole, call)
    for part in (slice(0, 1), slice(5, 6), slice(79, 80), slice(30, 67)):
        x, w_up, w_down, ids, weights = call
        alone = fenced(x[part]), w_up, w_down, fenced(ids[part]), fenced(weights[part])
        assert_same_bits(run(kernel, alone, sms=40, lazy=0, reverse=not merged), whole[part].contiguous())


def test_nan_and_infinity_stay_in_their_rows(kernel):
    call = problem(20, 2, 2, 128, 208)
    call[3].fill_(1)
    clean = run(kernel, call)
    call[0][7, 3], call[0][9] = float("nan"), float("inf")
    y = run(kernel, call)
    others = [t for t in range(20) if t not in (7, 9)]
    assert y[7].isnan().all() and not y[9].isfinite().all()
    assert_same_bits(y[others], clean[others])


def test_what_lies_behind_infinity_is_zero(kernel):
    """An inner size that ends in a chunk: rows of W_up that are not there give 0 for an infinite x, not 0 * inf."""
    x, w_up, w_down, ids, weights = problem(2, 1, 1, 16, 16)
    ids.fill_(0)
    x[0] = float("inf")
    for w in (w_up, w_down):  # all weights positive
        w.q.copy_(torch.full_like(w.q, 0x22))
        w.block_scale.view(torch.uint8).fill_(0x38)
        w.global_scale.fill_(1)
    weights.fill_(1)
    y = run(kernel, (x, w_up, w_down, ids, weights))
    assert (y[0] == float("inf")).all() and y[1].isfinite().all()


def test_experts_without_slots_are_not_read(kernel):
    x, w_up, w_down, ids, weights = problem(12, 3, 4, 64, 80)
    ids[ids == 1] = 2
    for w in (w_up, w_down):
        w.block_scale.view(torch.uint8)[1] = 0x7F
        w.global_scale[1] = float("nan")
    weights[(ids < 0) | (ids > 3)] = float("nan")
    x[3], ids[3] = float("nan"), torch.tensor([-1, 4, 9])
    y = run(kernel, (x, w_up, w_down, ids, weights))
    assert (y[3] == 0).all() and not y.isnan().any()


def test_a_scale_of_nan_shows_in_its_outputs_alone(kernel):
    """One of W_down: its row's output. One of W_up: every output of the expert's slots. Each in the last block of k."""
    x, w_up, w_down, ids, weights = problem(6, 1, 2, 96, 80)
    ids.copy_(torch.tensor([[0], [1]] * 3))
    clean = run(kernel, (x, w_up, w_down, ids, weights))
    w_down.block_scale.view(torch.uint8)[0, 33, 4] = 0x7F
    y = run(kernel, (x, w_up, w_down, ids, weights))
    expected = clean.clone()
    expected[::2, 33] = float("nan")
    torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
    w_up.block_scale.view(torch.uint8)[1, 79, 5] = 0xFF
    expected[1::2] = float("nan")
    y = run(kernel, (x, w_up, w_down, ids, weights))
    torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)


def test_many_slots_per_token(kernel):
    """More than combine_kernel keeps at a time, and ids that repeat."""
    call = problem(2, 70, 5, 48, 32)
    assert_right(run(kernel, call), call)


def test_no_tokens(kernel):
    assert run(kernel, problem(0, 2, 2, 16, 16)).shape == (0, 16)


def test_a_share_of_super(kernel):
    """l = 1024 and I = 336, the tensor-parallel share of one of eight ranks: 22 slots of a token, each of an expert."""
    x, w_up, w_down, _, weights = problem(1, 22, 4, 1024, 336)
    call = x, w_up, w_down, torch.arange(22, dtype=torch.int32)[None] % 4, weights
    y = run(kernel, call, lazy=0, sms=132)
    assert_right(y, call)
    moe_problems.assert_within_the_gate(y, *call)
