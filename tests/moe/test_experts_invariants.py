"""What holds of moe_experts whatever the numbers are: tokens, experts, ranks, scales and padding."""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICE, assert_invariant, assert_same_bits
from hypothesis import given
from hypothesis import strategies as st
from moe_problems import ACTIVATIONS, DTYPES, definition, fast, inputs, refusal, renamed

from n3kernels import use_backend
from n3kernels.moe import experts

OPS = ("moe_experts",)

# tokens, 0 included; slots per token; experts; width and inner size, odd ones too; the first expert held here
problems = st.tuples(
    st.integers(0, 6), st.integers(1, 5), st.integers(1, 5), st.integers(1, 40), st.integers(1, 40), st.integers(0, 3),
    st.sampled_from(ACTIVATIONS), st.sampled_from(DTYPES),
)  # fmt: skip


@pytest.fixture(params=["dense", "nvfp4"])
def form(request, backend):
    """How the weights are stored, in the forms that the backend takes."""
    if reason := refusal(backend, request.param):
        pytest.skip(reason)
    return request.param


@pytest.fixture
def _dense(backend):
    if reason := refusal(backend, "dense"):
        pytest.skip(reason)


takes_dense = pytest.mark.usefixtures("_dense")  # the test is about dense weights


@given(problems, st.integers(0, 4))
def test_a_row_does_not_see_the_batch(backend, form, problem, i):
    """Alone, in front or in the middle, beside a row of NaN that shares its experts or not."""
    tokens, *rest = problem
    x, w_up, w_down, ids, weights, options = inputs(max(tokens, i) + 2, *rest, form)
    x[-1], ids[-1] = float("nan"), ids[i]
    whole = experts(x, w_up, w_down, ids, weights, **options)
    one = slice(i, i + 1)
    assert_invariant(backend, whole[one], experts(x[one], w_up, w_down, ids[one], weights[one], **options))
    assert not whole[:-1].isnan().any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_co_batches(backend, form, dtype):
    """The same tokens alone, first, last, and so many that their experts are full: one result."""
    x, w_up, w_down, ids, weights, options = inputs(80, 4, 6, 64, 48, 0, "relu2", dtype, form)
    whole = experts(x, w_up, w_down, ids, weights, **options)
    for part in (slice(0, 3), slice(77, 80), slice(10, 50)):
        y = experts(x[part], w_up, w_down, ids[part], weights[part], **options)
        assert_invariant(backend, y, whole[part])


def test_the_same_call_gives_the_same_bits(backend, form):
    *tensors, options = inputs(50, 4, 6, 64, 48, 0, "silu", torch.bfloat16, form)
    assert_same_bits(experts(*tensors, **options), experts(*tensors, **options))


def test_powers_of_two_pass_through(backend, form):
    """relu2(g h) = g^2 relu2(h), and a routing weight scales: exact where g is a power of two."""
    x, w_up, w_down, ids, weights, options = inputs(9, 3, 4, 32, 48, 0, "relu2", torch.float32, form)
    y = experts(x, w_up, w_down, ids, weights, **options)
    assert_invariant(backend, experts(4 * x, w_up, w_down, ids, weights, **options), 16 * y)
    assert_invariant(backend, experts(x, w_up, w_down, ids, 0.5 * weights, **options), 0.5 * y)


@takes_dense
def test_padding_with_zeros_changes_nothing(backend):
    """Columns of zeros: relu2(0) = 0, whatever the other weight holds there."""
    x, w_up, w_down, ids, weights, options = inputs(9, 3, 4, 32, 40, 0, "relu2", torch.float32)
    y = experts(x, w_up, w_down, ids, weights, **options)
    more_up, more_down = torch.zeros(4, 8, 32, device=DEVICE), torch.randn(4, 32, 8, device=DEVICE)
    padded = experts(x, torch.cat([w_up, more_up], 1), torch.cat([w_down, more_down], 2), ids, weights, **options)
    torch.testing.assert_close(padded, y, rtol=1e-5, atol=1e-6)


