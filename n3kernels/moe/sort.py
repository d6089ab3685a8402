from __future__ import annotations

import torch
from torch import Tensor

from .. import _dispatch
from .._checks import Check
from . import reference

__all__ = ["sort"]


def sort(ids: Tensor, num_experts: int, first_expert: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r"""Sorts the slots ``t * k + j`` of a routing by local expert ``ids[t, j] - first_expert``, stably.

    A slot whose expert is not among the local ones, ``first_expert <= id < first_expert + num_experts``, is skipped;
    -1 always is.

    Args:
        ids: ``[T, k]``, int32, as `route` returns them; T * k below 2^31.
        num_experts: number of local experts.
        first_expert: the first of them.
    Returns:
        ``order`` ``[T * k]`` int32: the slots, grouped by expert, in ascending order within each; skipped slots
        last. ``offsets`` ``[num_experts + 1]`` int32: the slots of local expert ``e`` are
        ``order[offsets[e] : offsets[e + 1]]``. ``active`` ``[num_experts]`` int32: the local experts with at least
        one slot, ascending, then -1. ``num_active`` ``[1]`` int32. All exact.
    Raises:
        RuntimeError: a shape, dtype or number outside the above; the message names argument and values.
    Source: counting sort; MegaBlocks (arXiv:2211.15841) sec. 4.

    >>> order, offsets, active, num_active = sort(torch.tensor([[2, 0], [-1, 2]], dtype=torch.int32), 3)
    >>> order.tolist(), offsets.tolist(), active.tolist(), num_active.tolist()
    ([1, 0, 3, 2], [0, 1, 1, 3], [0, 2, -1], [2])
    """
    return torch.ops.n3.moe_sort.default(ids, num_experts, first_expert)


def _check(ids, num_experts, first_expert=0):
    check = Check("moe_sort")
    check.dtype("ids", ids, torch.int32)
    check.dim("ids", ids, 2)
    check.that(ids.shape[1] >= 1, "ids must have at least 1 column", ids.shape[1])
    check.that(ids.numel() < 2**31, "ids must have fewer than 2147483648 elements", ids.numel())
    check.that(num_experts >= 1, "num_experts must be at least 1", num_experts)
    check.that(first_expert >= 0, "first_expert must be at least 0", first_expert)


def _fake(ids, num_experts, first_expert=0):
    return ids.new_empty(ids.numel()), ids.new_empty(num_experts + 1), ids.new_empty(num_experts), ids.new_empty(1)


_dispatch.register(
    "moe_sort",
    check=_check,
    fake=_fake,
    reference=reference.moe_sort,
    triton="n3kernels.triton_ops.moe.sort:moe_sort",
)
