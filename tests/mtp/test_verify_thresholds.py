"""Every decision of verification from both sides: uniforms just below and just above each threshold of acceptance and
just before and behind steps of each final draw, which are computed here from the formulas.

One call has all questions about a mode and a form of the drafts' laws, so that a kernel with a mistake in a ratio, a
residual, a map or an order answers at least one of them wrongly, with certainty.
"""

from __future__ import annotations

import math

import pytest
import torch
from test_verify_agreement import NAMES, assert_agree, on_device

from n3kernels.mtp import reference_verify, verify, verify_tree

OPS = ("mtp_verify", "mtp_verify_tree")
INT, INF = torch.int32, float("inf")
V = 4099  # two tiles
TOKENS = [1, 3, 5, 7, 4097, 4098]
P = torch.tensor([
    [0.30, 0.10, 0.15, 0.05, 0.25, 0.15], [0.10, 0.35, 0.05, 0.20, 0.10, 0.20], [0.20, 0.05, 0.30, 0.10, 0.05, 0.30],
    [0.05, 0.15, 0.25, 0.15, 0.20, 0.20], [0.25, 0.15, 0.20, 0.20, 0.05, 0.15],
], dtype=torch.float64)  # fmt: skip
IMPOSSIBLE = 2  # the target's p is 0, the drafter's q is not
LISTED = [1, 3, 4097, 5, IMPOSSIBLE]
WORDS = torch.tensor([5, 4097, -1, 1, V + 3, 5, 3, IMPOSSIBLE, 9], dtype=INT)  # of a smaller vocabulary; 5 twice
LOW, HIGH, NEAR = 1e-12, 1 - 1e-9, 1e-4
TARGET_T, DRAFT_T = 0.8, 1.25
DRAFTS = [1, 3, 4097]
# p / q of the three drafts: what is carried from one to the next is clamped in one chain, and may grow in the other.
RATIOS = {"falling": (1.4, 0.5, 0.8), "rising": (0.6, 1.5, 0.5)}


def spread(values, tokens) -> torch.Tensor:
    law = torch.zeros(*values.shape[:-1], V, dtype=torch.float64)
    return law.index_add_(-1, torch.tensor(tokens), values)


def listed_laws(p: torch.Tensor, drafts: list[int], ratios) -> torch.Tensor:
    """q of `LISTED` by row, of which the drafts have the given ratios."""
    q = torch.zeros(len(drafts), len(LISTED), dtype=torch.float64)
    for i, (draft, ratio) in enumerate(zip(drafts, ratios, strict=True)):
        at = LISTED.index(draft)
        rest = torch.tensor([0.32, 0.29, 0.2, 0.15, 0.04], dtype=torch.float64)
        rest[at] = 0
        own = float(p[i, draft] / ratio)
        q[i] = rest / rest.sum() * (1 - own)
        q[i, at] = own
    return q


def law_arguments(form: str, q: torch.Tensor) -> dict[str, torch.Tensor]:
    """The laws ``q`` of `LISTED` by row in one of the forms; of a row more that checks nothing."""
    q = torch.cat([q, q[:1]])
    n = len(q)
    if form == "certain":
        return {}
    if form == "sparse":
        ids, probs = [-1, *LISTED[::-1]], torch.cat([torch.full((n, 1), 0.5), q.flip(1)], 1)
        return {"draft_ids": torch.tensor([ids] * n, dtype=INT), "draft_probs": probs.float()}
    columns = {token: [i for i, w in enumerate(WORDS.tolist()) if w == token] for token in LISTED}
    share = [(c, i, (0.3, 0.7)[j] if len(cs) > 1 else 1.0) for i, t in enumerate(LISTED)
             for cs in [columns[t]] for j, c in enumerate(cs)]  # fmt: skip
    if form == "mapped":
        ids = torch.tensor([[c for c, _, _ in share]] * n, dtype=INT)
        probs = torch.stack([q[:, i] * part for _, i, part in share], 1)
        return {"draft_ids": ids, "draft_probs": probs.float(), "draft_vocab": WORDS}
    x = torch.full((n, V if form == "dense" else len(WORDS)), -INF, dtype=torch.float64)
    for c, i, part in share if form == "reduced" else [(t, i, 1.0) for i, t in enumerate(LISTED)]:
        x[:, c] = (q[:, i] * part).log() * DRAFT_T
    law = {"draft_logits": x.float(), "draft_temperature": torch.tensor([DRAFT_T])}
    return law | ({"draft_vocab": WORDS} if form == "reduced" else {})


