"""Modes token and block of mtp_verify for drafts whose law is a softmax of the drafter's logits.

The drafter's rows get records of their own. Then three kernels: `_walk_kernel` (requests) takes p and q of each draft,
and from them what row i's p is scaled by; `_excess_kernel` (units, tiles) sums max(scale p - q, 0) where it may be
needed; `_finish_kernel` (requests) decides and draws.

The drafter is a tuple: logits and the stride of a row, temperatures, four records, tiles; and, if its columns are
indices into a smaller vocabulary, the columns in order of their tokens, where those of each token begin and the map
itself, else three times None.

The law of a draft is a tuple: whether one column is certain, the token of that, largest logit, temperature and the sum
of all weights.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import Case, device_function, guard, widen
from ..mamba.launch import dense
from .chains import (
    EOS,
    NOISE,
    ONE,
    STORED,
    accept_uniform,
    chain_of,
    end_chain,
    flag_of_draft,
    law_of_row,
    logprob_of,
    masses_of_row,
    pick_tile,
    pick_token,
    prob_of,
    store_request,
    tile_law,
    total_of,
)  # fmt: skip
from .numerics import INF, largest, total, weight, weight64
from .rows import (
    BIASES,
    CHAINS,
    EDITED,
    FLAG_OUT_OF_RANGE,
    PLAIN,
    RECORDS,
    SIZES,
    Rows,
    case_types,
    locate,
    masses_of,
    sampled_at,
    summary,
)  # fmt: skip

__all__ = ["compile_cases", "verify_dense"]

OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}
WALK = {"num_warps": 1, "enable_fp_fusion": False}


# ---------------------------------------------------------------- the drafter's laws


@device_function
def _draft_law(draft, unit, slot, TILES: tl.constexpr):
    tiles = draft[7]
    records = draft[3], draft[4], draft[5], draft[6], None
    temperature, sampled = sampled_at((draft[2],), slot)
    top, column, flags, ignored, tops = summary(records, unit, tiles, TILES)
    z = tl.full((), 1.0, tl.float64)
    certain = (sampled & (tl.abs(top) < INF)) == 0
    token = column
    if certain:
        if draft[10] is not None:
            token = tl.load(draft[10] + column)
    else:
        sums, masses = masses_of(records, unit, tiles, tops, top, temperature, TILES)
        z = total(masses)
    return certain, token, top, temperature, z


@device_function
def _weights(draft, law, row, columns, inside, WIDE: tl.constexpr):
    """exp((x - top) / T) of some columns, in float64."""
    top, temperature = law[2], law[3]
    x = widen(tl.load(draft[0] + row * draft[1] + columns, mask=inside, other=-INF)) + 0.0
    x = tl.where(inside & (x == x), x, -INF)
    if WIDE:
        w = weight64(x, top, temperature)
    else:
        w = weight(x, top, temperature).to(tl.float64)
    return w


@device_function
def _q_of(draft, law, row, ids, inside, WIDE: tl.constexpr):
    """q of some tokens, float64: with exponentials in float64 or float32."""
    columns_ptr, begins_ptr = draft[8], draft[9]
    q = tl.where(inside & (ids == law[1]), 1.0, 0.0).to(tl.float64)
    if law[0] == 0:
        if begins_ptr is None:
            q = _weights(draft, law, row, ids, inside, WIDE)
        else:
            begin = tl.load(begins_ptr + ids, mask=inside, other=0)
            count = tl.load(begins_ptr + ids + 1, mask=inside, other=0) - begin
            q = tl.zeros_like(ids).to(tl.float64)
            for j in range(largest(count)):
                some = count > j
                q += _weights(draft, law, row, tl.load(columns_ptr + begin + j, mask=some, other=0), some, WIDE)
        q = q / law[4]
    return q


@device_function
def _q_of_one(draft, law, row, token, vocab):
    ids = tl.zeros((ONE,), tl.int32) + token
    inside = (tl.arange(0, ONE) == 0) & (ids < vocab)
    return total(_q_of(draft, law, row, ids, inside, True))


# ---------------------------------------------------------------- p and q of the drafts


@triton.jit(do_not_specialize=["sizes", "eos_count"])
def _walk_kernel(
    logits, requests, params, edits, draft, records, sizes, walked, seed_ptr, pos_ptr, uniforms_ptr,
    eos_ptr, eos_count, BY_BLOCK: tl.constexpr, FILTERED: tl.constexpr,
    TILES: tl.constexpr, DRAFT_TILES: tl.constexpr, BLOCK_K: tl.constexpr, BIASES: tl.constexpr,
):  # fmt: skip
    """One program per request. ``walked``: by unit what scales row i's p where a draw from what is left may follow, or
    is compared with a uniform behind the last draft, -1 elsewhere; p of its draft; by request how many drafts were
    accepted (of mode token) and flags."""
    b, width, vocab = tl.program_id(0), sizes[2], logits[2]
    scales_ptr, probs_ptr, taus_ptr, flags_ptr = walked
    _, _, first, count, slot, live = locate(requests, sizes, b * width, BLOCK_K)
    drafts, k, _ = chain_of(requests[2], first, count, width, eos_ptr, eos_count, live, BLOCK_K)
    lane = tl.arange(0, BLOCK_K)
    scales = tl.zeros((BLOCK_K,), tl.float64) - 1.0
    probs = tl.zeros((BLOCK_K,), tl.float64)
    flags = tl.where(slot >= sizes[1], FLAG_OUT_OF_RANGE, 0)
    i = tl.full((), 0, tl.int32)
    tau = i
    if live:
        seed, pos = tl.load(seed_ptr + slot), tl.load(pos_ptr + b)
        w = tl.full((), 1.0, tl.float64)
        going = i == 0
        while (i < k) & going:
            unit, row = b * width + i, (first + i).to(tl.int64)
            law = law_of_row(logits, params, edits, records, sizes, unit, row, slot, TILES, FILTERED)
            token = total(tl.where(lane == i, drafts, 0))
            p = prob_of(logits, edits, sizes, row, law, total_of(law), token, BIASES)[0]
            q = _q_of_one(draft, _draft_law(draft, unit, slot, DRAFT_TILES), row, token, vocab)
            flag, drawn = flag_of_draft(token, q, vocab)
            flags |= law[3] | flag
            probs = tl.where(lane == i, p, probs)
            if BY_BLOCK:
                scales = tl.where(lane == i, w, scales)
                w = tl.where(drawn, tl.minimum(w * p / tl.where(drawn, q, 1.0), 1.0), 0.0)
            else:
                u = accept_uniform(uniforms_ptr, row, seed, pos + i, pos - pos)
                going = drawn & (p > 0.0) & (u * q < p)
                scales = tl.where((lane == i) & (lane >= i + going.to(tl.int32)), w, scales)
                tau += going.to(tl.int32)
            i += 1
        if BY_BLOCK:
            scales = tl.where(lane == k, w, scales)
    at = b.to(tl.int64) * width + lane
    tl.store(scales_ptr + at, scales, mask=lane < width)
    tl.store(probs_ptr + at, probs, mask=lane < width)
    tl.store(taus_ptr + b, tau)
    tl.store(flags_ptr + b, flags)


# ---------------------------------------------------------------- what is left


@device_function
def _left(draft, draft_law, row, ids, p, scale, vocab):
    """max(scale p - q, 0) of the tokens of a tile."""
    return tl.maximum(scale * p - _q_of(draft, draft_law, row, ids, ids < vocab, False), 0.0)


@triton.jit(do_not_specialize=["sizes"])
def _excess_kernel(
    logits, requests, params, edits, draft, records, sizes, walked, excess_ptr, FILTERED: tl.constexpr,
    TILES: tl.constexpr, DRAFT_TILES: tl.constexpr, BLOCK_K: tl.constexpr, BIASES: tl.constexpr,
):  # fmt: skip
    """One program per (unit, tile): the sum of what is left of it."""
    unit, tile = tl.program_id(0), tl.program_id(1)
    _, i, first, _, slot, live = locate(requests, sizes, unit, BLOCK_K)
    if live:
        scale = tl.load(walked[0] + unit)
        if scale >= 0.0:
            row = (first + i).to(tl.int64)
            law = law_of_row(logits, params, edits, records, sizes, unit, row, slot, TILES, FILTERED)
            z = total_of(law)
            mass = total(tl.where(tl.arange(0, TILES) == tile, masses_of_row(law, z, TILES), 0.0))
            left = tl.full((), 0.0, tl.float64)
            if scale * mass > 0.0:
                ids, p, _ = tile_law(logits, edits, sizes, row, law, z, tile, BIASES)
                draft_law = _draft_law(draft, unit, slot, DRAFT_TILES)
                left = total(_left(draft, draft_law, row, ids, p, scale, logits[2]))
            tl.store(excess_ptr + unit.to(tl.int64) * sizes[3] + tile, left)


# ---------------------------------------------------------------- decisions


@device_function
def _masses_left(excess_ptr, unit, tiles, TILES: tl.constexpr):
    lane = tl.arange(0, TILES)
    return tl.load(excess_ptr + unit.to(tl.int64) * tiles + lane, mask=lane < tiles, other=0.0)


@device_function
def _final_draw(
    logits, edits, drafter, sizes, unit, row, slot, law, scale, rejected, u,
    DRAFT_TILES: tl.constexpr, TILES: tl.constexpr, BIASES: tl.constexpr,
):  # fmt: skip
    """A token from max(scale p - q, 0) after a rejection, else, or where nothing is left, from p; and log p of it."""
    z = total_of(law)
    mass = masses_of_row(law, z, TILES)
    taken = rejected
    if rejected:
        left = _masses_left(drafter[1], unit, sizes[3], TILES)
        taken = total(left) > 0.0
        mass = tl.where(taken, left, mass)
    tile, before, wanted = pick_tile(mass, u, TILES)
    ids, p, otherwise = tile_law(logits, edits, sizes, row, law, z, tile, BIASES)
    w = p
    if taken:
        draft_law = _draft_law(drafter[0], unit, slot, DRAFT_TILES)
        w = _left(drafter[0], draft_law, row, ids, p, scale, logits[2])
    drawn = pick_token(w, ids, otherwise, before, wanted)
    return drawn, logprob_of(logits, edits, sizes, row, law, z, drawn, BIASES)


@triton.jit(do_not_specialize=["sizes", "eos_count"])
def _finish_kernel(
    logits, requests, params, edits, draft, records, sizes, walked, excess_ptr, seed_ptr, pos_ptr, uniforms_ptr,
    eos_ptr, eos_count, tokens_ptr, num_ptr, last_ptr, logprobs_ptr, flags_ptr,
    BY_BLOCK: tl.constexpr, FILTERED: tl.constexpr,
    TILES: tl.constexpr, DRAFT_TILES: tl.constexpr, BLOCK_K: tl.constexpr, BIASES: tl.constexpr,
):  # fmt: skip
    """One program per request: how many drafts are accepted, and the token behind them."""
    b, width, tiles = tl.program_id(0), sizes[2], sizes[3]
    _, _, first, count, slot, live = locate(requests, sizes, b * width, BLOCK_K)
    tokens, k, ends = chain_of(requests[2], first, count, width, eos_ptr, eos_count, live, BLOCK_K)
    lane = tl.arange(0, BLOCK_K)
    at = b.to(tl.int64) * width + lane
    scales = tl.load(walked[0] + at, mask=lane < width, other=-1.0)
    probs = tl.load(walked[1] + at, mask=lane < width, other=0.0)
    tau, flags = tl.load(walked[2] + b), tl.load(walked[3] + b)
    logprobs = tl.log(tl.where(probs > 0.0, probs, 1.0)).to(tl.float32)
    emitted = tl.full((), 0, tl.int32)
    if live:
        seed, pos = tl.load(seed_ptr + slot), tl.load(pos_ptr + b)
        if BY_BLOCK:
            i = tl.full((), 1, tl.int32)
            while i <= k:
                w = total(tl.where(lane == i, scales, 0.0))
                h = w
                if i < k:
                    above = total(_masses_left(excess_ptr, b * width + i, tiles, TILES))
                    rest = above + 1.0 - w
                    h = tl.where(rest > 0.0, above / tl.where(rest > 0.0, rest, 1.0), 1.0)
                u = accept_uniform(uniforms_ptr, (first + i - 1).to(tl.int64), seed, pos + i - 1, pos - pos)
                tau = tl.where(u < h, i, tau)
                i += 1
        tokens, logprobs, emitted, flags = end_chain(
            logits, params, edits, records, sizes, b, first, slot, k, ends, tau,
            total(tl.where(lane == tau, scales, 0.0)), seed, pos, uniforms_ptr, tokens, logprobs, flags,
            (draft, excess_ptr), _final_draw, DRAFT_TILES, BY_BLOCK, FILTERED, TILES, BLOCK_K, BIASES,
        )  # fmt: skip
    store_request(
        tokens_ptr, num_ptr, last_ptr, logprobs_ptr, flags_ptr, b, width, tokens, logprobs, emitted, first, flags,
        BLOCK_K,
    )  # fmt: skip


# ---------------------------------------------------------------- host side


def verify_dense(
    rows: Rows, seed: Tensor, pos: Tensor, requests: int, eos: tuple, stored: tuple, by_block: bool,
    draft_logits: Tensor, draft_temperature: Tensor | None, draft_vocab: Tensor | None, uniforms: Tensor | None,
) -> None:  # fmt: skip
    """Writes the results of a call."""
    _, _, width, tiles, _ = rows.sizes
    if draft_logits.shape[1] > 1 and draft_logits.stride(1) != 1:
        draft_logits = draft_logits.contiguous()
    cu_rows, slot, drafts = rows.requests
    of_drafter = Rows.measure(
        draft_logits, seed, requests * width, width=width, cu_rows=cu_rows, slot=slot, draft_tokens=drafts,
        temperature=draft_temperature,
    )  # fmt: skip
    table = (None, None, None) if draft_vocab is None else inverted(draft_vocab, rows.logits[2])
    draft = *of_drafter.logits[:2], of_drafter.params[0], *of_drafter.records[:4], of_drafter.sizes[3], *table
    walked = [seed.new_empty(requests * width, dtype=torch.float64) for _ in range(2)]
    walked = *walked, *(seed.new_empty(requests, dtype=torch.int32) for _ in range(2))
    excess = seed.new_empty((requests * width, tiles), dtype=torch.float64)
    args = rows.logits, rows.requests, rows.params, rows.edits, draft, rows.records, rows.sizes, walked
    noise = dense(seed), dense(pos), dense(uniforms), *eos
    flags = {"FILTERED": rows.records[4] is not None, "DRAFT_TILES": of_drafter.flags["TILES"], **rows.flags}
    with guard(seed):
        _walk_kernel[(requests,)](*args, *noise, BY_BLOCK=by_block, **flags, **WALK)
        _excess_kernel[(requests * width, tiles)](*args, excess, **flags, **OPTIONS)
        _finish_kernel[(requests,)](*args, excess, *noise, *stored, BY_BLOCK=by_block, **flags, **OPTIONS)


def inverted(draft_vocab: Tensor, vocab: int) -> tuple[Tensor, Tensor, Tensor]:
    """The columns in order of their tokens, where those of each token of the target begin, and the map."""
    tokens, columns = draft_vocab.contiguous().sort(stable=True)
    every = torch.arange(vocab + 1, dtype=torch.int32, device=tokens.device)
    return columns.to(torch.int32), torch.searchsorted(tokens, every, out_int32=True), draft_vocab.contiguous()


def compile_cases(arch: int):
    blocks = {"TILES": 32, "BLOCK_K": 8, "BIASES": BIASES}
    for mode, dtype, edits in (("token", "bf16", PLAIN), ("block", "bf16", EDITED), ("block", "fp32", PLAIN)):
        filtered = edits is EDITED
        table = ("*i32", "*i32", "*i32") if filtered else (None, None, None)
        draft = f"*{dtype}", "i32:16", "*fp32", *RECORDS[:4], "i32", *table
        types = case_types(dtype, edits, CHAINS) | {"sizes": SIZES, "draft": draft}
        types |= {"walked": ("*fp64", "*fp64", "*i32", "*i32")}
        constants = {"FILTERED": filtered, "DRAFT_TILES": 16 if filtered else 32, **blocks}
        noise = NOISE | EOS | {"uniforms_ptr": "*fp64"}
        excess, by = {"excess_ptr": "*fp64"}, {"BY_BLOCK": mode == "block"}
        name = f"{mode}-dense-{dtype}"
        yield Case(f"walk-{name}", _walk_kernel, types | noise, constants | by, WALK)
        yield Case(f"excess-{name}", _excess_kernel, types | excess, constants, OPTIONS)
        yield Case(f"finish-{name}", _finish_kernel, types | excess | noise | STORED, constants | by, OPTIONS)
