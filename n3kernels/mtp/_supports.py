"""What the kernels of this family leave to the reference."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["not_float64"]


def not_float64(logits: Tensor, *args: object, draft_logits: Tensor | None = None, **kwargs: object) -> str | None:
    """The kernels compare logits in float32; what tests compare in float64 has the reference."""
    if logits.dtype == torch.float64 or (draft_logits is not None and draft_logits.dtype == torch.float64):
        return "float64 is served by the reference"
    return None
