"""The law of what a verification emits, integrated over its uniforms, and the law it must have.

`verify` takes its uniforms as an argument for this: a draft is accepted below a threshold, and the final draw steps
through the tokens as its uniform grows. Thresholds and steps are found by bisection on calls of the operator, so that
the law comes out to 1e-9 with nothing known of how it is made.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import torch
from conftest import DEVICE
from torch import Tensor

from n3kernels.mtp import verify
from n3kernels.mtp.reference import target_logprobs

LOW, HIGH = 2.0**-60, 1 - 2.0**-53
STEPS = 48


@dataclass
class Toy:
    """Target and drafter over ``vocab`` tokens, each with a law of its own after every prefix."""

    vocab: int
    depth: int  # drafts
    peak: float = 2.0  # the laws' spread, in nats
    support: int | None = None  # tokens that the drafter can draw; None: one token for certain
    filters: dict = field(default_factory=dict)  # temperature, top_k, top_p, min_p: one number each
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def __post_init__(self):
        self.logits, self.q = {}, {}
        for n in range(self.depth + 1):
            for prefix in itertools.product(range(self.vocab), repeat=n):
                self.logits[prefix] = self.peak * torch.randn(self.vocab, generator=self.generator)
                self.q[prefix] = self._drafter()
        prefixes = list(self.logits)
        rows = torch.stack([self.logits[p] for p in prefixes])
        laws = target_logprobs(rows, **self.options(len(prefixes), "cpu")).exp()
        self.p = dict(zip(prefixes, laws, strict=True))

    def _drafter(self) -> Tensor:
        order = torch.randperm(self.vocab, generator=self.generator)
        if self.support is None:
            return torch.zeros(self.vocab).index_fill_(0, order[:1], 1.0)
        law = torch.rand(self.support, generator=self.generator) + 0.05
        q = torch.zeros(self.vocab)
        q[order[: self.support]] = law / law.sum()
        return q / q.double().sum().float()

    def options(self, slots: int, device: str) -> dict:
        types = {"top_k": torch.int32}
        return {
            name: torch.full((slots,), value, dtype=types.get(name, torch.float32), device=device)
            for name, value in self.filters.items()
        }

    def plain(self, length: int, prefix: tuple = ()) -> dict[tuple, float]:
        """The target's own law of ``length`` more tokens; behind ``depth`` tokens the law of the empty prefix."""
        if not length:
            return {(): 1.0}
        law = {}
        for token, weight in enumerate(self.after(prefix).tolist()):
            if weight:
                for rest, share in self.plain(length - 1, (*prefix, token)).items():
                    law[(token, *rest)] = weight * share
        return law

    def after(self, prefix: tuple) -> Tensor:
        return self.p[prefix if len(prefix) <= self.depth else ()]


def run(toy: Toy, mode: str, form: str, drafts: list[tuple], uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens and counts of one request for each of ``drafts``; ``uniforms [len(drafts), depth + 1, 2]``."""
    rows = [d[:i] for d in drafts for i in range(toy.depth + 1)]
    logits = torch.stack([toy.logits[p] for p in rows]).to(DEVICE)
    tokens = torch.tensor([(*d, -1) for d in drafts], dtype=torch.int32, device=DEVICE).flatten()
    q = torch.stack([toy.q[p] for p in rows]).to(DEVICE)
    laws = {}
    if form == "sparse":
        m = max(int((q > 0).sum(1).max()), 1)
        probs, ids = q.topk(m, dim=1)
        laws = {"draft_ids": torch.where(probs > 0, ids, -1).int(), "draft_probs": probs.contiguous()}
    elif form == "dense":
        laws = {"draft_logits": q.log()}
    b = len(drafts)
    cu_rows = torch.arange(0, b * (toy.depth + 1) + 1, toy.depth + 1, dtype=torch.int32, device=DEVICE)
    zeros = torch.zeros(b, dtype=torch.int64, device=DEVICE)
    out, count, *_ = verify(
        logits, tokens, cu_rows, zeros, zeros, mode=mode, max_drafts=toy.depth, **laws, **toy.options(b, DEVICE),
        uniforms=uniforms.to(DEVICE).flatten(0, 1).contiguous(),
    )  # fmt: skip
    return out.cpu(), count.cpu()


def bisect(hit, shape: tuple[int, ...]) -> Tensor:
    """The u up to which ``hit(u)`` is true: 0 where it is never, 1 where it always is."""
    low, high = torch.full(shape, LOW, dtype=torch.float64), torch.full(shape, HIGH, dtype=torch.float64)
    never, always = ~hit(low), hit(high)
    for _ in range(STEPS):
        middle = (low + high) / 2
        inside = hit(middle)
        low, high = torch.where(inside, middle, low), torch.where(inside, high, middle)
    return torch.where(never, 0.0, torch.where(always, 1.0, low))


def emitted(toy: Toy, mode: str, form: str) -> dict[tuple, float]:
    """The law of the first ``depth + 1`` tokens: what one verification emits, then the target's own."""
    drafts, k = list(itertools.product(range(toy.vocab), repeat=toy.depth)), toy.depth
    weights = [float(torch.stack([toy.q[d[:i]][d[i]] for i in range(k)]).double().prod()) for d in drafts]
    drafts, weights = zip(*[(d, w) for d, w in zip(drafts, weights, strict=True) if w > 0], strict=True)
    n = len(drafts)

    # In "token" a draft is reached if those before it are accepted, in "block" every one counts.
    thresholds = torch.zeros(n, k, dtype=torch.float64)
    for i in range(k):

        def accepted(u, i=i):
            uniforms = torch.full((n, k + 1, 2), 0.5, dtype=torch.float64)
            uniforms[..., 0] = HIGH
            uniforms[:, :i, 0] = LOW if mode == "token" else HIGH
            uniforms[:, i, 0] = u
            return run(toy, mode, form, drafts, uniforms)[1] > i + 1

        thresholds[:, i] = bisect(accepted, (n,))

    law: dict[tuple, float] = {}
    for tau in range(k + 1):
        if mode == "token":
            share = thresholds[:, :tau].prod(1) * (1 - thresholds[:, tau] if tau < k else 1)
        else:
            share = (thresholds[:, tau - 1] if tau else 1) * (1 - thresholds[:, tau:]).prod(1)
        ends = torch.ones(n, toy.vocab, dtype=torch.float64)
        for token in range(toy.vocab - 1):

            def at_most(u, tau=tau, token=token):
                uniforms = torch.full((n, k + 1, 2), HIGH, dtype=torch.float64)
                uniforms[:, :tau, 0] = LOW
                uniforms[..., 1] = u[:, None]
                out, count = run(toy, mode, form, drafts, uniforms)
                return (count == tau + 1) & (out[:, tau] <= token)

            ends[:, token] = bisect(at_most, (n,))
        steps = ends.diff(dim=1, prepend=torch.zeros(n, 1, dtype=torch.float64))
        for b in range(n):
            if share[b] <= 0:
                continue
            for token, step in enumerate(steps[b].tolist()):
                if step <= 0:
                    continue
                begun = (*drafts[b][:tau], token)
                for rest, tail in toy.plain(k - tau, begun).items():
                    whole = (*begun, *rest)
                    law[whole] = law.get(whole, 0.0) + weights[b] * float(share[b]) * step * tail
    return law


def total_variation(a: dict[tuple, float], b: dict[tuple, float]) -> float:
    return 0.5 * sum(abs(a.get(key, 0.0) - b.get(key, 0.0)) for key in {*a, *b})
