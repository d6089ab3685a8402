"""ssd_scan over several chunks of its kernels: where chunks meet, where a sequence ends in one, and heads of any size.

The other tests of the scan have short sequences, as any length has the same definition; kernels work in chunks of 64.
"""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICE, assert_invariant, assert_same_bits
from ssd_problems import PLAIN, rms_error, states, widened
from ssd_problems import operands as fast_operands

from n3kernels.mamba import reference, ssd_scan, ssd_scan_slots

OPS = ("ssd_scan", "ssd_scan.slots", "ssd_scan_bwd")
PER_TOKEN = ("x", "dt", "B", "C", "z")
LAYOUT = (2, 1, 5, 7)  # heads, groups, head_dim, d_state
LENGTHS = [64, 0, 130, 65, 1, 0]


def layout_of(backend):
    """Odd sizes, or those that tensor cores take."""
    return (2, 1, 8, 16) if backend == "cuda" else LAYOUT


def operands(*args):
    """Heads that still know the chunk before the last one: of the first tokens of 64 the others forget all."""
    call, options = fast_operands(*args)
    call["A"].mul_(0.02)
    return call, options


def ends(lengths):
    return torch.tensor([0, *lengths], device=DEVICE).cumsum(0).to(torch.int32)


def tokens_of(call, where):
    return {name: t if t is None or name not in PER_TOKEN else t[where] for name, t in call.items()}


def pack(behind=3, dtype=torch.float32, layout=LAYOUT, lengths=LENGTHS):
    """Packed sequences with NaN behind the last one."""
    total = sum(lengths)
    call, options = operands((total + behind,), layout, dtype)
    for name in PER_TOKEN:
        call[name][total:] = float("nan")
    return call, options, states(len(lengths), layout)


