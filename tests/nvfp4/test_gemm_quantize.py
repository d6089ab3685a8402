from __future__ import annotations

import nvfp4_oracle as oracle
import pytest
import torch
import torch._dynamo.testing
from conftest import DEVICE, assert_invariant, assert_same_bits, fenced
from gemm_problems import exact, inputs, rows_of, swizzled, truth
from hypothesis import given
from hypothesis import strategies as st

import n3kernels
from n3kernels.nvfp4 import NVFP4Tensor, gemm, gemm_quantize, quantize, reference

OPS = ("nvfp4_gemm.quantized",)
INTERPRETED = DEVICE == "cpu"
NAN = 0x7F

# rows of a; blocks of 16 rows of b, of K; bias; global scales per row of a, of b; their 128x4 scales; act; tiles
problems = st.tuples(
    st.integers(0, 19), st.integers(0, 6), st.integers(1, 7), st.booleans(), st.booleans(), st.booleans(),
    st.booleans(), st.booleans(), st.sampled_from([None, "relu2"]), st.sampled_from(["linear", "128x4"]),
)  # fmt: skip


def made(problem):
    """Operands and options of a call of the wrapper."""
    m, n, blocks, bias, a_rows, b_rows, a_tiled, b_tiled, activation, layout = problem
    a, b, _, bias = inputs(m, 16 * n, blocks, torch.float32, bias, a_rows, b_rows, a_tiled, b_tiled)
    return (a, b, scale_of(a, b, bias, activation), bias, activation), {"scale_layout": layout}


def activated(y, activation):
    return y.relu().square() if activation else y


def scale_of(a, b, bias=None, activation=None):
    """Under which the largest values saturate a little."""
    y = activated(truth(a, b, bias)[0], activation)
    largest = y.abs().amax().item() if y.numel() else 1.0
    return torch.tensor(0.8 * largest / 2688, dtype=torch.float32, device=DEVICE)


def assert_same(t, want):
    assert (t.shape, t.scale_layout) == (want.shape, want.scale_layout)
    assert_same_bits(t.q, want.q)
    assert_same_bits(t.block_scale, want.block_scale)
    assert_same_bits(t.global_scale, want.global_scale)


# ---- the definition


@given(problems)
def test_is_the_quantised_product(backend, problem):
    """Byte for byte what the quantiser makes of the backend's own float32 product."""
    (a, b, scale, bias, activation), options = made(problem)
    with n3kernels.batch_invariant():
        t = gemm_quantize(a, b, scale, bias, activation, **options)
        y = activated(gemm(a, b, torch.float32, bias), activation)
    assert t.global_scale is scale
    assert_same(t, quantize(y, scale, **options))


@given(problems)
def test_values_are_near_the_truth(backend, problem):
    """No operator of n3 has a say: every value within half a step of e2m1 of a float64 product, saturation apart."""
    (a, b, scale, bias, activation), _ = made(problem)
    t = gemm_quantize(a, b, scale, bias, activation)
    y, size = truth(a, b, bias)
    y = activated(y, activation)
    room = (2 * y.sqrt() * size if activation else size) * 2e-6 + size**2 * 1e-12
    of_block = t.block_scale.view(torch.uint8).cpu().numpy()
    step = torch.tensor(oracle.E4M3[of_block], device=DEVICE).repeat_interleave(16, 1) * scale.double()
    values = oracle.decode(t.q, t.block_scale) * scale.double()
    codes = (values / step.clamp(min=1e-300)).abs()
    half = torch.where(codes >= 4, 1.0, torch.where(codes >= 2, 0.5, 0.25)) * step
    wrong = (values - y).abs() > half + room
    saturated = (step / scale.double() == 448) & (codes == 6) & (y.abs() > values.abs())
    saturated |= (codes == 6) & (y.abs() <= 6.4 * step)  # a scale that was rounded down
    underflowed = (step == 0) & (y.abs() <= 6 * 2**-10 * scale.double() + room)
    assert not (wrong & ~saturated & ~underflowed).any()


