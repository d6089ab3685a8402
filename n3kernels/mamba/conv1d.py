from __future__ import annotations

import torch
from torch import Tensor

from .. import _dispatch
from .._autograd import grads_through
from .._checks import Check
from . import reference
from ._sequences import check_checkpoints, check_slots, count_sequences
from ._supports import not_float64

__all__ = ["causal_conv1d", "causal_conv1d_slots"]


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    activation: str | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Returns ``y_t = act(bias + sum_k weight[:, k] * x_{t-W+1+k})``, per channel, and the last inputs.

    Before a sequence's first token stand the W - 1 inputs of ``initial_state``, or zeros.

    Args:
        x: ``[B, L, C]``, or packed ``[T, C]`` with ``cu_seqlens``; float32, float16 or bfloat16. Any strides: a column
            slice of a wider matrix is read in place.
        weight: ``[C, W]``, floating point; the last tap meets the newest input. Any W >= 1.
        bias: ``[C]``, floating point, or None.
        initial_state: ``[S, C, W - 1]``, dtype of ``x``: the raw inputs before each of the S sequences, oldest first.
        cu_seqlens: ``[S + 1]``, int32: sequence s is tokens ``cu_seqlens[s]`` to ``cu_seqlens[s + 1]``; rises from 0
            to at most T. Tokens behind the last sequence are padding and give zeros. Sequences may be empty.
        activation: None or ``"silu"``.
    Returns:
        ``y``, shape and dtype of ``x``, and ``final_state`` ``[S, C, W - 1]``, dtype of ``x``, both contiguous; S is B
        without ``cu_seqlens``. Summed in float32 and rounded once: within half a unit in the last place of the fp64
        definition plus 1e-6 of the sum of the terms' magnitudes. The final state is the last W - 1 raw inputs, bit for
        bit, reaching back into the initial state where a sequence is shorter. A sequence's bits do not depend on the
        others. Differentiable in ``x``, ``weight``, ``bias`` and ``initial_state``.
    Raises:
        RuntimeError: a shape, dtype or value outside the above; the message names argument and values. The values of
            ``cu_seqlens`` are checked on the CPU only.
    Source: Mamba (arXiv:2312.00752) sec. 3.4; Nemotron 3 ``mixer.conv1d``, W = 4 with SiLU over x, B and C together.

    >>> y, final_state = causal_conv1d(torch.randn(2, 5, 8), torch.randn(8, 4), activation="silu")
    >>> y.shape, final_state.shape
    (torch.Size([2, 5, 8]), torch.Size([2, 8, 3]))
    """
    return torch.ops.n3.causal_conv1d.default(x, weight, bias, initial_state, cu_seqlens, activation=activation)


def causal_conv1d_slots(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    conv_state: Tensor,
    state_indices: Tensor,
    has_initial: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    checkpoint_tokens: Tensor | None = None,
    checkpoint_indices: Tensor | None = None,
    *,
    activation: str | None = None,
) -> Tensor:
    r"""`causal_conv1d` on states kept in slots: returns ``y`` and replaces each sequence's state by its final one.

    Args:
        x, weight, bias, cu_seqlens, activation: as for `causal_conv1d`.
        conv_state: ``[slots, C, K]``, K >= W - 1, dtype of ``x``, any strides: the last K raw inputs, oldest first, of
            which the newest W - 1 are read; written in place.
        state_indices: ``[S]``, int32 or int64: the slot of each sequence, each at most once. A negative index marks a
            padding sequence: its output is zero and no slot is read or written.
        has_initial: ``[S]``, bool: False starts a sequence from zeros whatever its slot holds. None: all True.
        checkpoint_tokens: ``[M]``, int32, or None: the state after each of these tokens is kept too. A token is named
            by its position among all: in packed tokens its row, in a batch ``b L + t``.
        checkpoint_indices: ``[M]``, int32 or int64: the slot for each of these states; negative: not written. Nor is
            one of a padding sequence or behind the last sequence. All slots written must be distinct.
    Returns:
        ``y``, shape, dtype, accuracy and determinism as for `causal_conv1d`. The slot of an empty sequence keeps its
        state, or becomes zero where ``has_initial`` is False. Checkpoints change neither ``y`` nor final states, and
        each is the final state of the sequence cut off behind its token. All states are read before any is written;
        nothing is written when the call raises.
    Raises:
        RuntimeError: a shape, dtype or value outside the above; the message names argument and values. The values of
            ``cu_seqlens``, ``state_indices`` and checkpoints are checked on the CPU only.
    Source: as for `causal_conv1d`; states by slot as serving engines keep them.

    >>> conv_state = torch.zeros(4, 8, 3)
    >>> x = torch.randn(2, 5, 8)
    >>> y = causal_conv1d_slots(x, torch.randn(8, 4), None, conv_state, torch.tensor([2, -1]))
    >>> bool((conv_state[2] == x[0, 2:].T).all()), int(y[1].count_nonzero())
    (True, 0)
    """
    return torch.ops.n3.causal_conv1d.slots(
        x, weight, bias, conv_state, state_indices, has_initial, cu_seqlens, checkpoint_tokens, checkpoint_indices,
        activation=activation,
    )  # fmt: skip


def check_taps(check: Check, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> tuple[int, int]:
    """Checks what every form of the convolution has; returns channels and the length of a state, width - 1."""
    check.floating("x", x)
    channels = x.shape[-1]
    check.dim("weight", weight, 2)
    check.shape("weight", weight, (channels, weight.shape[1]))
    check.that(weight.shape[1] >= 1, "weight must have at least 1 tap", 0)
    check.floating("weight", weight)
    if bias is not None:
        check.shape("bias", bias, (channels,))
        check.floating("bias", bias)
    check.choice("activation", activation, (None, "silu"))
    return channels, weight.shape[1] - 1


def _check(x, weight, bias=None, initial_state=None, cu_seqlens=None, *, activation=None):
    check = Check("causal_conv1d")
    sequences = count_sequences(check, x, cu_seqlens, 3)
    channels, past = check_taps(check, x, weight, bias, activation)
    if initial_state is not None:
        check.shape("initial_state", initial_state, (sequences, channels, past))
        check.same_dtype("initial_state", initial_state, "x", x)
    check.same_device("x", x, weight=weight, bias=bias, initial_state=initial_state, cu_seqlens=cu_seqlens)


def check_conv_state(check: Check, conv_state: Tensor, channels: int, past: int, x: Tensor) -> None:
    check.dim("conv_state", conv_state, 3)
    slots, _, length = conv_state.shape
    check.shape("conv_state", conv_state, (slots, channels, length))
    check.that(length >= past, f"conv_state must hold at least {past} inputs", length)
    check.same_dtype("conv_state", conv_state, "x", x)


def _check_slots(
    x, weight, bias, conv_state, state_indices, has_initial=None, cu_seqlens=None,
    checkpoint_tokens=None, checkpoint_indices=None, *, activation=None,
):  # fmt: skip
    check = Check("causal_conv1d")
    sequences = count_sequences(check, x, cu_seqlens, 3)
    channels, past = check_taps(check, x, weight, bias, activation)
    check_conv_state(check, conv_state, channels, past, x)
    check_slots(check, state_indices, has_initial, sequences)
    check_checkpoints(check, checkpoint_tokens, checkpoint_indices)
    check.same_device("x", x, weight=weight, bias=bias, conv_state=conv_state)
    check.same_device("x", x, state_indices=state_indices, has_initial=has_initial, cu_seqlens=cu_seqlens)
    check.same_device("x", x, checkpoint_tokens=checkpoint_tokens, checkpoint_indices=checkpoint_indices)


def _check_bwd(grad_y, grad_final_state, x, weight, bias, initial_state, cu_seqlens, activation):
    _check(x, weight, bias, initial_state, cu_seqlens, activation=activation)
    check = Check("causal_conv1d_bwd")
    check.shape("grad_y", grad_y, x.shape)
    check.same_dtype("grad_y", grad_y, "x", x)
    if grad_final_state is not None:
        sequences = count_sequences(check, x, cu_seqlens, 3)
        check.shape("grad_final_state", grad_final_state, (sequences, x.shape[-1], weight.shape[1] - 1))
        check.same_dtype("grad_final_state", grad_final_state, "x", x)
    check.same_device("x", x, grad_y=grad_y, grad_final_state=grad_final_state)


def _fake(x, weight, bias=None, initial_state=None, cu_seqlens=None, *, activation=None):
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    final_state = x.new_empty(sequences, weight.shape[0], weight.shape[1] - 1)
    return torch.empty_like(x, memory_format=torch.contiguous_format), final_state


def _fake_slots(x, *args, **kwargs):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _reference_bwd(grad_y, grad_final_state, x, weight, bias, initial_state, cu_seqlens, activation):
    def forward(x, weight, bias, initial_state):
        return reference.causal_conv1d(x, weight, bias, initial_state, cu_seqlens, activation=activation)

    grads = grads_through(forward, (x, weight, bias, initial_state), (grad_y, grad_final_state))
    return tuple(g.contiguous() for g in grads)


def _fake_bwd(grad_y, grad_final_state, x, weight, bias, initial_state, cu_seqlens, activation):
    return tuple(
        x.new_empty(0) if t is None else torch.empty_like(t, memory_format=torch.contiguous_format)
        for t in (x, weight, bias, initial_state)
    )


def _setup_context(ctx, inputs, keyword_only_inputs, output):
    ctx.save_for_backward(*inputs)
    ctx.activation = keyword_only_inputs["activation"]
    ctx.set_materialize_grads(False)  # an unused final state costs nothing


def _backward(ctx, grad_y, grad_final_state):
    x, weight, bias, initial_state, cu_seqlens = ctx.saved_tensors
    grad_y = torch.zeros_like(x) if grad_y is None else grad_y
    dx, dweight, dbias, dinitial = torch.ops.n3.causal_conv1d_bwd.default(
        grad_y, grad_final_state, x, weight, bias, initial_state, cu_seqlens, ctx.activation
    )
    return dx, dweight, None if bias is None else dbias, None if initial_state is None else dinitial, None


_dispatch.register(
    "causal_conv1d",
    check=_check,
    fake=_fake,
    reference=reference.causal_conv1d,
    setup_context=_setup_context,
    backward=_backward,
    supports={"cpu": not_float64, "triton": not_float64, "cuda": not_float64},
    triton="n3kernels.triton_ops.mamba.conv1d:causal_conv1d",
)
_dispatch.register(
    "causal_conv1d.slots",
    check=_check_slots,
    fake=_fake_slots,
    reference=reference.causal_conv1d_slots,
    supports={"cpu": not_float64, "triton": not_float64, "cuda": not_float64},
    triton="n3kernels.triton_ops.mamba.conv1d:causal_conv1d_slots",
)
_dispatch.register(
    "causal_conv1d_bwd",
    check=_check_bwd,
    fake=_fake_bwd,
    reference=_reference_bwd,
    supports={"cpu": not_float64, "triton": not_float64, "cuda": not_float64},
    triton="n3kernels.triton_ops.mamba.conv1d:causal_conv1d_bwd",
)
