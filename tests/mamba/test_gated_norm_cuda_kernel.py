"""The text of the CUDA kernels of gated_rms_norm, run on the CPU."""

from __future__ import annotations

import pytest
import torch
from conftest import assert_close_to, assert_same_bits, fenced
from hypothesis import given
from hypothesis import strategies as st
from kernel_arguments import NormArgs, doubles, load_kernels, room, run, view
from kernel_problems import FLOATS
from kernel_text import needs_emulator

from n3kernels.mamba import reference

pytestmark = needs_emulator


@pytest.fixture(scope="session")
def kernels():
    return load_kernels()


def norm(kernels, x, z, weight, group_size, eps, before, vectors, reverse=False):
    y, groups = room(x.shape, x.dtype), x.shape[1] // group_size
    run(kernels.emulate_norm, NormArgs(view(x), view(z), view(weight), y.data_ptr(), len(x), groups, group_size, eps,
                                       before), vectors, reverse)  # fmt: skip
    return y


@given(
    st.integers(1, 5), st.integers(1, 3), st.sampled_from([1, 7, 8, 64, 130, 264, 1024, 1032, 5000]), FLOATS, FLOATS,
    st.sampled_from(["none", "first", "last"]), st.booleans(), st.booleans(),
)  # fmt: skip
def test_gated_norm(kernels, rows, groups, size, dtype, weight_dtype, gate, strided, reverse):
    """Groups of every kernel, in vectors and not, which give the same bits."""
    dim = groups * size
    xz = fenced(torch.randn(rows, 2 * dim + 8).to(dtype))
    x, z = xz[:, :dim], xz[:, dim : 2 * dim] if gate != "none" else None
    if strided:
        x = fenced(torch.randn(rows, dim, 2).to(dtype))[..., 0]
    weight = fenced(torch.randn(dim).to(weight_dtype))
    args = size, 1e-5, gate == "last"
    y = norm(kernels, x, z, weight, *args, False, reverse)
    assert_close_to(y, reference.gated_rms_norm(*doubles(x, z, weight), *args))
    if size % 8 == 0 and not strided:
        assert_same_bits(y, norm(kernels, x, z, weight, *args, True))
