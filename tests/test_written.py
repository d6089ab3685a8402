"""What a call writes in place must have memory for each element, on every backend: an expanded state would hold
whichever slot was written last."""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICE, assert_same_bits, backends_here

import n3kernels
from n3kernels._dispatch import OPS as ALL
from n3kernels._samples import sample

WRITTEN = [
    (name, a.name) for name in sorted(ALL) for a in ALL[name].overload._schema.arguments
    if a.alias_info is not None and a.alias_info.is_write
]  # fmt: skip


def bound(name):
    args, kwargs = sample(name, DEVICE)
    return ALL[name].signature.bind(*args, **kwargs)


@pytest.mark.parametrize("name, argument", [(n, a) for n, a in WRITTEN if a in bound(n).arguments])
def test_an_expanded_tensor_is_refused(name, argument):
    for which in backends_here([name]):
        call = bound(name)
        value = call.arguments[argument]
        call.arguments[argument] = expanded = value[:1].expand(value.shape)
        before = expanded.clone()
        with n3kernels.use_backend(which), pytest.raises(RuntimeError) as error:
            ALL[name].overload(*call.args, **call.kwargs)
        rule = f"{argument} must not be expanded, as it is written in place"
        got = f"got stride 0 along dimension 0 of size {len(value)}"
        assert str(error.value) == f"n3::{name.split('.')[0]}: {rule}, {got}"
        assert_same_bits(expanded, before)


def test_one_slot_may_have_any_stride():
    """As an expanded tensor of one slot has: torch gives a dimension of size 1 any stride."""
    state = torch.zeros(8, 3, device=DEVICE).expand(1, 8, 3)
    x, weight = torch.randn(1, 8, device=DEVICE), torch.randn(8, 4, device=DEVICE)
    n3kernels.mamba.causal_conv1d_update(x, state, weight)
    assert torch.equal(state[0, :, 2], x[0])
