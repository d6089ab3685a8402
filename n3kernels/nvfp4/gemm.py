from __future__ import annotations

import torch
from torch import Tensor

from .. import _dispatch
from .._checks import FLOATING, Check, dtype_name
from . import _supports, reference
from .tensor import NVFP4Tensor

__all__ = ["gemm", "grouped_gemm"]


def gemm(a: NVFP4Tensor, b: NVFP4Tensor, out_dtype: torch.dtype, bias: Tensor | None = None) -> Tensor:
    r"""Returns ``a @ b^T + bias`` of two NVFP4 matrices (W4A4).

    Args:
        a: ``[M, K]``, K a positive multiple of 16; either scale layout; one global scale, or one per row.
        b: ``[N, K]``, the same.
        out_dtype: float32, float16 or bfloat16.
        bias: ``[N]`` in ``out_dtype``.
    Returns:
        ``[M, N]`` in ``out_dtype``. Values are decoded exactly; the product of two of them has at most 12 significant
        bits, sums are float32; the global scales and the bias are applied in float32, and the result is rounded once.
        Relative L2 error against float64 at K = 2688 on the CPU: below 1e-6 in float32, 2.5e-3 in bfloat16; there
        a row's bits depend neither on the batch nor on the number of threads, and but for AMX, which has its own
        order, products of 16 terms are added exactly. A NaN block scale spoils its row of the result, or its column.
        Block-scaled tensor cores (sm_100, sm_120) take block scales as unsigned numbers; no quantiser makes a negative
        one.
    Raises:
        RuntimeError: a shape, dtype or layout outside the above; the message names argument and values.
    Source: the block-scaled products of Blackwell's tensor cores (PTX ``mma.block_scale`` with ``kind::mxf4nvf4``).

    >>> from n3kernels import nvfp4
    >>> a, b = nvfp4.quantize(torch.randn(3, 32), per_row=True), nvfp4.quantize(torch.randn(5, 32))
    >>> gemm(a, b, torch.float32).shape
    torch.Size([3, 5])
    """
    return torch.ops.n3.nvfp4_gemm.default(
        a.q, a.block_scale, a.global_scale, b.q, b.block_scale, b.global_scale, bias, out_dtype=out_dtype,
        a_layout=a.scale_layout, b_layout=b.scale_layout,
    )  # fmt: skip


def grouped_gemm(a: NVFP4Tensor, b: NVFP4Tensor, offsets: Tensor, out_dtype: torch.dtype) -> Tensor:
    r"""Returns ``a[i] @ b[e]^T`` for each row i of group e: the experts of a layer, both sides NVFP4.

    Args:
        a: ``[M, K]``, rows sorted by expert; linear scales; one global scale, or one per row.
        b: ``[E, N, K]``, one global scale for each expert; linear scales, or each expert's own 128x4 tiles
            ``[E, ceil(N/128)*128, ceil(K/64)*4]``.
        offsets: int32 ``[E + 1]``, ascending, between 0 and M: expert e has the rows ``offsets[e] <= i <
            offsets[e + 1]``; rows of no expert give 0. Read on the device; on the CPU the values are checked.
        out_dtype: float32, float16 or bfloat16.
    Returns:
        ``[M, N]`` in ``out_dtype``, with the arithmetic of `gemm`.
    Raises:
        RuntimeError: a shape, dtype or layout outside the above; the message names argument and values.
    Source: the up and down projections of Nemotron 3's routed experts, whose checkpoints quantise both sides.

    >>> from n3kernels import nvfp4
    >>> b = nvfp4.NVFP4Tensor.stack([nvfp4.quantize(torch.randn(8, 32)) for _ in range(2)])
    >>> offsets = torch.tensor([0, 1, 3], dtype=torch.int32)
    >>> grouped_gemm(nvfp4.quantize(torch.randn(3, 32)), b, offsets, torch.bfloat16).shape
    torch.Size([3, 8])
    """
    a = a.to_layout("linear")
    return torch.ops.n3.nvfp4_grouped_gemm.default(
        a.q, a.block_scale, a.global_scale, b.q, b.block_scale, b.global_scale, offsets, out_dtype=out_dtype,
        b_layout=b.scale_layout,
    )  # fmt: skip


