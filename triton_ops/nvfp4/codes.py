"""Quantisation of a tile of blocks in registers: ``x [N, 16]`` in, codes ``[N, 16]`` and scale bytes ``[N]`` out.

Every operation is one float32 rounding in the order of n3kernels/nvfp4/reference_quantize.py. Of Triton's operators
``/`` is an approximation in float32 (``div.full``, 2 units in the last place): divisions are ``tl.div_rn``. Reductions
choose an order of their own: a sum with an order is written out.

Of square blocks, 16 consecutive blocks of the tile are the rows.
"""

from __future__ import annotations

import triton.language as tl

from ..common import device_function
from .numerics import e2m1_code, e2m1_value, e4m3_code, e4m3_value

__all__ = [
    "FLT_MAX", "e2m1_stochastic", "encode_scale", "hadamard16", "quantize_blocks", "scale_of_given", "sum_in_order",
    "sum_of_rows",
]  # fmt: skip

FLT_MAX = tl.constexpr(3.4028234663852886e38)
_INFINITY = tl.constexpr(0x7F800000)  # its bits, above those of every finite magnitude


# ---------------------------------------------------------------- global scales


@device_function
def scale_of_given(given, NORMAL: tl.constexpr):
    """S_enc, and the amax that a given decode scale stands for."""
    s_enc = tl.div_rn(1.0, given)
    s_enc = tl.where(s_enc < FLT_MAX, tl.where(s_enc > -FLT_MAX, s_enc, -FLT_MAX), FLT_MAX)
    s_enc = tl.where(given == 0.0, 1.0, s_enc)
    return tl.where(s_enc == 0.0, 1.0, s_enc), given * NORMAL


@device_function
def encode_scale(amax, NORMAL: tl.constexpr):
    """S_enc of a tensor or row with this largest finite magnitude."""
    s_enc = tl.div_rn(NORMAL, amax)
    return tl.where(amax == 0.0, 1.0, tl.where(s_enc < FLT_MAX, s_enc, FLT_MAX))


# ---------------------------------------------------------------- rotation


@device_function
def _halves(t):
    """The columns of even and of odd number."""
    return tl.split(tl.reshape(t, (t.shape[0], t.shape[1] // 2, 2)))


@device_function
def hadamard16(x, signs):
    """``(x * signs) @ H16 / 4``. A stage takes the pairs that differ in the lowest bit of k, and makes that bit the
    highest: four stages have strides 1, 2, 4, 8 and leave every element where it belongs."""
    v = x * signs[None, :]
    for _ in tl.static_range(4):
        a, b = _halves(v)
        v = tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 2, 1)), (x.shape[0], 16))
    return v * 0.25


# ---------------------------------------------------------------- rounding


@device_function
def e2m1_stochastic(v, words):
    """The upper neighbour with the probability of the fraction between the two: if word < fraction * 2^32."""
    bits = v.to(tl.uint32, bitcast=True)
    a = (bits & 0x7FFFFFFF).to(tl.float32, bitcast=True)
    a = tl.where(a < 6.0, a, 6.0)
    b = a.to(tl.uint32, bitcast=True)
    lower = tl.where(a >= 1.0, (b >> 22) - 252, tl.where(a >= 0.5, 1, 0).to(tl.uint32))
    # 2^32 / width; the product is exact, and rounded up to an integer the comparison stays as it is
    to_words = tl.where(lower < 4, 8589934592.0, tl.where(lower < 6, 4294967296.0, 2147483648.0))
    bound = tl.ceil((a - e2m1_value(lower)) * to_words).to(tl.uint32)
    return tl.where(words < bound, lower + 1, lower) | ((bits >> 28) & 8)


@device_function
def _scaled(x, scale, inv):
    """x divided by its decode scale, by way of the factor min(1 / (scale * inv), FLT_MAX)."""
    enc = tl.div_rn(1.0, scale * inv)
    return x * tl.where(enc < FLT_MAX, enc, FLT_MAX)[:, None]


# ---------------------------------------------------------------- four over six


