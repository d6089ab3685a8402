"""mtp_commit: counts of a verification into an engine's state. One program, as the flat tokens are one list."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..common import Case, guard
from ..mamba.launch import dense, strides_of
from .numerics import total

__all__ = ["compile_cases", "mtp_commit"]

BLOCK = 256  # requests at a time
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


@triton.jit(do_not_specialize=["requests", "slots", "eos_count", "bins", "ring_size", "ring_tokens"])
def _commit_kernel(
    tokens_ptr, num_ptr, cu_ptr, slot_ptr, eos_ptr, max_ptr,
    seq_ptr, seq_stride, finished_ptr, finished_stride, histogram_ptr, histogram_stride, ring_ptr, ring_strides,
    num_accepted_ptr, last_token_ptr, last_row_ptr, kv_start_ptr, kv_free_ptr, flat_ptr, cu_emitted_ptr,
    requests, width, slots, eos_count, bins, ring_size, ring_tokens,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """``flat_ptr`` holds -1s."""
    lane = tl.arange(0, BLOCK)
    done = tl.full((), 0, tl.int32)  # tokens of the requests before
    tl.store(cu_emitted_ptr, done)
    for start in range(0, requests, BLOCK):
        b = lane + start
        inside = b < requests
        slot = b
        if slot_ptr is not None:
            slot = tl.load(slot_ptr + b, mask=inside, other=-1)
        emitted = tl.load(num_ptr + b, mask=inside, other=0)
        live = inside & (slot >= 0) & (slot < slots) & (emitted > 0)
        a = tl.where(live, tl.minimum(emitted, width), 0)
        at = b.to(tl.int64) * width
        first, end = tl.load(cu_ptr + b, mask=live, other=0), tl.load(cu_ptr + b + 1, mask=live, other=0)
        last = tl.load(tokens_ptr + at + a - 1, mask=live, other=-1)

        kv_start = tl.load(seq_ptr + slot.to(tl.int64) * seq_stride, mask=live, other=0)
        length = kv_start + a
        full = length < length
        if max_ptr is not None:
            most = tl.load(max_ptr + slot, mask=live, other=0)
            length = tl.minimum(length, most)
            full = length >= most
        tl.store(seq_ptr + slot.to(tl.int64) * seq_stride, length, mask=live)

        ends = tl.cumsum(a, axis=0) + done
        stops = length < length
        for j in range(width):
            token = tl.load(tokens_ptr + at + j, mask=live & (a > j), other=-1)
            tl.store(flat_ptr + ends - a + j, token, mask=live & (a > j))
            if eos_ptr is not None:
                for e in range(eos_count):
                    stops = stops | ((token == tl.load(eos_ptr + e)) & (a > j))
        if finished_ptr is not None:
            its = finished_ptr + slot.to(tl.int64) * finished_stride
            marks = tl.where(stops, 1, 0) | tl.where(full, 2, 0)
            tl.store(its, tl.load(its, mask=live, other=0) | marks, mask=live)
        if histogram_ptr is not None:
            its = histogram_ptr + tl.minimum(a, bins - 1).to(tl.int64) * histogram_stride
            tl.atomic_add(its, tl.full((BLOCK,), 1, tl.int64), mask=live, sem="relaxed")  # integers: in any order
        if ring_ptr is not None:
            its = ring_ptr + slot.to(tl.int64) * ring_strides[0]
            begin = tl.load(its, mask=live, other=0)
            count = tl.load(its + ring_strides[1], mask=live, other=0)
            folds = count + 2 * ring_tokens > ring_size
            tl.store(its, tl.where(folds, (begin + count) % tl.maximum(ring_size, 1), begin), mask=live)
            tl.store(its + ring_strides[1], tl.where(folds, 0, count) + a, mask=live)

        tl.store(num_accepted_ptr + b, a, mask=inside)
        tl.store(last_token_ptr + b, last, mask=inside)
        tl.store(last_row_ptr + b, tl.where(live, first + a - 1, -1), mask=inside)
        tl.store(kv_start_ptr + b, kv_start, mask=inside)
        tl.store(kv_free_ptr + b, tl.where(live, end - first - a, 0), mask=inside)
        tl.store(cu_emitted_ptr + 1 + b, ends, mask=inside)
        done += total(a)


def mtp_commit(
    tokens: Tensor, num_emitted: Tensor, cu_rows: Tensor, seq_len: Tensor, *, slot: Tensor | None = None,
    eos_ids: Tensor | None = None, max_len: Tensor | None = None, finished: Tensor | None = None,
    histogram: Tensor | None = None, ring_pos: Tensor | None = None, ring_size: int = 0, ring_tokens: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    b, width = tokens.shape
    outputs = [tokens.new_empty(b) for _ in range(5)]
    outputs += [tokens.new_full((b * width,), -1), tokens.new_empty(b + 1)]
    eos_ids = dense(eos_ids)
    with guard(tokens):
        _commit_kernel[(1,)](
            dense(tokens), dense(num_emitted), dense(cu_rows), dense(slot), eos_ids, dense(max_len),
            seq_len, seq_len.stride(0), finished, *strides_of(finished, 1), histogram, *strides_of(histogram, 1),
            ring_pos, strides_of(ring_pos, 2), *outputs, b, width, seq_len.shape[0],
            0 if eos_ids is None else len(eos_ids), 0 if histogram is None else len(histogram), ring_size, ring_tokens,
            BLOCK=BLOCK, **OPTIONS,
        )  # fmt: skip
    return tuple(outputs)


def compile_cases(arch: int):
    names = (
        "tokens", "num", "cu", "slot", "eos", "max", "seq", "finished", "ring", "num_accepted", "last_token",
        "last_row", "kv_start", "kv_free", "flat", "cu_emitted",
    )  # fmt: skip
    types = {f"{name}_ptr": "*i32" for name in names} | {"histogram_ptr": "*i64", "ring_strides": ("i32", 1)}
    types |= {f"{name}_stride": "i32" for name in ("seq", "finished", "histogram")}
    sizes = ("requests", "width", "slots", "eos_count", "bins", "ring_size", "ring_tokens")
    types |= {name: "i32" for name in sizes}
    yield Case("commit", _commit_kernel, types, {"BLOCK": BLOCK}, OPTIONS)
    absent = {f"{name}_ptr": None for name in ("slot", "eos", "max", "finished", "histogram", "ring")}
    present = {name: t for name, t in types.items() if name not in absent}
    yield Case("commit-bare", _commit_kernel, present, {"BLOCK": BLOCK, **absent}, OPTIONS)
