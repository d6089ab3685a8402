"""Modes relaxed and typical of mtp_verify, which are not exact.

Both ask for one number of the whole row: how many tokens come before the draft, or the entropy. One kernel sums it by
tile, for all rows that check a draft; one program per request then decides.
"""

from __future__ import annotations

import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import Case, guard
from .chains import EOS, STORED, chain_of, law_of_row, prob_of, store_request, total_of
from .numerics import INF, TILE, largest, total, weight, weight64
from .rows import (
    BIASES,
    CHAINS,
    EDITED,
    FLAG_OUT_OF_RANGE,
    PLAIN,
    SIZES,
    Rows,
    case_types,
    edited_tiles,
    locate,
)  # fmt: skip
from .sample import draw

__all__ = ["compile_cases", "verify_lossy"]

OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}
WALK = {"num_warps": 1, "enable_fp_fusion": False}


@triton.jit(do_not_specialize=["sizes"])
def _parts_kernel(
    logits, requests, params, edits, records, sizes, parts_ptr,
    BY_RANK: tl.constexpr, FILTERED: tl.constexpr,
    TILES: tl.constexpr, BLOCK_K: tl.constexpr, BIASES: tl.constexpr,
):  # fmt: skip
    """One program per (unit, tile): of its tokens how many come before the draft, or the sum of weight times log."""
    unit, tile = tl.program_id(0), tl.program_id(1)
    width, tiles = sizes[2], sizes[3]
    _, i, first, count, slot, live = locate(requests, sizes, unit, BLOCK_K)
    if live & (i < tl.minimum(count, width) - 1):
        row = (first + i).to(tl.int64)
        part = tl.full((), 0.0, tl.float64)
        law = law_of_row(logits, params, edits, records, sizes, unit, row, slot, TILES, FILTERED)
        top, temperature, cut, mask_row = law[1], law[2], law[4], law[5]
        mass = tl.where(tl.arange(0, TILES) == tile, law[6], 0.0)
        if total(mass) > 0.0:  # of a row with one token there are none
            ids, x = edited_tiles(logits, edits, sizes, row, tile, mask_row, TILE, BIASES)
            if BY_RANK:
                draft = tl.load(requests[2] + row)
                its = prob_of(logits, edits, sizes, row, law, 1.0, draft, BIASES)[1]
                part = total(((x > its) | ((x == its) & (ids < draft))).to(tl.float64))
            else:
                tile_top = largest(x)
                kept = (x >= cut) & (x > -INF) & (x < tl.where(top < INF, top, -INF))
                log = tl.where(kept, (x.to(tl.float64) - top.to(tl.float64)) / temperature.to(tl.float64), 0.0)
                part = total(weight(x, tile_top, temperature).to(tl.float64) * log)
                part *= weight64(tile_top, top, temperature)
        tl.store(parts_ptr + unit.to(tl.int64) * tiles + tile, part)


