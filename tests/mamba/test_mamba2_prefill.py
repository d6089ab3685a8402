from __future__ import annotations

import pytest
import torch
from conftest import DEVICE, assert_invariant, assert_same_bits
from hypothesis import strategies as st
from mixer_problems import (
    BAD_MIXER,
    GOOD_MIXER,
    INT,
    SMALL,
    assert_is_the_mixer,
    assert_is_the_state,
    clones,
    definition,
    mixer,
    variants,
)
from properties import all_serving, checking, examples
from ssd_problems import PUBLISHED, dtypes, layouts

from n3kernels import use_backend
from n3kernels.mamba import causal_conv1d_slots, gated_rms_norm, mamba2_decode, mamba2_prefill, ssd_scan_slots

OPS = ("mamba2_prefill",)

lengths_of_packs = st.lists(st.sampled_from([0, 1, 2, 5, 17, 33]), min_size=1, max_size=3)


def ends(lengths):
    return torch.tensor([0, *lengths], device=DEVICE).cumsum(0).to(torch.int32)


def slots_of(call):
    return {name: call[name] for name in ("conv_state", "ssm_state")}


# ---------------------------------------------------------------- the definition


@examples(lengths_of_packs, layouts, dtypes, dtypes, variants, st.integers(0, 2), st.randoms())
def test_agrees_with_the_definition(backend, lengths, layout, dtype, state_dtype, variant, more, rnd):
    """Packed sequences, empty ones too, fresh or continued, padding, longer convolution states, every option."""
    behind, count = rnd.randrange(3), len(lengths)
    call, options = mixer((sum(lengths) + behind,), layout, dtype, variant, count + 2, more, state_dtype)
    call["zxbcdt"][sum(lengths) :] = float("nan")
    slots = [rnd.choice([i, i, -1]) for i in rnd.sample(range(count + 2), count)]
    fresh = [rnd.random() < 0.5 for _ in slots]
    for s, slot in enumerate(slots):
        if fresh[s] and slot >= 0:
            call["conv_state"][slot] = call["ssm_state"][slot] = float("nan")
    before = clones(call)
    y = mamba2_prefill(
        **call, state_indices=torch.tensor(slots, dtype=torch.int64, device=DEVICE), **options,
        has_initial=torch.tensor([not f for f in fresh], dtype=torch.bool, device=DEVICE), cu_seqlens=ends(lengths),
    )  # fmt: skip
    assert y.is_contiguous() and y.shape == (sum(lengths) + behind, layout[0] * layout[2])
    assert y[sum(lengths) :].count_nonzero() == 0
    heads, _, head_dim, _ = layout
    raw = call["zxbcdt"][:, heads * head_dim : -heads]
    for s, (a, slot, n) in enumerate(zip(ends(lengths).tolist(), slots, lengths, strict=False)):
        if slot < 0:
            assert y[a : a + n].count_nonzero() == 0
            continue
        conv, ssm = (None if fresh[s] else before[name][slot] for name in ("conv_state", "ssm_state"))
        truth, after = definition(call, options, call["zxbcdt"][a : a + n], conv, ssm)
        if n:
            assert_is_the_mixer(y[a : a + n], truth, dtype)
        assert_is_the_state(call["ssm_state"][slot], after, dtype)
        said = torch.cat([torch.zeros_like(before["conv_state"][0]) if fresh[s] else conv, raw[a : a + n].T], 1)
        assert_same_bits(call["conv_state"][slot], said[:, n:])
    others = [slot for slot in range(count + 2) if slot not in slots]
    for name, state in slots_of(call).items():
        assert_same_bits(state[others], before[name][others])


def test_no_sequences(backend):
    """All tokens are padding: zeros, and no slot is touched."""
    call, options = mixer((3,))
    before, nothing = clones(call), torch.zeros(0, **INT)
    y = mamba2_prefill(**call, state_indices=nothing, cu_seqlens=ends([]), **options)
    assert y.shape == (3, 32) and y.count_nonzero() == 0
    for name, state in slots_of(call).items():
        assert_same_bits(state, before[name])


@pytest.mark.parametrize("layout", PUBLISHED.values(), ids=PUBLISHED)
def test_published_shapes(backend, layout):
    call, options = mixer((1, 20), layout, torch.bfloat16, slots=1)
    conv, ssm = call["conv_state"][0].clone(), call["ssm_state"][0].clone()
    y = mamba2_prefill(**call, state_indices=torch.zeros(1, **INT), **options)
    truth, after = definition(call, options, call["zxbcdt"][0], conv, ssm)
    assert_is_the_mixer(y[0], truth, torch.bfloat16)
    assert_is_the_state(call["ssm_state"][0], after, torch.bfloat16)


