from __future__ import annotations

import torch
from torch import Tensor

from .. import _dispatch
from .._checks import Check
from . import reference
from .sample import check_edits, check_logits, check_slots

__all__ = ["verify"]

MODES = ("greedy", "coupled")


def verify(
    logits: Tensor, draft_tokens: Tensor, cu_rows: Tensor, seed: Tensor, pos: Tensor, *, mode: str = "greedy",
    max_drafts: int, slot: Tensor | None = None, temperature: Tensor | None = None, top_k: Tensor | None = None,
    top_p: Tensor | None = None, min_p: Tensor | None = None, bitmask: Tensor | None = None,
    bitmask_row: Tensor | None = None, forced_token: Tensor | None = None, bias_ids: Tensor | None = None,
    bias_val: Tensor | None = None, bias_cu: Tensor | None = None, eos_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    r"""Emits ``y_0 .. y_tau``, tau the number of leading drafts with ``d_{i+1} = y_i``, y_i the target's own token.

    Request b owns rows ``cu_rows[b]`` up to ``cu_rows[b + 1]``: row i is the target's logits after i drafts, the last
    row has no draft to check. In mode ``"coupled"`` y_i is `sample` of row i at position ``pos[b] + i``, so the tokens
    are bit for bit those of plain decoding with the same seed, whatever the drafter, the number of drafts and the
    batch. In mode ``"greedy"`` y_i is the argmax of row i, of equals the lowest id, whatever the temperature. Rows
    past the first rejection have no effect.

    Args:
        logits: ``[N, V]``, float32, float16 or bfloat16, V < 2^30; rows may be strided, elements may not.
        draft_tokens: ``[N]``, int32: the draft that is checked with each row, negative for none; the chain of drafts
            ends at the first negative one.
        cu_rows: ``[B + 1]``, int32, from 0 on; equal neighbours make a padding request.
        seed: ``[slots]``, int64, one per request.
        pos: ``[B]``, int64, absolute position of the token that the request's first row predicts.
        mode: ``"greedy"`` or ``"coupled"``.
        max_drafts: K >= 0; rows of a request past K + 1 are not looked at.
        slot: ``[B]``, int32, index into ``seed`` and the parameters; None: request b uses slot b. Negative: a padding
            request.
        temperature, top_k, top_p, min_p: ``[slots]``, as in `sample`; of no effect in mode ``"greedy"``.
        bitmask, bitmask_row, forced_token, bias_ids, bias_val, bias_cu: by row, as in `sample`; those of row i must be
            those after the drafts before it.
        eos_ids: ``[n]``, int32; a request emits nothing after one of these.
    Returns:
        tokens: ``[B, K + 1]``, int32, -1 after the last emitted one.
        num_emitted: ``[B]``, int32, tau + 1; 0 for a padding request.
        last_row: ``[B]``, int32, the row of the last emitted token, ``cu_rows[b] + tau``; -1 for a padding request.
        logprobs: ``[B, K + 1]``, float32, as in `sample`, 0 after the last emitted one.
        flags: ``[B]``, int32, the flags of `sample` of the request's emitted rows in one; bit 8 also for a draft >= V,
            which is rejected.

        Deterministic; a request's result does not depend on slot or batch. Out-of-range ``cu_rows`` are clamped to
        [0, N]. Coupled rows equal `sample` of the same backend bit for bit.
    Raises:
        RuntimeError: a shape, dtype, device or stride outside the above; the message names argument and values.
    Source: sampled verification; Gumbel coupling as in Daliri et al. (arXiv:2408.07978).

    >>> logits = torch.tensor([[0.0, 1.0, 0.0], [2.0, 0.0, 0.0], [0.0, 0.0, 3.0]])
    >>> zero, rows = torch.zeros(1, dtype=torch.int64), torch.tensor([0, 3], dtype=torch.int32)
    >>> drafts = torch.tensor([1, 2, -1], dtype=torch.int32)
    >>> verify(logits, drafts, rows, zero, zero, max_drafts=2)[:2]
    (tensor([[ 1,  0, -1]], dtype=torch.int32), tensor([2], dtype=torch.int32))
    """
    return torch.ops.n3.mtp_verify.default(
        logits, draft_tokens, cu_rows, seed, pos, mode=mode, max_drafts=max_drafts, slot=slot, temperature=temperature,
        top_k=top_k, top_p=top_p, min_p=min_p, bitmask=bitmask, bitmask_row=bitmask_row, forced_token=forced_token,
        bias_ids=bias_ids, bias_val=bias_val, bias_cu=bias_cu, eos_ids=eos_ids,
    )  # fmt: skip


def check_rows(check: Check, draft_tokens: Tensor, n_rows: int | None, cu_rows: Tensor) -> None:
    check.dtype("draft_tokens", draft_tokens, torch.int32)
    if n_rows is None:
        check.dim("draft_tokens", draft_tokens, 1)
    else:
        check.shape("draft_tokens", draft_tokens, (n_rows,))
    check.dtype("cu_rows", cu_rows, torch.int32)
    check.dim("cu_rows", cu_rows, 1)
    check.that(cu_rows.shape[0] >= 1, "cu_rows must have at least 1 element", cu_rows.shape[0])


def _check(
    logits, draft_tokens, cu_rows, seed, pos, *, mode="greedy", max_drafts, slot=None, temperature=None, top_k=None,
    top_p=None, min_p=None, bitmask=None, bitmask_row=None, forced_token=None, bias_ids=None, bias_val=None,
    bias_cu=None, eos_ids=None,
):  # fmt: skip
    check = Check("mtp_verify")
    check_logits(check, logits)
    check_rows(check, draft_tokens, logits.shape[0], cu_rows)
    b = cu_rows.shape[0] - 1
    check_slots(check, b, seed, slot, temperature, top_k, top_p, min_p)
    check.dtype("pos", pos, torch.int64)
    check.shape("pos", pos, (b,))
    check.choice("mode", mode, MODES)
    check.that(max_drafts >= 0, "max_drafts must be at least 0", max_drafts)
    if eos_ids is not None:
        check.dtype("eos_ids", eos_ids, torch.int32)
        check.dim("eos_ids", eos_ids, 1)
    check.same_device(
        "logits", logits, draft_tokens=draft_tokens, cu_rows=cu_rows, seed=seed, pos=pos, slot=slot,
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, eos_ids=eos_ids,
    )  # fmt: skip
    check_edits(check, logits, bitmask, bitmask_row, forced_token, bias_ids, bias_val, bias_cu)


def _fake(logits, draft_tokens, cu_rows, seed, pos, *, max_drafts, **options):
    b, width = cu_rows.shape[0] - 1, max_drafts + 1
    return (
        logits.new_empty(b, width, dtype=torch.int32),
        logits.new_empty(b, dtype=torch.int32),
        logits.new_empty(b, dtype=torch.int32),
        logits.new_empty(b, width, dtype=torch.float32),
        logits.new_empty(b, dtype=torch.int32),
    )


_LATER = "arrives with the mtp family"
_dispatch.register(
    "mtp_verify",
    check=_check,
    fake=_fake,
    reference=reference.mtp_verify,
    missing={"cpu": _LATER, "triton": _LATER, "cuda": _LATER},
)
