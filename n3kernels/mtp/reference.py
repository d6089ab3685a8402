"""The definition of every mtp operator in plain PyTorch: slow, and obvious on purpose.

A row of logits is edited and cut in the logits' own precision (float32 at least), so that ties are ties on every
backend; probabilities, noise and scalars are float64. Parameters are read on the host once per call, rows are walked
one by one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import _philox

__all__ = [
    "FLAG_EMPTY_MASK",
    "FLAG_NAN",
    "FLAG_NOT_DRAWN",
    "FLAG_NO_SUPPORT",
    "FLAG_OUT_OF_RANGE",
    "MIN_TEMPERATURE",
    "TILE",
    "Rows",
    "inverse_cdf",
    "sample",
    "target_logprobs",
    "thinking_budget",
]

TILE = 4096  # tokens per tile of the hierarchical draw: a public constant, another size gives other tokens
MIN_TEMPERATURE = 1e-5  # in float32; below it, and for NaN, a row is greedy

FLAG_NAN = 1  # an allowed logit is NaN; it counts as -inf
FLAG_EMPTY_MASK = 2  # the row's bitmask allows no token; it is ignored
FLAG_NO_SUPPORT = 4  # every allowed logit is -inf; the lowest allowed token is emitted
FLAG_OUT_OF_RANGE = 8  # a slot, bitmask row, forced token or draft lies past its range; it is ignored
FLAG_NOT_DRAWN = 16  # a draft of probability 0 under its own draft distribution; it is rejected


# ---------------------------------------------------------------- one row


@dataclass
class _Params:
    """Sampling parameters of one slot."""

    seed: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float


class Rows:
    """The rows of one call with their edits, and the parameters of every slot, on the host."""

    def __init__(
        self, logits, seed, temperature, top_k, top_p, min_p,
        bitmask, bitmask_row, forced_token, bias_ids, bias_val, bias_cu,
    ):  # fmt: skip
        n, self.vocab = logits.shape
        slots = seed.shape[0]
        self.logits, self.bitmask, self.bias_ids, self.bias_val = logits, bitmask, bias_ids, bias_val
        self.params = [
            _Params(*p)
            for p in zip(
                seed.tolist(), _host(temperature, slots, 1.0), _host(top_k, slots, 0), _host(top_p, slots, 1.0),
                _host(min_p, slots, 0.0), strict=True,
            )
        ]  # fmt: skip
        self.forced = _host(forced_token, n, -1)
        self.bias_cu = None if bias_cu is None else bias_cu.tolist()
        self.mask_row = [-1] * n if bitmask is None else list(range(n)) if bitmask_row is None else bitmask_row.tolist()

    def emit(self, r: int, slot: int, pos: int, greedy: bool = False) -> tuple[int, float, int]:
        """Token, its log-probability and the flags of row ``r``."""
        params, flags = self.params[slot], 0
        if 0 <= self.forced[r] < self.vocab:
            return self.forced[r], 0.0, 0
        if self.forced[r] >= self.vocab:
            flags = FLAG_OUT_OF_RANGE
        x, allowed, row_flags = self.edit(r)
        flags |= row_flags
        if flags & FLAG_NO_SUPPORT:
            return 0 if allowed is None else int(allowed.int().argmax()), 0.0, flags
        if greedy or is_greedy(params.temperature):
            return int(x.argmax()), 0.0, flags  # argmax: the lowest index of equals
        log_p = _log_probs(x, params)
        token = _draw(log_p, params.seed, pos)
        return token, float(log_p[token]), flags

    def law(self, r: int, slot: int) -> tuple[Tensor, int]:
        """float64 ``[V]``: the log-probabilities of row ``r``, and its flags."""
        x, _, flags = self.edit(r)
        params = self.params[slot]
        forced = 0 <= self.forced[r] < self.vocab
        if not (forced or flags & FLAG_NO_SUPPORT or is_greedy(params.temperature)):
            return _log_probs(x, params), flags | FLAG_OUT_OF_RANGE * (self.forced[r] >= self.vocab)
        log_p = torch.full((self.vocab,), -math.inf, dtype=torch.float64, device=x.device)
        token, _, flags = self.emit(r, slot, 0)
        log_p[token] = 0.0
        return log_p, flags

    def edit(self, r: int) -> tuple[Tensor, Tensor | None, int]:
        """Row ``r`` with bias and mask applied and NaN replaced by -inf; the allowed tokens, None for all; flags."""
        flags = 0
        x = self.logits[r].to(torch.promote_types(self.logits.dtype, torch.float32))
        if self.bias_cu is not None:
            end = len(self.bias_ids)
            lo, hi = (min(max(c, 0), end) for c in self.bias_cu[r : r + 2])
            ids, values = self.bias_ids[lo:hi].long(), self.bias_val[lo:hi].to(x.dtype)
            inside = (ids >= 0) & (ids < self.vocab)
            x = x.clone().index_put_((ids[inside],), values[inside], accumulate=True)
        allowed = None
        if self.mask_row[r] >= 0 and self.mask_row[r] >= self.bitmask.shape[0]:
            flags |= FLAG_OUT_OF_RANGE
        elif self.mask_row[r] >= 0:
            allowed = unpack_bits(self.bitmask[self.mask_row[r]], self.vocab)
            if not allowed.any():
                flags, allowed = flags | FLAG_EMPTY_MASK, None
            else:
                x = x.masked_fill(~allowed, -math.inf)
        nan = x.isnan()
        if nan.any():
            flags, x = flags | FLAG_NAN, x.masked_fill(nan, -math.inf)
        if x.max() == -math.inf:
            flags |= FLAG_NO_SUPPORT
        return x, allowed, flags


def is_greedy(temperature: float) -> bool:
    return not temperature >= torch.tensor(MIN_TEMPERATURE).item()  # both float32; NaN is greedy


def unpack_bits(words: Tensor, vocab: int) -> Tensor:
    """bool ``[vocab]`` of an int32 bitmask: bit j of word i is token 32 i + j; bits past the end are ignored."""
    bits = words[:, None] >> torch.arange(32, dtype=torch.int32, device=words.device) & 1
    return bits.flatten()[:vocab] != 0


def _host(t: Tensor | None, n: int, default) -> list:
    return [default] * n if t is None else t.tolist()


def _log_probs(x: Tensor, params: _Params) -> Tensor:
    """Log-probabilities of the processed row, float64: temperature, then min-p, top-k and top-p as one cut-off."""
    x = x.double()
    best = x.max()
    temperature = min(params.temperature, torch.finfo(torch.float32).max)
    if best == math.inf:  # tokens of +inf share the whole mass
        return torch.where(x == best, -(x == best).sum().double().log(), -math.inf)
    z = (x - best) / temperature
    cut = best.new_tensor(-math.inf)
    if params.min_p > 0:  # p >= min_p * p_max, as a bound on the logit; NaN is off
        cut = best + temperature * math.log(min(params.min_p, 1.0))
    if 0 < params.top_k < len(x):
        cut = torch.maximum(cut, x.topk(params.top_k).values[-1])  # ties at the k-th value stay
    if params.top_p < 1:
        kept = x[(x >= cut) & (x > -math.inf)]
        values, counts = kept.sort(descending=True).values.unique_consecutive(return_counts=True)
        mass = (counts * ((values - best) / temperature).exp()).cumsum(0)
        inside = mass < params.top_p * mass[-1]  # the next value crosses top_p and stays with all its ties
        cut = values[inside.sum().clamp(max=len(values) - 1)]
    return torch.where(x >= cut, z, -math.inf).log_softmax(0)


def _draw(log_p: Tensor, seed: int, pos: int) -> int:
    """argmax of log-probability + Gumbel noise in two levels: the tile by its mass, then the token inside it."""
    tiles = torch.nn.functional.pad(log_p, (0, -len(log_p) % TILE), value=-math.inf).unflatten(0, (-1, TILE))
    index = torch.arange(len(tiles), device=log_p.device)
    tile = int((tiles.logsumexp(1) + _philox.gumbel(seed, pos, _philox.TILE, index)).argmax())
    ids = tile * TILE + (tiles[tile] > -math.inf).nonzero()[:, 0]
    return int(ids[(log_p[ids] + _philox.gumbel(seed, pos, _philox.TARGET, ids)).argmax()])


def inverse_cdf(weights: Tensor, u: float) -> int:
    """The token at which the running sum of ``weights`` (float64 ``[V]``) passes ``u`` times their total: first among
    the tiles, then inside one; where rounding leaves none, the last with a weight."""
    tiles = torch.nn.functional.pad(weights, (0, -len(weights) % TILE)).unflatten(0, (-1, TILE))
    ends = tiles.sum(1).cumsum(0)
    wanted = u * ends[-1]
    tile = _first(ends > wanted, else_last=tiles.sum(1) > 0)
    before = ends[tile - 1] if tile else 0.0
    weighs = tiles[tile] > 0
    return tile * TILE + _first(weighs & (before + tiles[tile].cumsum(0) > wanted), else_last=weighs)


def _first(hits: Tensor, else_last: Tensor) -> int:
    found = hits.nonzero()
    return int(found[0]) if len(found) else int(else_last.nonzero()[-1])


# ---------------------------------------------------------------- operators


def sample(
    logits: Tensor, seed: Tensor, pos: Tensor, *, slot: Tensor | None = None, temperature: Tensor | None = None,
    top_k: Tensor | None = None, top_p: Tensor | None = None, min_p: Tensor | None = None,
    bitmask: Tensor | None = None, bitmask_row: Tensor | None = None, forced_token: Tensor | None = None,
    bias_ids: Tensor | None = None, bias_val: Tensor | None = None, bias_cu: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    rows = Rows(
        logits, seed, temperature, top_k, top_p, min_p, bitmask, bitmask_row, forced_token, bias_ids, bias_val, bias_cu
    )
    n = logits.shape[0]
    slots = range(n) if slot is None else slot.tolist()
    out = []
    for r, (s, p) in enumerate(zip(slots, pos.tolist(), strict=True)):
        known = 0 <= s < len(rows.params)
        out.append(rows.emit(r, s, p) if known else (-1, 0.0, FLAG_OUT_OF_RANGE if s >= 0 else 0))
    tokens, logprobs, flags = zip(*out, strict=True) if out else ((), (), ())
    return (
        torch.tensor(tokens, dtype=torch.int32, device=logits.device),
        torch.tensor(logprobs, dtype=torch.float32, device=logits.device),
        torch.tensor(flags, dtype=torch.int32, device=logits.device),
    )


def target_logprobs(
    logits: Tensor, *, temperature: Tensor | None = None, top_k: Tensor | None = None, top_p: Tensor | None = None,
    min_p: Tensor | None = None, bitmask: Tensor | None = None, bitmask_row: Tensor | None = None,
    forced_token: Tensor | None = None, bias_ids: Tensor | None = None, bias_val: Tensor | None = None,
    bias_cu: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """float64 ``[N, V]``: the log-probabilities from which `sample` draws row by row, slot = row."""
    n, vocab = logits.shape
    seed = torch.zeros(n, dtype=torch.int64)
    rows = Rows(
        logits, seed, temperature, top_k, top_p, min_p, bitmask, bitmask_row, forced_token, bias_ids, bias_val, bias_cu
    )
    laws = [rows.law(r, r)[0] for r in range(n)]
    return torch.stack(laws) if laws else logits.new_empty((0, vocab), dtype=torch.float64)


# ---------------------------------------------------------------- thinking budget


def ends_with(tail: Tensor, n: Tensor, strings: Tensor) -> Tensor:
    """bool ``[B]``: the output, of which ``tail [B, L]`` holds the last tokens and which has ``n [B]`` in all, ends
    with one of ``strings [B or 1, S, E]``; a string is padded with -1 on the right, and an empty one never matches."""
    length = (strings >= 0).long().cumprod(-1).sum(-1)  # [B or 1, S]
    hit = (length > 0) & (length <= n[:, None])
    for back in range(min(strings.shape[-1], tail.shape[1])):  # the token `back` before the last
        at = (length - 1 - back).clamp(min=0)
        same = strings.expand(len(tail), -1, -1).gather(2, at.expand(len(tail), -1)[..., None])[..., 0]
        hit &= (same == tail[:, -1 - back, None]) | (back >= length)
    return hit.any(-1)


def overlap(tail: Tensor, n: Tensor, end_ids: Tensor) -> Tensor:
    """int64 ``[B]``: length of the longest suffix of the output that is a prefix of ``end_ids [B, E]``."""
    length = (end_ids >= 0).long().cumprod(-1).sum(-1)
    best = torch.zeros_like(length)
    for k in range(1, min(end_ids.shape[1], tail.shape[1]) + 1):
        fits = (tail[:, -k:] == end_ids[:, :k]).all(-1) & (k <= length) & (k <= n)
        best = torch.where(fits, k, best)
    return best


def in_bitmask(ids: Tensor, words: Tensor) -> Tensor:
    """bool, shape of ``ids``: the id's bit is set; an id outside the mask is not in it."""
    if words.shape[0] == 0:
        return torch.zeros_like(ids, dtype=torch.bool)
    inside = (ids >= 0) & (ids < 32 * words.shape[0])
    safe = torch.where(inside, ids, 0).long()
    return inside & ((words[safe >> 5] >> (safe & 31) & 1) != 0)


