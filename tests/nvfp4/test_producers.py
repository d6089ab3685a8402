"""The quantisers fused with relu2, silu_mul and rms_norm: they equal `quantize` of what they fuse, byte for byte."""

from __future__ import annotations

import nvfp4_oracle as oracle
import pytest
import torch
from conftest import DEVICE, assert_same_bits, fenced
from hypothesis import given
from hypothesis import strategies as st

import n3kernels
from n3kernels.nvfp4 import (
    quantize,
    reference,
    reference_quantize,
    relu2_quantize,
    rms_norm_quantize,
    silu_mul_quantize,
)  # fmt: skip

OPS = ("relu2_nvfp4_quantize", "silu_mul_nvfp4_quantize", "rms_norm_nvfp4_quantize")
# Triton's interpreter computes in NumPy, which warns of the overflows that the formula has by design.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

shapes = st.tuples(st.integers(0, 5), st.integers(1, 5), st.sampled_from(DTYPES))
options_ = st.fixed_dictionaries({
    "four_over_six": st.booleans(), "metric": st.sampled_from(["mae", "mse"]), "per_row": st.booleans(),
    "scale_layout": st.sampled_from(["linear", "128x4"]),
})  # fmt: skip
relu2, silu_mul = pytest.param("relu2", id="relu2"), pytest.param("silu_mul", id="silu_mul")
ACTIVATIONS = {"relu2": (relu2_quantize, 1), "silu_mul": (silu_mul_quantize, 2)}


def activate(name: str, x: torch.Tensor) -> torch.Tensor:
    return x.relu().square() if name == "relu2" else reference_quantize.silu_mul(x)


