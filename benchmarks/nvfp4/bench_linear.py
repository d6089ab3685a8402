"""x @ W^T with NVFP4 weights against plain torch on the same weights in bfloat16 and float32."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
import torch.nn.functional as F

from ..conftest import DEVICE, providers, sizes
from ..shapes import GEMMS, TOKENS
from .weights import nvfp4_bytes, nvfp4_weight, plain_weight, true_product

OP = "nvfp4_linear"
DEFAULT = ("nano-in_proj", "nano-expert_up", "nano-expert_down")


@lru_cache(1)  # the providers of a group come one after the other and share the problem
def problem(gemm: str, tokens: int):
    n, k = GEMMS[gemm]
    w = nvfp4_weight(n, k)
    x = torch.randn(tokens, k, device=DEVICE, dtype=torch.bfloat16)
    return x, w, true_product(x, w)


@lru_cache(1)
def baseline_weight(gemm: str, dtype: torch.dtype) -> torch.Tensor:
    return plain_weight(nvfp4_weight(*GEMMS[gemm]), dtype)


@pytest.mark.parametrize("provider", providers(OP, "torch", "torch-fp32"))
@pytest.mark.parametrize("tokens", sizes(TOKENS, quick=[8]))
@pytest.mark.parametrize("gemm", sizes(GEMMS, quick=["nano-expert_up"], full=set(GEMMS) - set(DEFAULT)))
def test_nvfp4_linear(measure, gemm, tokens, provider):
    (n, k), (x, w, truth) = GEMMS[gemm], problem(gemm, tokens)
    if provider.startswith("torch"):
        dtype = torch.float32 if provider == "torch-fp32" else torch.bfloat16
        fn, args = F.linear, [x.to(dtype), baseline_weight(gemm, dtype)]
        weight_bytes = n * k * dtype.itemsize
    else:
        dtype, weight_bytes = x.dtype, nvfp4_bytes(n, k)
        fn, args = torch.ops.n3.nvfp4_linear.default, [x, w.q, w.block_scale, w.global_scale]
    measure(
        OP, provider, fn, args, truth,
        group=f"{OP} {gemm} {n}x{k} M={tokens}", flops=2 * tokens * n * k, dtype=dtype,
        bytes=weight_bytes + dtype.itemsize * tokens * (n + k),
    )  # fmt: skip
