"""sample: one token per row, by two levels of Gumbel noise."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import Case, guard
from ..mamba.launch import dense
from .numerics import INF, TARGET, TILE, TILE_STREAM, first_of, gumbel, largest, quad_words, total, word_of
from .rows import (
    BIASES,
    CHAINS,
    EDITED,
    FLAG_OUT_OF_RANGE,
    PLAIN,
    Rows,
    case_types,
    edited_tiles,
    flags_of,
    forced_token,
    locate,
    mask_row_of,
    masses_of,
    sampled_at,
    summary,
)  # fmt: skip

__all__ = ["compile_cases", "draw", "sample"]

OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}


@triton.jit(do_not_specialize=["sizes"])
def _draw_kernel(
    logits, requests, params, edits, records, sizes, seed_ptr, pos_ptr, tokens_ptr, logprobs_ptr, flags_ptr,
    GREEDY: tl.constexpr, FILTERED: tl.constexpr,
    TILES: tl.constexpr, BLOCK_K: tl.constexpr, BIASES: tl.constexpr,
):  # fmt: skip
    """One program per unit: its token, of greedy rows from the records alone."""
    unit = tl.program_id(0)
    vocab, tiles = logits[2], sizes[3]
    b, i, first, _, slot, live = locate(requests, sizes, unit, BLOCK_K)
    token = unit - unit - 1
    logprob = tl.full((), 0.0, tl.float64)
    flags = tl.where(slot >= sizes[1], FLAG_OUT_OF_RANGE, 0)
    if live:
        row = (first + i).to(tl.int64)
        token = forced_token(edits, row, vocab)
        if token < 0:
            top, token, flags, ignored, tops = summary(records, unit, tiles, TILES)
            flags |= flags_of(edits, row, vocab)
            if not GREEDY:
                temperature, sampled = sampled_at(params, slot)
                if sampled & (top > -INF):
                    seed, pos = tl.load(seed_ptr + slot), tl.load(pos_ptr + b) + i
                    wide, top64 = temperature.to(tl.float64), top.to(tl.float64)
                    sums, masses = masses_of(records, unit, tiles, tops, top, temperature, TILES)
                    lane = tl.arange(0, TILES)
                    z = tl.where(tops == top, 0.0, (tops.to(tl.float64) - top64) / wide)
                    noise = gumbel(word_of(seed, pos, TILE_STREAM, lane.to(tl.int64)))
                    score = tl.where(masses > 0.0, tl.log(tl.where(sums > 0.0, sums, 1.0)) + z + noise, -INF)
                    tile = first_of(score == largest(score), lane)

                    mask_row = tl.where(ignored != 0, -1, mask_row_of(edits, row))
                    ids, x = edited_tiles(logits, edits, sizes, row, tile, mask_row, TILE, BIASES)
                    kept = x > -INF
                    if FILTERED:
                        kept &= x >= tl.load(records[4] + unit)
                    z = tl.where(x == top, 0.0, (x.to(tl.float64) - top64) / wide)
                    noise = gumbel(quad_words(seed, pos, TARGET, tile.to(tl.int64) * TILE, TILE))
                    score = tl.where(kept, z + noise, -INF)
                    token = first_of(kept & (score == largest(score)), ids)
                    logprob = total(tl.where(ids == token, z, 0.0)) - tl.log(total(masses))
    tl.store(tokens_ptr + unit, token)
    tl.store(logprobs_ptr + unit, logprob.to(tl.float32))
    tl.store(flags_ptr + unit, flags)


def draw(rows: Rows, seed: Tensor, pos: Tensor, units: int, greedy: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Token, log-probability and flags of every unit."""
    tokens, flags = (seed.new_empty(units, dtype=torch.int32) for _ in range(2))
    logprobs = seed.new_empty(units, dtype=torch.float32)
    if units:
        with guard(seed):
            _draw_kernel[(units,)](
                rows.logits, rows.requests, rows.params, rows.edits, rows.records, rows.sizes, dense(seed), dense(pos),
                tokens, logprobs, flags, GREEDY=greedy, FILTERED=rows.records[4] is not None, **rows.flags, **OPTIONS,
            )  # fmt: skip
    return tokens, logprobs, flags


def sample(logits: Tensor, seed: Tensor, pos: Tensor, **options: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    n = logits.shape[0]
    return draw(Rows.measure(logits, seed, n, **options), seed, pos, n, False)


def compile_cases(arch: int):
    own = {"seed_ptr": "*i64", "pos_ptr": "*i64", "tokens_ptr": "*i32", "logprobs_ptr": "*fp32", "flags_ptr": "*i32"}
    blocks = {"TILES": 32, "BLOCK_K": 8, "BIASES": BIASES}
    for name, dtype, edits, greedy, requests in (
        ("plain", "fp32", PLAIN, False, (None, None, None)), ("plain", "bf16", PLAIN, False, CHAINS),
        ("all", "bf16", EDITED, False, CHAINS), ("greedy", "fp16", PLAIN, True, CHAINS),
    ):  # fmt: skip
        yield Case(
            f"draw-{name}-{dtype}", _draw_kernel, case_types(dtype, edits, requests) | own,
            {"GREEDY": greedy, "FILTERED": edits is EDITED, **blocks}, OPTIONS,
        )  # fmt: skip
