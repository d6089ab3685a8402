"""moe_sort: the slots of a routing, grouped by local expert, stably, without a word to the host.

A slot's rank among the equals before it comes from comparing pairs, which is exact and needs no order of execution; the
pairs of a slot lie in one thread, as sums along the first axis of a tile do.
One program sorts what a decode step has. Beyond that three launches: ranks and histograms of blocks of slots, sums over
the blocks, and the slots to their places.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import INTERPRET, Case, device_function, guard

__all__ = ["compile_cases", "moe_sort"]

SMALL = 512  # slots that one program sorts; 22 slots of 16 tokens are 352
SMALL_EXPERTS = 1024  # for as many experts
BLOCK = 256  # slots of a block
CHUNK = 256 if INTERPRET else 32  # slots that all slots of a block are compared with at once
COLUMNS = 32  # experts per program of the sums over blocks
ROWS = 32  # blocks per step there
TOTALS = 1024  # experts per step of the sums over experts
OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}


# ---------------------------------------------------------------- device side


@device_function
def _expert_of(ids_ptr, ids_strides, slot, mask, k, first, num_experts):
    """Local experts of slots, num_experts where skipped; num_experts + 1 where there is no slot."""
    at = (slot // k).to(tl.int64) * ids_strides[0] + (slot % k).to(tl.int64) * ids_strides[1]  # int64: passes 2^31
    local = tl.load(ids_ptr + at, mask=mask, other=0).to(tl.int64) - first  # int64: an id may be anything
    local = tl.where((local >= 0) & (local < num_experts), local, num_experts)
    return tl.where(mask, local, num_experts + 1).to(tl.int32)


@triton.jit(do_not_specialize=["slots", "k", "first", "num_experts"])
def _small_kernel(
    ids_ptr, ids_strides, order_ptr, offsets_ptr, active_ptr, num_active_ptr,
    slots, k, first, num_experts,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """One program: a slot goes behind all that have a lower expert, or the same and stand before it."""
    slot = tl.arange(0, BLOCK)
    expert = _expert_of(ids_ptr, ids_strides, slot, slot < slots, k, first, num_experts)
    e = tl.arange(0, BLOCK_E)
    place = tl.zeros((BLOCK,), tl.int32)
    below = tl.zeros((BLOCK_E,), tl.int32)  # slots with a lower expert
    count = tl.zeros((BLOCK_E,), tl.int32)
    for start in range(0, slots, CHUNK):
        other = start + tl.arange(0, CHUNK)
        its = _expert_of(ids_ptr, ids_strides, other, other < slots, k, first, num_experts)[:, None]
        before = (its == expert[None, :]) & (other[:, None] < slot[None, :])
        place += tl.sum(((its < expert[None, :]) | before).to(tl.int32), axis=0)
        below += tl.sum((its < e[None, :]).to(tl.int32), axis=0)
        count += tl.sum((its == e[None, :]).to(tl.int32), axis=0)
    tl.store(order_ptr + place, slot, mask=slot < slots)
    tl.store(offsets_ptr + e, below, mask=e <= num_experts)
    busy = ((count > 0) & (e < num_experts)).to(tl.int32)
    num_active = tl.sum(busy, axis=0)
    tl.store(active_ptr + tl.cumsum(busy, axis=0) - 1, e, mask=busy != 0)
    tl.store(active_ptr + e, -1, mask=(e >= num_active) & (e < num_experts))
    tl.store(num_active_ptr, num_active)


@triton.jit(do_not_specialize=["slots", "k", "first", "num_experts"])
def _rank_kernel(
    ids_ptr, ids_strides, rank_ptr, counts_ptr, totals_ptr, slots, k, first, num_experts,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per block: how many slots of the block before a slot have its expert, and the block's counts.

    The first slot of an expert writes its count, so that an expert that receives everything costs as much as any.
    """
    block = tl.program_id(0)
    within = tl.arange(0, BLOCK)
    slot = block * BLOCK + within
    left = slots - block * BLOCK  # not slot < slots: the last block may pass 2^31
    mask = within < left
    expert = _expert_of(ids_ptr, ids_strides, slot, mask, k, first, num_experts)
    rank = tl.zeros((BLOCK,), tl.int32)
    count = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, BLOCK, CHUNK):
        other = start + tl.arange(0, CHUNK)
        its = _expert_of(ids_ptr, ids_strides, block * BLOCK + other, other < left, k, first, num_experts)
        equal = its[:, None] == expert[None, :]
        rank += tl.sum((equal & (other[:, None] < within[None, :])).to(tl.int32), axis=0)
        count += tl.sum(equal.to(tl.int32), axis=0)
    tl.store(rank_ptr + slot, rank, mask=mask)
    leads = (rank == 0) & mask
    tl.store(counts_ptr + block.to(tl.int64) * (num_experts + 1) + expert, count, mask=leads)  # int64: passes 2^31
    tl.atomic_add(totals_ptr + expert, count, mask=leads, sem="relaxed")  # integers: exact in any order


