from __future__ import annotations

import zlib

import numpy as np
import nvfp4_oracle as oracle
import pytest
import torch
from conftest import DEVICE, assert_same_bits, fenced
from hypothesis import given
from hypothesis import strategies as st
from nvfp4_oracle import e4m3, unpack

import n3kernels
from n3kernels.nvfp4 import NVFP4Tensor, quantize, reference, reference_quantize

OPS = ("nvfp4_quantize",)
# Triton's interpreter computes in NumPy, which warns of the overflows that the formula has by design.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SIGNS = [1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1]  # TransformerEngine's

# rows; blocks per row; dtype; magnitude, out of range in both directions included; spread between blocks
shapes = st.tuples(st.integers(0, 5), st.integers(0, 5), st.sampled_from(DTYPES))
magnitudes = st.tuples(st.sampled_from([1.0, 1e-3, 300.0, 1e-38, 1e-44, 1e30, 3e38]), st.sampled_from([0.0, 2.0, 20.0]))
globals_ = st.sampled_from([None, None, 1.0, 0.0, 0.013, 1e-30, 1e30, 1e-44, float("inf"), float("nan")])
# what is written over some elements
specials = st.lists(
    st.tuples(
        st.integers(0, 399),
        st.sampled_from([0.0, -0.0, float("nan"), float("inf"), float("-inf"), 1e-40, 65504.0, 0.25, 5.0]),
    ),
    max_size=4,
)


def values(rows, blocks, dtype, magnitude, spread):
    """Normal numbers, block b times 2^(spread * normal): scales differ from block to block, many underflow. The same
    for the same arguments, so that hypothesis can replay a failure."""
    torch.manual_seed(zlib.crc32(repr((rows, blocks, magnitude, spread)).encode()))
    x = torch.randn(rows, blocks, 16) * magnitude * torch.exp2(spread * torch.randn(rows, blocks, 1))
    return fenced(x.view(rows, blocks * 16).to(dtype).to(DEVICE))


def as_tensor(global_scale):
    return None if global_scale is None else torch.tensor(global_scale, device=DEVICE)


def parts(t: NVFP4Tensor):
    return t.q, t.block_scale, t.global_scale


def assert_same(a: NVFP4Tensor, b: NVFP4Tensor):
    for x, y in zip(parts(a), parts(b), strict=True):
        assert_same_bits(x, y)


def assert_bytes(t: NVFP4Tensor, codes: np.ndarray, scales: np.ndarray):
    np.testing.assert_array_equal(t.block_scale.view(torch.uint8).cpu().numpy(), scales)
    np.testing.assert_array_equal(unpack(t.q), codes)


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


# ---- the options: metric, rows, squares, stochastic rounding, rotation, strides

options = st.fixed_dictionaries(
    {
        "four_over_six": st.booleans(),
        "metric": st.sampled_from(["mae", "mse"]),
        "per_row": st.booleans(),
        "square": st.booleans(),
        "seed": st.sampled_from([None, None, (7, 0), (-3, 2**40)]),
    }
).filter(lambda o: not (o["per_row"] and o["square"]))


def run(x, global_scale, o, hadamard=None, scale_layout="linear"):
    """The operator under the oracle's names of the options."""
    seed = None if o["seed"] is None else torch.tensor(o["seed"], device=DEVICE)
    return torch.ops.n3.nvfp4_quantize.default(
        x, global_scale, hadamard, seed, rounding="nearest" if seed is None else "stochastic",
        four_over_six=o["four_over_six"], metric=o["metric"], block="16x16" if o["square"] else "1x16",
        per_row=o["per_row"], scale_layout=scale_layout,
    )  # fmt: skip


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


# ---- framework


OPTIONS = [
    {}, {"four_over_six": True, "scale_layout": "128x4"}, {"block": "16x16"}, {"per_row": True, "metric": "mse"},
    {"hadamard": torch.ones(16), "rounding": "stochastic", "seed": torch.zeros(2, dtype=torch.int64)},
]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("rows", [16, 0])
def test_opcheck(options, rows):
    options = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    x = torch.randn(rows, 48, device=DEVICE)
    oracle.opcheck(torch.ops.n3.nvfp4_quantize.default, (x, None), options)
    given_scale = torch.ones((rows,) if options.get("per_row") else (), device=DEVICE)
    oracle.opcheck(torch.ops.n3.nvfp4_quantize.default, (x, given_scale), options)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("layout", ["linear", "128x4"])
def test_compiles_without_a_break(dynamic, layout):
    torch._dynamo.reset()

    def roundtrip(x):
        return quantize(x * 2, scale_layout=layout, four_over_six=True).dequantize(torch.float32)

    fn = torch.compile(roundtrip, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (3, 5, 130):
        x = torch.randn(rows, 48, device=DEVICE)
        assert_same_bits(fn(x), roundtrip(x))


def test_no_gradient_flows():
    t = quantize(torch.randn(2, 16, device=DEVICE, requires_grad=True))
    assert not t.global_scale.requires_grad


BAD = [
    ({"x": torch.zeros(2, 16, dtype=torch.int64)}, "x must be float32, float16 or bfloat16, got int64"),
    ({"x": torch.zeros(2, 16, dtype=torch.float64)}, "x must be float32, float16 or bfloat16, got float64"),
    ({"x": torch.zeros(())}, "x must have at least 1 dimension, got 0"),
    ({"x": torch.zeros(2, 24)}, "x must have a last dimension that is a multiple of 16, got 24"),
    ({"global_scale": torch.ones((), dtype=torch.float64)}, "global_scale must be float32, got float64"),
    ({"global_scale": torch.ones(2)}, "global_scale must have 1 element, got 2"),
    ({"rounding": "up"}, "rounding must be one of nearest, stochastic, got up"),
    ({"block": "1x32"}, "block must be one of 1x16, 16x16, got 1x32"),
    ({"scale_layout": "8x4"}, "scale_layout must be one of linear, 128x4, got 8x4"),
    ({"metric": "max"}, "metric must be one of mae, mse, got max"),
    ({"global_scale": torch.ones(3), "per_row": True}, "global_scale must have shape [2], got [3]"),
    ({"global_scale": torch.ones(1), "per_row": True}, "global_scale must have shape [2], got [1]"),
    ({"x": torch.zeros(16, 16), "block": "16x16", "per_row": True}, "per_row must be False for block=16x16, got True"),
    ({"block": "16x16"}, "x must have rows in multiples of 16 for block=16x16, got 2"),
    ({"hadamard": torch.ones(16, dtype=torch.float64)}, "hadamard must be float32, got float64"),
    ({"hadamard": torch.ones(8)}, "hadamard must have shape [16], got [8]"),
    ({"rounding": "stochastic"}, "seed must be given for rounding=stochastic, got None"),
    ({"rounding": "stochastic", "seed": torch.zeros(2)}, "seed must be int64, got float32"),
    ({"rounding": "stochastic", "seed": torch.zeros(1, dtype=torch.int64)}, "seed must have shape [2], got [1]"),
]


def call_and_compare(change, message):
    call = {"x": torch.zeros(2, 16), **change}
    call = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in call.items()}
    with pytest.raises(RuntimeError) as error:
        torch.ops.n3.nvfp4_quantize.default(**call)
    assert str(error.value) == f"n3::nvfp4_quantize: {message}"


@pytest.mark.parametrize("change, message", BAD)
def test_bad_calls(backend, change, message):
    call_and_compare(change, message)
