"""The text of the CUDA quantisers, run on the CPU by tests/cuda_emulator, byte for byte against the definition.

As in test_cuda_kernels.py this finds on any machine what would otherwise be found on a GPU, and proves nothing about
one.
"""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import torch
from conftest import FENCE, assert_same_bits, fenced
from hypothesis import given
from hypothesis import strategies as st
from kernel_text import load, needs_emulator
from nvfp4_emulator import DTYPES, pointer, room, size

from n3kernels.nvfp4 import reference_quantize as reference

pytestmark = needs_emulator
RELU2, SILU_MUL, RMS_NORM = range(3)


class Matrices(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("batches", "rows", "batch_stride",
                "row_stride"))]  # fmt: skip


class Problem(ctypes.Structure):
    _fields_ = [
        ("x", Matrices),
        *((name, ctypes.c_int64) for name in ("k_stride", "rows", "k")),
        *((name, ctypes.c_void_p) for name in ("q", "block_scale", "global_out", "given", "signs", "seed")),
        ("limit", ctypes.c_uint32),
        *((name, ctypes.c_bool) for name in ("four_over_six", "mse", "per_row", "swizzled", "square")),
    ]


class Norm(ctypes.Structure):
    _fields_ = [
        ("residual", Matrices),
        *((name, ctypes.c_void_p) for name in ("weight", "y", "residual_out")),
        ("eps", ctypes.c_double),
        ("wide_weight", ctypes.c_bool),
        ("wide_residual", ctypes.c_bool),
    ]


@pytest.fixture(scope="module")
def kernels():
    return load("nvfp4_quantize.cpp")


# ---- inputs

KINDS = ["normal", "ties", "bits", "holes", "tiny", "huge"]
GLOBALS = [None, 0.0, 0.013, 1e-40, 3e38, -0.013, -1e-40, float("nan"), float("inf")]


def values(kind, shape, dtype):
    x = torch.randn(shape) * torch.rand(*shape[:-1], 1) * 8
    if kind == "ties":
        x = torch.randint(-24, 25, shape) * 0.25
    elif kind == "bits":
        x = torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32).view(torch.float32)
    elif kind in ("tiny", "huge"):
        x = x * (1e-38 if kind == "tiny" else 1e36)
    x = x.to(dtype)
    if kind == "holes":
        x.view(-1)[3], x.view(-1)[-1], x.view(-1)[5] = float("nan"), float("-inf"), -0.0
        x[..., -16:] = 0.0
    return x


def lay(x, layout):
    """x, between fences or with gaps of NaN, in a memory order; layouts are of matrices [..., rows, k]."""
    if layout == "dense":
        return fenced(x)
    if layout == "mT":
        return fenced(x.mT.contiguous()).mT
    if layout == "apart":  # aligned rows, matrices that are not: an element between them
        *lead, rows, k = x.shape
        whole = torch.full((x.shape[:-2].numel(), rows * k + 1), float("nan"), dtype=x.dtype)
        whole[:, : rows * k] = x.reshape(-1, rows * k)
        return whole[:, : rows * k].unflatten(1, (rows, k)) if lead else fenced(x)
    gap = {"gaps": 16, "odd gaps": 3, "mT gaps": 2, "mT odd gaps": 3}[layout]
    inside = x.mT if layout.startswith("mT") else x
    *lead, rows, k = inside.shape
    room = torch.full((*lead, rows + 1, k + gap), float("nan"), dtype=x.dtype)  # and a row between matrices
    room[..., :rows, :k] = inside
    view = room[..., :rows, :k]
    return view.mT if layout.startswith("mT") else view


def matrices(x):
    """As matrices_of() in csrc/nvfp4/quantize.h, of 2 or 3 dimensions."""
    batches, rows = (x.shape[0], x.shape[1]) if x.dim() == 3 else (1, x.shape[0])
    return Matrices(x.data_ptr(), batches, rows, x.stride(0) if x.dim() == 3 else 0, x.stride(-2))


def scale_of(given, per_row, lead):
    if given is None:
        return None
    return torch.full(lead, given) * torch.rand(lead) if per_row else torch.tensor(given)


def outputs(want):
    return [room(t.shape, torch.uint8 if t.element_size() == 1 else t.dtype) for t in want]