@takes_dense
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_empty_sizes(backend, activation):
    for width, inner in ((0, 5), (5, 0), (0, 0)):
        x, ids = torch.randn(3, width, device=DEVICE), torch.zeros(3, 2, dtype=torch.int32, device=DEVICE)
        w_up = torch.randn(2, inner * (1 if activation == "relu2" else 2), width, device=DEVICE)
        w_down, weights = torch.randn(2, width, inner, device=DEVICE), torch.randn(3, 2, device=DEVICE)
        y = experts(x, w_up, w_down, ids, weights, activation=activation)
        assert y.shape == x.shape and not y.any()


def test_zero_routing_weights(backend, form):
    x, w_up, w_down, ids, weights, options = inputs(9, 3, 4, 32, 48, 0, "relu2", torch.bfloat16, form)
    assert not experts(x, w_up, w_down, ids, torch.zeros_like(weights), **options).any()


@pytest.mark.parametrize("skipped", [-1, 1, 6, 2**31 - 1, -(2**31)])
def test_skipped_slots_add_exactly_nothing(backend, form, skipped):
    """Experts 2..5 are here. Whatever weight a skipped slot has, and where no slot is left the row is zero."""
    x, w_up, w_down, ids, weights, options = inputs(7, 4, 4, 32, 48, 2, "relu2", torch.float32, form)
    ids = ids.clamp(2, 5)
    ids[:, 1::2], ids[3] = skipped, skipped
    weights[:, 1::2] = float("nan")
    y = experts(x, w_up, w_down, ids, weights, **options)
    kept = experts(x, w_up, w_down, ids[:, ::2].contiguous(), weights[:, ::2].contiguous(), **options)
    assert_same_bits(y, kept)
    assert not y[3].any()


@pytest.mark.parametrize("valid", [0, 1, 5, 9, 100])
def test_padding_tokens(backend, form, valid):
    """Rows from valid_tokens on come out as zeros; what they hold is not looked at."""
    x, w_up, w_down, ids, weights, options = inputs(9, 3, 4, 32, 48, 0, "relu2", torch.bfloat16, form)
    truth = experts(x, w_up, w_down, ids, weights, **options)
    ids[valid:] = ids[valid:].clamp(0, 3)
    x[valid:], weights[valid:], ids[valid + 1 :] = float("nan"), float("nan"), 2**31 - 1
    count = torch.tensor([valid], dtype=torch.int32, device=DEVICE)
    y = experts(x, w_up, w_down, ids, weights, valid_tokens=count, **options)
    assert_invariant(backend, y[:valid], truth[:valid])
    assert not y[valid:].any()


@takes_dense
def test_ranks_add_up(backend):
    """Expert parallelism: the uneven shares of three ranks, one without a token, sum to the unsharded result."""
    x, w_up, w_down, ids, weights, _ = inputs(20, 4, 13, 32, 48, 0, "relu2", torch.float32)
    ids = torch.where(ids == 3, 5, ids)  # nothing for the rank that holds expert 3 alone
    whole = experts(x, w_up, w_down, ids, weights)
    parts = [experts(x, w_up[a:b], w_down[a:b], ids, weights, first_expert=a) for a, b in ((0, 3), (3, 4), (4, 13))]
    assert not parts[1].any()
    torch.testing.assert_close(sum(parts), whole, rtol=1e-5, atol=1e-5)


# ---- names and places


@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_may_change_places(backend, form, dtype):
    x, w_up, w_down, ids, weights, options = inputs(25, 3, 6, 64, 48, 1, "silu", dtype, form)
    places = torch.randperm(25).to(DEVICE)
    y = experts(x, w_up, w_down, ids, weights, **options)
    moved = experts(x[places], w_up, w_down, ids[places], weights[places], **options)
    assert_invariant(backend, moved, y[places])


@pytest.mark.parametrize("dtype", DTYPES)
def test_experts_may_be_renamed(backend, form, dtype):
    x, w_up, w_down, ids, weights, _ = inputs(25, 3, 6, 64, 48, 0, "relu2", dtype, form)
    ids, new = ids.clamp(0, 5), torch.randperm(6).to(DEVICE)
    y = experts(x, w_up, w_down, ids, weights)
    back = new.argsort()
    named = experts(x, renamed(w_up, back), renamed(w_down, back), new[ids.long()].int(), weights)
    assert_invariant(backend, named, y)