@dataclass
class ThinkingRules:
    """What ends a request's thinking, batched over requests; `step` is one step of the official processor."""

    budget: Tensor  # [B] int64
    grace: Tensor  # [B] int64, >= 0
    end_ids: Tensor  # [B, E]
    end_think: Tensor  # [1, S, E2]
    newlines: Tensor  # int32 bitmask

    @classmethod
    def make(cls, budget, grace, end_ids, end_think_ids, newline_bitmask) -> ThinkingRules:
        b = budget.shape[0]
        end_ids = end_ids.expand(b, -1) if end_ids.dim() == 1 else end_ids
        end_think = end_think_ids[None, None] if end_think_ids.dim() == 1 else end_think_ids[None]
        return cls(budget.long(), grace.long().clamp(min=0), end_ids, end_think, newline_bitmask)

    def begun(self, tail: Tensor, n: Tensor) -> Tensor:
        """bool ``[B]``: forcing began at or before the present length. Forcing that began and is not done began less
        than E tokens ago, so the tail shows the newline that began it."""
        age = torch.arange(tail.shape[1] - 1, -1, -1, device=tail.device)
        at = n[:, None] - age  # the output's length when this token was its last
        newline = in_bitmask(tail, self.newlines) & (at >= 1) & (at >= self.budget[:, None])
        return (self.budget >= 0) & (newline.any(1) | (n >= self.budget + self.grace))

    def step(self, tail: Tensor, n: Tensor, thinking: Tensor, forcing: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """After one more token: still thinking, forcing, and the token to force next, -1 for none."""
        thinking = thinking & ~ends_with(tail, n, self.end_think)
        newline = in_bitmask(tail[:, -1], self.newlines) & (n >= 1) & (n >= self.budget)
        forcing = forcing | (self.budget >= 0) & (newline | (n >= self.budget + self.grace))
        done = overlap(tail, n, self.end_ids)
        padded = torch.nn.functional.pad(self.end_ids, (0, 1), value=-1)
        wanted = padded.gather(1, done[:, None])[:, 0]  # -1 where the string is complete
        thinking = thinking & ~(forcing & (wanted < 0))
        return thinking, forcing, torch.where(thinking & forcing, wanted, -1)


def thinking_budget(
    draft_tokens: Tensor, cu_rows: Tensor, committed_tail: Tensor, num_output: Tensor, active: Tensor, budget: Tensor,
    grace: Tensor, end_ids: Tensor, end_think_ids: Tensor, newline_bitmask: Tensor,
) -> Tensor:  # fmt: skip
    forced = torch.full_like(draft_tokens, -1, dtype=torch.int32, memory_format=torch.contiguous_format)
    n_rows, b = draft_tokens.shape[0], cu_rows.shape[0] - 1
    if n_rows == 0 or b == 0:
        return forced
    rules = ThinkingRules.make(budget, grace, end_ids, end_think_ids, newline_bitmask)
    first, end = cu_rows.long().clamp(0, n_rows).unfold(0, 2, 1).unbind(1)
    tail, n, thinking = committed_tail, num_output.long(), active != 0
    forcing, reached = rules.begun(tail, n), first < end
    for i in range(max(int((end - first).max()), 0)):
        thinking, forcing, wanted = rules.step(tail, n, thinking, forcing)
        row = (first + i).clamp(max=n_rows - 1)
        forced[row[reached]] = wanted[reached].to(torch.int32)
        token = draft_tokens[row]
        reached = reached & (first + i + 1 < end) & (token >= 0)
        tail, n = torch.cat([tail[:, 1:], token[:, None].to(tail.dtype)], 1), n + 1
    return forced
