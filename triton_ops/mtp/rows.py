"""The rows of a call: edits, one record per tile of 4096 tokens, and the cut of min-p, top-k and top-p.

A unit is a row that a call may look at, row ``unit % width`` of request ``unit // width``. Kernels take tuples:

* logits: pointer, stride of a row, vocabulary;
* requests: cu_rows, slot, draft tokens (None, None, None: unit, slot and row are one);
* params: temperature, top_k, top_p, min_p by slot;
* edits: bitmask, its stride, its rows, the mask row by row, forced tokens, bias ids, values and offsets;
* laws: draft tokens, ids and probabilities of sparse laws (None: certain drafts), the map to target ids, entries of a
  law, entries of the map; None where drafts have no law;
* records: by unit and tile the largest logit, the lowest token that has it, flags, and the weight relative to the
  largest of what is kept and outside the support of the law; by unit the cut;
* sizes: rows, slots, width, tiles, biases.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import INTERPRET, Case, device_function, guard, widen
from ..mamba.launch import dense
from .numerics import (
    EPSILON,
    FLT_MAX,
    INF,
    NOWHERE,
    TILE,
    first_of,
    key_of,
    largest,
    next_above,
    smallest,
    total,
    value_of,
    weight,
    weight64,
)  # fmt: skip

__all__ = [
    "FLAG_OUT_OF_RANGE", "Rows", "compile_cases", "edited_tiles", "flags_of", "forced_token", "highest", "law_at",
    "law_vector", "load_edited", "locate", "mask_row_of", "masses_of", "measure", "sampled_at", "summary", "top_of",
]  # fmt: skip

FLAG_OUT_OF_RANGE = tl.constexpr(8)
OUT = tl.constexpr(2)  # flag of a tile of which the mask allows nothing: its record is that of the unmasked tile
LOWEST_KEY = tl.constexpr(-2139095041)  # of -inf
BIASES = 32  # that are looked at at once
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
STEP = 8 if INTERPRET else 2
CUTOFF_OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}


# ---------------------------------------------------------------- one unit


@device_function
def locate(requests, sizes, unit, BLOCK_K: tl.constexpr):
    """Request, row within it, first row, rows, slot; and whether the unit is a row that may be reached."""
    cu_ptr, slot_ptr, drafts_ptr = requests
    n_rows, slots, width, _, _ = sizes
    b, i = unit // width, unit % width
    slot, first, count = b, b, b - b + 1
    if slot_ptr is not None:
        slot = tl.load(slot_ptr + b)
    if cu_ptr is not None:
        first = tl.minimum(tl.maximum(tl.load(cu_ptr + b), 0), n_rows)
        count = tl.minimum(tl.maximum(tl.load(cu_ptr + b + 1), 0), n_rows) - first
    live = (slot >= 0) & (slot < slots) & (i < count)
    if drafts_ptr is not None:
        lane = tl.arange(0, BLOCK_K)
        before = tl.load(drafts_ptr + first + lane, mask=lane < tl.where(live, i, 0), other=0)
        live = live & (smallest(before) >= 0)  # a missing draft ends the chain
    return b, i, first, count, slot, live


@device_function
def sampled_at(params, slot):
    """The temperature of a slot, at most the largest number, and whether its rows are drawn."""
    temperature = tl.full((), 1.0, tl.float32)
    if params[0] is not None:
        temperature = tl.load(params[0] + slot)
    return tl.minimum(temperature, FLT_MAX), temperature >= EPSILON


@device_function
def forced_token(edits, row, vocab):
    """The token that the row must emit, negative for none."""
    forced = tl.full((), -1, tl.int32)
    if edits[4] is not None:
        forced = tl.load(edits[4] + row)
        forced = tl.where(forced < vocab, forced, -1)
    return forced


@device_function
def mask_row_of(edits, row):
    """The row of the bitmask; negative for none."""
    mask_row = tl.full((), -1, tl.int32)
    if edits[0] is not None:
        mask_row = row.to(tl.int32)
        if edits[3] is not None:
            mask_row = tl.load(edits[3] + row)
        mask_row = tl.where(mask_row < edits[2], mask_row, -1)
    return mask_row


@device_function
def flags_of(edits, row, vocab):
    """FLAG_OUT_OF_RANGE where a mask row or forced token lies past its range."""
    past = row < 0
    if edits[3] is not None:
        past = past | (tl.load(edits[3] + row) >= edits[2])
    if edits[4] is not None:
        past = past | (tl.load(edits[4] + row) >= vocab)
    return tl.where(past, FLAG_OUT_OF_RANGE, 0)


@device_function
def load_edited(logits, edits, sizes, row, ids, inside, lowest, end, mask_row, BIASES: tl.constexpr):
    """Logits of tokens within [lowest, end) plus biases, and which the mask allows."""
    logits_ptr, stride, _ = logits
    bitmask_ptr, mask_stride, _, _, _, bias_ids_ptr, bias_val_ptr, bias_cu_ptr = edits
    x = widen(tl.load(logits_ptr + row * stride + ids, mask=inside, other=0.0))
    if bias_ids_ptr is not None:
        biases = sizes[4]
        begin = tl.minimum(tl.maximum(tl.load(bias_cu_ptr + row), 0), biases)
        stop = tl.minimum(tl.maximum(tl.load(bias_cu_ptr + row + 1), 0), biases)
        for start in range(begin, stop, BIASES):
            at = start + tl.arange(0, BIASES)
            some = tl.load(bias_ids_ptr + at, mask=at < stop, other=-1)
            if largest(((some >= lowest) & (some < end)).to(tl.int32)) > 0:
                for j in range(start, tl.minimum(start + BIASES, stop)):
                    x = tl.where(ids == tl.load(bias_ids_ptr + j), x + tl.load(bias_val_ptr + j), x)
    allowed = inside
    if bitmask_ptr is not None:
        words = bitmask_ptr + mask_row.to(tl.int64) * mask_stride + (ids >> 5)
        word = tl.load(words, mask=inside & (ids < tl.where(mask_row < 0, 0, NOWHERE)), other=-1)
        allowed = inside & (((word >> (ids & 31)) & 1) != 0)
    return x + 0.0, allowed  # of two zeros one


@device_function
def edited_tiles(logits, edits, sizes, row, tile, mask_row, SIZE: tl.constexpr, BIASES: tl.constexpr):
    """Tokens and processed logits of SIZE tokens from a tile on, -inf where nothing is allowed, NaN or no token."""
    vocab = logits[2]
    lowest = tile * TILE
    ids = tl.arange(0, SIZE) + lowest
    x, allowed = load_edited(
        logits, edits, sizes, row, ids, ids < vocab, lowest, lowest + SIZE, mask_row, BIASES
    )  # fmt: skip
    return ids, tl.where(allowed & (x == x), x, -INF)


@device_function
def law_at(laws, row, at, vocab):
    """Token and probability of entries of the law of a row's draft; -1 where it has none in [0, V)."""
    drafts_ptr, ids_ptr, probs_ptr, map_ptr, entries, mapped = laws
    if ids_ptr is None:
        token = tl.load(drafts_ptr + row + at)
        q = tl.zeros_like(token).to(tl.float64) + 1.0
    else:
        token = tl.load(ids_ptr + row * entries + at)
        q = tl.load(probs_ptr + row * entries + at).to(tl.float64)
        if map_ptr is not None:
            known = (token >= 0) & (token < mapped)
            token = tl.where(known, tl.load(map_ptr + tl.where(known, token, 0)), -1)
    return tl.where((token >= 0) & (token < vocab) & (q > 0.0), token, -1), q


