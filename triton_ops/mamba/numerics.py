"""What the mamba kernels compute alike: gates, time steps and the rounding of states.

Bit for bit the contract of n3kernels/mamba/rounding.py, by integers and exact float32 operations.
"""

from __future__ import annotations

import triton.language as tl

from ..common import device_function, narrow, widen
from ..nvfp4.numerics import e4m3_code, e4m3_value
from ..philox import element_words

__all__ = ["load_state", "sigmoid", "silu", "store_state", "time_step"]

FLT_MAX = tl.constexpr(3.4028234663852886e38)


@device_function
def sigmoid(v):
    return 1.0 / (1.0 + tl.exp(-v))


@device_function
def silu(v):
    return v * sigmoid(v)


@device_function
def _log1p(u):
    """log(1 + u) for 0 <= u <= 1, relative error below 2e-7: 2 atanh(u / (2 + u)), whose argument is at most 1/3.

    The division is rounded once. With ``/``, 2 units in the last place off in machine code, the error reaches 4.1e-7.
    """
    s = tl.div_rn(u, 2.0 + u)
    q = s * s
    p = 1.0 / 17
    p = tl.fma(p, q, 1.0 / 15)
    p = tl.fma(p, q, 1.0 / 13)
    p = tl.fma(p, q, 1.0 / 11)
    p = tl.fma(p, q, 1.0 / 9)
    p = tl.fma(p, q, 1.0 / 7)
    p = tl.fma(p, q, 1.0 / 5)
    p = tl.fma(p, q, 1.0 / 3)
    return 2.0 * tl.fma(s * q, p, s)


@device_function
def time_step(dt, bias, SOFTPLUS: tl.constexpr, dt_min, dt_max):
    """clamp(softplus(dt + bias)); softplus as max(v, 0) + log1p(exp(-|v|)), which keeps its digits at v = -80.

    NaN stays NaN. Above 20 softplus is v itself, as the definition has it: the logarithm is below half an ulp there.
    """
    v = dt + bias
    if SOFTPLUS:
        v = tl.where(v > 20.0, v, tl.where(v > 0.0, v, 0.0) + _log1p(tl.exp(-tl.abs(v))))
    v = tl.where(v < dt_min, dt_min, v)
    return tl.where(v > dt_max, dt_max, v)


# ---------------------------------------------------------------- states
#
# FORMAT: "float" (the pointer's own dtype), "int8" or "e4m3" (int8 or uint8 codes with one scale per row).


@device_function
def load_state(state_ptr, offs, mask, scale, FORMAT: tl.constexpr):
    """A tile of states ``[P, N]`` in float32; ``scale [P]`` of 8-bit formats, anything otherwise."""
    raw = tl.load(state_ptr + offs, mask=mask, other=0)
    if FORMAT == "int8":
        return raw.to(tl.float32) * scale[:, None]
    elif FORMAT == "e4m3":
        return e4m3_value(raw) * scale[:, None]
    else:
        return widen(raw)


@device_function
def _up_or_down(v, words, MANTISSA: tl.constexpr, LEAST: tl.constexpr, LARGEST: tl.constexpr):
    """Finite v to a neighbour on a grid of MANTISSA bits whose normal numbers begin at 2^LEAST, in float32.

    Up iff u < fraction, u = (word >> 8) 2^-24. Everything is exact: scaling by a power of two, floor, difference.
    """
    a = tl.abs(v)
    exponent = ((a.to(tl.int32, bitcast=True) >> 23) & 0xFF) - 127
    exponent = tl.maximum(exponent, LEAST) - MANTISSA  # of a step of the grid
    m = a * ((127 - exponent) << 23).to(tl.float32, bitcast=True)
    whole = tl.floor(m)
    u = (words >> 8).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08  # 2^-24
    whole += tl.where(u < m - whole, 1.0, 0.0)
    magnitude = tl.minimum(whole * ((127 + exponent) << 23).to(tl.float32, bitcast=True), LARGEST)
    sign = v.to(tl.uint32, bitcast=True) & 0x80000000
    return (magnitude.to(tl.uint32, bitcast=True) | sign).to(tl.float32, bitcast=True)


