"""The text of the kernels of nvfp4_linear.packed and of nvfp4_repack's kernel, run on the CPU by
tests/cuda_emulator: see test_cuda_kernels.py for what that shows. And the plan."""

from __future__ import annotations

import ctypes

import pytest
import torch
from conftest import assert_close_to, assert_same_bits, fenced
from kernel_text import load, needs_emulator

from n3kernels.nvfp4 import reference, reference_repack

pytestmark = needs_emulator
STREAM1, STREAM2, STREAM4, STREAM8, WIDE64, WIDE128, WIDE256, DENSE = range(8)  # nvfp4_linear_packed::Kernel
TOKENS = {STREAM1: 8, STREAM2: 8, STREAM4: 16, STREAM8: 32, WIDE64: 64, WIDE128: 128, WIDE256: 256}


class Call(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("m", "n", "k", "kernel")),
        *((name, ctypes.c_void_p) for name in ("x", "blob", "global_scale", "bias", "y")),
        *((name, ctypes.c_int64) for name in ("half", "relu2", "invariant", "lazy", "reversed", "capability")),
    ]


@pytest.fixture(scope="session")
def library():
    return load("nvfp4_packed.cpp")


def pointer(t):
    return None if t is None else t.data_ptr()


def e4m3(t):
    return t.to(torch.uint8).view(torch.float8_e4m3fn)


