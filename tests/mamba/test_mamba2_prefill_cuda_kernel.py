"""The text of the three CUDA kernels of mamba2_prefill, run on the CPU one after the other, as the launcher does it."""

from __future__ import annotations

import ctypes

import pytest
import torch
from conftest import assert_same_bits, fenced
from hypothesis import given
from hypothesis import strategies as st
from kernel_arguments import (
    TYPES,
    ConvArgs,
    FinishArgs,
    NormArgs,
    PrefillSizes,
    Taps,
    View,
    indices,
    load_kernels,
    room,
    run,
    view,
)  # fmt: skip
from kernel_problems import SEEDS
from kernel_text import load, needs_emulator
from mixer_problems import (
    INT,
    assert_is_the_mixer,
    assert_is_the_state,
    clones,
    definition,
    mixer,
    variants,
)  # fmt: skip
from scan_arguments import scan
from ssd_problems import PUBLISHED

from n3kernels.mamba import reference_mixer

pytestmark = needs_emulator


@pytest.fixture(scope="session")
def kernels():
    loaded = load_kernels()
    loaded.scan = load("ssd_scan.cpp").emulate_ssd_scan
    return loaded


def in_rows(t):
    """What the copy engine reads."""
    outer = zip(t.shape[:-1], t.stride()[:-1], strict=True)
    return t.stride(-1) == 1 and t.data_ptr() % 16 == 0 and all(n <= 1 or (s > 0 and s % 8 == 0) for n, s in outer)


def prefill(
    kernels, zxbcdt, conv_weight, conv_bias, conv_state, ssm_state, A, D, dt_bias, norm_weight, state_indices,
    has_initial=None, cu_seqlens=None, checkpoint_tokens=None, checkpoint_indices=None, group_size=None,
    norm_before_gate=False, activation="silu", dt_softplus=True, dt_max=None, reverse=False, lazy=2,
):  # fmt: skip
    heads, head_dim, d_state = ssm_state.shape[1:]
    (channels, width), inner, dtype = conv_weight.shape, heads * head_dim, zxbcdt.dtype
    groups, packed, kept = (channels - inner) // (2 * d_state), cu_seqlens is not None, conv_state.shape[2]
    z, xbc, dt = zxbcdt.split([inner, channels, heads], -1)
    tokens, length = z[..., 0].numel(), 0 if packed else z.shape[1]
    mixed = room(xbc.shape, torch.float16)
    checkpoints = 0 if checkpoint_tokens is None else len(checkpoint_tokens)
    conv = ConvArgs(
        view(xbc, int(packed)), Taps(view(conv_weight), view(conv_bias), channels, width, activation == "silu"),
        view(conv_state), view(conv_state), indices(state_indices), view(has_initial), indices(cu_seqlens),
        indices(checkpoint_tokens), indices(checkpoint_indices), mixed.data_ptr(), len(state_indices), tokens, length,
        kept, len(conv_state), checkpoints,
    )  # fmt: skip
    run(kernels.emulate_mixed_conv, conv, in_rows(xbc) and channels % 8 == 0 and width <= 4, reverse)

    x, B, C = mixed.split([inner, groups * d_state, groups * d_state], -1)
    call = {
        "x": x.unflatten(-1, (heads, head_dim)), "B": B.unflatten(-1, (groups, d_state)), "dt": dt, "A": A, "D": D,
        "C": C.unflatten(-1, (groups, d_state)), "dt_bias": dt_bias,
        "z": None,
    }  # fmt: skip
    y = scan(
        kernels.scan, call, ssm_state, initial=ssm_state, indices=state_indices, has_initial=has_initial,
        ends=cu_seqlens, checkpoints=(checkpoint_tokens, checkpoint_indices), softplus=dt_softplus, dt_max=dt_max,
        lazy=lazy, reverse=reverse, saturated=True,
    ).flatten(-2)  # fmt: skip

    group_size, y = group_size or inner // groups, y.view(dtype)
    sizes = PrefillSizes(tokens, len(state_indices), inner, channels, kept, group_size)
    gate = View(z.data_ptr(), TYPES.index(dtype), (ctypes.c_int64 * 4)(0, z.stride(-1)))
    rows = View(y.data_ptr(), TYPES.index(torch.float16), (ctypes.c_int64 * 4)(inner, 1))
    norm = NormArgs(rows, gate, view(norm_weight), y.data_ptr(), tokens, inner // group_size, group_size, 1e-5,
                    norm_before_gate and norm_weight is not None)  # fmt: skip
    finish = FinishArgs(norm, 0 if packed else z.stride(0), z.stride(-2), conv)
    run(kernels.emulate_prefill_finish, finish, ctypes.byref(sizes), in_rows(z) and group_size % 8 == 0, reverse)
    return y


