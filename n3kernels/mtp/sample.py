from __future__ import annotations

import torch
from torch import Tensor

from .. import _dispatch
from .._checks import Check
from . import reference
from ._supports import not_float64

__all__ = ["sample"]


def sample(
    logits: Tensor, seed: Tensor, pos: Tensor, *, slot: Tensor | None = None, temperature: Tensor | None = None,
    top_k: Tensor | None = None, top_p: Tensor | None = None, min_p: Tensor | None = None,
    bitmask: Tensor | None = None, bitmask_row: Tensor | None = None, forced_token: Tensor | None = None,
    bias_ids: Tensor | None = None, bias_val: Tensor | None = None, bias_cu: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    r"""Draws one token per row: ``argmax_x(log p(x) + g(seed, pos, x))``, p the processed softmax, g Gumbel noise.

    p is made in this order: ``logits + bias``, bitmask, ``/ temperature``, min-p, top-k, top-p on what is left,
    softmax; a forced token replaces it all. Ties stay together: top-k keeps every token equal to the k-th, top-p every
    token equal to the one that crosses p. The noise has two levels: one draw per tile of 4096 tokens chooses the tile
    by its mass, one per token chooses inside it; the law is exactly p. A draw depends on (seed, pos, token) alone, so
    the same request gives the same tokens in any slot and batch, with drafts (`verify`, mode ``"coupled"``) or without.

    Args:
        logits: ``[N, V]``, float32, float16 or bfloat16, V < 2^30; rows may be strided, elements may not.
        seed: ``[slots]``, int64, one per request.
        pos: ``[N]``, int64, absolute position of the token to be drawn.
        slot: ``[N]``, int32, index into ``seed`` and the four parameters below; None: row i uses slot i. Negative:
            a padding row, which emits -1.
        temperature: ``[slots]``, float32; below 1e-5 the row is greedy: the largest logit, of equals the lowest id.
        top_k: ``[slots]``, int32; off if < 1 or >= V.
        top_p: ``[slots]``, float32; off if >= 1; at least the largest logit and its equals are kept.
        min_p: ``[slots]``, float32, keeps p >= min_p * max p; off if <= 0.
        bitmask: ``[Rm, ceil(V / 32)]``, int32, bit j of word i allows token 32 i + j (xgrammar's layout).
        bitmask_row: ``[N]``, int32, the mask row of each row, negative for none; None: row i uses mask row i.
        forced_token: ``[N]``, int32, the token to emit, negative for none. Such a row of logits is not looked at.
        bias_ids, bias_val, bias_cu: sparse additive edits, int32 ``[M]``, float32 ``[M]`` and int32 ``[N + 1]``: row i
            has entries ``bias_cu[i]`` up to ``bias_cu[i + 1]``; repeated ids add up, ids outside [0, V) are ignored.
    Returns:
        tokens: ``[N]``, int32, always in [0, V), -1 for a padding row.
        logprobs: ``[N]``, float32, ``log p(token)`` after all processing; 0 where p is one token (greedy, forced).
        flags: ``[N]``, int32, bits: 1 an allowed logit is NaN (counts as -inf), 2 the mask allows nothing (ignored),
            4 every allowed logit is -inf (the lowest allowed token is emitted, log-probability 0), 8 a slot, mask row
            or forced token lies past its range (ignored; such a slot is padding).

        Edits and cut-offs compare logits in float32; probabilities and noise are float64 in the definition, and
        log-probabilities are within 1e-5 of it. A logit of +inf shares all mass with its equals. Deterministic; a
        row's result does not depend on the batch. Across backends a token may differ where rounding moves a draw over
        a boundary.
    Raises:
        RuntimeError: a shape, dtype, device or stride outside the above; the message names argument and values.
    Source: Gumbel-max; Philox4x32-10 (see ``n3kernels._philox`` for counters); order of the filters as in vLLM.

    >>> logits = torch.tensor([[0.0, 5.0, 1.0]])
    >>> zero = torch.zeros(1, dtype=torch.int64)
    >>> sample(logits, zero, zero, temperature=torch.zeros(1))[0]
    tensor([1], dtype=torch.int32)
    """
    return torch.ops.n3.sample.default(
        logits, seed, pos, slot=slot, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, bitmask=bitmask,
        bitmask_row=bitmask_row, forced_token=forced_token, bias_ids=bias_ids, bias_val=bias_val, bias_cu=bias_cu,
    )  # fmt: skip


def check_logits(check: Check, logits: Tensor) -> None:
    check.dim("logits", logits, 2)
    check.floating("logits", logits)
    check.that(logits.shape[1] >= 1, "logits must have at least 1 column", logits.shape[1])
    check.that(
        logits.shape[1] == 1 or logits.stride(1) == 1,
        "logits must have stride 1 along the last dimension",
        lambda: logits.stride(1),
    )


def check_slots(check: Check, n: int, seed, slot, temperature, top_k, top_p, min_p) -> None:
    """``seed`` and the parameters by slot; ``n`` rows or requests choose theirs."""
    check.dtype("seed", seed, torch.int64)
    check.dim("seed", seed, 1)
    slots = seed.shape[0]
    if slot is None:
        check.that(slots >= n, f"seed must have at least {n} elements when slot is None", slots)
    else:
        check.dtype("slot", slot, torch.int32)
        check.shape("slot", slot, (n,))
    for name, t, dtype in (
        ("temperature", temperature, torch.float32), ("top_k", top_k, torch.int32),
        ("top_p", top_p, torch.float32), ("min_p", min_p, torch.float32),
    ):  # fmt: skip
        if t is not None:
            check.dtype(name, t, dtype)
            check.shape(name, t, (slots,))


def check_edits(check: Check, logits, bitmask, bitmask_row, forced_token, bias_ids, bias_val, bias_cu) -> None:
    """What changes single rows of ``logits``: masks, forced tokens and sparse biases."""
    n, vocab = logits.shape
    if bitmask is not None:
        check.dtype("bitmask", bitmask, torch.int32)
        check.dim("bitmask", bitmask, 2)
        check.shape("bitmask", bitmask, (n if bitmask_row is None else bitmask.shape[0], (vocab + 31) // 32))
    if bitmask_row is not None:
        check.that(bitmask is not None, "bitmask_row must be None when bitmask is None")
        check.dtype("bitmask_row", bitmask_row, torch.int32)
        check.shape("bitmask_row", bitmask_row, (n,))
    if forced_token is not None:
        check.dtype("forced_token", forced_token, torch.int32)
        check.shape("forced_token", forced_token, (n,))
    given = sum(t is not None for t in (bias_ids, bias_val, bias_cu))
    check.that(given in (0, 3), "bias_ids, bias_val and bias_cu must be given together", lambda: f"{given} of 3")
    if given == 3:
        check.dtype("bias_ids", bias_ids, torch.int32)
        check.dim("bias_ids", bias_ids, 1)
        check.dtype("bias_val", bias_val, torch.float32)
        check.shape("bias_val", bias_val, bias_ids.shape)
        check.dtype("bias_cu", bias_cu, torch.int32)
        check.shape("bias_cu", bias_cu, (n + 1,))
    check.same_device(
        "logits", logits, bitmask=bitmask, bitmask_row=bitmask_row, forced_token=forced_token, bias_ids=bias_ids,
        bias_val=bias_val, bias_cu=bias_cu,
    )  # fmt: skip


def _check(
    logits, seed, pos, *, slot=None, temperature=None, top_k=None, top_p=None, min_p=None, bitmask=None,
    bitmask_row=None, forced_token=None, bias_ids=None, bias_val=None, bias_cu=None,
):  # fmt: skip
    check = Check("sample")
    check_logits(check, logits)
    n = logits.shape[0]
    check_slots(check, n, seed, slot, temperature, top_k, top_p, min_p)
    check.dtype("pos", pos, torch.int64)
    check.shape("pos", pos, (n,))
    check.same_device(
        "logits", logits, seed=seed, pos=pos, slot=slot, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p
    )
    check_edits(check, logits, bitmask, bitmask_row, forced_token, bias_ids, bias_val, bias_cu)


def _fake(logits, seed, pos, **options):
    n = logits.shape[0]
    return (
        logits.new_empty(n, dtype=torch.int32),
        logits.new_empty(n, dtype=torch.float32),
        logits.new_empty(n, dtype=torch.int32),
    )


_dispatch.register(
    "sample",
    check=_check,
    fake=_fake,
    reference=reference.sample,
    triton="n3kernels.triton_ops.mtp.sample:sample",
    supports={"cpu": not_float64, "triton": not_float64, "cuda": not_float64},
)
