"""The routed experts on NVFP4 weights against plain torch: the same weights in bfloat16, expert after expert."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
import torch.nn.functional as F

from n3kernels.moe import reference

from ..conftest import DEVICE, providers, sizes
from ..nvfp4.weights import nvfp4_bytes, nvfp4_weight, plain_weight
from ..shapes import EXPERTS

OP = "moe_experts"
TOKENS = (1, 4, 32)
ACTIVE = 16  # experts that are in memory; the tokens are routed among them


class Problem:
    def __init__(self, size: str, tokens: int):
        self.k, width, inner = EXPERTS[size]
        num_experts = max(ACTIVE, self.k)
        self.up, self.down = stack(num_experts, inner, width), stack(num_experts, width, inner)
        self.x = torch.randn(tokens, width, device=DEVICE, dtype=torch.bfloat16)
        logits = torch.randn(tokens, num_experts, device=DEVICE)
        self.ids, self.weights, counts, _ = reference.moe_route(logits, top_k=self.k)
        self.active = int((counts > 0).sum())
        self.args = (self.x, self.up[0], self.down[0], self.ids, self.weights, *self.up[1:], *self.down[1:])
        self.truth = reference.moe_experts(self.x.double(), *self.args[1:4], self.weights.double(), *self.args[5:])
        self.bytes = 2 * self.active * nvfp4_bytes(inner, width) + 2 * 2 * self.x.numel()
        self.flops = 4 * tokens * self.k * width * inner


def stack(num_experts: int, n: int, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, block scales and a global scale for each expert, cut from one tall weight."""
    w = nvfp4_weight(num_experts * n, k)
    parts = (t.view(num_experts, n, -1) for t in (w.q, w.block_scale))
    return *parts, w.global_scale.repeat(num_experts)


problem = lru_cache(1)(Problem)  # the providers of a group come one after the other and share it


@lru_cache(1)
def baseline_weights(size: str) -> tuple[torch.Tensor, torch.Tensor]:
    k, width, inner = EXPERTS[size]
    num_experts = max(ACTIVE, k)
    up, down = (plain_weight(nvfp4_weight(num_experts * n, m), torch.bfloat16).view(num_experts, n, m)
                for n, m in ((inner, width), (width, inner)))  # fmt: skip
    return up, down


def plain_experts(x, w_up, w_down, ids, weights):
    y = torch.zeros(x.shape, device=x.device)
    for e in ids.unique().tolist():
        t, j = (ids == e).nonzero(as_tuple=True)
        rows = F.linear(F.relu(F.linear(x[t], w_up[e])).square(), w_down[e])
        y.index_add_(0, t, rows * weights[t, j, None])
    return y.to(x.dtype)


@pytest.mark.parametrize("provider", providers(OP, "torch"))
@pytest.mark.parametrize("tokens", sizes(TOKENS, quick=[4]))
@pytest.mark.parametrize("size", sizes(EXPERTS, quick=["demo"], full=["super", "ultra"]))
def test_moe_experts(measure, size, tokens, provider):
    p = problem(size, tokens)
    fn, args = torch.ops.n3.moe_experts.default, p.args
    if provider == "torch":
        fn, args = plain_experts, [p.x, *baseline_weights(size), p.ids, p.weights]
    measure(
        OP, provider, fn, args, p.truth,
        group=f"{OP} {size} k={p.k} T={tokens}", flops=p.flops, bytes=p.bytes,
        tolerance=2e-2 if provider == "torch" else 3e-3,  # which rounds after every step
    )  # fmt: skip
