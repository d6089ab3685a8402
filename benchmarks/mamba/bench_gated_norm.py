"""The gated norm of the mixer against the same expression in plain torch."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
import torch.nn.functional as F

from n3kernels.mamba import reference

from ..conftest import DEVICE, providers, sizes
from ..shapes import MIXERS

ROWS = (1, 32, 1024)
DTYPES = [torch.bfloat16, torch.float32]
NAMES = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
EPS = 1e-5


@lru_cache(1)
def problem(size: str, rows: int, dtype: torch.dtype):
    """z is the head of a row of in_proj."""
    mixer = MIXERS[size]
    x = torch.randn(rows, mixer.inner, device=DEVICE).to(dtype)
    z = torch.randn(rows, mixer.projected, device=DEVICE).to(dtype)[:, : mixer.inner]
    weight = torch.randn(mixer.inner, device=DEVICE).to(dtype)
    return x, z, weight, mixer.inner // mixer.groups


def plain_norm(x, z, weight, group):
    h = x.float() * F.silu(z.float())
    h = h.unflatten(-1, (-1, group))
    h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + EPS)
    return (h.flatten(-2) * weight.float()).to(x.dtype)


def n3_gradients(grad_y, x, z, weight, group):
    return torch.ops.n3.gated_rms_norm_bwd.default(grad_y, x, z, weight, group, EPS, False)


def plain_gradients(grad_y, x, z, weight, group):
    """The forward pass is computed again, as n3 does."""
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in (x, z, weight)]
        return torch.autograd.grad(plain_norm(*leaves, group), leaves, grad_y)


@pytest.mark.parametrize("provider", providers("gated_rms_norm", "torch"))
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
@pytest.mark.parametrize("rows", sizes(ROWS, quick=[32]))
@pytest.mark.parametrize("size", sizes(MIXERS, quick=["nano"], full=["super", "ultra"]))
def test_gated_rms_norm(measure, size, rows, dtype, provider):
    x, z, weight, group = problem(size, rows, dtype)
    truth = reference.gated_rms_norm(x.double(), z.double(), weight.double(), group, EPS)
    measure(
        "gated_rms_norm", provider, plain_norm if provider == "torch" else torch.ops.n3.gated_rms_norm.default,
        [x, z, weight, group], truth,
        group=f"gated_rms_norm {size} {rows} rows {dtype}".replace("torch.", ""),
        bytes=3 * x.numel() * x.element_size(), flops=8 * x.numel(), dtype=torch.float32,
        tolerance=1e-6 if dtype == torch.float32 else 2.5e-3,
    )  # fmt: skip


@pytest.mark.parametrize("provider", providers("gated_rms_norm_bwd", "torch"))
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
@pytest.mark.parametrize("rows", sizes((32, 1024), quick=[32]))
def test_gated_rms_norm_bwd(measure, rows, dtype, provider):
    x, z, weight, group = problem("nano", rows, dtype)
    grad_y = torch.randn_like(x)
    with torch.enable_grad():
        leaves = [t.double().requires_grad_() for t in (x, z, weight)]
        y = reference.gated_rms_norm(*leaves, group, EPS)
        truth = torch.autograd.grad(y, leaves, grad_y.double())[0]
    measure(
        "gated_rms_norm_bwd", provider, plain_gradients if provider == "torch" else n3_gradients,
        [grad_y, x, z, weight, group], truth, value=lambda grads: grads[0],
        group=f"gated_rms_norm_bwd nano {rows} rows {dtype}".replace("torch.", ""),
        bytes=5 * x.numel() * x.element_size(), flops=20 * x.numel(), dtype=torch.float32,
        tolerance=1e-6 if dtype == torch.float32 else 5e-3,
    )  # fmt: skip
