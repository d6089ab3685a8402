"""The text of the CUDA kernels of mtp_commit and thinking_budget, run on the CPU by tests/cuda_emulator.

It proves nothing about a GPU, where the same operators are tested through the dispatcher. The structures of arguments
are filled in here as the launchers do it. The truth is the definition, and the C++ kernels where they are built.
"""

from __future__ import annotations

import ctypes
import random
from ctypes import c_int64, c_void_p

import pytest
import torch
from conftest import backends_here, fenced
from kernel_text import load, needs_emulator

from n3kernels import use_backend
from n3kernels.mtp import commit, reference, reference_commit, thinking_budget

pytestmark = needs_emulator
INT, LONG = torch.int32, torch.int64
NOTHING = torch.iinfo(INT).min  # in an output: not written


class CommitArgs(ctypes.Structure):
    _fields_ = [(name, c_void_p) for name in (
        "tokens", "num_emitted", "cu_rows", "slot", "eos_ids", "max_len", "seq_len", "finished", "ring_pos",
        "histogram", "num_accepted", "last_token", "last_row", "kv_start", "kv_free", "flat", "cu_emitted",
    )] + [
        ("seq_stride", c_int64), ("finished_stride", c_int64), ("ring_strides", c_int64 * 2),
        ("histogram_stride", c_int64),
    ] + [(name, c_int64) for name in (
        "requests", "width", "slots", "eos", "bins", "ring_size", "ring_tokens",
    )]  # fmt: skip


class BudgetArgs(ctypes.Structure):
    _fields_ = [(name, c_void_p) for name in (
        "drafts", "cu_rows", "tail", "num_output", "active", "budget", "grace", "end_ids", "end_think_ids", "newlines",
        "forced",
    )] + [(name, c_int64) for name in (
        "rows", "requests", "reach", "end_step", "end_size", "strings", "string_size", "words",
    )]  # fmt: skip


@pytest.fixture(scope="session")
def kernels():
    loaded = load("mtp_state.cpp")
    loaded.size_of_arguments.restype = c_int64
    return loaded


def test_the_structures_have_the_layout_of_the_kernels(kernels):
    for i, structure in enumerate([CommitArgs, BudgetArgs]):
        assert ctypes.sizeof(structure) == kernels.size_of_arguments(i), structure.__name__


def ints(*values, dtype=INT):
    return fenced(torch.tensor(values, dtype=dtype))


def at(t):
    return None if t is None else t.data_ptr()


def room(*shape):
    """An output between fences that nothing was written to."""
    return fenced(torch.full(shape, NOTHING, dtype=INT))


def truths(name, operator, definition):
    """The definition, and the C++ kernel where it is built."""
    yield definition
    if "cpu" in backends_here([name]):

        def kernel(*args, **options):
            with use_backend("cpu"):
                return operator(*args, **options)

        yield kernel


# ---------------------------------------------------------------- commit


def emulated_commit(
    kernels, tokens, num_emitted, cu_rows, seq_len, *, slot=None, eos_ids=None, max_len=None, finished=None,
    histogram=None, ring_pos=None, ring_size=0, ring_tokens=0, reversed=False,
):  # fmt: skip
    b, width = tokens.shape
    out = [room(b) for _ in range(5)] + [room(b * width), room(b + 1)]

    def stride(t):
        return 0 if t is None else t.stride(0)

    args = CommitArgs(
        at(tokens), at(num_emitted), at(cu_rows), at(slot), at(eos_ids), at(max_len), at(seq_len), at(finished),
        at(ring_pos), at(histogram), *map(at, out), stride(seq_len), stride(finished),
        (c_int64 * 2)(*(ring_pos.stride() if ring_pos is not None else (0, 0))), stride(histogram), b, width,
        len(seq_len), 0 if eos_ids is None else len(eos_ids), 0 if histogram is None else len(histogram), ring_size,
        ring_tokens,
    )  # fmt: skip
    kernels.emulate_commit(ctypes.byref(args), reversed)
    return out


