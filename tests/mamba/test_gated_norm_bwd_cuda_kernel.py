"""The text of the CUDA kernels of gated_rms_norm_bwd, run on the CPU."""

from __future__ import annotations

import ctypes

import pytest
import torch
from conftest import assert_close_to, assert_same_bits, fenced
from hypothesis import given
from hypothesis import strategies as st
from kernel_arguments import BACKWARD, NormArgs, NormBackwardArgs, SumArgs, doubles, load_kernels, room, run, view
from kernel_problems import FLOATS
from kernel_text import needs_emulator

from n3kernels.mamba import reference

pytestmark = needs_emulator


@pytest.fixture(scope="session")
def kernels():
    return load_kernels("mamba_bwd.cpp", BACKWARD)


def norm_bwd(kernels, grad_y, x, z, weight, group_size, eps, before, vectors, reverse=False):
    dx, dz, dweight = (None if t is None else room(t.shape, t.dtype) for t in (x, z, weight))
    rows, groups = len(x), x.shape[1] // group_size
    forward = NormArgs(view(x), view(z), view(weight), None, rows, groups, group_size, eps, before)
    args = NormBackwardArgs(forward, view(grad_y), dx.data_ptr(), None if z is None else dz.data_ptr())
    sums = SumArgs(channels=x.shape[1], weight=view(dweight))
    run(kernels.emulate_norm_bwd, args, ctypes.byref(sums), vectors, reverse)
    return dx, dz, dweight


@given(
    st.sampled_from([0, 1, 5, 17, 128]), st.integers(1, 3), st.sampled_from([1, 7, 8, 64, 264, 520, 1032, 13000]),
    FLOATS, FLOATS, st.sampled_from(["none", "first", "last"]), st.booleans(), st.booleans(),
)  # fmt: skip
def test_gradients_are_those_of_the_definition(
    kernels, rows, groups, size, dtype, weight_dtype, gate, strided, reverse
):
    """Several pieces, groups of every kernel and one too long for shared memory; in vectors the same bits."""
    rows, groups = (min(rows, 2), 1) if size > 5000 else (min(rows, 128 if size < 100 else 20), groups)
    dim = groups * size
    xz = fenced(torch.randn(rows, 2 * dim + 8).to(dtype))
    x, z = xz[:, :dim], xz[:, dim : 2 * dim] if gate != "none" else None
    if strided:
        x = fenced(torch.randn(rows, dim, 2).to(dtype))[..., 0]
    grad_y, weight = fenced(torch.randn(rows, dim).to(dtype)), fenced(torch.randn(dim).to(weight_dtype))
    args = size, 1e-5, gate == "last"
    wide = [t if t is None else t.requires_grad_() for t in doubles(x, z, weight)]
    truth = reference.gated_rms_norm(*wide, *args)
    truths = torch.autograd.grad(truth, [t for t in wide if t is not None], grad_y.double())
    grads = norm_bwd(kernels, grad_y, x, z, weight, *args, False, reverse)
    ours = [t for t in grads if t is not None]
    spread = truth.detach().abs().amax() + 1 if rows else 1.0  # of one element's terms, which cancel
    for t, true in zip(ours, truths, strict=True):
        assert_close_to(t, true, 1e-5, true.abs() + spread * 30)
    if size % 8 == 0 and not strided:
        again = norm_bwd(kernels, grad_y, x, z, weight, *args, True)
        for a, b in zip(ours, (t for t in again if t is not None), strict=True):
            assert_same_bits(a, b)
