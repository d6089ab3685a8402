"""The container: it is saved, copied and moved as a whole, and never cast."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from conftest import assert_same_bits

from n3kernels import nvfp4


def saved(w, weights_only):
    file = io.BytesIO()
    torch.save({"w": w}, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)["w"]


@pytest.mark.parametrize("layout", ["linear", "128x4"])
@pytest.mark.parametrize("go", [
    copy.copy, copy.deepcopy, lambda w: pickle.loads(pickle.dumps(w)), lambda w: saved(w, False),
    lambda w: saved(w, True), lambda w: w.to("cpu"), lambda w: w.to(torch.device("cpu")),
])  # fmt: skip
def test_there_and_back(go, layout):
    w = nvfp4.quantize(torch.randn(40, 64), scale_layout=layout)
    again = go(w)
    assert isinstance(again, nvfp4.NVFP4Tensor)
    assert (again.scale_layout, tuple(again.shape)) == (w.scale_layout, tuple(w.shape))
    for part in ("q", "block_scale", "global_scale"):
        assert_same_bits(getattr(again, part), getattr(w, part))


def test_a_dtype_is_no_device():
    with pytest.raises(TypeError, match=r"device must be a device, got torch.bfloat16: dequantize\(dtype\)"):
        nvfp4.quantize(torch.randn(2, 32)).to(torch.bfloat16)


def test_a_product_with_what_is_not_quantised():
    with pytest.raises(TypeError, match="w must be an NVFP4Tensor, as nvfp4.quantize makes it, got Tensor"):
        nvfp4.linear(torch.randn(2, 32), torch.randn(4, 32))