@device_function
def law_vector(laws, row, vocab, BLOCK_M: tl.constexpr):
    """The law's tokens, -1 where there is none or one before is the same, and the probability of each in all."""
    lane = tl.arange(0, BLOCK_M)
    entries = laws[4]
    token, q = law_at(laws, row, tl.minimum(lane, entries - 1), vocab)
    token = tl.where(lane < entries, token, -1)
    same = token[:, None] == token[None, :]
    in_all = total(tl.where(same, tl.broadcast_to(q[None, :], (BLOCK_M, BLOCK_M)), 0.0), axis=1)
    before = largest((same & (lane[None, :] < lane[:, None])).to(tl.int32), axis=1)
    return tl.where(before == 0, token, -1), in_all


@device_function
def _outside(w, laws, row, ids, lowest, vocab):
    """Weights without those of the law's support."""
    for j in range(laws[4]):
        token, _ = law_at(laws, row, j, vocab)
        if (token >= lowest) & (token < lowest + TILE):
            w = tl.where(ids == token, 0.0, w)
    return w


# ---------------------------------------------------------------- records


@device_function
def summary(records, unit, tiles, TILES: tl.constexpr):
    """Largest logit, lowest token that has it, flags, whether the mask is ignored; largest logits of the tiles."""
    top_ptr, arg_ptr, flag_ptr, _, _ = records
    lane = tl.arange(0, TILES)
    valid = lane < tiles
    at = unit.to(tl.int64) * tiles + lane
    flag = tl.load(flag_ptr + at, mask=valid, other=OUT)
    ignored = smallest(flag & OUT)
    used = valid & ((flag & OUT) == ignored)
    tops = tl.where(used, tl.load(top_ptr + at, mask=valid, other=-INF), -INF)
    top = largest(tops)
    arg = first_of(used & (tops == top), tl.load(arg_ptr + at, mask=valid, other=0))
    flags = largest(tl.where(used, flag & 1, 0)) | ignored | tl.where(top == -INF, 4, 0)
    return top, arg, flags, ignored, tops


