"""What the Triton products decide on the host, and their tiles: every row of the tables, blocks of tokens."""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICE, assert_same_bits
from hypothesis import given
from hypothesis import strategies as st

import n3kernels

pytest.importorskip("triton")
from n3kernels.triton_ops.moe import experts, grouped_plan  # noqa: E402

OPS = ("grouped_linear", "moe_experts")
GROUPS = 512
ROWS = (1, GROUPS, 16 * GROUPS, 17 * GROUPS, 33 * GROUPS, 65 * GROUPS, 4000 * GROUPS)


@pytest.mark.parametrize("table", [grouped_plan.PRODUCTS, grouped_plan.GRADS, grouped_plan.WEIGHT_GRADS])
@pytest.mark.parametrize("arch", [80, 90, 100, 103, 120, 121])
def test_every_row_is_chosen_and_one_in_batch_invariant_mode(table, arch):
    for kind, limits in grouped_plan.on_row_of(table, arch).items():
        assert {grouped_plan.config_for(table, arch, kind, rows, GROUPS) for rows in ROWS} == set(limits.values())
        with n3kernels.batch_invariant():
            assert len({grouped_plan.config_for(table, arch, kind, rows, GROUPS) for rows in ROWS}) == 1


def test_narrow_columns_pad_little():
    """Nemotron's inner sizes and their shards, Nano, Super, Ultra."""
    for size in (336, 464, 640, 672, 928, 1024, 1344, 1856, 2048, 2688, 5120):
        tile = grouped_plan.narrowed(128, size)
        assert tile * -(-size // tile) <= size * 9 / 8 or tile == 64


@given(st.lists(st.integers(0, 70), min_size=1, max_size=300), st.integers(0, 40), st.integers(0, 40), st.booleans())
def test_tiles_cover_every_row_once(sizes, before, behind, outside):
    """In the order of the groups, none longer than a block, and what is left over is marked."""
    offsets = (torch.tensor([0, *sizes]).cumsum(0) + before).int().to(DEVICE)
    rows = before + sum(sizes) + behind
    tiles = grouped_plan.tiles_of(offsets, rows, 16, outside)
    group, first, count = tiles.table.cpu().unbind(1)
    used = group >= 0
    pieces = [(len(sizes), before), *enumerate(sizes), (len(sizes), behind)]
    truth = [g for g, size in pieces if outside or g < len(sizes) for _ in range(size)]
    covered = [(r, g) for g, f, c in zip(group[used], first[used], count[used], strict=True) for r in range(f, f + c)]
    assert [int(g) for _, g in covered] == truth
    assert [r for r, _ in covered] == list(range(0 if outside else before, rows if outside else rows - behind))
    assert not used[int(used.sum()) :].any() and (count[used] <= 16).all() and (count[used] > 0).all()


def test_offsets_out_of_range_stay_in_memory():
    """They are the caller's error: the result is anything, but nothing is read or written outside."""
    offsets = torch.tensor([5, -3, 1000, 2, 2**31 - 1], dtype=torch.int32, device=DEVICE)
    group, first, count = grouped_plan.tiles_of(offsets, 40, 16, True).table.cpu().unbind(1)
    used = group >= 0
    assert (group <= 4).all() and (first[used] >= 0).all() and (first[used] + count[used] <= 40).all()


def test_blocks_of_tokens_do_not_show(monkeypatch):
    """A small workspace: seven tokens in four blocks, of one configuration."""
    x, ids = torch.randn(7, 16, device=DEVICE), torch.randint(-1, 4, (7, 3), dtype=torch.int32, device=DEVICE)
    up, down = torch.randn(4, 24, 16, device=DEVICE), torch.randn(4, 16, 24, device=DEVICE)
    weights, valid = torch.randn(7, 3, device=DEVICE), torch.tensor([6], dtype=torch.int32, device=DEVICE)
    whole = experts.moe_experts(x, up, down, ids, weights, valid_tokens=valid)
    monkeypatch.setattr(experts, "WORKSPACE", 2 * 3 * 4 * (24 + 16))
    assert_same_bits(experts.moe_experts(x, up, down, ids, weights, valid_tokens=valid), whole)
