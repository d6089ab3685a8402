from __future__ import annotations

import torch
from torch import Tensor

from .. import _dispatch
from .._checks import Check
from . import reference_verify
from ._supports import not_float64
from .reference_verify import LOSSY, MODES
from .sample import check_edits, check_logits, check_slots

__all__ = ["verify"]

MAX_DRAFT_IDS = 64


def verify(
    logits: Tensor, draft_tokens: Tensor, cu_rows: Tensor, seed: Tensor, pos: Tensor, *, mode: str = "greedy",
    max_drafts: int, slot: Tensor | None = None, temperature: Tensor | None = None, top_k: Tensor | None = None,
    top_p: Tensor | None = None, min_p: Tensor | None = None, bitmask: Tensor | None = None,
    bitmask_row: Tensor | None = None, forced_token: Tensor | None = None, bias_ids: Tensor | None = None,
    bias_val: Tensor | None = None, bias_cu: Tensor | None = None, eos_ids: Tensor | None = None,
    draft_ids: Tensor | None = None, draft_probs: Tensor | None = None, draft_logits: Tensor | None = None,
    draft_temperature: Tensor | None = None, draft_vocab: Tensor | None = None, allow_lossy: bool = False,
    relaxed_top_k: int = 1, relaxed_delta: float = 0.0, typical_epsilon: float = 0.3, typical_delta: float = 0.09,
    uniforms: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    r"""Accepts the leading drafts ``d_1 .. d_tau`` of each request and emits them and one token of the target's own.

    Request b owns rows ``cu_rows[b]`` up to ``cu_rows[b + 1]``: row i is the target's logits after i drafts, its
    processed law p_i (see `sample`); the last row has no draft to check. q_i is the law from which draft i + 1 was
    drawn. The emitted tokens have the law of plain decoding, exactly, in every mode but the last two:

    - ``"greedy"``: y_i is the argmax of row i, of equals the lowest id, whatever the temperature; drafts are accepted
      while ``d_{i+1} = y_i``.
    - ``"coupled"``: the same with y_i = `sample` of row i at position ``pos[b] + i``: the tokens are bit for bit those
      of plain decoding with the same seed, whatever the drafter, the number of drafts and the batch.
    - ``"token"``: accept iff ``u_i q_i(d) < p_i(d)``; at the first rejection draw from ``norm(max(p_i - q_i, 0))``.
    - ``"block"``: block verification, which accepts the most drafts on average: with ``w_i = min(1, w_{i-1} p / q)``
      tau is the last i with ``u_{i-1} < h_i``, ``h_i = Z_i / (Z_i + 1 - w_i)``, ``Z_i = sum max(w_i p_i - q_i, 0)``,
      ``h_k = w_k``; then draw from ``norm(max(w_tau p_tau - q_tau, 0))``.
    - ``"relaxed"`` (not exact): accept a draft among the ``relaxed_top_k`` most probable tokens within
      ``relaxed_delta`` of the best one's probability; else emit the most probable token.
    - ``"typical"`` (not exact): accept iff ``p_i(d) > min(typical_epsilon, typical_delta exp(-entropy(p_i)))``; else
      emit `sample`'s token.

    Rows past the last emitted token have no effect.

    Args:
        logits: ``[N, V]``, float32, float16 or bfloat16, V < 2^30; rows may be strided, elements may not.
        draft_tokens: ``[N]``, int32: the draft that is checked with each row, negative for none; the chain of drafts
            ends at the first negative one.
        cu_rows: ``[B + 1]``, int32, from 0 on; equal neighbours make a padding request.
        seed: ``[slots]``, int64, one per request.
        pos: ``[B]``, int64, absolute position of the token that the request's first row predicts.
        mode: as above; drafts without a law (the four arguments below) count as certain, ``q(d) = 1``.
        max_drafts: K >= 0; rows of a request past K + 1 are not looked at.
        slot: ``[B]``, int32, index into ``seed`` and the parameters; None: request b uses slot b. Negative: a padding
            request.
        temperature, top_k, top_p, min_p: ``[slots]``, as in `sample`; of no effect in mode ``"greedy"``.
        bitmask, bitmask_row, forced_token, bias_ids, bias_val, bias_cu: by row, as in `sample`; those of row i must be
            those after the drafts before it.
        eos_ids: ``[n]``, int32; a request emits nothing after one of these.
        draft_ids, draft_probs: ``[N, M]``, int32 and float32, 1 <= M <= 64: q of the draft that is checked with each
            row, as `draft_sample` publishes it; 0 for tokens that are not listed, -1 pads. Distinct ids.
        draft_logits, draft_temperature: ``[N, V']``, a floating dtype, and ``[slots]``, float32, 1 if None: q is
            ``softmax(draft_logits / draft_temperature)``; below 1e-5 its argmax is certain.
        draft_vocab: ``[V']``, int32: the token of each id in ``draft_ids`` and each column of ``draft_logits``, for a
            drafter with a smaller vocabulary. ``draft_tokens`` are tokens.
        allow_lossy: must be True for the modes that are not exact.
        relaxed_top_k, relaxed_delta, typical_epsilon, typical_delta: the numbers of those modes.
        uniforms: ``[N, 2]``, float64 in (0, 1): the numbers for accepting the row's draft and for a final draw from it,
            in modes ``"token"`` and ``"block"``, in place of Philox's, for tests of the law.
    Returns:
        tokens: ``[B, K + 1]``, int32, -1 after the last emitted one.
        num_emitted: ``[B]``, int32, tau + 1; 0 for a padding request.
        last_row: ``[B]``, int32, the row of the last emitted token, ``cu_rows[b] + tau``; -1 for a padding request.
        logprobs: ``[B, K + 1]``, float32, as in `sample`, 0 after the last emitted one.
        flags: ``[B]``, int32, the flags of `sample` of the rows that were looked at in one; 8 also for a draft >= V,
            16 for a draft with q(d) = 0: both are rejected.

        Deterministic; a request's result does not depend on slot or batch. Out-of-range ``cu_rows`` are clamped to
        [0, N]. Coupled rows equal `sample` of the same backend bit for bit.
    Raises:
        RuntimeError: a shape, dtype, device or stride outside the above; the message names argument and values.
    Source: speculative sampling (arXiv:2211.17192, arXiv:2302.01318); block verification (arXiv:2403.10444, theorem
        1); sampled verification, Gumbel coupling as in Daliri et al. (arXiv:2408.07978); typical acceptance as in
        Medusa (arXiv:2401.10774).

    >>> logits = torch.tensor([[0.0, 1.0, 0.0], [2.0, 0.0, 0.0], [0.0, 0.0, 3.0]])
    >>> zero, rows = torch.zeros(1, dtype=torch.int64), torch.tensor([0, 3], dtype=torch.int32)
    >>> drafts = torch.tensor([1, 2, -1], dtype=torch.int32)
    >>> verify(logits, drafts, rows, zero, zero, max_drafts=2)[:2]
    (tensor([[ 1,  0, -1]], dtype=torch.int32), tensor([2], dtype=torch.int32))
    """
    return torch.ops.n3.mtp_verify.default(
        logits, draft_tokens, cu_rows, seed, pos, mode=mode, max_drafts=max_drafts, slot=slot, temperature=temperature,
        top_k=top_k, top_p=top_p, min_p=min_p, bitmask=bitmask, bitmask_row=bitmask_row, forced_token=forced_token,
        bias_ids=bias_ids, bias_val=bias_val, bias_cu=bias_cu, eos_ids=eos_ids, draft_ids=draft_ids,
        draft_probs=draft_probs, draft_logits=draft_logits, draft_temperature=draft_temperature,
        draft_vocab=draft_vocab, allow_lossy=allow_lossy, relaxed_top_k=relaxed_top_k, relaxed_delta=relaxed_delta,
        typical_epsilon=typical_epsilon, typical_delta=typical_delta, uniforms=uniforms,
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
    bias_cu=None, eos_ids=None, draft_ids=None, draft_probs=None, draft_logits=None, draft_temperature=None,
    draft_vocab=None, allow_lossy=False, relaxed_top_k=1, relaxed_delta=0.0, typical_epsilon=0.3, typical_delta=0.09,
    uniforms=None,
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
    check.that(mode not in LOSSY or allow_lossy, f"allow_lossy must be True in mode {mode}", allow_lossy)
    check.that(relaxed_top_k >= 1, "relaxed_top_k must be at least 1", relaxed_top_k)
    check_laws(
        check, mode, logits, draft_ids, draft_probs, draft_vocab, uniforms, draft_logits, draft_temperature, seed
    )


def check_laws(
    check: Check, mode: str, logits, draft_ids, draft_probs, draft_vocab, uniforms, draft_logits=None,
    draft_temperature=None, seed=None,
) -> None:  # fmt: skip
    """The laws of the drafts, which modes "token" and "block" take, and the numbers in place of Philox's."""
    laws = {
        "draft_ids": draft_ids, "draft_probs": draft_probs, "draft_logits": draft_logits,
        "draft_temperature": draft_temperature, "draft_vocab": draft_vocab, "uniforms": uniforms,
    }  # fmt: skip
    n = logits.shape[0]
    for name, t in laws.items():
        check.that(t is None or mode in ("token", "block"), f"{name} must be None in mode {mode}")
    given = (draft_ids is not None) + (draft_probs is not None)
    check.that(given in (0, 2), "draft_ids and draft_probs must be given together or not at all", f"{given} of 2")
    if given:
        check.that(draft_logits is None, "draft_logits must be None with draft_ids")
        check.dtype("draft_ids", draft_ids, torch.int32)
        check.dim("draft_ids", draft_ids, 2)
        m = draft_ids.shape[1]
        check.that(1 <= m <= MAX_DRAFT_IDS, f"draft_ids must have 1 to {MAX_DRAFT_IDS} columns", m)
        check.shape("draft_ids", draft_ids, (n, m))
        check.dtype("draft_probs", draft_probs, torch.float32)
        check.shape("draft_probs", draft_probs, (n, m))
    if draft_vocab is not None:
        check.dtype("draft_vocab", draft_vocab, torch.int32)
        check.dim("draft_vocab", draft_vocab, 1)
        check.that(draft_vocab.shape[0] >= 1, "draft_vocab must have at least 1 element", draft_vocab.shape[0])
    if draft_logits is not None:
        check.floating("draft_logits", draft_logits)
        check.dim("draft_logits", draft_logits, 2)
        width = logits.shape[1] if draft_vocab is None else draft_vocab.shape[0]
        check.shape("draft_logits", draft_logits, (n, width))
    if draft_temperature is not None:
        check.that(draft_logits is not None, "draft_temperature must be None without draft_logits")
        check.dtype("draft_temperature", draft_temperature, torch.float32)
        check.shape("draft_temperature", draft_temperature, seed.shape)
    if uniforms is not None:
        check.dtype("uniforms", uniforms, torch.float64)
        check.shape("uniforms", uniforms, (n, 2))
    check.same_device("logits", logits, **laws)


def _fake(logits, draft_tokens, cu_rows, seed, pos, *, max_drafts, **options):
    b, width = cu_rows.shape[0] - 1, max_drafts + 1
    return (
        logits.new_empty(b, width, dtype=torch.int32),
        logits.new_empty(b, dtype=torch.int32),
        logits.new_empty(b, dtype=torch.int32),
        logits.new_empty(b, width, dtype=torch.float32),
        logits.new_empty(b, dtype=torch.int32),
    )


_dispatch.register(
    "mtp_verify",
    check=_check,
    fake=_fake,
    reference=reference_verify.mtp_verify,
    triton="n3kernels.triton_ops.mtp.verify:mtp_verify",
    supports={"cpu": not_float64, "triton": not_float64, "cuda": not_float64},
)
