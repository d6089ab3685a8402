"""The definition of draft verification and of drawing drafts, in plain PyTorch: one request after another, float64."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import _philox
from .reference import FLAG_NOT_DRAWN, FLAG_OUT_OF_RANGE, Rows, inverse_cdf, is_greedy

__all__ = ["LOSSY", "MODES", "mtp_draft_sample", "mtp_verify", "mtp_verify_tree"]

LOSSY = ("relaxed", "typical")
MODES = ("greedy", "coupled", "token", "block", *LOSSY)


class Drafts:
    """The laws from which the drafts of a call were drawn."""

    def __init__(self, tokens, vocab, ids=None, probs=None, logits=None, temperature=None, draft_vocab=None, slots=0):
        self.tokens, self.vocab, self.ids, self.probs, self.logits = tokens.tolist(), vocab, ids, probs, logits
        self.map, self.device = draft_vocab, tokens.device
        self.temperature = [1.0] * slots if temperature is None else temperature.tolist()

    def law(self, r: int, slot: int) -> Tensor:
        """float64 ``[V]``: the probabilities of the draft that is checked with row ``r``."""
        q = torch.zeros(self.vocab, dtype=torch.float64, device=self.device)
        if self.ids is not None:
            ids, values = self.ids[r].long(), self.probs[r].double()
        elif self.logits is not None:
            ids = torch.arange(self.logits.shape[1], device=self.device)
            values = _softmax(self.logits[r], self.temperature[slot])
        else:
            if 0 <= self.tokens[r] < self.vocab:
                q[self.tokens[r]] = 1.0
            return q
        ids, known = self.to_target(ids)
        inside = known & (ids >= 0) & (ids < self.vocab)
        return q.index_add_(0, ids[inside], values[inside])

    def to_target(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        if self.map is None:
            return ids, ids >= 0
        known = (ids >= 0) & (ids < len(self.map))
        return self.map[torch.where(known, ids, 0)].long(), known


def _softmax(logits: Tensor, temperature: float) -> Tensor:
    x = logits.double()
    x = torch.where(x.isnan(), -math.inf, x)
    best = x.max()
    if is_greedy(temperature) or best.isinf():
        return (torch.arange(len(x), device=x.device) == x.argmax()).double()
    return ((x - best) / temperature).softmax(0)


@dataclass
class Noise:
    """The uniforms of a request: Philox by position, or given by row."""

    seed: int
    pos: int
    first: int
    given: list[list[float]] | None

    def accept(self, row: int, sibling: int = 0) -> float:
        if self.given is not None:
            return self.given[self.first + row][0]
        return float(_philox.uniform(self.seed, self.pos + row, _philox.ACCEPT, torch.tensor(sibling)))

    def final(self, row: int) -> float:
        if self.given is not None:
            return self.given[self.first + row][1]
        return uniform53(self.seed, self.pos + row, _philox.RESIDUAL)


def uniform53(seed: int, pos: int, stream: int) -> float:
    """A uniform of 53 bits in (0, 1), from words 0 and 1 of index 0."""
    a, b = _philox.word(seed, pos, stream, torch.tensor([0, 1])).tolist()
    return ((a >> 5) * 2**26 + (b >> 6) + 0.5) * 2.0**-53


def accepts(u: float, p: float, q: float) -> bool:
    return p > 0 and q > 0 and u * q < p


def residual(p: Tensor, q: Tensor) -> Tensor:
    """What is left of p where q was rejected; p itself where nothing is left."""
    left = (p - q).clamp(min=0)
    return left if left.sum() > 0 else p


# ---------------------------------------------------------------- chains


@dataclass
class Chain:
    """One request: its rows, its drafts up to the first negative one or through an EOS, and what may follow them."""

    rows: Rows
    q: Drafts
    slot: int
    first: int
    drafts: list[int]
    ends: bool  # the last draft is an EOS: nothing follows it
    noise: Noise
    flags: int = 0

    def p(self, i: int) -> Tensor:
        """float64 ``[V]``: the target's probabilities after i drafts."""
        log_p, flags = self.rows.law(self.first + i, self.slot)
        self.flags |= flags
        return log_p.exp()

    def ratio(self, i: int, p: Tensor) -> tuple[float, float]:
        """p and q of the draft that row i checks; both 0 where it cannot be accepted."""
        d = self.drafts[i]
        if d >= self.rows.vocab:
            self.flags |= FLAG_OUT_OF_RANGE
            return 0.0, 0.0
        q = float(self.q.law(self.first + i, self.slot)[d])
        if not 0 < q < math.inf:
            self.flags |= FLAG_NOT_DRAWN
            return 0.0, 0.0
        return float(p[d]), q

    def draw(self, weights: Tensor, i: int) -> list[int]:
        """The drafts before row i and the final draw from its weights."""
        return [*self.drafts[:i], inverse_cdf(weights, self.noise.final(i))]


