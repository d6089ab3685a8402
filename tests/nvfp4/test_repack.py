"""nvfp4_repack and nvfp4_linear.packed: the blob of sm_90a, its bit maths, and the product that reads it."""

from __future__ import annotations

import numpy as np
import nvfp4_oracle as oracle
import pytest
import torch
from conftest import DEVICE, assert_close_to, assert_same_bits, fenced
from hypothesis import given
from hypothesis import strategies as st
from nvfp4_oracle import e4m3, weights

import n3kernels
from n3kernels.nvfp4 import NVFP4Tensor, PackedNVFP4, linear, prepack, reference, reference_repack

OPS = ("nvfp4_repack", "nvfp4_linear.packed")
of_repack, of_packed = pytest.mark.op("nvfp4_repack"), pytest.mark.op("nvfp4_linear.packed")


def any_bytes(n, k):
    """Weights of all bytes: scales zero, subnormal, negative and NaN among them."""
    q = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device=DEVICE)
    return fenced(q), fenced(e4m3(torch.randint(0, 256, (n, k // 16))))


# ---- bits, on the host: the functions that the kernels compile

MAGNITUDES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


@pytest.fixture
def host():
    """Of these tests alone: a library from elsewhere has its operators in every Python."""
    return pytest.importorskip("n3kernels._host", reason="_host was built for another Python")


def test_a_word_s_bits_are_a_permutation(host):
    """Every bit of every code has a bit of the word of its own: with one bit set, all that comes out is that bit. The
    maps are linear in the bits, so that this holds for all 2^32 words."""
    words = [host.nvfp4_pack_codes([1 << bit if i == code else 0 for i in range(8)])
             for code in range(8) for bit in range(4)]  # fmt: skip
    assert sorted(words) == [1 << bit for bit in range(32)]
    for word, other in zip(words, words[::-1], strict=True):
        for half in (False, True):
            a, b, both = (np.array(host.nvfp4_codes(w, half)) for w in (word, other, word | other))
            assert (both == a | b).all()


@pytest.mark.parametrize("half", [False, True])
def test_every_code_in_every_place(host, half):
    """Registers hold the codes as bfloat16 times 2^-126, or float16 times 2^-14, and zeros elsewhere."""
    for place in range(8):
        for code in range(16):
            codes = [0] * 8
            codes[place] = code
            halves = np.array(host.nvfp4_codes(host.nvfp4_pack_codes(codes), half), dtype=np.uint32).view(np.uint16)
            bits = torch.from_numpy(halves.astype(np.int32)).short()
            values = bits.view(torch.float16).double() * 2.0**14 if half else (
                (bits.int() << 16).view(torch.float32).double() * 2.0**126
            )  # fmt: skip
            want = torch.zeros(8, dtype=torch.float64)
            want[place] = MAGNITUDES[code & 7] * (-1 if code & 8 else 1)
            assert_same_bits(values, want)


def test_every_scale(host):
    """A byte is half a float16: 2^6 s is its 5 bits of exponent and 3 of mantissa, NaN has all bits set."""
    seen = set()
    for byte in range(256):
        packed, value = host.nvfp4_pack_scale(byte), host.e4m3_to_float(byte & 0x7F)
        as_half = np.array([packed << 7], dtype=np.uint16).view(np.float16)[0]
        if np.isnan(value):
            assert packed == 0xFF and np.isnan(as_half) and host.nvfp4_unpack_scale(packed) == 0x7F
        else:
            assert float(as_half) == 64 * float(value) and host.nvfp4_unpack_scale(packed) == byte & 0x7F
        seen.add(packed)
    assert len(seen) == 128


# ---- the blob


@of_repack
@given(st.integers(0, 40), st.integers(1, 9))
def test_unpack_gives_the_values_back(backend, n, blocks):
    """Value for value, the sign of zeros too; a NaN scale comes back as one."""
    q, scale = any_bytes(n, 16 * blocks)
    w = NVFP4Tensor.from_parts(q, scale, torch.ones((), device=DEVICE))
    packed = prepack(w)
    assert_same_bits(packed.blob, reference_repack.nvfp4_repack(q, scale))
    back = packed.unpack()
    want, got = (reference.decode(t.q, t.block_scale) for t in (w, back))
    assert torch.equal(want.isnan(), got.isnan())
    assert_same_bits(got.nan_to_num(7.0), want.nan_to_num(7.0))
    assert not (back.block_scale.view(torch.uint8) & 0x80).any()
    assert_same_bits(prepack(back).blob, packed.blob)  # nothing is lost a second time


@of_repack
def test_every_pair(backend):
    """All 4096 (code, scale) pairs, at every place of a tile."""
    q = torch.arange(8, device=DEVICE).mul(0x22).add(0x10).to(torch.uint8).repeat(256, 4)  # codes 0..15, four times
    scale = torch.arange(256).view(256, 1) + torch.tensor([0, 64, 128, 192])
    w = NVFP4Tensor.from_parts(q, e4m3(scale % 256), torch.ones((), device=DEVICE))
    back = prepack(w).unpack()
    want, got = (reference.decode(t.q, t.block_scale).nan_to_num(7.0) for t in (w, back))
    assert_same_bits(got, want)


@of_repack
def test_a_code_of_the_blob(backend):
    """One code at a time: word 4 lane + j of a tile, lane 4 g + t; row g + 8 h, k 16 j + 8 e + 2 t + half."""
    for row, k in [(0, 0), (8, 1), (9, 18), (37, 79), (15, 63)]:
        q = torch.zeros(48, 80, dtype=torch.uint8, device=DEVICE)
        scale = e4m3(torch.full((48, 10), 0x38))  # 1
        q[row, k // 2] = 2 << 4 * (k % 2)  # its bit 1
        blob = torch.ops.n3.nvfp4_repack.default(q, scale)
        assert blob.shape == (3, 3 * 576 + 64)
        codes = blob.clone()
        for tile in range(3):
            codes[:, 576 * tile + 512 : 576 * tile + 576] = 0
        where = codes.nonzero().tolist()
        assert len(where) == 1 and where[0][0] == row // 16
        tile, lane, j = k // 64, row % 8 * 4 + k % 8 // 2, k % 64 // 16
        reg, half = row % 16 // 8 + k % 16 // 8 * 2, k % 2
        assert where[0][1] // 4 == 144 * tile + 4 * lane + j
        home = (reference_repack.HOME[reg][1] + 16 * half) % 32
        assert codes[where[0][0], where[0][1]] == 1 << home % 8 and where[0][1] % 4 == home // 8


@of_repack
def test_marks(backend):
    """The rows with a NaN scale, a byte each behind the tiles; nothing else there."""
    q, scale = any_bytes(40, 144)
    scale.view(torch.uint8).bitwise_and_(0x3F)
    for row, block, byte in [(0, 0, 0x7F), (17, 8, 0xFF), (39, 3, 0x7F)]:
        scale.view(torch.uint8)[row, block] = byte
    blob = torch.ops.n3.nvfp4_repack.default(q, scale)
    assert blob[:, -64:].nonzero().tolist() == [[0, 0], [1, 1], [2, 7]]


@of_repack
def test_strided_weights(backend):
    q, scale = any_bytes(20, 96)
    wide = torch.cat([q, q], 1)[:, : q.shape[1]]
    assert_same_bits(torch.ops.n3.nvfp4_repack.default(wide, scale), torch.ops.n3.nvfp4_repack.default(q, scale))


def test_swizzled_scales():
    w = n3kernels.nvfp4.quantize(torch.randn(40, 96, device=DEVICE))
    assert_same_bits(prepack(w.to_layout("128x4")).blob, prepack(w).blob)


# ---- the product


def operands(m, n, k, dtype, bias=True):
    q, scale, global_scale = weights(n, k, 0.01 / k**0.5, 0x30, 0x50)
    w = NVFP4Tensor.from_parts(q, scale, global_scale)
    x = fenced(torch.randn(m, k).to(dtype).to(DEVICE))
    return x, w, fenced(torch.randn(n).to(dtype).to(DEVICE)) if bias else None


@of_packed
@given(
    st.integers(0, 40), st.integers(1, 40), st.integers(1, 9), st.sampled_from([torch.bfloat16, torch.float16]),
    st.booleans(), st.sampled_from([None, "relu2"]),
)  # fmt: skip
def test_agrees_with_the_definition(backend, m, n, blocks, dtype, with_bias, activation):
    x, w, bias = operands(m, n, 16 * blocks, dtype, with_bias)
    with n3kernels.use_backend(None):
        packed = prepack(w)
    y = linear(x, packed, bias, activation)
    exact = oracle.decode(w.q, w.block_scale, w.global_scale)
    want, size = x.double() @ exact.t(), x.double().abs() @ exact.abs().t()
    if with_bias:
        want, size = want + bias.double(), size + bias.double().abs()
    if activation:
        want, size = want.relu().square(), 2 * size.square()
    assert_close_to(y, want, 1e-6, size)


@of_packed
@pytest.mark.parametrize("m", [1, 17, 70, 140, 300])
@pytest.mark.parametrize("n, k", [(464, 272), (80, 1856)])
def test_every_kernel_of_the_plan(backend, m, n, k):
    x, w, bias = operands(m, n, k, torch.bfloat16)
    exact = oracle.decode(w.q, w.block_scale, w.global_scale)
    want, size = x.double() @ exact.t() + bias.double(), x.double().abs() @ exact.abs().t() + bias.double().abs()
    with n3kernels.use_backend(None):
        packed = prepack(w)
    assert_close_to(linear(x, packed, bias), want, 1e-6, size)


@of_packed
def test_a_nan_scale_spoils_its_row_alone(backend):
    x, w, _ = operands(5, 40, 96, torch.bfloat16)
    w.block_scale.view(torch.uint8)[21, 4] = 0xFF
    with n3kernels.use_backend(None):
        packed = prepack(w)
    nan = linear(x, packed).isnan()
    assert nan[:, 21].all() and nan.sum() == 5


@of_packed
@pytest.mark.parametrize("lead", [(), (2, 3), (2, 0)])
def test_leading_dimensions(backend, lead):
    x, w, _ = operands(1, 24, 48, torch.float16)
    x = x[0].expand(*lead, 48)
    with n3kernels.use_backend(None):
        packed = prepack(w)
    y = linear(x, packed)
    assert y.shape == (*lead, 24) and y.is_contiguous()


def test_float32_goes_to_the_kernels_of_the_canonical_layout():
    x, w, bias = operands(3, 24, 48, torch.float32)
    assert_same_bits(linear(x, prepack(w), bias), linear(x, prepack(w).unpack(), bias))
    takes = n3kernels._dispatch.OPS["nvfp4_linear.packed"].supports["cuda"]
    assert takes(x) == "takes float16 and bfloat16 x, got float32: tensor cores would round it"
    assert takes(x.half()) is None and takes(x.bfloat16()) is None


@pytest.mark.parametrize("activation", [None, "relu2"])
def test_gradients(activation):
    """Those of the canonical layout, through unpacked weights."""
    x, w, bias = operands(3, 24, 80, torch.float16)
    grads = []
    for weight in (w, prepack(w)):
        leaves = x.clone().requires_grad_(), bias.clone().requires_grad_()
        with n3kernels.use_backend("reference"):
            y = linear(leaves[0], weight, leaves[1], activation)
            grads.append(torch.autograd.grad(y, leaves, torch.ones_like(y)))
    for a, b in zip(*grads, strict=True):
        assert_same_bits(a, b)


def test_a_named_tuple_of_tensors():
    w = prepack(n3kernels.nvfp4.quantize(torch.randn(8, 32, device=DEVICE)))
    assert isinstance(w.to("cpu"), PackedNVFP4) and w.shape == (8, 32)
    fn = torch.compile(lambda x, w: linear(x, w), fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 32, dtype=torch.bfloat16, device=DEVICE)
    assert_same_bits(fn(x, w), linear(x, w))


@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(grad):
    x, w, bias = operands(3, 24, 80, torch.float16)
    oracle.opcheck(torch.ops.n3.nvfp4_repack.default, (w.q, w.block_scale))
    x = x.clone().requires_grad_(grad)
    blob = prepack(w).blob
    oracle.opcheck(torch.ops.n3.nvfp4_linear.packed, (x, blob, w.global_scale, 24, bias, "relu2"))


# ---- bad calls

F8 = torch.float8_e4m3fn
LAST = "q must have a last dimension that is a positive multiple of 8, got"
BAD_REPACK = [
    ({"q": torch.zeros(4, 16, dtype=torch.int8)}, "q must be uint8, got int8"),
    ({"block_scale": torch.zeros(4, 2)}, "block_scale must be float8_e4m3fn, got float32"),
    ({"q": torch.zeros(1, 4, 16, dtype=torch.uint8)}, "q must have 2 dimensions, got 3"),
    ({"q": torch.zeros(4, 12, dtype=torch.uint8)}, f"{LAST} 12"),
    ({"q": torch.zeros(4, 0, dtype=torch.uint8)}, f"{LAST} 0"),
    ({"block_scale": torch.zeros(4, 3).to(F8)}, "block_scale must have shape [4, 2], got [4, 3]"),
]  # fmt: skip


@of_repack
@pytest.mark.parametrize("change, message", BAD_REPACK)
def test_bad_calls_of_repack(backend, change, message):
    call = {"q": torch.zeros(4, 16, dtype=torch.uint8), "block_scale": torch.zeros(4, 2).to(F8)} | change
    with pytest.raises(RuntimeError) as error:
        torch.ops.n3.nvfp4_repack.default(**{name: t.to(DEVICE) for name, t in call.items()})
    assert str(error.value).splitlines()[0].endswith(f"n3::nvfp4_repack: {message}")


BAD_PACKED = [
    ({"x": torch.zeros(2, 32, dtype=torch.int64)}, "x must be float32, float16 or bfloat16, got int64"),
    ({"blob": torch.zeros(1, 640, dtype=torch.int8)}, "blob must be uint8, got int8"),
    ({"global_scale": torch.ones((), dtype=torch.float16)}, "global_scale must be float32, got float16"),
    ({"x": torch.zeros(()).half()}, "x must have at least 1 dimension, got 0"),
    ({"x": torch.zeros(2, 24).half()}, "x must have a last dimension that is a positive multiple of 16, got 24"),
    ({"n": -1}, "n must not be negative, got -1"),
    ({"n": 17}, "blob must have shape [2, 640], got [1, 640]"),
    ({"x": torch.zeros(2, 80).half()}, "blob must have shape [1, 1216], got [1, 640]"),
    ({"global_scale": torch.ones(4)}, "global_scale must have 1 element, got 4"),
    ({"bias": torch.zeros(4)}, "bias must have the dtype of x (float16), got float32"),
    ({"bias": torch.zeros(5).half()}, "bias must have shape [4], got [5]"),
    ({"activation": "gelu"}, "activation must be one of None, relu2, got gelu"),
]


@of_packed
@pytest.mark.parametrize("change, message", BAD_PACKED)
def test_bad_calls_of_packed(backend, change, message):
    call = {"x": torch.zeros(2, 32).half(), "blob": torch.zeros(1, 640, dtype=torch.uint8),
            "global_scale": torch.ones(()), "n": 4} | change  # fmt: skip
    with pytest.raises(RuntimeError) as error:
        torch.ops.n3.nvfp4_linear.packed(**{k: t.to(DEVICE) if torch.is_tensor(t) else t for k, t in call.items()})
    assert str(error.value).splitlines()[0].endswith(f"n3::nvfp4_linear.packed: {message}")


def test_a_stack_is_packed_one_by_one():
    w = n3kernels.nvfp4.quantize(torch.randn(8, 32, device=DEVICE))
    with pytest.raises(RuntimeError, match="n3::nvfp4_repack: global_scale must have 1 element, got 2"):
        prepack(NVFP4Tensor.stack([w, w]))