def strided(t):
    """The same in a larger tensor, with gaps: state is written in place whatever its strides."""
    wide = torch.full([2 * n for n in t.shape], NOTHING, dtype=t.dtype)
    view = wide[tuple(slice(None, None, 2) for _ in t.shape)]
    view.copy_(t)
    return wide, view


def commits(b, k, seed, bare=False):
    """Arguments and state of a call: some slots out of range, some requests without a token."""
    rng = random.Random(seed)
    slots, length = b + rng.randint(0, 3), 2 * (k + 1) + rng.randint(0, 3)
    slot = rng.sample(range(slots), b)
    slot = [s if rng.random() < 0.8 else rng.choice([-1, slots, 2**31 - 1]) for s in slot]
    emitted = [rng.choice([-1, 0, 1, k + 1, k + 5, rng.randint(1, k + 1)]) for _ in range(b)]
    tokens = [[rng.randint(0, 9) if j < n else -1 for j in range(k + 1)] for n in emitted]
    cu = [0]
    for _ in range(b):
        cu.append(cu[-1] + rng.randint(1, k + 1))
    seq = [rng.randint(0, 50) for _ in range(slots)]
    args = [ints(*tokens).view(b, k + 1), ints(*emitted), ints(*cu)]
    state, options = {"seq_len": ints(*seq)}, {}
    if not bare:
        most = [n + rng.randint(0, 6) for n in seq]
        rings = [[rng.randint(0, length - 1), rng.randint(0, length - k - 1)] for _ in seq]
        state |= {
            "finished": ints(*[rng.choice([0, 1, 4]) for _ in seq]), "ring_pos": ints(*rings).view(slots, 2),
            "histogram": ints(*range(rng.randint(1, k + 3)), dtype=LONG),
        }  # fmt: skip
        options = {"slot": ints(*slot), "eos_ids": ints(7, 3), "max_len": ints(*most)}
        options |= {"ring_size": length, "ring_tokens": k + 1}
    return args, state, options


@pytest.mark.parametrize("b, k", [(0, 2), (1, 0), (3, 4), (32, 3), (256, 1), (257, 7), (700, 2)])
@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("reversed", [False, True])
def test_commit(kernels, b, k, bare, reversed):
    args, state, options = commits(b, k, b + k, bare)
    for truth in truths("mtp_commit", commit, reference_commit.mtp_commit):
        wide, views = {}, {}
        for name, t in state.items():
            wide[name], views[name] = strided(t)
        mine = emulated_commit(kernels, *args, **views, **options, reversed=reversed)
        expected = {name: t.clone() for name, t in state.items()}
        for a, c in zip(mine, truth(*args, **expected, **options), strict=True):
            assert torch.equal(a, c)
        for name, t in expected.items():
            assert torch.equal(views[name], t), name
            views[name].fill_(NOTHING)
            assert (wide[name] == NOTHING).all(), f"{name}: written between the elements"


def test_commit_folds_a_ring_at_a_start_near_the_largest_number(kernels):
    """start + count needs 64 bits."""
    size, start, count = 2**31 - 1, 2**31 - 2, 2**31 - 4
    ring, seq_len = ints([start, count]), ints(0)
    emulated_commit(kernels, ints([4, 5]), ints(2), ints(0, 2), seq_len, ring_pos=ring, ring_size=size, ring_tokens=2)
    assert ring.tolist() == [[(start + count) % size, 2]] and seq_len.tolist() == [2]


# ---------------------------------------------------------------- thinking budget


def emulated_budget(
    kernels, drafts, cu_rows, tail, num_output, active, budget, grace, end_ids, end_think, newlines, reversed=False
):
    forced = fenced(torch.full_like(drafts, -1))  # as the launcher's memset leaves it
    args = BudgetArgs(
        at(drafts), at(cu_rows), at(tail), at(num_output), at(active), at(budget), at(grace), at(end_ids),
        at(end_think), at(newlines), at(forced), len(drafts), len(cu_rows) - 1, tail.shape[1],
        end_ids.shape[1] if end_ids.dim() == 2 else 0, end_ids.shape[-1],
        end_think.shape[0] if end_think.dim() == 2 else 1, end_think.shape[-1], len(newlines),
    )  # fmt: skip
    kernels.emulate_budget(ctypes.byref(args), reversed)
    return forced