def problem(x, k, parts, given, limit, seed=None, signs=None, four_over_six=False, metric="mae", per_row=False,
            scale_layout="linear", block="1x16"):  # fmt: skip
    q, scale, out = (t.data_ptr() for t, _ in parts[:3])
    addresses = (None if t is None else t.data_ptr() for t in (given, signs, seed))
    return Problem(matrices(x), x.stride(-1), x.shape[:-1].numel(), k, q, scale, out, *addresses, limit, four_over_six,
                   metric == "mse", per_row, scale_layout == "128x4", block == "16x16")  # fmt: skip


def assert_parts(parts, want):
    for (got, untouched), true in zip(parts, want, strict=True):
        untouched()
        assert_same_bits(got.flatten(), true.flatten().view(got.dtype))


OPTIONS = {
    "four_over_six": st.booleans(),
    "metric": st.sampled_from(["mae", "mse"]),
    "scale_layout": st.sampled_from(["linear", "128x4"]),
}
RUN = st.tuples(st.sampled_from([1, 3, 4096]), st.booleans())  # thread blocks of a launch, threads in reverse order


# ---- quantise


def run_quantize(kernels, x, given, run, signs, seed, **options):
    rounding = "nearest" if seed is None else "stochastic"
    want = reference.nvfp4_quantize(x, given, signs, seed, rounding=rounding, **options)
    parts = outputs(want)
    call = problem(x, x.shape[-1], parts, given, run[0], seed, signs, **options)
    kernels.emulate_quantize(DTYPES.index(x.dtype), ctypes.byref(call), run[1])
    assert_parts(parts, want)


LAYOUTS = ["dense", "gaps", "odd gaps", "apart", "mT", "mT gaps", "mT odd gaps"]


@pytest.mark.parametrize("layout", LAYOUTS)
@given(
    st.sampled_from(KINDS), st.sampled_from([(), (1,), (3,)]), st.integers(1, 70), st.integers(1, 20),
    st.sampled_from(DTYPES), st.sampled_from(GLOBALS), st.booleans(), st.booleans(), st.booleans(), RUN,
    st.fixed_dictionaries(OPTIONS),
)  # fmt: skip
def test_quantize(kernels, layout, kind, lead, rows, blocks, dtype, given, per_row, rotated, random, run, options):
    x = lay(values(kind, (*lead, rows, 16 * blocks), dtype), layout)
    signs = torch.randint(0, 2, (16,)) * 2.0 - 1 if rotated else None
    seed = torch.randint(2**63 - 1, (2,)) if random else None
    given = scale_of(given, per_row, x.shape[:-1])
    run_quantize(kernels, x, given, run, signs, seed, per_row=per_row, **options)


@pytest.mark.parametrize("layout", LAYOUTS)
@given(
    st.sampled_from(KINDS), st.sampled_from([(), (3,)]), st.integers(1, 9), st.integers(1, 40), st.sampled_from(DTYPES),
    st.sampled_from(GLOBALS), st.booleans(), st.booleans(), RUN, st.fixed_dictionaries(OPTIONS),
)  # fmt: skip
def test_quantize_square(kernels, layout, kind, lead, tiles, blocks, dtype, given, rotated, random, run, options):
    x = lay(values(kind, (*lead, 16 * tiles, 16 * blocks), dtype), layout)
    signs = torch.randint(0, 2, (16,)) * 2.0 - 1 if rotated else None
    seed = torch.randint(2**63 - 1, (2,)) if random else None
    run_quantize(kernels, x, scale_of(given, False, ()), run, signs, seed, block="16x16", **options)


@pytest.mark.parametrize("layout", ["dense", "odd gaps", "mT"])
@pytest.mark.parametrize("per_row", [False, True])
def test_long_rows(kernels, layout, per_row):
    """More blocks in a row than threads in a block, and more tiles than maxima are kept apart."""
    x = lay(values("normal", (5, 16 * 600), torch.bfloat16), layout)
    run_quantize(kernels, x, None, (4096, False), None, None, four_over_six=True, per_row=per_row)
    several = lay(values("normal", (24, 16 * 65), torch.bfloat16), layout)  # one thread block for all of it
    run_quantize(kernels, several, None, (1, False), None, None, per_row=per_row)
    wide = lay(values("normal", (300, 16 * 300), torch.bfloat16), layout)
    run_quantize(kernels, wide, None, (4096, True), None, None, per_row=per_row)


