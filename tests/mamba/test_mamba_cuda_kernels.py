"""The text of the mamba CUDA kernels, run on the CPU by tests/cuda_emulator: indices, masks, strides, barriers, slots.

It proves nothing about a GPU, where the same operators are tested through the dispatcher; it finds on any machine what
would otherwise be found on a GPU. The structures of arguments are filled in here as the launchers do it.
"""

from __future__ import annotations

import ctypes
import random

import pytest
import torch
from conftest import assert_close_to, assert_same_bits, fenced
from hypothesis import given
from hypothesis import strategies as st
from kernel_text import load, needs_emulator

from n3kernels.mamba import reference, reference_decode, reference_mixer

pytestmark = needs_emulator
TYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.float8_e4m3fn, torch.bool]  # mamba::Type
SOURCE, LAST, EACH = range(3)  # mamba::Where
SHIFT, WINDOW, RING = range(3)  # causal_conv1d::History
FLOATS = st.sampled_from(TYPES[:3])
SEEDS = st.integers(0, 2**32).map(random.Random)

# ---- the arguments of the kernels, as in csrc/mamba


class View(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("type", ctypes.c_int32), ("strides", ctypes.c_int64 * 4)]


class IndexView(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("wide", ctypes.c_bool), ("strides", ctypes.c_int64 * 2)]




class Slots(ctypes.Structure):
    _fields_ = [
        ("source", IndexView), ("columns", ctypes.c_int64), ("where", ctypes.c_int32), ("destination", IndexView),
        ("num_accepted", IndexView), ("num_tokens", IndexView), ("parents", IndexView), ("slots", ctypes.c_int64),
        ("batch", ctypes.c_int64), ("tokens", ctypes.c_int64),
    ]  # fmt: skip


class Source(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p), ("strides", ctypes.c_int64 * 4), ("sizes", ctypes.c_int64 * 3),
        ("bytes", ctypes.c_int32), ("copies", ctypes.c_void_p),
    ]  # fmt: skip


class Sources(ctypes.Structure):
    _fields_ = [("of", Source * 3), ("count", ctypes.c_int32)]


class Staged(ctypes.Structure):
    _fields_ = [("copied", ctypes.c_void_p), ("copies", ctypes.c_void_p)]


class Taps(ctypes.Structure):
    _fields_ = [
        ("weight", View), ("bias", View), ("channels", ctypes.c_int64), ("width", ctypes.c_int64),
        ("silu", ctypes.c_bool),
    ]  # fmt: skip


class NormArgs(ctypes.Structure):
    _fields_ = [
        ("x", View), ("z", View), ("weight", View), ("y", ctypes.c_void_p), ("rows", ctypes.c_int64),
        ("groups", ctypes.c_int64), ("group_size", ctypes.c_int64), ("eps", ctypes.c_float),
        ("norm_before_gate", ctypes.c_bool),
    ]  # fmt: skip


class ConvArgs(ctypes.Structure):
    _fields_ = [
        ("x", View), ("taps", Taps), ("initial", View), ("final", View), ("state_indices", IndexView),
        ("has_initial", View), ("cu_seqlens", IndexView), ("checkpoint_tokens", IndexView),
        ("checkpoint_indices", IndexView), ("y", ctypes.c_void_p), ("sequences", ctypes.c_int64),
        ("tokens", ctypes.c_int64), ("length", ctypes.c_int64), ("kept", ctypes.c_int64), ("slots", ctypes.c_int64),
        ("checkpoints", ctypes.c_int64), ("tiles", ctypes.c_int64), ("channel_blocks", ctypes.c_int64),
    ]  # fmt: skip


class ConvUpdateArgs(ctypes.Structure):
    _fields_ = [
        ("x", View), ("taps", Taps), ("state", View), ("use", ctypes.c_int32), ("slots", Slots),
        ("cache_seqlens", IndexView), ("states", Staged), ("y", View), ("kept", ctypes.c_int64),
        ("channel_blocks", ctypes.c_int64),
    ]  # fmt: skip


class TimeStep(ctypes.Structure):
    _fields_ = [
        ("dt", View), ("A", View), ("bias", View), ("softplus", ctypes.c_bool), ("low", ctypes.c_float),
        ("high", ctypes.c_float),
    ]  # fmt: skip


class SsmArgs(ctypes.Structure):
    _fields_ = [
        ("state", View), ("scale", View), ("x", View), ("z", View), ("B", View), ("C", View), ("D", View), ("y", View),
        ("time", TimeStep), ("slots", Slots), ("states", Staged), ("scales", Staged), ("seed", ctypes.c_void_p),
        ("seed_stride", ctypes.c_int64), ("heads", ctypes.c_int64), ("heads_per_group", ctypes.c_int64),
        ("head_dim", ctypes.c_int64), ("d_state", ctypes.c_int64), ("tiles", ctypes.c_int64),
        ("vectors", ctypes.c_bool),
    ]  # fmt: skip


class MixerNorm(ctypes.Structure):
    _fields_ = [
        ("z", View), ("y", View), ("weight", View), ("group_size", ctypes.c_int64), ("eps", ctypes.c_float),
        ("norm_before_gate", ctypes.c_bool),
    ]  # fmt: skip


