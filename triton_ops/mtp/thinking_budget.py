"""thinking_budget: one program per request walks its rows; n3kernels/mtp/reference.py has the rules."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..common import Case, device_function, guard
from ..mamba.launch import dense
from .numerics import largest, smallest

__all__ = ["compile_cases", "thinking_budget"]

OPTIONS = {"num_warps": 1, "enable_fp_fusion": False}


@device_function
def _back(tail_ptr, drafts_ptr, reach, i, back, mask):
    """The tokens ``back`` places before the last of a tail and i drafts; -1 where masked."""
    drafted = back < i
    draft = tl.load(drafts_ptr + i - 1 - back, mask=mask & drafted, other=-1)
    at = reach - 1 - (back - i)
    return tl.where(drafted, draft, tl.load(tail_ptr + at, mask=mask & (back >= i) & (at >= 0), other=-1))


@device_function
def _length(string, lane, BLOCK: tl.constexpr):
    """Tokens of a padded string."""
    return smallest(tl.where(string < 0, lane, BLOCK))


@device_function
def _newline(token, newline_ptr, bits):
    """Which tokens count as a newline."""
    inside = (token >= 0) & (token < bits)
    word = tl.load(newline_ptr + (token >> 5), mask=inside, other=0)
    return ((word >> (token & 31)) & 1) != 0


@triton.jit(do_not_specialize=["n_rows", "reach", "end_row", "end_size", "strings", "string_size", "words"])
def _budget_kernel(
    drafts_ptr, cu_ptr, tail_ptr, num_ptr, active_ptr, budget_ptr, grace_ptr, end_ptr, think_ptr, newline_ptr, out_ptr,
    n_rows, reach, end_row, end_size, strings, string_size, words,
    BLOCK: tl.constexpr,  # lanes for the tail, longer than every string
):  # fmt: skip
    b = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    first = tl.minimum(tl.maximum(tl.load(cu_ptr + b), 0), n_rows)
    count = tl.minimum(tl.maximum(tl.load(cu_ptr + b + 1), 0), n_rows) - first
    n = tl.load(num_ptr + b).to(tl.int64)
    budget = tl.load(budget_ptr + b).to(tl.int64)
    latest = budget + tl.maximum(tl.load(grace_ptr + b), 0)
    end = tl.load(end_ptr + b.to(tl.int64) * end_row + lane, mask=lane < end_size, other=-1)
    end_length = _length(end, lane, BLOCK)
    prefix = (lane[None, :] <= lane[:, None]) & (lane < end_size)[:, None]  # row k: the first k + 1 tokens of the end
    tail_ptr += b.to(tl.int64) * reach
    drafts_ptr += first
    bits = words * 32

    tail = _back(tail_ptr, drafts_ptr, reach, b - b, lane, lane < reach)
    length_then = n - lane  # the output's length when this token was its last
    begins = _newline(tail, newline_ptr, bits) & (length_then >= 1) & (length_then >= budget)
    limited = tl.where(budget >= 0, 1, 0)
    forcing = limited & (largest(begins.to(tl.int32)) | tl.where(n >= latest, 1, 0))
    thinking = tl.where(tl.load(active_ptr + b) != 0, 1, 0)
    i = b - b
    going = tl.where(count > 0, 1, 0)
    while going != 0:
        for s in range(strings):
            string = tl.load(think_ptr + s * string_size + lane, mask=lane < string_size, other=-1)
            length = _length(string, lane, BLOCK)
            same = string == _back(tail_ptr, drafts_ptr, reach, i, length - 1 - lane, lane < length)
            ended = tl.where((length > 0) & (length <= n), smallest((same | (lane >= length)).to(tl.int32)), 0)
            thinking = tl.where(ended != 0, 0, thinking)
        token = _back(tail_ptr, drafts_ptr, reach, i, lane, lane < 1)
        newline = largest((_newline(token, newline_ptr, bits) & (lane < 1)).to(tl.int32))
        newline = tl.where((n >= 1) & (n >= budget), newline, 0)
        forcing = forcing | (limited & (newline | tl.where(n >= latest, 1, 0)))
        same = end[None, :] == _back(tail_ptr, drafts_ptr, reach, i, lane[:, None] - lane[None, :], prefix)
        fits = smallest((same | (lane[None, :] > lane[:, None])).to(tl.int32), 1)
        overlap = largest(tl.where((fits != 0) & (lane < end_length) & (lane < n), lane + 1, 0))
        wanted = largest(tl.where((lane == overlap) & (lane < end_length), end, -1))
        thinking = tl.where((forcing != 0) & (wanted < 0), 0, thinking)
        tl.store(out_ptr + first + i, tl.where((thinking & forcing) != 0, wanted, -1))
        draft = tl.load(drafts_ptr + i)
        i += 1
        n += 1
        going = tl.where((i < count) & (draft >= 0), 1, 0)


def thinking_budget(
    draft_tokens: Tensor, cu_rows: Tensor, committed_tail: Tensor, num_output: Tensor, active: Tensor, budget: Tensor,
    grace: Tensor, end_ids: Tensor, end_think_ids: Tensor, newline_bitmask: Tensor,
) -> Tensor:  # fmt: skip
    forced = draft_tokens.new_full((draft_tokens.shape[0],), -1)
    requests, n_rows = cu_rows.shape[0] - 1, draft_tokens.shape[0]
    if requests == 0 or n_rows == 0:
        return forced
    strings = end_think_ids.shape[0] if end_think_ids.dim() == 2 else 1
    with guard(draft_tokens):
        _budget_kernel[(requests,)](
            *(
                dense(t) for t in (
                    draft_tokens, cu_rows, committed_tail, num_output, active, budget, grace, end_ids, end_think_ids,
                    newline_bitmask,
                )
            ),
            forced, n_rows, committed_tail.shape[1], end_ids.shape[-1] if end_ids.dim() == 2 else 0,
            end_ids.shape[-1], strings, end_think_ids.shape[-1], newline_bitmask.shape[0],
            BLOCK=block_of(committed_tail.shape[1]), **OPTIONS,
        )  # fmt: skip
    return forced


def block_of(reach: int) -> int:
    return max(triton.next_power_of_2(reach + 1), 16)


def compile_cases(arch: int):
    pointers = (
        "drafts", "cu", "tail", "num", "active", "budget", "grace", "end", "think", "newline", "out",
    )  # fmt: skip
    sizes = ("n_rows", "reach", "end_row", "end_size", "strings", "string_size", "words")
    types = {f"{name}_ptr": "*i32" for name in pointers} | {name: "i32" for name in sizes}
    for block in (16, 64):
        yield Case(f"budget-{block}", _budget_kernel, types, {"BLOCK": block}, OPTIONS)