def weights(n, k):
    """Every code; scales from 2^-6 to 15, of both signs, zeros and subnormals among them."""
    scale = torch.randint(8, 0x58, (n, k // 16))
    scale = torch.where(torch.rand(n, k // 16) < 0.1, torch.randint(0, 8, (n, k // 16)), scale)
    return (torch.randint(0, 256, (n, k // 2), dtype=torch.uint8),
            e4m3(scale + torch.randint(0, 2, (n, k // 16)) * 0x80))  # fmt: skip


def linear(library, x, q, scale, global_scale, bias=None, activation=None, *, kernel=-1, lazy=2, reverse=False,
           invariant=False, capability=90):  # fmt: skip
    """y, written between fences."""
    (m, k), n = x.shape, len(q)
    blob = fenced(reference_repack.nvfp4_repack(q, scale))
    y = fenced(torch.full((m, n), float("nan"), dtype=x.dtype))
    library.emulate_linear_packed(ctypes.byref(Call(
        m, n, k, kernel, x.data_ptr(), blob.data_ptr(), global_scale.data_ptr(), pointer(bias), y.data_ptr(),
        x.dtype == torch.float16, activation == "relu2", invariant, lazy, reverse, capability,
    )))  # fmt: skip
    whole = y.as_strided((y.numel() + 128,), (1,), 0)
    assert whole[:64].isnan().all() and whole[-64:].isnan().all(), "written out of range"
    return y


def assert_right(y, x, q, scale, global_scale, bias=None, activation=None, **options):
    weight = reference.decode(q, scale, torch.float64) * global_scale.double()
    want, terms = x.double() @ weight.t(), x.double().abs() @ weight.abs().t()
    if bias is not None:
        want, terms = want + bias.double(), terms + bias.double().abs()
    if activation == "relu2":
        want, terms = want.relu().square(), 2 * terms.square()
    assert_close_to(y, want, 1e-6, terms)


# ---- the blob


@pytest.mark.parametrize("n, k", [(1, 16), (16, 64), (37, 80), (64, 272)])
def test_repack(library, n, k):
    q, scale = weights(n, k)
    scale.view(torch.uint8)[n // 2, k // 16 - 1] = 0xFF
    q, scale = fenced(q), fenced(scale)
    want = reference_repack.nvfp4_repack(q, scale)
    blob = fenced(torch.full_like(want, 0x5A))
    pointers = (ctypes.c_void_p(t.data_ptr()) for t in (q, scale, blob))
    library.emulate_repack(*pointers, ctypes.c_int64(n), ctypes.c_int64(k), n % 2 == 0)
    assert_same_bits(blob, want)


# ---- the products


def problem(m, n, k, dtype, with_bias=True):
    """Rows of x in memory full of NaN."""
    x = fenced(torch.randn(m, k).to(dtype))
    bias = fenced(torch.randn(n).to(dtype)) if with_bias else None
    return x, *weights(n, k), torch.tensor(0.01), bias


SIZES = [(16, 16), (64, 48), (80, 64), (464, 272)]


@pytest.mark.parametrize("n, k", SIZES)
@pytest.mark.parametrize("m", [1, 3, 4, 5, 8, 9, 16, 17, 25, 32])
def test_few_tokens(library, m, n, k):
    """As planned; both types, with and without an epilogue, threads in either order."""
    dtype = torch.float16 if m % 2 == 0 and k != 48 else torch.bfloat16
    args = *problem(m, n, k, dtype, m != 5), "relu2" if m % 3 == 0 else None
    assert_right(linear(library, *args, reverse=m > 8), *args)


@pytest.mark.parametrize("kernel", [STREAM1, STREAM2, STREAM4, STREAM8])
@pytest.mark.parametrize("k", [64, 512 + 16, 1088, 4160])
def test_split_over_blocks(library, kernel, k):
    """1, 1, 2 and 8 blocks share k; rows that no block of 64 has, more tokens than a block takes."""
    args = problem(TOKENS[kernel] + 3, 24, k, torch.bfloat16)
    assert_right(linear(library, *args, kernel=kernel), *args)


@pytest.mark.parametrize("capability", [80, 120])
@pytest.mark.parametrize("m, n, k", [(1, 80, 64), (6, 16, 4160), (40, 37, 400), (130, 24, 144)])
def test_without_warpgroups(library, capability, m, n, k):
    """Before sm_90 one block has all of k; every number of tokens up to 128 is streamed."""
    args = *problem(m, n, k, torch.bfloat16), "relu2"
    assert_right(linear(library, *args, capability=capability), *args)


@pytest.mark.parametrize("n, k", SIZES)
@pytest.mark.parametrize("kernel, m", [(WIDE64, 33), (WIDE64, 64), (WIDE128, 80), (WIDE256, 80), (-1, 80)])
@pytest.mark.parametrize("lazy", [0, 1, 2])
def test_many_tokens(library, kernel, m, n, k, lazy):
    dtype = torch.float16 if m == 64 else torch.bfloat16
    args = *problem(m, n, k, dtype, m != 64), "relu2" if m == 33 else None
    assert_right(linear(library, *args, kernel=kernel, lazy=lazy, reverse=lazy == 1), *args)


@pytest.mark.parametrize("kernel, m", [(WIDE64, 65), (WIDE128, 130), (WIDE256, 258)])
def test_tiles_of_tokens(library, kernel, m):
    """More tokens than a tile; n that no vector of eight divides; more steps than stages."""
    args = problem(m, 131, 400, torch.bfloat16)
    assert_right(linear(library, *args, kernel=kernel), *args)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_decoded_once(library, dtype):
    """The kernels on either side of torch's product."""
    args = *problem(7, 37, 144, dtype), "relu2"
    assert_right(linear(library, *args, kernel=DENSE), *args)


KERNELS = [STREAM1, STREAM2, STREAM4, STREAM8, WIDE64, WIDE128, WIDE256, DENSE]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("global_scale", [1.0, 8.0])
def test_every_pair_comes_out_exactly(library, kernel, dtype, global_scale):
    """One-hot activations: all codes with all scale bytes; NaN spoils its own output alone, in every token's row. Under
    a global scale whose power of two does not fit into the weights' factors as well."""
    q = torch.arange(8).mul(0x22).add(0x10).to(torch.uint8).repeat(256, 1)  # codes 0..15 in order
    scale = e4m3(torch.arange(256).view(256, 1))
    y = linear(library, fenced(torch.eye(16).to(dtype)), q, scale, torch.tensor(global_scale), kernel=kernel)
    want = reference.decode(q, scale, torch.float64).t() * global_scale
    assert torch.equal(y.isnan(), want.isnan()) and want.isnan().sum() == 32
    assert torch.equal(y.double().nan_to_num(7.0), want.nan_to_num(7.0))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("scale", [1e-30, 1e-20, 0.5, 3.0, 2.0**100, 1e-40])
def test_range(library, kernel, scale):
    """Activations of 1e36 under a tiny global scale, tiny ones under a huge one; sums do not overflow before it."""
    size = 1e36 if scale < 1e-10 else 1e-28 if scale > 10 else 1.0
    x, q, block_scale, _, _ = problem(5, 32, 128, torch.bfloat16)
    x, global_scale = fenced((x.float() * size).bfloat16()), torch.tensor(scale)
    y = linear(library, x, q, block_scale, global_scale, kernel=kernel)
    weight = reference.decode(q, block_scale, torch.float64) * global_scale.double()
    want, terms = x.double() @ weight.t(), x.double().abs() @ weight.abs().t()
    assert y.isfinite().all()
    assert ((y.double() - want).abs() <= 2.0**-8 * want.abs() + 1e-6 * terms).all()


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_row_of_nan_spoils_no_other(library, kernel):
    x, *rest = problem(6, 48, 144, torch.bfloat16)
    x[2] = float("nan")
    y = linear(library, x, *rest, kernel=kernel)
    assert y[2].isnan().all()
    keep = [0, 1, 3, 4, 5]
    assert_right(y[keep], x[keep], *rest)


def test_streams_give_a_row_the_same_bits_in_any_company(library):
    """In batch-invariant mode, whatever the number of tokens; without it, on either side of a kernel's limit."""
    x, *rest = problem(70, 80, 1088, torch.bfloat16)
    whole = linear(library, x, *rest, invariant=True)
    for m in (1, 2, 5, 9, 17, 33):
        assert_same_bits(linear(library, x[:m], *rest, invariant=True), whole[:m])
    part = linear(library, x[:4], *rest)
    assert_same_bits(linear(library, x[3:4].clone(), *rest)[0], part[3])


# ---- the plan

_host = pytest.importorskip("n3kernels._host", reason="_host was built for another Python")
PUBLISHED = [(1856, 2688), (2688, 1856), (1024, 2688), (464, 2688), (10304, 2688), (8192, 8192), (131072, 2688),
             (16, 16), (1, 48), (80, 272)]  # fmt: skip


@pytest.mark.parametrize("n, k", PUBLISHED)
@pytest.mark.parametrize("invariant", [False, True])
def test_every_output_has_one_cluster_and_every_k_one_warp(n, k, invariant):
    rows_of = {STREAM1: 16, STREAM2: 32, STREAM4: 64, STREAM8: 64, WIDE64: 128, WIDE128: 128, WIDE256: 128}
    for m in (1, 4, 5, 8, 9, 16, 17, 32, 33, 64, 65, 128, 129, 4095):
        kernel, splits, rows, tokens, blocks, threads, shared = _host.nvfp4_linear_packed_plan(m, n, k, invariant)
        assert rows == -(-n // rows_of[kernel]) and tokens == -(-m // TOKENS[kernel])
        assert blocks == rows * tokens * splits < 2**31 and shared <= 232448
        assert kernel <= STREAM8 or not (m <= 32 or invariant)
        if kernel <= STREAM8:
            assert threads == 256 and splits in (1, 2, 4, 8)
            tiles = -(-k // 64)
            taken = [t for r in range(splits) for w in range(8)
                     for t in range(*_host.nvfp4_linear_packed_tiles(tiles, splits, r, w), 8)]  # fmt: skip
            assert sorted(taken) == list(range(tiles))


@pytest.mark.parametrize("n, k", PUBLISHED)
def test_in_batch_invariant_mode_the_sums_do_not_depend_on_the_rows(n, k):
    assert len({_host.nvfp4_linear_packed_plan(m, n, k, True)[1] for m in range(1, 200)}) == 1


def test_small_matrices_fill_the_multiprocessors():
    """The shapes of the design: few rows are split until most multiprocessors have a block."""
    for n, k, m in [(1856, 2688, 1), (1856, 2688, 32), (464, 2688, 8), (1024, 2688, 16)]:
        assert _host.nvfp4_linear_packed_plan(m, n, k, False)[4] >= 100


def test_many_tokens_take_the_tile_that_fills_the_multiprocessors():
    """Of a small matrix few tokens are streamed, more take narrow tiles; a large one takes wide tiles."""
    small, large = (1856, 2688), (131072, 2688)
    assert [_host.nvfp4_linear_packed_plan(m, *small, False)[0] for m in (64, 512)] == [STREAM8, WIDE64]
    assert [_host.nvfp4_linear_packed_plan(m, *large, False)[0] for m in (64, 128, 512)] == [WIDE64, WIDE128, WIDE256]


@pytest.mark.parametrize("capability", [80, 89, 100, 120])
@pytest.mark.parametrize("n, k", PUBLISHED)
def test_other_gpus_stream_up_to_128_tokens(capability, n, k):
    for m in (1, 5, 9, 17, 33, 128):
        kernel, splits, *_, shared = _host.nvfp4_linear_packed_plan(m, n, k, False, capability)
        assert kernel <= STREAM8 and shared <= 99 * 1024
        assert splits == 1 or capability >= 90
    assert _host.nvfp4_linear_packed_plan(129, n, k, False, capability)[0] == DENSE
    assert _host.nvfp4_linear_packed_plan(129, n, k, True, capability)[0] == STREAM8


def test_from_4096_tokens_on_the_weights_are_decoded_once():
    assert _host.nvfp4_linear_packed_plan(4096, 1856, 2688, False)[0] == DENSE
    assert _host.nvfp4_linear_packed_plan(4096, 1856, 2688, True)[0] == STREAM8
