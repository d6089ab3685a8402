"""What is particular to the Triton kernels: tiles that straddle, rows and matrices of any stride read where they lie,
and pieces that the operator's results show too rarely. tests/test_compile_only.py looks at the machine code.
"""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICE, assert_same_bits, fenced

from n3kernels.nvfp4 import reference, reference_quantize

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from n3kernels.triton_ops.nvfp4 import producers, quantize  # noqa: E402
from n3kernels.triton_ops.nvfp4.codes import e2m1_stochastic, sum_in_order, sum_of_rows  # noqa: E402
from n3kernels.triton_ops.nvfp4.dequantize import nvfp4_dequantize  # noqa: E402
from n3kernels.triton_ops.nvfp4.sources import matrices_of, silu_mul  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning")

# What to take of a [3, 48, 96] tensor. Tiles are 128 blocks, 16 x 8 or 32 x 4 of them.
VIEWS = {
    "rows": lambda t: t[0],
    "one row": lambda t: t[0, 0],
    "strided rows": lambda t: t[1, ::3, 16:96],
    "the same row": lambda t: t[0, :1].expand(20, 96),
    "stack of slices": lambda t: t[:, :16, :80],
    "transposed": lambda t: t[0].mT,
    "transposed slice": lambda t: t[0, :, 5:41].mT,
    "stack of transposed": lambda t: t[:, :16, :48].mT,
    "stack of every second": lambda t: t[::2].mT,
}
COPIED = {
    "every second element": lambda t: t[0, :, ::2],
    "leading dimensions that do not merge": lambda t: t.view(3, 6, 8, 96)[:, :5, :7],
}


def numbers(dtype=torch.float32) -> torch.Tensor:
    x = torch.randn(3, 48, 96) * torch.exp2(2 * torch.randn(3, 48, 96))
    x[0, 2, 3], x[1, 3, 20], x[2, :, 17] = float("nan"), float("-inf"), 0.0
    return fenced(x.to(dtype).to(DEVICE))


