"""The text of the sm_90 kernel of ssd_scan, run on the CPU by tests/cuda_emulator: tiles, swizzles, barriers, decays.

It proves nothing about a GPU, where the same operator is tested through the dispatcher; it finds on any machine what
would otherwise be found on a GPU. `lazy`: what happens when it is waited for, not when it is issued: 1 the tensor
cores' products, 2 the copies of tiles as well.
"""

from __future__ import annotations

import pytest
import torch
from conftest import assert_same_bits, fenced
from kernel_text import load, needs_emulator
from scan_arguments import DTYPES, scan
from ssd_problems import rms_error, widened

from n3kernels.mamba import reference

pytestmark = needs_emulator
@pytest.fixture(scope="session")
def kernel():
    return load("ssd_scan.cpp").emulate_ssd_scan


def problem(tokens, layout, dtype, D="head", gate=False, bias=True):
    """Column slices of one projection, whose rows are a multiple of 16 bytes, in NaN."""
    heads, groups, head_dim, d_state = layout
    widths = [heads * head_dim, heads * head_dim, groups * d_state, groups * d_state, heads]
    rows = torch.full((*tokens, -(-sum(widths) // 8) * 8 + 8), float("nan"))
    rows[..., : sum(widths)] = torch.randn(*tokens, sum(widths))
    z, x, B, C, dt = fenced(rows.to(dtype))[..., : sum(widths)].split(widths, -1)
    return {
        "x": x.unflatten(-1, (heads, head_dim)),
        "dt": dt,
        "A": fenced(-torch.rand(heads) * 8),
        "B": B.unflatten(-1, (groups, d_state)),
        "C": C.unflatten(-1, (groups, d_state)),
        "D": {"none": None, "head": torch.randn(heads), "channel": torch.randn(heads, head_dim)}[D],
        "z": z.unflatten(-1, (heads, head_dim)) if gate else None,
        "dt_bias": torch.randn(heads) - 2 if bias else None,
    }


def truth(call, initial=None, ends=None, softplus=True, dt_min=0.0, dt_max=None):
    wide = None if initial is None else initial.double()
    options = {"dt_softplus": softplus, "dt_min": dt_min, "dt_max": dt_max}
    return reference.ssd_scan(**widened(call), initial_states=wide, cu_seqlens=ends, **options)


def states(slots, layout, dtype=torch.float32):
    heads, _, head_dim, d_state = layout
    return fenced(torch.randn(slots, heads, head_dim, d_state).to(dtype))


def assert_right(y, final, want_y, want_final):
    """What the operator promises of 16-bit inputs, over whole tensors per head."""
    assert not y.isnan().any() and not final.isnan().any()
    assert rms_error(y.flatten(0, -3), want_y.flatten(0, -3), (0, 2)) <= 4e-3
    assert rms_error(final, want_final, (0, 2, 3)) <= 3e-3


# heads, groups, head_dim, d_state: every template, its padding, several tiles per head, one tile left over
LAYOUTS = [(2, 1, 64, 128), (3, 1, 64, 64), (2, 1, 64, 96), (1, 1, 64, 256), (2, 1, 80, 128), (1, 1, 72, 112),
           (2, 2, 8, 16), (1, 1, 136, 48), (1, 1, 128, 160)]  # fmt: skip


@pytest.mark.parametrize("lazy", [0, 1, 2])
@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_agrees_with_the_definition(kernel, layout, dtype, lazy):
    """Several chunks and a rest, from a state, with everything that is optional or with nothing."""
    call = problem((1, 150), layout, dtype, "channel" if lazy else "none", lazy == 1, lazy != 1)
    initial = states(1, layout)
    final = torch.full_like(initial, float("nan"))
    y = scan(kernel, call, final, initial=initial, lazy=lazy, reverse=layout[0] > 1)
    assert_right(y, final, *truth(call, initial))


@pytest.mark.parametrize("lazy", [0, 1, 2])
def test_packed_sequences(kernel, lazy):
    """Empty, short, whole and ragged ones, and tokens behind the last, whose x, B, C and dt are NaN."""
    layout, lengths = (3, 1, 8, 16), [0, 1, 64, 65, 0, 130]
    ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    used = int(ends[-1])
    call = problem((used + 70,), layout, torch.bfloat16, gate=True)
    for name in ("x", "B", "C", "dt", "z"):
        call[name][used:] = float("nan")
    initial = states(len(lengths), layout)
    final = torch.full_like(initial, float("nan"))
    y = scan(kernel, call, final, initial=initial, ends=ends, lazy=lazy)
    want_y, want_final = truth(call, initial, ends)
    assert_right(y[:used], final, want_y[:used], want_final)
    assert (y[used:] == 0).all()
    for s, length in enumerate(lengths):  # alone: the same bits, and nobody else's NaN
        part = slice(int(ends[s]), int(ends[s]) + length)
        one = {n: t[part] if n in ("x", "dt", "B", "C", "z") else t for n, t in call.items()}
        alone = torch.full_like(initial[:1], float("nan"))
        bounds = torch.tensor([0, length], dtype=torch.int32)
        y_alone = scan(kernel, one, alone, initial=initial[s : s + 1], ends=bounds, sms=1, lazy=lazy)
        assert_same_bits(y_alone, y[part])
        assert_same_bits(alone[0], final[s])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wide", [torch.int32, torch.int64])
def test_slots(kernel, dtype, wide):
    """States of any dtype and strides, by slot; a padding sequence; one that starts from zeros, its slot being NaN."""
    layout, lengths = (2, 2, 16, 32), [70, 5, 0, 9, 0]
    ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    call = problem((sum(lengths),), layout, torch.float16)
    state = states(7, layout, dtype).transpose(2, 3).contiguous().transpose(2, 3)
    state[5], state[6] = float("nan"), float("nan")
    indices = torch.tensor([4, -1, 0, 6, 5], dtype=wide)
    has_initial = torch.tensor([True, True, True, False, False])
    before = state.clone()
    y = scan(kernel, call, state, initial=state, indices=indices, has_initial=has_initial, ends=ends)
    initial = torch.stack([before[4], before[1], before[0], before[1] * 0, before[1] * 0])
    want_y, want_final = truth(call, initial, ends)
    own = torch.tensor([True] * 70 + [False] * 5 + [True] * 9)
    assert_right(y[own], state[[4, 6]], want_y[own], want_final[[0, 3]])
    assert (y[~own] == 0).all() and (state[5] == 0).all()
    assert_same_bits(state[:4], before[:4])  # of the empty sequence, and of nobody


@pytest.mark.parametrize("lazy", [0, 1, 2])
@pytest.mark.parametrize("layout", [(3, 1, 64, 128), (1, 1, 80, 96), (2, 1, 64, 256)])
def test_checkpoints(kernel, layout, lazy):
    """The bits of a run over the prefix, at any offset; y and the last state do not change by them."""
    ends = torch.tensor([0, 7, 150], dtype=torch.int32)
    call = problem((160,), layout, torch.bfloat16)
    plain = states(12, layout)
    state = plain.clone()
    indices = torch.tensor([0, 1])
    after = [6, 2, 7, 70, 71, 101, 149, 155, 90]
    slots = torch.tensor([2, 3, 4, 5, 6, 7, 8, 9, -1])
    tokens = torch.tensor(after, dtype=torch.int32)
    y = scan(kernel, call, state, initial=state, indices=indices, ends=ends, checkpoints=(tokens, slots), lazy=lazy)
    last = plain.clone()
    assert_same_bits(y, scan(kernel, call, last, initial=last, indices=indices, ends=ends, lazy=lazy))
    assert_same_bits(state[:2], last[:2])
    assert_same_bits(state[9:], plain[9:])  # behind the last sequence; no slot; nobody's
    for token, slot in zip(after[:7], slots[:7].tolist(), strict=True):
        s = int(token >= 7)
        part = slice(int(ends[s]), token + 1)
        prefix = {n: t[part] if n in ("x", "dt", "B", "C", "z") and t is not None else t for n, t in call.items()}
        alone = plain[s : s + 1].clone()
        bounds = torch.tensor([0, part.stop - part.start], dtype=torch.int32)
        scan(kernel, prefix, alone, initial=alone, ends=bounds, sms=1)
        assert_same_bits(state[slot], alone[0])


def test_a_prompt_split_at_a_multiple_of_64(kernel):
    """Handed over in float32: the bits of the whole."""
    layout = (2, 1, 64, 64)
    call = problem((2, 200), layout, torch.bfloat16)
    initial = states(2, layout)
    whole, state = torch.empty_like(initial), initial
    y = scan(kernel, call, whole, initial=initial)
    for part in (slice(0, 64), slice(64, 192), slice(192, 200)):
        piece = {n: t[:, part] if n in ("x", "dt", "B", "C") else t for n, t in call.items()}
        after = torch.empty_like(initial)
        assert_same_bits(scan(kernel, piece, after, initial=state, sms=64), y[:, part].contiguous())
        state = after
    assert_same_bits(state, whole)


def test_no_time_passes(kernel):
    """dt = 0 leaves a state as it is."""
    layout = (2, 1, 64, 128)
    call = problem((1, 100), layout, torch.bfloat16)
    initial = states(1, layout)
    final = torch.empty_like(initial)
    scan(kernel, {**call, "dt": torch.zeros_like(call["dt"]), "dt_bias": None}, final, initial=initial, softplus=False)
    assert_same_bits(final, initial.contiguous())


@pytest.mark.parametrize("low, high", [(-200.0, 1000.0), (-20.0, -10.0), (5.0, 30.0)])
def test_extreme_steps(kernel, low, high):
    """From steps that leave the state as it is to steps that wipe it out, in one chunk: sums below -1e4, no NaN."""
    layout = (4, 1, 64, 64)
    call = problem((1, 130), layout, torch.bfloat16, bias=False)
    call["A"] = -torch.tensor([1e-4, 1.0, 16.0, 1e3])
    call["dt"] = torch.empty(1, 130, 4).uniform_(low, high)
    call["dt"][0, ::3] = low
    initial = states(1, layout)
    final = torch.empty_like(initial)
    y = scan(kernel, call, final, initial=initial)
    assert_right(y, final, *truth(call, initial))


def test_options(kernel):
    """dt of float32 in its own strides; clamped; without softplus; with one tile per block and with two."""
    layout = (4, 2, 16, 16)
    call = problem((2, 90), layout, torch.float16, D="none", bias=False)
    call["dt"] = torch.rand(4, 90, 2).permute(2, 1, 0) - 0.2
    for options in ({"dt_min": 0.05, "dt_max": 0.4}, {"softplus": False, "dt_max": 0.5}, {"dt_min": 0.7}):
        final = torch.empty(2, 4, 16, 16)
        y = scan(kernel, call, final, sms=1, **options)
        assert_right(y, final, *truth(call, **options))
        other = torch.empty_like(final)
        assert_same_bits(scan(kernel, call, other, sms=100, **options), y)
        assert_same_bits(other, final)


def test_a_nan_stays_in_its_head_and_later_tokens(kernel):
    layout = (2, 1, 64, 64)
    call = problem((1, 140), layout, torch.bfloat16)
    final = torch.empty(1, 2, 64, 64)
    clean = scan(kernel, call, final)
    call["dt"][0, 70, 1] = float("nan")
    y = scan(kernel, call, final)
    assert_same_bits(y[:, :, 0].contiguous(), clean[:, :, 0].contiguous())
    assert_same_bits(y[:, :70].contiguous(), clean[:, :70].contiguous())
    assert y[:, 70:, 1].isnan().all() and final[:, 1].isnan().all() and not final[:, 0].isnan().any()
