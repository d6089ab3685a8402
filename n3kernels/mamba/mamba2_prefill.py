from __future__ import annotations

import torch
from torch import Tensor

from .. import _dispatch
from .._checks import Check
from . import reference_mixer
from ._sequences import check_checkpoints, check_slots, count_sequences
from ._supports import not_float64, tensor_core_mixer

__all__ = ["mamba2_prefill"]


def mamba2_prefill(
    zxbcdt: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    conv_state: Tensor,
    ssm_state: Tensor,
    state_indices: Tensor,
    A: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    norm_weight: Tensor | None,
    has_initial: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    checkpoint_tokens: Tensor | None = None,
    checkpoint_indices: Tensor | None = None,
    *,
    group_size: int | None = None,
    eps: float = 1e-5,
    norm_before_gate: bool = False,
    activation: str | None = "silu",
    chunk_size: int = 128,
    dt_softplus: bool = True,
    dt_min: float = 0.0,
    dt_max: float | None = None,
) -> Tensor:
    r"""Returns ``norm(scan(act(conv(x | B | C)), dt) + D x, z)``, the mixer of prompts.

    What is between ``in_proj`` and ``out_proj``: `causal_conv1d_slots`, `ssd_scan_slots` and `gated_rms_norm` in one
    call, with nothing rounded in between on the CPU. From 16-bit inputs GPUs keep x, B and C between the parts in
    float16, values beyond 65504 clamped to it; ``"cuda"`` its y and what its tensor cores read too.

    Args:
        zxbcdt: ``[B, L, d]``, or packed ``[T, d]`` with ``cu_seqlens``; float32, float16 or bfloat16; rows of any
            stride. Columns: z (H P), x (H P), B (G N), C (G N), dt (H).
        conv_weight: ``[H P + 2 G N, W]``, floating point: the taps of x, B and C; their number gives G.
        conv_bias: ``[H P + 2 G N]``, floating point, or None.
        conv_state: ``[slots, H P + 2 G N, K]``, K >= W - 1, dtype of ``zxbcdt``, any strides: raw inputs; written in
            place.
        ssm_state: ``[slots, H, P, N]``, float32, float16 or bfloat16, any strides; written in place. Gives H, P and N.
        state_indices: ``[S]``, int32 or int64: the slot of each sequence in both states, each at most once. Negative: a
            padding sequence, whose output is zero and which touches no slot.
        A: ``[H]``, floating point, negative.
        D: ``[H]`` or ``[H, P]``, floating point, or None.
        dt_bias: ``[H]``, floating point, or None.
        norm_weight: ``[H P]``, floating point. None: no norm, ``y * silu(z)``.
        has_initial: ``[S]``, bool: False starts a sequence from zeros whatever its slot holds. None: all True.
        cu_seqlens: ``[S + 1]``, int32: sequence s is tokens ``cu_seqlens[s]`` to ``cu_seqlens[s + 1]``; rises from 0
            to at most T. Tokens behind the last sequence are padding and give zeros. Sequences may be empty.
        checkpoint_tokens: ``[M]``, int32, or None: both states after each of these tokens are kept too.
        checkpoint_indices: ``[M]``, int32 or int64: the slots for them, as for `ssd_scan_slots`.
        group_size: channels per group of the norm; None: H P / G.
        eps, norm_before_gate: as for `gated_rms_norm`.
        activation: ``"silu"`` or None, of the convolution.
        chunk_size: a hint; results differ by rounding alone.
        dt_softplus, dt_min, dt_max: ``dt = clamp(softplus(dt + dt_bias), dt_min, dt_max)``, as for `ssd_scan`.
    Returns:
        ``[B, L, H P]`` or ``[T, H P]``, dtype of ``zxbcdt``, contiguous. Computed in float32 and rounded once; relative
        in RMS to the fp64 definition 1e-5 for float32, 4e-3 for 16-bit inputs. Slots, checkpoints, pieces and
        determinism as for `ssd_scan_slots`; the convolution's states are the raw inputs bit for bit. Not
        differentiable: train on the three operators.
    Raises:
        RuntimeError: a shape, dtype or value outside the above; the message names argument and values. The values of
            ``cu_seqlens``, ``state_indices`` and checkpoints are checked on the CPU only.
    Source: Mamba-2 (arXiv:2405.21060) sec. 7; Nemotron 3 ``mixer``; ``mamba_split_conv1d_scan_combined`` of mamba_ssm.

    >>> H, P, G, N, slots = 4, 8, 2, 16, 3
    >>> zxbcdt, channels = torch.randn(2, 5, 2 * H * P + 2 * G * N + H), H * P + 2 * G * N
    >>> conv_state, ssm_state = torch.zeros(slots, channels, 3), torch.zeros(slots, H, P, N)
    >>> A, D, dt_bias, weight = -torch.rand(H), torch.ones(H), torch.zeros(H), torch.ones(H * P)
    >>> conv, where = torch.randn(channels, 4), torch.tensor([2, 0])
    >>> mamba2_prefill(zxbcdt, conv, None, conv_state, ssm_state, where, A, D, dt_bias, weight).shape
    torch.Size([2, 5, 32])
    """
    return torch.ops.n3.mamba2_prefill.default(
        zxbcdt, conv_weight, conv_bias, conv_state, ssm_state, state_indices, A, D, dt_bias, norm_weight,
        has_initial, cu_seqlens, checkpoint_tokens, checkpoint_indices, group_size=group_size, eps=eps,
        norm_before_gate=norm_before_gate, activation=activation, chunk_size=chunk_size, dt_softplus=dt_softplus,
        dt_min=dt_min, dt_max=dt_max,
    )  # fmt: skip


