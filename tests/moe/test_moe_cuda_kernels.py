"""The text of the CUDA kernels of routing and sort, run on the CPU by tests/cuda_emulator: indices, ties, barriers.

It proves nothing about a GPU, where the same operators are tested through the dispatcher. The structures of arguments
are filled in here as the launchers do it.
"""

from __future__ import annotations

import ctypes
import math
from ctypes import c_bool, c_float, c_int32, c_int64, c_void_p

import pytest
import torch
from conftest import fenced
from kernel_text import load, needs_emulator

from n3kernels.moe import reference

pytestmark = needs_emulator
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NOTHING = torch.iinfo(torch.int32).min  # in an output: not written


class RouteArgs(ctypes.Structure):
    _fields_ = [
        ("logits", c_void_p), ("strides", c_int64 * 2), ("bias", c_void_p), ("expert_map", c_void_p),
        ("ids", c_void_p), ("weights", c_void_p), ("counts", c_void_p), ("flags", c_void_p), ("tokens", c_int64),
        ("experts", c_int32), ("top_k", c_int32), ("n_group", c_int32), ("topk_group", c_int32),
        ("softmax", c_bool), ("normalize", c_bool), ("scale", c_float),
    ]  # fmt: skip


class BackwardArgs(ctypes.Structure):
    _fields_ = [
        ("grad", c_void_p), ("grad_strides", c_int64 * 2), ("logits", c_void_p), ("strides", c_int64 * 2),
        ("ids", c_void_p), ("out", c_void_p), ("tokens", c_int64), ("experts", c_int32), ("top_k", c_int32),
        ("softmax", c_bool), ("normalize", c_bool), ("scale", c_float),
    ]  # fmt: skip


class SortArgs(ctypes.Structure):
    _fields_ = [
        ("ids", c_void_p), ("order", c_void_p), ("offsets", c_void_p), ("active", c_void_p), ("num_active", c_void_p),
        ("table", c_void_p), ("slots", c_int64), ("first", c_int64), ("experts", c_int32), ("chunks", c_int32),
        ("size", c_int32),
    ]  # fmt: skip


@pytest.fixture(scope="session")
def kernels():
    loaded = load("moe.cpp")
    loaded.size_of_arguments.restype = loaded.sort_table.restype = c_int64
    loaded.emulate_sort.restype = c_bool
    return loaded


def test_the_structures_have_the_layout_of_the_kernels(kernels):
    for i, structure in enumerate([RouteArgs, BackwardArgs, SortArgs]):
        assert ctypes.sizeof(structure) == kernels.size_of_arguments(i), structure.__name__


def at(t):
    return None if t is None else t.data_ptr()


def strides(t):
    return (c_int64 * 2)(*t.stride())


def room(*shape, dtype=torch.int32):
    """An output between fences that nothing was written to."""
    return fenced(torch.full(shape, math.nan if dtype.is_floating_point else NOTHING, dtype=dtype))


def emulated_route(kernels, logits, bias=None, expert_map=None, *, top_k, n_group=1, topk_group=1, score="sigmoid",
                   normalize=True, scale=1.0, reversed=False):  # fmt: skip
    (tokens, experts), counts = logits.shape, torch.zeros(logits.shape[1], dtype=torch.int32)
    ids, weights, flags = room(tokens, top_k), room(tokens, top_k, dtype=torch.float32), room(tokens)
    args = RouteArgs(
        at(logits), strides(logits), at(bias), at(expert_map), at(ids), at(weights), at(counts), at(flags), tokens,
        experts, top_k, n_group, topk_group, score == "softmax", normalize, scale,
    )  # fmt: skip
    kernels.emulate_route(ctypes.byref(args), DTYPES.index(logits.dtype), reversed)
    return ids, weights, counts, flags


def assert_routed(mine, truth):
    for name, a, b in zip(("ids", "counts", "flags"), (mine[0], *mine[2:]), (truth[0], *truth[2:]), strict=True):
        assert torch.equal(a, b), name
    torch.testing.assert_close(mine[1], truth[1], rtol=1e-6, atol=1e-37)


def rows(kind, tokens, experts):
    x = 3 * torch.randn(tokens, experts)
    if kind == "ties":
        x = x.sign()
    elif kind == "near ties":
        x = torch.nextafter(torch.full_like(x, 0.75), torch.full_like(x, math.inf)).where(x > 0, 0.75)
    elif kind == "bad":
        bad = torch.tensor([math.nan, math.inf, -math.inf, 1e-40, -0.0, -300.0])[torch.randint(6, x.shape)]
        x = bad.where(torch.rand(x.shape) < 0.3, x)
        x[:1] = math.nan
    return x


