from __future__ import annotations

import pytest
import torch
from conftest import DEVICE, assert_invariant, assert_same_bits
from grouped_problems import INT, NAMES, assert_within, definition, inputs, problems
from hypothesis import given
from moe_problems import DTYPES, checking, fast, nvfp4

from n3kernels import use_backend
from n3kernels.moe import grouped_linear

OPS = ("grouped_linear_bwd",)


def positional(call, grad_y):
    return grad_y, *(call[n] for n in ("x", "w", "offsets", "gather", "row_scale", "activation"))


def outputs(call):
    rows = len(call["x"] if call["gather"] is None else call["gather"])
    return rows, call["w"].shape[1] // (1 if call["activation"] in (None, "relu2") else 2)


def backward(call, grad_y):
    return torch.ops.n3.grouped_linear_bwd(*positional(call, grad_y))


def truths(call, grad_y):
    """The gradients of the definition, in float64."""
    leaves = {n: call[n].double().requires_grad_() for n in ("x", "w", "row_scale") if call[n] is not None}
    y = definition(**{**call, **leaves})
    wanted = list(leaves.values())
    if not y.requires_grad:  # no row is in a group
        return [torch.zeros_like(t) for t in wanted]
    grads = torch.autograd.grad(y, wanted, grad_y.double(), allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for g, t in zip(grads, wanted, strict=True)]


def assert_right(call, grad_y, gate=None):
    grads = backward(call, grad_y)
    given = [n for n in ("x", "w", "row_scale") if call[n] is not None]
    for name, grad, true in zip(given, grads, truths(call, grad_y), strict=False):
        assert grad.dtype == call[name].dtype and grad.is_contiguous(), name
        narrow = call["x"].dtype != torch.float32
        assert_within(grad, true, gate or (3e-3 if narrow else 1e-5))
    if call["row_scale"] is None:
        assert grads[2].shape == (0,) and grads[2].dtype == torch.float32


@given(problems)
def test_agrees_with_the_definition(backend, problem):
    call = inputs(*problem)
    grad_y = torch.randn(outputs(call), device=DEVICE).to(call["x"].dtype)
    assert_right(call, grad_y, 3e-3 + torch.finfo(grad_y.dtype).eps / 2 if grad_y.dtype != torch.float32 else 2e-5)


