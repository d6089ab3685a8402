"""What the quantisers quantise: where the elements of a block lie, and what a producer makes of them."""

from __future__ import annotations

from dataclasses import dataclass

import triton.language as tl
from torch import Tensor

from ..common import device_function, narrow, widen
from .codes import FLT_MAX, hadamard16

__all__ = ["Matrices", "finite_magnitudes", "first_elements", "load_hidden", "matrices_of", "produce", "silu_mul"]


# ---------------------------------------------------------------- host side


@dataclass(frozen=True)
class Matrices:
    """x as matrices of rows, read where they lie."""

    x: Tensor
    strides: tuple[int, int, int]  # from matrix to matrix, row to row, element to element
    rows: int  # of all matrices
    matrix_rows: int

    @property
    def transposed(self) -> bool:
        return self.strides[2] != 1


def _view(x: Tensor, *shape: int) -> Tensor | None:
    try:
        return x.view(shape)
    except RuntimeError:  # the leading dimensions do not merge into one
        return None


def matrices_of(x: Tensor, transposed: bool = True) -> Matrices:
    """Rows of any stride, and transposed matrices unless the caller cannot read those; of anything else a copy."""
    r, k = x.shape[-2:] if x.dim() > 1 else (1, x.shape[-1])
    rows = x.numel() // k
    if x.stride(-1) == 1:
        if (flat := _view(x, rows, k)) is not None:
            return Matrices(flat, (0, flat.stride(0), 1), rows, rows)
        if (stack := _view(x, rows // r, r, k)) is not None:
            return Matrices(stack, stack.stride(), rows, r)
    elif transposed and x.dim() > 1 and x.stride(-2) == 1 and (stack := _view(x, rows // r, r, k)) is not None:
        return Matrices(stack, stack.stride(), rows, r)
    return Matrices(x.contiguous(), (0, k, 1), rows, rows)


# ---------------------------------------------------------------- device side


@device_function
def first_elements(matrix, row, col, strides, matrix_rows, HAS_MATRICES: tl.constexpr):
    """Offset of the first element of each block. Of one matrix's rows it is a sum with ``row``: loads stay wide."""
    start = row * strides[1]
    if HAS_MATRICES:
        start += matrix * (strides[0] - matrix_rows.to(tl.int64) * strides[1])
    return start + col.to(tl.int64) * 16 * strides[2]


@device_function
def _rounded(v, dtype: tl.constexpr):
    return widen(narrow(v, dtype))


@device_function
def load_hidden(x_ptr, at, stride, residual_ptr, residual_at, mask):
    """Elements of x, or of x + residual rounded to the residual's dtype, ``[N, 16]``."""
    k = tl.arange(0, 16)[None, :]
    h = widen(tl.load(x_ptr + at[:, None] + k * stride, mask=mask[:, None], other=0.0))
    if residual_ptr is not None:
        r = widen(tl.load(residual_ptr + residual_at[:, None] + k, mask=mask[:, None], other=0.0))
        h = _rounded(h + r, residual_ptr.dtype.element_ty)
    return h


@device_function
def _exp_parts(z):
    """m and integers n with exp(z) = m 2^n, m in [0.7, 1.42], for -200 <= z <= 0; m to 1e-7 relative."""
    n = z * 1.4426950408889634
    n = (n + 12582912.0) - 12582912.0  # to an integer: where 1.5 * 2^23 is added, the ulp is 1
    r = tl.fma(n, -0.693145751953125, z)  # ln 2 in two parts, of which the first has 15 bits
    r = tl.fma(n, -1.428606765330187e-06, r)
    p = tl.fma(r, 1.0 / 5040, 1.0 / 720)
    p = tl.fma(p, r, 1.0 / 120)
    p = tl.fma(p, r, 1.0 / 24)
    p = tl.fma(p, r, 1.0 / 6)
    p = tl.fma(p, r, 0.5)
    return tl.fma(p * r, r, r) + 1.0, n


@device_function
def _power(n):
    """2^n of integers -126 <= n <= 0, as floats."""
    return ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)


@device_function
def _silu_mul_64(a, b):
    wide = a.to(tl.float64)
    return (wide / (1.0 + tl.exp(-wide)) * b.to(tl.float64)).to(tl.float32)


@device_function
def silu_mul(a, b):
    """silu(a) * b to a few units in the last place, also where silu(a) alone would underflow.

    For a < 0, silu(a) = a m 2^n / (1 + m 2^n): the power of two is applied in three steps, the last two after b.
    """
    a_least = tl.where(a < -200.0, -200.0, a)  # silu there times the largest float32 is below half of the smallest
    z = tl.where(a_least > 0.0, -a_least, a_least)
    m, n = _exp_parts(tl.where(z < -200.0, -200.0, z))
    n1 = tl.where(n < -100.0, -100.0, n)
    n2 = tl.where(n - n1 < -100.0, -100.0, n - n1)
    e = m * _power(n1)
    negative = a < 0.0
    q = tl.div_rn(tl.where(negative, e, 1.0), 1.0 + e)
    y = (a_least * q) * b
    y = tl.where(negative, y * _power(n2) * _power(n - n1 - n2), y)
    return tl.where(a >= -FLT_MAX, y, float("nan"))  # silu(-inf) is NaN


@device_function
def produce(
    x_ptr, at, stride, mask,
    half,  # silu_mul: offset from a to b
    residual_ptr, residual_at, weight_ptr, col, rstd,  # rms_norm; rstd a scalar or [N]
    signs_ptr,  # 16 signs of the rotation, or None
    PRODUCER: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """What is quantised, ``[N, 16]``, rounded to DTYPE."""
    x = load_hidden(x_ptr, at, stride, residual_ptr, residual_at, mask)
    if PRODUCER == "relu2":
        h = tl.where(x < 0.0, 0.0, x)  # NaN stays
        x = _rounded(h * h, DTYPE)
    elif PRODUCER == "silu_mul":
        b = load_hidden(x_ptr, at + half, stride, None, residual_at, mask)
        if DTYPE == tl.float32:
            x = _silu_mul_64(x, b)  # units in the last place would show in the global scale
        else:
            x = _rounded(silu_mul(x, b), DTYPE)
    elif PRODUCER == "rms_norm":
        w_at = col[:, None] * 16 + tl.arange(0, 16)[None, :]
        w = widen(tl.load(weight_ptr + w_at, mask=mask[:, None], other=0.0))
        x = _rounded(x * rstd[:, None] * w, DTYPE)
    if signs_ptr is not None:
        x = _rounded(hadamard16(x, tl.load(signs_ptr + tl.arange(0, 16))), DTYPE)
    return x


@device_function
def finite_magnitudes(x):
    """Bits of the magnitudes, which order as the magnitudes do, as int32; 0 for what is not finite."""
    bits = (x.to(tl.uint32, bitcast=True) & 0x7FFFFFFF).to(tl.int32)
    return tl.where(bits < 0x7F800000, bits, 0)
