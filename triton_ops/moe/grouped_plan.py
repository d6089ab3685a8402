"""What the grouped products share on the host: configurations, tiles of rows, and how operands are handed over."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import Case, batch_invariant, on_row_of

__all__ = [
    "GRADS", "PRODUCTS", "WEIGHT_GRADS", "Config", "Tiles", "Weight", "column_step", "config_for", "kind_of", "mixed",
    "narrowed", "row_step", "stages_of", "tiles_of", "weight_of",
]  # fmt: skip


# ---------------------------------------------------------------- configurations


@dataclass(frozen=True)
class Config:
    """Tiles of ``block_m`` rows by ``block_n`` columns, ``block_k`` terms at a time."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int


LAST = 1 << 62

# {architecture: {kind of operands: {largest mean number of rows per group: configuration}}}; the last one serves every
# larger number. The kinds: "16" and "32" bits, "nvfp4" weights with 16-bit and "nvfp4-32" with 32-bit activations.
#
# Chosen by arithmetic, not yet tuned on hardware. Up to 16 rows per group the product reads weights and nothing else:
# tiles of 16 rows, narrow ones, so that a single token of Nemotron 3 Nano (6 experts of 1856 x 2688) still makes 174
# programs, and deep pipelines. Beyond 64 rows it multiplies: 128 x 128. A mean of 17 to 64 rows takes the smallest tile
# that holds it, so that an expert's weights are read once. NVFP4 takes 128 terms at a time: 64 bytes of codes per row.
# float32 multiplies by FMA, which wants more threads per element and no stages of shared memory.
_FLOAT32 = {16: Config(16, 32, 32, 4, 2), LAST: Config(32, 32, 32, 4, 2)}
_PRODUCTS_90 = {
    "16": {
        16: Config(16, 64, 64, 4, 5), 32: Config(32, 64, 64, 4, 5),
        64: Config(64, 128, 64, 4, 4), LAST: Config(128, 128, 64, 8, 4),
    },
    "nvfp4": {
        16: Config(16, 64, 128, 4, 4), 32: Config(32, 64, 128, 4, 4),
        64: Config(64, 64, 128, 4, 3), LAST: Config(128, 64, 128, 8, 3),
    },
    "32": _FLOAT32,
    "nvfp4-32": _FLOAT32,
}  # fmt: skip
_PRODUCTS_120 = {
    "16": {
        16: Config(16, 64, 64, 4, 4), 32: Config(32, 64, 64, 4, 4),
        64: Config(64, 128, 64, 4, 4), LAST: Config(128, 128, 64, 8, 3),
    },
    "nvfp4": {
        16: Config(16, 64, 128, 4, 4), 32: Config(32, 64, 128, 4, 4),
        64: Config(64, 64, 64, 4, 4), LAST: Config(128, 64, 64, 8, 4),
    },
    "32": _FLOAT32,
    "nvfp4-32": _FLOAT32,
}  # fmt: skip
PRODUCTS = {80: _PRODUCTS_120, 90: _PRODUCTS_90, 100: _PRODUCTS_90, 120: _PRODUCTS_120}

# The first kernel of a backward pass holds up to three sums at once: gate, up and the gradient of their product.
_GRADS_90 = {
    "16": {16: Config(16, 64, 64, 4, 4), 64: Config(64, 64, 64, 4, 3), LAST: Config(128, 64, 64, 8, 3)},
    "32": {LAST: Config(32, 32, 32, 4, 2)},
}
_GRADS_120 = {
    "16": {16: Config(16, 64, 64, 4, 3), 64: Config(64, 64, 64, 4, 2), LAST: Config(128, 64, 64, 8, 2)},
    "32": {LAST: Config(32, 32, 32, 4, 2)},
}
GRADS = {80: _GRADS_120, 90: _GRADS_90, 100: _GRADS_90, 120: _GRADS_120}