def budgets(b, longest, seed):
    """A batch whose requests differ in all, with few tokens, so that strings and newlines happen by themselves."""
    rng = random.Random(seed)
    reach = rng.randint(3, 40)

    def some(n):
        return [rng.choice([5, 6, 7, 8]) for _ in range(n)]

    def padded(n):
        length = rng.randint(0, n)
        return some(length) + [-1] * (n - length)

    drafts, cu = [4], [1]  # a row before the first request's
    for _ in range(b):
        k = rng.choice([0, 1, 3, longest])
        drafts += [t if rng.random() < 0.99 else -1 for t in some(k)] + [rng.choice([-1, 6])]
        cu.append(len(drafts))
    drafts += [6, 6]
    per_request = rng.random() < 0.5
    return (
        ints(*drafts), ints(*cu), ints(*[some(reach) for _ in range(b)]).view(b, reach),
        ints(*[rng.randint(0, reach + 5) for _ in range(b)]), ints(*[rng.choice([0, 1, 1, -1]) for _ in range(b)]),
        ints(*[rng.randint(-1, reach + longest) for _ in range(b)]), ints(*[rng.randint(-2, 9) for _ in range(b)]),
        ints(*[padded(3) for _ in range(b)]).view(b, 3) if per_request else ints(*padded(3)),
        ints(*[padded(2) for _ in range(2)]) if rng.random() < 0.5 else ints(*padded(3)),
        ints(*([1 << rng.choice([5, 7, 9])] if rng.random() < 0.8 else [])),
    )  # fmt: skip


@pytest.mark.parametrize("b, longest", [(0, 1), (1, 0), (3, 5), (5, 31), (4, 33), (9, 70)])
def test_budget(kernels, b, longest):
    for seed in range(25):
        args = budgets(b, longest, seed)
        mine = emulated_budget(kernels, *args, reversed=bool(seed % 2))
        for truth in truths("thinking_budget", thinking_budget, reference.thinking_budget):
            assert torch.equal(mine, truth(*args)), seed


def budget_of_one(kernels, drafts, tail, n, budget, grace, end_ids=(8, 5), newlines=1 << 8):
    args = (
        ints(*drafts, -1), ints(0, len(drafts) + 1), ints(tail), ints(n), ints(1), ints(budget), ints(grace),
        ints(*end_ids), ints(9), ints(newlines),
    )  # fmt: skip
    mine = emulated_budget(kernels, *args)
    assert torch.equal(mine, reference.thinking_budget(*args))
    return mine.tolist()


def test_budget_across_the_rows_of_two_votes(kernels):
    """What begins in the first 32 rows of a request holds in the next, and what ends there as well."""
    drafts = [1] * 30 + [8, 8, 5, 1, 1]
    forced = budget_of_one(kernels, drafts, [1, 1, 1], 2, 32, 0, end_ids=(8, 8, 5))
    assert forced == [-1] * 30 + [8, 8, 5, -1, -1, -1]
    assert budget_of_one(kernels, [8] + [1] * 40, [1, 1], 2, 3, 90) == [-1, 5] + [8] * 40, "begun at a newline"


def test_budget_and_the_committed_tail(kernels):
    assert budget_of_one(kernels, [], [8] + [1] * 39, 40, 1, 90) == [8], "at a newline 40 tokens ago"
    assert budget_of_one(kernels, [2], [8, 1], 1, 0, 9) == [-1, -1], "a newline of the prompt"
    assert budget_of_one(kernels, [2], [1, 8], 0, 0, 0) == [8, 8], "a part of the end string in the prompt"


def test_budget_of_offsets_out_of_range(kernels):
    args = (
        ints(*[-1] * 6), ints(1, 2, 2, 99), ints(*[[1, 2]] * 3), ints(2, 2, 2), ints(1, 1, 1), ints(0, 0, 0),
        ints(0, 0, 0), ints([3, -1], [4, -1], [6, 5]), ints(5), ints(),
    )  # fmt: skip
    assert emulated_budget(kernels, *args).tolist() == [-1, 3, 6, -1, -1, -1]
