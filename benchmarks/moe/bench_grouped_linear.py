"""One grouped product with its rows gathered and relu2 behind it, against torch's gather, F.grouped_mm and relu2."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ..conftest import DEVICE, providers, sizes
from ..shapes import EXPERTS
from .bench_experts import FORMS, dense, num_experts, plain, stack

OP = "grouped_linear"
TOKENS = (1, 8, 64)  # each goes to the experts of the size: so many rows times k


class Problem:
    def __init__(self, size: str, tokens: int, form: str):
        k, width, inner = EXPERTS[size]
        groups, self.dtype = num_experts(size), FORMS[form]
        self.x = torch.randn(tokens, width, device=DEVICE, dtype=self.dtype)
        experts, order = torch.rand(tokens, groups, device=DEVICE).topk(k).indices.flatten().sort()
        counts = experts.bincount(minlength=groups)
        self.offsets = F.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
        self.gather = (order // k).to(torch.int32)
        self.parts = stack(groups, inner, width) if form == "nvfp4" else [dense(groups, inner, width, self.dtype)]
        w, *scales = self.parts
        self.args = (self.x, w, self.offsets, self.gather, None, *scales)
        self.truth = self._truth(plain(self.parts, torch.float32))
        group_bytes = sum(t.numel() * t.element_size() for t in self.parts) // groups
        moved = self.x.numel() + len(order) * inner
        self.bytes = int((counts > 0).sum()) * group_bytes + moved * self.dtype.itemsize
        self.flops = 2 * len(order) * width * inner

    def _truth(self, w: Tensor) -> Tensor:
        rows = self.x[self.gather].double().split(self.offsets.diff().tolist())
        return torch.cat([F.relu(piece @ w[g].double().T).square() for g, piece in enumerate(rows)])


def ours(x: Tensor, w: Tensor, offsets: Tensor, gather: Tensor, *rest: Tensor | None) -> Tensor:
    return torch.ops.n3.grouped_linear.default(x, w, offsets, gather, *rest, activation="relu2")


def baseline(x: Tensor, w: Tensor, ends: Tensor, gather: Tensor) -> Tensor:
    return F.relu(F.grouped_mm(x[gather], w.mT, offs=ends)).square()


problem = lru_cache(1)(Problem)


@pytest.mark.parametrize("provider", providers(OP, "torch"))
@pytest.mark.parametrize("tokens", sizes(TOKENS, quick=[8]))
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", sizes(EXPERTS, quick=["demo"], full=["super", "ultra"]))
def test_grouped_linear(measure, size, form, tokens, provider):
    p = problem(size, tokens, form)
    fn, args = ours, p.args
    if provider == "torch":
        fn, args = baseline, (p.x, plain(p.parts, p.dtype), p.offsets[1:], p.gather)
    exact = 1e-5 if form == "fp32" else 3e-3
    measure(
        OP, provider, fn, args, p.truth,
        group=f"{OP} {size} {form} T={tokens}", flops=p.flops, bytes=p.bytes, dtype=p.dtype,
        tolerance=2e-2 if provider == "torch" else exact,  # which rounds after every step
    )  # fmt: skip
