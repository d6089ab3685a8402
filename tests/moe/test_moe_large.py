"""Weights, tokens and slots of more than 2^31 elements, held to the same calls on small tensors.

Only what is used of the large tensors costs memory: the rest is never touched, and an operating system that gives out
memory by the page never provides it. On a GPU all of it is there.
"""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICE, assert_same_bits
from expanses import GB, LIMIT, expanse, needs, unpoisoned  # noqa: F401 (a fixture)
from moe_problems import definition, fast, refusal

from n3kernels import use_backend
from n3kernels.moe import grouped_linear, route, sort

pytestmark = pytest.mark.slow
INT = {"dtype": torch.int32, "device": DEVICE}


def close(y, truth, gate=3e-3):
    return (y.double() - truth.double()).norm() <= gate * truth.double().norm()


def takers(form):
    """The backends that take such weights; the reference looks at one expert at a time."""
    return [b for b in fast("moe_experts") if not refusal(b, form)]


def kernels(op):
    """The backends for many tokens: the reference would need a multiple of their memory."""
    return [b for b in fast(op) if b != "reference"]


# ---------------------------------------------------------------- weights

EXPERTS, INNER, WIDTH = 512, 5120, 2048  # Nemotron 3 Ultra: 5.4e9 elements in each weight, whatever their dtype
HERE = torch.tensor([[511, 3, 205, 510], [204, 511, -1, 512]])  # of the last, the first, and around 2^31 elements


def ultra():
    """x, w_up, w_down, and both weights of the experts that are used, renamed."""
    used = sorted(set(HERE.flatten().tolist()) - {-1, 512})
    w_up, w_down = expanse(EXPERTS, INNER, WIDTH), expanse(EXPERTS, WIDTH, INNER)
    assert w_up[used[1]].storage_offset() < LIMIT < w_up[used[2]].storage_offset()
    up = (torch.randn(len(used), INNER, WIDTH) * WIDTH**-0.5).to(DEVICE, torch.bfloat16)
    down = (torch.randn(len(used), WIDTH, INNER) * INNER**-0.5).to(DEVICE, torch.bfloat16)
    for i, e in enumerate(used):
        w_up[e], w_down[e] = up[i], down[i]
    ids = HERE.to(**INT)
    near = torch.tensor([[used.index(e) if e in used else -1 for e in row] for row in HERE.tolist()], **INT)
    x = torch.randn(2, WIDTH, device=DEVICE).bfloat16()
    return x, (w_up, w_down, ids), (up, down, near), torch.rand(2, 4, device=DEVICE)


@pytest.mark.parametrize("which", takers("dense"))
def test_experts_of_ultra(which):
    needs(2)
    x, far, near, weights = ultra()
    with use_backend(which):
        y = torch.ops.n3.moe_experts(x, *far, weights)
        expected = torch.ops.n3.moe_experts(x, *near, weights)
    assert_same_bits(y, expected)
    assert close(y, definition(x, *near, weights)[0])