# Gradients of weights: block_k rows of the group at a time, whatever their number.
_WEIGHT_GRADS_90 = {"16": {LAST: Config(128, 128, 64, 8, 3)}, "32": {LAST: Config(32, 32, 32, 4, 2)}}
_WEIGHT_GRADS_120 = {"16": {LAST: Config(128, 128, 32, 8, 4)}, "32": {LAST: Config(32, 32, 32, 4, 2)}}
WEIGHT_GRADS = {80: _WEIGHT_GRADS_120, 90: _WEIGHT_GRADS_90, 100: _WEIGHT_GRADS_90, 120: _WEIGHT_GRADS_120}

INVARIANT_ROWS = 64  # in batch-invariant mode every number of rows runs as this one


def kind_of(x: Tensor, nvfp4: bool = False) -> str:
    width = "32" if x.dtype == torch.float32 else "16"
    return width if not nvfp4 else {"16": "nvfp4", "32": "nvfp4-32"}[width]


def config_for(table: dict, arch: int, kind: str, rows: int, groups: int) -> Config:
    """The configuration for ``rows`` rows over ``groups`` groups, numbers that the host knows."""
    limits = on_row_of(table, arch)[kind]
    wanted = INVARIANT_ROWS if batch_invariant() else triton.cdiv(rows, max(groups, 1))
    return limits[min(limit for limit in limits if limit >= wanted)]


def mixed(config: Config) -> Config:
    """For float32 numbers of 11 bits times float16 weights, which become float32 in registers: twice the operands."""
    return replace(config, block_n=min(config.block_n, 64), stages=2)


@cache
def narrowed(largest: int, size: int) -> int:
    """Half of a tile of 128 where the whole would pad ``size`` by more than an eighth: 336, 464, 672, 928 columns."""
    return 64 if largest == 128 and 128 * triton.cdiv(size, 128) * 8 > size * 9 else largest


# ---------------------------------------------------------------- tiles of rows

BLOCK, CHUNK = 32, 256  # tiles of a program, pieces that it looks at at once
COLUMNS = tl.constexpr(3)  # of the table: group, first row, rows; a group of -1 marks a tile that is left over


@triton.jit
def _edge(offsets_ptr, i, groups, rows):
    """Where piece i of the rows begins: 0 is what lies before group 0, g + 1 is group g, then what lies behind."""
    inside = (i > 0) & (i <= groups + 1)
    edge = tl.load(offsets_ptr + i - 1, mask=inside, other=0)
    # Offsets out of range are the caller's error, but must not lead out of memory.
    edge = tl.minimum(tl.maximum(edge, 0), rows)
    return tl.where(inside, edge, tl.where(i > 0, rows, 0))


