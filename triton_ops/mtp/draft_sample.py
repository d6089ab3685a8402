"""mtp_draft_sample: the tokens of the largest logits by bisection, then all that has at most 64 lanes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import Case, guard
from ..mamba.launch import dense
from .numerics import DRAFT, INF, TILE, key_of, largest, total, uniform53, value_of, weight64
from .rows import (
    BIASES,
    CUTOFF_OPTIONS,
    LOWEST_KEY,
    PLAIN,
    STEP,
    Rows,
    case_types,
    edited_tiles,
    highest,
    load_edited,
    measure,
    sampled_at,
    summary,
    top_of,
)  # fmt: skip

__all__ = ["compile_cases", "mtp_draft_sample"]

OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


@triton.jit(do_not_specialize=["sizes", "max_ids"])
def _collect_kernel(
    logits, requests, params, edits, records, sizes, found_ptr, max_ids,
    STEP: tl.constexpr, TILES: tl.constexpr, BIASES: tl.constexpr,
):  # fmt: skip
    """One program per row that is drawn: the tokens of its largest logits, in any order; of equals the lowest."""
    r = tl.program_id(0)
    vocab, tiles = logits[2], sizes[3]
    row = r.to(tl.int64)
    slot = r
    if requests[1] is not None:
        slot = tl.load(requests[1] + r)
    if (slot >= 0) & (slot < sizes[1]):
        temperature, sampled = sampled_at(params, slot)
        top, arg, flags, ignored, tops = summary(records, r, tiles, TILES)
        if sampled & (tl.abs(top) < INF):
            unmasked = r - r - 1
            wanted = tl.minimum(max_ids, vocab)
            low = highest(
                logits, edits, records, sizes, r, row, unmasked, ignored, key_of(top) - key_of(top) + LOWEST_KEY,
                wanted.to(tl.float64), top, temperature, False, STEP, BIASES,
            )  # fmt: skip
            cut = value_of(low)
            above, over, under = measure(
                logits, edits, records, sizes, r, row, unmasked, ignored, value_of(low + 1), top, temperature,
                False, STEP, BIASES,
            )  # fmt: skip
            places = above.to(tl.int32)  # of the logits above the cut; those at it come after them
            higher, equal = r - r, r - r
            for tile in range(tiles):
                if top_of(records, r, tiles, tile, ignored, 1) >= cut:
                    ids, x = edited_tiles(logits, edits, sizes, row, tile, unmasked, TILE, BIASES)
                    over_cut = ((ids < vocab) & (x > cut)).to(tl.int32)
                    at_cut = ((ids < vocab) & (x == cut)).to(tl.int32)
                    place = tl.where(
                        over_cut != 0, higher + tl.cumsum(over_cut, axis=0), places + equal + tl.cumsum(at_cut, axis=0)
                    ) - 1  # fmt: skip
                    keeps = ((over_cut | at_cut) != 0) & (place < wanted)
                    tl.store(found_ptr + row * max_ids + place, ids, mask=keeps)
                    higher += total(over_cut)
                    equal += total(at_cut)


@triton.jit(do_not_specialize=["sizes", "max_ids"])
def _draft_kernel(
    logits, requests, params, edits, records, sizes, found_ptr, seed_ptr, pos_ptr, vocab_ptr,
    tokens_ptr, ids_ptr, probs_ptr, max_ids,
    BLOCK_M: tl.constexpr, TILES: tl.constexpr, BIASES: tl.constexpr,
):  # fmt: skip
    """One program per row: its law in order, and the draw. A row without noise has its largest logit's token."""
    r = tl.program_id(0)
    vocab, tiles = logits[2], sizes[3]
    row = r.to(tl.int64)
    lane = tl.arange(0, BLOCK_M)
    at = row * max_ids + lane
    slot = r
    if requests[1] is not None:
        slot = tl.load(requests[1] + r)
    token, count = r - r - 1, r - r
    if (slot >= 0) & (slot < sizes[1]):
        temperature, sampled = sampled_at(params, slot)
        top, token, flags, ignored, tops = summary(records, r, tiles, TILES)
        ids = tl.where(lane == 0, token, -1)
        rank = lane
        law = tl.where(lane == 0, 1.0, 0.0).to(tl.float64)
        if sampled & (tl.abs(top) < INF):
            ids = tl.load(found_ptr + at, mask=lane < tl.minimum(max_ids, vocab), other=-1)
            x, known = load_edited(logits, edits, sizes, row, ids, ids >= 0, 0, vocab, r - r - 1, BIASES)
            x = tl.where(known & (x == x), x, -INF)
            lower = (x[None, :] == x[:, None]) & (ids[None, :] < ids[:, None])
            before = ((x[None, :] > x[:, None]) | lower) & (ids[None, :] >= 0)
            rank = total(before.to(tl.int32), 1)
            law = weight64(x, top, temperature)
            law = tl.where(ids >= 0, law / total(law), 0.0)
        kept = (ids >= 0) & (law > 0.0)
        probs = law.to(tl.float32)
        tl.store(ids_ptr + row * max_ids + rank, ids, mask=kept)
        tl.store(probs_ptr + row * max_ids + rank, probs, mask=kept)

        wide = tl.where(kept, probs.to(tl.float64), 0.0)
        upto = tl.where(rank[None, :] <= rank[:, None], tl.broadcast_to(wide[None, :], (BLOCK_M, BLOCK_M)), 0.0)
        sums = total(upto, 1)
        u = uniform53(tl.load(seed_ptr + slot), tl.load(pos_ptr + r), DRAFT)
        passed = total((kept & (sums <= u * largest(sums))).to(tl.int32))
        count = total(kept.to(tl.int32))
        drawn = tl.minimum(passed, count - 1)
        token = largest(tl.where(kept & (rank == drawn), ids, -1))
        if vocab_ptr is not None:
            token = tl.load(vocab_ptr + token)
    rest = (lane >= count) & (lane < max_ids)
    tl.store(ids_ptr + at, tl.full((BLOCK_M,), -1, tl.int32), mask=rest)
    tl.store(probs_ptr + at, tl.zeros((BLOCK_M,), tl.float32), mask=rest)
    tl.store(tokens_ptr + r, token)


