from __future__ import annotations

import pytest
import torch
from conftest import DEVICE, assert_close_to, assert_invariant, assert_same_bits
from hypothesis import given
from hypothesis import strategies as st
from properties import checking, examples
from ssd_problems import (
    PLAIN,
    PUBLISHED,
    dtypes,
    layouts,
    magnitude,
    operands,
    recurrence,
    rms_error,
    states,
    variants,
    widened,
)

from n3kernels import use_backend
from n3kernels.mamba import reference, ssd_scan, ssd_scan_slots

OPS = ("ssd_scan", "ssd_scan.slots", "ssd_scan_bwd")
SMALL = (4, 2, 8, 16)  # heads, groups, head_dim, d_state
PER_TOKEN = ("x", "dt", "B", "C", "z")

# batch and length, 0 included; layout; dtype; options; initial states; chunk size
problems = st.tuples(
    st.integers(0, 2), st.integers(0, 40), layouts, dtypes, variants, st.booleans(), st.sampled_from([1, 3, 16, 64])
)  # fmt: skip
sequences = st.lists(st.sampled_from([0, 1, 2, 5, 17, 33]), min_size=0, max_size=4)

BARE = ("none", False, False, False, (0.0, None))  # no D, gate, bias or softplus


def accuracy(backend, dtype):
    """Kernels that feed tensor cores round their operands to the inputs' 16 bits; the others sum in float32."""
    return 1e-5 if backend in ("reference", "cpu") or dtype == torch.float32 else 4e-3


def ends(lengths):
    return torch.tensor([0, *lengths], device=DEVICE).cumsum(0).to(torch.int32)


def tokens_of(call, where):
    """The call on some of its tokens: `where` indexes the leading dimensions."""
    return {name: t if t is None or name not in PER_TOKEN else t[where] for name, t in call.items()}


# ---------------------------------------------------------------- the definition


@examples(problems)
@pytest.mark.op("ssd_scan")
def test_agrees_with_the_recurrence(backend, problem):
    batch, length, layout, dtype, variant, has_initial, chunk_size = problem
    call, options = operands((batch, length), layout, dtype, variant)
    initial = states(batch, layout) if has_initial else None
    y, final = ssd_scan(**call, initial_states=initial, chunk_size=chunk_size, **options)
    (true_y, true_final), (y_size, final_size) = (f(call, options, initial) for f in (recurrence, magnitude))
    acc = accuracy(backend, dtype)
    assert y.dtype == dtype and final.dtype == torch.float32 and y.is_contiguous() and final.is_contiguous()
    assert_close_to(y, true_y, acc, y_size)
    assert_close_to(final, true_final, acc, final_size)


