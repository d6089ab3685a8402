"""What forward and backward of ssd_scan share: tiles, the map from chunks to sequences, decays, products.

A chunk is 64 tokens, counted from the start of its sequence whatever ``chunk_size`` says: the bits of a sequence then
do not depend on its neighbours, and a prompt that is cut at a multiple of 64 gives the bits of the whole one.
Row r of every buffer of chunks is chunk r of the call; without packing it is chunk ``r % chunks`` of sequence
``r // chunks``. Packed, the lengths stay on the device: there are at most ``T / 64 + S + 1`` rows (the last sequence is
the padding behind), and `_plan_kernel` writes which tokens a row has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import Case, dot, narrow, on_row_of, widen

__all__ = ["CHUNK", "Config", "Layout", "TABLE", "config_for", "launch", "lay_out", "step_of", "strides"]

CHUNK = 64
Q = tl.constexpr(CHUNK)
COLUMNS = tl.constexpr(4)  # of the table: sequence, first token, tokens, chunk; chunk < 0 marks a row of padding


# ---------------------------------------------------------------- which tokens a row has


@triton.jit(do_not_specialize=["sequences", "length", "rows", "tokens"])
def _plan_kernel(
    ends_ptr,  # cu_seqlens, or None: `sequences` of `length` tokens each
    indices_ptr,  # slots of the sequences, or None: a negative one marks a padding sequence
    checkpoint_ptr, checkpoint_slot_ptr,  # or None
    table_ptr, first_ptr,
    sequences, length,
    rows,  # rows of chunks; the rows of checkpoints follow
    tokens,  # of x, those behind the last sequence included
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid sequences + 1 + checkpoints: one program writes the rows of one sequence, of the padding behind the last
    one, or the row of a checkpoint: its chunk up to and with its token."""
    pid = tl.program_id(0)
    is_checkpoint = pid > sequences
    token = 0
    if checkpoint_ptr is not None:
        token = tl.load(checkpoint_ptr + pid - sequences - 1, mask=is_checkpoint, other=0)

    if ends_ptr is None:
        chunks = tl.cdiv(length, Q)
        s = tl.where(is_checkpoint, token // tl.maximum(length, 1), pid)
        begin, end, before = 0, length, s * chunks
        token = token % tl.maximum(length, 1)
    else:
        s, before = 0, 0  # sequences, and their chunks, that lie before this one
        for start in range(0, sequences, BLOCK):
            r = start + tl.arange(0, BLOCK)
            mask = r < sequences
            a = tl.load(ends_ptr + r, mask=mask, other=0)
            b = tl.load(ends_ptr + r + 1, mask=mask, other=0)
            mask = mask & tl.where(is_checkpoint, b <= token, r < pid)
            s += tl.sum(mask.to(tl.int32))
            before += tl.sum(tl.where(mask, (b - a + Q - 1) // Q, 0))
        begin = tl.load(ends_ptr + s)
        end = tl.load(ends_ptr + s + 1, mask=s < sequences, other=0)
        end = tl.where(s < sequences, end, tokens)

    alive = s < sequences
    if indices_ptr is not None:
        alive = alive & (tl.load(indices_ptr + s, mask=alive, other=-1) >= 0)

    if is_checkpoint:
        if checkpoint_ptr is not None:
            k = pid - sequences - 1
            alive = alive & (token >= 0) & (tl.load(checkpoint_slot_ptr + k) >= 0)
            nth = (token - begin) // Q
            row = table_ptr + (rows + k).to(tl.int64) * COLUMNS
            tl.store(row, s)
            tl.store(row + 1, begin + nth * Q)
            tl.store(row + 2, token - begin - nth * Q + 1)
            tl.store(row + 3, tl.where(alive, before + nth, -1))
    else:
        if first_ptr is not None:
            tl.store(first_ptr + pid, before)
        last = before + tl.cdiv(end - begin, Q)
        fill = tl.where(s < sequences, last, rows)  # the last program also clears the rows that are left over
        for start in range(before, fill, BLOCK):
            r = start + tl.arange(0, BLOCK)
            first = begin + (r - before) * Q
            mask = (r < fill) & (r < rows)
            row = table_ptr + r.to(tl.int64) * COLUMNS
            tl.store(row, s, mask=mask)
            tl.store(row + 1, first, mask=mask)
            tl.store(row + 2, tl.maximum(tl.minimum(end - first, Q), 0), mask=mask)
            tl.store(row + 3, tl.where(alive, r, -1), mask=mask)


@triton.jit
def tokens_of(row, table_ptr, indices_ptr, length):
    """(sequence, first token, tokens, chunk) of a row, the first two for addresses: 64 bits."""
    if table_ptr is not None:
        at = table_ptr + row * COLUMNS
        s, first = tl.load(at).to(tl.int64), tl.load(at + 1).to(tl.int64)
        count, chunk = tl.load(at + 2), tl.load(at + 3).to(tl.int64)
    else:
        chunks = tl.cdiv(length, Q)
        s, first = row // chunks, (row % chunks) * Q
        count = tl.minimum(length - first, Q)
        chunk = row
        if indices_ptr is not None:
            chunk = tl.where(tl.load(indices_ptr + s) < 0, -1, row)
    return s, first, count, chunk


# ---------------------------------------------------------------- time steps and decays


@triton.jit
def causal_decay(high, low, i):
    """L[i, j] = product of the decays of tokens j + 1 to i, 0 above the diagonal: masked before exp2 can overflow.

    Sums of log2 decays come as high + low: behind a step of dt A = -1e5 one float32 has lost the digits of the small
    steps. Differences are not clamped at 0: without softplus a decay may be a growth.
    """
    d = (high[:, None] - high[None, :]) + (low[:, None] - low[None, :])
    return tl.exp2(tl.where(i[:, None] >= i[None, :], d, float("-inf")))


@triton.jit
def load_time(time_ptr, row, heads, head, i):
    """(dt, high, low) of the 64 tokens of a row, as the first kernel left them."""
    at = time_ptr + (row * heads + head) * 3 * Q + i
    return tl.load(at), tl.load(at + Q), tl.load(at + 2 * Q)


# ---------------------------------------------------------------- products


@triton.jit
def _tf32(x):
    """x rounded to the 10 bits of a TF32 mantissa; tensor cores would truncate."""
    bits = (x.to(tl.uint32, bitcast=True) + 0x1000) & 0xFFFFE000
    return tl.where(tl.abs(x) < float("inf"), bits.to(tl.float32, bitcast=True), x)


@triton.jit
def operand(x, dtype: tl.constexpr):
    """x, loaded or computed in float32, as `product` takes it where the inputs are of ``dtype``.

    float16 inputs, which are TF32 numbers, meet computed values of any size: those would overflow float16.
    """
    if dtype == tl.bfloat16:
        return x if x.dtype == tl.bfloat16 else narrow(x, tl.bfloat16)
    elif dtype == tl.float16:
        return widen(x) if x.dtype == tl.float16 else _tf32(x)
    else:
        return x


@triton.jit
def product(a, b, acc, dtype: tl.constexpr):
    """acc + a @ b of two `operand`s."""
    if dtype == tl.float16:
        return tl.dot(a, b, acc, input_precision="tf32")
    else:
        return dot(a, b, acc)


@triton.jit
def split_product(a, b, acc, dtype: tl.constexpr):
    """acc + a @ b with an `operand` a and b in float32, b in two parts: 16 bits of it or more enter instead of 8.

    The states' sums, which later tokens build on, are exact to 1e-5 this way; the product is hidden by the traffic.
    """
    part = operand(b, dtype)
    acc = product(a, part, acc, dtype)
    if dtype != tl.float32:
        acc = product(a, operand(b - widen(part), dtype), acc, dtype)
    return acc


@triton.jit
def tile(ptr, base, i, stride_i, cols, stride_col, live, size, STEP: tl.constexpr):
    """A tile [token, column] of x, B, C or z, as loaded; 0 where there is no token or column."""
    if STEP == 1:
        at = ptr + base + i.to(tl.int64)[:, None] * stride_i + (cols.to(tl.int64) * stride_col)[None, :]
    else:
        at = ptr + (base + i.to(tl.int64) * stride_i)[:, None] * STEP + cols[None, :]
    return tl.load(at, mask=live[:, None] & (cols < size)[None, :], other=0.0)


# ---------------------------------------------------------------- host side


@dataclass(frozen=True)
class Config:
    """Tiles and warps of a kernel. It walks the head's channels (P) and the state's (N) in tiles that pad little."""

    tile_p: int  # the largest tile of P
    tile_n: int  # the largest tile of N
    warps: int
    stages: int = 1

    def __post_init__(self):
        # On sm_90 Triton miscompiles a product in a loop whose left operand is computed in registers, as most of these
        # are, when it is pipelined: NaN rows. Nothing here is pipelined; whole chunks are loaded at once.
        assert self.stages == 1, "a pipelined product with a computed left operand is miscompiled on sm_90"


# {architecture: {dtype: {kernel: configuration}}}. Chosen so that the chunks fit the 99 KiB of shared memory of sm_120
# and that registers suffice (gradients on sm_120, where mma.sync keeps its operands in registers, spill up to 64 bytes
# a thread); float32 multiplies by FMA and wants small tiles. Not tuned.
_FLOAT32 = {
    "states": Config(32, 32, 8), "scan": Config(32, 32, 8),
    "head_grads": Config(16, 16, 8), "group_grads": Config(16, 16, 8),
}  # fmt: skip
_BFLOAT16_90 = {
    "states": Config(64, 128, 4), "scan": Config(64, 128, 8),
    "head_grads": Config(32, 64, 8), "group_grads": Config(32, 32, 8),
}  # fmt: skip
_SIXTEEN_120 = {
    "states": Config(64, 128, 8), "scan": Config(32, 64, 8),
    "head_grads": Config(16, 16, 8), "group_grads": Config(16, 32, 8),
}  # fmt: skip
_FLOAT16_90 = {**_BFLOAT16_90, "head_grads": Config(16, 32, 8)}
_DTYPES_90 = {torch.float32: _FLOAT32, torch.float16: _FLOAT16_90, torch.bfloat16: _BFLOAT16_90}
_DTYPES_120 = {torch.float32: _FLOAT32, torch.float16: _SIXTEEN_120, torch.bfloat16: _SIXTEEN_120}
TABLE = {80: _DTYPES_120, 90: _DTYPES_90, 100: _DTYPES_90, 120: _DTYPES_120}


def config_for(arch: int, dtype: torch.dtype, kernel: str) -> Config:
    return on_row_of(TABLE, arch)[dtype][kernel]


@cache
def tile_of(size: int, largest: int) -> int:
    """The largest tile that pads ``size`` by at most an eighth: 64 for P = 64, 16 for 80, 32 for N = 96."""
    size = max(16 * triton.cdiv(size, 16), 16)
    tiles = (t for t in (128, 64, 32, 16) if t <= largest)
    return next(t for t in tiles if t == 16 or t * triton.cdiv(size, t) * 8 <= size * 9)


def step_of(*tensors: Tensor | None) -> int:
    """8 where every row of the operands starts at a multiple of 8 elements and is contiguous, else 1.

    Strides are not specialised. Counted in steps of 8 they tell the compiler that 16 bytes may be loaded at once.
    """
    given = [t for t in tensors if t is not None]
    aligned = all(t.stride(-1) == 1 and all(s % 8 == 0 for s in t.stride()[:-1]) for t in given)
    return 8 if aligned else 1


def strides(t: Tensor | None, packed: bool, step: int = 1) -> Sequence[int]:
    """Strides of batch (0 when packed), token, head or group, and column (dt has none), the first three in steps."""
    if t is None:
        return 0, 0, 0, 0
    given = (0, *t.stride()) if packed else t.stride()
    return *(s // step for s in given[:3]), *(given[3:4] or (0,))


@dataclass(frozen=True)
class Layout:
    """Which sequences, rows and tokens a call has. `table` and `first` are on the device, or None: no need of them."""

    packed: bool
    sequences: int
    length: int  # of a sequence; 0 when packed
    rows: int
    checkpoints: int = 0
    table: Tensor | None = None
    first: Tensor | None = None


def launch(kernel, programs: int, *args, **options) -> None:
    """A launch of no programs is an error."""
    if programs:
        kernel[(programs,)](*args, **options)


# What is compiled without a GPU: (name, dtype, P, N, whether rows are aligned): Nemotron 3 Nano in every dtype, heads
# of 80 (Nano-4B), states of 96 (Puzzle) and 256 (Nemotron-H 47B), and operands of any strides.
CASES = (
    ("fp32", "fp32", 64, 128, True),
    ("fp16", "fp16", 64, 128, True),
    ("bf16", "bf16", 64, 128, True),
    ("p80", "bf16", 80, 128, True),
    ("n96", "bf16", 64, 96, True),
    ("n256", "bf16", 64, 256, True),
    ("fp32-p80-n96", "fp32", 80, 96, True),
    ("strided", "bf16", 64, 128, False),
    ("strided-fp32", "fp32", 64, 128, False),
)
TORCH = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def options_of(P: int, N: int, config: Config) -> dict[str, object]:
    """What a launch takes from the table."""
    tiles = {"P": P, "N": N, "TILE_P": tile_of(P, config.tile_p), "TILE_N": tile_of(N, config.tile_n)}
    return {**tiles, "num_warps": config.warps, "num_stages": config.stages, "enable_fp_fusion": False}


def case_of(name: str, kernel, dtype: str, numbers: Sequence[str], pointers: dict, options: dict) -> Case:
    """``pointers``: name -> type, "x" for that of the inputs, or None for an operand that is not given."""
    types = {n: f"*{dtype if t == 'x' else t}" for n, t in pointers.items() if t is not None}
    absent = {n: None for n, t in pointers.items() if t is None}
    types |= {n: "fp32" if n in ("dt_min", "dt_max") else "i32" for n in numbers}
    compiler = {k: options[k] for k in ("num_warps", "num_stages", "enable_fp_fusion") if k in options}
    constexprs = {k: v for k, v in options.items() if k not in compiler}
    return Case(name, kernel, types, {**constexprs, **absent}, compiler)


def lay_out(
    x: Tensor, cu_seqlens: Tensor | None, indices: Tensor | None, tokens: Tensor | None, slots: Tensor | None
) -> Layout:
    checkpoints = 0 if tokens is None else tokens.numel()
    packed = cu_seqlens is not None
    if packed:
        sequences, length = cu_seqlens.numel() - 1, 0
        rows = x.shape[0] // CHUNK + sequences + 1
    else:
        sequences, length = x.shape[:2]
        rows = sequences * triton.cdiv(length, CHUNK)
    if not packed and not checkpoints:
        return Layout(packed, sequences, length, rows)
    table = x.new_empty((rows + checkpoints, COLUMNS.value), dtype=torch.int32)
    first = x.new_empty(sequences + 1, dtype=torch.int32) if packed else None
    _plan_kernel[(sequences + 1 + checkpoints,)](
        cu_seqlens, indices, tokens, slots, table, first, sequences, length, rows, x.shape[0], BLOCK=256, num_warps=4
    )
    return Layout(packed, sequences, length, rows, checkpoints, table, first)


def compile_cases(arch: int):
    pointers = {"indices_ptr": "i64", "checkpoint_ptr": "i32", "checkpoint_slot_ptr": "i64", "table_ptr": "i32"}
    numbers, options = ("sequences", "length", "rows", "tokens"), {"BLOCK": 256, "num_warps": 4}
    for name, given in (("packed", "i32"), ("batched", None)):
        all_pointers = {**pointers, "ends_ptr": given, "first_ptr": given}
        yield case_of(f"scan-plan-{name}", _plan_kernel, "fp32", numbers, all_pointers, options)
