"""The AMX path of ``nvfp4_linear``: bfloat16 activations on a CPU with tiles. Its sums have an order of their own,
which an emulation here follows to the bit. The path is chosen once per process: these tests need one that
``N3_CPU_ISA`` does not hold to less."""

from __future__ import annotations

import os
import subprocess
import sys

import nvfp4_oracle as oracle
import pytest
import torch
from conftest import assert_same_bits, fenced
from nvfp4_oracle import e4m3, weights

import n3kernels
from n3kernels.nvfp4 import NVFP4Tensor, gemm, linear

_host = pytest.importorskip("n3kernels._host", reason="_host, which names the instruction set, is of another Python")
pytestmark = pytest.mark.skipif(_host.cpu_isa() != "amx", reason=f"the CPU kernels use {_host.cpu_isa()}, not AMX")

TOKENS = (1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 64, 256)
ROWS, WIDTHS = (1, 16, 464, 1856), (16, 48, 1856, 2688)  # of weights; K


@pytest.fixture(autouse=True)
def on_the_cpu_kernels():
    with n3kernels.use_backend("cpu"):
        yield


def problem(m: int, n: int, k: int, bias: bool = False) -> tuple[torch.Tensor, NVFP4Tensor, torch.Tensor | None]:
    torch.manual_seed(n + k)
    w = NVFP4Tensor.from_parts(*weights(n, k, 0.01 / k**0.5, 0x30, 0x50))
    return fenced(torch.randn(m, k).bfloat16()), w, torch.randn(n).bfloat16() if bias else None


# ---- the summation contract, to the bit


def flush(v: torch.Tensor) -> torch.Tensor:
    """Subnormal numbers count as zero, of their sign."""
    return torch.where(v.abs() < torch.finfo(torch.float32).tiny, torch.copysign(torch.zeros(()), v), v)


