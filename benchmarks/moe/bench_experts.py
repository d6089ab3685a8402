"""The routed experts, dense and NVFP4, against plain torch: two grouped products (as transformers' grouped_mm experts
run them), and expert after expert. For NVFP4 weights the baselines read the same weights in bfloat16."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from n3kernels.moe import reference

from ..conftest import DEVICE, providers, sizes
from ..nvfp4.weights import nvfp4_bytes, nvfp4_weight, plain_weight
from ..shapes import EXPERTS

OP = "moe_experts"
TOKENS = (1, 4, 8, 32, 64, 256)
FORMS = {"fp32": torch.float32, "bf16": torch.bfloat16, "nvfp4": torch.bfloat16}  # of weights -> dtype of x
ACTIVE = 16  # experts that are in memory; the tokens are routed among them
BASELINES = {"torch, grouped_mm": "grouped", "torch, loop": "loop"}


def num_experts(size: str) -> int:
    return 128 if size == "latent-small" else max(ACTIVE, EXPERTS[size].k)


class Problem:
    def __init__(self, size: str, tokens: int, form: str):
        self.k, width, inner = EXPERTS[size]
        experts, self.dtype = num_experts(size), FORMS[form]
        self.x = torch.randn(tokens, width, device=DEVICE, dtype=self.dtype)
        logits = torch.randn(tokens, experts, device=DEVICE)
        self.ids, self.weights, counts, _ = reference.moe_route(logits, top_k=self.k)
        if form == "nvfp4":
            up, down = stack(experts, inner, width), stack(experts, width, inner)
            weight_bytes = nvfp4_bytes(inner, width) + nvfp4_bytes(width, inner)
        else:
            up, down = ([dense(experts, *shape, self.dtype)] for shape in ((inner, width), (width, inner)))
            weight_bytes = 2 * width * inner * self.dtype.itemsize
        self.args = (self.x, up[0], down[0], self.ids, self.weights, *up[1:], *down[1:])
        self.truth = truth(self.x, self.ids, self.weights, *(plain(w, torch.float32) for w in (up, down)))
        self.bytes = int((counts > 0).sum()) * weight_bytes + 2 * self.x.numel() * self.dtype.itemsize
        self.flops = 4 * tokens * self.k * width * inner
        self.parts = up, down

    def baseline_args(self) -> list[Tensor]:
        return [self.x, *(plain(w, self.dtype) for w in self.parts), self.ids, self.weights]


def dense(experts: int, n: int, k: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(experts, n, k, device=DEVICE, dtype=dtype) * k**-0.5


def stack(experts: int, n: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, block scales and a global scale for each expert, cut from one tall weight."""
    w = nvfp4_weight(experts * n, k)
    parts = (t.view(experts, n, -1) for t in (w.q, w.block_scale))
    return *parts, w.global_scale.repeat(experts)


def plain(parts, dtype: torch.dtype) -> Tensor:
    """The weights of one side as the baselines read them."""
    if len(parts) == 1:
        return parts[0].to(dtype)
    experts, n, half = parts[0].shape
    return plain_weight(nvfp4_weight(experts * n, 2 * half), dtype).view(experts, n, 2 * half)


def truth(x: Tensor, ids: Tensor, weights: Tensor, w_up: Tensor, w_down: Tensor) -> Tensor:
    """The definition in float64, an expert at a time: all weights in float64 would not fit."""
    y = torch.zeros(x.shape, device=x.device, dtype=torch.float64)
    for e in ids.unique().tolist():
        t, j = (ids == e).nonzero(as_tuple=True)
        rows = F.relu(x[t].double() @ w_up[e].double().T).square() @ w_down[e].double().T
        y.index_add_(0, t, rows * weights[t, j, None].double())
    return y


def grouped(x: Tensor, w_up: Tensor, w_down: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Slots sorted by expert, two grouped products, back in order, summed."""
    k = ids.shape[1]
    experts, order = ids.flatten().sort()
    counts = torch.histc(experts.float(), bins=len(w_up), min=0, max=len(w_up) - 1)
    ends = counts.cumsum(0, dtype=torch.int32)
    h = F.relu(F.grouped_mm(x[order // k], w_up.mT, offs=ends)).square()
    rows = F.grouped_mm(h, w_down.mT, offs=ends) * weights.flatten()[order, None]
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=x.device)
    return rows[place].view(len(x), k, -1).sum(1).to(x.dtype)


def loop(x: Tensor, w_up: Tensor, w_down: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    y = torch.zeros(x.shape, device=x.device)
    for e in ids.unique().tolist():
        t, j = (ids == e).nonzero(as_tuple=True)
        rows = F.linear(F.relu(F.linear(x[t], w_up[e])).square(), w_down[e])
        y.index_add_(0, t, rows * weights[t, j, None])
    return y.to(x.dtype)


problem = lru_cache(1)(Problem)  # the providers of a group come one after the other and share it


@pytest.mark.parametrize("provider", providers(OP, *BASELINES))
@pytest.mark.parametrize("tokens", sizes(TOKENS, quick=[4], full=[32, 256]))
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", sizes(EXPERTS, quick=["demo"], full=["super", "ultra"]))
def test_moe_experts(measure, size, form, tokens, provider):
    p = problem(size, tokens, form)
    fn, args = torch.ops.n3.moe_experts.default, p.args
    if provider in BASELINES:
        fn, args = {"grouped": grouped, "loop": loop}[BASELINES[provider]], p.baseline_args()
    exact = 1e-5 if form == "fp32" else 3e-3
    measure(
        OP, provider, fn, args, p.truth,
        group=f"{OP} {size} {form} k={p.k} T={tokens}", flops=p.flops, bytes=p.bytes, dtype=p.dtype,
        tolerance=2e-2 if provider in BASELINES else exact,  # which round after every step
    )  # fmt: skip
