"""W4A8: ``nvfp4.linear(..., compute="fp8")``."""

from __future__ import annotations

import zlib

import numpy as np
import nvfp4_oracle as oracle
import pytest
import torch
from conftest import DEVICE, assert_close_to, assert_invariant, assert_same_bits, fenced
from hypothesis import given
from hypothesis import strategies as st
from nvfp4_oracle import E4M3, e4m3, weights

import n3kernels
from n3kernels.nvfp4 import NVFP4Tensor, linear, reference_fp8

OPS = ("nvfp4_linear_fp8",)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

# tokens, 0 included; rows of W; blocks along K, both sides of the 8 that are multiplied at a time; dtype; bias;
# activation
problems = st.tuples(
    st.integers(0, 5), st.integers(1, 40), st.integers(1, 11), st.sampled_from(DTYPES), st.booleans(),
    st.sampled_from([None, "relu2"]),
)  # fmt: skip


def fp8(x, w, bias=None, activation=None):
    return linear(x, w, bias, activation, compute="fp8")


def inputs(m, n, blocks, dtype, bias=False, activation=None):
    """The same for the same arguments."""
    torch.manual_seed(zlib.crc32(repr((m, n, blocks)).encode()))
    k = 16 * blocks
    w = NVFP4Tensor.from_parts(*weights(n, k, 0.01 / k**0.5, 0x30, 0x50))
    x = fenced(torch.randn(m, k).to(dtype).to(DEVICE))
    return x, w, fenced(torch.randn(n).to(dtype).to(DEVICE)) if bias else None, activation


# ---- the definition, once more and by brute force


def nearest_e4m3(v):
    """The nearest e4m3 value of each v, the even byte of two, in float64."""
    v = np.asarray(v, np.float64)
    return np.sign(v) * E4M3[oracle.nearest(E4M3[:127], np.abs(v))]


def folded(w):
    """W in 8 bits, and the power of two of each row, found by trying."""
    exact = oracle.decode(w.q, w.block_scale).cpu().numpy()
    scales = np.nan_to_num(np.abs(E4M3[w.block_scale.contiguous().view(torch.uint8).cpu().numpy()]))
    rows = [next((2.0**p for p in range(-20, 9) if 6 * s <= 448 * 2.0**p), 0) if s else 1.0 for s in scales.max(1)]
    power = np.array(rows)[:, None]
    return nearest_e4m3(np.nan_to_num(exact / power)), power


def truth(x, w, bias=None, activation=None):
    """y in float64, and what its rounding errors are relative to: the sum of the terms' magnitudes."""
    wide = x.float().cpu().numpy()
    scale = np.abs(wide).max(-1, keepdims=True, initial=0) / np.float32(448)
    scale = np.where(scale == 0, np.float32(1), scale)
    x8 = torch.from_numpy(nearest_e4m3(wide / scale) * scale)
    w8, power = folded(w)
    w8 = torch.from_numpy(w8 * power) * w.global_scale.double().cpu().reshape(())
    y, size = (x8 @ w8.t()).to(DEVICE), (x8.abs() @ w8.abs().t()).to(DEVICE)
    if bias is not None:
        y, size = y + bias.double(), size + bias.double().abs()
    return (y, size) if activation is None else (y.relu().square(), 2 * size.square())


def assert_right(out, *args):
    y, size = truth(*args)
    # sm_90 adds 128 products with some 14 bits before the sum moves to float32.
    assert_close_to(out, y, 1e-6 if DEVICE == "cpu" else 2e-3, size)


@given(problems)
def test_agrees_with_the_definition(backend, problem):
    args = inputs(*problem)
    assert_right(fp8(*args), *args)


