"""bfloat16 experts and grouped products in AMX tiles: their order of sums, the two parts of what lies between the
experts' products, and tiles of every size. The path is chosen once per process: these tests need one that
``N3_CPU_ISA`` does not hold to less."""

from __future__ import annotations

import pytest
import torch
from conftest import assert_same_bits, fenced
from moe_problems import assert_right, definition, dense, inputs, whole_truth

import n3kernels
from n3kernels.moe import experts, grouped_linear

_host = pytest.importorskip("n3kernels._host", reason="_host, which names the instruction set, is of another Python")
pytestmark = pytest.mark.skipif(_host.cpu_isa() != "amx", reason=f"the CPU kernels use {_host.cpu_isa()}, not AMX")

BF16 = torch.bfloat16
TOKENS = (1, 2, 15, 16, 17, 31, 32, 33, 191, 192, 193, 400)  # around tiles, pairs of them and batches


@pytest.fixture(autouse=True)
def on_the_cpu_kernels():
    with n3kernels.use_backend("cpu"):
        yield


def in_steps(x, w):
    """Sums of x [m, k] and w [n, k] in the order of common/amx.h, for terms whose sums are exact in float64."""
    total = torch.zeros(len(x), len(w))
    for begin in range(0, x.shape[1], 32):
        chains = [torch.zeros_like(total) for _ in range(2)]  # of even and of odd elements
        for e in range(begin, min(begin + 32, x.shape[1])):
            chains[e % 2] = (chains[e % 2].double() + (x[:, e, None] * w[:, e]).double()).float()
        total = total + (chains[0] + chains[1])
    return total


@pytest.mark.parametrize("width", [9, 31, 32, 33, 200])
def test_the_order_of_sums(width):
    """Every row of weights holds 2^25 and -2^25 twice each, and ones: which of these are lost says what was added when.
    In any other order some of 2000 sums come out otherwise."""
    large = torch.tensor([1, 1, -1, -1]) * 2.0**25
    row = torch.cat((large, torch.ones(5), torch.zeros(width - 9)))
    w = torch.stack([row[torch.randperm(width)] for _ in range(500)])
    x = torch.tensor([1.0, -1, 2, 0.5])[:, None].expand(4, width)
    y = grouped_linear(x.to(BF16), w[None].to(BF16), torch.tensor([0, 4], dtype=torch.int32))
    assert_same_bits(y + 0, in_steps(x, w).to(BF16) + 0)  # + 0: zeros of either sign


@pytest.mark.parametrize("form", ["dense", "nvfp4"])
@pytest.mark.parametrize("activation", ["relu2", "silu", "gelu"])
@pytest.mark.parametrize("width, inner", [(64, 336), (48, 464), (33, 29), (272, 96)])
def test_agrees_and_does_not_see_the_batch(width, inner, activation, form):
    x, w_up, w_down, ids, weights, options = inputs(40, 3, 5, width, inner, 1, activation, BF16, form)
    y = experts(x, w_up, w_down, ids, weights, **options)
    truth, magnitude = definition(x, w_up, w_down, ids, weights, **options)
    assert_right(y, truth, magnitude)
    for part in (slice(0, 1), slice(39, 40), slice(3, 20)):
        assert_same_bits(experts(x[part], w_up, w_down, ids[part], weights[part], **options), y[part])


@pytest.mark.parametrize("form", ["dense", "nvfp4"])
def test_every_number_of_tokens_of_one_expert(form):
    """Expert 1 has all tokens, 0 and 2 have none."""
    x, w_up, w_down, _, weights, _ = inputs(max(TOKENS), 1, 3, 80, 112, 0, "relu2", BF16, form)
    ids = torch.ones(max(TOKENS), 1, dtype=torch.int32)
    whole = experts(x, w_up, w_down, ids, weights)
    for n in TOKENS:
        assert_same_bits(experts(x[:n], w_up, w_down, ids[:n], weights[:n]), whole[:n])
    truth = whole_truth(x, w_up, w_down, ids, weights)
    assert (whole.double() - truth).norm() <= 2e-3 * truth.norm()


def test_one_rounding_alone():
    """The error is that of rounding the result: activations keep both their parts. (In one part: 1.41 times that.)"""
    x, w_up, w_down, ids, weights, _ = inputs(64, 6, 8, 256, 672, 0, "relu2", BF16)
    ids = ids.clamp(0, 7)
    y = experts(x, w_up, w_down, ids, weights).double()
    truth = whole_truth(x, w_up, w_down, ids, weights)
    assert (y - truth).norm() <= 1.01 * (truth.to(BF16).double() - truth).norm()


def test_range_and_special_values():
    """Activations of float32's range; infinities and NaN stay in their row."""
    x, w_up, w_down, ids, weights, _ = inputs(20, 2, 3, 32, 40, 0, "relu2", BF16)
    ids = ids.clamp(0, 2)
    clean = experts(x, w_up, w_down, ids, weights)
    big = experts(x * 2.0**60, w_up, w_down, ids, weights * 2.0**-120)
    assert_same_bits(big, clean)
    x[3, 5], x[17, 3], x[18] = torch.inf, torch.nan, torch.nan
    y = experts(x, w_up, w_down, ids, weights)
    rows = torch.ones(20, dtype=torch.bool)
    rows[[3, 17, 18]] = False
    assert_same_bits(y[rows], clean[rows])
    assert y[17:19].isnan().all() and not y[3].isfinite().all()


def test_nothing_behind_a_row_is_read():
    """Weights and rows between fences of NaN, of a width that is no multiple of a step, in every number of rows."""
    for width, outputs in ((5, 3), (37, 16), (37, 17), (64, 33)):
        x, w = fenced(torch.randn(7, width).to(BF16)), fenced(torch.randn(1, outputs, width).to(BF16))
        y = grouped_linear(x, w, torch.tensor([0, 7], dtype=torch.int32))
        truth = x.double() @ dense(w)[0].T
        assert (y - truth).norm() <= 3e-3 * truth.norm()
