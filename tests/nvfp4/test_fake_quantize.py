from __future__ import annotations

import nvfp4_oracle as oracle
import pytest
import torch
from conftest import DEVICE, assert_same_bits
from hypothesis import given
from hypothesis import strategies as st

from n3kernels.nvfp4 import fake_quantize, quantize

OPS = ("nvfp4_fake_quantize",)
shapes = st.tuples(
    st.integers(0, 5), st.integers(0, 5), st.sampled_from([torch.float32, torch.float16, torch.bfloat16])
)


@given(shapes, st.booleans(), st.booleans())
def test_is_the_round_trip(backend, shape, four_over_six, per_row):
    rows, blocks, dtype = shape
    x = torch.randn(rows, 16 * blocks, device=DEVICE).to(dtype)
    want = quantize(x, four_over_six=four_over_six, per_row=per_row).dequantize(dtype)
    assert_same_bits(fake_quantize(x, four_over_six=four_over_six, per_row=per_row), want)


def test_options_reach_the_quantiser(backend):
    x = torch.randn(32, 64, device=DEVICE)
    square = {"block": "16x16", "four_over_six": True, "metric": "mse"}
    assert_same_bits(fake_quantize(x, **square), quantize(x, **square).dequantize(torch.float32))
    generators = (torch.Generator(DEVICE).manual_seed(seed) for seed in (3, 3, 4))
    a, b, other = (fake_quantize(x, rounding="stochastic", generator=g) for g in generators)
    assert torch.equal(a, b) and not torch.equal(a, other)


def test_passes_the_gradient(backend):
    x = torch.randn(4, 32, device=DEVICE, requires_grad=True)
    grad = torch.randn(4, 32, device=DEVICE)
    fake_quantize(x, torch.tensor(1e-6, device=DEVICE)).backward(grad)  # everything saturates
    assert_same_bits(x.grad, grad)


def test_opcheck(backend):
    args = (torch.randn(16, 32, device=DEVICE, requires_grad=True), None, None, "nearest", False, "mae", "16x16")
    oracle.opcheck(torch.ops.n3.nvfp4_fake_quantize.default, args)


def test_compiles_without_a_break(backend):
    torch._dynamo.reset()
    x = torch.randn(4, 32, device=DEVICE, requires_grad=True)
    fn = torch.compile(lambda x: fake_quantize(x).square(), fullgraph=True, backend="aot_eager")
    y = fn(x)
    assert_same_bits(y.detach(), fake_quantize(x).square().detach())
    y.sum().backward()
    assert_same_bits(x.grad, (2 * fake_quantize(x)).detach())


BAD = [
    ({"x": torch.zeros(2, 16, dtype=torch.int64)}, "x must be float32, float16 or bfloat16, got int64"),
    ({"x": torch.zeros(2, 24)}, "x must have a last dimension that is a multiple of 16, got 24"),
    ({"metric": "max"}, "metric must be one of mae, mse, got max"),
    ({"rounding": "stochastic"}, "seed must be given for rounding=stochastic, got None"),
]


@pytest.mark.parametrize("change, message", BAD)
def test_bad_calls(backend, change, message):
    call = {"x": torch.zeros(2, 16), **change}
    with pytest.raises(RuntimeError) as error:
        torch.ops.n3.nvfp4_fake_quantize.default(**{k: v.to(DEVICE) if k == "x" else v for k, v in call.items()})
    assert str(error.value) == f"n3::nvfp4_fake_quantize: {message}"
