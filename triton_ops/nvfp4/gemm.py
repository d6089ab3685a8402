"""nvfp4_gemm and nvfp4_grouped_gemm: y = (a b^T) * a_global * b_global + bias of NVFP4 matrices, sums in float32.

nvfp4_gemm.quantized quantises act(y) where it is, in the registers of the tile.

Where tensor cores multiply NVFP4 (sm_100: ``tcgen05.mma kind::mxf4nvf4``, sm_120: ``mma.sync kind::mxf4nvf4``), codes
and block scales go to them as they are. Elsewhere both operands are decoded into bfloat16, which holds ``e2m1 * e4m3``
exactly. The tensor cores take block scales as unsigned numbers; no quantiser makes a negative one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import Case, architecture, batch_invariant, guard, narrow, on_row_of, widen
from ..moe.grouped_plan import tiles_of
from ..moe.grouped_tiles import rows_of
from .gemm_tiles import load_codes, load_scales, multiply, scale_rows, store_codes

__all__ = [
    "TABLE", "Config", "compile_cases", "config_for", "nvfp4_gemm", "nvfp4_gemm_quantized", "nvfp4_grouped_gemm",
]  # fmt: skip


# ---------------------------------------------------------------- kernel


@triton.jit(do_not_specialize=["m", "n", "steps", "groups"])
def _gemm_kernel(
    a_ptr, a_scale_ptr, a_global_ptr, b_ptr, b_scale_ptr, b_global_ptr,
    bias_ptr,  # or None
    table_ptr,  # tiles of rows of the groups, or None: one product
    y_ptr,  # codes where there is a scale_ptr
    scale_ptr, given_ptr,  # of the result, and its decode scale; or None
    m, n,
    steps,  # scales per row are steps * STEP, k is 16 times that
    groups,
    A_PER_ROW: tl.constexpr, B_PER_ROW: tl.constexpr,  # global scales
    A_TILED: tl.constexpr, B_TILED: tl.constexpr, Y_TILED: tl.constexpr,  # block scales in 128x4 tiles
    RELU2: tl.constexpr,  # before codes
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

    a_scale_row, b_scale_row = scale_rows(a_row, ks, A_TILED), scale_rows(b_row, ks, B_TILED)

    acc = tl.zeros((BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, last, BLOCK_KS):
        a = load_codes(a_ptr, a_row, read, start, ks, BLOCK_KS)
        a_scale = load_scales(a_scale_ptr, a_scale_row, read, start, ks, A_TILED, BLOCK_KS)
        b = load_codes(b_at, b_row, mask_n, start, ks, BLOCK_KS)
        b_scale = load_scales(b_scale_at, b_scale_row, mask_n, start, ks, B_TILED, BLOCK_KS)
        if SWAP:
            acc = multiply(b, b_scale, a, a_scale, acc, NATIVE, BLOCK_N, BLOCK_M, BLOCK_KS)
        else:
            acc = multiply(a, a_scale, b, b_scale, acc, NATIVE, BLOCK_M, BLOCK_N, BLOCK_KS)

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
    if scale_ptr is not None:
        first_block = pid // tl.cdiv(m, BLOCK_M) * (BLOCK_N // 16)
        decode = tl.load(given_ptr)
        store_codes(y_ptr, scale_ptr, decode, y, a_row, live, first_block, n, RELU2, Y_TILED, BLOCK_M, BLOCK_N)
    else:
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


def _for_codes(config: Config) -> Config:
    """Of a result that is quantised: 64 rows of it spill on sm_100 (408 bytes) in the registers of 4 warps."""
    return replace(config, warps=8) if config.swap and config.block_m == 64 else config


def _constexprs(config: Config, ks: int) -> dict[str, object]:
    # ks is not specialised. Counted in steps it tells the compiler how many bytes may be loaded at once.
    step = next(step for step in (4, 2, 1) if ks % step == 0)
    tile = {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_KS": config.block_ks}
    return {"NATIVE": config.native, "SWAP": config.swap, "STEP": step, **tile}


def _options(config: Config) -> dict[str, object]:
    return {"num_warps": config.warps, "num_stages": config.stages, "enable_fp_fusion": False}


def _operand(q: Tensor, scale: Tensor, global_scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return q.contiguous(), scale.contiguous().view(torch.uint8), global_scale.contiguous()


NO_CODES = {"scale_ptr": None, "given_ptr": None, "Y_TILED": False, "RELU2": False}


def _one_product(a, b, bias, y, n, a_layout, b_layout, codes):
    """y of operands (codes, block scales, global scale), or what ``codes`` says in its place."""
    m, ks = a[0].shape[0], a[0].shape[1] // 8
    config = config_for(architecture(a[0]), m, invariant=batch_invariant())
    config = config if codes is NO_CODES else _for_codes(config)
    constexprs = _constexprs(config, ks)
    bias = bias if bias is None else bias.contiguous()
    with guard(a[0]):
        _gemm_kernel[(triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n),)](
            *_operand(*a), *_operand(*b), bias, None, y, m=m, n=n, steps=ks // constexprs["STEP"], groups=0,
            A_PER_ROW=a[2].numel() > 1, B_PER_ROW=b[2].numel() > 1,
            A_TILED=a_layout == "128x4", B_TILED=b_layout == "128x4", **codes, **constexprs, **_options(config),
        )  # fmt: skip


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
    m, n = a.shape[0], b.shape[0]
    y = a.new_empty((m, n), dtype=out_dtype)
    if y.numel():
        _one_product((a, a_scale, a_global), (b, b_scale, b_global), bias, y, n, a_layout, b_layout, NO_CODES)
    return y


def nvfp4_gemm_quantized(
    a: Tensor,
    a_scale: Tensor,
    a_global: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_global: Tensor,
    global_scale: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    a_layout: str = "linear",
    b_layout: str = "linear",
    scale_layout: str = "linear",
) -> tuple[Tensor, Tensor]:
    m, n = a.shape[0], b.shape[0]
    swizzled = scale_layout == "128x4"
    grid = (m, n // 16)
    if swizzled:
        grid = triton.cdiv(m if n else 0, 128) * 128, triton.cdiv(n // 16, 4) * 4
    q = a.new_empty((m, n // 2))
    new = a.new_empty if grid == (m, n // 16) else a.new_zeros  # padding is 0
    scale = new(grid)
    if q.numel():
        codes = {"scale_ptr": scale, "given_ptr": global_scale, "Y_TILED": swizzled, "RELU2": activation == "relu2"}
        _one_product((a, a_scale, a_global), (b, b_scale, b_global), bias, q, n, a_layout, b_layout, codes)
    return q, scale.view(torch.float8_e4m3fn)


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
            m=m, n=n, steps=ks // constexprs["STEP"], groups=groups,
            A_PER_ROW=a_global.numel() > 1, B_PER_ROW=False, A_TILED=False, B_TILED=b_layout == "128x4",
            **NO_CODES, **constexprs, **_options(config),
        )  # fmt: skip
    return y


# ---------------------------------------------------------------- compiled without a GPU


def _case(name: str, config: Config, out: str, ks: int, *, grouped: bool = False, tiled: bool = False) -> Case:
    """``out`` is a type of y, or "codes"."""
    types = {f"{side}{part}_ptr": "*u8" for side in "ab" for part in ("", "_scale")}
    types |= {"a_global_ptr": "*fp32", "b_global_ptr": "*fp32", "y_ptr": f"*{out}"}
    types |= {"table_ptr": "*i32"} if grouped else {"bias_ptr": f"*{out}"}
    types |= dict.fromkeys(("m", "n", "steps", "groups"), "i32")
    constexprs = {
        "A_PER_ROW": True, "B_PER_ROW": tiled and not grouped, "A_TILED": tiled and not grouped, "B_TILED": tiled,
        ("bias_ptr" if grouped else "table_ptr"): None, **NO_CODES, **_constexprs(config, ks),
    }  # fmt: skip
    if out == "codes":
        types |= {"y_ptr": "*u8", "bias_ptr": "*fp32", "scale_ptr": "*u8", "given_ptr": "*fp32"}
        constexprs = {k: v for k, v in constexprs.items() if k not in types} | {"Y_TILED": tiled, "RELU2": tiled}
    return Case(name, _gemm_kernel, types, constexprs, _options(config))


def compile_cases(arch: int):
    """Every row, dense and grouped; k of 16 times an odd number."""
    for config in on_row_of(TABLE, arch).values():
        name = f"{config.block_m}x{config.block_n}x{16 * config.block_ks}"
        yield _case(f"gemm-{name}", config, "bf16", 168, tiled=True)
        yield _case(f"gemm-codes-{name}", _for_codes(config), "codes", 168, tiled=True)
        yield _case(f"grouped-{name}", config, "bf16", 168, grouped=True)
    config = config_for(arch, 16)
    yield _case("gemm-fp32-odd", config, "fp32", 3)
    yield _case("gemm-fp16", config, "fp16", 168)
    yield _case("grouped-tiled", config, "bf16", 168, grouped=True, tiled=True)
