from __future__ import annotations

import torch
from torch import Tensor

from .. import _dispatch
from .._autograd import grads_through
from .._checks import Check
from . import reference
from ._sequences import check_checkpoints, check_slots, count_sequences
from ._supports import not_float64, tensor_core_scan

__all__ = ["ssd_scan", "ssd_scan_slots"]


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
    r"""Returns ``y_t = S_t C_t + D x_t`` with ``S_t = exp(A dt_t) S_{t-1} + dt_t x_t B_t^T`` per head, and the last S.

    ``dt = clamp(softplus(dt + dt_bias), dt_min, dt_max)``, where softplus is ``log1p(exp(v))``, and v itself above 20.
    With a gate, ``y_t`` is then multiplied by ``silu(z_t)``.

    Args:
        x: ``[B, L, H, P]``, or packed ``[T, H, P]`` with ``cu_seqlens``; float32, float16 or bfloat16. As for dt, B, C
            and z, any strides: column slices of one projection are read in place.
        dt: ``[B, L, H]`` or ``[T, H]``, floating point.
        A: ``[H]``, floating point, negative: the log decay per unit of time.
        B, C: ``[B, L, G, N]`` or ``[T, G, N]``, dtype of ``x``; G divides H, heads ``g H/G`` to ``(g + 1) H/G`` share
            group g.
        D: ``[H]`` or ``[H, P]``, floating point, or None.
        z: gate, shape and dtype of ``x``, or None.
        dt_bias: ``[H]``, floating point, or None.
        initial_states: ``[S, H, P, N]``, floating point; None: zeros.
        cu_seqlens: ``[S + 1]``, int32: sequence s is tokens ``cu_seqlens[s]`` to ``cu_seqlens[s + 1]``; rises from 0
            to at most T. Tokens behind the last sequence are padding and give zeros. Sequences may be empty.
        chunk_size: a hint; results differ by rounding alone.
        dt_softplus: False takes ``dt + dt_bias`` as it is.
        dt_min, dt_max: the clamp; None: no upper limit.
    Returns:
        ``y``, shape and dtype of ``x``, and ``final_states`` ``[S, H, P, N]``, float32 (float64 if ``x`` is), both
        contiguous; S is B without ``cu_seqlens``. States and sums are float32. Error against the fp64 recurrence,
        relative in RMS over a sequence's head: 1e-5 for ``y`` and states from float32; from 16-bit inputs 4e-3 for
        ``y`` and 3e-3 for states. A sequence's bits do not depend on the others, and NaN stays in its sequence; dt = 0
        leaves a state as it is. Differentiable in x, dt, A, B, C, D, z, dt_bias and initial_states.
    Raises:
        RuntimeError: a shape, dtype or value outside the above; the message names argument and values. The values of
            ``cu_seqlens`` are checked on the CPU only.
    Source: Mamba-2 (arXiv:2405.21060) sec. 6; Nemotron 3 ``mixer``, with P = 64, N = 128, G = 8 and no clamp.

    >>> x, dt, A = torch.randn(2, 5, 4, 8), torch.randn(2, 5, 4), -torch.rand(4)
    >>> B, C = torch.randn(2, 2, 5, 2, 16)
    >>> y, final_states = ssd_scan(x, dt, A, B, C)
    >>> y.shape, final_states.shape
    (torch.Size([2, 5, 4, 8]), torch.Size([2, 4, 8, 16]))
    """
    return torch.ops.n3.ssd_scan.default(
        x, dt, A, B, C, D, z, dt_bias, initial_states, cu_seqlens,
        chunk_size=chunk_size, dt_softplus=dt_softplus, dt_min=dt_min, dt_max=dt_max,
    )  # fmt: skip


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
    r"""`ssd_scan` on states kept in slots: returns ``y`` and replaces each sequence's state by its final one.

    Args:
        x, dt, A, B, C, D, z, dt_bias, cu_seqlens, chunk_size, dt_softplus, dt_min, dt_max: as for `ssd_scan`.
        state: ``[slots, H, P, N]``, float32, float16 or bfloat16, any strides; written in place.
        state_indices: ``[S]``, int32 or int64: the slot of each sequence, each at most once. A negative index marks a
            padding sequence: its output is zero and no slot is read or written.
        has_initial: ``[S]``, bool: False starts a sequence from zeros whatever its slot holds. None: all True.
        checkpoint_tokens: ``[M]``, int32, or None: the state after each of these tokens is kept too. A token is named
            by its position among all: in packed tokens its row, in a batch ``b L + t``.
        checkpoint_indices: ``[M]``, int32 or int64: the slot for each of these states; negative: not written. Nor is
            one of a padding sequence or behind the last sequence. All slots written must be distinct.
    Returns:
        ``y``, shape, dtype, accuracy and determinism as for `ssd_scan`. States are float32 inside the call and rounded
        once, to nearest even, when written. The slot of an empty sequence keeps its state, or becomes zero where
        ``has_initial`` is False. Checkpoints change the bits of neither ``y`` nor final states, and each has those of
        the final state of the sequence cut off behind its token. From kernels, a prompt in pieces that begin at
        multiples of 64 tokens, with a float32 state, gives the bits of the prompt in one. All states are read before
        any is written; nothing is written when the call raises.
    Raises:
        RuntimeError: a shape, dtype or value outside the above; the message names argument and values. The values of
            ``cu_seqlens``, ``state_indices`` and checkpoints are checked on the CPU only.
    Source: as for `ssd_scan`; states by slot as serving engines keep them.

    >>> x, dt, A = torch.randn(5, 4, 8), torch.randn(5, 4), -torch.rand(4)
    >>> B, C = torch.randn(2, 5, 2, 16)
    >>> state, ends = torch.zeros(3, 4, 8, 16), torch.tensor([0, 2, 5], dtype=torch.int32)
    >>> y = ssd_scan_slots(x, dt, A, B, C, None, None, None, state, torch.tensor([2, 0]), cu_seqlens=ends)
    >>> y.shape, int(state[1].count_nonzero())
    (torch.Size([5, 4, 8]), 0)
    """
    return torch.ops.n3.ssd_scan.slots(
        x, dt, A, B, C, D, z, dt_bias, state, state_indices, has_initial, cu_seqlens,
        checkpoint_tokens, checkpoint_indices,
        chunk_size=chunk_size, dt_softplus=dt_softplus, dt_min=dt_min, dt_max=dt_max,
    )  # fmt: skip


