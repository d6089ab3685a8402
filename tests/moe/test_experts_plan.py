"""How moe_experts runs on sm_90: ranges, items, shared memory. Host code that the kernel compiles too."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from n3kernels.moe._supports import decode_experts

_host = pytest.importorskip("n3kernels._host", reason="_host was built for another Python")

# experts, slots per token, width, inner size: the published models and their tensor-parallel shares
SUPER, NANO, ULTRA = (512, 22, 1024, 2688), (128, 6, 2688, 1856), (512, 22, 2048, 5120)
MODELS = [SUPER, *((512, 22, 1024, n) for n in (1344, 672, 336)), NANO, (128, 6, 2688, 928), (128, 6, 2688, 464),
          ULTRA, (512, 22, 2048, 640), (512, 4, 1024, 1280), (896, 16, 3584, 3072)]  # fmt: skip
ODD = [(1, 1, 8, 8), (3, 2, 200, 72), (1024, 32, 1032, 80)]


def offsets_of(tokens, k, experts, skew):
    """Sorted slots: of uniform routing, of one expert for everybody, with a share of skipped slots."""
    rng = np.random.default_rng(tokens + experts)
    ids = {
        "uniform": lambda: rng.integers(0, experts, tokens * k),
        "one": lambda: np.full(tokens * k, experts // 2),
        "skipped": lambda: rng.integers(-experts, experts, tokens * k),
        "zipf": lambda: (rng.zipf(1.3, tokens * k) - 1) % experts,
    }[skew]()
    counts = np.bincount(ids[ids >= 0], minlength=experts)
    return [0, *counts.cumsum().tolist()]


@pytest.mark.parametrize("skew", ["uniform", "one", "skipped", "zipf"])
@pytest.mark.parametrize("tokens", [0, 1, 8, 64, 512])
@pytest.mark.parametrize("model", MODELS + ODD)
def test_every_slot_has_every_range_once(model, tokens, skew):
    experts, k, width, inner = model
    offsets = offsets_of(tokens, k, experts, skew)
    items = _host.moe_experts_items(offsets, tokens, k, width, inner)
    _, most, _, _, rows, *_ = _host.moe_experts_plan(tokens, k, experts, width, inner, 132)
    ranges = len(_host.moe_experts_ranges(width, inner))
    seen = np.zeros((offsets[-1], ranges), dtype=int)
    for expert, first, count, begin, end in items:
        assert 1 <= count <= most and offsets[expert] <= first and first + count <= offsets[expert + 1]
        seen[first : first + count, begin:end] += 1
        assert end - begin == (1 if rows == tokens * k * ranges else ranges)
    assert (seen == 1).all()
    # Tiles of one expert and range side by side: all but the first find the weights in the cache.
    keys = [(expert, begin) for expert, _, _, begin, _ in items]
    assert keys == sorted(keys)


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


@pytest.mark.parametrize("model", MODELS + ODD)
def test_the_plan_fits(model):
    experts, k, width, inner = model
    for tokens in (0, 1, 8, 100, 64 * experts // k):
        wide, most, blocks, sums, rows, shared, stages = _host.moe_experts_plan(tokens, k, experts, width, inner, 132)
        assert width <= wide and most in (8, 16, 32) and shared <= 227 * 1024 and stages >= 8
        assert blocks <= 132 and (blocks > 0) == (sums > 0) == (tokens > 0)
        # Workspace: at most 64 MiB, or one row per slot.
        assert rows * width * 4 <= max(64 << 20, tokens * k * width * 4)


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
    assert "64 slots" in decode_experts(*operands(tokens=65))
    assert decode_experts(*operands(pad=1)) == rows
    assert decode_experts(x, w_up.mT.contiguous().mT, w_down, ids, weights) == rows
    assert decode_experts(x, w_up[:1].expand(2, -1, -1), w_down, ids, weights) == rows
    shifted = w_up.new_zeros(w_up.numel() + 1)[1:].view(w_up.shape)
    assert decode_experts(x, shifted, w_down, ids, weights) == rows
