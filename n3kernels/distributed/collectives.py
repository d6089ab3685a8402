"""The collectives that expert parallelism needs, on bytes: what they send is counted, how they fail is said."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from .plan import segment_bytes

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["Comm"]


def _named(new: str, old: str):
    """torch 2.13 gave two collectives new names and warns at the old ones."""
    return getattr(dist, new, None) or getattr(dist, old)


class Comm:
    """One process group. All but sums travels as bytes: gloo takes no int16 and no float8. A group of 1 is silent."""

    def __init__(self, group: ProcessGroup | None):
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        # Headers go by the CPU where the group can: the host waits for them anyway.
        on_cpu = "cpu:" in str(dist.get_backend_config(group))
        self.device = torch.device("cpu") if on_cpu else torch.device("cuda", torch.cuda.current_device())
        self.sent = 0  # bytes to other ranks, until someone resets it

    def take_sent(self) -> int:
        """The bytes sent since the last time."""
        sent, self.sent = self.sent, 0
        return sent

    @contextlib.contextmanager
    def _guard(self, purpose: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise RuntimeError(
                f"n3::expert_parallel: rank {self.rank} of {self.size} could not complete the {purpose}: another rank "
                f"ended, raised, or did not make this call within the group's timeout ({error})"
            ) from error

    def _all_gather(self, buffer: Tensor, purpose: str) -> Tensor:
        """``[size, n]`` bytes of the ``[n]`` bytes of each rank."""
        out = buffer.new_empty(self.size, buffer.numel())
        if self.size == 1 or buffer.numel() == 0:
            return out.copy_(buffer[None])
        with self._guard(purpose):
            _named("all_gather_single", "all_gather_into_tensor")(out.view(-1), buffer, group=self.group)
        self.sent += (self.size - 1) * buffer.numel()
        return out

    def gather_numbers(self, numbers: Sequence[int]) -> list[list[int]]:
        """The numbers of every rank, equally many on each."""
        row = torch.tensor(numbers, dtype=torch.int64, device=self.device)
        return self._all_gather(row.view(torch.uint8), "exchange of headers").view(torch.int64).tolist()

    def gather_texts(self, text: str, most: int = 2048) -> list[str]:
        """The text of every rank, cut to ``most`` bytes."""
        row = torch.zeros(most, dtype=torch.uint8)
        data = text.encode()[:most]
        row[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else 0
        rows = self._all_gather(row.to(self.device), "exchange of errors").tolist()
        return [bytes(r).rstrip(b"\0").decode(errors="ignore") for r in rows]

    def gather(self, tensors: Sequence[Tensor], purpose: str) -> list[Tensor]:
        """``[size * n, ...]`` of every ``[n, ...]``, ranks in order; shapes are the same on every rank."""
        if self.size == 1:
            return list(tensors)
        pieces = [_bytes(t).flatten() for t in tensors]
        sizes = [p.numel() for p in pieces]
        if len(pieces) > 1:
            sizes.append(segment_bytes(*((size, 1) for size in sizes)) - sum(sizes))
            pieces.append(pieces[0].new_zeros(sizes[-1]))
        rows = self._all_gather(torch.cat(pieces) if len(pieces) > 1 else pieces[0], purpose).split(sizes, 1)
        return [_typed(piece.contiguous(), t, self.size * t.shape[0]) for piece, t in zip(rows, tensors)]  # noqa: B905

    def exchange(
        self, tensors: Sequence[Tensor], send: Sequence[list[int]], receive: Sequence[list[int]], purpose: str
    ) -> list[Tensor]:
        """Sends the next ``send[i][d]`` rows of ``tensors[i]`` to rank d; returns what comes, source ranks in order."""
        if self.size == 1:
            return list(tensors)
        widths = [t.shape[1:].numel() * t.element_size() for t in tensors]  # bytes of a row
        pieces = [_bytes(t).flatten().split([n * w for n in rows]) for t, w, rows in zip(tensors, widths, send)]  # noqa: B905
        out_sizes = self._sizes(widths, send)
        in_sizes = self._sizes(widths, receive)
        if len(tensors) == 1:
            buffer = _bytes(tensors[0]).flatten()
        else:
            fill = pieces[0][0].new_zeros(16)
            parts = []
            for d, segment in enumerate(zip(*pieces, strict=True)):
                parts += [*segment, fill[: out_sizes[d] - sum(p.numel() for p in segment)]]
            buffer = torch.cat(parts)
        got = buffer.new_empty(sum(in_sizes))
        with self._guard(purpose):
            dist.all_to_all_single(got, buffer, in_sizes, out_sizes, group=self.group)
        self.sent += sum(out_sizes) - out_sizes[self.rank]
        if len(tensors) == 1:
            return [_typed(got, tensors[0], sum(receive[0]))]
        return self._unpack(got, tensors, widths, receive, in_sizes)

    @staticmethod
    def _sizes(widths, counts) -> list[int]:
        return [segment_bytes(*zip(numbers, widths)) for numbers in zip(*counts, strict=True)]  # noqa: B905

    @staticmethod
    def _unpack(got, tensors, widths, receive, in_sizes) -> list[Tensor]:
        sizes = []
        for s, numbers in enumerate(zip(*receive, strict=True)):
            segment = [n * w for n, w in zip(numbers, widths, strict=True)]
            sizes += [*segment, in_sizes[s] - sum(segment)]
        pieces, step = got.split(sizes), len(tensors) + 1
        return [_typed(torch.cat(pieces[i::step]), t, sum(receive[i])) for i, t in enumerate(tensors)]

    def reduce_scatter(self, t: Tensor, purpose: str) -> Tensor:
        """Rows ``[size * n, l]`` -> the sum over ranks of this rank's ``[n, l]``, in an order that is not promised."""
        if self.size == 1:
            return t
        out = t.new_empty(t.shape[0] // self.size, *t.shape[1:])
        if t.numel() == 0:
            return out
        with self._guard(purpose):
            _named("reduce_scatter_single", "reduce_scatter_tensor")(out, t.contiguous(), group=self.group)
        self.sent += (t.numel() - out.numel()) * t.element_size()
        return out


def _bytes(t: Tensor) -> Tensor:
    return t.contiguous().view(-1).view(torch.uint8)


def _typed(data: Tensor, like: Tensor, rows: int) -> Tensor:
    return data.view(-1).view(like.dtype).view(rows, *like.shape[1:])
