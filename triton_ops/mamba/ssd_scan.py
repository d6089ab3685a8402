"""ssd_scan: y_t = S_t C_t + D x_t with S_t = exp(A dt_t) S_{t-1} + dt_t x_t B_t^T, in three kernels over chunks of 64.

The first sums each chunk's own contribution to the state, the second passes the state from chunk to chunk, the third
computes the outputs of a chunk from the state that enters it and from its own tokens. States and sums are float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import architecture, dot, guard, narrow, widen
from .numerics import silu, time_step
from .ssd_scan_plan import (
    CASES,
    CHUNK,
    TORCH,
    Q,
    case_of,
    causal_decay,
    config_for,
    launch,
    lay_out,
    load_time,
    operand,
    options_of,
    product,
    split_product,
    step_of,
    strides,
    tile,
    tokens_of,
)

__all__ = ["compile_cases", "ssd_scan", "ssd_scan_slots"]


# ---------------------------------------------------------------- the state that a chunk adds

_STATES_NUMBERS = ["heads", "ratio", "length", "x_sb", "x_st", "x_sh", "x_sp", "dt_sb", "dt_st", "dt_sh",
                   "B_sb", "B_st", "B_sg", "B_sn"]  # fmt: skip


@triton.jit(do_not_specialize=_STATES_NUMBERS)
def _chunk_states_kernel(
    x_ptr, dt_ptr, A_ptr, B_ptr, bias_ptr, table_ptr, indices_ptr,
    time_ptr,  # [rows, heads, 3, Q]: dt; the sum of log2 decays up to and with each token, high and low part
    states_ptr,  # [rows, heads, P, N]
    heads, ratio, length,  # ratio: heads per group
    x_sb, x_st, x_sh, x_sp, dt_sb, dt_st, dt_sh, B_sb, B_st, B_sg, B_sn,
    dt_min, dt_max,
    SOFTPLUS: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    TILE_P: tl.constexpr, TILE_N: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Grid rows * heads, heads first, so that neighbours share B in L2: sum_j B_j (dt_j decay_j x_j)^T, as [N, P]."""
    pid = tl.program_id(0).to(tl.int64)  # int64: rows * heads * P * N and tokens * stride pass 2^31
    row, head = pid // heads, pid % heads
    s, first, count, chunk = tokens_of(row, table_ptr, indices_ptr, length)
    if chunk < 0:
        return
    i = tl.arange(0, Q)
    live = i < count

    dt = widen(tl.load(dt_ptr + s * dt_sb + (first + i) * dt_st + head * dt_sh, mask=live, other=0.0))
    bias = 0.0
    if bias_ptr is not None:
        bias = widen(tl.load(bias_ptr + head))
    dt = tl.where(live, time_step(dt, bias, SOFTPLUS, dt_min, dt_max), 0.0)
    # In float64, 64 numbers: the difference of two sums keeps the digits of small steps behind a large one.
    decay = dt.to(tl.float64) * (widen(tl.load(A_ptr + head)).to(tl.float64) * 1.4426950408889634)
    cum = tl.cumsum(tl.where(live, decay, 0.0))
    high = cum.to(tl.float32)
    time = time_ptr + pid * 3 * Q + i
    tl.store(time, dt)
    tl.store(time + Q, high)
    tl.store(time + 2 * Q, (cum - high.to(tl.float64)).to(tl.float32))
    end = tl.sum(tl.where(i == Q - 1, cum, 0.0))
    weight = dt * tl.exp2((end - cum).to(tl.float32))

    dtype: tl.constexpr = x_ptr.dtype.element_ty
    x_base = s * x_sb + first * x_st + head * x_sh
    B_base = s * B_sb + first * B_st + head // ratio * B_sg
    for p0 in range(0, P, TILE_P):
        p = p0 + tl.arange(0, TILE_P)
        x = widen(tile(x_ptr, x_base, i, x_st, p, x_sp, live, P, STEP)) * weight[:, None]
        for n0 in range(0, N, TILE_N):
            n = n0 + tl.arange(0, TILE_N)
            B = operand(tile(B_ptr, B_base, i, B_st, n, B_sn, live, N, STEP), dtype)
            added = split_product(tl.trans(B), x, tl.zeros((TILE_N, TILE_P), tl.float32), dtype)
            at = states_ptr + pid * (P * N) + p[None, :] * N + n[:, None]
            tl.store(at, added, mask=(n < N)[:, None] & (p < P)[None, :])


