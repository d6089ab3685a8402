"""nvfp4_linear_fp8 (W4A8): y = act((sum x8 w8) * sx * (2^p * global_scale) + bias) on the tensor cores of 8-bit floats.

Three kernels: rows of x become e4m3 with a float32 scale each; rows of W get the power of two 2^p that brings their
largest block scale under 448 / 6; the product decodes codes times block scales times 2^-p, exactly in float32, and
rounds them to e4m3 in registers by the conversion instruction. (Looked up in a table of 8 bytes for each block scale,
as only codes 1.5, 3 and 6 round, a weight would cost fewer instructions; that needs byte permutations.)

On sm_90 the tensor cores add 8-bit products with some 14 bits: the sum moves to float32 registers every 128 terms.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import INTERPRET, Case, architecture, batch_invariant, device_function, guard, narrow, on_row_of, widen
from .numerics import e2m1_pair, e4m3_code, e4m3_value, power_of_two

__all__ = ["TABLE", "Config", "compile_cases", "config_for", "nvfp4_linear_fp8"]

BLOCK_K = 128  # terms that sm_90 adds before the sum moves


# ---------------------------------------------------------------- rows of x and of W


@triton.jit(do_not_specialize=["k"])
def _rows_kernel(
    x_ptr,
    codes_ptr,  # e4m3 [m, k]
    scale_ptr,  # float32 [m]
    k, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (m). A row with a NaN or an infinity gets the scale NaN, and codes of no meaning."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    largest = tl.zeros((BLOCK,), tl.int32)  # bits of |x|: in the order of the values, infinity and NaN last
    for start in range(0, k, BLOCK):
        x = widen(tl.load(x_ptr + row * k + start + cols, mask=cols < k - start, other=0.0))
        largest = tl.maximum(largest, x.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    bits = tl.max(largest, axis=0)
    scale = tl.div_rn(bits.to(tl.float32, bitcast=True), 448.0)
    finite = bits < 0x7F800000
    scale = tl.where((scale > 0.0) & finite, scale, 1.0)
    tl.store(scale_ptr + row, tl.where(finite, scale, float("nan")))
    for start in range(0, k, BLOCK):
        mask = cols < k - start
        x = widen(tl.load(x_ptr + row * k + start + cols, mask=mask, other=0.0))
        tl.store(codes_ptr + row * k + start + cols, e4m3_code(tl.div_rn(x, scale)).to(tl.uint8), mask=mask)


@triton.jit(do_not_specialize=["n", "ks"])
def _exponents_kernel(
    scale_ptr,  # e4m3 [n, ks]
    global_ptr,
    inverse_ptr,  # float32 [n]: 2^-p
    factor_ptr,  # float32 [n]: 2^p * global scale; NaN where a block scale is
    n, ks, BLOCK_N: tl.constexpr, BLOCK_KS: tl.constexpr,
):  # fmt: skip
    """Grid (pieces of n)."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = tl.arange(0, BLOCK_KS)
    largest = tl.zeros((BLOCK_N, BLOCK_KS), tl.int32)  # bytes of |s|, in the order of the values
    nan = tl.zeros((BLOCK_N, BLOCK_KS), tl.int32)
    for start in range(0, ks, BLOCK_KS):
        mask = (row < n)[:, None] & (cols < ks - start)[None, :]
        byte = tl.load(scale_ptr + (row * ks + start)[:, None] + cols[None, :], mask=mask, other=0).to(tl.int32) & 0x7F
        nan = tl.maximum(nan, (byte == 0x7F).to(tl.int32))
        largest = tl.maximum(largest, tl.where(byte == 0x7F, 0, byte))
    byte = tl.max(largest, axis=1)
    bits = e4m3_value(byte).to(tl.int32, bitcast=True)
    # 6 times 1.125 * 2^6 is 432, and 1.25 * 2^6 the next scale.
    p = (bits >> 23) - 133 + ((bits & 0x7FFFFF) > 0x100000).to(tl.int32)
    p = tl.where(byte == 0, 0, p)
    factor = tl.load(global_ptr) * power_of_two(p)
    tl.store(inverse_ptr + row, power_of_two(-p), mask=row < n)
    tl.store(factor_ptr + row, tl.where(tl.max(nan, axis=1) > 0, float("nan"), factor), mask=row < n)


