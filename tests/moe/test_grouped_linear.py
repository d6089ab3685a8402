from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE, assert_close_to, assert_invariant, assert_same_bits
from grouped_problems import INT, NAMES, assert_within, definition, inputs, problems
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_problems import DTYPES, checking, dense, fast, nvfp4, renamed, routing

from n3kernels import _dispatch, use_backend
from n3kernels.moe import grouped_linear, reference, sort

OPS = ("grouped_linear",)


def _without(backend, form):
    """Why the backend does not take such weights, or None."""
    x, ends = torch.zeros(1, 16, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.int32)  # what every kernel takes
    refuses = _dispatch.OPS["grouped_linear"].supports.get(backend)
    if form == "nvfp4":
        scales = torch.zeros(1, 16, 1, dtype=torch.float8_e4m3fn), torch.zeros(1)
        return refuses and refuses(x, torch.zeros(1, 16, 8, dtype=torch.uint8), ends, None, None, *scales)
    return refuses and refuses(x, x.new_zeros(1, 16, 16), ends)


@pytest.fixture(params=["dense", "nvfp4"])
def form(request, backend):
    """How the weights are stored, in the forms that the backend takes."""
    if reason := _without(backend, request.param):
        pytest.skip(reason)
    return request.param


@given(problems)
def test_agrees_with_the_definition(backend, form, problem):
    call = inputs(*problem, form)
    y, truth = grouped_linear(**call), definition(**call)
    assert y.dtype == call["x"].dtype and y.is_contiguous()
    assert_close_to(y, truth, 2e-5)


# the sizes that the kernels with tensor cores take: several tiles of rows, of outputs and of k
in_eights = st.tuples(
    st.integers(0, 40), st.integers(0, 300), st.integers(1, 4), st.integers(1, 20).map(lambda n: 8 * n),
    st.integers(1, 40).map(lambda n: 8 * n), st.booleans(), st.booleans(), st.booleans(),
    st.sampled_from([None, "relu2"]), st.sampled_from([torch.float16, torch.bfloat16]),
)  # fmt: skip


@settings(max_examples=6)
@given(in_eights)
def test_agrees_with_the_definition_in_eights(backend, form, problem):
    call = inputs(*problem, form)
    assert_within(grouped_linear(**call), definition(**call))


