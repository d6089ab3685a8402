"""Gradients of ssd_scan by recomputation: only its inputs are kept.

Forward's first two kernels give the state H that enters each chunk. The same two, on C and the output gradients and
from the last chunk to the first, give the gradient J of the state that leaves it. Then every chunk is on its own:

    L_ij = decay of tokens j + 1 to i, e_i = decay up to i, f_j = decay behind j, dy = the gradient before the gate
    u_j = sum_i (C_i . B_j) L_ij dy_i + f_j J B_j         dx_j = dt_j u_j + D dy_j
    R_ij = L_ij dt_j (dy_i . x_j)                         dC_i = sum_j R_ij B_j + e_i H^T dy_i
    W_ij = (C_i . B_j) R_ij                               dB_j = sum_i R_ij C_i + dt_j f_j J^T x_j
    da_t = sum_{i >= t > j} W_ij + sum_{i >= t} e_i dy_i . H C_i + sum_{j < t} dt_j f_j x_j . J B_j + e_Q <J, H>

with da the gradient of the log decay A dt_t of one token: sums of everything that straddles it, without a subtraction.
Sums over heads, tokens and chunks have a fixed order, and no atomic addition: the same bits in every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import architecture, guard, narrow, widen
from .numerics import sigmoid, time_step
from .ssd_scan import chunk_states, entering_dtype, limits, pass_states, scores, skip_of, times_state
from .ssd_scan_plan import (
    CASES,
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
    step_of,
    strides,
    tile,
    tokens_of,
)

__all__ = ["compile_cases", "ssd_scan_bwd"]


@triton.jit
def _before_gate(g_ptr, g_base, g_st, g_sp, z_ptr, z_base, z_st, z_sp, i, p, live, P: tl.constexpr, STEP: tl.constexpr):
    """The gradient of y before the gate: g silu(z)."""
    g = widen(tile(g_ptr, g_base, i, g_st, p, g_sp, live, P, STEP))
    if z_ptr is not None:
        z = widen(tile(z_ptr, z_base, i, z_st, p, z_sp, live, P, STEP))
        g = g * (z * sigmoid(z))
    return g


@triton.jit
def _pairs(g_ptr, g_base, g_st, g_sp, x_ptr, x_base, x_st, x_sp, z_ptr, z_base, z_st, z_sp, i, live,
           P: tl.constexpr, TILE_P: tl.constexpr, STEP: tl.constexpr):  # fmt: skip
    """dy_i . x_j"""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    acc = tl.zeros((Q, Q), tl.float32)
    for p0 in range(0, P, TILE_P):
        p = p0 + tl.arange(0, TILE_P)
        dy = _before_gate(g_ptr, g_base, g_st, g_sp, z_ptr, z_base, z_st, z_sp, i, p, live, P, STEP)
        x = tile(x_ptr, x_base, i, x_st, p, x_sp, live, P, STEP)
        acc = product(operand(dy, dtype), tl.trans(operand(x, dtype)), acc, dtype)
    return acc


@triton.jit
def _factors(time_ptr, row, heads, head, i):
    """(dt, the two parts of the summed log decays, e, f, the decay of the whole chunk)"""
    dt, high, low = load_time(time_ptr, row, heads, head, i)
    end = time_ptr + (row * heads + head) * 3 * Q + Q - 1
    high_end, low_end = tl.load(end + Q), tl.load(end + 2 * Q)
    behind = tl.exp2((high_end - high) + (low_end - low))
    return dt, high, low, tl.exp2(high + low), behind, tl.exp2(high_end + low_end)


# ---------------------------------------------------------------- what a chunk adds to the gradient of its state

_OUT_NUMBERS = ["heads", "ratio", "length", "g_sb", "g_st", "g_sh", "g_sp", "z_sb", "z_st", "z_sh", "z_sp",
                "C_sb", "C_st", "C_sg", "C_sn"]  # fmt: skip


@triton.jit(do_not_specialize=_OUT_NUMBERS)
def _state_grads_kernel(
    g_ptr, z_ptr, C_ptr, table_ptr, time_ptr,
    states_ptr,  # [rows, heads, P, N]
    heads, ratio, length,
    g_sb, g_st, g_sh, g_sp, z_sb, z_st, z_sh, z_sp, C_sb, C_st, C_sg, C_sn,
    P: tl.constexpr, N: tl.constexpr, TILE_P: tl.constexpr, TILE_N: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Grid rows * heads, heads first: sum_i C_i (e_i dy_i)^T, as [N, P]."""
    pid = tl.program_id(0).to(tl.int64)  # int64: rows * heads * P * N and tokens * stride pass 2^31
    row, head = pid // heads, pid % heads
    s, first, count, chunk = tokens_of(row, table_ptr, None, length)
    if chunk < 0:
        return
    i = tl.arange(0, Q)
    live = i < count
    _, high, low = load_time(time_ptr, row, heads, head, i)
    decay = tl.exp2(high + low)
    dtype: tl.constexpr = C_ptr.dtype.element_ty
    g_base = s * g_sb + first * g_st + head * g_sh
    z_base = s * z_sb + first * z_st + head * z_sh
    C_base = s * C_sb + first * C_st + head // ratio * C_sg
    for p0 in range(0, P, TILE_P):
        p = p0 + tl.arange(0, TILE_P)
        dy = _before_gate(g_ptr, g_base, g_st, g_sp, z_ptr, z_base, z_st, z_sp, i, p, live, P, STEP)
        dy = operand(dy * decay[:, None], dtype)
        for n0 in range(0, N, TILE_N):
            n = n0 + tl.arange(0, TILE_N)
            C = operand(tile(C_ptr, C_base, i, C_st, n, C_sn, live, N, STEP), dtype)
            added = product(tl.trans(C), dy, tl.zeros((TILE_N, TILE_P), tl.float32), dtype)
            at = states_ptr + pid * (P * N) + p[None, :] * N + n[:, None]
            tl.store(at, added, mask=(n < N)[:, None] & (p < P)[None, :])


