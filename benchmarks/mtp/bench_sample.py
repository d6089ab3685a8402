"""Sampling against the usual pipeline of plain torch: temperature, top-k, a sort for top-p, softmax, multinomial."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch

from n3kernels.mtp import reference

from ..conftest import DEVICE, providers, sizes

VOCAB = 131072
ROWS = (1, 8, 32)
DTYPES = [torch.bfloat16, torch.float32]
NAMES = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
FILTERS = {
    "greedy": {"temperature": 0.0}, "none": {}, "top_p": {"temperature": 0.8, "top_p": 0.95},
    "top_k+top_p": {"temperature": 0.8, "top_k": 50, "top_p": 0.95},
}  # fmt: skip


def logits_like_a_models(rows: int, dtype: torch.dtype) -> torch.Tensor:
    """Some tens of likely tokens before a broad tail."""
    logits = 2.0 * torch.randn(rows, VOCAB, device=DEVICE)
    logits[:, :40] += 4 + 10 * torch.rand(rows, 40, device=DEVICE)
    return logits[:, torch.randperm(VOCAB, device=DEVICE)].to(dtype)


def filters(n: int, numbers: dict[str, float]) -> dict[str, torch.Tensor]:
    types = {"top_k": torch.int32}
    return {
        name: torch.full((n,), value, dtype=types.get(name, torch.float32), device=DEVICE)
        for name, value in numbers.items()
    }


def plain_filters(x: torch.Tensor, temperature=1.0, top_k=0, top_p=1.0) -> torch.Tensor:
    x = x.float() / temperature
    if top_k:
        x = x.masked_fill(x < x.topk(top_k, dim=-1).values[:, -1:], -torch.inf)
    if top_p < 1:
        values, order = x.sort(dim=-1, descending=True)
        mass = values.softmax(-1)
        values = values.masked_fill(mass.cumsum(-1) - mass >= top_p, -torch.inf)
        x = torch.full_like(x, -torch.inf).scatter_(1, order, values)
    return x


def plain_sample(x, numbers):
    if numbers.get("temperature") == 0.0:
        return x.argmax(-1), None, None
    return torch.multinomial(plain_filters(x, **numbers).softmax(-1), 1)[:, 0], None, None


def n3_sample(x, seed, pos, options):
    return torch.ops.n3.sample.default(x, seed, pos, **options)


@lru_cache(1)
def problem(rows: int, dtype: torch.dtype, name: str):
    logits, options = logits_like_a_models(rows, dtype), filters(rows, FILTERS[name])
    seed = torch.arange(rows, device=DEVICE)
    return logits, seed, options, reference.target_logprobs(logits, **options) > -torch.inf


@pytest.mark.parametrize("provider", [p for p in providers("sample", "torch") if p != "reference"])
@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
@pytest.mark.parametrize("rows", sizes(ROWS, quick=[8], full=[32]))
def test_sample(measure, rows, dtype, name, provider):
    """What is checked is that every token is one of those that the filters keep."""
    logits, seed, options, kept = problem(rows, dtype, name)
    args = [logits, FILTERS[name]] if provider == "torch" else [logits, seed, seed, options]
    measure(
        "sample", provider, plain_sample if provider == "torch" else n3_sample, args,
        torch.ones(rows, device=DEVICE), value=lambda out: kept.gather(1, out[0].long()[:, None])[:, 0].float(),
        group=f"sample {name} rows={rows} {dtype}".replace("torch.", ""),
        bytes=logits.numel() * logits.element_size(), flops=20 * logits.numel(), dtype=torch.float32, tolerance=0.0,
    )  # fmt: skip


# ---------------------------------------------------------------- drafts

MAX_IDS = 32


def n3_draft(logits, seed, pos):
    return torch.ops.n3.mtp_draft_sample.default(logits, seed, pos, max_ids=MAX_IDS)[2]


def plain_draft(logits, seed, pos):
    probs = logits.float().topk(MAX_IDS, dim=-1).values.softmax(-1)
    torch.multinomial(probs, 1)
    return probs


@pytest.mark.parametrize("provider", [p for p in providers("mtp_draft_sample", "torch") if p != "reference"])
@pytest.mark.parametrize("rows", sizes(ROWS, quick=[8], full=[32]))
def test_mtp_draft_sample(measure, rows, provider):
    """What is checked is the published law."""
    logits, seed = logits_like_a_models(rows, torch.bfloat16), torch.arange(rows, device=DEVICE)
    truth = logits.double().topk(MAX_IDS, dim=-1).values.softmax(-1)
    measure(
        "mtp_draft_sample", provider, plain_draft if provider == "torch" else n3_draft, [logits, seed, seed], truth,
        group=f"mtp_draft_sample M={MAX_IDS} rows={rows} bfloat16", bytes=2 * logits.numel(),
        flops=2 * logits.numel(), dtype=torch.float32, tolerance=1e-6,
    )  # fmt: skip
