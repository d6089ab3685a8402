from __future__ import annotations

import itertools

import pytest
import torch
from conftest import DEVICE, fenced
from laws import HIGH, LOW, Toy, bisect
from test_laws import EXACT, generator, not_interpreted

from n3kernels import use_backend
from n3kernels.mtp import reference_verify, verify, verify_tree

OPS = ("mtp_verify_tree",)


def ints(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def longs(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64, device=DEVICE)


# ---------------------------------------------------------------- the law


def first_token(toy: Toy, siblings: list[tuple], weights: list[float], laws: dict) -> torch.Tensor:
    """The law of the first emitted token, the children of the root drawn as ``siblings`` with ``weights``."""
    m, n = len(siblings[0]), len(siblings)
    nodes = torch.tensor([(0, *s) for s in siblings], dtype=torch.int32, device=DEVICE)
    logits = toy.logits[()].expand(n * (m + 1), -1).to(DEVICE)

    def run(uniforms):
        laws_of_all = {name: t.expand(n * (m + 1), -1) for name, t in laws.items()}
        tokens, count, rows, *_ = verify_tree(
            logits.contiguous(), nodes.flatten(), ints(*[-1, *[0] * m] * n), torch.arange(0, n * (m + 1) + 1, m + 1,
            dtype=torch.int32, device=DEVICE), longs(*[0] * n), longs(*[0] * n), mode="token", max_depth=1,
            uniforms=uniforms.to(DEVICE).flatten(0, 1), **laws_of_all, **toy.options(n, DEVICE),
        )  # fmt: skip
        return tokens.cpu(), count.cpu(), rows.cpu()

    law, left = torch.zeros(toy.vocab, dtype=torch.float64), torch.tensor(weights, dtype=torch.float64)
    base = torch.arange(0, n * (m + 1), m + 1)
    for j in range(1, m + 1):

        def accepted(u, j=j):
            uniforms = torch.full((n, m + 1, 2), HIGH, dtype=torch.float64)
            uniforms[:, j, 0] = u
            return run(uniforms)[2][:, 1] == base + j

        share = bisect(accepted, (n,))
        for b, s in enumerate(siblings):
            law[s[j - 1]] += left[b] * share[b]
        left = left * (1 - share)
    ends = torch.ones(n, toy.vocab, dtype=torch.float64)
    for token in range(toy.vocab - 1):

        def at_most(u, token=token):
            uniforms = torch.full((n, m + 1, 2), HIGH, dtype=torch.float64)
            uniforms[:, 0, 1] = u
            tokens, count, _ = run(uniforms)
            return (count == 1) & (tokens[:, 0] <= token)

        ends[:, token] = bisect(at_most, (n,))
    steps = ends.diff(dim=1, prepend=torch.zeros(n, 1, dtype=torch.float64))
    return law + (left[:, None] * steps).sum(0)


def error(toy: Toy, m: int) -> float:
    q = toy.q[()]
    siblings = [s for s in itertools.product(range(toy.vocab), repeat=m) if all(q[d] > 0 for d in s)]
    weights = [float(q[list(s)].double().prod()) for s in siblings]
    probs, ids = q.topk(int((q > 0).sum()))
    laws = {"draft_ids": ids.int()[None].to(DEVICE), "draft_probs": probs[None].to(DEVICE)}
    return float((first_token(toy, siblings, weights, laws) - toy.p[()]).abs().sum()) / 2


@pytest.mark.parametrize("m", [1, 2, 3])
def test_siblings_drawn_independently(backend, m):
    not_interpreted(backend)
    assert error(Toy(4, 0, support=3, generator=generator(m)), m) <= EXACT


def test_distinct_siblings_without_a_law(backend):
    not_interpreted(backend)
    toy = Toy(4, 0, generator=generator(2))
    assert float((first_token(toy, [(2, 0, 3)], [1.0], {}) - toy.p[()]).abs().sum()) / 2 <= EXACT


def test_siblings_without_an_update_are_caught(monkeypatch):
    monkeypatch.setattr(reference_verify, "residual", lambda p, q: p)
    with use_backend("reference"):
        assert error(Toy(4, 0, support=3, generator=generator(2)), 2) > 1e-3


# ---------------------------------------------------------------- chains, paths, edges


@pytest.mark.parametrize("mode", ["greedy", "coupled"])
def test_a_tree_without_branches_is_a_chain(backend, mode):
    g, vocab, k, b = generator(0), 37, 3, 12
    logits = (3 * torch.randn(b * (k + 1), vocab, generator=g)).to(DEVICE)
    likely = logits.topk(2, dim=1).indices
    drafts = likely[torch.arange(len(logits)), torch.randint(0, 2, (len(logits),), generator=g)].int()
    drafts.view(b, k + 1)[:, k] = -1
    cu_rows = torch.arange(0, b * (k + 1) + 1, k + 1, dtype=torch.int32, device=DEVICE)
    seed, pos = torch.arange(b, device=DEVICE), torch.arange(b, device=DEVICE) * 7
    options = {"mode": mode, "temperature": torch.linspace(0, 2, b, device=DEVICE), "eos_ids": ints(3)}
    want = verify(logits, drafts, cu_rows, seed, pos, max_drafts=k, **options)
    nodes = drafts.view(b, k + 1).roll(1, 1).contiguous().flatten()
    parents = torch.arange(-1, k, dtype=torch.int32, device=DEVICE).repeat(b)
    got = verify_tree(logits, nodes, parents, cu_rows, seed, pos, max_depth=k, **options)
    for name, a, e in zip(("tokens", "num_emitted", "", "logprobs", "flags"), got, want, strict=True):
        assert not name or torch.equal(a, e), name
    last = got[2].gather(1, got[1].long()[:, None] - 1)[:, 0]
    assert torch.equal(last, want[2])


def test_the_path_of_a_wide_tree(backend):
    #        0
    #     1     2        the target wants token 6 after the root, 7 after node 2, 9 after node 4
    #    3     4  5
    logits = torch.zeros(6, 10, device=DEVICE)
    for row, token in enumerate([6, 1, 7, 1, 9, 1]):
        logits[row, token] = 50.0
    nodes, parents = ints(0, 5, 6, 7, 7, 7), ints(-1, 0, 0, 1, 2, 2)
    for mode in ("greedy", "coupled", "token"):
        tokens, count, rows, logprobs, flags = verify_tree(
            logits, nodes, parents, ints(0, 6), longs(0), longs(0), mode=mode, max_depth=3
        )
        assert tokens.tolist() == [[6, 7, 9, -1]] and count.tolist() == [3]
        assert rows.tolist() == [[0, 2, 4, -1]] and flags.tolist() == [0]
    tokens = verify_tree(logits, nodes, parents, ints(0, 6), longs(0), longs(0), max_depth=1)[0]
    assert tokens.tolist() == [[6, 7]]


def test_padding_and_what_is_no_node(backend):
    logits = fenced(torch.zeros(4, 5).to(DEVICE))
    logits[:, 2] = 9.0
    nodes, parents = ints(0, 2, -1, 99), ints(-1, 5, 0, 0)  # a parent past its child, no token, a token past V
    tokens, count, rows, _, flags = verify_tree(
        logits, nodes, parents, ints(0, 4, 4), longs(0, 0), longs(0, 0), max_depth=1
    )
    assert tokens.tolist() == [[2, -1], [-1, -1]] and count.tolist() == [1, 0]
    assert rows.tolist() == [[0, -1], [-1, -1]] and flags.tolist() == [8, 0]
    slots = ints(-1, 7)
    *_, flags = verify_tree(logits, nodes, parents, ints(0, 2, 4), longs(0, 0), longs(0, 0), max_depth=1, slot=slots)
    assert flags.tolist() == [0, 8]


def test_the_smallest_uniform_does_not_accept_the_impossible(backend):
    logits = torch.tensor([[0.0, 5.0, -torch.inf]], device=DEVICE).repeat(2, 1)
    uniforms = torch.full((2, 2), LOW, dtype=torch.float64, device=DEVICE)
    tokens, count, *_ = verify_tree(
        logits, ints(0, 2), ints(-1, 0), ints(0, 2), longs(0), longs(0), mode="token", max_depth=1, uniforms=uniforms
    )
    assert count.tolist() == [1] and tokens[0, 0].item() == 0


BAD = {
    "node_tokens must have shape [2], got [1]": {"node_tokens": torch.zeros(1, dtype=torch.int32)},
    "parents must be int32, got int64": {"parents": torch.zeros(2, dtype=torch.int64)},
    "mode must be one of greedy, coupled, token, got block": {"mode": "block"},
    "max_depth must be at least 0, got -1": {"max_depth": -1},
    "draft_ids must be None in mode greedy": {"draft_ids": torch.zeros(2, 1, dtype=torch.int32)},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_calls(backend, message):
    good = {
        "logits": torch.zeros(2, 4, device=DEVICE), "node_tokens": ints(0, 1), "parents": ints(-1, 0),
        "cu_rows": ints(0, 2), "seed": longs(0), "pos": longs(0), "max_depth": 1,
    }  # fmt: skip
    bad = {n: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for n, v in BAD[message].items()}
    with pytest.raises(RuntimeError) as raised:
        verify_tree(**good | bad)
    assert str(raised.value).splitlines()[0] == f"n3::mtp_verify_tree: {message}"