@device_function
def masses_of(records, unit, tiles, tops, top, temperature, TILES: tl.constexpr):
    """The tiles' sums, each relative to its own largest logit, and their masses relative to the row's."""
    lane = tl.arange(0, TILES)
    at = unit.to(tl.int64) * tiles + lane
    sums = tl.load(records[3] + at, mask=lane < tiles, other=0.0)
    return sums, tl.where(tops > -INF, sums * weight64(tops, top, temperature), 0.0)


@triton.jit(do_not_specialize=["sizes"])
def _stats_kernel(
    logits, requests, params, edits, laws, records, sizes,
    GREEDY: tl.constexpr, BLOCK_K: tl.constexpr, BIASES: tl.constexpr,
):  # fmt: skip
    """One program per (unit, tile): its record."""
    unit, tile = tl.program_id(0), tl.program_id(1)
    vocab, tiles = logits[2], sizes[3]
    _, i, first, _, slot, live = locate(requests, sizes, unit, BLOCK_K)
    if live:
        row = (first + i).to(tl.int64)  # int64: rows * stride passes 2^31
        if forced_token(edits, row, vocab) < 0:
            lowest = tile * TILE
            ids = tl.arange(0, TILE) + lowest
            inside = ids < vocab
            mask_row = mask_row_of(edits, row)
            x, allowed = load_edited(
                logits, edits, sizes, row, ids, inside, lowest, lowest + TILE, mask_row, BIASES
            )  # fmt: skip
            out = largest(allowed.to(tl.int32)) == 0
            allowed = inside & (allowed | out)  # counts if no tile has anything that is allowed
            nan = largest((allowed & (x != x)).to(tl.int32))
            x = tl.where(allowed & (x == x), x, -INF)
            top = largest(x)
            at = unit.to(tl.int64) * tiles + tile
            tl.store(records[0] + at, top)
            tl.store(records[1] + at, first_of(allowed & (x == top), ids))
            tl.store(records[2] + at, nan | tl.where(out, OUT, 0))
            if not GREEDY:
                temperature, sampled = sampled_at(params, slot)
                if sampled:
                    w = weight(x, top, temperature)
                    if laws is not None:
                        w = _outside(w, laws, row, ids, lowest, vocab)
                    tl.store(records[3] + at, total(w.to(tl.float64)))