def steps(weights: torch.Tensor) -> list[float]:
    """Two uniforms at which the draw from weights steps to the next token, one inside each tile if there is one."""
    ends = (weights.cumsum(0) / weights.sum())[weights > 0]
    tokens = weights.nonzero().flatten().tolist()
    last = sum(t < 4096 for t in tokens) - 1  # of the first tile
    return [float(ends[i]) for i in {max(last - 1, 0), len(tokens) - 2} if 0 <= i < len(tokens) - 1]


def both_sides(t: float) -> list[float]:
    return [t * (1 - NEAR), t * (1 + NEAR)] if 0 < t * (1 + NEAR) < 1 else []


def left(p: torch.Tensor, q: torch.Tensor, w: float = 1.0) -> torch.Tensor:
    return (w * p - q).clamp(min=0)


def questions(mode: str, p, q, drafts) -> list[tuple[list[float], list[float]]]:
    """(uniforms of acceptance by row, of the final draw by row), in pairs that have different answers."""
    k = len(drafts)
    ratios = [float(p[i, d] / q[i, d]) for i, d in enumerate(drafts)]
    asked, w = [], [1.0]
    for ratio in ratios:
        w.append(min(1.0, w[-1] * ratio))
    final = [0.47] * (k + 1)

    def ask(accept, t, at=None):
        for u in both_sides(t):
            a, f = list(accept), list(final)
            if at is None:
                f = [u] * (k + 1)
            else:
                a[at] = u
            asked.append(([*a, 0.5], f))

    for i in range(k + 1):
        first = [LOW] * i + [HIGH] * (k - i)  # in mode block: tau is i, if any h allows it
        if mode == "token":
            if i < k:
                ask([LOW] * i + [LOW] * (k - i), ratios[i], i)
            rejected = i < k and ratios[i] < 1
            if i == k or rejected:
                for t in steps(left(p[i], q[i]) if i < k else p[k]):
                    ask(first, t)
            continue
        if i > 0:
            above = float(left(p[i], q[i], w[i]).sum()) if i < k else 0.0
            ask([HIGH] * k, w[k] if i == k else above / (above + 1 - w[i]), i - 1)
        if max([0.0, *w[i + 1 :]]) == 1.0:  # more drafts are accepted in any case
            continue
        for t in steps(left(p[i], q[i], w[i]) if i < k else p[k]):
            ask([HIGH] * (i - 1) + [LOW] * (i > 0) + [HIGH] * (k - i), t)
    return asked


def chains(mode: str, form: str, ratios: str) -> tuple[dict[str, object], int]:
    """A call with all questions, two requests for each, and then requests whose first draft cannot be accepted."""
    k = len(DRAFTS)
    logits = (spread(P[: k + 1], TOKENS).log() * TARGET_T).float()
    p = (logits.double() / TARGET_T).softmax(1)
    listed = listed_laws(p, DRAFTS, RATIOS[ratios])
    q = spread(listed, LISTED)
    if form == "certain":
        q = torch.zeros(k, V, dtype=torch.float64)
        q[range(k), DRAFTS] = 1.0
    asked = questions(mode, p, q, DRAFTS)
    pairs = len(asked) // 2
    drafts = [[*DRAFTS, -1]] * len(asked)
    for draft in (IMPOSSIBLE, 7, V + 1):  # p is 0; q is 0, unless it is certain; no token
        drafts.append([draft, *DRAFTS[1:], -1])
        asked.append(([LOW] * (k + 1), [0.4] * (k + 1)))
    law, cold = law_arguments(form, listed), 0
    if mode == "token" and "draft_logits" in law:  # then the drafter's best column is certain
        best = LISTED[int(listed[0].argmax())]
        for u in both_sides(float(p[0, best])):
            drafts.append([best, -1, -1, -1])
            asked.append(([u] * (k + 1), [0.4] * (k + 1)))
            cold += 1
    b = len(asked)
    call = {
        "logits": logits.repeat(b, 1), "draft_tokens": torch.tensor(drafts, dtype=INT).flatten(),
        "cu_rows": torch.arange(0, b * (k + 1) + 1, k + 1, dtype=INT), "mode": mode, "max_drafts": k,
        "uniforms": torch.tensor(asked, dtype=torch.float64).transpose(1, 2).reshape(-1, 2), **by_slot(b),
    }  # fmt: skip
    for name, t in law.items():
        once = name == "draft_vocab"
        call[name] = t if once else t.repeat(b, *[1] * (t.dim() - 1))
    if cold:
        call["draft_temperature"][-cold:] = 0.0
    return call, pairs


