from __future__ import annotations

import pytest
import torch
from conftest import DEVICE, assert_invariant, assert_same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_problems import (
    ACTIVATIONS,
    DTYPES,
    assert_right,
    assert_within_the_gate,
    definition,
    fast,
    inputs,
    nvfp4,
    refusal,
    routing,
)

from n3kernels import use_backend
from n3kernels.moe import experts, reference
from n3kernels.nvfp4 import NVFP4Tensor

OPS = ("moe_experts",)

# tokens, 0 included; slots per token; experts; width and inner size, odd ones too; the first expert held here
problems = st.tuples(
    st.integers(0, 6), st.integers(1, 5), st.integers(1, 5), st.integers(1, 40), st.integers(1, 40), st.integers(0, 3),
    st.sampled_from(ACTIVATIONS), st.sampled_from(DTYPES),
)  # fmt: skip


@pytest.fixture(params=["dense", "nvfp4"])
def form(request, backend):
    """How the weights are stored, in the forms that the backend takes."""
    if reason := refusal(backend, request.param):
        pytest.skip(reason)
    return request.param


@pytest.fixture
def _dense(backend):
    if reason := refusal(backend, "dense"):
        pytest.skip(reason)


@pytest.fixture
def _nvfp4(backend):
    if reason := refusal(backend, "nvfp4"):
        pytest.skip(reason)


# What a test is about.
takes_dense, takes_nvfp4 = pytest.mark.usefixtures("_dense"), pytest.mark.usefixtures("_nvfp4")


@given(problems)
def test_agrees_with_the_definition(backend, form, problem):
    *tensors, options = inputs(*problem, form)
    y = experts(*tensors, **options)
    assert y.dtype == tensors[0].dtype and y.is_contiguous()
    assert_right(y, *definition(*tensors, **options))


@given(problems)
def test_float32_output_is_the_sum_before_rounding(backend, form, problem):
    *tensors, options = inputs(*problem, form)
    y = experts(*tensors, **options, out_dtype=torch.float32)
    assert y.dtype == torch.float32 and y.is_contiguous()
    assert_same_bits(y.to(tensors[0].dtype), experts(*tensors, **options))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_float32_output_has_more_than_16_bits(backend, form, dtype):
    *tensors, options = inputs(4, 2, 3, 32, 32, 0, "relu2", dtype, form)
    tensors[3].clamp_(0, 2)
    y = experts(*tensors, **options, out_dtype=torch.float32)
    assert (y != y.to(dtype).float()).float().mean() > 0.9


# the sizes that the kernels with tensor cores take
eights = st.integers(1, 9).map(lambda n: 8 * n)
in_eights = st.tuples(
    st.integers(0, 20), st.integers(1, 5), st.integers(1, 5), eights, eights, st.integers(0, 3), st.just("relu2"),
    st.just(torch.bfloat16),
)  # fmt: skip


@settings(max_examples=6)
@given(in_eights)
def test_agrees_with_the_definition_in_eights(backend, form, problem):
    *tensors, options = inputs(*problem, form)
    assert_right(experts(*tensors, **options), *definition(*tensors, **options))


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_expert_receives_everything(backend, form, dtype):
    x, w_up, w_down, ids, weights, options = inputs(300, 2, 64, 32, 48, 0, "relu2", dtype, form)
    ids[:] = 63
    y = experts(x, w_up, w_down, ids, weights, **options)
    assert_right(y[::37], *definition(x[::37], w_up, w_down, ids[::37], weights[::37]))


# tokens, k, experts, width, inner: what is published of each, at sizes that the interpreter takes as well
PUBLISHED = [
    (2, 22, 32, 32, 336), (2, 6, 8, 48, 464), (2, 6, 8, 32, 232), (1, 2, 2, 16, 1856), (3, 32, 40, 32, 16),
    (2, 18, 24, 32, 160), (2, 16, 896, 32, 16), (3, 22, 512, 16, 16), (5, 1, 1, 32, 48),
]  # fmt: skip
# at full width: Nano and its tensor-parallel shards, Super and its shard, Ultra's shard, Puzzle, Kimi K3; experts are
# few, as they cost the time and only their number times their size matters
FULL = [
    (3, 2, 3, 2688, 1856), (2, 6, 8, 2688, 464), (2, 6, 8, 2688, 232), (2, 2, 3, 1024, 2688), (5, 22, 32, 1024, 336),
    (2, 4, 8, 2048, 640), (3, 18, 24, 1024, 160), (1, 16, 20, 3584, 96), (3, 32, 40, 256, 64), (33, 1, 512, 64, 32),
]  # fmt: skip
if DEVICE == "cuda":
    FULL += [(140, 6, 16, 2688, 464)]  # so many slots that the kernel of sm_90 keeps no row for each of its ranges
