from __future__ import annotations

import mmap

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE, assert_close_to, assert_invariant, assert_same_bits, fenced
from hypothesis import given
from hypothesis import strategies as st

from n3kernels import _dispatch
from n3kernels.moe import experts, reference
from n3kernels.nvfp4 import NVFP4Tensor

OPS = ("moe_experts",)
ACTIVATIONS = ("relu2", "silu", "gelu")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# tokens, 0 included; slots per token; experts; width and inner size, odd ones too; the first expert held here
problems = st.tuples(
    st.integers(0, 6), st.integers(1, 5), st.integers(1, 5), st.integers(1, 40), st.integers(1, 40), st.integers(0, 3),
    st.sampled_from(ACTIVATIONS), st.sampled_from(DTYPES),
)  # fmt: skip


def _without(backend):
    """Why the backend does not take dense weights, or None."""
    x, w = torch.zeros(1, 1), torch.zeros(1, 1, 1)
    refuses = _dispatch.OPS["moe_experts"].supports.get(backend)
    return refuses and refuses(x, w, w, torch.zeros(1, 1, dtype=torch.int32), x)


@pytest.fixture(params=["dense", "nvfp4"])
def form(request, backend):
    """How the weights are stored, in the forms that the backend takes."""
    if request.param == "dense" and (reason := _without(backend)):
        pytest.skip(reason)
    return request.param


@pytest.fixture
def _dense(backend):
    if reason := _without(backend):
        pytest.skip(reason)


takes_dense = pytest.mark.usefixtures("_dense")  # the test is about dense weights


