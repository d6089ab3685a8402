from __future__ import annotations

import pytest
import torch
from conftest import DEVICE, assert_close_to, assert_invariant, fenced
from hypothesis import given
from hypothesis import strategies as st

from n3kernels.mamba import gated_rms_norm, reference

OPS = ("gated_rms_norm",)

# rows, 0 included; groups; group_size, both sides of a warp and of 128
problems = st.tuples(
    st.integers(0, 5), st.integers(1, 4), st.integers(1, 130),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]), st.booleans(), st.booleans(),
)  # fmt: skip


def inputs(rows, groups, group_size, dtype, gated, norm_before_gate):
    x, z = (fenced(torch.randn(rows, groups * group_size, device=DEVICE).to(dtype)) for _ in range(2))
    weight = fenced(torch.randn(groups * group_size, device=DEVICE).to(dtype))
    return x, z if gated else None, weight, group_size, 1e-5, norm_before_gate


def truth(x, z, weight, *options):
    return reference.gated_rms_norm(x.double(), None if z is None else z.double(), weight.double(), *options)


@given(problems)
def test_agrees_with_the_definition(backend, problem):
    args = inputs(*problem)
    assert_close_to(gated_rms_norm(*args), truth(*args))


@given(problems, st.integers(0, 4))
def test_a_row_does_not_see_the_batch(backend, problem, i):
    """Alone or in company, beside a row of NaN or not: the same bits."""
    rows, *rest = problem
    x, z, *options = inputs(max(rows, i) + 2, *rest)
    x[-1] = float("nan")
    whole = gated_rms_norm(x, z, *options)
    assert_invariant(backend, whole[i], gated_rms_norm(x[i], None if z is None else z[i], *options))
    assert not whole[:-1].isnan().any()


def test_scale_cancels(backend):
    """RMSNorm of 2^k x is RMSNorm of x: exact without eps, as a power of two only moves exponents."""
    x, _, weight, group, _, _ = inputs(3, 2, 64, torch.float32, False, False)
    large = gated_rms_norm(1024 * x, None, weight, group, 0.0)
    assert_invariant(backend, gated_rms_norm(x, None, weight, group, 0.0), large)


@pytest.mark.parametrize("dim, group", [(4096, 512), (8192, 1024), (16384, 2048), (2688, 2688)])
def test_published_shapes(backend, dim, group):
    args = inputs(3, dim // group, group, torch.bfloat16, True, False)
    assert_close_to(gated_rms_norm(*args), truth(*args))


@pytest.mark.parametrize("shape", [(3, 8), (2, 3, 8), (8,), (0, 8)])
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(shape, grad):
    x = torch.randn(shape, device=DEVICE, requires_grad=grad)
    z, weight = torch.randn(shape, device=DEVICE), torch.randn(8, device=DEVICE)
    torch.library.opcheck(torch.ops.n3.gated_rms_norm.default, (x, z, weight, 4))


@pytest.mark.parametrize("norm_before_gate", [False, True])
def test_gradients(norm_before_gate):
    x, z = (torch.randn(3, 8, dtype=torch.double, device=DEVICE, requires_grad=True) for _ in range(2))
    weight = torch.randn(8, dtype=torch.double, device=DEVICE, requires_grad=True)
    torch.autograd.gradcheck(lambda *a: gated_rms_norm(*a, 4, 1e-5, norm_before_gate), (x, z, weight))


BAD = [
    ({"group_size": 3}, "group_size must divide the last dimension 8, got 3"),
    ({"x": torch.zeros(2, 8, dtype=torch.int64)}, "x must be float32, float16 or bfloat16, got int64"),
    ({"z": torch.zeros(2, 7)}, "z must have shape [2, 8], got [2, 7]"),
    ({"z": torch.zeros(2, 8, dtype=torch.float16)}, "z must have the dtype of x (float32), got float16"),
    ({"weight": torch.zeros(7)}, "weight must have shape [8], got [7]"),
]


@pytest.mark.parametrize("change, message", BAD)
def test_bad_calls(backend, change, message):
    good = {"x": torch.zeros(2, 8), "z": torch.zeros(2, 8), "weight": torch.zeros(8), "group_size": 4}
    call = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in {**good, **change}.items()}
    with pytest.raises(RuntimeError) as error:
        gated_rms_norm(**call)
    assert str(error.value) == f"n3::gated_rms_norm: {message}"
