"""How moe_experts with NVFP4 weights runs on sm_90a: the order of k, decoding, what is taken."""

from __future__ import annotations

import pytest
import torch

from n3kernels.moe._supports import decode_experts

_host = pytest.importorskip("n3kernels._host", reason="_host was built for another Python")

MAGNITUDES = [0, 0.5, 1, 1.5, 2, 3, 4, 6]


def test_a_thread_has_32_neighbouring_k():
    """Thread t of four supplies k 2t, 2t + 1, 2t + 8, 2t + 9 of each product: codes of its own 16 bytes."""
    positions = [_host.moe_experts_nvfp4_position(k) for k in range(128)]
    assert sorted(positions) == list(range(128))
    for k, position in enumerate(positions):
        assert position % 8 // 2 == k // 32
        assert position // 32 == k % 32 // 8  # a word, and with it a scale block, is two products


def bf16(bits):
    return torch.tensor(bits, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).item()


def test_codes():
    """Each of the 16 codes in each place, beside others: 2^-126 times its value in the half where the order has it."""
    for place in range(8):
        for code in range(16):
            others = torch.randint(0, 16, (8,)).tolist()
            others[place] = code
            word = sum(c << 4 * i for i, c in enumerate(others))
            registers = _host.moe_experts_nvfp4_codes(word)
            # Position of k = 32 t + 8 j + place, for t = j = 0: two registers to a product, even and odd k in halves.
            position = _host.moe_experts_nvfp4_position(place)
            register = position // 16 * 2 + position % 16 // 8
            value = bf16(registers[register] >> 16 * (position % 2) & 0xFFFF)
            assert value * 2.0**126 == (-1 if code & 8 else 1) * MAGNITUDES[code & 7]


@pytest.mark.parametrize("exponent", [-149, -126, -101, -100, -99, -20, 0, 1, 2, 60, 127])
@pytest.mark.parametrize("sign", [1, -1])
def test_global_scales(exponent, sign):
    """factor * rest is the global scale, exactly, and no decoded weight leaves bfloat16's normal numbers."""
    given = sign * 2.0**exponent * (1.5 if exponent > -149 else 1)
    factor, rest = _host.moe_experts_nvfp4_global(given)
    factor = bf16(factor)
    assert factor * 2.0**-119 * rest == given
    smallest, largest = 0.5 * 2.0**-9 * 2.0**-126 / 2 * factor, 6 * 448 * 2.0**-126 / 2 * factor
    assert smallest >= 2.0**-126 and largest <= 2.0**127
    assert 448 / 2 * factor < 2.0**128 * (1 - 2.0**-8)


def operands(experts=2, width=64, inner=128, dtype=torch.bfloat16, tokens=3, pad=0):
    def weights(n, k):
        codes = torch.zeros(experts, n, k // 2 + pad, dtype=torch.uint8)[:, :, : k // 2]
        return codes, torch.zeros(experts, n, k // 16, dtype=torch.float8_e4m3fn), torch.ones(experts)

    (w_up, *up), (w_down, *down) = weights(inner, width), weights(width, inner)
    ids = torch.zeros(tokens, 2, dtype=torch.int32)
    return [torch.zeros(tokens, width, dtype=dtype), w_up, w_down, ids, torch.zeros(tokens, 2), *up, *down]


@pytest.mark.parametrize("experts, width, inner", [(2, 16, 16), (1, 3584, 16), (1024, 16, 16), (3, 1024, 336)])
def test_takes(experts, width, inner):
    assert decode_experts(*operands(experts, width, inner)) is None
    assert decode_experts(*operands(experts, width, inner, pad=8)) is None
    assert decode_experts(*operands(experts, width, inner, tokens=0)) is None
    assert decode_experts(*operands(experts, width, inner, tokens=32 * experts + 1)) is None


def test_says_why_not():
    rows = "takes codes whose rows are contiguous, each two beginning at a multiple of 16 bytes"
    good = operands()
    assert "float32" in decode_experts(*operands(dtype=torch.float32))
    assert "8 to 3584" in decode_experts(*operands(width=3600))
    assert decode_experts(*operands(pad=4)) == rows
    w = good[1]
    shifted = w.new_zeros(w.numel() + 8)[8:].view(w.shape)
    for bad in (w.mT.contiguous().mT, w[:1].expand(2, -1, -1), shifted):
        assert decode_experts(good[0], bad, *good[2:]) == rows
    scale = good[5]
    good[5] = scale.view(torch.uint8).mT.contiguous().view(scale.dtype).mT
    assert decode_experts(*good) == "takes scales whose rows are contiguous"