def mtp_draft_sample(
    logits: Tensor, seed: Tensor, pos: Tensor, *, max_ids: int, slot: Tensor | None = None,
    temperature: Tensor | None = None, draft_vocab: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    n = logits.shape[0]
    tokens = seed.new_empty(n, dtype=torch.int32)
    ids, probs = (seed.new_empty(n, max_ids, dtype=dtype) for dtype in (torch.int32, torch.float32))
    if n == 0:
        return tokens, ids, probs
    rows = Rows.measure(logits, seed, n, slot=slot, temperature=temperature, greedy=True)
    found = torch.empty_like(ids)
    args = (rows.logits, rows.requests, rows.params, rows.edits, rows.records, rows.sizes, found)
    sizes = {name: rows.flags[name] for name in ("TILES", "BIASES")}
    step = min(STEP, triton.next_power_of_2(rows.sizes[3]))
    with guard(logits):
        _collect_kernel[(n,)](*args, max_ids, STEP=step, **sizes, **CUTOFF_OPTIONS)
        _draft_kernel[(n,)](
            *args, dense(seed), dense(pos), dense(draft_vocab), tokens, ids, probs, max_ids,
            BLOCK_M=max(triton.next_power_of_2(max_ids), 16), **sizes, **OPTIONS,
        )  # fmt: skip
    return tokens, ids, probs


def compile_cases(arch: int):
    own = {
        "found_ptr": "*i32", "seed_ptr": "*i64", "pos_ptr": "*i64", "vocab_ptr": "*i32", "tokens_ptr": "*i32",
        "ids_ptr": "*i32", "probs_ptr": "*fp32", "max_ids": "i32",
    }  # fmt: skip
    for dtype in ("fp32", "fp16", "bf16"):
        types = case_types(dtype, PLAIN, (None, "*i32", None), params=("*fp32", None, None, None)) | own
        for kernel, constants, options in (
            (_collect_kernel, {"STEP": STEP}, CUTOFF_OPTIONS), (_draft_kernel, {"BLOCK_M": 64}, OPTIONS)
        ):  # fmt: skip
            wanted = {name: t for name, t in types.items() if name in kernel.arg_names}
            name = kernel.__name__.strip("_").removesuffix("_kernel")
            yield Case(f"{name}-{dtype}", kernel, wanted, {**constants, "TILES": 32, "BIASES": BIASES}, options)
