"""The text of the CUDA kernels of ssm_replay_update, _commit and _flush, run on the CPU."""

from __future__ import annotations

import ctypes

import pytest
import torch
from conftest import assert_close_to, assert_same_bits, fenced
from hypothesis import given
from hypothesis import strategies as st
from kernel_arguments import (
    MoveArgs,
    ReplayArgs,
    Ring,
    SsmArgs,
    Staged,
    TimeStep,
    View,
    indices,
    load_kernels,
    room,
    run,
    slots,
    view,
)  # fmt: skip
from kernel_problems import FLOATS, SEEDS, assert_same_but_nan, ssm_operands
from kernel_text import needs_emulator

from n3kernels.mamba import reference_decode

pytestmark = needs_emulator


@pytest.fixture(scope="session")
def kernels():
    return load_kernels()


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
