from __future__ import annotations

import torch
from torch import Tensor

from .. import _dispatch
from .._checks import Check
from . import reference_verify
from ._supports import not_float64
from .sample import check_logits, check_slots
from .verify import MAX_DRAFT_IDS

__all__ = ["draft_sample"]


def draft_sample(
    logits: Tensor, seed: Tensor, pos: Tensor, *, max_ids: int, slot: Tensor | None = None,
    temperature: Tensor | None = None, draft_vocab: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    r"""Draws a draft from the ``max_ids`` most probable tokens and publishes the law it was drawn from.

    ``softmax(logits / temperature)`` is cut to its ``max_ids`` largest (of equals the lowest ids) and divided by what
    is left. What is published is exactly the law of the draw, as `verify`'s modes ``"token"`` and ``"block"`` need it:
    16 to 64 tokens of a drafter lose next to no acceptance against all of them.

    Args:
        logits: ``[N, V]``, float32, float16 or bfloat16, the drafter's; rows may be strided, elements may not.
        seed, pos, slot, temperature: as in `sample`. The noise is a stream of its own.
        max_ids: M, 1 to 64.
        draft_vocab: ``[V]``, int32: the target's token for each of the drafter's.
    Returns:
        tokens: ``[N]``, int32, target's ids; -1 for a padding row.
        ids: ``[N, M]``, int32, the drafter's ids in descending order of probability, then -1.
        probs: ``[N, M]``, float32, then 0. A row below temperature 1e-5 has its argmax with probability 1.

        NaN logits count as -inf. Probabilities are within 1e-6 of the float64 definition; deterministic.
    Raises:
        RuntimeError: a shape, dtype, device or stride outside the above; the message names argument and values.
    Source: speculative sampling (arXiv:2211.17192) needs the q that was sampled from, whatever it is.

    >>> zero = torch.zeros(1, dtype=torch.int64)
    >>> draft_sample(torch.tensor([[0.0, 9.0, 9.0]]), zero, zero, max_ids=2)[1:]
    (tensor([[1, 2]], dtype=torch.int32), tensor([[0.5000, 0.5000]]))
    """
    return torch.ops.n3.mtp_draft_sample.default(
        logits, seed, pos, max_ids=max_ids, slot=slot, temperature=temperature, draft_vocab=draft_vocab
    )


def _check(logits, seed, pos, *, max_ids, slot=None, temperature=None, draft_vocab=None):
    check = Check("mtp_draft_sample")
    check_logits(check, logits)
    n, vocab = logits.shape
    check_slots(check, n, seed, slot, temperature, None, None, None)
    check.dtype("pos", pos, torch.int64)
    check.shape("pos", pos, (n,))
    check.that(1 <= max_ids <= MAX_DRAFT_IDS, f"max_ids must be between 1 and {MAX_DRAFT_IDS}", max_ids)
    if draft_vocab is not None:
        check.dtype("draft_vocab", draft_vocab, torch.int32)
        check.shape("draft_vocab", draft_vocab, (vocab,))
    check.same_device(
        "logits", logits, seed=seed, pos=pos, slot=slot, temperature=temperature, draft_vocab=draft_vocab
    )


def _fake(logits, seed, pos, *, max_ids, **options):
    n = logits.shape[0]
    return (
        logits.new_empty(n, dtype=torch.int32),
        logits.new_empty(n, max_ids, dtype=torch.int32),
        logits.new_empty(n, max_ids, dtype=torch.float32),
    )


_dispatch.register(
    "mtp_draft_sample",
    check=_check,
    fake=_fake,
    reference=reference_verify.mtp_draft_sample,
    triton="n3kernels.triton_ops.mtp.draft_sample:mtp_draft_sample",
    supports={"cpu": not_float64, "triton": not_float64, "cuda": not_float64},
)
