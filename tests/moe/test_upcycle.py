"""A dense MLP made into experts computes what it computed, whatever the router chooses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE
from hypothesis import given
from hypothesis import strategies as st

from n3kernels import moe


def dense(x, w_up, w_down, activation):
    h = x @ w_up.T
    if activation == "relu2":
        return h.relu().square() @ w_down.T
    gate, up = h.chunk(2, -1)
    return (F.silu(gate) * up) @ w_down.T


def mixture(x, parts, top_k, activation, bias=None):
    experts = parts.w_up.shape[0]
    ids, weights, *_ = moe.route(
        x @ parts.router_weight.T, torch.zeros(experts, device=DEVICE) if bias is None else bias, top_k=top_k,
        scale=parts.scale,
    )  # fmt: skip
    return moe.experts(x, parts.w_up, parts.w_down, ids, weights, activation=activation), ids


@given(
    st.integers(1, 4), st.sampled_from([1, 2, 4]), st.integers(1, 3), st.integers(0, 5),
    st.sampled_from(["relu2", "silu"]),
)  # fmt: skip
def test_equal_at_first(copies, shards, chosen, tokens, activation):
    torch.manual_seed(copies + 10 * shards)
    inner, k = 32, 16
    w_up = torch.randn(inner * (2 if activation == "silu" else 1), k, device=DEVICE)
    w_down, x = torch.randn(k, inner, device=DEVICE), torch.randn(tokens, k, device=DEVICE)
    parts = moe.upcycle(w_up, w_down, copies * shards, shards=shards)
    chosen = min(chosen, copies)
    y, ids = mixture(x, parts, chosen * shards, activation)
    want = dense(x, w_up, w_down, activation)
    torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-3)
    for row in ids.tolist():  # whole copies, each with all its shards
        assert len(set(row)) == len(row) and len({e // shards for e in row}) == chosen


def test_eight_experts_of_which_two_learn_apart():
    torch.manual_seed(0)
    w_up, w_down = torch.randn(64, 32, device=DEVICE), torch.randn(32, 64, device=DEVICE)
    parts = moe.upcycle(w_up, w_down)
    w_up_e = parts.w_up.requires_grad_()
    x = torch.randn(8, 32, device=DEVICE)
    y, ids = mixture(x, parts._replace(w_up=w_up_e), 2, "relu2")
    y.sum().backward()
    used = torch.zeros(8, dtype=torch.bool, device=DEVICE).index_fill(0, ids.flatten().long(), True)
    assert torch.equal(w_up_e.grad.flatten(1).any(1), used)
    assert parts.w_up.data_ptr() != w_up.data_ptr()


def test_the_generator_makes_the_router():
    w_up, w_down = torch.randn(32, 16), torch.randn(16, 32)
    a, b = (moe.upcycle(w_up, w_down, generator=torch.Generator().manual_seed(3)).router_weight for _ in range(2))
    assert torch.equal(a, b)


BAD = [
    ({"w_up": torch.zeros(30, 16)}, "w_up must have shape [32, 16] or, gated, [64, 16], got [30, 16]"),
    ({"w_down": torch.zeros(16)}, "w_down must have 2 dimensions, got 1"),
    ({"shards": 3}, "shards must divide the inner dimension 32, got 3"),
    ({"num_experts": 6, "shards": 4}, "num_experts must be a positive multiple of shards (4), got 6"),
]


@pytest.mark.parametrize("change, message", BAD)
def test_bad_calls(change, message):
    call = {"w_up": torch.zeros(32, 16), "w_down": torch.zeros(16, 32), **change}
    with pytest.raises(RuntimeError) as error:
        moe.upcycle(**call)
    assert str(error.value) == f"n3::upcycle: {message}"
