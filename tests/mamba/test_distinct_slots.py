"""Two sequences that write one slot would leave behind whichever came last: on the CPU the call raises instead, and
nothing is written. (Elsewhere reading the indices would wait for the device.)"""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICE, assert_same_bits

from n3kernels._dispatch import OPS as ALL
from n3kernels._samples import sample

OPS = [
    "causal_conv1d.slots", "causal_conv1d_update", "mamba2_decode", "mamba2_prefill", "ssd_scan.slots",
    "ssm_replay_commit", "ssm_replay_flush", "ssm_replay_update", "ssm_update",
]  # fmt: skip
UPDATES = ["causal_conv1d_update", "mamba2_decode", "ssm_update"]
PREFILLS = ["causal_conv1d.slots", "mamba2_prefill", "ssd_scan.slots"]

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="values are checked on the CPU")
CHECKED = ("reference", "cpu")  # Triton's kernels, in the interpreter too, read no values on the host


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def call(name, **changes):
    args, kwargs = sample(name)
    bound = ALL[name].signature.bind(*args, **kwargs)
    bound.arguments.update(changes)
    return ALL[name].overload, bound


def assert_refuses(name, backend, words, **changes):
    run, bound = call(name, **changes)
    if backend not in CHECKED:
        return
    before = {k: v.clone() for k, v in bound.arguments.items() if isinstance(v, torch.Tensor)}
    with pytest.raises(RuntimeError) as error:
        run(*bound.args, **bound.kwargs)
    assert str(error.value) == f"n3::{name.split('.')[0]}: {words}"
    for k, v in before.items():
        assert_same_bits(bound.arguments[k], v)


def run(name, **changes):
    f, bound = call(name, **changes)
    f(*bound.args, **bound.kwargs)


@pytest.mark.parametrize("name", [name for name in OPS if name not in UPDATES])
def test_two_sequences_of_one_slot(backend, name):
    count = 3 if name == "ssm_replay_flush" else 2
    assert_refuses(name, backend, "state_indices must be distinct, got 1 twice", state_indices=ints(*[1] * count))


@pytest.mark.parametrize("name", OPS)
def test_padding_may_repeat(backend, name):
    shape = (2, 2) if name in UPDATES else (3,) if name == "ssm_replay_flush" else (2,)
    run(name, state_indices=torch.full(shape, -1, dtype=torch.int32))


@pytest.mark.parametrize("name", PREFILLS)
def test_checkpoints(backend, name):
    words = "state_indices and checkpoint_indices must be distinct, got {} twice"
    assert_refuses(name, backend, words.format(3), checkpoint_indices=ints(3, 3))
    assert_refuses(name, backend, words.format(2), checkpoint_indices=ints(2, -1))
    run(name, checkpoint_indices=ints(-1, -1))


@pytest.mark.parametrize("name", PREFILLS)
def test_checkpoints_of_padding_are_not_written(backend, name):
    run(name, state_indices=ints(2, -1), checkpoint_indices=ints(1, 1))


@pytest.mark.parametrize("name", UPDATES)
def test_updates(backend, name):
    twice = "{} must be distinct, got {} twice"
    plain = {"dst_state_indices": None, "parents": None}
    assert_refuses(name, backend, twice.format("state_indices", 3), state_indices=ints([0, 3], [3, 2]), **plain)
    run(name, state_indices=ints([0, 3], [2, 3]), **plain)  # the other slot of the same number is not accepted
    chain = {"parents": None}
    assert_refuses(name, backend, twice.format("dst_state_indices", 7), dst_state_indices=ints(7, 7), **chain)
    assert_refuses(name, backend, twice.format("dst_state_indices", 7), dst_state_indices=ints([4, 7, 6], [7, 8, -1]))
    run(name, dst_state_indices=ints([4, 5, 6], [7, 8, 6]))  # of the second sequence's two tokens the third is none
    run(name, state_indices=ints([0, 3], [3, 2]))  # a slot may be read twice: a fork
