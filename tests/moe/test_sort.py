from __future__ import annotations

import pytest
import torch
from conftest import DEVICE, fenced
from hypothesis import given
from hypothesis import strategies as st
from moe_problems import fast

from n3kernels import use_backend
from n3kernels.moe import route, sort

OPS = ("moe_sort",)

# tokens, 0 included; slots per token; local experts; the first of them; experts beyond them on either side
problems = st.tuples(st.integers(0, 40), st.integers(1, 6), st.integers(1, 12), st.integers(0, 5), st.integers(0, 5))


def inputs(tokens, k, num_experts, first, beyond):
    low = max(first - beyond, 0) - 1  # -1 at the least
    ids = torch.randint(low, first + num_experts + beyond, (tokens, k), dtype=torch.int32, device=DEVICE)
    return fenced(ids), num_experts, first


def definition(ids, num_experts, first):
    flat = ids.flatten().tolist()
    groups = [[slot for slot, e in enumerate(flat) if e == first + i] for i in range(num_experts)]
    skipped = [slot for slot, e in enumerate(flat) if not first <= e < first + num_experts]
    active = [i for i, group in enumerate(groups) if group]
    offsets = [sum(map(len, groups[:i])) for i in range(num_experts + 1)]
    return sum(groups, []) + skipped, offsets, active + [-1] * (num_experts - len(active)), [len(active)]


def assert_right(result, truth):
    for name, a, b in zip(("order", "offsets", "active", "num_active"), result, truth, strict=True):
        assert a.dtype == torch.int32 and a.dim() == 1
        assert a.tolist() == b, name


@given(problems)
def test_agrees_with_the_definition(backend, problem):
    args = inputs(*problem)
    assert_right(sort(*args), definition(*args))


@pytest.mark.parametrize("tokens, experts, k", [(1, 512, 22), (64, 512, 22), (33, 128, 6), (7, 1024, 32), (5, 896, 16)])
def test_published_shapes(backend, tokens, experts, k):
    ids = torch.randn(tokens, experts, device=DEVICE).topk(k).indices.int()
    assert_right(sort(ids, experts), definition(ids, experts, 0))


@pytest.mark.parametrize("expert", [0, 3, 511, -1, 512])
def test_one_expert_receives_everything(backend, expert):
    ids = torch.full((700, 22), expert, dtype=torch.int32, device=DEVICE)
    order, offsets, active, num_active = sort(ids, 512)
    assert torch.equal(order, torch.arange(700 * 22, dtype=torch.int32, device=DEVICE))
    local = 0 <= expert < 512
    assert offsets[-1] == (700 * 22 if local else 0) and num_active.item() == local
    assert active[0] == (expert if local else -1) and (active[1:] == -1).all()


@pytest.mark.parametrize("first", [0, 5, 2**31 - 3, 2**31 - 1, 2**40])
def test_ids_of_any_size(backend, first):
    """id - first_expert leaves 32 bits; whatever is not local is skipped."""
    numbers = [0, -1, -(2**31), 2**31 - 1, 2**31 - 6, 2**31 - 2, 5, 7, 10]
    ids = torch.tensor(numbers, dtype=torch.int32, device=DEVICE).view(3, 3)
    assert_right(sort(ids, 6, first), definition(ids, 6, first))


@pytest.mark.parametrize("which", fast("moe_sort"))
def test_threads_do_not_show(which):
    ids = torch.randint(-1, 130, (3000, 6), dtype=torch.int32, device=DEVICE)
    threads, truth = torch.get_num_threads(), definition(ids, 128, 1)
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            with use_backend(which):
                assert_right(sort(ids, 128, 1), truth)
    finally:
        torch.set_num_threads(threads)


def test_ranks_partition_the_slots(backend):
    """Every slot belongs to exactly one of the ranks, whose experts are uneven in number."""
    ids = torch.randint(0, 13, (29, 4), dtype=torch.int32, device=DEVICE)
    mine = []
    for first, size in ((0, 3), (3, 1), (4, 9)):
        order, offsets, _, _ = sort(ids, size, first)
        mine += order[: offsets[-1]].tolist()
    assert sorted(mine) == list(range(29 * 4))


def test_offsets_are_the_running_sum_of_counts(backend):
    ids, _, counts, _ = route(torch.randn(40, 64, device=DEVICE), top_k=6)
    assert torch.equal(sort(ids, 64)[1].diff(), counts)


def test_strided_ids(backend):
    ids = torch.randint(0, 9, (6, 40), dtype=torch.int32, device=DEVICE).t()[::2]
    assert_right(sort(ids, 9), definition(ids, 9, 0))


@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_opcheck(tokens):
    ids = torch.randint(-1, 9, (tokens, 4), dtype=torch.int32, device=DEVICE)
    torch.library.opcheck(torch.ops.n3.moe_sort.default, (ids, 5, 2))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic):
    fn = torch.compile(lambda ids: sort(ids, 9), fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for tokens in (4, 7):
        ids = torch.randint(-1, 10, (tokens, 3), dtype=torch.int32, device=DEVICE)
        assert_right(fn(ids), definition(ids, 9, 0))


BAD = [
    ({"ids": torch.zeros(2, 4, dtype=torch.int64)}, "ids must be int32, got int64"),
    ({"ids": torch.zeros(4, dtype=torch.int32)}, "ids must have 2 dimensions, got 1"),
    ({"ids": torch.zeros(2, 0, dtype=torch.int32)}, "ids must have at least 1 column, got 0"),
    ({"ids": torch.zeros(1, 1, dtype=torch.int32).expand(2**27, 16)},
     "ids must have fewer than 2147483648 elements, got 2147483648"),
    ({"num_experts": 0}, "num_experts must be at least 1, got 0"),
    ({"first_expert": -1}, "first_expert must be at least 0, got -1"),
]  # fmt: skip


@pytest.mark.parametrize("change, message", BAD)
def test_bad_calls(backend, change, message):
    call = {"ids": torch.zeros(2, 4, dtype=torch.int32), "num_experts": 8, **change}
    call["ids"] = call["ids"].to(DEVICE) if call["ids"].dim() != 2 or 0 not in call["ids"].stride() else call["ids"]
    with pytest.raises(RuntimeError) as error:
        sort(**call)
    assert str(error.value) == f"n3::moe_sort: {message}"
