"""The text of the CUDA kernels, run on the CPU by tests/cuda_emulator: indices, masks, layouts, barriers, copies.

It proves nothing about a GPU, where the same operators are tested through the dispatcher; it finds on any machine what
would otherwise be found on a GPU.
"""

from __future__ import annotations

import pytest
import torch
from conftest import assert_close_to, assert_same_bits, fenced
from hypothesis import given
from hypothesis import strategies as st
from kernel_text import load, needs_emulator
from nvfp4_emulator import DTYPES, e4m3, pointer, room, size

from n3kernels.nvfp4 import reference

pytestmark = needs_emulator
ROWS, TENSOR16, TENSOR64, TENSOR128, FMA = range(5)  # linear::Kernel


@pytest.fixture(scope="module")
def kernels():
    return load("nvfp4.cpp")


def weights(n, k):
    """Every code; scales from 2^-6 to 15, of both signs."""
    sign = torch.randint(0, 2, (n, k // 16)) * 0x80
    scale = fenced(e4m3(torch.randint(8, 0x58, (n, k // 16)) + sign))
    return fenced(torch.randint(0, 256, (n, k // 2), dtype=torch.uint8)), scale


# ---- swizzle, dequantise, embedding: byte for byte


@given(st.integers(1, 2), st.integers(1, 140), st.integers(1, 9), st.booleans())
def test_swizzle(kernels, batch, rows, cols, reverse):
    plain = fenced(e4m3(torch.randint(0, 256, (batch, rows, cols))))
    tiled = reference.nvfp4_swizzle_scale(plain)
    out, untouched = room(tiled.shape, torch.uint8)
    sizes = size(batch), size(rows), size(cols)
    kernels.emulate_swizzle(pointer(plain), pointer(out), *sizes, False, reverse)
    untouched()
    assert_same_bits(out, tiled.view(torch.uint8))
    back, untouched = room(plain.shape, torch.uint8)
    kernels.emulate_swizzle(pointer(tiled), pointer(back), *sizes, True, reverse)
    untouched()
    assert_same_bits(back, plain.view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("swizzled", [False, True])
@pytest.mark.parametrize("lead", [(), (1,), (4,), (256,)])
def test_dequantize(kernels, dtype, swizzled, lead):
    """All 256 bytes with all 256 scales, NaN included; a global scale for all rows, for 64 or for one."""
    q = fenced(torch.arange(256, dtype=torch.uint8).view(1, 256).repeat(256, 1))
    scale = fenced(e4m3(torch.arange(256).view(256, 1).repeat(1, 32)))
    given_scale = reference.nvfp4_swizzle_scale(scale) if swizzled else scale
    global_scale = fenced(torch.rand(lead))
    each = 256 // global_scale.numel()
    out, untouched = room((256, 512), dtype)
    kernels.emulate_dequantize(DTYPES.index(dtype), pointer(q), pointer(given_scale), pointer(global_scale),
                               pointer(out), size(256), size(512), size(each), swizzled)  # fmt: skip
    untouched()
    stack = (q.view(-1, each, 256), scale.view(-1, each, 32), global_scale.flatten())
    want = reference.nvfp4_dequantize(*stack, dtype=dtype).view(256, 512)
    assert torch.equal(out.isnan(), want.isnan())
    assert_same_bits(out.nan_to_num(7.0), want.nan_to_num(7.0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_embedding(kernels, dtype):
    """Rows in any order; an id out of range gives NaN and reads nothing."""
    q, scale = weights(11, 48)
    ids = torch.tensor([3, 10, 0, -1, 3, 11, 2**40])
    global_scale = torch.tensor(0.37)
    out, untouched = room((7, 48), dtype)
    kernels.emulate_embedding(DTYPES.index(dtype), pointer(ids), pointer(q), pointer(scale), pointer(global_scale),
                              pointer(out), size(7), size(11), size(48))  # fmt: skip
    untouched()
    good = (ids >= 0) & (ids < 11)
    assert out[~good].isnan().all()
    assert_same_bits(out[good], reference.nvfp4_embedding(ids[good], q, scale, global_scale, dtype=dtype))


# ---- linear


def linear(kernels, kernel, x, q, scale, global_scale, bias=None, relu2=False, reverse=False):
    (m, k), n = x.shape, q.shape[0]
    y, untouched = room((m, n), x.dtype)
    kernels.emulate_linear(DTYPES.index(x.dtype), pointer(x), pointer(q), pointer(scale), pointer(global_scale),
                           pointer(bias), pointer(y), size(m), size(n), size(k), relu2, kernel, reverse)  # fmt: skip
    untouched()
    return y


def assert_right(y, x, q, scale, global_scale, bias=None, relu2=False, reverse=False):
    weight = reference.decode(q, scale, torch.float64) * global_scale.double()
    want, terms = x.double() @ weight.t(), x.double().abs() @ weight.abs().t()
    if bias is not None:
        want, terms = want + bias.double(), terms + bias.double().abs()
    if relu2:
        want, terms = want.relu().square(), 2 * terms.square()
    assert_close_to(y, want, 1e-6, terms)


SHAPES = [(1, 1, 1), (3, 37, 5), (7, 70, 33), (8, 17, 4), (70, 66, 3), (129, 130, 5)]  # m, n, blocks of k
LINEAR = [(ROWS, dtype, shape) for dtype in DTYPES for shape in SHAPES if shape[0] <= 8]
LINEAR += [(FMA, torch.float32, shape) for shape in SHAPES]
LINEAR += [(k, dtype, shape) for k in (TENSOR16, TENSOR64, TENSOR128) for dtype in DTYPES[1:] for shape in SHAPES]


@pytest.mark.parametrize("kernel, dtype, shape", LINEAR)
def test_linear(kernels, kernel, dtype, shape):
    """Every kernel, on both sides of its tiles, with and without an epilogue, threads in either order."""
    m, n, blocks = shape
    q, scale = weights(n, 16 * blocks)
    x = fenced(torch.randn(m, 16 * blocks).to(dtype))
    bias = fenced(torch.randn(n).to(dtype)) if n % 2 else None
    args = x, q, scale, torch.tensor(0.01), bias, m % 2 == 1, n > 40
    assert_right(linear(kernels, kernel, *args), *args)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 2, 5, 16, 17])
def test_linear_as_planned(kernels, dtype, m):
    """The kernel the plan chooses, beside a row of NaN, huge activations under a tiny scale."""
    q, scale = weights(20, 80)
    x = torch.randn(m + 1, 80)
    x[-1] = float("nan")
    x = x * (1e36 if dtype != torch.float16 else 1e4)
    args = fenced(x.to(dtype)), q, scale, torch.tensor(1e-33)
    y = linear(kernels, -1, *args)
    assert y[-1].isnan().all()
    assert_right(y[:-1], args[0][:-1], *args[1:])


@pytest.mark.parametrize("dtype, kernel", [(torch.bfloat16, TENSOR64), (torch.float16, TENSOR16), (torch.float32, FMA)])
def test_linear_reads_out_every_pair(kernels, dtype, kernel):
    """One-hot activations: all codes with all scale bytes come out exactly, NaN spoils its own output alone."""
    q = fenced(torch.arange(8).mul(0x22).add(0x10).to(torch.uint8).repeat(256, 1))  # codes 0..15 in order
    scale = fenced(e4m3(torch.arange(256).view(256, 1)))
    y = linear(kernels, kernel, fenced(torch.eye(16).to(dtype)), q, scale, torch.tensor(1.0))
    want = reference.decode(q, scale, torch.float64).t()
    assert torch.equal(y.isnan(), want.isnan()) and want.isnan().sum() == 32
    assert torch.equal(y.double().nan_to_num(7.0), want.nan_to_num(7.0))


def test_a_row_of_few_does_not_see_the_others(kernels):
    """The kernel for few rows gives a row the same bits in any company."""
    q, scale = weights(21, 16 * 35)
    x = fenced(torch.randn(8, 16 * 35).to(torch.bfloat16))
    whole = linear(kernels, ROWS, x, q, scale, torch.tensor(0.01))
    for m in (1, 2, 3, 5):
        assert_same_bits(linear(kernels, ROWS, x[:m], q, scale, torch.tensor(0.01)), whole[:m])
