from __future__ import annotations

import torch
from torch import Tensor

from .. import _dispatch
from .._checks import Check
from . import reference_verify
from ._supports import not_float64
from .sample import check_edits, check_logits, check_slots
from .verify import check_laws

__all__ = ["verify_tree"]

MODES = ("greedy", "coupled", "token")


def verify_tree(
    logits: Tensor, node_tokens: Tensor, parents: Tensor, cu_rows: Tensor, seed: Tensor, pos: Tensor, *,
    mode: str = "greedy", max_depth: int, slot: Tensor | None = None, temperature: Tensor | None = None,
    top_k: Tensor | None = None, top_p: Tensor | None = None, min_p: Tensor | None = None,
    bitmask: Tensor | None = None, bitmask_row: Tensor | None = None, forced_token: Tensor | None = None,
    bias_ids: Tensor | None = None, bias_val: Tensor | None = None, bias_cu: Tensor | None = None,
    eos_ids: Tensor | None = None, draft_ids: Tensor | None = None, draft_probs: Tensor | None = None,
    draft_vocab: Tensor | None = None, uniforms: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    r"""Verifies trees of drafts: walks from the root to accepted children and emits one token more.

    Request b owns rows ``cu_rows[b]`` up to ``cu_rows[b + 1]``. Row 0 is the root, the last committed token; each row
    j > 0 is a draft. The logits of a row are the target's after the path to its node. The children of a node in the
    order of their rows are its siblings. The emitted tokens have the law of plain decoding, exactly:

    - ``"greedy"``, ``"coupled"``: the token of a node is the target's own, as in `verify`; the first child that has it
      is the next node.
    - ``"token"``: of the children in order the first with ``u q(d) < p'(d)`` is the next node, where p' is at first p
      and after each rejection ``norm(max(p' - q, 0))``; if none is, the last token is drawn from p'. q is the law from
      which the children were drawn, independently of each other; distinct children without a law count as certain.

    Args:
        logits, cu_rows, seed, pos, slot, temperature, top_k, top_p, min_p, eos_ids: as in `verify`; ``pos[b]`` is the
            position of the token after the root.
        node_tokens: ``[N]``, int32: the token of each node; a root's is not looked at, a negative one is no node.
        parents: ``[N]``, int32: the row of each node's parent within its request, below its own; others are no nodes.
        mode: as above.
        max_depth: D >= 0: the most drafts that are accepted.
        bitmask, bitmask_row, forced_token, bias_ids, bias_val, bias_cu: by row, as in `sample`.
        draft_ids, draft_probs: ``[N, M]``, int32 and float32, 1 <= M <= 64: q of the children of each row.
        draft_vocab: ``[V']``, int32: the token of each id in ``draft_ids``.
        uniforms: ``[N, 2]``, float64: the numbers for accepting each node and for a final draw from it, for tests.
    Returns:
        tokens: ``[B, D + 1]``, int32, -1 after the last emitted one.
        num_emitted: ``[B]``, int32; 0 for a padding request.
        rows: ``[B, D + 1]``, int32: the row that gave each emitted token, so the accepted path; -1 after the last.
        logprobs: ``[B, D + 1]``, float32, of the target's law in that row.
        flags: ``[B]``, int32, as in `verify`.
    Raises:
        RuntimeError: a shape, dtype, device or stride outside the above; the message names argument and values.
    Source: SpecInfer (arXiv:2305.09781), recursive rejection sampling (arXiv:2402.14160).

    >>> logits = torch.tensor([[0.0, 1.0, 0.0], [2.0, 0.0, 0.0], [0.0, 0.0, 3.0]])
    >>> zero, rows = torch.zeros(1, dtype=torch.int64), torch.tensor([0, 3], dtype=torch.int32)
    >>> tokens, parents = torch.tensor([0, 2, 1], dtype=torch.int32), torch.tensor([-1, 0, 0], dtype=torch.int32)
    >>> tokens, _, path, _, _ = verify_tree(logits, tokens, parents, rows, zero, zero, max_depth=2)
    >>> tokens.tolist(), path.tolist()
    ([[1, 2, -1]], [[0, 2, -1]])
    """
    return torch.ops.n3.mtp_verify_tree.default(
        logits, node_tokens, parents, cu_rows, seed, pos, mode=mode, max_depth=max_depth, slot=slot,
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, bitmask=bitmask, bitmask_row=bitmask_row,
        forced_token=forced_token, bias_ids=bias_ids, bias_val=bias_val, bias_cu=bias_cu, eos_ids=eos_ids,
        draft_ids=draft_ids, draft_probs=draft_probs, draft_vocab=draft_vocab, uniforms=uniforms,
    )  # fmt: skip


def _check(
    logits, node_tokens, parents, cu_rows, seed, pos, *, mode="greedy", max_depth, slot=None, temperature=None,
    top_k=None, top_p=None, min_p=None, bitmask=None, bitmask_row=None, forced_token=None, bias_ids=None,
    bias_val=None, bias_cu=None, eos_ids=None, draft_ids=None, draft_probs=None, draft_vocab=None, uniforms=None,
):  # fmt: skip
    check = Check("mtp_verify_tree")
    check_logits(check, logits)
    n = logits.shape[0]
    for name, t in (("node_tokens", node_tokens), ("parents", parents)):
        check.dtype(name, t, torch.int32)
        check.shape(name, t, (n,))
    check.dtype("cu_rows", cu_rows, torch.int32)
    check.dim("cu_rows", cu_rows, 1)
    check.that(cu_rows.shape[0] >= 1, "cu_rows must have at least 1 element", cu_rows.shape[0])
    b = cu_rows.shape[0] - 1
    check_slots(check, b, seed, slot, temperature, top_k, top_p, min_p)
    check.dtype("pos", pos, torch.int64)
    check.shape("pos", pos, (b,))
    check.choice("mode", mode, MODES)
    check.that(max_depth >= 0, "max_depth must be at least 0", max_depth)
    if eos_ids is not None:
        check.dtype("eos_ids", eos_ids, torch.int32)
        check.dim("eos_ids", eos_ids, 1)
    check.same_device(
        "logits", logits, node_tokens=node_tokens, parents=parents, cu_rows=cu_rows, seed=seed, pos=pos, slot=slot,
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, eos_ids=eos_ids,
    )  # fmt: skip
    check_edits(check, logits, bitmask, bitmask_row, forced_token, bias_ids, bias_val, bias_cu)
    check_laws(check, mode, logits, draft_ids, draft_probs, draft_vocab, uniforms)


def _fake(logits, node_tokens, parents, cu_rows, seed, pos, *, max_depth, **options):
    b, width = cu_rows.shape[0] - 1, max_depth + 1
    return (
        logits.new_empty(b, width, dtype=torch.int32),
        logits.new_empty(b, dtype=torch.int32),
        logits.new_empty(b, width, dtype=torch.int32),
        logits.new_empty(b, width, dtype=torch.float32),
        logits.new_empty(b, dtype=torch.int32),
    )


_dispatch.register(
    "mtp_verify_tree",
    check=_check,
    fake=_fake,
    reference=reference_verify.mtp_verify_tree,
    triton="n3kernels.triton_ops.mtp.verify_tree:mtp_verify_tree",
    supports={"cpu": not_float64, "triton": not_float64, "cuda": not_float64},
)
