"""Which rank holds an expert, which rows travel, and how many bytes that is. No process group is needed here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .._checks import Check

__all__ = ["Traffic", "plan_traffic"]

MODES = ("gather", "all_to_all")
COMBINES = ("ordered", "fast", "exact")
GATHER_RANKS = 8  # "auto": with top-22 of 512 a token's experts sit on 7.6 of 8 ranks, so a gather sends 5 % more rows
ALIGNMENT = 16  # bytes; what goes to one rank is a whole number of these, so that rows of the next rank stay aligned


@dataclass
class Traffic:
    """Bytes that one rank sent to others in one call; what stays on the rank is not counted.

    >>> Traffic(tokens=4, rows=6, dispatched=1200, combined=800).dispatched_per_token
    300.0
    """

    tokens: int  # of this rank
    rows: int = 0  # token rows to other ranks, padding included
    dispatched: int = 0  # token rows, ids and weights to the experts
    combined: int = 0  # results back to the tokens' ranks
    control: int = 0  # headers and counts
    backward: int = 0  # all of the backward pass

    @property
    def dispatched_per_token(self) -> float:
        return self.dispatched / max(self.tokens, 1)

    @property
    def combined_per_token(self) -> float:
        return self.combined / max(self.tokens, 1)


def resolve_mode(check: Check, mode: str, combine: str, capacity: int | None, world_size: int) -> str:
    """The mode that ``mode`` stands for, once it is known to go with the other options."""
    check.choice("mode", mode, ("auto", *MODES))
    check.choice("combine", combine, COMBINES)
    check.that(capacity is None or capacity >= 1, "capacity must be at least 1", capacity)
    check.that(capacity is None or combine != "exact", "capacity must be None with combine exact", capacity)
    if mode == "auto":
        return "gather" if world_size <= GATHER_RANKS or combine == "fast" else "all_to_all"
    check.that(mode == "gather" or combine != "fast", "mode must be gather with combine fast", mode)
    return mode


def bounds_of(check: Check, num_experts: int, world_size: int, splits: Sequence[int] | None) -> tuple[int, ...]:
    """Rank r holds the experts ``bounds[r] .. bounds[r + 1] - 1``; without ``splits`` the first ranks have one more."""
    if splits is None:
        each, more = divmod(num_experts, world_size)
        splits = [each + (r < more) for r in range(world_size)]
    check.that(len(splits) == world_size, f"splits must have one number for each of {world_size} ranks", len(splits))
    check.that(min(splits) >= 0, "splits must not be negative", min(splits))
    check.that(sum(splits) == num_experts, f"splits must add up to the {num_experts} experts", sum(splits))
    bounds = [0]
    for size in splits:
        bounds.append(bounds[-1] + int(size))
    return tuple(bounds)


def owners(ids: Tensor, ends: Tensor) -> Tensor:
    """Int64 ``[T, k]``: the rank that holds the expert of each slot; the number of ranks where nobody does."""
    owner = torch.searchsorted(ends, ids.contiguous(), right=True)
    return torch.where(ids < 0, len(ends), owner)


def tally(owner: Tensor, world_size: int) -> Tensor:
    """Int64 ``[T, world_size]``: how many of a token's slots each rank holds."""
    counts = owner.new_zeros(owner.shape[0], world_size + 1)
    return counts.scatter_add_(1, owner, torch.ones_like(owner))[:, :world_size]


def replicate(ids: Tensor, expert_map: Tensor, z: Tensor) -> Tensor:
    """Physical experts of logical ``ids``: every token takes the replica that a hash of its own row chooses.

    The choice depends on the token alone, not on its place in the batch or on its rank; so a result does not either.
    """
    known = (ids >= 0) & (ids < len(expert_map))
    logical = torch.where(known, ids, 0).long()
    replicas = (expert_map >= 0).sum(1)[logical]
    chosen = expert_map[logical, _token_hash(z)[:, None] % replicas]
    return torch.where(known, chosen, -1)


