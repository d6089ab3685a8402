"""Prefills on slots: states kept inside a prompt, prompts in pieces, and the decoding that goes on from them."""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICE, assert_close_to, assert_invariant, assert_same_bits, backends_here, fenced
from hypothesis import strategies as st
from properties import all_serving, checking, examples
from ssd_problems import dtypes, layouts, magnitude, operands, recurrence, states

from n3kernels import use_backend
from n3kernels.mamba import causal_conv1d_slots, causal_conv1d_update_slots, ssd_scan_slots, ssm_update

OPS = ("causal_conv1d.slots", "ssd_scan.slots")
INT = {"dtype": torch.int32, "device": DEVICE}
SMALL = (4, 2, 8, 16)  # heads, groups, head_dim, d_state
PER_TOKEN = ("x", "dt", "B", "C", "z")

lengths_of_packs = st.lists(st.sampled_from([0, 1, 2, 5, 17, 33]), min_size=1, max_size=4)


def tokens_of(call, where):
    return {name: t if t is None or name not in PER_TOKEN else t[where] for name, t in call.items()}


def ends(lengths):
    return torch.tensor([0, *lengths], device=DEVICE).cumsum(0).to(torch.int32)


def owner(lengths, token):
    """The sequence a packed token belongs to and its number there; the number of sequences if it is behind the last."""
    for s, n in enumerate(lengths):
        if token < n:
            return s, token
        token -= n
    return len(lengths), token


def draw_slots(rnd, lengths, behind):
    """Slots of the sequences, one of them maybe padding; tokens to keep, one maybe not written, and their slots."""
    count, total = len(lengths), sum(lengths) + behind
    picks = [rnd.randrange(total) for _ in range(min(3, total))] + ([total - 1] if total else [])
    free = rnd.sample(range(count + len(picks) + 2), count + len(picks))
    slots, kept = free[:count], free[count:]
    if rnd.random() < 0.3:
        slots[rnd.randrange(count)] = -1
    if kept and rnd.random() < 0.3:
        kept[0] = -1
    return slots, picks, kept


# ---------------------------------------------------------------- causal convolution


@examples(lengths_of_packs, st.integers(1, 5), st.integers(0, 3), st.booleans(), st.randoms())
@pytest.mark.op("causal_conv1d.slots")
def test_convolution(backend, lengths, width, more, packed, rnd):
    """The last K inputs after every token asked for, in states longer than the taps too; outputs do not change."""
    if not packed:
        lengths = [max(lengths)] * len(lengths)
    behind, past = rnd.randrange(3) if packed else 0, width - 1 + more
    channels, total = 17, sum(lengths) + behind
    x = fenced(torch.randn(total, channels + 5, device=DEVICE))[:, 2 : 2 + channels]
    weight, bias = torch.randn(channels, width, device=DEVICE), torch.randn(channels, device=DEVICE)
    slots, picks, kept = draw_slots(rnd, lengths, behind)
    state = fenced(torch.randn(len(slots) + len(kept) + 2, channels, past, device=DEVICE))
    fresh = [rnd.random() < 0.4 for _ in slots]
    before = state.clone()
    args = (torch.tensor(slots, device=DEVICE), torch.tensor([not f for f in fresh], device=DEVICE))
    shaped, cu_seqlens = (x, ends(lengths)) if packed else (x.unflatten(0, (len(lengths), -1)), None)
    where = (torch.tensor(picks, **INT), torch.tensor(kept, **INT))
    y = causal_conv1d_slots(shaped, weight, bias, state, *args, cu_seqlens, *where, activation="silu")
    other = before.clone()
    assert_same_bits(y, causal_conv1d_slots(shaped, weight, bias, other, *args, cu_seqlens, activation="silu"))
    expected = other
    start = [0, *ends(lengths).tolist()[1:]]
    for token, slot in zip(picks, kept, strict=True):
        s, t = owner(lengths, token)
        if slot >= 0 and s < len(lengths) and slots[s] >= 0:
            initial = torch.zeros_like(before[0]) if fresh[s] else before[slots[s]]
            said = torch.cat([initial, x[start[s] : start[s] + t + 1].T], 1)
            expected[slot] = said[:, said.shape[1] - past :]
    assert_same_bits(state, expected)


