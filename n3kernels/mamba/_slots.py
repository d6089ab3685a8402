"""States in slots, as the references read and write them, and the values of indices and counts, which they check.

Reading a value of a CUDA tensor waits for the device: the Triton and CUDA kernels do not check them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import Check

__all__ = [
    "check_below",
    "check_distinct",
    "check_ends",
    "check_prefill",
    "check_update",
    "check_values",
    "last_states",
    "load",
    "masked",
    "source_slots",
    "store",
]


def check_below(op: str, name: str, indices: Tensor | None, state: Tensor) -> None:
    if indices is not None and indices.numel() and (largest := int(indices.max())) >= len(state):
        Check(op).fail(f"{name} must be below the number of slots {len(state)}, got {largest}")


def check_distinct(op: str, name: str, slots: Tensor) -> None:
    """Of the slots that are written; negative ones are not."""
    written = slots[slots >= 0].sort().values
    if (twice := written[1:][written.diff() == 0]).numel():
        Check(op).fail(f"{name} must be distinct, got {int(twice[0])} twice")


def check_values(op: str, rule: str, values: Tensor | None, low: int, high: int | None = None) -> None:
    """Raises ``rule`` with the first value that is not in ``low...high``."""
    if values is None:
        return
    wrong = values < low if high is None else (values < low) | (values > high)
    if wrong.any():
        Check(op).fail(f"{rule}, got {int(values[wrong][0])}")


def check_ends(op: str, name: str, tokens: int, cu_seqlens: Tensor | None) -> None:
    if cu_seqlens is None:
        return
    ends = cu_seqlens.tolist()
    if ends[0] != 0 or ends[-1] > tokens or any(a > b for a, b in zip(ends, ends[1:], strict=False)):
        Check(op).fail(f"cu_seqlens must rise from 0 to at most the {tokens} tokens of {name}, got {ends}")


def check_prefill(
    op: str, name: str, tokens: int, state: Tensor, indices: Tensor, cu_seqlens: Tensor | None,
    checkpoint_tokens: Tensor | None, checkpoint_indices: Tensor | None,
) -> None:  # fmt: skip
    """The values of a prefill on slots; ``tokens`` counts those of all sequences, in the argument ``name``."""
    check_ends(op, name, tokens, cu_seqlens)
    check_below(op, "state_indices", indices, state)
    rule = f"checkpoint_tokens must be between 0 and {tokens - 1}"
    check_values(op, rule, checkpoint_tokens, 0, tokens - 1)
    check_below(op, "checkpoint_indices", checkpoint_indices, state)
    check_distinct(op, "state_indices", indices)
    if checkpoint_tokens is None or not len(indices):
        return
    ends = torch.arange(len(indices) + 1, device=indices.device) * (tokens // len(indices))
    owner = torch.searchsorted(ends if cu_seqlens is None else cu_seqlens, checkpoint_tokens, right=True) - 1
    kept = owner < len(indices)
    kept[kept.clone()] = indices[owner[kept]] >= 0
    written = torch.cat([indices.long(), checkpoint_indices[kept].long()])
    check_distinct(op, "state_indices and checkpoint_indices", written)


def check_update(
    op: str, steps: int, state: Tensor, indices: Tensor | None, destination: Tensor | None,
    num_accepted: Tensor | None, num_tokens: Tensor | None, parents: Tensor | None,
) -> None:  # fmt: skip
    """The values of an update of ``steps`` tokens."""
    check_below(op, "state_indices", indices, state)
    check_below(op, "dst_state_indices", destination, state)
    most = steps if indices is None or indices.dim() == 1 else indices.shape[1]
    check_values(op, f"num_accepted must be between 1 and {most}", num_accepted, 1, most)
    check_values(op, f"num_tokens must be between 0 and T={steps}", num_tokens, 0, steps)
    if parents is not None:
        _check_parents(op, steps, indices, num_accepted, num_tokens, parents)
    source = None if indices is None else _read_slots(indices, num_accepted)
    if destination is None:
        if source is not None:
            check_distinct(op, "state_indices", source)
        return
    written = destination if source is None else masked(source, destination)
    if written.dim() == 2 and num_tokens is not None:
        written = written.masked_fill(torch.arange(steps, device=written.device) >= num_tokens[:, None], -1)
    check_distinct(op, "dst_state_indices", written.flatten())


def _check_parents(
    op: str, steps: int, indices: Tensor | None, num_accepted: Tensor | None, num_tokens: Tensor | None,
    parents: Tensor,
) -> None:  # fmt: skip
    padding = torch.zeros_like(parents, dtype=torch.bool)  # whose parents may be anything
    if indices is not None:
        padding |= (_read_slots(indices, num_accepted) < 0)[:, None]
    if num_tokens is not None:
        padding |= torch.arange(steps, device=parents.device) >= num_tokens[:, None]
    for t, column in enumerate(parents.masked_fill(padding, -1).unbind(1)):
        wrong = column[(column < -1) | (column >= t)]
        if len(wrong):
            got = f"{int(wrong[0])} for token {t}"
            Check(op).fail(f"parents must be between -1 and t - 1 for token t, got {got}")


def source_slots(x: Tensor, indices: Tensor | None, num_accepted: Tensor | None = None) -> Tensor:
    """The slot each sequence of ``x`` reads."""
    if indices is None:
        return torch.arange(len(x), device=x.device)
    return _read_slots(indices, num_accepted)


def _read_slots(indices: Tensor, num_accepted: Tensor | None) -> Tensor:
    """With ``[B, K]`` indices the slot of the last accepted token."""
    return indices if indices.dim() == 1 else indices.gather(1, num_accepted.long()[:, None] - 1)[:, 0]


def load(state: Tensor, indices: Tensor, has_initial: Tensor | None = None) -> Tensor:
    """Copies of the slots; zeros for a padding sequence (negative index) and where there is no initial state."""
    read = indices >= 0 if has_initial is None else (indices >= 0) & has_initial
    rows = state.new_zeros(len(indices), *state.shape[1:])
    rows[read.nonzero().flatten()] = state[indices[read].long()]  # one element by a mask: not for float8
    return rows


def store(state: Tensor, indices: Tensor, rows: Tensor) -> None:
    written = indices >= 0
    state[indices[written].long()] = rows[written].to(state.dtype)


def masked(source: Tensor, destination: Tensor | None) -> Tensor:
    """Where a sequence writes: its destination, or back to where it read; nowhere if it is padding."""
    if destination is None:
        return source
    padding = source < 0
    return destination.masked_fill(padding[:, None] if destination.dim() == 2 else padding, -1)


def last_states(states: list[Tensor], count: Tensor) -> Tensor:
    """Of the states after 0, 1, ... tokens, each ``[B, ...]``, the one after ``count[b]`` tokens of sequence b."""
    return torch.stack(states)[count, torch.arange(len(count), device=count.device)]
