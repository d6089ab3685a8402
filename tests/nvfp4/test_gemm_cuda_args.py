"""What surrounds the CUTLASS kernels of nvfp4_gemm and nvfp4_grouped_gemm, on the CPU.

The strides and scale layouts that CUTLASS is told are compared with the definition's indices, what the kernels cover in
C++ with what Python says, and the kernel that prepares the groups is run by tests/cuda_emulator. With nvcc, CUTLASS's
own check is asked too. The products themselves need a GPU.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import pytest
import torch
from conftest import assert_same_bits
from cutlass_problems import (
    CODES,
    CUTLASS,
    DENSE,
    FLOAT100,
    FLOAT120,
    GROUPED,
    ON_120,
    SEEN,
    call_of,
    collectives,
    cutlass_headers,
    needs_nvcc,
)  # fmt: skip
from hypothesis import given
from hypothesis import strategies as st
from kernel_text import load, needs_emulator

from n3kernels.nvfp4 import _supports, reference

pytestmark = needs_emulator
DTYPES = [torch.float32, torch.float16, torch.bfloat16]  # in the order of nvfp4_gemm::Out
CUDA = Path(os.environ.get("CUDA_HOME") or "/usr/local/cuda") / "include"
POINTERS = ("a", "a_scale", "b", "b_scale", "a_global", "b_global", "y")
INTEGERS = ("a_stride", "b_stride", "y_stride")
NAMES = (*POINTERS, *INTEGERS, "problems", "a_layout", "b_layout")  # grouped::Arrays
needs_cutlass = pytest.mark.skipif(
    not CUTLASS or not (CUDA / "cccl").is_dir(), reason="needs the headers of CUTLASS and CUDA"
)


@pytest.fixture(scope="session")
def cutlass():
    library = load("../nvfp4/cutlass_args.cpp", system=(cutlass_headers(), CUDA, CUDA / "cccl"))
    for name in ("scale_byte", "scale_span", "element"):
        getattr(library, name).restype = ctypes.c_int64
    return library


@pytest.fixture(scope="session")
def plans():
    library = load("nvfp4_grouped.cpp")
    for name in ("gemm_unsupported", "grouped_unsupported"):
        getattr(library, name).restype = ctypes.c_char_p
    for name in ("grouped_scale_bytes", "grouped_place"):
        getattr(library, name).restype = ctypes.c_int64
    return library


def sizes(*values):
    return tuple(ctypes.c_int64(v) for v in values)


def pointer(t):
    return ctypes.c_void_p(t.data_ptr())


def e4m3(t):
    return t.to(torch.uint8).view(torch.float8_e4m3fn)


# ---- what CUTLASS is told of one product


@needs_cutlass
@pytest.mark.parametrize("m, n, k", [(1, 8, 32), (3, 464, 1856), (128, 128, 64), (129, 1856, 96), (300, 264, 2688)])
def test_scales_lie_where_the_definition_puts_them(cutlass, m, n, k):
    """The first byte of every scale, and nothing beyond the padded matrix."""
    for of_b, rows in ((False, m), (True, n)):
        place = torch.arange(rows * (k // 16)).view(rows, k // 16)
        # Two swizzles of bytes give the place of every scale in a matrix of up to 2^16.
        low, high = (reference.nvfp4_swizzle_scale(e4m3(part)).view(torch.uint8) for part in (place & 255, place >> 8))
        where = {}
        for byte, index in enumerate((low.int() + 256 * high.int()).flatten().tolist()):
            where.setdefault(index, byte)  # padding repeats 0, whose own byte is the first
        for row in {0, 1, 31, 32, 127, rows // 2, rows - 1} & set(range(rows)):
            for block in range(k // 16):
                want = where[row * (k // 16) + block]
                for inside in (0, 15):
                    got = cutlass.scale_byte(of_b, *sizes(m, n, k), row, block * 16 + inside)
                    assert got == want, f"row {row}, block {block}"
        assert cutlass.scale_span(of_b, *sizes(m, n, k)) == reference.pad(rows, 128) * reference.pad(k // 16, 4)


@needs_cutlass
@pytest.mark.parametrize("m, n, k", [(1, 8, 32), (129, 1856, 96), (5, 131072, 2688)])
def test_rows_are_contiguous(cutlass, m, n, k):
    for operand, rows, cols in ((0, m, k), (1, n, k), (2, m, n)):
        for row, col in ((0, 0), (0, cols - 1), (rows - 1, 0), (rows // 2, cols // 3), (rows - 1, cols - 1)):
            assert cutlass.element(operand, *sizes(m, n, k, row, col)) == row * cols + col


# ---- what CUTLASS's kernels are called with, and whether they take it


@pytest.mark.slow
@needs_nvcc
@pytest.mark.parametrize("kernel", DENSE)
@pytest.mark.parametrize("a_rows, b_rows, bias", [(False, False, True), (True, False, False), (False, True, True)])
def test_the_arguments_of_one_product(kernel, a_rows, b_rows, bias):
    m, n, k = 7, 480, 1888
    given = {"a_global_per_row": a_rows, "b_global_per_row": b_rows} | ({} if bias else {"bias": None})
    if kernel in CODES:
        given |= {"scale": 1 << 20, "scale_global": 1 << 21, "swizzled": bias, "relu2": a_rows}
    call, seen = call_of(m, n, k, **given), (ctypes.c_int64 * len(SEEN))()
    assert collectives().dense_arguments(kernel, ctypes.byref(call), seen)
    want = [getattr(call, name, None) or 0 for name in SEEN]
    want[SEEN.index("a_stride") :] = [k, k, n, call.sms if kernel in ON_120 else 0]
    assert dict(zip(SEEN, seen, strict=True)) == dict(zip(SEEN, want, strict=True))


@pytest.mark.slow
@needs_nvcc
@pytest.mark.parametrize("kernel", DENSE)
def test_cutlass_refuses_what_we_refuse(plans, kernel):
    """And takes what we take: its rule of whole 16 bytes is ours."""
    out = 3 if kernel in CODES else 0 if kernel in (FLOAT100, FLOAT120) else 2  # of nvfp4_gemm::Out
    for m in (1, 129):
        for n in (1, 2, 4, 6, 8, 12, 16, 32, 64, 464, 480, 1860):
            for k in (16, 32, 48, 64, 80, 464, 2688):
                call, seen = call_of(m, n, k), (ctypes.c_int64 * len(SEEN))()
                takes = collectives().dense_arguments(kernel, ctypes.byref(call), seen)
                assert takes == (plans.gemm_unsupported(*sizes(m, n, k), out, False, False) is None), (m, n, k)


@pytest.mark.slow
@needs_nvcc
@pytest.mark.parametrize("kernel", GROUPED)
@pytest.mark.parametrize("per_row", [False, True])
def test_the_arguments_of_the_groups(plans, kernel, per_row):
    experts, memory = 5, 1 << 20
    call, seen = call_of(300, 464, 1888, a_global_per_row=per_row), (ctypes.c_void_p * 13)()
    assert collectives().grouped_arguments(kernel, ctypes.byref(call), *sizes(experts), ctypes.c_void_p(memory), seen)
    where = (ctypes.c_void_p * len(NAMES))()
    plans.grouped_place(ctypes.c_void_p(memory), *sizes(experts), where)
    at = dict(zip(NAMES, where, strict=True))
    order = ("problems", "a", "a_stride", "a_scale", "a_layout", "b", "b_stride", "b_scale", "b_layout", "a_global",
             "b_global", "y", "y_stride")  # fmt: skip
    assert list(seen) == [at[name] for name in order]


# ---- what the kernels cover


def operands(m, n, k, experts=None):
    lead = () if experts is None else (experts,)
    return (
        torch.empty(m, k // 2, dtype=torch.uint8, device="meta"), None, None,
        torch.empty(*lead, n, k // 2, dtype=torch.uint8, device="meta"), None, None,
    )  # fmt: skip


EDGES = [
    (1, 8, 32), (1, 4, 64), (7, 12, 64), (3, 16, 64), (3, 96, 64), (5, 8, 16), (5, 8, 48), (5, 8, 96), (5, 2, 64),
    (5, 464, 464), (5, 1856, 1856), (2**31, 8, 32), (2**25, 8, 1024), (8, 2**31, 32), (2**26, 8, 512),
]  # fmt: skip


@pytest.mark.parametrize("m, n, k", EDGES)
def test_cpp_and_python_refuse_the_same_in_the_same_words(plans, m, n, k):
    for code, dtype in enumerate(DTYPES):
        for a_layout in ("linear", "128x4"):
            for b_layout in ("linear", "128x4"):
                layouts = {"a_layout": a_layout, "b_layout": b_layout}
                tiled = a_layout == "128x4", b_layout == "128x4"
                got = plans.gemm_unsupported(*sizes(m, n, k), code, *tiled)
                want = _supports.block_scaled_cores(*operands(m, n, k), out_dtype=dtype, **layouts)
                assert (got and got.decode()) == want
                got = plans.gemm_unsupported(*sizes(m, n, k), 3, *tiled)
                want = _supports.block_scaled_codes(*operands(m, n, k), None, **layouts)
                assert (got and got.decode()) == want
        for experts in (0, 3):
            for layout in ("linear", "128x4"):
                got = plans.grouped_unsupported(*sizes(m, n, k, experts), code, layout == "128x4")
                options = {"out_dtype": dtype, "b_layout": layout}
                want = _supports.block_scaled_groups(*operands(m, n, k, experts), None, **options)
                assert (got and got.decode()) == want


def test_the_refusals():
    refusal = lambda m, n, k, dtype=torch.bfloat16, layout="linear": _supports.block_scaled_cores(  # noqa: E731
        *operands(m, n, k), out_dtype=dtype, b_layout=layout
    )
    assert refusal(1, 1856, 2688) is None and refusal(1, 4, 96, torch.float32) is None
    assert "multiple of 32" in refusal(1, 8, 48)
    assert "multiples of 8" in refusal(1, 4, 64)
    assert "multiple of 64" in refusal(1, 8, 96, layout="128x4")
    assert "2^31" in refusal(2**31, 8, 64)


def test_the_tile(plans):
    """Large tiles for results that fill the GPU; in batch-invariant mode whatever the rows."""
    small, large = 0, 1
    assert [plans.gemm_tile(*sizes(m, 2688), 148, False) for m in (1, 128, 129, 1024, 8192)] == [0, 0, 0, 0, 1]
    assert plans.gemm_tile(*sizes(256, 131072), 148, False) == large
    assert plans.gemm_tile(*sizes(128, 131072), 148, False) == small
    assert {plans.gemm_tile(*sizes(m, 2688), 148, True) for m in (1, 128, 8192)} == {large}


# ---- the groups


class Prepared:
    """One run of prepare_kernel: its arrays by name, y and the tiles of a's scales."""

    def __init__(self, plans, m, n, k, offsets, *, per_row=False, dtype=torch.bfloat16, reverse=False):
        experts = len(offsets) - 1
        self.a = torch.zeros(m, k // 2, dtype=torch.uint8)
        self.scale = torch.randint(1, 127, (m, k // 16)).to(torch.uint8)
        self.b = torch.zeros(1, dtype=torch.uint8)  # its addresses are computed, never read
        self.b_scale = torch.zeros(1, dtype=torch.uint8)
        self.a_global = torch.rand(m if per_row else 1)
        self.b_global = torch.rand(experts)
        self.y = torch.full((m, n), 7.0, dtype=dtype)
        self.tiles = torch.full((plans.grouped_scale_bytes(*sizes(m, k, experts)),), 0x7F, dtype=torch.uint8)
        self.memory = torch.full((plans.grouped_place(None, *sizes(experts), None),), 0x7F, dtype=torch.uint8)
        offsets = torch.tensor(offsets, dtype=torch.int32)
        plans.emulate_prepare(
            pointer(self.a), pointer(self.scale), pointer(self.b), pointer(self.b_scale), pointer(self.a_global),
            pointer(self.b_global), per_row, pointer(self.y), *sizes(m, n, k), pointer(offsets),
            *sizes(experts, dtype.itemsize), pointer(self.tiles), pointer(self.memory), reverse,
        )  # fmt: skip
        where = (ctypes.c_void_p * len(NAMES))()
        plans.grouped_place(pointer(self.memory), *sizes(experts), where)
        starts = [address - self.memory.data_ptr() for address in where]
        self.of = {}
        for name, start, end in zip(NAMES, starts, [*starts[1:], len(self.memory)], strict=True):
            assert start % 16 == 0, f"{name} is not aligned"
            width = 12 if name == "problems" else 20 if name.endswith("layout") else 8
            self.of[name] = self.memory[start:end][: experts * width].view(experts, width)

    def integers(self, name):
        return self.of[name].contiguous().view(torch.int64).flatten().tolist()


def group_bytes(function, *args):
    memory = (ctypes.c_uint8 * 64)()
    return list(memory[: function(*args, memory)])


@st.composite
def offsets_of(draw, most=400):
    """Ascending, with empty groups and with rows of no expert at either end."""
    ends = sorted(draw(st.lists(st.integers(0, most), min_size=2, max_size=9)))
    return draw(st.integers(ends[-1], ends[-1] + 3)) or 1, ends


@given(offsets_of(), st.sampled_from([32, 96, 1856]), st.booleans(), st.sampled_from(DTYPES), st.booleans())
def test_prepared_groups(plans, rows_and_offsets, k, per_row, dtype, reverse):
    """Each group's rows, scales and outputs; scales in tiles as the definition has them, padding zero; in y zeros in
    rows of no expert, and nothing else."""
    m, offsets = rows_and_offsets
    n = 24
    run = Prepared(plans, m, n, k, offsets, per_row=per_row, dtype=dtype, reverse=reverse)
    tile_bytes = reference.pad(k // 16, 4) * 128
    seen = torch.zeros(len(run.tiles) // tile_bytes, dtype=torch.int)
    for e, (first, last) in enumerate(zip(offsets[:-1], offsets[1:], strict=True)):
        rows = last - first
        at = {name: run.integers(name)[e] for name in (*POINTERS, *INTEGERS)}
        assert run.of["problems"][e].contiguous().view(torch.int32).tolist() == [rows, n, k]
        assert at["a"] == run.a.data_ptr() + first * k // 2
        assert at["b"] == run.b.data_ptr() + e * n * k // 2
        assert at["b_scale"] == run.b_scale.data_ptr() + e * tile_bytes
        assert at["a_global"] == run.a_global.data_ptr() + (4 * first if per_row else 0)
        assert at["b_global"] == run.b_global.data_ptr() + 4 * e
        assert at["y"] == run.y.data_ptr() + first * n * dtype.itemsize
        assert (at["a_stride"], at["b_stride"], at["y_stride"]) == (k, k, n)
        if rows:
            start = at["a_scale"] - run.tiles.data_ptr()
            assert start % tile_bytes == 0 and at["a_scale"] % 16 == run.tiles.data_ptr() % 16
            want = reference.nvfp4_swizzle_scale(run.scale[first:last].view(torch.float8_e4m3fn)).view(torch.uint8)
            assert_same_bits(run.tiles[start : start + want.numel()], want.flatten())
            seen[start // tile_bytes : (start + want.numel()) // tile_bytes] += 1
    assert seen.max() <= 1, "groups share tiles"
    assert (run.tiles.view(-1, tile_bytes)[seen == 0] == 0x7F).all(), "a tile of no group was written"
    inside = torch.zeros(m, dtype=torch.bool)
    inside[offsets[0] : offsets[-1]] = True
    assert (run.y[inside] == 7).all() and (run.y[~inside] == 0).all()


@needs_cutlass
@pytest.mark.parametrize("k", [32, 96, 2688])
def test_groups_in_memory_are_what_cutlass_reads(plans, cutlass, k):
    offsets, n = [0, 1, 1, 130, 400], 264
    run = Prepared(plans, 400, n, k, offsets)
    for e, (first, last) in enumerate(zip(offsets[:-1], offsets[1:], strict=True)):
        rows = last - first
        assert run.of["problems"][e].tolist() == group_bytes(cutlass.group_problem, rows, n, k)
        assert run.of["a_stride"][e].tolist() == group_bytes(cutlass.group_stride, *sizes(k))
        assert run.of["y_stride"][e].tolist() == group_bytes(cutlass.group_stride, *sizes(n))
        if rows:  # an empty group's is never read
            assert run.of["a_layout"][e].tolist() == group_bytes(cutlass.group_layout, rows, n, k, False)
        assert run.of["b_layout"][e].tolist() == group_bytes(cutlass.group_layout, rows, n, k, True)