def _token_hash(z: Tensor) -> Tensor:
    """A number of 31 bits for each row, of the bits of its first elements."""
    words = z.detach()[:, :16].contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[z.element_size()])
    odd = 2 * torch.arange(1, words.shape[1] + 1, device=z.device) + 1
    mixed = (words.long() * (odd * 0x9E3779B97F4A7C1)).sum(1)  # wraps around, on every device alike
    return (mixed ^ (mixed >> 29)) >> 16 & 0x7FFFFFFF


# ---------------------------------------------------------------- bytes


def segment_bytes(*sections: tuple[int, int]) -> int:
    """What one rank gets in one exchange: sections of (number, bytes of each), filled up to the alignment."""
    size = sum(number * each for number, each in sections)
    return -(-size // ALIGNMENT) * ALIGNMENT if len(sections) > 1 else size


def id_dtype(num_experts: int) -> torch.dtype:
    return torch.int16 if num_experts < 2**15 else torch.int32  # of -1 .. num_experts


def plan_traffic(
    ids: Sequence[Tensor],
    num_experts: int,
    width: int,
    dtype: torch.dtype = torch.bfloat16,
    *,
    splits: Sequence[int] | None = None,
    mode: str = "auto",
    combine: str = "ordered",
    capacity: int | None = None,
) -> list[Traffic]:
    """Returns what an `ExpertParallel` call sends, of the ids alone: rows of ``width`` elements, and 6 bytes per slot.

    Args:
        ids: for every rank the ``[T, k]`` int32 (physical) experts of its tokens.
        num_experts: number of (physical) experts.
        width: l, of the rows that travel.
        dtype: of the rows.
        splits, mode, combine, capacity: see `ExpertParallel`.
    Returns:
        One `Traffic` for every rank: ``dispatched`` and ``combined`` are exactly those of the call; ``control`` and
        ``backward`` are 0.
    Raises:
        RuntimeError: an option outside the above; the message names argument and values.
    Source: the count of (token, rank) pairs, as DeepEP's dispatch layout has it.

    >>> both = torch.tensor([[0, 1, 7]], dtype=torch.int32)  # experts of ranks 0, 0 and 1
    >>> [t.rows for t in plan_traffic([both, both], 8, 1024, mode="all_to_all")]
    [1, 1]
    """
    check, world_size = Check("expert_parallel"), len(ids)
    mode = resolve_mode(check, mode, combine, capacity, world_size)
    ends = torch.tensor(bounds_of(check, num_experts, world_size, splits)[1:])
    counts = [tally(owners(t.cpu(), ends), world_size) for t in ids]
    rows = [(c > 0).sum(0).tolist() for c in counts]  # [source][destination]
    slots = [c.sum(0).tolist() for c in counts]
    wide = max(dtype.itemsize, 4)
    k, row, of_id = ids[0].shape[1], width * dtype.itemsize, id_dtype(num_experts).itemsize
    if mode == "gather" or capacity is not None:
        n = capacity or max(t.shape[0] for t in ids)
        rows = [[n] * world_size] * world_size

    def to(source: int, destination: int) -> int:
        n, s = rows[source][destination], slots[source][destination]
        if mode == "gather" or capacity is not None:
            return segment_bytes((n, row), (n * k, wide), (n * k, of_id))
        return segment_bytes((n, row), (s, wide), (s, of_id), (n, 1))

    def back(source: int, destination: int) -> int:  # what destination returns to source
        if combine == "exact":
            return slots[source][destination] * width * wide
        return rows[source][destination] * (width * wide if combine == "fast" else row)

    plans = []
    for r, mine in enumerate(ids):
        others = [o for o in range(world_size) if o != r]
        sent, dispatched = sum(rows[r][o] for o in others), sum(to(r, o) for o in others)
        plans.append(Traffic(mine.shape[0], sent, dispatched, sum(back(o, r) for o in others)))
    return plans
