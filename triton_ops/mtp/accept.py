"""Modes token and block of mtp_verify for drafts that are certain, or whose law is a short list.

One program per request decides; what it reads of a row are the records of its tiles, the tokens of the draft's law and,
for the last token, one tile again.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common import Case, device_function
from .chains import (
    EOS,
    NOISE,
    STORED,
    accept_uniform,
    chain_of,
    end_chain,
    flag_of_draft,
    law_of_row,
    logprob_of,
    pick_tile,
    pick_token,
    store_request,
    tile_law,
)  # fmt: skip
from .numerics import INF, TILE, largest, total, weight64
from .rows import (
    BIASES,
    CERTAIN,
    EDITED,
    FLAG_OUT_OF_RANGE,
    PLAIN,
    SPARSE,
    case_types,
    law_at,
    law_vector,
    load_edited,
    locate,
)  # fmt: skip

__all__ = ["accept_kernel", "against_support", "compile_cases", "entries_of"]

OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}


@device_function
def against_support(
    logits, edits, laws, sizes, row, law, TILES: tl.constexpr, BLOCK_M: tl.constexpr, BIASES: tl.constexpr
):
    """Of a row: the support of its draft's law, -1 where there is none, and p and q of its tokens; the tiles' p outside
    it; the sum of all weights."""
    only, top, temperature, _, cut, mask_row, masses, _ = law
    vocab = logits[2]
    lane = tl.arange(0, TILES)
    token, q = law_vector(laws, row, vocab, BLOCK_M)
    known = tl.where(only < 0, token, -1) >= 0
    x, allowed = load_edited(logits, edits, sizes, row, token, known, 0, vocab, mask_row, BIASES)
    x = tl.where(allowed & (x == x), x, -INF)
    p = tl.where(known & (x >= cut), weight64(x, top, temperature), 0.0)
    z = total(masses) + total(p)
    z = tl.where(z > 0.0, z, 1.0)
    outside = masses / z
    p = p / z
    if only >= 0:
        p = tl.where(token == only, 1.0, 0.0).to(tl.float64)
        free = largest((token == only).to(tl.int32)) == 0
        outside = tl.where((lane == only // TILE) & free, 1.0, 0.0).to(tl.float64)
        z = tl.full((), 1.0, tl.float64)
    return token, p, tl.where(token >= 0, q, 0.0), outside, z


@device_function
def _ratio(draft, token, p, q, vocab):
    """p and q of a draft, both 0 where it cannot be accepted, and its flag."""
    its = token == draft
    p_draft, q_draft = total(tl.where(its, p, 0.0)), total(tl.where(its, q, 0.0))
    flag, drawn = flag_of_draft(draft, q_draft, vocab)
    return tl.where(drawn, p_draft, 0.0), tl.where(drawn, q_draft, 0.0), flag


@device_function
def by_tile(token, mass, TILES: tl.constexpr, BLOCK_M: tl.constexpr):
    """The masses of some tokens, summed by tile."""
    inside = ((token // TILE)[:, None] == tl.arange(0, TILES)[None, :]) & (token >= 0)[:, None]
    return total(tl.where(inside, tl.broadcast_to(mass[:, None], (BLOCK_M, TILES)), 0.0), 0)


@device_function
def _final_draw(
    logits, edits, laws, sizes, unit, row, slot, law, scale, rejected, u,
    BLOCK_M: tl.constexpr, TILES: tl.constexpr, BIASES: tl.constexpr,
):  # fmt: skip
    """A token from max(scale p - q, 0) after a rejection, else, or where nothing is left, from p; and log p of it."""
    token, p, q, outside, z = against_support(logits, edits, laws, sizes, row, law, TILES, BLOCK_M, BIASES)
    left = tl.where(rejected, tl.maximum(scale * p - q, 0.0), scale * p)
    taken = rejected & (scale * total(outside) + total(left) > 0.0)
    left = tl.where(taken, left, scale * p)
    mass = scale * outside + by_tile(token, left, TILES, BLOCK_M)
    tile, before, wanted = pick_tile(mass, u, TILES)

    ids, p_of, otherwise = tile_law(logits, edits, sizes, row, law, z, tile, BIASES)
    lowest = tile * TILE
    q_of = tl.zeros((TILE,), tl.float64)
    for j in range(laws[4]):
        one, its = law_at(laws, row, j, logits[2])
        if (one >= lowest) & (one < lowest + TILE):
            q_of = tl.where(ids == one, q_of + its, q_of)
    w = tl.where(taken, tl.maximum(scale * p_of - q_of, 0.0), scale * p_of)
    drawn = pick_token(w, ids, otherwise, before, wanted)
    return drawn, logprob_of(logits, edits, sizes, row, law, z, drawn, BIASES)


@triton.jit(do_not_specialize=["sizes", "eos_count"])
def accept_kernel(
    logits, requests, params, edits, laws, records, sizes, seed_ptr, pos_ptr, uniforms_ptr, eos_ptr, eos_count,
    tokens_ptr, num_ptr, last_ptr, logprobs_ptr, flags_ptr,
    BY_BLOCK: tl.constexpr, FILTERED: tl.constexpr, BLOCK_M: tl.constexpr,
    TILES: tl.constexpr, BLOCK_K: tl.constexpr, BIASES: tl.constexpr,
):  # fmt: skip
    """One program per request: its rows in order, up to the first rejection in mode token."""
    b, width, vocab = tl.program_id(0), sizes[2], logits[2]
    _, _, first, count, slot, live = locate(requests, sizes, b * width, BLOCK_K)
    drafts, k, ends = chain_of(requests[2], first, count, width, eos_ptr, eos_count, live, BLOCK_K)
    lane = tl.arange(0, BLOCK_K)
    tokens = drafts
    logprobs = tl.zeros((BLOCK_K,), tl.float32)
    emitted = tl.full((), 0, tl.int32)
    flags = tl.where(slot >= sizes[1], FLAG_OUT_OF_RANGE, 0)
    if live:
        seed, pos = tl.load(seed_ptr + slot), tl.load(pos_ptr + b)
        w = tl.full((), 1.0, tl.float64)  # in mode block: min(1, w p / q) over the drafts so far
        scale = tl.full((), 1.0, tl.float64)  # w of row tau
        u = tl.full((), 0.0, tl.float64)
        tau = tl.full((), 0, tl.int32)
        i = tl.full((), 0, tl.int32)
        going = i == 0
        while (i < k) & going:
            row = (first + i).to(tl.int64)
            law = law_of_row(logits, params, edits, records, sizes, b * width + i, row, slot, TILES, FILTERED)
            token, p, q, outside, z = against_support(logits, edits, laws, sizes, row, law, TILES, BLOCK_M, BIASES)
            draft = total(tl.where(lane == i, drafts, 0))
            p_draft, q_draft, flag = _ratio(draft, token, p, q, vocab)
            flags |= law[3] | flag
            logprob = tl.log(tl.where(p_draft > 0.0, p_draft, 1.0))
            logprobs = tl.where(lane == i, logprob.to(tl.float32), logprobs)
            if BY_BLOCK:
                above = w * total(outside) + total(tl.maximum(w * p - q, 0.0))
                rest = above + 1.0 - w
                h = tl.where((i == 0) | (rest <= 0.0), 1.0, above / tl.where(rest > 0.0, rest, 1.0))
                tau = tl.where(u < h, i, tau)  # u is still that of the draft before
                scale = tl.where(u < h, w, scale)
                w = tl.where(q_draft > 0.0, tl.minimum(w * p_draft / tl.where(q_draft > 0.0, q_draft, 1.0), 1.0), 0.0)
            u = accept_uniform(uniforms_ptr, row, seed, pos + i, pos - pos)
            if not BY_BLOCK:
                going = (p_draft > 0.0) & (q_draft > 0.0) & (u * q_draft < p_draft)
                tau += going.to(tl.int32)
            i += 1

        if BY_BLOCK:
            all_accepted = u < w  # of no drafts as well: u = 0
            tau = tl.where(all_accepted, k, tau)
        scale = tl.where(tau < k, scale, 1.0)
        tokens, logprobs, emitted, flags = end_chain(
            logits, params, edits, records, sizes, b, first, slot, k, ends, tau, scale, seed, pos, uniforms_ptr,
            tokens, logprobs, flags, laws, _final_draw, BLOCK_M, BY_BLOCK, FILTERED, TILES, BLOCK_K, BIASES,
        )  # fmt: skip
    store_request(
        tokens_ptr, num_ptr, last_ptr, logprobs_ptr, flags_ptr, b, width, tokens, logprobs, emitted, first, flags,
        BLOCK_K,
    )  # fmt: skip


def entries_of(count: int) -> int:
    """Lanes for the entries of a law."""
    return max(triton.next_power_of_2(count), 16)


def compile_cases(arch: int):
    blocks = {"TILES": 32, "BLOCK_K": 8, "BIASES": BIASES}
    absent = {"uniforms_ptr": None, "eos_ptr": None}
    for mode, dtype, laws in (
        ("token", "fp32", CERTAIN), ("token", "bf16", SPARSE), ("block", "bf16", CERTAIN), ("block", "fp16", SPARSE)
    ):  # fmt: skip
        certain = laws is CERTAIN
        types = case_types(dtype, PLAIN if certain else EDITED, laws=laws) | NOISE | STORED
        types |= {"eos_count": "i32"} if certain else EOS | {"uniforms_ptr": "*fp64"}
        constants = {"BY_BLOCK": mode == "block", "FILTERED": not certain, "BLOCK_M": 16 if certain else 64}
        yield Case(
            f"{mode}-{'certain' if certain else 'sparse'}-{dtype}", accept_kernel, types,
            {**constants, **blocks, **(absent if certain else {})}, OPTIONS,
        )  # fmt: skip
