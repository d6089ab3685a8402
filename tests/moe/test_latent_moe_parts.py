from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE, assert_close_to, assert_invariant, assert_same_bits, fenced
from grouped_problems import assert_within
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_problems import ACTIVATIONS, DTYPES

from n3kernels import batch_invariant
from n3kernels.moe import latent_moe_front, latent_moe_tail

OPS = ("latent_moe_front", "latent_moe_tail")
front_alone, tail_alone = pytest.mark.op("latent_moe_front"), pytest.mark.op("latent_moe_tail")

# tokens; width, experts, latent width (0: none), shared inner size, odd ones too
fronts = st.tuples(
    st.integers(0, 6), st.integers(1, 40), st.integers(1, 20), st.integers(0, 20), st.integers(1, 20),
    st.sampled_from(ACTIVATIONS), st.sampled_from(DTYPES), st.sampled_from([None, torch.float32, torch.bfloat16]),
)  # fmt: skip
# tokens; latent width (0: none), width, shared inner size; a residual
tails = st.tuples(
    st.integers(0, 6), st.integers(0, 40), st.integers(1, 30), st.integers(1, 40), st.booleans(),
    st.sampled_from(DTYPES),
)  # fmt: skip


def normal(*shape, dtype):
    return fenced(torch.randn(shape).to(DEVICE, dtype))


def weight(*shape, dtype):
    return fenced((torch.randn(shape) * shape[-1] ** -0.5).to(DEVICE, dtype))


def front_inputs(tokens, width, experts, latent, inner, activation, dtype, router=None):
    """x, router_weight, fc1, shared_up; the router's dtype is its own."""
    rows = inner * (1 if activation == "relu2" else 2)
    fc1 = weight(latent, width, dtype=dtype) if latent else None
    gate = weight(experts, width, dtype=router or dtype)
    return normal(tokens, width, dtype=dtype), gate, fc1, weight(rows, width, dtype=dtype)


def front_definition(x, router_weight, fc1, shared_up, activation):
    x, gate, up = x.double(), router_weight.double(), shared_up.double()
    z = x[:, :0] if fc1 is None else x @ fc1.double().t()
    h, u = (x @ up.t(), 1) if activation == "relu2" else (x @ up.t()).chunk(2, 1)
    act = {"relu2": lambda h: F.relu(h).square(), "silu": F.silu, "gelu": F.gelu}[activation](h) * u
    return x @ gate.t(), z, act


def tail_inputs(tokens, latent, width, inner, residual, dtype):
    """y, fc2, shared, shared_down, residual."""
    fc2 = weight(width, latent, dtype=dtype) if latent else None
    y, extra = normal(tokens, latent or width, dtype=dtype), normal(tokens, width, dtype=dtype) if residual else None
    return y, fc2, normal(tokens, inner, dtype=dtype), weight(width, inner, dtype=dtype), extra


def tail_definition(y, fc2, shared, shared_down, residual):
    out = y.double() if fc2 is None else y.double() @ fc2.double().t()
    out = out + shared.double() @ shared_down.double().t()
    return out if residual is None else out + residual.double()


# the sizes that the kernels with tensor cores take: several tiles of rows and tokens, several parts of their products
eighth = st.integers(1, 40).map(lambda n: 8 * n)
fronts_in_eights = st.tuples(
    st.integers(0, 150), eighth, st.integers(1, 200), st.integers(0, 200), st.integers(1, 200), st.just("relu2"),
    st.just(torch.bfloat16), st.sampled_from([torch.float32, torch.bfloat16]),
)  # fmt: skip
tails_in_eights = st.tuples(
    st.integers(0, 150), st.one_of(st.just(0), eighth), st.integers(1, 200), eighth, st.booleans(),
    st.just(torch.bfloat16),
)  # fmt: skip


# ---- the front


@front_alone
@settings(max_examples=6)
@given(fronts_in_eights)
def test_front_agrees_with_the_definition_in_eights(backend, problem):
    args = front_inputs(*problem)
    out, truth = latent_moe_front(*args), front_definition(*args, "relu2")
    assert_close_to(out[0], truth[0], 2e-5)
    assert_close_to(out[1], truth[1], 2e-5)
    assert_close_to(out[2], truth[2], 1e-4)


