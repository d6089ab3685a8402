"""The sort of slots by expert against torch's stable sort and a count of each expert."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch

from n3kernels.moe import reference

from ..conftest import DEVICE, providers, sizes

ROUTERS = {"nano": (128, 6), "super": (512, 22)}  # experts, top_k
TOKENS = (1, 64, 4096)


@lru_cache(1)
def problem(size: str, tokens: int) -> torch.Tensor:
    experts, top_k = ROUTERS[size]
    return torch.randn(tokens, experts, device=DEVICE).topk(top_k).indices.int()


def plain_sort(ids, experts):
    flat = ids.flatten()
    order = flat.sort(stable=True).indices
    return order.int(), flat.bincount(minlength=experts).cumsum(0)


@pytest.mark.parametrize("provider", providers("moe_sort", "torch"))
@pytest.mark.parametrize("tokens", sizes(TOKENS, quick=[64]))
@pytest.mark.parametrize("size", sizes(ROUTERS, quick=["super"]))
def test_moe_sort(measure, size, tokens, provider):
    ids, experts = problem(size, tokens), ROUTERS[size][0]
    measure(
        "moe_sort", provider, plain_sort if provider == "torch" else torch.ops.n3.moe_sort.default, [ids, experts],
        reference.moe_sort(ids, experts)[0], value=lambda out: out[0], group=f"moe_sort {size} T={tokens}",
        bytes=4 * (2 * ids.numel() + 2 * experts), dtype=torch.float32, tolerance=0,
    )  # fmt: skip
