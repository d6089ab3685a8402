"""The scan of the Mamba-2 mixer against the torch path of transformers' Nemotron 3, on the same projections."""

from __future__ import annotations

import importlib.util
from functools import lru_cache

import pytest
import torch

from n3kernels.mamba import reference

from ..conftest import DEVICE, providers, sizes
from ..shapes import MIXERS, Mixer

LENGTHS = (128, 1024, 2048, 8192)
DTYPES = [torch.bfloat16, torch.float32]
NAMES = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
CHUNK = 128  # of the models' config
BASELINES = ["transformers"] if importlib.util.find_spec("transformers") else []


def operands(mixer: Mixer, projected: torch.Tensor):
    """x, dt, B and C as columns of z, x, B, C, dt side by side."""
    states = mixer.groups * mixer.d_state
    _, x, B, C, dt = projected.split([mixer.inner, mixer.inner, states, states, mixer.heads], -1)
    B, C = (t.unflatten(-1, (mixer.groups, mixer.d_state)) for t in (B, C))
    return x.unflatten(-1, (mixer.heads, mixer.head_dim)), dt, B, C


def parameters(mixer: Mixer):
    """A, D and dt_bias as the models begin training: A in 1 ... 16, time steps in 0.001 ... 0.1."""
    step = torch.exp(torch.empty(mixer.heads, device=DEVICE).uniform_(-6.9, -2.3))
    A = -torch.empty(mixer.heads, device=DEVICE).uniform_(1, 16)
    return A, torch.ones(mixer.heads, device=DEVICE), step + torch.log(-torch.expm1(-step))


@lru_cache(1)
def problem(size: str, length: int, dtype: torch.dtype):
    mixer = MIXERS[size]
    projected = torch.randn(1, length, mixer.projected, device=DEVICE).to(dtype)
    A, D, dt_bias = parameters(mixer)
    x, dt, B, C = operands(mixer, projected)
    wide = (t.double() for t in (x, dt, A, B, C, D))
    return projected, A, D, dt_bias, reference.ssd_scan(*wide, dt_bias=dt_bias.double(), chunk_size=64)[0]


def n3_scan(mixer: Mixer, projected, A, D, dt_bias):
    x, dt, B, C = operands(mixer, projected)
    return torch.ops.n3.ssd_scan.default(x, dt, A, B, C, D, None, dt_bias)[0]


def transformers_scan(mixer: Mixer, projected, A, D, dt_bias):
    from transformers.models.nemotron_h.modeling_nemotron_h import mamba2_chunk_scan

    x, dt, B, C = operands(mixer, projected)
    options = {"D": D, "dt_bias": dt_bias, "dt_softplus": True, "return_final_states": True}
    return mamba2_chunk_scan(x, dt, A, B, C, CHUNK, **options)[0]


@pytest.mark.parametrize("provider", providers("ssd_scan", *BASELINES))
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
@pytest.mark.parametrize("length", sizes(LENGTHS, quick=[128], full=[8192]))
@pytest.mark.parametrize("size", sizes(MIXERS, quick=["nano"], full=["super", "ultra"]))
def test_ssd_scan(measure, size, length, dtype, provider):
    mixer, (*args, truth) = MIXERS[size], problem(size, length, dtype)
    heads, head_dim, groups, d_state = mixer
    # What chunks of 64 tokens need: C B^T of a group, and of a head M x, C H^T and the sum of x B^T.
    token = 65 * (groups * d_state + heads * head_dim) + 4 * heads * head_dim * d_state
    state = 4 * heads * head_dim * d_state
    measure(
        "ssd_scan", provider, transformers_scan if provider == "transformers" else n3_scan, [mixer, *args], truth,
        group=f"ssd_scan {size} L={length} {dtype}".replace("torch.", ""),
        bytes=length * (2 * mixer.inner + 2 * groups * d_state + heads) * dtype.itemsize + state,
        flops=length * token, dtype=torch.float32,
        tolerance=1e-5 if dtype == torch.float32 else 1e-2 if provider == "transformers" else 4e-3,
    )  # fmt: skip