@pytest.mark.parametrize("which", takers("nvfp4"))
def test_nvfp4_experts_of_ultra(which):
    """Codes and scales alike lie beyond 2^31 elements."""
    needs(2)
    used, sizes = [3, 409, 410, 511], ((INNER, WIDTH), (WIDTH, INNER))
    far, near = [], []
    for n, k in sizes:
        q, scale = expanse(EXPERTS, n, k // 2, dtype=torch.uint8), expanse(EXPERTS, n, k // 16, dtype=torch.uint8)
        assert q[used[1]].storage_offset() < LIMIT < q[used[2]].storage_offset()
        codes = torch.randint(0, 256, (len(used), n, k // 2), dtype=torch.uint8)
        scales = (torch.rand(len(used), n, k // 16) * k**-0.5).to(torch.float8_e4m3fn).view(torch.uint8)
        for i, e in enumerate(used):
            q[e], scale[e] = codes[i].to(DEVICE), scales[i].to(DEVICE)
        gains = torch.rand(EXPERTS, device=DEVICE)
        far.append((q, scale.view(torch.float8_e4m3fn), gains))
        near.append((codes.to(DEVICE), scales.view(torch.float8_e4m3fn).to(DEVICE), gains[used]))
    x, weights = torch.randn(2, WIDTH, device=DEVICE).bfloat16(), torch.rand(2, 2, device=DEVICE)
    ids, few = torch.tensor([[3, 511], [410, 409]], **INT), torch.tensor([[0, 3], [2, 1]], **INT)
    with use_backend(which):
        y, expected = (
            torch.ops.n3.moe_experts(x, up[0], down[0], numbers, weights, up[1], up[2], down[1], down[2])
            for (up, down), numbers in ((far, ids), (near, few))
        )
    assert_same_bits(y, expected)
    assert y.any(1).all()


@pytest.mark.parametrize("which", fast("grouped_linear"))
def test_grouped_linear_of_ultra(which):
    needs(2)
    x, (w_up, _, _), (up, *_), _ = ultra()
    used = sorted(set(HERE.flatten().tolist()) - {-1, 512})
    steps = torch.tensor([1 if e in used else 0 for e in range(EXPERTS)])
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), steps.cumsum(0)]).to(**INT)
    rows = torch.tensor([0, 1, 0, 1, 0], **INT)[: len(used)]
    few = torch.arange(len(used) + 1, **INT)
    with use_backend(which):
        y = grouped_linear(x, w_up, offsets, gather=rows, activation="relu2")
        expected = grouped_linear(x, up, few, gather=rows, activation="relu2")
    assert_same_bits(y, expected)
    assert y.any(1).all()


# ---------------------------------------------------------------- tokens


@pytest.mark.parametrize("which", fast("moe_route"))
def test_far_rows_of_logits(which):
    """A row's stride beyond 2^31 elements, as in a slice of a larger matrix."""
    stride = LIMIT + 64
    memory = expanse(stride + 256, dtype=torch.float16)
    logits = memory.as_strided((2, 128), (stride, 1))
    near = torch.randn(2, 128, device=DEVICE).half()
    logits.copy_(near)
    with use_backend(which):
        for a, b in zip(route(logits, top_k=6), route(near, top_k=6), strict=True):
            assert_same_bits(a, b)


@pytest.mark.parametrize("which", kernels("grouped_linear"))
def test_grouped_linear_with_many_outputs(which):
    """More than 2^31 elements of y: the rows before the last few are in no group, and zero."""
    needs(6.5)
    rows, width, outputs = LIMIT // 4096 + 40, 8, 4096
    x = torch.randn(40, width, device=DEVICE).bfloat16()
    w = torch.randn(2, outputs, width, device=DEVICE).bfloat16()
    gather = torch.full((rows,), -1, **INT)
    gather[-40:] = torch.arange(40, **INT)
    with use_backend(which):
        ends = torch.tensor([rows - 40, rows - 15, rows], **INT)
        y = grouped_linear(x, w, ends, gather=gather)
        assert y.numel() > LIMIT
        expected = grouped_linear(x, w, torch.tensor([0, 25, 40], **INT))
    assert_same_bits(y[-40:], expected)
    assert not y[-300:-40].any() and not y[:10].any()


@pytest.mark.parametrize("which", kernels("grouped_linear"))
def test_grouped_linear_from_many_inputs(which):
    needs(1)
    sources, width = LIMIT // 2048 + 5, 2048
    x = expanse(sources, width)
    x[-4:] = torch.randn(4, width, device=DEVICE)
    w = torch.randn(1, 8, width, device=DEVICE).bfloat16()
    gather = torch.tensor([sources - 1, sources - 4, -1], **INT)
    few, ends = torch.tensor([3, 0, -1], **INT), torch.tensor([0, 3], **INT)
    with use_backend(which):
        y = grouped_linear(x, w, ends, gather=gather)
        expected = grouped_linear(x[-4:].clone(), w, ends, gather=few)
    assert_same_bits(y, expected)


@pytest.mark.parametrize("which", kernels("moe_experts"))
def test_experts_from_many_tokens(which):
    """Padding but for the tokens at either end; x and y have more than 2^31 elements."""
    needs(9.5)
    tokens, width = LIMIT // 4096 + 7, 4096
    x = expanse(tokens, width)
    x[-7:] = torch.randn(7, width, device=DEVICE)
    w_up, w_down = torch.randn(2, 16, width, device=DEVICE).bfloat16(), torch.randn(2, width, 16, device=DEVICE)
    w_down = w_down.bfloat16()
    ids, weights = torch.full((tokens, 1), -1, **INT), torch.ones(tokens, 1, device=DEVICE)
    ids[-7:, 0] = torch.tensor([0, 1, 0, -1, 1, 1, 0], **INT)
    with use_backend(which):
        y = torch.ops.n3.moe_experts(x, w_up, w_down, ids, weights)
        expected = torch.ops.n3.moe_experts(x[-7:].clone(), w_up, w_down, ids[-7:].clone(), weights[-7:].clone())
    assert y.numel() > LIMIT
    assert_same_bits(y[-7:], expected)
    assert not y[-300:-7].any()


@pytest.mark.parametrize("which", fast("moe_sort"))
def test_far_rows_of_ids(which):
    """The most slots, 2^31 - 1, would take 16 GB; strides reach beyond 2^31 instead."""
    stride = LIMIT // 2 + 64
    memory = expanse(2 * stride + 64, dtype=torch.int32)
    ids = memory.as_strided((3, 4), (stride, 1))
    near = torch.tensor([[3, 1, 0, -1], [1, 1, 5, 2], [0, 3, 3, 1]], **INT)
    ids.copy_(near)
    with use_backend(which):
        for a, b in zip(sort(ids, 4), sort(near, 4), strict=True):
            assert_same_bits(a, b)
