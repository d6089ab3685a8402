from __future__ import annotations

import nvfp4_oracle as oracle
import pytest
import torch
from conftest import DEVICE, assert_close_to, assert_same_bits, fenced
from hypothesis import given
from hypothesis import strategies as st
from nvfp4_oracle import e4m3, weights

from n3kernels.nvfp4 import NVFP4Tensor, dequantize, reference

OPS = ("nvfp4_dequantize",)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

# rows, both sides of a tile of 128; blocks per row, whole tiles and not; dtype; layout; global scale
problems = st.tuples(
    st.sampled_from([0, 1, 3, 127, 130]), st.integers(0, 9), st.sampled_from(DTYPES), st.booleans(),
    st.sampled_from([1.0, 0.013, 1e-30, 1e30, 0.0]),
)  # fmt: skip


def swizzled(block_scale: torch.Tensor) -> torch.Tensor:
    return fenced(reference.nvfp4_swizzle_scale(block_scale))


@given(problems)
def test_agrees_with_the_definition(backend, problem):
    rows, blocks, dtype, tiles, global_scale = problem
    q, s, g = weights(rows, blocks * 16, global_scale)
    tiles = tiles and blocks > 0  # a matrix without columns has no rows to tile
    t = NVFP4Tensor.from_parts(q, swizzled(s) if tiles else s, g, scale_layout="128x4" if tiles else "linear")
    out = dequantize(t, dtype)
    assert_same_bits(out, reference.nvfp4_dequantize(q, s, g, dtype=dtype))
    if global_scale < 1e30:
        truth = oracle.decode(q, s, g)
        assert_close_to(out, truth.clamp(-65504, 65504) if dtype == torch.float16 else truth, 1.2e-7)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_code_with_every_scale_is_exact(backend, dtype):
    """All 4096 pairs: scales that are 0, subnormal, negative, NaN; -0 keeps its sign."""
    q = torch.arange(8, device=DEVICE).mul(0x22).add(0x10).to(torch.uint8).repeat(256, 1)  # codes 0..15 in order
    s = e4m3(torch.arange(256)).view(256, 1)
    out = dequantize(NVFP4Tensor.from_parts(q, s, torch.ones((), device=DEVICE)), dtype)
    want = oracle.decode(q, s).to(dtype)
    nan = want.isnan()
    assert nan[[0x7F, 0xFF]].all() and nan.sum() == 32
    assert_same_bits(out.isnan(), nan)
    assert_same_bits(out[~nan], want[~nan])


@pytest.mark.parametrize("lead", [(3, 5), (3,), (), (1,)])
@pytest.mark.parametrize("tiles", [False, True])
def test_global_scales_of_matrices_and_rows(backend, lead, tiles):
    q, s, _ = weights(15, 48)
    q, s = q.view(3, 5, 24), s.view(3, 5, 3)
    g = torch.rand(*lead, 2, device=DEVICE)[..., 0]  # strided
    stored = reference.nvfp4_swizzle_scale(s.view(15, 3)) if tiles else s
    out = torch.ops.n3.nvfp4_dequantize.default(
        q, stored, g, dtype=torch.float32, scale_layout="128x4" if tiles else "linear"
    )
    each = g.reshape(*g.shape, *[1] * (2 - g.dim())).expand(3, 5) if g.numel() > 1 else g.expand(3, 5)
    for i in range(3):
        for j in range(5):
            assert_same_bits(out[i, j], reference.nvfp4_dequantize(q[i, j], s[i, j], each[i, j], dtype=torch.float32))


def test_padding_is_not_read(backend):
    """Rows and scale columns that pad the 128x4 tiles may hold anything, NaN included."""
    q, s, g = weights(130, 80)
    room = torch.full((256, 8), 0x7F, dtype=torch.uint8, device=DEVICE)
    room[:130, :5] = s.view(torch.uint8)
    t = NVFP4Tensor(q, reference.nvfp4_swizzle_scale(room.view(torch.float8_e4m3fn)), g, "128x4", (130, 80))
    assert_same_bits(t.dequantize(torch.float32), reference.nvfp4_dequantize(q, s, g, dtype=torch.float32))


