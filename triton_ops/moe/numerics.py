"""What the moe kernels compute alike: activations, as n3kernels/moe/reference.py defines them, on float32 values."""

from __future__ import annotations

import triton.language as tl

from ..common import device_function

__all__ = ["gated", "relu2"]


@device_function
def relu2(h):
    h = tl.where(h < 0.0, 0.0, h)  # NaN stays
    return h * h


@device_function
def gated(g, u, ACTIVATION: tl.constexpr):
    """act(g) * u; ``"silu"``, or ``"gelu"`` with erf."""
    if ACTIVATION == "silu":
        return g / (1.0 + tl.exp(-g)) * u
    else:
        return 0.5 * g * (1.0 + tl.erf(g * 0.7071067811865476)) * u
