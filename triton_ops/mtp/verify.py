"""mtp_verify: modes greedy and coupled compare with `sample`'s tokens, token and block test drafts against their laws.

One program per request decides; what it reads of a row are the records of its tiles, the tokens of the draft's law and,
for the last token, one tile again.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import Case, device_function, guard
from ..mamba.launch import dense
from .numerics import (
    ACCEPT,
    INF,
    NOWHERE,
    RESIDUAL,
    TILE,
    any_bits,
    first_of,
    largest,
    smallest,
    total,
    uniform,
    uniform53,
    weight,
    weight64,
    words,
)  # fmt: skip
from .rows import (
    BIASES,
    CERTAIN,
    CHAINS,
    EDITED,
    FLAG_OUT_OF_RANGE,
    PLAIN,
    SIZES,
    SPARSE,
    Rows,
    case_types,
    edited_tiles,
    flags_of,
    forced_token,
    law_at,
    law_vector,
    load_edited,
    locate,
    mask_row_of,
    masses_of,
    sampled_at,
    summary,
)  # fmt: skip
from .sample import draw

__all__ = ["compile_cases", "mtp_verify"]

FLAG_NOT_DRAWN = tl.constexpr(16)
OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}


# ---------------------------------------------------------------- chains


@device_function
def _ends_sequence(token, eos_ptr, eos_count):
    """Which tokens are an EOS."""
    ends = token != token
    if eos_ptr is not None:
        for j in range(eos_count):
            ends = ends | (token == tl.load(eos_ptr + j))
    return ends


@device_function
def _chain(drafts_ptr, first, count, width, eos_ptr, eos_count, live, BLOCK_K: tl.constexpr):
    """Drafts by row, -1 past the chain; their number; whether the last one is an EOS, which nothing follows."""
    lane = tl.arange(0, BLOCK_K)
    checked = tl.where(live, tl.minimum(count, width) - 1, 0)  # the last row has no draft to check
    drafts = tl.load(drafts_ptr + first + lane, mask=lane < checked, other=-1)
    missing = smallest(tl.where(drafts < 0, lane, BLOCK_K))
    eos = first_of(_ends_sequence(drafts, eos_ptr, eos_count) & (drafts >= 0), lane)
    ends = eos < missing
    k = tl.where(ends, eos + 1, missing)
    return tl.where(lane < k, drafts, -1), k, ends


@device_function
def _store_request(
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


@triton.jit(do_not_specialize=["sizes", "eos_count"])
def _compare_kernel(
    requests, sizes, vocab, own_ptr, own_logprobs_ptr, own_flags_ptr, eos_ptr, eos_count,
    tokens_ptr, num_ptr, last_ptr, logprobs_ptr, flags_ptr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program per request: the target's own tokens, up to the first that is not the draft."""
    b, width = tl.program_id(0), sizes[2]
    _, _, first, count, slot, live = locate(requests, sizes, b * width, BLOCK_K)
    drafts, k, _ = _chain(requests[2], first, count, width, eos_ptr, eos_count, live, BLOCK_K)
    lane = tl.arange(0, BLOCK_K)
    at = b.to(tl.int64) * width + lane
    reached = lane < tl.where(live, k + 1, 0)
    own = tl.load(own_ptr + at, mask=reached, other=-1)
    stop = first_of(_ends_sequence(own, eos_ptr, eos_count) | (lane == k) | (drafts != own), lane)
    looked_at = reached & (lane <= stop)
    flags = tl.load(own_flags_ptr + at, mask=looked_at, other=0)
    flags = any_bits(flags | tl.where(looked_at & (drafts >= vocab), FLAG_OUT_OF_RANGE, 0))
    flags |= tl.where(slot >= sizes[1], FLAG_OUT_OF_RANGE, 0)
    _store_request(
        tokens_ptr, num_ptr, last_ptr, logprobs_ptr, flags_ptr, b, width,
        own, tl.load(own_logprobs_ptr + at, mask=looked_at, other=0.0), tl.where(live, stop + 1, 0), first, flags,
        BLOCK_K,
    )  # fmt: skip


# ---------------------------------------------------------------- laws


