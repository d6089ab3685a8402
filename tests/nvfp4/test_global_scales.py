"""Global scales that are given to the quantiser: every float32 has one meaning, on every backend."""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICE, assert_same_bits

from n3kernels.nvfp4 import quantize, reference_quantize

OPS = ("nvfp4_quantize",)
FLT_MAX = torch.finfo(torch.float32).max
# Given -> S_enc. The least magnitudes have an infinite inverse, the largest one of 2^-128, a subnormal.
S_ENC = [
    (0.0, 1.0), (-0.0, 1.0), (float("inf"), 1.0), (float("-inf"), 1.0), (float("nan"), FLT_MAX), (1e-45, FLT_MAX),
    (-1e-45, -FLT_MAX), (1e-40, FLT_MAX), (-1e-40, -FLT_MAX), (2.0**-127, 2.0**127), (-(2.0**-127), -(2.0**127)),
    (0.25, 4.0), (-0.25, -4.0), (2.0**127, 2.0**-127), (-(2.0**127), -(2.0**-127)),
]  # fmt: skip


def rows() -> torch.Tensor:
    """Blocks of zeros, of ordinary and of extreme numbers."""
    x = torch.randn(5, 48)
    x[:, :16] = 0.0
    x[1, 16:32], x[2, 16:32], x[3, 20:30], x[4, 32:] = 1e-38, 3e38, 0.0, -1e-42
    return x.to(DEVICE)


@pytest.mark.parametrize("given", [given for given, _ in S_ENC])
@pytest.mark.parametrize("four_over_six", [False, True])
@pytest.mark.parametrize("block", ["row", "tensor"])
def test_every_backend_has_the_definition(backend, given, four_over_six, block):
    x, options = rows(), {"four_over_six": four_over_six, "per_row": block == "row"}
    scale = torch.full((5,) if block == "row" else (), given, device=DEVICE)
    t = quantize(x, scale, **options)
    for got, want in zip(t[:3], reference_quantize.nvfp4_quantize(x, scale, **options), strict=True):
        assert_same_bits(got, want)


@pytest.mark.parametrize("given, s_enc", S_ENC)
def test_the_block_scales_are_those_of_s_enc(backend, given, s_enc):
    """e4m3(block_amax * (S_enc / 6)), by hand; the sign of S_enc is that of the scale, of a zero scale too."""
    x = rows()
    t = quantize(x, torch.tensor(given, device=DEVICE))
    sixth = torch.tensor(s_enc) * (torch.ones(()) / 6)
    exact = x.cpu().unflatten(1, (3, 16)).abs().amax(2) * sixth
    assert_same_bits(t.block_scale.cpu(), exact.clamp(-448, 448).to(torch.float8_e4m3fn))
    assert_same_bits(t.global_scale.cpu(), torch.tensor(given))  # returned as it is
    assert not t.q[:, :8].bitwise_and(0x77).any()  # zeros stay zeros