@pytest.mark.parametrize("m, n, k", [(3, 464, 1856), (2, 1856, 2688), (9, 32, 12544)])
@pytest.mark.parametrize("activation", [None, "relu2"])
def test_published_shapes(backend, m, n, k, activation):
    """Shards of 464 rows, K = 1856, 2688 and 12544 of Nemotron 3."""
    if backend == "triton" and INTERPRETED:
        n = min(n, 96)
    a, b, *_ = inputs(m, n, k // 16)
    scale = scale_of(a, b, None, activation)
    t = gemm_quantize(a, b, scale, activation=activation, scale_layout="128x4")
    y = activated(gemm(a, b, torch.float32), activation)
    assert_same(t, quantize(y, scale, scale_layout="128x4"))


def test_two_products_of_an_mlp(backend):
    """up -> relu2 -> down with nothing but NVFP4 between them."""
    a, up, *_ = inputs(5, 96, 6)
    down, *_ = inputs(40, 0, 6)
    scale = scale_of(a, up, None, "relu2") / 0.8
    h = gemm_quantize(a, up, scale, activation="relu2", scale_layout="128x4")
    y = gemm(h, down, torch.float32).double()
    want = truth(a, up)[0].relu().square() @ exact(down).t()
    assert (y - want).norm() < 0.13 * want.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_bias_of_16_bits_is_the_same_in_float32(backend, dtype):
    a, b, _, bias = inputs(4, 48, 3, dtype, True)
    scale = scale_of(a, b, bias)
    assert_same(gemm_quantize(a, b, scale, bias), gemm_quantize(a, b, scale, bias.float()))


# ---- range


@pytest.mark.parametrize("given", [0.0, 1e-42, 1e-30, 1e30, float("inf"), float("nan"), -0.01])
def test_extreme_global_scales(backend, given):
    """The rules of the quantiser."""
    a, b, *_ = inputs(3, 32, 2)
    scale = torch.tensor(given, device=DEVICE)
    assert_same(gemm_quantize(a, b, scale), quantize(gemm(a, b, torch.float32), scale))


def test_zeros_have_scales_of_zero(backend):
    a, b, *_ = inputs(3, 32, 2)
    t = gemm_quantize(a._replace(q=torch.zeros_like(a.q)), b, torch.tensor(0.01, device=DEVICE), activation="relu2")
    assert not t.q.any() and not t.block_scale.view(torch.uint8).any()


@pytest.mark.parametrize("activation", [None, "relu2"])
@pytest.mark.parametrize("layout", ["linear", "128x4"])
def test_nan_and_infinity_spoil_their_blocks(backend, activation, layout):
    """A NaN scale of a spoils the row, one of b the block of its column, and so does an infinite bias: codes 0."""
    a, b, _, bias = inputs(5, 64, 3, torch.float32, True)
    scale = scale_of(a, b, bias, activation)
    clean = gemm_quantize(a, b, scale, bias, activation)
    a.block_scale.view(torch.uint8)[1, 2] = NAN
    b.block_scale.view(torch.uint8)[20, 0] = NAN
    bias[50] = float("inf")
    t = gemm_quantize(a, b, scale, bias, activation, scale_layout=layout).to_layout("linear")
    spoilt = torch.zeros(5, 4, dtype=torch.bool, device=DEVICE)
    spoilt[1], spoilt[:, 1], spoilt[:, 3] = True, True, True
    scales, codes = t.block_scale.view(torch.uint8), t.q.view(5, 4, 8)
    assert (scales[spoilt] == NAN).all() and not codes[spoilt].any()
    assert_same_bits(scales[~spoilt], clean.block_scale.view(torch.uint8)[~spoilt])
    assert_same_bits(codes[~spoilt], clean.q.view(5, 4, 8)[~spoilt])


# ---- invariants


@given(problems, st.integers(-30, 30))
def test_a_power_of_two_of_the_scales_does_not_show(backend, problem, exponent):
    """Of b and of the result: codes and block scales stay as they are."""
    (a, b, scale, *_), options = made(problem)
    factor = 2.0**exponent
    t = gemm_quantize(a, b, scale, **options)
    scaled = gemm_quantize(a, b._replace(global_scale=b.global_scale * factor), scale * factor, **options)
    assert_same(scaled._replace(global_scale=scale), t)


@given(problems)
def test_the_layout_of_the_operands_does_not_show(backend, problem):
    m, n, blocks, bias, a_rows, b_rows, _, _, activation, layout = problem
    (a, b, *rest), options = made((m, n, blocks, bias, a_rows, b_rows, False, False, activation, layout))
    t = gemm_quantize(a, b, *rest, **options)
    for tiled in ((swizzled(a), b), (a, swizzled(b)), (swizzled(a), swizzled(b))):
        assert_same(gemm_quantize(*tiled, *rest, **options), t)


@given(problems)
def test_the_layout_of_the_result(backend, problem):
    """The same codes; scales in tiles, zero where they pad."""
    args, _ = made(problem)
    t, tiled = gemm_quantize(*args), gemm_quantize(*args, scale_layout="128x4")
    assert_same_bits(tiled.q, t.q)
    if t.q.numel():
        assert_same_bits(tiled.block_scale, reference.nvfp4_swizzle_scale(t.block_scale))


def test_more_rows_than_a_tile_of_scales(backend):
    a, b, *_ = inputs(150, 96, 2)
    scale = scale_of(a, b)
    with n3kernels.batch_invariant():
        t = gemm_quantize(a, b, scale, scale_layout="128x4")
        assert_same(t, quantize(gemm(a, b, torch.float32), scale, scale_layout="128x4"))


@given(st.sampled_from([1, 2, 7, 8, 31, 100, 300]), problems)
def test_a_row_does_not_see_the_batch(backend, m, problem):
    m = min(m, 12) if backend == "triton" and INTERPRETED else m
    (a, b, scale, *rest), _ = made((m + 1, *problem[1:6], False, False, *problem[8:]))
    a.block_scale.view(torch.uint8)[-1] = NAN
    with n3kernels.batch_invariant():
        whole = gemm_quantize(a, b, scale, *rest)
        for rows in (slice(0, 1), slice(m // 2, m // 2 + 1), slice(m - 1, m), slice(0, m // 2 + 1)):
            part = gemm_quantize(rows_of(a, rows), b, scale, *rest)
            assert_invariant(backend, part.q, whole.q[rows])
            assert_invariant(backend, part.block_scale.view(torch.uint8), whole.block_scale.view(torch.uint8)[rows])


@pytest.mark.parametrize("m", [1, 5, 70])
def test_threads_do_not_show(backend, m):
    few = backend == "triton" and INTERPRETED
    a, b, _, bias = inputs(min(m, 12) if few else m, 32 if few else 608, 21, torch.float32, True)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(gemm_quantize(a, b, scale_of(a, b, bias), bias, "relu2", scale_layout="128x4"))
    finally:
        torch.set_num_threads(threads)
    assert_same(results[1], results[0])
    assert_same(results[2], results[0])


@pytest.mark.parametrize("m, n", [(0, 32), (3, 0), (0, 0)])
@pytest.mark.parametrize("layout", ["linear", "128x4"])
def test_no_rows(backend, m, n, layout):
    a, b, *_ = inputs(m, n, 3)
    scale = torch.tensor(0.01, device=DEVICE)
    want = quantize(torch.zeros(m, n, device=DEVICE), scale, scale_layout=layout)
    assert_same(gemm_quantize(a, b, scale, scale_layout=layout), want)


def test_strided_operands(backend):
    a, b, _, bias = inputs(8, 64, 8, torch.float32, True, a_rows=True)
    half_a = NVFP4Tensor.from_parts(a.q[::2, 32:], a.block_scale[::2, 4:], a.global_scale[::2])
    half_b = NVFP4Tensor.from_parts(b.q[::2, 32:], b.block_scale[::2, 4:], b.global_scale.view(1))
    dense = [t._replace(q=t.q.contiguous(), block_scale=t.block_scale.contiguous()) for t in (half_a, half_b)]
    dense[0] = dense[0]._replace(global_scale=dense[0].global_scale.contiguous())
    scale = scale_of(*dense).view(1)
    t = gemm_quantize(half_a, half_b, scale, bias[::2])
    assert_same(t, gemm_quantize(*dense, scale, bias[::2].contiguous()))


# ---- framework


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("m, layout", [(0, "128x4"), (3, "linear"), (3, "128x4")])
def test_opcheck(m, bias, layout):
    a, b, _, bias = inputs(m, 32, 3, torch.float32, bias, a_rows=True)
    args = (a.q, a.block_scale, a.global_scale, b.q, b.block_scale, b.global_scale, torch.tensor(0.01).to(DEVICE), bias)
    oracle.opcheck(torch.ops.n3.nvfp4_gemm.quantized, args, {"scale_layout": layout})


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_break(dynamic):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    scale = torch.tensor(0.01, device=DEVICE)
    fn = torch.compile(lambda a, b: gemm_quantize(a, b, scale), fullgraph=True, dynamic=dynamic, backend=counter)
    for m in (7, 11, 13):
        a, b, *_ = inputs(m, 32, 3)
        got, want = fn(a, b), gemm_quantize(a, b, scale)
        assert_same_bits(got.q, want.q)
        assert_same_bits(got.block_scale, want.block_scale)
    assert not dynamic or counter.frame_count == 1


def zeros(*shape, dtype=torch.uint8):
    return torch.zeros(shape).to(dtype)


def scale(*shape):
    return zeros(*shape, dtype=torch.float8_e4m3fn)


BAD = [
    ({"a": zeros(2)}, "a must have 2 dimensions, got 1"),
    ({"a": zeros(2, 12)}, "a must have a last dimension that is a positive multiple of 8, got 12"),
    ({"a_scale": scale(2, 3)}, "a_scale must have shape [2, 2], got [2, 3]"),
    ({"b_layout": "x"}, "b_layout must be one of linear, 128x4, got x"),
    ({"b": zeros(40, 16), "b_scale": scale(40, 2)}, "b must have rows in multiples of 16, got 40"),
    ({"b_global": torch.ones(2)}, "b_global must have 1 element or one per row of b (32), got 2"),
    ({"bias": zeros(32, dtype=torch.bfloat16)}, "bias must be float32, got bfloat16"),
    ({"bias": torch.zeros(31)}, "bias must have shape [32], got [31]"),
    ({"global_scale": torch.ones((), dtype=torch.double)}, "global_scale must be float32, got float64"),
    ({"global_scale": torch.ones(2)}, "global_scale must have 1 element, got 2"),
    ({"activation": "silu"}, "activation must be one of None, relu2, got silu"),
    ({"scale_layout": "8x4"}, "scale_layout must be one of linear, 128x4, got 8x4"),
]


@pytest.mark.parametrize("change, message", BAD)
def test_bad_calls(backend, change, message):
    call = {"a": zeros(2, 16), "a_scale": scale(2, 2), "a_global": torch.ones(()), "b": zeros(32, 16),
            "b_scale": scale(32, 2), "b_global": torch.ones(()), "global_scale": torch.ones(()), "bias": None,
            "activation": None, "a_layout": "linear", "b_layout": "linear", "scale_layout": "linear",
            **change}  # fmt: skip
    call = {k: fenced(v).to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in call.items()}
    with pytest.raises(RuntimeError) as error:
        torch.ops.n3.nvfp4_gemm.quantized(**call)
    assert str(error.value) == f"n3::nvfp4_gemm.quantized: {message}"