def values(rows: int, width: int, dtype: torch.dtype, scale: float = 2.0) -> torch.Tensor:
    """Normal numbers, every 16 of them 2^normal times as large."""
    x = torch.randn(rows, width // 16, 16) * torch.exp2(torch.randn(rows, width // 16, 1)) * scale
    return fenced(x.view(rows, width).to(dtype).to(DEVICE))


def given_scale(x: torch.Tensor, per_row: bool) -> torch.Tensor:
    return torch.rand(x.shape[:-1] if per_row else (), device=DEVICE) * 0.01 + 0.001


def parts(t):
    return t.q, t.block_scale, t.global_scale


def reference_of(y: torch.Tensor, *args, **options):
    with n3kernels.use_backend("reference"):
        return quantize(y, *args, **options)


def assert_quantised(t, y: torch.Tensor, *args, close: bool = False, **options):
    """``t`` is `quantize` of ``y``; ``close``: y may be off by a rounding, so that few codes are those beside."""
    want = reference_of(y, *args, **options)
    assert t.shape == want.shape and t.scale_layout == want.scale_layout
    if not close:
        for a, b in zip(parts(t), parts(want), strict=True):
            assert_same_bits(a, b)
        return
    torch.testing.assert_close(t.global_scale, want.global_scale, rtol=1e-2, atol=0, equal_nan=True)
    scales = [v.block_scale.view(torch.uint8).int() for v in (t, want)]
    assert (scales[0] - scales[1]).abs().sum() <= 1 + scales[0].numel() // 1000
    codes = [torch.from_numpy(oracle.unpack(v.q)).int() for v in (t, want)]
    off = codes[0] != codes[1]
    assert off.sum() <= 16 + off.numel() * 1e-4
    assert ((codes[0] & 7) - (codes[1] & 7)).abs().max() <= 1 if off.any() else True


# ---------------------------------------------------------------- agreement with the composition


@pytest.mark.op("relu2_nvfp4_quantize")
@given(shapes, options_, st.booleans())
def test_relu2(backend, shape, options, scaled):
    rows, blocks, dtype = shape
    x = values(rows, blocks * 16, dtype)
    g = given_scale(x, options["per_row"]) if scaled else None
    assert_quantised(relu2_quantize(x, g, **options), activate("relu2", x), g, **options)


@pytest.mark.op("silu_mul_nvfp4_quantize")
@given(shapes, options_, st.booleans())
def test_silu_mul(backend, shape, options, scaled):
    rows, blocks, dtype = shape
    x = values(rows, blocks * 32, dtype)
    g = given_scale(x, options["per_row"]) if scaled else None
    y = activate("silu_mul", x)
    assert_quantised(silu_mul_quantize(x, g, **options), y, g, close=backend != "reference", **options)


@pytest.mark.op("rms_norm_nvfp4_quantize")
@given(
    shapes, options_, st.booleans(), st.booleans(), st.booleans(), st.sampled_from([None, "float32", "same"]),
    st.sampled_from([0.0, 1e-5, 3.0]),
)  # fmt: skip
def test_rms_norm(backend, shape, options, scaled, keep, wide_weight, residual, eps):
    rows, blocks, dtype = shape
    x = values(rows, blocks * 16, dtype)
    weight = fenced(torch.randn(blocks * 16, device=DEVICE).to(torch.float32 if wide_weight else dtype))
    if residual is not None:
        residual = values(rows, blocks * 16, torch.float32 if residual == "float32" else dtype)
    g = given_scale(x, options["per_row"]) if scaled else None
    t, y, total = rms_norm_quantize(x, weight, eps, residual, g, keep=keep, **options)
    want_y, want_total = reference_quantize.rms_norm(x, weight, residual, eps)
    assert_quantised(t, want_y, g, **options)
    assert (y is None) == (not keep) and (total is None) == (residual is None)
    if keep:
        assert_same_bits(y, want_y)
    if residual is not None:
        assert_same_bits(total, want_total)


@pytest.mark.parametrize("name", [relu2, silu_mul])
@pytest.mark.parametrize("rows", [3, 260])
@pytest.mark.parametrize("dtype", DTYPES)
def test_activations_of_published_width(backend, name, rows, dtype):
    """3712 of the shared experts; many rows are made anew for the codes on the CPU, few are kept from the maximum."""
    if backend == "triton" and DEVICE == "cpu":
        rows = min(rows, 4)  # the interpreter is slow
    op, factor = ACTIVATIONS[name]
    x = torch.randn(rows, 3712 * factor, device=DEVICE).to(dtype)
    assert_quantised(op(x), activate(name, x), close=name == "silu_mul")


@pytest.mark.op("rms_norm_nvfp4_quantize")
@pytest.mark.parametrize("rows, keep", [(2, False), (200, False), (200, True)])
def test_norm_of_published_width(backend, rows, keep):
    if backend == "triton" and DEVICE == "cpu":
        rows = min(rows, 4)
    x = torch.randn(rows, 2688, device=DEVICE).bfloat16()
    residual, weight = torch.randn(rows, 2688, device=DEVICE), torch.randn(2688, device=DEVICE).bfloat16()
    t, y, total = rms_norm_quantize(x, weight, residual=residual, keep=keep, four_over_six=True)
    want, want_total = reference_quantize.rms_norm(x, weight, residual, 1e-5)
    assert_quantised(t, want, four_over_six=True)
    assert_same_bits(total, want_total)


# ---------------------------------------------------------------- invariants


@pytest.mark.op("relu2_nvfp4_quantize")
def test_every_16_bit_value(backend):
    """Squares that overflow, underflow and NaN: each in a block of its own, beside a 1 that survives."""
    for dtype in (torch.bfloat16, torch.float16):
        bits = torch.arange(-(2**15), 2**15, 7 if backend == "triton" else 1, dtype=torch.int32).to(torch.int16)
        x = torch.zeros(len(bits), 16, dtype=dtype)
        x[:, 3], x[:, 9] = bits.view(dtype), 1.0
        g = torch.tensor(0.01, device=DEVICE)
        assert_quantised(relu2_quantize(x.to(DEVICE), g), activate("relu2", x.to(DEVICE)), g)


@pytest.mark.op("silu_mul_nvfp4_quantize")
def test_silu_of_extreme_gates(backend):
    """Far to the left silu is -0, far to the right the gate itself; NaN and infinities spoil their block alone."""
    inf, nan = float("inf"), float("nan")
    gates = [-inf, -3e38, -200.0, -88.0, -87.0, -20.0, -0.0, 0.0, 1e-40, 20.0, 88.0, 200.0, 3e38, inf, nan]
    a = torch.ones(len(gates), 16)
    a[:, 5] = torch.tensor(gates)
    x = torch.cat([a, torch.full_like(a, 0.5)], 1).to(DEVICE)
    g = torch.tensor(0.01, device=DEVICE)
    t, want = silu_mul_quantize(x, g), reference_of(activate("silu_mul", x), g)
    for mine, right in zip(parts(t), parts(want), strict=True):
        assert_same_bits(mine, right)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_row_harms_no_other(backend, bad):
    weight = torch.rand(64, device=DEVICE) + 0.5
    for name, op in (
        ("relu2_nvfp4_quantize", relu2_quantize),
        ("silu_mul_nvfp4_quantize", silu_mul_quantize),
        ("rms_norm_nvfp4_quantize", lambda x, **options: rms_norm_quantize(x, weight, **options)[0]),
    ):
        x = values(4, 128 if "silu" in name else 64, torch.bfloat16)
        clean = op(x[:3])
        x[3, 7] = bad
        t = op(x)
        for mine, right in zip((t.q[:3], t.block_scale[:3], t.global_scale), parts(clean), strict=True):
            assert_same_bits(mine, right)
        nan = t.block_scale[3].view(torch.uint8) == 0x7F
        # A NaN spoils the norm of its row; an infinity makes 0 of the others.
        assert nan[0] and nan.all() == (name.startswith("rms") and bad != bad)
        rows = op(x, per_row=True)
        assert_same_bits(rows.q[:3], op(x[:3], per_row=True).q)


@pytest.mark.parametrize("rows, blocks, per_row, dtype", [(3, 1, False, torch.bfloat16), (2, 2, True, torch.float32)])
def test_any_strides(backend, rows, blocks, per_row, dtype):
    """Columns of a wider matrix, every other row, transposed, expanded: what a contiguous copy gives."""
    x = values(2 * rows, blocks * 32 + 16, dtype)
    views = [x[::2, 16:], x[::2, 16:].t().contiguous().t(), x[:1, 16:].expand(rows, blocks * 32)]
    views.append(x[:, 16:].unflatten(0, (rows, 2)).transpose(0, 1))
    weight = torch.randn(2 * blocks * 32, device=DEVICE)[::2].to(dtype)
    for v in views:
        for op in (relu2_quantize, silu_mul_quantize):
            for mine, right in zip(*(parts(op(u, per_row=per_row)) for u in (v, v.contiguous())), strict=True):
                assert_same_bits(mine, right)
        results = [
            rms_norm_quantize(u, w, residual=u.flip(-1) if u is v else u.flip(-1).contiguous(), keep=True)
            for u, w in ((v, weight), (v.contiguous(), weight.contiguous()))
        ]
        for mine, right in zip(*((*parts(t), y, total) for t, y, total in results), strict=True):
            assert_same_bits(mine, right)


@pytest.mark.op("rms_norm_nvfp4_quantize")
def test_a_power_of_two_cancels_in_the_norm(backend):
    x, weight = values(3, 64, torch.float32), torch.randn(64, device=DEVICE)
    a, b = (rms_norm_quantize(v, weight, 0.0)[0] for v in (x, x * 64))
    for mine, right in zip(parts(a), parts(b), strict=True):
        assert_same_bits(mine, right)


@pytest.mark.op("rms_norm_nvfp4_quantize")
@pytest.mark.parametrize("per_row", [False, True])
def test_threads_do_not_show(backend, per_row):
    x = values(300, 1920, torch.bfloat16) if backend == "cpu" else values(4, 64, torch.bfloat16)
    weight = torch.randn(x.shape[1], device=DEVICE)
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            t, y, total = rms_norm_quantize(x, weight, residual=x.float(), keep=n == 2, per_row=per_row)
            results.append((*parts(t), total))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for mine, right in zip(other, results[0], strict=True):
            assert_same_bits(mine, right)


# ---------------------------------------------------------------- edges


@pytest.mark.parametrize("shape", [(32,), (2, 3, 32), (2, 0, 32), (0, 32), (3, 0)])
@pytest.mark.parametrize("options", [{}, {"per_row": True}, {"scale_layout": "128x4"}], ids=str)
def test_shapes(backend, shape, options):
    x, weight = torch.randn(shape, device=DEVICE), torch.ones(shape[-1], device=DEVICE)
    rows = x.numel() // shape[-1] if shape[-1] else 0
    for op, k in (
        (relu2_quantize, shape[-1]),
        (silu_mul_quantize, shape[-1] // 2),
        (lambda x, **o: rms_norm_quantize(x, weight, **o)[0], shape[-1]),
    ):
        t = op(x, **options)
        assert t.shape == (*shape[:-1], k) and t.q.shape == (*shape[:-1], k // 2)
        tiles = (-(-rows // 128) * 128, -(-k // 64) * 4)
        assert t.block_scale.shape == (tiles if "scale_layout" in options else (*shape[:-1], k // 16))
        assert t.global_scale.shape == (shape[:-1] if "per_row" in options else ())
        if not x.numel():
            assert (t.global_scale == 1).all()


def test_tiles_hold_the_linear_scales_and_zeros(backend):
    x = values(131, 96, torch.bfloat16)
    linear, tiles = relu2_quantize(x), relu2_quantize(x, scale_layout="128x4")
    assert_same_bits(tiles.q, linear.q)
    assert_same_bits(tiles.block_scale, reference.nvfp4_swizzle_scale(linear.block_scale))


# ---------------------------------------------------------------- framework


def calls(x: torch.Tensor):
    weight = torch.ones(x.shape[-1], device=x.device)
    yield torch.ops.n3.relu2_nvfp4_quantize.default, (x,)
    yield torch.ops.n3.silu_mul_nvfp4_quantize.default, (x,)
    yield torch.ops.n3.rms_norm_nvfp4_quantize.default, (x, weight)
    yield torch.ops.n3.rms_norm_nvfp4_quantize.default, (x, weight, torch.randn(x.shape, device=x.device))


@pytest.mark.parametrize("rows", [3, 0])
@pytest.mark.parametrize("options", [{}, {"per_row": True, "four_over_six": True, "scale_layout": "128x4"}], ids=str)
def test_opcheck(rows, options):
    for op, args in calls(torch.randn(rows, 64, device=DEVICE)):
        keep = {"keep": bool(options)} if op == torch.ops.n3.rms_norm_nvfp4_quantize.default else {}
        oracle.opcheck(op, args, {**options, **keep})


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_break(dynamic):
    torch._dynamo.reset()
    weight = torch.rand(64, device=DEVICE)

    def block(x, residual):
        t, y, total = rms_norm_quantize(x, weight, residual=residual, keep=True)
        up = relu2_quantize(y * 2, per_row=True)
        return t.dequantize(torch.float32), up.dequantize(torch.float32), silu_mul_quantize(total).q

    fn = torch.compile(block, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (3, 5, 130):
        x, residual = (torch.randn(rows, 64, device=DEVICE) for _ in range(2))
        for mine, right in zip(fn(x, residual), block(x, residual), strict=True):
            assert_same_bits(mine, right)


def test_no_gradient_flows():
    x = torch.randn(2, 32, device=DEVICE, requires_grad=True)
    weight = torch.ones(32, device=DEVICE, requires_grad=True)
    t, y, _ = rms_norm_quantize(x, weight, keep=True)
    assert not y.requires_grad and not t.global_scale.requires_grad
    assert not relu2_quantize(x).global_scale.requires_grad


X = torch.zeros(2, 32)
BAD = [
    ({"x": X.double()}, "x must be float32, float16 or bfloat16, got float64"),
    ({"x": torch.zeros(())}, "x must have at least 1 dimension, got 0"),
    ({"global_scale": torch.ones((), dtype=torch.float64)}, "global_scale must be float32, got float64"),
    ({"global_scale": torch.ones(2)}, "global_scale must have 1 element, got 2"),
    ({"global_scale": torch.ones(3), "per_row": True}, "global_scale must have shape [2], got [3]"),
    ({"metric": "max"}, "metric must be one of mae, mse, got max"),
    ({"scale_layout": "8x4"}, "scale_layout must be one of linear, 128x4, got 8x4"),
]
BAD_OF = {
    "relu2_nvfp4_quantize": [
        ({"x": torch.zeros(2, 24)}, "x must have a last dimension that is a multiple of 16, got 24")
    ],
    "silu_mul_nvfp4_quantize": [
        ({"x": torch.zeros(2, 48)}, "x must have a last dimension that is a multiple of 32, got 48")
    ],
    "rms_norm_nvfp4_quantize": [
        ({"x": torch.zeros(2, 24), "weight": torch.ones(24)},
         "x must have a last dimension that is a multiple of 16, got 24"),
        ({"weight": torch.ones(16)}, "weight must have shape [32], got [16]"),
        ({"weight": torch.ones(32).half()}, "weight must be float32, got float16"),
        ({"x": X.half(), "weight": torch.ones(32).bfloat16()}, "weight must be float32 or float16, got bfloat16"),
        ({"residual": torch.zeros(2, 16)}, "residual must have shape [2, 32], got [2, 16]"),
        ({"residual": torch.zeros(64)}, "residual must have shape [2, 32], got [64]"),
        ({"residual": X.int()}, "residual must be float32, got int32"),
        ({"x": X.bfloat16(), "residual": X.half()}, "residual must be float32 or bfloat16, got float16"),
        ({"eps": -1.0}, "eps must be >= 0, got -1"),
        ({"eps": float("nan")}, "eps must be >= 0, got nan"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name, change, message", [(n, *bad) for n in OPS for bad in BAD + BAD_OF[n]])
def test_bad_calls(backend, name, change, message):
    call = {"x": X, **({"weight": torch.ones(32)} if name.startswith("rms") else {}), **change}
    call = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in call.items()}
    with pytest.raises(RuntimeError) as error:
        getattr(torch.ops.n3, name).default(**call)
    assert str(error.value) == f"n3::{name}: {message}"
