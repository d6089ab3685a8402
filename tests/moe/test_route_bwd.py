from __future__ import annotations

import math

import pytest
import torch
from conftest import DEVICE, assert_close_to, assert_invariant, assert_same_bits, fenced
from hypothesis import given
from hypothesis import strategies as st
from moe_problems import checking

from n3kernels import use_backend
from n3kernels.moe import route

OPS = ("moe_route_bwd",)
INF, NAN = math.inf, math.nan

# tokens, 0 included; experts; how many of them per token, as a fraction of the most; score; normalize; dtype
problems = st.tuples(
    st.integers(0, 5), st.integers(1, 70), st.floats(0, 1), st.sampled_from(["sigmoid", "softmax"]), st.booleans(),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)  # fmt: skip


def inputs(tokens, experts, fraction, score, normalize, dtype):
    """grad_weights, logits, ids, options; ids are any, not the best."""
    k = 1 + int(fraction * (min(32, experts) - 1))
    ids = torch.rand(tokens, experts).argsort(1)[:, :k].int()
    logits, grad = torch.randn(tokens, experts).to(dtype), torch.randn(tokens, k)
    options = {"score": score, "normalize": normalize, "scale": 2.5}
    return *(fenced(t.to(DEVICE)) for t in (grad, logits, ids)), options


def definition(grad_weights, logits, ids, *, score, normalize, scale):
    """By autograd in float64, and how large the terms are that it adds up."""
    leaf = logits.double().requires_grad_()
    scores = leaf.sigmoid() if score == "sigmoid" else leaf.softmax(1)
    chosen = scores.gather(1, ids.long())
    weights = chosen / (chosen.sum(1, keepdim=True) + 1e-20) if normalize else chosen
    (grad,) = torch.autograd.grad(weights * scale, leaf, grad_weights.double())
    magnitude = scale * grad_weights.double().abs().amax(1, keepdim=True).nan_to_num() * torch.ones_like(grad)
    return grad, magnitude


def backward(grad_weights, logits, ids, options):
    return torch.ops.n3.moe_route_bwd(grad_weights, logits, ids, **options)


@given(problems)
def test_agrees_with_the_definition(backend, problem):
    *tensors, options = inputs(*problem)
    grad = backward(*tensors, options)
    truth, magnitude = definition(*tensors, **options)
    assert grad.dtype == tensors[1].dtype and grad.is_contiguous()
    assert_close_to(grad, truth, scale=magnitude + truth.abs())


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
@pytest.mark.parametrize("experts, k", [(128, 6), (512, 22), (896, 16), (1024, 32), (1, 1), (256, 1)])
def test_published_shapes(backend, experts, k, score):
    grad, logits = torch.randn(5, k, device=DEVICE), torch.randn(5, experts, device=DEVICE)
    ids = logits.topk(k).indices.int()
    options = {"score": score, "normalize": True, "scale": 5.0}
    got = backward(grad, logits, ids, options)
    truth, _ = definition(grad, logits, ids, **options)
    bound = max(1e-5, 2 * experts * 2e-7)
    floor = 1e-6 * 5.0 * grad.double().abs().max()  # one expert: what is left of a difference of equals
    assert (got.double() - truth).norm() <= bound * truth.norm() + floor


@given(problems, st.integers(0, 4))
def test_a_row_does_not_see_the_batch(backend, problem, i):
    grad, logits, ids, options = inputs(max(problem[0], i) + 2, *problem[1:])
    logits[-1], grad[-1] = NAN, NAN
    one = slice(i, i + 1)
    whole = backward(grad, logits, ids, options)
    assert_invariant(backend, whole[one], backward(grad[one], logits[one], ids[one], options))


def test_the_same_call_gives_the_same_bits(backend):
    *tensors, options = inputs(40, 300, 0.6, "softmax", True, torch.float32)
    assert_same_bits(backward(*tensors, options), backward(*tensors, options))


def test_gradients_of_bad_rows_are_finite(backend):
    """A NaN score counts as 0; sums that vanish divide by 1e-20, not by 0."""
    logits = torch.tensor([[NAN] * 4, [0.0, NAN, 1.0, 2.0], [INF, 0.0, -INF, 1.0], [-200.0] * 4], device=DEVICE)
    ids = torch.tensor([[0, 1], [2, 1], [0, 2], [3, 1]], dtype=torch.int32, device=DEVICE)
    grad = torch.ones(4, 2, device=DEVICE)
    for score in ("sigmoid", "softmax"):
        for normalize in (False, True):
            got = backward(grad, logits, ids, {"score": score, "normalize": normalize, "scale": 1.0})
            assert got.isfinite().all()
            assert not got[0].any()
    got = backward(grad * torch.tensor([1.0, 3.0], device=DEVICE), logits, ids, {"normalize": True})
    assert not got[1, [0, 1, 3]].any()  # neither what was not chosen nor what is not a number


def test_experts_that_were_not_chosen(backend):
    """Sigmoid: exactly zero. Softmax without normalising: each has its share of the denominator."""
    grad, logits, ids, _ = inputs(6, 40, 0.3, "sigmoid", True, torch.float32)
    others = torch.ones_like(logits, dtype=torch.bool).scatter(1, ids.long(), False)
    assert not backward(grad, logits, ids, {"score": "sigmoid"})[others].any()
    assert (backward(grad, logits, ids, {"score": "softmax", "normalize": False})[others] != 0).all()


