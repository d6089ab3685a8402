"""What the tests of the quantiser share: random tensors, global scales and options, and byte for byte comparisons."""

from __future__ import annotations

import zlib

import numpy as np
import torch
from conftest import DEVICE, assert_same_bits, fenced
from hypothesis import strategies as st
from nvfp4_oracle import unpack

from n3kernels.nvfp4 import NVFP4Tensor

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SIGNS = [1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1]  # TransformerEngine's

# rows; blocks per row; dtype; magnitude, out of range in both directions included; spread between blocks
shapes = st.tuples(st.integers(0, 5), st.integers(0, 5), st.sampled_from(DTYPES))
magnitudes = st.tuples(st.sampled_from([1.0, 1e-3, 300.0, 1e-38, 1e-44, 1e30, 3e38]), st.sampled_from([0.0, 2.0, 20.0]))
globals_ = st.sampled_from(
    [None, None, 1.0, 0.0, 0.013, 1e-30, 1e30, 1e-44, float("inf"), float("nan"), -0.013, -1e-44]
)
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


# ---- options: metric, rows, squares, stochastic rounding

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