class DecodeArgs(ctypes.Structure):
    _fields_ = [("conv", ConvUpdateArgs), ("ssm", SsmArgs), ("norm", MixerNorm), ("groups", ctypes.c_int64)]


class Ring(ctypes.Structure):
    _fields_ = [("x", View), ("B", View), ("dt", View), ("pos", View), ("size", ctypes.c_int64)]


class ReplayArgs(ctypes.Structure):
    _fields_ = [("ssm", SsmArgs), ("ring", Ring), ("flush", ctypes.c_bool)]


class MoveArgs(ctypes.Structure):
    _fields_ = [
        ("ring", Ring), ("source", IndexView), ("num_accepted", IndexView), ("path", IndexView),
        ("batch", ctypes.c_int64), ("slots", ctypes.c_int64), ("tokens", ctypes.c_int64), ("heads", ctypes.c_int64),
        ("head_dim", ctypes.c_int64), ("groups", ctypes.c_int64), ("d_state", ctypes.c_int64),
        ("blocks", ctypes.c_int64),
    ]  # fmt: skip


@pytest.fixture(scope="session")
def kernels():
    loaded = load("mamba.cpp")
    loaded.size_of_arguments.restype = ctypes.c_int64
    return loaded


def test_the_structures_have_the_layout_of_the_kernels(kernels):
    structures = [NormArgs, ConvArgs, Slots, Sources, ConvUpdateArgs, SsmArgs, DecodeArgs, ReplayArgs, MoveArgs]
    for i, structure in enumerate(structures):
        assert ctypes.sizeof(structure) == kernels.size_of_arguments(i), structure.__name__


def view(t, before=0):
    """Of a tensor whose strides are given from number `before` on; None: not given."""
    if t is None:
        return View()
    return View(t.data_ptr(), TYPES.index(t.dtype), (ctypes.c_int64 * 4)(*[0] * before, *t.stride()))


def indices(t):
    if t is None:
        return IndexView()
    return IndexView(t.data_ptr(), t.dtype == torch.int64, (ctypes.c_int64 * 2)(*t.stride()))


def slots(state, batch, tokens, source, destination, num_accepted=None, num_tokens=None, parents=None):
    where = SOURCE if destination is None else (LAST, EACH)[destination.dim() - 1]
    columns = source.shape[1] if source is not None and source.dim() == 2 else 0
    counts = (indices(t) for t in (num_accepted, num_tokens, parents))
    return Slots(indices(source), columns, where, indices(destination), *counts, len(state), batch, tokens)


