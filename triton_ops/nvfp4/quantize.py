"""nvfp4_quantize: e2m1 codes, one e4m3 scale per 16 elements, one float32 global scale.

Every operation is one float32 rounding in the order of csrc/nvfp4/quantize.h: true divisions, nothing fused.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import Case, guard, widen
from .numerics import e2m1_code, e2m1_value, e4m3_code, e4m3_value, scale_128x4

__all__ = ["compile_cases", "nvfp4_quantize"]

FLT_MAX = tl.constexpr(torch.finfo(torch.float32).max)
PARTIALS = 512  # programs of the first launch, each of which leaves one maximum: about three for each SM of a B200
AMAX_BLOCK = 2048  # elements
BLOCKS = 128  # scale blocks per program of the second launch: one per thread where 4 warps sum in order


@triton.jit(do_not_specialize=["blocks"])
def _amax_kernel(
    x_ptr, partial_ptr,
    blocks,  # of 16 elements
    BLOCK: tl.constexpr,
):  # fmt: skip
    """partial[p] = the largest finite |x| of every PARTIALS-th piece of BLOCK elements, from piece p on."""
    step = tl.num_programs(0).to(tl.int64) * BLOCK
    size = blocks.to(tl.int64) * 16
    top = tl.zeros((BLOCK,), tl.float32)
    for start in range(tl.program_id(0).to(tl.int64) * BLOCK, size, step):
        offs = start + tl.arange(0, BLOCK)
        a = tl.abs(widen(tl.load(x_ptr + offs, mask=offs < size, other=0.0)))
        top = tl.maximum(top, tl.where(a <= FLT_MAX, a, 0.0))
    tl.store(partial_ptr + tl.program_id(0), tl.max(top, axis=0))


@triton.jit
def _encode_factor(scale, inv):
    enc = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale * inv)
    return tl.where(enc < FLT_MAX, enc, FLT_MAX)


@triton.jit
def _error_in_order(x_ptr, p, valid, scale, inv):
    """Sum over k = 0..15, in this order, of |(code * scale) * inv - x|; a reduction would choose its own."""
    enc = _encode_factor(scale, inv)
    total = tl.zeros(scale.shape, tl.float32)
    for k in tl.static_range(16):
        x = widen(tl.load(x_ptr + p * 16 + k, mask=valid, other=0.0))
        total += tl.abs(e2m1_value(e2m1_code(x * enc)) * scale * inv - x)
    return total


@triton.jit
def _encode_scale(global_ptr, partial_ptr, num_partials, NORMAL: tl.constexpr, PARTIALS: tl.constexpr):
    """S_enc and the global scale to return: the given one, or that of the tensor's maximum."""
    if global_ptr is not None:
        given = tl.load(global_ptr)
        s_enc = tl.div_rn(1.0, given)
        s_enc = tl.where(given == 0.0, 1.0, tl.where(s_enc < FLT_MAX, s_enc, FLT_MAX))
        s_enc = tl.where(s_enc == 0.0, 1.0, s_enc)
        return s_enc, given
    else:
        offs = tl.arange(0, PARTIALS)
        amax = tl.max(tl.load(partial_ptr + offs, mask=offs < num_partials, other=0.0), axis=0)
        s_enc = tl.div_rn(NORMAL, amax)
        s_enc = tl.where(amax == 0.0, 1.0, tl.where(s_enc < FLT_MAX, s_enc, FLT_MAX))
        return s_enc, tl.div_rn(1.0, s_enc)