@triton.jit(do_not_specialize=["blocks", "num_experts"])
def _base_kernel(
    counts_ptr, totals_ptr, offsets_ptr, active_ptr, num_active_ptr, blocks, num_experts,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TOTALS: tl.constexpr,
):  # fmt: skip
    """One program per COLUMNS experts: in place of its count, where a block's slots of an expert begin."""
    first = tl.program_id(0) * COLUMNS
    slots = tl.zeros((TOTALS,), tl.int32)  # of lower experts
    busy = tl.zeros((TOTALS,), tl.int32)  # lower experts with a slot
    num_active = tl.zeros((TOTALS,), tl.int32)
    for start in range(0, num_experts, TOTALS):
        e = start + tl.arange(0, TOTALS)
        total = tl.load(totals_ptr + e, mask=e < num_experts, other=0)
        slots += tl.where(e < first, total, 0)
        busy += tl.where(e < first, (total > 0).to(tl.int32), 0)
        num_active += (total > 0).to(tl.int32)
    num_active = tl.sum(num_active, axis=0)

    e = first + tl.arange(0, COLUMNS)
    total = tl.load(totals_ptr + e, mask=e <= num_experts, other=0)
    base = tl.sum(slots, axis=0) + tl.cumsum(total, axis=0) - total
    tl.store(offsets_ptr + e, base, mask=e <= num_experts)
    own = ((total > 0) & (e < num_experts)).to(tl.int32)
    tl.store(active_ptr + tl.sum(busy, axis=0) + tl.cumsum(own, axis=0) - 1, e, mask=own != 0)
    tl.store(active_ptr + e, -1, mask=(e >= num_active) & (e < num_experts))
    tl.store(num_active_ptr, num_active, mask=first == 0)

    for start in range(0, blocks, ROWS):
        block = (start + tl.arange(0, ROWS)).to(tl.int64)  # int64: blocks * num_experts passes 2^31
        at = counts_ptr + block[:, None] * (num_experts + 1) + e[None, :]
        mask = (block < blocks)[:, None] & (e <= num_experts)[None, :]
        count = tl.load(at, mask=mask, other=0)
        tl.store(at, base[None, :] + tl.cumsum(count, axis=0) - count, mask=mask)
        base += tl.sum(count, axis=0)


@triton.jit(do_not_specialize=["slots", "k", "first", "num_experts"])
def _place_kernel(
    ids_ptr, ids_strides, rank_ptr, base_ptr, order_ptr, slots, k, first, num_experts, BLOCK: tl.constexpr
):
    """One program per block: its slots to their places."""
    block = tl.program_id(0)
    within = tl.arange(0, BLOCK)
    slot = block * BLOCK + within
    mask = within < slots - block * BLOCK
    expert = _expert_of(ids_ptr, ids_strides, slot, mask, k, first, num_experts)
    base = tl.load(base_ptr + block.to(tl.int64) * (num_experts + 1) + expert, mask=mask, other=0)
    tl.store(order_ptr + base + tl.load(rank_ptr + slot, mask=mask, other=0), slot, mask=mask)


# ---------------------------------------------------------------- launchers


def moe_sort(ids: Tensor, num_experts: int, first_expert: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    slots, k = ids.numel(), ids.shape[1]
    order, offsets = ids.new_empty(slots), ids.new_empty(num_experts + 1)
    active, num_active = ids.new_empty(num_experts), ids.new_empty(1)
    results = (order, offsets, active, num_active)
    sizes = (slots, k, first_expert, num_experts)
    with guard(ids):
        if slots <= SMALL and num_experts < SMALL_EXPERTS:
            _small_kernel[(1,)](ids, ids.stride(), *results, *sizes, **_small(slots, num_experts))
            return results
        blocks = triton.cdiv(slots, BLOCK)
        rank = torch.empty_like(order)
        counts = ids.new_zeros(blocks + 1, num_experts + 1)  # the last row: of all blocks
        totals = counts[-1]
        _rank_kernel[(blocks,)](ids, ids.stride(), rank, counts, totals, *sizes, CHUNK=CHUNK, BLOCK=BLOCK, **OPTIONS)
        _base_kernel[(triton.cdiv(num_experts + 1, COLUMNS),)](
            counts, totals, *results[1:], blocks, num_experts,
            ROWS=ROWS, COLUMNS=COLUMNS, TOTALS=TOTALS, **OPTIONS,
        )  # fmt: skip
        _place_kernel[(blocks,)](ids, ids.stride(), rank, counts, order, *sizes, BLOCK=BLOCK, **OPTIONS)
    return results


def _small(slots: int, num_experts: int) -> dict[str, int]:
    block, block_e = (max(triton.next_power_of_2(n), 32) for n in (slots, num_experts + 1))
    return {"CHUNK": CHUNK, "BLOCK": block, "BLOCK_E": block_e, **OPTIONS}


def compile_cases(arch: int):
    pointers = ("ids", "order", "offsets", "active", "num_active", "rank", "counts", "totals", "base")
    types = {f"{name}_ptr": "*i32" for name in pointers} | {"ids_strides": ("i32", 1), "first": "i32"}
    types |= {name: "i32" for name in ("slots", "k", "num_experts", "blocks")}
    for name, size in {"nano": (6, 128), "super": (22, 512), "super-16": (352, 512), "largest": (512, 1023)}.items():
        sizes = {n: v for n, v in _small(*size).items() if n not in OPTIONS}
        wanted = {n: t for n, t in types.items() if n in _small_kernel.arg_names}
        yield Case(f"sort-small-{name}", _small_kernel, wanted, sizes, OPTIONS)
    sizes = {"CHUNK": CHUNK, "BLOCK": BLOCK, "ROWS": ROWS, "COLUMNS": COLUMNS, "TOTALS": TOTALS}
    for kernel in (_rank_kernel, _base_kernel, _place_kernel):
        names = kernel.arg_names
        yield Case(
            f"sort{kernel.__name__.removesuffix('_kernel').replace('_', '-')}", kernel,
            {n: t for n, t in types.items() if n in names}, {n: v for n, v in sizes.items() if n in names}, OPTIONS,
            aligned=[f"{n}_ptr" for n in pointers if n != "totals"],
        )  # fmt: skip
