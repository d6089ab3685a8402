"""Sums in a fixed order, where others add atomically: of a token's slots, of the rows made of one row, of pieces."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import Case, guard, narrow

__all__ = ["compile_cases", "sum_pieces", "sum_segments", "sum_slots"]

BLOCK = 512  # columns of a program that sums segments
TOKENS = 8  # of a program, by 128 columns
UNROLL = 4  # rows that are on their way from memory at once


@triton.jit(do_not_specialize=["tokens", "k", "n", "first", "experts"])
def _slots_kernel(
    rows_ptr,  # [tokens * k, n] float32; rows of skipped slots are not read
    ids_ptr, weights_ptr,  # [tokens, k]; weights or None: ones
    y_ptr,  # [tokens, n]
    tokens, k, n, first, experts,
    TOKENS: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Grid (pieces of the tokens, of n): y[t] = sum of w[t, j] rows[t k + j] over local experts' slots, j ascending."""
    t = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)  # int64: tokens * k * n passes 2^31
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here, mask_n = t < tokens, cols < n
    y = tl.zeros((TOKENS, BLOCK), tl.float32)
    for start in range(0, k, UNROLL):
        for i in tl.static_range(UNROLL):
            slot = t * k + start + i
            mask = here & (t * 0 + start + i < k)
            local = tl.load(ids_ptr + slot, mask=mask, other=0).to(tl.int64) - first  # an id may be anything
            alive = mask & (local >= 0) & (local < experts)
            at = rows_ptr + (slot * n)[:, None] + cols[None, :]
            row = tl.load(at, mask=alive[:, None] & mask_n[None, :], other=0.0)
            if weights_ptr is not None:
                row *= tl.load(weights_ptr + slot, mask=alive, other=0.0)[:, None]
            y += row
    y_at = y_ptr + (t * n)[:, None] + cols[None, :]
    tl.store(y_at, narrow(y, y_ptr.dtype.element_ty), mask=here[:, None] & mask_n[None, :])


@triton.jit(do_not_specialize=["n"])
def _segments_kernel(
    rows_ptr,  # [rows, n] float32
    list_ptr, starts_ptr,  # [rows] and [m + 1], int64
    y_ptr,  # [m, n]
    n,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (m, pieces of n): y[i] = sum of rows[list[p]] over starts[i] <= p < starts[i + 1], ascending."""
    i = tl.program_id(0).to(tl.int64)  # int64: rows * n passes 2^31
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < n
    y = tl.zeros((BLOCK,), tl.float32)
    for p in range(tl.load(starts_ptr + i), tl.load(starts_ptr + i + 1)):
        y += tl.load(rows_ptr + tl.load(list_ptr + p) * n + cols, mask=mask, other=0.0)
    tl.store(y_ptr + i * n + cols, narrow(y, y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "pieces", "first", "experts"])
def _pieces_kernel(
    pieces_ptr,  # [rows, pieces] float32
    ids_ptr,  # [rows] or None; the pieces of skipped slots are not read
    y_ptr,  # [rows] float32
    rows, pieces, first, experts,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid pieces of rows: y[r] = sum of the pieces of row r, ascending."""
    r = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = r < rows
    alive = mask
    if ids_ptr is not None:
        local = tl.load(ids_ptr + r, mask=mask, other=-1).to(tl.int64) - first  # an id may be anything
        alive = mask & (local >= 0) & (local < experts)
    y = tl.zeros((BLOCK,), tl.float32)
    for p in range(0, pieces):
        y += tl.load(pieces_ptr + r * pieces + p, mask=alive, other=0.0)
    tl.store(y_ptr + r, y, mask=mask)


# ---------------------------------------------------------------- host side


def sum_slots(
    rows: Tensor, ids: Tensor, weights: Tensor | None, y: Tensor, first_expert: int, num_experts: int
) -> Tensor:
    """``y[t] = sum_j weights[t, j] * rows[t * k + j]``; a slot of no local expert adds nothing and is not read."""
    (tokens, k), n = ids.shape, y.shape[1]
    if y.numel():
        with guard(y):
            _slots_kernel[(triton.cdiv(tokens, TOKENS), triton.cdiv(n, 128))](
                rows, ids, weights, y, tokens, k, n, first_expert, num_experts,
                TOKENS=TOKENS, BLOCK=128, UNROLL=UNROLL, num_warps=4, enable_fp_fusion=False,
            )  # fmt: skip
    return y


def sum_segments(rows: Tensor, gather: Tensor, y: Tensor) -> Tensor:
    """``y[m] = sum of rows[r] over gather[r] == m``, r ascending; a negative gather[r] belongs to none."""
    m, n = y.shape
    if y.numel():
        named, order = gather.sort(stable=True)
        starts = torch.searchsorted(named, torch.arange(m + 1, dtype=named.dtype, device=named.device))
        with guard(y):
            _segments_kernel[(m, triton.cdiv(n, BLOCK))](rows, order, starts, y, n, BLOCK=BLOCK, num_warps=4)
    return y


def sum_pieces(
    pieces: Tensor, y: Tensor, ids: Tensor | None = None, first_expert: int = 0, num_experts: int = 0
) -> Tensor:
    """``y[r] = sum of pieces[r]``, ascending; 0 for a slot whose id is not local."""
    if y.numel():
        rows, count = pieces.shape
        with guard(y):
            _pieces_kernel[(triton.cdiv(rows, 128),)](
                pieces, ids, y, rows, count, first_expert, num_experts, BLOCK=128, num_warps=4
            )
    return y


def compile_cases(arch: int):
    pointers = {"rows_ptr": "*fp32", "ids_ptr": "*i32", "y_ptr": "*bf16"}
    numbers = dict.fromkeys(("tokens", "k", "n", "first", "experts"), "i32")
    sizes, options = {"TOKENS": TOKENS, "BLOCK": 128, "UNROLL": UNROLL}, {"num_warps": 4, "enable_fp_fusion": False}
    for name, weights in (("weighted", {"weights_ptr": "*fp32"}), ("plain", {})):
        absent = {} if weights else {"weights_ptr": None}
        yield Case(f"slots-{name}", _slots_kernel, {**pointers, **weights, **numbers}, {**sizes, **absent}, options)
    types = {"rows_ptr": "*fp32", "list_ptr": "*i64", "starts_ptr": "*i64", "y_ptr": "*bf16", "n": "i32"}
    yield Case("segments", _segments_kernel, types, {"BLOCK": BLOCK}, {"num_warps": 4})
    types = {"pieces_ptr": "*fp32", "ids_ptr": "*i32", "y_ptr": "*fp32"}
    numbers = dict.fromkeys(("rows", "pieces", "first", "experts"), "i32")
    yield Case("pieces", _pieces_kernel, {**types, **numbers}, {"BLOCK": 128}, {"num_warps": 4})