def _check_matrix(check: Check, name: str, q: Tensor, scale: Tensor, layout: str, lead: tuple, k: int) -> None:
    """Codes, scales and layout of ``name`` ``[*lead, k]``."""
    check.dtype(name, q, torch.uint8)
    check.dtype(f"{name}_scale", scale, torch.float8_e4m3fn)
    check.shape(name, q, (*lead, k // 2))
    check.choice(f"{name}_layout", layout, ("linear", "128x4"))
    rows, ks = lead[-1], k // 16
    if layout == "128x4":
        rows, ks = reference.pad(rows, 128), reference.pad(ks, 4)
    check.shape(f"{name}_scale", scale, (*lead[:-1], rows, ks))


def _check_k(check: Check, a: Tensor) -> int:
    check.dim("a", a, 2)
    width = a.shape[1]
    check.that(width > 0 and width % 8 == 0, "a must have a last dimension that is a positive multiple of 8", width)
    return width * 2


def _check_global(check: Check, name: str, t: Tensor, rows: int) -> None:
    check.dtype(f"{name}_global", t, torch.float32)
    check.that(
        t.numel() == 1 or (t.dim() == 1 and t.shape[0] == rows),
        f"{name}_global must have 1 element or one per row of {name} ({rows})", t.numel(),
    )  # fmt: skip


def _check_out_dtype(check: Check, out_dtype: torch.dtype) -> None:
    check.that(
        out_dtype in FLOATING, "out_dtype must be float32, float16 or bfloat16", lambda: dtype_name(out_dtype)
    )


def check_operands(check: Check, a, a_scale, a_global, b, b_scale, b_global, bias, out_dtype, a_layout, b_layout):
    """Of one product, in whatever its result is left."""
    k = _check_k(check, a)
    check.dim("b", b, 2)
    m, n = a.shape[0], b.shape[0]
    _check_matrix(check, "a", a, a_scale, a_layout, (m,), k)
    _check_matrix(check, "b", b, b_scale, b_layout, (n,), k)
    _check_global(check, "a", a_global, m)
    _check_global(check, "b", b_global, n)
    _check_out_dtype(check, out_dtype)
    if bias is not None:
        check.dtype("bias", bias, out_dtype)
        check.shape("bias", bias, (n,))
    check.same_device(
        "a", a, a_scale=a_scale, a_global=a_global, b=b, b_scale=b_scale, b_global=b_global, bias=bias
    )


def _check(
    a, a_scale, a_global, b, b_scale, b_global, bias=None, *, out_dtype, a_layout="linear", b_layout="linear"
):
    check_operands(
        Check("nvfp4_gemm"), a, a_scale, a_global, b, b_scale, b_global, bias, out_dtype, a_layout, b_layout
    )


def _fake(a, a_scale, a_global, b, *rest, out_dtype, **layouts):
    return a.new_empty((a.shape[0], b.shape[0]), dtype=out_dtype)


def _check_grouped(a, a_scale, a_global, b, b_scale, b_global, offsets, *, out_dtype, b_layout="linear"):
    check = Check("nvfp4_grouped_gemm")
    k = _check_k(check, a)
    check.dim("b", b, 3)
    experts, n = b.shape[:2]
    _check_matrix(check, "a", a, a_scale, "linear", (a.shape[0],), k)
    _check_matrix(check, "b", b, b_scale, b_layout, (experts, n), k)
    _check_global(check, "a", a_global, a.shape[0])
    check.dtype("b_global", b_global, torch.float32)
    check.shape("b_global", b_global, (experts,))
    check.dtype("offsets", offsets, torch.int32)
    check.shape("offsets", offsets, (experts + 1,))
    _check_out_dtype(check, out_dtype)
    check.same_device(
        "a", a, a_scale=a_scale, a_global=a_global, b=b, b_scale=b_scale, b_global=b_global, offsets=offsets
    )


def _fake_grouped(a, a_scale, a_global, b, *rest, out_dtype, **layouts):
    return a.new_empty((a.shape[0], b.shape[1]), dtype=out_dtype)


_TRITON = "n3kernels.triton_ops.nvfp4.gemm"

_dispatch.register(
    "nvfp4_gemm", check=_check, fake=_fake, reference=reference.nvfp4_gemm, triton=f"{_TRITON}:nvfp4_gemm",
    supports={"cuda": _supports.block_scaled_cores},
)  # fmt: skip
_dispatch.register(
    "nvfp4_grouped_gemm", check=_check_grouped, fake=_fake_grouped, reference=reference.nvfp4_grouped_gemm,
    triton=f"{_TRITON}:nvfp4_grouped_gemm", supports={"cuda": _supports.block_scaled_groups},
)  # fmt: skip
