"""Offsets whose groups overlap led the packed rows out of their buffers: on the CPU the values are checked."""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICE

from n3kernels import nvfp4

OPS = ["nvfp4_grouped_gemm"]


@pytest.mark.skipif(DEVICE != "cpu", reason="values are checked on the CPU")
@pytest.mark.parametrize("offsets, words", [
    ((0, 7, 4, 6), "offsets must not fall, got 4 after 7"),
    ((0, 100, 4, 6), "offsets must be between 0 and 7, got 100"),
    ((-1, 2, 4, 6), "offsets must be between 0 and 7, got -1"),
    ((0, 2, 4, 8), "offsets must be between 0 and 7, got 8"),
    ((0, 2**31 - 1, 0, -(2**31)), "offsets must be between 0 and 7, got 2147483647"),
])  # fmt: skip
@pytest.mark.parametrize("n", [0, 5])
def test_bad_calls_of_overlapping_groups(backend, offsets, words, n):
    if backend not in ("reference", "cpu"):
        pytest.skip("values are not checked")
    a = nvfp4.quantize(torch.randn(7, 32))
    b = nvfp4.NVFP4Tensor.stack([nvfp4.quantize(torch.randn(5, 32))] * 3)
    b = nvfp4.NVFP4Tensor.from_parts(b.q[:, :n], b.block_scale[:, :n], b.global_scale)
    with pytest.raises(RuntimeError) as error:
        nvfp4.grouped_gemm(a, b, torch.tensor(offsets, dtype=torch.int32), torch.float32)
    assert str(error.value) == f"n3::nvfp4_grouped_gemm: {words}"
