"""What the launchers of the mamba family share on the host."""

from __future__ import annotations

from torch import Tensor

__all__ = ["dense", "row_length", "strides_of"]


def strides_of(t: Tensor | None, dims: int) -> tuple[int, ...]:
    """Strides as a kernel takes them; of an absent operand as many ones, which the kernel does not use."""
    return (1,) * dims if t is None else t.stride()


def dense(t: Tensor | None) -> Tensor | None:
    """Indices and counts side by side, as kernels read them; they are so already unless the caller slices a table."""
    return t if t is None else t.contiguous()


def row_length(t: Tensor | None) -> int:
    """Elements from one sequence to the next in dense indices ``[B]`` or ``[B, K]``."""
    return 1 if t is None or t.dim() == 1 else t.shape[1]
