"""nvfp4_linear: y = act(x W^T * global_scale + bias) with W = e2m1 * e4m3, any number of rows, sums in float32.

The decoded weights have at most 6 significant bits and go into bfloat16, float16 and float32 operands without an error.
The power of two in the global scale goes into them too, except into float16, which has not the range: the sum of huge
activations would otherwise overflow although the scaled result does not.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import Case, architecture, batch_invariant, dot, guard, narrow, on_row_of, widen
from .numerics import e2m1_pair, e4m3_value, power_of_two

__all__ = ["TABLE", "Config", "compile_cases", "config_for", "nvfp4_linear"]


@triton.jit
def _split_global(global_ptr, FOLD: tl.constexpr):
    """The global scale as a factor of the weights, with the 2^14 that e2m1_pair left out, and one of the output."""
    scale = tl.load(global_ptr)
    if FOLD:
        e = ((scale.to(tl.int32, bitcast=True) >> 23) & 0xFF) - 127
        e = tl.minimum(tl.maximum(e, -100), 100)
        return power_of_two(e + 14), scale * power_of_two(-e)
    else:
        return 16384.0, scale


@triton.jit
def _finish(acc, rest, bias_ptr, offs_n, mask_n, RELU2: tl.constexpr, dtype: tl.constexpr):
    y = acc * rest
    if bias_ptr is not None:
        y += widen(tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0))
    if RELU2:
        y = tl.where(y < 0.0, 0.0, y)  # NaN stays
        y = y * y
    return narrow(y, dtype)


# ---------------------------------------------------------------- one row of x


@triton.jit(do_not_specialize=["n", "ks"])
def _gemv_kernel(
    x_ptr, q_ptr, scale_ptr, global_ptr, bias_ptr, y_ptr,
    n,
    ks,  # scales per row; k = 16 * ks
    RELU2: tl.constexpr, FOLD: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_KS: tl.constexpr,
):  # fmt: skip
    """Grid (pieces of n, rows of x): every thread sums its own weights, one tree adds the threads' sums.

    The tile is three-dimensional, [row, scale block, byte], so that a scale meets its 8 bytes by broadcasting.
    """
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < n
    row = offs_n.to(tl.int64) * ks  # int64: n * k passes 2^31
    x_row = x_ptr + tl.program_id(1).to(tl.int64) * ks * 16
    power, rest = _split_global(global_ptr, FOLD)

    byte = tl.arange(0, 8)
    acc = tl.zeros((BLOCK_N, BLOCK_KS, 8), tl.float32)
    for start in range(0, ks, BLOCK_KS):
        offs_ks = start + tl.arange(0, BLOCK_KS)
        mask_ks = offs_ks < ks
        mask = mask_n[:, None] & mask_ks[None, :]
        at = row[:, None] + offs_ks[None, :]
        x = tl.load(x_row + offs_ks[:, None] * 16 + tl.arange(0, 16)[None, :], mask=mask_ks[:, None], other=0.0)
        even, odd = tl.split(tl.reshape(widen(x), (BLOCK_KS, 8, 2)))
        factor = e4m3_value(tl.load(scale_ptr + at, mask=mask, other=0)) * power
        low, high = e2m1_pair(tl.load(q_ptr + at[:, :, None] * 8 + byte[None, None, :], mask=mask[:, :, None], other=0))
        acc = tl.fma(low * factor[:, :, None], even[None, :, :], acc)
        acc = tl.fma(high * factor[:, :, None], odd[None, :, :], acc)

    total = tl.sum(tl.sum(acc, axis=2), axis=1)
    y = _finish(total, rest, bias_ptr, offs_n, mask_n, RELU2, y_ptr.dtype.element_ty)
    tl.store(y_ptr + tl.program_id(1).to(tl.int64) * n + offs_n, y, mask=mask_n)


# ---------------------------------------------------------------- tiles on the tensor cores


@triton.jit
def _step(x_ptr, q_ptr, scale_ptr, x_row, w_row, mask_m, mask_n, start, ks, power, acc, BLOCK_KS: tl.constexpr):
    """acc + x W^T over the scale blocks from ``start`` on."""
    cols = tl.arange(0, 16 * BLOCK_KS)
    x = tl.load(
        x_ptr + (x_row + start)[:, None] * 16 + cols[None, :],
        mask=mask_m[:, None] & (cols < (ks - start) * 16)[None, :], other=0.0,
    )  # fmt: skip
    blocks = tl.arange(0, BLOCK_KS)
    at = (w_row + start)[:, None] + blocks[None, :]
    mask = mask_n[:, None] & (blocks < ks - start)[None, :]
    factor = e4m3_value(tl.load(scale_ptr + at, mask=mask, other=0)) * power
    low, high = e2m1_pair(
        tl.load(q_ptr + at[:, :, None] * 8 + tl.arange(0, 8)[None, None, :], mask=mask[:, :, None], other=0)
    )
    w = tl.join(low * factor[:, :, None], high * factor[:, :, None])  # [n, block, byte, nibble]: k in order
    w = tl.reshape(w.to(x.dtype), (mask_n.shape[0], 16 * BLOCK_KS))
    return dot(x, tl.trans(w), acc)


@triton.jit(do_not_specialize=["m", "n", "ks"])
def _tile_kernel(
    x_ptr, q_ptr, scale_ptr, global_ptr, bias_ptr, y_ptr,
    m, n,
    ks,  # scales per row; k = 16 * ks
    RELU2: tl.constexpr, FOLD: tl.constexpr,
    CHUNK: tl.constexpr,  # steps that are summed apart before they join the total; 0: one sum
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_KS: tl.constexpr,
):  # fmt: skip
    """One program per tile of y, neighbours in m first, so that the programs of a wave share weights in L2.

    In float32 a single chain of 2688 additions costs a relative 9e-7, two levels of 64 about 2e-7.
    """
    tiles_m = tl.cdiv(m, BLOCK_M)
    pid = tl.program_id(0)
    offs_m = (pid % tiles_m).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # int64: m * k, n * k, m * n pass 2^31
    offs_n = (pid // tiles_m).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < m, offs_n < n
    x_row, w_row = offs_m * ks, offs_n * ks
    power, rest = _split_global(global_ptr, FOLD)

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if CHUNK == 0:
        for start in range(0, ks, BLOCK_KS):
            acc = _step(x_ptr, q_ptr, scale_ptr, x_row, w_row, mask_m, mask_n, start, ks, power, acc, BLOCK_KS)
    else:
        for chunk in range(0, ks, CHUNK * BLOCK_KS):
            part = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for start in range(chunk, tl.minimum(chunk + CHUNK * BLOCK_KS, ks), BLOCK_KS):
                part = _step(x_ptr, q_ptr, scale_ptr, x_row, w_row, mask_m, mask_n, start, ks, power, part, BLOCK_KS)
            acc += part

    y = _finish(acc, rest, bias_ptr, offs_n, mask_n, RELU2, y_ptr.dtype.element_ty)
    tl.store(y_ptr + offs_m[:, None] * n + offs_n[None, :], y, mask=mask_m[:, None] & mask_n[None, :])


# ---------------------------------------------------------------- choice


@dataclass(frozen=True)
class Config:
    """One way to run the operator: tiles of ``block_m`` rows of x (0: one row at a time, without tensor cores)."""

    block_m: int
    block_n: int
    block_ks: int  # scale blocks of 16 elements
    warps: int
    stages: int


# {architecture: {largest number of rows of x: configuration}}; the last serves every larger number. Chosen for the
# shapes of Nemotron 3 (n 1856 to 10304, k 2688 to 4096) so that one wave of programs covers the device; not tuned.
_ROWS_90 = {
    1: Config(0, 8, 32, 4, 3),
    16: Config(16, 32, 8, 4, 4),
    32: Config(32, 32, 8, 4, 4),
    64: Config(64, 64, 8, 4, 3),
    128: Config(128, 64, 4, 8, 3),
    1 << 62: Config(128, 128, 4, 8, 3),
}
TABLE = {80: _ROWS_90, 90: _ROWS_90, 100: _ROWS_90, 120: _ROWS_90}
# float32 multiplies by FMA, which wants more threads per element and no stages of shared memory.
FLOAT32 = {1: Config(0, 8, 32, 4, 2), 1 << 62: Config(32, 32, 2, 4, 2)}
CHUNK_K = 64  # terms of a partial sum in float32
INVARIANT_ROWS = 64  # in batch-invariant mode every number of rows runs as this one


def config_for(arch: int, dtype: torch.dtype, m: int, invariant: bool = False) -> Config:
    rows = FLOAT32 if dtype == torch.float32 else on_row_of(TABLE, arch)
    wanted = INVARIANT_ROWS if invariant else m
    return rows[min(limit for limit in rows if limit >= wanted)]


def _constexprs(config: Config, dtype: torch.dtype, relu2: bool) -> dict[str, object]:
    common = {"RELU2": relu2, "FOLD": dtype != torch.float16}
    if config.block_m == 0:
        return {**common, "BLOCK_N": config.block_n, "BLOCK_KS": config.block_ks}
    chunk = CHUNK_K // (16 * config.block_ks) if dtype == torch.float32 else 0
    tile = {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_KS": config.block_ks}
    return {**common, "CHUNK": chunk, **tile}


def nvfp4_linear(
    x: Tensor,
    q: Tensor,
    block_scale: Tensor,
    global_scale: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    x, q, scale = x.contiguous(), q.contiguous(), block_scale.contiguous().view(torch.uint8)
    bias = bias if bias is None else bias.contiguous()
    n, ks = q.shape[0], x.shape[-1] // 16
    y = x.new_empty((*x.shape[:-1], n))
    if y.numel() == 0:
        return y
    m = y.numel() // n
    config = config_for(architecture(x), x.dtype, m, batch_invariant())
    options = {
        **_constexprs(config, x.dtype, activation == "relu2"),
        "num_warps": config.warps, "num_stages": config.stages, "enable_fp_fusion": False,
    }  # fmt: skip
    with guard(x):
        if config.block_m == 0:
            grid = (triton.cdiv(n, config.block_n), m)
            _gemv_kernel[grid](x, q, scale, global_scale, bias, y, n, ks, **options)
        else:
            grid = (triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n),)
            _tile_kernel[grid](x, q, scale, global_scale, bias, y, m, n, ks, **options)
    return y


def compile_cases(arch: int):
    for name, dtype in (("fp32", torch.float32), ("fp16", torch.float16), ("bf16", torch.bfloat16)):
        rows = FLOAT32 if dtype == torch.float32 else on_row_of(TABLE, arch)
        for config in dict.fromkeys(rows.values()):
            plain = config.block_m == 0
            types = {"x_ptr": f"*{name}", "q_ptr": "*u8", "scale_ptr": "*u8", "global_ptr": "*fp32",
                     "bias_ptr": f"*{name}", "y_ptr": f"*{name}", "n": "i32", "ks": "i32"}  # fmt: skip
            yield Case(
                f"linear-{name}-{config.block_m}x{config.block_n}x{16 * config.block_ks}",
                _gemv_kernel if plain else _tile_kernel,
                types if plain else {**types, "m": "i32"},
                _constexprs(config, dtype, relu2=True),
                {"num_warps": config.warps, "num_stages": config.stages, "enable_fp_fusion": False},
            )
