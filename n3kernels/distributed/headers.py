"""What the ranks tell each other before the rows travel: that none has failed, that they agree, how much goes where."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn, TypeVar

import torch

from .._checks import FLOATING, Check
from ..moe import reference
from .collectives import Comm
from .plan import COMBINES, MODES

__all__ = ["DTYPES", "INPUTS", "WEIGHTS", "Header", "Headers"]

_T = TypeVar("_T")
DTYPES = (*FLOATING, torch.float64)
INPUTS, WEIGHTS = 1, 2  # who wants gradients, as bits
# What has to be the same on every rank, as it stands in a header, and how a message shows it: first that of the plan,
# then that of the call.
_AGREED: dict[str, Callable[[int], Any]] = {
    "mode": MODES.__getitem__,
    "combine": COMBINES.__getitem__,
    "capacity": lambda n: n or None,
    "num_experts": int,
    "splits": lambda crc: f"those of digest {crc:08x}",
    "expert_map": lambda crc: f"that of digest {crc:08x}" if crc else None,
    "the last dimension of z": int,
    "the dtype of z": lambda i: str(DTYPES[i]).removeprefix("torch."),
    "the number of columns of ids": int,
    "the inner size of the experts": int,
    "the kind of the experts' weights": ("dense", "NVFP4").__getitem__,
    "activation": reference.ACTIVATIONS.__getitem__,
}


class Header(NamedTuple):
    """What may differ from rank to rank."""

    gradients: bool  # enabled
    wants: int  # gradients, of `INPUTS` and `WEIGHTS`
    tokens: int
    rows: list[int]  # to each rank
    slots: list[int]  # of each rank's experts


class Headers:
    """The headers of the calls of one object, whose part of what has to be the same is ``plan``."""

    def __init__(self, comm: Comm, words: Check, plan: Sequence[int]):
        self._comm, self._words, self._plan = comm, words, plan

    def together(self, work: Callable[[], _T]) -> _T:
        """Does what can fail on this rank alone; if it does, all ranks hear of it in place of this rank's header."""
        try:
            return work()
        except Exception as error:
            length = 1 + len(_AGREED) + 3 + 2 * self._comm.size
            self._raise_together(self._comm.gather_numbers([1] + [0] * (length - 1)), error)

    def exchange(self, call: Sequence[int], mine: Header) -> list[Header]:
        """The headers of all ranks; raises on every rank alike where one has failed, or where they differ."""
        gradients, wants, tokens, rows, slots = mine
        numbers = [0, *self._plan, *call, int(gradients), wants, tokens, *rows, *slots]
        found = self._comm.gather_numbers(numbers)
        if any(failed for failed, *_ in found):
            self._raise_together(found)
        for i, (what, show) in enumerate(_AGREED.items(), 1):
            want = found[0][i]
            for r, header in enumerate(found):
                rule = f"{what} must be {show(want)} as on rank 0"
                self._words.that(header[i] == want, rule, lambda h=header, i=i, s=show, r=r: f"{s(h[i])} on rank {r}")
        n, headers = self._comm.size, []
        for gradients, wants, tokens, *counts in (header[1 + len(_AGREED) :] for header in found):
            headers.append(Header(bool(gradients), wants, tokens, counts[:n], counts[n:]))
        off = [r for r, header in enumerate(headers) if not header.gradients]
        rule = "gradients must be enabled on every rank or wanted on none"
        wanted = any(header.wants for header in headers)
        self._words.that(not (wanted and off), rule, lambda: f"torch.is_grad_enabled() False on rank {off[0]}")
        return headers

    def _raise_together(self, headers: list[list[int]], error: Exception | None = None) -> NoReturn:
        words = self._comm.gather_texts("" if error is None else str(error).removeprefix("n3::expert_parallel: "))
        failed = (f"rank {r}: {words[r]}" for r, header in enumerate(headers) if header[0])
        raise RuntimeError("n3::expert_parallel: " + "; ".join(failed)) from error