# ---------------------------------------------------------------- product


@device_function
def _product(x, w, acc, BLOCK_K: tl.constexpr):
    """acc + x w^T; x are e4m3 numbers, under the interpreter their bytes, w float32 numbers still to be rounded."""
    if INTERPRET:  # which converts the NaN of e4m3 wrongly
        return acc + tl.dot(e4m3_value(x), tl.trans(e4m3_value(e4m3_code(w))), input_precision="ieee")
    else:
        return tl.dot(x, tl.trans(w.to(tl.float8e4nv)), acc, max_num_imprecise_acc=BLOCK_K)


@triton.jit(do_not_specialize=["m", "n", "steps"])
def _product_kernel(
    x_ptr,  # e4m3 [m, k]
    q_ptr, scale_ptr,
    inverse_ptr,  # [n], of _exponents_kernel
    sx_ptr,  # [m]
    factor_ptr,  # [n]
    bias_ptr, y_ptr,
    m, n,
    steps,  # scales per row are steps * STEP, k is 16 times that
    RELU2: tl.constexpr,
    STEP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program per tile of y, neighbours in m first, so that the programs of a wave share weights in L2."""
    ks = steps * STEP
    tiles_m = tl.cdiv(m, BLOCK_M)
    pid = tl.program_id(0)
    offs_m = (pid % tiles_m).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # int64: m * k, n * k, m * n pass 2^31
    offs_n = (pid // tiles_m).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < m, offs_n < n
    inverse = tl.load(inverse_ptr + offs_n, mask=mask_n, other=0.0) * 16384.0  # 2^14, which e2m1_pair leaves out
    if not INTERPRET:
        x_ptr = x_ptr.to(tl.pointer_type(tl.float8e4nv))

    BLOCK_KS: tl.constexpr = BLOCK_K // 16
    cols, byte, block = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_K // 2), tl.arange(0, BLOCK_KS)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, ks, BLOCK_KS):
        left = ks - start
        x = tl.load(
            x_ptr + ((offs_m * ks + start) * 16)[:, None] + cols[None, :],
            mask=mask_m[:, None] & (cols < left * 16)[None, :], other=0.0,
        )  # fmt: skip
        q = tl.load(
            q_ptr + ((offs_n * ks + start) * 8)[:, None] + byte[None, :],
            mask=mask_n[:, None] & (byte < left * 8)[None, :], other=0,
        )  # fmt: skip
        scale = tl.load(
            scale_ptr + (offs_n * ks + start)[:, None] + block[None, :],
            mask=mask_n[:, None] & (block < left)[None, :], other=0,
        )  # fmt: skip
        factor = (e4m3_value(scale) * inverse[:, None])[:, :, None]
        low, high = e2m1_pair(tl.reshape(q, (BLOCK_N, BLOCK_KS, 8)))
        w = tl.reshape(tl.join(low * factor, high * factor), (BLOCK_N, BLOCK_K))  # [n, block, byte, nibble]: k in order
        acc = _product(x, w, acc, BLOCK_K)

    y = acc * tl.load(sx_ptr + offs_m, mask=mask_m, other=0.0)[:, None]
    y *= tl.load(factor_ptr + offs_n, mask=mask_n, other=0.0)[None, :]
    if bias_ptr is not None:
        y += widen(tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0))[None, :]
    if RELU2:
        y = tl.where(y < 0.0, 0.0, y)  # NaN stays
        y = y * y
    y = narrow(y, y_ptr.dtype.element_ty)
    tl.store(y_ptr + offs_m[:, None] * n + offs_n[None, :], y, mask=mask_m[:, None] & mask_n[None, :])


# ---------------------------------------------------------------- choice


@dataclass(frozen=True)
class Config:
    """Tiles of ``block_m`` rows of x by ``block_n`` rows of W, BLOCK_K terms at a time."""

    block_m: int
    block_n: int
    warps: int
    stages: int


# {architecture: {largest number of rows of x: configuration}}; the last serves every larger number. Chosen by
# arithmetic, not tuned on hardware: below some 80 rows the product reads weights and has nothing to gain from 8 bits.
_ROWS = {
    16: Config(16, 64, 4, 4),
    64: Config(64, 64, 4, 3),
    1 << 62: Config(128, 64, 8, 4),
}
TABLE = {90: _ROWS, 100: _ROWS, 120: _ROWS}
INVARIANT_ROWS = 64  # in batch-invariant mode every number of rows runs as this one
ROWS = {"BLOCK": 1024}
EXPONENTS = {"BLOCK_N": 16, "BLOCK_KS": 128}
PLAIN = {"num_warps": 4, "enable_fp_fusion": False}  # options of the kernels of rows


def config_for(arch: int, rows: int, invariant: bool = False) -> Config:
    limits = on_row_of(TABLE, arch)
    wanted = INVARIANT_ROWS if invariant else rows
    return limits[min(limit for limit in limits if limit >= wanted)]


def _constexprs(config: Config, ks: int, relu2: bool) -> dict[str, object]:
    # ks is not specialised. Counted in steps it tells the compiler how many bytes may be loaded at once.
    step = next(step for step in (4, 2, 1) if ks % step == 0)
    return {"RELU2": relu2, "STEP": step, "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": BLOCK_K}


def _options(config: Config) -> dict[str, object]:
    return {"num_warps": config.warps, "num_stages": config.stages, "enable_fp_fusion": False}


def _quantized_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    m, k = x.shape
    codes, scale = x.new_empty((m, k), dtype=torch.uint8), x.new_empty(m, dtype=torch.float32)
    _rows_kernel[(m,)](x, codes, scale, k, **ROWS, **PLAIN)
    return codes, scale


def _row_factors(scale: Tensor, global_scale: Tensor) -> tuple[Tensor, Tensor]:
    n, ks = scale.shape
    inverse, factor = scale.new_empty((2, n), dtype=torch.float32)
    grid = (triton.cdiv(n, EXPONENTS["BLOCK_N"]),)
    _exponents_kernel[grid](scale, global_scale, inverse, factor, n, ks, **EXPONENTS, **PLAIN)
    return inverse, factor


def nvfp4_linear_fp8(
    x: Tensor,
    q: Tensor,
    block_scale: Tensor,
    global_scale: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    n, k = q.shape[0], x.shape[-1]
    y = x.new_empty((*x.shape[:-1], n))
    if y.numel() == 0:
        return y
    rows, q, scale = x.reshape(-1, k).contiguous(), q.contiguous(), block_scale.contiguous().view(torch.uint8)
    bias = bias if bias is None else bias.contiguous()
    m = rows.shape[0]
    config = config_for(architecture(x), m, batch_invariant())
    constexprs = _constexprs(config, k // 16, activation == "relu2")
    with guard(x):
        codes, sx = _quantized_rows(rows)
        inverse, factor = _row_factors(scale, global_scale)
        _product_kernel[(triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n),)](
            codes, q, scale, inverse, sx, factor, bias, y, m, n, k // 16 // constexprs["STEP"],
            **constexprs, **_options(config),
        )  # fmt: skip
    return y


# ---------------------------------------------------------------- compiled without a GPU


def compile_cases(arch: int):
    operands = {"q_ptr": "*u8", "scale_ptr": "*u8", "inverse_ptr": "*fp32", "sx_ptr": "*fp32", "factor_ptr": "*fp32"}
    for config in on_row_of(TABLE, arch).values():
        for name in ("bf16", "fp32"):
            types = {"x_ptr": "*u8", **operands, "bias_ptr": f"*{name}", "y_ptr": f"*{name}"}
            types |= dict.fromkeys(("m", "n", "steps"), "i32")
            yield Case(
                f"linear_fp8-{name}-{config.block_m}x{config.block_n}", _product_kernel, types,
                _constexprs(config, 168, relu2=True), _options(config),
            )  # fmt: skip
    for name in ("bf16", "fp16", "fp32"):
        yield Case(
            f"rows-{name}", _rows_kernel,
            {"x_ptr": f"*{name}", "codes_ptr": "*u8", "scale_ptr": "*fp32", "k": "i32"},
            ROWS, PLAIN,
        )  # fmt: skip
    yield Case(
        "exponents", _exponents_kernel,
        {"scale_ptr": "*u8", "global_ptr": "*fp32", "inverse_ptr": "*fp32", "factor_ptr": "*fp32",
         "n": "i32", "ks": "i32"},
        EXPONENTS, PLAIN,
    )  # fmt: skip
