"""What the updates share: which slot a sequence reads, how many tokens it has, and what comes before a token."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import Case, device_function

__all__ = ["ancestors", "before", "compile_cases", "count_of", "source_of", "steps_back"]


@device_function
def source_of(b, indices_ptr, indices_row, accepted_ptr, ROLLBACK: tl.constexpr):
    """The slot sequence b reads, negative for padding. ROLLBACK: the one after its last accepted token."""
    if indices_ptr is None:
        return b
    elif ROLLBACK:
        last = tl.load(accepted_ptr + b).to(tl.int64) - 1
        return tl.load(indices_ptr + b * indices_row + last).to(tl.int64)
    else:
        return tl.load(indices_ptr + b * indices_row).to(tl.int64)


@device_function
def count_of(b, source, counts_ptr, tokens):
    """Tokens of sequence b that are not padding."""
    if counts_ptr is None:
        count = tokens
    else:
        count = tl.load(counts_ptr + b)
    return tl.where(source >= 0, count, 0)


@device_function
def before(t, parents_ptr):
    """The token before t; t < 0 are the inputs before the call, -1 the last of them.

    ``parents_ptr`` points to the sequence's row, or is None where the tokens are a chain.
    """
    if parents_ptr is None:
        return t - 1
    else:
        return tl.where(t >= 0, tl.load(parents_ptr + t, mask=t >= 0, other=0), t - 1)


@device_function
def steps_back(t, parents_ptr, STEPS: tl.constexpr):
    """The token that is STEPS before t."""
    if parents_ptr is None:
        return t - STEPS
    else:
        for _ in tl.static_range(STEPS):
            t = before(t, parents_ptr)
        return t


@triton.jit(do_not_specialize=["tokens"])
def _ancestors_kernel(parents_ptr, counts_ptr, path_ptr, tokens, BLOCK_T: tl.constexpr):
    """path[b, t, j] = 1 where token j is before t on its path. Grid (sequences, tokens)."""
    b, t = tl.program_id(0).to(tl.int64), tl.program_id(1)
    j = tl.arange(0, BLOCK_T)
    path = tl.zeros((BLOCK_T,), tl.int32)
    count = tokens
    if counts_ptr is not None:
        count = tl.load(counts_ptr + b)
    at = tl.where(t < count, t, 0)
    while at > 0:
        parent = tl.load(parents_ptr + b * tokens + at)
        at = tl.where(parent < at, parent, -1)  # those of padding may be anything, and must not lead outside
        path = tl.where(j == at, 1, path)
    tl.store(path_ptr + (b * tokens + t) * tokens + j, path.to(tl.int8), mask=j < tokens)


def ancestors(parents: Tensor, counts: Tensor | None) -> Tensor:
    """``[B, T, T]`` int8 of dense parents ``[B, T]``: which tokens are before each on its path."""
    batch, tokens = parents.shape
    path = parents.new_empty(batch, tokens, tokens, dtype=torch.int8)
    if path.numel():
        _ancestors_kernel[batch, tokens](
            parents, counts, path, tokens, BLOCK_T=max(triton.next_power_of_2(tokens), 16), num_warps=1
        )
    return path


def compile_cases(arch: int):
    types = {"parents_ptr": "*i32", "counts_ptr": "*i32", "path_ptr": "*i8", "tokens": "i32"}
    yield Case("slots-ancestors", _ancestors_kernel, types, {"BLOCK_T": 16}, {"num_warps": 1})
