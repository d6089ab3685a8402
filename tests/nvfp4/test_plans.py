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


@pytest.mark.parametrize("swizzled", [False, True])
def test_every_place_of_the_scale_matrix_has_a_thread(swizzled):
    for rows in (0, 1, 127, 128, 129, 10304):
        for k in (0, 16, 48, 64, 2688):
            partials, blocks, places = _host.nvfp4_quantize_plan(rows, k, swizzled)
            ks = k // 16
            want = -(-rows // 128) * 128 * -(-ks // 4) * 4 if swizzled else rows * ks
            assert places == want and 256 * (blocks - 1) < places <= 256 * blocks
            assert (partials > 0) == (rows * ks > 0) and partials <= 1024
