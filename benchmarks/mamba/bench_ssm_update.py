"""One decoding step of the state: float32 and smaller states, drafts; beside it the PyTorch path of transformers."""

from __future__ import annotations

import importlib.util
from functools import lru_cache

import pytest
import torch

from n3kernels.mamba import reference_decode

from ..conftest import DEVICE, providers, sizes
from ..shapes import MIXERS

OP = "ssm_update"
BATCHES = (1, 8, 64)
# dtype of the state, rounding, tokens of each sequence
STORED = {
    "float32": (torch.float32, "nearest", 1),
    "float32 T4": (torch.float32, "nearest", 4),
    "float16": (torch.float16, "nearest", 1),
    "float16 stochastic": (torch.float16, "stochastic", 1),
    "bfloat16": (torch.bfloat16, "nearest", 1),
    "int8": (torch.int8, "nearest", 1),
    "int8 stochastic": (torch.int8, "stochastic", 1),
    "float8_e4m3fn": (torch.float8_e4m3fn, "nearest", 1),
}
BASELINES = ["transformers"] if importlib.util.find_spec("transformers") else []


@lru_cache(1)
def problem(size: str, batch: int, dtype: torch.dtype, tokens: int):
    """x, B, C and dt are columns of one matrix, as the projection leaves them."""
    heads, head_dim, groups, d_state = MIXERS[size]
    widths = [heads * head_dim, groups * d_state, groups * d_state, heads]
    columns = torch.randn(batch, tokens, sum(widths), device=DEVICE).to(torch.bfloat16)
    x, B, C, dt = columns.split(widths, -1)
    x, B, C = (t.unflatten(-1, (-1, n)) for t, n in ((x, head_dim), (B, d_state), (C, d_state)))
    x, B, C, dt = (t[:, 0] if tokens == 1 else t for t in (x, B, C, dt))
    A, D, dt_bias = -torch.rand(heads, device=DEVICE) - 0.1, torch.randn(heads), torch.randn(heads) - 3
    state, scale = torch.randn(batch, heads, head_dim, d_state, device=DEVICE), None
    if dtype in (torch.int8, torch.float8_e4m3fn):
        state, scale = state * 20, torch.full((batch, heads, head_dim), 0.05, device=DEVICE)
    args = [state.to(dtype), x, dt, A, B, C, D.to(DEVICE), dt_bias.to(DEVICE), scale]
    wide = [None if t is None else t.double() for t in args]
    if scale is not None:
        wide[0], wide[8] = wide[0] * wide[8][..., None], None
    return args, n3_update(*wide, rounding="nearest", op=reference_decode.ssm_update)


def n3_update(
    state, x, dt, A, B, C, D, dt_bias, scale, *, rounding: str, seed=None, op=torch.ops.n3.ssm_update.default
):  # fmt: skip
    return op(state, x, dt, A, B, C, D, None, dt_bias, state_scale=scale, rounding=rounding, seed=seed)


def transformers_update(state, x, dt, A, B, C, D, dt_bias, scale):
    """What NemotronHMamba2Mixer does with one token and a cache, where no kernel is installed."""
    from transformers.models.nemotron_h.modeling_nemotron_h import mamba2_selective_state_update as update

    head_dim, d_state = state.shape[2:]
    dt, dt_bias, D = (t[..., None].expand(*t.shape, head_dim) for t in (dt, dt_bias, D))
    A = A[:, None, None].expand(-1, head_dim, d_state)
    return update(state, x, dt, A, B, C, D, z=None, dt_bias=dt_bias, dt_softplus=True)


@pytest.mark.parametrize("provider", providers(OP, *BASELINES))
@pytest.mark.parametrize("stored", sizes(STORED, quick=["float32", "int8 stochastic"]))
@pytest.mark.parametrize("batch", sizes(BATCHES, quick=[1], full=[64]))
@pytest.mark.parametrize("size", sizes(MIXERS, quick=["nano"], full=["super", "ultra"]))
def test_ssm_update(measure, size, batch, stored, provider):
    dtype, rounding, tokens = STORED[stored]
    if provider == "transformers" and stored != "float32":
        pytest.skip("transformers keeps one float32 or 16-bit state, rounded to nearest, and takes one token")
    args, truth = problem(size, batch, dtype, tokens)
    args = [None if t is None else t.clone() for t in args]  # which are written
    seed = torch.tensor([1, 2], device=DEVICE)

    def ours(*args):
        return n3_update(*args, rounding=rounding, seed=seed)

    state = args[0]
    measure(
        OP, provider, transformers_update if provider == "transformers" else ours, args, truth,
        group=f"{OP} {size} batch {batch} {stored}",
        bytes=2 * state.numel() * state.element_size() + 3 * sum(t.numel() for t in args[1:6]),
        flops=5 * tokens * state.numel(), dtype=torch.float32,
        tolerance=2e-2 if provider == "transformers" else 2.5e-3,
    )  # fmt: skip