@front_alone
@given(fronts)
def test_front_agrees_with_the_definition(backend, problem):
    args, activation, dtype = front_inputs(*problem), problem[5], problem[6]
    logits, z, shared = latent_moe_front(*args, activation=activation)
    assert logits.dtype == torch.float32 and z.dtype == shared.dtype == dtype
    for out, truth in zip((logits, z, shared), front_definition(*args, activation), strict=True):
        assert out.is_contiguous()
        assert_close_to(out, truth, 2e-5)


@front_alone
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_front_gate(backend, activation, dtype):
    args = front_inputs(9, 200, 40, 48, 64, activation, dtype, torch.float32)
    logits, z, shared = latent_moe_front(*args, activation=activation)
    truth = front_definition(*args, activation)
    assert_within(logits, truth[0], 1e-5)
    assert_within(z, truth[1])
    assert_within(shared, truth[2])


@front_alone
@pytest.mark.parametrize("router", [torch.float32, torch.bfloat16, torch.float16])
def test_the_router_is_not_narrowed(backend, router):
    """Neither tf32 nor bfloat16: a difference of 2^-20 between two experts is seen, whatever dtype x has."""
    x = torch.ones(3, 32, device=DEVICE).bfloat16()
    gate = torch.ones(2, 32, device=DEVICE, dtype=router)
    if router == torch.float32:
        gate[1] += 2.0**-20
    logits, *_ = latent_moe_front(x, gate, None, torch.ones(4, 32, device=DEVICE).bfloat16())
    difference = (logits[:, 1] - logits[:, 0]).double()
    assert_close_to(difference, torch.full((3,), 2.0**-15 if router == torch.float32 else 0.0, device=DEVICE), 1e-9)


@front_alone
def test_the_shared_activation_is_not_rounded_before(backend):
    """relu2 of a float32 sum: in float16, 300^2 times what follows is inf only where the result is."""
    x = torch.full((1, 100), 2.5, device=DEVICE).half()
    up = torch.full((1, 100), 1.0, device=DEVICE).half()
    _, _, shared = latent_moe_front(x, up, None, up)
    assert shared.item() == 62496  # 250^2 = 62500, rounded once
    x = torch.full((1, 100), 3.0, device=DEVICE).half()
    assert latent_moe_front(x, up, None, up)[2].isinf().all()


# ---- the tail


@tail_alone
@settings(max_examples=6)
@given(tails_in_eights)
def test_tail_agrees_with_the_definition_in_eights(backend, problem):
    args = tail_inputs(*problem)
    assert_close_to(latent_moe_tail(*args), tail_definition(*args), 2e-5)


@tail_alone
@given(tails)
def test_tail_agrees_with_the_definition(backend, problem):
    args = tail_inputs(*problem)
    out = latent_moe_tail(*args)
    assert out.dtype == problem[-1] and out.is_contiguous()
    assert_close_to(out, tail_definition(*args), 2e-5)


@tail_alone
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_tail_gate(backend, residual, dtype):
    args = tail_inputs(9, 48, 100, 130, residual, dtype)
    assert_within(latent_moe_tail(*args), tail_definition(*args))


@tail_alone
def test_the_sum_is_rounded_once(backend):
    """256 + 1 + 1 in bfloat16: 256 where each step is rounded, 258 where the sum is."""
    ones = torch.ones(1, 1, device=DEVICE).bfloat16()
    out = latent_moe_tail(256 * ones, ones, ones, ones, ones)
    assert out.item() == 258
    assert latent_moe_tail(256 * ones, None, ones, ones, ones).item() == 258


@tail_alone
def test_terms_of_float16_may_cancel(backend):
    """The products leave float16's range, their sum does not."""
    big = torch.full((1, 64), 64.0, device=DEVICE).half()
    w = torch.full((2, 64), 64.0, device=DEVICE).half()
    out = latent_moe_tail(big, w, big, -w, torch.ones(1, 2, device=DEVICE).half())
    assert out.tolist() == [[1.0, 1.0]]


