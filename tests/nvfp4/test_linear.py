from __future__ import annotations

import zlib

import nvfp4_oracle as oracle
import pytest
import torch
import torch._dynamo.testing
from conftest import DEVICE, assert_close_to, assert_invariant, assert_same_bits, fenced
from hypothesis import given
from hypothesis import strategies as st
from nvfp4_oracle import e4m3, weights

import n3kernels
from n3kernels.nvfp4 import NVFP4Tensor, linear

OPS = ("nvfp4_linear",)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

# tokens, 0 included; rows of W, both sides of a vector; blocks of 16 along K, odd and even; dtype; bias; activation
problems = st.tuples(
    st.integers(0, 5), st.integers(1, 40), st.integers(1, 9), st.sampled_from(DTYPES), st.booleans(),
    st.sampled_from([None, "relu2"]),
)  # fmt: skip


def inputs(m, n, blocks, dtype, bias=False, activation=None, scale=1.0):
    """The same for the same arguments. Sums of e2m1 * e4m3 are of the order of 1 under the global scale."""
    torch.manual_seed(zlib.crc32(repr((m, n, blocks)).encode()))
    k = 16 * blocks
    w = NVFP4Tensor.from_parts(*weights(n, k, 0.01 / k**0.5, 0x30, 0x50))
    x = fenced((torch.randn(m, k) * scale).to(dtype).to(DEVICE))
    return x, w, fenced(torch.randn(n).to(dtype).to(DEVICE)) if bias else None, activation


def truth(x, w, bias=None, activation=None):
    """y in float64, and what its rounding errors are relative to: the sum of the terms' magnitudes."""
    exact = oracle.decode(w.q, w.block_scale, w.global_scale)
    y, size = x.double() @ exact.t(), x.double().abs() @ exact.abs().t()
    if bias is not None:
        y, size = y + bias.double(), size + bias.double().abs()
    return (y, size) if activation is None else (y.relu().square(), 2 * size.square())


def assert_right(out, *args):
    y, size = truth(*args)
    assert_close_to(out, y, 1e-6, size)


# ---- agreement with the definition


@given(problems)
def test_agrees_with_the_definition(backend, problem):
    args = inputs(*problem)
    assert_right(linear(*args), *args)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_code_with_every_scale_is_exact(backend, dtype):
    """One-hot activations read out W: all 4096 pairs, scales that are 0, subnormal or negative; NaN spoils its row."""
    q = torch.arange(8, device=DEVICE).mul(0x22).add(0x10).to(torch.uint8).repeat(256, 1)  # codes 0..15 in order
    s = e4m3(torch.arange(256)).view(256, 1)
    w = NVFP4Tensor.from_parts(q, s, torch.ones((), device=DEVICE))
    y = linear(torch.eye(16, dtype=dtype, device=DEVICE), w)
    want = oracle.decode(q, s).t()
    assert torch.equal(y.isnan(), want.isnan()) and want.isnan().sum() == 32
    assert torch.equal(y.double().nan_to_num(7.0), want.nan_to_num(7.0))


@pytest.mark.parametrize("m, n, k", [(3, n, k) for n in (1, 16, 464) for k in (16, 48, 1856)] + [(2, 1856, 2688)])
def test_published_shapes(backend, m, n, k):
    """Shards of 464 rows, K = 1856 and 2688 of Nemotron 3; one row, one block, an odd number of blocks."""
    if backend == "triton" and DEVICE == "cpu":
        n = min(n, 80)  # interpreted
    args = inputs(m, n, k // 16, torch.bfloat16, True)
    assert_right(linear(*args), *args)


@pytest.mark.parametrize("m", [1, 9, 33])
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-6), (torch.bfloat16, 2.5e-3), (torch.float16, 5e-4)])
def test_relative_error_at_2688(backend, m, dtype, bound):
    args = inputs(m, 64, 168, dtype)
    y, _ = truth(*args)
    assert (linear(*args).double() - y).norm() / y.norm() < bound


def test_four_over_six_weights(backend):
    """Block scales that are not amax / 6 need nothing from the kernel."""
    x, *_ = inputs(4, 8, 8, torch.float32)
    dense = torch.randn(24, 128, device=DEVICE)
    with n3kernels.use_backend(None):
        w = n3kernels.nvfp4.quantize(dense, four_over_six=True)
    assert_right(linear(x, w), x, w)


def test_swizzled_scales():
    x, w, *_ = inputs(4, 130, 5, torch.float32)
    assert_same_bits(linear(x, w.to_layout("128x4")), linear(x, w))


# ---- range: relative bounds, where the absolute part of the general rule would hide everything


def half_ulp(dtype):
    return 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2