@triton.jit(do_not_specialize=["num_partials", "rows", "ks"])
def _quantize_kernel(
    x_ptr, q_ptr, scale_ptr,
    global_ptr,  # the given decode scale, or None
    partial_ptr, num_partials,  # what _amax_kernel left, where global_ptr is None
    global_out_ptr,
    rows, ks,  # scales per row
    FOUR_OVER_SIX: tl.constexpr, SWIZZLED: tl.constexpr, PARTIALS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """One program per BLOCKS places of the scale matrix, padding included, which gets zero bytes."""
    s_enc, global_out = _encode_scale(
        global_ptr, partial_ptr, num_partials, 1536.0 if FOUR_OVER_SIX else 2688.0, PARTIALS
    )
    inv = tl.div_rn(1.0, s_enc)
    if tl.program_id(0) == 0:
        tl.store(global_out_ptr, global_out)

    # int64: the blocks of x pass 2^31 at 2^35 elements
    place = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    if SWIZZLED:
        grid_ks = (ks + 3) // 4 * 4
        row, col = place // grid_ks, place % grid_ks
        inside = row < (rows + 127) // 128 * 128
        valid = (row < rows) & (col < ks)
        p = row * ks + col
        to = scale_128x4(row, col, ks)
    else:
        inside = place < rows.to(tl.int64) * ks
        valid = inside
        p = place
        to = place
    offs = p[:, None] * 16 + tl.arange(0, 16)[None, :]
    x = widen(tl.load(x_ptr + offs, mask=valid[:, None], other=0.0))

    a = tl.abs(x)
    finite = tl.max(tl.where(a <= FLT_MAX, 0, 1), axis=1) == 0
    amax = tl.max(tl.where(a <= FLT_MAX, a, 0.0), axis=1)
    if FOUR_OVER_SIX:
        base = tl.div_rn(amax, tl.full(amax.shape, 6.0, tl.float32)) * s_enc
        six, four = e4m3_code(base), e4m3_code(base * 1.5)
        ok = valid & finite
        better = _error_in_order(x_ptr, p, ok, e4m3_value(four), inv) < _error_in_order(
            x_ptr, p, ok, e4m3_value(six), inv
        )
        byte = tl.where(better, four, six)
    else:
        byte = e4m3_code(amax * tl.div_rn(s_enc, 6.0))
    scale = e4m3_value(byte)
    codes = e2m1_code(x * _encode_factor(scale, inv)[:, None])
    codes = tl.where((finite & (scale != 0.0))[:, None], codes, 0)  # nothing survives a scale of 0
    low, high = tl.split(tl.reshape(codes, (BLOCKS, 8, 2)))

    q_offs = p[:, None] * 8 + tl.arange(0, 8)[None, :]
    tl.store(q_ptr + q_offs, (low | (high << 4)).to(tl.uint8), mask=valid[:, None])
    byte = tl.where(finite, byte, 0x7F)
    tl.store(scale_ptr + to, tl.where(valid, byte, 0).to(tl.uint8), mask=inside)


def nvfp4_quantize(
    x: Tensor,
    global_scale: Tensor | None = None,
    hadamard: Tensor | None = None,
    seed: Tensor | None = None,
    *,
    rounding: str = "nearest",
    four_over_six: bool = False,
    block: str = "1x16",
    scale_layout: str = "linear",
) -> tuple[Tensor, Tensor, Tensor]:
    if rounding != "nearest" or block != "1x16" or hadamard is not None:
        raise NotImplementedError("n3::nvfp4_quantize: the Triton kernel rounds to nearest in 1x16 blocks, unrotated")
    x = x.contiguous()
    *lead, k = x.shape
    ks = k // 16
    rows = x.numel() // k if k else 0
    swizzled = scale_layout == "128x4"
    grid_rows, grid_ks = (triton.cdiv(rows, 128) * 128, triton.cdiv(ks, 4) * 4) if swizzled else (rows, ks)
    q = x.new_empty((*lead, k // 2), dtype=torch.uint8)
    scale = x.new_empty((grid_rows, grid_ks) if swizzled else (*lead, ks), dtype=torch.float8_e4m3fn)
    global_out = x.new_empty((), dtype=torch.float32)
    if rows * ks == 0:
        return q, scale, global_out.copy_(1.0 if global_scale is None else global_scale.reshape(()))

    given, partial, num_partials = global_scale, None, 0
    with guard(x):
        if given is None:
            num_partials = min(triton.cdiv(x.numel(), AMAX_BLOCK), PARTIALS)
            partial = x.new_empty(num_partials, dtype=torch.float32)
            _amax_kernel[(num_partials,)](x, partial, rows * ks, BLOCK=AMAX_BLOCK)
        _quantize_kernel[(triton.cdiv(grid_rows * grid_ks, BLOCKS),)](
            x, q, scale.view(torch.uint8), given, partial, num_partials, global_out, rows, ks,
            FOUR_OVER_SIX=four_over_six, SWIZZLED=swizzled, PARTIALS=PARTIALS, BLOCKS=BLOCKS, num_warps=4,
            enable_fp_fusion=False,
        )  # fmt: skip
    return q, scale, global_out


def compile_cases(arch: int):
    for dtype in ("fp32", "fp16", "bf16"):
        yield Case(f"amax-{dtype}", _amax_kernel, {"x_ptr": f"*{dtype}", "partial_ptr": "*fp32", "blocks": "i32"},
                   {"BLOCK": AMAX_BLOCK})  # fmt: skip
        for four_over_six in (False, True):
            types = {"x_ptr": f"*{dtype}", "q_ptr": "*u8", "scale_ptr": "*u8", "num_partials": "i32",
                     "global_out_ptr": "*fp32", "rows": "i32", "ks": "i32"}  # fmt: skip
            given = {"global_ptr": "*fp32"} if four_over_six else {"partial_ptr": "*fp32"}
            absent = {"partial_ptr": None} if four_over_six else {"global_ptr": None}
            sizes = {"SWIZZLED": four_over_six, "PARTIALS": PARTIALS, "BLOCKS": BLOCKS}
            yield Case(f"quantize-{dtype}-{'4/6' if four_over_six else '6'}", _quantize_kernel, {**types, **given},
                       {"FOUR_OVER_SIX": four_over_six, **absent, **sizes},
                       {"num_warps": 4, "enable_fp_fusion": False})  # fmt: skip
