"""Dequantisation of whole matrices. The baseline is the reference: torch has no such operator."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch

from ..conftest import providers, sizes
from ..shapes import GEMMS
from .weights import nvfp4_bytes, nvfp4_weight, plain_weight

OP = "nvfp4_dequantize"


@lru_cache(1)
def problem(gemm: str, dtype: torch.dtype):
    w = nvfp4_weight(*GEMMS[gemm])
    return w, plain_weight(w, dtype)


@pytest.mark.parametrize("provider", providers(OP))
@pytest.mark.parametrize("dtype", sizes([torch.bfloat16, torch.float32], quick=[torch.bfloat16]), ids=str)
@pytest.mark.parametrize("gemm", sizes(["nano-expert_up", "nano-in_proj"], quick=["nano-expert_up"]))
def test_nvfp4_dequantize(measure, gemm, dtype, provider):
    (n, k), (w, truth) = GEMMS[gemm], problem(gemm, dtype)
    measure(
        OP, provider, lambda *a: torch.ops.n3.nvfp4_dequantize.default(*a, dtype=dtype),
        [w.q, w.block_scale, w.global_scale], truth, tolerance=0.0,
        group=f"{OP} {gemm} {n}x{k} {str(dtype).removeprefix('torch.')}",
        bytes=nvfp4_bytes(n, k) + n * k * dtype.itemsize, dtype=dtype,
    )  # fmt: skip
