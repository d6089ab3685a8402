"""What the other tests do not reach by size: every row of the Triton tables, and each way to sort."""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICE, assert_close_to, assert_same_bits

import n3kernels
from n3kernels.moe import reference

pytest.importorskip("triton")
from n3kernels.triton_ops.moe import layer, sort  # noqa: E402

OPS = ("latent_moe_front", "latent_moe_tail", "moe_sort")
TOKENS = (1, 2, 17, 40, 100, 130)  # of every row of the tables, the last of two tiles
FLOATS = [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float32, torch.bfloat16)]


def draw(*shape, dtype):
    """A slice of a wider matrix, as of a concatenated weight."""
    return torch.randn(shape[0] + 3, shape[1] + 5).to(DEVICE, dtype)[2:-1, 1:-4]


def test_every_row_is_chosen():
    for arch in (90, 100, 120):
        rows = [layer.config_for(arch, torch.bfloat16, tokens) for tokens in TOKENS]
        assert rows == list(layer.TABLE[arch].values())
        assert len({layer.config_for(arch, torch.bfloat16, tokens, True) for tokens in TOKENS}) == 1


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("dtype, router", FLOATS)
def test_front(tokens, dtype, router):
    width, experts, latent, inner = 150, 37, 33, 70
    x, fc1, up = (draw(n, width, dtype=dtype) for n in (tokens, latent, 2 * inner))
    gate, up = draw(experts, width, dtype=router), up / 8
    logits, z, shared = layer.latent_moe_front(x, gate, fc1, up, activation="silu")
    terms = width**0.5
    assert_close_to(logits / terms, x.double() @ gate.double().t() / terms, 2e-6)
    assert_close_to(z / terms, (x.double() @ fc1.double().t()) / terms, 5e-3 if dtype != torch.float32 else 2e-6)
    truth = reference.activate(x.double() @ up.double().t(), "silu")
    assert_close_to(shared, truth, 2e-5)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_tail(tokens, dtype):
    width, latent, inner = 140, 70, 150
    y, fc2 = draw(tokens, latent, dtype=dtype), draw(width, latent, dtype=dtype)
    shared, down = draw(tokens, inner, dtype=dtype), draw(width, inner, dtype=dtype)
    residual = draw(tokens, width, dtype=dtype)
    out = layer.latent_moe_tail(y, fc2, shared, down, residual)
    truth = y.double() @ fc2.double().t() + shared.double() @ down.double().t() + residual.double()
    assert_close_to(out, truth, 2e-5)


def test_more_tiles_of_rows_than_share_x():
    tokens = 32 * layer.GROUP + 40
    y, down = draw(tokens, 20, dtype=torch.float32), draw(40, 20, dtype=torch.float32)
    assert layer.config_for(90, y.dtype, tokens).block_m == 32
    assert_close_to(layer.latent_moe_tail(y, down, y, down), 2 * (y.double() @ down.double().t()), 2e-5)


def test_a_batch_invariant_row_has_the_bits_of_every_batch():
    x, gate, up = (draw(n, 130, dtype=torch.bfloat16) for n in (100, 20, 40))
    with n3kernels.batch_invariant():
        whole = layer.latent_moe_front(x, gate, gate, up)
        for part in (x[:1], x[:17]):
            for a, b in zip(layer.latent_moe_front(part, gate, gate, up), whole, strict=True):
                assert_same_bits(a, b[: len(part)])


@pytest.mark.parametrize("x", [1e-30, 1.0, 3e38, float("inf"), float("nan")])
def test_a_router_weight_of_any_size_keeps_its_bits(x):
    """The three terms of a float32 weight: no overflow on the way, and what is not finite stays so."""
    gate = torch.full((2, 1), x, device=DEVICE) * torch.tensor([[1.0], [-1.1111111]], device=DEVICE)
    one = torch.ones(2, 1, dtype=torch.bfloat16, device=DEVICE)
    logits, _, _ = layer.latent_moe_front(one, gate, None, one)
    assert torch.equal(logits.nan_to_num(7.0), gate.t().expand(2, 2).nan_to_num(7.0))


@pytest.mark.parametrize("tokens, k, experts", [(0, 3, 1100), (9, 5, 40), (60, 22, 512), (60, 22, 33), (20, 4, 1100)])
@pytest.mark.parametrize("small", [True, False])
def test_sort(monkeypatch, small, tokens, k, experts):
    if not small:
        monkeypatch.setattr(sort, "SMALL", -1)
    ids = torch.randint(-1, experts + 3, (tokens, k), dtype=torch.int32, device=DEVICE)
    for first in (0, 5):
        for a, b in zip(sort.moe_sort(ids, experts, first), reference.moe_sort(ids, experts, first), strict=True):
            assert_same_bits(a, b)
