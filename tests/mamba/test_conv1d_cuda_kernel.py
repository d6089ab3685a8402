"""The text of the CUDA kernels of causal_conv1d, run on the CPU."""

from __future__ import annotations

import pytest
import torch
from conftest import assert_same_bits, fenced
from hypothesis import given
from hypothesis import strategies as st
from kernel_arguments import TYPES, ConvArgs, Taps, doubles, indices, load_kernels, room, run, view
from kernel_problems import FLOATS, SEEDS, assert_is_conv, conv_operands
from kernel_text import needs_emulator

from n3kernels.mamba import reference

pytestmark = needs_emulator


@pytest.fixture(scope="session")
def kernels():
    return load_kernels()


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
    if where is not None:
        run(kernels.emulate_conv_states, args, reverse)
    return y


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