@pytest.mark.parametrize("top", [0x7E, 0x62, 0x61, 0x60, 0x48, 0x38, 0x08, 0x03, 0x01])
def test_every_code_with_every_scale(backend, top):
    """One-hot activations, 448 so that their scale is 1, read out the folded weights, beside a block whose scale sets
    the power of the row."""
    n = 2 * (top + 1)
    scales = torch.arange(top + 1).repeat(2) | torch.tensor([0, 0x80]).repeat_interleave(top + 1)
    every = torch.arange(8, device=DEVICE).mul(0x22).add(0x10).to(torch.uint8).repeat(n, 2)  # codes 0..15 twice
    s = e4m3(torch.stack([scales, torch.full((n,), top)], 1))
    w = NVFP4Tensor.from_parts(every, s, torch.ones((), device=DEVICE))
    y = fp8(448 * torch.eye(32, device=DEVICE)[:16], w)
    want, power = folded(w)
    assert torch.equal(y.double().cpu(), torch.from_numpy(448 * (want * power)[:, :16].T))


def test_only_codes_of_one_and_a_half_round():
    """While half a scaled block scale is a normal number; 3 and 6 are exponent steps of the rounded 1.5."""
    q = torch.arange(8).mul(0x22).add(0x10).to(torch.uint8).repeat(0x7F, 2)
    s = torch.stack([torch.arange(0x7F), torch.full((0x7F,), 0x7E)], 1).to(torch.uint8).view(torch.float8_e4m3fn)
    w8, p = reference_fp8.fold_weight(q, s)
    assert p.unique().tolist() == [3]
    exact = oracle.decode(q.to(DEVICE), s.to(DEVICE)).cpu()[:, :8] / 2.0**3
    normal = s[:, :1].double() / 2**3 >= 2.0**-5
    rounded = w8[:, :8].double() != exact
    assert normal.sum() == 87 and not (rounded & normal)[:, [0, 1, 2, 4, 6]].any()
    assert (rounded & normal)[:, 3].sum() == 54  # 5 mantissas of 8, in 11 octaves but one scale
    codes = w8.view(torch.uint8).int()[normal[:, 0]]
    step = codes[:, 3] - codes[:, 2]  # of the byte, from the scale to its rounded one and a half
    assert set(step.tolist()) == {4, 5}
    assert torch.equal(codes[:, 5], codes[:, 3] + 8) and torch.equal(codes[:, 7], codes[:, 3] + 16)
    assert torch.equal(codes[:, 1], codes[:, 2] - 8) and torch.equal(codes[:, 6], codes[:, 2] + 16)


@pytest.mark.parametrize("kind", ["normal", "student-t and outliers", "relu2"])
def test_error_added_to_the_exact_product(kind):
    """The brief's three kinds of input: at most 0.04, and in all less than with 4-bit activations."""
    torch.manual_seed(0)
    x, dense = torch.randn(128, 2688), torch.randn(256, 2688)
    if kind == "relu2":
        x = x.relu().square()
    elif kind != "normal":
        dense = torch.distributions.StudentT(4.0).sample(dense.shape)
        x[:, torch.randperm(2688)[:16]] *= 40
    with n3kernels.use_backend("reference"):
        w, x4 = n3kernels.nvfp4.quantize(dense), n3kernels.nvfp4.quantize(x)
        exact, y = linear(x.double(), w), fp8(x.double(), w)
        y4 = n3kernels.nvfp4.gemm(x4, w, torch.float32)
    true = x.double() @ dense.double().t()
    assert (y - exact).norm() < 0.04 * exact.norm()
    assert (y - true).norm() < (y4 - true).norm()


@pytest.mark.parametrize("m", [2, 40])
def test_rows_with_and_without_tiny_blocks(backend, m):
    """Weights that are subnormal after folding, in rows among others: of every power of two, alone and side by side."""
    x, w, *_ = inputs(9 if backend == "triton" and DEVICE == "cpu" else m, 60, 5, torch.float32)
    scales = w.block_scale.view(torch.uint8)
    scales[3, 2], scales[10:14, 1], scales[31:34, 4], scales[59, 0] = 0x01, 0x06, 0x02, 0x07
    tops = torch.tensor([0x01, 0x08, 0x18, 0x28, 0x38, 0x48, 0x58, 0x68, 0x78, 0x7E])
    scales[40:50], scales[40:50, 3] = 0x01, tops.to(torch.uint8).to(DEVICE)
    scales[50:52] = 0
    assert_right(fp8(x, w), x, w)