# ---------------------------------------------------------------- from chunk to chunk


@triton.jit
def advance(state, time_ptr, row, heads, head, added):
    """The state behind a row: decayed over its tokens, plus what they add."""
    at = time_ptr + (row * heads + head) * 3 * Q + Q - 1
    return tl.exp2(tl.load(at + Q) + tl.load(at + 2 * Q)) * state + added


_PASS_NUMBERS = ["heads", "chunks", "in_ss", "in_sh", "in_sp", "in_sn", "out_ss", "out_sh", "out_sp", "out_sn"]


@triton.jit(do_not_specialize=_PASS_NUMBERS)
def _pass_states_kernel(
    initial_ptr, final_ptr,  # [slots, heads, P, N] with strides; initial: None for zeros
    indices_ptr, has_initial_ptr, first_ptr, time_ptr,
    states_ptr,  # [rows, heads, P, N]: what each row adds
    entering_ptr,  # the same shape: the state that enters it; may be states_ptr
    heads, chunks,
    in_ss, in_sh, in_sp, in_sn, out_ss, out_sh, out_sp, out_sn,
    P: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr,
    REVERSE: tl.constexpr,  # from the last chunk to the first, as gradients go
    KEEP: tl.constexpr,  # leave the entering states in states_ptr too, in float32
):  # fmt: skip
    """Grid sequences * heads * pieces of the state. The next chunk is loaded while this one is worked on."""
    BLOCKS: tl.constexpr = tl.cdiv(P * N, BLOCK)
    pid = tl.program_id(0).to(tl.int64)
    s, head = pid // BLOCKS // heads, pid // BLOCKS % heads
    slot = s
    if indices_ptr is not None:
        slot = tl.load(indices_ptr + s).to(tl.int64)
        if slot < 0:
            return
    if first_ptr is not None:
        first = tl.load(first_ptr + s).to(tl.int64)
        count = (tl.load(first_ptr + s + 1) - first).to(tl.int32)
    else:
        first, count = s * chunks, chunks

    e = (pid % BLOCKS).to(tl.int32) * BLOCK + tl.arange(0, BLOCK)
    mask = e < P * N
    p, n = (e // N).to(tl.int64), (e % N).to(tl.int64)
    state = tl.zeros((BLOCK,), tl.float32)
    if initial_ptr is not None:
        size = P * N
        if has_initial_ptr is not None:
            size = tl.where(tl.load(has_initial_ptr + s) != 0, P * N, 0)
        at = initial_ptr + slot * in_ss + head * in_sh + p * in_sp + n * in_sn
        state = widen(tl.load(at, mask=e < size, other=0.0))

    last = first + count - 1
    row = last if REVERSE else first
    size = tl.where(count > 0, P * N, 0)
    upcoming = tl.load(states_ptr + (row * heads + head) * (P * N) + e, mask=e < size, other=0.0)
    for c in range(count):
        row = last - c if REVERSE else first + c
        after = row - 1 if REVERSE else row + 1
        added = upcoming
        size = tl.where(c + 1 < count, P * N, 0)
        upcoming = tl.load(states_ptr + (after * heads + head) * (P * N) + e, mask=e < size, other=0.0)
        here = (row * heads + head) * (P * N) + e
        tl.store(entering_ptr + here, narrow(state, entering_ptr.dtype.element_ty), mask=mask)
        if KEEP:
            tl.store(states_ptr + here, state, mask=mask)
        state = advance(state, time_ptr, row, heads, head, added)
    if final_ptr is not None:
        at = final_ptr + slot * out_ss + head * out_sh + p * out_sp + n * out_sn
        tl.store(at, narrow(state, final_ptr.dtype.element_ty), mask=mask)


_CHECKPOINT_NUMBERS = ["heads", "rows", "out_ss", "out_sh", "out_sp", "out_sn"]


@triton.jit(do_not_specialize=_CHECKPOINT_NUMBERS)
def _checkpoint_kernel(
    state_ptr, slot_ptr, table_ptr, time_ptr, states_ptr,
    heads, rows, out_ss, out_sh, out_sp, out_sn,
    P: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid checkpoints * heads * pieces: the state that enters the chunk, advanced over the row that ends at the token.

    Such a row is summed by the kernel that sums all rows, as the last row of a sequence that ends there would be.
    """
    BLOCKS: tl.constexpr = tl.cdiv(P * N, BLOCK)
    pid = tl.program_id(0).to(tl.int64)
    k, head = pid // BLOCKS // heads, pid // BLOCKS % heads
    row = rows + k
    _, _, _, chunk = tokens_of(row, table_ptr, None, 0)
    if chunk < 0:
        return
    e = (pid % BLOCKS).to(tl.int32) * BLOCK + tl.arange(0, BLOCK)
    mask = e < P * N
    state = tl.load(states_ptr + (chunk * heads + head) * (P * N) + e, mask=mask, other=0.0)
    added = tl.load(states_ptr + (row * heads + head) * (P * N) + e, mask=mask, other=0.0)
    state = advance(state, time_ptr, row, heads, head, added)
    slot = tl.load(slot_ptr + k).to(tl.int64)
    at = state_ptr + slot * out_ss + head * out_sh + (e // N).to(tl.int64) * out_sp + (e % N).to(tl.int64) * out_sn
    tl.store(at, narrow(state, state_ptr.dtype.element_ty), mask=mask)


# ---------------------------------------------------------------- outputs


@triton.jit
def scores(B_ptr, C_ptr, B_base, C_base, i, B_st, C_st, B_sn, C_sn, live,
           N: tl.constexpr, TILE_N: tl.constexpr, STEP: tl.constexpr):  # fmt: skip
    """C_i . B_j"""
    acc = tl.zeros((Q, Q), tl.float32)
    for n0 in range(0, N, TILE_N):
        n = n0 + tl.arange(0, TILE_N)
        B = tile(B_ptr, B_base, i, B_st, n, B_sn, live, N, STEP)
        acc = dot(tile(C_ptr, C_base, i, C_st, n, C_sn, live, N, STEP), tl.trans(B), acc)
    return acc


@triton.jit
def times_state(C_ptr, C_base, i, C_st, C_sn, live, state, p,
                P: tl.constexpr, N: tl.constexpr,
                TILE_P: tl.constexpr, TILE_N: tl.constexpr, STEP: tl.constexpr):  # fmt: skip
    """C_i times the state [P, N] at ``state``: [Q, TILE_P]."""
    dtype: tl.constexpr = C_ptr.dtype.element_ty
    acc = tl.zeros((Q, TILE_P), tl.float32)
    for n0 in range(0, N, TILE_N):
        n = n0 + tl.arange(0, TILE_N)
        C = tile(C_ptr, C_base, i, C_st, n, C_sn, live, N, STEP)
        at = state + p[:, None] * N + n[None, :]
        H = tl.load(at, mask=(p < P)[:, None] & (n < N)[None, :], other=0.0)
        acc = product(operand(C, dtype), tl.trans(operand(H, dtype)), acc, dtype)
    return acc


@triton.jit
def skip_of(D_ptr, head, p, P: tl.constexpr, CHANNELS: tl.constexpr):
    """D of a head's channels."""
    if CHANNELS:
        return widen(tl.load(D_ptr + head * P + p, mask=p < P, other=0.0))
    else:
        return widen(tl.load(D_ptr + head)) + tl.zeros(p.shape, tl.float32)


_SCAN_NUMBERS = ["heads", "ratio", "length", "x_sb", "x_st", "x_sh", "x_sp", "B_sb", "B_st", "B_sg", "B_sn",
                 "C_sb", "C_st", "C_sg", "C_sn", "z_sb", "z_st", "z_sh", "z_sp"]  # fmt: skip


@triton.jit(do_not_specialize=_SCAN_NUMBERS)
def _scan_kernel(
    x_ptr, B_ptr, C_ptr, D_ptr, z_ptr, y_ptr, table_ptr, indices_ptr, time_ptr,
    entering_ptr,  # [rows, heads, P, N]
    heads, ratio,
    length,  # of a sequence, 0 when packed
    x_sb, x_st, x_sh, x_sp, B_sb, B_st, B_sg, B_sn, C_sb, C_st, C_sg, C_sn, z_sb, z_st, z_sh, z_sp,
    D_CHANNELS: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    TILE_P: tl.constexpr, TILE_N: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Grid rows * heads, heads first: y_i = decay_i C_i H + sum_j (C_i . B_j) L_ij dt_j x_j + D x_i, then the gate."""
    pid = tl.program_id(0).to(tl.int64)  # int64: as in the first kernel
    row, head = pid // heads, pid % heads
    s, first, count, chunk = tokens_of(row, table_ptr, indices_ptr, length)
    i = tl.arange(0, Q)
    live = i < count
    y_row = y_ptr + ((s * length + first + i) * heads + head)[:, None] * P
    if chunk < 0:
        for p0 in range(0, P, TILE_P):
            p = p0 + tl.arange(0, TILE_P)
            nothing = narrow(tl.zeros((Q, TILE_P), tl.float32), y_ptr.dtype.element_ty)
            tl.store(y_row + p[None, :], nothing, mask=live[:, None] & (p < P)[None, :])
        return

    dtype: tl.constexpr = x_ptr.dtype.element_ty
    dt, high, low = load_time(time_ptr, row, heads, head, i)
    x_base = s * x_sb + first * x_st + head * x_sh
    z_base = s * z_sb + first * z_st + head * z_sh
    B_base = s * B_sb + first * B_st + head // ratio * B_sg
    C_base = s * C_sb + first * C_st + head // ratio * C_sg
    CB = scores(B_ptr, C_ptr, B_base, C_base, i, B_st, C_st, B_sn, C_sn, live, N, TILE_N, STEP)
    weights = tl.where(i[:, None] >= i[None, :], CB * causal_decay(high, low, i) * dt[None, :], 0.0)
    weights = operand(weights, dtype)
    decay = tl.exp2(high + low)
    state = entering_ptr + pid * (P * N)

    for p0 in range(0, P, TILE_P):
        p = p0 + tl.arange(0, TILE_P)
        acc = times_state(C_ptr, C_base, i, C_st, C_sn, live, state, p, P, N, TILE_P, TILE_N, STEP)
        x = tile(x_ptr, x_base, i, x_st, p, x_sp, live, P, STEP)
        y = product(weights, operand(x, dtype), acc * decay[:, None], dtype)
        if D_ptr is not None:
            y += widen(x) * skip_of(D_ptr, head, p, P, D_CHANNELS)[None, :]
        if z_ptr is not None:
            y *= silu(widen(tile(z_ptr, z_base, i, z_st, p, z_sp, live, P, STEP)))
        tl.store(y_row + p[None, :], narrow(y, y_ptr.dtype.element_ty), mask=live[:, None] & (p < P)[None, :])


# ---------------------------------------------------------------- launchers


def limits(dt_min: float, dt_max: float | None) -> tuple[float, float]:
    """The clamp as float32 arguments; a limit beyond their range, as of some models, is none."""
    largest = torch.finfo(torch.float32).max
    return max(dt_min, -largest), float("inf") if dt_max is None or dt_max > largest else dt_max


def entering_dtype(dtype: torch.dtype) -> torch.dtype:
    """What enters a product of bfloat16 tensors is rounded to bfloat16: it is written and read as such."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def chunk_states(x, dt, A, B, bias, lay, indices, dt_softplus, dt_min, dt_max):
    """(time, states): decays and what each chunk adds to the state, the rows of checkpoints included."""
    heads, P, N = *x.shape[-2:], B.shape[-1]
    rows = lay.rows + lay.checkpoints
    time = x.new_empty((rows, heads, 3, CHUNK), dtype=torch.float32)
    states = x.new_empty((rows, heads, P, N), dtype=torch.float32)
    step, options = step_of(x, B), options_of(P, N, config_for(architecture(x), x.dtype, "states"))
    launch(
        _chunk_states_kernel, rows * heads,
        x, dt, A, B, bias, lay.table, indices, time, states, heads, heads // B.shape[-2], lay.length,
        *strides(x, lay.packed, step), *strides(dt, lay.packed)[:3], *strides(B, lay.packed, step),
        *limits(dt_min, dt_max), SOFTPLUS=dt_softplus, STEP=step, **options,
    )  # fmt: skip
    return time, states


def pass_block(size: int) -> int:
    """Elements of a state per program that passes it on."""
    return min(triton.next_power_of_2(max(size, 1)), 1024)


def pass_states(lay, time, states, entering, initial, final, indices=None, has_initial=None, reverse=False, keep=False):
    """Passes the state through the chunks of every sequence: from ``initial`` to ``final``."""
    heads, P, N = states.shape[1:]
    block = pass_block(P * N)
    blocks = triton.cdiv(P * N, block)
    launch(
        _pass_states_kernel, lay.sequences * heads * blocks,
        initial, final, indices, has_initial, lay.first, time, states, entering, heads, triton.cdiv(lay.length, CHUNK),
        *(initial.stride() if initial is not None else (0, 0, 0, 0)),
        *(final.stride() if final is not None else (0, 0, 0, 0)),
        P=P, N=N, BLOCK=block, REVERSE=reverse, KEEP=keep and entering is not states,
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip


def _scan(
    x, dt, A, B, C, D, z, dt_bias, initial, final, cu_seqlens, dt_softplus, dt_min, dt_max,
    indices=None, has_initial=None, checkpoint_tokens=None, checkpoint_indices=None, y_dtype=None,
):  # fmt: skip
    A, D, dt_bias, cu_seqlens, indices, has_initial, checkpoint_tokens, checkpoint_indices = (
        t if t is None else t.contiguous()
        for t in (A, D, dt_bias, cu_seqlens, indices, has_initial, checkpoint_tokens, checkpoint_indices)
    )
    has_initial = None if has_initial is None else has_initial.view(torch.uint8)
    y = x.new_empty(x.shape, dtype=y_dtype or x.dtype)
    heads, P, N = *x.shape[-2:], B.shape[-1]
    with guard(x):
        lay = lay_out(x, cu_seqlens, indices, checkpoint_tokens, checkpoint_indices)
        time, states = chunk_states(x, dt, A, B, dt_bias, lay, indices, dt_softplus, dt_min, dt_max)
        wide = entering_dtype(x.dtype) == torch.float32
        entering = states if wide else torch.empty_like(states, dtype=torch.bfloat16)
        keep = lay.checkpoints > 0
        pass_states(lay, time, states, entering, initial, final, indices, has_initial, keep=keep)
        step, options = step_of(x, B, C, z), options_of(P, N, config_for(architecture(x), x.dtype, "scan"))
        of = [strides(t, lay.packed, step) for t in (x, B, C, z)]
        launch(
            _scan_kernel, lay.rows * heads,
            x, B, C, D, z, y, lay.table, indices, time, entering, heads, heads // B.shape[-2], lay.length,
            *of[0], *of[1], *of[2], *of[3],
            D_CHANNELS=D is not None and D.dim() == 2, STEP=step, **options,
        )  # fmt: skip
        if keep:
            block = pass_block(P * N)
            launch(
                _checkpoint_kernel, lay.checkpoints * heads * triton.cdiv(P * N, block),
                final, checkpoint_indices, lay.table, time, states, heads, lay.rows, *final.stride(),
                P=P, N=N, BLOCK=block, num_warps=4, enable_fp_fusion=False,
            )  # fmt: skip
    return y


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    chunk_size: int = 128,
    dt_softplus: bool = True,
    dt_min: float = 0.0,
    dt_max: float | None = None,
) -> tuple[Tensor, Tensor]:
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    final = x.new_empty((sequences, *x.shape[-2:], B.shape[-1]), dtype=torch.float32)
    inputs = (x, dt, A, B, C, D, z, dt_bias, initial_states)
    return _scan(*inputs, final, cu_seqlens, dt_softplus, dt_min, dt_max), final


def ssd_scan_slots(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    state: Tensor,
    state_indices: Tensor,
    has_initial: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    checkpoint_tokens: Tensor | None = None,
    checkpoint_indices: Tensor | None = None,
    *,
    chunk_size: int = 128,
    dt_softplus: bool = True,
    dt_min: float = 0.0,
    dt_max: float | None = None,
) -> Tensor:
    where = (state_indices, has_initial, cu_seqlens, checkpoint_tokens, checkpoint_indices)
    return scan_slots((x, dt, A, B, C, D, z, dt_bias), state, where, (dt_softplus, dt_min, dt_max), x.dtype)


def scan_slots(operands, state, where, time_step, y_dtype):
    """`ssd_scan_slots` with y in ``y_dtype``; z may differ from x in its dtype."""
    state_indices, has_initial, cu_seqlens, *checkpoints = where
    slots = (state_indices, has_initial, *checkpoints)
    return _scan(*operands, state, state, cu_seqlens, *time_step, *slots, y_dtype)


def compile_cases(arch: int):
    place = {"table_ptr": "i32", "indices_ptr": "i64", "time_ptr": "fp32"}
    for name, dtype, P, N, aligned in CASES:
        step = {"STEP": 8 if aligned else 1}
        pointers = {"x_ptr": "x", "dt_ptr": "x", "A_ptr": "fp32", "B_ptr": "x", "bias_ptr": "fp32", **place,
                    "states_ptr": "fp32"}  # fmt: skip
        options = {"SOFTPLUS": True, **step, **options_of(P, N, config_for(arch, TORCH[dtype], "states"))}
        numbers = (*_STATES_NUMBERS, "dt_min", "dt_max")
        yield case_of(f"scan-states-{name}", _chunk_states_kernel, dtype, numbers, pointers, options)
        pointers = {"x_ptr": "x", "B_ptr": "x", "C_ptr": "x", "D_ptr": "fp32", "z_ptr": "x", "y_ptr": "x", **place,
                    "entering_ptr": "bf16" if dtype == "bf16" else "fp32"}  # fmt: skip
        options = {"D_CHANNELS": True, **step, **options_of(P, N, config_for(arch, TORCH[dtype], "scan"))}
        yield case_of(f"scan-{name}", _scan_kernel, dtype, _SCAN_NUMBERS, pointers, options)

    for state in ("fp32", "bf16"):
        options = {"P": 64, "N": 128, "BLOCK": pass_block(64 * 128), "num_warps": 4, "enable_fp_fusion": False}
        pointers = {"initial_ptr": "x", "final_ptr": "x", "indices_ptr": "i32", "has_initial_ptr": "u8",
                    "first_ptr": "i32", "time_ptr": "fp32", "states_ptr": "fp32", "entering_ptr": "bf16"}  # fmt: skip
        flags = {"REVERSE": False, "KEEP": True, **options}
        yield case_of(f"scan-pass-{state}", _pass_states_kernel, state, _PASS_NUMBERS, pointers, flags)
        pointers = {"state_ptr": "x", "slot_ptr": "i64", "table_ptr": "i32", "time_ptr": "fp32", "states_ptr": "fp32"}
        yield case_of(f"scan-checkpoint-{state}", _checkpoint_kernel, state, _CHECKPOINT_NUMBERS, pointers, options)
