"""The text of the CUDA kernels, run on the CPU by tests/cuda_emulator: indices, masks, layouts, barriers, copies.

It proves nothing about a GPU, where the same operators are tested through the dispatcher; it finds on any machine what
would otherwise be found on a GPU.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import FENCE, assert_close_to, assert_same_bits, fenced
from hypothesis import given
from hypothesis import strategies as st

from n3kernels.nvfp4 import reference

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(
    not shutil.which("g++") or not (ROOT / "csrc").is_dir(), reason="needs g++ and the sources"
)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]  # in the order of the emulator's codes
ROWS, TENSOR16, TENSOR64, TENSOR128, FMA = range(5)  # linear::Kernel


@pytest.fixture(scope="session")
def kernels(tmp_path_factory):
    library = tmp_path_factory.mktemp("emulator") / "nvfp4.so"
    emulator = ROOT / "tests" / "cuda_emulator"
    flags = ["-std=c++20", "-O1", "-ffp-contract=off", "-fPIC", "-shared", f"-I{ROOT / 'csrc'}", f"-I{emulator}"]
    subprocess.run(["g++", *flags, str(emulator / "nvfp4.cpp"), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def pointer(t):
    return ctypes.c_void_p(None if t is None else t.data_ptr())


def size(v):
    return ctypes.c_int64(v)


def room(shape, dtype):
    """Uninitialised memory between fences, as a GPU's allocator would hand it out: (tensor, check)."""
    whole = torch.full((torch.Size(shape).numel() + 2 * FENCE,), 0x7F, dtype=torch.uint8)
    whole = whole.repeat_interleave(dtype.itemsize).view(dtype)
    inside = whole[FENCE : whole.numel() - FENCE].view(shape)

    def untouched():
        outside = torch.cat([whole[:FENCE], whole[whole.numel() - FENCE :]])
        assert (outside.view(torch.uint8) == 0x7F).all(), "written out of range"

    return inside, untouched


def e4m3(t):
    return t.to(torch.uint8).view(torch.float8_e4m3fn)


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
def test_dequantize(kernels, dtype, swizzled):
    """All 256 bytes with all 256 scales, NaN included."""
    q = fenced(torch.arange(256, dtype=torch.uint8).view(1, 256).repeat(256, 1))
    scale = fenced(e4m3(torch.arange(256).view(256, 1).repeat(1, 32)))
    given_scale = reference.nvfp4_swizzle_scale(scale) if swizzled else scale
    global_scale = torch.tensor(0.37)
    out, untouched = room((256, 512), dtype)
    kernels.emulate_dequantize(DTYPES.index(dtype), pointer(q), pointer(given_scale), pointer(global_scale),
                               pointer(out), size(256), size(512), swizzled)  # fmt: skip
    untouched()
    want = reference.nvfp4_dequantize(q, scale, global_scale, dtype=dtype)
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


# ---- quantise: byte for byte


def quantize_inputs(kind, rows, k, dtype):
    x = torch.randn(rows, k)
    if kind == "ties":
        x = torch.randint(-24, 25, (rows, k)) * 0.25
    elif kind == "bits":
        x = torch.randint(-(2**31), 2**31 - 1, (rows, k), dtype=torch.int32).view(torch.float32)
    x = x.to(dtype)
    if kind == "holes":
        x.view(-1)[3], x.view(-1)[-1], x.view(-1)[5] = float("nan"), float("-inf"), -0.0
    return fenced(x)


@given(
    st.sampled_from(["normal", "ties", "bits", "holes"]), st.integers(1, 40), st.integers(1, 9),
    st.sampled_from(DTYPES), st.booleans(), st.booleans(), st.sampled_from([None, 0.0, 0.013, 1e-40, 3e38]),
    st.booleans(),
)  # fmt: skip
def test_quantize(kernels, kind, rows, blocks, dtype, four_over_six, swizzled, given_scale, reverse):
    x = quantize_inputs(kind, rows, 16 * blocks, dtype)
    global_scale = None if given_scale is None else torch.tensor(given_scale)
    layout = "128x4" if swizzled else "linear"
    want = reference.nvfp4_quantize(x, global_scale, four_over_six=four_over_six, scale_layout=layout)
    (q, q_ok), (scale, scale_ok), (out, out_ok) = (
        room(t.shape, torch.uint8 if t.element_size() == 1 else t.dtype) for t in want
    )
    kernels.emulate_quantize(DTYPES.index(dtype), pointer(x), pointer(global_scale), pointer(q), pointer(scale),
                             pointer(out), size(rows), size(16 * blocks), four_over_six, swizzled, reverse)  # fmt: skip
    for untouched in (q_ok, scale_ok, out_ok):
        untouched()
    assert_same_bits(q, want[0])
    assert_same_bits(scale, want[1].view(torch.uint8))
    assert_same_bits(out.view(1), want[2].view(1))


@pytest.mark.parametrize("four_over_six", [False, True])
def test_the_order_of_the_divisions(kernels, four_over_six):
    """amax / 6 * S_enc and amax * (S_enc / 6) give different scales for 12 of these 4096 maxima, S_enc being 0.3."""
    x = torch.zeros(4096, 16)
    x[:, 0] = torch.arange(4096) / 16
    x, global_scale = fenced(x), 1 / torch.tensor(0.3)
    want = reference.nvfp4_quantize(x, global_scale, four_over_six=four_over_six)
    q, scale, out = (torch.empty(t.shape, dtype=t.dtype) for t in want)
    kernels.emulate_quantize(0, pointer(x), pointer(global_scale), pointer(q), pointer(scale), pointer(out), size(4096),
                             size(16), four_over_six, False, False)  # fmt: skip
    assert_same_bits(scale, want[1])
    assert_same_bits(q, want[0])


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
