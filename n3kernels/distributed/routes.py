"""How rows get from the ranks of their tokens to the ranks of the experts, and back.

A route carries one call: ``dispatch`` and ``collect`` forward, and backward their adjoints: ``spread`` is that of
``collect``, ``collect_grads`` that of ``dispatch``. Rows in flight are grouped by source rank, in the order of tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .collectives import Comm
from .plan import id_dtype

__all__ = ["AllToAll", "Gather", "Padded"]


class Route:
    token: Tensor  # of each row sent, rows grouped by destination; the number of tokens for padding
    send: list[int]  # rows to each rank
    receive: list[int]  # rows from each rank

    def __init__(self, comm: Comm, ids: Tensor, num_experts: int):
        self.comm, self.ids = comm, id_dtype(num_experts)
        self.tokens, self.k = ids.shape

    def know_slots(self, owner: Tensor, slots: list[list[int]]) -> None:
        """Who holds the expert of each slot, and how many slots of each source are on each destination."""
        rank = self.comm.rank
        self.owner, self.slots_out, self.slots_in = owner, slots[rank], [row[rank] for row in slots]

    def collect(self, rows: Tensor, fast: bool = False) -> Tensor:
        """Sums the rows that the experts' ranks return for each token, in float32, source ranks ascending."""
        (rows,) = self.comm.exchange([rows], [self.receive], [self.send], "return of results")
        return self._ordered_sum(rows)

    def collect_grads(self, dx: Tensor, dweights: Tensor) -> tuple[Tensor, Tensor]:
        counts = [self.receive] * 2, [self.send] * 2
        dx, dweights = self.comm.exchange([dx, dweights], *counts, "return of gradients")
        return self._ordered_sum(dx), self._ordered_sum(dweights)

    def collect_slots(self, rows: Tensor, weights: Tensor) -> Tensor:
        """``sum_j weights[t, j] * row of slot (t, j)``, j ascending: rows, one for each slot, are in float32."""
        (rows,) = self.comm.exchange([rows], [self.slots_in], [self.slots_out], "return of results")
        order = self._slots_by_rank()
        place = torch.full((self.tokens * self.k,), len(rows), device=rows.device)
        place[order] = torch.arange(len(rows), device=rows.device)
        place = place.view(self.tokens, self.k)
        rows = torch.cat((rows, rows.new_zeros(1, rows.shape[1])))
        gains = weights.to(rows.dtype).masked_fill(self.owner == self.comm.size, 0)
        y = rows.new_zeros(self.tokens, rows.shape[1])
        for j in range(self.k):  # as the definition of moe_experts sums
            y = y + gains[:, j, None] * rows[place[:, j]]
        return y

    def _slots_by_rank(self) -> Tensor:
        """The slots ``t * k + j`` that some rank holds, grouped by rank."""
        order = self.owner.flatten().sort(stable=True).indices
        return order[: sum(self.slots_out)]

    def _ordered_sum(self, rows: Tensor) -> Tensor:
        wide = torch.promote_types(rows.dtype, torch.float32)
        y = torch.zeros(self.tokens + 1, rows.shape[1], dtype=wide, device=rows.device)
        for token, part in zip(self.token.split(self.send), rows.split(self.send), strict=True):
            # A token comes once from a rank: no two rows meet but those of padding, whose sum nobody reads.
            y.index_copy_(0, token, y.index_select(0, token) + part)
        return y[: self.tokens].to(rows.dtype)


