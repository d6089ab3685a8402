"""Real draws, drafter and verifier together: the first emitted token has the target's law. The laws of test_laws.py
are integrated over explicit uniforms; that the uniforms of drafter and verifier are independent shows only here."""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICE

from n3kernels import _philox, use_backend
from n3kernels.mtp import draft_sample, verify

OPS = ("mtp_verify",)
REQUESTS = 3000
TARGET = torch.tensor([0.05, 0.4, 0.15, 0.1, 0.3])
DRAFTER = torch.tensor([0.5, 0.1, 0.1, 0.25, 0.05])  # far from the target: half of the drafts are rejected


def chi_square(mode: str, requests: int) -> float:
    """Of the first emitted token of requests that differ in their seed alone; 4 degrees of freedom."""
    seed = torch.arange(requests, device=DEVICE) * 7919 + 1
    pos = torch.full((requests,), 12, device=DEVICE)
    drafts, ids, probs = draft_sample(DRAFTER.log().repeat(requests, 1).to(DEVICE), seed, pos, max_ids=5)
    nothing = torch.full_like(drafts, -1)
    pairs = {
        "draft_tokens": torch.stack([drafts, nothing], 1).flatten(),
        "draft_ids": torch.stack([ids, ids], 1).flatten(0, 1),
        "draft_probs": torch.stack([probs, probs], 1).flatten(0, 1),
    }
    cu_rows = torch.arange(0, 2 * requests + 1, 2, dtype=torch.int32, device=DEVICE)
    logits = TARGET.log().repeat(2 * requests, 1).to(DEVICE)
    ones = torch.ones(requests, device=DEVICE)
    tokens = verify(
        logits, pairs.pop("draft_tokens"), cu_rows, seed, pos, mode=mode, max_drafts=1, temperature=ones, **pairs
    )[0]
    counts = torch.bincount(tokens[:, 0].cpu(), minlength=5).double()
    expected = TARGET.double() * requests
    return ((counts - expected) ** 2 / expected).sum().item()


LIMIT = 18.47  # of a chi-square with 4 degrees of freedom, exceeded with probability 1e-3


@pytest.mark.parametrize("mode", ["token", "block"])
def test_real_draws_have_the_law_of_the_target(backend, mode):
    interpreted = backend == "triton" and DEVICE == "cpu"
    assert chi_square(mode, 300 if interpreted else REQUESTS) < LIMIT


@pytest.mark.parametrize("stream", ["ACCEPT", "RESIDUAL"])
def test_noise_shared_with_the_drafter_is_caught(monkeypatch, stream):
    monkeypatch.setattr(_philox, stream, _philox.DRAFT)
    with use_backend("reference"):
        assert chi_square("token", REQUESTS) > LIMIT
