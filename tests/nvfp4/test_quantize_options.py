"""The quantiser's options: metric, scales per row, square blocks, stochastic rounding, rotation, strides."""

from __future__ import annotations

import numpy as np
import nvfp4_oracle as oracle
import pytest
import torch
from conftest import DEVICE, assert_same_bits, fenced
from hypothesis import given
from hypothesis import strategies as st
from nvfp4_oracle import unpack
from quantize_problems import (
    DTYPES,
    SIGNS,
    as_tensor,
    assert_bytes,
    assert_same,
    globals_,
    magnitudes,
    options,
    parts,
    run,
    shapes,
    specials,
    values,
)  # fmt: skip

import n3kernels
from n3kernels.nvfp4 import NVFP4Tensor, quantize, reference, reference_quantize

OPS = ("nvfp4_quantize",)
# Triton's interpreter computes in NumPy, which warns of the overflows that the formula has by design.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning")


@given(shapes, magnitudes, globals_, options, specials)
def test_options_agree_with_brute_force(backend, shape, magnitude, global_scale, o, special):
    rows, blocks, dtype = shape
    x = values(16 * min(rows, 2) if o["square"] else rows, blocks, dtype, *magnitude)
    for place, value in special:
        if x.numel():
            x.view(-1)[place * 7 % x.numel()] = value
    if o["per_row"] and global_scale is not None:
        global_scale = [global_scale * 2.0**i for i in range(len(x))]
    q, scale, g = run(x, as_tensor(global_scale), o)
    codes, scales, decode = oracle.quantize(x, global_scale, **o)
    assert_bytes(NVFP4Tensor(q, scale, g, "linear", x.shape), codes, scales)
    np.testing.assert_array_equal(g.cpu().numpy(), decode)


@given(shapes, st.sampled_from([1.0, 1e-3, 1e4]), options, st.sampled_from(["linear", "128x4"]))
def test_rotated_rows_agree_with_the_definition(backend, shape, magnitude, o, layout):
    rows, blocks, dtype = shape
    x = values(16 * min(rows, 2) if o["square"] else rows, blocks, dtype, magnitude, 2.0)
    signs = torch.tensor(SIGNS, dtype=torch.float32, device=DEVICE)
    got = run(x, None, o, signs, layout)
    with n3kernels.use_backend("reference"):
        want = run(x, None, o, signs, layout)
    for a, b in zip(got, want, strict=True):
        assert_same_bits(a, b)


