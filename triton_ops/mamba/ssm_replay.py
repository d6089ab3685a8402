"""ssm_replay_*: ssm_update on a state that lags behind: the tokens since are kept in a ring and replayed at each call.

A state is read at every call, but written only when the ring is full. A program rebuilds its rows of the state in
registers, entry by entry in float32 as ssm_update would have carried them, so that with a ring in the dtype of x the
outputs have the bits of step-by-step updates of an unrounded state. 16 entries cost 16 fused multiply-adds for each
element of the state; the memory system of an H100 leaves time for about 40.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import Case, device_function, guard, narrow, widen
from .launch import dense, strides_of
from .numerics import load_state
from .slots import ancestors, source_of
from .ssm_update import WARPS, advance, block_sizes, next_state, operand_types, output

__all__ = ["compile_cases", "ssm_replay_commit", "ssm_replay_flush", "ssm_replay_update"]

MOVE = 512  # elements of an entry per program when accepted ones move to the front
SEQUENCES = 128  # per program that moves ring positions


@device_function
def _replay(
    h, ring_x_at, ring_x_step, ring_b_at, ring_b_step, ring_dt_at, ring_dt_step, first, committed, size, rows, cols, A
):
    """h carried through the committed entries; the pointers are those of entry 0."""
    for i in tl.range(0, committed, loop_unroll_factor=4):  # loads of four entries in flight
        entry = ((first + i) % size).to(tl.int64)
        x = widen(tl.load(ring_x_at + entry * ring_x_step, mask=rows, other=0.0))
        B = widen(tl.load(ring_b_at + entry * ring_b_step, mask=cols, other=0.0))
        step = tl.load(ring_dt_at + entry * ring_dt_step)
        h = advance(h, x, step, tl.exp(step * A), B)
    return h


@triton.jit(do_not_specialize=["tokens", "size"])
def _update_kernel(
    state_ptr, state_strides, ring_x_ptr, ring_x_strides, ring_b_ptr, ring_b_strides, ring_dt_ptr, ring_dt_strides,
    pos_ptr, pos_strides, x_ptr, x_strides, dt_ptr, dt_strides, a_ptr, a_strides, b_ptr, b_strides, c_ptr, c_strides,
    d_ptr, d_strides, z_ptr, z_strides, bias_ptr, bias_strides, indices_ptr, parents_ptr, path_ptr, y_ptr,
    tokens,
    size,  # entries of a ring
    heads, group_heads, head_dim, d_state, dt_min, dt_max,
    SOFTPLUS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program per (sequence, head, BLOCK_P rows). New entries lie behind the committed ones, which alone are read,
    and of each one program writes every element: programs need not wait for each other."""
    pieces = (head_dim + BLOCK_P - 1) // BLOCK_P
    pid = tl.program_id(0)
    h_index = (pid // pieces % heads).to(tl.int64)
    b = (pid // pieces // heads).to(tl.int64)
    p = (pid % pieces * BLOCK_P + tl.arange(0, BLOCK_P)).to(tl.int64)
    n = tl.arange(0, BLOCK_N).to(tl.int64)
    rows, cols = p < head_dim, n < d_state
    g = h_index // group_heads

    slot = source_of(b, indices_ptr, 1, None, False)
    live = slot >= 0
    slot = tl.where(live, slot, 0)
    alive = p < tl.where(live, head_dim, 0)
    count = tl.where(live, tokens, 0)
    pos_at = pos_ptr + slot * pos_strides[0]
    first, committed = tl.load(pos_at, mask=live, other=0), tl.load(pos_at + pos_strides[1], mask=live, other=0)
    A = widen(tl.load(a_ptr + h_index * a_strides[0]))
    bias = 0.0
    if bias_ptr is not None:
        bias = widen(tl.load(bias_ptr + h_index * bias_strides[0]))
    skip = tl.full((BLOCK_P,), 0.0, tl.float32)
    if d_ptr is not None:
        skip += widen(tl.load(d_ptr + h_index * d_strides[0] + p * d_strides[1], mask=rows, other=0.0))

    state_at = slot * state_strides[0] + h_index * state_strides[1]
    state_at = state_at + p[:, None] * state_strides[2] + n[None, :] * state_strides[3]
    tile = alive[:, None] & cols[None, :]
    ring_x_at = ring_x_ptr + slot * ring_x_strides[0] + h_index * ring_x_strides[2] + p * ring_x_strides[3]
    ring_b_at = ring_b_ptr + slot * ring_b_strides[0] + g * ring_b_strides[2] + n * ring_b_strides[3]
    ring_dt_at = ring_dt_ptr + slot * ring_dt_strides[0] + h_index * ring_dt_strides[2]
    h = load_state(state_ptr, state_at, tile, skip, "float")
    h = _replay(
        h, ring_x_at, ring_x_strides[1], ring_b_at, ring_b_strides[1], ring_dt_at, ring_dt_strides[1],
        first, committed, size, rows, cols, A,
    )  # fmt: skip
    tl.debug_barrier()  # all threads have read before one writes
    folded = alive[:, None] & (n < tl.where(committed + 2 * tokens > size, d_state, 0))[None, :]
    tl.store(state_ptr + state_at, narrow(h, state_ptr.dtype.element_ty), mask=folded)
    start = h

    x_at = x_ptr + b * x_strides[0] + h_index * x_strides[2] + p * x_strides[3]
    z_at = x_at
    if z_ptr is not None:
        z_at = z_ptr + b * z_strides[0] + h_index * z_strides[2] + p * z_strides[3]
    b_at = b_ptr + b * b_strides[0] + g * b_strides[2] + n * b_strides[3]
    c_at = c_ptr + b * c_strides[0] + g * c_strides[2] + n * c_strides[3]
    dt_at = dt_ptr + b * dt_strides[0] + h_index * dt_strides[2]
    if parents_ptr is not None:
        parents_ptr += b * tokens
        path_ptr += b * tokens * tokens
    leads = pid % pieces == 0  # writes what rows share, and the first head of a group what heads share
    group_cols = n < tl.where(leads & (h_index % group_heads == 0), d_state, 0)
    for t in range(tokens):
        y = tl.full((BLOCK_P,), 0.0, tl.float32)
        if t < count:
            h, x, step, B = next_state(
                h, start, parents_ptr, path_ptr, tokens, x_at, x_strides[1], dt_at, dt_strides[1], b_at, b_strides[1],
                t, rows, cols, bias, A, dt_min, dt_max, SOFTPLUS,
            )  # fmt: skip
            t_wide = tl.cast(t, tl.int64)
            y = output(h, x, c_at + t_wide * c_strides[1], cols, skip, z_ptr, z_at + t_wide * z_strides[1], rows)
            entry = ((first + committed + t) % size).to(tl.int64)
            tl.store(ring_x_at + entry * ring_x_strides[1], narrow(x, ring_x_ptr.dtype.element_ty), mask=rows)
            tl.store(ring_b_at + entry * ring_b_strides[1], narrow(B, ring_b_ptr.dtype.element_ty), mask=group_cols)
            tl.store(ring_dt_at + entry * ring_dt_strides[1], step, mask=leads)
        y_at = y_ptr + ((b * tokens + t) * heads + h_index) * head_dim + p
        tl.store(y_at, narrow(y, y_ptr.dtype.element_ty), mask=rows)


@triton.jit(do_not_specialize=["size"])
def _flush_kernel(
    state_ptr, state_strides, ring_x_ptr, ring_x_strides, ring_b_ptr, ring_b_strides, ring_dt_ptr, ring_dt_strides,
    pos_ptr, pos_strides, a_ptr, a_strides, indices_ptr,
    size, heads, group_heads, head_dim, d_state,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program per (sequence, head, BLOCK_P rows): the state carried through the committed entries."""
    pieces = (head_dim + BLOCK_P - 1) // BLOCK_P
    pid = tl.program_id(0)
    h_index = (pid // pieces % heads).to(tl.int64)
    b = (pid // pieces // heads).to(tl.int64)
    p = (pid % pieces * BLOCK_P + tl.arange(0, BLOCK_P)).to(tl.int64)
    n = tl.arange(0, BLOCK_N).to(tl.int64)
    slot = source_of(b, indices_ptr, 1, None, False)
    live = slot >= 0
    slot = tl.where(live, slot, 0)
    pos_at = pos_ptr + slot * pos_strides[0]
    first, committed = tl.load(pos_at, mask=live, other=0), tl.load(pos_at + pos_strides[1], mask=live, other=0)
    if committed > 0:
        rows, cols = p < head_dim, n < d_state
        g = h_index // group_heads
        at = state_ptr + slot * state_strides[0] + h_index * state_strides[1]
        at = at + p[:, None] * state_strides[2] + n[None, :] * state_strides[3]
        tile = rows[:, None] & cols[None, :]
        h = _replay(
            widen(tl.load(at, mask=tile, other=0.0)),
            ring_x_ptr + slot * ring_x_strides[0] + h_index * ring_x_strides[2] + p * ring_x_strides[3],
            ring_x_strides[1],
            ring_b_ptr + slot * ring_b_strides[0] + g * ring_b_strides[2] + n * ring_b_strides[3],
            ring_b_strides[1],
            ring_dt_ptr + slot * ring_dt_strides[0] + h_index * ring_dt_strides[2],
            ring_dt_strides[1],
            first, committed, size, rows, cols, widen(tl.load(a_ptr + h_index * a_strides[0])),
        )  # fmt: skip
        tl.debug_barrier()  # all threads have read before one writes
        tl.store(at, narrow(h, state_ptr.dtype.element_ty), mask=tile)


@triton.jit(do_not_specialize=["tokens", "size"])
def _move_kernel(
    ring_ptr, ring_strides, pos_ptr, pos_strides, accepted_ptr, path_ptr, indices_ptr,
    tokens, size, inner,  # elements of the last dimension
    width,  # elements of an entry
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Entry path[j] of the last call to its place j. Grid (sequences, pieces of an entry).

    The path rises: no entry is moved to where a later one is still to be read.
    """
    b = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    slot = source_of(b, indices_ptr, 1, None, False)
    live = slot >= 0
    slot = tl.where(live, slot, 0)
    pos_at = pos_ptr + slot * pos_strides[0]
    behind = tl.load(pos_at, mask=live, other=0) + tl.load(pos_at + pos_strides[1], mask=live, other=0)
    at = ring_ptr + slot * ring_strides[0] + i // inner * ring_strides[2] + i % inner * ring_strides[3]
    for j in range(tl.where(live, tl.load(accepted_ptr + b), 0)):
        here = ((behind + j) % size).to(tl.int64)
        there = ((behind + tl.load(path_ptr + b * tokens + j)) % size + size) % size
        entry = tl.load(at + there.to(tl.int64) * ring_strides[1], mask=i < width, other=0)
        tl.store(at + here * ring_strides[1], entry, mask=i < width)


@triton.jit(do_not_specialize=["sequences", "tokens", "size"])
def _position_kernel(pos_ptr, pos_strides, accepted_ptr, indices_ptr, sequences, tokens, size, BLOCK: tl.constexpr):
    """Where the rings stand after a commit or, without accepted_ptr, after a flush."""
    b = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = b < sequences
    slot = b
    if indices_ptr is not None:
        slot = tl.load(indices_ptr + b, mask=mask, other=-1).to(tl.int64)
        mask = mask & (slot >= 0)
    at = pos_ptr + slot * pos_strides[0]
    first = tl.load(at, mask=mask, other=0)
    committed = tl.load(at + pos_strides[1], mask=mask, other=0)
    added, folds = 0, committed >= 0
    if accepted_ptr is not None:
        added = tl.load(accepted_ptr + b, mask=mask, other=0)
        folds = committed + 2 * tokens > size
    tl.store(at, tl.where(folds, (first + committed) % size, first), mask=mask)
    tl.store(at + pos_strides[1], tl.where(folds, 0, committed) + added, mask=mask)


# ---------------------------------------------------------------- launchers


def ssm_replay_update(
    state: Tensor, ring_x: Tensor, ring_B: Tensor, ring_dt: Tensor, ring_pos: Tensor, x: Tensor, dt: Tensor, A: Tensor,
    B: Tensor, C: Tensor, D: Tensor | None = None, z: Tensor | None = None, dt_bias: Tensor | None = None,
    state_indices: Tensor | None = None, *, parents: Tensor | None = None, dt_softplus: bool = True,
    dt_min: float = 0.0, dt_max: float | None = None,
) -> Tensor:  # fmt: skip
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.dim() == 3:
        x, dt, B, C, z = (t if t is None else t[:, None] for t in (x, dt, B, C, z))
    (batch, tokens, heads, head_dim), d_state = x.shape, B.shape[3]
    if batch * heads * head_dim == 0:
        return y
    parents, sizes = dense(parents), block_sizes(head_dim, d_state)
    with guard(x):
        path = None if parents is None else ancestors(parents, None)
        _update_kernel[(batch * heads * triton.cdiv(head_dim, sizes["BLOCK_P"]),)](
            state, state.stride(), ring_x, ring_x.stride(), ring_B, ring_B.stride(), ring_dt, ring_dt.stride(),
            ring_pos, ring_pos.stride(), x, x.stride(), dt, dt.stride(), A, A.stride(), B, B.stride(), C, C.stride(),
            D, (1, 1) if D is None else (*D.stride(), 0)[:2], z, strides_of(z, 4), dt_bias, strides_of(dt_bias, 1),
            dense(state_indices), parents, path, y, tokens, ring_x.shape[1],
            heads, heads // B.shape[2], head_dim, d_state, dt_min, float("inf") if dt_max is None else dt_max,
            SOFTPLUS=dt_softplus, num_warps=WARPS, enable_fp_fusion=False, **sizes,
        )  # fmt: skip
    return y


def ssm_replay_commit(
    ring_pos: Tensor, ring_x: Tensor, ring_B: Tensor, ring_dt: Tensor, num_accepted: Tensor, tokens: int,
    path: Tensor | None = None, state_indices: Tensor | None = None,
) -> None:  # fmt: skip
    accepted, path, indices = dense(num_accepted), dense(path), dense(state_indices)
    batch, size = len(accepted), ring_x.shape[1]
    if batch == 0:
        return
    with guard(ring_x):
        for ring in (ring_x, ring_B, ring_dt[..., None]) if path is not None else ():
            width = ring.shape[2] * ring.shape[3]
            if width:
                _move_kernel[batch, triton.cdiv(width, MOVE)](
                    ring, ring.stride(), ring_pos, ring_pos.stride(), accepted, path, indices,
                    tokens, size, ring.shape[3], width, BLOCK=MOVE, num_warps=WARPS, enable_fp_fusion=False,
                )  # fmt: skip
        _move_positions(ring_pos, accepted, indices, batch, tokens, size)


def ssm_replay_flush(
    state: Tensor, ring_pos: Tensor, ring_x: Tensor, ring_B: Tensor, ring_dt: Tensor, A: Tensor,
    state_indices: Tensor | None = None,
) -> None:  # fmt: skip
    indices = dense(state_indices)
    slots, heads, head_dim, d_state = state.shape
    batch, size = slots if indices is None else len(indices), ring_x.shape[1]
    if batch == 0:
        return
    sizes = block_sizes(head_dim, d_state)
    with guard(state):
        if state.numel():
            _flush_kernel[(batch * heads * triton.cdiv(head_dim, sizes["BLOCK_P"]),)](
                state, state.stride(), ring_x, ring_x.stride(), ring_B, ring_B.stride(), ring_dt, ring_dt.stride(),
                ring_pos, ring_pos.stride(), A, A.stride(), indices,
                size, heads, heads // ring_B.shape[2], head_dim, d_state,
                num_warps=WARPS, enable_fp_fusion=False, **sizes,
            )  # fmt: skip
        _move_positions(ring_pos, None, indices, batch, 0, size)


def _move_positions(
    ring_pos: Tensor, accepted: Tensor | None, indices: Tensor | None, batch: int, tokens: int, size: int
) -> None:
    """A launch of its own: every program of the one before has read where the rings stood."""
    _position_kernel[(triton.cdiv(batch, SEQUENCES),)](
        ring_pos, ring_pos.stride(), accepted, indices, batch, tokens, size, BLOCK=SEQUENCES, num_warps=WARPS,
        enable_fp_fusion=False,
    )  # fmt: skip


def compile_cases(arch: int):
    wide = ("i32:16", "i32:16", "i32:16", 1)
    common = {"pos_ptr": "*i32", "pos_strides": ("i32", 1), "size": "i32", "sequences": "i32", "accepted_ptr": "*i32"}
    common |= {"inner": "i32:16", "width": "i32:16", "ring_strides": wide, "indices_ptr": "*i32"}
    common |= {"ring_x_strides": wide, "ring_b_strides": wide, "ring_dt_strides": ("i32:16", "i32:16", 1)}
    kernels = (_update_kernel, _flush_kernel, _move_kernel, _position_kernel)
    for name, dtype, state, tree in (("fp32", "fp32", "fp32", False), ("nano", "bf16", "fp16", True)):
        types = operand_types(dtype) | common | {"state_ptr": f"*{state}", "ring_dt_ptr": "*fp32"}
        types |= {f"{t}_ptr": f"*{dtype}" for t in ("ring_x", "ring_b", "ring")}
        for kernel in kernels:
            flags = {"SOFTPLUS": True, "BLOCK": SEQUENCES if kernel is _position_kernel else MOVE}
            flags |= block_sizes(64, 128)
            drafts = {"parents_ptr": "*i32", "path_ptr": "*i32" if kernel is _move_kernel else "*i8"}
            given = types | (drafts if tree or kernel is _move_kernel else {})
            flags |= {} if drafts.keys() <= given.keys() else dict.fromkeys(drafts)
            names = kernel.arg_names
            yield Case(
                f"ssm_replay{kernel.__name__.removesuffix('_kernel')}-{name}", kernel,
                {name: t for name, t in given.items() if name in names},
                {name: value for name, value in flags.items() if name in names},
                {"num_warps": WARPS, "enable_fp_fusion": False},
            )  # fmt: skip
