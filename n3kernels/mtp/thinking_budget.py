from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .. import _dispatch
from .._checks import Check
from . import reference
from .verify import check_rows

__all__ = ["ThinkingBudget", "thinking_budget"]


def thinking_budget(
    draft_tokens: Tensor, cu_rows: Tensor, committed_tail: Tensor, num_output: Tensor, active: Tensor, budget: Tensor,
    grace: Tensor, end_ids: Tensor, end_think_ids: Tensor, newline_bitmask: Tensor,
) -> Tensor:  # fmt: skip
    r"""Returns the token that each row must emit to end its thinking, ``end_ids[overlap]``, or -1 where it is free.

    Row i of a request is judged on its output so far plus its drafts ``d_1 .. d_i``, of length ``m``. Thinking is done
    for good when that ends with an end-of-thinking string. Else forcing begins when ``m >= budget + grace``, or when
    ``m >= budget`` and the last token is a newline, and goes on until ``end_ids`` is complete, then thinking is done.
    Overlap is the length of the longest suffix of the output that is a prefix of ``end_ids``. The result is the
    ``forced_token`` of `sample` and `verify`.

    Args:
        draft_tokens: ``[N]``, int32, as in `verify`; rows after the first negative draft of a request are free.
        cu_rows: ``[B + 1]``, int32, as in `verify`.
        committed_tail: ``[B, L]``, int32, the last committed tokens, right-aligned; what lies before the first output
            token is not looked at. L must reach the longest end string.
        num_output: ``[B]``, int32, output tokens committed so far.
        active: ``[B]``, int32: not 0 while the request thinks, that is, its prompt ended with the mark that opens
            thinking and thinking is not done after any committed token. `ThinkingBudget` keeps it.
        budget: ``[B]``, int32, output tokens before thinking is ended; negative: no limit.
        grace: ``[B]``, int32, further tokens in which to wait for a newline; negative counts as 0.
        end_ids: ``[B, E]`` or ``[E]``, int32, the string to force, padded with -1; an empty one forces nothing.
        end_think_ids: ``[E2]`` or ``[S, E2]``, int32, the string, or S strings, that end thinking, padded with -1.
        newline_bitmask: ``[W]``, int32, bit j of word i: token 32 i + j counts as a newline.
    Returns:
        ``[N]``, int32, contiguous; -1 also in rows of no request. Exact; independent of the batch.
    Raises:
        RuntimeError: a shape, dtype or device outside the above; the message names argument and values.
    Source: the thinking budget of the released Nemotron 3 models (NVIDIA-NeMo/Nemotron,
    ``nano_v3_logit_processors.py``), which leaves a negative budget, a negative grace and drafts open.

    >>> i32 = lambda *values: torch.tensor(values, dtype=torch.int32)
    >>> state = dict(committed_tail=i32([7, 8]), num_output=i32(2), active=i32(1), budget=i32(3), grace=i32(0))
    >>> strings = dict(end_ids=i32(1338, 13), end_think_ids=i32(13), newline_bitmask=i32())
    >>> thinking_budget(i32(9, 1338, 13, -1), i32(0, 4), **state, **strings)
    tensor([  -1, 1338,   13,   -1], dtype=torch.int32)
    """
    return torch.ops.n3.thinking_budget.default(
        draft_tokens, cu_rows, committed_tail, num_output, active, budget, grace, end_ids, end_think_ids,
        newline_bitmask,
    )  # fmt: skip


