"""grouped_linear: y[r] = row_scale[r] * act(w[g] x[gather[r]]) for the rows r of every group g, sums in float32.

`product` is the one matrix product of the family: experts go up and down through it, and gradients of inputs too. The
rows of a group are cut into tiles on the device (grouped_plan), the host knows a bound on their number: no host sync.
A row's bits depend on its own values and on the configuration, which the mean number of rows per group chooses
(up to 16, 32, 64, more); ``batch_invariant()`` pins that of 64.
"""

from __future__ import annotations

from dataclasses import replace

import triton
import triton.language as tl
from torch import Tensor

from ..common import Case, architecture, guard, on_row_of
from .grouped_plan import (
    LAST,
    PRODUCTS,
    Config,
    Tiles,
    Weight,
    column_step,
    config_for,
    kind_of,
    mixed,
    narrowed,
    row_step,
    stages_of,
    tiles_of,
    weight_of,
)
from .grouped_tiles import activate, rows_of, stored, times_weight, weight_base

__all__ = ["GATED", "compile_cases", "grouped_linear", "product", "product_config"]

GATED = ("silu", "gelu")


@triton.jit(do_not_specialize=["m", "n", "k", "divisor", "groups", "x_row", "w_group", "w_line"])
def _product_kernel(
    x_ptr, w_ptr,
    scale_ptr, global_ptr,  # of NVFP4 weights
    table_ptr,
    gather_ptr,  # rows of x, times divisor, or None
    scatter_ptr,  # rows of y, or None
    row_scale_ptr,  # or None
    y_ptr,
    m,  # rows of x
    n,  # columns of y, in steps of N_STEP
    k,  # terms, and below the strides, in steps of STEP
    divisor, groups, x_row, w_group, w_line,
    ACTIVATION: tl.constexpr, FORM: tl.constexpr, STEP: tl.constexpr, N_STEP: tl.constexpr,
    TF32_IN: tl.constexpr,  # x are float32 numbers for float16 weights
    TF32_OUT: tl.constexpr,  # and so is y to be
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid tiles * cdiv(n, BLOCK_N), columns first: a wave of programs shares few rows of x and few groups' weights.

    A gated program computes gate and up of its columns, n rows of w apart, and takes half as many columns.
    """
    IS_GATED: tl.constexpr = ACTIVATION == "silu" or ACTIVATION == "gelu"
    N = n * N_STEP
    K = k * STEP
    pieces = tl.cdiv(N, BLOCK_N)
    tile = tl.program_id(0) // pieces
    group, row, live, source, read = rows_of(table_ptr, gather_ptr, tile, m, divisor, groups, BLOCK_M)
    if group < 0:
        return
    offs_n = tl.program_id(0) % pieces * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    x_at = x_ptr + source.to(tl.int64) * x_row * STEP  # int64: rows * k passes 2^31
    in_group = group < groups
    w_at, scale_at = weight_base(w_ptr, scale_ptr, group, w_group, STEP, FORM)

    cols = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, tl.where(in_group, K, 0), BLOCK_K):
        mask = read[:, None] & (cols < K - start)[None, :]
        x = tl.load(x_at[:, None] + (start + cols)[None, :], mask=mask, other=0.0)
        acc = times_weight(
            x, w_at, scale_at, offs_n, mask_n, start, K, w_line, acc, FORM, STEP, BLOCK_K, TF32_IN
        )  # fmt: skip
        if IS_GATED:
            up = times_weight(
                x, w_at, scale_at, offs_n + N, mask_n, start, K, w_line, up, FORM, STEP, BLOCK_K, TF32_IN
            )  # fmt: skip

    if global_ptr is not None:
        factor = tl.load(global_ptr + group, mask=in_group, other=0.0)
        acc *= factor
        up *= factor
    y = activate(acc, up, ACTIVATION)
    if row_scale_ptr is not None:
        y *= tl.load(row_scale_ptr + row, mask=read, other=0.0)[:, None]
    target = row
    if scatter_ptr is not None:
        target = tl.load(scatter_ptr + row, mask=live, other=0)
    y_at = y_ptr + (target.to(tl.int64) * N)[:, None] + offs_n[None, :]
    tl.store(y_at, stored(y, y_ptr.dtype.element_ty, TF32_OUT), mask=live[:, None] & mask_n[None, :])


# ---------------------------------------------------------------- host side


def product_config(x: Tensor, nvfp4: bool, rows: int, groups: int) -> Config:
    return config_for(PRODUCTS, architecture(x), kind_of(x, nvfp4), rows, groups)


def product(
    x: Tensor,
    weight: Weight,
    tiles: Tiles,
    config: Config,
    y: Tensor,
    *,
    gather: Tensor | None = None,
    divisor: int = 1,
    scatter: Tensor | None = None,
    row_scale: Tensor | None = None,
    activation: str | None = None,
    tf32_in: bool = False,
    tf32_out: bool = False,
) -> Tensor:
    """``y[scatter[r]] = row_scale[r] * act(w[g] @ x[gather[r] // divisor])`` for the rows r of the tiles, into ``y``.

    ``y [rows, N]`` is contiguous, of any float dtype; x has contiguous rows. What a float16 model computes in between
    may be larger than a float16 number: ``tf32_out`` stores it in float32 with the 11 bits of one, ``tf32_in`` takes
    an x of such numbers.
    """
    n = y.shape[1]
    if tiles.count == 0 or n == 0:
        return y
    assert tiles.block_m == config.block_m, "tiles of another configuration"
    step, n_step = row_step(weight, x), column_step(n)
    gated = activation in GATED
    block_n = narrowed(config.block_n, n * (1 + gated)) // (1 + gated)
    with guard(x):
        _product_kernel[(tiles.count * triton.cdiv(n, block_n),)](
            x, weight.data, weight.scale, weight.factor, tiles.table, gather, scatter, row_scale, y,
            x.shape[0], n // n_step, weight.k // step, divisor, tiles.groups,
            x.stride(0) // step, weight.group // step, weight.line // step,
            ACTIVATION=activation or "none", FORM=weight.form, STEP=step, N_STEP=n_step,
            TF32_IN=tf32_in, TF32_OUT=tf32_out,
            BLOCK_M=config.block_m, BLOCK_N=block_n, BLOCK_K=config.block_k,
            num_warps=config.warps, num_stages=stages_of(config, step), enable_fp_fusion=False,
        )  # fmt: skip
    return y


def grouped_linear(
    x: Tensor,
    w: Tensor,
    offsets: Tensor,
    gather: Tensor | None = None,
    row_scale: Tensor | None = None,
    block_scale: Tensor | None = None,
    global_scale: Tensor | None = None,
    *,
    activation: str | None = None,
) -> Tensor:
    x, offsets = x.contiguous(), offsets.contiguous()
    gather, row_scale = (t if t is None else t.contiguous() for t in (gather, row_scale))
    weight = weight_of(w, block_scale, global_scale)
    rows, groups = len(x if gather is None else gather), offsets.numel() - 1
    y = x.new_empty((rows, weight.n // (2 if activation in GATED else 1)))
    config = product_config(x, block_scale is not None, rows, groups)
    with guard(x):
        tiles = tiles_of(offsets, rows, config.block_m, outside=True)
    return product(x, weight, tiles, config, y, gather=gather, row_scale=row_scale, activation=activation)


# ---------------------------------------------------------------- compiled without a GPU

DTYPES = {"16": "bf16", "32": "fp32", "nvfp4": "bf16", "nvfp4-32": "fp32"}


def product_case(
    name: str, config: Config, x: str, w: str, y: str, form: str, activation: str = "none", *,
    aligned: bool = True, lists: bool = True,
) -> Case:  # fmt: skip
    lists_of = {"gather_ptr": "*i32", "scatter_ptr": "*i32", "row_scale_ptr": "*fp32"}
    scales = {"scale_ptr": "*u8", "global_ptr": "*fp32"}
    types = {"x_ptr": f"*{x}", "w_ptr": f"*{w}", "table_ptr": "*i32", "y_ptr": f"*{y}"}
    types |= (lists_of if lists else {}) | (scales if form == "nvfp4" else {})
    absent = (lists_of | scales).keys() - types.keys()
    types |= dict.fromkeys(("m", "n", "k", "divisor", "groups", "x_row", "w_group", "w_line"), "i32")
    step = (32 if form == "nvfp4" else 8) if aligned else 1
    constexprs = {
        "ACTIVATION": activation, "FORM": form, "STEP": step, "N_STEP": 8 if aligned else 1,
        "TF32_IN": name.startswith("tf32"), "TF32_OUT": y == "fp32" and x == "fp16",
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k,
    }  # fmt: skip
    options = {"num_warps": config.warps, "num_stages": stages_of(config, step), "enable_fp_fusion": False}
    return Case(name, _product_kernel, types, {**constexprs, **dict.fromkeys(absent)}, options)


def compile_cases(arch: int):
    """Every row, plain and gated; what experts and gradients launch beside them; operands of any strides."""
    table = on_row_of(PRODUCTS, arch)
    for kind, limits in table.items():
        x = DTYPES[kind]
        w, form = ("u8", "nvfp4") if kind.startswith("nvfp4") else (x, "k")
        for config in limits.values():
            for n in dict.fromkeys((config.block_n, min(config.block_n, 64))):
                name = f"product-{kind}-{config.block_m}x{n}x{config.block_k}"
                yield product_case(name, replace(config, block_n=n), x, w, x, form, "relu2")
            half = replace(config, block_n=config.block_n // 2)
            yield product_case(f"gated-{kind}-{config.block_m}x{half.block_n}", half, x, w, x, form, "silu")
    for rows in (16, LAST):
        config = table["16"][rows]
        rows = config.block_m
        yield product_case(f"down-{rows}", config, "bf16", "bf16", "fp32", "k")
        yield product_case(f"grad_x-{rows}", config, "bf16", "bf16", "fp32", "n")
        yield product_case(f"tf32-{rows}", mixed(config), "fp32", "fp16", "fp32", "k")
        yield product_case(f"tf32-grad_x-{rows}", mixed(config), "fp32", "fp16", "fp32", "n")
    yield product_case("tf32-nvfp4", mixed(table["nvfp4"][16]), "fp32", "u8", "fp32", "nvfp4")
    half = replace(table["16"][64], block_n=64)
    yield product_case("fp16", half, "fp16", "fp16", "fp32", "k", "gelu", lists=False)
    half = replace(table["16"][16], block_n=32)
    yield product_case("strided", half, "bf16", "bf16", "bf16", "k", "silu", aligned=False)
