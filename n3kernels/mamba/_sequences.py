"""Checks shared by the operators on batched or packed sequences with states by slot."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import Check

__all__ = ["check_accepted_slots", "check_checkpoints", "check_indices", "check_slots", "count_sequences"]


def count_sequences(check: Check, x: Tensor, cu_seqlens: Tensor | None, dim: int, name: str = "x") -> int:
    """Sequences in ``x``: its batch (``dim`` dimensions), or one less than the ends when it is packed."""
    if cu_seqlens is None:
        check.that(x.dim() == dim, f"{name} must have {dim} dimensions without cu_seqlens", x.dim())
        return x.shape[0]
    check.that(x.dim() == dim - 1, f"{name} must have {dim - 1} dimensions with cu_seqlens", x.dim())
    check.dim("cu_seqlens", cu_seqlens, 1)
    check.dtype("cu_seqlens", cu_seqlens, torch.int32)
    check.that(cu_seqlens.shape[0] >= 1, "cu_seqlens must have at least 1 element", 0)
    return cu_seqlens.shape[0] - 1


def check_slots(check: Check, state_indices: Tensor, has_initial: Tensor | None, sequences: int) -> None:
    check.shape("state_indices", state_indices, (sequences,))
    check.dtype("state_indices", state_indices, torch.int32, torch.int64)
    if has_initial is not None:
        check.shape("has_initial", has_initial, (sequences,))
        check.dtype("has_initial", has_initial, torch.bool)


def check_checkpoints(check: Check, tokens: Tensor | None, indices: Tensor | None) -> None:
    """The tokens after which a prefill also keeps its state, and the slots where: both or neither."""
    if tokens is None and indices is None:
        return
    check.that(tokens is not None, "checkpoint_tokens must be given with checkpoint_indices", "None")
    check.that(indices is not None, "checkpoint_indices must be given with checkpoint_tokens", "None")
    check.dim("checkpoint_tokens", tokens, 1)
    check.dtype("checkpoint_tokens", tokens, torch.int32)
    check.shape("checkpoint_indices", indices, tokens.shape)
    check.dtype("checkpoint_indices", indices, torch.int32, torch.int64)


def check_indices(
    check: Check, batch: int, tokens: int, state: str, slots: int, source: Tensor | None, destination: Tensor | None,
    num_accepted: Tensor | None = None, num_tokens: Tensor | None = None, parents: Tensor | None = None,
) -> None:  # fmt: skip
    """The slots of an update, where each sequence's state is read and where it is written, and its counts."""
    if source is None:
        check.that(slots >= batch, f"{state} must have at least {batch} slots without state_indices", slots)
    elif num_accepted is not None and source.dim() == 2:
        check.shape("state_indices", source, (batch, source.shape[1]))
        check.dtype("state_indices", source, torch.int32, torch.int64)
    else:
        check_slots(check, source, None, batch)
    if destination is not None:
        check.dim("dst_state_indices", destination, 1, 2)
        check.shape("dst_state_indices", destination, (batch, tokens)[: destination.dim()])
        check.dtype("dst_state_indices", destination, torch.int32, torch.int64)
    for name, counts in (("num_accepted", num_accepted), ("num_tokens", num_tokens)):
        if counts is not None:
            check.shape(name, counts, (batch,))
            check.dtype(name, counts, torch.int32)
    if parents is not None:
        check.shape("parents", parents, (batch, tokens))
        check.dtype("parents", parents, torch.int32)
        check.that(destination is not None, "dst_state_indices must be given with parents", "None")
        check.that(destination.dim() == 2, "dst_state_indices must have 2 dimensions with parents", destination.dim())


def check_accepted_slots(check: Check, source: Tensor | None, num_accepted: Tensor | None) -> None:
    """An SSM state cannot be rolled back: to go on from the last accepted token there is a slot for each."""
    if num_accepted is not None:
        check.that(source is not None, "state_indices must be given with num_accepted", "None")
        check.that(source.dim() == 2, "state_indices must have 2 dimensions with num_accepted", source.dim())