class ThinkingBudget:
    """The thinking state of a batch of requests over a decode loop, for `thinking_budget`.

    The state is a function of the committed tokens alone: ``forced`` looks ahead over drafts and changes nothing,
    ``advance`` takes what was emitted. Neither waits for the device.

    Args:
        prompts: the prompt of each request, token ids; a request thinks if its prompt ends with ``prompt_think_ids``.
        budget, grace: tokens, as in `thinking_budget`; one number or one per request.
        end_ids: the string to force. end_think_ids: the strings that end thinking.
        prompt_think_ids: the end of a prompt that opens thinking.
        newline_ids: the tokens that count as a newline.
        device: where the state lives.

    >>> thinking = ThinkingBudget([[5, 12, 1010]], budget=1)
    >>> rows, one = torch.tensor([0, 1], dtype=torch.int32), torch.tensor([1], dtype=torch.int32)
    >>> for model_says in (40, 41, 42, 43):
    ...     forced = thinking.forced(torch.tensor([-1], dtype=torch.int32), rows)
    ...     token = torch.where(forced < 0, model_says, forced)
    ...     thinking.advance(token[None], one)
    ...     print(token.item())
    40
    1338
    13
    43
    """

    def __init__(
        self, prompts: Sequence[Sequence[int]], budget: int | Sequence[int], grace: int | Sequence[int] = 0, *,
        end_ids: Sequence[int] = (1338, 13), end_think_ids: Sequence[Sequence[int]] = ((13,),),
        prompt_think_ids: Sequence[int] = (12, 1010), newline_ids: Iterable[int] = (1010, 1338),
        device: torch.device | str = "cpu",
    ):  # fmt: skip
        b = len(prompts)

        def ints(values) -> Tensor:
            return torch.tensor(values, dtype=torch.int32, device=device)

        think, reach = list(prompt_think_ids), max([1, len(end_ids), *(len(s) for s in end_think_ids)])
        self.active = ints([len(p) >= len(think) and list(p[len(p) - len(think) :]) == think for p in prompts])
        self.budget = ints([budget] * b if isinstance(budget, int) else budget)
        self.grace = ints([grace] * b if isinstance(grace, int) else grace)
        self.end_ids = ints(list(end_ids))
        self.end_think_ids = ints([[*s, *[-1] * (reach - len(s))] for s in end_think_ids]).view(-1, reach)
        self.newline_bitmask = pack_bits(newline_ids).to(device)
        self.committed_tail = ints([[-1] * reach] * b).view(b, reach)
        self.num_output = ints([0] * b)

    def forced(self, draft_tokens: Tensor, cu_rows: Tensor) -> Tensor:
        """``forced_token`` for `sample` (with ``draft_tokens`` all -1) and `verify`."""
        return thinking_budget(
            draft_tokens, cu_rows, self.committed_tail, self.num_output, self.active, self.budget, self.grace,
            self.end_ids, self.end_think_ids, self.newline_bitmask,
        )  # fmt: skip

    def suggest(self, drafts: int) -> Tensor:
        """int32 ``[B, drafts]``: where the next token will be forced, the rest of the string to force, then -1: drafts
        that verification accepts for certain. Their law is certain too, ``q(d) = 1``."""
        rules, tail, n = self._rules(), self.committed_tail, self.num_output
        _, _, wanted = rules.step(tail, n, self.active != 0, rules.begun(tail, n))
        ahead = torch.arange(drafts, device=tail.device)
        at = reference.overlap(tail, n, rules.end_ids)[:, None] + ahead
        padded = torch.nn.functional.pad(rules.end_ids, (0, 1), value=-1)
        rest = padded.gather(1, at.clamp(max=padded.shape[1] - 1))
        return torch.where((wanted >= 0)[:, None], rest, -1).to(torch.int32)

    def _rules(self) -> reference.ThinkingRules:
        return reference.ThinkingRules.make(
            self.budget, self.grace, self.end_ids, self.end_think_ids, self.newline_bitmask
        )

    def advance(self, tokens: Tensor, num_emitted: Tensor) -> None:
        """Commits ``tokens[b, : num_emitted[b]]`` to every request b: `verify`'s first two results."""
        rules = self._rules()
        tail, n, thinking = self.committed_tail, self.num_output, self.active != 0
        forcing = rules.begun(tail, n)
        for i in range(tokens.shape[1]):
            # A string that is complete before the first output token ends thinking there: step, then shift.
            step = rules.step(tail, n, thinking, forcing)
            emits = i < num_emitted
            thinking, forcing = torch.where(emits, step[0], thinking), torch.where(emits, step[1], forcing)
            shifted = torch.cat([tail[:, 1:], tokens[:, i : i + 1].to(torch.int32)], 1)
            tail, n = torch.where(emits[:, None], shifted, tail), n + emits.to(n.dtype)
        thinking, _, _ = rules.step(tail, n, thinking, forcing)
        self.committed_tail, self.num_output, self.active = tail, n, thinking.to(torch.int32)


def pack_bits(ids: Iterable[int]) -> Tensor:
    """int32 bitmask with the bits of ``ids`` set, as long as the largest id needs."""
    words: dict[int, int] = {}
    for i in ids:
        words[i >> 5] = words.get(i >> 5, 0) | 1 << (i & 31)
    values = [words.get(i, 0) for i in range(max(words, default=-1) + 1)]
    return torch.tensor([w - (w >> 31 << 32) for w in values], dtype=torch.int32)


def _check(
    draft_tokens, cu_rows, committed_tail, num_output, active, budget, grace, end_ids, end_think_ids, newline_bitmask
):
    check = Check("thinking_budget")
    check_rows(check, draft_tokens, None, cu_rows)
    b = cu_rows.shape[0] - 1
    by_request = {"num_output": num_output, "active": active, "budget": budget, "grace": grace}
    strings = {"end_ids": end_ids, "end_think_ids": end_think_ids}
    check.dtype("committed_tail", committed_tail, torch.int32)
    check.dim("committed_tail", committed_tail, 2)
    check.shape("committed_tail", committed_tail, (b, committed_tail.shape[1]))
    for name, t in by_request.items():
        check.dtype(name, t, torch.int32)
        check.shape(name, t, (b,))
    for name, t in strings.items():
        check.dtype(name, t, torch.int32)
        check.dim(name, t, 1, 2)
    if end_ids.dim() == 2:
        check.shape("end_ids", end_ids, (b, end_ids.shape[1]))
    check.dtype("newline_bitmask", newline_bitmask, torch.int32)
    check.dim("newline_bitmask", newline_bitmask, 1)
    longest = max(end_ids.shape[-1], end_think_ids.shape[-1], 1)
    check.that(
        committed_tail.shape[1] >= longest,
        f"committed_tail must have at least {longest} columns, the length of the longest end string",
        committed_tail.shape[1],
    )
    check.same_device(
        "draft_tokens", draft_tokens, cu_rows=cu_rows, committed_tail=committed_tail, **by_request, **strings,
        newline_bitmask=newline_bitmask,
    )  # fmt: skip


def _fake(draft_tokens, *rest):
    return draft_tokens.new_empty(draft_tokens.shape[0], dtype=torch.int32)


_dispatch.register(
    "thinking_budget",
    check=_check,
    fake=_fake,
    reference=reference.thinking_budget,
    triton="n3kernels.triton_ops.mtp.thinking_budget:thinking_budget",
)
