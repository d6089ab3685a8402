"""What the kernels of this family leave to the reference."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["not_float64", "one_hot_and_sparse_laws"]


def not_float64(logits: Tensor, *args: object, draft_logits: Tensor | None = None, **kwargs: object) -> str | None:
    """The kernels compare logits in float32; what tests compare in float64 has the reference."""
    if logits.dtype == torch.float64 or (draft_logits is not None and draft_logits.dtype == torch.float64):
        return "float64 is served by the reference"
    return None


def one_hot_and_sparse_laws(
    logits: Tensor, *args: object, mode: str = "greedy", draft_logits: Tensor | None = None, **kwargs: object
) -> str | None:
    """The Triton kernels of mtp_verify gather a law's tokens, of which a dense law has too many."""
    if mode in ("relaxed", "typical"):
        return f"mode {mode} is served by the reference"
    if draft_logits is not None:
        return "dense laws (draft_logits) are served by the reference"
    return not_float64(logits)