@pytest.mark.parametrize("shape", [(16,), (2, 3, 32), (2, 0, 32), (3, 0), (0, 16)])
def test_shapes(backend, shape):
    rows = torch.Size(shape[:-1]).numel()
    q, s, g = weights(rows, shape[-1])
    t = NVFP4Tensor.from_parts(q.view(*shape[:-1], shape[-1] // 2), s.view(*shape[:-1], shape[-1] // 16), g)
    out = t.dequantize(torch.float32)
    assert out.shape == t.shape == shape
    assert_close_to(out.view(rows, shape[-1]), oracle.decode(q, s, g), 1.2e-7)


def test_strided_parts(backend):
    q, s, g = weights(6, 64)
    t = NVFP4Tensor.from_parts(q[::2, 8:24], s[::2, 1:3], g.view(1))
    want = reference.nvfp4_dequantize(q, s, g, dtype=torch.bfloat16)[::2, 16:48]
    assert_same_bits(t.dequantize(), want)
    transposed = NVFP4Tensor.from_parts(q.t().contiguous().t(), s.t().contiguous().t(), g)
    assert_same_bits(transposed.dequantize()[::2, 16:48], want)


def test_stack_has_a_global_scale_per_matrix(backend):
    parts = [NVFP4Tensor.from_parts(*weights(4, 32, 0.3**i)) for i in range(3)]
    stacked = NVFP4Tensor.stack(parts)
    assert stacked.shape == (3, 4, 32) and stacked.global_scale.shape == (3,)
    for dtype in DTYPES:
        assert_same_bits(stacked.dequantize(dtype), torch.stack([t.dequantize(dtype) for t in parts]))


def test_inverse_convention_and_to():
    q, s, g = weights(4, 32, 0.25)
    t = NVFP4Tensor.from_parts(q, s, torch.full_like(g, 4.0), inverse=True)
    assert t.global_scale == g
    assert_same_bits(t.to("cpu").dequantize(), NVFP4Tensor.from_parts(q, s, g).dequantize().cpu())


@pytest.mark.parametrize("lead", [(130,), (5, 26)])
def test_layouts_convert(lead):
    q, s, g = weights(130, 80)
    t = NVFP4Tensor.from_parts(q.view(*lead, 40), s.view(*lead, 5), g)
    tiles = t.to_layout("128x4")
    assert tiles.block_scale.shape == (256, 8) and tiles.scale_layout == "128x4"
    assert_same_bits(tiles.dequantize(), t.dequantize())
    assert_same_bits(tiles.to_layout("linear").block_scale, t.block_scale)
    with pytest.raises(ValueError, match="scale_layout must be one of linear, 128x4, got 8x4"):
        t.to_layout("8x4")


@pytest.mark.parametrize("layout", ["linear", "128x4"])
@pytest.mark.parametrize("rows", [0, 3])
def test_opcheck(layout, rows):
    q, s, g = weights(rows, 48)
    s = s if layout == "linear" else reference.nvfp4_swizzle_scale(s)
    op = torch.ops.n3.nvfp4_dequantize.default
    oracle.opcheck(op, (q, s, g), {"dtype": torch.bfloat16, "scale_layout": layout})


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_break(dynamic):
    torch._dynamo.reset()
    fn = torch.compile(lambda t: t.dequantize() * 2, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (3, 5):
        t = NVFP4Tensor.from_parts(*weights(rows, 48))
        assert_same_bits(fn(t), t.dequantize() * 2)


BAD = [
    ({"q": torch.zeros(2, 16, dtype=torch.int8)}, "q must be uint8, got int8"),
    ({"block_scale": torch.zeros(2, 2)}, "block_scale must be float8_e4m3fn, got float32"),
    ({"global_scale": torch.ones((), dtype=torch.float64)}, "global_scale must be float32, got float64"),
    ({"dtype": torch.float64}, "dtype must be float32, float16 or bfloat16, got float64"),
    ({"scale_layout": "8x4"}, "scale_layout must be one of linear, 128x4, got 8x4"),
    ({"q": torch.zeros((), dtype=torch.uint8)}, "q must have at least 1 dimension, got 0"),
    ({"q": torch.zeros(2, 12, dtype=torch.uint8)}, "q must have a last dimension that is a multiple of 8, got 12"),
    ({"q": torch.zeros(3, 16, dtype=torch.uint8)},
     "block_scale must have the shape of q with a last dimension of 2, got [2, 2]"),
    ({"q": torch.zeros(1, 2, 16, dtype=torch.uint8)},
     "block_scale must have the shape of q with a last dimension of 2, got [2, 2]"),
    ({"scale_layout": "128x4"}, "block_scale must have shape [128, 4], got [2, 2]"),
    ({"global_scale": torch.ones(3)}, "global_scale must have 1 element or the leading dimensions of q, got [3]"),
    ({"global_scale": torch.ones(2, 2)}, "global_scale must have 1 element or the leading dimensions of q, got [2, 2]"),
]  # fmt: skip


@pytest.mark.parametrize("change, message", BAD)
def test_bad_calls(backend, change, message):
    call = {"q": torch.zeros(2, 16, dtype=torch.uint8), "block_scale": torch.zeros(2, 2).to(torch.float8_e4m3fn),
            "global_scale": torch.ones(()), "dtype": torch.float32, **change}  # fmt: skip
    call = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in call.items()}
    with pytest.raises(RuntimeError) as error:
        torch.ops.n3.nvfp4_dequantize.default(**call)
    assert str(error.value) == f"n3::nvfp4_dequantize: {message}"
