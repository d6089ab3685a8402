"""The text of the CUDA kernels of causal_conv1d_bwd, run on the CPU."""

from __future__ import annotations

import ctypes

import pytest
import torch
from conftest import assert_close_to, assert_same_bits, fenced
from hypothesis import given
from hypothesis import strategies as st
from kernel_arguments import (
    BACKWARD,
    ConvArgs,
    ConvBackwardArgs,
    IndexView,
    SumArgs,
    Taps,
    View,
    doubles,
    indices,
    load_kernels,
    room,
    run,
    view,
)  # fmt: skip
from kernel_problems import FLOATS, conv_operands
from kernel_text import needs_emulator

from n3kernels.mamba import reference

pytestmark = needs_emulator


@pytest.fixture(scope="session")
def kernels():
    return load_kernels("mamba_bwd.cpp", BACKWARD)


def conv_bwd(kernels, grad_y, grad_final, x, weight, bias, initial, cu, sequences, silu, vectors, reverse=False):
    packed, (channels, width) = int(cu is not None), weight.shape
    length = 0 if packed else x.shape[1]
    grads = [None if t is None else room(t.shape, t.dtype) for t in (x, weight, bias, initial)]
    dx, dweight, dbias, d_initial = grads
    forward = ConvArgs(
        view(x, packed), Taps(view(weight), view(bias), channels, width, silu), view(initial), View(), IndexView(),
        View(), indices(cu), IndexView(), IndexView(), None, sequences, x[..., 0].numel(), length, width - 1, 0, 0,
    )  # fmt: skip
    args = ConvBackwardArgs(forward, view(grad_y, packed), view(grad_final), dx.data_ptr(),
                            d_initial.data_ptr() if initial is not None and initial.numel() else None)  # fmt: skip
    sums = SumArgs(channels=channels, weight=view(dweight), bias=view(dbias))
    run(kernels.emulate_conv_bwd, args, ctypes.byref(sums), vectors, reverse)
    return grads


@given(
    st.lists(st.sampled_from([0, 1, 2, 3, 15, 16, 17, 40]), min_size=1, max_size=4), st.booleans(),
    st.sampled_from([1, 8, 520]), st.integers(1, 6), FLOATS, FLOATS, st.booleans(), st.booleans(),
    st.sampled_from(["rows", "slice", "turned"]), st.booleans(), st.booleans(), st.booleans(),
)  # fmt: skip
def test_gradients_are_those_of_the_definition(
    kernels, lengths, packed, channels, width, dtype, weight_dtype, biased, silu, layout, from_zero, final, reverse
):
    """Packed and batched, sequences shorter than the taps, padding, several pieces; in vectors the same bits."""
    cu, count = None, len(lengths)
    if packed:
        cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    tokens = (sum(lengths) + 2,) if packed else (count, lengths[0])
    x, weight, bias = conv_operands(tokens, channels, width, dtype, biased, layout)
    weight, bias = weight.to(weight_dtype), None if bias is None else bias.to(weight_dtype)
    grad_y = fenced(torch.randn(x.shape).to(dtype))
    initial = None if from_zero else fenced(torch.randn(count, channels, width - 1).to(dtype))
    grad_final = fenced(torch.randn(count, channels, width - 1).to(dtype)) if final else None
    activation = "silu" if silu else None

    wide = [t if t is None else t.detach().requires_grad_() for t in doubles(x, weight, bias, initial)]
    outputs = reference.causal_conv1d(*wide, cu, activation=activation)
    leaves = [t for t in wide if t is not None]
    gradients = [grad_y.double(), torch.zeros_like(outputs[1]) if grad_final is None else grad_final.double()]
    outputs, gradients = zip(*((o, g) for o, g in zip(outputs, gradients, strict=True) if o.requires_grad), strict=True)
    truths = torch.autograd.grad(outputs, leaves, gradients, allow_unused=True)
    arguments = grad_y, grad_final, x, weight, bias, initial, cu, count, silu
    ours = [t for t in conv_bwd(kernels, *arguments, False, reverse) if t is not None]
    size = 10 + float(x[..., 0].numel())
    for t, true, leaf in zip(ours, truths, leaves, strict=True):
        true = torch.zeros_like(leaf) if true is None else true
        assert_close_to(t, true, 1e-5, true.abs() + size)
    if layout != "turned" and channels % 4 == 0 and width <= 4:
        again = [t for t in conv_bwd(kernels, *arguments, True) if t is not None]
        for a, b in zip(ours, again, strict=True):
            assert_same_bits(a, b)