def by_token(chain: Chain) -> list[int]:
    for i in range(len(chain.drafts)):
        p = chain.p(i)
        if not accepts(chain.noise.accept(i), *chain.ratio(i, p)):
            return chain.draw(residual(p, chain.q.law(chain.first + i, chain.slot)), i)
    k = len(chain.drafts)
    return chain.drafts if chain.ends else chain.draw(chain.p(k), k)


def by_block(chain: Chain) -> list[int]:
    k, w, tau, left = len(chain.drafts), 1.0, 0, None
    for i in range(k + (not chain.ends)):
        p = chain.p(i)
        if i == k:  # the bonus row: w is h_k
            if k == 0 or chain.noise.accept(k - 1) < w:
                return chain.draw(p, k)
            break
        q = chain.q.law(chain.first + i, chain.slot)
        outside = (w * p[q == 0]).sum()  # 1 - sum inside would cancel on a peaked row
        above = outside + (w * p - q)[q > 0].clamp(min=0).sum()
        h = 1.0 if i == 0 else float(above / (above + 1 - w)) if above + 1 - w > 0 else 1.0
        if i == 0 or chain.noise.accept(i - 1) < h:
            tau, left = i, residual(w * p, q)
        p_draft, q_draft = chain.ratio(i, p)
        w = min(1.0, w * p_draft / q_draft) if q_draft > 0 else 0.0
    if chain.ends and chain.noise.accept(k - 1) < w:
        return chain.drafts
    return chain.draw(left, tau)


def by_relaxed(chain: Chain, top: int, delta: float) -> list[int]:
    for i, d in enumerate(chain.drafts):
        p = chain.p(i)
        best = p.sort(descending=True, stable=True).indices
        near = d < len(p) and d in best[:top] and p[d] > 0 and p[d] >= p[best[0]] - delta
        chain.flags |= FLAG_OUT_OF_RANGE * (d >= len(p))
        if not near:
            return [*chain.drafts[:i], int(best[0])]
    if chain.ends:
        return chain.drafts
    return [*chain.drafts, int(chain.p(len(chain.drafts)).argmax())]


def by_typical(chain: Chain, epsilon: float, delta: float) -> list[int]:
    def plain(i: int) -> int:
        token, _, flags = chain.rows.emit(chain.first + i, chain.slot, chain.noise.pos + i)
        chain.flags |= flags
        return token

    for i, d in enumerate(chain.drafts):
        p = chain.p(i)
        entropy = -float(torch.xlogy(p, p).sum())
        chain.flags |= FLAG_OUT_OF_RANGE * (d >= len(p))
        if not (d < len(p) and p[d] > min(epsilon, delta * math.exp(-entropy))):
            return [*chain.drafts[:i], plain(i)]
    return chain.drafts if chain.ends else [*chain.drafts, plain(len(chain.drafts))]


def by_target(chain: Chain, greedy: bool, eos: set[int]) -> tuple[list[int], list[float]]:
    """The target's own tokens, as long as the drafts are the same."""
    tokens, logprobs = [], []
    for i in range(len(chain.drafts) + 1):
        token, logprob, flags = chain.rows.emit(chain.first + i, chain.slot, chain.noise.pos + i, greedy)
        tokens.append(token)
        logprobs.append(logprob)
        chain.flags |= flags
        if i < len(chain.drafts):
            chain.flags |= FLAG_OUT_OF_RANGE * (chain.drafts[i] >= chain.rows.vocab)
        if token in eos or i == len(chain.drafts) or chain.drafts[i] != token:
            break
    return tokens, logprobs


