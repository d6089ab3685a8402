"""Draft verification against the usual pipelines: filters by sorting, softmax, ratio test and multinomial in plain
torch; transformers' _speculative_sampling, request by request; and the least that either does, one softmax."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch

from ..conftest import DEVICE, providers, sizes
from .bench_sample import DTYPES, FILTERS, NAMES, filters, logits_like_a_models, plain_filters

REQUESTS = (1, 8, 32)
DRAFTS = 3
MODES = ("greedy", "coupled", "token", "block")


@lru_cache(1)
def problem(requests: int, dtype: torch.dtype):
    """The first draft is likely, and the others are as good: rows' best tokens, drawn for certain."""
    rows = requests * (DRAFTS + 1)
    logits = logits_like_a_models(rows, dtype)
    drafts = logits.float().argmax(1).to(torch.int32)
    drafts[DRAFTS :: DRAFTS + 1] = -1
    cu_rows = torch.arange(0, rows + 1, DRAFTS + 1, dtype=torch.int32, device=DEVICE)
    return logits, drafts, cu_rows, torch.arange(requests, device=DEVICE)


def n3_verify(logits, drafts, cu_rows, seed, mode, options):
    return torch.ops.n3.mtp_verify.default(
        logits, drafts, cu_rows, seed, seed, mode=mode, max_drafts=DRAFTS, **options
    )[1]


def plain_verify(logits, drafts, mode, numbers):
    """All rows at once, as batched engines do it; a certain draft is accepted with its own probability."""
    wanted = drafts.view(-1, DRAFTS + 1)
    if mode == "greedy":
        hits = logits.argmax(-1).view_as(wanted) == wanted
        return hits[:, :-1].int().cumprod(1).sum(1) + 1
    p = plain_filters(logits, **numbers).softmax(-1)
    at = wanted.flatten().clamp(min=0).long()[:, None]
    accepted = torch.rand(len(p), 1, device=p.device) < p.gather(1, at)
    tau = accepted.view_as(wanted)[:, :-1].int().cumprod(1).sum(1)
    last = torch.arange(len(wanted), device=p.device) * (DRAFTS + 1) + tau
    left = p[last]
    left.scatter_(1, at[last], torch.where(tau[:, None] < DRAFTS, 0.0, left.gather(1, at[last])))
    torch.multinomial(left, 1)
    return tau + 1


def transformers_verify(logits, drafts, mode, numbers):
    """q is a one-hot row for each draft, as logits."""
    from transformers.generation.utils import _speculative_sampling

    counts = []
    for x, wanted in zip(logits.unflatten(0, (-1, DRAFTS + 1)), drafts.view(-1, DRAFTS + 1).long(), strict=True):
        certain = torch.full((1, DRAFTS, x.shape[1]), -torch.inf, device=x.device)
        certain[0, torch.arange(DRAFTS), wanted[:DRAFTS]] = 0.0
        counts.append(_speculative_sampling(wanted[None, :DRAFTS], certain, DRAFTS, x[None].float())[1] + 1)
    return torch.stack(counts)


def one_softmax(logits, drafts, mode, numbers):
    logits.float().softmax(-1)
    return torch.ones(len(drafts) // (DRAFTS + 1), device=logits.device)


BASELINES = {"torch": plain_verify, "transformers": transformers_verify, "softmax": one_softmax}


def providers_of() -> list[str]:
    return [p for p in providers("mtp_verify", *BASELINES) if p != "reference"]


@pytest.mark.parametrize("provider", providers_of())
@pytest.mark.parametrize("name", ["none", "top_k+top_p"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
@pytest.mark.parametrize("requests", sizes(REQUESTS, quick=[8], full=[32]))
def test_mtp_verify(measure, requests, dtype, mode, name, provider):
    """What is checked is that every request emits 1 to DRAFTS + 1 tokens."""
    if (provider == "transformers" and (mode, name) != ("token", "none")) or (mode == "greedy" and name != "none"):
        pytest.skip("another task")
    if provider == "torch" and mode in ("coupled", "block"):
        pytest.skip("has the ratio test alone")
    logits, drafts, cu_rows, seed = problem(requests, dtype)
    numbers, baseline = FILTERS[name], BASELINES.get(provider)
    options = filters(requests, numbers)
    args = [logits, drafts, mode, numbers] if baseline else [logits, drafts, cu_rows, seed, mode, options]
    measure(
        "mtp_verify", provider, baseline or n3_verify, args, torch.ones(requests, device=DEVICE),
        value=lambda out: ((out >= 1) & (out <= DRAFTS + 1)).float(),
        group=f"mtp_verify {mode} {name} B={requests} k={DRAFTS} {dtype}".replace("torch.", ""),
        bytes=logits.numel() * logits.element_size(), flops=20 * logits.numel(), dtype=torch.float32, tolerance=0.0,
    )  # fmt: skip