FULL_NVFP4 = [
    (1, 1, 2, 2688, 1856), (2, 6, 6, 512, 464), (1, 1, 2, 1024, 2688), (3, 22, 24, 256, 336), (2, 4, 4, 1024, 640),
    (3, 32, 40, 64, 64), (33, 1, 512, 32, 32),
]  # fmt: skip


@takes_dense
@pytest.mark.parametrize("tokens, k, num_experts, width, inner", PUBLISHED)
def test_published_shapes(backend, tokens, k, num_experts, width, inner):
    x, w_up, w_down, *_ = inputs(tokens, k, num_experts, width, inner, 0, "relu2", torch.bfloat16)
    ids, weights = routing(tokens, num_experts, k, scale=5.0)
    assert_within_the_gate(experts(x, w_up, w_down, ids, weights), x, w_up, w_down, ids, weights)


@pytest.mark.parametrize("which", [b for b in fast("moe_experts") if not refusal(b, "dense")])
@pytest.mark.parametrize("tokens, k, num_experts, width, inner", FULL)
def test_full_widths(which, tokens, k, num_experts, width, inner):
    x, w_up, w_down, *_ = inputs(tokens, k, num_experts, width, inner, 0, "relu2", torch.bfloat16)
    ids, weights = routing(tokens, num_experts, k, scale=5.0)
    with use_backend(which):
        y = experts(x, w_up, w_down, ids, weights)
    assert_within_the_gate(y, x, w_up, w_down, ids, weights)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_activations(backend, form, activation, dtype):
    """Exact to the float32 sum, element by element: GELU is not its tanh approximation, and the gate comes first."""
    *tensors, options = inputs(4, 2, 3, 48, 32, 0, activation, dtype, form)
    assert_right(experts(*tensors, **options), *definition(*tensors, **options))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_many_tokens_per_expert(backend, form, activation, dtype):
    x, w_up, w_down, *_ = inputs(200, 3, 5, 80, 112, 0, activation, dtype, form)
    ids, weights = routing(200, 5, 3)
    y = experts(x, w_up, w_down, ids, weights, activation=activation)
    assert_within_the_gate(y, x, w_up, w_down, ids, weights, activation)


def test_different_sizes_in_one_process(backend, form):
    """Puzzle's layers differ in inner size and k: nothing is remembered from one call to the next."""
    for inner, k in ((128, 4), (256, 18), (160, 10), (128, 4)):
        x, w_up, w_down, *_ = inputs(3, k, 24, 64, inner, 0, "relu2", torch.bfloat16, form)
        ids, weights = routing(3, 24, k)
        assert_within_the_gate(experts(x, w_up, w_down, ids, weights), x, w_up, w_down, ids, weights)


# ---- NVFP4


@pytest.mark.parametrize("which", [b for b in fast("moe_experts") if not refusal(b, "nvfp4")])
@pytest.mark.parametrize("tokens, k, num_experts, width, inner", FULL_NVFP4)
def test_nvfp4_full_widths(which, tokens, k, num_experts, width, inner):
    x, *_ = inputs(tokens, k, num_experts, width, 1, 0, "relu2", torch.bfloat16)
    w_up, w_down = nvfp4(num_experts, inner, width), nvfp4(num_experts, width, inner)
    ids, weights = routing(tokens, num_experts, k)
    with use_backend(which):
        y = experts(x, w_up, w_down, ids, weights)
    assert_within_the_gate(y, x, w_up, w_down, ids, weights)


@takes_nvfp4
def test_nvfp4_decodes_like_dequantize(backend):
    x, w_up, w_down, ids, weights, options = inputs(9, 3, 4, 64, 48, 0, "relu2", torch.float32, "nvfp4")
    y = experts(x, w_up, w_down, ids, weights, **options)
    up, down = w_up.dequantize(torch.float32), w_down.dequantize(torch.float32)
    torch.testing.assert_close(y, reference.moe_experts(x, up, down, ids, weights, **options), rtol=1e-5, atol=1e-5)
    tiled = experts(x, w_up.to_layout("128x4"), w_down, ids, weights, **options)
    assert_same_bits(y, tiled)


@takes_nvfp4
def test_nvfp4_full_batches(backend):
    """Hundreds of tokens for some experts and a few for the others give the bits that a few tokens have."""
    x, w_up, w_down, ids, weights, options = inputs(700, 3, 5, 48, 80, 0, "relu2", torch.bfloat16, "nvfp4")
    ids[:, 0], ids[::2, 1] = 1, 2
    whole = experts(x, w_up, w_down, ids, weights, **options)
    parts = zip(x.split(50), ids.split(50), weights.split(50), strict=True)
    alone = [experts(xs, w_up, w_down, some, gains, **options) for xs, some, gains in parts]
    assert_invariant(backend, torch.cat(alone), whole)


