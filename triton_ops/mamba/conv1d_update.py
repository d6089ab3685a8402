"""causal_conv1d_update: the convolution of running sequences, whose last inputs are kept in slots in one of three ways.

shift   the last S inputs, oldest first
window  the W - 2 inputs before the last call's tokens, then these tokens, of which num_accepted count
ring    input p in column p mod S

A position counts a call's tokens from 0; negative ones are the inputs before it, -1 the last. Where states go to slots
of their own, those that are read are copied first: a slot that one sequence reads may be one that another writes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import INTERPRET, Case, device_function, guard, narrow, widen
from .launch import dense, row_length, strides_of
from .numerics import silu
from .slots import before, count_of, source_of, steps_back

__all__ = ["causal_conv1d_update", "compile_cases", "convolve_update"]

BLOCK_C, WARPS = 1024 if INTERPRET else 128, 4  # channels per program; the interpreter wants few programs


@triton.jit(do_not_specialize=["columns", "indices_row"])
def _copy_kernel(
    state_ptr, state_strides, indices_ptr, indices_row, accepted_ptr, out_ptr,
    channels, columns,
    ROLLBACK: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out[b] = the state that sequence b reads, ``[B, S, C]``. Grid (sequences, pieces of the channels)."""
    b = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    offs = tl.arange(0, BLOCK_S)
    slot = source_of(b, indices_ptr, indices_row, accepted_ptr, ROLLBACK)
    inside = (cols < tl.where(slot >= 0, channels, 0))[:, None] & (offs < columns)[None, :]
    at = slot * state_strides[0] + cols[:, None] * state_strides[1] + offs[None, :] * state_strides[2]
    state = tl.load(state_ptr + at, mask=inside, other=0.0)
    tl.store(out_ptr + (b * columns + offs[None, :]) * channels + cols[:, None], state, mask=inside)


@device_function
def _column(position, base, columns, RING: tl.constexpr):
    """Where the input at a negative position is kept."""
    if RING:
        return ((base + position) % columns + columns) % columns
    else:
        return base + position


@device_function
def _raw(
    x_ptr, x_strides, state_ptr, state_strides, position, base, cols, offs_mask, channels, columns,
    RING: tl.constexpr,
):  # fmt: skip
    """Inputs [C, S] at the positions [S], of the call or of the state: x_ptr and state_ptr point to the sequence's."""
    new = offs_mask & (position >= 0)
    at = position[None, :].to(tl.int64) * x_strides[1] + cols[:, None] * x_strides[2]
    x = tl.load(x_ptr + at, mask=(cols < channels)[:, None] & new[None, :], other=0.0)
    old = offs_mask & (position < 0)
    column = _column(position, base, columns, RING).to(tl.int64)
    at = cols[:, None] * state_strides[1] + column[None, :] * state_strides[2]
    state = tl.load(state_ptr + at, mask=(cols < channels)[:, None] & old[None, :], other=0.0)
    return tl.where((position >= 0)[None, :], x, state)