@device_function
def _four_columns(t):
    even, odd = _halves(t)
    c0, c2 = tl.split(even)
    c1, c3 = tl.split(odd)
    return c0, c1, c2, c3


@device_function
def sum_in_order(t):
    """Of the 16 columns, from the first to the last."""
    even, odd = _halves(t)
    mod0, mod2 = _halves(even)  # k % 4
    mod1, mod3 = _halves(odd)
    k0, k4, k8, k12 = _four_columns(mod0)
    k1, k5, k9, k13 = _four_columns(mod1)
    k2, k6, k10, k14 = _four_columns(mod2)
    k3, k7, k11, k15 = _four_columns(mod3)
    return k0 + k1 + k2 + k3 + k4 + k5 + k6 + k7 + k8 + k9 + k10 + k11 + k12 + k13 + k14 + k15


@device_function
def sum_of_rows(v):
    """``[16 n]`` to ``[n]`` as a tree: rows i and i + 8, then i + 4, i + 2, i + 1."""
    n: tl.constexpr = v.shape[0] // 16
    t = tl.reshape(v, (n, 16))
    for i in tl.static_range(4):
        low, high = tl.split(tl.permute(tl.reshape(t, (n, 2, 8 >> i)), (0, 2, 1)))
        t = low + high
    return tl.reshape(t, (n,))


@device_function
def _to_rows(v):
    """``[n]`` to ``[16 n]``: each value for the 16 rows of its block."""
    return tl.reshape(tl.broadcast_to(v[:, None], (v.shape[0], 16)), (v.shape[0] * 16,))


@device_function
def _try_scale(x, byte, inv, global_amax, METRIC: tl.constexpr, SQUARE: tl.constexpr):
    """Nearest codes under this scale, and their error."""
    scale = e4m3_value(byte)
    codes = e2m1_code(_scaled(x, scale, inv))
    decoded = e2m1_value(codes) * scale[:, None] * global_amax[:, None]
    difference = tl.div_rn(decoded, 1536.0) - x
    error = sum_in_order(tl.abs(difference) if METRIC == "mae" else difference * difference)
    if SQUARE:
        error = _to_rows(sum_of_rows(error))
    return codes, error


# ---------------------------------------------------------------- blocks


@device_function
def quantize_blocks(
    x, s_enc, inv, global_amax,  # x [N, 16], the others [N]; inv = 1 / s_enc
    words,  # random, uint32 [N, 16], or None: to nearest
    METRIC: tl.constexpr,  # "mae" or "mse" of the choice between 4 and 6, or None: always 6
    SQUARE: tl.constexpr,
):  # fmt: skip
    top = tl.max((x.to(tl.uint32, bitcast=True) & 0x7FFFFFFF).to(tl.int32), axis=1)
    if SQUARE:
        top = _to_rows(tl.max(tl.reshape(top, (x.shape[0] // 16, 16)), axis=1))
    finite = top < _INFINITY
    amax = tl.where(finite, top, 0).to(tl.float32, bitcast=True)
    if METRIC is None:
        byte = e4m3_code(amax * (s_enc * 0.1666666716337204))  # 1 / 6 rounded to float32
        codes = None
    else:
        base = tl.div_rn(amax, 6.0) * s_enc
        six, four = e4m3_code(base), e4m3_code(base * 1.5)
        codes, error = _try_scale(x, six, inv, global_amax, METRIC, SQUARE)
        codes_four, error_four = _try_scale(x, four, inv, global_amax, METRIC, SQUARE)
        better = error_four < error
        byte = tl.where(better, four, six)
        codes = tl.where(better[:, None], codes_four, codes)
    scale = e4m3_value(byte)
    if words is not None:
        codes = e2m1_stochastic(_scaled(x, scale, inv), words)
    elif METRIC is None:
        codes = e2m1_code(_scaled(x, scale, inv))
    codes = tl.where((finite & (scale != 0.0))[:, None], codes, 0)  # nothing survives a scale of 0
    return codes, tl.where(finite, byte, 0x7F)
