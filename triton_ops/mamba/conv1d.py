"""causal_conv1d: y_t = act(bias + sum_k weight[:, k] x_{t-W+1+k}) on batched or packed sequences, and its gradient.

Tokens are counted through all sequences, batched ones as if they were packed, and every token finds its own sequence:
by division, or by a binary search in cu_seqlens. So the grid is known on the host without waiting for the device, and
an output is summed in the same order wherever it lies: its bits do not depend on its neighbours.

Terms are added in the order of time to the bias, one fused multiply-add each; conv1d_update adds in the same order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import INTERPRET, Case, device_function, guard, narrow, widen
from .launch import dense, strides_of
from .numerics import sigmoid, silu

__all__ = ["causal_conv1d", "causal_conv1d_bwd", "causal_conv1d_slots", "compile_cases", "convolve"]

BLOCK_T = 16  # tokens and channels per program; the interpreter wants few programs
BLOCK_C = 1024 if INTERPRET else 256
WARPS = 8
STATE_C, STATE_WARPS = 128, 4  # channels per program where states are read and written
PARTIALS = 128  # pieces of the tokens in the backward, each of which leaves one sum for weight and bias
REDUCE = 128  # channels per program of the launch that adds these


# ---------------------------------------------------------------- where a token is


@device_function
def sequence_of(i, ends_ptr, sequences, length, steps):
    """Sequence and first token of each token i; -1 for one behind the last sequence.

    ends_ptr: cu_seqlens, in which 2^steps > sequences; or None, where every sequence has ``length`` tokens.
    """
    if ends_ptr is None:
        s = i // length
        return s, s * length
    else:
        low = tl.zeros_like(i)  # the largest s with cu_seqlens[s] <= i, so that empty sequences are passed over
        for step in range(steps):
            probe = low + (1 << (steps - 1 - step))
            inside = probe <= sequences
            end = tl.load(ends_ptr + probe, mask=inside, other=0).to(tl.int64)
            low = tl.where(inside & (end <= i), probe, low)
        start = tl.load(ends_ptr + low).to(tl.int64)
        return tl.where(low < sequences, low, -1), start


@device_function
def slot_of(s, alive, indices_ptr):
    """The slot of each sequence, or the sequence itself where states are not in slots; -1 for padding."""
    if indices_ptr is None:
        return tl.where(alive, s, -1)
    else:
        return tl.load(indices_ptr + s, mask=alive, other=-1).to(tl.int64)


@device_function
def _has_initial(s, alive, has_initial_ptr):
    if has_initial_ptr is None:
        return alive
    else:
        return tl.load(has_initial_ptr + s, mask=alive, other=0) != 0


@device_function
def _row_of(i, s, start, x_strides, ends_ptr):
    """Offset of token i of x: packed [tokens, C], or [batch, length, C]; its channels lie x_strides[2] apart."""
    if ends_ptr is None:
        return s * x_strides[0] + (i - start) * x_strides[1]
    else:
        return i * x_strides[1]


# ---------------------------------------------------------------- outputs


@device_function
def _inputs(
    x_ptr, x_strides, state_ptr, state_strides, row, slot, position, fresh, near, cols, inside, past,
    BACK: tl.constexpr,
):  # fmt: skip
    """The inputs [T, C] that are BACK tokens before, from x or from the state. ``near``: some token reads a state."""
    at = (row - BACK * x_strides[1])[:, None] + cols[None, :] * x_strides[2]
    x = widen(tl.load(x_ptr + at, mask=inside & (position >= BACK)[:, None], other=0.0))
    if state_ptr is not None:
        if BACK > 0:
            if near:
                before = inside & ((position < BACK) & (fresh == 0))[:, None]
                column = slot * state_strides[0] + (past + position - BACK) * state_strides[2]
                x += widen(
                    tl.load(state_ptr + column[:, None] + cols[None, :] * state_strides[1], mask=before, other=0.0)
                )
    return x


@device_function
def _sums(
    x_ptr, x_strides, w_ptr, w_strides, bias_ptr, bias_strides, state_ptr, state_strides,
    row, slot, position, fresh, near, cols, mask,
    past,  # inputs in a state
    W: tl.constexpr,
):  # fmt: skip
    """Sums [T, C] before the activation. ``position``: of each token in its sequence; ``fresh``: zeros come before."""
    acc = tl.zeros((row.shape[0], cols.shape[0]), tl.float32)
    if bias_ptr is not None:
        acc += widen(tl.load(bias_ptr + cols * bias_strides[0], mask=mask, other=0.0))[None, :]
    inside = mask[None, :] & (slot >= 0)[:, None]
    for k in tl.static_range(W):
        w = widen(tl.load(w_ptr + cols * w_strides[0] + k * w_strides[1], mask=mask, other=0.0))
        x = _inputs(
            x_ptr, x_strides, state_ptr, state_strides, row, slot, position, fresh, near, cols, inside, past, W - 1 - k
        )
        acc = tl.fma(x, tl.broadcast_to(w[None, :], acc.shape), acc)
    return acc


@triton.jit(do_not_specialize=["tokens", "length", "sequences", "steps"])
def _forward_kernel(
    x_ptr, x_strides, w_ptr, w_strides, bias_ptr, bias_strides, state_ptr, state_strides,
    indices_ptr, has_initial_ptr, ends_ptr, y_ptr,
    live_ptr,  # written: 0 for padding; or None
    tokens, length, sequences, steps, channels, past,
    SILU: tl.constexpr, W: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Grid (pieces of the tokens, pieces of the channels). The W loads of an input overlap in the L1 cache."""
    i = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)  # int64: tokens * channels passes 2^31
    cols = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = cols < channels
    s, start = sequence_of(i, ends_ptr, sequences, length, steps)
    alive = (i < tokens) & (s >= 0)
    slot = slot_of(s, alive, indices_ptr)
    fresh = (_has_initial(s, alive, has_initial_ptr) == 0).to(tl.int32)
    row, position = _row_of(i, s, start, x_strides, ends_ptr), i - start
    near = tl.min(tl.where(slot >= 0, position, W)) < W - 1
    acc = _sums(
        x_ptr, x_strides, w_ptr, w_strides, bias_ptr, bias_strides, state_ptr, state_strides,
        row, slot, position, fresh, near, cols, mask, past, W,
    )  # fmt: skip
    if SILU:
        acc = silu(acc)
    y = tl.where((slot >= 0)[:, None], acc, 0.0)
    if y_ptr.dtype.element_ty == tl.float16 and x_ptr.dtype.element_ty != tl.float16:
        y = tl.where(y > 65504.0, 65504.0, tl.where(y < -65504.0, -65504.0, y))  # of a wider range: saturate
    if live_ptr is not None:
        first = tl.where(tl.program_id(1) == 0, tokens, 0)
        tl.store(live_ptr + i, (slot >= 0).to(tl.int8), mask=i < first)
    at = i[:, None] * channels + cols[None, :]
    tl.store(y_ptr + at, narrow(y, y_ptr.dtype.element_ty), mask=mask[None, :] & (i < tokens)[:, None])