@pytest.mark.parametrize("small", [6e-43, 9e-43, 2e-41, 1e-38])
def test_rows_of_subnormal_scales(backend, small):
    """amax / 448 has few bits then; what is above 448 for it saturates."""
    x, w, *_ = inputs(3, 7, 2, torch.float32)
    x[1] = x[1] / x[1].abs().max() * small
    with n3kernels.use_backend("reference"):
        want = fp8(x, w._replace(global_scale=torch.full_like(w.global_scale, 1e30)))
    got = fp8(x, w._replace(global_scale=torch.full_like(w.global_scale, 1e30)))
    torch.testing.assert_close(got, want, rtol=1e-6, atol=2e-15)  # a last place of sum * sx


# ---- invariants


@pytest.mark.parametrize("m", [1, 5, 300])
def test_threads_do_not_show(backend, m):
    few = backend == "triton" and DEVICE == "cpu"
    x, w, bias, _ = inputs(min(m, 9) if few else m, 20 if few else 300, 12, torch.bfloat16, True)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(fp8(x, w, bias))
    finally:
        torch.set_num_threads(threads)
    assert_right(results[0], x, w, bias)
    assert_invariant(backend, results[0], results[1])
    assert_invariant(backend, results[0], results[2])


@given(problems, st.integers(-40, 40))
def test_linear_in_a_power_of_two(backend, problem, exponent):
    """Of the global scale, and of x while it stays in range."""
    m, n, blocks, *_ = problem
    x, w, *_ = inputs(m, n, blocks, torch.float32)
    y = fp8(x, w) * 2.0**exponent
    assert_same_bits(fp8(x, w._replace(global_scale=w.global_scale * 2.0**exponent)), y)
    assert_same_bits(fp8(x * 2.0**exponent, w), y)


