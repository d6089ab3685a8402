"""gated_rms_norm: y = weight * RMSNorm(x * silu(z)) over groups of the last dimension, and its gradient.

One program holds one group of a row in registers, so every input is read once; 32 elements of a thread at the largest
published group, 8192. Rows of any stride are read in place where the leading dimensions merge into one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import Case, device_function, guard, narrow, widen
from .launch import strides_of
from .numerics import sigmoid

__all__ = ["compile_cases", "gated_rms_norm", "gated_rms_norm_bwd"]

PARTIALS = 256  # programs per group in the backward, each of which leaves one sum for the gradient of the weight
HELD = 4096  # largest group of which the backward holds a row in registers beside the sums for the weight
REDUCE = 128  # columns per program of the launch that adds these


@device_function
def _rstd(h, group_size, eps):
    mean = tl.div_rn(tl.sum(h * h, axis=0), group_size.to(tl.float32))
    return tl.div_rn(1.0, tl.sqrt_rn(mean + eps))


@triton.jit
def _forward_kernel(
    x_ptr, x_strides, z_ptr, z_strides, w_ptr, w_strides, live_ptr, y_ptr,
    dim, group_size, eps,
    NORM_FIRST: tl.constexpr,
    BLOCK: tl.constexpr,  # the power of two from group_size on
):  # fmt: skip
    """One program per (row, group). A row whose live_ptr is 0 is padding: zeros, and nothing of it is read."""
    groups = dim // group_size
    row = (tl.program_id(0) // groups).to(tl.int64)  # int64: rows * dim passes 2^31
    within = tl.arange(0, BLOCK)
    mask = within < group_size
    cols = tl.program_id(0) % groups * group_size + within
    read = mask
    if live_ptr is not None:
        read = within < tl.where(tl.load(live_ptr + row) != 0, group_size, 0)
    h = widen(tl.load(x_ptr + row * x_strides[0] + cols.to(tl.int64) * x_strides[1], mask=read, other=0.0))
    if z_ptr is not None:
        z = widen(tl.load(z_ptr + row * z_strides[0] + cols.to(tl.int64) * z_strides[1], mask=read, other=0.0))
        gate = z * sigmoid(z)
        if not NORM_FIRST:
            h = h * gate
    w = widen(tl.load(w_ptr + cols.to(tl.int64) * w_strides[0], mask=mask, other=0.0))
    y = h * _rstd(h, group_size, eps) * w
    if z_ptr is not None and NORM_FIRST:
        y = y * gate
    y = tl.where(read, y, 0.0)
    tl.store(y_ptr + row * dim + cols, narrow(y, y_ptr.dtype.element_ty), mask=mask)


@device_function
def _gradient_operands(
    dy_ptr, dy_strides, x_ptr, x_strides, z_ptr, z_strides, w_ptr, w_strides, row, cols, mask,
    NORM_FIRST: tl.constexpr, AGAIN: tl.constexpr,
):  # fmt: skip
    """Of one group: what is normalised, the gradient of its norm times the weight, and dy, x, z, w.

    AGAIN loads what was loaded before: volatile, so that the compiler does not keep the first in registers instead.
    """
    x = widen(tl.load(x_ptr + row * x_strides[0] + cols * x_strides[1], mask=mask, other=0.0, volatile=AGAIN))
    dy = widen(tl.load(dy_ptr + row * dy_strides[0] + cols * dy_strides[1], mask=mask, other=0.0, volatile=AGAIN))
    w = widen(tl.load(w_ptr + cols * w_strides[0], mask=mask, other=0.0))
    h, dn, z = x, dy, x
    if z_ptr is not None:
        z = widen(tl.load(z_ptr + row * z_strides[0] + cols * z_strides[1], mask=mask, other=0.0, volatile=AGAIN))
        if NORM_FIRST:
            dn = dy * (z * sigmoid(z))
        else:
            h = x * (z * sigmoid(z))
    return h, dn, dy, x, z, w


@triton.jit(do_not_specialize=["rows", "rows_each"])
def _backward_kernel(
    dy_ptr, dy_strides, x_ptr, x_strides, z_ptr, z_strides, w_ptr, w_strides,
    dx_ptr, dz_ptr, partial_ptr,
    rows, rows_each, dim, group_size, eps,
    NORM_FIRST: tl.constexpr,
    TWICE: tl.constexpr,  # load a row twice, for registers hold no more than the sums of so large a group
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (pieces of rows_each rows, groups). With h what is normalised, n = h rstd and g = dn w:

    dh = rstd (g - n mean(g n)). Each program adds its rows' dw in order and leaves the sum in partial[piece].
    """
    piece = tl.program_id(0).to(tl.int64)  # int64: rows * dim passes 2^31
    within = tl.arange(0, BLOCK)
    mask = within < group_size
    cols = (tl.program_id(1) * group_size + within).to(tl.int64)
    size = group_size.to(tl.float32)
    dw = tl.zeros((BLOCK,), tl.float32)
    for row in range(piece * rows_each, tl.minimum((piece + 1) * rows_each, rows)):
        h, dn, dy, x, z, w = _gradient_operands(
            dy_ptr, dy_strides, x_ptr, x_strides, z_ptr, z_strides, w_ptr, w_strides, row, cols, mask, NORM_FIRST, False
        )
        rstd = _rstd(h, group_size, eps)
        mean = tl.div_rn(tl.sum(dn * w * h, axis=0) * rstd, size)
        if TWICE:
            h, dn, dy, x, z, w = _gradient_operands(
                dy_ptr, dy_strides, x_ptr, x_strides, z_ptr, z_strides, w_ptr, w_strides, row, cols, mask,
                NORM_FIRST, True,
            )  # fmt: skip
        n = h * rstd
        dh = rstd * (dn * w - n * mean)
        dw += dn * n
        if z_ptr is not None:
            s = sigmoid(z)
            slope = s * (1.0 + z * (1.0 - s))
            if NORM_FIRST:
                dz = dy * w * n * slope
            else:
                dz = dh * x * slope
                dh = dh * (z * s)
            tl.store(dz_ptr + row * dim + cols, narrow(dz, dz_ptr.dtype.element_ty), mask=mask)
        tl.store(dx_ptr + row * dim + cols, narrow(dh, dx_ptr.dtype.element_ty), mask=mask)
    tl.store(partial_ptr + piece * dim + cols, dw, mask=mask)


