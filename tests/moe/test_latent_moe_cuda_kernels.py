"""The text of the sm_90 kernels of latent_moe_front and latent_moe_tail, run on the CPU by tests/cuda_emulator; see
test_experts_cuda_kernels.py for what that shows."""

from __future__ import annotations

import ctypes

import pytest
import torch
from conftest import assert_close_to, assert_same_bits, fenced
from kernel_text import load, needs_emulator

from n3kernels import batch_invariant
from n3kernels.moe import reference_layer
from n3kernels.moe._supports import latent_front, latent_tail


class Operand(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "stride", "bytes")),
    ]

    @classmethod
    def of(cls, t):
        if t is None:
            return cls(None, 0, 0, 0, 2)
        return cls(t.data_ptr(), *t.shape, t.stride(0), t.element_size())


class Options(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("lazy", "reversed", "invariant")]


@pytest.fixture
def kernels():
    return load("moe_latent.cpp")


def refs(*operands):
    return [ctypes.byref(Operand.of(t)) for t in operands]


def pointer(t):
    return None if t is None else ctypes.c_void_p(t.data_ptr())


def between_fences(*shape, dtype):
    return fenced(torch.full(shape, float("nan"), dtype=dtype))


def assert_fences(t):
    whole = t.as_strided((t.numel() + 128,), (1,), 0)
    assert whole[:64].isnan().all() and whole[-64:].isnan().all(), "written out of range"


def front(kernels, x, router, fc1, up, *, lazy=2, reverse=False, invariant=False):
    logits = between_fences(len(x), len(router), dtype=torch.float32)
    z = between_fences(len(x), 0 if fc1 is None else len(fc1), dtype=x.dtype)
    shared = between_fences(len(x), len(up), dtype=x.dtype)
    options = Options(lazy, reverse, invariant)
    kernels.emulate_front(*refs(x, router, fc1, up), *map(pointer, (logits, z, shared)), ctypes.byref(options))
    for t in (logits, z, shared):
        assert_fences(t)
    return logits, z, shared


def tail(kernels, y, fc2, shared, down, residual=None, *, lazy=2, reverse=False, invariant=False):
    out = between_fences(len(y), len(down), dtype=y.dtype)
    options = Options(lazy, reverse, invariant)
    kernels.emulate_tail(*refs(y, fc2, shared, down), pointer(residual), pointer(out), ctypes.byref(options))
    assert_fences(out)
    return out


def weights(rows, columns, dtype=torch.bfloat16):
    """Rows that end in NaN, between NaN."""
    w = torch.full((rows, columns + 8), float("nan"), dtype=dtype)
    w[:, :columns] = (torch.randn(rows, columns) * columns**-0.5).to(dtype)
    return fenced(w)[:, :columns]


def tokens(*shape):
    return fenced(torch.randn(*shape).bfloat16())


def front_problem(count, width, experts, latent, inner, router=torch.float32):
    fc1 = weights(latent, width) if latent else None
    return tokens(count, width), weights(experts, width, router), fc1, weights(inner, width)


def tail_problem(count, width, latent, inner, residual=True):
    y = tokens(count, latent or width)
    fc2 = weights(width, latent) if latent else None
    return y, fc2, tokens(count, inner), weights(width, inner), tokens(count, width) if residual else None


def wide(args):
    return [None if t is None else t.double() for t in args]


def assert_front(out, args):
    truth = reference_layer.latent_moe_front(*wide(args))
    assert_close_to(out[0], truth[0], acc=1e-6)
    assert_close_to(out[1], truth[1], acc=1e-5)
    assert_close_to(out[2], truth[2], acc=2e-5)


def assert_tail(out, args):
    assert_close_to(out, reference_layer.latent_moe_tail(*wide(args)), acc=1e-5)


# ---- against the definition: copies and products at the earliest and at the latest moment allowed


@needs_emulator
@pytest.mark.parametrize("lazy", [0, 1, 2])
@pytest.mark.parametrize("router", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count, width, experts, latent, inner", [
    (1, 8, 3, 8, 5), (5, 328, 70, 24, 130), (9, 200, 64, 0, 66), (33, 96, 65, 8, 7), (130, 72, 6, 12, 68),
])  # fmt: skip
def test_front_agrees_with_the_definition(kernels, count, width, experts, latent, inner, router, lazy):
    args = front_problem(count, width, experts, latent, inner, router)
    assert_front(front(kernels, *args, lazy=lazy, reverse=lazy == 1), args)


@needs_emulator
@pytest.mark.parametrize("lazy", [0, 1, 2])
@pytest.mark.parametrize("count, width, latent, inner", [
    (1, 3, 8, 8), (6, 130, 72, 328), (12, 70, 0, 200), (40, 8, 64, 72), (129, 66, 136, 64),
])  # fmt: skip
def test_tail_agrees_with_the_definition(kernels, count, width, latent, inner, lazy):
    args = tail_problem(count, width, latent, inner, residual=lazy > 0)
    assert_tail(tail(kernels, *args, lazy=lazy, reverse=lazy == 1), args)


@needs_emulator
@pytest.mark.parametrize("reverse", [False, True])
def test_more_steps_than_stages(kernels, reverse):
    """The ring comes round several times, and every part of a cluster has steps."""
    args = front_problem(3, 8192, 4, 0, 4)
    assert_front(front(kernels, *args, reverse=reverse), args)
    args = tail_problem(3, 16, 1032, 8000)
    assert_tail(tail(kernels, *args, reverse=reverse), args)


