"""Every kernel of verification emits the definition's tokens: all modes, laws of drafts and edits of rows."""

from __future__ import annotations

import random

import pytest
import torch
from conftest import DEVICE, assert_close_to, fenced

from n3kernels.mtp import reference_verify, verify, verify_tree

OPS = ("mtp_verify", "mtp_verify_tree")
INT, INF = torch.int32, float("inf")
EOS = 3


def on_device(kwargs):
    return {k: fenced(v.to(DEVICE)) if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}


def some_logits(rng, n, vocab):
    """Ties, in some calls everywhere; in one call of three NaN, infinities, and rows without support."""
    x = rng.choice([1, 3]) * torch.randn(n, vocab)
    x = x.where(torch.rand(n, vocab) < rng.choice([0.0, 0.7]), x.round())
    if n and rng.random() < 0.33:
        bad = torch.tensor([float("nan"), -INF, -INF])[torch.randint(3, x.shape)]
        x = bad.where(torch.rand(n, 1) * torch.rand(n, vocab) < 0.1, x)
        x[rng.randrange(n)] = x[rng.randrange(n)] if rng.random() < 0.5 else -INF
        if rng.random() < 0.3:
            x[rng.randrange(n), rng.randrange(vocab)] = INF
    return x.bfloat16()


def edits(rng, n, vocab):
    words = (vocab + 31) // 32
    masks = torch.randint(-(2**31), 2**31 - 1, (3, words), dtype=INT)
    masks[2] = 0
    cu = torch.tensor(sorted([0, *[rng.randint(0, 6) for _ in range(n - 1)], 6][: n + 1]), dtype=INT)
    options = {
        "bitmask": masks, "bitmask_row": torch.tensor([rng.choice([-1, -1, 0, 1, 2, 9]) for _ in range(n)], dtype=INT),
        "forced_token": torch.tensor([rng.choice([-1] * 12 + [1, vocab]) for _ in range(n)], dtype=INT),
        "bias_ids": torch.randint(0, vocab, (6,), dtype=INT), "bias_val": torch.randn(6), "bias_cu": cu,
    }  # fmt: skip
    keep = rng.choice([(), ("bitmask", "bitmask_row"), ("forced_token",), ("bias_ids", "bias_val", "bias_cu"), options])
    return {name: options[name] for name in keep}


def parameters(rng, slots):
    options = {
        "temperature": torch.tensor([rng.choice([0.0, 0.6, 1.0, 1.0, 1.7]) for _ in range(slots)]),
        "top_k": torch.tensor([rng.choice([0, 4, 9]) for _ in range(slots)], dtype=INT),
        "top_p": torch.tensor([rng.choice([1.0, 0.8]) for _ in range(slots)]),
        "min_p": torch.tensor([rng.choice([0.0, 0.05]) for _ in range(slots)]),
    }  # fmt: skip
    return {k: v for k, v in options.items() if rng.random() < 0.6}


