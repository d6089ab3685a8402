"""a @ b^T of NVFP4 matrices against plain torch on the same values in bfloat16; quantised, and W4A8, beside it."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
import torch.nn.functional as F

from n3kernels.nvfp4 import NVFP4Tensor, reference, reference_fp8

from ..conftest import DEVICE, providers, sizes
from ..shapes import GEMMS, TOKENS
from .weights import nvfp4_bytes, nvfp4_weight

OP, QUANTIZED, GROUPED, FP8 = "nvfp4_gemm", "nvfp4_gemm.quantized", "nvfp4_grouped_gemm", "nvfp4_linear_fp8"
DEFAULT = ("nano-expert_up", "nano-expert_down", "nano-in_proj")
GEMM_SIZES = sizes(GEMMS, quick=["nano-expert_up"], full=set(GEMMS) - set(DEFAULT))
GROUPS = 8  # experts of a layer that some tokens chose


def matrix(n: int, k: int) -> NVFP4Tensor:
    """With a power of two for its global scale, so that the values are exact in bfloat16."""
    return nvfp4_weight(n, k)._replace(global_scale=torch.tensor(2.0**-15, device=DEVICE))


def parts(t: NVFP4Tensor) -> tuple[torch.Tensor, ...]:
    return t.q, t.block_scale, t.global_scale


def values(t: NVFP4Tensor, dtype: torch.dtype) -> torch.Tensor:
    return (reference.decode(t.q, t.block_scale) * t.global_scale).to(dtype)


@lru_cache(1)  # the providers of a group come one after the other and share the problem
def problem(gemm: str, tokens: int):
    n, k = GEMMS[gemm]
    a, b = matrix(tokens, k), matrix(n, k)
    return a, b, values(a, torch.float64) @ values(b, torch.float64).t()


def product(*args: torch.Tensor) -> torch.Tensor:
    return torch.ops.n3.nvfp4_gemm.default(*args, out_dtype=torch.bfloat16)


def grouped_product(*args: torch.Tensor) -> torch.Tensor:
    return torch.ops.n3.nvfp4_grouped_gemm.default(*args, out_dtype=torch.bfloat16)


@pytest.mark.parametrize("provider", providers(OP, "torch"))
@pytest.mark.parametrize("tokens", sizes(TOKENS, quick=[8]))
@pytest.mark.parametrize("gemm", GEMM_SIZES)
def test_nvfp4_gemm(measure, gemm, tokens, provider):
    (n, k), (a, b, truth) = GEMMS[gemm], problem(gemm, tokens)
    fn, args, moved = product, (*parts(a), *parts(b)), nvfp4_bytes(n, k) + nvfp4_bytes(tokens, k)
    if provider == "torch":
        fn, args = F.linear, [values(a, torch.bfloat16), values(b, torch.bfloat16)]
        moved = 2 * (n + tokens) * k
    measure(
        OP, provider, fn, args, truth,
        group=f"{OP} {gemm} {n}x{k} M={tokens}", flops=2 * tokens * n * k, bytes=moved + 2 * tokens * n,
    )  # fmt: skip


@lru_cache(1)
def quantized_problem(gemm: str, tokens: int):
    a, b, y = problem(gemm, tokens)
    y = y.relu().square()
    return a, b, (y.amax() / 2688).float(), y


def quantized(*args: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.ops.n3.nvfp4_gemm.quantized(*args, None, "relu2")


def unfused(*args: torch.Tensor) -> tuple[torch.Tensor, ...]:
    *operands, scale = args
    return torch.ops.n3.relu2_nvfp4_quantize.default(product(*operands), scale)


@pytest.mark.parametrize("provider", providers(QUANTIZED, "unfused"))
@pytest.mark.parametrize("tokens", sizes(TOKENS, quick=[8]))
@pytest.mark.parametrize("gemm", sizes(("nano-expert_up", "nano-in_proj"), quick=["nano-expert_up"]))
def test_nvfp4_gemm_quantized(measure, gemm, tokens, provider):
    """With relu2; the baseline is our product in bfloat16 and the quantiser behind it."""
    (n, k), (a, b, scale, truth) = GEMMS[gemm], quantized_problem(gemm, tokens)
    measure(
        QUANTIZED, provider, unfused if provider == "unfused" else quantized, (*parts(a), *parts(b), scale), truth,
        value=lambda out: reference.nvfp4_dequantize(*out[:2], scale, dtype=torch.float32), tolerance=0.2,
        group=f"{QUANTIZED} {gemm} {n}x{k} M={tokens}", flops=2 * tokens * n * k,
        bytes=nvfp4_bytes(n, k) + nvfp4_bytes(tokens, k) + nvfp4_bytes(tokens, n),
    )  # fmt: skip


@lru_cache(1)
def groups(gemm: str, tokens: int):
    """So many rows for each expert."""
    n, k = GEMMS[gemm]
    a, stack = matrix(GROUPS * tokens, k), NVFP4Tensor.stack([matrix(n, k)] * GROUPS)
    offsets = torch.arange(GROUPS + 1, dtype=torch.int32, device=DEVICE) * tokens
    rows = values(a, torch.float64).view(GROUPS, tokens, k)
    truth = rows @ values(matrix(n, k), torch.float64).t()
    return a, stack, offsets, truth.flatten(0, 1)


@pytest.mark.parametrize("provider", providers(GROUPED, "torch"))
@pytest.mark.parametrize("tokens", sizes((1, 8, 32), quick=[1]))
@pytest.mark.parametrize("gemm", sizes(("nano-expert_up", "nano-expert_down"), quick=[]))
def test_nvfp4_grouped_gemm(measure, gemm, tokens, provider):
    (n, k), (a, b, offsets, truth) = GEMMS[gemm], groups(gemm, tokens)
    rows = GROUPS * tokens
    fn, args = grouped_product, (*parts(a), *parts(b), offsets)
    moved = GROUPS * nvfp4_bytes(n, k) + nvfp4_bytes(rows, k)
    if provider == "torch":
        dense = values(b._replace(global_scale=b.global_scale.view(-1, 1, 1)), torch.bfloat16)
        fn, args = torch.bmm, [values(a, torch.bfloat16).view(GROUPS, tokens, k), dense.mT]
        moved = 2 * (GROUPS * n + rows) * k
    measure(
        GROUPED, provider, fn, args, truth, value=lambda y: y.view(rows, n),
        group=f"{GROUPED} {gemm} {GROUPS}x{n}x{k} M={GROUPS}x{tokens}", flops=2 * rows * n * k,
        bytes=moved + 2 * rows * n,
    )  # fmt: skip


@lru_cache(1)
def fp8_problem(gemm: str, tokens: int):
    n, k = GEMMS[gemm]
    x, w = torch.randn(tokens, k, device=DEVICE, dtype=torch.bfloat16), matrix(n, k)
    return x, w, reference_fp8.nvfp4_linear_fp8(x.double(), *parts(w))


@pytest.mark.parametrize("provider", providers(FP8, "torch"))
@pytest.mark.parametrize("tokens", sizes((8, 256, 2048), quick=[8]))
@pytest.mark.parametrize("gemm", GEMM_SIZES)
def test_nvfp4_linear_fp8(measure, gemm, tokens, provider):
    (n, k), (x, w, truth) = GEMMS[gemm], fp8_problem(gemm, tokens)
    fn, args, moved = torch.ops.n3.nvfp4_linear_fp8.default, (x, *parts(w)), nvfp4_bytes(n, k)
    if provider == "torch":
        fn, args, moved = F.linear, [x, values(w, torch.bfloat16)], 2 * n * k
    measure(
        FP8, provider, fn, args, truth,
        group=f"{FP8} {gemm} {n}x{k} M={tokens}", flops=2 * tokens * n * k, bytes=moved + 2 * tokens * (n + k),
        tolerance=0.05 if provider == "torch" else 2.5e-3,  # whose activations and weights are not rounded
    )  # fmt: skip