def stage(kernels, where, states):
    """The copies that the launchers make where there are destinations; keeps their memory on the kernels."""
    if where.where == SOURCE or not where.batch:
        return [Staged() for _ in states]
    sources, copied = Sources(count=len(states)), torch.full((where.batch,), 77, dtype=torch.uint8)
    kernels.kept = [copied]
    for i, s in enumerate(states):
        sizes, bytes_ = (list(s.shape[1:]) + [1, 1])[:3], s.element_size()
        strides = (list(s.stride()) + [0, 0])[:4]
        whole = s[0].numel()
        if s.is_contiguous() and whole * bytes_ % 16 == 0 and s.data_ptr() % 16 == 0:
            sizes, strides, bytes_ = [1, 1, whole * bytes_ // 16], [whole * bytes_ // 16, 0, 0, 1], 16
        copies = torch.full((where.batch * whole * s.element_size(),), 0x7F, dtype=torch.uint8)
        kernels.kept.append(copies)
        sources.of[i] = Source(
            s.data_ptr(), (ctypes.c_int64 * 4)(*strides), (ctypes.c_int64 * 3)(*sizes), bytes_, copies.data_ptr()
        )
    kernels.emulate_stage(ctypes.byref(where), ctypes.byref(sources), 2, ctypes.c_void_p(copied.data_ptr()))
    assert copied.max() <= 1
    return [Staged(copied.data_ptr(), copies.data_ptr()) for copies in kernels.kept[1:]]


def room(shape, dtype):
    """Uninitialised memory between fences: NaN wherever nothing was written."""
    return fenced(torch.full(shape, float("nan"), dtype=dtype))


def doubles(*tensors):
    return (None if t is None else t.double() for t in tensors)


def run(function, args, *more):
    function(ctypes.byref(args), *more)


# ---- gated norm


def norm(kernels, x, z, weight, group_size, eps, before, vectors, reverse=False):
    y, groups = room(x.shape, x.dtype), x.shape[1] // group_size
    run(kernels.emulate_norm, NormArgs(view(x), view(z), view(weight), y.data_ptr(), len(x), groups, group_size, eps,
                                       before), vectors, reverse)  # fmt: skip
    return y


@given(
    st.integers(1, 5), st.integers(1, 3), st.sampled_from([1, 7, 8, 64, 130, 264, 1024, 1032, 5000]), FLOATS, FLOATS,
    st.sampled_from(["none", "first", "last"]), st.booleans(), st.booleans(),
)  # fmt: skip
def test_gated_norm(kernels, rows, groups, size, dtype, weight_dtype, gate, strided, reverse):
    """Groups of every kernel, in vectors and not, which give the same bits."""
    dim = groups * size
    xz = fenced(torch.randn(rows, 2 * dim + 8).to(dtype))
    x, z = xz[:, :dim], xz[:, dim : 2 * dim] if gate != "none" else None
    if strided:
        x = fenced(torch.randn(rows, dim, 2).to(dtype))[..., 0]
    weight = fenced(torch.randn(dim).to(weight_dtype))
    args = size, 1e-5, gate == "last"
    y = norm(kernels, x, z, weight, *args, False, reverse)
    assert_close_to(y, reference.gated_rms_norm(*doubles(x, z, weight), *args))
    if size % 8 == 0 and not strided:
        assert_same_bits(y, norm(kernels, x, z, weight, *args, True))


# ---- convolution of prompts


def conv(kernels, x, weight, bias, activation, cu=None, state=None, sequences=0, where=None, has_initial=None,
         checkpoints=(None, None), final=None, vectors=False, reverse=False):  # fmt: skip
    packed, channels = cu is not None, x.shape[-1]
    length = 0 if packed else x.shape[1]
    y, kept = room(x.shape, x.dtype), (final if final is not None else state).shape[2]
    args = ConvArgs(
        view(x, 1 if packed else 0), Taps(view(weight), view(bias), channels, weight.shape[1], activation == "silu"),
        view(state), view(final if final is not None else state), indices(where), view(has_initial), indices(cu),
        indices(checkpoints[0]), indices(checkpoints[1]), y.data_ptr(), sequences, x[..., 0].numel(), length, kept,
        0 if where is None else len(state), 0 if checkpoints[0] is None else len(checkpoints[0]),
    )  # fmt: skip
    run(kernels.emulate_conv, args, vectors, reverse)
    return y


def conv_operands(tokens, channels, width, dtype, biased, layout):
    """x in rows, as a slice of a wider matrix, or turned."""
    if layout == "turned":
        x = fenced(torch.randn(*tokens[:-1], channels, tokens[-1]).to(dtype)).transpose(-1, -2)
    else:
        x = fenced(torch.randn(*tokens, channels + 8 * (layout == "slice")).to(dtype))[..., :channels]
    bias = fenced(torch.randn(channels)) if biased else None
    return x, fenced(torch.randn(channels, width)), bias


def assert_is_conv(y, truth, x, weight, bias):
    largest = x.double().abs().max() if x.numel() else 0.0
    assert_close_to(y, truth, 1e-6, largest * weight.double().abs().sum(1) + 1)


@given(
    st.lists(st.integers(0, 20), min_size=1, max_size=4), st.booleans(), st.sampled_from([1, 8, 136]),
    st.integers(1, 6), FLOATS, st.booleans(), st.sampled_from(["rows", "slice", "turned"]), st.booleans(),
    st.booleans(),
)  # fmt: skip
def test_conv1d(kernels, lengths, packed, channels, width, dtype, biased, layout, from_zero, reverse):
    """Packed and batched, empty sequences and padding behind the last."""
    cu, activation = None, "silu" if biased else None
    if packed:
        cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    tokens = (sum(lengths) + 2,) if packed else (len(lengths), lengths[0])
    x, weight, bias = conv_operands(tokens, channels, width, dtype, biased, layout)
    initial = None if from_zero else fenced(torch.randn(len(lengths), channels, width - 1).to(dtype))
    vectors = layout != "turned" and channels % 8 == 0 and width <= 4
    final = room((len(lengths), channels, width - 1), dtype)
    y = conv(kernels, x, weight, bias, activation, cu, initial, len(lengths), final=final, vectors=vectors,
             reverse=reverse)  # fmt: skip
    true_y, _ = reference.causal_conv1d(*doubles(x, weight, bias, initial), cu, activation=activation)
    _, true_final = reference.causal_conv1d(x, weight, bias, initial, cu)
    assert_is_conv(y, true_y, x, weight, bias)
    assert_same_bits(final, true_final)


@given(
    st.lists(st.integers(0, 20), min_size=1, max_size=4), st.booleans(), st.sampled_from([8, 136]), st.integers(1, 5),
    st.integers(0, 3), st.sampled_from(TYPES[:3:2]), st.booleans(), st.booleans(), st.booleans(), SEEDS,
)  # fmt: skip
def test_conv1d_slots(kernels, lengths, packed, channels, width, more, dtype, turned, some_start, reverse, rng):
    cu, count = None, len(lengths)
    if packed:
        cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    tokens = (sum(lengths) + 2,) if packed else (count, lengths[0])
    x, weight, bias = conv_operands(tokens, channels, width, dtype, True, "slice")
    total = x[..., 0].numel()
    order = rng.sample(range(count + 5), count + 3)
    where = torch.tensor(order[:count])
    where[rng.randrange(count)] = -1
    points = torch.tensor([rng.randrange(total) for _ in range(3)], dtype=torch.int32) if total else None
    places = torch.tensor([*order[count : count + 2], -1], dtype=torch.int32) if total else None
    state = fenced(torch.randn(count + 5, channels, width - 1 + more).to(dtype))
    if turned:
        state = state.transpose(1, 2).contiguous().transpose(1, 2)
    has_initial = torch.tensor([rng.random() < 0.5 for _ in range(count)]) if some_start else None
    want, slot = state.clone(), (where, has_initial, cu, points, places)
    true_y = reference.causal_conv1d_slots(*doubles(x, weight, bias, state), *slot, activation="silu")
    reference.causal_conv1d_slots(x, weight, bias, want, *slot)
    y = conv(kernels, x, weight, bias, "silu", cu, state, count, where, has_initial, (points, places),
             vectors=channels % 8 == 0 and width <= 4, reverse=reverse)  # fmt: skip
    assert_is_conv(y, true_y, x, weight, bias)
    assert_same_bits(state, want)


# ---- updates


def draw_slots(rng, batch, tokens, kind, accepted, counted, tree):
    """Indices of an update: sources with padding, destinations that are others' sources, counts, parents."""
    slots_ = 2 * batch + batch * tokens + 1
    order = rng.sample(range(slots_), slots_)
    call = {}
    if accepted:
        call["state_indices"] = torch.tensor(order[: 2 * batch]).view(batch, 2)
        call["num_accepted"] = torch.tensor([rng.randint(1, 2) for _ in range(batch)], dtype=torch.int32)
    elif rng.random() < 0.8:
        call["state_indices"] = torch.tensor(order[:batch], dtype=rng.choice([torch.int32, torch.int64]))
    if "state_indices" in call and batch > 1:
        call["state_indices"][rng.randrange(batch)] = -1
    rng.shuffle(order)  # any slot may be written, whoever reads it
    if kind == "last":
        call["dst_state_indices"] = torch.tensor(order[:batch])
    elif kind == "each":
        call["dst_state_indices"] = torch.tensor(order[: batch * tokens], dtype=torch.int32).view(batch, tokens)
        if tokens:
            call["dst_state_indices"][rng.randrange(batch), rng.randrange(tokens)] = -1
        if tree:
            parents = [[rng.randint(-1, t - 1) for t in range(tokens)] for _ in range(batch)]
            call["parents"] = torch.tensor(parents, dtype=torch.int32).view(batch, tokens)
    if counted:
        call["num_tokens"] = torch.tensor([rng.randint(0, tokens) for _ in range(batch)], dtype=torch.int32)
    return slots_, call


KINDS = st.sampled_from(["source", "last", "each"])


def conv_update(kernels, x, state, weight, bias, activation, cache_seqlens=None, reverse=False, **where):
    batch, tokens, channels = x.shape
    y = room(x.shape, x.dtype)
    plain = where.get("state_indices") is None or where["state_indices"].dim() == 1
    use = RING if cache_seqlens is not None else WINDOW if plain and "num_accepted" in where else SHIFT
    names = ("state_indices", "dst_state_indices", "num_accepted", "num_tokens", "parents")
    at = slots(state, batch, tokens, *(where.get(name) for name in names))
    (staged,) = stage(kernels, at, [state])
    taps = Taps(view(weight), view(bias), channels, weight.shape[1], activation == "silu")
    args = ConvUpdateArgs(view(x), taps, view(state), use, at, indices(cache_seqlens), staged, view(y), state.shape[2])
    run(kernels.emulate_conv_update, args, reverse)
    return y


def assert_is_conv_update(kernels, x, state, weight, bias, reverse, **where):
    want = state.clone()
    true_y = reference_decode.causal_conv1d_update(*doubles(x, state, weight, bias), activation="silu", **where)
    reference_decode.causal_conv1d_update(x, want, weight, bias, **where)
    y = conv_update(kernels, x, state, weight, bias, "silu", reverse=reverse, **where)
    assert_is_conv(y, true_y, x, weight, bias)
    assert_same_bits(state, want)


@given(
    st.integers(1, 4), st.integers(0, 6), st.sampled_from([1, 130]), st.integers(1, 6), st.integers(0, 3), FLOATS,
    KINDS, st.booleans(), st.booleans(), st.booleans(), st.booleans(), st.booleans(), SEEDS,
)  # fmt: skip
def test_conv1d_update_shift(
    kernels, batch, tokens, channels, width, more, dtype, kind, accepted, counted, tree, turned, reverse, rng
):
    x, weight, bias = conv_operands((batch, tokens), channels, width, dtype, True, "turned" if turned else "slice")
    count, where = draw_slots(rng, batch, tokens, kind, accepted, counted, tree)
    state = fenced(torch.randn(count, channels, width - 1 + more).to(dtype))
    if turned:
        state = state.transpose(1, 2).contiguous().transpose(1, 2)
    assert_is_conv_update(kernels, x, state, weight, bias, reverse, **where)


SWAP = {"state_indices": [0, 1, 2, 2, 5], "dst_state_indices": [1, 0, 3, 2, 4]}  # and two that go on from one slot


def test_conv1d_update_reads_before_it_writes(kernels):
    x, weight, bias = conv_operands((5, 2), 8, 4, torch.bfloat16, True, "rows")
    state = fenced(torch.randn(6, 8, 3).to(torch.bfloat16))
    assert_is_conv_update(kernels, x, state, weight, bias, False, **{k: torch.tensor(v) for k, v in SWAP.items()})


@pytest.mark.parametrize("own", [0, 1, 2])
def test_conv1d_update_keeps_what_later_states_need(kernels, own):
    """The state of one token goes to the slot that is read; the others still hold inputs from there."""
    x, weight, bias = conv_operands((1, 3), 8, 4, torch.bfloat16, True, "rows")
    state, to = fenced(torch.randn(4, 8, 6).to(torch.bfloat16)), torch.tensor([[1, 2, 3]])
    to[0, own] = 0
    assert_is_conv_update(kernels, x, state, weight, bias, False, dst_state_indices=to)


def test_conv1d_update_window_of_no_tokens(kernels):
    """Is copied where it goes to another slot, and left alone where not."""
    x, weight, bias = conv_operands((2, 3), 8, 4, torch.bfloat16, True, "rows")
    counts = {"num_accepted": torch.tensor([3, 1]).int(), "num_tokens": torch.tensor([0, 0]).int()}
    for where in ({}, {"dst_state_indices": torch.tensor([2, 1])}):
        state = fenced(torch.randn(3, 8, 5).to(torch.bfloat16))
        assert_is_conv_update(kernels, x, state, weight, bias, False, **counts, **where)


@given(
    st.integers(1, 4), st.integers(1, 6), st.integers(1, 5), st.booleans(), st.booleans(), st.booleans(), SEEDS
)
def test_conv1d_update_window(kernels, batch, tokens, width, moved, counted, reverse, rng):
    x, weight, bias = conv_operands((batch, tokens), 8, width, torch.bfloat16, True, "rows")
    count, where = draw_slots(rng, batch, tokens, "last" if moved else "source", False, counted, False)
    where["num_accepted"] = torch.tensor([rng.randint(1, tokens) for _ in range(batch)], dtype=torch.int32)
    state = fenced(torch.randn(count, 8, width - 2 + tokens).to(torch.bfloat16))
    assert_is_conv_update(kernels, x, state, weight, bias, reverse, **where)


@given(st.integers(1, 4), st.integers(0, 9), st.integers(1, 5), st.integers(0, 4), st.booleans(), SEEDS)
def test_conv1d_update_ring(kernels, batch, tokens, width, more, counted, rng):
    x, weight, bias = conv_operands((batch, tokens), 8, width, torch.float16, True, "rows")
    count, where = draw_slots(rng, batch, tokens, "source", False, counted, False)
    where["cache_seqlens"] = torch.tensor([rng.randint(0, 20) for _ in range(batch)], dtype=torch.int32)
    state = fenced(torch.randn(count, 8, width - 1 + more).to(torch.float16))
    assert_is_conv_update(kernels, x, state, weight, bias, False, **where)


def ssm_update(kernels, state, x, dt, A, B, C, D=None, z=None, dt_bias=None, state_scale=None, seed=None,
               rounding="nearest", dt_softplus=True, dt_min=0.0, dt_max=None, reverse=False, **where):  # fmt: skip
    batch, tokens, heads, head_dim = x.shape
    y, d_state = room(x.shape, x.dtype), B.shape[-1]
    names = ("state_indices", "dst_state_indices", "num_accepted", "num_tokens", "parents")
    at = slots(state, batch, tokens, *(where.get(name) for name in names))
    scales = [] if state_scale is None else [state_scale]
    staged = stage(kernels, at, [state, *scales]) + [Staged()]
    time = TimeStep(view(dt), view(A), view(dt_bias), dt_softplus, dt_min, float("inf") if dt_max is None else dt_max)
    vectors = state.stride(3) == 1 and not any(n % 4 for n in (*state.stride()[:3], d_state))
    skip = View() if D is None else view(D if D.dim() == 2 else D[:, None].expand(-1, head_dim))
    args = SsmArgs(
        view(state), view(state_scale), view(x), view(z), view(B), view(C), skip, view(y), time, at, *staged[:2],
        seed.data_ptr() if rounding == "stochastic" and state.dtype != torch.float32 else None,
        1 if seed is None else seed.stride(0), heads, heads // B.shape[-2], head_dim, d_state, 0, vectors,
    )  # fmt: skip
    run(kernels.emulate_ssm_update, args, reverse)
    return y


def ssm_operands(batch, tokens, layout, dtype, full):
    heads, groups, head_dim, d_state = layout
    widths = [heads * head_dim, heads * head_dim, groups * d_state, groups * d_state, heads]
    z, x, B, C, dt = fenced(torch.randn(batch, tokens, sum(widths)).to(dtype)).split(widths, -1)
    return {
        "x": x.unflatten(-1, (heads, head_dim)), "dt": dt, "A": fenced(-torch.rand(heads)),
        "B": B.unflatten(-1, (groups, d_state)), "C": C.unflatten(-1, (groups, d_state)),
        "D": fenced(torch.randn(heads, head_dim) if full else torch.randn(heads)),
        "z": z.unflatten(-1, (heads, head_dim)) if full else None,
        "dt_bias": fenced(torch.randn(heads).to(dtype)) if full else None,
    }  # fmt: skip


# heads, groups, head_dim, d_state: rows of 8 lanes and of 16, and rows that cannot be read in vectors
LAYOUTS = [(4, 2, 5, 16), (2, 1, 17, 128), (3, 1, 2, 7), (2, 2, 3, 256), (1, 1, 2, 300), (2, 2, 1, 96)]


@given(
    st.integers(1, 3), st.integers(0, 5), st.sampled_from(LAYOUTS), FLOATS, FLOATS, KINDS, st.booleans(),
    st.booleans(), st.booleans(), st.booleans(), st.booleans(), st.booleans(), SEEDS,
)  # fmt: skip
def test_ssm_update(
    kernels, batch, tokens, layout, dtype, state_dtype, kind, accepted, counted, tree, full, strided, reverse, rng
):
    count, where = draw_slots(rng, batch, tokens, kind, accepted, counted, tree)
    call = ssm_operands(batch, tokens, layout, dtype, full)
    heads, _, head_dim, d_state = layout
    state = fenced(torch.randn(count, heads, head_dim, d_state * (2 if strided else 1)).to(state_dtype))
    state = state[..., ::2] if strided else state
    want, before = state.double(), state.clone()
    wide = {name: t if t is None else t.double() for name, t in call.items()}
    true_y = reference_decode.ssm_update(want, **wide, **where, dt_max=0.7)
    y = ssm_update(kernels, state, **call, **where, dt_max=0.7, reverse=reverse)
    size = 10 + d_state  # of the sums, generously: the errors looked for are those of indices
    assert_close_to(y, true_y, 1e-6 * size, true_y.abs() + size)
    assert_close_to(state, want, 1e-5)
    same = (want == before.double()).flatten(1).all(1)
    assert_same_bits(state[same].contiguous(), before[same].contiguous())


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_ssm_update_reads_before_it_writes(kernels, dtype):
    call, where = ssm_operands(5, 1, (2, 1, 3, 16), torch.float32, True), {k: torch.tensor(v) for k, v in SWAP.items()}
    state, scale = torch.randint(-127, 128, (6, 2, 3, 16)).to(dtype), torch.rand(6, 2, 3) + 0.5
    scale = scale if dtype == torch.int8 else None
    want, want_scale = state.clone(), None if scale is None else scale.clone()
    true_y = reference_decode.ssm_update(want, **call, **where, state_scale=want_scale)
    y = ssm_update(kernels, state, **call, **where, state_scale=scale)
    assert_close_to(y, true_y, 1e-5, true_y.abs() + 500)
    assert (state.float() - want.float()).abs().max() <= (1 if dtype == torch.int8 else 1e-3)
    if scale is not None:
        assert_close_to(scale, want_scale, 1e-5)


def test_values_that_nobody_checked_touch_nothing(kernels):
    """On a GPU reading an index would wait for the device: slots out of range are padding, counts are clamped."""
    call, state = ssm_operands(3, 2, (2, 1, 3, 16), torch.float32, True), fenced(torch.randn(3, 2, 3, 16))
    want = state.clone()
    odd = {"state_indices": [[0, 3], [2, 2**40], [1, 9]], "num_accepted": [-4, 7, 1], "num_tokens": [99, 2, -1]}
    even = {"state_indices": [[0], [-1], [1]], "num_accepted": [1, 1, 1], "num_tokens": [2, 2, 0]}
    odd, even = ({k: torch.tensor(v, dtype=torch.int64 if k[0] == "s" else torch.int32) for k, v in where.items()}
                 for where in (odd, even))  # fmt: skip
    assert_same_bits(ssm_update(kernels, state, **call, **odd), ssm_update(kernels, want, **call, **even))
    assert_same_bits(state, want)
    x, weight, bias = conv_operands((3, 2), 8, 4, torch.float32, True, "rows")
    conv_state = fenced(torch.randn(3, 8, 4))
    before = conv_state.clone()
    conv_update(kernels, x, conv_state, weight, bias, None, dst_state_indices=torch.tensor([3, -7, 2**33]))
    assert_same_bits(conv_state, before)


def test_ssm_update_of_an_infinite_decay(kernels):
    """Lanes behind a short row do not make NaN of infinity times nothing."""
    call, state = ssm_operands(1, 1, (1, 1, 1, 4), torch.float32, False), torch.ones(1, 1, 1, 4)
    call |= {"A": torch.ones(1), "dt": torch.full((1, 1, 1), 1e3), "D": None}
    call |= {name: torch.ones(1, 1, 1, n) for name, n in (("x", 1), ("B", 4), ("C", 4))}
    y = ssm_update(kernels, state, **call, dt_softplus=False)
    assert y.item() == float("inf") and state.eq(float("inf")).all()


@pytest.mark.parametrize("tokens", [15, 17, 40])
@pytest.mark.parametrize("tree", [False, True])
def test_ssm_update_many_tokens(kernels, tokens, tree):
    """More steps than are kept in shared memory at a time; a tree walks its paths again."""
    layout = (1, 1, 3, 16)
    call, state = ssm_operands(1, tokens, layout, torch.float32, True), fenced(torch.randn(tokens + 1, 1, 3, 16))
    where = {}
    if tree:
        parents = torch.tensor([[t - 1 if t % 4 else t // 3 - 1 for t in range(tokens)]], dtype=torch.int32)
        where = {"parents": parents, "dst_state_indices": torch.arange(tokens, dtype=torch.int32)[None]}
    want = state.double()
    wide = {name: t.double() for name, t in call.items()}
    true_y = reference_decode.ssm_update(want, **wide, **where)
    y = ssm_update(kernels, state, **call, **where)
    assert_close_to(y, true_y, 1e-5, true_y.abs() + 10)
    assert_close_to(state, want, 1e-5)


@pytest.mark.parametrize("layout", LAYOUTS[:4])
def test_ssm_update_many_tokens_are_many_calls(kernels, layout):
    call, at_once = ssm_operands(2, 4, layout, torch.bfloat16, True), torch.randn(2, layout[0], *layout[2:])
    one_by_one = at_once.clone()
    y = ssm_update(kernels, at_once, **call)
    for t in range(4):
        token = {k: v[:, t : t + 1] if k in ("x", "dt", "B", "C", "z") else v for k, v in call.items()}
        assert_same_bits(y[:, t : t + 1].contiguous(), ssm_update(kernels, one_by_one, **token))
    assert_same_bits(at_once, one_by_one)


def assert_same_but_nan(a, b):
    """Byte for byte, whatever the bits of NaN."""
    assert torch.equal(a.isnan(), b.isnan())
    assert_same_bits(a.masked_fill(a.isnan(), 7), b.masked_fill(b.isnan(), 7))


@pytest.mark.parametrize("dtype", TYPES[:5])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("layout", [(2, 1, 3, 64), (2, 1, 3, 7)])
def test_ssm_update_rounds_as_the_reference(kernels, dtype, rounding, layout):
    """From a state of 0 and with x = dt = 1 the new state is B, exactly: any bits, all modes, byte for byte."""
    heads, _, head_dim, d_state = layout
    call = ssm_operands(4, 1, layout, torch.float32, False)
    call["x"], call["dt"], call["D"] = torch.ones(4, 1, heads, head_dim), torch.ones(4, 1, heads), None
    B = torch.randint(-(2**31), 2**31 - 1, (4, 1, 1, d_state), dtype=torch.int32).view(torch.float32)
    B[1] = torch.randn(1, 1, d_state) * 2.0 ** torch.randint(-30, 18, (1, 1, d_state))
    B[2] = torch.randint(-254, 255, (1, 1, d_state)) / 2
    B[3] = torch.randn(1, 1, d_state) * 1e-41
    B[0, 0, 0, :6] = torch.tensor([65504.0, 65519.0, 65520.0, -3.4e38, 3.39e38, float("inf")])
    call["B"] = fenced(B)
    state = torch.zeros(5, heads, head_dim, d_state).to(dtype)
    scale = torch.ones(5, heads, head_dim) if dtype in TYPES[3:] else None
    where = {"state_indices": torch.tensor([3, 0, 4, 1])}
    seed = torch.tensor([0x123456789ABCDEF, 2**40 - 1])
    want, want_scale = state.clone(), None if scale is None else scale.clone()
    options = {"rounding": rounding, "seed": seed, "dt_softplus": False}
    reference_decode.ssm_update(want, **call, **where, **options, state_scale=want_scale)
    ssm_update(kernels, state, **call, **where, **options, state_scale=scale)
    if scale is not None:
        assert_same_but_nan(scale, want_scale)
        assert_same_bits(state, want)
    else:
        assert_same_but_nan(state, want)


@given(
    st.sampled_from([torch.int8, torch.float8_e4m3fn]), st.sampled_from(["nearest", "stochastic"]), KINDS,
    st.booleans(), SEEDS,
)  # fmt: skip
def test_ssm_update_of_8_bits(kernels, dtype, rounding, kind, counted, rng):
    """Scales are staged and written with their rows; values agree but for a code on either side of a tie."""
    layout = (2, 1, 3, 32)
    count, where = draw_slots(rng, 2, 3, kind, False, counted, False)
    call = ssm_operands(2, 3, layout, torch.float32, True)
    state = torch.randint(-127, 128, (count, 2, 3, 32)).to(torch.int8)
    state = state if dtype == torch.int8 else (state / 30).to(dtype)
    scale, seed = fenced(torch.rand(count, 2, 3)), torch.tensor([5, 7])
    options = {"rounding": rounding, "seed": seed, **where}
    want, want_scale = state.clone(), scale.clone()
    true_y = reference_decode.ssm_update(want, **call, **options, state_scale=want_scale)
    y = ssm_update(kernels, state, **call, **options, state_scale=scale)
    assert_close_to(y, true_y, 1e-5, true_y.abs() + 50)
    assert_close_to(scale, want_scale, 1e-5)
    codes, true_codes = (t.float().reshape(-1) for t in (state, want))
    away = codes != true_codes
    assert away.float().mean() < 0.01
    assert ((codes - true_codes).abs() <= true_codes.abs().clamp(min=1) / 6)[away].all()


# ---- ring of tokens


class Rings:
    """State and ring of some slots, and the operators on them, on kernels or by the reference."""

    def __init__(self, layout, count, size, dtype, state_dtype, kernels=None):
        self.kernels, (self.heads, self.groups, self.head_dim, self.d_state) = kernels, layout
        self.state = fenced(torch.randn(count, self.heads, self.head_dim, self.d_state).to(state_dtype))
        self.x = room((count, size, self.heads, self.head_dim), dtype)
        self.B = room((count, size, self.groups, self.d_state), dtype)
        self.dt = room((count, size, self.heads), torch.float32)
        self.pos = torch.stack([torch.arange(count) % size, torch.zeros(count).long()], 1).int()

    def tensors(self):
        return self.state, self.x, self.B, self.dt, self.pos

    def copy_for(self, kernels):
        copy = object.__new__(Rings)
        copy.__dict__ = self.__dict__ | {"kernels": kernels}
        copy.state, copy.x, copy.B, copy.dt, copy.pos = (t.clone() for t in self.tensors())
        return copy

    def ring(self):
        pos = View(self.pos.data_ptr(), 0, (ctypes.c_int64 * 4)(*self.pos.stride()))
        return Ring(view(self.x), view(self.B), view(self.dt), pos, self.x.shape[1])

    def ssm_args(self, x, z, B, C, D, y, time, source, parents):
        batch, tokens = (len(source), 0) if x is None else x.shape[:2]
        at = slots(self.state, batch, tokens, source, None, parents=parents)
        return SsmArgs(
            view(self.state), View(), view(x), view(z), view(B), view(C),
            View() if D is None else view(D[:, None].expand(-1, self.head_dim)), view(y), time, at, Staged(), Staged(),
            None, 1, self.heads, self.heads // self.groups, self.head_dim, self.d_state, 0, self.d_state % 4 == 0,
        )  # fmt: skip

    def move_args(self, source, num_accepted=None, path=None, tokens=0):
        sizes = len(source), len(self.state), tokens, self.heads, self.head_dim, self.groups, self.d_state
        return MoveArgs(self.ring(), indices(source), indices(num_accepted), indices(path), *sizes)

    def update(self, call, source, parents, reverse):
        if self.kernels is None:
            return reference_decode.ssm_replay_update(*self.tensors(), **call, state_indices=source, parents=parents)
        y = room(call["x"].shape, call["x"].dtype)
        time = TimeStep(view(call["dt"]), view(call["A"]), view(call["dt_bias"]), True, 0.0, float("inf"))
        operands = (call[name] for name in ("x", "z", "B", "C", "D"))
        args = ReplayArgs(self.ssm_args(*operands, y, time, source, parents), self.ring(), False)
        run(self.kernels.emulate_replay, args, None, reverse)
        return y

    def commit(self, num_accepted, tokens, path, source, reverse):
        if self.kernels is None:
            ring = (self.pos, self.x, self.B, self.dt)
            return reference_decode.ssm_replay_commit(*ring, num_accepted, tokens, path, source)
        return run(self.kernels.emulate_commit, self.move_args(source, num_accepted, path, tokens), reverse)

    def flush(self, A, source):
        if self.kernels is None:
            return reference_decode.ssm_replay_flush(self.state, self.pos, self.x, self.B, self.dt, A, source)
        time = TimeStep(View(), view(A))
        args = ReplayArgs(self.ssm_args(None, None, None, None, None, None, time, source, None), self.ring(), True)
        return run(self.kernels.emulate_replay, args, ctypes.byref(self.move_args(source)), False)


def path_to(parents, t):
    return [] if t < 0 else [*path_to(parents, parents[t]), t]


@given(
    st.integers(1, 3), st.integers(1, 4), st.integers(0, 5), st.sampled_from([(4, 2, 5, 16), (3, 1, 2, 7)]), FLOATS,
    FLOATS, st.booleans(), st.booleans(), SEEDS,
)  # fmt: skip
def test_ssm_replay(kernels, batch, tokens, more, layout, dtype, state_dtype, tree, reverse, rng):
    """Rounds of drafting and accepting through several turns of the ring, and a flush: as the reference."""
    size, count = 2 * tokens + more, batch + 2
    wanted = Rings(layout, count, size, dtype, state_dtype)
    ours = wanted.copy_for(kernels)
    source = torch.tensor(rng.sample(range(count), batch))
    if batch > 1:
        source[rng.randrange(batch)] = -1
    for _ in range(5):
        call = ssm_operands(batch, tokens, layout, dtype, True)
        call["D"], parents, path = torch.randn(layout[0]), None, None
        accepted = torch.tensor([rng.randint(0, tokens) for _ in range(batch)], dtype=torch.int32)
        if tree:
            parents = torch.tensor([[rng.randint(-1, t - 1) for t in range(tokens)] for _ in range(batch)]).int()
            paths = [path_to(p, rng.randrange(tokens)) for p in parents.tolist()]
            accepted = torch.tensor([len(p) for p in paths], dtype=torch.int32)
            path = torch.tensor([p + [0] * (tokens - len(p)) for p in paths], dtype=torch.int32)
        results = [rings.update(call, source, parents, reverse) for rings in (ours, wanted)]
        acc = 1e-2 if dtype == torch.bfloat16 else 2e-3
        assert_close_to(results[0], results[1].double(), acc, 10 + results[1].abs())
        for rings in (ours, wanted):
            rings.commit(accepted, tokens, path, source, reverse)
        assert_same_rings(ours, wanted)
    for rings in (ours, wanted):
        rings.flush(call["A"], source)
    assert_same_rings(ours, wanted)


def assert_same_rings(ours, wanted):
    assert_same_bits(ours.pos, wanted.pos)
    assert_same_but_nan(ours.x, wanted.x)
    assert_same_but_nan(ours.B, wanted.B)
    assert torch.equal(ours.dt.isnan(), wanted.dt.isnan())
    assert_close_to(ours.dt.nan_to_num(7.0), wanted.dt.nan_to_num(7.0))
    assert_close_to(ours.state, wanted.state, 1e-2 if ours.state.dtype == torch.bfloat16 else 2e-3)


# ---- the whole mixer


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


def pointer(t):
    return ctypes.c_void_p(t.data_ptr())


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