# ---------------------------------------------------------------- the cut


@device_function
def top_of(records, unit, tiles, tile, ignored, COUNT: tl.constexpr):
    """The largest logit of some tiles."""
    lane = tl.arange(0, COUNT) + tile
    at = unit.to(tl.int64) * tiles + lane
    used = (tl.load(records[2] + at, mask=lane < tiles, other=0) & OUT) == ignored
    return largest(tl.where(used, tl.load(records[0] + at, mask=lane < tiles, other=-INF), -INF))


@device_function
def measure(
    logits, edits, records, sizes, unit, row, mask_row, ignored, bound, top, temperature,
    MASS: tl.constexpr, STEP: tl.constexpr, BIASES: tl.constexpr,
):  # fmt: skip
    """Tokens >= bound: their mass relative to the row's largest logit, or their number, in float64; and the logits next
    to the bound, the lowest of these tokens and the highest of the others."""
    tiles = sizes[3]
    measured = tl.zeros((STEP * TILE,), tl.float64)
    over = tl.full((STEP * TILE,), float("inf"), tl.float32)
    under = tl.full((STEP * TILE,), float("-inf"), tl.float32)
    for tile in range(0, tiles, STEP):
        tile_top = top_of(records, unit, tiles, tile, ignored, STEP)
        if tile_top >= bound:
            ids, x = edited_tiles(logits, edits, sizes, row, tile, mask_row, STEP * TILE, BIASES)
            hit = x >= bound
            if MASS:
                measured += tl.where(hit, weight(x, top, temperature), 0.0).to(tl.float64)
            else:
                measured += hit.to(tl.float64)
            over = tl.where(hit & (x < over), x, over)
            under = tl.where((x < bound) & (x > under), x, under)
        else:
            under = tl.where(tile_top > under, tile_top, under)
    return total(measured), smallest(over), largest(under)


@device_function
def highest(
    logits, edits, records, sizes, unit, row, mask_row, ignored, low, wanted, top, temperature,
    MASS: tl.constexpr, STEP: tl.constexpr, BIASES: tl.constexpr,
):  # fmt: skip
    """The key of the highest logit, from ``low`` on, at and above which tokens measure ``wanted`` or more.

    By bisection over keys, of which each step goes on to the next logit of the row: what is measured does not grow
    with the bound, also in floating point, as the order of the sum is fixed.
    """
    below, above = low, key_of(top)
    while below < above:
        middle = (below | above) - ((below ^ above) >> 1)  # rounded up, without overflow
        measured, over, under = measure(
            logits, edits, records, sizes, unit, row, mask_row, ignored, value_of(middle), top, temperature,
            MASS, STEP, BIASES,
        )  # fmt: skip
        below = tl.where(measured >= wanted, key_of(over), below)
        above = tl.where(measured >= wanted, above, key_of(under))
    return below