@device_function
def _law_of_row(
    logits, params, edits, records, sizes, unit, row, slot, TILES: tl.constexpr, FILTERED: tl.constexpr
):
    """What the records say of a row: its one token or -1, largest logit, temperature, flags, cut and mask row; the
    tiles' masses outside the support of the draft's law, relative to the largest logit."""
    vocab, tiles = logits[2], sizes[3]
    mask_row = mask_row_of(edits, row)
    temperature, sampled = sampled_at(params, slot)
    only = forced_token(edits, row, vocab)
    top = tl.full((), 0.0, tl.float32)
    cut = tl.full((), float("-inf"), tl.float32)
    flags = tl.full((), 0, tl.int32)
    masses = tl.zeros((TILES,), tl.float64)
    if only < 0:
        top, arg, flags, ignored, tops = summary(records, unit, tiles, TILES)
        flags |= flags_of(edits, row, vocab)
        mask_row = tl.where(ignored != 0, -1, mask_row)
        if sampled & (top > -INF):
            _, masses = masses_of(records, unit, tiles, tops, top, temperature, TILES)
            if FILTERED:
                cut = tl.load(records[4] + unit)
        else:
            only = arg
    return only, top, temperature, flags, cut, mask_row, masses


@device_function
def _against_support(
    logits, edits, laws, sizes, row, law, TILES: tl.constexpr, BLOCK_M: tl.constexpr, BIASES: tl.constexpr
):
    """Of a row: the support of its draft's law, -1 where there is none, and p and q of its tokens; the tiles' p outside
    it; the sum of all weights."""
    only, top, temperature, _, cut, mask_row, masses = law
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
    drawn = (q_draft > 0.0) & (q_draft < INF)
    flag = tl.where(draft >= vocab, FLAG_OUT_OF_RANGE, tl.where(drawn, 0, FLAG_NOT_DRAWN))
    return tl.where(drawn, p_draft, 0.0), tl.where(drawn, q_draft, 0.0), flag


@device_function
def _accept_uniform(uniforms_ptr, row, seed, pos):
    if uniforms_ptr is not None:
        u = tl.load(uniforms_ptr + 2 * row)
    else:
        word, _, _, _ = words(seed, pos, ACCEPT, pos - pos)
        u = uniform(word)
    return u


@device_function
def _final_uniform(uniforms_ptr, row, seed, pos):
    if uniforms_ptr is not None:
        u = tl.load(uniforms_ptr + 2 * row + 1)
    else:
        u = uniform53(seed, pos, RESIDUAL)
    return u


@device_function
def _final_draw(
    logits, edits, laws, sizes, row, law, scale, rejected, u,
    TILES: tl.constexpr, BLOCK_M: tl.constexpr, BIASES: tl.constexpr,
):  # fmt: skip
    """A token from max(scale p - q, 0) after a rejection, from p otherwise or where nothing is left, and log p of it.

    By inverse distribution function: among the tiles, then among the tokens of one.
    """
    only, top, temperature, _, cut, mask_row, _ = law
    token, p, q, outside, z = _against_support(logits, edits, laws, sizes, row, law, TILES, BLOCK_M, BIASES)
    left = tl.where(rejected, tl.maximum(scale * p - q, 0.0), scale * p)
    taken = rejected & (scale * total(outside) + total(left) > 0.0)
    left = tl.where(taken, left, scale * p)

    tile_of = token // TILE
    lane = tl.arange(0, TILES)
    inside = (tile_of[:, None] == lane[None, :]) & (token >= 0)[:, None]
    mass = scale * outside + total(tl.where(inside, tl.broadcast_to(left[:, None], (BLOCK_M, TILES)), 0.0), 0)
    ends = tl.cumsum(mass, axis=0)
    wanted = u * total(tl.where(lane == TILES - 1, ends, 0.0))
    tile = first_of((ends > wanted) & (mass > 0.0), lane)
    tile = tl.where(tile == NOWHERE, largest(tl.where(mass > 0.0, lane, 0)), tile)
    before = total(tl.where(lane == tile - 1, ends, 0.0))

    vocab = logits[2]
    lowest = tile * TILE
    logprob = tl.full((), 0.0, tl.float64)
    ids = tl.arange(0, TILE) + lowest
    p_of = tl.where(ids == only, 1.0, 0.0).to(tl.float64)
    x = tl.zeros((TILE,), tl.float32)
    if only < 0:
        ids, x = edited_tiles(logits, edits, sizes, row, tile, mask_row, TILE, BIASES)
        tile_top = largest(x)
        factor = weight64(tile_top, top, temperature) / z
        p_of = tl.where(x >= cut, weight(x, tile_top, temperature), 0.0).to(tl.float64) * factor
    q_of = tl.zeros((TILE,), tl.float64)
    for j in range(laws[4]):
        one, its = law_at(laws, row, j, vocab)
        if (one >= lowest) & (one < lowest + TILE):
            q_of = tl.where(ids == one, q_of + its, q_of)
    w = tl.where(taken, tl.maximum(scale * p_of - q_of, 0.0), scale * p_of)
    drawn = first_of((w > 0.0) & (before + tl.cumsum(w, axis=0) > wanted), ids)
    last = largest(tl.where(w > 0.0, ids, -1))
    last = tl.where(last < 0, largest(tl.where(p_of > 0.0, ids, lowest)), last)
    drawn = tl.where(drawn == NOWHERE, last, drawn)
    if only < 0:
        at = largest(tl.where(ids == drawn, x, -INF))
        at = tl.where(at == top, 0.0, (at.to(tl.float64) - top.to(tl.float64)) / temperature.to(tl.float64))
        logprob = at - tl.log(z)
    return drawn, logprob


