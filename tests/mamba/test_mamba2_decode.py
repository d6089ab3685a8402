from __future__ import annotations

import pytest
import torch
from conftest import DEVICE, assert_invariant, assert_same_bits
from hypothesis import strategies as st
from mixer_problems import (
    BAD_MIXER,
    GOOD_MIXER,
    INT,
    PLAIN,
    ROWS,
    SMALL,
    assert_is_the_mixer,
    assert_is_the_state,
    clones,
    definition,
    mixer,
    variants,
)
from properties import all_serving, checking, examples, path_to, random_tree
from ssd_problems import PUBLISHED, dtypes, layouts

from n3kernels import use_backend
from n3kernels.mamba import causal_conv1d_update_slots, gated_rms_norm, mamba2_decode, ssm_update

OPS = ("mamba2_decode",)
STATES = ("conv_state", "ssm_state")


def of(call, rows=slice(None), tokens=slice(None)):
    """The call on some sequences and tokens."""
    return {**call, "zxbcdt": call["zxbcdt"][rows, tokens]}


# ---------------------------------------------------------------- the definition


@examples(st.integers(0, 5), layouts, dtypes, dtypes, variants, st.integers(0, 2), st.randoms())
def test_agrees_with_the_definition(backend, count, layout, dtype, state_dtype, variant, more, rnd):
    """One token or T of them, ragged, padding, states anywhere, every option; states in all 16 and 32-bit dtypes."""
    call, options = mixer((3, max(count, 1)), layout, dtype, variant, 6, more, state_dtype)
    counts = [rnd.randint(0, count) if count else 1 for _ in range(3)]  # 0: tensors without their dimension
    for b, n in enumerate(counts):
        call["zxbcdt"][b, n:] = float("nan")
    before, where = clones(call), {}
    source, destination = [4, -1, 0], [4, 2, 3]
    if rnd.random() < 0.5:
        where["dst_state_indices"] = torch.tensor(destination, device=DEVICE)
    if count:
        where["num_tokens"] = torch.tensor(counts, **INT)
    used = call if count else {**call, "zxbcdt": call["zxbcdt"][:, 0]}
    y = mamba2_decode(**used, state_indices=torch.tensor(source, **INT), **where, **options)
    assert y.is_contiguous() and y.shape == (*used["zxbcdt"].shape[:-1], layout[0] * layout[2])
    y = y if count else y[:, None]
    raw = call["zxbcdt"][..., layout[0] * layout[2] : -layout[0]]
    for b, n in enumerate(counts):
        assert y[b, n if source[b] >= 0 else 0 :].count_nonzero() == 0
        if source[b] < 0:
            continue
        conv, ssm = (before[name][source[b]] for name in STATES)
        truth, after = definition(call, options, call["zxbcdt"][b, :n], conv, ssm)
        slot = destination[b] if "dst_state_indices" in where else source[b]
        if n:
            assert_is_the_mixer(y[b, :n], truth, dtype)
        assert_is_the_state(call["ssm_state"][slot], after, dtype)
        assert_same_bits(call["conv_state"][slot], torch.cat([conv, raw[b, :n].T], 1)[:, n:])
    written = [4, 3] if "dst_state_indices" in where else [4, 0]
    others = [slot for slot in range(6) if slot not in written]
    for name in STATES:
        assert_same_bits(call[name][others], before[name][others])


@pytest.mark.parametrize("layout", PUBLISHED.values(), ids=PUBLISHED)
def test_published_shapes(backend, layout):
    call, options = mixer((2, 1), layout, torch.bfloat16, slots=2, state_dtype=torch.float16)
    before = clones(call)
    y = mamba2_decode(**{**call, "zxbcdt": call["zxbcdt"][:, 0]}, **options)
    for b in range(2):
        conv, ssm = (before[name][b] for name in STATES)
        truth, after = definition(call, options, call["zxbcdt"][b], conv, ssm)
        assert_is_the_mixer(y[b], truth[0], torch.bfloat16)
        assert_is_the_state(call["ssm_state"][b], after, torch.bfloat16)


PARTS = ("causal_conv1d_update", "ssm_update", "gated_rms_norm")


