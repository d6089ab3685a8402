"""Device side of the grouped products: tiles of weights, dense or NVFP4, and activations with their derivatives."""

from __future__ import annotations

import triton.language as tl

from ..common import INTERPRET, device_function, dot, narrow, widen
from ..nvfp4.numerics import e2m1_pair, e4m3_value
from .grouped_plan import COLUMNS
from .numerics import gated, relu2

__all__ = ["activate", "activation_grads", "multiply", "rows_of", "stored", "times_weight", "weight_base"]


@device_function
def rows_of(table_ptr, gather_ptr, tile, m, divisor, groups, BLOCK_M: tl.constexpr):
    """(group, rows, which are there, rows of x that they are made of, which of those are there) of a tile.

    ``gather_ptr`` names for every row the row of x times ``divisor``, or is None: row r is made of x[r]. Where it is
    negative, and in the tiles of no group, nothing is there to be read.
    """
    at = table_ptr + tile * COLUMNS
    group = tl.load(at)
    i = tl.arange(0, BLOCK_M)
    row = tl.load(at + 1) + i
    count = tl.load(at + 2)
    live = i < count
    read = i < tl.where(group < groups, count, 0)
    source = row
    if gather_ptr is not None:
        named = tl.load(gather_ptr + row, mask=read, other=-1)
        source = named // divisor
        read = read & (named >= 0)
    return group, row, live, source, read & (source < m)


@device_function
def weight_base(w_ptr, scale_ptr, group, w_group, STEP: tl.constexpr, FORM: tl.constexpr):
    """Pointers to the group's matrix and, NVFP4, to its block scales."""
    elements = group.to(tl.int64) * w_group * STEP  # int64: groups * n * k passes 2^31
    if FORM == "nvfp4":
        return w_ptr + elements // 2, scale_ptr + elements // 16
    else:
        return w_ptr + elements, scale_ptr


@device_function
def multiply(a, b, acc, TF32: tl.constexpr):
    """acc + a @ b. TF32: b, a float16, meets float32 numbers with float16's precision, `stored` so, of any size."""
    if INTERPRET:
        # In rows whatever b is in memory: numpy would add up in another order.
        b = tl.reshape(tl.reshape(widen(b), (b.shape[0] * b.shape[1],)), (b.shape[0], b.shape[1]))
        return dot(widen(a), b, acc)
    elif not TF32:
        return dot(a, b, acc)
    else:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="tf32")


@device_function
def stored(v, dtype: tl.constexpr, TF32: tl.constexpr):
    """float32 -> dtype, to nearest even; TF32: to the 11 bits that tensor cores keep, in float32. They truncate."""
    if TF32:
        bits = v.to(tl.uint32, bitcast=True)
        bits = (bits + 0xFFF + ((bits >> 13) & 1)) & 0xFFFFE000
        return tl.where(tl.abs(v) < float("inf"), bits.to(tl.float32, bitcast=True), v)
    else:
        return narrow(v, dtype)


@device_function
def times_weight(
    a, w_ptr, scale_ptr, offs_n, mask_n, start, K, line, acc,
    FORM: tl.constexpr, STEP: tl.constexpr, BLOCK_K: tl.constexpr, TF32: tl.constexpr = False,
):  # fmt: skip
    """acc + a W^T over the BLOCK_K columns of W from ``start`` on; ``a [rows, BLOCK_K]`` is 0 beyond column K.

    Codes times block scales have at most 6 significant bits and fit 16-bit operands exactly; the power of two that
    e2m1_pair leaves out belongs to them as well.
    """
    if FORM == "nvfp4":
        BLOCKS: tl.constexpr = BLOCK_K // 16
        BLOCK_N: tl.constexpr = offs_n.shape[0]
        row = offs_n.to(tl.int64) * line * STEP
        byte = tl.arange(0, BLOCK_K // 2)
        block = tl.arange(0, BLOCKS)
        q = tl.load(
            w_ptr + (row // 2)[:, None] + (start // 2 + byte)[None, :],
            mask=mask_n[:, None] & (byte < (K - start) // 2)[None, :], other=0,
        )  # fmt: skip
        scale = tl.load(
            scale_ptr + (row // 16)[:, None] + (start // 16 + block)[None, :],
            mask=mask_n[:, None] & (block < (K - start) // 16)[None, :], other=0,
        )  # fmt: skip
        factor = (e4m3_value(scale) * 16384.0)[:, :, None]
        low, high = e2m1_pair(tl.reshape(q, (BLOCK_N, BLOCKS, 8)))
        w = tl.join(low * factor, high * factor)  # [n, block, byte, nibble]: k in order
        w = tl.reshape(w.to(a.dtype), (BLOCK_N, BLOCK_K))
        return multiply(a, tl.trans(w), acc, TF32)
    elif FORM == "k":
        k = tl.arange(0, BLOCK_K)
        at = (offs_n.to(tl.int64) * line * STEP)[:, None] + (start + k)[None, :]
        w = tl.load(w_ptr + at, mask=mask_n[:, None] & (k < K - start)[None, :], other=0.0)
        return multiply(a, tl.trans(w), acc, TF32)
    else:
        k = tl.arange(0, BLOCK_K)
        at = ((start + k).to(tl.int64) * line * STEP)[:, None] + offs_n[None, :]
        w = tl.load(w_ptr + at, mask=(k < K - start)[:, None] & mask_n[None, :], other=0.0)
        return multiply(a, w, acc, TF32)


# ---------------------------------------------------------------- activations
#
# On h, or on gate and up, in float32. "none" and "relu2" do not look at `up`.


@device_function
def activate(h, up, ACTIVATION: tl.constexpr):
    if ACTIVATION == "none":
        return h
    elif ACTIVATION == "relu2":
        return relu2(h)
    else:
        return gated(h, up, ACTIVATION)


@device_function
def activation_grads(h, up, grad, ACTIVATION: tl.constexpr):
    """Gradients of h and of ``up`` for the gradient of ``activate(h, up)``; that of ``up`` is 0 where there is none."""
    if ACTIVATION == "none":
        return grad, tl.zeros_like(grad)
    elif ACTIVATION == "relu2":
        return 2.0 * tl.where(h < 0.0, 0.0, h) * grad, tl.zeros_like(grad)
    elif ACTIVATION == "silu":
        s = 1.0 / (1.0 + tl.exp(-h))
        return grad * up * (s * (1.0 + h * (1.0 - s))), grad * (h * s)
    else:
        cdf = 0.5 * (1.0 + tl.erf(h * 0.7071067811865476))
        density = 0.3989422804014327 * tl.exp(-0.5 * h * h)
        return grad * up * (cdf + h * density), grad * (h * cdf)