def test_experts_without_tokens_are_not_read(backend, form):
    x, w_up, w_down, ids, weights, options = inputs(9, 3, 6, 32, 48, 0, "relu2", torch.bfloat16, form)
    ids = torch.where((ids == 1) | (ids == 5), 2, ids)
    y = experts(x, w_up, w_down, ids, weights, **options)
    for w in (w_up, w_down):
        for part in ((w,) if form == "dense" else (w.block_scale, w.global_scale)):
            part = part.view(torch.uint8) if part.element_size() == 1 else part
            part[[1, 5]] = 0x7F if part.dtype == torch.uint8 else float("nan")
    assert_same_bits(experts(x, w_up, w_down, ids, weights, **options), y)


FAR = 2**31 - 3  # experts FAR .. FAR + 3 are here, and no id can name the last


def test_experts_of_the_largest_numbers(backend, form):
    """id - first_expert leaves 32 bits: -2^31 is not the expert with the number 2^31, and 2^40 is not 0."""
    x, w_up, w_down, ids, weights, _ = inputs(7, 3, 4, 32, 48, 0, "relu2", torch.float32, form)
    ids = ids.clamp(0, 2)
    ids[2, 1], ids[5:] = -1, -1
    weights[2, 1], weights[5:] = float("nan"), float("nan")
    truth = experts(x, w_up, w_down, ids, weights)
    far = torch.where(ids < 0, ids, ids + FAR)
    far[2, 1], far[5], far[6] = -(2**31), -(2**31), 1
    assert_same_bits(experts(x, w_up, w_down, far, weights, first_expert=FAR), truth)
    assert not experts(x, w_up, w_down, far, weights, first_expert=2**40).any()


@pytest.mark.parametrize("valid", [-3, 2**31 - 1])
def test_any_number_of_valid_tokens(backend, form, valid):
    x, w_up, w_down, ids, weights, options = inputs(9, 3, 4, 32, 48, 0, "relu2", torch.bfloat16, form)
    count = torch.tensor([valid], dtype=torch.int32, device=DEVICE)
    y = experts(x, w_up, w_down, ids, weights, valid_tokens=count, **options)
    truth = experts(x, w_up, w_down, ids, weights, **options)
    assert_invariant(backend, y, truth if valid > 0 else torch.zeros_like(truth))


# ---- arithmetic


@takes_dense
def test_the_sum_is_in_the_order_of_the_slots(backend):
    """2^24 + 1 - 2^24 is 0 in float32 from the left, and 1 the other way; the experts' numbers do not matter."""
    x = torch.ones(2, 1, device=DEVICE)
    w_up, w_down = torch.ones(3, 1, 1, device=DEVICE), torch.tensor([1.0, 2.0**24, -(2.0**24)], device=DEVICE)
    ids = torch.tensor([[1, 0, 2], [1, 2, 0]], dtype=torch.int32, device=DEVICE)
    y = experts(x, w_up, w_down.view(3, 1, 1), ids, torch.ones(2, 3, device=DEVICE))
    assert y.tolist() == [[0.0], [1.0]]


@takes_dense
def test_weights_stand_behind_the_down_projection_and_are_not_narrowed(backend):
    """1 + 2^-20 is a float32 weight, whatever dtype x has."""
    x = torch.ones(1, 1, device=DEVICE).bfloat16()
    w_up, w_down = torch.ones(2, 1, 1, device=DEVICE).bfloat16(), torch.ones(2, 1, 1, device=DEVICE).bfloat16()
    ids = torch.tensor([[0, 1]], dtype=torch.int32, device=DEVICE)
    y = experts(x, w_up, w_down, ids, torch.tensor([[1 + 2.0**-20, -1.0]], device=DEVICE))
    assert y.item() == 2.0**-20


