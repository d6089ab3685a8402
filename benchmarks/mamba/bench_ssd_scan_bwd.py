"""The gradients of the scan against autograd through its definition, which is the reference backend."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch

from ..conftest import providers, sizes
from ..shapes import MIXERS
from .bench_ssd_scan import DTYPES, NAMES, operands, parameters

OP = "ssd_scan_bwd"
LENGTHS = (128, 1024)
OPTIONS = (64, True, 0.0, None)  # chunk_size, dt_softplus, dt_min, dt_max


@lru_cache(1)
def problem(size: str, length: int, dtype: torch.dtype):
    mixer = MIXERS[size]
    projected = torch.randn(1, length, mixer.projected, device=parameters(mixer)[0].device).to(dtype)
    (x, dt, B, C), (A, D, dt_bias) = operands(mixer, projected), parameters(mixer)
    args = (torch.randn_like(x), None, x, dt, A, B, C, D, None, dt_bias, None, None, *OPTIONS)
    wide = [t.double() if isinstance(t, torch.Tensor) else t for t in args]
    return args, torch.ops.n3.ssd_scan_bwd.default(*wide)[0]


@pytest.mark.parametrize("provider", providers(OP))
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
@pytest.mark.parametrize("length", sizes(LENGTHS, quick=[128]))
@pytest.mark.parametrize("size", sizes(MIXERS, quick=["nano"], full=["super", "ultra"]))
def test_ssd_scan_bwd(measure, size, length, dtype, provider):
    mixer, (args, truth) = MIXERS[size], problem(size, length, dtype)
    heads, head_dim, groups, d_state = mixer
    # Chunks of 64 tokens. A head: dy . x, M^T dy; H^T dy, J^T x, J B and two states. A group: C B^T, and R twice.
    token = 2 * 65 * heads * head_dim + 10 * heads * head_dim * d_state + 3 * 65 * groups * d_state
    measure(
        OP, provider, torch.ops.n3.ssd_scan_bwd.default, args, truth,
        group=f"{OP} {size} L={length} {dtype}".replace("torch.", ""), value=lambda grads: grads[0],
        bytes=length * (3 * mixer.inner + 4 * groups * d_state + 2 * heads) * dtype.itemsize,
        flops=length * token, dtype=torch.float32, tolerance=1e-5 if dtype == torch.float32 else 1e-2,
    )  # fmt: skip