@triton.jit(do_not_specialize=["sizes", "eos_count"])
def _accept_kernel(
    logits, requests, params, edits, laws, records, sizes, seed_ptr, pos_ptr, uniforms_ptr, eos_ptr, eos_count,
    tokens_ptr, num_ptr, last_ptr, logprobs_ptr, flags_ptr,
    BY_BLOCK: tl.constexpr, FILTERED: tl.constexpr, BLOCK_M: tl.constexpr,
    TILES: tl.constexpr, BLOCK_K: tl.constexpr, BIASES: tl.constexpr,
):  # fmt: skip
    """One program per request: its rows in order, up to the first rejection in mode token."""
    b, width, vocab = tl.program_id(0), sizes[2], logits[2]
    _, _, first, count, slot, live = locate(requests, sizes, b * width, BLOCK_K)
    drafts, k, ends = _chain(requests[2], first, count, width, eos_ptr, eos_count, live, BLOCK_K)
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
            law = _law_of_row(logits, params, edits, records, sizes, b * width + i, row, slot, TILES, FILTERED)
            token, p, q, outside, z = _against_support(logits, edits, laws, sizes, row, law, TILES, BLOCK_M, BIASES)
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
            u = _accept_uniform(uniforms_ptr, row, seed, pos + i)
            if not BY_BLOCK:
                going = (p_draft > 0.0) & (q_draft > 0.0) & (u * q_draft < p_draft)
                tau += going.to(tl.int32)
            i += 1

        if BY_BLOCK:
            all_accepted = u < w  # of no drafts as well: u = 0
            tau = tl.where(all_accepted, k, tau)
            if (tau < k) & (ends == 0):  # the row after the last draft was looked at
                law = _law_of_row(
                    logits, params, edits, records, sizes, b * width + k, (first + k).to(tl.int64), slot,
                    TILES, FILTERED,
                )  # fmt: skip
                flags |= law[3]
        rejected = tau < k
        emitted = tau
        if rejected | (ends == 0):
            row = (first + tau).to(tl.int64)
            law = _law_of_row(logits, params, edits, records, sizes, b * width + tau, row, slot, TILES, FILTERED)
            flags |= law[3]
            u = _final_uniform(uniforms_ptr, row, seed, pos + tau)
            token, logprob = _final_draw(
                logits, edits, laws, sizes, row, law, tl.where(rejected, scale, 1.0), rejected, u,
                TILES, BLOCK_M, BIASES,
            )  # fmt: skip
            tokens = tl.where(lane == tau, token, tokens)
            logprobs = tl.where(lane == tau, logprob.to(tl.float32), logprobs)
            emitted = tau + 1
    _store_request(
        tokens_ptr, num_ptr, last_ptr, logprobs_ptr, flags_ptr, b, width, tokens, logprobs, emitted, first, flags,
        BLOCK_K,
    )  # fmt: skip


# ---------------------------------------------------------------- launcher


