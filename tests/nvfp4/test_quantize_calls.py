"""The quantiser in the framework: opcheck, torch.compile, no gradient, and the table of bad calls."""

from __future__ import annotations

import nvfp4_oracle as oracle
import pytest
import torch
from conftest import DEVICE, assert_same_bits

from n3kernels.nvfp4 import quantize

OPS = ("nvfp4_quantize",)
# Triton's interpreter computes in NumPy, which warns of the overflows that the formula has by design.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning")
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
