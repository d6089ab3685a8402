"""The text of the CUDA kernels of mamba2_decode, run on the CPU."""

from __future__ import annotations

import ctypes

import pytest
import torch
from conftest import assert_close_to, assert_same_bits, fenced
from hypothesis import given
from hypothesis import strategies as st
from kernel_arguments import (
    TYPES,
    ConvUpdateArgs,
    DecodeArgs,
    IndexView,
    MixerNorm,
    SsmArgs,
    Staged,
    Taps,
    TimeStep,
    View,
    load_kernels,
    pointer,
    room,
    run,
    slots,
    stage,
    view,
)  # fmt: skip
from kernel_problems import FLOATS, KINDS, SEEDS, draw_slots
from kernel_text import needs_emulator

from n3kernels.mamba import reference_decode, reference_mixer

SHIFT = 0  # causal_conv1d::History

pytestmark = needs_emulator


@pytest.fixture(scope="session")
def kernels():
    return load_kernels()


def decode(kernels, fused, zxbcdt, conv_weight, conv_bias, conv_state, ssm_state, A, D, dt_bias, norm_weight,
           state_scale=None, group_size=None, norm_before_gate=False, reverse=False, **where):  # fmt: skip
    """In one launch, or in three with float32 in between."""
    (batch, tokens, _), (heads, head_dim, d_state) = zxbcdt.shape, ssm_state.shape[1:]
    channels, inner = conv_weight.shape[0], heads * head_dim
    groups = (channels - inner) // (2 * d_state)
    z, xbc, dt = zxbcdt.split([inner, channels, heads], -1)
    y, group_size = room((batch, tokens, inner), zxbcdt.dtype), group_size or inner // groups
    names = ("state_indices", "dst_state_indices", "num_accepted", "num_tokens", "parents")
    at = slots(ssm_state, batch, tokens, *(where.get(name) for name in names))
    scales = [] if state_scale is None else [state_scale]
    staged = stage(kernels, at, [conv_state, ssm_state, *scales]) + [Staged()]
    mixed, u = room((batch, tokens, channels), torch.float32), room((batch, tokens, inner), torch.float32)
    x, B, C = mixed.split([inner, groups * d_state, groups * d_state], -1)
    heads_of_x, B, C = x.unflatten(-1, (heads, head_dim)), *(t.unflatten(-1, (groups, d_state)) for t in (B, C))
    conv_args = ConvUpdateArgs(
        view(xbc), Taps(view(conv_weight), view(conv_bias), channels, conv_weight.shape[1], True), view(conv_state),
        SHIFT, at, IndexView(), staged[0], view(mixed), conv_state.shape[2],
    )  # fmt: skip
    ssm_args = SsmArgs(
        view(ssm_state), view(state_scale), view(heads_of_x), View(), view(B), view(C),
        view(D[:, None].expand(-1, head_dim)), view(u.view(heads_of_x.shape)),
        TimeStep(view(dt), view(A), view(dt_bias), True, 0.0, float("inf")), at, staged[1], staged[2], None, 1,
        heads, heads // groups, head_dim, d_state, 0, True,
    )  # fmt: skip
    norm_args = MixerNorm(view(z), view(y), view(norm_weight), group_size, 1e-5, norm_before_gate)
    if fused:
        run(kernels.emulate_decode, DecodeArgs(conv_args, ssm_args, norm_args, groups), reverse)
    else:
        run(kernels.emulate_conv_update, conv_args, reverse)
        run(kernels.emulate_ssm_update, ssm_args, reverse)
        run(kernels.emulate_finish, norm_args, ctypes.byref(at), pointer(u), ctypes.c_int64(inner // group_size))
    return y


@given(
    st.integers(1, 3), st.integers(1, 4), st.sampled_from([(4, 2, 5, 16), (3, 1, 12, 128), (2, 2, 4, 160)]),
    st.integers(1, 5), FLOATS, st.sampled_from(TYPES[:4]), KINDS, st.booleans(), st.booleans(), st.booleans(),
    st.sampled_from(["group", "part", "none"]), st.booleans(), st.booleans(), SEEDS,
)  # fmt: skip
def test_mamba2_decode(
    kernels, batch, tokens, layout, width, dtype, state_dtype, kind, accepted, counted, before, normed, strided,
    reverse, rng,
):  # fmt: skip
    """One launch against the definition, and bit for bit against the three launches of the parts."""
    heads, groups, head_dim, d_state = layout
    inner, channels = heads * head_dim, heads * head_dim + 2 * groups * d_state
    count, where = draw_slots(rng, batch, tokens, kind, accepted, counted, False)
    zxbcdt = fenced(torch.randn(batch, tokens, inner + channels + heads + 3).to(dtype))[..., :-3]
    call = {
        "conv_weight": fenced(torch.randn(channels, width)), "conv_bias": fenced(torch.randn(channels)),
        "A": fenced(-torch.rand(heads)), "D": fenced(torch.randn(heads)), "dt_bias": fenced(torch.randn(heads)),
        "norm_weight": None if normed == "none" else fenced(torch.randn(inner)),
    }  # fmt: skip
    options = {"norm_before_gate": before, "group_size": head_dim if normed == "part" else None, **where}
    conv_state = fenced(torch.randn(count, channels, width).to(dtype))
    conv_state = conv_state.transpose(1, 2).contiguous().transpose(1, 2) if strided else conv_state
    ssm_state, scale = fenced(torch.randn(count, heads, head_dim, d_state)), None
    if state_dtype == torch.int8:
        ssm_state, scale = fenced(torch.randint(-127, 128, ssm_state.shape).to(torch.int8)), torch.rand(
            count, heads, head_dim
        ).div(100)
    ssm_state = ssm_state.to(state_dtype)

    want = [t if t is None else t.clone() for t in (conv_state, ssm_state, scale)]
    wide = {name: t if t is None else t.float() for name, t in call.items()}
    true_y = reference_mixer.mamba2_decode(
        zxbcdt.float(), conv_state=want[0].float().clone(), ssm_state=want[1], state_scale=want[2], **wide, **options
    )
    reference_decode.causal_conv1d_update(
        zxbcdt[..., inner : inner + channels], want[0], call["conv_weight"], **where
    )
    results = []
    for fused in (True, False):
        states = [t if t is None else t.clone() for t in (conv_state, ssm_state, scale)]
        if strided:
            states[0] = states[0].transpose(1, 2).contiguous().transpose(1, 2)
        y = decode(
            kernels, fused, zxbcdt, conv_state=states[0], ssm_state=states[1], state_scale=states[2], **call,
            **options, reverse=reverse,
        )  # fmt: skip
        results.append((y, *states))
        assert_close_to(y, true_y.double(), 2e-4 * (10 + d_state), true_y.abs().double() + 1)
        assert_same_bits(states[0].contiguous(), want[0].contiguous())
        if state_dtype == torch.int8:
            assert (states[1].int() - want[1].int()).abs().max() <= 1
        else:
            assert_close_to(states[1], want[1], 1e-4 if state_dtype == torch.float32 else 2e-2)
    for ours, parts in zip(*results, strict=True):
        if ours is not None:
            assert_same_bits(ours.contiguous(), parts.contiguous())


def test_mamba2_decode_many_tokens_are_many_calls(kernels):
    heads, head_dim, d_state = 2, 20, 16
    inner, channels = 40, 72
    call = [torch.randn(channels, 4), None], [-torch.rand(2), torch.randn(2), torch.randn(2), torch.randn(inner)]
    zxbcdt = torch.randn(2, 3, inner + channels + heads).bfloat16()
    states = [torch.randn(2, channels, 3).bfloat16(), torch.randn(2, heads, head_dim, d_state)]
    at_once, one_by_one = ([t.clone() for t in states] for _ in range(2))
    y = decode(kernels, True, zxbcdt, *call[0], *at_once, *call[1])
    for t in range(3):
        y_t = decode(kernels, t == 1, zxbcdt[:, t : t + 1], *call[0], *one_by_one, *call[1])
        assert_same_bits(y[:, t : t + 1].contiguous(), y_t)
    for a, b in zip(at_once, one_by_one, strict=True):
        assert_same_bits(a, b)
