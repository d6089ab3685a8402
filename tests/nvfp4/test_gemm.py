from __future__ import annotations

import nvfp4_oracle as oracle
import pytest
import torch
import torch._dynamo.testing
from conftest import DEVICE, assert_close_to, assert_invariant, assert_same_bits, fenced
from gemm_problems import inputs, operand, rows_of, seed, swizzled, truth
from hypothesis import given
from hypothesis import strategies as st
from nvfp4_oracle import e4m3

import n3kernels
from n3kernels.nvfp4 import NVFP4Tensor, gemm, grouped_gemm, linear, reference

OPS = ("nvfp4_gemm", "nvfp4_grouped_gemm")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Block-scaled tensor cores take scales without a sign. No quantiser makes a negative one.
SIGNED = DEVICE == "cpu" or torch.cuda.get_device_capability() < (10, 0)
ONE = 0x38  # the scale 1.0

# rows of a, 0 included; rows of b, both sides of a strip; blocks along K, both sides of what is transposed at a time;
# out_dtype; bias; one global scale per row of a, of b; 128x4 scales of a, of b
problems = st.tuples(
    st.integers(0, 7), st.integers(0, 40), st.integers(1, 11), st.sampled_from(DTYPES), st.booleans(), st.booleans(),
    st.booleans(), st.booleans(), st.booleans(),
)  # fmt: skip
# rows of every expert, rows of none in front and behind, rows of b, blocks, out_dtype, per row, 128x4
groups = st.tuples(
    st.lists(st.integers(0, 6), min_size=1, max_size=4), st.integers(0, 2), st.integers(0, 2), st.integers(1, 33),
    st.integers(1, 4), st.sampled_from(DTYPES), st.booleans(), st.booleans(),
)  # fmt: skip


def assert_right(out, a, b, dtype, bias=None):
    y, size = truth(a, b, bias)
    assert out.dtype == dtype
    assert_close_to(out, y, 1e-6, size)


# ---- agreement with the definition


@pytest.mark.op("nvfp4_gemm")
@given(problems)
def test_agrees_with_the_definition(backend, problem):
    args = inputs(*problem)
    assert_right(gemm(*args), *args)