@pytest.mark.op("causal_conv1d.slots")
def test_a_longer_state_is_read_at_its_end(backend):
    x, weight = torch.randn(1, 3, 6, device=DEVICE), torch.randn(6, 3, device=DEVICE)
    short, long = torch.randn(2, 6, 2, device=DEVICE), torch.full((2, 6, 5), float("nan"), device=DEVICE)
    long[:, :, 3:] = short
    index = torch.tensor([1], device=DEVICE)
    assert_invariant(
        backend, causal_conv1d_slots(x, weight, None, long, index), causal_conv1d_slots(x, weight, None, short, index)
    )
    assert_same_bits(long[1, :, 3:], short[1])
    assert_same_bits(long[1, :, 2], x[0, 0])


# ---------------------------------------------------------------- scan


def scan(call, options, state, indices, has_initial=None, cu_seqlens=None, tokens=None, slots=None):
    kept = {}
    if tokens is not None:
        kept["checkpoint_tokens"] = torch.tensor(tokens, **INT)
        kept["checkpoint_indices"] = torch.tensor(slots, dtype=torch.int64, device=DEVICE)
    return ssd_scan_slots(
        **call, **options, state=state, state_indices=torch.tensor(indices, **INT), has_initial=has_initial,
        cu_seqlens=cu_seqlens, **kept,
    )  # fmt: skip


@examples(lengths_of_packs, layouts, dtypes, dtypes, st.randoms())
@pytest.mark.op("ssd_scan.slots")
def test_scan(backend, lengths, layout, dtype, state_dtype, rnd):
    """The bits of a run that ends there, at any token; outputs and final states do not change."""
    behind = rnd.randrange(3)
    call, options = operands((sum(lengths) + behind,), layout, dtype)
    slots, picks, kept = draw_slots(rnd, lengths, behind)
    state = states(len(slots) + len(kept) + 2, layout, state_dtype)
    has_initial = torch.tensor([rnd.random() < 0.6 for _ in slots], device=DEVICE)
    before, expected = state.clone(), state.clone()
    y = scan(call, options, state, slots, has_initial, ends(lengths), picks, kept)
    assert_same_bits(y, scan(call, options, expected, slots, has_initial, ends(lengths)))
    start, finals = ends(lengths).tolist(), expected.clone()
    for token, slot in zip(picks, kept, strict=True):
        s, t = owner(lengths, token)
        if slot >= 0 and s < len(lengths) and slots[s] >= 0:
            alone = before[slots[s]][None].clone()
            prefix = tokens_of(call, slice(start[s], start[s] + t + 1))
            scan(prefix, options, alone, [0], has_initial[s : s + 1], ends([t + 1]))
            assert_invariant(backend, state[slot], alone[0])
            expected[slot] = state[slot]
    assert_same_bits(state, expected)
    others = [s for s in range(len(state)) if s not in kept]
    assert_same_bits(state[others], finals[others])