# ---------------------------------------------------------------- states


@triton.jit(do_not_specialize=["tokens", "length", "sequences", "steps", "columns"])
def _state_kernel(
    x_ptr, x_strides, state_ptr, state_strides, indices_ptr, has_initial_ptr, ends_ptr,
    out_ptr, out_strides, at_tokens_ptr, at_indices_ptr,
    tokens, length, sequences, steps, channels,
    columns,  # inputs in a state
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The last ``columns`` inputs up to the end of each sequence, or up to each of at_tokens. Grid (these, channels).

    state_ptr and out_ptr may be one memory: a program reads all it needs of a slot before it writes it, and no other
    program of the launch reads that slot.
    """
    which = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    offs = tl.arange(0, BLOCK_S).to(tl.int64)
    if at_tokens_ptr is not None:
        token = tl.load(at_tokens_ptr + which).to(tl.int64)
        s, start = sequence_of(token, ends_ptr, sequences, length, steps)
        slot = slot_of(s, s >= 0, indices_ptr)
        target = tl.where(slot >= 0, tl.load(at_indices_ptr + which).to(tl.int64), -1)
        end = token + 1
    else:
        s = which
        if ends_ptr is None:
            start, end = s * length, (s + 1) * length
        else:
            start, end = tl.load(ends_ptr + s).to(tl.int64), tl.load(ends_ptr + s + 1).to(tl.int64)
        slot = slot_of(s, s >= 0, indices_ptr)
        target = slot
    i = end - columns + offs  # the token in each column
    inside = (cols < tl.where(target >= 0, channels, 0))[:, None] & (offs < columns)[None, :]
    row = _row_of(i, s, start, x_strides, ends_ptr)
    new = tl.load(x_ptr + row[None, :] + cols[:, None] * x_strides[2], mask=inside & (i >= start)[None, :], other=0.0)
    if state_ptr is not None:
        before = tl.where(_has_initial(s, s >= 0, has_initial_ptr), start, end - columns)  # else zeros
        old = inside & (i < before)[None, :]
        at = slot * state_strides[0] + cols[:, None] * state_strides[1]
        at = at + (columns + i - start)[None, :] * state_strides[2]
        new = tl.where((i >= start)[None, :], new, tl.load(state_ptr + at, mask=old, other=0.0))
    tl.debug_barrier()  # all threads have read before one writes
    at = target * out_strides[0] + cols[:, None] * out_strides[1] + offs[None, :] * out_strides[2]
    tl.store(out_ptr + at, new, mask=inside)


# ---------------------------------------------------------------- gradients


@triton.jit(do_not_specialize=["tokens", "length", "sequences", "steps", "tiles_each"])
def _weight_gradient_kernel(
    dy_ptr, dy_strides, x_ptr, x_strides, w_ptr, w_strides, bias_ptr, bias_strides, state_ptr, state_strides, ends_ptr,
    dpre_ptr, partial_ptr,
    tokens, length, sequences, steps, channels, past, tiles_each,
    SILU: tl.constexpr, W: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dpre = dy act'(pre), float32, and per piece of the tokens the sums of dpre x_{t-W+1+k} and of dpre, in order."""
    cols = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = cols < channels
    piece = tl.program_id(0).to(tl.int64)
    base = piece * (W + 1) * channels + cols
    for k in tl.static_range(W + 1):  # a sum per tap would hold too many registers: they stay in the L1 cache
        tl.store(partial_ptr + base + k * channels, tl.full((BLOCK_C,), 0.0, tl.float32), mask=mask)
    tl.debug_barrier()  # what is stored there, perhaps another thread loads
    for tile in range(piece * tiles_each, (piece + 1) * tiles_each):
        i = tl.cast(tile, tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
        s, start = sequence_of(i, ends_ptr, sequences, length, steps)
        alive = (i < tokens) & (s >= 0)
        slot = tl.where(alive, s, -1)
        inside = mask[None, :] & alive[:, None]
        row, dy_row = _row_of(i, s, start, x_strides, ends_ptr), _row_of(i, s, start, dy_strides, ends_ptr)
        position, fresh = i - start, tl.zeros_like(slot)
        near = tl.min(tl.where(alive, position, W)) < W - 1
        dy_at = dy_row[:, None] + cols[None, :] * dy_strides[2]
        dpre = widen(tl.load(dy_ptr + dy_at, mask=inside, other=0.0))
        if SILU:
            pre = _sums(
                x_ptr, x_strides, w_ptr, w_strides, bias_ptr, bias_strides, state_ptr, state_strides,
                row, slot, position, fresh, near, cols, mask, past, W,
            )  # fmt: skip
            gate = sigmoid(pre)
            dpre = dpre * (gate * (1.0 + pre * (1.0 - gate)))
        tl.store(dpre_ptr + i[:, None] * channels + cols[None, :], dpre, mask=mask[None, :] & (i < tokens)[:, None])
        for k in tl.static_range(W):
            x = _inputs(
                x_ptr, x_strides, state_ptr, state_strides, row, slot, position, fresh, near, cols, inside, past,
                W - 1 - k,
            )  # fmt: skip
            sums = partial_ptr + base + k * channels
            tl.store(sums, tl.load(sums, mask=mask, other=0.0) + tl.sum(dpre * x, axis=0), mask=mask)
        sums = partial_ptr + base + W * channels
        tl.store(sums, tl.load(sums, mask=mask, other=0.0) + tl.sum(dpre, axis=0), mask=mask)
        tl.debug_barrier()


@triton.jit(do_not_specialize=["pieces"])
def _reduce_kernel(partial_ptr, dw_ptr, db_ptr, pieces, channels, W: tl.constexpr, BLOCK: tl.constexpr):
    """dweight[c, k] and dbias[c] = the sums over pieces of partial[piece, k, c], in order. Grid (channels, W + 1)."""
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    k = tl.program_id(1)
    mask = cols < channels
    total = tl.zeros((BLOCK,), tl.float32)
    for piece in range(pieces):
        at = (tl.cast(piece, tl.int64) * (W + 1) + k) * channels + cols
        total += tl.load(partial_ptr + at, mask=mask, other=0.0)
    tap, last = cols < tl.where(k < W, channels, 0), cols < tl.where(k == W, channels, 0)
    tl.store(dw_ptr + cols.to(tl.int64) * W + k, narrow(total, dw_ptr.dtype.element_ty), mask=tap)
    if db_ptr is not None:
        tl.store(db_ptr + cols, narrow(total, db_ptr.dtype.element_ty), mask=last)


@device_function
def _input_gradient(
    dpre_ptr, w_ptr, w_strides, dfinal_ptr, dfinal_strides, i, s, start, end, inside, cols, channels,
    W: tl.constexpr,
):  # fmt: skip
    """d of the inputs i, ``[T, C]``: each reaches the outputs i...i + W - 1 of its sequence, and perhaps the state.

    Inputs before ``start`` are those of the initial state.
    """
    acc = tl.zeros((i.shape[0], cols.shape[0]), tl.float32)
    mask = cols < channels
    for k in tl.static_range(W):
        t = i + (W - 1 - k)
        w = widen(tl.load(w_ptr + cols * w_strides[0] + k * w_strides[1], mask=mask, other=0.0))
        reached = inside & ((t >= start) & (t < end))[:, None]
        dpre = tl.load(dpre_ptr + t[:, None] * channels + cols[None, :], mask=reached, other=0.0)
        acc = tl.fma(dpre, tl.broadcast_to(w[None, :], acc.shape), acc)
    if dfinal_ptr is not None and W > 1:
        column = i - end + (W - 1)
        kept = inside & ((column >= 0) & (column < W - 1))[:, None]
        at = (s * dfinal_strides[0] + column * dfinal_strides[2])[:, None] + cols[None, :] * dfinal_strides[1]
        acc += widen(tl.load(dfinal_ptr + at, mask=kept, other=0.0))
    return acc


@triton.jit(do_not_specialize=["tokens", "length", "sequences", "steps"])
def _input_gradient_kernel(
    dpre_ptr, w_ptr, w_strides, dfinal_ptr, dfinal_strides, ends_ptr, dx_ptr,
    tokens, length, sequences, steps, channels,
    W: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx. Grid (pieces of the tokens, pieces of the channels)."""
    i = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    cols = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    s, start = sequence_of(i, ends_ptr, sequences, length, steps)
    alive = (i < tokens) & (s >= 0)
    if ends_ptr is None:
        end = start + length
    else:
        end = tl.load(ends_ptr + s + 1, mask=alive, other=0).to(tl.int64)
    stored = (cols < channels)[None, :] & (i < tokens)[:, None]
    dx = _input_gradient(
        dpre_ptr, w_ptr, w_strides, dfinal_ptr, dfinal_strides,
        i, s, start, end, stored & alive[:, None], cols, channels, W,
    )  # fmt: skip
    tl.store(dx_ptr + i[:, None] * channels + cols[None, :], narrow(dx, dx_ptr.dtype.element_ty), mask=stored)


@triton.jit(do_not_specialize=["length"])
def _initial_gradient_kernel(
    dpre_ptr, w_ptr, w_strides, dfinal_ptr, dfinal_strides, ends_ptr, dinitial_ptr,
    length, channels,
    W: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """d of the W - 1 inputs before each sequence. Grid (sequences, pieces of the channels)."""
    s = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    offs = tl.arange(0, BLOCK_S)
    if ends_ptr is None:
        start, end = s * length, (s + 1) * length
    else:
        start, end = tl.load(ends_ptr + s).to(tl.int64), tl.load(ends_ptr + s + 1).to(tl.int64)
    i = start - (W - 1) + offs
    inside = (cols < channels)[None, :] & (offs < W - 1)[:, None]
    grad = _input_gradient(
        dpre_ptr, w_ptr, w_strides, dfinal_ptr, dfinal_strides, i, s, start, end, inside, cols, channels, W
    )
    at = s * channels * (W - 1) + cols[None, :] * (W - 1) + offs[:, None]
    tl.store(dinitial_ptr + at, narrow(grad, dinitial_ptr.dtype.element_ty), mask=inside)


# ---------------------------------------------------------------- launchers


class _Tokens:
    """The tokens of a call, batched or packed, as the kernels take them."""

    def __init__(self, x: Tensor, cu_seqlens: Tensor | None):
        *lead, self.channels = x.shape
        self.total = lead[0] if cu_seqlens is not None else lead[0] * lead[1]
        self.length = max(x.shape[1], 1) if cu_seqlens is None else 0
        self.sequences = x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
        self.steps = 0 if cu_seqlens is None else self.sequences.bit_length()

    def strides(self, t: Tensor) -> tuple[int, ...]:
        return t.stride() if t.dim() == 3 else (0, *t.stride())

    def grid(self) -> tuple[int, int]:
        return triton.cdiv(self.total, BLOCK_T), triton.cdiv(self.channels, BLOCK_C)


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, indices: Tensor | None,
    has_initial: Tensor | None, cu_seqlens: Tensor | None, activation: str | None, dtype: torch.dtype,
    live: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The outputs, in ``dtype``; states are read and not written. ``live``: int8 per token, becomes 0 for padding."""
    tokens, y = _Tokens(x, cu_seqlens), x.new_empty(x.shape, dtype=dtype)
    if y.numel():
        with guard(x):
            _forward_kernel[tokens.grid()](
                x, tokens.strides(x), weight, weight.stride(), bias, strides_of(bias, 1), state, strides_of(state, 3),
                dense(indices), dense(has_initial), dense(cu_seqlens), y, live,
                tokens.total, tokens.length, tokens.sequences, tokens.steps, tokens.channels,
                0 if state is None else state.shape[2],
                SILU=activation == "silu", W=weight.shape[1], BLOCK_T=BLOCK_T, BLOCK_C=BLOCK_C,
                num_warps=WARPS, enable_fp_fusion=False,
            )  # fmt: skip
    return y


def keep_states(
    x: Tensor, state: Tensor | None, indices: Tensor | None, has_initial: Tensor | None, cu_seqlens: Tensor | None,
    out: Tensor, at_tokens: Tensor | None = None, at_indices: Tensor | None = None,
) -> None:  # fmt: skip
    """Writes the last inputs of each sequence, or up to ``at_tokens``, to their slots of ``out``."""
    tokens, columns = _Tokens(x, cu_seqlens), out.shape[2]
    count = tokens.sequences if at_tokens is None else len(at_tokens)
    if count * tokens.channels * columns == 0:
        return
    with guard(x):
        _state_kernel[count, triton.cdiv(tokens.channels, STATE_C)](
            x, tokens.strides(x), state, strides_of(state, 3), dense(indices), dense(has_initial), dense(cu_seqlens),
            out, out.stride(), dense(at_tokens), dense(at_indices),
            tokens.total, tokens.length if x.numel() else 0, tokens.sequences, tokens.steps, tokens.channels, columns,
            BLOCK_S=triton.next_power_of_2(columns), BLOCK_C=STATE_C, num_warps=STATE_WARPS, enable_fp_fusion=False,
        )  # fmt: skip


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None, *, activation: str | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    y = convolve(x, weight, bias, initial_state, None, None, cu_seqlens, activation, x.dtype)
    final_state = x.new_empty(_Tokens(x, cu_seqlens).sequences, weight.shape[0], weight.shape[1] - 1)
    keep_states(x, initial_state, None, None, cu_seqlens, final_state)
    return y, final_state


def causal_conv1d_slots(
    x: Tensor, weight: Tensor, bias: Tensor | None, conv_state: Tensor, state_indices: Tensor,
    has_initial: Tensor | None = None, cu_seqlens: Tensor | None = None,
    checkpoint_tokens: Tensor | None = None, checkpoint_indices: Tensor | None = None,
    *, activation: str | None = None,
) -> Tensor:  # fmt: skip
    return convolve_slots(
        x, weight, bias, conv_state, state_indices, has_initial, cu_seqlens, checkpoint_tokens, checkpoint_indices,
        activation, x.dtype,
    )  # fmt: skip


def convolve_slots(
    x: Tensor, weight: Tensor, bias: Tensor | None, conv_state: Tensor, state_indices: Tensor,
    has_initial: Tensor | None, cu_seqlens: Tensor | None, checkpoint_tokens: Tensor | None,
    checkpoint_indices: Tensor | None, activation: str | None, dtype: torch.dtype, live: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The outputs in ``dtype``, and the states: a launch that reads them all, then those that write."""
    slots = (conv_state, state_indices, has_initial, cu_seqlens)
    y = convolve(x, weight, bias, *slots, activation, dtype, live)
    if checkpoint_tokens is not None:
        keep_states(x, *slots, conv_state, checkpoint_tokens, checkpoint_indices)
    keep_states(x, *slots, conv_state)
    return y


def causal_conv1d_bwd(
    grad_y: Tensor, grad_final_state: Tensor | None, x: Tensor, weight: Tensor, bias: Tensor | None,
    initial_state: Tensor | None, cu_seqlens: Tensor | None, activation: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dx, dweight, dbias, dinitial = (
        x.new_empty(0) if t is None else torch.empty_like(t, memory_format=torch.contiguous_format)
        for t in (x, weight, bias, initial_state)
    )
    cu_seqlens = dense(cu_seqlens)
    tokens, width = _Tokens(x, cu_seqlens), weight.shape[1]
    (tiles, columns), channels = tokens.grid(), tokens.channels
    tiles_each = max(triton.cdiv(tiles, PARTIALS), 1)
    pieces = triton.cdiv(tiles, tiles_each)
    dpre = x.new_empty(tokens.total, channels, dtype=torch.float32)
    partial = x.new_empty(pieces, width + 1, channels, dtype=torch.float32)
    taps = (weight, weight.stride())
    final = (grad_final_state, strides_of(grad_final_state, 3))
    sizes = {"W": width, "BLOCK_C": BLOCK_C, "num_warps": WARPS, "enable_fp_fusion": False}
    tiled = {**sizes, "BLOCK_T": BLOCK_T}
    counts = (tokens.total, tokens.length, tokens.sequences, tokens.steps, channels)
    with guard(x):
        if dpre.numel():
            _weight_gradient_kernel[pieces, columns](
                grad_y, tokens.strides(grad_y), x, tokens.strides(x), *taps, bias, strides_of(bias, 1),
                initial_state, strides_of(initial_state, 3), cu_seqlens, dpre, partial,
                *counts, width - 1, tiles_each, SILU=activation == "silu", **tiled,
            )  # fmt: skip
            _input_gradient_kernel[tokens.grid()](dpre, *taps, *final, cu_seqlens, dx, *counts, **tiled)
        if channels:
            _reduce_kernel[triton.cdiv(channels, REDUCE), width + 1](
                partial, dweight, dbias if bias is not None else None, pieces, channels, W=width, BLOCK=REDUCE,
                enable_fp_fusion=False,
            )  # fmt: skip
        if dinitial.numel():
            length = tokens.length if x.numel() else 0
            _initial_gradient_kernel[tokens.sequences, columns](
                dpre, *taps, *final, cu_seqlens, dinitial, length, channels,
                BLOCK_S=triton.next_power_of_2(width - 1), **sizes,
            )  # fmt: skip
    return dx, dweight, dbias, dinitial


# ---------------------------------------------------------------- compilation without a GPU


def compile_cases(arch: int):
    strides = {
        "x_strides": ("i32:16", "i32:16", 1), "dy_strides": ("i32:16", "i32:16", 1), "w_strides": ("i32", 1),
        "bias_strides": (1,), "state_strides": ("i32:16", "i32", 1), "out_strides": ("i32:16", "i32", 1),
        "dfinal_strides": ("i32:16", "i32", 1),
    }  # fmt: skip
    counts = ("tokens", "length", "sequences", "steps", "past", "columns", "tiles_each", "pieces")
    numbers = {"channels": "i32:16"} | {name: "i32" for name in counts}
    scratch = {f"{t}_ptr": "*fp32" for t in ("dpre", "partial")}
    kernels = (
        _forward_kernel, _state_kernel, _weight_gradient_kernel, _reduce_kernel, _input_gradient_kernel,
        _initial_gradient_kernel,
    )  # fmt: skip
    for dtype, width, packed in (("fp32", 4, True), ("fp16", 3, False), ("bf16", 4, True), ("bf16", 2, False)):
        operands = ("x", "w", "bias", "state", "y", "out", "dy", "dw", "db", "dfinal", "dx", "dinitial")
        types = {f"{t}_ptr": f"*{dtype}" for t in operands} | scratch | strides | numbers
        none = {"live_ptr": None}
        if packed:  # the form of serving: slots, checkpoints, cu_seqlens
            types |= {"indices_ptr": "*i32", "has_initial_ptr": "*i1", "ends_ptr": "*i32"}
            types |= {"at_tokens_ptr": "*i32", "at_indices_ptr": "*i64"}
        else:
            none |= dict.fromkeys(("indices_ptr", "has_initial_ptr", "ends_ptr", "at_tokens_ptr", "at_indices_ptr"))
        mixer = {**types, "y_ptr": "*fp16", "live_ptr": "*i8"}
        flags = {"SILU": packed, "W": width, "BLOCK_T": BLOCK_T, "BLOCK": REDUCE}
        if (dtype, width) == ("bf16", 4):
            names = _forward_kernel.arg_names
            yield Case(
                "conv1d_forward-mixer", _forward_kernel, {name: t for name, t in mixer.items() if name in names},
                {"SILU": True, "W": width, "BLOCK_T": BLOCK_T, "BLOCK_C": BLOCK_C},
                {"num_warps": WARPS, "enable_fp_fusion": False},
            )  # fmt: skip
        for kernel in kernels:
            constexprs = {**flags, **none, "BLOCK_S": 4, "BLOCK_C": STATE_C if kernel is _state_kernel else BLOCK_C}
            names = kernel.arg_names
            yield Case(
                f"conv1d{kernel.__name__.removesuffix('_kernel')}-{dtype}-{width}", kernel,
                {name: t for name, t in types.items() if name in names and name not in none},
                {name: value for name, value in constexprs.items() if name in names},
                {"num_warps": STATE_WARPS if kernel is _state_kernel else WARPS, "enable_fp_fusion": False},
            )  # fmt: skip
