"""The library's random words on the device, bit for bit those of n3kernels/_philox.py.

Philox4x32-10: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
"""

from __future__ import annotations

import triton.language as tl

from .common import device_function

__all__ = ["element_words", "philox4x32"]


@device_function
def philox4x32(k0, k1, c0, c1, c2, c3):
    """Ten rounds of Philox4x32 on uint32 values, broadcast together.

    Keys are int64 with 32 bits, so that the interpreter's scalars do not overflow.
    """
    for i in tl.static_range(10):
        a = (k0 + i * 0x9E3779B9) & 0xFFFFFFFF  # the key schedule: golden ratio and sqrt(3) - 1
        b = (k1 + i * 0xBB67AE85) & 0xFFFFFFFF
        p0 = c0.to(tl.uint64) * 0xD2511F53
        p1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0, c1, c2, c3 = (
            (p1 >> 32).to(tl.uint32) ^ c1 ^ a.to(tl.uint32), p1.to(tl.uint32),
            (p0 >> 32).to(tl.uint32) ^ c3 ^ b.to(tl.uint32), p0.to(tl.uint32),
        )  # fmt: skip
    return c0, c1, c2, c3


@device_function
def element_words(seed_ptr, step, first, QUADS: tl.constexpr, COUNT: tl.constexpr):
    """The word of each of COUNT elements from every ``first`` (int64 ``[R]``) on, ``[R, COUNT]``: key = seed[0],
    counter = (element >> 2, seed[1] + step).

    QUADS: first and COUNT are multiples of 4, and one evaluation serves four elements.
    """
    key = tl.load(seed_ptr)
    offset = tl.load(seed_ptr + 1) + step
    k0, k1 = key & 0xFFFFFFFF, (key >> 32) & 0xFFFFFFFF
    if QUADS:
        quad = (first >> 2)[:, None] + tl.arange(0, COUNT // 4)[None, :]
    else:
        element = first[:, None] + tl.arange(0, COUNT)[None, :]
        quad = element >> 2
    c0, c1 = (quad & 0xFFFFFFFF).to(tl.uint32), ((quad >> 32) & 0xFFFFFFFF).to(tl.uint32)
    c2 = (tl.zeros_like(quad) + (offset & 0xFFFFFFFF)).to(tl.uint32)
    c3 = (tl.zeros_like(quad) + ((offset >> 32) & 0xFFFFFFFF)).to(tl.uint32)
    w0, w1, w2, w3 = philox4x32(k0, k1, c0, c1, c2, c3)
    if QUADS:
        return tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (first.shape[0], COUNT))
    else:
        which = element & 3
        return tl.where(which < 2, tl.where(which == 0, w0, w1), tl.where(which == 2, w2, w3))
