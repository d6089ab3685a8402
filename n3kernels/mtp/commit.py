from __future__ import annotations

import torch
from torch import Tensor

from .. import _dispatch
from .._checks import Check
from . import reference_commit

__all__ = ["commit"]


def commit(
    tokens: Tensor, num_emitted: Tensor, cu_rows: Tensor, seq_len: Tensor, *, slot: Tensor | None = None,
    eos_ids: Tensor | None = None, max_len: Tensor | None = None, finished: Tensor | None = None,
    histogram: Tensor | None = None, ring_pos: Tensor | None = None, ring_size: int = 0, ring_tokens: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    r"""From the counts of a verification, all that an engine commits, on the device: ``a = num_emitted[b]``.

    A query of a request had the last committed token and its k drafts as inputs; the first a of these k + 1 are valid,
    and a is what `causal_conv1d_update`, `ssm_update` and `ssm_replay_commit` take as ``num_accepted``.

    Args:
        tokens: ``[B, K + 1]``, int32, and num_emitted: ``[B]``, int32: `verify`'s first two results.
        cu_rows: ``[B + 1]``, int32: the rows of each request's query.
        seq_len: ``[slots]``, int32: committed inputs of each slot; ``+= a`` in place, up to ``max_len``.
        slot: ``[B]``, int32; None: request b has slot b. A request with a slot out of range or no emitted token is
            padding: nothing is touched. Distinct slots.
        eos_ids: ``[n]``, int32: emitting one finishes a request.
        max_len: ``[slots]``, int32.
        finished: ``[slots]``, int32, in place: bit 0 is set where an EOS was emitted, bit 1 where ``seq_len`` reached
            ``max_len``.
        histogram: ``[H]``, int64, in place: ``histogram[min(a, H - 1)] += 1``.
        ring_pos: ``[slots, 2]``, int32, in place: (start, count) of the replay rings, as `ssm_replay_commit` moves it
            for a chain; one call serves all layers that share it.
        ring_size, ring_tokens: R and T of those rings, R >= 2 T >= 2 with ``ring_pos``.
    Returns:
        num_accepted ``[B]`` (a; 0 for padding), last_token ``[B]`` (-1), last_row ``[B]`` (-1), kv_start ``[B]``
        (``seq_len`` before), kv_free ``[B]`` (entries at the query's end that are not valid), flat_tokens
        ``[B (K + 1)]`` (the emitted tokens of all requests, then -1), cu_emitted ``[B + 1]`` (their bounds). All
        int32 and exact.
    Raises:
        RuntimeError: a shape, dtype, device or number outside the above; the message names argument and values.
    Source: the replay rule of ReplaySSM; see docs/mtp.md.

    >>> tokens, emitted = torch.tensor([[7, 8, -1], [9, -1, -1]], dtype=torch.int32), torch.tensor([2, 1]).int()
    >>> seq_len, cu_rows = torch.tensor([10, 20], dtype=torch.int32), torch.tensor([0, 3, 6], dtype=torch.int32)
    >>> _, last, rows, _, free, flat, _ = commit(tokens, emitted, cu_rows, seq_len)
    >>> last.tolist(), rows.tolist(), free.tolist(), flat.tolist(), seq_len.tolist()
    ([8, 9], [1, 3], [1, 2], [7, 8, 9, -1, -1, -1], [12, 21])
    """
    return torch.ops.n3.mtp_commit.default(
        tokens, num_emitted, cu_rows, seq_len, slot=slot, eos_ids=eos_ids, max_len=max_len, finished=finished,
        histogram=histogram, ring_pos=ring_pos, ring_size=ring_size, ring_tokens=ring_tokens,
    )  # fmt: skip


def _check(
    tokens, num_emitted, cu_rows, seq_len, *, slot=None, eos_ids=None, max_len=None, finished=None, histogram=None,
    ring_pos=None, ring_size=0, ring_tokens=0,
):  # fmt: skip
    check = Check("mtp_commit")
    check.dtype("tokens", tokens, torch.int32)
    check.dim("tokens", tokens, 2)
    b, width = tokens.shape
    check.that(width >= 1, "tokens must have at least 1 column", width)
    check.dtype("seq_len", seq_len, torch.int32)
    check.dim("seq_len", seq_len, 1)
    slots = seq_len.shape[0]
    by_request = {"num_emitted": (num_emitted, b), "cu_rows": (cu_rows, b + 1), "slot": (slot, b)}
    by_slot = {"max_len": (max_len, slots), "finished": (finished, slots)}
    for name, (t, size) in (by_request | by_slot).items():
        if t is not None:
            check.dtype(name, t, torch.int32)
            check.shape(name, t, (size,))
    if slot is None:
        check.that(slots >= b, f"seq_len must have at least {b} elements when slot is None", slots)
    if eos_ids is not None:
        check.dtype("eos_ids", eos_ids, torch.int32)
        check.dim("eos_ids", eos_ids, 1)
    if histogram is not None:
        check.dtype("histogram", histogram, torch.int64)
        check.dim("histogram", histogram, 1)
        check.that(histogram.shape[0] >= 1, "histogram must have at least 1 element", histogram.shape[0])
    if ring_pos is not None:
        check.dtype("ring_pos", ring_pos, torch.int32)
        check.shape("ring_pos", ring_pos, (slots, 2))
        check.that(ring_tokens >= 1, "ring_tokens must be at least 1 with ring_pos", ring_tokens)
        check.that(ring_size >= 2 * ring_tokens, f"ring_size must be at least {2 * ring_tokens}", ring_size)
    check.same_device(
        "tokens", tokens, num_emitted=num_emitted, cu_rows=cu_rows, seq_len=seq_len, slot=slot, eos_ids=eos_ids,
        max_len=max_len, finished=finished, histogram=histogram, ring_pos=ring_pos,
    )  # fmt: skip


def _fake(tokens, num_emitted, *rest, **options):
    b, width = tokens.shape
    return (*(tokens.new_empty(b) for _ in range(5)), tokens.new_empty(b * width), tokens.new_empty(b + 1))


_dispatch.register(
    "mtp_commit",
    check=_check,
    fake=_fake,
    reference=reference_commit.mtp_commit,
    triton="n3kernels.triton_ops.mtp.commit:mtp_commit",
)