def by_slot(b: int) -> dict[str, torch.Tensor]:
    zeros = torch.zeros(b, dtype=torch.int64)
    return {"seed": zeros, "pos": zeros, "temperature": torch.full((b,), TARGET_T)}


def assert_asks(want: list[list[int]], pairs: int) -> None:
    for i in range(pairs):
        assert want[2 * i] != want[2 * i + 1], f"question {i} is none: {want[2 * i]}"


CASES = [("token", form, "rising") for form in ("certain", "sparse", "mapped", "dense", "reduced")]
CASES += [("block", "certain", "rising"), ("block", "sparse", "falling"), ("block", "mapped", "rising"),
          ("block", "dense", "rising"), ("block", "reduced", "falling")]  # fmt: skip


@pytest.mark.op("mtp_verify")
@pytest.mark.parametrize("mode, form, ratios", CASES)
def test_chains(backend, mode, form, ratios):
    call, pairs = chains(mode, form, ratios)
    want = reference_verify.mtp_verify(**call)
    assert_asks(want[0].tolist(), pairs)
    assert_agree(verify(**on_device(call)), want, NAMES, lazy=mode == "block")


# ---------------------------------------------------------------- trees

# Three children of the root; the first child has two with the same token.
NODES, PARENTS = [-1, 1, 5, 4097, 5, 5], [-1, 0, 0, 0, 1, 1]
TREE_ROWS = P[[0, 1, 2, 3, 4, 0]]
TREE_ROWS[1] = torch.tensor([0.05, 0.60, 0.05, 0.10, 0.10, 0.10])  # of 3, which is listed, something is left in the end


def tree_questions(p, q) -> list[tuple[list[float], list[float]]]:
    """(uniforms of acceptance by child, of the final draw by node), in pairs; ``q[child]`` is its law."""
    asked = []

    def ask(accept, final, t, at, of_final=False):
        for u in both_sides(t):
            a, f = list(accept), list(final)
            (f if of_final else a)[at] = u
            asked.append((a, f))

    final, rest = [0.47] * 6, p[0]
    for child in (1, 2, 3):
        accept = [0.5, *[HIGH] * (child - 1), *[LOW] * (6 - child)]
        ask(accept, final, float(rest[NODES[child]] / q[child][NODES[child]]), child)
        after_both = left(left(p[1], q[4]) / left(p[1], q[4]).sum(), q[5])
        for t in steps(p[child] if child > 1 else after_both):  # the others are leaves
            at_end = [*accept[:child], LOW, *accept[child + 1 : 4], HIGH, LOW]
            ask(at_end, final, t, child, True)
        rest = left(rest, q[child])
        rest = rest / rest.sum()
        for t in steps(rest) if child == 3 else []:
            ask([0.5, HIGH, HIGH, HIGH, LOW, LOW], final, t, 0, True)
    ask([0.5, LOW, LOW, LOW, LOW, LOW], final, float(p[1][5] / q[4][5]), 4)
    return asked