@triton.jit(do_not_specialize=["groups", "rows", "tiles"])
def _tiles_kernel(
    offsets_ptr,  # [groups + 1]
    table_ptr,  # [tiles, COLUMNS]
    groups, rows, tiles,
    OUTSIDE: tl.constexpr,  # rows in no group have tiles, too: of group `groups`
    BLOCK_M: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Grid pieces of tiles: a tile belongs to the first piece of the rows that ends behind it, counted in tiles."""
    tile = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    piece = tl.zeros((BLOCK,), tl.int32)
    before = tl.zeros((BLOCK,), tl.int32)  # tiles of the pieces before this one
    total = 0
    for start in range(0, groups + 2, CHUNK):
        i = start + tl.arange(0, CHUNK)
        counted = i <= groups + 1 if OUTSIDE else (i > 0) & (i <= groups)
        size = _edge(offsets_ptr, i + 1, groups, rows) - _edge(offsets_ptr, i, groups, rows)
        count = tl.where(counted & (size > 0), (size + BLOCK_M - 1) // BLOCK_M, 0)
        ends = total + tl.cumsum(count, 0)
        over = (ends[None, :] <= tile[:, None]) & (i <= groups + 1)[None, :]
        piece += tl.sum(over.to(tl.int32), axis=1)
        before = tl.maximum(before, tl.max(tl.where(over, ends[None, :], 0), axis=1))
        total += tl.sum(count)

    first = _edge(offsets_ptr, piece, groups, rows)
    size = _edge(offsets_ptr, piece + 1, groups, rows) - first
    row = (tile - before) * BLOCK_M
    group = tl.where((piece > 0) & (piece <= groups), piece - 1, groups)
    at = table_ptr + tile * COLUMNS
    mask = tile < tiles
    tl.store(at, tl.where(tile < total, group, -1), mask=mask)
    tl.store(at + 1, first + row, mask=mask)
    tl.store(at + 2, tl.minimum(size - row, BLOCK_M), mask=mask)


@dataclass(frozen=True)
class Tiles:
    """The rows of every group in pieces of at most ``block_m``, on the device; ``count`` bounds their number."""

    table: Tensor
    count: int
    block_m: int
    groups: int


def tiles_of(offsets: Tensor, rows: int, block_m: int, outside: bool) -> Tiles:
    """A group of m rows has at most m // block_m + 1 tiles, and none if it is empty: no need to know the offsets."""
    groups = offsets.numel() - 1
    count = min(rows, groups + 2 * outside) + rows // block_m
    table = offsets.new_empty((count, COLUMNS.value))
    if count:
        _tiles_kernel[(triton.cdiv(count, BLOCK),)](
            offsets, table, groups, rows, count, OUTSIDE=outside, BLOCK_M=block_m, BLOCK=BLOCK, CHUNK=CHUNK, num_warps=4
        )  # fmt: skip
    return Tiles(table, count, block_m, groups)


# ---------------------------------------------------------------- operands


@dataclass(frozen=True)
class Weight:
    """Matrices ``[groups, n, k]`` as the kernels take them.

    ``form`` tells which elements are neighbours in memory: "k" those of a row, "n" those of a column, "nvfp4" the two
    codes of a byte. ``group`` and ``line`` are the strides of groups and of rows ("n": of columns).
    """

    data: Tensor
    scale: Tensor | None
    factor: Tensor | None  # global scales [groups]
    form: str
    n: int
    k: int
    group: int
    line: int


def weight_of(w: Tensor, block_scale: Tensor | None = None, global_scale: Tensor | None = None) -> Weight:
    """Without a copy, unless neither rows nor columns are contiguous; ``w.mT`` serves as well as ``w``."""
    if block_scale is not None:
        _, n, k = w.shape
        codes, scale = w.contiguous(), block_scale.contiguous().view(torch.uint8)
        return Weight(codes, scale, global_scale.contiguous(), "nvfp4", n, 2 * k, n * 2 * k, 2 * k)
    if 1 not in w.stride()[1:]:
        w = w.contiguous()
    form = "k" if w.stride(2) == 1 else "n"
    line = w.stride(1 if form == "k" else 2)
    return Weight(w, None, None, form, w.shape[1], w.shape[2], w.stride(0), line)


def row_step(weight: Weight, x: Tensor, *strides: int) -> int:
    """The largest of 32, 16 and 8 that divides all sizes along a row and all strides, else 1: unaligned.

    Sizes are not specialised. Counted in steps they tell the compiler that 16 bytes may be loaded at once.
    """
    sizes = (weight.k, weight.group, weight.line, x.stride(0), *strides)
    if weight.data.data_ptr() % 16 or x.data_ptr() % 16:
        return 1
    steps = (32, 16) if weight.form == "nvfp4" else (8,)
    return next((step for step in steps if all(size % step == 0 for size in sizes)), 1)


def column_step(*sizes: int) -> int:
    return 8 if all(size % 8 == 0 for size in sizes) else 1


def stages_of(config: Config, step: int) -> int:
    """Unaligned operands are loaded into registers, and nothing is pipelined: cp.async takes whole words, and on sm_90
    Triton miscompiles a product in a pipelined loop whose left operand is in registers."""
    return config.stages if step > 1 else 1


def compile_cases(arch: int):
    for outside in (False, True):
        yield Case(
            f"tiles-{'all' if outside else 'groups'}", _tiles_kernel,
            {"offsets_ptr": "*i32", "table_ptr": "*i32", "groups": "i32", "rows": "i32", "tiles": "i32"},
            {"OUTSIDE": outside, "BLOCK_M": 16, "BLOCK": BLOCK, "CHUNK": CHUNK}, {"num_warps": 4},
        )  # fmt: skip