@triton.jit(do_not_specialize=["pieces"])
def _weight_kernel(partial_ptr, dw_ptr, pieces, dim, BLOCK: tl.constexpr):
    """dw[c] = the sum over pieces of partial[piece, c], in order: the same bits every time."""
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < dim
    total = tl.zeros((BLOCK,), tl.float32)
    for piece in range(pieces):
        total += tl.load(partial_ptr + tl.cast(piece, tl.int64) * dim + cols, mask=mask, other=0.0)
    tl.store(dw_ptr + cols, narrow(total, dw_ptr.dtype.element_ty), mask=mask)


def _rows(t: Tensor) -> Tensor:
    """[rows, dim]; a view where the leading dimensions merge, as those of a column slice do."""
    return t.reshape(-1, t.shape[-1])


def _config(group_size: int, per_thread: int) -> dict[str, int]:
    block = max(triton.next_power_of_2(group_size), 32)
    return {"BLOCK": block, "num_warps": min(max(block // (32 * per_thread), 1), 16)}


def gated_rms_norm(
    x: Tensor, z: Tensor | None, weight: Tensor, group_size: int, eps: float = 1e-5, norm_before_gate: bool = False
) -> Tensor:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    normalise(x, z, weight, y, group_size, eps, norm_before_gate)
    return y


def normalise(
    x: Tensor, z: Tensor | None, weight: Tensor, y: Tensor, group_size: int, eps: float, norm_before_gate: bool,
    live: Tensor | None = None,
) -> None:  # fmt: skip
    """Writes to ``y``, contiguous; x, z and y may differ in dtype. ``live``: per row, 0 for padding."""
    if y.numel() == 0:
        return
    x, z, dim = _rows(x), z if z is None else _rows(z), x.shape[-1]
    with guard(x):
        _forward_kernel[(len(x) * (dim // group_size),)](
            x, x.stride(), z, strides_of(z, 2), weight, weight.stride(), live, y,
            dim, group_size, eps,
            NORM_FIRST=norm_before_gate, enable_fp_fusion=False, **_config(group_size, 16),
        )  # fmt: skip


def gated_rms_norm_bwd(
    grad_y: Tensor, x: Tensor, z: Tensor | None, weight: Tensor, group_size: int, eps: float, norm_before_gate: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    dz = x.new_empty(0) if z is None else torch.empty_like(z, memory_format=torch.contiguous_format)
    dweight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    if x.numel() == 0:
        return dx, dz, dweight.zero_()
    dim, x, grad_y = x.shape[-1], _rows(x), _rows(grad_y)
    z = z if z is None else _rows(z)
    rows_each = triton.cdiv(len(x), PARTIALS)
    pieces = triton.cdiv(len(x), rows_each)
    partial = x.new_empty(pieces, dim, dtype=torch.float32)
    with guard(x):
        _backward_kernel[(pieces, dim // group_size)](
            grad_y, grad_y.stride(), x, x.stride(), z, strides_of(z, 2), weight, weight.stride(),
            dx, dz, partial, len(x), rows_each, dim, group_size, eps,
            NORM_FIRST=norm_before_gate, TWICE=group_size > HELD, enable_fp_fusion=False, **_config(group_size, 8),
        )  # fmt: skip
        _weight_kernel[(triton.cdiv(dim, REDUCE),)](partial, dweight, pieces, dim, BLOCK=REDUCE, enable_fp_fusion=False)
    return dx, dz, dweight


def compile_cases(arch: int):
    strides = {f"{t}_strides": ("i32:16", 1) for t in ("x", "z", "dy")} | {"w_strides": (1,)}
    sizes = {"dim": "i32:16", "group_size": "i32:16", "eps": "fp32", "rows": "i32", "rows_each": "i32"}
    for dtype in ("fp32", "fp16", "bf16"):
        pointers = {f"{t}_ptr": f"*{dtype}" for t in ("x", "z", "y", "dy", "dx", "dz")}
        types = {**pointers, "w_ptr": f"*{dtype}", "partial_ptr": "*fp32", **strides, **sizes}
        for group_size in (64, 512, 4096, 8192) if dtype == "bf16" else (1024,):
            for order in (False, True):
                name = f"{dtype}-{group_size}-{'norm' if order else 'gate'}-first"
                for which, kernel, per_thread in (("fwd", _forward_kernel, 16), ("bwd", _backward_kernel, 8)):
                    config = _config(group_size, per_thread)
                    options = {"num_warps": config["num_warps"], "enable_fp_fusion": False}
                    wanted = {name: t for name, t in types.items() if name in kernel.arg_names}
                    flags = {"NORM_FIRST": order, "BLOCK": config["BLOCK"], "TWICE": group_size > HELD}
                    flags |= {"live_ptr": None}
                    flags = {flag: value for flag, value in flags.items() if flag in kernel.arg_names}
                    yield Case(f"gated_norm-{which}-{name}", kernel, wanted, flags, options)
        config = _config(512, 16)
        mixer = types | {"x_ptr": "*fp32", "live_ptr": "*i8"}
        yield Case(f"gated_norm-fwd-{dtype}-mixer", _forward_kernel,
                   {name: t for name, t in mixer.items() if name in _forward_kernel.arg_names},
                   {"NORM_FIRST": False, "BLOCK": config["BLOCK"]},
                   {"num_warps": config["num_warps"], "enable_fp_fusion": False})  # fmt: skip
        yield Case(f"gated_norm-weight-{dtype}", _weight_kernel,
                   {"partial_ptr": "*fp32", "dw_ptr": f"*{dtype}", "pieces": "i32", "dim": "i32:16"},
                   {"BLOCK": REDUCE}, {"enable_fp_fusion": False})  # fmt: skip
