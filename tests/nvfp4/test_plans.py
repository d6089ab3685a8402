"""The plans of the CUDA kernels: which kernel, on which grid. Host arithmetic, the same with and without a GPU."""

from __future__ import annotations

import pytest

_host = pytest.importorskip("n3kernels._host", reason="_host was built for another Python")

ROWS, TENSOR16, TENSOR64, TENSOR128, FMA = range(5)  # linear::Kernel
TILE = {TENSOR16: (16, 64), TENSOR64: (64, 64), TENSOR128: (128, 128), FMA: (64, 64)}
SIZES = [1, 2, 3, 8, 9, 16, 17, 63, 64, 65, 464, 512, 513, 1856, 131072]


@pytest.mark.parametrize("float32", [False, True])
@pytest.mark.parametrize("invariant", [False, True])
def test_every_output_has_one_thread_block(float32, invariant):
    for m in SIZES:
        for n in SIZES:
            kernel, blocks, threads, tokens = _host.nvfp4_linear_plan(m, n, float32, invariant)
            if kernel == ROWS:
                rows = 4 * (4 if tokens <= 2 else 2)  # of W per block: warps times rows of a warp
                assert m <= tokens < 2 * m and threads == 128
                assert (blocks - 1) * rows < n <= blocks * rows
            else:
                tile_m, tile_n = TILE[kernel]
                assert blocks == -(-m // tile_m) * -(-n // tile_n)
                assert float32 == (kernel == FMA)
            assert threads % 32 == 0 and blocks < 2**31


@pytest.mark.parametrize("float32", [False, True])
def test_in_batch_invariant_mode_the_kernel_does_not_depend_on_the_rows(float32):
    assert len({_host.nvfp4_linear_plan(m, 1856, float32, True)[0] for m in SIZES}) == 1


def test_the_slots_of_a_quad_cover_the_tile_once():
    slots = [[_host.nvfp4_linear_slot_k(t, step, i) for step in range(4) for i in range(4)] for t in range(4)]
    assert sorted(sum(slots, [])) == list(range(64))
    for thread, of_thread in enumerate(slots):  # one scale block each
        assert {k // 16 for k in of_thread} == {thread}


# ---- the quantisers' tiles

ROWS_OF = [1, 2, 63, 64, 128, 10304, 2**33]
BLOCKS_OF = [1, 2, 3, 4, 7, 29, 168, 280, 512, 4097]


@pytest.mark.parametrize("kind, threads_of_a_block", [("rows", 1), ("square", 0.5)])
def test_tiles_cover_every_block_once(kind, threads_of_a_block):
    for rows in ROWS_OF:
        for ks in BLOCKS_OF:
            if rows * ks > 2**36:  # 2 TB in 16-bit types
                continue
            count, across, log_width, height = _host.nvfp4_quantize_tiles(kind, rows, ks)
            width = 1 << log_width
            assert width * height * threads_of_a_block == 256
            assert (across - 1) * width < ks <= across * width
            assert count == across * -(-rows // height)
            if kind == "square":
                assert height % 16 == 0 and width % 4 == 0


def test_tiles_of_rows_are_wide_and_full():
    for ks in BLOCKS_OF + list(range(1, 700)):
        _, across, log_width, _ = _host.nvfp4_quantize_tiles("rows", 1000, ks)
        assert across << log_width <= ks + ks / 15
        if log_width < 8:  # a tile twice as wide would leave too much idle
            wider = 2 << log_width
            assert -(-ks // wider) * wider > ks + ks // 15


def test_tiles_of_whole_rows():
    for ks in BLOCKS_OF:
        count, across, log_width, height = _host.nvfp4_quantize_tiles("whole rows", 1000, ks)
        assert across == 1 and count == -(-1000 // height) and height << log_width == 256
        assert log_width == 8 or (1 << log_width) // 2 < ks <= 1 << log_width


@pytest.mark.parametrize("swizzled", [False, True])
def test_tiles_of_transposed_rows(swizzled):
    """Tiles do not straddle matrices; those of the last reach as far as the padding."""
    for batches in (1, 3):
        for each in (1, 64, 65, 1000):
            for ks in BLOCKS_OF:
                count, across, down, splits = _host.nvfp4_quantize_transposed_tiles(batches * each, ks, each, swizzled)
                rows, cols = batches * each, ks
                padded_rows, padded_cols = (-(-rows // 128) * 128, -(-ks // 4) * 4) if swizzled else (rows, cols)
                assert count == across * down * batches and across == -(-padded_cols // 8)
                assert (batches - 1) * each + 64 * down >= padded_rows and 64 * (down - 1) < each + 128
                assert 1 <= splits <= min(16, across)


def test_quotients_by_multiplication():
    numbers = sorted({0, 1, *(2**b + d for b in range(1, 31) for d in (-1, 0, 1)), 2**31 - 1, 123456789, 2**31 - 17})
    for d in numbers[1:]:
        for n in numbers + [q * d + r for q in (1, 2, 3, 1000) for r in (-1, 0)] + [2**31 - 1 - (2**31 - 1) % d]:
            if n < 2**31:
                assert _host.nvfp4_quantize_quotient(n, d) == n // d
