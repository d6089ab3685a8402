"""What the mtp kernels compute alike: random numbers, order-preserving keys and weights.

The interpreter turns a boolean scalar into integers where it meets a vector, which no load takes for a mask: masks are
comparisons of vectors, with a bound that a scalar moves.

The random words are bit for bit those of n3kernels/_philox.py. Probabilities: one weight ``exp((x - top) / T)`` is
float32, masses and what decides are float64.
"""

from __future__ import annotations

import triton.language as tl

from ..common import INTERPRET, device_function
from ..philox import philox4x32

__all__ = [
    "ACCEPT", "DRAFT", "EPSILON", "FLT_MAX", "INF", "NOWHERE", "RESIDUAL", "TARGET", "TILE", "TILE_STREAM",
    "any_bits", "first_of", "gumbel", "key_of", "largest", "next_above", "quad_words", "smallest", "total", "uniform",
    "uniform53", "value_of", "weight", "weight64", "word_of", "words",
]  # fmt: skip

DRAFT, ACCEPT, TARGET, RESIDUAL, TILE_STREAM = (tl.constexpr(i) for i in range(5))
TILE = tl.constexpr(4096)  # tokens per tile of a hierarchical draw: a public constant
EPSILON = tl.constexpr(1e-5)  # the temperature below which a row is greedy
FLT_MAX = tl.constexpr(3.4028234663852886e38)
INF = tl.constexpr(float("inf"))
NOWHERE = tl.constexpr(0x7FFFFFFF)  # above every token and tile


# ---------------------------------------------------------------- random numbers


@device_function
def words(seed, pos, STREAM: tl.constexpr, quad):
    """The four uint32 words of each ``index >> 2`` (int64); ``seed`` and ``pos`` are int64 scalars."""
    zero = quad - quad
    return philox4x32(
        seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF,
        (zero + (pos & 0xFFFFFFFF)).to(tl.uint32), (zero + ((pos >> 32) & 0xFFFFFFFF)).to(tl.uint32),
        (quad | (STREAM << 28)).to(tl.uint32), zero.to(tl.uint32),
    )  # fmt: skip


@device_function
def word_of(seed, pos, STREAM: tl.constexpr, index):
    """The word of each index."""
    w0, w1, w2, w3 = words(seed, pos, STREAM, index >> 2)
    which = index & 3
    return tl.where(which < 2, tl.where(which == 0, w0, w1), tl.where(which == 2, w2, w3))


@device_function
def quad_words(seed, pos, STREAM: tl.constexpr, first, COUNT: tl.constexpr):
    """The words of ``first .. first + COUNT``, both multiples of 4: one evaluation serves four."""
    w0, w1, w2, w3 = words(seed, pos, STREAM, (first >> 2) + tl.arange(0, COUNT // 4).to(tl.int64))
    return tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (COUNT,))


@device_function
def uniform(word):
    """float64 in (0, 1), exact."""
    return (word.to(tl.float64) + 0.5) * 2.3283064365386963e-10  # 2^-32


@device_function
def gumbel(word):
    """float64. The uniform is exact, so that its logarithm keeps its digits next to 1 as well."""
    return -tl.log(-tl.log(uniform(word)))


@device_function
def uniform53(seed, pos, STREAM: tl.constexpr):
    """float64 in (0, 1) of 53 bits, from words 0 and 1 of index 0."""
    w0, w1, _, _ = words(seed, pos, STREAM, pos - pos)
    high, low = (w0 >> 5).to(tl.float64), (w1 >> 6).to(tl.float64)
    return (high * 67108864.0 + low + 0.5) * 1.1102230246251565e-16  # 2^26, 2^-53


# ---------------------------------------------------------------- reductions
#
# Triton's own are jitted functions, which the interpreter takes half a millisecond to enter.


@device_function
def largest(x, axis: tl.constexpr = 0):
    if INTERPRET:
        return tl.reduce(x, axis, tl.standard._elementwise_max)
    else:
        return tl.max(x, axis=axis)


@device_function
def smallest(x, axis: tl.constexpr = 0):
    if INTERPRET:
        return tl.reduce(x, axis, tl.standard._elementwise_min)
    else:
        return tl.min(x, axis=axis)


@device_function
def total(x, axis: tl.constexpr = 0):
    if INTERPRET:
        return tl.reduce(x, axis, tl.standard._sum_combine)
    else:
        return tl.sum(x, axis=axis)


# ---------------------------------------------------------------- order


@device_function
def key_of(x):
    """float32 without NaN -> int32 of the same order; -0 must be +0 before."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@device_function
def value_of(key):
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@device_function
def next_above(bound):
    """The smallest float32 >= a float64 scalar."""
    near = bound.to(tl.float32) + 0.0
    above = value_of(key_of(near) + 1)
    return tl.where(near.to(tl.float64) < bound, above, near)


@device_function
def first_of(hits, index):
    """The lowest index that is hit; NOWHERE if none is."""
    return smallest(tl.where(hits, index, NOWHERE))


@device_function
def any_bits(flags):
    """Bitwise or of the five flags of a vector."""
    bits = largest(flags & 1)
    for i in tl.static_range(1, 5):
        bits |= largest(flags & (1 << i))
    return bits


# ---------------------------------------------------------------- weights


@device_function
def weight(x, top, temperature):
    """exp((x - top) / T) for x <= top, float32; equals of an infinite top weigh 1, and -inf nothing."""
    w = tl.where(x == top, 1.0, tl.exp((x - top) / temperature))
    return tl.where(x > -INF, w, 0.0)


@device_function
def weight64(x, top, temperature):
    """The same in float64, of float32 values."""
    z = (x.to(tl.float64) - top.to(tl.float64)) / temperature.to(tl.float64)
    w = tl.where(x == top, 1.0, tl.exp(z))
    return tl.where(x > -INF, w, 0.0)
