"""The routing against the router of transformers' Nemotron-H after its matrix product, step by step in plain torch."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch

from n3kernels.moe import reference

from ..conftest import DEVICE, providers, sizes

ROUTERS = {"nano": (128, 6, 2.5), "super": (512, 22, 5.0), "kimi": (896, 16, 1.0)}  # experts, top_k, scale
TOKENS = (1, 64, 4096)


@lru_cache(1)
def problem(size: str, tokens: int):
    experts = ROUTERS[size][0]
    return torch.randn(tokens, experts, device=DEVICE), torch.randn(experts, device=DEVICE) / 10


def n3_route(logits, bias, top_k, scale):
    return torch.ops.n3.moe_route.default(logits, bias, top_k=top_k, scale=scale)


def plain_route(logits, bias, top_k, scale):
    """One group, whose mask changes nothing but is computed all the same."""
    scores = logits.sigmoid()
    choice = scores + bias
    groups = choice.unflatten(1, (1, -1)).topk(2, dim=-1).values.sum(-1)
    best = groups.topk(1, dim=-1, sorted=False).indices
    mask = torch.zeros_like(groups).scatter_(1, best, 1).unsqueeze(-1).expand(-1, -1, logits.shape[1]).flatten(1)
    choice = choice.masked_fill(~mask.bool(), float("-inf"))
    ids = choice.topk(top_k, dim=-1, sorted=False).indices
    weights = scores.gather(1, ids)
    return ids, weights / (weights.sum(-1, keepdim=True) + 1e-20) * scale


def sorted_weights(out):
    return out[1].sort(descending=True).values


@pytest.mark.parametrize("provider", providers("moe_route", "torch"))
@pytest.mark.parametrize("tokens", sizes(TOKENS, quick=[64]))
@pytest.mark.parametrize("size", sizes(ROUTERS, quick=["super"]))
def test_moe_route(measure, size, tokens, provider):
    logits, bias = problem(size, tokens)
    experts, top_k, scale = ROUTERS[size]
    truth = sorted_weights(reference.moe_route(logits.double(), bias.double(), top_k=top_k, scale=scale))
    measure(
        "moe_route", provider, plain_route if provider == "torch" else n3_route, [logits, bias, top_k, scale], truth,
        value=sorted_weights, group=f"moe_route {size} {experts} experts top {top_k} T={tokens}",
        bytes=4 * (logits.numel() + 2 * tokens * top_k), flops=10 * logits.numel(), dtype=torch.float32,
        tolerance=1e-6,
    )  # fmt: skip


def n3_gradient(grad, logits, ids, scale, score):
    return torch.ops.n3.moe_route_bwd.default(grad, logits, ids, score=score, scale=scale)


def plain_gradient(grad, logits, ids, scale, score):
    with torch.enable_grad():
        x = logits.detach().requires_grad_()
        scores = (x.sigmoid() if score == "sigmoid" else x.softmax(1)).gather(1, ids.long())
        weights = scores / (scores.sum(-1, keepdim=True) + 1e-20) * scale
        return torch.autograd.grad(weights, x, grad)[0]


@pytest.mark.parametrize("provider", providers("moe_route_bwd", "torch"))
@pytest.mark.parametrize("tokens", sizes((64, 4096), quick=[64]))
@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_moe_route_bwd(measure, score, tokens, provider):
    logits, bias = problem("super", tokens)
    _, top_k, scale = ROUTERS["super"]
    ids = reference.moe_route(logits, bias, top_k=top_k, score=score)[0]
    grad = torch.randn(tokens, top_k, device=DEVICE)
    truth = plain_gradient(grad.double(), logits.double(), ids, scale, score)
    measure(
        "moe_route_bwd", provider, plain_gradient if provider == "torch" else n3_gradient,
        [grad, logits, ids, scale, score], truth, group=f"moe_route_bwd {score} super T={tokens}",
        bytes=4 * (2 * logits.numel() + 2 * ids.numel()), flops=10 * logits.numel(), dtype=torch.float32,
        tolerance=1e-5,
    )  # fmt: skip
