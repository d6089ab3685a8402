"""ssm_update: y_t = S_t C_t + D x_t with S_t = exp(A dt_t) S_{t-1} + dt_t x_t B_t^T, from and to states in slots.

A program carries some rows of one head's state through all tokens in float32 registers: the state is read once and,
unless every token's is wanted, written once. Each step is one fused multiply-add per element in the same code, so that
T tokens give the bits of T calls.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import INTERPRET, Case, device_function, guard, narrow, widen
from .launch import dense, row_length, strides_of
from .numerics import load_state, silu, store_state, time_step
from .slots import ancestors, count_of, source_of

__all__ = ["advance", "block_sizes", "compile_cases", "next_state", "operand_types", "output", "ssm_update", "update"]

# Rows of a state per program, by the columns they have: 2048 elements, 16 for each thread of 4 warps, four of which
# a load of 16 bytes brings. At batch 1 the 64 heads of Nano are 256 such programs for 132 SMs. Not tuned.
ROWS = {16: 128, 32: 64, 64: 32, 128: 16, 256: 8}
WARPS = 4
PIECES = 16  # programs per sequence that copy a state which another sequence is to write
COPY = 2048  # its elements per step


# ---------------------------------------------------------------- one token


@device_function
def read_token(
    x_at, x_step, dt_at, dt_step, b_at, b_step, t, rows, cols, bias, A, dt_min, dt_max,
    SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """x ``[P]``, time step, decay and B ``[N]`` of token t; the pointers are those of token 0, rows and cols masks."""
    t = tl.cast(t, tl.int64)
    x = widen(tl.load(x_at + t * x_step, mask=rows, other=0.0))
    B = widen(tl.load(b_at + t * b_step, mask=cols, other=0.0))
    step = time_step(widen(tl.load(dt_at + t * dt_step)), bias, SOFTPLUS, dt_min, dt_max)
    return x, step, tl.exp(step * A), B


@device_function
def advance(h, x, step, decay, B):
    """The state ``[P, N]`` one token on."""
    return tl.fma(h, tl.broadcast_to(decay, h.shape), (x * step)[:, None] * B[None, :])


@device_function
def output(h, x, c_at, cols, skip, z_ptr, z_at, rows):
    """y ``[P]`` after a token: C, the skip D x and the gate."""
    C = widen(tl.load(c_at, mask=cols, other=0.0))
    y = tl.sum(h * C[None, :], axis=1) + skip * x
    if z_ptr is not None:
        y = y * silu(widen(tl.load(z_at, mask=rows, other=0.0)))
    return y


@device_function
def next_state(
    h, start, parents_ptr, path_ptr, tokens,
    x_at, x_step, dt_at, dt_step, b_at, b_step, t, rows, cols, bias, A, dt_min, dt_max, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """The state after token t, with its x, time step and B; h is the state after token t - 1, start that of the call.

    In a tree of drafts a token that does not go on from the one before it starts again and repeats its path, which
    gives the bits that the path alone would. parents_ptr and path_ptr point to the sequence's, or are None.
    """
    if parents_ptr is not None:
        parent = tl.load(parents_ptr + t)
        if parent != t - 1:
            h = start
            for j in range(parent + 1):
                if tl.load(path_ptr + t * tokens + j) != 0:
                    x, step, decay, B = read_token(
                        x_at, x_step, dt_at, dt_step, b_at, b_step, j, rows, cols, bias, A, dt_min, dt_max, SOFTPLUS
                    )
                    h = advance(h, x, step, decay, B)
    x, step, decay, B = read_token(
        x_at, x_step, dt_at, dt_step, b_at, b_step, t, rows, cols, bias, A, dt_min, dt_max, SOFTPLUS
    )
    return advance(h, x, step, decay, B), x, step, B


# ---------------------------------------------------------------- slots that are read and written in one call


@triton.jit(do_not_specialize=["others", "indices_row", "dst_row", "size"])
def _stage_kernel(
    state_ptr, state_strides, scale_ptr, scale_strides, indices_ptr, indices_row, accepted_ptr, dst_ptr,
    copy_ptr, copy_scale_ptr, copied_ptr,
    others,  # elements of dst
    dst_row, heads, head_dim, d_state,
    size,  # elements of a state
    ROLLBACK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """copied[b]: whether another sequence writes the slot that b reads; then copy[b] is that state.

    Grid (sequences, PIECES). Serving engines give every sequence slots of its own, so hardly a state is copied.
    """
    b = tl.program_id(0).to(tl.int64)
    slot = source_of(b, indices_ptr, indices_row, accepted_ptr, ROLLBACK)
    offs = tl.arange(0, BLOCK)
    hits = 0
    for start in range(0, others, BLOCK):
        i = start + offs
        target = tl.load(dst_ptr + i, mask=i < others, other=-1).to(tl.int64)
        hits += tl.sum(((target == slot) & (i // dst_row != b)).to(tl.int32), axis=0)
    copied = (hits > 0) & (slot >= 0)
    tl.store(copied_ptr + b, copied.to(tl.int32), mask=tl.program_id(1) == 0)
    if copied:
        for start in range(tl.program_id(1) * BLOCK, size, tl.num_programs(1) * BLOCK):
            i = start + offs
            row, n = i // d_state, i % d_state
            h, p = (row // head_dim).to(tl.int64), row % head_dim
            at = slot * state_strides[0] + h * state_strides[1] + p * state_strides[2] + n * state_strides[3]
            tl.store(copy_ptr + b * size + i, tl.load(state_ptr + at, mask=i < size, other=0), mask=i < size)
            if scale_ptr is not None:
                first = (i < size) & (n == 0)
                at = slot * scale_strides[0] + h * scale_strides[1] + p * scale_strides[2]
                scale = tl.load(scale_ptr + at, mask=first, other=0.0)
                tl.store(copy_scale_ptr + b * heads * head_dim + row, scale, mask=first)


# ---------------------------------------------------------------- the update


@triton.jit(do_not_specialize=["tokens", "indices_row", "dst_row"])
def _update_kernel(
    state_ptr, state_strides, scale_ptr, scale_strides,
    copy_ptr, copy_scale_ptr, copied_ptr,  # as _stage_kernel left them, or None
    x_ptr, x_strides, dt_ptr, dt_strides, a_ptr, a_strides, b_ptr, b_strides, c_ptr, c_strides,
    d_ptr, d_strides, z_ptr, z_strides, bias_ptr, bias_strides,
    indices_ptr, indices_row, dst_ptr, dst_row, accepted_ptr, counts_ptr, parents_ptr, path_ptr, seed_ptr, y_ptr,
    tokens, heads, group_heads, head_dim, d_state, dt_min, dt_max,
    SOFTPLUS: tl.constexpr, ROLLBACK: tl.constexpr, PER_TOKEN: tl.constexpr,
    FORMAT: tl.constexpr, SR: tl.constexpr, QUADS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program per (sequence, head, BLOCK_P rows)."""
    pieces = (head_dim + BLOCK_P - 1) // BLOCK_P
    pid = tl.program_id(0)
    h_index = (pid // pieces % heads).to(tl.int64)
    b = (pid // pieces // heads).to(tl.int64)
    p = (pid % pieces * BLOCK_P + tl.arange(0, BLOCK_P)).to(tl.int64)
    n = tl.arange(0, BLOCK_N).to(tl.int64)
    rows, cols = p < head_dim, n < d_state

    slot = source_of(b, indices_ptr, indices_row, accepted_ptr, ROLLBACK)
    count = count_of(b, slot, counts_ptr, tokens)
    within = h_index * state_strides[1] + p[:, None] * state_strides[2] + n[None, :] * state_strides[3]
    scale_within = h_index * scale_strides[1] + p * scale_strides[2]
    copied = 0
    if copied_ptr is not None:
        copied = tl.load(copied_ptr + b)
    here = p < tl.where((slot >= 0) & (copied == 0), head_dim, 0)
    scale = tl.full((BLOCK_P,), 0.0, tl.float32)
    if scale_ptr is not None:
        scale += tl.load(scale_ptr + slot * scale_strides[0] + scale_within, mask=here, other=0.0)
    h = load_state(state_ptr, slot * state_strides[0] + within, here[:, None] & cols[None, :], scale, FORMAT)
    if copied_ptr is not None:
        there = p < tl.where(copied != 0, head_dim, 0)
        row = (b * heads + h_index) * head_dim + p
        if scale_ptr is not None:
            scale += tl.load(copy_scale_ptr + row, mask=there, other=0.0)
        at = row[:, None] * d_state + n[None, :]
        h = tl.where(copied != 0, load_state(copy_ptr, at, there[:, None] & cols[None, :], scale, FORMAT), h)
    tl.debug_barrier()  # all threads have read before one writes
    start = h

    g = h_index // group_heads
    x_at = x_ptr + b * x_strides[0] + h_index * x_strides[2] + p * x_strides[3]
    z_at = x_at
    if z_ptr is not None:
        z_at = z_ptr + b * z_strides[0] + h_index * z_strides[2] + p * z_strides[3]
    b_at = b_ptr + b * b_strides[0] + g * b_strides[2] + n * b_strides[3]
    c_at = c_ptr + b * c_strides[0] + g * c_strides[2] + n * c_strides[3]
    dt_at = dt_ptr + b * dt_strides[0] + h_index * dt_strides[2]
    A = widen(tl.load(a_ptr + h_index * a_strides[0]))
    bias = 0.0
    if bias_ptr is not None:
        bias = widen(tl.load(bias_ptr + h_index * bias_strides[0]))
    skip = tl.full((BLOCK_P,), 0.0, tl.float32)
    if d_ptr is not None:
        skip += widen(tl.load(d_ptr + h_index * d_strides[0] + p * d_strides[1], mask=rows, other=0.0))
    row_element = ((slot * 0 + h_index) * head_dim + p) * d_state  # of slot 0; the slot written is added
    slot_size = h_index * 0 + heads * head_dim * d_state

    if parents_ptr is not None:
        parents_ptr += b * tokens
        path_ptr += b * tokens * tokens
    for t in range(tokens):
        y = tl.full((BLOCK_P,), 0.0, tl.float32)
        if t < count:
            h, x, step, B = next_state(
                h, start, parents_ptr, path_ptr, tokens, x_at, x_strides[1], dt_at, dt_strides[1], b_at, b_strides[1],
                t, rows, cols, bias, A, dt_min, dt_max, SOFTPLUS,
            )  # fmt: skip
            t_wide = tl.cast(t, tl.int64)
            y = output(h, x, c_at + t_wide * c_strides[1], cols, skip, z_ptr, z_at + t_wide * z_strides[1], rows)
            if PER_TOKEN:
                target = tl.load(dst_ptr + b * dst_row + t).to(tl.int64)
                kept = p < tl.where(target >= 0, head_dim, 0)
                store_state(
                    state_ptr, scale_ptr, target * state_strides[0] + within, kept[:, None] & cols[None, :],
                    target * scale_strides[0] + scale_within, kept, h, seed_ptr, t,
                    target * slot_size + row_element, FORMAT, SR, QUADS,
                )  # fmt: skip
        y_at = y_ptr + ((b * tokens + t) * heads + h_index) * head_dim + p
        tl.store(y_at, narrow(y, y_ptr.dtype.element_ty), mask=rows)

    if not PER_TOKEN:
        target = slot
        if dst_ptr is not None:
            target = tl.where(slot >= 0, tl.load(dst_ptr + b * dst_row).to(tl.int64), -1)
        kept = p < tl.where(target >= 0, head_dim, 0)
        store_state(
            state_ptr, scale_ptr, target * state_strides[0] + within, kept[:, None] & cols[None, :],
            target * scale_strides[0] + scale_within, kept, h, seed_ptr, tl.maximum(count - 1, 0),
            target * slot_size + row_element, FORMAT, SR, QUADS,
        )  # fmt: skip


# ---------------------------------------------------------------- launchers


def block_sizes(head_dim: int, d_state: int) -> dict[str, int]:
    """The tile of a state that one program carries."""
    block_n = max(triton.next_power_of_2(d_state), 16)
    most = max(triton.next_power_of_2(head_dim), 1)
    rows = most if INTERPRET else min(ROWS.get(block_n, max(2048 // block_n, 1)), most)
    return {"BLOCK_P": rows, "BLOCK_N": block_n}


def ssm_update(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None,
    z: Tensor | None = None, dt_bias: Tensor | None = None, state_indices: Tensor | None = None,
    dst_state_indices: Tensor | None = None, *, num_accepted: Tensor | None = None, num_tokens: Tensor | None = None,
    parents: Tensor | None = None, state_scale: Tensor | None = None, seed: Tensor | None = None,
    rounding: str = "nearest", dt_softplus: bool = True, dt_min: float = 0.0, dt_max: float | None = None,
) -> Tensor:  # fmt: skip
    indices = (state_indices, dst_state_indices, num_accepted, num_tokens, parents)
    options = (state_scale, seed, rounding, dt_softplus, dt_min, dt_max)
    return update(state, (x, dt, A, B, C, D, z, dt_bias), indices, options, x.dtype)


FORMATS = {torch.int8: "int8", torch.float8_e4m3fn: "e4m3"}


def update(state: Tensor, operands: tuple, indices: tuple, options: tuple, dtype: torch.dtype) -> Tensor:
    """`ssm_update` with y in ``dtype``; x, B, C and z may differ in theirs."""
    x, dt, A, B, C, D, z, dt_bias = operands
    source, dst, accepted, counts, parents = (dense(t) for t in indices)
    scale, seed, rounding, dt_softplus, dt_min, dt_max = options
    seed = dense(seed)
    y = x.new_empty(x.shape, dtype=dtype)
    if x.dim() == 3:
        x, dt, B, C, z = (t if t is None else t[:, None] for t in (x, dt, B, C, z))
    (batch, tokens, heads, head_dim), d_state = x.shape, B.shape[3]
    if batch * heads * head_dim == 0:
        return y
    form = FORMATS.get(state.dtype, "float")
    if form == "e4m3":
        state = state.view(torch.uint8)
    rollback = source is not None and source.dim() == 2
    stochastic = rounding == "stochastic" and state.dtype != torch.float32
    sizes = block_sizes(head_dim, d_state)
    copy, copy_scale, copied = (None, None, None)
    with guard(x):
        if dst is not None and batch > 1 and dst.numel():
            copy, copy_scale, copied = _stage(state, scale, source, accepted, dst, rollback, batch)
        path = None if parents is None else ancestors(parents, counts)
        programs = batch * heads * triton.cdiv(head_dim, sizes["BLOCK_P"])
        _update_kernel[(programs,)](
            state, state.stride(), scale, strides_of(scale, 3), copy, copy_scale, copied,
            x, x.stride(), dt, dt.stride(), A, A.stride(), B, B.stride(), C, C.stride(),
            D, (1, 1) if D is None else (*D.stride(), 0)[:2], z, strides_of(z, 4), dt_bias, strides_of(dt_bias, 1),
            source, row_length(source), dst, row_length(dst), accepted, counts, parents, path, seed, y,
            tokens, heads, heads // B.shape[2], head_dim, d_state, dt_min, float("inf") if dt_max is None else dt_max,
            SOFTPLUS=dt_softplus, ROLLBACK=rollback, PER_TOKEN=dst is not None and dst.dim() == 2,
            FORMAT=form, SR=stochastic, QUADS=d_state % 4 == 0, num_warps=WARPS, enable_fp_fusion=False, **sizes,
        )  # fmt: skip
    return y


def _stage(
    state: Tensor, scale: Tensor | None, source: Tensor | None, accepted: Tensor | None, dst: Tensor, rollback: bool,
    batch: int,
) -> tuple[Tensor, Tensor | None, Tensor]:  # fmt: skip
    copy = state.new_empty(batch, *state.shape[1:])
    copy_scale = None if scale is None else scale.new_empty(batch, *scale.shape[1:])
    copied = dst.new_empty(batch, dtype=torch.int32)
    _, heads, head_dim, d_state = state.shape
    _stage_kernel[batch, PIECES](
        state, state.stride(), scale, strides_of(scale, 3), source, row_length(source), accepted, dst,
        copy, copy_scale, copied, dst.numel(), row_length(dst), heads, head_dim, d_state, heads * head_dim * d_state,
        ROLLBACK=rollback, BLOCK=COPY, num_warps=WARPS, enable_fp_fusion=False,
    )  # fmt: skip
    return copy, copy_scale, copied


# ---------------------------------------------------------------- compilation without a GPU


def operand_types(dtype: str) -> dict[str, object]:
    """Types of what update and replay have in common, in the layout of one projection."""
    wide = ("i32:16", "i32:16", "i32:16", 1)
    types = {f"{t}_ptr": f"*{dtype}" for t in ("x", "b", "c", "z", "y", "dt")}
    types |= {f"{t}_strides": wide for t in ("state", "x", "b", "c", "z")}
    types |= {f"{t}_ptr": "*fp32" for t in ("a", "d", "bias")}
    types |= {"a_strides": (1,), "bias_strides": (1,), "d_strides": (1, "i32:16")}
    types |= {"dt_strides": ("i32:16", "i32:16", 1)}
    types |= {name: "i32" for name in ("tokens", "heads", "group_heads", "indices_row", "dst_row")}
    return types | {"head_dim": "i32:16", "d_state": "i32:16", "dt_min": "fp32", "dt_max": "fp32"}


def compile_cases(arch: int):
    every = ("scale", "copy", "copy_scale", "copied", "indices", "dst", "accepted", "counts", "parents", "path", "seed")
    staged = {"indices": "*i32", "dst": "*i32", "copied": "*i32"}
    forms = {  # name: dtype of x, dtype of the state, optional operands, head_dim, d_state
        "fp32": ("fp32", "fp32", {}, 64, 128),
        "fp16": ("fp16", "fp16", {}, 80, 128),
        "bf16": ("bf16", "bf16", {"indices": "*i32"}, 64, 96),
        "wide": ("bf16", "fp32", {"indices": "*i32"}, 64, 256),
        "narrow": ("bf16", "fp32", {"indices": "*i32"}, 64, 64),
        "nano": ("bf16", "fp32", {"indices": "*i32"}, 64, 128),
        "stochastic-fp16": ("bf16", "fp16", {"indices": "*i64", "seed": "*i64"}, 64, 128),
        "stochastic-bf16": ("bf16", "bf16", {"indices": "*i64", "seed": "*i64"}, 64, 128),
        "rollback": ("bf16", "fp32", {**staged, "copy": "*fp32", "accepted": "*i32", "counts": "*i32"}, 64, 128),
        "tree": ("bf16", "fp16", {**staged, "copy": "*fp16", "parents": "*i32", "path": "*i8"}, 64, 128),
    }
    for code, form in (("i8", "int8"), ("u8", "e4m3")):
        scaled = {"scale": "*fp32", "indices": "*i32"}
        forms[form] = ("bf16", code, scaled, 64, 128)
        forms[f"stochastic-{form}"] = ("bf16", code, {**scaled, "seed": "*i64"}, 64, 128)
    forms["rollback-int8"] = ("bf16", "i8", {**staged, **scaled, "copy": "*i8", "copy_scale": "*fp32"}, 64, 128)
    for name, (dtype, state, given, head_dim, d_state) in forms.items():
        types = operand_types(dtype) | {"state_ptr": f"*{state}", "scale_strides": ("i32:16", "i32:16", 1)}
        types |= {f"{t}_ptr": type for t, type in given.items()} | {"others": "i32", "size": "i32"}
        flags = {f"{t}_ptr": None for t in every if t not in given}
        flags |= {"SOFTPLUS": True, "ROLLBACK": "accepted" in given, "PER_TOKEN": "dst" in given, "SR": "seed" in given}
        flags |= {"FORMAT": {"i8": "int8", "u8": "e4m3"}.get(state, "float"), "QUADS": True, "BLOCK": COPY}
        flags |= block_sizes(head_dim, d_state)
        for kernel in (_update_kernel, _stage_kernel) if "copy" in given else (_update_kernel,):
            names = kernel.arg_names
            yield Case(
                f"ssm{kernel.__name__.removesuffix('_kernel')}-{name}", kernel,
                {name: t for name, t in types.items() if name in names},
                {name: value for name, value in flags.items() if name in names},
                {"num_warps": WARPS, "enable_fp_fusion": False},
            )  # fmt: skip