@pytest.mark.parametrize("lengths, behind", [(LENGTHS, 3), (LENGTHS, 0), ([1, 1, 65], 1), ([], 65)])
@pytest.mark.op("ssd_scan")
def test_packed_sequences_of_several_chunks(backend, lengths, behind):
    """The third needs as many chunks as so many tokens can."""
    call, options, initial = pack(behind, lengths=lengths)
    y, final = ssd_scan(**call, initial_states=initial, cu_seqlens=ends(lengths), **options)
    assert y[sum(lengths) :].count_nonzero() == 0
    for s, (a, n) in enumerate(zip(ends(lengths).tolist(), lengths, strict=False)):
        one, before = tokens_of(call, (None, slice(a, a + n))), initial[s : s + 1]
        y_one, final_one = ssd_scan(**one, initial_states=before, **options)
        assert_invariant(backend, y[a : a + n], y_one[0])
        assert_invariant(backend, final[s], final_one[0])
        true_y, true_final = reference.ssd_scan(**widened(one), initial_states=before.double(), **options)
        if n:
            assert rms_error(y_one, true_y, (1, 3)) < 1e-5
        assert rms_error(final_one, true_final, (2, 3)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.op("ssd_scan")
def test_a_cut_at_a_multiple_of_64_changes_no_bits(backend, dtype):
    call, options = operands((1, 150), layout_of(backend), dtype)
    y, final = ssd_scan(**call, **options)
    for cut in (64, 128):
        y_head, between = ssd_scan(**tokens_of(call, (slice(None), slice(0, cut))), **options)
        y_tail, end = ssd_scan(**tokens_of(call, (slice(None), slice(cut, None))), initial_states=between, **options)
        assert_invariant(backend, torch.cat([y_head, y_tail], 1), y)
        assert_invariant(backend, end, final)


@pytest.mark.parametrize("layout", [(64, 8, 64, 128), (96, 8, 80, 128), (64, 8, 64, 96)], ids=str)
@pytest.mark.op("ssd_scan")
def test_heads_among_many_have_the_bits_of_heads_alone(backend, layout):
    """More chunks than stages, more heads than multiprocessors: a block goes on to the next ones, two at a time."""
    batch, length = 9, 330
    if DEVICE == "cpu":
        batch, length, layout = 2, 130, (4, 2, 8, 16)
    heads, groups, *_ = layout
    call, options = operands((batch, length), layout, torch.bfloat16)
    initial = states(batch, layout)
    y, final = ssd_scan(**call, initial_states=initial, **options)
    for b, g in ((0, 0), (batch // 2, groups // 2), (batch - 1, groups - 1)):
        h = slice(g * heads // groups, (g + 1) * heads // groups)
        part = {name: call[name][b : b + 1, :, h] for name in ("x", "dt", "z")}
        part |= {name: call[name][h] for name in ("A", "D", "dt_bias")}
        part |= {name: call[name][b : b + 1, :, g : g + 1] for name in ("B", "C")}
        y_one, final_one = ssd_scan(**part, initial_states=initial[b : b + 1, h], **options)
        assert_invariant(backend, y[b : b + 1, :, h], y_one)
        assert_invariant(backend, final[b : b + 1, h], final_one)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.op("ssd_scan.slots")
def test_checkpoints_of_several_chunks(backend, dtype, packed):
    """At the first and last token of a chunk, in the middle, of a padding sequence and behind the last sequence."""
    lengths = LENGTHS if packed else [130, 130, 130]
    layout = layout_of(backend)
    call, options, _ = pack(3 if packed else 0, dtype, layout, lengths)
    begin, total, count = ends(lengths).tolist(), sum(lengths), len(lengths)
    tokens = [0, 63, begin[2] + 64, begin[2] + 127, begin[2] + 129, total - 1, total - 66]
    tokens += [total + 1] if packed else [131]
    slots = list(range(count + 2, count + 2 + len(tokens)))
    slots[1] = -1
    state = states(count + 2 + len(tokens), layout)
    indices = torch.arange(1, count + 1, device=DEVICE)
    indices[-3] = -1
    has_initial = torch.tensor([True] + [False] * (count - 1), device=DEVICE)

    def run(state, **kept):
        shaped = call if packed else {n: t.unflatten(0, (3, 130)) if n in PER_TOKEN else t for n, t in call.items()}
        cu_seqlens = ends(lengths) if packed else None
        y = ssd_scan_slots(
            **shaped,
            state=state,
            state_indices=indices,
            has_initial=has_initial,
            cu_seqlens=cu_seqlens,
            **kept,
            **options,
        )
        return y.reshape(call["x"].shape)

    before, plain = state.clone(), state.clone()
    y = run(
        state,
        checkpoint_tokens=torch.tensor(tokens, dtype=torch.int32, device=DEVICE),
        checkpoint_indices=torch.tensor(slots, device=DEVICE),
    )
    assert_same_bits(y, run(plain))
    assert_same_bits(state[: count + 2], plain[: count + 2])
    for token, slot in zip(tokens, slots, strict=True):
        s = sum(e <= token for e in begin[1:])
        if slot < 0:
            continue
        if s >= count or indices[s] < 0:
            assert_same_bits(state[slot], before[slot])
            continue
        prefix = tokens_of(call, (None, slice(begin[s], token + 1)))
        initial = before[indices[s]][None] if has_initial[s] else None
        _, final = ssd_scan(**prefix, initial_states=initial, **options)
        assert_invariant(backend, state[slot], final[0])


@pytest.mark.parametrize("layout", [LAYOUT, (1, 1, 80, 40)])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.op("ssd_scan_bwd")
def test_gradients_of_several_chunks(backend, layout, packed):
    """Against float64 autograd; padding behind the last sequence has none."""
    variant = PLAIN if packed else ("channel", True, True, True, (0.05, 0.9))
    lengths = [70, 0, 130] if packed else [100, 100]
    total = sum(lengths)
    call, options = operands((total + 3,) if packed else (2, 100), layout, torch.float32, variant)
    cu_seqlens, initial = ends(lengths) if packed else None, states(len(lengths), layout)
    grad_y, grad_final = torch.randn_like(call["x"]), states(len(lengths), layout)
    settings = (64, options["dt_softplus"], options["dt_min"], options["dt_max"])
    grads = torch.ops.n3.ssd_scan_bwd.default(grad_y, grad_final, *call.values(), initial, cu_seqlens, *settings)
    leaves = {n: t.requires_grad_() for n, t in widened({**call, "initial_states": initial}).items()}
    y, final = reference.ssd_scan(**leaves, cu_seqlens=cu_seqlens, **options)
    truth = torch.autograd.grad((y * grad_y).sum() + (final * grad_final).sum(), list(leaves.values()))
    for name, grad, want in zip(leaves, grads, truth, strict=True):
        error = (grad.double() - want).norm() / want.norm()
        assert error < 1e-5, f"gradient of {name} is off by {error:.2g}"
        if packed and name in PER_TOKEN:
            assert grad[total:].count_nonzero() == 0


@pytest.mark.parametrize("dtype, bound", [(torch.float16, 2e-3), (torch.bfloat16, 1e-2)])
@pytest.mark.op("ssd_scan_bwd")
def test_gradients_from_16_bits(backend, dtype, bound):
    call, options = operands((1, 70), (4, 2, 16, 16), dtype)
    initial, grad_y = states(1, (4, 2, 16, 16)), torch.randn_like(call["x"])
    settings = (64, options["dt_softplus"], options["dt_min"], options["dt_max"])
    args = (grad_y, None, *call.values(), initial, None, *settings)
    grads, again = (torch.ops.n3.ssd_scan_bwd.default(*args) for _ in range(2))
    leaves = {n: t.requires_grad_() for n, t in widened({**call, "initial_states": initial}).items()}
    y, _ = reference.ssd_scan(**leaves, **options)
    truth = torch.autograd.grad((y * grad_y).sum(), list(leaves.values()))
    for name, grad, same, want in zip(leaves, grads, again, truth, strict=True):
        assert_same_bits(grad, same)
        error = (grad.double() - want).norm() / want.norm()
        assert error < bound, f"gradient of {name} is off by {error:.2g}"
