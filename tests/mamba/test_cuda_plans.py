"""The plans of the plain CUDA kernels of the mamba family. Host arithmetic, the same with and without a GPU."""

from __future__ import annotations

import pytest

_host = pytest.importorskip("n3kernels._host", reason="_host was built for another Python")

MOST_SHARED = 99 * 1024  # of a block on sm_120


@pytest.mark.parametrize("size", [1, 8, 512, 960, 1024, 1025, 2048, 4096, 8192])
def test_every_group_of_the_norm_has_its_threads(size):
    for rows in (0, 1, 3, 129):
        threads, blocks = _host.gated_norm_plan(rows, 8, size)
        per_block = max(threads, 128) // threads
        assert (blocks - 1) * per_block < rows * 8 <= blocks * per_block
        assert 8 * threads * 4 >= size or size > 4096, "more than four chunks to a thread"
    assert len({_host.gated_norm_plan(rows, 1, size)[0] for rows in (1, 1000)}) == 1


@pytest.mark.parametrize("vector", [1, 4, 8])
def test_every_token_and_channel_of_the_convolution_has_a_thread(vector):
    for tokens in (0, 1, 16, 17, 8192):
        for channels in (1, 768, 6144, 18432):
            tiles, channel_blocks, blocks = _host.conv1d_plan(tokens, 3, channels, vector)
            assert 16 * (tiles - 1) < tokens <= 16 * tiles
            assert (channel_blocks - 1) * 128 * vector < channels <= channel_blocks * 128 * vector
            assert blocks == (tiles + 3) * channel_blocks


@pytest.mark.parametrize("d_state", [1, 7, 16, 64, 96, 128, 129, 256, 257, 1024])
@pytest.mark.parametrize("vectors", [False, True])
def test_every_row_of_a_state_has_its_lanes(d_state, vectors):
    shapes = set()
    for batch in (0, 1, 128):
        for head_dim in (1, 16, 64, 80, 128):
            lanes, groups, in_vectors, tiles, blocks = _host.ssm_update_plan(batch, 12, head_dim, d_state, vectors)
            shapes.add((lanes, groups, in_vectors))
            rows = 128 // lanes
            assert d_state <= lanes * groups * 4 and not (in_vectors and not vectors)
            assert (tiles - 1) * rows < head_dim <= tiles * rows and blocks == batch * 12 * tiles
    assert len(shapes) == 1, "sums would depend on more than the row"


# heads, groups, head_dim, d_state
NANO, SUPER, ULTRA, GRANITE = (64, 8, 64, 128), (128, 8, 64, 128), (256, 8, 64, 128), (128, 1, 64, 128)


@pytest.mark.parametrize(
    "layout, batch, tokens, fused",
    [
        (NANO, 1, 1, True), (NANO, 1, 8, True), (SUPER, 1, 4, True), (ULTRA, 1, 1, False), (ULTRA, 16, 1, True),
        (ULTRA, 16, 16, False), (GRANITE, 1, 1, False), (GRANITE, 128, 1, True), (GRANITE, 128, 4, False),
    ],
)  # fmt: skip
def test_when_the_mixer_is_one_launch(layout, batch, tokens, fused):
    heads, groups, head_dim, d_state = layout
    size = heads * head_dim // groups
    plan = _host.mamba2_decode_plan(batch, tokens, *layout, size, True, False)
    assert plan[0] == fused and plan[1] == batch * groups and plan[3] >= d_state
    assert not fused or plan[2] <= MOST_SHARED
    for vectors, tree, norm in ((False, False, size), (True, True, size), (True, False, heads * head_dim + 1)):
        assert not _host.mamba2_decode_plan(batch, tokens, *layout, norm, vectors, tree)[0]