def check_operands(check: Check, x, dt, A, B, C, D, z, dt_bias, dt_min, dt_max) -> None:
    """Checks what scan and update share: all operands but states and indices, whatever the leading dimensions."""
    check.floating("x", x)
    *tokens, heads, head_dim = x.shape
    check.shape("dt", dt, (*tokens, heads))
    check.floating("dt", dt)
    check.shape("A", A, (heads,))
    check.floating("A", A)
    check.dim("B", B, x.dim())
    groups = B.shape[-2]
    check.shape("B", B, (*tokens, groups, B.shape[-1]))
    check.same_dtype("B", B, "x", x)
    check.that(groups > 0 and heads % groups == 0, f"groups of B must divide the {heads} heads of x", groups)
    check.shape("C", C, B.shape)
    check.same_dtype("C", C, "x", x)
    if D is not None:
        check.dim("D", D, 1, 2)
        check.shape("D", D, (heads, head_dim)[: D.dim()])
        check.floating("D", D)
    if z is not None:
        check.shape("z", z, x.shape)
        check.same_dtype("z", z, "x", x)
    if dt_bias is not None:
        check.shape("dt_bias", dt_bias, (heads,))
        check.floating("dt_bias", dt_bias)
    if dt_max is not None:
        check.that(dt_max >= dt_min, f"dt_max must be at least dt_min ({dt_min:g})", f"{dt_max:g}")
    check.same_device("x", x, dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=dt_bias)


def _check(
    x, dt, A, B, C, D=None, z=None, dt_bias=None, initial_states=None, cu_seqlens=None,
    *, chunk_size=128, dt_softplus=True, dt_min=0.0, dt_max=None,
):  # fmt: skip
    check = Check("ssd_scan")
    sequences = count_sequences(check, x, cu_seqlens, 4)
    check_operands(check, x, dt, A, B, C, D, z, dt_bias, dt_min, dt_max)
    if initial_states is not None:
        check.shape("initial_states", initial_states, (sequences, *x.shape[-2:], B.shape[-1]))
        check.floating("initial_states", initial_states)
    check.that(chunk_size >= 1, "chunk_size must be at least 1", chunk_size)
    check.same_device("x", x, initial_states=initial_states, cu_seqlens=cu_seqlens)


def _check_slots(
    x, dt, A, B, C, D, z, dt_bias, state, state_indices, has_initial=None, cu_seqlens=None,
    checkpoint_tokens=None, checkpoint_indices=None, *, chunk_size=128, dt_softplus=True, dt_min=0.0, dt_max=None,
):  # fmt: skip
    check = Check("ssd_scan")
    sequences = count_sequences(check, x, cu_seqlens, 4)
    check_operands(check, x, dt, A, B, C, D, z, dt_bias, dt_min, dt_max)
    check.dim("state", state, 4)
    check.shape("state", state, (state.shape[0], *x.shape[-2:], B.shape[-1]))
    check.floating("state", state)
    check_slots(check, state_indices, has_initial, sequences)
    check_checkpoints(check, checkpoint_tokens, checkpoint_indices)
    check.that(chunk_size >= 1, "chunk_size must be at least 1", chunk_size)
    check.same_device("x", x, state=state, state_indices=state_indices, has_initial=has_initial, cu_seqlens=cu_seqlens)
    check.same_device("x", x, checkpoint_tokens=checkpoint_tokens, checkpoint_indices=checkpoint_indices)


