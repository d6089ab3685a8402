"""The quantiser's plain form and four-over-six: every byte is the definition's, and what must hold without one."""

from __future__ import annotations

import numpy as np
import nvfp4_oracle as oracle
import pytest
import torch
from conftest import DEVICE, assert_same_bits
from hypothesis import given
from hypothesis import strategies as st
from nvfp4_oracle import e4m3, unpack
from quantize_problems import (
    DTYPES,
    as_tensor,
    assert_bytes,
    assert_same,
    globals_,
    magnitudes,
    parts,
    shapes,
    specials,
    values,
)

from n3kernels.nvfp4 import NVFP4Tensor, quantize, reference

OPS = ("nvfp4_quantize",)
# Triton's interpreter computes in NumPy, which warns of the overflows that the formula has by design.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning")


# ---- agreement with the definition


@given(shapes, magnitudes, globals_, st.booleans(), specials)
def test_agrees_with_brute_force(backend, shape, magnitude, global_scale, four_over_six, special):
    x = values(*shape, *magnitude)
    for place, value in special:
        if x.numel():
            x.view(-1)[place % x.numel()] = value
    t = quantize(x, as_tensor(global_scale), four_over_six=four_over_six)
    codes, scales, decode = oracle.quantize(x, global_scale, four_over_six)
    assert_bytes(t, codes, scales)
    np.testing.assert_array_equal(t.global_scale.cpu().numpy(), decode)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_of_every_16_bit_value(backend, dtype):
    """A block whose amax is 6 has scale 1 under a global scale of 1, and the codes are the values rounded."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    v = bits.view(dtype)
    v = v[v.abs() <= 6]
    v = torch.cat([v, v.new_zeros(-len(v) % 15)]).view(-1, 15)
    x = torch.cat([v.new_full((len(v), 1), 6.0), v], 1)
    codes = oracle.nearest(oracle.MAGNITUDES, x.float().abs().numpy()) + 8 * np.signbit(x.float().numpy())
    t = quantize(x.to(DEVICE), torch.ones((), device=DEVICE))
    assert_bytes(t, codes, np.full((len(x), 1), 0x38))


def test_ties_go_to_even(backend):
    x = torch.tensor([6, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, -0.25, -0.75, -1.25, -1.75, -2.5, -3.5, -5, -0.0])
    t = quantize(x.to(DEVICE), torch.ones((), device=DEVICE))
    want = [6, 0, 1, 1, 2, 2, 4, 4, -0.0, -1, -1, -2, -2, -4, -4, -0.0]
    assert t.dequantize(torch.float32).tolist() == want
    assert unpack(t.q)[[8, 15]].tolist() == [8, 8]  # -0 keeps its sign


def test_scale_of_every_bfloat16_amax(backend):
    """e4m3 to nearest even of amax * fl(1/6), saturating at 448, from 0 over subnormal scales to 3e38."""
    amax = torch.arange(0x7F80, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    x = torch.zeros(len(amax), 16, dtype=torch.bfloat16)
    x[:, 7] = -amax
    t = quantize(x.to(DEVICE), torch.ones((), device=DEVICE))
    scaled = amax.float().numpy() * (np.float32(1) / np.float32(6))
    np.testing.assert_array_equal(
        t.block_scale.view(torch.uint8).cpu().numpy()[:, 0], oracle.nearest(oracle.E4M3[:127], scaled)
    )


def test_the_order_of_operations_shows(backend):
    """Close to the midpoint of two scales amax * (S_enc * fl(1/6)) rounds to one, and amax * (S_enc / 6), amax / 6 *
    S_enc, amax * S_enc / 6 and amax / (6 * global_scale) all round to the other."""
    amax = torch.tensor([0.1171875, 0.234375, 0.46875, 0.9375, 1.875])
    x = torch.zeros(5, 16)
    x[:, 5] = amax
    for four_over_six in (False, True):
        t = quantize(x.to(DEVICE), as_tensor(0.05), four_over_six=four_over_six)
        codes, scales, _ = oracle.quantize(x, 0.05, four_over_six)
        assert_bytes(t, codes, scales)
        if not four_over_six:
            assert scales.flatten().tolist() == [45, 53, 61, 69, 77]


@pytest.mark.parametrize("rows, blocks", [(0, 3), (1, 1), (31, 4), (129, 6)])
@pytest.mark.parametrize("four_over_six", [False, True])
def test_tiles_hold_the_linear_scales_and_zeros(backend, rows, blocks, four_over_six):
    x = values(rows, blocks, torch.bfloat16, 1.0, 2.0)
    linear = quantize(x, four_over_six=four_over_six)
    tiles = quantize(x, four_over_six=four_over_six, scale_layout="128x4")
    assert_same_bits(tiles.q, linear.q)
    assert_same_bits(tiles.block_scale, reference.nvfp4_swizzle_scale(linear.block_scale))


# ---- invariants


@given(st.integers(1, 40), st.integers(-14, 8), st.booleans(), st.sampled_from(DTYPES))
def test_quantising_a_decoded_tensor_changes_nothing(backend, blocks, exponent, four_over_six, dtype):
    """For any codes and scales whose blocks use the top code, when the global scale is the same power of two."""
    codes = torch.randint(16, (blocks, 16))
    codes[:, 3] |= 7
    scale = torch.randint(1, 0x7F, (blocks, 1))
    if dtype == torch.float16:  # stay in its normal range
        scale, exponent = scale.clamp(0x30, 0x40), max(exponent, -8)
    t = NVFP4Tensor.from_parts(
        (codes[:, ::2] | codes[:, 1::2] << 4).to(torch.uint8).to(DEVICE), e4m3(scale),
        torch.tensor(2.0**exponent, device=DEVICE),
    )  # fmt: skip
    x = reference.nvfp4_dequantize(t.q, t.block_scale, t.global_scale, dtype=dtype)
    assert_same(quantize(x, t.global_scale, four_over_six=four_over_six), t)


@given(shapes, st.integers(-20, 20), st.booleans())
def test_a_power_of_two_moves_to_the_global_scale(backend, shape, exponent, four_over_six):
    x = values(*shape[:2], torch.float32, 1.0, 1.0)
    t, scaled = (quantize(v, four_over_six=four_over_six) for v in (x, x * 2.0**exponent))
    if x.any():
        assert_same(scaled, t._replace(global_scale=t.global_scale * 2.0**exponent))


@given(shapes, st.booleans())
def test_the_sign_is_bit_3(backend, shape, four_over_six):
    x = values(*shape, 1.0, 1.0)
    t, negated = quantize(x, four_over_six=four_over_six), quantize(-x, four_over_six=four_over_six)
    zero_scale = (t.block_scale.view(torch.uint8) == 0).repeat_interleave(8, -1)
    assert_same(negated, t._replace(q=torch.where(zero_scale, 0, t.q ^ 0x88)))


@given(shapes, st.integers(0, 4), st.booleans())
def test_a_row_does_not_see_the_batch(backend, shape, i, four_over_six):
    """Under a given global scale; and a row of NaN harms no other, nor the computed global scale."""
    rows, blocks, dtype = max(shape[0], i) + 2, *shape[1:]
    x = values(rows, blocks, dtype, 1.0, 1.0)
    g = torch.tensor(0.01, device=DEVICE)
    x[-1] = float("nan")
    whole, alone = quantize(x, g, four_over_six=four_over_six), quantize(x[i], g, four_over_six=four_over_six)
    assert_same(alone, whole._replace(q=whole.q[i], block_scale=whole.block_scale[i]))
    if blocks:
        with_nan, without = quantize(x), quantize(x[:-1])
        assert_same_bits(with_nan.q[:-1], without.q)
        assert_same_bits(with_nan.global_scale, without.global_scale)


@given(shapes, magnitudes)
def test_four_over_six_is_never_worse(backend, shape, magnitude):
    """Per block, in the metric of the choice, under the same global scale; and its scale is one of the two."""
    x = values(*shape, 0.01, magnitude[1]).nan_to_num()
    g = torch.tensor(1.0 / 1536, device=DEVICE)
    six, best = quantize(x, g), quantize(x, g, four_over_six=True)
    blocks = x.double().unflatten(-1, (shape[1], 16))
    base = blocks.abs().amax(-1) * 1536 / 6 if shape[1] else blocks.sum(-1)
    error = [(oracle.decode(*parts(t)).view_as(blocks) - blocks).abs().sum(-1) for t in (six, best)]
    # the choice is made in float32, where 16 terms of up to 1e-6 of the amax may round
    assert (error[1] <= error[0] + 1e-5 * blocks.abs().sum(-1)).all()
    chosen = best.block_scale.double()
    near = [(chosen - base * f).abs() <= base * f * 2.0**-4 + 2.0**-10 for f in (1.0, 1.5)]
    assert (near[0] | near[1] | (chosen == 448)).all()


def test_four_over_six_chooses(backend):
    """4 and 6 are exact under a scale of 1; 4.5 beside 6 only under 1.5, as 3 and 4. A tie goes to 6: 1.5, 3 and 6 are
    exact under both."""
    x = torch.tensor([[6.0, 4.0] * 8, [6.0, 4.5] * 8, [6.0, -3.0, 1.5, 0.0] * 4], device=DEVICE)
    t = quantize(x, torch.ones((), device=DEVICE), four_over_six=True)
    assert t.block_scale.float().flatten().tolist() == [1.0, 1.5, 1.0]
    assert torch.equal(reference.nvfp4_dequantize(*parts(t), dtype=torch.float32), x)


# ---- edges


def test_zero_blocks(backend):
    x = torch.zeros(2, 32, device=DEVICE)
    x[1, 16:] = 3.0
    x[0, 3] = -0.0
    t = quantize(x)
    assert t.q[0].tolist() == [0] * 16 and t.block_scale.float()[0].tolist() == [0, 0]
    assert quantize(x * 0).global_scale == 1
    assert not t.dequantize()[0].any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("four_over_six", [False, True])
def test_a_bad_element_spoils_its_block_alone(backend, bad, four_over_six):
    x = values(3, 4, torch.float32, 1.0, 0.0)
    clean = quantize(x, four_over_six=four_over_six)
    top = x.abs().argmax()
    place = 0 if top >= 16 else 16  # not in the block that sets the global scale
    x.view(-1)[place + 5] = bad
    t = quantize(x, four_over_six=four_over_six)
    assert t.block_scale.view(torch.uint8).flatten()[place // 16] == 0x7F
    assert not t.q.view(-1, 8)[place // 16].any()
    changed = (t.q != clean.q).view(-1, 8).any(-1)
    assert changed.sum() == 1 and t.global_scale == clean.global_scale
    assert reference.nvfp4_dequantize(*parts(t), dtype=torch.float32).isnan().sum() == 16


def test_a_block_whose_scale_underflows_is_zero(backend):
    """Below half of the smallest scale, 2^-10: the formula alone would leave saturated codes there."""
    x = torch.zeros(2, 16, device=DEVICE)
    x[0, 0], x[1, 0] = 6 * 2.0**-10, -6 * 2.0**-10 * 1.01  # a tie to 0, and just above
    t = quantize(x, torch.ones((), device=DEVICE))
    assert t.block_scale.view(torch.uint8).flatten().tolist() == [0, 1]
    assert t.q[0].tolist() == [0] * 8
    assert t.q[1, 0] == 0x0C or t.q[1, 0] == 0x0D  # -3.03 rounds to -3


@pytest.mark.parametrize("global_scale", [1e-30, 1e-8, 1e8, 1e30])
def test_extreme_global_scales(backend, global_scale):
    """The value comes back to e2m1's precision whatever the global scale, as long as the block scale fits."""
    x = values(4, 4, torch.float32, 1.0, 0.0) * (global_scale * 100)
    t = quantize(x, as_tensor(global_scale))
    error = (oracle.decode(*parts(t)) - x.double()).norm() / x.double().norm()
    assert error < 0.12