# ---------------------------------------------------------------- x, dt, z, and what A, D and dt_bias sum

_HEAD_NUMBERS = ["heads", "ratio", "length", "g_sb", "g_st", "g_sh", "g_sp", "x_sb", "x_st", "x_sh", "x_sp",
                 "dt_sb", "dt_st", "dt_sh", "B_sb", "B_st", "B_sg", "B_sn", "C_sb", "C_st", "C_sg", "C_sn",
                 "z_sb", "z_st", "z_sh", "z_sp"]  # fmt: skip


@triton.jit(do_not_specialize=_HEAD_NUMBERS)
def _head_grads_kernel(
    g_ptr, x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, table_ptr, time_ptr,
    entering_ptr, leaving_ptr,  # [rows, heads, P, N]: H and J
    dx_ptr, ddt_ptr, dz_ptr,  # contiguous
    dA_ptr, dbias_ptr,  # [rows, heads]: partial sums
    dD_ptr,  # [rows, heads, P], or None
    heads, ratio, length,
    g_sb, g_st, g_sh, g_sp, x_sb, x_st, x_sh, x_sp, dt_sb, dt_st, dt_sh,
    B_sb, B_st, B_sg, B_sn, C_sb, C_st, C_sg, C_sn, z_sb, z_st, z_sh, z_sp,
    dt_min, dt_max,
    SOFTPLUS: tl.constexpr, D_CHANNELS: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    TILE_P: tl.constexpr, TILE_N: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Grid rows * heads, heads first. Everything of one head in one chunk; names as in the header of this file."""
    pid = tl.program_id(0).to(tl.int64)  # int64: as above
    row, head = pid // heads, pid % heads
    s, first, count, chunk = tokens_of(row, table_ptr, None, length)
    i = tl.arange(0, Q)
    live = i < count
    out = (s * length + first + i) * heads + head
    if chunk < 0:
        tl.store(ddt_ptr + out, narrow(tl.zeros((Q,), tl.float32), ddt_ptr.dtype.element_ty), mask=live)
        tl.store(dA_ptr + pid, 0.0)
        tl.store(dbias_ptr + pid, 0.0)
        for p0 in range(0, P, TILE_P):
            p = p0 + tl.arange(0, TILE_P)
            nothing = narrow(tl.zeros((Q, TILE_P), tl.float32), dx_ptr.dtype.element_ty)
            tl.store(dx_ptr + out[:, None] * P + p[None, :], nothing, mask=live[:, None] & (p < P)[None, :])
            if z_ptr is not None:
                tl.store(dz_ptr + out[:, None] * P + p[None, :], nothing, mask=live[:, None] & (p < P)[None, :])
            if dD_ptr is not None:
                tl.store(dD_ptr + pid * P + p, tl.zeros((TILE_P,), tl.float32), mask=p < P)
        return

    dtype: tl.constexpr = x_ptr.dtype.element_ty
    dt, high, low, before, behind, whole = _factors(time_ptr, row, heads, head, i)
    g_base = s * g_sb + first * g_st + head * g_sh
    x_base = s * x_sb + first * x_st + head * x_sh
    z_base = s * z_sb + first * z_st + head * z_sh
    B_base = s * B_sb + first * B_st + head // ratio * B_sg
    C_base = s * C_sb + first * C_st + head // ratio * C_sg
    CB = scores(B_ptr, C_ptr, B_base, C_base, i, B_st, C_st, B_sn, C_sn, live, N, TILE_N, STEP)
    M = tl.where(i[:, None] >= i[None, :], CB * causal_decay(high, low, i), 0.0)
    transposed, weights = operand(tl.trans(M), dtype), operand(M * dt[None, :], dtype)
    H, J = entering_ptr + pid * (P * N), leaving_ptr + pid * (P * N)

    xu = tl.zeros((Q,), tl.float32)
    from_start = tl.zeros((Q,), tl.float32)  # dy_i . H C_i
    to_end = tl.zeros((Q,), tl.float32)  # x_j . J B_j
    for p0 in range(0, P, TILE_P):
        p = p0 + tl.arange(0, TILE_P)
        mask = live[:, None] & (p < P)[None, :]
        to = out[:, None] * P + p[None, :]
        raw = tile(x_ptr, x_base, i, x_st, p, x_sp, live, P, STEP)
        x = widen(raw)
        g = widen(tile(g_ptr, g_base, i, g_st, p, g_sp, live, P, STEP))
        carried = times_state(C_ptr, C_base, i, C_st, C_sn, live, H, p, P, N, TILE_P, TILE_N, STEP)
        skip = tl.zeros((TILE_P,), tl.float32)
        if D_ptr is not None:
            skip = skip_of(D_ptr, head, p, P, D_CHANNELS)
        dy = g
        if z_ptr is not None:
            z = widen(tile(z_ptr, z_base, i, z_st, p, z_sp, live, P, STEP))
            y = product(weights, operand(raw, dtype), carried * before[:, None], dtype)
            y += x * skip[None, :]
            sig = sigmoid(z)
            tl.store(dz_ptr + to, narrow(g * y * sig * (1.0 + z * (1.0 - sig)), dz_ptr.dtype.element_ty), mask=mask)
            dy = g * (z * sig)
        pulled = times_state(B_ptr, B_base, i, B_st, B_sn, live, J, p, P, N, TILE_P, TILE_N, STEP)
        u = product(transposed, operand(dy, dtype), pulled * behind[:, None], dtype)
        dx = u * dt[:, None] + dy * skip[None, :]
        tl.store(dx_ptr + to, narrow(dx, dx_ptr.dtype.element_ty), mask=mask)
        if dD_ptr is not None:
            tl.store(dD_ptr + pid * P + p, tl.sum(dy * x, axis=0), mask=p < P)
        xu += tl.sum(x * u, axis=1)
        from_start += tl.sum(dy * carried, axis=1)
        to_end += tl.sum(x * pulled, axis=1)

    BLOCK: tl.constexpr = 2048
    JH = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, P * N, BLOCK):
        e = start + tl.arange(0, BLOCK)
        JH += widen(tl.load(J + e, mask=e < P * N, other=0.0)) * widen(tl.load(H + e, mask=e < P * N, other=0.0))

    # C_i . B_j is computed a second time: kept through the loop above, it would push that into local memory.
    W = _pairs(
        g_ptr, g_base, g_st, g_sp, x_ptr, x_base, x_st, x_sp, z_ptr, z_base, z_st, z_sp, i, live, P, TILE_P, STEP
    )  # fmt: skip
    W *= scores(B_ptr, C_ptr, B_base, C_base, i, B_st, C_st, B_sn, C_sn, live, N, TILE_N, STEP)
    W = tl.where(i[:, None] >= i[None, :], W * causal_decay(high, low, i) * dt[None, :], 0.0)
    # Of a pair (i, j), decayed over tokens j + 1 to i: the sum up to column k of the rows below it is what straddles
    # token k + 1, to which the selection moves it.
    straddling = tl.sum(tl.where(i[:, None] > i[None, :], tl.cumsum(W, axis=1), 0.0), axis=0)
    straddling += tl.cumsum(dt * behind * to_end)
    moved = tl.sum(tl.where(i[:, None] == i[None, :] + 1, straddling[None, :], 0.0), axis=1)
    da = moved + tl.cumsum(before * from_start, reverse=True) + whole * tl.sum(JH)

    ddt = xu + widen(tl.load(A_ptr + head)) * da
    tl.store(dA_ptr + pid, tl.sum(tl.where(live, dt * da, 0.0)))
    v = widen(tl.load(dt_ptr + s * dt_sb + (first + i) * dt_st + head * dt_sh, mask=live, other=0.0))
    if bias_ptr is not None:
        v += widen(tl.load(bias_ptr + head))
    unclamped = time_step(v, 0.0, SOFTPLUS, float("-inf"), float("inf"))
    ddt = tl.where((unclamped < dt_min) | (unclamped > dt_max) | (i >= count), 0.0, ddt)
    if SOFTPLUS:
        ddt = tl.where(v > 20.0, ddt, ddt * sigmoid(v))
    tl.store(ddt_ptr + out, narrow(ddt, ddt_ptr.dtype.element_ty), mask=live)
    tl.store(dbias_ptr + pid, tl.sum(ddt))


# ---------------------------------------------------------------- B and C, which the heads of a group share

_GROUP_NUMBERS = ["groups", "ratio", "length", "g_sb", "g_st", "g_sh", "g_sp", "x_sb", "x_st", "x_sh", "x_sp",
                  "B_sb", "B_st", "B_sg", "B_sn", "C_sb", "C_st", "C_sg", "C_sn",
                  "z_sb", "z_st", "z_sh", "z_sp"]  # fmt: skip


@triton.jit(do_not_specialize=_GROUP_NUMBERS)
def _group_grads_kernel(
    g_ptr, x_ptr, B_ptr, C_ptr, z_ptr, table_ptr, time_ptr,
    entering_ptr, leaving_ptr,  # [rows, heads, P, N]: H and J
    dB_ptr, dC_ptr,  # contiguous
    groups, ratio, length,
    g_sb, g_st, g_sh, g_sp, x_sb, x_st, x_sh, x_sp, B_sb, B_st, B_sg, B_sn, C_sb, C_st, C_sg, C_sn,
    z_sb, z_st, z_sh, z_sp,
    P: tl.constexpr, N: tl.constexpr, TILE_P: tl.constexpr, TILE_N: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Grid rows * groups * tiles of N. The heads of the group one after the other: their sum needs no partial sums,
    and R, summed over them, meets B and C once."""
    TILES: tl.constexpr = tl.cdiv(N, TILE_N)
    pid = tl.program_id(0).to(tl.int64)  # int64: as above
    row, group = pid // TILES // groups, pid // TILES % groups
    n = (pid % TILES).to(tl.int32) * TILE_N + tl.arange(0, TILE_N)
    s, first, count, chunk = tokens_of(row, table_ptr, None, length)
    i = tl.arange(0, Q)
    live = i < count
    to = ((s * length + first + i) * groups + group)[:, None] * N + n[None, :]
    mask = live[:, None] & (n < N)[None, :]
    dB, dC = tl.zeros((Q, TILE_N), tl.float32), tl.zeros((Q, TILE_N), tl.float32)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    if chunk >= 0:
        heads = groups * ratio
        R = tl.zeros((Q, Q), tl.float32)
        for h in range(ratio):
            head = group * ratio + h
            dt, high, low, before, behind, _ = _factors(time_ptr, row, heads, head, i)
            g_base = s * g_sb + first * g_st + head * g_sh
            x_base = s * x_sb + first * x_st + head * x_sh
            z_base = s * z_sb + first * z_st + head * z_sh
            state = (row * heads + head) * (P * N)
            dyx = tl.zeros((Q, Q), tl.float32)
            for p0 in range(0, P, TILE_P):
                p = p0 + tl.arange(0, TILE_P)
                raw = tile(x_ptr, x_base, i, x_st, p, x_sp, live, P, STEP)
                dy = _before_gate(g_ptr, g_base, g_st, g_sp, z_ptr, z_base, z_st, z_sp, i, p, live, P, STEP)
                dyx = product(operand(dy, dtype), tl.trans(operand(raw, dtype)), dyx, dtype)
                at = state + p[:, None] * N + n[None, :]
                there = (p < P)[:, None] & (n < N)[None, :]
                H = operand(tl.load(entering_ptr + at, mask=there, other=0.0), dtype)
                dC = product(operand(dy * before[:, None], dtype), H, dC, dtype)
                J = operand(tl.load(leaving_ptr + at, mask=there, other=0.0), dtype)
                dB = product(operand(widen(raw) * (dt * behind)[:, None], dtype), J, dB, dtype)
            L = causal_decay(high, low, i)
            R += tl.where(i[:, None] >= i[None, :], L * dt[None, :] * dyx, 0.0)
        B_base = s * B_sb + first * B_st + group * B_sg
        C_base = s * C_sb + first * C_st + group * C_sg
        B = operand(tile(B_ptr, B_base, i, B_st, n, B_sn, live, N, STEP), dtype)
        dC = product(operand(R, dtype), B, dC, dtype)
        C = operand(tile(C_ptr, C_base, i, C_st, n, C_sn, live, N, STEP), dtype)
        dB = product(operand(tl.trans(R), dtype), C, dB, dtype)
    tl.store(dB_ptr + to, narrow(dB, dB_ptr.dtype.element_ty), mask=mask)
    tl.store(dC_ptr + to, narrow(dC, dC_ptr.dtype.element_ty), mask=mask)


# ---------------------------------------------------------------- launcher


def ssd_scan_bwd(
    grad_y: Tensor,
    grad_final_states: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_states: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_size: int,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float | None,
) -> tuple[Tensor, ...]:
    A, D, dt_bias, cu_seqlens = (t if t is None else t.contiguous() for t in (A, D, dt_bias, cu_seqlens))
    inputs = (x, dt, A, B, C, D, z, dt_bias, initial_states)
    like = [x.new_empty(0) if t is None else torch.empty_like(t, memory_format=torch.contiguous_format) for t in inputs]
    dx, ddt, _, dB, dC, _, dz, _, grad_initial = like
    heads, P, groups, N = *x.shape[-2:], *B.shape[-2:]
    step = step_of(grad_y, x, B, C, z)
    names = ("states", "head_grads", "group_grads")
    of_states, of_head, of_group = (options_of(P, N, config_for(architecture(x), x.dtype, name)) for name in names)
    with guard(x):
        lay = lay_out(x, cu_seqlens, None, None, None)
        of_g, of_x, of_B, of_C, of_z = (strides(t, lay.packed, step) for t in (grad_y, x, B, C, z))
        time, sums = chunk_states(x, dt, A, B, dt_bias, lay, None, dt_softplus, dt_min, dt_max)
        entering, leaving = (torch.empty_like(sums, dtype=entering_dtype(x.dtype)) for _ in range(2))
        pass_states(lay, time, sums, entering, initial_states, None)
        launch(
            _state_grads_kernel, lay.rows * heads,
            grad_y, z, C, lay.table, time, sums, heads, heads // groups, lay.length, *of_g, *of_z, *of_C,
            STEP=step, **of_states,
        )  # fmt: skip
        pass_states(lay, time, sums, leaving, grad_final_states, None if initial_states is None else grad_initial,
                    reverse=True)  # fmt: skip
        dA, dbias = x.new_empty((2, lay.rows, heads), dtype=torch.float32)
        dD = None if D is None else x.new_empty((lay.rows, heads, P), dtype=torch.float32)
        launch(
            _head_grads_kernel, lay.rows * heads,
            grad_y, x, dt, A, B, C, D, z, dt_bias, lay.table, time, entering, leaving, dx, ddt, dz, dA, dbias, dD,
            heads, heads // groups, lay.length, *of_g, *of_x, *strides(dt, lay.packed)[:3], *of_B, *of_C, *of_z,
            *limits(dt_min, dt_max), SOFTPLUS=dt_softplus, D_CHANNELS=D is not None and D.dim() == 2, STEP=step,
            **of_head,
        )  # fmt: skip
        launch(
            _group_grads_kernel, lay.rows * groups * triton.cdiv(N, of_group["TILE_N"]),
            grad_y, x, B, C, z, lay.table, time, entering, leaving, dB, dC,
            groups, heads // groups, lay.length, *of_g, *of_x, *of_B, *of_C, *of_z,
            STEP=step, **of_group,
        )  # fmt: skip
        like[2] = dA.sum(0).to(A.dtype)
        if D is not None:
            like[5] = dD.sum((0, 2) if D.dim() == 1 else 0).to(D.dtype)
        if dt_bias is not None:
            like[7] = dbias.sum(0).to(dt_bias.dtype)
    return tuple(like)


def compile_cases(arch: int):
    place = {"table_ptr": "i32", "time_ptr": "fp32"}
    given = {"g_ptr": "x", "x_ptr": "x", "B_ptr": "x", "C_ptr": "x", "z_ptr": "x", **place}
    small = {"dt_ptr": "x", "A_ptr": "fp32", "D_ptr": "fp32", "bias_ptr": "fp32"}
    sums = {"dA_ptr": "fp32", "dbias_ptr": "fp32", "dD_ptr": "fp32"}
    for name, dtype, P, N, aligned in CASES:
        states = dict.fromkeys(("entering_ptr", "leaving_ptr"), "bf16" if dtype == "bf16" else "fp32")
        of_head = {**given, **small, **states, **sums, "dx_ptr": "x", "ddt_ptr": "x", "dz_ptr": "x"}
        flags = {"SOFTPLUS": True, "D_CHANNELS": True}
        for kernel, function, numbers, pointers, chosen in (
            ("states", _state_grads_kernel, _OUT_NUMBERS, {"g_ptr": "x", "z_ptr": "x", "C_ptr": "x", **place,
                                                           "states_ptr": "fp32"}, {}),
            ("head_grads", _head_grads_kernel, (*_HEAD_NUMBERS, "dt_min", "dt_max"), of_head, flags),
            ("group_grads", _group_grads_kernel, _GROUP_NUMBERS, {**given, **states, "dB_ptr": "x", "dC_ptr": "x"}, {}),
        ):  # fmt: skip
            config = config_for(arch, TORCH[dtype], kernel)
            options = {**chosen, "STEP": 8 if aligned else 1, **options_of(P, N, config)}
            yield case_of(f"scan-bwd-{kernel}-{name}", function, dtype, numbers, pointers, options)