@given(problems)
def test_the_chunked_reference_is_the_recurrence(problem):
    """In float64, whatever the chunk: the definition that the kernels are held to is the recurrence itself."""
    batch, length, layout, _, variant, has_initial, chunk_size = problem
    call, options = operands((batch, length), layout, torch.float32, variant)
    initial = states(batch, layout).double() if has_initial else None
    out = reference.ssd_scan(**widened(call), initial_states=initial, chunk_size=chunk_size, **options)
    torch.testing.assert_close(out, recurrence(call, options, initial), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", PUBLISHED.values(), ids=PUBLISHED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.op("ssd_scan")
def test_published_shapes(backend, layout, dtype):
    if backend == "triton" and DEVICE == "cpu":
        layout = (2, 1, *layout[2:])  # its interpreter takes a second for a few heads
    call, options = operands((1, 150), layout, dtype)
    initial = states(1, layout)
    y, final = ssd_scan(**call, initial_states=initial, **options)
    true_y, true_final = reference.ssd_scan(**widened(call), initial_states=initial.double(), **options)
    assert rms_error(y, true_y, (1, 3)) < (1e-5 if dtype == torch.float32 else 4e-3)
    assert rms_error(final, true_final, (2, 3)) < (1e-5 if dtype == torch.float32 else 3e-3)


# ---------------------------------------------------------------- invariants


@examples(layouts, dtypes, st.integers(1, 40), st.integers(1, 50))
@pytest.mark.op("ssd_scan")
def test_chunk_size_is_a_hint(backend, layout, dtype, length, chunk_size):
    call, options = operands((2, length), layout, dtype)
    y, final = ssd_scan(**call, **options, chunk_size=chunk_size)
    other_y, other_final = ssd_scan(**call, **options)
    y_size, final_size = magnitude(call, options)
    acc = accuracy(backend, dtype)
    slack = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps * other_y.abs().double()
    assert ((y - other_y).double().abs() <= 2 * acc * (y_size + 1e-3) + slack).all()
    assert ((final - other_final).double().abs() <= 2 * acc * (final_size + 1e-3)).all()


@examples(layouts, st.integers(0, 40), st.integers(0, 40))
@pytest.mark.op("ssd_scan")
def test_pieces_continue_each_other(backend, layout, length, cut):
    """A prompt in two pieces, the state handed over in float32, is the prompt in one."""
    cut = min(cut, length)
    call, options = operands((2, length), layout)
    head, tail = (tokens_of(call, (slice(None), part)) for part in (slice(0, cut), slice(cut, None)))
    y_head, between = ssd_scan(**head, **options)
    y_tail, final = ssd_scan(**tail, initial_states=between, **options)
    (true_y, true_final), (y_size, final_size) = (f(call, options) for f in (recurrence, magnitude))
    assert_close_to(torch.cat([y_head, y_tail], 1), true_y, 2e-5, y_size + 1e-3)
    assert_close_to(final, true_final, 2e-5, final_size + 1e-3)


@examples(sequences, layouts, dtypes, st.integers(0, 3))
@pytest.mark.op("ssd_scan")
def test_a_packed_sequence_is_a_sequence(backend, lengths, layout, dtype, behind):
    """Empty and one-token sequences included; tokens behind the last sequence are padding, here NaN."""
    total = sum(lengths)
    call, options = operands((total + behind,), layout, dtype)
    for name in PER_TOKEN:
        call[name][total:] = float("nan")
    initial = states(len(lengths), layout)
    y, final = ssd_scan(**call, initial_states=initial, cu_seqlens=ends(lengths), **options)
    assert y[total:].count_nonzero() == 0 and not y.isnan().any()
    for s, (a, n) in enumerate(zip(ends(lengths).tolist(), lengths, strict=False)):
        one = tokens_of(call, (None, slice(a, a + n)))
        y_one, final_one = ssd_scan(**one, initial_states=initial[s : s + 1], **options)
        assert_invariant(backend, y[a : a + n], y_one[0])
        assert_invariant(backend, final[s], final_one[0])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.op("ssd_scan")
def test_a_sequence_does_not_see_the_others(backend, packed):
    call, options = operands((3, 21), SMALL)
    for name in PER_TOKEN:
        call[name][1] = float("nan")
    if packed:
        flat = {name: t.flatten(0, 1) if name in PER_TOKEN else t for name, t in call.items()}
        y, final = ssd_scan(**flat, cu_seqlens=ends([21, 21, 21]), **options)
        y = y.unflatten(0, (3, 21))
    else:
        y, final = ssd_scan(**call, **options)
    for s in (0, 2):
        y_one, final_one = ssd_scan(**tokens_of(call, slice(s, s + 1)), **options)
        assert_invariant(backend, y[s], y_one[0])
        assert_invariant(backend, final[s], final_one[0])
    assert y[1].isnan().all() and final[1].isnan().all()


@pytest.mark.parametrize("chunk_size", [4, 64])
@pytest.mark.op("ssd_scan")
def test_the_past_does_not_see_the_future(backend, chunk_size):
    call, options = operands((1, 30), SMALL)
    y, _ = ssd_scan(**call, chunk_size=chunk_size, **options)
    for name in PER_TOKEN:
        call[name][:, 17:] = torch.randn_like(call[name][:, 17:])
    changed, _ = ssd_scan(**call, chunk_size=chunk_size, **options)
    assert_invariant(backend, y[:, :17], changed[:, :17])
    assert (y[:, 17:] != changed[:, 17:]).any()


@pytest.mark.op("ssd_scan")
def test_operands_are_read_in_place(backend):
    """Column slices of one projection and packed copies of them: the same bits."""
    call, options = operands((2, 37), SMALL)
    assert not call["x"].is_contiguous()
    copies = {name: None if t is None else t.contiguous() for name, t in call.items()}
    for strided, packed in zip(ssd_scan(**call, **options), ssd_scan(**copies, **options), strict=True):
        assert_invariant(backend, strided, packed)


# ---------------------------------------------------------------- the time step


@pytest.mark.parametrize("softplus, dt", [(False, 0.0), (True, -300.0)])
@pytest.mark.op("ssd_scan")
def test_no_time_leaves_the_state_alone(backend, softplus, dt):
    call, options = operands((2, 37), SMALL, variant=("none", False, False, softplus, (0.0, None)))
    call["dt"].fill_(dt)
    initial = states(2, SMALL)
    y, final = ssd_scan(**call, initial_states=initial, chunk_size=16, **options)
    assert_same_bits(final, initial)
    assert_close_to(y, recurrence(call, options, initial)[0], 1e-5, magnitude(call, options, initial)[0])


@pytest.mark.parametrize("chunk_size", [8, 128])
@pytest.mark.op("ssd_scan")
def test_long_time_steps(backend, chunk_size):
    """Log decays below -1e4, first, in the middle and throughout: no overflow, and small steps keep their digits."""
    for where in (slice(0, 1), slice(50, 52), slice(None)):
        call, options = operands((1, 100), SMALL, variant=("head", False, False, True, (0.0, None)))
        call["dt"].copy_(torch.randn_like(call["dt"]) - 5)
        call["dt"][:, where] = 1e3
        call["A"].fill_(-16.0)
        out = ssd_scan(**call, chunk_size=chunk_size, **options)
        for part, truth, size in zip(out, recurrence(call, options), magnitude(call, options), strict=True):
            assert part.isfinite().all()
            assert_close_to(part, truth, 1e-5, size)


@pytest.mark.parametrize("dt", [-10.0, -20.0, -80.0, 19.999, 20.001, 1e3])
@pytest.mark.op("ssd_scan")
def test_softplus_keeps_its_digits(backend, dt):
    """log(1 + exp(dt)) in float32 is off by 1e-3 at -10 and is 0 at -20."""
    call, options = operands((1, 1), SMALL, variant=("none", False, False, True, (0.0, None)))
    call["dt"].fill_(dt)
    _, final = ssd_scan(**call, **options)
    torch.testing.assert_close(final.double(), recurrence(call, options)[1], rtol=1e-5, atol=1e-43)
    assert final.count_nonzero() == final.numel()


# ---------------------------------------------------------------- states in slots


@examples(sequences, layouts, dtypes, dtypes, st.randoms())
@pytest.mark.op("ssd_scan.slots")
def test_slots(backend, lengths, layout, dtype, state_dtype, rnd):
    """Padding sequences, fresh ones and slots of others: the state is every second row of a wider cache."""
    count = len(lengths)
    call, options = operands((sum(lengths),), layout, dtype)
    cache = states(2 * (count + 2), layout, state_dtype)
    slots = [rnd.choice([i, -1]) for i in rnd.sample(range(count + 2), count)]
    fresh = [rnd.random() < 0.5 for _ in slots]
    for s, slot in enumerate(slots):
        if fresh[s] and slot >= 0:
            cache[2 * slot] = float("nan")  # what a fresh sequence finds in its slot is not read
    before = cache.clone()
    indices = torch.tensor(slots, dtype=rnd.choice([torch.int32, torch.int64]), device=DEVICE)
    has_initial = torch.tensor([not f for f in fresh], dtype=torch.bool, device=DEVICE)
    y = ssd_scan_slots(
        **call, state=cache[::2], state_indices=indices, has_initial=has_initial, cu_seqlens=ends(lengths), **options
    )
    acc = accuracy(backend, dtype)
    for s, (a, slot, n) in enumerate(zip(ends(lengths).tolist(), slots, lengths, strict=False)):
        if slot < 0:
            assert y[a : a + n].count_nonzero() == 0
            continue
        one = tokens_of(call, (None, slice(a, a + n)))
        initial = None if fresh[s] else before[None, 2 * slot]
        (true_y, true_final), (y_size, final_size) = (f(one, options, initial) for f in (recurrence, magnitude))
        assert_close_to(y[a : a + n], true_y[0], acc, y_size[0])
        assert_close_to(cache[2 * slot], true_final[0], acc, final_size[0])
    others = [row for row in range(len(cache)) if row % 2 or row // 2 not in slots]
    assert_same_bits(cache[others], before[others])


@pytest.mark.op("ssd_scan.slots")
def test_slots_of_a_batch(backend):
    """Without packing, without has_initial; a NaN slot and a NaN padding sequence stay by themselves."""
    call, options = operands((4, 9), SMALL)
    call["x"][1] = float("nan")
    state = states(5, SMALL)
    state[2] = float("nan")
    before = state.clone()
    indices = torch.tensor([4, -1, 2, 0], device=DEVICE)
    y = ssd_scan_slots(**call, state=state, state_indices=indices, **options)
    assert y[1].count_nonzero() == 0 and y[2].isnan().all() and state[2].isnan().all()
    assert_same_bits(state[[1, 3]], before[[1, 3]])
    for s, slot in ((0, 4), (3, 0)):
        true_y, true_final = recurrence(tokens_of(call, slice(s, s + 1)), options, before[None, slot])
        assert_close_to(y[s], true_y[0])
        assert_close_to(state[slot], true_final[0])


# ---------------------------------------------------------------- gradients


def bwd(call, options, initial, cu_seqlens, grad_y, grad_final, chunk_size=16):
    inputs = (*call.values(), initial)
    settings = (chunk_size, options["dt_softplus"], options["dt_min"], options["dt_max"])
    return torch.ops.n3.ssd_scan_bwd.default(grad_y, grad_final, *inputs, cu_seqlens, *settings)


@examples(variants, layouts, st.booleans(), st.booleans(), st.booleans())
@pytest.mark.op("ssd_scan_bwd")
def test_backward(backend, variant, layout, has_initial, has_grad_final, packed):
    """Every combination of optional arguments, ragged lengths, the clamp active; against float64 autograd."""
    lengths = [19, 0, 1, 13]
    call, options = operands((sum(lengths),) if packed else (2, 19), layout, torch.float32, variant)
    cu_seqlens, count = (ends(lengths), 4) if packed else (None, 2)
    initial = states(count, layout) if has_initial else None
    grad_y, grad_final = torch.randn_like(call["x"]), states(count, layout) if has_grad_final else None
    grads = bwd(call, options, initial, cu_seqlens, grad_y, grad_final)
    names = [*call, "initial_states"]
    leaves = widened({**call, "initial_states": initial})
    leaves = {name: None if t is None else t.requires_grad_() for name, t in leaves.items()}
    y, final = reference.ssd_scan(**leaves, cu_seqlens=cu_seqlens, **options)
    loss = (y * grad_y).sum() + (0 if grad_final is None else (final * grad_final).sum())
    wanted = [name for name in names if leaves[name] is not None]
    truth = dict(zip(wanted, torch.autograd.grad(loss, [leaves[n] for n in wanted]), strict=True))
    for name, grad in zip(names, grads, strict=True):
        if name not in truth:
            assert grad.numel() == 0
            continue
        assert grad.shape == leaves[name].shape and grad.dtype == torch.float32 and grad.is_contiguous()
        error = (grad.double() - truth[name]).norm() / (truth[name].norm() + 1e-3)
        assert error < 1e-5, f"gradient of {name} is off by {error:.2g}"


@pytest.mark.parametrize("variant", [PLAIN, BARE, ("channel", True, True, True, (0.1, 0.6))])
@pytest.mark.parametrize("packed", [False, True])
def test_gradcheck(variant, packed):
    call, options = operands((5,) if packed else (1, 5), (4, 2, 2, 3), torch.float32, variant)
    inputs = widened({**call, "initial_states": states(2 if packed else 1, (4, 2, 2, 3))})
    if not options["dt_softplus"]:
        inputs["dt"] = inputs["dt"].abs() + 0.1  # away from the corner of the clamp at 0
    names = [name for name, t in inputs.items() if t is not None]
    cu_seqlens = ends([2, 3]) if packed else None

    def scan(*leaves):
        return ssd_scan(**dict(zip(names, leaves, strict=True)), cu_seqlens=cu_seqlens, chunk_size=2, **options)

    with use_backend("reference"):
        torch.autograd.gradcheck(scan, [inputs[name].contiguous().requires_grad_() for name in names])


@pytest.mark.parametrize("enabled", [False, True])
def test_autocast_changes_no_bits(enabled):
    """Neither the user's autocast nor the one that sleeps in the dispatcher narrows a product, forward or backward."""
    call, options = operands((2, 37), SMALL)
    x = call["x"].detach().clone().requires_grad_()
    with torch.autocast(DEVICE, torch.bfloat16, enabled=enabled):
        y, final = ssd_scan(**{**call, "x": x}, **options)
        (grad,) = torch.autograd.grad(y.sum() + final.sum(), x)
    wide = widened({**call, "x": call["x"].detach()})
    wide["x"].requires_grad_()
    true_y, true_final = reference.ssd_scan(**wide, **options)
    (truth,) = torch.autograd.grad(true_y.sum() + true_final.sum(), wide["x"])
    for out, want in ((y, true_y), (final, true_final), (grad, truth)):
        assert (out.double() - want).norm() < 1e-5 * want.norm()


def test_either_output_alone_can_be_differentiated():
    call, options = operands((2, 9), SMALL, variant=("none", False, False, True, (0.0, None)))
    x = call["x"].detach().clone().requires_grad_()
    y, final = ssd_scan(**{**call, "x": x}, **options)
    (from_y,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    (from_final,) = torch.autograd.grad(final.sum(), x, retain_graph=True)
    (from_both,) = torch.autograd.grad(y.sum() + final.sum(), x)
    torch.testing.assert_close(from_y + from_final, from_both, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- the framework


def positional(call):
    return tuple(call.values())


@pytest.mark.parametrize("case", ["batched", "packed", "plain", "empty", "float64"])
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(case, grad):
    layout, packed = (2, 1, 4, 3), case == "packed"
    variant = ("none", False, False, True, (0.0, None)) if case == "plain" else PLAIN
    call, options = operands((7,) if packed else (2, 0 if case == "empty" else 7), layout, torch.float32, variant)
    call = {k: None if t is None else t.contiguous().requires_grad_(grad) for k, t in call.items()}
    initial = None if case == "plain" else states(2, layout)
    if case == "float64":
        call, initial = widened(call), initial.double()
        call = {k: t.detach().requires_grad_(grad) for k, t in call.items()}
    with use_backend("reference"):
        args = (*positional(call), initial, ends([3, 4]) if packed else None)
        torch.library.opcheck(torch.ops.n3.ssd_scan.default, args, {"chunk_size": 4, **options})


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("full", [False, True])
def test_opcheck_slots_and_backward(packed, full):
    layout, variant = (2, 1, 4, 3), PLAIN if full else ("none", False, False, True, (0.0, None))
    call, options = operands((7,) if packed else (2, 7), layout, torch.float32, variant)
    cu_seqlens = ends([3, 4]) if packed else None
    indices, fresh = torch.tensor([3, 1], device=DEVICE), torch.tensor([True, False], device=DEVICE)
    args = (*positional(call), states(4, layout), indices, fresh if full else None, cu_seqlens)
    torch.library.opcheck(torch.ops.n3.ssd_scan.slots, args, options)
    initial, grad_final = (states(2, layout), states(2, layout)) if full else (None, None)
    settings = (4, options["dt_softplus"], options["dt_min"], options["dt_max"])
    args = (torch.randn_like(call["x"]), grad_final, *positional(call), initial, cu_seqlens, *settings)
    torch.library.opcheck(torch.ops.n3.ssd_scan_bwd.default, args)


@pytest.mark.parametrize("dynamic", [False, True])
@torch._dynamo.config.patch(error_on_recompile=True)
def test_compiles_without_a_break(dynamic):
    """Prefill, slots and backward in one graph; with dynamic shapes one graph serves every length."""

    def step(call, state, indices):
        y, final = ssd_scan(**call)
        z = ssd_scan_slots(**{**call, "x": call["x"].detach()}, state=state, state_indices=indices)
        return y.square().sum() + final.sum(), z

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    layout = (6, 3, 7, 16)
    for length in (9, 11) if dynamic else (9,):  # sizes that agree would be taken to be one
        call, _ = operands((2, length), layout)
        x = call["x"].detach().clone().requires_grad_()
        call, indices = {**call, "x": x}, torch.tensor([2, 0], device=DEVICE)
        cache = states(5, layout)
        outcome = []
        for run in (step, compiled):
            state = cache.clone()
            loss, y = run(call, state, indices)
            outcome.append((loss, y, state, *torch.autograd.grad(loss, x)))
        torch.testing.assert_close(*outcome)


# ---------------------------------------------------------------- bad calls

GOOD = {
    "x": torch.zeros(2, 5, 6, 4), "dt": torch.zeros(2, 5, 6), "A": torch.zeros(6), "B": torch.zeros(2, 5, 3, 8),
    "C": torch.zeros(2, 5, 3, 8), "D": None, "z": None, "dt_bias": None,
}  # fmt: skip
I32 = torch.int32
BAD = [
    ({"x": torch.zeros(5, 6, 4)}, "x must have 4 dimensions without cu_seqlens, got 3"),
    ({"cu_seqlens": torch.zeros(3, dtype=I32)}, "x must have 3 dimensions with cu_seqlens, got 4"),
    ({"x": torch.zeros(2, 5, 6, 4, dtype=torch.int32)}, "x must be float32, float16 or bfloat16, got int32"),
    ({"dt": torch.zeros(2, 5, 7)}, "dt must have shape [2, 5, 6], got [2, 5, 7]"),
    ({"dt": torch.zeros(2, 5, 6, dtype=torch.int64)}, "dt must be float32, float16 or bfloat16, got int64"),
    ({"A": torch.zeros(6, 4)}, "A must have shape [6], got [6, 4]"),
    ({"B": torch.zeros(2, 5, 8)}, "B must have 4 dimensions, got 3"),
    ({"B": torch.zeros(2, 4, 3, 8)}, "B must have shape [2, 5, 3, 8], got [2, 4, 3, 8]"),
    ({"B": torch.zeros(2, 5, 3, 8).half()}, "B must have the dtype of x (float32), got float16"),
    ({"B": torch.zeros(2, 5, 4, 8)}, "groups of B must divide the 6 heads of x, got 4"),
    ({"C": torch.zeros(2, 5, 3, 7)}, "C must have shape [2, 5, 3, 8], got [2, 5, 3, 7]"),
    ({"C": torch.zeros(2, 5, 3, 8).half()}, "C must have the dtype of x (float32), got float16"),
    ({"D": torch.zeros(6, 5)}, "D must have shape [6, 4], got [6, 5]"),
    ({"D": torch.zeros(1, 1, 1)}, "D must have 1 or 2 dimensions, got 3"),
    ({"z": torch.zeros(2, 5, 6, 5)}, "z must have shape [2, 5, 6, 4], got [2, 5, 6, 5]"),
    ({"z": torch.zeros(2, 5, 6, 4).half()}, "z must have the dtype of x (float32), got float16"),
    ({"dt_bias": torch.zeros(5)}, "dt_bias must have shape [6], got [5]"),
    ({"dt_min": 0.5, "dt_max": 0.25}, "dt_max must be at least dt_min (0.5), got 0.25"),
    ({"chunk_size": 0}, "chunk_size must be at least 1, got 0"),
]
BAD_DEFAULT = BAD + [
    ({"initial_states": torch.zeros(2, 6, 4, 7)}, "initial_states must have shape [2, 6, 4, 8], got [2, 6, 4, 7]"),
    ({"initial_states": torch.zeros(2, 6, 4, 8, dtype=torch.int32)},
     "initial_states must be float32, float16 or bfloat16, got int32"),
]  # fmt: skip
BAD_SLOTS = BAD + [
    ({"state": torch.zeros(6, 4, 8)}, "state must have 4 dimensions, got 3"),
    ({"state": torch.zeros(3, 6, 4, 7)}, "state must have shape [3, 6, 4, 8], got [3, 6, 4, 7]"),
    ({"state": torch.zeros(3, 6, 4, 8, dtype=I32)}, "state must be float32, float16 or bfloat16, got int32"),
    ({"state_indices": torch.zeros(3, dtype=I32)}, "state_indices must have shape [2], got [3]"),
    ({"state_indices": torch.zeros(2)}, "state_indices must be int32 or int64, got float32"),
    ({"has_initial": torch.zeros(3, dtype=torch.bool)}, "has_initial must have shape [2], got [3]"),
    ({"has_initial": torch.zeros(2)}, "has_initial must be bool, got float32"),
]
PACKED = {name: t if t is None or name == "A" else t.flatten(0, 1) for name, t in GOOD.items()}
BAD_PACKED = [
    (torch.zeros(3), "cu_seqlens must be int32, got float32"),
    (torch.zeros(3, 1, dtype=I32), "cu_seqlens must have 1 dimensions, got 2"),
    (torch.zeros(0, dtype=I32), "cu_seqlens must have at least 1 element, got 0"),
]
BAD_VALUES = [[1, 10], [0, 7, 3, 10], [0, 11]]


def here(call):
    return {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in call.items()}


def message_of(op, call):
    with pytest.raises(RuntimeError) as error:
        op(**here(call))
    return str(error.value)


@pytest.mark.parametrize("change, message", BAD_DEFAULT)
@pytest.mark.op("ssd_scan")
def test_bad_calls(backend, change, message):
    assert message_of(ssd_scan, {**GOOD, **change}) == f"n3::ssd_scan: {message}"


@pytest.mark.parametrize("change, message", BAD_SLOTS)
@pytest.mark.op("ssd_scan.slots")
def test_bad_calls_on_slots(backend, change, message):
    slots = {"state": torch.zeros(3, 6, 4, 8), "state_indices": torch.zeros(2, dtype=I32)}
    assert message_of(ssd_scan_slots, {**GOOD, **slots, **change}) == f"n3::ssd_scan: {message}"


@pytest.mark.parametrize("cu_seqlens, message", BAD_PACKED)
@pytest.mark.op("ssd_scan")
def test_bad_packing(backend, cu_seqlens, message):
    assert message_of(ssd_scan, {**PACKED, "cu_seqlens": cu_seqlens}) == f"n3::ssd_scan: {message}"


BAD_GRADIENTS = [
    ({"grad_y": torch.zeros(2, 5, 4, 7)}, "grad_y must have shape [2, 5, 4, 8], got [2, 5, 4, 7]"),
    ({"grad_y": torch.zeros(2, 5, 4, 8, dtype=I32)}, "grad_y must be float32, float16 or bfloat16, got int32"),
    ({"grad_final": torch.zeros(2, 4, 8, 15)}, "grad_final_states must have shape [2, 4, 8, 16], got [2, 4, 8, 15]"),
    ({"grad_final": torch.zeros(2, 4, 8, 16, dtype=I32)},
     "grad_final_states must be float32, float16 or bfloat16, got int32"),
]  # fmt: skip


@pytest.mark.parametrize("change, message", BAD_GRADIENTS)
@pytest.mark.op("ssd_scan_bwd")
def test_bad_gradients(backend, change, message):
    call, options = operands((2, 5), (4, 2, 8, 16))
    given = {"grad_y": call["x"], "grad_final": None, **here(change)}
    with pytest.raises(RuntimeError) as error:
        bwd(call, options, None, None, **given)
    assert str(error.value) == f"n3::ssd_scan_bwd: {message}"


@pytest.mark.parametrize("which", checking(*OPS))
def test_bad_values(which):
    """Where reading a value costs no synchronisation it is checked, and nothing is written."""
    state = torch.ones(3, 6, 4, 8)
    slots = {"state": state, "state_indices": torch.tensor([0, 3])}
    with use_backend(which):
        for values in BAD_VALUES:
            got = message_of(ssd_scan, {**PACKED, "cu_seqlens": torch.tensor(values, dtype=I32)})
            assert got == f"n3::ssd_scan: cu_seqlens must rise from 0 to at most the 10 tokens of x, got {values}"
        got = message_of(ssd_scan_slots, {**GOOD, **slots})
        assert got == "n3::ssd_scan: state_indices must be below the number of slots 3, got 3"
    assert (state == 1).all()