def mtp_verify(
    logits: Tensor, draft_tokens: Tensor, cu_rows: Tensor, seed: Tensor, pos: Tensor, *, mode: str = "greedy",
    max_drafts: int, eos_ids=None, draft_ids=None, draft_probs=None, draft_logits=None, draft_temperature=None,
    draft_vocab=None, allow_lossy=False, relaxed_top_k=1, relaxed_delta=0.0, typical_epsilon=0.3, typical_delta=0.09,
    uniforms=None, **options,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    requests, width = cu_rows.shape[0] - 1, max_drafts + 1
    tokens, logprobs = (seed.new_empty(requests, width, dtype=t) for t in (torch.int32, torch.float32))
    num_emitted, last_row, flags = (seed.new_empty(requests, dtype=torch.int32) for _ in range(3))
    stored = tokens, num_emitted, last_row, logprobs, flags
    if requests == 0:
        return stored
    drafts, eos_ids = dense(draft_tokens), dense(eos_ids)
    eos = eos_ids, 0 if eos_ids is None else len(eos_ids)
    laws = None
    if mode in ("token", "block"):
        laws = drafts, dense(draft_ids), dense(draft_probs), dense(draft_vocab)
        entries = 1 if draft_ids is None else draft_ids.shape[1]
        laws = (*laws, entries, 0 if draft_vocab is None else len(draft_vocab))
    rows = Rows.measure(
        logits, seed, requests * width, width=width, cu_rows=cu_rows, draft_tokens=drafts, laws=laws,
        greedy=mode == "greedy", **options,
    )  # fmt: skip
    with guard(logits):
        if laws is None:
            own = draw(rows, seed, pos, requests * width, mode == "greedy")
            _compare_kernel[(requests,)](
                rows.requests, rows.sizes, logits.shape[1], *own, *eos, *stored,
                BLOCK_K=rows.flags["BLOCK_K"], num_warps=1, enable_fp_fusion=False,
            )  # fmt: skip
        else:
            _accept_kernel[(requests,)](
                rows.logits, rows.requests, rows.params, rows.edits, laws, rows.records, rows.sizes, dense(seed),
                dense(pos), dense(uniforms), *eos, *stored, BY_BLOCK=mode == "block",
                FILTERED=rows.records[4] is not None, BLOCK_M=entries_of(entries), **rows.flags, **OPTIONS,
            )  # fmt: skip
    return stored


def entries_of(count: int) -> int:
    """Lanes for the entries of a law."""
    return max(triton.next_power_of_2(count), 16)


def compile_cases(arch: int):
    stored = {"tokens_ptr": "*i32", "num_ptr": "*i32", "last_ptr": "*i32", "logprobs_ptr": "*fp32", "flags_ptr": "*i32"}
    eos = {"eos_ptr": "*i32", "eos_count": "i32"}
    own = {"own_ptr": "*i32", "own_logprobs_ptr": "*fp32", "own_flags_ptr": "*i32"}
    types = {"requests": CHAINS, "sizes": SIZES, "vocab": "i32:16"}
    yield Case(
        "compare", _compare_kernel, types | own | eos | stored, {"BLOCK_K": 8},
        {"num_warps": 1, "enable_fp_fusion": False},
    )  # fmt: skip
    noise = {"seed_ptr": "*i64", "pos_ptr": "*i64"}
    blocks = {"TILES": 32, "BLOCK_K": 8, "BIASES": BIASES}
    absent = {"uniforms_ptr": None, "eos_ptr": None}
    for mode, dtype, laws in (
        ("token", "fp32", CERTAIN), ("token", "bf16", SPARSE), ("block", "bf16", CERTAIN), ("block", "fp16", SPARSE)
    ):  # fmt: skip
        certain = laws is CERTAIN
        types = case_types(dtype, PLAIN if certain else EDITED, laws=laws) | noise | stored
        types |= {"eos_count": "i32"} if certain else eos | {"uniforms_ptr": "*fp64"}
        constants = {"BY_BLOCK": mode == "block", "FILTERED": not certain, "BLOCK_M": 16 if certain else 64}
        yield Case(
            f"{mode}-{'certain' if certain else 'sparse'}-{dtype}", _accept_kernel, types,
            {**constants, **blocks, **(absent if certain else {})}, OPTIONS,
        )  # fmt: skip