@triton.jit(do_not_specialize=["sizes"])
def _cutoff_kernel(
    logits, requests, params, edits, laws, records, sizes,
    STEP: tl.constexpr,  # tiles that are read at once
    TILES: tl.constexpr, BLOCK_K: tl.constexpr, BIASES: tl.constexpr,
):  # fmt: skip
    """One program per unit: the cut, and the sums of what it keeps in place of those of the whole tiles.

    Tiles whose largest logit is below a bound are not read for it.
    """
    unit = tl.program_id(0)
    vocab, tiles = logits[2], sizes[3]
    _, i, first, _, slot, live = locate(requests, sizes, unit, BLOCK_K)
    row = (first + i).to(tl.int64)
    if live:
        temperature, sampled = sampled_at(params, slot)
        if sampled & (forced_token(edits, row, vocab) < 0):
            top, arg, flags, ignored, tops = summary(records, unit, tiles, TILES)
            mask_row = tl.where(ignored != 0, -1, mask_row_of(edits, row))
            low = key_of(top) - key_of(top) + LOWEST_KEY
            if params[3] is not None:
                min_p = tl.load(params[3] + slot)
                if (min_p > 0.0) & (top > -INF):
                    least = tl.log(tl.minimum(min_p, 1.0).to(tl.float64))
                    low = key_of(next_above(top.to(tl.float64) + temperature.to(tl.float64) * least))
            if params[1] is not None:
                top_k = tl.load(params[1] + slot)
                if (top_k > 0) & (top_k < vocab) & (top > -INF):
                    wanted = top_k.to(tl.float64)
                    count, over, under = measure(
                        logits, edits, records, sizes, unit, row, mask_row, ignored, value_of(low), top, temperature,
                        False, STEP, BIASES,
                    )  # fmt: skip
                    if count >= wanted:
                        low = highest(
                            logits, edits, records, sizes, unit, row, mask_row, ignored, low, wanted, top, temperature,
                            False, STEP, BIASES,
                        )  # fmt: skip
            if params[2] is not None:
                top_p = tl.load(params[2] + slot)
                if (top_p < 1.0) & (top > -INF):
                    mass, over, under = measure(
                        logits, edits, records, sizes, unit, row, mask_row, ignored, value_of(low), top, temperature,
                        True, STEP, BIASES,
                    )  # fmt: skip
                    low = highest(
                        logits, edits, records, sizes, unit, row, mask_row, ignored, low,
                        top_p.to(tl.float64) * mass, top, temperature, True, STEP, BIASES,
                    )  # fmt: skip
            cut = value_of(low)
            tl.store(records[4] + unit, cut)
            if low > LOWEST_KEY:
                for tile in range(tiles):
                    at = records[3] + unit.to(tl.int64) * tiles + tile
                    kept = tl.full((), 0.0, tl.float64)
                    if top_of(records, unit, tiles, tile, ignored, 1) >= cut:
                        ids, x = edited_tiles(logits, edits, sizes, row, tile, mask_row, TILE, BIASES)
                        w = tl.where(x >= cut, weight(x, largest(x), temperature), 0.0)
                        if laws is not None:
                            w = _outside(w, laws, row, ids, tile * TILE, vocab)
                        kept = total(w.to(tl.float64))
                    tl.store(at, kept)


# ---------------------------------------------------------------- host side


