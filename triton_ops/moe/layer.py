"""latent_moe_front and latent_moe_tail: the products of a LatentMoE layer before and behind its experts.

One launch each. The front multiplies x with three weights; the number of a program chooses the weight, and with it the
epilogue. The tail is one sum over two inner dimensions. A router's factors are not narrowed: a bfloat16 x meets a
float32 weight as three bfloat16 terms, whose sum it is, and all their products are exact.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import (
    INTERPRET,
    Case,
    architecture,
    batch_invariant,
    device_function,
    dot,
    guard,
    narrow,
    on_row_of,
    widen,
)
from .numerics import gated, relu2

__all__ = ["TABLE", "Config", "compile_cases", "config_for", "latent_moe_front", "latent_moe_tail"]

FLT_MAX = tl.constexpr(3.4028234663852886e38)


# ---------------------------------------------------------------- products
#
# FACTORS: "same" (x and w of one dtype), "wide" (both become float32, for FMA) or "split" (bfloat16 x, float32 w).


@device_function
def _three_terms(w):
    """float32 -> three bfloat16 whose sum it is: 8 bits each, cut off, so that nothing overflows.

    Times an infinite x they are NaN where float32 has an infinity, for a term may be 0.
    """
    high = (w.to(tl.uint32, bitcast=True) & 0xFFFF0000).to(tl.float32, bitcast=True)
    rest = tl.where(tl.abs(w) <= FLT_MAX, w - high, 0.0)
    middle = (rest.to(tl.uint32, bitcast=True) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return narrow(high, tl.bfloat16), narrow(middle, tl.bfloat16), narrow(rest - middle, tl.bfloat16)


@device_function
def _multiply(x, w_ptr, at, mask, acc, FACTORS: tl.constexpr):
    """acc + x w^T for a tile of w."""
    w = tl.load(w_ptr + at, mask=mask, other=0.0)
    if FACTORS == "split":
        high, middle, low = _three_terms(w)
        acc = dot(x, tl.trans(low), acc)
        acc = dot(x, tl.trans(middle), acc)
        return dot(x, tl.trans(high), acc)
    elif FACTORS == "wide":
        return dot(widen(x), tl.trans(widen(w)), acc)
    else:
        return dot(x, tl.trans(w), acc)


@device_function
def _step(
    a, b, x_ptr, x_row, mask_m, w_ptr, w_row, mask_n, second, start, width,
    PAIR: tl.constexpr, FACTORS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    cols = start + tl.arange(0, BLOCK_K)
    inside = (cols < width)[None, :]
    x = tl.load(x_ptr + x_row[:, None] + cols[None, :], mask=mask_m[:, None] & inside, other=0.0)
    at, mask = w_row[:, None] + cols[None, :], mask_n[:, None] & inside
    a = _multiply(x, w_ptr, at, mask, a, FACTORS)
    if PAIR:
        b = _multiply(x, w_ptr, at + second, mask, b, FACTORS)
    return a, b


@device_function
def _products(
    a, b,  # sums so far, [M, N]
    x_ptr, x_row, mask_m,  # offsets of the rows of x, and which there are
    w_ptr, w_row, mask_n,
    second,  # PAIR: how far behind its row of w another is, whose product goes to b
    width,
    PAIR: tl.constexpr, FACTORS: tl.constexpr,
    CHUNK: tl.constexpr,  # steps that are summed apart before they join the sum; 0: one sum
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """a + x w^T, b + x w'^T over ``width`` columns.

    Tensor cores cut off what they add, a relative 1e-5 over a few thousand terms, and float32's chains of FMA lose
    digits too: sums of sums keep them where the result is float32.
    """
    if CHUNK == 0:
        for start in range(0, width, BLOCK_K):
            a, b = _step(a, b, x_ptr, x_row, mask_m, w_ptr, w_row, mask_n, second, start, width, PAIR, FACTORS, BLOCK_K)
    else:
        for chunk in range(0, width, CHUNK * BLOCK_K):
            c = tl.zeros(a.shape, tl.float32)
            d = tl.zeros(b.shape, tl.float32)
            for start in range(chunk, tl.minimum(chunk + CHUNK * BLOCK_K, width), BLOCK_K):
                c, d = _step(
                    c, d, x_ptr, x_row, mask_m, w_ptr, w_row, mask_n, second, start, width, PAIR, FACTORS, BLOCK_K
                )
            a += c
            b += d
    return a, b


@device_function
def _row_sums(acc, x_at, w_ptr, w_row, mask_n, width, BLOCK_K: tl.constexpr):
    """acc ``[N, BLOCK_K]`` plus the products of one row of x with rows of w: every thread sums its own columns."""
    for start in range(0, width, BLOCK_K):
        cols = start + tl.arange(0, BLOCK_K)
        x = widen(tl.load(x_at + cols, mask=cols < width, other=0.0))
        mask = mask_n[:, None] & (cols < width)[None, :]
        w = widen(tl.load(w_ptr + w_row[:, None] + cols[None, :], mask=mask, other=0.0))
        acc = tl.fma(w, tl.broadcast_to(x[None, :], w.shape), acc)
    return acc


@device_function
def _tile(tiles_m, tiles_n, GROUP: tl.constexpr):
    """This program's tile (m, n): GROUP tiles of rows go through all columns before the next, sharing x in L2."""
    program = tl.program_id(0)
    span = GROUP * tiles_n
    first = program // span * GROUP
    rows = tl.minimum(tiles_m - first, GROUP)
    within = program % span
    return first + within % rows, within // rows


