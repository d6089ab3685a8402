"""How a state is stored in fewer bits: rounded to nearest or stochastically, in 8 bits with a scale per row.

The contract, which the C++, Triton and CUDA kernels share bit for bit:

* 16-bit states: the float32 value, rounded once.
* int8 and float8_e4m3fn: each row (slot, head, channel) of N values has a float32 decode scale, amax / 127 or
  amax / 448. A code is ``value / scale``, rounded; beyond +-127 or 448 it saturates. Divisions are in float32. A scale
  of 0 gives codes 0; a row with a value that is not finite gives the scale NaN and codes 0.
* stochastic: the magnitude rounded toward zero on the grid of the target, subnormals included, and one step up iff
  ``u < (|v| - q) / step``. What would then be beyond the largest finite value is rounded to nearest (16 bits) or
  saturates (8 bits); infinities and NaN as in rounding to nearest. A float32 state is not rounded.
* u = (word >> 8) * 2^-24, with `_philox.element_words`: the element is the one of a contiguous ``[slots, H, P, N]``,
  and the offset is the seed's plus the number, from 0, of the token after which the state is stored.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _philox
from . import _slots

__all__ = ["SCALED", "load", "round_stochastic", "store"]

SCALED = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}  # dtypes with a scale per row -> their largest value
_MANTISSA = {torch.bfloat16: 7, torch.float16: 10, torch.float8_e4m3fn: 3}
_LEAST_EXPONENT = {torch.bfloat16: -126, torch.float16: -14, torch.float8_e4m3fn: -6}  # of a normal number


def load(state: Tensor, scale: Tensor | None, indices: Tensor, wide: torch.dtype) -> Tensor:
    rows = _slots.load(state, indices).to(wide)
    return rows if scale is None else rows * _slots.load(scale, indices).to(wide)[..., None]


def store(
    state: Tensor, scale: Tensor | None, indices: Tensor, rows: Tensor, rounding: str, seed: Tensor | None, step: Tensor
) -> None:
    """Writes ``rows [B, H, P, N]`` to the slots ``indices``; ``step [B]``: the token after which each row is."""
    written = indices >= 0
    slots, rows = indices[written].long(), rows[written]
    if scale is not None:
        rows, scales = _scaled(rows.float(), SCALED[state.dtype])
        scale[slots] = scales.to(scale.dtype)
    if rounding == "stochastic" and state.dtype not in (torch.float32, torch.float64):
        size = rows[:1].numel()
        element = slots[:, None] * size + torch.arange(size, device=slots.device)
        words = _philox.element_words(seed, element, step[written].long()[:, None])
        state[slots] = round_stochastic(rows.float(), words.view(rows.shape), state.dtype)
    elif state.dtype == torch.int8:
        state[slots] = rows.round().clamp(-127, 127).to(torch.int8)
    elif state.dtype == torch.float8_e4m3fn:  # PyTorch's own cast makes NaN of what is too large
        state[slots] = rows.clamp(-448, 448).to(torch.float8_e4m3fn)
    else:
        state[slots] = rows.to(state.dtype)


def _scaled(rows: Tensor, largest: float) -> tuple[Tensor, Tensor]:
    """``rows / scale`` and the scales: 0 where the scale is 0 or NaN."""
    amax = rows.abs().amax(-1) if rows.shape[-1] else rows.new_zeros(rows.shape[:-1])
    scale = torch.where(rows.isfinite().all(-1), amax / torch.full_like(amax, largest), float("nan"))
    return torch.where((scale > 0)[..., None], rows / scale[..., None], 0.0), scale


def round_stochastic(v: Tensor, words: Tensor, dtype: torch.dtype) -> Tensor:
    """``v`` (float32) as ``dtype``: a neighbour of it on the grid, the farther from zero iff u < its fraction.

    Exact in float64: the fraction is a quotient of a difference on the grid of v by a power of two.
    """
    a, u = v.double().abs(), (words >> 8).double() * 2.0**-24
    a = torch.where(a.isfinite(), a, 0.0)
    if dtype == torch.int8:
        step = torch.ones_like(a)
    else:
        exponent = (torch.frexp(a).exponent - 1).clamp(min=_LEAST_EXPONENT[dtype]) - _MANTISSA[dtype]
        step = (exponent.long() + 1023 << 52).view(torch.float64)  # 2^exponent, from its bits
    q = (a / step).floor() * step
    magnitude = torch.where(u < (a - q) / step, q + step, q)
    if dtype in SCALED:
        rounded = magnitude.clamp(max=SCALED[dtype]).copysign(v.double())
        return rounded.to(dtype)
    ordinary = v.isfinite() & (a <= torch.finfo(dtype).max)
    return torch.where(ordinary, magnitude.copysign(v.double()).to(dtype), v.to(dtype))
