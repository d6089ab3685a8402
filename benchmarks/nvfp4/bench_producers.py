"""Quantisers fused with what makes their input, beside torch's operators followed by our quantiser."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch

import n3kernels
from n3kernels.nvfp4 import quantize

from ..conftest import DEVICE, providers, sizes
from .bench_quantize import value

ROWS = (1, 32, 256, 2048)


def relu2(x):
    return torch.ops.n3.relu2_nvfp4_quantize.default(x)


def relu2_unfused(x):
    return quantize(x.relu().square())


def silu_mul(x):
    return torch.ops.n3.silu_mul_nvfp4_quantize.default(x)


def silu_mul_unfused(x):
    a, b = x.chunk(2, -1)
    return quantize(torch.nn.functional.silu(a) * b)


def rms_norm(x, weight, residual):
    return torch.ops.n3.rms_norm_nvfp4_quantize.default(x, weight, residual)


def rms_norm_unfused(x, weight, residual):
    h = (x + residual).float()
    return quantize(torch.nn.functional.rms_norm(h, h.shape[-1:], weight, 1e-5).bfloat16())


# name: fused, unfused, width of x, elements read and written of 16 bits for every element of y
PRODUCERS = {
    "relu2": (relu2, relu2_unfused, 3712, 1),
    "silu_mul": (silu_mul, silu_mul_unfused, 2 * 3712, 2),
    "rms_norm": (rms_norm, rms_norm_unfused, 2688, 3),
}


@lru_cache(1)
def problem(name: str, rows: int):
    fused, _, width, _ = PRODUCERS[name]
    args = [torch.randn(rows, width, device=DEVICE).bfloat16()]
    if name == "rms_norm":
        args += [torch.rand(width, device=DEVICE), torch.randn_like(args[0])]
    with n3kernels.use_backend("reference"):
        return args, value(fused(*args))


@pytest.mark.parametrize("provider", [*providers("relu2_nvfp4_quantize"), "unfused"])
@pytest.mark.parametrize("name", PRODUCERS)
@pytest.mark.parametrize("rows", sizes(ROWS, quick=[32]))
def test_nvfp4_producers(measure, rows, name, provider):
    args, truth = problem(name, rows)
    fused, unfused, _, words = PRODUCERS[name]
    # torch rounds silu before the product and the sum before the norm: a code beside the right one here and there
    tolerance = 0.05 if provider == "unfused" else 1e-3 if name == "silu_mul" else 0.0
    measure(
        f"{name}_nvfp4_quantize", provider, unfused if provider == "unfused" else fused, args, truth,
        value=value, tolerance=tolerance, group=f"{name}_nvfp4_quantize {rows}x{truth.shape[-1]}",
        bytes=2 * words * truth.numel() + truth.numel() * 9 // 16, dtype=torch.float32,
    )  # fmt: skip
