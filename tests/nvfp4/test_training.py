"""Training with NVFP4 products: which operands are quantised how, that gradients are unbiased, that it learns."""

from __future__ import annotations

import pytest
import torch
import torch.utils.checkpoint
from conftest import DEVICE, assert_same_bits
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from n3kernels.nvfp4 import NVFP4Tensor, Recipe, TrainingLinear, quantize, training_linear
from n3kernels.nvfp4.training import SIGNS

PLAIN = Recipe(square_weights=False, stochastic_gradients=False, hadamard=False)
SEED = torch.tensor([5, 0], device=DEVICE)


def operands(tokens: int, n: int, k: int, dtype=torch.float32):
    x = torch.randn(tokens, k, device=DEVICE).to(dtype).requires_grad_()
    w = torch.randn(n, k, device=DEVICE).requires_grad_()
    return x, w, torch.randn(tokens, n, device=DEVICE).to(dtype)


def gradients(x, w, grad, recipe, seed=SEED):
    y = training_linear(x, w, None, seed, recipe)
    return y.detach(), *torch.autograd.grad(y, (x, w), grad)


def value(t: NVFP4Tensor) -> torch.Tensor:
    return t.dequantize(torch.float32).double()


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.mark.parametrize("four_over_six", [False, True])
def test_each_product_has_its_operands(four_over_six):
    """Without randomness each product is that of the quantised operands, each quantised along what is summed over."""
    x, w, grad = operands(32, 48, 64)
    recipe = Recipe(stochastic_gradients=False, four_over_six=four_over_six)
    y, dx, dw = gradients(x, w, grad, recipe)
    signs, six = torch.tensor(SIGNS, device=DEVICE), {"four_over_six": four_over_six}
    wq = value(quantize(w, block="16x16", **six))
    assert relative(y, value(quantize(x, **six)) @ wq.T) < 1e-6
    assert relative(dx, value(quantize(grad)) @ wq) < 1e-6
    turned, rotated = value(quantize(grad.T, hadamard=signs)), value(quantize(x.T, hadamard=signs, **six))
    assert relative(dw, turned @ rotated.T) < 1e-6
    _, dx, dw = gradients(x, w, grad, PLAIN)
    assert relative(dx, value(quantize(grad)) @ value(quantize(w.T)).T) < 1e-6
    assert relative(dw, value(quantize(grad.T)) @ value(quantize(x.T)).T) < 1e-6


def test_stochastic_gradients_are_unbiased():
    x, w, grad = operands(32, 48, 64)
    exact_dx = grad.double() @ value(quantize(w, block="16x16"))
    signs = torch.tensor(SIGNS, device=DEVICE)
    rotated = value(quantize(x.T, hadamard=signs))
    draws = [gradients(x, w, grad, Recipe(), torch.tensor([9, 2 * i], device=DEVICE)) for i in range(64)]
    mean_dx, mean_dw = (torch.stack([d[i].double() for d in draws]).mean(0) for i in (1, 2))
    _, nearest_dx, nearest_dw = gradients(x, w, grad, Recipe(stochastic_gradients=False))
    # the rotation is orthogonal: undone on both sides, the exact product of the quantised x is left
    h = quantize_free_rotation(grad.T.double(), signs)
    exact_dw = h @ rotated.T
    assert relative(mean_dx, exact_dx) < 0.4 * relative(nearest_dx, exact_dx)
    assert relative(mean_dw, exact_dw) < 0.4 * relative(nearest_dw, exact_dw)
    assert relative(draws[0][1], draws[1][1]) > 0.01


