"""What one Python call costs: one row of 16 times a 1 x 16 matrix, where nothing but the way to the kernel is left."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from n3kernels import nvfp4

from ..conftest import DEVICE

CALLS = 200  # a round; on a GPU fewer than its queue holds


def calls() -> dict[str, Callable[[], object]]:
    x = torch.randn(1, 16, device=DEVICE)
    w = nvfp4.quantize(torch.randn(1, 16, device=DEVICE))
    return {
        "n3 function": partial(nvfp4.linear, x, w),
        "n3 operator": partial(torch.ops.n3.nvfp4_linear.default, x, w.q, w.block_scale, w.global_scale),
        "torch": partial(F.linear, x, w.dequantize(torch.float32)),
    }


@pytest.mark.parametrize("provider", ["n3 function", "n3 operator", "torch"])
def test_python_call(benchmark, provider):
    fn = calls()[provider]
    benchmark.group = "python call: nvfp4_linear 1x16 M=1"
    benchmark.extra_info.update(op="nvfp4_linear", provider=provider)
    sync = torch.cuda.synchronize if DEVICE == "cuda" else lambda: None
    for _ in range(CALLS):
        fn()
    sync()
    benchmark.pedantic(fn, iterations=CALLS, rounds=100, warmup_rounds=5)
    sync()