@needs_emulator
def test_nothing_of_one_kind(kernels):
    """No experts, no rows of the shared expert: other outputs are right."""
    for experts, inner in ((0, 20), (20, 0)):
        args = front_problem(4, 64, experts, 16, inner)
        assert_front(front(kernels, *args), args)


# ---- the router


@needs_emulator
def test_float32_router_weights_are_not_narrowed(kernels):
    """All 24 bits count, the largest and the infinite ones as well."""
    x = torch.zeros(2, 64).bfloat16()
    x[0, :], x[1, 40] = 1, -1
    router = torch.zeros(7, 64)
    router[0, 0], router[0, 33] = 1, 2.0**-23
    router[1, 5] = 1 + 2.0**-23
    router[2, 40] = torch.finfo(torch.float32).max
    router[3, 40] = float("inf")
    router[4, 40] = float("nan")
    router[5, 40] = 2.0**-126
    router[6, 40] = torch.tensor(0x7F800001, dtype=torch.int32).view(torch.float32)  # of a NaN, the last bit alone
    logits, *_ = front(kernels, x, router, None, torch.zeros(1, 64).bfloat16())
    assert logits[0, :3].tolist() == [1 + 2.0**-23, 1 + 2.0**-23, torch.finfo(torch.float32).max]
    assert logits[1, 2] == -torch.finfo(torch.float32).max and logits[1, 5] == -(2.0**-126)
    assert logits[0, 3] == float("inf")
    assert logits[:, [4, 6]].isnan().all()


# ---- one token


@needs_emulator
def test_a_token_does_not_depend_on_the_others(kernels):
    """Not its bits, in any size of tile; and a NaN stays in its row."""
    args = front_problem(70, 520, 20, 40, 24)
    tail_args = tail_problem(70, 40, 136, 200)
    for t in (args[0], tail_args[0]):
        t[3] = float("nan")
    whole, out = front(kernels, *args), tail(kernels, *tail_args)
    for t in (*whole, out):
        assert t[3].isnan().all() and t.isnan().any(1).sum() == 1
    for rows in (slice(0, 1), slice(60, 70), slice(20, 40)):
        some = front(kernels, args[0][rows].clone(), *args[1:], lazy=0, reverse=True)
        for a, b in zip(some, whole, strict=True):
            assert_same_bits(a, b[rows].clone())
        y, fc2, shared, down, residual = tail_args
        part = (t[rows].clone() for t in (y, shared, residual))
        y, shared, residual = part
        assert_same_bits(tail(kernels, y, fc2, shared, down, residual, lazy=0), out[rows].clone())


@needs_emulator
def test_batch_invariant_mode(kernels):
    args, tail_args = front_problem(3, 264, 12, 16, 70), tail_problem(3, 20, 24, 72)
    for a, b in zip(front(kernels, *args, invariant=True), front(kernels, *args), strict=True):
        assert_same_bits(a, b)
    assert_same_bits(tail(kernels, *tail_args, invariant=True), tail(kernels, *tail_args))


# ---- what the kernels take


def test_front_says_why_not():
    def operands(width=16, dtype=torch.bfloat16, router=torch.float32, count=5, pad=0):
        grid = [torch.zeros(n, width + pad, dtype=t)[:, :width] for n, t in ((3, router), (4, dtype), (6, dtype))]
        return torch.zeros(count, width, dtype=dtype), *grid

    rows = "takes weights whose rows are contiguous and begin at multiples of 16 bytes"
    assert latent_front(*operands()) is None and latent_front(*operands(pad=8)) is None
    assert latent_front(*operands(router=torch.bfloat16, count=512)) is None
    x, router, _, up = operands()
    assert latent_front(x, router, None, up) is None
    assert "float64" in latent_front(*operands(dtype=torch.float64))
    assert "float32" in latent_front(*operands(dtype=torch.float32))
    assert "float16" in latent_front(*operands(dtype=torch.float16))
    assert "router weights, got float16" in latent_front(*operands(router=torch.float16))
    assert "gated" in latent_front(*operands(), activation="silu")
    assert "multiple of 8" in latent_front(*operands(width=12))
    assert latent_front(*operands(pad=2)) == rows
    assert latent_front(*operands(pad=4)) == rows  # 8 bytes are enough for the router's rows alone
    assert "512 tokens" in latent_front(*operands(count=513))
    with batch_invariant():
        assert latent_front(*operands(count=513)) is None


def test_tail_says_why_not():
    def operands(width=12, latent=16, inner=24, dtype=torch.bfloat16, count=5, pad=0):
        down = torch.zeros(width, inner + pad, dtype=dtype)[:, :inner]
        fc2 = torch.zeros(width, latent, dtype=dtype)
        return torch.zeros(count, latent, dtype=dtype), fc2, torch.zeros(count, inner, dtype=dtype), down

    assert latent_tail(*operands()) is None and latent_tail(*operands(pad=8)) is None
    y, _, shared, down = operands(latent=12)
    assert latent_tail(y, None, shared, down) is None
    assert "multiples of 8" in latent_tail(*operands(latent=12))
    assert "multiples of 8" in latent_tail(*operands(inner=20))
    assert "multiples of 8" in latent_tail(*operands(inner=0))
    assert "16 bytes" in latent_tail(*operands(pad=4))
    assert "float64" in latent_tail(*operands(dtype=torch.float64))
    assert "float16" in latent_tail(*operands(dtype=torch.float16))
    assert "512 tokens" in latent_tail(*operands(count=513))
