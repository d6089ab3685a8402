"""Verification emits the target's law: integrated to 1e-6, jointly over k + 1 tokens; wrong builds are caught."""

from __future__ import annotations

import laws
import pytest
import torch
from conftest import DEVICE
from laws import Toy, emitted, total_variation

from n3kernels import use_backend
from n3kernels.mtp import reference_verify

OPS = ("mtp_verify",)
EXACT = 1e-6
FILTERS = {
    "none": {}, "temperature": {"temperature": 0.6}, "top_k": {"top_k": 3}, "top_p": {"top_p": 0.7},
    "all": {"temperature": 1.4, "top_k": 4, "top_p": 0.9, "min_p": 0.05},
}  # fmt: skip


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def not_interpreted(backend: str) -> None:
    if backend == "triton" and DEVICE == "cpu":
        pytest.skip("minutes in Triton's interpreter, which has test_a_small_law")


def distance(toy: Toy, mode: str, form: str) -> float:
    return total_variation(emitted(toy, mode, form), toy.plain(toy.depth + 1))


@pytest.mark.parametrize("mode", ["token", "block"])
@pytest.mark.parametrize("form", ["one-hot", "sparse", "dense"])
@pytest.mark.parametrize("depth", [1, 2])
def test_the_law_is_the_targets(backend, mode, form, depth):
    not_interpreted(backend)
    support = None if form == "one-hot" else 3
    toy = Toy(4 if depth == 1 else 3, depth, support=support, generator=generator(depth))
    assert distance(toy, mode, form) <= EXACT


@pytest.mark.parametrize("mode", ["token", "block"])
@pytest.mark.parametrize("filters", FILTERS)
def test_the_law_is_the_processed_one(backend, mode, filters):
    not_interpreted(backend)
    toy = Toy(5, 1, support=3, filters=FILTERS[filters], generator=generator(7))
    assert distance(toy, mode, "sparse") <= EXACT


@pytest.mark.parametrize("mode", ["token", "block"])
def test_a_small_law(backend, mode, monkeypatch):
    """Few calls, with as few steps of the bisection as 1e-6 allows."""
    monkeypatch.setattr(laws, "STEPS", 22)
    toy = Toy(3, 1, support=2, filters={"temperature": 0.8}, generator=generator(9))
    assert distance(toy, mode, "sparse") <= EXACT


def test_three_drafts_of_context_dependent_models(backend):
    not_interpreted(backend)
    assert distance(Toy(2, 3, support=2, generator=generator(5)), "block", "sparse") <= EXACT


# ---------------------------------------------------------------- wrong builds


def _no_residual(p, q):
    return p


def _not_enough(p, q):
    left = (p - 0.5 * q).clamp(min=0)
    return left if left.sum() > 0 else p


WRONG = {
    "the residual is p": ("residual", _no_residual),
    "half of q is taken away": ("residual", _not_enough),
    "a draft is accepted twice as often": ("accepts", lambda u, p, q: p > 0 and u * q < 2 * p),
    "q is ignored": ("accepts", lambda u, p, q: u < p),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_build_is_caught(monkeypatch, wrong):
    name, fn = WRONG[wrong]
    monkeypatch.setattr(reference_verify, name, fn)
    with use_backend("reference"):
        assert distance(Toy(3, 2, support=2, generator=generator(3)), "token", "sparse") > 1e-3


def test_a_draft_without_probability_is_never_accepted(backend):
    """Whatever the uniform, also the smallest."""
    not_interpreted(backend)
    toy = Toy(4, 1, support=4, filters={"top_k": 1}, generator=generator(11))
    assert distance(toy, "token", "sparse") <= EXACT
