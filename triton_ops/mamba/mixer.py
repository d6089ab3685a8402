"""mamba2_prefill and mamba2_decode: convolution, scan or update, and gated norm on the columns of zxbcdt, in place.

Between the launches stands float32, except before the scan of 16-bit inputs, whose tensor cores want 16 bits: x, B and
C are handed over in float16, saturated, with 11 significant bits where bfloat16 keeps 8. The convolution also notes
which tokens are padding, so that the norm, which reads z, leaves those alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import conv1d, conv1d_update, ssd_scan, ssm_update
from .gated_norm import normalise

__all__ = ["mamba2_decode", "mamba2_prefill"]


class _Columns:
    """Views of zxbcdt, and of the convolution's output."""

    def __init__(self, zxbcdt: Tensor, channels: int, ssm_state: Tensor):
        _, self.heads, self.head_dim, self.d_state = ssm_state.shape
        self.inner = self.heads * self.head_dim
        self.z, self.xbc, self.dt = zxbcdt.split([self.inner, channels, self.heads], -1)
        self.groups = (channels - self.inner) // (2 * self.d_state)
        self.y = zxbcdt.new_empty(*zxbcdt.shape[:-1], self.inner)
        # Every sequence may be padding, and in a packed batch there may be tokens behind the last.
        self.live = torch.empty(zxbcdt.shape[:-1], dtype=torch.int8, device=zxbcdt.device)

    def by_head(self, t: Tensor) -> Tensor:
        return t.unflatten(-1, (self.heads, self.head_dim))

    def scanned(self, xbc: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        width = self.groups * self.d_state
        x, B, C = xbc.split([self.inner, width, width], -1)
        return self.by_head(x), *(t.unflatten(-1, (self.groups, self.d_state)) for t in (B, C))

    def norm(self, y: Tensor, weight: Tensor, group_size: int | None, eps: float, norm_before_gate: bool) -> Tensor:
        size = self.inner // self.groups if group_size is None else group_size
        normalise(y.flatten(-2), self.z, weight, self.y, size, eps, norm_before_gate, self.live)
        return self.y


def mamba2_prefill(
    zxbcdt: Tensor, conv_weight: Tensor, conv_bias: Tensor | None, conv_state: Tensor, ssm_state: Tensor,
    state_indices: Tensor, A: Tensor, D: Tensor | None, dt_bias: Tensor | None, norm_weight: Tensor | None,
    has_initial: Tensor | None = None, cu_seqlens: Tensor | None = None, checkpoint_tokens: Tensor | None = None,
    checkpoint_indices: Tensor | None = None, *, group_size: int | None = None, eps: float = 1e-5,
    norm_before_gate: bool = False, activation: str | None = "silu", chunk_size: int = 128, dt_softplus: bool = True,
    dt_min: float = 0.0, dt_max: float | None = None,
) -> Tensor:  # fmt: skip
    columns = _Columns(zxbcdt, conv_weight.shape[0], ssm_state)
    between = torch.float32 if zxbcdt.dtype == torch.float32 else torch.float16
    where = (state_indices, has_initial, cu_seqlens, checkpoint_tokens, checkpoint_indices)
    xbc = conv1d.convolve_slots(
        columns.xbc, conv_weight, conv_bias, conv_state, *where, activation, between, columns.live
    )
    x, B, C = columns.scanned(xbc)
    gate, dtype = (columns.by_head(columns.z), zxbcdt.dtype) if norm_weight is None else (None, torch.float32)
    y = ssd_scan.scan_slots(
        (x, columns.dt, A, B, C, D, gate, dt_bias), ssm_state, where, (dt_softplus, dt_min, dt_max), dtype
    )
    return y.flatten(-2) if norm_weight is None else columns.norm(y, norm_weight, group_size, eps, norm_before_gate)


def mamba2_decode(
    zxbcdt: Tensor, conv_weight: Tensor, conv_bias: Tensor | None, conv_state: Tensor, ssm_state: Tensor, A: Tensor,
    D: Tensor | None, dt_bias: Tensor | None, norm_weight: Tensor | None, state_indices: Tensor | None = None,
    dst_state_indices: Tensor | None = None, *, num_accepted: Tensor | None = None, num_tokens: Tensor | None = None,
    parents: Tensor | None = None, state_scale: Tensor | None = None, seed: Tensor | None = None,
    rounding: str = "nearest", group_size: int | None = None, eps: float = 1e-5, norm_before_gate: bool = False,
    activation: str | None = "silu", dt_softplus: bool = True, dt_min: float = 0.0, dt_max: float | None = None,
) -> Tensor:  # fmt: skip
    columns = _Columns(zxbcdt, conv_weight.shape[0], ssm_state)
    where = (state_indices, dst_state_indices, num_accepted, num_tokens, parents)
    xbc = conv1d_update.convolve_update(
        columns.xbc, conv_state, conv_weight, conv_bias, *where, None, activation, torch.float32, columns.live
    )
    x, B, C = columns.scanned(xbc)
    gate, dtype = (columns.by_head(columns.z), zxbcdt.dtype) if norm_weight is None else (None, torch.float32)
    stored = (state_scale, seed, rounding, dt_softplus, dt_min, dt_max)
    y = ssm_update.update(ssm_state, (x, columns.dt, A, B, C, D, gate, dt_bias), where, stored, dtype)
    return y.flatten(-2) if norm_weight is None else columns.norm(y, norm_weight, group_size, eps, norm_before_gate)