PARTS = ("causal_conv1d.slots", "ssd_scan.slots", "gated_rms_norm")


@pytest.mark.parametrize("which", all_serving("mamba2_prefill", *PARTS))
def test_equals_its_parts(which):
    """In float32; on the CPU bit for bit."""
    call, options = mixer((2, 70))
    other, index = clones(call), torch.tensor([3, 1], device=DEVICE)
    heads, groups, head_dim, d_state = SMALL
    inner, channels = heads * head_dim, call["conv_weight"].shape[0]
    with use_backend(which):
        y = mamba2_prefill(**call, state_indices=index, **options)
        z, xbc, dt = other["zxbcdt"].split([inner, channels, heads], -1)
        weights = other["conv_weight"], other["conv_bias"]
        xbc = causal_conv1d_slots(xbc, *weights, other["conv_state"], index, activation="silu")
        x, B, C = xbc.split([inner, groups * d_state, groups * d_state], -1)
        B, C = B.unflatten(-1, (groups, d_state)), C.unflatten(-1, (groups, d_state))
        x, skips = x.unflatten(-1, (heads, head_dim)), (other["D"], None, other["dt_bias"])
        parts = ssd_scan_slots(x, dt, other["A"], B, C, *skips, other["ssm_state"], index, dt_max=2.0)
        parts = gated_rms_norm(parts.flatten(-2), z, other["norm_weight"], inner // groups)
    if which == "cpu":
        assert_same_bits(y, parts)
        assert_same_bits(call["ssm_state"], other["ssm_state"])
    assert_is_the_mixer(y, parts.double(), torch.float32)
    assert_is_the_state(call["ssm_state"], other["ssm_state"].double(), torch.float32)
    assert_same_bits(call["conv_state"], other["conv_state"])


# ---------------------------------------------------------------- invariants


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pieces", [(64, 66), (128, 2)])
def test_pieces_at_multiples_of_64_have_the_bits_of_one(backend, dtype, pieces):
    call, options = mixer((130,), dtype=dtype, slots=1)
    call["conv_state"].zero_(), call["ssm_state"].zero_()
    split, index = clones(call), torch.zeros(1, **INT)
    y = mamba2_prefill(**call, state_indices=index, cu_seqlens=ends([130]), **options)
    parts, start = [], 0
    for length in pieces:
        piece = {**split, "zxbcdt": call["zxbcdt"][start : start + length]}
        parts.append(mamba2_prefill(**piece, state_indices=index, cu_seqlens=ends([length]), **options))
        start += length
    assert_invariant(backend, torch.cat(parts), y)
    for name, state in slots_of(call).items():
        assert_invariant(backend, split[name], state)


def test_checkpoints_are_prefixes(backend):
    """Both states after a token have the bits of a prompt that ends there; outputs and final states do not change."""
    call, options = mixer((90,), slots=7)
    plain, index, before = clones(call), torch.tensor([4, 0], **INT), clones(call)
    where = {"state_indices": index, "cu_seqlens": ends([75, 12])}
    kept = {"checkpoint_tokens": torch.tensor([70, 0, 80, 89, 64], **INT)}
    kept["checkpoint_indices"] = torch.tensor([2, 1, 6, 3, -1], **INT)
    y = mamba2_prefill(**call, **where, **kept, **options)
    assert_same_bits(mamba2_prefill(**plain, **where, **options), y)
    for name, state in slots_of(call).items():
        assert_same_bits(state[[4, 0, 3, 5]], plain[name][[4, 0, 3, 5]])
    for token, slot, start, source in ((70, 2, 0, 4), (0, 1, 0, 4), (80, 6, 75, 0)):
        prefix = clones(before)
        prefix["zxbcdt"] = call["zxbcdt"][start : token + 1]
        index = torch.tensor([source], **INT)
        mamba2_prefill(**prefix, state_indices=index, cu_seqlens=ends([token + 1 - start]), **options)
        for name, state in slots_of(call).items():
            assert_invariant(backend, state[slot], prefix[name][source])


def test_the_past_does_not_see_the_future(backend):
    call, options = mixer((1, 30))
    other, index = clones(call), torch.zeros(1, **INT)
    other["zxbcdt"] = call["zxbcdt"].clone()
    other["zxbcdt"][:, 17:].normal_()
    y = mamba2_prefill(**call, state_indices=index, **options)
    assert_invariant(backend, mamba2_prefill(**other, state_indices=index, **options)[:, :17], y[:, :17])


def test_a_sequence_does_not_see_the_others(backend):
    """Packed beside a NaN sequence and one of a NaN slot: the bits it has alone."""
    call, options = mixer((50,))
    call["zxbcdt"][20:27] = float("nan")
    call["ssm_state"][3] = float("nan")
    before, index = clones(call), torch.tensor([4, 1, 0, 3], **INT)
    y = mamba2_prefill(**call, state_indices=index, cu_seqlens=ends([20, 7, 13, 10]), **options)
    assert y[20:27].isnan().all() and y[40:].isnan().all()
    for a, n, slot in ((0, 20, 4), (27, 13, 0)):
        alone = {**clones(before), "zxbcdt": call["zxbcdt"][a : a + n]}
        where = {"state_indices": torch.tensor([slot], **INT), "cu_seqlens": ends([n])}
        assert_invariant(backend, mamba2_prefill(**alone, **where, **options), y[a : a + n])
        for name, state in slots_of(call).items():
            assert_invariant(backend, state[slot], alone[name][slot])


@pytest.mark.parametrize("which", all_serving("mamba2_prefill", "mamba2_decode"))
@pytest.mark.parametrize("layout", [SMALL, (12, 1, 4, 8), (14, 1, 3, 6)])
def test_prefill_is_as_many_steps(which, layout):
    """40 tokens at once, and in five updates of 8."""
    call, options = mixer((2, 40), layout, slots=2)
    stepped = clones(call)
    with use_backend(which):
        y = mamba2_prefill(**call, state_indices=torch.arange(2, **INT), **options)
        pieces = call["zxbcdt"].split(8, 1)
        steps = [mamba2_decode(**{**stepped, "zxbcdt": piece}, **options) for piece in pieces]
    assert_is_the_mixer(torch.cat(steps, 1), y.double(), torch.float32)
    assert_is_the_state(stepped["ssm_state"], call["ssm_state"].double(), torch.float32)
    assert_same_bits(stepped["conv_state"], call["conv_state"])


def test_any_strides(backend):
    """zxbcdt with its columns outermost, states with the slots innermost: the same bits."""
    call, options = mixer((2, 21))
    turned = {**call, "zxbcdt": call["zxbcdt"].movedim(-1, 0).contiguous().movedim(0, -1)}
    turned |= {name: t.movedim(0, -1).contiguous().movedim(-1, 0) for name, t in slots_of(call).items()}
    index = torch.tensor([2, 0], **INT)
    y = mamba2_prefill(**call, state_indices=index, **options)
    assert_invariant(backend, mamba2_prefill(**turned, state_indices=index, **options), y)
    for name, state in slots_of(call).items():
        assert_invariant(backend, turned[name], state)


def test_long_time_steps(backend):
    """Log decays below -1e4 in the middle: no NaN, no infinity."""
    call, options = mixer((1, 90))
    call["zxbcdt"][:, 30:33, -4:] = 1e3
    call["A"].fill_(-16.0)
    y = mamba2_prefill(**call, state_indices=torch.zeros(1, **INT), **{**options, "dt_max": None})
    assert y.isfinite().all() and call["ssm_state"].isfinite().all()


# ---------------------------------------------------------------- the framework


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("norm", ["none", "default"])
def test_opcheck(packed, norm):
    variant = (4, True, "silu", "channel", True, True, norm, False)
    call, options = mixer((8,) if packed else (2, 4), (2, 1, 4, 3), variant=variant)
    index, fresh = torch.tensor([0, 2], device=DEVICE), torch.tensor([True, False], device=DEVICE)
    states, rest = list(call.values())[:5], list(call.values())[5:]
    kept = (torch.tensor([1, 7], **INT), torch.tensor([3, 1], **INT))
    args = (*states, index, *rest, fresh, ends([3, 5]) if packed else None, *kept)
    torch.library.opcheck(torch.ops.n3.mamba2_prefill.default, args, {**options, "chunk_size": 4})


@pytest.mark.parametrize("dynamic", [False, True])
@torch._dynamo.config.patch(error_on_recompile=True)
def test_compiles_without_a_break(dynamic):
    def step(call, index):
        return mamba2_prefill(**call, state_indices=index).sin()

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for length in (21, 33) if dynamic else (21,):
        call, _ = mixer((3, length), (6, 3, 7, 16))
        other, index = clones(call), torch.tensor([4, 0, 2], device=DEVICE)
        torch.testing.assert_close(compiled(other, index), step(call, index))
        for name, state in slots_of(call).items():
            assert_same_bits(other[name], state)


def test_float64_is_kept():
    call, options = mixer((1, 9))
    call = {name: None if t is None else t.double() for name, t in call.items()}
    conv, ssm = call["conv_state"][0].clone(), call["ssm_state"][0].clone()
    with use_backend("reference"):
        y = mamba2_prefill(**call, state_indices=torch.zeros(1, **INT), **options)
    truth, after = definition(call, options, call["zxbcdt"][0], conv, ssm)
    torch.testing.assert_close(y[0], truth, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(call["ssm_state"][0], after, rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------- bad calls

GOOD = {**GOOD_MIXER, "state_indices": torch.zeros(2, dtype=torch.int32)}
BAD = BAD_MIXER + [
    ({"zxbcdt": torch.zeros(5, 102)}, "zxbcdt must have 3 dimensions without cu_seqlens, got 2"),
    ({"cu_seqlens": torch.zeros(3).int()}, "zxbcdt must have 2 dimensions with cu_seqlens, got 3"),
    ({"zxbcdt": torch.zeros(5, 102), "cu_seqlens": torch.zeros(3)}, "cu_seqlens must be int32, got float32"),
    ({"ssm_state": torch.zeros(3, 6, 4, 8).to(torch.int8)}, "ssm_state must be float32, float16 or bfloat16, got int8"),
    ({"state_indices": torch.zeros(3).int()}, "state_indices must have shape [2], got [3]"),
    ({"state_indices": torch.zeros(2)}, "state_indices must be int32 or int64, got float32"),
    ({"has_initial": torch.zeros(3, dtype=torch.bool)}, "has_initial must have shape [2], got [3]"),
    ({"has_initial": torch.zeros(2)}, "has_initial must be bool, got float32"),
    ({"checkpoint_tokens": torch.zeros(1).int()},
     "checkpoint_indices must be given with checkpoint_tokens, got None"),
    ({"checkpoint_tokens": torch.zeros(1).int(), "checkpoint_indices": torch.zeros(2).int()},
     "checkpoint_indices must have shape [1], got [2]"),
    ({"chunk_size": 0}, "chunk_size must be at least 1, got 0"),
]  # fmt: skip
PACKED = {"zxbcdt": torch.zeros(10, 102)}
BAD_VALUES = [
    ({"state_indices": torch.tensor([0, 3])}, "state_indices must be below the number of slots 3, got 3"),
    ({"checkpoint_tokens": torch.tensor([10]).int(), "checkpoint_indices": torch.tensor([1])},
     "checkpoint_tokens must be between 0 and 9, got 10"),
    ({"checkpoint_tokens": torch.tensor([9]).int(), "checkpoint_indices": torch.tensor([3])},
     "checkpoint_indices must be below the number of slots 3, got 3"),
    ({**PACKED, "cu_seqlens": torch.tensor([0, 7, 11]).int()},
     "cu_seqlens must rise from 0 to at most the 10 tokens of zxbcdt, got [0, 7, 11]"),
]  # fmt: skip


def message_of(op, call):
    call = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in call.items()}
    before = {name: call[name].clone() for name in ("conv_state", "ssm_state")}
    with pytest.raises(RuntimeError) as error:
        op(**call)
    for name, state in before.items():  # nothing is written
        assert_same_bits(call[name], state)
    return str(error.value)


@pytest.mark.parametrize("change, message", BAD)
def test_bad_calls(backend, change, message):
    assert message_of(mamba2_prefill, {**GOOD, **change}) == f"n3::mamba2_prefill: {message}"


@pytest.mark.parametrize("change, message", BAD_VALUES)
@pytest.mark.parametrize("which", checking(*OPS))
def test_bad_values(which, change, message):
    """Where reading a value costs no synchronisation it is checked."""
    with use_backend(which):
        assert message_of(mamba2_prefill, {**GOOD, **change}) == f"n3::mamba2_prefill: {message}"
