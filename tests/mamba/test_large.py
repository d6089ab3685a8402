"""Offsets of more than 2^31 elements: far strides, large outputs and caches, held to the same calls on small tensors.

Only what is used of the large inputs costs memory: the rest is never touched, and an operating system that gives out
memory by the page never provides it. On a GPU all of it is there.
"""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICE, assert_close_to, assert_same_bits, backends_here
from expanses import GB, LIMIT, expanse, needs, unpoisoned  # noqa: F401 (a fixture)
from mixer_problems import INT, mixer
from ssd_problems import operands, states

from n3kernels import _philox, use_backend
from n3kernels.mamba import (
    causal_conv1d,
    causal_conv1d_slots,
    causal_conv1d_update_slots,
    gated_rms_norm,
    mamba2_decode,
    mamba2_prefill,
    ssd_scan,
    ssd_scan_slots,
    ssm_replay_commit,
    ssm_replay_flush,
    ssm_replay_update,
    ssm_update,
)
from n3kernels.mamba.rounding import round_stochastic

pytestmark = pytest.mark.slow


# ---------------------------------------------------------------- far strides


class Far:
    """Copies of small tensors whose elements lie more than 2^31 apart, all in one memory.

    Its rows have 2 MiB. A copy has columns of its own and strides of whole rows, so that no two copies meet.
    """

    ROW = 2**21

    def __init__(self):
        self.memory = expanse(4 * LIMIT + 150 * self.ROW, dtype=torch.uint8)

    def start(self):
        self.column = 0
        return self

    def __call__(self, t: torch.Tensor | None, axis: int) -> torch.Tensor | None:
        """`t` with the far stride in dimension `axis`, or in the next before it that has more than one element."""
        axis = None if t is None else next((d for d in range(min(axis, t.dim() - 1), -1, -1) if t.shape[d] > 1), None)
        if axis is None:
            return t
        size, steps = t.dtype.itemsize, t.shape[axis] - 1
        stride = -(-LIMIT * size // (steps * self.ROW)) * self.ROW // size
        assert steps * stride >= LIMIT
        near = torch.empty_like(t.select(axis, 0), memory_format=torch.contiguous_format).stride()
        strides = (*near[:axis], stride, *near[axis:])
        view = self.memory.view(t.dtype).as_strided(t.shape, strides, self.column // size)
        self.column += -(-t.numel() // t.shape[axis] * size // 64) * 64
        assert self.column <= self.ROW
        if t.dtype == torch.float8_e4m3fn:
            view.view(torch.uint8).copy_(t.view(torch.uint8))
        else:
            view.copy_(t)
        return view


@pytest.fixture(scope="module")
def arena():
    return Far()


SMALL = (4, 2, 8, 16)
SLOTS = torch.tensor([3, 1], device=DEVICE)


def convolution(dtype):
    channels = 48
    x, weight = torch.randn(2, 70, channels, device=DEVICE).to(dtype), torch.randn(channels, 4, device=DEVICE)
    return {"x": x, "weight": weight, "bias": torch.randn(channels, device=DEVICE), "activation": "silu"}


def conv_states(dtype, inputs=5):
    return torch.randn(5, 48, inputs, device=DEVICE).to(dtype)


def call_norm(dtype):
    x, z = torch.randn(2, 2, 9, 64, device=DEVICE).to(dtype)
    return gated_rms_norm, {"x": x, "z": z, "weight": torch.randn(64, device=DEVICE), "group_size": 16}, ("x", "z"), ()


def call_conv(dtype):
    call = {**convolution(dtype), "initial_state": conv_states(dtype, 3)[:2]}
    return causal_conv1d, call, ("x", "initial_state"), ()


def call_conv_slots(dtype):
    call = {**convolution(dtype), "conv_state": conv_states(dtype), "state_indices": SLOTS}
    call |= {"checkpoint_tokens": torch.tensor([66], **INT), "checkpoint_indices": torch.tensor([4], **INT)}
    return causal_conv1d_slots, call, ("x", "conv_state"), ("conv_state",)


def call_conv_update(dtype):
    call = {**convolution(dtype), "conv_state": conv_states(dtype), "state_indices": SLOTS}
    call["x"] = call["x"][:, :3]
    return causal_conv1d_update_slots, call, ("x", "conv_state"), ("conv_state",)


def call_conv_ring(dtype):
    call = call_conv_update(dtype)[1] | {"cache_seqlens": torch.tensor([7, 1], **INT)}
    return causal_conv1d_update_slots, call, ("x", "conv_state"), ("conv_state",)


PER_TOKEN = ("x", "dt", "B", "C", "z")


def call_scan(dtype):
    call, options = operands((2, 70), SMALL, dtype)
    return ssd_scan, {**call, **options, "initial_states": states(2, SMALL)}, (*PER_TOKEN, "initial_states"), ()


def call_scan_slots(dtype):
    call, options = operands((2, 70), SMALL, dtype)
    call |= {**options, "state": states(5, SMALL), "state_indices": SLOTS}
    call |= {"checkpoint_tokens": torch.tensor([66], **INT), "checkpoint_indices": torch.tensor([4], **INT)}
    return ssd_scan_slots, call, (*PER_TOKEN, "state"), ("state",)


def update(dtype, state, **more):
    call, options = operands((2, 3), SMALL, dtype)
    call |= {**options, "state": state, "state_indices": SLOTS, **more}
    call["dst_state_indices"] = torch.tensor([[0, 3, -1], [2, 1, 4]], device=DEVICE)
    return ssm_update, call, (*PER_TOKEN, "state", "state_scale"), ("state", "state_scale")


def call_update(dtype):
    return update(dtype, states(5, SMALL), state_scale=None)


def call_update_stochastic(dtype):
    more = {"state_scale": None, "seed": torch.tensor([5, 7], device=DEVICE), "rounding": "stochastic"}
    return update(dtype, states(5, SMALL, torch.bfloat16), **more)


def call_update_int8(dtype):
    codes = torch.randint(-127, 128, (5, 4, 8, 16), dtype=torch.int8, device=DEVICE)
    return update(dtype, codes, state_scale=torch.rand(5, 4, 8, device=DEVICE))


def replay(dtype, counts):
    call, options = operands((2, 3), SMALL, dtype)
    ring = {
        "ring_x": torch.randn(5, 9, 4, 8, device=DEVICE).to(dtype),
        "ring_B": torch.randn(5, 9, 2, 16, device=DEVICE).to(dtype),
        "ring_dt": torch.rand(5, 9, 4, device=DEVICE),
        "ring_pos": torch.tensor([[s, counts] for s in range(5)], **INT),
    }
    return call, options, ring


RINGS = ("ring_x", "ring_B", "ring_dt")


def call_replay_update(dtype):
    call, options, ring = replay(dtype, 5)  # 5 + 2 * 3 > 9: folds
    call |= {**options, **ring, "state": states(5, SMALL), "state_indices": SLOTS}
    return ssm_replay_update, call, (*PER_TOKEN, *RINGS, "ring_pos", "state"), (*RINGS, "state")


def call_replay_commit(dtype):
    ring, path = replay(dtype, 5)[2], torch.tensor([[0, 2, 0], [1, 0, 0]], **INT)
    call = {**ring, "num_accepted": torch.tensor([2, 1], **INT), "tokens": 3, "path": path, "state_indices": SLOTS}
    return ssm_replay_commit, call, (*RINGS, "ring_pos"), (*RINGS, "ring_pos")


def call_replay_flush(dtype):
    call, _, ring = replay(dtype, 5)
    call = {**ring, "A": call["A"], "state": states(5, SMALL), "state_indices": SLOTS}
    return ssm_replay_flush, call, (*RINGS, "ring_pos", "state"), ("state", "ring_pos")


def call_prefill(dtype):
    call, options = mixer((2, 70), SMALL, dtype)
    call |= {**options, "state_indices": SLOTS}
    call |= {"checkpoint_tokens": torch.tensor([66], **INT), "checkpoint_indices": torch.tensor([4], **INT)}
    return mamba2_prefill, call, ("zxbcdt", "conv_state", "ssm_state"), ("conv_state", "ssm_state")


def call_decode(dtype):
    call, options = mixer((2, 3), SMALL, dtype)
    call |= {**options, "state_indices": SLOTS}
    return mamba2_decode, call, ("zxbcdt", "conv_state", "ssm_state"), ("conv_state", "ssm_state")


def call_norm_bwd(dtype):
    x, z, grad_y = torch.randn(3, 2, 9, 64, device=DEVICE).to(dtype)
    call = {"grad_y": grad_y, "x": x, "z": z, "weight": torch.randn(64, device=DEVICE), "group_size": 16, "eps": 1e-5}
    return torch.ops.n3.gated_rms_norm_bwd, {**call, "norm_before_gate": False}, ("grad_y", "x", "z"), ()


def call_conv_bwd(dtype):
    call = {**convolution(dtype), "initial_state": conv_states(dtype, 3)[:2], "cu_seqlens": None}
    call |= {"grad_y": torch.randn_like(call["x"]), "grad_final_state": conv_states(dtype, 3)[2:4]}
    return torch.ops.n3.causal_conv1d_bwd, call, ("grad_y", "grad_final_state", "x", "initial_state"), ()


def call_scan_bwd(dtype):
    call, options = operands((2, 70), SMALL, dtype)
    call |= {**options, "initial_states": states(2, SMALL), "cu_seqlens": None, "chunk_size": 64}
    call |= {"grad_y": torch.randn_like(call["x"]), "grad_final_states": states(2, SMALL)}
    names = (*PER_TOKEN, "initial_states", "grad_y", "grad_final_states")
    return torch.ops.n3.ssd_scan_bwd, call, names, ()


CALLS = {
    "gated_rms_norm": [call_norm],
    "gated_rms_norm_bwd": [call_norm_bwd],
    "causal_conv1d": [call_conv],
    "causal_conv1d_bwd": [call_conv_bwd],
    "causal_conv1d.slots": [call_conv_slots],
    "causal_conv1d_update": [call_conv_update, call_conv_ring],
    "ssd_scan": [call_scan],
    "ssd_scan_bwd": [call_scan_bwd],
    "ssd_scan.slots": [call_scan_slots],
    "ssm_update": [call_update, call_update_stochastic, call_update_int8],
    "ssm_replay_update": [call_replay_update],
    "ssm_replay_commit": [call_replay_commit],
    "ssm_replay_flush": [call_replay_flush],
    "mamba2_prefill": [call_prefill],
    "mamba2_decode": [call_decode],
}
EACH = [(make, which) for op, makes in CALLS.items() for make in makes for which in backends_here([op])]


@pytest.mark.parametrize("axis", range(4))
@pytest.mark.parametrize(("make", "which"), EACH, ids=[f"{make.__name__[5:]}-{which}" for make, which in EACH])
def test_far_strides(arena, make, which, axis):
    """Each dimension of the inputs and states in turn has strides that reach beyond 2^31 elements."""
    function, near, far_names, written = make(torch.bfloat16 if axis % 2 else torch.float32)
    far, arena = dict(near), arena.start()
    for name in far_names:
        far[name] = arena(near[name], axis)
    assert any(far[name] is not near[name] for name in far_names)
    near |= {name: near[name].clone() for name in written if near[name] is not None}
    with use_backend(which):
        got, expected = function(**far), function(**near)
    got, expected = ((y if isinstance(y, tuple) else (y,)) if y is not None else () for y in (got, expected))
    got, expected = (*got, *(far[n] for n in written)), (*expected, *(near[n] for n in written))
    for one, other in zip(got, expected, strict=True):
        if one is not None and which == "reference" and one.is_floating_point():
            torch.testing.assert_close(one, other, rtol=1.6e-2, atol=1e-4)  # PyTorch's sums follow the strides
        elif one is not None:
            assert_same_bits(one, other)


# ---------------------------------------------------------------- large outputs


def kernels(*ops):
    """The backends that are fast enough: the references take many times the memory, the interpreter days."""
    return [b for b in backends_here(ops) if b != "reference" and (b != "triton" or DEVICE == "cuda")]


def filled(matrix, rows):
    """The last rows of `matrix` become normal numbers."""
    matrix[-rows:] = torch.randn(rows, *matrix.shape[1:], device=DEVICE)
    return matrix


@pytest.mark.parametrize("which", kernels("gated_rms_norm"))
def test_gated_rms_norm(which):
    needs(5)
    x = filled(expanse(LIMIT // 4096 + 5, 4096), 9)
    z, weight = x[-1:].expand(len(x), -1), torch.randn(4096, device=DEVICE)
    with use_backend(which):
        y = gated_rms_norm(x, z, weight, 512)
        assert y.numel() > LIMIT
        assert_same_bits(y[-9:], gated_rms_norm(x[-9:], z[-9:], weight, 512))


@pytest.mark.parametrize("which", kernels("causal_conv1d"))
def test_causal_conv1d(which):
    """Two packed sequences; the second, and the end of the first, lie beyond 2^31 elements."""
    needs(5)
    x = filled(expanse(LIMIT // 6144 + 80, 6144), 73)
    weight, bias = torch.randn(6144, 4, device=DEVICE), torch.randn(6144, device=DEVICE)
    with use_backend(which):
        y, final = causal_conv1d(x, weight, bias, cu_seqlens=torch.tensor([0, len(x) - 30, len(x)], **INT))
        assert y.numel() > LIMIT and (len(x) - 73) * 6144 > LIMIT
        first, after_first = causal_conv1d(x[None, -73:-30], weight, bias)
        second, after_second = causal_conv1d(x[None, -30:], weight, bias)
    assert_same_bits(y[-70:], torch.cat([first[0, 3:], second[0]]))
    assert_same_bits(final, torch.cat([after_first, after_second]))


NANO = (64, 8, 64, 128)  # heads, groups, head_dim, d_state
ULTRA = (256, 8, 64, 128)


def scan_inputs(tokens, rows):
    """x, dt, B and C as columns of one matrix, whose last rows are filled."""
    heads, groups, head_dim, d_state = NANO
    matrix = filled(expanse(tokens, heads * head_dim + 2 * groups * d_state + heads), rows)
    x, B, C, dt = matrix.split([heads * head_dim, groups * d_state, groups * d_state, heads], -1)
    A = -torch.rand(heads, device=DEVICE)
    return x.unflatten(-1, NANO[::2]), dt, A, B.unflatten(-1, NANO[1::2]), C.unflatten(-1, NANO[1::2])


def of_tokens(inputs, where):
    x, dt, A, B, C = inputs
    return x[where], dt[where], A, B[where], C[where]


@pytest.mark.parametrize("which", kernels("ssd_scan.slots"))
def test_ssd_scan_slots(which):
    """A long padding sequence, which reads nothing, before two whose outputs lie beyond 2^31 elements."""
    needs(5)
    inputs = scan_inputs(LIMIT // 4096 + 110, 100)
    tokens, slots, rest = len(inputs[0]), torch.tensor([-1, 2, 0], device=DEVICE), (None, None, None)
    far, near = (torch.zeros(3, 64, 64, 128, device=DEVICE) for _ in range(2))
    with use_backend(which):
        ends = torch.tensor([0, tokens - 100, tokens - 70, tokens], **INT)
        y = ssd_scan_slots(*inputs, *rest, far, slots, cu_seqlens=ends)
        assert y.numel() > LIMIT and (tokens - 100) * 4096 > LIMIT
        ends = torch.tensor([0, 30, 100], **INT)
        expected = ssd_scan_slots(*of_tokens(inputs, slice(-100, None)), *rest, near, slots[1:], cu_seqlens=ends)
    assert_same_bits(y[-100:], expected)
    assert y[-200:-100].count_nonzero() == 0
    assert_same_bits(far, near)


@pytest.mark.parametrize("which", kernels("ssd_scan"))
def test_final_states_of_ssd_scan(which):
    """More than 4096 sequences, of which all but the last two are empty, give 8.6 GB of states."""
    needs(9.5)
    inputs, initial = scan_inputs(9, 9), torch.randn(1, 64, 64, 128, device=DEVICE)
    sequences = LIMIT // initial.numel() + 3
    ends = torch.zeros(sequences + 1, **INT)
    ends[-2:] = torch.tensor([4, 9])
    with use_backend(which):
        y, final = ssd_scan(*inputs, initial_states=initial.expand(sequences, -1, -1, -1), cu_seqlens=ends)
        assert final.numel() > LIMIT
        few = initial.expand(3, -1, -1, -1)
        expected_y, expected = ssd_scan(*inputs, initial_states=few, cu_seqlens=ends[-4:])
    assert_same_bits(y, expected_y)
    assert_same_bits(final[-3:], expected)
    assert_same_bits(final[1], initial[0])


@pytest.mark.parametrize("which", kernels("mamba2_prefill"))
def test_mamba2_prefill(which):
    """The widths of Nemotron 3 Ultra, 131 000 tokens: inputs beyond 2^32 elements, outputs beyond 2^31."""
    needs(6)
    heads, groups, head_dim, d_state = ULTRA
    call, options = mixer((1,), ULTRA, torch.bfloat16, slots=3)
    tokens, slots = LIMIT // (heads * head_dim) + 110, torch.tensor([-1, 2, 0], device=DEVICE)
    zxbcdt = filled(expanse(tokens, 35072), 100)
    near = {**call, "conv_state": call["conv_state"].clone(), "ssm_state": call["ssm_state"].clone()}
    with use_backend(which):
        ends = torch.tensor([0, tokens - 100, tokens - 70, tokens], **INT)
        y = mamba2_prefill(**{**call, "zxbcdt": zxbcdt}, state_indices=slots, cu_seqlens=ends, **options)
        assert y.numel() > LIMIT and (tokens - 100) * heads * head_dim > LIMIT
        near["zxbcdt"], ends = zxbcdt[-100:], torch.tensor([0, 30, 100], **INT)
        expected = mamba2_prefill(**near, state_indices=slots[1:], cu_seqlens=ends, **options)
    assert_same_bits(y[-100:], expected)
    assert y[-200:-100].count_nonzero() == 0
    for name in ("conv_state", "ssm_state"):
        assert_same_bits(call[name], near[name])


# ---------------------------------------------------------------- large caches


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("which", kernels("ssm_update"))
def test_ssm_update_in_a_large_cache(which, dtype):
    """A contiguous cache; states are read in, and per token written to, slots beyond 2^31 elements."""
    call, options = operands((2, 2), NANO, torch.bfloat16)
    heads, _, head_dim, d_state = NANO
    state = expanse(LIMIT // (heads * head_dim * d_state) + 7, heads, head_dim, d_state, dtype=dtype)
    state[-6:] = torch.randint(-100, 100, (6, heads, head_dim, d_state), device=DEVICE).to(dtype)
    near, slots = state[-6:].clone(), len(state)
    scales = torch.rand(6, heads, head_dim, device=DEVICE) if dtype.itemsize == 1 else None
    far_scales = None if scales is None else torch.zeros(slots, heads, head_dim, device=DEVICE)
    if scales is not None:
        far_scales[-6:] = scales
    source, to = torch.tensor([1, 4], device=DEVICE), torch.tensor([[0, 5], [2, 1]], device=DEVICE)
    with use_backend(which):
        first = slots - 6
        y = ssm_update(state, **call, **options, state_indices=first + source, dst_state_indices=first + to,
                       state_scale=far_scales)  # fmt: skip
        expected = ssm_update(near, **call, **options, state_indices=source, dst_state_indices=to, state_scale=scales)
    assert_same_bits(y, expected)
    assert_same_bits(state[-6:], near)
    if scales is not None:
        assert_same_bits(far_scales[-6:], scales)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("which", kernels("ssm_update"))
def test_random_numbers_of_far_elements(which, dtype):
    """An element beyond 2^34 has a counter of more than 32 bits. The slots of the cache overlap, and one is used."""
    call, options = operands((1, 1), NANO)
    wide, slot, seed = states(1, NANO), 2**15 + 12345, torch.tensor([3, 2**33 + 5], device=DEVICE)
    wide = wide.to(dtype).float()
    narrow, size = wide.to(dtype), wide.numel()
    assert slot * size > 2**34
    with use_backend(which):
        apart = 16
        memory = narrow.new_zeros(apart * slot + size)
        cache = memory.as_strided((slot + 1, *narrow.shape[1:]), (apart, *narrow.stride()[1:]))
        cache[slot] = narrow[0]
        where = torch.tensor([slot], device=DEVICE)
        ssm_update(cache, **call, **options, state_indices=where, seed=seed, rounding="stochastic")
        ssm_update(wide, **call, **options)
    words = _philox.element_words(seed, slot * size + torch.arange(size, device=DEVICE))
    assert_same_bits(cache[slot:], round_stochastic(wide, words.view(wide.shape), dtype))
    assert_close_to(cache[slot].double().mean(), wide.double().mean(), 1e-3)