# ---- both


def run(op, args, activation="relu2"):
    return latent_moe_front(*args, activation=activation) if op == "front" else (latent_moe_tail(*args),)


def some(op, tokens=9, dtype=torch.bfloat16):
    if op == "front":
        return front_inputs(tokens, 64, 16, 24, 40, "relu2", dtype)
    return tail_inputs(tokens, 24, 64, 40, True, dtype)


PER_TOKEN = {"front": (0,), "tail": (0, 2, 4)}

@front_alone
@pytest.mark.parametrize("i", [0, 4, 8])
def test_front_rows_do_not_see_the_batch(backend, i):
    rows_do_not_see_the_batch("front", backend, i)


@tail_alone
@pytest.mark.parametrize("i", [0, 4, 8])
def test_tail_rows_do_not_see_the_batch(backend, i):
    rows_do_not_see_the_batch("tail", backend, i)


def rows_do_not_see_the_batch(op, backend, i):
    """Alone, and beside a row of NaN. A GPU's kernels choose their tile by the number of rows, but for this mode."""
    args = some(op)
    with batch_invariant():
        whole = run(op, args)
        alone = run(op, [t[i : i + 1] if n in PER_TOKEN[op] else t for n, t in enumerate(args)])
        args[0][(i + 1) % 9] = float("nan")
        beside = run(op, args)
    for a, b, c in zip(whole, alone, beside, strict=True):
        assert_invariant(backend, a[i : i + 1], b)
        assert_invariant(backend, a[i], c[i])


@front_alone
@pytest.mark.parametrize("dtype", DTYPES)
def test_front_takes_any_strides(backend, dtype):
    takes_any_strides("front", backend, dtype)


@tail_alone
@pytest.mark.parametrize("dtype", DTYPES)
def test_tail_takes_any_strides(backend, dtype):
    takes_any_strides("tail", backend, dtype)


def takes_any_strides(op, backend, dtype):
    args = some(op, dtype=dtype)
    strided = [t.t().contiguous().t() for t in args]
    for a, b in zip(run(op, args), run(op, strided), strict=True):
        assert b.is_contiguous()
        assert_invariant(backend, a, b)


@front_alone
def test_front_is_deterministic(backend):
    args = some("front", 20)
    for a, b in zip(run("front", args), run("front", args), strict=True):
        assert_same_bits(a, b)


@tail_alone
def test_tail_is_deterministic(backend):
    args = some("tail", 20)
    assert_same_bits(latent_moe_tail(*args), latent_moe_tail(*args))


# tokens, width, experts, latent, shared: the published widths, each by itself
WIDTHS = [(1, 4096, 8, 8, 8), (2, 64, 512, 16, 16), (1, 32, 8, 1024, 16), (1, 32, 8, 16, 5376), (2, 2688, 128, 0, 16)]


@pytest.mark.parametrize("tokens, width, experts, latent, inner", WIDTHS)
def test_published_widths(backend, tokens, width, experts, latent, inner):
    args = front_inputs(tokens, width, experts, latent, inner, "relu2", torch.bfloat16, torch.float32)
    logits, z, shared = latent_moe_front(*args)
    truth = front_definition(*args, "relu2")
    assert_within(logits, truth[0], 1e-5)
    assert_within(z, truth[1])
    assert_within(shared, truth[2])
    args = tail_inputs(tokens, latent, width, inner, False, torch.bfloat16)
    assert_within(latent_moe_tail(*args), tail_definition(*args))