@takes_dense
@pytest.mark.parametrize("where", ["activation", "slot", "scale"])
def test_float16_overflows_at_the_end_alone(backend, where):
    """relu2(300), a slot's 1e5, and a sum that the routed scaling factor makes too large and a weight small again."""
    x = torch.full((2, 100), 3.0, device=DEVICE).half()
    w_up = torch.ones(3, 8, 100, device=DEVICE).half()  # h = 300, relu2(h) = 9e4, eight of them
    w_down = torch.full((3, 100, 8), 2.0**-9 if where == "activation" else 1.0, device=DEVICE).half()
    ids = torch.tensor([[0, 1], [2, 0]], dtype=torch.int32, device=DEVICE)
    weights = {"activation": [0.5, 0.25], "slot": [2.0**-10, 2.0**-11], "scale": [5.0, -5.0 + 2.0**-12]}[where]
    weights = torch.tensor([weights] * 2, device=DEVICE)
    y = experts(x, w_up, w_down, ids, weights)
    truth, _ = definition(x, w_up, w_down, ids, weights)
    assert y.isfinite().all()
    assert ((y.double() - truth).abs() <= 2e-3 * truth.abs()).all()


@takes_dense
def test_autocast_is_not_looked_at(backend):
    x, w_up, w_down, ids, weights, options = inputs(20, 3, 4, 32, 48, 0, "relu2", torch.float32)
    truth = experts(x, w_up, w_down, ids, weights, **options)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert_same_bits(experts(x, w_up, w_down, ids, weights, **options), truth)


@takes_dense
def test_a_relu_is_not_a_mask_of_numbers(backend):
    """relu2 of a negative number is 0, of -inf as well; of NaN it is NaN; and a token keeps its own."""
    x = torch.tensor([[-1.0], [float("-inf")], [float("nan")], [2.0], [float("inf")]], device=DEVICE)
    ones, ids = torch.ones(1, 1, 1, device=DEVICE), torch.zeros(5, 1, dtype=torch.int32, device=DEVICE)
    y = experts(x, ones, ones, ids, torch.ones(5, 1, device=DEVICE)).flatten().tolist()
    assert y[:2] == [0.0, 0.0] and y[2] != y[2] and y[3:] == [4.0, float("inf")]


@takes_dense
def test_expanded_inputs(backend):
    """One token for all rows, one expert's weights for all experts: strides of 0."""
    x, w_up, w_down, ids, weights, options = inputs(6, 3, 4, 32, 16, 0, "relu2", torch.float32)
    shared = x[:1].expand(6, 32), w_up[:1].expand(4, 16, 32), w_down[:1].expand(4, 32, 16), ids[:1].expand(6, 3)
    gains = torch.tensor(0.5, device=DEVICE).expand(6, 3)
    truth = experts(*(t.contiguous() for t in shared), gains.contiguous(), **options)
    assert_invariant(backend, experts(*shared, gains, **options), truth)


# ---- machines


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("tokens", [1, 70])
def test_threads_do_not_show(backend, form, tokens, activation):
    x, w_up, w_down, ids, weights, options = inputs(tokens, 4, 6, 80, 112, 0, activation, torch.bfloat16, form)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(experts(x, w_up, w_down, ids, weights, **options))
    finally:
        torch.set_num_threads(threads)
    assert_invariant(backend, results[0], results[1])
    assert_invariant(backend, results[0], results[2])


@pytest.mark.parametrize("which", [b for b in fast("moe_experts") if not refusal(b, "dense")])
@pytest.mark.parametrize("tokens", [700, 3000])
def test_tokens_of_many_batches(which, tokens):
    """Batches of tokens, and of slots per expert, that are full, and what is left of them."""
    x, w_up, w_down, ids, weights, options = inputs(tokens, 3, 4, 48, 32, 0, "relu2", torch.bfloat16)
    ids[:, 0] = 1
    with use_backend(which):
        whole = experts(x, w_up, w_down, ids, weights, **options)
        parts = zip(x.split(61), ids.split(61), weights.split(61), strict=True)
        alone = torch.cat([experts(xs, w_up, w_down, some, gains, **options) for xs, some, gains in parts])
    assert_invariant(which, alone, whole)
