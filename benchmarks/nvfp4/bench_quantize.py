"""Quantisation of activations to NVFP4. The baseline is the reference: torch has no such operator."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch

import n3kernels
from n3kernels.nvfp4 import reference

from ..conftest import DEVICE, providers, sizes

OP = "nvfp4_quantize"
ROWS, COLS = (1, 32, 256, 2048), 2688
OPTIONS = {
    "plain": {},
    "four_over_six": {"four_over_six": True},
    "per_row": {"per_row": True},
    "128x4": {"scale_layout": "128x4"},
}
# of training: weights, gradients, the column-wise copies
TRAINING = {
    "16x16": {"block": "16x16"},
    "stochastic": {"rounding": "stochastic", "seed": torch.tensor([1, 2])},
    "hadamard": {"hadamard": torch.ones(16)},
    "transposed": {},
    "transposed hadamard": {"hadamard": torch.ones(16)},
    "transposed 16x16": {"block": "16x16"},
}


@lru_cache(1)
def problem(rows: int, name: str):
    x = torch.randn(rows, COLS, device=DEVICE, dtype=torch.bfloat16)
    options = {**OPTIONS, **TRAINING}[name]
    options = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    quantize = torch.ops.n3.nvfp4_quantize.default
    with n3kernels.use_backend("reference"):
        truth = value(quantize(x.mT if name.startswith("transposed") else x, **options))
    if name.startswith("transposed"):
        return x, lambda x: quantize(x.mT, **options), truth
    return x, lambda x: quantize(x, **options), truth


def value(parts):
    q, block_scale, global_scale = parts[:3]
    layout = "linear" if block_scale.numel() == q.numel() // 8 else "128x4"
    return reference.nvfp4_dequantize(q, block_scale, global_scale, dtype=torch.float32, scale_layout=layout)


def run(measure, rows, name, provider):
    x, fn, truth = problem(rows, name)
    measure(
        OP, provider, fn, [x], truth, value=value, tolerance=0.0,
        group=f"{OP} {rows}x{COLS}{'' if name == 'plain' else ' ' + name}",
        bytes=2 * x.numel() + x.numel() * 9 // 16, dtype=torch.float32,
    )  # fmt: skip


@pytest.mark.parametrize("provider", providers(OP))
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("rows", sizes(ROWS, quick=[32]))
def test_nvfp4_quantize(measure, rows, name, provider):
    run(measure, rows, name, provider)


@pytest.mark.parametrize("provider", providers(OP))
@pytest.mark.parametrize("name", TRAINING)
@pytest.mark.parametrize("rows", sizes((32, 2048), quick=[32]))
def test_nvfp4_quantize_for_training(measure, rows, name, provider):
    run(measure, rows, name, provider)
