"""Gradients of weights live in pages that outlive them (csrc/common/kept_pages.h): nothing of an earlier gradient may
show in a later one, none that is alive may change, and no more memory is held than was used at once."""

from __future__ import annotations

import copy
import gc
import sys
import threading

import pytest
import torch

import n3kernels

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="pages are kept on Linux alone")

INNER, WIDTH = 512, 520  # 8 experts: 8.1 MiB


@pytest.fixture(autouse=True)
def cpu():
    with n3kernels.use_backend("cpu"):
        yield


def experts_call(experts=8, tokens=6):
    """The weights' gradients of a call in which the last experts have no slots."""
    gen = torch.Generator().manual_seed(experts)
    draw = lambda *shape: torch.randn(*shape, generator=gen)  # noqa: E731
    args = draw(tokens, WIDTH), draw(tokens, WIDTH), draw(experts, INNER, WIDTH), draw(experts, WIDTH, INNER)
    ids = torch.arange(2 * tokens, dtype=torch.int32).view(tokens, 2) % (experts - 2)
    call = (*args, ids, draw(tokens, 2), "relu2", 0)
    return lambda: torch.ops.n3.moe_experts_bwd(*call)[1:3]


def grouped_call(groups=8, rows=12):
    gen = torch.Generator().manual_seed(0)
    x, w = (torch.randn(*shape, generator=gen) for shape in ((rows, WIDTH), (groups, INNER, WIDTH)))
    grad_y = torch.randn(rows, INNER, generator=gen)
    offsets = torch.tensor([0, *[rows] * groups], dtype=torch.int32)
    return lambda: torch.ops.n3.grouped_linear_bwd(grad_y, x, w, offsets, None, None, None)[1:2]


CALLS = pytest.mark.parametrize("call", [experts_call, grouped_call])


@CALLS
def test_nothing_of_an_earlier_gradient_shows(call):
    call = call()
    first = call()
    expected = [g.clone() for g in first]
    addresses = {g.data_ptr() for g in first}
    for g in first:
        g.fill_(torch.nan)
    del first, g
    again = call()
    assert {g.data_ptr() for g in again} == addresses  # the pages were kept
    assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))


@CALLS
def test_gradients_that_are_alive_do_not_change(call):
    call = call()
    alive = [call() for _ in range(3)]
    expected = [g.clone() for g in alive[0]]
    view = call()[0][1:]  # a view keeps the whole
    call()
    for grads in [*alive, call()]:
        assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))
    assert torch.equal(view, expected[0][1:])


def test_they_are_ordinary_tensors():
    (grad, _) = experts_call()()
    assert grad.is_contiguous() and grad._version == 0 and not grad.requires_grad
    assert torch.equal(copy.deepcopy(grad), grad) and torch.equal(torch.from_numpy(grad.numpy()), grad)
    grad.add_(1)
    assert grad._version == 1


def test_a_thread_may_free_what_another_made():
    call = experts_call()
    expected = [g.clone() for g in call()]
    wrong = []

    def work():
        for _ in range(4):
            wrong.extend(not torch.equal(a, b) for a, b in zip(call(), expected, strict=True))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for t in threads:
        t.start()
    made = [call() for _ in range(2)]
    freeing = threading.Thread(target=made.clear)
    freeing.start()
    for t in [*threads, freeing]:
        t.join()
    assert not any(wrong) and len(wrong) == 24


def mapped_bytes():
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) << 10 for line in f if line.startswith("VmSize"))


def test_no_more_is_held_than_was_used_at_once():
    gc.collect()
    before, sizes = mapped_bytes(), range(9, 33)  # 24 sizes, each two gradients of 9 to 32 MB
    for experts in sizes:
        experts_call(experts)()
    largest = 2 * sizes[-1] * INNER * WIDTH * 4
    assert sum(2 * n * INNER * WIDTH * 4 for n in sizes) > 8 * largest
    assert mapped_bytes() - before < 4 * largest  # the weights themselves are as large, and malloc keeps some