@pytest.mark.parametrize("activation", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gate(backend, form, activation, dtype):
    call = inputs(30, 70, 3, 80, 40, True, True, True, activation, dtype, form)
    assert_within(grouped_linear(**call), definition(**call))


@pytest.mark.parametrize("dtype", DTYPES)
def test_is_torchs_grouped_product(backend, dtype):
    """Contiguous groups, no gather: torch.nn.functional.grouped_mm with offs = offsets[1:]."""
    call = inputs(48, 0, 4, 64, 32, False, False, False, None, dtype)
    call["offsets"] = torch.tensor([0, 16, 16, 40, 48], **INT)
    if dtype == torch.float16:  # a plain loop: torch has no such kernel everywhere
        theirs = torch.cat([F.linear(x, w) for x, w in zip(call["x"].split([16, 0, 24, 8]), call["w"], strict=True)])
    else:
        theirs = F.grouped_mm(call["x"], call["w"].transpose(1, 2), offs=call["offsets"][1:])
    ours, truth = grouped_linear(**call), definition(**call)
    assert_within(ours, truth)
    assert (ours.double() - truth).norm() <= 2 * (theirs.double() - truth).norm() + 1e-6 * truth.norm()


def both_orders(x, w_up, w_down, ids, weights, before):
    """An expert layer of two grouped products, the routing weight before or behind the down projection."""
    (tokens, k), num_experts = ids.shape, len(w_up)
    order, offsets, _, _ = sort(ids, num_experts)
    slots = order.long()
    gains = weights.flatten()[slots]
    token = torch.where(torch.arange(len(order), device=DEVICE) < offsets[-1], order // k, -1)
    h = grouped_linear(x, w_up, offsets, gather=token, row_scale=gains if before else None, activation="relu2")
    y = grouped_linear(h, w_down, offsets, row_scale=None if before else gains)
    return torch.zeros_like(y).index_copy(0, slots, y).unflatten(0, (tokens, k)).sum(1)


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_orders_of_the_routing_weight(backend, before, dtype):
    """Megatron weighs the activation, transformers the output: one value, two roundings."""
    x, w_up, w_down = torch.randn(9, 32), torch.randn(6, 48, 32) / 32**0.5, torch.randn(6, 32, 48) / 48**0.5
    x, w_up, w_down = (t.to(DEVICE, dtype) for t in (x, w_up, w_down))
    ids, weights = routing(9, 6, 3, scale=2.5)
    ids[2, 1], ids[4] = -1, -1
    with torch.no_grad():
        y = both_orders(x, w_up, w_down, ids, weights, before)
    truth = reference.moe_experts(x.double(), w_up.double(), w_down.double(), ids, weights.double())
    assert_within(y, truth, 1e-5 if dtype == torch.float32 else 8e-3)  # three roundings to 16 bits


@given(problems, st.integers(0, 11))
def test_a_row_does_not_see_the_others(backend, form, problem, i):
    """Alone, or among rows of NaN."""
    problem = (max(problem[0], 1), max(problem[1], i + 1, 1), *problem[2:5], True, *problem[6:])
    call = inputs(*problem, form)
    whole, source = grouped_linear(**call), call["gather"][i].item()
    group = (call["offsets"][:-1] <= i) & (i < call["offsets"][1:])
    alone = {**call, "gather": call["gather"][i : i + 1]}
    if call["row_scale"] is not None:
        alone["row_scale"] = call["row_scale"][i : i + 1]
    alone["offsets"] = torch.cat([torch.zeros(1, **INT), group.cumsum(0).int()])
    assert_invariant(backend, grouped_linear(**alone)[0], whole[i])
    poisoned = call["x"].clone().fill_(float("nan"))
    if source >= 0:
        poisoned[source] = call["x"][source]
    assert_invariant(backend, grouped_linear(**{**call, "x": poisoned})[i], whole[i])


def test_the_same_call_gives_the_same_bits(backend, form):
    call = inputs(20, 50, 4, 64, 48, True, True, True, "silu", torch.bfloat16, form)
    assert_same_bits(grouped_linear(**call), grouped_linear(**call))


def test_rows_in_no_group_read_nothing(backend, form):
    """NaN in their rows and in their factors; a negative gather likewise, whatever number it is."""
    call = inputs(10, 0, 2, 32, 16, False, True, True, "relu2", torch.float32, form)
    call["offsets"] = torch.tensor([3, 5, 8], **INT)
    truth = grouped_linear(**call)
    for name in ("x", "row_scale"):
        call[name][:3], call[name][8:] = float("nan"), float("nan")
    y = grouped_linear(**call)
    assert_same_bits(y, truth)
    assert not y[:3].any() and not y[8:].any() and y[3:8].any()
    call["gather"] = torch.arange(10, **INT)
    call["gather"][[1, 4, 9]] = torch.tensor([-1, -(2**31), -7], **INT)
    call["row_scale"][4], truth[4] = float("nan"), 0
    assert_invariant(backend, grouped_linear(**call), truth)


@pytest.mark.parametrize("rows", [0, 1, 300])
def test_one_group_has_all_rows(backend, form, rows):
    call = inputs(rows, 0, 5, 32, 16, False, True, False, None, torch.bfloat16, form)
    call["offsets"] = torch.tensor([0, 0, 0, rows, rows, rows], **INT)
    assert_within(grouped_linear(**call), definition(**call), 4e-3)


def test_no_rows_to_gather_from(backend):
    """x is empty: every row of the result names none."""
    call = inputs(3, 4, 2, 8, 5, True, True, False, "relu2", torch.float32)
    call |= {"x": call["x"][:0], "gather": torch.full((4,), -1, **INT)}
    assert not grouped_linear(**call).any()


def test_widths_of_nothing(backend):
    call = inputs(5, 0, 2, 8, 6, False, False, False, None, torch.float32)
    assert grouped_linear(**{**call, "w": call["w"][:, :0]}).shape == (5, 0)
    y = grouped_linear(**{**call, "x": call["x"][:, :0], "w": call["w"][:, :, :0]})
    assert y.shape == (5, 6) and not y.any()


def test_groups_may_be_renamed(backend, form):
    """The weights of each group are found by its number alone."""
    call = inputs(12, 0, 3, 32, 16, False, False, False, "relu2", torch.float32, form)
    call["offsets"] = torch.tensor([0, 3, 7, 12], **INT)
    y = grouped_linear(**call)
    w = renamed(call["w"], torch.tensor([2, 0, 1], device=DEVICE))
    x = torch.cat([call["x"][7:12], call["x"][0:3], call["x"][3:7]])
    named = grouped_linear(x, w, torch.tensor([0, 5, 8, 12], **INT), activation="relu2")
    assert_invariant(backend, named, torch.cat([y[7:12], y[0:3], y[3:7]]))


def test_powers_of_two_pass_through(backend, form):
    call = inputs(9, 0, 4, 32, 48, False, True, False, "relu2", torch.float32, form)
    y = grouped_linear(**call)
    assert_invariant(backend, grouped_linear(**{**call, "x": 4 * call["x"]}), 16 * y)
    assert_invariant(backend, grouped_linear(**{**call, "row_scale": call["row_scale"] / 8}), y / 8)


def test_float16_overflows_at_the_end_alone(backend):
    """relu2 of 300 leaves float16, with its factor it does not."""
    x, w = torch.full((2, 100), 3.0, device=DEVICE).half(), torch.ones(1, 4, 100, device=DEVICE).half()
    scale, ends = torch.tensor([2.0**-10, 1.0], device=DEVICE), torch.tensor([0, 2], **INT)
    y = grouped_linear(x, w, ends, row_scale=scale, activation="relu2")
    assert_within(y[0], torch.full((4,), 9e4 / 1024, device=DEVICE).double(), 1e-3)
    assert y[1].isinf().all()


def test_strided_inputs(backend):
    call = inputs(9, 20, 3, 32, 16, True, True, True, "relu2", torch.float32)
    y = grouped_linear(**call)
    strided = grouped_linear(
        call["x"].t().contiguous().t(), call["w"].transpose(1, 2).contiguous().transpose(1, 2),
        call["offsets"].repeat_interleave(2)[::2], gather=call["gather"].repeat_interleave(3)[::3],
        row_scale=call["row_scale"].repeat_interleave(2)[::2], activation="relu2",
    )  # fmt: skip
    assert strided.is_contiguous()
    assert_invariant(backend, strided, y)
    row = call["x"][:1]
    same = {**call, "gather": call["gather"].clamp(max=0)}
    assert_invariant(backend, grouped_linear(**{**same, "x": row.expand(9, 32)}), grouped_linear(**{**same, "x": row}))


def test_block_scales_of_another_layout(backend):
    if reason := _without(backend, "nvfp4"):
        pytest.skip(reason)
    call = inputs(9, 0, 2, 64, 48, False, False, False, None, torch.float32, "nvfp4")
    assert_same_bits(grouped_linear(**{**call, "w": call["w"].to_layout("128x4")}), grouped_linear(**call))


# rows, groups, width, outputs: Nano's up, Super's up and down, tensor-parallel shards, K3's down; experts are few. The
# last has more tiles than a GPU has multiprocessors.
PUBLISHED = [(5, 2, 2688, 1856), (9, 3, 1024, 2688), (9, 3, 2688, 1024), (7, 4, 336, 1024), (7, 4, 464, 2688),
             (7, 4, 232, 2688), (3, 2, 3072, 3584), (40, 512, 32, 16),
             (2000, 7, 64, 2688)]  # fmt: skip
SMALL = [(9, 3, 336, 32), (9, 3, 464, 16), (9, 3, 32, 232), (3, 2, 16, 1856), (30, 512, 16, 16), (20, 896, 16, 8)]


def published(rows, groups, width, outputs):
    call = inputs(rows, 0, groups, width, outputs, False, True, False, "relu2", torch.bfloat16)
    call["offsets"] = torch.linspace(0, rows, groups + 1).to(**INT)
    return call


@pytest.mark.parametrize("which", fast("grouped_linear"))
@pytest.mark.parametrize("shape", PUBLISHED, ids=str)
def test_full_widths(which, shape):
    call = published(*shape)
    with use_backend(which):
        assert_within(grouped_linear(**call), definition(**call))


@pytest.mark.parametrize("shape", SMALL, ids=str)
def test_published_shapes(backend, shape):
    call = published(*shape)
    assert_within(grouped_linear(**call), definition(**call))


# ---- PyTorch's machinery


def positional(call):
    """The operator's arguments, and its options."""
    names = ("x", "w", "offsets", "gather", "row_scale")
    return tuple(call[n] for n in names), {"activation": call["activation"]}


@pytest.mark.parametrize("rows", [0, 1, 5])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("gathered", [False, True])
def test_opcheck(rows, grad, gathered):
    call = inputs(4 if gathered else rows, rows, 3, 8, 6, gathered, True, True, "silu", torch.float32)
    for name in ("x", "w", "row_scale"):
        call[name] = call[name].clone().requires_grad_(grad)
    args, options = positional(call)
    torch.library.opcheck(torch.ops.n3.grouped_linear.default, args, options)


def test_opcheck_nvfp4():
    call = inputs(5, 0, 3, 32, 6, False, False, True, None, torch.bfloat16, "nvfp4")
    (x, w, *rest), options = positional(call)
    args = (x, w.q, *rest, w.block_scale, w.global_scale)
    utils = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")  # test_schema has no fp8
    torch.library.opcheck(torch.ops.n3.grouped_linear.default, args, options, test_utils=utils)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic):
    fn = torch.compile(grouped_linear, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (4, 7):
        call = inputs(5, rows, 3, 8, 6, True, True, True, "relu2", torch.float32)
        results = []
        for run in (fn, grouped_linear):
            leaves = {n: call[n].clone().requires_grad_() for n in ("x", "w", "row_scale")}
            y = run(**{**call, **leaves})
            results.append((y.detach(), *torch.autograd.grad(y.square().sum(), list(leaves.values()))))
        torch.testing.assert_close(*results)


def test_autocast_is_not_looked_at(backend):
    call = inputs(20, 0, 3, 32, 16, False, True, False, "relu2", torch.float32)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        y = grouped_linear(**call)
    assert y.dtype == torch.float32
    assert_within(y, definition(**call))


def test_experts_agree(backend, form):
    """The rows of `experts` with weight 1 and one slot each."""
    if form == "nvfp4":
        w_up, w_down = nvfp4(3, 32, 16), nvfp4(3, 16, 32)
    else:
        w_up, w_down = torch.randn(3, 32, 16, device=DEVICE), torch.randn(3, 16, 32, device=DEVICE)
    x, ends = torch.randn(6, 16, device=DEVICE), torch.tensor([0, 1, 4, 6], **INT)
    y = grouped_linear(grouped_linear(x, w_up, ends, activation="relu2"), w_down, ends)
    ids = torch.tensor([[0], [1], [1], [1], [2], [2]], **INT)
    truth = reference.moe_experts(x.double(), dense(w_up), dense(w_down), ids, torch.ones(6, 1).double())
    assert_within(y, truth)


# ---- bad calls

GOOD = {"x": torch.zeros(4, 16), "w": torch.zeros(2, 6, 16), "offsets": torch.tensor([0, 2, 4], dtype=torch.int32)}
IDS = torch.zeros(3, dtype=torch.int32)
SCALE, ONE = torch.zeros(2, 6, 1, dtype=torch.float8_e4m3fn), torch.zeros(2)
PACKED = {"w": torch.zeros(2, 6, 8, dtype=torch.uint8), "block_scale": SCALE, "global_scale": ONE}
BAD = [
    ({"x": torch.zeros(4, 16, dtype=torch.int32)}, "x must be float32, float16 or bfloat16, got int32"),
    ({"x": torch.zeros(16)}, "x must have 2 dimensions, got 1"),
    ({"activation": "relu"}, "activation must be one of None, relu2, silu, gelu, got relu"),
    ({"w": torch.zeros(6, 16)}, "w must have 3 dimensions, got 2"),
    ({"w": torch.zeros(0, 6, 16)}, "w must have at least 1 group, got 0"),
    ({"w": torch.zeros(2, 5, 16), "activation": "silu"},
     "w must have an even number of rows per group for silu, got 5"),
    ({"w": torch.zeros(2, 6, 16).half()}, "w must have the dtype of x (float32), got float16"),
    ({"w": torch.zeros(2, 6, 15)}, "w must have shape [2, 6, 16], got [2, 6, 15]"),
    ({"global_scale": ONE}, "block_scale and global_scale must be given together or not at all, got 1 of 2"),
    ({**PACKED, "x": torch.zeros(4, 8)}, "the last dimension of x must be a positive multiple of 16, got 8"),
    ({**PACKED, "w": GOOD["w"]}, "w must be uint8, got float32"),
    ({**PACKED, "w": torch.zeros(2, 6, 16, dtype=torch.uint8)}, "w must have shape [2, 6, 8], got [2, 6, 16]"),
    ({**PACKED, "block_scale": torch.zeros(2, 6, 1)}, "block_scale must be float8_e4m3fn, got float32"),
    ({**PACKED, "block_scale": SCALE[:1]}, "block_scale must have shape [2, 6, 1], got [1, 6, 1]"),
    ({**PACKED, "global_scale": ONE.half()}, "global_scale must be float32, got float16"),
    ({**PACKED, "global_scale": ONE[:1]}, "global_scale must have shape [2], got [1]"),
    ({"offsets": torch.zeros(3, dtype=torch.int64)}, "offsets must be int32, got int64"),
    ({"offsets": torch.zeros(2, dtype=torch.int32)}, "offsets must have shape [3], got [2]"),
    ({"gather": torch.zeros(3, dtype=torch.int64)}, "gather must be int32, got int64"),
    ({"gather": torch.zeros(3, 1, dtype=torch.int32)}, "gather must have 1 dimensions, got 2"),
    ({"row_scale": torch.zeros(4).half()}, "row_scale must be float32, got float16"),
    ({"row_scale": torch.zeros(5)}, "row_scale must have shape [4], got [5]"),
    ({"row_scale": torch.zeros(4), "gather": IDS}, "row_scale must have shape [3], got [4]"),
]  # fmt: skip
BAD_VALUES = [
    ({"offsets": [0, 2, 5]}, "offsets must be between 0 and 4, got 5"),
    ({"offsets": [-1, 2, 4]}, "offsets must be between 0 and 4, got -1"),
    ({"offsets": [0, 4, 4], "gather": [0, 0, 0]}, "offsets must be between 0 and 3, got 4"),
    ({"offsets": [3, 2, 4]}, "offsets must not fall, got 2 after 3"),
    ({"offsets": [0, 0, 0], "gather": [0, 4, 1]}, "gather must be below the 4 rows of x, got 4"),
]


@pytest.mark.parametrize("change, message", BAD)
def test_bad_calls(backend, change, message):
    call = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in {**GOOD, **change}.items()}
    with pytest.raises(RuntimeError) as error:
        torch.ops.n3.grouped_linear(**call)
    assert str(error.value) == f"n3::grouped_linear: {message}"


@pytest.mark.parametrize("which", checking("grouped_linear"))
@pytest.mark.parametrize("change, message", BAD_VALUES)
def test_bad_values(which, change, message):
    call = {**GOOD, **{name: torch.tensor(values, dtype=torch.int32) for name, values in change.items()}}
    with pytest.raises(RuntimeError) as error, use_backend(which):
        torch.ops.n3.grouped_linear(**call)
    assert str(error.value) == f"n3::grouped_linear: {message}"