def test_softmax_gradients_sum_to_zero(backend):
    *tensors, _ = inputs(6, 200, 0.5, "softmax", True, torch.float32)
    for normalize in (False, True):
        sums = backward(*tensors, {"score": "softmax", "normalize": normalize}).double().sum(1)
        assert_close_to(sums, torch.zeros(6, device=DEVICE), 1e-5)


def test_scale_passes_through(backend):
    *tensors, _ = inputs(6, 40, 0.3, "sigmoid", True, torch.float32)
    one, eight = (backward(*tensors, {"scale": s}) for s in (1.0, 8.0))
    assert_invariant(backend, eight, 8 * one)


def test_strided_inputs(backend):
    grad, logits, ids, options = inputs(6, 40, 0.3, "softmax", True, torch.float32)
    grad = torch.randn(6, 1, device=DEVICE).expand(6, ids.shape[1])  # as of a sum over a token's experts
    truth = backward(grad.contiguous(), logits, ids, options)
    got = backward(grad, logits.t().contiguous().t(), ids.repeat_interleave(2, 1)[:, ::2], options)
    assert got.is_contiguous()
    assert_invariant(backend, got, truth)
    one = torch.ones((), device=DEVICE).expand(ids.shape)
    assert_invariant(backend, backward(one, logits, ids, options), backward(one.contiguous(), logits, ids, options))


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
@pytest.mark.parametrize("mapped", [False, True])
def test_is_what_autograd_calls(backend, score, mapped):
    """From routing to the gradient of the logits, with physical experts returned or not."""
    logits = torch.randn(5, 16, device=DEVICE, requires_grad=True)
    where = torch.randperm(16).to(DEVICE, torch.int32) if mapped else None
    options = {"score": score, "normalize": True, "scale": 2.5}
    with torch.no_grad():
        ids = route(logits, top_k=3, **options)[0]
    weights = route(logits, top_k=3, expert_map=where, **options)[1]
    grad = torch.randn_like(weights)
    weights.backward(grad)
    assert_close_to(logits.grad, definition(grad, logits.detach(), ids, **options)[0])


@pytest.mark.parametrize("tokens", [0, 1, 5])
@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_opcheck(tokens, score):
    grad, logits, ids, options = inputs(tokens, 16, 0.2, score, True, torch.float32)
    torch.library.opcheck(torch.ops.n3.moe_route_bwd.default, (grad, logits.t().contiguous().t(), ids), options)


IDS = torch.tensor([[0, 1], [2, 3]], dtype=torch.int32)
GOOD = {"grad_weights": torch.zeros(2, 2), "logits": torch.zeros(2, 8), "ids": IDS}
BAD = [
    ({"logits": torch.zeros(2, 8, dtype=torch.int64)}, "logits must be float32, float16 or bfloat16, got int64"),
    ({"logits": torch.zeros(8)}, "logits must have 2 dimensions, got 1"),
    ({"logits": torch.zeros(2, 0)}, "logits must have 1 to 1024 columns, got 0"),
    ({"logits": torch.zeros(2, 1025)}, "logits must have 1 to 1024 columns, got 1025"),
    ({"score": "relu"}, "score must be one of sigmoid, softmax, got relu"),
    ({"ids": IDS.long()}, "ids must be int32, got int64"),
    ({"ids": IDS[0]}, "ids must have 2 dimensions, got 1"),
    ({"ids": IDS[:, :0]}, "ids must have 1 to 8 columns, got 0"),
    ({"ids": torch.zeros(2, 9, dtype=torch.int32)}, "ids must have 1 to 8 columns, got 9"),
    ({"logits": torch.zeros(2, 64), "ids": torch.zeros(2, 33, dtype=torch.int32)},
     "ids must have 1 to 32 columns, got 33"),
    ({"ids": IDS[:1]}, "ids must have shape [2, 2], got [1, 2]"),
    ({"grad_weights": torch.zeros(2, 2).half()}, "grad_weights must be float32, got float16"),
    ({"grad_weights": torch.zeros(2, 3)}, "grad_weights must have shape [2, 2], got [2, 3]"),
]  # fmt: skip


@pytest.mark.parametrize("change, message", BAD)
def test_bad_calls(backend, change, message):
    call = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in {**GOOD, **change}.items()}
    with pytest.raises(RuntimeError) as error:
        torch.ops.n3.moe_route_bwd(**call)
    assert str(error.value) == f"n3::moe_route_bwd: {message}"


@pytest.mark.parametrize("which", checking("moe_route_bwd"))
@pytest.mark.parametrize("bad", [-1, 8, 2**31 - 1, -(2**31)])
def test_bad_ids(which, bad):
    ids = IDS.clone()
    ids[1, 0] = bad
    with pytest.raises(RuntimeError) as error, use_backend(which):
        torch.ops.n3.moe_route_bwd(**{**GOOD, "ids": ids})
    assert str(error.value) == f"n3::moe_route_bwd: ids must be between 0 and 7, got {bad}"
