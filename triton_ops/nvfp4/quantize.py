"""nvfp4_quantize: e2m1 codes, one e4m3 scale per 16 elements, one float32 global scale.

One launch where the global scale is given, and where there is one per row (rows.py); two for the amax of a tensor, of
which partial maxima travel as the integers that floats are. The fused producers are stages of these kernels, which read
x where it lies: rows of any stride, and transposed matrices.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import Case, guard, narrow
from ..philox import element_words
from .codes import encode_scale, quantize_blocks, scale_of_given
from .rows import norm_amax_kernel, row_kernel
from .sources import Matrices, finite_magnitudes, first_elements, matrices_of, produce
from .tiles import by_row, places, store_tile

__all__ = ["Norm", "amax_kernel", "compile_cases", "nvfp4_quantize", "quantize_kernel", "quantize_with"]

BLOCKS = 128  # per program: one per thread of 4 warps, which has the 16 elements whose errors are summed in order
PARTIALS = 512  # programs of a first launch, each of which leaves one maximum: about three for each SM of a B200
DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@triton.jit(do_not_specialize=["tiles", "rows", "matrix_rows", "ks"])
def amax_kernel(
    x_ptr, x_strides, signs_ptr, partial_ptr,
    tiles, rows, matrix_rows, ks,
    PRODUCER: tl.constexpr, DTYPE: tl.constexpr,
    HAS_MATRICES: tl.constexpr, ROWS: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """partial[p] = the bits of the largest finite magnitude of every num_programs-th tile, from tile p on."""
    half = ks.to(tl.int64) * 16 * x_strides[2]
    top = tl.zeros((N, 16), tl.int32)
    for t in range(tl.program_id(0), tiles, tl.num_programs(0)):
        tile = tl.cast(t, tl.int64)
        matrix, row, col, valid, _ = places(tile, rows, matrix_rows, ks, False, ROWS, N)
        at = first_elements(matrix, row, col, x_strides, matrix_rows, HAS_MATRICES)
        x = produce(x_ptr, at, x_strides[2], valid, half, None, None, None, col, None, signs_ptr, PRODUCER, DTYPE)
        top = tl.maximum(top, finite_magnitudes(x))
    tl.store(partial_ptr + tl.program_id(0), tl.max(tl.max(top, axis=1), axis=0))


@triton.jit(do_not_specialize=["num_partials", "rows", "matrix_rows", "ks"])
def quantize_kernel(
    x_ptr, x_strides, weight_ptr, rstd_ptr, signs_ptr, seed_ptr,
    given_ptr,  # decode scale of the tensor or of each row, or None
    partial_ptr, num_partials,  # what a first launch left, where given_ptr is None
    q_ptr, scale_ptr, global_ptr, y_ptr,
    rows, matrix_rows, ks,
    PRODUCER: tl.constexpr, DTYPE: tl.constexpr, METRIC: tl.constexpr, SQUARE: tl.constexpr, PER_ROW: tl.constexpr,
    SWIZZLED: tl.constexpr, HAS_MATRICES: tl.constexpr, ROWS: tl.constexpr, PARTIALS: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """One program per tile of the scale matrix, padding included."""
    tile = tl.program_id(0).to(tl.int64)  # int64: the elements of x pass 2^31
    matrix, row, col, valid, inside = places(tile, rows, matrix_rows, ks, SWIZZLED, ROWS, N)
    NORMAL: tl.constexpr = 2688.0 if METRIC is None else 1536.0
    if PER_ROW:
        decode = tl.load(given_ptr + row, mask=valid, other=1.0)
        s_enc, amax = scale_of_given(decode, NORMAL)
        tl.store(global_ptr + row, decode, mask=valid & (col == 0))
    else:
        if given_ptr is not None:
            decode = tl.load(given_ptr)
            s_enc, amax = scale_of_given(decode, NORMAL)
        else:
            p = tl.arange(0, PARTIALS)
            top = tl.max(tl.load(partial_ptr + p, mask=p < num_partials, other=0), axis=0)
            amax = top.to(tl.float32, bitcast=True)
            s_enc = encode_scale(amax, NORMAL)
            decode = tl.div_rn(1.0, s_enc)
        if tl.program_id(0) == 0:
            tl.store(global_ptr, decode)
        s_enc, amax = tl.broadcast_to(s_enc, (N,)), tl.broadcast_to(amax, (N,))

    at = first_elements(matrix, row, col, x_strides, matrix_rows, HAS_MATRICES)
    first = (row * ks + col) * 16
    rstd = None
    if PRODUCER == "rms_norm":
        rstd = tl.load(rstd_ptr + row, mask=valid, other=0.0)
    half = ks.to(tl.int64) * 16 * x_strides[2]
    x = produce(x_ptr, at, x_strides[2], valid, half, None, None, weight_ptr, col, rstd, signs_ptr, PRODUCER, DTYPE)
    if y_ptr is not None:
        tl.store(y_ptr + first[:, None] + tl.arange(0, 16)[None, :], narrow(x, DTYPE), mask=valid[:, None])
    words = None
    if seed_ptr is not None:
        words = element_words(seed_ptr, 0, first, True, 16)
    codes, byte = quantize_blocks(x, s_enc, tl.div_rn(1.0, s_enc), amax, words, METRIC, SQUARE)
    if ROWS > 1:
        matrix, row, col, valid, inside = places(tile, rows, matrix_rows, ks, SWIZZLED, ROWS, N, BY_ROW=True)
    store_tile(q_ptr, scale_ptr, by_row(codes, ROWS), by_row(byte, ROWS), row, col, valid, inside, ks, SWIZZLED)


# ---------------------------------------------------------------- host side


@dataclass(frozen=True)
class Norm:
    """What the producer rms_norm takes and leaves."""

    weight: Tensor
    residual: Tensor | None  # contiguous
    eps: float
    y: Tensor | None  # written if there
    total: Tensor | None  # of x + residual

    def arguments(self) -> dict[str, Tensor | float | None]:
        """Of the kernels of rows.py."""
        return {
            "weight_ptr": self.weight, "residual_ptr": self.residual, "total_ptr": self.total, "eps": self.eps,
        }  # fmt: skip


NO_NORM = {"weight_ptr": None, "residual_ptr": None, "total_ptr": None, "eps": 0.0}


@dataclass(frozen=True)
class _Outputs:
    q: Tensor
    scale: Tensor
    global_scale: Tensor
    grid: tuple[int, int]  # of the scale matrix

    def pointers(self) -> dict[str, Tensor]:
        return {"q_ptr": self.q, "scale_ptr": self.scale.view(torch.uint8), "global_ptr": self.global_scale}


def _new_outputs(x: Tensor, k: int, per_row: bool, swizzled: bool) -> _Outputs:
    lead, ks = x.shape[:-1], k // 16
    grid = (lead.numel() if k else 0, ks)
    if swizzled:
        grid = triton.cdiv(grid[0], 128) * 128, triton.cdiv(ks, 4) * 4
    return _Outputs(
        x.new_empty((*lead, k // 2), dtype=torch.uint8),
        x.new_empty(grid if swizzled else (*lead, ks), dtype=torch.float8_e4m3fn),
        x.new_empty(lead if per_row else (), dtype=torch.float32),
        grid,
    )


def _tiles_down(m: Matrices, tile_rows: int, grid_rows: int) -> int:
    before = m.rows // m.matrix_rows - 1  # matrices; the last one's tiles go on over the rows of padding
    return before * triton.cdiv(m.matrix_rows, tile_rows) + triton.cdiv(grid_rows - before * m.matrix_rows, tile_rows)


def _tiles(m: Matrices, tile_rows: int, grid: tuple[int, int]) -> int:
    """As tiles.py counts them."""
    if tile_rows == 1:
        return triton.cdiv(grid[0] * grid[1], BLOCKS)
    return _tiles_down(m, tile_rows, grid[0]) * triton.cdiv(grid[1], BLOCKS // tile_rows)


def quantize_with(
    x: Tensor,
    global_scale: Tensor | None,
    *,
    producer: str | None = None,
    norm: Norm | None = None,
    hadamard: Tensor | None = None,
    seed: Tensor | None = None,
    four_over_six: bool = False,
    metric: str = "mae",
    square: bool = False,
    per_row: bool = False,
    scale_layout: str = "linear",
) -> tuple[Tensor, Tensor, Tensor]:
    """The quantiser behind every operator: of x, or of what ``producer`` makes of it."""
    k = x.shape[-1] // (2 if producer == "silu_mul" else 1)
    out = _new_outputs(x, k, per_row, scale_layout == "128x4")
    if out.q.numel() == 0:
        out.global_scale.copy_(1.0 if global_scale is None else global_scale.reshape(out.global_scale.shape))
        return out.q, out.scale, out.global_scale

    m = matrices_of(x, transposed=producer is None)
    # 32 rows: 64 bytes of a transposed bfloat16 x, and with 64 elements of each row 32 bytes of codes
    tile_rows = 32 if m.transposed else 16 if square else 1
    given, hadamard, seed = (t if t is None else t.contiguous() for t in (global_scale, hadamard, seed))
    shared = {
        "x_ptr": m.x, "x_strides": m.strides, "signs_ptr": hadamard,
        "rows": m.rows, "matrix_rows": m.matrix_rows, "ks": k // 16,
        "PRODUCER": producer, "DTYPE": DTYPES[x.dtype], "HAS_MATRICES": m.matrix_rows != m.rows, "ROWS": tile_rows,
        "N": BLOCKS, "num_warps": 4, "enable_fp_fusion": False,
    }  # fmt: skip
    last = {
        **out.pointers(), "seed_ptr": seed, "given_ptr": given, "y_ptr": norm and norm.y,
        "METRIC": metric if four_over_six else None, "PER_ROW": per_row, "SWIZZLED": scale_layout == "128x4",
    }  # fmt: skip
    rows = norm.arguments() if norm else NO_NORM
    with guard(x):
        if (per_row and given is None) or (norm and given is not None):
            row_kernel[(_tiles_down(m, tile_rows, out.grid[0]),)](**shared, **last, **rows)
        else:
            partial, rstd = None, None
            if given is None:
                partial, rstd = _partial_amax(m, shared, rows if norm else None)
            if norm and norm.residual is not None:
                shared |= {"x_ptr": norm.total, "x_strides": (0, k, 1), "matrix_rows": m.rows, "HAS_MATRICES": False}
            quantize_kernel[(_tiles(m, tile_rows, out.grid),)](
                **shared, **last, weight_ptr=rows["weight_ptr"], rstd_ptr=rstd, partial_ptr=partial,
                num_partials=0 if partial is None else len(partial), SQUARE=square, PARTIALS=PARTIALS,
            )  # fmt: skip
    return out.q, out.scale, out.global_scale


def _partial_amax(m: Matrices, shared: dict, rows: dict | None) -> tuple[Tensor, Tensor | None]:
    """The first launch: partial maxima, and 1 / rms of each row."""
    if rows is None:
        tiles = _tiles(m, shared["ROWS"], (m.rows, shared["ks"]))
        partial = m.x.new_empty(min(tiles, PARTIALS), dtype=torch.int32)
        amax_kernel[(len(partial),)](**shared, partial_ptr=partial, tiles=tiles)
        return partial, None
    partial = m.x.new_empty(min(m.rows, PARTIALS), dtype=torch.int32)
    rstd = m.x.new_empty(m.rows, dtype=torch.float32)
    mine = {name: value for name, value in shared.items() if name not in ("signs_ptr", "PRODUCER", "ROWS")}
    norm_amax_kernel[(len(partial),)](**mine, **rows, partial_ptr=partial, rstd_ptr=rstd)
    return partial, rstd


def nvfp4_quantize(
    x: Tensor,
    global_scale: Tensor | None = None,
    hadamard: Tensor | None = None,
    seed: Tensor | None = None,
    *,
    rounding: str = "nearest",
    four_over_six: bool = False,
    metric: str = "mae",
    block: str = "1x16",
    per_row: bool = False,
    scale_layout: str = "linear",
) -> tuple[Tensor, Tensor, Tensor]:
    return quantize_with(
        x, global_scale, hadamard=hadamard, seed=seed if rounding == "stochastic" else None,
        four_over_six=four_over_six, metric=metric, square=block == "16x16", per_row=per_row, scale_layout=scale_layout,
    )  # fmt: skip


# ---------------------------------------------------------------- compilation without a GPU

_ROWS = {"x_strides": (0, "i32:16", 1), "HAS_MATRICES": False, "ROWS": 1}
_SQUARES = {**_ROWS, "SQUARE": True, "ROWS": 16}
_TRANSPOSED = {"x_strides": ("i32:16", 1, "i32:16"), "HAS_MATRICES": True, "ROWS": 32}
_RESIDUAL = {"residual_ptr": "*fp32", "total_ptr": "*fp32"}
_NORM = {"PRODUCER": "rms_norm", "weight_ptr": "*bf16"}
_OWN = {"given_ptr": None, "partial_ptr": "*i32"}
_OF_EACH_ROW = {"PER_ROW": True, "given_ptr": None}
_STOCHASTIC = {"seed_ptr": "*i64", "signs_ptr": "*fp32"}

# kernel, name, what differs from the plainest call
_CASES = (
    (quantize_kernel, "given", {}),
    (quantize_kernel, "own-4/6-128x4", {**_OWN, "METRIC": "mae", "SWIZZLED": True}),
    (quantize_kernel, "square-mse", {**_SQUARES, "METRIC": "mse"}),
    (quantize_kernel, "transposed-stochastic", {**_TRANSPOSED, **_OWN, **_STOCHASTIC}),
    (quantize_kernel, "transposed-square-4/6", {**_TRANSPOSED, "SQUARE": True, "METRIC": "mae", "SWIZZLED": True}),
    (quantize_kernel, "scales-of-rows", {"PER_ROW": True}),
    (quantize_kernel, "relu2-mse", {"PRODUCER": "relu2", "METRIC": "mse"}),
    (quantize_kernel, "silu_mul", {"PRODUCER": "silu_mul"}),
    (quantize_kernel, "rms_norm", {**_NORM, **_OWN, "rstd_ptr": "*fp32", "y_ptr": "*bf16"}),
    (row_kernel, "own", {**_OF_EACH_ROW, "METRIC": "mae"}),
    (row_kernel, "transposed-stochastic", {**_TRANSPOSED, **_OF_EACH_ROW, **_STOCHASTIC}),
    (row_kernel, "silu_mul", {**_OF_EACH_ROW, "PRODUCER": "silu_mul"}),
    (row_kernel, "rms_norm", {**_NORM, **_RESIDUAL, **_OF_EACH_ROW, "y_ptr": "*bf16", "SWIZZLED": True}),
    (row_kernel, "rms_norm-given-4/6", {**_NORM, **_RESIDUAL, "METRIC": "mse"}),
    (amax_kernel, "rows", {}),
    (amax_kernel, "transposed-rotated", {**_TRANSPOSED, "signs_ptr": "*fp32"}),
    (amax_kernel, "relu2", {"PRODUCER": "relu2"}),
    (amax_kernel, "silu_mul", {"PRODUCER": "silu_mul"}),
    (norm_amax_kernel, "rms_norm", {**_NORM, **_RESIDUAL}),
)  # fmt: skip
_OF_EVERY_DTYPE = ("given", "own-4/6-128x4", "rows", "silu_mul", "rms_norm")


def compile_cases(arch: int):
    plain = {
        **_ROWS, "given_ptr": "*fp32", "q_ptr": "*u8", "scale_ptr": "*u8", "global_ptr": "*fp32", "partial_ptr": None,
        "num_partials": "i32", "tiles": "i32", "rows": "i32", "matrix_rows": "i32", "ks": "i32", "eps": "fp64",
        "PRODUCER": None, "METRIC": None, "SQUARE": False, "PER_ROW": False, "SWIZZLED": False, "PARTIALS": PARTIALS,
        "N": BLOCKS, **dict.fromkeys(("weight_ptr", "rstd_ptr", "residual_ptr", "total_ptr", "signs_ptr", "seed_ptr",
                                      "y_ptr")),
    }  # fmt: skip
    first = {"partial_ptr": "*i32", "rstd_ptr": "*fp32"}  # what first launches leave
    for dtype, name in ((tl.bfloat16, "bf16"), (tl.float16, "fp16"), (tl.float32, "fp32")):
        for kernel, what, changes in _CASES:
            if name != "bf16" and what not in _OF_EVERY_DTYPE:
                continue
            left = first if kernel in (amax_kernel, norm_amax_kernel) else {}
            arguments = {**plain, **left, "x_ptr": f"*{name}", "DTYPE": dtype, **changes}
            arguments = {argument: arguments[argument] for argument in kernel.arg_names}
            constant = {a for a, v in arguments.items() if v is None or a.isupper()}
            yield Case(
                f"{kernel.__name__.removesuffix('_kernel')}-{name}-{what}", kernel,
                {a: v for a, v in arguments.items() if a not in constant}, {a: arguments[a] for a in constant},
                {"num_warps": 4, "enable_fp_fusion": False}, exact=what != "silu_mul",
            )  # fmt: skip