def problem(tokens, layout, dtype, variant, aligned, **more):
    """Rows at multiples of 16 bytes, or at odd ones."""
    call, options = mixer(tokens, layout, dtype, variant, **more)
    if aligned:
        zxbcdt = torch.full((*tokens, -(-call["zxbcdt"].shape[-1] // 8) * 8 + 8), float("nan"), dtype=dtype)
        zxbcdt[..., : call["zxbcdt"].shape[-1]] = call["zxbcdt"]
        call["zxbcdt"] = fenced(zxbcdt)[..., : call["zxbcdt"].shape[-1]]
    return call, options


def assert_right(kernels, call, options, where, dtype, reverse):
    """Against the definition, sequence by sequence; raw inputs in the convolution's states bit for bit."""
    before, wanted = clones(call), {**clones(call), "ssm_state": call["ssm_state"].float().clone()}
    reference_mixer.mamba2_prefill(**wanted, **where, **options)
    y = prefill(kernels, **call, **where, **options, reverse=reverse)
    assert_same_bits(call["conv_state"], wanted["conv_state"])
    zxbcdt, ends = call["zxbcdt"], where.get("cu_seqlens")
    if ends is None:
        bounds = [(s, slice(None)) for s in range(len(zxbcdt))]
    else:
        bounds = [(slice(a, b),) for a, b in zip(ends.tolist(), ends.tolist()[1:], strict=False)]
        assert y[ends[-1] :].count_nonzero() == 0
    for s, (at, slot) in enumerate(zip(bounds, where["state_indices"].tolist(), strict=True)):
        if slot < 0:
            assert y[at].count_nonzero() == 0
            continue
        fresh = not where["has_initial"][s]
        conv, ssm = (None if fresh else before[name][slot] for name in ("conv_state", "ssm_state"))
        truth, after = definition(call, options, zxbcdt[at], conv, ssm)
        if len(truth):
            assert_is_the_mixer(y[at], truth, dtype)
        assert_is_the_state(call["ssm_state"][slot], after, dtype)
    others = [slot for slot in range(len(before["ssm_state"])) if slot not in where["state_indices"].tolist()]
    assert_same_bits(call["ssm_state"][others], before["ssm_state"][others])


# heads, groups, head_dim, d_state; what the scan takes, with groups of the norm of every kernel
LAYOUTS = [(4, 2, 8, 16), (3, 1, 8, 16), (2, 1, 72, 32), (17, 1, 64, 16)]


@given(
    st.lists(st.sampled_from([0, 1, 5, 17, 66]), min_size=1, max_size=3), st.booleans(), st.sampled_from(LAYOUTS),
    st.sampled_from(TYPES[1:3]), st.sampled_from(TYPES[:3]), variants, st.integers(0, 2), st.booleans(),
    st.booleans(), SEEDS,
)  # fmt: skip
def test_agrees_with_the_definition(
    kernels, lengths, packed, layout, dtype, state_dtype, variant, more, aligned, reverse, rng
):
    """Packed and batched, empty sequences, padding that is NaN, slots, every option, rows that are aligned or not."""
    count = len(lengths)
    tokens = (sum(lengths) + rng.randrange(3),) if packed else (count, lengths[0])
    call, options = problem(tokens, layout, dtype, variant, aligned, slots=count + 2, more=more,
                            state_dtype=state_dtype)  # fmt: skip
    where = {"state_indices": torch.tensor([rng.choice([i, i, -1]) for i in rng.sample(range(count + 2), count)])}
    where["has_initial"] = torch.tensor([rng.random() < 0.5 for _ in range(count)])
    if packed:
        where["cu_seqlens"] = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        call["zxbcdt"][sum(lengths) :] = float("nan")
    for s, slot in enumerate(where["state_indices"].tolist()):
        if slot >= 0 and not where["has_initial"][s]:
            call["conv_state"][slot] = call["ssm_state"][slot] = float("nan")
        if slot < 0 and not packed:
            call["zxbcdt"][s] = float("nan")
    assert_right(kernels, call, options, where, dtype, reverse)


@pytest.mark.parametrize("dtype", TYPES[1:3])
@pytest.mark.parametrize("layout", PUBLISHED.values(), ids=PUBLISHED)
def test_published_shapes(kernels, layout, dtype):
    (_, _, head_dim, d_state), variant = layout, (4, True, "silu", "head", True, True, "default", False)
    call, options = problem((1, 70), (2, 1, head_dim, d_state), dtype, variant, True, slots=1)
    assert_right(kernels, call, options, {"state_indices": torch.zeros(1, **INT), "has_initial": torch.ones(1).bool()},
                 dtype, False)  # fmt: skip


def test_checkpoints_are_prefixes(kernels):
    """Both states after a token have the bits of a prompt that ends there; nothing else changes."""
    call, options = mixer((90,), dtype=torch.bfloat16, slots=7)
    plain, before = clones(call), clones(call)
    where = {"state_indices": torch.tensor([4, 0]), "cu_seqlens": torch.tensor([0, 75, 87], dtype=torch.int32)}
    kept = {"checkpoint_tokens": torch.tensor([70, 0, 80, 89, 64], dtype=torch.int32),
            "checkpoint_indices": torch.tensor([1, 2, 3, 5, -1])}  # fmt: skip
    y = prefill(kernels, **call, **where, **kept, **options)
    assert_same_bits(y, prefill(kernels, **plain, **where, **options))
    for name in ("conv_state", "ssm_state"):
        assert_same_bits(call[name][[4, 0]], plain[name][[4, 0]])
        assert_same_bits(call[name][[5, 6]], before[name][[5, 6]])
    for token, slot, first in ((70, 1, 0), (0, 2, 0), (80, 3, 75)):
        prefix, index = clones(before), torch.tensor([4 if first == 0 else 0])
        prefix["zxbcdt"] = call["zxbcdt"][first : token + 1]
        ends = torch.tensor([0, token + 1 - first], dtype=torch.int32)
        prefill(kernels, **prefix, state_indices=index, cu_seqlens=ends, **options)
        for name in ("conv_state", "ssm_state"):
            assert_same_bits(prefix[name][index[0]], call[name][slot])


def test_values_beyond_float16_are_clamped(kernels):
    """Not infinite: one large activation leaves no NaN in the states and outputs of its sequence."""
    call, options = mixer((70,), dtype=torch.bfloat16, slots=1)
    call["zxbcdt"][10] *= 1e6
    ends = torch.tensor([0, 70], dtype=torch.int32)
    y = prefill(kernels, **call, state_indices=torch.tensor([0]), cu_seqlens=ends, **options)
    assert y.isfinite().all() and call["ssm_state"].isfinite().all()