@pytest.mark.op("ssd_scan.slots")
def test_checkpoints_of_a_batch(backend):
    """Token t of sequence b is number b L + t; the slot that one sequence reads may be another's checkpoint."""
    call, options = operands((3, 70), SMALL)
    state = states(6, SMALL)
    before = state.clone()
    call["x"][1] = float("nan")
    scan(call, options, state, [1, -1, 4], None, None, [66, 80, 140, 69 + 140, 63], [5, 3, 0, 2, -1])
    for b, t, slot, initial in ((0, 66, 5, 1), (0, 69, 1, 1), (2, 0, 0, 4), (2, 69, 2, 4), (2, 69, 4, 4)):
        part = tokens_of(call, (slice(b, b + 1), slice(0, t + 1)))
        initial = before[initial][None]
        (_, truth), (_, size) = recurrence(part, options, initial), magnitude(part, options, initial)
        assert_close_to(state[slot], truth[0], 1e-5, size[0])
    assert_invariant(backend, state[2], state[4])
    assert_same_bits(state[3], before[3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pieces", [(64, 66), (64, 64, 2), (128, 2)])
@pytest.mark.op("ssd_scan.slots")
def test_pieces_at_multiples_of_64_have_the_bits_of_one(backend, dtype, pieces):
    call, options = operands((130,), SMALL, dtype)
    whole, split = (states(2, SMALL).zero_() for _ in range(2))
    fresh = torch.tensor([False], device=DEVICE)
    y = scan(call, options, whole, [1], fresh, ends([130]))
    parts, start = [], 0
    for length in pieces:
        piece = tokens_of(call, slice(start, start + length))
        parts.append(scan(piece, options, split, [1], torch.tensor([start > 0], device=DEVICE), ends([length])))
        start += length
    assert_invariant(backend, torch.cat(parts), y)
    assert_invariant(backend, split, whole)


@pytest.mark.op("ssd_scan.slots")
def test_nothing_of_the_padding_is_read(backend):
    """NaN in a padding sequence, behind the last one and in slots of others; the packed neighbours keep their bits."""
    lengths = [19, 5, 0, 33]
    call, options = operands((60,), SMALL)
    state, clean = states(5, SMALL), None
    results = []
    for poison in (0.0, float("nan")):
        for name in PER_TOKEN:
            call[name][19:24], call[name][57:] = poison, poison
        clean = state.clone()
        clean[[0, 3]] = poison
        y = scan(call, options, clean, [4, -1, 2, 1], None, ends(lengths), [20, 58, 30], [0, 3, -1])
        assert y[19:24].count_nonzero() == 0 and y[57:].count_nonzero() == 0
        results.append((y, clean[[1, 2, 4]]))
        assert_same_bits(clean[2], state[2])
    for got, want in zip(results[1], results[0], strict=True):
        assert_same_bits(got, want)


# ---------------------------------------------------------------- prompts and decoding


@pytest.mark.parametrize("which", all_serving("ssd_scan.slots", "ssm_update"))
@pytest.mark.parametrize("layout", [SMALL, (12, 1, 4, 8), (14, 1, 3, 6)])
def test_a_scan_is_as_many_updates(which, layout):
    """40 tokens at once, and in five updates of 8."""
    call, options = operands((2, 40), layout)
    scanned, stepped = (states(2, layout).zero_() for _ in range(2))
    with use_backend(which):
        y = scan(call, options, scanned, [0, 1])
        pieces = [tokens_of(call, (slice(None), slice(t, t + 8))) for t in range(0, 40, 8)]
        steps = [ssm_update(stepped, **piece, **options) for piece in pieces]
    y_size, size = magnitude(call, options)
    assert ((y - torch.cat(steps, 1)).abs() <= 2e-5 * y_size + 1e-6).all()
    assert ((scanned - stepped).abs() <= 2e-5 * size + 1e-6).all()


@pytest.mark.parametrize("which", all_serving("causal_conv1d.slots", "causal_conv1d_update"))
@pytest.mark.parametrize("use", ["shift", "window", "ring"])
def test_a_convolution_is_as_many_updates(which, use):
    """A prompt of 11 tokens, then 9 in updates of 3: the 20 at once. A window goes on from what a prefill leaves."""
    x, weight = torch.randn(2, 20, 9, device=DEVICE), torch.randn(9, 4, device=DEVICE)
    state = torch.zeros(2, 9, 5, device=DEVICE)
    index, whole = torch.arange(2, device=DEVICE), state.clone()
    with use_backend(which):
        want = causal_conv1d_slots(x, weight, None, whole, index, activation="silu")
        got = [causal_conv1d_slots(x[:, :11], weight, None, state, index, activation="silu")]
        if use == "ring":  # the last inputs 6...10 into columns 1, 2, 3, 4, 0
            state = state.roll(1, -1).contiguous()
        for start in (11, 14, 17):
            options = {"shift": {}, "window": {"num_accepted": 3}, "ring": {"cache_seqlens": start}}[use]
            options = {name: torch.full((2,), value, **INT) for name, value in options.items()}
            got.append(causal_conv1d_update_slots(x[:, start : start + 3], state, weight, activation="silu", **options))
    assert_invariant(which, torch.cat(got, 1), want)
    assert_same_bits(state, whole)  # after 20 inputs column 0 of the ring is the oldest again


# ---------------------------------------------------------------- the framework


@pytest.mark.parametrize("packed", [False, True])
def test_opcheck(packed):
    index = torch.tensor([0, 2], device=DEVICE)
    kept = (torch.tensor([1, 7], **INT), torch.tensor([3, 1], **INT))
    cu_seqlens = ends([3, 5]) if packed else None
    x, weight = torch.randn(*((8,) if packed else (2, 4)), 6, device=DEVICE), torch.randn(6, 4, device=DEVICE)
    args = (x, weight, None, torch.randn(4, 6, 5, device=DEVICE), index, None, cu_seqlens, *kept)
    torch.library.opcheck(torch.ops.n3.causal_conv1d.slots, args, {"activation": "silu"})
    call, options = operands((8,) if packed else (2, 4), (2, 1, 4, 3))
    args = (*call.values(), states(4, (2, 1, 4, 3)), index, None, cu_seqlens, *kept)
    torch.library.opcheck(torch.ops.n3.ssd_scan.slots, args, {**options, "chunk_size": 4})


# ---------------------------------------------------------------- bad calls

INTS = torch.zeros(2, dtype=torch.int32)
BAD = [
    ({"checkpoint_indices": INTS}, "checkpoint_tokens must be given with checkpoint_indices, got None"),
    ({"checkpoint_tokens": INTS}, "checkpoint_indices must be given with checkpoint_tokens, got None"),
    ({"checkpoint_tokens": INTS[None], "checkpoint_indices": INTS}, "checkpoint_tokens must have 1 dimensions, got 2"),
    ({"checkpoint_tokens": INTS.long(), "checkpoint_indices": INTS}, "checkpoint_tokens must be int32, got int64"),
    ({"checkpoint_tokens": INTS, "checkpoint_indices": INTS[:1]}, "checkpoint_indices must have shape [2], got [1]"),
    ({"checkpoint_tokens": INTS, "checkpoint_indices": INTS.float()},
     "checkpoint_indices must be int32 or int64, got float32"),
]  # fmt: skip
BAD_VALUES = [
    ({"checkpoint_tokens": torch.tensor([0, 10]).int(), "checkpoint_indices": INTS},
     "checkpoint_tokens must be between 0 and 9, got 10"),
    ({"checkpoint_tokens": torch.tensor([-1, 0]).int(), "checkpoint_indices": INTS - 1},
     "checkpoint_tokens must be between 0 and 9, got -1"),
    ({"checkpoint_tokens": INTS, "checkpoint_indices": torch.tensor([3, 0])},
     "checkpoint_indices must be below the number of slots 3, got 3"),
]  # fmt: skip
CONV = {"x": torch.zeros(2, 5, 6), "weight": torch.zeros(6, 4), "bias": None, "conv_state": torch.ones(3, 6, 3)}
SCAN = {
    "x": torch.zeros(2, 5, 6, 4), "dt": torch.zeros(2, 5, 6), "A": torch.zeros(6), "B": torch.zeros(2, 5, 3, 8),
    "C": torch.zeros(2, 5, 3, 8), "D": None, "z": None, "dt_bias": None, "state": torch.ones(3, 6, 4, 8),
}  # fmt: skip


def message_of(op, call, change):
    call = {**call, "state_indices": INTS, **change}
    call = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in call.items()}
    state = call["state"] if "state" in call else call["conv_state"]
    before = state.clone()
    with pytest.raises(RuntimeError) as error:
        op(**call)
    assert_same_bits(state, before)  # nothing is written
    return str(error.value)


@pytest.mark.parametrize("change, message", BAD)
@pytest.mark.op("causal_conv1d.slots")
def test_bad_calls_of_the_convolution(backend, change, message):
    assert message_of(causal_conv1d_slots, CONV, change) == f"n3::causal_conv1d: {message}"


@pytest.mark.parametrize("change, message", BAD)
@pytest.mark.op("ssd_scan.slots")
def test_bad_calls_of_the_scan(backend, change, message):
    assert message_of(ssd_scan_slots, SCAN, change) == f"n3::ssd_scan: {message}"


@pytest.mark.parametrize("change, message", BAD_VALUES)
@pytest.mark.parametrize("which", checking(*OPS))
def test_bad_values(which, change, message):
    """Where reading a value costs no synchronisation it is checked."""
    for op, name, call in ((causal_conv1d_slots, "causal_conv1d", CONV), (ssd_scan_slots, "ssd_scan", SCAN)):
        if which in backends_here([f"{name}.slots"]):
            with use_backend(which):
                assert message_of(op, call, change) == f"n3::{name}: {message}"