class Gather(Route):
    """Every rank gets all tokens, filled up to ``n`` on each rank; shapes do not depend on the ids."""

    def __init__(self, comm: Comm, ids: Tensor, num_experts: int, n: int):
        super().__init__(comm, ids, num_experts)
        self.n, self.send = n, [n] * comm.size
        self.receive = self.send
        self.rows_sent = (comm.size - 1) * n

    def dispatch(self, z: Tensor, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        sections = [self._fill(z, 0), self._fill(weights, 0), self._fill(ids.to(self.ids), -1)]
        x, weights, ids = self.comm.gather(sections, "dispatch")
        return x, ids.int(), weights

    def spread(self, rows: Tensor) -> Tensor:
        return self.comm.gather([self._fill(rows, 0)], "dispatch of gradients")[0]

    def collect(self, rows: Tensor, fast: bool = False) -> Tensor:
        if not fast:
            return super().collect(rows)
        wide = torch.promote_types(rows.dtype, torch.float32)
        return self.comm.reduce_scatter(rows.to(wide), "return of results")[: self.tokens].to(rows.dtype)

    def _fill(self, t: Tensor, value: int) -> Tensor:
        missing = self.n - t.shape[0]
        return torch.cat((t, t.new_full((missing, *t.shape[1:]), value))) if missing else t.contiguous()

    def _ordered_sum(self, rows: Tensor) -> Tensor:
        wide = torch.promote_types(rows.dtype, torch.float32)
        y = torch.zeros(self.tokens, rows.shape[1], dtype=wide, device=rows.device)
        for part in rows.view(self.comm.size, self.n, rows.shape[1]).unbind(0):
            y += part[: self.tokens]
        return y.to(rows.dtype)


class AllToAll(Route):
    """A token's row goes once to each rank that holds one of its experts, with those ids and weights alone."""

    def __init__(self, comm: Comm, ids: Tensor, num_experts: int, counts: Tensor, rows: list[list[int]]):
        super().__init__(comm, ids, num_experts)
        self.send, self.receive = rows[comm.rank], [row[comm.rank] for row in rows]
        self.rows_sent = sum(self.send) - self.send[comm.rank]
        by_rank = counts.t()
        self.token = (by_rank > 0).nonzero()[:, 1]
        self.counts = by_rank[by_rank > 0]  # slots of each row sent

    def know_slots(self, owner: Tensor, slots: list[list[int]]) -> None:
        super().know_slots(owner, slots)
        self.order = self._slots_by_rank()

    def dispatch(self, z: Tensor, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        small = torch.uint8 if self.k < 256 else torch.int32
        of_slot = (t.flatten()[self.order] for t in (weights, ids.to(self.ids)))
        sections = [z[self.token], *of_slot, self.counts.to(small)]
        send = [self.send, self.slots_out, self.slots_out, self.send]
        receive = [self.receive, self.slots_in, self.slots_in, self.receive]
        x, w, e, counts = self.comm.exchange(sections, send, receive, "dispatch")
        # Slots of a row to its first columns, in their order; -1 behind them.
        counts = counts.long()
        row = torch.repeat_interleave(torch.arange(len(x), device=x.device), counts, output_size=len(e))
        first = counts.cumsum(0) - counts
        self.places = row * self.k + torch.arange(len(e), device=x.device) - first[row]
        ids = torch.full((len(x) * self.k,), -1, dtype=torch.int32, device=x.device)
        ids[self.places] = e.int()
        weights = w.new_zeros(len(x) * self.k)
        weights[self.places] = w
        return x, ids.view(-1, self.k), weights.view(-1, self.k)

    def spread(self, rows: Tensor) -> Tensor:
        return self.comm.exchange([rows[self.token]], [self.send], [self.receive], "dispatch of gradients")[0]

    def collect_grads(self, dx: Tensor, dweights: Tensor) -> tuple[Tensor, Tensor]:
        sections = [dx, dweights.flatten()[self.places]]
        counts = [self.receive, self.slots_in], [self.send, self.slots_out]
        dx, of_slot = self.comm.exchange(sections, *counts, "return of gradients")
        dweights = of_slot.new_zeros(self.tokens * self.k)
        dweights[self.order] = of_slot
        return self._ordered_sum(dx), dweights.view(self.tokens, self.k)


class Padded(Route):
    """As `AllToAll`, with room for ``capacity`` rows between any two ranks: static shapes, nothing read on the host."""

    def __init__(self, comm: Comm, ids: Tensor, num_experts: int, counts: Tensor, capacity: int):
        super().__init__(comm, ids, num_experts)
        self.send = self.receive = [capacity] * comm.size
        self.rows_sent = (comm.size - 1) * capacity
        hit = counts > 0
        position = hit.long().cumsum(0) - 1  # among the rows for the same rank
        fits = hit & (position < capacity)
        room = comm.size * capacity
        start = capacity * torch.arange(comm.size, device=ids.device)
        place = torch.where(fits, start + position, room)
        of_place = torch.full((room + 1,), self.tokens, device=ids.device)
        token = torch.arange(self.tokens, device=ids.device)[:, None].expand_as(place)
        of_place[place.flatten()] = token.flatten()  # those without a place meet in the last one, which is cut off
        self.token = of_place[:room]
        self.lost = (hit & ~fits).any(1)

    def dispatch(self, z: Tensor, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        sections = [self._pick(z, 0), self._pick(weights, 0), self._pick(ids.to(self.ids), -1)]
        x, weights, ids = self.comm.exchange(sections, [self.send] * 3, [self.receive] * 3, "dispatch")
        return x, ids.int(), weights

    def spread(self, rows: Tensor) -> Tensor:
        return self.comm.exchange([self._pick(rows, 0)], [self.send], [self.receive], "dispatch of gradients")[0]

    def collect(self, rows: Tensor, fast: bool = False) -> Tensor:
        return super().collect(rows).masked_fill(self.lost[:, None], float("nan"))  # never a sum with parts missing

    def _pick(self, t: Tensor, value: int) -> Tensor:
        """The rows of ``t`` to send; those of padding hold ``value``."""
        return torch.cat((t, t.new_full((1, *t.shape[1:]), value)))[self.token]
