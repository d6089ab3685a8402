"""What NVFP4 weights are to the sm_90 kernel of moe_experts, by tests/cuda_emulator: codes, scales, global scales."""

from __future__ import annotations

import moe_problems
import pytest
import torch
from conftest import assert_same_bits, fenced
from emulated_experts import SOURCE, problem, run
from kernel_text import load, needs_emulator

from n3kernels.nvfp4 import NVFP4Tensor

pytestmark = needs_emulator


@pytest.fixture(scope="session")
def kernel():
    return load(SOURCE)


def one(n):
    """The unit matrix of n rows: codes of 1 under scales of 1."""
    codes = torch.zeros(n, n, dtype=torch.uint8)
    codes.fill_diagonal_(2)
    packed = (codes[:, ::2] + 16 * codes[:, 1::2])[None]
    return NVFP4Tensor.from_parts(packed, torch.ones(1, n, n // 16).to(torch.float8_e4m3fn), torch.ones(1))


def test_every_code_under_every_scale(kernel):
    """Row r has the scale of byte r, in all blocks; a token sees one k. The down product is exact in bfloat16."""
    codes = (torch.arange(256)[:, None] + torch.arange(256)) % 16
    packed = (codes[:, ::2] + 16 * codes[:, 1::2]).to(torch.uint8)[None]
    scales = torch.arange(256, dtype=torch.uint8)[:, None].repeat(1, 16)[None].contiguous()
    w = NVFP4Tensor.from_parts(packed, scales.view(torch.float8_e4m3fn), torch.ones(1))
    values = moe_problems.dense(w)[0]
    k = 37 * torch.arange(48) % 256
    x = fenced(torch.nn.functional.one_hot(k, 256).bfloat16())
    ids, weights = torch.zeros(48, 1, dtype=torch.int32), torch.ones(48, 1)
    down = run(kernel, (x, one(256), w, ids, weights))
    truth = values[:, k].t()
    truth[:, [0x7F, 0xFF]] = float("nan")
    torch.testing.assert_close(down.double(), truth, rtol=0, atol=0, equal_nan=True)
    scales[scales % 128 == 0x7F] = 0x38
    values = moe_problems.dense(w)[0]
    for sign in (1, -1):
        up = run(kernel, (x * sign, w, one(256), ids, weights))
        assert_same_bits(up, (sign * values[:, k].t()).relu().square().bfloat16())


# up, down, x: the unscaled sums would leave float32, the results do not
GLOBALS = [(1e-36, 1e20, 1e37), (1e30, 1e-30, 1e-25), (2.0**-140, 1, 1e37), (3, 2.0**-149, 1), (-1.5, -0.3, 1),
           (0, 1, 1)]  # fmt: skip


@pytest.mark.parametrize("up, down, magnitude", GLOBALS)
def test_global_scales(kernel, up, down, magnitude):
    x, w_up, w_down, ids, weights = problem("nvfp4", 5, 2, 2, 96, 80)
    ids.copy_(torch.tensor([[0, 1]] * 5))
    w_up.global_scale.copy_(torch.tensor([up, 1e-30]))
    w_down.global_scale.copy_(torch.tensor([down, 1e-30]))
    call = x.mul_(magnitude), w_up, w_down, ids, weights
    y = run(kernel, call)
    truth, scale = moe_problems.definition(*call)
    error = (y.double() - truth).abs()
    assert y.isfinite().all() and (error <= 2.0**-8 * (truth.abs() + scale) + 1e-40).all()


def test_a_scale_of_nan_shows_in_its_outputs_alone(kernel):
    """One of W_down: its row's output. One of W_up: every output of the expert's slots. Each in the last block of k."""
    x, w_up, w_down, ids, weights = problem("nvfp4", 6, 1, 2, 96, 80)
    ids.copy_(torch.tensor([[0], [1]] * 3))
    clean = run(kernel, (x, w_up, w_down, ids, weights))
    w_down.block_scale.view(torch.uint8)[0, 33, 4] = 0x7F
    y = run(kernel, (x, w_up, w_down, ids, weights))
    expected = clean.clone()
    expected[::2, 33] = float("nan")
    torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
    w_up.block_scale.view(torch.uint8)[1, 79, 5] = 0xFF
    expected[1::2] = float("nan")
    y = run(kernel, (x, w_up, w_down, ids, weights))
    torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
