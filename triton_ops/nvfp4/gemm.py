"""nvfp4_gemm and nvfp4_grouped_gemm: y = (a b^T) * a_global * b_global + bias of NVFP4 matrices, sums in float32.

Where tensor cores multiply NVFP4 (sm_100: ``tcgen05.mma kind::mxf4nvf4``, sm_120: ``mma.sync kind::mxf4nvf4``), codes
and block scales go to them as they are. Elsewhere both operands are decoded into bfloat16, which holds ``e2m1 * e4m3``
exactly. The tensor cores take block scales as unsigned numbers; no quantiser makes a negative one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import Case, architecture, batch_invariant, device_function, dot, guard, narrow, on_row_of, widen
from ..moe.grouped_plan import tiles_of
from ..moe.grouped_tiles import rows_of
from .numerics import e2m1_pair, e4m3_value, scale_128x4

__all__ = ["TABLE", "Config", "compile_cases", "config_for", "nvfp4_gemm", "nvfp4_grouped_gemm"]


# ---------------------------------------------------------------- operands


@device_function
def _scale_rows(row, ks, TILED: tl.constexpr):
    """Where the scales of a row begin; `scale_128x4` is a sum of a row's and of a column's part."""
    return scale_128x4(row, 0, ks) if TILED else row * ks


@device_function
def _codes(q_ptr, row, mask, start, ks, BLOCK_KS: tl.constexpr):
    """Packed codes ``[rows, 8 * BLOCK_KS]`` of the blocks from ``start`` on."""
    byte = tl.arange(0, 8 * BLOCK_KS)
    at = (row * ks)[:, None] * 8 + (start * 8 + byte)[None, :]
    return tl.load(q_ptr + at, mask=mask[:, None] & (byte < (ks - start) * 8)[None, :], other=0)


@device_function
def _scales(scale_ptr, scale_row, mask, start, ks, TILED: tl.constexpr, BLOCK_KS: tl.constexpr):
    """Bytes ``[rows, BLOCK_KS]``; 0, a scale of 0, beyond the last block. What pads the tiles is not read."""
    block = start + tl.arange(0, BLOCK_KS)
    column = scale_128x4(0, block, ks) if TILED else block
    at = scale_row[:, None] + column[None, :]
    return tl.load(scale_ptr + at, mask=mask[:, None] & (block < ks)[None, :], other=0)


@device_function
def _decoded(codes, scales, ROWS: tl.constexpr, BLOCK_KS: tl.constexpr):
    """bfloat16 ``[rows, 16 * BLOCK_KS]``, exactly."""
    low, high = e2m1_pair(tl.reshape(codes, (ROWS, BLOCK_KS, 8)))
    factor = (e4m3_value(scales) * 16384.0)[:, :, None]  # 2^14, which e2m1_pair has left out
    values = tl.join(low * factor, high * factor)  # [row, block, byte, nibble]: k in order
    return narrow(tl.reshape(values, (ROWS, 16 * BLOCK_KS)), tl.bfloat16)


@device_function
def _multiply(
    x_codes, x_scales, w_codes, w_scales, acc,
    NATIVE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_KS: tl.constexpr,
):  # fmt: skip
    """acc + x w^T."""
    if NATIVE:
        return tl.dot_scaled(
            x_codes, x_scales.to(tl.float8e4nv, bitcast=True), "e2m1",
            tl.trans(w_codes), w_scales.to(tl.float8e4nv, bitcast=True), "e2m1", acc,
        )  # fmt: skip
    else:
        x = _decoded(x_codes, x_scales, ROWS, BLOCK_KS)
        w = _decoded(w_codes, w_scales, COLUMNS, BLOCK_KS)
        return dot(x, tl.trans(w), acc)


# ---------------------------------------------------------------- kernel


@triton.jit(do_not_specialize=["m", "n", "steps", "groups"])
def _gemm_kernel(
    a_ptr, a_scale_ptr, a_global_ptr, b_ptr, b_scale_ptr, b_global_ptr,
    bias_ptr,  # or None
    table_ptr,  # tiles of rows of the groups, or None: one product
    y_ptr,
    m, n,
    steps,  # scales per row are steps * STEP, k is 16 times that
    groups,
    A_PER_ROW: tl.constexpr, B_PER_ROW: tl.constexpr,  # global scales
    A_TILED: tl.constexpr, B_TILED: tl.constexpr,  # block scales in 128x4 tiles
    NATIVE: tl.constexpr,  # on tensor cores that multiply NVFP4
    SWAP: tl.constexpr,  # rows of b are those of the instruction
    STEP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_KS: tl.constexpr,
):  # fmt: skip
    """One program per tile of y. Of one product neighbours in m come first, and share b in L2; of groups, neighbours
    in n, which share their few rows of a.

    sm_100 multiplies 128 rows at a time: a few rows of a are its columns then, with SWAP.
    """
    ks = steps * STEP
    pid = tl.program_id(0)
    offs_b = tl.arange(0, BLOCK_N)
    if table_ptr is None:
        tiles_m = tl.cdiv(m, BLOCK_M)
        row = pid % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
        live = row < m
        read = live
        offs_n = pid // tiles_m * BLOCK_N + offs_b
        first = 0
        last = ks
        b_at = b_ptr
        b_scale_at = b_scale_ptr
    else:
        pieces = tl.cdiv(n, BLOCK_N)
        group, row, live, _, read = rows_of(table_ptr, None, pid // pieces, m, 1, groups, BLOCK_M)
        if group < 0:
            return
        offs_n = pid % pieces * BLOCK_N + offs_b
        last = tl.where(group < groups, ks, 0)
        first = tl.where(group < groups, group, 0).to(tl.int64)  # int64: groups * n * k passes 2^31
        b_at = b_ptr + first * n * ks * 8
        padded = tl.cdiv(n, 128) * tl.cdiv(ks, 4) * 512 if B_TILED else n * ks
        b_scale_at = b_scale_ptr + first * padded
    mask_n = offs_n < n
    a_row, b_row = row.to(tl.int64), offs_n.to(tl.int64)  # int64: m * k, n * k and m * n pass 2^31

    a_scale_row, b_scale_row = _scale_rows(a_row, ks, A_TILED), _scale_rows(b_row, ks, B_TILED)

    acc = tl.zeros((BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, last, BLOCK_KS):
        a = _codes(a_ptr, a_row, read, start, ks, BLOCK_KS)
        a_scale = _scales(a_scale_ptr, a_scale_row, read, start, ks, A_TILED, BLOCK_KS)
        b = _codes(b_at, b_row, mask_n, start, ks, BLOCK_KS)
        b_scale = _scales(b_scale_at, b_scale_row, mask_n, start, ks, B_TILED, BLOCK_KS)
        if SWAP:
            acc = _multiply(b, b_scale, a, a_scale, acc, NATIVE, BLOCK_N, BLOCK_M, BLOCK_KS)
        else:
            acc = _multiply(a, a_scale, b, b_scale, acc, NATIVE, BLOCK_M, BLOCK_N, BLOCK_KS)

    y = tl.trans(acc) if SWAP else acc
    if A_PER_ROW:
        y *= tl.load(a_global_ptr + a_row, mask=read, other=0.0)[:, None]
    else:
        y *= tl.load(a_global_ptr)
    if B_PER_ROW:
        y *= tl.load(b_global_ptr + b_row, mask=mask_n, other=0.0)[None, :]
    else:
        y *= tl.load(b_global_ptr + first)
    if bias_ptr is not None:
        y += widen(tl.load(bias_ptr + b_row, mask=mask_n, other=0.0))[None, :]
    y_at = y_ptr + (a_row * n)[:, None] + b_row[None, :]
    tl.store(y_at, narrow(y, y_ptr.dtype.element_ty), mask=live[:, None] & mask_n[None, :])


# ---------------------------------------------------------------- choice


@dataclass(frozen=True)
class Config:
    """Tiles of ``block_m`` rows of a by ``block_n`` rows of b, ``block_ks`` block scales at a time."""

    block_m: int
    block_n: int
    block_ks: int
    warps: int
    stages: int
    native: bool = False
    swap: bool = False

    def __post_init__(self) -> None:
        # On sm_90 Triton miscompiles a product in a pipelined loop whose left operand is computed in registers.
        pipelined_wgmma = not self.native and self.stages > 1 and self.warps % 4 == 0 and self.block_m % 64 == 0
        assert not pipelined_wgmma, "a pipelined product with a decoded left operand is miscompiled on sm_90"


LAST = 1 << 62

# {architecture: {largest number of rows of a (mean per group): configuration}}; the last serves every larger number.
# Chosen by arithmetic for the shapes of Nemotron 3, not tuned on hardware: up to 32 rows a product reads b and nothing
# else, so narrow tiles and deep pipelines. tcgen05 multiplies 128 rows at a time, mma.sync 16.
_DECODED = {
    16: Config(16, 32, 8, 4, 4),
    32: Config(32, 32, 8, 4, 4),
    64: Config(64, 64, 8, 4, 1),
    LAST: Config(128, 128, 4, 8, 1),
}
_TCGEN05 = {
    16: Config(16, 128, 16, 4, 4, native=True, swap=True),
    32: Config(32, 128, 16, 4, 4, native=True, swap=True),
    64: Config(64, 128, 16, 4, 4, native=True, swap=True),
    LAST: Config(128, 128, 8, 8, 4, native=True),  # of groups it spills 32 bytes; with 4 warps the dense one does
}
_MMA_SYNC = {
    16: Config(16, 64, 16, 4, 4, native=True),
    32: Config(32, 64, 16, 4, 4, native=True),
    64: Config(64, 64, 8, 4, 4, native=True),
    LAST: Config(128, 128, 8, 8, 3, native=True),
}
TABLE = {80: _DECODED, 90: _DECODED, 100: _TCGEN05, 120: _MMA_SYNC}
INVARIANT_ROWS = 64  # in batch-invariant mode every number of rows runs as this one


def config_for(arch: int, rows: int, groups: int = 1, invariant: bool = False) -> Config:
    """The configuration for ``rows`` rows over ``groups`` groups, numbers that the host knows."""
    limits = on_row_of(TABLE, arch)
    wanted = INVARIANT_ROWS if invariant else triton.cdiv(rows, max(groups, 1))
    return limits[min(limit for limit in limits if limit >= wanted)]


def _constexprs(config: Config, ks: int) -> dict[str, object]:
    # ks is not specialised. Counted in steps it tells the compiler how many bytes may be loaded at once.
    step = next(step for step in (4, 2, 1) if ks % step == 0)
    tile = {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_KS": config.block_ks}
    return {"NATIVE": config.native, "SWAP": config.swap, "STEP": step, **tile}


def _options(config: Config) -> dict[str, object]:
    return {"num_warps": config.warps, "num_stages": config.stages, "enable_fp_fusion": False}


def _operand(q: Tensor, scale: Tensor, global_scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return q.contiguous(), scale.contiguous().view(torch.uint8), global_scale.contiguous()


def nvfp4_gemm(
    a: Tensor,
    a_scale: Tensor,
    a_global: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_global: Tensor,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype,
    a_layout: str = "linear",
    b_layout: str = "linear",
) -> Tensor:
    m, n, ks = a.shape[0], b.shape[0], a.shape[1] // 8
    y = a.new_empty((m, n), dtype=out_dtype)
    if y.numel() == 0:
        return y
    config = config_for(architecture(a), m, invariant=batch_invariant())
    constexprs = _constexprs(config, ks)
    bias = bias if bias is None else bias.contiguous()
    with guard(a):
        _gemm_kernel[(triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n),)](
            *_operand(a, a_scale, a_global), *_operand(b, b_scale, b_global), bias, None, y,
            m, n, ks // constexprs["STEP"], 0,
            A_PER_ROW=a_global.numel() > 1, B_PER_ROW=b_global.numel() > 1,
            A_TILED=a_layout == "128x4", B_TILED=b_layout == "128x4", **constexprs, **_options(config),
        )  # fmt: skip
    return y


def nvfp4_grouped_gemm(
    a: Tensor,
    a_scale: Tensor,
    a_global: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_global: Tensor,
    offsets: Tensor,
    *,
    out_dtype: torch.dtype,
    b_layout: str = "linear",
) -> Tensor:
    m, (groups, n), ks = a.shape[0], b.shape[:2], a.shape[1] // 8
    y = a.new_empty((m, n), dtype=out_dtype)
    if y.numel() == 0:
        return y
    config = config_for(architecture(a), m, groups, batch_invariant())
    constexprs = _constexprs(config, ks)
    with guard(a):
        tiles = tiles_of(offsets.contiguous(), m, config.block_m, outside=True)  # rows of no group become zeros
        _gemm_kernel[(tiles.count * triton.cdiv(n, config.block_n),)](
            *_operand(a, a_scale, a_global), *_operand(b, b_scale, b_global), None, tiles.table, y,
            m, n, ks // constexprs["STEP"], groups,
            A_PER_ROW=a_global.numel() > 1, B_PER_ROW=False, A_TILED=False, B_TILED=b_layout == "128x4",
            **constexprs, **_options(config),
        )  # fmt: skip
    return y


# ---------------------------------------------------------------- compiled without a GPU


def _case(name: str, config: Config, out: str, ks: int, *, grouped: bool, tiled: bool) -> Case:
    types = {f"{side}{part}_ptr": "*u8" for side in "ab" for part in ("", "_scale")}
    types |= {"a_global_ptr": "*fp32", "b_global_ptr": "*fp32", "y_ptr": f"*{out}"}
    types |= {"table_ptr": "*i32"} if grouped else {"bias_ptr": f"*{out}"}
    types |= dict.fromkeys(("m", "n", "steps", "groups"), "i32")
    constexprs = {
        "A_PER_ROW": True, "B_PER_ROW": tiled and not grouped, "A_TILED": tiled and not grouped, "B_TILED": tiled,
        ("bias_ptr" if grouped else "table_ptr"): None, **_constexprs(config, ks),
    }  # fmt: skip
    return Case(name, _gemm_kernel, types, constexprs, _options(config))


def compile_cases(arch: int):
    """Every row, dense and grouped; k of 16 times an odd number."""
    for config in on_row_of(TABLE, arch).values():
        name = f"{config.block_m}x{config.block_n}x{16 * config.block_ks}"
        yield _case(f"gemm-{name}", config, "bf16", 168, grouped=False, tiled=True)
        yield _case(f"grouped-{name}", config, "bf16", 168, grouped=True, tiled=False)
    config = config_for(arch, 16)
    yield _case("gemm-fp32-odd", config, "fp32", 3, grouped=False, tiled=False)
    yield _case("gemm-fp16", config, "fp16", 168, grouped=False, tiled=False)
    yield _case("grouped-tiled", config, "bf16", 168, grouped=True, tiled=True)