@dataclass
class Rows:
    """The tuples of a call, after the kernels of this module have run."""

    logits: tuple
    requests: tuple
    params: tuple
    edits: tuple
    laws: tuple | None
    records: tuple
    sizes: tuple
    flags: dict[str, Any]  # BLOCK_K, TILES, BIASES: constants of the kernels that read records

    @classmethod
    def measure(
        cls, logits: Tensor, seed: Tensor, units: int, *, width: int = 1, cu_rows=None, slot=None, draft_tokens=None,
        temperature=None, top_k=None, top_p=None, min_p=None, bitmask=None, bitmask_row=None, forced_token=None,
        bias_ids=None, bias_val=None, bias_cu=None, laws: tuple | None = None, greedy: bool = False,
    ) -> Rows:  # fmt: skip
        n, vocab = logits.shape
        tiles = triton.cdiv(vocab, TILE.value)
        params = tuple(dense(t) for t in (temperature, top_k, top_p, min_p))
        bitmask, strides = dense(bitmask), (0, 0)
        if bitmask is not None:
            strides = bitmask.shape[1], bitmask.shape[0]
        edits = (bitmask, *strides, *(dense(t) for t in (bitmask_row, forced_token, bias_ids, bias_val, bias_cu)))
        filtered = not greedy and any(t is not None for t in params[1:])
        records = tuple(
            logits.new_empty(shape, dtype=dtype)
            for shape, dtype in (
                ((units, tiles), torch.float32), ((units, tiles), torch.int32), ((units, tiles), torch.int32),
                ((units, 1 if greedy else tiles), torch.float64),
            )
        )  # fmt: skip
        records = (*records, logits.new_empty(units, dtype=torch.float32) if filtered else None)
        rows = cls(
            (logits, logits.stride(0), vocab), (dense(cu_rows), dense(slot), dense(draft_tokens)), params, edits, laws,
            records, (n, seed.shape[0], width, tiles, 0 if bias_ids is None else bias_ids.shape[0]),
            {"TILES": max(triton.next_power_of_2(tiles), 16), "BLOCK_K": block_of(width), "BIASES": BIASES},
        )  # fmt: skip
        if units:
            rows._run(units, tiles, greedy, filtered)
        return rows

    def _run(self, units: int, tiles: int, greedy: bool, filtered: bool) -> None:
        args = (self.logits, self.requests, self.params, self.edits, self.laws, self.records, self.sizes)
        logits, flags = self.logits[0], self.flags
        with guard(logits):
            _stats_kernel[(units, tiles)](
                *args, GREEDY=greedy, BLOCK_K=flags["BLOCK_K"], BIASES=BIASES, **OPTIONS
            )  # fmt: skip
            if filtered:
                step = min(STEP, triton.next_power_of_2(tiles))
                _cutoff_kernel[(units,)](*args, STEP=step, **flags, **CUTOFF_OPTIONS)


def block_of(width: int) -> int:
    """Lanes for the rows of a request, one more than drafts at least."""
    return max(triton.next_power_of_2(width), 4)


# ---------------------------------------------------------------- compilation

EDITED = ("*i32", "i32", "i32", "*i32", "*i32", "*i32", "*fp32", "*i32")
PLAIN = (None, 0, 0, None, None, None, None, None)
CHAINS = ("*i32", "*i32", "*i32")
SPARSE = ("*i32", "*i32", "*fp32", "*i32", "i32", "i32")
CERTAIN = ("*i32", None, None, None, 1, 0)
RECORDS = ("*fp32", "*i32", "*i32", "*fp64", "*fp32")
SIZES = ("i32",) * 5


def case_types(dtype: str, edits=PLAIN, requests=CHAINS, laws=None, params=("*fp32",) * 4) -> dict[str, Any]:
    params = ("*fp32", "*i32", "*fp32", "*fp32") if params[1] else params
    types = {
        "logits": (f"*{dtype}", "i32:16", "i32:16"), "requests": requests, "params": params, "edits": edits,
        "records": RECORDS, "sizes": SIZES,
    }  # fmt: skip
    return types if laws is None else types | {"laws": laws}


def compile_cases(arch: int):
    blocks = {"BLOCK_K": 8, "BIASES": BIASES}
    for name, dtype, edits, laws, greedy in (
        ("greedy", "fp16", PLAIN, None, True), ("plain", "bf16", PLAIN, None, False),
        ("certain", "fp32", PLAIN, CERTAIN, False), ("all", "bf16", EDITED, SPARSE, False),
        ("all", "fp16", EDITED, None, False),
    ):  # fmt: skip
        types = case_types(dtype, edits, laws=laws)
        absent = {} if laws else {"laws": None}
        yield Case(
            f"stats-{name}-{dtype}", _stats_kernel, types, {"GREEDY": greedy, **blocks, **absent}, OPTIONS
        )  # fmt: skip
        if not greedy:
            constants = {"STEP": STEP, "TILES": 32, **blocks, **absent}
            yield Case(f"cutoff-{name}-{dtype}", _cutoff_kernel, types, constants, CUTOFF_OPTIONS)
