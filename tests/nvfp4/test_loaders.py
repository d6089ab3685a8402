from __future__ import annotations

import pytest
import torch
from conftest import DEVICE, assert_same_bits
from nvfp4_oracle import e4m3, weights

from n3kernels.nvfp4 import NVFP4Tensor, from_compressed_tensors, from_modelopt, linear, quantize

NAMES = {
    from_modelopt: ("weight", "weight_scale", "weight_scale_2"),
    from_compressed_tensors: ("weight_packed", "weight_scale", "weight_global_scale"),
}
both = pytest.mark.parametrize("load", list(NAMES))


def checkpoint(load, w: NVFP4Tensor, prefix="layers.0.up_proj"):
    """The state dict that the format's own exporter would write: ModelOpt the multiplier, the other its inverse."""
    global_scale = w.global_scale if load is from_modelopt else (1 / w.global_scale).reshape(-1)
    tensors = dict(zip(NAMES[load], (w.q, w.block_scale, global_scale), strict=True))
    return {f"{prefix}.{name}": t for name, t in tensors.items()}


@both
@pytest.mark.parametrize("four_over_six", [False, True])
def test_round_trip(load, four_over_six):
    """Opposite conventions, the same weight; an inverse of an inverse is off by a rounding of the global scale."""
    dense = torch.randn(24, 96, device=DEVICE)
    w = quantize(dense, four_over_six=four_over_six)
    got = load(checkpoint(load, w), "layers.0.up_proj")
    assert_same_bits(got.q, w.q)
    assert_same_bits(got.block_scale, w.block_scale)
    assert got.shape == (24, 96) and got.global_scale.dim() == 0 and got.scale_layout == "linear"
    torch.testing.assert_close(got.global_scale, w.global_scale, rtol=1.2e-7, atol=0)
    assert (got.dequantize(torch.float32) - dense).norm() < 0.11 * dense.norm()
    x = torch.randn(3, 96, device=DEVICE)
    torch.testing.assert_close(linear(x, got), x @ w.dequantize(torch.float32).t(), rtol=1e-4, atol=1e-4)


@both
def test_powers_of_two_are_exact(load):
    w = NVFP4Tensor.from_parts(*weights(4, 32, 2.0**-9))
    got = load(checkpoint(load, w), "layers.0.up_proj")
    assert_same_bits(got.dequantize(torch.float32), w.dequantize(torch.float32))


@both
def test_empty_prefix(load):
    w = NVFP4Tensor.from_parts(*weights(4, 32, 0.25))
    state = {key.removeprefix("x."): t for key, t in checkpoint(load, w, "x").items()}
    assert_same_bits(load(state, "").dequantize(), w.dequantize())


@both
def test_a_stack_of_experts(load):
    w = NVFP4Tensor.stack([NVFP4Tensor.from_parts(*weights(4, 32, 2.0**-i)) for i in range(3)])
    got = load(checkpoint(load, w), "layers.0.up_proj")
    assert got.global_scale.shape == (3,)
    assert_same_bits(got.dequantize(), w.dequantize())


@both
def test_nan_scales_of_zero_blocks(load):
    """Refused, unless asked to repair; a NaN beside codes that are not zero is never repaired."""
    q, s, g = weights(4, 64, 0.25)
    clean = e4m3(s.view(torch.uint8).clone())
    q[1, 8:16] = 0
    q[2, 24:32] = 0x80  # -0 is zero too
    for row, block in ((1, 1), (2, 3)):
        s.view(torch.uint8)[row, block] = 0x7F
        clean.view(torch.uint8)[row, block] = 0
    state = checkpoint(load, NVFP4Tensor.from_parts(q, s, g))
    with pytest.raises(ValueError) as error:
        load(state, "layers.0.up_proj")
    assert str(error.value) == (
        f"{load.__name__}: layers.0.up_proj.weight_scale must have no NaN, got 2, the first at [1, 1]; "
        "repair=True sets the 2 of them that scale all-zero blocks to 0"
    )
    got = load(state, "layers.0.up_proj", repair=True)
    assert_same_bits(got.block_scale, clean)
    assert s.view(torch.uint8)[1, 1] == 0x7F  # the checkpoint is left alone

    q[1, 9] = 0x30
    with pytest.raises(ValueError, match=r"weight_scale must have no NaN, got 1, the first at \[1, 1\]$"):
        load(state, "layers.0.up_proj", repair=True)


def change(name, value):
    return lambda state, names: state.update({f"l.{names[name]}": value})


BAD = [
    (change(0, torch.zeros(4, 64).bfloat16()), "{0} must be uint8 (packed e2m1 codes), got bfloat16 [4, 64]"),
    (change(1, torch.zeros(4, 2)), "{1} must be float8_e4m3fn (block scales), got float32 [4, 2]"),
    (change(2, torch.ones((), dtype=torch.bfloat16)), "{2} must be float32 (global scale), got bfloat16 []"),
    (change(0, torch.zeros(4, 12, dtype=torch.uint8)),
     "{0} must have shape [..., N, K/2] with K a multiple of 16, got [4, 12]"),
    (change(0, torch.zeros(16, dtype=torch.uint8)),
     "{0} must have shape [..., N, K/2] with K a multiple of 16, got [16]"),
    (change(1, torch.zeros(128, 4).to(torch.float8_e4m3fn)), "{1} must have shape [4, 2], got [128, 4]"),
    (change(2, torch.ones(2)), "{2} must have 1 element, got shape [2]"),
    (change(2, torch.tensor(float("nan"))), "{2} must be a finite number {rule}, got nan"),
    (change(2, torch.tensor(-1.0)), "{2} must be a finite number {rule}, got -1.0"),
    (change(2, torch.tensor(float("inf"))), "{2} must be a finite number {rule}, got inf"),
]  # fmt: skip


@both
@pytest.mark.parametrize("change, message", BAD)
def test_bad_checkpoints(load, change, message):
    state = checkpoint(load, NVFP4Tensor.from_parts(*weights(4, 32, 0.25)), "l")
    change(state, NAMES[load])
    keys = [f"l.{name}" for name in NAMES[load]]
    with pytest.raises(ValueError) as error:
        load({key: t.to(DEVICE) for key, t in state.items()}, "l")
    rule = ">= 0" if load is from_modelopt else "> 0"
    assert str(error.value) == f"{load.__name__}: " + message.format(*keys, rule=rule)


@both
def test_a_missing_tensor_is_named(load):
    state = checkpoint(load, NVFP4Tensor.from_parts(*weights(4, 32)), "l")
    last = f"l.{NAMES[load][2]}"
    del state[last]
    with pytest.raises(KeyError) as error:
        load({**state, "other.weight": state["l.weight_scale"]}, "l")
    there = ", ".join(sorted(state))
    assert error.value.args[0] == f"{load.__name__}: state_dict must have {last}, got {there} under 'l'"
    with pytest.raises(KeyError, match="got nothing under 'nowhere'"):
        load(state, "nowhere")


def test_an_inverse_of_zero_is_refused():
    state = checkpoint(from_compressed_tensors, NVFP4Tensor.from_parts(*weights(4, 32)), "l")
    state["l.weight_global_scale"] = torch.zeros(1, device=DEVICE)
    with pytest.raises(ValueError, match="weight_global_scale must be a finite number > 0, got 0.0$"):
        from_compressed_tensors(state, "l")
