from __future__ import annotations

import pytest
import torch
from conftest import DEVICE, fenced
from hypothesis import given
from hypothesis import strategies as st

from n3kernels.mtp import draft_sample

OPS = ("mtp_draft_sample",)


def draw(logits, max_ids, seed=0, temperature=1.0, **options):
    n = len(logits)
    return draft_sample(
        logits, torch.full((n,), seed, dtype=torch.int64, device=DEVICE), torch.arange(n, device=DEVICE),
        max_ids=max_ids, temperature=torch.full((n,), temperature, device=DEVICE), **options,
    )  # fmt: skip


@given(st.integers(0, 4), st.integers(1, 90), st.integers(1, 64), st.sampled_from([0.3, 1.0, 4.0]),
       st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))  # fmt: skip
def test_publishes_the_cut_law(backend, n, vocab, m, temperature, dtype):
    logits = fenced((3 * torch.randn(n, vocab)).to(DEVICE, dtype))
    tokens, ids, probs = draw(logits, m, temperature=temperature)
    kept = min(m, vocab)
    order = logits.double().cpu().sort(dim=1, descending=True, stable=True).indices[:, :kept]
    law = (logits.double().cpu() / temperature).softmax(1).gather(1, order)
    law = law / law.sum(1, keepdim=True)
    assert torch.equal(ids[:, :kept].cpu().long(), order) and (ids[:, kept:] == -1).all()
    assert ((probs[:, :kept].cpu() - law).abs() <= 1e-6 * law + 1e-9).all() and (probs[:, kept:] == 0).all()
    assert all(t in row for t, row in zip(tokens.tolist(), ids.tolist(), strict=True))


def test_draws_from_the_published_law(backend):
    """Chi-square over 6000 draws of one law, at the level 1e-6; Triton's interpreter has time for 90."""
    n = 90 if backend == "triton" and DEVICE == "cpu" else 6000
    tokens, ids, probs = draw(torch.tensor([[2.0, 0.0, 1.0, -1.0, 2.0]], device=DEVICE).repeat(n, 1), 3)
    assert ids[0].tolist() == [0, 4, 2]
    expected = n * probs[0].double().cpu()
    seen = torch.stack([(tokens == i).sum() for i in (0, 4, 2)]).cpu()
    assert seen.sum() == n and ((seen - expected) ** 2 / expected).sum() < 27.6  # 2 degrees of freedom


def test_same_seed_and_position_same_draft(backend):
    logits = torch.randn(6, 50).to(DEVICE)
    seed, pos = torch.arange(6, device=DEVICE), torch.arange(6, device=DEVICE) + 3
    tokens = draft_sample(logits, seed, pos, max_ids=20)[0]
    order = torch.tensor([4, 2, 0, 5, 1, 3], device=DEVICE)
    again = draft_sample(logits[order], seed, pos[order], max_ids=20, slot=order.int())[0]
    assert torch.equal(again, tokens[order])


def test_greedy_ties_and_rows_without_support(backend):
    nan, inf = torch.nan, torch.inf
    logits = torch.tensor([[1.0, 3.0, 3.0], [nan, 1.0, 1.0], [-inf, -inf, -inf], [nan, nan, nan]], device=DEVICE)
    tokens, ids, probs = draw(logits, 2, temperature=0.0)
    assert tokens.tolist() == [1, 1, 0, 0] and ids[:, 0].tolist() == [1, 1, 0, 0]
    assert (ids[:, 1] == -1).all() and probs[:, 0].tolist() == [1.0] * 4
    _, ids, probs = draw(logits, 3)
    assert ids[1].tolist() == [1, 2, -1] and probs[1].tolist() == [0.5, 0.5, 0.0]
    assert ids[2:].tolist() == [[0, -1, -1]] * 2


def test_padding_and_a_smaller_vocabulary(backend):
    logits = torch.tensor([[0.0, 50.0], [50.0, 0.0], [0.0, 0.0]], device=DEVICE)
    words = torch.tensor([100, 7], dtype=torch.int32, device=DEVICE)
    slot = torch.tensor([0, 1, -1], dtype=torch.int32, device=DEVICE)
    zeros = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    tokens, ids, _ = draft_sample(logits, zeros[:2], zeros, max_ids=1, slot=slot, draft_vocab=words)
    assert tokens.tolist() == [7, 100, -1] and ids.tolist() == [[1], [0], [-1]]


BAD = {
    "max_ids must be between 1 and 64, got 0": {"max_ids": 0},
    "max_ids must be between 1 and 64, got 65": {"max_ids": 65},
    "draft_vocab must have shape [4], got [3]": {"draft_vocab": torch.zeros(3, dtype=torch.int32)},
    "temperature must be float32, got float64": {"temperature": torch.ones(2, dtype=torch.float64)},
    "pos must be int64, got int32": {"pos": torch.zeros(2, dtype=torch.int32)},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_calls(backend, message):
    zeros = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    good = {"logits": torch.zeros(2, 4, device=DEVICE), "seed": zeros, "pos": zeros, "max_ids": 2}
    bad = {n: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for n, v in BAD[message].items()}
    with pytest.raises(RuntimeError) as raised:
        draft_sample(**good | bad)
    assert str(raised.value).splitlines()[0] == f"n3::mtp_draft_sample: {message}"
