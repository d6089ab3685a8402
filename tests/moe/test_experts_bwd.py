"""What the CPU kernels of moe_experts_bwd and grouped_linear_bwd divide and none of it may show: tiles, panels, blocks
of slots, rounds of blocks, threads and instruction sets. Run as a program this file computes and prints digests for
one instruction set: ``N3_CPU_ISA=generic python tests/moe/test_experts_bwd.py``."""

from __future__ import annotations

import hashlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import n3kernels

OPS = ("moe_experts_bwd", "grouped_linear_bwd")
ACTIVATIONS = ("relu2", "silu", "gelu")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NAMES = ("x", "w_up", "w_down", "weights")
# Around the rows of a tile (6, 13), its columns (8, 16, 32), the parts (48, 104), strips (208, 240) and blocks (128).
EDGES = (1, 5, 6, 7, 8, 9, 12, 13, 14, 16, 17, 31, 32, 33, 48, 49, 65, 104, 105, 127, 128, 129, 208, 209, 240, 241)

edges = st.sampled_from(EDGES)


def problem(slots, experts, width, inner, activation="relu2", dtype=torch.float32, k=1):
    """grad_y, x, w_up, w_down, ids, weights, activation, first_expert; `slots` of each expert, in no order."""
    ids = torch.arange(experts, dtype=torch.int32).repeat_interleave(slots)
    ids = torch.cat([ids, torch.full((-len(ids) % k,), -1, dtype=torch.int32)])
    ids = ids[torch.randperm(len(ids))].view(-1, k)
    rows = inner * (1 if activation == "relu2" else 2)
    w_up, w_down = torch.randn(experts, rows, width) * width**-0.5, torch.randn(experts, width, inner) * inner**-0.5
    grad_y, x = torch.randn(2, len(ids), width).to(dtype)
    return grad_y, x, w_up.to(dtype), w_down.to(dtype), ids, torch.randn(ids.shape), activation, 0


def backward(args, backend="cpu"):
    with n3kernels.use_backend(backend):
        return torch.ops.n3.moe_experts_bwd(*args)


def wide(args):
    return [t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in args]


def assert_right(args, gate=None):
    dtype = args[1].dtype
    gate = gate or (1e-5 if dtype == torch.float32 else 3e-3)
    for name, grad, true in zip(NAMES, backward(args), backward(wide(args), "reference"), strict=True):
        error, size = (grad.double() - true).norm(), true.norm()
        assert error <= gate * size + 1e-7 * true.numel() ** 0.5, f"{name}: {error / size:.3g}"  # float16 subnormals


def assert_same_bits(first, second):
    for name, a, b in zip(NAMES, first, second, strict=True):
        assert torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)), name


@given(edges, edges, edges, st.sampled_from(ACTIVATIONS), st.sampled_from(DTYPES))
def test_edges_of_tiles(slots, width, inner, activation, dtype):
    few = None if dtype == torch.float32 else 3e-3 + torch.finfo(dtype).eps / 2  # one element may be all there is
    assert_right(problem(slots, 2, width, inner, activation, dtype), few)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_one_expert_with_all_slots(activation, dtype):
    assert_right(problem(700, 1, 40, 250, activation, dtype, k=3))


def test_a_group_goes_on_over_rounds():
    """Its blocks keep 8 MiB each here, of which a round holds 128 MiB: the sums go on from float32."""
    assert_right(problem(2100, 1, 8, 5120, "silu"))