@triton.jit(do_not_specialize=["tokens", "columns", "indices_row", "dst_row"])
def _update_kernel(
    x_ptr, x_strides, w_ptr, w_strides, bias_ptr, bias_strides,
    read_ptr, read_strides,  # the states that are read: copies of them, or out_ptr
    out_ptr, out_strides,
    indices_ptr, indices_row, dst_ptr, dst_row, accepted_ptr, counts_ptr, parents_ptr, seen_ptr, y_ptr,
    live_ptr,  # written: 0 for padding; or None
    tokens, channels, columns,
    MODE: tl.constexpr, ROLLBACK: tl.constexpr, STAGED: tl.constexpr, PER_TOKEN: tl.constexpr, SILU: tl.constexpr,
    W: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Grid (sequences, pieces of the channels)."""
    RING: tl.constexpr = MODE == "ring"
    b = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = cols < channels
    slot = source_of(b, indices_ptr, indices_row, accepted_ptr, ROLLBACK)
    count = count_of(b, slot, counts_ptr, tokens)
    x_ptr += b * x_strides[0]
    if parents_ptr is not None:
        parents_ptr += b * tokens
    if STAGED:
        read_ptr += b * read_strides[0]
    else:
        read_ptr += tl.where(slot >= 0, slot, 0) * read_strides[0]
    if MODE == "shift":
        base = columns
    elif MODE == "window":
        base = tl.load(accepted_ptr + b) + (W - 2)
    else:
        base = tl.load(seen_ptr + b) % columns

    # ---- outputs
    for t in range(tokens):
        live = cols < tl.where(t < count, channels, 0)
        acc = tl.full((BLOCK_C,), 0.0, tl.float32)
        if bias_ptr is not None:
            acc += widen(tl.load(bias_ptr + cols * bias_strides[0], mask=mask, other=0.0))
        for k in tl.static_range(W):
            w = widen(tl.load(w_ptr + cols * w_strides[0] + k * w_strides[1], mask=mask, other=0.0))
            if parents_ptr is None:
                p = t - (W - 1 - k)
            else:
                p = steps_back(tl.where(t < count, t, -1), parents_ptr, W - 1 - k)
            here = cols < tl.where((t < count) & (p >= 0), channels, 0)
            x = widen(tl.load(x_ptr + tl.cast(p, tl.int64) * x_strides[1] + cols * x_strides[2], mask=here, other=0.0))
            if k < W - 1:
                there = cols < tl.where((t < count) & (p < 0), channels, 0)
                column = tl.cast(_column(p, base, columns, RING), tl.int64)
                x += widen(tl.load(read_ptr + cols * read_strides[1] + column * read_strides[2], mask=there, other=0.0))
            acc = tl.fma(x, w, acc)
        if SILU:
            acc = silu(acc)
        if live_ptr is not None:
            tl.store(live_ptr + b * tokens + t, (t < count).to(tl.int8), mask=tl.program_id(1) == 0)
        y = tl.where(live, acc, 0.0)
        tl.store(y_ptr + (b * tokens + t) * channels + cols, narrow(y, y_ptr.dtype.element_ty), mask=mask)

    # ---- states
    offs = tl.arange(0, BLOCK_S)
    out = out_ptr + cols[:, None] * out_strides[1]
    if PER_TOKEN:
        for t in range(tokens):
            target = tl.load(dst_ptr + b * dst_row + t).to(tl.int64)
            kept = offs < tl.where((t < count) & (target >= 0), columns, 0)
            position = t - (columns - 1) + offs
            if parents_ptr is not None:
                position = tl.zeros_like(offs) + tl.where(t < count, t, -1)
                for step in range(columns - 1):
                    position = tl.where(step < columns - 1 - offs, before(position, parents_ptr), position)
            new = _raw(x_ptr, x_strides, read_ptr, read_strides, position, base, cols, kept, channels, columns, RING)
            at = out + target * out_strides[0] + offs[None, :] * out_strides[2]
            tl.store(at, new, mask=mask[:, None] & kept[None, :])
    else:
        if dst_ptr is None:
            target = slot
        else:
            target = tl.where(slot >= 0, tl.load(dst_ptr + b * dst_row).to(tl.int64), -1)
        first, limit = count - columns, columns
        if MODE == "window":  # without a token the window is as it was
            first = tl.where(count == 0, first, 2 - W)
            limit = tl.where(count == 0, limit, W - 2 + count)
            base = tl.where(count == 0, columns, base)
        position = first + offs
        column = offs
        kept = offs < tl.where(target >= 0, limit, 0)
        if RING:
            kept = kept & (position >= 0)
            column = _column(position, base, columns, True)
        new = _raw(x_ptr, x_strides, read_ptr, read_strides, position, base, cols, kept, channels, columns, RING)
        tl.debug_barrier()  # all threads have read before one writes
        at = out + target * out_strides[0] + column[None, :].to(tl.int64) * out_strides[2]
        tl.store(at, new, mask=mask[:, None] & kept[None, :])


def causal_conv1d_update(
    x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None = None, state_indices: Tensor | None = None,
    dst_state_indices: Tensor | None = None, *, num_accepted: Tensor | None = None, num_tokens: Tensor | None = None,
    parents: Tensor | None = None, cache_seqlens: Tensor | None = None, activation: str | None = None,
) -> Tensor:  # fmt: skip
    return convolve_update(
        x, conv_state, weight, bias, state_indices, dst_state_indices, num_accepted, num_tokens, parents, cache_seqlens,
        activation, x.dtype,
    )  # fmt: skip


def convolve_update(
    x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None, state_indices: Tensor | None,
    dst_state_indices: Tensor | None, num_accepted: Tensor | None, num_tokens: Tensor | None, parents: Tensor | None,
    cache_seqlens: Tensor | None, activation: str | None, dtype: torch.dtype, live: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The outputs in ``dtype``, and the states. ``live``: int8 per token, becomes 0 for padding."""
    y = x.new_empty(x.shape, dtype=dtype)
    x = x[:, None] if x.dim() == 2 else x
    (batch, tokens, channels), columns = x.shape, conv_state.shape[2]
    if batch * channels == 0:
        return y
    indices, dst, accepted = dense(state_indices), dense(dst_state_indices), dense(num_accepted)
    rollback = indices is not None and indices.dim() == 2
    grid = (batch, triton.cdiv(channels, BLOCK_C))
    sizes = {"BLOCK_S": triton.next_power_of_2(max(columns, 1)), "BLOCK_C": BLOCK_C, "num_warps": WARPS}
    read = conv_state
    with guard(x):
        if dst is not None and columns:
            read = conv_state.new_empty(batch, columns, channels).transpose(1, 2)
            _copy_kernel[grid](
                conv_state, conv_state.stride(), indices, row_length(indices), accepted, read, channels, columns,
                ROLLBACK=rollback, **sizes,
            )  # fmt: skip
        mode = "ring" if cache_seqlens is not None else "shift" if rollback or accepted is None else "window"
        _update_kernel[grid](
            x, x.stride(), weight, weight.stride(), bias, strides_of(bias, 1), read, read.stride(),
            conv_state, conv_state.stride(), indices, row_length(indices), dst, row_length(dst), accepted,
            dense(num_tokens), dense(parents), dense(cache_seqlens), y, live, tokens, channels, columns,
            MODE=mode if columns else "shift", ROLLBACK=rollback, STAGED=read is not conv_state,
            PER_TOKEN=dst is not None and dst.dim() == 2, SILU=activation == "silu", W=weight.shape[1],
            enable_fp_fusion=False, **sizes,
        )  # fmt: skip
    return y


def compile_cases(arch: int):
    strides = {"x_strides": ("i32:16", "i32:16", 1), "w_strides": ("i32", 1), "bias_strides": (1,)}
    strides |= dict.fromkeys(("read_strides", "out_strides", "state_strides"), ("i32:16", "i32", 1))
    numbers = {"indices_row": "i32", "dst_row": "i32", "tokens": "i32", "channels": "i32:16", "columns": "i32"}
    every = ("indices", "dst", "accepted", "counts", "parents", "seen")
    forms = {  # the index operands of each use
        "shift": ("shift", ("indices",)),
        "rollback": ("shift", ("indices", "dst", "accepted", "counts")),
        "tree": ("shift", ("indices", "dst", "counts", "parents")),
        "window": ("window", ("indices", "accepted", "counts")),
        "ring": ("ring", ("indices", "seen")),
    }
    for dtype, width in (("bf16", 4), ("fp32", 4), ("fp16", 2)):
        for form, (mode, given) in forms.items() if (dtype, width) == ("bf16", 4) else [("shift", forms["shift"])]:
            types = {f"{t}_ptr": f"*{dtype}" for t in ("x", "w", "bias", "read", "out", "state", "y")}
            types |= strides | numbers | {f"{t}_ptr": "*i32" for t in given}
            none = {f"{t}_ptr": None for t in every if t not in given} | {"live_ptr": None}
            flags = {"ROLLBACK": form == "rollback", "STAGED": "dst" in given, "PER_TOKEN": "dst" in given}
            flags |= {"MODE": mode, "SILU": True, "W": width, "BLOCK_S": 4, "BLOCK_C": BLOCK_C, **none}
            for kernel in (_update_kernel, _copy_kernel):
                names = kernel.arg_names
                yield Case(
                    f"conv1d_update{kernel.__name__.removesuffix('_kernel')}-{form}-{dtype}-{width}", kernel,
                    {name: t for name, t in types.items() if name in names},
                    {name: value for name, value in flags.items() if name in names},
                    {"num_warps": WARPS, "enable_fp_fusion": False},
                )  # fmt: skip