@pytest.mark.parametrize("which", all_serving("mamba2_decode", *PARTS))
@pytest.mark.parametrize("use", ["plain", "tree", "eight bits"])
def test_equals_its_parts(which, use):
    """In float32; on the CPU bit for bit, whatever else is asked for."""
    call, options = mixer((2, 3), slots=8)
    where = {"state_indices": torch.tensor([1, 0], **INT)}
    if use == "tree":
        where = {
            "state_indices": torch.tensor([[0, 1], [2, 3]], **INT), "num_accepted": torch.tensor([2, 1], **INT),
            "dst_state_indices": torch.tensor([[4, 5, 6], [7, -1, 3]], **INT),
            "parents": torch.tensor([[-1, 0, 0], [-1, -1, 1]], **INT), "num_tokens": torch.tensor([3, 2], **INT),
        }  # fmt: skip
    stored = {}
    if use == "eight bits":
        call["ssm_state"] = (call["ssm_state"] * 30).to(torch.int8)
        stored = {"rounding": "stochastic", "seed": torch.tensor([1, 2], device=DEVICE)}
    scales = [torch.rand(8, *SMALL[:1], SMALL[2], device=DEVICE) if use == "eight bits" else None] * 2
    scales = [None if s is None else s.clone() for s in scales]
    other = clones(call)
    heads, groups, head_dim, d_state = SMALL
    inner, channels = heads * head_dim, call["conv_weight"].shape[0]
    with use_backend(which):
        y = mamba2_decode(**call, **where, **stored, state_scale=scales[0], **options)
        z, xbc, dt = other["zxbcdt"].split([inner, channels, heads], -1)
        conv = other["conv_state"], other["conv_weight"], other["conv_bias"]
        xbc = causal_conv1d_update_slots(xbc, *conv, **where, activation="silu")
        x, B, C = xbc.split([inner, groups * d_state, groups * d_state], -1)
        B, C = B.unflatten(-1, (groups, d_state)), C.unflatten(-1, (groups, d_state))
        x, rest = x.unflatten(-1, (heads, head_dim)), (other["D"], None, other["dt_bias"])
        parts = ssm_update(
            other["ssm_state"], x, dt, other["A"], B, C, *rest, **where, **stored, state_scale=scales[1], dt_max=2.0
        )
        parts = gated_rms_norm(parts.flatten(-2), z, other["norm_weight"], inner // groups)
    if use == "tree":
        parts[1, 2] = 0  # padding: where the norm of the parts leaves zeros with the gate's sign
    if which == "cpu":
        assert_same_bits(y, parts)
        assert_same_bits(call["ssm_state"], other["ssm_state"])
    assert_is_the_mixer(y, parts.double(), torch.float32)
    if use != "eight bits":
        assert_is_the_state(call["ssm_state"], other["ssm_state"].double(), torch.float32)
    assert_same_bits(call["conv_state"], other["conv_state"])


# ---------------------------------------------------------------- invariants


@pytest.mark.parametrize("tokens", [(0,), (0, 3), (2, 0)])
def test_no_tokens(backend, tokens):
    call, options = mixer(tokens)
    before = clones(call)
    assert mamba2_decode(**call, **options).shape == (*tokens, 32)
    for name in STATES:
        assert_same_bits(call[name], before[name])


@examples(layouts, dtypes, variants, st.integers(1, 6))
def test_many_tokens_are_many_calls(backend, layout, dtype, variant, count):
    call, options = mixer((3, count), layout, dtype, variant, 3)
    stepped = clones(call)
    y = mamba2_decode(**call, **options)
    for t in range(count):
        assert_invariant(backend, mamba2_decode(**of(stepped, tokens=t), **options), y[:, t])
    for name in STATES:
        assert_invariant(backend, stepped[name], call[name])


@examples(st.integers(1, 5), layouts, dtypes, st.randoms())
def test_a_token_of_a_tree_is_the_end_of_its_path(backend, count, layout, dtype, rnd):
    call, options = mixer((2, count), layout, dtype, PLAIN, 2 + 2 * count)
    before, parents = clones(call), random_tree(rnd, 2, count)
    each = 2 + torch.arange(2 * count, **INT).view(2, count)
    y = mamba2_decode(**call, dst_state_indices=each, parents=parents, **options)
    for b in range(2):
        t = rnd.randrange(count)
        alone = {name: before[name][b : b + 1].clone() for name in STATES}
        path = path_to(parents[b].tolist(), t)
        chain = {**call, **alone, "zxbcdt": call["zxbcdt"][b : b + 1, path]}
        assert_invariant(backend, mamba2_decode(**chain, **options)[0, -1], y[b, t])
        for name in STATES:
            assert_invariant(backend, call[name][each[b, t]], alone[name][0])


@examples(st.randoms())
def test_rejected_tokens_leave_no_trace(backend, rnd):
    """Five calls of four tokens, of which any number is accepted, have the bits of decoding the accepted ones."""
    call, options = mixer((2, 4), slots=16)
    plain = {name: call[name][[0, 8]].clone() for name in STATES}
    old, accepted = torch.tensor([[0, 1, 2, 3], [8, 9, 10, 11]], device=DEVICE), torch.tensor([1, 1], **INT)
    for _ in range(5):
        call["zxbcdt"].normal_()
        new = torch.where(old % 8 < 4, old + 4, old - 4)  # the two halves in turn
        y = mamba2_decode(**call, state_indices=old, dst_state_indices=new, num_accepted=accepted, **options)
        accepted = torch.tensor([rnd.randint(1, 4) for _ in range(2)], **INT)
        for b, n in enumerate(accepted.tolist()):
            one = {name: state[b : b + 1] for name, state in plain.items()}
            kept = {**call, **one, "zxbcdt": call["zxbcdt"][b : b + 1, :n]}
            assert_invariant(backend, mamba2_decode(**kept, **options), y[b : b + 1, :n])
            for name in STATES:
                assert_invariant(backend, call[name][new[b, n - 1]], plain[name][b])
        old = new


def test_states_are_read_before_they_are_written(backend):
    """Two sequences swap slots, and two continue from one."""
    call, options = mixer((4, 2))
    before = clones(call)
    source, destination = (torch.tensor(i, **INT) for i in ([0, 1, 2, 2], [1, 0, 3, 2]))
    y = mamba2_decode(**call, state_indices=source, dst_state_indices=destination, **options)
    for b, slot in enumerate(destination.tolist()):
        alone = {name: before[name][source[b]][None].clone() for name in STATES}
        one = {**call, **alone, "zxbcdt": call["zxbcdt"][b : b + 1]}
        assert_invariant(backend, mamba2_decode(**one, **options)[0], y[b])
        for name in STATES:
            assert_invariant(backend, call[name][slot], alone[name][0])


def test_a_sequence_does_not_see_the_others(backend):
    """Alone or beside NaN inputs, a NaN state and padding: the same bits."""
    call, options = mixer((4, 3))
    call["zxbcdt"][1], call["ssm_state"][3], call["zxbcdt"][2] = float("nan"), float("nan"), float("nan")
    before, source = clones(call), torch.tensor([4, 0, -1, 3], **INT)
    y = mamba2_decode(**call, state_indices=source, **options)
    assert y[1].isnan().all() and y[3].isnan().all() and y[2].count_nonzero() == 0
    alone = {name: before[name][4:].clone() for name in STATES}
    one = {**call, **alone, "zxbcdt": call["zxbcdt"][:1]}
    assert_invariant(backend, mamba2_decode(**one, **options), y[:1])
    for name in STATES:
        assert_invariant(backend, call[name][4:], alone[name])
        assert_same_bits(call[name][[1, 2]], before[name][[1, 2]])


def test_any_strides(backend):
    call, options = mixer((3, 2))
    turned = {**call, "zxbcdt": call["zxbcdt"].movedim(-1, 0).contiguous().movedim(0, -1)}
    turned |= {name: call[name].movedim(0, -1).contiguous().movedim(-1, 0) for name in STATES}
    y = mamba2_decode(**call, **options)
    assert_invariant(backend, mamba2_decode(**turned, **options), y)
    for name in STATES:
        assert_invariant(backend, turned[name], call[name])


def test_no_time_leaves_the_state_alone(backend):
    call, options = mixer((2, 2), variant=(4, True, "silu", "head", False, False, "default", False))
    call["zxbcdt"][..., -SMALL[0] :] = 0.0
    before = call["ssm_state"].clone()
    mamba2_decode(**call, **options)
    assert_same_bits(call["ssm_state"], before)


# ---------------------------------------------------------------- the framework


@pytest.mark.parametrize("use", ["one token", "ragged", "tree", "eight bits"])
def test_opcheck(use):
    call, options = mixer((2, 3), (2, 1, 4, 3), slots=9)
    if use == "one token":
        call["zxbcdt"] = call["zxbcdt"][:, 0]
    if use == "ragged":
        options["num_tokens"] = torch.tensor([3, 1], **INT)
    if use == "tree":
        options |= {
            "state_indices": torch.tensor([[0, 1], [2, 3]], **INT), "num_accepted": torch.tensor([2, 1], **INT),
            "dst_state_indices": torch.tensor([[4, 5, 6], [7, 8, -1]], **INT),
            "parents": torch.tensor([[-1, 0, 0], [-1, -1, 1]], **INT),
        }  # fmt: skip
    if use == "eight bits":
        call["ssm_state"] = torch.ones(9, 2, 4, 3, device=DEVICE, dtype=torch.int8)
        options |= {"state_scale": torch.ones(9, 2, 4, device=DEVICE), "rounding": "stochastic"}
        options["seed"] = torch.tensor([1, 2], device=DEVICE)
    slots = [options.pop(name, None) for name in ("state_indices", "dst_state_indices")]
    torch.library.opcheck(torch.ops.n3.mamba2_decode.default, (*call.values(), *slots), options)


@pytest.mark.parametrize("dynamic", [False, True])
@torch._dynamo.config.patch(error_on_recompile=True)
def test_compiles_without_a_break(dynamic):
    def step(call, index, accepted):
        return mamba2_decode(**call, state_indices=index, num_accepted=accepted).sin()

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for batch in (5, 9) if dynamic else (5,):
        call, _ = mixer((batch, 3), (6, 3, 7, 16), slots=20)
        other, index, accepted = clones(call), torch.arange(2 * batch, **INT).view(batch, 2), torch.ones(batch, **INT)
        torch.testing.assert_close(compiled(other, index, accepted), step(call, index, accepted))
        for name in STATES:
            assert_same_bits(other[name], call[name])


def test_float64_is_kept():
    call, options = mixer((1, 4))
    call = {name: None if t is None else t.double() for name, t in call.items()}
    conv, ssm = (call[name][0].clone() for name in STATES)
    with use_backend("reference"):
        y = mamba2_decode(**call, **options)
    truth, after = definition(call, options, call["zxbcdt"][0], conv, ssm)
    torch.testing.assert_close(y[0], truth, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(call["ssm_state"][0], after, rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------- bad calls

ONES = torch.ones(2, dtype=torch.int32)
CODES = torch.ones(3, 6, 4, 8, dtype=torch.int8)
STORED = "float32, float16, bfloat16, int8 or float8_e4m3fn"
EACH, TREE = torch.tensor([[0, 1, 2, -1, -1]] * 2), torch.full((2, 5), -1, dtype=torch.int32)
BAD = BAD_MIXER + [
    ({"zxbcdt": torch.zeros(102)}, "zxbcdt must have 2 or 3 dimensions, got 1"),
    ({"zxbcdt": torch.zeros(2, 102), "conv_weight": torch.zeros(71, 4)}, f"{ROWS}, got 71"),
    ({"ssm_state": torch.zeros(3, 6, 4, 8).int()}, f"ssm_state must be {STORED}, got int32"),
    ({"zxbcdt": torch.zeros(4, 5, 102)}, "ssm_state must have at least 4 slots without state_indices, got 3"),
    ({"state_indices": torch.zeros(3).int()}, "state_indices must have shape [2], got [3]"),
    ({"state_indices": torch.zeros(2, 3).int()}, "state_indices must have shape [2], got [2, 3]"),
    ({"dst_state_indices": torch.zeros(2, 4).int()}, "dst_state_indices must have shape [2, 5], got [2, 4]"),
    ({"num_tokens": torch.zeros(3).int()}, "num_tokens must have shape [2], got [3]"),
    ({"num_accepted": ONES}, "state_indices must be given with num_accepted, got None"),
    ({"num_accepted": ONES, "state_indices": ONES}, "state_indices must have 2 dimensions with num_accepted, got 1"),
    ({"parents": TREE}, "dst_state_indices must be given with parents, got None"),
    ({"ssm_state": CODES}, "state_scale must be given with a state of int8, got None"),
    ({"state_scale": torch.ones(3, 6, 4)}, "state_scale must be None with a state of float32"),
    ({"rounding": "down"}, "rounding must be one of nearest, stochastic, got down"),
    ({"rounding": "stochastic"}, "seed must be given for rounding=stochastic, got None"),
    ({"seed": torch.zeros(3).long()}, "seed must have shape [2], got [3]"),
]
BAD_VALUES = [
    ({"state_indices": torch.tensor([0, 3]).int()}, "state_indices must be below the number of slots 3, got 3"),
    ({"dst_state_indices": torch.tensor([0, 3])}, "dst_state_indices must be below the number of slots 3, got 3"),
    ({"num_tokens": torch.tensor([0, 6]).int()}, "num_tokens must be between 0 and T=5, got 6"),
    ({"num_accepted": ONES + 2, "state_indices": torch.zeros(2, 2).int()},
     "num_accepted must be between 1 and 2, got 3"),
    ({"parents": torch.tensor([[-1, 1, 0, 0, 0]] * 2).int(), "dst_state_indices": EACH},
     "parents must be between -1 and t - 1 for token t, got 1 for token 1"),
]  # fmt: skip


def message_of(change):
    call = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in {**GOOD_MIXER, **change}.items()}
    before = {name: call[name].clone() for name in STATES}
    with pytest.raises(RuntimeError) as error:
        mamba2_decode(**call)
    for name, state in before.items():  # nothing is written
        assert_same_bits(call[name], state)
    return str(error.value)


@pytest.mark.parametrize("change, message", BAD)
def test_bad_calls(backend, change, message):
    assert message_of(change) == f"n3::mamba2_decode: {message}"


@pytest.mark.parametrize("change, message", BAD_VALUES)
@pytest.mark.parametrize("which", checking(*OPS))
def test_bad_values(which, change, message):
    """Where reading a value costs no synchronisation it is checked."""
    with use_backend(which):
        assert message_of(change) == f"n3::mamba2_decode: {message}"