def check_mixer(
    check: Check, zxbcdt, conv_weight, conv_bias, conv_state, ssm_state, A, D, dt_bias, norm_weight,
    group_size, activation, dt_min, dt_max,
) -> None:  # fmt: skip
    """Checks what prefill and decode share; the dtype of the SSM state is the caller's to check."""
    check.floating("zxbcdt", zxbcdt)
    check.dim("ssm_state", ssm_state, 4)
    slots, heads, head_dim, d_state = ssm_state.shape
    inner = heads * head_dim
    check.dim("conv_weight", conv_weight, 2)
    channels, width = conv_weight.shape
    check.that(width >= 1, "conv_weight must have at least 1 tap", width)
    groups = (channels - inner) // (2 * d_state) if d_state else 0
    right = groups > 0 and channels == inner + 2 * groups * d_state and heads % groups == 0
    rule = f"conv_weight must have {inner} + 2 G {d_state} rows with G a divisor of the {heads} heads of ssm_state"
    check.that(right, rule, channels)
    check.floating("conv_weight", conv_weight)
    check.shape("zxbcdt", zxbcdt, (*zxbcdt.shape[:-1], inner + channels + heads))
    if conv_bias is not None:
        check.shape("conv_bias", conv_bias, (channels,))
        check.floating("conv_bias", conv_bias)
    check.dim("conv_state", conv_state, 3)
    length = conv_state.shape[2]
    check.shape("conv_state", conv_state, (slots, channels, length))
    check.that(length >= width - 1, f"conv_state must hold at least {width - 1} inputs", length)
    check.same_dtype("conv_state", conv_state, "zxbcdt", zxbcdt)
    check.shape("A", A, (heads,))
    check.floating("A", A)
    if D is not None:
        check.dim("D", D, 1, 2)
        check.shape("D", D, (heads, head_dim)[: D.dim()])
        check.floating("D", D)
    if dt_bias is not None:
        check.shape("dt_bias", dt_bias, (heads,))
        check.floating("dt_bias", dt_bias)
    if norm_weight is not None:
        check.shape("norm_weight", norm_weight, (inner,))
        check.floating("norm_weight", norm_weight)
    if group_size is not None:
        right = group_size > 0 and inner % group_size == 0
        check.that(right, f"group_size must divide the {inner} channels of norm_weight", group_size)
    check.choice("activation", activation, (None, "silu"))
    if dt_max is not None:
        check.that(dt_max >= dt_min, f"dt_max must be at least dt_min ({dt_min:g})", f"{dt_max:g}")
    check.same_device("zxbcdt", zxbcdt, conv_weight=conv_weight, conv_bias=conv_bias, conv_state=conv_state)
    check.same_device("zxbcdt", zxbcdt, ssm_state=ssm_state, A=A, D=D, dt_bias=dt_bias, norm_weight=norm_weight)


def _check(
    zxbcdt, conv_weight, conv_bias, conv_state, ssm_state, state_indices, A, D, dt_bias, norm_weight,
    has_initial=None, cu_seqlens=None, checkpoint_tokens=None, checkpoint_indices=None, *, group_size=None, eps=1e-5,
    norm_before_gate=False, activation="silu", chunk_size=128, dt_softplus=True, dt_min=0.0, dt_max=None,
):  # fmt: skip
    check = Check("mamba2_prefill")
    sequences = count_sequences(check, zxbcdt, cu_seqlens, 3, "zxbcdt")
    check_mixer(
        check, zxbcdt, conv_weight, conv_bias, conv_state, ssm_state, A, D, dt_bias, norm_weight,
        group_size, activation, dt_min, dt_max,
    )  # fmt: skip
    check.floating("ssm_state", ssm_state)
    check_slots(check, state_indices, has_initial, sequences)
    check_checkpoints(check, checkpoint_tokens, checkpoint_indices)
    check.that(chunk_size >= 1, "chunk_size must be at least 1", chunk_size)
    check.same_device("zxbcdt", zxbcdt, state_indices=state_indices, has_initial=has_initial, cu_seqlens=cu_seqlens)
    where = {"checkpoint_tokens": checkpoint_tokens, "checkpoint_indices": checkpoint_indices}
    check.same_device("zxbcdt", zxbcdt, **where)


def fake(zxbcdt, conv_weight, conv_bias, conv_state, ssm_state, *args, **kwargs):
    return zxbcdt.new_empty(*zxbcdt.shape[:-1], ssm_state.shape[1] * ssm_state.shape[2])


_dispatch.register(
    "mamba2_prefill",
    check=_check,
    fake=fake,
    reference=reference_mixer.mamba2_prefill,
    supports={"cpu": not_float64, "triton": not_float64, "cuda": tensor_core_mixer},
    triton="n3kernels.triton_ops.mamba.mixer:mamba2_prefill",
)
