"""Derivatives that a differentiable operator has not raise: torch by itself would give None or zeros."""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICE
from torch.autograd import forward_ad

import n3kernels
from n3kernels import mamba, nvfp4
from n3kernels._dispatch import OPS as ALL
from n3kernels._samples import sample

EVERY_OP = sorted(name for name in ALL if not ALL[name].composite)
BACKWARD = [name for name in EVERY_OP if name.endswith("_bwd")]
# Whose kernel at the Autograd key is ours. The others keep torch's, which is faster: it warns in the backward pass.
OURS = [name for name in EVERY_OP if torch._C._dispatch_has_kernel_for_dispatch_key(f"n3::{name}", "Autograd")]


def bound(name):
    args, kwargs = sample(name, DEVICE)
    return ALL[name].overload, ALL[name].signature.bind(*args, **kwargs)


def written(name):
    schema = ALL[name].overload._schema
    return {a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write}


def floats(arguments):
    return [k for k, v in arguments.items() if isinstance(v, torch.Tensor) and v.dtype == torch.float32]


def outputs(result):
    tensors = [result] if isinstance(result, torch.Tensor) else list(result or ())
    return [t for t in tensors if t.requires_grad]


@pytest.mark.parametrize("name", BACKWARD)
def test_no_second_derivative(name):
    run, call = bound(name)
    argument = floats(call.arguments)[0]
    call.arguments[argument].requires_grad_()
    found = outputs(run(*call.args, **call.kwargs))  # the call itself is no error
    assert found
    for out in found:
        with pytest.raises(RuntimeError, match=f"^n3::{name}: has no gradient: n3's operators are"):
            torch.autograd.grad(out, call.arguments[argument], torch.ones_like(out), retain_graph=True)


def test_every_operator_for_training_is_ours():
    assert {"causal_conv1d", "gated_rms_norm", "grouped_linear", "moe_experts", "moe_route", "nvfp4_linear",
            "ssd_scan"} <= set(OURS)  # fmt: skip


@pytest.mark.parametrize("name", OURS)
def test_no_forward_mode(name):
    run, call = bound(name)
    for argument in floats(call.arguments):
        value = call.arguments[argument]
        with forward_ad.dual_level():
            run(*call.args, **call.kwargs)  # without a tangent it is a call as any other
            call.arguments[argument] = forward_ad.make_dual(value, torch.ones_like(value))
            with pytest.raises(RuntimeError, match=rf"^n3::{name.split('.')[0]}: has no forward-mode derivative"):
                run(*call.args, **call.kwargs)
        call.arguments[argument] = value


def test_differentiable_once():
    x = torch.randn(3, 8, device=DEVICE, requires_grad=True)
    y = mamba.gated_rms_norm(x, None, torch.ones(8, device=DEVICE), 8)
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="n3::gated_rms_norm_bwd: has no gradient: n3's operators"):
        grad.sum().backward()


def test_torch_func():
    x, weight = torch.randn(3, 8, device=DEVICE), torch.rand(8, device=DEVICE)

    def norm(x):
        return mamba.gated_rms_norm(x, None, weight, 8)

    for transform in (torch.func.grad(lambda x: norm(x).sum()), torch.func.jacrev(norm)):
        with pytest.raises(RuntimeError, match="n3::gated_rms_norm: torch.func has no gradient of it"):
            transform(x)
    with pytest.raises(RuntimeError, match="n3::gated_rms_norm: has no forward-mode derivative"):
        torch.func.jvp(norm, (x,), (x,))
    torch.testing.assert_close(torch.func.vmap(norm)(torch.stack([x, -x])), torch.stack([norm(x), norm(-x)]))


def test_a_second_derivative_where_there_is_one():
    """Through relu(v)^2 of an NVFP4 product, half of whose outputs are 0."""
    w, x = nvfp4.quantize(torch.randn(24, 64, device=DEVICE) / 8), torch.randn(5, 64, device=DEVICE)
    dense, direction, found = w.dequantize(torch.float32), torch.randn_like(x), []
    for product in (lambda x: nvfp4.linear(x, w, activation="relu2"), lambda x: (x @ dense.T).relu().square()):
        leaf = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(product(leaf).sum(), leaf, create_graph=True)
        found += torch.autograd.grad(grad, leaf, direction)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", EVERY_OP)
@pytest.mark.parametrize("which", [None, "reference"])
def test_autocast_changes_nothing(name, which):
    results = []
    with n3kernels.use_backend(which):
        for enabled in (False, True):
            run, call = bound(name)
            with torch.autocast(DEVICE, torch.bfloat16, enabled=enabled):
                result = run(*call.args, **call.kwargs)
            tensors = [result] if isinstance(result, torch.Tensor) else list(result or ())
            results.append(tensors + [call.arguments[k] for k in sorted(written(name)) if k in call.arguments])
    for a, b in zip(*results, strict=True):
        assert a is None or torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)))