# ---------------------------------------------------------------- the front
#
# ACTIVATION: "none", "relu2", or one that gates: then w has a second half of ``columns`` rows, which is multiplied too.


@device_function
def _activate(a, b, ACTIVATION: tl.constexpr):
    if ACTIVATION == "none":
        return a
    elif ACTIVATION == "relu2":
        return relu2(a)
    else:
        return gated(a, b, ACTIVATION)


@device_function
def _row_of(
    x_at, w_ptr, w_stride, out_ptr, t, tile, columns, width,
    ACTIVATION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[t, a tile of columns] = act(w x)."""
    offs = (tile * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    mask = offs < columns
    none = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    a = tl.sum(_row_sums(none, x_at, w_ptr, offs * w_stride, mask, width, BLOCK_K), axis=1)
    b = a
    if ACTIVATION == "silu" or ACTIVATION == "gelu":
        b = tl.sum(_row_sums(none, x_at, w_ptr, (offs + columns) * w_stride, mask, width, BLOCK_K), axis=1)
    y = narrow(_activate(a, b, ACTIVATION), out_ptr.dtype.element_ty)
    tl.store(out_ptr + t * columns + offs, y, mask=mask)


@device_function
def _tile_of(
    x_ptr, x_stride, rows, tokens, w_ptr, w_stride, out_ptr, tile, columns, width,
    ACTIVATION: tl.constexpr, FACTORS: tl.constexpr, CHUNK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[rows, a tile of columns] = act(x w^T)."""
    PAIR: tl.constexpr = ACTIVATION == "silu" or ACTIVATION == "gelu"
    offs = (tile * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    mask_m, mask_n = rows < tokens, offs < columns
    none = tl.zeros((rows.shape[0], BLOCK_N), tl.float32)
    a, b = _products(
        none, none, x_ptr, rows * x_stride, mask_m, w_ptr, offs * w_stride, mask_n,
        tl.cast(columns, tl.int64) * w_stride, width, PAIR, FACTORS, CHUNK, BLOCK_K,
    )  # fmt: skip
    y = narrow(_activate(a, b, ACTIVATION), out_ptr.dtype.element_ty)
    tl.store(out_ptr + rows[:, None] * columns + offs[None, :], y, mask=mask_m[:, None] & mask_n[None, :])


@triton.jit
def _front_row_kernel(
    x_ptr, x_stride, router_ptr, router_stride, fc1_ptr, fc1_stride, up_ptr, up_stride,
    logits_ptr, z_ptr, shared_ptr,
    width, experts, latent, inner,
    ACTIVATION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of the logits, z and the shared expert's inner values, in this order; tokens), by FMA."""
    n = tl.program_id(0)
    t = tl.program_id(1).to(tl.int64)  # int64: tokens * stride passes 2^31
    x_at = x_ptr + t * x_stride
    first_z = tl.cdiv(experts, BLOCK_N)
    first_shared = first_z + tl.cdiv(latent, BLOCK_N)
    if n < first_z:
        _row_of(x_at, router_ptr, router_stride, logits_ptr, t, n, experts, width, "none", BLOCK_N, BLOCK_K)
    elif n < first_shared:
        if fc1_ptr is not None:
            _row_of(x_at, fc1_ptr, fc1_stride, z_ptr, t, n - first_z, latent, width, "none", BLOCK_N, BLOCK_K)
    else:
        _row_of(x_at, up_ptr, up_stride, shared_ptr, t, n - first_shared, inner, width, ACTIVATION, BLOCK_N, BLOCK_K)


@triton.jit(do_not_specialize=["tokens"])
def _front_tile_kernel(
    x_ptr, x_stride, router_ptr, router_stride, fc1_ptr, fc1_stride, up_ptr, up_stride,
    logits_ptr, z_ptr, shared_ptr,
    tokens, width, experts, latent, inner,
    ACTIVATION: tl.constexpr, ROUTER: tl.constexpr,
    ROUTER_CHUNK: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    ROUTER_N: tl.constexpr,  # columns of a tile of logits
    UP_N: tl.constexpr,  # and of the shared expert's inner values, which take two products each where they are gated
    GROUP: tl.constexpr,
):  # fmt: skip
    """One program per tile of the logits, z or the shared expert's inner values, in this order."""
    first_z = tl.cdiv(experts, ROUTER_N)
    first_shared = first_z + tl.cdiv(latent, BLOCK_N)
    m, n = _tile(tl.cdiv(tokens, BLOCK_M), first_shared + tl.cdiv(inner, UP_N), GROUP)
    rows = m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # int64: tokens * stride passes 2^31
    if n < first_z:
        _tile_of(
            x_ptr, x_stride, rows, tokens, router_ptr, router_stride, logits_ptr, n, experts, width,
            "none", ROUTER, ROUTER_CHUNK, ROUTER_N, BLOCK_K,
        )  # fmt: skip
    elif n < first_shared:
        if fc1_ptr is not None:
            _tile_of(
                x_ptr, x_stride, rows, tokens, fc1_ptr, fc1_stride, z_ptr, n - first_z, latent, width,
                "none", "same", CHUNK, BLOCK_N, BLOCK_K,
            )  # fmt: skip
    else:
        _tile_of(
            x_ptr, x_stride, rows, tokens, up_ptr, up_stride, shared_ptr, n - first_shared, inner, width,
            ACTIVATION, "same", CHUNK, UP_N, BLOCK_K,
        )  # fmt: skip


# ---------------------------------------------------------------- the tail


@triton.jit
def _tail_row_kernel(
    y_ptr, y_stride, fc2_ptr, fc2_stride, shared_ptr, shared_stride, down_ptr, down_stride,
    residual_ptr, residual_stride, out_ptr,
    width, latent, inner,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of the output's columns, tokens), by FMA."""
    offs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = offs < width
    t = tl.program_id(1).to(tl.int64)  # int64: tokens * stride passes 2^31
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    if fc2_ptr is not None:
        row = offs.to(tl.int64) * fc2_stride
        acc = _row_sums(acc, y_ptr + t * y_stride, fc2_ptr, row, mask, latent, BLOCK_K)
    row = offs.to(tl.int64) * down_stride
    acc = _row_sums(acc, shared_ptr + t * shared_stride, down_ptr, row, mask, inner, BLOCK_K)
    out = tl.sum(acc, axis=1)
    if fc2_ptr is None:
        out += widen(tl.load(y_ptr + t * y_stride + offs, mask=mask, other=0.0))
    if residual_ptr is not None:
        out += widen(tl.load(residual_ptr + t * residual_stride + offs, mask=mask, other=0.0))
    tl.store(out_ptr + t * width + offs, narrow(out, out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tokens"])
def _tail_tile_kernel(
    y_ptr, y_stride, fc2_ptr, fc2_stride, shared_ptr, shared_stride, down_ptr, down_stride,
    residual_ptr, residual_stride, out_ptr,
    tokens, width, latent, inner,
    CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One program per tile of the output; one accumulator for both products."""
    m, n = _tile(tl.cdiv(tokens, BLOCK_M), tl.cdiv(width, BLOCK_N), GROUP)
    offs_m = m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # int64: tokens * stride passes 2^31
    offs = (n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    mask_m, mask_n = offs_m < tokens, offs < width
    mask = mask_m[:, None] & mask_n[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    none = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if fc2_ptr is not None:
        acc, _ = _products(
            acc, none, y_ptr, offs_m * y_stride, mask_m, fc2_ptr, offs * fc2_stride, mask_n, 0, latent,
            False, "same", CHUNK, BLOCK_K,
        )  # fmt: skip
    acc, _ = _products(
        acc, none, shared_ptr, offs_m * shared_stride, mask_m, down_ptr, offs * down_stride, mask_n, 0, inner,
        False, "same", CHUNK, BLOCK_K,
    )  # fmt: skip
    if fc2_ptr is None:
        acc += widen(tl.load(y_ptr + offs_m[:, None] * y_stride + offs[None, :], mask=mask, other=0.0))
    if residual_ptr is not None:
        at = residual_ptr + offs_m[:, None] * residual_stride + offs[None, :]
        acc += widen(tl.load(at, mask=mask, other=0.0))
    tl.store(out_ptr + offs_m[:, None] * width + offs[None, :], narrow(acc, out_ptr.dtype.element_ty), mask=mask)


# ---------------------------------------------------------------- choice


@dataclass(frozen=True)
class Config:
    """One way to run front and tail: tiles of ``block_m`` tokens (0: a token at a time, without tensor cores)."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    router_n: int = 16  # columns of a tile of logits, whose factors are float32 or three times as many


# {architecture: {largest number of tokens: configuration}}; the last serves every larger number. Chosen for Super (d
# 4096; 512, 1024 and 5376 outputs) so that decode has several programs per SM, and prefill large tiles; not tuned.
_ROWS_90 = {
    1: Config(0, 256 if INTERPRET else 8, 512, 4, 1),  # NumPy wants few large programs
    16: Config(16, 32, 128, 4, 4),
    32: Config(32, 32, 128, 4, 4),
    64: Config(64, 64, 64, 4, 4, router_n=32),
    128: Config(128, 64, 64, 8, 4, router_n=32),
    1 << 62: Config(128, 128, 64, 8, 3, router_n=64),
}
_ROWS_120 = {  # 99 KiB of shared memory
    **{tokens: _ROWS_90[tokens] for tokens in (1, 16, 32, 64)},
    128: replace(_ROWS_90[128], stages=3),
    1 << 62: replace(_ROWS_90[1 << 62], router_n=32),
}
TABLE = {80: _ROWS_120, 90: _ROWS_90, 100: _ROWS_90, 120: _ROWS_120}
# float32 multiplies by FMA, which wants more threads per element and no stages of shared memory.
FLOAT32 = {1: _ROWS_90[1], 1 << 62: Config(32, 32, 32, 4, 2, router_n=32)}
CHUNK_K = {torch.float32: 64, torch.float16: 512, torch.bfloat16: 512}  # terms of a partial sum, by x's dtype
INVARIANT_ROWS = 64  # in batch-invariant mode every number of tokens runs as this one
GROUP = 8  # tiles of rows that share x in L2


def config_for(arch: int, dtype: torch.dtype, tokens: int, invariant: bool = False) -> Config:
    rows = FLOAT32 if dtype == torch.float32 else on_row_of(TABLE, arch)
    wanted = INVARIANT_ROWS if invariant else tokens
    return rows[min(limit for limit in rows if limit >= wanted)]


def _factors(x: torch.dtype, router: torch.dtype) -> str:
    if x == router:
        return "same"
    return "split" if (x, router) == (torch.bfloat16, torch.float32) else "wide"


def _options(config: Config) -> dict[str, object]:
    return {"num_warps": config.warps, "num_stages": config.stages, "enable_fp_fusion": False}


def _blocks(config: Config, dtype: torch.dtype) -> dict[str, int]:
    """The constants that front and tail share; a configuration for rows has but two."""
    sizes = {"BLOCK_N": config.block_n, "BLOCK_K": config.block_k}
    if config.block_m == 0:
        return sizes
    chunk = CHUNK_K[dtype] // config.block_k if dtype == torch.float32 else 0
    return {**sizes, "BLOCK_M": config.block_m, "CHUNK": chunk, "GROUP": GROUP}


def _front_blocks(config: Config, dtype: torch.dtype, router: torch.dtype, activation: str) -> dict[str, object]:
    blocks = {"ACTIVATION": activation, **_blocks(config, dtype)}
    if config.block_m == 0:
        return blocks
    up_n = config.block_n // (1 if activation == "relu2" else 2)
    chunk = CHUNK_K[dtype] // config.block_k
    factors = _factors(dtype, router)
    return {**blocks, "ROUTER": factors, "ROUTER_CHUNK": chunk, "ROUTER_N": config.router_n, "UP_N": up_n}


# ---------------------------------------------------------------- launchers


def _dense(t: Tensor | None) -> tuple[Tensor | None, int]:
    """The matrix, columns side by side, and how far it is from row to row."""
    if t is None:
        return None, 1
    t = t if t.stride(1) == 1 or t.shape[1] == 1 else t.contiguous()
    return t, t.stride(0)


def latent_moe_front(
    x: Tensor, router_weight: Tensor, fc1: Tensor | None, shared_up: Tensor, *, activation: str = "relu2"
) -> tuple[Tensor, Tensor, Tensor]:
    tokens, width = x.shape
    experts, latent = router_weight.shape[0], 0 if fc1 is None else fc1.shape[0]
    inner = shared_up.shape[0] // (1 if activation == "relu2" else 2)
    logits = x.new_empty(tokens, experts, dtype=torch.float32)
    z, shared = x.new_empty(tokens, latent), x.new_empty(tokens, inner)
    config = config_for(architecture(x), x.dtype, tokens, batch_invariant())
    blocks = _front_blocks(config, x.dtype, router_weight.dtype, activation)
    operands = [part for t in (x, router_weight, fc1, shared_up) for part in _dense(t)]
    if tokens == 0:
        return logits, z, shared
    columns = ((experts, "ROUTER_N"), (latent, "BLOCK_N"), (inner, "UP_N"))
    tiles = sum(triton.cdiv(n, blocks.get(block, config.block_n)) for n, block in columns)
    with guard(x):
        if config.block_m == 0:
            _front_row_kernel[tiles, tokens](
                *operands, logits, z, shared, width, experts, latent, inner, **blocks, **_options(config)
            )
        else:
            _front_tile_kernel[(tiles * triton.cdiv(tokens, config.block_m),)](
                *operands, logits, z, shared, tokens, width, experts, latent, inner, **blocks, **_options(config)
            )
    return logits, z, shared


def latent_moe_tail(
    y: Tensor, fc2: Tensor | None, shared: Tensor, shared_down: Tensor, residual: Tensor | None = None
) -> Tensor:
    (tokens, latent), (width, inner) = y.shape, shared_down.shape
    out = y.new_empty(tokens, width)
    config = config_for(architecture(y), y.dtype, tokens, batch_invariant())
    blocks = _blocks(config, y.dtype)
    operands = [part for t in (y, fc2, shared, shared_down, residual) for part in _dense(t)]
    if tokens == 0:
        return out
    tiles = triton.cdiv(width, config.block_n)
    with guard(y):
        if config.block_m == 0:
            _tail_row_kernel[tiles, tokens](*operands, out, width, latent, inner, **blocks, **_options(config))
        else:
            _tail_tile_kernel[(tiles * triton.cdiv(tokens, config.block_m),)](
                *operands, out, tokens, width, latent, inner, **blocks, **_options(config)
            )
    return out


def _case(name: str, kernel, config: Config, blocks: dict[str, object], dtype: str, router: str = "fp32", **given):
    names = ("x", "fc1", "up", "z", "shared", "y", "fc2", "down", "residual", "out")
    types = {f"{t}_ptr": f"*{dtype}" for t in names} | {"router_ptr": f"*{router}", "logits_ptr": "*fp32"}
    types |= {f"{t}_stride": "i32:16" for t in (*names, "router")} | {"tokens": "i32"}
    types |= {t: "i32:16" for t in ("width", "experts", "latent", "inner")}
    types = {n: t for n, t in types.items() if n in kernel.arg_names and n not in given}
    return Case(name, kernel, types, {**blocks, **given}, _options(config))


def compile_cases(arch: int):
    """Every row for bfloat16 with both kinds of routers; of the other dtypes what compiles differently."""
    dtypes = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    every = tuple(_ROWS_90)
    forms = (  # x, router, activation, numbers of tokens
        ("bf16", "fp32", "relu2", every), ("bf16", "bf16", "silu", every), ("bf16", "fp16", "gelu", (16, 1 << 62)),
        ("fp16", "fp16", "relu2", (1, 64)), ("fp32", "fp32", "relu2", (1, 64)), ("fp32", "bf16", "silu", (1, 64)),
    )  # fmt: skip
    for dtype, router, activation, numbers in forms:
        for tokens in numbers:
            config = config_for(arch, dtypes[dtype], tokens)
            row = config.block_m == 0
            front, tail = (_front_row_kernel, _tail_row_kernel) if row else (_front_tile_kernel, _tail_tile_kernel)
            blocks = _front_blocks(config, dtypes[dtype], dtypes[router], activation)
            name = f"{dtype}-{tokens if tokens < 1 << 62 else 'many'}"
            yield _case(f"front-{name}-{router}-{activation}", front, config, blocks, dtype, router)
            if router == dtype:
                yield _case(f"tail-{name}", tail, config, _blocks(config, dtypes[dtype]), dtype)
    for tokens in (1, 16):  # no latent projection
        config = config_for(arch, torch.bfloat16, tokens)
        front, tail = (_front_row_kernel, _tail_row_kernel) if tokens == 1 else (_front_tile_kernel, _tail_tile_kernel)
        absent = {"fc2_ptr": None, "residual_ptr": None}
        yield _case(f"tail-nano-{tokens}", tail, config, _blocks(config, torch.bfloat16), "bf16", **absent)
        blocks = _front_blocks(config, torch.bfloat16, torch.float32, "relu2")
        yield _case(f"front-nano-{tokens}", front, config, blocks, "bf16", fc1_ptr=None)