def trees(form: str) -> tuple[dict[str, object], int]:
    logits = (spread(TREE_ROWS, TOKENS).log() * TARGET_T).float()
    p = (logits.double() / TARGET_T).softmax(1)
    listed = listed_laws(p, [1, 5, 5, 5, 5], (0.9, 0.7, 1.0, 1.0, 1.0))  # of the children of each row
    laws = spread(listed, LISTED)
    q = {child: laws[PARENTS[child]] for child in range(1, 6)}
    if form == "certain":
        q = {child: torch.zeros(V, dtype=torch.float64).index_fill_(0, torch.tensor(NODES[child]), 1.0) for child in q}
    asked = tree_questions(p, q)
    b, n = len(asked), len(NODES)
    call = {
        "logits": logits.repeat(b, 1), "node_tokens": torch.tensor(NODES * b, dtype=INT),
        "parents": torch.tensor(PARENTS * b, dtype=INT), "cu_rows": torch.arange(0, b * n + 1, n, dtype=INT),
        "mode": "token", "max_depth": 2, **by_slot(b),
        "uniforms": torch.tensor(asked, dtype=torch.float64).transpose(1, 2).reshape(-1, 2),
    }  # fmt: skip
    for name, t in law_arguments(form, listed).items():
        call[name] = t if name == "draft_vocab" else t.repeat(b, 1)
    return call, b // 2


@pytest.mark.op("mtp_verify_tree")
@pytest.mark.parametrize("form", ["certain", "sparse", "mapped"])
def test_trees(backend, form):
    call, pairs = trees(form)
    want = reference_verify.mtp_verify_tree(**call)
    assert_asks(want[0].tolist(), pairs)
    assert_agree(verify_tree(**on_device(call)), want, ("tokens", "num_emitted", "rows", "logprobs", "flags"))


# ---------------------------------------------------------------- modes that are not exact


def lossy(row: list[float], drafts: list[int], **options) -> dict[str, object]:
    """A request for each draft, all with the same row."""
    b = len(drafts)
    logits = (spread(torch.tensor([row], dtype=torch.float64), TOKENS).log() * TARGET_T).float()
    draft_tokens = torch.tensor([t for d in drafts for t in (d, -1)], dtype=INT)
    return {
        "logits": logits.repeat(2 * b, 1), "draft_tokens": draft_tokens,
        "cu_rows": torch.arange(0, 2 * b + 1, 2, dtype=INT), "max_drafts": 1, "allow_lossy": True, **by_slot(b),
        **options,
    }  # fmt: skip


@pytest.mark.op("mtp_verify")
def test_relaxed(backend):
    """Of equals (3 and 4098) the lower id comes first."""
    row = [0.30, 0.10, 0.20, 0.05, 0.25, 0.10]
    for top_k, delta, accepted in (
        (3, 1.0, [1, 5, 4097]), (2, 1.0, [1, 4097]), (6, 0.2001, [1, 3, 5, 4097, 4098]), (6, 0.1999, [1, 5, 4097]),
        (4, 0.2001, [1, 3, 5, 4097]),
    ):  # fmt: skip
        call = lossy(row, [*TOKENS, IMPOSSIBLE], mode="relaxed", relaxed_top_k=top_k, relaxed_delta=delta)
        want = reference_verify.mtp_verify(**call)
        assert [t for t, n in zip(TOKENS, want[1].tolist(), strict=False) if n == 2] == accepted
        assert_agree(verify(**on_device(call)), want, NAMES)


@pytest.mark.op("mtp_verify")
def test_typical(backend):
    """The bar is the smaller one of two, each from both sides of p = 0.15."""
    row = P[0].tolist()
    entropy = -sum(p * math.log(p) for p in row)
    for epsilon, delta in ((0.15, 9.0), (0.9, 0.15 * math.exp(entropy))):
        for near, emitted in ((1 - NEAR, 2), (1 + NEAR, 1)):
            options = {"typical_epsilon": epsilon * near, "typical_delta": delta * near}
            call = lossy(row, [5, 1], mode="typical", **options)
            want = reference_verify.mtp_verify(**call)
            assert want[1].tolist() == [emitted, 2]
            assert_agree(verify(**on_device(call)), want, NAMES)