@pytest.mark.parametrize("slots, experts", [(3, 40), (60, 2), (300, 2), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_do_not_show(slots, experts, dtype):
    args, threads, results = problem(slots, experts, 70, 90, "silu", dtype, k=2), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            results.append(backward(args))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert_same_bits(results[0], result)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_does_not_see_the_batch(dtype):
    grad_y, x, w_up, w_down, ids, weights, *options = problem(50, 3, 33, 47, "gelu", dtype, k=2)
    dx, _, _, dweights = backward((grad_y, x, w_up, w_down, ids, weights, *options))
    for part in (slice(0, 1), slice(5, 40)):
        alone = backward((grad_y[part], x[part], w_up, w_down, ids[part], weights[part], *options))
        assert_same_bits((dx[part], w_up, w_down, dweights[part]), (alone[0], w_up, w_down, alone[3]))


def test_not_a_number_stays_with_its_token():
    args = problem(30, 2, 20, 24, "silu")
    clean = backward(args)
    args[1][4], args[0][7] = float("nan"), float("inf")
    dx, _, _, dweights = backward(args)
    others = [t for t in range(60) if t not in (4, 7)]
    assert torch.equal(dx[others], clean[0][others]) and torch.equal(dweights[others], clean[3][others])
    assert dx[4].isnan().all() and not dx[7].isfinite().any()


def test_an_infinite_gradient_does_not_pass_a_closed_relu():
    x, up, down = torch.ones(1, 1), torch.tensor([[[-1.0], [0.0]]]), torch.ones(1, 1, 2)
    ids, grad_y = torch.zeros(1, 1, dtype=torch.int32), torch.full((1, 1), torch.inf)
    dx, dup, *_ = backward((grad_y, x, up, down, ids, torch.ones(1, 1), "relu2", 0))
    assert not dx.any() and not dup.any()


@pytest.mark.parametrize("ids", [[0, 1, 2], [2, 0, 1]])
def test_a_token_adds_its_slots_in_their_order(ids):
    """Slots of 2^30, -2^30 and 1: in order they leave 1, whatever order the experts are in; else 0."""
    one, terms = torch.ones(1, 1), torch.tensor([[2.0**30, -(2.0**30), 1.0]])
    ones, ids = torch.ones(3, 2, 1), torch.tensor([ids], dtype=torch.int32)
    gate = torch.tensor([1.0, 0.0]).view(1, 2, 1)  # relu2'(1) = 2, and the other row is closed
    dx, *_ = backward((one, one, ones * gate, torch.ones(3, 1, 2), ids, terms / 2, "relu2", 0))
    assert dx.item() == 1


def test_a_row_that_is_gathered_often_adds_up_in_order():
    factors, one, w = torch.tensor([2.0**30, -(2.0**30), 1.0]), torch.ones(1, 1), torch.ones(2, 1, 1)
    offsets, gather = torch.tensor([0, 1, 3], dtype=torch.int32), torch.zeros(3, dtype=torch.int32)
    with n3kernels.use_backend("cpu"):
        dx, *_ = torch.ops.n3.grouped_linear_bwd(torch.ones(3, 1), one, w, offsets, gather, factors, None)
    assert dx.item() == 1


def test_few_slots_of_many_experts():
    """Each of 22 experts has one slot, the others none: zeros, even where the memory was not."""
    ids = torch.randperm(128, dtype=torch.int32)[:22].view(1, 22)
    x, w_up, w_down = torch.randn(1, 64), torch.randn(128, 40, 64), torch.randn(128, 64, 40)
    args = (torch.randn(1, 64), x, w_up, w_down, ids, torch.randn(1, 22), "relu2", 0)
    assert_right(args)
    _, dup, ddown, _ = backward(args)
    idle = [e for e in range(128) if e not in ids]
    assert not dup[idle].any() and not ddown[idle].any()


def test_repeated_and_skipped_ids_and_an_expanded_gradient():
    _, x, w_up, w_down, *_ = problem(5, 3, 21, 10)
    ids = torch.tensor([[1, 1, 1], [-1, 2, 9], [0, 2, 2]], dtype=torch.int32).repeat(5, 1)
    weights = torch.randn(15, 3)
    weights[1, 0] = torch.nan  # of a skipped slot
    grad_y = torch.ones(()).expand(15, 21)  # as a sum's gradient is
    grads = backward((grad_y, x, w_up, w_down, ids, weights, "relu2", 0))
    assert not any(g.isnan().any() for g in grads) and not grads[3][ids < 0].any() and not grads[3][ids > 2].any()
    assert_right((grad_y, x, w_up, w_down, ids, weights.nan_to_num(), "relu2", 0))


@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_activations_over_their_range(activation):
    """With an identity as weights and u = 1 the gradients are act'(g) and act(g)."""
    g = torch.linspace(-12, 12, 4801)
    x = torch.stack((g, torch.ones_like(g)), 1)
    offsets = torch.tensor([0, len(g)], dtype=torch.int32)
    with n3kernels.use_backend("cpu"):
        dx, *_ = torch.ops.n3.grouped_linear_bwd(
            torch.ones(len(g), 1), x, torch.eye(2)[None], offsets, None, None, activation
        )
    leaf = g.double().requires_grad_()
    act = {"silu": torch.nn.functional.silu, "gelu": torch.nn.functional.gelu}[activation](leaf)
    (slope,) = torch.autograd.grad(act.sum(), leaf)
    torch.testing.assert_close(dx.double(), torch.stack((slope, act.detach()), 1), rtol=2e-6, atol=5e-7)


@pytest.mark.parametrize("slots", [11, 200])
def test_grouped_linear_is_the_experts_first_half(slots):
    """Of an expert with an identity as W_down both operators compute the same sums: the same bits."""
    grad_y, x, w_up, _, ids, weights, *_ = problem(slots, 1, 37, 37)
    down = torch.eye(37)[None]
    dx, dup, _, dweights = backward((grad_y, x, w_up, down, ids, weights, "relu2", 0))
    offsets = torch.tensor([0, slots], dtype=torch.int32)
    with n3kernels.use_backend("cpu"):
        grouped = torch.ops.n3.grouped_linear_bwd(grad_y, x, w_up, offsets, None, weights.flatten(), "relu2")
    assert_same_bits((dx, dup, down, dweights.flatten()), (*grouped[:2], down, grouped[2]))


# ---- instruction sets


def digests() -> dict[str, str]:
    from n3kernels import _host

    torch.manual_seed(0)
    found = {"isa": _host.cpu_isa()}

    def keep(name, tensors):
        data = b"".join(t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for t in tensors)
        found[name] = hashlib.sha256(data).hexdigest()

    for dtype in DTYPES:
        for activation in ACTIVATIONS:
            for slots, experts, width, inner in ((11, 5, 96, 70), (150, 2, 33, 245), (3, 3, 5, 7)):
                args = problem(slots, experts, width, inner, activation, dtype, k=2)
                keep(f"experts {dtype} {activation} {slots} {width} {inner}", backward(args))
            grad_y, x, w_up, *_ = problem(90, 1, 70, 65, activation, dtype)
            offsets = torch.tensor([2, 80], dtype=torch.int32)
            call = (torch.randn(90, 65).to(dtype), x, w_up, offsets, torch.randint(-1, 90, (90,)).int(), None)
            with n3kernels.use_backend("cpu"):
                keep(f"grouped {dtype} {activation}", torch.ops.n3.grouped_linear_bwd(*call, activation))
                scaled = (grad_y[:, :1].expand(90, w_up.shape[1]), *call[1:5], torch.randn(90))
                keep(f"grouped {dtype} {activation} linear", torch.ops.n3.grouped_linear_bwd(*scaled, None))
    return found


def test_every_instruction_set_gives_the_same_bits():
    from instruction_sets import assert_same_bits_on_every_set  # not where this module runs as a program

    assert_same_bits_on_every_set(__file__)


if __name__ == "__main__":
    for name, digest in digests().items():
        print(f"{name} = {digest}")
