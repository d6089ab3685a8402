"""The ring form of decoding equals decoding step by step what was accepted, whatever was drafted."""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICE, assert_close_to, assert_invariant, assert_same_bits, fenced
from hypothesis import strategies as st
from properties import all_serving, checking, examples, path_to, random_tree
from ssd_problems import PUBLISHED, dtypes, layouts, magnitude, operands, recurrence, rms_error, states

from n3kernels import use_backend
from n3kernels.mamba import ssm_replay_commit, ssm_replay_flush, ssm_replay_update

OPS = ("ssm_replay_update", "ssm_replay_commit", "ssm_replay_flush")
INT = {"dtype": torch.int32, "device": DEVICE}
SMALL = (4, 2, 8, 16)  # heads, groups, head_dim, d_state
PER_TOKEN = ("x", "dt", "B", "C", "z")
ALL_THREE = all_serving(*OPS)


@pytest.fixture(params=ALL_THREE)
def which(request):
    """A backend that has all three operators, forced."""
    with use_backend(request.param):
        yield request.param


def tokens_of(call, where):
    return {name: t if t is None or name not in PER_TOKEN else t[where] for name, t in call.items()}


def rings(slots, size, layout, dtype=torch.float32):
    """Empty rings full of NaN; positions anywhere, counts 0."""
    heads, groups, head_dim, d_state = layout
    nan = float("nan")
    shapes = ((slots, size, heads, head_dim), (slots, size, groups, d_state), (slots, size, heads))
    x, B, dt = (fenced(torch.full(shape, nan, device=DEVICE)) for shape in shapes)
    positions = torch.stack([torch.arange(slots) % size, torch.zeros(slots, dtype=torch.int64)], 1).to(**INT)
    return {"ring_x": x.to(dtype), "ring_B": B.to(dtype), "ring_dt": dt, "ring_pos": positions}


def filled(slots, size, layout, counts, dtype=torch.float32):
    """Rings whose first ``counts`` tokens are committed; the other entries are NaN."""
    ring = rings(slots, size, layout, dtype)
    ring["ring_pos"][:, 1] = torch.tensor(counts)
    for s, (start, count) in enumerate(ring["ring_pos"].tolist()):
        for i in range(count):
            for name in ("ring_x", "ring_B", "ring_dt"):
                entry = ring[name][s, (start + i) % size]
                entry.copy_(torch.rand_like(entry.float()) if name == "ring_dt" else torch.randn_like(entry.float()))
    return ring