def assert_same(got, want):
    for a, b in zip(got, want, strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("view", VIEWS)
def test_read_in_place(view):
    x = VIEWS[view](numbers())
    m = matrices_of(x)
    assert m.x.data_ptr() == x.data_ptr()
    r, k = x.shape[-2:] if x.dim() > 1 else (1, x.shape[-1])
    row, i = torch.meshgrid(torch.arange(m.rows), torch.arange(k), indexing="ij")
    at = row // m.matrix_rows * m.strides[0] + row % m.matrix_rows * m.strides[1] + i * m.strides[2]
    flat = torch.as_strided(x, (int(at.max()) + 1,), (1,))
    assert_same_bits(flat[at.to(DEVICE)], x.reshape(-1, k))


@pytest.mark.parametrize("view", COPIED)
def test_what_is_copied(view):
    x = COPIED[view](numbers())
    assert matrices_of(x).x.is_contiguous() and matrices_of(x).x.data_ptr() != x.data_ptr()


OPTIONS = {
    "plain": {},
    "128x4 4/6": {"scale_layout": "128x4", "four_over_six": True},
    "stochastic": {"rounding": "stochastic"},
    "rotated, of each row": {"per_row": True, "rotate": True},
    "square, mse": {"block": "16x16", "four_over_six": True, "metric": "mse", "scale_layout": "128x4"},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("view", VIEWS)
def test_views_agree_with_the_definition(view, options):
    x, options = VIEWS[view](numbers(torch.bfloat16)), dict(OPTIONS[options])
    if options.get("block") == "16x16":
        x = x[: x.shape[0] // 16 * 16] if x.dim() == 2 else x if x.dim() == 3 else x.expand(16, -1)
    signs = torch.tensor([1.0, -1, -1, 1] * 4, device=DEVICE) if options.pop("rotate", False) else None
    seed = torch.tensor([2**62 + 12345, -7], device=DEVICE)
    got = quantize.nvfp4_quantize(x, None, signs, seed, **options)
    assert_same(got, reference_quantize.nvfp4_quantize(x, None, signs, seed, **options))


@pytest.mark.parametrize("rows, blocks", [(1, 127), (1, 129), (43, 3), (129, 1), (2, 130)])
def test_tiles_end_anywhere(rows, blocks):
    options = {"scale_layout": "128x4"} if blocks < 127 else {"per_row": rows == 1}
    x = fenced(torch.randn(rows, blocks * 16).to(DEVICE))
    assert_same(quantize.nvfp4_quantize(x, **options), reference_quantize.nvfp4_quantize(x, **options))


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("rows, blocks", [(3, 5), (2, 130)])
def test_rms_norm_in_one_launch_and_in_two(rows, blocks, given):
    """Given or per-row scales: one kernel. Otherwise what the first leaves is what the second takes."""
    x, residual = (fenced(torch.randn(rows, blocks * 16).to(DEVICE)) for _ in range(2))
    x[0], residual[0] = 0.0, 0.0  # NaN without eps, in blocks but not in padding
    call = (x.to(torch.bfloat16), torch.randn(blocks * 16, device=DEVICE), residual)
    scale = torch.tensor(0.01, device=DEVICE) if given else None
    for options in ({"keep": True, "eps": 1e-5}, {"per_row": not given, "scale_layout": "128x4", "eps": 0.0}):
        got = producers.rms_norm_nvfp4_quantize(*call, scale, **options)
        assert_same(got, reference_quantize.rms_norm_nvfp4_quantize(*call, scale, **options))


@pytest.mark.parametrize("shape, scales", [((6, 64), 6), ((2, 3, 48), 6), ((2, 3, 48), 2), ((4, 80), 1)])
@pytest.mark.parametrize("layout", ["linear", "128x4"])
def test_dequantize_with_scales_of_rows_and_matrices(shape, scales, layout):
    q, s, g = reference_quantize.nvfp4_quantize(torch.randn(shape, device=DEVICE), per_row=True, scale_layout=layout)
    g = g.reshape(scales, -1)[:, 0].contiguous().view(shape[:-1] if scales == 6 else (scales,))
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        want = reference.nvfp4_dequantize(q, s, g, dtype=dtype, scale_layout=layout)
        assert_same_bits(nvfp4_dequantize(q, s, g, dtype=dtype, scale_layout=layout), want)


# ---- pieces


@triton.jit
def _stochastic_codes(v_ptr, word_ptr, code_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    code = e2m1_stochastic(tl.load(v_ptr + i), tl.load(word_ptr + i).to(tl.uint32))
    tl.store(code_ptr + i, code.to(tl.int32))


def test_the_word_that_is_the_fraction_rounds_down():
    """The words on both sides of fraction * 2^32: that itself, where it is an integer, gives the lower code."""
    v = [0.25, 0.375, 0.5, 0.75, 1.25, 1.125, 2.5, 3.25, 5.0, 4.5, 6.0, 7.0, 2.0**-40, 0.0, -0.75, -5.999999]
    v = torch.tensor(v)
    lower = torch.tensor([0, 0, 1, 1, 2, 2, 4, 5, 6, 6, 7, 7, 0, 0, 1, 6])
    table = reference.code_values(v.device)
    a = v.abs().clamp(max=6).double()
    width = (table[(lower + 1).clamp(max=7)] - table[lower]).double().clamp(min=0.5)
    bound = ((a - table[lower].double()) / width * 2.0**32).ceil().long()
    for step in (-1, 0):
        word = (bound + step).clamp(0, 2**32 - 1)
        codes = torch.empty(16, dtype=torch.int32, device=DEVICE)
        _stochastic_codes[(1,)](v.to(DEVICE), word.to(DEVICE), codes, 16)
        want = lower + (word < bound).long() + 8 * torch.signbit(v).long()
        assert codes.tolist() == want.tolist()


@triton.jit
def _sums(t_ptr, in_order_ptr, of_rows_ptr, N: tl.constexpr):
    rows = tl.arange(0, N)
    sums = sum_in_order(tl.load(t_ptr + rows[:, None] * 16 + tl.arange(0, 16)[None, :]))
    tl.store(in_order_ptr + rows, sums)
    tl.store(of_rows_ptr + tl.arange(0, N // 16), sum_of_rows(sums))


def test_sums_have_their_order():
    t = torch.rand(128, 16, device=DEVICE)
    in_order, of_rows = torch.empty(128, device=DEVICE), torch.empty(8, device=DEVICE)
    _sums[(1,)](t, in_order, of_rows, 128)
    want = torch.zeros(128, device=DEVICE)
    for k in range(16):
        want = want + t[:, k]
    assert_same_bits(in_order, want)
    want = want.view(8, 16)
    for half in (8, 4, 2, 1):
        want = want[:, :half] + want[:, half:]
    assert_same_bits(of_rows, want[:, 0])


@triton.jit
def _silu_mul(a_ptr, b_ptr, y_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y_ptr + i, silu_mul(tl.load(a_ptr + i), tl.load(b_ptr + i)))


@pytest.mark.parametrize("low, high, size", [(-20.0, 20.0, 1.0), (-110.0, -80.0, 1e30), (-170.0, -110.0, 3e38)])
def test_silu_mul_keeps_its_digits(low, high, size):
    """Also where silu alone is below the smallest float32: 3 units in the last place of a normal result."""
    a, b = torch.rand(4096) * (high - low) + low, torch.randn(4096).clamp(-1, 1) * size
    y = torch.empty(4096, device=DEVICE)
    _silu_mul[(1,)](a.to(DEVICE), b.to(DEVICE), y, 4096)
    truth = torch.nn.functional.silu(a.double()) * b.double()
    normal = truth.abs() > 2.0**-126
    assert ((y.cpu().double() - truth).abs() <= 3 * 2.0**-23 * truth.abs())[normal].all()
    assert (y.cpu() - truth.float())[~normal].abs().max() <= 2.0**-148 if (~normal).any() else True
    assert torch.equal(torch.signbit(y.cpu()), torch.signbit(truth))