@pytest.mark.parametrize("activation", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gate(backend, activation, dtype):
    call = inputs(30, 70, 3, 80, 40, True, True, True, activation, dtype)
    assert_right(call, torch.randn(70, 40, device=DEVICE).to(dtype))


def test_a_group_without_rows_has_no_gradient(backend):
    call = inputs(9, 0, 4, 16, 8, False, True, False, "relu2", torch.bfloat16)
    call["offsets"] = torch.tensor([2, 5, 5, 7, 7], **INT)
    dx, dw, dscale = backward(call, torch.ones(9, 8, device=DEVICE).bfloat16())
    assert not dw[1].any() and not dw[3].any() and dw[0].any() and dw[2].any()
    assert not dx[:2].any() and not dx[7:].any() and not dscale[:2].any() and not dscale[7:].any()


def test_rows_that_are_skipped_read_nothing(backend):
    """NaN in their row of x, their factor and their gradient, in no group or gathered from nowhere."""
    call = inputs(9, 9, 2, 16, 8, True, True, False, "relu2", torch.float32)
    call["offsets"] = torch.tensor([1, 4, 8], **INT)
    call["gather"] = torch.tensor([8, 1, -1, 2, 3, -5, 4, 1, 8], **INT)
    grad_y = torch.randn(9, 8, device=DEVICE)
    truth = backward(call, grad_y)
    skipped = [0, 2, 5, 8]
    grad_y[skipped], call["row_scale"][skipped], call["x"][[0, 8]] = (float("nan"),) * 3
    for grad, true in zip(backward(call, grad_y), truth, strict=True):
        assert_invariant(backend, grad, true)
    assert not truth[0][[0, 8]].any() and not truth[2][skipped].any()


def test_a_row_that_is_gathered_often(backend):
    """Its gradient is the sum over what was made of it, in ascending order."""
    call = inputs(3, 200, 3, 32, 16, True, True, False, None, torch.float32)
    call["gather"].fill_(1)
    grad_y = torch.randn(200, 16, device=DEVICE)
    assert_right(call, grad_y)
    dx = backward(call, grad_y)[0]
    assert not dx[0].any() and not dx[2].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_call_gives_the_same_bits(backend, dtype):
    call = inputs(20, 90, 3, 32, 16, True, True, True, "gelu", dtype)
    grad_y = torch.randn(90, 16, device=DEVICE).to(dtype)
    for a, b in zip(backward(call, grad_y), backward(call, grad_y), strict=True):
        assert_same_bits(a, b)


def test_a_group_does_not_see_the_others(backend):
    """A group's weights have the gradient that its rows alone give."""
    call = inputs(12, 0, 3, 32, 16, False, True, False, "silu", torch.float32)
    call["offsets"] = torch.tensor([0, 3, 8, 12], **INT)
    grad_y = torch.randn(12, 16, device=DEVICE)
    whole = backward(call, grad_y)
    only = {**call, "x": call["x"][3:8], "w": call["w"][1:2], "row_scale": call["row_scale"][3:8]}
    alone = backward({**only, "offsets": torch.tensor([0, 5], **INT)}, grad_y[3:8])
    for a, b in zip(alone, (whole[0][3:8], whole[1][1:2], whole[2][3:8]), strict=True):
        assert_invariant(backend, a, b)


def test_strided_inputs(backend):
    """An expanded gradient, as that of a sum, and transposed views."""
    call = inputs(9, 20, 3, 32, 16, True, True, True, "relu2", torch.float32)
    grad_y = torch.randn(1, 1, device=DEVICE).expand(20, 16)
    truth = backward(call, grad_y.contiguous())
    strided = dict(call)
    strided["x"] = call["x"].t().contiguous().t()
    strided["w"] = call["w"].transpose(1, 2).contiguous().transpose(1, 2)
    for name in ("offsets", "gather", "row_scale"):
        strided[name] = call[name].repeat_interleave(2)[::2]
    for grad, true in zip(backward(strided, grad_y), truth, strict=True):
        assert grad.is_contiguous()
        assert_invariant(backend, grad, true)


# rows, groups, width, outputs
PUBLISHED = [(12, 3, 1024, 336), (9, 2, 464, 1024), (9, 2, 232, 512), (40, 512, 16, 32)]


@pytest.mark.parametrize("which", fast("grouped_linear_bwd"))
@pytest.mark.parametrize("rows, groups, width, outputs", PUBLISHED)
def test_published_shapes(which, rows, groups, width, outputs):
    call = inputs(rows, 0, groups, width, outputs, False, True, False, "relu2", torch.bfloat16)
    call["offsets"] = torch.linspace(0, rows, groups + 1).to(**INT)
    with use_backend(which):
        assert_right(call, torch.randn(rows, outputs, device=DEVICE).bfloat16())


# ---- through autograd


@pytest.mark.parametrize("activation", NAMES)
@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_gradcheck(activation, gathered, scaled):
    call = inputs(5, 7, 3, 6, 4, gathered, scaled, True, activation, torch.double)
    names = [n for n in ("x", "w", "row_scale") if call[n] is not None]
    leaves = [call[n].double().clone().requires_grad_() for n in names]
    if scaled:
        call["row_scale"] = call["row_scale"].double()
    torch.autograd.gradcheck(
        lambda *leaves: grouped_linear(**{**call, **dict(zip(names, leaves, strict=True))}), leaves
    )


def test_gradients_stop_at_nvfp4_weights():
    x = torch.randn(2, 16, device=DEVICE, requires_grad=True)
    y = grouped_linear(x, nvfp4(2, 32, 16), torch.tensor([0, 1, 2], **INT))
    with pytest.raises(RuntimeError, match="n3::grouped_linear_bwd: w must be dense, got NVFP4"):
        y.sum().backward()


@pytest.mark.parametrize("rows", [0, 4])
def test_opcheck(rows):
    call = inputs(3, rows, 3, 8, 6, True, True, True, "relu2", torch.float32)
    call["w"] = call["w"].transpose(1, 2).contiguous().transpose(1, 2)
    torch.library.opcheck(torch.ops.n3.grouped_linear_bwd.default, positional(call, torch.ones(outputs(call))))
    call |= {"row_scale": None}
    torch.library.opcheck(torch.ops.n3.grouped_linear_bwd.default, positional(call, torch.ones(outputs(call))))


GOOD = {
    "grad_y": torch.zeros(4, 6), "x": torch.zeros(4, 16), "w": torch.zeros(2, 6, 16),
    "offsets": torch.tensor([0, 2, 4], dtype=torch.int32), "gather": None, "row_scale": None, "activation": None,
}  # fmt: skip
BAD = [
    ({"w": torch.zeros(2, 6, 8, dtype=torch.uint8)}, "w must be dense, got NVFP4: decode it first to train through it"),
    ({"x": torch.zeros(4, 16, dtype=torch.int32)}, "x must be float32, float16 or bfloat16, got int32"),
    ({"activation": "relu"}, "activation must be one of None, relu2, silu, gelu, got relu"),
    ({"w": torch.zeros(2, 6, 15)}, "w must have shape [2, 6, 16], got [2, 6, 15]"),
    ({"w": torch.zeros(2, 5, 16), "activation": "gelu"},
     "w must have an even number of rows per group for gelu, got 5"),
    ({"offsets": torch.zeros(2, dtype=torch.int32)}, "offsets must have shape [3], got [2]"),
    ({"gather": torch.zeros(3, dtype=torch.int64)}, "gather must be int32, got int64"),
    ({"row_scale": torch.zeros(5)}, "row_scale must have shape [4], got [5]"),
    ({"grad_y": torch.zeros(4, 6).half()}, "grad_y must have the dtype of x (float32), got float16"),
    ({"grad_y": torch.zeros(4, 5)}, "grad_y must have shape [4, 6], got [4, 5]"),
    ({"activation": "silu"}, "grad_y must have shape [4, 3], got [4, 6]"),
]  # fmt: skip


@pytest.mark.parametrize("change, message", BAD)
def test_bad_calls(backend, change, message):
    call = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in {**GOOD, **change}.items()}
    with pytest.raises(RuntimeError) as error:
        torch.ops.n3.grouped_linear_bwd(**call)
    assert str(error.value) == f"n3::grouped_linear_bwd: {message}"


@pytest.mark.parametrize("which", checking("grouped_linear_bwd"))
@pytest.mark.parametrize("offsets, gather, message", [
    ([0, 2, 5], None, "offsets must be between 0 and 4, got 5"),
    ([3, 2, 4], None, "offsets must not fall, got 2 after 3"),
    ([0, 0, 0], [0, 4, 1, 1], "gather must be below the 4 rows of x, got 4"),
])  # fmt: skip
def test_bad_values(which, offsets, gather, message):
    gather = gather and torch.tensor(gather, dtype=torch.int32)
    call = {**GOOD, "offsets": torch.tensor(offsets, dtype=torch.int32), "gather": gather}
    with pytest.raises(RuntimeError) as error, use_backend(which):
        torch.ops.n3.grouped_linear_bwd(**call)
    assert str(error.value) == f"n3::grouped_linear_bwd: {message}"