@pytest.mark.parametrize("tokens", [0, 1, 5])
@pytest.mark.parametrize("activation", ["relu2", "silu"])
@pytest.mark.parametrize("latent", [0, 4])
def test_opcheck(tokens, activation, latent):
    args = front_inputs(tokens, 8, 6, latent, 5, activation, torch.float32)
    torch.library.opcheck(torch.ops.n3.latent_moe_front.default, args, {"activation": activation})
    args = tail_inputs(tokens, latent, 8, 5, bool(latent), torch.float32)
    torch.library.opcheck(torch.ops.n3.latent_moe_tail.default, args)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic):
    front = torch.compile(latent_moe_front, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    tail = torch.compile(latent_moe_tail, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for tokens in (4, 7):
        args = some("front", tokens, torch.float32)
        torch.testing.assert_close(front(*args), latent_moe_front(*args))
        args = some("tail", tokens, torch.float32)
        torch.testing.assert_close(tail(*args), latent_moe_tail(*args))


X, GATE, UP = torch.zeros(3, 16), torch.zeros(8, 16), torch.zeros(6, 16)
GOOD_FRONT = {"x": X, "router_weight": GATE, "fc1": torch.zeros(4, 16), "shared_up": UP}
BAD_FRONT = [
    ({"x": X.int()}, "x must be float32, float16 or bfloat16, got int32"),
    ({"x": X[0]}, "x must have 2 dimensions, got 1"),
    ({"activation": "relu"}, "activation must be one of relu2, silu, gelu, got relu"),
    ({"router_weight": GATE.int()}, "router_weight must be float32, float16 or bfloat16, got int32"),
    ({"router_weight": GATE[0]}, "router_weight must have 2 dimensions, got 1"),
    ({"router_weight": GATE[:, 1:]}, "router_weight must have shape [8, 16], got [8, 15]"),
    ({"fc1": GATE.half()}, "fc1 must have the dtype of x (float32), got float16"),
    ({"fc1": GATE[0]}, "fc1 must have 2 dimensions, got 1"),
    ({"fc1": GATE[:, 1:]}, "fc1 must have shape [8, 16], got [8, 15]"),
    ({"shared_up": UP.half()}, "shared_up must have the dtype of x (float32), got float16"),
    ({"shared_up": UP[:, 1:]}, "shared_up must have shape [6, 16], got [6, 15]"),
    ({"shared_up": UP[1:], "activation": "gelu"}, "shared_up must have an even number of rows for gelu, got 5"),
]
DOWN, Y = torch.zeros(16, 6), torch.zeros(3, 4)
GOOD_TAIL = {"y": Y, "fc2": torch.zeros(16, 4), "shared": torch.zeros(3, 6), "shared_down": DOWN}
BAD_TAIL = [
    ({"y": Y.int()}, "y must be float32, float16 or bfloat16, got int32"),
    ({"y": Y[0]}, "y must have 2 dimensions, got 1"),
    ({"shared_down": DOWN.half()}, "shared_down must have the dtype of y (float32), got float16"),
    ({"shared_down": DOWN[0]}, "shared_down must have 2 dimensions, got 1"),
    ({"fc2": None}, "y must have shape [3, 16], got [3, 4]"),
    ({"fc2": torch.zeros(16, 4).half()}, "fc2 must have the dtype of y (float32), got float16"),
    ({"fc2": torch.zeros(16, 5)}, "fc2 must have shape [16, 4], got [16, 5]"),
    ({"shared": torch.zeros(3, 6).half()}, "shared must have the dtype of y (float32), got float16"),
    ({"shared": torch.zeros(2, 6)}, "shared must have shape [3, 6], got [2, 6]"),
    ({"residual": torch.zeros(3, 16).half()}, "residual must have the dtype of y (float32), got float16"),
    ({"residual": torch.zeros(3, 15)}, "residual must have shape [3, 16], got [3, 15]"),
]
CALLS = [("front", *c) for c in BAD_FRONT] + [("tail", *c) for c in BAD_TAIL]


@pytest.mark.parametrize("op, change, message", CALLS)
def test_bad_calls(backend, op, change, message):
    good = GOOD_FRONT if op == "front" else GOOD_TAIL
    call = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in {**good, **change}.items()}
    with pytest.raises(RuntimeError) as error:
        getattr(torch.ops.n3, f"latent_moe_{op}")(**call)
    assert str(error.value) == f"n3::latent_moe_{op}: {message}"