def folded(state, ring, A, slot):
    """The slot's state carried through its committed tokens, in float64."""
    h, (start, count) = state[slot].double(), ring["ring_pos"][slot].tolist()
    for i in range(count):
        x, B, dt = (ring[name][slot, (start + i) % ring["ring_x"].shape[1]].double() for name in
                    ("ring_x", "ring_B", "ring_dt"))  # fmt: skip
        B = B.repeat_interleave(len(A) // len(B), 0)
        h = torch.exp(A.double() * dt)[:, None, None] * h + (dt[:, None] * x)[:, :, None] * B[:, None]
    return h


def size_of(state, ring, A, slot):
    sizes = {name: t if name == "ring_pos" else t.abs() for name, t in ring.items()}
    return folded(state.abs(), sizes, A, slot)


# ---------------------------------------------------------------- one update


@examples(st.integers(1, 4), layouts, dtypes, dtypes, st.booleans(), st.integers(0, 3), st.randoms())
@pytest.mark.op("ssm_replay_update")
def test_update(backend, count, layout, dtype, state_dtype, tree, more, rnd):
    """Outputs of a chain or a tree from state and ring; the drafts' entries; the fold, exactly when it is due."""
    call, options = operands((3, count), layout, dtype)
    size = 2 * count + more
    counts = [rnd.randint(0, size - count) for _ in range(4)]
    state, ring = states(4, layout, state_dtype), filled(4, size, layout, counts, dtype)
    before = {"state": state.clone(), **{name: t.clone() for name, t in ring.items()}}
    source, parents = [2, -1, 0], random_tree(rnd, 3, count) if tree else None
    for name in PER_TOKEN:
        call[name][1] = float("nan")
    y = ssm_replay_update(
        state, **ring, **call, state_indices=torch.tensor(source, device=DEVICE), parents=parents, **options
    )
    assert y.dtype == dtype and y.is_contiguous() and y[1].count_nonzero() == 0
    expected = {name: t.clone() for name, t in before.items()}
    for b, slot in ((0, 2), (2, 0)):
        initial = folded(before["state"], before, call["A"], slot)[None]
        initial_size = size_of(before["state"], before, call["A"], slot)[None]
        for t in range(count):
            path = path_to(parents[b].tolist(), t) if tree else list(range(t + 1))
            chain = tokens_of(call, (slice(b, b + 1), path))
            truth, size_y = recurrence(chain, options, initial)[0], magnitude(chain, options, initial_size)[0]
            assert_close_to(y[b, t], truth[0, -1], 2e-5 if dtype == torch.float32 else 1e-3, size_y[0, -1])
        start, committed = ring["ring_pos"][slot].tolist()
        for t in range(count):
            where = (slot, (start + committed + t) % size)
            expected["ring_x"][where], expected["ring_B"][where] = call["x"][b, t], call["B"][b, t]
            wide = recurrence_step(call, options, b, t)
            torch.testing.assert_close(ring["ring_dt"][where].double(), wide, rtol=1e-5, atol=1e-12)
            expected["ring_dt"][where] = ring["ring_dt"][where]
        if committed + 2 * count > size:
            assert_close_to(state[slot], initial[0], 2e-5, initial_size[0])
            expected["state"][slot] = state[slot]
    for name, t in {"state": state, **ring}.items():
        assert_same_bits(t, expected[name])


def recurrence_step(call, options, b, t):
    """dt after bias, softplus and clamp, in float64."""
    dt = call["dt"][b, t].double()
    dt = dt if call["dt_bias"] is None else dt + call["dt_bias"].double()
    dt = torch.nn.functional.softplus(dt) if options["dt_softplus"] else dt
    return dt.clamp(options["dt_min"], options["dt_max"])


@pytest.mark.parametrize("layout", PUBLISHED.values(), ids=PUBLISHED)
@pytest.mark.op("ssm_replay_update")
def test_published_shapes(backend, layout):
    """bfloat16, a ring of 16 with 9 committed tokens, 4 drafts: RMS-relative error of each head's output."""
    call, options = operands((1, 4), layout, torch.bfloat16)
    state, ring = states(1, layout), filled(1, 16, layout, [9], torch.bfloat16)
    initial = folded(state, ring, call["A"], 0)[None]
    y = ssm_replay_update(state, **ring, **call, **options)
    assert rms_error(y, recurrence(call, options, initial)[0], (1, 3)) < 1e-3 + 2e-3  # of which 1.7e-3 rounds y
    assert rms_error(state, initial, (2, 3)) < 1e-3


# ---------------------------------------------------------------- many calls


def commit(ring, accepted, count, path=None, slots=None):
    ssm_replay_commit(*(ring[n] for n in ("ring_pos", "ring_x", "ring_B", "ring_dt")), accepted, count, path, slots)


def flush(state, ring, A, slots=None):
    ssm_replay_flush(state, *(ring[n] for n in ("ring_pos", "ring_x", "ring_B", "ring_dt")), A, slots)


def accept(rnd, parents, b, count):
    """A random part of a chain, or of a path of the tree."""
    path = list(range(count)) if parents is None else path_to(parents[b].tolist(), rnd.randrange(count))
    return path[: rnd.randint(0, len(path))]


@examples(st.integers(1, 4), st.integers(0, 5), layouts, st.randoms())
@pytest.mark.parametrize("tree", [False, True], ids=["chain", "tree"])
def test_replay_is_decoding_step_by_step(which, tree, count, more, layout, rnd):
    """Ten updates and commits of random acceptance, then a flush: outputs and states of the accepted tokens alone."""
    size, slots = 2 * count + more, torch.tensor([2, 0], **INT)
    state, ring, A = states(3, layout), rings(3, size, layout), operands((1, 1), layout)[0]["A"]
    plain = state[[2, 0]].double()  # what a step by step decoder has, and the size of what went into it
    drift, untouched = plain.abs(), state[1].clone()
    for _ in range(10):
        call, options = operands((2, count), layout)
        call["A"], parents = A, random_tree(rnd, 2, count) if tree else None
        y = ssm_replay_update(state, **ring, **call, state_indices=slots, parents=parents, **options)
        paths, before = [accept(rnd, parents, b, count) for b in range(2)], ring["ring_pos"].clone()
        for b, path in enumerate(paths):
            chain = tokens_of(call, (slice(b, b + 1), path))
            (true_y, after), (y_size, after_size) = (
                f(chain, options, h[b : b + 1]) for f, h in ((recurrence, plain), (magnitude, drift))
            )
            assert_close_to(y[b, path], true_y[0], 2e-5, y_size[0])
            plain[b], drift[b] = after[0], after_size[0]
        padded = torch.tensor([path + [99] * (count - len(path)) for path in paths], **INT)  # the rest is not read
        commit(ring, torch.tensor([len(p) for p in paths], **INT), count, padded if tree else None, slots)
        for slot, path in zip((2, 0), paths, strict=True):
            start, pending = before[slot].tolist()
            start, pending = ((start + pending) % size, 0) if pending + 2 * count > size else (start, pending)
            assert ring["ring_pos"][slot].tolist() == [start, pending + len(path)]
    flush(state, ring, A, slots)
    assert_close_to(state[[2, 0]], plain, 2e-5, drift)
    assert not ring["ring_pos"][[2, 0], 1].any()
    assert_same_bits(state[1], untouched)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sixteen_bits_keep_their_accuracy(which, dtype):
    """64 tokens by twos in 16 bits, a float16 state: 1e-3 of the RMS beside what rounding y alone costs."""
    layout, state_dtype = (2, 1, 8, 16), torch.float16
    state, ring = torch.zeros(1, 2, 8, 16, device=DEVICE, dtype=state_dtype), rings(1, 8, layout, dtype)
    whole, options = operands((1, 64), layout, dtype)
    out = []
    for t in range(0, 64, 2):
        out.append(ssm_replay_update(state, **ring, **tokens_of(whole, (slice(None), slice(t, t + 2))), **options))
        commit(ring, torch.tensor([2], **INT), 2)
    assert rms_error(torch.cat(out, 1), recurrence(whole, options)[0], (1, 3)) < 1e-3 + torch.finfo(dtype).eps / 2


def test_a_single_token(which):
    """Without the dimension of tokens, as ssm_update takes it; T may change while the tokens fit."""
    call, options = operands((2, 6), SMALL)
    state, ring = states(2, SMALL), rings(2, 6, SMALL)
    truth = recurrence(call, options, state)[0]
    for t, count in ((0, 1), (1, 2), (3, 1), (4, 2)):
        where = (slice(None), t if count == 1 else slice(t, t + count))
        y = ssm_replay_update(state, **ring, **tokens_of(call, where), **options)
        assert_close_to(y, truth[where])
        commit(ring, torch.full((2,), count, **INT), count)


@pytest.mark.op("ssm_replay_update")
def test_a_state_of_no_elements_is_no_padding(backend):
    layout = (4, 2, 8, 0)
    call, options = operands((3,), layout)
    truth = call["x"] * call["D"][:, None] * torch.nn.functional.silu(call["z"])
    y = ssm_replay_update(states(3, layout), **rings(3, 4, layout), **call, **options)
    assert_close_to(y, truth.double(), 1e-5, truth.double().abs())


# ---------------------------------------------------------------- commit and flush


@pytest.mark.op("ssm_replay_commit")
def test_commit_moves_the_accepted_entries(backend):
    """Bit for bit, around the end of the ring; nothing else changes, and padding touches nothing."""
    size, ring = 7, filled(4, 7, SMALL, [3, 1, 0, 2])
    ring["ring_pos"][:, 0] = torch.tensor([2, 6, 5, 4])
    for name in ("ring_x", "ring_B", "ring_dt"):
        ring[name].normal_()
    before = {name: t.clone() for name, t in ring.items()}
    path, accepted = torch.tensor([[0, 2, 50], [1, 2, -7], [0, 1, 2]], **INT), torch.tensor([2, 1, 3], **INT)
    commit(ring, accepted, 3, path, torch.tensor([3, 0, -1], device=DEVICE))
    expected = {name: t.clone() for name, t in before.items()}
    for name in ("ring_x", "ring_B", "ring_dt"):
        expected[name][3, (6 + 1) % size] = before[name][3, (6 + 2) % size]
        expected[name][0, 5] = before[name][0, 6]
    expected["ring_pos"][3] = torch.tensor([6, 2])  # 2 + 6 > 7: the update folded
    expected["ring_pos"][0] = torch.tensor([5, 1])
    for name, t in ring.items():
        assert_same_bits(t, expected[name])


@pytest.mark.parametrize("accepted", [[0, 3], [3, 1]])
@pytest.mark.op("ssm_replay_commit")
def test_commit_of_a_chain_moves_a_pointer(backend, accepted):
    ring = filled(2, 9, SMALL, [3, 4])
    before = {name: t.clone() for name, t in ring.items()}
    commit(ring, torch.tensor(accepted, **INT), 3)
    for name in ("ring_x", "ring_B", "ring_dt"):
        assert_same_bits(ring[name], before[name])
    assert ring["ring_pos"].tolist() == [[0, 3 + accepted[0]], [5, accepted[1]]]


@examples(layouts, dtypes, dtypes, st.integers(1, 7), st.booleans(), st.randoms())
@pytest.mark.op("ssm_replay_flush")
def test_flush(backend, layout, dtype, state_dtype, size, every, rnd):
    A = operands((1, 1), layout)[0]["A"]
    counts = [rnd.randint(0, size) for _ in range(4)]
    state, ring = states(4, layout, state_dtype), filled(4, size, layout, counts, dtype)
    before, started = state.clone(), {name: t.clone() for name, t in ring.items()}
    slots = list(range(4)) if every else [3, 1]
    flush(state, ring, A, None if every else torch.tensor([3, -1, 1], device=DEVICE))
    for slot in range(4):
        start, count = started["ring_pos"][slot].tolist()
        if slot in slots and count:
            truth = folded(before, started, A, slot)
            assert_close_to(state[slot], truth, 1e-5, size_of(before, started, A, slot))
        else:
            assert_same_bits(state[slot], before[slot])
        want = [(start + count) % size, 0] if slot in slots else [start, count]
        assert ring["ring_pos"][slot].tolist() == want
    for name in ("ring_x", "ring_B", "ring_dt"):
        assert_same_bits(ring[name], started[name])


# ---------------------------------------------------------------- invariants


@pytest.mark.op("ssm_replay_update")
def test_a_sequence_does_not_see_the_others(backend):
    """The second sequence, its state and its ring are NaN; the first has the bits it has alone."""
    call, options = operands((2, 3), SMALL)
    state, ring = states(2, SMALL), filled(2, 7, SMALL, [4, 2])
    alone, one = state[:1].clone(), {name: t[:1].clone() for name, t in ring.items()}
    for name in PER_TOKEN:
        call[name][1] = float("nan")
    state[1] = ring["ring_x"][1] = ring["ring_B"][1] = float("nan")
    y = ssm_replay_update(state, **ring, **call, **options)
    y_alone = ssm_replay_update(alone, **one, **tokens_of(call, slice(0, 1)), **options)
    assert y[1].isnan().all()
    assert_invariant(backend, y[:1], y_alone)
    assert_invariant(backend, state[:1], alone)
    assert_invariant(backend, ring["ring_dt"][:1], one["ring_dt"])


@pytest.mark.op("ssm_replay_update")
def test_many_tokens_have_the_bits_of_a_prefix(backend):
    """A token does not see the ones behind it in the call."""
    call, options = operands((2, 4), SMALL)
    state, ring = states(2, SMALL), filled(2, 16, SMALL, [5, 0])
    other, again = state.clone(), {name: t.clone() for name, t in ring.items()}
    y = ssm_replay_update(state, **ring, **call, **options)
    for name in PER_TOKEN:
        call[name][:, 2:] = float("nan")
    assert_invariant(backend, ssm_replay_update(other, **again, **call, **options)[:, :2], y[:, :2])


@pytest.mark.op("ssm_replay_update")
def test_any_strides(backend):
    """Column slices and copies of them, rings with the slots innermost: the same bits."""
    call, options = operands((2, 3), SMALL)
    state, ring = states(2, SMALL), filled(2, 7, SMALL, [4, 2])
    turned = {name: t.movedim(0, -1).contiguous().movedim(-1, 0) for name, t in ring.items()}
    wide = states(4, SMALL)[::2].copy_(state)
    copies = {name: None if t is None else t.contiguous() for name, t in call.items()}
    y = ssm_replay_update(state, **ring, **copies, **options)
    assert_invariant(backend, ssm_replay_update(wide, **turned, **call, **options), y)
    assert_invariant(backend, wide, state)
    for name, t in ring.items():
        assert_same_bits(turned[name], t)


@pytest.mark.op("ssm_replay_update")
def test_long_and_short_time_steps(backend):
    """Log decays below -1e4 give no NaN or infinity; without time the fold leaves the state alone bit for bit."""
    call, options = operands((2, 3), SMALL, variant=("none", False, False, False, (0.0, None)))
    for step, A in ((1e3, -16.0), (0.0, -16.0)):
        state, ring = states(2, SMALL), filled(2, 6, SMALL, [3, 3])
        before = state.clone()
        call["dt"].fill_(step)
        call["A"].fill_(A)
        ring["ring_dt"].fill_(step)
        y = ssm_replay_update(state, **ring, **call, **options)
        assert y.isfinite().all() and state.isfinite().all()
        if step == 0.0:
            assert_same_bits(state, before)
            assert_close_to(y, recurrence(call, options, before)[0], 1e-5, magnitude(call, options, before)[0])


# ---------------------------------------------------------------- the framework


def sample(op):
    call, options = operands((2, 2), (2, 1, 4, 3))
    state, ring = states(3, (2, 1, 4, 3)), filled(3, 5, (2, 1, 4, 3), [3, 1, 0])
    slots, accepted = torch.tensor([2, 0], device=DEVICE), torch.tensor([1, 2], **INT)
    parents, path = torch.tensor([[-1, -1], [-1, 0]], **INT), torch.tensor([[1, 0], [0, 1]], **INT)
    three = [ring[n] for n in ("ring_pos", "ring_x", "ring_B", "ring_dt")]
    return {
        "ssm_replay_update": ((state, *three[1:], three[0], *call.values(), slots), {**options, "parents": parents}),
        "ssm_replay_commit": ((*three, accepted, 2, path, slots), {}),
        "ssm_replay_flush": ((state, *three, call["A"], slots), {}),
    }[op]


@pytest.mark.parametrize("op", OPS)
def test_opcheck(op):
    args, options = sample(op)
    torch.library.opcheck(getattr(torch.ops.n3, op).default, args, options)


@torch._dynamo.config.patch(error_on_recompile=True)
def test_compiles_without_a_break():
    """An update and its commit in one graph."""

    def step(state, ring, call, accepted):
        y = ssm_replay_update(state, **ring, **call)
        commit(ring, accepted, 2)
        return y.sin()

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    call, _ = operands((2, 2), SMALL)
    state, ring, accepted = states(2, SMALL), filled(2, 5, SMALL, [3, 1]), torch.tensor([1, 2], **INT)
    other, again = state.clone(), {name: t.clone() for name, t in ring.items()}
    torch.testing.assert_close(compiled(state, ring, call, accepted), step(other, again, call, accepted))
    assert_same_bits(state, other)
    for name, t in ring.items():
        assert_same_bits(t, again[name])


# ---------------------------------------------------------------- bad calls

RINGS = {
    "ring_x": torch.zeros(3, 8, 6, 4), "ring_B": torch.zeros(3, 8, 3, 8), "ring_dt": torch.zeros(3, 8, 6),
    "ring_pos": torch.ones(3, 2, dtype=torch.int32),
}  # fmt: skip
UPDATE = {
    "state": torch.ones(3, 6, 4, 8), **RINGS, "x": torch.zeros(2, 4, 6, 4), "dt": torch.zeros(2, 4, 6),
    "A": torch.zeros(6), "B": torch.zeros(2, 4, 3, 8), "C": torch.zeros(2, 4, 3, 8),
}  # fmt: skip
COMMIT = {**RINGS, "num_accepted": torch.ones(2, dtype=torch.int32), "tokens": 4}
FLUSH = {"state": torch.ones(3, 6, 4, 8), **RINGS, "A": torch.zeros(6)}
BAD_RINGS = [
    ({"ring_x": torch.zeros(3, 8, 24)}, "ring_x must have 4 dimensions, got 3"),
    ({"ring_B": torch.zeros(3, 7, 3, 8)}, "ring_B must have shape [3, 8, 3, 8], got [3, 7, 3, 8]"),
    ({"ring_dt": torch.zeros(3, 8)}, "ring_dt must have shape [3, 8, 6], got [3, 8]"),
    ({"ring_dt": torch.zeros(3, 8, 6).half()}, "ring_dt must be float32, got float16"),
    ({"ring_pos": torch.zeros(3, 2).long()}, "ring_pos must be int32, got int64"),
    ({"state_indices": torch.zeros(2)}, "state_indices must be int32 or int64, got float32"),
]
BAD_UPDATE = BAD_RINGS + [
    ({"x": torch.zeros(6, 4)}, "x must have 3 or 4 dimensions, got 2"),
    ({"state": torch.zeros(3, 6, 4, 7)}, "state must have shape [3, 6, 4, 8], got [3, 6, 4, 7]"),
    ({"state": torch.zeros(3, 6, 4, 8).to(torch.int8)}, "state must be float32, float16 or bfloat16, got int8"),
    ({"ring_x": torch.zeros(3, 8, 6, 5)}, "ring_x must have shape [3, 8, 6, 4], got [3, 8, 6, 5]"),
    ({"ring_x": torch.zeros(3, 8, 6, 4).half()}, "ring_x must have the dtype of x (float32), got float16"),
    ({"ring_B": torch.zeros(3, 8, 3, 8).half()}, "ring_B must have the dtype of x (float32), got float16"),
    ({"ring_pos": torch.zeros(2, 2).int()}, "ring_pos must have shape [3, 2], got [2, 2]"),
    ({name: t[:, :7] for name, t in RINGS.items() if name != "ring_pos"},
     "ring_x must hold at least 2 T = 8 tokens, got 7"),
    ({"state_indices": torch.zeros(3).int()}, "state_indices must have shape [2], got [3]"),
    ({"parents": torch.zeros(2, 3).int()}, "parents must have shape [2, 4], got [2, 3]"),
    ({"parents": torch.zeros(2, 4)}, "parents must be int32, got float32"),
    ({**{name: t[:1] for name, t in RINGS.items()}, "state": torch.ones(1, 6, 4, 8)},
     "state must have at least 2 slots without state_indices, got 1"),
]  # fmt: skip
BAD_COMMIT = BAD_RINGS + [
    ({"ring_pos": torch.zeros(6).int()}, "ring_pos must have 2 dimensions, got 1"),
    ({"ring_x": torch.zeros(3, 8, 6, 4).int()}, "ring_x must be float32, float16 or bfloat16, got int32"),
    ({"ring_B": torch.zeros(3, 8, 3, 8).half()}, "ring_B must have the dtype of ring_x (float32), got float16"),
    ({"num_accepted": torch.ones(2, 1).int()}, "num_accepted must have 1 dimensions, got 2"),
    ({"num_accepted": torch.ones(2)}, "num_accepted must be int32, got float32"),
    ({"tokens": 5}, "tokens must be between 1 and 4, got 5"),
    ({"tokens": 0}, "tokens must be between 1 and 4, got 0"),
    ({"path": torch.zeros(2, 3).int()}, "path must have shape [2, 4], got [2, 3]"),
    ({"path": torch.zeros(2, 4)}, "path must be int32, got float32"),
    ({"state_indices": torch.zeros(3).int()}, "state_indices must have shape [2], got [3]"),
    ({"num_accepted": torch.ones(4).int()}, "ring_pos must have at least 4 slots without state_indices, got 3"),
]
BAD_FLUSH = BAD_RINGS + [
    ({"state": torch.zeros(3, 6, 4)}, "state must have 4 dimensions, got 3"),
    ({"state": torch.zeros(3, 6, 4, 8).int()}, "state must be float32, float16 or bfloat16, got int32"),
    ({"ring_x": torch.zeros(3, 8, 6, 5)}, "ring_x must have shape [3, 8, 6, 4], got [3, 8, 6, 5]"),
    ({"ring_B": torch.zeros(3, 8, 4, 8)}, "groups of ring_B must divide the 6 heads of state, got 4"),
    ({"A": torch.zeros(5)}, "A must have shape [6], got [5]"),
    ({"state_indices": torch.zeros(2, 1).int()}, "state_indices must have 1 dimensions, got 2"),
]
BAD_VALUES = [
    (ssm_replay_update, {"state_indices": torch.tensor([0, 3])},
     "state_indices must be below the number of slots 3, got 3"),
    (ssm_replay_update, {"parents": torch.tensor([[-1, 0, 1, 3], [-1, 0, 1, 2]]).int()},
     "parents must be between -1 and t - 1 for token t, got 3 for token 3"),
    (ssm_replay_commit, {"state_indices": torch.tensor([0, 3])},
     "state_indices must be below the number of slots 3, got 3"),
    (ssm_replay_commit, {"num_accepted": torch.tensor([0, 5]).int()}, "num_accepted must be between 0 and 4, got 5"),
    (ssm_replay_commit, {"num_accepted": torch.tensor([-1, 0]).int()}, "num_accepted must be between 0 and 4, got -1"),
    (ssm_replay_flush, {"state_indices": torch.tensor([0, 3])},
     "state_indices must be below the number of slots 3, got 3"),
]  # fmt: skip
GOOD = {ssm_replay_update: UPDATE, ssm_replay_commit: COMMIT, ssm_replay_flush: FLUSH}


def message_of(op, change):
    call = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in {**GOOD[op], **change}.items()}
    before = {k: v.clone() for k, v in call.items() if isinstance(v, torch.Tensor)}
    with pytest.raises(RuntimeError) as error:
        op(**call)
    for name, t in before.items():  # nothing is written
        assert_same_bits(call[name], t)
    return str(error.value)


@pytest.mark.parametrize("change, message", BAD_UPDATE)
@pytest.mark.op("ssm_replay_update")
def test_bad_calls_of_update(backend, change, message):
    assert message_of(ssm_replay_update, change) == f"n3::ssm_replay_update: {message}"


@pytest.mark.parametrize("change, message", BAD_COMMIT)
@pytest.mark.op("ssm_replay_commit")
def test_bad_calls_of_commit(backend, change, message):
    assert message_of(ssm_replay_commit, change) == f"n3::ssm_replay_commit: {message}"


@pytest.mark.parametrize("change, message", BAD_FLUSH)
@pytest.mark.op("ssm_replay_flush")
def test_bad_calls_of_flush(backend, change, message):
    assert message_of(ssm_replay_flush, change) == f"n3::ssm_replay_flush: {message}"


@pytest.mark.parametrize("op, change, message", BAD_VALUES)
@pytest.mark.parametrize("name", [b for b in ALL_THREE if b in checking(*OPS)])
def test_bad_values(name, op, change, message):
    """Where reading a value costs no synchronisation it is checked."""
    with use_backend(name):
        assert message_of(op, change) == f"n3::{op.__name__}: {message}"
