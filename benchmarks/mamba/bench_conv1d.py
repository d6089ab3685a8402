"""The causal convolution of the mixer against plain torch, called as transformers calls it."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
import torch.nn.functional as F

from n3kernels.mamba import reference

from ..conftest import DEVICE, providers, sizes
from ..shapes import MIXERS

LENGTHS = (128, 1024, 8192)
BATCHES = (1, 8, 64)
DTYPES = [torch.bfloat16, torch.float32]
WIDTH = 4
NAMES = [str(dtype).removeprefix("torch.") for dtype in DTYPES]


def tolerance(dtype: torch.dtype, provider: str) -> float:
    if dtype == torch.float32:
        return 1e-6
    return 5e-3 if provider == "torch" else 2.5e-3  # torch rounds before the activation too


def taps(size: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    channels = MIXERS[size].conv
    return (torch.randn(channels, WIDTH, device=DEVICE).to(dtype), torch.randn(channels, device=DEVICE).to(dtype))


def wide(*tensors):
    return [t.double() for t in tensors]


# ---------------------------------------------------------------- prompts


@lru_cache(1)
def prompt(size: str, length: int, dtype: torch.dtype):
    """x is the middle of a row of in_proj."""
    mixer = MIXERS[size]
    projected = torch.randn(1, length, mixer.projected, device=DEVICE).to(dtype)
    x, (weight, bias) = projected[..., mixer.inner : mixer.inner + mixer.conv], taps(size, dtype)
    truth = reference.causal_conv1d(*wide(x, weight, bias), activation="silu")[0]
    return x, weight, bias, truth


def n3_conv(x, weight, bias):
    return torch.ops.n3.causal_conv1d.default(x, weight, bias, activation="silu")[0]


def plain_conv(x, weight, bias):
    y = F.conv1d(x.transpose(1, 2), weight[:, None], bias, padding=WIDTH - 1, groups=len(weight))
    return F.silu(y[..., : x.shape[1]].transpose(1, 2))


@pytest.mark.parametrize("provider", providers("causal_conv1d", "torch"))
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
@pytest.mark.parametrize("length", sizes(LENGTHS, quick=[128], full=[8192]))
@pytest.mark.parametrize("size", sizes(MIXERS, quick=["nano"], full=["super", "ultra"]))
def test_causal_conv1d(measure, size, length, dtype, provider):
    x, weight, bias, truth = prompt(size, length, dtype)
    measure(
        "causal_conv1d", provider, plain_conv if provider == "torch" else n3_conv, [x, weight, bias], truth,
        group=f"causal_conv1d {size} L={length} {dtype}".replace("torch.", ""),
        bytes=2 * x.numel() * x.element_size(), flops=2 * WIDTH * x.numel(), dtype=torch.float32,
        tolerance=tolerance(dtype, provider),
    )  # fmt: skip


# ---------------------------------------------------------------- gradients


def n3_gradients(grad_y, x, weight, bias):
    return torch.ops.n3.causal_conv1d_bwd.default(grad_y, None, x, weight, bias, None, None, "silu")


def plain_gradients(grad_y, x, weight, bias):
    """The forward pass is computed again, as n3 does."""
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
        return torch.autograd.grad(plain_conv(*leaves), leaves, grad_y)


@pytest.mark.parametrize("provider", providers("causal_conv1d_bwd", "torch"))
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
@pytest.mark.parametrize("length", sizes((128, 1024), quick=[128]))
def test_causal_conv1d_bwd(measure, length, dtype, provider):
    x, weight, bias, _ = prompt("nano", length, dtype)
    grad_y = torch.randn_like(x)
    truth = plain_gradients(*wide(grad_y, x, weight, bias))[0]
    measure(
        "causal_conv1d_bwd", provider, plain_gradients if provider == "torch" else n3_gradients,
        [grad_y, x, weight, bias], truth, value=lambda grads: grads[0],
        group=f"causal_conv1d_bwd nano L={length} {dtype}".replace("torch.", ""),
        bytes=3 * x.numel() * x.element_size(), flops=6 * WIDTH * x.numel(), dtype=torch.float32,
        tolerance=1e-6 if dtype == torch.float32 else 1e-2,  # torch rounds before the activation too
    )  # fmt: skip


# ---------------------------------------------------------------- running sequences


@lru_cache(1)
def sequences(size: str, batch: int, dtype: torch.dtype):
    weight, bias = taps(size, dtype)
    x = torch.randn(batch, 1, len(weight), device=DEVICE).to(dtype)
    state = torch.randn(batch, len(weight), WIDTH - 1, device=DEVICE).to(dtype)
    truth = reference.causal_conv1d(*wide(x, weight, bias, state), activation="silu")[0]
    return x, state, weight, bias, truth


def n3_update(x, state, weight, bias):
    return torch.ops.n3.causal_conv1d_update.default(x, state, weight, bias, activation="silu")


def plain_update(x, state, weight, bias):
    window = torch.cat([state, x.transpose(1, 2)], -1)
    state.copy_(window[..., 1:])
    return F.silu((window * weight).sum(-1) + bias)[:, None]


@pytest.mark.parametrize("provider", providers("causal_conv1d_update", "torch"))
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
@pytest.mark.parametrize("batch", sizes(BATCHES, quick=[1]))
@pytest.mark.parametrize("size", sizes(MIXERS, quick=["nano"], full=["super", "ultra"]))
def test_causal_conv1d_update(measure, size, batch, dtype, provider):
    x, state, weight, bias, truth = sequences(size, batch, dtype)
    measure(
        "causal_conv1d_update", provider, plain_update if provider == "torch" else n3_update,
        [x, state.clone(), weight, bias], truth,
        group=f"causal_conv1d_update {size} B={batch} {dtype}".replace("torch.", ""),
        bytes=2 * (x.numel() + state.numel()) * x.element_size(), flops=2 * WIDTH * x.numel(), dtype=torch.float32,
        tolerance=1e-6 if dtype == torch.float32 else 1e-2 if provider == "torch" else 2.5e-3,
    )  # fmt: skip