def fma(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """a * b + c in float32, rounded once: products of bfloat16 values are exact in float64, and the sum is
    rounded to odd there, so that rounding it again does no harm."""
    p, c = a.double() * b.double(), c.double()
    s = p + c
    t = s - p
    lost = (p - (s - t)) + (c - t)
    even = s.view(torch.int64) & 1 == 0
    towards = torch.where(lost > 0, torch.inf, -torch.inf).double()
    odd = torch.where((lost != 0) & lost.isfinite() & even, torch.nextafter(s, towards), s)
    return flush(odd.float())


def in_steps(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """Sums [m, n] of x [m, k] and w [n, k] in the order that linear_amx.h documents."""
    m, k = x.shape
    pad = -k % 32
    x, w = (flush(torch.nn.functional.pad(v.float(), (0, pad))) for v in (x, w))
    out = torch.zeros(m, len(w))
    chains = [[16 * block + 4 * odd + i + 8 * j for block in range(2) for i in range(4) for j in range(2)]
              for odd in range(2)]  # fmt: skip
    for begin in range(0, k + pad, 32):
        even_odd = []
        for chain in chains:
            total = torch.zeros_like(out)
            for e in chain:
                total = fma(x[:, None, begin + e], w[None, :, begin + e], total)
            even_odd.append(total)
        out = flush(out + flush(even_odd[0] + even_odd[1]))
    return out


@pytest.mark.parametrize("layout", ["linear", "128x4"])
@pytest.mark.parametrize("m, n, k", [(1, 5, 16), (3, 40, 80), (33, 33, 208), (70, 17, 96)])
def test_two_nvfp4_matrices_are_summed_alike(m, n, k, layout):
    """``gemm``: rows of a become bfloat16, exactly, and take the place of x."""
    torch.manual_seed(m + n)
    a, b = (NVFP4Tensor.from_parts(*weights(rows, k, 1.0, 0x08, 0x70)) for rows in (m, n))
    sums = in_steps(*(t.dequantize(torch.float32) for t in (a, b)))
    a, b = (t._replace(global_scale=torch.tensor(g)).to_layout(layout) for t, g in ((a, 0.3), (b, 7.7)))
    assert_same_bits(gemm(a, b, torch.float32), sums * a.global_scale * b.global_scale)


@pytest.mark.parametrize("spread", [0, 8, 60])
@pytest.mark.parametrize("m, n, k", [(1, 5, 16), (3, 40, 80), (33, 33, 208), (70, 17, 96)])
def test_the_documented_order(m, n, k, spread):
    """Magnitudes of activations spread over 2^spread; with 60, terms vanish beside others in every chain."""
    x, w, _ = problem(m, n, k)
    x = (x.float() * torch.exp2(torch.randint(-spread, spread + 1, x.shape).float())).bfloat16()
    w = w._replace(global_scale=torch.ones(()))
    assert_same_bits(linear(x, w), in_steps(x, oracle.decode(w.q, w.block_scale)).bfloat16())


def test_subnormals_count_as_zero():
    """In activations, in the sums of a step and in the accumulator. The other instruction sets keep them."""
    tiny = torch.finfo(torch.bfloat16).tiny  # 2^-126
    one = NVFP4Tensor.from_parts(torch.full((1, 8), 0x22, dtype=torch.uint8), e4m3(torch.full((1, 1), 0x38)),
                                 torch.ones(()))  # fmt: skip
    x = torch.zeros(4, 16)
    x[0, 0], x[1, 0], x[2, :2], x[3, :2] = tiny / 2, tiny, tiny / 2, torch.tensor([1.5 * tiny, -tiny])
    y = linear(x.bfloat16(), one).flatten()
    assert y.tolist() == [0.0, tiny, 0.0, 0.0]


def test_small_sums_of_a_small_global_scale():
    """The power of two of the global scale is part of the decoded weights: less than 16 K 2^-126 is lost."""
    x, w, _ = problem(4, 9, 160)
    w = w._replace(global_scale=torch.tensor(2.0**-120))
    y = x.double() @ oracle.decode(w.q, w.block_scale, w.global_scale).t()
    assert ((linear(x, w).double() - y).abs() <= 2**-8 * y.abs() + 16 * 160 * 2.0**-126).all()


# ---- values


def test_every_code_with_every_scale_is_exact():
    """One-hot activations at every place of a step read out W, in tiles of every width."""
    q = torch.arange(8).mul(0x22).add(0x10).to(torch.uint8).repeat(256, 4)  # codes 0..15 in order, four blocks
    s = e4m3(torch.arange(256)).view(256, 1).expand(256, 4).contiguous()
    w = NVFP4Tensor.from_parts(q, s, torch.ones(()))
    want = oracle.decode(q, s).t()
    y = torch.cat([linear(part, w) for part in torch.eye(64).bfloat16().split([1, 2, 16, 17, 28])])
    assert torch.equal(y.isnan(), want.isnan()) and want.isnan().sum() == 2 * 64
    assert torch.equal(y.double().nan_to_num(7.0), want.nan_to_num(7.0))


@pytest.mark.parametrize("n", ROWS)
@pytest.mark.parametrize("k", WIDTHS)
def test_error_at_every_size(n, k):
    x, w, bias = problem(33, n, k, True)
    y = x.double() @ oracle.decode(w.q, w.block_scale, w.global_scale).t() + bias.double()
    assert (linear(x, w, bias).double() - y).norm() <= 2.5e-3 * y.norm()


def test_rows_longer_than_a_block_of_steps():
    """K = 6176: three blocks of decoded weights, whose accumulators are stored and loaded; the last step is half."""
    x, w, _ = problem(40, 33, 6176 + 16)
    y = x.double() @ oracle.decode(w.q, w.block_scale, w.global_scale).t()
    whole = linear(x, w)
    assert (whole.double() - y).norm() <= 2.5e-3 * y.norm()
    assert_same_bits(linear(x[7], w), whole[7])


def test_infinities_and_nans_stay_in_their_row():
    x, w, _ = problem(20, 48, 64)
    clean = linear(x, w)
    x[3, 5], x[17, 60], x[18] = torch.inf, torch.nan, torch.nan
    w.block_scale.view(torch.uint8)[7, 2] = 0x7F
    y = linear(x, w)
    rows = torch.ones(20, dtype=torch.bool)
    rows[[3, 17, 18]] = False
    columns = torch.arange(48) != 7
    assert_same_bits(y[rows][:, columns], clean[rows][:, columns])
    assert y[:, 7].isnan().all() and y[17:19].isnan().all() and not y[3, columns].isfinite().any()


# ---- invariants


@pytest.mark.parametrize("n", ROWS)
@pytest.mark.parametrize("k", WIDTHS)
def test_bits_do_not_depend_on_the_number_of_tokens(n, k):
    """A row alone is followed through all TOKENS: at every width of a tile, beside full and partial tiles, and where
    the weights are decoded once for several pairs of tiles."""
    x, w, bias = problem(max(TOKENS), n, k, True)
    whole = linear(x, w, bias, "relu2")
    for m in TOKENS:
        assert_same_bits(linear(x[:m], w, bias, "relu2"), whole[:m])
    for i in (17, 255):
        assert_same_bits(linear(x[i], w, bias, "relu2"), whole[i])


@pytest.mark.parametrize("m", [1, 40, 300])
def test_threads_do_not_show(m):
    x, w, bias = problem(m, 464, 1856, True)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(linear(x, w, bias))
    finally:
        torch.set_num_threads(before)
    assert_same_bits(results[1], results[0])
    assert_same_bits(results[2], results[0])


def test_groups_have_the_bits_of_the_linear():
    """Products by group take the same tiles: batches of one token, of partial tiles, and larger than a call."""
    sizes, n, k = (1, 0, 5, 16, 17, 40, 400), 40, 208
    x, *_ = problem(sum(sizes), n, k)
    w = [problem(0, n, k)[1]._replace(global_scale=torch.tensor(2.0**-i)) for i in range(len(sizes))]
    parts = [torch.stack([getattr(one, name) for one in w]) for name in ("q", "block_scale", "global_scale")]
    offsets = torch.tensor((0, *sizes)).cumsum(0).to(torch.int32)
    y = torch.ops.n3.grouped_linear(x, parts[0], offsets, None, None, *parts[1:], activation="relu2")
    assert_same_bits(y, torch.cat([linear(a, b, None, "relu2") for a, b in zip(x.split(sizes), w, strict=True)]))


def test_other_dtypes_have_the_bits_of_avx512(tmp_path):
    """float16 and float32 activations do not go through tiles, and N3_CPU_ISA=avx512 turns these off."""
    path = str(tmp_path / "results.pt")
    env = {**os.environ, "N3_CPU_ISA": "avx512"}
    subprocess.run([sys.executable, "-c", AVX512_PROGRAM, path], env=env, check=True)
    x, q, s, *results = torch.load(path)
    for y in results:
        assert_same_bits(torch.ops.n3.nvfp4_linear(x.to(y.dtype), q, s, torch.ones(())), y)


AVX512_PROGRAM = """
import sys
import torch
import n3kernels
from n3kernels import _host

assert _host.cpu_isa() == "avx512"
torch.manual_seed(0)
x, q = torch.randn(9, 80), torch.randint(0, 256, (33, 40), dtype=torch.uint8)
s = torch.randint(0x30, 0x50, (33, 5), dtype=torch.uint8).view(torch.float8_e4m3fn)
results = [torch.ops.n3.nvfp4_linear(x.to(dtype), q, s, torch.ones(())) for dtype in (torch.float32, torch.float16)]
torch.save((x, q, s, *results), sys.argv[1])
"""