@takes_nvfp4
@pytest.mark.parametrize("exponent", [-130, -60, 0, 100])
def test_nvfp4_global_scales_of_any_size(backend, exponent):
    """Each expert has its own, a power of two apart from the others', and a zero stays a zero."""
    x, w_up, w_down, ids, weights, options = inputs(9, 3, 4, 64, 48, 0, "relu2", torch.float32, "nvfp4")
    y = experts(x, w_up, w_down, ids, weights, **options)
    scale = w_down.global_scale * torch.tensor([2.0**exponent, 0.0, 1.0, -1.0], device=DEVICE)
    scaled = experts(x, w_up, NVFP4Tensor.from_parts(w_down.q, w_down.block_scale, scale), ids, weights, **options)
    only = [torch.where(ids == e, weights, 0) for e in (0, 2, 3)]
    parts = [experts(x, w_up, w_down, ids, w, **options).double() for w in only]
    truth = parts[0] * 2.0**exponent + parts[1] - parts[2]
    size = y.abs().max().item() * max(1.0, 2.0**exponent)
    torch.testing.assert_close(scaled.double(), truth, rtol=1e-5, atol=1e-5 * size)


# ---- PyTorch's machinery


@pytest.mark.parametrize("tokens", [0, 1, 5])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("activation", ["relu2", "silu"])
def test_opcheck(tokens, grad, activation):
    x, w_up, w_down, ids, weights, options = inputs(tokens, 3, 4, 8, 6, 0, activation, torch.float32)
    x, w_up, w_down, weights = (t.clone().requires_grad_(grad) for t in (x, w_up, w_down, weights))
    options["valid_tokens"] = torch.tensor([3], dtype=torch.int32, device=DEVICE)
    torch.library.opcheck(torch.ops.n3.moe_experts.default, (x, w_up, w_down, ids, weights), options)


def test_opcheck_nvfp4():
    x, *_, ids, weights, _ = inputs(3, 3, 4, 16, 32, 0, "relu2", torch.bfloat16)
    up, down = nvfp4(4, 32, 16), nvfp4(4, 16, 32)
    scales = {"up_scale": up.block_scale, "up_global": up.global_scale, "down_scale": down.block_scale,
              "down_global": down.global_scale}  # fmt: skip
    args = (x, up.q, down.q, ids, weights)
    utils = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")  # test_schema has no fp8
    torch.library.opcheck(torch.ops.n3.moe_experts.default, args, scales, test_utils=utils)


