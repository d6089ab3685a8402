from __future__ import annotations

import nvfp4_oracle as oracle
import pytest
import torch
from conftest import DEVICE, assert_same_bits
from hypothesis import given
from hypothesis import strategies as st
from nvfp4_oracle import weights

from n3kernels.nvfp4 import NVFP4Tensor, embedding, reference

OPS = ("nvfp4_embedding",)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

# rows of W, blocks per row, ids, their dtype, dtype of the result
problems = st.tuples(
    st.integers(1, 9), st.integers(0, 9), st.lists(st.integers(0, 10**6), max_size=9),
    st.sampled_from([torch.int32, torch.int64]), st.sampled_from(DTYPES),
)  # fmt: skip


@given(problems)
def test_is_the_rows_of_the_decoded_matrix(backend, problem):
    n, blocks, ids, id_dtype, dtype = problem
    q, s, g = weights(n, blocks * 16)
    ids = torch.tensor([i % n for i in ids], dtype=id_dtype, device=DEVICE)
    out = embedding(ids, NVFP4Tensor.from_parts(q, s, g), dtype)
    assert_same_bits(out, reference.nvfp4_dequantize(q, s, g, dtype=dtype)[ids.long()])


@pytest.mark.parametrize("shape", [(), (2, 3), (0,), (2, 0)])
def test_shapes(backend, shape):
    w = NVFP4Tensor.from_parts(*weights(5, 32))
    ids = torch.randint(5, shape, device=DEVICE)
    assert embedding(ids, w, torch.bfloat16).shape == (*shape, 32)


def test_a_nan_row_stays_alone(backend):
    q, s, g = weights(4, 48)
    s.view(torch.uint8)[2] = 0x7F
    out = embedding(torch.tensor([0, 2, 3, 1], device=DEVICE), NVFP4Tensor.from_parts(q, s, g), torch.float32)
    assert out.isnan().all(1).tolist() == [False, True, False, False] and out.isnan().sum() == 48


def test_strided_operands(backend):
    q, s, g = weights(6, 64)
    w = NVFP4Tensor.from_parts(q[::2, 8:24], s[::2, 1:3], g)
    ids = torch.tensor([[0, 2], [1, 0]], device=DEVICE).t()
    whole = reference.nvfp4_dequantize(q, s, g, dtype=torch.bfloat16)[::2, 16:48]
    assert_same_bits(embedding(ids, w, torch.bfloat16), whole[ids])


def test_published_shape(backend):
    """The embedding of Nemotron-3-Nano-4B is 131072 x 3136; without a GPU, fewer rows."""
    n = 131072 if DEVICE == "cuda" else 300
    q, s, g = weights(n, 3136)
    ids = torch.tensor([n - 1, 0, n // 2], device=DEVICE)
    out = embedding(ids, NVFP4Tensor.from_parts(q, s, g), torch.bfloat16)
    rows = q[ids], s.view(torch.uint8)[ids].view(s.dtype)
    assert_same_bits(out, reference.nvfp4_dequantize(*rows, g, dtype=torch.bfloat16))


def test_swizzled_scales():
    w = NVFP4Tensor.from_parts(*weights(130, 80))
    ids = torch.tensor([129, 0], device=DEVICE)
    assert_same_bits(embedding(ids, w.to_layout("128x4"), torch.float32), embedding(ids, w, torch.float32))


@pytest.mark.parametrize("ids", [[3, 0], []])
def test_opcheck(ids):
    ids = torch.tensor(ids, dtype=torch.int64, device=DEVICE)
    oracle.opcheck(torch.ops.n3.nvfp4_embedding.default, (ids, *weights(5, 32)), {"dtype": torch.bfloat16})


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_break(dynamic):
    torch._dynamo.reset()
    fn = torch.compile(
        lambda ids, w: embedding(ids, w, torch.float32) * 2, fullgraph=True, dynamic=dynamic, backend="aot_eager"
    )
    w = NVFP4Tensor.from_parts(*weights(5, 32))
    for n in (3, 7):
        ids = torch.randint(5, (n,), device=DEVICE)
        assert_same_bits(fn(ids, w), embedding(ids, w, torch.float32) * 2)


@pytest.mark.parametrize("bad", [-1, 4, 2**31 - 1])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_ids_out_of_range(backend, bad, dtype):
    """An error where the host can see the value, a row of NaN where it must not wait for it."""
    w = NVFP4Tensor.from_parts(*weights(4, 32))
    ids = torch.tensor([1, bad, 0], dtype=dtype, device=DEVICE)
    if DEVICE == "cpu":
        with pytest.raises(RuntimeError) as error:
            embedding(ids, w, torch.float32)
        assert str(error.value) == f"n3::nvfp4_embedding: ids must lie in [0, 4), got {bad}"
    else:
        out = embedding(ids, w, torch.float32)
        assert out.isnan().all(1).tolist() == [False, True, False] and out.isnan().sum() == 32


BAD = [
    ({"ids": torch.zeros(2)}, "ids must be int32 or int64, got float32"),
    ({"q": torch.zeros(4, 16, dtype=torch.int8)}, "q must be uint8, got int8"),
    ({"block_scale": torch.zeros(4, 2)}, "block_scale must be float8_e4m3fn, got float32"),
    ({"global_scale": torch.ones((), dtype=torch.float64)}, "global_scale must be float32, got float64"),
    ({"dtype": torch.float64}, "dtype must be float32, float16 or bfloat16, got float64"),
    ({"q": torch.zeros(16, dtype=torch.uint8)}, "q must have 2 dimensions, got 1"),
    ({"q": torch.zeros(4, 12, dtype=torch.uint8)}, "q must have a last dimension that is a multiple of 8, got 12"),
    ({"q": torch.zeros(5, 16, dtype=torch.uint8)}, "block_scale must have shape [5, 2], got [4, 2]"),
    ({"global_scale": torch.ones(2)}, "global_scale must have 1 element, got 2"),
]


@pytest.mark.parametrize("change, message", BAD)
def test_bad_calls(backend, change, message):
    call = {"ids": torch.zeros(2, dtype=torch.int64), "q": torch.zeros(4, 16, dtype=torch.uint8),
            "block_scale": torch.zeros(4, 2).to(torch.float8_e4m3fn), "global_scale": torch.ones(()),
            "dtype": torch.float32, **change}  # fmt: skip
    call = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in call.items()}
    with pytest.raises(RuntimeError) as error:
        torch.ops.n3.nvfp4_embedding.default(**call)
    assert str(error.value) == f"n3::nvfp4_embedding: {message}"