@pytest.mark.parametrize("shape", [(16,), (2, 3, 32), (2, 0, 32), (3, 0), (0, 16)])
@pytest.mark.parametrize("layout", ["linear", "128x4"])
def test_shapes(backend, shape, layout):
    x = torch.randn(shape, device=DEVICE)
    t = quantize(x, scale_layout=layout)
    assert t.shape == shape and t.q.shape == (*shape[:-1], shape[-1] // 2) and t.global_scale.dim() == 0
    rows = x.numel() // shape[-1] if shape[-1] else 0
    want = (*shape[:-1], shape[-1] // 16) if layout == "linear" else (-(-rows // 128) * 128, -(-shape[-1] // 64) * 4)
    assert t.block_scale.shape == want
    if layout == "linear" and rows:
        flat = quantize(x.view(rows, shape[-1]))
        assert_same_bits(t.q.view_as(flat.q), flat.q)


def test_strided_x(backend):
    x = values(6, 8, torch.bfloat16, 1.0, 1.0)
    for view in (x[::2, 16:80], x.t()[:, :0].t(), x[:, ::2], x.t().contiguous().t(), x[:1].expand(4, 128)):
        assert_same(quantize(view), quantize(view.contiguous()))


def test_threads_do_not_show(backend):
    x = values(300, 40, torch.bfloat16, 1.0, 2.0) if backend == "cpu" else values(8, 4, torch.bfloat16, 1.0, 2.0)
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            results.append(quantize(x, four_over_six=True))
    finally:
        torch.set_num_threads(threads)
    assert_same(results[0], results[1])
    assert_same(results[0], results[2])


@pytest.mark.parametrize("rows, k", [(3, 2688), (2, 1856), (1, 5120), (1, 12544)])
@pytest.mark.parametrize("four_over_six", [False, True])
def test_published_shapes(backend, rows, k, four_over_six):
    x = torch.randn(rows, k, device=DEVICE).to(torch.bfloat16)
    codes, scales, _ = oracle.quantize(x, None, four_over_six)
    t = quantize(x, four_over_six=four_over_six)
    assert_bytes(t, codes, scales)
    error = (oracle.decode(*parts(t)) - x.double()).norm() / x.double().norm()
    assert error < 0.1
