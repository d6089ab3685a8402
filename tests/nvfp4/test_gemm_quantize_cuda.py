"""The last nodes of the CUTLASS epilogues of nvfp4_gemm.quantized: their arithmetic and stores under the emulator, byte
for byte, and with nvcc which elements CUTLASS gives to which thread."""

from __future__ import annotations

import pytest
import torch
from conftest import assert_same_bits, fenced
from cutlass_problems import CODES120, CODES_LARGE100, CODES_SMALL100, collectives, needs_nvcc
from hypothesis import given
from hypothesis import strategies as st
from kernel_text import load, needs_emulator
from nvfp4_emulator import pointer, room, size

from n3kernels.nvfp4 import reference, reference_quantize

pytestmark = needs_emulator

problems = st.tuples(
    st.integers(1, 140), st.integers(1, 9), st.sampled_from([None, "relu2"]), st.sampled_from(["linear", "128x4"]),
    st.sampled_from([0.01, 1.0, 3e-5, 1e30, 0.0, float("inf"), float("nan"), -0.02, 1e-42]), st.booleans(),
    st.integers(0, 99),
)  # fmt: skip


def results(m, n, seed):
    """Of many sizes; zeros of both signs, a NaN, infinities, a block of tiny values."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    y = draw(m, n) * torch.exp2(6 * draw(m, n // 16)).repeat_interleave(16, 1)
    where = torch.randint(y.numel(), (6,), generator=generator)
    y.view(-1)[where] = torch.tensor([0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e30])
    y[m // 2, :16] *= 1e-12
    return y


@pytest.mark.parametrize("quads", [False, True], ids=["sm_100", "sm_120"])
@given(problems)
def test_the_bytes_of_the_quantiser(quads, problem):
    m, blocks, activation, layout, scale, reverse, seed = problem
    n = 16 * blocks
    y, given = results(m, n, seed), torch.tensor(scale)
    grid = (m, blocks) if layout == "linear" else (reference.pad(m, 128), reference.pad(blocks, 4))
    (q, q_fence), (scales, scale_fence) = room((m, n // 2), torch.uint8), room(grid, torch.uint8)
    load("nvfp4_gemm_quantized.cpp").emulate_codes(
        quads, pointer(fenced(y)), pointer(q), size(m), size(n), pointer(scales), pointer(given), layout == "128x4",
        activation == "relu2", reverse,
    )  # fmt: skip
    q_fence(), scale_fence()
    want = reference_quantize.nvfp4_quantize(y.relu().square() if activation else y, given, scale_layout=layout)
    assert_same_bits(q, want[0])
    assert_same_bits(scales, want[1].view(torch.uint8))


# ---- whose elements are whose


def elements(kernel):
    """Row and column of every element of the tile ``[thread, tile of the epilogue, element, 2]``, each of them once."""
    threads, rows, cols = {
        CODES_SMALL100: (128, 128, 64), CODES_LARGE100: (128, 128, 256), CODES120: (256, 128, 128)
    }[kernel]  # fmt: skip
    out = torch.full((rows * cols, 2), -1, dtype=torch.int32)
    count = collectives().coordinates(kernel, pointer(out))
    place = out[:, 0] * cols + out[:, 1]
    assert torch.equal(place.sort().values, torch.arange(rows * cols, dtype=torch.int32))
    return out.view(threads, -1, count, 2)


@pytest.mark.slow
@needs_nvcc
@pytest.mark.parametrize("kernel", [CODES_SMALL100, CODES_LARGE100])
def test_a_thread_of_sm_100_has_whole_blocks(kernel):
    """16 columns of a row in their order, from a multiple of 16 on."""
    row, col = elements(kernel).unflatten(2, (-1, 16)).unbind(-1)
    assert (row == row[..., :1]).all() and (col[..., 0] % 16 == 0).all()
    assert (col - col[..., :1] == torch.arange(16)).all()


@pytest.mark.slow
@needs_nvcc
def test_a_quad_of_sm_120_has_whole_blocks():
    """Two fragments of thread t of a quad: columns 2 t and 2 t + 1 of the halves of a block, of two rows 8 apart."""
    row, col = elements(CODES120).view(64, 4, -1, 2, 2, 2, 2).unbind(-1)  # quad, t, tile, fragment, row, column
    first = row[:, :1, :, :1, :, :1]
    assert (row == first).all() and (first[..., 1, :] - first[..., 0, :] == 8).all()
    t, fragment, i = torch.meshgrid(torch.arange(4), torch.arange(2), torch.arange(2), indexing="ij")
    inside = (8 * fragment + 2 * t + i)[None, :, None, :, None, :]
    assert (col % 16 == inside).all() and (col // 16 == col[:, :1, :, :1, :, :1] // 16).all()