@pytest.mark.op("nvfp4_gemm")
@pytest.mark.parametrize("side", ["a", "b"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_code_with_every_scale_is_exact(backend, side, dtype):
    """One-hot rows read the other side out: all pairs, scales that are 0, subnormal or negative; NaN spoils its row."""
    scales = 256 if SIGNED or backend == "reference" else 128
    q = torch.arange(8, device=DEVICE).mul(0x22).add(0x10).to(torch.uint8).repeat(scales, 1)  # codes 0..15 in order
    s = e4m3(torch.arange(scales)).view(scales, 1)
    every = NVFP4Tensor.from_parts(q, s, torch.ones((), device=DEVICE))
    i = torch.arange(16)
    codes = torch.zeros(16, 8, dtype=torch.uint8)
    codes[i, i // 2] = torch.where(i % 2 == 0, 2, 0x20).to(torch.uint8)  # 1.0
    one_hot = NVFP4Tensor.from_parts(codes.to(DEVICE), e4m3(torch.full((16, 1), ONE)), torch.ones((), device=DEVICE))
    y = gemm(one_hot, every, dtype).t() if side == "b" else gemm(every, one_hot, dtype)
    want = oracle.decode(q, s)
    assert torch.equal(y.isnan(), want.isnan()) and want.isnan().sum() == 16 * (scales // 128)
    assert torch.equal(y.double().nan_to_num(7.0), want.nan_to_num(7.0))


@pytest.mark.op("nvfp4_gemm")
@pytest.mark.parametrize(
    "m, n, k", [(3, n, k) for n in (1, 16, 464) for k in (16, 48, 1856)] + [(2, 1856, 2688), (9, 20, 12544)]
)
def test_published_shapes(backend, m, n, k):
    """Shards of 464 rows, K = 1856, 2688 and 12544 of Nemotron 3; one row, one block, an odd number of blocks."""
    if backend == "triton" and DEVICE == "cpu":
        n = min(n, 80)  # interpreted
    args = inputs(m, n, k // 16, torch.bfloat16, True)
    assert_right(gemm(*args), *args)


@pytest.mark.op("nvfp4_gemm")
@pytest.mark.parametrize("m", [1, 9, 33])
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-6), (torch.bfloat16, 2.5e-3), (torch.float16, 5e-4)])
def test_relative_error_at_2688(backend, m, dtype, bound):
    a, b, *_ = inputs(m, 64, 168)
    y, _ = truth(a, b)
    assert (gemm(a, b, dtype).double() - y).norm() / y.norm() < bound


@pytest.mark.op("nvfp4_gemm")
@pytest.mark.parametrize("four_over_six", [False, True])
def test_quantised_operands(backend, four_over_six):
    """What the quantisers make, per row of the activations, against the product of the dequantised matrices."""
    with n3kernels.use_backend("reference"):
        a = n3kernels.nvfp4.quantize(torch.randn(9, 96, device=DEVICE), per_row=True, four_over_six=four_over_six)
        b = n3kernels.nvfp4.quantize(torch.randn(21, 96, device=DEVICE), four_over_six=four_over_six)
    assert_right(gemm(a, b, torch.float32), a, b, torch.float32)


@pytest.mark.op("nvfp4_gemm")
def test_is_the_linear_on_dequantised_activations(backend):
    """To rounding: a block's products are added exactly here, and one after the other there."""
    a, b, *_ = inputs(7, 40, 9)
    x = oracle.decode(a.q, a.block_scale, a.global_scale).float()
    _, size = truth(a, b)
    assert_close_to(gemm(a, b, torch.float32), linear(x, b).double(), 1e-6, size)


# ---- range: relative bounds


@pytest.mark.op("nvfp4_gemm")
@pytest.mark.parametrize("scales", [(0.0, 1.0), (1e-20, 1e-15), (1e20, 1e12), (1e-30, 1e30), (-0.5, 1e-3)])
def test_extreme_global_scales(backend, scales):
    a, b, *_ = inputs(3, 17, 5)
    a, b = (t._replace(global_scale=torch.full_like(t.global_scale, s)) for t, s in zip((a, b), scales, strict=True))
    y, size = truth(a, b)
    assert ((gemm(a, b, torch.float32).double() - y).abs() <= 1e-6 * size).all()


# ---- invariants


@pytest.mark.op("nvfp4_gemm")
@given(problems, st.integers(-30, 30))
def test_linear_in_a_power_of_two(backend, problem, exponent):
    a, b, *_ = inputs(*problem)
    for scaled in ((a._replace(global_scale=a.global_scale * 2.0**exponent), b),
                   (a, b._replace(global_scale=b.global_scale * 2.0**exponent))):  # fmt: skip
        assert_same_bits(gemm(*scaled, torch.float32), gemm(a, b, torch.float32) * 2.0**exponent)


@pytest.mark.op("nvfp4_gemm")
def test_global_scales_of_rows(backend):
    """One per row is the same as one for all, row by row and column by column."""
    a, b, *_ = inputs(5, 21, 6, a_rows=True, b_rows=True)
    one = torch.ones((), device=DEVICE)
    plain = gemm(a._replace(global_scale=one), b._replace(global_scale=one), torch.float32)
    y = gemm(a, b, torch.float32)
    assert_invariant(backend, y, plain * a.global_scale[:, None] * b.global_scale[None, :])


@pytest.mark.op("nvfp4_gemm")
@given(problems)
def test_the_layout_of_scales_does_not_show(backend, problem):
    m, n, blocks, dtype, bias, *_ = problem
    a, b, *rest = inputs(m, n, blocks, dtype, bias)
    y = gemm(a, b, *rest)
    for tiled in ((swizzled(a), b), (a, swizzled(b)), (swizzled(a), swizzled(b))):
        assert_same_bits(gemm(*tiled, *rest), y)


def tokens(backend, many):
    return 12 if backend == "triton" and DEVICE == "cpu" else many


@pytest.mark.op("nvfp4_gemm")
@given(st.sampled_from([1, 2, 7, 8, 31, 100, 300]), problems)
def test_a_row_does_not_see_the_batch(backend, m, problem):
    """Alone or in any company, beside a row of NaN or not: the same bits."""
    _, n, blocks, dtype, bias, per_row, *_ = problem
    m = min(m, tokens(backend, 300))
    a, b, *rest = inputs(m + 1, n, blocks, dtype, bias, per_row)
    a.block_scale.view(torch.uint8)[-1] = 0x7F
    with n3kernels.batch_invariant():
        whole = gemm(a, b, *rest)
        assert not whole[:-1].isnan().any() and whole[-1].isnan().all()
        for rows in (slice(0, 1), slice(m // 2, m // 2 + 1), slice(m - 1, m), slice(0, m // 2 + 1)):
            assert_invariant(backend, gemm(rows_of(a, rows), b, *rest), whole[rows])


@pytest.mark.op("nvfp4_gemm")
@given(problems)
def test_a_column_does_not_see_the_others(backend, problem):
    """A part of b gives its part of y, and a NaN in one row of b its column of NaN."""
    m, n, blocks, dtype, bias, *_ = problem
    a, b, dtype, bias = inputs(m, n + 1, blocks, dtype, bias)
    whole = gemm(a, b, dtype, bias)
    i = n // 2
    part = gemm(a, rows_of(b, slice(i, None)), dtype, None if bias is None else bias[i:])
    assert_invariant(backend, part, whole[:, i:].contiguous())
    b.block_scale.view(torch.uint8)[i, blocks // 2] = 0x7F
    spoilt = gemm(a, b, dtype, bias)
    assert spoilt[:, i].isnan().all()
    rest = [j for j in range(n + 1) if j != i]
    assert_invariant(backend, spoilt[:, rest], whole[:, rest])


@pytest.mark.op("nvfp4_gemm")
@pytest.mark.parametrize("m", [1, 5, 70])
def test_threads_do_not_show(backend, m):
    args = inputs(min(m, tokens(backend, m)), 24 if backend == "triton" else 600, 21, torch.bfloat16, True)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(gemm(*args))
    finally:
        torch.set_num_threads(threads)
    assert_invariant(backend, results[0], results[1])
    assert_invariant(backend, results[0], results[2])


@pytest.mark.op("nvfp4_gemm")
@pytest.mark.parametrize("m, n", [(0, 7), (3, 0), (0, 0)])
def test_no_rows(backend, m, n):
    args = inputs(m, n, 3, torch.bfloat16, True)
    assert gemm(*args).shape == (m, n)


@pytest.mark.op("nvfp4_gemm")
def test_strided_operands(backend):
    a, b, dtype, bias = inputs(8, 42, 8, torch.bfloat16, True, a_rows=True)
    for rows in (slice(None, None, 2), slice(1, 6)):
        half_a = NVFP4Tensor.from_parts(a.q[rows, 32:], a.block_scale[rows, 4:], a.global_scale[rows])
        half_b = NVFP4Tensor.from_parts(b.q[::2, 32:], b.block_scale[::2, 4:], b.global_scale.view(1))
        args = half_a, half_b, dtype, bias[::2]
        assert_right(gemm(*args), *args)


# ---- groups


def grouped_inputs(sizes, before, after, n, blocks, dtype=torch.float32, per_row=False, tiled=False):
    seed(sizes, before, n, blocks)
    m, experts = before + sum(sizes) + after, len(sizes)
    a = operand(m, blocks, per_row)
    stack = [operand(n, blocks) for _ in sizes]
    scales = [(swizzled(t) if tiled else t).block_scale.view(torch.uint8) for t in stack]
    b = NVFP4Tensor.from_parts(
        fenced(torch.stack([t.q for t in stack])), fenced(torch.stack(scales).view(torch.float8_e4m3fn)),
        (torch.rand(experts) + 0.5).to(DEVICE) * 0.1, scale_layout="128x4" if tiled else "linear",
    )  # fmt: skip
    offsets = torch.tensor([0, *sizes]).cumsum(0) + before
    return a, b, offsets.int().to(DEVICE), dtype


def expert(b, e):
    scale = b.block_scale[e]
    if b.scale_layout == "128x4":
        scale = reference.nvfp4_unswizzle_scale(scale, b.q.shape[1], b.q.shape[2] // 8)
    return NVFP4Tensor.from_parts(b.q[e], scale, b.global_scale[e])


def assert_groups(y, a, b, offsets, dtype, compare):
    """Rows of no expert are 0; ``compare`` sees those of every expert that has some."""
    edges = offsets.tolist()
    assert y.dtype == dtype and not y.isnan().any()
    assert not y[: edges[0]].any() and not y[edges[-1] :].any()
    for e, (first, end) in enumerate(zip(edges, edges[1:], strict=False)):
        if first < end:
            compare(y[first:end], rows_of(a, slice(first, end)), expert(b, e))


@pytest.mark.op("nvfp4_grouped_gemm")
@given(groups)
def test_groups_agree_with_the_definition(backend, problem):
    a, b, offsets, dtype = grouped_inputs(*problem)
    y = grouped_gemm(a, b, offsets, dtype)
    assert_groups(y, a, b, offsets, dtype, lambda part, rows, w: assert_right(part, rows, w, dtype))


@pytest.mark.op("nvfp4_grouped_gemm")
@given(groups)
def test_a_group_has_the_bits_of_its_product(backend, problem):
    a, b, offsets, dtype = grouped_inputs(*problem)
    with n3kernels.batch_invariant():
        y = grouped_gemm(a, b, offsets, dtype)
        same = lambda part, rows, w: assert_invariant(backend, part, gemm(rows, w, dtype))  # noqa: E731
        assert_groups(y, a, b, offsets, dtype, same)


@pytest.mark.op("nvfp4_grouped_gemm")
def test_many_groups_of_many_rows(backend):
    """More rows than are packed at a time, a group cut by the end of a batch, groups of one row."""
    sizes = [3, 5, 0, 2] if backend == "triton" and DEVICE == "cpu" else [200, 0, 1, 130, 1, 1, 300]
    a, b, offsets, dtype = grouped_inputs(sizes, 1, 2, 37, 3)
    y = grouped_gemm(a, b, offsets, dtype)
    assert_groups(y, a, b, offsets, dtype, lambda part, rows, w: assert_right(part, rows, w, dtype))


@pytest.mark.op("nvfp4_grouped_gemm")
@pytest.mark.parametrize("sizes, before, n", [([0, 0], 0, 5), ([0, 0], 3, 5), ([2, 1], 0, 0)])
def test_no_rows_in_groups(backend, sizes, before, n):
    a, b, offsets, dtype = grouped_inputs(sizes, before, 0, n, 2)
    y = grouped_gemm(a, b, offsets, dtype)
    assert y.shape == (before + sum(sizes), n) and not y.any()


@pytest.mark.op("nvfp4_grouped_gemm")
def test_a_row_of_nan_in_a_group(backend):
    a, b, offsets, dtype = grouped_inputs([2, 3], 0, 0, 9, 3)
    whole = grouped_gemm(a, b, offsets, dtype)
    a.block_scale.view(torch.uint8)[3] = 0x7F
    y = grouped_gemm(a, b, offsets, dtype)
    rest = [0, 1, 2, 4]
    assert y[3].isnan().all()
    assert_invariant(backend, y[rest], whole[rest])


@pytest.mark.op("nvfp4_grouped_gemm")
def test_rows_of_no_expert_meet_no_weights(backend):
    """They are 0 even where the first expert is full of NaN."""
    a, b, offsets, dtype = grouped_inputs([2, 3], 2, 1, 9, 3)
    b.block_scale.view(torch.uint8)[0] = 0x7F
    y = grouped_gemm(a, b, offsets, dtype)
    assert not y[:2].any() and not y[-1:].any()
    assert y[2:4].isnan().all() and not y[4:].isnan().any()


def test_grouped_a_in_tiles():
    """The wrapper unswizzles the rows, whose groups begin anywhere."""
    a, b, offsets, dtype = grouped_inputs([4, 3], 0, 0, 9, 3)
    assert_same_bits(grouped_gemm(swizzled(a), b, offsets, dtype), grouped_gemm(a, b, offsets, dtype))


# ---- framework


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("m", [0, 3])
def test_opcheck(m, bias):
    a, b, dtype, bias = inputs(m, 5, 3, torch.bfloat16, bias, a_rows=True)
    args = (a.q, a.block_scale, a.global_scale, b.q, b.block_scale, b.global_scale, bias)
    oracle.opcheck(torch.ops.n3.nvfp4_gemm.default, args, {"out_dtype": dtype})


@pytest.mark.parametrize("tiled", [False, True])
def test_opcheck_groups(tiled):
    a, b, offsets, dtype = grouped_inputs([2, 0, 3], 1, 0, 5, 3, tiled=tiled)
    args = (a.q, a.block_scale, a.global_scale, b.q, b.block_scale, b.global_scale, offsets)
    oracle.opcheck(torch.ops.n3.nvfp4_grouped_gemm.default, args, {"out_dtype": dtype, "b_layout": b.scale_layout})


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_break(dynamic):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    fn = torch.compile(lambda a, b: gemm(a, b, torch.float32) * 2, fullgraph=True, dynamic=dynamic, backend=counter)
    for m in (7, 11, 13):  # no other size of the call, or the two would be taken for one
        a, b, *_ = inputs(m, 5, 3)
        torch.testing.assert_close(fn(a, b), gemm(a, b, torch.float32) * 2)
    assert not dynamic or counter.frame_count == 1


def zeros(*shape, dtype=torch.uint8):
    return torch.zeros(shape).to(dtype)


def scale(*shape):
    return zeros(*shape, dtype=torch.float8_e4m3fn)


BAD = [
    ({"a": zeros(3, 2, 16)}, "a must have 2 dimensions, got 3"),
    ({"a": zeros(2, 12)}, "a must have a last dimension that is a positive multiple of 8, got 12"),
    ({"a": zeros(2, 0)}, "a must have a last dimension that is a positive multiple of 8, got 0"),
    ({"b": zeros(16)}, "b must have 2 dimensions, got 1"),
    ({"a": zeros(2, 16, dtype=torch.int8)}, "a must be uint8, got int8"),
    ({"a_scale": zeros(2, 2)}, "a_scale must be float8_e4m3fn, got uint8"),
    ({"a_layout": "8x4"}, "a_layout must be one of linear, 128x4, got 8x4"),
    ({"a_scale": scale(2, 3)}, "a_scale must have shape [2, 2], got [2, 3]"),
    ({"a_layout": "128x4"}, "a_scale must have shape [128, 4], got [2, 2]"),
    ({"b": zeros(5, 16, dtype=torch.int32)}, "b must be uint8, got int32"),
    ({"b": zeros(5, 24)}, "b must have shape [5, 16], got [5, 24]"),
    ({"b_layout": ""}, "b_layout must be one of linear, 128x4, got "),
    ({"b_scale": scale(4, 2)}, "b_scale must have shape [5, 2], got [4, 2]"),
    ({"a_global": torch.ones((), dtype=torch.float16)}, "a_global must be float32, got float16"),
    ({"a_global": torch.ones(3)}, "a_global must have 1 element or one per row of a (2), got 3"),
    ({"b_global": torch.ones(2)}, "b_global must have 1 element or one per row of b (5), got 2"),
    ({"b_global": torch.ones(5, 1)}, "b_global must have 1 element or one per row of b (5), got 5"),
    ({"out_dtype": torch.float64}, "out_dtype must be float32, float16 or bfloat16, got float64"),
    ({"bias": torch.zeros(5)}, "bias must be bfloat16, got float32"),
    ({"bias": zeros(4, dtype=torch.bfloat16)}, "bias must have shape [5], got [4]"),
]
BAD_GROUPS = [
    ({"a": zeros(2)}, "a must have 2 dimensions, got 1"),
    ({"b": zeros(5, 16)}, "b must have 3 dimensions, got 2"),
    ({"a_scale": scale(2, 3)}, "a_scale must have shape [2, 2], got [2, 3]"),
    ({"b": zeros(3, 5, 8)}, "b must have shape [3, 5, 16], got [3, 5, 8]"),
    ({"b_scale": scale(3, 5, 3)}, "b_scale must have shape [3, 5, 2], got [3, 5, 3]"),
    ({"b_layout": "128x4"}, "b_scale must have shape [3, 128, 4], got [3, 5, 2]"),
    ({"b_layout": "x"}, "b_layout must be one of linear, 128x4, got x"),
    ({"a_global": torch.ones(4)}, "a_global must have 1 element or one per row of a (2), got 4"),
    ({"b_global": torch.ones(1)}, "b_global must have shape [3], got [1]"),
    ({"b_global": torch.ones(3, dtype=torch.double)}, "b_global must be float32, got float64"),
    ({"offsets": torch.zeros(4)}, "offsets must be int32, got float32"),
    ({"offsets": zeros(3, dtype=torch.int32)}, "offsets must have shape [4], got [3]"),
    ({"out_dtype": torch.int32}, "out_dtype must be float32, float16 or bfloat16, got int32"),
]


def assert_message(op, call, message):
    call = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in call.items()}
    with pytest.raises(RuntimeError) as error:
        getattr(torch.ops.n3, op).default(**call)
    assert str(error.value) == f"n3::{op}: {message}"


@pytest.mark.op("nvfp4_gemm")
@pytest.mark.parametrize("change, message", BAD)
def test_bad_calls(backend, change, message):
    call = {"a": zeros(2, 16), "a_scale": scale(2, 2), "a_global": torch.ones(()), "b": zeros(5, 16),
            "b_scale": scale(5, 2), "b_global": torch.ones(()), "bias": None, "out_dtype": torch.bfloat16,
            "a_layout": "linear", "b_layout": "linear", **change}  # fmt: skip
    assert_message("nvfp4_gemm", call, message)


@pytest.mark.op("nvfp4_grouped_gemm")
@pytest.mark.parametrize("change, message", BAD_GROUPS)
def test_bad_calls_of_groups(backend, change, message):
    call = {"a": zeros(2, 16), "a_scale": scale(2, 2), "a_global": torch.ones(()), "b": zeros(3, 5, 16),
            "b_scale": scale(3, 5, 2), "b_global": torch.ones(3), "offsets": zeros(4, dtype=torch.int32),
            "out_dtype": torch.float32, "b_layout": "linear", **change}  # fmt: skip
    assert_message("nvfp4_grouped_gemm", call, message)
