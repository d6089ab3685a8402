"""The definition of `n3::mtp_commit`: what an engine does with the counts of a verification, on the device."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["mtp_commit"]


def mtp_commit(
    tokens: Tensor, num_emitted: Tensor, cu_rows: Tensor, seq_len: Tensor, *, slot: Tensor | None = None,
    eos_ids: Tensor | None = None, max_len: Tensor | None = None, finished: Tensor | None = None,
    histogram: Tensor | None = None, ring_pos: Tensor | None = None, ring_size: int = 0, ring_tokens: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    b, width = tokens.shape
    device, slots = tokens.device, seq_len.shape[0]
    index = torch.arange(b, device=device) if slot is None else slot.long()
    live = (index >= 0) & (index < slots) & (num_emitted > 0)
    a = torch.where(live, num_emitted.clamp(max=width), 0)
    at, n = index.clamp(0, max(slots - 1, 0)), a.long()
    last = tokens.gather(1, (n - 1).clamp(min=0)[:, None])[:, 0] if width else torch.full_like(a, -1)
    first, end = cu_rows[:-1], cu_rows[1:]
    kv_start = torch.where(live, seq_len[at] if slots else 0, 0)
    length = kv_start + a
    if max_len is not None and slots:
        length = torch.minimum(length, max_len[at])
    inside = torch.arange(width, device=device) < n[:, None]
    seq_len[at[live]] = length[live].to(torch.int32)
    if finished is not None:
        stops = torch.zeros_like(live)
        if eos_ids is not None:
            stops = (torch.isin(tokens, eos_ids) & inside).any(1)
        full = length >= max_len[at] if max_len is not None and slots else torch.zeros_like(live)
        finished[at[live]] |= (stops.int() | full.int() << 1)[live]
    if histogram is not None:
        bins = n[live].clamp(max=len(histogram) - 1)
        histogram.index_add_(0, bins, torch.ones_like(bins))
    if ring_pos is not None:
        start, count = ring_pos[at[live]].unbind(1)
        folds = count + 2 * ring_tokens > ring_size
        start = torch.where(folds, (start + count) % max(ring_size, 1), start)
        ring_pos[at[live]] = torch.stack([start, torch.where(folds, 0, count) + a[live]], 1).to(torch.int32)
    cu_emitted = torch.cat([a.new_zeros(1), a.cumsum(0, dtype=torch.int32)])
    flat = tokens.new_full((b * width,), -1)
    places = cu_emitted[:-1, None] + torch.arange(width, device=device)
    flat[places[inside]] = tokens[inside]
    return (
        a.to(torch.int32), torch.where(live, last, -1).to(torch.int32),
        torch.where(live, first + a - 1, -1).to(torch.int32), kv_start.to(torch.int32),
        torch.where(live, end - first - a, 0).to(torch.int32), flat, cu_emitted.to(torch.int32),
    )  # fmt: skip
