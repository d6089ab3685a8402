"""How moe_experts runs on sm_90: ranges, items, shared memory. Host code that the kernel compiles too."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import n3kernels
from n3kernels.moe._supports import decode_experts

_host = pytest.importorskip("n3kernels._host", reason="_host was built for another Python")

# experts, slots per token, width, inner size: the published models and their tensor-parallel shares
SUPER, NANO, ULTRA = (512, 22, 1024, 2688), (128, 6, 2688, 1856), (512, 22, 2048, 5120)
MODELS = [SUPER, *((512, 22, 1024, n) for n in (1344, 672, 336)), NANO, (128, 6, 2688, 928), (128, 6, 2688, 464),
          ULTRA, (512, 22, 2048, 640), (512, 4, 1024, 1280), (896, 16, 3584, 3072)]  # fmt: skip
ODD = [(1, 1, 8, 8), (3, 2, 200, 72), (1024, 32, 1032, 80)]


def plan_of(model, tokens, packed=False, gated=False):
    """Template's width and tokens, blocks, rows, counters, shared memory, stages."""
    experts, k, width, inner = model
    return _host.moe_experts_plan(tokens, k, experts, width, inner, 132, packed, gated)


def slots_of(tokens, k, experts, skew):
    """Slots of each expert: of uniform routing, of one expert for everybody, with a share of skipped slots."""
    rng = np.random.default_rng(tokens + experts)
    ids = {
        "uniform": lambda: rng.integers(0, experts, tokens * k),
        "one": lambda: np.full(tokens * k, experts // 2),
        "skipped": lambda: rng.integers(-experts, experts, tokens * k),
        "zipf": lambda: (rng.zipf(1.3, tokens * k) - 1) % experts,
    }[skew]()
    return np.bincount(ids[ids >= 0], minlength=experts).tolist()


@pytest.mark.parametrize("skew", ["uniform", "one", "skipped", "zipf"])
@pytest.mark.parametrize("tokens", [0, 1, 8, 64, 512])
@pytest.mark.parametrize("model", MODELS + ODD)
def test_every_tile_has_every_range_once(model, tokens, skew):
    experts, k, width, inner = model
    slots = slots_of(tokens, k, experts, skew)
    items = _host.moe_experts_items(slots, tokens, k, width, inner)
    _, most, _, rows, counters, *_ = plan_of(model, tokens)
    ranges = len(_host.moe_experts_ranges(width, inner))
    tiles = [-(-n // most) for n in slots]
    seen = np.zeros((experts, max(tiles, default=0), ranges), dtype=int)
    for expert, tile, begin, end in items:
        seen[expert, tile, begin:end] += 1
        assert end - begin == (1 if rows == tokens * k * ranges else ranges)
    assert all((of_expert[:n] == 1).all() and not of_expert[n:].any() for of_expert, n in zip(seen, tiles, strict=True))
    # Tiles of one expert and range side by side: all but the first find the weights in the cache.
    keys = [(expert, begin) for expert, _, begin, _ in items]
    assert keys == sorted(keys)
    # A counter for each token, and for each tile whose ranges are items of their own.
    assert counters >= tokens + (sum(tiles) if rows > tokens * k else 0)


@pytest.mark.parametrize("model", MODELS + ODD)
def test_ranges(model):
    """They cover the inner size, are even, and depend on the two sizes alone."""
    _, _, width, inner = model
    ranges = _host.moe_experts_ranges(width, inner)
    sizes = [end - begin for begin, end in ranges]
    assert ranges[0][0] == 0 and ranges[-1][1] == -(-inner // 64)
    assert all(a[1] == b[0] for a, b in zip(ranges, ranges[1:], strict=False))
    assert 1 <= min(sizes) and max(sizes) - min(sizes) <= 1
    if model == SUPER:
        assert sizes == [7] * 6  # 22 experts x 6 = 132 items for one token


@pytest.mark.parametrize("packed, gated", [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("model", MODELS + ODD)
def test_the_plan_fits(model, packed, gated):
    experts, k, width, inner = model
    for tokens in (0, 1, 8, 100, 64 * experts // k):
        wide, most, blocks, rows, counters, shared, stages = plan_of(model, tokens, packed, gated)
        assert width <= wide and most in (8, 16, 32) and shared <= 227 * 1024
        # Under way per multiprocessor: three times 3.35 TB/s for a microsecond
        assert stages * (10240 if packed else 16384) >= 80 * 1024
        assert blocks <= 132 and (blocks > 0) == (counters > 0) == (tokens > 0)
        # Workspace: at most 64 MiB, or one row per slot.
        assert rows * width * 4 <= max(64 << 20, tokens * k * width * 4)


@pytest.mark.parametrize("model", MODELS + ODD)
def test_slots_of_a_launch_have_16_bits(model):
    experts, k, *_ = model
    tokens = _host.moe_experts_launch_tokens(k, experts)
    assert 1 <= tokens and tokens * k <= min(2**16, max(k, 64 * experts))


def test_counters():
    """The words of a stream, or of a stream in a capture, are its own, the same each time while they are enough."""
    pool = _host.CounterPool(4096)
    first, other, captured = pool.take(0, 7, 100), pool.take(0, 8, 256), pool.take(3, 7, 10)
    starts = [first, other, captured]
    assert sorted(starts) == [0, 256, 512]
    assert pool.take(0, 7, 256) == first and pool.take(3, 7, 1) == captured and pool.take(0, 8, 1) == other
    larger = pool.take(0, 7, 257)
    assert larger == 768 and pool.take(0, 7, 512) == larger and pool.take(0, 7, 100) == larger
    assert pool.take(0, 9, 2000) == 1280  # 2048 words
    assert pool.take(0, 10, 768) == 3328  # the rest, not 1024
    assert pool.take(0, 11, 1) == -1 and pool.take(0, 7, 513) == -1
    assert pool.take(0, 7, 300) == larger


# ---- what the kernel takes


def operands(experts=2, width=64, inner=128, dtype=torch.bfloat16, tokens=3, pad=0):
    w_up, w_down = torch.zeros(experts, inner, width + pad), torch.zeros(experts, width, inner + pad)
    ids = torch.zeros(tokens, 2, dtype=torch.int32)
    up, down = w_up.to(dtype)[:, :, :width], w_down.to(dtype)[:, :, :inner]
    return [torch.zeros(tokens, width, dtype=dtype), up, down, ids, torch.zeros(tokens, 2)]


@pytest.mark.parametrize("experts, width, inner", [(2, 8, 8), (1, 3584, 16), (1024, 8, 8), (3, 1024, 336)])
def test_takes(experts, width, inner):
    assert decode_experts(*operands(experts, width, inner)) is None
    assert decode_experts(*operands(experts, width, inner, pad=8)) is None
    assert decode_experts(*operands(experts, width, inner, tokens=0)) is None


def test_takes_wider_x_where_slots_are_many():
    """Then two grouped products serve; in batch-invariant mode the kernel for few, whatever their number."""
    few, many = operands(width=4096, inner=16, tokens=64), operands(width=4096, inner=16, tokens=65)
    assert decode_experts(*operands(tokens=65)) is None and decode_experts(*many) is None
    assert "8 to 3584" in decode_experts(*few)
    assert "multiples of 8" in decode_experts(*operands(width=12, tokens=65))
    with n3kernels.batch_invariant():
        assert decode_experts(*operands(tokens=65)) is None and "8 to 3584" in decode_experts(*many)


def test_says_why_not():
    rows = "takes weights whose rows are contiguous and begin at multiples of 16 bytes"
    x, w_up, w_down, ids, weights = operands()
    assert "float64" in decode_experts(*operands(dtype=torch.float64))
    assert "float32" in decode_experts(*operands(dtype=torch.float32))
    assert "float16" in decode_experts(*operands(dtype=torch.float16))
    assert "inner" in decode_experts(x, w_up[:, :24], w_down, ids, weights, activation="silu")
    assert "8 to 3584" in decode_experts(*operands(width=12))
    assert "8 to 3584" in decode_experts(*operands(width=3592))
    assert "inner" in decode_experts(*operands(inner=12))
    assert "1024 experts" in decode_experts(*operands(1025, 8, 8))
    assert decode_experts(*operands(pad=1)) == rows
    assert decode_experts(x, w_up.mT.contiguous().mT, w_down, ids, weights) == rows
    assert decode_experts(x, w_up[:1].expand(2, -1, -1), w_down, ids, weights) == rows
    shifted = w_up.new_zeros(w_up.numel() + 1)[1:].view(w_up.shape)
    assert decode_experts(x, shifted, w_down, ids, weights) == rows