@pytest.mark.parametrize("layout", ["linear", "128x4"])
def test_nothing(kernels, layout):
    """No rows, or rows of nothing: these have a global scale too."""
    for shape in [(0, 32), (3, 0)]:
        run_quantize(kernels, torch.zeros(shape), None, (4096, False), None, None, scale_layout=layout)
    x, want = torch.zeros(3, 0), (torch.empty(3, 0), torch.empty(0), torch.ones(3))
    parts = outputs(want)
    call = problem(x, 0, parts, None, 4096, per_row=True, scale_layout=layout)
    kernels.emulate_quantize(0, ctypes.byref(call), False)
    assert_parts(parts, want)


@pytest.mark.parametrize("four_over_six", [False, True])
def test_the_order_of_the_divisions(kernels, four_over_six):
    """amax / 6 * S_enc and amax * (S_enc * (1 / 6)) give different scales for some of these maxima, S_enc being 0.3."""
    x = torch.zeros(4096, 16)
    x[:, 0] = torch.arange(4096) / 16
    run_quantize(kernels, fenced(x), 1 / torch.tensor(0.3), (4096, False), None, None, four_over_six=four_over_six)


@pytest.mark.parametrize("size", [1e-44, 1e-39, 1e-36, 1e-28, 1e30, 1e37])
@pytest.mark.parametrize("metric", ["mae", "mse"])
def test_four_over_six_at_the_ends_of_float32(kernels, size, metric):
    x = fenced(torch.randn(512, 16) * size)
    run_quantize(kernels, x, None, (4096, False), None, None, four_over_six=True, metric=metric)


def test_four_over_six_where_one_error_is_infinite(kernels):
    """(code * scale) * amax overflows at 6 times one scale and not at 4 times the other, both rounded to e4m3."""
    given = torch.tensor(3e38 / 1536)
    x = fenced((torch.linspace(0.05, 0.4, 2048) * 6)[:, None].expand(2048, 16) * given)
    run_quantize(kernels, x, given, (4096, False), None, None, four_over_six=True)


# ---- arithmetic, one value at a time