def quantize_free_rotation(t: torch.Tensor, signs: torch.Tensor) -> torch.Tensor:
    h = torch.ones(1, 1, dtype=torch.float64, device=t.device)
    for _ in range(4):
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return (t.reshape(-1, 16) * signs.double() @ h / 4).view_as(t)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), st.sampled_from([torch.float32, torch.bfloat16]))
def test_any_size(tokens, n, k, dtype):
    """Sizes that are no multiples of 16 are those of operands with zeros added."""
    x, w, grad = operands(tokens, n, k, dtype)
    got = gradients(x, w, grad, Recipe(stochastic_gradients=False))
    room = [torch.zeros(-(-a // 16) * 16, -(-b // 16) * 16, device=DEVICE, dtype=t.dtype)
            for t, (a, b) in zip((x, w, grad), (x.shape, w.shape, grad.shape), strict=True)]  # fmt: skip
    for full, t in zip(room, (x, w, grad), strict=True):
        full[: t.shape[0], : t.shape[1]] = t.detach()
    want = gradients(room[0].requires_grad_(), room[1].requires_grad_(), room[2], Recipe(stochastic_gradients=False))
    for a, b in zip(got, want, strict=True):
        assert_same_bits(a, b[: a.shape[0], : a.shape[1]])


def test_only_what_is_asked_for_is_kept():
    x, w, grad = operands(64, 32, 64)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = training_linear(x.detach(), w, None, SEED)
    assert sum(t.numel() for t in kept) < 0.57 * x.numel() + 8
    y.backward(grad)
    assert w.grad is not None and x.grad is None
    y = training_linear(x, w.detach(), torch.zeros(32, device=DEVICE, requires_grad=True), SEED)
    y.backward(grad)
    assert x.grad is not None
    assert training_linear(x.detach(), w.detach()).grad_fn is None


def test_bias_and_leading_dimensions():
    x, w, grad = operands(24, 32, 48)
    bias = torch.randn(32, device=DEVICE, requires_grad=True)
    y = training_linear(x.view(2, 3, 4, 48), w, bias, SEED)
    assert_same_bits(y.view(24, 32), training_linear(x, w, None, SEED) + bias)
    y.backward(grad.view(2, 3, 4, 32))
    torch.testing.assert_close(bias.grad, grad.sum(0))


def test_seeds():
    x, w, grad = operands(32, 48, 64)
    one, same = (gradients(x, w, grad, Recipe()) for _ in range(2))
    other = gradients(x, w, grad, Recipe(), SEED + 1)
    for i in range(3):
        assert_same_bits(one[i], same[i])
    assert not torch.equal(one[1], other[1]) and not torch.equal(one[2], other[2])

    layer = TrainingLinear(64, 48, device=DEVICE)
    drawn = []
    for key in (3, 3, 4):
        torch.manual_seed(key)
        drawn.append(torch.autograd.grad(layer(x), x, grad)[0])
    assert_same_bits(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    torch.manual_seed(3)
    again = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
    assert_same_bits(torch.autograd.grad(again, x, grad)[0], drawn[0])
    with torch.no_grad():  # nothing is drawn where nothing is rounded
        torch.manual_seed(3)
        layer(x)
        after = torch.rand(1)
        torch.manual_seed(3)
        assert torch.equal(torch.rand(1), after)


def test_from_linear_shares_the_parameters():
    linear = nn.Linear(64, 48, device=DEVICE)
    layer = TrainingLinear.from_linear(linear, PLAIN)
    assert layer.weight is linear.weight and layer.bias is linear.bias and layer.recipe == PLAIN
    assert layer.state_dict().keys() == linear.state_dict().keys()
    x = torch.randn(5, 64, device=DEVICE)
    assert 0.01 < relative(layer(x), linear(x)) < 0.25
    assert TrainingLinear.from_linear(nn.Linear(16, 16, bias=False, device=DEVICE)).bias is None


def test_autocast_and_dtypes():
    x, w, grad = operands(32, 48, 64)
    with torch.autocast(DEVICE, torch.bfloat16):
        y = training_linear(x, w, None, SEED)
    assert y.dtype == torch.bfloat16
    y.backward(grad.bfloat16())
    assert x.grad.dtype == torch.float32 and w.grad.dtype == torch.float32
    half = w.detach().bfloat16().requires_grad_()
    training_linear(x.detach().bfloat16(), half, None, SEED).sum().backward()
    assert half.grad.dtype == torch.bfloat16


def test_compiles_without_a_break():
    torch._dynamo.reset()
    layer = TrainingLinear(64, 48, device=DEVICE)
    fn = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for tokens in (16, 21):
        x, _, grad = operands(tokens, 48, 64)
        assert_same_bits(fn(x), layer(x))
        assert relative(torch.autograd.grad(fn(x), x, grad)[0], grad @ layer.weight) < 0.3
    fixed = torch.compile(training_linear, fullgraph=True, backend="aot_eager")
    for a, b in zip(
        torch.autograd.grad(fixed(x, layer.weight, None, SEED), (x, layer.weight), grad),
        torch.autograd.grad(training_linear(x, layer.weight, None, SEED), (x, layer.weight), grad), strict=True,
    ):  # fmt: skip
        assert_same_bits(a, b)


def test_a_small_network_learns_as_well_as_in_float32():
    """Regression on a random teacher: the loss falls as far as that of the same network with dense products."""

    def final_loss(make) -> float:
        torch.manual_seed(0)
        teacher = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 32)).to(DEVICE).requires_grad_(False)
        layers = [nn.Linear(64, 128), nn.Linear(128, 32)]
        net = nn.Sequential(make(layers[0]), nn.Tanh(), make(layers[1])).to(DEVICE)
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
        losses = []
        for _ in range(120):
            x = torch.randn(256, 64, device=DEVICE)
            loss = (net(x) - teacher(x)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.2 * losses[0]
        return sum(losses[-20:]) / 20

    dense, nvfp4 = final_loss(lambda linear: linear), final_loss(TrainingLinear.from_linear)
    assert nvfp4 < dense + 0.02, (dense, nvfp4)  # what is left is the noise of 4 bits, not a failure to learn