@device_function
def _stochastic_16(v, words, dtype: tl.constexpr):
    """float32 -> float16 or bfloat16; infinities, NaN and what is beyond the largest finite value to nearest."""
    if dtype == tl.bfloat16:
        bits = v.to(tl.uint32, bitcast=True)
        up = (words >> 8) < ((bits & 0xFFFF) << 8)  # the fraction is the 16 bits that are dropped
        moved = ((bits & 0xFFFF0000) + tl.where(up, 0x10000, 0).to(tl.uint32)).to(tl.float32, bitcast=True)
        moved = tl.where(tl.abs(v) <= 3.3895313892515355e38, moved, v)
    else:
        inside = tl.abs(v) <= 65504.0
        moved = tl.where(inside, _up_or_down(tl.where(inside, v, 0.0), words, 10, -14, 65504.0), v)
    return narrow(moved, dtype)


@device_function
def _nearest_integer(v):
    """To even, for |v| < 2^22: where 1.5 * 2^23 is added, the ulp is 1."""
    return (v + 12582912.0) - 12582912.0


@device_function
def _store_scaled(state_ptr, scale_ptr, offs, mask, scale_offs, rows, h, words, SR: tl.constexpr, FORMAT: tl.constexpr):
    """Codes and scales of the rows of h; ``words`` is anything where rounding is not stochastic."""
    a = tl.where(mask, tl.abs(h), 0.0)
    finite = tl.min((a <= FLT_MAX).to(tl.int32), axis=1) == 1  # false for NaN as well
    LARGEST: tl.constexpr = 127.0 if FORMAT == "int8" else 448.0
    amax = tl.max(tl.where(a <= FLT_MAX, a, 0.0), axis=1)
    scale = tl.div_rn(amax, tl.full(amax.shape, LARGEST, tl.float32))
    alive = finite & (scale > 0.0)
    divisor = tl.where(alive, scale, 1.0)
    wide = tl.zeros_like(h) + divisor[:, None]
    v = tl.where(alive[:, None] & mask, tl.div_rn(tl.where(alive[:, None], h, 0.0), wide), 0.0)
    if FORMAT == "int8":
        if SR:
            a = tl.abs(v)
            whole = tl.floor(a)
            u = (words >> 8).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08
            whole += tl.where(u < a - whole, 1.0, 0.0)
            v = tl.where(v < 0.0, -whole, whole)
        else:
            v = _nearest_integer(v)
        code = tl.minimum(tl.maximum(v, -127.0), 127.0).to(tl.int32).to(tl.int8)
    else:
        if SR:
            v = _up_or_down(v, words, 3, -6, 448.0)
        code = e4m3_code(v).to(tl.uint8)
    tl.store(state_ptr + offs, code, mask=mask)
    nan = tl.full(scale.shape, float("nan"), tl.float32)
    tl.store(scale_ptr + scale_offs, tl.where(finite, scale, nan), mask=rows)


@device_function
def store_state(
    state_ptr, scale_ptr, offs, mask,
    scale_offs, rows,  # offsets and mask of the rows' scales
    h, seed_ptr, step,
    row_element,  # number of each row's first element in a contiguous state
    FORMAT: tl.constexpr, SR: tl.constexpr, QUADS: tl.constexpr,
):  # fmt: skip
    """Rounds a tile ``h [P, N]`` of the state after token ``step`` and stores it."""
    words = 0
    if SR:
        words = element_words(seed_ptr, step, row_element, QUADS, h.shape[1])
    if FORMAT == "float":
        dtype: tl.constexpr = state_ptr.dtype.element_ty
        if SR:
            tl.store(state_ptr + offs, _stochastic_16(h, words, dtype), mask=mask)
        else:
            tl.store(state_ptr + offs, narrow(h, dtype), mask=mask)
    else:
        _store_scaled(state_ptr, scale_ptr, offs, mask, scale_offs, rows, h, words, SR, FORMAT)
