"""The decoding step of the whole mixer, fused and as the sequence of its parts."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch

from n3kernels.mamba import reference_mixer

from ..conftest import DEVICE, providers, sizes
from ..shapes import MIXERS

OP = "mamba2_decode"
BATCHES = (1, 8, 64)
TAPS = 4


@lru_cache(1)
def problem(size: str, batch: int, tokens: int, dtype: torch.dtype):
    m = MIXERS[size]
    args = [
        torch.randn(batch, tokens, m.projected, device=DEVICE).to(torch.bfloat16),
        torch.randn(m.conv, TAPS, device=DEVICE) / 2,
        torch.randn(m.conv, device=DEVICE),
        torch.randn(batch, m.conv, TAPS - 1, device=DEVICE).to(torch.bfloat16),
        torch.randn(batch, m.heads, m.head_dim, m.d_state, device=DEVICE).to(dtype),
        -torch.rand(m.heads, device=DEVICE) - 0.1,
        torch.randn(m.heads, device=DEVICE),
        torch.randn(m.heads, device=DEVICE) - 3,
        torch.randn(m.inner, device=DEVICE),
    ]
    return args, reference_mixer.mamba2_decode(*(t.double() for t in args))


def parts(zxbcdt, conv_weight, conv_bias, conv_state, ssm_state, A, D, dt_bias, norm_weight):
    heads, head_dim, d_state = ssm_state.shape[1:]
    inner, op = heads * head_dim, torch.ops.n3
    z, xbc, dt = zxbcdt.split([inner, len(conv_weight), heads], -1)
    xbc = op.causal_conv1d_update.default(xbc, conv_state, conv_weight, conv_bias, activation="silu")
    width = (len(conv_weight) - inner) // 2
    x, B, C = xbc.split([inner, width, width], -1)
    x, B, C = x.unflatten(-1, (heads, head_dim)), B.unflatten(-1, (-1, d_state)), C.unflatten(-1, (-1, d_state))
    y = op.ssm_update.default(ssm_state, x, dt, A, B, C, D, None, dt_bias).flatten(-2)
    return op.gated_rms_norm.default(y, z, norm_weight, inner // B.shape[-2])


@pytest.mark.parametrize("provider", providers(OP, "parts"))
@pytest.mark.parametrize("tokens", sizes((1, 4), quick=[1]))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("batch", sizes(BATCHES, quick=[1], full=[64]))
@pytest.mark.parametrize("size", sizes(MIXERS, quick=["nano"], full=["super", "ultra"]))
def test_mamba2_decode(measure, size, batch, dtype, tokens, provider):
    args, truth = problem(size, batch, tokens, dtype)
    args = [t.clone() for t in args]  # which are written
    zxbcdt, conv_state, state = args[0], args[3], args[4]
    in_place = state.numel() * state.element_size() + conv_state.numel() * conv_state.element_size()
    measure(
        OP, provider, parts if provider == "parts" else torch.ops.n3.mamba2_decode.default, args, truth,
        group=f"{OP} {size} batch {batch} T{tokens}, state {dtype}".replace("torch.", ""),
        bytes=2 * in_place + 2 * zxbcdt.numel() + 2 * batch * tokens * MIXERS[size].inner,
        flops=5 * tokens * state.numel(), dtype=torch.float32, tolerance=1e-2 if provider == "parts" else 3e-3,
    )  # fmt: skip