# tokens (not whole blocks), experts (not whole lanes), top_k, groups, groups that take part
SHAPES = [(3, 512, 22, 1, 1), (5, 128, 6, 1, 1), (2, 1024, 32, 1, 1), (2, 896, 16, 1, 1), (5, 5, 3, 1, 1),
          (1, 1, 1, 1, 1), (5, 256, 8, 8, 4), (3, 96, 7, 96, 40), (2, 130, 9, 13, 3), (0, 64, 4, 1, 1)]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["plain", "ties", "near ties", "bad"])
def test_route(kernels, shape, kind):
    tokens, experts, top_k, n_group, topk_group = shape
    for i, score in enumerate(("sigmoid", "softmax")):
        dtype = DTYPES[(experts + i) % 3]
        logits = fenced(rows(kind, tokens, experts).to(dtype))
        bias = fenced(torch.randn(experts) / 4) if kind != "near ties" else None
        options = {"top_k": top_k, "n_group": n_group, "topk_group": topk_group, "score": score, "scale": 2.5}
        mine = emulated_route(kernels, logits, bias, **options, reversed=bool(i))
        assert_routed(mine, reference.moe_route(logits, bias, **options))


def test_route_of_strided_logits_to_physical_experts(kernels):
    logits = torch.randn(64, 10).t()[::2]
    where = torch.randint(-1, 90, (64,), dtype=torch.int32)
    options = {"top_k": 6, "normalize": False, "scale": 3.0}
    assert_routed(emulated_route(kernels, logits, None, where, **options),
                  reference.moe_route(logits, None, where, **options))  # fmt: skip


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("kind", ["plain", "bad"])
def test_route_bwd(kernels, score, normalize, kind):
    for dtype, (tokens, experts, top_k) in zip(DTYPES, [(3, 512, 22), (5, 37, 6), (2, 1024, 32)], strict=True):
        logits = fenced(rows(kind, tokens, experts).to(dtype))
        ids = reference.moe_route(logits, top_k=top_k, score=score)[0]
        grad = torch.randn(tokens, 1).expand(tokens, top_k) if kind == "bad" else torch.randn(tokens, top_k)
        out = room(tokens, experts, dtype=dtype)
        args = BackwardArgs(at(grad), strides(grad), at(logits), strides(logits), at(ids), at(out), tokens, experts,
                            top_k, score == "softmax", normalize, 2.5)  # fmt: skip
        kernels.emulate_route_bwd(ctypes.byref(args), DTYPES.index(dtype), normalize)
        truth = reference.moe_route_bwd(grad, logits, ids, score=score, normalize=normalize, scale=2.5)
        torch.testing.assert_close(out, truth, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-6)


def emulated_sort(kernels, ids, experts, first, reversed=False):
    slots = ids.numel()
    order, offsets, active, num_active = room(slots), room(experts + 1), room(experts), room(1)
    table = room(kernels.sort_table(c_int64(slots), c_int64(experts)))
    args = SortArgs(at(ids), at(order), at(offsets), at(active), at(num_active), None, slots, first, experts, 0, 0)
    alone = kernels.emulate_sort(ctypes.byref(args), c_void_p(table.data_ptr()), reversed)
    return (order, offsets, active, num_active), alone


# slots, experts, first, whether one block sorts; parts of a warp, several groups of 512 experts, many chunks
SORTS = [(0, 4, 0, True), (1, 1, 0, True), (22, 512, 0, True), (999, 60, 3, True), (8191, 128, 0, True),
         (700, 1024, 0, True), (50, 3100, 0, False), (16385, 700, 5, False), (17001, 64, 1, False)]  # fmt: skip


@pytest.mark.parametrize("slots, experts, first, by_one", SORTS)
@pytest.mark.parametrize("reversed", [False, True])
def test_sort(kernels, slots, experts, first, by_one, reversed):
    ids = fenced(torch.randint(-1, experts + first + 2, (slots, 1), dtype=torch.int32))
    mine, alone = emulated_sort(kernels, ids, experts, first, reversed)
    assert alone == by_one
    for a, b in zip(mine, reference.moe_sort(ids, experts, first), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("slots", [3000, 17000])
@pytest.mark.parametrize("expert", [0, 63, -1, 64])
def test_sort_of_slots_of_one_expert(kernels, slots, expert):
    ids = torch.full((slots, 1), expert, dtype=torch.int32)
    mine, _ = emulated_sort(kernels, ids, 64, 0)
    for a, b in zip(mine, reference.moe_sort(ids, 64), strict=True):
        assert torch.equal(a, b)
