"""What the gradients of grouped_linear and moe_experts share: those of the pre-activations, and those of weights.

With h = W x the pre-activations, recomputed, s the scale of a row and g the gradient of s act(h):

    gradient of h: act'(h) (s g)      of s: <act(h), g>      of W: sum over the group's rows of (gradient of h) x^T

Sums over rows run in ascending order, in fixed blocks; nothing is added atomically.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import Case, architecture, guard, on_row_of, widen
from .grouped_linear import GATED
from .grouped_plan import (
    GRADS,
    LAST,
    WEIGHT_GRADS,
    Config,
    Tiles,
    Weight,
    column_step,
    config_for,
    kind_of,
    narrowed,
    row_step,
    stages_of,
)
from .grouped_tiles import activate, activation_grads, multiply, rows_of, stored, times_weight, weight_base

__all__ = ["compile_cases", "grads_config", "row_grads", "weight_grads"]


# ---------------------------------------------------------------- gradients of the pre-activations


@triton.jit(do_not_specialize=["m", "n", "k", "divisor", "groups", "w_group", "w_line", "v_group", "v_line"])
def _row_grads_kernel(
    x_ptr, w_ptr,
    grad_ptr,  # g [rows, n], or, where v is given, [m, k] gathered as x is: then g = v grad
    v_ptr,  # [groups, n, k] or None
    table_ptr,
    gather_ptr,  # rows of x, times divisor, or None
    scale_ptr,  # s, or None: 1
    act_ptr,  # s act(h) [rows, n], or None: no need of it
    dh_ptr,  # [rows, n], gated [rows, 2 n]
    dots_ptr,  # [rows, pieces of n] float32, or None: sums of act(h) g over the columns of a piece
    m,  # rows of x
    n,  # columns of g, in steps of N_STEP
    k,  # terms, and below the strides, in steps of STEP
    divisor, groups, w_group, w_line, v_group, v_line,
    SLOTS: tl.constexpr,  # scales and dots belong to the slot that gather names, else to the row
    ACTIVATION: tl.constexpr, W_FORM: tl.constexpr, V_FORM: tl.constexpr,
    STEP: tl.constexpr, N_STEP: tl.constexpr, TF32_OUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid tiles * cdiv(n, BLOCK_N), columns first. One loop per product, so that each has the registers to itself."""
    IS_GATED: tl.constexpr = ACTIVATION == "silu" or ACTIVATION == "gelu"
    N = n * N_STEP
    K = k * STEP
    pieces = tl.cdiv(N, BLOCK_N)
    tile = tl.program_id(0) // pieces
    group, row, live, source, read = rows_of(table_ptr, gather_ptr, tile, m, divisor, groups, BLOCK_M)
    if group < 0:
        return
    piece = tl.program_id(0) % pieces
    offs_n = piece * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    terms = tl.where(group < groups, K, 0)
    x_at = x_ptr + source.to(tl.int64) * k * STEP  # int64: rows * k passes 2^31
    w_at, _ = weight_base(w_ptr, None, group, w_group, STEP, W_FORM)

    cols = tl.arange(0, BLOCK_K)
    h = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, terms, BLOCK_K):
        mask = read[:, None] & (cols < K - start)[None, :]
        x = tl.load(x_at[:, None] + (start + cols)[None, :], mask=mask, other=0.0)
        h = times_weight(x, w_at, None, offs_n, mask_n, start, K, w_line, h, W_FORM, STEP, BLOCK_K)
        if IS_GATED:
            up = times_weight(x, w_at, None, offs_n + N, mask_n, start, K, w_line, up, W_FORM, STEP, BLOCK_K)

    if v_ptr is None:
        grad_at = grad_ptr + (row.to(tl.int64) * N)[:, None] + offs_n[None, :]
        g = widen(tl.load(grad_at, mask=read[:, None] & mask_n[None, :], other=0.0))
    else:
        g = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        grad_at = grad_ptr + source.to(tl.int64) * k * STEP
        v_at, _ = weight_base(v_ptr, None, group, v_group, STEP, V_FORM)
        for start in range(0, terms, BLOCK_K):
            mask = read[:, None] & (cols < K - start)[None, :]
            grad = tl.load(grad_at[:, None] + (start + cols)[None, :], mask=mask, other=0.0)
            g = times_weight(grad, v_at, None, offs_n, mask_n, start, K, v_line, g, V_FORM, STEP, BLOCK_K)

    a = activate(h, up, ACTIVATION)
    place = row
    if SLOTS:
        place = tl.load(gather_ptr + row, mask=read, other=0)
    if dots_ptr is not None:
        dots = tl.sum(tl.where(read[:, None], a * g, 0.0), axis=1)
        tl.store(dots_ptr + place.to(tl.int64) * pieces + piece, dots, mask=live)
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + place, mask=read, other=0.0)[:, None]
        a *= scale
        g *= scale
    dtype: tl.constexpr = dh_ptr.dtype.element_ty
    mask = live[:, None] & mask_n[None, :]
    dh, dup = activation_grads(h, up, g, ACTIVATION)
    if act_ptr is not None:
        tl.store(act_ptr + (row.to(tl.int64) * N)[:, None] + offs_n[None, :], stored(a, dtype, TF32_OUT), mask=mask)
    if IS_GATED:
        dh_at = dh_ptr + (row.to(tl.int64) * N * 2)[:, None] + offs_n[None, :]
        tl.store(dh_at + N, stored(dup, dtype, TF32_OUT), mask=mask)
    else:
        dh_at = dh_ptr + (row.to(tl.int64) * N)[:, None] + offs_n[None, :]
    tl.store(dh_at, stored(dh, dtype, TF32_OUT), mask=mask)


