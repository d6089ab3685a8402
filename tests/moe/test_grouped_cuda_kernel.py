"""The text of the sm_90 kernel of grouped_linear, run on the CPU by tests/cuda_emulator; see
test_experts_cuda_kernels.py for what that shows."""

from __future__ import annotations

import ctypes

import moe_problems
import pytest
import torch
from conftest import assert_close_to, assert_same_bits, fenced
from kernel_text import load, needs_emulator

from n3kernels.moe import reference
from n3kernels.moe._supports import tensor_core_groups

ACTIVATIONS = (None, "relu2", "silu", "gelu")  # as csrc/moe/grouped_activation.h counts them
GATED = ACTIVATIONS[2:]
ROWS, SLOTS, ORDERED = range(3)  # where results go: csrc/moe/grouped_plan.h


class Call(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("m", "rows", "groups", "n", "k", "sms")),
        *((name, ctypes.c_void_p) for name in ("x", "w")),
        ("strides", ctypes.c_int64 * 2),
        *((name, ctypes.c_void_p) for name in ("offsets", "gather", "targets", "row_scale", "y")),
        *((name, ctypes.c_int64) for name in ("sharing", "half", "activation", "to", "lazy", "reversed")),
    ]


@pytest.fixture(scope="session")
def kernel():
    return load("moe_grouped.cpp").emulate_grouped_linear


def product(kernel, x, w, offsets, rows, y, *, gather=None, row_scale=None, targets=None, sharing=1, activation=None,
            to=ROWS, sms=3, lazy=2, reverse=False):  # fmt: skip
    """One launch, its results between fences."""
    optional = (offsets, gather, targets, row_scale)
    kernel(ctypes.byref(Call(
        len(x), rows, *w.shape, sms, x.data_ptr(), w.data_ptr(), (ctypes.c_int64 * 2)(*w.stride()[:2]),
        *(t if t is None else t.data_ptr() for t in optional), y.data_ptr(), sharing, x.dtype == torch.float16,
        ACTIVATIONS.index(activation), to, lazy, reverse,
    )))  # fmt: skip
    whole = y.as_strided((y.numel() + 128,), (1,), 0)
    assert whole[:64].isnan().all() and whole[-64:].isnan().all(), "written out of range"
    return y


def run(kernel, x, w, offsets, gather=None, row_scale=None, *, activation=None, **options):
    rows = len(x) if gather is None else len(gather)
    y = fenced(torch.full((rows, w.shape[1] // (2 if activation in GATED else 1)), float("nan"), dtype=x.dtype))
    options |= {"gather": gather, "row_scale": row_scale, "activation": activation}
    return product(kernel, x, w, offsets, rows, y, **options)


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
@pytest.mark.parametrize("activation", GATED)
@pytest.mark.parametrize("k, n", [(80, 288), (8, 16)])
def test_gated_activations(kernel, k, n, activation):
    """The second tile of 128 outputs has 16: gates beside them are of what is gated, and are not stored."""
    x, w, offsets, gather = problem(50, 150, [3, 0, 140], k, n, first=2)
    scale = fenced(torch.randn(150))
    y = run(kernel, x, w, offsets, gather, scale, activation=activation, reverse=activation == "gelu")
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
    w[:, 5] = float("inf")
    y = run(kernel, x, w, offsets, gather)
    assert (y[[3, 7, 30]] == 0).all() and y[2].isnan().any() | y[2].isinf().any()
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


@needs_emulator
@pytest.mark.parametrize("activation", ["relu2", *GATED])
@pytest.mark.parametrize("width, inner", [(72, 336), (272, 24)])
def test_both_products_of_moe_experts(kernel, width, inner, activation):
    """As csrc/moe/experts_wide_sm90.cu launches them beyond 64 slots per expert, with the last sum here: rows of slots
    that nobody serves stay NaN, experts without slots are not read."""
    x, ids, weights = fenced(torch.randn(90, width).bfloat16()), torch.randint(-1, 5, (90, 3)).int(), torch.randn(90, 3)
    ids[ids == 0] = 1
    w_up = torch.randn(4, inner * (2 if activation in GATED else 1), width).bfloat16() * width**-0.5
    w_down = torch.randn(4, width, inner).bfloat16() * inner**-0.5
    w_up[0] = w_down[0] = float("nan")
    order, offsets, _, _ = reference.moe_sort(ids, 4, 0)
    hidden = fenced(torch.full((270, inner), float("nan"), dtype=x.dtype))
    rows = fenced(torch.full((270, width), float("nan")))
    product(kernel, x, w_up, offsets, 270, hidden, gather=order, sharing=3, activation=activation)
    product(kernel, hidden, w_down, offsets, 270, rows, targets=order, to=SLOTS)
    used = (ids >= 0) & (ids < 4)
    assert (rows.isnan().all(1) == ~used.flatten()).all() and not rows[used.flatten()].isnan().any()
    y = torch.where(used[..., None], weights[..., None] * rows.view(90, 3, width), 0).sum(1).to(x.dtype)
    truth = moe_problems.definition(x, w_up, w_down, ids, weights, activation=activation)
    moe_problems.assert_right(y, *truth)


# ---- what the kernels take


def operands(groups=2, k=16, n=24, dtype=torch.bfloat16, pad=0):
    return torch.zeros(5, k, dtype=dtype), torch.zeros(groups, n, k + pad, dtype=dtype)[:, :, :k], None


def packed(n, k=64, pad=0):
    codes = torch.zeros(2, n, k // 2 + pad, dtype=torch.uint8)[:, :, : k // 2]
    scales = torch.zeros(2, n, k // 16, dtype=torch.float8_e4m3fn)
    return torch.zeros(5, k, dtype=torch.bfloat16), codes, None, None, None, scales, torch.ones(2)


def test_says_why_not():
    rows = "takes weights whose rows are contiguous and begin at multiples of 16 bytes"
    assert tensor_core_groups(*operands()) is None and tensor_core_groups(*operands(pad=8)) is None
    assert tensor_core_groups(*operands(dtype=torch.float16), activation="relu2") is None
    assert tensor_core_groups(*operands(n=16), activation="gelu") is None
    assert "float64" in tensor_core_groups(*operands(dtype=torch.float64))
    assert "float32" in tensor_core_groups(*operands(dtype=torch.float32))
    assert "multiples of 8" in tensor_core_groups(*operands(n=24), activation="silu")
    assert "multiples of 8" in tensor_core_groups(*operands(k=12))
    assert "multiples of 8" in tensor_core_groups(*operands(n=12))
    assert "1024 groups" in tensor_core_groups(*operands(1025, 8, 8))
    assert tensor_core_groups(*operands(pad=1)) == rows


def test_says_why_not_with_nvfp4_weights():
    rows = "takes codes whose rows are contiguous, each two beginning at a multiple of 16 bytes"
    assert tensor_core_groups(*packed(24)) is None and tensor_core_groups(*packed(8, k=16, pad=8)) is None
    assert tensor_core_groups(*packed(48), activation="silu") is None
    assert "multiples of 8" in tensor_core_groups(*packed(24), activation="silu")
    assert tensor_core_groups(*packed(24, pad=4)) == rows
    x, codes, *none, scales, ones = packed(24)
    strided = scales.view(torch.uint8).mT.contiguous().view(scales.dtype).mT
    assert "scales whose rows" in tensor_core_groups(x, codes, *none, strided, ones)