def inputs(tokens, k, num_experts, width, inner, first, activation, dtype, form="dense"):
    """x, w_up, w_down, ids, weights, options; ids reach past the local experts on both sides."""
    if form == "nvfp4":
        width, inner = (-(-size // 16) * 16 for size in (width, inner))  # whole blocks
    rows = inner * (1 if activation == "relu2" else 2)
    x = fenced(torch.randn(tokens, width).to(DEVICE, dtype))
    if form == "nvfp4":
        w_up, w_down = nvfp4(num_experts, rows, width), nvfp4(num_experts, width, inner)
    else:
        w_up, w_down = torch.randn(num_experts, rows, width), torch.randn(num_experts, width, inner)
        w_up, w_down = (fenced(t.to(DEVICE, dtype)) for t in (w_up * width**-0.5, w_down * inner**-0.5))
    ids = torch.randint(max(first - 2, -1), first + num_experts + 2, (tokens, k), dtype=torch.int32)
    ids, weights = (fenced(t.to(DEVICE)) for t in (ids, torch.randn(tokens, k)))
    return x, w_up, w_down, ids, weights, {"activation": activation, "first_expert": first}


def nvfp4(*shape):
    """Any codes under any finite scales, one global scale per expert."""
    q = torch.randint(0, 256, (*shape[:-1], shape[-1] // 2), dtype=torch.uint8)
    block_scale = (torch.rand(*shape[:-1], shape[-1] // 16) * 2).to(torch.float8_e4m3fn)
    global_scale = torch.rand(shape[0], device=DEVICE) / 8
    return NVFP4Tensor.from_parts(fenced(q.to(DEVICE)), fenced(block_scale.to(DEVICE)), global_scale)


def dense(w):
    """The exact values in float64, those of NVFP4 by another route than the operator's reference."""
    if isinstance(w, torch.Tensor):
        return w.double()
    magnitudes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.double, device=w.q.device)
    codes = torch.stack((w.q % 16, w.q // 16), -1).flatten(-2).long()
    values = magnitudes[codes % 8] * (1 - 2 * (codes // 8))
    return values * w.block_scale.double().repeat_interleave(16, -1) * w.global_scale.double()[:, None, None]


def routing(tokens, num_experts, top_k, scale=1.0):
    """ids and weights; by the reference, as a forced backend may have no routing."""
    return reference.moe_route(torch.randn(tokens, num_experts, device=DEVICE), top_k=top_k, scale=scale)[:2]


def definition(x, w_up, w_down, ids, weights, activation="relu2", first_expert=0):
    """Slot by slot in float64, and the sum of the magnitudes of the terms that the down projection adds up."""
    w_up, w_down = dense(w_up), dense(w_down)
    y = torch.zeros(x.shape, dtype=torch.double, device=x.device)
    magnitude = torch.zeros_like(y)
    for t, row in enumerate(ids.tolist()):
        for j, e in enumerate(row):
            if not first_expert <= e < first_expert + len(w_up):
                continue
            h = w_up[e - first_expert] @ x[t].double()
            gate, up = (h, h) if activation == "relu2" else h.chunk(2)
            act = {"relu2": F.relu, "silu": F.silu, "gelu": F.gelu}[activation](gate) * up  # relu(h) * h = relu(h)^2
            down, weight = w_down[e - first_expert], weights[t, j].double()
            y[t] += weight * (down @ act)
            magnitude[t] += weight.abs() * (down.abs() @ act.abs())
    return y, magnitude


def assert_right(y, truth, magnitude):
    """The truth rounded once; a kernel may have rounded the activation to 16 bits, too: half a unit of each term."""
    narrow = torch.finfo(y.dtype).eps / 2 if y.dtype in (torch.float16, torch.bfloat16) else 0.0
    assert_close_to(y, truth, acc=1.0, scale=narrow * magnitude + 1e-5 * (magnitude + 1))


@given(problems)
def test_agrees_with_the_definition(backend, form, problem):
    *tensors, options = inputs(*problem, form)
    y = experts(*tensors, **options)
    assert y.dtype == tensors[0].dtype and y.is_contiguous()
    assert_right(y, *definition(*tensors, **options))


@given(problems, st.integers(0, 4))
def test_a_row_does_not_see_the_batch(backend, form, problem, i):
    """Alone, in front or in the middle, beside a row of NaN that shares its experts or not."""
    tokens, *rest = problem
    x, w_up, w_down, ids, weights, options = inputs(max(tokens, i) + 2, *rest, form)
    x[-1], ids[-1] = float("nan"), ids[i]
    whole = experts(x, w_up, w_down, ids, weights, **options)
    one = slice(i, i + 1)
    assert_invariant(backend, whole[one], experts(x[one], w_up, w_down, ids[one], weights[one], **options))
    assert not whole[:-1].isnan().any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_co_batches(backend, form, dtype):
    """The same tokens alone, first, last, and so many that their experts are full: one result."""
    x, w_up, w_down, ids, weights, options = inputs(80, 4, 6, 64, 48, 0, "relu2", dtype, form)
    whole = experts(x, w_up, w_down, ids, weights, **options)
    for part in (slice(0, 3), slice(77, 80), slice(10, 50)):
        y = experts(x[part], w_up, w_down, ids[part], weights[part], **options)
        assert_invariant(backend, y, whole[part])


def test_the_same_call_gives_the_same_bits(backend, form):
    *tensors, options = inputs(50, 4, 6, 64, 48, 0, "silu", torch.bfloat16, form)
    assert_same_bits(experts(*tensors, **options), experts(*tensors, **options))


def test_powers_of_two_pass_through(backend, form):
    """relu2(g h) = g^2 relu2(h), and a routing weight scales: exact where g is a power of two."""
    x, w_up, w_down, ids, weights, options = inputs(9, 3, 4, 32, 48, 0, "relu2", torch.float32, form)
    y = experts(x, w_up, w_down, ids, weights, **options)
    assert_invariant(backend, experts(4 * x, w_up, w_down, ids, weights, **options), 16 * y)
    assert_invariant(backend, experts(x, w_up, w_down, ids, 0.5 * weights, **options), 0.5 * y)


@takes_dense
def test_padding_with_zeros_changes_nothing(backend):
    """Columns of zeros: relu2(0) = 0, whatever the other weight holds there."""
    x, w_up, w_down, ids, weights, options = inputs(9, 3, 4, 32, 40, 0, "relu2", torch.float32)
    y = experts(x, w_up, w_down, ids, weights, **options)
    more_up, more_down = torch.zeros(4, 8, 32, device=DEVICE), torch.randn(4, 32, 8, device=DEVICE)
    padded = experts(x, torch.cat([w_up, more_up], 1), torch.cat([w_down, more_down], 2), ids, weights, **options)
    torch.testing.assert_close(padded, y, rtol=1e-5, atol=1e-6)


def test_zero_routing_weights(backend, form):
    x, w_up, w_down, ids, weights, options = inputs(9, 3, 4, 32, 48, 0, "relu2", torch.bfloat16, form)
    assert not experts(x, w_up, w_down, ids, torch.zeros_like(weights), **options).any()


@pytest.mark.parametrize("skipped", [-1, 1, 6, 2**31 - 1, -(2**31)])
def test_skipped_slots_add_exactly_nothing(backend, form, skipped):
    """Experts 2..5 are here. Whatever weight a skipped slot has, and where no slot is left the row is zero."""
    x, w_up, w_down, ids, weights, options = inputs(7, 4, 4, 32, 48, 2, "relu2", torch.float32, form)
    ids = ids.clamp(2, 5)
    ids[:, 1::2], ids[3] = skipped, skipped
    weights[:, 1::2] = float("nan")
    y = experts(x, w_up, w_down, ids, weights, **options)
    kept = experts(x, w_up, w_down, ids[:, ::2].contiguous(), weights[:, ::2].contiguous(), **options)
    assert_same_bits(y, kept)
    assert not y[3].any()


@pytest.mark.parametrize("valid", [0, 1, 5, 9, 100])
def test_padding_tokens(backend, form, valid):
    """Rows from valid_tokens on come out as zeros; what they hold is not looked at."""
    x, w_up, w_down, ids, weights, options = inputs(9, 3, 4, 32, 48, 0, "relu2", torch.bfloat16, form)
    truth = experts(x, w_up, w_down, ids, weights, **options)
    ids[valid:] = ids[valid:].clamp(0, 3)
    x[valid:], weights[valid:], ids[valid + 1 :] = float("nan"), float("nan"), 2**31 - 1
    count = torch.tensor([valid], dtype=torch.int32, device=DEVICE)
    y = experts(x, w_up, w_down, ids, weights, valid_tokens=count, **options)
    assert_invariant(backend, y[:valid], truth[:valid])
    assert not y[valid:].any()


@takes_dense
def test_ranks_add_up(backend):
    """Expert parallelism: the uneven shares of three ranks, one without a token, sum to the unsharded result."""
    x, w_up, w_down, ids, weights, _ = inputs(20, 4, 13, 32, 48, 0, "relu2", torch.float32)
    ids = torch.where(ids == 3, 5, ids)  # nothing for the rank that holds expert 3 alone
    whole = experts(x, w_up, w_down, ids, weights)
    parts = [experts(x, w_up[a:b], w_down[a:b], ids, weights, first_expert=a) for a, b in ((0, 3), (3, 4), (4, 13))]
    assert not parts[1].any()
    torch.testing.assert_close(sum(parts), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_expert_receives_everything(backend, form, dtype):
    x, w_up, w_down, ids, weights, options = inputs(300, 2, 64, 32, 48, 0, "relu2", dtype, form)
    ids[:] = 63
    y = experts(x, w_up, w_down, ids, weights, **options)
    assert_right(y[::37], *definition(x[::37], w_up, w_down, ids[::37], weights[::37]))


def assert_within_the_gate(y, x, w_up, w_down, ids, weights, activation="relu2"):
    """moe's bound on a fused low-precision pipeline: relative L2 error 3e-3 (float32: 1e-5), and no element further
    off than 6 units in the last place of its row's maximum."""
    double = (dense(t) for t in (x, w_up, w_down))
    truth = reference.moe_experts(*double, ids, weights.double(), activation=activation)
    error = y.double() - truth
    narrow = y.dtype != torch.float32
    assert error.norm() <= (3e-3 if narrow else 1e-5) * truth.norm()
    unit = torch.finfo(y.dtype).eps if narrow else 1e-5
    assert (error.abs().amax(1) <= 6 * unit * truth.abs().amax(1)).all()


# tokens, k, experts, width, inner: Nano and its tensor-parallel shards, Super and its shard, Ultra's shard, Puzzle,
# Kimi K3's width; experts are few, as they cost the time and only their number times their size matters
PUBLISHED = [
    (3, 2, 3, 2688, 1856), (2, 6, 8, 2688, 464), (2, 6, 8, 2688, 232), (2, 2, 3, 1024, 2688), (5, 22, 32, 1024, 336),
    (2, 4, 8, 2048, 640), (3, 18, 24, 1024, 160), (1, 16, 20, 3584, 96), (3, 32, 40, 256, 64), (33, 1, 512, 64, 32),
]  # fmt: skip
PUBLISHED_NVFP4 = [
    (1, 1, 2, 2688, 1856), (2, 6, 6, 512, 464), (1, 1, 2, 1024, 2688), (3, 22, 24, 256, 336), (2, 4, 4, 1024, 640),
    (3, 32, 40, 64, 64), (33, 1, 512, 32, 32),
]  # fmt: skip


@takes_dense
@pytest.mark.parametrize("tokens, k, num_experts, width, inner", PUBLISHED)
def test_published_shapes(backend, tokens, k, num_experts, width, inner):
    x, w_up, w_down, *_ = inputs(tokens, k, num_experts, width, inner, 0, "relu2", torch.bfloat16)
    ids, weights = routing(tokens, num_experts, k, scale=5.0)
    assert_within_the_gate(experts(x, w_up, w_down, ids, weights), x, w_up, w_down, ids, weights)


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


@takes_dense
def test_offsets_beyond_31_bits(backend):
    """The last of 206 experts of Ultra's size, 2.16e9 elements in each weight; all others are untouched zeros."""
    num_experts, inner, width = 206, 5120, 2048
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    w_up, w_down = (
        torch.frombuffer(mmap.mmap(-1, 2 * num_experts * inner * width, flags=flags), dtype=torch.bfloat16)
        for _ in range(2)
    )
    w_up, w_down = w_up.view(num_experts, inner, width), w_down.view(num_experts, width, inner)
    up, down = torch.randn(inner, width) * width**-0.5, torch.randn(width, inner) * inner**-0.5
    w_up[-1], w_down[-1] = up, down
    x = torch.randn(1, width).bfloat16()
    ids = torch.tensor([[205, 7]], dtype=torch.int32, device=DEVICE)
    weights = torch.ones(1, 2, device=DEVICE)
    y = experts(x.to(DEVICE), w_up.to(DEVICE), w_down.to(DEVICE), ids, weights).cpu()
    truth = w_down[-1].double() @ F.relu(w_up[-1].double() @ x[0].double()).square()
    assert (y[0].double() - truth).norm() <= 3e-3 * truth.norm()


# ---- NVFP4


@pytest.mark.parametrize("tokens, k, num_experts, width, inner", PUBLISHED_NVFP4)
def test_nvfp4_published_shapes(backend, tokens, k, num_experts, width, inner):
    x, *_ = inputs(tokens, k, num_experts, width, 1, 0, "relu2", torch.bfloat16)
    w_up, w_down = nvfp4(num_experts, inner, width), nvfp4(num_experts, width, inner)
    ids, weights = routing(tokens, num_experts, k)
    assert_within_the_gate(experts(x, w_up, w_down, ids, weights), x, w_up, w_down, ids, weights)


def test_nvfp4_decodes_like_dequantize(backend):
    x, w_up, w_down, ids, weights, options = inputs(9, 3, 4, 64, 48, 0, "relu2", torch.float32, "nvfp4")
    y = experts(x, w_up, w_down, ids, weights, **options)
    up, down = w_up.dequantize(torch.float32), w_down.dequantize(torch.float32)
    torch.testing.assert_close(y, reference.moe_experts(x, up, down, ids, weights, **options), rtol=1e-5, atol=1e-5)
    tiled = experts(x, w_up.to_layout("128x4"), w_down, ids, weights, **options)
    assert_same_bits(y, tiled)


def test_nvfp4_full_batches(backend):
    """Hundreds of tokens for some experts and a few for the others give the bits that a few tokens have."""
    x, w_up, w_down, ids, weights, options = inputs(700, 3, 5, 48, 80, 0, "relu2", torch.bfloat16, "nvfp4")
    ids[:, 0], ids[::2, 1] = 1, 2
    whole = experts(x, w_up, w_down, ids, weights, **options)
    parts = zip(x.split(50), ids.split(50), weights.split(50), strict=True)
    alone = [experts(xs, w_up, w_down, some, gains, **options) for xs, some, gains in parts]
    assert_invariant(backend, torch.cat(alone), whole)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("tokens", [1, 70])
def test_nvfp4_threads_do_not_show(backend, tokens, activation):
    x, w_up, w_down, ids, weights, options = inputs(tokens, 4, 6, 240, 368, 0, activation, torch.bfloat16, "nvfp4")
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(experts(x, w_up, w_down, ids, weights, **options))
    finally:
        torch.set_num_threads(threads)
    assert_invariant(backend, results[0], results[1])
    assert_invariant(backend, results[0], results[2])


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


# ---- gradients


def gradient_inputs(activation, dtype=torch.double):
    x, w_up, w_down, ids, weights, options = inputs(5, 3, 3, 6, 4, 1, activation, dtype)
    weights = weights.to(torch.promote_types(dtype, torch.float32))
    return [t.clone().requires_grad_() for t in (x, w_up, w_down, weights)], ids, options


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients(activation):
    leaves, ids, options = gradient_inputs(activation)
    torch.autograd.gradcheck(lambda x, up, down, w: experts(x, up, down, ids, w, **options), leaves)


@pytest.mark.op("moe_experts_bwd")
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_backward_agrees_with_the_definition(backend, activation, dtype):
    x, w_up, w_down, ids, weights, options = inputs(60, 4, 5, 48, 32, 1, activation, dtype)
    grad_y = torch.randn_like(x)
    leaves = [t.double().requires_grad_() for t in (x, w_up, w_down, weights)]
    y = reference.moe_experts(*leaves[:3], ids, leaves[3], **options)
    truth = torch.autograd.grad(y, leaves, grad_y.double())
    grads = torch.ops.n3.moe_experts_bwd(grad_y, x, w_up, w_down, ids, weights, *options.values())
    gate = 1e-5 if dtype == torch.float32 else 5e-3
    for name, grad, true, t in zip(("x", "w_up", "w_down", "weights"), grads, truth, (x, w_up, w_down, weights),
                                   strict=True):  # fmt: skip
        assert grad.dtype == t.dtype and grad.shape == t.shape
        assert (grad.double() - true).norm() <= gate * true.norm(), name


@pytest.mark.op("moe_experts_bwd")
def test_an_idle_expert_has_no_gradient(backend):
    x, w_up, w_down, ids, weights, _ = inputs(9, 3, 4, 32, 48, 0, "relu2", torch.float32)
    ids = torch.where(ids == 2, -1, ids)
    _, dw_up, dw_down, dweights = torch.ops.n3.moe_experts_bwd(x, x, w_up, w_down, ids, weights, "relu2", 0)
    assert not dw_up[2].any() and not dw_down[2].any() and dw_up[1].any()
    assert not dweights[(ids < 0) | (ids > 3)].any()


def test_padding_tokens_have_no_gradient():
    (x, w_up, w_down, weights), ids, options = gradient_inputs("relu2")
    y = experts(x, w_up, w_down, ids, weights, valid_tokens=torch.tensor([2], dtype=torch.int32), **options)
    padded = torch.autograd.grad(y, (x, w_up, w_down, weights), torch.ones_like(y))
    y = experts(x[:2], w_up, w_down, ids[:2], weights[:2], **options)
    alone = torch.autograd.grad(y, (x, w_up, w_down, weights), torch.ones_like(y))
    torch.testing.assert_close(padded, alone)


def test_gradients_stop_at_nvfp4_weights():
    x = torch.randn(2, 16, device=DEVICE, requires_grad=True)
    ids, weights = torch.zeros(2, 1, dtype=torch.int32, device=DEVICE), torch.ones(2, 1, device=DEVICE)
    y = experts(x, nvfp4(2, 32, 16), nvfp4(2, 16, 32), ids, weights)
    with pytest.raises(RuntimeError, match="n3::moe_experts_bwd: w_up must be dense, got NVFP4"):
        y.sum().backward()


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


@pytest.mark.parametrize("tokens", [0, 4])
def test_opcheck_backward(tokens):
    x, w_up, w_down, ids, weights, _ = inputs(tokens, 3, 4, 8, 6, 0, "relu2", torch.float32)
    strided = w_up.transpose(1, 2).contiguous().transpose(1, 2)
    args = (torch.ones_like(x), x, strided, w_down, ids, weights, "relu2", 0)
    torch.library.opcheck(torch.ops.n3.moe_experts_bwd.default, args)


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
    if stored == "dense" and (reason := _without(backend)):
        pytest.skip(reason)
    good = GOOD if stored == "dense" else GOOD_NVFP4
    call = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in {**good, **change}.items()}
    with pytest.raises(RuntimeError) as error:
        torch.ops.n3.moe_experts(**call)
    assert str(error.value) == f"n3::moe_experts: {message}"
