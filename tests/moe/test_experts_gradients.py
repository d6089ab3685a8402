from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE, assert_invariant, assert_same_bits
from grouped_problems import assert_within
from hypothesis import given
from hypothesis import strategies as st
from moe_problems import ACTIVATIONS, DTYPES, inputs, nvfp4, routing

from n3kernels.moe import experts

OPS = ("moe_experts_bwd",)
NAMES = ("x", "w_up", "w_down", "weights")

# tokens, 0 included; slots per token; experts; width and inner size, odd ones too; the first expert held here
problems = st.tuples(
    st.integers(0, 6), st.integers(1, 5), st.integers(1, 5), st.integers(1, 40), st.integers(1, 40), st.integers(0, 3),
    st.sampled_from(ACTIVATIONS), st.sampled_from(DTYPES),
)  # fmt: skip


def layer(x, w_up, w_down, ids, weights, activation="relu2", first_expert=0):
    """Slot by slot, differentiable, in the dtype of the arguments."""
    rows = []
    for t, row in enumerate(ids.tolist()):
        y = torch.zeros_like(x[t])
        for j, e in enumerate(row):
            if first_expert <= e < first_expert + len(w_up):
                h = w_up[e - first_expert] @ x[t]
                gate, up = (h, 1) if activation == "relu2" else h.chunk(2)
                act = {"relu2": lambda h: F.relu(h).square(), "silu": F.silu, "gelu": F.gelu}[activation](gate) * up
                y = y + weights[t, j] * (w_down[e - first_expert] @ act)
        rows.append(y)
    return torch.stack(rows) if rows else x.clone()


def truths(grad_y, x, w_up, w_down, ids, weights, **options):
    """The gradients of the definition, in float64."""
    leaves = [t.double().requires_grad_() for t in (x, w_up, w_down, weights)]
    y = layer(*leaves[:3], ids, leaves[3], **options)
    if not y.requires_grad:
        return [torch.zeros_like(t) for t in leaves]
    grads = torch.autograd.grad(y, leaves, grad_y.double(), allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for g, t in zip(grads, leaves, strict=True)]


def backward(grad_y, x, w_up, w_down, ids, weights, activation="relu2", first_expert=0):
    return torch.ops.n3.moe_experts_bwd(grad_y, x, w_up, w_down, ids, weights, activation, first_expert)


def assert_right(grads, truth, tensors, gate=None):
    x, w_up, w_down, _, weights = tensors
    for name, grad, true, t in zip(NAMES, grads, truth, (x, w_up, w_down, weights), strict=True):
        assert grad.dtype == t.dtype and grad.shape == t.shape and grad.is_contiguous(), name
        assert_within(grad, true, gate or (3e-3 if x.dtype != torch.float32 else 1e-5))


@given(problems)
def test_agrees_with_the_definition(backend, problem):
    *tensors, options = inputs(*problem)
    grad_y = torch.randn_like(tensors[0])
    few = 3e-3 + torch.finfo(grad_y.dtype).eps / 2 if grad_y.dtype != torch.float32 else 2e-5
    assert_right(backward(grad_y, *tensors, **options), truths(grad_y, *tensors, **options), tensors, few)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gate(backend, activation, dtype):
    *tensors, options = inputs(60, 4, 5, 48, 32, 1, activation, dtype)
    grad_y = torch.randn_like(tensors[0])
    assert_right(backward(grad_y, *tensors, **options), truths(grad_y, *tensors, **options), tensors)


# tokens, k, experts, width, inner: published slots, experts and inner sizes at small widths
PUBLISHED = [(3, 22, 512, 16, 16), (3, 32, 40, 32, 16), (5, 6, 8, 48, 336), (5, 6, 8, 48, 464), (5, 6, 8, 48, 232),
             (3, 2, 3, 32, 1856), (4, 1, 1, 32, 32), (3, 16, 896, 16, 8)]  # fmt: skip


