from __future__ import annotations

import pytest
import torch
from conftest import DEVICE, assert_close_to, assert_invariant, assert_same_bits, fenced
from hypothesis import given
from hypothesis import strategies as st

from n3kernels import use_backend
from n3kernels.mamba import gated_rms_norm, reference

OPS = ("gated_rms_norm", "gated_rms_norm_bwd")
pytestmark = pytest.mark.op("gated_rms_norm")  # unless a test says otherwise
backward = torch.ops.n3.gated_rms_norm_bwd.default

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


def test_any_strides(backend):
    """A gate that is a column slice of a projection, as z of the mixer is; rows in another order; a strided weight."""
    x, z, weight, *options = inputs(6, 2, 33, torch.bfloat16, True, False)
    y = gated_rms_norm(x, z, weight, *options)
    wide = torch.randn(6, 80, device=DEVICE).to(torch.bfloat16)
    wide[:, 7:73] = z
    assert_invariant(backend, gated_rms_norm(x, wide[:, 7:73], weight, *options), y)
    rows = y.view(2, 3, 66).transpose(0, 1)
    turned = (t.view(2, 3, 66).transpose(0, 1) for t in (x, z))
    assert_invariant(backend, gated_rms_norm(*turned, weight.repeat_interleave(2)[::2], *options), rows.contiguous())
    columns = (t.T.contiguous().T for t in (x, z))
    assert_invariant(backend, gated_rms_norm(*columns, weight, *options), y)


# ---------------------------------------------------------------- gradients


@given(problems)
@pytest.mark.op("gated_rms_norm_bwd")
def test_backward(backend, problem):
    x, z, weight, *options = inputs(*problem)
    grad_y = fenced(torch.randn(x.shape, device=DEVICE).to(x.dtype))
    grads = backward(grad_y, x, z, weight, *options)
    leaves = [None if t is None else t.double().requires_grad_() for t in (x, z, weight)]
    inputs_ = [t for t in leaves if t is not None]
    truths = iter(torch.autograd.grad(reference.gated_rms_norm(*leaves, *options), inputs_, grad_y.double()))
    for leaf, grad in zip(leaves, grads, strict=True):
        if leaf is None:
            assert grad.numel() == 0
            continue
        want = next(truths)
        assert grad.shape == leaf.shape and grad.dtype == x.dtype and grad.is_contiguous()
        # Sums over rows and groups cancel: the error is relative to their terms, of which none is far above 1.
        assert_close_to(grad, want, 1e-5, 1 + want.abs().max() if want.numel() else 1.0)


@pytest.mark.parametrize("norm_before_gate", [False, True])
@pytest.mark.op("gated_rms_norm_bwd")
def test_backward_of_many_rows(norm_before_gate):
    """More rows than one block of the CPU kernel sums; the bits do not depend on the threads."""
    x, z, weight, *options = inputs(333, 3, 40, torch.float32, True, norm_before_gate)
    grad_y = torch.randn_like(x)
    grads = backward(grad_y, x, z, weight, *options)
    with use_backend("reference"):
        truths = backward(grad_y.double(), x.double(), z.double(), weight.double(), *options)
    for grad, want in zip(grads, truths, strict=True):
        assert (grad - want).norm() <= 1e-6 * want.norm()
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            for again, grad in zip(backward(grad_y, x, z, weight, *options), grads, strict=True):
                assert_same_bits(again, grad)
    finally:
        torch.set_num_threads(threads)


# ---------------------------------------------------------------- the framework


@pytest.mark.parametrize("shape", [(3, 8), (2, 3, 8), (8,), (0, 8)])
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(shape, grad):
    x = torch.randn(shape, device=DEVICE, requires_grad=grad)
    z, weight = torch.randn(shape, device=DEVICE), torch.randn(8, device=DEVICE)
    torch.library.opcheck(torch.ops.n3.gated_rms_norm.default, (x, z, weight, 4))
    if not grad:
        torch.library.opcheck(backward, (torch.randn_like(x), x, z, weight, 4, 1e-5, False))


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


@pytest.mark.parametrize(
    "grad_y, message",
    [
        (torch.zeros(2, 7), "grad_y must have shape [2, 8], got [2, 7]"),
        (torch.zeros(2, 8).half(), "grad_y must have the dtype of x (float32), got float16"),
    ],
)
@pytest.mark.op("gated_rms_norm_bwd")
def test_bad_calls_of_the_backward(backend, grad_y, message):
    x, weight = torch.zeros(2, 8, device=DEVICE), torch.zeros(8, device=DEVICE)
    with pytest.raises(RuntimeError) as error:
        backward(grad_y.to(DEVICE), x, x, weight, 4, 1e-5, False)
    assert str(error.value) == f"n3::gated_rms_norm_bwd: {message}"
