"""The definition of the whole mixer: convolution, scan or update, and gated norm on zxbcdt widened to float32.

Nothing is rounded in between; the convolution's state alone keeps the raw inputs in their own dtype.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from . import reference, reference_decode
from ._slots import check_prefill, check_update, source_slots

__all__ = ["mamba2_decode", "mamba2_prefill"]


def mamba2_prefill(
    zxbcdt: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    conv_state: Tensor,
    ssm_state: Tensor,
    state_indices: Tensor,
    A: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    norm_weight: Tensor | None,
    has_initial: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    checkpoint_tokens: Tensor | None = None,
    checkpoint_indices: Tensor | None = None,
    *,
    group_size: int | None = None,
    eps: float = 1e-5,
    norm_before_gate: bool = False,
    activation: str | None = "silu",
    chunk_size: int = 128,
    dt_softplus: bool = True,
    dt_min: float = 0.0,
    dt_max: float | None = None,
) -> Tensor:
    where = (state_indices, cu_seqlens, checkpoint_tokens, checkpoint_indices)
    check_prefill("mamba2_prefill", "zxbcdt", reference.token_count(zxbcdt, 3), ssm_state, *where)
    z, xbc, dt = _columns(zxbcdt, conv_weight, ssm_state)
    slots = (state_indices, has_initial, cu_seqlens, checkpoint_tokens, checkpoint_indices)
    xbc = reference.causal_conv1d_slots(xbc, conv_weight, conv_bias, conv_state, *slots, activation=activation)
    x, B, C = _heads(xbc, ssm_state)
    options = {"chunk_size": chunk_size, "dt_softplus": dt_softplus, "dt_min": dt_min, "dt_max": dt_max}
    y = reference.ssd_scan_slots(x, dt, A, B, C, D, None, dt_bias, ssm_state, *slots, **options)
    y = _normalise(y, z, norm_weight, B.shape[-2], group_size, eps, norm_before_gate)
    return reference.zero_padding(y, state_indices, cu_seqlens).to(zxbcdt.dtype)


def mamba2_decode(
    zxbcdt: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    conv_state: Tensor,
    ssm_state: Tensor,
    A: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    norm_weight: Tensor | None,
    state_indices: Tensor | None = None,
    dst_state_indices: Tensor | None = None,
    *,
    num_accepted: Tensor | None = None,
    num_tokens: Tensor | None = None,
    parents: Tensor | None = None,
    state_scale: Tensor | None = None,
    seed: Tensor | None = None,
    rounding: str = "nearest",
    group_size: int | None = None,
    eps: float = 1e-5,
    norm_before_gate: bool = False,
    activation: str | None = "silu",
    dt_softplus: bool = True,
    dt_min: float = 0.0,
    dt_max: float | None = None,
) -> Tensor:
    steps = zxbcdt.shape[1] if zxbcdt.dim() == 3 else 1
    check_update("mamba2_decode", steps, ssm_state, state_indices, dst_state_indices, num_accepted, num_tokens, parents)
    z, xbc, dt = _columns(zxbcdt, conv_weight, ssm_state)
    slots, conv = (state_indices, dst_state_indices), (conv_state, conv_weight, conv_bias)
    tokens = {"num_accepted": num_accepted, "num_tokens": num_tokens, "parents": parents}
    xbc = reference_decode.causal_conv1d_update(xbc, *conv, *slots, **tokens, activation=activation)
    x, B, C = _heads(xbc, ssm_state)
    stored = {"state_scale": state_scale, "seed": seed, "rounding": rounding}
    options = {"dt_softplus": dt_softplus, "dt_min": dt_min, "dt_max": dt_max}
    y = reference_decode.ssm_update(ssm_state, x, dt, A, B, C, D, None, dt_bias, *slots, **tokens, **stored, **options)
    y = _normalise(y, z, norm_weight, B.shape[-2], group_size, eps, norm_before_gate).to(zxbcdt.dtype)
    source = source_slots(zxbcdt, state_indices, num_accepted)
    count = reference_decode.count_tokens(steps, num_tokens, source)
    return reference_decode.zero_padding(y.view(len(y), steps, y.shape[-1]), count).view(y.shape)


def _columns(zxbcdt: Tensor, conv_weight: Tensor, ssm_state: Tensor) -> tuple[Tensor, ...]:
    """z, the channels of the convolution, and dt."""
    heads, head_dim = ssm_state.shape[1:3]
    return zxbcdt.to(reference.wide_dtype(zxbcdt)).split([heads * head_dim, conv_weight.shape[0], heads], -1)


def _heads(xbc: Tensor, ssm_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    heads, head_dim, d_state = ssm_state.shape[1:]
    width = (xbc.shape[-1] - heads * head_dim) // 2
    x, B, C = xbc.split([heads * head_dim, width, width], -1)
    return x.unflatten(-1, (heads, head_dim)), B.unflatten(-1, (-1, d_state)), C.unflatten(-1, (-1, d_state))


def _normalise(
    y: Tensor, z: Tensor, weight: Tensor | None, groups: int, group_size: int | None, eps: float, norm_before_gate: bool
) -> Tensor:
    y = y.flatten(-2)
    if weight is None:
        return y * F.silu(z)
    size = y.shape[-1] // groups if group_size is None else group_size
    return reference.gated_rms_norm(y, z, weight, size, eps, norm_before_gate)
