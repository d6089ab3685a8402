"""The gradients of the routed experts against autograd through the products that transformers' grouped_mm experts make.

``torch`` is the backward alone, of a graph that keeps its intermediates; ours computes them again from x.
"""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
import torch.nn.functional as F

from n3kernels.moe import reference

from ..conftest import DEVICE, providers, sizes
from ..shapes import EXPERTS

OP = "moe_experts_bwd"
TOKENS = (1, 64, 256)
DTYPES = (torch.float32, torch.bfloat16)
SIZES = {"latent-small": (128, *EXPERTS["latent-small"]), "demo": (16, *EXPERTS["demo"])}  # experts, k, width, inner


@lru_cache(1)
def problem(size: str, tokens: int, dtype: torch.dtype):
    experts, k, width, inner = SIZES[size]
    x, grad_y = torch.randn(2, tokens, width, device=DEVICE).to(dtype)
    w_up = (torch.randn(experts, inner, width, device=DEVICE) * width**-0.5).to(dtype)
    w_down = (torch.randn(experts, width, inner, device=DEVICE) * inner**-0.5).to(dtype)
    ids, weights, counts, _ = reference.moe_route(torch.randn(tokens, experts, device=DEVICE), top_k=k)
    args = (grad_y, x, w_up, w_down, ids, weights, "relu2", 0)
    wide = [t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in args]
    with torch.no_grad():
        truth = torch.cat([g.flatten() for g in torch.ops.n3.moe_experts_bwd.default(*wide)[:3]])
    return args, truth, int((counts > 0).sum())


def grouped_mm(x, w_up, w_down, ids, weights):
    """Rows sorted by expert, two grouped products, rows sorted back: integrations/moe.py of transformers."""
    tokens, k = ids.shape
    expert, order = ids.flatten().sort()
    counts = torch.histc(expert.float(), bins=len(w_up), min=0, max=len(w_up) - 1)
    offs = counts.cumsum(0, dtype=torch.int32)
    h = F.grouped_mm(x[order // k], w_up.mT, offs=offs)
    y = F.grouped_mm(F.relu(h).square(), w_down.mT, offs=offs) * weights.flatten()[order, None]
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    return y[back].view(tokens, k, -1).sum(1).to(x.dtype)


def autograd(grad_y, x, w_up, w_down, ids, weights):
    """The backward as a function of grad_y, the forward done."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, w_up, w_down, weights)]
    y = grouped_mm(*leaves[:3], ids, leaves[3])
    return lambda grad: torch.autograd.grad(y, leaves, grad, retain_graph=True)


@pytest.mark.parametrize("provider", providers(OP, "torch"))
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("tokens", sizes(TOKENS, quick=[64]))
@pytest.mark.parametrize("size", sizes(SIZES, quick=["demo"]))
def test_moe_experts_bwd(measure, size, tokens, dtype, provider):
    experts, k, width, inner = SIZES[size]
    args, truth, active = problem(size, tokens, dtype)
    fn, call = torch.ops.n3.moe_experts_bwd.default, args
    if provider == "torch":
        fn, call = autograd(*args[:6]), args[:1]
    gate = 1e-5 if dtype == torch.float32 else 2e-2 if provider == "torch" else 3e-3  # it rounds after every step
    measure(
        OP, provider, fn, call, truth,
        group=f"{OP} {size} E={experts} k={k} T={tokens} {dtype}".replace("torch.", ""),
        value=lambda grads: torch.cat([g.flatten() for g in grads[:3]]),
        bytes=(2 * (experts + active) * width * inner + 3 * tokens * width) * dtype.itemsize,
        flops=10 * tokens * k * width * inner, dtype=torch.float32, tolerance=gate,
    )  # fmt: skip
