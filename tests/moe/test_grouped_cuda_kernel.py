"""The text of the sm_90 kernel of grouped_linear, run on the CPU by tests/cuda_emulator; see
test_experts_cuda_kernels.py for what that shows."""

from __future__ import annotations

import ctypes

import pytest
import torch
from conftest import assert_close_to, assert_same_bits, fenced
from kernel_text import load, needs_emulator

from n3kernels.moe import reference
from n3kernels.moe._supports import tensor_core_groups


class Call(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("m", "rows", "groups", "n", "k", "sms")),
        *((name, ctypes.c_void_p) for name in ("x", "w")),
        ("strides", ctypes.c_int64 * 2),
        *((name, ctypes.c_void_p) for name in ("offsets", "gather", "row_scale", "y")),
        *((name, ctypes.c_int64) for name in ("half", "relu2", "lazy", "reversed")),
    ]


@pytest.fixture(scope="session")
def kernel():
    return load("moe_grouped.cpp").emulate_grouped_linear


def run(kernel, x, w, offsets, gather=None, row_scale=None, *, activation=None, sms=3, lazy=2, reverse=False):
    """y, written between fences."""
    rows = len(x) if gather is None else len(gather)
    y = fenced(torch.full((rows, w.shape[1]), float("nan"), dtype=x.dtype))
    kernel(ctypes.byref(Call(
        m=len(x), rows=rows, groups=w.shape[0], n=w.shape[1], k=w.shape[2], sms=sms, x=x.data_ptr(), w=w.data_ptr(),
        strides=(ctypes.c_int64 * 2)(*w.stride()[:2]), offsets=offsets.data_ptr(),
        gather=None if gather is None else gather.data_ptr(),
        row_scale=None if row_scale is None else row_scale.data_ptr(), y=y.data_ptr(), half=x.dtype == torch.float16,
        relu2=activation == "relu2", lazy=lazy, reversed=reverse,
    )))  # fmt: skip
    whole = y.as_strided((y.numel() + 128,), (1,), 0)
    assert whole[:64].isnan().all() and whole[-64:].isnan().all(), "written out of range"
    return y


def problem(m, rows, counts, k, n, dtype=torch.bfloat16, first=0):
    """Rows of x between NaN, weights whose rows end in NaN; `first` rows belong to nobody, and some at the end."""
    x = fenced(torch.randn(m, k).to(dtype))
    w = torch.full((len(counts), n, k + 8), float("nan"), dtype=dtype)
    w[:, :, :k] = (torch.randn(len(counts), n, k) * k**-0.5).to(dtype)
    offsets = torch.tensor([first, *counts], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    gather = torch.randint(0, m, (rows,), dtype=torch.int32) if m else None
    return x, fenced(w)[:, :, :k], fenced(offsets), gather


def assert_right(y, x, w, offsets, gather=None, row_scale=None, activation=None):
    wide = None if row_scale is None else row_scale.double()
    truth = reference.grouped_linear(x.double(), w.double(), offsets, gather, wide, activation=activation)
    assert_close_to(y, truth, acc=1e-5)


@needs_emulator
@pytest.mark.parametrize("lazy", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("k, n", [(64, 256), (8, 8), (136, 264), (328, 72)])
def test_agrees_with_the_definition(kernel, k, n, dtype, lazy):
    """Groups of no, few and many rows; rows of no group on both sides; with everything that is optional or without."""
    x, w, offsets, gather = problem(50, 190, [0, 3, 130, 0, 20], k, n, dtype, first=2)
    scale, activation = (fenced(torch.randn(190)), "relu2") if lazy else (None, None)
    y = run(kernel, x, w, offsets, gather, scale, activation=activation, lazy=lazy, reverse=lazy == 1, sms=1 + lazy)
    assert_right(y, x, w, offsets, gather, scale, activation)


@needs_emulator
def test_without_gather(kernel):
    x, w, offsets, _ = problem(140, 140, [70, 0, 66], 80, 40)
    y = run(kernel, x, w, offsets)
    assert_right(y, x, w, offsets)
    assert (y[136:] == 0).all()


@needs_emulator
def test_rows_that_are_not_there(kernel):
    """A gather below zero: zeros, whatever the scale; one past x and wild offsets: nothing out of range is touched."""
    x, w, offsets, gather = problem(9, 40, [10, 20], 72, 24, first=1)
    x[4] = float("nan")
    gather[gather == 4] = 5
    gather[3], gather[30] = -1, -7
    scale = torch.randn(40)
    scale[3] = scale[30] = float("nan")
    y = run(kernel, x, w, offsets, gather, scale)
    assert (y[[0, 3, 30, 31, 39]] == 0).all()
    assert_right(y, x, w, offsets, gather, torch.where(scale.isnan(), 0, scale))
    gather[7] = 9
    assert (run(kernel, x, w, offsets, gather)[7] == 0).all()
    run(kernel, x, w, torch.tensor([-3, 2**31 - 1, -(2**31)], dtype=torch.int32), gather)


@needs_emulator
def test_a_row_does_not_depend_on_the_others(kernel):
    x, w, offsets, gather = problem(30, 150, [140, 10], 200, 272)
    x[3] = float("nan")
    gather[gather == 3] = 4
    gather[77] = 3
    y = run(kernel, x, w, offsets, gather, activation="relu2")
    assert y[77].isnan().all() and y.isnan().any(1).sum() == 1
    for row, group in ((0, 0), (139, 0), (149, 1)):
        ends = torch.tensor([0, 1 - group, 1], dtype=torch.int32)
        alone = run(kernel, x, w, ends, gather[row : row + 1].clone(), activation="relu2", sms=9, lazy=0, reverse=True)
        assert_same_bits(alone[0], y[row])


@needs_emulator
@pytest.mark.parametrize("rows", [0, 5])
def test_nothing_to_multiply(kernel, rows):
    x, w, offsets, gather = problem(2, rows, [0, 0], 16, 16)
    assert (run(kernel, x, w, offsets, gather) == 0).all()


# ---- what the kernel takes


def operands(groups=2, k=16, n=24, dtype=torch.bfloat16, pad=0):
    return torch.zeros(5, k, dtype=dtype), torch.zeros(groups, n, k + pad, dtype=dtype)[:, :, :k], None


def test_says_why_not():
    rows = "takes weights whose rows are contiguous and begin at multiples of 16 bytes"
    assert tensor_core_groups(*operands()) is None and tensor_core_groups(*operands(pad=8)) is None
    assert tensor_core_groups(*operands(dtype=torch.float16), activation="relu2") is None
    assert "float64" in tensor_core_groups(*operands(dtype=torch.float64))
    assert "float32" in tensor_core_groups(*operands(dtype=torch.float32))
    assert "gated" in tensor_core_groups(*operands(), activation="gelu")
    assert "dense" in tensor_core_groups(*operands(), None, None, torch.zeros(1), torch.zeros(1))
    assert "multiples of 8" in tensor_core_groups(*operands(k=12))
    assert "multiples of 8" in tensor_core_groups(*operands(n=12))
    assert "1024 groups" in tensor_core_groups(*operands(1025, 8, 8))
    assert tensor_core_groups(*operands(pad=1)) == rows
