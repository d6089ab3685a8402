"""What verification of chains and of trees share: chains of drafts, uniform numbers, laws of rows, final draws.

The law of a row is a tuple: its one token or -1, largest logit, temperature, flags, cut, mask row, the tiles' masses
relative to the largest logit, and the most probable token.
"""

from __future__ import annotations

import triton.language as tl

from ..common import device_function
from .numerics import (
    ACCEPT,
    INF,
    NOWHERE,
    RESIDUAL,
    TILE,
    first_of,
    largest,
    smallest,
    total,
    uniform53,
    weight,
    weight64,
    word_of,
)  # fmt: skip
from .rows import (
    FLAG_OUT_OF_RANGE,
    edited_tiles,
    flags_of,
    forced_token,
    load_edited,
    mask_row_of,
    masses_of,
    sampled_at,
    summary,
)  # fmt: skip

__all__ = [
    "EOS", "FLAG_NOT_DRAWN", "NOISE", "STORED", "accept_uniform", "chain_of", "end_chain", "ends_sequence",
    "final_uniform", "flag_of_draft", "law_of_row", "logprob_of", "masses_of_row", "pick_tile", "pick_token",
    "prob_of", "store_request", "tile_law", "total_of",
]  # fmt: skip

FLAG_NOT_DRAWN = tl.constexpr(16)
ONE = tl.constexpr(16)  # lanes for one token: what a load masks must be a vector

# For compile_cases.
STORED = {"tokens_ptr": "*i32", "num_ptr": "*i32", "last_ptr": "*i32", "logprobs_ptr": "*fp32", "flags_ptr": "*i32"}
EOS = {"eos_ptr": "*i32", "eos_count": "i32"}
NOISE = {"seed_ptr": "*i64", "pos_ptr": "*i64"}


# ---------------------------------------------------------------- requests


@device_function
def ends_sequence(token, eos_ptr, eos_count):
    """Which tokens are an EOS."""
    ends = token != token
    if eos_ptr is not None:
        for j in range(eos_count):
            ends = ends | (token == tl.load(eos_ptr + j))
    return ends


@device_function
def chain_of(drafts_ptr, first, count, width, eos_ptr, eos_count, live, BLOCK_K: tl.constexpr):
    """Drafts by row, -1 past the chain; their number; whether the last one is an EOS, which nothing follows."""
    lane = tl.arange(0, BLOCK_K)
    checked = tl.where(live, tl.minimum(count, width) - 1, 0)  # the last row has no draft to check
    drafts = tl.load(drafts_ptr + first + lane, mask=lane < checked, other=-1)
    missing = smallest(tl.where(drafts < 0, lane, BLOCK_K))
    eos = first_of(ends_sequence(drafts, eos_ptr, eos_count) & (drafts >= 0), lane)
    ends = eos < missing
    k = tl.where(ends, eos + 1, missing)
    return tl.where(lane < k, drafts, -1), k, ends