@pytest.mark.parametrize("tokens, k, num_experts, width, inner", PUBLISHED)
def test_published_shapes(backend, tokens, k, num_experts, width, inner):
    x, w_up, w_down, *_ = inputs(tokens, k, num_experts, width, inner, 0, "relu2", torch.bfloat16)
    tensors = x, w_up, w_down, *routing(tokens, num_experts, k, scale=5.0)
    grad_y = torch.randn_like(x)
    assert_right(backward(grad_y, *tensors), truths(grad_y, *tensors), tensors)


def test_an_idle_expert_has_no_gradient(backend):
    x, w_up, w_down, ids, weights, _ = inputs(9, 3, 4, 32, 48, 0, "relu2", torch.float32)
    ids = torch.where(ids == 2, -1, ids)
    _, dw_up, dw_down, dweights = backward(x, x, w_up, w_down, ids, weights)
    assert not dw_up[2].any() and not dw_down[2].any() and dw_up[1].any()
    assert not dweights[(ids < 0) | (ids > 3)].any()


@pytest.mark.parametrize("width, inner", [(0, 29), (29, 0), (0, 0)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_empty_sizes(backend, width, inner, activation):
    """There is nothing to learn, and no tensor's address to go by: an empty W_down is there all the same."""
    x, ids = torch.randn(8, width, device=DEVICE), torch.zeros(8, 3, dtype=torch.int32, device=DEVICE)
    w_up = torch.randn(2, inner * (1 if activation == "relu2" else 2), width, device=DEVICE)
    w_down, weights = torch.randn(2, width, inner, device=DEVICE), torch.randn(8, 3, device=DEVICE)
    for grad, t in zip(backward(x, x, w_up, w_down, ids, weights, activation), (x, w_up, w_down, weights), strict=True):
        assert grad.shape == t.shape and not grad.any()


def test_skipped_slots_read_nothing(backend):
    """Whatever their weight is; and the tokens and gradients of rows without a local slot may be NaN."""
    x, w_up, w_down, ids, weights, options = inputs(9, 3, 4, 32, 48, 2, "silu", torch.float32)
    ids = ids.clamp(2, 5)
    ids[::2, 1], ids[4], ids[7] = -1, 1, 6
    grad_y = torch.randn_like(x)
    truth = backward(grad_y, x, w_up, w_down, ids, weights, **options)
    weights[::2, 1], weights[4], weights[7] = (float("nan"),) * 3
    x[4], grad_y[4], x[7], grad_y[7] = (float("nan"),) * 4
    for grad, true in zip(backward(grad_y, x, w_up, w_down, ids, weights, **options), truth, strict=True):
        assert_invariant(backend, grad, true)
    assert not truth[0][[4, 7]].any() and not truth[3][[4, 7]].any() and not truth[3][::2, 1].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_expert_receives_everything(backend, dtype):
    x, w_up, w_down, ids, weights, _ = inputs(150, 2, 8, 32, 16, 0, "relu2", dtype)
    ids[:] = 7
    grad_y = torch.randn_like(x)
    grads = backward(grad_y, x, w_up, w_down, ids, weights)
    assert not grads[1][:7].any() and not grads[2][:7].any()
    assert_right(grads, truths(grad_y, x, w_up, w_down, ids, weights), (x, w_up, w_down, ids, weights))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_call_gives_the_same_bits(backend, dtype):
    *tensors, options = inputs(40, 4, 5, 48, 32, 1, "gelu", dtype)
    grad_y = torch.randn_like(tensors[0])
    for a, b in zip(*(backward(grad_y, *tensors, **options) for _ in range(2)), strict=True):
        assert_same_bits(a, b)


def test_threads_do_not_show(backend):
    *tensors, options = inputs(40, 4, 5, 48, 32, 1, "relu2", torch.bfloat16)
    grad_y, threads, results = torch.randn_like(tensors[0]), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(backward(grad_y, *tensors, **options))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert_invariant(backend, a, b)


def test_a_token_does_not_see_the_batch(backend):
    """Its dx and dweights are the same alone, first and beside a row of NaN."""
    x, w_up, w_down, ids, weights, options = inputs(30, 4, 5, 48, 32, 1, "relu2", torch.bfloat16)
    grad_y = torch.randn_like(x)
    x[-1], grad_y[-1] = float("nan"), float("nan")
    dx, _, _, dweights = backward(grad_y, x, w_up, w_down, ids, weights, **options)
    for part in (slice(0, 1), slice(28, 29), slice(3, 12)):
        alone = backward(grad_y[part], x[part], w_up, w_down, ids[part], weights[part], **options)
        assert_invariant(backend, dx[part], alone[0])
        assert_invariant(backend, dweights[part], alone[3])


def test_experts_may_be_renamed(backend):
    x, w_up, w_down, ids, weights, _ = inputs(20, 3, 6, 32, 24, 0, "silu", torch.float32)
    ids, new = ids.clamp(0, 5), torch.randperm(6)
    new, back = new.to(DEVICE), new.argsort().to(DEVICE)
    grad_y = torch.randn_like(x)
    plain = backward(grad_y, x, w_up, w_down, ids, weights, "silu")
    named = backward(grad_y, x, w_up[back], w_down[back], new[ids.long()].int(), weights, "silu")
    for a, b in zip(plain, (named[0], named[1][new], named[2][new], named[3]), strict=True):
        assert_invariant(backend, a, b)


def test_ranks_add_up(backend):
    """dx is the sum over the ranks; weights and their gradients belong to one rank each."""
    x, w_up, w_down, ids, weights, _ = inputs(20, 4, 13, 32, 48, 0, "relu2", torch.float32)
    grad_y = torch.randn_like(x)
    whole = backward(grad_y, x, w_up, w_down, ids, weights)
    cuts = ((0, 3), (3, 4), (4, 13))
    parts = [backward(grad_y, x, w_up[a:b], w_down[a:b], ids, weights, "relu2", a) for a, b in cuts]
    torch.testing.assert_close(sum(p[0] for p in parts), whole[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.cat([p[1] for p in parts]), whole[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.cat([p[2] for p in parts]), whole[2], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sum(p[3] for p in parts), whole[3], rtol=1e-5, atol=1e-5)


def test_powers_of_two_pass_through(backend):
    x, w_up, w_down, ids, weights, _ = inputs(9, 3, 4, 32, 48, 0, "relu2", torch.float32)
    grad_y = torch.randn_like(x)
    one = backward(grad_y, x, w_up, w_down, ids, weights)
    scaled = backward(8 * grad_y, x, w_up, w_down, ids, weights)
    for a, b in zip(one, scaled, strict=True):
        assert_invariant(backend, 8 * a, b)
    dx, dw_up, dw_down, dweights = backward(grad_y, 4 * x, w_up, w_down, ids, weights)  # relu2(4 h) = 16 relu2(h)
    for a, b in zip((4 * one[0], 16 * one[1], 16 * one[2], 16 * one[3]), (dx, dw_up, dw_down, dweights), strict=True):
        assert_invariant(backend, a, b)


def test_float16_overflows_at_the_end_alone(backend):
    """Activations and gradients between the products leave float16, the results do not."""
    x, ids = torch.full((2, 100), 3.0, device=DEVICE).half(), torch.zeros(2, 1, dtype=torch.int32, device=DEVICE)
    w_up, w_down = torch.ones(1, 8, 100, device=DEVICE).half(), torch.full((1, 100, 8), 1.0, device=DEVICE).half()
    weights, grad_y = torch.full((2, 1), 2.0**-12, device=DEVICE), torch.full_like(x, 2.0**-4)
    grads = backward(grad_y, x, w_up, w_down, ids, weights)
    assert_right(grads, truths(grad_y, x, w_up, w_down, ids, weights), (x, w_up, w_down, ids, weights), 1e-3)


def test_strided_inputs(backend):
    """An expanded gradient, as that of a sum, and transposed views."""
    x, w_up, w_down, ids, weights, options = inputs(8, 4, 3, 32, 16, 0, "relu2", torch.float32)
    grad_y = torch.randn((), device=DEVICE).expand(8, 32)
    truth = backward(grad_y.contiguous(), x, w_up, w_down, ids, weights, **options)
    strided = backward(
        grad_y, x.t().contiguous().t(), w_up.transpose(1, 2).contiguous().transpose(1, 2),
        torch.cat([w_down, w_down], 2)[:, :, :16], ids.t().contiguous().t(), weights.repeat_interleave(2, 1)[:, ::2],
        **options,
    )  # fmt: skip
    for grad, true in zip(strided, truth, strict=True):
        assert grad.is_contiguous()
        assert_invariant(backend, grad, true)


# ---- through autograd


def gradient_inputs(activation, dtype=torch.double):
    x, w_up, w_down, ids, weights, options = inputs(5, 3, 3, 6, 4, 1, activation, dtype)
    weights = weights.to(torch.promote_types(dtype, torch.float32))
    return [t.clone().requires_grad_() for t in (x, w_up, w_down, weights)], ids, options


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation):
    leaves, ids, options = gradient_inputs(activation)
    torch.autograd.gradcheck(lambda x, up, down, w: experts(x, up, down, ids, w, **options), leaves)


def test_padding_tokens_have_no_gradient():
    (x, w_up, w_down, weights), ids, options = gradient_inputs("relu2")
    valid = torch.tensor([2], dtype=torch.int32, device=DEVICE)
    y = experts(x, w_up, w_down, ids, weights, valid_tokens=valid, **options)
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


def test_autocast_is_not_looked_at(backend):
    x, w_up, w_down, ids, weights, options = inputs(30, 4, 5, 48, 32, 1, "relu2", torch.float32)
    grad_y = torch.randn_like(x)
    truth = backward(grad_y, x, w_up, w_down, ids, weights, **options)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        narrow = backward(grad_y, x, w_up, w_down, ids, weights, **options)
    for a, b in zip(narrow, truth, strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("tokens", [0, 4])
def test_opcheck(tokens):
    x, w_up, w_down, ids, weights, _ = inputs(tokens, 3, 4, 8, 6, 0, "relu2", torch.float32)
    strided = w_up.transpose(1, 2).contiguous().transpose(1, 2)
    args = (torch.ones_like(x), x, strided, w_down, ids, weights, "relu2", 0)
    torch.library.opcheck(torch.ops.n3.moe_experts_bwd.default, args)


E, T, K, L, N = 4, 3, 2, 16, 32  # experts, tokens, slots, width, inner size
GOOD = {
    "grad_y": torch.zeros(T, L), "x": torch.zeros(T, L), "w_up": torch.zeros(E, N, L), "w_down": torch.zeros(E, L, N),
    "ids": torch.zeros(T, K, dtype=torch.int32), "weights": torch.zeros(T, K), "activation": "relu2", "first_expert": 0,
}  # fmt: skip
BAD = [
    ({"w_up": torch.zeros(E, N, 8, dtype=torch.uint8)},
     "w_up must be dense, got NVFP4: decode it first to train through it"),
    ({"x": torch.zeros(T, L, dtype=torch.int64)}, "x must be float32, float16 or bfloat16, got int64"),
    ({"activation": "relu"}, "activation must be one of relu2, silu, gelu, got relu"),
    ({"w_up": torch.zeros(E, N, 15)}, "w_up must have shape [4, 32, 16], got [4, 32, 15]"),
    ({"activation": "silu"}, "w_up must have shape [4, 64, 16], got [4, 32, 16]"),
    ({"ids": torch.zeros(T, K, dtype=torch.int64)}, "ids must be int32, got int64"),
    ({"weights": torch.zeros(T, K).half()}, "weights must be float32, got float16"),
    ({"weights": torch.zeros(T, 3)}, "weights must have shape [3, 2], got [3, 3]"),
    ({"first_expert": -1}, "first_expert must be at least 0, got -1"),
    ({"grad_y": torch.zeros(T, 15)}, "grad_y must have shape [3, 16], got [3, 15]"),
    ({"grad_y": torch.zeros(T, L).half()}, "grad_y must have the dtype of x (float32), got float16"),
]  # fmt: skip


@pytest.mark.parametrize("change, message", BAD)
def test_bad_calls(backend, change, message):
    call = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in {**GOOD, **change}.items()}
    with pytest.raises(RuntimeError) as error:
        torch.ops.n3.moe_experts_bwd(**call)
    own = "grad_y" in change or "NVFP4" in message  # what is also the forward's is said in its name
    assert str(error.value) == f"n3::moe_experts{'_bwd' if own else ''}: {message}"
