"""Checks shared by the operators on batched or packed sequences with states by slot."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import Check

__all__ = ["check_indices", "check_slots", "count_sequences"]


def count_sequences(check: Check, x: Tensor, cu_seqlens: Tensor | None, dim: int) -> int:
    """Sequences in ``x``: its batch (``dim`` dimensions), or one less than the ends when it is packed."""
    if cu_seqlens is None:
        check.that(x.dim() == dim, f"x must have {dim} dimensions without cu_seqlens", x.dim())
        return x.shape[0]
    check.that(x.dim() == dim - 1, f"x must have {dim - 1} dimensions with cu_seqlens", x.dim())
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


def check_indices(
    check: Check, x: Tensor, tokens: int, state: str, slots: int, source: Tensor | None, destination: Tensor | None
) -> None:
    """The slots of an update: where each sequence's state is read, and where it is written."""
    batch = x.shape[0]
    if source is None:
        check.that(slots >= batch, f"{state} must have at least {batch} slots without state_indices", slots)
    else:
        check_slots(check, source, None, batch)
    if destination is not None:
        check.dim("dst_state_indices", destination, 1, 2)
        check.shape("dst_state_indices", destination, (batch, tokens)[: destination.dim()])
        check.dtype("dst_state_indices", destination, torch.int32, torch.int64)
