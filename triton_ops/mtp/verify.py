"""mtp_verify: the launcher of all modes, and the kernel of greedy and coupled, which compare with `sample`'s tokens."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import Case, guard
from ..mamba.launch import dense
from .accept import OPTIONS, accept_kernel, entries_of
from .chains import EOS, STORED, chain_of, ends_sequence, store_request
from .dense import verify_dense
from .lossy import verify_lossy
from .numerics import any_bits, first_of
from .rows import CHAINS, FLAG_OUT_OF_RANGE, SIZES, Rows, locate
from .sample import draw

__all__ = ["compile_cases", "mtp_verify"]


@triton.jit(do_not_specialize=["sizes", "eos_count"])
def _compare_kernel(
    requests, sizes, vocab, own_ptr, own_logprobs_ptr, own_flags_ptr, eos_ptr, eos_count,
    tokens_ptr, num_ptr, last_ptr, logprobs_ptr, flags_ptr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program per request: the target's own tokens, up to the first that is not the draft."""
    b, width = tl.program_id(0), sizes[2]
    _, _, first, count, slot, live = locate(requests, sizes, b * width, BLOCK_K)
    drafts, k, _ = chain_of(requests[2], first, count, width, eos_ptr, eos_count, live, BLOCK_K)
    lane = tl.arange(0, BLOCK_K)
    at = b.to(tl.int64) * width + lane
    reached = lane < tl.where(live, k + 1, 0)
    own = tl.load(own_ptr + at, mask=reached, other=-1)
    stop = first_of(ends_sequence(own, eos_ptr, eos_count) | (lane == k) | (drafts != own), lane)
    looked_at = reached & (lane <= stop)
    flags = tl.load(own_flags_ptr + at, mask=looked_at, other=0)
    flags = any_bits(flags | tl.where(looked_at & (drafts >= vocab), FLAG_OUT_OF_RANGE, 0))
    flags |= tl.where(slot >= sizes[1], FLAG_OUT_OF_RANGE, 0)
    store_request(
        tokens_ptr, num_ptr, last_ptr, logprobs_ptr, flags_ptr, b, width,
        own, tl.load(own_logprobs_ptr + at, mask=looked_at, other=0.0), tl.where(live, stop + 1, 0), first, flags,
        BLOCK_K,
    )  # fmt: skip


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
    if mode in ("token", "block") and draft_logits is None:
        laws = drafts, dense(draft_ids), dense(draft_probs), dense(draft_vocab)
        entries = 1 if draft_ids is None else draft_ids.shape[1]
        laws = (*laws, entries, 0 if draft_vocab is None else len(draft_vocab))
    rows = Rows.measure(
        logits, seed, requests * width, width=width, cu_rows=cu_rows, draft_tokens=drafts, laws=laws,
        greedy=mode == "greedy", **options,
    )  # fmt: skip
    call = rows, seed, pos, requests, eos, stored
    if mode in ("greedy", "coupled"):
        _compare(*call, mode == "greedy")
    elif mode in ("relaxed", "typical"):
        verify_lossy(*call, mode, relaxed_top_k, relaxed_delta, typical_epsilon, typical_delta)
    elif draft_logits is not None:
        verify_dense(*call, mode == "block", draft_logits, draft_temperature, draft_vocab, uniforms)
    else:
        with guard(logits):
            accept_kernel[(requests,)](
                rows.logits, rows.requests, rows.params, rows.edits, laws, rows.records, rows.sizes, dense(seed),
                dense(pos), dense(uniforms), *eos, *stored, BY_BLOCK=mode == "block",
                FILTERED=rows.records[4] is not None, BLOCK_M=entries_of(entries), **rows.flags, **OPTIONS,
            )  # fmt: skip
    return stored


def _compare(rows: Rows, seed: Tensor, pos: Tensor, requests: int, eos: tuple, stored: tuple, greedy: bool) -> None:
    own = draw(rows, seed, pos, requests * rows.sizes[2], greedy)
    with guard(seed):
        _compare_kernel[(requests,)](
            rows.requests, rows.sizes, rows.logits[2], *own, *eos, *stored, BLOCK_K=rows.flags["BLOCK_K"], num_warps=1,
            enable_fp_fusion=False,
        )  # fmt: skip


def compile_cases(arch: int):
    own = {"own_ptr": "*i32", "own_logprobs_ptr": "*fp32", "own_flags_ptr": "*i32"}
    types = {"requests": CHAINS, "sizes": SIZES, "vocab": "i32:16"}
    yield Case(
        "compare", _compare_kernel, types | own | EOS | STORED, {"BLOCK_K": 8},
        {"num_warps": 1, "enable_fp_fusion": False},
    )  # fmt: skip
