"""What the kernels of this family leave to the reference."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["columns_are_tokens", "not_float64"]


def not_float64(logits: Tensor, *args: object, draft_logits: Tensor | None = None, **kwargs: object) -> str | None:
    """The kernels compare logits in float32; what tests compare in float64 has the reference."""
    if logits.dtype == torch.float64 or (draft_logits is not None and draft_logits.dtype == torch.float64):
        return "float64 is served by the reference"
    return None


def columns_are_tokens(
    logits: Tensor, *args: object, draft_logits: Tensor | None = None, draft_vocab: object = None, **kwargs: object
) -> str | None:
    """The CUDA kernels of mtp_verify read a drafter's logits beside the target's, tile by tile."""
    if draft_logits is not None and draft_vocab is not None:
        return "dense laws over a smaller vocabulary (draft_logits with draft_vocab) are served by the reference"
    return not_float64(logits, draft_logits=draft_logits)