def laws(rng, form, logits, slots):
    """The law of each draft, not far from the target's, and tokens drawn from it: many drafts are accepted."""
    n, vocab = logits.shape
    near = logits.float().nan_to_num(-4, 4, -4) + 0.4 * torch.randn(n, vocab)
    if form == "certain":
        return {}, near.topk(min(2, vocab), dim=1).indices
    reduced = rng.random() < 0.4
    own = max(vocab * 2 // 3, 2) if reduced else vocab
    words = torch.randint(0, vocab + 1, (own,), dtype=INT) if reduced else torch.arange(vocab, dtype=INT)
    out = {"draft_vocab": words} if reduced else {}
    scores = torch.cat([near, torch.full((n, 1), -1.0)], 1)[:, words.long()]  # a word past the vocabulary among them
    if form == "sparse":
        best = scores.topk(min(5, own), dim=1)
        order = torch.rand(best.indices.shape).argsort(1)
        ids, scores = best.indices.gather(1, order).to(INT), best.values.gather(1, order)
        there = torch.rand(ids.shape) < 0.9
        out |= {"draft_probs": scores.softmax(1), "draft_ids": ids.where(there, -1)}
        drawn = (scores.where(there, -INF) - torch.rand(ids.shape).log().neg().log()).topk(min(2, own), dim=1).indices
        return out, words[ids.gather(1, drawn).long()]
    out["draft_logits"] = scores.to(rng.choice([torch.float32, torch.bfloat16]))
    if rng.random() < 0.5:
        out["draft_temperature"] = torch.tensor([rng.choice([0.0, 0.8, 1.0, 1.5]) for _ in range(slots)])
    return out, words[(scores - torch.rand(scores.shape).log().neg().log()).topk(min(2, own), dim=1).indices]


def uniforms(rng, mode, n):
    given = mode in ("token", "block") and rng.random() < 0.3
    return {"uniforms": torch.rand(n, 2, dtype=torch.float64)} if given else {}


def a_call(seed, mode, form, vocab, requests, max_drafts):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    counts = [rng.choice([0, 1, *[max_drafts + 1] * 5, max_drafts + 2]) for _ in range(requests)]
    n, slots = sum(counts), requests + 1
    logits = some_logits(rng, n, vocab)
    law, likely = laws(rng, form, logits, slots)
    drafts = [rng.choice([int(likely[r, 0])] * 20 + [int(likely[r, -1]), -1, EOS, vocab + 2]) for r in range(n)]
    return {
        "logits": logits, "draft_tokens": torch.tensor(drafts, dtype=INT),
        "cu_rows": torch.tensor([0, *torch.tensor(counts).cumsum(0)], dtype=INT),
        "seed": torch.randint(0, 2**62, (slots,)), "pos": torch.randint(0, 2**40, (requests,)), "mode": mode,
        "max_drafts": max_drafts, "eos_ids": torch.tensor([EOS], dtype=INT),
        "slot": torch.tensor([rng.choice([*[b] * 8, slots - 1, -1, slots]) for b in range(requests)], dtype=INT),
        **parameters(rng, slots), **edits(rng, n, vocab), **law, **uniforms(rng, mode, n),
    }  # fmt: skip


def assert_agree(got, want, names, lazy=False):
    for name, a, e in zip(names, got, want, strict=True):
        if name == "logprobs":
            assert torch.equal(a.isinf(), e.isinf())
            assert_close_to(a.nan_to_num(neginf=0.0), e.nan_to_num(neginf=0.0), acc=2e-6)
        elif name == "flags" and lazy:  # a kernel may stop where nothing can be accepted any more
            assert not (a & ~e).any()
        else:
            assert a.tolist() == e.tolist(), name


def calls(backend):
    """Of a seed each; Triton's interpreter takes half a second for one. Formulas are asked by
    test_verify_thresholds.py; these are for edits, filters, ties, odd rows and their company."""
    return 10 if backend == "triton" and DEVICE == "cpu" else 60


NAMES = ("tokens", "num_emitted", "last_row", "logprobs", "flags")
FORMS = [("token", "certain"), ("token", "sparse"), ("token", "dense"), ("block", "certain"), ("block", "sparse"),
         ("block", "dense"), ("coupled", "certain"), ("relaxed", "certain"), ("typical", "certain")]  # fmt: skip
LOSSY = {
    "relaxed": {"allow_lossy": True, "relaxed_top_k": 3, "relaxed_delta": 0.15},
    "typical": {"allow_lossy": True, "typical_epsilon": 0.2, "typical_delta": 0.3},
}


@pytest.mark.op("mtp_verify")
@pytest.mark.parametrize("mode, form", FORMS)
@pytest.mark.parametrize("many", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_small_vocabularies(backend, mode, form, many):
    for seed in range(250, 290) if many else range(calls(backend)):
        call = on_device(a_call(seed, mode, form, 43, 3, 3) | LOSSY.get(mode, {}))
        want = reference_verify.mtp_verify(**call)
        try:
            assert_agree(verify(**call), want, NAMES, lazy=mode == "block")
        except AssertionError as error:
            raise AssertionError(f"seed {seed}") from error


@pytest.mark.op("mtp_verify")
@pytest.mark.parametrize("mode, form", FORMS)
@pytest.mark.parametrize("many", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_several_tiles(backend, mode, form, many):
    for seed in range(2, 10) if many else range(2):
        call = on_device(a_call(100 + seed, mode, form, 9000, 2, 2) | LOSSY.get(mode, {}))
        want = reference_verify.mtp_verify(**call)
        assert_agree(verify(**call), want, NAMES, lazy=mode == "block")


@pytest.mark.op("mtp_verify")
def test_the_entropy_is_that_of_all_tiles(backend):
    """Two tokens share the mass, each in a tile of its own; the bar lies just above the second one's 0.3775."""
    logits = torch.full((2, 9000), -INF)
    logits[:, 5], logits[:, 8000] = 2.0, 1.5
    call = on_device({
        "logits": logits, "draft_tokens": torch.tensor([8000, -1], dtype=INT),
        "cu_rows": torch.tensor([0, 2], dtype=INT), "seed": torch.tensor([1]), "pos": torch.tensor([0]),
    })  # fmt: skip
    for delta, emitted in ((0.78, 1), (0.72, 2)):  # exp(-H) is 0.5154
        options = {"allow_lossy": True, "typical_epsilon": 0.9, "typical_delta": delta}
        assert verify(**call, mode="typical", max_drafts=1, **options)[1].tolist() == [emitted]


# ---------------------------------------------------------------- trees


def a_tree(seed, mode, form, vocab, requests, nodes):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    counts = [rng.choice([0, 2, *[nodes] * 4]) for _ in range(requests)]
    n, slots = sum(counts), requests + 1
    logits = some_logits(rng, n, vocab)
    law, likely = laws(rng, form, logits, slots)
    parents, tokens = [], []
    for count in counts:
        first = len(parents)
        for j in range(count):
            parents.append(rng.choice([-1, j, j + 1]) if j == 0 or rng.random() < 0.05 else rng.randrange(j))
            row = likely[first + min(max(parents[-1], 0), count - 1)].tolist()
            tokens.append(rng.choice([*row * 12, -1, EOS, vocab + 1]))
    return {
        "logits": logits, "node_tokens": torch.tensor(tokens, dtype=INT), "parents": torch.tensor(parents, dtype=INT),
        "cu_rows": torch.tensor([0, *torch.tensor(counts).cumsum(0)], dtype=INT),
        "seed": torch.randint(0, 2**62, (slots,)), "pos": torch.randint(0, 2**40, (requests,)), "mode": mode,
        "max_depth": rng.randint(0, 4), "eos_ids": torch.tensor([EOS], dtype=INT),
        "slot": torch.tensor([rng.choice([*[b] * 8, slots - 1, -1, slots]) for b in range(requests)], dtype=INT),
        **parameters(rng, slots), **edits(rng, n, vocab), **law, **uniforms(rng, mode, n),
    }  # fmt: skip


TREES = [("greedy", "certain"), ("coupled", "certain"), ("token", "certain"), ("token", "sparse")]


@pytest.mark.op("mtp_verify_tree")
@pytest.mark.parametrize("mode, form", TREES)
@pytest.mark.parametrize("vocab", [29, 9000])
@pytest.mark.parametrize("many", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_trees(backend, mode, form, vocab, many):
    count = (80 if many else calls(backend) * 3 // 5) if vocab == 29 else 6 if many else 2
    for seed in range(1000 * many, 1000 * many + count):
        call = on_device(a_tree(seed, mode, form, vocab, 3, 7))
        want = reference_verify.mtp_verify_tree(**call)
        try:
            assert_agree(verify_tree(**call), want, ("tokens", "num_emitted", "rows", "logprobs", "flags"))
        except AssertionError as error:
            raise AssertionError(f"seed {seed}") from error
