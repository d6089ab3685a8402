"""The fused mixer of prompts against the same three operators one after the other, on the same projections."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch

from n3kernels import _dispatch

from ..conftest import DEVICE, providers, sizes
from ..shapes import MIXERS
from .bench_ssd_scan import DTYPES, NAMES, parameters

OP = "mamba2_prefill"
LENGTHS = (128, 1024, 2048)


@lru_cache(1)
def problem(size: str, length: int, dtype: torch.dtype):
    mixer = MIXERS[size]
    channels = mixer.inner + 2 * mixer.groups * mixer.d_state
    projected = torch.randn(1, length, mixer.projected, device=DEVICE).to(dtype)
    A, D, dt_bias = parameters(mixer)
    weight, bias = (torch.randn(*shape, device=DEVICE).to(dtype) / 2 for shape in ((channels, 4), (channels,)))
    norm = torch.rand(mixer.inner, device=DEVICE).to(dtype)
    conv_state = torch.zeros(1, channels, 3, device=DEVICE, dtype=dtype)
    ssm_state = torch.zeros(1, mixer.heads, mixer.head_dim, mixer.d_state, device=DEVICE)
    where, fresh = torch.zeros(1, dtype=torch.int32, device=DEVICE), torch.zeros(1, dtype=torch.bool, device=DEVICE)
    args = (projected, weight, bias, conv_state, ssm_state, where, A, D, dt_bias, norm, fresh)
    wide = [t.double() if t.is_floating_point() else t for t in args]
    return args, _dispatch.OPS[OP].reference(*wide)


def parts(mixer, projected, weight, bias, conv_state, ssm_state, where, A, D, dt_bias, norm, fresh):
    channels = mixer.inner + 2 * mixer.groups * mixer.d_state
    z, xbc, dt = projected.split([mixer.inner, channels, mixer.heads], -1)
    conv = torch.ops.n3.causal_conv1d.slots
    xbc = conv(xbc, weight, bias, conv_state, where, fresh, activation="silu")
    states = mixer.groups * mixer.d_state
    x, B, C = xbc.split([mixer.inner, states, states], -1)
    B, C = (t.unflatten(-1, (mixer.groups, mixer.d_state)) for t in (B, C))
    x = x.unflatten(-1, (mixer.heads, mixer.head_dim))
    y = torch.ops.n3.ssd_scan.slots(x, dt, A, B, C, D, None, dt_bias, ssm_state, where, fresh)
    return torch.ops.n3.gated_rms_norm.default(y.flatten(-2), z, norm, mixer.inner // mixer.groups)


@pytest.mark.parametrize("provider", providers(OP, "parts"))
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
@pytest.mark.parametrize("length", sizes(LENGTHS, quick=[128]))
@pytest.mark.parametrize("size", sizes(MIXERS, quick=["nano"], full=["super", "ultra"]))
def test_mamba2_prefill(measure, size, length, dtype, provider):
    mixer, (args, truth) = MIXERS[size], problem(size, length, dtype)
    heads, head_dim, groups, d_state = mixer
    token = 65 * (groups * d_state + heads * head_dim) + 4 * heads * head_dim * d_state  # as bench_ssd_scan
    fn, args = (parts, [mixer, *args]) if provider == "parts" else (torch.ops.n3.mamba2_prefill.default, args)
    measure(
        OP, provider, fn, args, truth,
        group=f"{OP} {size} L={length} {dtype}".replace("torch.", ""),
        bytes=length * (mixer.projected + mixer.inner) * dtype.itemsize + 4 * heads * head_dim * d_state,
        flops=length * token, dtype=torch.float32,
        tolerance=1e-5 if dtype == torch.float32 else 1e-2 if provider == "parts" else 4e-3,
    )  # fmt: skip