def ascending(count):
    """Floats of every exponent and both signs: their bits at equal distances, and around the ties of e2m1."""
    bits = np.linspace(0, 2**32 - 1, count, dtype=np.uint64).astype(np.uint32).view(np.float32)
    ties = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, 0.5, 1, 2, 4], dtype=np.float32)
    near = np.concatenate([np.nextafter(ties, np.float32(0)), ties, np.nextafter(ties, np.float32(9))])
    all_values = np.concatenate([bits[~np.isnan(bits)], near, -near, np.array([0.0, -0.0], np.float32)])
    return torch.from_numpy(all_values[: len(all_values) // 8 * 8].copy())


def test_codes_of_floats(kernels):
    """The arithmetic that replaces comparisons, against the comparisons."""
    v = ascending(2**20)
    words = torch.empty(v.numel() // 8, dtype=torch.int32)
    kernels.emulate_codes(pointer(v), pointer(words), size(words.numel()))
    codes = reference._nearest(v) | torch.signbit(v).long() << 3
    assert_same_bits(words.view(torch.uint8), reference._pack(codes))
    decoded = torch.empty_like(v)
    kernels.emulate_nearest_value(pointer(v), pointer(decoded), size(v.numel()))
    assert_same_bits(decoded, reference.code_values(v.device)[codes & 7].float())


def test_division_by_1536(kernels):
    """All significands of a few exponents within the range that the kernels use it in, 2^-101 to 2^112; beyond, what
    goes through float64: results that are subnormal, with every tie, or infinite."""

    def assert_divides(t, fast):
        y = torch.empty_like(t)
        kernels.emulate_over_1536(pointer(t), pointer(y), size(t.numel()), fast)
        assert_same_bits(y, t / torch.full_like(t, 1536.0))

    for exponent in (26, 127, 238):
        assert_divides((torch.arange(2**23, dtype=torch.int32) + (exponent << 23)).view(torch.float32), True)
    assert_divides(torch.arange(2**22, dtype=torch.int32).view(torch.float32), False)
    assert_divides(torch.arange(0, 2**31 - 2**23 + 1, 511, dtype=torch.int32).view(torch.float32), False)
    assert_divides(torch.tensor([float("inf"), torch.finfo(torch.float32).max, 0.0]), False)


# ---- producers


def run_producer(kernels, producer, x, k, want, given, run, norm=None, **options):
    parts = outputs(want)
    call = problem(x, k, parts, given, run[0], **options)
    kernels.emulate_producer(DTYPES.index(x.dtype), producer, ctypes.byref(call), norm and ctypes.byref(norm), run[1])
    return parts


PRODUCED = (
    st.sampled_from(KINDS), st.sampled_from(["dense", "gaps", "odd gaps"]), st.integers(1, 40), st.integers(1, 20),
    st.sampled_from(DTYPES), st.sampled_from(GLOBALS[:5]), st.booleans(), RUN, st.fixed_dictionaries(OPTIONS),
)  # fmt: skip


@given(*PRODUCED)
def test_relu2(kernels, kind, layout, rows, blocks, dtype, given, per_row, run, options):
    x = lay(values(kind, (rows, 16 * blocks), dtype), layout)
    given = scale_of(given, per_row, x.shape[:-1])
    want = reference.relu2_nvfp4_quantize(x, given, per_row=per_row, **options)
    assert_parts(run_producer(kernels, RELU2, x, x.shape[-1], want, given, run, per_row=per_row, **options), want)


def unpacked(q):
    return torch.stack([q & 15, q >> 4], -1).flatten().long()


@given(*PRODUCED)
def test_silu_mul(kernels, kind, layout, rows, blocks, dtype, given, per_row, run, options):
    """A given global scale, so that one rounding of the maximum does not move every code."""
    x = lay(values(kind, (rows, 32 * blocks), dtype), layout)
    given = scale_of(0.013 if given is None else given, per_row, x.shape[:-1])
    want = reference.silu_mul_nvfp4_quantize(x, given, per_row=per_row, **options)
    parts = run_producer(kernels, SILU_MUL, x, 16 * blocks, want, given, run, per_row=per_row, **options)
    for _, untouched in parts:
        untouched()
    same = want[1].view(torch.uint8) == parts[1][0]
    assert (~same).sum() <= 1 + 1e-3 * same.numel()
    if options["scale_layout"] == "linear":
        codes, true = (unpacked(q).view(*same.shape, 16)[same] for q in (parts[0][0], want[0]))
        assert (codes != true).sum() <= 1 + 1e-4 * true.numel()
        assert (((codes & 7) - (true & 7)).abs() <= 1).all()
    assert_same_bits(parts[2][0].flatten(), want[2].flatten())


@given(*PRODUCED, st.sampled_from([None, "same", "wide"]), st.booleans(), st.booleans())
def test_rms_norm(kernels, kind, layout, rows, blocks, dtype, given, per_row, run, options, residual, wide, keep):
    k = 16 * blocks
    x = lay(values(kind, (rows, k), dtype), layout)
    weight = fenced(torch.randn(k).to(torch.float32 if wide else dtype))
    total = None
    if residual:
        total = lay(torch.randn(rows, k).to(torch.float32 if residual == "wide" else dtype), "gaps")
    given = scale_of(given, per_row, x.shape[:-1])
    eps = 1e-5
    want = reference.rms_norm_nvfp4_quantize(x, weight, total, given, eps=eps, per_row=per_row, keep=keep, **options)
    y, total_out = room(want[3].shape, want[3].dtype), room(want[4].shape, want[4].dtype)
    norm = Norm(matrices(total) if residual else Matrices(), weight.data_ptr(), y[0].data_ptr() if keep else None,
                total_out[0].data_ptr() if residual else None, eps, weight.dtype == torch.float32,
                residual is not None and total.dtype == torch.float32)  # fmt: skip
    parts = run_producer(kernels, RMS_NORM, x, k, want[:3], given, run, norm, per_row=per_row, **options)
    assert_parts(parts, want[:3])
    for (got, untouched), true in ((y, want[3]), (total_out, want[4])):
        untouched()
        assert torch.equal(got.isnan(), true.isnan())
        assert_same_bits(got.nan_to_num(7.0), true.nan_to_num(7.0))


@pytest.mark.parametrize("row", [0, 200, 399])
def test_the_global_scale_of_rms_norm_is_that_of_all_blocks(kernels, row):
    """One row has all its weight in one place, and with it the largest normalised value; several thread blocks."""
    x, k = torch.ones(400, 48), 48
    x[row] = 0.0
    x[row, 7] = 1.0
    weight = fenced(torch.ones(k))
    want = reference.rms_norm_nvfp4_quantize(x, weight)
    norm = Norm(Matrices(), weight.data_ptr(), None, None, 1e-5, True, False)
    x = fenced(x)
    assert_parts(run_producer(kernels, RMS_NORM, x, k, want[:3], None, (4096, False), norm), want[:3])


assert FENCE % 16 == 0  # fenced tensors are aligned as a GPU's are
