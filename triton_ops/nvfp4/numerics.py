"""e2m1 and e4m3 by integer arithmetic, bit for bit the functions of csrc/common/numerics.h."""

from __future__ import annotations

import triton.language as tl

from ..common import device_function, narrow

__all__ = [
    "decode_blocks", "e2m1_code", "e2m1_pair", "e2m1_value", "e4m3_code", "e4m3_value", "power_of_two", "scale_128x4",
]  # fmt: skip


@device_function
def e2m1_code(v):
    """Codes of v to nearest even, saturating at 6; -0 keeps its sign."""
    bits = v.to(tl.uint32, bitcast=True)
    a = (bits & 0x7FFFFFFF).to(tl.float32, bitcast=True)
    a = tl.where(a < 6.0, a, 6.0)
    b = a.to(tl.uint32, bitcast=True)
    big = ((b + 0x1FFFFF + ((b >> 22) & 1)) >> 22) - 252  # a >= 1: keep 1 mantissa bit, rebias
    small = (a + 4194304.0).to(tl.uint32, bitcast=True) & 15  # below: 2^22 has an ulp of 0.5
    return tl.where(a >= 1.0, big, small) | ((bits >> 28) & 8)


@device_function
def _half_bits_value(bits):
    """The code bits s, e1 e0 m at bits 15 and 11..9 of a half are the value times 2^-14, 0.5 being a subnormal."""
    return bits.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)


@device_function
def e2m1_pair(byte):
    """2^-14 times the values of the low and of the high nibble of a byte. The factor belongs into the scale."""
    b = byte.to(tl.uint32)
    low = _half_bits_value(((b & 7) << 9) | ((b & 8) << 12))
    high = _half_bits_value(((b & 0x70) << 5) | ((b & 0x80) << 8))
    return low, high


@device_function
def e2m1_value(code):
    m = code & 7
    bits = tl.where(m < 2, m * 0x3F000000, (m + 252) << 22) | ((code & 8) << 28)
    return bits.to(tl.float32, bitcast=True)


@device_function
def e4m3_code(v):
    """Byte of v to nearest even, saturating at 448, infinity and NaN included."""
    bits = v.to(tl.uint32, bitcast=True)
    a = (bits & 0x7FFFFFFF).to(tl.float32, bitcast=True)
    a = tl.where(a < 448.0, a, 448.0)
    b = a.to(tl.uint32, bitcast=True)
    normal = ((b + 0x7FFFF + ((b >> 20) & 1)) >> 20) - 960  # keep 3 mantissa bits, rebias by 120
    subnormal = (a + 16384.0).to(tl.uint32, bitcast=True) & 15  # 2^14 has an ulp of 2^-9
    return tl.where(a >= 0.015625, normal, subnormal) | ((bits >> 24) & 0x80)


@device_function
def e4m3_value(byte):
    b = byte.to(tl.uint32)
    m = b & 0x7F
    normal = ((m << 20) + (120 << 23)).to(tl.float32, bitcast=True)
    magnitude = tl.where(m < 8, m.to(tl.float32) * 0.001953125, normal)
    bits = tl.where(m == 0x7F, 0x7FC00000, magnitude.to(tl.uint32, bitcast=True)) | ((b & 0x80) << 24)
    return bits.to(tl.float32, bitcast=True)


@device_function
def power_of_two(e):
    """2^e for integers -126 <= e <= 127."""
    return ((e + 127) << 23).to(tl.float32, bitcast=True)


@device_function
def scale_128x4(r, ks, ks_total):
    """Byte of scale (r, ks) of a matrix with ks_total scales per row: tiles of 128 x 4, 512 bytes each, row-major."""
    tile = r // 128 * ((ks_total + 3) // 4) + ks // 4
    return tile * 512 + r % 32 * 16 + r % 128 // 32 * 4 + ks % 4


@device_function
def decode_blocks(q_ptr, scale, global_scale, p, mask, dtype: tl.constexpr):
    """The 16 values of every block p, ``[len(p), 16]``; global_scale a scalar or ``[len(p), 1]``."""
    q = tl.load(q_ptr + p[:, None] * 8 + tl.arange(0, 8)[None, :], mask=mask[:, None], other=0)
    low, high = e2m1_pair(q)
    factor = scale[:, None] * 16384.0  # 2^14, which e2m1_pair has left out
    y = tl.join(low * factor * global_scale, high * factor * global_scale)
    return narrow(tl.reshape(y, (p.shape[0], 16)), dtype)