@device_function
def store_request(
    tokens_ptr, num_ptr, last_ptr, logprobs_ptr, flags_ptr, b, width, tokens, logprobs, emitted, first, flags,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    lane = tl.arange(0, BLOCK_K)
    at = b.to(tl.int64) * width + lane
    tl.store(tokens_ptr + at, tl.where(lane < emitted, tokens, -1), mask=lane < width)
    tl.store(logprobs_ptr + at, tl.where(lane < emitted, logprobs, 0.0), mask=lane < width)
    tl.store(num_ptr + b, emitted)
    tl.store(last_ptr + b, tl.where(emitted > 0, first + emitted - 1, -1))
    tl.store(flags_ptr + b, flags)


@device_function
def accept_uniform(uniforms_ptr, row, seed, pos, sibling):
    """``sibling``: int64, 0 in a chain."""
    if uniforms_ptr is not None:
        u = tl.load(uniforms_ptr + 2 * row)
    else:
        u = (word_of(seed, pos, ACCEPT, sibling).to(tl.float64) + 0.5) * 2.3283064365386963e-10  # 2^-32
    return u


@device_function
def final_uniform(uniforms_ptr, row, seed, pos):
    if uniforms_ptr is not None:
        u = tl.load(uniforms_ptr + 2 * row + 1)
    else:
        u = uniform53(seed, pos, RESIDUAL)
    return u


# ---------------------------------------------------------------- laws


@device_function
def law_of_row(logits, params, edits, records, sizes, unit, row, slot, TILES: tl.constexpr, FILTERED: tl.constexpr):
    """What the records say of a row. The masses are those outside the support of the draft's law, if it has one."""
    vocab, tiles = logits[2], sizes[3]
    mask_row = mask_row_of(edits, row)
    temperature, sampled = sampled_at(params, slot)
    only = forced_token(edits, row, vocab)
    best = only
    top = tl.full((), 0.0, tl.float32)
    cut = tl.full((), float("-inf"), tl.float32)
    flags = tl.full((), 0, tl.int32)
    masses = tl.zeros((TILES,), tl.float64)
    if only < 0:
        top, best, flags, ignored, tops = summary(records, unit, tiles, TILES)
        flags |= flags_of(edits, row, vocab)
        mask_row = tl.where(ignored != 0, -1, mask_row)
        if sampled & (top > -INF):
            _, masses = masses_of(records, unit, tiles, tops, top, temperature, TILES)
            if FILTERED:
                cut = tl.load(records[4] + unit)
        else:
            only = best
    return only, top, temperature, flags, cut, mask_row, masses, best


@device_function
def total_of(law):
    """The sum of all weights; of a row with one token 1."""
    z = total(law[6])
    return tl.where((law[0] < 0) & (z > 0.0), z, 1.0)


@device_function
def masses_of_row(law, z, TILES: tl.constexpr):
    """The tiles' masses, of a row with one token 1 in its tile."""
    tile = tl.where(law[0] >= 0, law[0] // TILE, -1)  # -1 // TILE is 0
    return tl.where(tl.arange(0, TILES) == tile, 1.0, law[6] / z)


@device_function
def prob_of(logits, edits, sizes, row, law, z, token, BIASES: tl.constexpr):
    """p of one token, 0 where it is past the vocabulary, and its logit."""
    only, top, temperature, _, cut, mask_row, _, _ = law
    vocab = logits[2]
    lane = tl.arange(0, ONE)
    ids = tl.zeros((ONE,), tl.int32) + token
    known = tl.where((lane == 0) & (ids < vocab), ids, -1) >= 0
    x, allowed = load_edited(logits, edits, sizes, row, ids, known, 0, vocab, mask_row, BIASES)
    x = tl.where(allowed & (x == x), x, -INF)
    p = total(tl.where(x >= cut, weight64(x, top, temperature), 0.0)) / z
    return tl.where(only >= 0, tl.where(token == only, 1.0, 0.0).to(tl.float64), p), largest(x)


@device_function
def flag_of_draft(draft, q_draft, vocab):
    """That of a draft, and whether it can be accepted at all."""
    drawn = (draft < vocab) & (q_draft > 0.0) & (q_draft < INF)
    return tl.where(draft >= vocab, FLAG_OUT_OF_RANGE, tl.where(drawn, 0, FLAG_NOT_DRAWN)), drawn


# ---------------------------------------------------------------- final draws, by inverse distribution function


@device_function
def pick_tile(mass, u, TILES: tl.constexpr):
    """The tile in which the running sum of the masses passes u times their total, the sum before it, and that."""
    lane = tl.arange(0, TILES)
    ends = tl.cumsum(mass, axis=0)
    wanted = u * total(tl.where(lane == TILES - 1, ends, 0.0))
    tile = first_of((ends > wanted) & (mass > 0.0), lane)
    tile = tl.where(tile == NOWHERE, largest(tl.where(mass > 0.0, lane, 0)), tile)
    return tile, total(tl.where(lane == tile - 1, ends, 0.0)), wanted


@device_function
def tile_law(logits, edits, sizes, row, law, z, tile, BIASES: tl.constexpr):
    """Tokens of a tile, p, and the last token with a p."""
    only, top, temperature, _, cut, mask_row, _, _ = law
    ids = tl.arange(0, TILE) + tile * TILE
    p = tl.where(ids == only, 1.0, 0.0).to(tl.float64)
    if only < 0:
        ids, x = edited_tiles(logits, edits, sizes, row, tile, mask_row, TILE, BIASES)
        tile_top = largest(x)
        factor = weight64(tile_top, top, temperature) / z
        p = tl.where(x >= cut, weight(x, tile_top, temperature), 0.0).to(tl.float64) * factor
    return ids, p, largest(tl.where(p > 0.0, ids, tile * TILE))


@device_function
def pick_token(w, ids, otherwise, before, wanted):
    """The token of a tile at which the running sum of ``w`` passes ``wanted``; the last with a weight if none does."""
    last = largest(tl.where(w > 0.0, ids, -1))
    last = tl.where(last < 0, otherwise, last)
    drawn = first_of((w > 0.0) & (before + tl.cumsum(w, axis=0) > wanted), ids)
    return tl.where(drawn == NOWHERE, last, drawn)


@device_function
def logprob_of(logits, edits, sizes, row, law, z, token, BIASES: tl.constexpr):
    """log p of a token that was drawn."""
    only, top, temperature, _, _, _, _, _ = law
    at = prob_of(logits, edits, sizes, row, law, z, token, BIASES)[1]
    at = tl.where(at == top, 0.0, (at.to(tl.float64) - top.to(tl.float64)) / temperature.to(tl.float64))
    return tl.where(only >= 0, 0.0, at - tl.log(z))


@device_function
def end_chain(
    logits, params, edits, records, sizes, b, first, slot, k, ends, tau, scale, seed, pos, uniforms_ptr,
    tokens, logprobs, flags, own, DRAW: tl.constexpr, WIDTH: tl.constexpr, BY_BLOCK: tl.constexpr,
    FILTERED: tl.constexpr, TILES: tl.constexpr, BLOCK_K: tl.constexpr, BIASES: tl.constexpr,
):  # fmt: skip
    """Of a chain with ``tau`` accepted drafts: tokens and their log-probabilities with that behind them, if one may
    follow; how many; and flags. ``DRAW`` draws it, from what is left of ``scale`` p after a rejection; ``own`` and
    ``WIDTH`` are for it."""
    lane = tl.arange(0, BLOCK_K)
    rejected = tau < k
    if BY_BLOCK:
        if rejected & (ends == 0):  # the row after the last draft was looked at
            row = (first + k).to(tl.int64)
            law = law_of_row(logits, params, edits, records, sizes, b * sizes[2] + k, row, slot, TILES, FILTERED)
            flags |= law[3]
    emitted = tau
    if rejected | (ends == 0):
        unit, row = b * sizes[2] + tau, (first + tau).to(tl.int64)
        law = law_of_row(logits, params, edits, records, sizes, unit, row, slot, TILES, FILTERED)
        flags |= law[3]
        u = final_uniform(uniforms_ptr, row, seed, pos + tau)
        token, logprob = DRAW(
            logits, edits, own, sizes, unit, row, slot, law, scale, rejected, u, WIDTH, TILES, BIASES
        )  # fmt: skip
        tokens = tl.where(lane == tau, token, tokens)
        logprobs = tl.where(lane == tau, logprob.to(tl.float32), logprobs)
        emitted = tau + 1
    return tokens, logprobs, emitted, flags