def _check_bwd(
    grad_y, grad_final_states, x, dt, A, B, C, D, z, dt_bias, initial_states, cu_seqlens,
    chunk_size, dt_softplus, dt_min, dt_max,
):  # fmt: skip
    options = {"chunk_size": chunk_size, "dt_softplus": dt_softplus, "dt_min": dt_min, "dt_max": dt_max}
    _check(x, dt, A, B, C, D, z, dt_bias, initial_states, cu_seqlens, **options)
    check = Check("ssd_scan_bwd")
    check.shape("grad_y", grad_y, x.shape)
    check.floating("grad_y", grad_y)
    if grad_final_states is not None:
        sequences = count_sequences(check, x, cu_seqlens, 4)
        check.shape("grad_final_states", grad_final_states, (sequences, *x.shape[-2:], B.shape[-1]))
        check.floating("grad_final_states", grad_final_states)
    check.same_device("x", x, grad_y=grad_y, grad_final_states=grad_final_states)


def _fake(
    x, dt, A, B, C, D=None, z=None, dt_bias=None, initial_states=None, cu_seqlens=None,
    *, chunk_size=128, dt_softplus=True, dt_min=0.0, dt_max=None,
):  # fmt: skip
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    wide = torch.promote_types(x.dtype, torch.float32)
    final_states = x.new_empty(sequences, *x.shape[-2:], B.shape[-1], dtype=wide)
    return torch.empty_like(x, memory_format=torch.contiguous_format), final_states


def _fake_slots(x, *args, **kwargs):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _reference_bwd(
    grad_y, grad_final_states, x, dt, A, B, C, D, z, dt_bias, initial_states, cu_seqlens,
    chunk_size, dt_softplus, dt_min, dt_max,
):  # fmt: skip
    options = {"chunk_size": chunk_size, "dt_softplus": dt_softplus, "dt_min": dt_min, "dt_max": dt_max}

    def forward(*inputs):
        # Until grads_through restores the dispatch keys: the user's autocast would narrow the products of the gradient.
        torch.set_autocast_enabled(x.device.type, False)
        return reference.ssd_scan(*inputs, cu_seqlens, **options)

    inputs = (x, dt, A, B, C, D, z, dt_bias, initial_states)
    return tuple(g.contiguous() for g in grads_through(forward, inputs, (grad_y, grad_final_states)))


def _fake_bwd(
    grad_y, grad_final_states, x, dt, A, B, C, D, z, dt_bias, initial_states, cu_seqlens,
    chunk_size, dt_softplus, dt_min, dt_max,
):  # fmt: skip
    return tuple(
        x.new_empty(0) if t is None else torch.empty_like(t, memory_format=torch.contiguous_format)
        for t in (x, dt, A, B, C, D, z, dt_bias, initial_states)
    )


def _setup_context(ctx, inputs, keyword_only_inputs, output):
    ctx.save_for_backward(*inputs)
    ctx.options = tuple(keyword_only_inputs[name] for name in ("chunk_size", "dt_softplus", "dt_min", "dt_max"))
    ctx.set_materialize_grads(False)  # an unused final state costs nothing


def _backward(ctx, grad_y, grad_final_states):
    *inputs, cu_seqlens = ctx.saved_tensors
    grad_y = torch.zeros_like(inputs[0]) if grad_y is None else grad_y
    grads = torch.ops.n3.ssd_scan_bwd.default(grad_y, grad_final_states, *inputs, cu_seqlens, *ctx.options)
    return (*(None if t is None else g for t, g in zip(inputs, grads, strict=True)), None)


_dispatch.register(
    "ssd_scan",
    check=_check,
    fake=_fake,
    reference=reference.ssd_scan,
    triton="n3kernels.triton_ops.mamba.ssd_scan:ssd_scan",
    setup_context=_setup_context,
    backward=_backward,
    supports={"cpu": not_float64, "triton": not_float64, "cuda": tensor_core_scan},
)
_dispatch.register(
    "ssd_scan.slots",
    check=_check_slots,
    fake=_fake_slots,
    reference=reference.ssd_scan_slots,
    triton="n3kernels.triton_ops.mamba.ssd_scan:ssd_scan_slots",
    supports={"cpu": not_float64, "triton": not_float64, "cuda": tensor_core_scan},
)
_dispatch.register(
    "ssd_scan_bwd",
    check=_check_bwd,
    fake=_fake_bwd,
    reference=_reference_bwd,
    triton="n3kernels.triton_ops.mamba.ssd_scan_bwd:ssd_scan_bwd",
    supports={"cpu": not_float64, "triton": not_float64},
    missing={"cuda": "gradients have a Triton kernel"},
)