# ---------------------------------------------------------------- gradients of weights


@triton.jit(do_not_specialize=["rows", "m", "n", "k", "divisor"])
def _weight_grads_kernel(
    a_ptr, b_ptr,  # [rows, n] and [rows, k], or [m, n] or [m, k] where gathered
    offsets_ptr, gather_ptr,
    y_ptr,  # [groups, n, k]
    rows, m,
    n, k,  # in steps of STEP
    divisor,
    GATHERED: tl.constexpr,  # "a", "b", or "" without gather
    STEP: tl.constexpr, TF32_IN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid groups * tiles of [n, k], k first: sum of a[r] b[r]^T over the group's rows, BLOCK_K of them at a time."""
    N = n * STEP
    K = k * STEP
    tiles_k = tl.cdiv(K, BLOCK_N)
    tiles = tl.cdiv(N, BLOCK_M) * tiles_k
    group = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    offs_n = tile // tiles_k * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = tile % tiles_k * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n, mask_k = offs_n < N, offs_k < K
    first = tl.maximum(tl.load(offsets_ptr + group), 0)
    last = tl.minimum(tl.load(offsets_ptr + group + 1), rows)

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(first, last, BLOCK_K):
        row = start + tl.arange(0, BLOCK_K)
        read = row < last
        source = row
        if GATHERED != "":
            named = tl.load(gather_ptr + row, mask=read, other=-1)
            source = named // divisor
            read = (named >= 0) & (source < m)
        a_row = (source if GATHERED == "a" else row).to(tl.int64) * N  # int64: rows * n passes 2^31
        b_row = (source if GATHERED == "b" else row).to(tl.int64) * K
        # Both are masked: a zero does not silence a NaN.
        a = tl.load(a_ptr + a_row[:, None] + offs_n[None, :], mask=read[:, None] & mask_n[None, :], other=0.0)
        b = tl.load(b_ptr + b_row[:, None] + offs_k[None, :], mask=read[:, None] & mask_k[None, :], other=0.0)
        acc = multiply(tl.trans(a), b, acc, TF32_IN)

    y_row = (group.to(tl.int64) * N + offs_n) * K  # int64: groups * n * k passes 2^31
    y_at = y_ptr + y_row[:, None] + offs_k[None, :]
    tl.store(y_at, stored(acc, y_ptr.dtype.element_ty, False), mask=mask_n[:, None] & mask_k[None, :])


# ---------------------------------------------------------------- host side


def grads_config(x: Tensor, rows: int, groups: int) -> Config:
    return config_for(GRADS, architecture(x), kind_of(x), rows, groups)


def row_grads(
    x: Tensor,
    weight: Weight,
    grad: Tensor,
    tiles: Tiles,
    config: Config,
    dh: Tensor,
    *,
    back: Weight | None = None,
    gather: Tensor | None = None,
    divisor: int = 1,
    scale: Tensor | None = None,
    slots: bool = False,
    act: Tensor | None = None,
    want_dots: bool = False,
    activation: str | None = None,
) -> Tensor | None:
    """Writes dh and, where given, act; returns the dots ``[rows, pieces]`` where wanted. As in the kernel, v = back."""
    gated = activation in GATED
    n = weight.n // (1 + gated)
    block_n = narrowed(config.block_n, weight.n) // (1 + gated)
    pieces = triton.cdiv(n, block_n)
    dots = x.new_empty((dh.shape[0], pieces), dtype=torch.float32) if want_dots else None
    if tiles.count * pieces == 0:
        return dots
    assert tiles.block_m == config.block_m, "tiles of another configuration"
    other = back or weight
    step, n_step = row_step(weight, x, other.group, other.line), column_step(n)
    with guard(x):
        _row_grads_kernel[(tiles.count * pieces,)](
            x, weight.data, grad, back and back.data, tiles.table, gather, scale, act, dh, dots,
            x.shape[0], n // n_step, weight.k // step, divisor, tiles.groups,
            weight.group // step, weight.line // step, other.group // step, other.line // step,
            SLOTS=slots, ACTIVATION=activation or "none", W_FORM=weight.form, V_FORM=other.form,
            STEP=step, N_STEP=n_step, TF32_OUT=x.dtype == torch.float16,
            BLOCK_M=config.block_m, BLOCK_N=block_n, BLOCK_K=config.block_k,
            num_warps=config.warps, num_stages=stages_of(config, step), enable_fp_fusion=False,
        )  # fmt: skip
    return dots


def weight_grads(
    a: Tensor, b: Tensor, offsets: Tensor, rows: int, gather: Tensor | None, gathered: str, divisor: int, y: Tensor
) -> Tensor:
    """``y[g] = sum of a[r]^T b[r]`` over the rows of group g, into ``y [groups, n, k]``, which is contiguous.

    ``gathered`` names the operand whose rows gather names, times divisor; a float32 operand beside a float16 one holds
    numbers of 11 bits.
    """
    groups, n, k = y.shape
    if y.numel() == 0:
        return y
    config = config_for(WEIGHT_GRADS, architecture(a), kind_of(y), rows, groups)
    tf32 = a.dtype != b.dtype
    if tf32:
        config = _mixed(config)
    step = column_step(n, k)
    gathered = gathered if gather is not None else ""
    with guard(a):
        _weight_grads_kernel[(groups * triton.cdiv(n, config.block_m) * triton.cdiv(k, config.block_n),)](
            a, b, offsets, gather, y, rows, (a if gathered == "a" else b).shape[0], n // step, k // step, divisor,
            GATHERED=gathered, STEP=step, TF32_IN=tf32,
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
            num_warps=config.warps, num_stages=stages_of(config, step), enable_fp_fusion=False,
        )  # fmt: skip
    return y


def _mixed(config: Config) -> Config:
    """float16 operands become float32 in registers. Triton miscompiles a pipelined product on sm_90 whose left operand
    is computed there."""
    return replace(config, block_m=64, block_n=64, block_k=32, stages=1)


# ---------------------------------------------------------------- compiled without a GPU

DTYPES = {"16": "bf16", "32": "fp32"}


def _row_case(name, config, x, wide, form, activation, experts, aligned=True):
    lists = {"gather_ptr": "*i32", "v_ptr": f"*{x}", "act_ptr": f"*{wide}"} if experts else {}
    types = {"x_ptr": f"*{x}", "w_ptr": f"*{x}", "grad_ptr": f"*{x}", "table_ptr": "*i32", "scale_ptr": "*fp32",
             "dh_ptr": f"*{wide}", "dots_ptr": "*fp32", **lists}  # fmt: skip
    absent = {"gather_ptr", "v_ptr", "act_ptr"} - types.keys()
    numbers = ("m", "n", "k", "divisor", "groups", "w_group", "w_line", "v_group", "v_line")
    step = 8 if aligned else 1
    constexprs = {
        "SLOTS": experts, "ACTIVATION": activation, "W_FORM": form, "V_FORM": "n" if form == "k" else "k",
        "STEP": step, "N_STEP": step, "TF32_OUT": wide != x,
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k,
    }  # fmt: skip
    options = {"num_warps": config.warps, "num_stages": stages_of(config, step), "enable_fp_fusion": False}
    return Case(
        name, _row_grads_kernel, {**types, **dict.fromkeys(numbers, "i32")},
        {**constexprs, **dict.fromkeys(absent)}, options,
    )  # fmt: skip


def _weight_case(name, config, a, b, out, gathered):
    types = {"a_ptr": f"*{a}", "b_ptr": f"*{b}", "offsets_ptr": "*i32", "y_ptr": f"*{out}"}
    types |= {"gather_ptr": "*i32"} if gathered else {}
    constexprs = {
        "GATHERED": gathered, "STEP": 8, "TF32_IN": a != b,
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k,
    }  # fmt: skip
    options = {"num_warps": config.warps, "num_stages": config.stages, "enable_fp_fusion": False}
    types |= dict.fromkeys(("rows", "m", "n", "k", "divisor"), "i32")
    return Case(name, _weight_grads_kernel, types, constexprs | ({} if gathered else {"gather_ptr": None}), options)


def compile_cases(arch: int):
    for kind, limits in on_row_of(GRADS, arch).items():
        for config in limits.values():
            half = replace(config, block_n=config.block_n // 2)
            for activation, tile in (("relu2", config), ("silu", half)):
                name = f"rows-{kind}-{activation}-{config.block_m}x{tile.block_n}"
                yield _row_case(name, tile, DTYPES[kind], DTYPES[kind], "k", activation, experts=True)
    half = replace(on_row_of(GRADS, arch)["16"][64], block_n=32)
    yield _row_case("rows-fp16", half, "fp16", "fp32", "n", "gelu", experts=True)
    yield _row_case("rows-linear", half, "bf16", "bf16", "k", "gelu", experts=False)
    yield _row_case("rows-linear-strided", half, "bf16", "bf16", "k", "none", experts=False, aligned=False)
    for kind, limits in on_row_of(WEIGHT_GRADS, arch).items():
        for gathered in ("a", "b", ""):
            yield _weight_case(f"weights-{kind}-{gathered}", limits[LAST], *[DTYPES[kind]] * 3, gathered)
    tf32 = _mixed(on_row_of(WEIGHT_GRADS, arch)["16"][LAST])
    yield _weight_case("weights-fp16-a", tf32, "fp16", "fp32", "fp16", "a")
    yield _weight_case("weights-fp16-b", tf32, "fp32", "fp16", "fp16", "b")