@pytest.mark.parametrize("activation", [None, "relu2"])
def test_huge_activations(backend, activation):
    """bfloat16 up to 3e38: the float32 sums do not overflow where the scaled result does not."""
    x, w, bias, _ = inputs(3, 17, 5, torch.bfloat16)
    x = (x.float() / x.float().abs().max() * 3e38).to(torch.bfloat16)
    w = w._replace(global_scale=torch.full_like(w.global_scale, 1e-24 if activation else 1e-5))
    out = linear(x, w, bias, activation)
    y, size = truth(x, w, bias, activation)
    assert out.isfinite().all()
    assert ((out.double() - y).abs() <= half_ulp(out.dtype) * y.abs() + 1e-6 * size).all()


@pytest.mark.parametrize("global_scale", [0.0, 1e-30, 1e-12, 1e12, 1e30, -0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_global_scales(backend, global_scale, dtype):
    x, w, bias, _ = inputs(3, 17, 5, dtype)
    w = w._replace(global_scale=torch.full_like(w.global_scale, global_scale))
    y, size = truth(x, w)
    out = linear(x, w).double()
    assert ((out - y).abs() <= half_ulp(dtype) * y.abs() + 1e-6 * size).all()


# ---- invariants


@given(problems, st.integers(-60, 60))
def test_linear_in_a_power_of_two(backend, problem, exponent):
    m, n, blocks, *_ = problem
    x, w, *_ = inputs(m, n, blocks, torch.float32)
    scaled = w._replace(global_scale=w.global_scale * 2.0**exponent)
    assert_same_bits(linear(x, scaled), linear(x, w) * 2.0**exponent)


def tokens(backend, many):
    return 12 if backend == "triton" and DEVICE == "cpu" else many


@given(st.sampled_from([1, 2, 7, 8, 31, 32, 100, 300]), problems)
def test_a_row_does_not_see_the_batch(backend, m, problem):
    """Alone or in any company, beside a row of NaN or not: the same bits."""
    _, n, blocks, dtype, bias, activation = problem
    m = min(m, tokens(backend, 300))
    x, w, *options = inputs(m + 1, n, blocks, dtype, bias, activation)
    x[-1] = float("nan")
    with n3kernels.batch_invariant():
        whole = linear(x, w, *options)
        assert not whole[:-1].isnan().any() and whole[-1].isnan().all()
        for i in {0, m // 2, m - 1}:
            assert_invariant(backend, linear(x[i], w, *options), whole[i])
        assert_invariant(backend, linear(x[: m // 2 + 1], w, *options), whole[: m // 2 + 1])


@given(problems)
def test_an_output_does_not_see_other_rows_of_w(backend, problem):
    x, w, bias, activation = inputs(*problem)
    whole = linear(x, w, bias, activation)
    i = w.shape[0] // 2
    one = NVFP4Tensor.from_parts(w.q[i:], w.block_scale[i:], w.global_scale)
    part = linear(x, one, None if bias is None else bias[i:], activation)
    assert_invariant(backend, part, whole[:, i:].contiguous())


@pytest.mark.parametrize("m", [1, 5, 70])
def test_threads_do_not_show(backend, m):
    n = 24 if backend == "triton" else 600
    args = inputs(min(m, tokens(backend, m)), n, 21, torch.bfloat16, True, "relu2")
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(linear(*args))
    finally:
        torch.set_num_threads(threads)
    assert_invariant(backend, results[0], results[1])
    assert_invariant(backend, results[0], results[2])


def test_runs_repeat(backend):
    args = inputs(5, 40, 9, torch.bfloat16, True)
    assert_same_bits(linear(*args), linear(*args))


# ---- shapes and strides


@pytest.mark.parametrize("lead", [(), (0,), (2, 3), (2, 0, 3)])
def test_leading_dimensions(backend, lead):
    _, w, bias, _ = inputs(1, 7, 3, torch.float32, True)
    x = torch.randn(*lead, 48, device=DEVICE)
    y = linear(x, w, bias)
    assert y.shape == (*lead, 7) and y.is_contiguous()
    assert_right(y.view(-1, 7), x.view(-1, 48), w, bias)


def test_no_rows_of_w(backend):
    x, w, *_ = inputs(3, 0, 3, torch.float32)
    assert linear(x, w).shape == (3, 0)


def test_strided_operands(backend):
    x, w, bias, _ = inputs(6, 8, 8, torch.bfloat16, True)
    for view in (x[::2], x.t().contiguous().t(), x[:1].expand(4, 128)):
        assert_invariant(backend, linear(view, w, bias), linear(view.contiguous(), w, bias))
    half = NVFP4Tensor.from_parts(w.q[::2, 32:], w.block_scale[::2, 4:], w.global_scale.view(1))
    args = x[:, 64:], half, bias[::2]
    assert_right(linear(*args), *args)


# ---- gradients


@pytest.mark.parametrize("activation", [None, "relu2"])
@pytest.mark.parametrize("lead", [(3,), (), (2, 2)])
def test_gradients(activation, lead):
    _, w, *_ = inputs(1, 5, 2, torch.float32)
    x = torch.randn(*lead, 32, dtype=torch.double, device=DEVICE, requires_grad=True)
    bias = torch.randn(5, dtype=torch.double, device=DEVICE, requires_grad=True)
    w = w._replace(global_scale=w.global_scale * 10)
    with n3kernels.use_backend("reference"):
        torch.autograd.gradcheck(lambda x, b: linear(x, w, b, activation), (x, bias))
        torch.autograd.gradcheck(lambda x: linear(x, w, None, activation), (x,))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", [None, "relu2"])
def test_gradients_in_every_dtype(dtype, activation):
    x, w, bias, _ = inputs(4, 33, 6, dtype, True)
    x, bias = x.clone().requires_grad_(), bias.clone().requires_grad_()
    grad_y = torch.randn(4, 33, device=DEVICE).to(dtype)
    dx, dbias = torch.autograd.grad(linear(x, w, bias, activation), (x, bias), grad_y)
    assert dx.dtype == dbias.dtype == dtype

    exact = oracle.decode(w.q, w.block_scale, w.global_scale)
    v = x.detach().double() @ exact.t() + bias.detach().double()
    dv = grad_y.double() if activation is None else 2 * v.relu() * grad_y.double()
    bound = 2e-6 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    for got, want in ((dx, dv @ exact), (dbias, dv.sum(0))):
        assert (got.double() - want).norm() < bound * want.norm()


# ---- framework


@pytest.mark.parametrize("activation, bias", [(None, False), ("relu2", True)])
@pytest.mark.parametrize("m, grad", [(3, False), (3, True), (0, False)])
def test_opcheck(activation, bias, m, grad):
    x, w, bias, _ = inputs(m, 5, 3, torch.float32, bias)
    x = x.clone().requires_grad_(grad)
    oracle.opcheck(torch.ops.n3.nvfp4_linear.default, (x, w.q, w.block_scale, w.global_scale, bias, activation))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_break(dynamic):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    fn = torch.compile(lambda x, w, b: linear(x, w, b, "relu2") * 2, fullgraph=True, dynamic=dynamic, backend=counter)
    _, w, bias, _ = inputs(1, 5, 3, torch.float32, True)
    for m in (7, 11, 13):  # no other size of the call, or the two would be taken for one
        x = torch.randn(m, 48, device=DEVICE, requires_grad=True)
        y = fn(x, w, bias)
        torch.testing.assert_close(y, linear(x, w, bias, "relu2") * 2)
        y.sum().backward()
        assert x.grad.isfinite().all()
    assert not dynamic or counter.frame_count == 1


def test_float64_is_the_reference_s(backend):
    x, w, *_ = inputs(2, 5, 2, torch.float64)
    if backend == "reference":
        y, size = truth(x, w)
        assert ((linear(x, w) - y).abs() <= 1e-14 * size).all()
    else:
        with pytest.raises((NotImplementedError, RuntimeError), match="float64"):
            linear(x, w)


BAD = [
    ({"x": torch.zeros(2, 32, dtype=torch.int64)}, "x must be float32, float16 or bfloat16, got int64"),
    ({"q": torch.zeros(4, 16, dtype=torch.int8)}, "q must be uint8, got int8"),
    ({"block_scale": torch.zeros(4, 2)}, "block_scale must be float8_e4m3fn, got float32"),
    ({"global_scale": torch.ones((), dtype=torch.float16)}, "global_scale must be float32, got float16"),
    ({"x": torch.zeros(())}, "x must have at least 1 dimension, got 0"),
    ({"x": torch.zeros(2, 24)}, "x must have a last dimension that is a positive multiple of 16, got 24"),
    ({"x": torch.zeros(2, 0)}, "x must have a last dimension that is a positive multiple of 16, got 0"),
    ({"q": torch.zeros(1, 4, 16, dtype=torch.uint8)}, "q must have 2 dimensions, got 3"),
    ({"x": torch.zeros(2, 48)}, "q must have shape [4, 24], got [4, 16]"),
    ({"block_scale": torch.zeros(4, 3).to(torch.float8_e4m3fn)}, "block_scale must have shape [4, 2], got [4, 3]"),
    ({"global_scale": torch.ones(4)}, "global_scale must have 1 element, got 4"),
    ({"bias": torch.zeros(4, dtype=torch.float16)}, "bias must have the dtype of x (float32), got float16"),
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
        torch.ops.n3.nvfp4_linear.default(**call)
    assert str(error.value) == f"n3::nvfp4_linear: {message}"