def mtp_verify(
    logits: Tensor, draft_tokens: Tensor, cu_rows: Tensor, seed: Tensor, pos: Tensor, *, mode: str = "greedy",
    max_drafts: int, slot: Tensor | None = None, temperature: Tensor | None = None, top_k: Tensor | None = None,
    top_p: Tensor | None = None, min_p: Tensor | None = None, bitmask: Tensor | None = None,
    bitmask_row: Tensor | None = None, forced_token: Tensor | None = None, bias_ids: Tensor | None = None,
    bias_val: Tensor | None = None, bias_cu: Tensor | None = None, eos_ids: Tensor | None = None,
    draft_ids: Tensor | None = None, draft_probs: Tensor | None = None, draft_logits: Tensor | None = None,
    draft_temperature: Tensor | None = None, draft_vocab: Tensor | None = None, allow_lossy: bool = False,
    relaxed_top_k: int = 1, relaxed_delta: float = 0.0, typical_epsilon: float = 0.3, typical_delta: float = 0.09,
    uniforms: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    rows = Rows(
        logits, seed, temperature, top_k, top_p, min_p, bitmask, bitmask_row, forced_token, bias_ids, bias_val, bias_cu
    )
    vocab = logits.shape[1]
    q = Drafts(
        draft_tokens, vocab, draft_ids, draft_probs, draft_logits, draft_temperature, draft_vocab, len(rows.params)
    )
    eos = set() if eos_ids is None else set(eos_ids.tolist())
    given = None if uniforms is None else uniforms.tolist()
    out = Emitted(cu_rows.shape[0] - 1, max_drafts + 1)
    for b, request in enumerate(live_requests(out, cu_rows, slot, pos, logits.shape[0], len(rows.params))):
        if request is None:
            continue
        first, count, s, at = request
        drafts, ends = [], False
        for d in q.tokens[first : first + min(count - 1, max_drafts)]:
            if d < 0 or ends:
                break
            drafts.append(d)
            ends = d in eos
        chain = Chain(rows, q, s, first, drafts, ends, Noise(rows.params[s].seed, at, first, given))
        logprobs = None
        if mode in ("greedy", "coupled"):
            tokens, logprobs = by_target(chain, mode == "greedy", eos)
        elif mode == "token":
            tokens = by_token(chain)
        elif mode == "block":
            tokens = by_block(chain)
        elif mode == "relaxed":
            tokens = by_relaxed(chain, relaxed_top_k, relaxed_delta)
        else:
            tokens = by_typical(chain, typical_epsilon, typical_delta)
        if logprobs is None:
            logprobs = [float(rows.law(first + i, s)[0][t]) for i, t in enumerate(tokens)]
        out.put(b, tokens, logprobs, chain.flags)
        out.last_row[b] = first + len(tokens) - 1
    return out.results(logits.device, out.last_row)


class Emitted:
    """The results of a call, on the host."""

    def __init__(self, requests: int, width: int):
        self.tokens = torch.full((requests, width), -1, dtype=torch.int32)
        self.logprobs = torch.zeros(requests, width)
        self.rows = torch.full((requests, width), -1, dtype=torch.int32)
        self.num_emitted, self.flags = (torch.zeros(requests, dtype=torch.int32) for _ in range(2))
        self.last_row = torch.full((requests,), -1, dtype=torch.int32)

    def put(self, b: int, tokens: list[int], logprobs: list[float], flags: int) -> None:
        self.tokens[b, : len(tokens)] = torch.tensor(tokens, dtype=torch.int32)
        self.logprobs[b, : len(tokens)] = torch.tensor(logprobs, dtype=torch.float32)
        self.num_emitted[b], self.flags[b] = len(tokens), flags

    def results(self, device: torch.device, rows: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        found = self.tokens, self.num_emitted, rows, self.logprobs, self.flags
        return tuple(t.to(device) for t in found)


def live_requests(out: Emitted, cu_rows, slot, pos, n: int, slots: int):
    """(first row, rows, slot, position) of each request, None for padding; marks a slot out of range."""
    cu = cu_rows.tolist()
    numbers = range(len(cu) - 1) if slot is None else slot.tolist()
    for b, (s, at) in enumerate(zip(numbers, pos.tolist(), strict=True)):
        first, end = (min(max(c, 0), n) for c in cu[b : b + 2])
        if s >= slots:
            out.flags[b] = FLAG_OUT_OF_RANGE
        yield (first, end - first, s, at) if 0 <= s < slots and end > first else None


# ---------------------------------------------------------------- trees


def mtp_verify_tree(
    logits: Tensor, node_tokens: Tensor, parents: Tensor, cu_rows: Tensor, seed: Tensor, pos: Tensor, *,
    mode: str = "greedy", max_depth: int, slot: Tensor | None = None, temperature: Tensor | None = None,
    top_k: Tensor | None = None, top_p: Tensor | None = None, min_p: Tensor | None = None,
    bitmask: Tensor | None = None, bitmask_row: Tensor | None = None, forced_token: Tensor | None = None,
    bias_ids: Tensor | None = None, bias_val: Tensor | None = None, bias_cu: Tensor | None = None,
    eos_ids: Tensor | None = None, draft_ids: Tensor | None = None, draft_probs: Tensor | None = None,
    draft_vocab: Tensor | None = None, uniforms: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    rows = Rows(
        logits, seed, temperature, top_k, top_p, min_p, bitmask, bitmask_row, forced_token, bias_ids, bias_val, bias_cu
    )
    vocab, slots = logits.shape[1], len(rows.params)
    q = Drafts(node_tokens, vocab, draft_ids, draft_probs, draft_vocab=draft_vocab)
    parent, eos = parents.tolist(), set() if eos_ids is None else set(eos_ids.tolist())
    given = None if uniforms is None else uniforms.tolist()
    out = Emitted(cu_rows.shape[0] - 1, max_depth + 1)
    for b, request in enumerate(live_requests(out, cu_rows, slot, pos, logits.shape[0], slots)):
        if request is None:
            continue
        first, count, s, at = request
        children: dict[int, list[int]] = {}
        for j in range(1, count):
            if 0 <= parent[first + j] < j and q.tokens[first + j] >= 0:
                children.setdefault(parent[first + j], []).append(j)
        noise = Noise(rows.params[s].seed, at, first, given)
        tokens, logprobs, flags, node = [], [], 0, 0
        for depth in range(max_depth + 1):
            found = children.get(node, []) if depth < max_depth else []
            if mode == "token":
                token, child, f = _sibling(rows, q, s, first, node, found, noise, depth)
                logprob = float(rows.law(first + node, s)[0][token])
            else:
                token, logprob, f = rows.emit(first + node, s, at + depth, mode == "greedy")
                child = next((j for j in found if q.tokens[first + j] == token), None)
                f |= FLAG_OUT_OF_RANGE * any(q.tokens[first + j] >= vocab for j in found)
            tokens.append(token)
            logprobs.append(logprob)
            flags |= f
            out.rows[b, depth] = first + node
            if child is None or token in eos:
                break
            node = child
        out.put(b, tokens, logprobs, flags)
    return out.results(logits.device, out.rows)


def _sibling(rows, q, slot, first, node, children, noise, depth) -> tuple[int, int | None, int]:
    """The token after a node in mode "token": that of the first child that is accepted, else of what is left."""
    log_p, flags = rows.law(first + node, slot)
    p = log_p.exp()
    for sibling, j in enumerate(children):
        d = q.tokens[first + j]
        if d >= rows.vocab:
            flags |= FLAG_OUT_OF_RANGE
            continue
        law = q.law(first + node if q.ids is not None else first + j, slot)
        if not 0 < float(law[d]) < math.inf:
            flags |= FLAG_NOT_DRAWN
            continue
        u = noise.given[first + j][0] if noise.given is not None else noise.accept(depth, 1 + sibling)
        if accepts(u, float(p[d]), float(law[d])):
            return d, j, flags
        p = residual(p, law)
        p = p / p.sum()
    u = noise.given[first + node][1] if noise.given is not None else noise.final(depth)
    return inverse_cdf(p, u), None, flags


# ---------------------------------------------------------------- drafts


def mtp_draft_sample(
    logits: Tensor, seed: Tensor, pos: Tensor, *, max_ids: int, slot: Tensor | None = None,
    temperature: Tensor | None = None, draft_vocab: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    n, vocab = logits.shape
    tokens = torch.full((n,), -1, dtype=torch.int32)
    ids, probs = torch.full((n, max_ids), -1, dtype=torch.int32), torch.zeros(n, max_ids)
    seeds = seed.tolist()
    temperatures = [1.0] * len(seeds) if temperature is None else temperature.tolist()
    slots = range(n) if slot is None else slot.tolist()
    for r, (s, at) in enumerate(zip(slots, pos.tolist(), strict=True)):
        if not 0 <= s < len(seeds):
            continue
        x = logits[r].double()
        x = torch.where(x.isnan(), -math.inf, x)
        best = x.sort(descending=True, stable=True).indices[: min(max_ids, vocab)]
        law = _softmax(x, temperatures[s])[best]
        kept = int((law > 0).sum())
        law = (law / law.sum())[:kept].float()
        ids[r, :kept], probs[r, :kept] = best[:kept].int(), law
        sums = law.double().cumsum(0)
        drawn = _first_above(sums, uniform53(seeds[s], at, _philox.DRAFT) * float(sums[-1]))
        tokens[r] = int(best[drawn]) if draft_vocab is None else int(draft_vocab[best[drawn]])
    return tuple(t.to(logits.device) for t in (tokens, ids, probs))


def _first_above(sums: Tensor, wanted: float) -> int:
    return min(int((sums <= wanted).sum()), len(sums) - 1)
