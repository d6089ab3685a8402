"""Quantisation of activations to NVFP4. The baseline is the reference: torch has no such operator."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch

import n3kernels
from n3kernels.nvfp4 import quantize, reference

from ..conftest import DEVICE, providers, sizes

OP = "nvfp4_quantize"
ROWS, COLS = (1, 32, 256, 2048), 2688


@lru_cache(1)
def problem(rows: int, options: tuple):
    x = torch.randn(rows, COLS, device=DEVICE, dtype=torch.bfloat16)
    with n3kernels.use_backend("reference"):
        return x, _value(*quantize(x, **dict(options))[:3])


def _value(q, block_scale, global_scale):
    return reference.nvfp4_dequantize(q, block_scale, global_scale, dtype=torch.float32)


@pytest.mark.parametrize("provider", providers(OP))
@pytest.mark.parametrize("options", [(), (("four_over_six", True),)], ids=["plain", "four_over_six"])
@pytest.mark.parametrize("rows", sizes(ROWS, quick=[32]))
def test_nvfp4_quantize(measure, rows, options, provider):
    x, truth = problem(rows, options)
    measure(
        OP, provider, lambda x: torch.ops.n3.nvfp4_quantize.default(x, **dict(options)), [x], truth,
        value=lambda out: _value(*out), tolerance=0.0,
        group=f"{OP} {rows}x{COLS}{' four_over_six' if options else ''}",
        bytes=2 * x.numel() + x.numel() * 9 // 16, dtype=torch.float32,
    )  # fmt: skip
