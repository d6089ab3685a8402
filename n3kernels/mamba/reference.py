"""The definition of every mamba operator in plain PyTorch: slow, and obvious on purpose.

Everything is computed in float32, or in float64 where the inputs are float64, and rounded once at the end.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["gated_rms_norm"]


def gated_rms_norm(
    x: Tensor, z: Tensor | None, weight: Tensor, group_size: int, eps: float = 1e-5, norm_before_gate: bool = False
) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    h = x.to(wide)
    gate = None if z is None else F.silu(z.to(wide))
    if gate is not None and not norm_before_gate:
        h = h * gate
    groups = h.unflatten(-1, (-1, group_size))
    h = (groups * torch.rsqrt(groups.square().mean(-1, keepdim=True) + eps)).flatten(-2) * weight.to(wide)
    if gate is not None and norm_before_gate:
        h = h * gate
    return h.to(x.dtype)