@given(st.sampled_from([1, 2, 7]), problems)
def test_a_row_does_not_see_the_batch(backend, m, problem):
    """Alone or in any company, beside a row of NaN or of infinities: the same bits."""
    _, n, blocks, dtype, bias, activation = problem
    x, w, *options = inputs(m + 2, n, blocks, dtype, bias, activation)
    x[-1, 3], x[-2, 5] = float("nan"), float("-inf")
    with n3kernels.batch_invariant():
        whole = fp8(x, w, *options)
        assert not whole[:-2].isnan().any() and whole[-2:].isnan().all()
        for i in {0, m // 2, m - 1}:
            assert_invariant(backend, fp8(x[i], w, *options), whole[i])


@given(problems)
def test_a_row_of_w_does_not_see_the_others(backend, problem):
    x, w, bias, activation = inputs(*problem)
    whole = fp8(x, w, bias, activation)
    i = w.shape[0] // 2
    one = NVFP4Tensor.from_parts(w.q[i:], w.block_scale[i:], w.global_scale)
    part = fp8(x, one, None if bias is None else bias[i:], activation)
    assert_invariant(backend, part, whole[:, i:].contiguous())
    w.block_scale.view(torch.uint8)[i, 0] = 0xFF
    spoilt = fp8(x, w, bias, activation)
    rest = [j for j in range(w.shape[0]) if j != i]
    assert spoilt[:, i].isnan().all()
    assert_invariant(backend, spoilt[:, rest], whole[:, rest])


def test_zero_and_tiny_rows(backend):
    """A row of zeros, one whose scale underflows, weights of zeros."""
    x, w, *_ = inputs(3, 5, 3, torch.float32)
    x[0], x[1] = 0.0, 1e-44
    w.block_scale.view(torch.uint8)[2] = 0
    y = fp8(x, w)
    assert not y[:2].any() and not y[:, 2].any() and y[2, [0, 1, 3, 4]].all()


@pytest.mark.parametrize("m, n, k", [(3, 1, 16), (2, 464, 48), (2, 80, 1856), (17, 16, 2688)])
def test_published_shapes(backend, m, n, k):
    args = inputs(m, min(n, 80) if DEVICE == "cpu" else n, k // 16, torch.bfloat16, True)
    assert_right(fp8(*args), *args)


@pytest.mark.parametrize("lead", [(), (0,), (2, 3)])
def test_leading_dimensions_and_strides(backend, lead):
    _, w, bias, _ = inputs(1, 7, 3, torch.float32, True)
    x = torch.randn(*lead, 96, device=DEVICE)[..., ::2]
    y = fp8(x, w, bias)
    assert y.shape == (*lead, 7) and y.is_contiguous()
    assert_right(y.view(-1, 7), x.reshape(-1, 48), w, bias)


def test_no_rows_of_w(backend):
    x, w, *_ = inputs(3, 0, 3, torch.float32)
    assert fp8(x, w).shape == (3, 0)


# ---- framework


@pytest.mark.parametrize("activation", [None, "relu2"])
def test_gradients_are_those_of_the_exact_product(activation):
    x, w, bias, _ = inputs(4, 9, 3, torch.float32, True)
    x, bias = x.clone().requires_grad_(), bias.clone().requires_grad_()
    grad_y = torch.randn(4, 9, device=DEVICE)
    y = fp8(x, w, bias, activation)
    dx, dbias = torch.autograd.grad(y, (x, bias), grad_y)
    dv = grad_y if activation is None else 2 * y.detach().sqrt() * grad_y
    torch.testing.assert_close(dx, (dv.double() @ oracle.decode(w.q, w.block_scale, w.global_scale)).float())
    torch.testing.assert_close(dbias, dv.sum(0))


@pytest.mark.parametrize("m, grad", [(3, False), (3, True), (0, False)])
def test_opcheck(m, grad):
    x, w, bias, _ = inputs(m, 5, 3, torch.float32, True)
    x = x.clone().requires_grad_(grad)
    oracle.opcheck(torch.ops.n3.nvfp4_linear_fp8.default, (x, w.q, w.block_scale, w.global_scale, bias, "relu2"))


def test_compiles_without_a_break():
    torch._dynamo.reset()
    fn = torch.compile(lambda x, w, b: fp8(x, w, b) * 2, fullgraph=True, dynamic=True, backend="aot_eager")
    x, w, bias, _ = inputs(7, 5, 3, torch.float32, True)
    torch.testing.assert_close(fn(x, w, bias), fp8(x, w, bias) * 2)


def test_compute_is_a_choice():
    x, w, *_ = inputs(2, 5, 2, torch.float32)
    assert_same_bits(linear(x, w, compute="exact"), linear(x, w))
    with pytest.raises(RuntimeError) as error:
        linear(x, w, compute="int8")
    assert str(error.value) == "n3::nvfp4_linear: compute must be one of exact, fp8, got int8"


BAD = [
    ({"x": torch.zeros(2, 32, dtype=torch.int64)}, "x must be float32, float16 or bfloat16, got int64"),
    ({"q": torch.zeros(4, 16, dtype=torch.int8)}, "q must be uint8, got int8"),
    ({"x": torch.zeros(2, 24)}, "x must have a last dimension that is a positive multiple of 16, got 24"),
    ({"block_scale": torch.zeros(4, 3).to(torch.float8_e4m3fn)}, "block_scale must have shape [4, 2], got [4, 3]"),
    ({"global_scale": torch.ones(4)}, "global_scale must have 1 element, got 4"),
    ({"bias": torch.zeros(5)}, "bias must have shape [4], got [5]"),
    ({"activation": "gelu"}, "activation must be one of None, relu2, got gelu"),
]


@pytest.mark.parametrize("change, message", BAD)
def test_bad_calls(backend, change, message):
    call = {"x": torch.zeros(2, 32), "q": torch.zeros(4, 16, dtype=torch.uint8),
            "block_scale": torch.zeros(4, 2).to(torch.float8_e4m3fn), "global_scale": torch.ones(()), "bias": None,
            "activation": None, **change}  # fmt: skip
    call = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in call.items()}
    with pytest.raises(RuntimeError) as error:
        torch.ops.n3.nvfp4_linear_fp8.default(**call)
    assert str(error.value) == f"n3::nvfp4_linear_fp8: {message}"