@takes_dense
def test_strided_inputs(backend):
    x, w_up, w_down, ids, weights, options = inputs(8, 4, 3, 32, 16, 0, "relu2", torch.float32)
    y = experts(x, w_up, w_down, ids, weights, **options)
    strided = experts(
        x.t().contiguous().t(), w_up.transpose(1, 2).contiguous().transpose(1, 2),
        torch.cat([w_down, w_down], 2)[:, :, :16], ids.t().contiguous().t(), weights.repeat_interleave(2, 1)[:, ::2],
        **options,
    )  # fmt: skip
    assert strided.is_contiguous()
    assert_invariant(backend, y, strided)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic):
    fn = torch.compile(experts, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for tokens in (4, 7):
        x, w_up, w_down, ids, weights, _ = inputs(tokens, 3, 4, 8, 6, 0, "relu2", torch.float32)
        results = []
        for run in (fn, experts):
            leaves = [t.clone().requires_grad_() for t in (x, w_up, w_down, weights)]
            y = run(*leaves[:3], ids, leaves[3])
            results.append((y.detach(), *torch.autograd.grad(y.square().sum(), leaves)))
        torch.testing.assert_close(*results)


# ---- bad calls

E, T, K, L, N = 4, 3, 2, 16, 32  # experts, tokens, slots, width, inner size
GOOD = {
    "x": torch.zeros(T, L), "w_up": torch.zeros(E, N, L), "w_down": torch.zeros(E, L, N),
    "ids": torch.zeros(T, K, dtype=torch.int32), "weights": torch.zeros(T, K),
}  # fmt: skip
BAD = [
    ({"x": torch.zeros(T, L, dtype=torch.int64)}, "x must be float32, float16 or bfloat16, got int64"),
    ({"x": torch.zeros(L)}, "x must have 2 dimensions, got 1"),
    ({"activation": "relu"}, "activation must be one of relu2, silu, gelu, got relu"),
    ({"w_up": torch.zeros(N, L)}, "w_up must have 3 dimensions, got 2"),
    ({"w_down": torch.zeros(L, N)}, "w_down must have 3 dimensions, got 2"),
    ({"w_up": torch.zeros(0, N, L)}, "w_up must have at least 1 expert, got 0"),
    ({"w_up": torch.zeros(E, N, L).half()}, "w_up must have the dtype of x (float32), got float16"),
    ({"w_up": torch.zeros(E, N, 15)}, "w_up must have shape [4, 32, 16], got [4, 32, 15]"),
    ({"activation": "silu"}, "w_up must have shape [4, 64, 16], got [4, 32, 16]"),
    ({"w_down": torch.zeros(E, L, N).half()}, "w_down must have the dtype of x (float32), got float16"),
    ({"w_down": torch.zeros(E, 15, N)}, "w_down must have shape [4, 16, 32], got [4, 15, 32]"),
    ({"ids": torch.zeros(T, K, dtype=torch.int64)}, "ids must be int32, got int64"),
    ({"ids": torch.zeros(T, dtype=torch.int32)}, "ids must have 2 dimensions, got 1"),
    ({"ids": torch.zeros(T, 0, dtype=torch.int32)}, "ids must have at least 1 column, got 0"),
    ({"ids": torch.zeros(5, K, dtype=torch.int32)}, "ids must have shape [3, 2], got [5, 2]"),
    ({"weights": torch.zeros(T, K).half()}, "weights must be float32, got float16"),
    ({"weights": torch.zeros(T, 3)}, "weights must have shape [3, 2], got [3, 3]"),
    ({"out_dtype": torch.float16}, "out_dtype must be float32 or the dtype of x (float32), got float16"),
    ({"first_expert": -1}, "first_expert must be at least 0, got -1"),
    ({"valid_tokens": torch.zeros(1, dtype=torch.int64)}, "valid_tokens must be int32, got int64"),
    ({"valid_tokens": torch.zeros((), dtype=torch.int32)}, "valid_tokens must have shape [1], got []"),
]
SCALE = torch.zeros(E, N, L // 16, dtype=torch.float8_e4m3fn)
GOOD_NVFP4 = {
    **GOOD,
    "w_up": torch.zeros(E, N, L // 2, dtype=torch.uint8), "up_scale": SCALE, "up_global": torch.zeros(E),
    "w_down": torch.zeros(E, L, N // 2, dtype=torch.uint8), "down_scale": SCALE.view(E, L, N // 16),
    "down_global": torch.zeros(E),
}  # fmt: skip
BAD_NVFP4 = [
    ({"down_global": None}, "up_scale, up_global, down_scale and down_global must be given together or not at all, "
     "got 3 of 4"),
    ({"x": torch.zeros(T, 8)}, "the last dimension of x must be a positive multiple of 16, got 8"),
    ({"w_down": torch.zeros(E, L, 12, dtype=torch.uint8)},
     "w_down must have a last dimension that is a positive multiple of 8, got 12"),
    ({"w_up": torch.zeros(E, N, L // 2)}, "w_up must be uint8, got float32"),
    ({"w_up": torch.zeros(E, N, L, dtype=torch.uint8)}, "w_up must have shape [4, 32, 8], got [4, 32, 16]"),
    ({"up_scale": torch.zeros(E, N, 1)}, "up_scale must be float8_e4m3fn, got float32"),
    ({"up_scale": SCALE.view(E, L, 2)}, "up_scale must have shape [4, 32, 1], got [4, 16, 2]"),
    ({"up_global": torch.zeros(E).half()}, "up_global must be float32, got float16"),
    ({"up_global": torch.zeros(1)}, "up_global must have shape [4], got [1]"),
    ({"w_down": torch.zeros(E, 8, N // 2, dtype=torch.uint8)}, "w_down must have shape [4, 16, 16], got [4, 8, 16]"),
    ({"down_scale": SCALE}, "down_scale must have shape [4, 16, 2], got [4, 32, 1]"),
    ({"down_global": torch.zeros(3)}, "down_global must have shape [4], got [3]"),
]  # fmt: skip


# What is wrong with x, the routing or an option is so whatever the form of the weights.
EITHER = [c for c in BAD if not {"w_up", "w_down"} & set(c[0]) and c[0] != {"activation": "silu"}]
CALLS = [("dense", *c) for c in BAD] + [("nvfp4", *c) for c in EITHER + BAD_NVFP4]


@pytest.mark.parametrize("stored, change, message", CALLS)
def test_bad_calls(backend, stored, change, message):
    if reason := refusal(backend, stored):
        pytest.skip(reason)
    good = GOOD if stored == "dense" else GOOD_NVFP4
    call = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in {**good, **change}.items()}
    with pytest.raises(RuntimeError) as error:
        torch.ops.n3.moe_experts(**call)
    assert str(error.value) == f"n3::moe_experts: {message}"
