from __future__ import annotations

import nvfp4_oracle as oracle
import pytest
import torch
from conftest import DEVICE, assert_same_bits, fenced
from hypothesis import given
from hypothesis import strategies as st
from nvfp4_oracle import e4m3

from n3kernels.nvfp4 import swizzle_scale, unswizzle_scale

OPS = ("nvfp4_swizzle_scale", "nvfp4_unswizzle_scale")

shapes = st.tuples(st.sampled_from([0, 1, 31, 32, 127, 128, 129, 300]), st.integers(0, 10))


def scales(*shape):
    return fenced(e4m3(torch.randint(256, shape)))


def by_the_formula(s: torch.Tensor) -> torch.Tensor:
    """One byte after the other, in the words of the PTX and cuBLASLt documentation."""
    rows, cols = s.shape
    padded_cols = -(-cols // 4) * 4
    out = torch.zeros(-(-rows // 128) * 128, padded_cols, dtype=torch.uint8)
    r, c = torch.meshgrid(torch.arange(rows), torch.arange(cols), indexing="ij")
    place = (r // 128 * (padded_cols // 4) + c // 4) * 512 + r % 32 * 16 + r % 128 // 32 * 4 + c % 4
    out.view(-1)[place] = s.view(torch.uint8).cpu()
    return e4m3(out)


@given(shapes)
def test_agrees_with_the_formula(backend, shape):
    s = scales(*shape)
    tiles = swizzle_scale(s)
    assert_same_bits(tiles, by_the_formula(s))
    assert_same_bits(unswizzle_scale(fenced(tiles), *shape), s)


@pytest.mark.parametrize("batch", [0, 1, 3])
def test_batches(backend, batch):
    s = scales(batch, 130, 5)
    tiles = swizzle_scale(s)
    assert tiles.shape == (batch, 256, 8)
    for one, tile in zip(s, tiles, strict=True):
        assert_same_bits(tile, by_the_formula(one))
    assert_same_bits(unswizzle_scale(tiles, 130, 5), s)


def test_padding_is_not_read(backend):
    s = scales(130, 5)
    tiles = swizzle_scale(s)
    room = torch.full((256, 8), 0x7F, dtype=torch.uint8, device=DEVICE)
    room[:130, :5] = s.view(torch.uint8)
    poisoned = by_the_formula(room.view(torch.float8_e4m3fn))
    assert not torch.equal(poisoned.view(torch.uint8), tiles.view(torch.uint8))
    assert_same_bits(unswizzle_scale(poisoned, 130, 5), s)


def test_strided_scales(backend):
    s = scales(140, 12)
    for view in (s[::2, 1:6], s.t().contiguous().t(), s[:1].expand(130, 12)):
        assert_same_bits(swizzle_scale(view), by_the_formula(view.contiguous()))
    tiles = swizzle_scale(s)
    wide = torch.stack([tiles.view(torch.uint8)] * 2, -1)[..., 0].view(torch.float8_e4m3fn)
    assert_same_bits(unswizzle_scale(wide, 140, 12), s)


@pytest.mark.parametrize("shape", [(130, 5), (2, 3, 4), (0, 4)])
def test_opcheck(shape):
    s = e4m3(torch.randint(0x7F, shape))  # without NaN, which opcheck holds to differ from itself
    oracle.opcheck(torch.ops.n3.nvfp4_swizzle_scale.default, (s,))
    oracle.opcheck(torch.ops.n3.nvfp4_unswizzle_scale.default, (swizzle_scale(s), *shape[-2:]))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_break(dynamic):
    torch._dynamo.reset()

    def back_and_forth(s):
        return unswizzle_scale(swizzle_scale(s), s.shape[0], s.shape[1])

    fn = torch.compile(back_and_forth, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (5, 131):
        s = scales(rows, 6)
        assert_same_bits(fn(s), s)


BAD = [
    ((torch.zeros(4, 4),), "block_scale must be float8_e4m3fn, got float32"),
    ((torch.zeros(4).to(torch.float8_e4m3fn),), "block_scale must have 2 or 3 dimensions, got 1"),
]
TILES = torch.zeros(128, 4).to(torch.float8_e4m3fn)
BAD_BACK = [
    ((torch.zeros(128, 4), 1, 1), "block_scale must be float8_e4m3fn, got float32"),
    ((torch.zeros(4).to(torch.float8_e4m3fn), 1, 1), "block_scale must have 2 or 3 dimensions, got 1"),
    ((TILES, -1, 1), "rows must be at least 0, got -1"),
    ((TILES, 1, -1), "cols must be at least 0, got -1"),
    ((TILES, 129, 4), "block_scale must have shape [256, 4], got [128, 4]"),
    ((TILES[None], 128, 5), "block_scale must have shape [1, 128, 8], got [1, 128, 4]"),
]


@pytest.mark.parametrize("args, message", BAD)
def test_bad_calls(backend, args, message):
    with pytest.raises(RuntimeError) as error:
        swizzle_scale(args[0].to(DEVICE))
    assert str(error.value) == f"n3::nvfp4_swizzle_scale: {message}"


@pytest.mark.parametrize("args, message", BAD_BACK)
def test_bad_calls_back(backend, args, message):
    with pytest.raises(RuntimeError) as error:
        unswizzle_scale(args[0].to(DEVICE), *args[1:])
    assert str(error.value) == f"n3::nvfp4_unswizzle_scale: {message}"