@triton.jit(do_not_specialize=["sizes", "eos_count", "most", "near"])
def _lossy_kernel(
    logits, requests, params, edits, records, sizes, parts_ptr, own, most, near, eos_ptr, eos_count,
    tokens_ptr, num_ptr, last_ptr, logprobs_ptr, flags_ptr,
    BY_RANK: tl.constexpr, FILTERED: tl.constexpr,
    TILES: tl.constexpr, BLOCK_K: tl.constexpr, BIASES: tl.constexpr,
):  # fmt: skip
    """One program per request: its rows in order, up to the first rejection.

    ``most``: relaxed_top_k; the bits of typical_epsilon. ``near``: the bits of relaxed_delta; of typical_delta.
    """
    b, width, vocab, tiles = tl.program_id(0), sizes[2], logits[2], sizes[3]
    _, _, first, count, slot, live = locate(requests, sizes, b * width, BLOCK_K)
    drafts, k, ends = chain_of(requests[2], first, count, width, eos_ptr, eos_count, live, BLOCK_K)
    lane = tl.arange(0, BLOCK_K)
    tile = tl.arange(0, TILES)
    tokens = drafts
    logprobs = tl.zeros((BLOCK_K,), tl.float32)
    emitted = tl.full((), 0, tl.int32)
    flags = tl.where(slot >= sizes[1], FLAG_OUT_OF_RANGE, 0)
    if live:
        delta = near.to(tl.int64).to(tl.float64, bitcast=True)
        tau = tl.full((), 0, tl.int32)
        going = tau == 0
        while (tau < k) & going:
            unit, row = b * width + tau, (first + tau).to(tl.int64)
            draft = total(tl.where(lane == tau, drafts, 0))
            law = law_of_row(logits, params, edits, records, sizes, unit, row, slot, TILES, FILTERED)
            z = total_of(law)
            p = prob_of(logits, edits, sizes, row, law, z, draft, BIASES)[0]
            part = total(tl.load(parts_ptr + unit.to(tl.int64) * tiles + tile, mask=tile < tiles, other=0.0))
            flags |= law[3] | tl.where(draft >= vocab, FLAG_OUT_OF_RANGE, 0)
            if BY_RANK:
                going = (p > 0.0) & (p >= 1.0 / z - delta) & (part < most.to(tl.float64))
            else:
                epsilon = most.to(tl.int64).to(tl.float64, bitcast=True)
                entropy = tl.log(z) - part / z
                going = (draft < vocab) & (p > tl.minimum(epsilon, delta * tl.exp(-entropy)))
            logprob = tl.where(p > 0.0, tl.log(tl.where(p > 0.0, p, 1.0)), -INF)
            logprobs = tl.where((lane == tau) & (lane < tau + going.to(tl.int32)), logprob.to(tl.float32), logprobs)
            tau += going.to(tl.int32)
        emitted = tau
        if (tau < k) | (ends == 0):
            unit, row = b * width + tau, (first + tau).to(tl.int64)
            if BY_RANK:
                law = law_of_row(logits, params, edits, records, sizes, unit, row, slot, TILES, FILTERED)
                token, flag = law[7], law[3]
                logprob = (-tl.log(total_of(law))).to(tl.float32)
            else:
                token, logprob, flag = tl.load(own[0] + unit), tl.load(own[1] + unit), tl.load(own[2] + unit)
            flags |= flag
            tokens = tl.where(lane == tau, token, tokens)
            logprobs = tl.where(lane == tau, logprob, logprobs)
            emitted = tau + 1
    store_request(
        tokens_ptr, num_ptr, last_ptr, logprobs_ptr, flags_ptr, b, width, tokens, logprobs, emitted, first, flags,
        BLOCK_K,
    )  # fmt: skip


def verify_lossy(
    rows: Rows, seed: Tensor, pos: Tensor, requests: int, eos: tuple, stored: tuple, mode: str, relaxed_top_k: int,
    relaxed_delta: float, typical_epsilon: float, typical_delta: float,
) -> None:  # fmt: skip
    """Writes the results of a call."""
    _, _, width, tiles, _ = rows.sizes
    units, by_rank = requests * width, mode == "relaxed"
    own = (None, None, None) if by_rank else draw(rows, seed, pos, units, False)
    parts = seed.new_empty((units, tiles), dtype=torch.float64)
    args = rows.logits, rows.requests, rows.params, rows.edits, rows.records, rows.sizes, parts
    flags = {"BY_RANK": by_rank, "FILTERED": rows.records[4] is not None, **rows.flags}
    numbers = relaxed_top_k, bits_of(relaxed_delta)
    if not by_rank:
        numbers = bits_of(typical_epsilon), bits_of(typical_delta)
    with guard(seed):
        _parts_kernel[(units, tiles)](*args, **flags, **OPTIONS)
        _lossy_kernel[(requests,)](*args, own, *numbers, *eos, *stored, **flags, **WALK)


def bits_of(number: float) -> int:
    """As an integer: Triton passes a float in 32 bits."""
    return struct.unpack("<q", struct.pack("<d", number))[0]


def compile_cases(arch: int):
    blocks = {"TILES": 32, "BLOCK_K": 8, "BIASES": BIASES}
    for mode, dtype, edits in (("relaxed", "bf16", EDITED), ("typical", "bf16", PLAIN), ("typical", "fp32", EDITED)):
        types = case_types(dtype, edits, CHAINS) | {"sizes": SIZES, "parts_ptr": "*fp64"}
        constants = {"BY_RANK": mode == "relaxed", "FILTERED": edits is EDITED, **blocks}
        yield Case(f"parts-{mode}-{dtype}", _parts_kernel, types, constants, OPTIONS)
        own = (None, None, None) if mode == "relaxed" else ("*i32", "*fp32", "*i32")
        types |= {"own": own, "most": "i64", "near": "i64"} | EOS | STORED
        yield Case(f"{mode}-{dtype}", _lossy_kernel, types, constants, WALK)