@given(st.integers(1, 3), st.integers(1, 3), st.sampled_from(DTYPES), options, st.booleans())
def test_strides_do_not_show(backend, high, wide, dtype, o, rotate):
    """Rows of a larger matrix, a transposed matrix, every second element, a batch of transposed matrices."""
    torch.manual_seed(high + 5 * wide)
    room = fenced(torch.randn(2, 16 * high, 16 * wide + 8).to(dtype).to(DEVICE))
    signs = torch.tensor(SIGNS, dtype=torch.float32, device=DEVICE) if rotate else None
    views = [room[0, :, 8:], room[0, :, :-8].t(), room[..., : 16 * wide].mT, room[:, :, : 16 * wide]]
    if wide > 1 or not o["square"]:
        views.append(room[0, :, ::2][:, : 16 * (wide // 2)])
    for x in views:
        for a, b in zip(run(x, None, o, signs), run(x.contiguous(), None, o, signs), strict=True):
            assert_same_bits(a, b)


@pytest.mark.parametrize("rows, blocks", [(0, 3), (16, 1), (48, 5), (144, 2)])
def test_tiles_of_the_options(backend, rows, blocks):
    x = values(rows, blocks, torch.bfloat16, 1.0, 2.0)
    for more in ({"per_row": True}, {"block": "16x16"}, {"block": "16x16", "four_over_six": True, "metric": "mse"}):
        linear, tiles = quantize(x, **more), quantize(x, scale_layout="128x4", **more)
        assert_same_bits(tiles.q, linear.q)
        assert_same_bits(tiles.block_scale, reference.nvfp4_swizzle_scale(linear.block_scale))
        assert_same_bits(tiles.global_scale, linear.global_scale)


def test_a_scale_per_row_is_each_row_alone(backend):
    x = values(7, 3, torch.bfloat16, 1.0, 2.0)
    x[2], x[3, 5] = 0.0, float("inf")
    t = quantize(x, per_row=True)
    assert t.global_scale.shape == (7,)
    for i in range(7):
        assert_same(t._replace(q=t.q[i], block_scale=t.block_scale[i], global_scale=t.global_scale[i]), quantize(x[i]))
    deep = quantize(x.view(7, 1, 48), per_row=True)
    assert deep.global_scale.shape == (7, 1)
    assert_same_bits(deep.dequantize(torch.float32).view(7, 48), t.dequantize(torch.float32))


def test_stochastic_codes_are_neighbours_and_unbiased(backend):
    draws = 8 if backend == "triton" and DEVICE == "cpu" else 256  # the interpreter is slow
    x = values(16, 4, torch.float32, 1.0, 0.0)
    nearest = quantize(x)
    t = quantize(x.expand(draws, 16, 64), rounding="stochastic")
    assert_same_bits(t.block_scale[7], nearest.block_scale)
    step = (unpack(t.q) & 7).astype(int) - (unpack(nearest.q) & 7)
    assert (np.abs(step) <= 1).all()
    assert (unpack(t.q) >> 3 == np.signbit(x.cpu().numpy())).all()

    room = 6 * (nearest.block_scale.double() * nearest.global_scale.double()).repeat_interleave(16, -1)
    free = x.abs() <= room  # elsewhere the rounded block scale makes x saturate
    bias = (oracle.decode(*parts(t)).mean(0) - x.double())[free]
    noise = (oracle.decode(*parts(nearest)) - x.double())[free].norm() * (256 / draws) ** 0.5
    assert bias.norm() < 0.15 * noise
    assert bias.mean().abs() < 2e-3 * x.abs().mean() * (256 / draws) ** 0.5


def test_stochastic_rounding_repeats_with_its_seed(backend):
    x = values(4, 4, torch.bfloat16, 1.0, 0.0)

    def codes(*seed):
        seed = torch.tensor(seed, device=DEVICE)
        return torch.ops.n3.nvfp4_quantize.default(x, rounding="stochastic", seed=seed)[0]

    one, same, other, later = codes(7, 0), codes(7, 0), codes(8, 0), codes(7, 1)
    assert torch.equal(one, same) and not torch.equal(one, other) and not torch.equal(one, later)
    exact = reference.nvfp4_dequantize(*parts(quantize(x)), dtype=torch.float32)
    t = quantize(exact, quantize(x).global_scale, rounding="stochastic")
    assert_same_bits(t.dequantize(torch.float32), exact)  # nothing to round, nothing random
    a, b = (quantize(x, rounding="stochastic", generator=torch.Generator(DEVICE).manual_seed(3)) for _ in range(2))
    assert_same(a, b)


def test_stochastic_words_are_philox():
    """Element e takes word e & 3 of Philox4x32-10 with key = seed and counter = (e >> 2, offset); known answers."""
    words = reference_quantize._random_words(torch.Size([2, 16]), torch.tensor([0, 0]))
    assert [f"{w:08x}" for w in words[0, :4].tolist()] == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]
    shifted = reference_quantize._random_words(torch.Size([16]), torch.tensor([-1, -1]))
    assert shifted.min() >= 0 and shifted.max() < 2**32 and not torch.equal(shifted, words[0])
    assert shifted.tolist() == oracle.philox_words(16, -1, -1).tolist()


@given(st.integers(1, 2), st.integers(1, 3), st.booleans())
def test_the_transpose_of_square_blocks_has_the_transposed_codes(backend, rows, columns, four_over_six):
    x = values(rows * 16, columns, torch.float32, 1.0, 2.0)
    t, turned = (quantize(v, block="16x16", four_over_six=four_over_six) for v in (x, x.t()))
    np.testing.assert_array_equal(unpack(t.q), unpack(turned.q).T)


def test_square_blocks_keep_nan_to_their_tile(backend):
    x = values(32, 2, torch.float32, 1.0, 0.0)
    x[3, 20] = float("nan")
    nan = quantize(x, block="16x16").block_scale.view(torch.uint8) == 0x7F
    assert nan[:16, 1].all() and nan.sum() == 16


def test_square_blocks_of_equal_rows_are_plain_blocks(backend):
    x = values(1, 4, torch.float32, 1.0, 2.0).expand(16, 64)
    assert_same_bits(quantize(x, block="16x16").q, quantize(x).q)


@given(st.integers(1, 4), st.integers(1, 4))
def test_hadamard(backend, rows, blocks):
    """Rotates first: what is quantised is (x * signs) @ H16 / 4, an orthogonal transform."""
    signs = torch.tensor(SIGNS, dtype=torch.float32, device=DEVICE)
    h = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(4):
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    x = torch.randint(-8, 9, (rows, blocks * 16), device=DEVICE).float()  # exact in every order of addition
    rotated = (x.double().view(-1, 16) * signs.double() @ h.to(DEVICE) / 4).view_as(x).float()
    assert_same(quantize(x, hadamard=signs), quantize(rotated))
    plain = torch.ones_like(signs)
    assert_same_bits(reference_quantize.hadamard16(reference_quantize.hadamard16(x, plain), plain), x)


def test_hadamard_is_rounded_to_the_dtype(backend):
    signs = torch.tensor(SIGNS, dtype=torch.float32, device=DEVICE)
    x = values(3, 4, torch.bfloat16, 1.0, 2.0)
    rotated = reference_quantize.hadamard16(x.float(), signs)
    assert_same(quantize(x, hadamard=signs), quantize(rotated.bfloat16()))
